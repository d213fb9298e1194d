"""What a run records and how it is watched: settings, folder, curves, checkpoints, evaluation, speed of the machine.

Nothing here decides what a policy becomes; device, threads, compiling and precision move its last digits.

    read_args      a script's defaults, then TUNED or the resumed run's settings, then the command line
    Run            .open, .compiled, .updates (the loop: bar, checkpoints, Ctrl-C), .note, .evaluate, .finish
    load_policy    of a finished run
    evaluate       returns of a policy in the real environment, one episode in each copy of it
"""

import csv
import importlib.metadata
import inspect
import io
import json
import math
import os
import pickle
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import tyro
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from common import InputError
from common.dataset import OfflineDataset
from common.dynamics import save
from common.machine import compiled, keep_freed_memory, set_matmul_precision

RANGES = {  # of settings: from, to; other whole numbers begin at 1, all other numbers at 0
    **dict.fromkeys(("seed", "num_threads", "warm_start_updates"), (0, math.inf)),
    **dict.fromkeys(("gamma", "tau", "real_ratio", "expectile", "top_fraction", "policy_share", "gae_lambda"), (0, 1)),
    "target_entropy": (-math.inf, math.inf), "momentum": (0, 0.999), "init_std": (1e-3, math.inf),
}  # fmt: skip


@dataclass
class RunArgs:
    """Settings that every script has and that decide nothing but the last digits of a policy."""

    eval_interval: int = 5_000  # updates between evaluations
    eval_episodes: int = 10  # episodes in an evaluation, deterministic actions
    score_evals: int = 10  # the score of a run is the mean of its last so many evaluations
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU when there is one
    num_threads: int = 0  # CPU threads, 0: all cores (or OMP_NUM_THREADS), at most 4
    compile: bool = True  # the whole update as one graph; without, the same lines run eagerly
    matmul_precision: Literal["highest", "high", "medium"] = "highest"  # of float32 products
    checkpoint_interval: int = 50_000  # updates between checkpoints
    run_dir: str = "runs"  # where run folders are made
    run_name: str = ""  # by default dataset__algo__seed__time
    resume: str = ""  # folder of a run to go on with; its settings hold where no flag is given


def start(main: Callable, Args: type[RunArgs], tuned: dict[str, dict]) -> None:
    """main(args), and one sentence in place of a traceback where the input is to blame."""
    try:
        main(read_args(Args, tuned))
    except InputError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped: the same command starts again and reuses what is cached")


def read_args(Args: type[RunArgs], tuned: dict[str, dict]) -> RunArgs:
    """Prints a line on each setting that is not the script's default."""
    args, resumed = tyro.cli(Args), None
    if args.resume:
        base = resumed = _settings_of(Path(args.resume), Args)
    else:
        d4rl_name = f"d4rl/{Path(args.dataset).stem.replace('_', '-')}"  # of hopper_medium-v2.hdf5
        base = tuned.get(args.dataset) or tuned.get(d4rl_name, {})
    args = tyro.cli(Args, default=replace(Args(), **base))
    origin = "the resumed run" if resumed else "TUNED for this dataset"
    # what may change when a run goes on; other data are noticed by their hash
    free = {"dataset", "env_id", "num_updates", *(field.name for field in fields(RunArgs))}
    for field in fields(Args):
        name, value = field.name, getattr(args, field.name)
        flag, numbers = "--" + name.replace("_", "-"), value if type(value) is tuple else (value,)
        least, most = RANGES.get(name, (0 if type(numbers[0]) is float else 1, math.inf))
        for number in numbers:
            if type(number) in (int, float) and not least <= number <= most:
                bounds = f"at least {least}" if most == math.inf else f"between {least} and {most}"
                raise InputError(f"{flag} must be {bounds}, not {number}")
        if resumed and name not in free and value != resumed[name]:
            raise InputError(
                f"{flag} is {resumed[name]} in this run and decides its policy: leave it out or start anew"
            )
        if value != field.default or value != base.get(name, value):
            where = origin if base.get(name) == value else "command line"
            print(f"setting     {flag} {' '.join(map(str, numbers))} ({where})")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda, but torch finds no GPU: use --device cpu or auto")
    return args


