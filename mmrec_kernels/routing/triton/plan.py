"""`mixture_of_experts` on GPU: the plan of a call, and the sizes of its tiles."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ...triton_common import FUSED, interpreted, next_power_of_two, wide_type
from . import plan_kernels as kernels

# Tokens wider than this pass two kernels: their outputs do not fit the registers of one.
NETWORK_WIDTH = {torch.float32: 64, torch.float64: 64, torch.bfloat16: 128, torch.float16: 128}


def block_sizes(kernel: str, pairs: float, width: int, dtype: torch.dtype) -> dict[str, int]:
    """Sizes of the tiles of a kernel, by shapes and dtype alone: `pairs` that an expert has on average, `width` of the
    tokens. Chosen not to spill, measured on no GPU."""
    wide = dtype in (torch.float32, torch.float64)
    m = min(max(next_power_of_two(int(pairs)), 16), 32 if wide else 64)
    if kernel == "network":
        d = max(next_power_of_two(width), 16)
        f = 32 if wide or d > 64 else 64
        return {"BLOCK_M": m, "BLOCK_F": f, "BLOCK_D": d, "num_warps": 4 if m < 32 else 8, "num_stages": 2}
    if kernel == "outer":
        m, r, c = (32, 32, 32) if wide else (32, 64, 64)
        return {"BLOCK_M": m, "BLOCK_R": r, "BLOCK_C": c, "num_warps": 4, "num_stages": 2}
    f, d = (32, 32) if wide else (64, 64)
    return {"BLOCK_M": m, "BLOCK_F": f, "BLOCK_D": d, "num_warps": 4, "num_stages": 2}


@dataclass
class Plan:
    """The distinct (expert, token) pairs that slots name, by expert, then by token; the shared expert's are last."""

    num_tokens: int
    num_experts: int
    gates: int
    slots: int
    pairs: int  # at most so many: how many there are stays on the device
    tiles: int  # of tokens
    starts: Tensor  # int64 [columns · tiles + 1]: where the pairs of a tile begin, column by column
    tokens: Tensor  # int64 [pairs]
    pair_of: Tensor  # int64 [G, T, k], −1 without
    shared_pair: Tensor | None  # int64 [T], −1 without
    own: Tensor | None  # [T]: the shared expert's coefficient, and 1 − it
    rest: Tensor | None
    leads: Tensor | None = None  # for the backward: see place_kernel
    coefficients: Tensor | None = None
    used: Tensor | None = None

    @classmethod
    def of(cls, x: Tensor, weights: Tensor, ids: Tensor, num_experts: int, has_shared: bool, shared_gate: Tensor | None,
           backward: bool) -> Plan:  # fmt: skip
        gates, num_tokens, slots = ids.shape
        ids, weights = ids.contiguous(), weights.contiguous()
        columns = num_experts + has_shared
        block_e = max(next_power_of_two(num_experts), 16)
        sizes = {"BLOCK_T": 16 if interpreted() else max(1024 // block_e, 16), "BLOCK_E": block_e}
        sizes |= {"num_warps": 4 if block_e <= 64 else 8}
        tiles = triton.cdiv(num_tokens, sizes["BLOCK_T"])
        pairs = num_tokens * (min(gates * slots, num_experts) + has_shared)
        shape = (num_tokens, num_experts, gates, slots)
        own, rest = None, None
        if shared_gate is not None:
            own, rest = (x.new_empty(num_tokens, dtype=weights.dtype) for _ in range(2))
            kernels.shared_gate_kernel[(triton.cdiv(num_tokens, 32),)](
                ids, x, shared_gate, own, rest, *shape, x.shape[1], x.stride(0), BLOCK_T=32, BLOCK_D=32,
                WIDE=wide_type(x.dtype), **FUSED,
            )  # fmt: skip
        counts = ids.new_zeros(columns * tiles + 1, dtype=torch.int64)
        kernels.count_kernel[(tiles,)](ids, counts, *shape, tiles, HAS_SHARED=has_shared, **sizes, **FUSED)
        starts = counts.cumsum(0) - counts
        tokens = ids.new_empty(pairs, dtype=torch.int64)
        pair_of = ids.new_empty(ids.shape, dtype=torch.int64)
        shared_pair = ids.new_empty(num_tokens, dtype=torch.int64) if has_shared else None
        leads, coefficients, used = None, None, None
        if backward:
            leads = ids.new_empty(ids.shape, dtype=torch.int64)
            coefficients = weights.new_empty((gates, pairs))
            used = ids.new_empty((gates, pairs), dtype=torch.uint8)
        kernels.place_kernel[(tiles,)](
            ids, weights, own, starts, tokens, pair_of, shared_pair, leads, coefficients, used, *shape, tiles, pairs,
            HAS_SHARED=has_shared, **sizes, **FUSED,
        )  # fmt: skip
        return cls(*shape, pairs, tiles, starts, tokens, pair_of, shared_pair, own, rest, leads, coefficients, used)

    def blocks(self, size: int, shared: bool) -> int:
        """Tiles of `size` pairs that the experts, or the shared one, may need, however their pairs are distributed."""
        if shared:
            return triton.cdiv(self.num_tokens, size)
        routed = self.num_tokens * min(self.gates * self.slots, self.num_experts)
        return min(routed, triton.cdiv(routed, size) + self.num_experts)

    def average(self, shared: bool) -> float:
        """Pairs that an expert has, on average, or the shared one, at most."""
        return self.num_tokens if shared else self.num_tokens * self.slots * self.gates / self.num_experts


def launch_sizes(kernel: str, pairs: float, width: int, dtype: torch.dtype) -> dict[str, int]:
    sizes = block_sizes(kernel, pairs, width, dtype)
    if interpreted():  # tiles small enough that small tests have several
        sizes |= {name: 16 for name in sizes if name.startswith("BLOCK") and (kernel, name) != ("network", "BLOCK_D")}
    return {**sizes, **FUSED}
