"""Graphs of users and items, and of items alone, as sparse matrices."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mmrec_kernels import top_k

from ..evaluation import Ragged

__all__ = ["Adjacency", "Graph", "neighbour_graph"]


class Adjacency:
    """A weighted directed graph.

    Args:
        rows, columns: int64 `[E]`, from where to where; no edge twice.
        weights: float `[E]`.
        nodes: how many there are.
    """

    def __init__(self, rows: np.ndarray, columns: np.ndarray, weights: np.ndarray, nodes: int) -> None:
        self.matrix, self._back = _csr(rows, columns, weights, nodes), _csr(columns, rows, weights, nodes)

    def propagate(self, nodes: Tensor) -> Tensor:
        """`[n, d]`: of each node the weighted sum of the rows of `nodes [n, d]` that its edges lead to."""
        found: Tensor = _Propagate.apply(nodes, self.matrix, self._back)
        return found


class Graph:
    """The interaction graph, D^−½ A D^−½: users are its first nodes, items those behind them. A node without an
    interaction has no neighbours.

    Args:
        interactions: a row of item rows per user; repeats count once.
        num_items: I.
    """

    def __init__(self, interactions: Ragged, num_items: int) -> None:
        self.num_users, self.num_items = len(interactions), num_items
        pairs = interactions.unique()
        self._users, self._items = pairs.row_of.astype(np.int64), pairs.ids.astype(np.int64) + self.num_users
        self._adjacency = self._of(np.arange(len(self._users)))
        self.propagate = self._adjacency.propagate

    def pruned(self, kept: float, random: np.random.Generator) -> Adjacency:
        """With a share of the edges, drawn without replacement by D^−½ D^−½, so that those of popular nodes go first
        (Zhou and Shen, 2023, arXiv:2211.06924, eq. 5); weights by the degrees that are left."""
        count = int(len(self._users) * kept)
        if not count:
            return self._of(np.empty(0, np.int64))
        degree = self._degrees(np.arange(len(self._users)))
        chance = 1 / np.sqrt(degree[self._users] * degree[self._items])
        return self._of(random.choice(len(chance), count, replace=False, p=chance / chance.sum()))

    def _degrees(self, edges: np.ndarray) -> np.ndarray:
        ends = np.concatenate([self._users[edges], self._items[edges]])
        return np.bincount(ends, minlength=self.num_users + self.num_items).astype(np.float64)

    def _of(self, edges: np.ndarray) -> Adjacency:
        user, item, degree = self._users[edges], self._items[edges], self._degrees(edges)
        weights = np.tile(1 / np.sqrt(degree[user] * degree[item]), 2)
        rows, columns = np.concatenate([user, item]), np.concatenate([item, user])
        return Adjacency(rows, columns, weights, self.num_users + self.num_items)


def neighbour_graph(features: Sequence[Tensor], shares: Sequence[float], neighbours: int) -> Adjacency:
    """Items and their nearest items by cosine, each with weight 1 / `neighbours`, averaged over modalities (Zhou and
    Shen, 2023, arXiv:2211.06924, eqs. 1 to 4). An item is its own nearest, but equal ones of lower rows come first. No
    similarity of all pairs is ever held.

    Args:
        features: `[I, F]` of each modality, zero for an item without content, which has no neighbours and is nobody's.
        shares: of each modality in the weights.
        neighbours: per item and modality.
    """
    edges: dict[str, list[np.ndarray]] = {"rows": [], "columns": [], "weights": []}
    count = len(features[0])
    for values, share in zip(features, shares, strict=True):
        known = (values != 0).any(1).nonzero()[:, 0]
        largest = values.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)  # squares stay in range
        normed = F.normalize(values.float() / largest, dim=1)
        near = top_k(normed[known], normed[known], min(neighbours, max(len(known), 1))).ids
        edges["rows"].append(known.repeat_interleave(near.shape[1]).numpy())
        edges["columns"].append(known[near].flatten().numpy())
        edges["weights"].append(np.full(near.numel(), share / near.shape[1]))
    rows, columns, weights = (np.concatenate(part) for part in edges.values())
    pair, place = np.unique(rows * count + columns, return_inverse=True)
    return Adjacency(pair // count, pair % count, np.bincount(place, weights=weights, minlength=len(pair)), count)


def _csr(rows: np.ndarray, columns: np.ndarray, weights: np.ndarray, nodes: int) -> Tensor:
    order = np.lexsort((columns, rows))
    begin = np.concatenate([[0], np.bincount(rows, minlength=nodes).cumsum()])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        first, second = torch.from_numpy(begin), torch.from_numpy(columns[order])
        values = torch.from_numpy(weights[order].astype(np.float32))
        return torch.sparse_csr_tensor(first, second, values, (nodes, nodes), check_invariants=True)


class _Propagate(torch.autograd.Function):
    """A sparse product, whose gradient is that of the transposed matrix."""

    @staticmethod
    def forward(ctx: Any, nodes: Tensor, matrix: Tensor, back: Tensor) -> Tensor:
        ctx.back = back
        return matrix @ nodes

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back @ grads[0].contiguous(), None, None
