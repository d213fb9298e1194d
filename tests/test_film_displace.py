"""benchmarks/film.py and displace.py: what they make of finished runs, and what they say to others."""

import csv
import importlib
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import imageio
import numpy as np
import pytest
import torch

from benchmarks import displace, film
from common import InputError
from common.run import read_args


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder of two finished runs, whose policies are of different kinds."""
    folder = tmp_path_factory.mktemp("runs")
    usual = "--no-compile --num-threads 1 --num-updates 5 --eval-interval 5 --eval-episodes 2"
    with pytest.MonkeyPatch.context() as patch:
        for name, more in (("bc", ""), ("onestep", "--behaviour-updates 5")):
            flags = f"{usual} {more} --run-dir {folder} --run-name {name}"
            patch.setattr(sys, "argv", [f"{name}.py", *flags.split()])
            script = importlib.import_module(f"algos.{name}")
            script.main(read_args(script.Args, script.TUNED))
    return folder


def rows_of(file: Path) -> list[dict]:
    with open(file, newline="") as opened:
        return list(csv.DictReader(opened))


@pytest.mark.parametrize("name", ["bc", "onestep"])
def test_what_forced_actions_cost_is_measured_beside_the_undisturbed_policy(name, runs, capsys):
    displace.main(displace.Args(runs=(runs / name,)))
    rows = rows_of(runs / name / "displaced.csv")
    assert [row["forced_actions"] for row in rows] == ["0", "5", "10", "15"]
    # Pendulum's episodes end after 200 steps
    assert [(row["step"], row["episodes"]) for row in rows] == [("100", "2")] * 4
    undisturbed, last = rows[0]["return_mean"], rows_of(runs / name / "progress.csv")[-1]["return_mean"]
    assert float(undisturbed) == pytest.approx(float(last))
    assert all(row["return_mean"] != undisturbed for row in rows[1:])
    assert all(0 < float(row["distance"]) < 2 for row in rows)
    assert capsys.readouterr().out.count("displaced   by") == 4


def test_forced_actions_are_uniform_and_what_follows_them_is_handed_over():
    envs = [gym.make("InvertedPendulum-v5") for _ in range(6)]
    data, sent = SimpleNamespace(to_env_action=lambda action: 3 * action, action_low=np.zeros(1)), []
    data.to_env_action = lambda action: sent.append(3 * action) or 3 * action
    policy = lambda obs: sent.append(0.3 * obs[:, 1:2]) or 0.3 * obs[:, 1:2]  # noqa: E731  so weak that it falls
    undisturbed, _ = displace.evaluate(policy, envs, data, [0, 500], 6, range(0))
    calm = np.array(sent)
    sent.clear()
    returns, after = displace.evaluate(policy, envs, data, [0, 500], 6, range(2, 4))
    forced = np.array(sent)
    np.testing.assert_array_equal(forced[:2], calm[:2])
    assert np.abs(forced[2:4]).max() > 1.5 > np.abs(calm).max() and np.abs(forced[2:4]).max() <= 3
    assert np.abs(forced[4:]).max() < 1.5 and (returns != undisturbed).any()
    there = returns >= 4  # 1 a step but the last
    assert len(after) == returns.max() - 3 and after[0].shape == (there.sum(), 4)
    np.testing.assert_array_equal(forced[4][there], policy(after[0]))  # where the fifth action was chosen


def test_a_simulator_of_which_fewer_can_exist_gives_as_many_episodes():
    data = SimpleNamespace(to_env_action=lambda action: 2 * action, action_low=np.zeros(1))
    envs = [gym.make("Pendulum-v1") for _ in range(5)]
    policy = lambda obs: 0.5 * obs[:, 1:2]  # noqa: E731
    returns, after = displace.evaluate(policy, envs, data, [3, 4], 5, range(0))
    few, then = displace.evaluate(policy, envs[:2], data, [3, 4], 5, range(0))
    np.testing.assert_allclose(few, returns)
    assert len(after) == len(then) == 200 and after[7].shape == (5, 3)
    np.testing.assert_allclose(then[7], after[7], rtol=1e-5)


def test_displaced_half_way_through_the_median_episode_and_the_distance_in_standard_deviations(monkeypatch):
    # deviations 1.41 and 14.1; the environment's own observations are twice as large
    data = SimpleNamespace(obs=torch.tensor([[0.0, 0.0], [2.0, 20.0]]), to_obs=lambda obs: np.float32(obs / 2))
    calls = []

    def evaluate(policy, envs, data, seed, num, forced):
        calls.append((seed, forced))
        if len(calls) == 1:  # undisturbed: episodes of 3, 8 and 9 steps
            return np.array([1.0]), [np.zeros((num, 2)) for num in (3, 3, 3, 2, 2, 2, 2, 2, 1)]
        there = [np.array([[0.0, 20.0]])] * 50 + [np.array([[0.0, 1000.0]])] * 9
        return np.array([1.0]), there if len(forced) < 15 else []

    monkeypatch.setattr(displace, "evaluate", evaluate)
    rows = displace.displace(None, [], data, [3, 70], 3)
    assert calls == [([3, 70], range(0))] + [([3, 70], range(4, 4 + num)) for num in (0, 5, 10, 15)]
    assert [row["distance"] for row in rows] == pytest.approx([0.5**0.5] * 3 + [np.nan], nan_ok=True)
    assert [row["episodes"] for row in rows] == [1, 1, 1, 0] and {row["step"] for row in rows} == {4}


def test_distances_are_those_of_the_nearest_standardised_logged_states(monkeypatch):
    rng = np.random.default_rng(0)
    # the last dimension is constant in the data
    logged, visited = (rng.normal(size=(n, 3)) * [1, 100, 0] + [0, 1_000, last] for n, last in ((300, 5.3), (40, 5.4)))
    data = SimpleNamespace(obs=torch.tensor(logged, dtype=torch.float32), to_obs=lambda obs: obs)
    after = [visited[i : i + 10].astype(np.float32) for i in range(0, 40, 10)]
    monkeypatch.setattr(displace, "evaluate", lambda *_: (np.ones(10), after))
    apart = ((visited[:, None] - logged) / [*logged.std(axis=0, ddof=1)[:2], 1]) ** 2
    expected = np.sqrt(apart.sum(axis=2)).min(axis=1).mean()
    rows = displace.displace(None, [], data, [0, 0], 10)
    assert [row["distance"] for row in rows] == pytest.approx([expected] * 4, rel=1e-4)


def test_every_run_of_a_folder_is_filmed_by_the_actions_of_its_policy(runs, monkeypatch, capsys):
    calls = []

    def load_counted(folder):
        policy = load_policy(folder)
        return lambda obs: calls.append(folder) or policy(obs)

    load_policy = film.load_policy
    monkeypatch.setattr(film, "load_policy", load_counted)
    film.main(film.Args(runs=(runs,)))
    videos = [runs / name / "video.gif" for name in ("bc", "onestep")]
    assert capsys.readouterr().out.split() == [str(video) for video in videos]
    assert calls == [runs / "bc"] * 200 + [runs / "onestep"] * 200  # Pendulum's episodes end after 200 steps
    assert all(len(imageio.mimread(video)) >= 100 for video in videos)


@pytest.mark.parametrize("main", [displace.main, film.main])
def test_runs_that_are_not_finished_or_know_no_environment_are_refused_in_one_sentence(main, runs, tmp_path):
    def error(*paths: Path) -> str:
        with pytest.raises(InputError) as caught:
            main(film.Args(runs=paths))
        assert "\n" not in str(caught.value)
        return str(caught.value).replace(str(tmp_path), "T")

    assert error(tmp_path / "no", runs / "bc").startswith("no run in T/no: ") and error().startswith(
        "no run was named: "
    )
    begun = Path(shutil.copytree(runs / "bc", tmp_path / "begun"))
    (begun / "policy.pt").unlink()
    assert "T/begun holds no policy" in error(begun)
    blind = Path(shutil.copytree(runs / "bc", tmp_path / "blind"))
    np.savez(
        tmp_path / "a.npz", observations=np.zeros((9, 3), np.float32), actions=np.zeros((9, 1), np.float32),
        rewards=np.zeros(9), terminals=np.zeros(9, bool), next_observations=np.ones((9, 3), np.float32),
    )  # fmt: skip
    config = (blind / "config.json").read_text()
    (blind / "config.json").write_text(config.replace('"pendulum/random-v0"', f'"{tmp_path}/a.npz"', 1))
    assert "T/a.npz names no environment" in error(blind)


@pytest.mark.parametrize("main, made", [(displace.main, "displaced.csv"), (film.main, "video.gif")])
def test_a_run_that_is_refused_is_passed_over_and_told_by_the_exit_status(main, made, runs, tmp_path, capsys):
    begun = Path(shutil.copytree(runs / "bc", tmp_path / "all" / "begun"))
    (begun / "policy.pt").unlink()
    done = Path(shutil.copytree(runs / "bc", tmp_path / "all" / "done", ignore=shutil.ignore_patterns(made)))
    assert main(film.Args(runs=(tmp_path / "all",))) == 1
    assert f"left out: {begun} holds no policy" in capsys.readouterr().err and (done / made).is_file()
    assert main(film.Args(runs=(done,))) == 0


@pytest.mark.parametrize("main", [displace.main, film.main])
def test_what_a_run_folder_names_is_imported_with_trust_alone(main, runs, tmp_path, monkeypatch):
    (tmp_path / "theirs.py").write_text("import gymnasium as gym\ngym.register('Theirs-v0', lambda **_: 1 / 0)")
    monkeypatch.syspath_prepend(tmp_path)
    folder = Path(shutil.copytree(runs / "bc", tmp_path / "run"))
    config = json.loads((folder / "config.json").read_text())
    config["args"]["env_id"] = "theirs:Theirs-v0"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="names theirs:Theirs-v0, code of .*: give --trust to import theirs$"):
        main(film.Args(runs=(folder,)))
    assert "theirs" not in sys.modules
    with pytest.raises(InputError, match="Cannot make environment 'theirs:Theirs-v0'"):
        main(film.Args(runs=(folder,), trust=True))
    assert sys.modules.pop("theirs")


@pytest.mark.parametrize("main, name", [(displace.main, "displaced.csv"), (film.main, "video.gif")])
def test_what_cannot_be_written_is_one_sentence_and_leaves_no_half_file(main, name, runs, tmp_path, monkeypatch):
    folder = Path(
        shutil.copytree(runs / "bc", tmp_path / "run", ignore=shutil.ignore_patterns("*.gif", "displaced.csv"))
    )
    (folder / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(InputError, match=f"^cannot write {folder / name} "):
        main(film.Args(runs=(Path("~/run"),)))
    assert not list(folder.glob("*.tmp")) and (folder / name).is_dir()


@pytest.mark.parametrize("damage", [{"args": []}, {"args": {"dataset": "pendulum/random-v0", "env_id": ""}}])
def test_a_damaged_run_is_refused_in_one_sentence(damage, runs, tmp_path):
    folder = Path(shutil.copytree(runs / "bc", tmp_path / "run"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | damage))
    with pytest.raises(InputError, match=f"^{folder}"):
        displace.main(film.Args(runs=(folder,)))


def test_what_cannot_be_rendered_is_said(runs, monkeypatch):
    monkeypatch.setattr(gym.wrappers, "RenderCollection", lambda env: 1 / 0)
    with pytest.raises(InputError, match="Pendulum-v1 cannot be filmed here .division by zero.: without a display"):
        film.film(runs / "bc")
