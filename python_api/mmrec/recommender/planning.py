"""Answers within a latency budget: what each way to answer costs on this machine, and the best one that fits.

A plan says how many last items of the history are read and how many of the best items are ranked again. Its cost is the
quantile of its measured times, which a factor adapts to what the machine does now: after each answer the factor grows
if that took longer than foreseen, and shrinks a little if not, so that in the long run the stated share of answers is
in time whatever the times' distribution does (adaptive conformal inference, Gibbs and Candès, 2021, arXiv:2106.00170).
"""

from __future__ import annotations

import bisect
import json
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ..files import parse_json, write_atomic

__all__ = ["QUANTILES", "Costs", "How", "Plan", "Planner", "Times"]

QUANTILES = (0.5, 0.9, 0.95, 0.99)
_FORMAT = 1
# Of the logarithm of the factor: a late answer raises it by a tenth at most.
_STEP = 0.1


class Plan(NamedTuple):
    """How to answer: `depth` last items of the history are read, the `rerank` best items ranked again (0: none)."""

    depth: int
    rerank: int = 0


class How(NamedTuple):
    """What was done for an answer.

    Attributes:
        depth: so many last items of the history were read, if it has that many.
        rerank: so many of the best items were ranked again, if there are that many.
        took_ms: milliseconds of the call, which several histories may share.
        budget_ms: what was asked for, or None.
        expected_ms: the quantile of what the plan takes, or None without a budget.
        in_time: the call kept the budget; True without one.
    """

    depth: int
    rerank: int
    took_ms: float
    budget_ms: float | None = None
    expected_ms: float | None = None
    in_time: bool = True


class Times(NamedTuple):
    """Milliseconds at each of `QUANTILES`, of `calls` calls."""

    quantiles_ms: tuple[float, ...]
    calls: int

    @classmethod
    def of(cls, times_ms: Sequence[float]) -> Times:
        """Of measured times, at least one: each quantile is a time that was measured, the next longer one."""
        ordered = sorted(times_ms)
        return cls(tuple(ordered[math.ceil(q * len(ordered)) - 1] for q in QUANTILES), len(ordered))

    def at(self, quantile: float) -> float:
        """At the smallest of `QUANTILES` that is not below."""
        return self.quantiles_ms[min(bisect.bisect_left(QUANTILES, quantile), len(QUANTILES) - 1)]


