"""How long requests take: stage by stage on a generated store (`mmrec bench-serving`), and plan by plan on any."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .config import IDENTITY, RecommenderConfig
from .inputs import ItemSpec
from .model import Recommender
from .online import STAGES, OnlineRecommender
from .planning import Costs, Times
from .store import ItemRows, ItemStore, Meta

__all__ = ["Latency", "Load", "calibrate", "generated", "measure"]

TOTAL = "total"
_PART = 1 << 18
_REOPENED = 5
_LEAST_CALLS = 200
_WARM_UP = 20
_DEPTHS, _BATCHES, _WIDTHS = (5, 10, 20, 50), (1, 8, 32), (4, 8, 16, 32, 64)
_LEAST_CALIBRATION, _MOST_CALIBRATION = 5, 400


@dataclass(frozen=True)
class Load:
    """What is asked: `batch` histories of `history` items at a time, `k` answers each."""

    history: int = 50
    batch: int = 1
    k: int = 10


@dataclass(frozen=True)
class Latency:
    """Milliseconds of a stage (or of all of them, "total") over `calls` calls, and of the first call after opening;
    `ann` is the kind of approximate retrieval, "" for none, and `recall` that of its 100 best items."""

    items: int
    width: int
    dtype: str
    threads: int
    history: int
    batch: int
    k: int
    stage: str
    calls: int
    p50_ms: float
    p95_ms: float
    p99_ms: float
    cold_ms: float
    ann: str = ""
    recall: float = 1.0


@contextmanager
def generated(
    items: int, dtype: str, *, width: int = 64, history: int = 50, ann: str | None = None, seed: int = 0,
    folder: Path | None = None,
) -> Iterator[OnlineRecommender]:  # fmt: skip
    """An untrained model over a store of random items, in `folder` or a temporary one: times do not depend on the
    values."""
    config = RecommenderConfig(modalities=(IDENTITY,), width=width, max_length=history, seed=seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Recommender(config, ItemSpec(1))
    generator = torch.Generator().manual_seed(seed)

    def parts() -> Iterator[ItemRows]:
        for begin in range(0, items, _PART):
            n = min(_PART, items - begin)
            names = [str(row) for row in range(begin, begin + n)]
            yield ItemRows(
                names, torch.randn(n, width, generator=generator), torch.ones(n, 1), torch.ones(n, dtype=torch.bool),
                torch.zeros(n, 16, dtype=torch.uint8), [f"Item {name}" for name in names], {},
            )  # fmt: skip

    with ExitStack() as stack:
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mmrec-")))
        store = ItemStore(folder)
        with store.writer() as writer:
            writer.create(Meta(width, dtype, (IDENTITY,), "generated", {}), parts())
        yield OnlineRecommender(model, store, ann=ann)


def measure(
    online: OnlineRecommender, load: Load, *, seconds: float, histories: Sequence[Sequence[str]] | None = None,
    seed: int = 0,
) -> list[Latency]:  # fmt: skip
    """One row per stage, and one for all of them, over at least 200 calls and `seconds`.

    `histories`: which are drawn from; None: random items of a generated store.
    """
    random = np.random.default_rng(seed)
    rows = online.version.alive_rows()

    def drawn() -> Sequence[str]:
        if histories is not None:
            return histories[int(random.integers(len(histories)))]
        return [str(row) for row in random.choice(rows, size=load.history)]

    def call(on: OnlineRecommender) -> dict[str, float]:
        asked = [drawn() for _ in range(load.batch)]
        taken: dict[str, float] = {}
        began = time.perf_counter()
        on.recommend(asked, load.k, seconds=taken)
        return {**taken, TOTAL: time.perf_counter() - began}

    for _ in range(_WARM_UP):
        call(online)
    cold = []
    for _ in range(_REOPENED):  # another mapping: its pages are in memory, but not in this process's tables
        again = OnlineRecommender(online.model, ItemStore(online.store.folder))
        again.version.index = online.version.index  # which takes minutes to build, and is not what is asked here
        cold.append(call(again))
    calls: list[dict[str, float]] = []
    until = time.perf_counter() + seconds
    while len(calls) < _LEAST_CALLS or time.perf_counter() < until:
        calls.append(call(online))
    found = []
    for stage in (*(stage for stage in STAGES if stage in calls[0]), TOTAL):
        p50, p95, p99 = 1e3 * np.percentile([taken[stage] for taken in calls], [50, 95, 99])
        first = 1e3 * float(np.median([taken[stage] for taken in cold]))
        found.append(
            Latency(
                len(online.version),
                online.version.meta.width,
                online.version.meta.dtype,
                torch.get_num_threads(),
                load.history,
                load.batch,
                load.k,
                stage,
                len(calls),
                float(p50),
                float(p95),
                float(p99),
                first,
                online.ann or "",
                1.0 if online.version.index is None else online.version.index.recall,
            )  # fmt: skip
        )
    return found


def calibrate(
    online: OnlineRecommender, *, depths: Sequence[int] = _DEPTHS, batches: Sequence[int] = _BATCHES,
    widths: Sequence[int] = _WIDTHS, k: int = 10, seconds: float = 1.0, seed: int = 0,
) -> Costs:  # fmt: skip
    """What answers cost on this machine, for `OnlineRecommender.costs`: so long as nothing else keeps it busy.

    Args:
        online: what will answer. Histories are random items of its store, of the model's `max_length`.
        depths: how many last items are read; the model's `max_length` is measured anyway, and none beyond it.
        batches: histories per call.
        widths: how many items are ranked again, where there is a reranker.
        k: items per answer.
        seconds: per case, of 5 to 400 calls; the p99 of few calls is the longest of them.
        seed: of the histories.

    Raises:
        ValueError: one of depths, batches or widths is below 1, or batches is empty, or the store.
    """
    for name, given in (("depths", depths), ("batches", batches), ("widths", widths)):
        if min((1, *given)) < 1:
            raise ValueError(f"{name} must be at least 1, got {min(given)}")
    if not batches:
        raise ValueError("batches must hold at least one number, got none")
    if not len(online.version):
        raise ValueError("online: its store has no items that histories could be of")
    alive = online.version.alive_rows()
    most, random = online.model.config.max_length, np.random.default_rng(seed)

    def histories(count: int) -> list[list[str]]:
        return [online.version.ids(row) for row in random.choice(alive, size=(count, most))]

    def timed(once: Callable[[list[list[str]]], float], count: int) -> Times:
        once(histories(count))
        taken: list[float] = []
        until = time.perf_counter() + seconds
        while len(taken) < _LEAST_CALIBRATION or (len(taken) < _MOST_CALIBRATION and time.perf_counter() < until):
            taken.append(1e3 * once(histories(count)))
        return Times.of(taken)

    def answered(depth: int) -> Callable[[list[list[str]]], float]:
        def once(given: list[list[str]]) -> float:
            began = time.perf_counter()
            online.recommend(given, k, depth=depth)
            return time.perf_counter() - began

        return once

    def again(width: int) -> Callable[[list[list[str]]], float]:
        def once(given: list[list[str]]) -> float:
            taken: dict[str, float] = {}
            online.recommend(given, k, rerank=width, seconds=taken)
            return taken["rerank"] + taken["answer"]  # what is to come once the best items are known

        return once

    read = sorted({*(depth for depth in depths if depth < most), most})
    retrieval = {depth: {count: timed(answered(depth), count) for count in sorted(set(batches))} for depth in read}
    rerank = {} if online.reranker is None else {width: timed(again(width), 1) for width in sorted(set(widths))}
    return Costs({**online.facts, "items": len(online.version), "k": k}, retrieval, rerank)
