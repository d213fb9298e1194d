"""A run from the command line: what it leaves, how it goes on after a kill, and what it says to bad input."""

import csv
import importlib
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch
import torch._inductor.config
from filelock import FileLock
from gymnasium.envs.classic_control.pendulum import PendulumEnv
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch._inductor.utils import fresh_cache

import algos.bc as bc
import algos.mopo as mopo
import common.run
from common import InputError, machine
from common.dataset import load_dataset
from common.evaluation import evaluate, load_policy, make_env
from common.run import read_args

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(path.stem for path in (ROOT / "algos").glob("*.py"))
TINY = {
    "num-threads": 1, "num-updates": 40, "eval-interval": 20, "eval-episodes": 2, "checkpoint-interval": 10,
    "rollout-batch-size": 100, "rollout-interval": 15, "batch-size": 32, "dynamics-max-epochs": 1,
    "num-trajectories": 4, "horizon": 10, "pessimistic-episodes": 4, "cg-iterations": 3, "clone-epochs": 1,
    "behaviour-updates": 20, "inverse-updates": 20, "transition-updates": 20, "policy-share": 0.5,
    "warm-start-updates": 10, "real-ratio-interval": 5, "num-bootstrap": 2, "hidden-sizes": "16 16",
    "dynamics-hidden-size": 16,
}  # fmt: skip
MODULES = {script: importlib.import_module(f"algos.{script}") for script in SCRIPTS}
every_script = pytest.mark.parametrize("script", SCRIPTS)  # other tests run mopo.py, for the plumbing is the same text
TRAIN_A_POLICY = [script for script in SCRIPTS if script != "fqe"]


def tiny(script: str) -> list[str]:
    """The flags of a tiny run, without those that a script lacks."""
    known = importlib.import_module(f"algos.{script}").Args.__dataclass_fields__
    words = [[f"--{flag}", *str(value).split()] for flag, value in TINY.items() if flag.replace("-", "_") in known]
    return ["--no-compile", *(word for setting in words for word in setting)]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Where datasets and ensembles are kept: shared, so that the ensemble is fitted once for all tests."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def run(home, tmp_path, monkeypatch):
    """Calls a script in this process, with a tiny run's flags and then the given ones; returns the run's folder."""
    monkeypatch.setenv("OFFLINE_MBRL_CACHE", str(home / "cache"))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(home / "minari"))
    (home / "minari").mkdir(exist_ok=True)

    def call(*flags: str, script: str = "mopo") -> Path:
        resumes = "--resume" in flags
        names = [] if resumes or "--run-name" in flags else ["--run-name", "run"]
        argv = [*([] if resumes else tiny(script)), "--run-dir", str(tmp_path), *names, *flags]
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *argv])
        module = importlib.import_module(f"algos.{script}")
        module.main(read_args(module.Args, module.TUNED))
        return tmp_path / "run"

    call.folder = tmp_path / "run"
    return call


def command(home: Path, *flags: str, script: str = "mopo", **kwargs) -> subprocess.Popen:
    env = os.environ | {"OFFLINE_MBRL_CACHE": str(home / "cache"), "MINARI_DATASETS_PATH": str(home / "minari")}
    (home / "minari").mkdir(exist_ok=True)
    argv = [sys.executable, str(ROOT / "algos" / f"{script}.py"), *tiny(script), *flags]
    return subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kwargs)


def tensors(value, prefix: str = "") -> dict[str, torch.Tensor]:
    """All tensors of a nested dictionary by their path."""
    if isinstance(value, torch.Tensor | int):
        return {prefix: torch.as_tensor(value)}
    return {k: v for key in value for k, v in tensors(value[key], f"{prefix}/{key}").items()} if value else {}


def assert_same_checkpoint(one: Path, other: Path) -> None:
    a, b = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (one, other))
    assert a["progress"]["update"] == b["progress"]["update"]
    for name in ("modules", "rng"):
        first, second = (tensors(state[name]) for state in (a, b))
        assert first and first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first), name


def progress(folder: Path) -> list[dict]:
    with open(folder / "progress.csv", newline="") as file:
        return list(csv.DictReader(file))


# --- What a run leaves ---
@pytest.mark.parametrize("script", TRAIN_A_POLICY)
def test_a_run_leaves_config_curves_checkpoint_and_policy(script, run, capsys):
    folder = run(script=script)
    out = capsys.readouterr().out
    assert out.splitlines()[-1].startswith("curves") and "tensorboard --logdir" in out
    config = json.loads((folder / "config.json").read_text())
    assert config["args"]["num_updates"] == 40 and config["algo"] == script and config["versions"]["torch"]
    rows = progress(folder)
    assert [int(row["update"]) for row in rows] == [20, 40]
    assert all(-2000 < float(row["return_mean"]) < 0 for row in rows)
    assert float(rows[0]["normalised_score"]) == pytest.approx((float(rows[0]["return_mean"]) + 1230) / 1080 * 100)
    events = EventAccumulator(str(folder)).Reload()
    own = {
        "mopo": {"critic_loss", "actor_loss", "q", "alpha", "penalty_mean", "penalty_max", "model_buffer_size"},
        "mobile": {"critic_loss", "actor_loss", "q", "alpha", "inconsistency", "model_buffer_size"},
        "combo": {"critic_loss", "actor_loss", "q", "alpha", "conservative_gap", "model_buffer_size"},
        "morel": {"critic_loss", "q", "alpha", "halt_rate", "rollout_mean", "pessimistic_return", "model_buffer_size"},
        "morel_npg": {"halt_rate", "rollout_mean", "pessimistic_return", "explained_variance", "kl"},
        "cql": {"critic_loss", "actor_loss", "q", "alpha", "conservative_gap"},
        "td3_bc": {"critic_loss", "actor_loss", "q", "bc_loss"},
        "bc": {"actor_loss"},
        "sac_bc": {"critic_loss", "actor_loss", "q", "alpha", "kl"},
        "osr": {"critic_loss", "actor_loss", "q", "alpha", "constraint", "conservative_gap"},
        "osr_v": {"critic_loss", "actor_loss", "q", "alpha", "conservative_gap"},
        "sdc": {"critic_loss", "actor_loss", "q", "alpha", "constraint", "kappa", "conservative_gap"},
        "sdm_gan": {"critic_loss", "generator_loss", "discriminator_loss", "real_accuracy", "fake_accuracy", "q"},
        "onestep": {"critic_loss", "actor_loss", "q", "kl"},
        "iql": {"critic_loss", "actor_loss", "value_loss", "q", "v", "log_prob", "weight"},
    }
    own = own.get(script, set()) | {"return_mean", "normalised_score", "updates_per_second"}
    assert own <= set(rows[0]) == set(events.Tags()["scalars"])
    one_at_a_time = {"critic_loss", "actor_loss"} if script == "onestep" else set()
    known = [float(value) for row in rows for name, value in row.items() if name not in one_at_a_time]
    assert all(math.isfinite(value) for value in known)
    assert [e.step for e in events.Scalars("return_mean")] == [20, 40]
    policy = torch.load(folder / "policy.pt", weights_only=True)
    if "obs_mean" in policy["actor"]:  # a policy that standardises
        torch.testing.assert_close(policy["actor"]["obs_mean"], load_dataset("pendulum/random-v0").obs.mean(dim=0))
    assert policy["action_high"].item() == 2.0 and json.loads(policy["config"])["algo"] == script


