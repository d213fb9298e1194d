"""Films an episode of the policies of finished runs: video.gif in each run's folder.

Run: python benchmarks/film.py runs/my-run
     python benchmarks/film.py runs/demo      every run of a grid
"""

import json
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import gymnasium as gym
import imageio
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.files import HomePaths, one_line, start  # noqa: E402
from common import InputError, explained, writing  # noqa: E402
from common.dataset import OfflineDataset, load_dataset  # noqa: E402
from common.evaluation import load_policy  # noqa: E402

T = TypeVar("T")
os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # nothing is shown: pygame needs no screen


@dataclass
class Args(HomePaths):
    runs: tyro.conf.Positional[tuple[Path, ...]]  # finished runs of any script, or folders of them
    trust: bool = False  # import the modules that a run's folder or its data name: code of whoever made them


def run_folders(paths: tuple[Path, ...]) -> list[Path]:
    """Those that are, or lie in, one of `paths`. Raises InputError where there are none."""
    folders = [sorted(config.parent for config in path.rglob("config.json")) for path in paths]
    if not paths:
        raise InputError("no run was named: give the folders of runs, which hold config.json")
    if empty := [str(path) for path, found in zip(paths, folders) if not found]:
        raise InputError(f"no run in {', '.join(empty)}: name folders that hold config.json")
    return list(dict.fromkeys(sum(folders, [])))


def from_runs(paths: tuple[Path, ...], make: Callable[[Path], T]) -> dict[Path, T]:
    """make(folder) of all `run_folders`, by folder; where it raises InputError a line says why the run is left out."""
    made = {}
    for folder in run_folders(paths):
        try:
            made[folder] = make(folder)
        except InputError as error:
            print(one_line(f"left out: {error}"), file=sys.stderr, flush=True)
    return made


def for_each_run(paths: tuple[Path, ...], do: Callable[[Path], None]) -> int:
    """As `from_runs`, but a lone run raises. Returns the exit status: 1 where a run was left out."""
    folders = run_folders(paths)
    if len(folders) == 1:
        do(folders[0])
        return 0
    return int(len(from_runs(paths, do)) < len(folders))


def check_trust(folder: Path, names: Iterable[str], trust: bool) -> None:
    """Raises InputError where one of the `names` in its settings would import a module, and nobody said that it may."""
    for name in names:
        if ":" in name and not trust:
            code = f"{folder} names {name}, code of whoever made that run"
            raise InputError(f"{code}: give --trust to import {name.rpartition(':')[0]}")


def policy_of(folder: Path, trust: bool) -> tuple[Callable, OfflineDataset, dict]:
    """Of a finished run of any script: its policy as load_policy gives it, its data and its settings.

    Raises InputError where the run is not finished, or its data name no environment; without `trust` where its folder
    names a module to import.
    """
    with explained(f"{folder} is no run of a script in algos/", "name another"):
        args = json.loads((folder / "config.json").read_text())["args"]
        dataset, env_id = (str(args[name]) for name in ("dataset", "env_id"))
    check_trust(folder, (env_id,), trust)
    policy = load_policy(folder)
    data = load_dataset(dataset, env_id=env_id or None, trust=trust)
    if data.env_spec is None:
        raise InputError(f"{dataset} names no environment and {folder} was given none: there is none to act in")
    return policy, data, args


def film(folder: Path, trust: bool = False) -> Path:
    """One episode as a gif."""
    policy, data, _ = policy_of(folder, trust)
    try:
        env = gym.wrappers.RenderCollection(gym.make(data.env_spec, render_mode="rgb_array"))
        obs, _ = env.reset(seed=0)
        done = False
        while not done:
            obs, _, terminated, truncated, _ = env.step(policy(obs))
            done = terminated or truncated
        # in memory: what imageio begins to write itself it writes again at the end, also where the disk is full
        gif = imageio.mimsave("<bytes>", env.render()[::2], format="gif", duration=40, loop=0)
        env.close()
    except Exception as error:  # no display, no driver: what it raises depends on the environment
        hint = "without a display try MUJOCO_GL=egl"
        raise InputError(f"{data.env_spec.id} cannot be filmed here ({error}): {hint}") from None
    with writing(folder / "video.gif") as part:
        part.write_bytes(gif)
    return folder / "video.gif"


def main(args: Args) -> int:
    return for_each_run(args.runs, lambda folder: print(film(folder, args.trust), flush=True))


if __name__ == "__main__":
    start(main, Args)
