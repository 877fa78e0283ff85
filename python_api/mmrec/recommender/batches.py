"""The order in which training reads the data: a function of the data, the seed and the epoch alone.

So a resumed run needs to store no order, only how far it had come.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..evaluation.ragged import Ragged

__all__ = ["Batch", "epoch_batches", "last_windows", "num_batches"]


class Batch(NamedTuple):
    """Windows of histories, end to end: `index int64 [T]` item rows, `offsets int64 [B + 1]`, and `target int64 [T]`,
    the item that follows each position."""

    index: Tensor  # type: ignore[assignment]  # hides tuple.index
    offsets: Tensor
    target: Tensor

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on `device`."""
        return Batch(*(tensor.to(device) for tensor in self))


def num_batches(histories: Ragged, max_length: int, batch_size: int) -> int:
    """Batches per epoch: an upper bound that holds for every epoch, as windows move by a random phase."""
    return -(-int(_max_windows(histories.lengths, max_length).sum()) // batch_size)


def epoch_batches(histories: Ragged, max_length: int, batch_size: int, *, seed: int, epoch: int) -> list[Batch]:
    """All batches of one epoch, in order.

    Every history is cut into windows of at most `max_length` positions plus the target of the last one; where a history
    is longer, the cuts fall at a random phase. So every interaction but a history's first is a target once per epoch.
    """
    rng = np.random.default_rng([seed, epoch])
    starts, stops = _windows(histories, max_length, rng)
    order = rng.permutation(len(starts))
    count = -(-len(starts) // batch_size)
    parts = np.array_split(order, count) if count else []
    return [_batch(histories.ids, starts[part], stops[part]) for part in parts]


def last_windows(histories: Ragged, max_length: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The last `max_length` items of each history, `batch_size` histories at a time: `index int64 [T]`, `offsets`."""
    for start in range(0, len(histories), batch_size):
        part = histories.rows(slice(start, start + batch_size))
        from_end = part.offsets[1:][part.row_of] - np.arange(len(part.ids))
        part = part.keep(from_end <= max_length)
        yield torch.from_numpy(part.ids.astype(np.int64)), torch.from_numpy(part.offsets)


def _max_windows(lengths: np.ndarray, max_length: int) -> np.ndarray:
    positions = np.maximum(lengths - 1, 0)
    return np.where(positions <= max_length, np.minimum(positions, 1), positions // max_length + 2)


def _windows(histories: Ragged, max_length: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Half-open ranges of positions whose next item is their target."""
    starts, stops = [], []
    phases = rng.integers(max_length, size=len(histories))
    for first, last, phase in zip(histories.offsets[:-1], histories.offsets[1:] - 1, phases, strict=True):
        if last <= first:
            continue
        cuts = np.array([first]) if last - first <= max_length else np.arange(first - phase, last, max_length)
        starts.append(np.maximum(cuts, first))
        stops.append(np.minimum(np.append(cuts[1:], last), last))
    if not starts:
        return np.empty(0, np.int64), np.empty(0, np.int64)
    return np.concatenate(starts), np.concatenate(stops)


def _batch(ids: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> Batch:
    lengths = stops - starts
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    position = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)
    return Batch(
        torch.from_numpy(ids[position].astype(np.int64)),
        torch.from_numpy(offsets),
        torch.from_numpy(ids[position + 1].astype(np.int64)),
    )
