"""The runs of a grid: read from its file, one for every cell, each with its folder, command and state.

A grid file has one or more blocks. In a block every list is an axis, every other value a fixed setting of the script:

    name = "demo"                      # the runs are made in runs/demo
    [[grid]]
    script = "mopo"                    # algos/mopo.py
    dataset = "pendulum/random-v0"
    seed = [0, 1]
    penalty-coef = [0, 1]
    hidden-sizes = "64 64"             # a setting of several numbers is a text; an axis of them a list of texts
    compile = false                    # --no-compile

What blocks have in common stands in tables: one with `shared = ["small", "large"]` is made once with the settings of
[shared.small] and once with those of [shared.large], beside its own.

A run's folder is called after its dataset, script, axes and seed: pendulum-random-v0__mopo__penalty-coef=1__0.
benchmarks/run.py starts and watches the runs, benchmarks/cluster.py does so on several machines.
"""

import contextlib
import difflib
import fcntl
import importlib
import io
import itertools
import json
import os
import re
import subprocess
import sys
import tomllib
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.files import safe, write_text  # noqa: E402
from common import InputError  # noqa: E402
from common.run import read_args  # noqa: E402

SET_HERE = ("num_threads", "run_dir", "run_name", "resume")  # settings that follow from the grid and from --threads


@dataclass
class Args:
    grid: tyro.conf.Positional[str] = ""  # file of a grid; or, without one, the next four
    script: str = ""  # name of a script in algos/
    dataset: tuple[str, ...] = ()  # by default the script's own
    seeds: tuple[int, ...] = ()  # by default 0
    set: tyro.conf.UseAppendAction[tuple[str, ...]] = ()  # name=value, or name=value,value for an axis; once for each
    name: str = ""  # of the folder under --run-dir, by default the grid's
    run_dir: str = "runs"  # where the grid's folder is made
    ray: str = ""  # address of a Ray cluster to run on, see benchmarks/cluster.py; auto: the one of this machine

    def __post_init__(self):
        # a shell leaves the ~ of --run-dir=~/runs alone
        self.grid, self.run_dir = (os.path.expanduser(path) for path in (self.grid, self.run_dir))


# --- A run ---
@dataclass(eq=False)
class Run:
    script: str
    variant: str  # its place on the axes
    folder: Path
    flags: list[str]
    settings: dict  # all of them, as config.json has them

    def command(self, threads: int, folder: Path | None = None) -> list[str]:
        """What starts the run or goes on with it; `folder` where it is not made in its own place."""
        folder, script = folder or self.folder, os.path.relpath(ROOT / "algos" / f"{self.script}.py")
        begin = [*self.flags, "--num-threads", str(threads), "--run-dir", str(folder.parent), "--run-name", folder.name]
        resume = ["--resume", str(folder), "--num-threads", str(threads), *["--trust"] * self.trusts()]
        return ["python", script, *(resume if (self.folder / "config.json").is_file() else begin)]

    def trusts(self) -> bool:
        """Whether a run that goes on may import what its folder names: the same that the grid names, see `state`."""
        return self.settings["trust"] or any(":" in self.settings.get(name, "") for name in ("env_id", "termination"))

    def state(self) -> str:
        """new, begun or finished. Raises InputError when the folder holds a run with other settings."""
        try:
            config = json.loads((self.folder / "config.json").read_text())
            saved = as_json(importlib.import_module(f"algos.{self.script}").Args()) | config["args"]
        except (FileNotFoundError, NotADirectoryError):
            return "new"
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            raise InputError(f"{self.folder / 'config.json'} is damaged: delete the folder") from None
        for name, value in self.settings.items():
            if name not in (*SET_HERE, "trust") and saved[name] != value:
                found = f"{self.folder} holds a run with {name.replace('_', '-')} {saved[name]}"
                raise InputError(f"{found}, the grid asks for {value}: choose another --name, or delete the folder")
        complete = (self.folder / "policy.pt").is_file() and self.last_update() == self.settings["num_updates"]
        return "finished" if complete else "begun"

    def last_update(self) -> int:
        """That of the last evaluation."""
        try:
            header, *_, last = (self.folder / "progress.csv").read_text().splitlines()
            return int(dict(zip(header.split(","), last.split(",")))["update"])
        except (OSError, ValueError, KeyError):
            return 0

    def lock(self) -> TextIO | None:
        """log.txt, locked; None where a run in this folder is under way.

        The lock belongs to the open file, which the run inherits as its output: it holds as long as the run lives,
        even when whoever started it was killed.
        """
        log = open(self.folder / "log.txt", "a")
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.close()
            return None
        return log

    def under_way(self) -> bool:
        with self.lock() or contextlib.nullcontext() as log:
            return log is None

    def gpu(self) -> str:
        """The one that its last start was given, whoever started it; empty where it had none."""
        text = (self.folder / "log.txt").read_text(errors="replace")
        starts = re.findall(r"\$ (?:CUDA_VISIBLE_DEVICES=(\S+) )?python ", text)
        return starts[-1] if starts else ""

    def peak_memory_gb(self) -> float:
        """Of all starts of the run; 0 where it is not known."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return float(json.loads((self.folder / "resources.json").read_text())["peak_memory_gb"])
        return 0.0

    def write_resources(self, peak_memory_gb: float) -> None:
        peak = max(self.peak_memory_gb(), round(peak_memory_gb, 3))
        write_text(self.folder / "resources.json", json.dumps({"peak_memory_gb": peak}))


def start(command: list[str], log: TextIO, threads: int, cwd: str | None = None, gpu: str = "") -> subprocess.Popen:
    """Python with `command`; what it prints goes to `log`. Of the GPUs it sees `gpu` alone, if one is named."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS")
    env = os.environ | dict.fromkeys(names, str(threads)) | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})
    streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
    # in a session of its own: the terminal's Ctrl-C reaches it once, through this process
    return subprocess.Popen([sys.executable, *command], env=env, cwd=cwd, start_new_session=True, **streams)


