"""Runs the kernel tests again where the environment chooses other code: every ISA of this CPU, Triton's interpreter."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch

from mmrec_kernels import library, schemas
from paths import ROOT

COMPILED = ("retrieval", "infonce", "attention", "routing", "nf4")  # the ops that have C++ kernels
INTERPRETED = ("retrieval", "infonce", "attention", "routing", "nf4")  # the ops that have Triton kernels


def run_pytest(folders: tuple[str, ...], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *(f"tests/{f}" for f in folders)]
    # Ahead-of-time tables, process groups and torch.compile take minutes and do not depend on the environment.
    command += ["-k", "not ahead_of_time and not processes and not compiles"]
    threads = {"OMP_NUM_THREADS": "1"}  # several of these run at a time; tests of thread counts set their own
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **threads, **environment}, capture_output=True, text=True
    )


def environments() -> dict[str, tuple[tuple[str, ...], dict[str, str]]]:
    """The runs, by name: folders of tests and the variables they run under."""
    runs = {f"interpreter-{op}": ((op,), {"TRITON_INTERPRET": "1"}) for op in INTERPRETED}
    best = library.cpu_isa()
    if best != "none" and "MMREC_CPU_ISA" not in os.environ:  # otherwise it is not built, or the caller chose one
        for isa in schemas.ISA_NAMES[: schemas.ISA_NAMES.index(best)]:
            runs[isa] = (COMPILED, {"MMREC_CPU_ISA": isa})
    return runs


@pytest.fixture(scope="module")
def started(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[subprocess.CompletedProcess[str]]]]:
    """The runs of the selected tests, all under way, as many at a time as there are processors."""
    selected = {item.callspec.params.get("name") for item in request.session.items if hasattr(item, "callspec")}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {name: pool.submit(run_pytest, *run) for name, run in environments().items() if name in selected}
        pool.shutdown(cancel_futures=True)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", environments())
def test_in_another_environment(name, started):
    if name.startswith("interpreter"):
        pytest.importorskip("triton")
    done = started[name].result()
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.skipif(library.cpu_isa() == "none", reason="_C is not built")
def test_unknown_instruction_set_is_named():
    code = "import mmrec_kernels"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "MMREC_CPU_ISA": "sse9"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "MMREC_CPU_ISA must be base, avx2, avx512 or avx512_bf16, got sse9" in done.stderr


def test_provider_table_names_every_op():
    done = subprocess.run([sys.executable, "-m", "mmrec_kernels"], cwd=ROOT, capture_output=True, text=True, check=True)
    for provider in library.providers():
        assert provider.op.lstrip("_") in done.stdout
    assert torch.__version__ in done.stdout


def test_without_the_compiled_library_the_reference_serves_and_says_so(tmp_path):
    shutil.copytree(
        ROOT / "mmrec_kernels", tmp_path / "mmrec_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    report = subprocess.run(
        [sys.executable, "-m", "mmrec_kernels"], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    rows = [line.split() for line in report.splitlines() if line.startswith("retrieval_topk ")]
    assert rows[0][1:3] == ["cpu", "reference"] and "_C not built" in report
    code = "import torch, mmrec_kernels as mk; x = torch.eye(3); print(mk.__file__, mk.top_k(x, x, 1).ids.tolist())"
    out = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert str(tmp_path) in out and "[[0], [1], [2]]" in out


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_autocast_does_not_reach_into_references(dtype):
    """Autocast stays on inside an op written in Python; it would round the reference's float32 matmuls to 16 bits."""
    from mmrec_kernels import info_nce, route

    x, gate = torch.randn(20, 16, dtype=dtype), torch.randn(4, 16, dtype=dtype)
    expected = info_nce(x, x.flip(0)), route(x, gate, 2).weights
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = info_nce(x, x.flip(0)), route(x, gate, 2).weights
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
