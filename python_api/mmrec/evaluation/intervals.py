"""Paired bootstrap: how sure a difference between two models is, given these users and these seeds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

__all__ = ["Interval", "bootstrap", "paired_bootstrap"]

_DRAWS_AT_ONCE = 1 << 22


@dataclass(frozen=True)
class Interval:
    """A mean with its percentile bootstrap interval.

    Args:
        mean: the mean over users (and seeds).
        low, high: ends of the interval.
        level: its coverage, such as 0.95.
        users, seeds: how many of each it rests on.
        resamples: how many bootstrap samples.
    """

    mean: float
    low: float
    high: float
    level: float
    users: int
    seeds: int
    resamples: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of 0."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


def bootstrap(values: np.ndarray, *, resamples: int = 10_000, level: float = 0.95, seed: int = 0) -> Interval:
    """Interval of a mean (Efron and Tibshirani, 1993, percentile method).

    Args:
        values: ``[users]``, or ``[seeds, users]`` for a model trained with several seeds. Users are drawn with
            replacement, and independently seeds, so the interval covers new users *and* new trainings. With few seeds
            (below about five) the share that comes from the seeds is underestimated.
        resamples: bootstrap samples, at least 100.
        level: coverage in (0, 1).
        seed: of the resampling; equal seeds give equal bits.
    """
    table = np.atleast_2d(np.asarray(values, dtype=np.float64))
    if table.ndim != 2 or not table.size:
        raise ValueError(f"values must be [users] or [seeds, users] and not empty, got shape {np.shape(values)}")
    if not np.isfinite(table).all():
        raise ValueError("values must be finite")
    if resamples < 100:
        raise ValueError(f"resamples must be at least 100, got {resamples}")
    if not 0 < level < 1:
        raise ValueError(f"level must lie in (0, 1), got {level}")
    seeds, users = table.shape
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    step = max(1, _DRAWS_AT_ONCE // users)
    per_user = table[0] if seeds == 1 else None
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        users_drawn = rng.integers(users, size=(size, users))
        if per_user is not None:
            means[start : start + size] = per_user[users_drawn].mean(axis=1)
            continue
        by_seed = np.stack([row[users_drawn].mean(axis=1) for row in table], axis=1)
        seeds_drawn = rng.integers(seeds, size=(size, seeds))
        means[start : start + size] = np.take_along_axis(by_seed, seeds_drawn, axis=1).mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(table.mean()), float(low), float(high), level, users, seeds, resamples)


def paired_bootstrap(
    a: np.ndarray, b: np.ndarray, *, resamples: int = 10_000, level: float = 0.95, seed: int = 0
) -> Interval:
    """Interval of the mean of ``a − b``, the same users (and seeds) drawn for both.

    Args:
        a, b: ``[users]`` or ``[seeds, users]``; column ``u`` is the same user in both, row ``s`` the same seed. One of
            them may be ``[users]`` against the other's ``[seeds, users]``: a model without randomness.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape[-1:] != b.shape[-1:] or (a.ndim == b.ndim == 2 and len(a) != len(b)):
        raise ValueError(f"a and b must hold the same users and seeds, got shapes {a.shape} and {b.shape}")
    return bootstrap(a - b, resamples=resamples, level=level, seed=seed)
