"""What does it cost a policy to be displaced by random actions, and how far from the data does it lead?

Of finished runs of any script. The test of recovery by Zhang et al. 2022 (SDC) and Jiang et al. 2023 (OSR), who force
actions on the policy at step 500, half of an episode that nothing ends; here it is half of what the policy's median
episode lasts. displaced.csv in a run's folder has a row for 0, 5, 10 and 15 forced actions, and benchmarks/report.py
puts it into a table:

    step, return_mean, return_std    where they are forced, and the policy's return with them
    episodes                         how many are left afterwards
    distance                         from the observations of the 50 steps that follow to the nearest of at most 50,000
                                     logged ones, in standard deviations; nan where no episode is left
Run: python benchmarks/displace.py runs/my-run
     python benchmarks/displace.py runs/policy-constraint      every run of a grid
"""

import csv
import io
import itertools
import math
import sys
from collections.abc import Callable
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.film import Args, policy_of, run_folders  # noqa: E402
from common import InputError  # noqa: E402
from common.dataset import OfflineDataset  # noqa: E402
from common.machine import set_matmul_precision  # noqa: E402
from common.run import make_envs, write_text  # noqa: E402


def evaluate(
    policy: Callable, envs: gym.vector.VectorEnv, data: OfflineDataset, seed: list[int], forced: range
) -> tuple[np.ndarray, list[np.ndarray]]:
    """As common.run.evaluate, but at the steps in `forced` actions are uniformly random.

    Returns the returns (num_envs,) and the observations (num_running, obs_dim) of each step that follows.
    """
    obs, _ = envs.reset(seed=np.random.SeedSequence(seed).generate_state(envs.num_envs).tolist())
    returns, running, rng = np.zeros(envs.num_envs), np.ones(envs.num_envs, dtype=bool), np.random.default_rng(seed)
    after = []
    for step in itertools.count():
        if step >= forced.stop:
            after.append(obs[running])
        if step in forced:
            action = data.to_env_action(rng.uniform(-1, 1, (envs.num_envs, len(data.action_low))))
        else:
            action = policy(obs)
        obs, reward, terminated, truncated, _ = envs.step(action)
        returns += reward * running
        running &= ~(terminated | truncated)
        if not running.any():
            return returns, after


def displace(policy: Callable, envs: gym.vector.VectorEnv, data: OfflineDataset, seed: list[int]) -> list[dict]:
    """The rows of displaced.csv."""
    _, undisturbed = evaluate(policy, envs, data, seed, range(0))
    middle = sum(2 * len(obs) > envs.num_envs for obs in undisturbed) // 2
    std, mean = torch.std_mean(data.obs, dim=0)
    std = torch.where(std > 1e-6 * (1 + mean.abs()), std, 1.0)  # constants keep their unit
    logged, rows = (data.obs[:: math.ceil(len(data.obs) / 50_000)] - mean) / std, []
    for num in (0, 5, 10, 15):
        returns, after = evaluate(policy, envs, data, seed, range(middle, middle + num))
        visited = torch.as_tensor(np.concatenate(after[:50] or [np.empty((0, len(std)))]), dtype=torch.float32)
        distance = torch.cdist((visited - mean) / std, logged).amin(dim=1).mean().item()
        row = {"forced_actions": num, "step": middle, "return_mean": returns.mean(), "return_std": returns.std()}
        rows.append(row | {"episodes": len(after[0]) if after else 0, "distance": distance})
    return rows


def main(args: Args) -> None:
    for folder in run_folders(args.runs):
        policy, data, settings = policy_of(folder)
        set_matmul_precision(settings["matmul_precision"], torch.device("cpu"))  # as in training: the same rounding
        envs, seed = make_envs(data, settings["eval_episodes"]), [settings["seed"], settings["num_updates"]]
        rows = displace(policy, envs, data, seed)
        envs.close()
        table = csv.DictWriter(text := io.StringIO(), list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
        write_text(folder / "displaced.csv", text.getvalue())
        for row in rows:
            cost = f"return {row['return_mean']:8.1f}, distance to the data {row['distance']:.3f}"
            print(f"displaced   by {row['forced_actions']:>2} actions: {cost}")
        print(f"            {folder / 'displaced.csv'}", flush=True)


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except InputError as error:
        sys.exit(f"error: {error}")
