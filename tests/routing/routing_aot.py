"""Ahead-of-time compilation of the Triton kernels of routing."""

from __future__ import annotations

from typing import Any

import torch

from aot import Resources, compile_for, signature_of

# Sizes of every argument that is no constant; pointers are float32 unless they are listed.
POINTERS = {
    "modality": "*i64", "valid": "*u8", "allowed": "*u8", "experts": "*i32", "ids": "*i32", "counts": "*i64",
    "starts": "*i64", "tokens": "*i64", "slots": "*i64", "shared": "*i64", "leads": "*i64", "used": "*u8",
}  # fmt: skip
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def compiled(
    kernel: Any, rows: tuple[str, ...], dtype: str, constants: dict[str, Any], capability: int
) -> tuple[Resources, int]:
    """Resources of `kernel`; pointers in `rows` are of `dtype`."""
    warps, stages = constants.pop("num_warps", 4), constants.pop("num_stages", 3)
    constants = {n: v for n, v in constants.items() if n in kernel.arg_names}
    signature = signature_of(kernel, constants, rows, dtype, POINTERS)
    return compile_for(kernel, signature, constants, capability, num_warps=warps, num_stages=stages), warps