def _settings_of(folder: Path, Args: type[RunArgs]) -> dict:
    """Those of the run in `folder`, which must be one of the script of `Args`."""
    config = folder / "config.json"
    if not config.is_file():
        raise InputError(f"no run to resume in {folder}: it has no config.json")
    try:
        saved = json.loads(config.read_text())
        if saved["algo"] != algo(Args):
            raise InputError(f"{folder} is a run of {saved['algo']}.py: resume it with that script")
        settings = {name: tuple(value) if type(value) is list else value for name, value in saved["args"].items()}
        return asdict(Args(**settings)) | {"resume": str(folder)}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{config} does not fit this script ({error}): start a new run") from None


def algo(Args: type[RunArgs]) -> str:
    """The script's name, also where it is imported by a test or a notebook."""
    return Path(sys.modules[Args.__module__].__file__).stem


def make_folder(args: RunArgs) -> Path:
    """A new folder for a new run, the old one for a resumed run; its name is printed."""
    name = f"{args.dataset.strip('/').replace('/', '-')}__{algo(type(args))}__{args.seed}"
    name += f"__{datetime.now():%Y%m%d-%H%M%S-%f}"
    folder = Path(args.resume or Path(args.run_dir, args.run_name or name))
    if not args.resume and (folder / "config.json").exists():
        raise InputError(f"{folder} holds a run: go on with --resume {folder}, or choose another --run-name")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json.tmp").touch()
    except OSError as error:
        raise InputError(f"cannot write to {folder} ({error.strerror}): choose another --run-dir") from None
    print(f"run         {folder}")
    return folder


