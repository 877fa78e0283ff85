"""Builds the compiled libraries with CMake and packs them into the wheel; pyproject.toml has everything declarative."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
TORCH_REQUIREMENT = "torch>=2.10"


def locate_torch() -> Path | None:
    """The folder of an installed torch >= 2.10, found without importing it (that takes seconds and may fail while
    building): MMREC_TORCH_DIR, else importable, else in the environment that an isolated build was started from."""
    named = os.environ.get("MMREC_TORCH_DIR")
    candidates = [Path(named)] if named else []
    if not named:
        spec = importlib.util.find_spec("torch")
        if spec and spec.origin:
            candidates.append(Path(spec.origin).parent)
        candidates.append(Path(sysconfig.get_path("platlib")) / "torch")
    for folder in candidates:
        version = folder / "version.py"
        if not (folder / "include/torch/csrc/stable/library.h").exists() or not version.exists():
            continue
        found = re.search(r"__version__\s*=\s*['\"](\d+)\.(\d+)", version.read_text())
        if found and (int(found[1]), int(found[2])) >= (2, 10):
            return folder.resolve()
    if named:
        sys.exit(f"MMREC_TORCH_DIR must be the folder of an installed {TORCH_REQUIREMENT}, got {named}")
    return None


def build_requirements() -> list[str]:
    """What an isolated build has to fetch: only what this machine does not have."""
    needed = [] if locate_torch() else [TORCH_REQUIREMENT]
    needed += [] if shutil.which("cmake") else ["cmake>=3.24"]
    return needed + ([] if shutil.which("ninja") else ["ninja"])


class CMakeBuild(build_ext):
    """Runs CMake once; the libraries land beside the Python files, in the build folder or, when editable, the tree."""

    def run(self) -> None:
        torch_dir = locate_torch()
        if torch_dir is None:
            sys.exit(f"{TORCH_REQUIREMENT} is needed to build: pip install torch, or set MMREC_TORCH_DIR to its folder")
        cmake = shutil.which("cmake")
        if cmake is None:
            sys.exit("CMake >= 3.24 is needed to build: pip install cmake, or apt install cmake")
        compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
        if compiler is None:
            sys.exit("A C++20 compiler is needed to build: g++ >= 11 or clang++ >= 14 (apt install g++), or set CXX")
        in_tree = self.editable_mode or self.inplace
        target = ROOT / "mmrec_kernels" if in_tree else Path(self.build_lib) / "mmrec_kernels"
        # In the tree the build folder stays, so that the next build compiles only what changed.
        build = ROOT / "build" / "cmake" if in_tree else Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        self._cmake(
            [cmake, "-S", str(ROOT), "-B", str(build), *generator, f"-DMMREC_TORCH_DIR={torch_dir}",
             f"-DCMAKE_CXX_COMPILER={compiler}", "-DCMAKE_BUILD_TYPE=Release",
             *os.environ.get("MMREC_CMAKE_ARGS", "").split()]
        )  # fmt: skip
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(os.cpu_count() or 1)
        self._cmake([cmake, "--build", str(build), "--parallel", jobs])
        self._cmake([cmake, "--install", str(build), "--prefix", str(target.resolve())])

    def _cmake(self, command: list[str]) -> None:
        if subprocess.run(command, check=False).returncode != 0:
            sys.exit(f"building the compiled libraries failed: {' '.join(command[:2])} … (see its output above)")

    def get_outputs(self) -> list[str]:
        folder = Path(self.build_lib) / "mmrec_kernels"
        return [str(p) for name in ("_C", "_C_cuda") for p in folder.glob(f"{name}.*")]


class AnyPythonWheel(bdist_wheel):
    """The libraries use LibTorch's stable ABI and nothing of CPython's: one wheel serves every Python of a platform."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    packages=[
        *find_packages(str(ROOT), include=["mmrec_kernels", "mmrec_kernels.*"]),
        "mmrec_kernels.benchmarks",  # lives in benchmarks/, see package-dir
        *find_packages(str(ROOT / "python_api")),
    ],
    ext_modules=[Extension("mmrec_kernels._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": AnyPythonWheel},
    setup_requires=build_requirements(),
)
