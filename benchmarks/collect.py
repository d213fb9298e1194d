"""Records datasets: random actions in any environment, policies of our own, graded as in D4RL, and the bench's logs.

For the grades (Fu et al. 2020, arXiv:2004.07219) SAC is trained online, one update a step; along the way its sampled
return is measured and its actor kept.
    random          uniformly random actions
    medium          the first actor at about a third of an expert's return
    medium-replay   everything that the training saw up to the medium actor
    expert          the best actor of the training
    medium-expert   the episodes of medium, then those of expert
The medium and expert actors lie in benchmarks/policies, so that every set but the replay is recorded again in minutes;
the replay needs the training. The sets are local Minari datasets named <environment>/<grade>-v0.
The bench's own (--sets) are logged by what benchmarks/envs.py has for them.
Run: python benchmarks/collect.py --env-id Ant-v5 --dataset-id ant/random-v0 --num-steps 200000
     python benchmarks/collect.py --envs hopper --grades random medium expert
     python benchmarks/collect.py --envs hopper walker2d --train
     python benchmarks/collect.py --envs hopper --train --grades medium-replay
     python benchmarks/collect.py --sets pendulum/narrow pendulum/spin pointmass/stitch
"""

import json
import math
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args
from unittest.mock import patch

import gymnasium as gym
import minari
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from minari.data_collector import EpisodeBuffer
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from algos import mopo  # noqa: E402
from benchmarks.envs import LOGS, Act, Begun  # noqa: E402
from benchmarks.files import start  # noqa: E402
from common import InputError  # noqa: E402
from common.dataset import REF_SCORES as KNOWN_SCORES  # noqa: E402
from common.dataset import cache_dir, gym_class, load_dataset, make_spaces, minari_folder  # noqa: E402
from common.dynamics import save  # noqa: E402
from common.machine import compiled, exact_products  # noqa: E402

POLICIES = Path(__file__).parent / "policies"
NUM_RANDOM, EVAL_INTERVAL, CHECKPOINT_INTERVAL = 10_000, 10_000, 50_000  # environment steps
NUM_REFERENCE = 1_000  # episodes behind a reference score of the bench's own environments


@dataclass(frozen=True)
class Env:
    id: str
    medium: tuple[float, float]  # sampled return of the medium policy
    expert: float  # training ends when three evaluations in a row reach this sampled return,
    max_steps: int  # or after so many steps
    kwargs: dict = field(default_factory=dict)

    def make(self) -> gym.Env:
        return gym.make(self.id, **self.kwargs)


ENVS = {
    "hopper": Env("Hopper-v5", (1_000, 1_500), 3_000, 1_000_000),
    "halfcheetah": Env("HalfCheetah-v5", (4_000, 5_000), 9_000, 1_000_000),
    # with the friction of gym's v2 to v4, so that D4RL's reference scores mean the same here
    "walker2d": Env("Walker2d-v5", (1_500, 3_000), 3_500, 1_000_000, {"xml_file": "walker2d.xml"}),
    "inverteddoublependulum": Env("InvertedDoublePendulum-v5", (2_000, 4_500), 9_000, 200_000),
}
# (random, expert), where common has none: the mean of 9,526 random episodes, and of 40 by the expert in POLICIES
# of seed 1, none of which fell; of seed 0's 40 one did, and their mean is 9,124
REF_SCORES = {"InvertedDoublePendulum-v5": (47.3, 9350.0)}
Grade = Literal["random", "medium-replay", "medium", "medium-expert", "expert"]


@dataclass
class Args:
    env_id: str = ""  # any environment with continuous actions, for random ones; without, the next two
    dataset_id: str = ""  # name of its dataset, which ends in -v and a number
    envs: tuple[Literal["hopper", "halfcheetah", "walker2d", "inverteddoublependulum"], ...] = tuple(ENVS)  # which
    grades: tuple[Grade, ...] = ("random", "medium", "expert")  # medium-replay comes out of --train alone
    sets: tuple[Literal["pendulum/narrow", "pendulum/spin", "pointmass/stitch"], ...] = ()  # the bench's, in their size
    num_steps: int = 1_000_000  # of a dataset; medium-replay has its own number, medium-expert twice as many
    train: bool = False  # train the policies anew, record medium-replay; for that grade alone, stop at medium
    seed: int = 0  # of everything
    processes: int = 2  # at a time, one environment and one thread each
    compile: bool = True  # the update as one graph


