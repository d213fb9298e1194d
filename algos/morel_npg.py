"""MOReL with the paper's planner, a natural policy gradient (Kidambi et al. 2020, arXiv:2005.05951)

The pessimistic MDP is that of morel.py, and what plans in it is on-policy. Each iteration simulates whole episodes from
the data's initial states and moves the policy by a KL divergence of about delta / 2 (Rajeswaran et al. 2017):

    A_t = sum_l (gamma lambda)^l [ r_{t+l} + gamma V(s_{t+l+1}) - V(s_{t+l}) ]                      gae()
    F d = g = grad mean A pi / pi_old,   theta <- theta + sqrt(delta / g^T d) d          natural_step()

Departures: [1] The members are Gaussians and the elites take turns at every step; in the authors' code they are
deterministic, each simulates trajectories of its own, and the reward is given, not learned. [2] Nothing is bootstrapped
where a trajectory ends, be it halted or at the horizon, of which V knows: the authors' code marks every one as not
terminated, so that halting costs almost nothing in A. [3] It also ignores halts in the first three steps. [4] The
paper's rule: the authors' code ends the trajectory, by default without a penalty, and its threshold is max_D disc / 3.
Run: python algos/morel_npg.py
     python algos/morel_npg.py --dataset hopper_medium-v2.hdf5 --env-id Hopper-v5
"""

import csv
import ctypes
import importlib.metadata
import io
import itertools
import json
import math
import os
import pickle
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Literal

import gymnasium as gym
import imageio
import numpy as np
import torch
import torch.nn as nn
import tyro
from torch import Tensor
from torch.nn.utils import parameters_to_vector
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.dataset import InputError, OfflineDataset, load_dataset  # noqa: E402
from common.dynamics import Dynamics, load_or_fit, rounds_products, save  # noqa: E402
from common.terminations import termination_fn  # noqa: E402

ALGO = Path(__file__).stem


@dataclass
class Args:
    # --- Run ---
    dataset: str = "pendulum/random-v0"  # Minari id, D4RL name, folder of a Minari dataset, .hdf5 or .npz
    env_id: str = ""  # environment to evaluate in; by default the one that the dataset names
    successors: Literal["true", "classic"] = "true"  # classic: d4rl.qlearning_dataset's, wrong where episodes end
    seed: int = 0  # of every random number
    num_updates: int = 500  # iterations: trajectories, then one step [MOReL code]
    batch_size: int = 256  # rows in a gradient step of the value and of the cloning [MOReL code]
    eval_interval: int = 5  # updates between evaluations
    eval_episodes: int = 10  # episodes in an evaluation, deterministic actions
    score_evals: int = 20  # the score of a run is the mean of its last so many evaluations
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU when there is one
    num_threads: int = 0  # CPU threads, 0: all cores (or OMP_NUM_THREADS), at most 4
    compile: bool = True  # the ensemble's gradients as one graph; without, the same lines run eagerly
    matmul_precision: Literal["highest", "high", "medium"] = "highest"  # of float32 products
    run_dir: str = "runs"  # where run folders are made
    checkpoint_interval: int = 10  # updates between checkpoints
    resume: str = ""  # folder of a run to go on with; its settings hold where no flag is given
    run_name: str = ""  # by default dataset__algo__seed__time
    capture_video: bool = False  # film one episode of the final policy
    displace: bool = False  # measure what forced random actions half-way through an episode cost
    # --- Dynamics ---
    dynamics: str = ""  # file of a fitted ensemble; by default the cache is looked up, else it is fitted
    num_members: int = 7  # N, size of the ensemble [MOPO]
    num_elites: int = 5  # members that simulate, the best by holdout error [MOPO]
    dynamics_max_epochs: int | None = None  # of the fit; by default it ends when no member improves
    termination: str = "auto"  # when simulated episodes end: auto, known, learned, none or module:function
    # --- Model rollouts ---
    num_trajectories: int = 200  # in an iteration, from the data's initial states [MOReL code]
    horizon: int | None = None  # steps of a trajectory; by default those of the environment's episodes
    # --- Natural policy gradient ---
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


