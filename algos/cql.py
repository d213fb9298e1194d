"""CQL: Conservative Q-Learning for Offline Reinforcement Learning (Kumar et al. 2020, arXiv:2006.04779)

No model, SAC on logged rows alone. Nothing in them corrects a Q that is too high for an action that was never logged,
and the policy would go there, so the critic's loss has one more term, weighted by w (Eq. 4, CQL(H)):

    E_{s ~ D}[ log sum_a exp Q(s,a) ] - E_{s,a ~ D}[Q(s,a)]        conservative_gap()

It lowers Q at all actions, most where Q is highest, and raises it at the logged ones. combo.py is this with a model.
Rollouts end:      there are none.
Gradient stops at: kappa, the proposals, the target in critic_loss; actor_loss moves the actor alone.
Normalised:        actions to [-1, 1]; observations and rewards are not.
Elites:            there is no ensemble.
As in the authors' code, [lse] the sum is an importance-weighted one over sampled actions, [backup] the critic's target
has no entropy, [entropy] the target entropy is -action_dim; the square in L_Q is whole, in Eq. 4 half, so that w weighs
half as much. Departures from it: w is 5 and fixed, there by default 1 times a Lagrange multiplier (threshold 5);
nothing is cloned in the first 40,000 updates, as in every rewrite that we read; as in mopo.py, [cosine] the actor's
learning rate falls along a cosine and alpha is at most 1.
Run: python algos/cql.py
     python algos/cql.py --dataset hopper_medium-v2.hdf5 --env-id Hopper-v5
"""

import copy
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
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
    # --- SAC ---
    hidden_sizes: tuple[int, ...] = (256, 256, 256)  # of actor and critics [CQL code]
    gamma: float = 0.99  # discount per environment step
    tau: float = 0.005  # Polyak step of the target critic
    actor_lr: float = 1e-4  # [CQL code]
    actor_lr_schedule: Literal["cosine", "constant"] = "cosine"  # cosine: to zero over the run [cosine]
    critic_lr: float = 3e-4  # [CQL code]
    alpha_lr: float = 1e-4  # [CQL code]
    max_alpha: float = 1.0  # upper bound of the temperature [cosine]; inf: none
    target_entropy: float | None = None  # by default -action_dim [entropy]
    # --- The method ---
    conservative_coef: float = 5.0  # w [CQL code: 5 or 10]; 0, with --backup-entropy: SAC on logged rows
    num_samples: int = 10  # K, actions of each of three kinds at a state [CQL code]
    lse: Literal["all", "per-source"] = "all"  # one sum over all 3K actions, or K sums over 3, averaged [OfflineRL-Kit]
    backup_entropy: bool = False  # in the critic's target [backup]
    lagrange_threshold: float | None = None  # w then grows while a critic's gap is above it, else shrinks


