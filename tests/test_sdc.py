"""SDC's functions against independent float64 NumPy, known values of the MMD, cql.py, and models with known answers."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_combo import (
    ACTION_DIM,
    BATCH,
    OBS_DIM,
    as_rows,
    needs_compiler,
    numpy_actor,
    numpy_q,
    random_agent,
    random_batch,
    random_noise,
)

import algos.cql as cql
import algos.sdc as sdc
from common.dataset import InputError, load_dataset
from common.dynamics import Dynamics

N = 3  # samples of either side


def randn(*shape: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def models(dtype=torch.float64) -> tuple[sdc.TransitionModel, Dynamics]:
    torch.manual_seed(7)
    obs, _, _, next_obs, _ = random_batch(dtype)
    transition = sdc.TransitionModel(obs, next_obs).to(dtype).requires_grad_(False)
    dynamics = Dynamics(OBS_DIM, ACTION_DIM, 4, 3, hidden=8).to(dtype).requires_grad_(False)
    dynamics.elites.copy_(torch.tensor([3, 0, 2]))
    for layer in dynamics.layers:
        layer.weight.mul_(4)  # else actions hardly matter
    return transition, dynamics


def sdc_agent(args, dtype=torch.float64):
    agent = random_agent(sdc, args, dtype)
    agent.obs_std.copy_(torch.tensor([0.5, 2.0, 3.0]))
    agent.obs_scale.copy_(torch.tensor([0.7, 2.0, 2.5]))
    agent.bandwidth.fill_(1.3)
    agent.mmd_0.fill_(0.4)
    return agent


def method_noise(seed: int = 3, dtype=torch.float64):
    """obs_noise, action_noise, latent_noise, order, model_noise"""
    order = torch.randperm(N * BATCH, generator=torch.Generator().manual_seed(seed))
    shapes = (BATCH, OBS_DIM), (N, BATCH, ACTION_DIM), (N, BATCH, 2 * OBS_DIM), (N * BATCH, OBS_DIM + 1)
    noise = [randn(*shape, seed=seed + i, dtype=dtype) for i, shape in enumerate(shapes)]
    return *noise[:3], order, noise[3]


# --- The MMD ---
def numpy_mmd(x: np.ndarray, y: np.ndarray, width: float) -> float:
    """x: (n, dim), y: (m, dim); written out."""

    def mean(a, b):
        return np.mean([math.exp(-((p - q) ** 2).sum() / (2 * width**2)) for p in a for q in b])

    return math.sqrt(mean(x, x) + mean(y, y) - 2 * mean(x, y) + 1e-6)


def mmd(x, y, width: float = 1.3) -> torch.Tensor:
    return sdc.mmd(x, y, torch.tensor(width))


def test_mmd_is_that_of_numpy_state_by_state():
    x, y = randn(4, BATCH, OBS_DIM), 0.5 * randn(6, BATCH, OBS_DIM, seed=1) + 0.3
    expected = [numpy_mmd(x[:, i].numpy(), y[:, i].numpy(), 1.3) for i in range(BATCH)]
    np.testing.assert_allclose(mmd(x, y), expected, rtol=1e-6)


def test_mmd_of_a_set_with_itself_is_zero_and_neither_order_nor_place_matter():
    x, y = randn(4, BATCH, OBS_DIM), randn(6, BATCH, OBS_DIM, seed=1)
    torch.testing.assert_close(mmd(x, x), torch.full((BATCH,), 1e-3, dtype=torch.float64), rtol=1e-6, atol=0)
    for other in (mmd(y, x), mmd(x.flip(0), y), mmd(x + 5, y + 5)):
        torch.testing.assert_close(mmd(x, y), other)


def test_mmd_of_one_sample_each_is_a_distance_of_the_kernel():
    x, y = randn(1, BATCH, OBS_DIM), randn(1, BATCH, OBS_DIM, seed=1)
    kernel = (-(x - y).square().sum(-1)[0] / (2 * 1.3**2)).exp()
    torch.testing.assert_close(mmd(x, y).square(), 2 - 2 * kernel + 1e-6)


def test_mmd_of_many_samples_of_two_normals_has_its_known_value():
    dim, width, shift = 3, 1.3, torch.tensor([1.2, -0.6, 1.0], dtype=torch.float64)
    x, y = randn(2_000, 1, dim), randn(2_000, 1, dim, seed=1) + shift
    scale = (1 + 2 / width**2) ** (-dim / 2)
    expected = 2 * scale * (1 - math.exp(-shift.square().sum().item() / (2 * (width**2 + 2))))
    assert mmd(x, y, width).square().item() == pytest.approx(expected, rel=0.1)


# --- The transition model ---
def numpy_mlp(x: np.ndarray, net) -> np.ndarray:
    p = [p.detach().numpy() for p in net.parameters()]
    for weight, bias in zip(p[:-2:2], p[1:-2:2]):
        x = np.maximum(x @ weight.T + bias, 0)
    return x @ p[-2].T + p[-1]


def numpy_sample(transition, obs: np.ndarray, latent: np.ndarray) -> np.ndarray:
    scale = {name: buffer.numpy() for name, buffer in transition.named_buffers()}
    x = np.concatenate([(obs - scale["obs_mean"]) / scale["obs_std"], latent], axis=1)
    return obs + scale["delta_mean"] + scale["delta_std"] * numpy_mlp(x, transition.decoder)


def test_transition_loss_and_samples_are_those_of_numpy():
    transition, (obs, _, _, next_obs, _) = models()[0], random_batch()
    noise, scale = randn(BATCH, 2 * OBS_DIM), {name: buffer.numpy() for name, buffer in transition.named_buffers()}
    delta = ((next_obs - obs).numpy() - scale["delta_mean"]) / scale["delta_std"]
    standardised = (obs.numpy() - scale["obs_mean"]) / scale["obs_std"]
    m, log_e = np.split(numpy_mlp(np.concatenate([standardised, delta], 1), transition.encoder), 2, axis=1)
    e = np.exp(np.clip(log_e, -5, 2))
    sample = numpy_sample(transition, obs.numpy(), m + e * noise.numpy())
    error = (((sample - next_obs.numpy()) / scale["delta_std"]) ** 2).mean()
    prior = (-0.5 * (1 + np.log(e**2) - m**2 - e**2)).mean()
    loss = sdc.transition_loss(transition, obs, next_obs, noise, 0.3)
    assert loss.item() == pytest.approx(error + 0.3 * prior, rel=1e-9)
    np.testing.assert_allclose(transition.sample(obs, noise), numpy_sample(transition, obs.numpy(), noise.numpy()))
    np.testing.assert_allclose(standardised.std(0, ddof=1), 1)


@pytest.fixture(scope="module")
def linear(tmp_path_factory):
    """s' = 0.9 s + 0.1 a, with uniform actions; the transition model of it."""
    folder = tmp_path_factory.mktemp("linear")
    patch, rng = pytest.MonkeyPatch(), np.random.default_rng(0)
    patch.setenv("OFFLINE_MBRL_CACHE", str(folder / "cache"))
    obs, action = rng.normal(size=(4_000, 1)), rng.uniform(-0.9, 0.9, (4_000, 1))
    next_obs = 0.9 * obs + 0.1 * action
    arrays = {"observations": obs, "actions": action, "rewards": obs[:, 0], "next_observations": next_obs}
    np.savez(folder / "own.npz", **arrays, terminals=np.zeros(4_000), timeouts=np.ones(4_000))
    data = load_dataset(str(folder / "own.npz"))
    args = sdc.Args(transition_updates=2_000, latent_coef=0.05, compile=False)
    yield data, sdc.transition_model(data, args)
    patch.undo()


