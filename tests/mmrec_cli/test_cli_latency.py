"""`mmrec latency`: quality that agrees with `mmrec evaluate`, and a report with both."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from cli_helpers import Mmrec, read_json

from mmrec.commands.runs import open_run
from mmrec.commands.serve import _worth
from mmrec.recommender import Plan


def test_quality_and_latency(mmrec: Mmrec, trained: Path, tiny_causal: Path, tmp_path: Path) -> None:
    out = tmp_path / "latency"
    outcome = mmrec(
        "latency", "--run", trained, "--out", out, "--dtype", "float32", "--dtype", "int8", "--depth", 2, "--batch", 1,
        "--batch", 2, "--seconds", 0, "--reranker", tiny_causal, "--rerank", 3, "--rerank-users", 7,
    ).succeeded()  # fmt: skip
    content, run = read_json(out / "latency.json"), open_run(trained)
    rows = {(row["dtype"], row["depth"], row["rerank"]): row for row in content["frontier"]}
    most = run.config.max_length
    assert set(rows) == {("float32", most, 3), *((d, n, 0) for d in ("float32", "int8") for n in (2, most))}
    whole = rows["float32", most, 0]
    for metric in ("NDCG@10", "HR@10"):
        assert whole["metrics"][metric][0] == pytest.approx(run.result.metrics[metric], abs=1e-6)
        low, high = whole["metrics"][metric][1:]
        assert low <= whole["metrics"][metric][0] <= high
    assert whole["worth"] == pytest.approx(run.result.metrics["NDCG@10"]) and whole["change"] == {}
    again = rows["float32", most, 3]
    assert again["users"] == 7 and whole["users"] == len(run.result.rows["all"].users)
    assert again["worth"] == pytest.approx(whole["worth"] + again["change"]["NDCG@10"][0])
    assert again["change"]["HR@10"][0] == 0  # the same ten items in another order
    for row in rows.values():
        assert 0 < row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"] and row["calls"] == 10
    best = [row for row in rows.values() if row["frontier"]]
    assert best and max(row["worth"] for row in rows.values()) in [row["worth"] for row in best]
    stages = {(row["dtype"], row["batch"], row["stage"]) for row in content["stages"]}
    assert {(d, b, "total") for d in ("float32", "int8") for b in (1, 2)} <= stages
    page = (out / "report.html").read_text()
    assert "Quality against latency" in page and "Latency by stage" in page and page.count("<circle") >= 4
    assert "identity" in outcome.out and "reranked" in outcome.out
    # What a server takes for its plans.
    assert _worth(out / "latency.json", run.model_id) == {
        Plan(depth, rerank): row["worth"] for (dtype, depth, rerank), row in rows.items() if dtype == "float32"
    }


def test_runs_of_the_same_name_and_what_cannot_be(mmrec: Mmrec, trained: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(trained, tmp_path / "other"))
    out, options = tmp_path / "out", ("--dtype", "int8", "--batch", 1, "--seconds", 0, "--depth", 1)
    mmrec("latency", "--run", trained, "--run", other, "--out", out, *options, "--stage", "valid").succeeded()
    rows = read_json(out / "latency.json")["frontier"]
    assert {row["model"] for row in rows} == {str(trained), str(other)} and len(rows) == 4
    mmrec("latency", "--run", tmp_path, "--out", out).failed("no run there")
    with pytest.raises(ValueError, match="says nothing of model other"):
        _worth(out / "latency.json", "other")
    (out / "broken.json").write_text("[]")
    with pytest.raises(ValueError, match="is no latency.json"):
        _worth(out / "broken.json", "other")
