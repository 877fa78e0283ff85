"""What the routes of the server share: the thread that answers, the store's newest version, items on their way in."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Response

from ..online import OnlineRecommender
from ..store import StoreBusyError, StoreError, StoreVersion, StoreWriter
from . import batching
from .batching import Answered, Batcher
from .metrics import Metrics
from .responses import RETRY, answer_of, as_error, as_json
from .schemas import ItemsIn, RecommendIn, RemoveIn
from .upsert import Encode, encoded, item_rows

__all__ = ["Server", "Settings"]

_LOG = logging.getLogger(__name__)
_KIB = 1 << 10


@dataclass(frozen=True)
class Settings:
    """Limits and switches of a server.

    Attributes:
        max_batch, max_waiting, timeout: see `Batcher`.
        reload_seconds: how often a new version of the store is looked for.
        writable: `POST /items` and `POST /items/remove` are there.
        token: what those two must bring as their bearer token; None: nothing.
        max_body: bytes of a request, but for those two, which may have `max_items_body`.
        max_rerank: items that a request may have ranked again.
        max_writes: requests to those two that may wait for each other.
        hosts: names that requests may address this server by, against other sites' pages; None: any.
        close_seconds: what has begun may take when the server closes.
    """

    max_batch: int = 32
    max_waiting: int = 256
    timeout: float = 1.0
    reload_seconds: float = 1.0
    writable: bool = True
    token: str | None = None
    max_body: int = 1024 * _KIB
    max_items_body: int = 64 * 1024 * _KIB
    max_rerank: int = 64
    max_writes: int = 8
    hosts: tuple[str, ...] | None = None
    close_seconds: float = 10.0


class _UnwrittenError(Exception):
    """A version that could not be written, the disk's reason."""