def test_the_transition_model_has_the_mean_and_the_spread_of_the_data(linear):
    _, transition = linear
    for s in (-1.0, 0.0, 1.0):
        sample = transition.sample(torch.full((4_000, 1), s), randn(4_000, 2, dtype=torch.float32))
        assert sample.mean().item() == pytest.approx(0.9 * s, abs=0.02)
        assert sample.std().item() == pytest.approx(0.09 / math.sqrt(3), rel=0.35)


def test_without_the_latent_variables_kl_the_transition_model_rebuilds_what_it_has_seen(linear):
    data, _ = linear
    args = sdc.Args(transition_updates=1_000, latent_coef=0.0, compile=False)
    transition = sdc.transition_model(data, args)
    noise = torch.randn(len(data.obs), transition.latent_dim, generator=torch.Generator().manual_seed(0))
    assert sdc.transition_loss(transition, data.obs, data.next_obs, noise, 0.0).item() < 2e-3  # of a variance of 1


class Exact:
    """The linear system as an ensemble."""

    def __init__(self, data):
        box = [torch.as_tensor(x, dtype=torch.float32) for x in (data.action_low, data.action_high)]
        self.centre, self.half = (box[1] + box[0]) / 2, (box[1] - box[0]) / 2

    def step(self, obs, action, order, noise):
        return 0.9 * obs + 0.1 * (self.centre + self.half * action), noise[:, -1]


