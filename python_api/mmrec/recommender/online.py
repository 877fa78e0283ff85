"""Answers to single requests, from an item store: history → item rows → user state → the best items → ranked again."""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from .answers import Answer, HistoryError, answers_of, lists_of, names_of, rows_of, windows_of
from .planning import QUANTILES, Costs, How, Plan, Planner

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .model import Recommender
    from .store import ItemStore, StoreVersion

__all__ = ["STAGES", "Answer", "HistoryError", "OnlineRecommender", "Reranker"]

# What a request's time goes to, in order; "rerank" only where items are ranked again.
STAGES = ("history", "user", "retrieval", "rerank", "answer")

_GROWN = 2  # a store that has become so many times as large, or as small, has other costs
_NO_COSTS = "budget_ms: what answers cost is not known; set costs, which calibrate measures"


class Reranker(Protocol):
    """Ranks the best items again, by their titles.

    Attributes:
        name: of what ranks; measured costs hold for this one.
    """

    name: str

    def __call__(
        self, histories: Sequence[Sequence[str]], candidates: Sequence[Sequence[str]]
    ) -> Sequence[Sequence[float]]:
        """A score of each history's candidates, the higher the better. Both are titles, histories oldest first."""
        ...


class OnlineRecommender:
    """A trained model over a store of its items. Thread-safe: it keeps nothing between calls but the store's version
    and how long answers take.

    Args:
        model: in eval mode from here on.
        store: of the items of this model.
        model_id: what the store must name as its model; None accepts any.
        reranker: what ranks the best items again, where that is asked for.
        ann: "ivf" or "hnsw": retrieval from an `AnnIndex` of that kind, built here and whenever the store has a new
            base; None reads all items for each request.

    Raises:
        StoreError: the store has no usable version, or is of another model.
    """

    def __init__(
        self,
        model: Recommender,
        store: ItemStore,
        *,
        model_id: str | None = None,
        reranker: Reranker | None = None,
        ann: str | None = None,
    ) -> None:
        self.model = model.eval()
        self.store = store
        self.model_id = model_id
        self.reranker = reranker
        self.ann = ann
        self._planner: Planner | None = None
        self._reloading = threading.Lock()
        self.version = self._usable(store.current(), None)

    @property
    def facts(self) -> dict[str, str | int]:
        """What measured costs have to agree with."""
        return {
            "dtype": self.version.meta.dtype,
            "max_length": self.model.config.max_length,
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count() or 1,
            "model": self.version.meta.model,
            "ann": self.ann or "",
            "reranker": "" if self.reranker is None else self.reranker.name,
        }

    @property
    def costs(self) -> Costs | None:
        """What answering costs on this machine (`mmrec.recommender.calibrate` measures it); `budget_ms` needs it."""
        return None if self._planner is None else self._planner.costs

    @costs.setter
    def costs(self, costs: Costs) -> None:
        self.check_costs(costs)
        self._planner = Planner(costs)

    def reload(self) -> bool:
        """Goes over to the newest version of the store, for later calls; whether there was a newer one.

        Raises:
            StoreError: it is of another model; the version before goes on serving.
        """
        with self._reloading:
            newest = self.store.current()
            if newest is self.version:
                return False
            self.version = self._usable(newest, self.version)
            return True

    def check_costs(self, costs: Costs) -> None:
        """ValueError unless `costs` were measured with what is here."""
        costs.check(self.facts)
        measured, items = int(costs.facts.get("items", 0)), len(self.version)
        if measured and not measured / _GROWN <= items <= measured * _GROWN:
            raise ValueError(f"costs were measured with {measured} items, this store has {items}: calibrate anew")

    @property
    def slower(self) -> float:
        """By which answers take longer than `costs` says, as far as calls with a budget have shown; at least 1."""
        return 1.0 if self._planner is None else self._planner.factor

    def planned(self, budget_ms: float, histories: int, quantile: float = 0.99) -> Plan:
        """How a call with so many histories would be answered now."""
        if self._planner is None:
            raise ValueError(_NO_COSTS)
        return self._planner.choose(budget_ms, histories, quantile)[0]

    def recommend(
        self,
        histories: Sequence[Sequence[str]],
        k: int = 10,
        *,
        exclude_seen: bool = True,
        exclude: Sequence[Sequence[str]] | None = None,
        candidates: Sequence[Sequence[str]] | None = None,
        depth: int | None = None,
        rerank: int = 0,
        budget_ms: float | None = None,
        quantile: float = 0.99,
        seconds: dict[str, float] | None = None,
    ) -> list[Answer]:
        """The k best items for each history.

        Args:
            histories: item ids of each user, oldest first. Ids that the store does not have are left out and named in
                the answer. Users need not be known to anyone; items that training never saw count by their content.
            k: items per answer.
            exclude_seen: leave a history's own items out.
            exclude: per history ids of other items to leave out.
            candidates: per history the ids of the only items that may be answered; None: any. Those that the store does
                not have are passed over.
            depth: how many last items are read, at most the model's `max_length`; None means that.
            rerank: how many of the best items the reranker ranks again; 0 for none.
            budget_ms: milliseconds for this call. Depth and reranking are then chosen, by what `costs` says, so that
                the call keeps the budget with probability `quantile`; `Answer.how` says what was done. Where nothing
                fits, the cheapest is done.
            quantile: see `budget_ms`; measured costs know those up to .99.
            seconds: takes the time of each of `STAGES`.

        Raises:
            ValueError: k, depth, rerank, the budget or quantile out of range, rerank without a reranker, a budget
                without `costs` or together with depth or rerank, or another number of lists than of histories.
            HistoryError: a history that is empty, or of which store or model know nothing.
        """
        began = time.perf_counter()
        version = self.version
        plan = self.check(k, depth, rerank, budget_ms, quantile)
        left_out, only = _lists(version, histories, exclude_seen, exclude, candidates)
        # Lists may have any length: what they took is known, and no part of what is planned.
        listed_ms = 1e3 * (time.perf_counter() - began)
        expected, planner = None, self._planner
        if budget_ms is not None and planner is not None:
            plan, expected = planner.choose(max(budget_ms - listed_ms, 1e-3), len(histories), quantile)
        taken = seconds if seconds is not None else {}
        with torch.inference_mode():
            with _timed(taken, "history"):
                rows, offsets, unknown = rows_of(version, histories)
            with _timed(taken, "user"):
                query = self._states(version, rows, offsets, plan.depth)
            with _timed(taken, "retrieval"):
                if left_out is None and exclude_seen:
                    left_out = torch.from_numpy(offsets), torch.from_numpy(rows)
                most = min(max(k, plan.rerank), max(len(version), 1))
                found = version.top_k(query, most, exclude=left_out, candidates=only)
            best, scores = found.ids, found.scores
            if plan.rerank and expected is not None and budget_ms is not None and planner is not None:
                left = budget_ms - 1e3 * (time.perf_counter() - began)
                plan = planner.again(plan, left, len(histories), quantile)
            reranked: list[list[float]] = [[] for _ in histories]
            if plan.rerank:
                with _timed(taken, "rerank"):
                    best, scores, reranked = self._rerank(version, rows, offsets, best, scores, plan)
            with _timed(taken, "answer"):
                answers = answers_of(version, best[:, :k], scores[:, :k])
        took = 1e3 * (time.perf_counter() - began)
        if expected is not None and planner is not None:
            planner.learn(took - listed_ms, expected, quantile)
            expected += listed_ms
        how = How(*plan, took, budget_ms, expected, budget_ms is None or took <= budget_ms)
        return [
            answer._replace(reranked=again[:k], unknown=gone, how=how)
            for answer, again, gone in zip(answers, reranked, unknown, strict=True)
        ]

    def check(self, k: int, depth: int | None, rerank: int, budget_ms: float | None, quantile: float) -> Plan:
        """What `recommend` is asked for, if it can be done, as far as the histories do not decide that; its errors."""
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        most = self.model.config.max_length
        if depth is not None and not 1 <= depth <= most:
            raise ValueError(f"depth must be from 1 to {most}, got {depth}")
        if rerank < 0:
            raise ValueError(f"rerank must be at least 0, got {rerank}")
        if rerank and self.reranker is None:
            raise ValueError(f"rerank: there is no reranker that could rank {rerank} items again")
        if budget_ms is not None:
            if not budget_ms > 0:
                raise ValueError(f"budget_ms must be above 0, got {budget_ms}")
            if not 0 < quantile <= QUANTILES[-1]:
                raise ValueError(f"quantile must be above 0 and at most {QUANTILES[-1]}, got {quantile}")
            if depth is not None or rerank:
                raise ValueError("budget_ms chooses depth and rerank; give it or them")
            if self._planner is None:
                raise ValueError(_NO_COSTS)
        return Plan(depth or most, rerank)

    def _rerank(
        self, version: StoreVersion, rows: np.ndarray, offsets: np.ndarray, ids: Tensor, scores: Tensor, plan: Plan
    ) -> tuple[Tensor, Tensor, list[list[float]]]:
        """Ids and scores with the first `plan.rerank` of each row in the order of the reranker, and its scores."""
        assert self.reranker is not None
        names = [names_of(version, rows[max(a, b - plan.depth) : b]) for a, b in itertools.pairwise(offsets.tolist())]
        head = ids[:, : plan.rerank]
        counts = (head >= 0).sum(1).tolist()
        found = self.reranker(names, [names_of(version, row[:n]) for row, n in zip(head, counts, strict=True)])
        order = torch.arange(ids.shape[1]).repeat(len(ids), 1)
        reranked = []
        for row, (again, count) in enumerate(zip(found, counts, strict=True)):
            ordered, places = torch.as_tensor(again, dtype=torch.float64).sort(descending=True, stable=True)
            order[row, :count] = places
            reranked.append(ordered.tolist())
        return ids.gather(1, order), scores.gather(1, order), reranked

    def _states(self, version: StoreVersion, rows: np.ndarray, offsets: np.ndarray, depth: int) -> Tensor:
        """The state after each history's last item, of its last `depth` items."""
        starts, ends = windows_of(version, rows, offsets, depth)
        lengths = ends - starts
        if len(lengths) == 1:
            read = rows[starts[0] : ends[0]]
        else:
            read = rows[
                np.repeat(starts - np.concatenate([[0], lengths[:-1].cumsum()]), lengths) + np.arange(lengths.sum())
            ]
        vectors = version.vectors(read)
        device = self.model.device
        places = torch.from_numpy(np.concatenate([[0], lengths.cumsum()]))
        index = torch.arange(len(read), device=device)
        return self.model.states(vectors.to(device), index, places.to(device), last=True).to(vectors.device)

    def check_version(self, version: StoreVersion) -> None:
        """StoreError unless the version holds items of this model."""
        from .store import StoreError

        config = self.model.config
        if self.model_id is not None and version.meta.model != self.model_id:
            raise StoreError(
                f"{self.store.folder} holds items of model {version.meta.model}, this is {self.model_id}: index it anew"
            )
        if (version.meta.width, version.meta.modalities) != (config.width, config.modalities):
            raise StoreError(
                f"{self.store.folder} holds vectors of width {version.meta.width} of {list(version.meta.modalities)}, "
                f"the model has {config.width} of {list(config.modalities)}"
            )

    def _usable(self, version: StoreVersion, before: StoreVersion | None) -> StoreVersion:
        from .store import AnnIndex

        self.check_version(version)
        # An index of nothing would find nothing; what came since the base was written is read in any case.
        if self.ann is not None and version.index is None and version.base_alive:
            known = None if before is None else before.index
            same = known is not None and known.base == version.files[0]
            version.index = known if same else AnnIndex.build(version, self.ann)
        return version


def _lists(
    version: StoreVersion, histories: Sequence[Sequence[str]], exclude_seen: bool,
    exclude: Sequence[Sequence[str]] | None, candidates: Sequence[Sequence[str]] | None,
) -> tuple[tuple[Tensor, Tensor] | None, tuple[Tensor, Tensor] | None]:  # fmt: skip
    """What is left out, seen items included, and what alone may be answered; None where no list says so."""
    for name, given in (("exclude", exclude), ("candidates", candidates)):
        if given is not None and len(given) != len(histories):
            raise ValueError(f"{name} must have a list for each of {len(histories)} histories, got {len(given)}")
    only = None if candidates is None else lists_of(version, candidates)
    if exclude is None:
        return None, only
    seen = histories if exclude_seen else [()] * len(histories)
    return lists_of(version, [[*a, *b] for a, b in zip(seen, exclude, strict=True)]), only


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - began
