"""Run folders -> one small csv per run -> a table and figures of every method on every set.

The score of a run is the mean of its last evaluations (--score-evals of the run), never its best. Cells are compared
where the set, the number of updates and the evaluations that count are the same; anything else is another column.
All that is read are the files of run folders: no environment is made, no data are opened and nothing that a folder
names is imported. A folder or csv that is damaged is left out, with a line that says why; the exit status is then 1.
Run: python benchmarks/report.py runs/demo --out-dir my-report    a report of its own; its csv files in my-report/runs
     python benchmarks/report.py runs/bench    added to the bench's results, which are kept here, and to the README
     python benchmarks/report.py --compare mopo "mopo penalty-coef=0"    two methods of a report, printed
"""

import csv
import hashlib
import io
import itertools
import json
import os
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

plt.rcParams["text.parse_math"] = False  # a dollar in a name is one

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.files import HomePaths, one_line, safe, start, write_text  # noqa: E402
from common import InputError, writing  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
NUM_DRAWS = 10_000  # of a bootstrap
NO_SETTINGS = {  # what seeds of one cell may differ in
    "seed", "dataset", "run_dir", "run_name", "resume", "num_threads", "device", "dynamics", "compile",
    "checkpoint_interval", "trust",
}  # fmt: skip
NEAR = 5.0  # points of the normalised score
FEWEST_SEEDS = 5  # below, no probability is given that one method beats another
FORCED = [0, 5, 10, 15]  # actions, the rows of displaced.csv
DISPLACED = ("forced_actions", "step", "return_mean", "episodes", "distance")
COLUMNS = ("update", "seconds", "updates_per_second", "return_mean", "normalised_score")  # of progress.csv
TEXTS = ("command", "hardware", "commit", "algo", "data_hash", "dataset", "variant")
WHOLE = {"seed": 0, "num_updates": 1, "score_evals": 1}  # numbers, and the least that they can be
DATA_FILES = (".hdf5", ".h5", ".npz")
LEGEND = f"""\
A cell is the mean of the seeds' scores ± their standard deviation; a score is the mean of a run's last evaluations,
normalised as in D4RL (0 = random policy, 100 = expert), or the return where a set has no such numbers. **rank**: 1 is
best; the mean over the sets that every method was run on, with a 95 % interval from {NUM_DRAWS:,} bootstrap draws of
the seeds within each cell, where all cells have two or more. With fewer than about five it is too narrow."""
OF_A_SET = f"""\
**rise**: by how much the last third of the evaluations lies above the middle third: what still moves is not done.
**best**: mean over seeds of each run's best evaluation; nobody without the real environment can choose it. **near**:
seconds until the seeds' mean was first within {NEAR:g} points of its score. **minutes**: from start to end; both have
the ensemble's fit where none was cached. **updates/s**: median over a run's evaluations. **GB**: most memory."""
DISPLACEMENT = """\
`python benchmarks/displace.py`: the final policy's return when 0, 5, 10 and 15 random actions are forced on it half-way
through its median episode, at the step that is named; how many of ten episodes are left after none and after 15; and
how far from the data the 50 steps that follow are in those that are left, in standard deviations.
"""


@dataclass
class Args(HomePaths):
    runs: tyro.conf.Positional[tuple[Path, ...]] = ()  # run folders, or folders of run folders
    out_dir: Path = RESULTS / "bench"  # where report and figures are written, and in runs/ the csv files of runs
    readme: Path | None = None  # whose table of scores to replace; README.md for the bench
    partial: bool = False  # take runs that are not finished, too: what they reached is averaged with the others
    compare: tuple[str, str] | None = None  # two methods by their names in the report: print what lies between them
    datasets: tuple[str, ...] = ()  # to compare them on; by default all that both were run on

    @property
    def csv_dir(self) -> Path:
        return self.out_dir / "runs"


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
        third = -(-len(scores) // 3)  # rounded up
        for what, values in (("score", scores), ("return", returns)):
            before = values[-2 * third : -third]
            facts[f"rise_{what}"] = values[-third:].mean() - before.mean() if len(before) else np.nan
        # fmax: an evaluation that failed is nan
        facts |= {"best_score": np.fmax.reduce(scores), "best_return": np.fmax.reduce(returns)}
        facts |= {"data_score": 100 * (data_return - low) / (high - low), "data_return": data_return}
        facts |= {"minutes": self.columns["seconds"][-1] / 60}
        facts |= {"updates_per_second": np.median(self.columns["updates_per_second"])}
        return facts | {"peak_memory_gb": np.float64(self.about["peak_memory_gb"])}


# --- Import: run folder -> csv ---
def text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path.name} is no text") from None


