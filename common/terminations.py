"""Does an imagined step end the episode? By the environment's rule where known, else by one learned from the data.

Errors in circulation, avoided here: the misplaced bracket in `abs(o[1:] < 100)`, which never checks the lower bound;
names matched by substring, so that antmaze gets Ant's rule and InvertedPendulum gets Pendulum's; HalfCheetah and
Walker2d ended beyond +-100, which is a guard against diverging models and no rule of the environment.
"""

import math
import os
import pkgutil
import re
from collections.abc import Callable

import torch
from gymnasium.envs.registration import EnvSpec
from torch import Tensor, nn

from common import InputError, add_working_directory, explained
from common.dataset import OfflineDataset, gym_class
from common.pretrain import load_or_train

TerminationFn = Callable[[Tensor, Tensor, Tensor], Tensor]

# The learned rule: fewer rows of a class than MIN_ROWS cannot be fitted and checked, more than MAX_ROWS gain little.
MIN_ROWS, MAX_ROWS, NUM_STEPS = 20, 60_000, 4_000


# --- Known rules: next_obs (batch, obs_dim), in the environment's units -> bool (batch,) ---
def tip_height(o: Tensor) -> Tensor:
    """Of two poles of 0.6 each, by their angles, because a predicted (sin, cos) need not lie on the unit circle."""
    first, bend = torch.atan2(o[:, 1], o[:, 3]), torch.atan2(o[:, 2], o[:, 4])
    return 0.6 * (first.cos() + (first + bend).cos())


def never(o: Tensor) -> Tensor:
    """Limits to an episode's length are not terminations."""
    return torch.zeros(o.shape[0], dtype=torch.bool, device=o.device)


# By gym_class. Each is "not healthy", as the environments say it: what is no number is not.
RULES: dict[str, Callable[[Tensor], Tensor]] = {
    "Hopper": lambda o: ~(o[:, 0].isfinite() & (o[:, 1:].abs() < 100).all(1) & (o[:, 0] > 0.7) & (o[:, 1].abs() < 0.2)),
    "Walker2d": lambda o: ~((o[:, 0] > 0.8) & (o[:, 0] < 2.0) & (o[:, 1].abs() < 1.0)),
    "Ant": lambda o: ~(o.isfinite().all(1) & (o[:, 0] >= 0.2) & (o[:, 0] <= 1.0)),  # closed, unlike the others
    "Humanoid": lambda o: ~((o[:, 0] > 1.0) & (o[:, 0] < 2.0)),
    "InvertedPendulum": lambda o: ~(o.isfinite().all(1) & (o[:, 1].abs() <= 0.2)),
    "InvertedDoublePendulum": lambda o: ~(tip_height(o) > 1.0),
    **dict.fromkeys(("HalfCheetah", "Swimmer", "Reacher", "Pusher", "Pendulum", "HumanoidStandup"), never),
}
# The rules hold where none of these is given, nor an xml_file by its path: a bare name is one of gymnasium's own.
DECIDES = re.compile("healthy_[a-z]+_range|terminate_when_unhealthy|exclude_current_positions_from_observation")


def known_rule(spec: EnvSpec | None) -> tuple[Callable[[Tensor], Tensor] | None, str]:
    """Returns (rule or None, why)."""
    if spec is None:
        return None, "the data name no environment"
    if (name := gym_class(spec)) not in RULES:
        return None, f"{spec.id} is not in the table"
    is_other = lambda key, value: DECIDES.fullmatch(key) or (key == "xml_file" and os.path.dirname(value))  # noqa: E731
    changes = [f"was made with {key}={value}" for key, value in spec.kwargs.items() if is_other(key, value)]
    changes += [f"is wrapped in {x.name}" for x in spec.additional_wrappers if "Observation" in x.name]
    if changes and RULES[name] is not never:
        return None, f"{spec.id} {changes[0]}"
    return RULES[name], f"{spec.id} is in the table"


