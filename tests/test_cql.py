"""CQL's functions beside COMBO's, plain torch computations and data without successors."""

import inspect
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_combo import (
    ACTION_DIM,
    BATCH,
    OBS_DIM,
    K,
    Table,
    as_rows,
    assert_compiled_equals_eager,
    assert_updates_equal_plain_ones,
    needs_compiler,
    numpy_critic_loss,
    random_agent,
    random_batch,
    random_noise,
    underestimates,
)

import algos.combo as combo
import algos.cql as cql
from common.dataset import load_dataset


# --- The method, whose functions test_combo.py checks ---
@pytest.mark.parametrize("name", ["proposals", "conservative_gap", "critic_loss", "Agent"])
def test_functions_are_combos_letter_by_letter(name):
    assert inspect.getsource(getattr(cql, name)) == inspect.getsource(getattr(combo, name))


def test_combo_without_simulated_rows_is_cql():
    settings = {"actor_lr": 2e-3, "lagrange_threshold": 1.0}
    args, combo_args = cql.Args(**settings), combo.Args(real_ratio=1.0, **settings)
    agent, other = random_agent(cql, args), random_agent(combo, combo_args)
    for step in range(3):
        rows, noises = as_rows(random_batch(seed=step)), random_noise(seed=10 + step)
        info, expected = cql.update(agent, rows, *noises, args), combo.update(other, rows, *noises, combo_args)
        assert info.keys() == expected.keys() and all(torch.equal(info[name], expected[name]) for name in info)
    for name, value in other.state_dict().items():
        assert torch.equal(agent.state_dict()[name], value), name


def test_update_has_the_loss_of_numpy_over_all_rows_of_the_batch():
    args = cql.Args(gamma=0.9)
    agent, batch, (noise, proposal_noise) = random_agent(cql, args), random_batch(), random_noise()
    expected, gap = numpy_critic_loss(agent, batch, noise[0], proposal_noise, 0.9, 0, BATCH, 5.0, "all")
    info = cql.update(agent, as_rows(batch), noise, proposal_noise, args)
    assert info["critic_loss"].item() == pytest.approx(expected, rel=1e-9)
    assert info["conservative_gap"].item() == pytest.approx(gap, rel=1e-9)


@pytest.mark.parametrize(
    "settings",
    [{}, {"lagrange_threshold": 1.0}, {"conservative_coef": 0.0}],  # the last is SAC without entropy in its target
    ids=str,
)
def test_updates_equal_those_of_a_plain_learner(settings):
    args = cql.Args(actor_lr=2e-3, critic_lr=1e-3, alpha_lr=3e-3, gamma=0.95, tau=0.1, **settings)
    assert_updates_equal_plain_ones(cql, args, first=0, num_real=BATCH)


def test_every_logged_pair_is_pushed_up_and_every_sample_down():
    args = cql.Args()
    agent, batch, noises = random_agent(cql, args), random_batch(), random_noise()
    batch[2], batch[4] = torch.zeros_like(batch[2]), torch.ones_like(batch[4])  # no TD error where Q is 0
    seen, ignore = [], SimpleNamespace(minimize=lambda loss: None)
    opts = {"critic_opt": SimpleNamespace(minimize=seen.append), "actor_opt": ignore, "alpha_opt": ignore}
    tables = {"critic": Table(BATCH + 3 * K * BATCH), "target_critic": Table(BATCH + 3 * K * BATCH)}
    agent = SimpleNamespace(actor=agent.actor, log_alpha=agent.log_alpha, log_kappa=agent.log_kappa, **tables, **opts)
    cql.update(agent, as_rows(batch), *noises, args)
    grad = torch.autograd.grad(seen[0], agent.critic.q)[0]
    torch.testing.assert_close(grad[:, :BATCH], torch.full((2, BATCH), -5 / BATCH, dtype=torch.float64))
    assert (grad[:, BATCH:] > 0).all()
    torch.testing.assert_close(grad.sum(dim=1), torch.zeros(2, dtype=torch.float64))


def test_learned_values_are_lower_bounds_that_tighten_as_w_vanishes():
    v = [underestimates(coef, all_logged=True)[0] for coef in (1.0, 0.1)]
    assert (v[0] > v[1]).all() and (v[1] > -0.02).all() and (v[0] > 0.1).all()


@needs_compiler
def test_compiled_and_eager_updates_agree(capsys):
    assert_compiled_equals_eager(cql, cql.Args(hidden_layers=1), capsys)


# --- Batches ---
def test_batch_draws_uniformly_from_all_rows():
    torch.manual_seed(0)
    rows = torch.arange(20.0)[:, None].expand(-1, 10)
    batches = torch.cat([cql.sample_batch(rows, cql.Args()) for _ in range(50)])
    assert batches.shape == (50 * 256, 10) and (batches == batches[:, :1]).all()
    values, counts = batches[:, 0].unique(return_counts=True)
    assert values.tolist() == [*range(20)] and counts.min() > 500  # expected 640


def test_rows_without_a_successor_are_learned_from_exactly_where_the_target_needs_none(tmp_path):
    rng = np.random.default_rng(0)
    obs, action = rng.normal(size=(60, OBS_DIM)), rng.uniform(-1, 1, (60, ACTION_DIM))
    step = np.arange(60)
    arrays = {"observations": obs, "actions": action, "rewards": step.astype(float)}
    terminal, timeout = step % 20 == 9, step % 20 == 19  # no next_observations are recorded
    np.savez(tmp_path / "own.npz", **arrays, terminals=terminal, timeouts=timeout)
    data = load_dataset(str(tmp_path / "own.npz"))
    rows = cql.flat_rows(data)
    assert sorted(data.reward.tolist()) == [i for i in range(60) if not timeout[i]]
    known = rows[:, -1] == 0
    next_obs = rows[:, OBS_DIM + ACTION_DIM + 1 : -1]
    torch.testing.assert_close(next_obs[known], torch.tensor(obs, dtype=torch.float32)[data.reward[known].long() + 1])
    args = cql.Args(conservative_coef=0.0)
    losses = []
    for placeholder in (0.0, 100.0):
        torch.manual_seed(0)
        agent = cql.Agent(OBS_DIM, ACTION_DIM, args)
        next_obs[~known] = placeholder
        noise, proposal_noise = random_noise(torch.float32, batch=len(rows))
        losses.append(cql.update(agent, rows, noise, proposal_noise, args)["critic_loss"].item())
    assert losses[0] == losses[1] and math.isfinite(losses[0])
