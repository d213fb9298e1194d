"""common/checks.py, and units: rows that cannot be what they claim are refused, mended or dropped, and said."""

import os
from dataclasses import replace

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
from minari.data_collector import EpisodeBuffer

from benchmarks.collect import record_random
from common import InputError
from common.checks import unit_warnings
from common.dataset import DEFAULT_DATASET, load_dataset

LIMIT = 40
TENSORS = ("obs", "action", "reward", "next_obs", "terminal", "successor_known", "episode_end")


@pytest.fixture(autouse=True)
def private_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setenv("OFFLINE_MBRL_CACHE", str(tmp_path / "cache"))


class Puck(gym.Env):
    """Pushed about at random; it is over when the puck is far out."""

    observation_space, action_space = gym.spaces.Box(-np.inf, np.inf, (4,)), gym.spaces.Box(-1, 1, (2,))

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.state = np.hstack([self.np_random.uniform(-0.5, 0.5, 2), np.zeros(2)])
        return self.state.astype(np.float32), {}

    def step(self, push):
        speed = 0.9 * self.state[2:] + 0.1 * push
        self.state = np.hstack([self.state[:2] + 0.3 * speed, speed])
        return self.state.astype(np.float32), 1.0 + push[0], bool(np.hypot(*self.state[:2]) > 1.0), False, {}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    spec = gym.envs.registration.EnvSpec("Puck-v0", entry_point=f"{__name__}:Puck", max_episode_steps=LIMIT)
    monkeypatch.setitem(gym.registry, spec.id, spec)


def log(autoreset="none", num_episodes=60, goes_on=False, env_id="Puck-v0") -> dict[str, np.ndarray]:
    """autoreset: as vector environments write their rows, same_step or next_step; goes_on: no reset at time limits."""
    env, rng, rows = Puck(), np.random.default_rng(0), []
    obs, _ = env.reset(seed=0)
    for _ in range(num_episodes):
        for t in range(1, LIMIT + 1):
            action = rng.uniform(-1, 1, 2).astype(np.float32)
            last, reward, terminal, _, _ = env.step(action)
            timeout = t == LIMIT and not terminal
            start = last if goes_on and timeout else env.reset()[0] if terminal or timeout else None
            rows.append([obs, action, reward, terminal, timeout, start if autoreset == "same_step" and t else last])
            rows[-1][-1] = start if autoreset == "same_step" and start is not None else last
            obs = last if start is None else start
            if start is not None:
                break
        if autoreset == "next_step":
            rows.append([last, rng.uniform(-1, 1, 2).astype(np.float32), 0.0, False, False, start])
    keys = ("observations", "actions", "rewards", "terminals", "timeouts", "next_observations")
    return dict(zip(keys, map(np.array, zip(*rows))))


def without(rows, *keys):
    return {key: array for key, array in rows.items() if key not in keys}


@pytest.fixture
def load(tmp_path):
    def load(rows, env_id="Puck-v0", **options):
        np.savez(path := tmp_path / f"{len(list(tmp_path.iterdir()))}.npz", **rows)
        return load_dataset(str(path), env_id=env_id, **options)

    return load


def equal(a, b) -> bool:
    same = all(torch.equal(getattr(a, name), getattr(b, name)) for name in TENSORS)
    return same and np.array_equal(a.episode_returns, b.episode_returns) and a.data_hash == b.data_hash


# --- Clean data ---
def test_clean_data_are_taken_as_they_are_and_nothing_is_said(load, capfd):
    rows = log()
    data, bare = load(rows), load(without(rows, "next_observations"))
    assert np.array_equal(data.obs, rows["observations"]) and np.array_equal(data.next_obs, rows["next_observations"])
    assert np.array_equal(data.episode_end, rows["terminals"] | rows["timeouts"]) and data.successor_known.all()
    assert (
        torch.equal(data.terminal, torch.as_tensor(rows["terminals"]).float())
        and 10 < data.terminal.sum() < 50
        and len(data.obs) > 1500
    )
    assert torch.equal(bare.next_obs[bare.successor_known], data.next_obs[~data.episode_end])
    record_random("Hopper-v5", "toy/hopper-v0", num_steps=2_000, seed=0)
    for name in (DEFAULT_DATASET, "toy/hopper-v0"):
        assert unit_warnings(one := load_dataset(name)) == [] and not one.rescaled
        assert one.to_obs(obs := one.obs.numpy()) is obs and one.raw_obs(one.obs) is one.obs
    assert capfd.readouterr().err == ""


