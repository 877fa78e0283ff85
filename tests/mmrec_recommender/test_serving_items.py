"""Items that come over HTTP: all of them or none, into the right store, from those who may."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import threading
import time

import pytest

pytest.importorskip("fastapi")

import torch
from fastapi.testclient import TestClient
from serving_helpers import ITEMS, WIDTH, body, item

from mmrec.recommender import ItemStore
from mmrec.recommender.serving import Settings, create_app
from mmrec.recommender.store import ItemRows


def test_items_are_put_in_and_served(client, online):
    given = [item("new", 30.0, title="New"), item("5", -1.0)]
    assert client.post("/items", json={"items": given}).json() == {"version": 2, "items": ITEMS + 1, "new": 1}
    version = ItemStore(online.store.folder).current()
    rows = version.rows(["new", "5"])
    assert torch.equal(version.vectors(rows), torch.tensor([[30.0] * WIDTH, [-1.0] * WIDTH]))
    assert version.titles(rows) == ["New", "Item 5"] and version.known(rows).tolist() == [False, True]
    assert not torch.equal(version.content(rows)[0], version.content(rows)[1])
    # What is not given stays.
    client.post("/items", json={"items": [{"id": "new", "title": "Newer", "known": True}]})
    version = ItemStore(online.store.folder).current()
    assert version.titles(rows[:1]) == ["Newer"] and version.known(rows).tolist() == [True, True]
    assert version.vectors(rows)[0, 0] == 30.0 and version.mass(rows).tolist() == [[1.0], [1.0]]
    found = client.post("/recommend", json=body(["new", "1"], k=3)).json()
    assert found["version"] == 3 and found["unknown"] == []


def test_items_are_removed(client, online):
    client.post("/items", json={"items": [item("new", 30.0)]})
    given = {"ids": ["5", "gone", "new", "5"]}
    found = client.post("/items/remove", json=given).json()
    assert found == {"version": 3, "items": ITEMS - 1, "removed": 2, "unknown": ["gone"]}
    for history in (["1"], ["5", "1"]):
        found = client.post("/recommend", json=body(history, k=1000)).json()
        assert not {"5", "new"} & {one["id"] for one in found["items"]} and len(found["items"]) == ITEMS - 2
        assert found["unknown"] == [name for name in history if name == "5"]
    assert client.get("/items", params={"text": "new"}).json() == {"items": []}
    found = client.post("/items/remove", json=given).json()
    assert found == {"version": 3, "items": ITEMS - 1, "removed": 0, "unknown": ["5", "gone", "new"]}
    for wrong in ({}, {"ids": []}, {"ids": [""]}, {"ids": ["1"], "all": True}, {"ids": "1"}):
        assert client.post("/items/remove", json=wrong).status_code == 422
    assert len(ItemStore(online.store.folder).current()) == ITEMS - 1


def test_only_some_items_may_be_answered(client):
    asked = body(["1", "2"], k=5)
    found = client.post("/recommend", json={**asked, "candidates": ["7", "2", "9", "gone"]}).json()
    assert sorted(one["id"] for one in found["items"]) == ["7", "9"] and found["unknown"] == []
    best = [one["id"] for one in client.post("/recommend", json=asked).json()["items"]]
    found = client.post("/recommend", json={**asked, "exclude": best[:2]}).json()
    assert [one["id"] for one in found["items"]][:3] == best[2:]
    assert client.post("/recommend", json={**asked, "candidates": []}).json()["items"] == []
    for name in ("candidates", "exclude"):
        found = client.post("/recommend", json={**asked, name: ["1"] * 1001})
        assert found.status_code == 422 and found.json()["detail"].startswith(f"{name}: List should have at most 1000")


@pytest.mark.parametrize(
    ("given", "detail"),
    [
        ([], "items: List should have at least 1 item"),
        ([{"id": "new", "title": "T"}], "items.0.vector: a new item needs one, and 'new' is new"),
        ([{"id": "new", "vector": [1.0] * WIDTH}], "items.0.mass: a new item needs one, and 'new' is new"),
        ([item("a"), item("b"), item("a")], "items: 'a' is there twice"),
        ([{**item("a"), "vector": [1.0]}], f"items.0.vector: must have {WIDTH} elements, got 1"),
        ([{**item("a"), "vector": [1e300] * WIDTH}], "items.0.vector: must have a length of at most 1e+06"),
        ([{**item("a"), "vector": [float("inf")] * WIDTH}], "items.0.vector.0: Input should be a finite number"),
        ([{**item("a"), "mass": {"audio": 1.0}}], "items.0.mass: there is no modality 'audio'; there are ['identity']"),
        ([{**item("a"), "mass": {"identity": 1.5}}], "items.0.mass.identity: Input should be less than or equal to 1"),
        ([{**item("a"), "price": 3}], "items.0.price: Extra inputs are not permitted"),
    ],
)
def test_bad_items_change_nothing(client, online, given, detail):
    content = json.dumps({"items": given}).encode()
    found = client.post("/items", content=content, headers={"content-type": "application/json"})
    assert (found.status_code, found.json()["detail"][: len(detail)]) == (422, detail)
    assert ItemStore(online.store.folder).current().number == 1


def test_another_writer(client, online):
    version = online.version
    rows = ItemRows(
        ["other"], torch.ones(1, WIDTH), torch.ones(1, 1), torch.tensor([False]),
        torch.zeros(1, 16, dtype=torch.uint8), ["Other"], {},
    )  # fmt: skip
    with ItemStore(online.store.folder).writer() as writer:
        writer.upsert(rows)
        busy = client.post("/items", json={"items": [item("mine")]})
        assert busy.status_code == 503 and "another process is writing" in busy.json()["detail"]
        assert busy.headers["retry-after"] == "1"
    assert client.post("/items", json={"items": [item("mine")]}).json() == {
        "version": 3, "items": ITEMS + 2, "new": 1,
    }  # fmt: skip
    assert version.number == 1 and client.get("/health").json()["version"] == 3


def test_a_full_disk(client, online, monkeypatch, caplog):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr("mmrec.recommender.store.writer.write_file", full)
        found = client.post("/items", json={"items": [item("new")]})
    assert found.status_code == 507 and found.json()["detail"].endswith("No space left on device")
    assert "store: it could not be written" in caplog.text
    assert client.post("/items", json={"items": [item("new")]}).json()["version"] == 2


def test_a_store_of_another_model_is_not_taken(client, online, caplog):
    online.model_id = "generated"
    with ItemStore(online.store.folder).writer() as writer:
        meta = online.version.meta.__class__(WIDTH, "float32", ("identity",), "another", {})
        writer.create(meta, [_one()])
    until = time.monotonic() + 10
    while "version 1 goes on" not in caplog.text and time.monotonic() < until:
        time.sleep(0.05)
    assert "version 1 goes on" in caplog.text and client.get("/health").json()["version"] == 1
    assert client.post("/recommend", json=body(["1"])).status_code == 200
    failures = next(x for x in client.get("/metrics").text.splitlines() if x.startswith("mmrec_reload_failures_total"))
    assert float(failures.split()[1]) >= 1


def test_items_are_not_put_into_a_store_of_another_model(client, online):
    """Nor is anybody told so."""
    online.model_id = "generated"
    with ItemStore(online.store.folder).writer() as writer:
        writer.create(online.version.meta.__class__(WIDTH, "float32", ("identity",), "another", {}), [_one()])
    found = client.post("/items", json={"items": [item("mine")]})
    assert found.status_code == 409 and "holds items of model another" in found.json()["detail"]
    assert ItemStore(online.store.folder).current().number == 2


def test_items_that_are_written_but_cannot_be_served(client, online, monkeypatch):
    def failing():
        raise RuntimeError("too many open files")

    monkeypatch.setattr(online, "reload", failing)
    found = client.post("/items", json={"items": [item("mine")]})
    assert (
        found.status_code == 503 and "version 2 of the store is written, but cannot be served" in found.json()["detail"]
    )
    monkeypatch.undo()
    until = time.monotonic() + 10  # the watch has not ended
    while client.get("/health").json()["version"] != 2 and time.monotonic() < until:
        time.sleep(0.02)
    assert client.get("/health").json()["version"] == 2


def test_only_so_many_writes_wait(online, monkeypatch):
    begun, go = threading.Semaphore(0), threading.Event()
    check = online.check_version

    def slow(version):
        begun.release()
        go.wait(20)
        check(version)

    with TestClient(create_app(online, Settings(max_writes=2))) as client:
        monkeypatch.setattr(online, "check_version", slow)
        found: list[int] = []
        threads = [threading.Thread(target=lambda n=n: found.append(_put(client, f"new {n}"))) for n in range(2)]
        for thread in threads:
            thread.start()
        begun.acquire()
        until = time.monotonic() + 10
        while client.app.state.server._writes < 2 and time.monotonic() < until:
            time.sleep(0.01)
        refused = client.post("/items", json={"items": [item("third")]})
        assert refused.status_code == 503 and "2 requests that write wait already" in refused.json()["detail"]
        go.set()
        for thread in threads:
            thread.join(20)
        assert found == [200, 200]


def _put(client: TestClient, name: str) -> int:
    return client.post("/items", json={"items": [item(name)]}).status_code


def test_what_other_sites_pages_could_send_is_refused(online):
    """A form or a script of another site sends without asking only what is no JSON by its type."""
    raw = json.dumps({"items": [item("new")]}).encode()
    with TestClient(create_app(online, Settings(hosts=("localhost", "testserver")))) as client:
        for kind in ({}, {"content-type": "text/plain"}, {"content-type": "application/x-www-form-urlencoded"}):
            found = client.post("/items", content=raw, headers=kind)
            assert found.status_code == 415 and "must be application/json" in found.json()["detail"]
        json_kind = {"content-type": "application/json; charset=utf-8"}
        assert client.post("/items", content=raw, headers={**json_kind, "host": "evil.example"}).status_code == 400
        assert client.get("/health", headers={"host": "evil.example"}).status_code == 400
        assert client.post("/items", content=raw, headers=json_kind).status_code == 200


def _one() -> ItemRows:
    return ItemRows(
        ["z"], torch.ones(1, WIDTH), torch.ones(1, 1), torch.tensor([True]), torch.zeros(1, 16, dtype=torch.uint8),
        [""], {},
    )  # fmt: skip


def test_the_token(online):
    with TestClient(create_app(online, Settings(token="sécret"))) as client:
        given = {"items": [item("new")]}
        assert client.post("/items", json=given).status_code == 401
        for wrong in ("Bearer x", "Basic sécret", "Bearer", "sécret", "Bearer sécre"):
            found = client.post("/items", json=given, headers={"authorization": wrong.encode()})
            assert found.status_code == 401 and found.headers["www-authenticate"] == "Bearer", wrong
        assert client.post("/recommend", json=body(["1"])).status_code == 200
        assert client.post("/items/remove", json={"ids": ["1"]}).status_code == 401
        found = client.post("/items", json=given, headers={"authorization": "bearer sécret".encode()})
        assert found.status_code == 200


def test_the_token_is_asked_for_before_the_body_is_read(online):
    async def main() -> tuple[int, int]:
        app, reads, statuses = create_app(online, Settings(token="secret")), 0, []

        async def receive():
            nonlocal reads
            reads += 1
            return {"type": "http.request", "body": b"x" * 1000, "more_body": True}

        async def send(message):
            if message["type"] == "http.response.start":
                statuses.append(message["status"])

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/items", "headers": headers, "query_string": b""}
        await app(scope, receive, send)
        return reads, statuses[0]

    assert asyncio.run(main()) == (0, 401)


def test_read_only(online):
    with TestClient(create_app(online, Settings(writable=False))) as client:
        assert client.post("/items", json={"items": [item("new")]}).status_code == 405
        assert client.post("/items/remove", json={"ids": ["1"]}).status_code == 404
        assert client.get("/items").status_code == 200