def read_rows(file: str, lines: Iterable[str]) -> dict[str, np.ndarray]:
    header, *rows = [row for row in csv.reader(lines) if row] or [[]]
    for i, row in enumerate(rows, start=1):
        if len(row) != len(header):
            raise ValueError(f"{file} has {len(row)} values in row {i}, and {len(header)} columns")
    try:
        return {name: np.array(column, dtype=float) for name, column in zip(header, zip(*rows))}
    except ValueError as error:
        raise ValueError(f"{file} holds what is no number ({error})") from None


def read_json(file: str, text: str) -> dict:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file} is no JSON of names and values")
    return value


def variant_of(folder: Path, algo: str, seed: int) -> str:
    """Of <dataset>__<algo>__<variant>__<seed>, as a grid names its runs; other names tell no variant."""
    name = re.search(rf"__{re.escape(algo)}__(?:(.*)__)?{seed}$", folder.resolve().name, re.DOTALL)
    return (name and name[1]) or ""


def refuse(name: str, value, right: str) -> None:
    raise ValueError(f"{name} is {json.dumps(value)[:60]} and must be {right}")


def is_number(value) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # not inf, not nan, no int beyond a float


def check(about: dict, columns: dict[str, np.ndarray]) -> None:
    """Raises ValueError, which says what is wrong, where this is not what a run leaves."""
    wrong = {name: "a text" for name in TEXTS if type(about[name]) is not str}
    wrong |= {name: "a text" for name in ("dataset", "algo") if about[name] == ""}
    for name, least in WHOLE.items():
        if type(about[name]) is not int or not least <= about[name] < 1e15:
            wrong[name] = f"a whole number, {least} or more"
    for name in ("behaviour", "peak_memory_gb"):
        if about[name] is not None and not is_number(about[name]):
            wrong[name] = "a number"
    if (ref := about["ref_scores"]) is not None:
        if not isinstance(ref, list) or len(ref) != 2 or not all(map(is_number, ref)) or ref[0] == ref[1]:
            wrong["ref_scores"] = "two different numbers"
    settings = about.get("settings", {})  # older ones tell none
    if not isinstance(settings, dict) or settings.get("hidden_layers", 1) not in range(100):
        wrong["settings"] = "those of a script"
    displaced = about.get("displaced", dict.fromkeys(DISPLACED, FORCED))
    if displaced["forced_actions"] != FORCED or np.array([displaced[n] for n in DISPLACED], float).shape != (5, 4):
        wrong["displaced"] = "what benchmarks/displace.py measures"
    for name, right in wrong.items():
        refuse(name, about[name], right)
    if len(os.fsencode(csv_path(Path(), about).name)) > 200:
        raise ValueError("dataset, script, variant and seed make the name of a file too long")
    if missing := [name for name in COLUMNS if columns and name not in columns]:
        raise ValueError(f"the evaluations lack {', '.join(missing)}")
    updates = columns.get("update", np.ones(1))
    if not (np.diff(updates, prepend=0) > 0).all() or updates[-1] > 1e15:
        raise ValueError("the evaluations' updates do not grow from one to the next")


def why_unscored(run: Run) -> str:
    """Why a run that was evaluated has no score; empty where it has one."""
    updates, returns = run.columns["update"], run.columns["return_mean"]
    if not np.isfinite(returns).any():
        return "was not evaluated in an environment"
    failed = updates[-run.about["score_evals"] :][~np.isfinite(returns[-run.about["score_evals"] :])]
    which = ", ".join(f"{update:,.0f}" for update in failed)
    return f"has no score: of its last evaluations those at update {which} failed" if which else ""


