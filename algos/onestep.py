"""One-step: Offline RL Without Off-Policy Evaluation (Brandfonbrener et al. 2021, arXiv:2106.08909)

No model, and no policy but the data's is ever evaluated. Q is that of the behaviour, by SARSA on consecutive rows:

    L_Q = sum_j mean ( Q_j(s,a) - r - gamma (1 - d) Q'_j(s',a') )^2,   a' logged        critic_loss()

Then Q stays as it is and the policy improves on the behaviour once: as far as a KL divergence from it is worth
(reverse-kl), by imitating the better actions (exp-weights), or by taking the best of a few of its actions (easy-bcq).
Departures: [1] Twin Q, each with its own target; where a policy is improved, the smaller one (the authors' double-Q).
[2] The policy starts as the behaviour model, whose divergence is in closed form, not sampled. [3] Rewards are scaled as
in iql.py, so that one coefficient means the same in every dataset. [4] The noise of easy-bcq's candidates is fixed, so
that acting is deterministic.
Run: python algos/onestep.py
     python algos/onestep.py --dataset hopper_medium-v2.hdf5 --env-id Hopper-v5
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
from common.dynamics import rounds_products, save  # noqa: E402
from common.pretrain import load_or_train  # noqa: E402

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
    # --- SARSA ---
    hidden_layers: int = 2  # of 256 units, in actor and critics
    gamma: float = 0.99  # discount per environment step
    tau: float = 0.005  # Polyak step of the target critic
    actor_lr: float = 1e-4  # [one-step code]
    critic_lr: float = 3e-4  # [one-step code: 1e-4, with 2M updates]
    # --- The method ---
    improvement: Literal["reverse-kl", "exp-weights", "easy-bcq"] = "reverse-kl"  # of the behaviour, by its Q
    policy_share: float = 0.25  # of the updates, the last ones: of the policy, with Q as it is; easy-bcq has none
    kl_coef: float = 1.0  # c, of reverse-kl [one-step code, by dataset]
    inverse_temperature: float = 3.0  # w, of exp-weights; 0 is behaviour cloning
    max_weight: float = 100.0  # of a row in the imitation [one-step code]
    num_samples: int = 10  # actions of the behaviour: candidates of easy-bcq, or for V of exp-weights
    reward_scale: Literal["returns", "none"] = "returns"  # returns: 1000 / (best - worst episode) [3]
    behaviour_updates: int = 50_000  # of pi_b
    behaviour_lr: float = 3e-4  # of pi_b's fit


TUNED = {  # for the embedded default a run of a minute; elsewhere the defaults
    "pendulum/random-v0": dict(
        num_updates=6_000, eval_interval=500, score_evals=3, checkpoint_interval=3_000, actor_lr=3e-4,
        behaviour_updates=5_000,
    ),
}  # fmt: skip
RANGES = {  # of settings: from, to; other whole numbers begin at 1, all other numbers at 0
    "seed": (0, math.inf), "num_threads": (0, math.inf), "gamma": (0, 1), "tau": (0, 1), "policy_share": (0, 1),
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
    """Everything that training changes: networks and optimizers. Its state_dict makes a checkpoint."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.actor = Actor(obs_dim, action_dim, args.hidden_layers)
        self.critic = Critic(obs_dim, action_dim, args.hidden_layers)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.actor_opt = Adam(list(self.actor.parameters()), args.actor_lr)
        self.critic_opt = Adam(list(self.critic.parameters()), args.critic_lr)


# --- The method ---
#     pi(.|s) = tanh N( mu(s), sigma(s)^2 )
def gaussian(actor: Actor, obs: Tensor) -> tuple[Tensor, Tensor]:
    """The policy before tanh: mean and log_std (batch, action_dim)."""
    mean, log_std = actor.net(obs).chunk(2, dim=-1)
    return mean, log_std.clamp(-5, 2)


def action_log_prob(actor: Actor, obs: Tensor, action: Tensor) -> Tensor:
    """(batch, obs_dim), (batch, action_dim) in [-1, 1] -> (batch,)"""
    x = action.clamp(-0.999, 0.999).atanh()  # at the bounds themselves it would be infinite
    mean, log_std = gaussian(actor, obs)
    log_normal = -0.5 * ((x - mean) / log_std.exp()).square() - log_std - 0.5 * math.log(2 * math.pi)
    log_det_tanh = 2 * (math.log(2) - x - F.softplus(-2 * x))
    return (log_normal - log_det_tanh).sum(dim=-1)


#     KL( N_1 || N_2 ) = log(sigma_2 / sigma_1) + [ sigma_1^2 + (mu_1 - mu_2)^2 ] / (2 sigma_2^2) - 1/2
def gaussian_kl(mean: Tensor, log_std: Tensor, other_mean: Tensor, other_log_std: Tensor) -> Tensor:
    """Per dimension, the shape of the arguments. A tanh of both variables does not change it."""
    variance, other_variance = (2 * log_std).exp(), (2 * other_log_std).exp()
    return other_log_std - log_std + (variance + (mean - other_mean).square()) / (2 * other_variance) - 0.5


