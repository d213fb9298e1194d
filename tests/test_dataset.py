"""common/dataset.py: every row's successor is the true one, time limits are no terminals, bad input says what to do."""

import itertools
import json
import os
import re
import shutil
import sys
import tarfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest
import torch
from gymnasium.envs.registration import EnvSpec
from gymnasium.spaces import Box, Dict, Discrete, flatten
from minari.data_collector import EpisodeBuffer
from minari.serialization import serialize_space

import common
import common.dataset as dataset_module
from benchmarks.collect import record_random
from common.dataset import DEFAULT_DATASET, REF_SCORES, InputError, cache_dir, gym_class, load_dataset

TENSORS = ("obs", "action", "reward", "next_obs", "terminal", "successor_known", "episode_end")


@pytest.fixture(autouse=True)
def private_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setenv("OFFLINE_MBRL_CACHE", str(tmp_path / "cache"))


# --- Helpers ---
def make_rows(lengths=(4, 3, 5), ends="tlt", obs_dim=2, action_dim=1, seed=0) -> dict[str, np.ndarray]:
    """Episodes of random numbers. ends: a letter per episode, t terminal, l time limit, c cut off (no flag)."""
    rng, n = np.random.default_rng(seed), sum(lengths)
    observations = [rng.normal(size=(length + 1, obs_dim)).astype(np.float32) for length in lengths]
    last = np.cumsum(lengths) - 1
    rows = dict(
        observations=np.concatenate([o[:-1] for o in observations]),
        next_observations=np.concatenate([o[1:] for o in observations]),
        actions=rng.uniform(-1, 1, (n, action_dim)).astype(np.float32),
        rewards=rng.normal(size=n).astype(np.float32),
        terminals=np.zeros(n, bool),
        timeouts=np.zeros(n, bool),
    )
    rows["terminals"][[i for i, end in zip(last, ends) if end == "t"]] = True
    rows["timeouts"][[i for i, end in zip(last, ends) if end == "l"]] = True
    return rows


def without(rows, *keys):
    return {key: array for key, array in rows.items() if key not in keys}


def write_hdf5(path: Path, rows) -> str:
    with h5py.File(path, "w") as file:
        for key, array in rows.items():
            file[key] = array
    return str(path)


def write_minari(dataset_id, episodes, env=None, obs_space=None, action_space=None, **kwargs) -> Path:
    """episodes: (observations (T + 1, obs_dim), actions, rewards, terminations, truncations) each."""
    keys = ("observations", "actions", "rewards", "terminations", "truncations")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        minari.create_dataset_from_buffers(
            dataset_id, [EpisodeBuffer(**dict(zip(keys, episode))) for episode in episodes], env=env,
            observation_space=obs_space, action_space=action_space, **kwargs,
        )  # fmt: skip
    return Path(os.environ["MINARI_DATASETS_PATH"], dataset_id)


def made_up_episodes(lengths=(4, 3, 5), ends="tlt", action_dim=1):
    rows, start = make_rows(lengths, ends, action_dim=action_dim), 0
    for length in lengths:
        at = slice(start, start + length)
        observations = np.concatenate([rows["observations"][at], rows["next_observations"][at][-1:]])
        yield observations, rows["actions"][at], rows["rewards"][at], rows["terminals"][at], rows["timeouts"][at]
        start += length


def write_small_minari(dataset_id="toy/small-v0", lengths=(4, 3, 5), ends="tlt", high=1.0, **kwargs) -> Path:
    spaces = dict(obs_space=Box(-np.inf, np.inf, (2,)), action_space=Box(-high, high, (1,)))
    return write_minari(dataset_id, made_up_episodes(lengths, ends), **spaces, **kwargs)


def equal(a, b) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in TENSORS)


@pytest.fixture(scope="module")
def hopper_episodes():
    """Eight random episodes of Hopper-v5, the last cut after three steps; each step keeps what env.step returned."""
    env = gym.make("Hopper-v5")
    env.action_space.seed(0)
    episodes = []
    for i in range(8):
        obs, _ = env.reset(seed=i)
        steps, terminated = [], False
        while not terminated and not (i == 7 and len(steps) == 3):
            action = env.action_space.sample()
            next_obs, reward, terminated, _, _ = env.step(action)
            steps.append((obs, action, reward, next_obs, terminated, False))
            obs = next_obs
        episodes.append([np.array(column) for column in zip(*steps)])
    env.close()
    return episodes


def hopper_rows(episodes) -> dict[str, np.ndarray]:
    keys = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")
    return {key: np.concatenate(columns) for key, columns in zip(keys, zip(*episodes))}


def hopper_minari(episodes) -> Path:
    with_last_obs = ((np.vstack([o, n[-1:]]), a, r, t, limit) for o, a, r, n, t, limit in episodes)
    return write_minari("toy/hopper-v0", with_last_obs, env="Hopper-v5")


# --- Successors ---
@pytest.mark.parametrize("layout", ["minari", "hdf5"])
def test_successors_are_what_the_environment_returned_also_at_falls(layout, hopper_episodes, tmp_path):
    rows = hopper_rows(hopper_episodes)
    if layout == "minari":
        hopper_minari(hopper_episodes)
        data = load_dataset("toy/hopper-v0")
    else:
        data = load_dataset(write_hdf5(tmp_path / "a.hdf5", rows), env_id="Hopper-v5")
    assert np.array_equal(data.obs, rows["observations"].astype(np.float32))
    assert np.array_equal(data.next_obs, rows["next_observations"].astype(np.float32))
    assert np.array_equal(data.action, rows["actions"])
    assert np.array_equal(data.terminal, rows["terminals"].astype(np.float32)) and data.terminal.sum() == 7
    fallen = data.next_obs[data.terminal.bool()]
    assert ((fallen[:, 0] <= 0.7) | (fallen[:, 1].abs() >= 0.2)).all()  # not the upright start of the next episode
    assert data.successor_known.all() and data.episode_end.sum() == len(data.episode_returns) == 8
    assert np.allclose(data.episode_returns, [reward.sum() for _, _, reward, *_ in hopper_episodes], rtol=1e-5)


def test_without_successors_no_pair_crosses_an_episode(hopper_episodes, tmp_path):
    rows = hopper_rows(hopper_episodes)
    data = load_dataset(write_hdf5(tmp_path / "a.hdf5", without(rows, "next_observations")), env_id="Hopper-v5")
    assert len(data.obs) == len(rows["rewards"]) - 1  # only the last row, cut off, has no successor and no flag
    known = data.successor_known.numpy()
    assert np.array_equal(known, ~rows["terminals"][:-1])
    assert np.array_equal(data.next_obs[known], rows["next_observations"].astype(np.float32)[:-1][known])


