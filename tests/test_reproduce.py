"""The gate: its interval against tables and the committed seeds, its answers for right, wrong and missing runs."""

import itertools
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import reproduce
from benchmarks.report import RESULTS, read_cells
from benchmarks.reproduce import Args, prediction_interval, t_quantile
from common import InputError
from tests.test_report import make_run

ROOT = Path(__file__).resolve().parents[1]
RANDOM_DATA = "3451fb796ecb5a8a9918b55a116c19f0"  # as in every csv of pendulum/random-v0


@pytest.mark.parametrize("df, value", [(1, 12.706), (2, 4.303), (4, 2.776), (8, 2.306), (30, 2.042)])
def test_quantiles_of_students_t_are_those_of_the_tables(df, value):
    assert t_quantile(0.95, df) == pytest.approx(value, abs=1e-3)


def test_the_interval_by_hand():
    # own variance 4, the others' median 9: s^2 = (2 * 4 + 9) / 3 and 3 degrees of freedom
    low, high = prediction_interval(np.array([8.0, 10.0, 12.0]), [4.0, 9.0, 400.0])
    half = 3.182 * np.sqrt(17 / 3 * (1 + 1 / 3))
    assert (low, high) == pytest.approx((10 - half, 10 + half), abs=5e-3)


@pytest.mark.parametrize("n, least", [(2, 0.915), (3, 0.915), (4, 0.945)])
def test_it_holds_the_share_of_the_committed_seeds_that_the_module_says(n, least):
    cells = [cell for cell in read_cells(RESULTS / "default" / "runs", set()) if not cell.variant]
    scores, inside = np.array([cell.facts["score"] for cell in cells]), []
    for chosen in itertools.combinations(range(5), n):
        known, left = scores[:, chosen], np.delete(scores, chosen, axis=1)
        variances = known.var(axis=1, ddof=1).tolist()
        for of_cell, others in zip(known, left):
            low, high = prediction_interval(of_cell, variances)
            inside += [low <= other <= high for other in others]
    assert least < np.mean(inside) < 0.975


@pytest.fixture
def gate(tmp_path, monkeypatch):
    """main() with results of three seeds at scores of about 100, and a trained run of the score that is given."""
    returns = {0: -152.0, 1: -150.0, 2: -148.0}
    for algo in ("mopo", "bc"):
        for seed, value in returns.items():
            args = {"dataset": "pendulum/random-v0", "env_id": "", "seed": seed, "num_updates": 20, "score_evals": 2}
            folder = tmp_path / "made" / f"pendulum-random-v0__{algo}__{seed}"
            scored(make_run(folder, [value] * 2, args=args, algo=algo, hash=RANDOM_DATA))
    from benchmarks import report

    report.import_runs(report.Args((tmp_path / "made",), out_dir=tmp_path / "results" / "default"), set())
    monkeypatch.setattr(reproduce, "RESULTS", tmp_path / "results")

    def call(value: float, **kwargs) -> int:
        def train(run, code):
            args = {"dataset": "pendulum/random-v0", "env_id": "", "seed": 1000, "num_updates": 20, "score_evals": 2}
            scored(make_run(run.folder, [value] * 2, args=args))

        monkeypatch.setattr(reproduce, "train", train)
        args = {"dataset": "pendulum/random", "method": "mopo", "smoke": True, "run_dir": tmp_path / "runs"} | kwargs
        return reproduce.main(Args(**args))

    # the made results tell other lengths than the grid's
    monkeypatch.setattr(reproduce, "planned_run", planned(reproduce.planned_run))
    return call


def planned(real):
    def run(args, dataset):
        made = real(args, dataset)
        made.settings |= {"num_updates": 20, "score_evals": 2}
        return made

    return run


