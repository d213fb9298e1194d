"""Known rules against the real environments' flags, the learned rule against a made-up one, and users' mistakes."""

import copy
import os
import re
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import terminations  # noqa: E402
from common.dataset import InputError, OfflineDataset  # noqa: E402
from common.terminations import RULES, known_rule, rule_warning, termination_fn  # noqa: E402

# Where to put the body before a few random steps, so that every bound of a rule is crossed: {qpos index: (low, high)}.
START = {
    "Hopper": {1: (0.6, 1.6), 2: (-0.4, 0.4)},
    "Walker2d": {1: (0.7, 2.3), 2: (-1.4, 1.4)},
    "Ant": {2: (0.1, 1.3)},
    "Humanoid": {2: (0.8, 2.3)},
    "InvertedPendulum": {1: (-0.4, 0.4)},
    "InvertedDoublePendulum": {1: (-0.9, 0.9), 2: (-0.9, 0.9)},
}
NUM_STEPS = {"Humanoid": 2_500, "Ant": 2_500}
NEVER = ["HalfCheetah", "Swimmer", "Reacher", "Pusher", "Pendulum", "HumanoidStandup"]
ENV_IDS = [f"{name}-{version}" for name in START for version in ("v4", "v5")]
NEVER_IDS = [f"{name}-v5" for name in NEVER if name != "Pendulum"] + ["Pendulum-v1"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("OFFLINE_MBRL_CACHE", str(tmp_path / "cache"))


def dataset(obs, action, next_obs, terminal, env_spec=None, **more) -> OfflineDataset:
    """Every row is an episode, as nothing else is said."""
    tensors = [torch.as_tensor(np.asarray(x), dtype=torch.float32) for x in (obs, action, next_obs, terminal)]
    fields = dict(zip(("obs", "action", "next_obs", "terminal"), tensors))
    every_row, box = torch.ones(len(tensors[0]), dtype=torch.bool), np.ones(tensors[1].shape[1])
    fields |= dict(name="", source="", reward=torch.zeros(len(every_row)), data_hash="", env_spec=env_spec)
    fields |= dict(successor_known=every_row, episode_end=every_row.clone(), episode_returns=np.zeros(len(every_row)))
    zero = np.zeros(tensors[0].shape[1])
    fields |= dict(obs_shift=zero, obs_scale=zero + 1, obs_mean=zero, obs_std=zero + 1, ordered=True)
    fields |= dict(cut_rows=torch.zeros(0, dtype=torch.long), cut_action=torch.zeros(0, len(box)))
    return OfflineDataset(**fields | dict(action_low=-box, action_high=box, ref_scores=None) | more)


def record(env_id: str, num_steps: int):
    """Random actions from random states, ten steps each or until the environment terminates."""
    env, rng = gym.make(env_id).unwrapped, np.random.default_rng(0)
    env.action_space.seed(0)
    rows, left = [], 0
    for step in range(num_steps):
        if left == 0:
            obs, left = env.reset(seed=step)[0], 10
            if placed := START.get(env.spec.name):
                qpos, qvel = env.data.qpos.copy(), env.data.qvel.copy()
                for index, (low, high) in placed.items():
                    qpos[index] = rng.uniform(low, high)
                env.set_state(qpos, qvel)
                obs = env._get_obs()
        action = env.action_space.sample()
        next_obs, _, terminated, _, _ = env.step(action)
        rows.append((obs, action, next_obs, terminated))
        obs, left = next_obs, 0 if terminated else left - 1
    return dataset(*zip(*rows), env_spec=gym.spec(env_id))


def point_mass(num_rows: int, seed: int):
    """A point in the unit square, moved by its action, that terminates in a disc (about 3 % of the rows)."""
    rng = np.random.default_rng(seed)
    obs, action = rng.uniform(-1, 1, (num_rows, 2)), rng.uniform(-1, 1, (num_rows, 2))
    next_obs = obs + 0.2 * action
    terminal = np.linalg.norm(next_obs - [0.3, -0.2], axis=1) < 0.2
    constant = np.full((num_rows, 1), 1e3)
    return dataset(np.hstack([obs, constant]), action, np.hstack([next_obs, constant]), terminal)


def spec_of(env_id: str):
    return copy.deepcopy(gym.spec(env_id))  # the registry's own must not be changed


def call(function, data):
    return function(data.obs, data.action, data.next_obs)


@pytest.fixture
def short_fit(monkeypatch):
    monkeypatch.setattr(terminations, "NUM_STEPS", 100)


# --- Known rules ---
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("env_id", ENV_IDS)
def test_known_rule_equals_the_flags_of_the_environment(env_id):
    data = record(env_id, NUM_STEPS.get(env_id[:-3], 6_000))
    flags = data.terminal.bool()
    assert 30 < flags.sum() < len(flags) - 30
    predicted = call(termination_fn("known", data), data)
    assert predicted.dtype == torch.bool and predicted.shape == flags.shape
    assert torch.equal(predicted, flags)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("env_id", NEVER_IDS)
def test_never_environments_never_terminate(env_id, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MuJoCo logs a deprecation in HalfCheetah's file to the working directory
    data = record(env_id, 1_000)
    rule = termination_fn("known", data)
    assert not data.terminal.any() and not call(rule, data).any()
    assert not rule(data.obs, data.action, 1e6 * torch.randn(1_000, data.obs.shape[1])).any()


def test_every_entry_of_the_table_is_checked():
    assert {*START, *NEVER} == set(RULES)


def healthy(name: str) -> torch.Tensor:
    obs = torch.zeros(1, 11)
    obs[0, 0] = {"Hopper": 1.2, "Walker2d": 1.2, "Ant": 0.7, "Humanoid": 1.4}.get(name, 0.0)
    obs[0, 3:5] = 1.0  # the double pendulum's cosines; the others do not mind
    return obs


@pytest.mark.parametrize("name", START)
def test_a_prediction_that_is_no_number_terminates(name):
    obs = healthy(name)
    assert not RULES[name](obs)
    obs[0, 1 if "Pendulum" in name else 0] = torch.nan
    assert RULES[name](obs)


@pytest.mark.parametrize("name", ["Hopper", "Ant", "InvertedPendulum"])
@pytest.mark.parametrize("column", [0, 10])
def test_environments_that_ask_for_finite_states_do_so_in_every_column(name, column):
    obs = healthy(name)
    obs[0, column] = torch.inf
    assert RULES[name](obs)


@pytest.mark.parametrize("value, terminal", [(-150.0, True), (150.0, True), (-99.0, False), (torch.inf, True)])
def test_hopper_is_bounded_on_both_sides(value, terminal):
    obs = healthy("Hopper")
    obs[0, 7] = value
    assert RULES["Hopper"](obs) == terminal


@pytest.mark.parametrize("height, terminal", [(0.2, False), (1.0, False), (0.1999, True), (1.0001, True)])
def test_ant_is_healthy_on_its_bounds(height, terminal):
    obs = healthy("Ant")
    obs[0, 0] = height
    assert RULES["Ant"](obs) == terminal


def test_double_pendulum_takes_angles_from_pairs_off_the_unit_circle():
    obs = healthy("InvertedDoublePendulum")
    obs[0, 3:5] = 0.4  # upright, although the cosines are too short
    assert not RULES["InvertedDoublePendulum"](obs)


OTHERS = ["my/Hopper-v0", "MyHopper-v0", "AntMaze-v1", "InvertedPendulumSwingup-v0", "Pendulum-v5", "Hopper-v9"]


@pytest.mark.parametrize("env_id", OTHERS)
@pytest.mark.parametrize("made_by", [None, "own.envs:HopperEnv", type("HopperEnv", (gym.Env,), {})])
def test_other_environments_are_not_known_whatever_they_are_called(env_id, made_by):
    data = point_mass(100, 0)
    data.env_spec = gym.envs.registration.EnvSpec(env_id, made_by)
    assert known_rule(data.env_spec)[0] is None
    with pytest.raises(InputError, match=f"{env_id} is not in the table: use --termination learned, none or"):
        termination_fn("known", data)


def test_gymnasiums_own_class_is_known_by_another_id_too():
    spec = gym.envs.registration.EnvSpec("Lame-v0", "gymnasium.envs.mujoco.hopper_v5:HopperEnv")
    assert known_rule(spec)[0] is RULES["Hopper"]


@pytest.mark.parametrize(
    "env_id, kwargs, known",
    [
        ("Hopper-v5", {"terminate_when_unhealthy": False}, False),
        ("Hopper-v5", {"healthy_state_range": (-50, 50)}, False),
        ("Walker2d-v5", {"healthy_angle_range": [-2.0, 2.0]}, False),
        ("Ant-v5", {"exclude_current_positions_from_observation": False}, False),
        ("Ant-v5", {"xml_file": "./my_ant.xml"}, False),
        ("Walker2d-v5", {"xml_file": "walker2d.xml"}, True),
        ("Ant-v5", {"include_cfrc_ext_in_observation": False}, True),
        ("Hopper-v5", {"reset_noise_scale": 0.1, "default_camera_config": {"lookat": np.zeros(3)}}, True),
        ("HalfCheetah-v5", {"exclude_current_positions_from_observation": False}, True),
    ],
)
def test_rule_holds_only_for_the_arguments_it_was_written_for(env_id, kwargs, known):
    spec = spec_of(env_id)
    spec.kwargs = kwargs
    rule, why = known_rule(spec)
    assert (rule is RULES[spec.name]) == known
    assert known or f"was made with {next(iter(kwargs))}" in why


def test_observations_changed_by_a_wrapper_are_not_known():
    clipped = gym.wrappers.ClipAction(gym.make("Pendulum-v1"))
    env = gym.wrappers.RescaleObservation(clipped, np.float32(-1), np.float32(1))
    spec = spec_of("Hopper-v5")
    spec.additional_wrappers = env.spec.additional_wrappers[:1]
    assert known_rule(spec)[0] is not None
    spec.additional_wrappers = env.spec.additional_wrappers
    assert "is wrapped in" in known_rule(spec)[1]


# --- Rules and data that contradict each other ---
def pendulums(num_rows: int, num_falls: int, num_flags: int, go_on: bool = False, env_id="InvertedPendulum-v5"):
    """Rows of which the first `num_falls` end by the rule and the first `num_flags` by the flags."""
    obs = torch.zeros(num_rows, 4).uniform_(-0.1, 0.1, generator=torch.Generator().manual_seed(0))
    obs[:num_falls, 1] += 1
    data = dataset(obs, obs[:, :1], obs, torch.arange(num_rows) < num_flags, spec_of(env_id))
    data.episode_end[:] = torch.arange(num_rows) == num_rows - 1
    data.episode_end[:num_falls] |= not go_on
    return data


@pytest.mark.parametrize(
    "falls, flags, go_on, chosen",
    [
        (40, 40, True, "known"),
        (40, 43, True, "known"),  # three of 3,000 rows: one per mille
        (40, 44, True, "learned"),
        (400, 40, True, "learned"),
        (400, 19, False, "none"),  # too few to learn from
        (400, 0, True, "none"),  # whatever the data are of, it does not end there
    ],
)
def test_auto_follows_the_data_where_they_contradict_the_rule(falls, flags, go_on, chosen, short_fit, capsys):
    data = pendulums(3_000, falls, flags, go_on)
    called = call(termination_fn("auto", data), data)
    out, n = capsys.readouterr().out, abs(falls - flags)
    counts = f"InvertedPendulum-v5 ends {falls} of 3,000 rows, the data's flags {flags}, and {n} rows differ"
    contradicts = "" if chosen == "known" else f"the rule of {counts}"
    assert f"auto chose {chosen}: {contradicts or 'InvertedPendulum-v5 is in the table'}" in out
    assert rule_warning(data) == "" if chosen == "known" else rule_warning(data).startswith(contradicts)
    if chosen != "learned":
        assert called.sum() == (0 if chosen == "none" else falls)
    if chosen == "known":
        termination_fn("known", data)
    else:
        with pytest.raises(InputError, match=f"{n} rows differ .*: use --termination forced"):
            termination_fn("known", data)
        assert call(termination_fn("forced", data), data).sum() == falls


def test_rows_without_successor_contradict_only_a_rule_that_never_ends_anything():
    data = pendulums(3_000, 0, 40)
    data.successor_known = data.terminal < 0.5
    assert rule_warning(data) == ""
    data.env_spec = spec_of("Swimmer-v5")
    assert "ends 0 of 3,000 rows, the data's flags 40, and 40 rows differ" in rule_warning(data)


def test_one_terminal_where_nothing_ends_is_worth_a_warning():
    data = pendulums(3_000, 0, 1, env_id="Swimmer-v5")
    assert "the data's flags 1, and 1 rows differ" in rule_warning(data)
    assert rule_warning(pendulums(3_000, 0, 0, env_id="Swimmer-v5")) == ""
    data.env_spec = None
    assert rule_warning(data) == ""


def test_rows_in_no_order_are_compared_too():
    data = pendulums(3_000, 400, 0)
    data = dataset(data.obs, data.action, data.next_obs, data.terminal, data.env_spec, ordered=False)
    assert "400 rows differ" in rule_warning(data)
    assert not call(termination_fn("auto", data), data).any()


# --- Units and numbers ---
def rescaled(data: OfflineDataset, shift: float, scale: float) -> OfflineDataset:
    obs, next_obs = (data.to_obs(x.double().numpy()) for x in (data.obs, data.next_obs))
    where = dict(obs_shift=np.full(obs.shape[1], shift), obs_scale=np.full(obs.shape[1], scale))
    other = dataset(obs, data.action, next_obs, data.terminal, data.env_spec, **where)
    other.obs, other.next_obs = (torch.as_tensor(other.to_obs(x.double().numpy())) for x in (data.obs, data.next_obs))
    return other


@pytest.mark.parametrize("mode", ["auto", "known", "made_up_rules:inside"])
def test_rules_see_the_units_of_the_environment(mode, folder):
    data = pendulums(3_000, 400, 400)
    data.next_obs[:50, 0] = 0.7
    other = rescaled(data, 3.0, 0.01)
    assert rule_warning(other) == "" and (other.next_obs.mean() < -250)
    called = call(termination_fn(mode, other), other)
    assert torch.equal(called, call(termination_fn(mode, data), data)) and called.sum() in (50, 400)


@pytest.mark.parametrize("mode", ["auto", "known", "forced", "learned", "none", "made_up_rules:inside"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_state_that_is_not_finite_ends_the_trajectory_in_every_mode(mode, value, short_fit, folder):
    data = point_mass(2_000, 0)
    if mode in ("known", "forced"):
        data.env_spec = spec_of("HalfCheetah-v5")
        data.terminal[:] = 0
    function = termination_fn(mode, data)
    data.next_obs[5, 1] = value
    assert call(function, data)[5]


def test_a_fit_that_diverges_is_an_input_error(short_fit):
    data = point_mass(2_000, 0)
    data.obs[::2, 0] = torch.inf
    with pytest.raises(InputError, match="the learned rule diverged"):
        termination_fn("learned", data)


# --- Learned rule ---
def test_learned_rule_finds_a_made_up_one(capsys):
    data, fresh = point_mass(20_000, 0), point_mass(20_000, 1)
    assert 0.02 < data.terminal.mean() < 0.05
    called, true = call(termination_fn("learned", data), fresh), fresh.terminal.bool()
    precision, recall = map(float, re.search(r"precision ([\d.]+), recall ([\d.]+)", capsys.readouterr().out).groups())
    assert precision > 0.9 and recall > 0.9
    assert (called & true).sum() > 0.9 * max(called.sum(), true.sum())
    assert (called == true).float().mean() > 0.99
    # Held-out figures are honest: fresh data give the same.
    assert abs((called & true).sum() / called.sum() - precision) < 0.05


def test_reported_rates_hold_where_few_rows_are_fitted(monkeypatch, capsys):
    monkeypatch.setattr(terminations, "NUM_STEPS", 1_000)
    monkeypatch.setattr(terminations, "MAX_ROWS", 300)
    data, fresh = point_mass(40_000, 0), point_mass(40_000, 1)
    called, true = call(termination_fn("learned", data), fresh), fresh.terminal.bool()
    precision, recall = map(float, re.search(r"precision ([\d.]+), recall ([\d.]+)", capsys.readouterr().out).groups())
    assert abs((called & true).sum() / called.sum() - precision) < 0.1
    assert abs((called & true).sum() / true.sum() - recall) < 0.1
    assert min(precision, recall) > 0.6  # the threshold makes up for batches that are half terminals


def test_threshold_is_midway_between_separate_classes():
    logit, terminal = torch.tensor([5.0, -1.0, 1.0, -3.0]), torch.tensor([True, False, True, False])
    assert terminations.f1_threshold(logit, terminal) == 0.0


@pytest.mark.parametrize(
    "logit, terminal, called",
    [([1, 1, 0], [1, 0, 0], [1, 1, 0]), ([2, 1, 1, 0], [1, 0, 1, 0], [1, 1, 1, 0]), ([2, 1], [1, 1], [1, 1])],
)
def test_equal_logits_are_called_alike_and_all_of_them_where_that_is_best(logit, terminal, called):
    logit = torch.tensor(logit, dtype=torch.float32)
    threshold = terminations.f1_threshold(logit, torch.tensor(terminal, dtype=torch.bool))
    assert (logit > threshold).int().tolist() == called


def test_same_seed_same_rule_and_global_random_state_untouched(short_fit):
    data = point_mass(3_000, 0)
    torch.manual_seed(7)
    state = torch.get_rng_state()
    numpy_state = np.random.get_state()[1].copy()
    first = call(termination_fn("learned", data, seed=3), data)
    assert torch.equal(torch.get_rng_state(), state) and np.array_equal(np.random.get_state()[1], numpy_state)
    torch.rand(5)
    data.data_hash = "again"  # another key of the cache
    assert torch.equal(call(termination_fn("learned", data, seed=3), data), first)
    assert not torch.equal(call(termination_fn("learned", data, seed=4), data), first)


def test_placeholder_successors_are_never_read(short_fit, capsys):
    data, fresh = point_mass(6_000, 0), point_mass(6_000, 1)
    data.successor_known = data.terminal < 0.5
    data.next_obs[~data.successor_known] = torch.nan
    called = call(termination_fn("learned", data), fresh)
    assert "(obs, action) alone" in capsys.readouterr().out
    data.next_obs[:], data.data_hash = torch.nan, "again"
    assert torch.equal(call(termination_fn("learned", data), fresh), called) and called.any() and not called.all()

    some = point_mass(6_000, 0)
    some.data_hash = "some"
    some.successor_known[some.terminal.nonzero()[::2]] = False
    some.successor_known[::10] = False
    some.next_obs[~some.successor_known] = torch.nan
    known = some.successor_known
    assert (call(termination_fn("learned", some), some) == some.terminal.bool())[known].float().mean() > 0.95


def test_no_terminals_is_never_and_a_handful_is_refused(capsys):
    data = point_mass(3_000, 0)
    data.terminal[data.terminal.nonzero()[7:]] = 0
    for mode in ("learned", "auto"):
        with pytest.raises(InputError, match="from 7 terminals and 2,993 other rows"):
            termination_fn(mode, data)
    data.terminal[:] = 0
    for mode in ("learned", "auto", "none"):
        assert not call(termination_fn(mode, data), data).any()
        assert "termination: never; the data have 0 terminals" in capsys.readouterr().out


def test_auto_takes_known_then_learned_then_never_and_says_why(short_fit, capsys):
    data = point_mass(3_000, 0)
    termination_fn("auto", data)
    assert "auto chose learned: the data name no environment" in capsys.readouterr().out
    data.env_spec = spec_of("InvertedPendulum-v5")
    data.next_obs[:, 1] = torch.where(data.terminal > 0.5, 1.0, 0.0)
    termination_fn("auto", data)
    assert "auto chose known: InvertedPendulum-v5 is in the table" in capsys.readouterr().out
    data.env_spec = spec_of("Hopper-v5")
    data.env_spec.kwargs = {"terminate_when_unhealthy": False}
    termination_fn("auto", data)
    assert "auto chose learned: Hopper-v5 was made with terminate_when_unhealthy=False" in capsys.readouterr().out
    assert not call(termination_fn("none", data), data).any()


@pytest.mark.parametrize("mode", ["forced", "learned", "none"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_rule_is_one_graph_of_fixed_shapes_without_gradient(mode, scale, short_fit):
    data = rescaled(point_mass(3_000, 0), 0.0, scale)
    data.env_spec = spec_of("Hopper-v5")
    function = termination_fn(mode, data)
    data.next_obs.requires_grad_()
    result = call(torch.compile(function, fullgraph=True, backend="eager"), data)  # fails on a host sync
    assert result.dtype == torch.bool and not result.requires_grad
    assert torch.equal(result, call(function, data))


# --- The user's rule ---
RULE_FILE = """
import torch
def inside(obs, action, next_obs): return (next_obs[:, 0] > 0.5) & (not torch.is_grad_enabled())
def floats(obs, action, next_obs): return next_obs[:, 0]
def per_column(obs, action, next_obs): return (next_obs > 0).any(dim=0)
def listed(obs, action, next_obs): return [True]
def fails(obs, action, next_obs): return next_obs[:, 99] > 0
number = 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "made_up_rules.py").write_text(RULE_FILE)
    (tmp_path / "broken_rules.py").write_text("import no_such_package_at_all")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", os.getcwd())])
    yield
    sys.modules.pop("made_up_rules", None)


def test_users_function_is_imported_from_the_working_directory(folder, capsys):
    data = point_mass(100, 0)
    assert torch.equal(call(termination_fn("made_up_rules:inside", data), data), data.next_obs[:, 0] > 0.5)
    assert "termination: made_up_rules:inside" in capsys.readouterr().out


@pytest.mark.parametrize(
    "mode, words",
    [
        ("no_such_rules:inside", "cannot import no_such_rules:inside .*No module named"),
        ("broken_rules:inside", "cannot import broken_rules:inside .*no_such_package_at_all"),
        ("made_up_rules:outside", "cannot import made_up_rules:outside .*has no attribute"),
        ("made_up_rules:number", "made_up_rules:number fails on rows of the data .*not callable"),
        ("made_up_rules:floats", "must return torch.bool of shape .*not torch.float32"),
        ("made_up_rules:per_column", "must return torch.bool of shape"),
        ("made_up_rules:listed", "must return torch.bool of shape .*not .*list"),
        ("made_up_rules:fails", r"fails on rows of the data \(IndexError"),
        ("sometimes", "'sometimes' is none of auto, known, forced, learned, none"),
        ("made_up_rules:", "is none of auto"),
    ],
)
def test_users_mistakes_are_input_errors(folder, mode, words):
    with pytest.raises(InputError, match=words):
        termination_fn(mode, point_mass(100, 0))
