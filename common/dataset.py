"""Anything -> one flat, device-resident set of transitions with true successors.

Sources: the embedded default, D4RL's datasets by name, D4RL-style .hdf5 or .npz files, Minari datasets by folder or id.
A transition is (obs, action, reward, next_obs, terminal). Two mistakes are easy here, and both poison a dynamics model:
pairing the last observation of an episode with the first one of the next, and calling a time limit a termination.
"""

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import gymnasium as gym
import h5py
import minari
import numpy as np
import torch
from filelock import FileLock
from gymnasium.envs.registration import EnvSpec
from gymnasium.spaces.utils import flatten_space
from minari.storage import get_dataset_path
from torch import Tensor

from common import InputError, add_working_directory, explained, writing
from common.checks import NoEpisodes, Rows, examine
from common.download import D4RL, d4rl_file

DEFAULT_DATASET = "pendulum/random-v0"
REF_SCORES = {  # (random, expert) by gym_class, for every dataset and version of it; D4RL's except the last
    "Hopper": (-20.272305, 3234.3),
    "HalfCheetah": (-280.178953, 12135.0),
    "Walker2d": (1.629008, 4592.3),
    "Ant": (-325.6, 3879.7),
    # the mean of 10,000 uniformly random episodes (standard error 3), and about what a well-trained policy reaches
    "Pendulum": (-1230.0, -150.0),
}
HASHED = ("obs", "action", "reward", "next_obs", "terminal", "successor_known", "episode_end", "episode_returns")
MOST_STEPS = 10_000  # of an evaluated episode, where the environment has no time limit of its own
# D4RL's, the first four of which are needed, and what Gymnasium says in place of its words
KEYS = ("observations", "actions", "rewards", "terminals", "timeouts", "next_observations")
GYM_KEYS = {"terminals": "terminations terminated terminateds", "timeouts": "truncations truncated truncateds"}
COARSE = 2.0**-24 / 1e-3  # of the mean: a smaller deviation is less than a thousand of float32's rounding errors
FLAT = (".hdf5", ".h5", ".npz")
CACHE_VERSION = 3  # part of every cache key: raise it when the arrays made from the same file change


def _readable(path: Path) -> AbstractContextManager:
    """What fails inside is to blame on the file."""
    hint = "get it again, or store it as .hdf5 or .npz with D4RL's keys, each one array of numbers"
    return explained(f"Cannot read {path}", hint)


