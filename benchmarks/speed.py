"""Speed of training at HalfCheetah's sizes: ours compiled and eager, a plain modular version, and OfflineRL-Kit.

MOPO's parts, then the updates of the other methods, each with its own script's default networks.

Contestants take turns, repetition by repetition, in one process; a ratio is the median over repetitions of the ratio
within one. Results go to benchmarks/results/speed-<threads>-threads.json.
Run: python benchmarks/speed.py --num-threads 1 --peer path/to/OfflineRL-Kit
"""

import copy
import ctypes
import json
import os
import platform
import sys
import time
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common.dynamics  # noqa: E402
from algos import bc, combo, cql, iql, mobile, mopo, onestep, sac_bc, td3_bc  # noqa: E402
from benchmarks.files import HomePaths, start  # noqa: E402
from benchmarks.peer import check_checkout  # noqa: E402
from common.dynamics import Dynamics  # noqa: E402
from common.machine import compiled, exact_products, keep_freed_memory  # noqa: E402

OBS_DIM, ACTION_DIM, BATCH_SIZE, NUM_ROWS = 17, 6, 256, 100_000
NUM_UPDATES, NUM_SLOW_UPDATES, NUM_MINIBATCHES = 200, 15, 30  # of one repetition; slow: those of many sampled actions
CPU = torch.device("cpu")
METHODS = {
    "MOPO": mopo, "MOBILE": mobile, "COMBO": combo, "CQL": cql, "TD3+BC": td3_bc, "IQL": iql, "BC": bc,
    "SAC+BC": sac_bc, "one-step": onestep,
}  # fmt: skip
PLANNERS = ("MOPO", "COMBO")  # whose rollouts differ: all members at every row, or one


@dataclass
class Args(HomePaths):
    num_threads: int = 1  # CPU threads
    repetitions: int = 5  # of every contestant, in turns
    num_starts: int = 50_000  # start states of a rollout of 5 steps
    peer: Path | None = None  # folder of a checkout of OfflineRL-Kit
    only: str = ""  # part of a row's name: those alone, and no file is written


def random_rows(seed: int = 0) -> torch.Tensor:
    """Flat rows of made-up transitions, (NUM_ROWS, 2 OBS_DIM + ACTION_DIM + 2)."""
    generator = torch.Generator().manual_seed(seed)
    obs = torch.randn(NUM_ROWS, OBS_DIM, generator=generator)
    action = torch.rand(NUM_ROWS, ACTION_DIM, generator=generator) * 2 - 1
    reward = torch.randn(NUM_ROWS, 1, generator=generator)
    next_obs = obs + 0.1 * torch.randn(NUM_ROWS, OBS_DIM, generator=generator)
    return torch.cat([obs, action, reward, next_obs, torch.zeros(NUM_ROWS, 1)], dim=1)


# --- Contestants: row of the table -> a function that does one repetition of it and returns how many things it did ---
def our_updates(module: types.ModuleType, compile: bool = True) -> Callable[..., int]:
    """The update of a script, with its own default networks, as its `main` calls it."""
    torch.manual_seed(0)
    settings, rows, models, shape = module.Args(), random_rows(), [], [ACTION_DIM]
    agent = module.Agent(OBS_DIM, ACTION_DIM, settings)
    if module in (sac_bc, onestep):
        models = [module.Actor(OBS_DIM, ACTION_DIM, settings.hidden_sizes).requires_grad_(False)]
    if module is mobile:
        models = [Dynamics(OBS_DIM, ACTION_DIM).requires_grad_(False)]
        shape = [*models, ACTION_DIM]
    if module is onestep:
        rows = torch.cat(
            [rows, rows[:, OBS_DIM : OBS_DIM + ACTION_DIM].roll(-1, dims=0)], dim=1
        )  # with the next action
    data = [rows]
    if hasattr(module, "ModelBuffer"):
        data.append(module.ModelBuffer(len(rows), rows.shape[1]))
        data[1].add(rows)
    improves = {td3_bc: lambda i: i % 2 == 0, onestep: lambda i: i >= NUM_UPDATES * (1 - settings.policy_share)}
    step = lambda *inputs: module.update(agent, *models, *inputs, settings)  # noqa: E731
    step = compiled(step, CPU) if compile else step
    usual = NUM_SLOW_UPDATES if module in (combo, cql, mobile) else NUM_UPDATES

    def updates(num: int = usual) -> int:
        for i in range(num):
            inputs = [module.sample_batch(*data, settings)]
            if hasattr(module, "draw_noise"):
                inputs.append(module.draw_noise(*shape, settings, CPU))
            if module in improves:
                inputs.append(improves[module](i))
            step(*inputs)
        return num

    return updates


