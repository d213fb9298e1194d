"""Does an ensemble know where it is wrong? What penalties are made of, against the true errors of simulated steps.

The policy of a finished run is rolled out in the run's own ensemble, as in its training. Each simulated step is then
made again by the simulator, put into the simulated state: how far off was the successor, and how far off the value?

    state error = || s^' - s' ||_2
    value error = | r^ + gamma (1 - d^) V(s^') - r - gamma (1 - d) V(s') |,   V(s) = min_j Q'_j(s, pi(s)) of the run

Against both, by rank (Spearman): MOPO's deviation, MOPO's disagreement, MOReL's discrepancy, MOBILE's inconsistency,
and, needing no ensemble, the distance to the nearest logged (s,a) in standard deviations.
Run: python benchmarks/uncertainty.py runs/my-mopo-run        prints the table
     python benchmarks/uncertainty.py runs/mopo-penalty --out benchmarks/results/uncertainty.md
"""

import importlib
import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import Tensor
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from algos import mobile, mopo, morel  # noqa: E402
from benchmarks.report import number, table  # noqa: E402
from common.dataset import InputError, OfflineDataset, load_dataset  # noqa: E402
from common.dynamics import Dynamics, load_or_fit  # noqa: E402
from common.terminations import termination_fn  # noqa: E402

SCRIPTS = ("mopo", "mobile", "combo")  # whose critics and rollouts are alike
MEASURES = ("MOPO deviation", "MOPO disagreement", "MOReL", "MOBILE", "distance")
NOTE = """\
Written by `python benchmarks/uncertainty.py`. Simulated steps of finished runs, made again by the simulator from the
same simulated states: Spearman's rank correlation of what a penalty is made of with the true error of that step.
"""


@dataclass
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]]  # finished runs, or folders of them
    num_starts: int = 1_000  # logged states that rollouts start from
    num_samples: int = 10  # K of MOBILE's inconsistency
    seed: int = 0  # of starts, rollouts and samples
    out: Path | None = None  # file for the table


# --- The simulator ---
def put_into(env: gym.Env, obs: np.ndarray) -> None:
    """Sets the state that has the observation (obs_dim,); where it starts along x is of no consequence."""
    simulator = env.unwrapped
    if env.spec.id.startswith("Pendulum"):
        simulator.state = np.array([math.atan2(obs[1], obs[0]), obs[2]])
    else:  # Gymnasium's runners: all positions but x, then all velocities
        num = simulator.model.nq - 1
        simulator.set_state(np.concatenate([[0.0], obs[:num]]), obs[num:])


def make_simulator(data: OfflineDataset) -> gym.Env:
    """Raises InputError for an environment that `put_into` does not know."""
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


def is_state(env: gym.Env, obs: np.ndarray) -> np.ndarray:
    """Of observations (rows, obs_dim), those that tell the state: Hopper and Walker2d cut velocities off at 10."""
    if not env.spec.id.startswith(("Hopper", "Walker2d")):
        return np.ones(len(obs), dtype=bool)
    return (np.abs(obs[:, env.unwrapped.model.nq - 1 :]) < 10).all(axis=1)


