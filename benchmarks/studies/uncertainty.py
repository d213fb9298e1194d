"""Does an ensemble know where it is wrong? What penalties are made of, against the true errors of simulated steps.

The policy of a finished run is rolled out in the run's ensemble, as in its training. Each simulated step is then made
again by the simulator, put into the simulated state: how far off is the elites' mean successor, and how far off the
value that they expect? (Not the mean of their errors: that grows with their spread, whether they are right or not.)

    state error = || mean_i mu_i(s,a) - s' ||_2
    value error = | mean_i E_{s^,r^,d^ ~ T_i} [ r^ + gamma (1 - d^) V(s^) ] - r - gamma (1 - d) V(s') |

with V(s) = min_j Q'_j(s, pi(s)) of the run. By rank (Spearman, within each step of the rollouts, then the mean of
steps) against both: MOPO's deviation, MOPO's disagreement, MOReL's discrepancy, MOBILE's inconsistency, and, needing
no ensemble, the distance to the nearest logged (s,a) in standard deviations.
Run: python benchmarks/studies/uncertainty.py runs/my-mopo-run        prints the tables
     python benchmarks/studies/uncertainty.py runs/mopo-penalty --out benchmarks/results/uncertainty.md
"""

import importlib
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from algos import mobile, morel  # noqa: E402
from benchmarks.files import HomePaths, start, write_text  # noqa: E402
from benchmarks.film import check_trust, for_each_run  # noqa: E402
from benchmarks.model_measures import spearman  # noqa: E402
from benchmarks.report import number, table, variant_of  # noqa: E402
from common import InputError  # noqa: E402
from common.dataset import OfflineDataset, load_dataset  # noqa: E402
from common.dynamics import Dynamics, load_or_fit  # noqa: E402
from common.terminations import termination_fn  # noqa: E402

SCRIPTS = ("mopo", "mobile", "combo")  # whose critics and rollouts are alike
NOTE = """\
Written by `python benchmarks/studies/uncertainty.py`, whose head defines the errors. Simulated steps of finished runs
are made again by the simulator from the same simulated states; in the tables is Spearman's rank correlation of what a
penalty is made of with the true error of that step, the mean over the steps of the rollouts. **kept**: share of
simulated states that can be put into the simulator; Hopper and Walker2d cut the observed velocities off at 10, and
states with larger ones are left out; how sure the ensemble is there was not measured. An end of the episode that the
model foresees wrongly is an error of the value. Values are those of each run's own critic: MOBILE's U is made of that
critic as well, and values of different runs cannot be compared.
"""


@dataclass
class Args(HomePaths):
    runs: tyro.conf.Positional[tuple[Path, ...]]  # finished runs, or folders of them
    num_starts: int = 1_000  # logged states that rollouts start from
    num_samples: int = 10  # of every elite: for MOBILE's inconsistency, and others for the value expected
    seed: int = 0  # of starts, rollouts and samples
    out: Path | None = None  # file for the tables
    trust: bool = False  # import the modules that a run's folder or its data name: code of whoever made them


# --- The simulator ---
def put_into(env: gym.Env, obs: np.ndarray) -> None:
    """Sets the state that has the observation (obs_dim,); where it starts along x is of no consequence."""
    simulator = env.unwrapped
    if env.spec.id.startswith("Pendulum"):  # a simulated (cos, sin) is a little off the circle: the nearest on it
        simulator.state = np.array([math.atan2(obs[1], obs[0]), obs[2]])
    else:  # Gymnasium's runners: all positions but x, then all velocities
        num = simulator.model.nq - 1
        simulator.set_state(np.concatenate([[0.0], obs[:num]]), obs[num:])


def is_state(env: gym.Env, obs: np.ndarray) -> np.ndarray:
    """Of observations (rows, obs_dim), those that tell the state: Hopper and Walker2d cut velocities off at 10."""
    if not env.spec.id.startswith(("Hopper", "Walker2d")):
        return np.ones(len(obs), dtype=bool)
    return (np.abs(obs[:, env.unwrapped.model.nq - 1 :]) < 10).all(axis=1)