def test_calibration_takes_width_and_mmd_0_from_u_and_the_log_s_own_actions_meet_the_bound(linear, capsys):
    data, transition = linear
    args = sdc.Args(mmd_samples=10)
    agent = sdc.Agent(1, 1, args)
    sdc.calibrate(agent, transition, data, args)
    assert "constraint  MMD <=" in (out := capsys.readouterr().out)
    assert 0.8 < float(out.split("samples of U lie ")[1].split()[0]) < 1.1
    assert [x.item() for x in (agent.obs_std, agent.obs_scale)] == pytest.approx([data.obs.std().item()] * 2, rel=1e-4)
    # the same draws, by the seed
    generator = torch.Generator().manual_seed(0)
    at = torch.randint(4_000, (1_000,), generator=generator)
    latents = [torch.randn(10, 1_000, 2, generator=generator) for _ in range(2)]
    x, y = (transition.sample(data.obs[at].expand(10, -1, -1), z).numpy() / agent.obs_std.item() for z in latents)
    width = np.median(np.abs(x[0] - data.next_obs[at].numpy() / agent.obs_std.item()))
    assert agent.bandwidth.item() == pytest.approx(width, rel=2e-3)
    mmd_0 = np.mean([numpy_mmd(x[:, i], y[:, i], agent.bandwidth.item()) for i in range(1_000)])
    assert agent.mmd_0.item() == pytest.approx(mmd_0, rel=1e-3)

    def distance(shift: float) -> float:
        obs, action = data.obs[:500], data.action[torch.randint(len(data.action), (10, 500))]
        noise = torch.randn(10, 500, 2), torch.randperm(5_000), torch.zeros(5_000, 2)
        return sdc.deviation(agent, transition, Exact(data), obs, obs + shift, action, *noise).item()

    torch.manual_seed(0)
    assert distance(0.0) < distance(0.1) < distance(0.4)
    assert distance(0.0) < agent.mmd_0.item() + args.eta < distance(0.1)
    sdc.calibrate(agent, transition, data, sdc.Args(bandwidth=0.1))
    assert agent.bandwidth.item() == pytest.approx(0.1)


def test_calibration_shows_a_transition_model_whose_latent_variable_is_not_used(linear, capsys):
    data, _ = linear
    sdc.calibrate(sdc.Agent(1, 1, sdc.Args()), SimpleNamespace(
        obs_std=data.obs.std(dim=0), latent_dim=2, sample=lambda obs, noise: 0.9 * obs + 1e-3 * noise[..., :1]
    ), data, sdc.Args())  # fmt: skip
    assert float(capsys.readouterr().out.split("samples of U lie ")[1].split()[0]) < 0.1


