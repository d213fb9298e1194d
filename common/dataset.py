"""Anything -> one flat, device-resident set of transitions with true successors.

Sources: the embedded default, D4RL's datasets by name, D4RL-style .hdf5 or .npz files, Minari datasets by folder or id.
A transition is (obs, action, reward, next_obs, terminal). Two mistakes are easy here, and both poison a dynamics model:
pairing the last observation of an episode with the first one of the next, and calling a time limit a termination.
"""

import hashlib
import importlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

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

from common import InputError
from common.download import D4RL, D4RL_ENVS, d4rl_file

DEFAULT_DATASET = "pendulum/random-v0"
REF_SCORES = {  # (random, expert) by environment name, for every dataset and version of it; D4RL's except the last
    "Hopper": (-20.272305, 3234.3),
    "HalfCheetah": (-280.178953, 12135.0),
    "Walker2d": (1.629008, 4592.3),
    "Ant": (-325.6, 3879.7),
    # the mean of 10,000 uniformly random episodes (standard error 3), and about what a well-trained policy reaches
    "Pendulum": (-1230.0, -150.0),
}
MOST_STEPS = 10_000  # of an evaluated episode, where the environment has no time limit of its own
CACHE_VERSION = 1  # part of every cache key: raise it when the arrays made from the same file change


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # h5py, zipfile and minari raise many kinds for files that are damaged or something else
        raise InputError(f"Cannot read {path} ({error}): it is damaged or of another format, get it again.") from error


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

    def to_env_action(self, action: np.ndarray) -> np.ndarray:
        """Maps actions (..., action_dim) from [-1, 1], clipped to it, to the environment's box."""
        center, half = (self.action_high + self.action_low) / 2, (self.action_high - self.action_low) / 2
        return center + half * np.clip(action, -1.0, 1.0)

    def next_action(self) -> tuple[Tensor, Tensor]:
        """The action logged one step later (N, action_dim) and where there is one, (N,): not where episodes end."""
        return self.action.roll(-1, dims=0), ~self.episode_end

    def normalised_score(self, returns: float | np.ndarray) -> float | np.ndarray:
        """100 * (return - random) / (expert - random), for one return or an array; nan without reference scores."""
        low, high = self.ref_scores or (np.nan, np.nan)
        return 100.0 * (returns - low) / (high - low)

    def summary(self) -> str:
        """Three lines for the start of a log."""
        returns, num_unknown = self.episode_returns, int((~self.successor_known).sum())
        low, high = self.ref_scores or (np.nan, np.nan)
        return (
            f"{self.name}: {self.source}, environment {self.env_spec.id if self.env_spec else 'unknown'}\n"
            f"{len(returns):,} episodes, {len(self.obs):,} steps, {int(self.terminal.sum()):,} terminal "
            f"({num_unknown:,} without successor), obs {self.obs.shape[1]}, action {self.action.shape[1]}\n"
            f"behaviour return: min {returns.min():.1f}, mean {returns.mean():.1f}, max {returns.max():.1f}; "
            f"normalised mean {self.normalised_score(returns.mean()):.1f} (0 = {low:g}, 100 = {high:g})"
        )


def cache_dir() -> Path:
    """Folder of everything that can be made again: $OFFLINE_MBRL_CACHE, else offline-mbrl in the user's cache."""
    user_cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("OFFLINE_MBRL_CACHE") or Path(user_cache, "offline-mbrl")).expanduser()


