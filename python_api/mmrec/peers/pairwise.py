"""Models that are trained to score an item that a user chose above one that he did not (Rendle et al., 2009,
arXiv:1205.2618)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .graph import Adjacency, Graph

__all__ = ["BPR", "VBPR", "LightGCN", "Pairwise", "above", "check_features"]


class Pairwise(nn.Module, ABC):
    """A score is the inner product of a user's and an item's vector.

    Here the loss is that a chosen item scores above another one, −log σ(difference); models with another loss or with
    parts that change from epoch to epoch say so.

    Attributes:
        negatives: whether `loss` reads `others`.
    """

    negatives = True

    @abstractmethod
    def vectors(self) -> tuple[Tensor, Tensor]:
        """Of all users `[U, D]` and all items `[I, D]`, with gradients."""

    @abstractmethod
    def size(self, users: Tensor, items: Tensor) -> Tensor:
        """Sum of the squares of what the scores of these `users` and `items` are made of, for weight decay."""

    def loss(self, users: Tensor, chosen: Tensor, others: Tensor, weight_decay: float) -> Tensor:
        """Of a batch of interactions, int64 `[n]` each; `others` are items that the users did not choose."""
        decay = self.size(users, torch.cat([chosen, others])) * (weight_decay / 2 / len(users))
        return above(*self.vectors(), users, chosen, others) + decay

    def begin_epoch(self, random: np.random.Generator) -> None:  # noqa: B027
        """Called before each epoch."""


def above(of_users: Tensor, of_items: Tensor, users: Tensor, chosen: Tensor, others: Tensor) -> Tensor:
    """Mean of −log σ(score of the chosen item − score of the other one)."""
    gap = of_items.index_select(0, chosen) - of_items.index_select(0, others)
    return F.softplus(-(of_users.index_select(0, users) * gap).sum(1)).mean()


class BPR(Pairwise):
    """Matrix factorisation: an embedding per user and per item.

    Args:
        num_users, num_items: U, I.
        width: d.
    """

    def __init__(self, num_users: int, num_items: int, *, width: int = 64) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"width must be at least 1, got {width}")
        self.user = nn.Parameter(torch.empty(num_users, width))
        self.item = nn.Parameter(torch.empty(num_items, width))
        nn.init.xavier_uniform_(self.user)
        nn.init.xavier_uniform_(self.item)

    def vectors(self) -> tuple[Tensor, Tensor]:
        return self.user, self.item

    def size(self, users: Tensor, items: Tensor) -> Tensor:
        return self.user.index_select(0, users).square().sum() + self.item.index_select(0, items).square().sum()


class LightGCN(BPR):
    """Embeddings and what they are after each of some steps along the interaction graph, averaged (He et al., 2020,
    arXiv:2002.02126).

    Args:
        graph: of the training interactions.
        width: d.
        layers: steps.
    """

    def __init__(self, graph: Graph, *, width: int = 64, layers: int = 3) -> None:
        super().__init__(graph.num_users, graph.num_items, width=width)
        if layers < 0:
            raise ValueError(f"layers must be at least 0, got {layers}")
        self.graph, self.layers = graph, layers

    def vectors(self) -> tuple[Tensor, Tensor]:
        return self.along(self.graph)

    def along(self, graph: Graph | Adjacency) -> tuple[Tensor, Tensor]:
        """`vectors` by the edges of `graph`."""
        nodes = torch.cat([self.user, self.item])
        total = nodes
        for _ in range(self.layers):
            nodes = graph.propagate(nodes)
            total = total + nodes
        users, items = (total / (self.layers + 1)).split([self.graph.num_users, self.graph.num_items])
        return users, items


class VBPR(BPR):
    """Matrix factorisation with a second half of each vector that comes from the item's content (He and McAuley, 2016,
    arXiv:1510.01784). Biases, which move all of a user's scores alike or an item's alike, are left out, as in the
    tables that this is compared with.

    Args:
        num_users, num_items: U, I.
        features: `[I, F]`, zero for an item without content.
        width: d of either half.
    """

    features: Tensor

    def __init__(self, num_users: int, num_items: int, features: Tensor, *, width: int = 64) -> None:
        super().__init__(num_users, num_items, width=width)
        check_features([features], num_items)
        self.register_buffer("features", features.float(), persistent=False)
        self.taste = nn.Parameter(torch.empty(num_users, width))
        self.project = nn.Parameter(torch.empty(features.shape[1], width))
        nn.init.xavier_uniform_(self.taste)
        nn.init.xavier_uniform_(self.project)

    def vectors(self) -> tuple[Tensor, Tensor]:
        return torch.cat([self.user, self.taste], 1), torch.cat([self.item, self.features @ self.project], 1)

    def size(self, users: Tensor, items: Tensor) -> Tensor:
        projected = self.features.index_select(0, items) @ self.project
        tastes = self.taste.index_select(0, users).square().sum()
        return super().size(users, items) + tastes + projected.square().sum()


def check_features(features: Sequence[Tensor], num_items: int) -> None:
    """ValueError unless all are `[num_items, F]`, and there is one."""
    if not features:
        raise ValueError("features must have at least one modality")
    for values in features:
        if values.shape[:1] != (num_items,) or values.ndim != 2:
            raise ValueError(f"features must be [{num_items}, F], got {list(values.shape)}")
        if not bool(values.isfinite().all()):
            raise ValueError("features must be finite, got NaN or infinity")