@dataclass
class OfflineDataset:
    """N transitions in recorded order. Tensors are float32 (or bool) on one device; the rest is NumPy."""

    name: str  # as the user gave it
    source: str  # where the rows came from
    obs: Tensor  # (N, obs_dim)
    action: Tensor  # (N, action_dim), scaled from the environment's box to [-1, 1]
    reward: Tensor  # (N,)
    next_obs: Tensor  # (N, obs_dim), the true successor, also at the end of an episode
    terminal: Tensor  # (N,), 1 = true termination, never a time limit
    successor_known: Tensor  # (N,) bool; False: next_obs is a placeholder at a terminal, useless for fitting a model
    episode_end: Tensor  # (N,) bool, the last kept row of each episode
    episode_returns: np.ndarray  # (num_episodes,) undiscounted, over all recorded rows, also those that were dropped
    action_low: np.ndarray  # (action_dim,) the environment's box
    action_high: np.ndarray  # (action_dim,)
    env_spec: EnvSpec | None  # environment to evaluate in: gym.make(env_spec)
    ref_scores: tuple[float, float] | None  # (random, expert): the returns that score 0 and 100
    data_hash: str  # hex, of the contents of all arrays and the box: the same wherever the data lie
    obs_shift: np.ndarray  # (obs_dim,) float64; obs = (what the environment shows - shift) / scale
    obs_scale: np.ndarray
    obs_mean: np.ndarray  # (obs_dim,) float64, of obs
    obs_std: np.ndarray  # exactly 0 for constants
    ordered: bool  # False: the rows follow no order, whatever needs episodes is refused
    cut_rows: Tensor  # (num_cut,) where the next row was dropped, though it has the next action:
    cut_action: Tensor  # (num_cut, action_dim)

    def __post_init__(self):
        self.rescaled = bool(self.obs_shift.any() or (self.obs_scale != 1).any())
        if not self.ordered:
            self.episode_end = self.episode_returns = NoEpisodes()

    def to_obs(self, env_obs: np.ndarray) -> np.ndarray:
        """What networks see, float32, of what the environment shows (..., obs_dim)."""
        return np.asarray((env_obs - self.obs_shift) / self.obs_scale if self.rescaled else env_obs, np.float32)

    def raw_obs(self, obs: Tensor) -> Tensor:
        """The reverse (..., obs_dim): float64, or `obs` itself where nothing is rescaled."""
        if not self.rescaled:
            return obs
        shift, scale = (torch.as_tensor(x, device=obs.device) for x in (self.obs_shift, self.obs_scale))
        return obs.double() * scale + shift

    def to_env_action(self, action: np.ndarray) -> np.ndarray:
        """Maps actions (..., action_dim) from [-1, 1], clipped to it, to the environment's box."""
        center, half = (self.action_high + self.action_low) / 2, (self.action_high - self.action_low) / 2
        return center + half * np.clip(action, -1.0, 1.0)

    def next_action(self) -> tuple[Tensor, Tensor]:
        """The action logged one step later (N, action_dim) and where there is one, (N,): not where episodes end."""
        action, known = self.action.roll(-1, dims=0), self.episode_end.logical_not()
        action[self.cut_rows], known[self.cut_rows] = self.cut_action, True
        return action, known

    def normalised_score(self, returns: float | np.ndarray) -> float | np.ndarray:
        """100 * (return - random) / (expert - random), for one return or an array; nan without reference scores."""
        low, high = self.ref_scores or (np.nan, np.nan)
        return 100.0 * (returns - low) / (high - low)

    def summary(self) -> str:
        """Three lines for the start of a log; two where the rows follow no order."""
        returns, (low, high) = self.episode_returns, self.ref_scores or (np.nan, np.nan)
        lines = [f"{self.name}: {self.source}, environment {self.env_spec.id if self.env_spec else 'unknown'}"]
        episodes = f"{len(returns):,} episodes" if self.ordered else "the rows follow no order"
        ends = f"{int(self.terminal.sum()):,} terminal ({int((~self.successor_known).sum()):,} without successor)"
        dims = f"obs {self.obs.shape[1]}, action {self.action.shape[1]}"
        lines.append(f"{episodes}, {len(self.obs):,} steps, {ends}, {dims}")
        if self.ordered:
            behaviour = f"min {returns.min():.1f}, mean {returns.mean():.1f}, max {returns.max():.1f}"
            score = f"{self.normalised_score(returns.mean()):.1f} (0 = {low:g}, 100 = {high:g})"
            lines.append(f"behaviour return: {behaviour}; normalised mean {score}")
        return "\n".join(lines)


def cache_dir() -> Path:
    """Folder of everything that can be made again: $OFFLINE_MBRL_CACHE, else offline-mbrl in the user's cache."""
    user_cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(os.environ.get("OFFLINE_MBRL_CACHE") or Path(user_cache, "offline-mbrl")))