def load_dataset(name: str, device: torch.device | str = "cpu", env_id: str | None = None) -> OfflineDataset:
    """Loads `name` and puts it on `device`.

    name: "pendulum/random-v0" (made at first use), else a path to an .hdf5, .h5 or .npz file with D4RL's keys, else
        the folder of a Minari dataset, else "d4rl/hopper-medium-v2" or another key of D4RL, else a Minari id; the last
        two are downloaded when they are not local. Dictionaries of vectors are flattened, keys in sorted order.
    env_id: environment to evaluate in and to take the action box from, as for gym.make; wins over the dataset's own.
    Raises InputError when the data cannot be found, read or used.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # where users keep the modules of their environments
    env_spec = obs_space = action_space = ref_scores = None
    if name == DEFAULT_DATASET:
        source, version, read = "uniformly random actions", f"{name}|{gym.__version__}", _random_pendulum
        env_spec, obs_space, action_space = make_spaces("Pendulum-v1")
    elif (path := _find(name)).is_dir():
        with _readable(path):
            minari_set = minari.MinariDataset(path)
            metadata = minari_set.storage.metadata
        source, version, read = f"Minari dataset in {path}", _version(path), lambda: _read_minari(minari_set, path)
        # the spaces stored with the data: no need to install the package that registers the environment
        env_spec, obs_space = _flattened(minari_set.env_spec, minari_set.observation_space)
        action_space = minari_set.action_space
        if metadata.get("ref_min_score") is not None and metadata.get("ref_max_score") is not None:
            ref_scores = metadata["ref_min_score"], metadata["ref_max_score"]
        _check_spaces(obs_space, action_space, name, check_bounds=env_id is None)
    else:
        source, version, read = str(path), _version(path), lambda: _read_flat(path)
        if name in D4RL:
            d4rl_env, kwargs = D4RL_ENVS[name.split("/")[1].split("-")[0]]
            env_spec = replace(gym.spec(d4rl_env), kwargs=kwargs)
    if env_id is not None:
        env_spec, obs_space, action_space = make_spaces(env_id)
    if env_spec is not None and env_spec.max_episode_steps is None:
        env_spec = replace(env_spec, max_episode_steps=MOST_STEPS)
    ref_scores = ref_scores or ref_scores_of(env_spec)
    arrays = _cached(version, lambda: _transitions(read(), source))
    obs, action = arrays["obs"], arrays["action"]
    for what, array, space in (("observations", obs, obs_space), ("actions", action, action_space)):
        if space is not None and space.shape != array.shape[1:]:
            counts = f"{name} has {what} of {array.shape[1]} numbers but {env_id} has {space.shape[0]}"
            raise InputError(f"{counts}: choose the environment that the data were recorded in (--env-id).")
    if action_space is None:  # nothing known about the environment: assume D4RL's convention
        action_space = gym.spaces.Box(-1.0, 1.0, (action.shape[1],))
    low, high = action_space.low.astype(np.float32), action_space.high.astype(np.float32)
    _scale_to_unit_box(action, low, high, name)
    data_hash = hashlib.blake2b(str(arrays["data_hash"]).encode() + low.tobytes() + high.tobytes(), digest_size=16)
    names = ("obs", "action", "reward", "next_obs", "terminal", "successor_known", "episode_end")
    return OfflineDataset(
        name=name, source=source, **{key: torch.from_numpy(arrays[key]).to(device) for key in names},
        episode_returns=arrays["episode_returns"], action_low=low, action_high=high,
        env_spec=env_spec, ref_scores=ref_scores, data_hash=data_hash.hexdigest(),
    )  # fmt: skip


# --- Where the data are ---
def _find(name: str) -> Path:
    """The file of flat arrays, or the data folder of a Minari dataset, that `name` stands for."""
    path = Path(name).expanduser()
    if path.suffix in (".hdf5", ".h5", ".npz") or path.is_file():
        if not path.is_file():
            raise InputError(f"There is no file {path.absolute()}: check the path given as --dataset.")
        if path.suffix not in (".hdf5", ".h5", ".npz"):
            raise InputError(f"{path} is neither .hdf5, .h5 nor .npz: convert it to one of them, with D4RL's keys.")
        return path
    for find in (lambda: path / "data", lambda: path, lambda: minari_folder() / name / "data"):
        if ((folder := find()) / "main_data.hdf5").exists() or (folder / "metadata.json").exists():
            return folder
    return d4rl_file(name) if name.startswith("d4rl/") else _download(name)


def minari_folder() -> Path:
    """Where Minari has its datasets; it is made."""
    try:
        return get_dataset_path()
    except OSError as error:
        hint = "set MINARI_DATASETS_PATH to a folder that can be written"
        raise InputError(f"Minari's folder cannot be made ({error}): {hint}") from None


@contextmanager
def minari_writes_to(folder: Path | str) -> Iterator[None]:
    """Its root is the only way to say where."""
    usual_root = os.environ.get("MINARI_DATASETS_PATH")
    os.environ["MINARI_DATASETS_PATH"] = str(folder)
    try:
        yield
    finally:
        os.environ.pop("MINARI_DATASETS_PATH")
        if usual_root is not None:
            os.environ["MINARI_DATASETS_PATH"] = usual_root


def _download(name: str) -> Path:
    """Downloads a Minari dataset; fails at once when its remote cannot be reached. Returns its data folder."""
    root = minari_folder()
    try:
        if os.environ.get("MINARI_REMOTE", "hf://").startswith("hf://"):
            # Minari retries for half a minute before it gives up: one short request, through the library's own
            # client (proxies, offline mode), tells first whether there is a network at all
            from huggingface_hub import constants
            from huggingface_hub.utils import get_session

            get_session().head(constants.ENDPOINT, timeout=5)
        # Minari lists no hidden folders: a download that is killed leaves nothing under the dataset's name
        lock, folder = (
            FileLock(root / ".downloading.lock"),
            tempfile.TemporaryDirectory(dir=root, prefix=".downloading-"),
        )
        with lock, folder as part:
            if not (root / name / "data").exists():  # else another process was faster
                with minari_writes_to(part):
                    minari.download_dataset(name)
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                os.rename(Path(part, name), root / name)
        return root / name / "data"
    except Exception as error:  # malformed or unknown id, no network, no space: the user needs the same hint
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
    found = sorted(str(file.parent.parent.relative_to(root)) for file in root.glob("**/data/metadata.json"))
    raise InputError(
        f"No dataset {name!r}: it is no data file, no folder of a Minari dataset, not among the local ones in {root} "
        f"({', '.join(n for n in found if not n.startswith('.')) or 'none'}), and its download failed ({reason}): "
        f"correct the name, or run `minari download {name}` where there is a network and copy the folder to "
        f"{root / name}, or set MINARI_DATASETS_PATH to where it lies."
    )


def _version(path: Path) -> str:
    """Another string when the file is another one, or was changed."""
    main_file = next((path / n for n in ("main_data.hdf5", "metadata.json") if (path / n).exists()), path).resolve()
    return f"{main_file}|{main_file.stat().st_size}|{main_file.stat().st_mtime_ns}"


def _cached(version: str, read: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """read(), which may take ten seconds, or its result from the cache, which loads in a fraction of one."""
    key = hashlib.blake2b(f"{version}|{CACHE_VERSION}".encode(), digest_size=16).hexdigest()
    cache_file = cache_dir() / "datasets" / f"{key}.npz"
    try:
        with np.load(cache_file) as cached:  # a zip file: every array carries a checksum
            return {name: cached[name] for name in cached.files}
    except Exception:  # absent, cut off or damaged in any way: it is only a cache, so make it again
        arrays = read()
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(arrays):
        digest.update(f"{name}{arrays[name].shape}".encode())
        digest.update(arrays[name].reshape(-1).view(np.uint8))
    arrays["data_hash"] = np.array(digest.hexdigest())
    try:
        cache_file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_file.parent) as folder:
            np.savez(Path(folder, "new.npz"), **arrays)
            os.replace(Path(folder, "new.npz"), cache_file)  # at once: a reader never sees half a file
    except OSError as error:
        print(f"note: the dataset is not cached ({error})", file=sys.stderr)
    return arrays


# --- Reading: n recorded rows under D4RL's keys, and episode_end, which marks the last row of each episode ---
def _random_pendulum() -> dict[str, np.ndarray]:
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


def _read_flat(path: Path) -> dict[str, np.ndarray]:
    keys = ("observations", "actions", "rewards", "terminals", "timeouts", "next_observations")
    with _readable(path), np.load(path) if path.suffix == ".npz" else h5py.File(path, "r") as file:
        missing = [key for key in keys[:4] if key not in file]
        if missing:
            raise InputError(f"{path} lacks {', '.join(missing)} (has {', '.join(file)}): write it with D4RL's keys.")
        rows = {key: _read_array(file[key], key, path) for key in keys if key in file}
    obs, next_obs = rows["observations"], rows.get("next_observations")
    for key, array in rows.items():
        if len(array) != len(obs):
            raise InputError(f"{path} has {len(obs)} observations but {len(array)} {key}: every row needs one of each.")
    if next_obs is not None and next_obs.shape != obs.shape:
        raise InputError(f"{path} has observations {obs.shape} but next_observations {next_obs.shape}: both must fit.")
    _check_finite(rows, path)
    rows["terminals"] = rows["terminals"] != 0
    rows["timeouts"] = rows["timeouts"] != 0 if "timeouts" in rows else np.zeros(len(obs), bool)
    # Where does an episode end? At the flags, but some files lack `timeouts` or do not set them everywhere. With
    # next_observations the other ends show: the successor is not the next row. Without them nothing else can tell.
    rows["episode_end"] = rows["terminals"] | rows["timeouts"]
    if next_obs is not None:
        rows["episode_end"][:-1] |= (next_obs[:-1] != obs[1:]).any(axis=1)
    elif not rows["timeouts"].any():
        print(f"note: {path} marks no time limits: only its terminals separate episodes", file=sys.stderr)
    return rows


def _read_array(stored: h5py.Dataset | np.ndarray, key: str, path: Path) -> np.ndarray:
    """Returns float32 (n, dim) for observations, actions and next_observations, (n,) for the others."""
    if key == "actions" and stored.dtype.kind != "f":
        raise InputError(f"{path} has actions of type {stored.dtype}: discrete actions are not supported, only floats.")
    is_vector = key in ("observations", "actions", "next_observations")
    if len(stored.shape) != 1 and not (len(stored.shape) == 2 and (is_vector or stored.shape[1] == 1)):
        raise InputError(f"{path} has {key} of shape {stored.shape}: expected {'(n, dim)' if is_vector else '(n,)'}.")
    array = np.empty(stored.shape, np.float32)
    if isinstance(stored, h5py.Dataset) and stored.dtype.kind == "f" and stored.size:
        stored.read_direct(array)  # HDF5 converts block by block: no float64 copy of the whole array
    else:
        array[...] = stored[...]
    return array.reshape(len(array), -1 if array.size else 1) if is_vector else array.reshape(-1)


def _read_minari(dataset: minari.MinariDataset, path: Path) -> dict[str, np.ndarray]:
    n, action_shape = dataset.total_steps, dataset.action_space.shape
    obs_shape = flatten_space(dataset.observation_space).shape
    rows = {key: np.empty((n, *obs_shape), np.float32) for key in ("observations", "next_observations")}
    rows |= {"actions": np.empty((n, *action_shape), np.float32), "rewards": np.empty(n, np.float32)}
    rows |= {key: np.zeros(n, bool) for key in ("terminals", "timeouts", "episode_end")}
    stop = 0
    with _readable(path):
        for episode in dataset:
            length, obs = len(episode.rewards), episode.observations
            if isinstance(obs, dict):
                obs = np.concatenate([obs[key] for key in sorted(obs)], axis=1)  # (length + 1, obs_dim)
            if len(obs) != length + 1:
                counts = f"{len(obs)} observations for {length} rewards, which should be one more"
                raise InputError(f"Episode {episode.id} in {path} has {counts}: get another version of it.")
            at, stop = slice(stop, stop + length), stop + length
            rows["observations"][at], rows["next_observations"][at] = obs[:-1], obs[1:]
            rows["actions"][at], rows["rewards"][at] = episode.actions, episode.rewards
            rows["terminals"][at], rows["timeouts"][at] = episode.terminations, episode.truncations
            rows["episode_end"][at][-1:] = True  # also of an incomplete episode, which has neither flag
    if stop != n:
        raise InputError(f"{path} promises {n} steps and holds {stop}: delete it and get it again.")
    _check_finite(rows, path)
    return rows


def _check_finite(rows: dict[str, np.ndarray], path: Path) -> None:
    for key, array in rows.items():
        finite = np.isfinite(array).reshape(len(array), -1).all(axis=1) if len(array) else np.ones(1)
        if not finite.all():
            raise InputError(f"{path} has NaN or infinite {key} in row {np.argmin(finite)}: remove that episode.")


def _transitions(rows: dict[str, np.ndarray], source: str) -> dict[str, np.ndarray]:
    """Returns the arrays of OfflineDataset, actions still in the environment's units."""
    obs, next_obs = rows["observations"], rows.get("next_observations")
    terminal, episode_end, n = rows["terminals"], rows["episode_end"], len(obs)
    if n == 0:
        raise InputError(f"{source} is empty: it has no rows.")
    episode_end[-1] = True
    episode = np.cumsum(episode_end) - episode_end  # (n,) index of each row's episode
    starts = np.flatnonzero(np.diff(episode, prepend=-1))
    known = keep = np.ones(n, bool)
    if next_obs is None:
        known = ~episode_end
        keep = known | terminal  # the others' successor is needed and was not recorded
        if not keep.any():
            raise InputError(f"{source} is empty: no row has a known successor; record next_observations.")
        next_obs = obs[(np.arange(n) + known)[keep]]  # where the successor is unknown: itself, as placeholder
    every_row = slice(None) if keep.all() else keep  # no copies when nothing is dropped
    return dict(
        obs=obs[every_row], action=rows["actions"][every_row], reward=rows["rewards"][every_row], next_obs=next_obs,
        terminal=terminal[keep].astype(np.float32), successor_known=known[keep],
        episode_end=np.diff(episode[keep], append=-1) != 0,
        episode_returns=np.add.reduceat(rows["rewards"], starts, dtype=np.float64),
    )  # fmt: skip


