"""Run folders -> one small csv per run -> tables with intervals, learning curves, the README's scores.

The score of a run is the mean of its last evaluations (--score-evals of the run), never its best. What is said over
several datasets follows Agarwal et al. 2021 (arXiv:2108.13264); their package rliable would bring 300 MB of others.
Run: python benchmarks/report.py runs/demo --out my-report/runs --out-dir my-report    a report of its own
     python benchmarks/report.py runs/demo    added to the results that are kept here, and to the README's table
     python benchmarks/report.py --compare mopo "mopo penalty-coef=0"    two methods of the report, printed
"""

import csv
import hashlib
import importlib
import io
import itertools
import json
import re
import shlex
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
import tyro

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.grid import as_json  # noqa: E402
from common import InputError  # noqa: E402
from common.dataset import load_dataset  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
NUM_DRAWS = 10_000  # of a bootstrap
NO_SETTINGS = {  # what seeds of one cell may differ in
    "seed", "dataset", "run_dir", "run_name", "resume", "num_threads", "device", "dynamics", "compile",
    "checkpoint_interval",
}  # fmt: skip
MOST_PAIRED = 6  # methods: with more of them, pairs stand in a matrix and without intervals
COMPARED = [  # methods that a grid was made to compare, and on which datasets
    (
        ("mopo", "mopo penalty-coef=0"),  # benchmarks/grids/mopo-penalty.toml
        ("halfcheetah/medium-replay-v0", "hopper/medium-replay-v0", "hopper/medium-v0", "walker2d/medium-replay-v0"),
    ),
]
DISPLACED = ("forced_actions", "step", "return_mean", "episodes", "distance")
DATA_FILES = (".hdf5", ".h5", ".npz")
LEGEND = """\
- **score**: mean of a run's last evaluations (**last** says of how many), normalised as in D4RL (0 = random policy,
  100 = expert); **return**: the same, not normalised. Mean ± standard deviation over seeds.
- **best**: mean over seeds of each run's best evaluation, normalised and as return. Nobody without the real environment
  can choose it; it stands here to show what choosing it would have claimed.
- **data**: mean of the data's own episodes, normalised and as return.
- **minutes**: from start to end, the fit of the ensemble included where none was cached. **updates/s**: median over a
  run's evaluations, mean over seeds. **GB**: largest peak memory of a run. **-**: not measured."""
OVERALL = f"""\
Method by method, on the same datasets. IQM: interquartile mean, the mean of the middle half of all runs' scores,
every dataset with the same weight. In brackets: 95 % intervals, from {NUM_DRAWS:,} bootstrap draws of the seeds within
each dataset; they are too narrow where there are fewer than about five seeds, and absent where a dataset has one.
P(A > B): how probable it is that a run of A scores higher than one of B on the same dataset, mean over datasets."""

DISPLACEMENT = """\
`python benchmarks/displace.py`: the final policy's return when 0, 5, 10 and 15 random actions are forced on it half-way
through its median episode, at the step that is named; how many of ten episodes are left after none and after 15; and
how far from the data the 50 steps that follow are in those that are left, in standard deviations.
"""
CURVES = """\
Seconds are the median over seeds, from the start, the fit of the ensemble included where none was cached.
"""


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]] = ()  # run folders, or folders of run folders
    out: Path = RESULTS / "runs"  # where the csv files of runs are
    out_dir: Path = RESULTS  # where report and figures are written
    readme: Path | None = None  # whose table of scores to replace; README.md where the two above are left alone
    partial: bool = False  # take runs that are not finished, too
    compare: tuple[str, str] | None = None  # two methods by their names in the report: print what lies between them
    datasets: tuple[str, ...] = ()  # to compare them on; by default all that both were run on


@dataclass
class Run:
    path: Path  # its folder or its csv
    about: dict  # the first line of its csv
    columns: dict[str, np.ndarray]  # of progress.csv, each (num_evaluations,)

    def facts(self) -> dict[str, float]:
        """What is averaged over seeds, nan where it is not known."""
        scores, returns = self.columns["normalised_score"], self.columns["return_mean"]
        last, data_return = slice(-self.about["score_evals"], None), np.float64(self.about["behaviour"])
        low, high = self.about["ref_scores"] or (np.nan, np.nan)
        facts = {"score": scores[last].mean(), "return": returns[last].mean()}
        facts |= {"best_score": scores.max(), "best_return": returns.max()}
        facts |= {"data_score": 100 * (data_return - low) / (high - low), "data_return": data_return}
        facts |= {"minutes": self.columns["seconds"][-1] / 60}
        facts |= {"updates_per_second": np.median(self.columns["updates_per_second"])}
        return facts | {"peak_memory_gb": np.float64(self.about["peak_memory_gb"])}


