"""The command: what it prints and writes, and what it answers to wrong arguments."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import bench_package
import pytest
from mmrec_kernels.benchmarks import __main__ as cli
from mmrec_kernels.benchmarks import clock, retrieval, roofline, rows, runner, table

FIELDS = (
    "op shape dtype device mode provider median_ms p20_ms p80_ms peak_bytes error_vs_fp64 flops bytes versions".split()
)


@pytest.fixture
def tiny(monkeypatch, threads):
    """Two tiny shapes, and a roofline that takes no time."""
    monkeypatch.setitem(retrieval.SHAPES, "small", ((1, 300, 16), (4, 200, 16)))
    monkeypatch.setattr(clock, "PAUSE", 0.0)
    monkeypatch.setattr(
        roofline,
        "measure",
        lambda device, timer, dtypes: roofline.Roofline(device, 2**20, 1e10, 5e9, {"float32": 1e11, "bfloat16": 1e11}),
    )


def arguments(*more):
    return ["--op", "retrieval", "--seconds", "0", "--k", "5", "--dtype", "float32", *more]


def test_row_has_the_fields_of_the_design():
    assert [field.name for field in dataclasses.fields(rows.Row)] == FIELDS


def test_run_prints_and_writes(tiny, tmp_path, capsys):
    path = tmp_path / "rows.json"
    assert cli.main(arguments("--json", str(path), "--threads", "1")) == 0
    report = json.loads(path.read_text())
    assert report["complete"] is True
    for row in report["rows"]:
        assert list(row) == FIELDS
        assert row["op"] == "retrieval" and row["mode"] == "forward" and row["device"] == "cpu"
        assert row["shape"]["k"] == 5
        assert row["error_vs_fp64"]["rank_agreement"] == 1.0
        assert {"mmrec_kernels", "torch", "python"} <= row["versions"].keys()
        assert "faiss" not in row["provider"] or "faiss" in row["versions"]
    assert {"date", "cpu", "isa", "threads", "versions", "load_average", "caches"} <= report["environment"].keys()
    assert report["environment"]["threads"] == 1
    assert len(report["comparisons"]) == 2
    out = capsys.readouterr().out
    for comparison in report["comparisons"]:
        medians = {r["provider"]: r["median_ms"] for r in report["rows"] if r["shape"] == comparison["shape"]}
        peers = {name: ms for name, ms in medians.items() if name != comparison["ours"]}
        assert comparison["best_peer"] == min(peers, key=peers.get)
        assert comparison["speedup"] == peers[comparison["best_peer"]] / medians[comparison["ours"]]
        assert comparison["over_floor"] == medians[comparison["ours"]] / comparison["floor_ms"]
        assert all(name in out for name in medians)
        assert f"the best peer, {comparison['best_peer']}" in out
    assert "roofline: read 10.0 GB/s" in out
    lost = sum(c["speedup"] < 1 for c in report["comparisons"])
    assert f"{2 - lost} of 2 cases faster than the best peer" in out
    assert out.count("LOST") == 2 * lost  # at the case and in the summary


def test_where_selects_shapes(tiny, tmp_path):
    path = tmp_path / "rows.json"
    shape = retrieval.SHAPES["small"][0]
    assert cli.main(arguments("--json", str(path), "--where", f"items={shape[1]},queries={shape[0]}")) == 0
    sizes = {(row["shape"]["queries"], row["shape"]["items"]) for row in json.loads(path.read_text())["rows"]}
    assert sizes == {shape[:2]}


def test_a_missing_peer_is_listed(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(retrieval._FAISS, "float32", (("flat", "flat float32"),))
    real = retrieval.Provider.missing
    monkeypatch.setattr(
        retrieval.Provider, "missing", lambda self: "faiss is not installed" if self.module == "faiss" else real(self)
    )
    path = tmp_path / "rows.json"
    assert cli.main(arguments("--json", str(path))) == 0
    report = json.loads(path.read_text())
    assert not any("faiss" in row["provider"] for row in report["rows"])
    assert {m["provider"] for m in report["missing"]} >= {"faiss flat float32"}
    assert capsys.readouterr().out.count("missing: faiss flat float32: faiss is not installed") == 3  # 2 cases, summary


def test_a_lost_case_is_marked():
    comparison = rows.Comparison("op", {}, "float32", "cpu", "forward", "mmrec", "peer", 0.8, 1.0, 3.0, 0.5, {})
    assert table.verdict(comparison).startswith("LOST  mmrec: 0.80× as fast as the best peer, peer; 3.00× the roofline")
    assert not table.verdict(dataclasses.replace(comparison, speedup=1.25)).startswith("LOST")
    assert "no peer ran" in table.verdict(dataclasses.replace(comparison, speedup=None, best_peer=None))


def test_sizes_are_readable():
    assert table.shape_text({"queries": 1, "items": 100_000, "rows": 2_000_000, "odd": 1_500}) == (
        "queries=1 items=100k rows=2M odd=1500"
    )


def report():
    return rows.Report({"date": "today"}, roofline.Roofline("cpu", 1, 1.0, 1.0, {}))


def test_json_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "rows.json"
    report().save(path)
    before = path.read_text()
    assert json.loads(before)["environment"] == {"date": "today"}
    seen = []

    def full_disk(descriptor):
        seen.append(path.read_text())  # the former content, while the new one is being written
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rows.os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        report().save(path)
    assert seen == [before]
    assert path.read_text() == before
    assert os.listdir(tmp_path) == ["rows.json"]


def test_full_disk_is_one_line(tiny, tmp_path, monkeypatch, capsys):
    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rows.os, "fsync", full_disk)
    path = tmp_path / "rows.json"
    assert cli.main(arguments("--json", str(path))) == 1
    assert capsys.readouterr().err == f"cannot write {path}: No space left on device\n"


def test_interrupted_run_keeps_what_it_measured(tiny, tmp_path, monkeypatch, capsys):
    real, calls = runner.run, []

    def once(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(runner, "run", once)
    path = tmp_path / "rows.json"
    assert cli.main(arguments("--json", str(path))) == 130
    saved = json.loads(path.read_text())
    assert saved["complete"] is False
    assert len(saved["comparisons"]) == 1 and saved["rows"]
    assert capsys.readouterr().err == "interrupted\n"


def test_json_dir_is_by_device(tiny, tmp_path):
    assert cli.main(arguments("--json-dir", str(tmp_path / "results"))) == 0
    (path,) = (tmp_path / "results").glob("*/*")
    assert path.name == "retrieval.json"
    assert path.parent.name == path.parent.name.lower() and " " not in path.parent.name


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--op", "sorting"], "invalid choice: 'sorting'"),
        (["--op", "retrieval", "--dtype", "float8"], "--dtype must be of float32, bfloat16, int8"),
        (["--op", "retrieval", "--mode", "full"], "--mode must be of forward for retrieval, got 'full'"),
        (["--op", "retrieval", "--k", "ten"], "--k must be integers with commas between them, got 'ten'"),
        (["--op", "retrieval", "--k", "0"], "--k must be in 1 to 4000 for the small shapes, got '0'"),
        (["--op", "retrieval", "--k", "10,5000"], "--k must be in 1 to 4000"),
        (["--op", "infonce", "--k", "10"], "--k is an option of --op retrieval, got --op infonce"),
        (
            ["--op", "routing", "--where", "tokens"],
            "--where must be sizes like batch=256, with commas between them, got",
        ),
        (["--op", "routing", "--where", "tokens=3"], "--where tokens=3: no shape has these sizes; there are"),
        (
            ["--op", "attention", "--candidates"],
            "--candidates is an option of attention, routing, nf4, retrieval on cuda, got attention on cpu",
        ),
        (["--op", "retrieval", "--threads", "0"], "--threads must be at least 1, got 0"),
        (["--op", "retrieval", "--seconds", "nan"], "--seconds must not be negative, got nan"),
        (["--op", "retrieval", "--json", "no/such/folder/rows.json"], "there is no folder no/such/folder"),
        (["--op", "retrieval", "--json", "."], "this is a folder"),
        ([], "the following arguments are required: --op"),
    ],
)
def test_wrong_arguments(given, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(given)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_cuda_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(cli.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        cli.main(["--op", "retrieval", "--device", "cuda"])
    assert "--device cuda needs a CUDA torch and a visible GPU" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("op", cli.OPS)
def test_runs_on_a_gpu(op, tmp_path):
    path = tmp_path / "rows.json"
    assert cli.main(["--op", op, "--device", "cuda", "--seconds", "0", "--json", str(path)]) == 0
    saved = json.loads(path.read_text())
    assert saved["rows"] and all(row["device"] == "cuda" for row in saved["rows"])


def test_the_pytest_benchmark_cases_run():
    """`make bench` once through, untimed."""
    pytest.importorskip("pytest_benchmark")
    root = bench_package.FOLDER.parent
    paths = [str(Path(__file__).parent), str(root), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "bench_package", "-p", "no:cacheprovider", "--benchmark-disable",
         "benchmarks"],
        cwd=root, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert f"{len(retrieval.cases('small', 'cpu', retrieval.DTYPES['cpu']))} passed" in done.stdout