def state_now(run: Run, failed: dict[Run, int]) -> str:
    """While the grid goes on: as Run.state, or failed. What is wrong with one folder goes to its log.txt."""
    if run not in failed:
        try:
            return run.state()
        except InputError as error:
            failed[run] = 1
            with open(run.folder / "log.txt", "a") as log:
                print(f"error: {error}", file=log)
    return "failed"


# --- The grid ---
def read_grid(args: Args) -> tuple[str, list[dict]]:
    """Its name and its blocks."""
    if not args.grid:
        if not args.script:
            raise InputError("nothing to run: name the file of a grid, or a script with --script")
        block = {"script": args.script, "seed": list(args.seeds or [0])}
        block |= {"dataset": list(args.dataset)} if args.dataset else {}
        for text in args.set:
            name, equals, values = text.partition("=")
            if name in ("seed", "dataset"):
                flag = {"seed": "--seeds", "dataset": "--dataset"}[name]
                raise InputError(f"--set {text}: give it as {flag}, with a blank between values")
            if not equals or name in block:
                raise InputError(f"--set {text}: write name=value or name=value,value, and every name once")
            values = [{"true": True, "false": False}.get(value, value) for value in values.split(",")]
            block[name] = values if len(values) > 1 else values[0]
        return args.name or "grid", [block]
    if args.script or args.dataset or args.seeds or args.set:
        raise InputError("give the file of a grid, or --script, --dataset, --seeds and --set, not both")
    try:
        grid = tomllib.loads(Path(args.grid).read_text())
    except OSError as error:
        raise InputError(f"cannot read the grid {args.grid}: {error.strerror}") from None
    except ValueError as error:  # also text that is no UTF-8
        raise InputError(f"{args.grid} is no TOML: {error}") from None
    blocks = grid.get("grid")
    if not isinstance(blocks, list) or not all(isinstance(block, dict) for block in blocks) or not blocks:
        raise InputError(f"{args.grid} has no [[grid]] block")
    if unknown := grid.keys() - {"name", "grid", "shared"}:
        raise InputError(f"{args.grid}: {min(unknown)} stands outside of a [[grid]] block")
    blocks = [merged for block in blocks for merged in with_shared(block, grid.get("shared", {}), args.grid)]
    return args.name or grid.get("name", Path(args.grid).stem), blocks


def with_shared(block: dict, tables: dict, file: str) -> list[dict]:
    """The block itself, or one for each table that it shares."""
    own = {key: value for key, value in block.items() if key != "shared"}
    names = block.get("shared", [])
    names = names if isinstance(names, list) else [names]
    for name in names:
        if not isinstance(tables, dict) or not isinstance(tables.get(str(name)), dict):
            raise InputError(f"{file}: a block shares {name!r}, but there is no [shared.{name}] table")
    return [tables[str(name)] | own for name in names] if names else [own]


def as_json(settings) -> dict:
    """As config.json has them: where a script has a tuple, a list."""
    return json.loads(json.dumps(asdict(settings)))


