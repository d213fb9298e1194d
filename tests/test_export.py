"""benchmarks/export.py: what acts like the run's policy without torch, when it warns, and what is not exported."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import export, export_forms
from common import InputError
from common.dataset import minari_folder
from common.evaluation import SCRIPTS, load_policy
from common.run import read_args

TINY = {
    "num-threads": 1, "num-updates": 3, "eval-interval": 3, "eval-episodes": 1, "batch-size": 16,
    "hidden-sizes": "16 8", "rollout-batch-size": 20, "rollout-interval": 15, "dynamics-max-epochs": 1,
    "dynamics-hidden-size": 16, "num-trajectories": 2, "horizon": 5, "pessimistic-episodes": 2, "cg-iterations": 2,
    "clone-epochs": 1, "behaviour-updates": 3, "inverse-updates": 3, "transition-updates": 3, "warm-start-updates": 1,
    "num-bootstrap": 2,
}  # fmt: skip
POLICIES = [*((script, "") for script in sorted(SCRIPTS) if script != "fqe"), ("mopo", "--standardise-obs")]
POLICIES += [("sdm_gan", "--num-candidates 5"), ("onestep", "--improvement easy-bcq")]  # these ask their critic
every_policy = pytest.mark.parametrize("script, flags", POLICIES)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(script, flags) -> the folder of a tiny run, trained once."""
    home, patch = tmp_path_factory.mktemp("runs"), pytest.MonkeyPatch()
    for variable, folder in (("OFFLINE_MBRL_CACHE", "cache"), ("MINARI_DATASETS_PATH", "minari")):
        patch.setenv(variable, str(home / folder))

    def run(script: str, flags: str = "") -> Path:
        name, module = f"{script}{flags.replace(' ', '')}", importlib.import_module(f"algos.{script}")
        if not (home / name).exists():
            known = {k: v for k, v in TINY.items() if k.replace("-", "_") in module.Args.__dataclass_fields__}
            words = [word for key, value in known.items() for word in (f"--{key}", *str(value).split())]
            argv = [*words, *flags.split(), "--no-compile", "--run-dir", str(home), "--run-name", name]
            with pytest.MonkeyPatch.context() as own:
                own.setattr(sys, "argv", [f"{script}.py", *argv])
                module.main(read_args(module.Args, module.TUNED))
        return home / name

    yield run
    patch.undo()


@pytest.fixture
def without_onnx(monkeypatch):
    monkeypatch.setattr(export_forms, "onnx", None)


def exported(folder: Path, out: Path, **settings):
    """The policy of the run in `folder`, by the loader that was exported with it."""
    export.main(export.Args(run=folder, out=out, **settings))
    spec = importlib.util.spec_from_file_location("policy", out / "policy.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Policy()


def pendulum_obs(num: int) -> np.ndarray:
    angle = np.random.default_rng(1).uniform(-3, 3, num)
    return np.stack([np.cos(angle), np.sin(angle), 2 * angle], axis=1)


def edited(folder: Path, copy: Path, **values) -> Path:
    """The run with other values in its policy.pt."""
    shutil.copytree(folder, copy)
    torch.save(torch.load(copy / "policy.pt", weights_only=True) | values, copy / "policy.pt")
    return copy


def config_of(folder: Path, **changed) -> str:
    return json.dumps(json.loads((folder / "config.json").read_text()) | changed)


# --- The policy ---
@every_policy
def test_in_numpy_it_acts_like_the_script(script, flags, trained, tmp_path, without_onnx, capsys):
    folder = trained(script, flags)
    policy, obs = exported(folder, tmp_path / "out"), pendulum_obs(300)
    wanted = load_policy(folder)(obs)
    np.testing.assert_allclose(policy(obs), wanted, atol=2e-5)
    assert wanted.std() > 0 and np.abs(wanted).max() <= 2
    np.testing.assert_allclose(policy(obs[0]), wanted[0], atol=2e-5)  # one observation, as a robot has it
    np.testing.assert_allclose(policy(obs.reshape(2, 150, 3)), wanted.reshape(2, 150, 1), atol=2e-5)
    found = json.loads((tmp_path / "out" / "export.json").read_text())
    assert found["states"] == "recorded" and found["policy.npz"]["difference"] <= 1e-5
    assert set(found["bytes"]) == {"policy.npz", "policy.py"} and min(found["microseconds"].values()) > 0
    assert "pip install -r requirements-tools.txt" in capsys.readouterr().out


def test_a_python_without_torch_runs_it(trained, tmp_path, without_onnx):
    folder = trained("mopo")
    exported(folder, tmp_path / "out", alarm=True)
    code = """
import sys
sys.modules["torch"] = None
sys.path.insert(0, ".")
import numpy as np
from policy import Policy
policy, obs = Policy(), np.array([1.0, 0.0, 0.5])
print(policy(obs)[0], policy.alarm(obs, policy(obs)))
"""
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path / "out", capture_output=True, text=True)
    action, alarm = done.stdout.split()
    assert float(action) == pytest.approx(load_policy(folder)(np.array([1.0, 0.0, 0.5]))[0], abs=2e-5), done.stderr
    assert alarm == "False"