# --- Import: run folder -> csv ---
def read_rows(lines: Iterable[str]) -> dict[str, np.ndarray]:
    rows = list(csv.DictReader(lines))
    return {name: np.array([float(row[name]) for row in rows]) for name in (rows[0] if rows else ())}


def variant_of(folder: Path, algo: str, seed: int) -> str:
    """Of <dataset>__<algo>__<variant>__<seed>, as a grid names its runs; other names tell no variant."""
    name = re.search(rf"__{algo}__(?:(.*)__)?{seed}$", folder.resolve().name)
    return (name and name[1]) or ""


def read_folder(folder: Path) -> Run:
    """A run as it left its folder; one that was stopped before its first evaluation has no columns."""
    try:
        config = json.loads((folder / "config.json").read_text())
        progress, resources, args = folder / "progress.csv", folder / "resources.json", config["args"]
        columns = read_rows(progress.read_text().splitlines()) if progress.exists() else {}
        about = {"command": public_command(config), "hardware": config.get("hardware", "unknown")}
        about |= {what: config[what] for what in ("commit", "versions", "python", "algo", "data_hash")}
        about |= {"dataset": without_folder(args["dataset"])}
        about |= {"variant": variant_of(folder, config["algo"], args["seed"])}
        about |= {what: args[what] for what in ("seed", "num_updates", "score_evals")}
        about["settings"] = {name: value for name, value in args.items() if name not in NO_SETTINGS}
        memory = json.loads(resources.read_text())["peak_memory_gb"] if resources.exists() else None
        if (displaced := folder / "displaced.csv").exists():
            rows = read_rows(displaced.read_text().splitlines())
            about["displaced"] = {name: [float(f"{v:.6g}") for v in rows[name]] for name in DISPLACED}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder} holds no readable run ({error!r}): remove it, or run it again") from None
    data = load_data(args["dataset"], args.get("env_id") or None)
    if data and data[0] != about["data_hash"]:
        print(f"note: {args['dataset']} is not what {folder} was run on: its mean is left out", file=sys.stderr)
        data = None
    about["behaviour"] = float(f"{data[1]:.6g}") if data else None
    about["ref_scores"] = data[2] if data else None
    return Run(folder, about | {"peak_memory_gb": memory}, columns)


@cache
def load_data(name: str, env_id: str | None) -> tuple[str, float, tuple | None] | None:
    """Hash, mean return and reference scores; the rows themselves may be gigabytes."""
    try:
        data = load_dataset(name, "cpu", env_id)
        return data.data_hash, float(data.episode_returns.mean()), data.ref_scores
    except InputError as error:
        print(f"note: the mean of {name} is left out ({error})", file=sys.stderr)
        return None


def without_folder(text: str) -> str:
    """Of a file, or of a path that only one machine has, the name."""
    return Path(text).name if text.startswith(("/", "~", "./", "../")) or Path(text).suffix in DATA_FILES else text


def public_command(config: dict) -> str:
    """The run's command without what only one machine knows: where runs are kept, the folders of files.

    A resumed run was told its settings by its folder: those that are no defaults are put in.
    """
    flags = list(itertools.dropwhile(lambda word: not word.endswith(".py"), shlex.split(config["command"])))[1:]
    if any(flag.startswith("--resume") for flag in flags):
        module, flags = importlib.import_module(f"algos.{config['algo']}"), []
        defaults, tuned = as_json(module.Args()), {name for settings in module.TUNED.values() for name in settings}
        for name, value in config["args"].items():
            if value != defaults.get(name) or name in tuned:
                flag = name.replace("_", "-")
                if type(value) is list:
                    flags += [f"--{flag}", *map(str, value)]
                else:
                    flags.append(f"--{'' if value else 'no-'}{flag}" if type(value) is bool else f"--{flag}={value}")
    public, flags = ["python", f"algos/{config['algo']}.py"], iter(flags)
    for flag in flags:
        name, equals, value = flag.partition("=") if flag.startswith("--") else ("", "", flag)
        if name.replace("_", "-") not in ("--run-dir", "--run-name", "--resume"):
            public.append(name + equals + without_folder(value))
        elif not equals:
            next(flags, None)
    return shlex.join(public)