# --- Acting ---
def play_random(env: gym.Env, num_steps: int, seed: int) -> Iterator[EpisodeBuffer]:
    """As play_by, with uniformly random actions."""
    env.action_space.seed(seed)
    return play_by(lambda: ({}, num_steps, lambda obs: env.action_space.sample()), env, num_steps, seed)


def play_by(begin: Callable[[], Begun], env: gym.Env, num_steps: int, seed: int) -> Iterator[EpisodeBuffer]:
    """Episodes of whoever `begin` names. The last one is cut off: there are `num_steps` steps in all.

    begin() tells of an episode where it begins, its most steps and who acts: benchmarks/envs.py.
    """
    recorded = 0
    with tqdm(total=num_steps, desc=f"recording {env.spec.id}", unit="step", disable=None) as progress:
        while recorded < num_steps:
            options, most, act = begin()
            obs, _ = env.reset(seed=seed if recorded == 0 else None, options=options or None)
            observations, steps, done = [obs], [], False
            while not done:
                action = act(obs)
                obs, reward, terminated, truncated, _ = env.step(action)
                recorded += 1
                stops = recorded == num_steps or len(steps) + 1 == most  # the recording, or the piece
                truncated = truncated or (stops and not terminated)
                observations.append(obs)
                steps.append((action, reward, terminated, truncated))
                done = terminated or truncated
            progress.update(len(steps))
            yield episode(observations, steps)


def play(actor: mopo.Actor, env: Env, num_steps: int, seed: int, num_envs: int = 10) -> Iterator[EpisodeBuffer]:
    """Episodes of sampled actions, as they end. The last ones are cut off: there are `num_steps` steps in all."""
    envs = SyncVectorEnv([env.make] * num_envs, autoreset_mode=AutoresetMode.SAME_STEP)
    generator = torch.Generator().manual_seed(seed)
    obs, _ = envs.reset(seed=np.random.SeedSequence(seed).generate_state(num_envs).tolist())
    running, left = [([obs[i].copy()], []) for i in range(num_envs)], num_steps
    low, high = envs.single_action_space.low, envs.single_action_space.high
    while left:
        noise = torch.randn(num_envs, len(low), generator=generator)
        with torch.no_grad():
            action = actor(torch.as_tensor(obs, dtype=torch.float32), noise)[0].numpy()
        action = (high + low) / 2 + (high - low) / 2 * action
        obs, reward, terminated, truncated, info = envs.step(action)
        for i, (observations, steps) in enumerate(running[:left]):
            done = terminated[i] or truncated[i]
            observations.append(info["final_obs"][i] if done else obs[i].copy())
            steps.append((action[i], reward[i], terminated[i], truncated[i]))
            if done:
                yield episode(observations, steps)
                running[i] = [obs[i].copy()], []
        left -= min(left, num_envs)
    for observations, steps in running:
        if steps:
            steps[-1] = *steps[-1][:3], True
            yield episode(observations, steps)
    envs.close()


def episode(observations: list, steps: list[tuple]) -> EpisodeBuffer:
    """observations: one more than steps of (action, reward, terminated, truncated)."""
    columns = dict(zip(("actions", "rewards", "terminations", "truncations"), map(np.array, zip(*steps, strict=True))))
    return EpisodeBuffer(observations=np.array(observations), **columns)


def sampled_return(actor: mopo.Actor, env: Env, seed: int) -> float:
    """Mean return of the episodes that end within 1,000 steps of ten environments.

    Where lengths differ much it lies below the true mean: a long episode that begins late does not end in time.
    """
    limit = gym.spec(env.id).max_episode_steps
    whole = [e for e in play(actor, env, 10_000, seed) if e.terminations[-1] or len(e.rewards) == limit]
    return float(np.mean([e.rewards.sum() for e in whole]))