def our_fit(compile: bool = True) -> Callable[[], int]:
    """Minibatches of the ensemble's fit, compiled as in a long one."""
    torch.manual_seed(0)
    rows, dynamics, graphs = random_rows(), Dynamics(OBS_DIM, ACTION_DIM), {}
    x, y = rows[:, : OBS_DIM + ACTION_DIM], torch.cat([rows[:, 24:41] - rows[:, :17], rows[:, 23:24]], dim=1)
    size = NUM_MINIBATCHES * BATCH_SIZE + 1000
    common.dynamics.SHORT_FIT = 0

    def compile_once(function: Callable) -> Callable:
        return graphs.setdefault("fit", compiled(function, CPU) if compile else function)

    def minibatches() -> int:
        dynamics.fit(x[:size], y[:size], seed=0, max_epochs=1, compile=compile_once)
        return NUM_MINIBATCHES

    return minibatches


def our_rollout(module: types.ModuleType, num_starts: int) -> Callable[[], int]:
    torch.manual_seed(0)
    rows, dynamics = random_rows(), Dynamics(OBS_DIM, ACTION_DIM)
    agent = module.Agent(OBS_DIM, ACTION_DIM, module.Args())
    never = lambda obs, action, next_obs: torch.zeros(len(obs), dtype=torch.bool)  # noqa: E731

    def rollout() -> int:
        starts = rows[torch.randint(NUM_ROWS, (num_starts,)), :OBS_DIM]
        new = module.rollout(dynamics, agent.actor, never, starts, module.Args())
        return len(new[0] if type(new) is tuple else new)

    return rollout


def ours(args: Args) -> dict[str, Callable[[], int]]:
    """The functions of algos/ and common/ as the scripts call them; made when they are asked for."""
    made = {f"{name}: update": partial(our_updates, module) for name, module in METHODS.items()}
    made |= {f"{name}: rollout transition": partial(our_rollout, METHODS[name], args.num_starts) for name in PLANNERS}
    return made | {"ensemble minibatch": our_fit}


def ours_eagerly(args: Args) -> dict[str, Callable[[], int]]:
    return {"MOPO: update": partial(our_updates, mopo, False), "ensemble minibatch": partial(our_fit, False)}


