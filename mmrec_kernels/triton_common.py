"""What every Triton kernel of this package shares. Imported only where Triton serves, compiles or is tested."""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """acc + a @ b in float32; b is cast to a's dtype. UPCAST: the interpreter multiplies bfloat16 bit patterns (and
    casts integers to them), so it takes the dot in float32."""
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b.to(a.dtype), acc, input_precision=PRECISION)


@triton.jit
def rounded(x, DTYPE: tl.constexpr, UPCAST: tl.constexpr):
    """x, float32 or wider, rounded to nearest even. UPCAST: the interpreter truncates to bfloat16, so this does it."""
    if UPCAST:
        if DTYPE == tl.bfloat16:
            bits = x.to(tl.int32, bitcast=True)
            even = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), bits)
            return (even >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return x.to(DTYPE)


# Of every launch that adds products: the default changes with Triton 3.10, and with it the last bits.
FUSED = {"enable_fp_fusion": True}


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def precision(dtype: torch.dtype) -> str:
    """`input_precision` of float32 dots: plain tf32 only where torch's own matmul would use it."""
    # `allow_tf32` raises once a user has set `fp32_precision`, which knows of both.
    allowed = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"


def type_of(dtype: torch.dtype) -> Any:
    """Triton's name of a type of torch."""
    return getattr(tl, str(dtype).removeprefix("torch."))


def wide_type(dtype: torch.dtype) -> Any:
    """The type of sums."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def product_flags(dtype: torch.dtype) -> dict[str, Any]:
    """What `dot` and the sums of rows of `dtype` take."""
    return {"PRECISION": precision(dtype), "UPCAST": interpreted() and dtype != torch.float64, "WIDE": wide_type(dtype)}


def next_power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
