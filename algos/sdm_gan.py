"""SDM-GAN: Stationary Distribution Matching by a GAN (Yang et al. 2022, arXiv:2206.07166)

Values of a policy go wrong where its states and actions leave the data. SDM-GAN lets a discriminator D tell logged
pairs (s, a) from those of the policy: its action at a known state, and its action one step later by an ensemble,
since a stationary distribution is one that a further step does not change. The policy, a network of state and noise
whose actions may have any distribution, must deceive D and maximise Q:

    L_pi = - c mean Q(s,pi(s)) / Qbar + L_G,   L_G = - mean log D(s,a) over the policy's pairs       actor_loss()

--gan wasserstein puts a critic with gradient penalty in D's place.
Rollouts end:      after h steps, or where terminal_fn says so; the pairs that D sees after one step.
Gradient stops at: the target in critic_loss, the model's step in policy_pairs, Qbar in actor_loss, the fakes in
                   discriminator_loss, the whole rollout; actor_loss moves the actor alone.
Normalised:        the ensemble's inputs and targets; Q by Qbar; actions to [-1, 1]; observations and rewards are not.
Elites:            the 5 of 7 members with the lowest holdout error (Dynamics.fit); at each step one simulates a row.
As in the released code, [raw] D sees actions before their tanh, so that one logged at a bound, about 8 there, gives
itself away. Departures: [shared] In a model rollout every state gets an action of its own; that code, by a slip, gives
a chunk of states the first one's. [heads] Ensemble and terminations are those of the other scripts, one fit for all,
not one network for both. [candidates] Evaluation acts with noise 0, the policy alone; that code takes Q's best of ten.
[weight] Pairs at a terminal row or an end weigh 0, and as many logged ones, so that shapes stay fixed; that code drops
them. [warm] The first rollout comes after the warm start: rows of earlier ones are never used in that code either.
Run: python algos/sdm_gan.py
     python algos/sdm_gan.py --dataset hopper_medium-v2.hdf5 --env-id Hopper-v5
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
    batch_size: int = 512  # rows in a gradient step
    # --- Dynamics ---
    dynamics: str = ""  # file of a fitted ensemble; by default the cache is looked up, else it is fitted
    num_members: int = 7  # N, size of the ensemble [MOPO]
    num_elites: int = 5  # members that simulate, the best by holdout error [MOPO]
    dynamics_hidden_size: int = 200  # units in each of its four layers [MOPO]
    dynamics_max_epochs: int | None = None  # of the fit; by default it ends when no member improves
    termination: str = "auto"  # when simulated episodes end: auto, known, forced, learned, none or module:function
    # --- Model rollouts ---
    real_ratio: float = 0.5  # share of real rows in a batch [SDM-GAN code, when all drops are done]
    rollout_interval: int = 250  # updates between rollouts [SDM-GAN code]
    rollout_batch_size: int = 6_400  # start states of a rollout, drawn from the data [SDM-GAN code: 32,000 / h]
    rollout_length: int = 5  # h, model steps from each start state [1, 3 or 5, by dataset: TUNED]
    rollout_retain: int = 20  # full rollouts that the model buffer holds [SDM-GAN code]
    # --- Actor and critic ---
    hidden_sizes: tuple[int, ...] = (400, 300)  # of actor and critics [SDM-GAN code; also of the discriminator]
    gamma: float = 0.99  # discount per environment step
    tau: float = 0.005  # Polyak step of the target critic [SDM-GAN code, also of the target actor and Qbar]
    actor_lr: float = 2e-4  # [SDM-GAN code]
    critic_lr: float = 3e-4  # [SDM-GAN code]
    # --- The method ---
    gan: Literal["js", "wasserstein"] = "js"  # the distance between policy's and logged pairs
    policy_interval: int = 2  # updates of critic and discriminator for one of the policy [SDM-GAN code]
    q_coef: float = 10.0  # c, weight of Q against the discriminator [SDM-GAN code]
    noise_dim: int | None = None  # of the policy's noise; by default min(10, obs_dim // 2) [or 50, by dataset: TUNED]
    discriminator_lr: float = 2e-4  # [SDM-GAN code]
    momentum: float = 0.4  # beta_1 of Adam, of policy and discriminator [SDM-GAN code]
    penalty_weight: float = 10.0  # of wasserstein's gradient penalty [SDM-GAN code]
    num_bootstrap: int = 50  # K, actions whose Q the critic's target averages, each at an s' of its own [SDM-GAN code]
    noise_scale: float = 3e-4  # sigma, of perturbed states, in raw units [SDM-GAN code]
    warm_start_updates: int = 40_000  # the first ones: no critic, the policy by L_G alone [SDM-GAN code]
    real_ratio_interval: int = 5_000  # updates after them between drops of the real share by 0.1 [SDM-GAN code]
    num_candidates: int = 1  # at evaluation, Q_1's best is taken [SDM-GAN code: 10]; 1: noise 0 [candidates]


TUNED = {  # of pendulum ours, of other data the bench's; of D4RL, also for our hopper/medium-v0 etc., the code's v0
    "pendulum/random-v0": dict(
        num_updates=5_000, eval_interval=500, score_evals=3, checkpoint_interval=2_500, compile=False, batch_size=128,
        hidden_sizes=(64, 64), actor_lr=1e-3, critic_lr=1e-3, rollout_batch_size=1_000, num_bootstrap=2,
        dynamics_hidden_size=128, dynamics_max_epochs=15, q_coef=100.0, discriminator_lr=1e-3,
        warm_start_updates=750, real_ratio_interval=250,
    ),
    "other": dict(
        num_updates=120_000, eval_interval=4_000, hidden_sizes=(64, 64), batch_size=256,
        rollout_batch_size=1_000, num_bootstrap=4, dynamics_hidden_size=128,
        warm_start_updates=4_800, real_ratio_interval=600,
    ),
} | {
    f"d4rl/{name}-v2": dict(rollout_length=length, rollout_batch_size=32_000 // length, noise_dim=noise_dim)
    for name, (length, noise_dim) in {
        "halfcheetah-medium": (3, None), "halfcheetah-medium-replay": (3, 50), "halfcheetah-medium-expert": (3, None),
        "hopper-medium": (1, 50), "hopper-medium-replay": (1, 50), "hopper-medium-expert": (5, None),
        "walker2d-medium": (1, None), "walker2d-medium-replay": (5, 50), "walker2d-medium-expert": (5, 50),
    }.items()
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
        layers = [layer for i, o in zip(sizes[:-1], sizes[1:]) for layer in (Linears(2, i, o), nn.LeakyReLU())]
        self.net = nn.Sequential(*layers, Linears(2, sizes[-1], 1))

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        return self.net(torch.cat([obs, action], dim=-1).expand(2, -1, -1)).squeeze(-1)


class Actor(nn.Module):
    """Implicit policy: noise, drawn by the caller, goes in beside the observation and may shape any distribution."""

    def __init__(self, obs_dim: int, action_dim: int, hidden_sizes: tuple[int, ...], noise_dim: int | None):
        super().__init__()
        self.noise_dim = noise_dim or max(1, min(10, obs_dim // 2))
        sizes = [obs_dim + self.noise_dim, *hidden_sizes]
        layers = [layer for i, o in zip(sizes[:-1], sizes[1:]) for layer in (nn.Linear(i, o), nn.LeakyReLU())]
        self.net = nn.Sequential(*layers, nn.Linear(sizes[-1], action_dim))

    def forward(self, obs: Tensor, noise: Tensor) -> Tensor:
        """(batch, obs_dim), standard normal (batch, noise_dim) -> x (batch, action_dim); tanh(x) is the action"""
        return self.net(torch.cat([obs, noise.clamp(-3, 3)], dim=-1))

    def act(self, obs: Tensor) -> Tensor:
        """The deterministic policy: (batch, obs_dim) -> (batch, action_dim)"""
        return torch.tanh(self(obs, obs.new_zeros(len(obs), self.noise_dim)))  # [candidates]


class Discriminator(nn.Module):
    """(batch, obs_dim + action_dim) -> (batch,): the logit of "logged", or Wasserstein's potential."""

    def __init__(self, obs_dim: int, action_dim: int, hidden_sizes: tuple[int, ...]):
        super().__init__()
        sizes = [obs_dim + action_dim, *hidden_sizes]
        layers = [layer for i, o in zip(sizes[:-1], sizes[1:]) for layer in (nn.Linear(i, o), nn.LeakyReLU())]
        self.net = nn.Sequential(*layers, nn.Linear(sizes[-1], 1))

    def forward(self, pairs: Tensor) -> Tensor:
        return self.net(pairs).squeeze(-1)


