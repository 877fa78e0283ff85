"""Answers in JSON, and errors as one line each."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException

from .batching import Answered
from .schemas import Error

__all__ = ["HANDLERS", "RETRY", "answer_of", "as_error", "as_json", "responses_of"]

_LOG = logging.getLogger(__name__)
RETRY = {"Retry-After": "1"}
_MOST_SHOWN = 40
_WHY = {
    400: "not readable", 401: "no or another token", 409: "the store was taken over by another model",
    413: "too long", 415: "no JSON", 422: "not valid",
    503: "too busy, closing, or another process writes to the store", 507: "the disk is full",
}  # fmt: skip


def answer_of(found: Answered, modalities: tuple[str, ...]) -> dict[str, Any]:
    """`RecommendOut` of an answer."""
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


def as_json(content: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A response."""
    # Escaped to ASCII: an id may hold half of a surrogate pair, which UTF-8 cannot.
    return Response(json.dumps(content, allow_nan=False), status, headers, "application/json")


def as_error(status: int, detail: str, headers: Mapping[str, str] | None = None) -> Response:
    """A response that says why not."""
    return as_json({"detail": detail}, status, headers)


def responses_of(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Of these errors, for the API's description."""
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
    return as_error(422, f"{where or 'body'}: {first['msg']}{shown}{more}")


def _shown(value: object) -> str:
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if isinstance(value, int) and abs(value) >= 1 << 63:
        return f"an integer of {value.bit_length()} bits"
    text = str(value)
    return repr(text[:_MOST_SHOWN] + "…" if len(text) > _MOST_SHOWN else value)


async def _refused(_request: Request, error: Exception) -> Response:
    assert isinstance(error, StarletteHTTPException)
    return as_error(error.status_code, str(error.detail), error.headers)


async def _failed(request: Request, error: Exception) -> Response:
    """The one way to a 500; it is in the log."""
    _LOG.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return as_error(500, "the server failed; its log says how")


HANDLERS = {RequestValidationError: _invalid, StarletteHTTPException: _refused, Exception: _failed}
