"""Damaged data files and planted code, for endurance.py."""

import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np

from common import InputError
from common.dataset import load_dataset

ROOT = Path(__file__).resolve().parents[2]
JUNK = [None, [], {}, "", "word", -1, 0, 2.5, 2**70, float("inf"), True, [1, "a"], {"a": []}, "9" * 400, "a\nb"]
PLANTED = """
import os, gymnasium
open(os.environ["CANARY"], "w")
def ends(obs, action, next_obs): return next_obs[:, 0] > 2
def make(**kwargs): return gymnasium.make("Pendulum-v1").unwrapped
gymnasium.register("Planted-v0", make)
"""


# --- Damaged data: what was tried, and what was wrong with it, or "" ---
def record(folder: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """Some episodes of Pendulum as a Minari dataset, whose folder is returned, and as arrays."""
    os.environ |= {"MINARI_DATASETS_PATH": str(folder), "OFFLINE_MBRL_CACHE": str(folder / "cache")}
    wanted = ["--env-id", "Pendulum-v1", "--dataset-id", "planted/pendulum-v0", "--num-steps", "500"]
    subprocess.run([sys.executable, str(ROOT / "benchmarks/collect.py"), *wanted], check=True, capture_output=True)
    data = load_dataset(str(folder / "planted/pendulum-v0"))
    rows = dict(observations=data.obs, actions=data.action, rewards=data.reward, next_observations=data.next_obs)
    rows |= dict(terminals=data.terminal, timeouts=data.episode_end)
    return folder / "planted/pendulum-v0", {name: x.numpy() for name, x in rows.items()}


def damaged_bytes(blob: bytes, rng: random.Random) -> bytes:
    at, size = rng.randrange(len(blob)), rng.choice((1, 16, 4096))
    other = rng.choice((b"", bytes(size), rng.randbytes(size), blob[at : at + size] * 2))
    return blob[:at] + other + blob[at + size :] if rng.random() < 0.8 else blob[:at]


def damaged_rows(rows: dict[str, np.ndarray], rng: random.Random) -> dict[str, np.ndarray]:
    name, seed = rng.choice(list(rows)), rng.randrange(2**32)
    x, chance = rows[name], np.random.default_rng(seed).random(rows[name].shape)
    others = [
        x[:-1],
        x[:0],
        x.T,
        x[..., None],
        x.ravel(),
        x * 0,
        x[::-1],
        x[:1].repeat(len(x), 0),
        np.float64(x) * 1e38,
    ]
    others += [np.where(chance < 0.01, value, x) for value in (np.nan, np.inf, 1e9)]
    others += [x.astype(dtype) for dtype in ("f2", "f8", "i1", "?", "c8", "S9", "O")] + [np.float32(chance)]
    return {**rows, name: rng.choice(others)} if rng.random() < 0.9 else {k: v for k, v in rows.items() if k != name}


def damaged_json(value, rng: random.Random):
    if isinstance(value, str) and value[:1] == "{" and rng.random() < 0.8:
        return json.dumps(damaged_json(json.loads(value), rng))
    if not isinstance(value, dict) or not value or rng.random() < 0.1:
        return rng.choice(JUNK)
    key = rng.choice(list(value))
    rest = {k: v for k, v in value.items() if k != key}
    return rest if rng.random() < 0.2 else rest | {key: damaged_json(value[key], rng)}


def mutant(folder: Path, minari_set: Path, rows: dict[str, np.ndarray], rng: random.Random) -> tuple[str, Path]:
    """What it is, and where."""
    kind, in_words = rng.choice(("npz", "hdf5", "Minari")), rng.random() < 0.5
    path, changed = folder / f"mutant.{kind}", damaged_rows(rows, rng) if in_words else rows
    if kind == "npz":
        np.savez(path, **changed)
    elif kind == "hdf5":
        with h5py.File(path, "w") as opened:
            for key, x in changed.items():
                opened[key] = x.astype("S9") if x.dtype == object else x
    else:
        shutil.copytree(minari_set, path)
    file = path / "data" / ("metadata.json" if in_words else "main_data.hdf5") if kind == "Minari" else path
    if not in_words:
        file.write_bytes(damaged_bytes(file.read_bytes(), rng))
    elif kind == "Minari":
        file.write_text(json.dumps(damaged_json(json.loads(file.read_text()), rng)))
    return f"mutants, {kind}, {'content' if in_words else 'bytes'}", path


def loads(path: Path, log: Path) -> str:
    """What is wrong with how it loads, in a process of its own: a damaged file may crash a library."""
    if (child := os.fork()) == 0:
        signal.alarm(60)
        sys.stdout = sys.stderr = open(os.devnull, "w")
        wrong = ""
        try:
            data = load_dataset(str(path))
            if not all(x.isfinite().all() for x in (data.obs, data.action, data.reward, data.next_obs)):
                wrong = "loads numbers that are not finite"
        except InputError as error:
            wrong = "says more than one sentence" if "\n" in str(error) else ""
        except BaseException as error:
            wrong = f"{error!r:.200} in {traceback.extract_tb(error.__traceback__)[-1].name}"
        log.write_text(wrong)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    return log.read_text() if status == 0 else f"ends with signal {status & 127}"


def mutants(work: Path, number: int, rng: random.Random) -> Iterator[tuple[str, str, str]]:
    work.mkdir()
    minari_set, rows = record(work)
    for i in range(number):
        folder = work / "now"
        folder.mkdir()
        os.environ["OFFLINE_MBRL_CACHE"] = str(folder / "cache")
        kind, path = mutant(folder, minari_set, rows, rng)
        yield kind, "", loads(path, work / "wrong")
        shutil.rmtree(folder)


# --- Planted code ---
class Bomb:
    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


def planted(work: Path) -> Iterator[tuple[str, str, str]]:
    work.mkdir()
    (work / "planted.py").write_text(PLANTED)
    canary, (minari_set, _) = work / "canary", record(work)
    cache = {"OFFLINE_MBRL_CACHE": str(work / "cache"), "MINARI_DATASETS_PATH": str(work)}
    for command, may_run, what in commands(work, minari_set, canary):
        env = os.environ | cache | {"CANARY": str(canary)}
        said = subprocess.run(command, env=env, cwd=work, capture_output=True, text=True)
        wrong = [f"code has {'' if canary.exists() else 'not '}run"] if canary.exists() != may_run else []
        wrong += ["a traceback"] if "Traceback" in said.stderr or said.returncode not in (0, 1) else []
        canary.unlink(missing_ok=True)
        yield f"planted, {'allowed' if may_run else 'not allowed'}", what, "; ".join(wrong)


def commands(work: Path, minari_set: Path, canary: Path) -> Iterator[tuple[list[str], bool, str]]:
    """Command, whether code of others may run, and what it is about."""
    python, few = sys.executable, ["--num-updates", "5", "--no-compile", "--dynamics-max-epochs", "1"]
    mopo = [python, str(ROOT / "algos/mopo.py"), *few, "--rollout-batch-size", "50", "--run-dir", str(work)]
    metadata, wrapper = json.loads((minari_set / "data/metadata.json").read_text()), {"name": "x", "kwargs": {}}
    sets = [{"env_spec": json.loads(metadata["env_spec"]) | change} for change in (
        {"entry_point": "planted:make"}, {"vector_entry_point": "planted:make"}, {"id": "planted:Planted-v0"},
        {"id": "Planted-v0", "entry_point": "planted:make"}, {"kwargs": {"env": "planted:Planted-v0"}},
        {"entry_point": "os:system", "kwargs": {"command": f"touch {canary}"}},
        {"additional_wrappers": [wrapper | {"entry_point": "planted:make"}]},
    )]  # fmt: skip
    sets += [{"observation_space": {"type": "planted:make"}}, {"observation_space": "__import__('planted')"}]
    for i, change in enumerate(sets):
        shutil.copytree(minari_set, folder := work / f"set-{i}")
        texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in change.items()}
        (folder / "data/metadata.json").write_text(json.dumps(metadata | texts))
        yield [*mopo, "--dataset", str(folder)], False, f"dataset with {change}"
    yield [*mopo, "--dataset", str(work / "set-0"), "--trust"], True, "dataset"
    np.savez(work / "bomb.npz", observations=np.array([Bomb(canary)], dtype=object))
    yield [*mopo, "--dataset", str(work / "bomb.npz")], False, "pickled array"
    yield [*mopo, "--dataset", str(minari_set), "--run-name", "run"], False, "nothing"
    for change in ({"env_id": "planted:Planted-v0"}, {"termination": "planted:ends"}, {"run_name": "pickled"}):
        shutil.copytree(work / "run", folder := work / f"run-{next(iter(change))}")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"args": config["args"] | change}))
        for name in ("checkpoint.pt", "policy.pt") if "run_name" in change else ():
            (folder / name).write_bytes(pickle.dumps(Bomb(canary)))
        resume, out = [*mopo[:2], "--resume", str(folder)], str(work / "report")
        yield resume, False, f"run folder with {change}"
        yield [python, str(ROOT / "benchmarks/displace.py"), str(folder)], False, f"displace.py, {change}"
        report = [python, str(ROOT / "benchmarks/report.py"), str(folder), "--out-dir", out]
        yield report, False, f"report.py, {change}"
        if "run_name" not in change:
            yield [*resume, "--trust"], True, f"run folder with {change}"
    for part in ("algos", "common"):
        shutil.copytree(ROOT / part, work / f"$(touch {canary.name})" / part)
    yield [python, f"$(touch {canary.name})/algos/mopo.py", *mopo[2:]], False, "name of the checkout's folder"
