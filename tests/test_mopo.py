"""MOPO's functions against independent NumPy and torch computations, hand-made numbers and stub models."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import algos.mopo as mopo
from common.dynamics import Dynamics

OBS_DIM, ACTION_DIM, BATCH = 3, 2, 16
REWARD, TERMINAL = OBS_DIM + ACTION_DIM, 2 * OBS_DIM + ACTION_DIM + 1  # columns of a row


# --- Helpers, for other scripts' tests too ---
def small_args(algo, **settings):
    """A script's defaults, but for small networks and batches."""
    return algo.Args(**{"hidden_sizes": (8, 8), "batch_size": BATCH} | settings)


def random_batch(dtype=torch.float64, seed: int = 1, batch: int = BATCH) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    obs, next_obs = torch.randn(2, batch, OBS_DIM, generator=generator, dtype=dtype)
    action = torch.rand(batch, ACTION_DIM, generator=generator, dtype=dtype) * 2 - 1
    reward = torch.randn(batch, generator=generator, dtype=dtype) * 5
    return [obs, action, reward, next_obs, (torch.arange(batch) % 3 == 0).to(dtype)]


def as_rows(batch: list[torch.Tensor]) -> torch.Tensor:
    return mopo.flat_rows(SimpleNamespace(**dict(zip(("obs", "action", "reward", "next_obs", "terminal"), batch))))


def numpy_mlp(x: np.ndarray, p: list[np.ndarray]) -> np.ndarray:
    """p: weights (in_dim, out_dim) and biases in turns."""
    for weight, bias in zip(p[:-2:2], p[1:-2:2]):
        x = np.maximum(x @ weight + bias, 0.0)
    return x @ p[-2] + p[-1]


