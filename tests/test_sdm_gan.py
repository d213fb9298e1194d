"""SDM-GAN's functions against independent float64 NumPy, known values of a GAN, and a plain learner that drops rows."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_combo import needs_compiler
from test_mopo import ACTION_DIM, BATCH, OBS_DIM, as_rows, assert_same, random_batch, snapshot
from torch import nn

import algos.sdm_gan as sdm_gan
from common.dynamics import Dynamics

K, TERMINAL = 3, 2 * OBS_DIM + ACTION_DIM + 1
NO, YES = torch.tensor(False), torch.tensor(True)


# --- Helpers ---
def randn(*shape: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def random_agent(args: sdm_gan.Args, dtype=torch.float64) -> sdm_gan.Agent:
    """With targets that differ from what they follow."""
    torch.manual_seed(0)
    agent = sdm_gan.Agent(OBS_DIM, ACTION_DIM, args).to(dtype)
    with torch.no_grad():
        for p in [*agent.target_critic.parameters(), *agent.target_actor.parameters()]:
            p.add_(0.03 * torch.randn_like(p))
        agent.critic.net[-1].weight.mul_(30)
    return agent


def random_dynamics(dtype=torch.float64) -> Dynamics:
    torch.manual_seed(7)
    dynamics = Dynamics(OBS_DIM, ACTION_DIM, 4, 3, hidden=8).to(dtype).requires_grad_(False)
    for layer in dynamics.layers:
        layer.weight.mul_(4)  # else actions hardly matter
    return dynamics


def falls(obs, action, next_obs):
    return next_obs[:, 0] > 0.5


def tiny_args(**settings) -> sdm_gan.Args:
    return sdm_gan.Args(batch_size=BATCH, num_bootstrap=K, noise_dim=2, noise_scale=0.04, compile=False, **settings)


def inputs(seed: int, agent: sdm_gan.Agent, args: sdm_gan.Args, warm=NO, dtype=torch.float64) -> list[torch.Tensor]:
    """Of `update`, from rows on."""
    rows = [as_rows(random_batch(dtype, 10 * seed + i, batch)) for i, batch in enumerate((BATCH, BATCH, 2 * BATCH))]
    torch.manual_seed(seed)
    noise = sdm_gan.draw_noise(agent.actor, OBS_DIM, args, torch.device("cpu"))
    return [*rows, warm, *(x.to(dtype) if x.is_floating_point() else x for x in noise)]


def update(agent, args, *inputs, improve=True, dynamics=None):
    return sdm_gan.update(agent, dynamics or random_dynamics(), falls, *inputs, improve=improve, args=args)


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
    expected = numpy_net(actor, np.concatenate([obs, np.clip(noise, -3, 3)], 1))
    np.testing.assert_allclose(actor(obs, noise).detach().numpy(), expected)
    expected = np.tanh(numpy_net(actor, np.concatenate([obs, np.zeros((BATCH, 2))], 1)))
    np.testing.assert_allclose(actor.act(obs).detach().numpy(), expected)


@pytest.mark.parametrize("obs_dim, noise_dim", [(1, 1), (3, 1), (11, 5), (17, 8), (40, 10)])
def test_by_default_the_noise_has_half_the_states_dimensions_between_1_and_10(obs_dim, noise_dim):
    assert sdm_gan.Actor(obs_dim, 2).noise_dim == noise_dim
    assert sdm_gan.Actor(obs_dim, 2, 50).noise_dim == 50


def test_the_best_candidate_has_the_highest_q1():
    agent, obs, noise = random_agent(tiny_args()), randn(5, OBS_DIM), randn(10, 2, seed=1)
    action = sdm_gan.BestOfCandidates(agent.critic, agent.actor, noise).act(obs).detach().numpy()
    for i in range(5):
        state = np.tile(obs[i].numpy(), (10, 1))
        candidates = np.tanh(numpy_net(agent.actor, np.concatenate([state, np.clip(noise, -3, 3)], 1)))
        np.testing.assert_allclose(action[i], candidates[numpy_q(agent.critic, state, candidates)[0].argmax()])


def test_actions_before_their_tanh_come_back_and_are_finite_at_the_bounds():
    x = torch.linspace(-4, 4, 1_001)
    torch.testing.assert_close(sdm_gan.pre_tanh(torch.tanh(x)), x, rtol=0, atol=1e-3)
    bounds = sdm_gan.pre_tanh(torch.tensor([-1.0, 1.0]))
    assert bounds.isfinite().all() and 7.5 < bounds[1] == -bounds[0]


# --- The critic's target ---
def numpy_target(agent, batch, obs_noise, noise, args) -> np.ndarray:
    _, _, reward, next_obs, terminal = (x.numpy() for x in batch)
    q = np.zeros(BATCH)
    for k in range(K):
        near = next_obs if k == K - 1 else next_obs + np.clip(args.noise_scale * obs_noise[k].numpy(), -0.05, 0.05)
        x = np.concatenate([near, np.clip(noise[k].numpy(), -3, 3)], 1)
        q_k = numpy_q(agent.target_critic, near, np.tanh(numpy_net(agent.target_actor, x)))
        q += (0.75 * q_k.min(0) + 0.25 * q_k.max(0)) / K
    q = np.where(np.abs(q) < 2_000, q, 0)
    return np.clip(reward, *agent.reward_range.numpy()) + args.gamma * (1 - terminal) * q


@pytest.mark.parametrize("size", [1.0, 3e3])  # the second reaches the linear part of the loss, and zeroed targets
def test_critic_loss_is_that_of_numpy(size):
    args = tiny_args()
    agent, batch, obs_noise, noise = (
        random_agent(args),
        random_batch(),
        randn(K - 1, BATCH, OBS_DIM),
        randn(K, BATCH, 2),
    )
    agent.reward_range.copy_(torch.tensor([-6.0, 4.0]))
    with torch.no_grad():
        for critic in (agent.critic, agent.target_critic):
            critic.net[-1].weight.mul_(size)
            critic.net[-1].bias.mul_(size)
    assert (batch[2] > 4).any() and (batch[2] < -6).any() and (0.04 * obs_noise).abs().max() > 0.05
    target = numpy_target(agent, batch, obs_noise, noise, args)
    error = np.abs(numpy_q(agent.critic, batch[0].numpy(), batch[1].numpy()) - target)
    assert (size == 1) == (error.max() < 500)
    huber = np.where(error < 500, 0.5 * error**2, 500 * (error - 250))
    nets = agent.critic, agent.target_critic, agent.target_actor
    loss, _ = sdm_gan.critic_loss(*nets, batch, obs_noise, noise, args.gamma, args.noise_scale, agent.reward_range)
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
    actor, noise = sdm_gan.Actor(OBS_DIM, ACTION_DIM, 2).double(), (randn(K - 1, BATCH, OBS_DIM), randn(K, BATCH, 2))
    q = sdm_gan.bootstrapped_value(Constant(*values), actor, randn(BATCH, OBS_DIM), *noise, 3e-4)
    torch.testing.assert_close(q, torch.full((BATCH,), expected, dtype=torch.float64))


def test_rewards_are_clipped_only_three_deviations_beyond_those_of_the_data():
    reward = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    std = math.sqrt(5 / 3)
    expected = torch.tensor([-3 * std, 3 + 3 * std], dtype=torch.float64)
    torch.testing.assert_close(sdm_gan.reward_range(reward), expected)


# --- The discriminator ---
def test_losses_have_a_gans_known_values_where_both_sides_have_one_law():
    label = 0.8 + 0.2 * torch.rand(100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for label, d, loss_d, loss_g in ((label, 0.45, 0.688, 0.799), (torch.ones_like(label), 0.5, 0.693, 0.693)):
        logit = torch.tensor(math.log(d / (1 - d)), dtype=torch.float64, requires_grad=True)
        rows = logit.expand(len(label))
        loss = sdm_gan.js_loss(rows, rows, torch.ones_like(label), label)
        assert loss.item() == pytest.approx(loss_d, abs=1e-3)
        assert torch.autograd.grad(loss, logit)[0].item() == pytest.approx(0, abs=1e-3)  # no other D is better
        assert sdm_gan.generator_loss(rows, torch.ones_like(label), "js").item() == pytest.approx(loss_g, abs=1e-3)


def test_losses_are_those_of_numpy_over_the_rows_that_count():
    real, fake, label, penalty = randn(40), randn(40, seed=1), torch.rand(40).double(), randn(40, seed=2).abs()
    weight = (torch.arange(40) % 3 > 0).double()
    t, f, y, p = (x.numpy()[weight.numpy() > 0] for x in (real, fake, label, penalty))
    d_t, d_f = 1 / (1 + np.exp(-t)), 1 / (1 + np.exp(-f))
    js = 0.5 * (-y * np.log(d_t) - (1 - y) * np.log(1 - d_t)).mean() - 0.5 * np.log(1 - d_f).mean()
    assert sdm_gan.js_loss(real, fake, weight, label).item() == pytest.approx(js)
    assert sdm_gan.generator_loss(fake, weight, "js").item() == pytest.approx(-np.log(d_f).mean())
    wasserstein = f.mean() - t.mean() + 7 * p.mean()
    assert sdm_gan.wasserstein_loss(real, fake, weight, penalty, 7.0).item() == pytest.approx(wasserstein)
    assert sdm_gan.generator_loss(fake, weight, "wasserstein").item() == pytest.approx(-f.mean())


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


def test_labels_of_logged_pairs_lie_between_0_8_and_1_and_are_drawn_anew(monkeypatch):
    seen, js_loss = [], sdm_gan.js_loss
    monkeypatch.setattr(sdm_gan, "js_loss", lambda *inputs: seen.append(inputs[-1]) or js_loss(*inputs))
    args = tiny_args()
    agent = random_agent(args)
    for seed in range(2):
        update(agent, args, *inputs(seed, agent, args))
    first, second = seen
    assert 0.8 <= first.min() < 0.81 and 0.99 < first.max() < 1 and not torch.equal(first, second)


# --- Pairs of the policy ---
def test_pairs_are_two_a_state_and_those_that_begin_after_an_end_do_not_count():
    args = tiny_args()
    agent, dynamics, obs = random_agent(args), random_dynamics(), randn(BATCH, OBS_DIM)
    alive, noise = (torch.arange(BATCH) % 4 > 0).double(), inputs(0, agent, args)[7:-1]
    fake_obs, raw, weight = sdm_gan.policy_pairs(agent.actor, dynamics, falls, obs, alive, *noise, 0.04)
    obs_noise, noise, order, model_noise = noise
    near = obs + (0.04 * obs_noise).clamp(-0.05, 0.05)
    assert len(fake_obs) == len(raw) == len(weight) == 2 * BATCH
    torch.testing.assert_close(fake_obs[:BATCH], near)
    torch.testing.assert_close(raw[:BATCH], agent.actor(near, noise[0]))
    next_obs, _ = dynamics.step(near, torch.tanh(agent.actor(near, noise[0])), order, model_noise)
    torch.testing.assert_close(fake_obs[BATCH:], next_obs)
    torch.testing.assert_close(raw[BATCH:], agent.actor(next_obs, noise[1]))
    fell = next_obs[:, 0] > 0.5
    assert 2 < fell.sum() < BATCH - 2
    assert weight.tolist() == [*alive.tolist(), *(alive * ~fell).tolist()]


# --- Update ---
@pytest.mark.parametrize("gan, seen", [("js", "raw"), ("wasserstein", "raw"), ("js", "squashed")])
def test_updates_equal_those_of_a_plain_learner_that_drops_rows(gan, seen):
    """Which also has gradients that never pass the model, and a policy's step that sees D before its own."""
    rates = {"actor_lr": 2e-3, "critic_lr": 1e-3, "discriminator_lr": 3e-3}
    args = tiny_args(gan=gan, discriminator_input=seen, gamma=0.95, tau=0.1, q_coef=3.0, **rates)
    squash = torch.tanh if seen == "squashed" else lambda x: x
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
        given = inputs(i, agent, args, torch.tensor(warm))
        info = update(agent, args, *given, improve=improve, dynamics=dynamics)
        rows, state_rows, logged, _, target_obs_noise, target_noise, value_noise, *pair_noise, uniform = given
        obs, action, reward, next_obs, terminal = rows.split([OBS_DIM, ACTION_DIM, 1, OBS_DIM, 1], dim=1)
        batch = [obs, action, reward[:, 0], next_obs, terminal[:, 0]]
        # critic
        target = torch.tensor(numpy_target(plain, batch, target_obs_noise, target_noise, args))
        loss_q = sum(torch.nn.functional.mse_loss(q, target) / 2 for q in plain.critic(obs, action))
        if not warm:
            step("critic", loss_q)
        # pairs
        obs_noise, noise, order, model_noise = pair_noise
        near = state_rows[:, :OBS_DIM] + (args.noise_scale * obs_noise).clamp(-0.05, 0.05)
        raw = plain.actor(near, noise[0])
        after, _ = dynamics.step(near, torch.tanh(raw), order, model_noise)
        keep = state_rows[:, TERMINAL] == 0
        keep_after, after = keep & (after[:, 0] <= 0.5), after.detach()
        here, there = torch.cat([near, squash(raw)], 1), torch.cat([after, squash(plain.actor(after, noise[1]))], 1)
        fake, kept = torch.cat([here[keep], there[keep_after]]), torch.cat([keep, keep_after])
        bounded = logged[kept, OBS_DIM : OBS_DIM + ACTION_DIM].clamp(-1 + 1e-7, 1 - 1e-7)
        unsquashed = 0.5 * torch.log((1 + bounded) / (1 - bounded))
        real = torch.cat([logged[kept, :OBS_DIM], squash(unsquashed)], 1)
        assert len(fake) == len(real) < 2 * BATCH
        # policy
        d = plain.discriminator
        loss_g = -torch.log(torch.sigmoid(d(fake))).mean() if gan == "js" else -d(fake).mean()
        q = plain.critic(obs, torch.tanh(plain.actor(obs, value_noise))).amin(0)
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
    before = snapshot(agent)
    update(agent, args, *inputs(0, agent, args, torch.tensor(warm)), improve=improve, dynamics=dynamics)
    after = agent.state_dict()
    moved = {name for name in ("actor", "critic", "discriminator") if not torch.equal(
        after[f"{name}.net.0.weight"], before[f"{name}.net.0.weight"])}  # fmt: skip
    assert moved == {"discriminator"} | ({"actor"} if improve else set()) | (set() if warm else {"critic"})
    assert_same(dynamics, model)


