"""The runs of a grid as tasks of a Ray cluster: benchmarks/run.py --ray ADDRESS.

The cluster is there already: `ray start --head --port 6379` on one Linux machine, `ray start --address HEAD:6379` on
the others, all with requirements.txt and requirements-cluster.txt installed. This repository is shipped with the grid.
A run works in a temporary folder of its node, and its files come back with every checkpoint and when it ends: a stop of
the grid or of a node costs what came after the last checkpoint. The nodes must reach a dataset by the name that it has
in the grid: the id of a Minari dataset that they have or can download, or an absolute path on a shared disk.
pendulum/random-v0 is made anywhere. Every node has a cache of ensembles of its own.
"""

import json
import os
import shlex
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import TextIO

import ray

from benchmarks.grid import ROOT, start, state_now
from common import InputError, writing

NUM_TRIES = 6  # of a run whose nodes die
# Ray kills a task's process, and not what that one has started: Linux does (PR_SET_PDEATHSIG, SIGKILL)
WITH_PARENT = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); os.execv(sys.executable, ["
WITH_PARENT += "sys.executable, *sys.argv[1:]])"


@ray.remote(num_returns="streaming", max_retries=0)  # run_on_ray tries again, with the last checkpoint
def work(script: str, flags: list[str], folder: Path, files: dict[str, bytes], threads: int):
    """On a node: a run that begins with `files` in its folder.

    Yields exit status, peak memory in GB and all files, log.txt from where the last one ended; the exit status is None
    at a checkpoint of a run that goes on.
    """
    with tempfile.TemporaryDirectory() as home:
        run = home / folder
        run.mkdir(parents=True)
        for name, content in files.items():
            (run / name).write_bytes(content)
        command = ["-c", WITH_PARENT, str(ROOT / "algos" / f"{script}.py"), *flags]
        with open(run / "log.txt", "w") as log, open(run / "log.txt", "rb") as said:
            known, pid, process = checkpoint_time(run), 0, start(command, log, threads, cwd=home)
            while not pid:
                time.sleep(0.5)
                pid, status, usage = os.wait4(process.pid, os.WNOHANG)
                if pid:
                    process.returncode = os.waitstatus_to_exitcode(status)
                if pid or checkpoint_time(run) != known:
                    known = checkpoint_time(run)  # before they are read: what comes meanwhile is sent again
                    files = {path.name: path.read_bytes() for path in run.iterdir() if path.suffix != ".tmp"}
                    yield process.returncode, usage.ru_maxrss * 1024 / 1e9, files | {"log.txt": said.read()}


def checkpoint_time(run: Path) -> float:
    return os.path.getmtime(run / "checkpoint.pt") if (run / "checkpoint.pt").is_file() else 0


def bring_back(run, files: dict[str, bytes], log: TextIO, commit: str) -> None:
    log.write(files.pop("log.txt").decode(errors="replace"))
    log.flush()
    if "config.json" in files:  # Ray ships no .git, so that a node does not know the commit
        config = json.loads(files["config.json"])
        files["config.json"] = json.dumps(config | {"commit": config.get("commit") or commit}, indent=2).encode()
    for name in sorted(files, key=lambda name: name == "policy.pt"):  # last: it says that the run is finished
        with writing(run.folder / name) as part:
            part.write_bytes(files[name])


def run_on_ray(runs: list, failed: dict, view, args) -> None:
    """Fills `failed` with exit statuses. Arguments as in run.run_here."""
    try:
        ray.init(args.ray, runtime_env={"working_dir": str(ROOT)}, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"cannot start on the Ray cluster {args.ray} ({reason}): is it running?") from None
    need = {"CPU": args.threads, "GPU": args.gpus_per_run, "memory": int(args.memory_per_worker * 1e9)}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(all(node.get(name, 0) >= amount for name, amount in need.items()) for node in nodes):
        smaller = "lower --threads, --memory-per-worker or --gpus-per-run"
        raise InputError(f"no node of the Ray cluster has what a run needs, {need}: {smaller}")
    options = {"num_cpus": need["CPU"], "num_gpus": need["GPU"], "memory": need["memory"]}
    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    tasks, tries, logs = {}, Counter(), {run: run.lock() for run in runs}  # to the end: no two starts do the same work

    def submit(run) -> None:
        paths = [run.folder / name for name in ("config.json", "checkpoint.pt")]
        files = {path.name: path.read_bytes() for path in paths if path.is_file()}
        folder = Path("runs", run.folder.parent.name, run.folder.name)
        command, tries[run] = run.command(args.threads, folder), tries[run] + 1
        print("$", shlex.join(command), file=logs[run], flush=True)
        tasks[work.options(**options).remote(run.script, command[2:], folder, files, args.threads)] = run

    for run, log in logs.items():
        if log is None:
            raise InputError(f"{run.folder} is under way in another start of the grid: wait for its end")
        if state_now(run, failed) in ("new", "begun"):
            submit(run)
    while tasks:
        for task in ray.wait(list(tasks), timeout=1)[0]:
            run = tasks.pop(task)
            try:
                exit_status, peak_memory_gb, files = ray.get(next(task))
            except ray.exceptions.RayError as error:
                if tries[run] < NUM_TRIES and not isinstance(error, ray.exceptions.RayTaskError):  # a node died
                    submit(run)
                    continue
                exit_status, peak_memory_gb, files = 1, 0.0, {"log.txt": f"{error}\n".encode()}
            bring_back(run, files, logs[run], commit)
            run.write_resources(peak_memory_gb)
            if exit_status is None:
                tasks[task] = run
            elif state_now(run, failed) in ("new", "begun"):
                failed[run] = exit_status
        view.show(failed, f"{len(tasks)} to go, {len(runs) - len(tasks) - len(failed)} done, {len(failed)} failed")
    ray.shutdown()
