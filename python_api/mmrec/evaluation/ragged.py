"""Lists of different lengths, one per user, stored as two flat arrays."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

__all__ = ["Ragged"]


@dataclass(frozen=True, eq=False)
class Ragged:
    """Rows of item ids: row ``i`` is ``ids[offsets[i]:offsets[i + 1]]``, in the order it was given.

    Args:
        offsets: int64 ``[n + 1]``, starts at 0, never decreases, ends at ``len(ids)``.
        ids: int32 ``[offsets[-1]]``.

    Other integer dtypes are converted. ``ValueError`` or ``TypeError`` says which rule was broken.
    """

    offsets: np.ndarray
    ids: np.ndarray

    def __post_init__(self) -> None:
        offsets, ids = _integers("offsets", self.offsets), _integers("ids", self.ids)
        if not len(offsets):
            raise ValueError("offsets is empty; it needs one entry more than there are rows")
        if offsets[0] != 0 or offsets[-1] != len(ids):
            raise ValueError(
                f"offsets must run from 0 to len(ids) = {len(ids)}, got {int(offsets[0])} to {int(offsets[-1])}"
            )
        if np.any(offsets[1:] < offsets[:-1]):
            row = int(np.argmax(offsets[1:] < offsets[:-1]))
            raise ValueError(
                f"offsets must not decrease, but row {row} runs from {int(offsets[row])} to {int(offsets[row + 1])}"
            )
        bounds = np.iinfo(np.int32)
        if len(ids) and (ids.min() < bounds.min or ids.max() > bounds.max):
            raise ValueError(f"ids must fit int32, got {int(ids.min())} to {int(ids.max())}")
        object.__setattr__(self, "offsets", np.ascontiguousarray(offsets, dtype=np.int64))
        object.__setattr__(self, "ids", np.ascontiguousarray(ids, dtype=np.int32))

    @classmethod
    def from_lists(cls, rows: Iterable[Sequence[int] | np.ndarray]) -> Ragged:
        """Builds the rows from Python lists or integer arrays."""
        arrays = [_integers(f"row {i}", np.asarray(row)) if len(row) else np.empty(0, np.int64)
                  for i, row in enumerate(rows)]  # fmt: skip
        offsets = np.zeros(len(arrays) + 1, np.int64)
        np.cumsum([len(row) for row in arrays], out=offsets[1:])
        return cls(offsets, np.concatenate(arrays) if arrays else np.empty(0, np.int64))

    @classmethod
    def from_pairs(cls, row: np.ndarray, ids: np.ndarray, num_rows: int) -> Ragged:
        """Groups ``ids`` by ``row`` (both ``[P]``); inside a row the order of the pairs is kept."""
        row, ids = _integers("row", np.asarray(row)), _integers("ids", np.asarray(ids))
        if len(row) != len(ids):
            raise ValueError(f"row and ids must have one length, got {len(row)} and {len(ids)}")
        if len(row) and (row.min() < 0 or row.max() >= num_rows):
            raise ValueError(f"row must lie in [0, {num_rows}), got {int(row.min())} to {int(row.max())}")
        offsets = np.zeros(num_rows + 1, np.int64)
        np.cumsum(np.bincount(row, minlength=num_rows), out=offsets[1:])
        return cls(offsets, ids[np.argsort(row, kind="stable")])

    @classmethod
    def empty(cls, num_rows: int) -> Ragged:
        """``num_rows`` rows without entries."""
        return cls(np.zeros(num_rows + 1, np.int64), np.empty(0, np.int32))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        row %= len(self)
        return self.ids[self.offsets[row] : self.offsets[row + 1]]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Ragged):
            return NotImplemented
        return np.array_equal(self.offsets, other.offsets) and np.array_equal(self.ids, other.ids)

    __hash__ = None  # type: ignore[assignment]

    @property
    def lengths(self) -> np.ndarray:
        """int64 ``[n]``: entries per row."""
        return np.diff(self.offsets)

    @cached_property
    def row_of(self) -> np.ndarray:
        """int64 ``[len(ids)]``: the row that each entry belongs to."""
        return np.repeat(np.arange(len(self), dtype=np.int64), self.lengths)

    def to_lists(self) -> list[list[int]]:
        """The rows as Python lists."""
        return [self[i].tolist() for i in range(len(self))]

    def rows(self, index: np.ndarray | slice) -> Ragged:
        """The rows that ``index`` names (integers, booleans or a slice), in that order, repeats allowed."""
        chosen = np.arange(len(self))[index]
        lengths = self.lengths[chosen]
        offsets = np.zeros(len(chosen) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        source = np.arange(offsets[-1]) + np.repeat(self.offsets[chosen] - offsets[:-1], lengths)
        return Ragged(offsets, self.ids[source])

    def keep(self, entries: np.ndarray) -> Ragged:
        """Only the entries where the boolean mask ``[len(ids)]`` is true; the rows stay, perhaps empty."""
        if entries.shape != self.ids.shape or entries.dtype != np.bool_:
            raise ValueError(f"entries must be bool {self.ids.shape}, got {entries.dtype} {entries.shape}")
        offsets = np.zeros(len(self) + 1, np.int64)
        np.cumsum(np.bincount(self.row_of[entries], minlength=len(self)), out=offsets[1:])
        return Ragged(offsets, self.ids[entries])

    def concat(self, other: Ragged) -> Ragged:
        """Row by row: this row's entries, then the other's."""
        if len(self) != len(other):
            raise ValueError(f"both must have the same number of rows, got {len(self)} and {len(other)}")
        row = np.concatenate([self.row_of, other.row_of])
        return Ragged.from_pairs(row, np.concatenate([self.ids, other.ids]), len(self))

    def unique(self) -> Ragged:
        """Each row sorted, without repeats."""
        order = np.lexsort((self.ids, self.row_of))
        row, ids = self.row_of[order], self.ids[order]
        first = np.ones(len(ids), bool)
        first[1:] = (row[1:] != row[:-1]) | (ids[1:] != ids[:-1])
        return Ragged.from_pairs(row[first], ids[first], len(self))


def _integers(name: str, array: np.ndarray) -> np.ndarray:
    array = np.asarray(array)
    if array.ndim != 1:
        raise ValueError(f"{name} must be one-dimensional, got shape {array.shape}")
    if len(array) and not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"{name} must hold integers, got {array.dtype}")
    return array.astype(np.int64, copy=False)