class Server:
    """What the routes share."""

    def __init__(self, online: OnlineRecommender, settings: Settings, encode: Encode | None) -> None:
        self.online, self.settings, self.encode = online, settings, encode
        self.batcher: Batcher | None = None
        self._writing, self._writes, self._told = asyncio.Lock(), 0, ""
        self.metrics = Metrics(
            {
                "waiting": ("Requests that wait for their turn.", lambda: self.batcher.waiting if self.batcher else 0),
                "store_version": ("Version of the store.", lambda: self.online.version.number),
                "store_items": ("Items of the store.", lambda: len(self.online.version)),
                "slower": ("How much slower answers are than calibrated.", lambda: self.online.slower),
            }
        )

    @contextlib.asynccontextmanager
    async def lifespan(self, _app: FastAPI) -> AsyncIterator[None]:
        """Starts the thread that answers, and ends it when all is answered."""
        settings = self.settings
        self.batcher = Batcher(
            self.online, max_batch=settings.max_batch, max_waiting=settings.max_waiting, timeout=settings.timeout
        )
        watching = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            watching.cancel()
            await asyncio.to_thread(self.batcher.close, settings.close_seconds)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self.settings.reload_seconds)
            await self._reload()

    async def _reload(self) -> None:
        try:
            if await asyncio.to_thread(self.online.reload):
                _LOG.info("store: version %d, %d items", self.online.version.number, len(self.online.version))
            self._told = ""
        except Exception as error:  # whatever it is, the version before goes on, and so does looking for a next one
            self.metrics.reload_failures.inc()
            if str(error) != self._told:
                _LOG.warning("store: version %d goes on: %s", self.online.version.number, error)
            self._told = str(error)

    async def recommend(self, body: RecommendIn) -> Response:
        """`POST /recommend`."""
        began = time.perf_counter()
        response = await self._recommend(body)
        self.metrics.seconds.labels("/recommend").observe(time.perf_counter() - began)
        return response

    async def _recommend(self, body: RecommendIn) -> Response:
        if self.batcher is None:
            return as_error(503, "the server has not started", RETRY)
        if body.rerank > self.settings.max_rerank:
            return as_error(422, f"rerank: must be at most {self.settings.max_rerank}, got {body.rerank}")
        request = batching.Request(
            body.history, body.k, body.exclude_seen, body.depth, body.rerank, body.budget_ms, body.quantile,
            body.exclude, body.candidates,
        )  # fmt: skip
        try:
            found = await self.batcher.recommend(request)
        except ValueError as error:
            return as_error(422, str(error))
        except batching.OverloadedError:
            return as_error(503, f"{self.settings.max_waiting} requests wait already", RETRY)
        except batching.LateError:
            return as_error(503, f"the request waited for more than {self.settings.timeout:g} s", RETRY)
        except batching.ClosedError:
            return as_error(503, "the server is closing", RETRY)
        self._count(found)
        return as_json(answer_of(found, self.online.model.config.modalities))

    def _count(self, found: Answered) -> None:
        if found.seconds:
            self.metrics.batch.observe(found.batch)
            for stage, seconds in found.seconds.items():
                self.metrics.stages.labels(stage).observe(seconds)
        how = found.answer.how
        if how.budget_ms is not None:
            self.metrics.plans.labels(how.depth, how.rerank).inc()
            if not how.in_time:
                self.metrics.late.inc()

    async def upsert(self, body: ItemsIn) -> Response:
        """`POST /items`."""

        def write() -> dict[str, Any]:
            made = encoded(body.items, self.encode)  # which may take long, before others have to wait
            with self._writer() as (writer, now):
                rows = item_rows(body.items, now, made)
                new = int((now.rows(rows.ids) < 0).sum())
                return {"version": writer.upsert(rows), "new": new}

        return await self._write(write, f"{len(body.items)} items given")

    async def remove(self, body: RemoveIn) -> Response:
        """`POST /items/remove`."""

        def write() -> dict[str, Any]:
            ids = list(dict.fromkeys(body.ids))
            with self._writer() as (writer, now):
                there = now.rows(ids) >= 0
                unknown = [name for name, found in zip(ids, there, strict=True) if not found]
                return {"version": writer.remove(ids), "removed": int(there.sum()), "unknown": unknown}

        return await self._write(write, f"{len(body.ids)} items to remove")

    @contextlib.contextmanager
    def _writer(self) -> Iterator[tuple[StoreWriter, StoreVersion]]:
        with self.online.store.writer(timeout=1.0) as writer:
            # The newest version, not the one that is served: another process may have written since.
            now = self.online.store.current()
            self.online.check_version(now)
            try:
                yield writer, now
            except OSError as error:
                raise _UnwrittenError(error.strerror or str(error)) from error

    async def _write(self, write: Callable[[], dict[str, Any]], what: str) -> Response:
        """What `write` says of a new version, once that is served; one writes at a time."""
        if self._writes >= self.settings.max_writes:
            return as_error(503, f"{self._writes} requests that write wait already", RETRY)
        self._writes += 1
        try:
            async with self._writing:
                return await self._written(write, what)
        finally:
            self._writes -= 1

    async def _written(self, write: Callable[[], dict[str, Any]], what: str) -> Response:
        try:
            told = await asyncio.to_thread(write)
        except StoreBusyError as error:
            return as_error(503, str(error), RETRY)
        except StoreError as error:
            return as_error(409, str(error))
        except ValueError as error:
            return as_error(422, str(error))
        except _UnwrittenError as error:
            _LOG.error("store: it could not be written: %s", error)
            return as_error(507, f"the store could not be written: {error}")
        await self._reload()
        number = told["version"]
        if self.online.version.number < number:
            return as_error(503, f"version {number} of the store is written, but cannot be served now: {self._told}")
        told["items"] = len(self.online.version)
        _LOG.info("store: version %d, %d items after %s", number, told["items"], what)
        return as_json(told)

    def health(self) -> Response:
        """`GET /health`."""
        if self.batcher is None:
            return as_error(503, "the server has not started", RETRY)
        version, meta = self.online.version, self.online.version.meta
        reranker = self.online.reranker
        return as_json(
            {
                "status": "ok", "version": version.number, "items": len(version), "model": meta.model,
                "dtype": meta.dtype, "modalities": list(meta.modalities),
                "max_length": self.online.model.config.max_length,
                "reranker": "" if reranker is None else reranker.name, "budgets": self.online.costs is not None,
                "ann": self.online.ann or "", "recall": 1.0 if version.index is None else version.index.recall,
                "waiting": self.batcher.waiting,
            }
        )  # fmt: skip