def test_the_first_line_names_the_folder_and_settings_say_where_they_come_from(run, capsys):
    folder = run("--penalty-coef", "0.25", "--alpha-lr", "1e-4")
    out = capsys.readouterr().out.splitlines()
    assert "setting     --penalty-coef 0.25 (command line)" in out
    assert "setting     --alpha-lr 0.0001 (command line)" in out  # the script's default, but not TUNED's
    assert "setting     --score-evals 3 (TUNED for this dataset)" in out
    assert f"run         {folder}" == next(line for line in out if not line.startswith("setting"))


@pytest.mark.parametrize(
    "script, flags",
    [(script, ()) for script in TRAIN_A_POLICY]
    + [("sdm_gan", ("--num-candidates", "3")), ("onestep", ("--improvement", "easy-bcq"))],
)
def test_load_policy_gives_the_policy_that_was_evaluated_in_the_environments_box(run, monkeypatch, script, flags):
    seen = []
    monkeypatch.setattr(common.run, "evaluate", lambda policy, *rest: seen.append(policy) or evaluate(policy, *rest))
    folder = run(*flags, script=script)
    obs, data = np.random.default_rng(0).normal(size=(5, 7, 3)), load_dataset("pendulum/random-v0")
    with torch.no_grad():
        wanted = seen[-1].act(torch.tensor(obs, dtype=torch.float32).flatten(0, 1)).numpy()
    recipe = re.search(r"```python\n(from common.evaluation.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    exec(recipe.replace("runs/my-run", str(folder)), found := {"obs": obs})
    action = found["action"]
    np.testing.assert_allclose(action.reshape(-1, 1), data.to_env_action(wanted), rtol=1e-6)
    np.testing.assert_allclose(load_policy(folder)(obs[0, 0]), action[0, 0], atol=1e-5)  # one state


def test_candidates_at_evaluation_change_nothing_in_training(run):
    run(script="sdm_gan")
    run("--num-candidates", "3", "--run-name", "ranked", script="sdm_gan")
    plain, ranked = (
        torch.load(run.folder.with_name(name) / "policy.pt", weights_only=True)["actor"] for name in ("run", "ranked")
    )
    assert all(torch.equal(ranked[f"actor.{name}"], value) for name, value in plain.items())


def test_no_policy_is_loaded_from_a_folder_without_a_finished_run(tmp_path):
    with pytest.raises(InputError, match="holds no policy"):
        load_policy(tmp_path)


@pytest.mark.parametrize("algo, kind", [("os", "system"), ("mopo", "Path"), ("mopo", "no_such"), (None, "Actor")])
def test_no_policy_imports_a_module_that_is_no_script_here(algo, kind, run):
    saved = torch.load(file := run() / "policy.pt", weights_only=True)
    torch.save(saved | {"class": kind, "config": json.dumps({"algo": algo})}, file)
    with pytest.raises(InputError, match="holds no policy of a script in algos/|trained no policy"):
        load_policy(run.folder)


def test_networks_without_a_hidden_layer_can_be_asked_for(monkeypatch):
    monkeypatch.setattr("sys.argv", ["bc.py", "--hidden-sizes"])
    assert read_args(bc.Args, bc.TUNED).hidden_sizes == ()


def test_a_file_with_d4rls_name_gets_the_settings_of_its_set_and_flags_come_first(monkeypatch):
    def settings(*flags: str) -> tuple[float, int]:
        monkeypatch.setattr("sys.argv", ["mopo.py", *flags])
        args = read_args(mopo.Args, mopo.TUNED)
        return args.penalty_coef, args.rollout_length

    path = ("--dataset", "somewhere/hopper_medium-v2.hdf5")
    assert settings(*path) == (5.0, 5) and settings(*path, "--penalty-coef", "3") == (3.0, 5)
    assert settings("--dataset", "somewhere/walker2d_medium_replay-v2.hdf5") == (2.5, 1)
    assert settings("--dataset", "hopper/medium-v0") == settings("--dataset", "d4rl/hopper-medium-v2") == (5.0, 5)


@pytest.mark.parametrize("script", SCRIPTS)
def test_other_data_have_the_benchs_settings_and_the_papers_are_one_flag_away(script, monkeypatch, capsys):
    module = importlib.import_module(f"algos.{script}")

    def settings(*flags: str) -> dict:
        monkeypatch.setattr("sys.argv", [f"{script}.py", *flags])
        return asdict(read_args(module.Args, module.TUNED))

    other = settings("--dataset", "mine.npz")
    out = capsys.readouterr().out
    if script != "morel_npg":  # is not in the bench
        assert other["hidden_sizes"] == (64, 64) and other["num_updates"] == 120_000
        assert "preset      small" in out and "--num-updates 120000 (TUNED for other data)" in out
        flag = settings("--dataset", "mine.npz", "--num-updates", "7")
        assert flag["num_updates"] == 7 and flag["hidden_sizes"] == (64, 64)
    for name in ("mine.npz", "pendulum/random-v0"):
        paper = settings("--dataset", name, "--preset", "paper")
        assert paper == asdict(module.Args()) | {"dataset": name, "preset": "paper"}
    capsys.readouterr()
    d4rl = settings("--dataset", "d4rl/hopper-medium-v2")
    assert "preset" not in capsys.readouterr().out and d4rl["hidden_sizes"] == module.Args.hidden_sizes
    assert settings("--dataset", "d4rl/hopper-medium-v2", "--preset", "paper") == d4rl | {"preset": "paper"}


def test_the_score_is_the_mean_of_the_last_evaluations_not_the_best(run, capsys):
    folder = run("--eval-interval", "10", "--score-evals", "2")
    returns = [float(row["return_mean"]) for row in progress(folder)]
    assert f"score       {np.mean(returns[-2:]):.1f} " in capsys.readouterr().out


@pytest.mark.parametrize("script", ["mopo", "morel", "morel_npg"])  # which evaluate in the pessimistic MDP, too
def test_evaluating_more_often_changes_nothing_else(script, run, tmp_path):
    run("--run-name", "often", "--eval-interval", "5", script=script)
    run("--run-name", "rarely", "--eval-interval", "40", script=script)
    assert_same_checkpoint(tmp_path / "often", tmp_path / "rarely")
    assert progress(tmp_path / "often")[-1]["return_mean"] == progress(tmp_path / "rarely")[-1]["return_mean"]


def spied(module, monkeypatch, name: str) -> tuple[list[list[torch.Tensor]], list]:
    """Records the tensors that `name` is called with, and what it returns; the first argument is left out."""
    inputs, outputs, function = [], [], getattr(module, name)

    def spy(*given, **settings):
        inputs.append([x.clone() for x in given[1:] if isinstance(x, torch.Tensor) and x.is_floating_point()])
        outputs.append(function(*given, **settings))
        return outputs[-1]

    monkeypatch.setattr(module, name, spy)
    return inputs, outputs


@pytest.mark.parametrize("script", [script for script in SCRIPTS if hasattr(MODULES[script], "draw_noise")])
def test_noise_is_normal_and_new_but_for_what_is_uniform(script, run, monkeypatch):
    noises, draw = [], MODULES[script].draw_noise
    monkeypatch.setattr(MODULES[script], "draw_noise", lambda *given: noises.append(draw(*given)) or noises[-1])
    run(script=script)
    for name in noises[0]:
        noise = torch.stack([noise[name] for noise in noises])  # (40, ...)
        assert len(noise.unique()) > 0.99 * noise.numel() or not noise.is_floating_point()  # no number stands twice
        laws = {"uniform": [(noise, 0.5, 1 / 12)], "proposals": [(noise[:, 0], 0, 1 / 3), (noise[:, 1:], 0, 1)]}
        for x, mean, variance in laws.get(name, [(noise, 0, 1)]):
            if x.is_floating_point():  # else a permutation
                assert abs(x.mean() - mean) < 0.1 and abs(x.var() / variance - 1) < 0.15


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_the_actors_learning_rate_falls_along_a_cosine_to_0_or_stays(schedule, run, monkeypatch):
    module, rates = importlib.import_module("algos.cql"), []
    update = module.update
    monkeypatch.setattr(
        module, "update", lambda agent, *rest: rates.append(agent.actor_opt.lr.item()) or update(agent, *rest)
    )
    run("--actor-lr-schedule", schedule, "--actor-lr", "0.01", "--num-updates", "4", script="cql")
    fall = [1, 0.853553, 0.5, 0.146447] if schedule == "cosine" else [1] * 4
    assert rates == pytest.approx([0.01 * x for x in fall], rel=1e-4)


def test_rollouts_begin_at_logged_states_and_the_buffer_keeps_the_newest(run, monkeypatch):
    inputs, outputs = spied(mopo, monkeypatch, "rollout")
    buffer_add, sizes = mopo.ModelBuffer.add, []
    monkeypatch.setattr(mopo.ModelBuffer, "add", lambda self, rows: buffer_add(self, rows) or sizes.append(self.size))
    run("--rollout-batch-size", "1000", "--rollout-length", "2", "--rollout-retain", "2")
    logged = {tuple(obs.tolist()) for obs in load_dataset("pendulum/random-v0").obs}
    starts = [tuple(obs.tolist()) for (obs,) in inputs for obs in obs]
    assert len(starts) == 3_000 and set(starts) <= logged and len(set(starts)) > 2_500  # also the states after ends
    assert sizes == [2_000, 4_000, 4_000] and float(progress(run.folder)[-1]["model_buffer_size"]) == 4_000


@pytest.mark.parametrize(
    "script, model", [("osr", "inverse_model"), ("osr_v", "inverse_model"), ("sdc", "transition_model")]
)
def test_what_follows_in_the_data_is_learned_where_it_is_known(script, model, tmp_path, monkeypatch):
    step, rng = np.arange(60), np.random.default_rng(0)
    arrays = {"observations": rng.normal(size=(60, 3)), "actions": rng.uniform(-1, 1, (60, 2)), "rewards": step}
    np.savez(tmp_path / "own.npz", **arrays, terminals=step % 20 == 9, timeouts=step % 20 == 19)
    module, data = importlib.import_module(f"algos.{script}"), load_dataset(str(tmp_path / "own.npz"))
    monkeypatch.setattr(module, "load_or_train", lambda name, make, loss, rows, *rest: rows)
    rows = getattr(module, model)(data, module.Args(), None)
    assert len(data.obs) == 57 and len(rows) == data.successor_known.sum() == 54
    assert torch.equal(rows[:, :3], data.obs[data.successor_known])


@pytest.mark.parametrize("script", ["iql", "onestep"])
@pytest.mark.parametrize("scale", ["returns", "none"])
def test_rewards_are_scaled_by_the_range_of_returns_unless_told_otherwise(script, scale, run, monkeypatch):
    inputs, _ = spied(importlib.import_module(f"algos.{script}"), monkeypatch, "update")
    run(*(["--reward-scale", "none"] if scale == "none" else []), script=script)
    data = load_dataset("pendulum/random-v0")
    factor = 1_000 / np.ptp(data.episode_returns) if scale == "returns" else 1.0
    seen = torch.cat([rows[:, 4] for rows, *_ in inputs])
    logged = (data.reward * factor).sort().values
    nearest = logged[torch.searchsorted(logged, seen).clamp(max=len(logged) - 1)]
    torch.testing.assert_close(nearest, seen, rtol=1e-3, atol=1e-3 * factor)


@pytest.mark.parametrize("improvement, num_critic", [("reverse-kl", 30), ("easy-bcq", 40)])
def test_onestep_learns_q_first_and_then_with_it_as_it_is_the_policy(improvement, num_critic, run, monkeypatch):
    module, stages = importlib.import_module("algos.onestep"), []
    update = module.update
    monkeypatch.setattr(module, "update", lambda *inputs: stages.append(inputs[-2]) or update(*inputs))
    _, infos = spied(module, monkeypatch, "update")
    folder = run("--policy-share", "0.25", "--improvement", improvement, script="onestep")
    assert stages == [False] * num_critic + [True] * (40 - num_critic)
    policy = torch.load(folder / "policy.pt", weights_only=True)["actor"]
    assert ("noise" in policy) == (improvement == "easy-bcq")
    # the policy begins as the behaviour model
    assert improvement == "easy-bcq" or abs(infos[num_critic]["kl"]) < 1e-5 < abs(infos[-1]["kl"])


def test_imitation_of_the_best_tenth_takes_the_rows_of_ten_episodes(run, capsys):
    run("--top-fraction", "0.1", script="bc")
    assert "imitation   of 2,000 rows of the best episodes" in capsys.readouterr().out


def test_the_natural_gradient_begins_with_a_clone_and_a_value_in_the_units_of_the_data(run, monkeypatch):
    module, clones = importlib.import_module("algos.morel_npg"), []
    clone = module.clone
    monkeypatch.setattr(module, "clone", lambda *inputs: clones.append(1) or clone(*inputs))
    folder = run("--halt-offset", "5000", script="morel_npg")
    run("--resume", str(folder), "--num-updates", "41", script="morel_npg")
    assert len(clones) == 1
    state, data = (
        torch.load(folder / "checkpoint.pt", weights_only=True)["modules"]["agent"],
        load_dataset("pendulum/random-v0"),
    )
    torch.testing.assert_close(state["value.obs_mean"], data.obs.mean(dim=0))
    assert state["value.scale"].item() == pytest.approx(5_000 - data.reward.min().item(), rel=1e-5)


def test_another_seed_gives_another_policy(run, tmp_path):
    run("--run-name", "a")
    run("--run-name", "b", "--seed", "1", "--dynamics", str(next(Path(os.environ["OFFLINE_MBRL_CACHE"]).rglob("*.pt"))))
    a, b = (torch.load(tmp_path / name / "policy.pt", weights_only=True)["actor"] for name in "ab")
    assert not torch.equal(a["net.0.weight"], b["net.0.weight"])


def test_it_runs_from_any_directory_and_reuses_the_ensemble(home, tmp_path):
    for word in ("fitted in", "reused"):
        process = command(home, "--seed", "77", "--run-dir", str(tmp_path), cwd=tmp_path)
        out, _ = process.communicate(timeout=100)
        assert process.returncode == 0, out
        assert word in out
    assert len(list(tmp_path.glob("pendulum-random-v0__mopo__77__*"))) == 2  # default names never collide


@pytest.mark.parametrize("script", TRAIN_A_POLICY)
def test_without_an_environment_it_trains_and_says_that_nothing_was_evaluated(script, run, tmp_path, capsys):
    rng = np.random.default_rng(0)
    action = rng.uniform(-1, 1, (300, 1))
    walk = np.cumsum(np.pad(0.1 * action, ((1, 0), (0, 1))), axis=0)  # (301, 2)
    arrays = {"observations": walk[:-1], "actions": action, "rewards": walk[1:, 0], "next_observations": walk[1:]}
    np.savez(tmp_path / "own.npz", **arrays, terminals=np.zeros(300, bool), timeouts=np.arange(300) % 50 == 49)
    folder = run("--dataset", str(tmp_path / "own.npz"), script=script)
    out = capsys.readouterr().out
    assert (folder / "policy.pt").exists() and "evaluation  none" in out and "score" not in out
    assert {row["return_mean"] for row in progress(folder)} == {"nan"}


# --- Going on ---
@every_script
def test_a_run_stopped_and_resumed_ends_bit_identical(script, run, tmp_path, monkeypatch, capsys):
    run("--run-name", "whole", script=script)
    update, calls = MODULES[script].update, []

    def stop_at_17(*given, **settings):
        calls.append(1)
        if len(calls) == 17:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(*given, **settings)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(MODULES[script], "update", stop_at_17)
        run("--run-name", "stopped", "--checkpoint-interval", "1000", script=script)
    assert stop.value.code == 130 and "stopped     after 17 updates" in capsys.readouterr().out
    (tmp_path / "stopped" / "checkpoint.pt.1.tmp").write_text("what a killed process had written of it")
    run("--resume", str(tmp_path / "stopped"), script=script)
    assert_same_ends(tmp_path / "whole", tmp_path / "stopped")
    assert not list((tmp_path / "stopped").glob("*.tmp"))


def assert_same_ends(one: Path, other: Path) -> None:
    assert_same_checkpoint(one, other)
    drop = ("seconds", "updates_per_second")
    first, second = ([{k: v for k, v in row.items() if k not in drop} for row in progress(f)] for f in (one, other))
    assert first == second


@pytest.mark.parametrize("script", ["mopo", "sdc", "sdm_gan", "morel_npg"])  # four kinds of state
def test_a_run_killed_at_any_moment_and_resumed_ends_bit_identical(script, run, home, tmp_path):
    flags = ("--num-updates", "60" if script == "morel_npg" else "200", "--checkpoint-interval", "20")
    run("--run-name", "whole", *flags, script=script)
    process = command(home, "--run-name", "killed", *flags, "--run-dir", str(tmp_path), script=script)
    checkpoint = tmp_path / "killed" / "checkpoint.pt"
    deadline = time.monotonic() + 60
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert torch.load(checkpoint, weights_only=True)["progress"]["update"] < int(flags[1])
    run("--resume", str(tmp_path / "killed"), script=script)
    assert_same_ends(tmp_path / "whole", tmp_path / "killed")


def test_ctrl_c_leaves_a_checkpoint_and_prints_the_resume_command(home, tmp_path):
    flags = ("--run-name", "run", "--num-updates", "100000", "--checkpoint-interval", "100000", "--eval-interval", "1")
    process = command(home, *flags, "--run-dir", str(tmp_path))
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / "progress.csv").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and f"--resume {tmp_path / 'run'}" in out
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert 1 <= state["progress"]["update"] < 100_000