def read_folder(folder: Path) -> Run:
    """A run as it left its folder; one that was stopped before its first evaluation has no columns.

    Raises InputError, which says what is wrong, where the folder is damaged.
    """
    try:
        config = read_json("config.json", text_of(folder / "config.json"))
        progress, resources = folder / "progress.csv", folder / "resources.json"
        columns = read_rows(progress.name, text_of(progress).splitlines()) if progress.exists() else {}
        if not isinstance(args := config["args"], dict) or not isinstance(args["dataset"], str):
            raise ValueError("config.json does not tell the settings of a script")
        for name in ("algo", "command"):
            if type(config[name]) is not str:
                refuse(name, config[name], "a text")
        about = {"command": public_command(config), "hardware": config.get("hardware", "unknown")}
        about |= {what: config[what] for what in ("commit", "versions", "python", "algo", "data_hash")}
        about |= {"dataset": without_folder(args["dataset"])}
        about |= {"variant": variant_of(folder, config["algo"], args["seed"])}
        about |= {what: args[what] for what in ("seed", "num_updates", "score_evals")}
        about["settings"] = {name: value for name, value in args.items() if name not in NO_SETTINGS}
        if (displaced := folder / "displaced.csv").exists():
            rows = read_rows(displaced.name, text_of(displaced).splitlines())
            about["displaced"] = {name: [float(f"{v:.6g}") for v in rows[name]] for name in DISPLACED}
        about |= {"env": config["env"]} if "env" in config else {}  # older ones do not tell it, nor the next two
        behaviour = config.get("behaviour_return")
        about["behaviour"] = float(f"{behaviour:.6g}") if is_number(behaviour) else behaviour
        about["ref_scores"] = config.get("ref_scores")
        memory = read_json(resources.name, text_of(resources)) if resources.exists() else {"peak_memory_gb": None}
        run = Run(folder, about | {"peak_memory_gb": memory["peak_memory_gb"]}, columns)
        check(run.about, columns)
        return run
    except Exception as error:  # a folder can be damaged in any way
        raise InputError(reason(error)) from None


def reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return f"{Path(error.filename or '').name} cannot be read ({error.strerror})"
    if isinstance(error, KeyError):
        return f"{error.args[0]} is missing"
    return str(error)


def whole(paths: Iterable[Path], read: Callable[[Path], Run], damaged: set[Path]) -> dict[Path, Run]:
    """What could be read; of each of the others a line says why not, once."""
    runs = {}
    for path in paths:
        try:
            runs[path] = read(path)
        except InputError as error:
            if path not in damaged:
                leave_out(f"{path}: {error}")
            damaged.add(path)
    return runs


def leave_out(what: str) -> None:
    print(one_line(f"left out: {what}"), file=sys.stderr)


def without_folder(text: str) -> str:
    """Of a file, or of a path that only one machine has, the name."""
    return Path(text).name if text.startswith(("/", "~", "./", "../")) or Path(text).suffix in DATA_FILES else text


def public_command(config: dict) -> str:
    """The run's command without what only one machine knows: where runs are kept, the folders of files.

    What was changed when the run went on is put in; older folders kept the last command alone, and there all settings.
    """
    try:
        words = shlex.split(config["command"])
    except ValueError as error:
        raise ValueError(f"command is not one that a shell would take ({error})") from None
    flags = list(itertools.dropwhile(lambda word: not word.endswith(".py"), words))[1:]
    forgotten = any(flag.startswith("--resume") for flag in flags)
    flags = [] if forgotten else flags
    changed = {name for resumed in config.get("resumed", ()) for name in resumed["changed"]}
    for name, value in config["args"].items():
        if forgotten or (name in changed and name not in NO_SETTINGS):
            flag = name.replace("_", "-")
            if type(value) is list:
                flags += [f"--{flag}", *map(str, value)]
            elif value != "":
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
    names = ("data_hash", "num_updates", "score_evals", *("env",) * ("env" in run.about))
    return {name: run.about[name] for name in names} | settings


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


def csv_path(folder: Path, about: dict) -> Path:
    parts = (safe(str(about[name])) for name in ("dataset", "algo", "variant", "seed"))
    return folder / f"{'__'.join(filter(None, parts))}.csv"


def write_csv(path: Path, run: Run) -> None:
    """Every evaluation, under a first line that tells how the run was made."""
    columns = [[f"{v:.0f}" if name == "update" else f"{v:.6g}" for v in run.columns[name]] for name in run.columns]
    lines = [f"# {json.dumps(run.about)}", ",".join(run.columns), *(",".join(row) for row in zip(*columns))]
    write_text(path, "\n".join(lines) + "\n")