def load_dataset(
    name: str, device: torch.device | str = "cpu", env_id: str | None = None, standardise_obs: bool = False,
    trust: bool = False,
) -> OfflineDataset:  # fmt: skip
    """Loads `name` and puts it on `device`.

    name: "pendulum/random-v0" (made at first use), else a path to an .hdf5, .h5 or .npz file with D4RL's keys, else
        the folder of a Minari dataset, else "d4rl/hopper-medium-v2" or another key of D4RL, else a Minari id; the last
        two are downloaded when they are not local. Dictionaries of vectors are flattened, keys in sorted order.
    env_id: environment to evaluate in and to take the action box from, as for gym.make; wins over the dataset's own.
    standardise_obs: shift and scale the observations to mean 0 and deviation 1.
    trust: import what only the data name to make their environment, which is code of whoever made them.
    Raises InputError when the data cannot be found, read or used.
    """
    add_working_directory()
    env_spec = obs_space = action_space = ref_scores = None
    if name == DEFAULT_DATASET:
        source, version, read = "uniformly random actions", f"{name}|{gym.__version__}", _random_pendulum
        env_spec, obs_space, action_space = make_spaces("Pendulum-v1")
    elif (path := _find(name)).is_dir():
        minari_set, env_spec, ref_scores = _open_minari(path, name, env_id is None, trust)
        source, version, read = f"Minari dataset in {path}", _version(path), lambda: _read_minari(minari_set, path)
        # the spaces stored with the data: no need to install the package that registers the environment
        action_space = minari_set.action_space
        env_spec, obs_space = _flattened(env_spec, minari_set.observation_space, action_space, name)
    else:
        source, version, read = str(path), _version(path), lambda: _read_flat(path)
        if name in D4RL:
            model = {"xml_file": "walker2d.xml"} if "walker2d" in name else {}  # its right foot slips, v5's own grips
            env_spec = replace(gym.spec(D4RL[name][0]), kwargs=model)
    if env_id is not None:
        env_spec, obs_space, action_space = make_spaces(env_id)
    limit = env_spec and env_spec.max_episode_steps
    if env_spec is not None and limit is None:
        env_spec = replace(env_spec, max_episode_steps=MOST_STEPS)
    ref_scores = ref_scores or REF_SCORES.get(gym_class(env_spec))
    version = f"{version}|{limit}|{standardise_obs}"
    arrays = _cached(version, lambda: _transitions(read(), source, limit, standardise_obs))
    print("".join(f"{line}\n" for line in arrays["found"]), end="", file=sys.stderr)
    obs, num_rows = arrays["obs"], len(arrays["obs"])
    action = np.concatenate([arrays["action"], arrays["cut_action"]]) if len(arrays["cut_rows"]) else arrays["action"]
    for what, array, space in (("observations", obs, obs_space), ("actions", action, action_space)):
        if space is not None and space.shape != array.shape[1:]:
            counts = f"{array.shape[1]} numbers but {env_id or 'its own space'} has {space.shape[0]}"
            raise InputError(f"{name} has {what} of {counts}: choose the environment of the recording (--env-id).")
    action_space = action_space or gym.spaces.Box(-1.0, 1.0, (action.shape[1],))  # else D4RL's convention
    low, high = _scale_to_unit_box(action, action_space, name)
    data_hash = hashlib.blake2b(str(arrays["data_hash"]).encode() + low.tobytes() + high.tobytes(), digest_size=16)
    arrays |= {"action": action[:num_rows], "cut_action": action[num_rows:]}
    tensors = {key: torch.from_numpy(arrays[key]).to(device) for key in (*HASHED[:-1], "cut_rows", "cut_action")}
    return OfflineDataset(
        name=name, source=source, **tensors, action_low=low, action_high=high, env_spec=env_spec,
        ref_scores=ref_scores, data_hash=data_hash.hexdigest(), ordered=bool(arrays["ordered"]),
        **{key: arrays[key] for key in ("episode_returns", "obs_shift", "obs_scale", "obs_mean", "obs_std")},
    )  # fmt: skip


# --- Where the data are ---
def _find(name: str) -> Path:
    """The file of flat arrays, or the data folder of a Minari dataset, that `name` stands for."""
    path = Path(os.path.expanduser(name))
    if path.suffix.lower() in FLAT or os.path.isfile(path):
        return path
    for find in (lambda: path / "data", lambda: path, lambda: minari_folder() / name / "data"):
        if ((folder := find()) / "main_data.hdf5").exists() or (folder / "metadata.json").exists():
            return folder
    if parts := sorted(p for p in path.iterdir() if p.suffix.lower() in FLAT) if name and os.path.isdir(path) else []:
        raise InputError(f"{path} holds {len(parts)} data files, such as {parts[0].name}: join them into one file.")
    return d4rl_file(name) if name.startswith("d4rl/") else _download(name)


def minari_folder() -> Path:
    """Where Minari has its datasets; it is made."""
    with explained("Minari's folder cannot be made", "set MINARI_DATASETS_PATH to a folder that can be written"):
        return get_dataset_path()


def _download(name: str) -> Path:
    """Downloads a Minari dataset, whole or not at all. Returns its data folder."""
    root = minari_folder()
    local = sorted(str(file.parents[1].relative_to(root)) for file in root.glob("[!.]*/**/data/metadata.json"))
    what = f"No dataset {name!r}: no file, no folder, not in {root} ({', '.join(local) or 'none'}), its download failed"
    hint = f"correct the name, or `minari download {name}` where there is a network and copy it to {root / name}"
    # Minari lists no hidden folders: a download that is killed leaves nothing under the dataset's name
    lock, hidden = FileLock(root / ".downloading.lock"), {"dir": root, "prefix": ".downloading-"}
    with explained(what, hint), lock, tempfile.TemporaryDirectory(**hidden) as folder:
        if not (root / name / "data").exists():  # else another process was faster
            with patch.dict(os.environ, MINARI_DATASETS_PATH=folder):
                minari.download_dataset(name)
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            os.rename(Path(folder, name), root / name)
    return root / name / "data"