def rule_warning(data: OfflineDataset) -> str:
    """A sentence where the data's flags, which every method trusts, contradict the environment's rule; else ""."""
    rule, _ = known_rule(data.env_spec)
    if rule is None:
        return ""
    ends = torch.cat([rule(data.raw_obs(chunk)) for chunk in data.next_obs.split(2**16)])
    terminal, known = data.terminal > 0.5, data.successor_known | (rule is never)
    rows, by_rule, flags, differs = (int((x & known).sum()) for x in (known, ends, terminal, ends != terminal))
    if differs <= (0 if rule is never else rows / 1000):
        return ""
    counts = f"ends {by_rule:,} of {rows:,} rows, the data's flags {flags:,}, and {differs:,} rows differ"
    return f"the rule of {data.env_spec.id} {counts} (time limits called terminals, lost flags, another environment?)"


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
    """A classifier of (obs, action, next_obs), fitted to the data's terminals. Prints its precision and recall."""
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

    columns = (data.obs, data.action, data.next_obs)[: 3 if sees_next_obs else 2]
    # Rare as they are, terminals are half of what is fitted; the threshold makes up for it.
    again = fit[0][torch.randint(len(fit[0]), (len(fit[1]),), generator=generator).to(device)]
    x = torch.cat([column[torch.cat([again, fit[1]])] for column in columns], dim=1)
    std, mean = torch.std_mean(x, dim=0)
    std = torch.where(std > 1e-6 * (1 + mean.abs()), std, 1.0)  # constant columns: do not blow up their rounding errors

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(x.shape[1], 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 1))

    def loss(net: nn.Module, rows: Tensor, _) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(net((rows[:, :-1] - mean) / std), rows[:, -1:])

    rows = torch.cat([x, torch.arange(len(x), device=device)[:, None] < len(again)], dim=1)
    net = load_or_train("learned rule", make, loss, rows, 0, data, seed, NUM_STEPS, 1e-3, {"inputs": x.shape[1]})

    def logit(*given: Tensor) -> Tensor:
        return net((torch.cat(given[: len(columns)], dim=1) - mean) / std).squeeze(1)  # (batch,)

    def logit_at(rows: Tensor) -> Tensor:
        return torch.cat([logit(*(column[chunk] for column in columns)) for chunk in rows.split(8192)])

    threshold = f1_threshold(logit_at(choose), terminal[choose])
    called, true = logit_at(held_out) > threshold, terminal[held_out]
    hits = int((called & true).sum())
    precision, recall = hits / max(int(called.sum()), 1), hits / int(true.sum())
    how = "" if sees_next_obs else " by (obs, action) alone, as terminal rows lack successors"
    print(f"termination: learned from {counts}{how}, held-out precision {precision:.3f}, recall {recall:.3f}")
    return torch.no_grad()(lambda obs, action, next_obs: ~(logit(obs, action, next_obs) <= threshold))


# --- The user's rule ---
def imported_rule(target: str, data: OfflineDataset) -> TerminationFn:
    """target: 'module:function'. Raises InputError when it cannot be imported or does not return bool (batch,)."""
    if not re.fullmatch(r"[\w.]+:[\w.]+", target):
        raise InputError(f"termination: {target!r} is none of auto, known, forced, learned, none and module:function")
    add_working_directory()
    with explained(f"termination: cannot import {target} from here", "correct --termination module:function"):
        function = pkgutil.resolve_name(target)
    rule = torch.no_grad()(lambda obs, action, next_obs: function(data.raw_obs(obs), action, data.raw_obs(next_obs)))
    rows = torch.arange(data.obs.shape[1] + 1) % len(data.obs)  # not obs_dim: that would hide a reduction over rows
    with explained(f"termination: {target} fails on rows of the data", "mend it, or choose another rule"):
        result = rule(data.obs[rows], data.action[rows], data.next_obs[rows])
    shape, dtype = getattr(result, "shape", None), getattr(result, "dtype", type(result))
    if shape != rows.shape or dtype != torch.bool:
        raise InputError(f"termination: {target} must return torch.bool of shape {rows.shape}, not {dtype} of {shape}")
    print(f"termination: {target}")
    return rule


def termination_fn(mode: str, data: OfflineDataset, seed: int = 0) -> TerminationFn:
    """mode: auto, known, forced, learned, none or module:function; seed: of the learned rule. Prints which, and why.

    The data may contradict the known rule: then auto takes another, known is refused, and forced takes it all the same.
    Returns a function of obs (batch, obs_dim), action (batch, action_dim) in [-1, 1] and next_obs (batch, obs_dim) that
    gives bool (batch,): True where the step ends the episode or next_obs is not finite. It can be compiled or captured.
    """
    (rule, why), wrong, learned = known_rule(data.env_spec), rule_warning(data), None
    num_terminals = int((data.terminal > 0.5).sum())
    if mode == "auto":
        mode = "known" if rule and not wrong else "learned" if num_terminals >= (MIN_ROWS if wrong else 1) else "none"
        print(f"termination: auto chose {mode}: {wrong or why}; the data have {num_terminals:,} terminals")
    if mode in ("known", "forced"):
        if rule is None:
            raise InputError(f"termination: no known rule, {why}: use --termination learned, none or module:function")
        if wrong and mode == "known":
            raise InputError(f"termination: {wrong}: use --termination forced (the rule all the same), learned or none")
        print(f"termination: the rule of {data.env_spec.id}")
    elif mode == "none" or (mode == "learned" and not num_terminals):
        print(f"termination: never; the data have {num_terminals:,} terminals")
        rule = never
    else:
        learned = learned_rule(data, seed) if mode == "learned" else imported_rule(mode, data)
    ends = learned or (lambda obs, action, next_obs: rule(data.raw_obs(next_obs)))
    return lambda obs, action, next_obs: ends(obs, action, next_obs) | ~next_obs.isfinite().all(dim=1)
