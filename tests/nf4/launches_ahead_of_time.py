"""Launches the NF4 linear's Triton kernels as a GPU would have them, compiling for sm_90 and running nothing, and
prints how often each was compiled: {case: {kernel: times}}. A process of its own, of `test_nf4_triton.py`."""

from __future__ import annotations

import json

import torch
from test_nf4_kernel import make

from aot import record_launches
from mmrec_kernels.nf4.triton import backward, decode, dequantize, forward, passes
from mmrec_kernels.triton_common import FUSED

found = record_launches(90)


def both(tokens: int, out: int, width: int, rank: int, dtype: torch.dtype, adapters: int, mixed: bool) -> None:
    """Forward and backward, with everything of a mixed batch or with one adapter, and without any."""
    given = make(tokens, out, width, 64, rank, dtype, adapters)
    weight, a, b, ids = given["weight"].tensors(), given["a"], given["b"], given["ids"] if mixed else None
    scalings, bias = (given["scalings"], given["bias"]) if mixed else (None, None)
    _, s = forward(given["x"], *weight, out, 64, bias, a, b, 2.0, scalings, ids, True)
    backward(given["dy"], given["x"], *weight, width, 64, a, b, 2.0, scalings, ids, s, True, True, True, mixed)
    forward(given["x"], *weight, out, 64, bias, None, None, 1.0, None, None, False)
    backward(given["dy"], None, *weight, width, 64, None, None, 1.0, None, None, None, True, False, False, False)
    dequantize(*weight, out, width, 64, str(dtype).removeprefix("torch."))


def told(since: dict[str, int]) -> dict[str, int]:
    return {name: count - since.get(name, 0) for name, count in found.items() if count > since.get(name, 0)}


def multiply_adds(**options: bool) -> int:
    """In the kernel that expands a nested absmax."""
    absmax, nested, code, offset = make(1, 5, 64, 64, 1, torch.float32)["weight"].tensors()[1:]
    out = torch.zeros(absmax.shape)
    kernel = decode.absmax_kernel[(1,)](absmax, nested, code, offset, out, absmax.numel(), BLOCK=16, **options)
    return int("fma.rn.f32" in kernel.asm["ptx"])


for dtype in (torch.bfloat16, torch.float16, torch.float32):
    both(70, 97, 896, 8, dtype, 3, True)
    both(70, 98, 200, 16, dtype, 1, False)
everything = told({})
both(1, 1, 1, 1, torch.bfloat16, 1, True)
both(16, 16, 16, 1, torch.bfloat16, 1, False)
both(600, 896, 896, 16, torch.bfloat16, 3, True)
both(600, 896, 896, 16, torch.bfloat16, 1, False)
before = dict(found)
for tokens in (777, 800, 1000, 1024, 1025):
    both(tokens, 896, 896, 16, torch.bfloat16, 3, True)
    both(tokens, 896, 896, 16, torch.bfloat16, 1, False)
ragged = told(before)
products = {"as launched": multiply_adds(**passes.APART), "by default": multiply_adds(**FUSED)}
print(json.dumps({"everything": everything, "ragged": ragged, "fused multiply-adds of absmax": products}))