def _version(path: Path) -> str:
    """Another string when a file is another one, or was changed, though an archive kept its time and size."""
    digest = hashlib.blake2b(str(path.resolve()).encode(), digest_size=16)
    for file in [path] if path.is_file() else sorted(p for g in ("*.*", "*/*.*") for p in path.glob(g) if p.is_file()):
        with _readable(file), file.open("rb") as opened:
            stat = os.fstat(opened.fileno())
            digest.update(f"{file.name}{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ctime_ns}|{stat.st_ino}".encode())
            for start in sorted({*np.linspace(0, max(stat.st_size - 2**16, 0), 16, dtype=int).tolist()}):
                opened.seek(start)
                digest.update(opened.read(2**16))
    return digest.hexdigest()


def _cached(version: str, read: Callable[[], Rows]) -> Rows:
    """read(), which may take ten seconds, or its result from the cache, which loads in a fraction of one."""
    key = hashlib.blake2b(f"{version}|{CACHE_VERSION}".encode(), digest_size=16).hexdigest()
    cache_file = cache_dir() / "datasets" / f"{key}.npz"
    try:
        with np.load(cache_file) as cached:  # a zip file: every array carries a checksum
            return {name: cached[name] for name in cached.files}
    except Exception:  # absent, cut off or damaged in any way: it is only a cache, so make it again
        arrays = read()
    digest = hashlib.blake2b(digest_size=16)
    units = [name for name, none in (("obs_shift", 0), ("obs_scale", 1)) if (arrays[name] != none).any()]
    for name in [*sorted(HASHED), *units]:
        digest.update(f"{name}{arrays[name].shape}".encode())
        digest.update(arrays[name].reshape(-1).view(np.uint8))
    arrays["data_hash"] = np.array(digest.hexdigest())
    try:
        cache_file.parent.mkdir(parents=True, exist_ok=True)
        with writing(cache_file) as part, part.open("wb") as file:
            np.savez(file, **arrays)
    except (OSError, InputError) as error:
        print(f"note: the dataset is not cached ({error})", file=sys.stderr)
    return arrays


# --- Reading: n recorded rows under D4RL's keys; episode_end, where it is known, marks the last row of each episode ---
def _random_pendulum() -> Rows:
    """The embedded default: 100 episodes of uniformly random actions, made in half a second."""
    env, steps = gym.make("Pendulum-v1"), []
    env.action_space.seed(0)
    obs, _ = env.reset(seed=0)
    for _ in range(20_000):
        action = env.action_space.sample()
        next_obs, reward, terminal, timeout, _ = env.step(action)
        steps.append((obs, action, np.float32(reward), next_obs, terminal, timeout, timeout))
        obs = env.reset()[0] if timeout else next_obs
    keys = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts", "episode_end")
    return dict(zip(keys, map(np.array, zip(*steps))))


def _read_flat(path: Path) -> Rows:
    with _readable(path), np.load(path) if path.suffix.lower() == ".npz" else h5py.File(path, "r") as file:
        names = {key: next((n for n in (key, *GYM_KEYS.get(key, "").split()) if n in file), None) for key in KEYS}
        missing = [key for key in KEYS[:4] if names[key] is None]
        if vague := [key for key in ("masks", "valids", *["dones"] * ("terminals" in missing)) if key in file]:
            raise InputError(f"{path} has {', '.join(vague)} for ends, or time limits? Write terminals and timeouts.")
        if missing:
            raise InputError(f"{path} lacks {', '.join(missing)} (has {', '.join(file)}): write it with D4RL's keys.")
        rows, unread = {key: _read_array(file[name], name, path) for key, name in names.items() if name}, []
        for key in sorted(set(file) - set(names.values())):
            with suppress(ValueError):  # Python objects
                if "/" not in key and getattr(file[key], "shape", ())[:1] == rows["rewards"].shape:
                    unread.append(key)
    rows, notes = _checked(rows, path), [f"note: not read: {', '.join(unread)} in {path}"] if unread else []
    if "next_observations" not in rows and not rows["timeouts"].any():
        notes.append(f"note: {path} marks no time limits: only its terminals separate episodes")
    return rows | {"notes": notes}


