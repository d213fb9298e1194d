"""SAC+BC: SAC held near a behaviour model; the BRAC family (Wu, Tucker, Nachum 2019, arXiv:1911.11361)

No model of the world, SAC on logged rows alone. A behaviour model pi_b imitates the data first, by maximum likelihood.
The policy then maximises Q, and pays for its distance to pi_b in the loss (their policy regularisation, Eq. 6):

    mean KL( pi(.|s) || pi_b(.|s) )                                          divergence()

Both are normals before tanh, so that the divergence has a closed form. --kl forward pays for - log pi(a|s) of logged
actions in its place: behaviour cloning, without pi_b. osr.py and sdc.py constrain SAC with CQL's critic, by where
actions lead.
Rollouts end:      there are none.
Gradient stops at: pi_b, mean |Q|, the target in critic_loss; actor_loss moves the actor alone.
Normalised:        actions to [-1, 1]; Q in actor_loss, by its mean size; observations and rewards are not.
Elites:            there is no ensemble.
Departures: [scale] SAC's part of the loss is divided by mean |Q|, as in td3_bc.py, so that one weight fits rewards of
any scale. The divergence is [mean] a mean over the action's dimensions, as in OSR's code, to compare the two, and
[closed] in closed form, without sampling noise. As in cql.py, [entropy] the target entropy is -action_dim, [backup] the
critic's target has no entropy, [cosine] the actor's learning rate falls along a cosine and alpha is at most 1.
Run: python algos/sac_bc.py
     python algos/sac_bc.py --dataset hopper_medium-v2.hdf5 --env-id Hopper-v5
"""

import copy
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.dataset import OfflineDataset, load_dataset  # noqa: E402
from common.pretrain import load_or_train  # noqa: E402
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
    hidden_sizes: tuple[int, ...] = (256, 256)  # of actor and critics [also of pi_b]
    gamma: float = 0.99  # discount per environment step
    tau: float = 0.005  # Polyak step of the target critic
    actor_lr: float = 1e-4  # [CQL code]
    actor_lr_schedule: Literal["cosine", "constant"] = "cosine"  # cosine: to zero over the run [cosine]
    critic_lr: float = 3e-4  # [CQL code]
    alpha_lr: float = 1e-4  # [CQL code]
    max_alpha: float = 1.0  # upper bound of the temperature [cosine]; inf: none
    target_entropy: float | None = None  # by default -action_dim [entropy]
    # --- The method ---
    bc_coef: float = 0.1  # lambda, weight of the divergence; 0, with --backup-entropy: SAC on logged rows
    kl: Literal["reverse", "forward"] = "reverse"  # KL(pi || pi_b), or cloning: - log pi of logged actions, no pi_b
    normalise_q: bool = True  # divide SAC's part by mean |Q| [scale]
    backup_entropy: bool = False  # in the critic's target [backup]
    behaviour_updates: int = 50_000  # of pi_b
    behaviour_lr: float = 3e-4  # of pi_b's fit


