"""What runs and loaders endure: kills, disks that fail, damaged data, and data or run folders that want to run code.

kill      each script is killed at random moments and resumed, also where it has no checkpoint yet, until it is done:
          its checkpoint, policy and csv are bit for bit those of a run that nothing disturbed,
          but for times and paths
disk      a run that loses its disk (full, a limit on the size of files, a folder that is read-only or gone) ends with
          one sentence and exit status 1; resumed it ends as if nothing had been, and nothing unfinished is left
mutants   damaged npz, hdf5 and Minari files load, with finite numbers, or get one sentence      hostile.py
planted   code that data or a run's folder name does not run, and does where --trust is given    hostile.py
Run: python benchmarks/studies/endurance.py            everything, an hour and a half on one core
     python benchmarks/studies/endurance.py --quick --only kill disk --scripts mopo sdc
"""

import ctypes
import importlib
import io
import itertools
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from benchmarks import files  # noqa: E402
from benchmarks.mistakes import git  # noqa: E402
from benchmarks.report import RESULTS, escape, table  # noqa: E402
from benchmarks.studies import hostile  # noqa: E402
from common import InputError  # noqa: E402

SCRIPTS = tuple(sorted(path.stem for path in (ROOT / "algos").glob("*.py")))
SMALL = {  # settings of a run of some seconds, without those that a script lacks
    "num_updates": 600, "eval_interval": 200, "eval_episodes": 1, "checkpoint_interval": 50, "batch_size": 32,
    "num_threads": 1, "hidden_sizes": "16 16", "dynamics_hidden_size": 16, "dynamics_max_epochs": 2,
    "rollout_batch_size": 200, "rollout_interval": 100, "num_trajectories": 4, "horizon": 10, "cg_iterations": 3,
    "pessimistic_episodes": 4, "clone_epochs": 1, "behaviour_updates": 300, "inverse_updates": 300,
    "transition_updates": 300, "warm_start_updates": 100, "real_ratio_interval": 50, "num_bootstrap": 2,
}  # fmt: skip
NOTE = """\
# What runs and loaders endure

Written by `python benchmarks/studies/endurance.py --seed {}` in {:.0f} minutes, at commit {}. Its head says what each
trial demands; wrong is a trial that ended otherwise. Killed n times: at random moments, and resumed as often.
"""
PR_CAPBSET_DROP, CAP_DAC_OVERRIDE = 24, 1  # of Linux
FAULTS = ("full", "limited size of files", "read-only", "folder gone")


@dataclass
class Args:
    scripts: tuple[str, ...] = SCRIPTS  # to be killed, and to lose their disk
    only: tuple[str, ...] = ("kill", "disk", "mutants", "planted")
    num_runs: int = 3  # of each script that are killed
    num_kills: int = 3  # of each of them, at most
    num_mutants: int = 10_000  # of data files
    seed: int = 0  # of moments and mutations
    quick: bool = False  # one run of each script, 300 mutants, and no file is written
    out: Path = RESULTS / "endurance.md"  # written where all of it was tried


# --- Runs ---
def start(script: str, home: Path) -> subprocess.Popen:
    """The run in home/run, begun or resumed; what it says goes to home/log."""
    known, folder = importlib.import_module(f"algos.{script}").Args.__dataclass_fields__, home / "run"
    small = SMALL | (dict(num_updates=60, eval_interval=20, checkpoint_interval=5) if script == "morel_npg" else {})
    words = [f"--{name.replace('_', '-')} {value}".split() for name, value in small.items() if name in known]
    begin = ["--no-compile", "--run-dir", str(home), "--run-name", "run", *(word for pair in words for word in pair)]
    again = ["--resume", str(folder)] if (folder / "config.json").exists() else begin
    (home / "cache").mkdir(parents=True, exist_ok=True)
    env = os.environ | {name: str(home / "cache") for name in ("OFFLINE_MBRL_CACHE", "MINARI_DATASETS_PATH", "HOME")}
    with open(home / "log", "w") as log:
        command = [sys.executable, str(ROOT / "algos" / f"{script}.py"), *again]
        # a read-only folder is one for root, too, without the right to write anywhere
        lose_right = lambda: ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_DAC_OVERRIDE)  # noqa: E731
        return subprocess.Popen(command, env=env, cwd=home, stdout=log, stderr=log, preexec_fn=lose_right)


def last_line(home: Path) -> str:
    return ((home / "log").read_text(errors="replace").strip().splitlines() or ["nothing said"])[-1][:300]


def contents(run: Path) -> dict[str, object]:
    """What a finished run leaves, but for times and paths."""
    states = {name: torch.load(run / name, weights_only=True) for name in ("checkpoint.pt", "policy.pt")}
    del states["policy.pt"]["config"], states["checkpoint.pt"]["progress"]
    for name, state in states.items():
        torch.save(state, file := io.BytesIO())
        states[name] = file.getvalue()
    rows = [row.split(",") for row in (run / "progress.csv").read_text().splitlines()]
    return states | {"progress.csv": [row[:1] + row[3:] for row in rows]}  # without seconds, updates_per_second


