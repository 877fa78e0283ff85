"""The application over HTTP: answers, items, errors that say why."""

from __future__ import annotations

import json
import logging

import pytest

pytest.importorskip("fastapi")

from fastapi.testclient import TestClient
from serving_helpers import ITEMS, body, item, same

from mmrec.recommender import calibrate
from mmrec.recommender.serving import create_app


def test_answers_are_those_of_the_recommender(client, online):
    history = ["5", "9", "200"]
    found = client.post("/recommend", json=body(history, k=7)).json()
    assert same(found, online, history, 7) and found["unknown"] == [] and found["version"] == 1
    assert found["items"][0]["mass"] == {"identity": 1.0} and found["items"][0]["known"]
    assert found["items"][0]["title"] == f"Item {found['items'][0]['id']}"
    how = found["how"]
    assert (how["depth"], how["rerank"], how["batch"], how["budget_ms"], how["in_time"]) == (20, 0, 1, None, True)
    assert how["took_ms"] > 0 and how["waited_ms"] >= 0
    again = client.post("/recommend", json=body([*history, "gone"], k=7, rerank=3)).json()
    assert [one["id"] for one in again["items"][:3]] == [one["id"] for one in found["items"][2::-1]]
    assert [one["rerank_score"] for one in again["items"]] == [2.0, 1.0, 0.0, None, None, None, None]
    assert again["unknown"] == ["gone"] and again["how"]["rerank"] == 3
    seen = client.post("/recommend", json=body(["5"], k=ITEMS, exclude_seen=False)).json()
    assert len(seen["items"]) == ITEMS and "5" in {one["id"] for one in seen["items"]}
    assert len(client.post("/recommend", json=body(["5"], k=1000)).json()["items"]) == ITEMS - 1


def test_budgets(client, online):
    refused = client.post("/recommend", json=body(["1"], budget_ms=5))
    assert refused.status_code == 422 and "what answers cost is not known" in refused.json()["detail"]
    online.costs = calibrate(online, seconds=0.05)
    found = client.post("/recommend", json=body(["1"], budget_ms=5000)).json()["how"]
    assert (found["budget_ms"], found["rerank"], found["depth"], found["in_time"]) == (5000, 64, 20, True)
    assert 0 < found["expected_ms"] < 5000
    hopeless = client.post("/recommend", json=body(["1"], budget_ms=0.001)).json()["how"]
    assert not hopeless["in_time"] and hopeless["rerank"] == 0
    text = client.get("/metrics").text
    assert "mmrec_budget_exceeded_total 1.0" in text and 'mmrec_plans_total{depth="20",rerank="64"} 1.0' in text


@pytest.mark.parametrize(
    ("given", "status", "detail"),
    [
        ({}, 422, "history: Field required"),
        ({"history": []}, 422, "history: List should have at least 1 item"),
        ({"history": "5"}, 422, "history: Input should be a valid list, got '5'"),
        ({"history": [5]}, 422, "history.0: Input should be a valid string, got 5"),
        ({"history": ["x" * 513]}, 422, "history.0: String should have at most 512 characters, got 'xxx"),
        ({"history": [""]}, 422, "history.0: String should have at least 1 character"),
        ({"history": ["1"] * 1001}, 422, "history: List should have at most 1000 items"),
        ({"history": ["gone", "too"]}, 422, "history has 2 item(s), none of which the store has"),
        ({"history": ["1"], "k": 0}, 422, "k: Input should be greater than or equal to 1, got 0"),
        ({"history": ["1"], "k": 1001}, 422, "k: Input should be less than or equal to 1000"),
        (
            {"history": ["1"], "k": 10**400},
            422,
            "k: Input should be less than or equal to 1000, got an integer of 1329 bits",
        ),
        ({"history": ["1"], "k": "3"}, 422, "k: Input should be a valid integer, got '3'"),
        ({"history": ["1"], "k": 2.5}, 422, "k: Input should be a valid integer"),
        ({"history": ["1"], "depth": 21}, 422, "depth must be from 1 to 20, got 21"),
        ({"history": ["1"], "rerank": 65}, 422, "rerank: must be at most 64, got 65"),
        ({"history": ["1"], "rerank": -1}, 422, "rerank: Input should be greater than or equal to 0"),
        ({"history": ["1"], "budget": 5}, 422, "budget: Extra inputs are not permitted"),
        ({"history": ["1"], "budget_ms": float("nan")}, 422, "budget_ms: Input should be a finite number"),
        ({"history": ["1"], "budget_ms": -1.0}, 422, "budget_ms: Input should be greater than 0"),
        ({"history": ["1"], "quantile": 0.999}, 422, "quantile: Input should be less than or equal to 0.99"),
        ([], 422, "body: Input should be a valid dictionary"),
        (None, 422, "body: Input should be a valid dictionary"),
    ],
)
def test_bad_requests(client, given, status, detail):
    content = json.dumps(given).encode()
    found = client.post("/recommend", content=content, headers={"content-type": "application/json"})
    assert (found.status_code, found.json()["detail"][: len(detail)]) == (status, detail)


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"", 422),
        (b"{", 422),
        (b"\xff{}", 400),
        (b"[" * 100_000, 400),
        (b'{"history": ["\\ud800"]}', 422),
        (b'{"history": ["1"], "history": []}', 422),
        (b"\x00", 422),
        (b'{"history": ["1"]} trailing', 422),
        (b" " * (1 << 20) + b"{}", 413),
    ],
)
def test_bodies_that_are_no_json(client, content, status):
    found = client.post("/recommend", content=content, headers={"content-type": "application/json"})
    assert found.status_code == status and isinstance(found.json()["detail"], str)
    assert client.post("/recommend", json=body(["1"])).status_code == 200


