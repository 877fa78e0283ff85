"""The CUDA C++ linear for few tokens as a launcher of `_nf4_forward` on CPU tensors, a warp at a time."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emulated import compile_for_host

MOST_TOKENS = 64


def build(folder: Path) -> Callable[..., Callable[..., tuple[Tensor, Tensor]]]:
    """Compiles csrc/nf4/small_linear.cuh for the host and gives its launcher for blocks of 16 or 32 rows of W."""
    run = compile_for_host("nf4/emulated_small_linear.cpp", folder).emulated_linear

    def launcher(rows_of_block: int) -> Callable[..., tuple[Tensor, Tensor]]:
        def forward(
            x: Tensor, packed: Tensor, absmax: Tensor, nested_absmax: Tensor | None, nested_code: Tensor | None,
            offset: Tensor | None, out_features: int, blocksize: int, bias: Tensor | None, lora_a: Tensor | None,
            lora_b: Tensor | None, scaling: float, scalings: Tensor | None, adapter_ids: Tensor | None,
            save_lora_x: bool,
        ) -> tuple[Tensor, Tensor]:  # fmt: skip
            tokens, width = x.shape
            assert tokens <= MOST_TOKENS and width % 32 == 0 and x.data_ptr() % 16 == 0 and packed.data_ptr() % 16 == 0
            adapters, rank = (0, 0) if lora_a is None else lora_a.shape[:2]
            # Poisoned: what nobody writes is seen.
            y = torch.full((tokens, out_features), torch.nan, dtype=x.dtype)
            low = torch.full((tokens, rank), torch.nan if adapters else 0.0)

            def pointers(*tensors: Tensor | None) -> list[int]:
                return [0 if t is None or not t.numel() else t.data_ptr() for t in tensors]

            def wide(t: Tensor | None) -> int:
                return int(t is not None and t.dtype == torch.float32)

            aligned = int(rank % 8 == 0 and (lora_b is None or lora_b.data_ptr() % 16 == 0))
            given: list[Any] = [
                *pointers(x, packed, absmax, nested_absmax, nested_code, offset, bias, lora_a, lora_b, scalings),
                *pointers(adapter_ids, low if adapters else None, y),
                tokens, width, out_features, rank, adapters, blocksize.bit_length() - 1, wide(bias), wide(lora_a),
                aligned,
            ]  # fmt: skip
            half = int(x.dtype == torch.float16)
            run(half, rows_of_block, ctypes.c_float(scaling), (ctypes.c_int64 * len(given))(*given))
            return y, low if save_lora_x else x.new_empty(0, dtype=torch.float32)

        return forward

    return launcher
