"""MOBILE's functions against an independent float64 NumPy computation, hand-made members and mopo.py."""

import copy
import math

import numpy as np
import pytest
import torch
from test_combo import (
    ACTION_DIM,
    BATCH,
    OBS_DIM,
    as_rows,
    assert_run_ends_as_mopo,
    changed,
    numpy_actor,
    numpy_q,
    random_agent,
    random_batch,
    random_noise,
    small_args,
    snapshot,
)
from torch import nn
from torch.nn.functional import pad

import algos.mobile as mobile
import algos.mopo as mopo
from common import InputError
from common.dynamics import Dynamics

NUM_REAL, K, NUM_ELITES = 4, 3, 5
ROWS = BATCH - NUM_REAL
ARGS = small_args(mobile, gamma=0.9)


# --- Helpers ---
def random_dynamics() -> Dynamics:
    """Untrained members that differ, in units of their own; two of the seven are no elites."""
    torch.manual_seed(3)
    dynamics = Dynamics(OBS_DIM, ACTION_DIM, hidden_size=16)
    dynamics.elites.copy_(torch.tensor([6, 1, 3, 0, 4]))
    dynamics.input_mean.copy_(torch.randn(OBS_DIM + ACTION_DIM))
    dynamics.input_std.copy_(torch.rand(OBS_DIM + ACTION_DIM) + 0.5)
    return dynamics.double().requires_grad_(False)