def _checked(rows: Rows, path: Path) -> Rows:
    """Rows of which each has one of everything, finite as float32; flags become bool."""
    obs, next_obs = rows["observations"], rows.get("next_observations", rows["observations"])
    most = np.finfo(np.float32).max
    for key, array in rows.items():
        if len(array) != len(obs):
            raise InputError(f"{path} has {len(obs)} observations but {len(array)} {key}: every row needs one of each.")
        if not (array.min(initial=0) >= -most and array.max(initial=0) <= most):
            row = np.argwhere(~(np.abs(array) <= most))[0, 0]
            raise InputError(f"{path} has NaN or infinite {key} in row {row}: remove that episode.")
    if next_obs.shape != obs.shape:
        raise InputError(f"{path} has observations {obs.shape} but next_observations {next_obs.shape}: both must fit.")
    return rows | {key: rows.get(key, np.zeros(len(obs))) != 0 for key in ("terminals", "timeouts")}


def _read_array(stored: h5py.Dataset | np.ndarray, key: str, path: Path) -> np.ndarray:
    """Returns (n, dim) for observations, actions and next_observations, else (n,); observations may be float64."""
    if stored.dtype.kind not in ("f" if key == "actions" else "fiub"):
        raise InputError(f"{path} has {key} of type {stored.dtype}: store one array of numbers, no discrete actions.")
    is_vector = key in ("observations", "actions", "next_observations")
    if len(stored.shape) != 1 and not (len(stored.shape) == 2 and (is_vector or stored.shape[1] == 1)):
        raise InputError(f"{path} has {key} of shape {stored.shape}: expected {'(n, dim)' if is_vector else '(n,)'}.")
    wide = key in ("observations", "next_observations")
    dtype = np.result_type(stored.dtype, np.float32) if wide else np.dtype(np.float32)
    array = np.asarray(stored[...], dtype)
    return array.reshape(len(array), -1 if array.size else 1) if is_vector else array.reshape(-1)


def _open_minari(path: Path, name: str, wants_env: bool, trust: bool) -> tuple:
    """The dataset, its environment, its reference scores. Without `trust` nothing runs that only the data name."""
    with _readable(path):
        metadata = json.loads((path / "metadata.json").read_text())
        spec = json.loads(metadata.get("env_spec") or "null")
        # Minari makes the environment itself where it misses a space
        may_run = spec and not trust and (wants_env or not {"observation_space", "action_space"} <= metadata.keys())
        if may_run and (unknown := _unknown_code(spec)):
            hint = "install its package, give --trust if you trust its author, or name another environment by --env-id"
            raise InputError(f"{name} would run code: entry point {', '.join(unknown)}; {hint}.")
        minari_set = minari.MinariDataset(path)
        scores = (metadata.get(key) for key in ("ref_min_score", "ref_max_score"))
        low, high = (np.nan if score is None else float(score) for score in scores)
    return minari_set, minari_set.env_spec, (low, high) if -np.inf < low < high < np.inf else None


def _unknown_code(spec: dict) -> list[str]:
    """What making this environment would import and neither gymnasium nor what registered its id has named."""
    keys, own = ("entry_point", "vector_entry_point"), gym.registry.get(spec["id"])
    known = {None, *(getattr(own, key, None) for key in keys)}
    known |= {f"{w.__module__}:{w.__name__}" for w in vars(gym.wrappers).values() if isinstance(w, type)}
    named = [*map(spec.get, keys), *(wrapper["entry_point"] for wrapper in spec["additional_wrappers"])]
    # "module:Name-v0", the id of an environment inside, is imported too
    named += [value for value in spec["kwargs"].values() if isinstance(value, str) and ":" in value]
    return [str(point) for point in named if point not in known]


def _read_minari(dataset: minari.MinariDataset, path: Path) -> Rows:
    parts, keys = [], ("observations", "next_observations", "actions", "rewards", "terminals", "timeouts")
    with _readable(path):
        for episode in dataset:
            obs = episode.observations
            if isinstance(obs, dict):
                obs = np.concatenate([obs[key] for key in sorted(obs)], axis=1)  # (num_steps + 1, obs_dim)
            flags = episode.terminations, episode.truncations
            parts.append((obs[:-1], obs[1:], episode.actions, episode.rewards, *flags))
        lengths = np.array([[*map(len, part)] for part in parts])  # (num_episodes, len(keys))
        if (lengths != lengths[:, :1]).any() or lengths[:, 0].sum() != dataset.total_steps:
            raise InputError(f"{path} is not whole, arrays and {dataset.total_steps} steps do not fit: get it again.")
        rows = {key: _read_array(np.concatenate(arrays), key, path) for key, *arrays in zip(keys, *parts)}
    ends = np.isin(np.arange(1, lengths[:, 0].sum() + 1), lengths[:, 0].cumsum())  # also where none is flagged
    return _checked(rows, path) | {"episode_end": ends}


