"""Answers to single requests, from an item store: history → item rows → user state → the best items."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .model import Recommender
    from .store import ItemStore, StoreVersion

__all__ = ["STAGES", "Answer", "OnlineRecommender"]

# What a request's time goes to, in order.
STAGES = ("history", "user", "retrieval", "answer")


class Answer(NamedTuple):
    """The best items for one history, best first; as many as there are.

    Attributes:
        items: ids.
        titles: of each, "" where there is none.
        scores: of each.
        mass: per item the share of its attention that each modality had, in the order of the model's modalities.
        known: whether training interacted with the item.
        unknown: ids of the history that the store does not have; they were left out.
        version: of the store.
    """

    items: list[str]
    titles: list[str]
    scores: list[float]
    mass: list[list[float]]
    known: list[bool]
    unknown: list[str]
    version: int


class OnlineRecommender:
    """A trained model over a store of its items. Thread-safe: it keeps nothing between calls but the store's version.

    Args:
        model: in eval mode from here on.
        store: of the items of this model.
        model_id: what the store must name as its model; None accepts any.

    Raises:
        StoreError: the store has no usable version, or is of another model.
    """

    def __init__(self, model: Recommender, store: ItemStore, *, model_id: str | None = None) -> None:
        self.model = model.eval()
        self.store = store
        self.model_id = model_id
        self._reloading = threading.Lock()
        self.version = self._usable(store.current())

    def reload(self) -> bool:
        """Goes over to the newest version of the store, for later calls; whether there was a newer one.

        Raises:
            StoreError: it is of another model; the version before goes on serving.
        """
        with self._reloading:
            newest = self.store.current()
            if newest is self.version:
                return False
            self.version = self._usable(newest)
            return True

    def recommend(
        self,
        histories: Sequence[Sequence[str]],
        k: int = 10,
        *,
        exclude_seen: bool = True,
        depth: int | None = None,
        seconds: dict[str, float] | None = None,
    ) -> list[Answer]:
        """The k best items for each history.

        Args:
            histories: item ids of each user, oldest first. Ids that the store does not have are left out and named in
                the answer. Users need not be known to anyone; items that training never saw count by their content.
            k: items per answer.
            exclude_seen: leave a history's own items out.
            depth: how many last items are read, at most the model's `max_length`; None means that.
            seconds: takes the time of each of `STAGES`.

        Raises:
            ValueError: k or depth out of range, or a history of which the model knows nothing.
        """
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        most = self.model.config.max_length
        if depth is not None and not 1 <= depth <= most:
            raise ValueError(f"depth must be from 1 to {most}, got {depth}")
        version, taken = self.version, seconds if seconds is not None else {}
        with torch.inference_mode():
            with _timed(taken, "history"):
                rows, offsets, unknown = _rows_of(version, histories)
            with _timed(taken, "user"):
                query = self._states(version, rows, offsets, depth or most)
            with _timed(taken, "retrieval"):
                seen = (torch.from_numpy(offsets), torch.from_numpy(rows)) if exclude_seen else None
                found = version.top_k(query, min(k, max(len(version), 1)), exclude=seen)
            with _timed(taken, "answer"):
                return _answers(version, found.ids, found.scores, unknown)

    def _states(self, version: StoreVersion, rows: np.ndarray, offsets: np.ndarray, depth: int) -> Tensor:
        """The state after each history's last item, of its last `depth` items."""
        ends = offsets[1:]
        starts = np.maximum(offsets[:-1], ends - depth)
        lengths = ends - starts
        if len(lengths) == 1:
            read = rows[starts[0] : ends[0]]
        else:
            read = rows[
                np.repeat(starts - np.concatenate([[0], lengths[:-1].cumsum()]), lengths) + np.arange(lengths.sum())
            ]
        vectors = version.vectors(read)
        told = version.known(read) | (version.mass(read).sum(1) > 0)
        places = torch.from_numpy(np.concatenate([[0], lengths.cumsum()]))
        if not bool(torch.segment_reduce(told.float(), "max", offsets=places, initial=0).all()):
            raise ValueError("histories: the model knows nothing about any item of one of them")
        device = self.model.device
        index = torch.arange(len(read), device=device)
        return self.model.states(vectors.to(device), index, places.to(device), last=True).to(vectors.device)

    def _usable(self, version: StoreVersion) -> StoreVersion:
        from .store import StoreError

        config = self.model.config
        if self.model_id is not None and version.meta.model != self.model_id:
            raise StoreError(
                f"{self.store.folder} holds items of model {version.meta.model}, this is {self.model_id}: index it anew"
            )
        if (version.meta.width, version.meta.modalities) != (config.width, config.modalities):
            raise StoreError(
                f"{self.store.folder} holds vectors of width {version.meta.width} of {list(version.meta.modalities)}, "
                f"the model has {config.width} of {list(config.modalities)}"
            )
        return version


@contextmanager
def _timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    began = time.perf_counter()
    yield
    seconds[stage] = time.perf_counter() - began


def _rows_of(
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
        empty = int(np.argmin(kept > 0))
        what = "is empty" if not lengths[empty] else f"has {lengths[empty]} item(s), none of which the store has"
        raise ValueError(f"histories: history {empty} {what}; it needs at least one item")
    unknown: list[list[str]] = [[] for _ in histories]
    for place in np.flatnonzero(missing):
        unknown[owner[place]].append(flat[place])
    return rows[~missing], np.concatenate([[0], kept.cumsum()]).astype(np.int64), unknown


def _answers(version: StoreVersion, ids: Tensor, scores: Tensor, unknown: list[list[str]]) -> list[Answer]:
    counts = (ids >= 0).sum(1).tolist()
    rows = ids[ids >= 0]
    names, titles = version.ids(rows), version.titles(rows)
    mass, known = version.mass(rows).tolist(), version.known(rows).tolist()
    values = scores[ids >= 0].tolist()
    answers, begin = [], 0
    for n, count in enumerate(counts):
        part = slice(begin, begin + count)
        answers.append(
            Answer(
                names[part], titles[part], values[part], mass[part], known[part], unknown[n], version.number
            )  # fmt: skip
        )
        begin += count
    return answers
