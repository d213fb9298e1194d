"""SDM-GAN's functions against independent float64 NumPy, known values of a GAN, and a plain learner that drops rows."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_mopo import ACTION_DIM, BATCH, OBS_DIM, as_rows, assert_same, random_batch, snapshot
from torch import nn

import algos.sdm_gan as sdm_gan
from common import machine
from common.dynamics import Dynamics

K, TERMINAL = 3, 2 * OBS_DIM + ACTION_DIM + 1


# --- Helpers ---
def randn(*shape: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def random_agent(args: sdm_gan.Args, dtype=torch.float64) -> sdm_gan.Agent:
    """After the warm start, with targets that differ from what they follow."""
    torch.manual_seed(0)
    agent = sdm_gan.Agent(OBS_DIM, ACTION_DIM, args).to(dtype)
    with torch.no_grad():
        for p in [*agent.target_critic.parameters(), *agent.target_actor.parameters()]:
            p.add_(0.03 * torch.randn_like(p))
        agent.critic.net[-1].weight.mul_(30)
    agent.warm.fill_(False)
    return agent


def random_dynamics(dtype=torch.float64) -> Dynamics:
    torch.manual_seed(7)
    dynamics = Dynamics(OBS_DIM, ACTION_DIM, 4, 3, hidden_size=8).to(dtype).requires_grad_(False)
    for layer in dynamics.layers:
        layer.weight.mul_(4)  # else actions hardly matter
    return dynamics


def falls(obs, action, next_obs):
    return next_obs[:, 0] > 0.5


def tiny_args(**settings) -> sdm_gan.Args:
    small = {"hidden_sizes": (8, 8), "batch_size": BATCH, "num_bootstrap": K, "noise_dim": 2}
    return sdm_gan.Args(**{**small, "noise_scale": 0.04, **settings})


def inputs(seed: int, args: sdm_gan.Args, dtype=torch.float64):
    """Of `update`: rows and noise."""
    sizes = {"critic": BATCH, "states": BATCH, "logged": 2 * BATCH}
    rows = {name: as_rows(random_batch(dtype, 10 * seed + i, sizes[name])) for i, name in enumerate(sizes)}
    torch.manual_seed(seed)
    noise = sdm_gan.draw_noise(OBS_DIM, args.noise_dim, args, torch.device("cpu"))
    return rows, {name: x.to(dtype) if x.is_floating_point() else x for name, x in noise.items()}


def update(agent, args, rows, noise, improve: bool = True, dynamics=None):
    return sdm_gan.update(agent, (dynamics or random_dynamics(), falls), rows, noise, improve, args)


def numpy_net(net: nn.Module, x: np.ndarray, which: int | None = None) -> np.ndarray:
    """which: of two networks side by side."""
    w = [p.detach().numpy() for p in net.parameters()]
    w = [p.T if p.ndim == 2 else p for p in w] if which is None else [p[which] for p in w]
    for weight, bias in zip(w[:-2:2], w[1:-2:2]):
        x = x @ weight + bias
        x = np.where(x > 0, x, 0.01 * x)
    return x @ w[-2] + w[-1]


def numpy_q(critic, obs: np.ndarray, action: np.ndarray) -> np.ndarray:
    return np.stack([numpy_net(critic, np.concatenate([obs, action], 1), j)[:, 0] for j in (0, 1)])


# --- The policy ---
def test_the_policy_is_a_network_of_state_and_clipped_noise_and_acts_with_noise_0():
    actor, obs, noise = random_agent(tiny_args()).actor, randn(BATCH, OBS_DIM), 2 * randn(BATCH, 2, seed=1)
    assert noise.abs().max() > 3
    expected = numpy_net(actor, np.concatenate([obs, noise.clamp(-3, 3)], 1))
    np.testing.assert_allclose(actor(obs, noise).detach().numpy(), expected)
    expected = np.tanh(numpy_net(actor, np.concatenate([obs, np.zeros((BATCH, 2))], 1)))
    np.testing.assert_allclose(actor.act(obs).detach().numpy(), expected)


@pytest.mark.parametrize("obs_dim, noise_dim", [(1, 1), (3, 1), (11, 5), (17, 8), (40, 10)])
def test_by_default_the_noise_has_half_the_states_dimensions_between_1_and_10(obs_dim, noise_dim):
    assert sdm_gan.Actor(obs_dim, 2, (8,), None).noise_dim == noise_dim
    assert sdm_gan.Actor(obs_dim, 2, (8,), 50).noise_dim == 50


def test_the_best_candidate_has_the_highest_q1():
    agent, obs, noise = random_agent(tiny_args()), randn(5, OBS_DIM), randn(10, 2, seed=1)
    policy = sdm_gan.BestOfCandidates(OBS_DIM, ACTION_DIM, (8, 8), 2, 10)
    policy.critic, policy.actor, policy.noise = agent.critic, agent.actor, noise
    action = policy.act(obs).detach().numpy()
    for i in range(5):
        state = np.tile(obs[i].numpy(), (10, 1))
        candidates = np.tanh(numpy_net(agent.actor, np.concatenate([state, noise.clamp(-3, 3)], 1)))
        np.testing.assert_allclose(action[i], candidates[numpy_q(agent.critic, state, candidates)[0].argmax()])


def test_actions_before_their_tanh_come_back_and_are_finite_at_the_bounds():
    x = torch.linspace(-4, 4, 1_001)
    torch.testing.assert_close(sdm_gan.pre_tanh(torch.tanh(x)), x, rtol=0, atol=1e-3)
    bounds = sdm_gan.pre_tanh(torch.tensor([-1.0, 1.0]))
    assert bounds.isfinite().all() and 7.5 < bounds[1] == -bounds[0]


# --- The critic's target ---
def numpy_target(agent, batch, noise: dict, args) -> np.ndarray:
    _, _, reward, next_obs, terminal = (x.numpy() for x in batch)
    q = np.zeros(BATCH)
    for k in range(K):
        shift = 0 if k == K - 1 else np.clip(args.noise_scale * noise["next_obs"][k].numpy(), -0.05, 0.05)
        near = next_obs + shift
        x = np.concatenate([near, np.clip(noise["next_action"][k].numpy(), -3, 3)], 1)
        q_k = numpy_q(agent.target_critic, near, np.tanh(numpy_net(agent.target_actor, x)))
        q += (0.75 * q_k.min(0) + 0.25 * q_k.max(0)) / K
    q = np.where(np.abs(q) < 2_000, q, 0)
    return np.clip(reward, *agent.reward_range.numpy()) + args.gamma * (1 - terminal) * q


@pytest.mark.parametrize("size", [1.0, 3e3])  # the second reaches the linear part of the loss, and zeroed targets
def test_critic_loss_is_that_of_numpy(size):
    args = tiny_args()
    agent, batch, (_, noise) = random_agent(args), random_batch(), inputs(0, args)
    agent.reward_range.copy_(torch.tensor([-6.0, 4.0]))
    with torch.no_grad():
        for critic in (agent.critic, agent.target_critic):
            critic.net[-1].weight.mul_(size)
            critic.net[-1].bias.mul_(size)
    assert (batch[2] > 4).any() and (batch[2] < -6).any() and (0.04 * noise["next_obs"]).abs().max() > 0.05
    target = numpy_target(agent, batch, noise, args)
    error = np.abs(numpy_q(agent.critic, batch[0].numpy(), batch[1].numpy()) - target)
    assert (size == 1) == (error.max() < 500)
    huber = np.where(error < 500, 0.5 * error**2, 500 * (error - 250))
    loss, _ = sdm_gan.critic_loss(agent, batch, noise, args)
    assert loss.item() == pytest.approx(huber.mean(1).sum(), rel=1e-9)


class Constant(nn.Module):
    """Twin Q of two given values."""

    def __init__(self, *values: float):
        super().__init__()
        self.values = torch.tensor(values, dtype=torch.float64)

    def forward(self, obs, action):
        return self.values[:, None].expand(2, len(obs))


@pytest.mark.parametrize(
    "values, expected",
    [((8.0, 4.0), 5.0), ((1999.9, 1999.9), 1999.9), ((2000.0, 2000.0), 0.0), ((-2100.0, -2100.0), 0.0)],
)
def test_the_target_leans_to_the_smaller_q_and_is_0_from_2000_on(values, expected):
    args = tiny_args()
    agent = SimpleNamespace(target_critic=Constant(*values), target_actor=random_agent(args).actor)
    q = sdm_gan.bootstrapped_value(agent, randn(BATCH, OBS_DIM), inputs(0, args)[1], args)
    torch.testing.assert_close(q, torch.full((BATCH,), expected, dtype=torch.float64))


def test_rewards_are_clipped_only_three_deviations_beyond_those_of_the_data():
    reward = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    std = math.sqrt(5 / 3)
    expected = torch.tensor([-3 * std, 3 + 3 * std], dtype=torch.float64)
    torch.testing.assert_close(sdm_gan.reward_range(reward), expected)


# --- The discriminator ---
def discriminator_loss(discriminator, real, fake, weight, uniform, **settings) -> torch.Tensor:
    agent, noise = SimpleNamespace(discriminator=discriminator), {"uniform": uniform}
    return sdm_gan.discriminator_loss(agent, real, fake, weight, noise, tiny_args(**settings))[0]


def test_losses_have_a_gans_known_values_where_both_sides_have_one_law():
    uniform = torch.rand(100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    one, pairs = torch.ones_like(uniform), torch.zeros(100_000, 2).double()
    for u, d, loss_d, loss_g in ((uniform, 0.45, 0.688, 0.799), (one, 0.5, 0.693, 0.693)):  # labels of 1: a plain GAN
        logit = torch.tensor(math.log(d / (1 - d)), dtype=torch.float64, requires_grad=True)
        loss = discriminator_loss(lambda pairs: logit.expand(len(pairs)), pairs, pairs, one, u)
        assert loss.item() == pytest.approx(loss_d, abs=1e-3)
        assert torch.autograd.grad(loss, logit)[0].item() == pytest.approx(0, abs=1e-3)  # no other D is better
        assert sdm_gan.generator_loss(logit.expand(100_000), one, "js").item() == pytest.approx(loss_g, abs=1e-3)


def test_losses_are_those_of_numpy_over_the_rows_that_count():
    real, fake, uniform = randn(40, 1), randn(40, 1, seed=1), torch.rand(40).double()
    weight = (torch.arange(40) % 3 > 0).double()
    half_square = lambda pairs: 0.5 * pairs[:, 0].square() - 0.3  # noqa: E731
    x, z, u = (v.numpy()[weight.numpy() > 0] for v in (real[:, 0], fake[:, 0], uniform))
    t, f, y = 0.5 * x**2 - 0.3, 0.5 * z**2 - 0.3, 0.8 + 0.2 * u
    d_t, d_f = 1 / (1 + np.exp(-t)), 1 / (1 + np.exp(-f))
    js = 0.5 * (-y * np.log(d_t) - (1 - y) * np.log(1 - d_t)).mean() - 0.5 * np.log(1 - d_f).mean()
    assert discriminator_loss(half_square, real, fake, weight, uniform).item() == pytest.approx(js)
    assert sdm_gan.generator_loss(half_square(fake), weight, "js").item() == pytest.approx(-np.log(d_f).mean())
    slope = np.abs(u * x + (1 - u) * z)  # of x^2 / 2 between the pairs
    expected = f.mean() - t.mean() + 7 * ((slope - 1) ** 2).mean()
    loss = discriminator_loss(half_square, real, fake, weight, uniform, gan="wasserstein", penalty_weight=7.0)
    assert loss.item() == pytest.approx(expected)
    assert sdm_gan.generator_loss(half_square(fake), weight, "wasserstein").item() == pytest.approx(-f.mean())


def test_the_discriminators_accuracy_is_the_share_on_the_right_side_of_rows_that_count():
    real, fake = torch.tensor([[1.0], [-1.0], [2.0], [-3.0]]), torch.tensor([[-1.0], [-2.0], [-3.0], [5.0]])
    agent, weight = SimpleNamespace(discriminator=lambda pairs: pairs[:, 0]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    for gan in ("js", "wasserstein"):
        _, info = sdm_gan.discriminator_loss(agent, real, fake, weight, {"uniform": torch.rand(4)}, tiny_args(gan=gan))
        assert info["real_accuracy"].item() == pytest.approx(2 / 3) and info["fake_accuracy"].item() == 1


def test_gradient_penalty_is_0_for_a_slope_of_1_and_that_of_numpy_for_the_network():
    pairs, slope = randn(20, 5), torch.tensor([0.6, 0.0, 0.8, 0.0, 0.0], dtype=torch.float64)
    assert sdm_gan.gradient_penalty(lambda x: x @ slope, pairs).abs().max() < 1e-12
    torch.testing.assert_close(
        sdm_gan.gradient_penalty(lambda x: 3 * x @ slope, pairs), torch.full((20,), 4.0).double()
    )
    net = random_agent(tiny_args()).discriminator
    w1, b1, w2, b2, w3, _ = (p.detach().numpy() for p in net.parameters())
    h = pairs.numpy() @ w1.T + b1
    g1 = np.where(h > 0, 1, 0.01)
    g2 = np.where((h * g1) @ w2.T + b2 > 0, 1, 0.01)
    gradient = ((w3 * g2) @ w2 * g1) @ w1
    expected = (np.sqrt((gradient**2).sum(1)) - 1) ** 2
    penalty = sdm_gan.gradient_penalty(net, pairs)
    np.testing.assert_allclose(penalty.detach().numpy(), expected)
    assert all(grad.abs().max() > 0 for grad in torch.autograd.grad(penalty.sum(), list(net.parameters())[::2]))


def test_labels_of_logged_pairs_lie_between_0_8_and_1_and_are_drawn_anew():
    args, labels, pairs = tiny_args(batch_size=500), [], torch.zeros(1_000, 1)
    for seed in range(2):
        torch.manual_seed(seed)
        uniform = sdm_gan.draw_noise(OBS_DIM, 2, args, torch.device("cpu"))["uniform"]
        out = torch.zeros(1_000, requires_grad=True)  # D = 1/2, where the slope is (1/2 - y) / 2 over the rows
        outs = iter([out, torch.zeros(1_000)])
        loss = discriminator_loss(lambda pairs, outs=outs: next(outs), pairs, pairs, torch.ones(1_000), uniform)
        labels.append(0.5 - 2_000 * torch.autograd.grad(loss, out)[0])
    first, second = labels
    assert 0.8 <= first.min() + 1e-6 < 0.81 and 0.99 < first.max() < 1 + 1e-6 and not torch.equal(first, second)


# --- Pairs of the policy ---
def test_pairs_are_two_a_state_and_those_that_begin_after_an_end_do_not_count():
    args = tiny_args()
    agent, dynamics, obs = random_agent(args), random_dynamics(), randn(BATCH, OBS_DIM)
    alive, noise = (torch.arange(BATCH) % 4 > 0).double(), inputs(0, args)[1]
    rows = torch.cat([obs, randn(BATCH, TERMINAL - OBS_DIM, seed=1), 1 - alive[:, None]], dim=1)
    fake_obs, raw, weight = sdm_gan.policy_pairs(agent.actor, dynamics, falls, rows, noise, args)
    near = obs + (0.04 * noise["pair_obs"]).clamp(-0.05, 0.05)
    assert len(fake_obs) == len(raw) == len(weight) == 2 * BATCH
    torch.testing.assert_close(fake_obs[:BATCH], near)
    torch.testing.assert_close(raw[:BATCH], agent.actor(near, noise["pair_action"][0]))
    next_obs, _, _ = dynamics.step(near, torch.tanh(raw[:BATCH]), noise["order"], noise["model"])
    torch.testing.assert_close(fake_obs[BATCH:], next_obs)
    torch.testing.assert_close(raw[BATCH:], agent.actor(next_obs, noise["pair_action"][1]))
    fell = next_obs[:, 0] > 0.5
    assert 2 < fell.sum() < BATCH - 2
    assert weight.tolist() == [*alive.tolist(), *(alive * ~fell).tolist()]


# --- Update ---
@pytest.mark.parametrize("gan", ["js", "wasserstein"])
def test_updates_equal_those_of_a_plain_learner_that_drops_rows(gan):
    """Which also has gradients that never pass the model, and a policy's step that sees D before its own."""
    rates = {"actor_lr": 2e-3, "critic_lr": 1e-3, "discriminator_lr": 3e-3}
    args = tiny_args(gan=gan, gamma=0.95, tau=0.1, q_coef=3.0, **rates)
    agent, dynamics = random_agent(args), random_dynamics()
    agent.reward_range.copy_(torch.tensor([-6.0, 4.0]))
    plain, q_average = copy.deepcopy(agent), None
    adam = {
        "actor": torch.optim.Adam(plain.actor.parameters(), 2e-3, betas=(0.4, 0.999)),
        "critic": torch.optim.Adam(plain.critic.parameters(), 1e-3),
        "discriminator": torch.optim.Adam(plain.discriminator.parameters(), 3e-3, betas=(0.4, 0.999)),
    }

    def step(name: str, loss: torch.Tensor) -> None:
        plain.zero_grad()
        loss.backward()
        adam[name].step()

    for i in range(1, 7):
        warm, improve = i in (3, 4), i % 2 == 1  # the first one improves by Qbar's first value
        agent.warm.fill_(warm)
        rows, noise = inputs(i, args)
        info = update(agent, args, rows, noise, improve, dynamics)
        state_rows, logged, uniform = rows["states"], rows["logged"], noise["uniform"]
        obs, action, reward, next_obs, terminal = rows["critic"].split([OBS_DIM, ACTION_DIM, 1, OBS_DIM, 1], dim=1)
        batch = [obs, action, reward[:, 0], next_obs, terminal[:, 0]]
        # critic
        target = torch.tensor(numpy_target(plain, batch, noise, args))
        loss_q = sum(torch.nn.functional.mse_loss(q, target) / 2 for q in plain.critic(obs, action))
        if not warm:
            step("critic", loss_q)
        # pairs
        near = state_rows[:, :OBS_DIM] + (args.noise_scale * noise["pair_obs"]).clamp(-0.05, 0.05)
        raw = plain.actor(near, noise["pair_action"][0])
        after, _, _ = dynamics.step(near, torch.tanh(raw), noise["order"], noise["model"])
        keep = state_rows[:, TERMINAL] == 0
        keep_after, after = keep & (after[:, 0] <= 0.5), after.detach()
        here, there = torch.cat([near, raw], 1), torch.cat([after, plain.actor(after, noise["pair_action"][1])], 1)
        fake, kept = torch.cat([here[keep], there[keep_after]]), torch.cat([keep, keep_after])
        bounded = logged[kept, OBS_DIM : OBS_DIM + ACTION_DIM].clamp(-1 + 1e-7, 1 - 1e-7)
        unsquashed = 0.5 * torch.log((1 + bounded) / (1 - bounded))
        real = torch.cat([logged[kept, :OBS_DIM], unsquashed], 1)
        assert len(fake) == len(real) < 2 * BATCH
        # policy
        d = plain.discriminator
        loss_g = -torch.log(torch.sigmoid(d(fake))).mean() if gan == "js" else -d(fake).mean()
        q = plain.critic(obs, torch.tanh(plain.actor(obs, noise["action"]))).amin(0)
        q_average = q_average or q.abs().mean().item()
        assert info["q_average"].item() == pytest.approx(q_average)
        if improve:
            step("actor", loss_g if warm else loss_g - 3.0 / q_average * q.mean())
        q_average = 0.9 * q_average + 0.1 * q.abs().mean().item()
        # discriminator
        fake = fake.detach()
        if gan == "js":
            label = 0.8 + 0.2 * uniform[kept]
            p, p_fake = torch.sigmoid(d(real)), torch.sigmoid(d(fake))
            loss_d = -(label * p.log() + (1 - label) * (1 - p).log()).mean() / 2 - (1 - p_fake).log().mean() / 2
        else:
            z = (uniform[kept, None] * real + (1 - uniform[kept, None]) * fake).requires_grad_()
            slope = torch.autograd.grad(d(z).sum(), z, create_graph=True)[0].square().sum(1).sqrt()
            loss_d = d(fake).mean() - d(real).mean() + 10 * ((slope - 1) ** 2).mean()
        step("discriminator", loss_d)
        for name in ("critic", "actor"):
            for p, t in zip(getattr(plain, name).parameters(), getattr(plain, f"target_{name}").parameters()):
                t.data = 0.9 * t.data + 0.1 * p.data
        for name, value in (("critic_loss", loss_q), ("discriminator_loss", loss_d), ("generator_loss", loss_g)):
            assert info[name].item() == pytest.approx(value.item(), rel=1e-5)
        for name in ("actor", "critic", "discriminator", "target_actor", "target_critic"):
            for one, other in zip(getattr(agent, name).parameters(), getattr(plain, name).parameters(), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)  # Adam enlarges rounding errors


