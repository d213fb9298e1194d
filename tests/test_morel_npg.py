"""The natural policy gradient against explicit float64 matrices, NumPy loops, and a walk around a hole in the data."""

import copy
import csv
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.utils import parameters_to_vector

import algos.morel_npg as npg
from common.dynamics import Dynamics

OBS_DIM, ACTION_DIM, ROWS = 3, 2, 40


# --- Helpers ---
def randn(*shape: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def small_actor(dtype=torch.float64) -> npg.Actor:
    """Nothing is at its initial value."""
    torch.manual_seed(0)
    actor = npg.Actor(OBS_DIM, ACTION_DIM, (4, 4), init_std=1.0).to(dtype)
    with torch.no_grad():
        for p in actor.parameters():
            p.copy_(0.7 * torch.randn_like(p))
        actor.obs_mean.copy_(torch.tensor([1.0, -1.0, 0.5]))
        actor.obs_std.copy_(torch.tensor([2.0, 0.5, 1.0]))
    return actor


def weights(actor: npg.Actor) -> torch.Tensor:
    return parameters_to_vector(actor.parameters()).detach()


def numpy_mean(actor: npg.Actor, obs: torch.Tensor) -> np.ndarray:
    w = [p.detach().double().numpy() for p in actor.net.parameters()]
    x = (obs.double().numpy() - actor.obs_mean.double().numpy()) / actor.obs_std.double().numpy()
    return np.tanh(np.tanh(x @ w[0].T + w[1]) @ w[2].T + w[3]) @ w[4].T + w[5]


def normal(actor: npg.Actor, obs: torch.Tensor) -> torch.distributions.Independent:
    return torch.distributions.Independent(torch.distributions.Normal(actor(obs), actor.log_std.exp()), 1)


def scores(actor: npg.Actor, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
    """grad log pi(a|s) of every row, (rows, num_params)"""
    log_probs = normal(actor, obs).log_prob(action)
    params = list(actor.parameters())
    return torch.stack([parameters_to_vector(torch.autograd.grad(x, params, retain_graph=True)) for x in log_probs])


def explicit_fisher(actor: npg.Actor, obs: torch.Tensor) -> torch.Tensor:
    """Mean over rows of J^T Sigma^-1 J, J the mean's Jacobian, and 2 for every log_std."""
    params, mean = list(actor.parameters()), actor(obs)
    fisher = torch.zeros(len(weights(actor)), len(weights(actor)), dtype=mean.dtype)
    for k in range(ACTION_DIM):
        grads = [torch.autograd.grad(m, params, retain_graph=True, allow_unused=True) for m in mean[:, k]]
        rows = [
            parameters_to_vector([torch.zeros_like(p) if g is None else g for p, g in zip(params, gs)]) for gs in grads
        ]
        jacobian = torch.stack(rows)
        fisher += jacobian.T @ jacobian / len(obs) / (2 * actor.log_std[k].detach()).exp()
    start = 0
    for name, p in actor.named_parameters():
        if name == "log_std":
            fisher[range(start, start + ACTION_DIM), range(start, start + ACTION_DIM)] += 2
        start += p.numel()
    return fisher


def random_trajectories(steps: int = 7, num: int = 5):
    """Of lengths 7, 1, 4, 2, 7, with zeros after their ends, as `rollout` returns them."""
    lengths = torch.tensor([7, 1, 4, 2, 7])
    alive = torch.arange(steps)[:, None] < lengths
    obs, action = randn(steps, num, OBS_DIM, seed=1), randn(steps, num, ACTION_DIM, seed=2)
    reward = randn(steps, num, seed=3) * 5
    return obs * alive[..., None], action * alive[..., None], reward * alive, alive, lengths


def numpy_advantages(reward, value, lengths, gamma, lam) -> list[np.ndarray]:
    """By the double sum of the definition, one trajectory at a time; after its end nothing has a value."""
    result = []
    for n, length in enumerate(lengths):
        r, v = reward[:length, n], np.append(value[:length, n], 0.0)
        delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(length)]
        sums = [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, length)) for t in range(length)]
        result.append(np.array(sums))
    return result


