"""A trained policy that needs NumPy alone: this file beside policy.npz and, where there is one, alarm.npz.

policy = Policy(); action = policy(obs); if policy.alarm(obs, action): the log does not tell what this action does here
"""

from pathlib import Path

import numpy as np

ACTIVATIONS = {
    "ReLU": lambda x: np.maximum(x, 0), "LeakyReLU": lambda x: np.where(x > 0, x, np.float32(0.01) * x),
    "Tanh": np.tanh, "SiLU": lambda x: x * (1 + np.tanh(x / 2)) / 2,
}  # fmt: skip


def network(p: dict, name: str, x: np.ndarray) -> np.ndarray:
    """x (..., rows, in) -> (..., rows, out); more dimensions in front of the weights are networks side by side."""
    for i in range(p[f"{name}_layers"]):
        x = (ACTIVATIONS[str(p[f"{name}_activation"])](x) if i else x) @ p[f"{name}_weight{i}"] + p[f"{name}_bias{i}"]
    return x


class Policy:
    def __init__(self, folder: Path | str = Path(__file__).parent):
        files = [file for name in ("policy", "alarm") if (file := Path(folder, f"{name}.npz")).exists()]
        self.p = {name: x for file in files for name, x in np.load(file).items()}
        self.center, self.half = ((self.p["action_high"] + sign * self.p["action_low"]) / 2 for sign in (1, -1))

    def networks_see(self, obs: np.ndarray) -> np.ndarray:
        return ((obs - self.p["obs_shift"]) / self.p["obs_scale"]).astype(np.float32)

    def __call__(self, obs: np.ndarray) -> np.ndarray:
        """What the environment shows (..., obs_dim) -> an action in its box (..., action_dim)."""
        p, x = self.p, self.networks_see(obs).reshape(-1, len(self.p["obs_shift"]))
        out = network(p, "actor", (x - p["obs_mean"]) / p["obs_std"])
        if "noise" in p:  # one candidate each
            mean, log_std = np.split(out, 2, axis=-1)
            out = mean + np.exp(log_std.clip(-5, 2)) * p["noise"]
        action = np.tanh(out) if p["squashed"] else out.clip(-1, 1)
        if "critic_layers" in p:  # of the candidates (num, rows, action_dim) the one that all critics value most
            pairs = np.concatenate([np.broadcast_to(x, (len(action), *x.shape)), action], axis=-1)
            best = network(p, "critic", pairs[:, None]).min(axis=1)[..., 0].argmax(axis=0)
            action = action[best, np.arange(len(x))]
        return (self.center + self.half * action).reshape(*np.shape(obs)[:-1], -1)

    def disagreement(self, obs: np.ndarray, action: np.ndarray) -> np.ndarray:
        """How far apart the ensemble's members foresee the step (...,), in deviations of what logged steps change."""
        action = (action - self.center) / np.where(self.half > 0, self.half, 1)
        x = np.concatenate([self.networks_see(obs), action.astype(np.float32)], axis=-1)
        x = (x.reshape(-1, x.shape[-1]) - self.p["input_mean"]) / self.p["input_std"]
        change = network(self.p, "ensemble", x)  # (num_members, rows, columns)
        return np.sqrt(change.var(axis=0).mean(axis=-1)).reshape(np.shape(obs)[:-1])

    def alarm(self, obs: np.ndarray, action: np.ndarray) -> np.ndarray:
        """bool (...,); also where the disagreement is no number."""
        return ~(self.disagreement(obs, action) <= self.p["threshold"])
