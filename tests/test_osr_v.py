"""OSR-v's functions against independent float64 NumPy and cql.py; osr.py's and CQL's, the same text, in their tests."""

import copy
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch._inductor.config
from test_combo import (
    ACTION_DIM,
    BATCH,
    OBS_DIM,
    K,
    Table,
    as_rows,
    needs_compiler,
    numpy_actor,
    numpy_critic_loss,
    numpy_q,
    random_agent,
    random_batch,
    random_noise,
)
from test_osr import LATENT, numpy_inverse, random_inverse

import algos.cql as cql
import algos.osr as osr
import algos.osr_v as osr_v
import algos.sdc as sdc

STD = [0.5, 2.0, 3.0]


def v_agent(args, dtype=torch.float64):
    agent = random_agent(osr_v, args, dtype)
    agent.obs_std.copy_(torch.tensor(STD))
    return agent


def extra_noise(seed: int = 3, dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    """obs_noise, inverse_noise"""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(BATCH, dim, generator=generator, dtype=dtype) for dim in (OBS_DIM, LATENT + ACTION_DIM))


def stub_inverse(answer):
    """An inverse model whose drawn action is tanh(answer(obs, next_obs)), almost without noise."""

    def forward(obs, next_obs, noise):
        mean = answer(obs, next_obs)
        return mean, torch.full_like(mean, -20.0), noise, noise

    forward.latent_dim = LATENT
    return forward


# --- Actions of the inverse model ---
def numpy_recovery_action(inverse, obs, next_obs, noise: np.ndarray) -> np.ndarray:
    mean, std, *_ = numpy_inverse(inverse, obs, next_obs, noise[:, :LATENT])
    return np.tanh(mean + std * noise[:, LATENT:])


def test_recovery_actions_are_drawn_from_the_inverse_model_and_squashed():
    inverse, (obs, _, _, next_obs, _), (_, noise) = random_inverse(), random_batch(), extra_noise()
    action = osr_v.recovery_action(inverse, obs, next_obs, 3 * noise)
    assert action.shape == (BATCH, ACTION_DIM) and (action.abs() < 1).all()
    expected = numpy_recovery_action(inverse, obs.numpy(), next_obs.numpy(), 3 * noise.numpy())
    np.testing.assert_allclose(action, expected, rtol=1e-9)


def test_no_gradient_reaches_the_inverse_model_and_an_update_leaves_it_alone():
    inverse, (obs, _, _, next_obs, _), extra = random_inverse().requires_grad_(True), random_batch(), extra_noise()
    assert not osr_v.recovery_action(inverse, obs, next_obs, extra[1]).requires_grad
    before, args = copy.deepcopy(inverse.state_dict()), osr_v.Args(critic_lr=1e-2)
    osr_v.update(v_agent(args), inverse, as_rows(random_batch()), *random_noise(), *extra, args)
    assert all(torch.equal(before[name], value) for name, value in inverse.state_dict().items())
    assert all(p.grad is None for p in inverse.parameters())


# --- The critic's loss ---
@pytest.mark.parametrize("raised", ["inverse", "logged"])
@pytest.mark.parametrize("lowered", ["lse", "mean"])
def test_critic_loss_is_that_of_numpy(lowered, raised):
    args = osr_v.Args(noise_scale=0.2, conservative_coef=0.7, lowered=lowered, raised=raised, gamma=0.9)
    agent, inverse, batch = v_agent(args), random_inverse(), random_batch()
    (noise, proposal_noise), extra = random_noise(), extra_noise()
    obs, action, _, next_obs, _ = batch
    perturbed = obs.numpy() + 0.2 * np.array(STD) * extra[0].numpy()
    wanted = numpy_recovery_action(inverse, perturbed, next_obs.numpy(), extra[1].numpy())
    wanted = action.numpy() if raised == "logged" else wanted
    there = [torch.as_tensor(perturbed), torch.as_tensor(wanted), *batch[2:]]
    td, _ = numpy_critic_loss(agent, batch, noise[0], proposal_noise, 0.9, 0, BATCH, 0.0, "all")
    _, gap = numpy_critic_loss(agent, there, noise[0], proposal_noise, 0.9, 0, BATCH, 1.0, "all")
    if lowered == "mean":
        draws = [numpy_actor(agent.actor, perturbed, proposal_noise[1, k].numpy())[0] for k in range(K)]
        q = [[numpy_q(agent.critic, j, perturbed, a).mean() for a in (*draws, wanted)] for j in (0, 1)]
        gap = sum(np.mean(row[:-1]) - row[-1] for row in q)
    info = osr_v.update(agent, inverse, as_rows(batch), noise, proposal_noise, *extra, args)
    assert info["conservative_gap"].item() == pytest.approx(gap, rel=1e-9)
    assert info["critic_loss"].item() == pytest.approx(td + 0.7 * gap, rel=1e-9)


