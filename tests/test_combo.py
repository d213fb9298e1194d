"""COMBO's functions against independent float64 NumPy and plain torch computations, tables of Q and stub models."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_mopo import (
    ACTION_DIM,
    BATCH,
    OBS_DIM,
    REWARD,
    TERMINAL,
    as_rows,
    changed,
    never,
    numpy_actor,
    numpy_mlp,  # noqa: F401, for those who take the helpers from here
    numpy_q,
    plain_mlp,
    random_batch,
    small_args,
    snapshot,
)
from torch import nn

import algos.combo as combo
import algos.mobile as mobile
import algos.mopo as mopo
from common.dataset import InputError
from common.dynamics import Dynamics

K = 4  # draws of each of the three kinds
ARGS = small_args(combo)


# --- Helpers, for other scripts' tests too ---
def random_agent(algo, args, dtype=torch.float64):
    """With a target critic that differs from the critic, and Q values of different sizes."""
    torch.manual_seed(0)
    agent = algo.Agent(OBS_DIM, ACTION_DIM, args).to(dtype)
    with torch.no_grad():
        agent.critic.net[-1].weight.mul_(10)
        agent.actor.net[-1].weight.mul_(5)
        for p in agent.target_critic.parameters():
            p.add_(0.03 * torch.randn_like(p))
    return agent


def random_noise(dtype=torch.float64, seed: int = 2, batch: int = BATCH) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(2, batch, ACTION_DIM, generator=generator, dtype=dtype)
    proposals = torch.randn(3, K, batch, ACTION_DIM, generator=generator, dtype=dtype)
    proposals[0].uniform_(-1, 1, generator=generator)
    return dict(zip(("next_action", "action"), draws)) | {"proposals": proposals}


def numpy_gap(q: np.ndarray, log_density: np.ndarray, q_data: np.ndarray, lse: str) -> float:
    """One critic's. q, log_density: (3, K, rows), q_data: (num_real,); a sum written out, state by state."""
    weighted, values = np.exp(q) / np.exp(log_density), []
    for row in range(q.shape[2]):
        if lse == "all":
            values.append(np.log(sum(weighted[i, k, row] for i in range(3) for k in range(q.shape[1]))))
        else:
            draws = [np.log(sum(weighted[i, k, row] for i in range(3))) for k in range(q.shape[1])]
            values.append(sum(draws) / len(draws))
    return sum(values) / len(values) - sum(q_data) / len(q_data)


def numpy_critic_loss(agent, batch, noise, gamma, first: int, num_real: int, coef: float, lse: str, alpha: float = 0.0):
    """TD loss plus coef * gap of both critics, and that gap; pushed down from row `first` on."""
    obs, action, reward, next_obs, terminal = (x.numpy() for x in batch)
    next_action, next_log_prob = numpy_actor(agent.actor, next_obs, noise["next_action"].numpy())
    next_value = np.minimum(*(numpy_q(agent.target_critic, j, next_obs, next_action) for j in (0, 1)))
    target = np.where(terminal == 1, reward, reward + gamma * (next_value - alpha * next_log_prob))
    loss = gaps = 0.0
    for j in (0, 1):
        q = np.empty((3, K, len(obs) - first))
        log_density = np.full_like(q, math.log(0.5**ACTION_DIM))
        for k in range(K):
            uniform, normal, next_normal = noise["proposals"][:, k].numpy()
            sampled, log_density[1, k] = (x[first:] for x in numpy_actor(agent.actor, obs, normal))
            next_sampled, log_density[2, k] = (x[first:] for x in numpy_actor(agent.actor, next_obs, next_normal))
            for i, a in enumerate((uniform[first:], sampled, next_sampled)):
                q[i, k] = numpy_q(agent.critic, j, obs[first:], a)
        q_batch = numpy_q(agent.critic, j, obs, action)
        gap = numpy_gap(q, log_density, q_batch[:num_real], lse)
        loss += ((q_batch - target) ** 2).mean() + coef * gap
        gaps += gap
    return loss, gaps


