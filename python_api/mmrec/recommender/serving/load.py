"""A load generator: requests at a given rate to a server in another process, and how long each took to be answered.

Requests arrive as a Poisson process that does not wait for answers, and each is timed from the moment it was due: a
server that stalls is charged for all that had to wait meanwhile (no coordinated omission).
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

__all__ = ["Loaded", "generated_server", "load"]

_START_SECONDS = 1200.0
_SETTLE = 0.1  # of the time, at its begin, before memory counts as that of a warm server


@dataclass
class Loaded:
    """What came of a load.

    Attributes:
        seconds: it took.
        ms: from due to answered, of each request that got a 200.
        statuses: how many requests got each; "lost" where the connection ended without one.
        memory_mib: the server's own resident memory, once per second.
    """

    seconds: float = 0.0
    ms: list[float] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    memory_mib: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, object]:
        """As JSON values; memory at the begin (once warm) and at the end are medians of a tenth of the time each."""
        p50, p95, p99 = np.percentile(self.ms, [50, 95, 99]) if self.ms else (float("nan"),) * 3
        tenth = max(1, len(self.memory_mib) // 10)
        warm = self.memory_mib[int(_SETTLE * len(self.memory_mib)) :]
        return {
            "seconds": round(self.seconds, 2), "requests": sum(self.statuses.values()),
            "statuses": dict(self.statuses), "per_second": round(len(self.ms) / max(self.seconds, 1e-9), 1),
            "p50_ms": float(p50), "p95_ms": float(p95), "p99_ms": float(p99),
            "longest_ms": float(max(self.ms, default=float("nan"))),
            "memory_begin_mib": float(np.median(warm[:tenth])) if warm else None,
            "memory_end_mib": float(np.median(warm[-tenth:])) if warm else None,
        }  # fmt: skip


class _Connection(asyncio.Protocol):
    """One request at a time over a connection that is kept."""

    def __init__(self) -> None:
        self._came = bytearray()
        self._end = -1
        self._answer: asyncio.Future[str] | None = None
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    async def ask(self, request: bytes) -> str:
        """The status that comes back."""
        assert self.transport is not None
        self._answer = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return await self._answer

    def data_received(self, data: bytes) -> None:
        self._came += data
        if self._end < 0:
            head = self._came.find(b"\r\n\r\n")
            if head < 0:
                return
            fields = self._came[:head].lower().split(b"\r\n")
            length = next(int(f[15:]) for f in fields if f.startswith(b"content-length:"))
            self._end = head + 4 + length
        if len(self._came) >= self._end and self._answer is not None:
            status = self._came[9:12].decode()
            self._came.clear()
            self._end = -1
            self._settle(status)

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self._settle("lost")

    def _settle(self, status: str) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(status)
        self._answer = None


def load(
    port: int, bodies: list[bytes], *, rate: float, seconds: float, pid: int | None = None, host: str = "127.0.0.1",
    path: str = "/recommend", seed: int = 0,
) -> Loaded:  # fmt: skip
    """Sends `bodies` in turn, `rate` per second for so many seconds, and waits for the answers.

    Args:
        port, host, path: where to.
        bodies: JSON.
        rate, seconds: see above.
        pid: of the server, to read its memory.
        seed: of the arrivals.
    """
    return asyncio.run(_load(port, host, path, bodies, rate, seconds, pid, seed))


async def _load(
    port: int, host: str, path: str, bodies: list[bytes], rate: float, seconds: float, pid: int | None, seed: int
) -> Loaded:
    loop, found = asyncio.get_running_loop(), Loaded()
    heads = f"POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\ncontent-length: "
    requests = [heads.encode() + str(len(body)).encode() + b"\r\n\r\n" + body for body in bodies]
    free: list[_Connection] = []

    async def one(request: bytes, due: float) -> None:
        try:
            while free and free[-1].transport is None:
                free.pop()
            if free:
                connection = free.pop()
            else:
                _, connection = await loop.create_connection(_Connection, host, port)
            status = await connection.ask(request)
        except OSError:
            found.statuses["lost"] += 1
            return
        found.statuses[status] += 1
        if status == "200":
            found.ms.append(1e3 * (time.perf_counter() - due))
        free.append(connection)

    random = np.random.default_rng(seed)
    began = due = time.perf_counter()
    sampled, running = began, set()
    for n in range(int(rate * seconds)):
        due += random.exponential(1 / rate)
        wait = due - time.perf_counter()
        if wait > 0:
            await asyncio.sleep(wait)
        task = asyncio.create_task(one(requests[n % len(requests)], due))
        running.add(task)
        task.add_done_callback(running.discard)
        if pid is not None and due - sampled >= 1:
            sampled = due
            found.memory_mib.append(_memory_mib(pid))
    await asyncio.gather(*running)
    found.seconds = time.perf_counter() - began
    for connection in free:
        if connection.transport is not None:
            connection.transport.close()
    return found


def _memory_mib(pid: int) -> float:
    """Without the pages of mapped files, which the kernel may take back."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024


@contextmanager
def generated_server(
    items: int, dtype: str, *, history: int = 50, threads: int | None = None, ann: str | None = None
) -> Iterator[tuple[int, int]]:
    """Port and process id of a server over a generated store, in a process of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    # The folder is this process's: the server ends by a signal, and clears nothing up.
    with tempfile.TemporaryDirectory(prefix="mmrec-") as folder:
        given = (port, folder, items, dtype, history, threads, ann)
        process = multiprocessing.get_context("spawn").Process(target=_serve, args=given)
        process.start()
        try:
            _wait_for(port, process)
            assert process.pid is not None
            yield port, process.pid
        finally:
            process.terminate()
            process.join()


def _wait_for(port: int, process: multiprocessing.process.BaseProcess) -> None:
    until = time.monotonic() + _START_SECONDS
    while time.monotonic() < until and process.is_alive():
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.05)
    raise RuntimeError("the server did not start" if process.is_alive() else f"the server ended: {process.exitcode}")


def _serve(port: int, folder: str, items: int, dtype: str, history: int, threads: int | None, ann: str | None) -> None:
    import torch

    from ..latency import generated
    from . import create_app, serve

    if threads is not None:
        torch.set_num_threads(threads)
    with generated(items, dtype, history=history, ann=ann, folder=Path(folder)) as online:
        serve(create_app(online), port=port, log_level="warning")


def random_bodies(items: int, history: int, k: int, *, count: int = 1000, seed: int = 0) -> list[bytes]:
    """Requests for random histories of a generated store."""
    random = np.random.default_rng(seed)
    rows = random.integers(items, size=(count, history))
    return [json.dumps({"history": [str(row) for row in one], "k": k}).encode() for one in rows]
