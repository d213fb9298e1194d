"""OfflineRL-Kit on our datasets: its own run_example scripts, data and environment put in their place.

The scripts import gym and d4rl of 2022, which do not install beside a present torch: two modules stand in for them,
which make the dataset's environment and hand over its rows with D4RL's keys. Four things differ from calling
a script by hand, none in what is learnt: there are evaluations every --eval-interval updates only; the ensemble's fit
ends after --max-epochs at the latest, as ours does (its MOBILE without the flag after 30); simulated states go through
the model a thousand at a time; and float32 products through oneDNN, where it is exact. The last two are faster on a
CPU: this measures scores, not speed. Its MOBILE cannot fix alpha: give ours --fixed-alpha None beside it.
Run: python benchmarks/peer.py --peer OfflineRL-Kit --script mopo --dataset hopper/medium-replay-v0 --task hopper
         --flags="--penalty-coef 2.5 --rollout-length 5"
"""

import csv
import os
import runpy
import sys
import time
import types
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.files import HomePaths, start  # noqa: E402
from common import InputError  # noqa: E402
from common.dataset import OfflineDataset, load_dataset  # noqa: E402
from common.machine import exact_products  # noqa: E402


@dataclass
class Args(HomePaths):
    peer: Path  # folder of a checkout of OfflineRL-Kit
    script: str  # run_example/run_<script>.py
    dataset: str  # any that ours take and that names its environment
    task: str  # hopper, halfcheetah or walker2d: its rule of termination
    flags: str = ""  # further flags of its script
    hidden_sizes: tuple[int, ...] | None = None  # of actor and critics, also where its script has no flag (TD3+BC)
    seed: int = 0  # of its script and of the environment
    num_updates: int = 200_000  # a multiple of 1,000
    eval_interval: int = 5_000  # updates, a multiple of 1,000
    score_evals: int = 10  # the score is the mean of the last so many evaluations
    max_epochs: int | None = None  # of the ensemble's fit
    num_threads: int = 1  # CPU threads
    out: Path = Path("runs/peer")  # new folder of its logs and of progress.csv


class OldEnv:
    """The environment of a dataset as gym was in 2021, with D4RL's additions."""

    def __init__(self, data: OfflineDataset, seed: int):
        self.data, self.env, self.next_seed = data, gym.make(data.env_spec), seed
        self.observation_space, self.action_space = self.env.observation_space, self.env.action_space
        self._max_episode_steps = data.env_spec.max_episode_steps

    def seed(self, seed: int) -> None:
        self.next_seed = seed

    def reset(self) -> np.ndarray:
        obs, _ = self.env.reset(seed=self.next_seed)
        self.next_seed = None
        return obs

    def step(self, action: np.ndarray):
        obs, reward, terminated, truncated, info = self.env.step(action)
        return obs, reward, terminated or truncated, info

    def get_normalized_score(self, value: float) -> float:
        return self.data.normalised_score(value) / 100

    def get_dataset(self) -> dict[str, np.ndarray]:
        data = self.data
        columns = {"observations": data.obs, "actions": data.action, "rewards": data.reward}
        columns |= {"next_observations": data.next_obs, "terminals": data.terminal}
        columns |= {"timeouts": data.episode_end & (data.terminal == 0)}
        return {name: column.numpy() for name, column in columns.items()}


def check_checkout(folder: Path) -> None:
    if not (folder / "run_example").is_dir():
        raise InputError(f"{folder} is no checkout of OfflineRL-Kit: clone it and name its folder with --peer")


