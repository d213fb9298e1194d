"""common/dynamics.py: the likelihood and its clamp, the fit with its holdout rule, the cache, the ways to sample."""

import hashlib
import itertools
import re
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from common.dataset import InputError
from common.dynamics import Dynamics, load_or_fit

NOISE = torch.tensor([0.05, 0.2, 0.1])  # of the linear system: two observations and the reward


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("OFFLINE_MBRL_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def compiles_short_fits(monkeypatch):
    """So that a test can look at every minibatch through its own `compile`."""
    monkeypatch.setattr("common.dynamics.SHORT_FIT", 0)


# --- Helpers ---
def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_dynamics(*args, seed: int = 0, **kwargs) -> Dynamics:
    """Nothing is at its initial value: weights, biases, bounds and input statistics are all drawn."""
    rng, dynamics = np.random.default_rng(seed), Dynamics(*args, **kwargs)

    def draw(tensor, low, high):
        tensor.data.copy_(torch.as_tensor(rng.uniform(low, high, tensor.shape)))

    for layer in dynamics.layers:
        draw(layer.weight, -0.8, 0.8)
        draw(layer.bias, -0.8, 0.8)
    draw(dynamics.max_logvar, 0.2, 1.0)
    draw(dynamics.min_logvar, -2.0, -0.5)
    draw(dynamics.input_mean, -2.0, 2.0)
    draw(dynamics.input_std, 0.3, 3.0)
    draw(dynamics.target_mean, -2.0, 2.0)
    draw(dynamics.target_std, 0.3, 3.0)
    return dynamics


def constant_dynamics(outputs: Tensor, obs_dim: int, num_elites: int = 1) -> Dynamics:
    """Weights of 0, so that member i puts out outputs[i] = (mean, raw log-variance) at every row."""
    dynamics = Dynamics(obs_dim, 1, len(outputs), num_elites, hidden_size=4)
    for layer in dynamics.layers:
        layer.weight.data.zero_()
    dynamics.layers[-1].bias.data.copy_(outputs[:, None])
    return dynamics


def standardised(dynamics: Dynamics, x: Tensor) -> Tensor:
    """What reaches the first layer, (rows, in_dim)."""
    seen = []
    handle = dynamics.layers[0].register_forward_pre_hook(lambda layer, args: seen.append(args[0][0]))
    dynamics.predict(x[:, : dynamics.obs_dim], x[:, dynamics.obs_dim :])
    handle.remove()
    return seen[0]


def split(num_rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """The rows held out and the rows trained on: the first numbers that the fit draws from its seed."""
    order = torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed))
    return order.tensor_split([min(num_rows // 5, 1000)])


def member_errors(dynamics: Dynamics, x: Tensor, y: Tensor) -> Tensor:
    """(num_members,) in units of the variance of each target"""
    obs, action = x.split([dynamics.obs_dim, x.shape[1] - dynamics.obs_dim], dim=1)
    next_obs, reward, _ = dynamics.predict(obs, action)
    error = (torch.cat([next_obs - obs, reward[..., None]], dim=-1) - y) / dynamics.target_std
    return error.detach().double().square().flatten(1).mean(dim=1)


def linear_system(num_rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    x = randn(num_rows, 3, seed=seed)
    slope = torch.tensor([[0.5, -0.3, 1.0], [0.2, 0.4, -0.5], [1.0, 0.7, 0.3]])
    return x, x @ slope + torch.tensor([0.3, 0.0, -1.0]) + NOISE * randn(num_rows, 3, seed=seed + 1)


def small_dynamics(seed: int = 0, num_members: int = 3, num_elites: int = 2, kind: type = Dynamics) -> Dynamics:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind(2, 1, num_members, num_elites, hidden_size=16)


def make_data(num_rows: int = 60, obs_dim: int = 2, data_hash: str = "a") -> SimpleNamespace:
    """A stand-in for OfflineDataset with what load_or_fit reads."""
    obs, noise = randn(num_rows, obs_dim, seed=5), randn(num_rows, obs_dim, seed=6)
    action = randn(num_rows, 1, seed=7).tanh()
    return SimpleNamespace(
        obs=obs,
        action=action,
        reward=obs[:, 0],
        next_obs=obs + 0.3 * action + 0.1 * noise,
        successor_known=torch.ones(num_rows, dtype=torch.bool),
        data_hash=data_hash,
    )


def identical(one: Dynamics, other: Dynamics) -> bool:
    state = other.state_dict()
    return all(torch.equal(value, state[name]) for name, value in one.state_dict().items())


def count_fits(monkeypatch) -> list:
    fits, fit = [], Dynamics.fit
    monkeypatch.setattr(Dynamics, "fit", lambda self, *args, **kwargs: fits.append(1) or fit(self, *args, **kwargs))
    return fits


def counting(calls: list, stops_at: int = 0):
    """A `compile` whose function counts its calls, and is stopped by Ctrl-C at one of them."""

    def compile(function):
        def wrapped(*minibatch):
            calls.append(1)
            if len(calls) == stops_at:
                raise KeyboardInterrupt
            return function(*minibatch)

        return wrapped

    return compile


@pytest.fixture
def fast_clock(monkeypatch):
    """100 s pass between two looks at the clock, so that every epoch is saved."""
    monkeypatch.setattr("common.dynamics.time", SimpleNamespace(monotonic=itertools.count(0, 100).__next__))


@pytest.fixture(scope="module")
def fitted() -> SimpleNamespace:
    x, y = linear_system(4000)
    dynamics = small_dynamics(num_members=4)
    dynamics.fit(x, y, seed=3, max_epochs=50, batch_size=64, lr=2e-3)
    return SimpleNamespace(dynamics=dynamics, x=x, y=y, seed=3)


# --- Sizes ---
@pytest.mark.parametrize("hidden_size", [3, 8])
def test_hidden_size_is_that_of_all_four_hidden_layers(hidden_size):
    shapes = [layer.weight.shape for layer in Dynamics(2, 1, 4, 2, hidden_size).layers]
    sizes = [3, *[hidden_size] * 4, 6]  # obs and action; mean and log-variance of next_obs and reward
    assert shapes == [torch.Size([4, i, o]) for i, o in zip(sizes[:-1], sizes[1:])]


# --- Loss and log-variance ---
def numpy_loss(dynamics: Dynamics, x: np.ndarray, y: np.ndarray) -> float:
    p = {name: value.double().numpy() for name, value in dynamics.state_dict().items()}
    decay_rates, total = [0.000025, 0.00005, 0.000075, 0.000075, 0.0001], 0.0
    for i in range(len(x)):
        h = (x[i] - p["input_mean"]) / p["input_std"]
        for j in range(5):
            h = h @ p[f"layers.{j}.weight"][i] + p[f"layers.{j}.bias"][i]
            h = h / (1 + np.exp(-h)) if j < 4 else h
        mean, raw = h[:, : y.shape[2]], h[:, y.shape[2] :]
        below = p["max_logvar"] - np.logaddexp(0, p["max_logvar"] - raw)
        logvar = p["min_logvar"] + np.logaddexp(0, below - p["min_logvar"])
        total += np.mean((mean - y[i]) ** 2 / np.exp(logvar) + logvar)
    for j, rate in enumerate(decay_rates):
        total += rate / 2 * np.sum(p[f"layers.{j}.weight"] ** 2)
    return total + 0.01 * np.sum(p["max_logvar"]) - 0.01 * np.sum(p["min_logvar"])


@pytest.mark.parametrize("dtype, rtol", [(torch.float32, 1e-5), (torch.float64, 1e-9)])
def test_loss_equals_an_independent_float64_computation(dtype, rtol):
    dynamics = random_dynamics(3, 2, num_members=4, num_elites=2, hidden_size=7).to(dtype)
    x, y = randn(4, 6, 5).to(dtype), randn(4, 6, 4, seed=1).to(dtype)
    expected = numpy_loss(dynamics, x.double().numpy(), y.double().numpy())
    np.testing.assert_allclose(dynamics.loss(x, y).item(), expected, rtol=rtol)


def test_loss_reaches_every_parameter():
    dynamics = random_dynamics(3, 2, num_members=2, num_elites=1, hidden_size=7)
    dynamics.loss(randn(2, 6, 5), randn(2, 6, 4, seed=1)).backward()
    assert all(p.grad.isfinite().all() and (p.grad != 0).any() for p in dynamics.parameters())


def test_logvar_rises_with_the_raw_output_and_stays_inside_its_bounds():
    raw = torch.cat([torch.tensor([-1e30, -1e4, -100.0]), torch.linspace(-20, 10, 301), torch.tensor([1e4, 1e30])])
    dynamics = constant_dynamics(raw[:, None].expand(-1, 4), obs_dim=1)  # a member for every raw value
    dynamics.min_logvar.data.copy_(torch.tensor([-10.0, -6.0]))
    dynamics.max_logvar.data.copy_(torch.tensor([0.5, 3.0]))
    std = dynamics.predict(torch.zeros(1, 1), torch.zeros(1, 1))[2][:, 0].detach().double()
    logvar = 2 * std.log()
    low, high = torch.tensor([-10.0, -6.0]).double(), torch.tensor([0.5, 3.0]).double()
    # the lower clamp lifts the upper bound by exp(min - max), 3e-5 and 1.2e-4 here, as in the authors' code
    assert (logvar >= low - 1e-5).all() and (logvar <= high + 2e-4).all()
    torch.testing.assert_close(logvar[[0, -1]], torch.stack([low, high]), atol=2e-4, rtol=0)
    assert (logvar.diff(dim=0) >= 0).all()
    inside = (raw >= -12) & (raw <= 5)
    assert (logvar[inside].diff(dim=0) > 0).all()
    middle = (raw > -3.1) & (raw < -2.9)  # far from both bounds the clamp does nothing
    torch.testing.assert_close(logvar[middle], raw[middle, None].double().expand(-1, 2), atol=0.1, rtol=0)


@pytest.mark.parametrize("scale", [1e3, 1e8, 1e20])
def test_logvar_of_extreme_inputs_stays_inside_its_bounds(scale):
    dynamics = random_dynamics(3, 2, num_members=4, num_elites=2, hidden_size=7)
    _, logvar = dynamics.standardised(scale * randn(4, 100, 5))
    assert (logvar >= dynamics.min_logvar - 1e-5).all()
    assert (logvar <= dynamics.max_logvar + (dynamics.min_logvar - dynamics.max_logvar).exp() + 1e-5).all()
    low, high = logvar.flatten(0, 1).aminmax(dim=0)
    assert (high - low > 0.5).all()  # both ends were really visited


def test_loss_at_the_truth_is_the_entropy_of_the_gaussian_and_larger_beside_it():
    mean = torch.tensor([[0.5, -1.0, 3.0], [-2.0, 0.0, 1.0]])
    std = torch.tensor([[0.1, 1.0, 4.0], [2.0, 0.3, 0.7]])
    y = mean[:, None] + std[:, None] * randn(2, 100_000, 3)
    x = torch.zeros(2, 100_000, 3)

    def nll(mean, std):  # the bounds are far away, their term is 0.01 * 3 * 100 and weights of 0 have no decay
        dynamics = constant_dynamics(torch.cat([mean, 2 * std.log()], dim=1), obs_dim=2)
        dynamics.max_logvar.data.fill_(50.0)
        dynamics.min_logvar.data.fill_(-50.0)
        return dynamics.loss(x, y).item() - 3.0

    entropy = (1 + 2 * std.log()).mean(dim=1).sum().item()  # summed over members, without log 2 pi
    assert nll(mean, std) == pytest.approx(entropy, abs=0.01)
    assert min(nll(mean + 0.1 * std, std), nll(mean - 0.1 * std, std)) > nll(mean, std) + 0.01
    assert min(nll(mean, 1.1 * std), nll(mean, std / 1.1)) > nll(mean, std) + 0.01


def test_zero_weights_predict_no_change_and_no_reward():
    dynamics = constant_dynamics(torch.zeros(3, 6), obs_dim=2)
    obs = 100 * randn(5, 2)
    next_obs, reward, std = dynamics.predict(obs, randn(5, 1))
    assert next_obs.shape == (3, 5, 2) and reward.shape == (3, 5) and std.shape == (3, 5, 3)
    assert torch.equal(next_obs, obs.expand(3, -1, -1)) and torch.equal(reward, torch.zeros(3, 5))


# --- Standardiser ---
def test_train_inputs_are_standardised_to_mean_0_and_std_1():
    x = randn(500, 3) * torch.tensor([0.01, 300.0, 2.0]) + torch.tensor([0.0, -5.0, 40.0])
    dynamics = small_dynamics()
    dynamics.fit(x, randn(500, 3), seed=1, max_epochs=1)
    z = standardised(dynamics, x[split(500, seed=1)[1]]).double()
    torch.testing.assert_close(z.mean(dim=0), torch.zeros(3).double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(z.std(dim=0), torch.ones(3).double(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e4, -33333.3, 1e-9])
def test_constant_columns_pass_as_finite_zeros(constant):
    x = randn(1000, 3)
    x[:, 1] = constant
    dynamics = small_dynamics()
    dynamics.fit(x, randn(1000, 3), seed=0, max_epochs=1)
    z = standardised(dynamics, x)
    assert z[:, 1].abs().max() < 1e-3
    x[:, 1] += 0.5  # a column that was constant must not magnify what it shows later
    assert standardised(dynamics, x)[:, 1].abs().max() < 1
    assert all(out.isfinite().all() for out in dynamics.predict(x[:, :2], x[:, 2:]))


def test_rounding_noise_on_a_large_constant_is_no_signal():
    x = randn(1000, 3)
    x[:, 1] = 1e4
    x[::2, 1] = torch.nextafter(torch.tensor(1e4), torch.tensor(torch.inf))
    dynamics = small_dynamics()
    dynamics.fit(x, randn(1000, 3), seed=0, max_epochs=1)
    assert standardised(dynamics, x)[:, 1].abs().max() < 0.01


@pytest.mark.parametrize("offset, scale", [(1000.0, 0.01), (-1e4, 0.1), (0.0, 1e-6)])
def test_small_signals_on_large_offsets_are_scaled_to_unit_std(offset, scale):
    x = randn(1000, 3)
    x[:, 1] = offset + scale * x[:, 1]
    dynamics = small_dynamics()
    dynamics.fit(x, randn(1000, 3), seed=0, max_epochs=1)
    z = standardised(dynamics, x[split(1000, seed=0)[1]])[:, 1].double()
    assert z.std().item() == pytest.approx(1, abs=0.02) and z.mean().item() == pytest.approx(0, abs=0.02)


# --- Units ---
def test_units_of_inputs_and_targets_change_neither_the_fit_nor_what_it_predicts():
    x, y = linear_system(400)
    shift, scale = torch.tensor([0.0, 5.0, -30.0]), torch.tensor([1e-3, 1e3, 16.0])
    metres, others = small_dynamics(), small_dynamics()
    metres.fit(x, y, seed=0, max_epochs=3, batch_size=32)
    others.fit(shift + scale * x, shift + scale * y, seed=0, max_epochs=3, batch_size=32)
    torch.testing.assert_close(others.holdout_mse, metres.holdout_mse, rtol=0.05, atol=1e-4)
    mean, std = metres(x.expand(3, -1, -1))
    in_units = others((shift + scale * x).expand(3, -1, -1))
    torch.testing.assert_close((in_units[0] - shift) / scale, mean, rtol=0, atol=0.05)
    torch.testing.assert_close(in_units[1] / scale, std, rtol=0.05, atol=0)


def test_a_holdout_error_of_1_is_that_of_predicting_the_mean():
    x, y = randn(2000, 3), 1e-4 * randn(2000, 3, seed=1)  # nothing to be learned
    dynamics = small_dynamics()
    dynamics.fit(x, y, seed=0, max_epochs=2)
    assert (dynamics.holdout_mse > 0.85).all() and (dynamics.holdout_mse < 1.25).all()


def test_what_never_changes_is_predicted_for_certain():
    x, y = linear_system(400)
    y[:, 1] = 0.25
    dynamics = small_dynamics()
    dynamics.fit(x, y, seed=0, max_epochs=2)
    far = 100 * randn(50, 3, seed=2)
    next_obs, _, std = dynamics.predict(far[:, :2], far[:, 2:])
    assert (std[..., 1] == 0).all() and (std[..., [0, 2]] > 0).all()
    torch.testing.assert_close(next_obs[..., 1], (far[:, 1] + 0.25).expand(3, -1))


# --- Fit ---
def test_fit_restores_the_weights_of_each_best_holdout_error_and_elects_the_smallest(fitted):
    dynamics, holdout = fitted.dynamics, split(len(fitted.x), fitted.seed)[0]
    errors = member_errors(dynamics, fitted.x[holdout], fitted.y[holdout])
    torch.testing.assert_close(dynamics.holdout_mse.mean(dim=1).double(), errors, rtol=1e-4, atol=0)
    others = [i for i in range(4) if i not in dynamics.elites.tolist()]
    assert len(set(dynamics.elites.tolist())) == 2 and errors[dynamics.elites].max() <= errors[others].min()


def test_members_that_get_worse_keep_their_best_weights():
    x, y = linear_system(400)
    history = []

    class Recorded(Dynamics):
        def mse(self, x, y):
            history.append(super().mse(x, y))
            return history[-1]

    dynamics = small_dynamics(kind=Recorded)
    dynamics.fit(x, y, seed=0, max_epochs=12, batch_size=32, lr=0.3)
    holdout = split(400, seed=0)[0]
    errors = member_errors(dynamics, x[holdout], y[holdout])
    kept, history = dynamics.holdout_mse.mean(dim=1), torch.stack(history).mean(dim=2)
    assert (history[-1] > 1.01 * kept).any()  # for one at least the last epoch was not the best
    torch.testing.assert_close(kept.double(), errors, rtol=1e-4, atol=0)
    assert (errors <= history.amin(dim=0) / 0.98).all()


class Scripted(Dynamics):
    """Holdout errors as written, an epoch a row; `seen` are the weights at each."""

    script: list = []

    def mse(self, x, y):
        self.num_holdout = len(x)
        self.seen = getattr(self, "seen", [])
        self.seen.append([layer.weight.detach().clone() for layer in self.layers])
        return torch.tensor(self.script[len(self.seen) - 1])[:, None].expand(-1, 3)


def test_only_gains_over_1_percent_count_and_patience_ends_the_fit():
    dynamics = small_dynamics(num_members=3, num_elites=2, kind=Scripted)
    dynamics.script = [
        [1.0, 1.0, 0.4],  # epoch 1: the first is always kept
        [0.995, 1.2, 0.5],  # too little, worse, worse
        [0.985, 1.0, 0.399],  # the first is more than 1 % below its best, though not below its last
        [0.98, 0.995, 0.6],
        [0.98, 0.5, 0.6],  # the second
        [0.98, 0.499, 0.6],
        [0.98, 0.499, 0.6],
        [0.98, 0.6, 0.6],  # the third epoch without a gain is one more than patience
        [0.1, 0.1, 0.1],  # never reached
    ]
    assert dynamics.fit(*linear_system(60), seed=0, patience=2) == 8
    assert dynamics.holdout_mse.mean(dim=1).tolist() == pytest.approx([0.985, 0.5, 0.4])
    assert dynamics.elites.tolist() == [2, 1]
    for member, epoch in enumerate([3, 5, 1]):
        for layer, seen in zip(dynamics.layers, dynamics.seen[epoch - 1]):
            assert torch.equal(layer.weight[member], seen[member])


@pytest.mark.parametrize("num_rows, num_holdout", [(49, 9), (6000, 1000)])
def test_holdout_is_a_fifth_of_the_rows_and_1000_at_most(num_rows, num_holdout):
    dynamics = small_dynamics(kind=Scripted)
    dynamics.script = [[1.0, 1.0, 1.0]]
    dynamics.fit(*linear_system(num_rows), seed=0, max_epochs=1)
    assert dynamics.num_holdout == num_holdout


def test_max_epochs_caps_the_fit():
    calls = []
    dynamics = small_dynamics()
    num_epochs = dynamics.fit(*linear_system(400), seed=0, max_epochs=3, batch_size=100, compile=counting(calls))
    assert num_epochs == 3 and len(calls) == 3 * (320 // 100)


def test_only_a_long_fit_is_compiled(monkeypatch):
    compiled = []
    compile = lambda function: compiled.append(1) or function  # noqa: E731
    monkeypatch.setattr("common.dynamics.SHORT_FIT", 3 * 320)  # 320 of 400 rows are trained on
    for max_epochs in (3, 4):
        small_dynamics().fit(*linear_system(400), seed=0, max_epochs=max_epochs, compile=compile)
        assert len(compiled) == max_epochs - 3
    small_dynamics().fit(*linear_system(400), seed=0, patience=0, lr=0.0, compile=compile)  # of unknown length
    assert len(compiled) == 2


def test_each_member_trains_on_its_own_bootstrap_of_the_training_rows_reshuffled_each_epoch():
    x, y = linear_system(500)
    x[:, 0] = y[:, 2] = torch.arange(500)  # names the row
    std, mean = torch.std_mean(y[split(500, seed=2)[1], 2])
    minibatches = []

    def compile(function):
        def wrapped(bx, by):
            torch.testing.assert_close(bx[..., 0], by[..., 2] * std + mean, atol=0.01, rtol=0)
            minibatches.append(bx[..., 0].long())
            return function(bx, by)

        return wrapped

    small_dynamics().fit(x, y, seed=2, max_epochs=2, batch_size=4, compile=compile)
    rows = torch.cat(minibatches, dim=1)  # (3, 2 * 400), 100 minibatches an epoch: more than are gathered at once
    assert rows.shape == (3, 800) and len(minibatches) == 200
    first, second = rows.split(400, dim=1)
    assert torch.equal(first.sort(dim=1).values, second.sort(dim=1).values) and not torch.equal(first, second)
    train = set(split(500, seed=2)[1].tolist())
    distinct = [set(member.tolist()) for member in first]
    assert all(member <= train for member in distinct)
    assert all(0.55 < len(member) / 400 < 0.72 for member in distinct)  # 1 - 1/e with replacement
    assert distinct[0] != distinct[1] != distinct[2] != distinct[0]


def test_fit_learns_a_noisy_linear_system_and_its_noise(fitted):
    share = (NOISE.square() / fitted.y.var(dim=0)).mean().item()  # what nobody can predict
    assert all(0.8 * share < mse < 1.25 * share for mse in fitted.dynamics.holdout_mse.mean(dim=1).tolist())

    class Restless(Dynamics):  # the errors fall before the deviations do: train all epochs and keep the last weights
        def mse(self, x, y):
            self.epochs = getattr(self, "epochs", 0) + 1
            return super().mse(x, y) * 0.9**self.epochs

    dynamics = small_dynamics(kind=Restless)
    dynamics.fit(fitted.x, fitted.y, seed=3, max_epochs=40, batch_size=64, lr=2e-3)
    x, _ = linear_system(2000, seed=10)
    std = dynamics.predict(x[:, :2], x[:, 2:])[2].detach()
    torch.testing.assert_close(std.mean(dim=(0, 1)), NOISE, rtol=0.2, atol=0)


def test_the_bounds_of_the_logvariance_start_at_minus_10_and_a_half():
    new = Dynamics(2, 1, 4, 2, 8)
    assert (new.max_logvar == 0.5).all() and (new.min_logvar == -10).all()


def test_fit_draws_the_bounds_of_the_logvariance_together(fitted):
    assert (fitted.dynamics.max_logvar < 0.5).all() and (fitted.dynamics.min_logvar > -10).all()


def test_members_disagree_on_the_data_and_more_off_them(fitted):
    x, _ = linear_system(500, seed=10)

    def disagreement(x):
        next_obs, reward, _ = fitted.dynamics.predict(x[:, :2], x[:, 2:])
        return torch.cat([next_obs, reward[..., None]], dim=-1).std(dim=0).mean().item()

    assert 0 < 3 * disagreement(x) < disagreement(6 * x)


def test_too_few_rows_and_infinite_targets_are_input_errors():
    x, y = linear_system(10)
    small_dynamics().fit(x, y, seed=0, max_epochs=1)
    with pytest.raises(InputError, match="10 transitions"):
        small_dynamics().fit(x[:9], y[:9], seed=0, max_epochs=1)
    with pytest.raises(InputError, match="diverged"):
        small_dynamics().fit(x, y * torch.inf, seed=0, max_epochs=1)


def test_fit_that_diverges_after_a_good_epoch_is_an_input_error():
    calls = []

    def compile(function):  # ten minibatches an epoch, enormous gradients in the third
        return lambda *minibatch: [
            grad * (torch.inf if len(calls) > 20 else 1.0) for grad in calls.append(1) or function(*minibatch)
        ]

    with pytest.raises(InputError, match="diverged"):
        small_dynamics().fit(*linear_system(400), seed=0, max_epochs=4, batch_size=32, compile=compile)


@pytest.mark.parametrize("num_calls", [5, 12, 16])  # in the second, fourth and sixth epoch of eight, three calls each
def test_interrupted_fit_goes_on_to_the_same_end(num_calls, tmp_path, fast_clock):
    x, y, partial = *linear_system(120), tmp_path / "fit.partial"

    def scripted(seed):
        dynamics = small_dynamics(seed, kind=Scripted)
        dynamics.script = [[1.0, 1.0, 1.0], [0.5, 1.0, 0.2], [2.0, 2.0, 2.0], [2.0, 0.5, 2.0]] + 4 * [[2.0, 2.0, 2.0]]
        return dynamics

    def run(dynamics, **kwargs):
        return dynamics.fit(x, y, seed=4, patience=3, batch_size=32, **kwargs)

    whole, stopped = scripted(0), scripted(0)
    assert run(whole) == 8
    with pytest.raises(KeyboardInterrupt):
        run(stopped, partial=partial, compile=counting([], num_calls))
    assert partial.exists()
    resumed, calls = scripted(1), []  # other weights: everything has to come from the file
    num_done = (num_calls - 1) // 3
    resumed.script = resumed.script[num_done:]
    assert run(resumed, partial=partial, compile=counting(calls)) == 8
    assert len(calls) == 3 * (8 - num_done) and identical(whole, resumed)


# --- Cache ---
def left_in(folder) -> set[str]:
    return {file.suffix for file in folder.iterdir()}


def test_interrupted_load_or_fit_goes_on_to_the_same_end_and_removes_its_partial_file(
    tmp_path, monkeypatch, fast_clock
):
    data = make_data(700)  # two minibatches an epoch
    whole = load_or_fit(data, seed=0, max_epochs=6)
    monkeypatch.setenv("OFFLINE_MBRL_CACHE", str(tmp_path / "other"))
    with pytest.raises(KeyboardInterrupt):
        load_or_fit(data, seed=0, max_epochs=6, compile=counting([], 8))
    assert left_in(tmp_path / "other" / "dynamics") == {".partial", ".lock"}
    calls = []
    resumed = load_or_fit(data, seed=0, max_epochs=6, compile=counting(calls))
    assert len(calls) == 2 * (6 - 3) and identical(whole, resumed)
    assert left_in(tmp_path / "other" / "dynamics") == {".pt", ".lock"}


def test_same_seed_gives_the_same_ensemble_to_the_bit_whatever_the_global_rng(tmp_path, monkeypatch):
    ensembles = []
    for cache, seed in (("one", 0), ("two", 0), ("three", 1)):
        monkeypatch.setenv("OFFLINE_MBRL_CACHE", str(tmp_path / cache))
        torch.rand(len(ensembles) + 1)
        state = torch.get_rng_state()
        for _ in range(2):  # fitted, then from the cache
            dynamics = load_or_fit(make_data(), seed=seed, num_members=3, num_elites=2, max_epochs=2)
        ensembles.append(dynamics)
        assert torch.equal(torch.get_rng_state(), state)
    assert identical(ensembles[0], ensembles[1])
    for one, other in zip(ensembles[0].layers, ensembles[2].layers):
        assert not torch.equal(one.weight, other.weight)
    assert not torch.equal(ensembles[0].input_mean, ensembles[2].input_mean)  # another split, too


def test_seed_alone_changes_the_split_and_the_bootstrap():
    x, y = linear_system(100)
    one, same, other = small_dynamics(), small_dynamics(), small_dynamics()
    for dynamics, seed in ((one, 0), (same, 0), (other, 1)):
        dynamics.fit(x, y, seed=seed, max_epochs=2)
    assert identical(one, same) and not torch.equal(one.holdout_mse, other.holdout_mse)


def test_second_call_reuses_the_ensemble(monkeypatch, capsys):
    fits = count_fits(monkeypatch)
    first = load_or_fit(make_data(), seed=0, max_epochs=2)
    assert len(fits) == 1 and "reused" not in capsys.readouterr().out
    second = load_or_fit(make_data(), seed=0, max_epochs=2)
    assert len(fits) == 1 and "reused, 2 epochs" in capsys.readouterr().out
    assert identical(first, second)


@pytest.mark.parametrize(
    "change",
    [
        dict(data_hash="b"),
        dict(seed=1),
        dict(num_members=4),
        dict(num_elites=1),
        dict(hidden_size=9),
        dict(max_epochs=2),
    ],
)
def test_other_data_seed_or_settings_are_fitted_anew(change, monkeypatch):
    settings = dict(seed=0, num_members=3, num_elites=2, hidden_size=8, max_epochs=1)
    load_or_fit(make_data(), **settings)
    fits = count_fits(monkeypatch)
    data = make_data(data_hash=change.pop("data_hash", "a"))
    dynamics = load_or_fit(data, **(settings | change))
    assert len(fits) == 1
    assert dynamics.num_members == change.get("num_members", 3)
    assert len(dynamics.elites) == change.get("num_elites", 2)
    assert dynamics.layers[0].weight.shape[2] == change.get("hidden_size", 8)


def test_path_loads_that_file_by_its_own_sizes_whatever_the_data_and_says_where_settings_differ(
    tmp_path, monkeypatch, capsys
):
    saved = load_or_fit(make_data(), seed=3, num_members=4, num_elites=2, hidden_size=9, max_epochs=1)
    (file,) = (tmp_path / "cache" / "dynamics").glob("*.pt")
    fits = count_fits(monkeypatch)
    content = hashlib.sha256(file.read_bytes()).hexdigest()
    loaded = load_or_fit(make_data(80, data_hash="b"), seed=0, path=str(file.rename(tmp_path / "mine.pt")))
    assert not fits and loaded.num_members == 4 and identical(saved, loaded)
    assert hashlib.sha256((tmp_path / "mine.pt").read_bytes()).hexdigest() == content
    [line] = [line for line in capsys.readouterr().out.splitlines() if "which count" in line]
    own, asked = line.split("which count")
    assert re.findall(r"\d+", own) == ["4", "2", "9"] and re.findall(r"\d+", asked) == ["7", "5", "200"]
    for hidden_size in (9, 8):
        sizes = {"num_members": 4, "num_elites": 2, "hidden_size": hidden_size}
        loaded = load_or_fit(make_data(), seed=0, path=str(tmp_path / "mine.pt"), **sizes)
        assert identical(saved, loaded) and ("which count" in capsys.readouterr().out) == (hidden_size == 8)


@pytest.mark.parametrize("content", [None, b"", b"not a model", [1, 2], {"weights": 1}])
def test_missing_and_garbage_files_are_input_errors_that_name_the_file(content, tmp_path):
    path = tmp_path / "mine.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(InputError, match="no ensemble.*mine.pt|mine.pt is no ensemble"):
        load_or_fit(make_data(), seed=0, max_epochs=1, path=str(path))


def test_truncated_files_are_input_errors(tmp_path):
    load_or_fit(make_data(), seed=0, max_epochs=1)
    (file,) = (tmp_path / "cache" / "dynamics").glob("*.pt")
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(InputError, match="delete it"):
        load_or_fit(make_data(), seed=0, max_epochs=1)


def test_ensemble_of_other_shapes_is_an_input_error(tmp_path):
    load_or_fit(make_data(obs_dim=3), seed=0, max_epochs=1)
    (file,) = (tmp_path / "cache" / "dynamics").glob("*.pt")
    with pytest.raises(InputError, match=r"\[3, 1\].*\[2, 1\]"):
        load_or_fit(make_data(obs_dim=2), seed=0, path=str(file))


def test_weights_come_frozen_but_gradients_flow_to_obs_and_action():
    for _ in range(2):  # fitted, then reused
        dynamics = load_or_fit(make_data(), seed=0, max_epochs=1)
        assert not any(p.requires_grad for p in dynamics.parameters())
        obs, action = randn(4, 2).requires_grad_(), randn(4, 1).requires_grad_()
        next_obs, reward, std = dynamics.predict(obs, action)
        for out in (next_obs - obs, reward, std):
            for grad in torch.autograd.grad(out.sum(), (obs, action), retain_graph=True):
                assert grad.isfinite().all() and (grad != 0).all()


def test_rows_without_a_known_successor_never_enter_the_fit():
    data, num_rows = make_data(80, data_hash="poisoned"), 80
    unknown = torch.arange(num_rows) % 7 == 3
    data.successor_known = ~unknown
    data.next_obs[unknown] = torch.nan
    clean = make_data(80, data_hash="clean")
    for name in ("obs", "action", "reward", "next_obs", "successor_known"):
        setattr(clean, name, getattr(clean, name)[~unknown])
    one, other = (load_or_fit(d, seed=0, max_epochs=2) for d in (data, clean))
    assert identical(one, other) and all(value.isfinite().all() for value in one.state_dict().values())


def test_targets_are_the_change_of_obs_and_the_reward(monkeypatch):
    data, passed = make_data(), []
    monkeypatch.setattr(Dynamics, "fit", lambda self, x, y, *args, **kwargs: passed.extend([x, y]) or 1)
    load_or_fit(data, seed=0)
    x, y = passed
    assert torch.equal(x[:, :2], data.obs) and torch.equal(x[:, 2:], data.action)
    torch.testing.assert_close(data.obs + y[:, :2], data.next_obs)
    assert torch.equal(y[:, 2], data.reward)


# --- Sampling ---
def sampling_dynamics() -> Dynamics:
    dynamics = random_dynamics(3, 2, num_members=5, num_elites=3, hidden_size=7)
    dynamics.elites.copy_(torch.tensor([4, 0, 3]))
    return dynamics.requires_grad_(False)


@pytest.mark.parametrize("batch", [1, 2, 9, 11])
def test_step_of_equal_members_does_not_depend_on_the_order(batch):
    dynamics = sampling_dynamics()
    for layer in dynamics.layers:
        layer.weight.copy_(layer.weight[:1].expand_as(layer.weight).clone())
        layer.bias.copy_(layer.bias[:1].expand_as(layer.bias).clone())
    obs, action, noise = randn(batch, 3), randn(batch, 2, seed=1), randn(batch, 4, seed=2)
    next_mean, reward_mean, std = (out[0] for out in dynamics.predict(obs, action))
    for seed in range(3):
        order = torch.randperm(batch, generator=torch.Generator().manual_seed(seed))
        next_obs, reward, _ = dynamics.step(obs, action, order, noise)
        torch.testing.assert_close(next_obs, next_mean + std[:, :-1] * noise[:, :-1])
        torch.testing.assert_close(reward, reward_mean + std[:, -1] * noise[:, -1])


def test_step_takes_next_obs_and_reward_of_a_row_from_one_elite_at_that_row():
    dynamics, obs, action = sampling_dynamics(), randn(11, 3), randn(11, 2, seed=1)
    noise, order = randn(11, 4, seed=2), torch.randperm(11, generator=torch.Generator().manual_seed(0))
    next_obs, reward, _ = dynamics.step(obs, action, order, noise)
    next_mean, reward_mean, std = (out[dynamics.elites] for out in dynamics.predict(obs, action))
    samples = torch.cat([next_mean, reward_mean[..., None]], dim=-1) + std * noise  # (3, 11, 4)
    error = (samples - torch.cat([next_obs, reward[:, None]], dim=-1)).abs().amax(dim=-1)
    assert (error.amin(dim=0) < 1e-5).all() and (error.sort(dim=0).values[1] > 1e-3).all()
    assert len(error.argmin(dim=0).unique()) == 3


def members_of_step(elites: list, order: Tensor, all_members: bool = False) -> Tensor:
    """The member that serves each row: member i moves every observation by i and gives the reward i."""
    outputs = torch.zeros(6, 6)
    outputs[:, :3] = torch.arange(6.0)[:, None]
    dynamics = constant_dynamics(outputs, obs_dim=2, num_elites=len(elites)).requires_grad_(False)
    dynamics.elites.copy_(torch.tensor(elites))
    batch = len(order)
    inputs = torch.zeros(batch, 2), torch.zeros(batch, 1), order, torch.zeros(batch, 3)
    next_obs, reward, _ = dynamics.step(*inputs, all_members)
    assert torch.equal(next_obs, reward[:, None].expand(-1, 2))
    return reward.long()


@pytest.mark.parametrize("batch", [1, 2, 3, 11, 12, 301])
def test_step_is_the_same_with_all_members_and_then_tells_what_predict_does(batch):
    dynamics, obs, action = sampling_dynamics(), randn(batch, 3), randn(batch, 2, seed=1)  # three elites
    noise, order = randn(batch, 4, seed=2), torch.randperm(batch, generator=torch.Generator().manual_seed(0))
    *expected, nothing = dynamics.step(obs, action, order, noise)
    *transition, members = dynamics.step(obs, action, order, noise, all_members=True)
    assert nothing is None
    torch.testing.assert_close(transition, expected, rtol=1e-5, atol=1e-5)
    for found, predicted in zip(members, dynamics.predict(obs, action), strict=True):
        assert torch.equal(found, predicted)


@pytest.mark.parametrize("all_members", [False, True])
@pytest.mark.parametrize("batch", [3, 12, 300])
def test_step_gives_each_elite_an_equal_share_of_the_rows(batch, all_members):
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(0))
    served = members_of_step([5, 0, 3], order, all_members)
    assert served.bincount(minlength=6).tolist() == [batch // 3, 0, 0, batch // 3, 0, batch // 3]


@pytest.mark.parametrize("all_members", [False, True])
@pytest.mark.parametrize("batch", [1, 4, 12, 13, 15, 301])
def test_step_gives_shares_that_differ_by_one_row_at_most(batch, all_members):
    elites = [5, 0, 3, 1, 2]
    served = members_of_step(elites, torch.randperm(batch, generator=torch.Generator().manual_seed(0)), all_members)
    shares = served.bincount(minlength=6)[elites]
    assert shares.sum() == batch and shares.max() - shares.min() <= 1


def test_step_gives_each_row_each_elite_equally_often_over_random_orders():
    generator, counts = torch.Generator().manual_seed(0), torch.zeros(9, 6)
    for _ in range(600):
        served = members_of_step([5, 0, 3], torch.randperm(9, generator=generator))
        counts[torch.arange(9), served] += 1
    share = counts[:, [5, 0, 3]] / 600
    assert (share - 1 / 3).abs().max() < 0.1  # five standard errors


def test_two_that_want_the_same_ensemble_fit_it_once(capsys):
    """The second one finds the lock taken, says so, and then finds the file."""
    data, fitting, fits = make_data(700), threading.Event(), []

    def compile(function):
        fits.append(threading.current_thread().name)
        fitting.set()
        time.sleep(0.5)  # the other one arrives meanwhile
        return function

    def want():
        load_or_fit(data, seed=0, max_epochs=1, compile=compile)

    first = threading.Thread(target=want)
    first.start()
    assert fitting.wait(30)
    want()
    first.join()
    assert len(fits) == 1
    printed = capsys.readouterr().out
    assert printed.count("waiting") == printed.count("fitted in") == printed.count("reused") == 1
