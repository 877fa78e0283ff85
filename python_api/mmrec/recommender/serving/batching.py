"""Requests that wait at the same time are answered together.

Nobody waits for company: one thread answers whatever has come while it answered those before. So a quiet server answers
each request at once, and a busy one in batches as large as its load makes them.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ..online import Answer, HistoryError, OnlineRecommender
from ..planning import Plan

__all__ = ["Answered", "Batcher", "ClosedError", "LateError", "OverloadedError", "Request"]

_LOG = logging.getLogger(__name__)
_MOST_RERANKED = 256  # items in one call, where requests say how many
_MOST_LISTED = 2000  # ids in one call that requests exclude or allow


class OverloadedError(Exception):
    """More requests wait than may."""


class LateError(Exception):
    """A request waited for longer than it may."""


class ClosedError(Exception):
    """The batcher takes no more requests."""


@dataclass(frozen=True)
class Request:
    """A history and what is asked for it, see `OnlineRecommender.recommend`."""

    history: Sequence[str]
    k: int = 10
    exclude_seen: bool = True
    depth: int | None = None
    rerank: int = 0
    budget_ms: float | None = None
    quantile: float = 0.99
    exclude: Sequence[str] = ()
    candidates: Sequence[str] | None = None


class Answered(NamedTuple):
    """An answer, how long the request waited for its turn, and with how many others it was answered.

    `seconds` has the time of each stage of the whole batch, in one request of the batch only.
    """

    answer: Answer
    waited_ms: float
    batch: int
    seconds: dict[str, float]


@dataclass(eq=False)
class _Job:
    request: Request
    future: asyncio.Future[Answered]
    arrived: float = field(default_factory=time.perf_counter)
    taken: bool = False

    def left_ms(self) -> float | None:
        """Of the budget; what is over is as good as nothing."""
        if self.request.budget_ms is None:
            return None
        return max(self.request.budget_ms - 1e3 * (time.perf_counter() - self.arrived), 1e-3)


class Batcher:
    """Answers requests of an event loop in one thread of its own.

    Args:
        online: answers.
        max_batch: so many requests at most are answered together.
        max_waiting: so many may wait; those beyond are refused at once.
        timeout: seconds that a request may wait for its turn.
    """

    def __init__(
        self, online: OnlineRecommender, *, max_batch: int = 32, max_waiting: int = 256, timeout: float = 1.0
    ) -> None:
        if max_batch < 1 or max_waiting < 1 or not timeout > 0:
            raise ValueError(
                f"max_batch, max_waiting and timeout must be above 0, got {max_batch}, {max_waiting} and {timeout}"
            )
        self.online = online
        self.max_batch, self.max_waiting, self.timeout = max_batch, max_waiting, timeout
        self._jobs: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._open: set[_Job] = set()  # neither answered nor refused; the event loop's alone
        self._thread = threading.Thread(target=self._run, name="mmrec-batcher", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """How many requests wait for their turn; to be asked on the event loop. Those that were late do not wait,
        though the queue has them until their turn."""
        return sum(not job.taken for job in self._open)

    async def recommend(self, request: Request) -> Answered:
        """The answer to a request, once its turn has come.

        Raises:
            OverloadedError, LateError, ClosedError: it was not answered.
            ValueError: what `OnlineRecommender.recommend` raises.
        """
        # Here, where it hurts nobody else.
        self.online.check(request.k, request.depth, request.rerank, request.budget_ms, request.quantile)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Answered] = loop.create_future()
        with self._changed:
            if self._closed:
                raise ClosedError
            if self.waiting >= self.max_waiting:
                raise OverloadedError
            job = _Job(request, future)
            self._jobs.append(job)
            self._changed.notify()
        # By the loop's clock: the thread that answers may be busy for longer.
        timer = loop.call_later(self.timeout, _expire, job)
        self._open.add(job)
        try:
            return await future
        finally:
            self._open.discard(job)
            timer.cancel()

    def close(self, timeout: float | None = None) -> None:
        """Takes no more requests, and returns when those that wait are answered, or after so many seconds."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._jobs and not self._closed:
                    self._changed.wait()
                if not self._jobs:
                    return
            batch: list[_Job] = []
            try:
                self._take(batch)
                self._answer(batch)
            except Exception as error:  # a defect must not end the thread that everybody waits for
                _LOG.exception("answering %d requests failed", len(batch))
                _settle([(job, error) for job in batch])

    def _take(self, batch: list[_Job]) -> None:
        """Those to answer next. Without the lock: others only append."""
        others: list[_Job] = []
        fits: _Fits | None = None
        try:
            while self._jobs and len(batch) < self.max_batch and len(others) < self.max_batch:
                job = self._jobs.popleft()
                if job.future.done():  # it was late, or nobody waits any more
                    continue
                others.append(job)  # until it is known to fit
                fits = fits or _Fits(self.online, job)
                if fits(job):
                    job.taken = True
                    batch.append(others.pop())
        finally:
            self._jobs.extendleft(reversed(others))

    def _answer(self, batch: list[_Job]) -> None:
        if not batch:
            return
        first = batch[0].request
        left = [ms for job in batch if (ms := job.left_ms()) is not None]
        began = time.perf_counter()
        seconds: dict[str, float] = {}
        exclude = [job.request.exclude for job in batch]
        candidates = [job.request.candidates or () for job in batch]
        try:
            answers = self.online.recommend(
                [job.request.history for job in batch], max(job.request.k for job in batch),
                exclude_seen=first.exclude_seen, exclude=exclude if any(exclude) else None,
                candidates=None if first.candidates is None else candidates, depth=first.depth, rerank=first.rerank,
                budget_ms=min(left) if left else None, quantile=first.quantile, seconds=seconds,
            )  # fmt: skip
        except HistoryError as error:  # of some of them; the others are answered without
            _settle([(batch[n], ValueError(f"history {why}")) for n, why in error.why.items()])
            self._answer([job for n, job in enumerate(batch) if n not in error.why])
            return
        found: list[tuple[_Job, Answered | Exception]] = []
        for n, (job, answer) in enumerate(zip(batch, answers, strict=True)):
            waited = 1e3 * (began - job.arrived)
            took = waited + answer.how.took_ms
            budget = job.request.budget_ms
            how = answer.how._replace(budget_ms=budget, in_time=budget is None or took <= budget)
            answer = _first(answer, job.request.k)._replace(how=how)
            found.append((job, Answered(answer, waited, len(batch), {} if n else seconds)))
        _settle(found)


