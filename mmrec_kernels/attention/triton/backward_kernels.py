"""Cross-modal attention: the Triton kernels of the backward that make gradients.

    P_ij = 2^(s_ij − lse_i)      dS_ij = P_ij (gate_m dO_i·v_j + dmass_im + rest_i)    rest_i = dlse_i − Σ_j P_ij dP_ij
    dq_i = scale Σ_j dS_ij k_j   dk_j = scale Σ_i dS_ij q_i    dv_j = gate_m Σ_i P_ij dO_i

A sequence whose queries fit one tile has one owner for each KV head (`rows_kernel`): it walks the keys once, keeps dq
in registers, and the dk and dv of a tile are complete when it has been there: 5 products where the forward has 2, each
of q, k, v, out, dO read once and each gradient written once. Sequences with more queries take two kernels: owners of
tiles of keys (`keys_kernel`) walk the queries; where all keys fit that tile they write dq as well, else owners of tiles
of queries (`rows_kernel`, LONG) walk the keys: 7 products. Which sequences are long is known on the device only: those
kernels run on a fixed number of programs, which share the tiles that `starts` counts, and end at once where there are
none. Every gradient has one owner and one order of summation; there are no atomics.

Tiles of scores are transposed, keys × queries: P and dS are then left operands where they are multiplied into dk, dv.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton_common import dot
from .backward_tiles import (
    add_row_sums,
    clear_keys,
    find_sequence,
    finish_key,
    no_row_sums,
    pair_tile,
    query_tile,
    store_key_grads,
    store_row_grads,
)
from .tiles import (
    find_keys,
    key_tile,
    load_rows,
    query_span,
    reciprocal_rms,
    scale_of,
)


@triton.jit(do_not_specialize=["batch", "work", "kv_heads", "first_head", "heads_here"])
def rows_kernel(
    queries, segments, offsets_ptr, starts_ptr, bias, gate, upstream, row_grads, key_grads, value_grads, batch, work,
    kv_heads, first_head, heads_here, width, value_width,
    LONG: tl.constexpr, LATENT: tl.constexpr, INDEXED: tl.constexpr, CAUSAL: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_GATE: tl.constexpr, HAS_LSE: tl.constexpr, HAS_MASS: tl.constexpr, HAS_QUERY_NORM: tl.constexpr,
    HAS_KEY_NORM: tl.constexpr, BY_HEAD: tl.constexpr, NEED_QUERY: tl.constexpr, NEED_BIAS: tl.constexpr,
    NEED_GATE: tl.constexpr, NEED_REST: tl.constexpr, KEY_NEEDS: tl.constexpr, VALUE_NEEDS: tl.constexpr,
    FIT: tl.constexpr, GROUP: tl.constexpr, ALIGN: tl.constexpr, GRAD_ALIGN: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Owner of a tile of queries of one sequence and KV head: all of its gradients if the sequence has no other tile,
    or (LONG) those of the queries alone."""
    offs_d = tl.arange(0, BLOCK_D)
    offs_v = tl.arange(0, BLOCK_V)
    scale = scale_of(queries, WIDE)
    if LONG:
        work = (tl.load(starts_ptr + batch) * heads_here).to(tl.int64)
    for item in range(tl.program_id(0), work, tl.num_programs(0)):
        hk = first_head + item % heads_here
        b = item // heads_here
        tile = 0
        if LONG:
            b, tile = find_sequence(starts_ptr, b, batch)
        first, n_queries = query_span(queries, b, LATENT)
        if LONG or n_queries * GROUP <= BLOCK_M:
            first_result = first
            if LATENT:
                first_result = b.to(tl.int64) * n_queries
            last_query = tl.minimum(((tile + 1) * BLOCK_M - 1) // GROUP, n_queries - 1)
            span = find_keys(segments, offsets_ptr, batch, b, hk, n_queries, last_query, bias, HAS_BIAS, CAUSAL,
                             GROUP, False)  # fmt: skip
            total = span[4]
            at, rows = query_tile(queries, upstream, span, bias, segments, tile * BLOCK_M, first, first_result,
                                   n_queries, b, hk, kv_heads, offs_d, offs_v, width, value_width, HAS_BIAS, HAS_LSE,
                                   HAS_MASS, HAS_QUERY_NORM, HAS_KEY_NORM, BY_HEAD, FIT, GROUP, ALIGN, BLOCK_M,
                                   WIDE)  # fmt: skip
            q, unfit, grad_out, rest = rows[0], rows[1], rows[3], rows[4]
            sums = no_row_sums(segments, BLOCK_M, BLOCK_D, WIDE)
            for start in range(0, total, BLOCK_N):
                cols = start + tl.arange(0, BLOCK_N)
                k_rows, v_rows, segment, entry, ok, first_query = key_tile(segments, span, cols, hk, INDEXED, ALIGN)
                k = load_rows(k_rows, ok, offs_d, width)
                v = load_rows(v_rows, ok, offs_v, value_width)
                rms = tl.full([BLOCK_N], 1.0, WIDE)
                if HAS_KEY_NORM:
                    rms = reciprocal_rms(k, width, queries.norm_eps, WIDE)
                ds, gated, by_gate = pair_tile(at, rows, k, v, rms, ok, segment, first_query, scale, bias, gate,
                                                upstream, segments, b, hk * GROUP, CAUSAL, HAS_BIAS, HAS_GATE, HAS_MASS,
                                                HAS_KEY_NORM, BY_HEAD, BLOCK_M, BLOCK_N, PRECISION, UPCAST,
                                                WIDE)  # fmt: skip
                if VALUE_NEEDS and not LONG:
                    dv = dot(gated.to(v.dtype), grad_out, tl.zeros([BLOCK_N, BLOCK_V], WIDE), PRECISION, UPCAST)
                    store_key_grads(value_grads, dv, segment, entry, cols < total, hk, first_head, offs_v, value_width,
                                     VALUE_NEEDS, INDEXED, GRAD_ALIGN)  # fmt: skip
                if KEY_NEEDS and not LONG:
                    dk = dot((ds * unfit[None, :]).to(k.dtype), q, tl.zeros([BLOCK_N, BLOCK_D], WIDE), PRECISION,
                             UPCAST)  # fmt: skip
                    dk = finish_key(dk, k, rms, scale, width, HAS_KEY_NORM, WIDE)
                    store_key_grads(key_grads, dk, segment, entry, cols < total, hk, first_head, offs_d, width,
                                     KEY_NEEDS, INDEXED, GRAD_ALIGN)  # fmt: skip
                sums = add_row_sums(sums, ds, by_gate, k, rms, segment, segments, NEED_QUERY, NEED_BIAS, NEED_GATE,
                                     PRECISION, UPCAST)  # fmt: skip
            store_row_grads(row_grads, sums, at, rest, offs_d, width, scale, segments, NEED_QUERY, NEED_BIAS,
                             NEED_GATE, NEED_REST)  # fmt: skip
            if (KEY_NEEDS or VALUE_NEEDS) and not LONG:
                unseen = find_keys(segments, offsets_ptr, batch, b, hk, n_queries, last_query, bias, HAS_BIAS, CAUSAL,
                                   GROUP, True)  # fmt: skip
                for start in range(0, unseen[4], BLOCK_N):
                    clear_keys(segments, key_grads, value_grads, unseen, start, hk, first_head, offs_d, offs_v, width,
                                value_width, KEY_NEEDS, VALUE_NEEDS, INDEXED, GRAD_ALIGN, WIDE, BLOCK_N, BLOCK_D,
                                BLOCK_V)  # fmt: skip


@triton.jit(do_not_specialize=["batch", "kv_heads", "first_head", "heads_here"])
def keys_kernel(
    queries, segments, offsets_ptr, starts_ptr, bias, gate, upstream, row_grads, key_grads, value_grads, batch,
    kv_heads, first_head, heads_here, width, value_width,
    LATENT: tl.constexpr, INDEXED: tl.constexpr, CAUSAL: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_GATE: tl.constexpr, HAS_LSE: tl.constexpr, HAS_MASS: tl.constexpr, HAS_QUERY_NORM: tl.constexpr,
    HAS_KEY_NORM: tl.constexpr, BY_HEAD: tl.constexpr, NEED_QUERY: tl.constexpr, NEED_BIAS: tl.constexpr,
    NEED_GATE: tl.constexpr, NEED_REST: tl.constexpr, KEY_NEEDS: tl.constexpr, VALUE_NEEDS: tl.constexpr,
    FIT: tl.constexpr, GROUP: tl.constexpr, ALIGN: tl.constexpr, GRAD_ALIGN: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Owner of a tile of keys of one long sequence and KV head: their gradients, and those of the queries where the
    sequence has no other key. The tiles of a sequence after those of the keys that are seen clear the others."""
    offs_d = tl.arange(0, BLOCK_D)
    offs_v = tl.arange(0, BLOCK_V)
    scale = scale_of(queries, WIDE)
    work = (tl.load(starts_ptr + batch) * heads_here).to(tl.int64)
    for item in range(tl.program_id(0), work, tl.num_programs(0)):
        hk = first_head + item % heads_here
        b, tile = find_sequence(starts_ptr, item // heads_here, batch)
        first, n_queries = query_span(queries, b, LATENT)
        first_result = first
        if LATENT:
            first_result = b.to(tl.int64) * n_queries
        span = find_keys(segments, offsets_ptr, batch, b, hk, n_queries, n_queries - 1, bias, HAS_BIAS, CAUSAL, GROUP,
                         False)  # fmt: skip
        total = span[4]
        unseen = find_keys(segments, offsets_ptr, batch, b, hk, n_queries, n_queries - 1, bias, HAS_BIAS, CAUSAL,
                           GROUP, True)  # fmt: skip
        tiles = tl.maximum(tl.cdiv(total, BLOCK_N), 1)
        alone = total + unseen[4] <= BLOCK_N
        if tile >= tiles:
            clear_keys(segments, key_grads, value_grads, unseen, (tile - tiles) * BLOCK_N, hk, first_head, offs_d,
                        offs_v, width, value_width, KEY_NEEDS, VALUE_NEEDS, INDEXED, GRAD_ALIGN, WIDE, BLOCK_N,
                        BLOCK_D, BLOCK_V)  # fmt: skip
        else:
            cols = tile * BLOCK_N + tl.arange(0, BLOCK_N)
            k_rows, v_rows, segment, entry, ok, first_query = key_tile(segments, span, cols, hk, INDEXED, ALIGN)
            k = load_rows(k_rows, ok, offs_d, width)
            v = load_rows(v_rows, ok, offs_v, value_width)
            rms = tl.full([BLOCK_N], 1.0, WIDE)
            if HAS_KEY_NORM:
                rms = reciprocal_rms(k, width, queries.norm_eps, WIDE)
            dk = tl.zeros([BLOCK_N, BLOCK_D], WIDE)
            dv = tl.zeros([BLOCK_N, BLOCK_V], WIDE)
            begin = 0
            if CAUSAL:
                earliest = tl.min(tl.where(ok, first_query, n_queries), 0)
                begin = tl.where(alone, 0, tl.maximum(earliest, 0) * GROUP // BLOCK_M * BLOCK_M)
            for start in range(begin, n_queries * GROUP, BLOCK_M):
                at, rows = query_tile(queries, upstream, span, bias, segments, start, first, first_result, n_queries,
                                       b, hk, kv_heads, offs_d, offs_v, width, value_width, HAS_BIAS, HAS_LSE, HAS_MASS,
                                       HAS_QUERY_NORM, HAS_KEY_NORM, BY_HEAD, FIT, GROUP, ALIGN, BLOCK_M,
                                       WIDE)  # fmt: skip
                q, unfit, grad_out, rest = rows[0], rows[1], rows[3], rows[4]
                ds, gated, by_gate = pair_tile(at, rows, k, v, rms, ok, segment, first_query, scale, bias, gate,
                                                upstream, segments, b, hk * GROUP, CAUSAL, HAS_BIAS, HAS_GATE, HAS_MASS,
                                                HAS_KEY_NORM, BY_HEAD, BLOCK_M, BLOCK_N, PRECISION, UPCAST,
                                                WIDE)  # fmt: skip
                if VALUE_NEEDS:
                    dv = dot(gated.to(v.dtype), grad_out, dv, PRECISION, UPCAST)
                if KEY_NEEDS:
                    dk = dot((ds * unfit[None, :]).to(k.dtype), q, dk, PRECISION, UPCAST)
                if alone:
                    sums = add_row_sums(no_row_sums(segments, BLOCK_M, BLOCK_D, WIDE), ds, by_gate, k, rms, segment,
                                         segments, NEED_QUERY, NEED_BIAS, NEED_GATE, PRECISION, UPCAST)  # fmt: skip
                    store_row_grads(row_grads, sums, at, rest, offs_d, width, scale, segments, NEED_QUERY, NEED_BIAS,
                                     NEED_GATE, NEED_REST)  # fmt: skip
            if VALUE_NEEDS:
                store_key_grads(value_grads, dv, segment, entry, cols < total, hk, first_head, offs_v, value_width,
                                 VALUE_NEEDS, INDEXED, GRAD_ALIGN)  # fmt: skip
            if KEY_NEEDS:
                dk = finish_key(dk, k, rms, scale, width, HAS_KEY_NORM, WIDE)
                store_key_grads(key_grads, dk, segment, entry, cols < total, hk, first_head, offs_d, width, KEY_NEEDS,
                                 INDEXED, GRAD_ALIGN)  # fmt: skip
