"""Runs the application in uvicorn."""

from __future__ import annotations

import gc
import sys
from typing import Any

import uvicorn
from fastapi import FastAPI

from .limits import impatient

__all__ = ["config", "serve"]

# Threads that want the interpreter get it after so many seconds (Python's own default is ten times as long): what
# comes in waits for the thread that answers, and that one for it.
_SWITCH_INTERVAL = 5e-4


def config(
    app: FastAPI, *, host: str = "127.0.0.1", port: int = 8000, read_seconds: float = 5.0, close_seconds: int = 10,
    max_connections: int = 1024, access_log: bool = False, log_level: str = "info",
) -> uvicorn.Config:  # fmt: skip
    """How uvicorn runs the application; see `serve`."""
    return uvicorn.Config(
        app, host=host, port=port, http=impatient(read_seconds), ws="none", timeout_graceful_shutdown=close_seconds,
        limit_concurrency=max_connections, access_log=access_log, log_level=log_level, server_header=False,
    )  # fmt: skip


def serve(app: FastAPI, **settings: Any) -> None:
    """Serves until SIGTERM or Ctrl-C; then what has begun is answered, for at most `close_seconds`.

    Args:
        app: of `create_app`.
        host, port: where; port 0 takes a free one, which the log names.
        read_seconds: what a client may take to send a request.
        close_seconds: see above.
        max_connections: those beyond get a 503.
        access_log: a line per request.
        log_level: of uvicorn.
    """
    sys.setswitchinterval(_SWITCH_INTERVAL)
    # What is there now stays: a full collection that goes through all of it, torch's modules included, stops everybody
    # for a tenth of a second.
    gc.collect()
    gc.freeze()
    uvicorn.Server(config(app, **settings)).run()
