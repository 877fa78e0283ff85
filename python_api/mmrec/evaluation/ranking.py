"""Ranks every item for every evaluated user, through ``mmrec_kernels.top_k``.

Ties are broken the same way everywhere: higher score first, then the lower item row. A user's own seen items (the mask)
are left out; a list that runs out of candidates ends in −1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from .protocols import Seen, Split, Stage
from .ragged import Ragged

if TYPE_CHECKING:
    import torch

__all__ = ["Ranker", "rank", "rank_scores"]

Ranker = Callable[..., np.ndarray]
"""``ranker(split, stage, k, *, mask=None, candidates=None) -> int32 [n, k]``, a row per ``split.users(stage)``."""


def rank(
    query: torch.Tensor | np.ndarray,
    items: torch.Tensor | np.ndarray,
    split: Split,
    stage: Stage,
    k: int,
    *,
    mask: Seen | None = None,
    bias: torch.Tensor | np.ndarray | None = None,
    item_scales: torch.Tensor | np.ndarray | None = None,
    candidates: np.ndarray | None = None,
    batch_size: int = 1024,
) -> np.ndarray:
    """The top ``k`` of ``query @ items.T + bias`` for each evaluated user, without a score matrix in memory.

    Args:
        query: ``[n, D]``, a row per user of ``split.users(stage)``, in that order.
        items: ``[num_items, D]``, any dtype that ``top_k`` takes (int8 with ``item_scales``).
        mask: items left out, see :meth:`Split.mask`; None takes the protocol's default.
        bias: ``[num_items]``, added to the scores.
        candidates: item rows that may be ranked (such as the cold ones), None for all.
        batch_size: users per call.

    Returns:
        int32 ``[n, k]`` item rows, best first, −1 where a user has too few candidates.
    """
    import torch

    from mmrec_kernels import top_k

    queries, rows = torch.as_tensor(query), torch.as_tensor(items)
    offsets, scales = (None if x is None else torch.as_tensor(x) for x in (bias, item_scales))
    users = split.users(stage)
    _check_rank(queries, rows, offsets, len(users), split.num_items, k)
    allowed = _candidates(candidates, split.num_items)
    seen = _renumber(split.mask(stage, mask).rows(users), allowed, split.num_items)
    if allowed is not None:
        chosen = torch.from_numpy(allowed).to(rows.device)
        rows = rows[chosen]
        offsets, scales = (None if x is None else x[chosen] for x in (offsets, scales))
    ranked = np.full((len(users), k), -1, np.int32)
    for start in range(0, len(users), batch_size):
        part = slice(start, start + batch_size)
        exclude = _exclude(seen.rows(part), rows.device)
        found = top_k(queries[part], rows, k, item_scales=scales, bias=offsets, exclude=exclude)
        ranked[part] = found.ids.cpu().numpy()
    return _original(ranked, allowed)


def rank_scores(
    scores: np.ndarray | Callable[[np.ndarray], np.ndarray],
    split: Split,
    stage: Stage,
    k: int,
    *,
    mask: Seen | None = None,
    candidates: np.ndarray | None = None,
    batch_size: int = 256,
) -> np.ndarray:
    """The same for models whose scores are no inner product.

    Args:
        scores: ``[n, num_items]``, a row per user of ``split.users(stage)``, or a function that takes user rows ``[b]``
            and returns ``[b, num_items]``; float32 or float64. −inf takes an item out of a user's list, NaN is refused.
    """
    users = split.users(stage)
    if not callable(scores) and np.shape(scores) != (len(users), split.num_items):
        raise ValueError(f"scores must be {(len(users), split.num_items)}, got {np.shape(scores)}")
    _check_k(k)
    allowed = _candidates(candidates, split.num_items)
    seen = _renumber(split.mask(stage, mask).rows(users), allowed, split.num_items)
    ranked = np.full((len(users), k), -1, np.int32)
    for start in range(0, len(users), batch_size):
        part = slice(start, min(start + batch_size, len(users)))
        block = np.asarray(scores(users[part]) if callable(scores) else scores[part])
        if block.shape != (part.stop - start, split.num_items):
            raise ValueError(f"scores must return {(part.stop - start, split.num_items)}, got {block.shape}")
        if np.isnan(block).any():
            raise ValueError(f"scores hold NaN for user row {int(users[start + np.argwhere(np.isnan(block))[0, 0]])}")
        block = block if allowed is None else block[:, allowed]
        for offset, row in enumerate(block):
            ranked[start + offset] = _top_of_row(row, seen[start + offset], k)
    return _original(ranked, allowed)


def _top_of_row(scores: np.ndarray, seen: np.ndarray, k: int) -> np.ndarray:
    """One user's scores enter ``top_k`` as the bias of items at the origin, which keeps their bits and its tie rule."""
    import torch

    from mmrec_kernels import top_k

    bias = torch.from_numpy(np.array(scores, dtype=np.float64 if scores.dtype == np.float64 else np.float32))
    origin = torch.zeros(len(scores), 1, dtype=bias.dtype)
    exclude = (torch.tensor([0, len(seen)]), torch.from_numpy(seen.astype(np.int64)))
    found = top_k(origin.new_zeros(1, 1), origin, k, bias=bias, exclude=exclude)
    return np.where(torch.isneginf(found.scores[0]).numpy(), -1, found.ids[0].numpy())


def _candidates(candidates: np.ndarray | None, num_items: int) -> np.ndarray | None:
    if candidates is None:
        return None
    candidates = np.unique(np.asarray(candidates))
    if candidates.ndim != 1 or (len(candidates) and not np.issubdtype(candidates.dtype, np.integer)):
        raise TypeError(f"candidates must be item rows, got {candidates.dtype}")
    if len(candidates) and (candidates[0] < 0 or candidates[-1] >= num_items):
        raise ValueError(f"candidates must lie in [0, {num_items}), got {candidates[0]} to {candidates[-1]}")
    return candidates.astype(np.int64)


def _renumber(seen: Ragged, allowed: np.ndarray | None, num_items: int) -> Ragged:
    """The seen items as positions in ``allowed``; −1, which ``top_k`` ignores, where they are not among them."""
    if allowed is None:
        return seen
    place = np.full(num_items, -1, np.int32)
    place[allowed] = np.arange(len(allowed))
    return Ragged(seen.offsets, place[seen.ids])


def _original(ranked: np.ndarray, allowed: np.ndarray | None) -> np.ndarray:
    if allowed is None or not len(allowed):
        return ranked
    return np.where(ranked >= 0, allowed[ranked], -1).astype(np.int32)


def _exclude(seen: Ragged, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    return torch.from_numpy(seen.offsets).to(device), torch.from_numpy(seen.ids.astype(np.int64)).to(device)


def _check_rank(
    query: torch.Tensor, items: torch.Tensor, bias: torch.Tensor | None, num_users: int, num_items: int, k: int
) -> None:
    if query.ndim != 2 or len(query) != num_users:
        raise ValueError(f"query must be [{num_users}, D], a row per evaluated user, got {tuple(query.shape)}")
    if items.ndim != 2 or len(items) != num_items:
        raise ValueError(f"items must be [{num_items}, D], a row per item, got {tuple(items.shape)}")
    if bias is not None and bias.shape != (num_items,):
        raise ValueError(f"bias must be [{num_items}], got {tuple(bias.shape)}")
    _check_k(k)


def _check_k(k: int) -> None:
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