def in_common(run: Run) -> dict:
    """What the seeds of one cell must have in common."""
    settings = dict(run.about.get("settings", {}))  # older ones tell none
    if "hidden_layers" in settings:  # of 256 units, recorded before there were --hidden-sizes
        settings["hidden_sizes"] = [256] * settings.pop("hidden_layers")
    return {name: run.about[name] for name in ("data_hash", "num_updates", "score_evals")} | settings


def differences(one: Run, other: Run) -> list[str]:
    """Names of what they should have in common and have not, as far as both tell."""
    one, other = in_common(one), in_common(other)
    return sorted(name for name in one.keys() & other.keys() if one[name] != other[name])


def continues(run: Run, kept: Run) -> bool:
    """Whether its evaluations begin with those of `kept`, whose csv has six digits; how long they took may differ."""
    num = len(kept.columns["update"])
    names = (run.columns.keys() & kept.columns.keys()) - {"seconds", "updates_per_second"}
    return num <= len(run.columns["update"]) and all(
        np.allclose(run.columns[name][:num], kept.columns[name], rtol=1e-5, atol=1e-300, equal_nan=True)
        for name in names
    )


def csv_path(folder: Path, run: Run) -> Path:
    dataset, algo, variant, seed = (run.about[name] for name in ("dataset", "algo", "variant", "seed"))
    return folder / f"{'__'.join(filter(None, (dataset.replace('/', '-'), algo, variant, str(seed))))}.csv"


