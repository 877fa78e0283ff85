"""The wheel: what is in it, what its libraries need, and every op in an environment with torch and numpy only."""

from __future__ import annotations

import importlib.util
import platform
import re
import shutil
import statistics
import sys
from pathlib import Path

import pytest
from subprocesses import SAFE, processor_seconds, run

from paths import ROOT

pytestmark = pytest.mark.wheel


def libraries(unpacked: Path) -> list[Path]:
    return sorted((unpacked / "mmrec_kernels").glob("*.so"))


def test_tag_and_contents(wheel, unpacked):
    found = re.fullmatch(r"mmrec_kernels-[\d.]+-py3-none-manylinux_2_(\d+)_(\w+)\.whl", wheel.name)
    assert found and int(found[1]) <= 34 and found[2] == platform.machine(), wheel.name
    assert wheel.stat().st_size < 30e6
    names = {str(p.relative_to(unpacked)) for p in unpacked.rglob("*") if p.is_file()}
    expected = [
        "mmrec_kernels/__init__.py",
        "mmrec_kernels/benchmarks/__main__.py",
        "mmrec/__init__.py",
        "mmrec/cli.py",
        "mmrec/recommender/serving/page.html",
    ]
    expected += ["mmrec/adaptation/readers/movielens.py", "mmrec_kernels/py.typed", "mmrec_kernels/_C.so"]
    if shutil.which("nvcc"):
        expected += ["mmrec_kernels/_C_cuda.so", "mmrec_kernels/_C_cuda.version"]
    assert not set(expected) - names, set(expected) - names
    # A bundled library would lie in mmrec_kernels.libs.
    top = {name.split("/")[0] for name in names}
    assert {t for t in top if not t.endswith(".dist-info")} == {"mmrec_kernels", "mmrec"}
    modules = {str(p.relative_to(ROOT / "python_api")) for p in (ROOT / "python_api/mmrec").rglob("*.py")}
    assert not modules - names, modules - names


def test_no_path_of_the_builder(unpacked, source):
    torch_folder = Path(importlib.util.find_spec("torch").origin).parent
    for library in libraries(unpacked):
        content = library.read_bytes()
        for folder in (source, ROOT, Path.home(), torch_folder):
            assert str(folder).encode() not in content, (library.name, folder)
        assert b"RUNPATH" not in content


def test_symbols(unpacked):
    for library in libraries(unpacked):
        needed = run("objdump", "-T", library)
        versions = [tuple(map(int, v.split("."))) for v in re.findall(r"GLIBC_(\d+\.\d+)", needed)]
        assert max(versions) <= ((2, 28) if library.name == "_C.so" else (2, 34)), (library.name, max(versions))
        assert "libcudart" not in run("objdump", "-p", library)


def test_stable_abi(unpacked):
    for library in libraries(unpacked):
        report = run(Path(sys.executable).with_name("torch-abi-audit"), library)
        counts = re.findall(r"UNSTABLE=(\d+)", report.upper())
        assert counts and set(counts) == {"0"}, report
        assert re.findall(r"MIN-TORCH=([\d.]+)", report.upper())[-1] == "2.10.0", report


def test_only_torch_and_the_c_library_are_needed(unpacked):
    system = {"libc.so.6", "libm.so.6", "libgcc_s.so.1", "libstdc++.so.6"}
    system |= {"libdl.so.2", "librt.so.1", "libpthread.so.0"}
    for library in libraries(unpacked):
        needed = set(re.findall(r"NEEDED +(\S+)", run("objdump", "-p", library)))
        loader = {name for name in needed if name.startswith("ld-linux")}
        torch = {"libtorch_cpu.so"} | ({"libtorch_cuda.so"} if library.name == "_C_cuda.so" else set())
        assert torch <= needed <= torch | loader | system, needed


def test_auditwheel_finds_no_later_symbols(wheel):
    shown = run(Path(sys.executable).with_name("auditwheel"), "show", wheel)
    found = re.search(r'constrains the platform tag to\s+"manylinux_2_(\d+)_', shown)
    assert found and int(found[1]) <= 34, shown


def test_every_op_runs_in_a_new_environment(environment, script, tmp_path):
    assert "every op ran" in run(environment.python, *SAFE, script, cwd=tmp_path)
    assert "compiled" in run(environment.python, *SAFE, "-m", "mmrec_kernels", cwd=tmp_path)


def test_neither_network_nor_compiler_nor_cuda_is_touched(environment, script, tmp_path):
    """No connection, no process, nothing on PATH; where torch has no CUDA, _C_cuda.so is there and is not opened."""
    shutil.copy(ROOT / "tests/packaging/guarded.py", tmp_path)
    cuda = run(environment.python, "-c", "import torch; print(torch.cuda.is_available())").strip() == "True"
    mapped = "_C.so _C_cuda.so" if cuda else "_C.so"
    empty = {"PATH": str(tmp_path / "empty"), "HOME": str(tmp_path), "MMREC_MAPPED": mapped}
    assert "guarded" in run(environment.python, *SAFE, tmp_path / "guarded.py", script, cwd=tmp_path, env=empty)
    if shutil.which("nvcc"):
        assert (environment.site / "mmrec_kernels/_C_cuda.so").exists()


@pytest.mark.parametrize(
    "code",
    (
        "import socket; socket.create_connection(('127.0.0.1', 9))",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.system('true')",
    ),
)
def test_the_guard_refuses(code, tmp_path):
    (tmp_path / "code.py").write_text(code)
    with pytest.raises(AssertionError, match="PermissionError"):
        run(sys.executable, ROOT / "tests/packaging/guarded.py", tmp_path / "code.py", env={"MMREC_MAPPED": ""})


def test_import_is_quick(environment, tmp_path):
    """On top of torch, the median of five, in seconds of processors: how busy the machine is does not count."""
    code = "import time, torch; start = time.process_time(); import mmrec_kernels; print(time.process_time() - start)"
    taken = [float(run(environment.python, *SAFE, "-c", code, cwd=tmp_path)) for _ in range(5)]
    assert statistics.median(taken) < 0.150, taken


def test_install_swap_and_benchmark_within_three_minutes(environment, tmp_path):
    """The README's first examples and one benchmark, in seconds of processors: other load does not count."""
    start = processor_seconds()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for number, example in enumerate(re.findall(r"^```python\n(.*?)^```$", readme, re.M | re.S)):
        (tmp_path / f"example_{number}.py").write_text(example)
        run(environment.python, *SAFE, tmp_path / f"example_{number}.py", cwd=tmp_path)
    benchmark = ("-m", "mmrec_kernels.benchmarks", "--op", "infonce", "--shapes", "small")
    assert "infonce" in run(environment.python, *SAFE, *benchmark, cwd=tmp_path)
    assert environment.install_seconds + processor_seconds() - start < 180
