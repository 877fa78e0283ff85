"""Quality against latency: what each way to answer is worth on held-out interactions, and what it takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from .online import OnlineRecommender
from .planning import Plan

__all__ = ["Point", "Way", "pareto", "rank_by", "time_ways"]

_BATCH, _RERANKED_BATCH = 64, 4
_LEAST_ROUNDS = 10


class Way(NamedTuple):
    """A way to answer: which recommender, as it is named in tables, and which of its plans."""

    model: str
    dtype: str
    plan: Plan


class Point(NamedTuple):
    """Where a way lies.

    Attributes:
        way: see there.
        p50_ms, p95_ms, p99_ms: of single requests.
        calls: so many.
        values: metric → float64 `[users]`.
        best: no other way is as good in the first metric and as fast (p50).
    """

    way: Way
    p50_ms: float
    p95_ms: float
    p99_ms: float
    calls: int
    values: Mapping[str, np.ndarray]
    best: bool = False


def rank_by(online: OnlineRecommender, histories: Sequence[Sequence[str]], k: int, plan: Plan) -> list[list[str]]:
    """Ids of the k best items for each history, best first; a history's own items are left out."""
    found: list[list[str]] = []
    size = _RERANKED_BATCH if plan.rerank else _BATCH
    for begin in range(0, len(histories), size):
        part = list(histories[begin : begin + size])
        found += [one.items for one in online.recommend(part, k, depth=plan.depth, rerank=plan.rerank)]
    return found


def time_ways(
    ways: Mapping[Way, OnlineRecommender], histories: Sequence[list[str]], k: int, *, seconds: float, seed: int = 0
) -> dict[Way, list[float]]:
    """Milliseconds of single requests of each way, in turn, with the same history in each round: what disturbs the
    machine disturbs all alike. At least ten rounds, and as many as take `seconds` per way."""
    random = np.random.default_rng(seed)
    taken: dict[Way, list[float]] = {way: [] for way in ways}

    def once(keep: bool) -> None:
        history = histories[int(random.integers(len(histories)))]
        for way, online in ways.items():
            began = time.perf_counter()
            online.recommend([history], k, depth=way.plan.depth, rerank=way.plan.rerank)
            if keep:
                taken[way].append(1e3 * (time.perf_counter() - began))

    once(keep=False)
    rounds, until = 0, time.perf_counter() + seconds * len(ways)
    while rounds < _LEAST_ROUNDS or time.perf_counter() < until:
        once(keep=True)
        rounds += 1
    return taken


def pareto(points: Sequence[Point], quality: Callable[[Point], float]) -> list[Point]:
    """The same points, those marked that no other one beats in time or quality without losing in the other."""

    def beaten(point: Point) -> bool:
        mine = (quality(point), -point.p50_ms)
        others = ((quality(other), -other.p50_ms) for other in points if other is not point)
        return any(q >= mine[0] and t >= mine[1] and (q, t) != mine for q, t in others)

    return [point._replace(best=not beaten(point)) for point in points]
