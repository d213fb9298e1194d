"""OfflineRL-Kit's methods and ours on halfcheetah/medium-replay, trained to the end: a figure and a table.

Theirs are the progress.csv files of benchmarks/peer.py, kept in results/peers. Ours are the bench's runs, and what
results/peers/ours has besides. Score: the mean of the last ten evaluations. Difference: of the means, theirs - ours, +-
the 95 % interval of Welch's t.
Run: python benchmarks/studies/peers.py    prints the table, draws results/peers/halfcheetah.png
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
MOST_SEEDS = 10
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


def find_ours(results: Path, name: str) -> Path:
    """The bench's run of a seed, where it has one."""
    paths = [results / folder / name for folder in OURS]
    return next((path for path in paths if path.is_file()), paths[0])


def curves(paths: list[Path], read: Callable) -> tuple[np.ndarray, np.ndarray]:
    """updates (evaluations,), scores (seeds, evaluations)"""
    if len(paths) < 2:
        raise InputError(f"an interval needs two seeds or more, there are {len(paths)}: {', '.join(map(str, paths))}")
    runs = [read(path) for path in paths]
    updates = runs[0]["update"]
    if any(not np.array_equal(updates, run["update"]) for run in runs):
        raise InputError(f"{paths[0]} and its other seeds were evaluated after different updates")
    return updates, np.array([run["normalised_score"] for run in runs])


def welch(theirs: np.ndarray, ours: np.ndarray) -> tuple[float, float]:
    """Difference of the means and half its 95 % interval: t(0.975, df) * sqrt(sum s^2 / n), df by Satterthwaite."""
    parts = np.array([x.var(ddof=1) / len(x) for x in (theirs, ours)])
    df = parts.sum() ** 2 / sum(part**2 / (len(x) - 1) for part, x in zip(parts, (theirs, ours)))
    return theirs.mean() - ours.mean(), t_quantile(0.95, df) * math.sqrt(parts.sum())


def main(args: Args) -> None:
    figure, axes = plt.subplots(1, len(METHODS), figsize=(3.5 * len(METHODS), 3), sharex=True, layout="constrained")
    rows, sources = [], []
    for axis, (method, (their_name, our_name)) in zip(axes, METHODS.items()):
        names = [(f"{their_name}.csv".format(seed=s), f"{our_name}.csv".format(seed=s)) for s in range(MOST_SEEDS)]
        their_paths = [path for name, _ in names if (path := args.results / "peers" / name).is_file()]
        our_paths = [path for _, name in names if (path := find_ours(args.results, name)).is_file()]
        updates, theirs = curves(their_paths, read_peer)
        our_updates, ours = curves(our_paths, read_ours)
        sources += [*their_paths, *our_paths]
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
        scores = [len(theirs), mean_sd(their_score), len(ours), mean_sd(our_score)]
        rows.append([method, *scores, f"{difference:.1f} ± {half:.1f}"])
    axes[0].set_ylabel("normalised score", fontsize=8)
    finish(figure, args.out, sources)
    print(table("halfcheetah/medium-replay-v0, seeds, OfflineRL-Kit, seeds, ours, difference", rows))


if __name__ == "__main__":
    start(main, Args)
