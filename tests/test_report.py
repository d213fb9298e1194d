"""From made-up run folders to csv files, report and README, checked against numbers worked out by hand."""

import csv
import json
import os
import shutil
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


DATA = {"behaviour_return": 1.0, "ref_scores": [0.0, 200.0], "env": "A-v0"}  # return 100 is a normalised score of 50


def make_run(
    folder, returns, dataset="a/v0", seed=0, num_updates=None, command="python algos/mopo.py", hash="abc", **more
):
    """A run folder with one evaluation every 10 updates; the score is that of the last two."""
    folder.mkdir(parents=True)
    num_updates = num_updates or 10 * len(returns)
    args = {"dataset": dataset, "env_id": "", "seed": seed, "num_updates": num_updates, "score_evals": 2}
    config = {"algo": "mopo", "args": args, "data_hash": hash, "versions": {"torch": "2"}, "python": "3.11.7"}
    config |= {"commit": "1234567890", "command": command} | DATA | more
    (folder / "config.json").write_text(json.dumps(config))
    with open(folder / "progress.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["update", "seconds", "updates_per_second", "return_mean", "normalised_score", "q"])
        for i, value in enumerate(returns, start=1):
            rows.writerow([10 * i, 60.0 * i, 5.0 + i, value, value / 2, 1 / 3])
    return folder


def call(tmp_path, *runs, **kwargs):
    """Imports and reports into tmp_path; returns the rows of report.csv by (dataset, variant)."""
    report.main(Args(runs=runs, out_dir=tmp_path / "out", **kwargs))
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
        | {"rise_score": 1.25, "rise_return": 2.5}  # the last two of four against the two before: 10 - 22.5 and 20 - 5
        | {"best_score": 37.5, "best_return": 75, "data_score": 0.5, "data_return": 1}
        | {"minutes": 4, "updates_per_second": 7.5},
        rel=1e-5,
    )  # the peak memory of one seed is not known, so that of the cell is not either
    text = (tmp_path / "out" / "report.md").read_text()
    # means of the evaluations: 0, 27.5, 7.5, 22.5; the second is the first that is not more than 5 below 15
    assert (
        "## a/v0, 40 updates\n" in text
        and "| mopo | 2 | 15.0 ± 7.1 | 30.0 ± 14.1 | 1.2 | 37.5 | 120 | 4.0 | 8 | - |" in text
    )
    assert "| method | a/v0, 40 updates, 2 seeds |\n| --- | --- |\n| mopo | 15.0 ± 7.1 |\n" in text
    assert "The data's own episodes: 0.5 (return 1.0)." in text
    assert "2 runs took 0.1 hours, the median run 4.0 minutes." in text
    assert (tmp_path / "out" / "curves-a-v0.png").stat().st_size and (tmp_path / "out" / "scores.png").stat().st_size


