"""One-step: Offline RL Without Off-Policy Evaluation (Brandfonbrener et al. 2021, arXiv:2106.08909)

No model, and no policy but the data's is ever evaluated. Q is that of the behaviour, by SARSA on consecutive rows:

    L_Q = sum_j mean ( Q_j(s,a) - r - gamma (1 - d) Q'_j(s',a') )^2,   a' logged        critic_loss()

Then Q stays as it is and the policy improves on the behaviour once: as far as a KL divergence from it is worth
(reverse-kl), by imitating the better actions (exp-weights), or by taking the best of a few of its actions (easy-bcq).
Rollouts end:      there are none.
Gradient stops at: pi_b, the target in critic_loss, the weights of exp-weights; a policy's loss moves the actor alone.
Normalised:        rewards by the spread of returns (scale_rewards); actions to [-1, 1]; observations are not.
Elites:            there is no ensemble.
Departures: [twin] There are two Q, each learns from its own target, and a policy is improved by the smaller one; in the
authors' code two, an option, share the smaller target. The policy is the squashed normal of sac_bc.py, theirs a
normal whose actions are clipped, and [closed] the divergence is in closed form, without sampling noise. [rewards]
Rewards are scaled as in iql.py, so that one coefficient means the same in every dataset. [fixed] The noise of
easy-bcq's candidates is fixed, so that acting is deterministic.
Run: python algos/onestep.py
     python algos/onestep.py --dataset hopper_medium-v2.hdf5 --env-id Hopper-v5
"""

import copy
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import InputError  # noqa: E402
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
    # --- SARSA ---
    hidden_sizes: tuple[int, ...] = (256, 256)  # of actor and critics [one-step code: (1024, 1024); also of pi_b]
    gamma: float = 0.99  # discount per environment step
    tau: float = 0.005  # Polyak step of the target critic
    actor_lr: float = 1e-4  # [one-step code]
    critic_lr: float = 3e-4  # [one-step code: 1e-4, with 2M updates]
    # --- The method ---
    improvement: Literal["reverse-kl", "exp-weights", "easy-bcq"] = "reverse-kl"  # of the behaviour, by its Q
    policy_share: float = 0.25  # of the updates, the last ones: the policy's [one-step code: 0.05]; easy-bcq has none
    kl_coef: float = 1.0  # c, of reverse-kl [one-step code; paper: by dataset]
    inverse_temperature: float = 3.0  # w, of exp-weights [as in IQL; one-step code: 0.01]; 0 is cloning
    max_weight: float = 100.0  # of a row in the imitation [one-step code]
    num_samples: int = 10  # actions of the behaviour: candidates of easy-bcq, or for V of exp-weights
    reward_scale: Literal["returns", "none"] = "returns"  # returns: 1000 / (best - worst episode) [rewards]
    behaviour_updates: int = 50_000  # of pi_b
    behaviour_lr: float = 3e-4  # of pi_b's fit


