"""Graph models that read the items' content: FREEDOM and BM3."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .graph import Adjacency, Graph, neighbour_graph
from .pairwise import LightGCN, above, check_features

__all__ = ["BM3", "FREEDOM"]


class _OfContent(LightGCN):
    """Steps along the interaction graph, and content in the width of the embeddings.

    Args:
        features: per modality `[I, F]`, zero for an item without content.
    """

    def __init__(self, graph: Graph, features: Sequence[Tensor], *, width: int, layers: int) -> None:
        super().__init__(graph, width=width, layers=layers)
        check_features(features, graph.num_items)
        self._names = [f"features_{n}" for n in range(len(features))]
        for name, values in zip(self._names, features, strict=True):
            self.register_buffer(name, values.float(), persistent=False)
        self.project = nn.ModuleList(nn.Linear(values.shape[1], width) for values in features)
        for linear in self.project:
            assert isinstance(linear, nn.Linear)
            nn.init.xavier_uniform_(linear.weight)

    @property
    def features(self) -> list[Tensor]:
        return [getattr(self, name) for name in self._names]

    def content(self, items: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Per modality of these `items [n]`: `[n, d]`, and bool `[n]`, who has any."""
        rows = [values.index_select(0, items) for values in self.features]
        return [(linear(own), (own != 0).any(1)) for linear, own in zip(self.project, rows, strict=True)]


class FREEDOM(_OfContent):
    """LightGCN whose items also hear from those of similar content, by a graph that is made once; the interaction graph
    loses most of its edges anew in every epoch of training (Zhou and Shen, 2023, arXiv:2211.06924).

    Args:
        graph: of the training interactions.
        features: per modality `[I, F]`, zero for an item without content.
        shares: of each modality in the graph of items, summing to 1; None for equal ones.
        width: d.
        layers: steps along the interaction graph.
        item_layers: steps along the graph of items.
        neighbours: per item and modality in that graph.
        kept: share of the interaction graph's edges that an epoch has.
        content_weight: λ of the losses by content alone.
    """

    def __init__(
        self, graph: Graph, features: Sequence[Tensor], *, shares: Sequence[float] | None = None, width: int = 64,
        layers: int = 2, item_layers: int = 1, neighbours: int = 10, kept: float = 0.2, content_weight: float = 1e-3,
    ) -> None:  # fmt: skip
        super().__init__(graph, features, width=width, layers=layers)
        if not 0 < kept <= 1:
            raise ValueError(f"kept must be in (0, 1], got {kept}")
        shares = [1 / len(features)] * len(features) if shares is None else shares
        if len(shares) != len(features) or not (min(shares) >= 0 and abs(sum(shares) - 1) <= 1e-6):
            raise ValueError(f"shares must be {len(features)} numbers ≥ 0 that sum to 1, got {list(shares)}")
        self.similar = neighbour_graph(features, shares, neighbours)
        self.item_layers, self.kept, self.content_weight = item_layers, kept, content_weight
        self._pruned: Graph | Adjacency = graph

    def begin_epoch(self, random: np.random.Generator) -> None:
        self._pruned = self.graph.pruned(self.kept, random)

    def along(self, graph: Graph | Adjacency) -> tuple[Tensor, Tensor]:
        users, items = super().along(graph)
        near: Tensor = self.item
        for _ in range(self.item_layers):
            near = self.similar.propagate(near)
        return users, items + near

    def loss(self, users: Tensor, chosen: Tensor, others: Tensor, weight_decay: float) -> Tensor:
        of_users, of_items = self.along(self._pruned)
        total = above(of_users, of_items, users, chosen, others)
        query = of_users.index_select(0, users)
        for (mine, has), (other, other_has) in zip(self.content(chosen), self.content(others), strict=True):
            losses = F.softplus(-(query * (mine - other)).sum(1)) * (has & other_has)
            total = total + self.content_weight * losses.mean()
        return total + self.size(users, torch.cat([chosen, others])) * (weight_decay / 2 / len(users))


class BM3(_OfContent):
    """No negatives: what a user and an item are after one predictor is drawn to what the other is without gradient and
    with some of it dropped, and the item's content to the item and to itself (Zhou et al., 2023, arXiv:2207.05969).

    Args:
        graph: of the training interactions.
        features: per modality `[I, F]`, zero for an item without content.
        width: d.
        layers: steps along the interaction graph.
        dropout: share that is dropped of what is drawn to.
        content_weight: of the losses with content.
    """

    def __init__(
        self, graph: Graph, features: Sequence[Tensor], *, width: int = 64, layers: int = 1, dropout: float = 0.3,
        content_weight: float = 2.0,
    ) -> None:  # fmt: skip
        super().__init__(graph, features, width=width, layers=layers)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.dropout, self.content_weight = dropout, content_weight
        self.predict = nn.Linear(width, width)
        nn.init.xavier_normal_(self.predict.weight)

    negatives = False

    def _online(self) -> tuple[Tensor, Tensor]:
        users, items = self.along(self.graph)
        return users, items + self.item

    def vectors(self) -> tuple[Tensor, Tensor]:
        users, items = self._online()
        return self.predict(users), self.predict(items)

    def loss(self, users: Tensor, chosen: Tensor, others: Tensor, weight_decay: float) -> Tensor:
        of_users, of_items = self._online()
        user, item = of_users.index_select(0, users), of_items.index_select(0, chosen)
        user_target, item_target = self._target(user), self._target(item)
        said_user, said_item = self.predict(user), self.predict(item)
        total = _apart(said_user, item_target) + _apart(said_item, user_target)
        for content, has in self.content(chosen):
            said = self.predict(content)
            alike = _apart(said, item_target, has) + _apart(said, self._target(content), has)
            total = total + self.content_weight * alike
        return total + (user.square().sum() + item.square().sum()) * (weight_decay / 2 / len(users))

    def _target(self, online: Tensor) -> Tensor:
        return F.dropout(online.detach(), self.dropout)


def _apart(a: Tensor, b: Tensor, counts: Tensor | None = None) -> Tensor:
    """Mean of 1 − cosine; 0 for rows that do not count."""
    apart = 1 - F.cosine_similarity(a, b, dim=1)
    return (apart if counts is None else apart * counts).mean()
