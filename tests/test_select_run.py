"""The choice among finished runs: known policies in a small known problem, each number by NumPy, and its study."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from algos import bc, iql, mopo, td3_bc
from benchmarks import select_run
from benchmarks.select_run import CRITERIA, Args, Judge
from benchmarks.studies import selection
from common import InputError
from common.dataset import load_dataset

LENGTH = 20  # steps of an episode
SMALL = dict(gamma=0.9, num_updates=400, num_starts=20, dynamics_hidden_size=32, dynamics_max_epochs=40, compile=False)


def log(file: Path, seed: int = 0) -> Path:
    """A point on [-1, 1] moved by random actions, x' = x + 0.2 a; the reward is -x'^2."""
    rng, rows = np.random.default_rng(seed), []
    for _ in range(100):
        x = rng.uniform(-1, 1)
        for step in range(LENGTH):
            action = rng.uniform(-1, 1)
            next_x = np.clip(x + 0.2 * action, -1, 1)
            rows.append((x, action, -(next_x**2), next_x, step == LENGTH - 1))
            x = next_x
    x, action, reward, next_x, timeout = np.array(rows, np.float32).T
    arrays = {"observations": x[:, None], "next_observations": next_x[:, None], "actions": action[:, None]}
    np.savez(file, **arrays, rewards=reward, terminals=np.zeros(len(x), bool), timeouts=timeout != 0)
    return file


def linear(script, gain: float):
    """An actor of the script that acts by tanh(gain x)."""
    actor = script.Actor(1, 1, (2,))
    with torch.no_grad():
        actor.net[0].weight.copy_(torch.tensor([[1.0], [-1.0]]))
        actor.net[2].weight.copy_(torch.tensor([[gain, -gain]]))
        actor.net[0].bias.zero_()
        actor.net[2].bias.zero_()
    return actor


def save_run(folder: Path, dataset: Path, gain: float, script=bc, score: float = 0.0, **settings) -> Path:
    folder.mkdir(parents=True)
    data = load_dataset(str(dataset))
    args = asdict(script.Args(dataset=str(dataset), num_updates=20, hidden_sizes=(2,), **settings))
    config = {"algo": script.__name__.split(".")[-1], "args": args, "data_hash": data.data_hash, "env": None}
    config |= {"commit": "", "versions": {}, "python": "3", "command": "python algos/bc.py", "ref_scores": [-20.0, 0.0]}
    config |= {"behaviour_return": float(data.episode_returns.mean())}
    (folder / "config.json").write_text(json.dumps(config))
    policy = {"actor": linear(script, gain).state_dict(), "class": "Actor", "config": json.dumps(config)}
    policy |= {"sizes": {"obs_dim": 1, "action_dim": 1, "hidden_sizes": (2,)}}
    for name in ("action_low", "action_high", "obs_shift", "obs_scale"):
        policy[name] = torch.as_tensor(getattr(data, name))
    torch.save(policy, folder / "policy.pt")
    row = f"20,1.0,20.0,{score / 5 - 20},{score}"
    (folder / "progress.csv").write_text(f"update,seconds,updates_per_second,return_mean,normalised_score\n{row}\n")
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Three runs: home to 0, nearly standing still, away from 0."""
    home = tmp_path_factory.mktemp("home")
    file = log(home / "log.npz")
    for name, gain, score in (("bad", 3.0, 5.0), ("good", -3.0, 95.0), ("middling", -0.2, 60.0)):
        save_run(home / "runs" / name, file, gain, score=score)
    return home


@pytest.fixture(scope="module")
def rows(home):
    runs = select_run.finished_runs((home / "runs",), False)
    return select_run.rank(runs, Judge(select_run.data_of(runs, False), Args(runs=(), **SMALL)))


def judge_of(home, **settings) -> Judge:
    return Judge(load_dataset(str(home / "log.npz")), Args(runs=(), **SMALL | settings))


def named(rows: list[dict]) -> list[str]:
    return [Path(row["run"]).name for row in rows]


@pytest.mark.parametrize("by", ["fqe", "model", "penalised"])
def test_values_and_returns_put_the_good_policy_before_the_middling_and_that_before_the_bad(by, rows):
    ordered = select_run.best_first(rows, by)
    assert named(ordered) == ["good", "middling", "bad"]
    assert ordered[0]["wins"][by] > 0.95 and ordered[2]["wins"][by] == 0


