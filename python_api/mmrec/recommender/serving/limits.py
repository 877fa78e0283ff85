"""What a client may send: who may, in what form, how much, and for how long."""

from __future__ import annotations

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

__all__ = ["Guard", "impatient"]

Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Guard:
    """ASGI middleware that refuses requests before their body is read: without the token where one is needed, with a
    body that is no JSON, or a longer one than its path allows, by what it says of itself or by what comes. Counts all.

    Args:
        app: what is behind.
        limits: path → bytes of a request.
        default: of other paths.
        guarded: (method, path) → bearer token.
        count: is told path and status of every answer.
    """

    def __init__(
        self, app: Callable[..., Awaitable[None]], *, limits: Mapping[str, int], default: int,
        guarded: Mapping[tuple[str, str], str], count: Callable[[str, int], None],
    ) -> None:  # fmt: skip
        self.app, self.limits, self.default = app, dict(limits), default
        self.guarded, self.count = dict(guarded), count

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path, headers = scope["path"], dict(scope["headers"])
        limit = self.limits.get(path, self.default)
        too_long = f"body: must have at most {limit} bytes"

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.count(path, message["status"])
            await send(message)

        refusal = self._refusal(scope["method"], path, headers, limit, too_long)
        if refusal is not None:
            await _refuse(sent, *refusal)
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

        async def unless_refused(message: Message) -> None:
            if not refused:
                await sent(message)

        try:
            await self.app(scope, counted, unless_refused)
        finally:
            if refused:
                await _refuse(sent, 413, too_long)

    def _refusal(
        self, method: str, path: str, headers: Mapping[bytes, bytes], limit: int, too_long: str
    ) -> tuple[int, str] | None:
        token = self.guarded.get((method, path))
        if token is not None:
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(given, token.encode()):
                return 401, "authorization: needs the bearer token of this server"
        stated = headers.get(b"content-length", b"0")
        if not stated.isdigit() or int(stated) > limit:
            return 413, too_long
        # What pages of other sites can send without asking first is of another type.
        kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        if method == "POST" and kind != b"application/json":
            return 415, f"content-type: must be application/json, got {kind.decode('latin-1')[:100]!r}"
        return None


async def _refuse(send: Send, status: int, detail: str) -> None:
    body = json.dumps({"detail": detail}).encode()
    headers = [
        (b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), (b"connection", b"close")
    ]  # fmt: skip
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
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

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            # Whatever came has ended uvicorn's wait for a next request; where none has begun or runs, ours goes on.
            if self._timer is None and not self._answering() and not self.transport.is_closing():
                self._start()

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._start()

        def on_message_complete(self) -> None:
            self._stop()
            super().on_message_complete()

        def _answering(self) -> bool:
            return self.cycle is not None and not self.cycle.response_complete

        def _start(self) -> None:
            self._stop()
            self._timer = self.loop.call_later(seconds, self._give_up)

        def _stop(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _give_up(self) -> None:
            if self._answering() and self.flow.read_paused:
                self._start()  # it is we who do not read: requests before this one are being answered
            else:
                self.transport.close()

    return Impatient
