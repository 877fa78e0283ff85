"""InfoNCE on GPU: the launcher of the forward."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ...schemas import terms_dtype
from ...triton_common import FUSED
from ..reference import NORM_EPS
from . import forward_kernels as kernels
from .prepare import LOG2E, Prepared, launch_sizes, prepare

_MOST_STRIPS = 32
_MOST_ROW_TILES = 256


def forward(
    query: Tensor, key: Tensor, scale: Tensor, target: Tensor | None, query_mask: Tensor | None,
    key_mask: Tensor | None, query_ids: Tensor | None, key_ids: Tensor | None, exclude_offsets: Tensor | None,
    exclude_positions: Tensor | None, log_q: Tensor | None, symmetric: bool, normalize: bool,
    positives_elsewhere: bool, rank_reference: Tensor | None, need_total: bool, need_rank: bool, save: bool,
    workspace_bytes: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Launcher of `_infonce_forward`."""
    if save:
        raise ValueError("save must be False on GPU: the backward makes the logits again")
    p = prepare(query, key, scale, target, query_mask, key_mask, query_ids, key_ids, exclude_offsets,
                 exclude_positions, log_q, symmetric, normalize, positives_elsewhere)  # fmt: skip
    rows, columns, width = query.shape[0], key.shape[0], query.shape[1]
    dtype = terms_dtype(query.device)
    positive = _positives(p, log_q)
    row_lse = query.new_full((rows,), -torch.inf, dtype=dtype)
    column_lse = query.new_full((columns if symmetric else 0,), -torch.inf, dtype=dtype)
    total = query.new_zeros(rows if need_total else 0, dtype=dtype)
    kept = query.new_zeros(rows if need_total else 0, dtype=torch.int64)
    rank = query.new_full((rows if need_rank else 0,), -1, dtype=torch.int64)
    reference = query.new_zeros(rows if need_rank else 0, dtype=torch.float32)
    saved = query.new_empty(0, dtype=torch.uint8)
    if rows == 0 or columns == 0:
        return positive, row_lse, column_lse, total, kept, rank, reference, saved
    blocks = launch_sizes("forward", width, query.dtype)
    row_tiles, column_tiles = triton.cdiv(rows, blocks["BLOCK_M"]), triton.cdiv(columns, blocks["BLOCK_N"])
    strip_tiles = triton.cdiv(column_tiles, _MOST_STRIPS)
    strips = triton.cdiv(column_tiles, strip_tiles)

    def floats(*shape: int) -> Tensor:
        return query.new_empty(shape, dtype=torch.float32)

    row_ref, row_sum = floats(strips, rows), floats(strips, rows)
    # Sums of keys over some row tiles at a time, merged before the next ones come.
    chunk_tiles = min(row_tiles, _MOST_ROW_TILES)
    chunks = triton.cdiv(row_tiles, chunk_tiles)
    column_ref, column_sum = (floats(chunk_tiles, columns) if symmetric else None for _ in range(2))
    merged_ref, merged_sum = (floats(chunks, columns) if symmetric and chunks > 1 else None for _ in range(2))
    totals = floats(strips, rows) if need_total else None
    counts = query.new_empty((strips, rows), dtype=torch.int32) if need_total else None
    above = query.new_empty((strips, rows), dtype=torch.int32) if need_rank else None
    if need_rank:
        reference = _rank_references(p, blocks) if rank_reference is None else rank_reference.clone()
    listed = p.listed_by_tile(blocks["BLOCK_M"], blocks["BLOCK_N"])
    for c in range(chunks):
        first = c * chunk_tiles
        here = min(chunk_tiles, row_tiles - first)
        kernels.forward_kernel[(here, strips)](
            *p.pointers, *listed, reference if need_rank else None, row_ref, row_sum, column_ref, column_sum, totals,
            counts, above, first, *p.sizes, strip_tiles,
            SYMMETRIC=symmetric, NEED_TOTAL=need_total, NEED_RANK=need_rank, **p.flags, **blocks,
        )  # fmt: skip
        if merged_ref is not None and merged_sum is not None:
            kernels.merge_kernel[(triton.cdiv(columns, 128),)](
                column_ref, column_sum, merged_ref[c], merged_sum[c], columns, here, BLOCK=128, **FUSED
            )
    _combine(row_ref, row_sum, row_lse)
    row_lse.masked_fill_(~p.has_term, -torch.inf)
    if merged_ref is not None and merged_sum is not None:
        column_ref, column_sum = merged_ref, merged_sum
    if column_ref is not None and column_sum is not None:
        _combine(column_ref, column_sum, column_lse)
    if totals is not None and counts is not None:
        total = (totals.sum(0, dtype=torch.float64) / LOG2E + positive).to(dtype).masked_fill_(~p.has_term, 0.0)
        kept = (counts.sum(0) + p.has_positive).masked_fill_(~p.has_term, 0)
    if above is not None:
        rank = above.sum(0).masked_fill_(~p.has_term, -1)
    return positive, row_lse, column_lse, total, kept, rank, reference, saved


def _positives(p: Prepared, log_q: Tensor | None) -> Tensor:
    """S of each row's positive, 0 where there is none."""
    rows, width, q_stride, k_stride = p.query.shape[0], p.query.shape[1], p.query.stride(0), p.key.stride(0)
    dots = p.query.new_zeros(rows, dtype=torch.float64)
    if rows == 0 or p.key.shape[0] == 0:
        return dots
    kernels.positive_kernel[(triton.cdiv(rows, 16),)](
        p.query, p.key, p.target, dots, torch.empty_like(dots), rows, width, q_stride, k_stride,
        HAS_KEY=True, BLOCK_M=16, BLOCK_D=64, **FUSED,
    )  # fmt: skip
    target = torch.where(p.has_positive, p.target, 0)
    if p.query_norm is not None and p.key_norm is not None:
        dots = dots / (p.query_norm.clamp_min(NORM_EPS) * p.key_norm.clamp_min(NORM_EPS)[target])
    found = p.scale * dots if log_q is None else p.scale * dots - log_q[target]
    return torch.where(p.has_positive, found, 0.0)


def _rank_references(p: Prepared, blocks: dict[str, int]) -> Tensor:
    rows, _, width, q_stride, k_stride = p.sizes
    found = p.query.new_empty(rows, dtype=torch.float32)
    step = min(blocks["BLOCK_M"], blocks["BLOCK_N"])
    flags = {name: p.flags[name] for name in ("HAS_KAPPA", "HAS_BIAS", "PRECISION", "UPCAST")}
    kernels.rank_reference_kernel[(triton.cdiv(rows, step),)](
        p.query, p.key, p.sigma, p.kappa, p.bias, p.row_read, p.target, found, rows, width, q_stride, k_stride,
        **flags, **{**blocks, "BLOCK_N": step},
    )  # fmt: skip
    return found


def _combine(ref: Tensor, total: Tensor, out: Tensor) -> None:
    kernels.combine_kernel[(triton.cdiv(out.shape[0], 128),)](
        ref, total, out, out.shape[0], ref.shape[0], BLOCK=128, **FUSED
    )
