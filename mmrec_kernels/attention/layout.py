"""The reference's layout: ragged rows padded by index to the longest of the batch (a plain reshape where all are
equally long), and what a query row may meet. Padding and rows that nobody meets become zeros before any product.

Axes: b sequence, h KV head, g query head of that KV head, q query, k key, d width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from operator import or_
from typing import NamedTuple

import torch
from torch import Tensor

from .arguments import Arguments, check_located, checks_contents


class Rows(NamedTuple):
    """Where the B sequences lie in a `[T, …]` tensor: rows `start:stop`, as they lie or through an index."""

    total: int
    start: int
    stop: int
    longest: int
    lengths: Tensor
    rows: Tensor | None = None  # [B, longest]; None: equal lengths, no index
    valid: Tensor | None = None  # [B, longest]; None: all


def locate(name: str, offsets: Tensor, total: int, index: Tensor | None = None) -> Rows:
    """Pad the sequences of `offsets` by index. Contents are checked on CPU; elsewhere offsets are clamped and an index
    that is out of range acts as −1."""
    entries = total if index is None else index.shape[0]
    if checks_contents(offsets.device):
        check_located(name, offsets, total, index)
    else:
        offsets = offsets.clamp(0, entries).cummax(0).values
    lengths = offsets.diff()
    if lengths.shape[0] == 0:
        return Rows(total, int(offsets[0]), int(offsets[-1]), 0, lengths)
    bounds = torch.stack([offsets[0], offsets[-1], lengths.min(), lengths.max()])
    start, stop, shortest, longest = bounds.tolist()
    if index is None and shortest == longest:
        return Rows(total, start, stop, longest, lengths)
    steps = torch.arange(longest, device=offsets.device)
    valid = steps < lengths[:, None]
    rows = (offsets[:-1, None] + steps).clamp(max=max(entries - 1, 0))
    if index is not None:
        rows = index[rows] if entries else rows
        valid &= (rows >= 0) & (rows < total)
        rows = rows.clamp(0, max(total - 1, 0))
    if total == 0:
        longest, rows, valid = 0, rows[:, :0], valid[:, :0]
    return Rows(total, start, stop, longest, lengths, rows, None if bool(valid.all()) else valid)


def pad(x: Tensor, at: Rows, dtype: torch.dtype) -> Tensor:
    """`[T, …]` to `[B, longest, …]`; padding holds the contents of some row."""
    shape = (at.lengths.shape[0], at.longest, *x.shape[1:])
    if at.rows is None:
        return x[at.start : at.stop].reshape(shape).to(dtype)
    return x.index_select(0, at.rows.flatten()).view(shape).to(dtype)


def unpad(x: Tensor, at: Rows, dtype: torch.dtype, fill: float = 0.0) -> Tensor:
    """The inverse of `pad` where each row is referenced once; rows outside the sequences get `fill`."""
    flat = x.flatten(0, 1)
    if at.valid is not None:
        flat = flat.index_select(0, at.valid.flatten().nonzero().squeeze(1))
    if at.start == 0 and at.stop == at.total:
        return flat.to(dtype).contiguous()
    result = flat.new_full((at.total, *flat.shape[1:]), fill, dtype=dtype)
    result[at.start : at.stop] = flat.to(dtype)
    return result


def scatter(x: Tensor, at: Rows, dtype: torch.dtype) -> Tensor:
    """The adjoint of `pad` through an index: references to one row are added in the order of the index."""
    if at.rows is None:
        return x.new_zeros((at.total, *x.shape[2:]), dtype=dtype)
    flat, rows = x.flatten(0, 1), at.rows.flatten()
    if at.valid is not None:
        kept = at.valid.flatten().nonzero().squeeze(1)
        flat, rows = flat.index_select(0, kept), rows.index_select(0, kept)
    result = flat.new_zeros((at.total, *flat.shape[1:]))
    if x.device.type == "cpu":
        result.index_add_(0, rows, flat)
    else:
        result.index_put_((rows,), flat, accumulate=True)  # sorts by row on CUDA, where index_add_ is atomic
    return result.to(dtype)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    if weight is None:
        return x
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight.to(x.dtype)


def rms_norm_backward(x: Tensor, weight: Tensor | None, eps: float, grad: Tensor) -> tuple[Tensor, Tensor | None]:
    """With u = x·r, r = 1/√(mean x² + eps): dx = r (w·dy − u·mean(u·w·dy)), dw = Σ dy·u."""
    if weight is None:
        return grad, None
    rstd = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    unit, inner = x * rstd, grad * weight.to(x.dtype)
    dx = rstd * (inner - unit * (unit * inner).mean(-1, keepdim=True))
    return dx, (grad * unit).sum(tuple(range(grad.ndim - 1)))


class Masks(NamedTuple):
    """Which pairs of one segment do not meet; None where no pair is concerned."""

    hidden: Tensor | None  # [B, h, g, q, k], broadcast: query row and key do not meet
    blind: Tensor | None  # [B, q, h, g, 1], broadcast: a query row that meets no key
    unread: Tensor | None  # [B, k, h, 1], broadcast: a key that meets no query row


def _masks(queries: Rows, keys: Rows, causal: bool, bias: Tensor | None) -> Masks:
    hidden, blind, unread = [], [], []
    first = torch.zeros_like(keys.lengths)
    if keys.valid is not None:
        some = keys.valid.any(1)
        first = torch.where(some, keys.valid.to(torch.int8).argmax(1), keys.longest)
        hidden.append(~keys.valid[:, None, None, None])
        blind.append(~some[:, None, None, None])
        unread.append(~keys.valid[..., None])
    if queries.valid is not None:
        hidden.append(~queries.valid[:, None, None, :, None])
        blind.append(~queries.valid[..., None, None])
        unread.append((queries.lengths == 0)[:, None, None])
    if causal:
        last = torch.arange(queries.longest, device=first.device) + (keys.lengths - queries.lengths)[:, None]
        if keys.rows is None and queries.rows is None:
            last, first = last[:1], first[:1]
        hidden.append((torch.arange(keys.longest, device=first.device) > last[..., None])[:, None, None])
        blind.append((last < first[:, None])[..., None, None])
    if bias is not None:
        absent = bias == -torch.inf
        hidden.append(absent[..., None, None])
        blind.append(absent[:, None])
        unread.append(absent.all(2)[:, None])
    merged = [reduce(or_, parts) if parts else None for parts in (hidden, blind, unread)]
    return Masks(merged[0], *(None if x is None else x[..., None] for x in merged[1:]))


def _per_segment(x: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> Sequence[Tensor | None]:
    """`log_bias` or `value_gate` as one `[B, h, g]` tensor per segment."""
    if x is None:
        return [None] * shape[-1]
    batch, kv_heads, group, count = shape
    return x.to(dtype).expand(batch, kv_heads * group, count).reshape(shape).unbind(-1)


def _scores(query: Tensor, key: Tensor, bias: Tensor | None) -> Tensor:
    if query.shape[0] == 1:  # latent queries: the product would repeat a batch of one B times
        scores = torch.einsum("qhgd,bkhd->bhgqk", query[0], key)
    else:
        scores = torch.einsum("bqhgd,bkhd->bhgqk", query, key)
    return scores if bias is None else scores.add_(bias[..., None, None])


def fill(x: Tensor, mask: Tensor | None, value: float = 0.0) -> Tensor:
    """`x` with `value` where `mask`, in place."""
    return x if mask is None else x.masked_fill_(mask, value)


class Segment(NamedTuple):
    """One modality, padded: what every query row of a sequence may meet."""

    at: Rows
    raw_key: Tensor  # [B, k, h, d]
    key: Tensor  # the same after key_norm
    value: Tensor
    gate: Tensor | None  # [B, h, g]
    hidden: Tensor | None
    blind: Tensor | None
    scores: Tensor  # [B, h, g, q, k], also where hidden


class Problem(Arguments):
    """The arguments, padded."""

    def queries(self) -> tuple[Rows, Tensor]:
        """Where the rows of the result lie, and the queries `[B, q, h, g, d]`; `[1, q, h, g, d]` for latent ones."""
        if self.query_offsets is not None:
            at = locate("query_", self.query_offsets, self.query.shape[0])
            return at, pad(self.query, at, self.dtype).unflatten(2, self.heads)
        batch, length = self.offsets.shape[1] - 1, self.query.shape[0]
        lengths = self.offsets.new_full((batch,), length)
        at = Rows(batch * length, 0, batch * length, length, lengths)
        return at, self.query.to(self.dtype).unflatten(1, self.heads)[None]

    def segments(self, queries: Rows, query: Tensor) -> Iterator[Segment | None]:
        """Each segment against the scaled and normalised `query`; None where it has no key at all."""
        shape = (self.offsets.shape[1] - 1, *self.heads, len(self.keys))
        bias, gate = (_per_segment(x, shape, self.dtype) for x in (self.log_bias, self.value_gate))
        index = iter(self.index)
        for m, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
            chosen = next(index) if self.indexed >> m & 1 else None
            at = locate(f"segments[{m}].", self.offsets[m], key.shape[0], chosen)
            if at.longest == 0:
                yield None
                continue
            hidden, blind, unread = _masks(queries, at, bool(self.causal >> m & 1), bias[m])
            raw_key, value = pad(key, at, self.dtype), pad(value, at, self.dtype)
            if unread is not None:
                raw_key, value = raw_key.masked_fill(unread, 0), value.masked_fill(unread, 0)
            normed = rms_norm(raw_key, self.key_norm, self.norm_eps)
            scores = _scores(query, normed, bias[m])
            yield Segment(at, raw_key, normed, value, gate[m], hidden, blind, scores)
