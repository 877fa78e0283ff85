"""How far a judge's scores agree with stars, in order, in level and in probability, and the map between the two."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

__all__ = [
    "Reliability",
    "StarCalibration",
    "cross_fitted",
    "expected_calibration_error",
    "isotonic",
    "kendall_tau",
    "level_codes",
    "level_scale",
    "spearman",
    "weighted_kappa",
]


def kendall_tau(a: np.ndarray, b: np.ndarray) -> float:
    """Kendall's τ-b (1945): (concordant − discordant pairs) / √(pairs untied in a · pairs untied in b).

    Discordant pairs are counted bit by bit of the side with fewer distinct values: O(n log n), and O(n) passes after
    the sort for stars.

    Args:
        a, b: ``[n]``, without NaN; only their order counts.

    Returns:
        In [−1, 1]; NaN where a or b is constant, and for fewer than two rows.
    """
    first, second = (np.unique(side, return_inverse=True)[1] for side in _paired(a, b))
    n = len(first)
    if n < 2:
        return float("nan")
    if first.max() < second.max():
        first, second = second, first
    order = np.lexsort((second, first))  # ties of a lie in ascending order of b, so none of them is discordant
    first, second = first[order], second[order]
    new = np.flatnonzero((np.diff(first, prepend=-1) != 0) | (np.diff(second, prepend=-1) != 0))
    pairs, tied_in_both = n * (n - 1) // 2, _pairs(np.diff(new, append=n))
    tied = [_pairs(np.bincount(side)) for side in (first, second)]
    untied = (pairs - tied[0]) * (pairs - tied[1])  # Python's integers: 10^5 rows would overflow 64 bits
    surplus = pairs - tied[0] - tied[1] + tied_in_both - 2 * _inversions(second)
    return surplus / math.sqrt(untied) if untied else float("nan")


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's ρ (1904): the correlation of average ranks; arguments and NaN as in :func:`kendall_tau`."""
    first, second = (_average_ranks(side) for side in _paired(a, b))
    if len(first) < 2:
        return float("nan")
    first, second = first - first.mean(), second - second.mean()
    scale = math.sqrt(float(first @ first) * float(second @ second))
    return min(max(float(first @ second) / scale, -1.0), 1.0) if scale else float("nan")


def weighted_kappa(
    a: np.ndarray,
    b: np.ndarray,
    levels: Sequence[float] | np.ndarray,
    weights: Literal["quadratic", "linear"] = "quadratic",
) -> float:
    """Weighted κ of two ordinal ratings (Cohen, 1968): 1 − Σ w O / Σ w E.

    O counts rows by their pair of levels, E is what the margins alone would give, and ``w_ij = |i − j|`` or its square
    for the i-th and j-th level, whatever the distance between their values.

    Args:
        a, b: ``[n]``, every entry one of ``levels``.
        levels: the scale, ascending; levels that nobody used change nothing but the distances.
        weights: of a disagreement.

    Returns:
        1 for equal ratings, 0 for what chance would give; NaN without rows, and where both are constant and alike.
    """
    if weights not in ("quadratic", "linear"):
        raise ValueError(f"weights must be 'quadratic' or 'linear', got {weights!r}")
    scale = level_scale(levels)
    first, second = _paired(a, b)
    size = len(scale)
    codes = level_codes("a", first, scale) * size + level_codes("b", second, scale)
    table = np.bincount(codes, minlength=size * size).reshape(size, size)
    distance = np.abs(np.subtract.outer(np.arange(size), np.arange(size))) ** (2 if weights == "quadratic" else 1)
    expected = int((distance * np.outer(table.sum(axis=1), table.sum(axis=0))).sum())
    return 1 - len(first) * int((distance * table).sum()) / expected if expected else float("nan")


@dataclass(frozen=True, eq=False)
class Reliability:
    """A calibration error, and the bins it consists of.

    Args:
        error: the expected calibration error; NaN without rows.
        rows: int64 ``[bins]``, how many each holds.
        probability, outcome: float64 ``[bins]``, the means of both in each, NaN where it is empty.
    """

    error: float
    rows: np.ndarray
    probability: np.ndarray
    outcome: np.ndarray


