"""MOReL's pessimistic MDP against independent NumPy computations, hand-made numbers and stub models."""

import csv
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_mopo import ACTION_DIM, OBS_DIM, REWARD, TERMINAL, never, small_args, stub_actor

import algos.mopo as mopo
import algos.morel as morel
import algos.morel_npg as morel_npg
from common import InputError
from common.dynamics import Dynamics


# --- Helpers ---
class StubDynamics:
    """All members move obs[0] by 1; member i moves obs[2] by offset[i] * |obs[0]| and pays 10 + pay * offset[i]."""

    def __init__(self, offset, elites, std: float = 0.0, pay: float = 1.0):
        self.offset, self.elites, self.std, self.pay = torch.tensor(offset), torch.tensor(elites), std, pay

    def predict(self, obs, action):
        move = torch.zeros(len(self.offset), *obs.shape)
        move[..., 0] = 1
        move[..., 2] = self.offset[:, None] * obs[:, 0].abs()
        reward = (10 + self.pay * self.offset)[:, None].expand(-1, len(obs))
        return obs + move, reward, torch.full((len(self.offset), len(obs), OBS_DIM + 1), self.std)

    step = Dynamics.step


def stub_mdp(threshold: float, halt_reward: float = -77.0, terminal_fn=never, std: float = 0.0, pay: float = 1.0):
    """Its discrepancy at a state is 3 |obs[0]|: member 2 does not simulate, and is not asked."""
    dynamics = StubDynamics([0.0, 1.0, 100.0, 3.0], [3, 0, 1], std, pay)
    return morel.PessimisticMDP(dynamics, terminal_fn, threshold, halt_reward)


def run_rollout(mdp, starts, seed: int = 0, length: int = 5):
    actor = stub_actor()
    torch.manual_seed(seed)
    return morel.rollout(mdp, actor, starts, morel.Args(rollout_length=length))


def step(mdp, starts):
    """With members in turns, without noise: next_obs, reward, terminal, halted."""
    num = len(starts)
    return mdp.step(starts, torch.zeros(num, ACTION_DIM), torch.arange(num), torch.zeros(num, OBS_DIM + 1))


def starts_at(x: list[float]) -> torch.Tensor:
    return torch.tensor([[value, 0.5, -0.5] for value in x])


def stub_data(obs: torch.Tensor, episode_end: list[int], max_episode_steps: int | None = None) -> SimpleNamespace:
    spec = max_episode_steps and SimpleNamespace(max_episode_steps=max_episode_steps)
    end = torch.tensor(episode_end, dtype=torch.bool)
    action, reward = torch.zeros(len(obs), ACTION_DIM), torch.arange(len(obs)) - 4.0
    return SimpleNamespace(obs=obs, action=action, reward=reward, episode_end=end, env_spec=spec)


def numpy_discrepancy(next_mean: np.ndarray) -> np.ndarray:
    num_members, batch, _ = next_mean.shape
    largest = np.zeros(batch)
    for row in range(batch):
        for i in range(num_members):
            for j in range(i):
                distance = math.sqrt(sum((next_mean[i, row] - next_mean[j, row]) ** 2))
                largest[row] = max(largest[row], distance)
    return largest


# --- Discrepancy ---
def test_discrepancy_is_the_largest_distance_between_two_members_at_the_same_row():
    means = torch.tensor([[[0.0, 0.0], [5.0, 5.0]], [[3.0, 0.0], [5.0, 5.0]], [[0.0, 4.0], [5.0, 6.0]]])
    torch.testing.assert_close(morel.discrepancy(means), torch.tensor([5.0, 1.0]))  # the rows are 7 apart: no matter


def test_discrepancy_matches_numpy():
    means = torch.randn(5, 40, 6, generator=torch.Generator().manual_seed(0)) * 3
    disc = morel.discrepancy(means)
    np.testing.assert_allclose(disc.numpy(), numpy_discrepancy(means.double().numpy()), rtol=1e-6)
    torch.testing.assert_close(morel.discrepancy(means + 100 * torch.arange(40.0)[:, None]), disc, rtol=1e-3, atol=0)


def test_discrepancy_ignores_the_order_of_members_and_never_falls_when_one_is_added():
    means = torch.randn(5, 200, 3, generator=torch.Generator().manual_seed(1))
    disc = morel.discrepancy(means)
    assert torch.equal(morel.discrepancy(means[[3, 1, 4, 0, 2]]), disc)
    fewer = morel.discrepancy(means[:4])
    assert (fewer <= disc).all() and (fewer < disc).any()


