"""Lays the built package out as a repository of Hugging Face's `kernels`: `python -m mmrec_kernels.hub FOLDER`.

    FOLDER/build/torch-stable-abi210-cpu-x86_64-linux/     for a CPU torch >= 2.10: with _C
                 torch-stable-abi210-cu130-x86_64-linux/   for a torch of CUDA 13: with _C and _C_cuda, if built
                 torch-cpu/  torch-cuda/                   for any other: Python only, the references and Triton

Each holds `metadata.json`, `__init__.py`, which is what `kernels` imports, and the package as it is.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from . import __version__

_PACKAGE = Path(__file__).parent
_LEFT_OUT = ("benchmarks", "hub.py", "__pycache__", "*.pyc", "*.so", "*.version")
_ENTRY = '''"""mmrec_kernels {version} as a kernel of Hugging Face's `kernels`: its functions, and `layers`."""

import importlib
import sys

# One copy of the package can define the ops in a process. A copy that is there already serves in this one's place.
_package = sys.modules.get("mmrec_kernels")
if _package is None:
    from . import mmrec_kernels as _package
elif _package.__version__ != "{version}":
    raise ImportError(f"this kernel is mmrec_kernels {version}, and {{_package.__version__}} is imported already")
layers = importlib.import_module(f"{{_package.__name__}}.layers")
__version__ = _package.__version__
__all__ = [*_package.__all__, "layers"]
globals().update({{name: getattr(_package, name) for name in _package.__all__}})
'''


def variants() -> dict[str, tuple[str, tuple[str, ...]]]:
    """The folders to write: the name of each, its backend and the files that it has beside the Python ones."""
    machine = f"{platform.machine()}-linux"
    found: dict[str, tuple[str, tuple[str, ...]]] = {"torch-cpu": ("cpu", ()), "torch-cuda": ("cuda", ())}
    if sys.platform != "linux" or not (_PACKAGE / "_C.so").exists():
        return found
    found[f"torch-stable-abi210-cpu-{machine}"] = ("cpu", ("_C.so",))
    version = _PACKAGE / "_C_cuda.version"
    if version.exists() and (_PACKAGE / "_C_cuda.so").exists():
        major, minor = version.read_text().split(".")[:2]
        files = ("_C.so", "_C_cuda.so", "_C_cuda.version")
        found[f"torch-stable-abi210-cu{major}{minor}-{machine}"] = ("cuda", files)
    return found


def lay_out(folder: Path) -> list[Path]:
    """Write the repository to `folder`, which must not be there or be empty; the folders of its variants.

    Raises:
        ValueError: `folder` holds something.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"folder must be empty or not be there, got {folder}")
    written = []
    for name, (backend, files) in variants().items():
        variant = folder / "build" / name
        shutil.copytree(_PACKAGE, variant / "mmrec_kernels", ignore=shutil.ignore_patterns(*_LEFT_OUT))
        for file in files:
            shutil.copy2(_PACKAGE / file, variant / "mmrec_kernels" / file)
        (variant / "__init__.py").write_text(_ENTRY.format(version=__version__), encoding="utf-8")
        metadata = {
            "id": f"_mmrec_kernels_{backend}_{_digest(variant)}",  # the name it is imported under
            "name": "mmrec-kernels",
            "version": int(__version__.split(".")[0]),
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": {"type": backend},
        }
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
        written.append(variant)
    return written


def _digest(variant: Path) -> str:
    content = hashlib.sha256()
    for path in sorted(p for p in variant.rglob("*") if p.is_file()):
        content.update(str(path.relative_to(variant)).encode() + path.read_bytes())
    return content.hexdigest()[:12]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m mmrec_kernels.hub", description="Lay the package out for kernels.")
    parser.add_argument("folder", type=Path, help="where to; empty or not there yet")
    try:
        for variant in lay_out(parser.parse_args(arguments).folder):
            print(variant)
    except ValueError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
