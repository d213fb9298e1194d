"""benchmarks/collect.py: episodes of exactly as many steps as asked for, grades, the committed policies, resuming."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch

from algos import mopo
from benchmarks import collect
from benchmarks.collect import Args, record_random
from common import InputError
from common.dataset import load_dataset

ROOT = Path(__file__).resolve().parents[1]


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
    episodes = list(collect.play(mopo.Actor(11, 3, (64, 64)), env, num_steps, seed=0))
    assert sum(len(e.rewards) for e in episodes) == num_steps
    for e in episodes:
        assert len(e.observations) == len(e.rewards) + 1
        assert e.terminations[-1] or e.truncations[-1]
        assert not (e.terminations[:-1] | e.truncations[:-1]).any()
        healthy = (e.observations[1:, 0] > 0.7) & (np.abs(e.observations[1:, 1]) < 0.2)
        assert healthy[:-1].all() and healthy[-1] == (not e.terminations[-1])  # the last observation is the true one


# --- Random actions in any environment ---
def test_random_recording_is_seeded_and_may_stop_inside_an_episode(tmp_path):
    for name, seed in (("one", 3), ("two", 3), ("three", 4)):
        record_random("Hopper-v5", f"toy/{name}-v0", num_steps=130, seed=seed)
    one, two, three = (load_dataset(f"toy/{name}-v0") for name in ("one", "two", "three"))
    assert len(one.obs) == 130 and one.data_hash == two.data_hash != three.data_hash
    assert one.ref_scores == (-20.272305, 3234.3) and one.env_spec.id == "Hopper-v5"
    assert os.environ["MINARI_DATASETS_PATH"] == str(tmp_path / "minari")


def test_recording_leaves_nothing_half_done_under_its_name(tmp_path):
    call = "c.record_random('Pendulum-v1', 'toy/twice-v0', num_steps=400, seed=0)"
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    killed = f"import os, benchmarks.collect as c; c.play_random = lambda *_: os._exit(9); {call}"
    assert subprocess.run([sys.executable, "-c", killed], env=environ).returncode == 9
    assert not (tmp_path / "minari" / "toy" / "twice-v0").exists() and minari.list_local_datasets() == {}
    command = [sys.executable, "-c", f"import benchmarks.collect as c; {call}"]
    both = [subprocess.Popen(command, env=environ) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert len(load_dataset("toy/twice-v0").obs) == 400 and list(minari.list_local_datasets()) == ["toy/twice-v0"]


def test_the_slower_of_two_recorders_accepts_what_the_faster_one_made(monkeypatch):
    real_rename = os.rename

    def rename_after_the_other(source, target):
        Path(target).mkdir()
        Path(target, "data").mkdir()
        real_rename(source, target)

    monkeypatch.setattr(os, "rename", rename_after_the_other)
    assert (record_random("Pendulum-v1", "toy/race-v0", num_steps=200, seed=0) / "data").exists()


def test_any_environment_is_recorded_under_a_name_of_its_own(capsys):
    args = Args(env_id="Pendulum-v1", dataset_id="toy/mine-v1", num_steps=250)
    collect.main(args)
    assert "toy/mine-v1: Minari dataset in " in (out := capsys.readouterr().out) and "2 episodes, 250 steps" in out
    with pytest.raises(InputError, match="toy/mine-v1 exists already: choose another id, or remove /"):
        collect.main(args)


@pytest.mark.parametrize("args, words", [
    (Args(env_id="Pendulum-v1"), "a --dataset-id that ends in -v and a number"),
    (Args(env_id="Pendulum-v1", dataset_id="toy/mine"), "a --dataset-id that ends in -v and a number"),
    (Args(dataset_id="toy/mine-v0"), "need an --env-id"),
    (Args(env_id="Pendulum-v1", dataset_id="toy/mine-v0", train=True), "without --sets, --envs, --grades and --train"),
    (Args(env_id="Pendulum-v1", dataset_id="toy/mine-v0", sets=("pendulum/spin",)), "without --sets"),
    (Args(env_id="Pendulum-v1", dataset_id="toy/mine-v0", num_steps=0), "must be at least 1"),
    (Args(env_id="Pendulm-v1", dataset_id="toy/mine-v0"), "Cannot make environment 'Pendulm-v1'"),
    (Args(env_id="CartPole-v1", dataset_id="toy/mine-v0"), "not discrete"),
    (Args(env_id="Pendulum-v1", dataset_id="to y/mine-v0", num_steps=1), "Cannot record .*to y/mine-v0"),
    (Args(grades=("medium-replay",)), "add --train"),
    (Args(sets=("pendulum/spin",), train=True), "give --sets, or --envs, --grades and --train, not both"),
])  # fmt: skip
def test_what_cannot_be_recorded_is_said_in_one_sentence(args, words):
    with pytest.raises(InputError, match=words) as error:
        collect.main(args)
    assert "\n" not in str(error.value) and minari.list_local_datasets() == {}


# --- Grades ---
def test_medium_is_the_first_in_its_range_and_expert_the_best():
    env = replace(collect.ENVS["hopper"], medium=(1_000, 1_500))
    snapshots = [{"step": i, "return": r} for i, r in enumerate([50, 900, 1_700, 1_200, 1_100, 3_300, 3_000])]
    chosen = collect.choose(snapshots, env)
    assert (chosen["medium"]["step"], chosen["expert"]["step"]) == (3, 5)
    assert collect.choose(snapshots[:3], env)["medium"]["step"] == 1  # none in the range: the nearest


def test_a_training_for_the_replay_alone_ends_at_medium_or_where_medium_was_jumped_over():
    env, args = collect.ENVS["inverteddoublependulum"], Args(grades=("medium-replay",))
    for returns, ends in ([[100, 2_100], True], [[100, 1_300, 9_300, 9_300], False], [[1_300] + [9_300] * 3, True]):
        assert collect.finished([{"step": i, "return": r} for i, r in enumerate(returns)], env, args) == ends


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


@pytest.fixture
def pendulum(monkeypatch):
    """An environment to train in whose box is not [-1, 1], and which random actions end within a few steps."""
    env = collect.Env("InvertedPendulum-v5", medium=(50, 60), expert=900, max_steps=200)
    monkeypatch.setitem(collect.ENVS, "pendulum", env)
    return env


def test_medium_replay_is_what_the_training_did_up_to_medium(pendulum):
    training = collect.train("pendulum", Args(compile=False))
    training["snapshots"] = [{"step": 150, "return": 55.0}, {"step": 200, "return": 900.0}]
    collect.record("pendulum", "medium-replay", Args(), training)
    data, rows = load_dataset("pendulum/medium-replay-v0"), training["rows"][:150]
    assert data.action_high == 3 and len(training["ends"]) > 2
    columns = (data.obs, data.action, data.reward[:, None], data.next_obs, data.terminal[:, None])
    torch.testing.assert_close(torch.cat(columns, dim=1), rows)
    ends = [end for end in training["ends"][1:] if end < 150]
    assert (data.episode_end.nonzero().squeeze(1) + 1).tolist() == [*ends, 150]
    world = pendulum.make().unwrapped  # in its own units the recorded action leads where the training went
    world.reset(seed=0)
    for obs, action, next_obs in zip(*(x[:20].numpy().astype(float) for x in (data.obs, data.action, data.next_obs))):
        world.set_state(obs[:2], obs[2:])
        np.testing.assert_allclose(world.step(data.to_env_action(action))[0], next_obs, atol=1e-5)


def test_a_saved_policy_comes_back_in_half_precision_with_its_card(pendulum, monkeypatch, tmp_path):
    monkeypatch.setattr(collect, "POLICIES", tmp_path / "policies")
    weights = mopo.Actor(4, 1, (16, 8)).state_dict()
    collect.save_policy("pendulum", "expert", {"step": 70, "return": 950.0, "actor": weights}, Args(seed=3))
    actor, card = collect.load_policy("pendulum", "expert")
    assert weights.keys() == (loaded := actor.state_dict()).keys()
    assert all(torch.equal(loaded[name], weights[name].half().float()) for name in weights)
    assert (card["env"], card["step"], card["return"], card["seed"]) == ("InvertedPendulum-v5", 70, 950.0, 3)


def test_the_table_has_a_line_for_every_set_that_is_there():
    for grade, totals in (("expert", [3234.3]), ("random", [0, 100, 200, 300, 1000])):
        env = gym.make("Hopper-v5")
        obs = [env.observation_space.sample() for _ in range(3)]
        step = lambda reward, ends, stops=False: (env.action_space.sample(), reward, ends, stops)  # noqa: E731
        episodes = [collect.episode(obs, [step(1.0, False), step(x - 1.0, x < 1000, x >= 1000)]) for x in totals]
        collect.write_dataset(f"hopper/{grade}-v0", episodes, env, "by hand", {})
    head, rule, *lines = collect.table(("hopper", "walker2d")).splitlines()
    assert head.count("|") == rule.count("|") == 8
    assert lines == [
        "| hopper/random-v0 | 10 | 5 | 20% | 320 | 0, 100, 200, 300, 1,000 | 10.5 |",
        "| hopper/expert-v0 | 2 | 1 | 100% | 3,234 | 3,234, 3,234, 3,234, 3,234, 3,234 | 100.0 |",
    ]


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


@pytest.mark.slow
def test_trainings_end_with_the_recorder_that_is_killed():
    asked = ["--train", "--envs", "inverteddoublependulum", "--grades", "medium-replay"]
    with subprocess.Popen([sys.executable, collect.__file__, *asked], stderr=subprocess.PIPE) as recorder:
        recorder.stderr.read(1)  # the training's bar, of the child
        recorder.kill()
        recorder.communicate(timeout=60)  # comes back when the last process that could write to stderr has ended


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="a process group is interrupted")
def test_ctrl_c_twice_ends_the_recorder():
    asked = ["--train", "--envs", "inverteddoublependulum", "--grades", "medium-replay"]
    command, pipe = [sys.executable, collect.__file__, *asked], subprocess.PIPE
    interruptible = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    with subprocess.Popen(command, stderr=pipe, start_new_session=True, preexec_fn=interruptible) as recorder:
        try:
            recorder.stderr.read(1)
            time.sleep(5)  # amid the training
            for _ in range(2):
                os.killpg(recorder.pid, signal.SIGINT)
                time.sleep(0.01)
            recorder.communicate(timeout=30)
        finally:
            with suppress(ProcessLookupError):  # where all of them have ended
                os.killpg(recorder.pid, signal.SIGKILL)
    assert recorder.returncode == 130