def true_steps(env: gym.Env, obs: np.ndarray, action: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """obs (rows, obs_dim), action (rows, action_dim) in the environment's box -> next_obs, reward, terminal."""
    steps = []
    for o, a in zip(obs, action, strict=True):
        put_into(env, o.astype(np.float64))
        steps.append(env.unwrapped.step(a)[:3])
    next_obs, reward, terminal = zip(*steps)
    return np.array(next_obs, dtype=np.float32), np.array(reward, dtype=np.float32), np.array(terminal)


# --- Measures and errors ---
def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Correlation of ranks; x, y: (rows,), of continuous values."""
    return float(np.corrcoef(x.argsort().argsort(), y.argsort().argsort())[0, 1])


def measures(dynamics: Dynamics, agent, data: OfflineDataset, obs: Tensor, action: Tensor, num_samples: int):
    """One (rows,) for each of MEASURES."""
    next_mean, _, std = dynamics.predict(obs, action)
    noise = torch.randn(num_samples, len(dynamics.elites), len(obs), obs.shape[1] + 1 + action.shape[1])
    backups = mobile.member_backups(dynamics, agent.actor, agent.target_critic, obs, action, noise)
    logged, here = torch.cat([data.obs, data.action], dim=1), torch.cat([obs, action], dim=1)
    unit = logged.std(dim=0).clamp(min=1e-6)
    nearest = [torch.cdist(rows / unit, logged / unit).amin(dim=1) for rows in here.split(100)]
    return dict(
        zip(
            MEASURES,
            (
                mopo.aleatoric_uncertainty(std),
                mopo.disagreement(next_mean),
                morel.discrepancy(next_mean[dynamics.elites]),
                mobile.bellman_inconsistency(backups),
                torch.cat(nearest),
            ),
            strict=True,
        )
    )


def errors(agent, simulated: list[Tensor], true: list[Tensor], gamma: float) -> tuple[Tensor, Tensor]:
    """Of the state and of the value, (rows,) each. simulated, true: next_obs (rows, obs_dim), reward, terminal."""

    def backup(next_obs, reward, terminal):
        value = agent.target_critic(next_obs, agent.actor.act(next_obs)).amin(dim=0)
        return reward + gamma * (1 - terminal) * value

    return (simulated[0] - true[0]).norm(dim=1), (backup(*simulated) - backup(*true)).abs()


# --- A run ---
@torch.no_grad()
def examine(folder: Path, args: Args) -> dict:
    """A row of the table."""
    config = json.loads((folder / "config.json").read_text())
    if config["algo"] not in SCRIPTS or not (folder / "checkpoint.pt").is_file():
        raise InputError(f"{folder} is no run of {', '.join(SCRIPTS)} with a checkpoint: name one that is")
    script = importlib.import_module(f"algos.{config['algo']}")
    settings = script.Args(**config["args"])
    data = load_dataset(settings.dataset, "cpu", settings.env_id or None, settings.successors == "classic")
    env = make_simulator(data)
    agent = script.Agent(data.obs.shape[1], data.action.shape[1], settings)
    script.load_checkpoint(folder, agent, data)
    torch.manual_seed(args.seed)
    ensemble = {"num_members": settings.num_members, "num_elites": settings.num_elites}
    ensemble |= {"max_epochs": settings.dynamics_max_epochs, "path": settings.dynamics}
    dynamics = load_or_fit(data, settings.seed, **ensemble)
    starts = data.obs[torch.randint(len(data.obs), (args.num_starts,))]
    terminal_fn = termination_fn(settings.termination, data, settings.seed)
    rows = mobile.rollout(dynamics, agent.actor, terminal_fn, starts, settings)
    obs_dim, action_dim = data.obs.shape[1], data.action.shape[1]
    rows = rows[torch.as_tensor(is_state(env, rows[:, :obs_dim].numpy()))]
    obs, action, reward, next_obs, terminal = rows.split([obs_dim, action_dim, 1, obs_dim, 1], dim=1)
    found = true_steps(env, obs.numpy(), data.to_env_action(action.numpy()))
    true = [torch.as_tensor(column, dtype=torch.float32) for column in found]
    simulated = [next_obs, reward.squeeze(1), terminal.squeeze(1)]
    error = dict(zip(("state", "value"), errors(agent, simulated, true, settings.gamma)))
    found = measures(dynamics, agent, data, obs, action, args.num_samples)
    variant = re.search(rf"__{config['algo']}__(?:(.*)__)?{settings.seed}$", folder.resolve().name)  # as grids have it
    row = {"dataset": settings.dataset, "method": f"{config['algo']} {(variant and variant[1]) or ''}".strip()}
    row |= {"seed": settings.seed, "steps": f"{len(rows):,}"}
    row |= {f"{kind} error": value.median().item() for kind, value in error.items()}
    row |= {
        (kind, name): spearman(measure.numpy(), value.numpy())
        for kind, value in error.items()
        for name, measure in found.items()
    }
    return row


def text(rows: list[dict]) -> str:
    parts = []
    for kind in ("state", "value"):
        lines = [
            [*(row[name] for name in ("dataset", "method", "seed", "steps")), number(row[f"{kind} error"], 3)]
            + [number(row[kind, name], 2) for name in MEASURES]
            for row in rows
        ]
        header = f"dataset, method, seed, steps, median error, {', '.join(MEASURES)}"
        parts.append(f"Error of the {kind}:\n\n{table(header, lines)}")
    return "\n\n".join(parts)


def main(args: Args) -> None:
    folders = [config.parent for run in args.runs for config in sorted(run.rglob("config.json"))]
    if not folders:
        raise InputError(f"no run in {', '.join(map(str, args.runs))}: a run's folder holds config.json")
    rows = [examine(folder, args) for folder in tqdm(folders, unit="run")]
    print(text(rows))
    if args.out:
        args.out.write_text(f"# What penalties know\n\n{NOTE}\n{text(rows)}\n")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except InputError as error:
        sys.exit(f"error: {error}")
