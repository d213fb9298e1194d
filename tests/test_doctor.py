"""The doctor finds what is planted in good data, at the strengths that it documents, and nothing in good data."""

import re

import gymnasium as gym
import matplotlib
import numpy as np
import pytest

from benchmarks import doctor
from benchmarks.doctor import FINE, LOOK, SERIOUS, UNKNOWN
from benchmarks.doctor_page import figure
from tests.test_compare import browser  # noqa: F401

NAMES = ("observations", "actions", "rewards", "terminals", "timeouts", "next_observations")
LIMIT, COST = 50, 0.3


def recorded(policy=None, noise=1.0, cost=COST, num=4_000):
    """A puck on a table of radius 1, pushed at random: right is good, pushing costs, falling off is the end."""
    rng, rows, place = np.random.default_rng(0), {name: [] for name in NAMES}, None
    while len(rows["rewards"]) < num or place is not None:
        if place is None:
            place, speed, steps = rng.uniform(-0.7, 0.7, 2), np.zeros(2), 0
        obs, push = np.hstack([place, speed]), rng.uniform(-1, 1, 2)
        push = push if policy is None else np.clip(policy(obs) + noise * rng.normal(size=2), -1, 1)
        speed = 0.9 * speed + 0.1 * push
        place, steps = place + 0.2 * speed, steps + 1
        over = np.hypot(*place) > 1
        pay = place[0] - cost * (push**2).sum()
        for name, x in zip(NAMES, (obs, push, pay, over, steps == LIMIT and not over, np.hstack([place, speed]))):
            rows[name].append(x)
        place = None if over or steps == LIMIT else place
    return {name: np.array(x) if x[0] is np.bool else np.array(x, np.float32) for name, x in rows.items()}


def pendulum(**kwargs):
    env, rows = gym.make("Pendulum-v1", **kwargs), {name: [] for name in NAMES}
    env.action_space.seed(0)
    obs, _ = env.reset(seed=0)
    for _ in range(2_000):
        action = env.action_space.sample()
        step = env.step(action)
        for name, x in zip(NAMES, (obs, action, step[1], step[2], step[3], step[0])):
            rows[name].append(x)
        obs = env.reset()[0] if step[3] else step[0]
    return {name: np.array(x, np.float32) for name, x in rows.items()}


@pytest.fixture(scope="module")
def good():
    return recorded()


@pytest.fixture
def findings(tmp_path):
    def examine(rows, **args):
        np.savez(tmp_path / "log.npz", **rows)
        return doctor.examined(doctor.Args(str(tmp_path / "log.npz"), **args))[0]

    return examine


def ends_of(rows):
    return np.flatnonzero(rows["terminals"] + rows["timeouts"])


def taken(rows, index):
    return {name: x[index] for name, x in rows.items()}


# --- Faults: of good rows and a strength ---
def jumps(rows, num):
    """The successors of `num` rows in the middle of an episode begin another one."""
    rng, ends = np.random.default_rng(1), ends_of(rows)
    inside = np.setdiff1d(np.arange(len(rows["rewards"])), ends)
    x, away = rows["observations"], rows["next_observations"].copy()
    far = inside[np.hypot(*x[inside, :2].T) > 0.6]
    at = rng.choice(far, num, replace=False)
    away[at] = np.hstack([-x[at, :2], np.zeros((num, 2))])
    return rows | {"next_observations": away}


def lost_limits(rows, share):
    """Without next_observations, and a share of the time limits is not marked."""
    rows, at = {k: v for k, v in rows.items() if k != "next_observations"}, np.flatnonzero(rows["timeouts"])
    timeouts = rows["timeouts"].copy()
    timeouts[at[: round(share * len(at))]] = 0
    return rows | {"timeouts": timeouts}


def limits_as_terminals(rows, num):
    at = np.flatnonzero(rows["timeouts"])[:num]
    out = {name: x.copy() for name, x in rows.items()}
    out["terminals"][at], out["timeouts"][at] = 1, 0
    return out


def unmarked(rows, share):
    at, timeouts = np.flatnonzero(rows["timeouts"]), rows["timeouts"].copy()
    timeouts[at[: max(1, int(np.ceil(share * len(ends_of(rows)))))]] = 0
    return rows | {"timeouts": timeouts}


def single_rows(rows, share):
    """Such a share of the episodes is one row."""
    num = int(np.ceil(len(ends_of(rows)) * share / (1 - share)))
    inside = np.flatnonzero(np.diff(ends_of(rows)) > 5)[:num]
    timeouts = rows["timeouts"].copy()
    timeouts[ends_of(rows)[inside] + 1] = 1
    return rows | {"timeouts": timeouts}