#     L_pi = mean [ - min_j Q_j(s,a) + c KL( pi(.|s) || pi_b(.|s) ) ],   a ~ pi(.|s) reparameterised     [1, 2]
def reverse_kl_loss(critic, actor: Actor, behaviour: Actor, obs: Tensor, noise: Tensor, kl_coef: float):
    action, _ = actor(obs, noise)
    q = critic(obs, action).amin(dim=0)  # (batch,)
    kl = gaussian_kl(*gaussian(actor, obs), *gaussian(behaviour, obs)).sum(dim=-1)
    assert q.shape == kl.shape
    return (kl_coef * kl - q).mean(), {"q": q.mean().detach()}


#     L_pi = - mean min( exp[ w (min_j Q_j(s,a) - V(s)) ], max weight ) log pi(a|s),   V(s) = mean_k min_j Q_j(s,a_k)
def exp_weights_loss(critic, actor: Actor, behaviour: Actor, obs, action, noise, inverse_temperature, max_weight):
    """noise: (num_samples, batch, action_dim), of the a_k ~ pi_b(.|s)"""
    with torch.no_grad():
        candidates, _ = behaviour(obs, noise)  # (num_samples, batch, action_dim)
        v = critic(obs.expand(len(noise), -1, -1).flatten(0, 1), candidates.flatten(0, 1)).amin(dim=0)
        q = critic(obs, action).amin(dim=0)  # (batch,)
        weight = (inverse_temperature * (q - v.view(len(noise), -1).mean(dim=0))).exp().clamp(max=max_weight)
    return -(weight * action_log_prob(actor, obs, action)).mean(), {"q": q.mean()}


#     pi(s) = argmax_k min_j Q_j(s,a_k),   a_k ~ pi_b(.|s)
class EasyBCQ(nn.Module):
    """The policy of easy-bcq: no network of its own."""

    def __init__(self, critic: Critic, behaviour: Actor, noise: Tensor):
        super().__init__()
        self.critic, self.behaviour = critic, behaviour
        self.register_buffer("noise", noise)  # (num_samples, 1, action_dim), the same in every state [4]

    def act(self, obs: Tensor) -> Tensor:
        """(batch, obs_dim) -> (batch, action_dim)"""
        candidates, _ = self.behaviour(obs, self.noise.expand(-1, len(obs), -1))  # (num_samples, batch, action_dim)
        q = self.critic(obs.expand(len(candidates), -1, -1).flatten(0, 1), candidates.flatten(0, 1)).amin(dim=0)
        best = q.view(len(candidates), -1).argmax(dim=0)  # (batch,)
        return candidates[best, torch.arange(len(obs), device=obs.device)]


# --- Losses: SARSA ---
#     L_Q = sum_j mean ( Q_j(s,a) - r - gamma (1 - d) Q'_j(s',a') )^2                  [1]
def critic_loss(critic, target_critic, batch, next_action: Tensor, gamma: float):
    obs, action, reward, next_obs, terminal = batch
    with torch.no_grad():
        target_q = reward + gamma * (1 - terminal) * target_critic(next_obs, next_action)  # (2, batch)
    q = critic(obs, action)
    assert target_q.shape == q.shape
    return (q - target_q).square().mean(dim=1).sum(), {"q": q.mean().detach()}


# --- Update: rows (batch, 2 obs_dim + 2 action_dim + 2) as in `sarsa_rows`, noise (num_samples, batch, action_dim) ---
def update(agent: Agent, behaviour: Actor, rows: Tensor, noise: Tensor, improve: bool, args: Args) -> dict[str, Tensor]:
    """improve: the policy, by the critic as it is; else the critic."""
    action_dim = noise.shape[-1]
    obs_dim = (rows.shape[1] - 2 * action_dim - 2) // 2
    columns = rows.split([obs_dim, action_dim, 1, obs_dim, 1, action_dim], dim=-1)
    obs, action, reward, next_obs, terminal, next_action = columns
    with torch.no_grad():
        kl = gaussian_kl(*gaussian(agent.actor, obs), *gaussian(behaviour, obs)).sum(dim=-1).mean()
    info = {"critic_loss": torch.full_like(kl, math.nan), "actor_loss": torch.full_like(kl, math.nan), "kl": kl}
    # actor
    if improve:
        nets = agent.critic, agent.actor, behaviour
        if args.improvement == "reverse-kl":
            loss_pi, info_pi = reverse_kl_loss(*nets, obs, noise[0], args.kl_coef)
        else:
            loss_pi, info_pi = exp_weights_loss(*nets, obs, action, noise, args.inverse_temperature, args.max_weight)
        agent.actor_opt.minimize(loss_pi)
        return info | {"actor_loss": loss_pi.detach(), **info_pi}
    # critic
    batch = [obs, action, reward.squeeze(-1), next_obs, terminal.squeeze(-1)]
    loss_q, info_q = critic_loss(agent.critic, agent.target_critic, batch, next_action, args.gamma)
    agent.critic_opt.minimize(loss_q)
    # target critic
    with torch.no_grad():
        for target, param in zip(agent.target_critic.parameters(), agent.critic.parameters(), strict=True):
            target.lerp_(param, args.tau)
    return info | {"critic_loss": loss_q.detach(), **info_q}


