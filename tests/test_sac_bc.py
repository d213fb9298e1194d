"""SAC+BC's functions against independent float64 NumPy, torch.distributions and cql.py without its term."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_combo import (
    ACTION_DIM,
    BATCH,
    OBS_DIM,
    as_rows,
    numpy_actor,
    numpy_mlp,
    numpy_q,
    random_agent,
    random_batch,
)
from torch.distributions import Normal, kl_divergence

import algos.cql as cql
import algos.sac_bc as sac_bc
from common.dataset import load_dataset


# --- Helpers, for test_onestep.py and test_osr.py too ---
def random_behaviour(dtype=torch.float64) -> sac_bc.Actor:
    torch.manual_seed(5)
    behaviour = sac_bc.Actor(OBS_DIM, ACTION_DIM, (8, 8)).to(dtype)
    with torch.no_grad():
        behaviour.net[-1].weight.mul_(5)
    return behaviour.requires_grad_(False)


def numpy_gaussian(actor, obs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    out = numpy_mlp(obs, [p.detach().numpy().T for p in actor.parameters()])
    return out[:, :ACTION_DIM], np.exp(np.clip(out[:, ACTION_DIM:], -5, 2))


def numpy_log_prob(actor, obs: np.ndarray, action: np.ndarray) -> np.ndarray:
    """The density of the normal at artanh(a), divided by tanh' = 1 - a^2."""
    mean, std = numpy_gaussian(actor, obs)
    a = np.clip(action, -0.999, 0.999)
    density = np.exp(-(((np.arctanh(a) - mean) / std) ** 2) / 2) / (std * np.sqrt(2 * np.pi)) / (1 - a**2)
    return np.log(density).sum(axis=1)


def random_args(**settings) -> sac_bc.Args:
    return sac_bc.Args(hidden_sizes=(8, 8), **settings)


