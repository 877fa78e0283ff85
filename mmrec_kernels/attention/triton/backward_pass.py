"""Cross-modal attention on GPU: the launcher of the backward."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ...schemas import ATTENTION_NEEDS, statistics_dtype
from ...triton_common import FUSED, interpreted, next_power_of_two
from .. import reference
from . import backward_kernels, sum_kernels
from .prepare import MOST_WIDTH, Launch
from .sum_kernels import Outside
from .tiles import COUNT

# KV heads are taken as many at a time as this holds shares of, when gradients go through an index.
SHARE_BYTES = 2**28
# Programs that share work whose amount the host does not know, and partial sums of the norms' weights.
PROGRAMS = 1024


class Upstream(NamedTuple):
    """What the backward starts from; any pointer for what is absent."""

    grad_out: Tensor
    grad_lse: Tensor
    grad_mass: Tensor
    out: Tensor
    lse: Tensor
    mass: Tensor


class RowGrads(NamedTuple):
    """What owners of queries write, one row of each for every query and head; any pointer for what is absent."""

    query: (
        Tensor  # dq, or h in float32 (see `norm_backward_kernel`) where a norm is applied or latent queries are shared
    )
    rest: Tensor
    bias: Tensor
    gate: Tensor


class Destination(NamedTuple):
    """Where the gradients of a segment's keys or values go: its rows, or shares of entries of its index."""

    data: Tensor
    row_stride: int


class Shares(NamedTuple):
    """Shares of an indexed segment, added up in the order of the index into `rows`."""

    shares: Tensor  # [entries, heads here, width]
    rows: Tensor  # [rows, Hkv, width]
    order: Tensor
    starts: Tensor


def backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launcher of `_attention_backward`."""
    grad_out, grad_lse, grad_mass, out, lse, mass, *inputs, needs, key_needs, value_needs = arguments
    p = Launch.of(*inputs)
    if max(p.widths) > MOST_WIDTH[p.query.dtype]:
        return reference.backward(*arguments)
    results = _results(p, needs, key_needs, value_needs)
    if p.batch == 0 or p.rows == 0 or p.query.shape[1] == 0:
        return tuple(x.zero_() for x in results)  # type: ignore[return-value]
    needed = {name for bit, name in enumerate(ATTENTION_NEEDS) if needs >> bit & 1}
    dtype = statistics_dtype(p.query.dtype)
    upstream = Upstream(
        torch.zeros_like(out) if grad_out is None else grad_out.contiguous(),
        lse if grad_lse is None else grad_lse.contiguous(),
        lse if grad_mass is None else grad_mass.contiguous(), out, lse, mass,
    )  # fmt: skip
    row_grads = _row_grads(p, needed, results[0], dtype)
    _Pairs(p, upstream, row_grads, needed, grad_lse is not None, grad_mass is not None, key_needs, value_needs).launch(
        results[1], results[2]
    )
    if p.query_offsets is not None and row_grads.query is results[0] and "query" in needed:
        _clear([Outside(results[0], p.query_offsets, COUNT.value * p.rows, results[0][0].numel())], p.batch)
    grad_query, grad_query_norm, grad_key_norm = _through_norms(p, row_grads.query, results[0], needed)
    return (
        grad_query, results[1], results[2],
        _of_sequences(p, row_grads.bias, p.log_bias, "log_bias" in needed, results[3]),
        _of_sequences(p, row_grads.gate, p.value_gate, "value_gate" in needed, results[4]),
        _of_sink(p, lse, row_grads.rest) if "sink" in needed else results[5],
        grad_query_norm if "query_norm" in needed else results[6],
        grad_key_norm if "key_norm" in needed else results[7],
    )  # fmt: skip


def _results(p: Launch, needs: int, key_needs: int, value_needs: int) -> tuple[Tensor, ...]:
    """Room for the results, as the schema says."""
    nothing = p.query.new_empty(0)
    inputs = (p.query, p.log_bias, p.value_gate, p.sink, p.query_norm, p.key_norm)
    singles = [nothing if x is None or not needs >> bit & 1 else x.new_empty(x.shape) for bit, x in enumerate(inputs)]
    packed = []
    for bits, tensors in ((key_needs, p.keys), (value_needs, p.values)):
        rows = sum(x.shape[0] for m, x in enumerate(tensors) if bits >> m & 1)
        packed.append(p.query.new_empty((rows, *tensors[0].shape[1:])) if bits else nothing)
    return singles[0], *packed, *singles[1:]


def _row_grads(p: Launch, needed: set[str], grad_query: Tensor, dtype: torch.dtype) -> RowGrads:
    heads, nothing = p.query.shape[1], grad_query
    if needed & {"query", "query_norm", "key_norm"} and (
        p.latent or p.query_norm is not None or p.key_norm is not None
    ):
        # Rows outside all sequences stay zero.
        new = p.query.new_empty if p.latent else p.query.new_zeros
        grad_query = new((p.rows, heads, p.widths[0]), dtype=dtype)
    sums = [
        p.query.new_empty((p.rows, heads, len(p.keys)), dtype=dtype) if name in needed else nothing
        for name in ("log_bias", "value_gate")
    ]
    rest = p.query.new_empty((p.rows, heads), dtype=dtype) if "sink" in needed else nothing
    return RowGrads(grad_query, rest, *sums)


class _Pairs:
    """The launches of the kernels that walk pairs of queries and keys."""

    def __init__(
        self, p: Launch, upstream: Upstream, row_grads: RowGrads, needed: set[str], has_lse: bool, has_mass: bool,
        key_needs: int, value_needs: int,
    ) -> None:  # fmt: skip
        self.p, self.upstream, self.row_grads = p, upstream, row_grads
        self.needs = {"KEY_NEEDS": key_needs, "VALUE_NEEDS": value_needs}
        width, value_width = (x * p.query.element_size() for x in p.widths)
        self.flags: dict[str, Any] = {
            **p.flags, **self.needs, "HAS_LSE": has_lse, "HAS_MASS": has_mass,
            "NEED_QUERY": bool(needed & {"query", "query_norm", "key_norm"}), "NEED_BIAS": "log_bias" in needed,
            "NEED_GATE": "value_gate" in needed, "NEED_REST": "sink" in needed,
            "GRAD_ALIGN": 16 if width % 16 == value_width % 16 == 0 else p.query.element_size(),
        }  # fmt: skip
        self.rows_sizes, self.keys_sizes = p.sizes("rows"), p.sizes("keys")

    def launch(self, grad_keys: Tensor, grad_values: Tensor) -> None:
        p = self.p
        rows = self.rows_sizes["BLOCK_M"]
        most = p.query.shape[0] * p.heads[1]  # rows of a sequence and KV head
        starts = self._starts() if most > rows else None
        destinations, per_head = self._destinations(grad_keys, grad_values)
        heads = p.heads[0] if per_head == 0 else min(max(SHARE_BYTES // per_head, 1), p.heads[0])
        for first in range(0, p.heads[0], heads):
            here = min(heads, p.heads[0] - first)
            grads, shares = self._with_shares(destinations, first, here)
            if not p.latent or starts is None:
                self._rows(starts, grads, first, here, long=False)
            if starts is not None:
                self._keys(starts[0], grads, first, here)
                self._rows(starts[1], grads, first, here, long=True)
            for share in shares:
                _add_references(share, first, p.wide)
        _clear([x for group in self._outside(destinations) for x in group], p.batch)

    def _starts(self) -> tuple[Tensor, Tensor]:
        """Of the sequences with more queries than a tile holds: how many tiles of keys, and of queries, stand before
        each sequence. Those whose keys are one tile have none of queries."""
        p = self.p
        rows, batch = self.rows_sizes["BLOCK_M"], p.batch
        if p.query_offsets is None:
            lengths = p.offsets.new_full((batch,), p.query.shape[0])
        else:
            lengths = p.query_offsets.clamp(0, p.query.shape[0]).diff().clamp_min(0)
        keys = sum(p.offsets[m].clamp(0, most).diff().clamp_min(0) for m, most in enumerate(p.entries))
        long = lengths * p.heads[1] > rows
        block = self.keys_sizes["BLOCK_N"]
        key_tiles = torch.where(long, (keys + block - 1) // block + 1, 0)
        row_tiles = torch.where(long & (keys > block), (lengths * p.heads[1] + rows - 1) // rows, 0)
        starts = p.offsets.new_zeros((2, batch + 1))
        torch.cumsum(torch.stack([key_tiles, row_tiles]), 1, out=starts[:, 1:])
        return starts[0], starts[1]

    def _programs(self, heads: int) -> int:
        """Upper bounds of the tiles of long sequences, for few programs where there can be few."""
        p, (rows, keys) = self.p, (self.rows_sizes["BLOCK_M"], self.keys_sizes["BLOCK_N"])
        long = p.rows * p.heads[1] // rows + 1
        most = max(2 * long, sum(p.entries) // keys + 2 * long)
        return max(min(PROGRAMS if not interpreted() else 3, most * heads), 1)

    def _arguments(self, starts: Tensor | None, grads: Any, *sizes: int) -> tuple[Any, ...]:
        p = self.p
        return (p.queries, p.segments, p.offsets, starts, p.per_segment(p.log_bias), p.per_segment(p.value_gate),
                self.upstream, self.row_grads, *grads, p.batch, *sizes, *p.widths)  # fmt: skip

    def _rows(self, starts: Any, grads: Any, first: int, here: int, long: bool) -> None:
        work = self.p.batch * here
        grid = self._programs(here) if long else work
        arguments = self._arguments(starts if long else None, grads, work, self.p.heads[0], first, here)
        backward_kernels.rows_kernel[(grid,)](*arguments, LONG=long, **self.flags, **self.rows_sizes)

    def _keys(self, starts: Tensor, grads: Any, first: int, here: int) -> None:
        arguments = self._arguments(starts, grads, self.p.heads[0], first, here)
        backward_kernels.keys_kernel[(self._programs(here),)](*arguments, **self.flags, **self.keys_sizes)

    def _destinations(self, *grads: Tensor) -> tuple[list[list[Destination | Shares]], int]:
        """For keys and for values, where each segment's gradients go; and the bytes that the shares of one KV head
        take."""
        p, per_head = self.p, 0
        orders: dict[int, tuple[Tensor, Tensor]] = {}
        result: list[list[Destination | Shares]] = []
        for grad, bits, tensors in zip(grads, self.needs.values(), (p.keys, p.values), strict=True):
            result.append([])
            start = 0
            for m, x in enumerate(tensors):
                width = x.shape[2]
                if not bits >> m & 1:
                    result[-1].append(Destination(p.query, 0))
                    continue
                rows = grad[start : start + x.shape[0]]
                start += x.shape[0]
                if not p.indexed >> m & 1:
                    result[-1].append(Destination(rows, p.heads[0] * width))
                    continue
                per_head += p.entries[m] * width * x.element_size()
                if m not in orders:
                    orders[m] = _references(p.segments[m].index, p.offsets[m], x.shape[0])
                result[-1].append(Shares(x.new_empty(0), rows, *orders[m]))
        return result, per_head

    def _with_shares(
        self, destinations: list[list[Destination | Shares]], first: int, here: int
    ) -> tuple[tuple[tuple[Destination, ...], ...], list[Shares]]:
        """The destinations with tensors for the shares of KV heads `first` to `first + here`."""
        shares: list[Shares] = []
        grads = []
        for group in destinations:
            found = []
            for m, x in enumerate(group):
                if isinstance(x, Shares):
                    width = x.rows.shape[2]
                    x = x._replace(shares=x.rows.new_empty((self.p.entries[m], here, width)))
                    shares.append(x)
                    found.append(Destination(x.shares, here * width))
                else:
                    found.append(x)
            grads.append(tuple(found))
        return tuple(grads), shares

    def _outside(self, destinations: list[list[Destination | Shares]]) -> list[list[Outside]]:
        p = self.p
        return [
            [
                Outside(x.data, p.offsets[m], COUNT.value * x.data.shape[0], x.row_stride)
                for m, x in enumerate(group)
                if isinstance(x, Destination) and x.row_stride and x.data.numel()
            ]
            for group in destinations
        ]


def _references(index: Tensor, offsets: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The entries of an index by the row that they name, in the order of the index, and where those of each row start.
    Entries that no sequence owns, or that name no row, stand behind all rows."""
    place = torch.arange(index.shape[0], device=index.device)
    used = (place >= offsets[0]) & (place < offsets[-1]) & (index >= 0) & (index < rows)
    ordered, order = torch.where(used, index, rows).sort(stable=True)
    return order, torch.searchsorted(ordered, torch.arange(rows + 1, device=index.device))