class PlainLearner:
    """SAC, mostly without entropy in its target, plus CQL(H)'s term; two critics, torch.distributions, backward().

    Every state and sampled action is repeated and goes through the networks on its own.
    """

    def __init__(self, agent, args, first: int, num_real: int):
        self.actor = plain_mlp(list(agent.actor.parameters()))
        self.critics, self.targets = (
            [plain_mlp([x[j].T for x in net.parameters()]) for j in (0, 1)]
            for net in (agent.critic, agent.target_critic)
        )
        self.log_alpha = agent.log_alpha.detach().clone().requires_grad_(True)
        self.log_kappa = torch.zeros((), dtype=torch.float64, requires_grad=True)
        adam = torch.optim.Adam
        self.actor_opt, self.alpha_opt = adam(self.actor.parameters(), args.actor_lr), adam([self.log_alpha], 3e-3)
        self.critic_opts = [adam(critic.parameters(), args.critic_lr) for critic in self.critics]
        self.kappa_opt = adam([self.log_kappa], args.critic_lr)
        self.args, self.first, self.num_real = args, first, num_real

    def sample(self, obs, noise):
        mean, log_std = self.actor(obs).tensor_split(2, dim=1)
        normal = torch.distributions.Normal(mean, log_std.clip(-5, 2).exp())
        x = normal.mean + normal.stddev * noise
        return torch.tanh(x), (normal.log_prob(x) + 2 * torch.log(torch.cosh(x))).sum(dim=1)

    def update(self, batch, noise):
        obs, action, reward, next_obs, terminal = batch
        args, alpha, kappa = self.args, self.log_alpha.exp().item(), self.log_kappa.exp()
        states, successors = obs[self.first :], next_obs[self.first :]
        with torch.no_grad():
            next_action, next_log_prob = self.sample(next_obs, noise["next_action"])
            x = torch.cat([next_obs, next_action], dim=1)
            value = torch.min(*(net(x)[:, 0] for net in self.targets)) - alpha * args.backup_entropy * next_log_prob
            target = reward + args.gamma * (1 - terminal) * value
            candidates = []
            for draw in noise["proposals"][:, :, self.first :].unbind(1):
                candidates += [(draw[0], torch.full((len(states),), -ACTION_DIM * math.log(2), dtype=torch.float64))]
                candidates += [self.sample(states, draw[1]), self.sample(successors, draw[2])]
        total, gaps = 0.0, 0.0
        for critic, opt in zip(self.critics, self.critic_opts):
            q = critic(torch.cat([obs, action], dim=1))[:, 0]
            values = [critic(torch.cat([states, a], dim=1))[:, 0] - log_density for a, log_density in candidates]
            gap = torch.stack(values).exp().sum(0).log().mean() - q[: self.num_real].mean()
            loss = nn.functional.mse_loss(q, target) + args.conservative_coef * kappa.detach() * gap
            opt.zero_grad()
            loss.backward()
            opt.step()
            total, gaps = total + loss.item(), gaps + gap.item()
        if args.lagrange_threshold is not None:
            self.kappa_opt.zero_grad()
            (-kappa * (gaps / 2 - args.lagrange_threshold)).backward()
            self.kappa_opt.step()
        new_action, log_prob = self.sample(obs, noise["action"])
        x = torch.cat([obs, new_action], dim=1)
        loss_pi = (alpha * log_prob - torch.min(*(critic(x)[:, 0] for critic in self.critics))).mean()
        self.actor_opt.zero_grad()
        loss_pi.backward()
        self.actor_opt.step()
        self.alpha_opt.zero_grad()
        (-self.log_alpha * (log_prob.detach() - ACTION_DIM).mean()).backward()
        self.alpha_opt.step()
        with torch.no_grad():
            for target_net, net in zip(self.targets, self.critics):
                for t, p in zip(target_net.parameters(), net.parameters(), strict=True):
                    t.copy_((1 - args.tau) * t + args.tau * p)
        return {"critic_loss": total, "conservative_gap": gaps, "actor_loss": loss_pi.item(), "alpha": alpha}


