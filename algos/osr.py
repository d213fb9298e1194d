"""OSR: Recovering from Out-of-sample States via Inverse Dynamics (NeurIPS 2023, openreview.net/forum?id=4gLWjSaw4o)

A policy that has left the data has nothing to go by. OSR perturbs logged states a little, s^ = s + beta eps, asks an
inverse dynamics model I which action leads from s^ to the logged next state s', and keeps the policy near it:

    mean KL( pi(.|s^) || I(.|s^,s') )                                        constraint()

is added to the policy's loss of CQL, weighted by lambda. I is fitted first, a variational model whose latent variable
sees (s, s'). lambda = 0 is cql.py with two layers.
Rollouts end:      there are none.
Gradient stops at: the proposals, the target in critic_loss, I and s^ in constraint; actor_loss moves the actor alone.
Normalised:        I's inputs; actions to [-1, 1]; observations and rewards are not.
Elites:            there is no ensemble.
Departures from the released code, which does not run as published: [likelihood] I is fitted by likelihood; that code's
squared error of its samples drives its deviation to its bound, whatever the data. [heads] I's mean and deviation have
an output each; that code reads the mean twice. [scaled] beta is in standard deviations of the observations, which I
reads standardised, s' - s too: one beta fits all sets. [kl] The direction is the code's, towards one of several good
actions; --kl forward, the text's, averages them. [floor] Fitted to its end I knows some of Hopper's actions, before
their tanh, to 0.007, others to 0.5, and the divergence, by the inverse square, would heed the former only: it takes a
deviation of 0.2 at least. As in cql.py, [lse] the sum over actions is an estimate, [entropy] the target entropy is
-action_dim, [backup] the critic's target has none, [cosine] the actor's learning rate falls along a cosine and alpha is
at most 1.
Run: python algos/osr.py
     python algos/osr.py --dataset hopper_medium-v2.hdf5 --env-id Hopper-v5
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
    num_updates: int = 1_000_000  # gradient steps [OSR code: 4M]
    batch_size: int = 256  # rows in a gradient step
    # --- SAC ---
    hidden_sizes: tuple[int, ...] = (256, 256)  # of actor and critics [OSR code; also of networks fitted first]
    gamma: float = 0.99  # discount per environment step
    tau: float = 0.005  # Polyak step of the target critic
    actor_lr: float = 1e-4  # [CQL code]
    actor_lr_schedule: Literal["cosine", "constant"] = "cosine"  # cosine: to zero over the run [cosine]
    critic_lr: float = 3e-4  # [CQL code]
    alpha_lr: float = 1e-4  # [CQL code]
    max_alpha: float = 1.0  # upper bound of the temperature [cosine]; inf: none
    target_entropy: float | None = None  # by default -action_dim [entropy]
    # --- The method ---
    noise_scale: float = 1e-3  # beta, of the perturbed states [OSR code, in raw units]
    recovery_coef: float = 0.5  # lambda, weight of the divergence [OSR code]; 0 is CQL
    target: Literal["inverse", "behaviour"] = "inverse"  # of the divergence: I(.|s^,s'), or to compare pi_b(.|s^)
    min_std: float = 0.2  # least deviation of the wanted actions, before their tanh [floor]; 0: as fitted
    kl: Literal["reverse", "forward"] = "reverse"  # KL(pi || I) [OSR code], or KL(I || pi), which averages [paper] [kl]
    normalise_q: bool = False  # divide SAC's part by mean |Q|
    conservative_coef: float = 5.0  # w, of CQL's term [OSR code]; 0, with --backup-entropy: SAC's critic
    num_samples: int = 10  # K, actions of each of three kinds at a state [CQL code]
    backup_entropy: bool = False  # in the critic's target [backup]
    latent_dim: int = 32  # of the inverse model [OSR code]
    latent_coef: float = 0.5  # weight of its latent variable's KL [OSR code]
    inverse_updates: int = 50_000  # of the inverse model [OSR code: 7,812]
    inverse_lr: float = 1e-4  # of its fit [OSR code]
    behaviour_updates: int = 50_000  # of pi_b, a model of the behaviour
    behaviour_lr: float = 3e-4  # of pi_b's fit


TUNED = {  # of pendulum ours, of other data the bench's; D4RL, also our hopper/medium-v0 etc.: the defaults
    "pendulum/random-v0": dict(
        num_updates=5_000, eval_interval=500, score_evals=3, checkpoint_interval=2_500, compile=False,
        hidden_sizes=(64, 64), actor_lr=1e-3, critic_lr=1e-3, alpha_lr=1e-3,
        conservative_coef=0.1, num_samples=2, inverse_updates=5_000, inverse_lr=1e-3, behaviour_updates=5_000,
    ),
    "other": dict(
        num_updates=120_000, eval_interval=4_000, hidden_sizes=(64, 64),
        num_samples=4, inverse_updates=10_000, behaviour_updates=10_000,
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


class InverseModel(nn.Module):
    """I(a|s,s'): a normal before tanh, given a latent variable z that an encoder draws from (s,s')."""

    def __init__(self, obs: Tensor, next_obs: Tensor, action_dim: int, latent_dim: int, hidden_sizes: tuple[int, ...]):
        """obs, next_obs: the data's, (num_rows, obs_dim), for the scales."""
        super().__init__()
        obs_dim, self.latent_dim = obs.shape[1], latent_dim
        for name, x in (("obs", obs), ("delta", next_obs - obs)):
            std, mean = torch.std_mean(x, dim=0)
            self.register_buffer(f"{name}_mean", mean)
            self.register_buffer(f"{name}_std", torch.where(std > 1e-6 * (1 + mean.abs()), std, 1.0))

        def mlp(in_dim: int, hidden_sizes: tuple[int, ...], out_dim: int) -> nn.Sequential:
            sizes = [in_dim, *hidden_sizes]
            layers = [layer for i, o in zip(sizes[:-1], sizes[1:]) for layer in (nn.Linear(i, o), nn.ReLU())]
            return nn.Sequential(*layers, nn.Linear(sizes[-1], out_dim))

        self.encoder = mlp(2 * obs_dim, hidden_sizes + hidden_sizes[-1:], 2 * latent_dim)  # one more [OSR code]
        self.decoder = mlp(2 * obs_dim + latent_dim, hidden_sizes, 2 * action_dim)

    def forward(self, obs: Tensor, next_obs: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(batch, obs_dim) twice, (batch, latent_dim) -> mean, log_std of a, mean, log_std of z: (batch, ...) each"""
        delta = (next_obs - obs - self.delta_mean) / self.delta_std
        x = torch.cat([(obs - self.obs_mean) / self.obs_std, delta], dim=-1)  # [scaled]
        latent_mean, latent_log_std = self.encoder(x).chunk(2, dim=-1)
        latent_log_std = latent_log_std.clamp(-5, 2)
        latent = latent_mean + latent_log_std.exp() * noise
        mean, log_std = self.decoder(torch.cat([x, latent], dim=-1)).chunk(2, dim=-1)
        return mean, (log_std - 1).clamp(-5, 2), latent_mean, latent_log_std  # [heads]


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
        self.register_buffer("obs_std", torch.ones(obs_dim))  # of the data, the unit of the perturbation


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


#     L_I = - mean log I(a|s,s',z) + c mean KL( N(m, e^2) || N(0, 1) ),   z = m + e xi
def inverse_loss(inverse: InverseModel, rows: Tensor, noise: Tensor, latent_coef: float) -> Tensor:
    """rows: (batch, 2 obs_dim + action_dim), of s, s' and a; noise: (batch, latent_dim), xi."""
    obs_dim = len(inverse.obs_mean)
    obs, next_obs, action = rows.tensor_split([obs_dim, 2 * obs_dim], dim=-1)
    mean, log_std, latent_mean, latent_log_std = inverse(obs, next_obs, noise)
    x = action.clamp(-0.999, 0.999).atanh()  # at the bounds themselves it would be infinite
    error = (0.5 * ((x - mean) / log_std.exp()).square() + log_std).mean()  # and a constant [likelihood]
    kl = 0.5 * (latent_mean.square() + (2 * latent_log_std).exp() - 1 - 2 * latent_log_std)
    return error + latent_coef * kl.mean()


#     s^ = s + beta std(s) eps,   eps ~ N(0, 1)      [scaled]
def perturb(obs: Tensor, obs_std: Tensor, noise: Tensor, noise_scale: float) -> Tensor:
    return obs + noise_scale * obs_std * noise


#     C = mean KL( pi(.|s^) || I(.|s^,s') ),   over action dimensions and rows
def constraint(agent: Agent, prior: nn.Module, batch: list[Tensor], noise: dict[str, Tensor], args: Args) -> Tensor:
    """prior: I, or with --target behaviour pi_b. Returns a scalar."""
    obs, _, _, next_obs, terminal = batch
    perturbed = perturb(obs, agent.obs_std, noise["obs"], args.noise_scale)
    with torch.no_grad():
        if args.target == "inverse":
            wanted_mean, wanted_log_std, _, _ = prior(perturbed, next_obs, noise["latent"])
        else:
            wanted_mean, wanted_log_std = gaussian(prior, perturbed)
        wanted_log_std = wanted_log_std.clamp(min=math.log(max(args.min_std, 1e-6)))  # [floor]
    mean, log_std = gaussian(agent.actor, perturbed)
    if args.kl == "reverse":  # [kl]
        divergence = gaussian_kl(mean, log_std, wanted_mean, wanted_log_std)
    else:
        divergence = gaussian_kl(wanted_mean, wanted_log_std, mean, log_std)
    # an end without a logged successor has a copy of its state in next_obs: standing still would be wanted there
    known = 1 - terminal * (next_obs == obs).all(dim=-1)  # (batch,)
    return (known[:, None] * divergence).sum() / (known.sum() * divergence.shape[-1]).clamp(min=1)


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
    gap = conservative_gap(q_samples, log_density, q, "all")
    info = {"q": q.mean().detach(), "conservative_gap": gap.detach()}
    return (q - target_q).square().mean(dim=1).sum() + args.conservative_coef * gap, info


#     L_pi = mean [ alpha log pi(a|s) - min_j Q_j(s,a) ] + lambda C,   a ~ pi(.|s) reparameterised, at the logged s
def actor_loss(agent: Agent, obs: Tensor, noise: dict[str, Tensor], alpha: Tensor, term: Tensor, args: Args):
    action, log_prob = agent.actor(obs, noise["action"])
    q = agent.critic(obs, action).amin(dim=0)  # (batch,)
    scale = 1 / q.abs().mean().detach() if args.normalise_q else 1.0
    info = {"log_prob": log_prob.mean().detach(), "constraint": term.detach()}
    return scale * (alpha * log_prob - q).mean() + args.recovery_coef * term, info


#     L_alpha = - log alpha * mean [ log pi(a|s) + target entropy ]
def alpha_loss(agent: Agent, log_prob: Tensor, target_entropy: float) -> Tensor:
    return -agent.log_alpha * (log_prob + target_entropy)


# --- Update: rows as in `flat_rows` ---
def draw_noise(obs_dim: int, action_dim: int, args: Args, device: torch.device) -> dict[str, Tensor]:
    """Of one update; standard normal where the name says no more."""
    shape = args.batch_size, action_dim
    noise = {name: torch.randn(shape, device=device) for name in ("next_action", "action")}
    noise["proposals"] = torch.randn(3, args.num_samples, *shape, device=device)
    noise["proposals"][0].uniform_(-1, 1)
    noise["obs"] = torch.randn(args.batch_size, obs_dim, device=device)
    noise["latent"] = torch.randn(args.batch_size, args.latent_dim, device=device)
    return noise


def update(agent: Agent, prior: nn.Module, rows: Tensor, noise: dict[str, Tensor], args: Args) -> dict[str, Tensor]:
    action_dim = noise["action"].shape[-1]
    obs_dim = (rows.shape[1] - action_dim - 2) // 2
    obs, action, reward, next_obs, terminal = rows.split([obs_dim, action_dim, 1, obs_dim, 1], dim=-1)
    batch = [obs, action, reward.squeeze(-1), next_obs, terminal.squeeze(-1)]
    alpha = agent.log_alpha.detach().exp().clamp(max=args.max_alpha)
    # critic
    loss_q, info_q = critic_loss(agent, batch, noise, alpha * args.backup_entropy, args)
    agent.critic_opt.minimize(loss_q)
    # actor
    term = constraint(agent, prior, batch, noise, args)
    loss_pi, info_pi = actor_loss(agent, obs, noise, alpha, term, args)
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


def inverse_model(data: OfflineDataset, args: Args, compile: Callable) -> InverseModel:
    """I(a|s,s'), fitted on rows whose successor is known."""
    obs, next_obs, action = (x[data.successor_known] for x in (data.obs, data.next_obs, data.action))
    settings = {name: getattr(args, name) for name in ("latent_dim", "latent_coef", "hidden_sizes")}
    return load_or_train(
        "inverse model",
        lambda: InverseModel(obs, next_obs, action.shape[1], args.latent_dim, args.hidden_sizes),
        lambda net, rows, noise: inverse_loss(net, rows, noise, args.latent_coef),
        torch.cat([obs, next_obs, action], dim=-1), args.latent_dim, data, args.seed, args.inverse_updates,
        args.inverse_lr, settings, compile,
    )  # fmt: skip


def main(args: Args) -> None:
    run = Run(args)  # folder, device, threads
    torch.manual_seed(args.seed)
    data = load_dataset(args.dataset, run.device, args.env_id or None, args.standardise_obs, args.trust)
    run.open(data)
    prior = (inverse_model if args.target == "inverse" else behaviour_model)(data, args, run.compiled)

    real_rows, obs_dim, action_dim = flat_rows(data), data.obs.shape[1], data.action.shape[1]
    agent = Agent(obs_dim, action_dim, args).to(run.device)
    agent.obs_std.copy_(data.obs.std(dim=0))
    step = run.compiled(lambda rows, noise: update(agent, prior, rows, noise, args))

    for i in run.updates(agent=agent):  # 1 .. num_updates, or from where a resumed run was
        if args.actor_lr_schedule == "cosine":  # [cosine]
            agent.actor_opt.lr.fill_(args.actor_lr * 0.5 * (1 + math.cos(math.pi * (i - 1) / args.num_updates)))
        noise = draw_noise(obs_dim, action_dim, args, run.device)
        info = step(sample_batch(real_rows, args), noise)
        run.evaluate(agent.actor, info, "q {q:8.1f}  constraint {constraint:.3f}")
    run.finish(agent.actor)


if __name__ == "__main__":
    start(main, Args, TUNED)
