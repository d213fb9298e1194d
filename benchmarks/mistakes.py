"""Known mistakes of papers and published code: which test notices each, and what does each cost in score?

mistakes.toml lists them: the file, the text to replace, what replaces it, where the mistake was found, and the test
that must notice it. Each is put into a scratch copy of this repository.
Run: python benchmarks/mistakes.py                     # every test passes before and fails after: results/mistakes.md
     python benchmarks/mistakes.py --only algos/combo.py
     python benchmarks/mistakes.py --train combo-beta-dropped --dataset hopper/medium-v0 --seeds 3 --out my-mistakes
trains the script with the mistake beside the right one and writes what it costs; called again it goes on.
"""

import csv
import json
import os
import queue
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.report import difference, interval  # noqa: E402
from common import InputError  # noqa: E402


@dataclass
class Args:
    table: Path = ROOT / "benchmarks" / "mistakes.toml"  # of the mistakes
    only: str = ""  # part of a name, a file or a test: only those mistakes, and no table is written
    workers: int = min(2, os.cpu_count() or 1)  # tests or trainings at a time, one thread each
    train: str = ""  # name of a mistake: what does it cost?
    script: str = ""  # to train where the mistake is in common/, say mopo
    dataset: str = "pendulum/random-v0"  # to train on, as the scripts take it
    seeds: int = 3  # 0 .. seeds - 1, of both copies
    flags: str = ""  # further settings of both, say "--num-updates 2000"
    out: Path = Path("mistakes")  # folder of trainings and what they say


def read_table(args: Args) -> list[dict[str, str]]:
    """Raises InputError when a text to replace does not stand in its file exactly once, or a test is gone."""
    mistakes = tomllib.loads(args.table.read_text())["mistake"]
    for row in mistakes:
        count = (ROOT / row["file"]).read_text().count(row["old"])
        if count != 1:
            where = f"{row['file']} holds {row['old']!r} {count} times"
            raise InputError(f"{row['name']}: {where}: bring {args.table} up to date")
        file, _, test = row["test"].split("[")[0].partition("::")
        if f"def {test}(" not in (ROOT / file).read_text():
            raise InputError(f"{row['name']}: {file} has no test {test}: bring {args.table} up to date")
    return [row for row in mistakes if any(args.only in row[key] for key in ("name", "file", "test"))]


def copy_to(folder: Path) -> Path:
    ignored = shutil.ignore_patterns(".git", "runs", "__pycache__", ".*_cache", ".venv")
    return Path(shutil.copytree(ROOT, folder, ignore=ignored, dirs_exist_ok=True))


def put_in(copy: Path, row: dict[str, str]) -> None:
    text = (ROOT / row["file"]).read_text()
    (copy / row["file"]).write_text(text.replace(row["old"], row["new"]))


# --- Does its test notice it? ---
def run_tests(copy: Path, *tests: str) -> subprocess.CompletedProcess:
    """pytest's exit status is 0 when all pass, 1 when one fails, and another one when they could not be run."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "", "-p", "no:cacheprovider", "--numprocesses", "0"]
    env = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *tests], cwd=copy, env=env, capture_output=True, text=True)


def outcome(copy: Path, row: dict[str, str]) -> str:
    put_in(copy, row)
    try:
        status = run_tests(copy, row["test"]).returncode
    finally:
        put_in(copy, row | {"new": row["old"]})
    return {0: "not noticed", 1: "noticed"}.get(status, f"pytest exit status {status}")


def try_all(mistakes: list[dict[str, str]], workers: int) -> list[str]:
    """What became of each mistake: "noticed", or what went wrong."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(workers) as pool:
        copies = queue.SimpleQueue()
        for i in range(workers):
            copies.put(copy := copy_to(Path(folder, str(i))))
        before = run_tests(copy, *sorted({row["test"] for row in mistakes}))
        if before.returncode:
            output = (before.stdout + before.stderr)[-2000:]
            raise InputError("the tests must pass before a mistake is put in:\n" + output)

        def try_out(row: dict[str, str]) -> str:
            copy = copies.get()
            try:
                return outcome(copy, row)
            finally:
                copies.put(copy)

        results = []
        for row, result in zip(bar := tqdm(mistakes, unit="mistake", leave=False), pool.map(try_out, mistakes)):
            results.append(result)
            if result != "noticed":
                bar.write(f"{result:<12}{row['name']}: {row['mistake']} ({row['test']})")
        return results


def cell(text: str) -> str:
    return text.strip().replace("\n", " ").replace("|", "\\|")


