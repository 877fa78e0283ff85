"""The wheel: built in isolation, carried to a new environment with torch and numpy only, and run there."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from paths import ROOT

pytestmark = pytest.mark.wheel


def run(*command: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree without build outputs, so that nothing built before gets into the wheel."""
    copy = tmp_path_factory.mktemp("source") / "mmrec-kernels"
    ignored = shutil.ignore_patterns(".git", "build", "dist", "runs", "*.so", "*.egg-info", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, copy, ignore=ignored)
    return copy


@pytest.fixture(scope="session")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    log = run(sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "-w", out, ".", cwd=source)
    # torch is here already: an isolated build that fetched another would pull gigabytes.
    assert not re.search(r"(Collecting|Downloading) torch\b", log)
    wheels = list(out.glob("*.whl"))
    assert len(wheels) == 1
    return wheels[0]


@pytest.fixture(scope="session")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def libraries(unpacked: Path) -> list[Path]:
    return sorted((unpacked / "mmrec_kernels").glob("*.so"))


def test_tag_and_contents(wheel, unpacked):
    assert re.fullmatch(r"mmrec_kernels-[\d.]+-py3-none-\w+\.whl", wheel.name), wheel.name
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


def test_every_op_runs_in_a_new_environment(wheel, tmp_path):
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv/bin/python"
    pip = (python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "-c", ROOT / "constraints.txt")
    run(*pip, "torch", "numpy")
    run(*pip, wheel)
    script = tmp_path / "every_op.py"
    shutil.copy(ROOT / "tests/packaging/every_op.py", script)
    # Safe path: neither the checkout nor the script's folder may shadow the wheel.
    safe = ("-P",) if sys.version_info >= (3, 11) else ("-I",)
    assert "every op ran" in run(python, *safe, script, cwd=tmp_path)
    assert "compiled" in run(python, *safe, "-m", "mmrec_kernels", cwd=tmp_path)