def assert_updates_equal_plain_ones(algo, args, first: int, num_real: int) -> None:
    agent = random_agent(algo, args)
    with torch.no_grad():
        agent.log_alpha.fill_(-1.0)
    plain = PlainLearner(agent, args, first, num_real)
    for step in range(6):
        batch, noise = random_batch(seed=100 + step), random_noise(seed=200 + step)
        info = algo.update(agent, as_rows(batch), noise, args)
        for name, value in plain.update(batch, noise).items():
            assert info[name].item() == pytest.approx(value, rel=1e-5), (step, name)
    nets = [(agent.critic, plain.critics), (agent.target_critic, plain.targets)]
    pairs = [(plain_mlp([x[j].T for x in net.parameters()]), theirs[j]) for net, theirs in nets for j in (0, 1)]
    for ours, theirs in [*pairs, (agent.actor, plain.actor)]:
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)  # of moves of 6e-3; Adam enlarges rounding errors
    assert agent.log_kappa.item() == pytest.approx(plain.log_kappa.item(), rel=1e-6)
    assert (agent.log_kappa.item() != 0) == (args.lagrange_threshold is not None)


class Table(nn.Module):
    """Q values that do not depend on the inputs, (2, rows) of zeros: their gradient tells what a loss does to each."""

    def __init__(self, rows: int):
        super().__init__()
        self.q, self.calls = nn.Parameter(torch.zeros(2, rows, dtype=torch.float64)), []

    def forward(self, obs, action):
        self.calls.append((obs, action))
        return self.q[:, : len(obs)] * 1


# --- Proposals ---
def test_proposals_are_uniform_and_the_policys_at_s_and_at_its_successor_with_their_log_densities():
    agent, (obs, _, _, next_obs, _), noise = random_agent(combo, ARGS), random_batch(), random_noise()["proposals"]
    actions, log_density = combo.proposals(agent.actor, obs, next_obs, noise)
    assert actions.shape == (3, K, BATCH, ACTION_DIM) and log_density.shape == (3, K, BATCH)
    assert torch.equal(actions[0], noise[0])
    torch.testing.assert_close(log_density[0], torch.full((K, BATCH), -2 * math.log(2), dtype=torch.float64))
    for k in range(K):
        for i, state in ((1, obs), (2, next_obs)):
            action, log_prob = numpy_actor(agent.actor, state.numpy(), noise[i, k].numpy())
            np.testing.assert_allclose(actions[i, k], action, rtol=1e-9)
            np.testing.assert_allclose(log_density[i, k], log_prob, rtol=1e-6)


def test_proposals_run_the_actor_once_per_state_and_need_no_gradient():
    agent, (obs, _, _, next_obs, _), noise = random_agent(combo, ARGS), random_batch(), random_noise()["proposals"]
    seen = []
    agent.actor.net.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    actions, log_density = combo.proposals(agent.actor, obs, next_obs, noise)
    assert len(seen) == 2 and torch.equal(seen[0], obs) and torch.equal(seen[1], next_obs)
    assert not actions.requires_grad and not log_density.requires_grad


def test_importance_weights_make_every_source_an_estimate_of_the_integral():
    torch.manual_seed(0)
    actor, noise = combo.Actor(OBS_DIM, 1, (8, 8)).double(), torch.randn(3, 100_000, 1, 1, dtype=torch.float64)
    noise[0].uniform_(-1, 1)
    obs, next_obs = torch.randn(2, 1, OBS_DIM, dtype=torch.float64) * 3
    actions, log_density = combo.proposals(actor, obs, next_obs, noise)
    grid = torch.linspace(-1, 1, 10_001, dtype=torch.float64)
    integral = torch.trapezoid((torch.cos(5 * grid)).exp(), grid)
    estimates = (torch.cos(5 * actions[..., 0]) - log_density).exp().mean(dim=(1, 2))
    torch.testing.assert_close(estimates, integral.expand(3), rtol=0.02, atol=0)
    gap = combo.conservative_gap(
        torch.cos(5 * actions[..., 0]).expand(2, -1, -1, -1), log_density, torch.zeros(2, 1).double(), "all"
    )
    assert gap.item() / 2 == pytest.approx(math.log(300_000 * integral), abs=0.02)