def test_the_scale_of_rewards_does_not_change_the_policys_loss():
    q, loss_g = randn(BATCH), torch.tensor(0.3, dtype=torch.float64)
    losses = [sdm_gan.actor_loss(c * q, (c * q).abs().mean(), loss_g, NO, 10.0)[0].item() for c in (1.0, 250.0)]
    assert losses[0] == pytest.approx(losses[1]) and losses[0] != pytest.approx(0.3)
    assert sdm_gan.actor_loss(q, q.abs().mean(), loss_g, YES, 10.0)[0].item() == pytest.approx(0.3)


def test_a_step_of_the_critic_is_left_out_where_its_loss_reaches_the_limit():
    args = tiny_args()
    agent = random_agent(args)
    agent.loss_limit.fill_(1e-3)
    before = snapshot(agent.critic), snapshot(agent.critic_opt)
    info = update(agent, args, *inputs(0, agent, args))
    assert info["skipped"] == 1 and agent.losses[-1] == info["critic_loss"] > 1e-3
    assert_same(agent.critic, before[0])
    assert_same(agent.critic_opt, before[1])
    agent.loss_limit.fill_(1e6)
    assert update(agent, args, *inputs(0, agent, args))["skipped"] == 0
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


@needs_compiler
def test_compiled_and_eager_updates_agree_where_a_second_derivative_is_taken(capsys):
    args = tiny_args(gan="wasserstein")
    args.compile = True
    agents, dynamics = [random_agent(args, torch.float32) for _ in range(2)], random_dynamics(torch.float32)
    step = sdm_gan.compiled(lambda *x: update(agents[0], args, *x, dynamics=dynamics), args, torch.device("cpu"))
    for seed in range(2):
        given = inputs(seed, agents[0], args, torch.tensor(seed == 0), torch.float32)
        info, expected = step(*given), update(agents[1], args, *given, dynamics=dynamics)
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
    buffer = sdm_gan.ModelBuffer(50, 6, torch.device("cpu"))
    if num_real < 512:
        buffer.add(100 + torch.arange(30.0)[:, None].expand(-1, 6))
    torch.manual_seed(0)
    first = torch.stack([sdm_gan.sample_batch(real, buffer, share, args) for _ in range(20)])[..., 0]
    assert first.shape == (20, 512)
    assert first[:, :num_real].unique().tolist() == [*range(20)]
    assert first[:, num_real:].unique().tolist() == [*range(100, 130)] * (num_real < 512)


