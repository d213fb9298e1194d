"""CQL's functions beside COMBO's and MOPO's, plain torch computations and data without successors."""

import math

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
    assert_updates_equal_plain_ones,
    numpy_critic_loss,
    random_agent,
    random_batch,
    random_noise,
    small_args,
    underestimates,
)

import algos.combo as combo
import algos.cql as cql
import algos.mopo as mopo
from common.dataset import load_dataset


# --- The method ---
def test_combo_without_simulated_rows_is_cql():
    settings = {"actor_lr": 2e-3, "lagrange_threshold": 1.0}
    args, combo_args = small_args(cql, **settings), small_args(combo, real_ratio=1.0, **settings)
    agent, other = random_agent(cql, args), random_agent(combo, combo_args)
    for step in range(3):
        rows, noise = as_rows(random_batch(seed=step)), random_noise(seed=10 + step)
        info, expected = cql.update(agent, rows, noise, args), combo.update(other, rows, noise, combo_args)
        assert info.keys() == expected.keys() and all(torch.equal(info[name], expected[name]) for name in info)
    for name, value in other.state_dict().items():
        assert torch.equal(agent.state_dict()[name], value), name


def test_without_the_term_and_with_entropy_updates_are_those_of_sac_on_logged_rows():
    settings = {"actor_lr": 2e-3, "critic_lr": 1e-3, "alpha_lr": 3e-3}
    args = small_args(cql, conservative_coef=0.0, backup_entropy=True, **settings)
    sac_args = small_args(mopo, real_ratio=1.0, **settings)
    agent, sac = random_agent(cql, args), random_agent(mopo, sac_args)
    for step in range(5):
        rows, noise = as_rows(random_batch(seed=step)), random_noise(seed=10 + step)
        cql.update(agent, rows, noise, args)
        mopo.update(sac, rows, noise, sac_args)
    for name, value in sac.state_dict().items():
        torch.testing.assert_close(agent.state_dict()[name], value, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("backup_entropy", [False, True])
@pytest.mark.parametrize("lse", ["all", "per-source"])
def test_update_has_the_loss_of_numpy_over_all_rows_of_the_batch(lse, backup_entropy):
    args = small_args(cql, gamma=0.9, lse=lse, backup_entropy=backup_entropy)
    agent, batch, noise = random_agent(cql, args), random_batch(), random_noise()
    alpha = float(backup_entropy)  # log_alpha starts at 0
    expected, gap = numpy_critic_loss(agent, batch, noise, 0.9, 0, BATCH, 5.0, lse, alpha)
    info = cql.update(agent, as_rows(batch), noise, args)
    assert info["critic_loss"].item() == pytest.approx(expected, rel=1e-9)
    assert info["conservative_gap"].item() == pytest.approx(gap, rel=1e-9)


@pytest.mark.parametrize(
    "settings",
    [{}, {"lagrange_threshold": 1.0}, {"conservative_coef": 0.0}],  # the last is SAC without entropy in its target
    ids=str,
)
def test_updates_equal_those_of_a_plain_learner(settings):
    args = small_args(cql, actor_lr=2e-3, critic_lr=1e-3, alpha_lr=3e-3, gamma=0.95, tau=0.1, **settings)
    assert_updates_equal_plain_ones(cql, args, first=0, num_real=BATCH)


def test_every_logged_pair_is_pushed_up_and_every_sample_down():
    args = small_args(cql)
    agent, batch, noise = random_agent(cql, args), random_batch(), random_noise()
    batch[2], batch[4] = torch.zeros_like(batch[2]), torch.ones_like(batch[4])  # no TD error where Q is 0
    agent.critic = Table(BATCH + 3 * K * BATCH)
    loss, _ = cql.critic_loss(agent, batch, noise, 0.0, args)
    grad = torch.autograd.grad(loss, agent.critic.q)[0]
    torch.testing.assert_close(grad[:, :BATCH], torch.full((2, BATCH), -5 / BATCH, dtype=torch.float64))
    assert (grad[:, BATCH:] > 0).all()
    torch.testing.assert_close(grad.sum(dim=1), torch.zeros(2, dtype=torch.float64))


def test_learned_values_are_lower_bounds_that_tighten_as_w_vanishes():
    v = [underestimates(coef, all_logged=True)[0] for coef in (1.0, 0.1)]
    assert (v[0] > v[1]).all() and (v[1] > -0.02).all() and (v[0] > 0.1).all()


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
    args = small_args(cql, conservative_coef=0.0)
    losses = []
    for placeholder in (0.0, 100.0):
        torch.manual_seed(0)
        agent = cql.Agent(OBS_DIM, ACTION_DIM, args)
        next_obs[~known] = placeholder
        noise = random_noise(torch.float32, batch=len(rows))
        losses.append(cql.update(agent, rows, noise, args)["critic_loss"].item())
    assert losses[0] == losses[1] and math.isfinite(losses[0])
