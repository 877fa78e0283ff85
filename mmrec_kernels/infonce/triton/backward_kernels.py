"""InfoNCE: the Triton kernels of the backward.

Backward: dLoss/dS_ij = W_ij = row_slope_i 2^(x_ij − row_ref_i) + column_slope_j 2^(x_ij − column_ref_j) + total_slope_i
of the kept pairs. Norms belong to W in the products (FOLD), except in float16, whose numbers they may leave; there the
other operand takes them, as unit rows. Narrow rows: one kernel owns rows and walks the keys, another owns keys and
walks the rows, both with the whole width in registers: logits twice and two products, 8·Nq·Nk·D flops, nothing of size
Nq·Nk. Wide rows: W in chunks of rows, for plain products: logits once and two products, 6·Nq·Nk·D."""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton_common import dot
from .tiles import LEFT_OUT, NOTHING, by_key, dot_products, leave_out, less, load_tile

_FAR = tl.constexpr(1e29)  # references above this belong to slopes of 0
_RANGE = tl.constexpr(100.0)


@triton.jit
def _weights(
    acc, sigma, rest, bias, offs_m, offs_n, in_m, in_n, row_slope_ptr, row_ref_ptr, column_slope_ptr, column_ref_ptr,
    total_slope_ptr, HAS_BIAS: tl.constexpr, SYMMETRIC: tl.constexpr, HAS_TOTAL: tl.constexpr,
):  # fmt: skip
    """W of a tile. One exponential where the references of its rows and keys lie within 2^_RANGE of each other."""
    row_slope = tl.load(row_slope_ptr + offs_m, in_m, 0.0)
    row_ref = tl.load(row_ref_ptr + offs_m, in_m, 1e30)
    if SYMMETRIC:
        column_slope = tl.load(column_slope_ptr + offs_n, in_n, 0.0)
        column_ref = tl.load(column_ref_ptr + offs_n, in_n, 1e30)
        has_row = row_ref < _FAR
        has_column = column_ref < _FAR
        top = tl.maximum(
            tl.max(tl.where(has_row, row_ref, NOTHING), 0), tl.max(tl.where(has_column, column_ref, NOTHING), 0)
        )
        top = tl.where(top > NOTHING, top, 0.0)
        apart = tl.max(tl.where(has_column, top - column_ref, 0.0), 0)
        if apart > _RANGE:
            w = row_slope[:, None] * tl.exp2(less(acc, sigma, rest, bias, row_ref[:, None], HAS_BIAS))
            w_of_keys = tl.exp2(less(acc, sigma, rest, bias, column_ref[None, :], HAS_BIAS))
            w += column_slope[None, :] * w_of_keys
        else:
            ref = tl.where(has_row, row_ref, top)
            by_key = tl.where(has_column, column_slope * tl.exp2(top - column_ref), 0.0)
            by_row = tl.exp2(ref - top)
            # A pair whose row or key has a slope is not above its reference; one with neither may be anywhere.
            e = tl.exp2(tl.minimum(less(acc, sigma, rest, bias, ref[:, None], HAS_BIAS), 1.0))
            w = e * (row_slope[:, None] + by_row[:, None] * by_key[None, :])
    else:
        w = row_slope[:, None] * tl.exp2(less(acc, sigma, rest, bias, row_ref[:, None], HAS_BIAS))
    if HAS_TOTAL:
        w += tl.load(total_slope_ptr + offs_m, in_m, 0.0)[:, None]
    return tl.where(acc != LEFT_OUT, w, 0.0)


@triton.jit
def _tile_weights(
    products, sigma, rest, kappa_ptr, bias_ptr, offs_m, offs_n, read_m, read_n, in_m, in_n, target_ptr, query_ids_ptr,
    key_ids_ptr, listed_rows_ptr, listed_keys_ptr, tile_offsets_ptr, tile, row_slope_ptr, row_ref_ptr,
    column_slope_ptr, column_ref_ptr, total_slope_ptr, HAS_KAPPA: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_IDS: tl.constexpr, HAS_EXCLUDE: tl.constexpr, SYMMETRIC: tl.constexpr, HAS_TOTAL: tl.constexpr,
):  # fmt: skip
    """W of a tile from its dot products, and the products with what is left out marked."""
    products, bias = by_key(products, kappa_ptr, bias_ptr, offs_n, in_n, HAS_KAPPA, HAS_BIAS)
    products = leave_out(products, offs_m, offs_n, read_m, read_n, in_m, in_n, target_ptr, query_ids_ptr,
                          key_ids_ptr, listed_rows_ptr, listed_keys_ptr, tile_offsets_ptr, tile, HAS_IDS,
                          HAS_EXCLUDE)  # fmt: skip
    w = _weights(products, sigma, rest, bias, offs_m, offs_n, in_m, in_n, row_slope_ptr, row_ref_ptr, column_slope_ptr,
                 column_ref_ptr, total_slope_ptr, HAS_BIAS, SYMMETRIC, HAS_TOTAL)  # fmt: skip
    return w, products


