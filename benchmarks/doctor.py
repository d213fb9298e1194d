"""Is a log sound? What would spoil a model is SERIOUS; what may be meant, but seldom is, is for you to look at.

Reads whatever the scripts' --dataset takes, says all that they say of it at every start, and looks further. A line a
finding, and one page with plots that needs no network. Exit status 1 where something is SERIOUS. The thresholds stand
at the top of the file. Regressions and steps of the environment judge by a sample of the rows.
Run: python benchmarks/doctor.py mine.npz --env-id Hopper-v5
     python benchmarks/doctor.py hopper/medium-v0 --out hopper.html
"""

import io
import re
import sys
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import tyro
from gymnasium.envs.classic_control import PendulumEnv

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.doctor_page import page  # noqa: E402
from benchmarks.files import HomePaths, one_line, safe, start, write_text  # noqa: E402
from common import InputError  # noqa: E402
from common.checks import examine, unit_warnings  # noqa: E402
from common.dataset import MOST_STEPS, OfflineDataset, _read_flat, gym_class, load_dataset  # noqa: E402
from common.evaluation import make_env  # noqa: E402
from common.terminations import rule_warning  # noqa: E402

SERIOUS, LOOK, FINE, UNKNOWN = "SERIOUS", "look at", "fine", "unknown"
# Where there are two numbers, the first is for "look at" and the second is SERIOUS.
JUMP, JUMPS = 0.5, 2e-4  # a row's error of one-step prediction, in median errors of rows that are mixed up; such rows
COLUMNS = 0.25  # of a jump's columns, at least, are off by half as much
LIMIT_ENDS = 3  # terminals at the very limit of steps, where few stand shortly before it
CUTS = 0.01  # of the ends: neither terminal nor at a time limit
SINGLE = 0.05  # of the episodes: of one row
DUPLICATES = (0.001, 0.1)  # of the rows
STILL = 0.01  # halts per row: the observation does not change, and goes on to change
EXPLODES = (50, 1000)  # distance from the median in widths of the range of 98 % of the values; and it is over 10
SAME_REWARD = 0.999  # of the rows
OUTSIDE = (1e-9, 0.05)  # of the actions: clipped, which is harmless where the environment does that itself
AT_BOUND = 0.5  # of the numbers in all actions
SPAN = 0.1  # of the box: the largest action of a component
DETERMINED = 0.02  # of half the box: the deviation of the actions from what the observation explains
SHIFT = 0.5  # the unexplained share of a neighbour's reward, in that of the row's own
PHYSICS, OTHER = 0.01, 0.2  # a row's distance from the environment's own step, in usual steps; such rows
ROWS, STEPS, FEWEST = 30_000, 500, 200  # at most, in regressions and in the environment; fewer rows tell nothing
SPOILS = ("one and the same action", "as unlike as any two", "all end terminal")  # of the loader, which left them
HIDDEN = {"Hopper": 1, "HalfCheetah": 1, "Walker2d": 1, "Swimmer": 2, "Ant": 2, "InvertedPendulum": 0}  # positions
CLIPPED = 10  # at this size some of MuJoCo's environments hide how large a velocity is


@dataclass
class Args(HomePaths):
    dataset: tyro.conf.Positional[str]  # as --dataset of the scripts
    env_id: str = ""  # environment that the data were recorded in; "": the data's own
    trust: bool = False  # import the modules that only the data name: code of whoever made them
    out: Path | None = None  # the page; by default in pages/


class Finding(NamedTuple):
    level: str
    check: str
    text: str


@dataclass
class Log:
    """What several checks need, in NumPy: of the n rows that are kept, but `length` to `unflagged` as recorded."""

    data: OfflineDataset
    obs: np.ndarray  # (n, obs_dim), in float64 and standard deviations from the mean, as next_obs
    next_obs: np.ndarray
    action: np.ndarray  # (n, action_dim) in [-1, 1]
    reward: np.ndarray  # (n,) float64
    end: np.ndarray  # (n,) bool; none where the rows follow no order
    known: np.ndarray  # (n,) bool, the successor
    sample: np.ndarray  # at most ROWS indices of rows with a known successor, in order
    length: np.ndarray  # (num_episodes,) as recorded; none where the rows follow no order
    terminal: np.ndarray  # (num_episodes,) bool
    unflagged: np.ndarray  # recorded rows that end an episode without a flag
    errors: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None  # as one_step() gives them


