"""Can these data be what they claim? What cannot be is refused, mended or dropped, with a count and one sentence."""

import numpy as np

from common import InputError

Rows = dict[str, np.ndarray]
SAMPLE, FEWEST = 20_000, 10  # so many rows are enough to judge all of them by, and fewer tell nothing


class NoEpisodes:
    """In the place of what rows that follow no order cannot have: whoever asks it for something is refused."""

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)
        hint = "record one environment after another, or choose a method or setting without episodes"
        raise InputError(f"The data's rows follow no order and so have no episodes: {hint}.")


def examine(rows: Rows, source: str, limit: int | None) -> list[str]:
    """Mends n recorded rows under D4RL's keys in place and returns what to say of `source`.

    Adds `lost`, (n,): no successor is known; `episode_end`, where the reader has not; `unordered` where there are no
    episodes. limit: the steps after which the environment, if it is known, cuts an episode off.
    """
    both, num_timeouts, found = rows["terminals"] & rows["timeouts"], rows["timeouts"].sum(), []
    if both.sum() > num_timeouts / 2:
        rows["terminals"] = rows["terminals"] & ~both
        found.append(f"calls {both.sum():,} of {num_timeouts:,} time limits terminal as well: they are no terminals")
    if len(both) >= FEWEST and (rows["actions"] == rows["actions"][0]).all():
        found.append("has one and the same action in all rows: copy it before the next step, or explore more")
    rows["lost"] = np.zeros(len(both), bool)
    refuse_references(rows, source)
    found += [] if "episode_end" in rows else find_ends(rows)
    return found if "unordered" in rows else found + drop_resets(rows) + find_limits(rows, limit)