# --- Environments ---
def make_spaces(env_id: str) -> tuple[EnvSpec, gym.Space, gym.Space]:
    """Spec, observation space and action space of a registered environment, "Name-v0" or "package:Name-v0"."""
    try:
        module, _, registered_id = env_id.rpartition(":")
        if module:
            importlib.import_module(module)
        env_spec = gym.spec(registered_id)
        env = gym.make(env_spec)
    except Exception as error:  # unknown id, package not installed, version without an implementation
        raise InputError(f"Cannot make environment {env_id!r} ({error}): check the id given as --env-id.") from error
    env.close()
    env_spec, obs_space = _flattened(env_spec, env.observation_space)
    _check_spaces(obs_space, env.action_space, env_id)
    return env_spec, obs_space, env.action_space


def _flattened(env_spec: EnvSpec | None, obs_space: gym.Space) -> tuple[EnvSpec | None, gym.Space]:
    """Where observations are dictionaries of float vectors: the flat space, and the spec of an environment with it."""
    spaces = obs_space.spaces if isinstance(obs_space, gym.spaces.Dict) else {}
    floats = [isinstance(s, gym.spaces.Box) and len(s.shape) == 1 and s.dtype.kind == "f" for s in spaces.values()]
    if not spaces or not all(floats):
        return env_spec, obs_space
    if env_spec is not None:
        # Minari stores a space with its keys sorted; the environment's own may be in another order
        in_order = gym.wrappers.FilterObservation.wrapper_spec(filter_keys=sorted(spaces))
        wrappers = (*env_spec.additional_wrappers, in_order, gym.wrappers.FlattenObservation.wrapper_spec())
        env_spec = replace(env_spec, additional_wrappers=wrappers)
    return env_spec, flatten_space(gym.spaces.Dict(dict(sorted(spaces.items()))))


