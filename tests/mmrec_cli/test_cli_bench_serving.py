"""`mmrec bench-serving`: every stage of every case has its times."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cli_helpers import Mmrec, read_json

from mmrec.recommender.latency import TOTAL
from mmrec.recommender.online import STAGES as ALL_STAGES

STAGES = tuple(stage for stage in ALL_STAGES if stage != "rerank")


def test_small_stores(mmrec: Mmrec, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    outcome = mmrec(
        "bench-serving", "--items", 300, "--items", 1000, "--dtype", "int8", "--dtype", "bfloat16", "--batch", 1,
        "--batch", 3, "--history", 7, "-k", 5, "--seconds", 0, "--json", path,
    ).succeeded()  # fmt: skip
    threads = torch.get_num_threads()
    words = f"1000 items of width 64 in bfloat16, 3 histories of 7, k 5, {threads} threads, 200 calls"
    assert words in " ".join(outcome.out.split())
    content = read_json(path)
    assert content["environment"]["cpu"] and content["environment"]["versions"]["torch"]
    rows = content["rows"]
    cases = {(row["items"], row["dtype"], row["batch"]) for row in rows}
    assert cases == {(n, dtype, b) for n in (300, 1000) for dtype in ("int8", "bfloat16") for b in (1, 3)}
    for case in cases:
        mine = {row["stage"]: row for row in rows if (row["items"], row["dtype"], row["batch"]) == case}
        assert tuple(mine) == (*STAGES, TOTAL)
        for row in mine.values():
            assert 0 < row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"] and row["cold_ms"] > 0 and row["calls"] == 200
            assert (row["history"], row["k"], row["threads"], row["width"]) == (7, 5, threads, 64)
        stages = sum(mine[stage]["p50_ms"] for stage in STAGES)
        assert stages == pytest.approx(mine[TOTAL]["p50_ms"], rel=0.5)  # nothing else takes time


def test_what_cannot_be_measured(mmrec: Mmrec, tmp_path: Path) -> None:
    mmrec("bench-serving", "--items", 0).failed("--items must be at least 1, got 0")
    mmrec("bench-serving", "--batch", 0).failed("--batch must be at least 1, got 0")
    mmrec("bench-serving", "--json", "a", "--json-dir", "b").failed("two ways")
    mmrec("bench-serving", "--json", tmp_path).failed("this is a folder")
    mmrec("bench-serving", "--dtype", "float8").failed("float8", code=2)
