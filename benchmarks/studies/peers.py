"""OfflineRL-Kit's methods and ours on halfcheetah/medium-replay, trained to the end: a figure and two tables.

Theirs are the progress.csv files of benchmarks/peer.py, kept in results/peers. Ours are the bench's runs, and what
results/peers/ours has besides. Score: the mean of the last ten evaluations. Difference: of the means, theirs - ours, +-
the 95 % interval of Welch's t. The second table asks more seeds of TD3+BC, which ran for two thirds of the updates: all
are cut off there.
Run: python benchmarks/studies/peers.py    prints the tables, draws results/peers/halfcheetah.png
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from benchmarks.files import HomePaths, start  # noqa: E402
from benchmarks.report import RESULTS, finish, mean_sd, plt, read_csv, read_rows, table  # noqa: E402
from benchmarks.reproduce import t_quantile  # noqa: E402
from common import InputError, explained  # noqa: E402

METHODS = {  # name: its files in results/peers, ours
    "TD3+BC": ("td3bc-halfcheetah-{seed}", "halfcheetah-medium-replay-v0__td3_bc__{seed}"),
    "IQL": ("iql-halfcheetah-{seed}", "halfcheetah-medium-replay-v0__iql__{seed}"),
}
OURS = ("bench/runs", "peers/ours")
SEEDS = range(10)
MORE_SEEDS = range(10, 18)
MORE_UPDATES = 120_000
SCORE_EVALS = 10


@dataclass
class Args(HomePaths):
    results: Path = RESULTS
    out: Path = RESULTS / "peers" / "halfcheetah.png"


def read_peer(path: Path) -> dict[str, np.ndarray]:
    """The columns of a peer's csv, each (evaluations,). Raises InputError where it is damaged."""
    with explained(f"{path} cannot be read", "write it anew with benchmarks/peer.py"), open(path, newline="") as file:
        columns = read_rows(path.name, file)
        if missing := {"update", "normalised_score"} - set(columns):
            raise ValueError(f"it has no column {' or '.join(sorted(missing))}")
        return columns


def read_ours(path: Path) -> dict[str, np.ndarray]:
    return read_csv(path).columns


def find_ours(results: Path, name: str) -> Path | None:
    """The bench's run of a seed, where it has one; None where there is none at all."""
    return next((path for folder in OURS if (path := results / folder / name).is_file()), None)


def curves(paths: list[Path], read: Callable, until: float = math.inf) -> tuple[np.ndarray, np.ndarray]:
    """updates (evaluations,) up to `until`, scores (seeds, evaluations)"""
    if len(paths) < 2:
        raise InputError(f"an interval needs two seeds or more, there are {len(paths)}: {', '.join(map(str, paths))}")
    runs = [read(path) for path in paths]
    updates, *others = [run["update"][run["update"] <= until] for run in runs]
    if not all(np.array_equal(updates, other) for other in others):
        raise InputError(f"{paths[0]} and its other seeds were evaluated after different updates")
    return updates, np.array([run["normalised_score"][: len(updates)] for run in runs])


def both(results: Path, method: str, seeds: range, until: float = math.inf):
    """updates, their scores, our scores as of `curves`; the csv files"""
    names = [[f"{name}.csv".format(seed=seed) for seed in seeds] for name in METHODS[method]]
    their_paths = [path for name in names[0] if (path := results / "peers" / name).is_file()]
    our_paths = [path for name in names[1] if (path := find_ours(results, name))]
    (updates, theirs), (our_updates, ours) = curves(their_paths, read_peer, until), curves(our_paths, read_ours, until)
    if not np.array_equal(updates, our_updates):
        raise InputError(f"{method}: theirs and ours were evaluated after different updates")
    return updates, theirs, ours, [*their_paths, *our_paths]


def table_row(name: str, theirs: np.ndarray, ours: np.ndarray) -> list:
    scores = [curve[:, -SCORE_EVALS:].mean(axis=1) for curve in (theirs, ours)]
    difference, half = welch(*scores)
    numbers = [cell for score in scores for cell in (len(score), mean_sd(score))]
    return [name, *numbers, f"{difference:.1f} ± {half:.1f}"]


def welch(theirs: np.ndarray, ours: np.ndarray) -> tuple[float, float]:
    """Difference of the means and half its 95 % interval: t(0.975, df) * sqrt(sum s^2 / n), df by Satterthwaite."""
    parts = np.array([x.var(ddof=1) / len(x) for x in (theirs, ours)])
    df = parts.sum() ** 2 / sum(part**2 / (len(x) - 1) for part, x in zip(parts, (theirs, ours)))
    return theirs.mean() - ours.mean(), t_quantile(0.95, df) * math.sqrt(parts.sum())


def main(args: Args) -> None:
    figure, axes = plt.subplots(1, len(METHODS), figsize=(3.5 * len(METHODS), 3), sharex=True, layout="constrained")
    rows, sources = [], []
    for axis, method in zip(axes, METHODS):
        updates, theirs, ours, paths = both(args.results, method, SEEDS)
        sources += paths
        for label, scores, color in (("OfflineRL-Kit", theirs, "tab:orange"), ("ours", ours, "tab:blue")):
            axis.plot(updates, scores.T, color=color, linewidth=0.5, alpha=0.6)
            axis.plot(updates, scores.mean(axis=0), color=color, linewidth=2, label=label)
        axis.set_title(method, fontsize=9)
        axis.set_xlabel("updates; thick: the mean of the seeds", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.locator_params(axis="x", nbins=4)
        rows.append(table_row(method, theirs, ours))
    axes[0].set_ylabel("normalised score", fontsize=8)
    finish(figure, args.out, sources)
    parts = [both(args.results, "TD3+BC", seeds, MORE_UPDATES)[1:3] for seeds in (SEEDS, MORE_SEEDS)]
    parts.append([np.concatenate(scores) for scores in zip(*parts)])
    names = [f"{seeds[0]} to {seeds[-1]}" for seeds in (SEEDS, MORE_SEEDS)] + ["all"]
    more = [table_row(name, *scores) for name, scores in zip(names, parts)]
    columns = ["runs", "OfflineRL-Kit", "runs", "ours", "difference"]
    print(table(["halfcheetah/medium-replay-v0", *columns], rows), end="\n\n")
    print(table([f"TD3+BC after {MORE_UPDATES:,} updates, seeds", *columns], more))


if __name__ == "__main__":
    start(main, Args)
