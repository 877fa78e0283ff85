"""Users and items as nodes of one graph."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..evaluation import Ragged

__all__ = ["Graph"]


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
        user, item = pairs.row_of, pairs.ids.astype(np.int64) + self.num_users
        row, column = np.concatenate([user, item]), np.concatenate([item, user])
        nodes = self.num_users + num_items
        degree = np.bincount(row, minlength=nodes)
        order = np.lexsort((column, row))
        row, column = row[order], column[order]
        weight = 1 / np.sqrt(degree[row].astype(np.float64) * degree[column])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            self._matrix = torch.sparse_csr_tensor(
                torch.from_numpy(np.concatenate([[0], degree.cumsum()])), torch.from_numpy(column),
                torch.from_numpy(weight.astype(np.float32)), (nodes, nodes), check_invariants=True,
            )  # fmt: skip

    def propagate(self, nodes: Tensor) -> Tensor:
        """`[U + I, d]`: of each node the weighted sum of its neighbours' rows of `nodes [U + I, d]`."""
        found: Tensor = _Propagate.apply(nodes, self._matrix)
        return found


class _Propagate(torch.autograd.Function):
    """The matrix is its own transpose: one product forward, the same one backward."""

    @staticmethod
    def forward(ctx: Any, nodes: Tensor, matrix: Tensor) -> Tensor:
        ctx.matrix = matrix
        return matrix @ nodes

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.matrix @ grads[0].contiguous(), None
