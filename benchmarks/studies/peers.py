"""OfflineRL-Kit's methods and ours on halfcheetah/medium-replay, trained to the end: a figure and a table.

Theirs are the progress.csv files of benchmarks/peer.py, kept in results/peers. Ours are the bench's runs, and what
results/peers/ours has besides. Score: the mean of the last ten evaluations. Difference: of the means, theirs - ours, +-
the 95 % interval of Welch's t.
Run: python benchmarks/studies/peers.py    prints the table, draws results/peers/halfcheetah.png
"""

import csv
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from benchmarks.files import HomePaths, start  # noqa: E402
from benchmarks.report import RESULTS, finish, mean_sd, plt, read_csv, table  # noqa: E402
from benchmarks.reproduce import t_quantile  # noqa: E402
from common import InputError  # noqa: E402

METHODS = {  # name: its files in results/peers, ours
    "TD3+BC": ("td3bc-halfcheetah-{seed}", "td3_bc__{seed}"),
    "IQL": ("iql-halfcheetah-{seed}", "iql__{seed}"),
}
OURS = ("bench/runs", "peers/ours")
MOST_SEEDS = 10
SCORE_EVALS = 10


@dataclass
class Args(HomePaths):
    results: Path = RESULTS
    out: Path = RESULTS / "peers" / "halfcheetah.png"


def read_peer(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """updates and normalised scores: (evaluations,)"""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    return tuple(np.array([float(row[name]) for row in rows]) for name in ("update", "normalised_score"))


def read_ours(path: Path) -> tuple[np.ndarray, np.ndarray]:
    columns = read_csv(path).columns
    return columns["update"], columns["normalised_score"]


def find_ours(results: Path, name: str) -> Path:
    """The bench's run of a seed, where it has one."""
    paths = [results / folder / name for folder in OURS]
    return next((path for path in paths if path.is_file()), paths[0])


def curves(paths: list[Path], read) -> tuple[np.ndarray, np.ndarray]:
    """updates (evaluations,), scores (seeds, evaluations) of the files that exist"""
    runs = [read(path) for path in paths if path.is_file()]
    if len(runs) < 2:
        raise InputError(f"{len(runs)} of {paths[0]} and its other seeds: an interval needs two or more")
    updates = runs[0][0]
    if any(not np.array_equal(updates, other) for other, _ in runs):
        raise InputError(f"{paths[0]} and its other seeds were evaluated after different updates")
    return updates, np.array([scores for _, scores in runs])


def welch(theirs: np.ndarray, ours: np.ndarray) -> tuple[float, float]:
    """Difference of the means and half its 95 % interval: t(0.975, df) * sqrt(sum s^2 / n), df by Satterthwaite."""
    parts = np.array([x.var(ddof=1) / len(x) for x in (theirs, ours)])
    df = parts.sum() ** 2 / sum(part**2 / (len(x) - 1) for part, x in zip(parts, (theirs, ours)))
    return theirs.mean() - ours.mean(), t_quantile(0.95, df) * math.sqrt(parts.sum())


def main(args: Args) -> None:
    figure, axes = plt.subplots(1, len(METHODS), figsize=(3.5 * len(METHODS), 3), sharex=True, layout="constrained")
    rows = []
    for axis, (method, (their_name, our_name)) in zip(axes, METHODS.items()):
        seeds = range(MOST_SEEDS)
        paths = [args.results / "peers" / f"{their_name.format(seed=seed)}.csv" for seed in seeds]
        updates, theirs = curves(paths, read_peer)
        paths = [find_ours(args.results, f"halfcheetah-medium-replay-v0__{our_name.format(seed=s)}.csv") for s in seeds]
        our_updates, ours = curves(paths, read_ours)
        if not np.array_equal(updates, our_updates):
            raise InputError(f"{method}: theirs and ours were evaluated after different updates")
        for label, scores, color in (("OfflineRL-Kit", theirs, "tab:orange"), ("ours", ours, "tab:blue")):
            axis.plot(updates, scores.T, color=color, linewidth=0.5, alpha=0.6)
            axis.plot(updates, scores.mean(axis=0), color=color, linewidth=2, label=label)
        axis.set_title(method, fontsize=9)
        axis.set_xlabel("updates; thick: the mean of the seeds", fontsize=8)
        axis.tick_params(labelsize=7)
        axis.locator_params(axis="x", nbins=4)
        their_score, our_score = (scores[:, -SCORE_EVALS:].mean(axis=1) for scores in (theirs, ours))
        difference, half = welch(their_score, our_score)
        row = [method, len(theirs), mean_sd(their_score), len(ours), mean_sd(our_score)]
        rows.append([*map(str, row), f"{difference:.1f} ± {half:.1f}"])
    axes[0].set_ylabel("normalised score", fontsize=8)
    finish(figure, args.out)
    print(table("halfcheetah/medium-replay-v0, seeds, OfflineRL-Kit, seeds, ours, difference", rows))


if __name__ == "__main__":
    start(main, Args)
