"""Histories to rows of a store, and rows to answers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .planning import How

if TYPE_CHECKING:
    from .store import StoreVersion

__all__ = ["Answer", "HistoryError", "answers_of", "lists_of", "names_of", "rows_of", "windows_of"]

_OPEN = How(0, 0, 0.0)


class Answer(NamedTuple):
    """The best items for one history, best first; as many as there are.

    Attributes:
        items: ids.
        titles: of each, "" where there is none.
        scores: of each, by the retrieval.
        reranked: scores by the reranker, of the first ones: those that it ranked, and which come first in its order.
        mass: per item the share of its attention that each modality had, in the order of the model's modalities.
        known: whether training interacted with the item.
        unknown: ids of the history that the store does not have; they were left out.
        version: of the store.
        how: what was done, and how long that took.
    """

    items: list[str]
    titles: list[str]
    scores: list[float]
    reranked: list[float]
    mass: list[list[float]]
    known: list[bool]
    unknown: list[str]
    version: int
    how: How


class HistoryError(ValueError):
    """Some of the histories cannot be answered.

    Attributes:
        why: place of each among those that were given → what is wrong with it.
    """

    def __init__(self, why: dict[int, str]) -> None:
        first = min(why)
        more = f" (and {len(why) - 1} more)" if len(why) > 1 else ""
        super().__init__(f"histories: history {first} {why[first]}{more}")
        self.why = why


def windows_of(
    version: StoreVersion, rows: np.ndarray, offsets: np.ndarray, depth: int
) -> tuple[np.ndarray, np.ndarray]:
    """Where the last `depth` items of each history begin and end: up to its last item, unless the model knows nothing
    about any of those; then up to the last of which it knows something."""
    ends = offsets[1:]
    told = np.concatenate([[0], (version.known(rows) | (version.mass(rows).sum(1) > 0)).numpy().cumsum()])
    if (told[ends] == told[offsets[:-1]]).any():
        nothing = np.flatnonzero(told[ends] == told[offsets[:-1]]).tolist()
        raise HistoryError(dict.fromkeys(nothing, "has no item about which the model knows anything"))
    silent = told[ends] == told[np.maximum(offsets[:-1], ends - depth)]
    if silent.any():
        ends = np.where(silent, np.searchsorted(told, told[ends]), ends)
    return np.maximum(offsets[:-1], ends - depth), ends


def rows_of(
    version: StoreVersion, histories: Sequence[Sequence[str]]
) -> tuple[np.ndarray, np.ndarray, list[list[str]]]:
    """Rows of all histories end to end, their offsets, and the ids of each that the store does not have."""
    flat = [item for history in histories for item in history]
    rows = version.rows(flat)
    missing = rows < 0
    lengths = np.array([len(history) for history in histories], np.int64)
    owner = np.repeat(np.arange(len(histories)), lengths)
    kept = np.bincount(owner[~missing], minlength=len(histories)) if len(flat) else np.zeros(len(histories), np.int64)
    if len(histories) and not kept.all():
        why = {int(n): f"has {lengths[n]} item(s), none of which the store has" for n in np.flatnonzero(kept == 0)}
        raise HistoryError({n: text if lengths[n] else "is empty" for n, text in why.items()})
    unknown: list[list[str]] = [[] for _ in histories]
    for place in np.flatnonzero(missing):
        unknown[owner[place]].append(flat[place])
    return rows[~missing], np.concatenate([[0], kept.cumsum()]).astype(np.int64), unknown


def lists_of(version: StoreVersion, ids: Sequence[Sequence[str]]) -> tuple[Tensor, Tensor]:
    """Offsets and rows, as `top_k` takes them, of those ids that the store has."""
    rows = version.rows([item for some in ids for item in some])
    ends = np.cumsum([0, *map(len, ids)])
    there = np.concatenate([[0], (rows >= 0).cumsum()])
    return torch.from_numpy(there[ends]), torch.from_numpy(rows[rows >= 0])


def names_of(version: StoreVersion, rows: np.ndarray | Tensor) -> list[str]:
    """Titles, or ids where there is none."""
    titles = version.titles(rows)
    return titles if all(titles) else [t or i for t, i in zip(titles, version.ids(rows), strict=True)]


def answers_of(version: StoreVersion, ids: Tensor, scores: Tensor) -> list[Answer]:
    """What is known of the items themselves; how they were found is left open."""
    counts = (ids >= 0).sum(1).tolist()
    rows = ids[ids >= 0]
    names, titles = version.ids(rows), version.titles(rows)
    mass, known = version.mass(rows).tolist(), version.known(rows).tolist()
    values = scores[ids >= 0].tolist()
    ends = list(itertools.accumulate(counts, initial=0))
    return [
        Answer(names[a:b], titles[a:b], values[a:b], [], mass[a:b], known[a:b], [], version.number, _OPEN)
        for a, b in itertools.pairwise(ends)
    ]
