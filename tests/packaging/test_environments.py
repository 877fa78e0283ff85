"""Runs the kernel tests again where the environment chooses other code: every ISA of this CPU, Triton's interpreter."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch

from mmrec_kernels import library, schemas
from paths import ROOT

COMPILED = ("retrieval", "infonce", "attention", "routing", "nf4")  # the ops that have C++ kernels
INTERPRETED = ("retrieval", "infonce", "attention", "routing")  # the ops that have Triton kernels


def run_pytest(folders: tuple[str, ...], **environment: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *(f"tests/{f}" for f in folders)]
    # Ahead-of-time tables, process groups and torch.compile take minutes and do not depend on the environment.
    command += ["-k", "not ahead_of_time and not processes and not compiles"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def other_isas() -> list[str]:
    best = library.cpu_isa()
    return [
        isa for isa in schemas.ISA_NAMES if isa != best and schemas.ISA_NAMES.index(isa) < schemas.ISA_NAMES.index(best)
    ]


@pytest.mark.skipif(library.cpu_isa() == "none", reason="_C is not built")
@pytest.mark.skipif("MMREC_CPU_ISA" in os.environ, reason="MMREC_CPU_ISA already chooses one")
@pytest.mark.parametrize("isa", other_isas())
def test_every_lower_instruction_set(isa):
    run_pytest(COMPILED, MMREC_CPU_ISA=isa)


@pytest.mark.parametrize("op", INTERPRETED)
def test_triton_interpreter(op):
    pytest.importorskip("triton")
    run_pytest((op,), TRITON_INTERPRET="1")


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
