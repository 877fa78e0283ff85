"""What one client may take: bytes of a request, and time to send it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

__all__ = ["BodyLimit", "impatient"]

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class BodyLimit:
    """ASGI middleware: answers 413 to a request whose body is longer than its path allows, by what it says of itself or
    by what comes.

    Args:
        app: what is behind.
        limits: path → bytes.
        default: of other paths.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], limits: Mapping[str, int], default: int) -> None:
        self.app, self.limits, self.default = app, dict(limits), default

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        limit = self.limits.get(scope["path"], self.default)
        stated = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if not stated.isdigit() or int(stated) > limit:
            await _refuse(send, limit)
            return
        came, refused = 0, False

        async def counted() -> Message:
            nonlocal came, refused
            message = await receive()
            came += len(message.get("body", b""))
            if came > limit:
                refused = True
                return {"type": "http.disconnect"}  # the app reads no more
            return message

        async def sent(message: Message) -> None:
            if not refused:
                await send(message)

        try:
            await self.app(scope, counted, sent)
        finally:
            if refused:
                await _refuse(send, limit)


async def _refuse(send: Send, limit: int) -> None:
    body = json.dumps({"detail": f"body: must have at most {limit} bytes"}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()),
               (b"connection", b"close")]  # fmt: skip
    await send({"type": "http.response.start", "status": 413, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def impatient(seconds: float) -> type[HttpToolsProtocol]:
    """uvicorn's protocol, which hangs up when a request has not come in whole so many seconds after the connection was
    made or the request began. (Between requests uvicorn's own `timeout_keep_alive` holds.)"""

    class Impatient(HttpToolsProtocol):
        _timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._start()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop()
            super().connection_lost(exc)

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._start()

        def on_message_complete(self) -> None:
            self._stop()
            super().on_message_complete()

        def _start(self) -> None:
            self._stop()
            self._timer = self.loop.call_later(seconds, self.transport.close)

        def _stop(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    return Impatient