class SkippingAdam(nn.Module):
    """Kingma & Ba 2015 as in the other scripts, with a beta_1 of choice; a step can be left out inside the graph."""

    def __init__(self, params: list[Tensor], lr: float, beta: float = 0.9):
        super().__init__()
        self.params, self.lr, self.beta = params, lr, beta
        # parameters without gradient, so that they are saved and moved with the rest
        self.mean, self.square = (nn.ParameterList(torch.zeros_like(p) for p in params) for _ in range(2))
        self.requires_grad_(False)
        self.register_buffer("step", torch.tensor(0.0))

    def minimize(self, loss: Tensor, take: Tensor) -> None:
        """take: bool scalar; where it is False nothing changes, whatever the gradients are."""
        grads = torch.autograd.grad(loss, self.params)
        with torch.no_grad():
            self.step += take
            c1, c2 = 1 - self.beta**self.step, 1 - 0.999**self.step
            for p, g, m, v in zip(self.params, grads, self.mean, self.square, strict=True):
                m.copy_(torch.where(take, m.lerp(g, 1 - self.beta), m))
                v.copy_(torch.where(take, v.lerp(g.square(), 0.001), v))
                p.sub_(torch.where(take, self.lr * (m / c1) / ((v / c2).sqrt() + 1e-8), 0.0))


