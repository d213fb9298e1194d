"""FQE: Batch Policy Learning under Constraints, fitted Q evaluation (Le, Voloshin, Yue 2019, arXiv:1903.08738)

No simulator, no model, nothing improved: what is a finished policy worth, by logged rows alone? Q of the policy pi is
fitted to its own Bellman equation (Algorithm 3) and read where episodes begin:

    L_Q = sum_j mean ( Q_j(s,a) - r - gamma (1 - d) Q'_j(s',pi(s')) )^2            critic_loss()
    V_0 = mean_j mean Q_j(s_0,pi(s_0))                                             start_value()

V_0 is a discounted return, of the deterministic policy that one would deploy. Its order among policies is worth more
than its value: where pi acts as nobody in the data did, nothing holds Q. Without --policy it is the data's own policy,
a' as logged: its V_0 should be about the discounted return of the data's episodes, which is printed beside it.
Rollouts end:      there are none; behind a time limit the value goes on, behind a terminal it does not.
Gradient stops at: the target in critic_loss.
Normalised:        actions to [-1, 1]; observations and rewards are not.
Elites:            there is no ensemble.
Departures: [polyak] The target follows by small steps, one fit in place of Algorithm 3's many, anew to each target.
[twin] Two critics with a target each: how far their V_0 lie apart is printed, as a sign of doubt.
Run: python algos/fqe.py
     python algos/fqe.py --dataset hopper_medium-v2.hdf5 --env-id Hopper-v5 --policy runs/my-run
"""

import copy
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import InputError  # noqa: E402
from common.dataset import OfflineDataset, load_dataset  # noqa: E402
from common.evaluation import load_policy  # noqa: E402
from common.run import Run, RunArgs, start  # noqa: E402


@dataclass
class Args(RunArgs):  # and how a run is watched, which changes no policy: common/run.py
    dataset: str = "pendulum/random-v0"  # Minari id, D4RL name, folder of a Minari dataset, .hdf5 or .npz
    env_id: str = ""  # environment to evaluate in; by default the one that the dataset names
    standardise_obs: bool = False  # networks see (obs - mean) / std of the data [papers: raw]
    seed: int = 0  # of every random number
    num_updates: int = 1_000_000  # gradient steps [1M to 3M in published code]
    batch_size: int = 256  # rows in a gradient step
    # --- FQE ---
    hidden_sizes: tuple[int, ...] = (256, 256)  # of actor and critics [ours]
    gamma: float = 0.99  # discount per environment step
    tau: float = 0.005  # Polyak step of the target critic
    critic_lr: float = 3e-4  # [ours]
    # --- The method ---
    policy: str = ""  # folder of the finished run, of any script, whose policy is evaluated; "": the data's own