def write_csv(path: Path, run: Run) -> None:
    """Every evaluation, under a first line that tells how the run was made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = [[f"{v:.0f}" if name == "update" else f"{v:.6g}" for v in run.columns[name]] for name in run.columns]
    lines = [f"# {json.dumps(run.about)}", ",".join(run.columns), *(",".join(row) for row in zip(*columns))]
    path.write_text("\n".join(lines) + "\n")


def import_runs(args: Args) -> None:
    """Raises InputError, before anything is written, rather than replace another run or spoil a cell."""
    folders = {path: sorted(config.parent for config in path.rglob("config.json")) for path in args.runs}
    if empty := [str(path) for path, found in folders.items() if not found]:
        raise InputError(f"no run folder in {', '.join(empty)}: one holds config.json and progress.csv")
    kept, new = {path: read_csv(path) for path in args.out.glob("*.csv")}, {}
    for folder in dict.fromkeys(itertools.chain(*folders.values())):
        run = read_folder(folder)
        done, total = run.columns["update"][-1] if run.columns else 0, run.about["num_updates"]
        if not done or (done < total and not args.partial):
            so_far = f"{folder} was evaluated up to update {done:,.0f} of {total:,}"
            print(f"left out: {so_far}: resume it, or give --partial", file=sys.stderr)
        elif not np.isfinite(run.columns["return_mean"]).all():
            print(f"left out: {folder} was not evaluated in an environment", file=sys.stderr)
        else:
            path = csv_path(args.out, run)
            if path in new:
                raise InputError(f"{new[path].path} and {folder} are the same seed of the same cell: give one of them")
            if path in kept:
                differing = differences(run, kept[path]) or ["evaluations"] * (not continues(run, kept[path]))
                if differing:
                    differs = f"{folder} differs from {path} in {', '.join(differing)}"
                    raise InputError(f"{differs}: import it into another --out, or delete that first")
            new[path] = run
    seeds_by_cell((kept | new).values())
    for path, run in new.items():
        write_csv(path, run)
        print(f"{run.path} -> {path}")


# --- Cells: the seeds of one method on one dataset ---
@dataclass
class Cell:
    dataset: str
    algo: str
    variant: str  # settings that were changed
    runs: list[Run]
    facts: dict[str, np.ndarray]  # Run.facts, each (num_seeds,)

    @property
    def method(self) -> str:
        return f"{self.algo} {self.variant}".strip()

    @property
    def scored(self) -> bool:
        return np.isfinite(self.facts["score"]).all()

    @property
    def score_evals(self) -> int:
        return self.runs[0].about["score_evals"]

    @property
    def protocol(self) -> str:
        return f"{self.dataset} ({self.updates} updates, last {self.score_evals})"

    @property
    def updates(self) -> str:
        done, total = min(run.columns["update"][-1] for run in self.runs), self.runs[0].about["num_updates"]
        return f"{total:,}" if done == total else f"{done:,.0f} of {total:,}"


def read_csv(path: Path) -> Run:
    try:
        with open(path, newline="") as file:
            run = Run(path, json.loads(file.readline().removeprefix("# ")), read_rows(file))
        run.facts(), [run.about[name] for name in ("dataset", "algo", "variant", "seed", "num_updates", "data_hash")]
        return run
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no csv of a run ({error!r}): import its run folder again") from None


def seeds_by_cell(runs: Iterable[Run]) -> dict[tuple, list[Run]]:
    """(dataset, algo, variant) -> its runs. Raises InputError where these differ in more than the seed."""
    cells = {}
    for run in sorted(runs, key=lambda run: run.about["seed"]):
        cells.setdefault(tuple(run.about[name] for name in ("dataset", "algo", "variant")), []).append(run)
    for seeds in cells.values():
        for one, other in itertools.combinations(seeds, 2):
            if differing := differences(one, other):
                differ = f"{one.path} and {other.path} differ in {', '.join(differing)}"
                raise InputError(f"{differ}: no mean over them makes sense, move one into another --out")
    return cells


def read_cells(folder: Path) -> list[Cell]:
    cells = seeds_by_cell(map(read_csv, sorted(folder.glob("*.csv"))))
    if not cells:
        raise InputError(f"no csv of a run in {folder}: give run folders to import")
    facts = {key: [run.facts() for run in runs] for key, runs in cells.items()}
    columns = {key: {name: np.array([f[name] for f in facts[key]]) for name in facts[key][0]} for key in cells}
    return [Cell(*key, cells[key], columns[key]) for key in sorted(cells)]


# --- Statistics over datasets: an array of scores (num_seeds,) for each, or draws of them (NUM_DRAWS, num_seeds) ---
def bootstrap(scores: list[np.ndarray]) -> list[np.ndarray]:
    """Seeds drawn with replacement within each dataset, the same draws whenever the numbers of seeds are the same."""
    rng = np.random.default_rng(0)
    return [s[rng.integers(len(s), size=(NUM_DRAWS, len(s)))] for s in scores]


def interquartile_mean(scores: list[np.ndarray]) -> np.ndarray:
    """Of the middle half of all runs together, where every dataset weighs the same, however many seeds it has."""
    pooled = np.concatenate(scores, axis=-1)
    order = np.argsort(pooled, axis=-1)
    weight = np.concatenate([np.full(s.shape[-1], 1 / (s.shape[-1] * len(scores))) for s in scores])[order]
    upto = weight.cumsum(axis=-1)
    middle = upto.clip(0.25, 0.75) - (upto - weight).clip(0.25, 0.75)  # what of each run lies there
    return (middle * np.take_along_axis(pooled, order, axis=-1)).sum(axis=-1) / middle.sum(axis=-1)


def improvement(scores: list[np.ndarray], others: list[np.ndarray]) -> np.ndarray:
    """P(a run's score > another method's) on the same dataset, ties count half; mean over datasets."""
    pairs = [(a[..., :, None], b[..., None, :]) for a, b in zip(scores, others, strict=True)]
    return np.mean([((a > b) + 0.5 * (a == b)).mean(axis=(-2, -1)) for a, b in pairs], axis=0)


def halves(scores: list[np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """A method's scores on every dataset, then another one's -> each of them."""
    return scores[: len(scores) // 2], scores[len(scores) // 2 :]


def first_better(scores: list[np.ndarray]) -> np.ndarray:
    return improvement(*halves(scores))


def difference(scores: list[np.ndarray]) -> np.ndarray:
    """Mean over datasets of the first method's mean score less the second's."""
    return np.mean([a.mean(axis=-1) - b.mean(axis=-1) for a, b in zip(*halves(scores), strict=True)], axis=0)


def profile(scores: list[np.ndarray], thresholds: np.ndarray) -> np.ndarray:
    """Share of runs above each threshold, mean over datasets: (..., num_thresholds)"""
    return sum((s[..., None] > thresholds).mean(axis=-2) for s in scores) / len(scores)


def interval(function: Callable, scores: list[np.ndarray]) -> np.ndarray:
    """(2, ...): the 95 % interval of what `function` makes of the scores."""
    return np.percentile(function(bootstrap(scores)), [2.5, 97.5], axis=0)


def comparable(cells: list[Cell]) -> list[tuple[tuple[str, ...], dict[str, list[np.ndarray]]]]:
    """For every set of datasets that a method or two were run on: method -> scores, of all methods that have all of it.

    A dataset after other numbers of updates, or with the mean of other numbers of evaluations, is another one.
    """
    scores = {}
    for cell in cells:
        if cell.scored:
            scores.setdefault(cell.method, {})[cell.protocol] = cell.facts["score"]
    sets = {tuple(sorted(set(a) & set(b))) for a, b in itertools.combinations_with_replacement(scores.values(), 2)}
    sets = sorted(sets - {()}, key=lambda names: (-len(names), names))
    groups = [
        (names, {m: [have[name] for name in names] for m, have in sorted(scores.items()) if set(names) <= set(have)})
        for names in sets
    ]
    return [group for group in groups if max(map(len, group)) > 1] or groups  # of one score nothing more is to be said


# --- Figures ---
def finish(figure: plt.Figure, path: Path, cells: Iterable[Cell] = ()) -> None:
    """Writes it with the hash of the csv files that it is made from, so that an old figure can be told."""
    source = hashlib.sha256(b"".join(run.path.read_bytes() for cell in cells for run in cell.runs)).hexdigest()
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    labels = {label: h for axis in figure.axes for h, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(labels.values(), labels, loc="outside lower center", ncols=min(len(labels), 3), frameon=False)
    figure.savefig(path, dpi=110, metadata={"Software": None, "Source": source})
    plt.close(figure)


def draw_curves(path: Path, cells: list[Cell], styles: dict[str, dict]) -> None:
    """Mean over seeds with the range of the seeds, against updates and against the median seed's seconds."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
    behaviour = cells[0].runs[0].about["behaviour"]
    for axis, column, label in zip(axes, ("update", "seconds"), ("updates", "seconds")):
        for cell in cells:
            num, style = min(len(run.columns["update"]) for run in cell.runs), styles[cell.method]
            x = np.median([run.columns[column][:num] for run in cell.runs], axis=0)
            returns = np.array([run.columns["return_mean"][:num] for run in cell.runs])  # (seeds, evaluations)
            axis.fill_between(x, returns.min(axis=0), returns.max(axis=0), color=style["color"], alpha=0.2, linewidth=0)
            axis.plot(x, returns.mean(axis=0), **style, label=f"{cell.method} ({len(cell.runs)})")
        if behaviour is not None:
            axis.axhline(behaviour, color="black", linestyle="--", label="the data's mean")
        axis.set(xlabel=label, xlim=(0, None))
        axis.locator_params(axis="x", nbins=5)
    axes[0].set_ylabel("return in the real environment")
    figure.suptitle(f"{cells[0].dataset}: mean and range of seeds (their number)", fontsize="medium")
    finish(figure, path, cells)


