"""What a run records and how it is watched: settings, folder, curves, checkpoints, divergence.

Nothing here decides what a policy becomes; device, threads and compiling move its last digits.
"""

import csv
import importlib.metadata
import inspect
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import tyro
from filelock import FileLock
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from common import InputError, explained, write_text
from common.checks import unit_warnings
from common.dataset import OfflineDataset
from common.download import D4RL
from common.dynamics import save
from common.evaluation import evaluate, make_env
from common.machine import compiled, exact_products, keep_freed_memory, progress_bar
from common.terminations import rule_warning

RANGES = {  # of settings: from, to; other whole numbers begin at 1, all other numbers at 0
    **dict.fromkeys(("seed", "num_threads", "warm_start_updates"), (0, math.inf)),
    **dict.fromkeys(("gamma", "tau", "real_ratio", "expectile", "top_fraction", "policy_share", "gae_lambda"), (0, 1)),
    "target_entropy": (-math.inf, math.inf), "momentum": (0, 0.999), "init_std": (1e-3, math.inf),
}  # fmt: skip


@dataclass
class RunArgs:
    """Settings that every script has; all but `preset` decide nothing but the last digits of a policy."""

    eval_interval: int = 5_000  # updates between evaluations
    eval_episodes: int = 10  # episodes in an evaluation, deterministic actions
    score_evals: int = 10  # the score of a run is the mean of its last so many evaluations
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU when there is one
    num_threads: int = 0  # CPU threads, 0: all cores (or OMP_NUM_THREADS), at most 4
    compile: bool = True  # the whole update as one graph; without, the same lines run eagerly
    checkpoint_interval: int = 50_000  # updates between checkpoints
    run_dir: str = "runs"  # where run folders are made
    run_name: str = ""  # by default dataset__algo__seed__time
    resume: str = ""  # folder of a run to go on with; its settings hold where no flag is given
    trust: bool = False  # import the modules that data or a resumed run's folder name: code of whoever made them
    preset: Literal["auto", "paper"] = "auto"  # auto: the row of TUNED for the data; paper: the defaults, or D4RL's row


def start(main: Callable, Args: type[RunArgs], tuned: dict[str, dict]) -> None:
    """main(args), and one sentence in place of a traceback where the input is to blame."""
    try:
        main(read_args(Args, tuned))
    except InputError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped at once: a run with a checkpoint goes on with --resume, else the same command starts again")


def read_args(Args: type[RunArgs], tuned: dict[str, dict]) -> RunArgs:
    """Prints a line on each setting that is not the script's default."""
    given, resumed, row = tyro.cli(Args), None, ""
    if given.resume:
        base = resumed = _settings_of(Path(given.resume).expanduser(), Args)
    else:
        d4rl = d4rl_name(given.dataset)
        rows = [d4rl] if given.preset == "paper" else [given.dataset, d4rl, *["other"] * (d4rl not in D4RL)]
        row = next((row for row in rows if row in tuned), "")
        base = tuned.get(row, {})
        if row == "other":
            print("preset      small, for a log of thousands of rows; the published sizes: --preset paper")
    args = tyro.cli(Args, default=replace(Args(), **base))
    args.trust = given.trust  # never a folder's word
    for name in ("dataset", "dynamics", "policy", "run_dir", "resume"):
        if getattr(args, name, "").startswith("~"):
            setattr(args, name, str(Path(getattr(args, name)).expanduser()))
    origin = "the resumed run" if resumed else "TUNED for other data" if row == "other" else "TUNED for this dataset"
    for field in fields(Args):
        name, value = field.name, getattr(args, field.name)
        flag, numbers = "--" + name.replace("_", "-"), value if type(value) is tuple else (value,)
        least, most = RANGES.get(name, (0 if float in map(type, numbers) else 1, math.inf))
        for number in numbers:
            is_number = type(number) in (int, float)
            if is_number and not (least <= number <= most and (math.isfinite(number) or name == "max_alpha")):
                bounds = f"between {least} and {most}" if math.isfinite(most) else f"at least {least}"
                bounds += " and finite" * math.isinf(number)
                raise InputError(f"{flag} must be {bounds}, not {number}")
        if resumed:
            _check_resumed(flag, value, resumed[name], args)
        if value != field.default or value != base.get(name, value):
            where = origin if base.get(name) == value else "command line"
            print(f"setting     {flag} {' '.join(map(str, numbers))} ({where})")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda, but torch finds no GPU: use --device cpu or auto")
    return args