def copied_rows(rows, share):
    num = len(rows["rewards"])
    again = np.random.default_rng(0).choice(num, int(np.ceil(num * share / (1 - share))), replace=False)
    return taken(rows, np.r_[np.arange(num), again])


def copied_episodes(rows, num):
    return taken(rows, np.r_[np.arange(len(rows["rewards"])), np.arange(ends_of(rows)[num - 1] + 1)])


def halts(rows, every):
    """The sensor misses every such reading."""
    ends = ends_of(rows)
    at = np.setdiff1d(np.arange(1, len(rows["rewards"]), every), [*ends, *(ends + 1)])
    obs, after = rows["observations"].copy(), rows["next_observations"].copy()
    obs[at] = obs[at - 1]
    after[at - 1] = obs[at]
    return rows | {"observations": obs, "next_observations": after}


def constant(rows, value_and_others):
    """One more column with one value, but in so many rows."""
    value, others = value_and_others
    column = np.full((len(rows["rewards"]), 1), value, np.float32)
    column[:others] += 1
    more = lambda x: np.hstack([x, column])  # noqa: E731
    return rows | {name: more(rows[name]) for name in ("observations", "next_observations")}


def spike(rows, widths):
    """One number of a column, so many of its usual ranges away."""
    obs, after = rows["observations"] * np.float32(10), rows["next_observations"] * np.float32(10)
    low, middle, high = np.quantile(obs[:, 0], [0.01, 0.5, 0.99])
    after[ends_of(rows)[3], 0] = middle + 1.01 * widths * (high - low)
    return rows | {"observations": obs, "next_observations": after}


def spiked_reward(rows, widths):
    low, middle, high = np.quantile(rows["rewards"], [0.01, 0.5, 0.99])
    rewards = rows["rewards"].copy()
    rewards[100] = middle - 1.05 * widths * (high - low)
    return rows | {"rewards": rewards}


def same_reward(rows, share):
    rewards = np.zeros_like(rows["rewards"])
    rewards[: int((1 - share) * len(rewards))] = 1
    return rows | {"rewards": rewards}


def same_reward_without_ends(rows, share):
    ends = {"terminals": 0 * rows["terminals"], "timeouts": rows["terminals"] + rows["timeouts"]}
    return same_reward(rows, share) | ends


def outside(rows, share):
    actions = rows["actions"].copy()
    actions[: max(1, int(np.ceil(share * len(actions))))] = 3
    return rows | {"actions": actions}


def at_bounds(rows, share):
    where = np.random.default_rng(0).random(rows["actions"].shape) < share + 0.01
    return rows | {"actions": np.where(where, np.sign(rows["actions"]), rows["actions"])}


def small_actions(rows, most):
    return rows | {"actions": rows["actions"] * np.float32(0.999 * most)}


def determined(rows, noise):
    return recorded(lambda obs: np.tanh(0.5 * obs[:2]), noise)


def late_rewards(rows, cost):
    rows = recorded(cost=cost)
    return rows | {"rewards": np.roll(rows["rewards"], 1)}


def early_rewards(rows, cost):
    rows = recorded(cost=cost)
    return rows | {"rewards": np.roll(rows["rewards"], -1)}


def early_rewards_in_noise(rows, noise):
    """Of so many of their deviations."""
    rows = early_rewards(rows, 1)
    size = noise * rows["rewards"].std()
    return rows | {"rewards": rows["rewards"] + size * np.random.default_rng(2).normal(size=len(rows["rewards"]))}


FAULTS = {  # fault: its name in the report; its level by strength, down to FINE where there is too little to be said
    jumps: ("successors", {60: SERIOUS, 10: SERIOUS, 3: SERIOUS, 1: FINE}),
    lost_limits: ("successors", {1: SERIOUS, 0.3: SERIOUS, 0.1: SERIOUS, 0.02: FINE}),
    limits_as_terminals: ("time limits", {100: SERIOUS, 10: SERIOUS, 2: SERIOUS, 1: FINE}),
    unmarked: ("cuts", {0.2: LOOK, 0.05: LOOK, 0.01: LOOK, 0.009: FINE}),
    single_rows: ("lengths", {0.4: LOOK, 0.2: LOOK, 0.05: LOOK, 0.045: FINE}),
    copied_rows: ("copies", {0.5: SERIOUS, 0.1: SERIOUS, 0.095: LOOK, 0.001: LOOK, 0.0009: FINE}),
    copied_episodes: ("copies", {40: SERIOUS, 10: LOOK, 1: LOOK}),
    halts: ("halts", {2: SERIOUS, 10: SERIOUS, 80: SERIOUS, 100: FINE}),
    constant: ("columns", {(100, 0): LOOK, (1, 0): LOOK, (0, 0): LOOK, (1, 1): FINE}),
    spike: ("columns", {1e6: SERIOUS, 1000: SERIOUS, 950: LOOK, 50: LOOK, 49: FINE}),
    spiked_reward: ("columns", {1e9: SERIOUS, 1000: SERIOUS, 900: LOOK, 50: LOOK, 45: FINE}),
    same_reward: ("rewards", {1: LOOK, 0.9995: LOOK, 0.999: LOOK, 0.998: FINE}),
    same_reward_without_ends: ("rewards", {1: SERIOUS, 0.998: FINE}),
    outside: ("actions", {1: SERIOUS, 0.05: SERIOUS, 0.045: LOOK, 0: LOOK}),
    at_bounds: ("actions", {1: LOOK, 0.7: LOOK, 0.5: LOOK, 0.48: FINE}),
    small_actions: ("actions", {0.001: LOOK, 0.05: LOOK, 0.1: LOOK, 0.101: FINE}),
    determined: ("actions", {0: LOOK, 0.01: LOOK, 0.018: LOOK, 0.022: FINE}),
    late_rewards: ("rewards' rows", {1: SERIOUS, 0.1: SERIOUS, 0.03: SERIOUS, 0.01: FINE}),
    early_rewards: ("rewards' rows", {1: SERIOUS, 0.1: SERIOUS, 0.03: SERIOUS}),
    early_rewards_in_noise: ("rewards' rows", {0.5: SERIOUS, 0.9: FINE}),
}


