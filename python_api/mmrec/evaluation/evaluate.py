"""From a model's rankings to a :class:`.Result`: all users, and the groups that an average hides."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .beyond import beyond_accuracy, popularity_groups
from .metrics import DEFAULT_METRICS, Metric, per_user
from .protocols import Seen, Split, Stage
from .ragged import Ragged
from .ranking import Ranker
from .results import Result, Row

__all__ = ["evaluate"]


def evaluate(
    ranker: Ranker,
    split: Split,
    *,
    model: str,
    dataset: str,
    fingerprint: str,
    stage: Stage = "test",
    metrics: Sequence[str] = DEFAULT_METRICS,
    mask: Seen | None = None,
    seed: int | None = None,
    groups: bool = True,
) -> Result:
    """Ranks all items for every user of the stage and computes every metric.

    Args:
        ranker: ``ranker(split, stage, k, mask=…, candidates=…)`` → item rows ``[n, k]``, such as
            :func:`.most_popular`, ``partial(item_knn, neighbours=20)`` or a closure around :func:`.rank`.
        model, dataset, fingerprint, seed: kept with the result.
        metrics: names as in :mod:`.metrics`.
        mask: see :meth:`.Split.mask`.
        groups: also the rows below.

    Returns:
        A result with the row "all" and, where they have users, the rows

        - "warm", "head", "middle", "tail": only targets of that group of items count, all items are ranked;
        - "cold-among-all": only targets without any training interaction count, all items are ranked;
        - "cold-among-cold": the same targets, ranked among items without training interactions alone.
    """
    parsed = [Metric.parse(name) for name in metrics]
    if not parsed:
        raise ValueError("metrics must name at least one metric")
    depth = max(metric.depth for metric in parsed)
    users, relevant = split.users(stage), split.relevant(stage)
    ranked = _ranked(ranker, split, stage, depth, mask, None)
    rows = {"all": Row(users, per_user(ranked, relevant, parsed))}
    if groups:
        cold = split.cold_items
        for name, items in {"warm": ~cold, **popularity_groups(split.popularity), "cold-among-all": cold}.items():
            _add_group(rows, name, items, ranked, users, relevant, parsed)
        if "cold-among-all" in rows:
            among_cold = _ranked(ranker, split, stage, depth, mask, np.flatnonzero(cold))
            _add_group(rows, "cold-among-cold", cold, among_cold, users, relevant, parsed)
    trained = int((split.train.lengths > 0).sum())
    cutoffs = tuple(sorted({metric.k for metric in parsed}))
    return Result(
        model=model,
        protocol=split.protocol,
        split=split.id,
        stage=stage,
        mask=split.default_mask(stage) if mask is None else mask,
        dataset=dataset,
        fingerprint=fingerprint,
        seed=seed,
        rows=rows,
        beyond_accuracy=beyond_accuracy(ranked, split.popularity, trained, cutoffs) if len(users) else {},
    )


def _ranked(
    ranker: Ranker, split: Split, stage: Stage, depth: int, mask: Seen | None, candidates: np.ndarray | None
) -> np.ndarray:
    ranked = ranker(split, stage, depth, mask=mask, candidates=candidates)
    if ranked.shape != (len(split.users(stage)), depth):
        raise ValueError(f"ranker must return {(len(split.users(stage)), depth)}, got {ranked.shape}")
    return ranked


def _add_group(
    rows: dict[str, Row],
    name: str,
    items: np.ndarray,
    ranked: np.ndarray,
    users: np.ndarray,
    relevant: Ragged,
    metrics: Sequence[Metric],
) -> None:
    targets = relevant.keep(items[relevant.ids])
    concerned = np.flatnonzero(targets.lengths > 0)
    if len(concerned):
        rows[name] = Row(users[concerned], per_user(ranked[concerned], targets.rows(concerned), metrics))
