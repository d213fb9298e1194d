"""The bench's own environments, and who acts in the sets that are recorded in them.

PendulumSpin-v0     Pendulum-v1, where turning counterclockwise is rewarded in place of standing upright
PointmassStitch-v0  a point on a crossing of two roads; the way to the goal begins on one and ends on the other

Importing this registers them: gym.make("benchmarks.envs:PendulumSpin-v0"), --env-id benchmarks.envs:PendulumSpin-v0.
The sets: python benchmarks/collect.py --sets pendulum/narrow pendulum/spin pointmass/stitch
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import gymnasium as gym
import numpy as np
from gymnasium.envs.classic_control import PendulumEnv

Act = Callable[[np.ndarray], np.ndarray]  # observation -> action, in the environment's units
Begun = tuple[dict, int, Act]  # of an episode to be recorded: options of its reset, its most steps, who acts


# --- Pendulum-v1's physics, another task ---
#     r = w' / 8,  w' the angular velocity after the step, within [-8, 8]:  a return is the angle turned, over 0.4
class PendulumSpin(PendulumEnv):
    """Observations, actions, start states and 200 steps are Pendulum-v1's. The torque alone cannot lift the rod."""

    def step(self, action):
        obs, _, terminated, truncated, info = super().step(action)
        return obs, float(obs[2]) / self.max_speed, terminated, truncated, info


# --- A crossing ---
#     p' = p + 0.1 a,  x before y, a wall stops the one and not the other;  r = exp(-|p' - goal|^2 / 0.2^2)
class PointmassStitch(gym.Env):
    """Position (x, y) in [-1, 1]^2, velocity a in [-1, 1]^2. Two roads of width 0.4 cross at (0, 0); the rest is wall.

    An episode begins in the west, near (-0.9, 0), or at reset's options["position"], and has 50 steps. The goal is the
    north end, (0, 0.9), at least 17 steps away, and the reward is nearly 0 until shortly before it.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 15}
    observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    STEP, HALF_WIDTH, GOAL = 0.1, 0.2, np.array([0.0, 0.9])

    def __init__(self, render_mode: str | None = None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        start = np.array([-0.9, 0.0]) + self.np_random.uniform(-0.1, 0.1, 2)
        self.position = np.array((options or {}).get("position", start), dtype=np.float64)
        return self.position.astype(np.float32), {}

    def step(self, action):
        for axis in (0, 1):
            limit = 1 if abs(self.position[1 - axis]) <= self.HALF_WIDTH else self.HALF_WIDTH
            moved = self.position[axis] + self.STEP * np.clip(action[axis], -1, 1)
            self.position[axis] = np.clip(moved, -limit, limit)
        reward = math.exp(-(np.sum((self.position - self.GOAL) ** 2) / 0.2**2))
        return self.position.astype(np.float32), reward, False, False, {}

    def render(self):
        """(200, 200, 3): roads white, the goal green, the point red."""
        x, y = np.meshgrid(np.linspace(-1, 1, 200), np.linspace(1, -1, 200))
        picture = np.full((200, 200, 3), 90, np.uint8)
        picture[(abs(x) <= self.HALF_WIDTH) | (abs(y) <= self.HALF_WIDTH)] = 255
        for (at_x, at_y), radius, colour in ((self.GOAL, 0.2, (150, 220, 150)), (self.position, 0.06, (200, 40, 40))):
            picture[(np.hypot(x - at_x, y - at_y) <= radius) & (picture[..., 0] != 90)] = colour
        return picture


gym.register("PendulumSpin-v0", f"{__name__}:PendulumSpin", max_episode_steps=200)
gym.register("PointmassStitch-v0", f"{__name__}:PointmassStitch", max_episode_steps=50)


# --- Who acts in Pendulum's sets and is the measure of them ---
def swing_up(obs: np.ndarray, max_torque: float) -> float:
    """Torque that brings the rod's energy to that of standing upright and then holds it there."""
    angle, speed = math.atan2(obs[1], obs[0]), obs[2]
    if obs[0] > 0.85 and abs(speed) < 4:
        torque = -8 * angle - 2 * speed
    else:
        torque = max_torque * math.copysign(1, speed) * (1 if energy(obs) < 0 else -1)
    return float(np.clip(torque, -max_torque, max_torque))


def spin(obs: np.ndarray) -> np.ndarray:
    """a controller that swings until it gets over the top counterclockwise, and turns on with all it has"""
    return np.array([2.0 if obs[2] >= 0 or energy(obs) > -10 else -2.0])


def energy(obs: np.ndarray) -> float:
    """Per moment of inertia; 0: enough to stand upright."""
    return 0.5 * obs[2] ** 2 + 15 * (obs[0] - 1)


# --- Who acts on the roads: no piece comes from the west to the north ---
WEST, EAST, NORTH, SOUTH = np.array([[-0.9, 0.0], [0.9, 0.0], [0.0, 0.9], [0.0, -0.9]])


def follow(position: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    """As fast as it can from the arm of `start` to the crossing and on to `end`."""
    target = np.zeros(2) if position @ start > 0.1 else end
    return np.clip((target - position) / PointmassStitch.STEP, -1, 1)


def west_to_north(position: np.ndarray) -> np.ndarray:
    """the shortest way along the roads"""
    return follow(position, WEST, NORTH)


# --- The sets ---
@dataclass(frozen=True)
class Log:
    env_id: str
    about: str  # who acts
    num_steps: int
    begin: Callable[[np.random.Generator], Begun]
    expert: Act | None = None  # whose mean return scores 100; None: the known reference scores hold


def begin_narrow(rng: np.random.Generator) -> Begun:
    return {}, 200, lambda obs: np.clip([swing_up(obs, 0.5) + rng.normal(0, 0.1)], -2, 2)


def begin_spin(rng: np.random.Generator) -> Begun:
    random_share = rng.uniform()
    return {}, 200, lambda obs: np.array([rng.uniform(-2, 2) if rng.uniform() < random_share else swing_up(obs, 2)])


def begin_stitch(rng: np.random.Generator) -> Begun:
    start, end = (WEST, SOUTH) if rng.uniform() < 2 / 3 else (EAST, NORTH)
    way = rng.uniform(0, 1.8)  # along the road, to where the piece begins
    begin = start * (0.9 - way) / 0.9 if way < 0.9 else end * (way - 0.9) / 0.9
    position = begin + rng.uniform(-0.1, 0.1, 2)
    return {"position": position}, 10, lambda obs: np.clip(follow(obs, start, end) + rng.normal(0, 0.3, 2), -1, 1)


LOGS = {
    "pendulum/narrow": Log(
        "Pendulum-v1", "one swing-up with torques up to 0.5, noise of deviation 0.1", 20_000, begin_narrow
    ),
    "pendulum/spin": Log(
        "PendulumSpin-v0", "a swing-up, in each episode with its own share of random torques, from 0 to 1", 20_000,
        begin_spin, spin,
    ),
    "pointmass/stitch": Log(
        "PointmassStitch-v0", "pieces of 10 steps: two thirds from west to south, a third from east to north, noise of "
        "deviation 0.3", 40_000, begin_stitch, west_to_north,
    ),
}  # fmt: skip
