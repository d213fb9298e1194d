"""benchmarks/envs.py: the bench's environments, what their sets hold and lack, and its grids."""

import importlib
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from benchmarks import collect, envs, grid
from common.dataset import load_dataset

GRIDS = sorted((Path(__file__).resolve().parents[1] / "benchmarks" / "grids").glob("bench*.toml"))


@pytest.mark.parametrize("name", ["PendulumSpin-v0", "PointmassStitch-v0"])
@pytest.mark.filterwarnings("ignore:.*not within the optimal range|.*The reward.*")
def test_gymnasium_accepts_them_and_they_can_be_filmed(name):
    env = gym.make(f"benchmarks.envs:{name}", render_mode="rgb_array")
    check_env(env.unwrapped)
    env.reset(seed=0)
    picture = env.render()
    assert picture.dtype == np.uint8 and picture.ndim == 3 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 2


# --- PendulumSpin ---
def test_a_spin_moves_as_pendulum_does_and_pays_for_the_angle_turned():
    ours, pendulum = gym.make("PendulumSpin-v0"), gym.make("Pendulum-v1")
    (obs, _), (theirs, _) = ours.reset(seed=3), pendulum.reset(seed=3)
    assert np.array_equal(obs, theirs)
    turned, paid, truncated = 0.0, 0.0, False
    while not truncated:
        before, action = np.arctan2(obs[1], obs[0]), envs.spin(obs)
        obs, reward, terminated, truncated, _ = ours.step(action)
        assert not terminated and np.array_equal(obs, pendulum.step(action)[0])
        turned += (np.arctan2(obs[1], obs[0]) - before + np.pi) % (2 * np.pi) - np.pi
        paid += reward
    assert turned == pytest.approx(0.4 * paid, rel=1e-3) and turned > 6 * 2 * np.pi


def test_nobody_in_the_spin_set_turns_as_its_expert_does():
    rng, returns = np.random.default_rng(0), []
    env = gym.make("PendulumSpin-v0")
    for episode in collect.play_by(lambda: envs.begin_spin(rng), env, 4_000, 0):
        returns.append(episode.rewards.sum())
    assert len(returns) == 20 and max(returns) < 60
    assert np.mean([e.rewards.sum() for e in collect.play_by(lambda: ({}, 200, envs.spin), env, 4_000, 0)]) > 130


# --- PointmassStitch ---
def at(position, action):
    env = gym.make("PointmassStitch-v0")
    env.reset(options={"position": position})
    return env.step(np.array(action, np.float32))


@pytest.mark.parametrize("position, action, after", [
    ((-0.9, 0.0), (1, 0), (-0.8, 0.0)),  # along a road
    ((-0.5, 0.15), (1, 1), (-0.4, 0.2)),  # the wall stops what goes into it
    ((0.15, 0.5), (1, -1), (0.2, 0.4)),
    ((0.15, 0.15), (1, 1), (0.25, 0.2)),  # from the crossing into one road, not into both
    ((-1.0, 0.0), (-1, 0), (-1.0, 0.0)),
    ((0.0, 0.0), (9, 0), (0.1, 0.0)),
])  # fmt: skip
def test_a_point_moves_on_the_roads_and_walls_stop_it(position, action, after):
    assert at(position, action)[0] == pytest.approx(after, abs=1e-6)


def test_only_the_goal_pays():
    assert at((0, 0.8), (0, 1))[1] == pytest.approx(1)
    assert at((0, 0.6), (0, 1))[1] == pytest.approx(np.exp(-1))
    assert at((0, 0.1), (0, 1))[1] < 1e-5


def test_no_piece_comes_from_where_an_episode_begins_to_the_goal(tmp_path, monkeypatch):
    rng, env = np.random.default_rng(0), gym.make("PointmassStitch-v0")
    pieces = list(collect.play_by(lambda: envs.begin_stitch(rng), env, 4_000, 0))
    assert {len(piece.rewards) for piece in pieces} == {10} and all(piece.truncations[-1] for piece in pieces)
    paid = [piece for piece in pieces if piece.rewards.max() > 0.1]
    assert 0.05 < len(paid) / len(pieces) < 0.35
    assert min(piece.observations[:, 0].min() for piece in paid) > -0.5  # none of them saw the west
    north = [piece for piece in pieces if piece.observations[-1, 1] > 0.3]
    south = [piece for piece in pieces if piece.observations[-1, 1] < -0.3]
    assert 1.5 < len(south) / len(north) < 2.7  # an imitator turns the wrong way
    whole = next(collect.play_by(lambda: ({}, 50, envs.west_to_north), env, 50, 0))
    assert 17 <= np.argmax(whole.rewards > 0.9) + 1 <= 20 and whole.rewards.sum() > 30


# --- The sets ---
def test_a_set_is_recorded_by_name_with_reference_scores_and_stays(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OFFLINE_MBRL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setattr(collect, "NUM_REFERENCE", 5)
    names = ("pendulum/narrow", "pointmass/stitch")
    for name in names:
        log = envs.LOGS[name]
        monkeypatch.setitem(envs.LOGS, name, envs.Log(log.env_id, log.about, 1_000, log.begin, log.expert))
    collect.main(collect.Args(sets=names))
    narrow, stitch = (load_dataset(f"{name}-v0") for name in names)
    assert narrow.ref_scores == (-1230.0, -150.0) and len(narrow.obs) == 1_000
    assert stitch.ref_scores[0] < 1 < 30 < stitch.ref_scores[1]
    with_id = load_dataset("pointmass/stitch-v0", env_id="benchmarks.envs:PointmassStitch-v0")
    assert with_id.ref_scores == stitch.ref_scores and with_id.env_spec.id == "PointmassStitch-v0"
    capsys.readouterr()
    collect.main(collect.Args(sets=("pointmass/stitch",)))
    assert "pointmass/stitch-v0: exists and stays as it is" in capsys.readouterr().out


# --- The grids ---
@pytest.mark.parametrize("file", GRIDS, ids=lambda file: file.stem)
def test_a_method_has_one_setting_on_all_sets_and_leaves_nothing_to_tuned(file):
    args, settings = grid.Args(grid=str(file)), {}
    for run in grid.make_runs(*grid.read_grid(args), args):
        tuned = importlib.import_module(f"algos.{run.script}").TUNED.values()
        flags = {flag.removeprefix("--").removeprefix("no-") for flag in run.flags if flag.startswith("--")}
        assert {name.replace("_", "-") for row in tuned for name in row} <= flags
        lengths = {"num_updates", "eval_interval", "checkpoint_interval", "dataset", "env_id", "seed"}
        method = {name: value for name, value in run.settings.items() if name not in lengths}
        assert settings.setdefault((run.script, run.variant), method) == method
        length = [run.settings[name] for name in ("num_updates", "eval_interval", "eval_episodes", "score_evals")]
        assert settings.setdefault(run.settings["dataset"], length) == length
