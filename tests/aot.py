"""Ahead-of-time compilation of Triton kernels, without a GPU: registers, spills and shared memory of each."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


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
    """Compile `kernel` for sm_<capability>. `signature` maps every argument to its type, or to a tuple of types;
    pointers, strides and widths are taken as divisible by 16, as they are at run time for the shapes that matter, save
    in tuples that the kernel does not specialize."""
    signature = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    divisible = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if isinstance(signature[name], str)
        and (signature[name].startswith("*") or name.endswith("_stride") or name.endswith("width"))
    }
    free = {getattr(p, "name", p) for p in kernel.params if getattr(p, "do_not_specialize", False)}
    for i, name in enumerate(kernel.arg_names):
        if not isinstance(signature[name], str) and name not in free:
            pointers = (j for j, kind in enumerate(signature[name]) if isinstance(kind, str) and kind.startswith("*"))
            divisible |= {(i, j): [["tt.divisibility", 16]] for j in pointers}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(kernel.arg_names.index(name),): value for name, value in constexprs.items()},
        attrs=divisible,
    )
    compiled = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": num_warps, "num_stages": num_stages}
    )
    usage = _resource_usage(compiled.asm["cubin"])
    return Resources(usage["REG"], usage["STACK"], int(compiled.metadata.shared), compiled.asm["ptx"])


def _resource_usage(cubin: bytes) -> dict[str, int]:
    tool = next(Path(triton.__file__).parent.rglob("cuobjdump"))
    path = Path(tempfile.mkdtemp()) / "kernel.cubin"
    path.write_bytes(cubin)
    text = subprocess.run(
        [str(tool), "--dump-resource-usage", str(path)], check=True, capture_output=True, text=True
    ).stdout
    line = next(line for line in text.splitlines() if "REG:" in line)
    return {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", line)}
