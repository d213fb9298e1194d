"""Does an imagined step end the episode? By the environment's rule where known, else by one learned from the data.

Errors in circulation, avoided here: the misplaced bracket in `abs(o[1:] < 100)`, which never checks the lower bound;
names matched by substring, so that antmaze gets Ant's rule and InvertedPendulum gets Pendulum's; HalfCheetah and
Walker2d ended beyond +-100, which is a guard against diverging models and no rule of the environment.
"""

import importlib
import math
import os
import sys
from collections.abc import Callable

import torch
from gymnasium.envs.registration import EnvSpec
from torch import Tensor, nn

from common.dataset import InputError, OfflineDataset

TerminationFn = Callable[[Tensor, Tensor, Tensor], Tensor]

# The learned rule: fewer rows of a class than MIN_ROWS cannot be fitted and checked, more than MAX_ROWS gain little.
MIN_ROWS, MAX_ROWS, NUM_STEPS, BATCH_SIZE = 20, 60_000, 4_000, 256


# --- Known rules: next_obs (batch, obs_dim) -> bool (batch,) ---
def tip_height(o: Tensor) -> Tensor:
    """Of two poles of 0.6 each, by their angles, because a predicted (sin, cos) need not lie on the unit circle."""
    first = torch.atan2(o[:, 1], o[:, 3])
    second = first + torch.atan2(o[:, 2], o[:, 4])
    return 0.6 * (first.cos() + second.cos())


def never(o: Tensor) -> Tensor:
    """Limits to an episode's length are not terminations."""
    return torch.zeros(o.shape[0], dtype=torch.bool, device=o.device)


# Each is "not healthy", so that a prediction that is no number ends the trajectory.
RULES: dict[str, Callable[[Tensor], Tensor]] = {
    "Hopper": lambda o: ~(o[:, 0].isfinite() & (o[:, 1:].abs() < 100).all(1) & (o[:, 0] > 0.7) & (o[:, 1].abs() < 0.2)),
    "Walker2d": lambda o: ~((o[:, 0] > 0.8) & (o[:, 0] < 2.0) & (o[:, 1].abs() < 1.0)),
    "Ant": lambda o: ~(o.isfinite().all(1) & (o[:, 0] >= 0.2) & (o[:, 0] <= 1.0)),  # closed, unlike the others
    "Humanoid": lambda o: ~((o[:, 0] > 1.0) & (o[:, 0] < 2.0)),
    "InvertedPendulum": lambda o: ~(o.isfinite().all(1) & (o[:, 1].abs() <= 0.2)),
    "InvertedDoublePendulum": lambda o: ~(tip_height(o) > 1.0),
    **dict.fromkeys(("HalfCheetah", "Swimmer", "Reacher", "Pusher", "Pendulum", "HumanoidStandup"), never),
}
# The environments' default arguments with which alone the rules hold.
USUAL = {"terminate_when_unhealthy": True, "exclude_current_positions_from_observation": True}
HOPPER = {"healthy_state_range": (-100, 100), "healthy_z_range": (0.7, math.inf), "healthy_angle_range": (-0.2, 0.2)}
DEFAULTS: dict[str, dict] = {
    "Hopper": {**USUAL, **HOPPER},
    "Walker2d": {**USUAL, "healthy_z_range": (0.8, 2.0), "healthy_angle_range": (-1.0, 1.0)},
    "Ant": {**USUAL, "healthy_z_range": (0.2, 1.0)},
    "Humanoid": {**USUAL, "healthy_z_range": (1.0, 2.0)},
}