TUNED = {  # of pendulum ours, of other data the bench's; D4RL, also our hopper/medium-v0 etc.: the defaults
    "pendulum/random-v0": dict(
        num_updates=5_000, eval_interval=500, score_evals=3, checkpoint_interval=2_500, compile=False,
        hidden_sizes=(64, 64), actor_lr=1e-3, critic_lr=1e-3, behaviour_updates=5_000,
    ),
    "other": dict(
        num_updates=120_000, eval_interval=4_000, hidden_sizes=(64, 64),
        policy_share=0.5, behaviour_updates=10_000,
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
    """Everything that training changes: networks and optimizers. Its state_dict makes a checkpoint."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.actor = Actor(obs_dim, action_dim, args.hidden_sizes)
        self.critic = Critic(obs_dim, action_dim, args.hidden_sizes)
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


def behaviour_kl(actor: Actor, behaviour: Actor, obs: Tensor) -> Tensor:
    """KL( pi(.|s) || pi_b(.|s) ) per dimension of the action: (batch, action_dim)."""
    (mean, log_std), (other_mean, other_log_std) = gaussian(actor, obs), gaussian(behaviour, obs)
    return gaussian_kl(mean, log_std, other_mean, other_log_std)  # [closed]


#     L_pi = mean [ - min_j Q_j(s,a) + c KL( pi(.|s) || pi_b(.|s) ) ],   a ~ pi(.|s) reparameterised
def reverse_kl_loss(agent: Agent, behaviour: Actor, batch: list[Tensor], noise: dict[str, Tensor], args: Args):
    obs = batch[0]
    action, _ = agent.actor(obs, noise["action"])
    q = agent.critic(obs, action).amin(dim=0)  # (batch,) [twin]
    kl = behaviour_kl(agent.actor, behaviour, obs).sum(dim=-1)
    assert q.shape == kl.shape
    return (args.kl_coef * kl - q).mean(), {"q": q.mean().detach()}


#     L_pi = - mean min( exp[ w (min_j Q_j(s,a) - V(s)) ], max weight ) log pi(a|s),   V(s) = mean_k min_j Q_j(s,a_k)
def exp_weights_loss(agent: Agent, behaviour: Actor, batch: list[Tensor], noise: dict[str, Tensor], args: Args):
    obs, action, *_ = batch
    with torch.no_grad():
        candidates, _ = behaviour(obs, noise["candidates"])  # (num_samples, batch, action_dim)
        states = obs.expand(len(candidates), -1, -1)
        v = agent.critic(states.flatten(0, 1), candidates.flatten(0, 1)).amin(dim=0).view(len(candidates), -1)
        q = agent.critic(obs, action).amin(dim=0)  # (batch,) [twin]
        weight = (args.inverse_temperature * (q - v.mean(dim=0))).exp().clamp(max=args.max_weight)
    log_prob = action_log_prob(agent.actor, obs, action)  # (batch,)
    assert weight.shape == log_prob.shape
    return -(weight * log_prob).mean(), {"q": q.mean()}


#     pi(s) = argmax_k min_j Q_j(s,a_k),   a_k ~ pi_b(.|s)
class EasyBCQ(nn.Module):
    """The policy of easy-bcq: no network of its own."""

    def __init__(self, obs_dim: int, action_dim: int, hidden_sizes: tuple[int, ...], num_samples: int):
        super().__init__()
        self.critic, self.behaviour = (net(obs_dim, action_dim, hidden_sizes) for net in (Critic, Actor))
        self.register_buffer("noise", torch.zeros(num_samples, 1, action_dim))  # the same in every state [fixed]

    def act(self, obs: Tensor) -> Tensor:
        """(batch, obs_dim) -> (batch, action_dim)"""
        candidates, _ = self.behaviour(obs, self.noise.expand(-1, len(obs), -1))  # (num_samples, batch, action_dim)
        q = self.critic(obs.expand(len(candidates), -1, -1).flatten(0, 1), candidates.flatten(0, 1)).amin(dim=0)
        best = q.view(len(candidates), -1).argmax(dim=0)  # (batch,)
        return candidates[best, torch.arange(len(obs), device=obs.device)]


# --- Losses: SARSA ---
#     L_Q = sum_j mean ( Q_j(s,a) - r - gamma (1 - d) Q'_j(s',a') )^2
def critic_loss(agent: Agent, batch: list[Tensor], args: Args):
    obs, action, reward, next_obs, terminal, next_action = batch
    with torch.no_grad():
        next_q = agent.target_critic(next_obs, next_action)  # (2, batch) [twin]
        target_q = reward + args.gamma * (1 - terminal) * next_q
    q = agent.critic(obs, action)  # (2, batch)
    assert target_q.shape == q.shape
    return (q - target_q).square().mean(dim=1).sum(), {"q": q.mean().detach()}


# --- Update: rows as in `sarsa_rows` ---
def draw_noise(action_dim: int, args: Args, device: torch.device) -> dict[str, Tensor]:
    """Of one update; standard normal where the name says no more."""
    shape = args.batch_size, action_dim
    noise = {"candidates": torch.randn(args.num_samples, *shape, device=device)}
    noise["action"] = noise["candidates"][0]  # reverse-kl draws one action, exp-weights num_samples
    return noise


def update(agent: Agent, behaviour: Actor, rows: Tensor, noise: dict[str, Tensor], improve: bool, args: Args):
    """improve: the policy, by the critic as it is; else the critic."""
    action_dim = noise["action"].shape[-1]
    obs_dim = (rows.shape[1] - 2 * action_dim - 2) // 2
    columns = rows.split([obs_dim, action_dim, 1, obs_dim, 1, action_dim], dim=-1)
    obs, action, reward, next_obs, terminal, next_action = columns
    batch = [obs, action, reward.squeeze(-1), next_obs, terminal.squeeze(-1), next_action]
    with torch.no_grad():
        kl = behaviour_kl(agent.actor, behaviour, obs).sum(dim=-1).mean()
    nan = torch.full_like(kl, math.nan)
    info = {"critic_loss": nan, "actor_loss": nan, "kl": kl}
    # actor
    if improve:
        improvement_loss = reverse_kl_loss if args.improvement == "reverse-kl" else exp_weights_loss
        loss_pi, info_pi = improvement_loss(agent, behaviour, batch, noise, args)
        agent.actor_opt.minimize(loss_pi)
        return info | {"actor_loss": loss_pi.detach(), **info_pi}
    # critic
    loss_q, info_q = critic_loss(agent, batch, args)
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
    if args.reward_scale == "returns":
        data = scale_rewards(data)
    run.open(data)
    real_rows = sarsa_rows(data)
    pi_b = behaviour_model(data, args, run.compiled)

    obs_dim, action_dim = data.obs.shape[1], data.action.shape[1]
    agent = Agent(obs_dim, action_dim, args).to(run.device)
    agent.actor.load_state_dict(pi_b.state_dict())  # their divergence is 0 then [one-step code]
    # two graphs, the critic's step and the policy's
    step = run.compiled(lambda rows, noise, improve: update(agent, pi_b, rows, noise, improve, args))
    policy, first_improvement = agent.actor, args.num_updates - int(args.policy_share * args.num_updates) + 1
    if args.improvement == "easy-bcq":
        policy, first_improvement = EasyBCQ(obs_dim, action_dim, args.hidden_sizes, args.num_samples), math.inf
        policy.critic, policy.behaviour = agent.critic, pi_b
        policy.noise.copy_(torch.randn(policy.noise.shape, generator=torch.Generator().manual_seed(args.seed)))
        policy.to(run.device)

    for i in run.updates(agent=agent):  # 1 .. num_updates, or from where a resumed run was
        noise = draw_noise(action_dim, args, run.device)
        info = step(sample_batch(real_rows, args), noise, i >= first_improvement)
        run.evaluate(policy, info, "q {q:8.1f}  kl {kl:.3f}")
    run.finish(policy)


if __name__ == "__main__":
    start(main, Args, TUNED)