TUNED = {  # for the embedded default ours; for D4RL v2, and our sets of that name, those of J-MOReL
    "pendulum/random-v0": dict(
        num_updates=100, eval_interval=10, score_evals=3, checkpoint_interval=20, dynamics_max_epochs=30,
        threshold_coef=3.0, halt_offset=1_500.0, num_trajectories=100, step_size=0.05,
    ),
} | {
    dataset: dict(
        threshold_coef=coef, halt_offset=offset, num_trajectories=num, horizon=horizon, num_updates=updates,
        init_std=std,
    )
    for name, (coef, offset, num, horizon, updates, std) in {
        "halfcheetah": (50.0, 200.0, 160, 1000, 2500, 0.37), "hopper": (10.0, 50.0, 200, 700, 500, 0.78),
        "walker2d": (20.0, 30.0, 400, 700, 1000, 0.61),
    }.items()
    for grade in ("random", "medium", "medium-replay", "medium-expert")
    for dataset in (f"{name}/{grade}-v0", f"d4rl/{name}-{grade}-v2")
}  # fmt: skip
RANGES = {  # of settings: from, to; other whole numbers begin at 1, all other numbers at 0
    "seed": (0, math.inf), "num_threads": (0, math.inf), "init_std": (1e-3, math.inf),
    "gamma": (0, 1), "gae_lambda": (0, 1),
}  # fmt: skip


