"""From made-up run folders to csv files, report and README, checked against numbers worked out by hand."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from imageio.v3 import immeta

from benchmarks import report
from benchmarks.report import Args
from common.dataset import InputError

ROOT = Path(__file__).resolve().parents[1]


class FakeData:
    episode_returns, ref_scores, data_hash = np.array([-1.0, 3.0]), (0.0, 200.0), "abc"


@pytest.fixture(autouse=True)
def loaded(monkeypatch):
    """Names of the datasets that were looked up; "a" and "b" exist, and return 100 is a normalised score of 50."""
    names = []

    def load(name, device, env_id):
        names.append(name)
        if not name.endswith(("a/v0", "b/v0")):
            raise InputError(f"no {name}")
        return FakeData()

    monkeypatch.setattr(report, "load_dataset", load)
    report.load_data.cache_clear()
    return names


def make_run(
    folder, returns, dataset="a/v0", seed=0, num_updates=None, command="python algos/mopo.py", hash="abc", **more
):
    """A run folder with one evaluation every 10 updates; the score is that of the last two."""
    folder.mkdir(parents=True)
    num_updates = num_updates or 10 * len(returns)
    args = {"dataset": dataset, "env_id": "", "seed": seed, "num_updates": num_updates, "score_evals": 2}
    config = {"algo": "mopo", "args": args, "data_hash": hash, "versions": {"torch": "2"}, "python": "3.11.7"}
    config |= {"commit": "1234567890", "command": command, **more}
    (folder / "config.json").write_text(json.dumps(config))
    with open(folder / "progress.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["update", "seconds", "updates_per_second", "return_mean", "normalised_score", "q"])
        for i, value in enumerate(returns, start=1):
            rows.writerow([10 * i, 60.0 * i, 5.0 + i, value, value / 2, 1 / 3])
    return folder


def call(tmp_path, *runs, **kwargs):
    """Imports and reports into tmp_path; returns the rows of report.csv by (dataset, variant)."""
    report.main(Args(runs=runs, out=tmp_path / "csv", out_dir=tmp_path / "out", **kwargs))
    with open(tmp_path / "out" / "report.csv", newline="") as file:
        return {(row["dataset"], row["variant"]): row for row in csv.DictReader(file)}


def test_scores_are_means_of_the_last_evaluations_and_best_stands_beside_them(tmp_path):
    grid = tmp_path / "grid"
    make_run(grid / "a-v0__mopo__0", [0, 90, 10, 30], seed=0)  # last two: 20
    make_run(grid / "a-v0__mopo__1", [0, 20, 20, 60], seed=1)  # last two: 40
    (grid / "a-v0__mopo__1" / "resources.json").write_text('{"peak_memory_gb": 1.5}')
    row = call(tmp_path, grid)["a/v0", ""]
    assert (row["algo"], row["seeds"], row["updates"], row["score_evals"]) == ("mopo", "2", "40", "2")
    values = {name: float(row[name]) for name in list(row)[6:] if row[name]}
    assert values == pytest.approx(
        {"score": 15, "return": 30, "score_sd": 50**0.5, "return_sd": 200**0.5}  # ddof = 1
        | {"best_score": 37.5, "best_return": 75, "data_score": 0.5, "data_return": 1}
        | {"minutes": 4, "updates_per_second": 7.5},
        rel=1e-5,
    )  # the peak memory of one seed is not known, so that of the cell is not either
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| a/v0 | mopo | 2 | 40 | 2 | 15.0 ± 7.1 | 30.0 ± 14.1 | 37.5 (75.0) | 0.5 (1.0) | 4.0 | 8 | - |" in text
    assert (tmp_path / "out" / "curves-a-v0.png").stat().st_size and (tmp_path / "out" / "profile.png").stat().st_size


def test_a_csv_tells_how_its_run_was_made_and_has_every_column_at_six_digits(tmp_path):
    run = make_run(
        tmp_path / "g" / "a-v0__mopo__penalty-coef=0.0,gamma=0.9__3", [1, 2.123456789], seed=3, hardware="C64"
    )
    (run / "resources.json").write_text('{"peak_memory_gb": 1.5}')
    assert call(tmp_path, run)["a/v0", "penalty-coef=0.0,gamma=0.9"]["peak_memory_gb"] == "1.5"
    path = tmp_path / "csv" / "a-v0__mopo__penalty-coef=0.0,gamma=0.9__3.csv"
    first, *rest = path.read_text().splitlines()
    assert json.loads(first.removeprefix("# ")) == {
        "command": "python algos/mopo.py", "hardware": "C64", "commit": "1234567890", "versions": {"torch": "2"},
        "python": "3.11.7", "algo": "mopo", "data_hash": "abc", "dataset": "a/v0",
        "variant": "penalty-coef=0.0,gamma=0.9", "seed": 3, "num_updates": 20, "score_evals": 2, "behaviour": 1.0,
        "settings": {"env_id": "", "num_updates": 20, "score_evals": 2},
        "ref_scores": [0.0, 200.0], "peak_memory_gb": 1.5,
    }  # fmt: skip
    columns = "update,seconds,updates_per_second,return_mean,normalised_score,q"
    assert rest == [columns, "10,60,6,1,0.5,0.333333", "20,120,7,2.12346,1.06173,0.333333"]


def make_comparison(tmp_path):
    """Scores: on a/v0 10 and 20 against 5 and 15, on b/v0 40 against 50, on c/v0 after other numbers of updates."""
    for dataset, variant, returns in (
        ("a", "", (20, 40)), ("a", "tau=1__", (10, 30)), ("b", "", (80,)), ("b", "tau=1__", (100,)), ("c", "", (80,))
    ):  # fmt: skip
        for seed, value in enumerate(returns):
            name = f"{dataset}-v0__mopo__{variant}{seed}"
            make_run(tmp_path / "g" / name, [value] * 2, dataset=f"{dataset}/v0", seed=seed)
    make_run(tmp_path / "g" / "c-v0__mopo__tau=1__0", [100] * 3, dataset="c/v0")
    return tmp_path / "g"


def test_comparison_has_differences_and_intervals_dataset_by_dataset_and_over_all(tmp_path, capsys):
    call(tmp_path, make_comparison(tmp_path))
    capsys.readouterr()
    args = {"out": tmp_path / "csv", "out_dir": tmp_path / "unused", "compare": ("mopo", "mopo tau=1")}
    report.main(Args(**args))
    # every mean of two draws out of two seeds has a probability of 1/4 or 1/2: the 95 % interval holds all of them
    rows = [
        "| a/v0 (20 updates, last 2) | 15.0 ± 7.1 (2) | 10.0 ± 7.1 (2) | 5.0 [-5.0, 15.0] | 0.75 [0.00, 1.00] |",
        "| b/v0 (20 updates, last 2) | 40.0 (1) | 50.0 (1) | -10.0 | 0.00 |",
    ]
    assert capsys.readouterr().out.splitlines()[2:] == [*rows, "| mean of 2 | 27.5 | 30.0 | -2.5 | 0.38 |"]
    report.main(Args(**args, datasets=("b/v0",)))
    assert capsys.readouterr().out.splitlines()[2:] == [rows[1], "| mean of 1 | 40.0 | 50.0 | -10.0 | 0.00 |"]
    assert not (tmp_path / "unused").exists()
    with pytest.raises(InputError, match="no scores of both mopo and mopo tau=1 after the same updates on c/v0:"):
        report.main(Args(**args, datasets=("a/v0", "c/v0")))
    with pytest.raises(InputError, match="on any dataset: the methods are mopo, mopo tau=1"):
        report.main(Args(**(args | {"compare": ("mopo", "tau=1")})))
    with pytest.raises(InputError, match="--datasets narrows --compare"):
        report.main(Args(out=tmp_path / "csv", datasets=("a/v0",)))


def test_of_many_methods_the_pairs_stand_in_a_matrix(tmp_path):
    for i in range(7):  # the score of the i-th is i on average, its seeds 3 apart
        for seed in range(2):
            folder = tmp_path / "g" / f"a-v0__mopo__tau=0.{i}__{seed}"
            make_run(folder, [2 * i + 6 * seed - 3] * 2, seed=seed)
    call(tmp_path, tmp_path / "g")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "P(A > B) |" not in text
    rows = [line for line in text.splitlines() if line.startswith("| mopo tau=0.2 |")]
    # 0.5 and 3.5 against i - 1.5 and i + 1.5; of the four pairs with i = 5 one is a tie
    assert "| mopo tau=0.2 | 0.75 | 0.75 | 0.50 | 0.25 | 0.25 | 0.12 | 0.00 |" in rows


def test_displaced_agents_have_a_table_where_some_were_displaced(tmp_path):
    for seed, returns in enumerate([(100, 90, 80, 70), (200, 90, 60, 30)]):
        folder = make_run(tmp_path / "g" / str(seed), [1, 2], seed=seed)
        pairs = zip((0, 5, 10, 15), returns)
        rows = [f"{num},{40 + 20 * seed},{value},0.5,{2 * seed + 1 - num / 15},{num / 10}" for num, value in pairs]
        (folder / "displaced.csv").write_text(
            "forced_actions,step,return_mean,return_std,episodes,distance\n" + "\n".join(rows)
        )
    make_run(tmp_path / "g" / "2", [1, 2], seed=2)
    make_run(tmp_path / "g" / "3", [1, 2], dataset="b/v0")
    call(tmp_path, tmp_path / "g")
    text = (tmp_path / "out" / "report.md").read_text().split("## Displaced")[1].split("##")[0]
    rows = [line for line in text.splitlines() if line.startswith("|")][2:]
    assert rows == ["| a/v0 | mopo | 2 | 50 | 2.0 | 1.0 | 150.0 | 90.0 | 70.0 | 50.0 | 0.00 | 0.50 | 1.00 | 1.50 |"]


@pytest.mark.parametrize("name", ["a-v0__mopo__3__20261124-002445-038924", "a-v0__mopo__3", "mine"])
def test_a_name_that_no_grid_gave_tells_no_variant(name, tmp_path):
    assert list(call(tmp_path, make_run(tmp_path / name, [1, 2], seed=3))) == [("a/v0", "")]


def test_unfinished_runs_are_left_out_and_said_unless_partial(tmp_path, capsys):
    grid = tmp_path / "grid"
    make_run(grid / "whole", [1, 2, 3])
    make_run(grid / "cut", [1, 3], seed=1, num_updates=30)
    make_run(grid / "begun", [], seed=2, num_updates=30)
    make_run(grid / "blind", [1, 2, np.nan], seed=3)
    assert call(tmp_path, grid)["a/v0", ""]["seeds"] == "1"
    errors = capsys.readouterr().err.splitlines()
    assert [line.split("grid/")[1] for line in errors] == [
        "begun was evaluated up to update 0 of 30: resume it, or give --partial",
        "blind was not evaluated in an environment",
        "cut was evaluated up to update 20 of 30: resume it, or give --partial",
    ]
    row = call(tmp_path, grid, partial=True)["a/v0", ""]
    assert (row["seeds"], row["updates"], row["return"]) == ("2", "20", "2.25")
    assert "| 20 of 30 |" in (tmp_path / "out" / "report.md").read_text()


def test_seeds_whose_settings_differ_are_not_averaged_but_older_files_without_settings_are(tmp_path):
    for seed in range(3):
        config = json.loads((make_run(tmp_path / "g" / str(seed), [1, 2], seed=seed) / "config.json").read_text())
        config["args"] |= {"gamma": 0.9 if seed == 2 else 0.99, "num_threads": seed, "compile": seed == 1}
        (tmp_path / "g" / str(seed) / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="g/0 and .*g/2 differ in gamma: no mean"):
        call(tmp_path, tmp_path / "g")
    assert not (tmp_path / "csv").exists()  # what is refused leaves nothing
    for seed in range(3):
        report.main(Args(runs=(tmp_path / "g" / str(seed),), out=tmp_path / f"csv{seed}", out_dir=tmp_path / "out"))
    for seed in (1, 2):
        (tmp_path / f"csv{seed}" / f"a-v0__mopo__{seed}.csv").rename(tmp_path / "csv0" / f"a-v0__mopo__{seed}.csv")
    with pytest.raises(InputError, match="csv0/a-v0__mopo__0.csv and .*__2.csv differ in gamma"):
        report.main(Args(out=tmp_path / "csv0", out_dir=tmp_path / "out"))
    (tmp_path / "csv0").rename(tmp_path / "csv")
    for path in (tmp_path / "csv").glob("*.csv"):
        first, _, rest = path.read_text().partition("\n")
        about = json.loads(first.removeprefix("# "))
        del about["settings"]
        path.write_text(f"# {json.dumps(about)}\n{rest}")
    assert call(tmp_path)["a/v0", ""]["seeds"] == "3"


def test_networks_are_compared_with_those_of_runs_that_told_layers_of_256_units(tmp_path):
    def run(seed: int, **sizes) -> Path:
        folder = make_run(tmp_path / str(seed), [1, 2], seed=seed)
        config = json.loads((folder / "config.json").read_text())
        config["args"] |= sizes
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    runs = run(0, hidden_layers=2), run(1, hidden_sizes=[256, 256])
    assert call(tmp_path, *runs)["a/v0", ""]["seeds"] == "2"
    for other in (run(2, hidden_layers=3), run(3, hidden_sizes=[64, 64])):
        with pytest.raises(InputError, match="differ in hidden_sizes: no mean"):
            call(tmp_path, other)


def test_the_readme_shows_a_scripts_own_settings_or_where_there_are_none_the_least_changed(tmp_path):
    for variant, dataset in (("", "a/v0"), ("tau=1", "a/v0"), ("tau=1,gamma=0.9", "b/v0"), ("tau=2", "b/v0")):
        name = f"{dataset.replace('/', '-')}__mopo__{variant}__0".replace("____", "__")
        make_run(tmp_path / "g" / name, [1, 2], dataset=dataset)
    (tmp_path / "x.md").write_text("before\n<!-- scores -->\nold\n<!-- /scores -->\nafter\n")
    call(tmp_path, tmp_path / "g", readme=tmp_path / "x.md")
    text = (tmp_path / "x.md").read_text()
    assert text.startswith("before\n<!-- scores -->\n") and text.endswith("<!-- /scores -->\nafter\n")
    script = "[mopo.py](algos/mopo.py)"
    assert [line.split(" | ")[:2] for line in text.splitlines() if "/v0" in line] == [
        ["| a/v0", script],
        ["| b/v0", f"{script} tau=2"],
    ]


def test_many_variants_of_one_method_are_drawn(tmp_path):
    for i in range(11):
        make_run(tmp_path / "g" / f"a-v0__mopo__tau=0.{i}__0", [1, 2])
    assert len(call(tmp_path, tmp_path / "g")) == 11 and (tmp_path / "out" / "scores-a-v0.png").stat().st_size


def test_a_csv_is_replaced_by_the_same_run_alone(tmp_path):
    def error(folder):
        before = path.read_text()
        with pytest.raises(InputError) as caught:
            call(tmp_path, folder, partial=True)
        assert path.read_text() == before
        return str(caught.value).replace(str(tmp_path), "T")

    path, end = tmp_path / "csv" / "a-v0__mopo__0.csv", ": import it into another --out, or delete that first"
    call(tmp_path, make_run(tmp_path / "g", [1.23456789, 2], num_updates=30), partial=True)
    shorter = make_run(tmp_path / "shorter", [1.23456789], num_updates=30)
    assert error(shorter) == f"T/shorter differs from T/csv/a-v0__mopo__0.csv in evaluations{end}"
    other = make_run(tmp_path / "other", [1.23456789, 2.5, 3])  # by other code, or on another machine
    assert error(other) == f"T/other differs from T/csv/a-v0__mopo__0.csv in evaluations{end}"
    longer = make_run(tmp_path / "longer", [1.23456789, 2, 3, 4])
    assert error(longer) == f"T/longer differs from T/csv/a-v0__mopo__0.csv in num_updates{end}"
    whole = make_run(tmp_path / "whole", [1.23456789, 2, 3])
    text = (whole / "progress.csv").read_text()
    (whole / "progress.csv").write_text(text.replace("60.0", "61.0"))  # another time: its first part was resumed
    assert call(tmp_path, whole)["a/v0", ""]["updates"] == "30"


def test_commands_name_no_folder_of_a_machine():
    def public(flags, script="python algos/mopo.py", **args):
        command = report.public_command({"algo": "mopo", "command": f"{script} {flags}", "args": args})
        assert command.startswith("python algos/mopo.py ")
        return command.removeprefix("python algos/mopo.py ")

    flags = "--dataset /home/me/hopper_medium-v2.hdf5 --run-dir /home/me/x --seed 1 --run_name=n --no-compile"
    assert public(flags) == "--dataset hopper_medium-v2.hdf5 --seed 1 --no-compile"
    assert public("--dataset=data/my.npz --gamma .9") == "--dataset=my.npz --gamma .9"
    assert public("--dataset a/v0", script="/home/me/x/algos/mopo.py") == "--dataset a/v0"
    # a resumed run's settings are in its folder: all that are not the script's defaults, or that TUNED may set
    args = {"dataset": "a/v0", "seed": 4, "gamma": 0.99, "compile": False, "penalty_coef": 1.0, "max_alpha": np.inf}
    resumed = public("--resume /home/me/x/run", **args, run_dir="/home/me/x", run_name="run")
    assert resumed == "--dataset=a/v0 --seed=4 --no-compile --penalty-coef=1.0 --max-alpha=inf"
    assert public("--resume /home/me/x/run", hidden_sizes=[64, 32], seed=1) == "--hidden-sizes 64 32 --seed=1"
    assert public("--hidden-sizes 64 32 --run-dir x --seed 1") == "--hidden-sizes 64 32 --seed 1"


def test_data_that_cannot_be_loaded_or_changed_leave_their_mean_out(tmp_path, capsys, loaded):
    make_run(tmp_path / "g" / "0", [1, 2], dataset="/home/me/gone.hdf5")
    make_run(tmp_path / "g" / "1", [1, 2], dataset="/home/me/gone.hdf5", seed=1)
    make_run(tmp_path / "g" / "2", [1, 2], dataset="b/v0", hash="other")
    rows = call(tmp_path, tmp_path / "g")
    assert set(rows) == {("gone.hdf5", ""), ("b/v0", "")}
    assert {row["data_return"] for row in rows.values()} == {""} and loaded == ["/home/me/gone.hdf5", "b/v0"]
    errors = capsys.readouterr().err
    assert "the mean of /home/me/gone.hdf5 is left out (no /home/me/gone.hdf5)" in errors
    assert "b/v0 is not what" in errors


def test_interquartile_mean_is_of_the_middle_half_and_every_dataset_weighs_the_same():
    scores = [np.array([0.0, 1, 2, 3]), np.array([10.0, 11, 12, 100])]
    assert report.interquartile_mean(scores) == pytest.approx((2 + 3 + 10 + 11) / 4)
    # of three runs the outer ones lie a quarter of themselves within the middle half
    assert report.interquartile_mean([np.array([1.0, 6, 2])]) == pytest.approx((1 / 4 * 1 + 2 + 1 / 4 * 6) / 1.5)
    few, many = np.array([6.0, 8]), np.array([2.0, 4, 2, 4, 2, 4, 2, 4])
    assert report.interquartile_mean([few, many]) == pytest.approx((4 + 6) / 2)
    draws = report.interquartile_mean([np.array([[3.0, 1], [5, 5]]), np.array([[2.0, 2], [0, 0]])])
    assert draws.tolist() == pytest.approx([2, 2.5])


def test_improvement_counts_pairs_on_the_same_dataset_and_ties_half():
    # 1: 3 > 1, 3 > 2, 2 > 1, 2 = 2: 3.5 of 4; 2: 0 of 2
    scores, others = [np.array([3.0, 2]), np.array([0.0])], [np.array([1.0, 2]), np.array([5.0, 6])]
    assert report.improvement(scores, others) == (3.5 / 4 + 0) / 2
    assert report.improvement(others, scores) == 1 - (3.5 / 4 + 0) / 2


def test_profile_is_the_share_of_runs_above_a_threshold_averaged_over_datasets():
    scores = [np.array([1.0, 2, 3, 4]), np.array([3.0])]
    assert report.profile(scores, np.array([0.0, 1.0, 3.0, 4.0])).tolist() == [1, (3 / 4 + 1) / 2, 1 / 8, 0]


def test_bootstrap_draws_seeds_within_each_dataset_and_its_interval_is_that_of_a_mean():
    draws = report.bootstrap([np.array([1.0, 2, 3]), np.array([10.0, 20])])
    assert [d.shape for d in draws] == [(report.NUM_DRAWS, 3), (report.NUM_DRAWS, 2)]
    assert set(draws[0].ravel()) == {1, 2, 3} and set(draws[1].ravel()) == {10, 20}
    scores = np.random.default_rng(0).normal(size=400)
    low, high = report.interval(lambda s: s[0].mean(axis=-1), [scores])
    assert (low, high) == pytest.approx(scores.mean() + np.array([-1.96, 1.96]) * scores.std() / 20, abs=0.01)


def test_methods_are_compared_on_the_datasets_that_they_share(tmp_path):
    grid = tmp_path / "grid"
    make_run(grid / "a-v0__mopo__0", [2, 2])
    make_run(grid / "b-v0__mopo__0", [6, 6], dataset="b/v0")
    make_run(grid / "a-v0__mopo__x=1__0", [8, 8])
    make_run(grid / "b-v0__mopo__x=1__0", [8, 8, 8], dataset="b/v0")  # longer: no comparison
    call(tmp_path, grid)
    run = " (20 updates, last 2)"
    groups = report.comparable(report.read_cells(tmp_path / "csv"))
    longer = "b/v0 (30 updates, last 2)"
    assert [
        (names, {m: [s.tolist() for s in scores] for m, scores in methods.items()}) for names, methods in groups
    ] == [
        ((f"a/v0{run}", f"b/v0{run}"), {"mopo": [[1], [3]]}),
        ((f"a/v0{run}", longer), {"mopo x=1": [[4], [4]]}),
        ((f"a/v0{run}",), {"mopo": [[1]], "mopo x=1": [[4]]}),
    ]
    text = (tmp_path / "out" / "report.md").read_text()
    assert f"### a/v0{run}, b/v0{run}\n\n| method | runs | IQM |\n| --- | --- | --- |\n| mopo | 1 + 1 | 2.0 |\n" in text
    assert "| mopo | mopo x=1 | 0.00 |\n" in text  # no intervals from one seed


def test_the_same_runs_give_the_same_files(tmp_path):
    make_run(tmp_path / "g" / "a-v0__mopo__0", [1, 2, 4])
    make_run(tmp_path / "g" / "a-v0__mopo__1", [1, 3, 3], seed=1)
    outputs = []
    for _ in range(2):
        call(tmp_path, tmp_path / "g")
        outputs.append({path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()})
    assert outputs[0] == outputs[1] and len(outputs[0]) == 5


def test_bad_input_is_said_in_one_sentence(tmp_path):
    def error(*runs, **kwargs):
        with pytest.raises(InputError) as caught:
            call(tmp_path, *runs, **kwargs)
        message = str(caught.value).replace(str(tmp_path), "T")
        assert "\n" not in message
        return message

    (tmp_path / "empty").mkdir()
    assert error(tmp_path / "empty", tmp_path / "no") == (
        "no run folder in T/empty, T/no: one holds config.json and progress.csv"
    )
    assert error() == "no csv of a run in T/csv: give run folders to import"
    make_run(tmp_path / "g" / "0", [1, 2])
    make_run(tmp_path / "h" / "1", [1, 2])
    assert error(tmp_path / "g", tmp_path / "h") == (
        "T/g/0 and T/h/1 are the same seed of the same cell: give one of them"
    )
    call(tmp_path, tmp_path / "h")
    make_run(tmp_path / "k" / "1", [1, 2], seed=1, hash="other")
    assert error(tmp_path / "k") == (
        "T/csv/a-v0__mopo__0.csv and T/k/1 differ in data_hash: no mean over them makes sense, move one into another "
        "--out"
    )
    (tmp_path / "csv" / "a-v0__mopo__1.csv").write_text("update,seconds\n1,2\n")
    assert error().startswith("T/csv/a-v0__mopo__1.csv is no csv of a run (JSONDecodeError")
    (tmp_path / "csv" / "a-v0__mopo__1.csv").unlink()
    (tmp_path / "x.md").write_text("no markers")
    assert error(readme=tmp_path / "x.md").startswith("T/x.md lacks the lines <!-- scores --> and <!-- /scores -->")
    (tmp_path / "g" / "0" / "config.json").write_text("{}")
    assert error(tmp_path / "g").startswith("T/g/0 holds no readable run (KeyError('args')): remove it")


def test_the_command_ends_with_status_1_and_no_traceback_on_bad_input(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "report.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"})
    assert done.returncode == 1
    assert done.stderr == f"error: no run folder in {tmp_path}: one holds config.json and progress.csv\n"


def test_committed_report_and_readme_are_what_the_committed_runs_give(tmp_path):
    (tmp_path / "README.md").write_text((ROOT / "README.md").read_text())
    report.main(Args(out_dir=tmp_path, readme=tmp_path / "README.md"))
    for name in ("report.md", "report.csv"):
        assert (tmp_path / name).read_text() == (ROOT / "benchmarks" / "results" / name).read_text()
    assert (tmp_path / "README.md").read_text() == (ROOT / "README.md").read_text()
    results, names = ROOT / "benchmarks" / "results", {path.name for path in tmp_path.glob("*.png")}
    assert names | {"toy-recovery.png"} == {path.name for path in results.glob("*.png")} and len(names) >= 3
    for name in names:  # made from these very runs; pixels may differ from machine to machine
        assert immeta(tmp_path / name)["Source"] == immeta(results / name)["Source"], name
