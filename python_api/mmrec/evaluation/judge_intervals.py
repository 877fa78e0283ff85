"""Bootstrap intervals over users who have several rows each: of a mean per user, and of what is no mean at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from .intervals import Interval, bootstrap
from .ragged import Ragged

__all__ = ["cluster_bootstrap", "mean_over_users"]

Statistic = Callable[[np.ndarray], Sequence[float] | np.ndarray]


def mean_over_users(
    values: np.ndarray, users: np.ndarray, *, resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> Interval:
    """Each user's mean over their rows, averaged with equal weight for every user, by :func:`.bootstrap`.

    Args:
        values: float64 ``[n]``; NaN is left out, and so is a user who has nothing else.
        users: int64 ``[n]``, from 0.

    Returns:
        Without any user all NaN; with one there is no knowing how users differ, and the ends are NaN.
    """
    there = ~np.isnan(values)
    rows = np.bincount(users[there])
    found = np.flatnonzero(rows)
    if not len(found):
        return Interval(np.nan, np.nan, np.nan, level, 0, 1, resamples)
    means = np.bincount(users[there], values[there])[found] / rows[found]
    result = bootstrap(means, resamples=resamples, level=level, seed=seed)
    return result if len(found) > 1 else replace(result, low=np.nan, high=np.nan)


def cluster_bootstrap(
    statistic: Statistic, clusters: np.ndarray, *, resamples: int = 1000, level: float = 0.95, seed: int = 0
) -> list[Interval]:
    """Percentile intervals of statistics of all rows, where whole clusters of rows are drawn with replacement.

    Rows of one cluster (a user, an item) may depend on each other in any way. Resamples in which a statistic is
    undefined are left out of its interval.

    Args:
        statistic: ``statistic(rows)`` for int ``[r]``, rows with repeats, r ≥ 0 → some numbers, NaN where undefined.
        clusters: int64 ``[n]``, which cluster each row belongs to.

    Returns:
        One interval per number; ``mean`` is the statistic of all rows, ``users`` counts clusters. The ends are NaN with
        fewer than two clusters and where the statistic is NaN.
    """
    labels, code = np.unique(clusters, return_inverse=True)
    count = len(labels)
    rows_of = Ragged.from_pairs(code, np.arange(len(code)), count)
    value = np.asarray(statistic(np.arange(len(code))), dtype=np.float64)
    ends = np.full((2, len(value)), np.nan)
    if count > 1 and not np.isnan(value).all():
        rng = np.random.default_rng(seed)
        drawn = np.array([statistic(rows_of.rows(rng.integers(count, size=count)).ids) for _ in range(resamples)])
        for place in np.flatnonzero(~np.isnan(value)):
            defined = drawn[~np.isnan(drawn[:, place]), place]
            if len(defined):
                ends[:, place] = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2])
    return [
        Interval(mean, low, high, level, count, 1, resamples)
        for mean, low, high in zip(value.tolist(), *ends.tolist(), strict=True)
    ]
