"""The campaigns of benchmarks/studies/endurance.py, a few trials of each, and that they notice what is wrong."""

import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.studies import endurance, hostile


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("finished")
    assert endurance.start("bc", home).wait() == 0, endurance.last_line(home)
    return home


def test_a_killed_run_ends_as_the_undisturbed_one(finished, tmp_path):
    right, rng = endurance.contents(finished / "run"), random.Random(0)
    assert endurance.kill("bc", tmp_path, 1e-3, 1, rng) == 1  # before it has a folder
    assert endurance.difference("bc", tmp_path, right) == ""


def test_a_run_that_loses_its_folder_says_so_and_starts_again(finished, tmp_path):
    right, at_once = endurance.contents(finished / "run"), SimpleNamespace(uniform=lambda *_: 0.0)
    assert endurance.lose_disk("folder gone", "bc", tmp_path / "home", right, at_once) == ""


def test_another_weight_or_another_row_is_a_difference(finished, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    right, folder = endurance.contents(finished / "run"), tmp_path / "run"
    assert endurance.contents(folder) == right
    state = torch.load(folder / "policy.pt", weights_only=True)
    next(iter(state["actor"].values())).view(-1)[0] += 1e-6
    torch.save(state, folder / "policy.pt")
    table = (folder / "progress.csv").read_text()
    (folder / "progress.csv").write_text(table.replace("\n200,", "\n201,"))
    found = endurance.contents(folder)
    assert [name for name in right if found[name] != right[name]] == ["policy.pt", "progress.csv"]


def test_damaged_files_load_or_get_one_sentence(tmp_path):
    trials = list(hostile.mutants(tmp_path / "mutants", 30, random.Random(1)))
    assert not any(wrong for *_, wrong in trials)
    assert len({what for what, *_ in trials}) == 6


@pytest.mark.parametrize("error, words", [(OverflowError("too much"), "OverflowError"), (ValueError(), "ValueError")])
def test_a_loader_that_fails_is_noticed(error, words, tmp_path, monkeypatch):
    def fails(path):
        raise error

    monkeypatch.setattr(hostile, "load_dataset", fails)
    assert words in hostile.loads(tmp_path, tmp_path / "log")


def test_a_mutant_is_another_file(tmp_path):
    rows, rng = {"rewards": np.arange(9, dtype=np.float32)}, random.Random(0)
    assert sum(hostile.damaged_bytes(bytes(range(200)), rng) != bytes(range(200)) for _ in range(50)) == 50
    changed = [hostile.damaged_rows(rows, rng) for _ in range(50)]
    assert sum(not np.array_equal(each.get("rewards"), rows["rewards"]) for each in changed) > 25