@pytest.mark.parametrize(
    "fault, strength, grade",
    [(fault, *pair) for fault, (_, strengths) in FAULTS.items() for pair in strengths.items()],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_a_planted_fault_is_as_bad_as_documented_by_its_strength(good, findings, fault, strength, grade):
    found = [f for f in findings(fault(good, strength)) if f.check == FAULTS[fault][0]]
    assert found[0].level == grade, found  # the worst is the first
    assert all(": " in f.text or ", so " in f.text for f in found if f.level in (SERIOUS, LOOK)), found


def test_nothing_is_found_in_good_data(good, findings):
    assert [f for f in findings(good) if f.level != FINE and f.check != "physics"] == []


def test_an_episode_that_ends_at_rest_is_no_halt(good, findings):
    after = good["next_observations"].copy()
    after[ends_of(good)] = good["observations"][ends_of(good)]  # and the next episode begins by moving
    assert [f.level for f in findings(good | {"next_observations": after}) if f.check == "halts"] == [FINE]


def test_good_data_have_exit_status_0(good, tmp_path, capsys):
    np.savez(tmp_path / "log.npz", **taken(good, slice(0, 400)))
    assert doctor.main(doctor.Args(str(tmp_path / "log.npz"), out=tmp_path / "page.html")) == 0
    assert "nothing SERIOUS, nothing to look at" in capsys.readouterr().out


def test_nothing_is_found_in_the_embedded_data():
    found, _ = doctor.examined(doctor.Args("pendulum/random-v0"))
    assert [f for f in found if f.level != FINE] == [] and len(found) >= 12


@pytest.mark.parametrize("g", [3.0, 9.0, 9.7])
def test_another_physics_is_found(findings, g):
    found = findings(pendulum(g=g), env_id="Pendulum-v1")
    assert [f.level for f in found if f.check == "physics"] == [SERIOUS, FINE]


@pytest.mark.parametrize("factor", [-1.0, 1.2, 1.05])
def test_another_reward_is_found(findings, factor):
    rows = pendulum()
    found = findings(rows | {"rewards": rows["rewards"] * factor}, env_id="Pendulum-v1")
    assert [f.level for f in found if f.check == "physics"] == [LOOK, FINE]


def test_what_the_loader_says_is_said_again(good, findings):
    rows = {name: x for name, x in pendulum().items() if name != "timeouts"}
    ends = np.arange(len(rows["rewards"])) % 200 == 199
    (line,) = [f for f in findings(rows | {"terminals": ends}, env_id="Pendulum-v1") if f.level == LOOK]
    assert "10 terminals exactly at the time limit of 200 steps: they are taken for timeouts" in line.text
    (line,) = [f for f in findings(rows | {"terminals": rows["observations"][:, 0] > 0.9, "timeouts": ends},
                                   env_id="Pendulum-v1") if f.check == "as every start"]  # fmt: skip
    assert line.level == SERIOUS and "the rule of Pendulum-v1 ends 0 of" in line.text


@pytest.mark.parametrize("hurt", ["references", "NaN", "no file"])
def test_refused_data_are_one_serious_finding_and_a_page(good, tmp_path, capsys, hurt):
    rows, path, out = dict(good), tmp_path / "log.npz", tmp_path / "page.html"
    if hurt == "references":
        rows["observations"] = rows["next_observations"]
    if hurt == "NaN":
        rows["rewards"] = np.where(np.arange(len(rows["rewards"])) == 7, np.nan, rows["rewards"])
    if hurt != "no file":
        np.savez(path, **rows)
    assert doctor.main(doctor.Args(str(path), out=out)) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("SERIOUS  refused") and ": " in said[0] and len(said) == 3
    assert "refused" in out.read_text()


@pytest.mark.parametrize(
    "name", ["Hopper", "HalfCheetah", "Walker2d", "Swimmer", "Ant", "InvertedPendulum", "InvertedDoublePendulum"]
)
def test_mujoco_put_back_into_a_state_goes_from_there_where_it_went(name):
    env, other = (gym.make(f"{name}-v5") for _ in range(2))
    env.action_space.seed(0)
    obs, num_put = env.reset(seed=0)[0], 0
    put, num_columns = doctor.setter(other, other.reset(seed=1)[0])
    for _ in range(8):
        action, before = env.action_space.sample(), obs
        obs = env.step(action)[0]
        if (np.abs(before) != doctor.CLIPPED).all():  # else it does not show how fast it was
            put(before)
            np.testing.assert_allclose(other.step(action)[0][:num_columns], obs[:num_columns], atol=1e-3)
            num_put += 1
    assert num_put >= 3


def test_the_state_of_some_environments_cannot_be_set(findings, monkeypatch):
    monkeypatch.setattr(doctor, "setter", lambda env, obs: None)
    found = [f for f in findings(pendulum(), env_id="Pendulum-v1") if f.check == "physics"]
    assert [f.level for f in found] == [UNKNOWN] and "cannot be set" in found[0].text


def test_rows_in_no_order_and_few_rows_have_a_report_too(good, tmp_path, capsys):
    shuffled = taken(good, np.random.default_rng(0).permutation(len(good["rewards"])))
    bandit = {name: x for name, x in taken(pendulum(), slice(0, 300)).items() if name != "next_observations"}
    bandit["terminals"] = np.ones_like(bandit["terminals"])  # no row has a successor
    few, one = taken(good, slice(0, 12)), taken(good, slice(0, 1))
    for name, rows in (("shuffled", shuffled), ("few", few), ("one", one), ("bandit", bandit)):
        np.savez(tmp_path / f"{name}.npz", **rows)
        env_id = "Pendulum-v1" if name == "bandit" else ""
        doctor.main(doctor.Args(str(tmp_path / f"{name}.npz"), env_id=env_id, out=tmp_path / f"{name}.html"))
        assert "<svg" in (tmp_path / f"{name}.html").read_text()
    out = capsys.readouterr().out
    assert "rows that follow no order" in out and "no row has a known successor" in out and "nan%" not in out


@pytest.fixture(scope="module")
def report(good, tmp_path_factory):
    """The page of data with faults, and with a name that is no HTML."""
    folder = tmp_path_factory.mktemp("report")
    np.savez(folder / "<b> $log.npz", **copied_rows(outside(late_rewards(good, 1), 0.2), 0.2))
    assert doctor.main(doctor.Args(str(folder / "<b> $log.npz"), out=folder / "page.html")) == 1
    return folder / "page.html"


def test_the_page_needs_no_network_and_has_every_finding(report, capsys):
    text = report.read_text()
    assert text.count("<svg") == 6 and text.count("SERIOUS</b>") == 3 and "<b> $log" not in text
    assert "NaN" not in text and len(text) < 600_000
    outer = [word for word in ("<link", "<script src", "@import", 'href="http') if word in text]
    assert outer == []
    ids = re.findall(r' id="([^"]+)"', text)
    used = set(re.findall(r'(?:url\(|href=")#([^")]+)', text))
    assert used and [ids.count(name) for name in used] == [1] * len(used), "plots show each other's marks"


def test_plots_do_not_depend_on_what_another_tool_asked_of_matplotlib():
    def draw(fig, ax):
        ax.set(yscale="log", ylim=(1, 1e4))

    plain = figure("rows", draw)
    with matplotlib.rc_context({"text.parse_math": False, "font.size": 20, "svg.fonttype": "none"}):
        assert figure("rows", draw) == plain


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 390, 1440])
def test_nothing_scrolls_sideways_in_a_browser(browser, report, width):  # noqa: F811
    browser.open(report, width)
    assert browser.run("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
    too_wide = "e => e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).display != 'inline'"
    assert browser.run(f"[...document.querySelectorAll('body *:not(svg, svg *)')].filter({too_wide}).length") == 0
    box, labels = "getBoundingClientRect()", "[...document.querySelectorAll('svg [id*=text_]')]"
    inside = f"e => e.{box}.right <= e.closest('svg').{box}.right + 2"
    assert browser.run(f"{labels}.length") > 60 and browser.run(f"{labels}.every({inside})")
    assert browser.run(f"Math.min(...{labels}.map(e => e.{box}.height))") > 5