def test_distance_prefers_who_acts_like_the_log(rows):
    # the logged actions have mean 0: who does nearly nothing is nearest
    assert named(select_run.best_first(rows, "distance"))[0] == "middling"


def test_where_the_log_leads_the_value_of_fqe_is_about_the_true_one(home, rows):
    starts, true = judge_of(home).starts.numpy()[:, 0], {}
    for name, gain in (("good", -3.0), ("middling", -0.2)):  # the bad one leans on a wall, as nobody in the log did
        x, rewards = starts, []
        for _ in range(100):
            x = np.clip(x + 0.2 * np.tanh(gain * x), -1, 1)
            rewards.append(-(x**2).mean())
        true[name] = np.array(rewards) @ 0.9 ** np.arange(100)
    for row in rows:
        if (name := Path(row["run"]).name) in true:
            assert row["fqe"] == pytest.approx(true[name], abs=0.6)
        assert row["penalised"] < row["model"]


def test_a_parent_folder_gives_a_table_a_choice_and_a_json(home, capsys, tmp_path):
    unfinished = Path(shutil.copytree(home / "runs", tmp_path / "runs")) / "bad" / "policy.pt"
    unfinished.unlink()
    select_run.main(Args(runs=(tmp_path / "runs",), by="fqe", json=tmp_path / "choice.json", **SMALL))
    out, err = capsys.readouterr()
    assert "bad holds no policy" in err and "bad" not in out
    assert f"take        {tmp_path}/runs/good: by fqe it comes first in 100% of the draws" in out
    assert "others take model good, penalised good, distance middling" in out
    choice = json.loads((tmp_path / "choice.json").read_text())
    assert choice["take"] == f"{tmp_path}/runs/good" and named(choice["runs"]) == ["good", "middling"]
    assert choice["horizon"] == LENGTH and choice["runs"][0]["own"] is None
    select_run.main(Args(runs=(tmp_path / "runs",), by="own", **SMALL))
    assert "take        none: own knows nothing" in capsys.readouterr().out


# --- Each number ---
class Shift(torch.nn.Module):
    """An ensemble of two elites that move everything by 1 and by 2, pay that, and are sure of it but for 0.5 and 3."""

    elites = torch.tensor([0, 1])

    def predict(self, obs, action):
        by = torch.tensor([1.0, 2.0])[:, None, None]
        std = torch.zeros(2, len(obs), 2)
        std[:, :, 1] = torch.tensor([[0.5], [3.0]])  # of the reward: it is not sampled
        return obs + by, by[..., 0].expand(2, len(obs)), std


def test_returns_in_the_model_end_where_the_rule_says_and_pay_for_doubt(home):
    judge = judge_of(home)
    rule = lambda obs, action, next_obs: next_obs[:, 0] > 8  # noqa: E731
    judge.__dict__["simulator"] = Shift(), rule
    run = select_run.finished(home / "runs" / "good", False)
    plain, penalised = judge.model(run)
    assert plain.shape == (2, len(judge.starts))
    for elite, by in enumerate((1.0, 2.0)):
        steps = np.floor((8 - judge.starts[:, 0].numpy()) / by) + 1
        np.testing.assert_allclose(plain[elite], by * steps, rtol=1e-5)
        np.testing.assert_allclose(penalised[elite], (by - 3.0) * steps, rtol=1e-5)  # the least sure of all members
    judge.horizon = 3
    np.testing.assert_allclose(judge.model(run)[0][1], 6.0)