@pytest.mark.parametrize("lowered", ["lse", "mean"])
def test_gradient_is_down_on_the_policys_actions_and_up_on_the_inverse_models_both_at_perturbed_states(lowered):
    args, batch, noises, extra = osr_v.Args(lowered=lowered), random_batch(), random_noise(), extra_noise()
    batch[2], batch[4] = torch.zeros_like(batch[2]), torch.ones_like(batch[4])  # no TD error where Q is 0
    seen, ignore = [], SimpleNamespace(minimize=lambda loss: None)
    opts = {"critic_opt": SimpleNamespace(minimize=seen.append), "actor_opt": ignore, "alpha_opt": ignore}
    tables = {name: Table(2 * BATCH + 3 * K * BATCH) for name in ("critic", "target_critic")}
    whole = v_agent(args)
    agent = SimpleNamespace(actor=whole.actor, log_alpha=whole.log_alpha, obs_std=whole.obs_std, **tables, **opts)
    # of the dynamics s' = s + a in the first two dimensions, with a within (-1, 1)
    obs, next_obs = batch[0], batch[0] + torch.cat([0.5 * batch[1], torch.zeros(BATCH, 1)], dim=1)
    inverse = stub_inverse(lambda s, t: (t - s)[:, :ACTION_DIM].clamp(-0.99, 0.99).atanh())
    osr_v.update(agent, inverse, as_rows([obs, batch[1], batch[2], next_obs, batch[4]]), *noises, *extra, args)
    states, actions = agent.critic.calls[0]
    perturbed = states[BATCH : 2 * BATCH]
    torch.testing.assert_close(perturbed, obs + 1e-3 * torch.tensor(STD) * extra[0])
    assert torch.equal(states[:BATCH], obs) and torch.equal(states[2 * BATCH :], perturbed.repeat(3 * K, 1))
    reached = perturbed[:, :ACTION_DIM] + actions[BATCH : 2 * BATCH]  # leads back to where the log went
    torch.testing.assert_close(reached, next_obs[:, :ACTION_DIM], rtol=0, atol=1e-7)
    grad = torch.autograd.grad(seen[0], agent.critic.q)[0]
    assert (grad[:, :BATCH] == 0).all()
    torch.testing.assert_close(grad[:, BATCH : 2 * BATCH], torch.full((2, BATCH), -5 / BATCH, dtype=torch.float64))
    uniform, policy, successor = grad[:, 2 * BATCH :].unflatten(1, (3, K * BATCH)).unbind(1)
    assert (policy > 0).all()
    assert ((torch.stack([uniform, successor]) > 0) == (lowered == "lse")).all()
    torch.testing.assert_close(grad.sum(dim=1), torch.zeros(2, dtype=torch.float64))


def test_an_end_whose_successor_is_not_known_raises_q_at_the_logged_action():
    """Where a file has no successors next_obs is obs there."""
    args, batch, gaps = osr_v.Args(noise_scale=0.0), random_batch(), []
    end = batch[4] == 1
    assert 2 < end.sum() < BATCH - 2
    batch[3][end] = batch[0][end]
    logged = batch[1].atanh()
    for answer_there in (torch.full_like(logged, 0.2), torch.full_like(logged, -2.0), logged):
        inverse = stub_inverse(lambda s, t, there=answer_there: torch.where(end[:, None], there, 0.3))
        info = osr_v.update(v_agent(args), inverse, as_rows(batch), *random_noise(), *extra_noise(), args)
        gaps.append(info["conservative_gap"].item())
    assert gaps == pytest.approx([gaps[2]] * 3, rel=1e-7)
    batch[3][end] += 1e-3  # a logged successor, even of an end, counts
    inverse = stub_inverse(lambda s, t: torch.where(end[:, None], -2.0, 0.3).expand(-1, ACTION_DIM).double())
    info = osr_v.update(v_agent(args), inverse, as_rows(batch), *random_noise(), *extra_noise(), args)
    assert info["conservative_gap"].item() != pytest.approx(gaps[0], rel=1e-3)


