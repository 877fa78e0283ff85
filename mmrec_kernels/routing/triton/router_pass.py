"""`route` on GPU: the launchers of both passes."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ...schemas import statistics_dtype
from ...triton_common import FUSED, interpreted, next_power_of_two, wide_type
from .. import reference
from . import router_kernels as kernels

# More experts than this the reference serves.
MOST_EXPERTS = 256
# Sums per program: as many programs as this much memory holds, and no more than that.
_SUM_BYTES, _MOST_PROGRAMS = 2**26, 1024
_LEAST_PROGRAMS = 128


def block_sizes(kernel: str, experts: int, width: int, dtype: torch.dtype) -> dict[str, int]:
    """BLOCK_T, BLOCK_E, BLOCK_D, num_warps, num_stages of a kernel of "rows", which hold all experts, or of "products",
    by the number of experts, width and dtype alone; chosen not to spill, measured on no GPU."""
    block_e, wide = max(next_power_of_two(experts), 16), dtype in (torch.float32, torch.float64)
    block_d = min(max(next_power_of_two(width), 16), 32)
    if kernel == "products":
        block_e = min(block_e, 32)
    warps = 4 if block_e == 16 and not (wide and kernel == "rows") else 8
    return {"BLOCK_T": max(1024 // block_e, 16), "BLOCK_E": block_e, "BLOCK_D": block_d, "num_warps": warps,
            "num_stages": 2}  # fmt: skip


def _sizes(kernel: str, experts: int, width: int, dtype: torch.dtype) -> dict[str, int]:
    sizes = block_sizes(kernel, experts, width, dtype)
    if interpreted():  # tiles small enough that small tests have several
        sizes |= {"BLOCK_T": 16, "BLOCK_D": 16}
        sizes["BLOCK_E"] = sizes["BLOCK_E"] if kernel == "rows" else 16
    return {**sizes, **FUSED}


def _flags(x: Tensor, gate_weight: Tensor) -> dict[str, Any]:
    return {
        "MIXED": x.dtype != gate_weight.dtype,
        "UPCAST": interpreted() and x.dtype != torch.float64,
        "WIDE": wide_type(x.dtype),
    }


def rows_of(x: Tensor) -> Tensor:
    """`x [T, d]` with its rows whole."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _vectors(*tensors: Tensor | None) -> list[Tensor | None]:
    """Contiguous, truth values as bytes."""
    return [None if t is None else t.contiguous().view(torch.uint8) if t.dtype == torch.bool else t.contiguous()
            for t in tensors]  # fmt: skip


def _divides(score: str, renormalize: bool) -> bool:
    return renormalize or score == "topk_softmax"