def test_a_run_warms_up_then_asks_the_model_and_moves_the_policy_in_every_second_update(tmp_path, monkeypatch):
    seen, rollouts, original, rollout = [], [], sdm_gan.update, sdm_gan.rollout

    def spy(agent, dynamics, terminal_fn, *inputs, improve, args):
        seen.append((bool(inputs[3]), bool(improve), len(rollouts)))
        assert {tuple(row[:2]) for row in inputs[2].tolist()} <= {tuple(row) for row in obs.astype(np.float32).tolist()}
        assert torch.equal(agent.reward_range, sdm_gan.reward_range(torch.tensor(arrays["rewards"]).float()))
        return original(agent, dynamics, terminal_fn, *inputs, improve=improve, args=args)

    rng = np.random.default_rng(0)
    obs, action, next_obs = rng.normal(size=(300, 2)), rng.uniform(-1, 1, (300, 1)), rng.normal(size=(300, 2))
    arrays = {"observations": obs, "actions": action, "rewards": obs[:, 0], "next_observations": next_obs}
    np.savez(tmp_path / "own.npz", **arrays, terminals=np.zeros(300), timeouts=np.ones(300))
    monkeypatch.setenv("OFFLINE_MBRL_CACHE", str(tmp_path))
    monkeypatch.setattr(sdm_gan, "update", spy)
    monkeypatch.setattr(sdm_gan, "rollout", lambda *inputs: rollouts.append(rollout(*inputs)) or rollouts[-1])
    monkeypatch.setattr(sdm_gan, "make_envs", lambda *_: None)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    flags = {"num-updates": 8, "batch-size": 8, "num-bootstrap": 2, "warm-start-updates": 3, "rollout-interval": 2}
    flags |= {
        "dynamics-max-epochs": 1,
        "rollout-batch-size": 10,
        "real-ratio-interval": 1,
        "run-dir": tmp_path,
        "dataset": tmp_path / "own.npz",
    }
    words = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
    monkeypatch.setattr("sys.argv", ["sdm_gan.py", "--no-compile", *words])
    sdm_gan.main(*sdm_gan.read_args())
    assert [warm for warm, _, _ in seen] == [True] * 3 + [False] * 5
    assert [improve for _, improve, _ in seen] == [False, True] * 4
    assert [count for _, _, count in seen] == [0, 0, 0, 1, 1, 2, 2, 3]
    assert [len(rows) for rows in rollouts] == [50] * 3