# --- Advantages ---
@pytest.mark.parametrize("gamma, lam", [(0.9, 0.8), (0.999, 0.97), (1.0, 1.0)])
def test_gae_matches_the_double_sum_of_its_definition(gamma, lam):
    _, _, reward, alive, lengths = random_trajectories()
    value = randn(*reward.shape, seed=4) * 3 * alive
    advantage = npg.gae(reward, value, gamma, lam).numpy()
    for n, expected in enumerate(numpy_advantages(reward.numpy(), value.numpy(), lengths, gamma, lam)):
        np.testing.assert_allclose(advantage[: lengths[n], n], expected, rtol=1e-9)
        assert (advantage[lengths[n] :, n] == 0).all()


def test_gae_with_lambda_1_and_no_value_is_the_discounted_return():
    _, _, reward, _, lengths = random_trajectories()
    advantage = npg.gae(reward, torch.zeros_like(reward), 0.9, 1.0).numpy()
    for n, length in enumerate(lengths):
        for t in range(length):
            expected = sum(0.9 ** (k - t) * reward[k, n].item() for k in range(t, length))
            assert advantage[t, n] == pytest.approx(expected, rel=1e-9)


def test_gae_with_lambda_0_is_the_td_error_without_bootstrap_at_the_end():
    reward, value = torch.tensor([[1.0], [2.0], [-50.0]]), torch.tensor([[10.0], [20.0], [30.0]])
    expected = torch.tensor([[1 + 0.5 * 20 - 10], [2 + 0.5 * 30 - 20], [-50 - 30.0]])
    torch.testing.assert_close(npg.gae(reward, value, 0.5, 0.0), expected)


# --- Policy ---
def test_mean_action_matches_numpy_and_acting_clips_it():
    actor, obs = small_actor(torch.float32), randn(ROWS, OBS_DIM, dtype=torch.float32) * 3
    np.testing.assert_allclose(actor(obs).detach().numpy(), numpy_mean(actor, obs), rtol=1e-4, atol=1e-5)
    action = actor.act(obs)
    assert torch.equal(action, actor(obs).clip(-1, 1)) and (action.abs() == 1).any() and (action.abs() < 1).any()


def test_log_prob_is_that_of_a_normal_up_to_a_constant():
    actor, obs, action = small_actor(), randn(ROWS, OBS_DIM), randn(ROWS, ACTION_DIM, seed=1)
    reference = normal(actor, obs).log_prob(action) + ACTION_DIM * 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(npg.log_prob(actor, obs, action), reference)


def test_kl_is_that_of_torch_distributions():
    old, new, obs = small_actor(), small_actor(), randn(ROWS, OBS_DIM)
    with torch.no_grad():
        for p in new.parameters():
            p.add_(0.2 * torch.randn_like(p))
    expected = torch.distributions.kl_divergence(normal(old, obs), normal(new, obs)).mean()
    torch.testing.assert_close(npg.kl_divergence(new, obs, old(obs), old.log_std), expected)


def test_a_new_policy_hardly_depends_on_the_state_and_has_the_initial_deviation():
    torch.manual_seed(0)
    actor = npg.Actor(OBS_DIM, ACTION_DIM, (64, 64), init_std=0.78)
    assert actor(randn(1_000, OBS_DIM, dtype=torch.float32)).abs().max() < 0.02
    torch.testing.assert_close(actor.log_std.exp(), torch.full((ACTION_DIM,), 0.78))


# --- Natural gradient ---
def test_fisher_product_equals_the_explicit_matrix():
    actor, obs = small_actor(), randn(ROWS, OBS_DIM)
    product, fisher = npg.fisher_product(actor, obs), explicit_fisher(actor, obs)
    for column in torch.eye(len(fisher), dtype=fisher.dtype)[::5]:
        torch.testing.assert_close(product(column), fisher @ column, rtol=1e-9, atol=1e-12)
    vector = randn(len(fisher), seed=5)
    torch.testing.assert_close(product(vector), fisher @ vector, rtol=1e-9, atol=1e-12)


