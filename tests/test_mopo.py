"""MOPO's functions against independent NumPy and torch computations, hand-made numbers and stub models."""

import copy
import math
import os
import shutil
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch._inductor.config
from torch import nn
from torch._inductor.utils import fresh_cache

import algos.mopo as mopo

OBS_DIM, ACTION_DIM, BATCH = 3, 2, 32
REWARD, TERMINAL = OBS_DIM + ACTION_DIM, 2 * OBS_DIM + ACTION_DIM + 1  # columns of a row


# --- Helpers ---
def random_agent(args: mopo.Args, dtype=torch.float64, seed: int = 0) -> mopo.Agent:
    """With a target critic that differs from the critic, and weights large enough to reach the bounds of log_std."""
    torch.manual_seed(seed)
    agent = mopo.Agent(OBS_DIM, ACTION_DIM, args).to(dtype)
    with torch.no_grad():
        agent.actor.net[-1].weight.mul_(30)
        agent.actor.net[-1].bias[ACTION_DIM:] += torch.tensor([-3.5, 1.0])
        for p in agent.target_critic.parameters():
            p.add_(0.03 * torch.randn_like(p))
    return agent


def random_batch(dtype=torch.float64, seed: int = 1, batch: int = BATCH) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    obs, next_obs = torch.randn(2, batch, OBS_DIM, generator=generator, dtype=dtype)
    action = torch.rand(batch, ACTION_DIM, generator=generator, dtype=dtype) * 2 - 1
    reward = torch.randn(batch, generator=generator, dtype=dtype) * 5
    terminal = (torch.arange(batch) % 3 == 0).to(dtype)
    return [obs, action, reward, next_obs, terminal]


