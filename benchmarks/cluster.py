"""The runs of a grid as tasks of a Ray cluster: benchmarks/run.py --ray ADDRESS.

The cluster is there already: `ray start --head --port 6379` on one Linux machine, `ray start --address HEAD:6379` on
the others, all with requirements.txt and requirements-cluster.txt installed. This repository is shipped with the grid.
A run works in a temporary folder of its node, and its files come back when it ends; when the node dies before that,
the run begins again on another one. The nodes must reach a dataset by the name that it has in the grid: the id of a
Minari dataset that they have or can download, or an absolute path on a shared disk. pendulum/random-v0 is made
anywhere. Every node has a cache of ensembles of its own.
"""

import os
import tempfile
from pathlib import Path

import ray

from benchmarks.run import ROOT, start, state_now
from common.dataset import InputError

# Ray kills a task's process, and not what that one has started: Linux does (PR_SET_PDEATHSIG, SIGKILL)
WITH_PARENT = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); os.execv(sys.executable, ["
WITH_PARENT += "sys.executable, *sys.argv[1:]])"


@ray.remote(max_retries=5)  # when nodes die
def work(script: str, flags: list[str], folder: Path, files: dict[str, bytes], threads: int):
    """On a node: exit status, peak memory in GB and all files of a run, which begins with `files` in its folder."""
    with tempfile.TemporaryDirectory() as home:
        run = home / folder
        run.mkdir(parents=True)
        for name, content in files.items():
            (run / name).write_bytes(content)
        command = ["-c", WITH_PARENT, str(ROOT / "algos" / f"{script}.py"), *flags]
        with open(run / "log.txt", "w") as log:
            process = start(command, log, threads, cwd=home)
            _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        files = {path.name: path.read_bytes() for path in run.iterdir() if path.suffix != ".tmp"}
        return process.returncode, usage.ru_maxrss * 1024 / 1e9, files


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
    tasks, logs = {}, {run: run.lock() for run in runs}  # locked up to the end: two starts never do the same work
    for run, log in logs.items():
        if log is None:
            raise InputError(f"{run.folder} is under way in another start of the grid: wait for its end")
        if state_now(run, failed) in ("new", "begun"):
            paths = [run.folder / name for name in ("config.json", "checkpoint.pt")]
            files = {path.name: path.read_bytes() for path in paths if path.is_file()}
            folder = Path("runs", run.folder.parent.name, run.folder.name)
            flags = run.command(args.threads, folder)[2:]
            tasks[work.options(**options).remote(run.script, flags, folder, files, args.threads)] = run
    while tasks:
        for task in ray.wait(list(tasks), timeout=1)[0]:
            run = tasks.pop(task)
            try:
                exit_status, peak_memory_gb, files = ray.get(task)
            except ray.exceptions.RayError as error:  # no node could finish it
                exit_status, peak_memory_gb, files = 1, 0.0, {"log.txt": f"{error}\n".encode()}
            logs[run].write(files.pop("log.txt").decode(errors="replace"))
            logs[run].flush()
            for name in sorted(files, key=lambda name: name == "policy.pt"):  # last: it says that the run is finished
                (run.folder / f"{name}.tmp").write_bytes(files[name])
                os.replace(run.folder / f"{name}.tmp", run.folder / name)
            run.write_resources(peak_memory_gb)
            if state_now(run, failed) in ("new", "begun"):
                failed[run] = exit_status
        view.show(failed, f"{len(tasks)} to go, {len(runs) - len(tasks) - len(failed)} done, {len(failed)} failed")
    ray.shutdown()