def test_resume_keeps_the_settings_and_can_train_longer(run, tmp_path):
    flags = ("--actor-lr-schedule", "constant", "--penalty-coef", "0.125", "--gamma", "0.9", "--hidden-sizes", "8", "4")
    folder = run(*flags)
    run("--resume", str(folder), "--num-updates", "60", "--eval-interval", "10")
    run("--resume", str(folder), "--num-updates", "70")
    config = json.loads((folder / "config.json").read_text())
    args = config["args"]
    assert (args["penalty_coef"], args["gamma"], args["num_updates"]) == (0.125, 0.9, 70)
    assert args["hidden_sizes"] == [8, 4]
    assert [int(row["update"]) for row in progress(folder)] == [20, 40, 50, 60, 70]
    # the first command stays, and what was changed is told
    assert "--gamma 0.9" in config["command"] and "--resume" not in config["command"]
    first, second = config["resumed"]
    assert first["after_update"] == 40 and first["changed"] == {"num_updates": [40, 60], "eval_interval": [20, 10]}
    assert second["after_update"] == 60 and second["changed"] == {"num_updates": [60, 70]}
    with pytest.raises(InputError, match="--num-updates is 70 in this run and cannot change"):
        run("--resume", str(folder), "--num-updates", "30")


@pytest.mark.parametrize("flag", ["env_id", "termination"])
def test_the_printed_resume_command_trusts_what_its_run_imports(flag):
    run = SimpleNamespace(args=mopo.Args(**{flag: "mine:it"}), folder=Path("my runs/r"))
    assert common.run.Run._resume_command(run).endswith("--resume 'my runs/r' --trust")
    run.args = mopo.Args(env_id="Hopper-v5")
    assert not common.run.Run._resume_command(run).endswith("--trust")