def draw_scores(path: Path, cells: list[Cell]) -> None:
    """A row per method, the best on top: a dot per seed and a bar at their mean."""
    key, label = ("score", "normalised score") if cells[0].runs[0].about["ref_scores"] else ("return", "return")
    cells = sorted(cells, key=lambda cell: cell.facts[key].mean())
    figure, axis = plt.subplots(figsize=(8, 1.4 + 0.27 * len(cells)), layout="constrained")
    for y, cell in enumerate(cells):
        values, color = cell.facts[key], "tab:blue" if has_model(cell.algo) else "tab:orange"
        name = "a model of the world" if has_model(cell.algo) else "no model"
        axis.plot(values, np.full(len(values), y), "o", color=color, alpha=0.5, markeredgewidth=0, label=name)
        axis.plot([values.mean()] * 2, [y - 0.35, y + 0.35], color=color, linewidth=2)
    if np.isfinite(data := cells[0].facts[f"data_{key}"].mean()):
        axis.axvline(data, color="black", linestyle="--", label="the data's mean")
    axis.set_yticks(range(len(cells)), [f"{cell.method} ({len(cell.runs)})" for cell in cells])
    axis.set_xlabel(label)
    figure.suptitle(f"{cells[0].dataset}: seeds (their number) and their mean", fontsize="medium")
    axis.grid(axis="x", alpha=0.3)
    finish(figure, path, cells)


@cache
def has_model(algo: str) -> bool:
    """Whether the script fits an ensemble."""
    return "dynamics" in importlib.import_module(f"algos.{algo}").Args.__dataclass_fields__


