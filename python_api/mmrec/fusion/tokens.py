"""Ragged tokens: how the fusion modules pass an item's text vectors, image patches and table cells to each other."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Tokens", "gather_ragged"]


class Tokens(NamedTuple):
    """`values [T, d]` and `offsets int64 [N + 1]`: item n owns rows `offsets[n]:offsets[n + 1]`, perhaps none
    (missing).

    `kind int64 [T]` says which slot of its modality a token fills: the text field, the patch position, the column.
    """

    values: Tensor
    offsets: Tensor
    kind: Tensor

    @property
    def num_items(self) -> int:
        """N."""
        return self.offsets.numel() - 1

    @property
    def present(self) -> Tensor:
        """bool `[N]`: the item has at least one token."""
        return self.offsets.diff() > 0

    def select(self, items: Tensor) -> Tokens:
        """The tokens of `items` (int64 `[m]`, any order, repeats allowed); gradients flow to `values`."""
        rows, offsets = gather_ragged(self.offsets, items)
        return Tokens(self.values.index_select(0, rows), offsets, self.kind.index_select(0, rows))

    def mean(self) -> Tensor:
        """`[N, d]`: each item's mean token, zero for an item without tokens."""
        total = torch.segment_reduce(self.values, "sum", offsets=self.offsets, axis=0, initial=0)
        return total / self.offsets.diff().clamp(min=1).unsqueeze(1)

    def to(self, device: torch.device | str) -> Tokens:
        """The same tokens on `device`."""
        return Tokens(*(tensor.to(device) for tensor in self))


def gather_ragged(offsets: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
    """Where the rows of `items` lie in a ragged array.

    Args:
        offsets: int64 `[N + 1]`.
        items: int64 `[m]` in [0, N).

    Returns:
        `rows int64 [R]`, the source row of every row of the selection, and its `offsets int64 [m + 1]`.
    """
    lengths = offsets.diff().index_select(0, items)
    selected = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    shift = offsets.index_select(0, items) - selected[:-1]
    rows = torch.arange(int(selected[-1]), device=offsets.device) + shift.repeat_interleave(lengths)
    return rows, selected
