"""benchmarks/studies/peers.py: which runs it takes, its interval, and that the page shows its tables."""

import csv
import shutil

import numpy as np
import pytest
from imageio.v3 import immeta

from benchmarks.report import RESULTS, source_hash
from benchmarks.studies.peers import Args, both, curves, find_ours, main, read_peer, welch
from common import InputError


def write_peer(path, updates):
    with open(path, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["update", "normalised_score"])
        table.writerows([update, 1.5 * update] for update in updates)


def test_the_interval_is_welchs():
    """Against half the interval from trapezoids under the density of t with 3.067 degrees of freedom."""
    difference, half = welch(np.array([20.1, 35.3, 21.3]), np.array([2.6, 12.5, 4.0, 11.4]))
    assert difference == pytest.approx(17.941667, abs=1e-6)
    assert half == pytest.approx(17.2675, abs=2e-3)


def test_a_run_of_the_bench_comes_before_another_of_that_seed(tmp_path):
    for folder in ("bench/runs", "peers/ours"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "peers/ours/a.csv").touch()
    assert find_ours(tmp_path, "a.csv") == tmp_path / "peers/ours/a.csv"
    (tmp_path / "bench/runs/a.csv").touch()
    assert find_ours(tmp_path, "a.csv") == tmp_path / "bench/runs/a.csv"


def test_seeds_are_read_and_one_is_not_enough(tmp_path):
    paths = [tmp_path / f"{seed}.csv" for seed in range(2)]
    for path in paths:
        write_peer(path, [10, 20])
    with pytest.raises(InputError, match="needs two seeds or more"):
        curves(paths[:1], read_peer)
    updates, scores = curves(paths, read_peer)
    assert updates.tolist() == [10, 20] and scores.tolist() == [[15, 30], [15, 30]]


@pytest.mark.parametrize("text", ["", "update,seconds\n10,1\n", "update,normalised_score\n10,1\n20\n"])
def test_a_damaged_csv_of_a_peer_is_named(tmp_path, text):
    (tmp_path / "0.csv").write_text(text)
    with pytest.raises(InputError, match=r"0\.csv cannot be read \(ValueError.*: write it anew"):
        read_peer(tmp_path / "0.csv")


def test_runs_of_another_length_are_refused(tmp_path):
    paths = [tmp_path / f"{seed}.csv" for seed in range(2)]
    write_peer(paths[0], [10, 20])
    write_peer(paths[1], [10, 20, 30])
    with pytest.raises(InputError, match="after different updates"):
        curves(paths, read_peer)
    updates, scores = curves(paths, read_peer, until=20)
    assert updates.tolist() == [10, 20] and scores.tolist() == [[15, 30], [15, 30]]


def test_theirs_and_ours_must_have_the_same_evaluations(tmp_path):
    (tmp_path / "peers/ours").mkdir(parents=True)
    for seed in (1, 2):
        write_peer(tmp_path / f"peers/td3bc-halfcheetah-{seed}.csv", range(6_000, 120_001, 6_000))
        name = f"peers/ours/halfcheetah-medium-replay-v0__td3_bc__{seed}.csv"
        shutil.copy(RESULTS / find_ours(RESULTS, name.split("/")[-1]), tmp_path / name)
    with pytest.raises(InputError, match="theirs and ours were evaluated after different updates"):
        both(tmp_path, "TD3+BC", range(3))
    updates, theirs, ours, paths = both(tmp_path, "TD3+BC", range(3), until=120_000)
    assert updates[-1] == 120_000 and theirs.shape == ours.shape == (2, 20) and len(paths) == 4


def test_the_page_has_the_tables_that_it_prints(tmp_path, capsys):
    main(Args(out=tmp_path / "figure.png"))
    tables, page = capsys.readouterr().out.strip().split("\n\n"), (RESULTS.parent / "peers.md").read_text()
    assert len(tables) == 2 and all(table in page for table in tables)
    source = immeta(tmp_path / "figure.png")["Source"]
    assert source == immeta(RESULTS / "peers" / "halfcheetah.png")["Source"], "run python benchmarks/studies/peers.py"
    assert source != source_hash([])