def scored(folder):
    """progress.csv with Pendulum's normalised scores."""
    head, *rows = (folder / "progress.csv").read_text().splitlines()
    at = head.split(",").index("normalised_score")
    rows = [row.split(",") for row in rows]
    for row in rows:
        row[at] = str((float(row[at - 1]) + 1230) / 10.8)
    (folder / "progress.csv").write_text("\n".join([head, *map(",".join, rows)]) + "\n")
    return folder


def test_a_score_inside_is_status_0_and_one_outside_1(gate, capsys):
    assert gate(-149.0) == 0
    assert "100.1, inside; 3 seeds 100.0 ± 0.2, interval of one more 99.3 to 100.7" in capsys.readouterr().out
    assert gate(-400.0, seed=1001) == 1 and "76.9, OUTSIDE" in capsys.readouterr().out


def test_what_cannot_be_judged_is_one_sentence(gate, tmp_path):
    def error(**kwargs) -> str:
        with pytest.raises(InputError) as caught:
            gate(-150.0, **kwargs)
        return str(caught.value)

    assert "--seed 2 is one of the grid's" in error(seed=2)
    assert "has no mopo on hopper/x-v0: its methods are bc, " in error(dataset="hopper/x")
    assert "no.py: name a script of algos/" in error(method="no")
    assert "cql has 0 seeds on pendulum/random-v0" in error(method="cql")
    for seed in (1, 2):
        (tmp_path / "results" / "default" / "runs" / f"pendulum-random-v0__mopo__{seed}.csv").unlink()
    assert "mopo has 1 seeds on pendulum/random-v0" in error()


def test_results_of_other_settings_are_refused(gate, tmp_path):
    for path in (tmp_path / "results" / "default" / "runs").glob("*mopo*"):
        path.write_text(path.read_text().replace('"score_evals": 2, ', '"score_evals": 2, "penalty_coef": 7.0, ', 1))
        path.write_text(path.read_text().replace('"settings": {', '"settings": {"penalty_coef": 7.0, '))
    with pytest.raises(InputError, match="was made with penalty_coef 7.0, the grid says 0.5"):
        gate(-150.0)


def test_seeds_that_had_other_data_are_refused_before_anything_is_trained(gate, tmp_path):
    for path in (tmp_path / "results" / "default" / "runs").glob("*mopo*"):
        path.write_text(path.read_text().replace(RANDOM_DATA, "0" * 32))
    with pytest.raises(InputError, match=f"has the hash {RANDOM_DATA} here, the grid's seeds had 0{{32}}"):
        gate(-150.0)
    assert not (tmp_path / "runs").exists()


def test_edited_code_has_a_folder_of_its_own_and_the_same_code_goes_on(tmp_path):
    def run():
        return reproduce.planned_run(Args("pendulum/spin", "mopo", code=copy), "pendulum/spin-v0")

    own = reproduce.planned_run(Args("pendulum/spin", "mopo"), "pendulum/spin-v0")
    for part in ("algos", "common"):
        shutil.copytree(ROOT / part, (copy := tmp_path / "copy") / part)
    assert run().folder == own.folder and own.folder.name.endswith("__pendulum-spin-v0__mopo__1000")
    for part in ("algos/mopo.py", "common/dynamics.py"):
        before = run().folder
        (copy / part).write_text((copy / part).read_text() + "\n")
        assert run().folder not in (before, own.folder)
    assert own.flags[own.flags.index("--seed") + 1] == "1000" and own.settings["seed"] == 1000
    assert own.settings["num_updates"] == 60_000


def test_the_other_checkouts_script_is_trained_and_a_run_that_fails_is_no_score(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(
        reproduce.subprocess, "run", lambda command: commands.append(command) or SimpleNamespace(returncode=1)
    )
    args = Args("pendulum/random", "mopo", smoke=True, code=tmp_path, run_dir=tmp_path / "runs")
    with pytest.raises(InputError, match="the run did not end: the same command goes on"):
        reproduce.train(reproduce.planned_run(args, "pendulum/random-v0"), tmp_path)
    assert commands[0][1] == str(tmp_path / "algos" / "mopo.py")
