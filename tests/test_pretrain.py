"""common/pretrain.py: what is kept, from where it comes, and what a killed fit leaves."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from common.dataset import InputError
from common.pretrain import load_or_train


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("OFFLINE_MBRL_CACHE", str(tmp_path / "cache"))


def line(num: int = 400) -> torch.Tensor:
    """Rows (x, 3 x + 1 + noise)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num, 1, generator=generator)
    return torch.cat([x, 3 * x + 1 + 0.1 * torch.randn(num, 1, generator=generator)], dim=1)


def squared_error(net, rows, noise):
    return (net(rows[:, :1]) + 0.01 * noise - rows[:, 1:]).square().mean()


def call(loss=squared_error, rows=None, make=lambda: nn.Linear(1, 1), name="line", **kwargs):
    rows = line() if rows is None else rows
    settings = dict(seed=0, num_updates=1_500, lr=0.02, settings={"width": 1}) | kwargs
    return load_or_train(name, make, loss, rows, 1, SimpleNamespace(data_hash="d"), **settings)


def never(*_):
    raise AssertionError("trained again")


def test_it_minimises_the_loss_and_freezes_the_weights(capsys):
    net = call()
    assert net.weight.item() == pytest.approx(3, abs=0.03) and net.bias.item() == pytest.approx(1, abs=0.03)
    assert not any(p.requires_grad for p in net.parameters())
    assert "line, fitted in" in capsys.readouterr().out


def test_the_second_call_reuses_it_and_draws_the_same_numbers(capsys):
    torch.manual_seed(3)
    first, after_first = call(), torch.rand(1)
    torch.manual_seed(3)
    second, after_second = call(loss=never), torch.rand(1)
    assert torch.equal(first.weight, second.weight) and torch.equal(after_first, after_second)
    assert "line, reused" in capsys.readouterr().out


def test_a_cache_that_cannot_be_written_is_said_with_the_variable_that_moves_it(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("OFFLINE_MBRL_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match="cannot write to .*/file/pretrained .*set OFFLINE_MBRL_CACHE"):
        call()


@pytest.mark.parametrize("change", [{"seed": 1}, {"num_updates": 1_400}, {"lr": 0.01}, {"settings": {"width": 2}}])
def test_other_settings_are_trained_anew(change):
    call()
    with pytest.raises(AssertionError, match="trained again"):
        call(loss=never, **change)
    with pytest.raises(AssertionError, match="trained again"):
        call(loss=never, name="another")


def test_the_weights_with_the_lowest_holdout_loss_are_kept():
    """The loss turns around after 1,000 updates: from there on it drives the weights away."""
    calls = []

    def loss(net, rows, noise):
        if torch.is_grad_enabled():
            calls.append(len(rows))
            return squared_error(net, rows, noise) * (1 if len(calls) <= 1_000 else -1)
        return squared_error(net, rows, noise)

    net = call(loss=loss)
    assert len(calls) == 1_500 and net.weight.item() == pytest.approx(3, abs=0.1)


def test_held_out_rows_are_a_twentieth_and_never_trained_on():
    rows, trained, held_out = line(), set(), set()

    def loss(net, minibatch, noise):
        (trained if torch.is_grad_enabled() else held_out).update(minibatch[:, 0].tolist())
        return squared_error(net, minibatch, noise)

    call(loss=loss, rows=rows)
    assert len(held_out) == 20 and len(trained) == 380 and not trained & held_out


def test_a_killed_fit_leaves_nothing_and_the_next_one_ends_the_same(tmp_path):
    whole = call(name="whole")
    calls = []

    def dies(net, rows, noise):
        calls.append(1)
        if len(calls) > 1_200:
            raise KeyboardInterrupt
        return squared_error(net, rows, noise)

    with pytest.raises(KeyboardInterrupt):
        call(loss=dies, name="killed")
    assert len(list(tmp_path.rglob("*.pt"))) == 1
    assert torch.equal(call(name="killed").weight, whole.weight)


def test_too_few_rows_divergence_and_a_damaged_file_are_input_errors(tmp_path):
    with pytest.raises(InputError, match="20 transitions"):
        call(rows=line(19))
    with pytest.raises(InputError, match="diverged"):
        call(loss=lambda net, rows, noise: squared_error(net, rows, noise) * math.inf)
    call()
    [file] = tmp_path.rglob("*.pt")
    file.write_bytes(b"no network")
    with pytest.raises(InputError, match="delete it"):
        call()
