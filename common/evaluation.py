"""The policy of a run, loaded, and its return in the real environment, whatever that environment does."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch

from common import InputError, explained
from common.dataset import OfflineDataset

SCRIPTS = [path.stem for path in (Path(__file__).resolve().parents[1] / "algos").glob("*.py")]


def load_policy(folder: Path | str) -> Callable[[np.ndarray], np.ndarray]:
    """The policy of the finished run in `folder`, of a class in the script in algos/ that trained it.

    Returns a function from observations (..., obs_dim) as the environment gives them to actions (..., action_dim) in
    its box. Raises InputError where there is no finished run, or one that trained no policy.
    """
    with explained(f"{folder} holds no policy of a script in algos/", "finish that run"):
        saved = torch.load(Path(folder, "policy.pt"), map_location="cpu", weights_only=True)
        algo = SCRIPTS[SCRIPTS.index(json.loads(saved["config"])["algo"])]  # and no other file
        Actor = getattr(importlib.import_module(f"algos.{algo}"), saved["class"])
        if not hasattr(Actor, "act"):
            raise InputError(f"the run in {folder} trained no policy: name another")
        actor = Actor(**saved["sizes"])
        actor.load_state_dict(saved["actor"])
        low, high = saved["action_low"], saved["action_high"]
        shift, scale = saved["obs_shift"].numpy(), saved["obs_scale"].numpy()

    @torch.no_grad()
    def policy(obs: np.ndarray) -> np.ndarray:
        obs = torch.as_tensor((obs - shift) / scale, dtype=torch.float32)
        action = actor.act(obs.reshape(-1, obs.shape[-1])).clamp(-1, 1)
        return ((high + low) / 2 + (high - low) / 2 * action).reshape(*obs.shape[:-1], -1).numpy()

    return policy


def call(env: gym.Env, method: str, *given, **named) -> tuple:
    """env.reset or env.step. Raises InputError where it raises or is not of gymnasium's interface."""
    right = "gymnasium's interface is reset -> (obs, info), step -> (obs, reward, terminated, truncated, info)"
    with explained(f"{env.spec.id} fails in {method}", right):
        result = getattr(env, method)(*given, **named)
        if type(result) is not tuple or len(result) != (2 if method == "reset" else 5):
            raise ValueError("it returns something else")
        return result


def make_envs(data: OfflineDataset, num_envs: int) -> list[gym.Env]:
    """To evaluate in, each tried by a reset and the first by a step; none where the data name none.

    Fewer than `num_envs` where the simulator allows no more.
    """
    if data.env_spec is None:
        print("evaluation  none, the data name no environment: give --env-id to evaluate in one")
        return []
    envs, hint = [], "install its package, or give --env-id"
    try:
        while len(envs) < num_envs:
            with explained(f"cannot make {data.env_spec.id}", hint):
                env = gym.make(data.env_spec)
            call(env, "reset", seed=0)
            envs.append(env)
    except InputError as error:
        if not envs:
            raise
        print(f"evaluation  only {len(envs)} of {data.env_spec.id} at a time ({error.__cause__})")
    call(envs[0], "step", data.to_env_action(np.zeros(len(data.action_low), np.float32)))
    return envs


@torch.no_grad()
def evaluate(policy, envs: list[gym.Env], data: OfflineDataset, seed: list[int], num_episodes: int) -> np.ndarray:
    """Undiscounted returns (num_episodes,) of the deterministic policy, as many episodes at a time as there are envs.

    The start states follow from `seed` alone and torch's random numbers are not touched: evaluating more often changes
    nothing else.
    """
    seeds, returns = np.random.SeedSequence(seed).generate_state(num_episodes).tolist(), np.zeros(num_episodes)
    for first in range(0, num_episodes, len(envs)):
        obs = [call(env, "reset", seed=seed)[0] for env, seed in zip(envs, seeds[first:])]
        running = set(range(len(obs)))
        while running:
            x = torch.as_tensor(data.to_obs(np.stack(obs)), device=data.obs.device)
            action = data.to_env_action(policy.act(x).cpu().numpy())
            for i in sorted(running):
                obs[i], reward, terminated, truncated, _ = call(envs[i], "step", action[i])
                returns[first + i] += np.asarray(reward).item()  # also of shape (1,)
                if terminated or truncated:
                    running.remove(i)
    return returns
