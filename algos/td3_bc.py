"""TD3+BC: A Minimalist Approach to Offline Reinforcement Learning (Fujimoto, Gu 2021, arXiv:2106.06860)

No model, TD3 on logged rows alone. A policy that may choose any action finds those whose Q is wrong because they were
never logged; one more term in its loss keeps its actions near the logged ones (Eq. 3 and 5):

    - lambda mean Q_1(s,pi(s)) + mean |pi(s) - a|^2,   lambda = alpha / mean |Q_1(s,pi(s))|        actor_loss()

Dividing by the size of Q makes one alpha fit rewards of any scale. bc.py is the second term alone.
Rollouts end:      there are none.
Gradient stops at: the target in critic_loss, lambda; actor_loss moves the actor alone.
Normalised:        observations to mean 0 and deviation 1 (standardise); actions to [-1, 1]; Q
                   in actor_loss, by its mean size; rewards are not.
Elites:            there is no ensemble.
As in the code that alpha is from, and not in the paper: [mean] |pi(s) - a|^2 is a mean over the action's dimensions,
too; lambda has Q of the policy's actions, in Eq. 5 of the logged ones.
Run: python algos/td3_bc.py
     python algos/td3_bc.py --dataset hopper_medium-v2.hdf5 --env-id Hopper-v5
"""

import copy
import math
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
    # --- TD3 ---
    hidden_sizes: tuple[int, ...] = (256, 256)  # of actor and critics [TD3+BC code]
    gamma: float = 0.99  # discount per environment step
    tau: float = 0.005  # Polyak step of the target critic [TD3+BC code, also of the target actor]
    actor_lr: float = 3e-4  # [TD3+BC code]
    critic_lr: float = 3e-4  # [TD3+BC code]
    policy_interval: int = 2  # updates of the critic for one of policy and targets [TD3 code]
    target_noise: float = 0.2  # deviation of the noise on the target's action [TD3 code]
    target_noise_clip: float = 0.5  # its largest size [TD3 code]
    # --- The method ---
    q_coef: float = 2.5  # alpha, weight of Q against imitation [TD3+BC code]; 0 is behaviour cloning


TUNED = {  # of pendulum ours, of other data the bench's; D4RL, also our hopper/medium-v0 etc.: the defaults
    "pendulum/random-v0": dict(
        num_updates=5_000, eval_interval=500, score_evals=3, checkpoint_interval=2_500, compile=False,
        hidden_sizes=(64, 64), actor_lr=1e-3, critic_lr=1e-3,
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
    """Everything that training changes: networks and optimizers. Its state_dict makes a checkpoint."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.actor = Actor(obs_dim, action_dim, args.hidden_sizes)
        self.critic = Critic(obs_dim, action_dim, args.hidden_sizes)
        self.target_actor = copy.deepcopy(self.actor).requires_grad_(False)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.actor_opt = Adam(list(self.actor.parameters()), args.actor_lr)
        self.critic_opt = Adam(list(self.critic.parameters()), args.critic_lr)


# --- Losses: TD3 ---
#     y   = r + gamma (1 - d) min_j Q'_j(s',a'),   a' = clip[ pi'(s') + clip(sigma eps, -c, c), -1, 1 ]
#     L_Q = sum_j mean (Q_j(s,a) - y)^2
def critic_loss(agent: Agent, batch: list[Tensor], noise: dict[str, Tensor], args: Args):
    obs, action, reward, next_obs, terminal = batch
    with torch.no_grad():
        smoothing = (args.target_noise * noise["next_action"]).clamp(-args.target_noise_clip, args.target_noise_clip)
        next_action = (agent.target_actor(next_obs) + smoothing).clamp(-1, 1)
        next_q = agent.target_critic(next_obs, next_action).amin(dim=0)  # (batch,)
        target_q = reward + args.gamma * (1 - terminal) * next_q
    q = agent.critic(obs, action)  # (2, batch)
    assert target_q.shape == q.shape[1:]
    return (q - target_q).square().mean(dim=1).sum(), {"q": q.mean().detach()}


#     L_pi = - lambda mean Q_1(s,pi(s)) + mean |pi(s) - a|^2,   lambda = alpha / mean |Q_1(s,pi(s))|, a constant
def actor_loss(agent: Agent, obs: Tensor, action: Tensor, args: Args):
    policy_action = agent.actor(obs)
    q = agent.critic(obs, policy_action)[0]  # (batch,)
    bc_loss = (policy_action - action).square().mean()  # [mean]
    return bc_loss - args.q_coef * q.mean() / q.abs().mean().detach(), {"bc_loss": bc_loss.detach()}


# --- Update: rows as in `flat_rows` ---
def draw_noise(action_dim: int, args: Args, device: torch.device) -> dict[str, Tensor]:
    """Of one update; standard normal where the name says no more."""
    shape = args.batch_size, action_dim
    noise = {"next_action": torch.randn(shape, device=device)}
    return noise


def update(agent: Agent, rows: Tensor, noise: dict[str, Tensor], improve: bool, args: Args) -> dict[str, Tensor]:
    """improve: also the policy and the targets, in one update of policy_interval."""
    action_dim = noise["next_action"].shape[-1]
    obs_dim = (rows.shape[1] - action_dim - 2) // 2
    obs, action, reward, next_obs, terminal = rows.split([obs_dim, action_dim, 1, obs_dim, 1], dim=-1)
    batch = [obs, action, reward.squeeze(-1), next_obs, terminal.squeeze(-1)]
    # critic
    loss_q, info_q = critic_loss(agent, batch, noise, args)
    agent.critic_opt.minimize(loss_q)
    nan = torch.full_like(loss_q, math.nan)
    info = {"critic_loss": loss_q.detach(), "actor_loss": nan, "bc_loss": nan, **info_q}
    if not improve:
        return info
    # actor
    loss_pi, info_pi = actor_loss(agent, obs, action, args)
    agent.actor_opt.minimize(loss_pi)
    # targets
    with torch.no_grad():
        for name in ("critic", "actor"):
            net, target_net = getattr(agent, name), getattr(agent, f"target_{name}")
            for target, param in zip(target_net.parameters(), net.parameters(), strict=True):
                target.lerp_(param, args.tau)
    return info | {"actor_loss": loss_pi.detach(), **info_pi}


# --- Batches ---
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
    # two graphs, without and with the policy's step
    step = run.compiled(lambda rows, noise, improve: update(agent, rows, noise, improve, args))

    for i in run.updates(agent=agent):  # 1 .. num_updates, or from where a resumed run was
        noise = draw_noise(action_dim, args, run.device)
        info = step(sample_batch(real_rows, args), noise, i % args.policy_interval == 0)
        run.evaluate(agent.actor, info, "q {q:8.1f}  bc {bc_loss:.3f}")
    run.finish(agent.actor)


if __name__ == "__main__":
    start(main, Args, TUNED)
