"""OSR-v's functions against independent float64 NumPy, cql.py, sac_bc.py and osr.py."""

import copy

import numpy as np
import pytest
import torch
from test_combo import (
    ACTION_DIM,
    BATCH,
    OBS_DIM,
    K,
    as_rows,
    needs_compiler,
    numpy_actor,
    numpy_gap,
    numpy_q,
    random_batch,
    random_noise,
    snapshot,
)
from test_osr import LATENT, extra_noise, numpy_inverse, osr_agent, random_inverse
from test_sac_bc import random_behaviour

import algos.cql as cql
import algos.osr_v as osr_v
import algos.sac_bc as sac_bc


def random_agent(args, dtype=torch.float64):
    return osr_agent(args, dtype, osr_v)


def inverse_noise(seed: int = 5, dtype=torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, LATENT + ACTION_DIM, generator=generator, dtype=dtype)


def inputs(seed: int = 2, dtype=torch.float64) -> tuple[torch.Tensor, ...]:
    """What `update` takes after the inverse model: rows and the four kinds of noise."""
    obs_noise = extra_noise(seed, dtype)[0]
    return as_rows(random_batch(dtype, seed)), *random_noise(dtype, seed), obs_noise, inverse_noise(seed, dtype)


# --- Actions of I ---
def test_actions_of_the_inverse_model_are_squashed_samples_of_its_law():
    inverse, (obs, _, _, next_obs, _), noise = random_inverse(), random_batch(), inverse_noise()
    mean, std, *_ = numpy_inverse(inverse, obs.numpy(), next_obs.numpy(), noise.numpy()[:, :LATENT])
    expected = np.tanh(mean + std * noise.numpy()[:, LATENT:])
    np.testing.assert_allclose(osr_v.recovering(inverse, obs, next_obs, noise), expected)


# --- The critic's loss ---
@pytest.mark.parametrize("lowered", ["soft-max", "policy-mean"])
def test_critic_loss_is_that_of_numpy(lowered):
    args = osr_v.Args(noise_scale=0.2, conservative_coef=0.7, lowered=lowered, gamma=0.9, critic_lr=1e-12)
    agent, inverse = random_agent(args), random_inverse()
    batch, (noise, proposal_noise), obs_noise, i_noise = (
        random_batch(),
        random_noise(),
        extra_noise()[0],
        inverse_noise(),
    )
    obs, action, reward, next_obs, terminal = (x.numpy() for x in batch)
    next_action, _ = numpy_actor(agent.actor, next_obs, noise[0].numpy())
    next_q = np.minimum(*(numpy_q(agent.target_critic, j, next_obs, next_action) for j in (0, 1)))
    target = reward + 0.9 * (1 - terminal) * next_q
    perturbed = obs + 0.2 * np.array([0.5, 2.0, 3.0]) * obs_noise.numpy()
    mean, std, *_ = numpy_inverse(inverse, perturbed, next_obs, i_noise.numpy()[:, :LATENT])
    a_i = np.tanh(mean + std * i_noise.numpy()[:, LATENT:])
    loss = gaps = 0.0
    for j in (0, 1):
        q, log_density = np.empty((3, K, BATCH)), np.full((3, K, BATCH), np.log(0.5**ACTION_DIM))
        for k in range(K):
            uniform, normal, next_normal = proposal_noise[:, k].numpy()
            sampled, log_density[1, k] = numpy_actor(agent.actor, perturbed, normal)
            next_sampled, log_density[2, k] = numpy_actor(agent.actor, next_obs, next_normal)
            for i, a in enumerate((uniform, sampled, next_sampled)):
                q[i, k] = numpy_q(agent.critic, j, perturbed, a)
        q_recovering = numpy_q(agent.critic, j, perturbed, a_i)
        if lowered == "soft-max":
            gap = numpy_gap(q, log_density, q_recovering, "all")
        else:
            gap = q[1].mean() - q_recovering.mean()
        loss += ((numpy_q(agent.critic, j, obs, action) - target) ** 2).mean() + 0.7 * gap
        gaps += gap
    rows, before = as_rows(batch), copy.deepcopy(inverse.state_dict())
    info = osr_v.update(agent, inverse, rows, noise, proposal_noise, obs_noise, i_noise, args)
    assert info["conservative_gap"].item() == pytest.approx(gaps, rel=1e-6)
    assert info["critic_loss"].item() == pytest.approx(loss, rel=1e-6)
    assert all(torch.equal(before[key], value) for key, value in inverse.state_dict().items())