def some(index: np.ndarray) -> np.ndarray:
    """At most SAMPLE of them, evenly spread."""
    return index[:: len(index) // SAMPLE + 1]


def size(step: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """Root mean square over the columns of step (n, dim), each in its unit (dim,). Returns (n,)."""
    return np.sqrt(((step / np.where(unit > 0, unit, 1.0)) ** 2).mean(axis=1))


def refuse_references(rows: Rows, source: str) -> None:
    """Slow processes are none: where they stand still the next row does too, and now and then they move."""
    obs, flags = rows["observations"], rows["terminals"] | rows["timeouts"]
    i = some(1 + np.flatnonzero(~(flags[1:-1] | flags[:-2])))  # neither an episode's last row nor its first
    next_obs = rows.get("next_observations", obs)
    share = lambda a, b: (a == b).all(axis=1).mean() if len(i) >= FEWEST else 0.0  # noqa: E731
    still, late = max(share(x[i], x[i + 1]) for x in (obs, next_obs)), share(obs[i], next_obs[i])
    if still > 0.998 or (next_obs is not obs and late > 0.95 and share(obs[i], obs[i + 1]) < 0.5):
        what = "the same observation row after row" if still > 0.998 else "next_observations equal to observations"
        raise InputError(f"{source} has {what}, references to one array: copy the observation before the next step.")


def find_ends(rows: Rows) -> list[str]:
    """An episode ends at its flags, and where the successor is not the next row, but for rounding and noise."""
    obs, next_obs, n = rows["observations"], rows.get("next_observations"), len(rows["observations"])
    rows["episode_end"] = ends = rows["terminals"] | rows["timeouts"]
    ends[-1] = True
    inside, rng, std = np.flatnonzero(~ends), np.random.default_rng(0), obs[some(np.arange(n))].std(axis=0)
    if next_obs is None:
        rows["lost"], i = ends.copy(), some(inside)
        near, far = (np.median(size(obs[i] - obs[j], std)) if len(i) else 0.0 for j in (i + 1, rng.permutation(i)))
        unlike = "has neighbouring rows as unlike as any two: put each environment's rows one after the other"
        return [f"{unlike}, or record next_observations"] if len(i) > 1000 and near > 0.92 * far else []
    off = inside[(next_obs[:-1] != obs[1:]).any(axis=1)[inside]]
    if len(off) > len(inside) / 10:  # too many to be ends
        near, far = (size(next_obs[off] - obs[j + 1], std) for j in (off, rng.permutation(off)))
        usual, other = np.median(near), np.median(far)
        if usual < 0.1 * other:
            ends[off[near > max(10 * usual, 0.03 * other)]] = True
            return [f"has next_observations about {usual:.1g} deviations off the next row: taken for rounding or noise"]
        if len(off) > len(inside) / 2:
            rows["unordered"] = np.array(True)
            return [f"has rows that follow no order, {len(off):,} of {n:,} do not lead to the next: it has no episodes"]
    ends[off] = True
    return []


def drop_resets(rows: Rows) -> list[str]:
    """Of vector environments that reset themselves: where a file goes on behind a flagged end, does it jump?"""
    obs, next_obs, n = rows["observations"], rows.get("next_observations"), len(rows["observations"])
    flags, std = rows["terminals"] | rows["timeouts"], obs[some(np.arange(n))].std(axis=0)
    at, usual = np.flatnonzero(flags[:-1]), 1 + some(np.flatnonzero(~(flags | rows["episode_end"])[1:-1] & ~flags[:-2]))
    at = at if next_obs is None else at[size(next_obs[at] - obs[at + 1], std) < 0.05]
    if not len(at) or len(usual) < FEWEST:
        return []
    step = lambda i: (obs[np.minimum(i + 1, n - 1)] if next_obs is None else next_obs[i]) - obs[i]  # noqa: E731
    length = lambda i: np.sqrt((step(i) ** 2).mean(axis=0)) if len(i) else np.zeros(obs.shape[1])  # noqa: E731
    unit, rng, behind = length(usual), np.random.default_rng(0), at[rows["rewards"][at + 1] == 0] + 1
    unit = np.where(unit > 0, unit, np.inf)  # what never moves within an episode, such as goals
    most = max(2.5, *((length(rng.choice(usual, min(len(at), 1000))) / unit).max() * 1.2 for _ in range(50)))
    here, there = ((length(i) / unit).max() for i in (at, behind))
    if len(behind) > 0.9 * len(at) and there > most and (next_obs is not None or there > here):
        rows |= {key: np.delete(array, behind, axis=0) for key, array in rows.items()}
        return [f"has {len(behind):,} rows that only reset an environment, with reward 0: they are dropped"]
    if next_obs is None or here <= most:
        return []
    rows["lost"] = flags  # also those that no start follows in the file
    counts = f"{rows['terminals'].sum():,} terminals lack a successor, {rows['timeouts'].sum():,} timeouts are dropped"
    return [f"has starts for next_observations of its ends: {counts}; record the final observation, in the infos"]


def find_limits(rows: Rows, limit: int | None) -> list[str]:
    """Where no time limit is marked, terminals that stand exactly at one are."""
    ends, limit = np.flatnonzero(rows["episode_end"]), limit or 0
    length, terminal = np.diff(ends, prepend=-1), rows["terminals"][ends]
    if rows["timeouts"].any() or not terminal.any():
        return []
    at, before = length == limit, (length < limit) & (length >= 0.9 * limit)
    if (terminal & at).sum() * 0.1 * limit > 3 * (terminal & before).sum() and terminal[at].all():  # a peak
        rows["terminals"][ends[at]], rows["timeouts"][ends[at]] = False, True
        return [f"has {at.sum():,} terminals exactly at the time limit of {limit} steps: they are taken for timeouts"]
    same = len(ends) >= 5 and terminal.all() and length.min() == length.max() > 1
    what = f"has {len(ends)} episodes that all end terminal after {length[0]} steps: mark them as timeouts if they are"
    return [what] if same else []


def unit_warnings(data) -> list[str]:
    """At most one sentence on columns of `data`, an OfflineDataset, from which unscaled networks learn badly."""
    mean, std = data.obs_mean, data.obs_std
    if (data.obs_scale != 1).any():
        return []
    offset = (np.abs(mean) > 10 * std) & (np.abs(mean) > 2)  # a hopper's height is 1.2 +- 0.02, and not to blame
    bad = np.flatnonzero((std > 0) & (offset | (std > 100) | (std < 0.01)))
    columns = [f"{i} (mean {mean[i]:.3g}, deviation {std[i]:.2g})" for i in bad[:5]] + ["..."] * (len(bad) > 5)
    hint = "far from mean 0 and deviation 1, and networks see them as they are: try --standardise-obs"
    return [f"observations are in columns {', '.join(columns)} {hint}"] if columns else []
