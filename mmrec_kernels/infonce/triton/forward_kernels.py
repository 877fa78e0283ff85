"""InfoNCE: the Triton kernels of the forward.

Forward: a program owns a tile of rows and walks a strip of tiles of keys. Row sums stay in registers relative to a
whole running reference; with n_i = ceil max_j x_ij of a tile the one exponential e_ij = 2^(x_ij − n_i) serves its rows,
and times the exact power of two 2^(n_i − max n) its keys. Where a key of the tile lies more than _SPREAD below, the
keys take exponentials of their own. Partial sums are written per (strip, row) and per (row tile, key) and combined in a
fixed order. 2·Nq·Nk·D flops; reads D·(Nq·Nk/BLOCK_M + Nq) elements, through L2."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import LEFT_OUT, NOTHING, by_key, dot_products, leave_out, less, load_tile

_SPREAD = tl.constexpr(60.0)


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, sigma_ptr, kappa_ptr, bias_ptr, row_read_ptr, key_read_ptr, target_ptr, query_ids_ptr, key_ids_ptr,
    listed_rows_ptr, listed_keys_ptr, tile_offsets_ptr, positive_ptr, row_ref_ptr, row_sum_ptr, column_ref_ptr,
    column_sum_ptr, total_ptr, kept_ptr, rank_ptr, first_tile, rows, columns, width, q_stride, k_stride, strip_tiles,
    SYMMETRIC: tl.constexpr, HAS_KAPPA: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_IDS: tl.constexpr,
    HAS_EXCLUDE: tl.constexpr, NEED_TOTAL: tl.constexpr, NEED_RANK: tl.constexpr, BLOCK_M: tl.constexpr,
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
    run_ref = tl.full([BLOCK_M], NOTHING, tl.float32)
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
        acc = dot_products(q_ptr, k_ptr, offs_m, offs_n, read_m, read_n, width, q_stride, k_stride,
                        BLOCK_M, BLOCK_N, BLOCK_D, PRECISION, UPCAST)  # fmt: skip
        acc, bias = by_key(acc, kappa_ptr, bias_ptr, offs_n, in_n, HAS_KAPPA, HAS_BIAS)
        acc = leave_out(acc, offs_m, offs_n, read_m, read_n, in_m, in_n, target_ptr, query_ids_ptr,
                         key_ids_ptr, listed_rows_ptr, listed_keys_ptr, tile_offsets_ptr,
                         row_tile * column_tiles + j, HAS_IDS, HAS_EXCLUDE)  # fmt: skip
        x = tl.where(acc != LEFT_OUT, less(acc, sigma, rest, bias, 0.0, HAS_BIAS), -float("inf"))
        if NEED_RANK:
            above += tl.sum((x > positive[:, None]).to(tl.int32), 1)
        if NEED_TOTAL:
            total += tl.sum(tl.where(acc != LEFT_OUT, x, 0.0), 1)
            kept += tl.sum((acc != LEFT_OUT).to(tl.int32), 1)
        highest = tl.max(x, 1)
        ref = tl.where(highest > -float("inf"), tl.ceil(highest), NOTHING)
        e = tl.where(acc != LEFT_OUT, tl.exp2(less(acc, sigma, rest, bias, ref[:, None], HAS_BIAS)), 0.0)
        new_ref = tl.maximum(run_ref, ref)
        run_sum = run_sum * tl.exp2(run_ref - new_ref) + tl.sum(e, 1) * tl.exp2(ref - new_ref)
        run_ref = new_ref
        if SYMMETRIC:
            top = tl.max(ref, 0)
            lowest = tl.max(x, 0)
            column_ref = tl.where(lowest > -float("inf"), tl.ceil(lowest), NOTHING)
            spread = tl.max(tl.where(column_ref > NOTHING, top - column_ref, 0.0), 0)
            if spread > _SPREAD:
                own = tl.exp2(less(acc, sigma, rest, bias, column_ref[None, :], HAS_BIAS))
                column_sum = tl.sum(tl.where(acc != LEFT_OUT, own, 0.0), 0)
            else:
                column_sum = tl.sum(e * tl.exp2(ref - top)[:, None], 0)
                column_ref = tl.where(column_ref > NOTHING, top, NOTHING)
            out = tl.program_id(0).to(tl.int64) * columns + offs_n
            tl.store(column_ref_ptr + out, column_ref, in_n)
            tl.store(column_sum_ptr + out, column_sum, in_n)
    out_m = strip.to(tl.int64) * rows + offs_m
    tl.store(row_ref_ptr + out_m, run_ref, in_m)
    tl.store(row_sum_ptr + out_m, run_sum, in_m)
    if NEED_TOTAL:
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
    top = tl.full([BLOCK], NOTHING, tl.float32)
    everything = tl.zeros([BLOCK], tl.float32)
    for p in range(parts):
        total = tl.load(sum_ptr + p * step + offs, inside, 0.0)
        ref = tl.where(total != 0.0, tl.load(ref_ptr + p * step + offs, inside, NOTHING), NOTHING)
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
    top = tl.full([BLOCK], NOTHING, tl.float32)
    for p in range(parts):
        ref = tl.load(ref_ptr + p * step + offs, inside, NOTHING)
        total = tl.load(sum_ptr + p * step + offs, inside, 0.0)
        top = tl.maximum(top, tl.where(total != 0.0, ref, NOTHING))
    everything = tl.zeros([BLOCK], tl.float64)
    for p in range(parts):
        ref = tl.load(ref_ptr + p * step + offs, inside, NOTHING)
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
        q = load_tile(q_ptr, offs_m, in_m, offs_d, width, q_stride).to(tl.float64)
        norm += tl.sum(q * q, 1)
        if HAS_KEY:
            k = load_tile(k_ptr, target, target >= 0, offs_d, width, k_stride).to(tl.float64)
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
    acc = dot_products(q_ptr, k_ptr, offs_m, target, read_m, target >= 0, width, q_stride, k_stride,
                    BLOCK_M, BLOCK_N, BLOCK_D, PRECISION, UPCAST)  # fmt: skip
    sigma = tl.load(sigma_ptr + offs_m, read_m, 0.0)
    rest = tl.load(sigma_ptr + rows + offs_m, read_m, 0.0)
    acc, bias = by_key(acc, kappa_ptr, bias_ptr, target, target >= 0, HAS_KAPPA, HAS_BIAS)
    x = less(acc, sigma, rest, bias, 0.0, HAS_BIAS)
    own = tl.arange(0, BLOCK_M)[:, None] == tl.arange(0, BLOCK_N)[None, :]
    tl.store(out_ptr + offs_m, tl.sum(tl.where(own, x, 0.0), 1), in_m)
