"""A real server under abuse: malformed requests, slow clients, reload under load, closing. Nothing is lost, no answer
is wrong, and no request ends in a 500.

MMREC_FAULTS multiplies how many malformed requests are sent: 10 000 and some with 5.
"""

from __future__ import annotations

import json
import os
import random
import socket
import threading
import time

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httptools")

import numpy as np
import torch
from serving_helpers import WIDTH, Client, Reversing, body, item, running, same

from mmrec.recommender import ItemStore
from mmrec.recommender.serving import Settings, create_app, load
from mmrec.recommender.store import ItemRows

FAULTS = int(os.environ.get("MMREC_FAULTS", "1"))
HISTORY = ["5", "9", "200"]


def _value(rng: random.Random, depth: int = 0):
    simple = [
        lambda: rng.choice([None, True, False, 0, -1, 1, 2**63, -(2**200), 1e308, 1e-308, 0.5, "", "5", "gone"]),
        lambda: "".join(chr(rng.randrange(0x110000)) for _ in range(rng.randrange(20))),
        lambda: rng.choice(["\x00", "\ud800", "‮", "' OR 1=1 --", "<script>", "../../etc/passwd", "5" * 600]),
        lambda: rng.uniform(-1e6, 1e6),
    ]
    if depth < 3 and rng.random() < 0.4:
        if rng.random() < 0.5:
            return [_value(rng, depth + 1) for _ in range(rng.randrange(5))]
        return {_word(rng): _value(rng, depth + 1) for _ in range(rng.randrange(5))}
    return rng.choice(simple)()


def _word(rng: random.Random) -> str:
    words = "history k depth rerank budget_ms quantile exclude_seen exclude candidates items ids id vector mass".split()
    return rng.choice([*words, "title", "known", "identity", "x"])


def _malformed(rng: random.Random) -> tuple[str, str, bytes]:
    """Method, path and body of a request that is mostly wrong, somewhere."""
    path = rng.choice(["/recommend"] * 5 + ["/items"] * 2 + ["/items/remove"])
    good = {"/recommend": body(HISTORY, k=3), "/items": {"items": [item("5")]}, "/items/remove": {"ids": ["299"]}}[path]
    kind = rng.randrange(6)  # 5 leaves it good
    if kind == 0:
        good[_word(rng)] = _value(rng)
    elif kind == 1:
        good = _value(rng)
    elif kind == 2 and path == "/recommend":
        good["history"] = [_value(rng, 2) for _ in range(rng.randrange(4))]
    elif kind == 2 and path == "/items":
        good["items"][0][_word(rng)] = _value(rng)
    elif kind == 2:
        good["ids"] = [_value(rng, 2) for _ in range(rng.randrange(4))]
    raw = bytearray(json.dumps(good).encode())
    if kind == 3:
        for _ in range(rng.randrange(1, 4)):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
    elif kind == 4:
        raw = raw[: rng.randrange(len(raw))]
    return rng.choice(["POST"] * 9 + ["PUT"]), path, bytes(raw)


def test_malformed_requests(online, caplog):
    """What is refused says why; what is answered, since chance made it a good request, is answered right."""
    rng, statuses = random.Random(0), {}
    with running(create_app(online)) as (port, _):
        client = Client(port)
        for n in range(2000 * FAULTS):
            method, path, raw = _malformed(rng)
            status, found = client(method, path, raw)
            assert status in (200, 400, 405, 413, 422), (status, raw)
            if status != 200:
                assert isinstance(found["detail"], str) and found["detail"]
            elif path == "/recommend":
                assert len(found["items"]) <= 1000 and found["how"]["batch"] == 1
            statuses[status] = statuses.get(status, 0) + 1
            if n % 100 == 0:
                status, found = client("POST", "/recommend", body(HISTORY, k=5))
                assert status == 200 and same(found, online, HISTORY, 5)
        status, found = client("POST", "/recommend", body(HISTORY, k=5))
        assert status == 200 and same(found, online, HISTORY, 5)
    assert min(statuses[status] for status in (200, 405, 422)) > 50
    assert "failed" not in caplog.text
    version = ItemStore(online.store.folder).current()
    rows = np.arange(version.num_rows)
    assert version.number == online.version.number
    assert version.vectors(rows[version.alive(rows)]).isfinite().all()


@pytest.mark.parametrize(
    "raw",
    [
        b"\x00\x01\x02\x03" * 100,
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 5000 + b"\r\n",
        b"POST /recommend HTTP/1.1\r\ncontent-length: 5\r\ncontent-length: 7\r\n\r\n{}",
        b"POST /recommend HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"POST /recommend HTTP/1.1\r\ncontent-length: 99999999999999999999999\r\n\r\n",
        b"GET /items?text=%ff%fe&limit=%00 HTTP/1.1\r\n\r\n",
        b"GET /images/%ff%00..%2f HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n",
    ],
)
def test_bytes_that_are_no_http(online, raw, caplog):
    with running(create_app(online), read_seconds=0.3) as (port, _):
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            connection.sendall(raw)
            connection.shutdown(socket.SHUT_WR)
            answer = b""
            try:
                while part := connection.recv(1 << 16):
                    answer += part
            except ConnectionResetError:
                pass
        assert not answer or int(answer[9:12]) < 500, answer[:200]
        assert Client(port)("POST", "/recommend", body(HISTORY, k=5))[0] == 200
    assert "failed" not in caplog.text