def _check_spaces(obs_space: gym.Space, action_space: gym.Space, name: str, check_bounds: bool = True) -> None:
    for what, space in (("observations", obs_space), ("actions", action_space)):
        if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
            kinds = "only vectors, as observations also dictionaries of float vectors, but not discrete or image"
            raise InputError(f"{name} has {what} in {space}: {kinds}.")
    if check_bounds and not (action_space.is_bounded() and (action_space.low < action_space.high).all()):
        raise InputError(f"{name} has actions in {action_space}: give an environment with finite bounds by --env-id.")


def ref_scores_of(env_spec: EnvSpec | None) -> tuple[float, float] | None:
    """(random, expert), where they are known."""
    return REF_SCORES.get(env_spec.name) if env_spec is not None and env_spec.namespace is None else None


def _scale_to_unit_box(action: np.ndarray, low: np.ndarray, high: np.ndarray, name: str) -> None:
    """Scales action (n, action_dim) from its box to [-1, 1] in place; says on stderr how many had to be clipped."""
    action -= (high + low) / 2
    action /= (high - low) / 2
    num_outside = int((np.abs(action) > 1.0 + 1e-5).any(axis=1).sum())  # not those that rounding put there
    if num_outside:
        counts = f"{num_outside:,} of {len(action):,}"
        print(f"warning: {counts} actions in {name} lie outside the box and were clipped to it", file=sys.stderr)
    np.clip(action, -1.0, 1.0, out=action)
