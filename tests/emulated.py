"""CUDA C++ kernels compiled for the host: a warp's lanes as coroutines (emulated_warp.h)."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
from pathlib import Path

import pytest

from paths import ROOT

# The host's side of it is written for x86.
HERE = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the emulated warp needs an x86 host")


def compile_for_host(source: str, folder: Path) -> ctypes.CDLL:
    """The library of `source`, a path in tests/, built in `folder`."""
    library = folder / f"{Path(source).stem}.so"
    command = [
        os.environ.get("CXX", "c++"), "-std=c++17", "-O1", "-mf16c", "-Wall", "-Wextra", "-Werror",
        "-Wno-unknown-pragmas", "-shared", "-fPIC", "-I", str(ROOT / "tests"), str(ROOT / "tests" / source),
        "-o", str(library),
    ]  # fmt: skip
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


COMPILED = ROOT / "mmrec_kernels" / "_C_cuda.so"


def compiled_usage(kernel: str) -> dict[tuple[str, str], dict[str, int]]:
    """What nvcc's compilations of a kernel use, by architecture and name; skips where there is no CUDA library."""
    if not COMPILED.exists():
        pytest.skip("no CUDA library was built (nvcc)")
    pytest.importorskip("triton")  # its tools read the library
    from aot import resource_usage

    found = {key: used for key, used in resource_usage(COMPILED).items() if kernel in key[1]}
    assert {arch for arch, _ in found} == {"sm_80", "sm_90a"}
    return found