def test_a_run_moves_the_limit_of_the_critics_loss_when_its_memory_is_full(tmp_path, monkeypatch):
    monkeypatch.setenv("OFFLINE_MBRL_CACHE", str(tmp_path))
    monkeypatch.setattr("signal.signal", lambda *_: None)
    agents, agent_class = [], sdm_gan.Agent

    def short(*inputs):
        agents.append(agent_class(*inputs))
        agents[-1].register_buffer("losses", torch.zeros(4))
        return agents[-1]

    monkeypatch.setattr(sdm_gan, "Agent", short)
    rng = np.random.default_rng(0)
    obs, action, next_obs = rng.normal(size=(60, 2)), rng.uniform(-1, 1, (60, 1)), rng.normal(size=(60, 2))
    arrays = {"observations": obs, "actions": action, "rewards": obs[:, 0], "next_observations": next_obs}
    np.savez(tmp_path / "own.npz", **arrays, terminals=np.zeros(60), timeouts=np.ones(60))
    args = sdm_gan.Args(
        dataset=str(tmp_path / "own.npz"), num_updates=6, batch_size=8, num_bootstrap=2, warm_start_updates=1,
        rollout_batch_size=10, dynamics_max_epochs=1, run_dir=str(tmp_path), compile=False, num_threads=1,
    )  # fmt: skip
    sdm_gan.main(args, [])
    assert agents[0].loss_limit.item() == pytest.approx(950, abs=5)  # once, a twentieth of the way to a few