def table_lines(mistakes: list[dict[str, str]], results: list[str], commit: str) -> list[str]:
    """Of results/mistakes.md."""
    noticed = results.count("noticed")
    lines = ["# Known mistakes, and the tests that notice them", ""]
    lines += [f"At commit {commit} the tests notice {noticed} of {len(results)} (`python benchmarks/mistakes.py`).", ""]
    lines += ["| name | file | mistake | found in | test | |", "| --- | --- | --- | --- | --- | --- |"]
    for row, result in zip(mistakes, results, strict=True):
        test = row["test"].removeprefix("tests/").split("[")[0].replace("::", " :: ")
        cells = (row["name"], row["file"], row["mistake"], row["found"], test, result)
        lines.append("| " + " | ".join(map(cell, cells)) + " |")
    return lines


# --- What does it cost? ---
def score_of(run: Path) -> float:
    """The mean return of its last evaluations, as many as the run itself counts."""
    last = json.loads((run / "config.json").read_text())["args"]["score_evals"]
    with open(run / "progress.csv", newline="") as file:
        return float(np.mean([float(row["return_mean"]) for row in csv.DictReader(file)][-last:]))


def train(row: dict[str, str], args: Args) -> None:
    """Trains both copies, prints and writes their scores. Raises InputError where a run fails."""
    script = args.script or Path(row["file"]).stem
    if not (ROOT / "algos" / f"{script}.py").is_file():
        raise InputError(f"{row['name']} is in {row['file']}: say by --script which script of algos/ to train")
    out = args.out.absolute() / row["name"]
    with tempfile.TemporaryDirectory() as folder:
        jobs = []
        for kind, new in (("right", row["old"]), ("mistake", row["new"])):
            put_in(copy := copy_to(Path(folder, kind)), row | {"new": new})
            for seed in range(args.seeds):
                name = f"{kind}-{seed}"
                command = [sys.executable, str(copy / "algos" / f"{script}.py"), "--dataset", args.dataset]
                command += ["--seed", str(seed), "--num-threads", "1", *shlex.split(args.flags)]
                command += ["--run-dir", str(out), "--run-name", name]
                # what is fitted with a mistake in common/ is kept apart from what is fitted without
                kept = {"OFFLINE_MBRL_CACHE": str(out / f"cache-{kind}")} if row["file"].startswith("common/") else {}
                if (out / name / "config.json").exists():
                    command = [*command[:2], "--resume", str(out / name)]
                if not (out / name / "policy.pt").exists():
                    jobs.append((name, command, os.environ | kept | {"OMP_NUM_THREADS": "1"}))
        out.mkdir(parents=True, exist_ok=True)

        def run(job: tuple[str, list[str], dict[str, str]]) -> tuple[str, subprocess.CompletedProcess]:
            name, command, env = job
            print(shlex.join(["python", *command[1:]]), flush=True)
            return name, subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)

        with ThreadPoolExecutor(args.workers) as pool:
            for name, done in pool.map(run, jobs):
                if done.returncode:
                    pool.shutdown(cancel_futures=True)
                    raise InputError(f"{name} failed: {(done.stdout + done.stderr).strip().splitlines()[-1]}")
    kinds = ("right", "mistake")
    scores = [np.array([score_of(out / f"{kind}-{i}") for i in range(args.seeds)]) for kind in kinds]
    low, high = interval(difference, scores)
    lines = [f"# {row['name']}: {row['mistake']} ({row['found']})", "", f"{script}.py on {args.dataset}, returns.", ""]
    lines += ["| | " + " | ".join(f"seed {i}" for i in range(args.seeds)) + " | mean |"]
    lines += ["| --- |" + " --- |" * (args.seeds + 1)]
    for kind, values in zip(("right", "with the mistake"), scores):
        lines.append(f"| {kind} | " + " | ".join(f"{value:.1f}" for value in [*values, values.mean()]) + " |")
    cost = scores[0].mean() - scores[1].mean()
    lines += ["", f"It costs {cost:.1f} (95 % interval over seeds {low:.1f} to {high:.1f})."]
    (out / "cost.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def main(args: Args) -> int:
    """Exit status: 0 when every mistake is noticed, else 1."""
    mistakes = read_table(args)
    if args.train:
        named = [row for row in mistakes if row["name"] == args.train]
        if not named:
            raise InputError(f"no mistake is called {args.train!r}: {args.table} lists them")
        train(named[0], args)
        return 0
    if not mistakes:
        raise InputError(f"no mistake whose name, file or test has {args.only!r} in it")
    results = try_all(mistakes, args.workers)
    print(f"{results.count('noticed')} of {len(results)} mistakes are noticed by their test")
    if not args.only:
        git = subprocess.run(["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
        out = ROOT / "benchmarks" / "results" / "mistakes.md"
        out.write_text("\n".join(table_lines(mistakes, results, git.stdout.strip())) + "\n")
    return int(results.count("noticed") < len(results))


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Args)))
    except InputError as error:
        sys.exit(f"error: {error}")
