"""The CUDA C++ forward for tiny sequences as a launcher of `_attention_forward` on CPU tensors, a warp at a time."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emulated import compile_for_host
from mmrec_kernels.attention.arguments import Arguments


def build(folder: Path) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Compiles csrc/attention/warp_forward.cuh for the host and gives its launcher."""
    attend = compile_for_host("attention/emulated_forward.cpp", folder).emulated_forward

    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        *inputs, return_mass = arguments
        p = Arguments(*inputs)
        kv_heads, group = p.heads
        heads, width, count, batch = p.query.shape[1], p.query.shape[2], len(p.keys), p.offsets.shape[1] - 1
        rows = p.query.shape[0] * (1 if p.query_offsets is not None else batch)
        # Poisoned: what nobody writes is seen.
        out = torch.full((rows, heads, width), torch.nan, dtype=p.query.dtype)
        lse = torch.full((rows, heads), torch.nan, dtype=torch.float64)
        mass = torch.full((rows, heads, count) if return_mass else (0,), torch.nan)
        held: list[Tensor] = []

        def pointer(x: Tensor | None) -> int:
            if x is None:
                return 0
            held.append(x)
            return x.data_ptr()

        def floats(x: Tensor | None) -> int:
            return pointer(None if x is None else x.float().contiguous())

        def per_segment(x: Tensor | None) -> list[int]:
            if x is None:
                return [0] * 4
            held.append(x := x.float())
            return [x.data_ptr(), *(0 if size == 1 else step for size, step in zip(x.shape, x.stride(), strict=True))]

        bytes_of = p.query.element_size()
        numbers = [
            pointer(p.query), pointer(p.query_offsets), pointer(p.offsets.contiguous()), floats(p.sink),
            floats(p.query_norm), floats(p.key_norm), pointer(out), pointer(lse), pointer(mass) if return_mass else 0,
            *per_segment(p.log_bias), *per_segment(p.value_gate), p.query.stride(0) * bytes_of,
            p.query.stride(1) * bytes_of, batch, p.query.shape[0], kv_heads, group, count, p.causal,
        ]  # fmt: skip
        index = iter(p.index)
        for m, (key, value) in enumerate(zip(p.keys, p.values, strict=True)):
            chosen = next(index) if p.indexed >> m & 1 else None
            steps = [x.stride(axis) * bytes_of for x in (key, value) for axis in (0, 1)]
            entries = key.shape[0] if chosen is None else chosen.shape[0]
            numbers += [pointer(key), pointer(value), pointer(chosen), *steps, key.shape[0], entries]
        attend(
            int(p.query.dtype == torch.float16), width, ctypes.c_float(p.scale), ctypes.c_float(p.norm_eps),
            (ctypes.c_int64 * len(numbers))(*numbers),
        )  # fmt: skip
        return out, lse, mass

    return forward