class Run:
    """Folder, device and curves of one training."""

    def __init__(self, args: RunArgs):
        self.args, self.algo, self.start, self.stop = args, algo(type(args)), time.monotonic(), False
        self.progress = {"update": 0, "seconds": 0.0, "history": [], "notes": {}}
        if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
            sys.stdout.reconfigure(line_buffering=True)  # a log file fills as the run goes on
        self.folder = make_folder(args)
        self.resumes = bool(args.resume) and (self.folder / "checkpoint.pt").exists()
        self.device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
        torch.set_num_threads(args.num_threads or min(4, torch.get_num_threads()))
        set_matmul_precision(args.matmul_precision, self.device)
        keep_freed_memory()
        self.compiled = lambda function: compiled(function, self.device) if args.compile else function

    def open(self, data: OfflineDataset) -> None:
        """Before anything expensive: can the policy be evaluated?"""
        self.data, self.envs = data, make_envs(data, self.args.eval_episodes)
        print(data.summary())

    def updates(self, **modules: nn.Module) -> Iterator[int]:
        """1 .. num_updates, or from where a resumed run was; `modules` are all that training changes.

        Where a checkpoint is due or Ctrl-C asked for one, everything is saved after the update, random states included.
        """
        if self.resumes:
            self._restore(modules)
        first, last, bar = self.progress["update"], self.args.num_updates, None
        self.start -= self.progress["seconds"]
        self._write_config()
        self.writer, self.mark = SummaryWriter(self.folder, purge_step=first + 1), (first, time.monotonic())
        usual = {number: signal.signal(number, self._ask_to_stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            for i in range(first + 1, last + 1):
                if i == first + 3:  # the first two compile and would spoil the time that the bar foresees
                    look = {"unit": "update", "mininterval": 0.1 if sys.stderr.isatty() else 30, "smoothing": 0}
                    bar = tqdm(desc=self.algo, initial=i - 1, total=last, leave=False, **look)
                self.progress["update"] = i
                yield i
                if bar is not None:
                    bar.update()
                if self.stop or i % self.args.checkpoint_interval == 0 or i == last:
                    self._save(modules)
                if self.stop:
                    resume = shlex.join(["python", sys.argv[0], "--resume", str(self.folder)])
                    tqdm.write(f"stopped     after {i:,} updates; to go on: {resume}")
                    sys.exit(130)
        finally:
            self.writer.close()
            if bar is not None:
                bar.close()
            for number, handler in usual.items():
                signal.signal(number, handler)

    def _ask_to_stop(self, *_) -> None:
        """The first Ctrl-C asks for a checkpoint after the current update, the second one ends at once."""
        self.stop = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def note(self, **values: Tensor | float) -> None:
        """Numbers for the next rows of progress.csv, until noted again; of several the mean, and a histogram."""
        for name, value in values.items():
            value = torch.as_tensor(value, dtype=torch.float64)
            if value.ndim:
                self.writer.add_histogram(name, value, self.progress["update"])
            self.progress["notes"][name] = value.mean().item()

    def evaluates(self) -> bool:
        """Whether an evaluation is due after this update."""
        i = self.progress["update"]
        return i % self.args.eval_interval == 0 or i == self.args.num_updates

    def evaluate(self, policy, info: dict[str, Tensor], line: str) -> None:
        """Where it is due: a row of progress.csv, TensorBoard, and a printed line that ends with `line`, filled."""
        if not self.evaluates():
            return
        i, history = self.progress["update"], self.progress["history"]
        returns = evaluate(policy, self.envs, self.data, [self.args.seed, i]) if self.envs else np.array([math.nan])
        now, (last, then) = time.monotonic(), self.mark
        row = {"update": i, "seconds": now - self.start, "updates_per_second": (i - last) / (now - then)}
        row |= {"return_mean": returns.mean().item(), "return_std": returns.std().item()}
        row |= {"normalised_score": float(self.data.normalised_score(returns.mean()))}
        history.append(row := row | self.progress["notes"] | {name: value.item() for name, value in info.items()})
        for name, value in row.items():
            self.writer.add_scalar(name, value, i)
        self.writer.flush()
        table = csv.DictWriter(text := io.StringIO(), list(row), lineterminator="\n")
        table.writeheader()
        table.writerows(history)
        write_text(self.folder / "progress.csv", text.getvalue())
        score = "return {return_mean:8.1f} ± {return_std:<6.1f}  normalised {normalised_score:6.1f}  "
        tqdm.write(f"update {i:>9,}  " + (score + line).format(**row))
        self.mark = i, time.monotonic()

    def finish(self, policy: nn.Module) -> None:
        """policy.pt and the score."""
        data, history = self.data, self.progress["history"]
        box = {"action_low": torch.as_tensor(data.action_low), "action_high": torch.as_tensor(data.action_high)}
        known = {"obs_dim": data.obs.shape[1], "action_dim": data.action.shape[1], **asdict(self.args)}
        sizes = {name: known[name] for name in inspect.signature(type(policy)).parameters if name in known}
        what = {"actor": policy.state_dict(), "class": type(policy).__name__, "sizes": sizes, **box}
        save(self.folder / "policy.pt", what | {"config": (self.folder / "config.json").read_text()})
        if self.envs and history:
            last, line = history[-self.args.score_evals :], "{:<11} {:.1f} (normalised {:.1f}), mean of the {}"
            score, behaviour = np.mean([row["return_mean"] for row in last]), data.episode_returns.mean()
            print(line.format("score", score, data.normalised_score(score), f"last {len(last)} evaluations"))
            print(line.format("behaviour", behaviour, data.normalised_score(behaviour), "data's episodes"))
        print(f"run         {self.folder}\ncurves      tensorboard --logdir {self.args.run_dir}")

    def _write_config(self) -> None:
        git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
        config = {"algo": self.algo, "args": asdict(self.args) | {"resume": ""}, "commit": commit}
        config |= {"data_hash": self.data.data_hash, "data": self.data.source, "python": sys.version.split()[0]}
        config["versions"] = {n: importlib.metadata.version(n) for n in ("torch", "numpy", "gymnasium", "minari")}
        config["hardware"] = f"{torch.cpu.get_capabilities().get('cpu_name', 'unknown CPU')}, {os.cpu_count()} cores"
        config["hardware"] += f", {torch.cuda.get_device_name()}" if self.device.type == "cuda" else ""
        config["command"] = shlex.join(["python", f"algos/{self.algo}.py", *sys.argv[1:]])
        write_text(self.folder / "config.json", json.dumps(config, indent=2))

    def _save(self, modules: dict[str, nn.Module]) -> None:
        self.progress["seconds"] = time.monotonic() - self.start
        cuda_rng = torch.cuda.get_rng_state() if self.device.type == "cuda" else None
        state = {"algo": self.algo, "data_hash": self.data.data_hash, "progress": self.progress}
        state |= {"modules": {name: module.state_dict() for name, module in modules.items()}}
        save(self.folder / "checkpoint.pt", state | {"rng": torch.get_rng_state(), "cuda_rng": cuda_rng})

    def _restore(self, modules: dict[str, nn.Module]) -> None:
        folder = self.folder
        try:
            state = torch.load(folder / "checkpoint.pt", map_location=self.device, weights_only=True)
            if (state["algo"], state["data_hash"]) != (self.algo, self.data.data_hash):
                raise InputError(f"the checkpoint in {folder} is another script's or on other data: start a new run")
            for name, module in modules.items():
                module.load_state_dict(state["modules"][name])
        except (OSError, RuntimeError, KeyError, pickle.UnpicklingError) as error:
            raise InputError(f"the checkpoint in {folder} cannot be resumed ({error}): start a new run") from None
        torch.set_rng_state(state["rng"].cpu())
        if state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"].cpu())
        self.progress = state["progress"]


def write_text(path: Path, text: str) -> None:
    """Atomic: a kill leaves the old file or the new one."""
    path.with_name(f"{path.name}.tmp").write_text(text)
    os.replace(path.with_name(f"{path.name}.tmp"), path)


def load_policy(folder: Path | str, Actor: type[nn.Module]) -> Callable[[np.ndarray], np.ndarray]:
    """The policy of the finished run in `folder`, of the class that its script trains (mostly `Actor`).

    It maps observations (..., obs_dim) as the environment gives them to actions (..., action_dim) in its box. Raises
    InputError where there is no finished run, or one whose policy is of another class.
    """
    try:
        saved = torch.load(Path(folder, "policy.pt"), map_location="cpu", weights_only=True)
        if saved["class"] != Actor.__name__:
            raise InputError(f"the policy in {folder} is of the class {saved['class']}: give that one of its script")
        actor = Actor(**saved["sizes"])
        actor.load_state_dict(saved["actor"])
    except (OSError, RuntimeError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise InputError(f"{folder} holds no policy of this {Actor.__name__} ({error}): finish that run") from None
    low, high = saved["action_low"], saved["action_high"]

    @torch.no_grad()
    def policy(obs: np.ndarray) -> np.ndarray:
        obs = torch.as_tensor(obs, dtype=torch.float32)
        action = actor.act(obs.reshape(-1, obs.shape[-1])).clamp(-1, 1)
        return ((high + low) / 2 + (high - low) / 2 * action).reshape(*obs.shape[:-1], -1).numpy()

    return policy


# --- Evaluation ---
def make_envs(data: OfflineDataset, num_envs: int) -> gym.vector.VectorEnv | None:
    """The environments to evaluate in; None, and a line that says so, where the data name none."""
    if data.env_spec is None:
        print("evaluation  none, the data name no environment: give --env-id to evaluate in one")
        return None
    try:
        return gym.vector.SyncVectorEnv([lambda: gym.make(data.env_spec)] * num_envs)
    except Exception as error:  # what a package that is missing or too old raises
        raise InputError(f"cannot make {data.env_spec.id} ({error}): install its package, or give --env-id") from None


@torch.no_grad()
def evaluate(policy, envs: gym.vector.VectorEnv, data: OfflineDataset, seed: list[int]) -> np.ndarray:
    """Undiscounted returns (num_envs,) of the deterministic policy, one episode per environment.

    The start states follow from `seed` alone and torch's random numbers are not touched: evaluating more often changes
    nothing else.
    """
    obs, _ = envs.reset(seed=np.random.SeedSequence(seed).generate_state(envs.num_envs).tolist())
    returns, running = np.zeros(envs.num_envs), np.ones(envs.num_envs, dtype=bool)
    while running.any():
        action = policy.act(torch.as_tensor(obs, dtype=torch.float32, device=data.obs.device)).cpu().numpy()
        obs, reward, terminated, truncated, _ = envs.step(data.to_env_action(action))
        returns += reward * running
        running &= ~(terminated | truncated)
    return returns
