"""One-step's functions against independent float64 NumPy, a chain with known values, and stub critics."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_combo import ACTION_DIM, BATCH, OBS_DIM, numpy_actor, numpy_q, random_agent, random_batch
from test_sac_bc import numpy_gaussian, numpy_log_prob, random_behaviour
from torch import nn

import algos.onestep as onestep
from common.dataset import InputError, load_dataset

NUM = 4  # samples of the behaviour


def random_args(**settings) -> onestep.Args:
    return onestep.Args(hidden_sizes=(8, 8), num_samples=NUM, **settings)


def random_noise(seed: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    candidates = torch.randn(NUM, BATCH, ACTION_DIM, generator=generator, dtype=torch.float64)
    return {"candidates": candidates, "action": torch.randn(candidates[0].shape, generator=generator).double()}


def next_actions() -> torch.Tensor:
    return torch.rand(BATCH, ACTION_DIM, generator=torch.Generator().manual_seed(9), dtype=torch.float64) * 2 - 1


def as_rows(batch: list[torch.Tensor], next_action: torch.Tensor) -> torch.Tensor:
    names = ("obs", "action", "reward", "next_obs", "terminal")
    return torch.cat([onestep.flat_rows(SimpleNamespace(**dict(zip(names, batch)))), next_action], dim=-1)


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(module.state_dict())


def unchanged(module: nn.Module, before: dict) -> bool:
    return all(torch.equal(before[key], value) for key, value in module.state_dict().items())


# --- Rows ---
def save_log(path, terminals: list[int], timeouts: list[int]) -> str:
    n = len(terminals)
    arrays = {"observations": np.arange(n)[:, None], "actions": np.arange(n)[:, None] / n, "rewards": np.ones(n)}
    np.savez(path, **arrays, next_observations=np.arange(n)[:, None] + 1.0, terminals=terminals, timeouts=timeouts)
    return str(path)


def test_the_next_action_is_the_logged_one_and_never_that_of_another_episode(tmp_path):
    data = load_dataset(save_log(tmp_path / "a.npz", [0, 0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 0, 0]))
    rows = onestep.sarsa_rows(data)
    obs, action, terminal, next_action = rows[:, 0], rows[:, 1], rows[:, 4], rows[:, 5]
    assert obs.tolist() == [0, 1, 2, 3, 5]  # not 4, a time limit, nor 6, the end of the recording
    assert terminal.tolist() == [0, 0, 1, 0, 0]
    later = {int(s): a for s, a in zip(data.obs[:, 0], data.action[:, 0])}
    for i in (0, 1, 3, 4):
        assert next_action[i] == later[int(obs[i]) + 1] and action[i] == later[int(obs[i])]


def test_data_without_two_rows_in_a_row_are_refused(tmp_path):
    data = load_dataset(save_log(tmp_path / "a.npz", [0] * 4, [1] * 4))
    with pytest.raises(InputError, match="follow each other"):
        onestep.sarsa_rows(data)


# --- SARSA ---
def test_critic_loss_is_that_of_numpy_each_head_with_its_own_target():
    args = random_args(gamma=0.9)
    agent, batch, next_action = random_agent(onestep, args), random_batch(), next_actions()
    obs, action, reward, next_obs, terminal = (x.numpy() for x in batch)
    expected = 0.0
    for j in (0, 1):
        next_q = numpy_q(agent.target_critic, j, next_obs, next_action.numpy())
        target = np.where(terminal == 1, reward, reward + 0.9 * next_q)
        expected += ((numpy_q(agent.critic, j, obs, action) - target) ** 2).mean()
    info = onestep.update(agent, random_behaviour(), as_rows(batch, next_action), random_noise(), False, args)
    assert info["critic_loss"].item() == pytest.approx(expected, rel=1e-9)


def test_on_a_chain_it_finds_the_value_of_the_behaviour_and_not_of_the_best_actions():
    """From state 0 every action leads to 1; there +1 pays 2, -1 pays -1, and the log takes +1 twice in three times."""
    columns = []
    for first in (-1.0, 1.0):
        for second in (1.0, 1.0, -1.0):
            columns.append((0.0, first, 0.5 * first, 1.0, 0.0, second))
            columns.append((1.0, second, 2.0 if second > 0 else -1.0, 0.0, 1.0, -first))  # another episode's action
    log = torch.tensor(columns, dtype=torch.float64)
    obs, action, reward, next_obs, terminal, next_action = log.split(1, dim=1)
    batch = [obs, action, reward[:, 0], next_obs, terminal[:, 0], next_action]

    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.q = nn.Parameter(torch.zeros(2, 2, 2, dtype=torch.float64))  # (head, state, action)

        def forward(self, obs, action):
            return self.q[:, obs[:, 0].long(), (action[:, 0] > 0).long()]

    critic, target_critic = Table(), Table()
    agent, args = SimpleNamespace(critic=critic, target_critic=target_critic), onestep.Args(gamma=0.9)
    opt = torch.optim.SGD(critic.parameters(), 1.0)
    for _ in range(300):
        loss, _ = onestep.critic_loss(agent, batch, args)
        opt.zero_grad()
        loss.backward()
        opt.step()
        target_critic.load_state_dict(critic.state_dict())
    value = 2 / 3 * 2 - 1 / 3  # of state 1 under the log
    expected = torch.tensor([[-0.5 + 0.9 * value, 0.5 + 0.9 * value], [-1, 2]], dtype=torch.float64)
    torch.testing.assert_close(critic.q.detach(), expected.expand(2, 2, 2), atol=1e-6, rtol=0)


# --- Improvement ---
def test_reverse_kl_loss_is_that_of_numpy():
    args = random_args(kl_coef=0.7)
    agent, behaviour, batch, noise = random_agent(onestep, args), random_behaviour(), random_batch(), random_noise()
    obs = batch[0].numpy()
    action, _ = numpy_actor(agent.actor, obs, noise["action"].numpy())
    q = np.minimum(*(numpy_q(agent.critic, j, obs, action) for j in (0, 1)))
    (m1, s1), (m2, s2) = numpy_gaussian(agent.actor, obs), numpy_gaussian(behaviour, obs)
    kl = (np.log(s2 / s1) + (s1**2 + (m1 - m2) ** 2) / (2 * s2**2) - 1 / 2).sum(axis=1)
    info = onestep.update(agent, behaviour, as_rows(batch, next_actions()), noise, True, args)
    assert info["actor_loss"].item() == pytest.approx((0.7 * kl - q).mean(), rel=1e-6)
    assert info["kl"].item() == pytest.approx(kl.mean(), rel=1e-6)


@pytest.mark.parametrize("max_weight", [100.0, 1.05])
def test_exp_weights_loss_is_that_of_numpy(max_weight):
    args = random_args(improvement="exp-weights", inverse_temperature=2.0, max_weight=max_weight)
    agent, behaviour, batch, noise = random_agent(onestep, args), random_behaviour(), random_batch(), random_noise()
    obs, logged = batch[0].numpy(), batch[1].numpy()

    def min_q(action):
        return np.minimum(*(numpy_q(agent.critic, j, obs, action) for j in (0, 1)))

    candidates = [numpy_actor(behaviour, obs, noise["candidates"][k].numpy())[0] for k in range(NUM)]
    value = np.mean([min_q(action) for action in candidates], axis=0)
    weight = np.minimum(np.exp(2 * (min_q(logged) - value)), max_weight)
    assert max_weight == 100 or 0 < (weight == max_weight).sum() < BATCH
    expected = -(weight * numpy_log_prob(agent.actor, obs, logged)).mean()
    info = onestep.update(agent, behaviour, as_rows(batch, next_actions()), noise, True, args)
    assert info["actor_loss"].item() == pytest.approx(expected, rel=1e-6)


def test_with_a_huge_coefficient_the_policy_stays_the_behaviour():
    agent, behaviour = random_agent(onestep, random_args()), random_behaviour()
    agent.actor.load_state_dict(behaviour.state_dict())
    params = list(agent.actor.parameters())
    batch, noise = random_batch(), random_noise()

    def grads(kl_coef: float) -> tuple[torch.Tensor, ...]:
        args = random_args(kl_coef=kl_coef)
        return torch.autograd.grad(onestep.reverse_kl_loss(agent, behaviour, batch, noise, args)[0], params)

    free, held = grads(0.0), grads(1e9)
    assert max(g.abs().max() for g in free) > 1e-3
    for one, other in zip(free, held, strict=True):  # at the behaviour the KL's gradient is zero, whatever its weight
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        params[0].add_(0.1)
    assert grads(1e9)[0].sum() > 0


@pytest.mark.parametrize("improvement", ["reverse-kl", "exp-weights"])
def test_each_stage_changes_its_own_networks_alone(improvement):
    args = random_args(improvement=improvement)
    agent, behaviour, rows = random_agent(onestep, args), random_behaviour(), as_rows(random_batch(), next_actions())
    nets = {"actor": agent.actor, "critic": agent.critic, "target": agent.target_critic, "behaviour": behaviour}
    for improve, changing in ((False, {"critic", "target"}), (True, {"actor"})):
        before = {name: state(net) for name, net in nets.items()}
        onestep.update(agent, behaviour, rows, random_noise(), improve, args)
        assert {name for name, net in nets.items() if not unchanged(net, before[name])} == changing


@pytest.mark.parametrize("settings", [{}, *onestep.TUNED.values()], ids=["default", *onestep.TUNED])
def test_no_evaluation_counts_that_comes_before_the_policy_improves(settings):
    args = onestep.Args(**settings)
    since_the_first_that_counts = (args.score_evals - 1) * args.eval_interval
    assert args.policy_share * args.num_updates > since_the_first_that_counts


class Opposed(nn.Module):
    """A critic whose first Q wants the sum of the action large and whose second wants it small."""

    def forward(self, obs, action):
        total = action.sum(dim=-1)
        return torch.stack([total, -2 * total])


def test_easy_bcq_takes_the_best_of_the_behaviours_candidates_and_depends_on_nothing_else():
    behaviour, noise = random_behaviour(), random_noise()["candidates"][:, :1]
    policy = onestep.EasyBCQ(OBS_DIM, ACTION_DIM, (8, 8), NUM).double()
    policy.critic, policy.behaviour = Opposed(), behaviour
    policy.noise.copy_(noise)
    obs = random_batch()[0]
    action = policy.act(obs)
    for row in range(BATCH):
        candidates = [numpy_actor(behaviour, obs[row : row + 1].numpy(), noise[k].numpy())[0][0] for k in range(NUM)]
        best = max(candidates, key=lambda a: min(a.sum(), -2 * a.sum()))
        np.testing.assert_allclose(action[row], best)
    torch.testing.assert_close(policy.act(obs[3:5]), action[3:5])
    assert len({tuple(np.round(a, 6)) for a in action.numpy()}) == BATCH
