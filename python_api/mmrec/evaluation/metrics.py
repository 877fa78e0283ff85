"""Accuracy of ranked lists, one number per user; the name of a metric fixes its formula.

With ``h_r = 1`` if the item at position ``r`` is relevant and ``R`` the set of relevant items:

======================  ================================================================================
``HR@K``                1 if any ``h_r``, r ≤ K
``Recall@K``            Σ h_r / \\|R\\|
``Precision@K``         Σ h_r / K
``MRR@K``               1 / (position of the first hit within K), else 0
``NDCG@K``              Σ h_r / log2(r + 1), divided by Σ_{r ≤ min(\\|R\\|, K)} 1 / log2(r + 1)
``NDCG-ngcf{M}@K``      the same sum, divided by that of the hits found in the top M, moved to the front
``MAP-min@K``           Σ P(r) h_r / min(\\|R\\|, K), with P(r) the precision at r
``MAP-all@K``           Σ P(r) h_r / \\|R\\|
``MAP-hits@K``          Σ P(r) h_r / Σ h_r, 0 without a hit
======================  ================================================================================

All sums run over r ≤ K. ``MAP@K`` alone is refused: live toolboxes disagree on its denominator by a factor of ten.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from .ragged import Ragged

__all__ = ["Metric", "DEFAULT_METRICS", "per_user", "evaluate_rankings", "hits"]

_VARIANTS = ("HR", "Recall", "Precision", "MRR", "NDCG", "NDCG-ngcf", "MAP-min", "MAP-all", "MAP-hits")
_SYNTAX = re.compile(r"(?P<name>[A-Za-z]+(?:-[a-z]+)?)(?P<top>\d+)?@(?P<k>[1-9]\d*)")

DEFAULT_METRICS: tuple[str, ...] = tuple(
    f"{name}@{k}" for name in ("HR", "Recall", "Precision", "MRR", "NDCG", "MAP-min") for k in (5, 10, 20, 50)
)


@dataclass(frozen=True)
class Metric:
    """One exactly defined metric, such as ``NDCG@10``; the module's table has the formulas.

    Args:
        variant: the name before the ``@``.
        k: the cut-off, at least 1.
        top: length of the list whose hits form the ideal; only for ``NDCG-ngcf``, there at least ``k``.
    """

    variant: str
    k: int
    top: int | None = None

    @classmethod
    def parse(cls, name: str) -> Metric:
        """Reads ``"Recall@20"`` or ``"NDCG-ngcf50@10"``; ``ValueError`` on anything ambiguous or unknown."""
        match = _SYNTAX.fullmatch(name)
        variant = match["name"] if match else name.partition("@")[0]
        if variant == "MAP":
            raise ValueError(f"metric {name!r} is ambiguous: write MAP-min, MAP-all or MAP-hits")
        if not match or variant not in _VARIANTS:
            raise ValueError(f"metric {name!r} is not known; it needs the form NAME@K with NAME in {list(_VARIANTS)}")
        k, top = int(match["k"]), match["top"]
        if variant != "NDCG-ngcf":
            if top is not None:
                raise ValueError(f"metric {name!r}: only NDCG-ngcf takes a number before the @")
            return cls(variant, k)
        if top is None or int(top) < k:
            raise ValueError(
                f"metric {name!r} needs the length of the list that its ideal comes from, at least {k}: "
                f"such as NDCG-ngcf{max(50, k)}@{k}"
            )
        return cls(variant, k, int(top))

    @property
    def base(self) -> str:
        """The family: different variants of one family must not be compared."""
        return self.variant.partition("-")[0]

    @property
    def depth(self) -> int:
        """How many positions of the list the formula reads."""
        return self.top if self.top is not None else self.k

    def __str__(self) -> str:
        return f"{self.variant}{'' if self.top is None else self.top}@{self.k}"


def hits(ranked: np.ndarray, relevant: Ragged) -> np.ndarray:
    """bool ``[n, K]``: which of the ranked ids are relevant.

    Args:
        ranked: integers ``[n, K]``, best first; −1 fills up lists that are too short. An id may appear once in a row.
        relevant: ``n`` rows; repeats inside a row count once.
    """
    ranked = np.asarray(ranked)
    if ranked.ndim != 2 or not np.issubdtype(ranked.dtype, np.integer):
        raise TypeError(f"ranked must be an integer array [n, K], got {ranked.dtype} {ranked.shape}")
    if len(ranked) != len(relevant):
        raise ValueError(f"ranked has {len(ranked)} rows, relevant has {len(relevant)}")
    if ranked.size and ranked.min() < -1:
        raise ValueError(f"ranked must hold item rows or -1, got {int(ranked.min())}")
    if len(relevant.ids) and relevant.ids.min() < 0:
        raise ValueError(f"relevant must hold item rows, got {int(relevant.ids.min())}")
    ordered = np.sort(ranked, axis=1)
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if twice.any():
        row, column = np.argwhere(twice)[0]
        raise ValueError(f"ranked row {row} holds item {int(ordered[row, column])} more than once")
    if not ranked.size or not len(relevant.ids):
        return np.zeros(ranked.shape, bool)
    # A (row, id) pair becomes one integer, so that one sorted search answers for all users at once. The place left free
    # above the largest id is where the next row's -1 lands.
    span = int(max(ranked.max(), relevant.ids.max())) + 2
    wanted = np.sort(relevant.row_of * span + relevant.ids)
    asked = np.arange(len(ranked))[:, None] * span + ranked
    place = np.minimum(np.searchsorted(wanted, asked), len(wanted) - 1)
    return wanted[place] == asked


def per_user(
    ranked: np.ndarray, relevant: Ragged, metrics: Iterable[str | Metric] = DEFAULT_METRICS
) -> dict[str, np.ndarray]:
    """Every metric for every user.

    Args:
        ranked: integers ``[n, K]``, best first, −1 where a list ends early; K at least as deep as the metrics read.
        relevant: ``n`` rows, each with at least one item.
        metrics: names or :class:`Metric`.

    Returns:
        ``{name: float64 [n]}``, in the order asked for.
    """
    found = hits(ranked, relevant)
    wanted = relevant.unique().lengths
    if len(wanted) and wanted.min() == 0:
        raise ValueError(f"relevant row {int(np.argmin(wanted))} is empty; leave users without a target out")
    result: dict[str, np.ndarray] = {}
    for entry in metrics:
        # A Metric that was not parsed may be one that no name stands for.
        metric = Metric.parse(str(entry))
        if metric.depth > found.shape[1]:
            raise ValueError(f"metric {metric} reads {metric.depth} positions, ranked has only {found.shape[1]}")
        result[str(metric)] = _value(metric, found, wanted)
    return result


def evaluate_rankings(
    ranked: np.ndarray, relevant: Ragged, metrics: Iterable[str | Metric] = DEFAULT_METRICS
) -> dict[str, float]:
    """:func:`per_user`, averaged with equal weight for every user; NaN where there is no user."""
    values = per_user(ranked, relevant, metrics)
    return {name: float(column.mean()) if len(column) else float("nan") for name, column in values.items()}


def _value(metric: Metric, found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    k = metric.k
    top = found[:, :k]
    count = top.sum(axis=1)
    if metric.variant == "HR":
        return (count > 0).astype(np.float64)
    if metric.variant == "Recall":
        return count / wanted
    if metric.variant == "Precision":
        return count / k
    if metric.variant == "MRR":
        return (count > 0) / (top.argmax(axis=1) + 1.0)
    if metric.base == "NDCG":
        discount = 1 / np.log2(np.arange(2, k + 2))
        ideal_hits = wanted if metric.top is None else found[:, : metric.top].sum(axis=1)
        ideal = np.concatenate([[0.0], np.cumsum(discount)])[np.minimum(ideal_hits, k)]
        return _ratio(top @ discount, ideal)
    precision = np.cumsum(top, axis=1) / np.arange(1, k + 1)
    denominator = {"MAP-min": np.minimum(wanted, k), "MAP-all": wanted, "MAP-hits": count}[metric.variant]
    return _ratio((precision * top).sum(axis=1), denominator)


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.divide(numerator, denominator, out=np.zeros(len(numerator)), where=denominator > 0)