# --- Networks ---
class Actor(nn.Module):
    """Gaussian over unbounded actions, which the caller clips to [-1, 1]; its deviation is the same everywhere."""

    def __init__(self, obs_dim: int, action_dim: int, init_std: float = 1.0, hidden: int = 64):
        super().__init__()
        sizes = [obs_dim, hidden, hidden]
        layers = [layer for i, o in zip(sizes[:-1], sizes[1:]) for layer in (nn.Linear(i, o), nn.Tanh())]
        self.net = nn.Sequential(*layers, nn.Linear(hidden, action_dim))
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

    def __init__(self, obs_dim: int, hidden: int = 128):
        super().__init__()
        sizes = [obs_dim + 1, hidden, hidden]
        layers = [layer for i, o in zip(sizes[:-1], sizes[1:]) for layer in (nn.Linear(i, o), nn.ReLU())]
        self.net = nn.Sequential(*layers, nn.Linear(hidden, 1))
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
        self.register_buffer("lr", torch.tensor(lr), persistent=False)  # a resumed run may have another
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
        self.actor = Actor(obs_dim, action_dim, args.init_std)
        self.value = Value(obs_dim)
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

    The end is a terminal: nothing is bootstrapped, so that the stored successor does not matter. This is the paper's
    absorbing state, entered once for all: -kappa here is what it pays there in all, -kappa / (1 - gamma).
    """

    dynamics: Dynamics
    terminal_fn: Callable
    threshold: float
    halt_reward: float  # -kappa

    @torch.no_grad()
    def step(self, obs: Tensor, action: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, ...]:
        """Returns reward (batch,), next_obs (batch, obs_dim), terminal and halted, bool (batch,)."""
        next_mean, reward_mean, std = self.dynamics.predict(obs, action)
        # every row is simulated by one elite, drawn anew at each step [1]
        elites, device = self.dynamics.elites, obs.device
        member = elites[torch.randint(len(elites), (len(obs),), device=device, generator=generator)]
        row = torch.arange(len(obs), device=device)
        noise = std[member, row] * torch.randn(len(obs), std.shape[-1], device=device, generator=generator)
        next_obs = next_mean[member, row] + noise[:, :-1]
        reward = reward_mean[member, row] + noise[:, -1]
        halted = ~(discrepancy(next_mean[elites]) <= self.threshold)  # also where a prediction is no number
        terminal = self.terminal_fn(obs, action, next_obs) | halted
        return torch.where(halted, self.halt_reward, reward), next_obs, terminal, halted  # [4]


@torch.no_grad()
def make_pessimistic_mdp(dynamics: Dynamics, terminal_fn: Callable, data: OfflineDataset, args: Args) -> PessimisticMDP:
    if len(dynamics.elites) < 2:
        raise InputError("MOReL compares elites: give --num-elites above 1, or another file to --dynamics")
    pairs = zip(data.obs.split(1_000), data.action.split(1_000))
    disc = torch.cat([discrepancy(dynamics.predict(obs, action)[0][dynamics.elites]) for obs, action in pairs])
    halt_reward = data.reward.min().item() - args.halt_offset
    mdp = PessimisticMDP(dynamics, terminal_fn, threshold(disc, args.threshold_coef), halt_reward)
    known = 100 * (disc <= mdp.threshold).double().mean().item()
    print(f"threshold   {mdp.threshold:.4g}, percentile {known:.2f} of the data; halting pays {mdp.halt_reward:.1f}")
    return mdp


# --- Losses: natural policy gradient ---
#     A_t = sum_l (gamma lambda)^l [ r_{t+l} + gamma V(s_{t+l+1}) - V(s_{t+l}) ]
def gae(reward: Tensor, value: Tensor, gamma: float, gae_lambda: float) -> Tensor:
    """All (steps, num), with zeros after the end of an episode."""
    next_value = torch.cat([value[1:], torch.zeros_like(value[:1])])  # nothing is bootstrapped there [2]
    advantage = reward + gamma * next_value - value
    for t in reversed(range(len(reward) - 1)):
        advantage[t] += gamma * gae_lambda * advantage[t + 1]
    return advantage


def log_prob(actor: Actor, obs: Tensor, action: Tensor) -> Tensor:
    """(rows, obs_dim), (rows, action_dim), not yet clipped -> (rows,), up to a constant"""
    return (-0.5 * ((action - actor(obs)) / actor.log_std.exp()).square() - actor.log_std).sum(dim=-1)


#     KL(pi_old || pi) = sum_k [ log sigma_k - log sigma'_k + (sigma'_k^2 + (mu'_k - mu_k)^2) / (2 sigma_k^2) - 1/2 ]
def kl_divergence(actor: Actor, obs: Tensor, old_mean: Tensor, old_log_std: Tensor) -> Tensor:
    """Mean over rows."""
    square = (2 * old_log_std).exp() + (old_mean - actor(obs)).square()
    kl = actor.log_std - old_log_std + 0.5 * square * (-2 * actor.log_std).exp() - 0.5
    return kl.sum(dim=-1).mean()


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


#     g = grad mean [ A pi(a|s) / pi_old(a|s) ],   (F + damping) d = g,   theta <- theta + sqrt( delta / g^T d ) d
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
        obs[t, running], action[t, running], alive[t, running] = now, chosen, True
        reward[t, running], next_obs, terminal, halted[t, running] = mdp.step(now, chosen.clamp(-1, 1))
        now, running = next_obs[~terminal], running[~terminal]  # [3]
        if not len(now):
            break
    return obs, action, reward, alive, halted


# --- Evaluation ---
def make_envs(data: OfflineDataset, num_envs: int) -> gym.vector.VectorEnv | None:
    """The environments to evaluate in; None, and a line that says so, where the data name none."""
    if data.env_spec is None:
        print("evaluation  none, the data name no environment: give --env-id to evaluate in one")
        return None
    try:
        return gym.vector.SyncVectorEnv([lambda: gym.make(data.env_spec)] * num_envs)
    except Exception as error:  # what a package that is missing or too old raises
        raise InputError(f"cannot make {data.env_spec.id} ({error}): install its package, or give --env-id") from None


@torch.no_grad()
def evaluate(actor, envs, data: OfflineDataset, seed: list[int], forced: range = range(0), after=None) -> np.ndarray:
    """Undiscounted returns (num_envs,) of the deterministic policy, one episode per environment.

    The start states follow from `seed` alone and torch's random numbers are not touched: evaluating more often changes
    nothing else. At the steps in `forced` actions are uniformly random; the list `after` receives the observations
    (num_running, obs_dim) of each step that follows.
    """
    obs, _ = envs.reset(seed=np.random.SeedSequence(seed).generate_state(envs.num_envs).tolist())
    returns, running, rng = np.zeros(envs.num_envs), np.ones(envs.num_envs, dtype=bool), np.random.default_rng(seed)
    for step in itertools.count():
        if after is not None and step >= forced.stop:
            after.append(obs[running])
        action = actor.act(torch.as_tensor(obs, dtype=torch.float32, device=data.obs.device)).cpu().numpy()
        action = rng.uniform(-1, 1, action.shape) if step in forced else action
        obs, reward, terminated, truncated, _ = envs.step(data.to_env_action(action))
        returns += reward * running
        running &= ~(terminated | truncated)
        if not running.any():
            return returns


def displace(run: Path, actor, envs: gym.vector.VectorEnv, data: OfflineDataset, args: Args) -> None:
    """displaced.csv: the final policy's return after 0, 5, 10 and 15 forced actions, half-way through its episodes.

    The test of recovery by Zhang et al. 2022 and Jiang et al. 2023, whose step 500 is half of an episode that nothing
    ends; here it is half of what the policy's median episode lasts. distance: from the observations of the 50 steps
    that follow to the nearest of at most 50,000 logged ones, in standard deviations; nan where no episode got there.
    """
    seed, rows = [args.seed, args.num_updates], []
    evaluate(actor, envs, data, seed, after=(undisturbed := []))
    middle = sum(2 * len(obs) > envs.num_envs for obs in undisturbed) // 2
    std, mean = torch.std_mean(data.obs, dim=0)
    std = torch.where(std > 1e-6 * (1 + mean.abs()), std, 1.0)  # constants keep their unit
    logged = (data.obs[:: math.ceil(len(data.obs) / 50_000)] - mean) / std
    for num in (0, 5, 10, 15):
        returns = evaluate(actor, envs, data, seed, range(middle, middle + num), after := [])
        visited = torch.as_tensor(np.concatenate(after[:50] or [np.empty((0, len(std)))]), dtype=torch.float32)
        distance = torch.cdist((visited.to(std.device) - mean) / std, logged).amin(dim=1).mean().item()
        row = {"forced_actions": num, "step": middle, "return_mean": returns.mean(), "return_std": returns.std()}
        rows.append(row | {"episodes": len(after[0]) if after else 0, "distance": distance})
        print(f"displaced   by {num:>2} actions: return {returns.mean():8.1f}, distance to the data {distance:.3f}")
    write_csv(run / "displaced.csv", rows)


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
        reward, next_obs, terminal, _ = mdp.step(obs, actor.act(obs), generator)
        returns[running] += reward
        lengths[running.cpu()] += 1
        obs, running = next_obs[~terminal], running[~terminal]
    return returns, lengths


def film(actor, data: OfflineDataset, path: Path) -> None:
    """One episode as a gif."""
    try:
        env = gym.wrappers.RenderCollection(gym.make(data.env_spec, render_mode="rgb_array"))
        evaluate(actor, gym.vector.SyncVectorEnv([lambda: env]), data, [0])
        imageio.mimsave(path, env.render()[::2], duration=40, loop=0)
    except Exception as error:  # no display, no driver: what it raises depends on the environment
        print(f"video       none, {data.env_spec.id} cannot be rendered here ({error})")


# --- Settings, the run's folder, checkpoints: plumbing, the same in every script ---
def read_args() -> tuple[Args, list[str]]:
    """Defaults, then TUNED or the resumed run's settings, then the command line; and a line on each non-default."""
    args = tyro.cli(Args)
    if args.resume:
        config = Path(args.resume) / "config.json"
        if not config.is_file():
            raise InputError(f"no run to resume in {args.resume}: it has no config.json")
        try:
            saved = json.loads(config.read_text())
            if saved["algo"] != ALGO:
                raise InputError(f"{args.resume} is a run of {saved['algo']}.py: resume it with that script")
            base, origin = asdict(Args(**saved["args"])) | {"resume": args.resume}, "the resumed run"
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{config} does not fit this script ({error}): start a new run") from None
    else:
        d4rl_name = f"d4rl/{Path(args.dataset).stem.replace('_', '-')}"  # of hopper_medium-v2.hdf5
        base, origin = TUNED.get(args.dataset) or TUNED.get(d4rl_name, {}), "TUNED for this dataset"
    args, notes = tyro.cli(Args, default=replace(Args(), **base)), []
    for field in fields(Args):
        value, flag = getattr(args, field.name), "--" + field.name.replace("_", "-")
        least, most = RANGES.get(field.name, (1 if type(value) is int else 0, math.inf))
        if type(value) in (int, float) and not least <= value <= most:
            bounds = f"at least {least}" if most == math.inf else f"between {least} and {most}"
            raise InputError(f"{flag} must be {bounds}, not {value}")
        if value != field.default or value != base.get(field.name, value):
            notes.append(f"setting     {flag} {value} ({origin if base.get(field.name) == value else 'command line'})")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda, but torch finds no GPU: use --device cpu or auto")
    return args, notes


