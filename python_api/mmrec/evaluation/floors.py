"""Two models that need no training and that every result is printed beside: most popular and item kNN.

Both count over what the protocol lets a model see at that stage (:meth:`Split.history`): training interactions, and
under leave-last-out also the validation ones when the test is predicted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import numpy as np

from .protocols import Seen, Split, Stage
from .ragged import Ragged
from .ranking import Ranker, rank, rank_scores

__all__ = ["FLOORS", "Neighbours", "cosine_neighbours", "item_knn", "most_popular"]

_PAIRS_AT_ONCE = 1 << 22


def most_popular(
    split: Split, stage: Stage, k: int, *, mask: Seen | None = None, candidates: np.ndarray | None = None
) -> np.ndarray:
    """Everybody gets the items with the most interactions; int32 ``[n, k]``, see :func:`.ranking.rank`."""
    counts = np.bincount(split.history(stage).ids, minlength=split.num_items).astype(np.float64)
    query = np.zeros((len(split.users(stage)), 1))
    items = np.zeros((split.num_items, 1))
    return rank(query, items, split, stage, k, mask=mask, bias=counts, candidates=candidates)


def item_knn(
    split: Split,
    stage: Stage,
    k: int,
    *,
    neighbours: int | None = None,
    mask: Seen | None = None,
    candidates: np.ndarray | None = None,
) -> np.ndarray:
    """Item-based nearest neighbours (Sarwar et al., 2001): Σ of cosines to the items of the user's history.

    ``score(u, i) = Σ_{j ∈ history(u)} cos(i, j)``, with cosines of the columns of the binary user-item matrix. With
    ``neighbours``, only the nearest so many ``j`` of each ``i`` count (ties: lower row).

    Returns:
        int32 ``[n, k]``, see :func:`.ranking.rank`. Items without any common user score 0 and follow by row.
    """
    history = split.history(stage).unique()
    similar = cosine_neighbours(history, split.num_items, neighbours).transposed()

    def scores(users: np.ndarray) -> np.ndarray:
        return similar.sum_rows(history.rows(users))

    return rank_scores(scores, split, stage, k, mask=mask, candidates=candidates)


FLOORS: Mapping[str, Ranker] = MappingProxyType(
    {"most-popular": most_popular, "item-knn": item_knn, "item-knn-20": partial(item_knn, neighbours=20)}
)
"""The floors by the name that tables and the command line use."""


@dataclass(frozen=True, eq=False)
class Neighbours:
    """A sparse item-item matrix: row ``i`` has the weights ``[..]`` (float64) of the items ``lists[i]``."""

    lists: Ragged
    weights: np.ndarray

    def transposed(self) -> Neighbours:
        """The same weights, listed by the other item."""
        order = np.argsort(self.lists.ids, kind="stable")
        lists = Ragged.from_pairs(self.lists.ids, self.lists.row_of, len(self.lists))
        return Neighbours(lists, self.weights[order])

    def sum_rows(self, chosen: Ragged) -> np.ndarray:
        """float64 ``[len(chosen), items]``: for each row of ``chosen``, the sum of the matrix rows that it names.

        Additions happen in the order of the entries, so items with equal neighbours get equal bits and tie.
        """
        num_items = len(self.lists)
        total = np.zeros(len(chosen) * num_items)
        lengths = self.lists.lengths[chosen.ids]
        for first, last in _blocks(lengths, _PAIRS_AT_ONCE):
            size = lengths[first:last]
            source = _ranges(self.lists.offsets[chosen.ids[first:last]], size)
            target = np.repeat(chosen.row_of[first:last] * num_items, size) + self.lists.ids[source]
            np.add.at(total, target, self.weights[source])
        return total.reshape(len(chosen), num_items)


def cosine_neighbours(history: Ragged, num_items: int, neighbours: int | None = None) -> Neighbours:
    """Cosines between the columns of the binary user-item matrix, the diagonal and the zeros left out.

    Args:
        history: a row of item rows per user; repeats count once.
        neighbours: keep only the most similar so many of each item (ties: lower row); None keeps all.
    """
    if neighbours is not None and neighbours < 1:
        raise ValueError(f"neighbours must be at least 1 or None, got {neighbours}")
    history = history.unique()
    by_item = Ragged.from_pairs(history.ids, history.row_of, num_items)
    count = by_item.lengths
    cost = np.zeros(num_items, np.int64)
    np.add.at(cost, history.ids, history.lengths[history.row_of])
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for first, last in _blocks(np.maximum(cost, num_items), _PAIRS_AT_ONCE):
        common = _common_users(by_item.rows(slice(first, last)), history, num_items)
        row, other = np.nonzero(common)
        kept = row + first != other
        row, other = row[kept], other[kept]
        cosine = common[row, other] / np.sqrt(count[row + first] * count[other])
        if neighbours is not None:
            nearest = _nearest(row, cosine, neighbours)
            row, other, cosine = row[nearest], other[nearest], cosine[nearest]
        parts.append((row + first, other, cosine))
    if not parts:
        return Neighbours(Ragged.empty(num_items), np.empty(0))
    row, other, cosine = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Neighbours(Ragged.from_pairs(row, other, num_items), cosine)


def _common_users(by_item: Ragged, history: Ragged, num_items: int) -> np.ndarray:
    """int64 ``[len(by_item), num_items]``: how many users the two items share."""
    size = history.lengths[by_item.ids]
    other = history.ids[_ranges(history.offsets[by_item.ids], size)]
    key = np.repeat(by_item.row_of * num_items, size) + other
    return np.bincount(key, minlength=len(by_item) * num_items).reshape(len(by_item), num_items)


def _nearest(row: np.ndarray, weight: np.ndarray, count: int) -> np.ndarray:
    """Positions of each row's ``count`` largest weights; earlier entries win ties. Rows arrive sorted."""
    order = np.lexsort((-weight, row))
    start = np.searchsorted(row, row)
    chosen = order[np.arange(len(row)) - start < count]
    return np.sort(chosen)


def _ranges(start: np.ndarray, size: np.ndarray) -> np.ndarray:
    """The integers start[0] … start[0] + size[0] − 1, start[1] …, one after the other."""
    before = np.cumsum(size) - size
    return np.arange(int(size.sum())) + np.repeat(start - before, size)


def _blocks(cost: np.ndarray, limit: int) -> Iterator[tuple[int, int]]:
    """Cuts the entries into runs whose cost stays at or below ``limit`` where a single entry allows."""
    ends = np.cumsum(cost)
    first = 0
    while first < len(cost):
        spent = ends[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(ends, spent + limit, side="right")))
        yield first, last
        first = last
