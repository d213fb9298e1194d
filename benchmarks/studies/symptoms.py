"""What a sick run looks like in its log, beside a healthy one: the pictures of algos/README.md.

A critic that runs away, a penalty larger than the reward, a policy that stands still. The first two come from the runs
of benchmarks/grids/bench-pilot.toml, whose evaluations stand in benchmarks/results/symptoms.csv; the healthy half of
the second and the third are runs of benchmarks/results/mopo-penalty. Nothing is trained.
Run: python benchmarks/studies/symptoms.py        draws symptoms-*.png from the csv files
     python benchmarks/studies/symptoms.py --runs runs/bench-pilot        writes symptoms.csv anew before
"""

import csv
import io
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks.files import HomePaths, start, write_text  # noqa: E402
from benchmarks.film import run_folders  # noqa: E402
from benchmarks.report import RESULTS, finish, plt, read_csv  # noqa: E402
from common import InputError  # noqa: E402
from common.dataset import load_dataset  # noqa: E402

CELLS = [  # dataset, script: what is drawn of the pilot
    ("pendulum/narrow-v0", "mopo"), ("pendulum/narrow-v0", "td3_bc"), ("pendulum/random-v0", "mopo"),
    ("pendulum/random-v0", "cql"), ("halfcheetah/medium-replay-v0", "mopo"),
]  # fmt: skip
FACTS = ("q", "penalty_mean", "return_mean", "normalised_score")
COLUMNS = ("dataset", "script", "seed", "update", *FACTS, "reward_size")
OLD_LAMBDA = 0.5  # of the recorded HalfCheetah runs, whose column penalty_mean is u: lambda comes on top


@dataclass
class Args(HomePaths):
    runs: Path | None = None  # folder of the pilot's run folders; without it the csv stays as it is
    results: Path = RESULTS  # where the csv files are
    out_dir: Path = RESULTS  # where symptoms-*.png are written


# --- The csv ---
def import_runs(folder: Path) -> str:
    """Text of symptoms.csv: an evaluation a row. reward_size is the mean of |r| in the data."""
    rows, sizes = [], {}
    for path in run_folders((folder,)):
        config = json.loads((path / "config.json").read_text())
        dataset, script, seed = config["args"]["dataset"], config["algo"], config["args"]["seed"]
        if (dataset, script) not in CELLS:
            continue
        if dataset not in sizes:
            sizes[dataset] = load_dataset(dataset, torch.device("cpu")).reward.abs().mean().item()
        with open(path / "progress.csv", newline="") as file:
            for row in csv.DictReader(file):
                facts = [f"{float(row[name]):.5g}" if name in row else "" for name in FACTS]
                rows.append([dataset, script, seed, row["update"], *facts, f"{sizes[dataset]:.4g}"])
    if missing := sorted(set(CELLS) - {(row[0], row[1]) for row in rows}):
        names = ", ".join(f"{script} on {dataset}" for dataset, script in missing)
        raise InputError(f"{folder} has no run of {names}: name the folder of the grid bench-pilot")
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([COLUMNS, *sorted(rows, key=lambda row: [*row[:3], int(row[3])])])
    return text.getvalue()


def read_symptoms(path: Path) -> dict[tuple[str, str], dict[int, dict[str, np.ndarray]]]:
    """(dataset, script) -> seed -> column -> (evaluations,)"""
    if not path.is_file():
        raise InputError(f"{path} is not there: make it with --runs, the folder of the grid bench-pilot")
    cells = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            seeds = cells.setdefault((row["dataset"], row["script"]), {})
            columns = seeds.setdefault(int(row["seed"]), {name: [] for name in COLUMNS[3:]})
            for name, values in columns.items():
                values.append(float(row[name] or "nan"))
    for columns in (columns for seeds in cells.values() for columns in seeds.values()):
        columns |= {name: np.array(values) for name, values in columns.items()}
    return cells


def recorded(folder: Path, dataset: str, variant: str = "") -> list:
    """MOPO's runs on it, as benchmarks/report.py reads them."""
    name = f"{dataset.replace('/', '-')}__mopo__{re.escape(variant + '__' * bool(variant))}\\d+\\.csv"
    paths = sorted(path for path in folder.glob("*.csv") if re.fullmatch(name, path.name))
    if not paths:
        raise InputError(f"{folder} has no run of mopo on {dataset}: name the folder with --results")
    return [read_csv(path) for path in paths]


# --- Figures ---
SICK, HEALTHY, LAW = "tab:red", "tab:blue", "black"


def lines(axis: plt.Axes, runs: list[tuple], label: str, color: str, style: str = "-") -> None:
    """runs: (updates, values) of each seed; one entry in the legend."""
    for i, (update, values) in enumerate(runs):
        name = {"label": label} if i == 0 else {}
        axis.plot(update / 1_000, values, color=color, linestyle=style, linewidth=1.3, alpha=0.9, **name)


