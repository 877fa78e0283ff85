"""The server: answers over HTTP, from the newest version of a store."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from ..online import OnlineRecommender
from ..store import StoreBusyError, StoreError
from . import batching
from .batching import Answered, Batcher
from .limits import Guard
from .metrics import CONTENT_TYPE, Metrics
from .schemas import Error, FoundItems, Health, ItemsIn, ItemsOut, RecommendIn, RecommendOut
from .upsert import Encode, encoded, item_rows

__all__ = ["Settings", "create_app"]

_LOG = logging.getLogger(__name__)
_KIB = 1 << 10
_MOST_SHOWN = 40
_RETRY, _KEPT = {"Retry-After": "1"}, {"cache-control": "max-age=3600"}
_NO_IMAGE = (
    """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 2 3"><rect width="2" height="3" fill="#8885"/></svg>"""
)
_WHY = {
    400: "not readable", 401: "no or another token", 409: "the store was taken over by another model",
    413: "too long", 415: "no JSON", 422: "not valid",
    503: "too busy, closing, or another process writes to the store", 507: "the disk is full",
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Limits and switches of a server.

    Attributes:
        max_batch, max_waiting, timeout: see `Batcher`.
        reload_seconds: how often a new version of the store is looked for.
        writable: `POST /items` is there.
        token: what `POST /items` must bring as its bearer token; None: nothing.
        max_body: bytes of a request, but for `POST /items`, which may have `max_items_body`.
        max_rerank: items that a request may have ranked again.
        max_writes: requests to `POST /items` that may wait for each other.
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


def create_app(
    online: OnlineRecommender,
    settings: Settings | None = None,
    *,
    image: Callable[[str], Path | None] | None = None,
    encode: Encode | None = None,
) -> FastAPI:
    """An ASGI application over `online`, whose store other processes may write to meanwhile.

    Args:
        online: answers; with `costs`, requests may state a budget.
        settings: None for the defaults.
        image: item id → file of its image, or None where it has none, for the page.
        encode: items by column → rows of the store: without it `POST /items` takes vectors only.
    """
    settings = settings or Settings()
    server = _Server(online, settings, encode)
    app = FastAPI(
        title="mmrec", lifespan=server.lifespan, telemetry=None, responses=_responses(400, 413, 415, 422), version="1",
        description="Multimodal recommendations within a budget of milliseconds.",
    )  # fmt: skip
    token = {} if settings.token is None else {("POST", "/items"): settings.token}
    app.add_middleware(
        Guard, limits={"/items": settings.max_items_body}, default=settings.max_body, guarded=token,
        count=server.metrics.count,
    )  # fmt: skip
    if settings.hosts is not None:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(settings.hosts))
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(StarletteHTTPException, _refused)
    app.add_exception_handler(Exception, _failed)
    app.state.server = server

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(files(__package__).joinpath("page.html").read_text(encoding="utf-8"))

    @app.post("/recommend", response_model=RecommendOut, responses=_responses(503))
    async def recommend(body: RecommendIn) -> Response:
        """The best items after a history."""
        return await server.recommend(body)

    @app.get("/items", response_model=FoundItems)
    async def find(
        text: str = Query("", max_length=200, description="in any case; empty: any items"),
        limit: int = Query(20, ge=1, le=100),
    ) -> Response:
        """Items whose title or id holds a text."""
        version = online.version
        rows = await asyncio.to_thread(version.find, text, limit)
        found = zip(version.ids(rows), version.titles(rows), strict=True)
        return _json({"items": [{"id": name, "title": title} for name, title in found]})

    if settings.writable:

        @app.post("/items", response_model=ItemsOut, responses=_responses(401, 409, 503, 507))
        async def upsert(body: ItemsIn) -> Response:
            """Puts items in: they are on the disk, and served, when this answers."""
            return await server.upsert(body)

    @app.get("/health", response_model=Health, responses=_responses(503))
    async def health() -> Response:
        """That the server can answer."""
        return server.health()

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(server.metrics.text(), headers={"content-type": CONTENT_TYPE})

    @app.get("/images/{item:path}", include_in_schema=False)
    async def poster(item: str) -> Response:
        path = None if image is None else image(item)
        if path is None or not path.is_file():
            return Response(_NO_IMAGE, media_type="image/svg+xml")
        return FileResponse(path, headers=_KEPT)

    return app


class _UnwrittenError(Exception):
    """Items that could not be written, the disk's reason."""


