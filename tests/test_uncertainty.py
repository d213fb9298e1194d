"""The study of uncertainty: the simulator in simulated states, true errors, and a run from its folder to the table."""

import shutil
import sys
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch

from algos import mopo
from benchmarks.studies import uncertainty
from common import InputError
from common.run import read_args


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
    assert len(shuffled) > 10
    found = uncertainty.true_steps(simulator, obs[shuffled].astype(np.float32), action[shuffled])
    np.testing.assert_allclose(found[0], next_obs[shuffled], atol=1e-4)
    np.testing.assert_allclose(found[1], reward[shuffled], atol=1e-4)
    assert (found[2] == terminal[shuffled]).all()


def test_velocities_at_their_bound_tell_no_state_where_they_are_cut_off():
    walker, cheetah = gym.make("Walker2d-v5"), gym.make("HalfCheetah-v5")
    obs = np.zeros((5, 17))
    obs[1:, 8] = 9.9, 10, -10, -9.9  # the first velocity
    obs[0, 7] = 10  # a position
    assert uncertainty.is_state(walker, obs).tolist() == [True, True, False, False, True]
    assert uncertainty.is_state(cheetah, obs).all()


@pytest.mark.parametrize("env_id", ["MountainCarContinuous-v0", "InvertedDoublePendulum-v5"])
def test_an_environment_whose_observation_is_not_its_state_is_refused(env_id):
    with pytest.raises(InputError, match="cannot be put into a state"):
        uncertainty.make_simulator(SimpleNamespace(env_spec=gym.spec(env_id)))


def test_data_of_no_environment_or_of_another_version_are_refused():
    with pytest.raises(InputError, match="name no environment"):
        uncertainty.make_simulator(SimpleNamespace(env_spec=None))
    torch.manual_seed(0)
    data = SimpleNamespace(env_spec=gym.spec("Hopper-v5"), name="mine", to_env_action=lambda a: a)
    data.obs, data.action, data.successor_known = (
        torch.rand(50, 11),
        torch.rand(50, 3),
        torch.ones(50, dtype=torch.bool),
    )
    env = uncertainty.make_simulator(data)
    data.next_obs = torch.as_tensor(uncertainty.true_steps(env, data.obs.numpy(), data.action.numpy())[0])
    uncertainty.check_simulator(env, data)
    data.next_obs = data.next_obs + 0.1
    with pytest.raises(InputError, match="its steps come out 0.1 off"):
        uncertainty.check_simulator(env, data)


class Members:
    """Three members, the first and the last of them elites, that move states by their own amount, without noise."""

    elites, moves, deviations = torch.tensor([0, 2]), torch.tensor([0.0, 5.0, 2.0]), torch.tensor([1.0, 3.0, 2.0])

    def predict(self, obs, action):
        next_obs = obs.expand(3, -1, -1) + self.moves[:, None, None] * torch.tensor([1.0, 0.0, 0.0])
        std = self.deviations[:, None, None].expand(3, len(obs), 4) * torch.tensor([0.0, 0.0, 3.0, 4.0])
        return next_obs, torch.ones(3, len(obs)), std

    def __call__(self, x, members):
        next_obs, reward, _ = self.predict(x[0, :, :3], x[0, :, 3:])
        mean = torch.cat([next_obs - x[0, :, :3], reward[..., None]], dim=-1)[members]
        return mean, torch.zeros_like(mean)


class Agent:
    """V is 10 times the first coordinate, whatever the action."""

    actor = mopo.Actor(3, 2, (8,))

    def target_critic(self, obs, action):
        return torch.stack([10 * obs[:, 0], 10 * obs[:, 0] + 5])


@torch.no_grad()
def test_every_measure_is_that_of_its_name():
    torch.manual_seed(0)
    logged = torch.randn(500, 5) * torch.tensor([1.0, 10.0, 0.1, 1.0, 1.0])
    data = SimpleNamespace(obs=logged[:, :3], action=logged[:, 3:])
    here = logged[:7].clone()
    here[:, 1] += 0.01 * logged[:, 1].std()
    found = uncertainty.measures(Members(), Agent(), data, here[:, :3], here[:, 3:], 2)
    expected = {
        "MOPO deviation": 15.0,  # of all members
        "MOPO disagreement": 5.0 - 7 / 3,
        "MOReL": 2.0,  # of the elites
        "MOBILE": 10 * 2.0 / 2**0.5,
        "distance": 0.01,
    }
    assert list(found) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], torch.full((7,), value), rtol=1e-3, atol=0, msg=name)