def finish_tall(figure: plt.Figure, path: Path, sources: list[Path]) -> None:
    for axis in figure.axes:
        axis.set_xlim(0, None)
    finish(figure, path, sources, legend_columns=1, dpi=100)


def draw_critic(cells: dict, path: Path, sources: list[Path]) -> None:
    """Left a set on which critics run away, right one on which they do not; above Q, below the score."""
    figure, axes = plt.subplots(2, 2, figsize=(4.5, 5), sharey="row", layout="constrained")
    for column, dataset in enumerate(("pendulum/narrow-v0", "pendulum/random-v0")):
        for script, name in (("td3_bc", "TD3+BC"), ("mopo", "MOPO"), ("cql", "CQL")):
            style = {"td3_bc": "--", "mopo": "-", "cql": ":"}[script]
            for seed in cells.get((dataset, script), {}).values():
                runaway = seed["q"].max() > 0  # no reward is above 0
                color, what = (SICK, "runs away") if runaway else (HEALTHY, "stays below 0")
                for axis, fact in zip(axes[:, column], ("q", "normalised_score")):
                    lines(axis, [(seed["update"], seed[fact])], f"{name}: {what}", color, style)
        axes[0, column].axhline(0, color=LAW, linewidth=1, label="the most that rewards allow" if column else None)
        axes[0, column].set_title(dataset, fontsize="medium")
        axes[1, column].set_xlabel("thousand updates")
    axes[0, 0].set_yscale("symlog", linthresh=100)
    axes[0, 0].set_yticks([-100, 0, 100, 1_000, 10_000], ["-100", "0", "100", "1,000", "10,000"])
    axes[0, 0].set_ylabel("q")
    axes[1, 0].set_ylabel("normalised_score")
    finish_tall(figure, path, sources)


def draw_penalty(cells: dict, healthy: list, path: Path, sources: list[Path]) -> None:
    """The penalty of a step beside the size of a reward, and what becomes of the policy."""
    figure, axes = plt.subplots(2, 1, figsize=(4.5, 5), sharex=True, layout="constrained")
    sick = list(cells["halfcheetah/medium-replay-v0", "mopo"].values())
    old = [run.columns for run in healthy]
    for axis, fact in zip(axes, ("penalty_mean", "return_mean")):
        scale = OLD_LAMBDA if fact == "penalty_mean" else 1.0
        lines(axis, [(seed["update"], seed[fact]) for seed in sick], "lambda 1", SICK)
        lines(axis, [(run["update"], scale * run[fact]) for run in old], "lambda 0.5", HEALTHY)
    axes[0].axhline(sick[0]["reward_size"][0], color=LAW, linestyle="--", label="mean size of a reward in the data")
    axes[0].set(ylabel="penalty_mean", ylim=(0, None))
    axes[0].set_title("MOPO on halfcheetah/medium-replay-v0", fontsize="medium")
    axes[1].axhline(0, color=LAW, linestyle=":", label="standing still")
    axes[1].set(ylabel="return_mean", xlabel="thousand updates")
    finish_tall(figure, path, sources)


def draw_standstill(without: list, healthy: list, path: Path, sources: list[Path]) -> None:
    """Above the runs that end running, below those that stand."""
    figure, axes = plt.subplots(2, 1, figsize=(4.5, 5), sharex=True, sharey=True, layout="constrained")
    for axis, runs, label, color in zip(axes, (healthy, without), ("lambda 2.5", "lambda 0"), (HEALTHY, SICK)):
        lines(axis, [(run.columns["update"], run.columns["return_mean"]) for run in runs], label, color)
        axis.axhline(1_000, color=LAW, linestyle=":", label="standing still for 1,000 steps")
        axis.set_ylabel("return_mean")
    axes[0].set_title("MOPO on hopper/medium-replay-v0", fontsize="medium")
    axes[1].set_xlabel("thousand updates")
    finish_tall(figure, path, sources)


def figures(results: Path) -> dict[str, tuple]:
    """Name -> function, its data and the csv files that they stand in."""
    table, runs = results / "symptoms.csv", results / "mopo-penalty" / "runs"
    cells = read_symptoms(table)
    cheetah = recorded(runs, "halfcheetah/medium-replay-v0")
    hopper = [recorded(runs, "hopper/medium-replay-v0", variant) for variant in ("penalty-coef=0", "")]
    return {
        "symptoms-critic.png": (draw_critic, (cells,), [table]),
        "symptoms-penalty.png": (draw_penalty, (cells, cheetah), [table, *(run.path for run in cheetah)]),
        "symptoms-standstill.png": (draw_standstill, hopper, [run.path for run in sum(hopper, [])]),
    }


def main(args: Args) -> None:
    if args.runs:
        write_text(args.results / "symptoms.csv", import_runs(args.runs))
    for name, (draw, data, sources) in figures(args.results).items():
        draw(*data, args.out_dir / name, sources)
        print(f"figure      {args.out_dir / name}")


if __name__ == "__main__":
    start(main, Args)