def import_runs(args: Args, damaged: set[Path]) -> None:
    """Raises InputError, before anything is written, rather than replace another run or spoil a cell."""
    folders = {path: sorted(config.parent for config in path.rglob("config.json")) for path in args.runs}
    if empty := [str(path) for path, found in folders.items() if not found]:
        raise InputError(f"no run folder in {', '.join(empty)}: one holds config.json and progress.csv")
    new, kept = {}, whole(sorted(args.csv_dir.glob("*.csv")), read_csv, damaged)
    runs = whole(dict.fromkeys(itertools.chain(*folders.values())), read_folder, damaged)
    for folder, run in runs.items():
        done, total = run.columns["update"][-1] if run.columns else 0, run.about["num_updates"]
        if not done or (done < total and not args.partial):
            leave_out(f"{folder} was evaluated up to update {done:,.0f} of {total:,}: resume it, or give --partial")
        elif why := why_unscored(run):
            leave_out(f"{folder} {why}")
        else:
            path = csv_path(args.csv_dir, run.about)
            if path in new:
                raise InputError(f"{new[path].path} and {folder} are the same seed of the same cell: give one of them")
            if path in kept:
                differing = differences(run, kept[path]) or ["evaluations"] * (not continues(run, kept[path]))
                if differing:
                    differs = f"{folder} differs from {path} in {', '.join(differing)}"
                    raise InputError(f"{differs}: import it into another --out-dir, or delete that first")
            new[path] = run
    seeds_by_cell((kept | new).values())
    for path, run in new.items():
        write_csv(path, run)
        damaged.discard(path)
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
    def key(self) -> str:
        """By which of its facts it is compared."""
        return "score" if np.isfinite(self.facts["score"]).all() else "return"

    @property
    def protocol(self) -> tuple[str, str, int]:
        """What cells that are compared have in common."""
        return self.dataset, self.updates, self.runs[0].about["score_evals"]

    @property
    def updates(self) -> str:
        done, total = min(run.columns["update"][-1] for run in self.runs), self.runs[0].about["num_updates"]
        return f"{total:,}" if done == total else f"{done:,.0f} of {total:,}"


def read_csv(path: Path) -> Run:
    """Raises InputError, which says what is wrong, where the file is damaged."""
    try:
        with open(path, newline="") as file:
            first = file.readline()
            if not first.startswith("# "):
                raise ValueError("it is no csv of a run: import its run folder again")
            run = Run(path, read_json("its first line", first.removeprefix("# ")), read_rows("it", file))
        check(run.about, run.columns)
        if not run.columns or (why := why_unscored(run)):
            raise ValueError(why if run.columns else "it has no evaluation")
        return run
    except Exception as error:  # a file can be damaged in any way
        raise InputError(reason(error)) from None


def seeds_by_cell(runs: Iterable[Run]) -> dict[tuple, list[Run]]:
    """(dataset, algo, variant) -> its runs. Raises InputError where these differ in more than the seed."""
    cells = {}
    for run in sorted(runs, key=lambda run: run.about["seed"]):
        cells.setdefault(tuple(run.about[name] for name in ("dataset", "algo", "variant")), []).append(run)
    for seeds in cells.values():
        for one, other in itertools.combinations(seeds, 2):
            if differing := differences(one, other):
                differ = f"{one.path} and {other.path} differ in {', '.join(differing)}"
                raise InputError(f"{differ}: no mean over them makes sense, move one into another --out-dir")
    return cells


def read_cells(folder: Path, damaged: set[Path]) -> list[Cell]:
    cells = seeds_by_cell(whole(sorted(folder.glob("*.csv")), read_csv, damaged).values())
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


def interval(function: Callable, scores: list[np.ndarray]) -> np.ndarray:
    """(2, ...): the 95 % interval of what `function` makes of the scores."""
    return np.percentile(function(bootstrap(scores)), [2.5, 97.5], axis=0)


def mean_rank(means: np.ndarray) -> np.ndarray:
    """means: (..., num_sets, num_methods), the larger the better. Returns (..., num_methods): 1 is best, ties share."""
    better, equal = means[..., None, :] > means[..., :, None], means[..., None, :] == means[..., :, None]
    return (better.sum(axis=-1) + (1 + equal.sum(axis=-1)) / 2).mean(axis=-2)


def ranks(columns: dict[tuple, list[Cell]]) -> dict[str, tuple[float, np.ndarray | None]]:
    """Method -> its mean rank and interval, over the sets that every method was run on; empty with fewer than two."""
    methods = {cell.method for cells in columns.values() for cell in cells}
    shared = [sorted(cells, key=lambda cell: cell.method) for cells in columns.values() if len(cells) == len(methods)]
    if len(shared) < 2 or len(methods) < 2:
        return {}
    scores = [cell.facts[cell.key] for cells in shared for cell in cells]

    def rank(draws: list[np.ndarray]) -> np.ndarray:
        means = np.stack([draw.mean(axis=-1) for draw in draws], axis=-1)
        return mean_rank(means.reshape(*means.shape[:-1], len(shared), len(methods)))

    bounds = interval(rank, scores).T if min(map(len, scores)) > 1 else [None] * len(methods)
    return dict(zip(sorted(methods), zip(rank(scores).tolist(), bounds)))


