"""A toy laboratory for dynamics-aware constraints: does a policy that was pushed off its data find its way back?

A point in the plane, s' = s + STEP a, so that the action from s to s' is known: (s' - s) / STEP. The log goes round a
ring, a few steps an episode, and never corrects itself. A policy is trained on it, goes round, is kicked off and acts
on: how far is the nearest logged state after each step? Off the road nothing is earned, which no log tells.
Run: python benchmarks/studies/toy_recovery.py    trains what is not in runs/toy-recovery yet, draws, prints the tables
"""

import importlib
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from algos import osr  # noqa: E402
from benchmarks.files import HomePaths, start  # noqa: E402
from benchmarks.grid import as_json, read_settings  # noqa: E402
from benchmarks.report import RESULTS, finish, mean_sd, number, plt, table  # noqa: E402
from common.dataset import OfflineDataset, load_dataset  # noqa: E402
from common.evaluation import load_policy  # noqa: E402

ENV_ID = "benchmarks.studies.toy_recovery:PointMass-v0"
STEP = 0.1  # distance that an action of 1 moves the point
ROAD = 0.4  # half the width of the road, the ring of radius 1 on which something is earned; the log never leaves it
KICK = 0.5  # length of the displacement, inwards or outwards
BEFORE, AFTER = 10, 40  # steps of a measured episode before and after the kick
NUM_EPISODES = 64  # measured, half of them kicked inwards
NEAR = 0.05  # of a logged state: back on the data
FOLDER = Path("runs/toy-recovery")  # in the repository


@dataclass
class Args(HomePaths):
    num_seeds: int = 3
    out_dir: Path = RESULTS  # where the figure is written


# --- The environment ---
def move(position: np.ndarray, action: np.ndarray) -> np.ndarray:
    """(..., 2) twice -> (..., 2)"""
    return position + STEP * action.clip(-1, 1)


def inverse(position: np.ndarray, next_position: np.ndarray) -> np.ndarray:
    """The action that leads from one to the other, (..., 2); where it leaves the box, one step is not enough."""
    return (next_position - position) / STEP


def reward(position: np.ndarray, next_position: np.ndarray) -> np.ndarray:
    """(..., 2) twice -> (...): the way made round the ring, counterclockwise, in steps; 0 off the road."""
    before, after = (np.arctan2(p[..., 1], p[..., 0]) for p in (position, next_position))
    way = (after - before + np.pi) % (2 * np.pi) - np.pi
    return way / STEP * (np.abs(np.linalg.norm(next_position, axis=-1) - 1) < ROAD)


class PointMass(gym.Env):
    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position = on_ring(self.np_random, 1)[0]
        return self.position.astype(np.float32), {}

    def step(self, action):
        last, self.position = self.position, move(self.position, np.asarray(action, dtype=np.float64))
        return self.position.astype(np.float32), float(reward(last, self.position)), False, False, {}


if __name__ != "__main__":  # run as a program it is imported, too: by the name in ENV_ID
    gym.register("PointMass-v0", f"{__name__}:PointMass", max_episode_steps=50)


def on_ring(rng: np.random.Generator, num: int) -> np.ndarray:
    """(num, 2)"""
    angle, radius = rng.uniform(-np.pi, np.pi, num), rng.normal(1, 0.03, num)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)


def record(num: int = 400, length: int = 12) -> dict[str, np.ndarray]:
    """The log under D4RL's keys, one row a step: along the ring at 0.6, plus noise, whatever the radius is."""
    rng = np.random.default_rng(0)
    position, rows = on_ring(rng, num), []
    for i in range(length):
        angle = np.arctan2(position[:, 1], position[:, 0])
        action = (0.6 * np.stack([-np.sin(angle), np.cos(angle)], axis=-1) + rng.normal(0, 0.3, (num, 2))).clip(-1, 1)
        after, end = move(position, action), np.full(num, i == length - 1)
        rows.append((position, action, reward(position, after), np.zeros_like(end), end, after))
        position = after
    keys = "observations", "actions", "rewards", "terminals", "timeouts", "next_observations"
    return {key: np.stack(column, axis=1).reshape(-1, *column[0].shape[1:]) for key, column in zip(keys, zip(*rows))}