@pytest.mark.parametrize("lowered", ["soft-max", "policy-mean"])
def test_q_falls_at_actions_of_the_policy_and_rises_at_those_of_the_inverse_model(lowered):
    """The gradient with respect to Q itself: a critic that looks values up."""
    size = BATCH + BATCH + 3 * K * BATCH  # logged rows, actions of I, sampled actions
    values = torch.zeros(2, size, dtype=torch.float64, requires_grad=True)

    def critic(obs, action):
        return values

    def nothing(obs, action):
        return torch.zeros(2, len(obs), dtype=torch.float64)

    agent, batch, (noise, proposal_noise) = random_agent(osr_v.Args()), random_batch(), random_noise()
    batch[2] = torch.zeros_like(batch[2])  # a Bellman error of 0, so that the gap alone is left
    proposed = osr_v.proposals(agent.actor, batch[0], batch[3], proposal_noise)
    method = batch[0], batch[1], *proposed, 1.0, lowered
    loss, _ = osr_v.critic_loss(critic, nothing, agent.actor, batch, noise[0], 0.9, *method)
    logged, recovering, sampled = torch.autograd.grad(loss, values)[0].split([BATCH, BATCH, 3 * K * BATCH], dim=1)
    assert (logged == 0).all()
    torch.testing.assert_close(recovering, torch.full_like(recovering, -1 / BATCH))
    sampled = sampled.unflatten(1, (3, K, BATCH))
    assert (sampled[:, 1] > 0).all() and (
        (sampled > 0).all() if lowered == "soft-max" else (sampled[:, ::2] == 0).all()
    )
    torch.testing.assert_close(sampled.sum(dim=(1, 2)), torch.full((2, BATCH), 1 / BATCH, dtype=torch.float64))


# --- Update ---
def test_without_the_term_it_is_sac_on_logged_rows():
    args, plain_args = osr_v.Args(conservative_coef=0), sac_bc.Args(bc_coef=0, normalise_q=False)
    agent, plain = random_agent(args), sac_bc.Agent(OBS_DIM, ACTION_DIM, plain_args).double()
    plain.load_state_dict(agent.state_dict(), strict=False)
    for seed in range(3):
        rows, noise, *rest = inputs(seed)
        osr_v.update(agent, random_inverse(), rows, noise, *rest, args)
        sac_bc.update(plain, random_behaviour(), rows, noise, plain_args)
    for name in ("actor", "critic", "target_critic", "log_alpha"):
        for one, other in zip(parameters(agent, name), parameters(plain, name), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


def parameters(agent, name: str) -> list[torch.Tensor]:
    part = getattr(agent, name)
    return [part] if isinstance(part, torch.Tensor) else list(part.parameters())


def test_with_logged_actions_at_unperturbed_states_it_is_cql(monkeypatch):
    args, plain_args = osr_v.Args(noise_scale=0), cql.Args(hidden_layers=2)
    agent, plain = random_agent(args), cql.Agent(OBS_DIM, ACTION_DIM, plain_args).double()
    plain.load_state_dict(agent.state_dict(), strict=False)
    for seed in range(3):
        rows, noise, proposal_noise, *rest = inputs(seed)
        logged = rows[:, OBS_DIM : OBS_DIM + ACTION_DIM]
        monkeypatch.setattr(osr_v, "recovering", lambda *_, logged=logged: logged)
        osr_v.update(agent, random_inverse(), rows, noise, proposal_noise, *rest, args)
        cql.update(plain, rows, noise, proposal_noise, plain_args)
    for name in ("actor", "critic", "target_critic", "log_alpha"):
        for one, other in zip(parameters(agent, name), parameters(plain, name), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


def test_an_update_moves_every_network_and_never_the_inverse_model():
    agent, inverse = random_agent(args := osr_v.Args()), random_inverse()
    before, inverse_before = snapshot(agent), snapshot(inverse)
    osr_v.update(agent, inverse, *inputs(), args)
    moved = {name for name, value in agent.state_dict().items() if not torch.equal(value, before[name])}
    assert {name for name in before if name.startswith(("actor.", "critic.", "target_critic.", "log_alpha"))} <= moved
    assert all(torch.equal(value, inverse_before[name]) for name, value in inverse.state_dict().items())


@needs_compiler
def test_compiled_and_eager_updates_agree(capsys):
    args, inverse = osr_v.Args(hidden_layers=1), random_inverse(dtype=torch.float32)
    agents = [random_agent(args, torch.float32) for _ in range(2)]
    step = osr_v.compiled(lambda *x: osr_v.update(agents[0], inverse, *x, args), args, torch.device("cpu"))
    for seed in range(2):
        data = inputs(seed, torch.float32)
        torch.testing.assert_close(step(*data), osr_v.update(agents[1], inverse, *data, args), rtol=1e-4, atol=1e-4)
    assert capsys.readouterr().out == ""  # no word of going on eagerly
