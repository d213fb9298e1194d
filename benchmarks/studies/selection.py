"""Which criterion of benchmarks/select_run.py finds the good runs, where their scores are known?

Of finished runs that were evaluated while they were trained: the score of report.py (mean of the last evaluations,
normalised), which select_run.py never sees, against each criterion, set by set.

    Spearman    correlation of ranks, over the runs that the criterion knows
    regret      score of the best run less that of the one which the criterion would take, in points
    of five     the mean regret where the choice is only among five of the runs, drawn 2,000 times

The criterion with the least mean regret over the sets should be select_run.py's default. Leaving one set out judges
that rule: the criterion is chosen on the other sets, and its regret is taken on the one left out. What a run was
measured at stays in the cache of select_run.py, so that a stopped study goes on where it was.
Run: python benchmarks/studies/selection.py runs/bench runs/bench-pilot --trust
"""

import csv
import io
import math
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from benchmarks import select_run  # noqa: E402
from benchmarks.files import HomePaths, one_line, start, write_text  # noqa: E402
from benchmarks.model_measures import spearman  # noqa: E402
from benchmarks.report import RESULTS, number, read_folder, table  # noqa: E402
from benchmarks.select_run import CRITERIA, Finished, Judge, data_of, finished_runs, measured  # noqa: E402
from common import InputError  # noqa: E402
from common.machine import keep_freed_memory  # noqa: E402

NUM_SUBSETS, OF = 2_000, 5
MAX_EPOCHS = 20  # of the judge's ensemble: as many as the runs' own had that the table stands on
COLUMNS = ("dataset", "algo", "variant", "seed", "updates", "score", *CRITERIA, "impossible")
NOTE = """\
Written by `python benchmarks/studies/selection.py`, whose head defines the columns; the criteria are defined at the
head of select_run.py. It stands on {runs} runs of {sets} sets ({by_set}), each a row of [selection.csv](selection.csv).
The ensemble that judges was fitted for {max_epochs} epochs, and so were the runs' own: the bench has
[longer fits](README.md#what-a-short-fit-costs) now.

**The least mean regret has {best}**: {regret} points below a set's best run, against {random} for a random run. Among
{of} runs drawn at random the least is {regret_of_few} ({best_of_few}), against {random_of_few}. A criterion chosen on
the other sets has a mean regret of {left_out} on the one left out.
"""
READING = """\
A value above what the data's rewards allow counts as unknown and ranks its run last: {impossible}. If such values
counted, the mean regrets would be {plain}. Where a criterion knows no run of a set, its regret is that of a run at
random. With {sets} sets one bad choice moves a mean by up to {step} points: the order of criteria whose means are
closer than that is not settled. The runs of a set differ in method and seed, and some in the number of updates: seeds
from 100 on are those of [the pilot](bench-pilot.md), 60,000 updates of four methods.
"""


@dataclass
class Args(HomePaths):
    runs: tyro.conf.Positional[tuple[Path, ...]]  # finished runs of several datasets, or folders of them
    out: Path = RESULTS  # where selection.md and selection.csv are written
    add: bool = False  # to the rows of selection.csv, in the place of the same runs' rows
    trust: bool = False  # import the modules that a run's folder or its data name: code of whoever made them


# --- Statistics: score and merit (runs,), merit nan where the criterion knows nothing ---
def regret(score: np.ndarray, merit: np.ndarray) -> float:
    """Where nothing is known any run may be taken: that of the mean."""
    known = np.isfinite(merit)
    taken = score[np.where(known, merit, -np.inf).argmax()] if known.any() else score.mean()
    return float(score.max() - taken)


def regret_of_few(score: np.ndarray, merit: np.ndarray) -> float:
    """Mean over subsets of OF runs, the same ones for every criterion."""
    rng, of = np.random.default_rng(0), min(OF, len(score))
    subsets = (rng.choice(len(score), of, replace=False) for _ in range(NUM_SUBSETS))
    return float(np.mean([regret(score[rows], merit[rows]) for rows in subsets]))


def correlation(score: np.ndarray, merit: np.ndarray) -> float:
    known = np.isfinite(merit)
    return spearman(score[known], merit[known]) if known.sum() > 2 else math.nan