@torch.no_grad()
def test_errors_are_those_of_the_elites_mean_successor_and_backup():
    obs, action = torch.zeros(3, 3), torch.zeros(3, 2)
    true = [
        torch.tensor([[0.0, 0.0, 0.0], [0.0, 3.0, 4.0], [1.0, 0.0, 0.0]]),
        torch.ones(3),
        torch.tensor([0.0, 0.0, 1.0]),
    ]
    inputs = (obs, action, true, 0.5, 2)
    never = lambda obs, action, next_obs: torch.zeros(len(obs), dtype=torch.bool)  # noqa: E731
    found = uncertainty.errors(Members(), Agent(), never, *inputs)
    # elites lead to (0, 0, 0) and (2, 0, 0), of values 0 and 20; the true values are 0, 0 and, at the end, nothing
    torch.testing.assert_close(found["state"], torch.tensor([1.0, 26**0.5, 0.0]))
    torch.testing.assert_close(found["value"], torch.tensor([5.0, 5.0, 5.0]))
    true[1] = torch.tensor([1.0, 2.0, 1.0])
    found = uncertainty.errors(Members(), Agent(), lambda *x: ~never(*x), *inputs)  # the model foresees ends everywhere
    torch.testing.assert_close(found["value"], torch.tensor([0.0, 1.0, 0.0]))


def test_a_finished_run_becomes_two_tables_and_an_unfinished_one_is_refused(tmp_path, monkeypatch, capsys):
    name = "pendulum-random-v0__mopo__penalty-coef=0__0"
    flags = "--no-compile --num-updates 20 --eval-interval 20 --eval-episodes 1 --rollout-batch-size 100"
    flags += f" --rollout-length 2 --dynamics-max-epochs 1 --num-threads 1 --penalty-coef 0 --run-name {name}"
    monkeypatch.setattr(sys, "argv", ["mopo.py", *flags.split(), "--run-dir", str(tmp_path / "runs")])
    mopo.main(read_args(mopo.Args, mopo.TUNED))
    capsys.readouterr()
    out = tmp_path / "table.md"
    uncertainty.main(uncertainty.Args(runs=(tmp_path / "runs",), num_starts=50, num_samples=2, out=out))
    tables = out.read_text()
    assert tables.count("| pendulum/random-v0 | mopo penalty-coef=0 | 0 | 100 | 100% |") == 2
    assert tables.split("\n\n", 2)[2].strip() in capsys.readouterr().out
    (tmp_path / "runs" / "a").mkdir()
    (tmp_path / "runs" / "a" / "config.json").write_text('{"algo": "bc", "args": {}}')
    assert uncertainty.main(uncertainty.Args(runs=(tmp_path / "runs",), num_starts=50, num_samples=2)) == 1
    out, err = capsys.readouterr()
    assert "| mopo penalty-coef=0 | 0 | 100 | 100% |" in out and "left out: " in err
    shutil.rmtree(tmp_path / "runs" / "a")
    config = tmp_path / "runs" / name / "config.json"
    config.write_text(config.read_text().replace('"gamma"', '"discount"'))
    with pytest.raises(InputError, match="of another version of mopo.py .*discount.*: run it again"):
        uncertainty.main(uncertainty.Args(runs=(tmp_path / "runs",)))
    (tmp_path / "runs" / name / "policy.pt").unlink()
    with pytest.raises(InputError, match="no finished run of mopo, mobile, combo"):
        uncertainty.main(uncertainty.Args(runs=(tmp_path / "runs",)))
    with pytest.raises(InputError, match="no run in"):
        uncertainty.main(uncertainty.Args(runs=(tmp_path / "nothing",)))