def main(args: Args) -> None:
    if args.num_updates % 1_000 or args.eval_interval % 1_000:
        raise InputError("--num-updates and --eval-interval must be multiples of 1,000, OfflineRL-Kit's epoch")
    check_checkout(args.peer)
    torch.set_num_threads(args.num_threads)
    exact_products(torch.device("cpu"))
    if (args.out / "progress.csv").exists():
        raise InputError(f"{args.out} holds a run: name another folder by --out")
    data = load_dataset(args.dataset)
    if data.env_spec is None:
        raise InputError(f"{args.dataset} names no environment to evaluate in: take a Minari or D4RL dataset")
    modules = {name: types.ModuleType(name) for name in ("gym", "gym.envs", "gym.envs.mujoco", "d4rl")}
    modules["gym"].Env, modules["gym"].make = object, lambda task: OldEnv(data, args.seed)
    modules["gym"].spaces = gym.spaces
    modules["gym.envs.mujoco"].mujoco_env = types.SimpleNamespace(MujocoEnv=object)
    sys.modules |= modules
    peer = args.peer.resolve()
    sys.path.insert(0, str(peer))
    from offlinerlkit import nets
    from offlinerlkit import policy as policies
    from offlinerlkit.dynamics import EnsembleDynamics
    from offlinerlkit.policy_trainer import MBPolicyTrainer, MFPolicyTrainer
    from offlinerlkit.utils.load_dataset import qlearning_dataset

    modules["d4rl"].qlearning_dataset = qlearning_dataset
    args.out.mkdir(parents=True, exist_ok=True)
    os.chdir(args.out)
    start, history, epochs = time.monotonic(), [], 0

    def rarely(evaluate):
        def call(trainer):
            nonlocal epochs
            epochs += 1
            if (epochs * 1_000) % args.eval_interval == 0 or epochs * 1_000 == args.num_updates:
                returns = np.array((info := evaluate(trainer))["eval/episode_reward"])
                row = {"update": epochs * 1_000, "seconds": time.monotonic() - start, "return_mean": returns.mean()}
                row |= {"return_std": returns.std(), "normalised_score": data.normalised_score(returns.mean())}
                history.append(row)
                with open("progress.csv", "w") as file:
                    table = csv.DictWriter(file, list(row), lineterminator="\n")
                    table.writeheader()
                    table.writerows(history)
                call.last = info
            return call.last

        call.last = {"eval/episode_reward": [np.nan], "eval/episode_length": [np.nan]}
        return call

    def in_chunks(rollout):
        def call(policy, init_obss, *rest):
            chunks = np.array_split(init_obss, max(1, len(init_obss) // 1_000))
            parts = [rollout(policy, chunk, *rest) for chunk in chunks]
            transitions = {key: np.concatenate([part[key] for part, _ in parts]) for key in parts[0][0]}
            info = {key: np.mean([info[key] for _, info in parts]) for key in parts[0][1]}
            return transitions, info | {"num_transitions": len(transitions["obss"])}

        return call

    if args.hidden_sizes is not None:
        mlp = nets.MLP
        nets.MLP = lambda *rest, **kwargs: mlp(*rest, **kwargs | {"hidden_dims": args.hidden_sizes})
    for trainer in (MBPolicyTrainer, MFPolicyTrainer):
        trainer._evaluate = rarely(trainer._evaluate)
    for policy in (policies.MOPOPolicy, policies.MOBILEPolicy, policies.COMBOPolicy):
        policy.rollout = in_chunks(policy.rollout)
    fit = EnsembleDynamics.train
    at_most = {} if args.max_epochs is None else {"max_epochs": args.max_epochs}  # its MOBILE has a bound of its own
    EnsembleDynamics.train = lambda self, *rest, **kwargs: fit(self, *rest, **kwargs | at_most)
    # its rules of termination go by the task's name
    flags = ["--task", f"{args.task}-{data.name.split('/')[-1]}", "--seed", str(args.seed), "--device", "cpu"]
    flags += ["--epoch", str(args.num_updates // 1_000), *args.flags.split()]
    sys.argv = [str(peer / "run_example" / f"run_{args.script}.py"), *flags]
    runpy.run_path(sys.argv[0], run_name="__main__")
    last = [row["return_mean"] for row in history[-args.score_evals :]]
    score = f"{np.mean(last):.1f} (normalised {data.normalised_score(np.mean(last)):.1f})"
    print(f"score {score}, mean of the last {len(last)} evaluations")


if __name__ == "__main__":
    start(main, Args)
