"""A policy for a machine without torch: a folder with a finished run's policy as ONNX and in plain NumPy.

    policy.onnx              obs (batch, obs_dim), float64, as the environment shows it -> action (batch, action_dim) in
                             its box
    policy.npz, policy.py    the same weights, and fifty lines of NumPy that act with them
    alarm.onnx, alarm.npz    with --alarm (benchmarks/export_alarm.py): obs, action -> disagreement, alarm (batch,) each
    export.json              differences, sizes, latency and shares of alarms, as measured by this command

What the run rescaled and the action box are inside; a policy that ranks candidates by its critic takes that along. Both
forms act like the script's policy on 10,000 states, or nothing is left but a sentence.
Run: python benchmarks/export.py runs/my-run
     python benchmarks/export.py runs/my-run --alarm --out robot/
"""

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks import export_forms, exported  # noqa: E402
from benchmarks.export_alarm import Alarm, fitted  # noqa: E402
from benchmarks.export_forms import CRITICS, Policy, alarm_arrays, alarm_onnx, policy_arrays, policy_onnx  # noqa: E402
from benchmarks.files import HomePaths, start, write_text  # noqa: E402
from benchmarks.film import check_trust  # noqa: E402
from common import InputError  # noqa: E402
from common.dataset import OfflineDataset, load_dataset, minari_folder  # noqa: E402
from common.evaluation import load_policy  # noqa: E402

STATES, TOLERANCE = 10_000, 1e-5  # in half widths of the action box
ALARM_TOLERANCE = 1e-3  # of a disagreement, which is a difference of near numbers
TIES = 0.01  # of the states, at most, in which float32 cannot tell which of two candidates is better


@dataclass
class Args(HomePaths):
    run: tyro.conf.Positional[Path]  # folder of a finished run of any script
    out: Path | None = None  # a new folder; by default export/ in the run's
    alarm: bool = False  # the ensemble of the run's data, from the cache or fitted anew, tells what is off the log
    false_alarms: float = 0.001  # share of the logged rows at which there is an alarm
    dynamics: str = ""  # for --alarm, file of an ensemble fitted to these data, which counts instead
    trust: bool = False  # import the modules that the run's folder or its data name: code of whoever made them


# --- Is it the same, and how fast? ---
def some_states(units: dict, data: OfflineDataset | None) -> np.ndarray:
    """(STATES, obs_dim), float64, as the environment shows them: recorded ones, or around what is usual."""
    rng = np.random.default_rng(0)
    if data is not None:
        return data.raw_obs(data.obs[torch.from_numpy(rng.integers(len(data.obs), size=STATES))]).double().numpy()
    seen = units["obs_mean"] + 2 * units["obs_std"] * rng.normal(size=(STATES, len(units["obs_mean"])))
    return seen * units["obs_scale"] + units["obs_shift"]


def in_chunks(function: Callable, *arrays: np.ndarray) -> np.ndarray:
    return np.concatenate([np.asarray(function(*part)) for part in zip(*(np.split(x, 20) for x in arrays))])


@torch.no_grad()
def differs(form: str, policy: Policy, obs: np.ndarray, wanted: np.ndarray, action: np.ndarray) -> dict:
    """By how much at most, and the share of ties. Raises InputError where that is more than rounding."""
    wanted, action = policy.unit_action(wanted), policy.unit_action(action)
    off = (action - wanted).abs().amax(dim=1)
    tie = torch.zeros_like(off, dtype=torch.bool)
    if num := CRITICS.get(policy.kind):
        x = policy.networks_see(obs)
        q, q_wanted = (policy.actor.critic(x, a)[:num].amin(dim=0) for a in (action, wanted))
        tie = (off > TOLERANCE) & torch.isclose(q, q_wanted, rtol=TOLERANCE, atol=TOLERANCE)
    most, ties = off.masked_fill(tie, 0).amax().item(), tie.float().mean().item()
    if not (most <= TOLERANCE and ties <= TIES):
        why = f"acts differently, by {most:.2g} of the box' half width ({ties:.1%} of its choices are ties)"
        raise InputError(f"{form} {why}, so nothing is exported: is the script still that of the run?")
    return {"difference": most, "ties": ties}


def microseconds(call: Callable, *arrays: np.ndarray) -> float:
    """The median of 2,000 calls with one row."""
    taken = []
    for row in zip(*(x[:2_200] for x in arrays)):
        begin = time.perf_counter()
        call(*row)
        taken.append(time.perf_counter() - begin)
    return 1e6 * float(np.median(taken[200:]))


