"""Known mistakes of papers and published code: which test notices each, and what does each cost in score?

mistakes.toml lists them: the file, the text to replace, what replaces it, where the mistake was found, and the test
that must notice it. Each is put into a scratch copy of this repository.
Run: python benchmarks/mistakes.py                     # every test passes before and fails after: results/mistakes.md
     python benchmarks/mistakes.py --only algos/combo.py
     python benchmarks/mistakes.py --train combo-beta-dropped --dataset hopper/medium-v0 --seeds 3
trains the script with the mistake beside the right one and writes what it costs; called again it goes on.
     python benchmarks/mistakes.py --exercise 3        # find and mend it: exercises.md
     python benchmarks/mistakes.py --check 3
"""

import itertools
import json
import os
import re
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
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.files import HomePaths, start  # noqa: E402
from benchmarks.report import difference, interval, read_folder  # noqa: E402
from common import InputError  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "mistakes.md"
EXERCISES = ROOT / "benchmarks" / "exercises.md"


@dataclass
class Args(HomePaths):
    table: Path = ROOT / "benchmarks" / "mistakes.toml"  # of the mistakes
    only: str = ""  # part of a name, a file or a test: only those mistakes, and no table is written
    workers: int = min(2, os.cpu_count() or 1)  # tests or trainings at a time, one thread each
    train: str = ""  # name of a mistake: what does it cost?
    script: str = ""  # to train where the mistake is in common/, say mopo
    dataset: str = "pendulum/random-v0"  # to train on, as the scripts take it
    seeds: int = 3  # 0 .. seeds - 1, of both copies
    flags: str = ""  # further settings of both, as --flags="--num-updates 2000"
    exercise: int = 0  # from 1: a copy with that exercise's mistake
    check: int = 0  # from 1: is it mended?
    out: Path = Path("runs/mistakes")  # folder of the trainings and of the exercises


def read_table(table: Path) -> list[dict[str, str]]:
    """Raises InputError when a text to replace does not stand in its file exactly once, or a test is gone."""
    mistakes = tomllib.loads(table.read_text())["mistake"]
    for row in mistakes:
        if (count := (ROOT / row["file"]).read_text().count(row["old"])) != 1:
            raise InputError(f"{row['name']}: old is {count} times in {row['file']}: bring {table} up to date")
        file, _, test = row["test"].split("[")[0].partition("::")
        if f"def {test}(" not in (ROOT / file).read_text():
            raise InputError(f"{row['name']}: {file} has no test {test}: bring {table} up to date")
    return mistakes


def copy_to(folder: Path, row: dict[str, str] | None = None) -> Path:
    """The repository, with a mistake where one is given."""
    ignored = shutil.ignore_patterns(".git", "runs", "__pycache__", ".*_cache", ".venv", "mistakes.*")
    shutil.copytree(ROOT, folder, ignore=ignored)
    if row:
        (folder / row["file"]).write_text((ROOT / row["file"]).read_text().replace(row["old"], row["new"]))
    return folder


