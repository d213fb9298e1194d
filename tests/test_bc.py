"""Behaviour cloning's loss against float64 NumPy, and which episodes it imitates."""

import numpy as np
import pytest
import torch
from test_combo import ACTION_DIM, OBS_DIM, as_rows, numpy_mlp, random_batch

import algos.bc as bc
from common.dataset import load_dataset


def test_loss_is_that_of_numpy():
    torch.manual_seed(0)
    args = bc.Args(hidden_sizes=(8, 8))
    agent, batch = bc.Agent(OBS_DIM, ACTION_DIM, args).double(), random_batch()
    policy_action = np.tanh(numpy_mlp(batch[0].numpy(), [p.detach().numpy().T for p in agent.actor.parameters()]))
    expected = ((policy_action - batch[1].numpy()) ** 2).mean()
    assert bc.update(agent, as_rows(batch), args)["actor_loss"].item() == pytest.approx(expected, rel=1e-9)


def test_a_deterministic_policy_is_cloned():
    torch.manual_seed(0)
    args = bc.Args(hidden_sizes=(32, 32), actor_lr=3e-3)
    agent = bc.Agent(OBS_DIM, ACTION_DIM, args)
    teacher = torch.tensor([[0.5, -0.2, 0.1], [0.0, 0.3, -0.6]])
    for step in range(400):
        batch = random_batch(torch.float32, seed=step, batch=64)
        batch[1] = torch.tanh(batch[0] @ teacher.T)
        loss = bc.update(agent, as_rows(batch), args)["actor_loss"]
    assert loss < 1e-3 and batch[1].var() > 0.1


@pytest.fixture
def episodes(tmp_path):
    """Ten episodes of different length; the reward of a row is its episode's score over its length."""
    lengths, scores = [4, 3, 6, 5, 4, 3, 7, 4, 5, 6], [3, 9, -5, 0, 8, 1, 2, -1, 4, 5]
    number = np.repeat(np.arange(10), lengths)
    end = np.append(np.diff(number) > 0, True)
    reward = np.repeat(np.array(scores) / lengths, lengths)
    obs, zeros = np.repeat(number[:, None], OBS_DIM, 1).astype(float), np.zeros((len(number), ACTION_DIM))
    obs[:, 1] = np.arange(len(obs))
    arrays = {"observations": obs, "next_observations": obs + (np.arange(OBS_DIM) == 1), "actions": zeros}
    arrays["rewards"] = reward
    np.savez(tmp_path / "own.npz", **arrays, terminals=end & (number % 2 == 0), timeouts=end & (number % 2 == 1))
    return load_dataset(str(tmp_path / "own.npz"))


@pytest.mark.parametrize("fraction, expected", [(0.2, {1, 4}), (0.3, {1, 4, 9}), (0.01, {4})], ids=str)
def test_the_best_episodes_are_whole_and_those_of_highest_return(episodes, fraction, expected):
    if fraction == 0.01:
        episodes.reward[episodes.obs[:, 0] == 4] = 100.0
    rows = bc.best_episodes(episodes, fraction)
    number = episodes.obs[:, 0]
    assert set(number[rows].tolist()) == expected
    assert len(rows) == sum(int((number == i).sum()) for i in expected)