def _transitions(rows: Rows, source: str, limit: int | None, standardise_obs: bool) -> Rows:
    """Returns the arrays of OfflineDataset, actions still in the environment's units, and what was `found`."""
    if not len(rows["rewards"]):
        raise InputError(f"{source} is empty: it has no rows.")
    notes, (units, found) = rows.pop("notes", []), rescale(rows, standardise_obs)
    found += examine(rows, source, limit)
    obs, next_obs, action = rows["observations"], rows.get("next_observations"), rows["actions"]
    terminal, episode_end, n = rows["terminals"], rows["episode_end"], len(obs)
    episode = np.cumsum(episode_end) - episode_end  # (n,) index of each row's episode
    starts = np.flatnonzero(np.diff(episode, prepend=-1))
    known = ~rows["lost"]
    keep = known | terminal  # the others' successor is needed and was not recorded
    if not keep.any():
        raise InputError(f"{source} is empty: no row has a known successor; record next_observations.")
    every_row = slice(None) if keep.all() else keep  # no copies when nothing is dropped
    if next_obs is None:
        next_obs = obs[(np.arange(n) + known)[keep]]  # where the successor is unknown: itself, as placeholder
    else:
        next_obs = next_obs[every_row] if known.all() else np.where(known[:, None], next_obs, obs)[keep]
    cut = np.flatnonzero(keep[:-1] & ~keep[1:] & ~episode_end[:-1])
    return units | dict(
        obs=obs[every_row], action=action[every_row], reward=rows["rewards"][every_row], next_obs=next_obs,
        terminal=terminal[keep].astype(np.float32), successor_known=known[keep],
        episode_end=np.diff(episode[keep], append=-1) != 0,
        episode_returns=np.add.reduceat(rows["rewards"], starts, dtype=np.float64),
        cut_rows=np.cumsum(keep)[cut] - 1, cut_action=action[cut + 1], ordered=np.array("unordered" not in rows),
        found=np.array([*notes, *(f"warning: {source} {line}" for line in found)], dtype=str),
    )  # fmt: skip