def draw_profiles(path: Path, cells: list[Cell], groups: list, styles: dict[str, dict]) -> None:
    """Of the groups of several datasets, where there are some."""
    groups = [group for group in groups if min(map(len, group)) > 1] or groups[:1]
    figure, axes = plt.subplots(1, len(groups), figsize=(4.5 * len(groups), 4), layout="constrained", squeeze=False)
    everything = np.concatenate([s for _, methods in groups for scores in methods.values() for s in scores])
    thresholds = np.linspace(min(everything.min(), 0), max(everything.max(), 100) * 1.02, 201)
    for axis, (names, methods) in zip(axes[0], groups):
        for method, scores in methods.items():
            low, high = interval(lambda s: profile(s, thresholds), scores)
            axis.fill_between(thresholds, low, high, color=styles[method]["color"], alpha=0.2, linewidth=0)
            axis.plot(thresholds, profile(scores, thresholds), **styles[method], label=method)
        axis.set_xlabel("normalised score")
        axis.set_title("\n".join(names), fontsize="small")
    axes[0, 0].set_ylabel("share of runs above it")
    finish(figure, path, cells)


# --- Text ---
def number(value: float, digits: int = 1) -> str:
    return f"{round(value, digits) + 0.0:,.{digits}f}" if np.isfinite(value) else "-"  # + 0.0: no -0.0


def mean_sd(values: np.ndarray, digits: int = 1) -> str:
    spread = f" ± {number(values.std(ddof=1), digits)}" if len(values) > 1 and np.isfinite(values).all() else ""
    return number(values.mean(), digits) + spread


def with_interval(function: Callable, scores: list[np.ndarray], digits: int) -> str:
    low, high = (number(bound, digits) for bound in interval(function, scores))
    return number(function(scores), digits) + (f" [{low}, {high}]" if min(map(len, scores)) > 1 else "")


def table(header: str, rows: list[list]) -> str:
    names = header.split(", ")
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in [names, ["---"] * len(names), *rows])


def score_table(cells: list[Cell]) -> str:
    rows = []
    for cell in cells:
        mean = {name: number(values.mean()) for name, values in cell.facts.items()}
        row = [cell.dataset, cell.method, len(cell.runs), cell.updates, cell.score_evals]
        row += [mean_sd(cell.facts["score"]), mean_sd(cell.facts["return"])]
        row += [f"{mean[f'{what}_score']} ({mean[f'{what}_return']})" for what in ("best", "data")]
        row += [mean["minutes"], number(cell.facts["updates_per_second"].mean(), 0)]
        rows.append([*row, number(cell.facts["peak_memory_gb"].max())])
    return table("dataset, method, seeds, updates, last, score, return, best, data, minutes, updates/s, GB", rows)


def displacement_table(cells: list[Cell]) -> str:
    """Mean over the seeds that were displaced; empty where none was."""
    rows = []
    for cell in cells:
        measured = [run.about["displaced"] for run in cell.runs if "displaced" in run.about]
        if measured:
            # (num_seeds, number of forced actions)
            columns = {name: np.array([one[name] for one in measured], dtype=float) for name in DISPLACED}
            row = [cell.dataset, cell.method, len(measured), number(columns["step"][:, 0].mean(), 0)]
            row += map(number, columns["episodes"].mean(axis=0)[[0, -1]])
            row += map(number, columns["return_mean"].mean(axis=0))
            distance = [d[np.isfinite(d)] for d in columns["distance"].T]  # of the seeds that got there
            rows.append(row + [number(d.mean() if len(d) else np.nan, 2) for d in distance])
    names = [f"{what} {num}" for what in ("return", "distance") for num in (0, 5, 10, 15)]
    return table(f"dataset, method, seeds, step, episodes 0, episodes 15, {', '.join(names)}", rows) if rows else ""


def overall_tables(names: tuple[str, ...], methods: dict[str, list[np.ndarray]]) -> str:
    rows = [[m, " + ".join(str(len(s)) for s in scores), scores] for m, scores in methods.items()]
    rows = [[method, num_runs, with_interval(interquartile_mean, scores, 1)] for method, num_runs, scores in rows]
    text = f"### {', '.join(names)}\n\n{table('method, runs, IQM', rows)}\n"
    if len(methods) > MOST_PAIRED:
        matrix = [[a, *(number(float(first_better(methods[a] + methods[b])), 2) for b in methods)] for a in methods]
        return f"{text}\nP(method of the row > method of the column):\n\n{table(', '.join(['', *methods]), matrix)}\n"
    pairs = [
        [a, b, with_interval(first_better, methods[a] + methods[b], 2)] for a, b in itertools.combinations(methods, 2)
    ]
    return text + (f"\n{table('A, B, P(A > B)', pairs)}\n" if pairs else "")


