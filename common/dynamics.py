"""Probabilistic ensemble of dynamics models (Chua et al. 2018, PETS; settings of Yu et al. 2020, MOPO).

Every member predicts a diagonal Gaussian over (next_obs - obs, reward) from (obs, action). Inputs and targets are
standardised inside, so that units do not matter; what goes in and comes out is in the data's units. All members are
computed in one batched product. The ensemble knows no method: penalties, thresholds, halting belong to the scripts.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from filelock import FileLock, Timeout
from torch import Tensor

from common import InputError, explained, writing
from common.dataset import OfflineDataset, cache_dir
from common.machine import progress_bar

WEIGHT_DECAY = (2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4)  # one per layer, on weights only [MOPO code]
SHORT_FIT = 1_000_000  # rows seen in all: it is over before it is compiled
FILE_VERSION = 3  # raise it when a change makes older cached ensembles wrong


class MemberLinear(nn.Module):
    """One linear layer per member: (num_members, batch, in_dim) -> (num_members, batch, out_dim)."""

    def __init__(self, num_members: int, in_dim: int, out_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_members, in_dim, out_dim))
        self.bias = nn.Parameter(torch.zeros(num_members, 1, out_dim))
        std = 0.5 / math.sqrt(in_dim)
        nn.init.trunc_normal_(self.weight, std=std, a=-2 * std, b=2 * std)

    def forward(self, x: Tensor, members: Tensor | None) -> Tensor:
        """members: index of those that x is for, None: all."""
        if members is None:
            return torch.baddbmm(self.bias, x, self.weight)
        return torch.baddbmm(self.bias[members], x, self.weight[members])


class Dynamics(nn.Module):
    """Ensemble of `num_members` Gaussian models; `elites` holds the indices of the best by holdout error.

    Observations, actions (in [-1, 1]) and rewards go in and come out in the units of the dataset.
    """

    def __init__(self, obs_dim: int, action_dim: int, num_members=7, num_elites=5, hidden_size=200):
        super().__init__()
        self.obs_dim, self.num_members = obs_dim, num_members
        sizes = [obs_dim + action_dim] + [hidden_size] * (len(WEIGHT_DECAY) - 1) + [2 * (obs_dim + 1)]
        self.layers = nn.ModuleList(MemberLinear(num_members, i, o) for i, o in zip(sizes[:-1], sizes[1:]))
        self.max_logvar = nn.Parameter(torch.full((obs_dim + 1,), 0.5))
        self.min_logvar = nn.Parameter(torch.full((obs_dim + 1,), -10.0))
        self.register_buffer("input_mean", torch.zeros(obs_dim + action_dim))
        self.register_buffer("input_std", torch.ones(obs_dim + action_dim))
        self.register_buffer("target_mean", torch.zeros(obs_dim + 1))
        self.register_buffer("target_std", torch.ones(obs_dim + 1))  # 0: a constant, known for certain
        self.register_buffer("elites", torch.arange(num_elites))
        # of the kept weights, in units of the targets' variance: 1 is as good as the mean of the targets
        self.register_buffer("holdout_mse", torch.full((num_members, obs_dim + 1), math.inf))

    def standardised(self, x: Tensor, members: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of (next_obs - obs, reward), less target_mean, in units of target_std.

        x: (num_members, batch, obs_dim + action_dim), or (len(members), ...) for the members of that index.
        Returns two tensors (num_members, batch, obs_dim + 1).
        """
        x = (x - self.input_mean) / self.input_std
        for layer in self.layers[:-1]:
            x = F.silu(layer(x, members))
        mean, logvar = self.layers[-1](x, members).chunk(2, dim=-1)
        # a soft clamp, so that the variance can neither explode off the data nor vanish on them
        logvar = self.max_logvar - F.softplus(self.max_logvar - logvar)
        return mean, self.min_logvar + F.softplus(logvar - self.min_logvar)

    def forward(self, x: Tensor, members: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of (next_obs - obs, reward), shapes as in `standardised`."""
        mean, logvar = self.standardised(x, members)
        return self.target_mean + self.target_std * mean, self.target_std * (0.5 * logvar).exp()

    def predict(self, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Every member at every row.

        obs: (batch, obs_dim), action: (batch, action_dim). Returns the mean next_obs (num_members, batch, obs_dim), the
        mean reward (num_members, batch) and the standard deviation of both (num_members, batch, obs_dim + 1).
        """
        mean, std = self(torch.cat([obs, action], dim=-1).expand(self.num_members, -1, -1))
        return obs + mean[..., :-1], mean[..., -1], std

    def step(self, obs: Tensor, action: Tensor, order: Tensor, noise: Tensor, all_members: bool = False):
        """One sampled transition per row, each row by one elite: the rows are dealt out in equal shares.

        order: a random permutation (batch,), which decides who gets which row; noise: standard normal
        (batch, obs_dim + 1). Returns next_obs (batch, obs_dim), reward (batch,), and with `all_members` what `predict`
        returns, else None: the same transition, three to four times cheaper.
        """
        num_elites, batch = len(self.elites), len(obs)
        if all_members:
            next_mean, reward_mean, std = self.predict(obs, action)
            row, member = torch.arange(batch, device=obs.device), self.elites[order.argsort() % num_elites]
            mean = torch.cat([next_mean[member, row], reward_mean[member, row, None]], dim=-1)
            sample = mean + std[member, row] * noise
            return sample[:, :-1], sample[:, -1], (next_mean, reward_mean, std)
        x = F.pad(torch.cat([obs, action], dim=-1)[order], (0, 0, 0, -batch % num_elites))
        x = x.view(-1, num_elites, x.shape[-1]).transpose(0, 1)  # (num_elites, share, in_dim), dealt out like cards
        mean, std = (out.transpose(0, 1).flatten(0, 1)[:batch] for out in self(x, self.elites))
        sample = torch.empty_like(noise)
        sample[order] = mean + std * noise[order]
        return obs + sample[:, :-1], sample[:, -1], None

    # --- Fitting ---
    #     sum_i mean[ (mu_i - y)^2 / sigma_i^2 + log sigma_i^2 ] + sum_layers wd/2 |W|^2 + 0.01 sum(vmax - vmin)
    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """x: (num_members, batch, obs_dim + action_dim), y: (num_members, batch, obs_dim + 1), standardised."""
        mean, logvar = self.standardised(x)
        nll = ((mean - y).square() * (-logvar).exp() + logvar).mean(dim=(1, 2)).sum()
        decay = sum(0.5 * wd * layer.weight.square().sum() for wd, layer in zip(WEIGHT_DECAY, self.layers, strict=True))
        return nll + decay + 0.01 * (self.max_logvar.sum() - self.min_logvar.sum())

    @torch.no_grad()
    def mse(self, x: Tensor, y: Tensor) -> Tensor:
        """(num_members, obs_dim + 1) for x (rows, in_dim) and standardised y (rows, obs_dim + 1)"""
        return (self.standardised(x.expand(self.num_members, -1, -1))[0] - y).square().mean(dim=1)

    def fit(
        self, x: Tensor, y: Tensor, seed: int, max_epochs: int | None = None, patience: int = 5, batch_size: int = 256,
        lr: float = 1e-3, compile: Callable = lambda function: function, partial: Path | None = None,
    ) -> int:  # fmt: skip
        """Maximum likelihood on x (N, obs_dim + action_dim), y (N, obs_dim + 1) = (next_obs - obs, reward).

        A member's weights are kept whenever its holdout error falls by more than 1 %; the fit stops when no member has
        improved for more than `patience` epochs [MOPO code], or after `max_epochs`. `compile` wraps what computes the
        gradients. `partial`: where the state is kept about once a minute, so that a killed fit goes on. Returns the
        number of epochs. Raises InputError when data are too few or the fit diverges.
        """
        if len(x) < 10:
            raise InputError(f"a dynamics model needs 10 transitions with a known successor or more, not {len(x)}")
        self.holdout_mse.fill_(math.inf)
        generator = torch.Generator(x.device).manual_seed(seed)
        order = torch.randperm(len(x), generator=generator, device=x.device)
        holdout, train = order.tensor_split([min(len(x) // 5, 1000)])
        for values, mean, std in ((x, self.input_mean, self.input_std), (y, self.target_mean, self.target_std)):
            for i in range(len(mean)):  # in float64, a column at a time: exact and small for a million rows
                column = values[:, i][train].double()
                mean[i], std[i] = column.mean(), column.std()
            std[std <= 1e-6 * mean.abs() + 1e-12] = 0.0
        self.input_std[self.input_std == 0] = 1.0
        y = (y - self.target_mean) / torch.where(self.target_std == 0, 1.0, self.target_std)
        # sampled once with replacement: members disagree where the data do not pin them down
        shape = (self.num_members, len(train))
        bootstrap = train[torch.randint(len(train), shape, generator=generator, device=x.device)]

        params, now = list(self.parameters()), self.layers.state_dict()  # which are the same tensors
        best = deepcopy(now)
        opt = torch.optim.Adam(params, lr, fused=True)
        grads = lambda bx, by: torch.autograd.grad(self.loss(bx, by), params)  # noqa: E731
        if max_epochs is None or max_epochs * len(train) > SHORT_FIT:
            grads = compile(grads)
        batch_size, epoch, stale, kept_at = min(batch_size, len(train)), 0, 0, time.monotonic()
        if partial and partial.exists():
            model, best, optimizer, drawn, epoch, stale = torch.load(partial, map_location=x.device, weights_only=True)
            self.load_state_dict(model)
            opt.load_state_dict(optimizer)
            generator.set_state(drawn.cpu())
        bar = progress_bar("dynamics", max_epochs, "epoch", initial=epoch)
        while stale <= patience and epoch != max_epochs:
            shuffle = [torch.randperm(len(train), generator=generator, device=x.device) for _ in bootstrap]
            indices = bootstrap.gather(1, torch.stack(shuffle))
            for rows in indices[:, : len(train) // batch_size * batch_size].split(batch_size, dim=1):
                for p, grad in zip(params, grads(x[rows], y[rows]), strict=True):
                    p.grad = grad
                opt.step()
            mse = self.mse(x[holdout], y[holdout])
            if not mse.isfinite().all():
                raise InputError("the dynamics model diverged: look for enormous values in observations and rewards")
            better = mse.mean(dim=1) < 0.99 * self.holdout_mse.mean(dim=1)
            self.holdout_mse[better] = mse[better]
            for name, value in best.items():
                value[better] = now[name][better]
            epoch, stale = epoch + 1, 0 if better.any() else stale + 1
            bar.set_postfix_str("holdout " + " ".join(f"{v:.2g}" for v in self.holdout_mse.mean(dim=1).tolist()), False)
            bar.update()
            if partial and time.monotonic() - kept_at > 60:
                save(partial, [self.state_dict(), best, opt.state_dict(), generator.get_state(), epoch, stale])
                kept_at = time.monotonic()
        bar.close()
        self.layers.load_state_dict(best)
        self.elites.copy_(self.holdout_mse.mean(dim=1).argsort()[: len(self.elites)])
        return epoch


def save(path: Path, state: dict) -> None:
    """torch.save, whole or not at all. Raises InputError."""
    with writing(path) as part:
        torch.save(state, part)


def cache_file(kind: str, key: list) -> Path:
    """Where a fit of that key is kept."""
    return cache_dir() / kind / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.pt"


@contextmanager
def kept(file: Path, what: str, device: torch.device, seed: int, make: Callable[[], dict]) -> Iterator[tuple]:
    """The state in `file`, where make()'s is put unless it is there or another process makes it, and what happened.

    Random numbers depend on the seed alone inside, and nobody else's on them. Raises InputError when the file is no
    such thing, also when that shows only inside.
    """
    verb, lock = "reused", FileLock(file.with_suffix(".lock"))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if not file.is_file():
            with explained(f"cannot write to {file.parent}", "set OFFLINE_MBRL_CACHE"):
                file.parent.mkdir(parents=True, exist_ok=True)
                try:
                    held = lock.acquire(blocking=False)
                except Timeout:
                    print(f"waiting     for another process, which fits this {what}")
                    held = lock.acquire()
            with held:
                if not file.is_file():
                    start = time.monotonic()
                    save(file, make())
                    verb = f"fitted in {time.monotonic() - start:.0f} s"
        with explained(f"{file} is no {what}", "delete it or name another"):
            yield torch.load(file, map_location=device, weights_only=True), verb


def load_or_fit(
    data: OfflineDataset, seed: int, num_members: int = 7, num_elites: int = 5, hidden_size: int = 200,
    max_epochs: int | None = None, path: str = "", compile: Callable = lambda function: function,
) -> Dynamics:  # fmt: skip
    """The ensemble of `data`: from the file `path`, else from the cache, else fitted and put into the cache.

    The cache's key is the data's content, the settings and the seed. Returns the ensemble on the data's device, without
    gradients to its weights. Raises InputError when the file is no ensemble or does not fit the data.
    """
    device, dims, known = data.obs.device, [data.obs.shape[1], data.action.shape[1]], data.successor_known
    sizes = {"num_members": num_members, "num_elites": num_elites, "hidden_size": hidden_size}
    if num_elites > num_members:
        raise InputError(f"--num-elites {num_elites} is more than --num-members {num_members}")
    key = [FILE_VERSION, data.data_hash, sizes, max_epochs, seed]
    file = Path(path) if path else cache_file("dynamics", key)
    if path and not file.is_file():
        raise InputError(f"no ensemble at {file}: give the .pt file of a fitted one, or leave --dynamics out")

    partial = file.with_suffix(f".{device.type}.partial")  # a generator's state is that of its kind of device

    def fit() -> dict:
        dynamics = Dynamics(*dims, **sizes).to(device)
        x = torch.cat([data.obs, data.action], dim=-1)[known]
        y = torch.cat([data.next_obs - data.obs, data.reward[:, None]], dim=-1)[known]
        epochs = dynamics.fit(x, y, seed, max_epochs, compile=compile, partial=partial)
        return {"model": dynamics.state_dict(), "dims": dims, "sizes": sizes, "epochs": epochs}

    with kept(file, "ensemble", device, seed, fit) as (state, verb):
        found, has, epochs = state["dims"], state["sizes"], state["epochs"]
        dynamics = Dynamics(*found, **has).to(device)
        dynamics.load_state_dict(state["model"])
        partial.unlink(missing_ok=True)
    if found != dims:
        raise InputError(f"{file} is for obs, action of {found} numbers, the data have {dims}")
    if path and has != sizes:
        print(f"dynamics    the file has {has}, which count, not {sizes}")
    mse = ", ".join(f"{v:.3g}" for v in dynamics.holdout_mse.mean(dim=1).tolist())
    elites = ", ".join(map(str, sorted(dynamics.elites.tolist())))
    print(f"dynamics    {verb}, {epochs} epochs, holdout mse / variance {mse}, elites {elites}, {file}")
    error = dynamics.holdout_mse[dynamics.elites].mean(dim=0).tolist()
    if bad := [f"{f'obs[{i}]' if i < dims[0] else 'reward'} {v:.2g}" for i, v in enumerate(error) if v > 0.5]:
        print(f"dynamics    predicts badly, against 1 for predicting the mean change: {', '.join(bad)}")
    return dynamics.requires_grad_(False)
