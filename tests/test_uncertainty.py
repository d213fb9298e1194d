"""benchmarks/uncertainty.py: the simulator in simulated states, true errors, and a run from its folder to the table."""

import signal
import sys
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch

import algos.mopo as mopo
import benchmarks.uncertainty as uncertainty
from common.dataset import InputError
from common.dynamics import Dynamics


@pytest.mark.parametrize("env_id", ["Hopper-v5", "HalfCheetah-v5", "Walker2d-v5", "Pendulum-v1"])
def test_a_step_from_an_observation_is_the_step_that_the_environment_made(env_id):
    env = gym.make(env_id)
    env.action_space.seed(0)
    obs, steps = env.reset(seed=0)[0], []
    while not steps or not (steps[-1][4] or len(steps) == 60):
        action = env.action_space.sample()
        next_obs, reward, terminated, _, _ = env.step(action)
        steps.append((obs, action, next_obs, reward, terminated))
        obs = next_obs
    obs, action, next_obs, reward, terminal = (np.array(column) for column in zip(*steps))
    assert terminal[-1] == (env_id in ("Hopper-v5", "Walker2d-v5"))  # falls are among them
    simulator = uncertainty.make_simulator(SimpleNamespace(env_spec=gym.spec(env_id)))
    shuffled = np.random.default_rng(0).permutation(np.flatnonzero(uncertainty.is_state(simulator, obs)))
    assert (len(shuffled) < len(obs)) == (env_id == "Walker2d-v5")  # which throws its feet about
    found = uncertainty.true_steps(simulator, obs[shuffled], action[shuffled])
    np.testing.assert_allclose(found[0], next_obs[shuffled], atol=1e-4)
    np.testing.assert_allclose(found[1], reward[shuffled], atol=1e-4)
    assert (found[2] == terminal[shuffled]).all()


@pytest.mark.parametrize("env_id", ["MountainCarContinuous-v0", "InvertedDoublePendulum-v5"])
def test_an_environment_whose_observation_is_not_its_state_is_refused(env_id):
    with pytest.raises(InputError, match="cannot be put into a state"):
        uncertainty.make_simulator(SimpleNamespace(env_spec=gym.spec(env_id)))


def test_spearman_is_that_of_its_textbook_formula_and_blind_to_scale():
    x, y = np.random.default_rng(0).normal(size=(2, 50))
    y += x
    ranks = [sorted(column).index(v) for column in (x, y) for v in column]
    d = np.array(ranks[:50]) - np.array(ranks[50:])
    assert uncertainty.spearman(x, y) == pytest.approx(1 - 6 * (d**2).sum() / (50 * (50**2 - 1)))
    assert uncertainty.spearman(x, np.exp(3 * y)) == uncertainty.spearman(x, y)
    assert uncertainty.spearman(x, -np.exp(x)) == pytest.approx(-1)


def test_errors_are_distances_of_successors_and_of_their_backups():
    torch.manual_seed(0)
    actor = mopo.Actor(3, 2)
    critic = lambda obs, action: torch.stack([obs.sum(dim=1), obs.sum(dim=1) + 5])  # noqa: E731, V = sum of s
    agent = SimpleNamespace(actor=actor, target_critic=critic)
    obs, reward = torch.randn(4, 3), torch.randn(4)
    true = [obs, reward, torch.tensor([0.0, 0.0, 0.0, 1.0])]
    moved = obs + torch.tensor([[0.0, 0.0, 0.0], [3.0, 4.0, 0.0], [1.0, -1.0, 0.0], [0.0, 0.0, 0.0]])
    simulated = [moved, reward + torch.tensor([2.0, 0.0, 0.0, 0.0]), torch.zeros(4)]
    state, value = uncertainty.errors(agent, simulated, true, 0.5)
    torch.testing.assert_close(state, torch.tensor([0.0, 5.0, 2.0**0.5, 0.0]))
    torch.testing.assert_close(value, torch.tensor([2.0, 3.5, 0.0, 0.5 * obs[3].sum().abs().item()]))


def test_distance_is_to_the_nearest_logged_pair_in_standard_deviations():
    torch.manual_seed(0)
    logged = torch.randn(500, 5) * torch.tensor([1.0, 10.0, 0.1, 1.0, 1.0])
    data = SimpleNamespace(obs=logged[:, :3], action=logged[:, 3:])
    agent, dynamics = mopo.Agent(3, 2, mopo.Args()), Dynamics(3, 2, hidden=8)
    here = logged[:7].clone()
    here[:, 1] += 0.01 * logged[:, 1].std()
    found = uncertainty.measures(dynamics, agent, data, here[:, :3], here[:, 3:], 2)
    assert tuple(found) == uncertainty.MEASURES and all(measure.shape == (7,) for measure in found.values())
    torch.testing.assert_close(found["distance"], torch.full((7,), 0.01), rtol=1e-2, atol=0)


def test_a_finished_run_becomes_two_tables_and_an_unfinished_one_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OFFLINE_MBRL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    (tmp_path / "minari").mkdir()
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    name = "pendulum-random-v0__mopo__penalty-coef=0__0"
    flags = "--no-compile --num-updates 20 --eval-interval 20 --eval-episodes 1 --rollout-batch-size 100"
    flags += f" --rollout-length 2 --dynamics-max-epochs 1 --num-threads 1 --penalty-coef 0 --run-name {name}"
    monkeypatch.setattr(sys, "argv", ["mopo.py", *flags.split(), "--run-dir", str(tmp_path / "runs")])
    mopo.main(*mopo.read_args())
    capsys.readouterr()
    out = tmp_path / "table.md"
    uncertainty.main(uncertainty.Args(runs=(tmp_path / "runs",), num_starts=50, num_samples=2, out=out))
    tables = out.read_text()
    assert tables.count("| pendulum/random-v0 | mopo penalty-coef=0 | 0 | 100 |") == 2
    assert tables.split("\n\n", 2)[2].strip() in capsys.readouterr().out
    (tmp_path / "runs" / name / "checkpoint.pt").unlink()
    with pytest.raises(InputError, match="no run of mopo, mobile, combo with a checkpoint"):
        uncertainty.main(uncertainty.Args(runs=(tmp_path / "runs",)))
    with pytest.raises(InputError, match="no run in"):
        uncertainty.main(uncertainty.Args(runs=(tmp_path / "minari",)))