def expected_calibration_error(probability: np.ndarray, outcome: np.ndarray, bins: int = 10) -> Reliability:
    """Σ (n_b / n) |mean outcome − mean probability| over bins of equal width (Naeini et al., 2015; Guo et al., 2017,
    arXiv:1706.04599).

    Never below 0, so chance alone makes it positive: with few rows per bin also for probabilities that are right.

    Args:
        probability: ``[n]`` in [0, 1]. Bin b holds (b / bins, (b + 1) / bins], the first also 0.
        outcome: ``[n]``, 0 or 1 (or False, True).
        bins: how many.
    """
    p, y = _paired(probability, outcome, "probability", "outcome")
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    if len(p) and (p.min() < 0 or p.max() > 1):
        raise ValueError(f"probability must lie in [0, 1], got {p.min()} to {p.max()}")
    if not np.isin(y, (0, 1)).all():
        raise ValueError(f"outcome must be 0 or 1, got {y[~np.isin(y, (0, 1))][0]}")
    place = np.searchsorted(np.arange(1, bins) / bins, p, side="left")
    rows = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):
        stated, observed = np.bincount(place, p, bins) / rows, np.bincount(place, y, bins) / rows
    gap = np.where(rows > 0, rows * np.abs(observed - stated), 0.0).sum()
    return Reliability(float(gap / len(p)) if len(p) else float("nan"), rows, stated, observed)