# --- The gap ---
@pytest.mark.parametrize("lse", ["all", "per-source"])
def test_gap_matches_numpy(lse):
    generator = torch.Generator().manual_seed(0)
    q = 3 * torch.randn(2, 3, K, 7, generator=generator, dtype=torch.float64)
    log_density = torch.randn(3, K, 7, generator=generator, dtype=torch.float64)
    q_data = torch.randn(2, 5, generator=generator, dtype=torch.float64)
    expected = sum(numpy_gap(q[j].numpy(), log_density.numpy(), q_data[j].numpy(), lse) for j in (0, 1))
    assert combo.conservative_gap(q, log_density, q_data, lse).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("lse, count", [("all", 3 * K), ("per-source", 3)])
def test_gap_of_a_constant_q_and_uniform_actions_is_the_log_of_their_number_and_of_the_volume(lse, count):
    log_density = torch.full((3, K, 9), -ACTION_DIM * math.log(2))
    gap = combo.conservative_gap(torch.full((2, 3, K, 9), 1.5), log_density, torch.full((2, 4), 1.25), lse)
    assert gap.item() == pytest.approx(2 * (1.5 + math.log(count) + ACTION_DIM * math.log(2) - 1.25))


def test_soft_maximum_lies_between_the_maximum_and_that_plus_log_of_the_number():
    q = 5 * torch.randn(2, 3, K, 1, generator=torch.Generator().manual_seed(0))
    gap = combo.conservative_gap(q, torch.zeros(3, K, 1), torch.zeros(2, 1), "all").item()
    largest = q.amax(dim=(1, 2)).sum().item()
    assert largest <= gap <= largest + 2 * math.log(3 * K)


def test_gap_wants_a_density_for_every_sample():
    with pytest.raises(AssertionError):
        combo.conservative_gap(torch.zeros(2, 3, K, 9), torch.zeros(3, 1, 9), torch.zeros(2, 9), "all")


# --- Critic loss ---
def critic_args(push_down: str = "mix", coef: float = 0.7, lse: str = "all"):
    """Six rows of a batch are logged."""
    settings = {"real_ratio": 6 / BATCH, "push_down": push_down, "conservative_coef": coef, "lse": lse}
    return small_args(combo, gamma=0.9, **settings)


@pytest.mark.parametrize("alpha", [0.0, 0.3])
@pytest.mark.parametrize("lse", ["all", "per-source"])
@pytest.mark.parametrize("push_down, first", [("mix", 0), ("model", 6)])
def test_critic_loss_matches_numpy(push_down, first, lse, alpha):
    agent, batch, noise = random_agent(combo, ARGS), random_batch(), random_noise()
    loss, info = combo.critic_loss(
        agent, batch, noise, torch.tensor(alpha, dtype=torch.float64), critic_args(push_down, lse=lse)
    )
    expected, gap = numpy_critic_loss(agent, batch, noise, 0.9, first, 6, 0.7, lse, alpha)
    assert loss.item() == pytest.approx(expected, rel=1e-9)
    assert info["conservative_gap"].item() == pytest.approx(gap, rel=1e-9)
    q = [numpy_q(agent.critic, j, batch[0].numpy(), batch[1].numpy()).mean() for j in (0, 1)]
    assert info["q"].item() == pytest.approx(sum(q) / 2, rel=1e-9)


@pytest.mark.parametrize("lse", ["all", "per-source"])
@pytest.mark.parametrize("push_down, first", [("mix", 0), ("model", 6)])
def test_gap_pushes_every_sample_down_and_only_the_logged_pairs_up(push_down, first, lse):
    agent, batch, noise = random_agent(combo, ARGS), random_batch(), random_noise()
    batch[2], batch[4] = torch.zeros_like(batch[2]), torch.ones_like(batch[4])  # no TD error where Q is 0
    agent.critic = Table(BATCH + 3 * K * (BATCH - first))
    loss, _ = combo.critic_loss(agent, batch, noise, 0.0, critic_args(push_down, lse=lse))
    grad = torch.autograd.grad(loss, agent.critic.q)[0]
    on_batch, on_samples = grad[:, :BATCH], grad[:, BATCH:]
    assert (on_samples > 0).all()
    torch.testing.assert_close(on_samples.sum(dim=1), torch.full((2,), 0.7, dtype=torch.float64))
    torch.testing.assert_close(on_batch[:, :6], torch.full((2, 6), -0.7 / 6, dtype=torch.float64))
    assert (on_batch[:, 6:] == 0).all()  # simulated pairs are not raised


