"""Run folders -> one small csv per run, a table of scores, and a figure of return against updates.

The score of a run is the mean of its last evaluations (--score-evals of the run), never its best.
Run: python benchmarks/summarise.py --name pendulum-random --runs runs/a runs/b runs/c
"""

import csv
import json
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common.dataset import InputError, OfflineDataset, load_dataset  # noqa: E402

RESULTS = Path(__file__).parent / "results"


@dataclass
class Args:
    name: str  # of the csv files and the figure
    runs: list[Path]  # run folders of one dataset, one per seed
    machine: str = f"{os.cpu_count()} cores, {platform.machine()}"  # for the record


def read_run(run: Path) -> tuple[dict, list[dict]]:
    """A run's config and its evaluations."""
    try:
        config = json.loads((run / "config.json").read_text())
        with open(run / "progress.csv", newline="") as file:
            return config, [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    except OSError as error:
        raise InputError(f"{run} is no run folder with evaluations: {error.strerror} {error.filename}") from None


def write_csv(path: Path, config: dict, rows: list[dict], machine: str) -> None:
    """Every evaluation, under a first line that tells how the run was made."""
    about = {name: config[name] for name in ("command", "commit", "versions", "python")} | {"machine": machine}
    with open(path, "w", newline="") as file:
        file.write(f"# {json.dumps(about)}\n")
        table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows({name: f"{value:.6g}" for name, value in row.items()} for row in rows)


def draw(path: Path, runs: list[tuple[dict, list[dict]]], data: OfflineDataset) -> None:
    """Mean over seeds with the range of the seeds, and the data's mean as a line."""
    updates = [row["update"] for row in runs[0][1]]
    returns = np.array([[row["return_mean"] for row in rows] for _, rows in runs])  # (seeds, evaluations)
    figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
    axis.fill_between(updates, returns.min(axis=0), returns.max(axis=0), alpha=0.25, linewidth=0)
    axis.plot(updates, returns.mean(axis=0), label=f"{runs[0][0]['algo'].upper()}, {len(runs)} seeds (mean and range)")
    axis.axhline(data.episode_returns.mean(), color="black", linestyle="--", label="the data's mean")
    axis.set(xlabel="updates", ylabel="return in the real environment", title=data.name)
    axis.legend(loc="center right")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def main(args: Args) -> None:
    runs = [read_run(run) for run in args.runs]
    data = load_dataset(runs[0][0]["args"]["dataset"])
    if {config["data_hash"] for config, _ in runs} != {data.data_hash}:
        raise InputError("the runs were made on other data than the first one's: summarise one dataset at a time")
    RESULTS.mkdir(exist_ok=True)
    print("| run | seed | updates | score | normalised | minutes |\n| --- | --- | --- | --- | --- | --- |")
    scores = []
    for config, rows in runs:
        settings = config["args"]
        write_csv(RESULTS / f"{args.name}__{config['algo']}__{settings['seed']}.csv", config, rows, args.machine)
        scores.append(np.mean([row["return_mean"] for row in rows[-settings["score_evals"] :]]))
        print(
            f"| {config['algo']} | {settings['seed']} | {rows[-1]['update']:,.0f} | {scores[-1]:.1f} | "
            f"{data.normalised_score(scores[-1]):.1f} | {rows[-1]['seconds'] / 60:.1f} |"
        )
    mean, spread = np.mean(scores), np.std(scores, ddof=1) if len(scores) > 1 else np.nan
    normalised = data.normalised_score(mean)
    print(f"| mean ± standard deviation | {len(runs)} seeds | | {mean:.1f} ± {spread:.1f} | {normalised:.1f} | |")
    draw(RESULTS / f"{args.name}.png", runs, data)


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except InputError as error:
        sys.exit(f"error: {error}")
