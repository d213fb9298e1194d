"""SDM-GAN: Stationary Distribution Matching by a GAN (Yang et al. 2022, arXiv:2206.07166)

Values of a policy go wrong where its states and actions leave the data. SDM-GAN lets a discriminator D tell logged
pairs (s, a) from those of the policy: its action at a known state, and its action one step later by an ensemble,
since a stationary distribution is one that a further step does not change. The policy, a network of state and noise
whose actions may have any distribution, must deceive D and maximise Q:

    L_pi = - c mean Q(s,pi(s)) / Qbar + L_G,   L_G = - mean log D(s,a) over the policy's pairs       actor_loss()

D sees actions before their tanh. --gan wasserstein puts a critic with gradient penalty in its place.
Departures: [1] In a model rollout every state gets an action of its own; in the released code all states of a chunk get
the first one's. [2] The ensemble and its terminations are those of the other scripts, not learned heads of one network.
[3] Evaluation acts with noise 0, not with the best of ten actions by Q. [4] Pairs whose episode ends weigh 0, and so do
as many logged ones; the code drops them. [5] The model is first asked when the warm start is over: at the code's sizes
earlier rows would have left the buffer before their first use.
Run: python algos/sdm_gan.py
     python algos/sdm_gan.py --dataset hopper_medium-v2.hdf5 --env-id Hopper-v5
"""

import copy
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
import torch.nn.functional as F
import tyro
from torch import Tensor
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
    num_updates: int = 1_000_000  # gradient steps [1M to 3M in published code]
    batch_size: int = 512  # rows in a gradient step
    eval_interval: int = 5_000  # updates between evaluations
    eval_episodes: int = 10  # episodes in an evaluation, deterministic actions
    score_evals: int = 10  # the score of a run is the mean of its last so many evaluations
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU when there is one
    num_threads: int = 0  # CPU threads, 0: all cores (or OMP_NUM_THREADS), at most 4
    compile: bool = True  # the whole update as one graph; without, the same lines run eagerly
    matmul_precision: Literal["highest", "high", "medium"] = "highest"  # of float32 products
    run_dir: str = "runs"  # where run folders are made
    checkpoint_interval: int = 50_000  # updates between checkpoints
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
    real_ratio: float = 0.5  # share of real rows in a batch [SDM-GAN code, when all drops are done]
    rollout_interval: int = 250  # updates between rollouts [SDM-GAN code]
    rollout_batch_size: int = 6_400  # start states of a rollout, drawn from the data [SDM-GAN code: 32,000 / h]
    rollout_length: int = 5  # h, model steps from each start state [1, 3 or 5, by dataset: TUNED]
    rollout_retain: int = 20  # full rollouts that the model buffer holds [SDM-GAN code]
    # --- Actor and critic ---
    gamma: float = 0.99  # discount per environment step
    tau: float = 0.005  # Polyak step of the target critic [SDM-GAN code, also of the target actor and Qbar]
    actor_lr: float = 2e-4  # [SDM-GAN code]
    critic_lr: float = 3e-4  # [SDM-GAN code]
    # --- The method ---
    gan: Literal["js", "wasserstein"] = "js"  # the distance between policy's and logged pairs
    policy_interval: int = 2  # updates of critic and discriminator for one of the policy [SDM-GAN code]
    q_coef: float = 10.0  # c, weight of Q against the discriminator [SDM-GAN code]
    noise_dim: int | None = None  # of the policy's noise; by default min(10, obs_dim // 2) [or 50, by dataset: TUNED]
    discriminator_lr: float = 2e-4  # [SDM-GAN code]
    discriminator_input: Literal["raw", "squashed"] = "raw"  # actions before or after their tanh
    momentum: float = 0.4  # beta_1 of Adam, of policy and discriminator [SDM-GAN code]
    penalty_weight: float = 10.0  # of wasserstein's gradient penalty [SDM-GAN code]
    num_bootstrap: int = 50  # K, actions in the critic's target, each at its own perturbed state [SDM-GAN code]
    noise_scale: float = 3e-4  # sigma, of perturbed states, in raw units [SDM-GAN code]
    warm_start_updates: int = 40_000  # the first ones: no critic, the policy by L_G alone [SDM-GAN code]
    real_ratio_interval: int = 5_000  # updates after them between drops of the real share by 0.1 [SDM-GAN code]
    rollout_action: Literal["per-state", "shared"] = "per-state"  # shared: the first state's for all [SDM-GAN code, 1]
    num_candidates: int = 1  # at evaluation, Q_1's best is taken [SDM-GAN code: 10]; 1: noise 0 [3]


