"""What a version changes of the one before."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...fusion.tokens import Tokens
from .columns import CONTENT_BYTES, Columns, ItemRows, Meta, encode

__all__ = ["Patch", "erased"]

_ROWS, _REMOVED = "patch.rows", "patch.removed"


@dataclass(frozen=True, eq=False)
class Patch:
    """What a version says of some items: `rows int64 [n]`, `removed bool [n]`, and all else of those that were not."""

    rows: Tensor
    removed: Tensor
    columns: Columns

    def __len__(self) -> int:
        return len(self.rows)

    @staticmethod
    def latest(patches: Sequence[Patch]) -> Patch:
        """Of every row what the last of them says, rows ascending; at least one patch."""
        rows = torch.cat([patch.rows for patch in patches])
        unique, first = np.unique(rows.flip(0).numpy(), return_index=True)
        at = len(rows) - 1 - torch.from_numpy(first)
        removed = torch.cat([patch.removed for patch in patches])[at]
        columns = Columns.concat([patch.columns for patch in patches]).select(at)
        return Patch(torch.from_numpy(unique), removed, columns)

    def tensors(self) -> dict[str, Tensor]:
        """As a file names them."""
        return {_ROWS: self.rows, _REMOVED: self.removed, **self.columns.tensors()}

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor]) -> Patch:
        """The inverse of `tensors`."""
        columns = {name: x for name, x in tensors.items() if name not in (_ROWS, _REMOVED)}
        rows = tensors[_ROWS]
        removed = tensors.get(_REMOVED, torch.zeros(len(rows), dtype=torch.bool))
        return Patch(rows, removed, Columns.from_tensors(columns))


def erased(ids: Sequence[str], meta: Meta) -> Columns:
    """Of items that are no more, their ids. Their scores are NaN, which no query finds."""
    n = len(ids)
    no_tokens = {
        name: Tokens(torch.zeros(0, width), torch.zeros(n + 1, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))
        for name, width in meta.tokens.items()
    }
    nothing = ItemRows(
        ids, torch.zeros(n, meta.width), torch.zeros(n, len(meta.modalities)), torch.zeros(n, dtype=torch.bool),
        torch.zeros(n, CONTENT_BYTES, dtype=torch.uint8), [""] * n, no_tokens,
    )  # fmt: skip
    columns = encode(nothing, meta)
    columns.fixed["scales" if meta.dtype == "int8" else "vectors"].fill_(math.nan)
    return columns
