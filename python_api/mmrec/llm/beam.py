"""Beam search over the sequences of a catalogue: whatever comes out is an item."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from .trie import Trie

__all__ = ["Decoded", "Step", "beam_search"]

Step: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""`step(query, paths, row, token)`: log-probabilities `[c]` of `token[j]` behind the path of beam `row[j]`. Of the m
beams, `query` `[m]`, which does not fall, says whose they are, and `paths` `[m, t]` what they have so far; int64."""


class Decoded(NamedTuple):
    """`items [B, k]` (int64) in descending order of `log_probs [B, k]` (float64), ties to the lower item.

    Where a row has fewer than k, the rest is −1 and −inf.
    """

    items: Tensor
    log_probs: Tensor


def beam_search(
    step: Step, trie: Trie, queries: int, *, k: int, beams: int, exclude: Sequence[Sequence[int]] | None = None
) -> Decoded:
    """The k likeliest items of each query: of all beginnings of a length, the `beams` likeliest are gone on from.

    With as many beams as items nothing is left out, and the result is exact. An item is kept as soon as its sequence is
    complete, whatever the beams; what cannot come among the k best any more is not gone on from, which changes nothing,
    since a longer sequence is no likelier. Beginnings of excluded items only take no place among the beams.

    Args:
        step: gives the probabilities.
        trie: of the items' sequences.
        queries: B, how many.
        k: items per query, at least 1.
        beams: at least 1. Of equally likely beginnings the first in the order of tokens stay.
        exclude: for each query, items that it must not get; other numbers than items are ignored.
    """
    if min(k, beams) < 1:
        raise ValueError(f"k and beams must be at least 1, got {k} and {beams}")
    if exclude is not None and len(exclude) != queries:
        raise ValueError(f"exclude must have a list for each of {queries} queries, got {len(exclude)}")
    without = _Without(trie, exclude)
    query, node = torch.arange(queries), torch.zeros(queries, dtype=torch.int64)
    score, paths = torch.zeros(queries, dtype=torch.float64), torch.zeros(queries, 0, dtype=torch.int64)
    best = (query[:0], score[:0], query[:0])  # of which query, how likely, which item
    while len(node):
        row, child = trie.expand(node)
        kept = without.count(query[row], trie.first[child], trie.end[child]) > 0
        row, child = row[kept], child[kept]
        if not len(child):
            break
        token = trie.token[child]
        found = score[row] + step(query, paths, row, token).double().cpu()
        who, place = trie.ending(child)
        there = without.count(query[row[who]], place, place + 1) > 0
        who, place = who[there], place[there]
        best = _merged(best, (query[row[who]], found[who], trie.items[place]), k)
        least = _kth(best, queries, k)[query[row]]
        onward = without.count(query[row], trie.own_end[child], trie.end[child]) > 0
        onward &= (found >= least) & (found > -torch.inf)
        row, child, token, found = row[onward], child[onward], token[onward], found[onward]
        chosen = _first(query[row], found, child, beams)
        # By query again, as `step` wants them.
        row, node, score = row[chosen], child[chosen], found[chosen]
        query, paths = query[row], torch.cat([paths[row], token[chosen].unsqueeze(1)], dim=1)
    return _table(best, queries, k)


class _Without:
    """How many items of a range of the trie's order a query may have."""

    def __init__(self, trie: Trie, exclude: Sequence[Sequence[int]] | None) -> None:
        self.stride = len(trie.items) + 1
        self.gone: Tensor | None = None
        if exclude is not None:
            place = torch.empty_like(trie.items)
            place[trie.items] = torch.arange(len(place))
            known = [sorted({int(i) for i in items if 0 <= int(i) < len(place)}) for items in exclude]
            owner = torch.arange(len(known)).repeat_interleave(torch.tensor([len(one) for one in known]))
            items = torch.tensor([i for one in known for i in one], dtype=torch.int64)
            self.gone = (owner * self.stride + place[items]).sort().values

    def count(self, query: Tensor, first: Tensor, end: Tensor) -> Tensor:
        """int64: items of `[first, end)` that are left for each query."""
        if self.gone is None:
            return end - first
        base = query * self.stride
        return end - first - torch.searchsorted(self.gone, base + end) + torch.searchsorted(self.gone, base + first)


def _first(query: Tensor, score: Tensor, tie: Tensor, most: int) -> Tensor:
    """Places of the `most` highest of each query, by query, then by score, then by the lower `tie`."""
    order = tie.argsort(stable=True)
    order = order[score[order].argsort(descending=True, stable=True)]
    order = order[query[order].argsort(stable=True)]
    counts = torch.bincount(query)
    begin = counts.cumsum(0) - counts
    return order[torch.arange(len(order)) - begin[query[order]] < most]


def _merged(
    best: tuple[Tensor, Tensor, Tensor], new: tuple[Tensor, Tensor, Tensor], k: int
) -> tuple[Tensor, Tensor, Tensor]:
    query, score, item = (torch.cat(pair) for pair in zip(best, new, strict=True))
    real = score > -torch.inf  # nor NaN
    query, score, item = query[real], score[real], item[real]
    chosen = _first(query, score, item, k)
    return query[chosen], score[chosen], item[chosen]


def _kth(best: tuple[Tensor, Tensor, Tensor], queries: int, k: int) -> Tensor:
    """float64 `[queries]`: the score of the kth item, −inf where there are fewer."""
    query, score, _ = best
    counts = torch.bincount(query, minlength=queries)
    least = torch.full((queries,), -torch.inf, dtype=torch.float64)
    full = counts >= k
    least[full] = score[(counts.cumsum(0) - 1)[full]]
    return least


def _table(best: tuple[Tensor, Tensor, Tensor], queries: int, k: int) -> Decoded:
    query, score, item = best
    counts = torch.bincount(query, minlength=queries)
    column = torch.arange(len(query)) - (counts.cumsum(0) - counts)[query]
    items = torch.full((queries, k), -1, dtype=torch.int64)
    log_probs = torch.full((queries, k), -torch.inf, dtype=torch.float64)
    items[query, column], log_probs[query, column] = item, score
    return Decoded(items, log_probs)