def test_a_csv_tells_how_its_run_was_made_and_has_every_column_at_six_digits(tmp_path):
    run = make_run(
        tmp_path / "g" / "a-v0__mopo__penalty-coef=0.0,gamma=0.9__3", [1, 2.123456789], seed=3, hardware="C64"
    )
    (run / "resources.json").write_text('{"peak_memory_gb": 1.5}')
    assert call(tmp_path, run)["a/v0", "penalty-coef=0.0,gamma=0.9"]["peak_memory_gb"] == "1.5"
    path = tmp_path / "out" / "runs" / "a-v0__mopo__penalty-coef=0.0,gamma=0.9__3.csv"
    first, *rest = path.read_text().splitlines()
    assert json.loads(first.removeprefix("# ")) == {
        "command": "python algos/mopo.py", "hardware": "C64", "commit": "1234567890", "versions": {"torch": "2"},
        "python": "3.11.7", "algo": "mopo", "data_hash": "abc", "dataset": "a/v0",
        "variant": "penalty-coef=0.0,gamma=0.9", "seed": 3, "num_updates": 20, "score_evals": 2, "behaviour": 1.0,
        "settings": {"env_id": "", "num_updates": 20, "score_evals": 2},
        "env": "A-v0", "ref_scores": [0.0, 200.0], "peak_memory_gb": 1.5,
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
    before = sorted(tmp_path.rglob("*"))
    args = {"out_dir": tmp_path / "out", "compare": ("mopo", "mopo tau=1")}
    report.main(Args(**args))
    # every mean of two draws out of two seeds has a probability of 1/4 or 1/2: the 95 % interval holds all of them
    rows = [
        "| a/v0 (20 updates, last 2) | 15.0 ± 7.1 (2) | 10.0 ± 7.1 (2) | 5.0 [-5.0, 15.0] | - |",
        "| b/v0 (20 updates, last 2) | 40.0 (1) | 50.0 (1) | -10.0 | - |",
    ]
    assert capsys.readouterr().out.splitlines()[2:] == [*rows, "| mean of 2 | 27.5 | 30.0 | -2.5 | - |"]
    report.main(Args(**args, datasets=("b/v0",)))
    assert capsys.readouterr().out.splitlines()[2:] == [rows[1], "| mean of 1 | 40.0 | 50.0 | -10.0 | - |"]
    assert sorted(tmp_path.rglob("*")) == before  # nothing is written
    with pytest.raises(InputError, match="no scores of both mopo and mopo tau=1 after the same updates on c/v0:"):
        report.main(Args(**args, datasets=("a/v0", "c/v0")))
    with pytest.raises(InputError, match="on any dataset: the methods are mopo, mopo tau=1"):
        report.main(Args(**(args | {"compare": ("mopo", "tau=1")})))
    with pytest.raises(InputError, match="--datasets narrows --compare"):
        report.main(Args(out_dir=tmp_path / "out", datasets=("a/v0",)))


def test_a_probability_of_being_better_needs_five_seeds(tmp_path, capsys):
    for variant, shift in (("", 0), ("tau=1__", 4)):
        for seed in range(5):
            make_run(tmp_path / "g" / f"a-v0__mopo__{variant}{seed}", [2 * seed + shift] * 2, seed=seed)
    call(tmp_path, tmp_path / "g")
    capsys.readouterr()
    report.main(Args(out_dir=tmp_path / "out", compare=("mopo", "mopo tau=1")))
    # scores 0 .. 4 against 2 .. 6: of 25 pairs 3 are won and 3 are ties
    assert "| -2.0 [-3.8, -0.2] | 0.18 [0.00, 0." in capsys.readouterr().out


def test_the_mean_rank_is_over_the_sets_that_every_method_has(tmp_path):
    scores = {"a": [(0, 2), (8, 10), (4, 6)], "b": [(6, 8), (2, 4), (2, 4)], "c": [(0, 0), (9, 9)]}
    for dataset, of_methods in scores.items():
        for i, seeds in enumerate(of_methods):
            for seed, value in enumerate(seeds):
                name = f"{dataset}-v0__mopo__{f'tau={i}__' if i else ''}{seed}"
                make_run(tmp_path / "g" / name, [value] * 2, dataset=f"{dataset}/v0", seed=seed)
    call(tmp_path, tmp_path / "g")
    text = (tmp_path / "out" / "report.md").read_text()
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| mopo") and line.count("|") == 6]
    ranks = {row[0].removeprefix("| "): row[-1].removesuffix(" |") for row in rows}
    # on a: 3, 1, 2; on b: 1, then a tie of 2.5 each
    assert list(ranks) == ["mopo tau=1", "mopo", "mopo tau=2"]
    assert [value.split(" [")[0] for value in ranks.values()] == ["1.8", "2.0", "2.2"] and "[" in ranks["mopo"]
    assert rows[1][1:4] == ["0.5 ± 0.7", "3.5 ± 0.7", "0.0 ± 0.0"] and rows[2][3] == ""


def test_ranks_of_means():
    means = np.array([[3.0, 1.0, 2.0], [5.0, 5.0, 0.0]])
    assert report.mean_rank(means).tolist() == [(1 + 1.5) / 2, (3 + 1.5) / 2, (2 + 3) / 2]
    assert report.mean_rank(means[None]).shape == (1, 3)


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
    make_run(grid / "blind", [np.nan] * 3, seed=3)
    assert call(tmp_path, grid)["a/v0", ""]["seeds"] == "1"
    errors = capsys.readouterr().err.splitlines()
    assert [line.split("grid/")[1] for line in errors] == [
        "begun was evaluated up to update 0 of 30: resume it, or give --partial",
        "blind was not evaluated in an environment",
        "cut was evaluated up to update 20 of 30: resume it, or give --partial",
    ]
    row = call(tmp_path, grid, partial=True)["a/v0", ""]
    assert (row["seeds"], row["updates"], row["return"]) == ("2", "20", "2.25")
    assert "a/v0, 20 of 30 updates, 2 seeds |" in (tmp_path / "out" / "report.md").read_text()


def test_seeds_whose_settings_differ_are_not_averaged_but_older_files_without_settings_are(tmp_path):
    for seed in range(3):
        config = json.loads((make_run(tmp_path / "g" / str(seed), [1, 2], seed=seed) / "config.json").read_text())
        config["args"] |= {"gamma": 0.9 if seed == 2 else 0.99, "num_threads": seed, "compile": seed == 1}
        (tmp_path / "g" / str(seed) / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="g/0 and .*g/2 differ in gamma: no mean"):
        call(tmp_path, tmp_path / "g")
    assert not (tmp_path / "out" / "runs").exists()  # what is refused leaves nothing
    for seed in range(3):
        report.main(Args(runs=(tmp_path / "g" / str(seed),), out_dir=tmp_path / f"out{seed}"))
    for seed in (1, 2):
        (tmp_path / f"out{seed}" / "runs" / f"a-v0__mopo__{seed}.csv").rename(
            tmp_path / "out0" / "runs" / f"a-v0__mopo__{seed}.csv"
        )
    with pytest.raises(InputError, match="runs/a-v0__mopo__0.csv and .*__2.csv differ in gamma"):
        report.main(Args(out_dir=tmp_path / "out0"))
    (tmp_path / "out0").rename(tmp_path / "out")
    for path in (tmp_path / "out" / "runs").glob("*.csv"):
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


def test_the_readme_has_the_table_with_links_to_the_scripts(tmp_path):
    make_run(tmp_path / "g" / "a-v0__mopo__0", [1, 2])
    make_run(tmp_path / "g" / "a-v0__mopo__tau=2__0", [3, 4])
    make_run(tmp_path / "g" / "b-v0__mopo__0", [3, 4], dataset="b/v0")
    (tmp_path / "x.md").write_text("before\n<!-- scores -->\nold\n<!-- /scores -->\nafter\n")
    call(tmp_path, tmp_path / "g", readme=tmp_path / "x.md")
    assert (tmp_path / "x.md").read_text() == (
        "before\n<!-- scores -->\n\n| method | a/v0, 20 updates, 1 seed | b/v0, 20 updates, 1 seed |\n"
        "| --- | --- | --- |\n| [mopo.py](algos/mopo.py) | 0.8 | 1.8 |\n"
        "| [mopo.py](algos/mopo.py) tau=2 | 1.8 |  |\n\n<!-- /scores -->\nafter\n"
    )


def test_sets_are_columns_of_one_length(tmp_path):
    make_run(tmp_path / "g" / "a-v0__mopo__0", [1, 2])
    make_run(tmp_path / "g" / "a-v0__mopo__tau=2__0", [1, 2, 4])
    call(tmp_path, tmp_path / "g")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| method | a/v0, 30 updates, 1 seed | a/v0, 20 updates, 1 seed |" in text
    assert "| mopo |  | 0.8 |\n| mopo tau=2 | 1.5 |  |" in text
    assert {path.name for path in (tmp_path / "out").glob("curves-*")} == {"curves-a-v0.png", "curves-a-v0-2.png"}


def test_a_set_without_reference_scores_has_returns(tmp_path):
    folder = make_run(tmp_path / "g" / "0", [1, 2], ref_scores=None)
    text = (folder / "progress.csv").read_text()
    (folder / "progress.csv").write_text(text.replace(",1,0.5,", ",1,nan,").replace(",2,1.0,", ",2,nan,"))
    call(tmp_path, tmp_path / "g")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| mopo | 1.5 |" in text and "| mopo | 1 | - | 1.5 | 1.0 | 2.0 | - | 2.0 |" in text


def test_a_csv_is_replaced_by_the_same_run_alone(tmp_path):
    def error(folder):
        before = path.read_text()
        with pytest.raises(InputError) as caught:
            call(tmp_path, folder, partial=True)
        assert path.read_text() == before
        return str(caught.value).replace(str(tmp_path), "T")

    path, end = (
        tmp_path / "out" / "runs" / "a-v0__mopo__0.csv",
        ": import it into another --out-dir, or delete that first",
    )
    call(tmp_path, make_run(tmp_path / "g", [1.23456789, 2], num_updates=30), partial=True)
    shorter = make_run(tmp_path / "shorter", [1.23456789], num_updates=30)
    assert error(shorter) == f"T/shorter differs from T/out/runs/a-v0__mopo__0.csv in evaluations{end}"
    other = make_run(tmp_path / "other", [1.23456789, 2.5, 3])  # by other code, or on another machine
    assert error(other) == f"T/other differs from T/out/runs/a-v0__mopo__0.csv in evaluations{end}"
    longer = make_run(tmp_path / "longer", [1.23456789, 2, 3, 4])
    assert error(longer) == f"T/longer differs from T/out/runs/a-v0__mopo__0.csv in num_updates{end}"
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
    # a resumed run's settings are in its folder
    args = {"dataset": "a/v0", "seed": 4, "env_id": "", "compile": False, "penalty_coef": 1.0, "max_alpha": np.inf}
    resumed = public("--resume /home/me/x/run", **args, run_dir="/home/me/x", run_name="run")
    assert resumed == "--dataset=a/v0 --seed=4 --no-compile --penalty-coef=1.0 --max-alpha=inf"
    assert public("--resume /home/me/x/run", hidden_sizes=[64, 32], seed=1) == "--hidden-sizes 64 32 --seed=1"
    assert public("--hidden-sizes 64 32 --run-dir x --seed 1") == "--hidden-sizes 64 32 --seed 1"
    changed = [{"after_update": 20, "changed": {"num_updates": [20, 40], "num_threads": [1, 2]}}]
    config = {"algo": "mopo", "command": "python algos/mopo.py --seed 1", "resumed": changed}
    command = report.public_command(config | {"args": {"seed": 1, "num_updates": 40, "num_threads": 2}})
    assert command == "python algos/mopo.py --seed 1 --num-updates=40"


def test_of_data_without_a_known_mean_none_is_said(tmp_path):
    nameless = make_run(tmp_path / "h", [1, 2], dataset="c/v0", behaviour_return=None, ref_scores=None, env=None)
    assert call(tmp_path, nameless)["c/v0", ""]["data_return"] == ""


def test_neither_data_nor_environment_nor_what_a_folder_names_are_touched(tmp_path):
    (tmp_path / "hostile.py").write_text("open('imported', 'w')")
    args = {"dataset": "./hostile.npz", "env_id": "hostile:A-v0", "termination": "hostile:f", "seed": 0}
    args |= {"num_updates": 20, "score_evals": 2}
    make_run(tmp_path / "g" / "0", [1, 2], algo="hostile", command="x.py --resume y", args=args, env="hostile:A-v0")
    command = [sys.executable, str(ROOT / "benchmarks" / "report.py"), "g", "--out-dir", "out"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": "."})
    assert (
        done.returncode == 0
        and not done.stderr
        and "hostile.npz, 20 updates" in done.stdout
        and "| hostile |" in done.stdout
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["g", "hostile.py", "out"]


def test_an_evaluation_that_failed_costs_the_score_where_it_is_one_of_the_last(tmp_path, capsys):
    make_run(tmp_path / "g" / "0", [np.nan, 10, 30, 50])
    make_run(tmp_path / "g" / "1", [10, 30, 50, np.nan], seed=1)
    row = call(tmp_path, tmp_path / "g")["a/v0", ""]
    assert (row["seeds"], row["return"], row["best_return"]) == ("1", "40", "50")
    (said,) = capsys.readouterr().err.splitlines()
    assert said.endswith("g/1 has no score: of its last evaluations those at update 40 failed")


NAMES = ["a|b/v0 <script>x</script>`[x](y)`", "a\nb $\\frac{1}$ (*", "\ud800\x1b[2J", "../../a"]


def test_names_are_text_in_the_report_and_never_a_path(tmp_path):
    for i, name in enumerate(NAMES):
        settings = {"dataset": f"{name}.", "seed": 0, "num_updates": 20, "score_evals": 2}
        more = {"commit": name, "hardware": name, "command": f"python x.py --a '{name}'"}
        folder = tmp_path / "home" / f"__{name.replace('/', '').strip(chr(0xD800))}__v=<b>|`__0"
        make_run(folder, [1, 2], algo=name, args=settings, **more)
        make_run(tmp_path / "home" / f"{i}", [1, 2], algo=f"{name}{i}")
    home = tmp_path / "home"
    (home / "x.md").write_text("<!-- scores -->\n<!-- /scores -->\n")
    assert report.main(Args((home,), home / "out", readme=home / "x.md")) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["home"] and len(list((home / "out" / "runs").iterdir())) == 8
    assert not [path for path in home.rglob("*") if path.name.startswith(".")]
    text = (home / "out" / "report.md").read_text() + (home / "x.md").read_text()
    assert not any(markup in text for markup in ("<script>", "<b>", "[x](", "\x1b", "\ud800"))
    for part in text.split("\n\n"):  # all rows of a table have as many cells
        if part.startswith("| "):
            assert len({line.count("|") for line in part.strip().splitlines() if line[0] == "|"}) == 1, part


# what is put in, into which file, and the words that say what is wrong
DAMAGE = [
    ("config.json", {"commit": None}, "commit is null and must be a text"),
    ("config.json", {"command": 3}, "command is 3 and must be a text"),
    ("config.json", {"command": "python 'x.py"}, "command is not one that a shell would take (No closing quotation)"),
    ("config.json", {"algo": None}, "algo is null and must be a text"),
    ("config.json", {"behaviour_return": "1"}, 'behaviour is "1" and must be a number'),
    ("config.json", {"behaviour_return": np.nan}, "behaviour is NaN and must be a number"),
    ("config.json", {"ref_scores": [3.0, 3.0]}, "ref_scores is [3.0, 3.0] and must be two different numbers"),
    ("config.json", {"args": []}, "config.json does not tell the settings of a script"),
    ("config.json", "{}", "args is missing"),
    ("config.json", "[1]", "config.json is no JSON of names and values"),
    ("config.json", '{"a": ', "config.json is no JSON (Expecting value"),
    ("config.json", "[" * 100_000, "config.json is no JSON (maximum recursion"),
    ("config.json", None, "config.json cannot be read (Is a directory)"),
    ("progress.csv", None, "progress.csv cannot be read (Is a directory)"),
    (
        "progress.csv",
        "update,return_mean\n20,1\n",
        "the evaluations lack seconds, updates_per_second, normalised_score",
    ),
    ("progress.csv", "update,seconds\n10,\n", "progress.csv holds what is no number (could not convert string"),
    ("progress.csv", "update,seconds\n10\n", "progress.csv has 1 values in row 1, and 2 columns"),
    ("progress.csv", b"\xff\xfe\x00", "progress.csv is no text"),
    ("progress.csv", f"{','.join(report.COLUMNS)}\n20,1,1,1,1\n20,1,1,1,1\n", "updates do not grow"),
    ("resources.json", "{}", "peak_memory_gb is missing"),
    ("resources.json", '{"peak_memory_gb": "much"}', 'peak_memory_gb is "much" and must be a number'),
    ("displaced.csv", f"{','.join(report.DISPLACED)}\n0,1,1,1,1\n", "must be what benchmarks/displace.py measures"),
]


def put(path: Path, content) -> None:
    if isinstance(content, dict):
        content = json.dumps(json.loads(path.read_text()) | content)
    path.unlink(missing_ok=True)
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def test_damaged_folders_are_left_out_each_with_a_line_and_status_1(tmp_path, capsys):
    make_run(tmp_path / "g" / "00", [1, 2])
    for i, (file, content, _) in enumerate(DAMAGE, start=1):
        put(make_run(tmp_path / "g" / f"{i:02}", [1, 2], seed=i) / file, content)
    assert report.main(Args((tmp_path / "g",), tmp_path / "out")) == 1
    said = capsys.readouterr().err.splitlines()
    for i, (line, (_, _, words)) in enumerate(zip(said, DAMAGE, strict=True), start=1):
        assert line.startswith(f"left out: {tmp_path}/g/{i:02}: ") and words in line
    assert [path.name for path in (tmp_path / "out" / "runs").iterdir()] == ["a-v0__mopo__0.csv"]


def test_improvement_counts_pairs_on_the_same_dataset_and_ties_half():
    # 1: 3 > 1, 3 > 2, 2 > 1, 2 = 2: 3.5 of 4; 2: 0 of 2
    scores, others = [np.array([3.0, 2]), np.array([0.0])], [np.array([1.0, 2]), np.array([5.0, 6])]
    assert report.improvement(scores, others) == (3.5 / 4 + 0) / 2
    assert report.improvement(others, scores) == 1 - (3.5 / 4 + 0) / 2


def test_bootstrap_draws_seeds_within_each_dataset_and_its_interval_is_that_of_a_mean():
    draws = report.bootstrap([np.array([1.0, 2, 3]), np.array([10.0, 20])])
    assert [d.shape for d in draws] == [(report.NUM_DRAWS, 3), (report.NUM_DRAWS, 2)]
    assert set(draws[0].ravel()) == {1, 2, 3} and set(draws[1].ravel()) == {10, 20}
    scores = np.random.default_rng(0).normal(size=400)
    low, high = report.interval(lambda s: s[0].mean(axis=-1), [scores])
    assert (low, high) == pytest.approx(scores.mean() + np.array([-1.96, 1.96]) * scores.std() / 20, abs=0.01)


def test_the_same_runs_give_the_same_files(tmp_path):
    make_run(tmp_path / "g" / "a-v0__mopo__0", [1, 2, 4])
    make_run(tmp_path / "g" / "a-v0__mopo__1", [1, 3, 3], seed=1)
    outputs = []
    for _ in range(2):
        call(tmp_path, tmp_path / "g")
        outputs.append({path.name: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()})
    assert outputs[0] == outputs[1] and len(outputs[0]) == 6


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
    assert error() == "no csv of a run in T/out/runs: give run folders to import"
    make_run(tmp_path / "g" / "0", [1, 2])
    make_run(tmp_path / "h" / "1", [1, 2])
    assert error(tmp_path / "g", tmp_path / "h") == (
        "T/g/0 and T/h/1 are the same seed of the same cell: give one of them"
    )
    call(tmp_path, tmp_path / "h")
    make_run(tmp_path / "k" / "1", [1, 2], seed=1, hash="other")
    assert error(tmp_path / "k") == (
        "T/out/runs/a-v0__mopo__0.csv and T/k/1 differ in data_hash: no mean over them makes sense, move one into "
        "another --out-dir"
    )
    (tmp_path / "x.md").write_text("no markers")
    assert error(readme=tmp_path / "x.md").startswith("T/x.md lacks the lines <!-- scores --> and <!-- /scores -->")
    make_run(tmp_path / "m" / "2", [1, 2], seed=2)
    assert error(tmp_path / "m", readme=tmp_path / "x.md").startswith("T/x.md lacks the lines")
    assert not list((tmp_path / "out" / "runs").glob("*2.csv"))  # nothing was imported


def test_a_damaged_csv_is_left_out_until_its_run_folder_is_imported_again(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report, "finish", lambda figure, *_: report.plt.close(figure))
    args = {"out_dir": tmp_path / "out"}
    for seed in (0, 1):
        make_run(tmp_path / "g" / str(seed), [1, 2], seed=seed)
    assert report.main(Args((tmp_path / "g",), **args)) == 0
    path = tmp_path / "out" / "runs" / "a-v0__mopo__1.csv"
    whole = path.read_text()
    first, _, rest = whole.partition("\n")
    for text, words in (
        ("update,seconds\n1,2\n", "it is no csv of a run: import its run folder again"),
        (f"# {{\n{rest}", "its first line is no JSON"),
        (whole.replace('"1234567890"', "null"), "commit is null and must be a text"),
        (whole.replace('"seed": 1', '"seed": "1"'), 'seed is "1" and must be a whole number, 0 or more'),
        (f"{first}\n", "it has no evaluation"),
        (whole.replace(",2,1,", ",nan,1,"), "has no score: of its last evaluations those at update 20 failed"),
    ):
        assert text != whole
        path.write_text(text)
        capsys.readouterr()
        assert report.main(Args(**args)) == 1
        (said,) = capsys.readouterr().err.splitlines()
        assert said.startswith(f"left out: {path}: {words}")
    assert report.main(Args((tmp_path / "g",), **args)) == 0 and path.read_text() == whole


def test_hostile_and_damaged_values_anywhere_never_give_a_traceback(tmp_path, monkeypatch):
    """A report with one line for what is left out, or one sentence: the first seeds of the mutator below."""
    monkeypatch.setattr(report, "finish", lambda figure, *_: report.plt.close(figure))
    monkeypatch.setattr(report, "NUM_DRAWS", 10)
    for seed in range(30):
        mutate_and_report(tmp_path / str(seed), seed)


VALUES = [
    None,
    True,
    -1,
    0,
    3,
    10**30,
    1e308,
    -np.inf,
    np.nan,
    "",
    "x",
    "../x",
    "a|b\n`<b>",
    "\x00",
    "\ud800",
    [],
    {},
    [1],
]
VALUES += [[[]], {"a": None}, "1" * 300, "(", "--resume", "$x_"]


def mutate_and_report(folder: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    pick = lambda things: things[rng.integers(len(things))]  # noqa: E731
    run = make_run(folder / "g" / "a-v0__mopo__x=1__1", [1, 2], seed=1)
    make_run(folder / "g" / "b", [1, 2])
    rows = [f"{num},50,{9 - num},0.5,{1 - num / 15},{num / 10}" for num in report.FORCED]
    names = "forced_actions,step,return_mean,return_std,episodes,distance"
    (run / "displaced.csv").write_text("\n".join([names, *rows]))
    (run / "resources.json").write_text('{"peak_memory_gb": 1.5}')
    args = Args((folder / "g",), folder / "out", partial=bool(rng.integers(2)))
    if imported := rng.integers(2):
        report.main(args)
        args.runs = ()
    paths = sorted((folder / "out" / "runs").glob("*__1.csv")) if imported else sorted(run.iterdir())
    for _ in range(rng.integers(1, 4)):
        path = pick(paths)
        if path.is_dir():
            continue
        text = path.read_text(errors="surrogateescape")
        first, _, rest = text.partition("\n")
        head = first.removeprefix("# ") if path.suffix == ".csv" else text
        kind = rng.integers(4)
        if kind == 0 and head.startswith("{"):  # a value somewhere in the JSON
            try:
                inner = tree = json.loads(head)
            except ValueError:
                continue
            if not tree:
                continue
            while isinstance(inner[key := pick(list(inner))], dict) and inner[key] and rng.random() < 0.7:
                inner = inner[key]
            inner[key] = VALUES[rng.integers(len(VALUES))]
            if rng.random() < 0.1:
                del inner[key]
            text = f"# {json.dumps(tree)}\n{rest}" if path.suffix == ".csv" else json.dumps(tree)
        elif kind == 1:  # a field of the csv
            lines = [line.split(",") for line in rest.splitlines() or [""]]
            line = pick(lines)
            line[rng.integers(len(line))] = str(VALUES[rng.integers(len(VALUES))])
            text = first + "\n" + "\n".join(map(",".join, lines))
        elif kind == 2:  # bytes
            at = rng.integers(len(text) + 1)
            text = (
                text[:at] + pick(["", "\x00", "\udcff", ",", "\n", '"', "9" * 400, "e9"]) + text[at + rng.integers(9) :]
            )
        else:
            text = pick([None, "", text[: rng.integers(len(text) + 1)]])
        put(path, text if text is None else text.encode(errors="surrogatepass"))
    try:
        assert report.main(args) in (0, 1)
    except InputError as error:
        assert str(error)


@pytest.mark.parametrize("limit", ["file", "folder"])
def test_what_cannot_be_written_is_one_sentence_and_leaves_no_half_file(limit, tmp_path):
    make_run(tmp_path / "g", [1, 2])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.md").write_text("old")
    limits = "import resource, runpy, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limits += "resource.setrlimit(resource.RLIMIT_FSIZE, (900, 900)); " if limit == "file" else ""
    (tmp_path / "no").write_text("a file")
    out_dir = tmp_path / ("out" if limit == "file" else "no/out")
    command = limits + f"runpy.run_path({str(ROOT / 'benchmarks' / 'report.py')!r}, run_name='__main__')"
    flags = [str(tmp_path / "g"), "--out-dir", str(out_dir)]
    done = subprocess.run([sys.executable, "-c", command, *flags], capture_output=True, text=True)
    (said,) = done.stderr.splitlines()
    reason = "File too large" if limit == "file" else "no/out"
    assert done.returncode == 1 and said.startswith("error: cannot write ") and reason in said
    assert not list(tmp_path.rglob("*.tmp")) and (tmp_path / "out" / "report.md").read_text() == "old"


def test_a_tilde_is_the_home_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    make_run(tmp_path / "g", [1, 2])
    (tmp_path / "x.md").write_text("<!-- scores -->\n<!-- /scores -->\n")
    report.main(Args((Path("~/g"),), Path("~/out"), Path("~/x.md")))
    assert (tmp_path / "out" / "runs").is_dir() and "a/v0" in (tmp_path / "x.md").read_text()


def test_the_command_ends_with_status_1_and_no_traceback_on_bad_input(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "report.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"})
    assert done.returncode == 1
    assert done.stderr == f"error: no run folder in {tmp_path}: one holds config.json and progress.csv\n"


RESULTS = ROOT / "benchmarks" / "results"


@pytest.mark.parametrize("name", sorted(path.parent.name for path in RESULTS.glob("*/report.md")))
def test_a_committed_report_is_what_the_committed_runs_give(name, tmp_path):
    shutil.copytree(RESULTS / name / "runs", tmp_path / "runs")
    readme = tmp_path / "README.md" if name == "bench" else None
    if readme:
        shutil.copy(ROOT / "README.md", readme)
    report.main(Args(out_dir=tmp_path, readme=readme))
    for file in ("report.md", "report.csv"):
        assert (tmp_path / file).read_text() == (RESULTS / name / file).read_text()
    if readme:
        assert readme.read_text() == (ROOT / "README.md").read_text()
    figures = {path.name for path in tmp_path.glob("*.png")}
    assert figures == {path.name for path in (RESULTS / name).glob("*.png")} and len(figures) >= 2
    for figure in figures:  # made from these very runs; pixels may differ from machine to machine
        assert immeta(tmp_path / figure)["Source"] == immeta(RESULTS / name / figure)["Source"], figure


def test_the_bench_compares_what_was_trained_to_the_end(tmp_path):
    cells = report.read_cells(RESULTS / "bench" / "runs", set())
    assert {cell.runs[0].about["num_updates"] for cell in cells} <= {60_000, 120_000, 180_000}
    assert len({cell.dataset for cell in cells}) == len({cell.protocol for cell in cells})  # one length a set
    assert all(run.columns["update"][-1] == run.about["num_updates"] for cell in cells for run in cell.runs)
