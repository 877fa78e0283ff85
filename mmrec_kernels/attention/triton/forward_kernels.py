"""Cross-modal attention: the Triton kernels of the forward.

out_i = Σ_m gate_m Σ_{j∈m} P_ij v_j with one softmax over the union of a query's segments. A program owns a tile of
query rows of one sequence and KV head and walks the union of the sequence's keys, read by pointer from where they lie,
with a running maximum, sum and output: 4·D flops for each query and key; q, k, v are read once for each tile of queries
and out, lse, mass written once. Which tile belongs to which sequence stands in a table that a kernel fills from the
offsets on the device, so that nobody waits to learn a length. Kept for the backward: out, lse (float64), mass.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton_common import dot
from .tiles import (
    COUNT,
    LN2,
    LOG2E,
    MOST,
    NOTHING,
    bias_reference,
    bias_tile,
    bounded,
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
def first_row(offsets_ptr, at, batch, rows):
    """Where sequence `at` begins, of batch + 2 with the rows before and after all sequences as the first and the last;
    `at` up to batch + 2."""
    first = tl.load(offsets_ptr + at - 1, (at >= 1) & (at <= batch + 1), 0)
    return tl.where(at > batch + 1, rows, tl.minimum(tl.maximum(first, 0), rows))


@triton.jit
def first_slot(offsets_ptr, at, batch, rows, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """Its first slot: ⌊first row / BLOCK_M⌋ + at leaves enough for every sequence, and needs no sum over lengths."""
    return first_row(offsets_ptr, at, batch, rows) * GROUP // BLOCK_M + at


@triton.jit(do_not_specialize=["slots", "batch", "rows", "steps"])
def table_kernel(
    table_ptr, offsets_ptr, slots, batch, rows, steps, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr
):
    """The sequence of each slot, by bisection."""
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    low = tl.zeros([BLOCK], tl.int64)
    high = tl.zeros([BLOCK], tl.int64) + batch + 2
    for _ in range(steps):
        middle = (low + high) // 2
        below = first_slot(offsets_ptr, middle, batch, rows, GROUP, BLOCK_M) <= slot
        low = tl.where(below, middle, low)
        high = tl.where(below, high, middle)
    tl.store(table_ptr + slot, low.to(tl.int32), slot < slots)


@triton.jit(do_not_specialize=["batch", "tiles", "kv_heads"])
def forward_kernel(
    queries, segments, offsets_ptr, table_ptr, bias, gate, sink_ptr, out_ptr, lse_ptr, mass_ptr, batch, tiles,
    kv_heads, width, value_width,
    LATENT: tl.constexpr, INDEXED: tl.constexpr, CAUSAL: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_GATE: tl.constexpr,
    HAS_SINK: tl.constexpr, HAS_QUERY_NORM: tl.constexpr, HAS_KEY_NORM: tl.constexpr, BY_HEAD: tl.constexpr,
    RETURN_MASS: tl.constexpr, FIT: tl.constexpr, GROUP: tl.constexpr, ALIGN: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One tile of queries. `tiles`: of each sequence, for latent queries."""
    slot = tl.program_id(0) // kv_heads
    hk = tl.program_id(0) % kv_heads
    if LATENT:
        b = slot // tiles
        tile = slot % tiles
        inside = True
        first, n_queries = query_span(queries, b, LATENT)
        first_result = b.to(tl.int64) * n_queries
    else:
        sequence = tl.load(table_ptr + slot)
        rows = queries.rows // COUNT
        tile = slot - first_slot(queries.offsets, sequence, batch, rows, GROUP, BLOCK_M)
        inside = (sequence >= 1) & (sequence <= batch)
        first = first_row(queries.offsets, sequence, batch, rows)
        last = first_row(queries.offsets, sequence + 1, batch, rows)
        n_queries = (tl.maximum(last, first) - first).to(tl.int32)
        first_result = first
        b = tl.minimum(tl.maximum(sequence - 1, 0), batch - 1)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    query = (row // GROUP).to(tl.int32)
    heads = hk * GROUP + row % GROUP
    in_m = query < n_queries
    result = (first_result + query) * kv_heads * GROUP + heads
    # Rows that no sequence owns meet no keys, as if their sequence had none.
    met = tl.where(inside, n_queries, 0)
    last_query = tl.minimum(((tile + 1) * BLOCK_M - 1) // GROUP, n_queries - 1).to(tl.int32)
    span = find_keys(segments, offsets_ptr, batch, b, hk, met, last_query, bias, HAS_BIAS, CAUSAL, GROUP, False)
    entries, starts, counts, shifts, total = span

    offs_d = tl.arange(0, BLOCK_D)
    offs_v = tl.arange(0, BLOCK_V)
    read_m = query < tl.where(total > 0, n_queries, 0)
    q, factor = load_queries(queries, first + query, heads, read_m, offs_d, width, HAS_QUERY_NORM,
                             HAS_KEY_NORM, FIT, ALIGN, WIDE)  # fmt: skip
    factor = factor * (scale_of(queries, WIDE) * LOG2E)
    top = tl.full([BLOCK_M], NOTHING, WIDE)
    weight = tl.zeros([BLOCK_M], WIDE)
    reference = tl.zeros([BLOCK_M], WIDE)
    if HAS_BIAS:
        reference, sees = bias_reference(bias, span, b, heads, query, hk * GROUP, HAS_BIAS, BY_HEAD, WIDE)
    if HAS_SINK:
        sink = tl.load(sink_ptr + heads).to(WIDE)
        alone = tl.where(inside, bounded(sink) - reference, NOTHING)
        top = alone
        weight = tl.where(alone == NOTHING, 0.0, 1.0).to(WIDE)
    acc = tl.zeros([BLOCK_M, BLOCK_V], WIDE)
    if RETURN_MASS:
        offs_s = tl.arange(0, triton.next_power_of_2(len(segments)))
        mass = tl.zeros([BLOCK_M, triton.next_power_of_2(len(segments))], WIDE)
    for start in range(0, total, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        k_rows, v_rows, segment, entry, ok, first_query = key_tile(segments, span, cols, hk, INDEXED, ALIGN)
        k = load_rows(k_rows, ok, offs_d, width)
        products = dot(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], WIDE), PRECISION, UPCAST)
        if HAS_KEY_NORM:
            products = products * reciprocal_rms(k, width, queries.norm_eps, WIDE)[None, :]
        scores = products * factor[:, None]
        shift = tl.zeros_like(scores)
        keep = ok[None, :]
        if CAUSAL:
            keep = keep & (first_query[None, :] <= query[:, None])
        if HAS_BIAS:
            bias_x = bias_tile(bias, b, heads[:, None], segment[None, :], hk * GROUP, BY_HEAD, WIDE)
            keep = keep & (bias_x != NOTHING)
            shift += bias_x - reference[:, None]
            scores += shift
        highest = tl.maximum(top, tl.max(tl.where(keep, scores, NOTHING), 1))
        safe = tl.where(highest == NOTHING, 0.0, highest)
        shrink = tl.exp2(top - safe)
        p = power_of_score(products, factor[:, None], shift - safe[:, None], UPCAST, WIDE)
        p = tl.where(keep, p, 0.0)
        weight = weight * shrink + tl.sum(p, 1)
        top = highest
        if RETURN_MASS:
            mass = mass * shrink[:, None]
            for m in tl.static_range(len(segments)):
                share = tl.sum(tl.where((segment == m)[None, :], p, 0.0), 1)
                mass += tl.where((offs_s == m)[None, :], share[:, None], 0.0)
        if HAS_GATE:
            gate_x = per_segment_tile(gate, b, heads[:, None], segment[None, :], hk * GROUP, BY_HEAD, WIDE)
            p = tl.where(p == 0, 0.0, p * gate_x)  # the gate of a segment that is not met may be NaN
        v = load_rows(v_rows, ok, offs_v, value_width)
        acc = dot(p.to(v.dtype), v, acc * shrink[:, None], PRECISION, UPCAST)

    empty = weight == 0
    divisor = tl.where(empty, 1.0, weight)
    acc = acc / divisor[:, None]
    at = result[:, None] * value_width + offs_v[None, :]
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), in_m[:, None] & (offs_v < value_width)[None, :])
    log_sum = (top.to(tl.float64) + reference.to(tl.float64) + tl.log2(divisor.to(tl.float64))) * LN2
    if HAS_SINK:  # alone, it is what comes out
        is_whole = tl.abs(bounded(sink)) < MOST
        log_sum = tl.where((weight == 1) & (top == alone) & is_whole, sink.to(tl.float64), log_sum)
    tl.store(lse_ptr + result, tl.where(empty, NOTHING, log_sum), in_m)
    if RETURN_MASS:
        at = result[:, None] * len(segments) + offs_s[None, :]
        mass = tl.where(mass == 0, 0.0, mass / divisor[:, None])  # of a segment not met, beside a NaN in another
        tl.store(mass_ptr + at, mass, in_m[:, None] & (offs_s < len(segments))[None, :])