# --- Update ---
@pytest.mark.parametrize("settings", [
    {"conservative_coef": 0.0, "noise_scale": 0.2},  # SAC on logged rows
    {"conservative_coef": 5.0, "noise_scale": 0.0, "raised": "logged"},  # CQL
], ids=["sac", "cql"])  # fmt: skip
def test_without_its_term_it_is_sac_and_at_logged_states_and_actions_cql(settings):
    args = osr_v.Args(**settings)
    plain_args = cql.Args(conservative_coef=args.conservative_coef, hidden_layers=2)
    agent, inverse = v_agent(args), random_inverse()
    plain = cql.Agent(OBS_DIM, ACTION_DIM, plain_args).double()
    plain.load_state_dict(agent.state_dict(), strict=False)
    for seed in range(3):
        rows, noises, extra = as_rows(random_batch(seed=seed)), random_noise(seed=seed), extra_noise(seed)
        info = osr_v.update(agent, inverse, rows, *noises, *extra, args)
        expected = cql.update(plain, rows, *noises, plain_args)
        for name in {"critic_loss", "actor_loss", "q", "log_prob"}:
            torch.testing.assert_close(info[name], expected[name], rtol=1e-9, atol=0)
    for name in ("actor", "critic", "target_critic"):
        for one, other in zip(getattr(agent, name).parameters(), getattr(plain, name).parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("raised, side", [("inverse", 1), ("logged", -1)])
def test_the_policy_goes_to_the_side_where_q_is_raised(raised, side):
    """No reward anywhere, all actions logged at -0.6, and an inverse model that always says 0.6."""
    args = osr_v.Args(raised=raised, actor_lr=3e-3, critic_lr=3e-3, hidden_layers=1, conservative_coef=1.0)
    torch.manual_seed(0)
    agent = osr_v.Agent(OBS_DIM, ACTION_DIM, args)
    agent.log_alpha.data.fill_(-5.0)
    inverse = stub_inverse(lambda obs, _: torch.full((len(obs), ACTION_DIM), 0.6).atanh())
    obs, _, _, next_obs, _ = random_batch(torch.float32)
    zero, one = torch.zeros(BATCH), torch.ones(BATCH)
    rows = as_rows([obs, torch.full((BATCH, ACTION_DIM), -0.6), zero, next_obs, one])
    for seed in range(100):
        extra = extra_noise(seed, torch.float32)
        osr_v.update(agent, inverse, rows, *random_noise(torch.float32, seed), *extra, args)
    assert (side * agent.actor.act(obs) > 0.3).all()


@pytest.mark.parametrize("module", [osr_v, osr, sdc], ids=lambda module: module.ALGO)
def test_a_run_perturbs_afresh_in_units_of_its_data_and_its_models_stay_as_fitted(module, tmp_path, monkeypatch):
    monkeypatch.setenv("OFFLINE_MBRL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    rng, seen = np.random.default_rng(0), []
    obs, action = rng.normal(size=(200, OBS_DIM)) * STD, rng.uniform(-1, 1, (200, ACTION_DIM))
    arrays = {"observations": obs, "actions": action, "rewards": obs[:, 0], "next_observations": obs + 0.1}
    np.savez(tmp_path / "own.npz", **arrays, terminals=np.zeros(200), timeouts=np.ones(200))
    update = module.update

    def spy(agent, *inputs, **kwargs):
        nets = [x for x in inputs if isinstance(x, torch.nn.Module)]
        noises = [x for x in inputs if isinstance(x, torch.Tensor) and x.is_floating_point()][3:]  # from obs_noise on
        seen.append((agent.obs_std.clone(), nets, [copy.deepcopy(net.state_dict()) for net in nets], noises))
        return update(agent, *inputs, **kwargs)

    monkeypatch.setattr(module, "update", spy)
    own = {"transition_updates": 20, "dynamics_max_epochs": 1} if module is sdc else {"inverse_updates": 20}
    module.main(module.Args(
        dataset=str(tmp_path / "own.npz"), num_updates=3, run_dir=str(tmp_path), compile=False, num_threads=1, **own,
    ), [])  # fmt: skip
    stds, nets, states, noises = zip(*seen, strict=True)
    np.testing.assert_allclose(stds[-1], obs.std(axis=0, ddof=1), rtol=1e-5)
    assert not any(p.requires_grad for net in nets[-1] for p in net.parameters())
    for first, last in zip(states[0], states[-1], strict=True):
        assert all(torch.equal(value, last[name]) for name, value in first.items())
    for draws in zip(*noises, strict=True):
        assert not torch.equal(draws[0], draws[1]) and torch.stack(draws).std().item() == pytest.approx(1, abs=0.1)


@needs_compiler
def test_compiled_and_eager_updates_agree(capsys):
    args = osr_v.Args(hidden_layers=1)
    agents, inverse = [v_agent(args, torch.float32) for _ in range(2)], random_inverse(dtype=torch.float32)
    step = osr_v.compiled(lambda *x: osr_v.update(agents[0], inverse, *x, args), args, torch.device("cpu"))
    step = torch._inductor.config.patch({"cpp.vec_isa_ok": True})(step)  # skips test compilations, ten seconds
    for seed in range(2):
        inputs = as_rows(random_batch(torch.float32, seed)), *random_noise(torch.float32, seed)
        inputs += extra_noise(seed, torch.float32)
        torch.testing.assert_close(step(*inputs), osr_v.update(agents[1], inverse, *inputs, args), rtol=1e-4, atol=1e-4)
    assert capsys.readouterr().out == ""  # no word of going on eagerly