def random_noise(dtype=torch.float64, seed: int = 2, batch: int = BATCH) -> torch.Tensor:
    return torch.randn(2, batch, ACTION_DIM, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def as_rows(batch: list[torch.Tensor]) -> torch.Tensor:
    return mopo.flat_rows(SimpleNamespace(**dict(zip(("obs", "action", "reward", "next_obs", "terminal"), batch))))


def weights(module: nn.Module) -> list[np.ndarray]:
    return [p.detach().double().numpy() for p in module.parameters()]


def numpy_mlp(x: np.ndarray, layers: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    for weight, bias in layers[:-1]:
        x = np.maximum(x @ weight + bias, 0.0)
    return x @ layers[-1][0] + layers[-1][1]


def numpy_actor(actor: mopo.Actor, obs: np.ndarray, noise: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The density of a normal divided by the derivative of tanh, as written in any textbook."""
    w = weights(actor)
    out = numpy_mlp(obs, [(w[0].T, w[1]), (w[2].T, w[3]), (w[4].T, w[5])])
    mean, std = out[:, :ACTION_DIM], np.exp(np.clip(out[:, ACTION_DIM:], -5, 2))
    x = mean + std * noise
    density = np.exp(-(((x - mean) / std) ** 2) / 2) / (std * np.sqrt(2 * np.pi))
    return np.tanh(x), (np.log(density) + 2 * np.log(np.cosh(x))).sum(1)


def numpy_q(critic: mopo.Critic, obs: np.ndarray, action: np.ndarray) -> list[np.ndarray]:
    w, x = weights(critic), np.concatenate([obs, action], axis=1)
    return [numpy_mlp(x, [(w[i][j], w[i + 1][j, 0]) for i in (0, 2, 4)])[:, 0] for j in (0, 1)]


def snapshot(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same(module: nn.Module, before: dict[str, torch.Tensor]) -> None:
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name


# --- Actor ---
def test_log_prob_is_that_of_a_squashed_normal_in_torch_distributions():
    actor, obs, noise = random_agent(mopo.Args()).actor, random_batch()[0], random_noise()[0]
    action, log_prob = actor(obs, noise)
    mean, log_std = actor.net(obs).chunk(2, dim=-1)
    assert (log_std > 2).any() and (log_std < -5).any()  # both bounds are at work
    normal = torch.distributions.Normal(mean, log_std.clip(-5, 2).exp())
    squashed = torch.distributions.TransformedDistribution(normal, torch.distributions.TanhTransform(cache_size=1))
    inside = action.abs().amax(1) < 1 - 1e-6  # the inverse of tanh is exact enough there
    assert inside.sum() > 5
    reference = squashed.log_prob(action).sum(-1)
    torch.testing.assert_close(log_prob[inside], reference[inside], rtol=1e-6, atol=1e-6)


def test_log_prob_and_action_match_numpy():
    actor, obs, noise = random_agent(mopo.Args(), torch.float32).actor, random_batch()[0], random_noise()[0]
    action, log_prob = actor(obs.float(), noise.float())
    expected = numpy_actor(actor, obs.numpy(), noise.numpy())
    np.testing.assert_allclose(action.detach().numpy(), expected[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(log_prob.detach().numpy(), expected[1], rtol=1e-5, atol=1e-4)


def test_density_of_actions_integrates_to_one():
    torch.manual_seed(0)
    actor = mopo.Actor(OBS_DIM, 1).double()
    noise = torch.linspace(-9, 9, 20_001, dtype=torch.float64)[:, None]
    with torch.no_grad():
        for obs in torch.randn(5, OBS_DIM, dtype=torch.float64) * 3:
            action, log_prob = actor(obs.expand(len(noise), -1), noise)
            assert abs(torch.trapezoid(log_prob.exp(), action[:, 0]).item() - 1) < 1e-5


@pytest.mark.parametrize("mean", [-1e4, -30.0, 30.0, 1e4])
def test_log_prob_and_its_gradient_are_finite_at_huge_pre_tanh_values(mean):
    actor = mopo.Actor(OBS_DIM, ACTION_DIM)
    with torch.no_grad():
        actor.net[-1].weight.zero_()
        actor.net[-1].bias.copy_(torch.tensor([mean] * ACTION_DIM + [0.0] * ACTION_DIM))
    action, log_prob = actor(torch.zeros(1, OBS_DIM), torch.zeros(1, ACTION_DIM))
    grads = torch.autograd.grad(log_prob.sum(), list(actor.parameters()))
    assert all(grad.isfinite().all() for grad in grads)
    # 1 - tanh(x)^2 = 4 exp(-2|x|) for large |x|
    expected = ACTION_DIM * (-0.5 * math.log(2 * math.pi) - math.log(4) + 2 * abs(mean))
    assert action[0].tolist() == [math.copysign(1, mean)] * ACTION_DIM
    assert log_prob.item() == pytest.approx(expected, rel=1e-5)


def test_deterministic_action_is_the_one_without_noise():
    actor, obs = random_agent(mopo.Args()).actor, random_batch()[0]
    assert torch.equal(actor.act(obs), actor(obs, torch.zeros(BATCH, ACTION_DIM, dtype=torch.float64))[0])


# --- Losses ---
def test_critic_loss_matches_numpy():
    agent, batch, noise = random_agent(mopo.Args(), torch.float32), random_batch(), random_noise()[0]
    alpha, gamma = 0.3, 0.9
    loss, info = mopo.critic_loss(
        agent.critic,
        agent.target_critic,
        agent.actor,
        torch.tensor(alpha),
        [x.float() for x in batch],
        noise.float(),
        gamma,
    )
    obs, action, reward, next_obs, terminal = (x.numpy() for x in batch)
    next_action, next_log_prob = numpy_actor(agent.actor, next_obs, noise.numpy())
    next_value = np.minimum(*numpy_q(agent.target_critic, next_obs, next_action)) - alpha * next_log_prob
    target = np.where(terminal == 1, reward, reward + gamma * next_value)
    q1, q2 = numpy_q(agent.critic, obs, action)
    assert loss.item() == pytest.approx(np.mean((q1 - target) ** 2) + np.mean((q2 - target) ** 2), rel=1e-5)
    assert info["q"].item() == pytest.approx((q1.mean() + q2.mean()) / 2, rel=1e-5)


def test_critic_loss_at_terminal_rows_ignores_the_successor():
    agent, batch, noise = random_agent(mopo.Args()), random_batch(), random_noise()[0]
    batch[4] = torch.ones(BATCH, dtype=torch.float64)

    def loss(next_obs):
        rows = [*batch[:3], next_obs, batch[4]]
        return mopo.critic_loss(agent.critic, agent.target_critic, agent.actor, torch.tensor(0.3), rows, noise, 0.9)[0]

    assert torch.equal(loss(batch[3]), loss(batch[3] + 1))


def test_actor_loss_matches_numpy():
    agent, obs, noise = random_agent(mopo.Args(), torch.float32), random_batch()[0], random_noise()[1]
    loss, info = mopo.actor_loss(agent.critic, agent.actor, torch.tensor(0.3), obs.float(), noise.float())
    action, log_prob = numpy_actor(agent.actor, obs.numpy(), noise.numpy())
    q = np.minimum(*numpy_q(agent.critic, obs.numpy(), action))
    assert loss.item() == pytest.approx(np.mean(0.3 * log_prob - q), rel=1e-5)
    assert info["log_prob"].item() == pytest.approx(log_prob.mean(), rel=1e-5)


def test_alpha_loss_matches_a_hand_made_number():
    log_alpha = torch.tensor(-0.5, requires_grad=True)
    loss, _ = mopo.alpha_loss(log_alpha, torch.tensor(1.25), -3.0)
    assert loss.item() == pytest.approx(-0.875)  # 0.5 * (1.25 - 3)
    assert torch.autograd.grad(loss, log_alpha)[0].item() == pytest.approx(1.75)  # not -1.25 + 3 times exp(log_alpha)


@pytest.mark.parametrize("target_entropy, rises", [(50.0, True), (-500.0, False)])
def test_temperature_rises_exactly_when_entropy_is_below_its_target(target_entropy, rises):
    args = mopo.Args(target_entropy=target_entropy)
    agent = random_agent(args)
    info = mopo.update(agent, as_rows(random_batch()), random_noise(), args)
    assert (-info["log_prob"].item() < target_entropy) == rises
    assert (agent.log_alpha.item() > 0) == rises


def test_target_entropy_is_by_default_minus_the_action_dimension():
    agent, args = random_agent(mopo.Args()), mopo.Args()
    info = mopo.update(agent, as_rows(random_batch()), random_noise(), args)
    gradient = agent.alpha_opt.mean[0].item() / 0.1  # of the first step
    assert gradient == pytest.approx(-(info["log_prob"].item() - ACTION_DIM), rel=1e-6)


def test_target_passes_no_gradient():
    agent = random_agent(mopo.Args())
    agent.target_critic.requires_grad_(True)
    alpha = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    rest = [*agent.target_critic.parameters(), *agent.actor.parameters(), alpha]
    inputs = (agent.critic, agent.target_critic, agent.actor, alpha, random_batch(), random_noise()[0], 0.9)
    grads = torch.autograd.grad(mopo.critic_loss(*inputs)[0], rest, allow_unused=True)
    assert grads == (None,) * len(rest)


# --- Update ---
def test_critic_step_leaves_everything_else_bit_identical():
    agent, batch, noise = random_agent(mopo.Args()), random_batch(), random_noise()[0]
    before = snapshot(agent)
    inputs = (agent.critic, agent.target_critic, agent.actor, torch.tensor(0.3), batch, noise, 0.9)
    agent.critic_opt.minimize(mopo.critic_loss(*inputs)[0])
    changed = {name for name, value in agent.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.split(".")[0] for name in changed} == {"critic", "critic_opt"}
    assert all(p.grad is None for p in agent.parameters())


def test_actor_step_leaves_everything_else_bit_identical():
    agent, obs, noise = random_agent(mopo.Args()), random_batch()[0], random_noise()[1]
    before = snapshot(agent)
    agent.actor_opt.minimize(mopo.actor_loss(agent.critic, agent.actor, torch.tensor(0.3), obs, noise)[0])
    changed = {name for name, value in agent.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.split(".")[0] for name in changed} == {"actor", "actor_opt"}
    assert all(p.grad is None for p in agent.parameters())


def test_update_moves_every_trainable_tensor():
    agent, args = random_agent(mopo.Args()), mopo.Args()
    before = snapshot(agent)
    mopo.update(agent, as_rows(random_batch()), random_noise(), args)
    for module in ("actor", "critic", "target_critic", "log_alpha"):
        names = [name for name in before if name.split(".")[0] == module]
        assert names and not any(torch.equal(agent.state_dict()[name], before[name]) for name in names)


def test_target_critic_starts_as_a_copy_of_the_critic():
    agent = mopo.Agent(OBS_DIM, ACTION_DIM, mopo.Args())
    for target, param in zip(agent.target_critic.parameters(), agent.critic.parameters(), strict=True):
        assert torch.equal(target, param) and target.data_ptr() != param.data_ptr() and not target.requires_grad


@pytest.mark.parametrize("tau", [0.0, 0.01, 1.0])
def test_target_critic_moves_by_tau_of_the_difference_to_the_new_critic(tau):
    args = mopo.Args(tau=tau)
    agent = random_agent(args)
    before = weights(copy.deepcopy(agent.target_critic))
    mopo.update(agent, as_rows(random_batch()), random_noise(), args)
    for old, new, param in zip(before, weights(agent.target_critic), weights(agent.critic), strict=True):
        np.testing.assert_allclose(new - old, tau * (param - old), rtol=1e-9, atol=1e-12)


def test_adam_equals_that_of_torch_with_the_learning_rate_of_its_buffer():
    torch.manual_seed(0)
    ours = [torch.randn(4, 3).double().requires_grad_(True), torch.randn(3).double().requires_grad_(True)]
    theirs = [p.detach().clone().requires_grad_(True) for p in ours]
    x, y = torch.randn(16, 4).double(), torch.randn(16, 3).double()
    adam, reference = mopo.Adam(ours, 0.02).double(), torch.optim.Adam(theirs, 0.02)
    assert adam.state_dict().keys() == {"step", *(f"{name}.{i}" for name in ("mean", "square") for i in (0, 1))}  # kept
    for step in range(20):
        if step == 10:
            adam.lr.fill_(0.005)  # as a schedule does
            reference.param_groups[0]["lr"] = 0.005
        adam.minimize((x @ ours[0] + ours[1] - y).square().mean())
        reference.zero_grad()
        (x @ theirs[0] + theirs[1] - y).square().mean().backward()
        reference.step()
        for a, b in zip(ours, theirs):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


def plain_mlp(layers: list[tuple[torch.Tensor, torch.Tensor]]) -> nn.Sequential:
    """layers: (weight (in_dim, out_dim), bias (out_dim,))"""
    modules = []
    for weight, bias in layers:
        linear = nn.Linear(*weight.shape).double()
        linear.load_state_dict({"weight": weight.detach().T.clone(), "bias": bias.detach().clone()})
        modules += [linear, nn.ReLU()]
    return nn.Sequential(*modules[:-1])


def plain_critic(critic: mopo.Critic, j: int) -> nn.Sequential:
    p = list(critic.parameters())
    return plain_mlp([(p[i][j], p[i + 1][j, 0]) for i in (0, 2, 4)])


class PlainSac:
    """Textbook SAC: two critic networks, torch.distributions, torch.optim.Adam and backward()."""

    def __init__(self, agent: mopo.Agent, args: mopo.Args):
        p = list(agent.actor.parameters())
        self.actor = plain_mlp([(p[i].T, p[i + 1]) for i in (0, 2, 4)])
        self.q1, self.q2 = plain_critic(agent.critic, 0), plain_critic(agent.critic, 1)
        self.target1, self.target2 = plain_critic(agent.target_critic, 0), plain_critic(agent.target_critic, 1)
        self.log_alpha = agent.log_alpha.detach().clone().requires_grad_(True)
        self.actor_opt = torch.optim.Adam(self.actor.parameters(), args.actor_lr)
        self.critic_opt = torch.optim.Adam([*self.q1.parameters(), *self.q2.parameters()], args.critic_lr)
        self.alpha_opt = torch.optim.Adam([self.log_alpha], args.alpha_lr)
        self.args = args

    def sample(self, obs, noise):
        mean, log_std = self.actor(obs).tensor_split(2, dim=1)
        std = torch.exp(torch.clip(log_std, -5, 2))
        x = mean + std * noise
        log_prob = torch.distributions.Normal(mean, std).log_prob(x) + 2 * torch.log(torch.cosh(x))
        return torch.tanh(x), log_prob.sum(dim=1, keepdim=True)

    def update(self, batch, noise):
        obs, action, reward, next_obs, terminal = batch
        alpha = min(math.exp(self.log_alpha.item()), self.args.max_alpha)
        with torch.no_grad():
            next_action, next_log_prob = self.sample(next_obs, noise[0])
            x = torch.cat([next_obs, next_action], dim=1)
            value = torch.min(self.target1(x), self.target2(x)) - alpha * next_log_prob
            target = reward[:, None] + self.args.gamma * (1 - terminal[:, None]) * value
        x = torch.cat([obs, action], dim=1)
        loss_q = nn.functional.mse_loss(self.q1(x), target) + nn.functional.mse_loss(self.q2(x), target)
        self.critic_opt.zero_grad()
        loss_q.backward()
        self.critic_opt.step()
        new_action, log_prob = self.sample(obs, noise[1])
        x = torch.cat([obs, new_action], dim=1)
        loss_pi = (alpha * log_prob - torch.min(self.q1(x), self.q2(x))).mean()
        self.actor_opt.zero_grad()
        loss_pi.backward()
        self.actor_opt.step()
        loss_alpha = -(self.log_alpha * (log_prob.detach() - ACTION_DIM)).mean()
        self.alpha_opt.zero_grad()
        loss_alpha.backward()
        self.alpha_opt.step()
        with torch.no_grad():
            for target_net, net in ((self.target1, self.q1), (self.target2, self.q2)):
                for t, p in zip(target_net.parameters(), net.parameters(), strict=True):
                    t.copy_((1 - self.args.tau) * t + self.args.tau * p)
        return {"critic_loss": loss_q, "actor_loss": loss_pi, "alpha": alpha, "log_prob": log_prob.mean()}


@pytest.mark.parametrize("log_alpha", [-1.0, 0.7])  # below and above the bound max_alpha
def test_updates_equal_those_of_a_plain_sac_with_two_critics(log_alpha):
    args = mopo.Args(actor_lr=2e-3, critic_lr=1e-3, alpha_lr=3e-3, gamma=0.95, tau=0.1)
    agent = random_agent(args)
    with torch.no_grad():
        agent.log_alpha.fill_(log_alpha)
        agent.actor.net[-1].weight.div_(30)  # cosh(x) of the plain one overflows at huge x
    plain = PlainSac(agent, args)
    for step in range(8):
        batch, noise = random_batch(seed=100 + step), random_noise(seed=200 + step)
        info = mopo.update(agent, as_rows(batch), noise, args)
        expected = plain.update(batch, noise)
        for name, value in expected.items():
            assert info[name].item() == pytest.approx(float(torch.as_tensor(value).detach()), rel=1e-5), (step, name)
    for ours, theirs in (
        (plain_mlp([(p.T, b) for p, b in zip(*[iter(agent.actor.parameters())] * 2)]), plain.actor),
        (plain_critic(agent.critic, 0), plain.q1),
        (plain_critic(agent.critic, 1), plain.q2),
        (plain_critic(agent.target_critic, 0), plain.target1),
        (plain_critic(agent.target_critic, 1), plain.target2),
    ):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
    assert agent.log_alpha.item() == pytest.approx(plain.log_alpha.item(), rel=1e-5)
    assert agent.log_alpha.item() != log_alpha


# --- Compilation and precision ---
CPU = torch.device("cpu")
DEVICES = [CPU] + [torch.device("cuda")] * torch.cuda.is_available()


@pytest.fixture
def precision():
    yield
    torch.set_float32_matmul_precision("highest")


def test_highest_precision_keeps_float32_products(precision):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 300, 300, generator=generator)
    mopo.set_matmul_precision("highest", CPU)
    torch.testing.assert_close(a @ b, (a.double() @ b.double()).float(), rtol=0, atol=1e-4)  # bfloat16: 0.1


@pytest.mark.parametrize("exact", [True, False])
def test_medium_is_what_the_cpu_gets_unless_it_rounds(exact, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", asked.append)
    if not exact:
        monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: torch.full((64, 64), 64 / 9 * 1.002))
    mopo.set_matmul_precision("highest", CPU)
    assert asked == ["medium"] + ["highest"] * (not exact)


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_compiled_and_eager_updates_agree(device, capsys):
    args = mopo.Args(actor_lr=1e-4)
    eager = random_agent(args, torch.float32).to(device)
    with torch.no_grad():
        eager.actor.net[-1].weight.div_(30)
    agent = copy.deepcopy(eager)
    compiled = mopo.compiled(lambda rows, noise: mopo.update(agent, rows, noise, args), args, device)
    start = snapshot(agent)
    step = torch._inductor.config.patch({"cpp.vec_isa_ok": True})(compiled)  # skips test compilations, ten seconds
    for i in range(50):
        for a in (agent, eager):
            a.actor_opt.lr.fill_(args.actor_lr * (1 - i / 50))  # a schedule must reach the graph
        rows = as_rows(random_batch(torch.float32, seed=i)).to(device)
        noise = random_noise(torch.float32, seed=50 + i).to(device)
        info, expected = step(rows, noise), mopo.update(eager, rows, noise, args)
        assert info.keys() == expected.keys()
    torch.testing.assert_close(info, expected, rtol=1e-4, atol=1e-5)
    for name, value in eager.state_dict().items():
        if "_opt" not in name:
            moved = (value - start[name]).abs().max().item()
            torch.testing.assert_close(agent.state_dict()[name], value, rtol=1e-4, atol=1e-2 * moved, msg=name)
    assert agent.actor_opt.step.item() == 50
    assert capsys.readouterr().out == ""  # it really was compiled


def test_compile_switched_off_gives_the_function_itself():
    assert mopo.compiled(math.sqrt, mopo.Args(compile=False), CPU) is math.sqrt


def test_an_older_torch_gives_the_function_itself_after_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch._dynamo, "config", object())
    assert mopo.compiled(math.sqrt, mopo.Args(), CPU) is math.sqrt
    assert capsys.readouterr().out.startswith("compile     needs torch 2.13")


@pytest.mark.parametrize("trouble", ["absent compiler", "broken compiler", "unwritable cache"])
def test_where_compiling_fails_updates_go_on_eagerly_after_one_line(trouble, tmp_path, monkeypatch, capsys):
    fake = tmp_path / "g++"
    if trouble == "broken compiler":  # it answers when asked for its version but compiles nothing
        fake.write_text("#!/bin/sh\n[ \"$1\" = --version ] && { echo 'g++ 12.2.0'; exit 0; }\nexit 1\n")
        fake.chmod(0o755)
    args = mopo.Args()
    eager = random_agent(args, torch.float32)
    agent = copy.deepcopy(eager)
    rows, noise = as_rows(random_batch(torch.float32)), random_noise(torch.float32)
    torch._dynamo.reset()
    with fresh_cache(), torch._inductor.config.patch({} if "cache" in trouble else {"cpp.cxx": (None, str(fake))}):
        if trouble == "unwritable cache":
            (tmp_path / "file").touch()
            monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file" / "cache"))
        step = mopo.compiled(lambda rows, noise: mopo.update(agent, rows, noise, args), args, CPU)
        infos = [step(rows, noise) for _ in range(3)]
    torch._dynamo.reset()
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 1 and "eagerly" in printed[0]
    for info in infos:
        expected = mopo.update(eager, rows, noise, args)
        assert all(torch.equal(info[name], expected[name]) for name in expected)
    assert_same(agent, eager.state_dict())


def test_an_error_of_the_function_itself_is_not_taken_for_a_missing_compiler(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)

    def fails(x):
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        mopo.compiled(fails, mopo.Args(), CPU)(torch.zeros(1))


# --- The method ---
STD = torch.tensor([  # (num_members 3, batch 2, obs_dim + 1 = 3); the last number is the reward's
    [[0.3, 0.4, 1.2], [1.0, 2.0, 2.0]],  # norms 1.3 and 3
    [[0.0, 0.0, 2.5], [0.0, 0.0, 0.0]],  # 2.5, all of it the reward's, and 0
    [[1.0, 1.0, 1.0], [2.0, 3.0, 6.0]],  # 1.732 and 7
])  # fmt: skip


def test_aleatoric_uncertainty_is_the_largest_norm_of_a_members_deviations():
    torch.testing.assert_close(mopo.aleatoric_uncertainty(STD), torch.tensor([2.5, 7.0]))


def test_disagreement_is_the_largest_distance_of_a_member_from_the_mean_of_all():
    means = torch.tensor([[[0.0, 0.0]], [[3.0, 0.0]], [[0.0, 6.0]]])  # their mean is (1, 2)
    torch.testing.assert_close(mopo.disagreement(means), torch.tensor([math.sqrt(17)]))


def test_penalty_is_subtracted_in_proportion_to_its_coefficient():
    reward, u = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 4.0])
    torch.testing.assert_close(mopo.penalized_reward(reward, u, 3.0), torch.tensor([-0.5, -14.0]))
    with pytest.raises(AssertionError):
        mopo.penalized_reward(reward, u[:, None], 3.0)


# --- Rollouts ---
class StubDynamics:
    """Member i moves every coordinate by offset[i] and pays 10 * offset[i]; its deviations are scale(obs) * std[i]."""

    def __init__(self, offset, std, elites):
        self.offset, self.std, self.elites = torch.tensor(offset), torch.tensor(std), torch.tensor(elites)

    @staticmethod
    def scale(obs):
        return 1 + obs[:, 0].abs()

    def predict(self, obs, action):
        next_mean = obs + self.offset[:, None, None]
        reward_mean = (10 * self.offset)[:, None].expand(-1, len(obs))
        return next_mean, reward_mean, self.scale(obs)[:, None] * self.std[:, None, :]


NO_STD = [[0.0] * (OBS_DIM + 1)] * 4
SOME_STD = [[0.1, 0.2, 0.3, 0.4], [0.2, 0.1, 0.1, 0.1], [5.0, 1.0, 2.0, 3.0], [0.1, 0.3, 0.2, 0.5]]  # largest: member 2
NORM_2 = math.sqrt(39)  # of member 2


def stub_actor() -> mopo.Actor:
    torch.manual_seed(7)
    return mopo.Actor(OBS_DIM, ACTION_DIM, hidden=8)


def never(obs, action, next_obs):
    return torch.zeros(len(obs), dtype=torch.bool)


def distinct_starts(num: int) -> torch.Tensor:
    return torch.arange(num, dtype=torch.float32)[:, None] / 64 + torch.tensor([0.0, 1.0, -1.0])


def run_rollout(dynamics, starts, terminal_fn=never, seed: int = 0, **settings):
    args, actor = mopo.Args(**settings), stub_actor()
    torch.manual_seed(seed)
    return mopo.rollout(dynamics, actor, terminal_fn, starts, args)


@pytest.mark.parametrize("penalty", ["aleatoric", "disagreement"])
def test_penalty_coef_changes_nothing_but_the_reward_and_that_by_lambda_u(penalty):
    dynamics = StubDynamics([0.1, 0.2, 0.3, 0.4], SOME_STD, [3, 0, 1])

    def ends(obs, action, next_obs):
        return next_obs[:, 0] > 8

    settings = dict(rollout_length=4, penalty=penalty)
    plain, u = run_rollout(dynamics, distinct_starts(300), ends, penalty_coef=0.0, **settings)
    paid, same_u = run_rollout(dynamics, distinct_starts(300), ends, penalty_coef=2.5, **settings)
    others = [i for i in range(plain.shape[1]) if i != REWARD]
    assert torch.equal(plain[:, others], paid[:, others]) and torch.equal(u, same_u)
    assert torch.equal(paid[:, REWARD], plain[:, REWARD] - 2.5 * u) and (u > 0).all()
    assert plain[:, TERMINAL].any()  # the rollouts really ended here and there


def test_every_rows_penalty_is_by_the_largest_deviation_of_all_members_at_its_state():
    dynamics = StubDynamics([0.1, 0.2, 0.3, 0.4], SOME_STD, [3, 0, 1])  # member 2 is no elite
    starts = distinct_starts(2_300)
    rows, u = run_rollout(dynamics, starts, rollout_length=3)
    torch.testing.assert_close(u, NORM_2 * (1 + rows[:, 0].abs()))


def test_penalty_does_not_depend_on_the_member_that_simulates():
    dynamics = StubDynamics([0.1, 0.2, 0.3, 0.4], SOME_STD, [3, 0, 1])
    (rows, u), (other_rows, other_u) = (
        run_rollout(dynamics, distinct_starts(100), rollout_length=1, seed=seed) for seed in (0, 1)
    )
    assert torch.equal(u, other_u) and not torch.equal(rows, other_rows)


def test_disagreement_penalty_counts_all_members_and_no_deviations():
    dynamics = StubDynamics([1.0, 2.0, 9.0, 4.0], SOME_STD, [3, 0, 1])  # mean 4, farthest member 2 by 5
    _, u = run_rollout(dynamics, torch.zeros(50, OBS_DIM), rollout_length=1, penalty="disagreement")
    torch.testing.assert_close(u, torch.full((50,), 5 * math.sqrt(3)))


def test_only_elites_simulate_each_as_often_and_drawn_anew_at_every_step():
    dynamics = StubDynamics([1.0, 2.0, 1e6, 4.0, 1e6], NO_STD + [[0.0] * 4], [3, 0, 1])
    rows, _ = run_rollout(dynamics, torch.zeros(900, OBS_DIM), rollout_length=2)
    moved = (rows[:, REWARD + 1 : TERMINAL] - rows[:, :OBS_DIM])[:, 0].view(2, 900)
    pairs, counts = moved.unique(dim=1, return_counts=True)
    assert sorted(map(tuple, pairs.T.tolist())) == [(a, b) for a in (1.0, 2.0, 4.0) for b in (1.0, 2.0, 4.0)]
    assert counts.min() > 60  # about 100 each
    torch.testing.assert_close(rows[:, REWARD], 10 * moved.flatten())  # reward and successor are the same member's


def test_a_simulated_step_has_the_mean_and_the_independent_deviations_of_its_member():
    std = [0.5, 1.0, 2.0, 4.0]
    dynamics = StubDynamics([1e6, 3.0, 1e6, 1e6], [NO_STD[0], std, NO_STD[0], NO_STD[0]], [1])
    rows, _ = run_rollout(dynamics, torch.zeros(20_000, OBS_DIM), rollout_length=1, penalty_coef=0.0)
    sample = torch.cat([rows[:, REWARD + 1 : TERMINAL], rows[:, REWARD, None]], dim=1)
    z = (sample - torch.tensor([3.0, 3.0, 3.0, 30.0])) / torch.tensor(std)
    torch.testing.assert_close(z.mean(0), torch.zeros(4), rtol=0, atol=0.03)
    torch.testing.assert_close(z.T.cov(), torch.eye(4), rtol=0, atol=0.05)


def test_rollout_actions_are_samples_of_the_policy():
    starts = torch.zeros(20_000, OBS_DIM)
    rows, _ = run_rollout(StubDynamics([0.0] * 4, NO_STD, [0]), starts, rollout_length=1)
    with torch.no_grad():
        mean, log_std = stub_actor().net(starts[:1])[0].chunk(2)
    x = torch.atanh(rows[:, OBS_DIM:REWARD])
    torch.testing.assert_close(x.mean(0), mean, rtol=0, atol=0.04)
    torch.testing.assert_close(x.std(0), log_std.exp(), rtol=0.03, atol=0)


def test_reward_mode_mean_is_the_mean_over_members_and_sample_is_one_members():
    dynamics = StubDynamics([1.0, 2.0, 3.0, 8.0], NO_STD, [3, 0])
    settings = dict(rollout_length=1, penalty_coef=0.0)
    mean, _ = run_rollout(dynamics, torch.zeros(100, OBS_DIM), reward_mode="mean", **settings)
    sample, _ = run_rollout(dynamics, torch.zeros(100, OBS_DIM), reward_mode="sample", **settings)
    assert mean[:, REWARD].unique().tolist() == [35.0]
    assert sample[:, REWARD].unique().tolist() == [10.0, 80.0]


def test_reward_mode_mean_is_penalized_and_without_noise():
    dynamics = StubDynamics([1.0, 2.0, 3.0, 8.0], SOME_STD, [3, 0])
    rows, _ = run_rollout(dynamics, torch.zeros(9, OBS_DIM), reward_mode="mean", rollout_length=1, penalty_coef=2.0)
    torch.testing.assert_close(rows[:, REWARD], torch.full((9,), 35.0 - 2 * NORM_2))


@pytest.mark.parametrize("num_starts, length", [(1, 1), (200, 5), (2_300, 3)])
def test_trajectories_start_once_end_at_their_first_terminal_and_have_at_most_h_rows(num_starts, length):
    def ends(obs, action, next_obs):  # depends on all three, so that their order counts
        return next_obs[:, 0] - obs[:, 0] + action[:, 0] > 0.8

    dynamics = StubDynamics([0.1, 0.2, 0.3, 0.4], SOME_STD, [3, 0, 1])
    starts = distinct_starts(num_starts)
    rows, _ = run_rollout(dynamics, starts, ends, rollout_length=length)
    obs, action, next_obs = rows[:, :OBS_DIM], rows[:, OBS_DIM:REWARD], rows[:, REWARD + 1 : TERMINAL]
    terminal = rows[:, TERMINAL]
    assert torch.equal(terminal, ends(obs, action, next_obs).float())
    at = {tuple(o.tolist()): i for i, o in enumerate(obs)}
    assert len(at) == len(rows)
    seen, lengths = 0, []
    for start in starts:
        i, num_rows = at[tuple(start.tolist())], 1
        while (successor := at.get(tuple(next_obs[i].tolist()))) is not None:
            assert not terminal[i]  # no row starts from a terminal state
            i, num_rows = successor, num_rows + 1
        assert num_rows == length or terminal[i]  # and nothing else ends a trajectory early
        seen += num_rows
        lengths.append(num_rows)
    assert seen == len(rows)  # every row belongs to the trajectory of a start
    assert max(lengths) <= length
    if num_starts > 1:
        assert set(lengths) == set(range(1, length + 1))


def test_rollout_is_one_step_where_every_state_is_terminal():
    dynamics = StubDynamics([0.1, 0.2, 0.3, 0.4], SOME_STD, [3, 0, 1])
    for penalty in ("aleatoric", "disagreement"):
        rows, u = run_rollout(
            dynamics, distinct_starts(1_500), lambda *x: ~never(*x), rollout_length=5, penalty=penalty
        )
        assert len(rows) == len(u) == 1_500 and rows[:, TERMINAL].all()


def test_rollout_rows_have_the_layout_of_flat_rows():
    dynamics = StubDynamics([1.0, 2.0, 3.0, 4.0], NO_STD, [2])
    starts = distinct_starts(10)
    rows, _ = run_rollout(dynamics, starts, lambda obs, action, next_obs: next_obs[:, 0] > 3.07, rollout_length=1)
    terminal = torch.tensor([0.0] * 5 + [1.0] * 5)
    assert torch.equal(rows, as_rows([starts, rows[:, 3:5], torch.full((10,), 30.0), starts + 3, terminal]))
    torch.testing.assert_close(as_rows([torch.full((1, 3), 1.0), torch.full((1, 2), 2.0), torch.tensor([3.0]),
        torch.full((1, 3), 4.0), torch.tensor([5.0])]), torch.tensor([[1.0, 1, 1, 2, 2, 3, 4, 4, 4, 5]]))  # fmt: skip


def test_rollout_needs_no_gradient():
    rows, u = run_rollout(StubDynamics([1.0] * 4, SOME_STD, [0]), torch.zeros(5, OBS_DIM))
    assert not rows.requires_grad and not u.requires_grad


# --- Settings by dataset ---
def test_tuned_settings_are_those_of_offlinerl_kit_under_both_names():
    assert mopo.TUNED["hopper/medium-v0"] == {"rollout_length": 5, "penalty_coef": 5.0}
    assert mopo.TUNED["d4rl/hopper-medium-replay-v2"] == {"rollout_length": 5, "penalty_coef": 2.5}
    assert mopo.TUNED["walker2d/medium-replay-v0"] == {"rollout_length": 1, "penalty_coef": 2.5}
    assert mopo.TUNED["d4rl/halfcheetah-medium-v2"] == {"rollout_length": 5, "penalty_coef": 0.5}
    assert len(mopo.TUNED) == 19


def test_a_file_with_d4rls_name_gets_the_settings_of_its_set_and_flags_come_first(monkeypatch):
    def settings(*flags: str) -> tuple[float, int]:
        monkeypatch.setattr("sys.argv", ["mopo.py", *flags])
        args, _ = mopo.read_args()
        return args.penalty_coef, args.rollout_length

    path = ("--dataset", "somewhere/hopper_medium-v2.hdf5")
    assert settings(*path) == (5.0, 5) and settings(*path, "--penalty-coef", "3") == (3.0, 5)
    assert settings("--dataset", "somewhere/walker2d_medium_replay-v2.hdf5") == (2.5, 1)
    assert settings("--dataset", "somewhere/mine.hdf5") == (mopo.Args.penalty_coef, mopo.Args.rollout_length)


# --- Buffer and batches ---
def test_model_buffer_is_a_ring_that_forgets_the_oldest_rows():
    buffer, written = mopo.ModelBuffer(10, 2, torch.device("cpu")), []
    assert buffer.size == 0
    for num in (4, 4, 4, 10, 1, 7, 3):
        new = torch.arange(len(written), len(written) + num, dtype=torch.float32)
        written += new.tolist()
        buffer.add(torch.stack([new, -new], dim=1))
        assert buffer.size == min(len(written), 10)
        held = buffer.rows[: buffer.size]
        assert sorted(held[:, 0].tolist()) == written[-10:]
        assert torch.equal(held[:, 1], -held[:, 0])


@pytest.mark.parametrize("num, capacity", [(4, 10), (10, 10), (14, 10), (14, 25), (4, 25)])
def test_a_restored_buffer_forgets_as_it_would_have_and_a_larger_one_only_when_it_is_full(num, capacity):
    def rows(first: int, num: int) -> torch.Tensor:
        return torch.arange(first, first + num, dtype=torch.float32)[:, None]

    saved, restored = (mopo.ModelBuffer(n, 1, torch.device("cpu")) for n in (10, capacity))
    for i in range(1, num + 1, 2):
        saved.add(rows(i, 2))
    restored.restore(saved.state())
    for i in range(num + 1, num + 40, 3):
        saved.add(rows(i, 3))
        restored.add(rows(i, 3))
        written = range(max(1, num - 9), i + 3)  # what was saved, and all since
        assert sorted(restored.rows[: restored.size, 0].tolist()) == list(written)[-capacity:]
        assert capacity > 10 or torch.equal(restored.rows, saved.rows)


def mixed_batch(real_ratio: float, filled: int = 300, batch_size: int = 256):
    """Real rows are 1, those in the buffer 2, the rest of the buffer is no number."""
    buffer = mopo.ModelBuffer(1_000, 10, torch.device("cpu"))
    buffer.rows.fill_(math.nan)
    buffer.add(torch.full((filled, 10), 2.0))
    args = mopo.Args(real_ratio=real_ratio, batch_size=batch_size, penalty_coef=5.0)
    return mopo.sample_batch(torch.ones(50, 10), buffer, args)


def test_batch_of_256_has_12_real_rows_as_they_are_and_244_of_the_filled_part_of_the_buffer():
    torch.manual_seed(0)
    for _ in range(50):
        batch = mixed_batch(mopo.Args().real_ratio)
        assert batch.shape == (256, 10)
        assert torch.equal(batch[:, 0], torch.tensor([1.0] * 12 + [2.0] * 244))
        assert (batch == batch[:, :1]).all()


@pytest.mark.parametrize("real_ratio, value", [(0.0, 2.0), (1.0, 1.0)])
def test_batch_may_be_all_model_or_all_real(real_ratio, value):
    assert torch.equal(mixed_batch(real_ratio), torch.full((256, 10), value))


def test_batch_draws_uniformly_from_all_rows_with_their_rewards():
    torch.manual_seed(0)
    real = torch.arange(20.0)[:, None].expand(-1, 10)
    buffer = mopo.ModelBuffer(100, 10, torch.device("cpu"))
    buffer.add(100 + torch.arange(30.0)[:, None].expand(-1, 10))
    args = mopo.Args(real_ratio=0.5)
    batches = torch.cat([mopo.sample_batch(real, buffer, args) for _ in range(100)])
    assert (batches == batches[:, :1]).all()
    values, counts = batches[:, REWARD].unique(return_counts=True)
    assert values.tolist() == [*range(20), *range(100, 130)]
    assert counts[:20].min() > 500 and counts[20:].min() > 300  # expected 640 and 427


# --- Evaluation ---
class SeedSpy(gym.vector.VectorWrapper):
    def reset(self, *, seed=None, options=None):
        self.seeds = seed
        return super().reset(seed=seed, options=options)


def vector_env(env_id: str, num: int) -> SeedSpy:
    return SeedSpy(gym.vector.SyncVectorEnv([lambda: gym.make(env_id)] * num))


def box_data(obs_dim: int, high: float):
    return SimpleNamespace(obs=torch.zeros(1, obs_dim), to_env_action=lambda action: high * action)


def hand_loop(env_id: str, actor: mopo.Actor, high: float, seed: int) -> tuple[float, int]:
    env, total, steps, done = gym.make(env_id), 0.0, 0, False
    obs, _ = env.reset(seed=seed)
    while not done:
        with torch.no_grad():
            action = high * actor.act(torch.tensor(np.array(obs, dtype=np.float32))[None])[0].numpy()
        obs, reward, terminated, truncated, _ = env.step(action)
        total, steps, done = total + reward, steps + 1, terminated or truncated
    return total, steps


def gentle_actor() -> mopo.Actor:
    """So weak that the time until the pendulum falls depends on where it starts."""
    torch.manual_seed(3)
    actor = mopo.Actor(4, 1)
    with torch.no_grad():
        actor.net[-1].weight.mul_(0.1)
        actor.net[-1].bias.zero_()
    return actor


def test_evaluation_returns_the_undiscounted_return_of_one_episode_per_environment():
    torch.manual_seed(3)
    actor, envs = mopo.Actor(3, 1), vector_env("Pendulum-v1", 3)
    returns = mopo.evaluate(actor, envs, box_data(3, 2.0), [0, 500])
    assert returns.shape == (3,) and len(set(envs.seeds)) == 3
    expected = [hand_loop("Pendulum-v1", actor, 2.0, seed)[0] for seed in envs.seeds]
    np.testing.assert_allclose(returns, expected, rtol=1e-5)


def test_evaluation_stops_counting_where_an_episode_has_ended():
    actor, envs = gentle_actor(), vector_env("InvertedPendulum-v5", 6)
    returns = mopo.evaluate(actor, envs, box_data(4, 3.0), [0, 500])
    results = [hand_loop("InvertedPendulum-v5", actor, 3.0, seed) for seed in envs.seeds]
    lengths = [steps for _, steps in results]
    assert len(set(lengths)) > 2 and max(lengths) > min(lengths) + 2  # the others went on, and this one started anew
    np.testing.assert_allclose(returns, [total for total, _ in results])


def test_evaluation_follows_from_its_seed_alone_and_leaves_random_states_alone():
    actor, envs, data = gentle_actor(), vector_env("InvertedPendulum-v5", 6), box_data(4, 3.0)
    torch.manual_seed(11)
    np.random.seed(11)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = mopo.evaluate(actor, envs, data, [0, 500])
    assert torch.equal(torch.get_rng_state(), before) and (np.random.get_state()[1] == numpy_before).all()
    torch.manual_seed(12)
    starts = []
    for seed in ([0, 500], [0, 1_000], [1, 500]):
        again = mopo.evaluate(actor, envs, data, seed)
        starts.append(tuple(envs.seeds))
        assert (again == first).all() == (seed == [0, 500])
    assert len(set(starts)) == 3


def test_forced_actions_are_uniform_and_what_follows_them_is_handed_over():
    actor, envs, data, sent = gentle_actor(), vector_env("InvertedPendulum-v5", 6), box_data(4, 3.0), []
    step = envs.step
    envs.step = lambda action: sent.append(action) or step(action)
    undisturbed = mopo.evaluate(actor, envs, data, [0, 500])
    calm = np.array(sent)
    sent.clear()
    returns = mopo.evaluate(actor, envs, data, [0, 500], range(2, 4), after := [])
    forced = np.array(sent)
    np.testing.assert_array_equal(forced[:2], calm[:2])
    assert np.abs(forced[2:4]).max() > 1.5 > np.abs(calm).max() and np.abs(forced[2:4]).max() <= 3
    assert np.abs(forced[4:]).max() < 1.5 and (returns != undisturbed).any()
    there = returns >= 4  # 1 a step but the last
    assert len(after) == returns.max() - 3 and after[0].shape == (there.sum(), 4)
    with torch.no_grad():  # the first of them is where the fifth action was chosen
        action = actor.act(torch.as_tensor(after[0], dtype=torch.float32)).numpy()
    np.testing.assert_allclose(forced[4][there], 3 * action, rtol=1e-5)


def test_displaced_half_way_through_the_median_episode_and_the_distance_in_standard_deviations(tmp_path, monkeypatch):
    data = box_data(2, 1.0)
    data.obs = torch.tensor([[0.0, 0.0], [2.0, 20.0]])  # deviations 1.41 and 14.1
    calls = []

    def evaluate(actor, envs, data, seed, forced=range(0), after=None):
        calls.append((seed, forced))
        if len(calls) == 1:  # undisturbed: episodes of 3, 8 and 9 steps
            after += [np.zeros((num, 2)) for num in (3, 3, 3, 2, 2, 2, 2, 2, 1)]
        elif len(forced) < 15:
            after += [np.array([[0.0, 10.0]])] * 50 + [np.array([[0.0, 1000.0]])] * 9
        return np.array([1.0])

    monkeypatch.setattr(mopo, "evaluate", evaluate)
    mopo.displace(tmp_path, None, SimpleNamespace(num_envs=3), data, mopo.Args(seed=3, num_updates=70))
    assert calls == [([3, 70], range(0))] + [([3, 70], range(4, 4 + num)) for num in (0, 5, 10, 15)]
    lines = (tmp_path / "displaced.csv").read_text().splitlines()[1:]
    assert [float(line.split(",")[-1]) for line in lines] == pytest.approx([0.5**0.5] * 3 + [np.nan], nan_ok=True)
    assert [line.split(",")[-2] for line in lines] == ["1", "1", "1", "0"]
    assert {line.split(",")[1] for line in lines} == {"4"}
