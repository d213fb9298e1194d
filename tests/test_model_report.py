"""The model report: its measures against NumPy, and what is planted is said, what is not is not."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import model_measures as measures
from benchmarks import model_report
from benchmarks.doctor import FINE, LOOK, SERIOUS, UNKNOWN
from common import InputError
from common.dataset import load_dataset
from tests.test_compare import browser  # noqa: F401

DECAY, PUSH = 0.9, 0.2


def recorded(num=3_000, limit=60, noise=None, falls=False, pay=1.0):
    """A point that is pushed at random and slows down, obs (place, speed); falls: beyond 1 an episode is over."""
    rng, rows = np.random.default_rng(0), []
    while len(rows) < num or not (rows[-1][3] or rows[-1][4]):
        if not rows or rows[-1][3] or rows[-1][4]:
            obs, steps = rng.uniform(-0.5, 0.5, 2), 0
        action, steps = rng.uniform(-1, 1, 1), steps + 1
        after = np.array([obs[0] + 0.2 * obs[1], DECAY * obs[1] + PUSH * action[0]])
        fallen = falls and abs(after[0]) > 1
        rows.append((obs, action, pay + 0.1 * after[1], fallen, steps == limit and not fallen, after))
        obs = after
    names = ("observations", "actions", "rewards", "terminals", "timeouts", "next_observations")
    out = {name: np.array(x, bool if name[0] == "t" else np.float32) for name, x in zip(names, zip(*rows))}
    if noise is not None:
        now, later = noise * rng.normal(size=(2, len(rows)))
        inside = ~(out["terminals"] | out["timeouts"])[:-1]
        later[:-1][inside] = now[1:][inside]
        for name, x in (("observations", now), ("next_observations", later)):
            out[name] = np.column_stack([out[name], x]).astype(np.float32)
    return out


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Findings by check and numbers; the small ensembles of the module are fitted once."""
    folder = tmp_path_factory.mktemp("reports")

    def of(name, rows=None, **args):
        if rows is not None:
            np.savez(folder / f"{name}.npz", **rows)
        small = dict(dynamics_hidden_size=32, dynamics_max_epochs=12, refit=False) | args
        case, found = model_report.case_of(model_report.Args(str(folder / f"{name}.npz"), **small))
        return {f.check: f for f in found + model_report.checked(case)}, case

    of.folder = folder
    return of


@pytest.fixture(scope="module")
def good(report):
    return report("good", recorded(), refit=True)


# --- An ensemble without a fit ---
class Perfect:
    """Knows the point; `off` (members,) is added to each member's predictions, scaled by the push."""

    def __init__(self, off=(0.0, 0.0), std=0.1):
        self.off, self.std = torch.tensor(off), std
        self.num_members, self.elites = len(off), torch.arange(len(off))

    def predict(self, obs, action):
        after = torch.stack([obs[:, 0] + 0.2 * obs[:, 1], DECAY * obs[:, 1] + PUSH * action[:, 0]], dim=1)
        off = self.off[:, None] * action[:, 0].abs()
        next_obs, reward = after + off[..., None], 1 + 0.1 * after[:, 1] + off
        return next_obs, reward, self.std * action[:, 0].abs()[None, :, None].expand(self.num_members, -1, 3)

    def step(self, obs, action, order, noise, all_members=False):
        said = self.predict(obs, action)
        return said[0][0], said[1][0], said


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    np.savez(path := tmp_path_factory.mktemp("data") / "log.npz", **recorded())
    return load_dataset(str(path))


def test_a_perfect_model_makes_no_error_along_recorded_actions_and_no_change_makes_numpys(data):
    first, length = measures.windows(data, torch.ones(len(data.obs), dtype=bool), 30, torch.Generator())
    assert length == 30 and len(first) > 1_000
    model, still = measures.along(Perfect(), data, first, length)
    assert model.shape == (30, len(first)) and model.max() < 1e-5
    at, obs = first.numpy(), data.obs.numpy().astype(np.float64)
    by_hand = np.sqrt((((obs[at] - data.next_obs.numpy()[at + 9]) / obs.std(axis=0)) ** 2).mean(axis=1))
    np.testing.assert_allclose(still[9], by_hand, rtol=1e-4)