TUNED = {  # of pendulum ours, of other data the bench's; D4RL, also our hopper/medium-v0 etc.: the defaults
    "pendulum/random-v0": dict(
        num_updates=5_000, eval_interval=500, score_evals=3, checkpoint_interval=2_500, compile=False,
        hidden_sizes=(64, 64), actor_lr=1e-3, critic_lr=1e-3, alpha_lr=1e-3, behaviour_updates=5_000,
    ),
    "other": dict(
        num_updates=120_000, eval_interval=4_000, hidden_sizes=(64, 64),
        behaviour_updates=10_000,
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


def behaviour_kl(actor: Actor, behaviour: Actor, obs: Tensor) -> Tensor:
    """KL( pi(.|s) || pi_b(.|s) ) per dimension of the action: (batch, action_dim)."""
    (mean, log_std), (other_mean, other_log_std) = gaussian(actor, obs), gaussian(behaviour, obs)
    return gaussian_kl(mean, log_std, other_mean, other_log_std)  # [closed]


def divergence(actor: Actor, behaviour: Actor | None, obs: Tensor, action: Tensor, kl: str) -> Tensor:
    """A scalar. behaviour: None where the divergence is forward; action: logged (batch, action_dim)."""
    if kl == "forward":
        return -action_log_prob(actor, obs, action).mean() / action.shape[-1]  # [mean]
    return behaviour_kl(actor, behaviour, obs).mean()  # [mean]


# --- Losses: SAC ---
#     y   = r + gamma (1 - d) [ min_j Q'_j(s',a') - alpha log pi(a'|s') ],   a' ~ pi(.|s')
#     L_Q = sum_j mean (Q_j(s,a) - y)^2
#           without alpha's term in y [backup]
def critic_loss(agent: Agent, batch: list[Tensor], noise: dict[str, Tensor], alpha: Tensor, args: Args):
    obs, action, reward, next_obs, terminal = batch
    with torch.no_grad():
        next_action, next_log_prob = agent.actor(next_obs, noise["next_action"])
        next_q = agent.target_critic(next_obs, next_action).amin(dim=0) - alpha * next_log_prob  # (batch,)
        target_q = reward + args.gamma * (1 - terminal) * next_q
    q = agent.critic(obs, action)  # (2, batch)
    assert target_q.shape == q.shape[1:]
    return (q - target_q).square().mean(dim=1).sum(), {"q": q.mean().detach()}


#     L_pi = mean [ alpha log pi(a|s) - min_j Q_j(s,a) ] / mean |Q|,   a ~ pi(.|s) reparameterised
#            + lambda KL
def actor_loss(agent: Agent, obs: Tensor, noise: dict[str, Tensor], alpha: Tensor, kl: Tensor, args: Args):
    """kl: the `divergence`, a scalar, per action dimension"""
    action, log_prob = agent.actor(obs, noise["action"])
    q = agent.critic(obs, action).amin(dim=0)  # (batch,)
    scale = 1 / q.abs().mean().detach() if args.normalise_q else 1.0  # [scale]
    info = {"log_prob": log_prob.mean().detach(), "kl": kl.detach()}
    return scale * (alpha * log_prob - q).mean() + args.bc_coef * kl, info


#     L_alpha = - log alpha * mean [ log pi(a|s) + target entropy ]
def alpha_loss(agent: Agent, log_prob: Tensor, target_entropy: float) -> Tensor:
    return -agent.log_alpha * (log_prob + target_entropy)


# --- Update: rows as in `flat_rows` ---
def draw_noise(action_dim: int, args: Args, device: torch.device) -> dict[str, Tensor]:
    """Of one update; standard normal where the name says no more."""
    shape = args.batch_size, action_dim
    noise = {name: torch.randn(shape, device=device) for name in ("next_action", "action")}
    return noise


def update(agent: Agent, behaviour: Actor | None, rows: Tensor, noise: dict[str, Tensor], args: Args):
    action_dim = noise["action"].shape[-1]
    obs_dim = (rows.shape[1] - action_dim - 2) // 2
    obs, action, reward, next_obs, terminal = rows.split([obs_dim, action_dim, 1, obs_dim, 1], dim=-1)
    batch = [obs, action, reward.squeeze(-1), next_obs, terminal.squeeze(-1)]
    alpha = agent.log_alpha.detach().exp().clamp(max=args.max_alpha)
    # critic
    loss_q, info_q = critic_loss(agent, batch, noise, alpha * args.backup_entropy, args)
    agent.critic_opt.minimize(loss_q)
    # actor
    kl = divergence(agent.actor, behaviour, obs, action, args.kl)
    loss_pi, info_pi = actor_loss(agent, obs, noise, alpha, kl, args)
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


# --- Pre-training ---
def behaviour_model(data: OfflineDataset, args: Args, compile: Callable) -> Actor:
    """pi_b(.|s), of the policy's kind, by maximum likelihood of the logged actions."""
    obs_dim, action_dim = data.obs.shape[1], data.action.shape[1]
    return load_or_train(
        "behaviour model",
        lambda: Actor(obs_dim, action_dim, args.hidden_sizes),
        lambda net, rows, _: -action_log_prob(net, rows[:, :obs_dim], rows[:, obs_dim:]).mean(),
        torch.cat([data.obs, data.action], dim=-1), 0, data, args.seed, args.behaviour_updates, args.behaviour_lr,
        {"hidden_sizes": args.hidden_sizes}, compile,
    )  # fmt: skip


def main(args: Args) -> None:
    run = Run(args)  # folder, device, threads
    torch.manual_seed(args.seed)
    data = load_dataset(args.dataset, run.device, args.env_id or None, args.standardise_obs, args.trust)
    run.open(data)
    pi_b = behaviour_model(data, args, run.compiled) if args.kl == "reverse" else None

    real_rows, obs_dim, action_dim = flat_rows(data), data.obs.shape[1], data.action.shape[1]
    agent = Agent(obs_dim, action_dim, args).to(run.device)
    step = run.compiled(lambda rows, noise: update(agent, pi_b, rows, noise, args))

    for i in run.updates(agent=agent):  # 1 .. num_updates, or from where a resumed run was
        if args.actor_lr_schedule == "cosine":  # [cosine]
            agent.actor_opt.lr.fill_(args.actor_lr * 0.5 * (1 + math.cos(math.pi * (i - 1) / args.num_updates)))
        noise = draw_noise(action_dim, args, run.device)
        info = step(sample_batch(real_rows, args), noise)
        run.evaluate(agent.actor, info, "q {q:8.1f}  kl {kl:.3f}")
    run.finish(agent.actor)


if __name__ == "__main__":
    start(main, Args, TUNED)