class _Server:
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
        began = time.perf_counter()
        response = await self._recommend(body)
        self.metrics.seconds.labels("/recommend").observe(time.perf_counter() - began)
        return response

    async def _recommend(self, body: RecommendIn) -> Response:
        if self.batcher is None:
            return _error(503, "the server has not started", _RETRY)
        if body.rerank > self.settings.max_rerank:
            return _error(422, f"rerank: must be at most {self.settings.max_rerank}, got {body.rerank}")
        request = batching.Request(
            body.history, body.k, body.exclude_seen, body.depth, body.rerank, body.budget_ms, body.quantile
        )
        try:
            found = await self.batcher.recommend(request)
        except ValueError as error:
            return _error(422, str(error))
        except batching.OverloadedError:
            return _error(503, f"{self.settings.max_waiting} requests wait already", _RETRY)
        except batching.LateError:
            return _error(503, f"the request waited for more than {self.settings.timeout:g} s", _RETRY)
        except batching.ClosedError:
            return _error(503, "the server is closing", _RETRY)
        self._count(found)
        return _json(_answer(found, self.online.model.config.modalities))

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
        if self._writes >= self.settings.max_writes:
            return _error(503, f"{self._writes} requests with items wait already", _RETRY)
        self._writes += 1
        try:
            async with self._writing:
                return await self._upsert(body)
        finally:
            self._writes -= 1

    async def _upsert(self, body: ItemsIn) -> Response:
        def write() -> tuple[int, int]:
            made = encoded(body.items, self.encode)  # which may take long, before others have to wait
            with self.online.store.writer(timeout=1.0) as writer:
                # The newest version, not the one that is served: another process may have written since.
                now = self.online.store.current()
                self.online.check_version(now)
                rows = item_rows(body.items, now, made)
                try:
                    return writer.upsert(rows), int((now.rows(rows.ids) < 0).sum())
                except OSError as error:
                    raise _UnwrittenError(error.strerror or str(error)) from error

        try:
            number, new = await asyncio.to_thread(write)
        except StoreBusyError as error:
            return _error(503, str(error), _RETRY)
        except StoreError as error:
            return _error(409, str(error))
        except ValueError as error:
            return _error(422, str(error))
        except _UnwrittenError as error:
            _LOG.error("store: items could not be written: %s", error)
            return _error(507, f"the items could not be written: {error}")
        await self._reload()
        if self.online.version.number < number:
            return _error(
                503, f"the items are in version {number} of the store, which cannot be served now: {self._told}"
            )
        _LOG.info("store: version %d with %d new of %d items given", number, new, len(body.items))
        return _json({"version": number, "items": len(self.online.version), "new": new})

    def health(self) -> Response:
        if self.batcher is None:
            return _error(503, "the server has not started", _RETRY)
        version, meta = self.online.version, self.online.version.meta
        reranker = self.online.reranker
        return _json(
            {
                "status": "ok", "version": version.number, "items": len(version), "model": meta.model,
                "dtype": meta.dtype, "modalities": list(meta.modalities),
                "max_length": self.online.model.config.max_length,
                "reranker": "" if reranker is None else reranker.name, "budgets": self.online.costs is not None,
                "ann": self.online.ann or "", "recall": 1.0 if version.index is None else version.index.recall,
                "waiting": self.batcher.waiting,
            }
        )  # fmt: skip


def _answer(found: Answered, modalities: tuple[str, ...]) -> dict[str, Any]:
    answer, how = found.answer, found.answer.how
    again = [*answer.reranked, *[None] * (len(answer.items) - len(answer.reranked))]
    columns = (answer.items, answer.titles, answer.scores, again, answer.mass, answer.known)
    return {
        "items": [
            {
                "id": item, "title": title, "score": score, "rerank_score": rerank,
                "mass": dict(zip(modalities, mass, strict=True)), "known": known,
            }
            for item, title, score, rerank, mass, known in zip(*columns, strict=True)
        ],
        "unknown": answer.unknown,
        "version": answer.version,
        "how": {
            "depth": how.depth, "rerank": how.rerank, "batch": found.batch, "waited_ms": found.waited_ms,
            "took_ms": how.took_ms, "budget_ms": how.budget_ms, "expected_ms": how.expected_ms, "in_time": how.in_time,
        },
    }  # fmt: skip


def _json(content: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    # Escaped to ASCII: an id may hold half of a surrogate pair, which UTF-8 cannot.
    return Response(json.dumps(content, allow_nan=False), status, headers, "application/json")


def _error(status: int, detail: str, headers: Mapping[str, str] | None = None) -> Response:
    return _json({"detail": detail}, status, headers)


def _responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": Error, "description": _WHY[status]} for status in statuses}


async def _invalid(_request: Request, error: Exception) -> Response:
    """What was wrong with a request, in one line."""
    assert isinstance(error, RequestValidationError)
    found = error.errors()
    first = found[0]
    where = ".".join(str(part) for part in first["loc"] if part not in ("body", "query"))
    given = first.get("input")
    shown = f", got {_shown(given)}" if isinstance(given, (str, int, float, bool, list)) else ""
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return _error(422, f"{where or 'body'}: {first['msg']}{shown}{more}")


def _shown(value: object) -> str:
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, int) and abs(value) >= 1 << 63:
        return f"an integer of {value.bit_length()} bits"
    text = str(value)
    return repr(text[:_MOST_SHOWN] + "…" if len(text) > _MOST_SHOWN else value)


async def _refused(_request: Request, error: Exception) -> Response:
    assert isinstance(error, StarletteHTTPException)
    return _error(error.status_code, str(error.detail), error.headers)


async def _failed(request: Request, error: Exception) -> Response:
    """The one way to a 500; it is in the log."""
    _LOG.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return _error(500, "the server failed; its log says how")