def make_run_folder(args: Args) -> Path:
    """A new folder for a new run, the old one for a resumed run."""
    name = f"{args.dataset.strip('/').replace('/', '-')}__{ALGO}__{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"
    run = Path(args.resume or Path(args.run_dir) / (args.run_name or name))
    if not args.resume and (run / "config.json").exists():
        raise InputError(f"{run} already holds a run: go on with --resume {run}, or choose another --run-name")
    try:
        run.mkdir(parents=True, exist_ok=True)
        (run / "config.json.tmp").touch()
    except OSError as error:
        raise InputError(f"cannot write to {run} ({error.strerror}): choose another --run-dir") from None
    return run


def write_text(path: Path, text: str) -> None:
    """Atomic: a kill leaves the old file or the new one."""
    path.with_name(f"{path.name}.tmp").write_text(text)
    os.replace(path.with_name(f"{path.name}.tmp"), path)


def write_csv(path: Path, rows: list[dict]) -> None:
    table = csv.DictWriter(text := io.StringIO(), list(rows[-1]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_text(path, text.getvalue())


def write_config(run: Path, args: Args, data: OfflineDataset) -> None:
    git = f'git -C "{Path(__file__).parent}" rev-parse HEAD'  # through the shell: nobody must have git
    commit = subprocess.run(git, shell=True, capture_output=True, text=True).stdout.strip()
    versions = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "gymnasium", "minari")}
    config = {"algo": ALGO, "args": asdict(args) | {"resume": ""}, "data_hash": data.data_hash, "data": data.source}
    config |= {"versions": versions, "python": sys.version.split()[0], "commit": commit}
    config["hardware"] = f"{torch.cpu.get_capabilities().get('cpu_name', 'unknown CPU')}, {os.cpu_count()} cores"
    config["hardware"] += f", {torch.cuda.get_device_name()}" if data.obs.is_cuda else ""
    config["command"] = shlex.join(["python", f"algos/{ALGO}.py", *sys.argv[1:]])
    write_text(run / "config.json", json.dumps(config, indent=2))