def test_sequences_stay_inside_episodes_and_inside_what_was_held_out(data):
    unseen, how = measures.episodes_apart(data, seed=0)
    ends = data.episode_end.numpy()
    assert how == f"{ends.sum() // 10} of {ends.sum()} episodes"
    first, length = measures.windows(data, unseen, 25, torch.Generator())
    for row in first.tolist():
        assert unseen[row : row + length].all() and not ends[row : row + length - 1].any()
    assert len(first) == int(unseen.sum()) // 60 * (60 - 24)
    few = replace(data, episode_end=torch.arange(len(data.obs)) % 1_000 == 999)
    unseen, how = measures.episodes_apart(few, seed=0)
    assert "last tenth of each of the 3" in how and unseen.nonzero()[:, 0].tolist()[::100] == [900, 1900, 2900]


def test_a_dropped_row_breaks_a_sequence(data, monkeypatch):
    monkeypatch.setattr(measures, "ROWS", len(data.obs))
    cut = replace(data, cut_rows=torch.tensor([10]))
    everything = torch.ones(len(data.obs), dtype=bool)
    first = set(measures.windows(cut, everything, 5, torch.Generator())[0].tolist())
    missing = set(measures.windows(data, everything, 5, torch.Generator())[0].tolist()) - first
    assert missing == {7, 8, 9, 10}