# --- The contestants: SAC's critic in all of them, so that they differ by their constraint alone ---
COMMON = (
    "--num-updates 1500 --batch-size 64 --gamma 0.9 --tau 0.02 --actor-lr 1e-3 --critic-lr 1e-3 --alpha-lr 3e-3 "
    "--normalise-q --eval-interval 1500 --eval-episodes 2 --score-evals 1 --num-threads 1 --no-compile"
)
BEHAVIOUR = "--behaviour-updates 1000 --behaviour-lr 1e-3"
INVERSE = dict(inverse_updates=2000, inverse_lr=1e-3)
OSR = "osr --conservative-coef 0 --inverse-updates {inverse_updates} --inverse-lr {inverse_lr}".format(**INVERSE)
SDC = (
    "sdc --conservative-coef 0 --bandwidth 0.3 --mmd-samples 5 --transition-updates 1000 "
    "--num-members 3 --num-elites 2 --dynamics-max-epochs 20"
)
RUNS = {  # name of a contestant -> script and settings; the first three are drawn
    "SAC+BC": f"sac_bc {BEHAVIOUR}",
    "OSR": f"{OSR} --noise-scale 0.3 --recovery-coef 0.1",
    "SDC": f"{SDC} --noise-scale 0.3",
    "OSR, default noise": f"{OSR} --recovery-coef 0.1",
    "SDC, default noise": SDC,
    "OSR, default lambda": f"{OSR} --noise-scale 0.3",
    "OSR, I as fitted": f"{OSR} --noise-scale 0.3 --recovery-coef 1e-3 --min-std 0",
    "SAC+BC, at s^": f"{OSR} --target behaviour --noise-scale 0.3 --recovery-coef 0.1 {BEHAVIOUR}",
}
COLORS = {"SAC+BC": "C0", "OSR": "C1", "SDC": "C2"}


def train(name: str, seed: int) -> Path:
    """The run's folder; what is there already is kept. SystemExit where it has other settings than these."""
    run = "-".join(name.lower().translate(dict.fromkeys(b"+,^")).split()) + f"__{seed}"
    script, _, settings = RUNS[name].partition(" ")
    flags = f"--dataset {FOLDER}/ring.npz --env-id {ENV_ID} --seed {seed} {settings} {COMMON}"
    flags += f" --run-dir {FOLDER} --run-name {run}"
    command, config = f"python algos/{script}.py {flags}", ROOT / FOLDER / run / "config.json"
    if config.exists():  # it was killed, or is finished
        command = f"python algos/{script}.py --resume {FOLDER}/{run} --trust"  # ENV_ID is of this file
        module = importlib.import_module(f"algos.{script}")
        found = as_json(module.Args()) | json.loads(config.read_text())["args"]
        if found != read_settings(module, flags.split()):
            sys.exit(f"error: {config.parent} was trained with other settings than today's: delete that folder")
    if not (config.parent / "policy.pt").exists():
        print(command, flush=True)
        subprocess.run([sys.executable, *command.split()[1:]], cwd=ROOT, check=True)
    return config.parent


# --- The measurement ---
def distance(position: np.ndarray, logged: np.ndarray) -> np.ndarray:
    """To the nearest logged state: (..., 2), (num_rows, 2) -> (...)"""
    chunks, rows = torch.as_tensor(position).reshape(-1, 2).split(500), torch.as_tensor(logged)
    return torch.cat([torch.cdist(chunk, rows).amin(dim=1) for chunk in chunks]).reshape(position.shape[:-1]).numpy()