def write_progress(run: Path, writer: SummaryWriter, history: list[dict]) -> None:
    """The last row to TensorBoard, all rows to progress.csv."""
    for name, value in history[-1].items():
        writer.add_scalar(name, value, history[-1]["update"])
    writer.flush()
    write_csv(run / "progress.csv", history)


def save_checkpoint(run: Path, agent: Agent, data: OfflineDataset, progress: dict) -> None:
    cuda_rng = torch.cuda.get_rng_state() if data.obs.is_cuda else None
    state = {"algo": ALGO, "data_hash": data.data_hash, "agent": agent.state_dict(), "progress": progress}
    save(run / "checkpoint.pt", state | {"rng": torch.get_rng_state(), "cuda_rng": cuda_rng})


def load_checkpoint(run: Path, agent: Agent, data: OfflineDataset) -> dict:
    """Puts everything back in place, the random states too, and returns the saved progress."""
    try:
        state = torch.load(run / "checkpoint.pt", map_location=data.obs.device, weights_only=True)
        if (state["algo"], state["data_hash"]) != (ALGO, data.data_hash):
            raise InputError(f"the checkpoint in {run} was made by another script or on other data: start a new run")
        agent.load_state_dict(state["agent"])
    except (OSError, RuntimeError, KeyError, pickle.UnpicklingError) as error:
        raise InputError(f"the checkpoint in {run} cannot be resumed ({error}): start a new run") from None
    torch.set_rng_state(state["rng"].cpu())
    if state["cuda_rng"] is not None:
        torch.cuda.set_rng_state(state["cuda_rng"].cpu())
    return state["progress"]


