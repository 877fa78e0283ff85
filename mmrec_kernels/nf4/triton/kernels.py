"""The Triton kernels of the NF4 linear.

    P = rows · matrixᵀ               x aᵀ or dy b                  [M, r], float32
    out = s P matrix + rows W        y = x Wᵀ + s (x aᵀ) bᵀ + bias, or dx = dy W + s (dy b) a, rounded once
    da, db = (s P)ᵀ rows             da = (s dy b)ᵀ x, dbᵀ = (s x aᵀ)ᵀ dy

The product with W reads half a byte and a share of a float32 absmax for each weight, once for each tile of tokens,
decodes them into a tile in shared memory and never writes W. A row takes its adapter inside the tile: each distinct id
of a tile is one small product, from which its rows are taken, so that no row depends on where others lie or what they
hold.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton_common import dot, rounded
from .decode import code_table, weight_tile


@triton.jit
def adapters_of(ids_ptr, row, in_row, num_adapters):
    """Each row's adapter, `num_adapters` for none: an id outside the stack acts as −1."""
    ids = tl.load(ids_ptr + row, in_row, -1)
    return tl.where((ids >= 0) & (ids < num_adapters), ids, num_adapters).to(tl.int32)


@triton.jit
def next_adapter(ids, after, num_adapters):
    return tl.min(tl.where(ids > after, ids, num_adapters), 0)


@triton.jit
def scaling_of(scalings_ptr, scaling, e):
    if scalings_ptr is not None:
        scaling = tl.load(scalings_ptr + e)
    return scaling


@triton.jit
def low_tile(low_ptr, row, in_row, offs_r, rank, tokens, splits, WIDE: tl.constexpr):
    """Columns of P: its `splits` partial sums, in their order."""
    inside = in_row[:, None] & (offs_r < rank)[None, :]
    at = low_ptr + row[:, None] * rank + offs_r[None, :]
    low = tl.load(at, inside, 0)
    for split in range(1, splits):
        low += tl.load(at + tl.cast(split, tl.int64) * tokens * rank, inside, 0)
    return low.to(WIDE)


