"""What float32 and networks can take: finite numbers, offsets and units of observations."""

from pathlib import Path

import numpy as np

from common import InputError

Rows = dict[str, np.ndarray]
COARSE = 2.0**-24 / 1e-3  # of the mean: a smaller deviation is less than a thousand of float32's rounding errors


def check_finite(rows: Rows, path: Path) -> None:
    """Raises InputError where numbers are not finite as float32."""
    most = np.finfo(np.float32).max
    for key, array in rows.items():
        if not (array.min(initial=0) >= -most and array.max(initial=0) <= most):
            row = np.argwhere(~(np.abs(array) <= most))[0, 0]
            raise InputError(f"{path} has NaN or infinite {key} in row {row}: remove that episode.")


def moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation of each column in float64; those of a constant are exactly itself and 0."""
    first, total, squares = x[0].astype(np.float64), 0.0, 0.0
    for start in range(0, len(x), 8192):
        away = x[start : start + 8192] - first
        total, squares = total + np.ones(len(away)) @ away, squares + np.ones(len(away)) @ (away * away)
    return first + total / len(x), np.sqrt(np.maximum(squares / len(x) - (total / len(x)) ** 2, 0))


def rescale(rows: Rows, standardise: bool) -> tuple[Rows, list[str]]:
    """Makes observations float32, (o - shift) / scale. Returns both and the new moments, and what to say.

    Not asked to standardise, it centres constants and columns whose variation float32 would round away.
    """
    obs = rows["observations"]
    mean, raw_std = moments(obs)
    std = np.where(raw_std > 4 * np.finfo(obs.dtype).eps * np.abs(mean), raw_std, 0.0)  # less is rounding
    unit = 2.0 ** (np.floor(np.log2(np.where(std > 0, std, 1.0))) - 20)  # else data_hash knew the order of summation
    center, width = np.where(std > 0, np.round(mean / unit) * unit, obs[0]), np.round(std / unit) * unit
    coarse = np.abs(center) * COARSE > std
    shift, scale = np.where(coarse | standardise, center, 0.0), np.where((std > 0) & standardise, width, 1.0)
    changed = shift.any() or (scale != 1).any()
    for key in {"observations", "next_observations"} & rows.keys():
        rows[key] = ((rows[key] - shift) / scale if changed else rows[key]).astype(np.float32, copy=False)
    lost = np.flatnonzero(coarse & (raw_std > 0)) if obs.dtype == np.float32 else []
    cause = "hardly vary beyond the rounding of float32: record float64 or subtract an offset if they should"
    found = [f"has observations whose columns {', '.join(map(str, lost))} {cause}"] if len(lost) else []
    return dict(obs_shift=shift, obs_scale=scale, obs_mean=(mean - shift) / scale, obs_std=std / scale), found


def unit_warnings(data) -> list[str]:
    """At most one sentence on columns of `data`, an OfflineDataset, from which unscaled networks learn badly."""
    mean, std = data.obs_mean, data.obs_std
    if mean is None or (data.obs_scale != 1).any():
        return []
    offset = (np.abs(mean) > 10 * std) & (np.abs(mean) > 2)  # a hopper's height is 1.2 +- 0.02, and not to blame
    bad = np.flatnonzero((std > 0) & (offset | (std > 100) | (std < 0.01)))
    columns = [f"{i} (mean {mean[i]:.3g}, deviation {std[i]:.2g})" for i in bad[:5]]
    columns += [f"{len(bad) - 5} more"] if len(bad) > 5 else []
    hint = "far from mean 0 and deviation 1, and networks see them as they are: try --standardise-obs"
    return [f"observations are in columns {', '.join(columns)} {hint}"] if columns else []