# --- Batches ---
def scale_rewards(data: OfflineDataset) -> OfflineDataset:
    """The data with rewards times 1000 / (best - worst return): a coefficient then means the same in every dataset."""
    best, worst = data.episode_returns.max(), data.episode_returns.min()
    if not best > worst:
        raise InputError("all episodes have the same return, rewards cannot be scaled by it: use --reward-scale none")
    return replace(data, reward=data.reward * (1000 / (best - worst)))


def flat_rows(data: OfflineDataset) -> Tensor:
    """One row per transition (num_rows, 2 obs_dim + action_dim + 2): a batch is then a single index_select."""
    return torch.cat([data.obs, data.action, data.reward[:, None], data.next_obs, data.terminal[:, None]], dim=-1)


def sarsa_rows(data: OfflineDataset) -> Tensor:
    """Flat rows with the next logged action behind them, where there is one or, at a terminal, none is needed."""
    next_action, known = data.next_action()
    rows = torch.cat([flat_rows(data), next_action], dim=-1)[known | data.terminal.bool()]
    if not len(rows):
        raise InputError("no two rows of the data follow each other, as SARSA needs: mark where episodes end")
    return rows


def sample_batch(real_rows: Tensor, args: Args) -> Tensor:
    """batch_size flat rows."""
    return real_rows.index_select(0, torch.randint(len(real_rows), (args.batch_size,), device=real_rows.device))


# --- Pre-training ---
def behaviour_model(data: OfflineDataset, args: Args) -> Actor:
    """pi_b(.|s), of the policy's kind, by maximum likelihood of the logged actions."""
    obs_dim, action_dim = data.obs.shape[1], data.action.shape[1]
    return load_or_train(
        "behaviour model",
        lambda: Actor(obs_dim, action_dim, args.hidden_layers),
        lambda net, rows, _: -action_log_prob(net, rows[:, :obs_dim], rows[:, obs_dim:]).mean(),
        torch.cat([data.obs, data.action], dim=-1), 0, data, args.seed, args.behaviour_updates, args.behaviour_lr,
        {"hidden_layers": args.hidden_layers}, lambda function: compiled(function, args, data.obs.device),
    )  # fmt: skip


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

    # data, environment, behaviour model
    data = load_dataset(args.dataset, device, args.env_id or None, args.successors == "classic")
    print(data.summary())
    real_rows = sarsa_rows(scale_rewards(data) if args.reward_scale == "returns" else data)
    obs_dim, action_dim = data.obs.shape[1], data.action.shape[1]
    envs = make_envs(data, args.eval_episodes)
    pi_b = behaviour_model(data, args)

    # agent
    agent = Agent(obs_dim, action_dim, args).to(device)
    agent.actor.load_state_dict(pi_b.state_dict())  # [2]
    steps = [
        compiled(lambda *inputs, improve=i: update(agent, pi_b, *inputs, improve, args), args, device)
        for i in (False, True)
    ]
    policy, first_improvement = agent.actor, args.num_updates - int(args.policy_share * args.num_updates) + 1
    if args.improvement == "easy-bcq":
        noise = torch.randn(args.num_samples, 1, action_dim, generator=torch.Generator().manual_seed(args.seed))
        policy, first_improvement = EasyBCQ(agent.critic, pi_b, noise.to(device)), math.inf
    progress = {"update": 0, "seconds": 0.0, "history": []}
    if args.resume and (run / "checkpoint.pt").exists():
        progress = load_checkpoint(run, agent, data)
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
        noise = torch.randn(args.num_samples, args.batch_size, action_dim, device=device)
        info = steps[i >= first_improvement](sample_batch(real_rows, args), noise)
        bar.update()
        if i % args.eval_interval == 0 or i == args.num_updates:
            updates_per_second = (i - mark[0]) / (time.monotonic() - mark[1])
            returns = evaluate(policy, envs, data, [args.seed, i]) if envs else np.array([math.nan])
            row = {"update": i, "seconds": time.monotonic() - start, "updates_per_second": updates_per_second}
            row |= {"return_mean": returns.mean().item(), "return_std": returns.std().item()}
            row |= {"normalised_score": float(data.normalised_score(returns.mean()))}
            history.append(row | {name: value.item() for name, value in info.items()})
            write_progress(run, writer, history)
            bar.write(
                f"update {i:>9,}  return {returns.mean():8.1f} ± {returns.std():<6.1f}  normalised "
                f"{row['normalised_score']:6.1f}  q {info['q']:8.1f}  kl {info['kl']:.3f}"
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