def test_a_constant_dimension_is_not_perturbed_and_is_measured_in_units_of_its_own(linear):
    data, _ = linear
    data = replace(data, obs=F.pad(data.obs, (0, 1), value=5.0), next_obs=F.pad(data.next_obs, (0, 1), value=5.0))
    agent, transition = sdc.Agent(2, 1, sdc.Args()), sdc.TransitionModel(data.obs, data.next_obs)
    sdc.calibrate(agent, transition, data, sdc.Args())
    assert agent.obs_std[1] == 0 and agent.obs_scale[1] == 1


def test_a_policy_that_does_as_the_log_does_has_no_deviation_where_all_is_determined_and_more_the_further_off_it_is():
    def usual(obs, noise):
        return 0.9 * obs + 0.02

    def step(obs, action, order, noise):
        return 0.9 * obs + 0.1 * action, noise

    agent = sdc.Agent(1, 1, sdc.Args())
    obs, action, noise = randn(50, 1).float(), torch.full((4, 50, 1), 0.2), torch.zeros(4, 50, 2)
    still = SimpleNamespace(sample=usual), SimpleNamespace(step=step)
    distances = [
        sdc.deviation(agent, *still, obs, sdc.perturb(obs, agent.obs_std, randn(50, 1, seed=1).float(), beta), action,
                      noise, None, None).item()
        for beta in (0.0, 0.1, 0.3, 1.0)
    ]  # fmt: skip
    assert distances[0] == pytest.approx(1e-3, rel=0.05)
    assert distances == sorted(distances) and distances[1] > 0.05


@pytest.mark.parametrize("bandwidth", [1e-4, 100.0])
def test_a_kernel_that_says_nothing_is_refused(bandwidth, linear):
    data, transition = linear
    with pytest.raises(InputError, match="--bandwidth"):
        sdc.calibrate(sdc.Agent(1, 1, sdc.Args()), transition, data, sdc.Args(bandwidth=bandwidth))


# --- Update ---
@pytest.mark.parametrize("normalise_q", [False, True])
def test_actor_loss_and_mmd_are_those_of_numpy(normalise_q):
    args = sdc.Args(noise_scale=0.2, multiplier=0.7, num_samples=4, critic_lr=1e-12, normalise_q=normalise_q, eta=0.1)
    agent, (transition, dynamics), batch = sdc_agent(args), models(), random_batch()
    noise, proposal_noise = random_noise()
    extra = obs_noise, action_noise, latent_noise, order, model_noise = method_noise()
    std, scale, obs = np.array([0.5, 2.0, 3.0]), np.array([0.7, 2.0, 2.5]), batch[0].numpy()
    action, log_prob = numpy_actor(agent.actor, obs, noise[1].numpy())  # at the logged state
    q = np.minimum(*(numpy_q(agent.critic, j, obs, action) for j in (0, 1)))
    perturbed = obs + 0.2 * std * obs_noise.numpy()
    chosen = np.concatenate([numpy_actor(agent.actor, perturbed, action_noise[k].numpy())[0] for k in range(N)])
    reached, _ = dynamics.step(torch.as_tensor(np.tile(perturbed, (N, 1))), torch.as_tensor(chosen), order, model_noise)
    y = reached.numpy().reshape(N, BATCH, OBS_DIM) / scale
    x = np.stack([numpy_sample(transition, obs, latent_noise[k].numpy()) for k in range(N)]) / scale
    distance = np.mean([numpy_mmd(x[:, i], y[:, i], 1.3) for i in range(BATCH)])
    info = sdc.update(agent, transition, dynamics, as_rows(batch), noise, proposal_noise, *extra, args=args)
    assert info["mmd"].item() == pytest.approx(distance, rel=1e-6)
    sac = (log_prob - q).mean() / (np.abs(q).mean() if normalise_q else 1)
    assert info["actor_loss"].item() == pytest.approx(sac + 0.7 * (distance - 0.4 - 0.1), rel=1e-6)