def random_noise(seed: int = 2) -> dict[str, torch.Tensor]:
    next_action, action = torch.randn(
        2, BATCH, ACTION_DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return {"next_action": next_action, "action": action}


# --- The divergence ---
@pytest.mark.parametrize("one, other, expected", [
    ((0.3, 1.7), (0.3, 1.7), 0.0), ((0, 1), (0, 2), math.log(2) + 1 / 8 - 1 / 2), ((1, 1), (0, 1), 0.5),
])  # fmt: skip
def test_kl_of_known_normals(one, other, expected):
    numbers = [torch.tensor(float(x)) for x in (one[0], math.log(one[1]), other[0], math.log(other[1]))]
    assert sac_bc.gaussian_kl(*numbers).item() == pytest.approx(expected, abs=1e-6)


def test_kl_is_that_of_torch_distributions_and_never_below_zero():
    torch.manual_seed(0)
    mean, other_mean, log_std, other_log_std = torch.randn(4, 500, dtype=torch.float64)
    kl = sac_bc.gaussian_kl(mean, log_std, other_mean, other_log_std)
    expected = kl_divergence(Normal(mean, log_std.exp()), Normal(other_mean, other_log_std.exp()))
    torch.testing.assert_close(kl, expected)
    assert kl.min() >= 0


def test_kl_before_tanh_is_that_of_the_squashed_laws():
    torch.manual_seed(0)
    actor, behaviour = (sac_bc.Actor(OBS_DIM, ACTION_DIM, (8, 8)).double() for _ in range(2))
    with torch.no_grad():
        for net in (actor, behaviour):
            net.net[-1].bias.copy_(torch.tensor([0.3, -0.2, -1.0, -0.8]) * (1.3 if net is actor else 1.0))
        obs = torch.randn(1, OBS_DIM, dtype=torch.float64).expand(400_000, -1)
        action, log_prob = actor(obs, torch.randn(len(obs), ACTION_DIM, dtype=torch.float64))
        sampled = log_prob - sac_bc.action_log_prob(behaviour, obs, action)
        per_dim = sac_bc.divergence(actor, behaviour, obs[:1], action[:1], "reverse")
        kl = ACTION_DIM * per_dim
    assert kl.item() > 0.05
    assert abs(sampled.mean() - kl) < 5 * sampled.std() / len(obs) ** 0.5


def test_log_prob_is_that_of_numpy_and_of_the_actors_own_samples():
    actor, obs = random_behaviour(), random_batch()[0]
    action, log_prob = actor(obs, 0.3 * random_noise()["action"])
    inside = (action.abs() < 0.999).all(dim=1)
    assert inside.sum() > BATCH // 2
    torch.testing.assert_close(sac_bc.action_log_prob(actor, obs, action)[inside], log_prob[inside])
    expected = numpy_log_prob(actor, obs.numpy(), action.numpy())
    np.testing.assert_allclose(sac_bc.action_log_prob(actor, obs, action), expected)


def test_log_prob_is_a_density_on_the_box_and_finite_at_its_ends():
    torch.manual_seed(0)
    actor = sac_bc.Actor(OBS_DIM, 1, (8, 8)).double()
    obs = torch.randn(1, OBS_DIM, dtype=torch.float64)
    grid = torch.linspace(-0.999, 0.999, 20_001, dtype=torch.float64)[:, None]
    density = sac_bc.action_log_prob(actor, obs.expand(len(grid), -1), grid).exp()
    assert torch.trapezoid(density, grid[:, 0]).item() == pytest.approx(1, abs=0.01)
    assert sac_bc.action_log_prob(actor, obs, torch.ones(1, 1, dtype=torch.float64)).isfinite()


# --- Losses ---
@pytest.mark.parametrize("kl", ["reverse", "forward"])
@pytest.mark.parametrize("normalise", [True, False])
def test_actor_loss_is_that_of_numpy(kl, normalise):
    args = random_args(bc_coef=0.7, kl=kl, normalise_q=normalise, critic_lr=1e-12)
    agent, behaviour, batch, noise = random_agent(sac_bc, args), random_behaviour(), random_batch(), random_noise()
    with torch.no_grad():
        agent.log_alpha.fill_(-0.5)
    obs, logged = batch[0].numpy(), batch[1].numpy()
    action, log_prob = numpy_actor(agent.actor, obs, noise["action"].numpy())
    q = np.minimum(*(numpy_q(agent.critic, j, obs, action) for j in (0, 1)))
    loss = (np.exp(-0.5) * log_prob - q).mean() / (np.abs(q).mean() if normalise else 1)
    (m1, s1), (m2, s2) = numpy_gaussian(agent.actor, obs), numpy_gaussian(behaviour, obs)
    reverse = np.log(s2 / s1) + (s1**2 + (m1 - m2) ** 2) / (2 * s2**2) - 1 / 2
    term = reverse.mean() if kl == "reverse" else -numpy_log_prob(agent.actor, obs, logged).mean() / ACTION_DIM
    info = sac_bc.update(agent, behaviour, as_rows(batch), noise, args)
    assert info["kl"].item() == pytest.approx(term, rel=1e-6)
    assert info["actor_loss"].item() == pytest.approx(loss + 0.7 * term, rel=1e-6)


def test_the_size_of_q_is_a_constant_to_the_gradient():
    """With it, and without entropy, an enlarged Q pulls the policy no more and no less."""
    agent, obs = random_agent(sac_bc, random_args()), random_batch()[0]
    kl, noise, params = torch.zeros((), dtype=torch.float64), random_noise(), list(agent.actor.parameters())

    def grads(critic, normalise=True):
        nets, args = SimpleNamespace(actor=agent.actor, critic=critic), random_args(normalise_q=normalise)
        loss, _ = sac_bc.actor_loss(nets, obs, noise, torch.tensor(0.0), kl, args)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, params)])

    size = agent.critic(obs, agent.actor(obs, noise["action"])[0]).amin(dim=0).abs().mean()
    torch.testing.assert_close(grads(agent.critic), grads(lambda *x: 50 * agent.critic(*x)))
    torch.testing.assert_close(grads(agent.critic), grads(agent.critic, normalise=False) / size)


@pytest.mark.parametrize("backup_entropy", [False, True])
def test_critic_loss_is_that_of_numpy(backup_entropy):
    args = random_args(gamma=0.9, backup_entropy=backup_entropy)
    agent, batch, noise = random_agent(sac_bc, args), random_batch(), random_noise()
    with torch.no_grad():
        agent.log_alpha.fill_(-0.5)
    obs, action, reward, next_obs, terminal = (x.numpy() for x in batch)
    next_action, next_log_prob = numpy_actor(agent.actor, next_obs, noise["next_action"].numpy())
    next_q = np.minimum(*(numpy_q(agent.target_critic, j, next_obs, next_action) for j in (0, 1)))
    next_q -= np.exp(-0.5) * next_log_prob * backup_entropy
    target = np.where(terminal == 1, reward, reward + 0.9 * next_q)
    expected = sum(((numpy_q(agent.critic, j, obs, action) - target) ** 2).mean() for j in (0, 1))
    info = sac_bc.update(agent, random_behaviour(), as_rows(batch), noise, args)
    assert info["critic_loss"].item() == pytest.approx(expected, rel=1e-9)


