"""Which of these finished runs would one deploy? Ranked by the log alone: no environment is made.

Of each run's deterministic policy, five numbers; larger is better in all but the last:

    fqe         V_0 of algos/fqe.py: two critics, fitted for this policy, read where the data's episodes begin
    own         the same mean of the critics that the run itself ended with; unknown where it keeps none
    model       return from recorded first states, over at most --horizon steps in an ensemble of a seed that no run has
    penalised   the same with r - lambda u for r: penalized_reward() of algos/mopo.py
    distance    mean squared distance of its action from the logged one, at logged states, in the box [-1, 1]

A number above what the data's largest reward allows is marked by ! and its run comes last: such a critic or model has
lost its hold. How sure: 1,000 times first states (of `distance`: rows), critics and ensemble members are drawn with
replacement, and a run wins where it comes first. That tells how firm the order is, not how right the criterion is.
Run: python benchmarks/select_run.py runs/my-grid
     python benchmarks/select_run.py runs/mopo-0 runs/cql-0 runs/bc-0 --by fqe --json choice.json
"""

import hashlib
import importlib
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from algos import fqe, morel  # noqa: E402
from algos.mopo import penalized_reward  # noqa: E402
from benchmarks.files import HomePaths, one_line, start, write_text  # noqa: E402
from benchmarks.film import check_trust, from_runs  # noqa: E402
from common import InputError, explained  # noqa: E402
from common.dataset import OfflineDataset, cache_dir, load_dataset  # noqa: E402
from common.dynamics import Dynamics, load_or_fit  # noqa: E402
from common.evaluation import load_policy  # noqa: E402
from common.machine import compiled, keep_freed_memory  # noqa: E402
from common.terminations import termination_fn  # noqa: E402

Criterion = Literal["fqe", "own", "model", "penalised", "distance"]
CRITERIA = Criterion.__args__
DEFAULT = "model"  # the least mean regret on the bench: benchmarks/results/selection.md
NUM_DRAWS = 1_000  # of a bootstrap
CACHE_VERSION = 1  # raise it when a change makes older measured numbers wrong


@dataclass
class Args(HomePaths):
    runs: tyro.conf.Positional[tuple[Path, ...]]  # finished runs of one dataset, of any scripts, or folders of them
    by: Criterion = DEFAULT  # what decides
    json: Path | None = None  # file for all numbers
    num_starts: int = 50  # first states, of as many recorded episodes
    gamma: float = 0.99  # discount per step, of fqe
    # 1 / (tau (1 - gamma)) updates is how long a value takes to settle: here five times that
    tau: float = 0.1  # Polyak step of fqe's target critics
    num_updates: int = 5_000  # of fqe
    horizon: int = 200  # steps in the ensemble, if the environment has no fewer
    penalty_coef: float = 1.0  # lambda
    termination: str = "auto"  # when simulated episodes end: as in algos/mopo.py
    dynamics_seed: int = 1_000  # no run's own: a policy knows how to exploit the ensemble that it was trained in
    dynamics_hidden_size: int = 128  # as on the bench
    dynamics_max_epochs: int | None = None  # of its fit; by default it ends when no member improves
    compile: bool = True  # fqe's update as one graph: pays from about five runs on
    trust: bool = False  # import the modules that a run's folder or its data name: code of whoever made them


@dataclass
class Finished:
    folder: Path
    config: dict
    policy: Callable  # as load_policy gives it

    @property
    def args(self) -> dict:
        return self.config["args"]


# --- The runs and their data ---
def finished(folder: Path, trust: bool) -> Finished:
    """Raises InputError where it is not."""
    with explained(f"{folder} is no run of a script in algos/", "name another"):
        config = json.loads((folder / "config.json").read_text())
        check_trust(folder, (config["args"]["env_id"],), trust)
    return Finished(folder, config, load_policy(folder))


def finished_runs(paths: tuple[Path, ...], trust: bool) -> list[Finished]:
    """Those that are, or lie in, `paths`; of each of the others a line says why it is left out."""
    return list(from_runs(paths, lambda folder: finished(folder, trust)).values())


