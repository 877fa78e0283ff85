"""Cross-modal attention: the Triton kernels of the backward that add up, each sum by one program in one order."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .tiles import COUNT, clamped, query_span, reciprocal_rms


class Outside(NamedTuple):
    """A gradient `[rows, width]` of which a kernel wrote rows offsets[0]:offsets[batch]."""

    data: Any
    offsets: Any
    rows: Any  # times COUNT
    width: Any


@triton.jit(do_not_specialize=["batch"])
def clear_kernel(tensors, batch, BLOCK: tl.constexpr):
    """Zeros for the rows before and after all sequences, on any number of programs."""
    for m in tl.static_range(len(tensors)):
        rows = tensors[m].rows // COUNT
        first = clamped(tensors[m].offsets, 0, rows)
        last = tl.maximum(clamped(tensors[m].offsets, batch, rows), first)
        before = first * tensors[m].width
        total = (first + rows - last) * tensors[m].width
        skipped = (last - first) * tensors[m].width
        for block in range(tl.program_id(0).to(tl.int64), tl.cdiv(total, BLOCK), tl.num_programs(0)):
            at = block * BLOCK + tl.arange(0, BLOCK)
            at = tl.where(at < before, at, at + skipped)
            tl.store(tensors[m].data + at, tl.zeros([BLOCK], tensors[m].data.dtype.element_ty), at - skipped < total)


@triton.jit(do_not_specialize=["batch"])
def row_sums_kernel(rows_ptr, out_ptr, queries, batch, columns, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
                    WIDE: tl.constexpr):  # fmt: skip
    """out[b] = Σ of the rows `[Tq, columns]` of sequence b. Grid: (batch · blocks of columns)."""
    blocks = tl.cdiv(columns, BLOCK_C)
    b = tl.program_id(0) // blocks
    offs_c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    first, count = query_span(queries, b, False)
    acc = tl.zeros([BLOCK_C], WIDE)
    for start in range(0, count, BLOCK_R):
        offs_r = start + tl.arange(0, BLOCK_R)
        at = (first + offs_r)[:, None] * columns + offs_c[None, :]
        acc += tl.sum(tl.load(rows_ptr + at, (offs_r < count)[:, None] & (offs_c < columns)[None, :], 0.0), 0)
    tl.store(out_ptr + b.to(tl.int64) * columns + offs_c, acc, offs_c < columns)


@triton.jit(do_not_specialize=["first_column", "out_stride"])
def reference_sums_kernel(
    shares_ptr, order_ptr, starts_ptr, out_ptr, first_column, columns, out_stride, BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """out[row, first_column + c] = Σ over the references to the row, in their order, of `shares [entries, columns]`.
    `order`: entries by row; those of a row stand from starts[row] to starts[row + 1]."""
    blocks = tl.cdiv(columns, BLOCK_C)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    offs_c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = offs_c < columns
    acc = tl.zeros([BLOCK_C], WIDE)
    last = tl.load(starts_ptr + row + 1)
    for start in range(tl.load(starts_ptr + row), last, BLOCK_R):
        offs_r = start + tl.arange(0, BLOCK_R)
        entry = tl.load(order_ptr + offs_r, offs_r < last, 0)
        at = entry[:, None] * columns + offs_c[None, :]
        acc += tl.sum(tl.load(shares_ptr + at, (offs_r < last)[:, None] & in_c[None, :], 0.0).to(WIDE), 0)
    tl.store(out_ptr + row * out_stride + first_column + offs_c, acc.to(out_ptr.dtype.element_ty), in_c)


@triton.jit(do_not_specialize=["rows", "heads"])
def norm_backward_kernel(
    queries, grad_ptr, out_ptr, query_norm_sums_ptr, key_norm_sums_ptr, rows, heads, width,
    HAS_QUERY_NORM: tl.constexpr, HAS_KEY_NORM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """From h, the gradient of q̃ = u·w_q·w_k with u = q·r, r = 1/√(mean q² + eps) (u = q without query_norm):
    dq = r (g − u·mean(u·g)) with g = w_q·w_k·h, and each program's sums of dw_q = Σ w_k·h·u and dw_k = Σ w_q·u·h.

    `grad [rows, width]` float32, rows of all heads; those of zeros are of queries without a key, which may hold NaN."""
    offs_d = tl.arange(0, BLOCK_D)
    in_d = offs_d < width
    query_norm = tl.full([BLOCK_D], 1.0, WIDE)
    key_norm = tl.full([BLOCK_D], 1.0, WIDE)
    if HAS_QUERY_NORM:
        query_norm = tl.load(queries.query_norm + offs_d, in_d, 0.0).to(WIDE)
    if HAS_KEY_NORM:
        key_norm = tl.load(queries.key_norm + offs_d, in_d, 0.0).to(WIDE)
    query_norm_sums = tl.zeros([BLOCK_D], WIDE)
    key_norm_sums = tl.zeros([BLOCK_D], WIDE)
    for block in range(tl.program_id(0).to(tl.int64), tl.cdiv(rows, BLOCK_R), tl.num_programs(0)):
        row = block * BLOCK_R + tl.arange(0, BLOCK_R)
        mask = (row < rows)[:, None] & in_d[None, :]
        grad = tl.load(grad_ptr + row[:, None] * width + offs_d[None, :], mask, 0.0)
        live = tl.max((grad != 0).to(tl.int32), 1) > 0
        start = row // heads * queries.row_stride + row % heads * queries.head_stride
        q = tl.load(queries.data + start[:, None] + offs_d[None, :], mask & live[:, None], 0.0)
        unit = q.to(WIDE)
        inner = grad * query_norm[None, :] * key_norm[None, :]
        if HAS_QUERY_NORM:
            rms = reciprocal_rms(q, width, queries.norm_eps, WIDE)
            unit = unit * rms[:, None]
            query_norm_sums += tl.sum(grad * key_norm[None, :] * unit, 0)
            inner = rms[:, None] * (inner - unit * (tl.sum(unit * inner, 1) / width)[:, None])
        if HAS_KEY_NORM:
            key_norm_sums += tl.sum(grad * query_norm[None, :] * unit, 0)
        tl.store(out_ptr + row[:, None] * width + offs_d[None, :], inner.to(out_ptr.dtype.element_ty), mask)
    at = tl.program_id(0) * width + offs_d
    tl.store(query_norm_sums_ptr + at, query_norm_sums, in_d)
    tl.store(key_norm_sums_ptr + at, key_norm_sums, in_d)
