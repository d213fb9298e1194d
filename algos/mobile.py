"""MOBILE: Model-Bellman Inconsistency (Sun et al. 2023, openreview.net/forum?id=rwLwGPdzDD)

MOPO makes a policy pay for all that the ensemble is unsure of, whether it matters or not. MOBILE asks what it does to
the value: it lets every elite simulate the same step, values where each of them lands, and penalises how far these
values lie apart:

    U(s,a) = std_i B_i(s,a),   B_i(s,a) = E_{s' ~ T_i, a' ~ pi} [ min_c Q'_c(s',a') ]        bellman_inconsistency()

The critic's target is lower by beta U at simulated rows, with the U of the present target critics: it costs eight times
the rest of the update, and nothing is stored with the rollouts. beta = 0 is offline MBPO, but for [1] and [2].
As in the authors' code, [1] the critic's target has no entropy, [2] on gym-mujoco's sets it is never below 0, [3] the
actor's learning rate falls along a cosine and alpha stays below 1, or is fixed, [4] B_i lacks the reward and gamma of a
backup: what members think of the reward is left out, and beta takes the factor.
Run: python algos/mobile.py
     python algos/mobile.py --dataset hopper_medium-v2.hdf5 --env-id Hopper-v5
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
    batch_size: int = 256  # rows in a gradient step
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
    real_ratio: float = 0.05  # share of real rows in a batch [MOPO]
    rollout_interval: int = 1_000  # updates between rollouts [MOPO]
    rollout_batch_size: int = 50_000  # start states of a rollout, drawn from the data [MOPO]
    rollout_length: int = 5  # h, model steps from each start state [1 or 5, by dataset: TUNED]
    rollout_retain: int = 5  # full rollouts that the model buffer holds [MOPO]
    # --- SAC ---
    hidden_layers: int = 2  # of 256 units, in actor and critics [MOPO]
    gamma: float = 0.99  # discount per environment step
    tau: float = 0.005  # Polyak step of the target critic
    actor_lr: float = 1e-4  # [OfflineRL-Kit; MOPO code: 3e-4]
    actor_lr_schedule: Literal["cosine", "constant"] = "cosine"  # cosine: to zero over the run [3]
    critic_lr: float = 3e-4  # [MOPO code]
    alpha_lr: float = 1e-4  # [OfflineRL-Kit; MOPO code: 3e-4]
    max_alpha: float = 1.0  # upper bound of the temperature [3]; inf: none
    target_entropy: float | None = None  # by default -action_dim
    fixed_alpha: float | None = None  # in place of a learned one, which the settings above are for [3] [TUNED]
    # --- The method ---
    penalty_coef: float = 1.0  # beta [0.1 to 5, by dataset: TUNED]
    num_samples: int = 10  # K, successors of every elite at a row [MOBILE code]
    backup_entropy: bool = False  # in the critic's target [1]
    clamp_target: bool = False  # a critic's target below 0 becomes 0 [2], even where returns are below 0 [TUNED]


TUNED = {  # for the embedded default ours; for D4RL v2, and our sets of that name, those of the authors' code
    "pendulum/random-v0": dict(
        num_updates=6_000, eval_interval=500, score_evals=3, checkpoint_interval=3_000, dynamics_max_epochs=30,
        rollout_batch_size=5_000, penalty_coef=0.5, actor_lr=3e-4, alpha_lr=3e-4, num_samples=2,
    ),
} | {
    dataset: dict(rollout_length=length, penalty_coef=coef, clamp_target=True, **rest)
    for name, (length, coef, rest) in {
        "halfcheetah/random": (5, 0.5, {}),
        "halfcheetah/medium": (5, 0.5, {}),
        "halfcheetah/medium-replay": (5, 0.1, {}),
        "halfcheetah/medium-expert": (5, 1.0, {"real_ratio": 0.5}),
        "hopper/random": (5, 5.0, {}),
        "hopper/medium": (5, 1.5, {"fixed_alpha": 0.2}),
        "hopper/medium-replay": (5, 0.1, {"fixed_alpha": 0.2}),
        "hopper/medium-expert": (5, 1.5, {}),
        "walker2d/random": (5, 2.0, {}),
        "walker2d/medium": (5, 0.5, {"dynamics_max_epochs": 30}),
        "walker2d/medium-replay": (1, 0.5, {}),
        "walker2d/medium-expert": (1, 1.5, {}),
    }.items()
    for dataset in (f"{name}-v0", f"d4rl/{name.replace('/', '-')}-v2")
}  # fmt: skip
RANGES = {  # of settings: from, to; other whole numbers begin at 1, all other numbers at 0
    "seed": (0, math.inf), "num_threads": (0, math.inf), "target_entropy": (-math.inf, math.inf),
    "gamma": (0, 1), "tau": (0, 1), "real_ratio": (0, 1),
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

    def __init__(self, obs_dim: int, action_dim: int, hidden_layers: int = 2, hidden: int = 256):
        super().__init__()
        sizes = [obs_dim + action_dim] + [hidden] * hidden_layers
        layers = [layer for i, o in zip(sizes[:-1], sizes[1:]) for layer in (Linears(2, i, o), nn.ReLU())]
        self.net = nn.Sequential(*layers, Linears(2, hidden, 1))

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        return self.net(torch.cat([obs, action], dim=-1).expand(2, -1, -1)).squeeze(-1)


class Actor(nn.Module):
    """Tanh-squashed Gaussian. The caller draws the standard normal noise, so that acting is a plain function."""

    def __init__(self, obs_dim: int, action_dim: int, hidden_layers: int = 2, hidden: int = 256):
        super().__init__()
        sizes = [obs_dim] + [hidden] * hidden_layers
        layers = [layer for i, o in zip(sizes[:-1], sizes[1:]) for layer in (nn.Linear(i, o), nn.ReLU())]
        self.net = nn.Sequential(*layers, nn.Linear(hidden, 2 * action_dim))

    def forward(self, obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, obs_dim), (..., batch, action_dim) -> action in (-1, 1), as the noise, and log_prob (..., batch)"""
        mean, log_std = self.net(obs).chunk(2, dim=-1)
        log_std = log_std.clamp(-5, 2)
        x = mean + log_std.exp() * noise
        log_normal = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
        log_det_tanh = 2 * (math.log(2) - x - F.softplus(-2 * x))  # log(1 - tanh(x)^2), stable for large |x|
        return torch.tanh(x), (log_normal - log_det_tanh).sum(dim=-1)

    def act(self, obs: Tensor) -> Tensor:
        """The deterministic policy: (batch, obs_dim) -> (batch, action_dim)"""
        return torch.tanh(self.net(obs).chunk(2, dim=-1)[0])


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
    """Everything that training changes: networks, temperature and optimizers. Its state_dict makes a checkpoint."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.actor = Actor(obs_dim, action_dim, args.hidden_layers)
        self.critic = Critic(obs_dim, action_dim, args.hidden_layers)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.tensor(0.0))
        self.actor_opt = Adam(list(self.actor.parameters()), args.actor_lr)
        self.critic_opt = Adam(list(self.critic.parameters()), args.critic_lr)
        self.alpha_opt = Adam([self.log_alpha], args.alpha_lr)


# --- The method: Sec. 4 ---
#     B_i(s,a) = mean_j min_c Q'_c(s'_ij, a'_ij),   s'_ij ~ T_i(.|s,a),  a'_ij ~ pi(.|s'_ij),  j = 1 .. K      [4]
@torch.no_grad()
def member_backups(dynamics, actor, target_critic, obs: Tensor, action: Tensor, noise: Tensor) -> Tensor:
    """noise: standard normal (K, num_elites, rows, obs_dim + 1 + action_dim). Returns B (num_elites, rows)."""
    model_noise, action_noise = noise.split([obs.shape[1] + 1, action.shape[1]], dim=-1)
    next_obs, _ = dynamics.sample_elites(obs, action, model_noise)  # (K, num_elites, rows, obs_dim)
    next_obs, action_noise = next_obs.flatten(0, 2), action_noise.flatten(0, 2)
    next_q = target_critic(next_obs, actor(next_obs, action_noise)[0]).amin(dim=0)  # (K * num_elites * rows,)
    return next_q.view(noise.shape[:3]).mean(dim=0)


#     U(s,a) = std_i B_i(s,a)
def bellman_inconsistency(backups: Tensor) -> Tensor:
    """backups: (num_elites, rows). Returns (rows,)."""
    return backups.std(dim=0)  # by num_elites - 1, as in the authors' code


# --- Losses: SAC ---
#     y   = r - beta U(s,a) + gamma (1 - d) [ min_j Q'_j(s',a') - alpha log pi(a'|s') ],   a' ~ pi(.|s')
#           without the U at logged rows, without alpha's term [1], and y at least 0 [2], as `update` and TUNED have it
#     L_Q = sum_j mean (Q_j(s,a) - y)^2
def critic_loss(critic, target_critic, actor, alpha: Tensor, batch, noise, gamma: float, penalty: Tensor, clamp: bool):
    """penalty: beta U, (batch,)."""
    obs, action, reward, next_obs, terminal = batch
    with torch.no_grad():
        next_action, next_log_prob = actor(next_obs, noise)
        next_q = target_critic(next_obs, next_action).amin(dim=0) - alpha * next_log_prob  # (batch,)
        target_q = reward - penalty + gamma * (1 - terminal) * next_q
        target_q = target_q.clamp(min=0) if clamp else target_q
    q = critic(obs, action)  # (2, batch)
    assert target_q.shape == q.shape[1:] == penalty.shape
    return (q - target_q).square().mean(dim=1).sum(), {"q": q.mean().detach()}


#     L_pi = mean [ alpha log pi(a|s) - min_j Q_j(s,a) ],   a ~ pi(.|s) reparameterised
def actor_loss(critic, actor, alpha: Tensor, obs: Tensor, noise: Tensor):
    action, log_prob = actor(obs, noise)
    q = critic(obs, action).amin(dim=0)  # (batch,)
    return (alpha * log_prob - q).mean(), {"log_prob": log_prob.mean().detach()}


#     L_alpha = - log alpha * mean [ log pi(a|s) + target entropy ]
def alpha_loss(log_alpha: Tensor, log_prob: Tensor, target_entropy: float):
    return -log_alpha * (log_prob + target_entropy), {}


# --- Update: rows (batch, 2 obs_dim + action_dim + 2) as in `flat_rows`, noise (2, batch, action_dim) ---
def update(agent: Agent, dynamics: Dynamics, rows: Tensor, noise: Tensor, model_noise: Tensor, args: Args):
    """model_noise: for `member_backups` of the last rows of the batch, which are simulated."""
    action_dim = noise.shape[-1]
    obs_dim = (rows.shape[1] - action_dim - 2) // 2
    obs, action, reward, next_obs, terminal = rows.split([obs_dim, action_dim, 1, obs_dim, 1], dim=-1)
    batch = [obs, action, reward.squeeze(-1), next_obs, terminal.squeeze(-1)]
    alpha = agent.log_alpha.detach().exp().clamp(max=args.max_alpha)
    alpha = alpha if args.fixed_alpha is None else torch.full_like(alpha, args.fixed_alpha)
    # inconsistency, of simulated rows
    num_real = int(args.real_ratio * len(rows))
    simulated = obs[num_real:], action[num_real:]
    backups = member_backups(dynamics, agent.actor, agent.target_critic, *simulated, model_noise)
    inconsistency = bellman_inconsistency(backups)  # (batch - num_real,)
    penalty = F.pad(args.penalty_coef * inconsistency, (num_real, 0))  # (batch,)
    # critic
    backup_alpha = alpha * args.backup_entropy
    nets = agent.critic, agent.target_critic, agent.actor
    loss_q, info_q = critic_loss(*nets, backup_alpha, batch, noise[0], args.gamma, penalty, args.clamp_target)
    agent.critic_opt.minimize(loss_q)
    info_q["inconsistency"] = inconsistency.mean()
    # actor
    loss_pi, info_pi = actor_loss(agent.critic, agent.actor, alpha, obs, noise[1])
    agent.actor_opt.minimize(loss_pi)
    # temperature
    if args.fixed_alpha is None:
        target_entropy = -action_dim if args.target_entropy is None else args.target_entropy
        agent.alpha_opt.minimize(alpha_loss(agent.log_alpha, info_pi["log_prob"], target_entropy)[0])
    # target critic
    with torch.no_grad():
        for target, param in zip(agent.target_critic.parameters(), agent.critic.parameters(), strict=True):
            target.lerp_(param, args.tau)
    return {"critic_loss": loss_q.detach(), "actor_loss": loss_pi.detach(), "alpha": alpha, **info_q, **info_pi}


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


def sample_batch(real_rows: Tensor, buffer: ModelBuffer, args: Args) -> Tensor:
    """batch_size flat rows, the first real_ratio of them real."""
    num_real = int(args.real_ratio * args.batch_size)  # rounded down [MOPO code]
    real = torch.randint(len(real_rows), (num_real,), device=real_rows.device)
    model = torch.randint(buffer.size, (args.batch_size - num_real,), device=real_rows.device)
    return torch.cat([real_rows.index_select(0, real), buffer.rows.index_select(0, model)])


@torch.no_grad()
def rollout(dynamics: Dynamics, actor: Actor, terminal_fn: Callable, starts: Tensor, args: Args):
    """From each start (batch, obs_dim) h steps, or up to the first terminal.

    Returns the transitions as flat rows (num, 2 obs_dim + action_dim + 2).
    """
    rows = []
    action_dim = actor.net[-1].out_features // 2
    # on a CPU a thousand rows at a time, so that the ensemble's activations stay in its cache
    for obs in starts.split(len(starts) if starts.is_cuda else 1_000):
        for _ in range(args.rollout_length):
            action, _ = actor(obs, torch.randn(len(obs), action_dim, device=obs.device))
            # every row is simulated by one elite, drawn anew at each step
            order = torch.randperm(len(obs), device=obs.device)
            noise = torch.randn(len(obs), obs.shape[1] + 1, device=obs.device)
            next_obs, reward = dynamics.step(obs, action, order, noise)
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
    num_simulated = args.batch_size - int(args.real_ratio * args.batch_size)
    if not num_simulated:
        raise InputError(f"--real-ratio {args.real_ratio} leaves a batch without simulated rows, which pay the penalty")
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
    real_rows, obs_dim, action_dim = flat_rows(data), data.obs.shape[1], data.action.shape[1]
    envs = make_envs(data, args.eval_episodes)
    terminal_fn = termination_fn(args.termination, data, args.seed)
    ensemble = {"num_members": args.num_members, "num_elites": args.num_elites, "max_epochs": args.dynamics_max_epochs}
    dynamics = load_or_fit(data, args.seed, **ensemble, path=args.dynamics, compile=lambda f: compiled(f, args, device))
    if len(dynamics.elites) < 2:
        raise InputError("MOBILE compares elites: give --num-elites above 1, or another file to --dynamics")
    noise_shape = args.num_samples, len(dynamics.elites), num_simulated, obs_dim + 1 + action_dim

    # agent
    agent = Agent(obs_dim, action_dim, args).to(device)
    step = compiled(lambda *inputs: update(agent, dynamics, *inputs, args), args, device)
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
        if (i - 1) % args.rollout_interval == 0:
            starts = data.obs[torch.randint(len(data.obs), (args.rollout_batch_size,), device=device)]
            rows = rollout(dynamics, agent.actor, terminal_fn, starts, args)
            buffer.add(rows)
        if args.actor_lr_schedule == "cosine":  # [3]
            agent.actor_opt.lr.fill_(args.actor_lr * 0.5 * (1 + math.cos(math.pi * (i - 1) / args.num_updates)))
        noise = torch.randn(2, args.batch_size, action_dim, device=device)
        model_noise = torch.randn(noise_shape, device=device)
        info = step(sample_batch(real_rows, buffer, args), noise, model_noise)
        bar.update()
        if i % args.eval_interval == 0 or i == args.num_updates:
            updates_per_second = (i - mark[0]) / (time.monotonic() - mark[1])
            returns = evaluate(agent.actor, envs, data, [args.seed, i]) if envs else np.array([math.nan])
            row = {"update": i, "seconds": time.monotonic() - start, "updates_per_second": updates_per_second}
            row |= {"return_mean": returns.mean().item(), "return_std": returns.std().item()}
            row |= {"normalised_score": float(data.normalised_score(returns.mean())), "model_buffer_size": buffer.size}
            history.append(row | {name: value.item() for name, value in info.items()})
            write_progress(run, writer, history)
            bar.write(
                f"update {i:>9,}  return {returns.mean():8.1f} ± {returns.std():<6.1f}  normalised "
                f"{row['normalised_score']:6.1f}  q {info['q']:8.1f}  inconsistency {info['inconsistency']:.3f}"
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