@dataclass(frozen=True)
class Costs:
    """What answering costs, as `calibrate` measured it.

    Attributes:
        facts: what it was measured with: dtype of the store, threads, the reranker, …
        retrieval: depth → histories per call → times of everything but ranking again.
        rerank: width → times of ranking so many items again, for one history.
        quality: what a plan's answers are worth, the higher the better, where that was measured.
    """

    facts: Mapping[str, str | int]
    retrieval: Mapping[int, Mapping[int, Times]]
    rerank: Mapping[int, Times] = field(default_factory=dict)
    quality: Mapping[Plan, float] = field(default_factory=dict)

    @property
    def plans(self) -> list[Plan]:
        """The best first. Those whose quality was measured, where it was for any; of equals the cheaper one. Else all:
        those that read more of the history are better, and among these those that rank more again."""
        plans = [Plan(depth, width) for depth in self.retrieval for width in (0, *self.rerank)]
        known = [plan for plan in plans if plan in self.quality]
        if not known:
            return sorted(plans, reverse=True)
        return sorted(known, key=lambda plan: (-self.quality[plan], plan.rerank, plan.depth))

    def expected_ms(self, plan: Plan, histories: int, quantile: float) -> float:
        """Milliseconds of a call with so many histories at the quantile: of its stages, added up."""
        sizes = self.retrieval[plan.depth]
        measured = [size for size in sorted(sizes) if size >= histories]
        size = measured[0] if measured else max(sizes)
        found = sizes[size].at(quantile) * max(1.0, histories / size)
        return found + (self.rerank_ms(plan.rerank, histories, quantile) if plan.rerank else 0.0)

    def rerank_ms(self, width: int, histories: int, quantile: float) -> float:
        """Milliseconds of ranking `width` items again for each of so many histories."""
        return self.rerank[width].at(quantile) * histories

    def check(self, facts: Mapping[str, str | int]) -> None:
        """ValueError unless it was measured with these."""
        for name, value in facts.items():
            if self.facts.get(name) != value:
                raise ValueError(
                    f"costs were measured with {name} {self.facts.get(name)!r}, this is {value!r}: calibrate anew"
                )

    def save(self, path: str | Path) -> None:
        """Write it as JSON, atomically."""
        content = {
            "format": _FORMAT,
            "quantiles": QUANTILES,
            "facts": dict(self.facts),
            "retrieval": {d: {n: t._asdict() for n, t in sizes.items()} for d, sizes in self.retrieval.items()},
            "rerank": {width: times._asdict() for width, times in self.rerank.items()},
            "quality": [{**plan._asdict(), "value": value} for plan, value in self.quality.items()],
        }
        write_atomic(path, (json.dumps(content, indent=1) + "\n").encode())

    @classmethod
    def load(cls, path: str | Path) -> Costs:
        """Read what `save` wrote; ValueError where it is damaged or of another format."""
        try:
            content = parse_json(Path(path).read_text(encoding="utf-8"))
            if (content["format"], tuple(content["quantiles"])) != (_FORMAT, QUANTILES):
                raise ValueError(f"it has format {content['format']}, this version reads {_FORMAT}")
            return cls(
                dict(content["facts"]),
                {int(d): {int(n): _times(t) for n, t in sizes.items()} for d, sizes in content["retrieval"].items()},
                {int(width): _times(times) for width, times in content["rerank"].items()},
                {Plan(q["depth"], q["rerank"]): float(q["value"]) for q in content["quality"]},
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ValueError(f"{path} holds no costs ({type(error).__name__}: {error}); calibrate anew") from None


def _times(content: Mapping[str, object]) -> Times:
    values = content["quantiles_ms"]
    if not isinstance(values, list) or len(values) != len(QUANTILES):
        raise ValueError(f"quantiles_ms must hold {len(QUANTILES)} values, got {values!r}")
    return Times(tuple(float(value) for value in values), int(str(content["calls"])))


class Planner:
    """Chooses plans, and learns from how long they took. Thread-safe.

    Attributes:
        factor: by which times are now longer than they were when the costs were measured; at least 1.
    """

    def __init__(self, costs: Costs) -> None:
        self.costs = costs
        self.factor = 1.0
        self._plans = costs.plans
        self._lock = threading.Lock()

    def choose(self, budget_ms: float, histories: int, quantile: float) -> tuple[Plan, float]:
        """The best plan that is over within `budget_ms` in `quantile` of all calls, and its time at that quantile; the
        cheapest one where none is."""
        expected = [(plan, self._expected(plan, histories, quantile)) for plan in self._plans]
        fitting = [one for one in expected if one[1] <= budget_ms]
        return fitting[0] if fitting else min(expected, key=lambda one: one[1])

    def again(self, plan: Plan, left_ms: float, histories: int, quantile: float) -> Plan:
        """The best plan of the same depth that ranks no more items again, and can do that in the time that is left."""
        for other in self._plans:
            if other.depth == plan.depth and other.rerank <= plan.rerank:
                takes = self.costs.rerank_ms(other.rerank, histories, quantile) if other.rerank else 0.0
                if self.factor * takes <= left_ms:
                    return other
        return plan._replace(rerank=0)

    def learn(self, took_ms: float, expected_ms: float, quantile: float) -> None:
        """Takes in how long a plan took of which `expected_ms` had been foreseen."""
        with self._lock:
            late = float(took_ms > expected_ms)
            self.factor = max(1.0, self.factor * math.exp(_STEP * (late - (1 - quantile))))

    def _expected(self, plan: Plan, histories: int, quantile: float) -> float:
        return self.factor * self.costs.expected_ms(plan, histories, quantile)
