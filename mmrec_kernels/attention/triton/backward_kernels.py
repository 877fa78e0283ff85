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
from .tiles import (
    LOG2E,
    NOTHING,
    bias_reference,
    bias_tile,
    find_keys,
    key_tile,
    load_queries,
    load_rows,
    per_segment_tile,
    power_of_score,
    query_span,
    reciprocal_rms,
    scale_of,
)


@triton.jit
def _find_sequence(starts_ptr, item, batch):
    """The sequence b with starts[b] ≤ item < starts[b + 1], by bisection, and the tile of it that `item` is."""
    low = tl.zeros([], tl.int64)
    high = tl.zeros([], tl.int64) + batch
    while high - low > 1:
        middle = (low + high) // 2
        below = tl.load(starts_ptr + middle) <= item
        low = tl.where(below, middle, low)
        high = tl.where(below, high, middle)
    return low, (item - tl.load(starts_ptr + low)).to(tl.int32)


@triton.jit
def _load_upstream(
    upstream, result, in_m, sees, offs_v, value_width, reference, segments, HAS_LSE: tl.constexpr,
    HAS_MASS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """dO, rest, lse (log2 units, relative to the row's reference) and 2^−(what its rounding left) of a tile of queries.
    Rows without a key get zeros and a lse above all scores, so that what arrives for them reaches only their rest."""
    lse = tl.load(upstream.lse + result, in_m, NOTHING)
    live = in_m & (lse != NOTHING) & sees
    at = result[:, None] * value_width + offs_v[None, :]
    read = live[:, None] & (offs_v < value_width)[None, :]
    grad_out = tl.load(upstream.grad_out + at, read, 0.0)
    out = tl.load(upstream.out + at, read, 0.0)
    rest = -tl.sum(tl.where(out == 0, 0.0, grad_out.to(WIDE) * out.to(WIDE)), 1)
    if HAS_MASS:
        for m in tl.static_range(len(segments)):
            mass = tl.load(upstream.mass + result * len(segments) + m, live, 0.0).to(WIDE)
            grad = tl.load(upstream.grad_mass + result * len(segments) + m, live, 0.0).to(WIDE)
            rest -= tl.where(mass == 0, 0.0, mass * grad)
    if HAS_LSE:
        rest += tl.load(upstream.grad_lse + result, in_m & (lse != NOTHING), 0.0).to(WIDE)
    wide = tl.where(live, lse * LOG2E - reference.to(tl.float64), float("inf"))
    high = wide.to(WIDE)
    low = tl.exp2(tl.where(live, high.to(tl.float64) - wide, 0.0).to(WIDE))
    return grad_out, rest, high, low


@triton.jit
def _weights(
    q, factor, k, rms, ok, segment, first_query, bias, b, heads, query, reference, high, low, first_head,
    CAUSAL: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_KEY_NORM: tl.constexpr, BY_HEAD: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """P of a tile, keys × queries, and which of its pairs meet."""
    products = dot(k, tl.trans(q), tl.zeros([BLOCK_N, BLOCK_M], WIDE), PRECISION, UPCAST)
    if HAS_KEY_NORM:
        products = products * rms[:, None]
    keep = ok[:, None] & (high != float("inf"))[None, :]
    shift = tl.zeros_like(products) - high[None, :]
    if CAUSAL:
        keep = keep & (first_query[:, None] <= query[None, :])
    if HAS_BIAS:
        bias_x = bias_tile(bias, b, heads[None, :], segment[:, None], first_head, BY_HEAD, WIDE)
        keep = keep & (bias_x != NOTHING)
        shift += bias_x - reference[None, :]
    return tl.where(keep, power_of_score(products, factor[None, :], shift, UPCAST, WIDE) * low[None, :], 0.0), keep


@triton.jit
def _grad_scores(
    p, keep, grad_out, v, gate, upstream, b, heads, result, segment, rest, first_head, segments, HAS_GATE: tl.constexpr,
    HAS_MASS: tl.constexpr, BY_HEAD: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dS of a tile; P with the gate in it, which dv takes; and P·(dO·v), of which the gate's gradient is the sum."""
    grad_p = dot(v, tl.trans(grad_out), tl.zeros([BLOCK_N, BLOCK_M], WIDE), PRECISION, UPCAST)
    gated = p
    by_gate = p
    if HAS_GATE:
        gate_x = per_segment_tile(gate, b, heads[None, :], segment[:, None], first_head, BY_HEAD, WIDE)
        by_gate = tl.where(keep, p * grad_p, 0.0)
        gated = tl.where(keep, p * gate_x, 0.0)
        grad_p = grad_p * gate_x
    if HAS_MASS:
        at = result[None, :] * len(segments) + segment[:, None]
        grad_p += tl.load(upstream.grad_mass + at, keep, 0.0).to(WIDE)
    return tl.where(keep, p * (grad_p + rest[None, :]), 0.0), gated, by_gate


@triton.jit
def _add_by_segment(sums, tile, segment, segments):
    """Adds the sums over each segment's keys of a tile, keys × queries, to `sums`, queries × segments."""
    offs_s = tl.arange(0, triton.next_power_of_2(len(segments)))
    for m in tl.static_range(len(segments)):
        share = tl.sum(tl.where((segment == m)[:, None], tile, 0.0), 0)
        sums += tl.where((offs_s == m)[None, :], share[:, None], 0.0)
    return sums


@triton.jit
def _store_by_segment(ptr, sums, result, in_m, segments):
    offs_s = tl.arange(0, triton.next_power_of_2(len(segments)))
    at = result[:, None] * len(segments) + offs_s[None, :]
    tl.store(ptr + at, sums, in_m[:, None] & (offs_s < len(segments))[None, :])


@triton.jit
def _store_key_grads(
    grads, x, segment, entry, ok, hk, offs, width, NEEDED: tl.constexpr, ALIGN: tl.constexpr
):  # fmt: skip
    """Gradients of keys or values, rows of `x`, to their segments' own tensors. `ok`: the keys of the tile, also those
    whose index names no row: their shares are zeros."""
    rows = grads[0].data + tl.zeros_like(entry)
    wanted = ok & (segment < 0)
    for m in tl.static_range(len(grads)):
        if NEEDED >> m & 1:
            here = ok & (segment == m)
            head = (hk - grads[m].first_head).to(tl.int64)
            rows = tl.where(here, grads[m].data + entry * grads[m].row_stride + head * width, rows)
            wanted = wanted | here
    tile = tl.multiple_of(rows, ALIGN)[:, None] + offs[None, :]
    tl.store(tile, x.to(grads[0].data.dtype.element_ty), wanted[:, None] & (offs < width)[None, :])


@triton.jit
def _clear_keys(
    segments, key_grads, value_grads, span, start, hk, offs_d, offs_v, width, value_width, KEY_NEEDS: tl.constexpr,
    VALUE_NEEDS: tl.constexpr, GRAD_ALIGN: tl.constexpr, WIDE: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Zeros for a tile of the keys that nobody sees."""
    entries, starts, counts, shifts, total = span
    cols = start + tl.arange(0, BLOCK_N)
    _, _, segment, entry, _, _ = key_tile(segments, span, cols, hk, 0, 1)
    if KEY_NEEDS:
        _store_key_grads(key_grads, tl.zeros([BLOCK_N, BLOCK_D], WIDE), segment, entry, cols < total, hk,
                         offs_d, width, KEY_NEEDS, GRAD_ALIGN)  # fmt: skip
    if VALUE_NEEDS:
        _store_key_grads(value_grads, tl.zeros([BLOCK_N, BLOCK_V], WIDE), segment, entry, cols < total, hk,
                         offs_v, value_width, VALUE_NEEDS, GRAD_ALIGN)  # fmt: skip


@triton.jit
def _finish_key(acc, k, rms, scale, width, HAS_KEY_NORM: tl.constexpr, WIDE: tl.constexpr):
    """dk from Σ_i dS_ij q̃_i: times scale, and through u = k·r, r = 1/√(mean k² + eps): r (g − u·mean(u·g))."""
    acc = acc * scale
    if HAS_KEY_NORM:
        unit = k.to(WIDE) * rms[:, None]
        acc = rms[:, None] * (acc - unit * (tl.sum(unit * acc, 1) / width)[:, None])
    return acc


@triton.jit
def _store_row_grads(
    row_grads, dq, rest, bias_sums, gate_sums, result, in_m, offs_d, width, scale, segments,
    NEED_QUERY: tl.constexpr, NEED_BIAS: tl.constexpr, NEED_GATE: tl.constexpr, NEED_REST: tl.constexpr,
):  # fmt: skip
    """What the owner of all pairs of a tile of queries knows: dq, rest (for the sink), sums of dS and P·(dO·v)."""
    if NEED_QUERY:
        at = result[:, None] * width + offs_d[None, :]
        grad = (dq * scale).to(row_grads.query.dtype.element_ty)
        tl.store(row_grads.query + at, grad, in_m[:, None] & (offs_d < width)[None, :])
    if NEED_REST:
        tl.store(row_grads.rest + result, rest, in_m)
    if NEED_BIAS:
        _store_by_segment(row_grads.bias, bias_sums, result, in_m, segments)
    if NEED_GATE:
        _store_by_segment(row_grads.gate, gate_sums, result, in_m, segments)


@triton.jit(
    do_not_specialize=[
        "queries", "segments", "bias", "gate", "key_grads", "value_grads", "batch", "work", "kv_heads", "first_head",
        "heads_here",
    ]
)  # fmt: skip
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
            b, tile = _find_sequence(starts_ptr, b, batch)
        first, n_queries = query_span(queries, b, LATENT)
        if LONG or n_queries * GROUP <= BLOCK_M:
            row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
            query = row // GROUP
            heads = hk * GROUP + row % GROUP
            in_m = query < n_queries
            first_result = first
            if LATENT:
                first_result = b.to(tl.int64) * n_queries
            result = (first_result + query) * kv_heads * GROUP + heads
            last_query = tl.minimum(((tile + 1) * BLOCK_M - 1) // GROUP, n_queries - 1)
            span = find_keys(segments, offsets_ptr, batch, b, hk, n_queries, last_query, bias, HAS_BIAS, CAUSAL,
                             GROUP, False)  # fmt: skip
            entries, starts, counts, shifts, total = span
            reference, sees = bias_reference(bias, span, b, heads, query, hk * GROUP, HAS_BIAS, BY_HEAD, WIDE)
            grad_out, rest, high, low = _load_upstream(upstream, result, in_m, sees, offs_v, value_width, reference,
                                                       segments, HAS_LSE, HAS_MASS, WIDE)  # fmt: skip
            q, unfit = load_queries(queries, first + query, heads, high != float("inf"), offs_d, width,
                                    HAS_QUERY_NORM, HAS_KEY_NORM, FIT, ALIGN, WIDE)  # fmt: skip
            factor = unfit * (scale * LOG2E)
            dq = tl.zeros([BLOCK_M, BLOCK_D], WIDE)
            bias_sums = tl.zeros([BLOCK_M, triton.next_power_of_2(len(segments))], WIDE)
            gate_sums = tl.zeros([BLOCK_M, triton.next_power_of_2(len(segments))], WIDE)
            for start in range(0, total, BLOCK_N):
                cols = start + tl.arange(0, BLOCK_N)
                k_rows, v_rows, segment, entry, ok, first_query = key_tile(segments, span, cols, hk, INDEXED, ALIGN)
                k = load_rows(k_rows, ok, offs_d, width)
                v = load_rows(v_rows, ok, offs_v, value_width)
                rms = tl.full([BLOCK_N], 1.0, WIDE)
                if HAS_KEY_NORM:
                    rms = reciprocal_rms(k, width, queries.norm_eps, WIDE)
                p, keep = _weights(q, factor, k, rms, ok, segment, first_query, bias, b, heads, query, reference, high,
                                   low, hk * GROUP, CAUSAL, HAS_BIAS, HAS_KEY_NORM, BY_HEAD, WIDE, BLOCK_M, BLOCK_N,
                                   PRECISION, UPCAST)  # fmt: skip
                ds, gated, by_gate = _grad_scores(p, keep, grad_out, v, gate, upstream, b, heads, result, segment,
                                                  rest, hk * GROUP, segments, HAS_GATE, HAS_MASS, BY_HEAD, WIDE,
                                                  BLOCK_M, BLOCK_N, PRECISION, UPCAST)  # fmt: skip
                if VALUE_NEEDS and not LONG:
                    dv = dot(gated.to(v.dtype), grad_out, tl.zeros([BLOCK_N, BLOCK_V], WIDE), PRECISION, UPCAST)
                    _store_key_grads(value_grads, dv, segment, entry, cols < total, hk, offs_v, value_width,
                                     VALUE_NEEDS, GRAD_ALIGN)  # fmt: skip
                if KEY_NEEDS and not LONG:
                    dk = dot((ds * unfit[None, :]).to(k.dtype), q, tl.zeros([BLOCK_N, BLOCK_D], WIDE), PRECISION,
                             UPCAST)  # fmt: skip
                    dk = _finish_key(dk, k, rms, scale, width, HAS_KEY_NORM, WIDE)
                    _store_key_grads(key_grads, dk, segment, entry, cols < total, hk, offs_d, width, KEY_NEEDS,
                                     GRAD_ALIGN)  # fmt: skip
                if NEED_QUERY:
                    dq = dot(tl.trans(ds * rms[:, None]).to(k.dtype), k, dq, PRECISION, UPCAST)
                if NEED_BIAS:
                    bias_sums = _add_by_segment(bias_sums, ds, segment, segments)
                if NEED_GATE:
                    gate_sums = _add_by_segment(gate_sums, by_gate, segment, segments)
            _store_row_grads(row_grads, dq, rest, bias_sums, gate_sums, result, in_m, offs_d, width, scale,
                             segments, NEED_QUERY, NEED_BIAS, NEED_GATE, NEED_REST)  # fmt: skip
            if (KEY_NEEDS or VALUE_NEEDS) and not LONG:
                unseen = find_keys(segments, offsets_ptr, batch, b, hk, n_queries, last_query, bias, HAS_BIAS, CAUSAL,
                                   GROUP, True)  # fmt: skip
                for start in range(0, unseen[4], BLOCK_N):
                    _clear_keys(segments, key_grads, value_grads, unseen, start, hk, offs_d, offs_v, width,
                                value_width, KEY_NEEDS, VALUE_NEEDS, GRAD_ALIGN, WIDE, BLOCK_N, BLOCK_D,
                                BLOCK_V)  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "queries", "segments", "bias", "gate", "key_grads", "value_grads", "batch", "kv_heads", "first_head",
        "heads_here",
    ]
)  # fmt: skip
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
        b, tile = _find_sequence(starts_ptr, item // heads_here, batch)
        first, n_queries = query_span(queries, b, LATENT)
        first_result = first
        if LATENT:
            first_result = b.to(tl.int64) * n_queries
        span = find_keys(segments, offsets_ptr, batch, b, hk, n_queries, n_queries - 1, bias, HAS_BIAS, CAUSAL, GROUP,
                         False)  # fmt: skip
        entries, starts, counts, shifts, total = span
        unseen = find_keys(segments, offsets_ptr, batch, b, hk, n_queries, n_queries - 1, bias, HAS_BIAS, CAUSAL,
                           GROUP, True)  # fmt: skip
        tiles = tl.maximum(tl.cdiv(total, BLOCK_N), 1)
        alone = total + unseen[4] <= BLOCK_N
        if tile >= tiles:
            _clear_keys(segments, key_grads, value_grads, unseen, (tile - tiles) * BLOCK_N, hk, offs_d, offs_v, width,
                        value_width, KEY_NEEDS, VALUE_NEEDS, GRAD_ALIGN, WIDE, BLOCK_N, BLOCK_D, BLOCK_V)  # fmt: skip
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
                row = start + tl.arange(0, BLOCK_M)
                query = row // GROUP
                heads = hk * GROUP + row % GROUP
                in_m = query < n_queries
                result = (first_result + query) * kv_heads * GROUP + heads
                reference, sees = bias_reference(bias, span, b, heads, query, hk * GROUP, HAS_BIAS, BY_HEAD, WIDE)
                grad_out, rest, high, low = _load_upstream(upstream, result, in_m, sees, offs_v, value_width, reference,
                                                           segments, HAS_LSE, HAS_MASS, WIDE)  # fmt: skip
                q, unfit = load_queries(queries, first + query, heads, high != float("inf"), offs_d, width,
                                        HAS_QUERY_NORM, HAS_KEY_NORM, FIT, ALIGN, WIDE)  # fmt: skip
                factor = unfit * (scale * LOG2E)
                p, keep = _weights(q, factor, k, rms, ok, segment, first_query, bias, b, heads, query, reference, high,
                                   low, hk * GROUP, CAUSAL, HAS_BIAS, HAS_KEY_NORM, BY_HEAD, WIDE, BLOCK_M, BLOCK_N,
                                   PRECISION, UPCAST)  # fmt: skip
                ds, gated, by_gate = _grad_scores(p, keep, grad_out, v, gate, upstream, b, heads, result, segment,
                                                  rest, hk * GROUP, segments, HAS_GATE, HAS_MASS, BY_HEAD, WIDE,
                                                  BLOCK_M, BLOCK_N, PRECISION, UPCAST)  # fmt: skip
                if VALUE_NEEDS:
                    dv = dot(gated.to(v.dtype), grad_out, dv, PRECISION, UPCAST)
                if KEY_NEEDS:
                    dk = dot((ds * unfit[None, :]).to(k.dtype), q, dk, PRECISION, UPCAST)
                if alone:
                    dq = tl.zeros([BLOCK_M, BLOCK_D], WIDE)
                    bias_sums = tl.zeros([BLOCK_M, triton.next_power_of_2(len(segments))], WIDE)
                    gate_sums = tl.zeros([BLOCK_M, triton.next_power_of_2(len(segments))], WIDE)
                    if NEED_QUERY:
                        dq = dot(tl.trans(ds * rms[:, None]).to(k.dtype), k, dq, PRECISION, UPCAST)
                    if NEED_BIAS:
                        bias_sums = _add_by_segment(bias_sums, ds, segment, segments)
                    if NEED_GATE:
                        gate_sums = _add_by_segment(gate_sums, by_gate, segment, segments)
                    _store_row_grads(row_grads, dq, rest, bias_sums, gate_sums, result, in_m, offs_d, width,
                                     scale, segments, NEED_QUERY, NEED_BIAS, NEED_GATE, NEED_REST)  # fmt: skip
            if VALUE_NEEDS:
                _store_key_grads(value_grads, dv, segment, entry, cols < total, hk, offs_v, value_width, VALUE_NEEDS,
                                 GRAD_ALIGN)  # fmt: skip
            if KEY_NEEDS:
                dk = _finish_key(dk, k, rms, scale, width, HAS_KEY_NORM, WIDE)
                _store_key_grads(key_grads, dk, segment, entry, cols < total, hk, offs_d, width, KEY_NEEDS,
                                 GRAD_ALIGN)  # fmt: skip