def make_simulator(data: OfflineDataset) -> gym.Env:
    """Raises InputError for an environment that `put_into` does not know."""
    if data.env_spec is None:
        raise InputError("the data name no environment, so that there is no simulator to ask")
    env = gym.make(data.env_spec)
    obs, _ = env.reset(seed=0)
    try:
        put_into(env, obs)
        again = env.unwrapped._get_obs()
    except (AttributeError, IndexError, ValueError, AssertionError):
        again = np.full_like(obs, np.nan)
    if not np.allclose(again, obs, atol=1e-6):
        raise InputError(f"{env.spec.id} cannot be put into a state by its observation: Hopper, Walker2d, ... can")
    return env


def true_steps(env: gym.Env, obs: np.ndarray, action: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """obs (rows, obs_dim), action (rows, action_dim) in the environment's box -> next_obs, reward, terminal."""
    steps = []
    for o, a in zip(obs, action, strict=True):
        put_into(env, o.astype(np.float64))
        steps.append(env.unwrapped.step(a)[:3])
    next_obs, reward, terminal = zip(*steps)
    return np.array(next_obs, dtype=np.float32), np.array(reward, dtype=np.float32), np.array(terminal)


def check_simulator(env: gym.Env, data: OfflineDataset) -> None:
    """Raises InputError where it does not make logged steps again: another version's data."""
    obs, known = data.obs.numpy(), data.successor_known.numpy()
    rows = np.flatnonzero(known & is_state(env, obs))[:200]
    next_obs, _, _ = true_steps(env, obs[rows], data.to_env_action(data.action.numpy()[rows]))
    error = np.median(np.abs(next_obs - data.next_obs.numpy()[rows]))
    if not error < 1e-3:
        off = f"its steps come out {error:.3g} off"
        raise InputError(f"{env.spec.id} is not what {data.name} was recorded in, {off}: name the version that it was")


# --- Measures and errors ---
def measures(dynamics: Dynamics, agent, data: OfflineDataset, obs: Tensor, action: Tensor, num_samples: int):
    """What penalties are made of, (rows,) each, by name."""
    next_mean, _, std = dynamics.predict(obs, action)
    noise = torch.randn(num_samples, len(dynamics.elites), len(obs), obs.shape[1] + 1 + action.shape[1])
    backups = mobile.member_backups(agent, dynamics, obs, action, noise)
    logged = torch.cat([data.obs, data.action], dim=1)
    (width, mean), exact = torch.std_mean(logged, dim=0), "donot_use_mm_for_euclid_dist"
    unit = torch.where(width > 1e-6 * (1 + mean.abs()), width, 1.0)  # constants keep their unit
    logged, here = logged / unit, torch.cat([obs, action], dim=1) / unit
    nearest = [torch.cdist(rows, logged, compute_mode=exact).amin(dim=1) for rows in here.split(100)]
    return {
        "MOPO deviation": std.norm(dim=-1).amax(dim=0),
        "MOPO disagreement": (next_mean - next_mean.mean(dim=0)).norm(dim=-1).amax(dim=0),  # of the authors' code
        "MOReL": morel.discrepancy(next_mean[dynamics.elites]),
        "MOBILE": mobile.bellman_inconsistency(backups),
        "distance": torch.cat(nearest),
    }


def errors(dynamics, agent, terminal_fn: Callable, obs: Tensor, action: Tensor, true: list[Tensor], gamma, num_samples):
    """Of the state and of the value, (rows,) each. true: next_obs (rows, obs_dim), reward, terminal."""

    def backup(next_obs, reward, terminal):
        value = agent.target_critic(next_obs, agent.actor.act(next_obs)).amin(dim=0)
        return reward + gamma * (1 - terminal) * value

    next_mean, _, _ = dynamics.predict(obs, action)
    state = (next_mean[dynamics.elites].mean(dim=0) - true[0]).norm(dim=-1)
    shape = num_samples, len(dynamics.elites), len(obs)
    mean, std = dynamics(torch.cat([obs, action], dim=-1).expand(*shape[1:], -1), dynamics.elites)
    sample = mean + std * torch.randn(*shape, obs.shape[1] + 1)
    flat = [x.expand(*shape, -1).flatten(0, 2) for x in (obs, action, obs + sample[..., :-1])]
    simulated = backup(flat[2], sample[..., -1].flatten(), terminal_fn(*flat).float()).view(shape).mean(dim=(0, 1))
    return {"state": state, "value": (simulated - backup(*true)).abs()}


# --- A run ---
@torch.no_grad()
def examine(folder: Path, args: Args) -> dict:
    """A row of both tables."""
    config = json.loads((folder / "config.json").read_text())
    if config["algo"] not in SCRIPTS or not (folder / "policy.pt").is_file():
        raise InputError(f"{folder} is no finished run of {', '.join(SCRIPTS)}: name one that is")
    script = importlib.import_module(f"algos.{config['algo']}")
    try:
        settings = {name: tuple(value) if type(value) is list else value for name, value in config["args"].items()}
        settings = script.Args(**settings)
    except TypeError as error:
        raise InputError(f"{folder} is of another version of {config['algo']}.py ({error}): run it again") from None
    check_trust(folder, (settings.env_id, settings.termination), args.trust)
    data = load_dataset(settings.dataset, "cpu", settings.env_id or None, settings.standardise_obs, args.trust)
    if data.rescaled:
        raise InputError(
            f"{folder} was trained on observations that are not the environment's: the simulator needs those"
        )
    env = make_simulator(data)
    check_simulator(env, data)
    agent = script.Agent(data.obs.shape[1], data.action.shape[1], settings)
    agent.load_state_dict(torch.load(folder / "checkpoint.pt", "cpu", weights_only=True)["modules"]["agent"])
    torch.manual_seed(args.seed)
    ensemble = {"num_members": settings.num_members, "num_elites": settings.num_elites}
    ensemble |= {"hidden_size": settings.dynamics_hidden_size, "max_epochs": settings.dynamics_max_epochs}
    dynamics = load_or_fit(data, settings.seed, path=settings.dynamics, **ensemble)
    terminal_fn = termination_fn(settings.termination, data, settings.seed)
    one_step, obs_dim, action_dim = replace(settings, rollout_length=1), data.obs.shape[1], data.action.shape[1]
    obs, num_simulated, steps = data.obs[torch.randint(len(data.obs), (args.num_starts,))], 0, []
    for _ in range(settings.rollout_length):
        rows = script.rollout(dynamics, agent.actor, terminal_fn, obs, one_step)
        rows = rows if torch.is_tensor(rows) else rows[0]
        num_simulated += len(rows)
        obs, action, _, next_obs, terminal = rows.split([obs_dim, action_dim, 1, obs_dim, 1], dim=1)
        kept = torch.as_tensor(is_state(env, obs.numpy()))
        obs, action = obs[kept], action[kept]
        found = true_steps(env, obs.numpy(), data.to_env_action(action.numpy()))
        true = [torch.as_tensor(column, dtype=torch.float32) for column in found]
        error = errors(dynamics, agent, terminal_fn, obs, action, true, settings.gamma, args.num_samples)
        steps.append((error, measures(dynamics, agent, data, obs, action, args.num_samples)))
        obs = next_obs[terminal.squeeze(1) == 0]
    method = f"{config['algo']} {variant_of(folder, config['algo'], settings.seed)}".strip()
    num_kept = sum(len(error["state"]) for error, _ in steps)
    row = {"dataset": settings.dataset, "method": method, "seed": settings.seed}
    row |= {"steps": f"{num_kept:,}", "kept": f"{num_kept / num_simulated:.0%}"}
    for kind in ("state", "value"):
        median = torch.cat([error[kind] for error, _ in steps]).median().item()
        by_step = [[spearman(m.numpy(), error[kind].numpy()) for m in measure.values()] for error, measure in steps]
        row[kind] = [number(median, 3), *(number(mean, 2) for mean in np.mean(by_step, axis=0))]
    return row | {"measures": list(steps[0][1])}


def text(rows: list[dict]) -> str:
    parts = []
    for kind in ("state", "value"):
        names = ["dataset", "method", "seed", "steps", "kept"]
        lines = [[*(row[name] for name in names), *row[kind]] for row in rows]
        header = ", ".join([*names, "median error", *rows[0]["measures"]])
        parts.append(f"Error of the {kind}:\n\n{table(header, lines)}")
    return "\n\n".join(parts)


def main(args: Args) -> int:
    rows = []
    status = for_each_run(args.runs, lambda folder: rows.append(examine(folder, args)))
    if not rows:
        raise InputError("no run is left to be examined: finish one of mopo, mobile or combo")
    print(text(rows))
    if args.out:
        write_text(args.out, f"# What penalties know\n\n{NOTE}\n{text(rows)}\n")
    return status


if __name__ == "__main__":
    start(main, Args)
