"""The wheel on other Pythons and other versions of torch: those that are found here, or named.

`MMREC_PYTHONS` names interpreters, separated as in PATH; without it they are looked for by name. In each the wheel is
installed and compiled to bytecode; where one has a torch, every op runs, behind stand-ins for what that torch lacks.
Torch 2.10, the oldest that the wheel takes, without the gigabytes that its default build asks for:

    python3.11 -m venv old && old/bin/pip install --no-deps torch==2.10.0
    old/bin/pip install numpy filelock typing-extensions sympy networkx jinja2 fsspec
    MMREC_PYTHONS=old/bin/python python -m pytest -m wheel tests/packaging/test_wheel_pythons.py
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import stand_ins
from subprocesses import run

pytestmark = pytest.mark.wheel

LOOKED_FOR = os.pathsep.join(f"python3.{minor}" for minor in (10, 11, 12, 13, 14))
NAMED = os.environ.get("MMREC_PYTHONS", LOOKED_FOR).split(os.pathsep)
TORCH = "import importlib.util as u; s = u.find_spec('torch'); print(s.origin if s else '')"


@pytest.fixture(params=NAMED)
def interpreter(request: pytest.FixtureRequest) -> str:
    found = shutil.which(request.param)
    # A shim may be there for an interpreter that is not.
    if found is None or subprocess.run([found, "-c", ""], capture_output=True).returncode != 0:
        if "MMREC_PYTHONS" in os.environ:
            pytest.fail(f"MMREC_PYTHONS names {request.param}, which does not run")
        pytest.skip(f"no {request.param} here")
    return str(Path(found).absolute())


@pytest.fixture
def site(interpreter: str, wheel: Path, tmp_path: Path) -> Path:
    """The wheel as that Python's pip takes it: tags and metadata are held against the interpreter's own."""
    folder = tmp_path / "site-packages"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", interpreter)
    run(*pip, "install", "-q", "--no-deps", "--no-compile", "--target", folder, wheel)
    return folder


def test_installs_and_compiles(interpreter, site):
    run(interpreter, "-W", "error", "-m", "compileall", "-q", "-f", site)
    assert list(site.glob("mmrec/__pycache__/*.pyc")) and list(site.glob("mmrec_kernels/__pycache__/*.pyc"))


def test_every_op_runs(interpreter, site, script, tmp_path):
    torch = run(interpreter, "-c", TORCH).strip()
    if not torch:
        pytest.skip(f"{interpreter} has no torch")
    environment = {**os.environ, "PYTHONPATH": str(site)}
    if stand_ins.stand_ins(Path(torch).parent, tmp_path / "stand-ins"):
        environment["LD_LIBRARY_PATH"] = str(tmp_path / "stand-ins")
    assert "every op ran" in run(interpreter, script, cwd=tmp_path, env=environment)
