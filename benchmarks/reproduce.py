"""Does a cell of the bench come out again? One more seed of it is trained as the grid did, and judged.

The score of a new seed should lie in the prediction interval that the grid's n seeds leave for one more,

    mean +- t(0.975, n) * s * sqrt(1 + 1/n),    s^2 = ((n - 1) * own + other) / n

`own` is the variance of these seeds and `other` the median of the variances of all methods on the set, which counts
as one seed: two to five seeds tell little of their own spread, and a mean over all methods would be that of the most
erratic one. From two, three and four of the five seeds in results/default it holds 92, 92 and 95 % of the others. So
about one right run in fifteen is called wrong. Exit status 0: inside; 1: outside.
Run: python benchmarks/reproduce.py pendulum/spin mopo
     python benchmarks/reproduce.py pendulum/random mopo --smoke    # with the script's own settings: half a minute
     python benchmarks/reproduce.py pendulum/random mopo --code runs/mistakes/exercise-3    # another checkout's script
"""

import math
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks import grid  # noqa: E402
from benchmarks.files import HomePaths, start  # noqa: E402
from benchmarks.report import RESULTS, Cell, read_cells, read_folder, source_hash  # noqa: E402
from common import InputError  # noqa: E402
from common.dataset import load_dataset  # noqa: E402


@dataclass
class Args(HomePaths):
    dataset: tyro.conf.Positional[str]  # pendulum/spin or pendulum/spin-v0
    method: tyro.conf.Positional[str]  # a script's name
    seed: int = 1_000  # none of the grid's
    smoke: bool = False  # against results/default, which every script reaches in seconds, on pendulum/random alone
    code: Path = ROOT  # checkout whose script is trained
    run_dir: Path = Path("runs")  # the run goes to reproduce/ in it, and is gone on with when it was stopped


def t_quantile(share: float, df: int) -> float:
    """The t with P(|T| < t) = share for Student's T: t = sqrt(df) tan(angle), whose density is cos(angle)^(df - 1)."""
    angle = np.linspace(0, math.pi / 2, 100_001)
    mass = np.cumsum(np.cos(angle) ** (df - 1))
    return math.sqrt(df) * math.tan(angle[np.searchsorted(mass, share * mass[-1])])


def prediction_interval(scores: np.ndarray, variances: list[float]) -> tuple[float, float]:
    """scores: (n,) of the cell, n > 1; variances: of the set's methods. Returns (low, high) for one more seed."""
    n = len(scores)
    s2 = ((n - 1) * scores.var(ddof=1) + np.median(variances)) / n
    half = t_quantile(0.95, n) * math.sqrt(s2 * (1 + 1 / n))
    return scores.mean() - half, scores.mean() + half


def find_cells(args: Args, dataset: str, run: grid.Run) -> tuple[Cell, list[float]]:
    """The one to be reproduced, and the variances of all methods on its set."""
    folder = RESULTS / ("default" if args.smoke else "bench") / "runs"
    cells = [cell for cell in read_cells(folder, set()) if cell.dataset == dataset and not cell.variant]
    cell = next((cell for cell in cells if cell.algo == args.method), None)
    num = len(cell.runs) if cell else 0
    if num < 2:
        raise InputError(f"{args.method} has {num} seeds on {dataset} in {folder}: an interval needs two or more")
    for name, value in cell.runs[0].about.get("settings", {}).items():
        if run.settings.get(name, value) != value:
            raise InputError(f"{folder} was made with {name} {value}, the grid says {run.settings[name]}: run it again")
    return cell, [c.facts["score"].var(ddof=1) for c in cells if len(c.runs) > 1 and c.protocol == cell.protocol]


def check_data(cell: Cell) -> None:
    """Raises InputError where the set is another recording here than the grid's seeds had."""
    here, theirs = load_dataset(cell.dataset, trust=True).data_hash, cell.runs[0].about["data_hash"]
    if here != theirs:
        raise InputError(
            f"{cell.dataset} has the hash {here} here, the grid's seeds had {theirs}: on other data they tell nothing; "
            "which processors record the same replay, and how: benchmarks/results/data.md"
        )


def planned_run(args: Args, dataset: str) -> grid.Run:
    """The grid's run of that cell, but for seed and folder."""
    file = ROOT / "benchmarks" / "grids" / ("default.toml" if args.smoke else "bench.toml")
    settings = grid.Args(grid=str(file), run_dir=str(args.run_dir), name="reproduce")
    name, blocks = grid.read_grid(settings)
    blocks = [{key: value if isinstance(value, list) else [value] for key, value in block.items()} for block in blocks]
    cell = [block for block in blocks if args.method in block["script"] and dataset in block["dataset"]]
    if not cell:
        scripts, sets = (sorted({name for block in blocks for name in block[key]}) for key in ("script", "dataset"))
        known = f"its methods are {', '.join(scripts)}; its sets {', '.join(sets)}"
        raise InputError(f"{file.name} has no {args.method} on {dataset}: {known}")
    if args.seed in cell[0]["seed"]:
        raise InputError(f"--seed {args.seed} is one of the grid's: a reproduction needs another")
    block = {key: value[0] for key, value in cell[0].items()}
    block |= {"script": args.method, "dataset": dataset, "seed": args.seed}
    (run,) = grid.make_runs(name, [block], settings)
    run.folder = run.folder.with_name(f"{digest(args.code)}__{run.folder.name}")
    return run


def digest(code: Path) -> str:
    """Of what decides a run: edited code begins a folder of its own."""
    files = sorted(file for part in ("algos", "common") for file in (code / part).glob("*.py"))
    return source_hash(files)[:8]


def train(run: grid.Run, code: Path) -> None:
    if run.state() == "finished":
        return
    command = run.command(1)
    command[:2] = [sys.executable, str(code / "algos" / f"{run.script}.py")]
    print(shlex.join(command), flush=True)
    if subprocess.run(command).returncode:
        raise InputError(f"the run did not end: the same command goes on with {run.folder}")


def main(args: Args) -> int:
    """Exit status: 0 where the score lies in the interval, else 1."""
    dataset = args.dataset if args.dataset.endswith("-v0") else f"{args.dataset}-v0"
    if not (script := args.code / "algos" / f"{args.method}.py").is_file():
        raise InputError(f"there is no {script}: name a script of algos/")
    run = planned_run(args, dataset)
    cell, variances = find_cells(args, dataset, run)
    check_data(cell)
    train(run, args.code)
    score = read_folder(run.folder).facts()["score"]
    scores = cell.facts["score"]
    low, high = prediction_interval(scores, variances)
    verdict = "inside" if low <= score <= high else "OUTSIDE"
    spread = f"{len(scores)} seeds {scores.mean():.1f} ± {scores.std(ddof=1):.1f}"
    told = f"{verdict}; {spread}, interval of one more {low:.1f} to {high:.1f}"
    print(f"{args.method} on {dataset}, seed {args.seed}: {score:.1f}, {told}")
    return int(verdict != "inside")


if __name__ == "__main__":
    start(main, Args)