# --- The command ---
def data_of(args: Args, config: dict) -> OfflineDataset | None:
    """The run's data; without --alarm None where they are no longer there, for a check is not worth a download."""
    settings = config["args"]
    places = Path(config["data"].removeprefix("Minari dataset in ")), minari_folder() / settings["dataset"]
    check_trust(args.run, (settings["env_id"],), args.trust)
    if not args.alarm and not any(map(Path.exists, places)) and config["data"] != "uniformly random actions":
        return None
    try:
        standardise = settings.get("standardise_obs", False)
        data = load_dataset(settings["dataset"], "cpu", settings["env_id"] or None, standardise, args.trust)
    except InputError as error:
        if args.alarm:
            raise
        print(f"states      not the recorded ones: {error}")
        return None
    if data.data_hash != config["data_hash"] and args.alarm:
        raise InputError(f"{settings['dataset']} has changed since that run: an alarm needs the log as it was")
    return data


def export(args: Args, saved: dict, folder: Path) -> dict:
    """Writes all files into `folder`, checks them there, and returns what was measured."""
    config, policy, act = json.loads(saved["config"]), Policy(saved), load_policy(args.run)
    data, weights = data_of(args, config), policy_arrays(policy)
    obs = some_states(weights, data)
    wanted = in_chunks(act, obs)
    found = {"processor": torch.cpu.get_capabilities()["cpu_name"], "states": "drawn" if data is None else "recorded"}
    times = found["microseconds"] = {"torch": microseconds(act, obs)}

    shutil.copy(exported.__file__, folder / "policy.py")
    np.savez(folder / "policy.npz", **weights)
    in_numpy = exported.Policy(folder)
    found["policy.npz"] = differs("policy.npz", policy, obs, wanted, in_chunks(in_numpy, obs))
    times["NumPy"] = microseconds(in_numpy, obs)
    if export_forms.onnx:
        session = policy_onnx(folder / "policy.onnx", weights)
        found["policy.onnx"] = differs("policy.onnx", policy, obs, wanted, in_chunks(lambda x: session(x)[0], obs))
        times["onnxruntime"] = microseconds(session, obs[:, None])
    if args.alarm:
        settings = config["args"] | ({"dynamics": args.dynamics} if args.dynamics else {})
        alarm, found["alarms"] = fitted(settings, data, args.false_alarms)
        times |= export_alarm(alarm, policy, weights, folder, obs, wanted)
    return found


def export_alarm(
    alarm: Alarm, policy: Policy, weights: dict, folder: Path, obs: np.ndarray, action: np.ndarray
) -> dict:
    """Writes and checks it as well. Returns its latencies."""
    weights = weights | alarm_arrays(alarm)
    np.savez(
        folder / "alarm.npz", **{name: weights[name] for name in weights.keys() - np.load(folder / "policy.npz").keys()}
    )
    in_numpy = exported.Policy(folder)
    says, times = {"alarm.npz": in_numpy.disagreement}, {"NumPy, alarm": microseconds(in_numpy.alarm, obs, action)}
    if export_forms.onnx:
        session = alarm_onnx(folder / "alarm.onnx", weights)
        says["alarm.onnx"] = lambda *rows: session(*rows)[0]
        times["onnxruntime, alarm"] = microseconds(session, obs[:, None], action[:, None])
    in_torch = lambda x, a: alarm.disagreement(policy.networks_see(x), policy.unit_action(a))  # noqa: E731
    wanted = in_chunks(in_torch, obs, action)
    for form, disagreement in says.items():
        off = np.abs(in_chunks(disagreement, obs, action) / wanted - 1).max()
        if not off <= ALARM_TOLERANCE:
            raise InputError(f"{form} differs from the ensemble, by {off:.2g} of its disagreement: nothing is exported")
    return times


def main(args: Args) -> None:
    if not 0 < args.false_alarms < 1:
        raise InputError(f"--false-alarms must lie between 0 and 1, not {args.false_alarms}")
    torch.set_num_threads(1)
    load_policy(args.run)  # says what is wrong with it
    saved = torch.load(args.run / "policy.pt", map_location="cpu", weights_only=True)
    out = args.out or args.run / "export"
    if out.exists():
        raise InputError(f"{out} is there already: delete it, or name another folder by --out")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=".export-") as part:
            (folder := Path(part, out.name)).mkdir()
            found = export(args, saved, folder)
            found["bytes"] = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
            write_text(folder / "export.json", json.dumps(found, indent=1))
            folder.rename(out)
    except OSError as error:
        raise InputError(f"cannot write to {out} ({error.strerror}): choose another folder by --out") from None
    for name, size in found["bytes"].items():
        check = "".join(f", {key} {value:.1g}" for key, value in found.get(name, {}).items())
        print(f"{name:<11} {size:,} bytes{check}")
    if "policy.onnx" not in found:
        print("policy.onnx none: pip install -r requirements-tools.txt")
    for name, time_taken in found["microseconds"].items():
        print(f"latency     {time_taken:,.0f} us an action, {name}")
    for place, share in found.get("alarms", {}).items():
        print(f"alarms      {share:.1%} {place}")
    print(f"export      {out}")


if __name__ == "__main__":
    start(main, Args)