@triton.jit
def query_sums_kernel(
    q_ptr, k_ptr, sigma_ptr, kappa_ptr, bias_ptr, row_read_ptr, key_read_ptr, target_ptr, query_ids_ptr, key_ids_ptr,
    listed_rows_ptr, listed_keys_ptr, tile_offsets_ptr, row_slope_ptr, row_ref_ptr, column_slope_ptr, column_ref_ptr,
    total_slope_ptr, out_ptr, rows, columns, width, q_stride, k_stride,
    SYMMETRIC: tl.constexpr, HAS_KAPPA: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_IDS: tl.constexpr,
    HAS_EXCLUDE: tl.constexpr, HAS_TOTAL: tl.constexpr, FOLD: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """u_i = Σ_j W_ij kappa_j k_j, float32 [rows, width]: a program owns rows and walks the keys."""
    row_tile = tl.program_id(0)
    column_tiles = tl.cdiv(columns, BLOCK_N)
    offs_m = row_tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    in_m = offs_m < rows
    read_m = tl.load(row_read_ptr + offs_m, in_m, 0) != 0
    sigma = tl.load(sigma_ptr + offs_m, read_m, 0.0)
    rest = tl.load(sigma_ptr + rows + offs_m, read_m, 0.0)
    q = load_tile(q_ptr, offs_m, read_m, offs_d, width, q_stride)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for j in range(0, column_tiles):
        offs_n = j * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
        in_n = offs_n < columns
        read_n = tl.load(key_read_ptr + offs_n, in_n, 0) != 0
        k = load_tile(k_ptr, offs_n, read_n, offs_d, width, k_stride)
        products = dot(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION, UPCAST)
        w, products = _tile_weights(products, sigma, rest, kappa_ptr, bias_ptr, offs_m, offs_n, read_m, read_n,
                                    in_m, in_n, target_ptr, query_ids_ptr, key_ids_ptr, listed_rows_ptr,
                                    listed_keys_ptr, tile_offsets_ptr, row_tile * column_tiles + j, row_slope_ptr,
                                    row_ref_ptr, column_slope_ptr, column_ref_ptr, total_slope_ptr, HAS_KAPPA,
                                    HAS_BIAS, HAS_IDS, HAS_EXCLUDE, SYMMETRIC, HAS_TOTAL)  # fmt: skip
        if HAS_KAPPA:
            kappa = tl.load(kappa_ptr + offs_n, in_n, 1.0)
            if FOLD:
                w = w * kappa[None, :]
            else:
                k = (k.to(tl.float32) * kappa[:, None]).to(k.dtype)
        if HAS_IDS or HAS_EXCLUDE:  # a key that nobody here keeps may hold NaN
            k = tl.where((tl.sum((products != LEFT_OUT).to(tl.int32), 0) > 0)[:, None], k, 0.0).to(k.dtype)
        acc = dot(w.to(k.dtype), k, acc, PRECISION, UPCAST)
    out = out_ptr + offs_m[:, None] * width + offs_d[None, :]
    tl.store(out, acc, in_m[:, None] & (offs_d < width)[None, :])


@triton.jit
def key_sums_kernel(
    q_ptr, k_ptr, sigma_ptr, kappa_ptr, bias_ptr, row_read_ptr, key_read_ptr, target_ptr, query_ids_ptr, key_ids_ptr,
    listed_rows_ptr, listed_keys_ptr, tile_offsets_ptr, row_slope_ptr, row_ref_ptr, column_slope_ptr, column_ref_ptr,
    total_slope_ptr, row_factor_ptr, out_ptr, log_q_ptr, rows, columns, width, q_stride, k_stride,
    SYMMETRIC: tl.constexpr, HAS_KAPPA: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_IDS: tl.constexpr,
    HAS_EXCLUDE: tl.constexpr, HAS_TOTAL: tl.constexpr, FOLD: tl.constexpr, NEED_LOG_Q: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Σ_i W_ij row_factor_i q_i, float32 [columns, width], and Σ_i W_ij: a program owns keys and walks the rows."""
    column_tile = tl.program_id(0)
    column_tiles = tl.cdiv(columns, BLOCK_N)
    offs_n = column_tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    in_n = offs_n < columns
    read_n = tl.load(key_read_ptr + offs_n, in_n, 0) != 0
    k = load_tile(k_ptr, offs_n, read_n, offs_d, width, k_stride)
    acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    log_q = tl.zeros([BLOCK_N], tl.float32)
    for i in range(0, tl.cdiv(rows, BLOCK_M)):
        offs_m = i * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
        in_m = offs_m < rows
        read_m = tl.load(row_read_ptr + offs_m, in_m, 0) != 0
        sigma = tl.load(sigma_ptr + offs_m, read_m, 0.0)
        rest = tl.load(sigma_ptr + rows + offs_m, read_m, 0.0)
        q = load_tile(q_ptr, offs_m, read_m, offs_d, width, q_stride)
        products = dot(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION, UPCAST)
        w, products = _tile_weights(products, sigma, rest, kappa_ptr, bias_ptr, offs_m, offs_n, read_m, read_n,
                                    in_m, in_n, target_ptr, query_ids_ptr, key_ids_ptr, listed_rows_ptr,
                                    listed_keys_ptr, tile_offsets_ptr, i * column_tiles + column_tile, row_slope_ptr,
                                    row_ref_ptr, column_slope_ptr, column_ref_ptr, total_slope_ptr, HAS_KAPPA,
                                    HAS_BIAS, HAS_IDS, HAS_EXCLUDE, SYMMETRIC, HAS_TOTAL)  # fmt: skip
        if NEED_LOG_Q:
            log_q += tl.sum(w, 0)
        factor = tl.load(row_factor_ptr + offs_m, read_m, 0.0)
        if FOLD:
            w = w * factor[:, None]
        else:
            q = (q.to(tl.float32) * factor[:, None]).to(q.dtype)
        if HAS_IDS or HAS_EXCLUDE:  # a row that keeps nothing here may hold NaN
            q = tl.where((tl.sum((products != LEFT_OUT).to(tl.int32), 1) > 0)[:, None], q, 0.0).to(q.dtype)
        acc = dot(tl.trans(w).to(q.dtype), q, acc, PRECISION, UPCAST)
    out = out_ptr + offs_n[:, None] * width + offs_d[None, :]
    tl.store(out, acc, in_n[:, None] & (offs_d < width)[None, :])
    if NEED_LOG_Q:
        tl.store(log_q_ptr + offs_n, log_q, in_n)


@triton.jit
def weights_kernel(
    q_ptr, k_ptr, sigma_ptr, kappa_ptr, bias_ptr, row_read_ptr, key_read_ptr, target_ptr, query_ids_ptr, key_ids_ptr,
    listed_rows_ptr, listed_keys_ptr, tile_offsets_ptr, row_slope_ptr, row_ref_ptr, column_slope_ptr, column_ref_ptr,
    total_slope_ptr, out_ptr, log_q_ptr, first_tile, row_tiles, rows, columns, width, q_stride, k_stride, out_stride,
    SYMMETRIC: tl.constexpr, HAS_KAPPA: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_IDS: tl.constexpr,
    HAS_EXCLUDE: tl.constexpr, HAS_TOTAL: tl.constexpr, FOLD: tl.constexpr, NEED_LOG_Q: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """W_ij kappa_j of `row_tiles` tiles of rows from `first_tile` on, in the dtype of the output, and the sums of W
    over each tile's rows. Programs that share keys follow each other."""
    local_tile = tl.program_id(0) % row_tiles
    row_tile = first_tile + local_tile
    column_tile = tl.program_id(0) // row_tiles
    column_tiles = tl.cdiv(columns, BLOCK_N)
    offs_m = row_tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = column_tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_m = offs_m < rows
    in_n = offs_n < columns
    read_m = tl.load(row_read_ptr + offs_m, in_m, 0) != 0
    read_n = tl.load(key_read_ptr + offs_n, in_n, 0) != 0
    sigma = tl.load(sigma_ptr + offs_m, read_m, 0.0)
    rest = tl.load(sigma_ptr + rows + offs_m, read_m, 0.0)
    acc = dot_products(q_ptr, k_ptr, offs_m, offs_n, read_m, read_n, width, q_stride, k_stride,
                    BLOCK_M, BLOCK_N, BLOCK_D, PRECISION, UPCAST)  # fmt: skip
    w, acc = _tile_weights(acc, sigma, rest, kappa_ptr, bias_ptr, offs_m, offs_n, read_m, read_n,
                           in_m, in_n, target_ptr, query_ids_ptr, key_ids_ptr, listed_rows_ptr,
                           listed_keys_ptr, tile_offsets_ptr, row_tile * column_tiles + column_tile, row_slope_ptr,
                           row_ref_ptr, column_slope_ptr, column_ref_ptr, total_slope_ptr, HAS_KAPPA,
                           HAS_BIAS, HAS_IDS, HAS_EXCLUDE, SYMMETRIC, HAS_TOTAL)  # fmt: skip
    if NEED_LOG_Q:
        tl.store(log_q_ptr + local_tile.to(tl.int64) * columns + offs_n, tl.sum(w, 0), in_n)
    if HAS_KAPPA and FOLD:
        w = w * tl.load(kappa_ptr + offs_n, in_n, 1.0)[None, :]
    out = out_ptr + (offs_m - first_tile * BLOCK_M)[:, None] * out_stride + offs_n[None, :]
    tl.store(out, w.to(out_ptr.dtype.element_ty), in_m[:, None] & in_n[None, :])