def test_identical_members_are_never_halted():
    mean = torch.randn(1, 50, 3, generator=torch.Generator().manual_seed(2)).expand(4, -1, -1)
    assert (morel.discrepancy(mean) == 0).all()
    mdp = morel.PessimisticMDP(StubDynamics([2.0] * 4, [0, 1, 2]), never, 0.0, -77.0)
    _, halted = run_rollout(mdp, starts_at([1.0, -50.0, 1000.0]))
    assert not halted.any()


# --- Threshold ---
def test_threshold_matches_numpy_and_a_hand_made_number():
    assert morel.threshold(torch.tensor([1.0, 1.0, 1.0, 5.0]), 1.5) == pytest.approx(2 + 1.5 * math.sqrt(3))
    disc = torch.rand(1_000, generator=torch.Generator().manual_seed(0)) ** 8 * 1e-3
    x = disc.double().numpy()
    for coef in (0.0, 0.5, 3.0):
        assert morel.threshold(disc, coef) == pytest.approx(x.mean() + coef * x.std(), rel=1e-9)


@pytest.mark.parametrize("coef", [10.0, 1e6])
def test_threshold_with_beta_max_or_more_is_the_largest_discrepancy_of_the_data(coef):
    disc = torch.rand(1_000, generator=torch.Generator().manual_seed(0))
    assert morel.threshold(disc, coef) == disc.max().item()


def random_data(num_rows: int = 2_500) -> SimpleNamespace:
    torch.manual_seed(0)
    data = stub_data(torch.randn(num_rows, OBS_DIM), [0] * (num_rows - 1) + [1])
    data.action = torch.rand(num_rows, ACTION_DIM) * 2 - 1
    return data


@torch.no_grad()
@pytest.mark.parametrize("coef, share", [(1e3, 1.0), (1.0, None)])
def test_pessimistic_mdp_takes_its_threshold_from_all_rows_by_the_members_that_simulate(coef, share, capsys):
    data, dynamics = random_data(), Dynamics(OBS_DIM, ACTION_DIM, num_members=4, num_elites=3, hidden_size=8)
    dynamics.elites.copy_(torch.tensor([3, 0, 2]))
    dynamics.layers[-1].bias[1] += 100  # no elite
    mdp = morel.make_pessimistic_mdp(dynamics, never, data, small_args(morel, threshold_coef=coef, halt_offset=30.0))
    disc = numpy_discrepancy(dynamics.predict(data.obs, data.action)[0][[0, 2, 3]].double().numpy())
    expected = min(disc.mean() + coef * disc.std(), disc.max())
    assert mdp.threshold == pytest.approx(expected, rel=1e-5) and mdp.halt_reward == -34.0  # the smallest reward is -4
    share = share or (disc <= expected).mean()
    assert f"percentile {100 * share:.2f} of the data; halting pays -34.0" in capsys.readouterr().out
    _, _, _, halted = mdp.step(data.obs, data.action, torch.arange(len(data.obs)), torch.zeros(len(data.obs), 4))
    assert halted.double().mean().item() == pytest.approx(1 - share)


@pytest.mark.parametrize("script", [morel, morel_npg])
def test_without_discount_going_on_for_ever_is_worth_more_than_any_halt(script, capsys):
    script.make_pessimistic_mdp(Dynamics(OBS_DIM, ACTION_DIM, 4, 3, 8), never, random_data(), script.Args(gamma=1.0))
    assert "going on inf" in capsys.readouterr().out


def test_an_ensemble_with_a_lone_elite_is_refused():
    with pytest.raises(InputError, match="--num-elites above 1"):
        morel.make_pessimistic_mdp(Dynamics(3, 1, 7, 1, 8), never, random_data(), small_args(morel))


# --- The pessimistic MDP ---
def test_where_nothing_is_unknown_rollouts_are_those_of_offline_mbpo_bit_for_bit():
    def ends(obs, action, next_obs):
        return next_obs[:, 0] + action[:, 0] > 4.5

    mdp, starts = stub_mdp(math.inf, terminal_fn=ends, std=0.3), torch.rand(2_300, OBS_DIM) * 4
    rows, halted = run_rollout(mdp, starts)
    actor = stub_actor()
    torch.manual_seed(0)
    plain, _ = mopo.rollout(mdp.dynamics, actor, ends, starts, mopo.Args(penalty_coef=0.0, rollout_length=5))
    assert torch.equal(rows, plain) and rows[:, TERMINAL].any() and not halted.any()


