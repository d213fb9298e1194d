"""FQE: its loss and value by NumPy in float64, the value of policies that is known, whose actions it takes."""

import re

import numpy as np
import pytest
import torch

import algos.fqe as fqe
from algos import bc
from common import InputError
from common.dataset import load_dataset
from common.evaluation import load_policy
from common.run import read_args

SMALL = fqe.Args(hidden_sizes=(16,), gamma=0.5, tau=0.05, critic_lr=3e-3, batch_size=64)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a script; returns what it printed."""

    def call(script, *flags: str) -> str:
        argv = [f"{script.__name__.split('.')[-1]}.py", "--num-threads", "1", "--run-dir", str(tmp_path), *flags]
        monkeypatch.setattr("sys.argv", argv)
        script.main(read_args(script.Args, script.TUNED))
        return capsys.readouterr().out

    return call


def q(critic: fqe.Critic, obs: np.ndarray, action: np.ndarray) -> np.ndarray:
    """(2, batch) in float64"""
    x = np.stack([np.concatenate([obs, action], axis=1)] * 2)
    layers = [layer for layer in critic.net if hasattr(layer, "weight")]
    for i, layer in enumerate(layers):
        x = x @ layer.weight.detach().double().numpy() + layer.bias.detach().double().numpy()
        x = np.maximum(x, 0) if i < len(layers) - 1 else x
    return x[..., 0]


def test_loss_and_value_are_those_of_numpy():
    torch.manual_seed(0)
    agent, rng = fqe.Agent(3, 2, SMALL), np.random.default_rng(0)
    for param in agent.target_critic.parameters():
        param.data += 0.1 * torch.randn_like(param)
    obs, next_obs = rng.normal(size=(2, 8, 3))
    action, next_action = rng.uniform(-1, 1, (2, 8, 2))
    reward, terminal = rng.normal(size=8), np.arange(8) % 3 == 0
    y = reward + 0.5 * (1 - terminal) * q(agent.target_critic, next_obs, next_action)
    wanted = ((q(agent.critic, obs, action) - y) ** 2).mean(axis=1).sum()
    batch = [torch.tensor(x, dtype=torch.float32) for x in (obs, action, reward, next_obs, terminal, next_action)]
    loss, _ = fqe.critic_loss(agent, batch, SMALL)
    assert loss.item() == pytest.approx(wanted, rel=1e-5)
    values = q(agent.critic, obs, action).mean(axis=1)
    found = fqe.start_value(agent.critic, *batch[:2])
    assert found["value"].item() == pytest.approx(values.mean(), rel=1e-5)
    assert found["value_spread"].item() == pytest.approx(abs(values[0] - values[1]), rel=1e-4)


def log(home, name: str, episodes: int, length: int, terminal: bool) -> str:
    """Reward 1 a step; the last row of an episode is terminal, or a time limit."""
    n, last = episodes * length, np.tile(np.arange(length) == length - 1, episodes)
    obs = np.random.default_rng(0).normal(size=(n, 2)).astype(np.float32)
    obs[:, 1] = np.tile(np.linspace(0, 1, length), episodes)  # the critic has to know where in the episode it is
    next_obs = np.where(last[:, None], np.array([0, 2], np.float32), np.roll(obs, -1, axis=0))
    np.savez(
        home / name, observations=obs, next_observations=next_obs, actions=np.zeros((n, 1), np.float32),
        rewards=np.ones(n), terminals=last & terminal, timeouts=last & (not terminal),
    )  # fmt: skip
    return str(home / name)


def last_value(out: str) -> float:
    return float(re.findall(r"value +(\S+) ±", out)[-1])


@pytest.mark.parametrize("terminal, value", [(True, 1.75), (False, 2.0)])
def test_behind_a_terminal_there_is_no_value_and_behind_a_time_limit_there_is(terminal, value, run, tmp_path):
    """1 + 1/2 + 1/4, or 1 / (1 - 1/2)."""
    flags = ["--gamma", "0.5", "--tau", "0.05", "--critic-lr", "1e-2", "--hidden-sizes", "16", "--num-updates", "1500"]
    flags += ["--batch-size", "64", "--no-compile", "--eval-interval", "1500"]
    out = run(fqe, "--dataset", log(tmp_path, "a.npz", 50, 3, terminal), *flags)
    assert last_value(out) == pytest.approx(value, abs=0.08)
    assert "behaviour   value 1.8" in out  # as far as the data go


def test_the_data_s_own_policy_is_worth_what_its_episodes_brought(run):
    out = run(fqe, "--num-updates", "8000")
    behaviour = float(re.search(r"behaviour   value (\S+),", out)[1])
    # an episode is cut after 200 steps, its value is not: 0.99^200 = 13 % are behind the cut
    assert last_value(out) == pytest.approx(behaviour / (1 - 0.99**200), rel=0.05)
    assert not re.search(r"^update .* return|^score", out, re.MULTILINE)


@pytest.mark.parametrize("standardised", [False, True])
def test_it_takes_the_actions_of_the_policy_in_the_unit_box(standardised, run, tmp_path):
    data = load_dataset("pendulum/random-v0", standardise_obs=standardised)
    tiny = ("--num-updates", "20", "--eval-interval", "20", "--eval-episodes", "1", "--hidden-sizes", "16")
    run(bc, *tiny, "--run-name", "bc")
    policy, obs = load_policy(tmp_path / "bc"), data.obs[:50]
    wanted = policy(data.raw_obs(obs).numpy()) / 2  # Pendulum's box is [-2, 2]
    np.testing.assert_allclose(fqe.policy_actions(policy, data, obs).numpy(), wanted, atol=1e-6)
    rows = fqe.policy_rows(data, policy)
    np.testing.assert_allclose(rows[:, -1:], policy(data.raw_obs(data.next_obs).numpy()) / 2, atol=1e-6)
    assert "value" in run(fqe, *tiny, "--policy", str(tmp_path / "bc"))


def test_a_policy_that_there_is_not_is_one_sentence(run, tmp_path):
    with pytest.raises(InputError, match="holds no policy"):
        run(fqe, "--policy", str(tmp_path / "no"))
    tiny = ("--num-updates", "20", "--eval-interval", "20", "--hidden-sizes", "16")
    run(fqe, *tiny, "--run-name", "fqe")
    with pytest.raises(InputError, match="trained no policy: name another"):
        run(fqe, *tiny, "--policy", str(tmp_path / "fqe"))


def test_rows_of_which_none_leads_to_another_need_a_policy(run, tmp_path):
    with pytest.raises(InputError, match="give --policy"):
        run(fqe, "--dataset", log(tmp_path, "a.npz", 50, 1, False))