def data_of(runs: list[Finished], trust: bool) -> OfflineDataset:
    """The data of all of them, as recorded. Raises InputError where they are not the same, or were changed."""
    loaded, first = {}, None
    for run in runs:
        name = run.args["dataset"], run.args["env_id"] or None
        if name not in loaded:
            loaded[name] = load_dataset(name[0], env_id=name[1], trust=trust)
        data, first = loaded[name], first or loaded[name]
        if data.data_hash != first.data_hash:
            both = f"{runs[0].folder} is of {first.name} and {run.folder} of {data.name}"
            raise InputError(f"{both}: a choice is one among runs of the same data, name those of one dataset")
        if not run.args.get("standardise_obs") and run.config["data_hash"] != data.data_hash:
            raise InputError(f"{run.folder} was trained on data that {data.name} no longer holds: leave that run out")
    return first


# --- The criteria: (members, units) each; all runs have the same units ---
class Judge:
    """What all runs of a dataset are measured with: first states, the ensemble, the rule that ends episodes."""

    def __init__(self, data: OfflineDataset, args: Args):
        if not (0 <= args.gamma < 1 and args.num_starts > 0 and args.horizon > 0):
            raise InputError("--gamma must be in [0, 1), --num-starts and --horizon at least 1")
        self.data, self.args = data, args
        begins = data.obs[data.episode_end.roll(1)]  # the last row ends an episode too
        self.starts = begins[:: math.ceil(len(begins) / args.num_starts)]  # (num_starts, obs_dim) or fewer
        self.horizon = min(args.horizon, morel.horizon(data))

    @cached_property
    def simulator(self) -> tuple[Dynamics, Callable]:
        sizes = {"hidden_size": self.args.dynamics_hidden_size, "max_epochs": self.args.dynamics_max_epochs}
        rule = termination_fn(self.args.termination, self.data, self.args.dynamics_seed)
        return load_or_fit(self.data, self.args.dynamics_seed, **sizes), rule

    def actions(self, run: Finished, obs: Tensor) -> Tensor:
        return fqe.policy_actions(run.policy, self.data, obs)

    def measure(self, run: Finished) -> dict[str, np.ndarray | None]:
        model, penalised = self.model(run)
        values = {"fqe": self.fqe(run), "own": self.own(run), "model": model, "penalised": penalised}
        values["distance"] = self.distance(run)
        return {name: None if value is None else value.numpy() for name, value in values.items()}

    def fqe(self, run: Finished) -> Tensor:
        """(2, num_starts), by algos/fqe.py"""
        obs_dim, action_dim = self.data.obs.shape[1], self.data.action.shape[1]
        args = fqe.Args(hidden_sizes=(64, 64), gamma=self.args.gamma, tau=self.args.tau, critic_lr=1e-3)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            rows, agent = fqe.policy_rows(self.data, run.policy), fqe.Agent(obs_dim, action_dim, args)
            step = lambda batch: fqe.update(agent, batch, args)  # noqa: E731
            step = compiled(step, rows.device) if self.args.compile else step
            for _ in range(self.args.num_updates):
                step(fqe.sample_batch(rows, args))
        return agent.critic(self.starts, self.actions(run, self.starts)).detach()

    def own(self, run: Finished) -> Tensor | None:
        """(2, num_starts), by the critics of the checkpoint at the run's end"""
        file = run.folder / "checkpoint.pt"
        if not file.is_file():
            return None
        with explained(f"{file} holds no critic of {run.config['algo']}.py as it is now", "delete it, or run again"):
            state = torch.load(file, map_location="cpu", weights_only=True)
            agent = state["modules"]["agent"]
            weights = {key.removeprefix("critic."): value for key, value in agent.items() if key.startswith("critic.")}
            if not weights or state["progress"]["update"] != run.args["num_updates"]:
                return None
            script = importlib.import_module(f"algos.{run.config['algo']}")
            critic = script.Critic(self.starts.shape[1], len(self.data.action_low), tuple(run.args["hidden_sizes"]))
            critic.load_state_dict(weights)
            # in the units of that run: its data's, then those of its networks
            saved = torch.load(run.folder / "policy.pt", map_location="cpu", weights_only=True)
            obs = ((self.starts - saved["obs_shift"]) / saved["obs_scale"]).float()
            obs = (obs - agent.get("actor.obs_mean", 0)) / agent.get("actor.obs_std", 1)
            values = critic(obs, self.actions(run, self.starts)).detach()
            if run.args.get("reward_scale") == "returns":
                values *= (self.data.reward.norm() / script.scale_rewards(self.data).reward.norm()).item()
            return values

    def model(self, run: Finished) -> tuple[Tensor, Tensor]:
        """Two of (num_elites, num_starts): from each start with each elite, without and with the penalty."""
        (dynamics, terminal_fn), num = self.simulator, len(self.starts)
        obs, member = self.starts.repeat(len(dynamics.elites), 1), dynamics.elites.repeat_interleave(num)
        returns, running = torch.zeros(2, len(obs)), torch.arange(len(obs))
        generator = torch.Generator().manual_seed(0)  # the same noise for all policies
        for _ in range(self.horizon):
            noise = torch.randn(len(member), obs.shape[1], generator=generator)[running]
            action, row = self.actions(run, obs), torch.arange(len(obs))
            next_mean, reward, std = dynamics.predict(obs, action)
            reward = reward[member[running], row]
            next_obs = next_mean[member[running], row] + std[member[running], row, :-1] * noise
            penalised, _ = penalized_reward(reward, std, self.args.penalty_coef)
            returns[:, running] += torch.stack([reward, penalised])
            goes_on = ~terminal_fn(obs, action, next_obs)
            obs, running = next_obs[goes_on], running[goes_on]
            if not len(running):
                break
        return tuple(returns.view(2, -1, num))

    def distance(self, run: Finished) -> Tensor:
        """(1, at most 1,000 rows)"""
        every = math.ceil(len(self.data.obs) / 1_000)
        obs, action = self.data.obs[::every], self.data.action[::every]
        return (self.actions(run, obs) - action).square().mean(dim=1)[None]

    def most(self, run: Finished) -> dict[str, float]:
        """What the largest reward of the data allows, and a tenth of the largest size more."""
        best, size = self.data.reward.max().item(), self.data.reward.abs().max().item()
        steps = {"fqe": 1 / (1 - self.args.gamma), "model": self.horizon, "penalised": self.horizon}
        steps["own"] = 1 / max(1 - run.args.get("gamma", 1.0), 1e-9)
        return {name: max(best, best * num) + 0.1 * size * num for name, num in steps.items()} | {"distance": math.inf}