def test_fisher_product_of_many_rows_is_the_mean_over_all_of_them():
    actor, obs = small_actor(), randn(9_001, OBS_DIM)
    obs[8_000:] += 3  # the last part differs, and is smaller
    vector = randn(len(weights(actor)), seed=5)
    parts = [(rows, npg.fisher_product(actor, rows)(vector)) for rows in obs.split(1_500)]
    expected = sum(len(rows) * product for rows, product in parts) / len(obs)
    torch.testing.assert_close(npg.fisher_product(actor, obs)(vector), expected, rtol=1e-9, atol=1e-12)


def test_conjugate_gradient_solves_and_stops_at_its_iterations():
    root = randn(12, 12)
    matrix, b, calls = root @ root.T + torch.eye(12), randn(12, seed=1), []

    def product(x):
        calls.append(1)
        return matrix @ x

    x = npg.conjugate_gradient(product, b, 60)
    np.testing.assert_allclose(x.numpy(), np.linalg.solve(matrix.numpy(), b.numpy()), rtol=1e-6)
    assert len(calls) < 40  # it noticed that it was done
    first = npg.conjugate_gradient(product, b, 1)
    torch.testing.assert_close(first, b * (b @ b) / (b @ matrix @ b))
    assert torch.equal(npg.conjugate_gradient(product, torch.zeros(12), 5), torch.zeros(12))


