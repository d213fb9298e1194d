"""A grid of runs on the cores of this machine, or on a Ray cluster: started, watched, gone on with after a kill.

What a grid's file says: benchmarks/grid.py. Every run is a command that anyone can type (--dry-run prints them); beside
what it always leaves there are log.txt, all that it printed, and resources.json, its peak memory. One that fails stops
no other. The same grid started again skips what is finished and goes on with the rest, whatever was killed: runner,
runs or machine. Where there are GPUs each run sees one of them, and has it to itself unless --workers asks for more
runs than there are GPUs.
Run: python benchmarks/run.py benchmarks/grids/demo.toml
     python benchmarks/run.py --script mopo --seeds 0 1 --set penalty-coef=0,1 --set num-updates=2000
"""

import contextlib
import os
import re
import shlex
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import files, grid  # noqa: E402
from benchmarks.grid import Run, make_runs, read_grid, start, state_now  # noqa: E402
from common import InputError  # noqa: E402

try:
    from benchmarks.cluster import run_on_ray
except ImportError:  # Ray is for grids on more than one machine
    run_on_ray = None


@dataclass
class Args(grid.Args):
    workers: int = 0  # runs at a time; 0: one per GPU, without a GPU as many as cores and memory allow
    threads: int = 1  # CPU threads of a run
    memory_per_worker: float = 2.0  # GB that a run needs; resources.json tells what earlier ones did
    dry_run: bool = False  # print the commands and end
    gpus_per_run: float = 0.0  # on the Ray cluster


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


def summarise(runs: list[Run], failed: dict[Run, int], threads: int) -> None:
    """The failed runs with the last lines that they printed, and what came out."""
    num_finished = sum(state_now(run, failed) == "finished" for run in runs)
    for run, status in failed.items():
        log = run.folder / "log.txt"
        lines = log.read_text(errors="replace").splitlines() if log.is_file() else ["its folder is gone"]
        lines = [line for line in lines if line.strip()]
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
    # one variant after the other: runs with the same data and seed wait until one of them has fitted the ensemble;
    # of a variant one seed after the other, set by set: what a killed grid leaves can be compared
    runs = make_runs(*read_grid(args), args)
    place = list(dict.fromkeys(run.settings["dataset"] for run in runs))
    runs.sort(key=lambda run: (run.variant, run.settings["seed"], place.index(run.settings["dataset"])))
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
    if args.ray and run_on_ray is None:
        raise InputError("--ray needs Ray: pip install -r requirements-cluster.txt")
    counts = Counter(states.values())
    begun = f"{counts['finished']} finished and {counts['begun']} begun before"
    where = f"Ray at {args.ray}" if args.ray else f"{args.workers} at a time"
    print(f"grid        {len(runs)} runs, {begun}, {where}, {runs[0].folder.parent}", flush=True)
    view, failed, stopped = View(runs), {}, False
    try:
        (run_on_ray if args.ray else run_here)(runs, failed, view, args)
    except KeyboardInterrupt:
        stopped = True
    except OSError as error:  # a full disk, a folder that is gone
        hint = "what runs goes on by itself; make room there, then the same command goes on with the grid"
        raise InputError(f"cannot write to {runs[0].folder.parent} ({error.strerror or error}): {hint}") from None
    finally:
        view.bar.close()
    summarise(runs, failed, args.threads)
    if stopped:
        print(f"stopped     to go on: python {shlex.join(sys.argv)}")
    return 130 if stopped else int(bool(failed))


if __name__ == "__main__":
    files.start(main, Args)
