"""Ahead-of-time compilation of Triton kernels, without a GPU: registers, spills and shared memory of each."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from paths import ROOT


@dataclass(frozen=True)
class Resources:
    registers: int
    stack_bytes: int  # local memory: spills and arrays that did not fit registers
    shared_bytes: int
    ptx: str


def compile_for(
    kernel: Any,
    signature: dict[str, Any],
    constexprs: dict[str, Any],
    capability: int,
    *,
    num_warps: int = 4,
    num_stages: int = 3,
) -> Resources:
    """Compile `kernel` for sm_<capability>. `signature` maps every argument to its type or a tuple of types; pointers,
    strides and widths are taken as divisible by 16, as they are at run time for the shapes that matter. In tuples,
    where types have no names, ":16" behind a type says so."""
    signature = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    divisible = {}

    def read(at: tuple[int, ...], kind: Any) -> Any:
        if not isinstance(kind, str):
            found = [read((*at, j), inner) for j, inner in enumerate(kind)]
            return type(kind)(*found) if hasattr(kind, "_fields") else tuple(found)
        name = kernel.arg_names[at[0]]
        named = len(at) == 1 and (kind.startswith("*") or name.endswith("_stride") or name.endswith("width"))
        if named or kind.endswith(":16"):
            divisible[at] = [["tt.divisibility", 16]]
        return kind.removesuffix(":16")

    signature = {name: read((i,), signature[name]) for i, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(kernel.arg_names.index(name),): value for name, value in constexprs.items()},
        attrs=divisible,
    )
    compiled = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": num_warps, "num_stages": num_stages}
    )
    path = Path(tempfile.mkdtemp()) / "kernel.cubin"
    path.write_bytes(compiled.asm["cubin"])
    (usage,) = resource_usage(path).values()
    return Resources(usage["REG"], usage["STACK"], int(compiled.metadata.shared), compiled.asm["ptx"])


def check_resources(used: Resources, warps: int, spill: int = 0, tf32: bool = False) -> None:
    """`spill`: bytes that may be spilt. `tf32`: products in three of them, which are near float32, are asked for."""
    assert used.stack_bytes <= spill
    assert used.registers * warps * 32 <= 65536
    assert used.shared_bytes <= 100 * 1024
    assert tf32 or "tf32" not in used.ptx


def signature_of(
    kernel: Any, constants: dict[str, Any], rows: tuple[str, ...], dtype: str, pointers: dict[str, str]
) -> dict[str, str]:
    """Types of a kernel's arguments that are no constants: numbers are i32; pointers in `rows` are of `dtype`, those in
    `pointers` of the type there, and others float32."""
    found = {}
    for argument in kernel.arg_names:
        pointer = argument.removesuffix("_ptr")
        if argument in constants:
            continue
        if argument == pointer:
            found[argument] = "i32"
        else:
            found[argument] = f"*{dtype}" if pointer in rows else pointers.get(pointer, "*fp32")
    return found


def resource_usage(path: Path) -> dict[tuple[str, str], dict[str, int]]:
    """REG, STACK, SHARED and more of every kernel of a cubin or of a library, by architecture and mangled name."""
    tool = next(Path(triton.__file__).parent.rglob("cuobjdump"))
    command = [str(tool), "--dump-resource-usage", str(path)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found, arch = {}, ""
    for name, lines in re.findall(r"^\s*(arch = \S+|Function \S+?:)(.*(?:\n\s+REG:.*)?)", text, re.M):
        if name.startswith("arch"):
            arch = name.removeprefix("arch = ")
        else:
            found[arch, name[len("Function ") : -1]] = {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", lines)}
    return found


def record_launches(capability: int) -> dict[str, int]:
    """From here on this process's launches compile, as the launcher's arguments ask for, and run nothing. The result
    counts the compilations of each kernel. For a process of its own: the driver is replaced."""
    from triton.runtime import driver, jit

    class Driver:
        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", capability, 32)

    driver.set_active(Driver())
    found: dict[str, int] = {}
    compile_one = jit.JITFunction._do_compile

    def launch(self: Any, grid: Any) -> Any:
        return lambda *args, **options: self.run(*args, grid=grid, warmup=True, **options)

    def count(self: Any, *args: Any, **options: Any) -> Any:
        found[self.__name__] = found.get(self.__name__, 0) + 1
        return compile_one(self, *args, **options)

    jit.JITFunction.__getitem__ = launch
    jit.JITFunction._do_compile = count
    return found


def launches_of(folder: Path) -> dict[str, dict[str, int]]:
    """What `launches_ahead_of_time.py` of a folder of tests prints, in a process of its own."""
    script = folder / "launches_ahead_of_time.py"
    folders = (str(ROOT), str(ROOT / "tests"), str(folder), os.environ.get("PYTHONPATH", ""))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, dict[str, int]] = json.loads(done.stdout.splitlines()[-1])
    return found