@pytest.mark.parametrize("mode, rank", [("per-state", ACTION_DIM), ("shared", 1)])
def test_in_a_rollout_every_state_has_its_own_action_and_shared_gives_all_the_first_ones(mode, rank):
    class Linear(nn.Module):
        noise_dim = 1

        def forward(self, obs, noise):
            return torch.atanh(0.1 * obs[:, :ACTION_DIM])

    dynamics, starts = random_dynamics(torch.float32), randn(40, OBS_DIM, dtype=torch.float32).clamp(-3, 3)
    args = sdm_gan.Args(rollout_length=1, rollout_action=mode)
    rows = sdm_gan.rollout(dynamics, Linear(), falls, starts, args)
    action = rows[:, OBS_DIM : OBS_DIM + ACTION_DIM]
    assert torch.linalg.matrix_rank(action, tol=1e-4) == rank
    expected = 0.1 * starts[:, :ACTION_DIM] if mode == "per-state" else 0.1 * starts[:1, :ACTION_DIM].expand(40, -1)
    torch.testing.assert_close(action, expected)
    fell = rows[:, -1] == 1
    assert fell.any() and torch.equal(fell, rows[:, -1 - OBS_DIM] > 0.5)
    longer = sdm_gan.rollout(dynamics, Linear(), falls, starts, sdm_gan.Args(rollout_length=2, rollout_action=mode))
    assert 40 < len(longer) < 80  # nobody goes on after a fall


