"""MOReL: Model-Based Offline Reinforcement Learning (Kidambi et al. 2020, arXiv:2005.05951)

An ensemble of dynamics models is fitted to the data once. Where its members disagree, the data do not tell what would
happen, and there the model is no longer asked: in the pessimistic MDP the episode ends with a penalty (Sec. 4):

    disc(s,a) = max_{i,j} || f_i(s,a) - f_j(s,a) ||_2                          discrepancy()
    (s,a) is unknown where disc(s,a) > mean_D disc + beta * std_D disc         threshold()
    there the reward is -kappa = min_D r - offset, and the episode is over     PessimisticMDP

What a policy earns there is roughly a lower bound of what it earns in truth; each evaluation logs the two side by side.
Rollouts end:      after h steps, where terminal_fn says so, and at an unknown (s,a).
Gradient stops at: the target in critic_loss, the whole rollout; actor_loss moves the actor alone.
Normalised:        the ensemble's inputs and targets; actions to [-1, 1]; observations and rewards are not.
Elites:            the 5 of 7 members with the lowest holdout error (Dynamics.fit); at each step one of them simulates
                   a row, and disc is taken among them.
Departures: [planner] SAC on short rollouts from all states of the data, as in mopo.py with its [entropy] and [cosine],
so that only the pessimism differs; the paper's, a natural policy gradient on long episodes, is morel_npg.py. [elites]
For the same reason Gaussian elites take turns at every step; in the authors' code members are deterministic, asked one
at a time. [halt] The paper's rule; that code has, by default, no penalty, and as threshold max_D disc / 3 (or 0.5).
Run: python algos/morel.py
     python algos/morel.py --dataset hopper_medium-v2.hdf5 --env-id Hopper-v5
"""

import copy
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

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
    num_updates: int = 1_000_000  # gradient steps [1M to 3M in published code]
    batch_size: int = 256  # rows in a gradient step
    # --- Dynamics ---
    dynamics: str = ""  # file of a fitted ensemble; by default the cache is looked up, else it is fitted
    num_members: int = 7  # N, size of the ensemble [MOPO]
    num_elites: int = 5  # members that simulate, the best by holdout error [MOPO]
    dynamics_hidden_size: int = 200  # units in each of its four layers [MOPO]
    dynamics_max_epochs: int | None = None  # of the fit; by default it ends when no member improves
    termination: str = "auto"  # when simulated episodes end: auto, known, forced, learned, none or module:function
    # --- Model rollouts ---
    real_ratio: float = 0.05  # share of real rows in a batch [MOPO]
    rollout_interval: int = 1_000  # updates between rollouts [MOPO]
    rollout_batch_size: int = 50_000  # start states of a rollout, drawn from the data [MOPO]
    rollout_length: int = 5  # h, model steps from each start state [planner] [MOPO: 1 or 5, by dataset]
    rollout_retain: int = 5  # full rollouts that the model buffer holds [MOPO]
    # --- SAC ---
    hidden_sizes: tuple[int, ...] = (256, 256)  # of actor and critics [MOPO]
    gamma: float = 0.99  # discount per environment step
    tau: float = 0.005  # Polyak step of the target critic
    actor_lr: float = 1e-4  # [OfflineRL-Kit; MOPO code: 3e-4]
    actor_lr_schedule: Literal["cosine", "constant"] = "cosine"  # cosine: to zero over the run [cosine]
    critic_lr: float = 3e-4  # [MOPO code]
    alpha_lr: float = 1e-4  # [OfflineRL-Kit; MOPO code: 3e-4]
    max_alpha: float = 1.0  # upper bound of the temperature [cosine]; inf: none
    target_entropy: float | None = None  # by default -action_dim [entropy]
    # --- The method ---
    threshold_coef: float = 5.0  # beta, deviations above the data's mean [ours: 99.5 % of the data are known then]
    halt_offset: float = 50.0  # -kappa lies so far below the data's smallest reward [30 to 200, by dataset: TUNED]
    pessimistic_episodes: int = 50  # in the pessimistic MDP, at each evaluation, from the data's initial states