class _Fits:
    """Whether jobs can be answered together with the first one of a batch and those that were taken since."""

    def __init__(self, online: OnlineRecommender, first: _Job) -> None:
        self._online, self._key = online, _key(first.request)
        self._count, self._left, self._listed = 0, math.inf, 0
        self._plan = self._planned(first.left_ms(), 1)

    def __call__(self, job: _Job) -> bool:
        if _key(job.request) != self._key:
            return False
        if self._count and (self._count + 1) * job.request.rerank > _MOST_RERANKED:
            return False
        listed = self._listed + len(job.request.exclude) + len(job.request.candidates or ())
        if self._count and listed > _MOST_LISTED:
            return False
        alone = job.left_ms()
        left = math.inf if alone is None else min(alone, self._left)
        # Company must neither cost anyone the plan that it would have had alone, nor give it a lesser one.
        if alone is not None and self._count:
            plans = {self._planned(alone, 1), self._planned(left, self._count + 1)}
            if plans != {self._plan}:
                return False
        self._count, self._left, self._listed = self._count + 1, left, listed
        return True

    def _planned(self, left_ms: float | None, histories: int) -> Plan | None:
        return None if left_ms is None else self._online.planned(left_ms, histories, self._key[-1])


def _key(request: Request) -> tuple[bool, bool, bool, int | None, int, bool, float]:
    """What requests that are answered together must have in common: who brings no lists is not held up by any."""
    return (
        request.exclude_seen, request.candidates is None, bool(request.exclude), request.depth, request.rerank,
        request.budget_ms is None, request.quantile,
    )  # fmt: skip


def _first(answer: Answer, k: int) -> Answer:
    return answer._replace(
        items=answer.items[:k], titles=answer.titles[:k], scores=answer.scores[:k], reranked=answer.reranked[:k],
        mass=answer.mass[:k], known=answer.known[:k],
    )  # fmt: skip


def _expire(job: _Job) -> None:
    if not job.taken and not job.future.done():
        job.future.set_exception(LateError())


def _settle(found: Sequence[tuple[_Job, Answered | Exception]]) -> None:
    """Hands results over to the event loop that waits for them."""

    def settle() -> None:
        for job, result in found:
            if job.future.done():
                continue
            if isinstance(result, Exception):
                job.future.set_exception(result)
            else:
                job.future.set_result(result)

    if not found:
        return
    try:
        found[0][0].future.get_loop().call_soon_threadsafe(settle)
    except RuntimeError:  # the loop is closed: nobody waits any more
        _LOG.warning("%d answers came after the event loop had ended", len(found))
