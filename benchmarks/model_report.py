"""Is a model of these data to be trusted, and where? What a day of training in it would find out, found out before.

Takes the ensemble that mopo.py would train in, from the cache or fitted, and measures it: on rows that its fit held
out, on episodes that a second ensemble has not seen, and, where the environment can be put into a logged state, under
random actions. A line a finding, in the words of doctor.py, a page with plots, and the numbers as json beside it.
MOBILE's doubt is of a critic, which no data have: benchmarks/studies/uncertainty.py asks finished runs for it.
Run: python benchmarks/model_report.py pendulum/random-v0
     python benchmarks/model_report.py mine.npz --env-id Hopper-v5 --penalty-coef 0.5
"""

import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import tyro
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from algos import mopo, morel  # noqa: E402
from benchmarks import model_measures as measures  # noqa: E402
from benchmarks.doctor import CLIPPED, FINE, LOOK, SERIOUS, UNKNOWN, Finding  # noqa: E402
from benchmarks.files import HomePaths, one_line, safe, start, write_text  # noqa: E402
from benchmarks.grid import read_settings  # noqa: E402
from benchmarks.model_measures import FEWEST, predicted, recorded  # noqa: E402
from benchmarks.model_page import GAUSS, page  # noqa: E402
from common import InputError  # noqa: E402
from common.dataset import OfflineDataset, load_dataset  # noqa: E402
from common.dynamics import Dynamics  # noqa: E402
from common.machine import progress_bar  # noqa: E402
from common.terminations import termination_fn  # noqa: E402

# Where there are two numbers, the first is for "look at" and the second is SERIOUS.
GUESS = (0.5, 0.9)  # a column's squared error, in that of the best constant guess
WITHIN = 0.85  # of a column's held-out numbers within two deviations, of a Gaussian's 0.954
OFF, RANK = 1.5, 0.3  # error under random actions in that on the data: then doubts must rank them; rank correlation
HALTED = 0.2  # of the rollouts of recorded actions; of random ones, where a halt pays more than going on
FLAGS, NOTICED = 0.001, 0.5  # of the rows: rule and flags differ; of the flags: seen in the model, too
STEPS = 500  # of the environment


@dataclass
class Args(HomePaths):
    dataset: tyro.conf.Positional[str]  # as --dataset of the scripts
    env_id: str = ""  # environment that the data were recorded in; "": the data's own
    standardise_obs: bool = False  # as in mopo.py
    trust: bool = False  # import the modules that only the data name: code of whoever made them
    seed: int = 0  # of the ensemble, and of all that is drawn here
    dynamics: str = ""  # file of a fitted ensemble; by default as mopo.py has it
    dynamics_hidden_size: int | None = None  # this and the next, where not given: mopo.py's for these data
    dynamics_max_epochs: int | None = None
    termination: str = "auto"  # auto, known, forced, learned, none or module:function
    penalty_coef: float | None = None  # MOPO's lambda, by default mopo.py's for these data
    rollout_length: int | None = None  # likewise
    threshold_coef: float | None = None  # MOReL's, by default morel.py's for these data
    horizon: int = 50  # of the prediction along recorded actions, at most
    refit: bool = True  # fit a second ensemble without a tenth of the episodes for it; else it has seen them
    out: Path | None = None  # the page, by default in pages/; the json stands beside it


@dataclass
class Case:
    data: OfflineDataset
    dynamics: Dynamics
    mdp: morel.PessimisticMDP
    held_out: Tensor  # rows that the fit did not see
    penalty_coef: float
    rollout_length: int
    apart: tuple[Dynamics, Tensor, str]  # an ensemble, bool (rows,) that it has not seen, which those are
    horizon: int
    generator: torch.Generator  # of all that is drawn, on the CPU
    numbers: dict = field(default_factory=dict)
    rows: dict = field(default_factory=dict)  # where: doubts and the errors that they are of, for plots


# --- Checks: what was measured, and what to do ---
def uniform(shape: tuple, case: Case) -> Tensor:
    """Random actions."""
    return (2 * torch.rand(shape, generator=case.generator) - 1).to(case.data.action.device)


def column_names(chosen: np.ndarray, values: np.ndarray) -> str:
    names = [*(f"obs[{i}]" for i in range(len(chosen) - 1)), "reward"]
    parts = [f"{values[i]:.2g} in {names[i]}" for i in np.flatnonzero(chosen)]
    return ", ".join(parts[:6]) + f" and {len(parts) - 6} more" * (len(parts) > 6)