# --- Update ---
def test_without_divergence_it_is_cql_without_its_term():
    args = random_args(bc_coef=0, normalise_q=False)
    agent, plain_args = random_agent(sac_bc, args), cql.Args(conservative_coef=0, hidden_sizes=(8, 8))
    plain = cql.Agent(OBS_DIM, ACTION_DIM, plain_args).double()
    plain.load_state_dict(agent.state_dict(), strict=False)
    behaviour = random_behaviour()
    for seed in range(3):
        rows, noise = as_rows(random_batch(seed=seed)), random_noise(seed=seed)
        sac_bc.update(agent, behaviour, rows, noise, args)
        proposals = torch.zeros(3, 1, BATCH, ACTION_DIM, dtype=torch.float64)
        cql.update(plain, rows, noise | {"proposals": proposals}, plain_args)
    for name in ("actor", "critic", "target_critic"):
        for one, other in zip(getattr(agent, name).parameters(), getattr(plain, name).parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(agent.log_alpha, plain.log_alpha)


def test_with_a_huge_forward_weight_it_is_behaviour_cloning():
    args = random_args(bc_coef=1e9, kl="forward", actor_lr=1e-3)
    agent, noise = random_agent(sac_bc, args), random_noise()
    clone = copy.deepcopy(agent.actor)
    opt = torch.optim.Adam(clone.parameters(), 1e-3)
    for seed in range(3):
        batch = random_batch(seed=seed)
        sac_bc.update(agent, None, as_rows(batch), noise, args)
        opt.zero_grad()
        mean, log_std = clone.net(batch[0]).chunk(2, dim=-1)
        x = batch[1].clamp(-0.999, 0.999).atanh()
        (-1e9 * Normal(mean, log_std.clamp(-5, 2).exp()).log_prob(x).mean()).backward()
        opt.step()
    for one, other in zip(agent.actor.parameters(), clone.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_at_the_behaviour_the_reverse_divergence_is_zero_and_elsewhere_it_pulls_back():
    agent, behaviour, (obs, action, *_) = random_agent(sac_bc, random_args()), random_behaviour(), random_batch()
    params = list(agent.actor.parameters())
    away = sac_bc.divergence(agent.actor, behaviour, obs, action, "reverse")
    agent.actor.load_state_dict(behaviour.state_dict())
    kl = sac_bc.divergence(agent.actor, behaviour, obs, action, "reverse")
    assert kl.item() == pytest.approx(0, abs=1e-12) and away > 0.1
    assert max(g.abs().max().item() for g in torch.autograd.grad(kl, params)) < 1e-12


def test_updates_leave_the_behaviour_model_as_it_is():
    args = random_args()
    agent, behaviour, noise = random_agent(sac_bc, args), random_behaviour(), random_noise()
    before = copy.deepcopy(behaviour.state_dict())
    sac_bc.update(agent, behaviour, as_rows(random_batch()), noise, args)
    assert all(torch.equal(before[key], value) for key, value in behaviour.state_dict().items())


# --- The behaviour model ---
def test_the_behaviour_model_finds_mean_and_deviation_of_the_log(tmp_path, monkeypatch):
    monkeypatch.setenv("OFFLINE_MBRL_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    obs = rng.uniform(-1, 1, (6_000, 1))
    x = 0.5 * obs + 0.3 * rng.normal(size=obs.shape)
    arrays = {"observations": obs, "actions": np.tanh(x), "rewards": obs[:, 0], "next_observations": obs}
    np.savez(tmp_path / "own.npz", **arrays, terminals=np.ones(len(obs), bool))
    args = sac_bc.Args(hidden_sizes=(32,), behaviour_updates=1_500, behaviour_lr=3e-3)
    behaviour = sac_bc.behaviour_model(load_dataset(str(tmp_path / "own.npz")), args, lambda function: function)
    grid = torch.linspace(-0.9, 0.9, 7)[:, None]
    assert not any(p.requires_grad for p in behaviour.parameters())
    mean, log_std = sac_bc.gaussian(behaviour, grid)
    torch.testing.assert_close(mean, 0.5 * grid, atol=0.06, rtol=0)
    torch.testing.assert_close(log_std.exp(), torch.full_like(grid, 0.3), atol=0.05, rtol=0)