@pytest.mark.parametrize("script", ["mopo", "onestep"])  # a learning rate, a share of the updates
def test_a_run_whose_schedule_spans_it_cannot_become_longer(script, run):
    folder = run(script=script)
    with pytest.raises(InputError, match="--num-updates is 40 in this run and its schedules span them"):
        run("--resume", str(folder), "--num-updates", "60", script=script)


@pytest.mark.parametrize("flag", ["--run-name", "--run-dir"])
def test_a_resumed_run_stays_in_its_folder(flag, run):
    folder = run()
    with pytest.raises(InputError, match=f"{flag} is .* cannot change"):
        run("--resume", str(folder), flag, "elsewhere")


@pytest.mark.parametrize("setting, value", [("env_id", "planted:Env-v0"), ("termination", "planted:rule")])
def test_what_a_folder_names_is_imported_only_if_the_command_line_trusts_it(
    setting, value, run, tmp_path, monkeypatch, capsys
):
    folder = run()
    config = json.loads((folder / "config.json").read_text())
    config["args"] |= {setting: value, "trust": True}  # which is not for the folder to say
    (folder / "config.json").write_text(json.dumps(config))
    sys.modules.pop("planted", None)
    (tmp_path / "planted.py").write_text("print('planted code runs')\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"imports {value}.*--trust"):
        run("--resume", str(folder))
    assert "planted code runs" not in capsys.readouterr().out
    with pytest.raises(InputError):  # there is no such environment or rule in it
        run("--resume", str(folder), "--trust")
    assert "planted code runs" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags", [("--seed", "1"), ("--gamma", "0.9"), ("--rollout-batch-size", "200"), ("--hidden-sizes", "8", "8")]
)
def test_what_decides_the_policy_cannot_change_at_resume(run, flags):
    folder = run()
    before = {file: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    with pytest.raises(InputError, match=f"{flags[0]} is .* in this run and cannot change"):
        run("--resume", str(folder), *flags)
    assert {file: file.read_bytes() for file in folder.iterdir() if file.is_file()} == before


# --- Bad input ---
def test_a_folder_that_holds_a_run_is_refused_and_kept(run):
    folder = run()
    before = (folder / "checkpoint.pt").read_bytes()
    with pytest.raises(InputError, match="holds a run: go on with --resume"):
        run()
    assert (folder / "checkpoint.pt").read_bytes() == before


def test_a_folder_in_use_has_one_winner(run):
    run.folder.mkdir(parents=True)
    with FileLock(run.folder / ".lock"), pytest.raises(InputError, match="in use by another process"):
        run()
    run()  # what a killed process leaves does not stop the next


@pytest.mark.parametrize(
    "dataset, name",
    [
        ("pendulum/random-v0", "pendulum-random-v0"),
        ("./log.npz", "log.npz"),
        ("../data/log.npz", "data-log.npz"),
        ("~/log.npz", "log.npz"),
        ("/data/log.npz", "data-log.npz"),
        ("folder/", "folder"),
    ],
)
def test_no_run_folder_is_hidden(dataset, name, tmp_path):
    args = mopo.Args(dataset=dataset, run_dir=str(tmp_path))
    folder, lock = common.run.make_folder(args)
    lock.release()
    assert folder.parent == tmp_path and folder.name.startswith(f"{name}__mopo__0__")


def test_a_tilde_is_the_home_directory_also_where_no_shell_expands_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    flags = [f"--{name}=~/x" for name in ("run-dir", "dynamics", "dataset")]
    monkeypatch.setattr(sys, "argv", ["mopo.py", *flags])
    args = read_args(mopo.Args, mopo.TUNED)
    assert {args.run_dir, args.dynamics, args.dataset} == {str(tmp_path / "x")}


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--num-updates", "-1"), "--num-updates must be at least 1"),
        (("--real-ratio", "2"), "--real-ratio must be between 0 and 1, not 2.0"),
        (("--seed", "-1"), "--seed must be at least 0"),
        (("--penalty-coef", "-1"), "--penalty-coef must be at least 0, not -1.0"),
        (("--penalty-coef", "nan"), "--penalty-coef must be at least 0, not nan"),
        (("--hidden-sizes", "64", "0"), "--hidden-sizes must be at least 1, not 0"),
        (("--num-elites", "8"), "--num-elites 8 is more than --num-members 7"),
        (("--env-id", "Hopper-v5"), "observations of 3 numbers but Hopper-v5 has 11"),
        (("--env-id", "Hoper-v5"), "Hoper"),
        (("--dataset", "no/such-v0"), "No dataset 'no/such-v0'"),
        (("--dataset", "absent.hdf5"), "No such file"),
        (("--dynamics", "absent.pt"), "no ensemble at absent.pt"),
        (("--termination", "nonsense"), "none of auto, known, forced, learned, none and module:function"),
        (("--resume", "absent"), "no run of mopo.py to resume"),
        (("--run-name", "file/run"), "file/run is .* cannot be written to .Not"),
        (("--gae-lambda", "1.5"), "--gae-lambda must be between 0 and 1, not 1.5"),
        (("--init-std", "0"), "--init-std must be at least 0.001, not 0.0"),
        (("--expectile", "1.5"), "--expectile must be between 0 and 1"),
        (("--momentum", "1"), "--momentum must be between 0 and 0.999"),
        (("--target-entropy", "nan"), "--target-entropy must be at least -inf, not nan"),
        (("--eta", "inf"), "--eta must be at least 0 and finite, not inf"),
        (("--penalty-coef", "inf"), "--penalty-coef must be at least 0 and finite, not inf"),
        (("--threshold-coef", "1", "--num-elites", "1"), "MOReL compares elites: give --num-elites above 1"),
        (("--halt-offset", "1", "--gae-lambda", "1", "--num-elites", "1"), "MOReL compares elites"),
    ],
)
def test_bad_input_gets_one_sentence(run, tmp_path, flags, words):
    (tmp_path / "file").touch()
    known = {script: importlib.import_module(f"algos.{script}").Args.__dataclass_fields__ for script in SCRIPTS}
    names = {flag[2:].replace("-", "_") for flag in flags if flag.startswith("--")}
    script = "mopo" if names <= known["mopo"].keys() else next(s for s in SCRIPTS if names <= known[s].keys())
    with pytest.raises(InputError, match=words) as error:
        run(*flags, script=script)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("script", ["mopo", "mobile", "combo", "morel", "morel_npg", "sdc", "sdm_gan"])