def holdout(case: Case) -> list[Finding]:
    """Against no change (for the reward: its mean), and against the best of no, the mean change and the mean."""
    rows, after = case.held_out, recorded(case.data, case.held_out)
    mean, std = predicted(case.dynamics, case.data.obs[rows], case.data.action[rows])
    mean, std = (x[case.dynamics.elites.cpu()].numpy() for x in (mean, std))
    change = after - np.pad(case.data.obs[rows].double().cpu().numpy(), ((0, 0), (0, 1)))
    error, still = ((mean - after) ** 2).mean(axis=(0, 1)), (change**2).mean(axis=0)
    still[-1] = after[:, -1].var()
    guess = np.minimum.reduce([still, change.var(axis=0), after.var(axis=0)])
    moves = guess > 1e-6 * still
    share, of_guess = (error / np.where(moves, x, np.nan) for x in (still, guess))
    within = {f"within {k}": (np.abs(mean - after) <= k * std).mean(axis=(0, 1)) for k in (1, 2, 3)}
    sizes = {"error": np.sqrt(error), "usual change": np.sqrt(still)}
    case.numbers["columns"] = sizes | {"of no change": share, "of a guess": of_guess} | within
    text = f"a column's squared error is {np.nanmedian(share):.2g} of that of no change, {np.nanmax(share):.2g} at most"
    grade, todo, bad, hopeless = FINE, "", of_guess >= GUESS[0], of_guess >= GUESS[1]
    if bad.any():
        grade = SERIOUS if hopeless[-1] or hopeless.sum() > moves.sum() / 2 else LOOK
        todo = f"; of that of a constant guess it is {column_names(bad, of_guess)}: leave out what is noise, record"
        todo += " more rows and what decides the rest"
    found = [Finding(grade, "held-out rows", text + todo)]
    one, two = (f"{within[f'within {k}'][moves].mean():.0%} (a Gaussian: {GAUSS[k - 1]:.0%})" for k in (1, 2))
    text, todo, proud = f"within one deviation {one} of the numbers, within two {two}", "", within["within 2"] < WITHIN
    if (proud & moves).any():
        todo = (
            f"; within two {column_names(proud & moves, within['within 2'])}: the ensemble claims more than it knows,"
        )
        todo += " so raise lambda, or take a method without deviations"
    return [*found, Finding(LOOK if todo else FINE, "calibration", text + todo)]


def open_loop(case: Case) -> list[Finding]:
    dynamics, unseen, how = case.apart
    first, length = measures.windows(case.data, unseen, case.horizon, case.generator)
    if len(first) < FEWEST or length == 1:
        text = f"fewer than {FEWEST} sequences of steps ({how}): record more, one episode after the other"
        return [Finding(UNKNOWN, "open loop", text)]
    model, still = measures.along(dynamics, case.data, first, length)
    low, middle, high = np.quantile(model, [0.1, 0.5, 0.9], axis=1, method="nearest")
    numbers = {"how": how, "error": middle, "low": low, "high": high, "no change": np.median(still, axis=1)}
    case.numbers["open loop"], h = numbers, min(case.rollout_length, length)
    pairs = [(n, middle[n - 1], numbers["no change"][n - 1]) for n in sorted({h, length})]
    text = f"error in deviations of obs ({how}): "
    text += ", ".join(f"{error:.2g} after {n} step{'s' * (n > 1)} (no change: {same:.2g})" for n, error, same in pairs)
    worse = np.flatnonzero(middle >= np.maximum(numbers["no change"], 1e-9))
    text += f"; from step {worse[0] + 1} on no better than that" if len(worse) else ""
    if not len(worse) or worse[0] >= h:
        return [Finding(FINE, "open loop", text)]
    if worse[0] == 0:
        return [Finding(SERIOUS, "open loop", f"{text}: do not train in this model, record more")]
    return [Finding(LOOK, "open loop", f"{text}: take --rollout-length {worse[0]} or less")]


def ranks(case: Case) -> list[Finding]:
    data, rows, found = case.data, case.held_out, []
    clear = rows[(data.raw_obs(data.obs[rows]).abs() != CLIPPED).all(dim=1)][:STEPS]  # no velocity is hidden
    world = measures.world_of(data, clear)
    places = {"on the data": ("held-out rows", rows, data.action[rows], recorded(data, rows))}
    if isinstance(world, str):
        found = [Finding(UNKNOWN, "off the data", world)]
    else:
        action = uniform((len(clear), data.action.shape[1]), case)
        places["off the data"] = ("random actions at such rows", clear, action, world(data.obs[clear], action))
        num = places["off the data"][-1].shape[1] - 1  # columns that the environment tells
        places["on the data"] = (*places["on the data"][:-1], np.delete(recorded(data, rows), np.s_[num:-1], axis=1))
    for place, (name, at, action, true) in places.items():
        said = measures.doubts(*predicted(case.dynamics, data.obs[at], action), case.dynamics.elites.cpu(), true)
        rank = {key: measures.spearman(*pair) for key, pair in said.items()}
        error = np.median(said["MOReL's distance"][1])
        case.numbers[place], case.rows[place] = rank | {"median error": error}, said
        text = ", ".join(f"{key} {value:.2f}" for key, value in rank.items())
        text = f"{name}, median error {error:.2g}; rank correlation with it of {text}"
        leaves = error >= OFF * case.numbers["on the data"]["median error"]
        weak = [key for key, value in rank.items() if not value >= RANK and leaves]
        todo = f": build on no method for its {' or '.join(weak)}" * bool(weak)
        found.append(Finding(LOOK if weak else FINE, place, text + todo))
    return found


