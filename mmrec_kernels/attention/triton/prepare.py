"""Cross-modal attention on GPU: sizes of tiles, and the arguments of both ops in the form of the kernels."""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ...triton_common import FUSED, interpreted, next_power_of_two, precision
from ..arguments import Arguments, check_contents
from .tiles import COUNT, Keys, PerSegment, Queries

# Heads wider than this the reference serves.
MOST_WIDTH = {torch.float32: 128, torch.float64: 256, torch.bfloat16: 256, torch.float16: 256}
# By the width of heads: the most rows of queries and of keys in a tile, and warps; chosen not to spill, measured on no
# GPU.
_LARGEST: dict[str, dict[bool, dict[int, tuple[int, int, int]]]] = {
    "forward": {
        False: {64: (64, 64, 4), 128: (64, 64, 8), 256: (32, 32, 4)},
        True: {64: (32, 32, 4), 128: (16, 16, 4), 256: (16, 16, 8)},
    },
    "rows": {
        False: {64: (64, 64, 8), 128: (32, 32, 8), 256: (16, 16, 8)},
        True: {32: (32, 32, 8), 128: (16, 16, 8), 256: (16, 16, 8)},
    },
    "keys": {
        False: {32: (32, 64, 8), 64: (64, 32, 8), 128: (32, 32, 8), 256: (16, 16, 8)},
        True: {32: (32, 32, 8), 128: (16, 16, 8), 256: (16, 16, 8)},
    },
}


def _float32(x: float) -> float:
    return struct.unpack("f", struct.pack("f", x))[0]


def block_sizes(kernel: str, rows: float, keys: float, width: int, value_width: int, dtype: torch.dtype,
                equal: bool = True) -> dict[str, int]:  # fmt: skip
    """Sizes of the tiles of `forward`, `rows` or `keys`, by shape and dtype alone. `rows` and `keys`: how many rows of
    queries a KV head of a sequence has, and keys, on average; `equal`: as if every sequence had as many queries."""
    whole, whole_value = (max(next_power_of_two(x), 16) for x in (width, value_width))
    by_width = _LARGEST[kernel][dtype in (torch.float32, torch.float64)]
    m, n, warps = by_width[min(w for w in by_width if w >= max(whole, whole_value))]
    if kernel != "keys":
        m = min(max(next_power_of_two(int(rows if equal else 2 * rows)), 16), m)
        n = min(max(next_power_of_two(int(keys)), 16), n)
        if kernel == "rows" and m == 64:
            n = min(n, 32)
        if dtype not in (torch.float32, torch.float64) and m == 16:
            warps = 4 if max(whole, whole_value) <= (128 if n == 16 else 64) else warps
    return {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_D": whole, "BLOCK_V": whole_value, "num_warps": warps, "num_stages": 2}


@dataclass(frozen=True)
class Launch(Arguments):
    """The arguments of the ops as the kernels take them. Sizes are shapes; offsets stay where they are."""

    @classmethod
    def of(cls, *arguments: Any) -> Launch:
        launch = cls(*arguments)
        check_contents(launch)
        vectors = ("offsets", "query_offsets", "sink", "query_norm", "key_norm")
        values = {name: getattr(launch, name) for name in vectors}
        return replace(launch, **{name: x.contiguous() for name, x in values.items() if x is not None})

    @cached_property
    def batch(self) -> int:
        return self.offsets.shape[1] - 1

    @property
    def latent(self) -> bool:
        return self.query_offsets is None

    @property
    def rows(self) -> int:
        """Rows of the result."""
        return self.query.shape[0] * (self.batch if self.latent else 1)

    @property
    def widths(self) -> tuple[int, int]:
        return self.query.shape[2], self.values[0].shape[2]

    @cached_property
    def tensors(self) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Query, keys and values whose rows lie whole."""

        def whole(x: Tensor) -> Tensor:
            return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()

        return whole(self.query), [whole(x) for x in self.keys], [whole(x) for x in self.values]

    @property
    def queries(self) -> Queries:
        query = self.tensors[0]
        scale = _float32(self.scale)
        rows = COUNT.value * query.shape[0]
        return Queries(query, query.stride(0), query.stride(1), rows, self.query_offsets, self.query_norm,
                       self.key_norm, self.norm_eps, scale, self.scale - scale)  # fmt: skip

    @cached_property
    def segments(self) -> tuple[Keys, ...]:
        _, keys, values = self.tensors
        index, result = iter(self.index), []
        for m, (key, value) in enumerate(zip(keys, values, strict=True)):
            chosen = next(index).contiguous() if self.indexed >> m & 1 else None
            entries = key.shape[0] if chosen is None else chosen.shape[0]
            pointer = self.offsets if chosen is None else chosen
            result.append(Keys(key, key.stride(0), key.stride(1), value, value.stride(0), value.stride(1),
                               COUNT.value * key.shape[0], pointer, COUNT.value * entries))  # fmt: skip
        return tuple(result)

    @property
    def wide(self) -> Any:
        """The type of sums."""
        return tl.float64 if self.dtype == torch.float64 else tl.float32

    @cached_property
    def entries(self) -> list[int]:
        """Of each segment, its rows or the length of its index."""
        return [x.entries // COUNT.value for x in self.segments]

    def per_segment(self, x: Tensor | None) -> PerSegment:
        if x is None:
            return PerSegment(self.query, 0, 0, 0)
        strides = [0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True)]
        return PerSegment(x, *strides)

    @property
    def shape(self) -> tuple[float, float]:
        """Rows of queries that a KV head of a sequence has, and keys, on average."""
        queries = self.query.shape[0] / (1 if self.latent else max(self.batch, 1))
        return queries * self.heads[1], sum(self.entries) / max(self.batch, 1)

    @property
    def equal(self) -> bool:
        """Whether all sequences may have as many queries, by the numbers of rows and sequences."""
        return self.latent or self.query.shape[0] % max(self.batch, 1) == 0

    def sizes(self, kernel: str) -> dict[str, int]:
        sizes = block_sizes(kernel, *self.shape, *self.widths, self.query.dtype, self.equal)
        if interpreted():  # tiles small enough that small tests have several, and of another size in each kernel
            m, n = {"forward": (32, 16), "rows": (16, 16), "keys": (16, 32)}[kernel]
            sizes = {**sizes, "BLOCK_M": m, "BLOCK_N": n}
        return {**sizes, **FUSED}

    @cached_property
    def flags(self) -> dict[str, bool | int | str]:
        norms = self.query_norm is not None or self.key_norm is not None
        by_head = self.heads[1] > 1 and any(x is not None and x.shape[1] > 1 for x in (self.log_bias, self.value_gate))
        query, keys, values = self.tensors
        aligned = all(
            x.data_ptr() % 16 == 0 and all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:2])
            for x in (query, *keys, *values)
        )
        return {
            "LATENT": self.latent, "INDEXED": self.indexed, "CAUSAL": self.causal,
            "HAS_BIAS": self.log_bias is not None, "HAS_GATE": self.value_gate is not None,
            "HAS_QUERY_NORM": self.query_norm is not None, "HAS_KEY_NORM": self.key_norm is not None,
            "BY_HEAD": by_head, "FIT": norms and query.dtype == torch.float16, "GROUP": self.heads[1],
            "ALIGN": 16 if aligned else query.element_size(), "PRECISION": precision(query.dtype),
            "UPCAST": interpreted() and query.dtype != torch.float64, "WIDE": self.wide,
        }  # fmt: skip
