"""SDC: State Deviation Correction for Offline RL (Zhang et al., AAAI 2022, doi.org/10.1609/aaai.v36i8.20886)

What to do in a state that the data do not cover? Go where the data go on. SDC perturbs logged states a little,
s^ = s + beta eps, lets a dynamics ensemble say where the policy leads from there, and compares with a model U of what
follows the clean state in the data. The policy maximises Q under the constraint

    mean_s MMD[ U(.|s), Dyn(.|s^, pi(s^)) ] <= MMD_0 + eta                   constraint()

by dual gradient descent on a multiplier kappa. The critic is CQL's, or SAC's. U and the ensemble are fitted first.
Rollouts end:      after one step.
Gradient stops at: the proposals, the target in critic_loss, U and s^ in constraint, kappa in actor_loss. actor_loss
                   moves the actor alone; constraint's gradient passes through the ensemble on its way there.
Normalised:        the inputs and targets of ensemble and U, both sides of the MMD; actions to [-1, 1]; observations
                   and rewards are not.
Elites:            the 5 of 7 members with the lowest holdout error (Dynamics.fit); one simulates each pair of the MMD.
No code was released; settings without a source are choices. [latent] U is a variational model of the change s' - s;
with BEAR's weight of the latent variable's KL, 0.5, it goes unused on some data and U knows the mean alone. [scaled]
beta and the kernel are in standard deviations of the observations, for all sets. [width] The kernel is as wide as the
median distance between a sample of U and the logged s': neither 0 nor 1 there. [root] The MMD is the root of its biased
estimate, as in BEAR's code; two sets of samples of U are far from 0 in it, the further the fewer they are: MMD_0 is
what they have. As in cql.py, [lse] the sum over actions is an estimate, [entropy] the target entropy is -action_dim,
[backup] the critic's target has none, [cosine] the actor's learning rate falls along a cosine and alpha is at most 1.
Run: python algos/sdc.py
     python algos/sdc.py --dataset hopper_medium-v2.hdf5 --env-id Hopper-v5
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
from common import InputError  # noqa: E402
from common.dataset import OfflineDataset, load_dataset  # noqa: E402
from common.dynamics import Dynamics, load_or_fit  # noqa: E402
from common.pretrain import load_or_train  # noqa: E402
from common.run import Run, RunArgs, start  # noqa: E402


@dataclass
class Args(RunArgs):  # and how a run is watched, which changes no policy: common/run.py
    dataset: str = "pendulum/random-v0"  # Minari id, D4RL name, folder of a Minari dataset, .hdf5 or .npz
    env_id: str = ""  # environment to evaluate in; by default the one that the dataset names
    standardise_obs: bool = False  # networks see (obs - mean) / std of the data [papers: raw]
    seed: int = 0  # of every random number
    num_updates: int = 1_000_000  # gradient steps
    batch_size: int = 256  # rows in a gradient step
    # --- Dynamics ---
    dynamics: str = ""  # file of a fitted ensemble; by default the cache is looked up, else it is fitted
    num_members: int = 7  # N, size of the ensemble [MOPO]
    num_elites: int = 5  # members that simulate, the best by holdout error [MOPO]
    dynamics_hidden_size: int = 200  # units in each of its four layers [MOPO]
    dynamics_max_epochs: int | None = None  # of the fit; by default it ends when no member improves
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
    noise_scale: float = 3e-3  # beta, of the perturbed states [SCAS code]
    eta: float = 0.05  # how far the mean MMD may be above MMD_0 [BEAR code]
    multiplier: float | None = None  # kappa, when it is not to be learned
    multiplier_lr: float = 1e-3  # of kappa's logarithm [BEAR code]
    mmd_samples: int = 10  # next states of either side
    bandwidth: float | None = None  # of the kernel; by default from the data [width]
    normalise_q: bool = False  # divide SAC's part by mean |Q|
    conservative_coef: float = 5.0  # w, of CQL's term [OSR code]; 0, with --backup-entropy: SAC's critic
    num_samples: int = 10  # K, actions of each of three kinds at a state [CQL code]
    backup_entropy: bool = False  # in the critic's target [backup]
    latent_coef: float = 0.05  # weight of the latent variable's KL in the transition model [latent]
    transition_updates: int = 50_000  # of the transition model
    transition_lr: float = 1e-3  # of its fit [BEAR code]


TUNED = {  # of pendulum ours, of other data the bench's; D4RL, also our hopper/medium-v0 etc.: the defaults
    "pendulum/random-v0": dict(
        num_updates=5_000, eval_interval=500, score_evals=3, checkpoint_interval=2_500, compile=False,
        hidden_sizes=(64, 64), actor_lr=1e-3, critic_lr=1e-3, alpha_lr=1e-3,
        conservative_coef=0.1, num_samples=2, transition_updates=5_000,
        dynamics_hidden_size=128, dynamics_max_epochs=15,
    ),
    "other": dict(
        num_updates=120_000, eval_interval=4_000, hidden_sizes=(64, 64),
        num_samples=4, transition_updates=10_000, dynamics_hidden_size=128,
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


class TransitionModel(nn.Module):
    """U(s'|s): what follows s in the data, whatever the action; a latent variable z stands for it."""

    def __init__(self, obs: Tensor, next_obs: Tensor, hidden_sizes: tuple[int, ...]):
        """obs, next_obs: the data's, (num_rows, obs_dim), for the scales."""
        super().__init__()
        obs_dim, self.latent_dim = obs.shape[1], 2 * obs.shape[1]  # [BEAR code, of the action's]
        for name, x in (("obs", obs), ("delta", next_obs - obs)):
            std, mean = torch.std_mean(x, dim=0)
            self.register_buffer(f"{name}_mean", mean)
            self.register_buffer(f"{name}_std", torch.where(std > 1e-6 * (1 + mean.abs()), std, 1.0))

        def mlp(in_dim: int, hidden_sizes: tuple[int, ...], out_dim: int) -> nn.Sequential:
            sizes = [in_dim, *hidden_sizes]
            layers = [layer for i, o in zip(sizes[:-1], sizes[1:]) for layer in (nn.Linear(i, o), nn.ReLU())]
            return nn.Sequential(*layers, nn.Linear(sizes[-1], out_dim))

        self.encoder = mlp(2 * obs_dim, hidden_sizes, 2 * self.latent_dim)
        self.decoder = mlp(obs_dim + self.latent_dim, hidden_sizes, obs_dim)

    def encode(self, obs: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, obs_dim), standardised change (batch, obs_dim) -> mean, log_std of z (batch, latent_dim)"""
        x = torch.cat([(obs - self.obs_mean) / self.obs_std, delta], dim=-1)
        mean, log_std = self.encoder(x).chunk(2, dim=-1)
        return mean, log_std.clamp(-5, 2)

    def decode(self, obs: Tensor, latent: Tensor) -> Tensor:
        """(batch, obs_dim), (batch, latent_dim) -> standardised change (batch, obs_dim)"""
        return self.decoder(torch.cat([(obs - self.obs_mean) / self.obs_std, latent], dim=-1))

    def sample(self, obs: Tensor, noise: Tensor) -> Tensor:
        """next_obs (batch, obs_dim), given standard normal noise (batch, latent_dim)"""
        return obs + self.delta_mean + self.delta_std * self.decode(obs, noise)


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
        self.kappa_opt = Adam([self.log_kappa], args.multiplier_lr)
        self.register_buffer("obs_std", torch.ones(obs_dim))  # of the data, the unit of the perturbation
        for name, shape in (("obs_scale", obs_dim), ("bandwidth", ()), ("mmd_0", ())):  # by `calibrate`
            self.register_buffer(name, torch.ones(shape))


# --- The method ---
#     L_U = mean | delta - g(s,z) |^2 + c mean KL( N(m, e^2) || N(0, 1) ),   z = m + e xi
def transition_loss(transition: TransitionModel, rows: Tensor, noise: Tensor, latent_coef: float) -> Tensor:
    """delta: the change s' - s, standardised. rows: (batch, 2 obs_dim), of s and s'; noise: (batch, latent_dim), xi."""
    obs, next_obs = rows.chunk(2, dim=-1)
    delta = (next_obs - obs - transition.delta_mean) / transition.delta_std
    mean, log_std = transition.encode(obs, delta)
    error = (transition.decode(obs, mean + log_std.exp() * noise) - delta).square().mean()
    kl = 0.5 * (mean.square() + (2 * log_std).exp() - 1 - 2 * log_std)
    return error + latent_coef * kl.mean()  # [latent]


#     s^ = s + beta std(s) eps,   eps ~ N(0, 1)      [scaled]
def perturb(obs: Tensor, obs_std: Tensor, noise: Tensor, noise_scale: float) -> Tensor:
    return obs + noise_scale * obs_std * noise


#     MMD^2 = mean k(x,x') + mean k(y,y') - 2 mean k(x,y),   k(x,y) = exp( - |x - y|^2 / (2 h^2) )
def mmd(x: Tensor, y: Tensor, bandwidth: Tensor) -> Tensor:
    """x: (n, batch, obs_dim), y: (m, batch, obs_dim). Returns (batch,)."""

    def mean_kernel(a: Tensor, b: Tensor) -> Tensor:
        distance = (a[:, None] - b[None]).square().sum(dim=-1)  # (n, m, batch)
        return (-distance / (2 * bandwidth.square())).exp().mean(dim=(0, 1))

    squared = mean_kernel(x, x) + mean_kernel(y, y) - 2 * mean_kernel(x, y)
    return (squared + 1e-6).sqrt()  # the slope of the root is infinite at 0 [root]


#     C = mean_s MMD[ U(.|s), Dyn(.|s^, pi(s^)) ] - MMD_0 - eta
def constraint(agent: Agent, transition: TransitionModel, dynamics: Dynamics, obs: Tensor, noise: dict, args: Args):
    """obs: (batch, obs_dim). Returns a scalar."""
    n = args.mmd_samples
    usual = transition.sample(obs.expand(n, -1, -1), noise["latent"])  # (n, batch, obs_dim)
    perturbed = perturb(obs, agent.obs_std, noise["obs"], args.noise_scale)
    action, _ = agent.actor(perturbed, noise["perturbed_action"])  # (n, batch, action_dim)
    start = perturbed.expand(n, -1, -1).flatten(0, 1)  # (n * batch, obs_dim)
    reached, _, _ = dynamics.step(start, action.flatten(0, 1), noise["order"], noise["model"])
    usual, reached = usual / agent.obs_scale, reached.unflatten(0, (n, -1)) / agent.obs_scale  # [scaled]
    distance = mmd(usual, reached, agent.bandwidth)  # (batch,)
    return distance.mean() - agent.mmd_0 - args.eta


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


#     L_pi = mean [ alpha log pi(a|s) - min_j Q_j(s,a) ] + kappa C,   a ~ pi(.|s) reparameterised, at the logged s
def actor_loss(agent: Agent, obs: Tensor, noise: dict[str, Tensor], alpha: Tensor, term: Tensor, args: Args):
    action, log_prob = agent.actor(obs, noise["action"])
    q = agent.critic(obs, action).amin(dim=0)  # (batch,)
    scale = 1 / q.abs().mean().detach() if args.normalise_q else 1.0
    kappa = agent.log_kappa.detach().exp() if args.multiplier is None else torch.full_like(alpha, args.multiplier)
    info = {"log_prob": log_prob.mean().detach(), "constraint": term.detach(), "kappa": kappa}
    return scale * (alpha * log_prob - q).mean() + kappa * term, info


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
    num_pairs = args.mmd_samples * args.batch_size
    noise["perturbed_action"] = torch.randn(args.mmd_samples, *shape, device=device)
    noise["latent"] = torch.randn(args.mmd_samples, args.batch_size, 2 * obs_dim, device=device)
    noise["order"] = torch.randperm(num_pairs, device=device)  # which elite simulates which row
    noise["model"] = torch.randn(num_pairs, obs_dim + 1, device=device)
    return noise


def update(agent: Agent, transition: TransitionModel, dynamics: Dynamics, rows: Tensor, noise: dict, args: Args):
    action_dim = noise["action"].shape[-1]
    obs_dim = (rows.shape[1] - action_dim - 2) // 2
    obs, action, reward, next_obs, terminal = rows.split([obs_dim, action_dim, 1, obs_dim, 1], dim=-1)
    batch = [obs, action, reward.squeeze(-1), next_obs, terminal.squeeze(-1)]
    alpha = agent.log_alpha.detach().exp().clamp(max=args.max_alpha)
    # critic
    loss_q, info_q = critic_loss(agent, batch, noise, alpha * args.backup_entropy, args)
    agent.critic_opt.minimize(loss_q)
    # actor
    term = constraint(agent, transition, dynamics, obs, noise, args)
    loss_pi, info_pi = actor_loss(agent, obs, noise, alpha, term, args)
    agent.actor_opt.minimize(loss_pi)
    # multiplier:  L_kappa = - kappa C
    if args.multiplier is None:
        agent.kappa_opt.minimize(-agent.log_kappa.exp() * info_pi["constraint"])
        with torch.no_grad():
            agent.log_kappa.clamp_(-5, 10)  # [BEAR code]
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
def transition_model(data: OfflineDataset, args: Args, compile: Callable) -> TransitionModel:
    """U(s'|s), fitted on rows whose successor is known."""
    obs, next_obs = (x[data.successor_known] for x in (data.obs, data.next_obs))
    settings = {name: getattr(args, name) for name in ("latent_coef", "hidden_sizes")}
    return load_or_train(
        "transition model",
        lambda: TransitionModel(obs, next_obs, args.hidden_sizes),
        lambda net, rows, noise: transition_loss(net, rows, noise, args.latent_coef),
        torch.cat([obs, next_obs], dim=-1), 2 * obs.shape[1], data, args.seed, args.transition_updates,
        args.transition_lr, settings, compile,
    )  # fmt: skip


@torch.no_grad()
def calibrate(agent: Agent, transition: TransitionModel, data: OfflineDataset, args: Args) -> None:
    """Sets the kernel's bandwidth and MMD_0 from U at logged states.

    Raises InputError where the constraint would say nothing: when the kernel is next to 0 or 1 everywhere.
    """
    generator = torch.Generator(data.obs.device).manual_seed(args.seed)
    known = data.successor_known.nonzero().squeeze(1)
    at = known[torch.randint(len(known), (1_000,), device=known.device, generator=generator)]
    agent.obs_scale.copy_(transition.obs_std)
    obs, next_obs = data.obs[at].expand(args.mmd_samples, -1, -1), data.next_obs[at] / agent.obs_scale
    shape = args.mmd_samples, len(at), transition.latent_dim
    noise = [torch.randn(shape, device=known.device, generator=generator) for _ in range(2)]
    one, other = (transition.sample(obs, z) / agent.obs_scale for z in noise)  # (mmd_samples, 1_000, obs_dim)
    distance = (one[0] - next_obs).norm(dim=-1)  # (1_000,) [width]
    agent.bandwidth.copy_(distance.median() if args.bandwidth is None else torch.tensor(args.bandwidth))
    kernel = (-distance.square() / (2 * agent.bandwidth.square())).exp().mean().item()
    if not 0.01 < kernel < 0.99:
        raise InputError(
            f"the kernel is {kernel:.3f} on average, so that the constraint says nothing: choose another --bandwidth, "
            f"distances are about {distance.median():.3g}"
        )
    agent.mmd_0.copy_(mmd(one, other, agent.bandwidth).mean())  # [root]
    print(f"constraint  MMD <= {agent.mmd_0:.3f} + {args.eta:.3g}, bandwidth {agent.bandwidth:.3g}")
    spread = ((one - other).square().sum(dim=-1).mean() / distance.square().mean()).sqrt()
    print(f"transition  samples of U lie {spread:.2f} times as far apart as from logged ones (right: 1, collapsed: 0)")


def main(args: Args) -> None:
    run = Run(args)  # folder, device, threads
    torch.manual_seed(args.seed)
    data = load_dataset(args.dataset, run.device, args.env_id or None, args.standardise_obs, args.trust)
    run.open(data)
    sizes = {"num_members": args.num_members, "num_elites": args.num_elites, "hidden_size": args.dynamics_hidden_size}
    fit = {"max_epochs": args.dynamics_max_epochs, "path": args.dynamics, "compile": run.compiled}
    dynamics = load_or_fit(data, args.seed, **sizes, **fit)
    transition = transition_model(data, args, run.compiled)

    real_rows, obs_dim, action_dim = flat_rows(data), data.obs.shape[1], data.action.shape[1]
    agent = Agent(obs_dim, action_dim, args).to(run.device)
    agent.obs_std.copy_(data.obs.std(dim=0))
    calibrate(agent, transition, data, args)
    step = run.compiled(lambda rows, noise: update(agent, transition, dynamics, rows, noise, args))

    for i in run.updates(agent=agent):  # 1 .. num_updates, or from where a resumed run was
        if args.actor_lr_schedule == "cosine":  # [cosine]
            agent.actor_opt.lr.fill_(args.actor_lr * 0.5 * (1 + math.cos(math.pi * (i - 1) / args.num_updates)))
        noise = draw_noise(obs_dim, action_dim, args, run.device)
        info = step(sample_batch(real_rows, args), noise)
        run.evaluate(agent.actor, info, "q {q:8.1f}  constraint {constraint:.3f}  kappa {kappa:.2f}")
    run.finish(agent.actor)


if __name__ == "__main__":
    start(main, Args, TUNED)