# --- Vector environments that reset themselves ---
@pytest.mark.parametrize("keys", [(), ("next_observations",)])
def test_rows_that_only_reset_are_dropped(keys, load, capsys):
    data, expected = load(without(log("next_step"), *keys)), load(without(log(), *keys))
    assert data.episode_end.sum() == expected.episode_end.sum() == len(data.episode_returns) == 60
    assert np.allclose(data.reward.sum(), data.episode_returns[: len(data.episode_returns)].sum(), rtol=0.1)
    assert data.reward.min() > 0 and torch.equal(data.successor_known, data.successor_known | (data.terminal == 0))
    steps = (data.next_obs - data.obs)[data.successor_known].abs().amax(dim=0)
    assert (steps < 0.2).all()
    assert "has 60 rows that only reset an environment" in capsys.readouterr().err


def test_a_start_is_no_successor_of_an_end(load, capsys):
    data, expected = load(log("same_step")), load(rows := log())
    counts = f"{rows['terminals'].sum()} terminals lack a successor, {rows['timeouts'].sum()} timeouts are dropped"
    assert counts in capsys.readouterr().err
    kept = ~torch.as_tensor(rows["timeouts"])
    assert torch.equal(data.obs, expected.obs[kept]) and torch.equal(data.terminal, expected.terminal[kept])
    assert torch.equal(data.successor_known, data.terminal == 0)
    known = data.successor_known
    assert torch.equal(data.next_obs[known], expected.next_obs[kept][known])
    assert np.array_equal(data.episode_returns, expected.episode_returns)


def test_an_environment_that_truly_goes_on_behind_a_time_limit_is_left_alone(load, capsys):
    rows = log(goes_on=True)
    rows["rewards"][:] = 0  # as where only the goal pays
    data = load(rows)
    assert len(data.obs) == len(rows["rewards"]) and data.successor_known.all() and not capsys.readouterr().err


# --- Kept references ---
@pytest.mark.parametrize(
    "kept", ["both", "observations", "next_observations", "each episode", "late", "all but starts"]
)
def test_kept_references_are_refused(kept, load):
    rows = log()
    obs, next_obs = rows["observations"], rows["next_observations"]
    ends = np.flatnonzero(rows["terminals"] | rows["timeouts"])
    starts = np.append(0, ends[:-1] + 1)
    for key in ("observations", "next_observations"):
        if kept in ("both", key):
            rows[key] = np.broadcast_to(next_obs[-1], obs.shape)
    if kept == "each episode":
        rows["observations"] = rows["next_observations"] = next_obs[np.repeat(ends, ends - starts + 1)]
    if kept in ("late", "all but starts"):
        rows["observations"] = next_obs.copy()
    if kept == "all but starts":
        rows["observations"][starts] = obs[starts]
    with pytest.raises(InputError, match="copy the observation before the next step"):
        load(rows)


@pytest.mark.parametrize("keys", [(), ("next_observations",)])
def test_a_slow_process_is_none(keys, load, capsys):
    level = np.cumsum(np.random.default_rng(0).random(4_000) < 0.01)[:, None] * [0.1, -0.3, 0.2, 0.5]
    n, end = len(level) - 1, np.arange(1, len(level)) % 200 == 0
    rows = dict(observations=level[:-1], next_observations=level[1:], rewards=np.ones(n), terminals=np.zeros(n, bool))
    data = load(without(rows | dict(actions=np.random.default_rng(1).uniform(-1, 1, (n, 2)), timeouts=end), *keys))
    assert len(data.obs) == n - (20 if keys else 0) and "warning" not in capsys.readouterr().err


def test_actions_that_are_all_equal_are_said(load, capsys):
    load({**(rows := log()), "actions": np.full_like(rows["actions"], 0.5)})
    assert "one and the same action in all rows" in capsys.readouterr().err


# --- Where episodes end ---
@pytest.mark.parametrize("how", ["rounded", "read again"])
def test_inexact_successors_are_no_ends_and_unmarked_ends_are_found_among_them(how, load, capsys):
    rows = log()
    noise = np.random.default_rng(1).normal(0, 1e-3, rows["observations"].shape)
    successors = {
        "rounded": rows["next_observations"].astype(np.float16),
        "read again": rows["next_observations"] + noise,
    }
    data = load({**without(rows, "timeouts"), "next_observations": successors[how]})
    assert np.array_equal(data.episode_end, rows["terminals"] | rows["timeouts"])
    assert capsys.readouterr().err.count("rounding or noise") == 1