def numpy_actor(actor, obs: np.ndarray, noise: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The density of a normal divided by the derivative of tanh, as written in any textbook."""
    out = numpy_mlp(obs, [p.detach().double().numpy().T for p in actor.parameters()])
    mean, std = out[:, :ACTION_DIM], np.exp(np.clip(out[:, ACTION_DIM:], -5, 2))
    x = mean + std * noise
    density = np.exp(-(((x - mean) / std) ** 2) / 2) / (std * np.sqrt(2 * np.pi))
    return np.tanh(x), (np.log(density) + 2 * np.log(np.cosh(x))).sum(1)


def numpy_q(critic, j: int, obs: np.ndarray, action: np.ndarray) -> np.ndarray:
    p = [p[j].detach().double().numpy() for p in critic.parameters()]
    return numpy_mlp(np.concatenate([obs, action], 1), p)[:, 0]


def snapshot(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed(module: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    """Which parts of an agent are not what they were."""
    state = module.state_dict()
    return {name.split(".")[0] for name in state if not torch.equal(state[name], before[name])}


def assert_same(module: nn.Module, before: dict[str, torch.Tensor]) -> None:
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name


def plain_mlp(p: list[torch.Tensor]) -> nn.Sequential:
    """p: weights (out_dim, in_dim) and biases in turns."""
    modules = []
    for weight, bias in zip(p[::2], p[1::2]):
        linear = nn.Linear(*weight.T.shape).double()
        linear.load_state_dict({"weight": weight.detach().clone(), "bias": bias.detach().flatten().clone()})
        modules += [linear, nn.ReLU()]
    return nn.Sequential(*modules[:-1])


# --- Helpers, of these tests alone ---
def random_agent(args=None, dtype=torch.float64) -> mopo.Agent:
    """With a target critic that differs from the critic, and weights large enough to reach the bounds of log_std."""
    torch.manual_seed(0)
    agent = mopo.Agent(OBS_DIM, ACTION_DIM, args or small_args(mopo)).to(dtype)
    with torch.no_grad():
        agent.actor.net[-1].weight.mul_(30)
        agent.actor.net[-1].bias[ACTION_DIM:] += torch.tensor([0.0, 4.0])
        for p in agent.target_critic.parameters():
            p.add_(0.03 * torch.randn_like(p))
    return agent


def random_noise(dtype=torch.float64, seed: int = 2) -> dict[str, torch.Tensor]:
    draws = torch.randn(2, BATCH, ACTION_DIM, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return dict(zip(("next_action", "action"), draws))


# --- Actor ---
def test_log_prob_is_that_of_a_squashed_normal_in_torch_distributions():
    actor, obs, noise = random_agent().actor, random_batch()[0], random_noise()["action"]
    action, log_prob = actor(obs, noise)
    mean, log_std = actor.net(obs).chunk(2, dim=-1)
    assert (log_std > 2).any() and (log_std < -5).any()  # both bounds are at work
    normal = torch.distributions.Normal(mean, log_std.clip(-5, 2).exp())
    squashed = torch.distributions.TransformedDistribution(normal, torch.distributions.TanhTransform(cache_size=1))
    inside = action.abs().amax(1) < 1 - 1e-6  # the inverse of tanh is exact enough there
    assert inside.sum() > 5
    reference = squashed.log_prob(action).sum(-1)
    torch.testing.assert_close(log_prob[inside], reference[inside], rtol=1e-6, atol=1e-6)


def test_log_prob_and_action_match_numpy():
    actor, obs, noise = random_agent(dtype=torch.float32).actor, random_batch()[0], random_noise()["action"]
    action, log_prob = actor(obs.float(), noise.float())
    expected = numpy_actor(actor, obs.numpy(), noise.numpy())
    np.testing.assert_allclose(action.detach().numpy(), expected[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(log_prob.detach().numpy(), expected[1], rtol=1e-5, atol=1e-4)


def test_density_of_actions_integrates_to_one():
    torch.manual_seed(0)
    actor = mopo.Actor(OBS_DIM, 1, (8, 8)).double()
    noise = torch.linspace(-9, 9, 20_001, dtype=torch.float64)[:, None]
    with torch.no_grad():
        for obs in torch.randn(5, OBS_DIM, dtype=torch.float64) * 3:
            action, log_prob = actor(obs.expand(len(noise), -1), noise)
            assert abs(torch.trapezoid(log_prob.exp(), action[:, 0]).item() - 1) < 1e-5


@pytest.mark.parametrize("mean", [-1e4, -30.0, 30.0, 1e4])
def test_log_prob_and_its_gradient_are_finite_at_huge_pre_tanh_values(mean):
    actor = mopo.Actor(OBS_DIM, ACTION_DIM, (8, 8))
    with torch.no_grad():
        actor.net[-1].weight.zero_()
        actor.net[-1].bias.copy_(torch.tensor([mean] * ACTION_DIM + [0.0] * ACTION_DIM))
    action, log_prob = actor(torch.zeros(1, OBS_DIM), torch.zeros(1, ACTION_DIM))
    grads = torch.autograd.grad(log_prob.sum(), list(actor.parameters()))
    assert all(grad.isfinite().all() for grad in grads)
    # 1 - tanh(x)^2 = 4 exp(-2|x|) for large |x|
    expected = ACTION_DIM * (-0.5 * math.log(2 * math.pi) - math.log(4) + 2 * abs(mean))
    assert action[0].tolist() == [math.copysign(1, mean)] * ACTION_DIM
    assert log_prob.item() == pytest.approx(expected, rel=1e-5)


def test_deterministic_action_is_the_one_without_noise():
    actor, obs = random_agent().actor, random_batch()[0]
    assert torch.equal(actor.act(obs), actor(obs, torch.zeros(BATCH, ACTION_DIM, dtype=torch.float64))[0])


@pytest.mark.parametrize("hidden_sizes", [(5,), (4, 6), (3, 7, 5)])
def test_hidden_sizes_are_those_of_actor_and_critics(hidden_sizes):
    agent = mopo.Agent(OBS_DIM, ACTION_DIM, mopo.Args(hidden_sizes=hidden_sizes))
    actor, critic = ([layer.weight.shape for layer in net.net[::2]] for net in (agent.actor, agent.critic))
    sizes = list(zip([OBS_DIM, *hidden_sizes], [*hidden_sizes, 2 * ACTION_DIM]))
    assert actor == [torch.Size([o, i]) for i, o in sizes]
    sizes = list(zip([OBS_DIM + ACTION_DIM, *hidden_sizes], [*hidden_sizes, 1]))
    assert critic == [torch.Size([2, i, o]) for i, o in sizes]


# --- Losses ---
ALPHA = torch.tensor(0.3, dtype=torch.float64)
ARGS = small_args(mopo, gamma=0.9)


def test_critic_loss_matches_numpy():
    agent, batch, noise = random_agent(), random_batch(), random_noise()
    loss, info = mopo.critic_loss(agent, batch, noise, ALPHA, ARGS)
    obs, action, reward, next_obs, terminal = (x.numpy() for x in batch)
    next_action, next_log_prob = numpy_actor(agent.actor, next_obs, noise["next_action"].numpy())
    next_value = np.minimum(*(numpy_q(agent.target_critic, j, next_obs, next_action) for j in (0, 1)))
    target = np.where(terminal == 1, reward, reward + 0.9 * (next_value - 0.3 * next_log_prob))
    q1, q2 = (numpy_q(agent.critic, j, obs, action) for j in (0, 1))
    assert loss.item() == pytest.approx(np.mean((q1 - target) ** 2) + np.mean((q2 - target) ** 2), rel=1e-9)
    assert info["q"].item() == pytest.approx((q1.mean() + q2.mean()) / 2, rel=1e-9)


def test_critic_loss_at_terminal_rows_ignores_the_successor():
    agent, batch, noise = random_agent(), random_batch(), random_noise()
    batch[4] = torch.ones(BATCH, dtype=torch.float64)

    def loss(next_obs):
        return mopo.critic_loss(agent, [*batch[:3], next_obs, batch[4]], noise, ALPHA, ARGS)[0]

    assert torch.equal(loss(batch[3]), loss(batch[3] + 1))


def test_actor_loss_matches_numpy():
    agent, obs, noise = random_agent(), random_batch()[0], random_noise()
    loss, info = mopo.actor_loss(agent, obs, noise, ALPHA)
    action, log_prob = numpy_actor(agent.actor, obs.numpy(), noise["action"].numpy())
    q = np.minimum(*(numpy_q(agent.critic, j, obs.numpy(), action) for j in (0, 1)))
    assert loss.item() == pytest.approx(np.mean(0.3 * log_prob - q), rel=1e-9)
    assert info["log_prob"].item() == pytest.approx(log_prob.mean(), rel=1e-9)


def test_alpha_loss_matches_a_hand_made_number():
    agent = SimpleNamespace(log_alpha=torch.tensor(-0.5, requires_grad=True))
    loss = mopo.alpha_loss(agent, torch.tensor(1.25), -3.0)
    assert loss.item() == pytest.approx(-0.875)  # 0.5 * (1.25 - 3)
    grad = torch.autograd.grad(loss, agent.log_alpha)[0]
    assert grad.item() == pytest.approx(1.75)  # not -1.25 + 3 times exp(log_alpha)


@pytest.mark.parametrize("target_entropy, rises", [(50.0, True), (-500.0, False)])
def test_temperature_rises_exactly_when_entropy_is_below_its_target(target_entropy, rises):
    args = small_args(mopo, target_entropy=target_entropy)
    agent = random_agent(args)
    info = mopo.update(agent, as_rows(random_batch()), random_noise(), args)
    assert (-info["log_prob"].item() < target_entropy) == rises
    assert (agent.log_alpha.item() > 0) == rises


def test_target_entropy_is_by_default_minus_the_action_dimension():
    agent, args = random_agent(), small_args(mopo)
    info = mopo.update(agent, as_rows(random_batch()), random_noise(), args)
    gradient = agent.alpha_opt.mean[0].item() / 0.1  # of the first step
    assert gradient == pytest.approx(-(info["log_prob"].item() - ACTION_DIM), rel=1e-6)


def test_target_passes_no_gradient():
    agent = random_agent()
    agent.target_critic.requires_grad_(True)
    alpha = ALPHA.clone().requires_grad_(True)
    rest = [*agent.target_critic.parameters(), *agent.actor.parameters(), alpha]
    loss, _ = mopo.critic_loss(agent, random_batch(), random_noise(), alpha, ARGS)
    assert torch.autograd.grad(loss, rest, allow_unused=True) == (None,) * len(rest)


# --- Update ---
def test_critic_step_leaves_everything_else_bit_identical():
    agent = random_agent()
    before = snapshot(agent)
    agent.critic_opt.minimize(mopo.critic_loss(agent, random_batch(), random_noise(), ALPHA, ARGS)[0])
    assert changed(agent, before) == {"critic", "critic_opt"}
    assert all(p.grad is None for p in agent.parameters())


def test_actor_step_leaves_everything_else_bit_identical():
    agent = random_agent()
    before = snapshot(agent)
    agent.actor_opt.minimize(mopo.actor_loss(agent, random_batch()[0], random_noise(), ALPHA)[0])
    assert changed(agent, before) == {"actor", "actor_opt"}
    assert all(p.grad is None for p in agent.parameters())


def test_update_moves_every_trainable_tensor():
    agent, args = random_agent(), small_args(mopo)
    before = snapshot(agent)
    mopo.update(agent, as_rows(random_batch()), random_noise(), args)
    for module in ("actor", "critic", "target_critic", "log_alpha"):
        names = [name for name in before if name.split(".")[0] == module]
        assert names and not any(torch.equal(agent.state_dict()[name], before[name]) for name in names)


def test_target_critic_starts_as_a_copy_of_the_critic():
    agent = mopo.Agent(OBS_DIM, ACTION_DIM, small_args(mopo))
    for target, param in zip(agent.target_critic.parameters(), agent.critic.parameters(), strict=True):
        assert torch.equal(target, param) and target.data_ptr() != param.data_ptr() and not target.requires_grad


@pytest.mark.parametrize("tau", [0.0, 0.01, 1.0])
def test_target_critic_moves_by_tau_of_the_difference_to_the_new_critic(tau):
    args = small_args(mopo, tau=tau)
    agent = random_agent(args)
    before = copy.deepcopy(agent.target_critic)
    mopo.update(agent, as_rows(random_batch()), random_noise(), args)
    nets = (net.parameters() for net in (before, agent.target_critic, agent.critic))
    for old, new, param in zip(*nets, strict=True):
        torch.testing.assert_close(new - old, tau * (param - old), rtol=1e-9, atol=1e-12)


def test_adam_equals_that_of_torch_with_the_learning_rate_of_its_buffer():
    torch.manual_seed(0)
    ours = [torch.randn(4, 3).double().requires_grad_(True), torch.randn(3).double().requires_grad_(True)]
    theirs = [p.detach().clone().requires_grad_(True) for p in ours]
    x, y = torch.randn(16, 4).double(), torch.randn(16, 3).double()
    adam, reference = mopo.Adam(ours, 0.02).double(), torch.optim.Adam(theirs, 0.02)
    assert adam.state_dict().keys() == {"step", *(f"{name}.{i}" for name in ("mean", "square") for i in (0, 1))}  # kept
    for step in range(20):
        if step == 10:
            adam.lr.fill_(0.005)  # as a schedule does
            reference.param_groups[0]["lr"] = 0.005
        adam.minimize((x @ ours[0] + ours[1] - y).square().mean())
        reference.zero_grad()
        (x @ theirs[0] + theirs[1] - y).square().mean().backward()
        reference.step()
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


class PlainSac:
    """Textbook SAC: two critic networks, torch.distributions, torch.optim.Adam and backward()."""

    def __init__(self, agent: mopo.Agent, args: mopo.Args):
        self.actor = plain_mlp(list(agent.actor.parameters()))
        (self.q1, self.q2), (self.target1, self.target2) = (
            [plain_mlp([x[j].T for x in net.parameters()]) for j in (0, 1)]
            for net in (agent.critic, agent.target_critic)
        )
        self.log_alpha = agent.log_alpha.detach().clone().requires_grad_(True)
        self.actor_opt = torch.optim.Adam(self.actor.parameters(), args.actor_lr)
        self.critic_opt = torch.optim.Adam([*self.q1.parameters(), *self.q2.parameters()], args.critic_lr)
        self.alpha_opt = torch.optim.Adam([self.log_alpha], args.alpha_lr)
        self.args = args

    def sample(self, obs, noise):
        mean, log_std = self.actor(obs).tensor_split(2, dim=1)
        std = torch.exp(torch.clip(log_std, -5, 2))
        x = mean + std * noise
        log_prob = torch.distributions.Normal(mean, std).log_prob(x) + 2 * torch.log(torch.cosh(x))
        return torch.tanh(x), log_prob.sum(dim=1, keepdim=True)

    def update(self, batch, noise):
        obs, action, reward, next_obs, terminal = batch
        alpha = min(math.exp(self.log_alpha.item()), self.args.max_alpha)
        with torch.no_grad():
            next_action, next_log_prob = self.sample(next_obs, noise["next_action"])
            x = torch.cat([next_obs, next_action], dim=1)
            value = torch.min(self.target1(x), self.target2(x)) - alpha * next_log_prob
            target = reward[:, None] + self.args.gamma * (1 - terminal[:, None]) * value
        x = torch.cat([obs, action], dim=1)
        loss_q = nn.functional.mse_loss(self.q1(x), target) + nn.functional.mse_loss(self.q2(x), target)
        self.critic_opt.zero_grad()
        loss_q.backward()
        self.critic_opt.step()
        new_action, log_prob = self.sample(obs, noise["action"])
        x = torch.cat([obs, new_action], dim=1)
        loss_pi = (alpha * log_prob - torch.min(self.q1(x), self.q2(x))).mean()
        self.actor_opt.zero_grad()
        loss_pi.backward()
        self.actor_opt.step()
        loss_alpha = -(self.log_alpha * (log_prob.detach() - ACTION_DIM)).mean()
        self.alpha_opt.zero_grad()
        loss_alpha.backward()
        self.alpha_opt.step()
        with torch.no_grad():
            for target_net, net in ((self.target1, self.q1), (self.target2, self.q2)):
                for t, p in zip(target_net.parameters(), net.parameters(), strict=True):
                    t.copy_((1 - self.args.tau) * t + self.args.tau * p)
        return {"critic_loss": loss_q, "actor_loss": loss_pi, "alpha": alpha, "log_prob": log_prob.mean()}


@pytest.mark.parametrize("log_alpha", [-1.0, 0.7])  # below and above the bound max_alpha
def test_updates_equal_those_of_a_plain_sac_with_two_critics(log_alpha):
    args = small_args(mopo, actor_lr=2e-3, critic_lr=1e-3, alpha_lr=3e-3, gamma=0.95, tau=0.1)
    agent = random_agent(args)
    with torch.no_grad():
        agent.log_alpha.fill_(log_alpha)
        agent.actor.net[-1].weight.div_(30)  # cosh(x) of the plain one overflows at huge x
    plain = PlainSac(agent, args)
    for step in range(8):
        batch, noise = random_batch(seed=100 + step), random_noise(seed=200 + step)
        info = mopo.update(agent, as_rows(batch), noise, args)
        expected = plain.update(batch, noise)
        for name, value in expected.items():
            assert info[name].item() == pytest.approx(float(torch.as_tensor(value).detach()), rel=1e-5), (step, name)
    theirs = ((plain.q1, plain.q2), (plain.target1, plain.target2))
    pairs = [
        (plain_mlp([x[j].T for x in net.parameters()]), nets[j])
        for net, nets in zip((agent.critic, agent.target_critic), theirs)
        for j in (0, 1)
    ]
    for ours, theirs in [*pairs, (agent.actor, plain.actor)]:
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
    assert agent.log_alpha.item() == pytest.approx(plain.log_alpha.item(), rel=1e-5)
    assert agent.log_alpha.item() != log_alpha


# --- The method ---
STD = torch.tensor([  # (num_members 3, batch 2, obs_dim + 1 = 3); the last number is the reward's
    [[0.3, 0.4, 1.2], [1.0, 2.0, 2.0]],  # norms 1.3 and 3
    [[0.0, 0.0, 2.5], [0.0, 0.0, 0.0]],  # 2.5, all of it the reward's, and 0
    [[1.0, 1.0, 1.0], [2.0, 3.0, 6.0]],  # 1.732 and 7
])  # fmt: skip


def test_aleatoric_uncertainty_is_the_largest_norm_of_a_members_deviations():
    _, uncertainty = mopo.penalized_reward(torch.zeros(2), STD, 1.0)
    torch.testing.assert_close(uncertainty, torch.tensor([2.5, 7.0]))


def test_penalty_is_subtracted_in_proportion_to_its_coefficient():
    reward, uncertainty = mopo.penalized_reward(torch.tensor([1.0, -2.0]), STD, 3.0)
    torch.testing.assert_close(reward, torch.tensor([-6.5, -23.0]))
    torch.testing.assert_close(uncertainty, torch.tensor([2.5, 7.0]))
    with pytest.raises(AssertionError):
        mopo.penalized_reward(torch.zeros(2, 1), STD, 3.0)


# --- Rollouts ---
class StubDynamics:
    """Member i moves every coordinate by offset[i] and pays 10 * offset[i]; its deviations are scale(obs) * std[i]."""

    def __init__(self, offset, std, elites):
        self.offset, self.std, self.elites = torch.tensor(offset), torch.tensor(std), torch.tensor(elites)

    @staticmethod
    def scale(obs):
        return 1 + obs[:, 0].abs()

    def predict(self, obs, action):
        next_mean = obs + self.offset[:, None, None]
        reward_mean = (10 * self.offset)[:, None].expand(-1, len(obs))
        return next_mean, reward_mean, self.scale(obs)[:, None] * self.std[:, None, :]

    step = Dynamics.step


NO_STD = [[0.0] * (OBS_DIM + 1)] * 4
SOME_STD = [[0.1, 0.2, 0.3, 0.4], [0.2, 0.1, 0.1, 0.1], [5.0, 1.0, 2.0, 3.0], [0.1, 0.3, 0.2, 0.5]]  # largest: member 2
NORM_2 = math.sqrt(39)  # of member 2


def stub_actor() -> mopo.Actor:
    torch.manual_seed(7)
    return mopo.Actor(OBS_DIM, ACTION_DIM, (8, 8))


def never(obs, action, next_obs):
    return torch.zeros(len(obs), dtype=torch.bool)


def distinct_starts(num: int) -> torch.Tensor:
    return torch.arange(num, dtype=torch.float32)[:, None] / 64 + torch.tensor([0.0, 1.0, -1.0])


def run_rollout(dynamics, starts, terminal_fn=never, seed: int = 0, **settings):
    args, actor = mopo.Args(**settings), stub_actor()
    torch.manual_seed(seed)
    return mopo.rollout(dynamics, actor, terminal_fn, starts, args)


def test_penalty_coef_changes_nothing_but_the_reward_and_that_by_lambda_u():
    dynamics = StubDynamics([0.1, 0.2, 0.3, 0.4], SOME_STD, [3, 0, 1])

    def ends(obs, action, next_obs):
        return next_obs[:, 0] > 8

    (plain, nothing), (paid, penalty) = (
        run_rollout(dynamics, distinct_starts(300), ends, rollout_length=4, penalty_coef=coef) for coef in (0.0, 2.5)
    )
    others = [i for i in range(plain.shape[1]) if i != REWARD]
    assert torch.equal(plain[:, others], paid[:, others]) and (nothing == 0).all()
    assert torch.equal(paid[:, REWARD], plain[:, REWARD] - penalty) and (penalty > 0).all()
    assert plain[:, TERMINAL].any()  # the rollouts really ended here and there


def test_every_rows_penalty_is_by_the_largest_deviation_of_all_members_at_its_state():
    dynamics = StubDynamics([0.1, 0.2, 0.3, 0.4], SOME_STD, [3, 0, 1])  # member 2 is no elite
    starts = distinct_starts(2_300)
    rows, penalty = run_rollout(dynamics, starts, rollout_length=3, penalty_coef=2.0)
    torch.testing.assert_close(penalty, 2 * NORM_2 * (1 + rows[:, 0].abs()))


def test_penalty_does_not_depend_on_the_member_that_simulates():
    dynamics = StubDynamics([0.1, 0.2, 0.3, 0.4], SOME_STD, [3, 0, 1])
    (rows, u), (other_rows, other_u) = (
        run_rollout(dynamics, distinct_starts(100), rollout_length=1, seed=seed) for seed in (0, 1)
    )
    assert torch.equal(u, other_u) and not torch.equal(rows, other_rows)


def test_only_elites_simulate_each_as_often_and_drawn_anew_at_every_step():
    dynamics = StubDynamics([1.0, 2.0, 1e6, 4.0, 1e6], NO_STD + [[0.0] * 4], [3, 0, 1])
    rows, _ = run_rollout(dynamics, torch.zeros(900, OBS_DIM), rollout_length=2)
    moved = (rows[:, REWARD + 1 : TERMINAL] - rows[:, :OBS_DIM])[:, 0].view(2, 900)
    pairs, counts = moved.unique(dim=1, return_counts=True)
    assert sorted(map(tuple, pairs.T.tolist())) == [(a, b) for a in (1.0, 2.0, 4.0) for b in (1.0, 2.0, 4.0)]
    assert counts.min() > 60  # about 100 each
    torch.testing.assert_close(rows[:, REWARD], 10 * moved.flatten())  # reward and successor are the same member's


def test_a_simulated_step_has_the_mean_and_the_independent_deviations_of_its_member():
    std = [0.5, 1.0, 2.0, 4.0]
    dynamics = StubDynamics([1e6, 3.0, 1e6, 1e6], [NO_STD[0], std, NO_STD[0], NO_STD[0]], [1])
    rows, _ = run_rollout(dynamics, torch.zeros(20_000, OBS_DIM), rollout_length=1, penalty_coef=0.0)
    sample = torch.cat([rows[:, REWARD + 1 : TERMINAL], rows[:, REWARD, None]], dim=1)
    z = (sample - torch.tensor([3.0, 3.0, 3.0, 30.0])) / torch.tensor(std)
    torch.testing.assert_close(z.mean(0), torch.zeros(4), rtol=0, atol=0.03)
    torch.testing.assert_close(z.T.cov(), torch.eye(4), rtol=0, atol=0.05)


def test_rollout_actions_are_samples_of_the_policy():
    starts = torch.zeros(20_000, OBS_DIM)
    rows, _ = run_rollout(StubDynamics([0.0] * 4, NO_STD, [0]), starts, rollout_length=1)
    with torch.no_grad():
        mean, log_std = stub_actor().net(starts[:1])[0].chunk(2)
    x = torch.atanh(rows[:, OBS_DIM:REWARD])
    torch.testing.assert_close(x.mean(0), mean, rtol=0, atol=0.04)
    torch.testing.assert_close(x.std(0), log_std.exp(), rtol=0.03, atol=0)


def test_reward_mode_mean_is_the_mean_over_members_and_sample_is_one_members():
    dynamics = StubDynamics([1.0, 2.0, 3.0, 8.0], NO_STD, [3, 0])
    settings = dict(rollout_length=1, penalty_coef=0.0)
    mean, _ = run_rollout(dynamics, torch.zeros(100, OBS_DIM), reward_mode="mean", **settings)
    sample, _ = run_rollout(dynamics, torch.zeros(100, OBS_DIM), reward_mode="sample", **settings)
    assert mean[:, REWARD].unique().tolist() == [35.0]
    assert sample[:, REWARD].unique().tolist() == [10.0, 80.0]


def test_reward_mode_mean_is_penalized_and_without_noise():
    dynamics = StubDynamics([1.0, 2.0, 3.0, 8.0], SOME_STD, [3, 0])
    rows, _ = run_rollout(dynamics, torch.zeros(9, OBS_DIM), reward_mode="mean", rollout_length=1, penalty_coef=2.0)
    torch.testing.assert_close(rows[:, REWARD], torch.full((9,), 35.0 - 2 * NORM_2))


@pytest.mark.parametrize("num_starts, length", [(1, 1), (200, 5), (2_300, 3)])
def test_trajectories_start_once_end_at_their_first_terminal_and_have_at_most_h_rows(num_starts, length):
    def ends(obs, action, next_obs):  # depends on all three, so that their order counts
        return next_obs[:, 0] - obs[:, 0] + action[:, 0] > 0.8

    dynamics = StubDynamics([0.1, 0.2, 0.3, 0.4], SOME_STD, [3, 0, 1])
    starts = distinct_starts(num_starts)
    rows, _ = run_rollout(dynamics, starts, ends, rollout_length=length)
    obs, action, next_obs = rows[:, :OBS_DIM], rows[:, OBS_DIM:REWARD], rows[:, REWARD + 1 : TERMINAL]
    terminal = rows[:, TERMINAL]
    assert torch.equal(terminal, ends(obs, action, next_obs).float())
    at = {tuple(o.tolist()): i for i, o in enumerate(obs)}
    assert len(at) == len(rows)
    seen, lengths = 0, []
    for start in starts:
        i, num_rows = at[tuple(start.tolist())], 1
        while (successor := at.get(tuple(next_obs[i].tolist()))) is not None:
            assert not terminal[i]  # no row starts from a terminal state
            i, num_rows = successor, num_rows + 1
        assert num_rows == length or terminal[i]  # and nothing else ends a trajectory early
        seen += num_rows
        lengths.append(num_rows)
    assert seen == len(rows)  # every row belongs to the trajectory of a start
    assert max(lengths) <= length
    if num_starts > 1:
        assert set(lengths) == set(range(1, length + 1))


def test_rollout_is_one_step_where_every_state_is_terminal():
    dynamics = StubDynamics([0.1, 0.2, 0.3, 0.4], SOME_STD, [3, 0, 1])
    rows, u = run_rollout(dynamics, distinct_starts(1_500), lambda *x: ~never(*x), rollout_length=5)
    assert len(rows) == len(u) == 1_500 and rows[:, TERMINAL].all()


def test_rollout_rows_have_the_layout_of_flat_rows():
    dynamics = StubDynamics([1.0, 2.0, 3.0, 4.0], NO_STD, [2])
    starts = distinct_starts(10)
    rows, _ = run_rollout(dynamics, starts, lambda obs, action, next_obs: next_obs[:, 0] > 3.07, rollout_length=1)
    terminal = torch.tensor([0.0] * 5 + [1.0] * 5)
    assert torch.equal(rows, as_rows([starts, rows[:, 3:5], torch.full((10,), 30.0), starts + 3, terminal]))
    torch.testing.assert_close(as_rows([torch.full((1, 3), 1.0), torch.full((1, 2), 2.0), torch.tensor([3.0]),
        torch.full((1, 3), 4.0), torch.tensor([5.0])]), torch.tensor([[1.0, 1, 1, 2, 2, 3, 4, 4, 4, 5]]))  # fmt: skip


def test_rollout_needs_no_gradient():
    rows, u = run_rollout(StubDynamics([1.0] * 4, SOME_STD, [0]), torch.zeros(5, OBS_DIM))
    assert not rows.requires_grad and not u.requires_grad


# --- Settings by dataset ---
def test_tuned_settings_are_those_of_offlinerl_kit_under_both_names():
    assert mopo.TUNED["d4rl/hopper-medium-v2"] == {"rollout_length": 5, "penalty_coef": 5.0}
    assert mopo.TUNED["d4rl/hopper-medium-replay-v2"] == {"rollout_length": 5, "penalty_coef": 2.5}
    assert mopo.TUNED["d4rl/walker2d-medium-replay-v2"] == {"rollout_length": 1, "penalty_coef": 2.5}
    assert mopo.TUNED["d4rl/halfcheetah-medium-v2"] == {"rollout_length": 5, "penalty_coef": 0.5}
    assert len(mopo.TUNED) == 11


# --- Buffer and batches ---
def test_model_buffer_is_a_ring_that_forgets_the_oldest_rows():
    buffer, written = mopo.ModelBuffer(10, 2), []
    assert buffer.size == 0
    for num in (4, 4, 4, 10, 1, 7, 3):
        new = torch.arange(len(written), len(written) + num, dtype=torch.float32)
        written += new.tolist()
        buffer.add(torch.stack([new, -new], dim=1))
        assert buffer.size == min(len(written), 10)
        held = buffer.rows[: buffer.size]
        assert sorted(held[:, 0].tolist()) == written[-10:]
        assert torch.equal(held[:, 1], -held[:, 0])


@pytest.mark.parametrize("num", [4, 10, 14])
def test_a_restored_buffer_holds_the_same_rows_and_forgets_the_same_ones(num):
    def rows(first: int, num: int) -> torch.Tensor:
        return torch.arange(first, first + num, dtype=torch.float32)[:, None]

    saved, restored = mopo.ModelBuffer(10, 1), mopo.ModelBuffer(10, 1)
    for i in range(1, num + 1, 2):
        saved.add(rows(i, 2))
    restored.load_state_dict(saved.state_dict())
    assert restored.size == saved.size
    for i in range(num + 1, num + 40, 3):
        saved.add(rows(i, 3))
        restored.add(rows(i, 3))
        assert torch.equal(restored.rows, saved.rows) and restored.size == saved.size


def mixed_batch(real_ratio: float, filled: int = 300, batch_size: int = 256):
    """Real rows are 1, those in the buffer 2, the rest of the buffer is no number."""
    buffer = mopo.ModelBuffer(1_000, 10)
    buffer.rows.fill_(math.nan)
    buffer.add(torch.full((filled, 10), 2.0))
    args = mopo.Args(real_ratio=real_ratio, batch_size=batch_size, penalty_coef=5.0)
    return mopo.sample_batch(torch.ones(50, 10), buffer, args)


def test_batch_of_256_has_12_real_rows_as_they_are_and_244_of_the_filled_part_of_the_buffer():
    torch.manual_seed(0)
    for _ in range(50):
        batch = mixed_batch(mopo.Args().real_ratio)
        assert batch.shape == (256, 10)
        assert torch.equal(batch[:, 0], torch.tensor([1.0] * 12 + [2.0] * 244))
        assert (batch == batch[:, :1]).all()


@pytest.mark.parametrize("real_ratio, value", [(0.0, 2.0), (1.0, 1.0)])
def test_batch_may_be_all_model_or_all_real(real_ratio, value):
    assert torch.equal(mixed_batch(real_ratio), torch.full((256, 10), value))


def test_batch_draws_uniformly_from_all_rows_with_their_rewards():
    torch.manual_seed(0)
    real = torch.arange(20.0)[:, None].expand(-1, 10)
    buffer = mopo.ModelBuffer(100, 10)
    buffer.add(100 + torch.arange(30.0)[:, None].expand(-1, 10))
    args = mopo.Args(real_ratio=0.5)
    batches = torch.cat([mopo.sample_batch(real, buffer, args) for _ in range(100)])
    assert (batches == batches[:, :1]).all()
    values, counts = batches[:, REWARD].unique(return_counts=True)
    assert values.tolist() == [*range(20), *range(100, 130)]
    assert counts[:20].min() > 500 and counts[20:].min() > 300  # expected 640 and 427
