"""The toy's environment against what is known in closed form, and its measurements on policies written by hand."""

import json

import gymnasium as gym
import numpy as np
import pytest

from benchmarks.grid import read_settings
from benchmarks.studies import toy_recovery as toy
from common.dataset import load_dataset


@pytest.fixture(scope="module")
def log():
    return toy.record()


def round_the_ring(position):
    angle = np.arctan2(position[:, 1], position[:, 0])
    return 0.6 * np.stack([-np.sin(angle), np.cos(angle)], axis=-1)


def back_to_the_ring(position):
    radius = np.linalg.norm(position, axis=-1, keepdims=True)
    return round_the_ring(position) + np.clip((position / radius - position) / toy.STEP, -0.3, 0.3)


def test_environment_moves_and_pays_as_the_functions_say():
    env = gym.make("PointMass-v0")
    obs, _ = env.reset(seed=3)
    position = env.unwrapped.position.copy()
    assert abs(np.linalg.norm(position) - 1) < 0.15
    for t in range(50):
        action = env.action_space.sample() if t else np.array([3.0, -3.0])  # beyond the box: as much as the box allows
        after = position + 0.1 * np.clip(action, -1, 1)
        obs, reward, terminated, truncated, _ = env.step(action.astype(np.float32))
        np.testing.assert_allclose(obs, after, atol=1e-6)
        assert reward == pytest.approx(float(toy.reward(position, after)), abs=1e-5)
        assert not terminated and truncated == (t == 49)
        position = env.unwrapped.position.copy()


def test_reward_is_the_arc_in_steps_also_across_the_cut_and_nothing_off_the_road():
    angle = np.array([0.3, np.pi - 0.02, 0.3])
    start, end = (np.stack([np.cos(a), np.sin(a)], axis=-1) for a in (angle, angle + [0.06, 0.06, -0.06]))
    np.testing.assert_allclose(toy.reward(start, end), [0.6, 0.6, -0.6])
    np.testing.assert_array_equal(toy.reward(0.55 * start, 0.55 * end), 0)
    np.testing.assert_array_equal(toy.reward(1.45 * start, 1.45 * end), 0)
    assert (toy.reward(0.65 * start, 0.65 * end) != 0).all()


def test_inverse_is_the_inverse_of_move():
    rng = np.random.default_rng(0)
    position, action = rng.normal(size=(2, 50, 2)).clip(-1, 1)
    np.testing.assert_allclose(toy.inverse(position, toy.move(position, action)), action, atol=1e-12)


def test_log_stays_on_the_road_has_a_hole_and_never_corrects_itself(log):
    obs, next_obs = log["observations"], log["next_observations"]
    radius = np.linalg.norm(obs, axis=-1)
    assert (np.abs(np.linalg.norm(np.concatenate([obs, next_obs]), axis=-1) - 1) < toy.ROAD).all()
    np.testing.assert_allclose(toy.move(obs, log["actions"]), next_obs)
    np.testing.assert_allclose(toy.reward(obs, next_obs), log["rewards"])
    assert not log["terminals"].any() and log["timeouts"].sum() == 400 and log["timeouts"][11::12].all()
    radial = (log["actions"] * obs).sum(axis=-1) / radius
    slope = np.polyfit(radius, radial, 1)[0]  # of a log that corrects itself in one step: -1 / STEP
    assert abs(slope) < 0.25
    assert np.bincount(((np.arctan2(*obs.T) + np.pi) / (2 * np.pi) * 20).astype(int), minlength=20).min() > 100


def test_log_is_read_by_the_scripts_with_the_environment(log, tmp_path):
    np.savez(tmp_path / "ring.npz", **log)
    data = load_dataset(str(tmp_path / "ring.npz"), "cpu", toy.ENV_ID)
    assert data.obs.shape == (4800, 2) and data.successor_known.all() and data.env_spec.id == "PointMass-v0"


def test_distance_is_that_to_the_nearest_logged_state(log):
    points, logged = np.random.default_rng(1).normal(size=(3, 5, 2)), log["observations"]
    by_hand = np.sqrt(((points[:, :, None] - logged) ** 2).sum(axis=-1)).min(axis=-1)
    np.testing.assert_allclose(toy.distance(points, logged), by_hand, atol=1e-6)
    assert toy.distance(logged[:7], logged).max() < 1e-6