TUNED = {  # for the embedded default ours, a run of two minutes; elsewhere the released code's, by set whatever version
    "pendulum/random-v0": dict(
        num_updates=3_000, batch_size=128, eval_interval=250, score_evals=3, checkpoint_interval=1_500,
        dynamics_max_epochs=30, rollout_batch_size=1_000, num_bootstrap=2, warm_start_updates=750,
        real_ratio_interval=250,
    ),
} | {
    dataset: dict(rollout_length=length, rollout_batch_size=32_000 // length, noise_dim=noise_dim)
    for name, (length, noise_dim) in {
        "halfcheetah/medium": (3, None), "halfcheetah/medium-replay": (3, 50), "halfcheetah/medium-expert": (3, None),
        "hopper/medium": (1, 50), "hopper/medium-replay": (1, 50), "hopper/medium-expert": (5, None),
        "walker2d/medium": (1, None), "walker2d/medium-replay": (5, 50), "walker2d/medium-expert": (5, 50),
        "maze2d/umaze": (3, None), "maze2d/medium": (3, 50), "maze2d/large": (3, 50), "door/expert": (3, None),
        "pen/cloned": (1, None), "pen/expert": (3, 50), "pen/human": (3, None),
    }.items()
    for dataset in (f"{name}-v0", *(f"d4rl/{name.replace('/', '-')}-v{version}" for version in (0, 1, 2)))
}  # fmt: skip
RANGES = {  # of settings: from, to; other whole numbers begin at 1, all other numbers at 0
    "seed": (0, math.inf), "num_threads": (0, math.inf), "warm_start_updates": (0, math.inf),
    "gamma": (0, 1), "tau": (0, 1), "real_ratio": (0, 1), "momentum": (0, 0.999),
}  # fmt: skip


# --- Networks ---
class Linears(nn.Module):
    """`num` linear layers side by side: (num, batch, in_dim) -> (num, batch, out_dim)."""

    def __init__(self, num: int, in_dim: int, out_dim: int):
        super().__init__()
        bound = 1 / math.sqrt(in_dim)
        self.weight = nn.Parameter(torch.empty(num, in_dim, out_dim).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(num, 1, out_dim).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x, self.weight) + self.bias


class Critic(nn.Module):
    """Twin Q functions in one batched product: (batch, obs_dim), (batch, action_dim) -> (2, batch)."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        sizes = [obs_dim + action_dim, 400, 300]
        layers = [layer for i, o in zip(sizes[:-1], sizes[1:]) for layer in (Linears(2, i, o), nn.LeakyReLU())]
        self.net = nn.Sequential(*layers, Linears(2, 300, 1))

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        return self.net(torch.cat([obs, action], dim=-1).expand(2, -1, -1)).squeeze(-1)


class Actor(nn.Module):
    """Implicit policy: noise, drawn by the caller, goes in beside the observation and may shape any distribution."""

    def __init__(self, obs_dim: int, action_dim: int, noise_dim: int | None = None):
        super().__init__()
        self.noise_dim = noise_dim or max(1, min(10, obs_dim // 2))
        sizes = [obs_dim + self.noise_dim, 400, 300]
        layers = [layer for i, o in zip(sizes[:-1], sizes[1:]) for layer in (nn.Linear(i, o), nn.LeakyReLU())]
        self.net = nn.Sequential(*layers, nn.Linear(300, action_dim))

    def forward(self, obs: Tensor, noise: Tensor) -> Tensor:
        """(batch, obs_dim), standard normal (batch, noise_dim) -> x (batch, action_dim); tanh(x) is the action"""
        return self.net(torch.cat([obs, noise.clamp(-3, 3)], dim=-1))

    def act(self, obs: Tensor) -> Tensor:
        """The deterministic policy: (batch, obs_dim) -> (batch, action_dim)"""
        return torch.tanh(self(obs, obs.new_zeros(len(obs), self.noise_dim)))  # [3]


class Discriminator(nn.Module):
    """(batch, obs_dim + action_dim) -> (batch,): the logit of "logged", or Wasserstein's potential."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        sizes = [obs_dim + action_dim, 400, 300]
        layers = [layer for i, o in zip(sizes[:-1], sizes[1:]) for layer in (nn.Linear(i, o), nn.LeakyReLU())]
        self.net = nn.Sequential(*layers, nn.Linear(300, 1))

    def forward(self, pairs: Tensor) -> Tensor:
        return self.net(pairs).squeeze(-1)


class SkippingAdam(nn.Module):
    """Kingma & Ba 2015 as in the other scripts, with a beta_1 of choice; a step can be left out inside the graph."""

    def __init__(self, params: list[Tensor], lr: float, beta: float = 0.9):
        super().__init__()
        self.params, self.lr, self.beta = params, lr, beta
        # parameters without gradient, so that they are saved and moved with the rest
        self.mean, self.square = (nn.ParameterList(torch.zeros_like(p) for p in params) for _ in range(2))
        self.requires_grad_(False)
        self.register_buffer("step", torch.tensor(0.0))

    def minimize(self, loss: Tensor, take: Tensor) -> None:
        """take: bool scalar; where it is False nothing changes, whatever the gradients are."""
        grads = torch.autograd.grad(loss, self.params)
        with torch.no_grad():
            self.step += take
            c1, c2 = 1 - self.beta**self.step, 1 - 0.999**self.step
            for p, g, m, v in zip(self.params, grads, self.mean, self.square, strict=True):
                m.copy_(torch.where(take, m.lerp(g, 1 - self.beta), m))
                v.copy_(torch.where(take, v.lerp(g.square(), 0.001), v))
                p.sub_(torch.where(take, self.lr * (m / c1) / ((v / c2).sqrt() + 1e-8), 0.0))


class Agent(nn.Module):
    """Everything that training changes: networks, running numbers, optimizers. Its state_dict makes a checkpoint."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.actor = Actor(obs_dim, action_dim, args.noise_dim)
        self.critic = Critic(obs_dim, action_dim)
        self.discriminator = Discriminator(obs_dim, action_dim)
        self.target_actor = copy.deepcopy(self.actor).requires_grad_(False)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.actor_opt = SkippingAdam(list(self.actor.parameters()), args.actor_lr, args.momentum)
        self.critic_opt = SkippingAdam(list(self.critic.parameters()), args.critic_lr)
        adversary = list(self.discriminator.parameters())
        self.discriminator_opt = SkippingAdam(adversary, args.discriminator_lr, args.momentum)
        self.register_buffer("reward_range", torch.tensor([-math.inf, math.inf]))  # of the data
        self.register_buffer("q_average", torch.tensor(0.0))  # Qbar; 0: no batch yet
        self.register_buffer("loss_limit", torch.tensor(1_000.0))  # of the critic [SDM-GAN code]
        self.register_buffer("losses", torch.zeros(1_000))  # of its last updates


# --- The method ---
#     s~ = s + clip( sigma eps, -0.05, 0.05 ),   eps ~ N(0, 1)
def jitter(obs: Tensor, noise: Tensor, noise_scale: float) -> Tensor:
    """obs: (batch, obs_dim), noise: (..., batch, obs_dim). Returns as noise."""
    return obs + (noise_scale * noise).clamp(-0.05, 0.05)


#     x = atanh a,   a held off -1 and 1, where x is about -8 and 8
def pre_tanh(action: Tensor) -> Tensor:
    return torch.atanh(action.clamp(-1 + 1e-7, 1 - 1e-7))


#     F = { (s~,x) } u { (s',x') },   x = g(s~,xi),   s' ~ M(s~,tanh x) without gradient,   x' = g(s',xi')
def policy_pairs(actor, dynamics, terminal_fn, obs, alive, obs_noise, noise, order, model_noise, noise_scale: float):
    """obs, obs_noise: (batch, obs_dim), alive: (batch,), noise: (2, batch, noise_dim), the next as in Dynamics.step.

    Returns obs (2 batch, obs_dim), x (2 batch, action_dim) and weight (2 batch,), 0 for pairs that do not count.
    """
    near = jitter(obs, obs_noise, noise_scale)
    raw = actor(near, noise[0])
    with torch.no_grad():
        action = torch.tanh(raw)
        next_obs, _ = dynamics.step(near, action, order, model_noise)
        next_alive = alive * (~terminal_fn(near, action, next_obs)).to(alive.dtype)
    next_raw = actor(next_obs, noise[1])
    return torch.cat([near, next_obs]), torch.cat([raw, next_raw]), torch.cat([alive, next_alive])  # [4]


def mean_over(weight: Tensor, value: Tensor) -> Tensor:
    """Of the rows that count: both (rows,), weight 0 or 1."""
    assert weight.shape == value.shape
    return (weight * value).sum() / weight.sum().clamp(min=1)


#     js:            L_G = - mean_F log D,   D = sigmoid(logit)
#     wasserstein:   L_G = - mean_F D
def generator_loss(fake: Tensor, weight: Tensor, gan: str) -> Tensor:
    """fake: of the discriminator, (rows,)."""
    return -mean_over(weight, F.logsigmoid(fake) if gan == "js" else fake)


#     js:            L_D = 1/2 mean_T [ - y log D - (1 - y) log(1 - D) ] + 1/2 mean_F [ - log(1 - D) ],   y ~ U[0.8, 1)
def js_loss(real: Tensor, fake: Tensor, weight: Tensor, label: Tensor) -> Tensor:
    """All (rows,); real, fake: logits, label: y."""
    real_loss = F.binary_cross_entropy_with_logits(real, label, reduction="none")
    fake_loss = F.binary_cross_entropy_with_logits(fake, torch.zeros_like(fake), reduction="none")
    return 0.5 * (mean_over(weight, real_loss) + mean_over(weight, fake_loss))


#     wasserstein:   L_D = - mean_T D + mean_F D + 10 mean ( |grad D(z)| - 1 )^2,   z = u t + (1 - u) f,   u ~ U[0, 1)
def wasserstein_loss(real: Tensor, fake: Tensor, weight: Tensor, penalty: Tensor, penalty_weight: float) -> Tensor:
    """All (rows,); penalty: `gradient_penalty` at z."""
    return mean_over(weight, fake - real + penalty_weight * penalty)


def gradient_penalty(discriminator, pairs: Tensor) -> Tensor:
    """(rows, obs_dim + action_dim) -> (rows,)"""
    pairs = pairs.detach().requires_grad_()
    slope = torch.autograd.grad(discriminator(pairs).sum(), pairs, create_graph=True)[0].norm(dim=-1)  # (rows,)
    return (slope - 1).square()


#     q = mean_k [ 0.75 min_j Q'_j(s~_k,a_k) + 0.25 max_j Q'_j(s~_k,a_k) ],   a_k ~ pi'(.|s~_k),   0 where |q| >= 2000
#     s~_1 .. s~_K-1 as above around s',   s~_K = s'
def bootstrapped_value(target_critic, target_actor, next_obs, obs_noise, noise, noise_scale: float) -> Tensor:
    """next_obs: (batch, obs_dim), obs_noise: (K - 1, batch, obs_dim), noise: (K, batch, noise_dim). Returns (batch,)"""
    near = torch.cat([jitter(next_obs, obs_noise, noise_scale), next_obs[None]]).flatten(0, 1)  # (K batch, obs_dim)
    q = target_critic(near, torch.tanh(target_actor(near, noise.flatten(0, 1))))  # (2, K batch)
    q = (0.75 * q.amin(dim=0) + 0.25 * q.amax(dim=0)).unflatten(0, noise.shape[:2]).mean(dim=0)  # (batch,)
    return torch.where(q.abs() < 2_000, q, 0.0)


#     r in [ min r - 3 std r, max r + 3 std r ]
def reward_range(reward: Tensor) -> Tensor:
    """The data's rewards (rows,) -> (2,)"""
    return torch.stack([reward.min() - 3 * reward.std(), reward.max() + 3 * reward.std()])


#     limit <- 0.95 limit + 0.05 ( mean + 3 std of the last losses )
def next_loss_limit(limit: Tensor, losses: Tensor) -> Tensor:
    return 0.95 * limit + 0.05 * (losses.mean() + 3 * losses.std(correction=0))


#     rho = max( rho_end, 1 - 0.1 floor( updates after the warm start / interval ) )
def real_share(update: int, args: Args) -> float:
    """update: from 1."""
    drops = max(0, update - 1 - args.warm_start_updates) // args.real_ratio_interval
    return max(args.real_ratio, 1 - 0.1 * drops)


class BestOfCandidates(nn.Module):
    """The policy at evaluation where num_candidates is not 1; the noise is the same in every state."""

    def __init__(self, critic: Critic, actor: Actor, noise: Tensor):
        super().__init__()
        self.critic, self.actor = critic, actor
        self.register_buffer("noise", noise)  # (num_candidates, noise_dim)

    def act(self, obs: Tensor) -> Tensor:
        """(batch, obs_dim) -> (batch, action_dim)"""
        candidates = obs.expand(len(self.noise), -1, -1).flatten(0, 1)  # (num_candidates batch, obs_dim)
        action = torch.tanh(self.actor(candidates, self.noise.repeat_interleave(len(obs), dim=0)))
        best = self.critic(candidates, action)[0].view(-1, len(obs)).argmax(dim=0)  # (batch,)
        return action.view(-1, len(obs), action.shape[-1])[best, torch.arange(len(obs), device=obs.device)]


# --- Losses ---
#     y   = clip(r) + gamma (1 - d) q(s')
#     L_Q = sum_j mean H( Q_j(s,a) - y ),   H: squared error / 2, linear beyond 500
def critic_loss(critic, target_critic, target_actor, batch, obs_noise, noise, gamma, noise_scale, reward_range):
    obs, action, reward, next_obs, terminal = batch
    with torch.no_grad():
        next_q = bootstrapped_value(target_critic, target_actor, next_obs, obs_noise, noise, noise_scale)
        target_q = reward.clamp(*reward_range) + gamma * (1 - terminal) * next_q
    q = critic(obs, action)  # (2, batch)
    assert target_q.shape == q.shape[1:]
    loss = F.huber_loss(q, target_q.expand_as(q), reduction="none", delta=500.0).mean(dim=1).sum()
    return loss, {"q": q.mean().detach()}


#     L_pi = - c mean min_j Q_j(s,pi(s)) / Qbar + L_G,   in the warm start L_G
def actor_loss(q: Tensor, q_average: Tensor, loss_g: Tensor, warm: Tensor, q_coef: float):
    """q: min_j Q_j(s,pi(s)), (batch,); q_average: Qbar, without gradient; warm: bool scalar"""
    loss = loss_g - torch.where(warm, 0.0, q_coef / q_average) * q.mean()
    return loss, {"generator_loss": loss_g.detach()}


# --- Update: rows, state_rows (batch, 2 obs_dim + action_dim + 2), logged_rows (2 batch, ...) as in `flat_rows` ---
def draw_noise(actor: Actor, obs_dim: int, args: Args, device: torch.device) -> list[Tensor]:
    """For the critic's target, for the policy's value, for the pairs, for the discriminator's loss."""
    batch, k = args.batch_size, args.num_bootstrap
    target = [torch.randn(k - 1, batch, obs_dim, device=device), torch.randn(k, batch, actor.noise_dim, device=device)]
    value = [torch.randn(batch, actor.noise_dim, device=device)]
    pairs = [torch.randn(batch, obs_dim, device=device), torch.randn(2, batch, actor.noise_dim, device=device)]
    pairs += [torch.randperm(batch, device=device), torch.randn(batch, obs_dim + 1, device=device)]
    return [*target, *value, *pairs, torch.rand(2 * batch, device=device)]


def update(agent: Agent, dynamics, terminal_fn, rows, state_rows, logged_rows, warm, *noise, improve: bool, args: Args):
    """warm: bool scalar, in the warm start; noise: `draw_noise`; improve: also the policy, one in policy_interval."""
    target_obs_noise, target_noise, value_noise, *pair_noise, uniform = noise
    obs_dim, always = pair_noise[0].shape[-1], torch.ones_like(warm)
    action_dim = rows.shape[1] - 2 * obs_dim - 2
    obs, action, reward, next_obs, terminal = rows.split([obs_dim, action_dim, 1, obs_dim, 1], dim=-1)
    batch = [obs, action, reward.squeeze(-1), next_obs, terminal.squeeze(-1)]
    # critic
    nets = agent.critic, agent.target_critic, agent.target_actor
    method = target_obs_noise, target_noise, args.gamma, args.noise_scale, agent.reward_range
    loss_q, info_q = critic_loss(*nets, batch, *method)
    agent.critic_opt.minimize(loss_q, ~warm & (loss_q < agent.loss_limit))
    # pairs of the policy and of the data
    state_obs, alive = state_rows[:, :obs_dim], 1 - state_rows[:, -1]
    nets = agent.actor, dynamics, terminal_fn
    fake_obs, raw, weight = policy_pairs(*nets, state_obs, alive, *pair_noise, args.noise_scale)
    logged_obs, logged_action = logged_rows[:, :obs_dim], logged_rows[:, obs_dim : obs_dim + action_dim]
    if args.discriminator_input == "raw":
        fake_pairs, real_pairs = torch.cat([fake_obs, raw], -1), torch.cat([logged_obs, pre_tanh(logged_action)], -1)
    else:
        fake_pairs, real_pairs = torch.cat([fake_obs, torch.tanh(raw)], -1), torch.cat([logged_obs, logged_action], -1)
    # actor
    loss_g = generator_loss(agent.discriminator(fake_pairs), weight, args.gan)
    q = agent.critic(obs, torch.tanh(agent.actor(obs, value_noise))).amin(dim=0)  # (batch,)
    q_size = q.abs().mean().detach()
    q_average = torch.where(agent.q_average > 0, agent.q_average, q_size)
    loss_pi, info_pi = actor_loss(q, q_average, loss_g, warm, args.q_coef)
    slope = torch.full_like(q_size, math.nan)
    if improve:
        slope = torch.autograd.grad(loss_g, raw, retain_graph=True)[0].norm()  # what the policy learns from D
        agent.actor_opt.minimize(loss_pi, always)
    # discriminator
    fake_pairs = fake_pairs.detach()
    real, fake = agent.discriminator(real_pairs), agent.discriminator(fake_pairs)
    if args.gan == "js":
        loss_d = js_loss(real, fake, weight, 0.8 + 0.2 * uniform)
        middle = math.log(0.45 / 0.55)  # D where both are alike: half the labels' mean
    else:
        penalty = gradient_penalty(agent.discriminator, torch.lerp(fake_pairs, real_pairs, uniform[:, None]))
        loss_d = wasserstein_loss(real, fake, weight, penalty, args.penalty_weight)
        middle = 0.5 * (mean_over(weight, real) + mean_over(weight, fake))
    agent.discriminator_opt.minimize(loss_d, always)
    # targets and running numbers
    with torch.no_grad():
        for name in ("critic", "actor"):
            net, target_net = getattr(agent, name), getattr(agent, f"target_{name}")
            for target, param in zip(target_net.parameters(), net.parameters(), strict=True):
                target.lerp_(param, args.tau)
        agent.q_average.copy_(q_average.lerp(q_size, args.tau))
        agent.losses.copy_(torch.cat([agent.losses[1:], loss_q[None]]))
        accuracy = {"real_accuracy": mean_over(weight, (real > middle).float())}
        accuracy |= {"fake_accuracy": mean_over(weight, (fake <= middle).float())}
    losses = {"critic_loss": loss_q, "actor_loss": loss_pi, "discriminator_loss": loss_d}
    info = {name: loss.detach() for name, loss in losses.items()} | info_q | info_pi | accuracy
    return info | {"generator_slope": slope, "q_average": q_average, "skipped": (loss_q >= agent.loss_limit).float()}


# --- Model rollouts ---
def flat_rows(data: OfflineDataset) -> Tensor:
    """One row per transition (num_rows, 2 obs_dim + action_dim + 2): a batch is then a single index_select."""
    return torch.cat([data.obs, data.action, data.reward[:, None], data.next_obs, data.terminal[:, None]], dim=-1)


class ModelBuffer:
    """The newest `capacity` simulated transitions, as flat rows in a ring."""

    def __init__(self, capacity: int, width: int, device: torch.device):
        self.rows = torch.zeros(capacity, width, device=device)
        self.position = self.size = 0

    def add(self, rows: Tensor) -> None:
        """rows: (num <= capacity, width)"""
        index = (self.position + torch.arange(len(rows), device=rows.device)) % len(self.rows)
        self.rows[index] = rows
        self.position = (self.position + len(rows)) % len(self.rows)
        self.size = min(self.size + len(rows), len(self.rows))

    def state(self) -> dict:
        return {"rows": self.rows[: self.size].clone(), "position": self.position}

    def restore(self, state: dict) -> None:
        if len(state["rows"]) > len(self.rows):
            raise InputError("more simulated rows in the checkpoint than fit: resume with its rollout settings")
        rows, position = state["rows"], state["position"]
        if position < len(rows) < len(self.rows):  # a full ring, and a larger one now: the oldest to the front
            rows, position = rows.roll(-position, dims=0), len(rows)
        self.size, self.position = len(rows), position % len(self.rows)
        self.rows[: self.size] = rows


def sample_batch(real_rows: Tensor, buffer: ModelBuffer, real_ratio: float, args: Args) -> Tensor:
    """batch_size flat rows, the first real_ratio of them real."""
    num_real = int(real_ratio * args.batch_size)  # rounded down [MOPO code]
    real = torch.randint(len(real_rows), (num_real,), device=real_rows.device)
    model = torch.randint(max(buffer.size, 1), (args.batch_size - num_real,), device=real_rows.device)
    return torch.cat([real_rows.index_select(0, real), buffer.rows.index_select(0, model)])


@torch.no_grad()
def rollout(dynamics: Dynamics, actor: Actor, terminal_fn: Callable, starts: Tensor, args: Args):
    """From each start (batch, obs_dim) h steps, or up to the first terminal.

    Returns the transitions as flat rows (num, 2 obs_dim + action_dim + 2).
    """
    rows, shared = [], args.rollout_action == "shared"
    # on a CPU a thousand rows at a time, so that the ensemble's activations stay in its cache
    for obs in starts.split(2_048 if shared else len(starts) if starts.is_cuda else 1_000):
        for _ in range(args.rollout_length):
            action = torch.tanh(actor(obs, torch.randn(len(obs), actor.noise_dim, device=obs.device)))
            action = action[:1].expand_as(action) if shared else action  # [1]
            # every row is simulated by one elite, drawn anew at each step
            order = torch.randperm(len(obs), device=obs.device)
            noise = torch.randn(len(obs), obs.shape[1] + 1, device=obs.device)
            next_obs, reward = dynamics.step(obs, action, order, noise)  # [2]
            terminal = terminal_fn(obs, action, next_obs)
            rows.append(torch.cat([obs, action, reward[:, None], next_obs, terminal.float()[:, None]], dim=-1))
            obs = next_obs[~terminal]
    return torch.cat(rows)


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
    if args.num_updates <= args.warm_start_updates:
        print("warm start  all of it: the critic will learn nothing, lower --warm-start-updates")
    saturated = (data.action.abs() > 0.999).float().mean().item()
    print(f"saturated   {saturated:.1%} of the logged actions' numbers lie within 0.001 of a bound")
    real_rows, obs_dim, action_dim = flat_rows(data), data.obs.shape[1], data.action.shape[1]
    envs = make_envs(data, args.eval_episodes)
    terminal_fn = termination_fn(args.termination, data, args.seed)
    ensemble = {"num_members": args.num_members, "num_elites": args.num_elites, "max_epochs": args.dynamics_max_epochs}
    dynamics = load_or_fit(data, args.seed, **ensemble, path=args.dynamics, compile=lambda f: compiled(f, args, device))

    # agent
    agent = Agent(obs_dim, action_dim, args).to(device)
    agent.reward_range.copy_(reward_range(data.reward))
    model = agent, dynamics, terminal_fn
    steps = [
        compiled(lambda *inputs, improve=i: update(*model, *inputs, improve=improve, args=args), args, device)
        for i in (False, True)
    ]
    policy, warm = agent.actor, {flag: torch.tensor(flag, device=device) for flag in (True, False)}
    if args.num_candidates > 1:
        generator = torch.Generator().manual_seed(args.seed)
        noise = torch.randn(args.num_candidates, agent.actor.noise_dim, generator=generator).to(device)
        policy = BestOfCandidates(agent.critic, agent.actor, noise)
    rows_per_rollout = args.rollout_batch_size * args.rollout_length
    buffer = ModelBuffer(args.rollout_retain * rows_per_rollout, real_rows.shape[1], device)
    progress = {"update": 0, "seconds": 0.0, "history": []}
    if args.resume and (run / "checkpoint.pt").exists():
        progress = load_checkpoint(run, agent, data)
        buffer.restore(progress.pop("buffer"))
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
        after = i - 1 - args.warm_start_updates
        if after >= 0 and after % args.rollout_interval == 0:  # [5]
            starts = data.obs[torch.randint(len(data.obs), (args.rollout_batch_size,), device=device)]
            buffer.add(rollout(dynamics, agent.actor, terminal_fn, starts, args))
        share = real_share(i, args)
        batches = [sample_batch(real_rows, buffer, share, args) for _ in range(2)]
        batches += [real_rows.index_select(0, torch.randint(len(real_rows), (2 * args.batch_size,), device=device))]
        noise = draw_noise(agent.actor, obs_dim, args, device)
        info = steps[i % args.policy_interval == 0](*batches, warm[after < 0], *noise)
        if i % len(agent.losses) == 0:
            agent.loss_limit.copy_(next_loss_limit(agent.loss_limit, agent.losses))
        bar.update()
        if i % args.eval_interval == 0 or i == args.num_updates:
            updates_per_second = (i - mark[0]) / (time.monotonic() - mark[1])
            returns = evaluate(policy, envs, data, [args.seed, i]) if envs else np.array([math.nan])
            row = {"update": i, "seconds": time.monotonic() - start, "updates_per_second": updates_per_second}
            row |= {"return_mean": returns.mean().item(), "return_std": returns.std().item()}
            row |= {"normalised_score": float(data.normalised_score(returns.mean())), "model_buffer_size": buffer.size}
            row |= {"real_share": share}
            history.append(row | {name: value.item() for name, value in info.items()})
            write_progress(run, writer, history)
            bar.write(
                f"update {i:>9,}  return {returns.mean():8.1f} ± {returns.std():<6.1f}  normalised "
                f"{row['normalised_score']:6.1f}  q {info['q']:8.1f}  "
                f"D right {info['real_accuracy']:.0%} {info['fake_accuracy']:.0%}"
            )
            mark = i, time.monotonic()
        if stop or i % args.checkpoint_interval == 0 or i == args.num_updates:
            progress |= {"update": i, "seconds": time.monotonic() - start}
            save_checkpoint(run, agent, data, progress | {"buffer": buffer.state()})
        if stop:
            bar.close()
            print(f"stopped     after {i:,} updates; to go on: python {sys.argv[0]} --resume {run}")
            sys.exit(130)
    bar.close()

    # what came out
    box = {"action_low": torch.as_tensor(data.action_low), "action_high": torch.as_tensor(data.action_high)}
    save(run / "policy.pt", {"actor": policy.state_dict(), **box, "config": (run / "config.json").read_text()})
    if envs and history:
        last, behaviour = history[-args.score_evals :], data.episode_returns.mean()
        score = np.mean([row["return_mean"] for row in last])
        last_mean, data_mean = f"mean of the last {len(last)} evaluations", "mean of the data's episodes"
        for name, value, what in (("score", score, last_mean), ("behaviour", behaviour, data_mean)):
            print(f"{name:<11} {value:.1f} (normalised {data.normalised_score(value):.1f}), {what}")
    if envs and args.displace:
        displace(run, policy, envs, data, args)
    if envs and args.capture_video:
        film(policy, data, run / "video.gif")
    print(f"run         {run}\ncurves      tensorboard --logdir {args.run_dir}")


if __name__ == "__main__":
    try:
        main(*read_args())
    except InputError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped: the same command starts again and reuses what is cached")
