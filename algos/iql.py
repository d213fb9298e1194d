"""IQL: Offline Reinforcement Learning with Implicit Q-Learning (Kostrikov, Nair, Levine 2021, arXiv:2110.06169)

No model, and no action outside the data is ever evaluated. A state's value is a high expectile of Q over the logged
actions, something between their mean and their best (Eq. 5):

    L_V = mean | tau_e - 1{u < 0} | u^2,   u = min_j Q'_j(s,a) - V(s)        value_loss()

Q is regressed on r + gamma V(s'), and the policy imitates logged actions, the better ones more (Eq. 7).
Rollouts end:      there are none.
Gradient stops at: Q' in value_loss, the target in critic_loss, the weights in actor_loss.
Normalised:        rewards by the spread of returns (scale_rewards); actions to [-1, 1]; observations are not.
Elites:            there is no ensemble.
Departures: [order] V is updated first and Q last, as in the authors' code; the paper's Algorithm 1 has the policy last.
Run: python algos/iql.py
     python algos/iql.py --dataset hopper_medium-v2.hdf5 --env-id Hopper-v5
"""

import copy
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import InputError  # noqa: E402
from common.dataset import OfflineDataset, load_dataset  # noqa: E402
from common.run import Run, RunArgs, start  # noqa: E402


@dataclass
class Args(RunArgs):  # and how a run is watched, which changes no policy: common/run.py
    dataset: str = "pendulum/random-v0"  # Minari id, D4RL name, folder of a Minari dataset, .hdf5 or .npz
    env_id: str = ""  # environment to evaluate in; by default the one that the dataset names
    standardise_obs: bool = False  # networks see (obs - mean) / std of the data [papers: raw]
    seed: int = 0  # of every random number
    num_updates: int = 1_000_000  # gradient steps [1M to 3M in published code]
    batch_size: int = 256  # rows in a gradient step
    # --- IQL ---
    hidden_sizes: tuple[int, ...] = (256, 256)  # of actor and critics [IQL code]
    gamma: float = 0.99  # discount per environment step
    tau: float = 0.005  # Polyak step of the target critic
    actor_lr: float = 3e-4  # [IQL code]
    actor_lr_schedule: Literal["cosine", "constant"] = "cosine"  # cosine: to zero over the run [IQL code]
    critic_lr: float = 3e-4  # [IQL code]
    value_lr: float = 3e-4  # [IQL code]
    # --- The method ---
    expectile: float = 0.7  # tau_e [IQL code, MuJoCo]; 0.5: the mean over logged actions, towards 1: the best of them
    inverse_temperature: float = 3.0  # b, of the imitation's weights [IQL code, MuJoCo]; 0 is behaviour cloning
    max_weight: float = 100.0  # of a row in the imitation [IQL code]
    reward_scale: Literal["returns", "none"] = "returns"  # returns: 1000 / (best - worst episode) [IQL code, MuJoCo]