def d4rl_name(dataset: str) -> str:
    """d4rl/hopper-medium-v2 for that, for hopper_medium-v2.hdf5, and for our own hopper/medium-v0."""
    name = Path(dataset).stem if Path(dataset).suffix else dataset.removeprefix("d4rl/")
    return f"d4rl/{re.sub('-v[02]$', '', name).replace('_', '-').replace('/', '-')}-v2"


def _check_resumed(flag: str, value, before, args: RunArgs) -> None:
    name = flag[2:].replace("-", "_")
    if name in ("env_id", "termination") and ":" in before and not args.trust:
        raise InputError(f"this run imports {before} ({flag}), code of whoever made the folder: give --trust to run it")
    # what only watches a run may change when it goes on, but not its folder; other data are noticed by their hash
    free = {field.name for field in fields(RunArgs)} - {"run_dir", "run_name"} | {"dataset", "num_updates"}
    scheduled = getattr(args, "actor_lr_schedule", "") == "cosine" or hasattr(args, "policy_share")
    if value != before and (name not in free or (name == "num_updates" and (scheduled or value < before))):
        why = "its schedules span them" if scheduled and name in free else "cannot change on the way"
        raise InputError(f"{flag} is {before!r} in this run and {why}: leave it out or start anew")


def _settings_of(folder: Path, Args: type[RunArgs]) -> dict:
    """Those of the run in `folder`, which must be one of the script of `Args`."""
    with explained(f"no run of {algo(Args)}.py to resume in {folder}", "name another, or start a new run"):
        saved = json.loads((folder / "config.json").read_text())
        if saved["algo"] != algo(Args):
            raise ValueError(f"a run of {saved['algo']}.py")
        settings = {name: tuple(value) if type(value) is list else value for name, value in saved["args"].items()}
        return asdict(Args(**settings)) | {"resume": str(folder)}


def algo(Args: type[RunArgs]) -> str:
    """The script's name, also where it is imported by a test or a notebook."""
    return Path(sys.modules[Args.__module__].__file__).stem


def make_folder(args: RunArgs) -> tuple[Path, FileLock]:
    """A new folder for a new run, the old one for a resumed run, and the lock that keeps other processes out of it."""
    dataset = args.dataset.lstrip("./~").rstrip("/").replace("/", "-")  # visible, also for ../log.npz and ~/log.npz
    name = f"{dataset}__{algo(type(args))}__{args.seed}__{datetime.now():%Y%m%d-%H%M%S-%f}"
    folder = Path(args.resume or Path(args.run_dir, args.run_name or name))
    lock = FileLock(folder / ".lock", is_singleton=True)  # the kernel lets go of it when the process dies
    what = f"{folder} is in use by another process, or cannot be written to"
    with explained(what, "wait for it, or choose another --run-name or --run-dir"):
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    if not args.resume and (folder / "config.json").exists():
        lock.release()
        raise InputError(f"{folder} holds a run: go on with --resume {folder}, or choose another --run-name")
    for part in folder.glob("*.tmp"):  # of a process that was killed while it wrote
        part.unlink()
    print(f"run         {folder}")
    return folder, lock