def log_of(data: OfflineDataset) -> Log:
    unit = np.where(data.obs_std > 0, data.obs_std, 1.0)
    obs, next_obs = ((x.numpy() - data.obs_mean) / unit for x in (data.obs, data.next_obs))
    end = data.episode_end.numpy() if data.ordered else np.zeros(len(obs), bool)
    at = np.flatnonzero(known := data.successor_known.numpy())
    sample = np.sort(np.random.default_rng(0).choice(at, min(len(at), ROWS), replace=False))
    reward = data.reward.numpy().astype(np.float64)
    log = Log(data, obs, next_obs, data.action.numpy(), reward, end, known, sample, *recorded_ends(data, end))
    log.errors = one_step(log) if len(sample) >= FEWEST else None
    return log


def recorded_ends(data: OfflineDataset, end: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """length, terminal, unflagged: a file of plain rows is read once more, as rows that are not kept count."""
    none, terminal = np.empty(0, int), data.terminal.numpy() > 0.5
    if data.ordered and Path(data.source).suffix.lower() in (".npz", ".hdf5", ".h5"):
        rows = _read_flat(Path(data.source))
        rows.pop("notes")
        examine(rows, data.source, limit_of(data))
        end, terminal = rows["episode_end"], rows["terminals"]
        none = np.flatnonzero(end[:-1] & ~(terminal | rows["timeouts"])[:-1])
    return np.diff(np.flatnonzero(end), prepend=-1), terminal[end], none


def limit_of(data: OfflineDataset) -> int | None:
    """The environment's own limit of steps."""
    limit = data.env_spec and data.env_spec.max_episode_steps
    return None if limit == MOST_STEPS else limit


def level(value: float, look: float, serious: float = np.inf) -> str:
    return SERIOUS if value >= serious else LOOK if value >= look else FINE


# --- Regressions ---
def features(x: np.ndarray, most: int = 300) -> np.ndarray:
    """(rows, dim) -> (rows, num): 1, x, its squares and random waves, as many as the rows can tell apart."""
    rng, num = np.random.default_rng(0), min(most, len(x) // 20)
    waves = rng.normal(size=(x.shape[1], num)) * 1.5 / np.sqrt(x.shape[1])
    x = np.clip(x, -20, 20)
    return np.concatenate([np.ones((len(x), 1)), x, x * x, np.cos(x @ waves + rng.uniform(0, 6.3, num))], axis=1)


def predicted(x: np.ndarray, y: np.ndarray, fit_to: np.ndarray) -> np.ndarray:
    """Ridge regression of y (rows, dim) on features x, fitted to some of the rows (bool)."""
    inner = x[fit_to].T @ x[fit_to] + 1e-6 * len(x) * np.eye(x.shape[1])
    return x @ np.linalg.solve(inner, x[fit_to].T @ y[fit_to])


def one_step(log: Log) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Errors of predicting the step in the sample's rows, and had they each other's successors: (rows,) each.

    Then bool (rows,), which errors count: not those of rows far outside, nor of few columns, such as a switch.
    """
    at, rng = log.sample, np.random.default_rng(0)
    x, y = features(np.concatenate([log.obs[at], log.action[at]], axis=1)), log.next_obs[at] - log.obs[at]
    low, middle, high = np.quantile(log.obs[at], [0.01, 0.5, 0.99], axis=0)
    width = np.where(high > low, high - low, 20.0)
    fit_to = inside = (np.abs(log.obs[at] - middle) <= 5 * width).all(axis=1)
    for _ in range(3):  # without those that it fits worst: the bad ones shall not teach it
        error = y - predicted(x, y, fit_to)
        usual = np.sqrt((error[fit_to] ** 2).mean(axis=0)) + 1e-9
        size = (np.abs(error) / usual).max(axis=1)
        fit_to = inside & (size <= np.quantile(size[inside], 0.98))
    wrong = log.next_obs[rng.permutation(at)] - log.next_obs[at] + error
    inverse = np.linalg.inv(error[fit_to].T @ error[fit_to] / fit_to.sum() + 1e-6 * np.eye(error.shape[1]))
    norm = lambda e: np.sqrt(np.maximum(np.einsum("ij,jk,ik->i", e, inverse, e), 0))  # noqa: E731
    is_off = np.abs(error) > np.maximum(3 * usual, JUMP / 2 * np.median(np.abs(wrong), axis=0))
    return norm(error), norm(wrong), inside & (is_off.mean(axis=1) >= COLUMNS)


# --- Checks: what is wrong, and what to do ---
def jumps(log: Log) -> list[Finding]:
    if log.errors is None:
        return [Finding(UNKNOWN, "successors", f"fewer than {FEWEST} rows with a known successor: record more")]
    error, wrong, counts = log.errors
    limit = JUMP * np.median(wrong)
    if np.quantile(error, 0.9) > limit:
        return [Finding(UNKNOWN, "successors", "the next observation can hardly be predicted: look for missing state")]
    bad = log.sample[counts & (error > limit)]
    share = len(bad) / len(log.sample) * (len(bad) >= 2)
    rows = f"{len(bad):,} of {len(log.sample):,} rows examined lead where no step leads"
    if share < JUMPS:
        return [Finding(FINE, "successors", rows)]
    first = np.r_[True, log.end[:-1]] if log.data.ordered else log.end
    where = f"the first is row {bad[0]:,}; {first[bad].mean():.0%} begin and {log.end[bad].mean():.0%} end an episode"
    todo = "mark every cut in `timeouts`, and record the observation before the reset as next_observations"
    return [Finding(SERIOUS, "successors", f"{rows}, as if into another episode ({where}): {todo}")]


def time_limits(log: Log) -> list[Finding]:
    if not log.terminal.any():
        return []
    at, length = log.length.max(), log.length[log.terminal]
    num, before = (length == at).sum(), ((length < at) & (length >= 0.9 * at)).sum()
    if num < LIMIT_ENDS or num * 0.1 * at <= 3 * before:
        return [Finding(FINE, "time limits", f"terminals do not pile up at the longest episode's {at:,} steps")]
    text = f"{num:,} terminals stand exactly at {at:,} steps, the longest, and {before:,} shortly before"
    return [Finding(SERIOUS, "time limits", f"{text}: if that is a time limit, make them `timeouts`")]


def cuts(log: Log) -> list[Finding]:
    data, found, num = log.data, [], len(log.length)
    if not data.ordered:
        return []
    early = (~log.terminal & (log.length < (limit_of(data) or 0)))[:-1].sum()  # the log may stop at any time
    if early and early >= CUTS * num:
        text = f"{early:,} of {num:,} episodes stop before the {limit_of(data):,} steps of {data.env_spec.id}"
        found.append(f"{text} and are not terminal: mark true ends in `terminals`; what was cut on purpose is fine")
    if len(log.unflagged) and len(log.unflagged) >= CUTS * num:
        text = f"{len(log.unflagged):,} of {num:,} episodes end without a flag, the first in row {log.unflagged[0]:,}"
        todo = "set `terminals` where it was over, else `timeouts`"
        found.append(f"{text}, where next_observations part from the next row: {todo}")
    return [Finding(LOOK, "cuts", text) for text in found] or [Finding(FINE, "cuts", "no episode ends unexplained")]


def lengths(log: Log) -> list[Finding]:
    if not log.data.ordered:
        return []
    returns, single = log.data.episode_returns, (log.length == 1).mean()
    text = f"{len(log.length):,} episodes of {log.length.min():,} to {log.length.max():,} steps"
    text += f", returns from {returns.min():,.4g} to {returns.max():,.4g}, {np.median(returns):,.4g} in the median"
    more = f"; {single:.0%} have one row alone: look how ends are flagged" if single >= SINGLE else ""
    return [Finding(level(single, SINGLE), "lengths", text + more)]


def duplicates(log: Log) -> list[Finding]:
    """By 64-bit sums of a row's bits, and of an episode's rows by their place in it."""
    data, rng, n = log.data, np.random.default_rng(0), len(log.reward)
    key = np.zeros(n, np.uint64)
    for x in (data.obs, data.action, data.reward[:, None], data.next_obs):
        for column in x.numpy().T:
            bits = np.ascontiguousarray(column).view(np.uint32)
            key += bits * (rng.integers(2**63, dtype=np.uint64) * np.uint64(2) + np.uint64(1))
    rows, found = n - len(np.unique(key)), []
    if data.ordered:
        start = np.r_[0, np.flatnonzero(log.end)[:-1] + 1]
        length = np.diff(start, append=n)
        place = np.arange(n, dtype=np.uint64) - np.repeat(start, length).astype(np.uint64)
        _, first = np.unique(np.add.reduceat(key * (2 * place + 1), start), return_index=True)
        again = np.delete(np.arange(len(start)), first)
        if len(again):
            grade, rows = level(length[again].sum() / n, 0, DUPLICATES[1]), rows - length[again].sum()
            text = f"{len(again):,} of {len(start):,} episodes are copies of others, the first is episode {again[0]:,}"
            found.append(Finding(grade, "copies", f"{text}: keep one of each, or held-out rows are no test of a model"))
    text = f"{rows:,} of {n:,} rows are copies of other rows"
    if (grade := level(rows / n, *DUPLICATES)) != FINE:
        text += ": remove them (a buffer saved twice?), or held-out rows are no test of a model"
        found.append(Finding(grade, "copies", text))
    return found or [Finding(FINE, "copies", text)]


def halts(log: Log) -> list[Finding]:
    still = (log.data.obs == log.data.next_obs).all(dim=1).numpy() & log.known
    # a process that has stopped stays where it is; what follows an episode's end or is not known says nothing
    num = int((still[1:-1] & ~log.end[1:-1] & log.known[2:] & ~still[2:]).sum())
    text = f"the observation stays the same for a step and then goes on {num:,} times in {len(still):,} rows"
    if num / len(still) < STILL:
        return [Finding(FINE, "halts", text)]
    todo = "act as often as the sensor is read, or leave out the steps between"
    return [Finding(SERIOUS, "halts", f"{text}: {todo}")]


def columns(log: Log) -> list[Finding]:
    data, found, at = log.data, [], np.sort(np.random.default_rng(0).integers(0, len(log.obs), ROWS))
    where = [f"observations column {i}" for i in range(log.obs.shape[1])] + ["rewards"]
    for name, *parts in zip(where, [*data.obs.numpy().T, log.reward], [*data.next_obs.numpy().T, log.reward]):
        low, middle, high = np.quantile(parts[0][at].astype(np.float64), [0.01, 0.5, 0.99])
        width = max(high - low, 1e-3 * abs(middle)) or 1.0
        away = max(max(part.max() - middle, middle - part.min()) for part in parts)
        far = away / width
        if away > 10 and (grade := level(far, *EXPLODES)) != FINE:  # forces of rare contacts are small
            text = (
                f"{name} reach {far:,.3g} times the usual range (98 % in [{low:.4g}, {high:.4g}]) away from the median"
            )
            todo = "remove episodes of a diverged simulator and numbers that stand for `missing`"
            found.append(Finding(grade, "columns", f"{text}: {todo}"))
    if constant := [str(i) for i in np.flatnonzero(data.obs_std == 0)]:
        text = f"observations columns {', '.join(constant[:10])}{' ...' * (len(constant) > 10)} never change"
        found.append(Finding(LOOK, "columns", f"{text}: leave them out, or look whether a sensor was off"))
    return found or [Finding(FINE, "columns", f"{log.obs.shape[1]} of observations, none constant or exploding")]


def rewards(log: Log) -> list[Finding]:
    unit = 1e-6 * np.median(np.abs(log.reward)) or 1e-30
    _, counts = np.unique(np.round(log.reward / unit), return_counts=True)
    share = counts.max() / len(log.reward)
    if share < SAME_REWARD:
        return [Finding(FINE, "rewards", f"the most frequent one has {share:.1%} of the rows")]
    if share < 1:
        text = f"{share:.2%} of the rows have one and the same: few rows tell good from bad, so record more that do"
        return [Finding(LOOK, "rewards", text)]
    if (log.data.terminal > 0.5).any():
        return [Finding(LOOK, "rewards", "all rows have the same, only ends matter: see that no reward was left out")]
    return [Finding(SERIOUS, "rewards", "all rows have the same and nothing ends: record the reward of each step")]


def shifted(log: Log) -> list[Finding]:
    """Does another row explain the reward better than its own?"""
    middle = log.sample[(log.sample > 0) & (log.sample < len(log.end) - 1)]
    middle = middle[~log.end[middle - 1] & ~log.end[middle]]
    if len(middle) < FEWEST or not log.data.ordered or log.reward.std() == 0:
        return [Finding(UNKNOWN, "rewards' rows", "too few neighbouring rows, or rewards, to compare")]
    y = log.reward[middle, None]
    y = np.clip(y, *np.quantile(y, [0.001, 0.999]))  # single enormous ones are found by `columns`
    fit_to, rest = np.random.default_rng(0).random(len(y)) < 0.7, {}
    for name, at in (("its own", middle), ("the row before", middle - 1), ("the row after", middle + 1)):
        sides = (np.concatenate([obs[at], log.action[at]], axis=1) for obs in (log.obs, log.next_obs))
        x = np.concatenate([features(side, 150) for side in sides], axis=1)  # both alike: their ranks are to be fair
        rest[name] = (y - predicted(x, y, fit_to))[~fit_to].var() / max(y[~fit_to].var(), 1e-30)
    own, (best, name) = rest.pop("its own"), min((value, name) for name, value in rest.items())
    if best > 0.5 or best + 2e-4 >= SHIFT * (own + 2e-4):
        return [Finding(FINE, "rewards' rows", f"a row leaves {own:.2g} of its reward's variance unexplained")]
    text = f"a row leaves {own:.2g} of its reward's variance unexplained, {name} {best:.2g}"
    todo = f"rewards stand one row too {'late' if 'before' in name else 'early'}, move them"
    return [Finding(SERIOUS, "rewards' rows", f"{text}: {todo}, unless they are paid with a delay")]


def actions(log: Log, is_simulated: bool, said: str) -> list[Finding]:
    at_bound, most, found = (np.abs(log.action) > 1 - 1e-5).mean(), np.abs(log.action).max(axis=0), []
    if outside := re.search(r"([\d,]+) of ([\d,]+) actions in .* lie outside", said):
        num, of = (int(count.replace(",", "")) for count in outside.groups())
        todo = "the environment does the same" if is_simulated else "give their environment by --env-id or rescale them"
        grade = level(num / of, OUTSIDE[0], np.inf if is_simulated else OUTSIDE[1])
        found.append(Finding(grade, "actions", f"{num:,} of {of:,} lie outside the box and are clipped to it: {todo}"))
    if at_bound >= AT_BOUND:
        text = (
            f"{at_bound:.0%} of the numbers are bounds of the box: look whether they were clipped or are in other units"
        )
        found.append(Finding(LOOK, "actions", text))
    if len(small := np.flatnonzero((most < SPAN) & (log.data.action_high > log.data.action_low))):
        text = f"components {', '.join(map(str, small))} use {most[small].max():.2g} of the box at most"
        found.append(Finding(LOOK, "actions", f"{text}: look at their units and the box (--env-id)"))
    x, y = features(log.obs[log.sample]), log.action[log.sample].astype(np.float64)
    fit_to = np.random.default_rng(0).random(len(x)) < 0.5
    if len(x) >= FEWEST and (rest := (y - predicted(x, y, fit_to))[~fit_to].std(axis=0).max()) < DETERMINED:
        text = f"they follow from the observation but for {rest:.2g} of half the box"
        todo = "no model can learn what other actions do, so add noise when recording, or imitate"
        found.append(Finding(LOOK, "actions", f"{text}: {todo}"))
    return found or [Finding(FINE, "actions", f"inside the box, {at_bound:.1%} of the numbers at its bounds")]


# --- The environment's own step ---
def setter(env: gym.Env, obs: np.ndarray) -> tuple[Callable, int] | None:
    """How `env`, which shows `obs`, is put where an observation says, and how many columns to compare; or None."""
    world, name = env.unwrapped, gym_class(env.spec)
    if isinstance(world, PendulumEnv):
        return lambda o: setattr(world, "state", np.array([np.arctan2(o[1], o[0]), o[2]])), 3
    if name == "InvertedDoublePendulum":
        return lambda o: world.set_state(np.array([o[0], *np.arctan2(o[1:3], o[3:5])]), o[5:8]), 8
    if name in HIDDEN:
        num = world.model.nq - HIDDEN[name]
        stop = num + world.model.nv
        return lambda o: world.set_state(np.r_[np.zeros(HIDDEN[name]), o[:num]], o[num:stop]), stop
    for key, value in vars(world).items():
        if isinstance(value, np.ndarray) and value.shape == obs.shape and np.allclose(value, obs):
            return lambda o: setattr(world, key, o.astype(value.dtype)), len(obs)
    return None


def physics(log: Log) -> list[Finding]:
    if log.data.env_spec is None:
        return [Finding(UNKNOWN, "physics", "no environment to compare with: give it by --env-id if there is one")]
    try:
        env = make_env(log.data)  # and tries it, as every start does
    except InputError as error:
        return [Finding(SERIOUS, "environment", str(error))]
    try:
        return one_steps(log, env)
    except Exception as error:  # of anybody's environment
        return [Finding(UNKNOWN, "physics", f"{log.data.env_spec.id} cannot be stepped here ({error!r}): see to that")]


def one_steps(log: Log, env: gym.Env) -> list[Finding]:
    """From the observation of some rows: does the environment go where the row went, and give its reward?"""
    if not len(log.sample):
        return [Finding(UNKNOWN, "physics", "no row has a known successor: record next_observations")]
    data, rng = log.data, np.random.default_rng(0)
    env.action_space.seed(0)
    name, known = data.env_spec.id, setter(env, env.reset(seed=0)[0])
    todo = "compare some steps by hand"
    unset = Finding(UNKNOWN, "physics", f"the state of {name} cannot be set from an observation: {todo}")
    if known is None:
        return [unset]
    put, num = known
    obs, after = (data.raw_obs(x[log.sample]).double().numpy() for x in (data.obs, data.next_obs))
    usual = np.sqrt(((after - obs) ** 2).mean(axis=0))[:num]
    usual = np.where(usual > 0, usual, 1.0)
    far = lambda a, b: np.sqrt((((np.asarray(a) - b)[..., :num] / usual) ** 2).mean(axis=-1))  # noqa: E731
    own = []
    for seed in range(40):  # is all of its state in what it shows?
        before = env.reset(seed=seed)[0]
        for _ in range(seed % 4):
            before = env.step(env.action_space.sample())[0]
        before, action = np.array(before, np.float64), env.action_space.sample()
        now = np.array(env.step(action)[0], np.float64)
        env.reset(seed=100 + seed)
        put(before)
        if (np.abs(before) != CLIPPED).all():
            own.append(far(env.step(action)[0], now) > PHYSICS)
    if not own or np.mean(own) > 0.5:  # fewer: float32 has rounded it across a wall
        return [unset]
    at = np.flatnonzero((np.abs(obs) != CLIPPED).all(axis=1))
    at = rng.choice(at, min(len(at), STEPS), replace=False)
    action, off, paid = data.to_env_action(log.action[log.sample[at]]), [], []
    for i, act in zip(at, action):
        put(obs[i])
        there, reward, *_ = env.step(act.astype(env.action_space.dtype))
        off.append(far(there, after[i]))
        paid.append(abs(float(reward) - log.reward[log.sample[i]]))
    env.close()
    share, wrong = np.mean(np.array(off) > PHYSICS), np.mean(np.array(paid) > PHYSICS * max(log.reward.std(), 1e-6))
    found = Finding(FINE, "physics", f"{name} makes the same step in {1 - share:.1%} of {len(at)} rows")
    if share >= OTHER + np.mean(own):
        text = (
            f"{name} goes elsewhere in {share:.0%} of {len(at)} rows, in the median by {np.median(off):.2g} usual steps"
        )
        found = Finding(SERIOUS, "physics", f"{text}: give the environment and version of the recording by --env-id")
    if wrong < OTHER + np.mean(own):
        return [found, Finding(FINE, "physics", f"{name} gives the same reward in {1 - wrong:.1%} of {len(at)} rows")]
    text = f"{name} gives another reward in {wrong:.0%} of {len(at)} rows: scores are of its reward, not of the data's"
    return [found, Finding(LOOK, "physics", f"{text}, so look for shifted, scaled or shaped rewards")]


def said_at_start(lines: list[str], data: OfflineDataset) -> list[Finding]:
    """What every script says of these data, too."""
    found = []
    for line in lines:
        kind, _, text = line.partition(": ")
        if "lie outside the box" not in text:  # `actions` knows more
            grade = SERIOUS if kind == "warning" and any(part in text for part in SPOILS) else LOOK
            found.append(Finding(grade, "as every start", text.removeprefix(f"{data.source} ")))
    found += [Finding(LOOK, "as every start", text) for text in unit_warnings(data)]
    found += [Finding(SERIOUS, "as every start", text) for text in [rule_warning(data)] if text]
    return found or [Finding(FINE, "as every start", "nothing had to be refused, mended or left out")]


def examined(args: Args) -> tuple[list[Finding], Log | None]:
    """All findings, the worst first; no log where the data are refused."""
    try:
        with redirect_stderr(io.StringIO()) as said:
            data = load_dataset(args.dataset, env_id=args.env_id or None, trust=args.trust)
    except InputError as error:
        return [Finding(SERIOUS, "refused", str(error))], None
    log, lines = log_of(data), [line for line in said.getvalue().splitlines() if line.startswith(("warning", "note"))]
    world = physics(log)
    is_simulated = any(f.level == FINE and "same step" in f.text for f in world)
    found = said_at_start(lines, data)
    for check in (jumps, time_limits, cuts, lengths, duplicates, halts, columns, rewards, shifted):
        found += check(log)
    found += actions(log, is_simulated, "".join(lines)) + world
    return sorted(found, key=lambda f: (SERIOUS, LOOK, UNKNOWN, FINE).index(f.level)), log


# --- The command ---
def verdict(found: list[Finding]) -> str:
    serious, look = (sum(f.level == grade for f in found) for grade in (SERIOUS, LOOK))
    if serious:
        return f"{serious} SERIOUS and {look} to look at: mend the data before you train on them"
    return f"nothing SERIOUS, {look or 'nothing'} to look at"


def main(args: Args) -> int:
    found, log = examined(args)
    for f in found:
        print(f"{f.level:<8} {f.check:<15} {one_line(f.text)}")
    out = args.out or ROOT / "pages" / f"doctor-{safe(args.dataset)}.html"
    write_text(out, page(args.dataset, verdict(found), found, log, JUMP))
    print(f"{verdict(found)}\npage     {out}")
    return int(any(f.level == SERIOUS for f in found))


if __name__ == "__main__":
    start(main, Args)