def least(regrets: dict[str, dict[str, float]], sets: list[str]) -> str:
    """The criterion with the least mean over `sets`. regrets: criterion -> set -> points."""
    return min(CRITERIA, key=lambda name: np.mean([regrets[name][one] for one in sets]))


def regrets_of(rows: list[dict], how=regret) -> dict[str, dict[str, float]]:
    """criterion -> set -> points, and "random" the mean of all runs."""
    found = {name: {} for name in (*CRITERIA, "random")}
    for dataset in sets_of(rows):
        here = [row for row in rows if row["dataset"] == dataset]
        score = scores(here)
        for name in CRITERIA:
            found[name][dataset] = how(score, merits(here, name))
        found["random"][dataset] = how(score, np.full(len(score), np.nan))
    return found


def scores(rows: list[dict]) -> np.ndarray:
    return np.array([row["score"] for row in rows])


def merits(rows: list[dict], name: str) -> np.ndarray:
    return np.array([select_run.merit(row, name, row["impossible"].split()) for row in rows])


def sets_of(rows: list[dict]) -> list[str]:
    return list(dict.fromkeys(row["dataset"] for row in rows))


# --- Measuring ---
def measure(runs: list[Finished], trust: bool) -> list[dict]:
    """The rows of one dataset. Raises InputError where it has no two runs with a score."""
    rows, judge = [], Judge(data_of(runs, trust), select_run.Args(runs=(), dynamics_max_epochs=MAX_EPOCHS))
    for run in tqdm(runs, unit="run", desc=judge.data.name, mininterval=10):
        kept = read_folder(run.folder)
        score = kept.facts()["score"]
        if not math.isfinite(score):
            raise InputError(
                f"{run.folder} has no normalised score: it was not evaluated, or in an unknown environment"
            )
        row = {name: kept.about[name] for name in ("dataset", "algo", "variant", "seed")}
        row |= {"updates": kept.about["num_updates"], "score": score} | select_run.means(measured(judge, run))
        rows.append(row | {"impossible": " ".join(select_run.impossible(row, judge.most(run)))})
    return rows


def read_rows(file: Path) -> list[dict]:
    """Of a selection.csv."""
    with open(file, newline="") as opened:
        rows = list(csv.DictReader(opened))
    return [row | {name: float(row[name] or "nan") for name in ("score", *CRITERIA)} for row in rows]


def run_of(row: dict) -> list[str]:
    return [str(row[name]) for name in COLUMNS[: COLUMNS.index("score")]]


def csv_of(rows: list[dict]) -> str:
    out = csv.DictWriter(text := io.StringIO(), COLUMNS, lineterminator="\n")
    out.writeheader()
    for row in rows:
        digits = {name: f"{row[name]:.6g}" if math.isfinite(row[name]) else "" for name in ("score", *CRITERIA)}
        out.writerow(row | digits)
    return text.getvalue()


# --- Text ---
def mean(by_set: dict[str, float]) -> float:
    """Of those that are known."""
    known = [value for value in by_set.values() if math.isfinite(value)]
    return float(np.mean(known)) if known else math.nan


def by_set_table(found: dict[str, dict[str, float]], digits: int) -> str:
    rows = [
        [name, *(number(v, digits) for v in by_set.values()), number(mean(by_set), digits)]
        for name, by_set in found.items()
    ]
    return table(["criterion", *next(iter(found.values())), "mean"], rows)


def taken_table(rows: list[dict]) -> str:
    """Method, seed and score of the run that each criterion takes, and of the best one."""
    by_set = {one: [row for row in rows if row["dataset"] == one] for one in sets_of(rows)}
    lines = []
    for name in (*CRITERIA, "the best"):
        merit = {one: scores(here) if name == "the best" else merits(here, name) for one, here in by_set.items()}
        taken = [
            here[int(np.nanargmax(merit[one]))] if np.isfinite(merit[one]).any() else None
            for one, here in by_set.items()
        ]
        lines.append([name, *(row and f"{row['algo']} {row['seed']} ({number(row['score'])})" for row in taken)])
    return table(["criterion", *by_set], lines)


def correlations_of(rows: list[dict]) -> dict[str, dict[str, float]]:
    """criterion -> set -> Spearman"""
    by_set = {one: [row for row in rows if row["dataset"] == one] for one in sets_of(rows)}
    return {
        name: {one: correlation(scores(here), merits(here, name)) for one, here in by_set.items()} for name in CRITERIA
    }