# --- A conditional GAN ---
def test_by_the_discriminator_alone_the_policy_learns_the_behaviours_mean():
    """a = tanh(0.5 s + noise of deviation 0.1), and a model in which nothing moves."""
    args = sdm_gan.Args(batch_size=32, num_bootstrap=1, actor_lr=1e-3, discriminator_lr=1e-3)
    torch.manual_seed(0)
    agent, still = sdm_gan.Agent(1, 1, args), SimpleNamespace(step=lambda obs, action, order, noise: (obs, obs[:, 0]))
    test_obs = torch.linspace(-1.5, 1.5, 50)[:, None]

    def error() -> float:
        return (torch.atanh(agent.actor.act(test_obs)) - 0.5 * test_obs).abs().mean().item()

    def rows(count: int) -> torch.Tensor:
        obs = 4 * torch.rand(count, 1) - 2
        return torch.cat([obs, torch.tanh(0.5 * obs + 0.1 * torch.randn(count, 1)), 0 * obs, obs, 0 * obs], dim=1)

    before = error()
    for i in range(240):
        noise = sdm_gan.draw_noise(agent.actor, 1, args, torch.device("cpu"))
        never = lambda obs, action, next_obs: torch.zeros(len(obs), dtype=torch.bool)  # noqa: E731
        sdm_gan.update(agent, still, never, rows(32), rows(32), rows(64), YES, *noise, improve=i % 2 == 1, args=args)
    assert error() < 0.1 < before
