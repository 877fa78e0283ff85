"""Trains, stops, resumes, indexes and serves over and over in one process, and watches what the process holds.

    python tests/soak.py --steps 24000 --json soak.json

A round is what a user does: `mmrec train`, Ctrl-C at some point, `--resume`, `mmrec index` as a new version of one
store, then a server over that store: recommendations, searches, items put in and taken out, wrong requests. After every
round memory, file handles, threads and the files in the folders are counted. Ends with 1 if any of them grows.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

BATCH = 8
EPOCHS = 20
# By what memory may grow over the second half of the rounds: what the allocator keeps scatters by a few MiB.
MOST_BYTES = 24 << 20


@dataclass(frozen=True)
class Held:
    """What the process holds after a round; `steps` of training have been made by then, `requests` answered."""

    steps: int
    requests: int
    resident: int
    handles: int
    threads: int
    files: int
    seconds: float


def held(steps: int, requests: int, folder: Path, began: float) -> Held:
    gc.collect()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    files = sum(path.is_file() for path in folder.rglob("*"))
    handles = len(os.listdir("/proc/self/fd"))
    return Held(steps, requests, resident, handles, threading.active_count(), files, round(time.monotonic() - began, 1))


def grown(rounds: Sequence[Held], *, most_bytes: int = MOST_BYTES) -> list[str]:
    """What grows, in words. The first half is warm-up: caches fill, libraries are loaded."""
    late = rounds[len(rounds) // 2 :]
    if len(late) < 2:
        raise ValueError(f"at least 3 rounds are needed, got {len(rounds)}")
    found = []
    resident = np.array([one.resident for one in late], float)
    # A straight line through the later rounds: one high reading is no leak.
    slope = np.polyfit(np.arange(len(late)), resident, 1)[0]
    if slope * (len(late) - 1) > most_bytes:
        found.append(f"memory grows by {slope / 2**20:.2f} MiB a round over the last {len(late)} rounds")
    for name in ("handles", "threads", "files"):
        values = [getattr(one, name) for one in late]
        if np.median(values[len(values) // 2 :]) > np.median(values[: (len(values) + 1) // 2]):
            found.append(f"{name} grow: {values}")
    return found


def command(*arguments: object, code: int = 0) -> None:
    """One command line of `mmrec` in this process."""
    from mmrec.cli import run

    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        got = run([str(argument) for argument in arguments])
    if got != code:
        raise RuntimeError(f"mmrec {' '.join(map(str, arguments))}: exit code {got}, not {code}\n{told.getvalue()}")


def interrupted(after: float, *arguments: object) -> bool:
    """A command line that gets Ctrl-C after so many seconds: whether it was still running."""
    from mmrec.cli import run

    timer = threading.Timer(after, os.kill, (os.getpid(), signal.SIGINT))
    told = io.StringIO()
    timer.start()
    try:
        with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
            code = run([str(argument) for argument in arguments])
    except KeyboardInterrupt:
        code = 0  # the signal came as the command returned
    finally:
        timer.cancel()
        timer.join()
    if code not in (0, 130):
        raise RuntimeError(f"exit code {code}\n{told.getvalue()}")
    return code == 130


def trained(data: Path, folder: Path, seed: int, rng: np.random.Generator) -> int:
    """Trains one run, stopped once where the time allows; the steps that it made."""
    options = (
        "--modalities", "identity,table", "--epochs", EPOCHS, "--seed", seed, "--set", "width=16", "--set", "heads=1",
        "--set", "item_heads=1", "--set", "expert_hidden=16", "--set", f"batch_size={BATCH}", "--set", "patience=1000",
        "--set", "table_pooled=true", "--no-floors", "--no-identity",
    )  # fmt: skip
    shutil.rmtree(folder, ignore_errors=True)
    line = ("train", "--data", data, "--out", folder, *options)
    interrupted(float(rng.uniform(0.2, 2.0)), *line)
    if not (folder / "run.json").exists():
        # Ctrl-C may have come before there was anything to go on with.
        command(*line, "--resume")
    return EPOCHS * _batches(folder, data)


def _batches(folder: Path, data: Path) -> int:
    from mmrec.commands.runs import open_run
    from mmrec.recommender.batches import num_batches

    run = open_run(folder)
    return num_batches(run.load_data(data, "auto").split.train, run.config.max_length, run.config.batch_size)


def served(run: Path, store: Path, requests: int, rng: np.random.Generator) -> int:
    """A server over the store: right and wrong requests, items in and out; how many it answered."""
    from fastapi.testclient import TestClient

    from mmrec.commands.runs import open_run
    from mmrec.recommender import ItemStore, OnlineRecommender
    from mmrec.recommender.serving import Settings, create_app

    opened = open_run(run)
    online = OnlineRecommender(opened.model, ItemStore(store), model_id=opened.model_id)
    names = online.version.ids(np.arange(len(online.version)))
    width = int(opened.config.width)
    with TestClient(create_app(online, Settings(reload_seconds=0.05))) as client:
        for number in range(requests):
            history = [names[n] for n in rng.integers(len(names), size=3)]
            answer = client.post("/recommend", json={"history": history, "k": 5})
            assert answer.status_code == 200 and len(answer.json()["items"]) == 5, answer.text
            if number % 20 == 0:
                mass = dict.fromkeys(opened.modalities, 1 / len(opened.modalities))
                item = {"id": f"new {number}", "title": "a new one", "known": False, "mass": mass}
                item["vector"] = rng.normal(size=width).tolist()
                for path, body in (("/items", {"items": [item]}), ("/items/remove", {"ids": [item["id"]]})):
                    answer = client.post(path, json=body)
                    assert answer.status_code == 200, answer.text
                assert client.post("/recommend", json={"history": "no list"}).status_code == 422
                assert client.get("/items", params={"text": "a"}).status_code == 200
                assert client.get("/metrics").status_code == 200
    return requests


def soak(steps: int, requests: int, folder: Path, *, say: bool = True) -> list[Held]:
    """Rounds until `steps` of training are made."""
    from mmrec.adaptation import generate_catalogue

    data, run, store = folder / "shop", folder / "run", folder / "store"
    generate_catalogue(data, users=120, items=60, cold_items=6, mean_length=8.0, image_size=16, seed=3)
    rng, rounds, began = np.random.default_rng(0), [], time.monotonic()
    made = answered = 0
    while made < steps:
        made += trained(data, run, len(rounds), rng)
        command("index", "--run", run, "--out", store)
        answered += served(run, store, requests, rng)
        rounds.append(held(made, answered, folder, began))
        if say:
            last = rounds[-1]
            print(f"{made:6d} steps  {answered:6d} requests  {last.resident / 2**20:7.1f} MiB  {last.handles} handles  "
                  f"{last.threads} threads  {last.files} files  {last.seconds:.0f} s", flush=True)  # fmt: skip
    return rounds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=24_000, help="of training in all; default: 24000")
    parser.add_argument("--requests", type=int, default=200, help="to the server in each round; default: 200")
    parser.add_argument("--json", type=Path, help="where what was held after every round goes")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rounds = soak(given.steps, given.requests, Path(folder))
    if given.json is not None:
        given.json.write_text(json.dumps([asdict(one) for one in rounds], indent=1) + "\n")
    found = grown(rounds)
    print("\n".join(found) or "nothing grows")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