def test_regulariser_is_linear_in_its_coefficient():
    inputs = random_agent(combo, ARGS), random_batch(), random_noise(), 0.0
    losses = [combo.critic_loss(*inputs, critic_args(coef=coef))[0].item() for coef in (0.0, 1.0, 2.0)]
    gap = combo.critic_loss(*inputs, critic_args())[1]["conservative_gap"].item()
    assert losses[1] - losses[0] == pytest.approx(gap) and losses[2] - losses[0] == pytest.approx(2 * gap)


def test_every_sample_is_judged_at_s_in_one_pass_over_the_critic():
    agent, batch, noise = random_agent(combo, ARGS), random_batch(), random_noise()
    agent.critic = Table(BATCH + 3 * K * (BATCH - 6))
    combo.critic_loss(agent, batch, noise, 0.0, critic_args("model"))
    samples, _ = combo.proposals(agent.actor, batch[0], batch[3], noise["proposals"])
    [(obs, action)] = agent.critic.calls
    assert torch.equal(obs, torch.cat([batch[0]] + [batch[0][6:]] * 3 * K))
    torch.testing.assert_close(action, torch.cat([batch[1], samples[:, :, 6:].reshape(-1, ACTION_DIM)]))


def test_critic_loss_moves_the_critic_alone():
    agent = random_agent(combo, ARGS)
    agent.target_critic.requires_grad_(True)
    rest = [*agent.target_critic.parameters(), *agent.actor.parameters()]
    loss, _ = combo.critic_loss(agent, random_batch(), random_noise(), 0.3, critic_args())
    grads = torch.autograd.grad(loss, rest, allow_unused=True, retain_graph=True)
    assert grads == (None,) * len(rest)
    before = snapshot(agent)
    agent.critic_opt.minimize(loss)
    assert changed(agent, before) == {"critic", "critic_opt"}


def test_target_has_at_terminal_rows_no_successor_and_without_alpha_no_entropy():
    agent, batch, noise, args = random_agent(combo, ARGS), random_batch(), random_noise(), critic_args(coef=0.0)
    batch[4] = torch.ones_like(batch[4])

    def loss(next_obs):
        return combo.critic_loss(agent, [*batch[:3], next_obs, batch[4]], noise, 0.0, args)[0]

    assert torch.equal(loss(batch[3]), loss(batch[3] + 1))
    agent.critic, agent.target_critic = Table(BATCH + 3 * K * BATCH), Table(BATCH)  # all Q are 0, so that y = r
    batch[4] = torch.zeros_like(batch[4])
    assert loss(batch[3]).item() == pytest.approx(2 * batch[2].square().mean().item())


# --- Update ---
@pytest.mark.parametrize(
    "settings, first, num_real",
    [
        ({}, 0, 8),
        ({"push_down": "model", "real_ratio": 0.4}, 6, 6),
        ({"lagrange_threshold": 1.0}, 0, 8),
        ({"backup_entropy": True}, 0, 8),
        ({"conservative_coef": 0.0}, 0, 8),  # SAC without entropy in its target
    ],
    ids=str,
)
def test_updates_equal_those_of_a_plain_learner(settings, first, num_real):
    args = small_args(combo, actor_lr=2e-3, critic_lr=1e-3, alpha_lr=3e-3, gamma=0.95, tau=0.1, **settings)
    assert_updates_equal_plain_ones(combo, args, first, num_real)


def test_update_moves_every_trainable_tensor_and_the_multiplier_only_when_there_is_a_threshold():
    for threshold in (None, 1.0):
        args = small_args(combo, lagrange_threshold=threshold)
        agent = random_agent(combo, args)
        before = snapshot(agent)
        combo.update(agent, as_rows(random_batch()), random_noise(), args)
        parts = {"actor", "critic", "target_critic", "log_alpha", "actor_opt", "critic_opt", "alpha_opt"}
        assert changed(agent, before) == parts | ({"log_kappa", "kappa_opt"} if threshold else set())
        for part in ("actor", "critic", "target_critic"):
            names = [name for name in before if name.split(".")[0] == part]
            assert names and not any(torch.equal(agent.state_dict()[name], before[name]) for name in names)