def leaving_out(regrets: dict[str, dict[str, float]]) -> dict[str, str]:
    """set -> the criterion that the others choose"""
    sets = list(regrets["random"])
    return {one: least(regrets, [other for other in sets if other != one]) for one in sets if len(sets) > 1}


def left_out_table(regrets: dict[str, dict[str, float]]) -> str:
    rows = []
    for one, name in leaving_out(regrets).items():
        best = min(regrets[criterion][one] for criterion in CRITERIA)
        rows.append([one, name, *map(number, (regrets[name][one], best, regrets["random"][one]))])
    return table("set left out, criterion by the others, its regret there, least regret there, random", rows)


def wrapped(text: str) -> str:
    paragraphs = (" ".join(part.split()) for part in text.split("\n\n"))
    return "\n\n".join(textwrap.fill(part, 120, break_long_words=False, break_on_hyphens=False) for part in paragraphs)


def report(rows: list[dict]) -> str:
    regrets, of_few, sets = regrets_of(rows), regrets_of(rows, regret_of_few), sets_of(rows)
    best, methods = least(regrets, sets), {one: [row["algo"] for row in rows if row["dataset"] == one] for one in sets}
    equals = [name for name in CRITERIA if mean(regrets[name]) == mean(regrets[best])]
    unlikely = {name: sum(name in row["impossible"].split() for row in rows) for name in CRITERIA}
    plain = regrets_of([row | {"impossible": ""} for row in rows])
    words = {
        "runs": len(rows), "sets": len(sets), "max_epochs": MAX_EPOCHS,
        "by_set": ", ".join(f"{one} {len(by)} of {len(set(by))} methods" for one, by in methods.items()),
        "best": " and ".join(equals), "regret": number(mean(regrets[best])), "random": number(mean(regrets["random"])),
        "of": OF, "best_of_few": least(of_few, sets), "regret_of_few": number(min(mean(of_few[n]) for n in CRITERIA)),
        "random_of_few": number(mean(of_few["random"])),
        "left_out": number(mean({one: regrets[name][one] for one, name in leaving_out(regrets).items()})),
        "impossible": ", ".join(f"{count} times {name}" for name, count in unlikely.items() if count) or "nothing",
        "plain": ", ".join(f"{name} {number(mean(plain[name]))}" for name in CRITERIA),
        "step": number(max(max(by_set.values()) for by_set in regrets.values()) / len(sets)),
    }  # fmt: skip
    parts = ["# Which criterion finds the good runs", wrapped(NOTE.format(**words))]
    parts += ["Regret where the choice is among all runs of a set:", by_set_table(regrets, 1)]
    parts += ["The run that each takes, with its seed and score:", taken_table(rows)]
    parts += [f"Regret among {OF} runs drawn at random:", by_set_table(of_few, 1)]
    parts += ["Spearman's correlation with the score:", by_set_table(correlations_of(rows), 2)]
    parts += ["Leaving one set out:", left_out_table(regrets), wrapped(READING.format(**words))]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def main(args: Args) -> None:
    keep_freed_memory()
    by_data = {}
    for run in finished_runs(args.runs, args.trust):
        by_data.setdefault(run.args["dataset"], []).append(run)
    rows = []
    for dataset, runs in sorted(by_data.items()):
        if len(runs) < 2:
            print(one_line(f"left out: {dataset} has a single finished run"), file=sys.stderr)
        else:
            rows += measure(runs, args.trust)
    if not rows:
        raise InputError("no dataset has two finished runs: a criterion can only be judged where there is a choice")
    if args.add:
        measured_now, before = [run_of(row) for row in rows], read_rows(args.out / "selection.csv")
        rows += [row for row in before if run_of(row) not in measured_now]
        rows.sort(key=lambda row: row["dataset"])
    write_text(args.out / "selection.csv", csv_of(rows))
    rows = read_rows(args.out / "selection.csv")  # the text is of the digits that are kept
    text = report(rows)
    write_text(args.out / "selection.md", text)
    print(text)
    best = least(regrets_of(rows), sets_of(rows))
    if best != select_run.DEFAULT:
        print(f"{best} has the least mean regret and select_run.DEFAULT is {select_run.DEFAULT}: change it there")


if __name__ == "__main__":
    start(main, Args)