def test_rows_before_a_time_limit_or_the_end_are_dropped_and_terminal_ones_kept(tmp_path):
    rows = make_rows((4, 3, 5, 2), "tltc")
    data = load_dataset(write_hdf5(tmp_path / "a.hdf5", without(rows, "next_observations")))
    kept = [i for i in range(14) if i not in (6, 13)]
    assert np.array_equal(data.obs, rows["observations"][kept])
    assert np.flatnonzero(data.terminal).tolist() == [3, 10]
    assert np.flatnonzero(~data.successor_known).tolist() == [3, 10]
    assert torch.equal(data.next_obs[[3, 10]], data.obs[[3, 10]])  # a placeholder, not a start state
    assert np.flatnonzero(data.episode_end).tolist() == [3, 5, 10, 11]
    whole_episodes = [rows["rewards"][a:b].sum() for a, b in ((0, 4), (4, 7), (7, 12), (12, 14))]
    assert np.allclose(data.episode_returns, whole_episodes)


def test_time_limits_are_never_terminals(tmp_path):
    data = load_dataset(write_hdf5(tmp_path / "a.hdf5", make_rows((4, 3), "lt")))
    assert np.flatnonzero(data.terminal).tolist() == [6] and np.flatnonzero(data.episode_end).tolist() == [3, 6]
    write_small_minari(lengths=(4, 3, 2), ends="ltc")
    data = load_dataset("toy/small-v0")
    assert np.flatnonzero(data.terminal).tolist() == [6] and np.flatnonzero(data.episode_end).tolist() == [3, 6, 8]


def test_an_unflagged_minari_episode_still_ends():
    write_small_minari(ends="cct")
    data = load_dataset("toy/small-v0")
    assert np.flatnonzero(data.episode_end).tolist() == [3, 6, 11] and len(data.episode_returns) == 3
    assert np.array_equal(data.next_obs, make_rows()["next_observations"])


def test_successors_reveal_unmarked_ends(tmp_path):
    rows = make_rows((4, 3, 5), "clc")
    expected = load_dataset(write_hdf5(tmp_path / "a.hdf5", rows))
    data = load_dataset(write_hdf5(tmp_path / "b.hdf5", without(rows, "timeouts")))
    assert np.flatnonzero(data.episode_end).tolist() == [3, 6, 11] and equal(data, expected)


def test_without_timeouts_and_successors_only_terminals_separate_and_a_note_says_so(tmp_path, capsys):
    rows = without(make_rows((4, 3, 5), "ttc"), "timeouts", "next_observations")
    data = load_dataset(write_hdf5(tmp_path / "a.hdf5", rows))
    assert np.flatnonzero(data.episode_end).tolist() == [3, 6, 10] and len(data.episode_returns) == 3
    assert "only its terminals separate episodes" in capsys.readouterr().err


# --- Layouts and places ---
def test_all_layouts_of_the_same_data_give_the_same_dataset(tmp_path):
    rows = make_rows()
    column = {key: array[:, None] for key, array in rows.items() if array.ndim == 1}
    double = {key: array.astype(np.float64) for key, array in rows.items()}
    np.savez(tmp_path / "a.npz", **rows)
    paths = [
        write_hdf5(tmp_path / "a.hdf5", rows),
        write_hdf5(tmp_path / "a.h5", {**rows, "infos/qpos": np.zeros(3), "metadata/algorithm": np.bytes_("SAC")}),
        write_hdf5(tmp_path / "column.hdf5", {**rows, **column}),
        write_hdf5(tmp_path / "double.hdf5", double),
        str(tmp_path / "a.npz"),
    ]
    folder = write_small_minari()
    data = [load_dataset(name) for name in [*paths, "toy/small-v0", str(folder), str(folder / "data")]]
    assert all(equal(d, data[0]) for d in data)
    assert len({d.data_hash for d in data}) == 1
    assert data[0].obs.shape == (12, 2) and data[0].action.shape == (12, 1) and data[0].reward.shape == (12,)
    assert all(getattr(data[0], name).dtype == torch.float32 for name in TENSORS[:5])


def test_missing_minari_dataset_is_downloaded_when_there_is_a_network(monkeypatch):
    monkeypatch.setattr(minari, "download_dataset", write_small_minari)
    assert len(load_dataset("toy/small-v0").obs) == 12
    monkeypatch.setattr(minari, "download_dataset", lambda _: pytest.fail("it is there"))
    assert len(load_dataset("toy/small-v0").obs) == 12 and "toy/small-v0" in minari.list_local_datasets()


def test_a_download_that_breaks_off_leaves_nothing_that_looks_like_a_dataset(monkeypatch):
    def breaks_off(name: str) -> None:
        folder = write_small_minari(name)
        (folder / "data" / "main_data.hdf5").unlink()
        raise ConnectionError("the line is dead")

    monkeypatch.setattr(minari, "download_dataset", breaks_off)
    usual = os.environ["MINARI_DATASETS_PATH"]
    with pytest.raises(InputError, match="its download failed .ConnectionError: the line is dead"):
        load_dataset("toy/small-v0")
    assert os.environ["MINARI_DATASETS_PATH"] == usual and not list(Path(usual).glob("**/*.json"))
    monkeypatch.setattr(minari, "download_dataset", write_small_minari)
    assert len(load_dataset("toy/small-v0").obs) == 12


def test_a_folder_of_minaris_that_cannot_be_made_is_said(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "file" / "minari"))
    with pytest.raises(InputError, match="set MINARI_DATASETS_PATH to a folder that can be written"):
        load_dataset("toy/small-v0")
    assert len(load_dataset(DEFAULT_DATASET).obs) == 20_000  # it is none of them


def test_missing_minari_dataset_without_network_says_what_there_is():
    folder = write_small_minari()
    shutil.copytree(folder, folder.parents[1] / ".recording-killed" / "toy" / "half-v0")
    with pytest.raises(InputError) as error:
        load_dataset("toy/other-v0")
    root = os.environ["MINARI_DATASETS_PATH"]
    for words in ("'toy/other-v0'", f"{root} (toy/small-v0)", "minari download toy/other-v0", "tests have no network"):
        assert words in str(error.value)


# --- Dictionary observations ---
class ReachEnv(gym.Env):
    """Goal-conditioned. Its own keys are not sorted, those that Minari stores are."""

    metadata = {"render_modes": ["rgb_array"]}
    observation_space = Dict(observation=Box(-9, 9, (2,), np.float32), goal=Box(-9, 9, (3,), np.float64))
    action_space = Box(-2, 2, (1,))

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.goal, self.position = self.np_random.normal(size=3), np.zeros(2, np.float32)
        return self.obs(), {}

    def step(self, action):
        self.position = self.position + np.float32(action[0])
        return self.obs(), 1.0, False, False, {}

    def obs(self):
        return {"observation": self.position.copy(), "goal": self.goal.copy()}


@pytest.fixture
def reach_episodes(monkeypatch):
    """Two recorded episodes of Reach-v0: (dictionary of (T + 1, d) arrays, actions, rewards, ends, limits) each."""
    monkeypatch.setitem(gym.registry, "Reach-v0", EnvSpec("Reach-v0", entry_point=f"{__name__}:ReachEnv"))
    env, episodes = ReachEnv(), []
    for seed in range(2):
        observations = [env.reset(seed=seed)[0]] + [env.step(np.array([0.5]))[0] for _ in range(4)]
        observations = {key: np.array([obs[key] for obs in observations]) for key in ("observation", "goal")}
        actions, limit = np.full((4, 1), 0.5, np.float32), np.arange(4) == 3
        episodes.append((observations, actions, np.ones(4), np.zeros(4, bool), limit))
    return episodes


