"""What benchmarks/model_report.py measures: on which rows, what an ensemble says there, and what is true."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from algos import mopo, morel  # noqa: E402
from benchmarks.doctor import OTHER, PHYSICS, setter  # noqa: E402
from benchmarks.grid import read_settings  # noqa: E402
from common.dataset import OfflineDataset  # noqa: E402
from common.dynamics import Dynamics, load_or_fit  # noqa: E402
from common.evaluation import make_env  # noqa: E402
from common.machine import compiled  # noqa: E402

ROWS, FEWEST = 2_000, 50  # sequences of recorded steps at most; fewer tell nothing
COMMON = 0.1  # of the rows begin one: else the few longest episodes would stand for all


def ensemble_of(settings: dict, data: OfflineDataset) -> Dynamics:
    """That of the run with these settings; where it has none, what mopo.py fits to these data."""
    s = read_settings(mopo, ["--dataset", settings["dataset"]]) | settings
    sizes = {"num_members": s["num_members"], "num_elites": s["num_elites"], "hidden_size": s["dynamics_hidden_size"]}
    fit = {"max_epochs": s["dynamics_max_epochs"], "path": s["dynamics"]}
    fit["compile"] = lambda function: compiled(function, data.obs.device) if s["compile"] else function
    return load_or_fit(data, s["seed"], **sizes, **fit)


# --- What the fit has not seen ---
def rows_held_out(data: OfflineDataset, dynamics: Dynamics, seed: int) -> tuple[Tensor, bool]:
    """Those of Dynamics.fit, and whether the ensemble's error on them is the one that its fit wrote down."""
    known = data.successor_known.nonzero().squeeze(1)
    order = torch.randperm(len(known), generator=torch.Generator(known.device).manual_seed(seed), device=known.device)
    rows = known[order[: min(len(known) // 5, 1000)]]
    x = torch.cat([data.obs, data.action], dim=-1)[rows]
    y = torch.cat([data.next_obs - data.obs, data.reward[:, None]], dim=-1)[rows]
    y = (y - dynamics.target_mean) / torch.where(dynamics.target_std == 0, 1.0, dynamics.target_std)
    return rows, torch.allclose(dynamics.mse(x, y).mean(dim=1), dynamics.holdout_mse.mean(dim=1), rtol=0.01)


def episodes_apart(data: OfflineDataset, seed: int) -> tuple[Tensor, str]:
    """bool (rows,), which: a tenth of the episodes; where there are fewer than ten, the last tenth of each."""
    end = data.episode_end
    episode, num = end.cumsum(0) - end.long(), int(end.sum())
    if num >= 10:
        chosen = torch.randperm(num, generator=torch.Generator().manual_seed(seed))[: num // 10].to(end.device)
        return torch.isin(episode, chosen), f"{len(chosen):,} of {num:,} episodes"
    length = torch.bincount(episode)
    place = torch.arange(len(end), device=end.device) - (length.cumsum(0) - length)[episode]
    return place >= 0.9 * length[episode], f"the last tenth of each of the {num} episodes"


def windows(data: OfflineDataset, among: Tensor, most: int, generator: torch.Generator) -> tuple[Tensor, int]:
    """First rows of recorded sequences inside `among`, at most ROWS, and their length: the longest that is COMMON."""
    usable = among & data.successor_known
    leads = usable & usable.roll(-1) & (~data.episode_end if data.ordered else False)  # to the next row
    leads[-1] = False
    if data.cut_rows is not None:
        leads[data.cut_rows] = False
    breaks = torch.cat([leads.new_zeros(1).long(), (~leads).cumsum(0)])
    for length in range(most, 0, -1):
        first = usable[: len(usable) - length + 1].nonzero().squeeze(1)
        first = first[breaks[first + length - 1] == breaks[first]]
        if length == 1 or len(first) >= max(FEWEST, COMMON * int(usable.sum())):
            return first[torch.randperm(len(first), generator=generator)[:ROWS].to(first.device)], length


# --- What the ensemble says ---
def predicted(dynamics: Dynamics, obs: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
    """Every member's mean and deviation of (next_obs, reward): (num_members, rows, obs_dim + 1), float64 on the CPU."""
    parts = [dynamics.predict(*rows) for rows in zip(obs.split(1_000), action.split(1_000))]
    mean = torch.cat([torch.cat([next_mean, reward[..., None]], dim=-1) for next_mean, reward, _ in parts], dim=1)
    return mean.double().cpu(), torch.cat([std for _, _, std in parts], dim=1).double().cpu()


def ranked(x: np.ndarray) -> np.ndarray:
    """Equal ones share their mean rank, which is then 0 in the middle."""
    _, index, counts = np.unique(x, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2
    return ranks[index] - (len(x) + 1) / 2


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Correlation of ranks; x, y: (rows,). 0 where all are equal."""
    x, y = ranked(x), ranked(y)
    return float(x @ y / max(np.sqrt((x @ x) * (y @ y)), 1e-30))


def doubts(mean: Tensor, std: Tensor, elites: Tensor, true: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By name: what penalties are made of, and the error that it stands for, (rows,) each; MOPO's has the reward in it.

    mean, std: as `predicted`; true: (rows, num + 1), the first `num` columns of next_obs, and the reward.
    """
    of_elites = mean[elites, :, :-1]
    error = mean[elites].mean(dim=0).numpy()[:, [*range(true.shape[1] - 1), -1]] - true
    state, whole = np.linalg.norm(error[:, :-1], axis=1), np.linalg.norm(error, axis=1)
    return {
        "MOPO's deviation": (mopo.penalized_reward(mean[0, :, -1], std, 1.0)[1].numpy(), whole),
        "MOReL's distance": (morel.discrepancy(of_elites).numpy(), state),
        "deviation of means": (of_elites.std(dim=0).norm(dim=-1).numpy(), state),
    }


def along(dynamics: Dynamics, data: OfflineDataset, first: Tensor, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Errors of following recorded actions by one elite's mean, and of staying: (length, sequences), in obs_std."""
    obs = begin = data.obs[first]
    row, unit = torch.arange(len(first), device=first.device), torch.as_tensor(data.obs_std, device=first.device)
    member, errors = dynamics.elites[row % len(dynamics.elites)], []
    size = lambda x: ((x.double() / unit)[:, unit > 0] ** 2).mean(dim=1).sqrt().nan_to_num(torch.inf)  # noqa: E731
    for step in range(length):
        obs = dynamics.predict(obs, data.action[first + step])[0][member, row]
        true = data.next_obs[first + step]
        errors.append(torch.stack([size(obs - true), size(begin - true)]))
    return tuple(torch.stack(errors, dim=1).cpu().numpy())


def rollouts(mdp: morel.PessimisticMDP, obs: Tensor, actions: Tensor, generator) -> dict[str, np.ndarray]:
    """In the model, by actions (steps, rollouts, action_dim): (steps, rollouts) each, also after an end."""
    steps, dynamics = [], mdp.dynamics
    for action in actions:
        order = torch.randperm(len(obs), generator=generator).to(obs.device)
        noise = torch.randn(len(obs), obs.shape[1] + 1, generator=generator).to(obs.device)
        next_obs, reward, (means, _, std) = dynamics.step(obs, action, order, noise, all_members=True)
        halted = ~(morel.discrepancy(means[dynamics.elites]) <= mdp.threshold)
        end = mdp.terminal_fn(obs, action, next_obs)
        steps.append((reward, mopo.penalized_reward(reward, std, 1.0)[1], halted, end))
        obs = torch.where(end[:, None], obs, next_obs)  # numbers stay finite
    return {name: torch.stack(x).cpu().numpy() for name, x in zip(("reward", "doubt", "halted", "end"), zip(*steps))}


def alive(end: np.ndarray) -> np.ndarray:
    """bool (steps, rollouts): nothing ended before this step."""
    return np.cumsum(end, axis=0) - end == 0


def world_of(data: OfflineDataset, rows: Tensor) -> Callable[[Tensor, Tensor], np.ndarray] | str:
    """(obs, action) -> the environment's next_obs, as many columns as can be told, and reward; or why there is none."""
    if data.env_spec is None:
        return "no environment is known: give it by --env-id if there is one"
    name = data.env_spec.id
    try:
        env = make_env(data)
        if (known := setter(env, env.reset(seed=0)[0])) is None:
            return f"the state of {name} cannot be set from an observation: believe only what is on the data"
        put, num = known

        def step(obs: Tensor, action: Tensor) -> np.ndarray:
            out = []
            for o, a in zip(data.raw_obs(obs).double().cpu().numpy(), data.to_env_action(action.cpu().numpy())):
                put(o)
                there, reward, *_ = env.step(a.astype(env.action_space.dtype))
                out.append([*data.to_obs(np.asarray(there))[:num], float(reward)])
            return np.array(out)

        true = np.delete(recorded(data, rows), np.s_[num:-1], axis=1)
        usual = np.sqrt(((true - np.pad(data.obs[rows].cpu().numpy()[:, :num], ((0, 0), (0, 1)))) ** 2).mean(axis=0))
        far = (step(data.obs[rows], data.action[rows]) - true) / np.maximum(usual, 1e-12)
        share = (np.sqrt((far**2).mean(axis=1)) > PHYSICS).mean()
    except Exception as error:  # of anybody's environment
        return f"{name} cannot be stepped here ({error!r}): see to that"
    return step if share < OTHER else f"{name} makes {share:.0%} of logged steps otherwise: ask doctor.py why"


def recorded(data: OfflineDataset, rows: Tensor) -> np.ndarray:
    """(next_obs, reward), (rows, obs_dim + 1), float64."""
    return torch.cat([data.next_obs, data.reward[:, None]], dim=1)[rows].double().cpu().numpy()