TUNED = {  # of pendulum ours, of other data the bench's; D4RL, also our hopper/medium-v0 etc.: the defaults
    "pendulum/random-v0": dict(
        num_updates=5_000, eval_interval=500, score_evals=3, checkpoint_interval=2_500, compile=False,
        hidden_sizes=(64, 64), actor_lr=1e-3, critic_lr=1e-3, alpha_lr=1e-3,
        conservative_coef=0.1, num_samples=2,
    ),
    "other": dict(
        num_updates=120_000, eval_interval=4_000, hidden_sizes=(64, 64),
        num_samples=4,
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
        self.log_kappa = nn.Parameter(torch.tensor(0.0))
        self.kappa_opt = Adam([self.log_kappa], args.critic_lr)


# --- The method: Eq. 4 ---
#     a_1 .. a_3K ~ q:  K uniform, K of pi(.|s), K of pi(.|s'), all of them actions at s
@torch.no_grad()
def proposals(actor: Actor, obs: Tensor, next_obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """noise (3, K, batch, action_dim): uniform in [-1, 1], normal, normal. Returns the a_k and log q (3, K, batch)."""
    log_uniform = torch.full_like(noise[0, ..., 0], -noise.shape[-1] * math.log(2))
    (action, log_prob), (next_action, next_log_prob) = actor(obs, noise[1]), actor(next_obs, noise[2])
    return torch.stack([noise[0], action, next_action]), torch.stack([log_uniform, log_prob, next_log_prob])


#     R = sum_j { mean_s log sum_k exp[ Q_j(s,a_k) - log q(a_k) ]  -  mean_D Q_j(s,a) }      [lse]
def conservative_gap(q_samples: Tensor, log_density: Tensor, q_data: Tensor, lse: str) -> Tensor:
    """q_samples: (2, 3, K, rows), log_density: (3, K, rows), q_data: (2, num_logged). Returns a scalar."""
    assert q_samples.shape[1:] == log_density.shape
    soft_max = (q_samples - log_density).logsumexp(dim=(1, 2) if lse == "all" else 1)  # (2, rows) or (2, K, rows)
    return soft_max.flatten(1).mean(dim=1).sum() - q_data.mean(dim=1).sum()


# --- Losses: SAC ---
#     y   = r + gamma (1 - d) [ min_j Q'_j(s',a') - alpha log pi(a'|s') ],   a' ~ pi(.|s')
#     L_Q = sum_j mean (Q_j(s,a) - y)^2
#           + w R,   and without alpha's term in y [backup]
def critic_loss(agent: Agent, batch: list[Tensor], noise: dict[str, Tensor], alpha: Tensor, args: Args):
    obs, action, reward, next_obs, terminal = batch
    with torch.no_grad():
        next_action, next_log_prob = agent.actor(next_obs, noise["next_action"])
        next_q = agent.target_critic(next_obs, next_action).amin(dim=0) - alpha * next_log_prob  # (batch,)
        target_q = reward + args.gamma * (1 - terminal) * next_q
    samples, log_density = proposals(agent.actor, obs, next_obs, noise["proposals"])
    states = obs.expand(*samples.shape[:3], -1)  # s, also for the actions of pi(.|s')
    q = agent.critic(torch.cat([obs, states.flatten(0, 2)]), torch.cat([action, samples.flatten(0, 2)]))
    q, q_samples = q[:, : len(obs)], q[:, len(obs) :].unflatten(1, log_density.shape)  # (2, batch), (2, 3, K, batch)
    assert target_q.shape == q.shape[1:]
    gap = conservative_gap(q_samples, log_density, q, args.lse)
    kappa = 1 if args.lagrange_threshold is None else agent.log_kappa.detach().exp().clamp(max=1e6)
    info = {"q": q.mean().detach(), "conservative_gap": gap.detach()}
    return (q - target_q).square().mean(dim=1).sum() + kappa * args.conservative_coef * gap, info


#     L_pi = mean [ alpha log pi(a|s) - min_j Q_j(s,a) ],   a ~ pi(.|s) reparameterised
def actor_loss(agent: Agent, obs: Tensor, noise: dict[str, Tensor], alpha: Tensor):
    action, log_prob = agent.actor(obs, noise["action"])
    q = agent.critic(obs, action).amin(dim=0)  # (batch,)
    return (alpha * log_prob - q).mean(), {"log_prob": log_prob.mean().detach()}


#     L_alpha = - log alpha * mean [ log pi(a|s) + target entropy ]
def alpha_loss(agent: Agent, log_prob: Tensor, target_entropy: float) -> Tensor:
    return -agent.log_alpha * (log_prob + target_entropy)


# --- Update: rows as in `flat_rows` ---
def draw_noise(action_dim: int, args: Args, device: torch.device) -> dict[str, Tensor]:
    """Of one update; standard normal where the name says no more."""
    shape = args.batch_size, action_dim
    noise = {name: torch.randn(shape, device=device) for name in ("next_action", "action")}
    noise["proposals"] = torch.randn(3, args.num_samples, *shape, device=device)
    noise["proposals"][0].uniform_(-1, 1)
    return noise


def update(agent: Agent, rows: Tensor, noise: dict[str, Tensor], args: Args) -> dict[str, Tensor]:
    action_dim = noise["action"].shape[-1]
    obs_dim = (rows.shape[1] - action_dim - 2) // 2
    obs, action, reward, next_obs, terminal = rows.split([obs_dim, action_dim, 1, obs_dim, 1], dim=-1)
    batch = [obs, action, reward.squeeze(-1), next_obs, terminal.squeeze(-1)]
    alpha = agent.log_alpha.detach().exp().clamp(max=args.max_alpha)
    # critic
    loss_q, info_q = critic_loss(agent, batch, noise, alpha * args.backup_entropy, args)
    agent.critic_opt.minimize(loss_q)
    if args.lagrange_threshold is not None:  # w grows by the factor kappa:  L_kappa = kappa (threshold - R / 2)
        agent.kappa_opt.minimize(agent.log_kappa.exp() * (args.lagrange_threshold - info_q["conservative_gap"] / 2))
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


# --- Batches ---
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
    run.open(data)

    real_rows, obs_dim, action_dim = flat_rows(data), data.obs.shape[1], data.action.shape[1]
    agent = Agent(obs_dim, action_dim, args).to(run.device)
    step = run.compiled(lambda rows, noise: update(agent, rows, noise, args))

    for i in run.updates(agent=agent):  # 1 .. num_updates, or from where a resumed run was
        if args.actor_lr_schedule == "cosine":  # [cosine]
            agent.actor_opt.lr.fill_(args.actor_lr * 0.5 * (1 + math.cos(math.pi * (i - 1) / args.num_updates)))
        noise = draw_noise(action_dim, args, run.device)
        info = step(sample_batch(real_rows, args), noise)
        run.evaluate(agent.actor, info, "q {q:8.1f}  gap {conservative_gap:.2f}")
    run.finish(agent.actor)


if __name__ == "__main__":
    start(main, Args, TUNED)