# --- Does its test notice it? ---
def run_tests(tests: list[str], row: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """pytest's exit status is 0 when all pass, 1 when one fails, and another one when they could not be run."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "", "-p", "no:cacheprovider", "--numprocesses", "0"]
    with tempfile.TemporaryDirectory() as folder:
        copy, env = copy_to(Path(folder, "copy"), row), os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.run([*command, *tests], cwd=copy, env=env, capture_output=True, text=True)


def outcome(row: dict[str, str]) -> str:
    """ "noticed", or what went wrong."""
    done = run_tests([row["test"]], row)
    crash = re.search(r"^E +((Name|Attribute|Type|UnboundLocal)Error.*)", done.stdout, re.MULTILINE)
    if done.returncode == 1 and crash:  # what does not run is no mistake that a test could notice
        return crash[1]
    return {0: "not noticed", 1: "noticed"}.get(done.returncode, f"pytest exit status {done.returncode}")


def try_all(mistakes: list[dict[str, str]], workers: int) -> list[str]:
    """The outcome of each. Raises InputError where a test does not even pass without its mistake."""
    before = run_tests(sorted({row["test"] for row in mistakes}))
    if before.returncode:
        raise InputError(f"tests must pass before a mistake is put in:\n{(before.stdout + before.stderr)[-2000:]}")
    results = []
    with ThreadPoolExecutor(workers) as pool:
        for row, result in zip(bar := tqdm(mistakes, unit="mistake", leave=False), pool.map(outcome, mistakes)):
            results.append(result)
            if result != "noticed":
                bar.write(f"{row['name']}: {result} ({row['test']})")
    return results


def git(*words: str) -> str:
    return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True).stdout.strip()


def table_lines(mistakes: list[dict[str, str]], results: list[str], commit: str) -> list[str]:
    """Of results/mistakes.md."""
    lines = ["# Known mistakes, and the tests that notice them", ""]
    made = f"Of commit {commit}: `python benchmarks/mistakes.py` put each mistake into a copy of the repository, where"
    lines += [made, f"its test then failed, as it should, in {results.count('noticed')} cases of {len(results)}.", ""]
    lines += ["| name | file | mistake | found in | test | outcome |", "| --- | --- | --- | --- | --- | --- |"]
    for row, result in zip(mistakes, results, strict=True):
        cells = *(row[key].replace("|", "\\|") for key in ("name", "file", "mistake", "found", "test")), result
        lines.append("| " + " | ".join(cells) + " |")
    return lines


# --- What does it cost? ---
def train(row: dict[str, str], args: Args) -> list[str]:
    """Trains both copies. Returns the lines of cost.md. Raises InputError where a run fails."""
    script = args.script or Path(row["file"]).stem
    if not (path := ROOT / "algos" / f"{script}.py").is_file():
        raise InputError(f"{row['name']} is in {row['file']}: say by --script which script of algos/ to train")
    out = args.out.absolute() / row["name"] / f"{script}__{args.dataset.strip('/').replace('/', '-')}"
    out.mkdir(parents=True, exist_ok=True)
    about = row | {"script": script, "dataset": args.dataset, "flags": args.flags}
    if (out / "about.json").exists() and json.loads((out / "about.json").read_text()) != about:
        raise InputError(f"{out} holds runs with other flags or of another mistake: choose another --out")
    (out / "about.json").write_text(json.dumps(about, indent=2))
    # data and what is fitted to them are shared, unless the mistake may be in them
    own = row["file"].startswith("common/") or "load_or_train(" in path.read_text()
    cache = {"mistake": {"OFFLINE_MBRL_CACHE": str(out / "cache")} if own else {}}
    settings = ["--dataset", args.dataset, "--num-threads", "1", *shlex.split(args.flags), "--run-dir", str(out)]
    errors = []

    def run(seed: int, copy: Path) -> None:
        name, env = f"{copy.name}-{seed}", os.environ | {"OMP_NUM_THREADS": "1"} | cache.get(copy.name, {})
        if errors or (out / name / "policy.pt").exists():
            return
        begun, trust = (out / name / "config.json").exists(), ["--trust"] * ("--trust" in settings or ":" in args.flags)
        again = ["--resume", str(out / name), *trust]  # as far as its own flags do
        flags = again if begun else [*settings, "--seed", str(seed), "--run-name", name]
        command = [sys.executable, str(copy / "algos" / f"{script}.py"), *flags]
        print(shlex.join(command), flush=True)
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        if done.returncode:
            errors.append(f"{name} failed:\n{(done.stdout + done.stderr)[-2000:]}")

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.workers) as pool:
        copies = [copy_to(Path(folder, "right")), copy_to(Path(folder, "mistake"), row)]
        list(pool.map(run, *zip(*itertools.product(range(args.seeds), copies))))
    if errors:
        raise InputError(errors[0])
    facts = [[read_folder(out / f"{kind}-{i}").facts() for i in range(args.seeds)] for kind in ("right", "mistake")]
    scores = np.array([[(f["return"], f["score"]) for f in kind] for kind in facts])
    scores = scores[..., unit := int(np.isfinite(scores).all())]  # (2, seeds); returns where no references are known
    columns, header = np.column_stack([range(args.seeds), *scores]), "seed,right,mistake"
    np.savetxt(out / "cost.csv", columns, "%.6g", delimiter=",", header=header, comments="")
    low, high = interval(difference, list(scores))
    about = f"{script}.py on {args.dataset}, {('return', 'normalised score')[unit]}, flags: {args.flags or 'none'}."
    lines = [f"# {row['name']}", "", row["mistake"], "", about, ""]
    lines += ["| seed | right | with the mistake | difference |", "| --- | --- | --- | --- |"]
    for seed, (right, wrong) in zip([*range(args.seeds), "mean"], [*scores.T, scores.mean(axis=1)]):
        lines.append(f"| {seed} | {right:.1f} | {wrong:.1f} | {right - wrong:.1f} |")
    lines += ["", f"The mistake costs {right - wrong:.1f} (95 % interval over seeds {low:.1f} to {high:.1f})."]
    (out / "cost.md").write_text("\n".join(lines) + "\n")
    return lines


# --- Exercises ---
def exercise(number: int, args: Args) -> tuple[dict[str, str], Path]:
    """Its mistake and its folder. Raises InputError where there is none of that number."""
    names = tomllib.loads(args.table.read_text())["exercises"]
    if not 1 <= number <= len(names):
        raise InputError(f"there is no exercise {number}: they are 1 to {len(names)}")
    row = next(row for row in read_table(args.table) if row["name"] == names[number - 1])
    return row, args.out.absolute() / f"exercise-{number}"


def make_exercise(number: int, args: Args) -> str:
    """The copy, with the mistake. Returns what there is to say about it."""
    row, folder = exercise(number, args)
    if folder.exists():
        raise InputError(f"{folder} is there already: go on in it, or delete it to begin again")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:  # a copy inside its own source might never end
        shutil.move(copy_to(Path(scratch, "copy"), row), folder)
    title, task = re.search(rf"(?m)^## ({number}\. .*)\n\n.*\n\n((?:.+\n)+)", EXERCISES.read_text()).groups()
    return f"{title}\n\n{task}\nIn {folder / row['file']} is the mistake. Mend it, then --check {number}."


def check(number: int, args: Args) -> str:
    """ "mended", or what is still wrong. The file is put into a fresh copy: nothing else in the folder counts."""
    row, folder = exercise(number, args)
    if not (file := folder / row["file"]).is_file():
        raise InputError(f"no {file}: make it with --exercise {number}")
    result = outcome(row | {"old": (ROOT / row["file"]).read_text(), "new": file.read_text()})
    return {"not noticed": "mended", "noticed": "not mended yet"}.get(result, f"{file} does not run: {result}")


def main(args: Args) -> int:
    """Exit status: 0 when every mistake is noticed, or the exercise is mended, else 1."""
    if args.exercise:
        print(make_exercise(args.exercise, args))
        return 0
    if args.check:
        print(result := check(args.check, args))
        return int(result != "mended")
    mistakes = read_table(args.table)
    if args.train:
        if args.train not in (names := [row["name"] for row in mistakes]):
            raise InputError(f"no mistake is called {args.train!r}: {args.table} lists them")
        print("\n".join(train(mistakes[names.index(args.train)], args)))
        return 0
    mistakes = [row for row in mistakes if any(args.only in row[key] for key in ("name", "file", "test"))]
    if not mistakes:
        raise InputError(f"no mistake whose name, file or test has {args.only!r} in it")
    commit = git("rev-parse", "--short=7", "HEAD")
    commit += "-dirty" if git("status", "--porcelain", "algos", "common", "tests", "benchmarks/mistakes.toml") else ""
    results = try_all(mistakes, args.workers)
    print(f"{results.count('noticed')} of {len(results)} mistakes are noticed by their test")
    if not args.only:
        RESULTS.write_text("\n".join(table_lines(mistakes, results, commit)) + "\n")
    return int(results.count("noticed") < len(results))


if __name__ == "__main__":
    start(main, Args)