def keep_freed_memory() -> None:
    """Asks glibc to keep what is freed. It hands large buffers back to Linux, which zeroes each page of the next ones.

    At every update: up to a quarter of the time of a large one.
    """
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap's end stays
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no buffer in a mapping of its own


def set_matmul_precision(precision: str, device: torch.device) -> None:
    """Of float32 products. "medium" on a CPU means oneDNN, on AMD twice as fast as the MKL of the other settings.

    oneDNN rounds to bfloat16 only where the CPU has AMX; elsewhere it stays exact and is taken whatever the setting.
    """
    torch.set_float32_matmul_precision("medium")
    if device.type != "cpu" or rounds_products(device):
        torch.set_float32_matmul_precision(precision)


def compiled(function: Callable, args: Args, device: torch.device) -> Callable:
    """One graph out of `function`, which may call torch.autograd.grad; `function` itself where that cannot be had.

    On a GPU it is a CUDA graph as well: one launch instead of hundreds, whose outputs the next call overwrites.
    """
    if not args.compile:
        return function
    dynamo = torch._dynamo
    if not hasattr(dynamo.config, "trace_autograd_ops"):
        print(f"compile     needs torch 2.13, this is {torch.__version__}: going on eagerly and slower")
        return function
    dynamo.config.trace_autograd_ops = True
    mode, graph = "reduce-overhead" if device.type == "cuda" else "default", None

    def call(*inputs: Tensor):
        nonlocal graph
        try:
            graph = graph or torch.compile(function, fullgraph=True, mode=mode)
            return graph(*inputs)
        except (dynamo.exc.TorchDynamoException, OSError) as error:  # before anything ran: no update is done twice
            print(f"compile     does not work here, going on eagerly and slower ({str(error).strip().splitlines()[0]})")
            graph = function
            return function(*inputs)

    return call


