"""benchmarks/collect.py: episodes of exactly as many steps as asked for, grades, the committed policies, resuming."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from algos import mopo
from benchmarks import collect
from common.dataset import InputError, load_dataset


@pytest.fixture(autouse=True)
def private_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("OFFLINE_MBRL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the processes of the benchmark
    yield
    torch.set_num_threads(num_threads)


@pytest.mark.parametrize("num_steps", [7, 123, 300])
def test_play_gives_as_many_steps_as_asked_for_in_whole_or_cut_episodes(num_steps):
    env = collect.ENVS["hopper"]
    torch.manual_seed(0)
    episodes = list(collect.play(mopo.Actor(11, 3), env, num_steps, seed=0))
    assert sum(len(e.rewards) for e in episodes) == num_steps
    for e in episodes:
        assert len(e.observations) == len(e.rewards) + 1
        assert e.terminations[-1] or e.truncations[-1]
        assert not (e.terminations[:-1] | e.truncations[:-1]).any()
        healthy = (e.observations[1:, 0] > 0.7) & (np.abs(e.observations[1:, 1]) < 0.2)
        assert healthy[:-1].all() and healthy[-1] == (not e.terminations[-1])  # the last observation is the true one


def test_medium_is_the_first_in_its_range_and_expert_the_best():
    env = replace(collect.ENVS["hopper"], medium=(1_000, 1_500))
    snapshots = [{"step": i, "return": r} for i, r in enumerate([50, 900, 1_700, 1_200, 1_100, 3_300, 3_000])]
    chosen = collect.choose(snapshots, env)
    assert (chosen["medium"]["step"], chosen["expert"]["step"]) == (3, 5)
    assert collect.choose(snapshots[:3], env)["medium"]["step"] == 1  # none in the range: the nearest


@pytest.mark.parametrize("name", ["hopper", "halfcheetah"])
def test_committed_policies_are_what_their_cards_say(name):
    returns = {}
    for grade in ("medium", "expert"):
        actor, card = collect.load_policy(name, grade)
        returns[grade] = collect.sampled_return(actor, collect.ENVS[name], seed=1)
        assert returns[grade] == pytest.approx(card["return"], rel=0.35)
    assert returns["expert"] > 1.5 * returns["medium"]


def test_medium_expert_is_medium_followed_by_expert():
    args = collect.Args(num_steps=250)
    for grade in ("medium", "expert", "medium-expert"):
        collect.record("hopper", grade, args)
    medium, expert, both = (load_dataset(f"hopper/{grade}-v0") for grade in ("medium", "expert", "medium-expert"))
    assert torch.equal(both.obs, torch.cat([medium.obs, expert.obs]))
    assert torch.equal(both.reward, torch.cat([medium.reward, expert.reward]))
    assert both.ref_scores == pytest.approx((-20.272305, 3234.3)) and both.env_spec.id == "Hopper-v5"


def test_a_policy_that_is_not_there_is_told_in_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr(collect, "POLICIES", tmp_path)
    with pytest.raises(InputError, match="--train --envs hopper"):
        collect.load_policy("hopper", "expert")


def test_a_training_that_is_killed_goes_on_and_ends_the_same(monkeypatch, tmp_path):
    monkeypatch.setattr(collect, "NUM_RANDOM", 60)
    monkeypatch.setattr(collect, "EVAL_INTERVAL", 80)
    monkeypatch.setattr(collect, "CHECKPOINT_INTERVAL", 60)
    monkeypatch.setitem(collect.ENVS, "hopper", replace(collect.ENVS["hopper"], max_steps=200))
    args, values = collect.Args(compile=False), []
    monkeypatch.setattr(collect, "sampled_return", lambda actor, env, seed: 10.0)
    whole = collect.train("hopper", args)
    monkeypatch.setenv("OFFLINE_MBRL_CACHE", str(tmp_path / "other"))

    def killed(actor, env, seed):
        values.append(actor.net[0].weight.sum().item())
        if len(values) == 2:
            raise KeyboardInterrupt
        return 10.0

    monkeypatch.setattr(collect, "sampled_return", killed)
    with pytest.raises(KeyboardInterrupt):
        collect.train("hopper", args)
    resumed = collect.train("hopper", args)
    assert len(values) == 3  # it did not start again at the first evaluation
    assert torch.equal(whole["rows"], resumed["rows"]) and whole["ends"] == resumed["ends"]
    for a, b in zip(whole["snapshots"], resumed["snapshots"], strict=True):
        assert a["step"] == b["step"] and all(torch.equal(a["actor"][key], b["actor"][key]) for key in a["actor"])