def paired(cells: list[Cell], methods: tuple[str, str], datasets: Iterable[str] = ()) -> list[tuple[Cell, Cell]]:
    """Of each of the datasets, by default of all, where the two methods were run and scored in the same way."""
    one, other = ({cell.protocol: cell for cell in cells if cell.method == m and cell.scored} for m in methods)
    pairs = [(one[name], other[name]) for name in sorted(one.keys() & other.keys())]
    return [pair for pair in pairs if not datasets or pair[0].dataset in datasets]


def comparison(pairs: list[tuple[Cell, Cell]]) -> str:
    rows, scores = [], [[cell.facts["score"] for cell in pair] for pair in pairs]
    for (cell, _), both in zip(pairs, scores):
        rows.append([cell.protocol, *(f"{mean_sd(s)} ({len(s)})" for s in both), both])
    firsts, seconds = map(list, zip(*scores))
    means = [number(float(np.mean([s.mean() for s in column]))) for column in (firsts, seconds)]
    rows.append([f"mean of {len(pairs)}", *means, firsts + seconds])
    rows = [[*row, with_interval(difference, both, 1), with_interval(first_better, both, 2)] for *row, both in rows]
    names = [cell.method.replace(",", " ") for cell in pairs[0]]  # a comma would end the column
    return table(f"dataset, {', '.join(names)}, difference, P(first > second)", rows)


def origin_table(cells: list[Cell]) -> str:
    rows = []
    for cell in cells:
        about = [run.about for run in cell.runs]
        scores = ", ".join(f"{a['seed']}: {number(score)}" for a, score in zip(about, cell.facts["score"]))
        commits, hardware = dict.fromkeys(a["commit"][:7] for a in about), dict.fromkeys(a["hardware"] for a in about)
        row = [cell.dataset, cell.method, scores, f"`{about[0]['command']}`", ", ".join(commits), "; ".join(hardware)]
        rows.append(row)
    return table("dataset, method, score by seed, command of the first, commit, hardware", rows)


def published_tables() -> str:
    """A table per method and source: environments by grades of data."""
    with open(ROOT / "benchmarks" / "published.csv", newline="") as file:
        sources, parts = {}, []
        for row in csv.DictReader(file):
            title = (
                f"**{row['method']}, {row['data_version']}**, seeds: {row['seeds']}. {row['protocol']} {row['source']}"
            )
            sources.setdefault(title, []).append(row)
    for title, rows in sources.items():
        notes = [f"{row['dataset']}: {row['note']}." for row in rows if row["note"]]
        scores = {tuple(row["dataset"].split("-", 1)): row for row in rows}
        scores = {key: row["score"] + f" ± {row['spread']}" * bool(row["spread"]) for key, row in scores.items()}
        envs, grades = (list(dict.fromkeys(part)) for part in zip(*scores))
        lines = [[env, *(scores.get((env, grade), "") for grade in grades)] for env in envs]
        parts += [" ".join([title, *notes]), table(", ".join(["", *grades]), lines)]
    return "\n\n".join(parts)


def report(cells: list[Cell], groups: list, figures: dict[str, str]) -> str:
    profiles = "Share of runs above a score, with 95 % intervals:\n\n![Performance profiles](profile.png)"
    over_datasets = [*(overall_tables(*group) for group in groups), profiles] if groups else ["No normalised scores."]
    images = [f"![Return on {dataset}](curves-{name})\n" for dataset, name in figures.items()]
    compared = [f"{comparison(pairs)}\n" for question in COMPARED if (pairs := paired(cells, *question))]
    displaced = [f"## Displaced\n\n{DISPLACEMENT}\n{text}\n"] if (text := displacement_table(cells)) else []
    dots = [f"![Scores on {dataset}](scores-{name})\n" for dataset, name in figures.items()]
    return "\n".join(
        [
            "# Scores\n\nWritten by `python benchmarks/report.py` from the csv files of the runs.\n",
            *(LEGEND, "", score_table(cells), "", *dots, "## Over datasets\n", OVERALL, "", *compared, *over_datasets),
            *(
                "\n## Learning curves\n",
                CURVES,
                *images,
                *displaced,
                "## How the runs were made\n",
                origin_table(cells),
            ),
            "\n## Published scores\n\nOther data, other environments, other protocols: no column of the table above.\n",
            published_tables() + "\n",
        ]
    )