def known_rule(spec: EnvSpec | None) -> tuple[Callable[[Tensor], Tensor] | None, str]:
    """Returns (rule or None, why)."""
    if spec is None:
        return None, "the data name no environment"
    if spec.namespace is not None or spec.name not in RULES:
        return None, f"{spec.id} is not in the table"
    defaults, rule = DEFAULTS.get(spec.name, {}), RULES[spec.name]
    for key, value in spec.kwargs.items():
        value = tuple(value) if isinstance(value, list) else value  # a spec read from a file has lists for tuples
        own_model = key == "xml_file" and (os.path.dirname(value) or value[0] == ".")  # a bare name is gymnasium's file
        if rule is not never and (own_model or (key in defaults and value != defaults[key])):
            return None, f"{spec.id} was made with {key}={value}"
    for wrapper in spec.additional_wrappers:
        if rule is not never and "Observation" in wrapper.name:
            return None, f"{spec.id} is wrapped in {wrapper.name}"
    return rule, f"{spec.id} is in the table"


# --- Learned rule ---
def f1_threshold(logit: Tensor, terminal: Tensor) -> float:
    """logit: (rows,); terminal: bool (rows,), not all False. Returns the logit above which "terminal" has the best F1.

    F1 and not accuracy: with one terminal in a hundred rows, "never" is 99 % accurate.
    """
    logit, order = logit.sort(descending=True)
    hits, called = terminal[order].cumsum(0), torch.arange(1, len(logit) + 1, device=logit.device)
    f1 = 2 * hits / (called + hits[-1])
    f1[:-1][logit[1:] == logit[:-1]] = 0  # no cut between equal logits
    best = int(f1.argmax())
    # midway to the next row: the classes may lie far apart
    return float(logit[best : best + 2].mean()) if best + 1 < len(logit) else -math.inf