def in_name(value) -> str:
    if isinstance(value, list):
        return "-".join(map(str, value))
    return str(value).removesuffix(".0") if isinstance(value, float) else str(value)


def make_runs(name: str, blocks: list[dict], args: Args) -> list[Run]:
    """One run for every cell. Raises InputError for all that a script would refuse and that needs no data to see."""
    if not isinstance(name, str) or name != safe(name) or not name:
        raise InputError(f"{name!r} cannot be a folder's name: use letters, digits, - and _")
    runs = []
    for block in blocks:
        axes = {key: value if isinstance(value, list) else [value] for key, value in block.items()}
        if "script" not in axes or not all(axes.values()):
            raise InputError("every block needs a script, and every list a value")
        named = [key for key in block if isinstance(block[key], list) and key not in ("script", "dataset", "seed")]
        for cell in itertools.product(*axes.values()):
            runs.append(make_run(dict(zip(axes, cell)), named, Path(args.run_dir) / name, bool(args.ray)))
    (folder, count), *_ = Counter(run.folder for run in runs).most_common(1)
    if count > 1:
        raise InputError(f"{count} runs of the grid would be called {folder.name}: they must differ in a list")
    return runs


def make_run(cell: dict, named: list[str], folder: Path, on_ray: bool) -> Run:
    script, scripts = cell.pop("script"), sorted(path.stem for path in (ROOT / "algos").glob("*.py"))
    if script not in scripts:
        raise InputError(f"there is no script algos/{script}.py, only {', '.join(scripts)}")
    module, flags = importlib.import_module(f"algos.{script}"), []
    cell = {"dataset": module.Args.dataset, "seed": module.Args.seed} | cell
    known = [name.replace("_", "-") for name in module.Args.__dataclass_fields__]
    for key, value in cell.items():
        if key.replace("-", "_") in SET_HERE:
            raise InputError(f"{key} cannot be set in a grid: it follows from the grid's name, its axes and --threads")
        if key.replace("_", "-") not in known:
            like = " or ".join(difflib.get_close_matches(key.replace("_", "-"), known))
            hint = f"did you mean {like}?" if like else f"python algos/{script}.py --help shows those that it has"
            raise InputError(f"algos/{script}.py has no setting {key}: {hint}")
        if not isinstance(value, str | int | float):
            kinds = "a number, a text (several numbers are one: '64 64'), true or false, or a list of those"
            raise InputError(f"{key} cannot be {value!r}: give {kinds}")
        if isinstance(value, bool):
            flags.append(f"--{'' if value else 'no-'}{key}")
        else:
            several = isinstance(getattr(module.Args, key.replace("-", "_"), None), tuple)
            flags += [f"--{key}", *(str(value).split() if several else [str(value)])]
    settings = read_settings(module, [*flags, *("--device", "auto") * on_ray])
    if on_ray and "device" in cell:  # the GPU is a node's, this machine needs none
        settings["device"] = cell["device"]
    # numbers as the script read them, so that 0, 0.0 and "0" are one method
    values = [in_name(settings.get(key.replace("-", "_"), cell[key])) for key in named]
    variant = ",".join(f"{key}={value}" for key, value in zip(named, values))
    name = "__".join(safe(str(part)) for part in (cell["dataset"], script, variant, cell["seed"]) if part != "")
    return Run(script, variant, folder / name, flags, settings)


def read_settings(module, flags: list[str]) -> dict:
    """All settings of a run with these flags, as the script itself reads them."""
    argv, sys.argv = sys.argv, [module.__file__, *flags]
    said, nowhere = io.StringIO(), open(os.devnull, "w", encoding="utf-8")  # else tyro's box is another one
    try:
        with nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(said):
            return as_json(read_args(module.Args, module.TUNED))
    except SystemExit as end:  # tyro has drawn a box: a title, what is wrong, a rule, help
        if not end.code:
            asked = next((word for word in flags if word.startswith(("-h", "--help", "--tyro"))), "a setting")
            raise InputError(
                f"algos/{Path(module.__file__).name}: {asked} makes it end without a run: take it out"
            ) from None
        lines = itertools.takewhile(lambda line: "│ ──" not in line, said.getvalue().splitlines()[1:])
        reason = " ".join(line.strip("│ ") for line in lines).rstrip(".")
        raise InputError(f"algos/{Path(module.__file__).name}: {reason}") from None
    finally:
        sys.argv = argv