@pytest.mark.parametrize("script", [td3_bc, iql])
def test_own_values_are_those_of_the_run_s_critic_in_the_units_of_the_data(script, home, tmp_path):
    settings = {} if script is td3_bc else {"reward_scale": "returns"}
    folder = save_run(tmp_path / "run", home / "log.npz", -3.0, td3_bc, **{})
    config = json.loads((folder / "config.json").read_text())
    config["algo"], config["args"] = script.__name__.split(".")[-1], config["args"] | settings
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    critic, mean, std = script.Critic(1, 1, (2,)), torch.tensor([0.3]), torch.tensor([0.5])
    agent = {f"critic.{key}": value for key, value in critic.state_dict().items()}
    agent |= {"actor.obs_mean": mean, "actor.obs_std": std} if script is td3_bc else {}
    torch.save({"modules": {"agent": agent}, "progress": {"update": 20}}, folder / "checkpoint.pt")
    judge = judge_of(home)
    run = SimpleNamespace(folder=folder, config=config, args=config["args"], policy=lambda obs: np.tanh(-3 * obs))
    x = judge.starts
    weights, bias = zip(
        *[(m.weight.detach().numpy(), m.bias.detach().numpy()) for m in critic.net if hasattr(m, "bias")]
    )
    seen = (x - mean) / std if script is td3_bc else x
    features = np.stack([np.concatenate([seen.numpy(), np.tanh(-3 * x.numpy())], axis=1)] * 2)
    wanted = (np.maximum(features @ weights[0] + bias[0], 0) @ weights[1] + bias[1])[..., 0]
    if script is iql:
        returns = judge.data.episode_returns
        wanted = wanted * (returns.max() - returns.min()) / 1000
    np.testing.assert_allclose(judge.own(run), wanted, rtol=1e-4, atol=1e-6)
    torch.save({"modules": {"agent": agent}, "progress": {"update": 10}}, folder / "checkpoint.pt")
    assert judge.own(run) is None  # of an older policy
    torch.save({"modules": {"agent": {"critic.net": 0}}, "progress": {"update": 20}}, folder / "checkpoint.pt")
    with pytest.raises(InputError, match="checkpoint.pt holds no critic of"):
        judge.own(run)


def test_distance_is_the_mean_square_in_the_box(home, rows):
    data = load_dataset(str(home / "log.npz"))
    action = np.tanh(-3 * data.obs.numpy())
    good = next(row for row in rows if row["run"].endswith("good"))
    assert good["distance"] == pytest.approx(((action - data.action.numpy()) ** 2)[::2].mean(), rel=1e-4)


def test_what_the_rewards_do_not_allow_comes_last():
    data = SimpleNamespace(reward=torch.tensor([-4.0, 1.0]))
    judge = SimpleNamespace(data=data, args=Args(runs=()), horizon=50)
    most = Judge.most(judge, SimpleNamespace(args={"gamma": 0.9}))
    assert most == pytest.approx({"fqe": 140, "own": 14, "model": 70, "penalised": 70, "distance": np.inf})
    mean = {"fqe": 139.0, "own": 15.0, "model": 71.0, "penalised": -np.inf, "distance": 9.0}
    assert select_run.impossible(mean, most) == ["own", "model", "penalised"]
    data.reward = torch.tensor([-4.0, -1.0])  # an episode may end after its first step
    assert Judge.most(judge, SimpleNamespace(args={}))["model"] == pytest.approx(-1 + 0.1 * 4 * 50)
    rows = [
        {"run": name, "fqe": value, "impossible": bad} for name, value, bad in (("a", 9.0, ["fqe"]), ("b", 1.0, []))
    ]
    rows += [{"run": "c", "fqe": np.nan, "impossible": []}, {"run": "d", "fqe": 2.0, "impossible": []}]
    assert [row["run"] for row in select_run.best_first(rows, "fqe")] == ["d", "b", "a", "c"]


@pytest.mark.parametrize("shared", [True, False])
def test_how_often_a_run_wins_is_that_of_a_bootstrap_by_hand(shared):
    rng = np.random.default_rng(1)
    values = [rng.normal(size=(2, 6)) + shift for shift in (0.0, 0.2, -0.3)]
    won = np.zeros(3)
    for _ in range(4_000):
        units, members = rng.integers(6, size=6), [rng.integers(2, size=2) for _ in values]
        members = [members[0]] * 3 if shared else members
        won[np.argmax([v[m][:, units].mean() for v, m in zip(values, members)])] += 1
    np.testing.assert_allclose(select_run.wins(values, shared), won / 4_000, atol=0.06)


def test_start_states_are_drawn_alike_for_all_runs():
    hard = np.random.default_rng(0).normal(0, 100, (1, 30))  # some starts are far better than others, for everybody
    assert select_run.wins([hard, hard + 0.01], True).tolist() == [0, 1]


