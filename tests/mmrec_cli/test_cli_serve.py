"""`mmrec serve`: a trained run over HTTP, in a process of its own; its page in a browser."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

for package in ("fastapi", "uvicorn", "httptools", "prometheus_client"):
    pytest.importorskip(package)

from cli_helpers import Mmrec, read_json  # noqa: E402

from mmrec.adaptation import Catalogue  # noqa: E402
from mmrec.commands.runs import open_run  # noqa: E402


@contextlib.contextmanager
def serving(*arguments: object, **environment: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """Its address, and the process; ended, and its end checked, when the block ends."""
    code = "import sys; from mmrec.cli import run; sys.exit(run(sys.argv[1:]))"
    given = ["serve", *map(str, arguments), "--port", "0", "--calibrate", "0.02"]
    command = [sys.executable, "-c", code, *given]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **environment}
    )
    told = ""
    try:
        assert process.stdout is not None
        for line in process.stdout:
            told += line
            if found := re.search(r"running on (http://\S+)", line):
                yield found[1], process
                break
        else:
            raise AssertionError(told)
    finally:
        process.send_signal(signal.SIGTERM)
        rest, _ = process.communicate(timeout=30)
        assert process.returncode in (0, -signal.SIGTERM) and "Traceback" not in told + rest, told + rest


def call(address: str, path: str, content: object = None, **headers: str) -> tuple[int, dict]:
    raw = None if content is None else json.dumps(content).encode()
    request = urllib.request.Request(address + path, raw, {"content-type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of a trained run that a store may be written into."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_a_run_is_served(mmrec: Mmrec, run: Path, tmp_path: Path) -> None:
    catalogue = Catalogue.load(open_run(run).data)
    history = [catalogue.item_ids[n] for n in (3, 9, 4)]
    answer, costs = tmp_path / "answer.json", tmp_path / "costs.json"
    mmrec("recommend", "--run", run, "--history", ",".join(history), "-k", 8, "--json", answer).succeeded()
    wanted = read_json(answer)["answers"]
    with serving("--run", run, "--costs", costs) as (address, process):
        status, found = call(address, "/recommend", {"history": history, "k": 8, "budget_ms": 10000})
        assert status == 200 and [one["id"] for one in found["items"]] == [one["item"] for one in wanted]
        assert found["items"][0]["mass"] == pytest.approx(wanted[0]["mass"], abs=1e-3)
        assert found["how"]["in_time"] and (run / "store" / "version-00000001.json").is_file()
        width, modalities = open_run(run).config.width, open_run(run).modalities
        new = {"id": "new", "vector": [0.1] * width, "mass": {modalities[0]: 1.0}, "title": "New"}
        assert call(address, "/items", {"items": [new]}) == (200, {"version": 2, "items": 49, "new": 1})
        image = next(n for n, path in enumerate(catalogue.images) if path is not None)
        with urllib.request.urlopen(f"{address}/images/{catalogue.item_ids[image]}") as response:
            assert response.read() == catalogue.images[image].read_bytes()
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) in (0, -signal.SIGTERM)
    written = costs.read_text()
    with serving("--run", run, "--ann", "hnsw") as (address, _):
        health = call(address, "/health")[1]
        assert health["ann"] == "hnsw" and health["recall"] > 0.9
        status, found = call(address, "/recommend", {"history": history, "k": 8})
        assert status == 200 and len({one["id"] for one in found["items"]} & {one["item"] for one in wanted}) >= 7
    with serving("--run", run, "--costs", costs, "--read-only") as (address, _):  # the store and the costs are there
        assert call(address, "/health")[1]["version"] == 2 and call(address, "/health")[1]["budgets"]
        assert call(address, "/items", {"items": [new]})[0] == 405
    assert costs.read_text() == written


def test_a_token_guards_items(run: Path) -> None:
    with serving("--run", run, "--host", "0.0.0.0", MMREC_TOKEN="secret") as (address, _):
        given = {"items": [{"id": "new"}]}
        assert call(address, "/items", given)[0] == 401
        status, told = call(address, "/items", given, authorization="Bearer secret")
        assert status == 422 and "a new item needs one" in told["detail"]


def test_the_best_items_are_ranked_again(run: Path, tiny_causal: Path) -> None:
    history = Catalogue.load(open_run(run).data).item_ids[:5]
    with serving("--run", run, "--reranker", tiny_causal) as (address, _):
        assert call(address, "/health")[1]["reranker"] == str(tiny_causal)
        status, found = call(address, "/recommend", {"history": history, "rerank": 4, "k": 6})
        scores = [one["rerank_score"] for one in found["items"]]
        assert status == 200 and scores[:4] == sorted(scores[:4], reverse=True) and scores[4:] == [None, None]
        status, found = call(address, "/recommend", {"history": history, "budget_ms": 60000})
        assert found["how"]["rerank"] == 64 and found["how"]["in_time"]


def test_what_cannot_be_served(mmrec: Mmrec, run: Path, tmp_path: Path, tiny_backbone: Path) -> None:
    mmrec("serve", "--run", tmp_path).failed("no run there")
    mmrec("serve", "--run", run, "--host", "0.0.0.0").failed("give --read-only, or a token in $MMREC_TOKEN")
    assert "is not causal" in mmrec("serve", "--run", run, "--reranker", tiny_backbone, "--quantize", "none").err
    mmrec("serve", "--run", run, "--reranker", "./nothing").failed("no folder './nothing'")
    other = run / "store" / "version-00000001.json"
    assert other.is_file()
    other.write_text("{}")
    outcome = mmrec("serve", "--run", run)
    assert outcome.code == 1 and "can be used; the newest is 1" in outcome.err


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_the_page_in_a_browser(run: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    catalogue = Catalogue.load(open_run(run).data)
    with serving("--run", run) as (address, _), playwright.sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for width in (1200, 360):
            page = browser.new_page(viewport={"width": width, "height": 800})
            wrong: list[str] = []
            page.on("console", lambda message, wrong=wrong: wrong.append(message.text))
            page.on("pageerror", lambda error, wrong=wrong: wrong.append(str(error)))
            page.on("requestfailed", lambda request, wrong=wrong: wrong.append(request.url))
            page.goto(address)
            page.get_by_label("Search items to add").fill(catalogue.item_titles[7])
            page.get_by_role("button", name=f"+ {catalogue.item_titles[7]}", exact=True).click()
            page.wait_for_selector("#answers li")
            page.get_by_label("items", exact=True).fill("5")
            page.get_by_label("budget, ms").fill("5000")
            page.keyboard.press("Tab")
            page.wait_for_function("document.querySelectorAll('#answers li').length == 5")
            page.wait_for_function("document.getElementById('how').textContent.includes('budget kept')")
            page.wait_for_function("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
            shares = page.locator("#answers .bar").first.get_attribute("aria-label")
            assert all(name in shares for name in open_run(run).modalities)
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            page.get_by_role("button", name=f"Remove {catalogue.item_titles[7]}").focus()
            page.keyboard.press("Enter")  # all of it by keyboard
            page.wait_for_function("document.querySelectorAll('#answers li').length == 0")
            assert "Add an item to begin." in page.locator("#how").inner_text() and not wrong, wrong
        browser.close()


def test_titles_are_text_and_no_markup(run: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium")
    width, modalities = open_run(run).config.width, open_run(run).modalities
    evil = "<img src=x onerror=\"document.title='gone'\">"
    new = {"id": "<b>/../?#%", "vector": [100.0] * width, "mass": {modalities[0]: 1.0}, "title": evil}
    with serving("--run", run) as (address, _), playwright.sync_playwright() as tools:
        assert call(address, "/items", {"items": [new]})[0] == 200
        browser = tools.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(address)
        page.get_by_label("Search items to add").fill("onerror")
        page.get_by_role("button", name=f"+ {evil}", exact=True).click()
        page.wait_for_selector("#answers li")
        page.wait_for_load_state("networkidle")
        assert page.title() == "mmrec" and evil in page.locator("#history").inner_text()
        browser.close()


def test_a_server_under_load(mmrec: Mmrec, tmp_path: Path) -> None:
    told = tmp_path / "server.json"
    before = {*Path(tempfile.gettempdir()).glob("mmrec-*")}
    began = time.monotonic()
    outcome = mmrec(
        "bench-serving",
        "--items",
        300,
        "--dtype",
        "int8",
        "--history",
        7,
        "--rate",
        100,
        "--seconds",
        2,
        "--json",
        told,
    ).succeeded()
    (row,) = read_json(told)["rows"]
    assert row["statuses"] == {"200": 200} and row["requests"] == 200 and 1.5 < row["seconds"] < 10
    assert 0 < row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"] <= row["longest_ms"]
    assert row["memory_begin_mib"] > 50 and row["memory_end_mib"] < 1.5 * row["memory_begin_mib"]
    assert (row["items"], row["dtype"], row["history"], row["rate"]) == (300, "int8", 7, 100.0)
    assert {*Path(tempfile.gettempdir()).glob("mmrec-*")} <= before  # nothing is left behind
    assert "100 requests per second" in outcome.out and time.monotonic() - began < 60
    mmrec("bench-serving", "--rate", 0).failed("--rate must be above 0, got 0")