# --- Training: SAC online, one update a step ---
def train(name: str, args: Args) -> dict:
    """Returns {"rows", "ends", "snapshots"}: flat rows (num_steps, ...) as in mopo.flat_rows, the index after the last
    row of each episode, and every evaluation as {"step", "return", "actor"}.

    Checkpoints are made between episodes: a training that was killed goes on and ends as if it had not been.
    """
    env, torch_rng = ENVS[name], torch.Generator().manual_seed(args.seed)
    torch.manual_seed(args.seed)
    sac = replace(mopo.Args(), actor_lr=3e-4, alpha_lr=3e-4, max_alpha=math.inf)
    single = env.make()
    obs_dim, action_dim = single.observation_space.shape[0], single.action_space.shape[0]
    agent = mopo.Agent(obs_dim, action_dim, sac)
    update = lambda rows, noise: mopo.update(agent, rows, noise, sac)  # noqa: E731
    update = compiled(update, torch.device("cpu")) if args.compile else update
    rows, ends, snapshots = torch.zeros(env.max_steps, 2 * obs_dim + action_dim + 2), [0], []
    folder = cache_dir() / "collect"
    folder.mkdir(parents=True, exist_ok=True)
    file, saved = folder / f"{name}-{args.seed}.pt", 0
    if file.exists():
        state = torch.load(file, weights_only=True)
        agent.load_state_dict(state["agent"])
        ends, snapshots, saved = state["ends"], state["snapshots"], state["ends"][-1]
        rows[:saved] = state["rows"]
        torch_rng.set_state(state["rng"])
    bar = tqdm(initial=saved, total=env.max_steps, desc=name, unit="step", mininterval=30)
    low, high = single.action_space.low, single.action_space.high
    step = saved
    while step < env.max_steps and not finished(snapshots, env, args):
        obs, _ = single.reset(seed=int(np.random.SeedSequence([args.seed, len(ends)]).generate_state(1)[0]))
        done = False
        while not done and step < env.max_steps:
            now = torch.as_tensor(obs, dtype=torch.float32)
            if step < NUM_RANDOM:
                action = torch.rand(action_dim, generator=torch_rng) * 2 - 1
            else:
                with torch.no_grad():
                    action, _ = agent.actor(now, torch.randn(action_dim, generator=torch_rng))
            obs, reward, terminated, truncated, _ = single.step((high + low) / 2 + (high - low) / 2 * action.numpy())
            done = terminated or truncated
            numbers = torch.tensor([reward, terminated], dtype=torch.float32)
            rows[step] = torch.cat([now, action, numbers[:1], torch.as_tensor(obs, dtype=torch.float32), numbers[1:]])
            step += 1
            if step > NUM_RANDOM:
                index = torch.randint(step, (sac.batch_size,), generator=torch_rng)
                noise = torch.randn(2, sac.batch_size, action_dim, generator=torch_rng)
                info = update(rows.index_select(0, index), {"next_action": noise[0], "action": noise[1]})
            if step % EVAL_INTERVAL == 0 and step > NUM_RANDOM:
                weights = {key: value.clone() for key, value in agent.actor.state_dict().items()}
                value = sampled_return(agent.actor, env, args.seed)
                snapshots.append({"step": step, "return": value, "actor": weights})
                bar.write(f"{name} step {step:>9,}  sampled return {value:8.1f}  q {info['q']:8.1f}")
            bar.update()
        ends.append(step)
        if step - saved >= CHECKPOINT_INTERVAL or step == env.max_steps or finished(snapshots, env, args):
            state = {"agent": agent.state_dict(), "rows": rows[:step].clone(), "ends": ends, "snapshots": snapshots}
            save(file, state | {"rng": torch_rng.get_state()})
            saved = step
    bar.close()
    return {"rows": rows[:step], "ends": ends, "snapshots": snapshots}