def write_reach(episodes, env="Reach-v0") -> None:
    """env: None writes the spaces only, as if the package that registers the environment were not here."""
    spaces = {} if env else dict(obs_space=ReachEnv.observation_space, action_space=ReachEnv.action_space)
    write_minari("toy/reach-v0", episodes, env=env, **spaces)


@pytest.mark.parametrize("env", ["Reach-v0", None])
def test_dictionaries_are_flattened_as_gymnasium_does(env, reach_episodes):
    write_reach(reach_episodes, env)
    data = load_dataset("toy/reach-v0")
    space = minari.load_dataset("toy/reach-v0").observation_space
    flat = [
        [flatten(space, {key: column[i] for key, column in observations.items()}) for i in range(5)]
        for observations, *_ in reach_episodes
    ]
    flat = np.array(flat, np.float32)  # (2, 5, 5)
    assert np.array_equal(data.obs, flat[:, :-1].reshape(8, 5))
    assert np.array_equal(data.next_obs, flat[:, 1:].reshape(8, 5)) and data.action_high == [2.0]
    assert (data.env_spec is None) == (env is None)


@pytest.mark.parametrize("env_id", [None, "Reach-v0"])
def test_environment_of_dictionaries_observes_what_the_data_hold(env_id, reach_episodes):
    write_reach(reach_episodes)
    data = load_dataset("toy/reach-v0", env_id=env_id)
    for env in (gym.make(data.env_spec), gym.make(data.env_spec, render_mode="rgb_array")):
        for start in (0, 4):  # the same seeds and actions as in the recording
            obs, _ = env.reset(seed=start // 4)
            next_obs, *_ = env.step(np.array([0.5], np.float32))
            assert env.observation_space.shape == (5,)
            assert np.array_equal(data.obs[start], obs.astype(np.float32))
            assert np.array_equal(data.next_obs[start], next_obs.astype(np.float32))
    envs = gym.vector.SyncVectorEnv([lambda: gym.make(data.env_spec)] * 2)
    assert envs.reset(seed=[0, 1])[0].shape == (2, 5)


def test_recording_of_a_dictionary_environment_is_flat(reach_episodes):
    record_random("Reach-v0", "toy/random-v0", num_steps=8, seed=0)
    data = load_dataset("toy/random-v0")
    env = gym.make(data.env_spec)
    # one episode: the goal is a constant, which is centred
    assert np.array_equal(data.obs[0], data.to_obs(env.reset(seed=0)[0])) and data.obs.shape == (8, 5)
    assert np.array_equal(data.raw_obs(data.obs)[0], env.reset(seed=0)[0])


# --- Embedded default ---
def test_embedded_default_is_100_random_pendulum_episodes():
    data = load_dataset(DEFAULT_DATASET)
    assert data.obs.shape == (20_000, 3) and len(data.episode_returns) == 100
    assert data.terminal.sum() == 0 and data.episode_end.sum() == 100 and data.successor_known.all()
    assert data.episode_returns.mean() == pytest.approx(-1200, abs=100)
    assert data.action.min() < -0.99 and data.action.max() > 0.99
    assert data.env_spec.id == "Pendulum-v1" and data.ref_scores == (-1230, -150)
    assert abs(data.normalised_score(data.episode_returns.mean())) < 5
    assert "100 episodes, 20,000 steps, 0 terminal" in data.summary()
    start = data.episode_end.roll(1)  # the others begin where the one before has led
    assert torch.equal(data.next_obs[:-1][~data.episode_end[:-1]], data.obs[~start])
    assert torch.allclose(data.obs[:, :2].square().sum(dim=1), torch.ones(20_000))


def test_embedded_default_is_made_once_whatever_is_killed_or_made_beside_it(monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        load_dataset(DEFAULT_DATASET)
    assert not list(cache_dir().rglob("*.npz"))
    make, beside = dataset_module._random_pendulum, []

    def make_while_another_process_does_so() -> dict:
        if not beside:
            beside.append(None)
            beside[0] = load_dataset(DEFAULT_DATASET)
        return make()

    monkeypatch.setattr(dataset_module, "_random_pendulum", make_while_another_process_does_so)
    data = load_dataset(DEFAULT_DATASET)
    monkeypatch.setattr(dataset_module, "_random_pendulum", lambda: pytest.fail("it is there"))
    assert equal(load_dataset(DEFAULT_DATASET), data) and equal(beside[0], data)
    assert len(list(cache_dir().rglob("*.npz"))) == 1


# --- Actions ---
def test_actions_are_scaled_from_the_box_and_back(tmp_path):
    rows = make_rows(obs_dim=3)
    rows["actions"] *= 2
    data = load_dataset(write_hdf5(tmp_path / "a.hdf5", rows), env_id="Pendulum-v1")
    assert np.allclose(data.action, rows["actions"] / 2, atol=1e-7)
    assert np.allclose(data.to_env_action(data.action.numpy()), rows["actions"], atol=1e-6)
    assert data.to_env_action(np.array([[-7.0], [1.0]])).tolist() == [[-2.0], [2.0]]
    assert data.action_low.tolist() == [-2.0] and data.action_high.tolist() == [2.0]


def test_minari_box_scales_actions_without_an_environment():
    write_small_minari(high=4.0)
    data = load_dataset("toy/small-v0")
    assert np.allclose(data.action, make_rows()["actions"] / 4, atol=1e-7) and data.env_spec is None


def test_one_warning_counts_the_clipped_actions(tmp_path, capsys):
    rows = make_rows(action_dim=2)
    rows["actions"][[1, 5, 6]] = [[1.5, -3.0], [0.0, 1.1], [-2.0, 0.0]]
    data = load_dataset(write_hdf5(tmp_path / "a.hdf5", rows))
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "3 of 12 actions" in err
    assert data.action.abs().max() == 1 and data.action[1].tolist() == [1.0, -1.0]


# --- Scores and environments ---
def test_normalised_score_is_0_for_random_and_100_for_expert(tmp_path):
    data = load_dataset(write_hdf5(tmp_path / "a.hdf5", make_rows(obs_dim=11, action_dim=3)), env_id="Hopper-v4")
    assert data.normalised_score(3234.3) == pytest.approx(100)
    assert data.normalised_score(-20.272305) == pytest.approx(0)
    assert data.normalised_score(np.array([1422.0, 3234.3])) == pytest.approx([44.3146, 100], abs=1e-3)


def test_without_references_the_score_is_nan(tmp_path):
    data = load_dataset(write_hdf5(tmp_path / "a.hdf5", make_rows()))
    assert data.ref_scores is None and np.isnan(data.normalised_score(np.ones(2))).all() and "nan" in data.summary()


def test_references_of_the_dataset_win_over_the_table(hopper_episodes):
    observations = np.zeros((3, 11))
    steps = np.zeros((2, 3), np.float32), np.zeros(2), np.zeros(2, bool), np.array([False, True])
    write_minari("toy/a-v0", [(observations, *steps)], env="Hopper-v5", ref_min_score=1.0, ref_max_score=3.0)
    assert load_dataset("toy/a-v0").normalised_score(2.0) == 50.0
    hopper_minari(hopper_episodes)
    assert load_dataset("toy/hopper-v0").ref_scores == (-20.272305, 3234.3)  # of D4RL


@pytest.mark.parametrize("env_id", ["InvertedPendulum-v5", "other/Hopper-v0"])
def test_references_go_by_the_whole_name_and_not_to_other_namespaces(env_id, tmp_path, monkeypatch):
    spec = EnvSpec("other/Hopper-v0", entry_point="gymnasium.envs.mujoco.inverted_pendulum_v5:InvertedPendulumEnv")
    monkeypatch.setitem(gym.registry, spec.id, spec)
    data = load_dataset(write_hdf5(tmp_path / "a.hdf5", make_rows(obs_dim=4)), env_id=env_id)
    assert data.env_spec.id == env_id and data.ref_scores is None


def test_env_id_wins_and_may_name_the_package_that_registers_it(tmp_path, monkeypatch):
    (tmp_path / "my_envs.py").write_text(
        "import gymnasium as gym\n"
        "gym.register('MyPendulum-v3', entry_point='gymnasium.envs.classic_control.pendulum:PendulumEnv')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    data = load_dataset(DEFAULT_DATASET, env_id="my_envs:MyPendulum-v3")
    gym.registry.pop("MyPendulum-v3")
    assert data.env_spec.id == "MyPendulum-v3"


def test_episodes_end_at_the_time_limit_of_the_environment_or_where_it_has_none_at_ours(monkeypatch):
    monkeypatch.setattr("common.dataset.MOST_STEPS", 3)
    gym.register("Endless-v0", entry_point="gymnasium.envs.classic_control.pendulum:PendulumEnv")
    for env_id, last in (("Endless-v0", 3), ("Pendulum-v1", 200)):
        env = gym.make(load_dataset(DEFAULT_DATASET, env_id=env_id).env_spec)
        env.reset(seed=0)
        truncated = [env.step(np.zeros(1, np.float32))[3] for _ in range(last)]
        assert truncated == [False] * (last - 1) + [True]
    gym.registry.pop("Endless-v0")


# --- Hash and cache ---
def test_data_hash_is_of_the_contents(tmp_path):
    rows = make_rows()
    hashes = [load_dataset(write_hdf5(tmp_path / f"{i}.hdf5", rows)).data_hash for i in range(2)]
    assert hashes[0] == hashes[1]
    for i, key in itertools.product([0, 7], rows):
        changed = {**rows, key: rows[key].copy()}
        changed[key][i] = ~changed[key][i] if changed[key].dtype == bool else changed[key][i] / 2
        hashes.append(load_dataset(write_hdf5(tmp_path / f"{key}{i}.hdf5", changed)).data_hash)
    assert len(set(hashes)) == len(hashes) - 1


def test_data_hash_knows_the_box(tmp_path):
    path = write_hdf5(tmp_path / "a.hdf5", make_rows(obs_dim=3))
    assert load_dataset(path).data_hash != load_dataset(path, env_id="Pendulum-v1").data_hash


@pytest.fixture(params=["hdf5", "minari"])
def counted(request, tmp_path, monkeypatch):
    """A dataset's name, its main file, and a list that grows with every read of that file."""
    reads = []
    for name in ("_read_flat", "_read_minari"):
        real = getattr(dataset_module, name)
        monkeypatch.setattr(dataset_module, name, lambda *a, real=real: reads.append(1) or real(*a))
    if request.param == "minari":
        return "toy/small-v0", write_small_minari(high=2.0) / "data" / "main_data.hdf5", reads
    return write_hdf5(tmp_path / "a.hdf5", make_rows()), tmp_path / "a.hdf5", reads


def test_second_load_comes_from_the_cache_and_is_equal(counted):
    name, _, reads = counted
    first, second = load_dataset(name), load_dataset(name)
    assert len(reads) == 1 and equal(first, second) and first.data_hash == second.data_hash
    assert np.array_equal(first.episode_returns, second.episode_returns)


def test_cache_notices_a_touched_or_changed_file(counted):
    name, file, reads = counted
    first = load_dataset(name)
    os.utime(file, ns=(0, 12345))
    assert load_dataset(name).data_hash == first.data_hash and len(reads) == 2
    with h5py.File(file, "r+") as opened:
        (opened["rewards"] if "rewards" in opened else opened["episode_0/rewards"])[0] = 100.0
    changed = load_dataset(name)
    assert changed.reward[0] == 100.0 and changed.data_hash != first.data_hash and len(reads) == 3


@pytest.mark.parametrize("damage", [b"", b"not a zip", "cut", "flip"])
def test_damaged_cache_is_made_again(counted, damage):
    name, _, reads = counted
    first = load_dataset(name)
    (cache_file,) = (cache_dir() / "datasets").iterdir()
    contents = bytearray(cache_file.read_bytes())
    contents[contents.index(first.obs.numpy().tobytes())] ^= 1
    cache_file.write_bytes({"cut": contents[:700], "flip": contents}.get(damage, damage))
    again = load_dataset(name)
    assert equal(first, again) and len(reads) == 2
    load_dataset(name)
    assert len(reads) == 2 and len(list(cache_file.parent.iterdir())) == 1


def test_cache_that_cannot_be_written_is_only_a_note(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("OFFLINE_MBRL_CACHE", str(tmp_path / "file"))
    assert len(load_dataset(write_hdf5(tmp_path / "a.hdf5", make_rows())).obs) == 12
    assert "not cached" in capsys.readouterr().err


def test_cache_dir_follows_its_variables(monkeypatch):
    assert cache_dir() == Path(os.environ["OFFLINE_MBRL_CACHE"])
    monkeypatch.delenv("OFFLINE_MBRL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_dir() == Path("/x/offline-mbrl")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "offline-mbrl"


# --- Bad input ---
def spoiled(key, value, row=5):
    rows = make_rows()
    rows[key] = rows[key].astype(np.float32)
    rows[key][row] = value
    return rows


BAD_ROWS = {
    "missing keys": (without(make_rows(), "rewards", "terminals"), ["lacks rewards, terminals", "observations"]),
    "nan": (spoiled("observations", np.nan), ["NaN", "observations in row 5"]),
    "infinite": (spoiled("rewards", np.inf, row=2), ["infinite", "rewards in row 2"]),
    "nan flag": (spoiled("terminals", np.nan), ["NaN", "terminals in row 5"]),
    "nan successor": (spoiled("next_observations", np.nan, 11), ["next_observations in row 11"]),
    "lengths": ({**make_rows(), "actions": np.zeros((9, 1), np.float32)}, ["12 observations", "9 actions"]),
    "successor width": ({**make_rows(), "next_observations": np.zeros((12, 3))}, ["(12, 2)", "(12, 3)"]),
    "empty": ({key: array[:0] for key, array in make_rows().items()}, ["empty", "no rows"]),
    "nothing left": (without(make_rows((1,), "l"), "next_observations"), ["empty", "next_observations"]),
    "discrete": ({**make_rows(), "actions": np.zeros(12, np.int64)}, ["int64", "discrete"]),
    "images": ({**make_rows(), "observations": np.zeros((12, 4, 4))}, ["observations of shape (12, 4, 4)"]),
    "wide rewards": ({**make_rows(), "rewards": np.zeros((12, 2))}, ["rewards of shape (12, 2)"]),
}


@pytest.mark.parametrize("case", BAD_ROWS)
@pytest.mark.parametrize("suffix", ["hdf5", "npz"])
def test_bad_rows_give_a_sentence(case, suffix, tmp_path):
    rows, words = BAD_ROWS[case]
    path = tmp_path / f"bad.{suffix}"
    write_hdf5(path, rows) if suffix == "hdf5" else np.savez(path, **rows)
    with pytest.raises(InputError) as error:
        load_dataset(str(path))
    assert str(path) in str(error.value) and all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("suffix", ["hdf5", "npz"])
@pytest.mark.parametrize("contents", ["text", "cut", "empty"])
def test_damaged_files_give_a_sentence(suffix, contents, tmp_path):
    path = tmp_path / f"bad.{suffix}"
    write_hdf5(path, make_rows()) if suffix == "hdf5" else np.savez(path, **make_rows())
    whole = path.read_bytes()
    path.write_bytes({"text": b"<html>not found</html>", "cut": whole[: len(whole) // 2], "empty": b""}[contents])
    with pytest.raises(InputError, match="Cannot read .*bad.*: get it again, or store it as"):
        load_dataset(str(path))


@pytest.mark.parametrize("name, words", [
    ("/nowhere/a.hdf5", "Cannot read /nowhere/a.hdf5 .*No such file"),
    ("/nowhere/folder", "no file, no folder"),
    ("not an id!", "No dataset 'not an id!'"),
    ("", "No dataset ''"),
])  # fmt: skip
def test_names_of_nothing_give_a_sentence(name, words):
    with pytest.raises(InputError, match=words):
        load_dataset(name)


def test_file_of_another_kind_gives_a_sentence(tmp_path):
    (tmp_path / "a.csv").touch()
    with pytest.raises(InputError, match="Cannot read .*a.csv .* store it as .hdf5 or .npz"):
        load_dataset(str(tmp_path / "a.csv"))


@pytest.mark.parametrize("env_id, words", [
    ("Hoper-v5", ["'Hoper-v5'", "Hopper"]),
    ("Hopper-v3", ["'Hopper-v3'"]),
    ("no_such_package:Env-v0", ["no_such_package"]),
    ("CartPole-v1", ["CartPole-v1", "Discrete", "not discrete"]),
    ("Hopper-v5", ["observations of 2", "Hopper-v5 has 11"]),
    ("MountainCarContinuous-v0", []),
    ("Pendulum-v1", ["observations of 2", "Pendulum-v1 has 3"]),
])  # fmt: skip
def test_environments_that_do_not_fit_give_a_sentence(env_id, words, tmp_path):
    path = write_hdf5(tmp_path / "a.hdf5", make_rows())
    if not words:  # two observations, one action: this one fits
        assert load_dataset(path, env_id=env_id).env_spec.id == env_id
        return
    with pytest.raises(InputError) as error:
        load_dataset(path, env_id=env_id)
    assert all(word in str(error.value) for word in words), error.value


def test_action_widths_that_do_not_fit_give_a_sentence(tmp_path):
    path = write_hdf5(tmp_path / "a.hdf5", make_rows(obs_dim=11, action_dim=2))
    with pytest.raises(InputError, match="actions of 2 numbers but Hopper-v5 has 3"):
        load_dataset(path, env_id="Hopper-v5")


@pytest.mark.parametrize("spaces, words", [
    (dict(obs_space=Box(-9, 9, (2,)), action_space=Discrete(3)), "Discrete"),
    (dict(obs_space=Dict(a=Box(-9, 9, (2,)), b=Discrete(3)), action_space=Box(-1, 1, (1,))), "Discrete.* not discrete"),
    (dict(obs_space=Dict(a=Box(0, 255, (4, 4), np.uint8)), action_space=Box(-1, 1, (1,))), "not discrete or image"),
    (dict(obs_space=Dict(a=Dict(b=Box(-9, 9, (2,)))), action_space=Box(-1, 1, (1,))), "only .* vectors"),
])  # fmt: skip
def test_minari_spaces_that_are_not_supported_give_a_sentence(spaces, words):
    write_minari("toy/a-v0", [], **spaces)
    with pytest.raises(InputError, match=words):
        load_dataset("toy/a-v0")


def test_unbounded_minari_box_is_replaced_by_the_one_of_env_id():
    spaces = dict(obs_space=Box(-np.inf, np.inf, (2,)), action_space=Box(-np.inf, np.inf, (1,)))
    write_minari("toy/a-v0", made_up_episodes(), **spaces)
    assert load_dataset("toy/a-v0", env_id="MountainCarContinuous-v0").action_high.tolist() == [1.0]


@pytest.mark.parametrize("case, words", [
    ("T observations", "not whole, arrays"),
    ("nan", "NaN or infinite observations in row 4"),
    ("step count", "not whole, .* 13 steps"),
    ("cut", "Cannot read"),
    ("no data", "Cannot read"),
    ("no steps", "Cannot read"),
])  # fmt: skip
def test_damaged_minari_datasets_give_a_sentence(case, words, tmp_path):
    folder = write_small_minari()
    data_file, metadata_file = folder / "data" / "main_data.hdf5", folder / "data" / "metadata.json"
    if case == "T observations":
        with h5py.File(data_file, "r+") as file:
            observations = file["episode_1/observations"][:-1]
            del file["episode_1/observations"]
            file["episode_1/observations"] = observations
    elif case == "nan":
        with h5py.File(data_file, "r+") as file:
            file["episode_1/observations"][0] = np.nan
    elif case == "step count":
        metadata_file.write_text(metadata_file.read_text().replace('"total_steps": 12', '"total_steps": 13'))
    elif case == "cut":
        data_file.write_bytes(data_file.read_bytes()[:3000])
    elif case == "no steps":
        metadata = metadata_file.read_text()
        metadata_file.write_text(re.sub('"total_(steps|episodes)": [0-9]+', r'"total_\1": 0', metadata))
    elif case == "no data":
        data_file.unlink()
    with pytest.raises(InputError, match=words):
        load_dataset("toy/small-v0")


def test_a_box_that_is_not_symmetric_is_mapped_to_minus_1_to_1_and_back():
    low, high = np.float32([0, -2]), np.float32([1, 6])
    (observations, _, *steps), *_ = made_up_episodes((3,), "t", action_dim=2)
    logged = np.float32([[0, -2], [0.5, 2], [1, 6]])
    spaces = {"obs_space": Box(-np.inf, np.inf, (2,)), "action_space": Box(low, high)}
    write_minari("toy/box-v0", [(observations, logged, *steps)], **spaces)
    data = load_dataset("toy/box-v0")
    assert data.action.tolist() == [[-1, -1], [0, 0], [1, 1]]
    np.testing.assert_allclose(
        data.to_env_action(np.float32([[-1, 0], [0.5, 1], [-3, 3]])), [[0, 2], [0.75, 6], [0, 6]]
    )


# --- Code never runs from data ---
def change_metadata(folder: Path, **changes) -> dict:
    """Rewrites what stands beside the data; None removes a key. Returns the new metadata."""
    file = folder / "data" / "metadata.json"
    metadata = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in metadata.items() if value is not None}))
    return metadata


def write_pendulum(**spec) -> Path:
    """A recording of two episodes of Pendulum-v1 whose stored environment is changed by `spec`."""
    rng, end = np.random.default_rng(0), np.arange(4) == 3
    episode = rng.normal(size=(5, 3)), rng.uniform(-2, 2, (4, 1)).astype(np.float32), end * 1.0, end & False, end
    folder = write_minari("toy/pendulum-v0", [episode] * 2, env="Pendulum-v1")
    stored = json.loads(json.loads((folder / "data" / "metadata.json").read_text())["env_spec"])
    change_metadata(folder, env_spec=json.dumps(stored | spec))
    return folder


def command(marker: Path) -> dict:
    return {"entry_point": "subprocess:check_output", "kwargs": {"args": ["touch", str(marker)]}}


NONE = {"kwargs": {}}
HOSTILE = {
    "entry point": (command, "subprocess:check_output"),
    "module beside the data": (lambda _: {"entry_point": "hostile:Env", "id": "Hostile-v0"}, "hostile:Env"),
    "vector entry point": (lambda _: {"vector_entry_point": "hostile:Env"}, "hostile:Env"),
    "wrapper": (lambda marker: {"additional_wrappers": [{"name": "TimeLimit", **command(marker)}]}, "check_output"),
    "function beside gymnasium's wrappers": (
        lambda _: {"additional_wrappers": [{"name": "x", "entry_point": "gymnasium.wrappers.common:deepcopy", **NONE}]},
        "gymnasium.wrappers.common:deepcopy",
    ),
    "environment inside": (lambda _: {"kwargs": {"env_id": "hostile:Env-v0"}}, "hostile:Env-v0"),
    "entry point of this program": (lambda _: {"entry_point": "common.dataset:cache_dir"}, "common.dataset:cache_dir"),
}


@pytest.mark.parametrize("has_spaces", [True, False])
@pytest.mark.parametrize("case", HOSTILE)
def test_what_only_the_data_name_is_not_run_but_named(case, has_spaces, tmp_path, monkeypatch):
    spec, word = HOSTILE[case]
    folder = write_pendulum(**spec(tmp_path / "ran"))
    (folder / "hostile.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    if not has_spaces:  # Minari makes the environment when it opens the folder
        change_metadata(folder, action_space=None)
    monkeypatch.chdir(folder)  # where the working directory is importable
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(InputError, match=f"would run code: entry point .*{word}.*--trust"):
        load_dataset("toy/pendulum-v0")
    if has_spaces:
        assert load_dataset("toy/pendulum-v0", env_id="Pendulum-v1").env_spec == gym.spec("Pendulum-v1")
    assert not (tmp_path / "ran").exists()


def test_trust_runs_what_the_data_name(tmp_path, monkeypatch):
    folder = write_pendulum(entry_point="trusted_simulator:Simulator", id="Simulator-v0")
    (tmp_path / "trusted_simulator.py").write_text(
        "from gymnasium.envs.classic_control.pendulum import PendulumEnv\nclass Simulator(PendulumEnv): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    env = gym.make(load_dataset(str(folder), trust=True).env_spec)
    assert type(env.unwrapped).__name__ == "Simulator"


def test_a_package_that_is_missing_is_named_and_with_trust_costs_only_the_environment():
    write_pendulum(entry_point="no_such_package.envs:Env", id="Maze-v0", kwargs={"maze_map": [[1, 0]]})
    with pytest.raises(InputError, match="install its package"):
        load_dataset("toy/pendulum-v0")
    data = load_dataset("toy/pendulum-v0", trust=True)
    assert len(data.obs) == 8 and data.env_spec.id == "Maze-v0"
    with pytest.raises(ModuleNotFoundError):
        gym.make(data.env_spec)


@pytest.mark.parametrize("space", [
    {"type": "Box", "dtype": "__import__('os').system('touch ran')", "shape": [1], "low": [-2.0], "high": [2.0]},
    {"type": "os:getcwd", "shape": [1]},
])  # fmt: skip
def test_spaces_are_parsed_and_never_evaluated(space, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    change_metadata(write_pendulum(), action_space=json.dumps(space))
    with pytest.raises(InputError, match="Cannot read"):
        load_dataset("toy/pendulum-v0")
    assert not (tmp_path / "ran").exists()


def test_settings_and_gymnasiums_own_wrappers_of_a_registered_environment_are_taken_over():
    wrappers = [{"name": "ClipReward", "entry_point": "gymnasium.wrappers.transform_reward:ClipReward",
                 "kwargs": {"min_reward": -1.0, "max_reward": None}}]  # fmt: skip
    write_pendulum(kwargs={"g": 5.0}, additional_wrappers=wrappers, max_episode_steps=7)
    env = gym.make(load_dataset("toy/pendulum-v0").env_spec)
    assert env.unwrapped.g == 5.0 and env.spec.max_episode_steps == 7
    assert isinstance(env, gym.wrappers.ClipReward)


# --- Metadata that cannot be ---
@pytest.mark.parametrize("key", ["total_steps", "total_episodes"])
@pytest.mark.parametrize("value", [[12], "many", "", -1, True, 1.5, None])
def test_counts_that_are_none_give_a_sentence(key, value):
    change_metadata(write_small_minari(), **{key: value})
    with pytest.raises(InputError, match="Cannot read|not whole"):
        load_dataset("toy/small-v0")


def test_arrays_of_other_widths_than_promised_are_not_repeated_to_fit():
    change_metadata(write_small_minari(), action_space=serialize_space(Box(-1, 1, (3,))))
    with pytest.raises(InputError, match="actions of 1 numbers but its own space has 3"):
        load_dataset("toy/small-v0")


def test_reference_scores_that_cannot_be_are_left_out():
    for low, high in ((1.0, 1.0), (2.0, 1.0), (None, 3.0), (float("nan"), 1.0), (0.0, float("inf"))):
        shutil.rmtree(Path(os.environ["MINARI_DATASETS_PATH"]), ignore_errors=True)
        change_metadata(write_small_minari(), ref_min_score=low, ref_max_score=high)
        assert load_dataset("toy/small-v0").ref_scores is None


def mutants(seed: int, num: int) -> Iterator[str]:
    """Metadata with one value exchanged or removed, or with wrong bytes."""
    rng, folder = np.random.default_rng(seed), write_pendulum(kwargs={"g": 9.0})
    text = (folder / "data" / "metadata.json").read_text()
    values = [None, [], {}, "", "word", -1, 0, 3, 1.5, True, float("nan"), 10**15, [[1]], "os:getcwd", "\n"]
    for i in range(num):
        metadata = json.loads(text)
        nested = {key: json.loads(metadata[key]) for key in ("env_spec", "observation_space", "action_space")}
        where = [metadata, *nested.values()][rng.integers(4)]
        where[list(where)[rng.integers(len(where))]] = values[rng.integers(len(values))]
        metadata |= {key: json.dumps(value) for key, value in nested.items() if metadata[key]}
        mutant = json.dumps(metadata)
        if i % 3 == 0:
            at = rng.integers(len(text))
            mutant = text[:at] + chr(rng.integers(32, 127)) + text[at + rng.integers(3) :]
        (folder / "data" / "metadata.json").write_text(mutant)
        yield mutant


def test_no_metadata_give_a_traceback(capsys):
    outcomes = {"loaded": 0, "refused": 0}
    for mutant in mutants(seed=0, num=300):
        try:
            load_dataset("toy/pendulum-v0")
            outcomes["loaded"] += 1
        except InputError as error:
            assert "\n" not in str(error), error
            outcomes["refused"] += 1
        except Exception:
            pytest.fail(mutant)
    assert min(outcomes.values()) > 30, outcomes


@pytest.mark.parametrize("suffix", ["npz", "hdf5"])
def test_no_changed_bytes_of_a_file_give_a_traceback(suffix, tmp_path, capsys):
    rng, path = np.random.default_rng(0), tmp_path / f"a.{suffix}"
    write_hdf5(path, make_rows()) if suffix == "hdf5" else np.savez(path, **make_rows())
    whole = path.read_bytes()
    for i in range(100):
        contents = bytearray(whole[: rng.integers(len(whole)) if i % 4 == 0 else None])
        for _ in range(rng.integers(1, 8) if contents else 0):
            contents[rng.integers(len(contents))] = rng.integers(256)
        path.write_bytes(contents)
        try:
            load_dataset(str(path))
        except InputError:
            pass


# --- Identity ---
def test_contents_that_changed_behind_an_equal_time_and_size_are_read_again(counted):
    name, file, reads = counted
    first, stat = load_dataset(name), file.stat()
    with h5py.File(file, "r+") as opened:
        (opened["rewards"] if "rewards" in opened else opened["episode_0/rewards"])[0] = 100.0
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (stat.st_size, stat.st_mtime_ns)
    changed = load_dataset(name)
    assert changed.reward[0] == 100.0 and changed.data_hash != first.data_hash and len(reads) == 2


def test_a_release_unpacked_over_the_old_one_with_a_fixed_time_is_read_again(tmp_path):
    means = []
    for factor in (1, -1):
        rows = make_rows()
        np.savez(tmp_path / "log.npz", **rows | {"rewards": factor * rows["rewards"]})
        with tarfile.open(tmp_path / "release.tar", "w") as archive:
            entry = archive.gettarinfo(tmp_path / "log.npz", "log.npz")
            entry.mtime = 1_700_000_000
            archive.addfile(entry, (tmp_path / "log.npz").open("rb"))
        with tarfile.open(tmp_path / "release.tar") as archive:
            archive.extractall(tmp_path, filter="data")
        means.append(load_dataset(str(tmp_path / "log.npz")).reward.mean())
    assert means[0] == -means[1]


def test_where_neither_times_nor_inodes_tell_the_contents_do(tmp_path, monkeypatch):
    real = os.fstat(0)
    monkeypatch.setattr(os, "fstat", lambda file: SimpleNamespace(
        st_size=os.lseek(file, 0, os.SEEK_END), st_mtime_ns=0, st_ctime_ns=0, st_ino=0, st_mode=real.st_mode
    ))  # fmt: skip
    path, versions = tmp_path / "a.npz", set()
    for place in (None, 0, 2_000_000, -1):
        contents = bytearray(3_000_000)
        contents[place or 0] = place is not None
        path.write_bytes(contents)
        versions.add(dataset_module._version(path))
    assert len(versions) == 4


def test_metadata_of_a_minari_dataset_are_part_of_what_it_is():
    folder = write_small_minari() / "data"
    first = dataset_module._version(folder)
    assert dataset_module._version(folder) == first
    (folder / "metadata.json").write_text((folder / "metadata.json").read_text() + " ")
    assert dataset_module._version(folder) != first


# --- One sentence for one cause ---
def spaced(action_space) -> type[gym.Env]:
    space = action_space

    class Spaced(gym.Env):
        observation_space, action_space = Box(-9, 9, (2,), np.float32), space

    return Spaced


def test_an_environment_without_action_bounds_is_told_what_helps(tmp_path, monkeypatch):
    env = spaced(Box(-np.inf, np.inf, (1,)))
    monkeypatch.setitem(gym.registry, "Open-v0", EnvSpec("Open-v0", entry_point=env))
    path = write_hdf5(tmp_path / "a.hdf5", make_rows())
    with pytest.raises(InputError, match="without bounds: wrap it in TransformAction"):
        load_dataset(path, env_id="Open-v0")

    def bounded() -> gym.Env:  # what the sentence says
        return gym.wrappers.TransformAction(env(), lambda action: action, Box(-1, 1, (1,)))

    monkeypatch.setitem(gym.registry, "Open-v0", EnvSpec("Open-v0", entry_point=bounded))
    assert load_dataset(path, env_id="Open-v0").action_high == [1.0]


def test_unbounded_components_take_the_range_of_the_data_and_a_note_says_so(capsys):
    (observations, _, *steps), *_ = made_up_episodes((3,), "t", action_dim=2)
    logged = np.float32([[-3, -0.5], [1, 0], [5, 0.5]])
    space = Box(np.float32([-np.inf, -1]), np.float32([np.inf, 1]))
    write_minari("toy/log-v0", [(observations, logged, *steps)], obs_space=Box(-9, 9, (2,)), action_space=space)
    data = load_dataset("toy/log-v0")
    assert data.action_low.tolist() == [-3, -1] and data.action_high.tolist() == [5, 1]
    assert data.action.tolist() == [[-1, -0.5], [0, 0], [1, 0.5]]
    assert "toy/log-v0 have no bounds: the data's own range is taken, [-3, 5], [-1, 1]" in capsys.readouterr().err


@pytest.mark.parametrize("layout", ["env_id", "minari"])
def test_a_component_whose_bounds_are_equal_is_a_constant(layout, tmp_path, monkeypatch, capsys):
    space, rows = Box(np.float32([-2, 3]), np.float32([2, 3])), make_rows((3,), "t", action_dim=2)
    rows["actions"] = np.float32([[-2, 3], [0, 3], [2, 3]])
    if layout == "env_id":
        monkeypatch.setitem(gym.registry, "Fixed-v0", EnvSpec("Fixed-v0", spaced(space), disable_env_checker=True))
        data = load_dataset(write_hdf5(tmp_path / "a.hdf5", rows), env_id="Fixed-v0")
    else:
        (observations, _, *steps), *_ = made_up_episodes((3,), "t", action_dim=2)
        write_minari(
            "toy/a-v0", [(observations, rows["actions"], *steps)], obs_space=Box(-9, 9, (2,)), action_space=space
        )
        data = load_dataset("toy/a-v0")
    assert data.action.tolist() == [[-1, 0], [0, 0], [1, 0]] and "clipped" not in capsys.readouterr().err
    assert data.to_env_action(np.float32([[1, -1], [0.5, 1]])).tolist() == [[2, 3], [1, 3]]


def test_a_constant_that_the_data_do_not_keep_is_counted(tmp_path, monkeypatch, capsys):
    space = Box(np.float32([3]), np.float32([3]))
    monkeypatch.setitem(gym.registry, "Fixed-v0", EnvSpec("Fixed-v0", spaced(space), disable_env_checker=True))
    rows = make_rows() | {"actions": np.full((12, 1), 3, np.float32)}
    rows["actions"][4] = 2.9
    data = load_dataset(write_hdf5(tmp_path / "a.hdf5", rows), env_id="Fixed-v0")
    assert not data.action.any() and "1 of 12 actions" in capsys.readouterr().err


@pytest.fixture
def own_common(tmp_path, monkeypatch):
    """A working directory with a package `common` of its own, as many repositories have one."""
    (tmp_path / "common").mkdir()
    (tmp_path / "common" / "__init__.py").write_text("RADIUS = 1.0\n")
    (tmp_path / "common" / "geometry.py").write_text("SIDES = 4\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(common, "__path__", list(common.__path__))
    yield tmp_path
    for name in ("common.geometry", "own_simulator"):
        sys.modules.pop(name, None)
    gym.registry.pop("Own-v0", None)


def write_own_simulator(folder: Path, first_line: str) -> None:
    register = (
        "import gymnasium as gym\ngym.register('Own-v0', 'gymnasium.envs.classic_control.pendulum:PendulumEnv')\n"
    )
    (folder / "own_simulator.py").write_text(f"{first_line}\n{register}")


def test_a_package_of_the_user_called_common_is_seen_beside_this_one(own_common):
    write_own_simulator(own_common, "from common.geometry import SIDES; from common.dataset import load_dataset")
    assert load_dataset(DEFAULT_DATASET, env_id="own_simulator:Own-v0").env_spec.id == "Own-v0"


@pytest.mark.parametrize("line", ["from common import RADIUS", "import common; common.RADIUS", "import common.gone"])
def test_where_this_package_hides_the_users_the_sentence_says_so(line, own_common):
    write_own_simulator(own_common, line)
    with pytest.raises(InputError, match="this project's own package `common` hides yours"):
        load_dataset(DEFAULT_DATASET, env_id="own_simulator:Own-v0")


@pytest.mark.parametrize("suffix", ["npz", "hdf5"])
def test_rows_of_unequal_lengths_or_words_give_a_sentence(suffix, tmp_path):
    path, unequal = tmp_path / f"a.{suffix}", np.empty(12, object)
    unequal[:] = [np.zeros(i % 3, np.float32) for i in range(12)]
    if suffix == "npz":
        np.savez(path, **make_rows() | {"observations": unequal})
    else:
        write_hdf5(path, without(make_rows(), "observations"))
        with h5py.File(path, "r+") as file:
            file.create_dataset("observations", data=unequal, dtype=h5py.vlen_dtype(np.float32))
    with pytest.raises(InputError, match="one array of numbers"):
        load_dataset(str(path))


def test_a_folder_of_episode_files_is_told_to_join_them(tmp_path):
    for i in range(3):
        np.savez(tmp_path / f"episode_{i}.npz", **make_rows(seed=i))
    with pytest.raises(InputError, match="3 data files, such as episode_0.npz: join them into one file"):
        load_dataset(str(tmp_path))


@pytest.mark.parametrize("suffix", ["NPZ", "HDF5", "H5"])
def test_suffixes_may_be_upper_case(suffix, tmp_path):
    write_hdf5(tmp_path / f"a.{suffix}", make_rows())
    if suffix == "NPZ":
        np.savez((tmp_path / f"a.{suffix}").open("wb"), **make_rows())
    assert len(load_dataset(str(tmp_path / f"a.{suffix}")).obs) == 12


def test_a_tilde_is_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("OFFLINE_MBRL_CACHE", "~/kept")
    write_hdf5(tmp_path / "a.hdf5", make_rows())
    assert len(load_dataset("~/a.hdf5").obs) == 12
    assert list((tmp_path / "kept" / "datasets").glob("*.npz"))
    with pytest.raises(InputError, match="No such file"):
        load_dataset("~nobody_of_this_name/a.hdf5")


# --- Whose environment it is ---
@pytest.mark.parametrize("name", ["Hopper", "HalfCheetah", "Walker2d", "Ant", "Pendulum"])
def test_every_version_of_gymnasiums_own_environment_has_its_reference_scores(name):
    specs = [spec for spec in gym.registry.values() if spec.name == name and spec.namespace is None]
    assert specs and all(gym_class(spec) == name in REF_SCORES for spec in specs)


def test_the_class_counts_and_not_the_name_it_is_registered_under(tmp_path, monkeypatch):
    from gymnasium.envs.mujoco.hopper_v5 import HopperEnv

    for entry_point, name in (
        (HopperEnv, "Hopper"), ("gymnasium.envs.mujoco.hopper_v5:HopperEnv", "Hopper"),
        (ReachEnv, None), ("puck:Puck", None), ("my.gymnasium.envs:HopperEnv", None), (None, None),
    ):  # fmt: skip
        assert gym_class(EnvSpec("Hopper-v9", entry_point=entry_point)) == name
    assert gym_class(None) is None and gym_class(EnvSpec("own/Hopper-v5", entry_point=HopperEnv)) is None
    monkeypatch.setitem(gym.registry, "Hopper-v9", EnvSpec("Hopper-v9", entry_point=spaced(Box(-1, 1, (1,)))))
    data = load_dataset(write_hdf5(tmp_path / "a.hdf5", make_rows()), env_id="Hopper-v9")
    assert data.ref_scores is None and np.isnan(data.normalised_score(1.0))


def test_a_single_number_changed_in_place_is_seen_though_time_and_size_stay(tmp_path):
    rng, n, file = np.random.default_rng(0), 300_000, tmp_path / "log.hdf5"
    with h5py.File(file, "w") as made:  # 10 MB, not compressed: too much to be read at every start
        made["observations"] = rng.normal(size=(n, 6)).cumsum(axis=0).astype(np.float32)
        made["actions"] = rng.uniform(-1, 1, (n, 1)).astype(np.float32)
        made["rewards"] = np.zeros(n, np.float32)
        made["terminals"], made["timeouts"] = np.zeros(n, bool), np.arange(n) % 1_000 == 999
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    for i, row in enumerate(range(37_501, n, 75_000)):
        assert load_dataset(str(file)).episode_returns.sum() == i
        with h5py.File(file, "r+") as made:
            made["rewards"][row] = 1.0
        os.utime(file, ns=times)
    assert load_dataset(str(file)).episode_returns.sum() == i + 1
