"""A store with known answers, and servers of it in this process."""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import uvicorn
from fastapi import FastAPI

from mmrec.recommender import OnlineRecommender
from mmrec.recommender.serving.run import config

ITEMS, WIDTH = 300, 8  # of the store behind the fixture `online`


class Reversing:
    """A reranker that turns the order round, and takes some time."""

    name = "reversing"

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds

    def __call__(self, histories: Sequence[Sequence[str]], candidates: Sequence[Sequence[str]]) -> list[list[float]]:
        time.sleep(self.seconds)
        return [[float(place) for place in range(len(row))] for row in candidates]


def body(history: Sequence[object], **more: Any) -> dict[str, Any]:
    return {"history": [str(item) for item in history], **more}


def item(name: str, value: float = 1.0, **more: Any) -> dict[str, Any]:
    return {"id": name, "vector": [value] * WIDTH, "mass": {"identity": 1.0}, **more}


def same(found: dict[str, Any], online: OnlineRecommender, history: Sequence[str], k: int) -> bool:
    """Whether a response holds what the recommender answers in this process."""
    (wanted,) = online.recommend([list(history)], k)
    scores = [abs(one["score"] - score) < 1e-4 for one, score in zip(found["items"], wanted.scores, strict=True)]
    return [one["id"] for one in found["items"]] == wanted.items and all(scores)


class Client:
    """One connection."""

    def __init__(self, port: int) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)

    def __call__(
        self, method: str, path: str, content: bytes | dict[str, Any] | None = None, **headers: str
    ) -> tuple[int, Any]:
        raw = json.dumps(content).encode() if isinstance(content, dict) else content
        self.connection.request(method, path, raw, {"content-type": "application/json", **headers})
        response = self.connection.getresponse()
        text = response.read()
        told = response.headers.get("content-type", "").startswith("application/json")
        return response.status, json.loads(text) if told else text


@contextlib.contextmanager
def running(app: FastAPI, **settings: Any) -> Iterator[tuple[int, uvicorn.Server]]:
    """Port of a server in a thread of this process, and the server."""
    server = uvicorn.Server(config(app, port=0, log_level="warning", **settings))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        until = time.monotonic() + 30
        while not server.started and time.monotonic() < until:
            assert thread.is_alive()
            time.sleep(0.01)
        yield server.servers[0].sockets[0].getsockname()[1], server
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