def test_every_script_with_an_ensemble_wants_the_file_that_it_is_given(script, run):
    with pytest.raises(InputError, match="no ensemble at absent.pt"):
        run("--dynamics", "absent.pt", script=script)


def test_an_environment_whose_package_is_missing_is_refused():
    spec = gym.envs.registration.EnvSpec("Missing-v0", entry_point="no_such_package:Env")
    with pytest.raises(InputError, match="cannot make Missing-v0.*give --env-id"):
        make_env(SimpleNamespace(env_spec=spec))


@pytest.mark.parametrize("script", ["mopo", "mobile", "combo", "morel", "morel_npg", "sdm_gan"])
def test_a_rule_that_cannot_be_learned_is_told_before_anything_is_fitted(script, run, tmp_path, capsys):
    rng, ends = np.random.default_rng(0), np.arange(300) % 50 == 49
    walk = rng.normal(size=(300, 2)).cumsum(axis=0)
    arrays = {"observations": walk, "next_observations": np.roll(walk, -1, axis=0), "rewards": walk[:, 0]}
    np.savez(tmp_path / "own.npz", **arrays, actions=rng.uniform(-1, 1, (300, 1)), terminals=ends)
    with pytest.raises(InputError, match="cannot be learned from 6 terminals"):
        run("--dataset", str(tmp_path / "own.npz"), "--termination", "learned", script=script)
    assert "\ndynamics " not in capsys.readouterr().out


