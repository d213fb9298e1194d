"""OSR's functions against independent float64 NumPy, cql.py and sac_bc.py, and an inverse model with a known answer."""

import numpy as np
import pytest
import torch
from test_combo import ACTION_DIM, BATCH, OBS_DIM, as_rows, numpy_actor, numpy_q, random_agent, random_batch
from torch.distributions import Normal

import algos.cql as cql
import algos.osr as osr
import algos.sac_bc as sac_bc
from common.dataset import load_dataset

LATENT, STD = 4, [0.5, 2.0, 3.0]
SMALL = {"hidden_sizes": (8, 8), "num_samples": 4, "batch_size": BATCH}


# --- Helpers, for test_osr_v.py and test_sdc.py too ---
def random_noise(algo, args, seed: int = 2, dtype=torch.float64) -> dict[str, torch.Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        noise = algo.draw_noise(OBS_DIM, ACTION_DIM, args, torch.device("cpu"))
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in noise.items()}


def numpy_mlp(x: np.ndarray, net) -> np.ndarray:
    p = [p.detach().numpy() for p in net.parameters()]
    for weight, bias in zip(p[:-2:2], p[1:-2:2]):
        x = np.maximum(x @ weight.T + bias, 0)
    return x @ p[-2].T + p[-1]


def numpy_gaussian(actor, obs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    out = numpy_mlp(obs, actor.net)
    return out[:, :ACTION_DIM], np.exp(np.clip(out[:, ACTION_DIM:], -5, 2))


def random_inverse() -> osr.InverseModel:
    torch.manual_seed(7)
    obs, _, _, next_obs, _ = random_batch()
    return osr.InverseModel(obs, next_obs, ACTION_DIM, LATENT, (8, 8)).double().requires_grad_(False)


def numpy_inverse(inverse, obs: np.ndarray, next_obs: np.ndarray, noise: np.ndarray):
    scale = {name: buffer.numpy() for name, buffer in inverse.named_buffers()}
    x = np.concatenate([(obs - scale["obs_mean"]) / scale["obs_std"],
                        (next_obs - obs - scale["delta_mean"]) / scale["delta_std"]], axis=1)  # fmt: skip
    out = numpy_mlp(x, inverse.encoder)
    m, e = out[:, :LATENT], np.exp(np.clip(out[:, LATENT:], -5, 2))
    out = numpy_mlp(np.concatenate([x, m + e * noise], axis=1), inverse.decoder)
    return out[:, :ACTION_DIM], np.exp(np.clip(out[:, ACTION_DIM:] - 1, -5, 2)), m, e


def small_args(**settings) -> osr.Args:
    return osr.Args(**{**SMALL, "latent_dim": LATENT, **settings})


def osr_agent(args) -> osr.Agent:
    agent = random_agent(osr, args)
    agent.obs_std.copy_(torch.tensor(STD))
    return agent


# --- The inverse model ---
def test_scales_are_those_of_the_data_and_the_model_is_that_of_numpy():
    inverse, (obs, _, _, next_obs, _) = random_inverse(), random_batch()
    noise = random_noise(osr, small_args())["latent"]
    x, delta = obs.numpy(), (next_obs - obs).numpy()
    np.testing.assert_allclose(inverse.obs_mean, x.mean(0), rtol=1e-6)
    np.testing.assert_allclose(inverse.delta_std, delta.std(0, ddof=1), rtol=1e-6)
    expected = numpy_inverse(inverse, x, next_obs.numpy(), noise.numpy())
    mean, log_std, latent_mean, latent_log_std = inverse(obs, next_obs, noise)
    for one, other in zip((mean, log_std.exp(), latent_mean, latent_log_std.exp()), expected, strict=True):
        np.testing.assert_allclose(one, other)


def test_inverse_loss_is_that_of_numpy():
    inverse, (obs, action, _, next_obs, _) = random_inverse(), random_batch()
    noise = random_noise(osr, small_args())["latent"]
    mean, std, m, e = numpy_inverse(inverse, obs.numpy(), next_obs.numpy(), noise.numpy())
    density = Normal(torch.as_tensor(mean), torch.as_tensor(std)).log_prob(action.clamp(-0.999, 0.999).atanh())
    error = -density.mean().item() - 0.5 * np.log(2 * np.pi)
    prior = (-0.5 * (1 + np.log(e**2) - m**2 - e**2)).mean()  # as the released code writes it
    loss = osr.inverse_loss(inverse, torch.cat([obs, next_obs, action], dim=1), noise, 0.5)
    assert loss.item() == pytest.approx(error + 0.5 * prior, rel=1e-9)


def test_the_deviation_has_a_head_of_its_own():
    inverse, (obs, _, _, next_obs, _) = random_inverse(), random_batch()
    noise = random_noise(osr, small_args())["latent"]
    mean, log_std, *_ = inverse(obs, next_obs, noise)
    with torch.no_grad():
        inverse.decoder[-1].weight[ACTION_DIM:].add_(0.3)
    new_mean, new_log_std, *_ = inverse(obs, next_obs, noise)
    assert torch.equal(mean, new_mean) and not torch.equal(log_std, new_log_std)


@pytest.fixture(scope="module")
def linear_inverse(tmp_path_factory):
    """Of s' = s + 0.1 a: fitted on uniform actions."""
    folder = tmp_path_factory.mktemp("linear")
    patch, rng = pytest.MonkeyPatch(), np.random.default_rng(0)
    patch.setenv("OFFLINE_MBRL_CACHE", str(folder / "cache"))
    obs, action = rng.normal(size=(4_000, 1)), rng.uniform(-0.9, 0.9, (4_000, 1))
    arrays = {"observations": obs, "actions": action, "rewards": obs[:, 0], "next_observations": obs + 0.1 * action}
    np.savez(folder / "own.npz", **arrays, terminals=np.zeros(4_000), timeouts=np.ones(4_000))
    data = load_dataset(str(folder / "own.npz"))
    args = osr.Args(latent_dim=LATENT, hidden_sizes=(32, 32), inverse_updates=2_500, inverse_lr=3e-3)
    yield osr.inverse_model(data, args, lambda function: function), data
    patch.undo()


def answer(inverse, obs, next_obs) -> torch.Tensor:
    return torch.tanh(inverse(obs, next_obs, torch.zeros(len(obs), LATENT))[0])


def test_the_inverse_model_finds_the_logged_action(linear_inverse):
    inverse, data = linear_inverse
    assert (answer(inverse, data.obs, data.next_obs) - data.action).abs().mean() < 0.03
    assert not any(p.requires_grad for p in inverse.parameters())


def test_at_a_perturbed_state_it_answers_with_the_action_that_leads_back(linear_inverse):
    inverse, data = linear_inverse
    few = data.action[:, 0].abs() < 0.4
    obs, next_obs, action = data.obs[few], data.next_obs[few], data.action[few]
    half = (torch.as_tensor(data.action_high) - torch.as_tensor(data.action_low)) / 2
    for shift in (-0.03, 0.03):
        change = (answer(inverse, obs + shift, next_obs) - action).mean() * half
        assert change.item() == pytest.approx(-shift / 0.1, rel=0.1)


# --- Perturbation and divergence ---
def test_perturbation_is_in_units_of_the_datas_deviation():
    obs, std = torch.zeros(100_000, OBS_DIM), torch.tensor(STD)
    noise = torch.randn(obs.shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(osr.perturb(obs, std, noise, 0.1).std(0), 0.1 * std, rtol=0.02, atol=0)
    assert torch.equal(osr.perturb(obs + 3, std, noise, 0.0), obs + 3)


def constraint(agent, law, batch, **settings) -> torch.Tensor:
    """At the logged states, of wanted actions whose mean and log_std are `law`."""
    args = small_args(noise_scale=0.0, min_std=0.0, **settings)
    noise = {"obs": torch.zeros_like(batch[0]), "latent": None}
    return osr.constraint(agent, lambda obs, next_obs, noise: (*law, None, None), batch, noise, args)


def test_the_forward_direction_is_behaviour_cloning_of_the_wanted_actions():
    """The gradient of KL(I || pi) is that of - log pi at actions drawn from I."""
    agent, batch = osr_agent(small_args()), [x[:1] for x in random_batch()]
    law = torch.tensor([[0.3, -0.2]], dtype=torch.float64), torch.tensor([[-0.5, 0.1]], dtype=torch.float64)
    params = list(agent.actor.net[-1].parameters())
    grads = torch.autograd.grad(constraint(agent, law, batch, kl="forward"), params)
    noise = torch.randn(400_000, ACTION_DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mean, log_std = agent.actor.net(batch[0]).chunk(2, dim=-1)
    sampled = -Normal(mean, log_std.exp()).log_prob(law[0] + law[1].exp() * noise).mean()
    for one, other in zip(grads, torch.autograd.grad(sampled, params), strict=True):
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.02 * other.abs().max().item())


def test_the_divergence_from_single_actions_bounds_that_from_their_mixture():
    """E KL(pi || I(.|s,s')) >= KL(pi || E I(.|s,s')), convexity; the same where I does not depend on s'."""
    agent, batch = osr_agent(small_args()), [x[:1].repeat_interleave(2, dim=0) for x in random_batch()]
    (mean, log_std), x = osr.gaussian(agent.actor, batch[0]), torch.linspace(-12, 12, 4_001).double()[:, None]
    found = {}
    for apart in (0.0, 0.8):
        law = torch.tensor([[-apart], [apart]]).double().expand(2, ACTION_DIM), torch.full_like(mean, -0.5)
        mixture = Normal(law[0], law[1].exp()).log_prob(x[:, None]).exp().mean(dim=1)  # (4001, action_dim)
        policy = Normal(mean[0], log_std[0].exp()).log_prob(x)
        bound = torch.trapezoid(policy.exp() * (policy - mixture.log()), x, dim=0).mean()
        found[apart] = constraint(agent, law, batch).item(), bound.item()
    assert found[0.0][0] == pytest.approx(found[0.0][1], rel=1e-6)
    assert found[0.8][0] > found[0.8][1] + 0.1


# --- Update ---
@pytest.mark.parametrize("target", ["inverse", "behaviour"])
@pytest.mark.parametrize(
    "kl, normalise_q, min_std", [("reverse", False, 0.0), ("forward", False, 0.35), ("reverse", True, 0.35)]
)
def test_actor_loss_is_that_of_numpy(target, kl, normalise_q, min_std):
    settings = {"target": target, "kl": kl, "normalise_q": normalise_q, "min_std": min_std}
    args = small_args(noise_scale=0.2, recovery_coef=0.7, critic_lr=1e-12, **settings)
    agent, batch, noise = osr_agent(args), random_batch(), random_noise(osr, args)
    prior = random_inverse() if target == "inverse" else osr.Actor(OBS_DIM, ACTION_DIM, (8, 8)).double()
    head = (prior.decoder if target == "inverse" else prior.net)[-1]
    with torch.no_grad():  # wanted deviations on both sides of min_std
        head.weight.mul_(5)
        head.bias[ACTION_DIM:] = 0.0 if target == "inverse" else -1.0
    obs, next_obs = batch[0].numpy(), batch[3].numpy()
    action, log_prob = numpy_actor(agent.actor, obs, noise["action"].numpy())  # at the logged state
    q = np.minimum(*(numpy_q(agent.critic, j, obs, action) for j in (0, 1)))
    perturbed = obs + 0.2 * np.array(STD) * noise["obs"].numpy()
    one = numpy_gaussian(agent.actor, perturbed)
    if target == "inverse":
        mean, std, *_ = numpy_inverse(prior, perturbed, next_obs, noise["latent"].numpy())
    else:
        mean, std = numpy_gaussian(prior, perturbed)
    assert std.min() < 0.35 < std.max()
    other = mean, np.maximum(std, min_std)
    (m1, s1), (m2, s2) = (one, other) if kl == "reverse" else (other, one)
    divergence = (np.log(s2 / s1) + (s1**2 + (m1 - m2) ** 2) / (2 * s2**2) - 1 / 2).mean()
    info = osr.update(agent, prior, as_rows(batch), noise, args)
    assert info["constraint"].item() == pytest.approx(divergence, rel=1e-6)
    sac = (log_prob - q).mean() / (np.abs(q).mean() if normalise_q else 1)
    assert info["actor_loss"].item() == pytest.approx(sac + 0.7 * divergence, rel=1e-6, abs=1e-8)


def test_an_end_whose_successor_is_not_known_asks_for_no_recovery():
    """Where a file has no successors next_obs is obs there."""
    args, agents, batch = small_args(conservative_coef=0), [], random_batch()
    noise, end = random_noise(osr, args), batch[4] == 1
    assert 2 < end.sum() < BATCH - 2
    batch[3][end] = batch[0][end]
    for answer_there in (0.0, 5.0):

        def prior(obs, next_obs, noise):
            mean = torch.where(end[:, None], answer_there, 0.3).expand(-1, ACTION_DIM).double()
            return mean, mean - 1, noise, noise

        agents.append(osr_agent(args))
        info = osr.update(agents[-1], prior, as_rows(batch), noise, args)
    for one, other in zip(*(agent.actor.parameters() for agent in agents), strict=True):
        assert torch.equal(one, other)
    policy = osr.gaussian(osr_agent(args).actor, batch[0] + 1e-3 * torch.tensor(STD) * noise["obs"])
    law = torch.full((BATCH, ACTION_DIM), 0.3).double(), torch.full((BATCH, ACTION_DIM), -0.7).double()
    assert info["constraint"].item() == pytest.approx(osr.gaussian_kl(*policy, *law)[~end].mean().item())
    batch[3][end] += 1e-3  # a logged successor, even of an end, counts
    moved = osr_agent(args)
    osr.update(moved, prior, as_rows(batch), noise, args)
    assert not torch.equal(moved.actor.net[0].weight, agents[-1].actor.net[0].weight)


@pytest.mark.parametrize("conservative_coef", [5.0, 0.0])
def test_without_the_divergence_it_is_cql_and_without_both_terms_sac(conservative_coef):
    args = small_args(recovery_coef=0, conservative_coef=conservative_coef)
    agent, prior = osr_agent(args), random_inverse()
    if conservative_coef:
        plain_args = cql.Args(**SMALL, conservative_coef=conservative_coef)
        plain = cql.Agent(OBS_DIM, ACTION_DIM, plain_args).double()
    else:
        plain_args = sac_bc.Args(hidden_sizes=(8, 8), batch_size=BATCH, bc_coef=0, normalise_q=False)
        plain = sac_bc.Agent(OBS_DIM, ACTION_DIM, plain_args).double()
    plain.load_state_dict(agent.state_dict(), strict=False)
    for seed in range(3):
        rows, noise = as_rows(random_batch(seed=seed)), random_noise(osr, args, seed)
        osr.update(agent, prior, rows, noise, args)
        if conservative_coef:
            cql.update(plain, rows, noise, plain_args)
        else:
            sac_bc.update(plain, plain.actor, rows, noise, plain_args)
    for name in ("actor", "critic", "target_critic"):
        for one, other in zip(getattr(agent, name).parameters(), getattr(plain, name).parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)
