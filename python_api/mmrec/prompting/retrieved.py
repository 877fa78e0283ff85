"""Context for prompts from the item store: what lies nearest to a history."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

if TYPE_CHECKING:
    from ..recommender.store import StoreVersion

__all__ = ["neighbours"]


def neighbours(version: StoreVersion, histories: Sequence[Sequence[str]], k: int, *, last: int = 5) -> list[list[str]]:
    """Titles (ids where there is none) of the items nearest to each history: those of the highest product with the mean
    direction of its last items' vectors. For retrieval-augmented prompts, `HardPrompt.build(context=…)`.

    Args:
        version: of an item store.
        histories: item ids, oldest first; those that the store does not have are passed over.
        k: how many, at most; none is of the history itself.
        last: items of which the mean is taken.

    Raises:
        HistoryError: a history that is empty, or of which the store has nothing.
    """
    from ..recommender.answers import names_of, rows_of

    if k < 1 or last < 1:
        raise ValueError(f"k and last must be at least 1, got {k} and {last}")
    if not histories:
        return []
    rows, offsets, _ = rows_of(version, histories)
    query = torch.stack([
        F.normalize(version.vectors(rows[max(begin, end - last) : end]), dim=1).mean(0)
        for begin, end in zip(offsets[:-1], offsets[1:], strict=True)
    ])  # fmt: skip
    found = version.top_k(query, k, exclude=(torch.from_numpy(offsets), torch.from_numpy(rows)))
    return [names_of(version, ids[ids >= 0]) for ids in found.ids]
