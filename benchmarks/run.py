"""A grid of runs on the cores of this machine, or on a Ray cluster: started, watched, gone on with after a kill.

A grid file has one or more blocks. In a block every list is an axis, every other value a fixed setting of the script:

    name = "demo"                      # the runs are made in runs/demo
    [[grid]]
    script = "mopo"                    # algos/mopo.py
    dataset = "pendulum/random-v0"
    seed = [0, 1]
    penalty-coef = [0, 1]
    compile = false                    # --no-compile

A run's folder is called after its dataset, script, axes and seed: pendulum-random-v0__mopo__penalty-coef=1__0. Every
run is a command that anyone can type (--dry-run prints them); beside what it always leaves there are log.txt, all that
it printed, and resources.json, its peak memory. One that fails stops no other. The same grid started again skips what
is finished and goes on with the rest, whatever was killed: runner, runs or machine. Where there are GPUs each run sees
one of them, and has it to itself unless --workers asks for more runs than there are GPUs.
Run: python benchmarks/run.py benchmarks/grids/demo.toml
     python benchmarks/run.py --script mopo --seeds 0 1 --set penalty-coef=0,1 --set num-updates=2000
"""

import contextlib
import fcntl
import importlib
import io
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

import torch
import tyro
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from common.dataset import InputError  # noqa: E402

SET_HERE = ("num_threads", "run_dir", "run_name", "resume")  # settings that follow from the grid and from --threads
AFTERWARDS = ("displace",)  # what a finished run can still be asked for


@dataclass
class Args:
    grid: tyro.conf.Positional[str] = ""  # file of a grid; or, without one, the next four
    script: str = ""  # name of a script in algos/
    dataset: tuple[str, ...] = ()  # by default the script's own
    seeds: tuple[int, ...] = ()  # by default 0
    set: tyro.conf.UseAppendAction[tuple[str, ...]] = ()  # name=value, or name=value,value for an axis; once for each
    name: str = ""  # of the folder under --run-dir, by default the grid's
    run_dir: str = "runs"  # where the grid's folder is made
    workers: int = 0  # runs at a time; 0: one per GPU, without a GPU as many as cores and memory allow
    threads: int = 1  # CPU threads of a run
    memory_per_worker: float = 2.0  # GB that a run needs; resources.json tells what earlier ones did
    dry_run: bool = False  # print the commands and end
    ray: str = ""  # address of a Ray cluster to run on, see benchmarks/cluster.py; auto: the one of this machine
    gpus_per_run: float = 0.0  # on the Ray cluster


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
        resume = ["--resume", str(folder), "--num-threads", str(threads)]
        resume += [f"--{name.replace('_', '-')}" for name in AFTERWARDS if self.settings[name]]
        return ["python", script, *(resume if (self.folder / "config.json").is_file() else begin)]

    def state(self) -> str:
        """new, begun or finished. Raises InputError when the folder holds a run with other settings."""
        try:
            config = json.loads((self.folder / "config.json").read_text())
            saved = asdict(importlib.import_module(f"algos.{self.script}").Args()) | config["args"]
        except FileNotFoundError:
            return "new"
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError(f"{self.folder / 'config.json'} is damaged: delete the folder") from None
        for name, value in self.settings.items():
            if name not in SET_HERE + AFTERWARDS and saved[name] != value:
                found = f"{self.folder} holds a run with {name.replace('_', '-')} {saved[name]}"
                raise InputError(f"{found}, the grid asks for {value}: choose another --name, or delete the folder")
        update, evaluated = self.last_evaluation()
        complete = (self.folder / "policy.pt").is_file() and update == self.settings["num_updates"]
        displaced = (self.folder / "displaced.csv").is_file() or not (self.settings["displace"] and evaluated)
        return "finished" if complete and displaced else "begun"

    def last_evaluation(self) -> tuple[int, bool]:
        """Updates up to it, and whether there was an environment for it."""
        try:
            header, *_, last = (self.folder / "progress.csv").read_text().splitlines()
            row = dict(zip(header.split(","), last.split(",")))
            return int(row["update"]), row["return_mean"] != "nan"
        except (OSError, ValueError, KeyError):
            return 0, False

    def last_update(self) -> int:
        return self.last_evaluation()[0]

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
        starts = re.findall(r"\$ (?:CUDA_VISIBLE_DEVICES=(\S+) )?python ", (self.folder / "log.txt").read_text())
        return starts[-1] if starts else ""

    def peak_memory_gb(self) -> float:
        """Of all starts of the run; 0 where it is not known."""
        with contextlib.suppress(OSError, ValueError, KeyError):
            return json.loads((self.folder / "resources.json").read_text())["peak_memory_gb"]
        return 0.0

    def write_resources(self, peak_memory_gb: float) -> None:
        file, peak = self.folder / "resources.json", max(self.peak_memory_gb(), round(peak_memory_gb, 3))
        file.with_suffix(".tmp").write_text(json.dumps({"peak_memory_gb": peak}))
        os.replace(file.with_suffix(".tmp"), file)


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
    if unknown := grid.keys() - {"name", "grid"}:
        raise InputError(f"{args.grid}: {min(unknown)} stands outside of a [[grid]] block")
    return args.name or grid.get("name", Path(args.grid).stem), blocks