@pytest.mark.parametrize("warm, improve", [(True, True), (True, False), (False, True), (False, False)])
def test_each_step_moves_its_own_network_and_the_critic_waits_for_the_end_of_the_warm_start(warm, improve):
    args, dynamics = tiny_args(), random_dynamics()
    agent, model = random_agent(args), snapshot(dynamics)
    agent.warm.fill_(warm)
    before = snapshot(agent)
    update(agent, args, *inputs(0, args), improve, dynamics)
    after = agent.state_dict()
    moved = {name for name in ("actor", "critic", "discriminator") if not torch.equal(
        after[f"{name}.net.0.weight"], before[f"{name}.net.0.weight"])}  # fmt: skip
    assert moved == {"discriminator"} | ({"actor"} if improve else set()) | (set() if warm else {"critic"})
    assert_same(dynamics, model)


def test_the_scale_of_rewards_does_not_change_the_policys_loss():
    args, loss_g, losses = tiny_args(), torch.tensor(0.3, dtype=torch.float64), []
    agent, obs, (_, noise) = random_agent(args), randn(BATCH, OBS_DIM), inputs(0, args)
    for scale in (1.0, 250.0):
        with torch.no_grad():
            agent.critic.net[-1].weight.mul_(scale)
            agent.critic.net[-1].bias.mul_(scale)
        losses.append(sdm_gan.actor_loss(agent, obs, noise, loss_g, args)[0].item())
    assert losses[0] == pytest.approx(losses[1]) and losses[0] != pytest.approx(0.3)
    agent.warm.fill_(True)
    assert sdm_gan.actor_loss(agent, obs, noise, loss_g, args)[0].item() == pytest.approx(0.3)