def test_rows_of_environments_in_turn_follow_no_order(load, capsys):
    rows = {key: array[: len(array) // 5 * 5] for key, array in log().items()}
    in_turn = {key: a.reshape(5, len(a) // 5, *a.shape[1:]).swapaxes(0, 1).reshape(a.shape) for key, a in rows.items()}
    assert not load(in_turn).ordered and "rows that follow no order" in capsys.readouterr().err


def test_rows_without_order_are_said_and_what_needs_episodes_is_refused(load, capsys):
    rows = log()
    order = np.random.default_rng(0).permutation(len(rows["rewards"]))
    data = load({key: array[order] for key, array in rows.items()})
    assert not data.ordered and "rows that follow no order" in capsys.readouterr().err
    assert np.array_equal(data.next_obs, rows["next_observations"][order]) and data.successor_known.all()
    data = replace(data, obs=data.obs + 1)  # as a script that standardises
    assert "the rows follow no order" in data.summary() and "behaviour" not in data.summary()
    for needs_episodes in (
        lambda: data.episode_returns.mean(),
        lambda: data.episode_returns.max(),
        lambda: data.episode_end.cumsum(0),
        lambda: data.episode_end.roll(1),
        lambda: data.next_action(),
    ):
        with pytest.raises(InputError, match="no episodes"):
            needs_episodes()


def test_rows_without_order_and_without_successors_are_said(load, capsys):
    rows = without(log(), "next_observations")
    load({key: array[np.random.default_rng(0).permutation(len(array))] for key, array in rows.items()})
    assert "neighbouring rows as unlike as any two" in capsys.readouterr().err


# --- Terminals and time limits ---
def test_terminals_that_also_stand_for_time_limits_are_told_apart_by_the_length(load, capsys):
    rows = log()
    data = load({**without(rows, "timeouts"), "terminals": rows["terminals"] | rows["timeouts"]})
    assert equal(data, load(rows))
    assert f"has {rows['timeouts'].sum()} terminals exactly at the time limit of 40 steps" in capsys.readouterr().err


def test_where_all_terminals_are_time_limits_and_no_successor_is_known_those_rows_go(load, capsys):
    rows = without({**log(), "timeouts": np.zeros(1)}, "timeouts", "next_observations")
    n = len(rows["rewards"]) // LIMIT * LIMIT
    rows = {key: array[:n] for key, array in rows.items()} | {"terminals": np.arange(1, n + 1) % LIMIT == 0}
    data = load(rows)
    assert len(data.obs) == n - n // LIMIT and data.terminal.sum() == 0 and len(data.episode_returns) == n // LIMIT
    data = load(rows, env_id=None)  # whose limit nobody knows
    assert data.terminal.sum() == n // LIMIT and "all end terminal after 40 steps" in capsys.readouterr().err


def test_a_terminal_in_the_last_step_is_believed_where_time_limits_look_otherwise(load, capsys):
    rows = log()
    last = np.flatnonzero(rows["timeouts"])
    rows["terminals"][last[0]], rows["timeouts"][:] = True, False
    assert load(rows).terminal.sum() == rows["terminals"].sum() and not capsys.readouterr().err


def test_an_end_that_is_both_is_a_time_limit(load, capsys):
    rows = log()
    assert equal(load({**rows, "terminals": rows["terminals"] | rows["timeouts"]}), load(rows))
    assert "time limits terminal as well" in capsys.readouterr().err


# --- Words ---
@pytest.mark.parametrize("timeouts", ["truncations", "truncated", "truncateds"])
@pytest.mark.parametrize("terminals", ["terminations", "terminated"])
def test_gymnasiums_words_are_read(timeouts, terminals, load, capsys):
    rows = without(log(), "next_observations")
    renamed = {terminals: rows["terminals"], timeouts: rows["timeouts"], **without(rows, "terminals", "timeouts")}
    assert equal(load(renamed), load(rows)) and not capsys.readouterr().err


@pytest.mark.parametrize("key", ["dones", "masks", "valids"])
def test_words_for_ends_of_any_kind_are_refused(key, load):
    rows = {key: (rows := log())["terminals"], **without(rows, *["terminals"] * (key == "dones"))}
    with pytest.raises(InputError, match=f"has {key} .*time limits. Write terminals and timeouts"):
        load(rows)


def test_dones_beside_terminals_are_not_read(load, capsys):
    rows = log()
    assert equal(load(rows | {"dones": rows["terminals"]}), load(rows))
    assert "not read: dones" in capsys.readouterr().err


def test_what_is_not_read_is_named(load, capsys):
    rows, n = log(), len(log()["rewards"])
    load({**rows, "costs": np.zeros(n), "infos/qpos": np.zeros((n, 3)), "seed": np.zeros(1), "why": np.array([{}] * n)})
    assert "not read: costs in" in capsys.readouterr().err


def test_what_was_found_is_said_at_every_load(load, tmp_path, capsys):
    load(without(log(), "timeouts", "next_observations"))
    first = capsys.readouterr().err
    load_dataset(next(str(path) for path in tmp_path.glob("*.npz")), env_id="Puck-v0")
    assert "marks no time limits" in first and capsys.readouterr().err == first


# --- Next actions ---
def test_no_next_action_is_lost_with_a_row_whose_successor_is_unknown(load):
    rows = log()
    whole, bare = load(rows), load(without(rows, "next_observations"))
    usable = []
    for data in (whole, bare):
        action, known = data.next_action()
        usable.append(torch.cat([data.obs, data.action, action], dim=1)[known])
    assert torch.equal(*usable) and len(usable[0]) == len(rows["rewards"]) - 60


# --- Units ---
def test_constants_and_offsets_that_float32_would_lose_are_centred_in_float64(load):
    rows, offset = log(), np.array([5.0e5, 4.5e6, 0, 0])
    far = {key: array + offset if "obs" in key else array for key, array in rows.items()}  # float64
    far = {key: np.insert(a, [4, 4, 4], [7, 0.1, 0], axis=1) if "obs" in key else a for key, a in far.items()}
    data, metres = load(far, env_id=None), load(rows, env_id=None)
    assert data.obs.dtype == torch.float32 and (data.obs[:, 4:] == 0).all()
    assert len(data.obs[:, 1].unique()) == len(metres.obs[:, 1].unique())
    for name, key in (("obs", "observations"), ("next_obs", "next_observations")):
        torch.testing.assert_close(data.raw_obs(getattr(data, name)), torch.as_tensor(far[key]), rtol=0, atol=1e-6)
        assert np.array_equal(data.to_obs(far[key]), getattr(data, name))
    assert data.obs_shift[2:].tolist() == [0, 0, 7, 0.1, 0] and (data.obs_scale == 1).all()
    assert torch.equal(data.obs[:, 2:4], metres.obs[:, 2:]) and unit_warnings(data) == []


def test_what_float32_has_lost_already_is_said(load, capsys):
    rows = {key: (a + 4.5e6).astype(np.float32) if "obs" in key else a for key, a in log().items()}
    load(without(rows, "next_observations"), env_id=None)
    assert "columns 0, 1, 2, 3 hardly vary beyond the rounding of float32" in capsys.readouterr().err


def test_the_option_standardises_for_training_and_evaluation_alike(load):
    rows = {key: np.insert(1e-3 * a.astype(float), 4, 1000, axis=1) if "obs" in key else a for key, a in log().items()}
    data, raw = load(rows, env_id=None, standardise_obs=True), load(rows, env_id=None)
    std, mean = torch.std_mean(data.obs.double(), dim=0, correction=0)
    torch.testing.assert_close(mean, torch.zeros(5).double(), rtol=0, atol=1e-4)
    torch.testing.assert_close(std, torch.tensor([1.0, 1, 1, 1, 0]).double(), rtol=0, atol=1e-4)
    assert np.array_equal(data.to_obs(rows["next_observations"]), data.next_obs)
    torch.testing.assert_close(
        data.raw_obs(data.next_obs), torch.as_tensor(rows["next_observations"]), rtol=1e-6, atol=1e-9
    )
    assert unit_warnings(data) == [] and "0 (mean" in unit_warnings(raw)[0] and "4 (mean" not in unit_warnings(raw)[0]
    assert len({data.data_hash, raw.data_hash}) == 2


def test_data_hash_knows_what_was_subtracted(load):
    obs_of = lambda offset: {k: np.insert(a, 4, offset, axis=1) if "obs" in k else a for k, a in log().items()}  # noqa: E731
    five, six = (load(obs_of(offset), env_id=None) for offset in (5, 6))
    assert torch.equal(five.obs, six.obs) and five.data_hash != six.data_hash


@pytest.mark.parametrize(
    "scale, offset, warned", [(1, 0, 0), (30, 0, 0), (1e-3, 0, 1), (1e3, 0, 1), (1, 9, 1), (0.2, 1, 0)]
)
def test_columns_far_from_mean_0_and_deviation_1_are_named(scale, offset, warned, load):
    rows = {key: a * [1, 1, scale, 1] + [0, 0, offset, 0] if "obs" in key else a for key, a in log().items()}
    data = load(rows, env_id=None)
    assert len(warnings := unit_warnings(data)) == warned
    assert all("columns 2 (mean" in line and "--standardise-obs" in line and "\n" not in line for line in warnings)


def test_minaris_float64_is_centred_too():
    states = np.cumsum(np.random.default_rng(0).normal(size=(51, 2)), axis=0) + [0, 4.5e6]
    steps = dict(
        actions=np.zeros((50, 1)) + np.arange(50)[:, None] / 50, rewards=np.ones(50), terminations=np.arange(50) < 0
    )
    box = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    buffer = EpisodeBuffer(observations=states, truncations=np.arange(50) == 49, **steps)
    minari.create_dataset_from_buffers(
        "toy/far-v0", [buffer], observation_space=box, action_space=gym.spaces.Box(-1, 1, (1,))
    )
    data = load_dataset("toy/far-v0")
    torch.testing.assert_close(data.raw_obs(data.next_obs), torch.as_tensor(states[1:]), rtol=0, atol=1e-5)
    assert os.environ["MINARI_DATASETS_PATH"] and data.obs_shift[0] == 0