def finished(snapshots: list[dict], env: Env, args: Args) -> bool:
    """Whether the last three evaluations are an expert's; when only the replay is wanted, or one is a medium's."""
    if args.grades == ("medium-replay",) and any(env.medium[0] <= s["return"] <= env.medium[1] for s in snapshots):
        return True
    return len(snapshots) >= 3 and min(s["return"] for s in snapshots[-3:]) >= env.expert


def choose(snapshots: list[dict], env: Env) -> dict[str, dict]:
    """The medium and the expert among the evaluations of a training."""
    low, high = env.medium
    distance = [max(low - s["return"], s["return"] - high, 0) for s in snapshots]
    return {"medium": snapshots[int(np.argmin(distance))], "expert": max(snapshots, key=lambda s: s["return"])}


# --- Policy files: the actor in float16, and a card ---
def save_policy(name: str, grade: str, snapshot: dict, args: Args) -> None:
    card = {"env": ENVS[name].id, "kwargs": ENVS[name].kwargs, "step": snapshot["step"], "return": snapshot["return"]}
    card |= {"seed": args.seed, "torch": torch.__version__, "gymnasium": gym.__version__}
    arrays = {key: value.numpy().astype(np.float16) for key, value in snapshot["actor"].items()}
    POLICIES.mkdir(exist_ok=True)
    np.savez(POLICIES / f"{name}-{grade}.npz", card=json.dumps(card), **arrays)


def load_policy(name: str, grade: str) -> tuple[mopo.Actor, dict]:
    """The actor and its card. Raises InputError when there is no such policy."""
    path = POLICIES / f"{name}-{grade}.npz"
    if not path.is_file():
        raise InputError(f"there is no policy {path}: train it with --train --envs {name}")
    with np.load(path) as file:
        card = json.loads(str(file["card"]))
        weights = {key: torch.from_numpy(file[key]).float() for key in file.files if key != "card"}
    sizes = len(weights["net.0.bias"]), len(weights["net.2.bias"])
    actor = mopo.Actor(weights["net.0.weight"].shape[1], len(weights["net.4.bias"]) // 2, sizes)
    actor.load_state_dict(weights)
    return actor, card


# --- Recording ---
@contextmanager
def put_into_minari(dataset_id: str) -> Iterator[None]:
    """Inside, Minari writes to a folder of its own; at the end the dataset is moved to the others, whole.

    Two processes may do so at once and either may be killed.
    """
    root = minari_folder()
    with tempfile.TemporaryDirectory(dir=root, prefix=".recording-") as folder:  # Minari lists no hidden folders
        with patch.dict(os.environ, MINARI_DATASETS_PATH=folder):
            yield
        for namespace in list(Path(dataset_id).parents)[:-1]:
            (root / namespace).mkdir(parents=True, exist_ok=True)
            new, old = (Path(top, namespace, "namespace_metadata.json") for top in (folder, root))
            if new.exists() and not old.exists():
                os.replace(new, old)
        if not (root / dataset_id).exists():
            os.rename(Path(folder, dataset_id), root / dataset_id)


def write_dataset(
    dataset_id: str,
    episodes: Iterable[EpisodeBuffer],
    env: gym.Env,
    policy: str,
    card: dict,
    ref_scores: tuple[float, float] | None = None,
) -> Path:
    """Writes episodes as a local Minari dataset, with `ref_scores` or those of `env` where they are known.

    It appears complete or not at all, so two processes may write it at once and either may be killed. `policy` and
    `card` go into its metadata. Closes `env`. Returns the folder. Raises InputError when it cannot be written.
    """
    target = minari_folder() / dataset_id
    low, high = ref_scores or KNOWN_SCORES.get(gym_class(env.spec)) or REF_SCORES.get(env.spec.id, (None, None))
    try:
        with put_into_minari(dataset_id), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".* is set to None")  # author, e-mail: nobody to name
            minari.create_dataset_from_buffers(
                dataset_id, episodes, env=env, ref_min_score=low, ref_max_score=high, algorithm_name=policy,
                description=json.dumps(card),
            )  # fmt: skip
    except (OSError, ValueError) as error:  # ValueError: an id that Minari does not take
        if not target.exists():  # else another process was faster between looking and moving
            raise InputError(f"Cannot record {target} ({error}): is MINARI_DATASETS_PATH writable?") from error
    finally:
        env.close()
    return target