def test_a_step_of_the_critic_is_left_out_where_its_loss_reaches_the_limit():
    args = tiny_args()
    agent = random_agent(args)
    agent.loss_limit.fill_(1e-3)
    before = snapshot(agent.critic), snapshot(agent.critic_opt)
    info = update(agent, args, *inputs(0, args))
    assert info["skipped"] == 1 and agent.losses[-1] == info["critic_loss"] > 1e-3
    assert_same(agent.critic, before[0])
    assert_same(agent.critic_opt, before[1])
    agent.loss_limit.fill_(1e6)
    assert update(agent, args, *inputs(0, args))["skipped"] == 0
    assert not torch.equal(agent.critic.net[0].weight, before[0]["net.0.weight"])


def test_the_limit_moves_a_twentieth_towards_mean_and_three_deviations_of_the_losses():
    losses = randn(1_000).abs()
    expected = 0.95 * 1_000 + 0.05 * (np.mean(losses.numpy()) + 3 * np.std(losses.numpy()))
    assert sdm_gan.next_loss_limit(torch.tensor(1_000.0), losses).item() == pytest.approx(expected)


def test_the_optimizer_is_adam_with_its_beta_and_a_skipped_step_leaves_no_trace():
    p, other = (nn.Parameter(randn(4, 3)) for _ in range(2))
    opt, reference = sdm_gan.SkippingAdam([p], 0.01, 0.4).double(), torch.optim.Adam([other], 0.01, betas=(0.4, 0.999))
    for i in range(6):
        target, take = randn(4, 3, seed=i), i % 3 != 1
        opt.minimize((p - target).square().sum() * (1 if take else math.nan), torch.tensor(take))
        if take:
            reference.zero_grad()
            (other - target).square().sum().backward()
            reference.step()
        torch.testing.assert_close(p, other)