def main(args: Args, notes: list[str]) -> None:
    start = time.monotonic()
    sys.stdout.reconfigure(line_buffering=True)  # a log file fills as the run goes on
    run = make_run_folder(args)
    print(f"run         {run}", *notes, sep="\n")
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    torch.set_num_threads(args.num_threads or min(4, torch.get_num_threads()))
    set_matmul_precision(args.matmul_precision, device)
    keep_freed_memory()
    torch.manual_seed(args.seed)

    # data, environment, model
    data = load_dataset(args.dataset, device, args.env_id or None, args.successors == "classic")
    print(data.summary())
    obs_dim, action_dim = data.obs.shape[1], data.action.shape[1]
    envs = make_envs(data, args.eval_episodes)
    terminal_fn = termination_fn(args.termination, data, args.seed)
    ensemble = {"num_members": args.num_members, "num_elites": args.num_elites, "max_epochs": args.dynamics_max_epochs}
    dynamics = load_or_fit(data, args.seed, **ensemble, path=args.dynamics, compile=lambda f: compiled(f, args, device))
    mdp = make_pessimistic_mdp(dynamics, terminal_fn, data, args)

    # agent
    agent = Agent(obs_dim, action_dim, args).to(device)
    starts, steps = initial_obs(data), args.horizon or horizon(data)
    progress = {"update": 0, "seconds": 0.0, "history": []}
    if args.resume and (run / "checkpoint.pt").exists():
        progress = load_checkpoint(run, agent, data)
    else:
        std, mean = torch.std_mean(data.obs, dim=0)
        for net in (agent.actor, agent.value):
            net.obs_mean.copy_(mean)
            net.obs_std.copy_(torch.where(std > 1e-6 * (1 + mean.abs()), std, 1.0))
        agent.value.scale.fill_(max(np.abs(data.episode_returns).max(), abs(mdp.halt_reward)))
        clone(agent.actor, data, args)
    first, history = progress["update"], progress["history"]
    start -= progress["seconds"]
    write_config(run, args, data)
    writer = SummaryWriter(run, purge_step=first + 1)

    # the first Ctrl-C asks for a checkpoint after the current update, the second one ends at once
    stop = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: (stop.append(True), signal.signal(signal.SIGINT, signal.default_int_handler)))
    mark = first, time.monotonic()
    interval = 0.1 if sys.stderr.isatty() else 30
    bar = tqdm(initial=first, total=args.num_updates, desc=ALGO, unit="update", mininterval=interval, leave=False)

    # training
    for i in range(first + 1, args.num_updates + 1):
        begin = starts[torch.randint(len(starts), (args.num_trajectories,), device=device)]
        obs, action, reward, alive, halted = rollout(mdp, agent.actor, begin, steps)
        info = update(agent, obs, action, reward, alive, args)
        bar.update()
        if i % args.eval_interval == 0 or i == args.num_updates:
            updates_per_second = (i - mark[0]) / (time.monotonic() - mark[1])
            returns = evaluate(agent.actor, envs, data, [args.seed, i]) if envs else np.array([math.nan])
            bound, lengths = evaluate_pessimistic(mdp, agent.actor, data, args.pessimistic_episodes, [args.seed, i])
            writer.add_histogram("pessimistic_length", lengths, i)
            row = {"update": i, "seconds": time.monotonic() - start, "updates_per_second": updates_per_second}
            row |= {"return_mean": returns.mean().item(), "return_std": returns.std().item()}
            row |= {"normalised_score": float(data.normalised_score(returns.mean()))}
            row |= {"pessimistic_return": bound.mean().item(), "pessimistic_length": lengths.mean().item()}
            row |= {"halt_rate": (halted.sum() / alive.sum()).item(), "rollout_mean": alive.sum().item() / len(begin)}
            history.append(row | {name: value.item() for name, value in info.items()})
            write_progress(run, writer, history)
            bar.write(
                f"update {i:>9,}  return {returns.mean():8.1f} ± {returns.std():<6.1f}  normalised "
                f"{row['normalised_score']:6.1f}  pessimistic {bound.mean():8.1f}"
            )
            mark = i, time.monotonic()
        if stop or i % args.checkpoint_interval == 0 or i == args.num_updates:
            progress |= {"update": i, "seconds": time.monotonic() - start}
            save_checkpoint(run, agent, data, progress)
        if stop:
            bar.close()
            print(f"stopped     after {i:,} updates; to go on: python {sys.argv[0]} --resume {run}")
            sys.exit(130)
    bar.close()

    # what came out
    box = {"action_low": torch.as_tensor(data.action_low), "action_high": torch.as_tensor(data.action_high)}
    save(run / "policy.pt", {"actor": agent.actor.state_dict(), **box, "config": (run / "config.json").read_text()})
    if envs and history:
        last, behaviour = history[-args.score_evals :], data.episode_returns.mean()
        score = np.mean([row["return_mean"] for row in last])
        last_mean, data_mean = f"mean of the last {len(last)} evaluations", "mean of the data's episodes"
        for name, value, what in (("score", score, last_mean), ("behaviour", behaviour, data_mean)):
            print(f"{name:<11} {value:.1f} (normalised {data.normalised_score(value):.1f}), {what}")
    if envs and args.displace:
        displace(run, agent.actor, envs, data, args)
    if envs and args.capture_video:
        film(agent.actor, data, run / "video.gif")
    print(f"run         {run}\ncurves      tensorboard --logdir {args.run_dir}")


if __name__ == "__main__":
    try:
        main(*read_args())
    except InputError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped: the same command starts again and reuses what is cached")
