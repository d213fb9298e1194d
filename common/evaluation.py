"""The policy of a run, loaded, and its return in the real environment, whatever that environment does."""

import copy
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


def make_env(data: OfflineDataset) -> gym.Env | None:
    """To evaluate in, tried by a reset and a step; None where the data name none. Raises InputError where it fails."""
    if data.env_spec is None:
        print("evaluation  none, the data name no environment: give --env-id to evaluate in one")
        return None
    with explained(f"cannot make {data.env_spec.id}", "install its package, or give --env-id"):
        env = gym.make(data.env_spec)
    call(env, "reset", seed=0)
    call(env, "step", data.to_env_action(np.zeros(len(data.action_low), np.float32)))
    return env


@torch.no_grad()
def evaluate(policy, env: gym.Env, data: OfflineDataset, seed: list[int], num_episodes: int) -> np.ndarray:
    """Undiscounted returns (num_episodes,) of the deterministic policy.

    The start states follow from `seed` alone and torch's random numbers are not touched: evaluating more often changes
    nothing else.
    """
    returns = np.zeros(num_episodes)
    if data.obs.device.type != "cpu":
        policy = copy.deepcopy(policy).cpu()  # which is faster there for one state at a time
    for i, start in enumerate(np.random.SeedSequence(seed).generate_state(num_episodes).tolist()):
        obs, ends = call(env, "reset", seed=start)[0], False
        while not ends:
            action = policy.act(torch.from_numpy(data.to_obs(np.asarray(obs)))[None])[0].numpy()
            obs, reward, terminated, truncated, _ = call(env, "step", data.to_env_action(action))
            returns[i] += np.asarray(reward).item()  # also of shape (1,)
            ends = terminated or truncated
    return returns