def test_box_and_units_are_inside_and_states_are_drawn_where_the_data_are_gone(trained, tmp_path, without_onnx):
    config = config_of(trained("td3_bc"), data="/gone.npz")
    box = {"action_low": torch.tensor([-3.0]), "action_high": torch.tensor([1.0])}
    units = {
        "obs_shift": torch.tensor([1e6, -5, 0], dtype=torch.float64),
        "obs_scale": torch.tensor([1e-3, 100, 1]).double(),
    }
    folder = edited(trained("td3_bc"), tmp_path / "run", config=config, **box, **units)
    policy, obs = (
        exported(folder, tmp_path / "out"),
        units["obs_shift"].numpy() + units["obs_scale"].numpy() * pendulum_obs(50),
    )
    np.testing.assert_allclose(policy(obs), load_policy(folder)(obs), atol=2e-5)
    np.testing.assert_allclose(policy(obs), 2 * load_policy(trained("td3_bc"))(pendulum_obs(50)) / 2 - 1, atol=1e-4)
    assert json.loads((tmp_path / "out" / "export.json").read_text())["states"] == "drawn"


def test_a_minari_dataset_is_looked_for_by_its_name(trained, tmp_path, without_onnx, capsys):
    config = json.loads(config_of(trained("td3_bc"), data="Minari dataset"))  # as benchmarks/keep.py has it
    config["args"]["dataset"] = "here/log-v0"
    (minari_folder() / "here" / "log-v0").mkdir(parents=True)
    exported(edited(trained("td3_bc"), tmp_path / "run", config=json.dumps(config)), tmp_path / "out")
    assert "states      not the recorded ones: " in capsys.readouterr().out  # it is empty


def test_what_acts_differently_is_not_left(trained, tmp_path, without_onnx, monkeypatch):
    def wrong(policy):
        p = export_forms.policy_arrays(policy)
        return p | {"actor_bias2": p["actor_bias2"] + 1e-4}

    monkeypatch.setattr(export, "policy_arrays", wrong)
    with pytest.raises(InputError, match="policy.npz acts differently, by .* nothing is exported"):
        exported(trained("bc"), tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_another_candidate_passes_only_where_the_critic_cannot_tell_and_seldom(trained):
    folder, obs = trained("onestep", "--improvement easy-bcq"), pendulum_obs(1000)
    policy, wanted = export.Policy(torch.load(folder / "policy.pt", weights_only=True)), load_policy(folder)(obs)
    few, many = wanted.copy(), wanted.copy()
    few[:5] *= 0.5
    many[:50] *= 0.5
    with pytest.raises(InputError, match="acts differently"):
        export.differs("it", policy, obs, wanted, few)
    for param in policy.actor.critic.parameters():
        param.data.zero_()
    assert export.differs("it", policy, obs, wanted, few)["ties"] == pytest.approx(0.005)
    with pytest.raises(InputError, match=r"5.0% of its choices are ties"):
        export.differs("it", policy, obs, wanted, many)


# --- The alarm ---
@pytest.fixture(scope="module")
def warned(trained, tmp_path_factory):
    """A policy without a model of its own, with the ensemble of another run; and what was measured."""
    cache = trained("mopo").parent / "cache" / "dynamics"
    before = set(cache.glob("*.pt"))
    trained("mopo", "--seed 7")
    (ensemble,) = set(cache.glob("*.pt")) - before
    out = tmp_path_factory.mktemp("warned") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_forms, "onnx", None)
        policy = exported(trained("bc", "--seed 7"), out, alarm=True, dynamics=str(ensemble), false_alarms=0.01)
    return policy, json.loads((out / "export.json").read_text())["alarms"]


