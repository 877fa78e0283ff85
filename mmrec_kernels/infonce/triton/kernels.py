"""InfoNCE: the Triton kernels.

    x_ij = sigma_i · kappa_j · (q_i · k_j) − bias_j      logits in units of log2, sigma_i = log2(e) · scale_i / ‖q_i‖

Forward: a program owns a tile of rows and walks a strip of tiles of keys. Row sums stay in registers relative to a
whole running reference; with n_i = ceil max_j x_ij of a tile the one exponential e_ij = 2^(x_ij − n_i) serves its rows,
and times the exact power of two 2^(n_i − max n) its keys. Where a key of the tile lies more than _SPREAD below, the
keys take exponentials of their own. Partial sums are written per (strip, row) and per (row tile, key) and combined in a
fixed order. 2·Nq·Nk·D flops; reads D·(Nq·Nk/BLOCK_M + Nq) elements, through L2.

Backward: dLoss/dS_ij = W_ij = row_slope_i 2^(x_ij − row_ref_i) + column_slope_j 2^(x_ij − column_ref_j) + mean_slope_i.
Norms belong to W in the products (FOLD), except in float16, whose numbers they may leave; there the other operand takes
them, as unit rows. Narrow rows: one kernel owns rows and walks the keys, another owns keys and walks the rows, both
with the whole width in registers: logits twice and two products, 8·Nq·Nk·D flops, nothing of size Nq·Nk. Wide rows: W
in chunks of rows, for plain products: logits once and two products, 6·Nq·Nk·D.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton_common import dot

_SPREAD = tl.constexpr(60.0)
_NOTHING = tl.constexpr(-1e30)  # a reference below all others; differences stay finite
_FAR = tl.constexpr(1e29)  # references above this belong to slopes of 0
_RANGE = tl.constexpr(100.0)
_LEFT_OUT = tl.constexpr(3.0e38)  # no product of embeddings whose logits are finite


@triton.jit
def _load_tile(ptr, offs, read, offs_d, width, stride):
    return tl.load(ptr + offs[:, None] * stride + offs_d[None, :], read[:, None] & (offs_d < width)[None, :], 0)


@triton.jit
def _products(
    q_ptr, k_ptr, offs_m, offs_n, read_m, read_n, width, q_stride, k_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for d in range(0, width, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        q = _load_tile(q_ptr, offs_m, read_m, offs_d, width, q_stride)
        k = _load_tile(k_ptr, offs_n, read_n, offs_d, width, k_stride)
        acc = dot(q, tl.trans(k), acc, PRECISION, UPCAST)
    return acc


@triton.jit
def _by_key(acc, kappa_ptr, bias_ptr, offs_n, in_n, HAS_KAPPA: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Dot products times kappa, and the biases."""
    if HAS_KAPPA:
        acc = acc * tl.load(kappa_ptr + offs_n, in_n, 1.0)[None, :]
    bias = tl.load(bias_ptr + offs_n, in_n, 0.0) if HAS_BIAS else tl.zeros_like(offs_n).to(tl.float32)
    return acc, bias


@triton.jit
def _less(acc, sigma, rest, bias, ref, HAS_BIAS: tl.constexpr):
    """Logits less a reference, without rounding them at their own size: two fused multiply-adds. sigma + rest is
    sigma_i to twice its digits."""
    x = acc * rest[:, None] + (acc * sigma[:, None] - ref)
    return x - bias[None, :] if HAS_BIAS else x