def safe(text: str) -> str:
    """`text` as part of a file's name."""
    return re.sub(r"[^\w.,=+-]+", "-", text).strip("-")


def make_runs(name: str, blocks: list[dict], args: Args) -> list[Run]:
    """One run for every cell. Raises InputError for all that a script would refuse and that needs no data to see."""
    if not isinstance(name, str) or name.startswith(".") or name != safe(name) or not name:
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
    for key, value in cell.items():
        if key.replace("-", "_") in SET_HERE:
            raise InputError(f"{key} cannot be set in a grid: it follows from the grid's name, its axes and --threads")
        if not isinstance(value, str | int | float):
            raise InputError(f"{key} cannot be {value!r}: give a number, a text, true or false, or a list of those")
        flags += [f"--{'' if value else 'no-'}{key}"] if isinstance(value, bool) else [f"--{key}", str(value)]
    settings = read_settings(module, [*flags, *("--device", "auto") * on_ray])
    if on_ray and "device" in cell:  # the GPU is a node's, this machine needs none
        settings["device"] = cell["device"]
    # numbers as the script read them, so that 0, 0.0 and "0" are one method
    values = [settings.get(key.replace("-", "_"), cell[key]) for key in named]
    values = [str(value).removesuffix(".0") if isinstance(value, float) else value for value in values]
    variant = ",".join(f"{key}={value}" for key, value in zip(named, values))
    name = "__".join(safe(str(part)) for part in (cell["dataset"], script, variant, cell["seed"]) if part != "")
    return Run(script, variant, folder / name, flags, settings)


def read_settings(module, flags: list[str]) -> dict:
    """All settings of a run with these flags, as the script itself reads them."""
    argv, sys.argv = sys.argv, [module.__file__, *flags]
    try:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            return json.loads(json.dumps(asdict(module.read_args()[0])))
    except SystemExit:  # tyro has drawn a box: a title, what is wrong, a rule, help
        lines = itertools.takewhile(lambda line: "│ ──" not in line, said.getvalue().splitlines()[1:])
        reason = " ".join(line.strip("│ ") for line in lines).rstrip(".")
        raise InputError(f"algos/{Path(module.__file__).name}: {reason}") from None
    finally:
        sys.argv = argv


# --- The view ---
class View:
    """One bar over the updates of all runs; where nobody watches, a line a minute."""

    def __init__(self, runs: list[Run]):
        self.runs, self.tty, self.printed = runs, sys.stderr.isatty(), time.monotonic()
        file, first = sys.stderr if self.tty else open(os.devnull, "w"), sum(run.last_update() for run in runs)
        # smoothing 0: time left by the mean speed since the start, because updates show at evaluations only
        self.bar = tqdm(desc="grid", total=0, initial=first, unit="update", smoothing=0, leave=False, file=file)

    def show(self, failed: Iterable[Run], text: str) -> None:
        updates = {run: run.last_update() for run in self.runs}
        self.bar.n = sum(updates.values())
        self.bar.total = sum(n if run in failed else run.settings["num_updates"] for run, n in updates.items())
        self.bar.set_postfix_str(text)
        if not self.tty and time.monotonic() - self.printed >= 60:
            self.printed = time.monotonic()
            print(self.bar, flush=True)


