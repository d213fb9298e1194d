"""TD3+BC's functions against independent float64 NumPy and a plain torch learner."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_combo import ACTION_DIM, BATCH, OBS_DIM, as_rows, numpy_mlp, numpy_q, random_batch

import algos.bc as bc
import algos.td3_bc as td3_bc
from common.dataset import load_dataset


def random_args(**settings) -> td3_bc.Args:
    return td3_bc.Args(hidden_sizes=(8, 8), **settings)


def random_agent(args, dtype=torch.float64):
    """With targets that differ from the networks, and Q values of different sizes."""
    torch.manual_seed(0)
    agent = td3_bc.Agent(OBS_DIM, ACTION_DIM, args).to(dtype)
    with torch.no_grad():
        agent.critic.net[-1].weight.mul_(10)
        for target in (agent.target_actor, agent.target_critic):
            for p in target.parameters():
                p.add_(0.05 * torch.randn_like(p))
    return agent


def random_noise(seed: int = 2, size: float = 1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"next_action": size * torch.randn(BATCH, ACTION_DIM, generator=generator, dtype=torch.float64)}


def numpy_policy(actor, obs: np.ndarray) -> np.ndarray:
    return np.tanh(numpy_mlp(obs, [p.detach().numpy().T for p in actor.parameters()]))


# --- Losses ---
@pytest.mark.parametrize("size", [0.5, 5.0])  # the second reaches both bounds, of the noise and of the box
def test_critic_loss_is_that_of_numpy(size):
    args = random_args(gamma=0.9)
    agent, batch, noise = random_agent(args), random_batch(), random_noise(size=size)
    obs, action, reward, next_obs, terminal = (x.numpy() for x in batch)
    with torch.no_grad():
        agent.target_actor.net[-2].weight.mul_(20)
    smoothing = np.minimum(np.maximum(0.2 * noise["next_action"].numpy(), -0.5), 0.5)
    next_action = np.minimum(np.maximum(numpy_policy(agent.target_actor, next_obs) + smoothing, -1), 1)
    next_value = np.minimum(*(numpy_q(agent.target_critic, j, next_obs, next_action) for j in (0, 1)))
    target = np.where(terminal == 1, reward, reward + 0.9 * next_value)
    expected = sum(((numpy_q(agent.critic, j, obs, action) - target) ** 2).mean() for j in (0, 1))
    info = td3_bc.update(agent, as_rows(batch), noise, False, args)
    assert info["critic_loss"].item() == pytest.approx(expected, rel=1e-9)


def test_actor_loss_and_its_gradient_are_those_of_numpy_with_a_constant_lambda():
    args = random_args(q_coef=2.5)
    agent, (obs, action, *_) = random_agent(args), random_batch()
    loss, info = td3_bc.actor_loss(agent, obs, action, args)
    grads = torch.autograd.grad(loss, list(agent.actor.parameters()))
    first = numpy_q(agent.critic, 0, obs.numpy(), numpy_policy(agent.actor, obs.numpy()))
    coef = 2.5 / np.abs(first).mean()

    def numpy_loss() -> float:
        policy_action = numpy_policy(agent.actor, obs.numpy())
        q = numpy_q(agent.critic, 0, obs.numpy(), policy_action)
        return ((policy_action - action.numpy()) ** 2).mean() - coef * q.mean()

    assert loss.item() == pytest.approx(numpy_loss(), rel=1e-9)
    policy_action = numpy_policy(agent.actor, obs.numpy())
    assert info["bc_loss"].item() == pytest.approx(((policy_action - action.numpy()) ** 2).mean(), rel=1e-9)
    for p, grad in zip(agent.actor.parameters(), grads, strict=True):
        flat, index = p.data.view(-1), int(grad.abs().argmax())
        values = []
        for step in (1e-6, -1e-6):
            flat[index] += step
            values.append(numpy_loss())
            flat[index] -= step
        assert grad.view(-1)[index].item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5)


def test_the_scale_of_rewards_does_not_change_the_policys_gradient():
    args = random_args()
    agent, (obs, action, *_) = random_agent(args), random_batch()
    grads = []
    for scale in (1.0, 1000.0):
        critic = lambda obs, action: scale * agent.critic(obs, action)  # noqa: E731, B023
        loss, _ = td3_bc.actor_loss(SimpleNamespace(actor=agent.actor, critic=critic), obs, action, args)
        grads.append(torch.autograd.grad(loss, list(agent.actor.parameters())))
    for one, other in zip(*grads):
        torch.testing.assert_close(one, other)


def test_without_q_the_policy_is_behaviour_clonings():
    args, bc_args = random_args(q_coef=0.0), bc.Args(hidden_sizes=(8, 8))
    agent, clone = random_agent(args), bc.Agent(OBS_DIM, ACTION_DIM, bc_args).double()
    clone.actor.load_state_dict(agent.actor.state_dict())
    for step in range(3):
        rows = as_rows(random_batch(seed=step))
        td3_bc.update(agent, rows, random_noise(step), True, args)
        bc.update(clone, rows, bc_args)
    for one, other in zip(agent.actor.parameters(), clone.actor.parameters(), strict=True):
        torch.testing.assert_close(one, other)


# --- Update ---
def test_updates_equal_those_of_a_plain_learner():
    args = random_args(actor_lr=2e-3, critic_lr=1e-3, gamma=0.95, tau=0.1)
    agent = random_agent(args)
    plain = copy.deepcopy(agent)
    opts = [torch.optim.Adam(plain.actor.parameters(), 2e-3), torch.optim.Adam(plain.critic.parameters(), 1e-3)]
    for i in range(1, 5):
        batch, noise, improve = random_batch(seed=i), random_noise(i), i % 2 == 0
        info = td3_bc.update(agent, as_rows(batch), noise, improve, args)
        obs, action, reward, next_obs, terminal = batch
        with torch.no_grad():
            next_action = plain.target_actor(next_obs) + torch.clip(noise["next_action"] * 0.2, -0.5, 0.5)
            q1, q2 = plain.target_critic(next_obs, torch.clip(next_action, -1, 1))
            target = torch.where(terminal == 1, reward, reward + 0.95 * torch.minimum(q1, q2))
        q1, q2 = plain.critic(obs, action)
        opts[1].zero_grad()
        (((q1 - target) ** 2).mean() + ((q2 - target) ** 2).mean()).backward()
        opts[1].step()
        assert math.isnan(info["actor_loss"]) != improve and math.isnan(info["bc_loss"]) != improve
        if improve:
            policy_action = plain.actor(obs)
            q = plain.critic(obs, policy_action)[0]
            opts[0].zero_grad()
            (-2.5 / q.abs().mean().item() * q.mean() + ((policy_action - action) ** 2).mean()).backward()
            opts[0].step()
            for net, target_net in ((plain.actor, plain.target_actor), (plain.critic, plain.target_critic)):
                for p, t in zip(net.parameters(), target_net.parameters()):
                    t.data = 0.9 * t.data + 0.1 * p.data
        for name in ("actor", "critic", "target_actor", "target_critic"):
            for one, other in zip(getattr(agent, name).parameters(), getattr(plain, name).parameters(), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)  # Adam enlarges rounding errors


@pytest.mark.parametrize("interval, expected", [(2, [False, True] * 3), (3, [False, False, True] * 2)])
def test_policy_and_targets_move_in_one_of_policy_interval_updates(tmp_path, monkeypatch, interval, expected):
    seen, update = [], td3_bc.update
    monkeypatch.setattr(td3_bc, "update", lambda *inputs: seen.append(inputs[3]) or update(*inputs))
    run = {"num_updates": 6, "eval_episodes": 1, "compile": False, "run_dir": str(tmp_path)}
    td3_bc.main(random_args(policy_interval=interval, **run))
    assert seen == expected


# --- Observations ---
def test_the_policy_acts_on_raw_observations_as_it_learned_on_standardised_ones(tmp_path):
    rng = np.random.default_rng(0)
    obs = rng.normal(size=(40, OBS_DIM)) * [0.1, 50, 0] + [3, -200, 7]  # the last one is a constant
    arrays = {"observations": obs, "actions": rng.uniform(-1, 1, (40, ACTION_DIM)), "rewards": np.zeros(40)}
    np.savez(tmp_path / "own.npz", **arrays, terminals=np.zeros(40, bool), timeouts=np.arange(40) % 20 == 19)
    data = load_dataset(str(tmp_path / "own.npz"))
    actor = td3_bc.Actor(OBS_DIM, ACTION_DIM, (8, 8))
    scaled = td3_bc.standardise(data, actor)
    raw = data.obs.numpy().astype(float)
    np.testing.assert_allclose(
        scaled.obs[:, :2], (raw[:, :2] - raw[:, :2].mean(0)) / raw[:, :2].std(0, ddof=1), rtol=1e-3
    )
    assert (scaled.obs[:, 2] == 0).all()
    torch.testing.assert_close(scaled.next_obs[:18], scaled.obs[1:19])  # the same numbers for successors
    torch.testing.assert_close(actor.act(data.obs), actor(scaled.obs))
    assert torch.equal(data.obs, torch.tensor(raw, dtype=torch.float32))
    fresh = td3_bc.Actor(OBS_DIM, ACTION_DIM, (8, 8))
    fresh.load_state_dict(actor.state_dict())  # as whoever loads policy.pt does
    torch.testing.assert_close(fresh.act(data.obs), actor(scaled.obs))


def test_a_state_dict_restores_everything():
    args = random_args()
    agent, other = random_agent(args), td3_bc.Agent(OBS_DIM, ACTION_DIM, args).double()
    td3_bc.update(agent, as_rows(random_batch()), random_noise(), True, args)
    other.load_state_dict(agent.state_dict())
    for nets in (agent, other):
        td3_bc.update(nets, as_rows(random_batch(seed=5)), random_noise(6), True, args)
    assert all(torch.equal(a, b) for a, b in zip(agent.state_dict().values(), other.state_dict().values()))
