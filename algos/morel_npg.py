"""MOReL with the paper's planner, a natural policy gradient (Kidambi et al. 2020, arXiv:2005.05951)

The pessimistic MDP is that of morel.py, and what plans in it is on-policy. Each iteration simulates episodes from the
data's initial states up to the horizon, then moves the policy by a KL of about delta / 2 (Rajeswaran et al. 2017):

    A_t = sum_l (gamma lambda)^l [ r_{t+l} + gamma V(s_{t+l+1}) - V(s_{t+l}) ]                      gae()
    (F + damping) x = g = grad mean A pi / pi_old,   theta <- theta + sqrt(delta / g^T x) x          natural_step()

Rollouts end:      after the horizon (TUNED: 700 steps on Hopper, Walker2d), by terminal_fn, and at an unknown (s,a).
Gradient stops at: advantages and returns, the old policy in ratio and divergence, the whole rollout.
Normalised:        the ensemble's inputs and targets; the policy's and V's inputs; actions to [-1, 1]; advantages.
Elites:            the 5 of 7 members with the lowest holdout error (Dynamics.fit); at each step one of them simulates
                   a row, and disc is taken among them.
Departures: [elites] The ensemble is that of morel.py: Gaussian elites take turns at every step. In the authors' code
members are deterministic, each simulates trajectories of its own, and the reward is given, not learned. [end] Nothing
is bootstrapped where a trajectory ends, by a halt or at the horizon (V is told the time); that code calls no trajectory
terminated, so that a halt costs almost nothing in A. [first] A trajectory may end at its first step; that code cuts
none before the fourth. [halt] The paper's rule; that code has, by default, no penalty, and as threshold
max_D disc / 3 (or 0.5).
Run: python algos/morel_npg.py
     python algos/morel_npg.py --dataset hopper_medium-v2.hdf5 --env-id Hopper-v5
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.utils import parameters_to_vector

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import InputError  # noqa: E402
from common.dataset import OfflineDataset, load_dataset  # noqa: E402
from common.dynamics import Dynamics, load_or_fit  # noqa: E402
from common.run import Run, RunArgs, start  # noqa: E402
from common.terminations import termination_fn  # noqa: E402


@dataclass
class Args(RunArgs):  # and how a run is watched, which changes no policy: common/run.py
    dataset: str = "pendulum/random-v0"  # Minari id, D4RL name, folder of a Minari dataset, .hdf5 or .npz
    env_id: str = ""  # environment to evaluate in; by default the one that the dataset names
    standardise_obs: bool = False  # networks see (obs - mean) / std of the data [papers: raw]
    seed: int = 0  # of every random number
    num_updates: int = 500  # iterations: trajectories, then one step [MOReL code]
    batch_size: int = 256  # rows in a gradient step of the value and of the cloning [MOReL code]
    eval_interval: int = 5  # updates between evaluations
    score_evals: int = 20  # the score of a run is the mean of its last so many evaluations
    checkpoint_interval: int = 10  # updates between checkpoints
    # --- Dynamics ---
    dynamics: str = ""  # file of a fitted ensemble; by default the cache is looked up, else it is fitted
    num_members: int = 7  # N, size of the ensemble [MOPO]
    num_elites: int = 5  # members that simulate, the best by holdout error [MOPO]
    dynamics_hidden_size: int = 200  # units in each of its four layers [MOPO]
    dynamics_max_epochs: int | None = None  # of the fit; by default it ends when no member improves
    termination: str = "auto"  # when simulated episodes end: auto, known, forced, learned, none or module:function
    # --- Model rollouts ---
    num_trajectories: int = 200  # in an iteration, from the data's initial states [MOReL code]
    horizon: int | None = None  # steps of a trajectory; by default those of the environment's episodes
    # --- Natural policy gradient ---
    hidden_sizes: tuple[int, ...] = (64, 64)  # of the policy [MOReL code]
    value_hidden_sizes: tuple[int, ...] = (128, 128)  # [MOReL code]
    gamma: float = 0.999  # discount per environment step [MOReL code]
    gae_lambda: float = 0.97  # lambda [MOReL code]
    step_size: float = 0.02  # delta, twice the KL divergence of a step [MOReL code]
    cg_iterations: int = 20  # of conjugate gradient [MOReL code]
    cg_damping: float = 1e-3  # added to the Fisher matrix's diagonal [MOReL code]
    init_std: float = 0.78  # of the actions, exp(-0.25) [MOReL code]
    min_std: float = 0.37  # exp(-1) [MOReL code]
    value_lr: float = 1e-3  # of the value, one pass over the trajectories an iteration [MOReL code]
    clone_epochs: int = 5  # passes over the data to begin with, by behaviour cloning [MOReL code]
    clone_lr: float = 1e-3  # [MOReL code]
    # --- The method ---
    threshold_coef: float = 5.0  # beta, deviations above the data's mean [10 to 50, by dataset: TUNED]
    halt_offset: float = 50.0  # -kappa lies so far below the data's smallest reward [30 to 200, by dataset: TUNED]
    pessimistic_episodes: int = 50  # in the pessimistic MDP, at each evaluation, from the data's initial states


TUNED = {  # of pendulum ours; of D4RL, also for our hopper/medium-v0 etc., J-MOReL's (on its beta: README.md)
    "pendulum/random-v0": dict(
        num_updates=100, eval_interval=10, score_evals=3, checkpoint_interval=20, compile=False,
        num_trajectories=100, step_size=0.05,
        dynamics_max_epochs=30, threshold_coef=3.0, halt_offset=1_500.0,  # whole episodes need a better model
    ),
} | {
    f"d4rl/{name}-{grade}-v2": dict(
        threshold_coef=coef, halt_offset=offset, num_trajectories=num, horizon=horizon, num_updates=updates,
        init_std=std,
    )
    for name, (coef, offset, num, horizon, updates, std) in {
        "halfcheetah": (50.0, 200.0, 160, 1000, 2500, 0.37), "hopper": (10.0, 50.0, 200, 700, 500, 0.78),
        "walker2d": (20.0, 30.0, 400, 700, 1000, 0.61),
    }.items()
    for grade in ("random", "medium", "medium-replay", "medium-expert")
}  # fmt: skip


# --- Networks ---
class Actor(nn.Module):
    """Gaussian over unbounded actions, which the caller clips to [-1, 1]; its deviation is the same everywhere."""

    def __init__(self, obs_dim: int, action_dim: int, hidden_sizes: tuple[int, ...], init_std: float):
        super().__init__()
        sizes = [obs_dim, *hidden_sizes]
        layers = [layer for i, o in zip(sizes[:-1], sizes[1:]) for layer in (nn.Linear(i, o), nn.Tanh())]
        self.net = nn.Sequential(*layers, nn.Linear(sizes[-1], action_dim))
        with torch.no_grad():
            self.net[-1].weight.mul_(0.01)
            self.net[-1].bias.mul_(0.01)
        self.log_std = nn.Parameter(torch.full((action_dim,), math.log(init_std)))
        self.register_buffer("obs_mean", torch.zeros(obs_dim))
        self.register_buffer("obs_std", torch.ones(obs_dim))

    def forward(self, obs: Tensor) -> Tensor:
        """(..., obs_dim) -> mean action (..., action_dim)"""
        return self.net((obs - self.obs_mean) / self.obs_std)

    def act(self, obs: Tensor) -> Tensor:
        """The deterministic policy: (batch, obs_dim) -> (batch, action_dim)"""
        return self(obs).clamp(-1, 1)


class Value(nn.Module):
    """Expected return from a state at a time, the share of the horizon that is over: (...,)."""

    def __init__(self, obs_dim: int, hidden_sizes: tuple[int, ...]):
        super().__init__()
        sizes = [obs_dim + 1, *hidden_sizes]
        layers = [layer for i, o in zip(sizes[:-1], sizes[1:]) for layer in (nn.Linear(i, o), nn.ReLU())]
        self.net = nn.Sequential(*layers, nn.Linear(sizes[-1], 1))
        self.register_buffer("obs_mean", torch.zeros(obs_dim))
        self.register_buffer("obs_std", torch.ones(obs_dim))
        self.register_buffer("scale", torch.tensor(1.0))

    def forward(self, obs: Tensor, time: Tensor) -> Tensor:
        """obs: (..., obs_dim), time: (...)"""
        obs = (obs - self.obs_mean) / self.obs_std
        return self.scale * self.net(torch.cat([obs, time[..., None]], dim=-1)).squeeze(-1)


class Adam(nn.Module):
    """Kingma & Ba 2015, written out: the step of torch.optim would cut the update's graph in two."""

    def __init__(self, params: list[Tensor], lr: float):
        super().__init__()
        self.params = params
        # parameters without gradient, so that they are saved and moved with the rest
        self.mean, self.square = (nn.ParameterList(torch.zeros_like(p) for p in params) for _ in range(2))
        self.requires_grad_(False)
        self.register_buffer("lr", torch.tensor(lr), persistent=False)  # of the settings or the schedule
        self.register_buffer("step", torch.tensor(0.0))

    def minimize(self, loss: Tensor) -> None:
        grads = torch.autograd.grad(loss, self.params)
        with torch.no_grad():
            self.step += 1
            c1, c2 = 1 - 0.9**self.step, 1 - 0.999**self.step
            for p, g, m, v in zip(self.params, grads, self.mean, self.square, strict=True):
                m.lerp_(g, 0.1)
                v.lerp_(g.square(), 0.001)
                p.sub_(self.lr * (m / c1) / ((v / c2).sqrt() + 1e-8))


