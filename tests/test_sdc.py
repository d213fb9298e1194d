"""SDC's functions against independent float64 NumPy, known values of the MMD, cql.py, and models with known answers."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_combo import ACTION_DIM, BATCH, OBS_DIM, as_rows, numpy_actor, numpy_q, random_agent, random_batch
from test_osr import SMALL, STD, numpy_mlp, random_noise

import algos.cql as cql
import algos.sdc as sdc
from common.dataset import InputError, load_dataset
from common.dynamics import Dynamics

N = 3  # samples of either side


def randn(*shape: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def small_args(**settings) -> sdc.Args:
    return sdc.Args(**{**SMALL, "mmd_samples": N, **settings})


def models() -> tuple[sdc.TransitionModel, Dynamics]:
    torch.manual_seed(7)
    obs, _, _, next_obs, _ = random_batch()
    transition = sdc.TransitionModel(obs, next_obs, (8, 8)).double().requires_grad_(False)
    dynamics = Dynamics(OBS_DIM, ACTION_DIM, 4, 3, hidden_size=8).double().requires_grad_(False)
    dynamics.elites.copy_(torch.tensor([3, 0, 2]))
    for layer in dynamics.layers:
        layer.weight.mul_(4)  # else actions hardly matter
    return transition, dynamics


def sdc_agent(args) -> sdc.Agent:
    agent = random_agent(sdc, args)
    agent.obs_std.copy_(torch.tensor(STD))
    agent.obs_scale.copy_(torch.tensor([0.7, 2.0, 2.5]))
    agent.bandwidth.fill_(1.3)
    agent.mmd_0.fill_(0.4)
    return agent


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
    loss = sdc.transition_loss(transition, torch.cat([obs, next_obs], dim=1), noise, 0.3)
    assert loss.item() == pytest.approx(error + 0.3 * prior, rel=1e-9)
    np.testing.assert_allclose(transition.sample(obs, noise), numpy_sample(transition, obs.numpy(), noise.numpy()))
    np.testing.assert_allclose(standardised.std(0, ddof=1), 1)


def fitted(data, latent_coef: float) -> sdc.TransitionModel:
    args = sdc.Args(transition_updates=1_500, transition_lr=3e-3, latent_coef=latent_coef, hidden_sizes=(32, 32))
    return sdc.transition_model(data, args, lambda function: function)


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
    yield data, fitted(data, latent_coef=0.05)
    patch.undo()


def test_the_transition_model_has_the_mean_and_the_spread_of_the_data(linear):
    _, transition = linear
    for s in (-1.0, 0.0, 1.0):
        sample = transition.sample(torch.full((4_000, 1), s), randn(4_000, 2, dtype=torch.float32))
        assert sample.mean().item() == pytest.approx(0.9 * s, abs=0.02)
        assert sample.std().item() == pytest.approx(0.09 / math.sqrt(3), rel=0.35)


def test_without_the_latent_variables_kl_the_transition_model_rebuilds_what_it_has_seen(linear):
    data, _ = linear
    transition, rows = fitted(data, latent_coef=0.0), torch.cat([data.obs, data.next_obs], dim=1)
    noise = torch.randn(len(data.obs), transition.latent_dim, generator=torch.Generator().manual_seed(0))
    assert sdc.transition_loss(transition, rows, noise, 0.0).item() < 2e-3  # of a variance of 1


class Exact:
    """The linear system as an ensemble."""

    def __init__(self, data):
        box = [torch.as_tensor(x, dtype=torch.float32) for x in (data.action_low, data.action_high)]
        self.centre, self.half = (box[1] + box[0]) / 2, (box[1] - box[0]) / 2

    def step(self, obs, action, order, noise):
        return 0.9 * obs + 0.1 * (self.centre + self.half * action), noise[:, -1], None


def as_the_log_does(agent, action, obs_std) -> SimpleNamespace:
    """An agent whose actions (n, batch, action_dim) are given."""
    scales = {name: getattr(agent, name) for name in ("obs_scale", "bandwidth", "mmd_0")}
    return SimpleNamespace(actor=lambda obs, noise: (action, None), obs_std=obs_std, **scales)


def test_calibration_takes_width_and_mmd_0_from_u_and_the_log_s_own_actions_meet_the_bound(linear, capsys):
    data, transition = linear
    args = sdc.Args(mmd_samples=10, hidden_sizes=(8, 8))
    agent = sdc.Agent(1, 1, args)
    sdc.calibrate(agent, transition, data, args)
    assert "constraint  MMD <=" in (out := capsys.readouterr().out)
    assert 0.8 < float(out.split("samples of U lie ")[1].split()[0]) < 1.1
    assert agent.obs_scale.item() == pytest.approx(data.obs.std().item(), rel=1e-4)
    # the same draws, by the seed
    generator = torch.Generator().manual_seed(0)
    at = torch.randint(4_000, (1_000,), generator=generator)
    latents = [torch.randn(10, 1_000, 2, generator=generator) for _ in range(2)]
    x, y = (transition.sample(data.obs[at].expand(10, -1, -1), z).numpy() / agent.obs_scale.item() for z in latents)
    width = np.median(np.abs(x[0] - data.next_obs[at].numpy() / agent.obs_scale.item()))
    assert agent.bandwidth.item() == pytest.approx(width, rel=2e-3)
    mmd_0 = np.mean([numpy_mmd(x[:, i], y[:, i], agent.bandwidth.item()) for i in range(1_000)])
    assert agent.mmd_0.item() == pytest.approx(mmd_0, rel=1e-3)

    def constraint(shift: float) -> float:
        obs, action = data.obs[:500], data.action[torch.randint(len(data.action), (10, 500))]
        moved = as_the_log_does(agent, action, torch.ones(1))
        noise = {"obs": torch.ones(500, 1), "perturbed_action": None, "latent": torch.randn(10, 500, 2)}
        noise |= {"order": torch.randperm(5_000), "model": torch.zeros(5_000, 2)}
        return sdc.constraint(moved, transition, Exact(data), obs, noise, replace(args, noise_scale=shift)).item()

    torch.manual_seed(0)
    assert constraint(0.0) < 0 < constraint(0.1) < constraint(0.4)
    sdc.calibrate(agent, transition, data, sdc.Args(bandwidth=0.1))
    assert agent.bandwidth.item() == pytest.approx(0.1)


def test_calibration_shows_a_transition_model_whose_latent_variable_is_not_used(linear, capsys):
    data, _ = linear
    sdc.calibrate(sdc.Agent(1, 1, small_args()), SimpleNamespace(
        obs_std=data.obs.std(dim=0), latent_dim=2, sample=lambda obs, noise: 0.9 * obs + 1e-3 * noise[..., :1]
    ), data, sdc.Args())  # fmt: skip
    assert float(capsys.readouterr().out.split("samples of U lie ")[1].split()[0]) < 0.1


def test_a_constant_dimension_is_not_perturbed_and_is_measured_in_units_of_its_own(linear):
    data, _ = linear
    data = replace(data, obs=F.pad(data.obs, (0, 1), value=5.0), next_obs=F.pad(data.next_obs, (0, 1), value=5.0))
    agent, transition = sdc.Agent(2, 1, small_args()), sdc.TransitionModel(data.obs, data.next_obs, (8, 8))
    sdc.calibrate(agent, transition, data, sdc.Args())
    assert agent.obs_scale[1] == 1
    perturbed = sdc.perturb(data.obs, data.obs.std(dim=0), torch.randn_like(data.obs), 1.0)
    assert (perturbed[:, 1] == 5).all() and (perturbed[:, 0] != data.obs[:, 0]).all()


def test_a_policy_that_does_as_the_log_does_has_no_deviation_where_all_is_determined_and_more_the_further_off_it_is():
    def usual(obs, noise):
        return 0.9 * obs + 0.02

    def step(obs, action, order, noise):
        return 0.9 * obs + 0.1 * action, noise, None

    agent, action = sdc.Agent(1, 1, small_args()), torch.full((N, 50, 1), 0.2)
    agent.mmd_0.fill_(0.0)
    agent = as_the_log_does(agent, action, torch.ones(1))
    still = SimpleNamespace(sample=usual), SimpleNamespace(step=step)
    noise = {"obs": randn(50, 1, seed=1).float(), "perturbed_action": None, "latent": torch.zeros(N, 50, 2)}
    noise |= {"order": None, "model": None}
    distances = [
        sdc.constraint(agent, *still, randn(50, 1).float(), noise, small_args(noise_scale=beta, eta=0.0)).item()
        for beta in (0.0, 0.1, 0.3, 1.0)
    ]
    assert distances[0] == pytest.approx(1e-3, rel=0.05)
    assert distances == sorted(distances) and distances[1] > 0.05


@pytest.mark.parametrize("bandwidth", [1e-4, 100.0])
def test_a_kernel_that_says_nothing_is_refused(bandwidth, linear):
    data, transition = linear
    with pytest.raises(InputError, match="--bandwidth"):
        sdc.calibrate(sdc.Agent(1, 1, small_args()), transition, data, sdc.Args(bandwidth=bandwidth))


# --- Update ---
@pytest.mark.parametrize("normalise_q", [False, True])
def test_actor_loss_and_mmd_are_those_of_numpy(normalise_q):
    args = small_args(noise_scale=0.2, multiplier=0.7, critic_lr=1e-12, normalise_q=normalise_q, eta=0.1)
    agent, (transition, dynamics), batch, noise = sdc_agent(args), models(), random_batch(), random_noise(sdc, args)
    draws = {name: value.numpy() for name, value in noise.items()}
    scale, obs = np.array([0.7, 2.0, 2.5]), batch[0].numpy()
    action, log_prob = numpy_actor(agent.actor, obs, draws["action"])  # at the logged state
    q = np.minimum(*(numpy_q(agent.critic, j, obs, action) for j in (0, 1)))
    perturbed = obs + 0.2 * np.array(STD) * draws["obs"]
    chosen = np.concatenate([numpy_actor(agent.actor, perturbed, x)[0] for x in draws["perturbed_action"]])
    there = torch.as_tensor(np.tile(perturbed, (N, 1)))
    reached, _, _ = dynamics.step(there, torch.as_tensor(chosen), noise["order"], noise["model"])
    y = reached.numpy().reshape(N, BATCH, OBS_DIM) / scale
    x = np.stack([numpy_sample(transition, obs, z) for z in draws["latent"]]) / scale
    distance = np.mean([numpy_mmd(x[:, i], y[:, i], 1.3) for i in range(BATCH)])
    info = sdc.update(agent, transition, dynamics, as_rows(batch), noise, args)
    assert info["constraint"].item() == pytest.approx(distance - 0.4 - 0.1, rel=1e-6)
    sac = (log_prob - q).mean() / (np.abs(q).mean() if normalise_q else 1)
    assert info["actor_loss"].item() == pytest.approx(sac + 0.7 * (distance - 0.4 - 0.1), rel=1e-6)


def test_the_constraint_pulls_at_the_policy_through_the_ensemble():
    args = small_args()
    agent, nets, noise = sdc_agent(args), models(), random_noise(sdc, args)
    value = sdc.constraint(agent, *nets, random_batch()[0], noise, args)
    grads = torch.autograd.grad(value, list(agent.actor.parameters()))
    assert max(g.abs().max() for g in grads) > 1e-4


@pytest.mark.parametrize("mmd_0, eta, sign", [(0.0, 0.0, 1), (0.0, 5.0, -1), (5.0, 0.0, -1)])
def test_the_multiplier_grows_above_the_bound_and_shrinks_below(mmd_0, eta, sign):
    args = small_args(multiplier_lr=0.1, eta=eta)
    agent, nets, noise = sdc_agent(args), models(), random_noise(sdc, args)
    agent.mmd_0.fill_(mmd_0)
    for _ in range(2):
        info = sdc.update(agent, *nets, as_rows(random_batch()), noise, args)
    assert sign * agent.log_kappa.item() == pytest.approx(0.2, rel=0.01)
    assert info["kappa"].item() == pytest.approx(math.exp(sign * 0.1), rel=0.01)  # before its second step
    with torch.no_grad():
        agent.log_kappa.fill_(sign * 50.0)
    sdc.update(agent, *nets, as_rows(random_batch()), noise, args)
    assert agent.log_kappa.item() == (10 if sign > 0 else -5)


@pytest.mark.parametrize("conservative_coef", [5.0, 0.0])
def test_with_a_multiplier_of_zero_it_is_cql_and_without_its_term_sac(conservative_coef):
    args = small_args(multiplier=0.0, conservative_coef=conservative_coef)
    plain_args = cql.Args(**SMALL, conservative_coef=conservative_coef)
    agent, nets, plain = sdc_agent(args), models(), cql.Agent(OBS_DIM, ACTION_DIM, plain_args).double()
    own = {"log_kappa", "kappa_opt"}  # of CQL's Lagrange form there, of the constraint here
    shared = {key: value for key, value in agent.state_dict().items() if key.split(".")[0] not in own}
    plain.load_state_dict(shared, strict=False)
    for seed in range(3):
        rows, noise = as_rows(random_batch(seed=seed)), random_noise(sdc, args, seed)
        sdc.update(agent, *nets, rows, noise, args)
        cql.update(plain, rows, noise, plain_args)
    for name in ("actor", "critic", "target_critic"):
        for one, other in zip(getattr(agent, name).parameters(), getattr(plain, name).parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)
    assert agent.log_kappa.item() == 0
