"""What every Triton kernel of this package shares. Imported only where Triton serves, compiles or is tested."""

from __future__ import annotations

import os

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


def next_power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()