TUNED = {  # of pendulum ours, of other data the bench's; of D4RL, also for our hopper/medium-v0 etc., J-MOReL's
    "pendulum/random-v0": dict(
        num_updates=5_000, eval_interval=500, score_evals=3, checkpoint_interval=2_500, compile=False,
        hidden_sizes=(64, 64), actor_lr=1e-3, critic_lr=1e-3, alpha_lr=1e-3, rollout_batch_size=5_000,
        dynamics_hidden_size=128, dynamics_max_epochs=15, threshold_coef=3.0, halt_offset=100.0,
    ),
    "other": dict(
        num_updates=120_000, eval_interval=4_000, hidden_sizes=(64, 64),
        rollout_batch_size=5_000, dynamics_hidden_size=128,
    ),
} | {
    f"d4rl/{name}-{grade}-v2": dict(halt_offset=offset)
    for name, offset in {"halfcheetah": 200.0, "hopper": 50.0, "walker2d": 30.0}.items()
    for grade in ("random", "medium", "medium-replay", "medium-expert")
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

    def __init__(self, obs_dim: int, action_dim: int, hidden_sizes: tuple[int, ...]):
        super().__init__()
        sizes = [obs_dim + action_dim, *hidden_sizes]
        layers = [layer for i, o in zip(sizes[:-1], sizes[1:]) for layer in (Linears(2, i, o), nn.ReLU())]
        self.net = nn.Sequential(*layers, Linears(2, sizes[-1], 1))

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        return self.net(torch.cat([obs, action], dim=-1).expand(2, -1, -1)).squeeze(-1)


class Actor(nn.Module):
    """Tanh-squashed Gaussian. The caller draws the standard normal noise, so that acting is a plain function."""

    def __init__(self, obs_dim: int, action_dim: int, hidden_sizes: tuple[int, ...]):
        super().__init__()
        sizes = [obs_dim, *hidden_sizes]
        layers = [layer for i, o in zip(sizes[:-1], sizes[1:]) for layer in (nn.Linear(i, o), nn.ReLU())]
        self.net = nn.Sequential(*layers, nn.Linear(sizes[-1], 2 * action_dim))

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
    """Everything that training changes: networks, temperature and optimizers. Its state_dict makes a checkpoint."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.actor = Actor(obs_dim, action_dim, args.hidden_sizes)
        self.critic = Critic(obs_dim, action_dim, args.hidden_sizes)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.tensor(0.0))
        self.actor_opt = Adam(list(self.actor.parameters()), args.actor_lr)
        self.critic_opt = Adam(list(self.critic.parameters()), args.critic_lr)
        self.alpha_opt = Adam([self.log_alpha], args.alpha_lr)


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


# --- Losses: SAC ---
#     y   = r + gamma (1 - d) [ min_j Q'_j(s',a') - alpha log pi(a'|s') ],   a' ~ pi(.|s')
#     L_Q = sum_j mean (Q_j(s,a) - y)^2
def critic_loss(agent: Agent, batch: list[Tensor], noise: dict[str, Tensor], alpha: Tensor, args: Args):
    obs, action, reward, next_obs, terminal = batch
    with torch.no_grad():
        next_action, next_log_prob = agent.actor(next_obs, noise["next_action"])
        next_q = agent.target_critic(next_obs, next_action).amin(dim=0) - alpha * next_log_prob  # (batch,)
        target_q = reward + args.gamma * (1 - terminal) * next_q
    q = agent.critic(obs, action)  # (2, batch)
    assert target_q.shape == q.shape[1:]
    return (q - target_q).square().mean(dim=1).sum(), {"q": q.mean().detach()}


#     L_pi = mean [ alpha log pi(a|s) - min_j Q_j(s,a) ],   a ~ pi(.|s) reparameterised
def actor_loss(agent: Agent, obs: Tensor, noise: dict[str, Tensor], alpha: Tensor):
    action, log_prob = agent.actor(obs, noise["action"])
    q = agent.critic(obs, action).amin(dim=0)  # (batch,)
    return (alpha * log_prob - q).mean(), {"log_prob": log_prob.mean().detach()}


#     L_alpha = - log alpha * mean [ log pi(a|s) + target entropy ]
def alpha_loss(agent: Agent, log_prob: Tensor, target_entropy: float) -> Tensor:
    return -agent.log_alpha * (log_prob + target_entropy)


# --- Update: rows as in `flat_rows`, the first real_ratio of them real ---
def draw_noise(action_dim: int, args: Args, device: torch.device) -> dict[str, Tensor]:
    """Of one update; standard normal where the name says no more."""
    shape = args.batch_size, action_dim
    noise = {name: torch.randn(shape, device=device) for name in ("next_action", "action")}
    return noise


def update(agent: Agent, rows: Tensor, noise: dict[str, Tensor], args: Args) -> dict[str, Tensor]:
    action_dim = noise["action"].shape[-1]
    obs_dim = (rows.shape[1] - action_dim - 2) // 2
    obs, action, reward, next_obs, terminal = rows.split([obs_dim, action_dim, 1, obs_dim, 1], dim=-1)
    batch = [obs, action, reward.squeeze(-1), next_obs, terminal.squeeze(-1)]
    alpha = agent.log_alpha.detach().exp().clamp(max=args.max_alpha)
    # critic
    loss_q, info_q = critic_loss(agent, batch, noise, alpha, args)
    agent.critic_opt.minimize(loss_q)
    # actor
    loss_pi, info_pi = actor_loss(agent, obs, noise, alpha)
    agent.actor_opt.minimize(loss_pi)
    # temperature
    target_entropy = -action_dim if args.target_entropy is None else args.target_entropy  # [entropy]
    agent.alpha_opt.minimize(alpha_loss(agent, info_pi["log_prob"], target_entropy))
    # target critic
    with torch.no_grad():
        for target, param in zip(agent.target_critic.parameters(), agent.critic.parameters(), strict=True):
            target.lerp_(param, args.tau)
    return {"critic_loss": loss_q.detach(), "actor_loss": loss_pi.detach(), "alpha": alpha, **info_q, **info_pi}


# --- Model rollouts ---
def flat_rows(data: OfflineDataset) -> Tensor:
    """One row per transition (num_rows, 2 obs_dim + action_dim + 2): a batch is then a single index_select."""
    return torch.cat([data.obs, data.action, data.reward[:, None], data.next_obs, data.terminal[:, None]], dim=-1)


class ModelBuffer(nn.Module):
    """The newest `capacity` simulated transitions, as flat rows in a ring."""

    def __init__(self, capacity: int, width: int):
        super().__init__()
        self.register_buffer("rows", torch.zeros(capacity, width))
        self.position = self.size = 0

    def add(self, rows: Tensor) -> None:
        """rows: (num <= capacity, width)"""
        index = (self.position + torch.arange(len(rows), device=rows.device)) % len(self.rows)
        self.rows[index] = rows
        self.position = (self.position + len(rows)) % len(self.rows)
        self.size = min(self.size + len(rows), len(self.rows))

    def get_extra_state(self) -> dict:
        return {"position": self.position, "size": self.size}

    def set_extra_state(self, state: dict) -> None:
        self.position, self.size = state["position"], state["size"]


def sample_batch(real_rows: Tensor, buffer: ModelBuffer, args: Args) -> Tensor:
    """batch_size flat rows, the first real_ratio of them real."""
    num_real = int(args.real_ratio * args.batch_size)  # rounded down [MOPO code]
    real = torch.randint(len(real_rows), (num_real,), device=real_rows.device)
    model = torch.randint(buffer.size, (args.batch_size - num_real,), device=real_rows.device)
    return torch.cat([real_rows.index_select(0, real), buffer.rows.index_select(0, model)])


@torch.no_grad()
def rollout(mdp: PessimisticMDP, actor: Actor, starts: Tensor, args: Args):
    """From each start (batch, obs_dim) h steps, or up to the first terminal.

    Returns the transitions as flat rows (num, 2 obs_dim + action_dim + 2).
    Also whether each was in doubt, that is, unknown, so that it halted: bool (num,).
    """
    rows = []
    doubts = []
    action_dim = actor.net[-1].out_features // 2
    # on a CPU a thousand rows at a time, so that the ensemble's activations stay in its cache
    for obs in starts.split(len(starts) if starts.is_cuda else 1_000):
        for _ in range(args.rollout_length):
            action, _ = actor(obs, torch.randn(len(obs), action_dim, device=obs.device))
            order = torch.randperm(len(obs), device=obs.device)  # which elite simulates which row
            noise = torch.randn(len(obs), obs.shape[1] + 1, device=obs.device)
            next_obs, reward, terminal, halted = mdp.step(obs, action, order, noise)
            doubts.append(halted)
            rows.append(torch.cat([obs, action, reward[:, None], next_obs, terminal.float()[:, None]], dim=-1))
            obs = next_obs[~terminal]
    return torch.cat(rows), torch.cat(doubts)


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
    initial_obs(data)  # without episodes there are none: better now than after the fit
    terminal_fn = termination_fn(args.termination, data, args.seed)
    sizes = {"num_members": args.num_members, "num_elites": args.num_elites, "hidden_size": args.dynamics_hidden_size}
    fit = {"max_epochs": args.dynamics_max_epochs, "path": args.dynamics, "compile": run.compiled}
    dynamics = load_or_fit(data, args.seed, **sizes, **fit)
    mdp = make_pessimistic_mdp(dynamics, terminal_fn, data, args)

    real_rows, obs_dim, action_dim = flat_rows(data), data.obs.shape[1], data.action.shape[1]
    agent = Agent(obs_dim, action_dim, args).to(run.device)
    capacity = args.rollout_retain * args.rollout_batch_size * args.rollout_length
    buffer = ModelBuffer(capacity, real_rows.shape[1]).to(run.device)
    step = run.compiled(lambda rows, noise: update(agent, rows, noise, args))

    for i in run.updates(agent=agent, buffer=buffer):  # 1 .. num_updates, or from where a resumed run was
        if (i - 1) % args.rollout_interval == 0:
            starts = data.obs[torch.randint(len(data.obs), (args.rollout_batch_size,), device=run.device)]
            rows, halted = rollout(mdp, agent.actor, starts, args)
            buffer.add(rows)
            run.note(model_buffer_size=buffer.size)
            run.note(halt_rate=halted.double().mean(), rollout_mean=len(rows) / len(starts))
        if args.actor_lr_schedule == "cosine":  # [cosine]
            agent.actor_opt.lr.fill_(args.actor_lr * 0.5 * (1 + math.cos(math.pi * (i - 1) / args.num_updates)))
        noise = draw_noise(action_dim, args, run.device)
        info = step(sample_batch(real_rows, buffer, args), noise)
        if run.evaluates():
            bound, lengths = evaluate_pessimistic(mdp, agent.actor, data, args.pessimistic_episodes, [args.seed, i])
            run.note(pessimistic_return=bound.mean(), pessimistic_length=lengths)
        run.evaluate(agent.actor, info, "q {q:8.1f}  pessimistic {pessimistic_return:8.1f}")
    run.finish(agent.actor)


if __name__ == "__main__":
    start(main, Args, TUNED)
