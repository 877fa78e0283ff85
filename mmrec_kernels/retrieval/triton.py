"""Streaming top-k in Triton.    score[b, n] = (q_b · x_n) · scale_n + bias_n

Grid (query tile, split): a program walks its part of the catalogue BLOCK_N rows at a time and keeps the best K of each
query as sorted 64-bit keys; a block of scores is sorted in only when one of them beats the worst kept. `_merge` joins
the splits. A key is (ordered score, ~id), so the order is total: ties go to the lower id, the split changes nothing.

BLOCK_Q = 16 takes the scores from `tl.dot`; BLOCK_Q = 1 (few queries, own candidates, large k) from a product and sum.
Reads: items once per query tile. Writes: splits · K keys per query. No atomics, no host synchronisation.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import dot, interpreted, next_power_of_two, precision

MAX_K = 2048
_BLOCKS = 528  # programs wanted in flight: four per multiprocessor of the largest GPU in use


@triton.jit
def _make_key(score, ids):
    # -0 + 0 is +0: the two zeros are one score. Flipping a negative's lower bits makes integers order as floats do.
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (0xFFFFFFFF - ids.to(tl.int64))


@triton.jit
def _join(kept, keys, K: tl.constexpr):
    """The K best of two lists of keys, descending. Both are [rows, K]."""
    both = tl.join(kept, keys)
    return tl.topk(tl.reshape(both, [kept.shape[0], 2 * K]), K)


@triton.jit
def _scan_kernel(
    query_ptr, items_ptr, scale_ptr, bias_ptr, exclude_offsets_ptr, exclude_ids_ptr, candidate_offsets_ptr,
    candidate_ids_ptr, partial_ptr, num_queries, num_items, width, query_stride, item_stride, exclude_length,
    candidate_length, part,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_EXCLUDE: tl.constexpr, HAS_CANDIDATES: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, K: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(1)
    offs_q = tl.program_id(0).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    in_batch = offs_q < num_queries
    empty = tl.full([], -0x7FFFFFFFFFFFFFFF - 1, tl.int64)
    kept = tl.full([BLOCK_Q, K], 0, tl.int64) + empty
    first = tl.zeros([], tl.int64)
    last = num_items.to(tl.int64)
    if HAS_CANDIDATES:
        row = tl.program_id(0)
        first = tl.minimum(tl.maximum(tl.load(candidate_offsets_ptr + row), 0), candidate_length)
        last = tl.minimum(tl.maximum(tl.load(candidate_offsets_ptr + row + 1), 0), candidate_length)
    if HAS_EXCLUDE:
        ex_first = tl.load(exclude_offsets_ptr + offs_q, in_batch, 0)
        ex_last = tl.load(exclude_offsets_ptr + offs_q + 1, in_batch, 0)
        ex_first = tl.minimum(tl.maximum(ex_first, 0), exclude_length)
        ex_last = tl.minimum(tl.maximum(ex_last, 0), exclude_length)
        longest = tl.max(ex_last - ex_first)
    begin = first + split.to(tl.int64) * part
    end = tl.minimum(begin + part, last)
    for start in range(begin, end, BLOCK_N):
        position = start + tl.arange(0, BLOCK_N).to(tl.int64)
        used = position < end
        ids = position
        if HAS_CANDIDATES:
            ids = tl.load(candidate_ids_ptr + position, used, -1)
            used = used & (ids >= 0) & (ids < num_items)
        score = tl.zeros([BLOCK_Q, BLOCK_N], tl.float32)
        for d in range(0, width, BLOCK_D):
            offs_d = d + tl.arange(0, BLOCK_D)
            in_width = offs_d < width
            x = tl.load(items_ptr + ids[:, None] * item_stride + offs_d[None, :], used[:, None] & in_width[None, :], 0)
            if BLOCK_Q == 1:
                q = tl.load(query_ptr + tl.program_id(0).to(tl.int64) * query_stride + offs_d, in_width, 0)
                score += tl.sum(x.to(tl.float32) * q.to(tl.float32)[None, :], 1)[None, :]
            else:
                q = tl.load(
                    query_ptr + offs_q[:, None] * query_stride + offs_d[None, :],
                    in_batch[:, None] & in_width[None, :],
                    0,
                )
                score = dot(q, tl.trans(x), score, PRECISION, UPCAST)
        if HAS_SCALE:
            score = score * tl.load(scale_ptr + ids, used, 0.0)[None, :]
        if HAS_BIAS:
            score = score + tl.load(bias_ptr + ids, used, 0.0)[None, :]
        # Written so that NaN and -inf fail.
        candidate = used[None, :] & in_batch[:, None] & (score > -float("inf"))
        keys = tl.where(candidate, _make_key(score, ids[None, :]), empty)
        if tl.max((keys > tl.min(kept, 1)[:, None]).to(tl.int32)) > 0:
            if HAS_EXCLUDE:
                for j in range(0, longest):
                    listed = ex_first + j < ex_last
                    excluded = tl.load(exclude_ids_ptr + ex_first + j, listed & in_batch, -1)
                    keys = tl.where((ids[None, :] == excluded[:, None]) & listed[:, None], empty, keys)
            kept = _join(kept, tl.topk(keys, K), K)
    num_splits = tl.num_programs(1)
    offs_k = tl.arange(0, K)
    out = partial_ptr + (offs_q[:, None] * num_splits + split) * K + offs_k[None, :]
    tl.store(out, kept, in_batch[:, None])


@triton.jit
def _merge_kernel(partial_ptr, scores_ptr, ids_ptr, k, num_splits, K: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)
    offs_k = tl.arange(0, K)
    kept = tl.load(partial_ptr + b * num_splits * K + offs_k)[None, :]
    for split in range(1, num_splits):
        kept = _join(kept, tl.load(partial_ptr + (b * num_splits + split) * K + offs_k)[None, :], K)
    kept = tl.reshape(kept, [K])
    ordered = (kept >> 32).to(tl.int32)
    score = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    found = kept != -0x7FFFFFFFFFFFFFFF - 1
    tl.store(scores_ptr + b * k + offs_k, tl.where(found, score, -float("inf")), offs_k < k)
    tl.store(ids_ptr + b * k + offs_k, tl.where(found, 0xFFFFFFFF - (kept & 0xFFFFFFFF), -1), offs_k < k)


def block_sizes(num_queries: int, width: int, k: int, has_candidates: bool) -> dict[str, int]:
    """Tile sizes by shape alone: BLOCK_Q, BLOCK_N, BLOCK_D, K (the power of two that holds k), and warps for them."""
    kept = max(next_power_of_two(k), 16)
    # Sorting one long list spreads badly over a block's threads and spills; sixteen of up to 128 keys do not.
    single = has_candidates or kept > 128 or (num_queries <= 4 and kept < 64)
    block_n = max(kept, 128) if single else max(kept, 64)
    block_d = min(max(next_power_of_two(width), 16), 64)
    if single:
        # The tile of items is held in registers while it is multiplied.
        block_d = min(block_d, max(8192 // block_n, 4))
    warps = 8 if kept >= 64 and not single else 4
    return {"BLOCK_Q": 1 if single else 16, "BLOCK_N": block_n, "BLOCK_D": block_d, "K": kept, "num_warps": warps}


def _mark_repeats(offsets: Tensor, ids: Tensor) -> Tensor:
    """`ids` of a CSR list with every repetition inside a row replaced by −1 (order inside a row is free)."""
    position = torch.arange(ids.shape[0], device=ids.device)
    row = torch.searchsorted(offsets.contiguous(), position, right=True)
    by_id = ids.argsort(stable=True)
    order = by_id[row[by_id].argsort(stable=True)]
    repeated = torch.zeros_like(ids, dtype=torch.bool)
    repeated[1:] = (ids[order][1:] == ids[order][:-1]) & (row[order][1:] == row[order][:-1])
    # Rows keep their places: the sort is by row first.
    return torch.where(repeated, -1, ids[order])


def topk(
    query: Tensor,
    items: Tensor,
    k: int,
    item_scales: Tensor | None,
    bias: Tensor | None,
    exclude_offsets: Tensor | None,
    exclude_ids: Tensor | None,
    candidate_offsets: Tensor | None,
    candidate_ids: Tensor | None,
    quantize_query: bool,
) -> tuple[Tensor, Tensor]:
    """Launcher of `_retrieval_topk` for CUDA tensors (CPU tensors in the interpreter)."""
    if k > MAX_K:
        raise ValueError(f"k must be at most {MAX_K} on GPU, got {k}")
    num_queries, num_items, width = query.shape[0], items.shape[0], query.shape[1]
    if num_items >= 1 << 32:
        raise ValueError(f"items must have fewer than 2**32 rows on GPU, got {num_items}")
    scores = query.new_empty((num_queries, k), dtype=torch.float32)
    ids = query.new_empty((num_queries, k), dtype=torch.int64)
    if num_queries == 0:
        return scores, ids
    query = query if query.stride(-1) == 1 else query.contiguous()
    items = items if items.stride(-1) == 1 else items.contiguous()
    if candidate_ids is not None and candidate_offsets is not None:
        candidate_ids = _mark_repeats(candidate_offsets, candidate_ids)
    blocks = block_sizes(num_queries, width, k, candidate_ids is not None)
    tiles = triton.cdiv(num_queries, blocks["BLOCK_Q"])
    # A candidate list may be longer than the catalogue only by repetitions; its length bounds the walk without a sync.
    longest = num_items if candidate_ids is None else candidate_ids.shape[0]
    splits = max(1, min(_BLOCKS // tiles, triton.cdiv(longest, 8 * blocks["BLOCK_N"])))
    part = triton.cdiv(triton.cdiv(longest, splits), blocks["BLOCK_N"]) * blocks["BLOCK_N"]
    partial = query.new_empty((num_queries, splits, blocks["K"]), dtype=torch.int64)
    _scan_kernel[(tiles, splits)](
        query, items, item_scales, bias, exclude_offsets, exclude_ids, candidate_offsets, candidate_ids, partial,
        num_queries, num_items, width, query.stride(0), items.stride(0),
        0 if exclude_ids is None else exclude_ids.shape[0], 0 if candidate_ids is None else candidate_ids.shape[0],
        part,
        HAS_SCALE=item_scales is not None, HAS_BIAS=bias is not None, HAS_EXCLUDE=exclude_ids is not None,
        HAS_CANDIDATES=candidate_ids is not None, PRECISION=precision(query.dtype), UPCAST=interpreted(),
        enable_fp_fusion=False, **blocks,
    )  # fmt: skip
    _merge_kernel[(num_queries,)](partial, scores, ids, k, splits, K=blocks["K"])
    return scores, ids