def random_model_noise(num_samples: int = K, rows: int = ROWS) -> torch.Tensor:
    shape = num_samples, NUM_ELITES, rows, OBS_DIM + 1 + ACTION_DIM
    return torch.randn(shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def inconsistency(agent, dynamics, obs, action, noise) -> torch.Tensor:
    backups = mobile.member_backups(agent, dynamics, obs, action, noise)
    assert backups.shape == (noise.shape[1], len(obs))
    return mobile.bellman_inconsistency(backups)


def numpy_member(dynamics: Dynamics, member: int, obs: np.ndarray, action: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of next_obs, of one member: four hidden layers of swish, a soft clamp of the log-variance."""
    x = (np.concatenate([obs, action], 1) - dynamics.input_mean.numpy()) / dynamics.input_std.numpy()
    for layer in dynamics.layers[:-1]:
        z = x @ layer.weight[member].numpy() + layer.bias[member].numpy()
        x = z / (1 + np.exp(-z))
    out = x @ dynamics.layers[-1].weight[member].numpy() + dynamics.layers[-1].bias[member].numpy()
    mean, logvar = np.split(out, 2, axis=1)
    high, low = dynamics.max_logvar.numpy(), dynamics.min_logvar.numpy()
    logvar = high - np.log1p(np.exp(high - logvar))
    logvar = low + np.log1p(np.exp(logvar - low))
    return obs + mean[:, :OBS_DIM], np.exp(logvar / 2)[:, :OBS_DIM]


def numpy_inconsistency(agent, dynamics, obs, action, noise) -> np.ndarray:
    """Member by member, sample by sample."""
    values = np.zeros((NUM_ELITES, len(obs)))
    for i, member in enumerate(dynamics.elites.tolist()):
        mean, std = numpy_member(dynamics, member, obs, action)
        for draw in noise.numpy()[:, i]:
            next_obs = mean + std * draw[:, :OBS_DIM]
            next_action, _ = numpy_actor(agent.actor, next_obs, draw[:, OBS_DIM + 1 :])
            q = [numpy_q(agent.target_critic, j, next_obs, next_action) for j in (0, 1)]
            values[i] += np.minimum(*q) / len(noise)
    return np.sqrt(((values - values.mean(0)) ** 2).sum(0) / (NUM_ELITES - 1))


def numpy_target(agent, batch, noise, alpha: float, gamma: float) -> np.ndarray:
    """y without penalty and clamp, (batch,)."""
    reward, next_obs, terminal = (x.numpy() for x in batch[2:])
    next_action, next_log_prob = numpy_actor(agent.actor, next_obs, noise["next_action"].numpy())
    next_value = np.minimum(*(numpy_q(agent.target_critic, j, next_obs, next_action) for j in (0, 1)))
    return reward + np.where(terminal == 1, 0.0, gamma * (next_value - alpha * next_log_prob))


class Members:
    """Elite i moves every state to c_i v, without noise."""

    def __init__(self, c: torch.Tensor, v: torch.Tensor):
        self.elites, self.next_obs = torch.arange(len(c)), c[:, None] * v

    def __call__(self, x, members):
        mean = pad(self.next_obs[:, None] - x[..., : self.next_obs.shape[1]], (0, 1))
        return mean, torch.zeros_like(mean)


class LinearCritic(nn.Module):
    """Both Q are w s, whatever the action."""

    def __init__(self, w: torch.Tensor):
        super().__init__()
        self.w = nn.Parameter(w)

    def forward(self, obs, action):
        return (obs @ self.w).expand(2, -1)


class Zero(nn.Module):
    """Q values of 0, (2, rows), whose gradient tells the target of each row."""

    def __init__(self):
        super().__init__()
        self.q = nn.Parameter(torch.zeros(2, BATCH, dtype=torch.float64))

    def forward(self, obs, action):
        return self.q * 1


def target(agent, batch, noise, penalty, **settings) -> torch.Tensor:
    """y (batch,), read off the gradient of the loss where Q(s,a) = 0."""
    agent.critic = Zero()
    loss, _ = mobile.critic_loss(agent, batch, noise, 0.0, penalty, small_args(mobile, gamma=0.9, **settings))
    return -torch.autograd.grad(loss, agent.critic.q)[0][0] * BATCH / 2


# --- The method ---
def test_inconsistency_matches_numpy():
    agent, dynamics, noise = random_agent(mobile, ARGS), random_dynamics(), random_model_noise()
    obs, action = (x[NUM_REAL:] for x in random_batch()[:2])
    ours = inconsistency(agent, dynamics, obs, action, noise)
    expected = numpy_inconsistency(agent, dynamics, obs.numpy(), action.numpy(), noise)
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-9)
    assert (expected > 1e-3).all()


def test_inconsistency_of_members_on_a_line_under_a_linear_critic_is_exact():
    agent = random_agent(mobile, ARGS)
    c = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0], dtype=torch.float64)
    v, w = torch.randn(2, OBS_DIM, dtype=torch.float64)
    agent.target_critic = LinearCritic(w)
    ours = inconsistency(agent, Members(c, v), *random_batch()[:2], random_model_noise(rows=BATCH))
    torch.testing.assert_close(ours, ((w @ v).abs() * np.std(c.numpy(), ddof=1)).expand(BATCH))


def test_members_that_disagree_where_the_value_is_flat_are_consistent():
    agent, v = random_agent(mobile, ARGS), torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    agent.target_critic = LinearCritic(torch.tensor([0.0, 5.0, 5.0], dtype=torch.float64))
    members = Members(torch.arange(5.0, dtype=torch.float64) * 100, v)
    assert (inconsistency(agent, members, *random_batch()[:2], random_model_noise(rows=BATCH)) == 0).all()


def test_inconsistency_of_equal_members_vanishes_with_the_root_of_the_number_of_samples():
    agent, dynamics = random_agent(mobile, ARGS), random_dynamics()
    with torch.no_grad():
        for p in dynamics.parameters():
            if p.shape[0] == dynamics.num_members and p.ndim == 3:
                p.copy_(p[:1].clone().expand_as(p))
    few, many = (
        inconsistency(agent, dynamics, *random_batch()[:2], random_model_noise(num_samples=n, rows=BATCH)).mean().item()
        for n in (10, 1_000)
    )
    assert few > 1e-3 and few / many == pytest.approx(10, rel=0.3)
    same = random_model_noise(num_samples=1, rows=BATCH)[:, :1].expand(-1, NUM_ELITES, -1, -1)
    assert inconsistency(agent, dynamics, *random_batch()[:2], same).max() < 1e-12


# --- Losses ---
@pytest.mark.parametrize("alpha", [0.0, 0.3])
@pytest.mark.parametrize("clamp", [False, True])
def test_critic_loss_matches_numpy(alpha, clamp):
    agent, batch, noise = random_agent(mobile, ARGS), random_batch(), random_noise()
    penalty = torch.rand(BATCH, dtype=torch.float64, generator=torch.Generator().manual_seed(5)) * 3
    inputs = agent, batch, noise, torch.tensor(alpha, dtype=torch.float64), penalty
    loss, info = mobile.critic_loss(*inputs, small_args(mobile, gamma=0.9, clamp_target=clamp))
    y = numpy_target(agent, batch, noise, alpha, 0.9) - penalty.numpy()
    assert (y < 0).any() and (y > 0).any()
    y = np.where(y < 0, 0.0, y) if clamp else y
    q = [numpy_q(agent.critic, j, batch[0].numpy(), batch[1].numpy()) for j in (0, 1)]
    assert loss.item() == pytest.approx(sum(((one - y) ** 2).mean() for one in q), rel=1e-9)
    assert info["q"].item() == pytest.approx(np.mean(q), rel=1e-9)


def test_without_penalty_and_clamp_the_critic_loss_is_that_of_mopo():
    agent, batch, noise = random_agent(mobile, ARGS), random_batch(), random_noise()
    inputs = agent, batch, noise, torch.tensor(0.3, dtype=torch.float64)
    ours, _ = mobile.critic_loss(*inputs, torch.zeros(BATCH).double(), ARGS)
    theirs, _ = mopo.critic_loss(*inputs, small_args(mopo, gamma=0.9))
    assert torch.equal(ours, theirs)


def test_targets_below_zero_become_zero_only_on_request():
    agent, batch, noise = random_agent(mobile, ARGS), random_batch(), random_noise()
    batch[2], batch[4] = torch.full_like(batch[2], -1.0), torch.ones_like(batch[4])
    penalty = torch.zeros(BATCH).double()
    assert (target(agent, batch, noise, penalty, clamp_target=True) == 0).all()
    torch.testing.assert_close(target(agent, batch, noise, penalty), batch[2])


def test_target_passes_no_gradient():
    agent, batch, noise = random_agent(mobile, ARGS), random_batch(), random_noise()
    dynamics = random_dynamics().requires_grad_(True)
    agent.target_critic.requires_grad_(True)
    u = inconsistency(agent, dynamics, batch[0], batch[1], random_model_noise(rows=BATCH))
    loss, _ = mobile.critic_loss(agent, batch, noise, 0.3, u, ARGS)
    rest = [*agent.target_critic.parameters(), *agent.actor.parameters(), *dynamics.parameters()]
    assert torch.autograd.grad(loss, rest, allow_unused=True) == (None,) * len(rest)


# --- Update ---
def update(settings: dict, agent) -> dict[str, torch.Tensor]:
    args, noise = small_args(mobile, real_ratio=NUM_REAL / BATCH, **settings), random_noise()
    noise["backups"] = random_model_noise()
    return mobile.update(agent, random_dynamics(), as_rows(random_batch()), noise, args)


@pytest.mark.parametrize("fixed_alpha", [None, 0.2])
@pytest.mark.parametrize("backup_entropy", [False, True])
@pytest.mark.parametrize("clamp_target", [False, True])
def test_first_critic_step_is_on_the_targets_of_numpy(clamp_target, backup_entropy, fixed_alpha):
    """The loss that `update` reports, with all parts computed independently: simulated rows alone pay."""
    settings = {"penalty_coef": 0.7, "backup_entropy": backup_entropy, "fixed_alpha": fixed_alpha}
    settings["clamp_target"] = clamp_target
    agent, dynamics, batch = random_agent(mobile, ARGS), random_dynamics(), random_batch()
    obs, action = batch[0].numpy(), batch[1].numpy()
    u = numpy_inconsistency(agent, dynamics, obs[NUM_REAL:], action[NUM_REAL:], random_model_noise())
    alpha = backup_entropy * (fixed_alpha or 1.0)  # log_alpha starts at 0
    y = numpy_target(agent, batch, random_noise(), alpha, 0.99)
    y[NUM_REAL:] -= 0.7 * u
    assert (y < 0).any()
    y = np.where(y < 0, 0.0, y) if clamp_target else y
    q = [numpy_q(agent.critic, j, obs, action) for j in (0, 1)]
    info = update(settings, agent)
    assert info["critic_loss"].item() == pytest.approx(sum(((one - y) ** 2).mean() for one in q), rel=1e-6)
    assert info["inconsistency"].item() == pytest.approx(u.mean(), rel=1e-9)
    assert info["alpha"].item() == pytest.approx(fixed_alpha or 1.0)


@pytest.mark.parametrize(
    "settings, alpha", [({}, 1.0), ({"max_alpha": math.inf}, math.exp(0.7)), ({"fixed_alpha": 0.2}, 0.2)], ids=str
)
def test_actor_and_temperature_go_where_numpy_says(settings, alpha):
    agent = random_agent(mobile, ARGS)
    with torch.no_grad():
        agent.log_alpha.fill_(0.7)
    actor = copy.deepcopy(agent.actor)
    info = update(settings, agent)
    obs = random_batch()[0].numpy()
    action, log_prob = numpy_actor(actor, obs, random_noise()["action"].numpy())
    q = np.minimum(*(numpy_q(agent.critic, j, obs, action) for j in (0, 1)))  # of the critic after its step
    assert info["actor_loss"].item() == pytest.approx(np.mean(alpha * log_prob - q), rel=1e-6)
    low_entropy = log_prob.mean() > ACTION_DIM
    assert (agent.log_alpha.item() > 0.7) == (low_entropy and "fixed_alpha" not in settings)


def test_updates_without_a_penalty_and_with_entropy_are_those_of_mopo():
    settings = dict(actor_lr=2e-3, critic_lr=1e-3, alpha_lr=3e-3, gamma=0.95, tau=0.1, penalty_coef=0.0)
    agent = random_agent(mobile, small_args(mobile, **settings))
    theirs, args = copy.deepcopy(agent), small_args(mopo, **settings)
    for _ in range(3):
        update(settings | {"backup_entropy": True}, agent)
        mopo.update(theirs, as_rows(random_batch()), random_noise(), args)
    for name, value in theirs.state_dict().items():
        assert torch.equal(agent.state_dict()[name], value), name


@pytest.mark.parametrize("fixed_alpha", [None, 0.2])
def test_update_moves_every_part_but_a_fixed_temperature(fixed_alpha):
    agent = random_agent(mobile, ARGS)
    before = snapshot(agent)
    update({"fixed_alpha": fixed_alpha}, agent)
    parts = {"actor", "critic", "target_critic", "actor_opt", "critic_opt"}
    assert changed(agent, before) == parts | (set() if fixed_alpha else {"log_alpha", "alpha_opt"})


def test_a_run_without_a_penalty_and_with_entropy_is_one_of_mopo_without_a_penalty(monkeypatch, tmp_path):
    settings = {"penalty_coef": 0.0, "backup_entropy": True, "num_samples": 2}
    assert_run_ends_as_mopo(mobile, settings, monkeypatch, tmp_path)


# --- Rollouts, settings ---
def test_a_batch_without_simulated_rows_is_refused_before_anything_is_made(tmp_path):
    with pytest.raises(InputError, match="--real-ratio 1.0 leaves"):
        mobile.main(mobile.Args(real_ratio=1.0, run_dir=str(tmp_path / "runs")))
    assert not (tmp_path / "runs").exists()


def test_an_ensemble_with_a_lone_elite_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(mobile, "load_or_fit", lambda *_, **__: Dynamics(3, 1, 7, 1, 8))
    with pytest.raises(InputError, match="--num-elites above 1"):
        mobile.main(mobile.Args(run_dir=str(tmp_path), num_threads=1))


def test_tuned_settings_are_those_of_the_authors_code():
    hopper = {"rollout_length": 5, "penalty_coef": 1.5, "clamp_target": True}
    assert mobile.TUNED["d4rl/hopper-medium-v2"] == hopper | {"fixed_alpha": 0.2}
    assert mobile.TUNED["d4rl/hopper-medium-expert-v2"] == hopper
    assert mobile.TUNED["d4rl/halfcheetah-medium-expert-v2"]["real_ratio"] == 0.5
    assert mobile.TUNED["d4rl/walker2d-medium-v2"]["dynamics_max_epochs"] == 30
    assert mobile.TUNED["d4rl/hopper-random-v2"]["penalty_coef"] == 5.0
    assert len(mobile.TUNED) == 14