@pytest.mark.parametrize("above", [True, False])
def test_multiplier_grows_exactly_while_a_critics_gap_is_above_the_threshold_and_scales_the_gap(above):
    batch, noise = as_rows(random_batch()), random_noise()
    agent = random_agent(combo, ARGS)
    info = combo.update(copy.deepcopy(agent), batch, noise, ARGS)
    gap = info["conservative_gap"].item()
    args = small_args(combo, lagrange_threshold=gap / 2 + (-0.1 if above else 0.1))
    with torch.no_grad():
        agent.log_kappa.fill_(math.log(2))
    weighted = combo.update(agent, batch, noise, args)
    assert (agent.log_kappa.item() > math.log(2)) == above
    assert weighted["critic_loss"].item() - info["critic_loss"].item() == pytest.approx(5 * gap)


# --- Without the term ---
SAME = {"hidden_sizes": (8, 8), "real_ratio": 0.25, "actor_lr": 2e-3, "critic_lr": 1e-3, "alpha_lr": 3e-3}


def assert_run_ends_as_mopo(algo, settings: dict, monkeypatch, tmp_path) -> None:
    """A run of another script and one of MOPO without penalty, whose random streams agree.

    What the other one draws for its own term comes from a stream of its own. Its rollouts ask the elites alone, so that
    their last digits are others.
    """
    draw_noise = algo.draw_noise

    def draw(*inputs):
        noise = mopo.draw_noise(*inputs[-3:])
        with torch.random.fork_rng():
            return draw_noise(*inputs) | noise

    monkeypatch.setattr(algo, "draw_noise", draw)
    run = {"num_updates": 30, "rollout_interval": 10, "rollout_batch_size": 100, "dynamics_max_epochs": 1}
    run |= {"dynamics_hidden_size": 16, "batch_size": 32, "eval_episodes": 1, "compile": False, "num_threads": 1}
    ends = []
    for script, own in ((algo, settings), (mopo, {"penalty_coef": 0.0})):
        agents, make = [], script.Agent
        monkeypatch.setattr(script, "Agent", lambda *inputs: agents.append(make(*inputs)) or agents[0])
        script.main(script.Args(**SAME, **run, **own, run_dir=str(tmp_path), run_name=script.__name__))
        ends.append(agents[0].state_dict())
    for name, value in ends[1].items():
        torch.testing.assert_close(ends[0][name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_updates_without_the_term_and_with_entropy_are_those_of_mopo():
    args = combo.Args(**SAME, batch_size=BATCH, conservative_coef=0.0, backup_entropy=True)
    agent, theirs = random_agent(combo, args), random_agent(mopo, mopo.Args(**SAME, batch_size=BATCH))
    for step in range(3):
        rows, noise = as_rows(random_batch(seed=step)), random_noise(seed=10 + step)
        info, expected = combo.update(agent, rows, noise, args), mopo.update(theirs, rows, noise, args)
        torch.testing.assert_close({name: info[name] for name in expected}, expected, rtol=1e-9, atol=1e-9)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(agent.state_dict()[name], value, rtol=1e-9, atol=1e-9, msg=name)


def test_a_run_without_the_term_and_with_entropy_is_one_of_mopo_without_a_penalty(monkeypatch, tmp_path):
    assert_run_ends_as_mopo(combo, {"conservative_coef": 0.0, "backup_entropy": True}, monkeypatch, tmp_path)


# --- Exact values: a small Markov decision process ---
BINS = 6


class TabularCritic(nn.Module):
    """Q(s, bin of a) for one-hot states; both critics start alike."""

    def __init__(self, num_states: int):
        super().__init__()
        self.q = nn.Parameter(torch.zeros(2, num_states, BINS))

    def forward(self, obs, action):
        column = ((action[:, 0] + 1) / 2 * BINS).long().clamp(0, BINS - 1)
        return self.q[:, obs.argmax(1), column]


def underestimates(coef: float, all_logged: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """True minus learned values of a fixed policy in two states: V (2,) and Q (2, BINS).

    The first rows of the batch are logged: only the first three actions of both states, 20 times. 10 of each pair with
    its true outcome follow, as an exact model gives them; with all_logged they count as rarely logged ones.
    """
    torch.manual_seed(0)
    actor, gamma, eye = combo.Actor(2, 1, (8,)), 0.5, torch.eye(2)
    state, column = torch.meshgrid(torch.arange(2), torch.arange(BINS), indexing="ij")
    state, column = state.flatten(), column.flatten()
    reward, successor = torch.sin(2.0 * column + state) + 1, (column + state) % 2
    # exact: shares of the policy in each bin, then the linear system of its Q
    with torch.no_grad():
        mean, log_std = actor.net(eye).chunk(2, dim=1)
        edges = torch.atanh(torch.linspace(-1, 1, BINS + 1).clamp(-1 + 1e-7, 1 - 1e-7))
        share = torch.distributions.Normal(mean, log_std.exp()).cdf(edges.expand(2, -1)).diff(dim=1)
    share = share / share.sum(dim=1, keepdim=True)
    transition = (successor[:, None] == state) * share[state, column]
    true = torch.linalg.solve(torch.eye(2 * BINS) - gamma * transition, reward).view(2, BINS)
    # learned
    centre = (column + 0.5) / BINS * 2 - 1
    logged = torch.arange(2 * BINS)[column < 3].repeat(20)
    index = torch.cat([logged, torch.arange(2 * BINS).repeat(10)])
    settings = {"real_ratio": 1.0 if all_logged else len(logged) / len(index), "batch_size": len(index)}
    args = combo.Args(gamma=gamma, conservative_coef=coef, num_samples=4, **settings)
    batch = [eye[state[index]], centre[index, None], reward[index], eye[successor[index]], torch.zeros(len(index))]
    critic = TabularCritic(2)
    agent = SimpleNamespace(actor=actor, critic=critic, target_critic=critic)
    optimizer = torch.optim.Adam([critic.q], 0.1)
    for i in range(600):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - i / 600)
        noise = combo.draw_noise(1, args, torch.device("cpu"))
        optimizer.zero_grad()
        combo.critic_loss(agent, batch, noise, 0.0, args)[0].backward()
        optimizer.step()
    gap = true - critic.q.detach()[0]
    return (gap * share).sum(1), gap


def test_learned_values_are_below_the_true_ones_and_tend_to_them_as_beta_vanishes():
    v, q = zip(*(underestimates(coef) for coef in (1.0, 0.1, 0.0)))
    assert (v[0] > 0.3).all() and (v[0] > v[1]).all() and (v[1] > 0.02).all() and (v[2].abs() < 0.02).all()
    assert (q[0][:, 3:] > q[1][:, 3:]).all() and (q[1][:, 3:] > 0.04).all() and (q[2].abs() < 0.05).all()


# --- Rollouts and batches ---
class StubDynamics:
    """Adds 1 to every coordinate and pays 3; the deviations are 0.1."""

    def step(self, obs, action, order, noise):
        assert torch.equal(order.sort().values, torch.arange(len(obs))) and noise.shape == (len(obs), obs.shape[1] + 1)
        return obs + 1 + 0.1 * noise[:, :-1], 3 + 0.1 * noise[:, -1], None


def run_rollout(starts, terminal_fn=never, dynamics=None, module=combo, **settings):
    torch.manual_seed(7)
    actor = module.Actor(OBS_DIM, ACTION_DIM, (8, 8))
    return module.rollout(dynamics or StubDynamics(), actor, terminal_fn, starts, module.Args(**settings)), actor


def test_rollout_rows_are_what_the_model_said_without_a_penalty():
    rows, _ = run_rollout(torch.zeros(5_000, OBS_DIM), rollout_length=1)
    assert rows.shape == (5_000, TERMINAL + 1) and not rows.requires_grad
    sample = torch.cat([rows[:, REWARD + 1 : TERMINAL], rows[:, REWARD, None]], dim=1)
    z = (sample - torch.tensor([1.0, 1.0, 1.0, 3.0])) / 0.1
    torch.testing.assert_close(z.mean(0), torch.zeros(4), rtol=0, atol=0.06)
    torch.testing.assert_close(z.T.cov(), torch.eye(4), rtol=0, atol=0.08)
    assert (rows[:, :OBS_DIM] == 0).all() and (rows[:, TERMINAL] == 0).all()


@pytest.mark.parametrize("policy", ["policy", "uniform"])
def test_rollout_actions_are_the_policys_or_uniform(policy):
    starts = torch.zeros(20_000, OBS_DIM)
    rows, actor = run_rollout(starts, rollout_length=1, rollout_policy=policy)
    action = rows[:, OBS_DIM:REWARD].double()
    with torch.no_grad():
        mean, log_std = actor.net(starts[:1])[0].double().chunk(2)
    normal = torch.distributions.Normal(mean, log_std.exp())
    share = normal.cdf(torch.atanh(action)) if policy == "policy" else (action + 1) / 2
    for column in share.sort(dim=0).values.T:  # Kolmogorov and Smirnov: uniform where the distribution is right
        assert (column - (torch.arange(20_000) + 0.5) / 20_000).abs().max() < 0.014


@pytest.mark.parametrize("module", [combo, mobile], ids=["combo", "mobile"])
@pytest.mark.parametrize("num_starts", [1, 2_300])
def test_trajectories_end_at_their_first_terminal_or_after_h_steps(num_starts, module):
    starts = torch.arange(num_starts, dtype=torch.float32)[:, None] / 100 + torch.zeros(OBS_DIM)

    def ends(obs, action, next_obs):
        return next_obs[:, 0] - obs[:, 0] > 1.1

    rows, _ = run_rollout(starts, ends, module=module, rollout_length=3)
    obs, next_obs = rows[:, :OBS_DIM], rows[:, REWARD + 1 : TERMINAL]
    assert torch.equal(rows[:, TERMINAL], ends(obs, None, next_obs).float())
    at = {tuple(o.tolist()): i for i, o in enumerate(obs)}
    assert len(at) == len(rows)
    lengths = []
    for start in starts:
        i, num_rows = at[tuple(start.tolist())], 1
        while (successor := at.get(tuple(next_obs[i].tolist()))) is not None:
            assert not rows[i, TERMINAL]
            i, num_rows = successor, num_rows + 1
        assert num_rows == 3 or rows[i, TERMINAL]
        lengths.append(num_rows)
    assert sum(lengths) == len(rows) and (num_starts == 1 or set(lengths) == {1, 2, 3})


def test_rollout_goes_on_where_all_of_a_chunk_have_ended():
    torch.manual_seed(0)
    dynamics = Dynamics(OBS_DIM, ACTION_DIM, hidden_size=8)
    rows, _ = run_rollout(torch.zeros(1_002, OBS_DIM), lambda *x: ~never(*x), dynamics, rollout_length=3)
    assert len(rows) == 1_002 and rows[:, TERMINAL].all()


def test_batch_has_half_its_rows_from_the_log_and_they_come_first():
    buffer = combo.ModelBuffer(1_000, 10)
    buffer.rows.fill_(math.nan)
    buffer.add(torch.full((300, 10), 2.0))
    batch = combo.sample_batch(torch.ones(50, 10), buffer, combo.Args())
    assert torch.equal(batch[:, 0], torch.tensor([1.0] * 128 + [2.0] * 128))


@pytest.mark.parametrize("settings", [{"real_ratio": 0.003}, {"real_ratio": 1.0, "push_down": "model"}], ids=str)
def test_a_batch_without_logged_rows_or_rows_to_push_down_is_refused(settings):
    with pytest.raises(InputError, match="--real-ratio"):
        combo.main(combo.Args(**settings))


def test_tuned_settings_are_those_of_offlinerl_kit_under_both_names():
    assert combo.TUNED["d4rl/hopper-medium-replay-v2"] == {"rollout_length": 5, "conservative_coef": 0.5}
    assert combo.TUNED["d4rl/walker2d-medium-v2"] == {"rollout_length": 1, "conservative_coef": 5.0}
    assert len(combo.TUNED) == 11
