"""Cross-modal attention: what the Triton kernels share. Where a sequence's rows lie, and the operands of one tile.

A tile of queries holds the rows of all heads that share a KV head: row r of a sequence is query r // GROUP, head
r % GROUP. The keys of a sequence are numbered through its segments, those without a key left out, so that one loop runs
over the union of them, and one tile may hold the keys of several segments.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NOTHING = tl.constexpr(-float("inf"))
MOST = tl.constexpr(
    2.0**40
)  # finite biases and sinks beyond it, in log2 units, count as it: finfo.min keeps its digits
_NEVER = tl.constexpr(2**30)
_ALWAYS = tl.constexpr(-(2**30))  # the first query that sees a key of a segment that is not causal


# Triton specialises numbers in tuples on being 1 and on being divisible by 16, whatever a kernel asks for, and compiles
# anew for each. Counts, which differ from batch to batch, are passed times this, and so look all the same.
COUNT = tl.constexpr(16)


class Keys(NamedTuple):
    """One segment, as the kernels take it: pointers, element strides and counts (strings of types ahead of time)."""

    key: Any
    key_row_stride: Any
    key_head_stride: Any
    value: Any
    value_row_stride: Any
    value_head_stride: Any
    rows: Any  # times COUNT
    index: Any  # any pointer where the segment has none
    entries: Any  # rows, or the length of the index; times COUNT


class PerSegment(NamedTuple):
    """`log_bias` or `value_gate`, read with strides: 0 where it is broadcast."""

    data: Any
    batch_stride: Any
    head_stride: Any
    segment_stride: Any


class Queries(NamedTuple):
    """Query rows, the weights of the norms, and numbers."""

    data: Any
    row_stride: Any
    head_stride: Any
    rows: Any  # times COUNT
    offsets: Any  # None: latent queries
    query_norm: Any
    key_norm: Any
    norm_eps: Any
    scale: Any
    scale_rest: Any  # what float32 left of it, for float64


@triton.jit
def clamped(offsets_ptr, at, most):
    """Offset `at`, inside [0, most]."""
    return tl.minimum(tl.maximum(tl.load(offsets_ptr + at), 0), most)


@triton.jit
def query_span(queries, b, LATENT: tl.constexpr):
    """First row and number of rows of the queries of sequence b."""
    rows = queries.rows // COUNT
    if LATENT:
        first = tl.zeros([], tl.int64)
        count = tl.zeros([], tl.int32) + rows
    else:
        first = clamped(queries.offsets, b, rows)
        last = tl.maximum(clamped(queries.offsets, b + 1, rows), first)
        count = (last - first).to(tl.int32)
    return first, count


@triton.jit
def find_keys(
    segments, offsets_ptr, batch, b, hk, n_queries, last_query, bias, HAS_BIAS: tl.constexpr, CAUSAL: tl.constexpr,
    GROUP: tl.constexpr, UNSEEN: tl.constexpr,
):  # fmt: skip
    """The union of the keys that some query up to `last_query` of sequence b sees, KV head hk: first entry, place in
    the union and length of each segment, how far its causal diagonal is shifted, and the length of the union. With
    UNSEEN, the union of the keys of the segments that no head of hk sees."""
    entries = ()
    starts = ()
    counts = ()
    shifts = ()
    total = tl.zeros([], tl.int32)
    for m in tl.static_range(len(segments)):
        most = segments[m].entries // COUNT
        first = clamped(offsets_ptr, m * (batch + 1) + b, most)
        last = tl.maximum(clamped(offsets_ptr, m * (batch + 1) + b + 1, most), first)
        all_keys = (last - first).to(tl.int32)
        count = all_keys
        shift = tl.zeros([], tl.int32) + _ALWAYS
        if CAUSAL >> m & 1:
            shift = n_queries - all_keys
            count = tl.minimum(tl.maximum(last_query + 1 - shift, 0), all_keys)
        seen = n_queries > 0
        if HAS_BIAS:
            heads = tl.arange(0, triton.next_power_of_2(GROUP))
            place = b.to(tl.int64) * bias.batch_stride + (hk * GROUP + heads) * bias.head_stride
            of_heads = tl.load(bias.data + place + m * bias.segment_stride, heads < GROUP, NOTHING)
            seen = seen & (tl.max((of_heads != NOTHING).to(tl.int32), 0) > 0)
        if UNSEEN:
            count = tl.where(seen, 0, all_keys)
        else:
            count = tl.where(seen, count, 0)
        entries += (first,)  # type: ignore[assignment]
        starts += (total,)  # type: ignore[assignment]
        counts += (count,)  # type: ignore[assignment]
        shifts += (shift,)  # type: ignore[assignment]
        total += count
    return entries, starts, counts, shifts, total


@triton.jit
def key_tile(segments, span, cols, hk, INDEXED: tl.constexpr, ALIGN: tl.constexpr):
    """Keys `cols` of the union: pointers to their rows of key and value, their segment, their entry there, whether they
    are read, and the first query that sees them."""
    entries, starts, counts, shifts, total = span
    inside = cols < total
    ok = inside
    wide_hk = hk.to(tl.int64)  # heads may lie further apart than rows
    for m in tl.static_range(len(segments)):
        position = cols - starts[m]
        entry_m = entries[m] + position
        here = position >= 0
        row = entry_m
        ok_m = inside
        if INDEXED >> m & 1:
            row = tl.load(segments[m].index + entry_m, here & (position < counts[m]), -1)
            ok_m = (row >= 0) & (row < segments[m].rows // COUNT)
        row = row.to(tl.int64)
        k_m = segments[m].key + row * segments[m].key_row_stride + wide_hk * segments[m].key_head_stride
        v_m = segments[m].value + row * segments[m].value_row_stride + wide_hk * segments[m].value_head_stride
        if m == 0:
            k_rows = k_m
            v_rows = v_m
            entry = entry_m
            ok = ok_m
            segment = tl.zeros_like(cols)
            first_query = position + shifts[m]
        else:
            k_rows = tl.where(here, k_m, k_rows)
            v_rows = tl.where(here, v_m, v_rows)
            entry = tl.where(here, entry_m, entry)
            ok = tl.where(here, ok_m, ok)
            segment = tl.where(here, m, segment)
            first_query = tl.where(here, position + shifts[m], first_query)
    # Selected pointers would forget how they are aligned, and be loaded an element at a time.
    return tl.multiple_of(k_rows, ALIGN), tl.multiple_of(v_rows, ALIGN), segment, entry, ok & inside, first_query


@triton.jit
def load_rows(rows, ok, offs_d, width):
    """Rows by pointer, zeros where not `ok`."""
    return tl.load(rows[:, None] + offs_d[None, :], ok[:, None] & (offs_d < width)[None, :], 0.0)


@triton.jit
def scale_of(queries, WIDE: tl.constexpr):
    return tl.zeros([], WIDE) + queries.scale + queries.scale_rest


@triton.jit
def reciprocal_rms(x, width, eps, WIDE: tl.constexpr):
    """1 / √(mean x² + eps) of each row, padded by zeros."""
    wide = x.to(WIDE)
    return tl.rsqrt(tl.sum(wide * wide, 1) / width + eps)


@triton.jit
def load_queries(
    queries, rows, heads, ok, offs_d, width, HAS_QUERY_NORM: tl.constexpr, HAS_KEY_NORM: tl.constexpr,
    FIT: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Query rows as they are multiplied with raw keys, both norms' weights in them, and the factor that their products
    take. FIT (float16): rows are brought near 1 by a power of two, which that factor undoes."""
    start = queries.data + rows * queries.row_stride + heads.to(tl.int64) * queries.head_stride
    q = load_rows(tl.multiple_of(start, ALIGN), ok, offs_d, width)
    factor = tl.full([rows.shape[0]], 1.0, WIDE)
    if HAS_QUERY_NORM or HAS_KEY_NORM:
        x = q.to(WIDE)
        if HAS_QUERY_NORM:
            x = x * reciprocal_rms(q, width, queries.norm_eps, WIDE)[:, None]
            x = x * tl.load(queries.query_norm + offs_d, offs_d < width, 0.0).to(WIDE)[None, :]
        if HAS_KEY_NORM:
            x = x * tl.load(queries.key_norm + offs_d, offs_d < width, 0.0).to(WIDE)[None, :]
        if FIT:
            top = tl.max(tl.abs(x), 1)
            exponent = tl.floor(tl.log2(tl.where((top > 1e-30) & (top < 1e30), top, 1.0)))
            x = x * tl.exp2(-exponent)[:, None]
            factor = tl.exp2(exponent)
        q = x.to(q.dtype)
    return q, factor