# --- Divergence ---
@every_script
def test_training_that_diverges_stops_at_the_next_evaluation_and_keeps_the_last_good_checkpoint(
    script, run, monkeypatch
):
    update, calls = MODULES[script].update, []

    def poisoned(agent, *rest):
        info = update(agent, *rest)
        if calls.append(1) or len(calls) == 15:
            next(agent.parameters()).data.fill_(math.nan)
        return info

    monkeypatch.setattr(MODULES[script], "update", poisoned)
    with pytest.raises(InputError, match=r"diverged by update 20: .* not finite; .*checkpoint of update 10 is whole"):
        run(script=script)
    assert not (run.folder / "policy.pt").exists() and not (run.folder / "progress.csv").exists()
    state = torch.load(run.folder / "checkpoint.pt", weights_only=True)
    assert all(x.isfinite().all() for x in tensors(state["modules"]).values())


def test_what_diverged_never_takes_the_place_of_a_good_checkpoint(run, monkeypatch):
    update, calls = mopo.update, []

    def poisoned(agent, *rest):
        info = update(agent, *rest)
        if calls.append(1) or len(calls) == 15:
            next(agent.parameters()).data.fill_(math.nan)
        return info

    monkeypatch.setattr(mopo, "update", poisoned)
    with pytest.raises(InputError, match="checkpoint of update 10 is whole"):
        run("--eval-interval", "40")  # no evaluation comes between
    state = torch.load(run.folder / "checkpoint.pt", weights_only=True)
    assert all(x.isfinite().all() for x in tensors(state["modules"]).values())


@pytest.mark.parametrize(
    "script, flags",
    [
        ("mopo", ("--critic-lr", "1e6")),
        ("mopo", ("--penalty-coef", "1e38")),
        ("bc", ("--actor-lr", "1e30")),
        ("td3_bc", ("--dataset", "sentinel")),
        ("cql", ("--dataset", "sentinel")),
        ("morel_npg", ("--dataset", "sentinel")),
    ],
)
def test_enormous_numbers_end_with_one_sentence_and_no_policy(script, flags, run, tmp_path):
    rng = np.random.default_rng(0)
    rewards = np.where(np.arange(300) == 7, -1e30, rng.normal(size=300))  # for "crashed"
    walk = rng.normal(size=(301, 2)).cumsum(axis=0)
    arrays = {"observations": walk[:-1], "next_observations": walk[1:], "actions": rng.uniform(-1, 1, (300, 1))}
    np.savez(tmp_path / "sentinel.npz", **arrays, rewards=rewards, terminals=np.zeros(300))
    flags = [str(tmp_path / "sentinel.npz") if flag == "sentinel" else flag for flag in flags]
    with pytest.raises(InputError, match="diverged"):
        run(*flags, script=script)
    assert not (run.folder / "policy.pt").exists()


@pytest.mark.parametrize("q, warns", [(-50.0, False), (1e4, True)])
def test_a_q_value_that_no_policy_can_reach_is_warned_of_once(q, warns, run, monkeypatch, capsys):
    update = MODULES["cql"].update
    monkeypatch.setattr(MODULES["cql"], "update", lambda *given: update(*given) | {"q": torch.tensor(q)})
    run(script="cql")
    assert capsys.readouterr().out.count("all that the rewards allow") == warns


@pytest.mark.parametrize("script", ["mopo", "mobile"])
def test_a_penalty_is_shown_beside_the_rewards_and_warned_of_where_it_is_larger(script, run, capsys):
    run("--run-name", "usual", script=script)
    out = capsys.readouterr().out
    assert out.count("penalty     beside rewards of mean size 6") == 1 and "outweighs" not in out
    run("--run-name", "large", "--penalty-coef", "1e4", script=script)
    assert capsys.readouterr().out.count("warning     the penalty outweighs the rewards") == 1


def test_rollouts_that_all_end_at_once_are_warned_of(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "at_once.py").write_text("def ends(obs, action, next_obs):\n    return obs[:, 0] < 2\n")
    monkeypatch.chdir(tmp_path)
    run("--termination", "at_once:ends")
    assert capsys.readouterr().out.count("every rollout ends with its first step") == 1


# --- Files that cannot be written ---
def no_traceback(process: subprocess.Popen) -> str:
    out, _ = process.communicate(timeout=100)
    assert process.returncode == 1 and "Traceback" not in out, out
    return out.splitlines()[-1]


def test_a_full_disk_ends_with_one_sentence_and_the_last_checkpoint(run, home, tmp_path):
    run("--run-name", "first")  # fills the caches, and says how large a checkpoint is
    size = (tmp_path / "first" / "checkpoint.pt").stat().st_size

    def limit():  # no file may become larger: as on a full disk, but for this process alone
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))

    last = no_traceback(command(home, "--run-name", "full", "--run-dir", str(tmp_path), preexec_fn=limit))
    assert "cannot write" in last and "checkpoint.pt" in last and "start again" in last
    assert not list((tmp_path / "full").glob("*.tmp"))