def learned_rule(data: OfflineDataset, seed: int) -> TerminationFn:
    """A classifier of (obs, action, next_obs), fitted to the data's terminals. Prints its precision and recall.

    Raises InputError when there are fewer than MIN_ROWS terminals or other rows.
    """
    device, terminal = data.obs.device, data.terminal > 0.5
    sees_next_obs = int((terminal & data.successor_known).sum()) >= MIN_ROWS
    usable = data.successor_known if sees_next_obs else torch.ones_like(terminal)
    classes = [(usable & terminal).nonzero().squeeze(1), (usable & ~terminal).nonzero().squeeze(1)]
    counts = f"{len(classes[0]):,} terminals and {len(classes[1]):,} other rows"
    if min(map(len, classes)) < MIN_ROWS:
        hint = f"(at least {MIN_ROWS} of each): use --termination none or module:function"
        raise InputError(f"termination: a rule cannot be learned from {counts} {hint}")
    generator = torch.Generator().manual_seed(seed)
    classes = [rows[torch.randperm(len(rows), generator=generator).to(device)] for rows in classes]
    parts = [rows.tensor_split([len(rows) * 6 // 10, len(rows) * 8 // 10]) for rows in classes]
    fit = [part[0][:MAX_ROWS] for part in parts]
    choose, held_out = (torch.cat([part[i] for part in parts]) for i in (1, 2))  # in their true shares

    def inputs(obs: Tensor, action: Tensor, next_obs: Tensor) -> Tensor:
        return torch.cat((obs, action, next_obs) if sees_next_obs else (obs, action), dim=1)

    def inputs_of(rows: Tensor) -> Tensor:
        return inputs(data.obs[rows], data.action[rows], data.next_obs[rows])

    x = inputs_of(torch.cat(fit))
    std, mean = torch.std_mean(x, dim=0)
    std = torch.where(std > 1e-6 * (1 + mean.abs()), std, 1.0)  # constant columns: do not blow up their rounding errors
    x = (x - mean) / std
    with torch.random.fork_rng(devices=[]):  # initial weights that leave the caller's random numbers alone
        torch.default_generator.manual_seed(seed)
        net = nn.Sequential(nn.Linear(x.shape[1], 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 1))
    net = net.to(device)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=NUM_STEPS)
    # Rare as they are, terminals fill half of each batch; the threshold makes up for it.
    half, label = BATCH_SIZE // 2, (torch.arange(BATCH_SIZE, device=device) < BATCH_SIZE // 2).float()
    terminals = torch.randint(len(fit[0]), (NUM_STEPS, half), generator=generator)
    others = torch.randint(len(fit[0]), len(x), (NUM_STEPS, half), generator=generator)
    for batch in torch.cat([terminals, others], dim=1).to(device):  # (BATCH_SIZE,)
        loss = nn.functional.binary_cross_entropy_with_logits(net(x[batch]).squeeze(1), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    net.requires_grad_(False)

    def logit(x: Tensor) -> Tensor:
        return net((x - mean) / std).squeeze(1)  # (batch,)

    def logit_of(rows: Tensor) -> Tensor:
        return torch.cat([logit(inputs_of(chunk)) for chunk in rows.split(8192)])

    threshold = f1_threshold(logit_of(choose), terminal[choose])
    called, true = logit_of(held_out) > threshold, terminal[held_out]
    hits = int((called & true).sum())
    precision, recall = hits / max(int(called.sum()), 1), hits / int(true.sum())
    how = "" if sees_next_obs else " by (obs, action) alone, as terminal rows lack successors"
    print(f"termination: learned from {counts}{how}, held-out precision {precision:.3f}, recall {recall:.3f}")

    @torch.no_grad()
    def learned(obs: Tensor, action: Tensor, next_obs: Tensor) -> Tensor:
        return ~(logit(inputs(obs, action, next_obs)) <= threshold)

    return learned


# --- The user's rule ---
def imported_rule(target: str, data: OfflineDataset) -> TerminationFn:
    """target: 'module:function'. Raises InputError when it cannot be imported or does not return bool (batch,)."""
    module_name, _, function_name = target.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), function_name, None)
    except Exception as error:
        raise InputError(f"termination: cannot import {module_name} (working directory included): {error!r}") from error
    if not callable(function):
        raise InputError(f"termination: module {module_name} has no function {function_name}")
    function = torch.no_grad()(function)
    rows = torch.arange(data.obs.shape[1] + 1) % len(data.obs)  # not obs_dim: that would hide a reduction over rows
    try:
        result = function(data.obs[rows], data.action[rows], data.next_obs[rows])
    except Exception as error:
        raise InputError(f"termination: {target} fails on rows of the data: {error!r}") from error
    shape, dtype = getattr(result, "shape", None), getattr(result, "dtype", type(result))
    if shape != rows.shape or dtype != torch.bool:
        raise InputError(f"termination: {target} must return torch.bool of shape {rows.shape}, not {dtype} of {shape}")
    print(f"termination: {target}")
    return function


def termination_fn(mode: str, data: OfflineDataset, seed: int = 0) -> TerminationFn:
    """mode: auto, known, learned, none or module:function; seed: of the learned rule. Prints which rule it is, and why.

    Returns a function of obs (batch, obs_dim), action (batch, action_dim) in [-1, 1] and next_obs (batch, obs_dim) that
    gives bool (batch,): True where the step ends the episode. It can be compiled or captured. Raises InputError for
    another mode, without a known rule, with too few terminals to learn from, and for a user's function that fails.
    """
    rule, why = known_rule(data.env_spec)
    terminal = data.terminal > 0.5
    num_terminals = int(terminal.sum())
    if mode == "auto":
        mode = "known" if rule else "learned" if num_terminals else "none"
        print(f"termination: auto chose {mode}: {why}; the data have {num_terminals:,} terminals")
    if mode == "known":
        if rule is None:
            raise InputError(f"termination: no known rule, {why}: use --termination learned, none or module:function")
        differs = (rule(data.next_obs) != terminal) & data.successor_known
        print(f"termination: the rule of {data.env_spec.name}; it differs from the data in {int(differs.sum()):,} rows")
        return lambda obs, action, next_obs: rule(next_obs)
    if mode == "learned" and num_terminals:
        return learned_rule(data, seed)
    if mode in ("learned", "none"):
        print(f"termination: never; the data have {num_terminals:,} terminals")
        return lambda obs, action, next_obs: never(next_obs)
    if not all(mode.partition(":")):
        raise InputError(f"termination: {mode!r} is none of auto, known, learned, none and module:function")
    return imported_rule(mode, data)
