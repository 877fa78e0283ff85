"""Runs the kernel tests again where the environment chooses other code: every ISA of this CPU, Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from conftest import ROOT
from mmrec_kernels import library, schemas

COMPILED = ("retrieval",)  # the ops that have C++ kernels
INTERPRETED = ("retrieval",)  # the ops that have Triton kernels


def run_pytest(folders: tuple[str, ...], **environment: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *(f"tests/{f}" for f in folders)]
    # The ahead-of-time table does not depend on the environment, and compiles for minutes.
    command += ["-k", "not ahead_of_time"]
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


def test_triton_interpreter():
    pytest.importorskip("triton")
    run_pytest(INTERPRETED, TRITON_INTERPRET="1")


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
