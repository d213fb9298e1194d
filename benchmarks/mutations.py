"""Puts known mistakes in, one at a time, and runs the test that must notice each: the tests' own test.

mutations.toml lists them: a file, the text to replace, what replaces it, where the mistake was found, the test. Each is
put into a scratch copy of the repository; the test has to pass there before and to fail afterwards.
Run: python benchmarks/mutations.py                       # all, then benchmarks/results/mutations.md is written
     python benchmarks/mutations.py --only algos/combo.py
"""

import os
import queue
import shutil
import subprocess
import sys
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tyro
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from common.dataset import InputError  # noqa: E402


@dataclass
class Args:
    table: str = str(ROOT / "benchmarks" / "mutations.toml")  # of the mistakes
    only: str = ""  # part of a file's or a test's name: only those mistakes, and no table is written
    out: str = str(ROOT / "benchmarks" / "results" / "mutations.md")
    workers: int = min(4, os.cpu_count() or 1)  # mistakes at a time, each in a copy of its own


def read_table(args: Args) -> list[dict[str, str]]:
    """Raises InputError when a text to replace does not stand in its file exactly once, or a test is gone."""
    mistakes = tomllib.loads(Path(args.table).read_text())["mistake"]
    for row in mistakes:
        count = (ROOT / row["file"]).read_text().count(row["old"])
        if count != 1:
            raise InputError(f"{row['file']} holds {row['old']!r} {count} times: bring {args.table} up to date")
        file, _, test = row["test"].split("[")[0].partition("::")
        if test and f"def {test}(" not in (ROOT / file).read_text():
            raise InputError(f"{file} has no test {test}: bring {args.table} up to date")
    return [row for row in mistakes if args.only in row["file"] or args.only in row["test"]]


def run_tests(copy: Path, *tests: str) -> subprocess.CompletedProcess:
    """pytest's exit status is 0 when all pass, 1 when one fails, and another one when they could not be run."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--numprocesses", "0", *tests]
    env = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True)


def outcome(copy: Path, row: dict[str, str]) -> str:
    """Whether the test noticed; or what went wrong."""
    file = copy / row["file"]
    text = file.read_text()
    file.write_text(text.replace(row["old"], row["new"]))
    try:
        result = run_tests(copy, row["test"])
    finally:
        file.write_text(text)
    return {0: "not noticed", 1: "noticed"}.get(result.returncode, f"pytest exit status {result.returncode}")


def cell(text: str) -> str:
    return text.strip().replace("\n", " ").replace("|", "\\|")


def main(args: Args) -> int:
    """Exit status: 0 when every mistake is noticed, else 1."""
    mistakes, rows = read_table(args), []
    if not mistakes:
        raise InputError(f"no mistake whose file or test has {args.only!r} in its name")
    with tempfile.TemporaryDirectory() as folder:
        copies = queue.SimpleQueue()
        for i in range(args.workers):
            copies.put(copy := Path(folder) / str(i))
            shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "runs", "__pycache__", "results"))
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

        pool = ThreadPoolExecutor(args.workers)
        try:
            for row, result in zip(bar := tqdm(mistakes, unit="mistake", leave=False), pool.map(try_out, mistakes)):
                test = row["test"].removeprefix("tests/").split("[")[0].replace("::", " :: ")
                rows.append((row["file"], row["mistake"], row["found"], test, result))
                if result != "noticed":
                    bar.write(f"{result:<12}{row['file']}: {row['mistake']} ({row['test']})")
        finally:
            pool.shutdown(cancel_futures=True)
    noticed = sum(row[-1] == "noticed" for row in rows)
    print(f"{noticed} of {len(rows)} mistakes are noticed by their test")
    if not args.only:
        lines = ["# Known mistakes, and the tests that notice them", ""]
        lines += ["Written by `python benchmarks/mutations.py`, from `benchmarks/mutations.toml`.", ""]
        lines += ["| file | mistake | found in | test | |", "| --- | --- | --- | --- | --- |"]
        Path(args.out).write_text("\n".join(lines + ["| " + " | ".join(map(cell, row)) + " |" for row in rows]) + "\n")
    return int(noticed < len(rows))


if __name__ == "__main__":
    try:
        sys.exit(main(tyro.cli(Args)))
    except InputError as error:
        sys.exit(f"error: {error}")