def seconds_to_score(cell: Cell) -> float:
    """nan where the set has no normalised scores."""
    num = min(len(run.columns["update"]) for run in cell.runs)
    curve = np.mean([run.columns["normalised_score"][:num] for run in cell.runs], axis=0)
    near = np.flatnonzero(curve >= cell.facts["score"].mean() - NEAR)
    return float(np.median([run.columns["seconds"][near[0]] for run in cell.runs])) if len(near) else np.nan


# --- Figures ---
def source_hash(sources: Iterable[Path]) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()


def csv_paths(cells: Iterable[Cell]) -> list[Path]:
    return [run.path for cell in cells for run in cell.runs]


def finish(
    figure: plt.Figure, path: Path, sources: Iterable[Path] = (), legend_columns: int = 3, dpi: int = 90
) -> None:
    """Writes it with the hash of the csv files that it is made from, so that an old figure can be told."""
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    labels = {label: h for axis in figure.axes for h, label in zip(*axis.get_legend_handles_labels())}
    if labels:
        columns = min(len(labels), legend_columns)
        figure.legend(labels.values(), labels, loc="outside lower center", ncols=columns, frameon=False)
    with writing(path) as part:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(part, dpi=dpi, format="png", metadata={"Software": None, "Source": source_hash(sources)})
    plt.close(figure)


@cache
def has_model(algo: str) -> bool:
    """Whether the script fits an ensemble; read, never imported. One that is not here does not."""
    scripts = {path.stem: path for path in (ROOT / "algos").glob("*.py")}
    return algo in scripts and "\n    dynamics: " in scripts[algo].read_text()


def draw_heat(path: Path, columns: dict[tuple, list[Cell]], rank: dict) -> None:
    """Methods by sets, the best mean rank on top; in a cell the mean score and the interval of its seeds."""
    names = in_order(columns, rank)
    figure, axis = plt.subplots(figsize=(2.5 + 1.25 * len(columns), 1.3 + 0.36 * len(names)), layout="constrained")
    shade = np.full((len(names), len(columns)), np.nan)
    for x, cells in enumerate(columns.values()):
        for cell in cells:
            y, values = names.index(cell.method), cell.facts[cell.key]
            if cell.key == "score":
                shade[y, x] = np.clip(values.mean(), 0, 100)
            style = dict(ha="center", va="center", color="white" if shade[y, x] > 55 else "black")
            several = len(values) > 1
            axis.text(x, y - 0.14 * several, number(values.mean()), fontsize=9, **style)
            if several:
                low, high = interval(lambda s: s[0].mean(axis=-1), [values])
                axis.text(x, y + 0.27, f"{number(low)} to {number(high)}", fontsize=6, **style)
    axis.imshow(shade, cmap="YlGnBu", vmin=0, vmax=100, aspect="auto")
    labels = [f"{one_line(dataset)}\n{updates} updates".replace("/", "\n", 1) for dataset, updates, _ in columns]
    axis.set_xticks(range(len(columns)), labels, fontsize=7)
    axis.xaxis.tick_top()
    axis.set_yticks(range(len(names)), [one_line(name) for name in names], fontsize=9)
    for name, label in zip(names, axis.get_yticklabels()):
        label.set_color("tab:blue" if has_model(name.split()[0]) else "black")
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_xlabel("normalised scores, 95 % intervals of the mean below; blue: a model of the world", fontsize=7)
    finish(figure, path, csv_paths(itertools.chain(*columns.values())))