def test_a_run_is_measured_once_and_again_when_its_policy_is_another(home, tmp_path, monkeypatch):
    folder, judge, calls = save_run(tmp_path / "run", home / "log.npz", -1.0), judge_of(home), []
    values = {name: np.ones((1, 2)) for name in CRITERIA} | {"own": None}
    monkeypatch.setattr(Judge, "measure", lambda self, run: calls.append(run) or values)
    for _ in range(2):
        found = select_run.measured(judge, select_run.finished(folder, False))
    assert len(calls) == 1 and found["own"] is None and found["fqe"].tolist() == [[1, 1]]
    shutil.copy(save_run(tmp_path / "another", home / "log.npz", -1.5) / "policy.pt", folder)
    select_run.measured(judge, select_run.finished(folder, False))
    select_run.measured(judge_of(home, horizon=7), select_run.finished(folder, False))
    assert len(calls) == 3


# --- Refusals ---
def test_an_ensemble_does_not_judge_what_learned_in_it(home, tmp_path):
    learned = save_run(tmp_path / "run", home / "log.npz", -1.0, script=mopo, seed=7)
    free = save_run(tmp_path / "free", home / "log.npz", -1.0, seed=7)  # bc: has no ensemble
    judge = judge_of(home, dynamics_seed=7)
    with pytest.raises(InputError, match="give another --dynamics-seed"):
        select_run.measured(judge, select_run.finished(learned, False))
    assert np.isfinite(select_run.measured(judge, select_run.finished(free, False))["model"]).all()


def test_runs_among_which_there_is_no_choice_are_refused_in_one_sentence(home, tmp_path):
    def error(*paths: Path) -> str:
        with pytest.raises(InputError) as caught:
            select_run.main(Args(runs=paths, **SMALL))
        assert "\n" not in str(caught.value)
        return str(caught.value).replace(str(tmp_path), "T")

    assert error().startswith("no run was named: ") and error(tmp_path / "no").startswith("no run in T/no: ")
    assert error(home / "runs" / "good") == "a choice needs two finished runs, and there are 1: name more"
    other = save_run(tmp_path / "other", log(tmp_path / "other.npz", seed=1), -3.0)
    assert "T/other of T/other.npz: a choice is one among runs of the same data" in error(home / "runs", other)
    with pytest.raises(InputError, match="--gamma must be in"):
        judge_of(home, gamma=1.0)
    log(tmp_path / "other.npz", seed=2)
    changed = Path(shutil.copytree(other, tmp_path / "again"))
    assert "was trained on data that T/other.npz no longer holds" in error(other, changed)


def test_a_run_that_names_a_module_is_left_out_without_trust(home, tmp_path, capsys):
    folder = save_run(tmp_path / "run", home / "log.npz", -3.0, env_id="theirs:Theirs-v0")
    assert not select_run.finished_runs((folder,), False)
    assert "give --trust to import theirs" in capsys.readouterr().err


def test_the_same_data_under_another_name_are_the_same(home, tmp_path):
    twin = save_run(tmp_path / "twin", Path(shutil.copy(home / "log.npz", tmp_path / "copy.npz")), -3.0)
    runs = select_run.finished_runs((home / "runs", twin), False)
    assert len(runs) == 4 and select_run.data_of(runs, False).name == str(home / "log.npz")


# --- The study ---
SCORE = np.array([10.0, 90.0, 40.0, 70.0, 20.0])


def test_spearman_and_regret_are_those_of_numpy():
    merit = np.array([0.3, 2.0, 5.0, 1.0, -1.0])
    ranks = [sorted(x).index(v) for x in (SCORE.tolist(), merit.tolist()) for v in x]
    apart = np.array(ranks[:5]) - ranks[5:]
    assert selection.correlation(SCORE, merit) == pytest.approx(1 - 6 * (apart**2).sum() / (5 * 24))
    assert selection.regret(SCORE, merit) == 50  # it takes the third
    unknown = np.where(merit == 5, np.nan, merit)
    assert selection.regret(SCORE, unknown) == 0
    assert selection.regret(SCORE, np.full(5, np.nan)) == 90 - SCORE.mean()
    assert selection.correlation(SCORE, unknown) == pytest.approx(
        1 - 6 * 2 / (4 * 15)
    )  # two of four in each other's place


