"""IQL's functions against independent float64 NumPy and a plain torch learner."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_combo import ACTION_DIM, BATCH, OBS_DIM, as_rows, numpy_mlp, numpy_q, random_batch

import algos.iql as iql
from common.dataset import InputError, load_dataset


def random_args(**settings) -> iql.Args:
    return iql.Args(hidden_sizes=(8, 8), **settings)


def random_agent(args):
    """With a target critic that differs from the critic, and deviations other than 1."""
    torch.manual_seed(0)
    agent = iql.Agent(OBS_DIM, ACTION_DIM, args).double()
    with torch.no_grad():
        agent.actor.log_std.copy_(torch.tensor([-0.7, 0.3]))
        agent.critic.net[-1].weight.mul_(10)
        for p in agent.target_critic.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return agent


def numpy_net(net, obs: np.ndarray) -> np.ndarray:
    return numpy_mlp(obs, [p.detach().numpy().T for p in net.parameters()])


def numpy_value(agent, obs: np.ndarray) -> np.ndarray:
    return numpy_net(agent.value.net, obs)[:, 0]


def numpy_target_q(agent, obs: np.ndarray, action: np.ndarray) -> np.ndarray:
    return np.minimum(*(numpy_q(agent.target_critic, j, obs, action) for j in (0, 1)))


# --- Losses, each with the networks as they stand at its turn ---
@pytest.mark.parametrize("expectile", [0.5, 0.7, 0.95])
def test_value_loss_is_that_of_numpy(expectile):
    args = random_args(expectile=expectile)
    agent, batch = random_agent(args), random_batch()
    obs, action = batch[0].numpy(), batch[1].numpy()
    u = numpy_target_q(agent, obs, action) - numpy_value(agent, obs)
    assert (u < 0).any() and (u > 0).any()
    expected = np.mean([(expectile if x > 0 else 1 - expectile) * x * x for x in u])
    info = iql.update(agent, as_rows(batch), args)
    assert info["value_loss"].item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("max_weight", [100.0, 0.9])
def test_actor_loss_is_that_of_numpy_with_the_new_value(max_weight):
    args = random_args(value_lr=0.05, max_weight=max_weight)
    agent, batch = random_agent(args), random_batch()
    before = copy.deepcopy(agent)
    info = iql.update(agent, as_rows(batch), args)
    obs, action = batch[0].numpy(), batch[1].numpy()
    advantage = numpy_target_q(before, obs, action) - numpy_value(agent, obs)  # V after its step, Q' before its own
    weight = np.minimum(np.exp(3 * advantage), max_weight)
    assert max_weight == 100 or 0 < (weight == max_weight).sum() < BATCH
    mean, std = np.tanh(numpy_net(before.actor.net, obs)), np.exp([-0.7, 0.3])
    density = np.exp(-(((action - mean) / std) ** 2) / 2) / (std * np.sqrt(2 * np.pi))
    expected = -(weight * np.log(density).sum(axis=1)).mean()
    assert info["actor_loss"].item() == pytest.approx(expected, rel=1e-6)


def test_critic_loss_is_that_of_numpy_with_the_new_value():
    args = random_args(value_lr=0.05, gamma=0.9)
    agent, batch = random_agent(args), random_batch()
    before = copy.deepcopy(agent)
    info = iql.update(agent, as_rows(batch), args)
    obs, action, reward, next_obs, terminal = (x.numpy() for x in batch)
    target = np.where(terminal == 1, reward, reward + 0.9 * numpy_value(agent, next_obs))
    expected = sum(((numpy_q(before.critic, j, obs, action) - target) ** 2).mean() for j in (0, 1))
    assert info["critic_loss"].item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("expectile, expected", [(0.5, 2.0), (0.999, 5.0), (0.001, 0.0)])
def test_an_expectile_is_the_mean_in_the_middle_and_tends_to_the_extremes(expectile, expected):
    q, v = torch.tensor([0.0, 1.0, 2.0, 2.0, 5.0], dtype=torch.float64), torch.zeros((), requires_grad=True)
    optimizer = torch.optim.LBFGS([v], max_iter=200, line_search_fn="strong_wolfe")
    agent, args = SimpleNamespace(value=lambda obs: v.double().expand(5)), iql.Args(expectile=expectile)

    def closure():
        optimizer.zero_grad()
        loss, _ = iql.value_loss(agent, torch.zeros(5, OBS_DIM), q, args)
        loss.backward()
        return loss

    for _ in range(20):
        optimizer.step(closure)
    assert v.item() == pytest.approx(expected, abs=0.02)


def test_without_advantages_the_policy_is_the_maximum_likelihood_of_the_log():
    torch.manual_seed(0)
    args = random_args(inverse_temperature=0.0)
    agent = iql.Agent(OBS_DIM, ACTION_DIM, args).double()
    actor = agent.actor
    optimizer = torch.optim.Adam(actor.parameters(), 3e-3)
    obs, q = torch.ones(64, OBS_DIM, dtype=torch.float64), 100 * torch.randn(64, dtype=torch.float64)
    action = 0.3 + 0.2 * torch.randn(64, ACTION_DIM, dtype=torch.float64)
    for _ in range(1500):  # one state: the optimum is the mean and the deviation of the actions
        loss, _ = iql.actor_loss(agent, obs, action, q, args)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(actor.act(obs[:1])[0], action.mean(0), atol=5e-3, rtol=0)
    torch.testing.assert_close(actor.log_std.exp(), action.std(0, correction=0), atol=5e-3, rtol=0)


# --- Update ---
def test_no_action_but_a_logged_one_is_ever_valued(monkeypatch):
    args = random_args()
    agent, batch, seen = random_agent(args), random_batch(), []
    forward = iql.Critic.forward
    monkeypatch.setattr(
        iql.Critic, "forward", lambda self, obs, action: seen.append((obs, action)) or forward(self, obs, action)
    )
    iql.update(agent, as_rows(batch), args)
    assert len(seen) == 2 and all(torch.equal(obs, batch[0]) and torch.equal(action, batch[1]) for obs, action in seen)


def test_updates_equal_those_of_a_plain_learner():
    args = random_args(actor_lr=2e-3, critic_lr=1e-3, value_lr=4e-3, gamma=0.95, tau=0.1, expectile=0.8)
    agent = random_agent(args)
    plain = copy.deepcopy(agent)
    lrs = {"value": 4e-3, "actor": 2e-3, "critic": 1e-3}
    opts = {name: torch.optim.Adam(getattr(plain, name).parameters(), lr) for name, lr in lrs.items()}

    def minimize(name, loss):
        opts[name].zero_grad()
        loss.backward()
        opts[name].step()

    for i in range(4):
        batch = random_batch(seed=i)
        obs, action, reward, next_obs, terminal = batch
        iql.update(agent, as_rows(batch), args)
        q = torch.minimum(*plain.target_critic(obs, action)).detach()
        u = q - plain.value(obs)
        minimize("value", ((0.8 - (u < 0).double()).abs() * u**2).mean())
        weight = torch.clip(torch.exp(3 * (q - plain.value(obs))), max=100).detach()
        normal = torch.distributions.Normal(plain.actor.net(obs), plain.actor.log_std.exp())
        minimize("actor", -(weight * normal.log_prob(action).sum(1)).mean())
        target = (reward + 0.95 * (1 - terminal) * plain.value(next_obs)).detach()
        minimize("critic", sum(((q - target) ** 2).mean() for q in plain.critic(obs, action)))
        for p, t in zip(plain.critic.parameters(), plain.target_critic.parameters()):
            t.data = 0.9 * t.data + 0.1 * p.data
        for name in ("value", "actor", "critic", "target_critic"):
            for one, other in zip(getattr(agent, name).parameters(), getattr(plain, name).parameters(), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)  # Adam enlarges rounding errors


# --- Rewards ---
def save(path, rewards) -> str:
    arrays = {"observations": np.zeros((BATCH, OBS_DIM)), "actions": np.zeros((BATCH, ACTION_DIM)), "rewards": rewards}
    np.savez(path, **arrays, terminals=np.arange(BATCH) % 4 == 3)
    return str(path)


def test_scaled_rewards_put_a_thousand_between_the_best_and_the_worst_episode(tmp_path):
    rewards = np.random.default_rng(0).normal(size=BATCH)
    data = load_dataset(save(tmp_path / "own.npz", rewards))
    scaled = iql.scale_rewards(data).reward.numpy()
    returns = scaled.reshape(-1, 4).sum(1)
    assert returns.max() - returns.min() == pytest.approx(1000, rel=1e-4)
    np.testing.assert_allclose(scaled / scaled[0], rewards / rewards[0], rtol=1e-4)  # scaled, not shifted
    np.testing.assert_allclose(data.reward, rewards, rtol=1e-6)


def test_equal_returns_cannot_scale_rewards(tmp_path):
    data = load_dataset(save(tmp_path / "own.npz", np.ones(BATCH)))
    with pytest.raises(InputError, match="--reward-scale none"):
        iql.scale_rewards(data)