def kicks(position: np.ndarray) -> np.ndarray:
    """(num_episodes, 2) -> the same shape: along the radius, the first half of the episodes inwards, the others out."""
    length = np.where(np.arange(len(position)) < len(position) // 2, -KICK, KICK)
    return position * (length / np.linalg.norm(position, axis=-1))[:, None]


def rollout(act, kick: bool) -> tuple[np.ndarray, np.ndarray]:
    """act: (NUM_EPISODES, 2) -> actions. Returns positions (AFTER + 1, NUM_EPISODES, 2) from the moment of the kick on
    and what is earned from there (NUM_EPISODES,). The start states are always the same."""
    position = on_ring(np.random.default_rng(1), NUM_EPISODES)
    for _ in range(BEFORE):
        position = move(position, act(position))
    path, earned = [position + kicks(position) * kick], np.zeros(NUM_EPISODES)
    for _ in range(AFTER):
        path.append(move(path[-1], act(path[-1])))
        earned += reward(path[-2], path[-1])
    return np.stack(path), earned


def policy(folder: Path):
    act = load_policy(folder)
    return lambda position: act(position).astype(np.float64)


def inverse_check(data: OfflineDataset, seed: int, noise_scale: float) -> tuple[float, float, float]:
    """OSR's fitted I(a|s^,s') beside the exact recovery action: share of rows where one step will do, error, slope."""
    model = osr.inverse_model(data, osr.Args(seed=seed, **INVERSE), lambda loss: loss)  # the runs have trained it
    noise = torch.randn(data.obs.shape, generator=torch.Generator().manual_seed(0))
    perturbed = osr.perturb(data.obs, data.obs.std(dim=0), noise, noise_scale)
    mean, *_ = model(perturbed, data.next_obs, torch.zeros(len(noise), model.latent_dim))
    exact = inverse(perturbed.numpy(), data.next_obs.numpy())
    return compare(torch.tanh(mean).numpy(), exact, data.action.numpy())


def compare(fitted: np.ndarray, exact: np.ndarray, logged: np.ndarray) -> tuple[float, float, float]:
    """(num_rows, 2) each. The share of rows whose exact action lies in the box; over all components that do, the root
    mean squared error of the fitted ones, and the slope of fitted - logged over exact - logged: 1 where perturbations
    are answered, 0 where ignored."""
    inside = np.abs(exact) < 1
    change, answer = (exact - logged)[inside], (fitted - logged)[inside]
    return (
        inside.all(axis=1).mean(),
        np.sqrt(np.square(answer - change).mean()),
        (answer * change).sum() / np.square(change).sum(),
    )


# --- Tables and figure ---
def score_table(paths: dict[str, np.ndarray], earned: dict[str, np.ndarray], logged: np.ndarray) -> str:
    """paths: (num_seeds, 2, AFTER + 1, NUM_EPISODES, 2), kicked last; earned: (num_seeds, 2, NUM_EPISODES)."""
    rows, half = [], NUM_EPISODES // 2
    for name, path in paths.items():
        far, (calm, kicked) = distance(path[:, 1], logged), earned[name].swapaxes(0, 1)  # (seeds, steps, episodes)
        for side, where in (("in", slice(half)), ("out", slice(half, None))):
            steps = [mean_sd(far[:, step, where].mean(axis=-1), 2) for step in (0, 5, 10, AFTER)]
            back = mean_sd(100 * (far[:, -1, where] < NEAR).mean(axis=-1), 0)
            returns = [mean_sd(r[:, where].mean(axis=-1)) for r in (calm, calm - kicked)]
            rows.append([name, side, *steps, back, *returns])
    return table(f"method, kicked, distance after 0 steps, 5, 10, {AFTER}, back %, return without, lost", rows)


def inverse_table(data: OfflineDataset, num_seeds: int) -> str:
    rows = []
    for noise_scale in (0, 1e-3, 1e-2, 0.1, 0.3):
        share, error, slope = np.array([inverse_check(data, seed, noise_scale) for seed in range(num_seeds)]).T
        slope = mean_sd(slope, 3) if noise_scale else "-"
        rows.append([noise_scale, number(100 * share.mean(), 0), mean_sd(error, 3), slope])
    return table("noise_scale, in one step %, error of I, slope", rows)


def draw(file: Path, paths: dict[str, np.ndarray], logged: np.ndarray) -> None:
    """The first seed's ways back, and the distances of all seeds."""
    figure, axes = plt.subplots(1, 4, figsize=(11, 3.4), layout="constrained", width_ratios=[1, 1, 1, 1.1])
    for axis, (name, color) in zip(axes, COLORS.items()):
        path = paths[name][0, 1][:, ::6]
        axis.scatter(*logged[::5].T, s=4, color="0.82", linewidths=0, label="logged states")
        axis.plot(*path.T.swapaxes(1, 2), color=color, linewidth=1.1)
        axis.scatter(*path[0].T, s=16, color="white", edgecolors=color, zorder=3)
        axis.set(title=name, aspect="equal", xlim=(-1.9, 1.9), ylim=(-1.9, 1.9))
        axis.set_axis_off()
    for name, path in paths.items():
        method, _, setting = name.partition(", ")
        far = distance(path[:, 1], logged).mean(axis=-1)  # (num_seeds, AFTER + 1)
        if not setting:
            axes[3].fill_between(range(AFTER + 1), far.min(0), far.max(0), color=COLORS[method], alpha=0.2, linewidth=0)
        if setting in ("", "default noise"):
            axes[3].plot(far.mean(axis=0), "--" if setting else "-", color=COLORS[method], label=name)
    axes[3].set(title="distance to the data", xlabel="steps after the kick", xlim=(0, AFTER), ylim=(0, None))
    finish(figure, file)


def main(args: Args) -> None:
    file = ROOT / FOLDER / "ring.npz"
    for folder in (file.parent, args.out_dir):
        folder.mkdir(parents=True, exist_ok=True)
    np.savez(file, **record())
    data = load_dataset(str(file), "cpu", ENV_ID)
    logged, paths, earned = data.obs.double().numpy(), {}, {}
    for name in RUNS:
        policies = [policy(train(name, seed)) for seed in range(args.num_seeds)]
        results = [[rollout(act, kick) for kick in (False, True)] for act in policies]
        paths[name], earned[name] = (np.array([[pair[i] for pair in seed] for seed in results]) for i in range(2))
    draw(args.out_dir / "toy-recovery.png", paths, logged)
    print("", score_table(paths, earned, logged), "", inverse_table(data, args.num_seeds), sep="\n")


if __name__ == "__main__":
    start(main, Args)