@pytest.mark.parametrize("file", ["checkpoint.pt", "progress.csv", "policy.pt"])
def test_whatever_cannot_be_written_the_last_checkpoint_is_named_and_goes_on(file, run, tmp_path, monkeypatch):
    replace, calls = os.replace, []

    def full(source, target):
        if Path(target).name == file and (calls.append(1) or len(calls) == 2 or file == "policy.pt"):
            raise OSError(28, "No space left on device")
        replace(source, target)

    run("--run-name", "whole")
    with monkeypatch.context() as patch, pytest.raises(InputError) as error:
        patch.setattr(os, "replace", full)
        run()
    update = {"checkpoint.pt": 10, "progress.csv": 30, "policy.pt": 40}[file]
    assert f"{file} (No space left on device)" in str(error.value)
    assert f"checkpoint of update {update} is whole: python" in str(error.value)
    assert not list(run.folder.glob("*.tmp"))
    run("--resume", str(run.folder))
    assert_same_ends(tmp_path / "whole", run.folder)


def test_a_folder_that_vanishes_gets_one_sentence(run, monkeypatch):
    update, calls = mopo.update, []

    def vanishing(*given):
        if calls.append(1) or len(calls) == 15:
            shutil.rmtree(run.folder)
        return update(*given)

    monkeypatch.setattr(mopo, "update", vanishing)
    with pytest.raises(InputError, match="cannot write .*No such file.* there is no checkpoint"):
        run()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_refused(run):
    with pytest.raises(InputError, match="finds no GPU"):
        run("--device", "cuda")


def test_a_checkpoint_of_another_script_dataset_or_shape_is_refused(run, tmp_path):
    folder = run()
    state, config = torch.load(folder / "checkpoint.pt", weights_only=True), (folder / "config.json").read_text()
    for change, words in (
        ({"data_hash": "other"}, "another script's or on other data"),
        ({"algo": "combo"}, "another script's or on other data"),
        ({"modules": state["modules"] | {"agent": mopo.Agent(4, 2, mopo.Args()).state_dict()}}, "cannot be resumed"),
    ):
        torch.save(state | change, folder / "checkpoint.pt")
        with pytest.raises(InputError, match=words):
            run("--resume", str(folder))
    (folder / "checkpoint.pt").write_bytes(b"half a file")
    with pytest.raises(InputError, match="cannot be resumed"):
        run("--resume", str(folder))
    (folder / "config.json").write_text(config.replace('"mopo"', '"combo"', 1))
    with pytest.raises(InputError, match="no run of mopo.py to resume .*a run of combo.py"):
        run("--resume", str(folder))
    for damaged in ("{", '{"algo": "mopo"}', config.replace('"penalty_coef"', '"no_such_setting"')):
        (folder / "config.json").write_text(damaged)
        with pytest.raises(InputError, match="no run of mopo.py to resume .*start a new run"):
            run("--resume", str(folder))


def test_the_command_ends_with_status_1_and_no_traceback_on_bad_input(home, tmp_path):
    with h5py.File(tmp_path / "bad.hdf5", "w") as file:
        file["observations"] = np.zeros((3, 2))
    process = command(home, "--dataset", str(tmp_path / "bad.hdf5"), "--run-dir", str(tmp_path))
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert out.splitlines()[-1].startswith("error: ") and "lacks actions" in out and "Traceback" not in out


# --- Evaluation ---
class SeedSpy(gym.Wrapper):
    """Remembers what the environments were reset with."""

    seeds: list = []

    def reset(self, *, seed=None, options=None):
        SeedSpy.seeds.append(seed)
        return self.env.reset(seed=seed)


def environment(env_id: str) -> gym.Env:
    SeedSpy.seeds = []
    return SeedSpy(gym.make(env_id))


def box_data(obs_dim: int, high: float, env_id: str = "") -> SimpleNamespace:
    return SimpleNamespace(
        obs=torch.zeros(1, obs_dim), action_low=np.array([-high]), to_env_action=lambda action: high * action,
        to_obs=lambda obs: obs.astype(np.float32), env_spec=gym.spec(env_id) if env_id else None,
    )  # fmt: skip


def gentle_actor() -> mopo.Actor:
    """So weak that the time until the pendulum falls depends on where it starts."""
    torch.manual_seed(3)
    actor = mopo.Actor(4, 1, (16, 16))
    with torch.no_grad():
        actor.net[-1].weight.mul_(0.1)
        actor.net[-1].bias.zero_()
    return actor


def hand_loop(env_id: str, actor: mopo.Actor, high: float, seed: int) -> tuple[float, int]:
    """Return and length of an episode."""
    env, total, steps, done = gym.make(env_id), 0.0, 0, False
    obs, _ = env.reset(seed=seed)
    while not done:
        with torch.no_grad():
            action = high * actor.act(torch.tensor(np.array(obs, dtype=np.float32))[None])[0].numpy()
        obs, reward, terminated, truncated, _ = env.step(action)
        total, steps, done = total + reward, steps + 1, terminated or truncated
    return total, steps


def test_evaluation_returns_the_undiscounted_return_of_each_episode():
    torch.manual_seed(3)
    actor, env = mopo.Actor(3, 1, (16, 16)), environment("Pendulum-v1")
    returns = evaluate(actor, env, box_data(3, 2.0), [0, 500], 3)
    assert returns.shape == (3,) and len(set(SeedSpy.seeds)) == 3
    expected = [hand_loop("Pendulum-v1", actor, 2.0, seed)[0] for seed in SeedSpy.seeds]
    np.testing.assert_allclose(returns, expected, rtol=1e-5)


def test_evaluation_stops_counting_where_an_episode_has_ended():
    actor, env = gentle_actor(), environment("InvertedPendulum-v5")
    returns = evaluate(actor, env, box_data(4, 3.0), [0, 500], 6)
    results = [hand_loop("InvertedPendulum-v5", actor, 3.0, seed) for seed in SeedSpy.seeds]
    lengths = [steps for _, steps in results]
    assert len(set(lengths)) > 2 and max(lengths) > min(lengths) + 2  # the others went on, and this one started anew
    np.testing.assert_allclose(returns, [total for total, _ in results])


def test_evaluation_follows_from_its_seed_alone_and_leaves_random_states_alone():
    actor, env, data = gentle_actor(), environment("InvertedPendulum-v5"), box_data(4, 3.0)
    torch.manual_seed(11)
    np.random.seed(11)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = evaluate(actor, env, data, [0, 500], 6)
    assert torch.equal(torch.get_rng_state(), before) and (np.random.get_state()[1] == numpy_before).all()
    starts = []
    for seed in ([0, 500], [0, 1_000], [1, 500]):
        again = evaluate(actor, env, data, seed, 6)
        starts.append(tuple(SeedSpy.seeds[-6:]))
        assert (again == first).all() == (seed == [0, 500])
    assert len(set(starts)) == 3