def in_the_model(case: Case) -> list[Finding]:
    """Rollouts as the scripts make them, by recorded and by random actions: where MOReL halts, what MOPO pays."""
    data, numbers, can_end = case.data, case.numbers, bool((case.data.terminal > 0.5).any())
    everything = torch.ones_like(data.successor_known)
    first, length = measures.windows(data, everything, case.rollout_length, case.generator)
    logged = torch.stack([data.action[first + step] for step in range(length)])
    for kind in ("recorded", "random"):
        actions = logged if kind == "recorded" else uniform(logged.shape, case)
        made = measures.rollouts(case.mdp, data.obs[first], actions, case.generator)
        counts, known = measures.alive(made["end"]), measures.alive(made["end"] | made["halted"])
        numbers[kind] = {"reward": made["reward"][counts].mean(), "halted steps": made["halted"][known].mean()}
        numbers[kind] |= {"penalty": case.penalty_coef * made["doubt"][counts].mean()}
        numbers[kind] |= {"halted by step": np.cumsum(made["halted"] & known, axis=0).mean(axis=1)}
        can_end |= bool(made["end"][counts].any())
    steps, rolls = ([numbers[k][name] for k in ("recorded", "random")] for name in ("halted steps", "halted by step"))
    text = f"beyond the threshold of {case.mdp.threshold:.3g} are {steps[0]:.1%} of the steps by recorded actions"
    text += f" ({steps[1]:.1%} by random ones)"
    text += f"; it halts {rolls[0][-1]:.1%} ({rolls[1][-1]:.1%}) of the rollouts of length {length}"
    numbers["threshold"], numbers["penalty_coef"] = case.mdp.threshold, case.penalty_coef
    grade, todo = FINE, ""
    halt, on = case.mdp.halt_reward, data.reward.mean().item() / (1 - morel.Args.gamma)
    if rolls[0][-1] >= HALTED:
        grade, todo = LOOK, ": raise --threshold-coef, or a policy cannot even do what was recorded"
    elif rolls[1][-1] >= HALTED and halt > on:
        todo = f"; that pays {halt:.3g}, going on as recorded {on:.3g}, so that a policy seeks it: raise --halt-offset"
        grade = LOOK
    return [Finding(grade, "MOReL halts", text + todo), penalty(numbers, can_end)]


def penalty(numbers: dict, can_end: bool) -> Finding:
    """MOPO's, a step. Ending at once is worth 0, and where it is possible better than to go on for less."""
    (paid, cost), (random, random_cost) = (
        (numbers[k]["reward"], numbers[k]["penalty"]) for k in ("recorded", "random")
    )
    coef = numbers["penalty_coef"]
    text = f"lambda {coef:g} takes {cost:.3g} a step from rewards of {paid:.3g} by recorded actions"
    text += f", {random_cost:.3g} from {random:.3g} by random ones"
    grade, todo = FINE, ""
    if can_end and cost > paid > 0:
        grade, todo = SERIOUS, f"it pays to end at once, so take --penalty-coef well below {coef * paid / cost:.2g}"
    elif can_end and random_cost > random > 0:
        grade, todo = LOOK, f"it pays a beginner to end at once, so take it below {coef * random / random_cost:.2g}"
    elif cost > abs(paid):
        grade, todo = LOOK, "it outweighs the rewards, so try a lower --penalty-coef, too"
    return Finding(grade, "MOPO's penalty", text + f": {todo}" * bool(todo))


