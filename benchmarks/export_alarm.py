"""When is a robot off its log? Where the members of the ensemble, fitted to that log, foresee different steps.

    u(s,a) = sqrt mean_columns var_members of the standardised change        Alarm.disagreement()
    alarm where u > the (1 - false alarms) quantile of u over logged rows    fitted()

The columns are those of (next_obs - obs, reward) that change at all, each in its own deviation, so that units do not
matter. The threshold is a quantile, because a policy asks at every step: one false alarm in a thousand steps is what
can be lived with and what 50,000 rows tell. The largest u of the log would be that of one odd row.
"""

import math

import torch
import torch.nn as nn
from torch import Tensor

from benchmarks.model_measures import ensemble_of, rows_held_out
from common.dataset import OfflineDataset
from common.dynamics import Dynamics

ROWS = 50_000  # of the data, at most, for the threshold


class Alarm(nn.Module):
    def __init__(self, dynamics: Dynamics):
        super().__init__()
        self.dynamics, self.threshold = dynamics, math.inf
        self.moves = (dynamics.target_std > 0).nonzero().squeeze(1).tolist()

    def disagreement(self, obs: Tensor, action: Tensor) -> Tensor:
        """As the data have them: (batch, obs_dim), (batch, action_dim) in [-1, 1] -> (batch,)"""
        x = torch.cat([obs, action], dim=-1).expand(self.dynamics.num_members, -1, -1)
        mean = self.dynamics.standardised(x)[0][..., self.moves]
        return mean.var(dim=0, correction=0).mean(dim=-1).sqrt()


def fitted(settings: dict, data: OfflineDataset, false_alarms: float) -> tuple[Alarm, dict]:
    """With its threshold, and the shares of alarms: on rows that the fit has not seen, and off the log."""
    alarm, generator = Alarm(ensemble_of(settings, data)), torch.Generator().manual_seed(0)

    @torch.no_grad()
    def disagreement(obs: Tensor, action: Tensor) -> Tensor:
        return torch.cat([alarm.disagreement(*rows) for rows in zip(obs.split(1_000), action.split(1_000))])

    rows = torch.randperm(len(data.obs), generator=generator)[:ROWS]
    alarm.threshold = disagreement(data.obs[rows], data.action[rows]).double().quantile(1 - false_alarms).item()
    held_out, sure = rows_held_out(data, alarm.dynamics, settings["seed"])
    rows = held_out if sure else rows[:1000]
    obs, action, std = data.obs[rows], data.action[rows], torch.as_tensor(data.obs_std, dtype=torch.float32)
    sign = 2 * torch.randint(2, obs.shape, generator=generator) - 1
    columns = [column[torch.randperm(len(obs), generator=generator)] for column in obs.T]
    places = {"held-out rows" if sure else "rows of the fit": (obs, action)}
    places["their states, random actions"] = obs, 2 * torch.rand(action.shape, generator=generator) - 1
    places["their columns, mixed"] = torch.stack(columns, dim=1), action
    places |= {f"each column {k} deviations off": (obs + k * sign * std, action) for k in (1, 3, 10)}
    shares = {place: disagreement(*at) > alarm.threshold for place, at in places.items()}
    return alarm, {place: share.float().mean().item() for place, share in shares.items()}