TUNED = {  # of pendulum ours, of other data the bench's; D4RL, also our hopper/medium-v0 etc.: the defaults
    "pendulum/random-v0": dict(
        num_updates=5_000, eval_interval=500, score_evals=3, checkpoint_interval=2_500, compile=False,
        hidden_sizes=(64, 64), actor_lr=1e-3, critic_lr=1e-3, value_lr=1e-3,
    ),
    "other": dict(
        num_updates=120_000, eval_interval=4_000, hidden_sizes=(64, 64),
    ),
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
    """Gaussian with its mean in (-1, 1), not squashed; its deviation is the same everywhere."""

    def __init__(self, obs_dim: int, action_dim: int, hidden_sizes: tuple[int, ...]):
        super().__init__()
        sizes = [obs_dim, *hidden_sizes]
        layers = [layer for i, o in zip(sizes[:-1], sizes[1:]) for layer in (nn.Linear(i, o), nn.ReLU())]
        self.net = nn.Sequential(*layers, nn.Linear(sizes[-1], action_dim), nn.Tanh())
        self.log_std = nn.Parameter(torch.zeros(action_dim))

    def log_prob(self, obs: Tensor, action: Tensor) -> Tensor:
        """(batch, obs_dim), (batch, action_dim) -> (batch,)"""
        log_std = self.log_std.clamp(-5, 2)
        z = (action - self.net(obs)) / log_std.exp()
        return (-0.5 * z.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(dim=-1)

    def act(self, obs: Tensor) -> Tensor:
        """The deterministic policy: (batch, obs_dim) -> (batch, action_dim)"""
        return self.net(obs)


class Value(nn.Module):
    """V function: (batch, obs_dim) -> (batch,)"""

    def __init__(self, obs_dim: int, hidden_sizes: tuple[int, ...]):
        super().__init__()
        sizes = [obs_dim, *hidden_sizes]
        layers = [layer for i, o in zip(sizes[:-1], sizes[1:]) for layer in (nn.Linear(i, o), nn.ReLU())]
        self.net = nn.Sequential(*layers, nn.Linear(sizes[-1], 1))

    def forward(self, obs: Tensor) -> Tensor:
        return self.net(obs).squeeze(-1)


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
        self.actor = Actor(obs_dim, action_dim, args.hidden_sizes)
        self.critic = Critic(obs_dim, action_dim, args.hidden_sizes)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.value = Value(obs_dim, args.hidden_sizes)
        self.actor_opt = Adam(list(self.actor.parameters()), args.actor_lr)
        self.critic_opt = Adam(list(self.critic.parameters()), args.critic_lr)
        self.value_opt = Adam(list(self.value.parameters()), args.value_lr)


# --- The method ---
#     L_V = mean | tau_e - 1{u < 0} | u^2,   u = min_j Q'_j(s,a) - V(s)                (Eq. 5)
def value_loss(agent: Agent, obs: Tensor, q: Tensor, args: Args):
    """q: min_j Q'_j(s,a) of the logged actions (batch,)"""
    v = agent.value(obs)  # (batch,)
    assert q.shape == v.shape
    weight = (args.expectile - (q < v).to(q.dtype)).abs()
    return (weight * (q - v).square()).mean(), {"v": v.mean().detach()}


# --- Losses ---
#     L_Q = sum_j mean (Q_j(s,a) - y)^2,   y = r + gamma (1 - d) V(s')                 (Eq. 6)
def critic_loss(agent: Agent, batch: list[Tensor], args: Args):
    obs, action, reward, next_obs, terminal = batch
    with torch.no_grad():
        target_q = reward + args.gamma * (1 - terminal) * agent.value(next_obs)  # (batch,)
    q = agent.critic(obs, action)  # (2, batch)
    assert target_q.shape == q.shape[1:]
    return (q - target_q).square().mean(dim=1).sum(), {"q": q.mean().detach()}


#     L_pi = - mean min( exp[ b (min_j Q'_j(s,a) - V(s)) ], max weight ) log pi(a|s)   (Eq. 7)
def actor_loss(agent: Agent, obs: Tensor, action: Tensor, q: Tensor, args: Args):
    """q: as in `value_loss`"""
    with torch.no_grad():
        weight = (args.inverse_temperature * (q - agent.value(obs))).exp().clamp(max=args.max_weight)
    log_prob = agent.actor.log_prob(obs, action)  # (batch,)
    assert weight.shape == log_prob.shape
    return -(weight * log_prob).mean(), {"log_prob": log_prob.mean().detach(), "weight": weight.mean()}


# --- Update: rows as in `flat_rows` ---
def update(agent: Agent, rows: Tensor, args: Args) -> dict[str, Tensor]:
    action_dim = len(agent.actor.log_std)
    obs_dim = (rows.shape[1] - action_dim - 2) // 2
    obs, action, reward, next_obs, terminal = rows.split([obs_dim, action_dim, 1, obs_dim, 1], dim=-1)
    batch = [obs, action, reward.squeeze(-1), next_obs, terminal.squeeze(-1)]
    # value [order]
    with torch.no_grad():
        q = agent.target_critic(obs, action).amin(dim=0)  # (batch,)
    loss_v, info_v = value_loss(agent, obs, q, args)
    agent.value_opt.minimize(loss_v)
    # actor
    loss_pi, info_pi = actor_loss(agent, obs, action, q, args)
    agent.actor_opt.minimize(loss_pi)
    # critic
    loss_q, info_q = critic_loss(agent, batch, args)
    agent.critic_opt.minimize(loss_q)
    # target critic
    with torch.no_grad():
        for target, param in zip(agent.target_critic.parameters(), agent.critic.parameters(), strict=True):
            target.lerp_(param, args.tau)
    info = {"critic_loss": loss_q.detach(), "actor_loss": loss_pi.detach(), "value_loss": loss_v.detach()}
    return info | info_v | info_q | info_pi


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


def sample_batch(real_rows: Tensor, args: Args) -> Tensor:
    """batch_size flat rows."""
    return real_rows.index_select(0, torch.randint(len(real_rows), (args.batch_size,), device=real_rows.device))


def main(args: Args) -> None:
    run = Run(args)  # folder, device, threads
    torch.manual_seed(args.seed)
    data = load_dataset(args.dataset, run.device, args.env_id or None, args.standardise_obs, args.trust)
    if args.reward_scale == "returns":
        data = scale_rewards(data)
    run.open(data)

    real_rows, obs_dim, action_dim = flat_rows(data), data.obs.shape[1], data.action.shape[1]
    agent = Agent(obs_dim, action_dim, args).to(run.device)
    step = run.compiled(lambda rows: update(agent, rows, args))

    for i in run.updates(agent=agent):  # 1 .. num_updates, or from where a resumed run was
        if args.actor_lr_schedule == "cosine":
            agent.actor_opt.lr.fill_(args.actor_lr * 0.5 * (1 + math.cos(math.pi * (i - 1) / args.num_updates)))
        info = step(sample_batch(real_rows, args))
        run.evaluate(agent.actor, info, "q {q:8.1f}  weight {weight:.2f}")
    run.finish(agent.actor)


if __name__ == "__main__":
    start(main, Args, TUNED)