def test_doubts_that_grow_as_the_error_does_have_rank_correlation_1(data):
    model, rows = Perfect(off=(0.0, 0.3, 0.9)), slice(0, 400)
    mean, std = measures.predicted(model, data.obs[rows], data.action[rows])
    true = measures.recorded(data, torch.arange(400))
    said = measures.doubts(mean, std, model.elites, true)
    assert {name: round(measures.spearman(*pair), 6) for name, pair in said.items()} == dict.fromkeys(said, 1.0)
    size = np.abs(data.action.numpy()[rows, 0])
    by_hand = {  # the mean is off by 0.4 in each column
        "MOPO's deviation": (0.1 * size * 3**0.5, 0.4 * size * 3**0.5),
        "MOReL's distance": (0.9 * size * 2**0.5, 0.4 * size * 2**0.5),
        "deviation of means": (np.std([0, 0.3, 0.9], ddof=1) * size * 2**0.5, 0.4 * size * 2**0.5),
    }
    for name, (doubt, error) in by_hand.items():
        np.testing.assert_allclose(said[name][0], doubt, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(said[name][1], error, rtol=1e-3, atol=1e-5)


def test_rank_correlation_is_numpys_and_equal_numbers_rank_equally():
    x, y = np.random.default_rng(0).normal(size=(2, 200))
    by_hand = np.corrcoef(x.argsort().argsort(), (x + y).argsort().argsort())[0, 1]
    assert measures.spearman(x, x + y) == pytest.approx(by_hand)
    assert measures.spearman(-x, np.exp(x)) == pytest.approx(-1)
    assert measures.spearman(np.arange(100), np.tile([1, 2, 2, 1], 25)) == pytest.approx(0)
    assert measures.spearman(x, np.ones(200)) == 0


def test_steps_after_an_end_do_not_count_and_the_ending_one_does():
    end = np.array([[0, 1, 0], [0, 0, 1], [1, 1, 0]], bool)
    assert measures.alive(end).tolist() == [[True, True, True], [True, False, True], [True, False, False]]


def test_halts_and_penalties_are_those_of_the_actions(data):
    actions = torch.tensor([0.1, 0.5, 1.0, 0.2]).expand(3, 4)[..., None]
    mdp = SimpleNamespace(dynamics=Perfect(off=(0.0, 0.5)), threshold=0.5)
    mdp.terminal_fn = lambda obs, action, next_obs: action[:, 0] == 0.2
    made = measures.rollouts(mdp, data.obs[:4], actions, torch.Generator())
    np.testing.assert_allclose(made["doubt"], 0.1 * 3**0.5 * actions.squeeze(-1), rtol=1e-5)
    assert made["halted"].tolist() == 3 * [[False, False, True, False]]  # 0.5 * size * sqrt(2) > 0.5
    assert made["end"].tolist() == 3 * [[False, False, False, True]]


# --- The trap: penalties above the reward where episodes can end ---
def paying(reward, cost):
    return {"penalty_coef": 2.5} | {k: {"reward": reward, "penalty": cost} for k in ("recorded", "random")}


@pytest.mark.parametrize(
    "reward, cost, can_end, grade",
    [(2, 6, True, SERIOUS), (2, 1.9, True, FINE), (2, 6, False, LOOK), (-2, 1, True, FINE), (-2, 6, True, LOOK)],
)
def test_a_penalty_above_the_reward_is_serious_where_an_episode_can_end(reward, cost, can_end, grade):
    found = model_report.penalty(paying(reward, cost), can_end)
    assert found.level == grade
    if grade == SERIOUS:
        assert found.text.endswith("it pays to end at once, so take --penalty-coef well below 0.83")


def test_a_penalty_that_only_random_actions_feel_is_to_be_looked_at():
    numbers = paying(2, 1) | {"random": {"reward": 1, "penalty": 3}}
    assert model_report.penalty(numbers, True).level == LOOK and model_report.penalty(numbers, False).level == FINE


# --- What an ensemble without a fit is blamed for ---
def case_with(data, model, threshold=np.inf, halt_reward=-np.inf):
    """Rollouts of 5 steps, in which no episode ends."""
    mdp = SimpleNamespace(dynamics=model, threshold=threshold, halt_reward=halt_reward)
    mdp.terminal_fn = lambda obs, action, next_obs: torch.zeros(len(obs), dtype=torch.bool)
    apart = model, torch.ones(len(data.obs), dtype=torch.bool), "all rows"
    return model_report.Case(data, model, mdp, torch.arange(600), 0.1, 5, apart, 50, torch.Generator())


@pytest.mark.parametrize("std, grade", [(0.14, LOOK), (0.16, FINE)])
def test_deviations_below_half_the_error_are_too_proud_and_their_columns_named(data, std, grade):
    _, found = model_report.holdout(case_with(data, Perfect(off=(0.3, 0.3), std=std)))
    assert (found.check, found.level) == ("calibration", grade)
    named = "within two 0 in obs[0], 0 in obs[1], 0 in reward: the ensemble claims more than it knows"
    assert (named in found.text) == (grade == LOOK)


@pytest.mark.parametrize(
    "off, grade, todo",
    [(0.05, FINE, "from step 16 on no better than that"), (0.1, LOOK, "take --rollout-length 2 or less"),
     (0.2, SERIOUS, "do not train in this model, record more")],
)  # fmt: skip
def test_a_model_that_errs_more_than_no_change_is_blamed_by_where_it_begins_to(data, off, grade, todo):
    (found,) = model_report.open_loop(case_with(data, Perfect(off=(off, off))))
    assert found.level == grade and found.text.endswith(todo)


@pytest.mark.parametrize("push, grade", [(0.94, LOOK), (0.97, FINE)])
def test_morel_halts_too_often_where_that_ends_a_fifth_of_the_recorded_rollouts(data, push, grade):
    # the members part too far where a push is larger: at some step in 1 - push^5 of the rollouts of 5
    case = case_with(data, Perfect(off=(0.0, 1.0)), threshold=push * 2**0.5)
    found, _ = model_report.in_the_model(case)
    assert (found.check, found.level) == ("MOReL halts", grade)
    assert case.numbers["recorded"]["halted by step"][-1] == pytest.approx(1 - push**5, abs=0.03)
    assert ("raise --threshold-coef" in found.text) == (grade == LOOK)


@pytest.mark.parametrize("above, grade", [(1, LOOK), (-1, FINE)])
def test_a_halt_that_pays_more_than_going_on_is_to_be_looked_at_where_random_actions_reach_it(data, above, grade):
    data = replace(data, action=0.9 * data.action)  # what was recorded halts nowhere
    going_on = data.reward.double().mean().item() / 0.01
    case = case_with(data, Perfect(off=(0.0, 1.0)), 0.91 * 2**0.5, going_on + above)
    found, _ = model_report.in_the_model(case)
    assert (found.check, found.level) == ("MOReL halts", grade)
    assert found.text.endswith("so that a policy seeks it: raise --halt-offset") == (grade == LOOK)


# --- Whole reports of fitted ensembles ---
def test_nothing_is_wrong_with_good_data_but_that_no_environment_is_known(good):
    found, case = good
    assert {f.level for f in found.values()} == {FINE, UNKNOWN}
    assert [f.check for f in found.values() if f.level == UNKNOWN] == ["off the data"]
    assert "no environment is known" in found["off the data"].text
    assert "5 of 50 episodes held out" in found["open loop"].text
    errors = case.numbers["open loop"]
    assert len(errors["error"]) == 50 and (errors["error"] < errors["no change"]).all()


def test_held_out_numbers_are_numpys(good):
    _, case = good
    rows, data, model = case.held_out, case.data, case.dynamics
    assert len(rows) == 600
    with torch.no_grad():
        mean, _, std = model.predict(data.obs[rows], data.action[rows])
    place, width = (x[model.elites, :, 0].double().numpy() for x in (mean, std))
    before, after = (x[rows, 0].double().numpy() for x in (data.obs, data.next_obs))
    found = {name: x[0] for name, x in case.numbers["columns"].items()}
    assert found["of no change"] == pytest.approx(((place - after) ** 2).mean() / ((before - after) ** 2).mean())
    assert found["within 2"] == pytest.approx((np.abs(place - after) <= 2 * width).mean())


def test_a_column_of_pure_noise_is_named_and_no_other(report):
    found, case = report("noise", recorded(noise=1.0))
    line = found["held-out rows"]
    assert line.level == LOOK and "in obs[2]: leave out" in line.text and "obs[0]" not in line.text
    share, of_guess = (case.numbers["columns"][name][2] for name in ("of no change", "of a guess"))
    assert of_guess > 0.9 and of_guess / share == pytest.approx(2, abs=0.2)  # no change has the noise of two rows


def test_a_reward_of_pure_noise_is_serious(report):
    rows = recorded()
    rows["rewards"] = np.random.default_rng(1).normal(size=len(rows["rewards"])).astype(np.float32)
    assert report("lottery", rows)[0]["held-out rows"].level == SERIOUS


def test_falls_make_a_large_lambda_serious_and_a_small_one_not(report):
    found, case = report("falls", recorded(falls=True), penalty_coef=0.01, termination="none")
    assert found["MOPO's penalty"].level == FINE and case.numbers["ends"]["flags"] > 20
    found, case = report("falls", penalty_coef=100.0, termination="none")
    assert found["MOPO's penalty"].level == SERIOUS
    advice = float(found["MOPO's penalty"].text.split()[-1])
    numbers = case.numbers["recorded"]
    assert advice == pytest.approx(100 * numbers["reward"] / numbers["penalty"], rel=0.02)


def test_flags_that_contradict_the_rule_and_a_model_that_misses_ends_are_said(report):
    found, case = report("falls", recorded(falls=True), termination="none")
    assert "the rule ends 0 of" in found["ends"].text and found["ends"].level == LOOK
    case.mdp.terminal_fn = lambda obs, action, next_obs: next_obs[:, 0].abs() > 1
    (found,) = model_report.ends(case)
    assert "0 rows differ" in found.text and found.level == FINE
    case.mdp.terminal_fn = lambda obs, action, next_obs: next_obs[:, 0].abs() > 0.9
    assert "choose another --termination" in model_report.ends(case)[0].text
    true = {tuple(x) for x in case.data.next_obs[case.data.terminal > 0.5].tolist()}
    case.mdp.terminal_fn = lambda obs, action, next_obs: torch.tensor([tuple(x) in true for x in next_obs.tolist()])
    (found,) = model_report.ends(case)
    assert found.level == LOOK and "in the model 0 of the" in found.text


def test_an_ensemble_of_another_seed_is_noticed_by_its_error(report, good):
    sizes, file = {"num_members": 7, "num_elites": 5, "hidden_size": 32}, report.folder / "mine.pt"
    torch.save({"model": good[1].dynamics.state_dict(), "dims": [2, 1], "epochs": 1, "sizes": sizes}, file)
    args = model_report.Args(str(report.folder / "good.npz"), dynamics=str(file), refit=False)
    assert [f.text for f in model_report.case_of(args)[1]] == []
    (line,) = model_report.case_of(replace(args, seed=1))[1]
    assert line.level == LOOK and "another seed" in line.text


def test_rows_in_no_order_have_a_report_without_an_open_loop(report):
    rows, order = recorded(), np.random.default_rng(0).permutation(3_000)
    found, case = report("shuffled", {name: x[order] for name, x in rows.items()}, refit=True)
    assert not case.data.ordered and found["open loop"].level == UNKNOWN
    assert len(case.numbers["recorded"]["halted by step"]) == 1


def test_the_environment_tells_the_true_error_off_the_data(monkeypatch):
    data = load_dataset("pendulum/random-v0")
    world = measures.world_of(data, torch.arange(50))
    far = world(data.obs[:50], data.action[:50]) - measures.recorded(data, torch.arange(50))
    assert np.abs(far).max() < 1e-3
    other = replace(data, reward=data.reward * 2)
    assert "makes 100% of logged steps otherwise" in measures.world_of(other, torch.arange(50))
    monkeypatch.setattr(measures, "setter", lambda env, obs: None)
    assert "cannot be set" in measures.world_of(data, torch.arange(50))


@pytest.mark.parametrize("scale, grade", [(1.0, FINE), (3.0, LOOK)])
def test_doubts_that_rank_nothing_matter_where_errors_are_larger_off_the_data(good, monkeypatch, scale, grade):
    case = replace(good[1], rows={}, numbers={})
    said = lambda size: {"MOReL's distance": (np.arange(100.0), size * np.tile([1.0, 2.0, 2.0, 1.0], 25))}  # noqa: E731
    sizes = iter([1.0, scale])
    monkeypatch.setattr(measures, "world_of", lambda data, rows: lambda obs, action: np.zeros((len(obs), 3)))
    monkeypatch.setattr(measures, "doubts", lambda *_: said(next(sizes)))
    assert [f.level for f in model_report.ranks(case)] == [FINE, grade]


# --- The command ---
@pytest.fixture(scope="module")
def written(report, good):
    out = report.folder / "page.html"
    args = dict(dynamics_hidden_size=32, dynamics_max_epochs=12, out=out)
    model_report.main(model_report.Args(str(report.folder / "good.npz"), **args))
    return out


def test_the_page_needs_no_network_and_the_json_is_whole(written):
    text, numbers = written.read_text(), json.loads(written.with_suffix(".json").read_text())
    assert text.count("<svg") == 7 and text.count("<li class=") == len(numbers["findings"]) == 8
    assert not [word for word in ("<link", "<script src", "@import", 'href="http') if word in text]
    assert numbers["columns"]["of no change"][0] < 0.1 and numbers["recorded"]["reward"] == pytest.approx(1, abs=0.1)


def test_bad_input_is_refused_in_a_sentence(report):
    wrong = {"horizon": 1}, {"penalty_coef": -1.0}, {"out": Path("x.json")}
    for args, words in zip(wrong, ("--horizon must be", "--penalty-coef must be", "name the page")):
        with pytest.raises(InputError, match=words):
            report("good", **args)
    with pytest.raises(InputError, match="No such file"):
        report("missing")


@pytest.mark.slow
@pytest.mark.parametrize("width", [360, 390, 1440])
def test_nothing_scrolls_sideways_in_a_browser(browser, written, width):  # noqa: F811
    browser.open(written, width)
    assert browser.run("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
    too_wide = "e => e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).display != 'inline'"
    assert browser.run(f"[...document.querySelectorAll('body *:not(svg, svg *)')].filter({too_wide}).length") == 0