TUNED = {  # of pendulum and other data ours; D4RL, also our hopper/medium-v0 etc.: the defaults
    "pendulum/random-v0": dict(
        num_updates=10_000, eval_interval=1_000, checkpoint_interval=5_000, compile=False,
        hidden_sizes=(64, 64), tau=0.05, critic_lr=1e-3,
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
    """Everything that training changes: networks and optimizer. Its state_dict makes a checkpoint."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.action_dim = action_dim
        self.critic = Critic(obs_dim, action_dim, args.hidden_sizes)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.critic_opt = Adam(list(self.critic.parameters()), args.critic_lr)


# --- Losses ---
#     L_Q = sum_j mean ( Q_j(s,a) - r - gamma (1 - d) Q'_j(s',pi(s')) )^2
def critic_loss(agent: Agent, batch: list[Tensor], args: Args):
    obs, action, reward, next_obs, terminal, next_action = batch
    with torch.no_grad():
        next_q = agent.target_critic(next_obs, next_action)  # (2, batch) [twin]
        target_q = reward + args.gamma * (1 - terminal) * next_q
    q = agent.critic(obs, action)  # (2, batch)
    assert target_q.shape == q.shape
    return (q - target_q).square().mean(dim=1).sum(), {"q": q.mean().detach()}


# --- Update: rows as in `policy_rows` ---
def update(agent: Agent, rows: Tensor, args: Args) -> dict[str, Tensor]:
    obs_dim = (rows.shape[1] - 2 * agent.action_dim - 2) // 2
    columns = rows.split([obs_dim, agent.action_dim, 1, obs_dim, 1, agent.action_dim], dim=-1)
    obs, action, reward, next_obs, terminal, next_action = columns
    batch = [obs, action, reward.squeeze(-1), next_obs, terminal.squeeze(-1), next_action]
    # critic
    loss_q, info_q = critic_loss(agent, batch, args)
    agent.critic_opt.minimize(loss_q)
    # target critic [polyak]
    with torch.no_grad():
        for target, param in zip(agent.target_critic.parameters(), agent.critic.parameters(), strict=True):
            target.lerp_(param, args.tau)
    return {"critic_loss": loss_q.detach(), **info_q}


# --- Batches ---
def flat_rows(data: OfflineDataset) -> Tensor:
    """One row per transition (num_rows, 2 obs_dim + action_dim + 2): a batch is then a single index_select."""
    return torch.cat([data.obs, data.action, data.reward[:, None], data.next_obs, data.terminal[:, None]], dim=-1)


def policy_actions(policy: Callable, data: OfflineDataset, obs: Tensor) -> Tensor:
    """pi(s) in [-1, 1], (batch, action_dim), at observations as networks see them. Once: the policy stays as it is."""
    center, half = (data.action_high + data.action_low) / 2, (data.action_high - data.action_low) / 2
    action = np.concatenate([policy(data.raw_obs(chunk).cpu().numpy()) for chunk in obs.split(2**16)])
    action = (action - center) / np.where(half > 0, half, 1)
    return torch.as_tensor(action, dtype=torch.float32, device=obs.device)


def policy_rows(data: OfflineDataset, policy: Callable | None) -> Tensor:
    """Flat rows with pi(s') behind them; without a policy the next logged action, in those rows that have one."""
    if policy is not None:
        return torch.cat([flat_rows(data), policy_actions(policy, data, data.next_obs)], dim=-1)
    next_action, known = data.next_action()
    rows = torch.cat([flat_rows(data), next_action], dim=-1)[known | data.terminal.bool()]
    if not len(rows):
        raise InputError("no two rows of the data follow each other, as the data's own policy needs: give --policy")
    return rows


def sample_batch(real_rows: Tensor, args: Args) -> Tensor:
    """batch_size flat rows."""
    return real_rows.index_select(0, torch.randint(len(real_rows), (args.batch_size,), device=real_rows.device))


# --- Evaluation ---
#     V_0 = mean_j mean Q_j(s_0,pi(s_0))
@torch.no_grad()
def start_value(critic: Critic, obs: Tensor, action: Tensor) -> dict[str, Tensor]:
    """Where episodes begin: (num_episodes, obs_dim), (num_episodes, action_dim)"""
    values = critic(obs, action).mean(dim=1)  # (2,)
    return {"value": values.mean(), "value_spread": (values[0] - values[1]).abs()}


def discounted_returns(data: OfflineDataset, gamma: float) -> Tensor:
    """(num_episodes,) of the rows that were kept, to the end of the episode."""
    ends = data.episode_end.nonzero().squeeze(1).tolist()
    rewards = data.reward.cpu().tensor_split([end + 1 for end in ends[:-1]])
    return torch.stack([(reward * gamma ** torch.arange(len(reward))).sum() for reward in rewards])


def main(args: Args) -> None:
    run = Run(args)  # folder, device, threads
    torch.manual_seed(args.seed)
    data = load_dataset(args.dataset, run.device, args.env_id or None, args.standardise_obs, args.trust)
    run.open(data, evaluates=False)
    policy = load_policy(args.policy) if args.policy else None
    real_rows, begins = policy_rows(data, policy), data.episode_end.roll(1)
    obs = data.obs[begins]
    action = data.action[begins] if policy is None else policy_actions(policy, data, obs)
    print(f"behaviour   value {discounted_returns(data, args.gamma).mean():.1f}, where the data's episodes begin")

    obs_dim, action_dim = data.obs.shape[1], data.action.shape[1]
    agent = Agent(obs_dim, action_dim, args).to(run.device)
    step = run.compiled(lambda rows: update(agent, rows, args))

    for i in run.updates(agent=agent):  # 1 .. num_updates, or from where a resumed run was
        info = step(sample_batch(real_rows, args))
        if run.evaluates():
            run.note(**start_value(agent.critic, obs, action))
        run.evaluate(agent.critic, info, "value {value:8.1f} ± {value_spread:.1f}  q {q:8.1f}")
    run.finish(agent.critic)


if __name__ == "__main__":
    start(main, Args, TUNED)