def measured(judge: Judge, run: Finished) -> dict[str, np.ndarray | None]:
    """judge.measure(run), or what it was the last time. Raises InputError where the ensemble is the run's own."""
    if "dynamics_hidden_size" in run.args and run.args["seed"] == judge.args.dynamics_seed:
        raise InputError(
            f"{run.folder} learned in the ensemble of its seed, {run.args['seed']}, which would judge it here: "
            "give another --dynamics-seed"
        )
    skipped = ("runs", "by", "json", "compile", "trust")
    settings = {name: value for name, value in vars(judge.args).items() if name not in skipped}
    digest = hashlib.blake2b(json.dumps([CACHE_VERSION, judge.data.data_hash, settings]).encode(), digest_size=16)
    for part in (run.folder / "policy.pt", run.folder / "checkpoint.pt"):
        digest.update(part.read_bytes() if part.is_file() else b"")
    file = cache_dir() / "selection" / f"{digest.hexdigest()}.json"
    try:
        values = json.loads(file.read_text())
    except (OSError, ValueError):  # absent, or damaged: it is only a cache
        found = judge.measure(run)
        values = {name: None if value is None else value.tolist() for name, value in found.items()}
        write_text(file, json.dumps(values))
    return {name: None if value is None else np.array(value) for name, value in values.items()}


# --- The choice ---
def means(values: dict[str, np.ndarray | None]) -> dict[str, float]:
    """nan: unknown."""
    return {name: math.nan if value is None else float(value.mean()) for name, value in values.items()}


def impossible(mean: dict[str, float], most: dict[str, float]) -> list[str]:
    return [name for name in CRITERIA if math.isinf(mean[name]) or mean[name] > most[name]]


def merit(mean: dict[str, float], name: str, not_possible: list[str]) -> float:
    """Larger is better; nan where the criterion does not know or cannot be right."""
    return math.nan if name in not_possible else mean[name] * (-1 if name == "distance" else 1)