def mlp(sizes: list[int]) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers = [layer for i, o in zip(sizes[:-1], sizes[1:]) for layer in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def plain(args: Args) -> dict[str, Callable[[], int]]:
    """The same update as most would write it: two critics, torch.distributions, three optimizers, losses as numbers."""
    torch.manual_seed(0)
    rows = random_rows()
    actor, critics = mlp([OBS_DIM, 256, 256, 2 * ACTION_DIM]), [mlp([OBS_DIM + ACTION_DIM, 256, 256, 1]) for _ in "12"]
    targets = [copy.deepcopy(critic) for critic in critics]
    log_alpha = torch.zeros(1, requires_grad=True)
    adam = torch.optim.Adam
    actor_opt, alpha_opt = adam(actor.parameters(), 1e-4), adam([log_alpha], 1e-4)
    critic_opts = [adam(critic.parameters(), 3e-4) for critic in critics]

    def act(obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, log_std = actor(obs).chunk(2, dim=-1)
        normal = torch.distributions.Normal(mean, log_std.clamp(-5, 2).exp())
        raw = normal.rsample()
        action = torch.tanh(raw)
        return action, (normal.log_prob(raw) - torch.log(1 - action.square() + 1e-6)).sum(-1, keepdim=True)

    def updates() -> int:
        for _ in range(NUM_UPDATES):
            batch = rows[torch.randint(NUM_ROWS, (BATCH_SIZE,))]
            obs, action, reward, next_obs, terminal = batch.split([OBS_DIM, ACTION_DIM, 1, OBS_DIM, 1], dim=-1)
            with torch.no_grad():
                next_action, next_log_prob = act(next_obs)
                next_q = torch.min(*(q(torch.cat([next_obs, next_action], -1)) for q in targets))
                target = reward + 0.99 * (1 - terminal) * (next_q - log_alpha.exp() * next_log_prob)
            for critic, opt in zip(critics, critic_opts, strict=True):
                loss = F.mse_loss(critic(torch.cat([obs, action], -1)), target)
                opt.zero_grad()
                loss.backward()
                opt.step()
                loss.item()
            new_action, log_prob = act(obs)
            q = torch.min(*(q(torch.cat([obs, new_action], -1)) for q in critics))
            loss = (log_alpha.exp().detach() * log_prob - q).mean()
            actor_opt.zero_grad()
            loss.backward()
            actor_opt.step()
            alpha_loss = -(log_alpha * (log_prob.detach() - ACTION_DIM)).mean()
            alpha_opt.zero_grad()
            alpha_loss.backward()
            alpha_opt.step()
            loss.item(), alpha_loss.item()
            for target_critic, critic in zip(targets, critics, strict=True):
                for old, new in zip(target_critic.parameters(), critic.parameters(), strict=True):
                    old.data.copy_(0.995 * old.data + 0.005 * new.data)
        return NUM_UPDATES

    return {"MOPO: update": lambda: updates}


def offlinerl_kit(args: Args) -> dict[str, Callable[[], int]]:
    """OfflineRL-Kit's own classes, put together as in its run_example/run_mopo.py."""
    for name in ("gym", "gym.envs", "gym.envs.mujoco"):  # it imports an old gym, which this benchmark does not need
        sys.modules[name] = types.ModuleType(name)
    sys.modules["gym"].Env, sys.modules["gym"].spaces = object, types.SimpleNamespace(Space=object, Box=object)
    sys.modules["gym.envs.mujoco"].mujoco_env = types.SimpleNamespace(MujocoEnv=object)
    sys.path.insert(0, str(args.peer))
    from offlinerlkit.buffer import ReplayBuffer
    from offlinerlkit.dynamics import EnsembleDynamics
    from offlinerlkit.modules import Actor, ActorProb, Critic, DiagGaussian, EnsembleDynamicsModel, TanhDiagGaussian
    from offlinerlkit.nets import MLP
    from offlinerlkit.policy import BCPolicy, COMBOPolicy, CQLPolicy, IQLPolicy, MOPOPolicy, TD3BCPolicy
    from offlinerlkit.utils.noise import GaussianNoise
    from offlinerlkit.utils.scaler import StandardScaler

    torch.manual_seed(0)
    np.random.seed(0)
    rows = random_rows().numpy()
    obs, action, reward, next_obs, terminal = np.split(rows, np.cumsum([OBS_DIM, ACTION_DIM, 1, OBS_DIM]), axis=1)
    decay = [2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4]
    model = EnsembleDynamicsModel(OBS_DIM, ACTION_DIM, [200] * 4, 7, 5, weight_decays=decay, device="cpu")
    never = lambda obs, action, next_obs: np.zeros((len(obs), 1), dtype=bool)  # noqa: E731
    scaler = StandardScaler()
    scaler.fit(rows[:, : OBS_DIM + ACTION_DIM])
    dynamics = EnsembleDynamics(model, torch.optim.Adam(model.parameters(), lr=1e-3), scaler, never, penalty_coef=1.0)

    def networks(actor: nn.Module, sizes: list[int]) -> list:
        """Policy, two critics and their optimizers."""
        nets = [actor, *(Critic(MLP(input_dim=OBS_DIM + ACTION_DIM, hidden_dims=sizes), "cpu") for _ in "12")]
        return nets + [torch.optim.Adam(net.parameters(), lr=lr) for net, lr in zip(nets, (1e-4, 3e-4, 3e-4))]

    def soft(sizes: list[int]) -> tuple[list, tuple]:
        """The same with SAC's policy, and its temperature."""
        gaussian = TanhDiagGaussian(256, ACTION_DIM, unbounded=True, conditioned_sigma=True)
        log_alpha = torch.zeros(1, requires_grad=True)
        actor = ActorProb(MLP(input_dim=OBS_DIM, hidden_dims=sizes), gaussian, "cpu")
        return networks(actor, sizes), (-ACTION_DIM, log_alpha, torch.optim.Adam([log_alpha], lr=1e-4))

    nets, alpha = soft([256, 256])
    policy = MOPOPolicy(dynamics, *nets, alpha=alpha)
    space = types.SimpleNamespace(low=-np.ones(ACTION_DIM, np.float32), high=np.ones(ACTION_DIM, np.float32))
    options = {"action_space": space, "cql_weight": 5.0, "with_lagrange": False}
    nets, alpha = soft([256] * 3)
    combo_policy = COMBOPolicy(dynamics, *nets, alpha=alpha, **options)
    nets, alpha = soft([256] * 3)
    cql_policy = CQLPolicy(*nets, alpha=alpha, **options)
    deterministic = Actor(MLP(input_dim=OBS_DIM, hidden_dims=[256, 256]), ACTION_DIM, device="cpu")
    td3_bc_policy = TD3BCPolicy(*networks(deterministic, [256, 256]), exploration_noise=GaussianNoise)
    gaussian = DiagGaussian(256, ACTION_DIM, unbounded=False, conditioned_sigma=False)
    actor, *critics = networks(ActorProb(MLP(input_dim=OBS_DIM, hidden_dims=[256, 256]), gaussian, "cpu"), [256, 256])
    value = Critic(MLP(input_dim=OBS_DIM, hidden_dims=[256, 256]), "cpu")
    optims = [*critics[2:], torch.optim.Adam(value.parameters(), lr=3e-4)]
    iql_policy = IQLPolicy(actor, *critics[:2], value, *optims, action_space=space, expectile=0.7, temperature=3.0)
    bc_nets = networks(Actor(MLP(input_dim=OBS_DIM, hidden_dims=[256, 256]), ACTION_DIM, device="cpu"), [256])
    bc_policy = BCPolicy(bc_nets[0], bc_nets[3])
    for other in (bc_policy, iql_policy, combo_policy, cql_policy, td3_bc_policy):
        other.train()
    dtypes = {"obs_dtype": np.float32, "action_dtype": np.float32, "device": "cpu"}
    sizes = {"obs_shape": (OBS_DIM,), "action_dim": ACTION_DIM} | dtypes
    real, fake = ReplayBuffer(NUM_ROWS, **sizes), ReplayBuffer(args.num_starts * 25, **sizes)
    columns = {"obss": obs, "next_obss": next_obs, "actions": action, "rewards": reward, "terminals": terminal}
    real.add_batch(**columns)
    fake.add_batch(**columns)

    def updates(num: int = NUM_UPDATES) -> int:
        num_real = int(0.05 * BATCH_SIZE)
        for _ in range(num):
            policy.learn({"real": real.sample(num_real), "fake": fake.sample(BATCH_SIZE - num_real)})
        return num

    def minibatches() -> int:
        inputs, targets = scaler.transform(rows[:, : OBS_DIM + ACTION_DIM]), np.concatenate([next_obs - obs, reward], 1)
        index = np.random.randint(NUM_ROWS, size=(7, NUM_MINIBATCHES * BATCH_SIZE))
        dynamics.learn(inputs[index], targets[index], BATCH_SIZE)
        return NUM_MINIBATCHES

    def rollout() -> int:
        transitions, info = policy.rollout(real.sample(args.num_starts)["observations"].numpy(), 5)
        fake.add_batch(**transitions)
        return info["num_transitions"]

    def combo_updates() -> int:
        half = BATCH_SIZE // 2
        for _ in range(NUM_SLOW_UPDATES):
            combo_policy.learn({"real": real.sample(half), "fake": fake.sample(half)})
        return NUM_SLOW_UPDATES

    def combo_rollout() -> int:
        starts = real.sample(args.num_starts)["observations"].numpy()
        return combo_policy.rollout(starts, combo.Args().rollout_length)[1]["num_transitions"]

    def model_free_updates(policy, num: int) -> int:
        for _ in range(num):
            policy.learn(real.sample(BATCH_SIZE))
        return num

    made = {
        "MOPO: update": updates,
        "MOPO: rollout transition": rollout,
        "ensemble minibatch": minibatches,
        "COMBO: update": combo_updates,
        "COMBO: rollout transition": combo_rollout,
        "CQL: update": partial(model_free_updates, cql_policy, NUM_SLOW_UPDATES),
        "TD3+BC: update": partial(model_free_updates, td3_bc_policy, NUM_UPDATES),
        "IQL: update": partial(model_free_updates, iql_policy, NUM_UPDATES),
        "BC: update": partial(model_free_updates, bc_policy, NUM_UPDATES),
    }
    return {name: lambda function=function: function for name, function in made.items()}


def epoch(rollout: Callable[[], int], updates: Callable[[int], int]) -> int:
    """One rollout and the 1,000 updates that follow it."""
    rollout()
    updates(1_000)
    return 1


def set_up(name: str, args: Args) -> None:
    """Ours as `main` of algos/mopo.py does it, everybody else's as torch and glibc leave it."""
    if name.startswith("ours"):
        exact_products(CPU)
        keep_freed_memory()
    else:
        torch.set_float32_matmul_precision("highest")
        if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
            # glibc's own thresholds grow with what is freed; these are the largest that they come to
            for option, value in ((-1, 64 * 2**20), (-3, 32 * 2**20), (-4, 65_536)):
                libc.mallopt(option, value)


def main(args: Args) -> None:
    if args.peer:
        check_checkout(args.peer)
    torch.set_num_threads(args.num_threads)
    makers = {"ours": ours(args), "ours, --no-compile": ours_eagerly(args), "plain": plain(args)}
    if args.peer:
        makers["OfflineRL-Kit"] = offlinerl_kit(args)
    contestants = {
        name: {work: make() for work, make in made.items() if args.only in work} for name, made in makers.items()
    }
    for parts in contestants.values():
        if {"MOPO: rollout transition", "MOPO: update"} <= parts.keys():
            parts["MOPO: epoch"] = partial(epoch, parts["MOPO: rollout transition"], parts["MOPO: update"])
    if not contestants["ours"]:
        sys.exit(f"error: no row has {args.only!r} in its name: there are {', '.join(makers['ours'])}")
    seconds: dict[str, dict[str, list[float]]] = {}
    for work in contestants["ours"]:
        takers = {name: parts[work] for name, parts in contestants.items() if work in parts}
        seconds[work] = {name: [] for name in takers}
        for name, function in takers.items() if work != "MOPO: epoch" else ():
            set_up(name, args)
            function()  # compiles, fills caches
        for _ in range(args.repetitions):
            for name, function in takers.items():
                set_up(name, args)
                start = time.perf_counter()
                count = function()
                seconds[work][name].append((time.perf_counter() - start) / count)

    print(f"{args.num_threads} threads, {args.repetitions} repetitions\n")
    print("| | " + " | ".join(contestants) + " |" + "".join(f" ours / {name} |" for name in list(contestants)[1:]))
    print("| --- |" + " --- |" * (2 * len(contestants) - 1))
    for work, times in seconds.items():
        rates = [f"{1 / median(times[name]):,.4g}/s" if name in times else "" for name in contestants]
        ratios = [
            f"{median(b / a for a, b in zip(times['ours'], times[name], strict=True)):.2f}" if name in times else ""
            for name in list(contestants)[1:]
        ]
        print(f"| {work} | " + " | ".join(rates + ratios) + " |")
    if args.only or not args.peer:  # the committed files have all of it
        return
    about = {"machine": f"{platform.machine()}, {os.cpu_count()} cores", "torch": torch.__version__}
    about |= {"num_starts": args.num_starts, "repetitions": args.repetitions, "threads": args.num_threads}
    path = Path(__file__).parent / "results" / f"speed-{args.num_threads}-threads.json"
    path.write_text(json.dumps(about | {"seconds": seconds}, indent=1) + "\n")


if __name__ == "__main__":
    start(main, Args)
