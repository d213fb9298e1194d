"""Films an episode of the policies of finished runs: video.gif in each run's folder.

Run: python benchmarks/film.py runs/my-run
     python benchmarks/film.py runs/demo      every run of a grid
"""

import importlib
import json
import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import imageio
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import InputError  # noqa: E402
from common.dataset import OfflineDataset, load_dataset  # noqa: E402
from common.run import load_policy  # noqa: E402


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]]  # finished runs of any script, or folders of them


def run_folders(paths: tuple[Path, ...]) -> list[Path]:
    """Those that are, or lie in, one of `paths`. Raises InputError where there are none."""
    folders = [sorted(config.parent for config in path.rglob("config.json")) for path in paths]
    empty = [str(path) for path, found in zip(paths, folders) if not found]
    if empty or not paths:
        raise InputError(f"no run in {', '.join(empty) or 'nothing'}: name folders that hold config.json")
    return list(dict.fromkeys(sum(folders, [])))


def policy_of(folder: Path) -> tuple[Callable, OfflineDataset, dict]:
    """Of a finished run of any script: its policy as load_policy gives it, its data and its settings.

    Raises InputError where the run is not finished, or its data name no environment.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
        kind = torch.load(folder / "policy.pt", map_location="cpu", weights_only=True)["class"]
        Actor = getattr(importlib.import_module(f"algos.{config['algo']}"), kind)
    except (OSError, ValueError, KeyError, ImportError, AttributeError, RuntimeError, pickle.UnpicklingError) as error:
        raise InputError(f"{folder} is no finished run of a script in algos/ ({error}): finish that run") from None
    args = config["args"]
    data = load_dataset(args["dataset"], "cpu", args["env_id"] or None)
    if data.env_spec is None:
        raise InputError(f"{args['dataset']} names no environment and {folder} was given none: there is none to act in")
    return load_policy(folder, Actor), data, args


def film(folder: Path) -> Path:
    """One episode as a gif."""
    policy, data, _ = policy_of(folder)
    try:
        env = gym.wrappers.RenderCollection(gym.make(data.env_spec, render_mode="rgb_array"))
        obs, _ = env.reset(seed=0)
        done = False
        while not done:
            obs, _, terminated, truncated, _ = env.step(policy(obs))
            done = terminated or truncated
        imageio.mimsave(folder / "video.gif", env.render()[::2], duration=40, loop=0)
        env.close()
    except Exception as error:  # no display, no driver: what it raises depends on the environment
        hint = "without a display try MUJOCO_GL=egl"
        raise InputError(f"{data.env_spec.id} cannot be filmed here ({error}): {hint}") from None
    return folder / "video.gif"


def main(args: Args) -> None:
    for folder in run_folders(args.runs):
        print(film(folder), flush=True)


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except InputError as error:
        sys.exit(f"error: {error}")