def _add_references(x: Shares, first: int, wide: Any) -> None:
    rows, kv_heads, width = x.rows.shape
    columns = x.shares.shape[1] * width
    if x.rows.numel() == 0:
        return
    block = min(next_power_of_two(columns), 128)
    sum_kernels.reference_sums_kernel[(rows * triton.cdiv(columns, block),)](
        x.shares, x.order, x.starts, x.rows, first * width, columns, kv_heads * width, BLOCK_R=32, BLOCK_C=block,
        WIDE=wide, num_warps=4,
    )  # fmt: skip


def _clear(tensors: list[Outside], batch: int) -> None:
    if tensors:
        sum_kernels.clear_kernel[(3 if interpreted() else 128,)](tuple(tensors), batch, BLOCK=1024)


def _through_norms(p: Launch, grad: Tensor, result: Tensor, needed: set[str]) -> tuple[Tensor, Any, Any]:
    """dq and the gradients of the norms' weights, from what the owners of queries wrote."""
    if grad is result:
        return result, None, None
    if p.latent:
        grad = grad.view(p.batch, -1).sum(0).view(p.query.shape)
    if p.query_norm is None and p.key_norm is None:
        return grad.to(p.query.dtype), None, None
    rows, width = grad.shape[0] * grad.shape[1], p.widths[0]
    whole = max(next_power_of_two(width), 16)
    block = max(4096 // whole, 1)
    programs = max(min(triton.cdiv(rows, block), 3 if interpreted() else PROGRAMS), 1)
    sums = grad.new_empty((2, programs, width))
    out = p.query.new_empty(p.query.shape)
    sum_kernels.norm_backward_kernel[(programs,)](
        p.queries, grad, out, sums[0], sums[1], rows, p.query.shape[1], width,
        HAS_QUERY_NORM=p.query_norm is not None, HAS_KEY_NORM=p.key_norm is not None, BLOCK_R=block,
        BLOCK_D=whole, WIDE=p.wide, **FUSED,
    )  # fmt: skip
    norms: list[Any] = [
        None if x is None else total.to(x.dtype)
        for x, total in zip((p.query_norm, p.key_norm), sums.sum(1), strict=True)
    ]
    return out if "query" in needed else result, norms[0], norms[1]


def _of_sequences(p: Launch, rows: Tensor, x: Tensor | None, needed: bool, result: Tensor) -> Tensor:
    """Rows `[Tq, H, M]` added up over each sequence, then over what the argument was broadcast over."""
    if x is None or not needed:
        return result
    _, heads, segments = rows.shape
    if p.query_offsets is None:
        full = rows.view(p.batch, -1, heads, segments).sum(1)
    else:
        full, columns = rows.new_empty((p.batch, heads, segments)), heads * segments
        block = min(next_power_of_two(columns), 128)
        sum_kernels.row_sums_kernel[(p.batch * triton.cdiv(columns, block),)](
            rows, full, p.queries, p.batch, columns, BLOCK_R=16, BLOCK_C=block, WIDE=p.wide
        )
    return full.sum_to_size(x.shape).to(x.dtype)


def _of_sink(p: Launch, lse: Tensor, rest: Tensor) -> Tensor:
    """dsink = Σ_i exp(sink − lse_i)·rest_i."""
    assert p.sink is not None
    share = (p.sink.to(lse.dtype) - lse).exp() * rest
    return torch.where(lse == -torch.inf, 0, share).sum(0).to(p.sink.dtype)