def test_the_constraint_pulls_at_the_policy_through_the_ensemble():
    args = sdc.Args(num_samples=4)
    agent, nets, (obs, *_) = sdc_agent(args), models(), random_batch()
    obs_noise, action_noise, *next_noise = method_noise()
    distance = sdc.deviation(agent, *nets, obs, obs, agent.actor(obs, action_noise)[0], *next_noise)
    grads = torch.autograd.grad(distance, list(agent.actor.parameters()))
    assert max(g.abs().max() for g in grads) > 1e-4


@pytest.mark.parametrize("mmd_0, eta, sign", [(0.0, 0.0, 1), (0.0, 5.0, -1), (5.0, 0.0, -1)])
def test_the_multiplier_grows_above_the_bound_and_shrinks_below(mmd_0, eta, sign):
    args = sdc.Args(num_samples=4, multiplier_lr=0.1, eta=eta)
    agent, nets = sdc_agent(args), models()
    agent.mmd_0.fill_(mmd_0)
    for _ in range(2):
        info = sdc.update(agent, *nets, as_rows(random_batch()), *random_noise(), *method_noise(), args=args)
    assert sign * agent.log_kappa.item() == pytest.approx(0.2, rel=0.01)
    assert info["kappa"].item() == pytest.approx(math.exp(sign * 0.1), rel=0.01)  # before its second step
    with torch.no_grad():
        agent.log_kappa.fill_(sign * 50.0)
    sdc.update(agent, *nets, as_rows(random_batch()), *random_noise(), *method_noise(), args=args)
    assert agent.log_kappa.item() == (10 if sign > 0 else -5)


@pytest.mark.parametrize("conservative_coef", [5.0, 0.0])
def test_with_a_multiplier_of_zero_it_is_cql_and_without_its_term_sac(conservative_coef):
    args = sdc.Args(multiplier=0.0, num_samples=4, conservative_coef=conservative_coef)
    plain_args = cql.Args(hidden_layers=2, conservative_coef=conservative_coef)
    agent, nets, plain = sdc_agent(args), models(), cql.Agent(OBS_DIM, ACTION_DIM, plain_args).double()
    own = {"log_kappa", "kappa_opt"}  # of CQL's Lagrange form there, of the constraint here
    shared = {key: value for key, value in agent.state_dict().items() if key.split(".")[0] not in own}
    plain.load_state_dict(shared, strict=False)
    for seed in range(3):
        rows, noises = as_rows(random_batch(seed=seed)), random_noise(seed=seed)
        sdc.update(agent, *nets, rows, *noises, *method_noise(), args=args)
        cql.update(plain, rows, *noises, plain_args)
    for name in ("actor", "critic", "target_critic"):
        for one, other in zip(getattr(agent, name).parameters(), getattr(plain, name).parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)
    assert agent.log_kappa.item() == 0


@needs_compiler
def test_compiled_and_eager_updates_agree(capsys):
    args = sdc.Args(hidden_layers=1, num_samples=4)
    agents, nets = [sdc_agent(args, torch.float32) for _ in range(2)], models(torch.float32)
    step = sdc.compiled(lambda *x: sdc.update(agents[0], *nets, *x, args=args), args, torch.device("cpu"))
    for seed in range(2):
        inputs = as_rows(random_batch(torch.float32, seed)), *random_noise(torch.float32, seed)
        inputs += method_noise(seed, torch.float32)
        eager = sdc.update(agents[1], *nets, *inputs, args=args)
        torch.testing.assert_close(step(*inputs), eager, rtol=1e-4, atol=1e-4)
    assert capsys.readouterr().out == ""  # no word of going on eagerly