def test_the_regret_among_few_is_the_mean_over_choices_of_five():
    rng = np.random.default_rng(0)
    score, merit = rng.uniform(0, 100, (2, 12))
    draws = [rng.permutation(12)[:5] for _ in range(4_000)]
    wanted = np.mean([score[d].max() - score[d][merit[d].argmax()] for d in draws])
    assert selection.regret_of_few(score, merit) == pytest.approx(wanted, abs=2)
    assert selection.regret_of_few(SCORE[:3], SCORE[:3]) == 0


def case(dataset: str, **known: list[float]) -> list[dict]:
    rows = [dict.fromkeys(CRITERIA, np.nan) for _ in SCORE]
    for i, row in enumerate(rows):
        row |= {"dataset": dataset, "algo": "bc", "variant": "", "seed": i, "updates": 9, "score": SCORE[i]}
        row |= {"impossible": ""} | {name: values[i] for name, values in known.items()}
    return rows


def test_the_default_has_the_least_mean_regret_and_is_judged_on_sets_that_did_not_choose_it(tmp_path):
    right, wrong = SCORE.tolist(), (-SCORE).tolist()
    rows = case("a", fqe=right, model=wrong) + case("b", fqe=right, model=wrong) + case("c", fqe=wrong, model=right)
    regrets = selection.regrets_of(rows)
    assert regrets["fqe"] == {"a": 0, "b": 0, "c": 80} and regrets["model"] == {"a": 80, "b": 80, "c": 0}
    assert regrets["own"] == regrets["random"] == dict.fromkeys("abc", 44)
    text = selection.report(rows)
    assert "It stands on 15 runs of 3 sets (a 5 of 1 methods, b 5 of 1 methods, c 5 of 1 methods)" in text
    assert "**The least mean regret has fqe**: 26.7" in text
    equal = case("a", fqe=right, model=right)
    assert "**The least mean regret has fqe and model**: 0.0" in selection.report(equal)
    # without a or b fqe and model both cost 40 and own 44, the first of equals is taken; without c fqe costs nothing
    assert "| c | fqe | 80.0 | 0.0 | 44.0 |" in text
    (tmp_path / "selection.csv").write_text(selection.csv_of(rows))
    assert selection.regrets_of(selection.read_rows(tmp_path / "selection.csv")) == regrets


def test_the_study_goes_from_run_folders_to_its_tables(home, tmp_path, monkeypatch, capsys):
    lone = save_run(tmp_path / "lone", log(tmp_path / "lone.npz", seed=3), -3.0)
    values = {"bad": 1.0, "good": 3.0, "middling": 2.0}
    monkeypatch.setattr(
        selection, "measured",
        lambda judge, run: {n: None if n == "own" else np.full((1, 2), values[run.folder.name]) for n in CRITERIA},
    )  # fmt: skip
    selection.main(selection.Args(runs=(home / "runs", lone), out=tmp_path / "out"))
    out, err = capsys.readouterr()
    assert "has a single finished run" in err and "It stands on 3 runs of 1 sets" in out
    rows = selection.read_rows(tmp_path / "out" / "selection.csv")
    assert [row["score"] for row in rows] == [5, 95, 60] and np.isnan(rows[0]["own"])
    values["bad"] = 4.0  # measured again
    kept = selection.csv_of(rows[:2] + [rows[2] | {"seed": 77}])
    (tmp_path / "out" / "selection.csv").write_text(kept)
    selection.main(selection.Args(runs=(home / "runs",), out=tmp_path / "out", add=True))
    after = selection.read_rows(tmp_path / "out" / "selection.csv")
    assert [row["fqe"] for row in after] == [4, 3, 2, 2] and after[3]["seed"] == "77"
    with pytest.raises(InputError, match="no dataset has two finished runs"):
        selection.main(selection.Args(runs=(lone,), out=tmp_path / "out"))


def test_select_run_decides_by_what_the_kept_study_found_best():
    rows = selection.read_rows(selection.RESULTS / "selection.csv")
    assert selection.least(selection.regrets_of(rows), selection.sets_of(rows)) == select_run.DEFAULT
    assert (selection.RESULTS / "selection.md").read_text() == selection.report(rows)
