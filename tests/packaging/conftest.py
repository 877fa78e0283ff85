"""The wheel, built as `make wheel` builds it, and a new environment in which it is installed beside torch and numpy."""

from __future__ import annotations

import os
import re
import shutil
import sys
import venv
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest
from subprocesses import processor_seconds, run

from paths import ROOT


class Environment(NamedTuple):
    """A virtual environment with the wheel, and the seconds of processors that installing it took."""

    python: Path
    site: Path
    install_seconds: float


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree without build outputs, so that nothing built before gets into the wheel."""
    copy = tmp_path_factory.mktemp("source") / "mmrec-kernels"
    ignored = shutil.ignore_patterns(".git", "build", "dist", "runs", "*.so", "*.egg-info", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, copy, ignore=ignored)
    return copy


@pytest.fixture(scope="session")
def wheel(source: Path) -> Path:
    """`MMREC_WHEEL` names one that was built before."""
    if "MMREC_WHEEL" in os.environ:
        return Path(os.environ["MMREC_WHEEL"]).resolve()
    pytest.importorskip("auditwheel", reason="auditwheel repairs wheels on Linux")
    # The interpreter of the tests stands in for the environment that make would set up.
    log = run("make", "-o", "setup", "wheel", f"VENV={sys.prefix}", cwd=source)
    # torch is here already: an isolated build that fetched another would pull gigabytes.
    assert not re.search(r"(Collecting|Downloading) torch\b", log)
    wheels = list((source / "dist").glob("*.whl"))
    assert len(wheels) == 1
    return wheels[0]


@pytest.fixture(scope="session")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="session")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    python = folder / "bin/python"
    pip = (python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "-c", ROOT / "constraints.txt")
    run(*pip, "torch", "numpy")
    start = processor_seconds()
    run(*pip, wheel)
    taken = processor_seconds() - start
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('platlib'))").strip()
    return Environment(python, Path(site), taken)


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """every_op.py, away from the checkout."""
    copy = tmp_path / "every_op.py"
    shutil.copy(ROOT / "tests/packaging/every_op.py", copy)
    return copy
