"""BC: behaviour cloning, and %BC (Chen et al. 2021, Decision Transformer, Sec. 5.1, arXiv:2106.01345)

No model, no values: the policy is a regression of the logged actions on the observations,

    L_pi = mean |pi(s) - a|^2,        actor_loss()

a mean over rows and action dimensions, optionally of the best episodes alone (--top-fraction 0.1 is the literature's
10%BC). What a method cannot beat is not worth its critic or its model. td3_bc.py is this loss and a critic.
Rollouts end:      there are none.
Gradient stops at: nothing; there is one network and one loss.
Normalised:        observations to mean 0 and deviation 1 (standardise); actions to [-1, 1].
Elites:            there is no ensemble.
Departures: [network] The authors' code clones with a network of the last 20 observations; here it is td3_bc.py's, of
one. [share] The best episodes are a share of all episodes, as in CORL; in that code they have that share of all rows.
Run: python algos/bc.py
     python algos/bc.py --dataset hopper_medium-v2.hdf5 --env-id Hopper-v5 --top-fraction 0.1
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.dataset import OfflineDataset, load_dataset  # noqa: E402
from common.run import Run, RunArgs, start  # noqa: E402


@dataclass
class Args(RunArgs):  # and how a run is watched, which changes no policy: common/run.py
    dataset: str = "pendulum/random-v0"  # Minari id, D4RL name, folder of a Minari dataset, .hdf5 or .npz
    env_id: str = ""  # environment to evaluate in; by default the one that the dataset names
    seed: int = 0  # of every random number
    num_updates: int = 1_000_000  # gradient steps [1M to 3M in published code]
    batch_size: int = 256  # rows in a gradient step
    # --- The method ---
    hidden_sizes: tuple[int, ...] = (256, 256)  # of the actor [CORL]
    actor_lr: float = 3e-4  # [CORL]
    top_fraction: float = 1.0  # share of the episodes to imitate, those of highest return; 0.1 is 10%BC [share]


TUNED = {  # of pendulum ours, of other data the bench's; D4RL, also our hopper/medium-v0 etc.: the defaults
    "pendulum/random-v0": dict(
        num_updates=5_000, eval_interval=500, score_evals=3, checkpoint_interval=2_500, compile=False,
        hidden_sizes=(64, 64), actor_lr=1e-3,
    ),
    "other": dict(
        num_updates=120_000, eval_interval=4_000, hidden_sizes=(64, 64),
    ),
}  # fmt: skip


# --- Networks ---
class Actor(nn.Module):
    """Deterministic policy on standardised observations, whose mean and deviation it keeps for acting on raw ones."""

    def __init__(self, obs_dim: int, action_dim: int, hidden_sizes: tuple[int, ...]):
        super().__init__()
        sizes = [obs_dim, *hidden_sizes]
        layers = [layer for i, o in zip(sizes[:-1], sizes[1:]) for layer in (nn.Linear(i, o), nn.ReLU())]
        self.net = nn.Sequential(*layers, nn.Linear(sizes[-1], action_dim), nn.Tanh())
        self.register_buffer("obs_mean", torch.zeros(obs_dim))
        self.register_buffer("obs_std", torch.ones(obs_dim))

    def forward(self, obs: Tensor) -> Tensor:
        """Standardised observations (batch, obs_dim) -> action (batch, action_dim) in (-1, 1)"""
        return self.net(obs)

    def act(self, obs: Tensor) -> Tensor:
        """The deterministic policy: (batch, obs_dim) -> (batch, action_dim)"""
        return self.net((obs - self.obs_mean) / self.obs_std)


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
    """Everything that training changes: network and optimizer. Its state_dict makes a checkpoint."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.actor = Actor(obs_dim, action_dim, args.hidden_sizes)  # [network]
        self.actor_opt = Adam(list(self.actor.parameters()), args.actor_lr)


# --- Losses ---
#     L_pi = mean |pi(s) - a|^2
def actor_loss(agent: Agent, obs: Tensor, action: Tensor) -> Tensor:
    return (agent.actor(obs) - action).square().mean()


# --- Update: rows as in `flat_rows` ---
def update(agent: Agent, rows: Tensor, args: Args) -> dict[str, Tensor]:
    obs_dim = len(agent.actor.obs_mean)
    action_dim = rows.shape[1] - 2 * obs_dim - 2
    obs, action, *_ = rows.split([obs_dim, action_dim, 1, obs_dim, 1], dim=-1)
    loss_pi = actor_loss(agent, obs, action)
    agent.actor_opt.minimize(loss_pi)
    return {"actor_loss": loss_pi.detach()}


# --- Batches ---
def best_episodes(data: OfflineDataset, fraction: float) -> Tensor:
    """Indices of the rows of the best episodes, a share of all of them, at least one."""
    episode = data.episode_end.cumsum(0) - data.episode_end.long()  # (N,) number of the row's episode
    returns = data.reward.new_zeros(int(episode[-1]) + 1).index_add(0, episode, data.reward)
    best = returns.topk(max(1, int(fraction * len(returns)))).indices
    return torch.isin(episode, best).nonzero().squeeze(1)


def standardise(data: OfflineDataset, actor: Actor) -> OfflineDataset:
    """The data with observations of mean 0 and deviation 1, constants only centred; the actor keeps both numbers."""
    std, mean = torch.std_mean(data.obs, dim=0)
    actor.obs_mean.copy_(mean)
    actor.obs_std.copy_(torch.where(std > 1e-6 * (1 + mean.abs()), std, 1.0))
    obs, next_obs = ((obs - actor.obs_mean) / actor.obs_std for obs in (data.obs, data.next_obs))
    return replace(data, obs=obs, next_obs=next_obs)


def flat_rows(data: OfflineDataset) -> Tensor:
    """One row per transition (num_rows, 2 obs_dim + action_dim + 2): a batch is then a single index_select."""
    return torch.cat([data.obs, data.action, data.reward[:, None], data.next_obs, data.terminal[:, None]], dim=-1)


def sample_batch(real_rows: Tensor, args: Args) -> Tensor:
    """batch_size flat rows."""
    return real_rows.index_select(0, torch.randint(len(real_rows), (args.batch_size,), device=real_rows.device))


def main(args: Args) -> None:
    run = Run(args)  # folder, device, threads
    torch.manual_seed(args.seed)
    data = load_dataset(args.dataset, run.device, args.env_id or None, trust=args.trust)
    run.open(data)

    obs_dim, action_dim = data.obs.shape[1], data.action.shape[1]
    agent = Agent(obs_dim, action_dim, args).to(run.device)
    real_rows = flat_rows(standardise(data, agent.actor))
    if args.top_fraction < 1:
        real_rows = real_rows[best_episodes(data, args.top_fraction)]
        print(f"imitation   of {len(real_rows):,} rows of the best episodes")
    step = run.compiled(lambda rows: update(agent, rows, args))

    for i in run.updates(agent=agent):  # 1 .. num_updates, or from where a resumed run was
        info = step(sample_batch(real_rows, args))
        run.evaluate(agent.actor, info, "loss {actor_loss:.4f}")
    run.finish(agent.actor)


if __name__ == "__main__":
    start(main, Args, TUNED)
