"""`Encoded`: the embeddings of n items, one vector each or a jagged run of token vectors each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Encoded:
    """Embeddings of n items, either pooled or token by token.

    Attributes:
        pooled: `[n, d]`, one vector per item, or None.
        values: `[sum_len, d]`, the token vectors of all items one after another, or None.
        offsets: int64 `[n + 1]`; item i owns `values[offsets[i]:offsets[i + 1]]` (the layout that
            `cross_modal_attention` segments take), or None.

    Raises ValueError if neither or both forms are given, or if the offsets do not describe `values`.
    """

    pooled: Tensor | None = None
    values: Tensor | None = None
    offsets: Tensor | None = None

    def __post_init__(self) -> None:
        if (self.pooled is None) == (self.values is None):
            raise ValueError("Encoded: give pooled, or values with offsets, not both and not neither")
        if self.pooled is not None:
            if self.offsets is not None or self.pooled.ndim != 2:
                raise ValueError(f"Encoded: pooled must be [n, d] without offsets, got {tuple(self.pooled.shape)}")
            return
        if self.values is None or self.offsets is None:
            raise ValueError("Encoded: values need offsets")
        if self.values.ndim != 2:
            raise ValueError(f"Encoded: values must be [sum_len, d], got {tuple(self.values.shape)}")
        off = self.offsets
        if off.ndim != 1 or off.numel() < 1 or off.dtype != torch.int64:
            raise ValueError(f"Encoded: offsets must be int64 [n + 1], got {off.dtype} {tuple(off.shape)}")
        if int(off[0]) != 0 or int(off[-1]) != self.values.shape[0] or bool((off[1:] < off[:-1]).any()):
            raise ValueError("Encoded: offsets must rise from 0 to the number of rows of values")

    def __len__(self) -> int:
        if self.pooled is not None:
            return self.pooled.shape[0]
        assert self.offsets is not None
        return self.offsets.numel() - 1

    @property
    def dim(self) -> int:
        """Width d of the vectors."""
        return self._data.shape[1]

    @property
    def _data(self) -> Tensor:
        data = self.pooled if self.pooled is not None else self.values
        assert data is not None
        return data

    def item(self, i: int) -> Tensor:
        """The vectors of item i: `[d]` if pooled, `[len_i, d]` otherwise."""
        if self.pooled is not None:
            return self.pooled[i]
        assert self.values is not None and self.offsets is not None
        if not -len(self) <= i < len(self):
            raise IndexError(f"item {i} of {len(self)}")
        i %= len(self)
        return self.values[int(self.offsets[i]) : int(self.offsets[i + 1])]

    def select(self, index: Tensor) -> Encoded:
        """The items at `index` (int64 `[m]`, any order, repeats allowed), differentiable in the vectors."""
        if self.pooled is not None:
            return Encoded(pooled=self.pooled.index_select(0, index.to(self.pooled.device)))
        assert self.values is not None and self.offsets is not None
        offsets = self.offsets
        index = index.to(offsets.device)
        lengths = (offsets[1:] - offsets[:-1]).index_select(0, index)
        new_offsets = offsets.new_zeros(lengths.numel() + 1)
        torch.cumsum(lengths, 0, out=new_offsets[1:])
        within = torch.arange(int(new_offsets[-1]), device=offsets.device)
        rows = within + (offsets[:-1].index_select(0, index) - new_offsets[:-1]).repeat_interleave(lengths)
        return Encoded(values=self.values.index_select(0, rows.to(self.values.device)), offsets=new_offsets)

    def to(self, *args: object, **kwargs: object) -> Encoded:
        """`Tensor.to` on the vectors; the offsets follow to the same device and stay int64."""
        data = self._data.to(*args, **kwargs)  # type: ignore[call-overload]
        if self.pooled is not None:
            return Encoded(pooled=data)
        assert self.offsets is not None
        return Encoded(values=data, offsets=self.offsets.to(data.device))

    @staticmethod
    def concat(parts: list[Encoded]) -> Encoded:
        """The items of all parts one after another; every part must have the same form and width."""
        if not parts:
            raise ValueError("Encoded.concat: parts is empty")
        if len({part.pooled is None for part in parts}) != 1:
            raise ValueError("Encoded.concat: parts mix pooled and token embeddings")
        if parts[0].pooled is not None:
            return Encoded(pooled=torch.cat([part._data for part in parts]))
        lengths = torch.cat([part.offsets[1:] - part.offsets[:-1] for part in parts if part.offsets is not None])
        offsets = lengths.new_zeros(lengths.numel() + 1)
        torch.cumsum(lengths, 0, out=offsets[1:])
        return Encoded(values=torch.cat([part._data for part in parts]), offsets=offsets)
