"""OSR-v's functions against independent float64 NumPy and cql.py; osr.py's and CQL's, the same text, in their tests."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_combo import ACTION_DIM, BATCH, OBS_DIM, Table, as_rows, numpy_actor, numpy_q, random_agent, random_batch
from test_osr import LATENT, SMALL, STD, numpy_inverse, random_inverse, random_noise

import algos.cql as cql
import algos.osr as osr
import algos.osr_v as osr_v
import algos.sdc as sdc

K = SMALL["num_samples"]


def small_args(**settings) -> osr_v.Args:
    return osr_v.Args(**{**SMALL, "latent_dim": LATENT, **settings})


def v_agent(args) -> osr_v.Agent:
    agent = random_agent(osr_v, args)
    agent.obs_std.copy_(torch.tensor(STD))
    return agent


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
    inverse, (obs, _, _, next_obs, _) = random_inverse(), random_batch()
    noise = 3 * random_noise(osr_v, small_args())["inverse"]
    action = osr_v.recovery_action(inverse, obs, next_obs, noise)
    assert action.shape == (BATCH, ACTION_DIM) and (action.abs() < 1).all()
    expected = numpy_recovery_action(inverse, obs.numpy(), next_obs.numpy(), noise.numpy())
    np.testing.assert_allclose(action, expected, rtol=1e-9)


def test_no_gradient_reaches_the_inverse_model_and_an_update_leaves_it_alone():
    inverse, (obs, _, _, next_obs, _), args = random_inverse(), random_batch(), small_args(critic_lr=1e-2)
    inverse.requires_grad_(True)
    noise = random_noise(osr_v, args)
    assert not osr_v.recovery_action(inverse, obs, next_obs, noise["inverse"]).requires_grad
    before = copy.deepcopy(inverse.state_dict())
    osr_v.update(v_agent(args), inverse, as_rows(random_batch()), noise, args)
    assert all(torch.equal(before[name], value) for name, value in inverse.state_dict().items())
    assert all(p.grad is None for p in inverse.parameters())


# --- The critic's loss ---
def numpy_td_loss(agent, batch, noise: np.ndarray, gamma: float) -> float:
    """Of both critics, without entropy in the target."""
    obs, action, reward, next_obs, terminal = (x.numpy() for x in batch)
    next_action, _ = numpy_actor(agent.actor, next_obs, noise)
    next_value = np.minimum(*(numpy_q(agent.target_critic, j, next_obs, next_action) for j in (0, 1)))
    target = np.where(terminal == 1, reward, reward + gamma * next_value)
    return sum(((numpy_q(agent.critic, j, obs, action) - target) ** 2).mean() for j in (0, 1))


def numpy_gap(agent, obs: np.ndarray, next_obs: np.ndarray, wanted: np.ndarray, noise: np.ndarray, lowered: str):
    """Of both critics; noise: (3, K, batch, action_dim) of the proposals."""
    total = 0.0
    for j in (0, 1):
        values, of_policy = [], []
        for uniform, normal, next_normal in zip(*noise):
            values.append((numpy_q(agent.critic, j, obs, uniform), math.log(0.5**ACTION_DIM)))
            action, log_prob = numpy_actor(agent.actor, obs, normal)
            of_policy.append(numpy_q(agent.critic, j, obs, action))
            next_action, next_log_prob = numpy_actor(agent.actor, next_obs, next_normal)
            values += [(of_policy[-1], log_prob), (numpy_q(agent.critic, j, obs, next_action), next_log_prob)]
        soft_max = np.log(sum(np.exp(q) / np.exp(log_density) for q, log_density in values))
        total += (soft_max if lowered == "lse" else np.mean(of_policy, axis=0)).mean()
        total -= numpy_q(agent.critic, j, obs, wanted).mean()
    return total


@pytest.mark.parametrize("raised", ["inverse", "logged"])
@pytest.mark.parametrize("lowered", ["lse", "mean"])
def test_critic_loss_is_that_of_numpy(lowered, raised):
    args = small_args(noise_scale=0.2, conservative_coef=0.7, lowered=lowered, raised=raised, gamma=0.9)
    agent, inverse, batch, noise = v_agent(args), random_inverse(), random_batch(), random_noise(osr_v, args)
    draws = {name: value.numpy() for name, value in noise.items()}
    obs, action, _, next_obs, _ = (x.numpy() for x in batch)
    perturbed = obs + 0.2 * np.array(STD) * draws["obs"]
    wanted = numpy_recovery_action(inverse, perturbed, next_obs, draws["inverse"]) if raised == "inverse" else action
    td = numpy_td_loss(agent, batch, draws["next_action"], 0.9)
    gap = numpy_gap(agent, perturbed, next_obs, wanted, draws["proposals"], lowered)
    info = osr_v.update(agent, inverse, as_rows(batch), noise, args)
    assert info["conservative_gap"].item() == pytest.approx(gap, rel=1e-9)
    assert info["critic_loss"].item() == pytest.approx(td + 0.7 * gap, rel=1e-9)


@pytest.mark.parametrize("lowered", ["lse", "mean"])
def test_gradient_is_down_on_the_policys_actions_and_up_on_the_inverse_models_both_at_perturbed_states(lowered):
    args, batch = small_args(lowered=lowered), random_batch()
    noise = random_noise(osr_v, args)
    batch[2], batch[4] = torch.zeros_like(batch[2]), torch.ones_like(batch[4])  # no TD error where Q is 0
    seen, ignore = [], SimpleNamespace(minimize=lambda loss: None)
    opts = {"critic_opt": SimpleNamespace(minimize=seen.append), "actor_opt": ignore, "alpha_opt": ignore}
    tables = {name: Table(2 * BATCH + 3 * K * BATCH) for name in ("critic", "target_critic")}
    whole = v_agent(args)
    agent = SimpleNamespace(actor=whole.actor, log_alpha=whole.log_alpha, obs_std=whole.obs_std, **tables, **opts)
    # of the dynamics s' = s + a in the first two dimensions, with a within (-1, 1)
    obs, next_obs = batch[0], batch[0] + torch.cat([0.5 * batch[1], torch.zeros(BATCH, 1)], dim=1)
    inverse = stub_inverse(lambda s, t: (t - s)[:, :ACTION_DIM].clamp(-0.99, 0.99).atanh())
    osr_v.update(agent, inverse, as_rows([obs, batch[1], batch[2], next_obs, batch[4]]), noise, args)
    states, actions = agent.critic.calls[0]
    perturbed = states[BATCH : 2 * BATCH]
    torch.testing.assert_close(perturbed, obs + 1e-3 * torch.tensor(STD) * noise["obs"])
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
    args, batch, gaps = small_args(noise_scale=0.0), random_batch(), []
    noise, end = random_noise(osr_v, args), batch[4] == 1
    assert 2 < end.sum() < BATCH - 2
    batch[3][end] = batch[0][end]
    logged = batch[1].atanh()
    for answer_there in (torch.full_like(logged, 0.2), torch.full_like(logged, -2.0), logged):
        inverse = stub_inverse(lambda s, t, there=answer_there: torch.where(end[:, None], there, 0.3))
        info = osr_v.update(v_agent(args), inverse, as_rows(batch), noise, args)
        gaps.append(info["conservative_gap"].item())
    assert gaps == pytest.approx([gaps[2]] * 3, rel=1e-7)
    batch[3][end] += 1e-3  # a logged successor, even of an end, counts
    inverse = stub_inverse(lambda s, t: torch.where(end[:, None], -2.0, 0.3).expand(-1, ACTION_DIM).double())
    info = osr_v.update(v_agent(args), inverse, as_rows(batch), noise, args)
    assert info["conservative_gap"].item() != pytest.approx(gaps[0], rel=1e-3)


# --- Update ---
@pytest.mark.parametrize("settings", [
    {"conservative_coef": 0.0, "noise_scale": 0.2},  # SAC on logged rows
    {"conservative_coef": 5.0, "noise_scale": 0.0, "raised": "logged"},  # CQL
], ids=["sac", "cql"])  # fmt: skip
def test_without_its_term_it_is_sac_and_at_logged_states_and_actions_cql(settings):
    args, plain_args = small_args(**settings), cql.Args(**SMALL, conservative_coef=settings["conservative_coef"])
    agent, inverse = v_agent(args), random_inverse()
    plain = cql.Agent(OBS_DIM, ACTION_DIM, plain_args).double()
    plain.load_state_dict(agent.state_dict(), strict=False)
    for seed in range(3):
        rows, noise = as_rows(random_batch(seed=seed)), random_noise(osr_v, args, seed)
        info, expected = osr_v.update(agent, inverse, rows, noise, args), cql.update(plain, rows, noise, plain_args)
        for name in {"critic_loss", "actor_loss", "q", "log_prob"}:
            torch.testing.assert_close(info[name], expected[name], rtol=1e-9, atol=0)
    for name in ("actor", "critic", "target_critic"):
        for one, other in zip(getattr(agent, name).parameters(), getattr(plain, name).parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("raised, side", [("inverse", 1), ("logged", -1)])
def test_the_policy_goes_to_the_side_where_q_is_raised(raised, side):
    """No reward anywhere, all actions logged at -0.6, and an inverse model that always says 0.6."""
    args = small_args(raised=raised, actor_lr=3e-3, critic_lr=3e-3, hidden_sizes=(64,), conservative_coef=1.0)
    torch.manual_seed(0)
    agent = osr_v.Agent(OBS_DIM, ACTION_DIM, args)
    agent.log_alpha.data.fill_(-5.0)
    inverse = stub_inverse(lambda obs, _: torch.full((len(obs), ACTION_DIM), 0.6).atanh())
    obs, _, _, next_obs, _ = random_batch(torch.float32)
    zero, one = torch.zeros(BATCH), torch.ones(BATCH)
    rows = as_rows([obs, torch.full((BATCH, ACTION_DIM), -0.6), zero, next_obs, one])
    for seed in range(150):
        osr_v.update(agent, inverse, rows, random_noise(osr_v, args, seed, torch.float32), args)
    assert (side * agent.actor.act(obs) > 0.3).all()


@pytest.mark.parametrize("module", [osr_v, osr, sdc], ids=lambda module: module.__name__)
def test_a_run_perturbs_afresh_in_units_of_its_data_and_its_models_stay_as_fitted(module, tmp_path, monkeypatch):
    monkeypatch.setenv("OFFLINE_MBRL_CACHE", str(tmp_path / "cache"))
    rng, seen = np.random.default_rng(0), []
    obs, action = rng.normal(size=(200, OBS_DIM + 1)) * [*STD, 0] + 5, rng.uniform(-1, 1, (200, ACTION_DIM))
    arrays = {"observations": obs, "actions": action, "rewards": obs[:, 0], "next_observations": obs + 0.1}
    np.savez(tmp_path / "own.npz", **arrays, terminals=np.zeros(200), timeouts=np.ones(200))
    update = module.update

    def spy(agent, *inputs):
        nets = [x for x in inputs if isinstance(x, torch.nn.Module)]
        [noise] = [x for x in inputs if isinstance(x, dict)]
        seen.append((agent.obs_std.clone(), nets, [copy.deepcopy(net.state_dict()) for net in nets], noise))
        return update(agent, *inputs)

    monkeypatch.setattr(module, "update", spy)
    own = {"transition_updates": 20, "dynamics_max_epochs": 1} if module is sdc else {"inverse_updates": 20}
    small = {"hidden_sizes": (8, 8), "num_samples": 2, "num_updates": 3, "compile": False, "num_threads": 1}
    module.main(module.Args(dataset=str(tmp_path / "own.npz"), run_dir=str(tmp_path), **small, **own))
    stds, nets, states, noises = zip(*seen, strict=True)
    np.testing.assert_allclose(stds[-1], obs.std(axis=0, ddof=1), rtol=1e-5)  # 0 where obs is constant
    assert len(nets[-1]) == (2 if module is sdc else 1)
    assert not any(p.requires_grad for net in nets[-1] for p in net.parameters())
    for first, last in zip(states[0], states[-1], strict=True):
        assert all(torch.equal(value, last[name]) for name, value in first.items())
    for name in noises[0]:
        draws = torch.stack([noise[name] for noise in noises])
        assert not torch.equal(draws[0], draws[1])
        if name == "order":
            assert all(torch.equal(draw.sort()[0], torch.arange(len(draw))) for draw in draws)
        else:
            normal = draws[:, 1:] if name == "proposals" else draws
            assert abs(normal.std() - 1) < 0.1 and abs(normal.mean()) < 0.1