def test_below_every_discrepancy_each_start_is_halted_at_its_first_step():
    rows, halted = run_rollout(stub_mdp(-1.0), starts_at([0.0, 1.0, 2.0]))
    assert len(rows) == 3 and halted.all() and rows[:, TERMINAL].all()
    assert rows[:, REWARD].tolist() == [-77.0] * 3


def test_an_unknown_step_pays_minus_kappa_and_nothing_else_and_ends_the_trajectory():
    rows, halted = run_rollout(stub_mdp(10.0), starts_at([0.0, 2.5]))  # unknown from |x| > 10 / 3
    assert rows[:, 0].tolist() == [0.0, 2.5, 1.0, 3.5, 2.0, 3.0, 4.0]
    assert torch.equal(halted, rows[:, 0] > 10 / 3) and torch.equal(rows[:, TERMINAL], halted.float())
    assert (rows[halted, REWARD] == -77.0).all()
    assert set(rows[~halted, REWARD].tolist()) <= {10.0, 11.0, 13.0}


def test_members_that_do_not_simulate_do_not_halt():
    _, halted = run_rollout(stub_mdp(10.0), starts_at([3.0]), length=1)  # with member 2 it would be 300
    assert not halted.any()


def test_at_the_threshold_itself_a_step_is_known():
    _, _, terminal, halted = step(stub_mdp(6.0), starts_at([2.0, 2.001]))
    assert halted.tolist() == terminal.tolist() == [False, True]


def test_the_environments_own_ends_end_trajectories_with_their_own_reward():
    mdp = stub_mdp(10.0, terminal_fn=lambda obs, action, next_obs: next_obs[:, 0] >= 2)
    rows, halted = run_rollout(mdp, starts_at([0.0]))
    assert rows[:, TERMINAL].tolist() == [0.0, 1.0] and not halted.any() and (rows[:, REWARD] >= 10).all()
    _, _, terminal, halted = step(mdp, starts_at([4.0]))
    assert terminal.all() and halted.all()  # both at once


def test_predictions_that_are_no_numbers_are_halted():
    _, reward, terminal, halted = step(stub_mdp(10.0), starts_at([math.inf]))
    assert halted.all() and terminal.all() and reward.item() == -77.0


@pytest.mark.parametrize("successor", [0.0, 1e3])
def test_the_target_of_a_halted_row_is_minus_kappa_whatever_its_successor(successor):
    rows, halted = run_rollout(stub_mdp(-1.0), starts_at([0.0, 1.0, 2.0]))
    rows[:, REWARD + 1 : TERMINAL] = successor
    torch.manual_seed(0)
    args = small_args(morel)
    agent = morel.Agent(OBS_DIM, ACTION_DIM, args)
    q = agent.critic(rows[:, :OBS_DIM], rows[:, OBS_DIM:REWARD]).detach().double().numpy()
    noise = {name: torch.zeros(3, ACTION_DIM) for name in ("next_action", "action")}
    info = morel.update(agent, rows, noise, args)
    assert info["critic_loss"].item() == pytest.approx(((q + 77.0) ** 2).mean(axis=1).sum(), rel=1e-5)


def test_a_higher_threshold_halts_less_and_is_worth_more():
    starts = starts_at(np.linspace(-4, 4, 33).tolist())
    data, shares, values = stub_data(starts, [1] * 33, max_episode_steps=8), [], []
    for threshold in (-1.0, 0.0, 1.0, 4.0, 9.0, 15.0, 50.0):
        mdp = stub_mdp(threshold, halt_reward=-1_000.0)
        _, halted = run_rollout(mdp, starts, length=8)
        shares.append(halted.sum().item() / len(starts))
        values.append(morel.evaluate_pessimistic(mdp, stub_actor(), data, 200, [0])[0].mean().item())
    assert shares == sorted(shares, reverse=True) and values == sorted(values)
    assert shares[0] == 1.0 and shares[-1] == 0.0 and len(set(values)) > 4


