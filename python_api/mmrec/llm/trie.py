"""`Trie`: which token may come next, so that what has been generated is the beginning of an item."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ["Trie"]


class Trie:
    """Token sequences by their beginnings. Node 0 is the root; the children of a node lie side by side, by token.

    One sequence may be the beginning of another, and several items may have the same one. Items lie in the order of
    their sequences, so those below a node are a range: what is excluded for a user is counted, not searched for.

    Args:
        sequences: of item i the tokens `sequences[i]`, ≥ 1 integers ≥ 0.

    Attributes:
        token: int64 `[nodes]`, the last token of each node's beginning; −1 at the root.
        child_offsets: int64 `[nodes + 1]`: nodes `child_offsets[n]:child_offsets[n + 1]` are the children of node n.
        items: int64 `[N]`, all items by their sequences, the lower one first where those are the same.
        first, own_end, end: int64 `[nodes]`: `items[first[n]:own_end[n]]` end at node n, `items[own_end[n]:end[n]]`
            below it.
        depth: tokens of the longest sequence.

    All on the CPU.

    Raises:
        ValueError: a sequence without tokens, or with a negative one.
    """

    def __init__(self, sequences: Sequence[Sequence[int]]) -> None:
        rows = [tuple(map(int, sequence)) for sequence in sequences]
        for i, row in enumerate(rows):
            if not row or min(row) < 0:
                raise ValueError(f"sequences[{i}] must be one or more tokens ≥ 0, got {list(row)[:8]}")
        order = sorted(range(len(rows)), key=rows.__getitem__)
        lengths = np.array([len(rows[i]) for i in order], dtype=np.int64)
        flat = np.array([token for i in order for token in rows[i]], dtype=np.int64)
        begin = np.cumsum(lengths) - lengths
        node_of = np.zeros(len(rows), dtype=np.int64)  # where each sequence is after so many tokens
        tokens, parents = [np.array([-1], np.int64)], [np.array([-1], np.int64)]
        firsts, owns, ends = [np.array([0], np.int64)], [np.array([0], np.int64)], [np.array([len(rows)], np.int64)]
        count, active = 1, np.arange(len(rows))
        depth = 0
        while len(active):
            token, parent = flat[begin[active] + depth], node_of[active]
            new = np.ones(len(active), dtype=bool)
            # Sequences lie in order: one begins a node where the one before it has another parent or token.
            new[1:] = (token[1:] != token[:-1]) | (parent[1:] != parent[:-1])
            group = np.cumsum(new) - 1
            node_of[active] = count + group
            depth += 1
            last = np.flatnonzero(np.append(new[1:], True))
            tokens.append(token[new])
            parents.append(parent[new])
            firsts.append(active[new])
            ends.append(active[last] + 1)
            ending = lengths[active] == depth
            owns.append(active[new] + np.bincount(group[ending], minlength=int(group[-1]) + 1))
            count += int(group[-1]) + 1
            active = active[~ending]
        parent = np.concatenate(parents)
        self.token = torch.from_numpy(np.concatenate(tokens))
        children = np.bincount(parent[1:], minlength=count)
        self.child_offsets = torch.from_numpy(np.concatenate([[1], 1 + np.cumsum(children)]).astype(np.int64))
        self.items = torch.tensor(order, dtype=torch.int64)
        self.first = torch.from_numpy(np.concatenate(firsts))
        self.own_end = torch.from_numpy(np.concatenate(owns))
        self.end = torch.from_numpy(np.concatenate(ends))
        self.depth = depth

    def __len__(self) -> int:
        """How many nodes, the root among them."""
        return len(self.token)

    def children(self, node: int) -> tuple[Tensor, Tensor]:
        """int64 `[c]` twice: the tokens that may follow, ascending, and the nodes they lead to."""
        nodes = torch.arange(int(self.child_offsets[node]), int(self.child_offsets[node + 1]))
        return self.token[nodes], nodes

    def items_at(self, node: int) -> Tensor:
        """int64 `[m]`: the items whose sequence ends at a node, ascending."""
        return self.items[int(self.first[node]) : int(self.own_end[node])]

    def expand(self, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """The children of some nodes `[m]`: int64 `[c]` twice, place of the parent in `nodes`, and child."""
        return _ranges(self.child_offsets[nodes], self.child_offsets[nodes + 1])

    def ending(self, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """The items that end at some nodes `[m]`: int64 `[c]` twice, place in `nodes`, and place in `items`."""
        return _ranges(self.first[nodes], self.own_end[nodes])


def _ranges(begin: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """All integers of `[begin[i], end[i])`, i after i, behind the i of each."""
    lengths = end - begin
    owner = torch.arange(len(begin)).repeat_interleave(lengths)
    before = lengths.cumsum(0) - lengths
    return owner, torch.arange(len(owner)) + (begin - before)[owner]