class Agent(nn.Module):
    """Everything that training changes: networks and optimizers. Its state_dict makes a checkpoint."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.actor = Actor(obs_dim, action_dim, args.hidden_sizes, args.init_std)
        self.value = Value(obs_dim, args.value_hidden_sizes)
        self.value_opt = Adam(list(self.value.parameters()), args.value_lr)


# --- The method: Sec. 4 ---
#     disc(s,a) = max_{i,j} || f_i(s,a) - f_j(s,a) ||_2      among the members that simulate, in units of obs
def discrepancy(next_mean: Tensor) -> Tensor:
    """next_mean: (num_members, batch, obs_dim). Returns (batch,)."""
    return (next_mean[:, None] - next_mean).norm(dim=-1).amax(dim=(0, 1))


#     mean_D disc + beta * std_D disc,   0 <= beta <= beta_max = (max_D disc - mean_D disc) / std_D disc
def threshold(data_discrepancy: Tensor, threshold_coef: float) -> float:
    """data_discrepancy: (num_rows,). A larger beta than beta_max counts as beta_max, with which all data are known."""
    std, mean = torch.std_mean(data_discrepancy.double(), correction=0)
    return min(mean.item() + threshold_coef * std.item(), data_discrepancy.max().item())


@dataclass
class PessimisticMDP:
    """Follows the ensemble where it is known; an unknown (s,a) pays -kappa in place of the reward and ends the episode.

    The end is a terminal. The paper's absorbing state, which pays 1 - gamma times -kappa for ever, comes to the same.
    """

    dynamics: Dynamics
    terminal_fn: Callable
    threshold: float
    halt_reward: float  # -kappa

    @torch.no_grad()
    def step(self, obs: Tensor, action: Tensor, order: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        """As Dynamics.step. Returns next_obs (batch, obs_dim), reward (batch,), terminal and halted, bool (batch,)."""
        next_obs, reward, (next_mean, *_) = self.dynamics.step(obs, action, order, noise, all_members=True)  # [elites]
        halted = ~(discrepancy(next_mean[self.dynamics.elites]) <= self.threshold)  # also where it is no number
        terminal = self.terminal_fn(obs, action, next_obs) | halted
        return next_obs, torch.where(halted, self.halt_reward, reward), terminal, halted  # [halt]


@torch.no_grad()
def make_pessimistic_mdp(dynamics: Dynamics, terminal_fn: Callable, data: OfflineDataset, args: Args) -> PessimisticMDP:
    if len(dynamics.elites) < 2:
        raise InputError("MOReL compares elites: give --num-elites above 1, or another file to --dynamics")
    pairs = zip(data.obs.split(1_000), data.action.split(1_000))
    disc = torch.cat([discrepancy(dynamics.predict(obs, action)[0][dynamics.elites]) for obs, action in pairs])
    halt, going_on = data.reward.min().item() - args.halt_offset, (data.reward.mean() / (1 - args.gamma)).item()
    mdp = PessimisticMDP(dynamics, terminal_fn, threshold(disc, args.threshold_coef), halt)
    known = 100 * (disc <= mdp.threshold).double().mean().item()
    pays = f"halting pays {halt:.1f}, going on {going_on:.1f}"
    print(f"threshold   {mdp.threshold:.4g}, percentile {known:.2f} of the data; {pays}")
    return mdp


# --- Losses: natural policy gradient ---
#     A_t = sum_l (gamma lambda)^l [ r_{t+l} + gamma V(s_{t+l+1}) - V(s_{t+l}) ]
def gae(reward: Tensor, value: Tensor, gamma: float, gae_lambda: float) -> Tensor:
    """All (steps, num), with zeros after the end of an episode."""
    next_value = torch.cat([value[1:], torch.zeros_like(value[:1])])  # nothing is bootstrapped there [end]
    advantage = reward + gamma * next_value - value
    for t in reversed(range(len(reward) - 1)):
        advantage[t] += gamma * gae_lambda * advantage[t + 1]
    return advantage


def log_prob(actor: Actor, obs: Tensor, action: Tensor) -> Tensor:
    """(rows, obs_dim), (rows, action_dim), not yet clipped -> (rows,), up to a constant"""
    return (-0.5 * ((action - actor(obs)) / actor.log_std.exp()).square() - actor.log_std).sum(dim=-1)


#     KL( N_1 || N_2 ) = log(sigma_2 / sigma_1) + [ sigma_1^2 + (mu_1 - mu_2)^2 ] / (2 sigma_2^2) - 1/2
def gaussian_kl(mean: Tensor, log_std: Tensor, other_mean: Tensor, other_log_std: Tensor) -> Tensor:
    """Per dimension, the shape of the arguments. A tanh of both variables does not change it."""
    variance, other_variance = (2 * log_std).exp(), (2 * other_log_std).exp()
    return other_log_std - log_std + (variance + (mean - other_mean).square()) / (2 * other_variance) - 0.5


def kl_divergence(actor: Actor, obs: Tensor, old_mean: Tensor, old_log_std: Tensor) -> Tensor:
    """KL(pi_old || pi), summed over action dimensions, mean over rows."""
    return gaussian_kl(old_mean, old_log_std, actor(obs), actor.log_std).sum(dim=-1).mean()


#     F = Hessian of KL(pi_old || pi) at pi = pi_old
def fisher_product(actor: Actor, obs: Tensor) -> Callable[[Tensor], Tensor]:
    """A function that multiplies F with a vector (num_params,)."""
    params, grads = list(actor.parameters()), []
    # on a CPU some thousand rows at a time, so that the network's activations stay in its cache: three times as fast
    for part in obs.split(len(obs) if obs.is_cuda else 4_000):
        kl = kl_divergence(actor, part, actor(part).detach(), actor.log_std.detach()) * len(part) / len(obs)
        grads.append(parameters_to_vector(torch.autograd.grad(kl, params, create_graph=True)))

    def product(vector: Tensor) -> Tensor:
        return sum(
            parameters_to_vector(torch.autograd.grad(grad @ vector, params, retain_graph=True)) for grad in grads
        )

    return product


def conjugate_gradient(product: Callable[[Tensor], Tensor], b: Tensor, iterations: int) -> Tensor:
    """Solves A x = b for a symmetric positive definite A, given as product(x) = A x."""
    x, residual, direction = torch.zeros_like(b), b.clone(), b.clone()
    square = residual @ residual
    for _ in range(iterations):
        if square < 1e-20:
            break
        image = product(direction)
        step = square / (direction @ image)
        x, residual = x + step * direction, residual - step * image
        square, old = residual @ residual, square
        direction = residual + square / old * direction
    return x


#     g = grad mean [ A pi(a|s) / pi_old(a|s) ],   (F + damping) x = g,   theta <- theta + sqrt( delta / g^T x ) x
def natural_step(actor: Actor, obs: Tensor, action: Tensor, advantage: Tensor, args: Args) -> dict[str, Tensor]:
    """obs: (rows, obs_dim), action: (rows, action_dim), advantage: (rows,)."""
    params = list(actor.parameters())
    old_mean, old_log_std = actor(obs).detach(), actor.log_std.detach().clone()
    old_log_prob = log_prob(actor, obs, action)
    ratio = (old_log_prob - old_log_prob.detach()).exp()
    grad = parameters_to_vector(torch.autograd.grad((advantage * ratio).mean(), params))
    product = fisher_product(actor, obs)
    direction = conjugate_gradient(lambda x: product(x) + args.cg_damping * x, grad, args.cg_iterations)
    step = (args.step_size / (grad @ direction).clamp(min=1e-12)).sqrt() * direction
    with torch.no_grad():
        for p, part in zip(params, step.split([p.numel() for p in params]), strict=True):
            p.add_(part.view_as(p))
        actor.log_std.clamp_(min=math.log(max(args.min_std, 1e-6)))
        return {"kl": kl_divergence(actor, obs, old_mean, old_log_std), "std": actor.log_std.exp().mean()}


# --- Update: trajectories as `rollout` returns them ---
def update(agent: Agent, obs: Tensor, action: Tensor, reward: Tensor, alive: Tensor, args: Args) -> dict[str, Tensor]:
    time = (torch.arange(len(obs), device=obs.device) / len(obs))[:, None].expand(alive.shape)
    with torch.no_grad():
        value = agent.value(obs, time) * alive
    advantage = gae(reward, value, args.gamma, args.gae_lambda)[alive]
    returns = gae(reward, torch.zeros_like(value), args.gamma, 1.0)[alive]
    obs, action, time, value = obs[alive], action[alive], time[alive], value[alive]
    # actor
    info = natural_step(agent.actor, obs, action, (advantage - advantage.mean()) / (advantage.std() + 1e-8), args)
    # value
    for rows in torch.randperm(len(obs), device=obs.device).split(args.batch_size):
        agent.value_opt.minimize((agent.value(obs[rows], time[rows]) - returns[rows]).square().mean())
    explained = 1 - (returns - value).var() / returns.var()  # of the value before this fit
    return info | {"explained_variance": explained}


def clone(actor: Actor, data: OfflineDataset, args: Args) -> None:
    """Behaviour cloning: the policy's mean to the data's actions."""
    opt = Adam(list(actor.net.parameters()), args.clone_lr).to(data.obs.device)
    for _ in range(args.clone_epochs):
        for rows in torch.randperm(len(data.obs), device=data.obs.device).split(args.batch_size):
            opt.minimize((actor(data.obs[rows]) - data.action[rows]).square().mean())


# --- Model rollouts ---
@torch.no_grad()
def rollout(mdp: PessimisticMDP, actor: Actor, starts: Tensor, steps: int):
    """From each start (num, obs_dim) an episode of `steps` steps, or up to the first terminal.

    Returns obs (steps, num, obs_dim), action (steps, num, action_dim), before it was clipped, reward, alive and halted
    (steps, num): zeros, or False, after the end.
    """
    obs = starts.new_zeros(steps, *starts.shape)
    action = starts.new_zeros(steps, len(starts), len(actor.log_std))
    reward = starts.new_zeros(steps, len(starts))
    alive, halted = torch.zeros_like(reward, dtype=torch.bool), torch.zeros_like(reward, dtype=torch.bool)
    running, now = torch.arange(len(starts), device=starts.device), starts
    for t in range(steps):
        chosen = actor(now) + actor.log_std.exp() * torch.randn(len(now), action.shape[-1], device=now.device)
        order = torch.randperm(len(now), device=now.device)  # which elite simulates which row
        noise = torch.randn(len(now), now.shape[1] + 1, device=now.device)
        obs[t, running], action[t, running], alive[t, running] = now, chosen, True
        next_obs, reward[t, running], terminal, halted[t, running] = mdp.step(now, chosen.clamp(-1, 1), order, noise)
        now, running = next_obs[~terminal], running[~terminal]  # [first]
        if not len(now):
            break
    return obs, action, reward, alive, halted


# --- Evaluation ---
def initial_obs(data: OfflineDataset) -> Tensor:
    """The first observation of each episode, (num_episodes, obs_dim)."""
    return data.obs[data.episode_end.roll(1)]  # the last row ends an episode too


def horizon(data: OfflineDataset) -> int:
    """Steps after which the environment, or where it is not known the longest episode of the data, ends."""
    ends = data.episode_end.nonzero().squeeze(1)
    longest = ends.diff(prepend=ends.new_tensor([-1])).max().item()
    return (data.env_spec and data.env_spec.max_episode_steps) or longest


@torch.no_grad()
def evaluate_pessimistic(mdp: PessimisticMDP, actor: Actor, data: OfflineDataset, num: int, seed: list[int]):
    """As `evaluate`, but in the pessimistic MDP: undiscounted returns (num,) and the lengths of the episodes (num,)."""
    device, starts, steps = data.obs.device, initial_obs(data), horizon(data)
    generator = torch.Generator(device).manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0]))
    obs = starts[torch.randint(len(starts), (num,), device=device, generator=generator)]
    returns, lengths, running = torch.zeros(num, device=device), torch.zeros(num), torch.arange(num, device=device)
    while len(running) and lengths.max() < steps:
        order = torch.randperm(len(obs), device=device, generator=generator)
        noise = torch.randn(len(obs), obs.shape[1] + 1, device=device, generator=generator)
        next_obs, reward, terminal, _ = mdp.step(obs, actor.act(obs), order, noise)
        returns[running] += reward
        lengths[running.cpu()] += 1
        obs, running = next_obs[~terminal], running[~terminal]
    return returns, lengths


def main(args: Args) -> None:
    run = Run(args)  # folder, device, threads
    torch.manual_seed(args.seed)
    data = load_dataset(args.dataset, run.device, args.env_id or None, args.standardise_obs, args.trust)
    run.open(data)
    starts, steps = initial_obs(data), args.horizon or horizon(data)
    terminal_fn = termination_fn(args.termination, data, args.seed)
    sizes = {"num_members": args.num_members, "num_elites": args.num_elites, "hidden_size": args.dynamics_hidden_size}
    fit = {"max_epochs": args.dynamics_max_epochs, "path": args.dynamics, "compile": run.compiled}
    dynamics = load_or_fit(data, args.seed, **sizes, **fit)
    mdp = make_pessimistic_mdp(dynamics, terminal_fn, data, args)

    agent = Agent(data.obs.shape[1], data.action.shape[1], args).to(run.device)
    if not run.resumes:
        std, mean = torch.std_mean(data.obs, dim=0)
        for net in (agent.actor, agent.value):
            net.obs_mean.copy_(mean)
            net.obs_std.copy_(torch.where(std > 1e-6 * (1 + mean.abs()), std, 1.0))
        agent.value.scale.fill_(max(np.abs(data.episode_returns).max(), abs(mdp.halt_reward)))
        clone(agent.actor, data, args)

    for i in run.updates(agent=agent):  # 1 .. num_updates, or from where a resumed run was
        begin = starts[torch.randint(len(starts), (args.num_trajectories,), device=run.device)]
        obs, action, reward, alive, halted = rollout(mdp, agent.actor, begin, steps)
        info = update(agent, obs, action, reward, alive, args)
        if run.evaluates():
            bound, lengths = evaluate_pessimistic(mdp, agent.actor, data, args.pessimistic_episodes, [args.seed, i])
            run.note(pessimistic_return=bound.mean(), pessimistic_length=lengths)
            run.note(halt_rate=halted.sum() / alive.sum(), rollout_mean=alive.sum() / len(begin))
        run.evaluate(agent.actor, info, "pessimistic {pessimistic_return:8.1f}")
    run.finish(agent.actor)


if __name__ == "__main__":
    start(main, Args, TUNED)
