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
from contextlib import suppress
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.files import start, write_text  # noqa: E402
from benchmarks.film import Args, for_each_run, policy_of  # noqa: E402
from common import InputError  # noqa: E402
from common.dataset import OfflineDataset  # noqa: E402
from common.evaluation import call, make_env  # noqa: E402
from common.machine import exact_products  # noqa: E402


def evaluate(
    policy: Callable, envs: list[gym.Env], data: OfflineDataset, seed: list[int], num_episodes: int, forced: range
) -> tuple[np.ndarray, list[np.ndarray]]:
    """As common.evaluation.evaluate, but at the steps in `forced` actions are uniformly random.

    Returns the returns (num_episodes,) and the observations (num_running, obs_dim) of each step that follows.
    """
    seeds, returns = np.random.SeedSequence(seed).generate_state(num_episodes).tolist(), np.zeros(num_episodes)
    rng, after = np.random.default_rng(seed), []
    for first in range(0, num_episodes, len(envs)):
        obs = [call(env, "reset", seed=seed)[0] for env, seed in zip(envs, seeds[first:])]
        running = list(range(len(obs)))
        for step in itertools.count():
            if not running:
                break
            if step >= forced.stop:
                after += [[] for _ in range(step - forced.stop + 1 - len(after))]
                after[step - forced.stop] += [obs[i] for i in running]
            if step in forced:
                action = data.to_env_action(rng.uniform(-1, 1, (len(obs), len(data.action_low))))
            else:
                action = policy(np.stack(obs))
            for i in list(running):
                obs[i], reward, terminated, truncated, _ = call(envs[i], "step", action[i])
                returns[first + i] += np.asarray(reward).item()
                if terminated or truncated:
                    running.remove(i)
    return returns, [np.stack(obs) for obs in after]


def displace(policy: Callable, envs: list[gym.Env], data: OfflineDataset, seed: list[int], num: int) -> list[dict]:
    """The rows of displaced.csv, from `num` episodes each."""
    _, undisturbed = evaluate(policy, envs, data, seed, num, range(0))
    middle = sum(2 * len(obs) > num for obs in undisturbed) // 2
    std, mean = torch.std_mean(data.obs, dim=0)
    std = torch.where(std > 1e-6 * (1 + mean.abs()), std, 1.0)  # constants keep their unit
    logged, rows = (data.obs[:: math.ceil(len(data.obs) / 50_000)] - mean) / std, []
    for num_forced in (0, 5, 10, 15):
        returns, after = evaluate(policy, envs, data, seed, num, range(middle, middle + num_forced))
        visited = torch.as_tensor(data.to_obs(np.concatenate(after[:50] or [np.empty((0, len(std)))])))
        distance = torch.cdist((visited - mean) / std, logged).amin(dim=1).mean().item()
        row = {"forced_actions": num_forced, "step": middle, "return_mean": returns.mean(), "return_std": returns.std()}
        rows.append(row | {"episodes": len(after[0]) if after else 0, "distance": distance})
    return rows


def displace_run(folder: Path, trust: bool) -> None:
    policy, data, settings = policy_of(folder, trust)
    names = ("eval_episodes", "seed", "num_updates")
    try:
        num, seed, update = (int(settings[name]) for name in names)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{folder / 'config.json'} lacks a setting, or it is damaged ({error!r})") from None
    envs = [make_env(data)]
    with suppress(InputError):  # where the simulator allows no more
        while len(envs) < num:
            envs.append(make_env(data))
    rows = displace(policy, envs, data, [seed, update], num)
    for env in envs:
        env.close()
    table = csv.DictWriter(text := io.StringIO(), list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_text(folder / "displaced.csv", text.getvalue())
    for row in rows:
        cost = f"return {row['return_mean']:8.1f}, distance to the data {row['distance']:.3f}"
        print(f"displaced   by {row['forced_actions']:>2} actions: {cost}")
    print(f"            {folder / 'displaced.csv'}", flush=True)


def main(args: Args) -> int:
    exact_products(torch.device("cpu"))  # as in training: the same rounding
    return for_each_run(args.runs, lambda folder: displace_run(folder, args.trust))


if __name__ == "__main__":
    start(main, Args)