def draw_curves(path: Path, cells: list[Cell]) -> None:
    """A panel per method: mean and range of its seeds, the other methods' means in grey."""
    name = "normalised_score" if all(cell.key == "score" for cell in cells) else "return_mean"
    curves = {}
    for cell in cells:
        num = min(len(run.columns["update"]) for run in cell.runs)
        curves[cell.method] = (
            cell.runs[0].columns["update"][:num],
            np.array([run.columns[name][:num] for run in cell.runs]),  # (seeds, evaluations)
        )
    width = min(4, len(cells))
    height = -(-len(cells) // width)
    size = (2.3 * width + 0.5, 1.7 * height + 0.6)
    figure, axes = plt.subplots(
        height, width, figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    values = np.concatenate([y[np.isfinite(y)] for _, y in curves.values()])
    low, high = np.percentile(values, [1, 99])
    behaviour = cells[0].facts[f"data_{'score' if name == 'normalised_score' else 'return'}"].mean()
    for axis, (method, (x, y)) in zip(axes.flat, curves.items()):
        for other_x, other in curves.values():
            axis.plot(other_x, other.mean(axis=0), color="0.85", linewidth=0.8)
        color = "tab:blue" if has_model(method.split()[0]) else "tab:orange"
        axis.fill_between(x, y.min(axis=0), y.max(axis=0), color=color, alpha=0.25, linewidth=0)
        axis.plot(x, y.mean(axis=0), color=color)
        if np.isfinite(behaviour):
            axis.axhline(behaviour, color="black", linestyle="--", linewidth=0.8)
        axis.set_title(one_line(method), fontsize=8)
        axis.set(xlim=(0, None), ylim=(low - 0.05 * (high - low) - 1e-9, high + 0.05 * (high - low) + 1e-9))
        axis.tick_params(labelsize=7)
        axis.locator_params(axis="x", nbins=4)
    for axis in axes.flat[len(cells) :]:
        axis.set_axis_off()
    figure.supylabel(name.replace("_mean", "").replace("_", " "), fontsize=8)
    figure.supxlabel("updates; dashed: the data's mean", fontsize=8)
    finish(figure, path, csv_paths(cells))


# --- Text ---
def number(value: float, digits: int = 1) -> str:
    return f"{round(value, digits) + 0.0:,.{digits}f}" if np.isfinite(value) else "-"  # + 0.0: no -0.0


def mean_sd(values: np.ndarray, digits: int = 1) -> str:
    spread = f" ± {number(values.std(ddof=1), digits)}" if len(values) > 1 and np.isfinite(values).all() else ""
    return number(values.mean(), digits) + spread


def with_interval(function: Callable, scores: list[np.ndarray], digits: int) -> str:
    low, high = (number(bound, digits) for bound in interval(function, scores))
    return number(function(scores), digits) + (f" [{low}, {high}]" if min(map(len, scores)) > 1 else "")


def escape(text: str) -> str:
    """A name as text of a table's cell, in which nothing is markup."""
    return re.sub(r"[|<>&`*\\\[\]$~#@]", lambda found: f"&#{ord(found[0])};", one_line(text))


def code(text: str) -> str:
    return f"<code>{escape(text)}</code>" if re.search(r"[`|\\<]", text) else f"`{one_line(text)}`"


def table(header: str | list[str], rows: list[list]) -> str:
    names = header.split(", ") if isinstance(header, str) else header
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in [names, ["---"] * len(names), *rows])


def in_order(columns: dict[tuple, list[Cell]], rank: dict) -> list[str]:
    """The methods: the best mean rank first, otherwise by name."""
    return sorted({c.method for cells in columns.values() for c in cells}, key=lambda m: (rank.get(m, (0,))[0], m))


def overview(columns: dict[tuple, list[Cell]], rank: dict, named: Callable[[str], str]) -> str:
    """Methods by sets. named: how a method's name is written."""
    cells = {(cell.method, key): cell for key, of_set in columns.items() for cell in of_set}
    rows = []
    for method in in_order(columns, rank):
        found = [cells.get((method, key)) for key in columns]
        row = [named(method), *("" if cell is None else mean_sd(cell.facts[cell.key]) for cell in found)]
        if rank:
            mean, bounds = rank[method]
            row.append(number(mean) + ("" if bounds is None else f" [{', '.join(map(number, bounds))}]"))
        rows.append(row)
    heads = []
    for (dataset, updates, _), of_set in columns.items():
        fewest, most = (f([len(cell.runs) for cell in of_set]) for f in (min, max))
        seeds = f"{fewest} to {most} seeds" if fewest < most else f"{most} seed{'s' * (most > 1)}"
        heads.append(f"{escape(dataset)}, {updates} updates, {seeds}")
    return table(["method", *heads, *["rank"] * bool(rank)], rows)


def score_table(cells: list[Cell]) -> str:
    """Of one set."""
    rows = []
    for cell in sorted(cells, key=lambda cell: -cell.facts[cell.key].mean()):
        row = [escape(cell.method), len(cell.runs), mean_sd(cell.facts["score"]), mean_sd(cell.facts["return"])]
        row += [number(cell.facts[f"{what}_{cell.key}"].mean()) for what in ("rise", "best")]
        row += [number(seconds_to_score(cell), 0)]
        row += [number(cell.facts["minutes"].mean()), number(cell.facts["updates_per_second"].mean(), 0)]
        rows.append([*row, number(cell.facts["peak_memory_gb"].max())])
    return table("method, seeds, score, return, rise, best, near, minutes, updates/s, GB", rows)


def displacement_table(cells: list[Cell]) -> str:
    """Mean over the seeds that were displaced; empty where none was."""
    rows = []
    for cell in cells:
        measured = [run.about["displaced"] for run in cell.runs if "displaced" in run.about]
        if measured:
            # (num_seeds, number of forced actions)
            columns = {name: np.array([one[name] for one in measured], dtype=float) for name in DISPLACED}
            row = [escape(cell.dataset), escape(cell.method), len(measured), number(columns["step"][:, 0].mean(), 0)]
            row += map(number, columns["episodes"].mean(axis=0)[[0, -1]])
            row += map(number, columns["return_mean"].mean(axis=0))
            distance = [d[np.isfinite(d)] for d in columns["distance"].T]  # of the seeds that got there
            rows.append(row + [number(d.mean() if len(d) else np.nan, 2) for d in distance])
    names = [f"{what} {num}" for what in ("return", "distance") for num in FORCED]
    return table(f"dataset, method, seeds, step, episodes 0, episodes 15, {', '.join(names)}", rows) if rows else ""


def paired(cells: list[Cell], methods: tuple[str, str], datasets: Iterable[str] = ()) -> list[tuple[Cell, Cell]]:
    """Of each of the datasets, by default of all, where the two methods were run and scored in the same way."""
    one, other = ({cell.protocol: cell for cell in cells if cell.method == m and cell.key == "score"} for m in methods)
    pairs = [(one[name], other[name]) for name in sorted(one.keys() & other.keys())]
    return [pair for pair in pairs if not datasets or pair[0].dataset in datasets]


def comparison(pairs: list[tuple[Cell, Cell]]) -> str:
    """A probability only where both have enough seeds."""
    rows, scores = [], [[cell.facts["score"] for cell in pair] for pair in pairs]
    for (cell, _), both in zip(pairs, scores):
        dataset, updates, last = cell.protocol
        name = f"{escape(dataset)} ({updates} updates, last {last})"
        rows.append([name, *(f"{mean_sd(s)} ({len(s)})" for s in both), both])
    firsts, seconds = map(list, zip(*scores))
    means = [number(float(np.mean([s.mean() for s in column]))) for column in (firsts, seconds)]
    rows.append([f"mean of {len(pairs)}", *means, firsts + seconds])
    rows = [[*row, with_interval(difference, both, 1), probability(both)] for *row, both in rows]
    methods = [escape(cell.method) for cell in pairs[0]]
    return table(["dataset", *methods, "difference", "P(first > second)"], rows)


def probability(scores: list[np.ndarray]) -> str:
    return with_interval(first_better, scores, 2) if min(map(len, scores)) >= FEWEST_SEEDS else "-"


def origin_table(cells: list[Cell]) -> str:
    rows = []
    for cell in cells:
        about = [run.about for run in cell.runs]
        scores = ", ".join(f"{a['seed']}: {number(score)}" for a, score in zip(about, cell.facts["score"]))
        commits, hardware = dict.fromkeys(a["commit"][:7] for a in about), dict.fromkeys(a["hardware"] for a in about)
        row = [escape(cell.dataset), escape(cell.method), scores, code(about[0]["command"])]
        rows.append([*row, escape(", ".join(commits)), escape("; ".join(hardware))])
    return table("dataset, method, score by seed, command of the first, commit, hardware", rows)


def report(cells: list[Cell], columns: dict[tuple, list[Cell]], rank: dict, figures: dict[tuple, str]) -> str:
    parts = ["# Scores", "Written by `python benchmarks/report.py` from the csv files in `runs/`."]
    parts += ["![Methods by sets](scores.png)", overview(columns, rank, escape), LEGEND]
    for key, here in columns.items():
        dataset, updates, last = key
        parts += [f"## {escape(dataset)}, {updates} updates", score_table(here)]
        data = f"{number(here[0].facts['data_score'].mean())} (return {number(here[0].facts['data_return'].mean())})"
        parts += [f"The last {last} evaluations count. The data's own episodes: {data}."]
        parts += [f"![Curves on {escape(dataset)}]({figures[key]})"]
    parts += [OF_A_SET]
    if text := displacement_table(cells):
        parts += ["## Displaced", DISPLACEMENT, text]
    minutes = np.concatenate([cell.facts["minutes"] for cell in cells])
    spent = f"{len(minutes)} runs took {minutes.sum() / 60:.1f} hours, the median run {np.median(minutes):.1f} minutes."
    return "\n\n".join([*parts, "## How the runs were made", spent, origin_table(cells)]) + "\n"


def report_csv(cells: list[Cell]) -> str:
    lines = [
        ["dataset", "algo", "variant", "seeds", "updates", "score_evals", *cells[0].facts, "score_sd", "return_sd"]
    ]
    for cell in cells:
        updates = min(run.columns["update"][-1] for run in cell.runs)
        values = [f.max() if name == "peak_memory_gb" else f.mean() for name, f in cell.facts.items()]
        values += [cell.facts[name].std(ddof=1) if len(cell.runs) > 1 else np.nan for name in ("score", "return")]
        line = [cell.dataset, cell.algo, cell.variant, len(cell.runs), int(updates), cell.protocol[2]]
        lines.append(line + [f"{value:.6g}" if np.isfinite(value) else "" for value in values])
    csv.writer(text := io.StringIO(), lineterminator="\n").writerows(lines)
    return text.getvalue()


def linked(method: str) -> str:
    """A method's name in the README: its script, linked, and the settings that were changed."""
    algo, _, variant = method.partition(" ")
    return f"[{escape(algo)}.py](algos/{safe(algo)}.py){f' {escape(variant)}' * bool(variant)}"


def with_table(path: Path, text: str) -> str:
    """What the file is with `text` as its table."""
    try:
        before, rest = path.read_text(encoding="utf-8").split("<!-- scores -->")
        after = rest.split("<!-- /scores -->")[1]
    except (OSError, ValueError, IndexError) as error:
        raise InputError(f"{path} lacks the lines <!-- scores --> and <!-- /scores --> ({error}): add them") from None
    return f"{before}<!-- scores -->\n\n{text}\n\n<!-- /scores -->{after}"


def figure_names(columns: Iterable[tuple]) -> dict[tuple, str]:
    """Column -> the name of its figure, each another one."""
    names = {}
    for dataset, updates, _ in columns:
        name = safe(f"curves-{dataset}")
        while f"{name}.png" in names.values():
            name += "-2"
        names[dataset, updates, _] = f"{name}.png"
    return names


def main(args: Args) -> int:
    """Exit status: 1 where something is damaged and was left out."""
    if args.datasets and not args.compare:
        raise InputError("--datasets narrows --compare: the report has all of them")
    readme = args.readme or (ROOT / "README.md" if args.out_dir.resolve() == Args.out_dir else None)
    if readme and not args.compare:
        with_table(readme, "")  # says what it lacks before anything is written
    damaged = set()
    if args.runs:
        import_runs(args, damaged)
    cells = read_cells(args.csv_dir, damaged)
    if args.compare:
        pairs = paired(cells, args.compare, args.datasets)
        if missing := set(args.datasets) - {cell.dataset for cell, _ in pairs} or not pairs:
            where = ", ".join(sorted(missing)) if args.datasets else "any dataset"
            known = ", ".join(sorted({cell.method for cell in cells}))
            nothing = f"no scores of both {args.compare[0]} and {args.compare[1]} after the same updates on {where}"
            raise InputError(f"{nothing}: the methods are {known}")
        print(comparison(pairs))
        return int(bool(damaged))
    columns = {}
    for cell in sorted(cells, key=lambda cell: (cell.dataset, -cell.runs[0].about["num_updates"])):
        columns.setdefault(cell.protocol, []).append(cell)
    rank, figures = ranks(columns), figure_names(columns)
    draw_heat(args.out_dir / "scores.png", columns, rank)
    for key, here in columns.items():
        draw_curves(args.out_dir / figures[key], here)
    write_text(args.out_dir / "report.csv", report_csv(cells))
    write_text(args.out_dir / "report.md", report(cells, columns, rank, figures))
    if readme:
        write_text(readme, with_table(readme, overview(columns, rank, linked)))
    print(f"{overview(columns, rank, escape)}\n\n{args.out_dir / 'report.md'}")
    return int(bool(damaged))


if __name__ == "__main__":
    start(main, Args)
