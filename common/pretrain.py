"""A network that is trained once, before the method. It and its loss belong to the scripts: here are loop and cache."""

import math
from collections.abc import Callable

import torch
import torch.nn as nn
from torch import Tensor

from common import InputError
from common.dataset import OfflineDataset
from common.dynamics import cache_file, kept
from common.machine import progress_bar

FILE_VERSION = 1  # raise it when a change makes older cached networks wrong
HOLDOUT_INTERVAL = 500  # updates


def load_or_train(
    name: str, make: Callable[[], nn.Module], loss: Callable[[nn.Module, Tensor, Tensor], Tensor], rows: Tensor,
    noise_dim: int, data: OfflineDataset, seed: int, num_updates: int, lr: float, settings: dict,
    compile: Callable = lambda function: function,
) -> nn.Module:  # fmt: skip
    """`make()` trained by Adam on minibatches of 256 of `rows`; from the cache where that was done before.

    rows: (num_rows, width) on the data's device; loss(net, rows (batch, width), noise (batch, noise_dim), standard
    normal) returns a scalar. Of the weights, those with the lowest loss on held-out rows are kept: a twentieth of the
    rows, at most 1,000, always with the same noise. The cache's key is the name, the data's content, the seed,
    num_updates, lr, and `settings`, which is to hold whatever else shapes network, loss or rows. Returns the network
    without gradients to its weights. Raises InputError when rows are too few or the loss is not finite.
    """
    if len(rows) < 20:
        raise InputError(f"the {name} needs 20 transitions or more, not {len(rows)}")
    file = cache_file("pretrained", [FILE_VERSION, name, data.data_hash, seed, num_updates, lr, settings])
    train = lambda: _train(name, make(), loss, rows, noise_dim, seed, num_updates, lr, compile)  # noqa: E731
    with kept(file, name, rows.device, seed, train) as (state, verb):
        net = make().to(rows.device)
        net.load_state_dict(state["net"])
    print(f"pretrained  {name}, {verb}, {num_updates:,} updates, holdout loss {state['holdout']:.3g}, {file}")
    return net.requires_grad_(False)


def _train(name, net, loss, rows, noise_dim, seed: int, num_updates: int, lr: float, compile) -> dict:
    """The best weights and their holdout loss."""
    net, device, generator = net.to(rows.device), rows.device, torch.Generator(rows.device).manual_seed(seed)
    order = torch.randperm(len(rows), generator=generator, device=device)
    num_holdout = min(len(rows) // 20, 1000)
    holdout, train = rows[order[:num_holdout]], order[num_holdout:]
    holdout_noise = torch.randn(num_holdout, noise_dim, generator=generator, device=device)
    batch_size = min(256, len(train))
    params = list(net.parameters())
    opt = torch.optim.Adam(params, lr, fused=True)
    grads = compile(lambda *minibatch: torch.autograd.grad(loss(net, *minibatch), params))
    best, lowest, bar = {}, math.inf, progress_bar(name, num_updates, "update")
    for i in range(1, num_updates + 1):
        at = train.index_select(0, torch.randint(len(train), (batch_size,), generator=generator, device=device))
        noise = torch.randn(batch_size, noise_dim, generator=generator, device=device)
        for p, grad in zip(params, grads(rows.index_select(0, at), noise), strict=True):
            p.grad = grad
        opt.step()
        bar.update()
        if i % HOLDOUT_INTERVAL == 0 or i == num_updates:
            with torch.no_grad():
                value = loss(net, holdout, holdout_noise).item()
            if not math.isfinite(value):
                raise InputError(f"the {name} diverged: look for enormous values in observations")
            if value < lowest:
                lowest, best = value, {key: tensor.clone() for key, tensor in net.state_dict().items()}
            bar.set_postfix_str(f"holdout {value:.3g}")
    bar.close()
    return {"net": best, "holdout": lowest}