# --- Running ---
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


def cgroup_room(root: Path = Path("/")) -> float:
    """Bytes that limits of a container or a batch job leave: the least of limit - usage, from this group to the top."""
    rooms = [float("inf")]
    with contextlib.suppress(OSError):
        groups = (root / "proc/self/cgroup").read_text()
        for line, top, limit, usage in (  # versions 2 and 1
            (r"^0::/(.*)$", "sys/fs/cgroup", "memory.max", "memory.current"),
            (r"^\d+:memory:/(.*)$", "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            for name in re.findall(line, groups, re.MULTILINE):
                group = root / top / name
                for folder in (group, *group.parents):
                    with contextlib.suppress(OSError, ValueError):  # ValueError: "max", no limit
                        room = int((folder / limit).read_text()) - int((folder / usage).read_text())
                        # files read some time ago give way; version 1 has the groups below in total_inactive_file
                        cached = re.findall(r"inactive_file (\d+)", (folder / "memory.stat").read_text())
                        rooms.append(room + max(map(int, cached), default=0))
    return min(rooms)


def available_gb() -> float:
    """Memory that new processes can have."""
    with contextlib.suppress(OSError):
        text = Path("/proc/meminfo").read_text()
        return min(cgroup_room(), int(re.search(r"MemAvailable: +(\d+) kB", text)[1]) * 1024) / 1e9
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9


def visible_gpus() -> list[str]:
    """Every GPU as CUDA_VISIBLE_DEVICES calls it."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    return names.split(",")[: torch.cuda.device_count()] if names else list(map(str, range(torch.cuda.device_count())))


def num_workers(runs: list[Run], args: Args) -> int:
    """Raises InputError when memory is too small for as many as are asked for."""
    gpus = [] if all(run.settings["device"] == "cpu" for run in runs) else visible_gpus()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # what a killed start has left behind has its memory already, and its place is free when it ends
    num_under_way = sum(run.under_way() for run in runs if run.folder.is_dir())
    fit = int(available_gb() / args.memory_per_worker) + num_under_way
    workers = args.workers or max(1, min(len(gpus) or cores // args.threads, fit))
    if workers > fit:
        need = f"--workers {workers} needs {workers * args.memory_per_worker:,.1f} GB of memory (--memory-per-worker)"
        largest = f"the largest number that fits is {fit}" if fit else "lower --memory-per-worker"
        raise InputError(f"{need} and {available_gb():.1f} GB are available: {largest}")
    return workers


def run_here(runs: list[Run], failed: dict[Run, int], view: View, args: Args) -> None:
    """Fills `failed` with exit statuses. Raises KeyboardInterrupt after Ctrl-C or SIGTERM, when all runs have ended."""
    queue, running, signals, num_forwarded = list(runs), {}, [], 0
    gpus = visible_gpus()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: signals.append(True))
    while running or (queue and not signals):
        if num_forwarded < len(signals):
            num_forwarded += 1
            print("stopping    every run writes a checkpoint and ends", flush=True)
            for process in running.values():
                os.kill(process.pid, signal.SIGINT)  # not send_signal, which may take the exit status from wait4
        for run, process in list(running.items()):
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                del running[run]
                process.returncode = os.waitstatus_to_exitcode(status)
                run.write_resources(usage.ru_maxrss / (1e9 if sys.platform == "darwin" else 1e9 / 1024))
                if state_now(run, failed) in ("new", "begun") and not signals:
                    failed[run] = process.returncode
        # what a killed start has left behind, or another one makes at this time
        elsewhere = [run for run in queue if run.under_way()] if len(running) < args.workers else []
        for run in [run for run in queue if run not in elsewhere]:
            if signals or len(running) + len(elsewhere) >= args.workers:
                break
            if log := run.lock():
                with log:
                    queue.remove(run)
                    if state_now(run, failed) in ("new", "begun"):
                        command = run.command(args.threads)
                        taken = Counter(other.gpu() for other in [*running, *elsewhere])
                        free = gpus if run.settings["device"] != "cpu" else []
                        gpu = min(free, key=taken.__getitem__, default="")
                        prompt = f"$ CUDA_VISIBLE_DEVICES={gpu}" if gpu else "$"
                        print(prompt, shlex.join(command), file=log, flush=True)
                        running[run] = start(command[1:], log, args.threads, gpu=gpu)
        num_done = len(runs) - len(queue) - len(running) - len(failed)
        view.show(failed, f"{len(running) + len(elsewhere)} running, {num_done} done, {len(failed)} failed")
        time.sleep(0.5)
    if signals:
        raise KeyboardInterrupt


def start(command: list[str], log: TextIO, threads: int, cwd: str | None = None, gpu: str = "") -> subprocess.Popen:
    """Python with `command`; what it prints goes to `log`. Of the GPUs it sees `gpu` alone, if one is named."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS")
    env = os.environ | dict.fromkeys(names, str(threads)) | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})
    streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
    # in a session of its own: the terminal's Ctrl-C reaches it once, through this process
    return subprocess.Popen([sys.executable, *command], env=env, cwd=cwd, start_new_session=True, **streams)