def ends(case: Case) -> list[Finding]:
    """The rule of termination at the recorded successors, and at the model's where the data have a flag."""
    data, rule = case.data, case.mdp.terminal_fn
    rows = data.successor_known.nonzero().squeeze(1)
    flags = data.terminal[rows] > 0.5
    called = torch.cat([rule(data.obs[at], data.action[at], data.next_obs[at]) for at in rows.split(10_000)])
    at, by_rule, num, differs = rows[flags], int(called.sum()), int(flags.sum()), int((called != flags).sum())
    after = predicted(case.dynamics, data.obs[at], data.action[at])[0][case.dynamics.elites.cpu()] if num else None
    seen = int(rule(data.obs[at], data.action[at], after.mean(dim=0)[:, :-1].to(data.obs)).sum()) if num else 0
    case.numbers["ends"] = {"rows": len(rows), "rule": by_rule, "flags": num, "differ": differs, "in the model": seen}
    text = f"the rule ends {by_rule:,} of {len(rows):,} rows, the data's flags {num:,}, and {differs:,} rows differ"
    text += f"; in the model {seen:,} of the {num:,} end" * bool(num)
    if differs > FLAGS * len(rows):
        return [Finding(LOOK, "ends", f"{text}: choose another --termination, or mend the flags")]
    if seen < NOTICED * num:
        return [Finding(LOOK, "ends", f"{text}: a policy will believe that it survives, so record more ends")]
    return [Finding(FINE, "ends", text)]


# --- The command ---
def settings_of(script, args: Args) -> dict:
    """The script's for this dataset, with what the command line says."""
    given = {name: value for name, value in vars(args).items() if name in script.Args.__dataclass_fields__}
    flags = []
    for name, value in given.items():
        if value is not None and value is not False and value != "":
            flags += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return read_settings(script, flags)


def case_of(args: Args) -> tuple[Case, list[Finding]]:
    if args.horizon < 2:
        raise InputError(f"--horizon must be 2 or more, not {args.horizon}")
    if args.out and args.out.suffix == ".json":
        raise InputError(f"--out {args.out} is where the numbers would go: name the page, such as {args.out.stem}.html")
    settings, halts = settings_of(mopo, args), settings_of(morel, args)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = load_dataset(settings["dataset"], device, args.env_id or None, args.standardise_obs, args.trust)
    print(data.summary())
    terminal_fn = termination_fn(args.termination, data, args.seed)
    dynamics = measures.ensemble_of(settings, data)
    rows, sure = measures.rows_held_out(data, dynamics, args.seed)
    text = "the ensemble is of another seed, of other rows or of another kind of device, so it has seen rows that count"
    found = [] if sure else [Finding(LOOK, "held-out rows", f"{text} as held out: give its --seed, or no --dynamics")]
    apart = dynamics, torch.ones_like(data.successor_known), "of episodes that it was fitted to"
    if args.refit and data.ordered:
        unseen, how = measures.episodes_apart(data, args.seed)
        print(f"held out    {how}, from a second ensemble of the same settings; --no-refit does without")
        names = ("obs", "action", "reward", "next_obs", "terminal", "successor_known", "episode_end")
        rest = {name: getattr(data, name)[~unseen] for name in names}
        rest = replace(data, **rest, data_hash=f"{data.data_hash}, without {how}, seed {args.seed}")
        sizes = {"num_members": dynamics.num_members, "num_elites": len(dynamics.elites)}
        sizes |= {"dynamics_hidden_size": dynamics.layers[0].bias.shape[-1], "dynamics": ""}
        apart = measures.ensemble_of(settings | sizes, rest), unseen, f"{how} held out"
    own = morel.Args(threshold_coef=halts["threshold_coef"], halt_offset=halts["halt_offset"])
    mdp = morel.make_pessimistic_mdp(dynamics, terminal_fn, data, own)
    generator = torch.Generator().manual_seed(args.seed)
    coef, length = settings["penalty_coef"], settings["rollout_length"]
    return Case(data, dynamics, mdp, rows, coef, length, apart, args.horizon, generator), found


@torch.no_grad()
def checked(case: Case) -> list[Finding]:
    found = []
    with progress_bar("checks", 5, "check") as bar:
        for check in (holdout, open_loop, ranks, in_the_model, ends):
            bar.set_description(check.__name__)
            found += check(case)
            bar.update()
    return found


def plain(x):
    """What json takes: six digits, and null for what is no number."""
    if isinstance(x, dict):
        return {key: plain(value) for key, value in x.items()}
    if isinstance(x, list | np.ndarray):
        return [plain(value) for value in x]
    if isinstance(x, float | np.floating):
        return float(f"{x:.6g}") if np.isfinite(x) else None
    return x


def main(args: Args) -> None:
    case, found = case_of(args)
    found = sorted(found + checked(case), key=lambda f: (SERIOUS, LOOK, UNKNOWN, FINE).index(f.level))
    for f in found:
        print(f"{f.level:<8} {f.check:<15} {one_line(f.text)}")
    out = args.out or ROOT / "pages" / f"model-{safe(args.dataset)}.html"
    numbers = {"dataset": args.dataset, "findings": [f._asdict() for f in found]} | case.numbers
    write_text(out.with_suffix(".json"), json.dumps(plain(numbers), indent=1))
    write_text(out, page(args.dataset, found, case))
    print(f"page     {out}\nnumbers  {out.with_suffix('.json')}")


if __name__ == "__main__":
    start(main, Args)