def report_csv(cells: list[Cell]) -> str:
    lines = [
        ["dataset", "algo", "variant", "seeds", "updates", "score_evals", *cells[0].facts, "score_sd", "return_sd"]
    ]
    for cell in cells:
        updates = min(run.columns["update"][-1] for run in cell.runs)
        values = [f.max() if name == "peak_memory_gb" else f.mean() for name, f in cell.facts.items()]
        values += [cell.facts[name].std(ddof=1) if len(cell.runs) > 1 else np.nan for name in ("score", "return")]
        line = [cell.dataset, cell.algo, cell.variant, len(cell.runs), int(updates), cell.score_evals]
        lines.append(line + [f"{value:.6g}" if np.isfinite(value) else "" for value in values])
    csv.writer(text := io.StringIO(), lineterminator="\n").writerows(lines)
    return text.getvalue()


def readme_table(cells: list[Cell]) -> str:
    """Every script on every dataset with its own settings, or where it was run with others alone, the least changed."""
    shown, rows = {}, []
    for cell in sorted(cells, key=lambda cell: (cell.dataset, cell.algo, cell.variant.count("="), cell.variant)):
        shown.setdefault((cell.algo, cell.dataset), cell)
    for cell in shown.values():
        name = f"[{cell.algo}.py](algos/{cell.algo}.py)" + f" {cell.variant}" * bool(cell.variant)
        score, returns = mean_sd(cell.facts["score"]), mean_sd(cell.facts["return"], 0)
        row = [cell.dataset, name, cell.updates, f"{score} ({len(cell.runs)})"]
        rows.append([*row, returns, number(cell.facts["data_return"].mean(), 0)])
    return table("dataset, script, updates, score (seeds), return, the data's mean return", rows)


def replace_table(path: Path, text: str) -> None:
    try:
        before, rest = path.read_text().split("<!-- scores -->")
        after = rest.split("<!-- /scores -->")[1]
    except (OSError, ValueError, IndexError) as error:
        raise InputError(f"{path} lacks the lines <!-- scores --> and <!-- /scores --> ({error}): add them") from None
    path.write_text(f"{before}<!-- scores -->\n\n{text}\n\n<!-- /scores -->{after}")


def main(args: Args) -> None:
    if args.datasets and not args.compare:
        raise InputError("--datasets narrows --compare: the report has all of them")
    if args.runs:
        import_runs(args)
    cells = read_cells(args.out)
    if args.compare:
        pairs = paired(cells, args.compare, args.datasets)
        if missing := set(args.datasets) - {cell.dataset for cell, _ in pairs} or not pairs:
            where = ", ".join(sorted(missing)) if args.datasets else "any dataset"
            known = ", ".join(sorted({cell.method for cell in cells}))
            nothing = f"no scores of both {args.compare[0]} and {args.compare[1]} after the same updates on {where}"
            raise InputError(f"{nothing}: the methods are {known}")
        print(comparison(pairs))
        return
    groups = comparable(cells)
    styles = {
        method: {"color": plt.get_cmap("tab20")(i % 20), "linestyle": ("-", "--", ":")[i // 20 % 3]}
        for i, method in enumerate(sorted({cell.method for cell in cells}))
    }
    args.out_dir.mkdir(parents=True, exist_ok=True)
    figures = {cell.dataset: f"{cell.dataset.replace('/', '-')}.png" for cell in cells}
    for dataset, name in figures.items():
        here = [cell for cell in cells if cell.dataset == dataset]
        # more than ten lines cannot be told apart: those with a setting changed go first
        here = [cell for cell in here if len(here) <= 10 or not cell.variant] or here
        draw_scores(args.out_dir / f"scores-{name}", here)
        draw_curves(args.out_dir / f"curves-{name}", here, styles)
    if groups:
        draw_profiles(args.out_dir / "profile.png", cells, groups, styles)
    (args.out_dir / "report.csv").write_text(report_csv(cells))
    (args.out_dir / "report.md").write_text(report(cells, groups, figures))
    ours = (args.out, args.out_dir) == (Args.out, Args.out_dir)
    if readme := args.readme or (ROOT / "README.md" if ours else None):
        replace_table(readme, readme_table(cells))
    print(f"{score_table(cells)}\n\n{args.out_dir / 'report.md'}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except InputError as error:
        sys.exit(f"error: {error}")
