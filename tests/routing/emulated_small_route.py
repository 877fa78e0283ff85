"""The CUDA C++ router for few tokens as a launcher of `_routing_forward_small` on CPU tensors, a warp at a time."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from emulated import compile_for_host

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_SCORES = ("softmax", "topk_softmax", "sigmoid")


def build(folder: Path) -> Callable[..., tuple[Tensor, ...]]:
    """Compiles csrc/routing/small_route.cuh for the host and gives its launcher."""
    run = compile_for_host("routing/emulated_small_route.cpp", folder).emulated_route

    def forward(
        x: Tensor, gate_weight: Tensor, modality: Tensor | None, allowed: Tensor | None, bias: Tensor | None,
        valid: Tensor | None, k: int, num_modalities: int, score: str, renormalize: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        tokens, width, experts = *x.shape, gate_weight.shape[0]
        padded = next(size for size in (8, 16, 32, 64) if experts <= size)
        blocks = -(-tokens // 32)

        def made(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            # Poisoned: what nobody writes is seen.
            return torch.full(shape, torch.nan if dtype.is_floating_point else -77, dtype=dtype)

        results = (
            made(tokens, k), made(tokens, k, dtype=torch.int32), made(num_modalities, experts, 3),
            made(4, num_modalities), made(experts + 1, dtype=torch.int64), made(tokens * k, dtype=torch.int64),
            made(tokens, k, dtype=torch.int64),
        )  # fmt: skip
        scratch = (
            made(blocks, num_modalities, 3, padded), made(blocks, num_modalities, 3),
            made(blocks, padded, dtype=torch.int32), made(tokens, k, dtype=torch.int32),
            torch.zeros(1, dtype=torch.int32),
        )  # fmt: skip
        gate = gate_weight.contiguous()
        inputs = [None if t is None else t.contiguous() for t in (modality, valid, allowed, bias)]
        pointers = [x.data_ptr(), gate.data_ptr(), *(0 if t is None else t.data_ptr() for t in inputs)]
        pointers += [t.data_ptr() for t in (*results, *scratch)]

        def aligned(t: Tensor) -> int:
            return int(width % 8 == 0 and t.stride(0) * t.element_size() % 16 == 0 and t.data_ptr() % 16 == 0)

        numbers = [
            *pointers, x.stride(0) * x.element_size(), tokens, width, experts, num_modalities, k, blocks, aligned(x),
            aligned(gate), int(renormalize or score == "topk_softmax"), _SCORES.index(score),
        ]  # fmt: skip
        run(_KINDS[x.dtype], _KINDS[gate.dtype], (ctypes.c_int64 * len(numbers))(*numbers))
        return results

    return forward