@triton.jit
def low_product(
    rows_ptr, matrix_ptr, row, in_row, offs_r, begin, end, depth, rank, rank_stride, depth_stride,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
    LOW_PRECISION: tl.constexpr, UPCAST: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Columns of P of one adapter, over the depth [begin, end)."""
    acc = tl.zeros([BLOCK_M, BLOCK_R], WIDE)
    in_r = offs_r < rank
    for c in range(begin, end, BLOCK_C):
        offs_c = c + tl.arange(0, BLOCK_C)
        in_c = offs_c < end
        x = tl.load(rows_ptr + row[:, None] * depth + offs_c[None, :], in_row[:, None] & in_c[None, :], 0)
        at = matrix_ptr + offs_r[None, :] * rank_stride + offs_c[:, None] * depth_stride
        matrix = tl.load(at, in_r[None, :] & in_c[:, None], 0)
        if matrix.dtype == x.dtype:
            acc = dot(x, matrix, acc, PRECISION, UPCAST)
        else:  # a float32 adapter of a 16-bit layer
            acc = dot(x.to(WIDE), matrix.to(WIDE), acc, LOW_PRECISION, UPCAST)
    return acc


@triton.jit(do_not_specialize=["tokens", "split_depth"])
def low_rank_kernel(
    rows_ptr, matrix_ptr, ids_ptr, low_ptr, tokens, depth, rank, num_adapters, split_depth, adapter_stride, rank_stride,
    depth_stride, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
    LOW_PRECISION: tl.constexpr, UPCAST: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """low [splits, M, r]: partial sums of P; 0 for a row without an adapter."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r, split = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R), tl.program_id(2)
    in_row = row < tokens
    begin = split * split_depth
    end = tl.minimum(begin + split_depth, depth)
    if ids_ptr is None:
        low = low_product(rows_ptr, matrix_ptr, row, in_row, offs_r, begin, end, depth, rank, rank_stride, depth_stride,
                          BLOCK_M, BLOCK_R, BLOCK_C, PRECISION, LOW_PRECISION, UPCAST, WIDE)  # fmt: skip
    else:
        low = tl.zeros([BLOCK_M, BLOCK_R], WIDE)
        ids = adapters_of(ids_ptr, row, in_row, num_adapters)
        e = next_adapter(ids, -1, num_adapters)
        while e < num_adapters:
            mine = low_product(rows_ptr, matrix_ptr + e.to(tl.int64) * adapter_stride, row, in_row, offs_r, begin, end,
                               depth, rank, rank_stride, depth_stride, BLOCK_M, BLOCK_R, BLOCK_C, PRECISION,
                               LOW_PRECISION, UPCAST, WIDE)  # fmt: skip
            low = tl.where((ids == e)[:, None], mine, low)
            e = next_adapter(ids, e, num_adapters)
    at = low_ptr + (split.to(tl.int64) * tokens + row)[:, None] * rank + offs_r[None, :]
    tl.store(at, low, in_row[:, None] & (offs_r < rank)[None, :])


@triton.jit
def low_term(
    low_ptr, matrix_ptr, scaling, row, in_row, offs_o, width, rank, tokens, splits, rank_stride, width_stride,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_R: tl.constexpr, LOW_PRECISION: tl.constexpr,
    UPCAST: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """s P times the matrix of one adapter."""
    acc = tl.zeros([BLOCK_M, BLOCK_O], WIDE)
    for r in range(0, rank, BLOCK_R):
        offs_r = r + tl.arange(0, BLOCK_R)
        low = low_tile(low_ptr, row, in_row, offs_r, rank, tokens, splits, WIDE) * scaling
        at = matrix_ptr + offs_r[:, None] * rank_stride + offs_o[None, :] * width_stride
        matrix = tl.load(at, (offs_r < rank)[:, None] & (offs_o < width)[None, :], 0)
        acc = dot(low, matrix.to(WIDE), acc, LOW_PRECISION, UPCAST)
    return acc


@triton.jit(do_not_specialize=["tokens", "split_depth", "low_splits"])
def linear_kernel(
    rows_ptr, packed_ptr, absmax_ptr, low_ptr, matrix_ptr, bias_ptr, ids_ptr, scalings_ptr, saved_ptr, out_ptr, tokens,
    depth, width, columns, rank, num_adapters, low_splits, split_depth, adapter_stride, rank_stride, width_stride,
    scaling, FORWARD: tl.constexpr, GROUP: tl.constexpr, BLOCKSIZE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr,
    LOW_PRECISION: tl.constexpr, UPCAST: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A tile of out [M, width] = s P matrix + rows W + bias, or a split's partial sum, [splits, M, width] of sums.

    The rows of W are columns of `out` in the forward, and its depth in the backward. `saved` [M, r] takes P.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_o, split = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O), tl.program_id(2)
    in_row, in_o = row < tokens, offs_o < width
    acc = tl.zeros([BLOCK_M, BLOCK_O], WIDE)
    if low_ptr is not None:
        if split == 0:
            if ids_ptr is None:
                acc = low_term(low_ptr, matrix_ptr, scaling_of(scalings_ptr, scaling, 0), row, in_row, offs_o, width,
                               rank, tokens, low_splits, rank_stride, width_stride, BLOCK_M, BLOCK_O, BLOCK_R,
                               LOW_PRECISION, UPCAST, WIDE)  # fmt: skip
            else:
                ids = adapters_of(ids_ptr, row, in_row, num_adapters)
                e = next_adapter(ids, -1, num_adapters)
                while e < num_adapters:
                    mine = low_term(low_ptr, matrix_ptr + e.to(tl.int64) * adapter_stride,
                                    scaling_of(scalings_ptr, scaling, e), row, in_row, offs_o, width, rank, tokens,
                                    low_splits, rank_stride, width_stride, BLOCK_M, BLOCK_O, BLOCK_R, LOW_PRECISION,
                                    UPCAST, WIDE)  # fmt: skip
                    acc = tl.where((ids == e)[:, None], mine, acc)
                    e = next_adapter(ids, e, num_adapters)
            if saved_ptr is not None:
                if tl.program_id(1) == 0:
                    for r in range(0, rank, BLOCK_R):
                        offs_r = r + tl.arange(0, BLOCK_R)
                        low = low_tile(low_ptr, row, in_row, offs_r, rank, tokens, low_splits, WIDE)
                        at = saved_ptr + row[:, None] * rank + offs_r[None, :]
                        tl.store(at, low, in_row[:, None] & (offs_r < rank)[None, :])
    codes = code_table()
    begin = split * split_depth
    end = tl.minimum(begin + split_depth, depth)
    for c in range(begin, end, BLOCK_C):
        offs_c = c + tl.arange(0, BLOCK_C)
        in_c = offs_c < end
        x = tl.load(rows_ptr + row[:, None] * depth + offs_c[None, :], in_row[:, None] & in_c[None, :], 0)
        if FORWARD:
            w = weight_tile(packed_ptr, absmax_ptr, codes, offs_o.to(tl.int64), in_o, c, columns, BLOCK_O, BLOCK_C,
                            GROUP, BLOCKSIZE, x.dtype, UPCAST)  # fmt: skip
            acc = dot(x, tl.trans(w), acc, PRECISION, UPCAST)
        else:
            w = weight_tile(packed_ptr, absmax_ptr, codes, offs_c.to(tl.int64), in_c, tl.program_id(1) * BLOCK_O,
                            columns, BLOCK_C, BLOCK_O, GROUP, BLOCKSIZE, x.dtype, UPCAST)  # fmt: skip
            acc = dot(x, w, acc, PRECISION, UPCAST)
    if bias_ptr is not None:
        if split == 0:
            acc += tl.load(bias_ptr + offs_o, in_o, 0).to(WIDE)[None, :]
    at = out_ptr + (split.to(tl.int64) * tokens + row)[:, None] * width + offs_o[None, :]
    tl.store(at, rounded(acc, out_ptr.dtype.element_ty, UPCAST), in_row[:, None] & in_o[None, :])


@triton.jit(do_not_specialize=["elements", "splits"])
def sum_kernel(parts_ptr, out_ptr, elements, splits, BLOCK: tl.constexpr, UPCAST: tl.constexpr):
    """out [elements]: the sum of parts [splits, elements], in their order, rounded once."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < elements
    total = tl.load(parts_ptr + offs, inside, 0)
    for split in range(1, splits):
        total += tl.load(parts_ptr + tl.cast(split, tl.int64) * elements + offs, inside, 0)
    tl.store(out_ptr + offs, rounded(total, out_ptr.dtype.element_ty, UPCAST), inside)


@triton.jit(do_not_specialize=["tokens", "split_tokens", "low_splits"])
def adapter_gradient_kernel(
    low_ptr, rows_ptr, ids_ptr, scalings_ptr, out_ptr, tokens, width, rank, num_adapters, low_splits, split_tokens,
    rank_stride, width_stride, scaling, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    LOW_PRECISION: tl.constexpr, UPCAST: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A tile of out [splits, A, …] = (s P)ᵀ rows over the tokens of a split that take the adapter."""
    offs_c, offs_r = (
        tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C),
        tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R),
    )
    split, e = tl.program_id(2) // num_adapters, tl.program_id(2) % num_adapters
    begin = split.to(tl.int64) * split_tokens
    end = tl.minimum(begin + split_tokens, tokens)
    in_c = offs_c < width
    scale = scaling_of(scalings_ptr, scaling, e)
    acc = tl.zeros([BLOCK_R, BLOCK_C], WIDE)
    for m in range(begin, end, BLOCK_M):
        row = m + tl.arange(0, BLOCK_M).to(tl.int64)
        mine = row < end
        if ids_ptr is not None:
            mine &= adapters_of(ids_ptr, row, mine, num_adapters) == e
        if tl.max(mine.to(tl.int32), 0) > 0:
            low = low_tile(low_ptr, row, mine, offs_r, rank, tokens, low_splits, WIDE) * scale
            right = tl.load(rows_ptr + row[:, None] * width + offs_c[None, :], mine[:, None] & in_c[None, :], 0)
            acc = dot(tl.trans(low), right.to(WIDE), acc, LOW_PRECISION, UPCAST)
    at = out_ptr + tl.program_id(2).to(tl.int64) * rank * width
    at += offs_r[:, None] * rank_stride + offs_c[None, :] * width_stride
    tl.store(at, acc, (offs_r < rank)[:, None] & in_c[None, :])
