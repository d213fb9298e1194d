"""Policies that were kept and made into run folders again act as before, to the rounding of their weights."""

import gzip
import json
import shutil

import numpy as np
import pytest
import torch

from benchmarks import keep
from benchmarks.keep import Args
from common import InputError
from common.evaluation import load_policy


@pytest.fixture
def run(tmp_path):
    """A finished run of iql.py, as far as its files are read."""
    from algos.iql import Actor

    torch.manual_seed(0)
    actor, folder = Actor(3, 1, (64, 64)), tmp_path / "runs" / "pendulum-random-v0__iql__0"
    folder.mkdir(parents=True)
    args = {"dataset": "/home/me/log.npz", "seed": 0, "run_dir": "/home/me/runs", "env_id": ""}
    config = {
        "algo": "iql",
        "args": args,
        "command": "python algos/iql.py --dataset /home/me/log.npz --run-dir /home/me/r",
    }
    config |= {"data": "/home/me/log.npz", "data_hash": "abc"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "progress.csv").write_text("update,return_mean\n10,1.5\n")
    sizes = {"obs_dim": 3, "action_dim": 1, "hidden_sizes": (64, 64)}
    box = {"action_low": torch.tensor([-2.0]), "action_high": torch.tensor([2.0])}
    units = {"obs_shift": torch.tensor([1e6, 0.0, 0.0]).double(), "obs_scale": torch.ones(3).double()}
    policy = {"actor": actor.state_dict(), "class": "Actor", "sizes": sizes, "config": json.dumps(config)}
    torch.save(policy | box | units, folder / "policy.pt")
    return folder


def test_a_kept_policy_comes_back_and_names_no_folder_of_the_machine(run, tmp_path, capsys):
    keep.main(Args(tmp_path / "runs", tmp_path / "kept"))
    file = tmp_path / "kept" / "log.npz.pt.gz"
    assert file.stat().st_size < 0.6 * (run / "policy.pt").stat().st_size
    assert b"/home/me" not in gzip.decompress(file.read_bytes())
    keep.main(Args(tmp_path / "kept", tmp_path / "back"))
    back = tmp_path / "back" / run.name
    obs = np.random.default_rng(0).normal(size=(1000, 3)) + np.array([1e6, 0, 0])
    before, after = load_policy(run)(obs), load_policy(back)(obs)
    assert 0 < np.abs(before - after).max() < 4e-3  # of a box of 4
    assert (back / "progress.csv").read_text() == (run / "progress.csv").read_text()
    assert json.loads((back / "config.json").read_text())["command"] == "python algos/iql.py --dataset log.npz"


def test_unfinished_runs_are_left_out_and_what_is_there_is_kept(run, tmp_path, capsys):
    shutil.copytree(run, begun := tmp_path / "runs" / "begun")
    (begun / "policy.pt").unlink()
    assert keep.main(Args(tmp_path / "runs", tmp_path / "kept")) == 1
    out = capsys.readouterr()
    assert "1 policies -> " in out.out and "begun holds no finished run" in out.err
    keep.main(Args(tmp_path / "kept", tmp_path / "back"))
    with pytest.raises(InputError, match="is there already"):
        keep.main(Args(tmp_path / "kept", tmp_path / "back"))
    with pytest.raises(InputError, match="say by --to"):
        keep.main(Args(tmp_path / "kept"))


def test_new_runs_join_those_that_a_file_holds_and_two_of_one_name_are_refused(run, tmp_path, capsys):
    keep.main(Args(tmp_path / "runs", tmp_path / "kept"))
    run.rename(run.with_name("pendulum-random-v0__iql__1"))
    keep.main(Args(tmp_path / "runs", tmp_path / "kept"))
    keep.main(Args(tmp_path / "kept", tmp_path / "back"))
    assert sorted(folder.name[-1] for folder in (tmp_path / "back").iterdir()) == ["0", "1"]
    shutil.copytree(tmp_path / "runs", tmp_path / "runs" / "again")
    with pytest.raises(InputError, match="two runs in .* are called pendulum-random-v0__iql__1"):
        keep.main(Args(tmp_path / "runs", tmp_path / "kept"))


def test_nothing_to_keep_and_damaged_files_are_one_sentence(run, tmp_path):
    (run / "policy.pt").unlink()
    with pytest.raises(InputError, match="nothing to keep"):
        keep.main(Args(tmp_path / "runs", tmp_path / "kept"))
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "x.pt.gz").write_text("no")
    with pytest.raises(InputError, match="x.pt.gz holds no kept policies"):
        keep.main(Args(tmp_path / "kept", tmp_path / "back"))
