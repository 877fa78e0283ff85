"""Cross-modal attention: what the Triton kernels of the backward share. Tiles of scores are keys × queries."""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton_common import dot
from .tiles import (
    LOG2E,
    NOTHING,
    bias_reference,
    bias_tile,
    key_tile,
    load_queries,
    per_segment_tile,
    power_of_score,
)


@triton.jit
def find_sequence(starts_ptr, item, batch):
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
def load_upstream(
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
def query_tile(
    queries, upstream, span, bias, segments, start, first, first_result, n_queries, b, hk, kv_heads, offs_d, offs_v,
    width, value_width, HAS_BIAS: tl.constexpr, HAS_LSE: tl.constexpr, HAS_MASS: tl.constexpr,
    HAS_QUERY_NORM: tl.constexpr, HAS_KEY_NORM: tl.constexpr, BY_HEAD: tl.constexpr, FIT: tl.constexpr,
    GROUP: tl.constexpr, ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """What pairs and stores need of the rows from `start` on of a sequence: `at` = query, heads, row of the result and
    whether it is there; `rows` = q, the factor that q lacks, the bias that scores are relative to, and `load_upstream`
    of them."""
    row = start + tl.arange(0, BLOCK_M)
    query = row // GROUP
    heads = hk * GROUP + row % GROUP
    in_m = query < n_queries
    result = (first_result + query) * kv_heads * GROUP + heads
    reference, sees = bias_reference(bias, span, b, heads, query, hk * GROUP, HAS_BIAS, BY_HEAD, WIDE)
    grad_out, rest, high, low = load_upstream(upstream, result, in_m, sees, offs_v, value_width, reference, segments,
                                               HAS_LSE, HAS_MASS, WIDE)  # fmt: skip
    q, unfit = load_queries(queries, first + query, heads, high != float("inf"), offs_d, width, HAS_QUERY_NORM,
                            HAS_KEY_NORM, FIT, ALIGN, WIDE)  # fmt: skip
    return (query, heads, result, in_m), (q, unfit, reference, grad_out, rest, high, low)


@triton.jit
def pair_tile(
    at, rows, k, v, rms, ok, segment, first_query, scale, bias, gate, upstream, segments, b, first_head,
    CAUSAL: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_GATE: tl.constexpr, HAS_MASS: tl.constexpr,
    HAS_KEY_NORM: tl.constexpr, BY_HEAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """dS of a tile, keys × queries; P with the gate in it, which dv takes; and P·(dO·v), whose sum is the gate's
    gradient."""
    query, heads, result, in_m = at
    q, unfit, reference, grad_out, rest, high, low = rows
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
    p = power_of_score(products, (unfit * (scale * LOG2E))[None, :], shift, UPCAST, WIDE)
    p = tl.where(keep, p * low[None, :], 0.0)
    grad_p = dot(v, tl.trans(grad_out), tl.zeros([BLOCK_N, BLOCK_M], WIDE), PRECISION, UPCAST)
    gated = p
    by_gate = p
    if HAS_GATE:
        gate_x = per_segment_tile(gate, b, heads[None, :], segment[:, None], first_head, BY_HEAD, WIDE)
        by_gate = tl.where(keep, p * grad_p, 0.0)
        gated = tl.where(keep, p * gate_x, 0.0)
        grad_p = grad_p * gate_x
    if HAS_MASS:
        place = result[None, :] * len(segments) + segment[:, None]
        grad_p += tl.load(upstream.grad_mass + place, keep, 0.0).to(WIDE)
    return tl.where(keep, p * (grad_p + rest[None, :]), 0.0), gated, by_gate


@triton.jit
def no_row_sums(
    segments, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """Zeros for dq, and for the sums over each segment of dS and of P·(dO·v), queries × segments."""
    of_segments = tl.zeros([BLOCK_M, triton.next_power_of_2(len(segments))], WIDE)
    return tl.zeros([BLOCK_M, BLOCK_D], WIDE), of_segments, of_segments


@triton.jit
def add_row_sums(
    sums, ds, by_gate, k, rms, segment, segments, NEED_QUERY: tl.constexpr, NEED_BIAS: tl.constexpr,
    NEED_GATE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    dq, bias_sums, gate_sums = sums
    if NEED_QUERY:
        dq = dot(tl.trans(ds * rms[:, None]).to(k.dtype), k, dq, PRECISION, UPCAST)
    if NEED_BIAS:
        bias_sums = add_by_segment(bias_sums, ds, segment, segments)
    if NEED_GATE:
        gate_sums = add_by_segment(gate_sums, by_gate, segment, segments)
    return dq, bias_sums, gate_sums


@triton.jit
def add_by_segment(sums, tile, segment, segments):
    """Adds the sums over each segment's keys of a tile, keys × queries, to `sums`, queries × segments."""
    offs_s = tl.arange(0, triton.next_power_of_2(len(segments)))
    for m in tl.static_range(len(segments)):
        share = tl.sum(tl.where((segment == m)[:, None], tile, 0.0), 0)
        sums += tl.where((offs_s == m)[None, :], share[:, None], 0.0)
    return sums


@triton.jit
def store_by_segment(ptr, sums, result, in_m, segments):
    offs_s = tl.arange(0, triton.next_power_of_2(len(segments)))
    at = result[:, None] * len(segments) + offs_s[None, :]
    tl.store(ptr + at, sums, in_m[:, None] & (offs_s < len(segments))[None, :])


@triton.jit
def store_key_grads(
    grads, x, segment, entry, ok, hk, first_head, offs, width, NEEDED: tl.constexpr, INDEXED: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """Gradients of keys or values, rows of `x`, to their segments' own tensors: the rows of all heads, or shares of the
    heads from `first_head` on. `ok`: the keys of the tile, also those whose index names no row: their shares are 0."""
    rows = grads[0].data + tl.zeros_like(entry)
    wanted = ok & (segment < 0)
    for m in tl.static_range(len(grads)):
        if NEEDED >> m & 1:
            here = ok & (segment == m)
            head = hk
            if INDEXED >> m & 1:
                head = hk - first_head
            rows = tl.where(here, grads[m].data + entry * grads[m].row_stride + head.to(tl.int64) * width, rows)
            wanted = wanted | here
    tile = tl.multiple_of(rows, ALIGN)[:, None] + offs[None, :]
    tl.store(tile, x.to(grads[0].data.dtype.element_ty), wanted[:, None] & (offs < width)[None, :])


@triton.jit
def clear_keys(
    segments, key_grads, value_grads, span, start, hk, first_head, offs_d, offs_v, width, value_width,
    KEY_NEEDS: tl.constexpr, VALUE_NEEDS: tl.constexpr, INDEXED: tl.constexpr, GRAD_ALIGN: tl.constexpr,
    WIDE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Zeros for a tile of the keys that nobody sees."""
    entries, starts, counts, shifts, total = span
    cols = start + tl.arange(0, BLOCK_N)
    _, _, segment, entry, _, _ = key_tile(segments, span, cols, hk, 0, 1)
    if KEY_NEEDS:
        store_key_grads(key_grads, tl.zeros([BLOCK_N, BLOCK_D], WIDE), segment, entry, cols < total, hk, first_head,
                         offs_d, width, KEY_NEEDS, INDEXED, GRAD_ALIGN)  # fmt: skip
    if VALUE_NEEDS:
        store_key_grads(value_grads, tl.zeros([BLOCK_N, BLOCK_V], WIDE), segment, entry, cols < total, hk, first_head,
                         offs_v, value_width, VALUE_NEEDS, INDEXED, GRAD_ALIGN)  # fmt: skip


@triton.jit
def finish_key(acc, k, rms, scale, width, HAS_KEY_NORM: tl.constexpr, WIDE: tl.constexpr):
    """dk from Σ_i dS_ij q̃_i: times scale, and through u = k·r, r = 1/√(mean k² + eps): r (g − u·mean(u·g))."""
    acc = acc * scale
    if HAS_KEY_NORM:
        unit = k.to(WIDE) * rms[:, None]
        acc = rms[:, None] * (acc - unit * (tl.sum(unit * acc, 1) / width)[:, None])
    return acc


@triton.jit
def store_row_grads(
    row_grads, sums, at, rest, offs_d, width, scale, segments,
    NEED_QUERY: tl.constexpr, NEED_BIAS: tl.constexpr, NEED_GATE: tl.constexpr, NEED_REST: tl.constexpr,
):  # fmt: skip
    """What the owner of all pairs of a tile of queries knows: dq, rest (for the sink), sums of dS and P·(dO·v)."""
    dq, bias_sums, gate_sums = sums
    query, heads, result, in_m = at
    if NEED_QUERY:
        place = result[:, None] * width + offs_d[None, :]
        grad = (dq * scale).to(row_grads.query.dtype.element_ty)
        tl.store(row_grads.query + place, grad, in_m[:, None] & (offs_d < width)[None, :])
    if NEED_REST:
        tl.store(row_grads.rest + result, rest, in_m)
    if NEED_BIAS:
        store_by_segment(row_grads.bias, bias_sums, result, in_m, segments)
    if NEED_GATE:
        store_by_segment(row_grads.gate, gate_sums, result, in_m, segments)
