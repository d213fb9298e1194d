"""common/dataset.py: every row's successor is the true one, time limits are no terminals, bad input says what to do."""

import itertools
import os
import re
import shutil
import warnings
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

import common.dataset as dataset_module
from benchmarks.collect import record_random
from common.dataset import DEFAULT_DATASET, InputError, cache_dir, load_dataset

TENSORS = ("obs", "action", "reward", "next_obs", "terminal", "successor_known", "episode_end")


@pytest.fixture(autouse=True)
def private_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setenv("OFFLINE_MBRL_CACHE", str(tmp_path / "cache"))

    def no_network():
        raise ConnectionError("tests have no network")

    monkeypatch.setattr("huggingface_hub.utils.get_session", no_network)


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
    monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: SimpleNamespace(head=lambda *_, **__: None))
    monkeypatch.setattr(minari, "download_dataset", write_small_minari)
    assert len(load_dataset("toy/small-v0").obs) == 12
    monkeypatch.setattr(minari, "download_dataset", lambda _: pytest.fail("it is there"))
    assert len(load_dataset("toy/small-v0").obs) == 12 and "toy/small-v0" in minari.list_local_datasets()


def test_a_download_that_breaks_off_leaves_nothing_that_looks_like_a_dataset(monkeypatch):
    def breaks_off(name: str) -> None:
        folder = write_small_minari(name)
        (folder / "data" / "main_data.hdf5").unlink()
        raise ConnectionError("the line is dead")

    monkeypatch.setattr("huggingface_hub.utils.get_session", lambda: SimpleNamespace(head=lambda *_, **__: None))
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


def test_missing_minari_dataset_without_network_fails_at_once_and_says_what_there_is(monkeypatch):
    folder = write_small_minari()
    shutil.copytree(folder, folder.parents[1] / ".recording-killed" / "toy" / "half-v0")
    monkeypatch.setattr(minari, "download_dataset", lambda _: pytest.fail("would retry for half a minute"))
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
    assert np.array_equal(data.obs[0], env.reset(seed=0)[0].astype(np.float32)) and data.obs.shape == (8, 5)


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
    with pytest.raises(InputError, match="Cannot read .*bad.* damaged or of another format"):
        load_dataset(str(path))


@pytest.mark.parametrize("name, words", [
    ("/nowhere/a.hdf5", "no file /nowhere/a.hdf5"),
    ("/nowhere/folder", "no folder of a Minari dataset"),
    ("not an id!", "No dataset 'not an id!'"),
    ("", "No dataset ''"),
])  # fmt: skip
def test_names_of_nothing_give_a_sentence(name, words):
    with pytest.raises(InputError, match=words):
        load_dataset(name)


def test_file_of_another_kind_gives_a_sentence(tmp_path):
    (tmp_path / "a.csv").touch()
    with pytest.raises(InputError, match="neither .hdf5, .h5 nor .npz"):
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
    (dict(obs_space=Dict(a=Dict(b=Box(-9, 9, (2,)))), action_space=Box(-1, 1, (1,))), "only vectors"),
    (dict(obs_space=Box(-9, 9, (2,)), action_space=Box(-np.inf, np.inf, (1,))), "finite bounds"),
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
    ("T observations", "Episode 1 .* 3 observations for 3 rewards"),
    ("nan", "NaN or infinite observations in row 4"),
    ("step count", "promises 13 steps and holds 12"),
    ("cut", "Cannot read"),
    ("no data", "Cannot read"),
    ("no steps", "empty"),
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