def record_random(env_id: str, dataset_id: str, num_steps: int, seed: int, **env_kwargs) -> Path:
    """As write_dataset. Raises InputError also for an unknown environment."""
    env = gym.make(make_spaces(env_id)[0], **env_kwargs)
    card = {"num_steps": num_steps, "seed": seed}
    return write_dataset(dataset_id, play_random(env, num_steps, seed), env, "uniformly random", card)


def record_log(name: str, args: Args) -> None:
    """Writes the bench's <name>-v0 unless it exists. Its reference scores are measured here, where none are known."""
    log, dataset_id, rng = LOGS[name], f"{name}-v0", np.random.default_rng(args.seed)
    if (folder := minari_folder() / dataset_id).exists():
        print(f"{dataset_id}: exists and stays as it is; remove {folder} to record it anew", flush=True)
        return
    env, card, ref_scores = gym.make(log.env_id), {"about": log.about, "seed": args.seed}, None
    if log.expert:
        card["reference scores"] = f"mean of {NUM_REFERENCE:,} episodes of random actions, and of {log.expert.__doc__}"
        env.action_space.seed(args.seed)
        ref_scores = tuple(
            mean_return(env, act, args.seed) for act in (lambda obs: env.action_space.sample(), log.expert)
        )
    episodes = play_by(lambda: log.begin(rng), env, log.num_steps, args.seed)
    write_dataset(dataset_id, episodes, env, "by hand", card, ref_scores)
    print(load_dataset(dataset_id).summary(), flush=True)


def mean_return(env: gym.Env, act: Act, seed: int) -> float:
    """Of NUM_REFERENCE whole episodes."""
    num_steps = NUM_REFERENCE * env.spec.max_episode_steps
    return float(np.mean([e.rewards.sum() for e in play_by(lambda: ({}, num_steps, act), env, num_steps, seed)]))


def replay(training: dict, num_steps: int, env: Env) -> Iterator[EpisodeBuffer]:
    """The first `num_steps` steps of a training, as episodes."""
    single = env.make()
    obs_dim, action_dim = single.observation_space.shape[0], single.action_space.shape[0]
    low, high = single.action_space.low, single.action_space.high
    for first, last in zip(training["ends"], training["ends"][1:]):
        rows = training["rows"][first : min(last, num_steps)].numpy()
        if len(rows):
            obs, action, reward, next_obs, terminal = np.split(
                rows, np.cumsum([obs_dim, action_dim, 1, obs_dim]), axis=1
            )
            terminated = terminal[:, 0] != 0
            truncated = np.arange(len(rows)) == len(rows) - 1
            yield EpisodeBuffer(
                observations=np.concatenate([obs, next_obs[-1:]]).astype(single.observation_space.dtype),
                actions=(high + low) / 2 + (high - low) / 2 * action,
                rewards=reward[:, 0], terminations=terminated, truncations=truncated & ~terminated,
            )  # fmt: skip