@pytest.mark.slow
def test_compiled_and_eager_updates_agree_where_a_second_derivative_is_taken(capsys):
    args, dynamics = tiny_args(gan="wasserstein"), random_dynamics(torch.float32)
    agents = [random_agent(args, torch.float32) for _ in range(2)]
    step = machine.compiled(
        lambda rows, noise: update(agents[0], args, rows, noise, True, dynamics), torch.device("cpu")
    )
    for seed in range(2):
        for agent in agents:
            agent.warm.fill_(seed == 0)
        given = inputs(seed, args, torch.float32)
        info, expected = step(*given), update(agents[1], args, *given, True, dynamics)
        for name, value in expected.items():
            torch.testing.assert_close(info[name], value, rtol=1e-3, atol=1e-5, msg=name)
    assert capsys.readouterr().out == ""  # no word of going on eagerly
    for (name, one), other in zip(agents[0].state_dict().items(), agents[1].state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4, msg=name)


# --- Schedules and rollouts ---
def test_the_real_share_is_that_of_the_released_schedule_epoch_by_epoch():
    args = sdm_gan.Args()
    for epoch in [*range(1, 80), 1_000]:
        expected = 10 if epoch <= 45 else max(5, 10 - (epoch - 41) // 5)  # tenths
        for update_number in (1_000 * (epoch - 1) + 1, 1_000 * epoch):
            assert sdm_gan.real_share(update_number, args) == pytest.approx(expected / 10)


@pytest.mark.parametrize("share, num_real", [(1.0, 512), (0.7, 358), (0.5, 256)])
def test_a_batch_has_the_given_share_of_logged_rows_first_and_simulated_ones_after(share, num_real):
    real, args = torch.arange(20.0)[:, None].expand(-1, 6), sdm_gan.Args()
    buffer = sdm_gan.ModelBuffer(50, 6)
    if num_real < 512:
        buffer.add(100 + torch.arange(30.0)[:, None].expand(-1, 6))
    torch.manual_seed(0)
    first = torch.stack([sdm_gan.sample_batch(real, buffer, share, args) for _ in range(20)])[..., 0]
    assert first.shape == (20, 512)
    assert first[:, :num_real].unique().tolist() == [*range(20)]
    assert first[:, num_real:].unique().tolist() == [*range(100, 130)] * (num_real < 512)


def run_on_own_data(folder, monkeypatch, num_rows: int, **settings):
    """Returns the data's arrays."""
    rng = np.random.default_rng(0)
    obs, action, next_obs = (rng.normal(size=(num_rows, 2)), rng.uniform(-1, 1, (num_rows, 1)),
                             rng.normal(size=(num_rows, 2)))  # fmt: skip
    arrays = {"observations": obs, "actions": action, "rewards": obs[:, 0], "next_observations": next_obs}
    np.savez(folder / "own.npz", **arrays, terminals=np.zeros(num_rows), timeouts=np.ones(num_rows))
    monkeypatch.setenv("OFFLINE_MBRL_CACHE", str(folder))
    small = {"batch_size": 8, "num_bootstrap": 2, "hidden_sizes": (8, 8), "rollout_batch_size": 10, "compile": False}
    fit = {"dynamics_max_epochs": 1, "dynamics_hidden_size": 8, "num_threads": 1, "run_dir": str(folder)}
    sdm_gan.main(sdm_gan.Args(dataset=str(folder / "own.npz"), **small, **fit, **settings))
    return arrays


def test_a_run_warms_up_then_asks_the_model_and_moves_the_policy_in_every_second_update(tmp_path, monkeypatch):
    seen, rollouts, ranges, original, rollout = [], [], [], sdm_gan.update, sdm_gan.rollout

    def spy(agent, model, rows, noise, improve, args):
        seen.append((bool(agent.warm), improve, len(rollouts), rows["logged"]))
        ranges.append(agent.reward_range.clone())
        return original(agent, model, rows, noise, improve, args)

    monkeypatch.setattr(sdm_gan, "update", spy)
    monkeypatch.setattr(sdm_gan, "rollout", lambda *inputs: rollouts.append(rollout(*inputs)) or rollouts[-1])
    schedule = {"num_updates": 8, "warm_start_updates": 3, "rollout_interval": 2, "real_ratio_interval": 1}
    arrays = run_on_own_data(tmp_path, monkeypatch, 300, **schedule)
    warm, improve, count, logged = zip(*seen, strict=True)
    assert list(warm) == [True] * 3 + [False] * 5
    assert list(improve) == [False, True] * 4
    assert list(count) == [0, 0, 0, 1, 1, 2, 2, 3]
    assert [len(rows) for rows in rollouts] == [50] * 3
    known = {tuple(row) for row in arrays["observations"].astype(np.float32).tolist()}
    assert {tuple(row[:2]) for rows in logged for row in rows.tolist()} <= known and len(logged[0]) == 16
    rewards, spread = arrays["rewards"], 3 * arrays["rewards"].std(ddof=1)
    np.testing.assert_allclose(ranges[0], [rewards.min() - spread, rewards.max() + spread], rtol=1e-5)


def test_a_run_moves_the_limit_of_the_critics_loss_when_its_memory_is_full(tmp_path, monkeypatch):
    agents, agent_class = [], sdm_gan.Agent

    def short(*inputs):
        agents.append(agent_class(*inputs))
        agents[-1].register_buffer("losses", torch.zeros(4))
        return agents[-1]

    monkeypatch.setattr(sdm_gan, "Agent", short)
    run_on_own_data(tmp_path, monkeypatch, 60, num_updates=6, warm_start_updates=1)
    assert agents[0].loss_limit.item() == pytest.approx(950, abs=5)  # once, a twentieth of the way to a few


def test_in_a_rollout_every_state_has_its_own_action():
    class Linear(nn.Module):
        noise_dim = 1

        def forward(self, obs, noise):
            return torch.atanh(0.1 * obs[:, :ACTION_DIM])

    dynamics, starts = random_dynamics(torch.float32), randn(40, OBS_DIM, dtype=torch.float32).clamp(-3, 3)
    rows = sdm_gan.rollout(dynamics, Linear(), falls, starts, sdm_gan.Args(rollout_length=1))
    action = rows[:, OBS_DIM : OBS_DIM + ACTION_DIM]
    assert torch.linalg.matrix_rank(action, tol=1e-4) == ACTION_DIM  # 1 where all get the first one's
    torch.testing.assert_close(action, 0.1 * starts[:, :ACTION_DIM])
    fell = rows[:, -1] == 1
    assert fell.any() and torch.equal(fell, rows[:, -1 - OBS_DIM] > 0.5)
    longer = sdm_gan.rollout(dynamics, Linear(), falls, starts, sdm_gan.Args(rollout_length=2))
    assert 40 < len(longer) < 80  # nobody goes on after a fall


# --- A conditional GAN ---
def test_by_the_discriminator_alone_the_policy_learns_the_behaviours_mean():
    """a = tanh(0.5 s + noise of deviation 0.1), and a model in which nothing moves."""
    rates = {"actor_lr": 1e-3, "discriminator_lr": 1e-3}
    args = sdm_gan.Args(batch_size=32, num_bootstrap=1, hidden_sizes=(64, 64), **rates)
    torch.manual_seed(0)
    agent = sdm_gan.Agent(1, 1, args)
    still = SimpleNamespace(step=lambda obs, action, order, noise: (obs, obs[:, 0], None))
    test_obs = torch.linspace(-1.5, 1.5, 50)[:, None]

    def error() -> float:
        return (torch.atanh(agent.actor.act(test_obs)) - 0.5 * test_obs).abs().mean().item()

    def rows(count: int) -> torch.Tensor:
        obs = 4 * torch.rand(count, 1) - 2
        return torch.cat([obs, torch.tanh(0.5 * obs + 0.1 * torch.randn(count, 1)), 0 * obs, obs, 0 * obs], dim=1)

    def never(obs, action, next_obs):
        return torch.zeros(len(obs), dtype=torch.bool)

    before = error()
    for i in range(240):
        noise = sdm_gan.draw_noise(1, agent.actor.noise_dim, args, torch.device("cpu"))
        batch = {"critic": rows(32), "states": rows(32), "logged": rows(64)}
        sdm_gan.update(agent, (still, never), batch, noise, i % 2 == 1, args)
    assert error() < 0.1 < before