def summarise(runs: list[Run], failed: dict[Run, int], threads: int) -> None:
    """The failed runs with the last lines that they printed, and what came out."""
    num_finished = sum(state_now(run, failed) == "finished" for run in runs)
    for run, status in failed.items():
        lines = [line for line in (run.folder / "log.txt").read_text(errors="replace").splitlines() if line.strip()]
        reason = f"exit status {status}" if status >= 0 else f"killed by {signal.Signals(-status).name}"
        print(f"failed      {run.folder.name}, {reason}", *(f"    {line}" for line in lines[-5:]), sep="\n")
        print(f"    $ {shlex.join(run.command(threads))}")
    text = f"{num_finished} of {len(runs)} runs finished, {len(failed)} failed"
    peak = max(run.peak_memory_gb() for run in runs)
    print(f"grid        {text}, peak memory of a run {peak:.2f} GB, {runs[0].folder.parent}")


def main(args: Args) -> int:
    """Exit status: 0, 1 when a run failed, 130 when stopped."""
    for name, least in (("workers", 0), ("threads", 1), ("gpus_per_run", 0), ("memory_per_worker", 0.01)):
        if not getattr(args, name) >= least:
            raise InputError(f"--{name.replace('_', '-')} must be at least {least}")
    # one variant after the other: runs with the same data and seed wait until one of them has fitted the ensemble
    runs = sorted(make_runs(*read_grid(args), args), key=lambda run: run.variant)
    states = {run: run.state() for run in runs}
    if args.dry_run:
        for run in runs:
            print(("# finished: " if states[run] == "finished" else "") + shlex.join(run.command(args.threads)))
        return 0
    args.workers = args.workers if args.ray else num_workers(runs, args)
    try:
        for run in runs:
            run.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write to {run.folder} ({error.strerror}): choose another --run-dir") from None
    run_grid = run_here
    if args.ray:
        try:
            from benchmarks.cluster import run_on_ray as run_grid
        except ImportError:
            raise InputError("--ray needs Ray: pip install -r requirements-cluster.txt") from None
    counts = Counter(states.values())
    begun = f"{counts['finished']} finished and {counts['begun']} begun before"
    where = f"Ray at {args.ray}" if args.ray else f"{args.workers} at a time"
    print(f"grid        {len(runs)} runs, {begun}, {where}, {runs[0].folder.parent}", flush=True)
    view, failed, stopped = View(runs), {}, False
    try:
        run_grid(runs, failed, view, args)
    except KeyboardInterrupt:
        stopped = True
    view.bar.close()
    summarise(runs, failed, args.threads)
    if stopped:
        print(f"stopped     to go on: python {shlex.join(sys.argv)}")
    return 130 if stopped else int(bool(failed))


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Args)))
    except InputError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
