"""What moves a judge beside the stars: an item's place in the question, the length of its text, its popularity."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .intervals import Interval
from .judge_intervals import cluster_bootstrap, mean_over_users

__all__ = ["Pull", "PlantedJudge", "position_bias", "pulls", "self_consistency"]

_NOTHING = 1e-9


@dataclass(frozen=True)
class Pull:
    """How far a property of the item moves the score at a fixed number of stars.

    Args:
        slope: score per unit of ln(1 + property), at fixed stars and with the other properties held fixed.
        standardised: slope · sd(ln(1 + property)) / sd(score), the standardised partial regression coefficient: free
            of units, so judges can be compared.
    """

    slope: Interval
    standardised: Interval


def pulls(
    scores: np.ndarray, stars: np.ndarray, properties: Mapping[str, np.ndarray], clusters: np.ndarray, **options: Any
) -> dict[str, Pull]:
    """Least squares of the score on ln(1 + each property) and an intercept of its own for every level of stars.

    With the intercepts nothing is assumed about how the score follows the stars, and what good items have in common
    (longer texts, more interactions) is not held against the judge.

    Args:
        scores, stars: float64 ``[n]``, finite.
        properties: name → float64 ``[n]``, at least 0.
        clusters: int64 ``[n]``: what is drawn, users or items.
        options: as in :func:`.cluster_bootstrap`.

    Returns:
        For each property its :class:`Pull`; NaN where it does not vary at fixed stars, or only together with another.
    """
    level = np.unique(stars, return_inverse=True)[1]
    x = np.log1p(np.stack(list(properties.values()), axis=1))

    def statistic(rows: np.ndarray) -> np.ndarray:
        if not len(rows):
            return np.full(2 * x.shape[1], np.nan)
        slopes = _slopes(scores[rows], level[rows], x[rows])
        spread = scores[rows].std()
        relative = slopes * x[rows].std(axis=0) / spread if spread > _NOTHING * np.abs(scores[rows]).max() else np.nan
        return np.concatenate([slopes, np.broadcast_to(relative, slopes.shape)])

    found = cluster_bootstrap(statistic, clusters, **options)
    return {
        name: Pull(slope, standardised)
        for name, slope, standardised in zip(properties, found, found[len(properties) :], strict=False)
    }


def position_bias(
    forward: np.ndarray, backward: np.ndarray, users: np.ndarray, **options: Any
) -> tuple[Interval, Interval]:
    """Asked about (A, B) and about (B, A): how much the place decides (Zheng et al., 2023, arXiv:2306.05685).

    Args:
        forward, backward: float64 ``[p]``: probability, or verdict 0 or 1, that the *first* is chosen, when A stands
            first and when B does; NaN: no answer, the pair is left out.
        users: int64 ``[p]``.
        options: as in :func:`.mean_over_users`.

    Returns:
        P(first chosen) − ½ over both orders, so that what A and B are cancels: −½ to ½, 0 without bias. And the
        inconsistency rate: the share of pairs whose two verdicts (above, at or below ½) are not each other's reverse.
    """
    shift = (forward + backward) / 2 - 0.5
    verdicts = np.sign(forward - 0.5) + np.sign(backward - 0.5)
    inconsistent = np.where(np.isnan(verdicts), np.nan, verdicts != 0)
    return mean_over_users(shift, users, **options), mean_over_users(inconsistent, users, **options)


def self_consistency(repeats: np.ndarray) -> float:
    """Intraclass correlation ICC(1, 1) of repeated judgements (Shrout and Fleiss, 1979): the share of a single score's
    variance that asking again would give again.

    (MSB − MSW) / (MSB + (R − 1) MSW), with the mean squares between rows and within them.

    Args:
        repeats: float64 ``[n, R]``, R ≥ 2, finite: the same question asked R times.

    Returns:
        1 if asking again changes nothing, 0 (or a little below) if a score says nothing about the next; NaN for fewer
        than two rows, and where all scores are equal.
    """
    n, count = repeats.shape
    if n < 2:
        return float("nan")
    mean = repeats.mean(axis=1)
    between = count * ((mean - mean.mean()) ** 2).sum() / (n - 1)
    within = ((repeats - mean[:, None]) ** 2).sum() / (n * (count - 1))
    total = between + (count - 1) * within
    return float((between - within) / total) if total > (_NOTHING * np.abs(repeats).max()) ** 2 else float("nan")


class PlantedJudge:
    """A judge whose faults are known: what the harness finds is compared with what was planted.

    ``score = truth + verbosity_bias · ln(1 + length) + popularity_bias · ln(1 + popularity) + noise · N(0, 1)``, with
    new noise for every question. A pair is decided by two such scores, but with probability ``2 |position_bias|`` the
    first (or, if negative, the second) is chosen whatever they are: then P(first chosen) − ½ is ``position_bias`` over
    both orders, and without noise and ties the two verdicts contradict each other in that share of the pairs.

    Args:
        truth: ``truth(histories, items)`` → ``[n]``, such as the stars.
        length, popularity: ``length(items)`` → ``[n]``, at least 0; needed where their bias is not 0.
        noise: standard deviation, at least 0.
        position_bias: in [−½, ½].
        verbosity_bias, popularity_bias: score per unit of ln(1 + x): the ``slope`` of :class:`Pull`.
        seed: of the noise; the same calls in the same order give the same answers.
    """

    def __init__(
        self,
        truth: Callable[[Sequence[Any], Sequence[Any]], Any],
        *,
        length: Callable[[Sequence[Any]], Any] | None = None,
        popularity: Callable[[Sequence[Any]], Any] | None = None,
        noise: float = 0.0,
        position_bias: float = 0.0,
        verbosity_bias: float = 0.0,
        popularity_bias: float = 0.0,
        seed: int = 0,
    ) -> None:
        if not noise >= 0:
            raise ValueError(f"noise must be at least 0, got {noise}")
        if not abs(position_bias) <= 0.5:
            raise ValueError(f"position_bias must lie in [-0.5, 0.5], got {position_bias}")
        for name, bias, of in (("length", verbosity_bias, length), ("popularity", popularity_bias, popularity)):
            if bias and of is None:
                raise ValueError(f"{name} must be a function of items for its bias of {bias}, got None")
        self.truth, self.noise, self.position_bias = truth, noise, position_bias
        self._pulls = [(bias, of) for bias, of in ((verbosity_bias, length), (popularity_bias, popularity)) if of]
        self._rng = np.random.default_rng(seed)

    def score(self, histories: Sequence[Any], items: Sequence[Any]) -> np.ndarray:
        """float64 ``[n]``."""
        score = np.asarray(self.truth(histories, items), dtype=np.float64)
        for bias, of in self._pulls:
            score = score + bias * np.log1p(of(items))
        return score + self.noise * self._rng.normal(size=score.shape)

    def prefer(self, histories: Sequence[Any], first: Sequence[Any], second: Sequence[Any]) -> np.ndarray:
        """float64 ``[n]``: 1 if the first is chosen, 0 if the second is, ½ between equals."""
        gap = self.score(histories, first) - self.score(histories, second)
        blind = self._rng.random(gap.shape) < 2 * abs(self.position_bias)
        return np.where(blind, float(self.position_bias > 0), (np.sign(gap) + 1) / 2)


def _slopes(scores: np.ndarray, level: np.ndarray, x: np.ndarray) -> np.ndarray:
    """``[k]``: coefficients of ``x [n, k]`` beside an intercept per level, which subtracting level means takes out."""
    rows = np.maximum(np.bincount(level), 1)
    y, *columns = (column - (np.bincount(level, column) / rows)[level] for column in (scores, *x.T))
    rest, scale = np.stack(columns, axis=1), np.abs(columns).max(axis=1)
    varies = scale > _NOTHING * np.maximum(np.abs(x).max(axis=0), 1)  # else what is left of the column is rounding
    slopes = np.full(x.shape[1], np.nan)
    if varies.any():
        solution, _, rank, _ = np.linalg.lstsq(rest[:, varies] / scale[varies], y, rcond=_NOTHING)
        slopes[varies] = solution / scale[varies] if rank == varies.sum() else np.nan
    return slopes