def test_slow_clients_are_hung_up_on_and_hold_nobody_up(online):
    parts = (b"POST /recomm", b"POST /recommend HTTP/1.1\r\nhost: x\r\n", b"")
    parts = (*parts, b"POST /recommend HTTP/1.1\r\ncontent-type: application/json\r\ncontent-length: 100\r\n\r\n{")
    with running(create_app(online), read_seconds=1.0) as (port, server):
        slow = [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(200)]
        for n, connection in enumerate(slow):
            connection.sendall(parts[n % len(parts)])
        client, began = Client(port), time.monotonic()
        for _ in range(50):
            assert client("POST", "/recommend", body(HISTORY, k=5))[0] == 200
        assert time.monotonic() - began < 5
        time.sleep(max(0.0, 0.7 - (time.monotonic() - began)))
        for connection in slow[1::4]:
            connection.sendall(b"x: y\r\n")  # a byte now and then buys no time
        for n, connection in enumerate(slow):
            told = b""
            while part := connection.recv(1 << 16):  # b"" once the server has hung up
                told += part
            assert not told or b" 400 " in told.split(b"\r\n")[0], (n, told)
            connection.close()
        assert time.monotonic() - began < 8
        until = time.monotonic() + 5
        while len(server.server_state.connections) > 1 and time.monotonic() < until:
            time.sleep(0.01)
        assert len(server.server_state.connections) <= 1
        assert client("POST", "/recommend", body(HISTORY, k=5))[0] == 200


def test_a_connection_may_be_kept_for_longer_than_a_request_takes(online):
    with running(create_app(online), read_seconds=0.2) as (port, _):
        client = Client(port)
        for _ in range(3):
            assert client("POST", "/recommend", body(HISTORY, k=5))[0] == 200
            time.sleep(0.4)


@pytest.mark.parametrize(
    "begin",
    [
        b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n",
        b"POST /nothing HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 4\r\n\r\n",
    ],
)
def test_a_byte_after_an_answer_does_not_hold_a_connection(online, begin):
    with (
        running(create_app(online), read_seconds=0.4) as (port, _),
        socket.create_connection(("127.0.0.1", port), timeout=10) as connection,
    ):
        connection.sendall(begin)
        assert connection.recv(1 << 16)
        connection.sendall(b"\r\n\r\n")  # ends uvicorn's wait for a next request, and begins none
        began, told = time.monotonic(), b"x"
        while told:
            told = connection.recv(1 << 16)
        assert time.monotonic() - began < 3


def test_pipelined_requests_are_answered_however_long_the_first_takes(online):
    online.reranker = Reversing(1.0)
    raw = json.dumps(body(HISTORY, k=5, rerank=4)).encode()
    head = "POST /recommend HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: "
    one = head.encode() + str(len(raw)).encode() + b"\r\n\r\n" + raw
    with (
        running(create_app(online), read_seconds=0.3) as (port, _),
        socket.create_connection(("127.0.0.1", port), timeout=20) as connection,
    ):
        connection.sendall(one + one[:-10])
        time.sleep(0.1)
        connection.sendall(one[-10:])
        told = b""
        while told.count(b"HTTP/1.1 200") < 2:
            part = connection.recv(1 << 16)
            assert part, told
            told += part