def forward(
    x: Tensor, gate_weight: Tensor, modality: Tensor | None, allowed: Tensor | None, bias: Tensor | None,
    valid: Tensor | None, k: int, num_modalities: int, score: str, renormalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Launcher of `_routing_forward`."""
    tokens, width, experts = *x.shape, gate_weight.shape[0]
    if experts > MOST_EXPERTS:
        return reference.forward(
            x, gate_weight, modality, allowed, bias, valid, k, num_modalities, score, renormalize
        )  # fmt: skip
    reference.check_modality(modality, num_modalities)
    dtype = statistics_dtype(x.dtype)
    weights = x.new_empty((tokens, k), dtype=dtype)
    ids = x.new_empty((tokens, k), dtype=torch.int32)
    stats = x.new_empty((num_modalities, experts, 3), dtype=dtype)
    losses = x.new_empty((4, num_modalities), dtype=dtype)
    if num_modalities == 0:
        return weights.zero_(), ids.fill_(-1), stats, losses
    x, gate_weight = rows_of(x), gate_weight.contiguous()
    modality, allowed, valid, bias = _vectors(modality, allowed, valid, bias)
    sizes = _sizes("rows", experts, width, x.dtype)
    tiles = triton.cdiv(tokens, sizes["BLOCK_T"])
    held = _SUM_BYTES // (num_modalities * experts * 3 * dtype.itemsize)
    most = 3 if interpreted() else min(_MOST_PROGRAMS, max(_LEAST_PROGRAMS, held))
    each = max(triton.cdiv(tiles, most), 1)
    programs = triton.cdiv(tiles, each)
    sums = x.new_zeros((programs, num_modalities, 3, experts), dtype=dtype)
    totals = x.new_zeros((programs, num_modalities, 3), dtype=dtype)
    if programs:
        kernels.route_kernel[(programs,)](
            x, gate_weight, modality, valid, allowed, bias, weights, ids, sums, totals, tokens, experts,
            num_modalities, k, width, x.stride(0), each, SCORE=score, DIVIDES=_divides(score, renormalize),
            BLOCK_K=16 if interpreted() else min(next_power_of_two(k), 32), **_flags(x, gate_weight), **sizes,
        )  # fmt: skip
    kernels.finish_kernel[(num_modalities,)](
        sums, totals, allowed, stats, losses, programs, num_modalities, experts,
        BLOCK_P=max(1024 // sizes["BLOCK_E"], 4), BLOCK_E=sizes["BLOCK_E"], **FUSED,
    )  # fmt: skip
    return weights, ids, stats, losses


def backward(
    grad_weights: Tensor | None, grad_losses: Tensor | None, x: Tensor, gate_weight: Tensor, modality: Tensor | None,
    allowed: Tensor | None, valid: Tensor | None, weights: Tensor, experts: Tensor, stats: Tensor, score: str,
    renormalize: bool, need_x: bool, need_gate_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launcher of `_routing_backward`."""
    tokens, width, num_experts, num_modalities = *x.shape, gate_weight.shape[0], stats.shape[0]
    if num_experts > MOST_EXPERTS:
        return reference.backward(
            grad_weights, grad_losses, x, gate_weight, modality, allowed, valid, weights, experts, stats, score,
            renormalize, need_x, need_gate_weight,
        )  # fmt: skip
    dx = x.new_empty((tokens, width) if need_x else 0)
    if tokens == 0 or width == 0 or num_modalities == 0:
        return dx.zero_(), gate_weight.new_zeros(gate_weight.shape if need_gate_weight else 0)
    dtype = stats.dtype
    rows, gate = rows_of(x), gate_weight.contiguous()
    modality, allowed, valid = _vectors(modality, allowed, valid)
    sizes, flags = _sizes("rows", num_experts, width, x.dtype), _flags(x, gate_weight)
    dp, factors = None, None
    if grad_losses is not None:
        dp = stats.new_empty((num_modalities, num_experts))
        factors = stats.new_empty((num_modalities, 2))
        kernels.slopes_kernel[(num_modalities,)](
            grad_losses.contiguous(), stats, allowed, dp, factors, num_modalities, num_experts, weights.shape[1],
            BLOCK_E=sizes["BLOCK_E"], **FUSED,
        )  # fmt: skip
    dlogits = x.new_empty((tokens, num_experts), dtype=dtype)
    kernels.route_backward_kernel[(triton.cdiv(tokens, sizes["BLOCK_T"]),)](
        None if grad_weights is None else grad_weights.contiguous(), dp, factors, rows, gate, modality, valid, allowed,
        weights, experts, dlogits, tokens, num_experts, num_modalities, weights.shape[1], width, rows.stride(0),
        SCORE=score, DIVIDES=_divides(score, renormalize), **flags, **sizes,
    )  # fmt: skip
    del flags["MIXED"]
    sizes = _sizes("products", num_experts, width, x.dtype)
    tiles, columns = triton.cdiv(tokens, sizes["BLOCK_T"]), triton.cdiv(width, sizes["BLOCK_D"])
    if need_x:
        kernels.token_gradient_kernel[(tiles, columns)](
            dlogits, gate, dx, tokens, num_experts, width, **flags, **sizes
        )  # fmt: skip
    if not need_gate_weight:
        return dx, gate_weight.new_empty(0)
    blocks = triton.cdiv(num_experts, sizes["BLOCK_E"])
    each = triton.cdiv(tiles, 3 if interpreted() else max(_MOST_PROGRAMS // (columns * blocks), 1))
    splits = triton.cdiv(tiles, each)
    parts = x.new_empty((splits, num_experts, width), dtype=dtype)
    kernels.gate_sums_kernel[(columns, blocks, splits)](
        dlogits, rows, modality, valid, parts, tokens, num_experts, num_modalities, width, rows.stride(0), each,
        **flags, **sizes,
    )  # fmt: skip
    return dx, parts.sum(0).to(gate_weight.dtype)