class Agent(nn.Module):
    """Everything that training changes: networks, running numbers, optimizers. Its state_dict makes a checkpoint."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.actor = Actor(obs_dim, action_dim, args.hidden_sizes, args.noise_dim)
        self.critic = Critic(obs_dim, action_dim, args.hidden_sizes)
        self.discriminator = Discriminator(obs_dim, action_dim, args.hidden_sizes)
        self.target_actor = copy.deepcopy(self.actor).requires_grad_(False)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.actor_opt = SkippingAdam(list(self.actor.parameters()), args.actor_lr, args.momentum)
        self.critic_opt = SkippingAdam(list(self.critic.parameters()), args.critic_lr)
        self.discriminator_opt = SkippingAdam([*self.discriminator.parameters()], args.discriminator_lr, args.momentum)
        self.register_buffer("warm", torch.tensor(True))  # whether the warm start goes on
        self.register_buffer("reward_range", torch.tensor([-math.inf, math.inf]))  # of the data
        self.register_buffer("q_average", torch.tensor(0.0))  # Qbar; 0: no batch yet
        self.register_buffer("loss_limit", torch.tensor(1_000.0))  # of the critic [SDM-GAN code]
        self.register_buffer("losses", torch.zeros(1_000))  # of its last updates


# --- The method ---
#     s~ = s + clip( sigma eps, -0.05, 0.05 ),   eps ~ N(0, 1)
def jitter(obs: Tensor, noise: Tensor, noise_scale: float) -> Tensor:
    """(batch, obs_dim), (..., batch, obs_dim) -> as the noise"""
    return obs + (noise_scale * noise).clamp(-0.05, 0.05)


#     x = atanh a,   a held off -1 and 1, where x is about -8 and 8
def pre_tanh(action: Tensor) -> Tensor:
    return torch.atanh(action.clamp(-1 + 1e-7, 1 - 1e-7))


#     F = { (s~,x) } u { (s',x') },   x = g(s~,xi),   s' ~ M(s~,tanh x) without gradient,   x' = g(s',xi')
def policy_pairs(actor: Actor, dynamics: Dynamics, terminal_fn: Callable, rows: Tensor, noise: dict, args: Args):
    """At the states of rows: obs (2 batch, obs_dim), x (2 batch, action_dim) and weight, 0 or 1, (2 batch,)."""
    obs, alive = rows[:, : noise["pair_obs"].shape[-1]], 1 - rows[:, -1]
    near = jitter(obs, noise["pair_obs"], args.noise_scale)
    raw = actor(near, noise["pair_action"][0])
    with torch.no_grad():
        action = torch.tanh(raw)
        next_obs, _, _ = dynamics.step(near, action, noise["order"], noise["model"])  # [heads]
        next_alive = alive * (~terminal_fn(near, action, next_obs)).to(alive.dtype)
    next_raw = actor(next_obs, noise["pair_action"][1])
    return torch.cat([near, next_obs]), torch.cat([raw, next_raw]), torch.cat([alive, next_alive])  # [weight]


def mean_over(weight: Tensor, value: Tensor) -> Tensor:
    """Of the rows that count: both (rows,), weight 0 or 1."""
    assert weight.shape == value.shape
    return (weight * value).sum() / weight.sum().clamp(min=1)


#     js:            L_G = - mean_F log D,   D = sigmoid(logit)
#     wasserstein:   L_G = - mean_F D
def generator_loss(fake: Tensor, weight: Tensor, gan: str) -> Tensor:
    """fake: of the discriminator, (rows,)."""
    return -mean_over(weight, F.logsigmoid(fake) if gan == "js" else fake)


def gradient_penalty(discriminator, pairs: Tensor) -> Tensor:
    """( |grad D(z)| - 1 )^2 at the pairs z: (rows, obs_dim + action_dim) -> (rows,)"""
    pairs = pairs.detach().requires_grad_()
    slope = torch.autograd.grad(discriminator(pairs).sum(), pairs, create_graph=True)[0].norm(dim=-1)  # (rows,)
    return (slope - 1).square()


#     q = mean_k [ 0.75 min_j Q'_j(s~_k,a_k) + 0.25 max_j Q'_j(s~_k,a_k) ],   a_k ~ pi'(.|s~_k),   0 where |q| >= 2000
#     s~_1 .. s~_K-1 as above around s',   s~_K = s'
def bootstrapped_value(agent: Agent, next_obs: Tensor, noise: dict[str, Tensor], args: Args) -> Tensor:
    """next_obs: (batch, obs_dim). Returns (batch,)."""
    near = torch.cat([jitter(next_obs, noise["next_obs"], args.noise_scale), next_obs[None]]).flatten(0, 1)
    q = agent.target_critic(near, torch.tanh(agent.target_actor(near, noise["next_action"].flatten(0, 1))))
    q = (0.75 * q.amin(dim=0) + 0.25 * q.amax(dim=0)).unflatten(0, (-1, len(next_obs))).mean(dim=0)  # (batch,)
    return torch.where(q.abs() < 2_000, q, 0.0)


#     r in [ min r - 3 std r, max r + 3 std r ],   of the data
def reward_range(reward: Tensor) -> Tensor:
    return torch.stack([reward.min() - 3 * reward.std(), reward.max() + 3 * reward.std()])


#     limit <- 0.95 limit + 0.05 ( mean + 3 std of the last losses )
def next_loss_limit(limit: Tensor, losses: Tensor) -> Tensor:
    return 0.95 * limit + 0.05 * (losses.mean() + 3 * losses.std(correction=0))


#     rho = max( rho_end, 1 - 0.1 floor( updates after the warm start / interval ) ),   update: from 1
def real_share(update: int, args: Args) -> float:
    drops = max(0, update - 1 - args.warm_start_updates) // args.real_ratio_interval
    return max(args.real_ratio, 1 - 0.1 * drops)


class BestOfCandidates(nn.Module):
    """The policy at evaluation where num_candidates is not 1; the noise is the same in every state."""

    def __init__(self, obs_dim: int, action_dim: int, hidden_sizes: tuple, noise_dim: int | None, num_candidates: int):
        super().__init__()
        self.critic = Critic(obs_dim, action_dim, hidden_sizes)
        self.actor = Actor(obs_dim, action_dim, hidden_sizes, noise_dim)
        self.register_buffer("noise", torch.zeros(num_candidates, self.actor.noise_dim))

    def act(self, obs: Tensor) -> Tensor:
        """(batch, obs_dim) -> (batch, action_dim)"""
        states = obs.expand(len(self.noise), -1, -1).flatten(0, 1)  # (num_candidates batch, obs_dim)
        candidates = torch.tanh(self.actor(states, self.noise.repeat_interleave(len(obs), dim=0)))
        best = self.critic(states, candidates)[0].view(-1, len(obs)).argmax(dim=0)  # (batch,)
        return candidates.view(-1, len(obs), candidates.shape[-1])[best, torch.arange(len(obs), device=obs.device)]


# --- Losses ---
#     y   = clip(r) + gamma (1 - d) q(s')
#     L_Q = sum_j mean H( Q_j(s,a) - y ),   H: squared error / 2, linear beyond 500
def critic_loss(agent: Agent, batch: list[Tensor], noise: dict[str, Tensor], args: Args):
    obs, action, reward, next_obs, terminal = batch
    with torch.no_grad():
        low, high = agent.reward_range
        next_q = bootstrapped_value(agent, next_obs, noise, args)
        target_q = reward.clamp(low, high) + args.gamma * (1 - terminal) * next_q
    q = agent.critic(obs, action)  # (2, batch)
    assert target_q.shape == q.shape[1:]
    loss = F.huber_loss(q, target_q.expand_as(q), reduction="none", delta=500.0).mean(dim=1).sum()
    return loss, {"q": q.mean().detach()}


#     L_pi = - c mean min_j Q_j(s,pi(s)) / Qbar + L_G,   in the warm start L_G
#     Qbar: a running mean of |min_j Q_j(s,pi(s))|, at first that of the batch
def actor_loss(agent: Agent, obs: Tensor, noise: dict[str, Tensor], loss_g: Tensor, args: Args):
    q = agent.critic(obs, torch.tanh(agent.actor(obs, noise["action"]))).amin(dim=0)  # (batch,)
    q_size = q.abs().mean().detach()
    q_average = torch.where(agent.q_average > 0, agent.q_average, q_size)
    loss = loss_g - torch.where(agent.warm, 0.0, args.q_coef / q_average) * q.mean()
    return loss, {"generator_loss": loss_g.detach(), "q_average": q_average, "q_size": q_size}


#     js:  L_D = 1/2 mean_T [ - label log D - (1 - label) log(1 - D) ] - 1/2 mean_F log(1 - D),   label ~ U[0.8, 1)
#     wasserstein:  L_D = - mean_T D + mean_F D + 10 mean ( |grad D(z)| - 1 )^2,   z = u t + (1 - u) f,   u ~ U[0, 1)
def discriminator_loss(agent: Agent, real: Tensor, fake: Tensor, weight: Tensor, noise: dict, args: Args):
    """real, fake: the pairs of T and F, (rows, obs_dim + action_dim), without gradient; weight: (rows,)."""
    real_out, fake_out, uniform = agent.discriminator(real), agent.discriminator(fake), noise["uniform"]  # (rows,)
    if args.gan == "js":
        real_loss = F.binary_cross_entropy_with_logits(real_out, 0.8 + 0.2 * uniform, reduction="none")
        fake_loss = F.binary_cross_entropy_with_logits(fake_out, torch.zeros_like(fake_out), reduction="none")
        loss = 0.5 * (mean_over(weight, real_loss) + mean_over(weight, fake_loss))
        middle = math.log(0.45 / 0.55)  # D where both are alike: half the labels' mean
    else:
        penalty = gradient_penalty(agent.discriminator, torch.lerp(fake, real, uniform[:, None]))
        loss = mean_over(weight, fake_out - real_out + args.penalty_weight * penalty)
        middle = 0.5 * (mean_over(weight, real_out) + mean_over(weight, fake_out))
    accuracy = {"real_accuracy": mean_over(weight, (real_out > middle).float())}
    return loss, accuracy | {"fake_accuracy": mean_over(weight, (fake_out <= middle).float())}


# --- Update: rows as in `flat_rows` ---
def draw_noise(obs_dim: int, noise_dim: int, args: Args, device: torch.device) -> dict[str, Tensor]:
    """Of one update; standard normal where the name says no more."""
    batch, k = args.batch_size, args.num_bootstrap
    shapes = {"next_obs": (k - 1, batch, obs_dim), "next_action": (k, batch, noise_dim), "action": (batch, noise_dim)}
    shapes |= {"pair_obs": (batch, obs_dim), "pair_action": (2, batch, noise_dim)}
    noise = {name: torch.randn(shape, device=device) for name, shape in shapes.items()}
    noise["order"] = torch.randperm(batch, device=device)  # which elite simulates which row
    noise["model"] = torch.randn(batch, obs_dim + 1, device=device)
    noise["uniform"] = torch.rand(2 * batch, device=device)
    return noise


def update(agent: Agent, model: tuple, rows: dict[str, Tensor], noise: dict[str, Tensor], improve: bool, args: Args):
    """rows: for the critic's batch, the policy's and the logged pairs; improve: also the policy, in some updates."""
    obs_dim, always = noise["pair_obs"].shape[-1], torch.ones_like(agent.warm)
    action_dim = rows["critic"].shape[1] - 2 * obs_dim - 2
    obs, action, reward, next_obs, terminal = rows["critic"].split([obs_dim, action_dim, 1, obs_dim, 1], dim=-1)
    batch = [obs, action, reward.squeeze(-1), next_obs, terminal.squeeze(-1)]
    # critic
    loss_q, info_q = critic_loss(agent, batch, noise, args)
    small = loss_q < agent.loss_limit
    agent.critic_opt.minimize(loss_q, small & ~agent.warm)
    # pairs of the policy and of the data
    dynamics, terminal_fn = model
    fake_obs, raw, weight = policy_pairs(agent.actor, dynamics, terminal_fn, rows["states"], noise, args)
    logged_obs, logged_action, _ = rows["logged"].split([obs_dim, action_dim, obs_dim + 2], dim=-1)
    fake, real = torch.cat([fake_obs, raw], dim=-1), torch.cat([logged_obs, pre_tanh(logged_action)], dim=-1)  # [raw]
    # actor
    loss_g = generator_loss(agent.discriminator(fake), weight, args.gan)
    loss_pi, info_pi = actor_loss(agent, obs, noise, loss_g, args)
    if improve:
        agent.actor_opt.minimize(loss_pi, always)
    # discriminator
    loss_d, info_d = discriminator_loss(agent, real, fake.detach(), weight, noise, args)
    agent.discriminator_opt.minimize(loss_d, always)
    # targets and running numbers
    with torch.no_grad():
        for name in ("critic", "actor"):
            net, target_net = getattr(agent, name), getattr(agent, f"target_{name}")
            for target, param in zip(target_net.parameters(), net.parameters(), strict=True):
                target.lerp_(param, args.tau)
        agent.q_average.copy_(info_pi["q_average"].lerp(info_pi["q_size"], args.tau))
        agent.losses.copy_(torch.cat([agent.losses[1:], loss_q[None]]))
    info = {"critic_loss": loss_q.detach(), "actor_loss": loss_pi.detach(), "discriminator_loss": loss_d.detach()}
    return {**info, "skipped": (~small).float(), **info_q, **info_pi, **info_d}


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


def sample_batch(real_rows: Tensor, buffer: ModelBuffer, real_ratio: float, args: Args) -> Tensor:
    """batch_size flat rows, the first real_ratio of them real."""
    num_real = int(real_ratio * args.batch_size)  # rounded down [MOPO code]
    real = torch.randint(len(real_rows), (num_real,), device=real_rows.device)
    model = torch.randint(max(buffer.size, 1), (args.batch_size - num_real,), device=real_rows.device)
    return torch.cat([real_rows.index_select(0, real), buffer.rows.index_select(0, model)])


@torch.no_grad()
def rollout(dynamics: Dynamics, actor: Actor, terminal_fn: Callable, starts: Tensor, args: Args):
    """From each start (batch, obs_dim) h steps, or up to the first terminal.

    Returns the transitions as flat rows (num, 2 obs_dim + action_dim + 2).
    """
    rows = []
    # on a CPU a thousand rows at a time, so that the ensemble's activations stay in its cache
    for obs in starts.split(len(starts) if starts.is_cuda else 1_000):
        for _ in range(args.rollout_length):
            action = torch.tanh(actor(obs, torch.randn(len(obs), actor.noise_dim, device=obs.device)))  # [shared]
            order = torch.randperm(len(obs), device=obs.device)  # which elite simulates which row
            noise = torch.randn(len(obs), obs.shape[1] + 1, device=obs.device)
            next_obs, reward, _ = dynamics.step(obs, action, order, noise)
            terminal = terminal_fn(obs, action, next_obs)
            rows.append(torch.cat([obs, action, reward[:, None], next_obs, terminal.float()[:, None]], dim=-1))
            obs = next_obs[~terminal]
    return torch.cat(rows)


def main(args: Args) -> None:
    run = Run(args)  # folder, device, threads
    torch.manual_seed(args.seed)
    data = load_dataset(args.dataset, run.device, args.env_id or None, args.standardise_obs, args.trust)
    run.open(data)
    if args.num_updates <= args.warm_start_updates:
        print("warm start  all of it: the critic will learn nothing, lower --warm-start-updates")
    print(f"saturated   {(data.action.abs() > 0.999).float().mean():.1%} of logged actions lie within 0.001 of a bound")
    terminal_fn = termination_fn(args.termination, data, args.seed)
    sizes = {"num_members": args.num_members, "num_elites": args.num_elites, "hidden_size": args.dynamics_hidden_size}
    fit = {"max_epochs": args.dynamics_max_epochs, "path": args.dynamics, "compile": run.compiled}
    dynamics = load_or_fit(data, args.seed, **sizes, **fit)

    real_rows, obs_dim, action_dim = flat_rows(data), data.obs.shape[1], data.action.shape[1]
    agent = Agent(obs_dim, action_dim, args).to(run.device)
    agent.reward_range.copy_(reward_range(data.reward))
    policy = agent.actor
    if args.num_candidates > 1:
        with torch.random.fork_rng():  # else training would have other random numbers
            policy = BestOfCandidates(obs_dim, action_dim, args.hidden_sizes, args.noise_dim, args.num_candidates)
        policy.critic, policy.actor = agent.critic, agent.actor
        policy.noise = policy.noise.normal_(generator=torch.Generator().manual_seed(args.seed)).to(run.device)
    capacity = args.rollout_retain * args.rollout_batch_size * args.rollout_length
    buffer = ModelBuffer(capacity, real_rows.shape[1]).to(run.device)
    # two graphs, without and with the policy's step
    step = run.compiled(lambda rows, noise, improve: update(agent, (dynamics, terminal_fn), rows, noise, improve, args))

    for i in run.updates(agent=agent, buffer=buffer):  # 1 .. num_updates, or from where a resumed run was
        after = i - 1 - args.warm_start_updates
        if after >= 0 and after % args.rollout_interval == 0:  # [warm]
            starts = data.obs[torch.randint(len(data.obs), (args.rollout_batch_size,), device=run.device)]
            buffer.add(rollout(dynamics, agent.actor, terminal_fn, starts, args))
        agent.warm.fill_(after < 0)
        share = real_share(i, args)
        run.note(model_buffer_size=buffer.size, real_share=share)
        batch = {name: sample_batch(real_rows, buffer, share, args) for name in ("critic", "states")}
        batch["logged"] = real_rows[torch.randint(len(real_rows), (2 * args.batch_size,), device=run.device)]
        noise = draw_noise(obs_dim, agent.actor.noise_dim, args, run.device)
        info = step(batch, noise, i % args.policy_interval == 0)
        if i % len(agent.losses) == 0:
            agent.loss_limit.copy_(next_loss_limit(agent.loss_limit, agent.losses))
        run.evaluate(policy, info, "q {q:8.1f}  D right {real_accuracy:.0%} {fake_accuracy:.0%}")
    run.finish(policy)


if __name__ == "__main__":
    start(main, Args, TUNED)
