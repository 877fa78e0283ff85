"""NF4 linear with LoRA: the mathematics, in plain torch and in any dtype. The oracle of the tests and the fallback.

W is decoded in blocks of rows, so that memory stays bounded by `_DECODED_ELEMENTS` whatever the size of the layer. The
backward is closed form and decodes W again:

    S = x aᵀ        y = x Wᵀ + s S bᵀ + bias        dS = s dy b
    dx = dy W + dS a        da = dSᵀ x        db = s dyᵀ S        dbias = Σ dy

With several adapters each is applied to all rows and its rows are selected afterwards: every product then has the shape
that it has with one adapter, which keeps the bits of mixed and of single runs equal, and nothing of another adapter's
values (a NaN, say) reaches a row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import library
from ..schemas import statistics_dtype

CODES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
NESTED_BLOCKSIZE = 256
_DECODED_ELEMENTS = 1 << 20


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Autocast stays active inside a raw op and would round the float32 products below to its own dtype."""

    @functools.wraps(function)
    def run(first: Tensor, *args: Any) -> Any:
        if not torch.is_autocast_enabled(first.device.type):
            return function(first, *args)
        with torch.autocast(first.device.type, enabled=False):
            return function(first, *args)

    return run


@functools.cache
def _pair_table(device: torch.device) -> Tensor:
    """`[256, 2]` float32: the two codes of each byte, the high nibble's first."""
    codes = torch.tensor(CODES, dtype=torch.float32, device=device)
    return torch.stack([codes.repeat_interleave(16), codes.repeat(16)], dim=1)