def test_the_alarm_is_quiet_on_the_log_and_loud_off_it(warned):
    policy, shares = warned
    assert shares["held-out rows"] < 0.03 and shares["each column 10 deviations off"] > 0.95
    obs = pendulum_obs(500)
    assert policy.alarm(obs, policy(obs)).mean() < 0.1 and policy.alarm(obs + 20, policy(obs)).all()
    assert policy.alarm(obs[0], policy(obs[0])).shape == ()


def test_an_observation_that_is_no_number_gives_an_alarm(warned):
    assert warned[0].alarm(np.array([1.0, np.nan, 0.0]), np.zeros(1))


def test_an_alarm_needs_the_log_as_it_was(trained, tmp_path, without_onnx):
    folder = edited(trained("mopo"), tmp_path / "run", config=config_of(trained("mopo"), data_hash="another"))
    with pytest.raises(InputError, match="has changed since that run"):
        exported(folder, tmp_path / "out", alarm=True)


@pytest.mark.parametrize("share", [0.0, 1.0, 2.0, float("nan")])
def test_a_share_of_false_alarms_that_none_can_be_is_refused_before_anything_is_fitted(trained, tmp_path, share):
    with pytest.raises(InputError, match="--false-alarms must lie between 0 and 1"):
        exported(trained("mopo"), tmp_path / "out", alarm=True, false_alarms=share)


def test_an_alarm_that_differs_from_the_ensemble_is_not_left(trained, tmp_path, without_onnx, monkeypatch):
    def wrong(alarm):
        p = export_forms.alarm_arrays(alarm)
        return p | {"ensemble_bias0": p["ensemble_bias0"] + 0.1}

    monkeypatch.setattr(export, "alarm_arrays", wrong)
    with pytest.raises(InputError, match="alarm.npz differs from the ensemble, by .*: nothing is exported"):
        exported(trained("mopo"), tmp_path / "out", alarm=True)
    assert not any(tmp_path.iterdir())


# --- What is not exported ---
def test_a_folder_that_is_there_stays(trained, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="is there already: delete it, or name another"):
        exported(trained("bc"), tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write to .* choose another folder"):
        exported(trained("bc"), tmp_path / "file" / "out")


def test_runs_without_a_policy_are_one_sentence(trained, tmp_path):
    with pytest.raises(InputError, match="holds no policy"):
        exported(tmp_path, tmp_path / "out")
    with pytest.raises(InputError, match="trained no policy"):
        exported(trained("fqe"), tmp_path / "out")


def test_a_policy_of_a_form_of_its_own_is_one_sentence(trained, tmp_path, without_onnx, monkeypatch):
    from algos import bc

    class Table(torch.nn.Module):
        act = staticmethod(lambda obs: obs[:, :1])

    monkeypatch.setattr(bc, "Table", Table, raising=False)
    folder = edited(trained("bc"), tmp_path / "run", **{"class": "Table", "sizes": {}, "actor": {}})
    with pytest.raises(InputError, match="a policy of the class Table is not exported"):
        exported(folder, tmp_path / "out")


def test_a_module_that_the_run_names_needs_trust(trained, tmp_path):
    config = json.loads((trained("bc") / "config.json").read_text())
    config["args"]["env_id"] = "evil:Env-v0"
    folder = edited(trained("bc"), tmp_path / "run", config=json.dumps(config))
    with pytest.raises(InputError, match="give --trust to import evil"):
        exported(folder, tmp_path / "out")


# --- ONNX ---
@pytest.mark.slow
@every_policy
def test_in_onnxruntime_it_acts_like_the_script(script, flags, trained, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    folder, obs = trained(script, flags), pendulum_obs(300)
    policy, wanted = exported(folder, tmp_path / "out", alarm=script == "mopo"), load_policy(folder)(obs)
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "policy.onnx"))
    np.testing.assert_allclose(session.run(["action"], {"obs": obs})[0], wanted, atol=2e-5)
    np.testing.assert_allclose(session.run(["action"], {"obs": obs[:1]})[0], wanted[:1], atol=2e-5)
    if script == "mopo":
        session = onnxruntime.InferenceSession(str(tmp_path / "out" / "alarm.onnx"))
        far = np.where(np.arange(300)[:, None] < 150, obs, obs + 50)
        how_far, alarm = session.run(["disagreement", "alarm"], {"obs": far, "action": wanted})
        np.testing.assert_allclose(how_far, policy.disagreement(far, wanted), rtol=1e-3)
        assert alarm[150:].all() and not alarm[:150].all()
