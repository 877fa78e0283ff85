"""The ops' tests again on a `_C` that was built with sanitizers: whatever one finds ends the process."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from paths import ROOT

pytestmark = [pytest.mark.sanitizer, pytest.mark.timeout(5400)]

OPS = ("attention", "infonce", "nf4", "retrieval", "routing")
SANITIZERS = "address,undefined"
# An access beyond a piece of memory, as a kernel would make it.
DEFECT = 'extern "C" float beyond(const float* row, long place) { return row[place]; }\n'
USE = """
import ctypes, torch
row = torch.zeros(37)
beyond = ctypes.CDLL("{library}").beyond
beyond.restype, beyond.argtypes = ctypes.c_float, (ctypes.c_void_p, ctypes.c_long)
beyond(row.data_ptr(), {place})
print("went on")
"""


def compiler() -> str:
    found = os.environ.get("CXX") or shutil.which("g++")
    if found is None:
        pytest.skip("needs g++, whose runtime is preloaded")
    return found


def preloaded() -> dict[str, str]:
    """The environment in which a library built with the sanitizers can be loaded into Python. The runtime wants the
    C++ library beside it, or it does not see the exceptions that torch throws."""
    runtime = [
        subprocess.run(
            [compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    options = "detect_leaks=0:detect_stack_use_after_return=1:strict_init_order=1:allocator_may_return_null=1"
    return {
        **os.environ,
        "LD_PRELOAD": " ".join(map(str.strip, runtime)),
        "ASAN_OPTIONS": options,
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "2",
    }


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree with the package, its tests and a `_C` with sanitizers. The build folder stays, for the next time."""
    build, folder = ROOT / "build/sanitized", tmp_path_factory.mktemp("tree")
    given = {
        "MMREC_TORCH_DIR": Path(torch.__file__).parent,
        "MMREC_CUDA": "OFF",
        "MMREC_SANITIZE": SANITIZERS,
        "CMAKE_CXX_COMPILER": compiler(),
    }
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    configure = [
        "cmake",
        "-S",
        ROOT,
        "-B",
        build,
        *generator,
        *(f"-D{name}={value}" for name, value in given.items()),
    ]
    without = shutil.ignore_patterns("*.so", "__pycache__", "results")
    for name, at in {
        "mmrec_kernels": "mmrec_kernels",
        "benchmarks": "mmrec_kernels/benchmarks",
        "tests": "tests",
    }.items():
        shutil.copytree(ROOT / name, folder / at, ignore=without)
    shutil.copy(ROOT / "pyproject.toml", folder)
    for command in (
        configure,
        ["cmake", "--build", build, "--parallel", str(os.cpu_count() or 1)],
        ["cmake", "--install", build, "--prefix", folder / "mmrec_kernels"],
    ):
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**preloaded(), "PYTHONPATH": str(folder)}
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(("place", "found"), ((36, False), (37, True)))
def test_an_access_beyond_a_tensor_is_found(place, found, tmp_path):
    """Torch's memory comes from the preloaded runtime, or nothing would be found in the tests below."""
    source, library = tmp_path / "defect.cpp", tmp_path / "defect.so"
    source.write_text(DEFECT)
    subprocess.run([compiler(), "-shared", "-fPIC", f"-fsanitize={SANITIZERS}", source, "-o", library], check=True)
    done = run(tmp_path, "-c", USE.format(library=library, place=place))
    assert ("went on" in done.stdout) is not found
    assert ("AddressSanitizer: heap-buffer-overflow" in done.stderr) is found, done.stderr[-3000:]


def test_the_library_is_built_with_them(tree):
    done = run(tree, "-m", "mmrec_kernels")
    assert done.returncode == 0 and str(tree) in run(tree, "-c", "import mmrec_kernels as m; print(m.__file__)").stdout
    assert "compiled" in done.stdout, done.stdout
    needed = subprocess.run(["objdump", "-T", tree / "mmrec_kernels/_C.so"], capture_output=True, text=True, check=True)
    assert "__asan_report" in needed.stdout and "__ubsan_handle" in needed.stdout


@pytest.mark.parametrize("op", OPS)
def test_nothing_is_found_in_the_tests_of(op, tree):
    """Triton's kernels are no part of the library; process groups and torch.compile start programs of their own."""
    others = "not triton and not warp and not processes and not compiles and not ahead_of_time"
    done = run(tree, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"tests/{op}", "-k", others)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert " passed" in done.stdout