def test_reload_under_load(online):
    """While another writer makes versions, some of them compactions, every answer is that of the version it names."""
    wrong, answered, versions = [], [0], set()
    titles: dict[int, str | None] = {1: None}
    stop = threading.Event()

    def rows(number: int) -> ItemRows:
        """An item that tells of which version it is; sometimes a new item beside it."""
        ids = ["best", *([f"new {number}"] if number % 3 == 0 else [])]
        n = len(ids)
        return ItemRows(
            ids, torch.ones(n, WIDTH), torch.ones(n, 1), torch.zeros(n).bool(), torch.zeros(n, 16, dtype=torch.uint8),
            [f"of version {number}", *[""] * (n - 1)], {},
        )  # fmt: skip

    def ask(port: int) -> None:
        client = Client(port)
        while not stop.is_set():
            status, found = client("POST", "/recommend", body(["5", "9"], k=1000))
            title = next((one["title"] for one in found.get("items", ()) if one["id"] == "best"), None)
            if status != 200 or title != titles[found["version"]]:
                wrong.append((status, title, found))
            versions.add(found.get("version"))
            answered[0] += 1

    # What waits for a host that stands still for a second is refused, which is not what this is about.
    with running(create_app(online, Settings(reload_seconds=0.005, timeout=30))) as (port, _):
        threads = [threading.Thread(target=ask, args=(port,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        store = ItemStore(online.store.folder)
        for number in range(2, 42):
            compaction = number % 10 == 0
            titles[number] = titles[number - 1] if compaction else f"of version {number}"  # before anyone can see it
            with store.writer() as writer:
                assert (writer.compact() if compaction else writer.upsert(rows(number))) == number
            time.sleep(0.02)
        time.sleep(0.1)
        stop.set()
        for thread in threads:
            thread.join(20)
    assert not wrong and answered[0] > 100 and len(versions) > 10 and max(versions) == 41


def test_items_put_in_under_load_are_there_at_once(online):
    """A client that was told of a version never gets an older one afterwards."""
    stop, failures = threading.Event(), []

    def ask(port: int) -> None:
        client, newest = Client(port), 0
        while not stop.is_set():
            status, found = client("POST", "/recommend", body(HISTORY, k=3))
            if status != 200 or found["version"] < newest:
                failures.append((status, found))
            newest = max(newest, found.get("version", 0))

    with running(create_app(online, Settings(timeout=30))) as (port, _):
        threads = [threading.Thread(target=ask, args=(port,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        client = Client(port)
        for n in range(30):
            status, told = client("POST", "/items", {"items": [item(f"new {n}", title=f"New {n}")]})
            assert (status, told) == (200, {"version": n + 2, "items": 301 + n, "new": 1})
            status, found = client("POST", "/recommend", body([f"new {n}"], k=3))
            assert status == 200 and found["unknown"] == [] and found["version"] >= n + 2
        stop.set()
        for thread in threads:
            thread.join(20)
    assert not failures


def test_closing_answers_what_has_begun(online):
    online.reranker = Reversing(0.5)
    found = []

    def ask(port: int) -> None:
        found.append(Client(port)("POST", "/recommend", body(HISTORY, k=5, rerank=4)))

    with running(create_app(online)) as (port, server):
        threads = [threading.Thread(target=ask, args=(port,)) for _ in range(5)]
        for thread in threads:
            thread.start()
        time.sleep(0.25)
        server.should_exit = True
        time.sleep(0.2)
        with pytest.raises(OSError):
            Client(port)("GET", "/health")
        for thread in threads:
            thread.join(20)
    assert [status for status, _ in found] == [200] * 5 and all(len(one["items"]) == 5 for _, one in found)


def test_too_many_connections(online):
    with running(create_app(online), max_connections=8) as (port, _):
        held = [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(10)]
        time.sleep(0.1)
        status, text = Client(port)("GET", "/health")
        assert status == 503
        for connection in held:
            connection.close()
        until = time.monotonic() + 5
        while status == 503 and time.monotonic() < until:
            time.sleep(0.05)
            status, text = Client(port)("GET", "/health")
        assert status == 200 and text["status"] == "ok"


def test_more_than_can_be_answered(online):
    """An overload ends in 503 with Retry-After for some, and right answers for the others; afterwards all is well."""
    online.reranker = Reversing(0.05)
    with running(create_app(online, Settings(max_waiting=8, max_batch=2, timeout=0.2))) as (port, _):
        bodies = [json.dumps(body(HISTORY, k=5, rerank=4)).encode()]
        found = load.load(port, bodies, rate=200, seconds=1.5)
        assert set(found.statuses) == {"200", "503"} and min(found.statuses.values()) > 10
        assert sum(found.statuses.values()) == 300
        status, told = Client(port)("POST", "/recommend", body(HISTORY, k=5))
        assert status == 200 and same(told, online, HISTORY, 5)


def test_schemathesis(online):
    """What the OpenAPI schema says is what is taken and given, for generated good and bad requests."""
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis.strategies import just
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    schema = schemathesis.openapi.from_asgi("/openapi.json", create_app(online))
    statuses: dict[tuple[str, int], int] = {}

    def check(case, good) -> None:
        if good and case.path == "/recommend":  # ids that the store has, which the schema cannot say
            case.body["history"] = [str(len(name) % 300) for name in case.body["history"]]
            case.body.update(depth=(case.body.get("depth") or 1) % 20 + 1, rerank=case.body.get("rerank", 0) % 9)
            case.body.pop("budget_ms", None)
        response = case.call()
        statuses[case.path, response.status_code] = statuses.get((case.path, response.status_code), 0) + 1
        # Items to put in have to fit the store, which the schema cannot say either.
        case.validate_response(response, excluded_checks=[positive_data_acceptance] if case.path == "/items" else [])

    for result in schema.get_all_operations():
        operation = result.ok()
        for mode in schemathesis.GenerationMode:
            good = mode == schemathesis.GenerationMode.POSITIVE
            if not good and operation.path in ("/health", "/metrics"):
                continue  # nothing in them could be wrong
            asked = given(case=operation.as_strategy(generation_mode=mode), good=just(good))(check)
            settings(
                max_examples=60 * FAULTS, deadline=None, database=None, suppress_health_check=list(HealthCheck),
                derandomize=True, phases=[Phase.generate],
            )(asked)()  # fmt: skip
    assert statuses["/recommend", 200] >= 50 * FAULTS and statuses["/recommend", 422] >= 30 * FAULTS
    assert statuses["/items", 422] >= 30 * FAULTS and statuses["/health", 200] and statuses["/metrics", 200]
    assert not any(status >= 500 for _, status in statuses), statuses