# --- Units of observations ---
def moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of each column in float64; those of a constant are exactly itself and 0."""
    first, total, squares = x[0].astype(np.float64), 0.0, 0.0
    for start in range(0, len(x), 8192):  # a hundred times faster than at once
        away = x[start : start + 8192] - first
        total, squares = total + np.ones(len(away)) @ away, squares + np.ones(len(away)) @ (away * away)
    return first + total / len(x), np.sqrt(np.maximum(squares / len(x) - (total / len(x)) ** 2, 0))


def rescale(rows: Rows, standardise: bool) -> tuple[Rows, list[str]]:
    """Makes observations float32, (o - shift) / scale. Returns both and the new moments, and what to say.

    Not asked to standardise, it centres constants and columns whose variation float32 would round away.
    """
    obs = rows["observations"]
    mean, raw_std = moments(obs)
    std = np.where(raw_std > 4 * np.finfo(obs.dtype).eps * np.abs(mean), raw_std, 0.0)  # less is rounding
    unit = 2.0 ** (np.floor(np.log2(np.where(std > 0, std, 1.0))) - 20)  # else data_hash knew the order of summation
    center, width = np.where(std > 0, np.round(mean / unit) * unit, obs[0]), np.round(std / unit) * unit
    coarse = np.abs(center) * COARSE > std
    shift, scale = np.where(coarse | standardise, center, 0.0), np.where((std > 0) & standardise, width, 1.0)
    changed = shift.any() or (scale != 1).any()
    for key in {"observations", "next_observations"} & rows.keys():
        rows[key] = ((rows[key] - shift) / scale if changed else rows[key]).astype(np.float32, copy=False)
    lost = np.flatnonzero(coarse & (raw_std > 0)) if obs.dtype == np.float32 else []
    cause = "hardly vary beyond the rounding of float32: record float64 or subtract an offset if they should"
    found = [f"has observations whose columns {', '.join(map(str, lost))} {cause}"] if len(lost) else []
    return dict(obs_shift=shift, obs_scale=scale, obs_mean=(mean - shift) / scale, obs_std=std / scale), found


# --- Environments ---
def make_spaces(env_id: str) -> tuple[EnvSpec, gym.Space, gym.Space]:
    """Spec, observation space and action space of a registered environment, "Name-v0" or "package:Name-v0"."""
    with explained(f"Cannot make environment {env_id!r}", "check the id given as --env-id"):
        env = gym.make(env_id)
    env.close()
    env_spec, obs_space = _flattened(gym.spec(env.spec.id), env.observation_space, env.action_space, env_id)
    if not env.action_space.is_bounded():  # RescaleAction needs bounds, ClipAction takes them away
        raise InputError(f"{env_id} has actions without bounds: wrap it in TransformAction with a Box that has bounds.")
    return env_spec, obs_space, env.action_space


def _flattened(env_spec: EnvSpec | None, obs_space: gym.Space, action_space: gym.Space, name: str) -> tuple:
    """Where observations are dictionaries of float vectors: the spec of an environment with a flat space, and that.

    Raises InputError where observations or actions are no vectors.
    """
    is_vector = lambda space: isinstance(space, gym.spaces.Box) and len(space.shape) == 1  # noqa: E731
    spaces = obs_space.spaces if isinstance(obs_space, gym.spaces.Dict) else {}
    if spaces and all(is_vector(space) and space.dtype.kind == "f" for space in spaces.values()):
        obs_space = flatten_space(gym.spaces.Dict(dict(sorted(spaces.items()))))
        if env_spec is not None:
            # Minari stores a space with its keys sorted; the environment's own may be in another order
            in_order = gym.wrappers.FilterObservation.wrapper_spec(filter_keys=sorted(spaces))
            wrappers = (*env_spec.additional_wrappers, in_order, gym.wrappers.FlattenObservation.wrapper_spec())
            env_spec = replace(env_spec, additional_wrappers=wrappers)
    for what, space in (("observations", obs_space), ("actions", action_space)):
        if not is_vector(space):
            raise InputError(f"{name} has {what} in {space}: only (dictionaries of) vectors, not discrete or image.")
    return env_spec, obs_space


def gym_class(env_spec: EnvSpec | None) -> str | None:
    """Hopper for gymnasium's own HopperEnv of any version, however it is registered; None for anybody else's."""
    made_by = env_spec.entry_point if env_spec is not None and env_spec.namespace is None else ""
    if callable(made_by):
        made_by = f"{made_by.__module__}:{getattr(made_by, '__name__', '')}"
    module, _, name = str(made_by).partition(":")
    if module.split(".")[:2] != ["gymnasium", "envs"]:
        return None
    return name.removesuffix("Env") if name.endswith("Env") else env_spec.name  # v2 and v3: a function that refuses


def _scale_to_unit_box(action: np.ndarray, space: gym.spaces.Box, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Scales action (n, action_dim) from its box to [-1, 1] in place; says on stderr how many had to be clipped.

    Returns low, high (action_dim,): the data's range where the space has no bounds, or none that float32 can span.
    """
    low, high = space.low.astype(np.float32), space.high.astype(np.float32)
    bounded = np.isfinite(high - low)
    if not bounded.all():
        low, high = np.where(bounded, low, action.min(axis=0)), np.where(bounded, high, action.max(axis=0))
        ranges = ", ".join(f"[{a:g}, {b:g}]" for a, b in zip(low, high))
        print(f"note: the actions of {name} have no bounds: the data's own range is taken, {ranges}", file=sys.stderr)
    half = (high - low) / 2
    action -= (high + low) / 2
    action /= np.where(half > 0, half, 1)
    outside = (np.abs(action) > np.where(half > 0, 1, 0) + 1e-5).any(axis=1)  # not those that rounding put there
    action[:, half == 0] = 0  # a component that the box fixes
    if outside.any():
        counts = f"{outside.sum():,} of {len(action):,}"
        print(f"warning: {counts} actions in {name} lie outside the box and were clipped to it", file=sys.stderr)
    np.clip(action, -1.0, 1.0, out=action)
    return low, high