@triton.jit
def bounded(x):
    """A bias or sink in log2 units, inside ±MOST; −inf stays what it is."""
    y = x * LOG2E
    y = tl.where(y > MOST, MOST, tl.where(y < -MOST, -MOST, y))
    return tl.where(x == NOTHING, NOTHING, y)


@triton.jit
def bias_tile(bias, b, heads, segment, first_head, BY_HEAD: tl.constexpr, WIDE: tl.constexpr):
    """log2 units, −inf kept; `heads` and `segment` expanded against each other, `heads` unused unless BY_HEAD."""
    return bounded(per_segment_tile(bias, b, heads, segment, first_head, BY_HEAD, WIDE))


@triton.jit
def per_segment_tile(x, b, heads, segment, first_head, BY_HEAD: tl.constexpr, WIDE: tl.constexpr):
    """Entries of log_bias or value_gate."""
    place = b.to(tl.int64) * x.batch_stride + segment * x.segment_stride
    if BY_HEAD:
        place = place + heads * x.head_stride
    else:
        place = place + first_head * x.head_stride
    return tl.load(x.data + place).to(WIDE)


@triton.jit
def bias_reference(
    bias, span, b, heads, query, first_head, HAS_BIAS: tl.constexpr, BY_HEAD: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """The highest bias that each row meets, which its scores are relative to, and whether it meets any key."""
    entries, starts, counts, shifts, total = span
    reference = tl.full([query.shape[0]], NOTHING, WIDE)
    sees = query < -1
    for m in tl.static_range(len(counts)):
        meets = query >= tl.where(counts[m] > 0, shifts[m], _NEVER)
        if HAS_BIAS:
            x = bias_tile(bias, b, heads, tl.zeros_like(query) + m, first_head, BY_HEAD, WIDE)
            meets = meets & (x != NOTHING)
            reference = tl.where(meets & (x > reference), x, reference)
        sees = sees | meets
    return tl.where(reference == NOTHING, 0.0, reference), sees


@triton.jit
def power_of_score(products, factor, shift, UPCAST: tl.constexpr, WIDE: tl.constexpr):
    """2^(products·factor + shift), the exponent rounded once: against the highest score of its row, products of
    thousands keep the digits of their difference. The interpreter would round the product too."""
    if UPCAST:
        return tl.exp2((products.to(tl.float64) * factor + shift).to(WIDE))
    return tl.exp2(tl.fma(products, factor, shift))