def test_a_body_that_is_longer_than_it_says(client):
    def chunks():
        for _ in range(20):
            yield b" " * (1 << 16)

    found = client.post("/recommend", content=chunks(), headers={"content-type": "application/json"})
    assert found.status_code == 413 and found.json()["detail"] == "body: must have at most 1048576 bytes"
    for length in ("-1", "1e3", "٣"):
        headers = {"content-type": "application/json", "content-length": length.encode()}
        assert client.post("/recommend", content=b"{}", headers=headers).status_code == 413


def test_other_paths(client):
    assert client.get("/recommend").status_code == 405 and client.get("/nothing").json() == {"detail": "Not Found"}
    page = client.get("/")
    assert page.status_code == 200 and "<title>mmrec</title>" in page.text
    assert {*client.get("/openapi.json").json()["paths"]} == {
            "/recommend", "/items", "/items/remove", "/health", "/metrics",
        }  # fmt: skip
    health = client.get("/health").json()
    assert (health["status"], health["items"], health["version"], health["model"]) == ("ok", ITEMS, 1, "generated")
    assert (health["modalities"], health["max_length"], health["reranker"]) == (["identity"], 20, "reversing")


def test_finding_items(client):
    def ids(text, **more):
        return [one["id"] for one in client.get("/items", params={"text": text, **more}).json()["items"]]

    assert ids("29") == ["29", "129", "229", *[str(n) for n in range(290, 300)]]
    assert ids("item 29")[0] == "29" and ids("ITEM 299") == ["299"] and ids("29", limit=2) == ["29", "129"]
    assert ids("m 1I") == [] and ids("1Item 2") == []  # across two titles
    assert len(ids("")) == 20 and ids("", limit=100)[0] == "0" and ids(".*") == [] and ids("\x00") == []
    client.post("/items", json={"items": [item("29", title="Ärger"), item("new 29", title="")]})
    assert ids("ärger") == [] and ids("Ärger") == ["29"] and ids("item 29")[0] == "290"
    assert {"new 29", "29"} <= {*ids("", limit=100), *ids("29", limit=100)}  # the last title is empty
    assert ids("new") == ["new 29"] and ids("29", limit=100)[:2] == ["29", "129"]
    assert client.get("/items", params={"text": "x" * 201}).status_code == 422
    assert client.get("/items", params={"limit": 0}).json()["detail"].startswith("limit: Input should be greater")


def test_images(online, tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG")
    (tmp_path / "secret").write_text("secret")
    files = {"5": tmp_path / "a.png", "a/b": tmp_path / "a.png", "7": tmp_path / "gone.png"}
    with TestClient(create_app(online, image=files.get)) as client:
        for there in ("5", "a%2Fb", "a/b"):
            found = client.get(f"/images/{there}")
            assert found.content == b"\x89PNG" and found.headers["content-type"] == "image/png"
        for none in ("6", "7", "..%2F..%2Fsecret", "%2e%2e/secret", str(tmp_path / "secret")):
            found = client.get(f"/images/{none}")
            assert b"secret" not in found.content and found.status_code in (200, 404)
        assert client.get("/images/6").headers["content-type"].startswith("image/svg")


def test_a_defect_is_a_500_with_a_log_line(online, monkeypatch, caplog):
    def broken(*_, **__):
        raise RuntimeError("a defect")

    with TestClient(create_app(online), raise_server_exceptions=False) as client:
        monkeypatch.setattr(online, "recommend", broken)
        with caplog.at_level(logging.ERROR, logger="mmrec"):
            found = client.post("/recommend", json=body(["1"]))
        assert found.status_code == 500 and found.json() == {"detail": "the server failed; its log says how"}
        assert "POST /recommend failed" in caplog.text and "a defect" in caplog.text


def test_what_is_counted(client):
    for history in (["1"], ["2"], ["gone"]):
        client.post("/recommend", json=body(history))
    client.get("/nothing"), client.get("/else")
    client.post("/recommend", content=b" " * (1 << 21), headers={"content-type": "application/json"})
    text = client.get("/metrics").text
    for line in (
        'mmrec_requests_total{path="/recommend",status="200"} 2.0',
        'mmrec_requests_total{path="/recommend",status="422"} 1.0',
        'mmrec_requests_total{path="other",status="404"} 2.0',
        'mmrec_requests_total{path="/recommend",status="413"} 1.0',
        'mmrec_request_seconds_count{path="/recommend"} 3.0', "mmrec_batch_size_count 2.0", "mmrec_store_version 1.0",
        f"mmrec_store_items {ITEMS}.0", "mmrec_waiting 0.0", 'mmrec_stage_seconds_count{stage="retrieval"} 2.0',
        "mmrec_slower 1.0", "process_resident_memory_bytes",
    ):  # fmt: skip
        assert line in text, line
