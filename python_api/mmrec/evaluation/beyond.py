"""What accuracy does not see: how much of the catalogue is recommended, and how popular that part is."""

from __future__ import annotations

import numpy as np

__all__ = ["beyond_accuracy", "coverage", "gini", "novelty", "long_tail_share", "popularity_groups"]


def coverage(ranked: np.ndarray, num_items: int) -> float:
    """Share of the catalogue that at least one user is shown. ``ranked``: item rows ``[n, K]``, −1 is no item."""
    return len(np.unique(ranked[ranked >= 0])) / num_items if num_items else float("nan")


def gini(ranked: np.ndarray, num_items: int) -> float:
    """Gini index of how often each item is shown: 0 if all equally often, towards 1 if always the same few.

    ``G = Σ_r (2r − I − 1) x_(r) / (I Σ x)`` over all ``I`` items, x sorted ascending, never shown ones included.
    """
    shown = np.sort(np.bincount(ranked[ranked >= 0], minlength=num_items)).astype(np.float64)
    if not shown.sum():
        return float("nan")
    rank = np.arange(1, num_items + 1)
    return float(((2 * rank - num_items - 1) * shown).sum() / (num_items * shown.sum()))


def novelty(ranked: np.ndarray, popularity: np.ndarray, num_users: int) -> float:
    """Mean self-information ``−log2(max(count_i, 1) / num_users)`` of what is shown, in bits.

    An item that nobody trained on counts as seen once (Vargas and Castells, 2011, have no value for it).
    """
    shown = ranked[ranked >= 0]
    if not len(shown):
        return float("nan")
    return float(-np.log2(np.maximum(popularity[shown], 1) / num_users).mean())


def long_tail_share(ranked: np.ndarray, popularity: np.ndarray, head: float = 0.8) -> float:
    """Share of what is shown that lies outside the head: the fewest items that hold ``head`` of all interactions."""
    shown = ranked[ranked >= 0]
    return float((~_head(popularity, head)[shown]).mean()) if len(shown) else float("nan")


def beyond_accuracy(
    ranked: np.ndarray, popularity: np.ndarray, num_users: int, cutoffs: tuple[int, ...] = (10,)
) -> dict[str, float]:
    """``Coverage@K``, ``Gini@K``, ``Novelty@K`` and ``LongTail@K`` for each cut-off.

    Args:
        ranked: item rows ``[n, K]``, best first, −1 where a list ends.
        popularity: training interactions ``[num_items]``.
        num_users: users that novelty relates the counts to.
    """
    result = {}
    for k in cutoffs:
        if k > ranked.shape[1]:
            raise ValueError(f"cut-off {k} is deeper than ranked, which has {ranked.shape[1]} positions")
        top = ranked[:, :k]
        result[f"Coverage@{k}"] = coverage(top, len(popularity))
        result[f"Gini@{k}"] = gini(top, len(popularity))
        result[f"Novelty@{k}"] = novelty(top, popularity, num_users)
        result[f"LongTail@{k}"] = long_tail_share(top, popularity)
    return result


def popularity_groups(popularity: np.ndarray) -> dict[str, np.ndarray]:
    """bool ``[num_items]`` masks "head", "middle" and "tail": each about a third of all training interactions.

    Items go from most to least popular (ties: lower row) until a third, then two thirds are reached. Items without a
    training interaction are in none of them.
    """
    head, upper = _head(popularity, 1 / 3), _head(popularity, 2 / 3)
    return {"head": head, "middle": upper & ~head, "tail": ~upper & (popularity > 0)}


def _head(popularity: np.ndarray, share: float) -> np.ndarray:
    if not 0 < share <= 1:
        raise ValueError(f"the head's share must lie in (0, 1], got {share}")
    order = np.argsort(-popularity, kind="stable")
    before = np.cumsum(popularity[order]) - popularity[order]
    inside = (before < share * popularity.sum()) & (popularity[order] > 0)
    mask = np.zeros(len(popularity), bool)
    mask[order[inside]] = True
    return mask