class _Rows(NamedTuple):
    """What decoding some rows of W takes: bytes, float32 absmax of every block, columns and block size."""

    packed: Tensor
    scales: Tensor
    columns: int
    blocksize: int

    def decode(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows [start, stop) in `dtype`: float32 product, one rounding. `start` is even, so that it begins a byte."""
        first, last = start * self.columns, stop * self.columns
        values = _pair_table(self.packed.device).index_select(0, self.packed[first // 2 : (last + 1) // 2].int())
        first_block = first // self.blocksize
        scales = self.scales[first_block : -(-last // self.blocksize), None].expand(-1, self.blocksize).reshape(-1)
        skipped = first - first_block * self.blocksize
        product = values.reshape(-1)[: last - first] * scales[skipped : skipped + last - first]
        return product.to(dtype).view(stop - start, self.columns)

    def blocks(self, rows: int) -> Iterator[tuple[int, int]]:
        """Ranges that cover [0, rows); each holds an even number of rows but the last."""
        step = max(2, _DECODED_ELEMENTS // max(self.columns, 1) // 2 * 2)
        for start in range(0, rows, step):
            yield start, min(start + step, rows)


def _scales(absmax: Tensor, nested_absmax: Tensor | None, nested_code: Tensor | None, offset: Tensor | None) -> Tensor:
    """float32 absmax of every block. Nested: one rounding after the product, one after the sum: two kernels, no FMA."""
    if nested_absmax is None or nested_code is None or offset is None:
        return absmax
    product = nested_code[absmax.long()] * nested_absmax.repeat_interleave(NESTED_BLOCKSIZE)[: absmax.shape[0]]
    return product + offset


class _Adapter(NamedTuple):
    """One adapter: its place in the stack, its scaling, and `rows [M, 1]`, True where it applies (None: everywhere)."""

    position: int
    scaling: float | Tensor
    rows: Tensor | None

    def select(self, value: Tensor, other: Tensor | float) -> Tensor:
        """`value` in the rows of this adapter, `other` elsewhere."""
        return value if self.rows is None else torch.where(self.rows, value, other)


def _may_read(adapter_ids: Tensor) -> bool:
    """Whether the ids may be looked at: on a GPU that would make the host wait."""
    return adapter_ids.device.type == "cpu" or library.check_requested()


def check_adapter_ids(adapter_ids: Tensor, count: int) -> None:
    if adapter_ids.numel() and _may_read(adapter_ids):
        low, high = (int(t) for t in adapter_ids.aminmax())
        if not -1 <= low <= high < count:
            raise ValueError(f"adapter_ids must be inside [-1, {count}), got {low} to {high}")


def _adapters(
    lora_a: Tensor | None, scaling: float, scalings: Tensor | None, adapter_ids: Tensor | None
) -> list[_Adapter]:
    if lora_a is None:
        return []
    count = lora_a.shape[0]
    if adapter_ids is None:
        return [_Adapter(0, scaling if scalings is None else scalings[0], None)]
    # Unread, every adapter of the stack is tried, and an id outside it matches none: it acts as -1.
    check_adapter_ids(adapter_ids, count)
    indices = adapter_ids.unique().tolist() if _may_read(adapter_ids) else list(range(count))
    return [
        _Adapter(e, scaling if scalings is None else scalings[e], (adapter_ids == e)[:, None])
        for e in indices
        if e >= 0
    ]


@_without_autocast
def forward(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: Tensor | None,
    out_features: int,
    blocksize: int,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
    scalings: Tensor | None,
    adapter_ids: Tensor | None,
    save_lora_x: bool,
) -> tuple[Tensor, Tensor]:
    """y `[M, N]` and S = x aᵀ `[M, r]` of each row's adapter, 0 for a row without one (`[0]` unless `save_lora_x`)."""
    dtype = statistics_dtype(x.dtype)
    wide_x = x.to(dtype)
    adapters = _adapters(lora_a, scaling, scalings, adapter_ids)
    lora_x = x.new_zeros((0,) if lora_a is None else (x.shape[0], lora_a.shape[1]), dtype=dtype)
    for adapter in adapters:
        lora_x = adapter.select(wide_x @ lora_a[adapter.position].to(dtype).T, lora_x)  # type: ignore[index]
    weight = _Rows(packed, _scales(absmax, nested_absmax, nested_code, offset), x.shape[1], blocksize)
    y = x.new_empty(x.shape[0], out_features)
    for start, stop in weight.blocks(out_features):
        part = wide_x @ weight.decode(start, stop, x.dtype).to(dtype).T
        for adapter in adapters:
            b = lora_b[adapter.position, start:stop].to(dtype)  # type: ignore[index]
            part = adapter.select(part + (lora_x * adapter.scaling) @ b.T, part)
        if bias is not None:
            part = part + bias[start:stop].to(dtype)
        y[:, start:stop] = part
    return y, lora_x if save_lora_x else lora_x.new_empty(0)


@_without_autocast
def backward(
    dy: Tensor,
    x: Tensor | None,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: Tensor | None,
    in_features: int,
    blocksize: int,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scaling: float,
    scalings: Tensor | None,
    adapter_ids: Tensor | None,
    lora_x: Tensor | None,
    need_x: bool,
    need_a: bool,
    need_b: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx `[M, K]` in dy's dtype, da and db like a and b, dbias `[N]` in the statistics dtype; `[0]` if not needed."""
    dtype = statistics_dtype(dy.dtype)
    wide_dy = dy.to(dtype)
    dx, dbias = wide_dy.new_empty(0), wide_dy.new_empty(0)
    da, db = (dy.new_empty(0) if t is None else t.new_empty(0) for t in (lora_a, lora_b))
    if need_bias:
        dbias = wide_dy.sum(0)
    if need_x:
        weight = _Rows(packed, _scales(absmax, nested_absmax, nested_code, offset), in_features, blocksize)
        dx = wide_dy.new_zeros(dy.shape[0], in_features)
        for start, stop in weight.blocks(dy.shape[1]):
            dx += wide_dy[:, start:stop] @ weight.decode(start, stop, dy.dtype).to(dtype)
    if lora_a is not None and lora_b is not None and (need_x or need_a or need_b):
        da = lora_a.new_zeros(lora_a.shape) if need_a else da
        db = lora_b.new_zeros(lora_b.shape) if need_b else db
        for adapter in _adapters(lora_a, scaling, scalings, adapter_ids):
            e = adapter.position
            if need_x or need_a:
                ds = adapter.select(wide_dy @ lora_b[e].to(dtype) * adapter.scaling, 0.0)
            if need_x:
                dx = adapter.select(dx + ds @ lora_a[e].to(dtype), dx)
            if need_a:
                da[e] = ds.T @ adapter.select(x.to(dtype), 0.0)  # type: ignore[union-attr]
            if need_b:
                scaled = adapter.select(lora_x, 0.0) * adapter.scaling  # type: ignore[arg-type]
                db[e] = adapter.select(wide_dy, 0.0).T @ scaled
    return dx.to(dy.dtype), da, db, dbias


def dequantize(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: Tensor | None,
    out_features: int,
    in_features: int,
    blocksize: int,
    dtype: str,
) -> Tensor:
    """W `[N, K]` in `dtype`, named as in torch."""
    weight = _Rows(packed, _scales(absmax, nested_absmax, nested_code, offset), in_features, blocksize)
    w = packed.new_empty(out_features, in_features, dtype=getattr(torch, dtype))
    for start, stop in weight.blocks(out_features):
        w[start:stop] = weight.decode(start, stop, w.dtype)
    return w