@pytest.mark.parametrize("damping", [1e-3, 0.5])
def test_a_step_is_that_of_the_explicit_matrices(damping):
    actor, obs, action = small_actor(), randn(ROWS, OBS_DIM), randn(ROWS, ACTION_DIM, seed=1)
    advantage = randn(ROWS, seed=2)
    before, fisher = weights(actor), explicit_fisher(actor, obs) + damping * torch.eye(len(weights(actor)))
    grad = advantage @ scores(actor, obs, action) / ROWS
    direction = torch.linalg.solve(fisher, grad)
    expected = before + (0.03 / (grad @ direction)).sqrt() * direction
    args = npg.Args(step_size=0.03, cg_damping=damping, cg_iterations=300, min_std=1e-3)
    npg.natural_step(actor, obs, action, advantage, args)
    torch.testing.assert_close(weights(actor), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("delta", [1e-4, 1e-3])
def test_the_kl_of_a_small_step_is_half_delta(delta):
    actor, obs = small_actor(), randn(400, OBS_DIM)
    action = normal(actor, obs).sample()
    args = npg.Args(step_size=delta, cg_damping=1e-3, min_std=1e-3)
    old, fisher = copy.deepcopy(actor), explicit_fisher(actor, obs)
    info = npg.natural_step(actor, obs, action, randn(400, seed=3), args)
    moved = weights(actor) - weights(old)
    assert info["kl"].item() == pytest.approx((0.5 * moved @ fisher @ moved).item(), rel=0.05)
    assert 0.8 * delta / 2 < info["kl"].item() < 1.05 * delta / 2  # the rest is the damping's
    expected = torch.distributions.kl_divergence(normal(old, obs), normal(actor, obs)).mean()
    assert info["kl"].item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_step_makes_good_actions_likelier():
    actor, obs = small_actor(), randn(400, OBS_DIM)
    action = normal(actor, obs).sample()
    advantage = action[:, 0] - action[:, 1]
    before = actor(obs).mean(0)
    npg.natural_step(actor, obs, action, advantage, npg.Args())
    moved = actor(obs).mean(0) - before
    assert moved[0] > 0.01 and moved[1] < -0.01


def test_without_advantages_nothing_moves():
    actor, obs, action = small_actor(), randn(ROWS, OBS_DIM), randn(ROWS, ACTION_DIM, seed=1)
    before = weights(actor)
    npg.natural_step(actor, obs, action, torch.zeros(ROWS, dtype=torch.float64), npg.Args(min_std=1e-3))
    assert torch.equal(weights(actor), before)


def test_the_deviation_never_falls_below_its_floor():
    actor, obs = small_actor(), randn(400, OBS_DIM)
    with torch.no_grad():
        actor.log_std.fill_(math.log(0.5))
    action = normal(actor, obs).sample()
    advantage = -(action - actor(obs)).square().sum(1).detach()
    info = npg.natural_step(actor, obs, action, advantage, npg.Args(step_size=5.0, min_std=0.4))
    torch.testing.assert_close(actor.log_std.exp(), torch.full((ACTION_DIM,), 0.4, dtype=torch.float64))
    assert info["std"].item() == pytest.approx(0.4)


# --- Update ---
def test_update_hands_on_whitened_advantages_and_fits_the_value_to_discounted_returns(monkeypatch):
    args = npg.Args(gamma=0.9, gae_lambda=0.8, batch_size=1_000)
    obs, action, reward, alive, lengths = random_trajectories()
    torch.manual_seed(0)
    agent, steps, losses = npg.Agent(OBS_DIM, ACTION_DIM, args).double(), [], []
    agent.value.scale.fill_(20.0)
    monkeypatch.setattr(npg, "natural_step", lambda *inputs: steps.append(inputs) or {})
    monkeypatch.setattr(agent.value_opt, "minimize", lambda loss: losses.append(loss.item()))
    info = npg.update(agent, obs, action, reward, alive, args)
    with torch.no_grad():
        times = torch.arange(7)[:, None].double().expand(7, 5) / 7
        value = agent.value(obs, times).numpy()
    everything = zip(
        numpy_advantages(reward.numpy(), value, lengths, 0.9, 0.8),
        numpy_advantages(reward.numpy(), 0 * value, lengths, 0.9, 1.0),
    )
    columns = [list(column) for column in zip(*everything)]
    flat = np.concatenate(columns[0])
    white = (flat - flat.mean()) / flat.std(ddof=1)
    actor, got_obs, got_action, got, _ = steps[0]
    assert actor is agent.actor and len(got) == lengths.sum()
    at = {tuple(o): (a, g) for o, a, g in zip(got_obs.tolist(), got_action.tolist(), got.tolist())}
    k = 0
    for n, length in enumerate(lengths):
        for t in range(length):
            found_action, found = at[tuple(obs[t, n].tolist())]
            assert found_action == action[t, n].tolist() and found == pytest.approx(white[k], rel=1e-6)
            k += 1
    returns = np.concatenate(columns[1])
    values = np.concatenate([value[:length, n] for n, length in enumerate(lengths)])
    assert losses == [pytest.approx(np.mean((values - returns) ** 2))]
    explained = 1 - (returns - values).var() / returns.var()
    assert info["explained_variance"].item() == pytest.approx(explained, rel=1e-6)


def test_value_learns_the_returns_of_states_and_times():
    args = npg.Args(batch_size=50, gamma=1.0, value_lr=1e-2)
    torch.manual_seed(0)
    agent = npg.Agent(OBS_DIM, ACTION_DIM, args)
    agent.value.scale.fill_(10.0)
    obs = torch.randn(60, OBS_DIM).repeat(10, 1, 1)
    reward, alive = torch.ones(10, 60), torch.ones(10, 60, dtype=torch.bool)
    reward += obs[0, :, 0]
    action = torch.randn(10, 60, ACTION_DIM)
    explained = [npg.update(agent, obs, action, reward, alive, args)["explained_variance"].item() for _ in range(20)]
    assert explained[0] < 0.5 and explained[-1] > 0.85


def test_cloning_moves_the_mean_to_the_datas_actions_and_leaves_the_deviation():
    torch.manual_seed(0)
    actor, obs = npg.Actor(OBS_DIM, ACTION_DIM, (64, 64), init_std=0.78), torch.randn(2_000, OBS_DIM)
    before = actor.log_std.clone()
    action = torch.stack([obs[:, 0].tanh(), 0.5 * torch.ones(2_000)], dim=1)
    npg.clone(actor, SimpleNamespace(obs=obs, action=action), npg.Args(clone_epochs=20))
    assert (actor(obs) - action).square().mean().item() < 0.01 * action.var().item()
    assert torch.equal(actor.log_std, before)


# --- Rollouts ---
class HoleDynamics:
    """The action moves a point and pays its way to the right; near the origin the members disagree and promise much."""

    elites = torch.tensor([0, 1])

    def predict(self, obs, action):
        mean = obs + 0.25 * action
        inside = (mean.norm(dim=-1) < 0.6).float()
        means = torch.stack([mean, mean + inside[:, None] * torch.tensor([0.0, 1e-3])])
        reward = action[:, 0] - 0.2 * action[:, 1].abs() + 3 * inside
        return means, reward.expand(2, -1), torch.full((2, len(obs), 3), 0.01)

    step = Dynamics.step


def never(obs, action, next_obs):
    return torch.zeros(len(obs), dtype=torch.bool)


def hole_mdp(threshold: float, terminal_fn=never) -> npg.PessimisticMDP:
    return npg.PessimisticMDP(HoleDynamics(), terminal_fn, threshold, -30.0)


def point_actor() -> npg.Actor:
    torch.manual_seed(3)
    return npg.Actor(2, 2, (64, 64), init_std=0.8)


def run_rollout(mdp, steps: int = 12, num: int = 300):
    actor = point_actor()
    torch.manual_seed(0)
    starts = torch.tensor([-1.5, 0.0]) + 0.1 * torch.randn(num, 2)
    return starts, npg.rollout(mdp, actor, starts, steps)


def test_trajectories_follow_the_model_from_their_starts_with_clipped_actions():
    starts, (obs, action, reward, alive, halted) = run_rollout(hole_mdp(math.inf))
    assert alive.all() and not halted.any() and torch.equal(obs[0], starts)
    clipped = action.clamp(-1, 1)
    assert (action.abs() > 1).any()
    assert (obs[1:] - obs[:-1] - 0.25 * clipped[:-1]).abs().max() < 0.06  # six deviations of the model
    mean_reward = HoleDynamics().predict(obs.flatten(0, 1), clipped.flatten(0, 1))[1][0]
    assert (reward.flatten() - mean_reward).abs().max() < 0.06
    z = (action - point_actor()(obs)) / 0.8
    torch.testing.assert_close(z.flatten(0, 1).T.cov(), torch.eye(2), rtol=0, atol=0.06)


def test_after_a_halt_there_is_nothing_and_the_halt_pays_minus_kappa():
    _, (obs, action, reward, alive, halted) = run_rollout(hole_mdp(1e-6))
    lengths = alive.sum(dim=0)
    assert torch.equal(alive, torch.arange(12)[:, None] < lengths)
    ended = halted.any(dim=0)
    assert ended.any() and not ended.all() and torch.equal(ended, lengths < 12) | (halted[-1].any())
    last = halted.double().argmax(dim=0)[ended]
    assert torch.equal(last, lengths[ended] - 1) and (halted.sum(dim=0) <= 1).all()
    assert (reward[halted] == -30.0).all() and (reward[~halted].abs() < 2).all()
    for tensor in (obs, action, reward):
        assert (tensor[~alive] == 0).all()


def test_a_halt_in_the_first_step_counts():
    _, (_, _, reward, alive, halted) = run_rollout(hole_mdp(-1.0))
    assert halted[0].all() and (reward[0] == -30).all() and not alive[1:].any()


def test_the_environments_own_ends_end_trajectories_too():
    mdp = hole_mdp(math.inf, terminal_fn=lambda obs, action, next_obs: next_obs[:, 0] < -1.7)
    _, (obs, _, reward, alive, halted) = run_rollout(mdp)
    lengths = alive.sum(dim=0)
    assert (lengths < 12).any() and not halted.any()
    after_first = obs[1:][alive[1:]]
    assert (after_first[:, 0] >= -1.7).all() and (reward.abs() < 5).all()


def test_at_every_step_elites_and_noise_are_drawn_anew_for_the_rows_that_go_on():
    mdp, seen = hole_mdp(1e-6), []

    def spy(obs, action, order, noise):
        seen.append((order, noise))
        return npg.PessimisticMDP.step(mdp, obs, action, order, noise)

    _, (_, _, _, alive, _) = run_rollout(SimpleNamespace(step=spy))
    assert [len(order) for order, _ in seen] == alive.sum(dim=1).tolist()
    for (order, noise), (later, other) in zip(seen, seen[1:]):
        assert torch.equal(order.sort()[0], torch.arange(len(order))) and noise.shape == (len(order), 3)
        assert not torch.equal(order[: len(later)], later) and not torch.equal(noise[: len(other)], other)


@pytest.mark.parametrize("threshold, avoids", [(1e-6, True), (math.inf, False)])
def test_the_policy_learns_to_walk_around_a_hole_in_the_data(threshold, avoids):
    mdp, args = hole_mdp(threshold), npg.Args(step_size=0.1, batch_size=512)
    torch.manual_seed(0)
    agent = npg.Agent(2, 2, args)
    agent.value.scale.fill_(10.0)
    starts = torch.tensor([-1.5, 0.2]) + 0.1 * torch.randn(60, 2)
    for _ in range(100):
        npg.update(agent, *npg.rollout(mdp, agent.actor, starts, 20)[:4], args)
    with torch.no_grad():
        obs, nearest = starts, torch.full((60,), math.inf)
        for _ in range(20):
            obs = obs + 0.25 * agent.actor.act(obs)
            nearest = nearest.minimum(obs.norm(dim=-1))
    if avoids:
        assert (nearest > 0.6).double().mean() > 0.9 and (obs[:, 0] > 0.6).double().mean() > 0.9  # on the other side
    else:
        assert (nearest < 0.6).double().mean() > 0.9


# --- A run ---
@pytest.fixture
def run(tmp_path, monkeypatch):
    """Calls the script on 400 steps of a walk of three numbers; returns the run's folder."""
    rng = np.random.default_rng(0)
    action, first = rng.uniform(-2, 2, (400, 1)), rng.normal(size=(8, 1, 3))
    walk = 0.1 * np.cumsum(action.reshape(8, 50, 1), axis=1)
    obs, next_obs = (first + np.pad(walk, ((0, 0), (1, 0), (0, 0))))[:, :-1], first + walk
    arrays = {"observations": obs.reshape(400, 3), "next_observations": next_obs.reshape(400, 3), "actions": action}
    arrays["rewards"] = obs.reshape(400, 3)[:, 0]
    np.savez(tmp_path / "own.npz", **arrays, terminals=np.zeros(400, bool), timeouts=np.arange(400) % 50 == 49)
    monkeypatch.setenv("OFFLINE_MBRL_CACHE", str(tmp_path / "cache"))

    def call(num_updates: int):
        npg.main(npg.Args(
            dataset=str(tmp_path / "own.npz"), env_id="Pendulum-v1", num_updates=num_updates, eval_interval=2,
            eval_episodes=1, num_trajectories=20, horizon=12, batch_size=32, dynamics_hidden_size=16,
            dynamics_max_epochs=2, pessimistic_episodes=7, run_dir=str(tmp_path), run_name="run", compile=False,
            num_threads=1,
        ))  # fmt: skip
        return tmp_path / "run"

    return call


def test_a_run_logs_halting_and_the_bound_beside_the_return(run):
    with open(run(4) / "progress.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["update"]) for row in rows] == [2, 4]
    for row in rows:
        assert 0 <= float(row["halt_rate"]) <= 1 <= float(row["rollout_mean"]) <= 12 and float(row["kl"]) > 0
        assert 1 <= float(row["pessimistic_length"]) <= 200 and math.isfinite(float(row["pessimistic_return"]))


def test_trajectories_start_at_the_datas_initial_states(run, monkeypatch):
    seen, rollout = [], npg.rollout

    def spy(mdp, actor, starts, steps):
        seen.append((starts, steps))
        return rollout(mdp, actor, starts, steps)

    monkeypatch.setattr(npg, "rollout", spy)
    monkeypatch.setattr(npg, "initial_obs", lambda data: data.obs[:3])
    run(1)
    starts, steps = seen[0]
    assert steps == 12 and starts.shape == (20, 3) and len(starts.unique(dim=0)) == 3


def test_tuned_settings_are_those_of_j_morel():
    hopper = {"threshold_coef": 10.0, "halt_offset": 50.0, "num_trajectories": 200, "horizon": 700, "num_updates": 500}
    assert npg.TUNED["d4rl/hopper-medium-v2"] == hopper | {"init_std": 0.78}
    assert npg.TUNED["d4rl/halfcheetah-random-v2"]["threshold_coef"] == 50.0 and len(npg.TUNED) == 13
    for name, log_std in (("halfcheetah", -1.0), ("walker2d", -0.5)):
        assert math.log(npg.TUNED[f"d4rl/{name}-medium-v2"]["init_std"]) == pytest.approx(log_std, abs=0.01)