def isotonic(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted least-squares fit that never decreases, by pooling adjacent violators (Ayer et al., 1955); ``[n]``."""
    totals: list[float] = []
    sizes: list[float] = []
    lengths: list[int] = []
    for total, size in zip((values * weights).tolist(), weights.tolist(), strict=True):
        length = 1
        while totals and totals[-1] * size >= total * sizes[-1]:  # products: exact for counts
            total, size, length = total + totals.pop(), size + sizes.pop(), length + lengths.pop()
        totals.append(total)
        sizes.append(size)
        lengths.append(length)
    return np.repeat(np.array(totals) / np.array(sizes), lengths)


@dataclass(frozen=True, eq=False)
class StarCalibration:
    """From a score to a distribution over star levels: P(stars ≥ level | score), one isotonic fit per level.

    This is isotonic distributional regression (Henzi, Ziegel and Gneiting, 2021, arXiv:1909.03725). It assumes that a
    higher score does not mean fewer stars, and nothing else: no bins, no shape, no scale of the scores. Matching
    quantiles instead would give every judge the stars' own histogram, a random one as well, and no probabilities.

    Args:
        levels: float64 ``[L]``, ascending.
        scores: float64 ``[m]``, the distinct scores that it was fitted on, ascending.
        at_least: float64 ``[m, L − 1]``, the fitted probabilities of each level but the lowest.
    """

    levels: np.ndarray
    scores: np.ndarray
    at_least: np.ndarray

    @classmethod
    def fit(
        cls, scores: np.ndarray, stars: np.ndarray, levels: Sequence[float] | np.ndarray | None = None
    ) -> StarCalibration:
        """Fits rows that are *not* the ones to be judged.

        Args:
            scores, stars: ``[n]``, at least one row, finite.
            levels: the scale; None for the distinct stars.
        """
        x, y = _paired(scores, stars, "scores", "stars")
        if not len(x) or not np.isfinite(x).all():
            raise ValueError(f"scores must be finite and not empty, got {len(x)} rows, {np.isinf(x).sum()} infinite")
        scale = level_scale(np.unique(y) if levels is None else levels)
        codes = level_codes("stars", y, scale)
        knots, place, count = np.unique(x, return_inverse=True, return_counts=True)
        columns = [isotonic(np.bincount(place, codes >= code) / count, count) for code in range(1, len(scale))]
        return cls(scale, knots, np.stack(columns, axis=1) if columns else np.empty((len(knots), 0)))

    def distribution(self, scores: np.ndarray) -> np.ndarray:
        """float64 ``[n, L]``: P(stars ≥ level); linear between fitted scores, constant outside them. Column 0 is 1."""
        asked = np.asarray(scores, dtype=np.float64)
        columns = [np.interp(asked, self.scores, column) for column in self.at_least.T]
        return np.stack([np.ones(len(asked)), *columns], axis=1)

    def probability(self, scores: np.ndarray, liked: float) -> np.ndarray:
        """float64 ``[n]``: P(stars ≥ liked); 0 where no level is as high."""
        place = int(np.searchsorted(self.levels, liked))
        return self.distribution(scores)[:, place] if place < len(self.levels) else np.zeros(len(scores))

    def expected(self, scores: np.ndarray) -> np.ndarray:
        """float64 ``[n]``: the mean of the distribution, in stars."""
        return self.distribution(scores) @ np.diff(self.levels, prepend=0.0)

    def level(self, scores: np.ndarray) -> np.ndarray:
        """float64 ``[n]``: the median of the distribution, one of the levels."""
        return self.levels[(self.distribution(scores)[:, 1:] >= 0.5).sum(axis=1)]


def level_codes(name: str, values: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """int64 ``[n]``: the place of each value among ``levels``; ``ValueError`` names the first that is none of them."""
    codes = np.minimum(np.searchsorted(levels, values), len(levels) - 1)
    strange = levels[codes] != values
    if strange.any():
        raise ValueError(f"{name} must hold levels of {levels.tolist()}, got {values[np.argmax(strange)]}")
    return codes


def level_scale(levels: Sequence[float] | np.ndarray) -> np.ndarray:
    """float64 ``[L]``: the levels, or ``ValueError`` if they are no scale."""
    scale = np.asarray(levels, dtype=np.float64)
    if scale.ndim != 1 or not len(scale) or not np.isfinite(scale).all() or (np.diff(scale) <= 0).any():
        raise ValueError(f"levels must be finite numbers, ascending and at least one, got {scale.tolist()}")
    return scale


def _paired(a: np.ndarray, b: np.ndarray, first: str = "a", second: str = "b") -> tuple[np.ndarray, np.ndarray]:
    one, other = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if one.ndim != 1 or one.shape != other.shape:
        raise ValueError(f"{first} and {second} must both be [n], got shapes {one.shape} and {other.shape}")
    for name, side in ((first, one), (second, other)):
        if np.isnan(side).any():
            raise ValueError(f"{name} must not hold NaN, got {np.isnan(side).sum()}; leave those rows out")
    return one, other


def _pairs(counts: np.ndarray) -> int:
    return int((counts * (counts - 1) // 2).sum())


def _average_ranks(values: np.ndarray) -> np.ndarray:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


def _inversions(codes: np.ndarray) -> int:
    """Pairs i < j with ``codes[i] > codes[j] ≥ 0``: at the highest bit in which the two differ, among those that are
    alike above it. Every pass leaves the codes stably sorted by the bits seen so far."""
    place, total = np.arange(len(codes)), 0
    for bit in reversed(range(int(codes.max()).bit_length())):
        start = np.flatnonzero(np.diff(codes >> (bit + 1), prepend=-1))
        size = np.diff(start, append=len(codes))
        one = (codes >> bit) & 1
        before = np.cumsum(one) - one
        before -= np.repeat(before[start], size)
        total += int(before[one == 0].sum())
        zeros = size - np.add.reduceat(one, start)
        target = np.where(one, np.repeat(start + zeros, size) + before, place - before)
        moved = np.empty_like(codes)
        moved[target] = codes
        codes = moved
    return total


def cross_fitted(
    scores: np.ndarray, stars: np.ndarray, users: np.ndarray, levels: np.ndarray, liked: float, folds: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Every row's :meth:`~StarCalibration.level` and :meth:`~StarCalibration.probability` of ``liked``, by a map that
    was fitted on other users only: users are dealt into ``folds`` parts, each judged by the map of all the others.

    Args:
        scores, stars: float64 ``[n]``, finite.
        users: int64 ``[n]``.
        folds: at least 2; no more are made than there are users.

    Returns:
        Two float64 ``[n]``; all NaN with fewer than two users: there is nobody else to fit.
    """
    if folds < 2:
        raise ValueError(f"folds must be at least 2, got {folds}")
    labels, code = np.unique(users, return_inverse=True)
    level, probability = np.full((2, len(scores)), np.nan)
    if len(labels) < 2:
        return level, probability
    fold = (np.random.default_rng(seed).permutation(len(labels)) % folds)[code]
    for held_out in range(min(folds, len(labels))):
        rest, own = fold != held_out, fold == held_out
        fitted = StarCalibration.fit(scores[rest], stars[rest], levels)
        level[own], probability[own] = fitted.level(scores[own]), fitted.probability(scores[own], liked)
    return level, probability