def difference(script: str, home: Path, right: dict[str, object]) -> str:
    """Brings the run to its end; returns what is then not right."""
    if status := start(script, home).wait():
        return f"exit status {status} at last: {last_line(home)}"
    ours = contents(home / "run")
    wrong = [f"another {name}" for name in right if ours[name] != right[name]]
    return ", ".join(wrong + [f"{path.name} is left" for path in home.rglob("*.tmp")])


def kill(script: str, home: Path, seconds: float, num_kills: int, rng: random.Random) -> int:
    """Returns how often the run was killed before it ended by itself."""
    for i in range(num_kills):
        process = start(script, home)
        try:
            process.wait(timeout=rng.uniform(0, seconds))
            return i
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return num_kills


def lose_disk(kind: str, script: str, home: Path, right: dict[str, object], rng: random.Random) -> str:
    """At some moment after the first checkpoint."""
    home.mkdir()
    if kind == "full":
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(home)], check=True)
    try:
        process, folder = start(script, home), home / "run"
        while process.poll() is None and not (folder / "checkpoint.pt").exists():
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.3))
        if kind == "full":
            subprocess.run(["dd", "if=/dev/zero", f"of={home / 'filler'}"], capture_output=True)
        elif kind == "limited size of files":
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (6_000, 6_000))  # log: less, checkpoint: more
        elif kind == "read-only":
            folder.chmod(0o555)
        else:
            shutil.rmtree(folder.rename(home / "gone"))  # at once, whatever is being written
        status, said = process.wait(), (home / "log").read_text()
        (home / "filler").unlink(missing_ok=True)
        if folder.exists():
            folder.chmod(0o755)
        if status == 0:  # it was faster than the fault: what it left must be whole
            ours = contents(folder) if folder.exists() else right
            return ", ".join(f"another {name}" for name in right if ours[name] != right[name])
        wrong = [] if status == 1 else [f"exit status {status}: {last_line(home)}"]
        wrong += ["no sentence"] if "Traceback" in said or not last_line(home).startswith("error: ") else []
        if kind != "read-only":  # where nobody can remove anything; the resumed run does
            wrong += [f"{path.name} is left" for path in home.rglob("*.tmp")]
        return "; ".join(filter(None, [*wrong, difference(script, home, right)]))
    finally:
        subprocess.run(["umount", str(home)], capture_output=True)


# --- Campaigns: what is tried, on what, and what is wrong with it, or "" ---
def runs(args: Args, work: Path, rng: random.Random) -> Iterator[tuple[str, str, str]]:
    for script in args.scripts:
        home, began = work / script, time.monotonic()
        if start(script, home).wait() != 0:
            raise InputError(f"{script}.py fails where nothing disturbs it: {last_line(home)}")
        right, seconds = contents(home / "run"), time.monotonic() - began
        for i in range(args.num_runs if "kill" in args.only else 0):
            num_kills = kill(script, work / f"{script}-{i}", seconds, args.num_kills, rng)
            yield f"killed {num_kills} times", script, difference(script, work / f"{script}-{i}", right)
        for kind in FAULTS if "disk" in args.only else ():
            if kind != "full" or os.geteuid() == 0:  # only root may make a small disk
                yield f"disk, {kind}", script, lose_disk(kind, script, work / f"{script}-{kind}", right, rng)


def main(args: Args) -> int:
    if args.quick:
        args.num_runs, args.num_mutants = 1, 300
    rng, found, began = random.Random(args.seed), Counter(), time.monotonic()
    commit = git("rev-parse", "--short=7", "HEAD")  # before the hours of work
    with tempfile.TemporaryDirectory(prefix="endurance-") as folder:
        work = Path(folder)
        work.chmod(0o755)
        trials = [runs(args, work, rng)] if {"kill", "disk"} & {*args.only} else []
        trials += [hostile.mutants(work / "mutants", args.num_mutants, rng)] if "mutants" in args.only else []
        trials += [hostile.planted(work / "planted")] if "planted" in args.only else []
        for trial in itertools.chain(*trials):
            found[trial] += 1
            print(", ".join(trial) if trial[2] or "mutants" not in trial[0] else ".", flush=True)
    num, wrong = Counter(), Counter()
    for (what, _, problem), count in found.items():
        num[what], wrong[what] = num[what] + count, wrong[what] + count * bool(problem)
    rows = [[what, num[what], wrong[what]] for what in num]
    note = NOTE.format(args.seed, (time.monotonic() - began) / 60, commit)
    text = note + "\n" + table("campaign, trials, wrong", rows)
    text += "\n" + "".join(f"\n- {escape(', '.join(t))} ({n} times)" for t, n in found.most_common() if t[2])
    print("", text, sep="\n")
    if not args.quick and (args.scripts, args.only) == (Args.scripts, Args.only):
        files.write_text(args.out, text)
    return int(wrong.total() > 0)


if __name__ == "__main__":
    files.start(main, Args)