class Run:
    """Folder, device and curves of one training."""

    def __init__(self, args: RunArgs):
        self.args, self.algo, self.start, self.stop = args, algo(type(args)), time.monotonic(), False
        self.progress, self.modules, self.said = {"update": 0, "seconds": 0.0, "history": [], "notes": {}}, {}, set()
        if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
            sys.stdout.reconfigure(line_buffering=True)  # a log file fills as the run goes on
        self.folder, self.lock = make_folder(args)
        self.resumes = bool(args.resume) and (self.folder / "checkpoint.pt").exists()
        self.device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
        torch.set_num_threads(args.num_threads or min(4, torch.get_num_threads()))
        exact_products(self.device)
        keep_freed_memory()
        self.compiled = lambda function: compiled(function, self.device) if args.compile else function

    def open(self, data: OfflineDataset, evaluates: bool = True) -> None:
        """Before anything expensive: can the data be what they claim, can the policy be evaluated?"""
        self.data, self.env = data, make_env(data) if evaluates else None
        print(data.summary())
        units = [] if getattr(self.args, "standardise_obs", True) else unit_warnings(data)  # some scripts always do it
        for warning in filter(None, [rule_warning(data), *units]):
            print(f"warning     {warning}")

    def updates(self, **modules: nn.Module) -> Iterator[int]:
        """1 .. num_updates, or from where a resumed run was; `modules` are all that training changes.

        Where a checkpoint is due or Ctrl-C asked for one, everything is saved after the update, random states included.
        """
        self.modules = modules
        if self.resumes:
            self._restore()
        first, last = self.progress["update"], self.args.num_updates
        self.start, self.saved = self.start - self.progress["seconds"], first
        self.config = json.dumps(self._config(), indent=2)
        self._write(write_text, self.folder / "config.json", self.config)
        self.writer, self.mark = SummaryWriter(self.folder, purge_step=first + 1), (first, time.monotonic())
        # TensorBoard writes in a thread of its own: what fails there fails here, too, and then in a sentence
        hook = threading.excepthook
        threading.excepthook = lambda x: None if issubclass(x.exc_type, OSError) else hook(x)
        bar = progress_bar(self.algo, last, "update", initial=first)
        usual = {number: signal.signal(number, self._ask_to_stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            for i in range(first + 1, last + 1):
                self.progress["update"] = i
                yield i
                bar.update()
                if self.stop or i % self.args.checkpoint_interval == 0 or i == last:
                    self._save()
                if self.stop:
                    tqdm.write(f"stopped     after {i:,} updates; to go on: {self._resume_command()}")
                    sys.exit(130)
        finally:
            with suppress(OSError):
                self.writer.close()
            threading.excepthook = hook
            bar.close()
            for number, handler in usual.items():
                signal.signal(number, handler)
            self.lock.release()

    def _ask_to_stop(self, *_) -> None:
        """The first Ctrl-C asks for a checkpoint after the current update, the second one ends at once."""
        self.stop = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def note(self, **values: Tensor | float) -> None:
        """Numbers for the next rows of progress.csv, until noted again; of several the mean."""
        self.progress["notes"] |= {k: torch.as_tensor(v, dtype=torch.float64).mean().item() for k, v in values.items()}

    def evaluates(self) -> bool:
        """Whether an evaluation is due after this update."""
        i = self.progress["update"]
        return i % self.args.eval_interval == 0 or i == self.args.num_updates

    def evaluate(self, policy, info: dict[str, Tensor], line: str) -> None:
        """Where it is due: a row of progress.csv, TensorBoard, and a printed line that ends with `line`, filled."""
        if not self.evaluates():
            return
        i, history = self.progress["update"], self.progress["history"]
        values = self.progress["notes"] | {name: value.item() for name, value in info.items()}
        self._check_finite(values)
        self._compare(values)
        returns = self._returns(policy)
        now, (last, then) = time.monotonic(), self.mark
        row = {"update": i, "seconds": now - self.start, "updates_per_second": (i - last) / (now - then)}
        row |= {"return_mean": returns.mean().item(), "return_std": returns.std().item()}
        row |= {"normalised_score": float(self.data.normalised_score(returns.mean()))}
        history.append(row := row | values)
        table = csv.DictWriter(text := io.StringIO(), list(row), lineterminator="\n")
        table.writeheader()
        table.writerows(history)
        self._write(lambda: [*(self.writer.add_scalar(*pair, i) for pair in row.items()), self.writer.flush()])
        self._write(write_text, self.folder / "progress.csv", text.getvalue())
        score = "return {return_mean:8.1f} ± {return_std:<6.1f}  normalised {normalised_score:6.1f}  "
        tqdm.write(f"update {i:>9,}  " + (score * (self.env is not None) + line).format(**row))
        self.mark = i, time.monotonic()

    def _returns(self, policy) -> np.ndarray:
        """(eval_episodes,); nan where the environment fails: that costs an evaluation, never the training."""
        try:
            if self.env is not None:
                seed = [self.args.seed, self.progress["update"]]
                return evaluate(policy, self.env, self.data, seed, self.args.eval_episodes)
        except InputError as error:
            tqdm.write(f"warning     update {self.progress['update']:,} is not evaluated: {error}")
            with suppress(Exception):  # of anybody's environment
                self.env.close()
                self.env = make_env(self.data)  # for the next evaluation
        return np.array([math.nan])

    def _check_finite(self, values: dict[str, float]) -> None:
        """Raises InputError where training has diverged. nan alone is also the loss of a network that had no step."""
        state = {f"{name}.{key}": x for name, module in self.modules.items() for key, x in module.state_dict().items()}
        bad = [name for name, x in state.items() if isinstance(x, Tensor) and not x.isfinite().all()]
        if bad or any(map(math.isinf, values.values())):
            names = ", ".join([name for name, value in values.items() if not math.isfinite(value)] + bad[:1])
            what = f"training has diverged by update {self.progress['update']:,}: {names} not finite"
            hint = "look for enormous rewards or observations, or lower the learning rates and coefficients"
            raise InputError(f"{what}; {hint}; {self._last_checkpoint()}")

    def _compare(self, values: dict[str, float]) -> None:
        """Warns, once, of a penalty that outweighs the rewards, of rollouts of one step, of Q values out of reach."""
        reward, args = self.data.reward, self.args
        if "penalty_mean" in values:
            size, penalty = reward.abs().mean().item(), values["penalty_mean"]
            self._once("penalty", f"beside rewards of mean size {size:.3g}: {penalty:.3g} a step")
            if penalty > size:
                self._once("warning", "the penalty outweighs the rewards: lower its coefficient, or --standardise-obs")
        if (buffer := self.modules.get("buffer")) and buffer.size and buffer.rows[: buffer.size, -1].all():
            self._once("warning", "every rollout ends with its first step: look at --termination, MOReL's threshold")
        # Q <= max r / (1 - gamma), or max r where that is negative and the episode ends; alpha pays log 2 a dimension
        best = reward.max().item() + values.get("alpha", 0.0) * self.data.action.shape[1] * math.log(2)
        horizon = 1 / (1 - args.gamma) if getattr(args, "gamma", 1.0) < 1 else math.inf
        slack = 0.1 * reward.abs().max().item() * horizon
        if values.get("q", -math.inf) > (most := max(best, best * horizon)) + slack:
            self._once("warning", f"the mean Q value is above {most:.4g}, all that the rewards allow: it overestimates")

    def _once(self, kind: str, text: str) -> None:
        if (kind, text[:20]) not in self.said:
            tqdm.write(f"{kind:<11} {text}")
        self.said.add((kind, text[:20]))

    def finish(self, policy: nn.Module) -> None:
        """policy.pt and the score."""
        data, history = self.data, self.progress["history"]
        known = {"obs_dim": data.obs.shape[1], "action_dim": data.action.shape[1], **asdict(self.args)}
        sizes = {name: known[name] for name in inspect.signature(type(policy)).parameters if name in known}
        what = {"actor": policy.state_dict(), "class": type(policy).__name__, "sizes": sizes}
        what |= {n: torch.as_tensor(getattr(data, n)) for n in ("action_low", "action_high", "obs_shift", "obs_scale")}
        self._write(save, self.folder / "policy.pt", what | {"config": self.config})
        returns = np.array([row["return_mean"] for row in history[-self.args.score_evals :]])
        if returns.size and not np.isnan(returns).all():
            failed = f", {n} failed" if (n := np.isnan(returns).sum()) else ""
            means = [("score", np.nanmean(returns), f"last {len(returns)} evaluations{failed}")]
            means += [("behaviour", data.episode_returns.mean(), "data's episodes")] if data.ordered else []
            for what, value, of in means:
                print(f"{what:<11} {value:.1f} (normalised {data.normalised_score(value):.1f}), mean of the {of}")
        print(f"run         {self.folder}\ncurves      tensorboard --logdir {self.args.run_dir}")

    # --- Files ---
    def _write(self, write: Callable, *what) -> None:
        """write(*what), and in the sentence of a failure how the run can go on."""
        try:
            write(*what)
        except (OSError, InputError) as error:
            reason = error if isinstance(error, InputError) else f"cannot write to {self.folder} ({error.strerror})"
            raise InputError(f"{reason}; {self._last_checkpoint()}") from None

    def _last_checkpoint(self) -> str:
        if not self.saved or not (self.folder / "checkpoint.pt").exists():
            return "there is no checkpoint yet: start again"
        return f"the checkpoint of update {self.saved:,} is whole: {self._resume_command()}"

    def _resume_command(self) -> str:
        imports = self.args.trust or ":" in getattr(self.args, "env_id", "") + getattr(self.args, "termination", "")
        return shlex.join(["python", sys.argv[0], "--resume", str(self.folder), *["--trust"] * imports])

    def _config(self) -> dict:
        """Of a resumed run the first command, and what was changed after which update."""
        args, data = json.loads(json.dumps(asdict(self.args))) | {"resume": "", "trust": False}, self.data
        command = shlex.join(["python", f"algos/{self.algo}.py", *sys.argv[1:]])
        if self.args.resume:
            config = json.loads((self.folder / "config.json").read_text())
            changed = {n: [was, value] for n, value in args.items() if (was := config["args"].get(n)) != value}
            resumed = {"after_update": self.progress["update"], "command": command, "changed": changed}
            return config | {"args": args, "resumed": [*config.get("resumed", []), resumed]}
        git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
        config = {"algo": self.algo, "args": args, "commit": commit}
        config |= {"data_hash": data.data_hash, "data": data.source, "env": data.env_spec and data.env_spec.id}
        config["behaviour_return"] = float(data.episode_returns.mean()) if data.ordered else None
        config |= {"ref_scores": data.ref_scores, "python": sys.version.split()[0]}
        config["versions"] = {n: importlib.metadata.version(n) for n in ("torch", "numpy", "gymnasium", "minari")}
        config["hardware"] = f"{torch.cpu.get_capabilities().get('cpu_name', 'unknown CPU')}, {os.cpu_count()} cores"
        config["hardware"] += f", {torch.cuda.get_device_name()}" if self.device.type == "cuda" else ""
        return config | {"command": command}

    def _save(self) -> None:
        self._check_finite({})  # before it takes the place of a good one
        self.progress["seconds"] = time.monotonic() - self.start
        cuda_rng = torch.cuda.get_rng_state() if self.device.type == "cuda" else None
        state = {"algo": self.algo, "data_hash": self.data.data_hash, "progress": self.progress}
        state |= {"modules": {name: module.state_dict() for name, module in self.modules.items()}}
        self._write(save, self.folder / "checkpoint.pt", state | {"rng": torch.get_rng_state(), "cuda_rng": cuda_rng})
        self.saved = self.progress["update"]

    def _restore(self) -> None:
        with explained(f"the checkpoint in {self.folder} cannot be resumed", "start a new run"):
            state = torch.load(self.folder / "checkpoint.pt", map_location=self.device, weights_only=True)
            if (state["algo"], state["data_hash"]) != (self.algo, self.data.data_hash):
                raise InputError(f"the checkpoint in {self.folder} is another script's or on other data: start anew")
            for name, module in self.modules.items():
                module.load_state_dict(state["modules"][name])
        torch.set_rng_state(state["rng"].cpu())
        if state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"].cpu())
        self.progress = state["progress"]