# --- Evaluation in the pessimistic MDP ---
def test_it_starts_at_the_first_observations_of_the_datas_episodes():
    data = stub_data(starts_at([float(i) for i in range(8)]), [0, 0, 1, 1, 0, 0, 0, 1])
    assert morel.initial_obs(data)[:, 0].tolist() == [0.0, 3.0, 4.0]
    seen = []

    def record(obs, action, next_obs):
        seen.append(obs[:, 0])
        return ~never(obs, action, next_obs)

    morel.evaluate_pessimistic(stub_mdp(100.0, terminal_fn=record), stub_actor(), data, 60, [0])
    assert torch.cat(seen).unique().tolist() == [0.0, 3.0, 4.0]


def test_the_horizon_is_the_environments_or_else_the_longest_episode_of_the_data():
    obs, ends = starts_at([0.0] * 8), [0, 0, 1, 1, 0, 0, 0, 1]
    assert morel.horizon(stub_data(obs, ends)) == 4
    assert morel.horizon(stub_data(obs, ends, max_episode_steps=200)) == 200


def test_returns_are_undiscounted_and_stop_at_the_halt_or_the_horizon():
    mdp = stub_mdp(10.0, pay=0.0)
    data = stub_data(starts_at([0.0, -100.0, 1.5, -3.0]), [1] * 4, max_episode_steps=6)
    returns, lengths = morel.evaluate_pessimistic(mdp, stub_actor(), data, 400, [0])
    pairs = set(zip(returns.tolist(), lengths.tolist()))
    assert pairs == {(-37.0, 5.0), (-77.0, 1.0), (-57.0, 3.0), (60.0, 6.0)}  # halted at 4, -100 and 3.5; never


def test_it_acts_deterministically():
    actor, actions = stub_actor(), []

    def record(obs, action, next_obs):
        actions.append((obs, action))
        return never(obs, action, next_obs)

    data = stub_data(starts_at([0.0, 1.0]), [1, 1], max_episode_steps=3)
    morel.evaluate_pessimistic(stub_mdp(100.0, terminal_fn=record), actor, data, 5, [0])
    assert len(actions) == 3
    for obs, action in actions:
        assert torch.equal(action, actor.act(obs))


def test_it_follows_from_its_seed_alone_and_leaves_random_states_alone():
    mdp, data = stub_mdp(20.0, std=0.5), stub_data(starts_at([0.0, 1.0, 2.0]), [1, 1, 1], max_episode_steps=6)
    actor, before = stub_actor(), torch.get_rng_state()
    first, _ = morel.evaluate_pessimistic(mdp, actor, data, 20, [0, 500])
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(12)
    for seed in ([0, 500], [0, 1_000], [1, 500]):
        again, _ = morel.evaluate_pessimistic(mdp, actor, data, 20, seed)
        assert torch.equal(again, first) == (seed == [0, 500])


# --- A run ---
def test_a_run_logs_halting_and_the_bound_beside_the_return_and_lower_thresholds_halt_more(tmp_path):
    run = {"num_updates": 20, "eval_interval": 10, "eval_episodes": 1, "compile": False, "num_threads": 1}
    run |= {"rollout_batch_size": 100, "rollout_interval": 15, "pessimistic_episodes": 7, "run_dir": str(tmp_path)}
    run |= {"dynamics_max_epochs": 1, "dynamics_hidden_size": 16}
    rates = []
    for coef in (0.0, 1.0, 1000.0):
        morel.main(small_args(morel, threshold_coef=coef, run_name=str(coef), **run))
        with open(tmp_path / str(coef) / "progress.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert [int(row["update"]) for row in rows] == [10, 20]
        for row in rows:
            assert 0 <= float(row["halt_rate"]) <= 1 <= float(row["rollout_mean"]) <= 5
            assert 1 <= float(row["pessimistic_length"]) <= 200 and math.isfinite(float(row["pessimistic_return"]))
        rates.append(float(rows[0]["halt_rate"]))
    assert rates[0] > rates[1] > rates[2]


def test_tuned_offsets_are_those_of_j_morel():
    offsets = {"halfcheetah": 200.0, "hopper": 50.0, "walker2d": 30.0}
    for name, offset in offsets.items():
        assert morel.TUNED[f"d4rl/{name}-medium-v2"] == {"halt_offset": offset}
    assert len(morel.TUNED) == 14