def wins(values: list[np.ndarray], shared_members: bool) -> np.ndarray:
    """(runs,): how often each comes first. values: (members, units) of each run, larger is better.

    The same units are drawn for all runs; and the same members, or those of each run for itself.
    """
    rng, (num, units) = np.random.default_rng(0), values[0].shape
    unit_weight = rng.multinomial(units, np.full(units, 1 / units), size=NUM_DRAWS) / units  # (draws, units)
    shape = (1 if shared_members else len(values), NUM_DRAWS)
    member_weight = rng.multinomial(num, np.full(num, 1 / num), size=shape) / num  # (1 or runs, draws, members)
    mean = np.einsum("rmu,du,rdm->rd", np.stack(values), unit_weight, member_weight + np.zeros((len(values), 1, 1)))
    return np.bincount(mean.argmax(axis=0), minlength=len(values)) / NUM_DRAWS


def rank(runs: list[Finished], judge: Judge) -> list[dict]:
    """A row per run: its numbers, which of them cannot be, and for each criterion how often it wins."""
    measures = [measured(judge, run) for run in tqdm(runs, unit="run")]
    rows = []
    for run, values in zip(runs, measures):
        row = {"run": str(run.folder), "algo": run.config["algo"], "seed": run.args["seed"]} | means(values)
        rows.append(row | {"impossible": impossible(row, judge.most(run)), "wins": {}})
    for name in CRITERIA:
        known = [i for i, row in enumerate(rows) if math.isfinite(merit(row, name, row["impossible"]))]
        sign = -1 if name == "distance" else 1
        share = wins([sign * measures[i][name] for i in known], name in ("model", "penalised")) if known else []
        for i, won in zip(known, share):
            rows[i]["wins"][name] = float(won)
    return rows


def best_first(rows: list[dict], by: str) -> list[dict]:
    """Without a value last."""
    merits = [merit(row, by, row["impossible"]) for row in rows]
    return [rows[i] for i in np.argsort([math.inf if math.isnan(m) else -m for m in merits], kind="stable")]


def text(rows: list[dict], by: str) -> str:
    """The table, its rows in order of `by`."""
    lines = [["run", *(f"[{name}]" if name == by else name for name in CRITERIA), "wins"]]
    for row in rows:
        numbers = [f"{row[n]:.4g}{'!' * (n in row['impossible'])}" if row[n] == row[n] else "unknown" for n in CRITERIA]
        lines.append([one_line(row["run"]), *numbers, f"{row['wins'].get(by, 0):.0%}"])
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(
        "  ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(line, widths)))
        for line in lines
    )


def main(args: Args) -> None:
    keep_freed_memory()
    runs = finished_runs(args.runs, args.trust)
    if len(runs) < 2:
        raise InputError(f"a choice needs two finished runs, and there are {len(runs)}: name more")
    judge = Judge(data_of(runs, args.trust), args)
    rows = best_first(rank(runs, judge), args.by)
    print(text(rows, args.by))
    if any(row["impossible"] for row in rows):
        print("!           more than the data's rewards allow, or not finite: that run comes last by it")
    first, known = rows[0], args.by in rows[0]["wins"]
    if known:
        print(f"take        {first['run']}: by {args.by} it comes first in {first['wins'][args.by]:.0%} of the draws")
        others = {name: best_first(rows, name)[0] for name in CRITERIA if name != args.by}
        others = [f"{name} {Path(row['run']).name}" for name, row in others.items() if name in row["wins"]]
        print(f"others take {', '.join(others)}")
        print("how right   criteria are where the truth is known: benchmarks/results/selection.md")
    else:
        print(f"take        none: {args.by} knows nothing of any of these runs, decide --by another")
    if args.json:
        for row in rows:
            row |= {name: row[name] if math.isfinite(row[name]) else None for name in CRITERIA}
        choice = {"dataset": judge.data.name, "data_hash": judge.data.data_hash, "by": args.by}
        choice |= {"take": first["run"] if known else None, "horizon": judge.horizon, "runs": rows}
        write_text(args.json, json.dumps(choice, indent=1) + "\n")


if __name__ == "__main__":
    start(main, Args)