@triton.jit
def _leave_out(
    acc, offs_m, offs_n, read_m, read_n, in_m, in_n, target_ptr, query_ids_ptr, key_ids_ptr, listed_rows_ptr,
    listed_keys_ptr, tile_offsets_ptr, tile, HAS_IDS: tl.constexpr, HAS_EXCLUDE: tl.constexpr,
):  # fmt: skip
    """_LEFT_OUT in the place of products that are no negatives: not read, the positive, of the row's id, listed. A mark
    in the products costs no registers of its own."""
    row, column = offs_m.to(tl.int32), offs_n.to(tl.int32)
    target = tl.load(target_ptr + offs_m, in_m, -1).to(tl.int32)
    acc = tl.where(read_m[:, None] & read_n[None, :] & (column[None, :] != target[:, None]), acc, _LEFT_OUT)
    if HAS_IDS:
        query_ids = tl.load(query_ids_ptr + offs_m, in_m, -1)
        key_ids = tl.load(key_ids_ptr + offs_n, in_n, -2)
        acc = tl.where(query_ids[:, None] != key_ids[None, :], acc, _LEFT_OUT)
    if HAS_EXCLUDE:
        first = tl.load(tile_offsets_ptr + tile)
        last = tl.load(tile_offsets_ptr + tile + 1)
        for e in range(first, last):
            listed_row = tl.load(listed_rows_ptr + e)
            listed_key = tl.load(listed_keys_ptr + e)
            acc = tl.where((row != listed_row)[:, None] | (column != listed_key)[None, :], acc, _LEFT_OUT)
    return acc


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, sigma_ptr, kappa_ptr, bias_ptr, row_read_ptr, key_read_ptr, target_ptr, query_ids_ptr, key_ids_ptr,
    listed_rows_ptr, listed_keys_ptr, tile_offsets_ptr, positive_ptr, row_ref_ptr, row_sum_ptr, column_ref_ptr,
    column_sum_ptr, total_ptr, kept_ptr, rank_ptr, first_tile, rows, columns, width, q_stride, k_stride, strip_tiles,
    SYMMETRIC: tl.constexpr, HAS_KAPPA: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_IDS: tl.constexpr,
    HAS_EXCLUDE: tl.constexpr, NEED_MEAN: tl.constexpr, NEED_RANK: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    row_tile = first_tile + tl.program_id(0)
    strip = tl.program_id(1)
    column_tiles = tl.cdiv(columns, BLOCK_N)
    offs_m = row_tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_m = offs_m < rows
    read_m = tl.load(row_read_ptr + offs_m, in_m, 0) != 0
    sigma = tl.load(sigma_ptr + offs_m, read_m, 0.0)
    rest = tl.load(sigma_ptr + rows + offs_m, read_m, 0.0)
    run_ref = tl.full([BLOCK_M], _NOTHING, tl.float32)
    run_sum = tl.zeros([BLOCK_M], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    kept = tl.zeros([BLOCK_M], tl.int32)
    above = tl.zeros([BLOCK_M], tl.int32)
    if NEED_RANK:
        positive = tl.load(positive_ptr + offs_m, in_m, 0.0)
    for j in range(strip * strip_tiles, tl.minimum((strip + 1) * strip_tiles, column_tiles)):
        offs_n = j * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
        in_n = offs_n < columns
        read_n = tl.load(key_read_ptr + offs_n, in_n, 0) != 0
        acc = _products(q_ptr, k_ptr, offs_m, offs_n, read_m, read_n, width, q_stride, k_stride,
                        BLOCK_M, BLOCK_N, BLOCK_D, PRECISION, UPCAST)  # fmt: skip
        acc, bias = _by_key(acc, kappa_ptr, bias_ptr, offs_n, in_n, HAS_KAPPA, HAS_BIAS)
        acc = _leave_out(acc, offs_m, offs_n, read_m, read_n, in_m, in_n, target_ptr, query_ids_ptr,
                         key_ids_ptr, listed_rows_ptr, listed_keys_ptr, tile_offsets_ptr,
                         row_tile * column_tiles + j, HAS_IDS, HAS_EXCLUDE)  # fmt: skip
        x = tl.where(acc != _LEFT_OUT, _less(acc, sigma, rest, bias, 0.0, HAS_BIAS), -float("inf"))
        if NEED_RANK:
            above += tl.sum((x > positive[:, None]).to(tl.int32), 1)
        if NEED_MEAN:
            total += tl.sum(tl.where(acc != _LEFT_OUT, x, 0.0), 1)
            kept += tl.sum((acc != _LEFT_OUT).to(tl.int32), 1)
        highest = tl.max(x, 1)
        ref = tl.where(highest > -float("inf"), tl.ceil(highest), _NOTHING)
        e = tl.where(acc != _LEFT_OUT, tl.exp2(_less(acc, sigma, rest, bias, ref[:, None], HAS_BIAS)), 0.0)
        new_ref = tl.maximum(run_ref, ref)
        run_sum = run_sum * tl.exp2(run_ref - new_ref) + tl.sum(e, 1) * tl.exp2(ref - new_ref)
        run_ref = new_ref
        if SYMMETRIC:
            top = tl.max(ref, 0)
            lowest = tl.max(x, 0)
            column_ref = tl.where(lowest > -float("inf"), tl.ceil(lowest), _NOTHING)
            spread = tl.max(tl.where(column_ref > _NOTHING, top - column_ref, 0.0), 0)
            if spread > _SPREAD:
                own = tl.exp2(_less(acc, sigma, rest, bias, column_ref[None, :], HAS_BIAS))
                column_sum = tl.sum(tl.where(acc != _LEFT_OUT, own, 0.0), 0)
            else:
                column_sum = tl.sum(e * tl.exp2(ref - top)[:, None], 0)
                column_ref = tl.where(column_ref > _NOTHING, top, _NOTHING)
            out = tl.program_id(0).to(tl.int64) * columns + offs_n
            tl.store(column_ref_ptr + out, column_ref, in_n)
            tl.store(column_sum_ptr + out, column_sum, in_n)
    out_m = strip.to(tl.int64) * rows + offs_m
    tl.store(row_ref_ptr + out_m, run_ref, in_m)
    tl.store(row_sum_ptr + out_m, run_sum, in_m)
    if NEED_MEAN:
        tl.store(total_ptr + out_m, total, in_m)
        tl.store(kept_ptr + out_m, kept, in_m)
    if NEED_RANK:
        tl.store(rank_ptr + out_m, above, in_m)


@triton.jit
def merge_kernel(ref_ptr, sum_ptr, out_ref_ptr, out_sum_ptr, count, parts, BLOCK: tl.constexpr):
    """Σ_p sum_p 2^ref_p of every entry of [parts, count], as one reference and one sum."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < count
    step = tl.zeros([], tl.int64) + count
    top = tl.full([BLOCK], _NOTHING, tl.float32)
    everything = tl.zeros([BLOCK], tl.float32)
    for p in range(parts):
        total = tl.load(sum_ptr + p * step + offs, inside, 0.0)
        ref = tl.where(total != 0.0, tl.load(ref_ptr + p * step + offs, inside, _NOTHING), _NOTHING)
        higher = tl.maximum(top, ref)
        everything = everything * tl.exp2(top - higher) + total * tl.exp2(ref - higher)
        top = higher
    tl.store(out_ref_ptr + offs, top, inside)
    tl.store(out_sum_ptr + offs, everything, inside)


@triton.jit
def combine_kernel(ref_ptr, sum_ptr, out_ptr, count, parts, BLOCK: tl.constexpr):
    """ln Σ_p sum_p 2^ref_p of every entry of [parts, count], in float64; −inf where nothing was summed."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < count
    step = tl.zeros([], tl.int64) + count
    top = tl.full([BLOCK], _NOTHING, tl.float32)
    for p in range(parts):
        ref = tl.load(ref_ptr + p * step + offs, inside, _NOTHING)
        total = tl.load(sum_ptr + p * step + offs, inside, 0.0)
        top = tl.maximum(top, tl.where(total != 0.0, ref, _NOTHING))
    everything = tl.zeros([BLOCK], tl.float64)
    for p in range(parts):
        ref = tl.load(ref_ptr + p * step + offs, inside, _NOTHING)
        total = tl.load(sum_ptr + p * step + offs, inside, 0.0)
        everything += total.to(tl.float64) * tl.exp2(ref - top).to(tl.float64)
    log = tl.log(tl.where(everything == 0.0, 1.0, everything)) + top.to(tl.float64) * 0.6931471805599453
    tl.store(out_ptr + offs, tl.where(everything == 0.0, -float("inf"), log), inside)


@triton.jit
def positive_kernel(
    q_ptr, k_ptr, target_ptr, dot_ptr, query_norm_ptr, rows, width, q_stride, k_stride,
    HAS_KEY: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """q_i · k_target (0 without a target) and ‖q_i‖, in float64. Without keys the norms alone."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_m = offs_m < rows
    total = tl.zeros([BLOCK_M], tl.float64)
    norm = tl.zeros([BLOCK_M], tl.float64)
    target = tl.load(target_ptr + offs_m, in_m, -1) if HAS_KEY else tl.full([BLOCK_M], -1, tl.int64)
    for d in range(0, width, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        q = _load_tile(q_ptr, offs_m, in_m, offs_d, width, q_stride).to(tl.float64)
        norm += tl.sum(q * q, 1)
        if HAS_KEY:
            k = _load_tile(k_ptr, target, target >= 0, offs_d, width, k_stride).to(tl.float64)
            total += tl.sum(tl.where((target >= 0)[:, None], q * k, 0.0), 1)
    tl.store(query_norm_ptr + offs_m, tl.sqrt(norm), in_m)
    if HAS_KEY:
        tl.store(dot_ptr + offs_m, total, in_m)


@triton.jit
def rank_reference_kernel(
    q_ptr, k_ptr, sigma_ptr, kappa_ptr, bias_ptr, row_read_ptr, target_ptr, out_ptr, rows, width, q_stride, k_stride,
    HAS_KAPPA: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The logits of the positives by the same products as all others: rows against the keys that BLOCK_N of them want,
    the diagonal."""
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    offs_m = first + tl.arange(0, BLOCK_M)
    in_m = (offs_m < rows) & (tl.arange(0, BLOCK_M) < BLOCK_N)
    read_m = tl.load(row_read_ptr + offs_m, in_m, 0) != 0
    wanting = first + tl.arange(0, BLOCK_N)
    target = tl.load(target_ptr + wanting, wanting < rows, -1)
    acc = _products(q_ptr, k_ptr, offs_m, target, read_m, target >= 0, width, q_stride, k_stride,
                    BLOCK_M, BLOCK_N, BLOCK_D, PRECISION, UPCAST)  # fmt: skip
    sigma = tl.load(sigma_ptr + offs_m, read_m, 0.0)
    rest = tl.load(sigma_ptr + rows + offs_m, read_m, 0.0)
    acc, bias = _by_key(acc, kappa_ptr, bias_ptr, target, target >= 0, HAS_KAPPA, HAS_BIAS)
    x = _less(acc, sigma, rest, bias, 0.0, HAS_BIAS)
    own = tl.arange(0, BLOCK_M)[:, None] == tl.arange(0, BLOCK_N)[None, :]
    tl.store(out_ptr + offs_m, tl.sum(tl.where(own, x, 0.0), 1), in_m)


@triton.jit
def _weights(
    acc, sigma, rest, bias, offs_m, offs_n, in_m, in_n, row_slope_ptr, row_ref_ptr, column_slope_ptr, column_ref_ptr,
    mean_slope_ptr, HAS_BIAS: tl.constexpr, SYMMETRIC: tl.constexpr, HAS_MEAN: tl.constexpr,
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
            tl.max(tl.where(has_row, row_ref, _NOTHING), 0), tl.max(tl.where(has_column, column_ref, _NOTHING), 0)
        )
        top = tl.where(top > _NOTHING, top, 0.0)
        apart = tl.max(tl.where(has_column, top - column_ref, 0.0), 0)
        if apart > _RANGE:
            w = row_slope[:, None] * tl.exp2(_less(acc, sigma, rest, bias, row_ref[:, None], HAS_BIAS))
            w_of_keys = tl.exp2(_less(acc, sigma, rest, bias, column_ref[None, :], HAS_BIAS))
            w += column_slope[None, :] * w_of_keys
        else:
            ref = tl.where(has_row, row_ref, top)
            by_key = tl.where(has_column, column_slope * tl.exp2(top - column_ref), 0.0)
            by_row = tl.exp2(ref - top)
            # A pair whose row or key has a slope is not above its reference; one with neither may be anywhere.
            e = tl.exp2(tl.minimum(_less(acc, sigma, rest, bias, ref[:, None], HAS_BIAS), 1.0))
            w = e * (row_slope[:, None] + by_row[:, None] * by_key[None, :])
    else:
        w = row_slope[:, None] * tl.exp2(_less(acc, sigma, rest, bias, row_ref[:, None], HAS_BIAS))
    if HAS_MEAN:
        w += tl.load(mean_slope_ptr + offs_m, in_m, 0.0)[:, None]
    return tl.where(acc != _LEFT_OUT, w, 0.0)


@triton.jit
def query_sums_kernel(
    q_ptr, k_ptr, sigma_ptr, kappa_ptr, bias_ptr, row_read_ptr, key_read_ptr, target_ptr, query_ids_ptr, key_ids_ptr,
    listed_rows_ptr, listed_keys_ptr, tile_offsets_ptr, row_slope_ptr, row_ref_ptr, column_slope_ptr, column_ref_ptr,
    mean_slope_ptr, out_ptr, rows, columns, width, q_stride, k_stride,
    SYMMETRIC: tl.constexpr, HAS_KAPPA: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_IDS: tl.constexpr,
    HAS_EXCLUDE: tl.constexpr, HAS_MEAN: tl.constexpr, FOLD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
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
    q = _load_tile(q_ptr, offs_m, read_m, offs_d, width, q_stride)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for j in range(0, column_tiles):
        offs_n = j * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
        in_n = offs_n < columns
        read_n = tl.load(key_read_ptr + offs_n, in_n, 0) != 0
        k = _load_tile(k_ptr, offs_n, read_n, offs_d, width, k_stride)
        products = dot(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION, UPCAST)
        products, bias = _by_key(products, kappa_ptr, bias_ptr, offs_n, in_n, HAS_KAPPA, HAS_BIAS)
        products = _leave_out(products, offs_m, offs_n, read_m, read_n, in_m, in_n, target_ptr,
                              query_ids_ptr, key_ids_ptr, listed_rows_ptr, listed_keys_ptr,
                              tile_offsets_ptr, row_tile * column_tiles + j, HAS_IDS, HAS_EXCLUDE)  # fmt: skip
        w = _weights(products, sigma, rest, bias, offs_m, offs_n, in_m, in_n, row_slope_ptr, row_ref_ptr,
                     column_slope_ptr, column_ref_ptr, mean_slope_ptr, HAS_BIAS, SYMMETRIC, HAS_MEAN)  # fmt: skip
        if HAS_KAPPA:
            kappa = tl.load(kappa_ptr + offs_n, in_n, 1.0)
            if FOLD:
                w = w * kappa[None, :]
            else:
                k = (k.to(tl.float32) * kappa[:, None]).to(k.dtype)
        if HAS_IDS or HAS_EXCLUDE:  # a key that nobody here keeps may hold NaN
            k = tl.where((tl.sum((products != _LEFT_OUT).to(tl.int32), 0) > 0)[:, None], k, 0.0).to(k.dtype)
        acc = dot(w.to(k.dtype), k, acc, PRECISION, UPCAST)
    out = out_ptr + offs_m[:, None] * width + offs_d[None, :]
    tl.store(out, acc, in_m[:, None] & (offs_d < width)[None, :])


@triton.jit
def key_sums_kernel(
    q_ptr, k_ptr, sigma_ptr, kappa_ptr, bias_ptr, row_read_ptr, key_read_ptr, target_ptr, query_ids_ptr, key_ids_ptr,
    listed_rows_ptr, listed_keys_ptr, tile_offsets_ptr, row_slope_ptr, row_ref_ptr, column_slope_ptr, column_ref_ptr,
    mean_slope_ptr, row_factor_ptr, out_ptr, log_q_ptr, rows, columns, width, q_stride, k_stride,
    SYMMETRIC: tl.constexpr, HAS_KAPPA: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_IDS: tl.constexpr,
    HAS_EXCLUDE: tl.constexpr, HAS_MEAN: tl.constexpr, FOLD: tl.constexpr, NEED_LOG_Q: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Σ_i W_ij row_factor_i q_i, float32 [columns, width], and Σ_i W_ij: a program owns keys and walks the rows."""
    column_tile = tl.program_id(0)
    column_tiles = tl.cdiv(columns, BLOCK_N)
    offs_n = column_tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    in_n = offs_n < columns
    read_n = tl.load(key_read_ptr + offs_n, in_n, 0) != 0
    k = _load_tile(k_ptr, offs_n, read_n, offs_d, width, k_stride)
    acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    log_q = tl.zeros([BLOCK_N], tl.float32)
    for i in range(0, tl.cdiv(rows, BLOCK_M)):
        offs_m = i * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
        in_m = offs_m < rows
        read_m = tl.load(row_read_ptr + offs_m, in_m, 0) != 0
        sigma = tl.load(sigma_ptr + offs_m, read_m, 0.0)
        rest = tl.load(sigma_ptr + rows + offs_m, read_m, 0.0)
        q = _load_tile(q_ptr, offs_m, read_m, offs_d, width, q_stride)
        products = dot(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION, UPCAST)
        products, bias = _by_key(products, kappa_ptr, bias_ptr, offs_n, in_n, HAS_KAPPA, HAS_BIAS)
        products = _leave_out(products, offs_m, offs_n, read_m, read_n, in_m, in_n, target_ptr,
                              query_ids_ptr, key_ids_ptr, listed_rows_ptr, listed_keys_ptr,
                              tile_offsets_ptr, i * column_tiles + column_tile, HAS_IDS, HAS_EXCLUDE)  # fmt: skip
        w = _weights(products, sigma, rest, bias, offs_m, offs_n, in_m, in_n, row_slope_ptr, row_ref_ptr,
                     column_slope_ptr, column_ref_ptr, mean_slope_ptr, HAS_BIAS, SYMMETRIC, HAS_MEAN)  # fmt: skip
        if NEED_LOG_Q:
            log_q += tl.sum(w, 0)
        factor = tl.load(row_factor_ptr + offs_m, read_m, 0.0)
        if FOLD:
            w = w * factor[:, None]
        else:
            q = (q.to(tl.float32) * factor[:, None]).to(q.dtype)
        if HAS_IDS or HAS_EXCLUDE:  # a row that keeps nothing here may hold NaN
            q = tl.where((tl.sum((products != _LEFT_OUT).to(tl.int32), 1) > 0)[:, None], q, 0.0).to(q.dtype)
        acc = dot(tl.trans(w).to(q.dtype), q, acc, PRECISION, UPCAST)
    out = out_ptr + offs_n[:, None] * width + offs_d[None, :]
    tl.store(out, acc, in_n[:, None] & (offs_d < width)[None, :])
    if NEED_LOG_Q:
        tl.store(log_q_ptr + offs_n, log_q, in_n)


@triton.jit
def weights_kernel(
    q_ptr, k_ptr, sigma_ptr, kappa_ptr, bias_ptr, row_read_ptr, key_read_ptr, target_ptr, query_ids_ptr, key_ids_ptr,
    listed_rows_ptr, listed_keys_ptr, tile_offsets_ptr, row_slope_ptr, row_ref_ptr, column_slope_ptr, column_ref_ptr,
    mean_slope_ptr, out_ptr, log_q_ptr, first_tile, row_tiles, rows, columns, width, q_stride, k_stride, out_stride,
    SYMMETRIC: tl.constexpr, HAS_KAPPA: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_IDS: tl.constexpr,
    HAS_EXCLUDE: tl.constexpr, HAS_MEAN: tl.constexpr, FOLD: tl.constexpr, NEED_LOG_Q: tl.constexpr,
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
    acc = _products(q_ptr, k_ptr, offs_m, offs_n, read_m, read_n, width, q_stride, k_stride,
                    BLOCK_M, BLOCK_N, BLOCK_D, PRECISION, UPCAST)  # fmt: skip
    acc, bias = _by_key(acc, kappa_ptr, bias_ptr, offs_n, in_n, HAS_KAPPA, HAS_BIAS)
    acc = _leave_out(acc, offs_m, offs_n, read_m, read_n, in_m, in_n, target_ptr, query_ids_ptr,
                     key_ids_ptr, listed_rows_ptr, listed_keys_ptr, tile_offsets_ptr,
                     row_tile * column_tiles + column_tile, HAS_IDS, HAS_EXCLUDE)  # fmt: skip
    w = _weights(acc, sigma, rest, bias, offs_m, offs_n, in_m, in_n, row_slope_ptr, row_ref_ptr, column_slope_ptr,
                 column_ref_ptr, mean_slope_ptr, HAS_BIAS, SYMMETRIC, HAS_MEAN)  # fmt: skip
    if NEED_LOG_Q:
        tl.store(log_q_ptr + local_tile.to(tl.int64) * columns + offs_n, tl.sum(w, 0), in_n)
    if HAS_KAPPA and FOLD:
        w = w * tl.load(kappa_ptr + offs_n, in_n, 1.0)[None, :]
    out = out_ptr + (offs_m - first_tile * BLOCK_M)[:, None] * out_stride + offs_n[None, :]
    tl.store(out, w.to(out_ptr.dtype.element_ty), in_m[:, None] & in_n[None, :])