class Oddities(PendulumEnv):
    """A pendulum, whose interface is `kind`."""

    exist = steps = 0
    most_steps = math.inf

    def __init__(self, kind: str, **kwargs):
        super().__init__(**kwargs)
        self.kind = kind
        if kind == "one only":
            if Oddities.exist:
                raise OSError(98, "Address already in use")
            Oddities.exist += 1

    def close(self):
        Oddities.exist -= self.kind == "one only"

    def reset(self, **kwargs):
        obs, info = super().reset(**kwargs)
        return obs if self.kind == "old" else (obs, info)

    def step(self, action):
        Oddities.steps += 1
        if self.kind == "breaks" and Oddities.steps > Oddities.most_steps:
            raise ConnectionError("the simulator closed the connection")
        obs, reward, terminated, truncated, info = super().step(action)
        if self.kind == "old":
            return obs, reward, terminated, info
        info = {"contacts": np.zeros(self.np_random.integers(1, 4))} if self.kind == "infos" else info
        return obs, np.array([reward]) if self.kind == "reward (1,)" else reward, terminated, truncated, info


for kind in ("usual", "reward (1,)", "infos", "one only", "old", "breaks"):
    gym.register(f"Odd{re.sub('[^a-z]', '', kind)}-v0", Oddities, max_episode_steps=200, kwargs={"kind": kind})


@pytest.fixture
def odd(monkeypatch):
    for name, value in (("exist", 0), ("steps", 0), ("most_steps", math.inf)):
        monkeypatch.setattr(Oddities, name, value)
    return Oddities


@pytest.mark.parametrize("kind", ["reward", "infos", "oneonly"])
def test_rewards_of_shape_1_infos_of_any_kind_and_a_single_simulator_evaluate_as_usual(kind, run, tmp_path, odd):
    for name in ("usual", kind):
        run("--run-name", name, "--env-id", f"Odd{name}-v0", "--eval-episodes", "3", script="td3_bc")
    usual, other = ([float(row["return_mean"]) for row in progress(tmp_path / name)] for name in ("usual", kind))
    assert usual == pytest.approx(other, rel=1e-6)


def test_gyms_old_interface_is_refused_in_one_sentence_before_anything_is_fitted(run, odd):
    with pytest.raises(
        InputError, match=r"Oddold-v0 fails in reset .*: gymnasium's interface is reset -> \(obs, info\)"
    ):
        run("--env-id", "Oddold-v0", script="td3_bc")


def test_an_environment_that_breaks_costs_an_evaluation_and_never_the_training(run, odd, capsys):
    odd.most_steps = 1 + 2 * 200 + 50  # the trial, the first evaluation, and a part of the second
    folder = run("--env-id", "Oddbreaks-v0", "--eval-interval", "10", "--score-evals", "4", script="td3_bc")
    returns = [row["return_mean"] for row in progress(folder)]
    assert returns[0] != "nan" and returns[1:] == ["nan"] * 3 and (folder / "policy.pt").exists()
    out = capsys.readouterr().out
    assert out.count("is not evaluated: ") == 3 and "closed the connection" in out and "3 failed" in out


# --- The machine ---
def test_one_function_compiled_for_many_runs_stays_one_graph_each(monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: seen.append(function.__code__) or function)
    for i in range(12):
        assert machine.compiled(lambda x: x + i, CPU)(torch.tensor(1)).item() == 1 + i
    assert len({id(code) for code in seen}) == 12  # the compiler counts by it and refuses the ninth


def test_an_older_torch_that_cannot_trace_gradients_is_asked_all_the_same(monkeypatch):
    monkeypatch.setattr(torch._dynamo, "config", type("Config", (), {"__slots__": ()})())
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    assert machine.compiled(lambda x: x + 1, CPU)(torch.ones(1)) == 2


def test_an_error_of_the_function_itself_is_not_taken_for_a_missing_compiler(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)

    def fails(x):
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        machine.compiled(fails, CPU)(torch.zeros(1))


@pytest.mark.slow
@pytest.mark.parametrize("trouble", ["absent compiler", "broken compiler", "unwritable cache"])
def test_where_compiling_fails_the_function_goes_on_eagerly_after_one_line(trouble, tmp_path, monkeypatch, capsys):
    fake = tmp_path / "g++"
    if trouble == "broken compiler":  # it answers when asked for its version but compiles nothing
        fake.write_text("#!/bin/sh\n[ \"$1\" = --version ] && { echo 'g++ 12.2.0'; exit 0; }\nexit 1\n")
        fake.chmod(0o755)
    torch._dynamo.reset()
    with fresh_cache(), torch._inductor.config.patch({} if "cache" in trouble else {"cpp.cxx": (None, str(fake))}):
        if trouble == "unwritable cache":
            (tmp_path / "file").touch()
            monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "cache"))
        step = machine.compiled(lambda x: (2 * x + 1).sin().sum(), CPU)
        values = [step(torch.full((8,), float(i))).item() for i in range(3)]
    torch._dynamo.reset()
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 1 and "eagerly" in printed[0]
    assert values == pytest.approx([8 * math.sin(2 * i + 1) for i in range(3)], rel=1e-5)


def test_float32_products_are_exact():
    precision = torch.get_float32_matmul_precision()
    a, b = torch.randn(2, 300, 300, generator=torch.Generator().manual_seed(0))
    machine.exact_products(CPU)
    try:
        torch.testing.assert_close(a @ b, (a.double() @ b.double()).float(), rtol=0, atol=1e-4)  # bfloat16: 0.1
    finally:
        torch.set_float32_matmul_precision(precision)


@pytest.mark.parametrize("exact", [True, False])
def test_medium_is_what_the_cpu_gets_unless_it_rounds(exact, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", asked.append)
    if not exact:
        monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: torch.full((64, 64), 64 / 9 * 1.002))
    machine.exact_products(CPU)
    assert asked == ["medium"] + ["highest"] * (not exact)


@pytest.mark.slow
@pytest.mark.parametrize("script", [script for script in SCRIPTS if script != "morel_npg"])  # which compiles no update
def test_a_compiled_run_ends_as_the_eager_one_does(script, run, tmp_path, capsys):
    flags = ("--num-updates", "6", "--eval-interval", "3")
    run("--run-name", "eager", *flags, script=script)
    run("--run-name", "graph", *flags, "--compile", script=script)
    assert "going on eagerly" not in capsys.readouterr().out
    a, b = (
        tensors(torch.load(tmp_path / name / "checkpoint.pt", weights_only=True)["modules"]["agent"])
        for name in ("eager", "graph")
    )
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=1e-3, atol=1e-4, equal_nan=True, msg=name)