def record(name: str, grade: str, args: Args, training: dict | None = None) -> None:
    """Writes <name>/<grade>-v0 unless it exists."""
    env, dataset_id, start = ENVS[name], f"{name}/{grade}-v0", time.monotonic()
    if (folder := minari_folder() / dataset_id).exists():
        print(f"{dataset_id}: exists and stays as it is; remove {folder} to record it anew", flush=True)
        return
    if grade == "random":
        record_random(env.id, dataset_id, args.num_steps, args.seed, **env.kwargs)
    elif grade == "medium-replay":
        medium = choose(training["snapshots"], env)["medium"]["step"]
        write_dataset(
            dataset_id, replay(training, medium, env), env.make(), "SAC", {"steps": medium, "seed": args.seed}
        )
    else:
        parts = {part: load_policy(name, part) for part in grade.split("-")}
        card = {"policies": {part: card for part, (_, card) in parts.items()}, "seed": args.seed}
        bar = tqdm(total=len(parts) * args.num_steps, desc=dataset_id, unit="step", mininterval=10)

        def episodes() -> Iterator[EpisodeBuffer]:
            for part, (actor, _) in parts.items():
                # a seed for each policy, so that medium-expert is medium and expert, one after the other
                for one in play(actor, env, args.num_steps, args.seed + (part == "expert")):
                    bar.update(len(one.rewards))
                    yield one

        write_dataset(dataset_id, episodes(), env.make(), "SAC", card)
        bar.close()
    print(f"{dataset_id}: recorded in {time.monotonic() - start:.0f} s", flush=True)


def end_with_parent() -> None:
    """Else a kill of the parent alone would leave its trainings behind."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def work(name: str, args: Args) -> None:
    """All that is asked for of one environment, in a process of its own."""
    torch.set_num_threads(1)
    # by the training and by the recording alone alike: a rounding error makes another episode
    exact_products(torch.device("cpu"))
    if args.train:
        training = train(name, args)
        if args.grades != ("medium-replay",):
            for grade, snapshot in choose(training["snapshots"], ENVS[name]).items():
                save_policy(name, grade, snapshot, args)
        record(name, "medium-replay", args, training)
    for grade in args.grades:
        if grade != "medium-replay":
            record(name, grade, args)


def table(names: tuple[str, ...]) -> str:
    """One line per recorded set, Markdown."""
    lines = ["| dataset | steps | episodes | time limits | return: mean | min, 25 %, 50 %, 75 %, max | normalised |"]
    lines.append("| --- " * 7 + "|")
    for name in names:
        for grade in get_args(Grade):
            if not (minari_folder() / f"{name}/{grade}-v0").exists():
                continue
            data = load_dataset(f"{name}/{grade}-v0")
            returns, limits = data.episode_returns, 1 - data.terminal.sum().item() / len(data.episode_returns)
            quantiles = ", ".join(f"{q:,.0f}" for q in np.quantile(returns, [0, 0.25, 0.5, 0.75, 1]))
            lines.append(
                f"| {data.name} | {len(data.obs):,} | {len(returns):,} | {limits:.0%} | {returns.mean():,.0f} | "
                f"{quantiles} | {data.normalised_score(returns.mean()):.1f} |"
            )
    return "\n".join(lines)


def main(args: Args) -> None:
    if min(args.num_steps, args.processes) < 1:
        raise InputError("--num-steps and --processes must be at least 1")
    if args.env_id or args.dataset_id:
        if (args.envs, args.grades, args.train, args.sets) != (Args.envs, Args.grades, Args.train, Args.sets):
            raise InputError("give --env-id and --dataset-id without --sets, --envs, --grades and --train")
        if not (args.env_id and re.search(r"-v\d+$", args.dataset_id)):
            raise InputError("random actions need an --env-id, and a --dataset-id that ends in -v and a number")
        if (folder := minari_folder() / args.dataset_id).exists():
            raise InputError(f"{args.dataset_id} exists already: choose another id, or remove {folder}")
        record_random(args.env_id, args.dataset_id, args.num_steps, args.seed)
        print(load_dataset(args.dataset_id).summary())
        return
    if args.sets:
        if (args.envs, args.grades, args.train) != (Args.envs, Args.grades, Args.train):
            raise InputError("give --sets, or --envs, --grades and --train, not both")
        for name in args.sets:
            record_log(name, args)
        return
    if "medium-replay" in args.grades and not args.train:
        raise InputError("medium-replay is the replay of a training: add --train")
    with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn"), end_with_parent) as pool:
        try:
            for future in [pool.submit(work, name, args) for name in args.envs]:
                future.result()
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second one would break the queue that ends the workers
            raise
    print(table(args.envs))


if __name__ == "__main__":
    start(main, Args)