def test_kicks_go_inwards_then_outwards_along_the_radius():
    position = toy.on_ring(np.random.default_rng(0), 6)
    change = np.linalg.norm(position + toy.kicks(position), axis=-1) - np.linalg.norm(position, axis=-1)
    np.testing.assert_allclose(change, [-0.5] * 3 + [0.5] * 3)


def test_measurement_tells_a_policy_that_returns_from_one_that_does_not(log):
    far, lost = {}, {}
    for act in (round_the_ring, back_to_the_ring):
        (_, calm), (path, kicked) = toy.rollout(act, False), toy.rollout(act, True)
        assert path.shape == (toy.AFTER + 1, toy.NUM_EPISODES, 2)
        far[act], lost[act] = toy.distance(path, log["observations"]), (calm - kicked).mean()
        assert calm.mean() > 0.9 * 0.5 * toy.AFTER
    assert far[round_the_ring][0].min() > 0.1 and far[round_the_ring][-1, toy.NUM_EPISODES // 2 :].min() > 0.1
    assert far[back_to_the_ring][-1].max() < toy.NEAR
    assert lost[back_to_the_ring] < 0.3 * lost[round_the_ring]


def test_table_and_figure_tell_the_two_policies_apart(log, tmp_path):
    acts = {"SAC+BC": round_the_ring, "OSR": back_to_the_ring, "SDC": back_to_the_ring}
    results = {name: [toy.rollout(act, kick) for kick in (False, True)] for name, act in acts.items()}
    paths, earned = ({name: np.stack([r[i] for r in pair])[None] for name, pair in results.items()} for i in range(2))
    rows = [line.strip("| ").split(" | ") for line in toy.score_table(paths, earned, log["observations"]).splitlines()]
    assert [row[:2] for row in rows[2:]] == [[name, side] for name in acts for side in ("in", "out")]
    assert [row[rows[0].index("back %")] for row in rows[2:]] == ["0", "0", "100", "100", "100", "100"]
    toy.draw(tmp_path / "figure.png", paths, log["observations"])
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_slope_is_one_for_the_exact_recovery_and_zero_where_the_perturbation_is_ignored(log):
    rng = np.random.default_rng(0)
    obs, action, next_obs = log["observations"], log["actions"], log["next_observations"]
    exact = toy.inverse(obs + 0.05 * rng.normal(size=obs.shape), next_obs)
    share, error, slope = toy.compare(exact, exact, action)
    assert share == pytest.approx((np.abs(exact) < 1).all(axis=1).mean()) and error == 0 and slope == pytest.approx(1)
    assert toy.compare(action, exact, action)[2] == 0
    assert toy.compare(action + 0.5 * (exact - action), exact, action)[2] == pytest.approx(0.5)
    fitted = np.where(np.abs(exact) < 1, exact, 7.0)  # what no single step can do does not count
    assert toy.compare(fitted, exact, action)[1] == 0


def test_policies_of_other_settings_are_refused_and_finished_ones_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "ROOT", tmp_path)
    monkeypatch.setattr(toy.subprocess, "run", lambda command, **_: commands.append(command[1:]))
    commands = []
    folder = toy.train("OSR", 1)
    args = read_settings(toy.osr, commands[0][1:])
    assert args["noise_scale"] == 0.3 and args["seed"] == 1
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"args": args}))
    assert toy.train("OSR", 1) == folder and commands[1][1] == "--resume"
    assert commands[1][-1] == "--trust"  # the run names toy_recovery's own environment
    del args["kl"]  # a setting that the run's commit did not have yet: its default
    (folder / "config.json").write_text(json.dumps({"args": args}))
    (folder / "policy.pt").touch()
    assert toy.train("OSR", 1) == folder and len(commands) == 2
    (folder / "config.json").write_text(json.dumps({"args": args | {"min_std": 0.5}}))
    with pytest.raises(SystemExit, match="osr__1 was trained with other settings"):
        toy.train("OSR", 1)
