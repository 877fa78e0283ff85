"""The recommender: an item tower, a user tower, and `top_k` between them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmrec_kernels import top_k

from ..evaluation.ragged import Ragged
from .batches import last_windows
from .config import RecommenderConfig
from .inputs import ItemInputs, ItemSpec
from .item_tower import ItemOutput, ItemTower
from .user_tower import UserTower

__all__ = ["Answers", "ItemVectors", "Recommender"]


class ItemVectors(NamedTuple):
    """Every item as the user side reads it: `vectors [I, d]` and `mass [I, M]`, the attention share of each
    modality."""

    vectors: Tensor
    mass: Tensor


class Answers(NamedTuple):
    """For B histories: `items int64 [B, k]` (catalogue rows, best first, −1 where candidates run out), `scores [B, k]`
    (−inf there) and `mass [B, k, M]`, the attention mass of each modality in each answer (0 there)."""

    items: np.ndarray
    scores: np.ndarray
    mass: np.ndarray


class Recommender(nn.Module):
    """Scores every item for a history: user state · item vector, both of length 1 where the config says "cosine".

    Args:
        config: hyper-parameters.
        spec: shapes of the data, `ItemInputs.spec`.
        trained: bool `[I]`, the items that training interacts with: only their identity means something. Others are
            described by their content. None means all.
    """

    trained: Tensor

    def __init__(self, config: RecommenderConfig, spec: ItemSpec, trained: np.ndarray | Tensor | None = None) -> None:
        super().__init__()
        self.config = config
        self.spec = spec
        known = torch.ones(spec.num_items, dtype=torch.bool) if trained is None else torch.as_tensor(trained)
        if known.shape != (spec.num_items,) or known.dtype != torch.bool:
            raise ValueError(f"trained must be bool [{spec.num_items}], got {known.dtype} {list(known.shape)}")
        self.register_buffer("trained", known.clone())
        self.item_tower = ItemTower(config, spec)
        self.user_tower = UserTower(
            config.width, layers=config.layers, heads=config.heads, max_length=config.max_length, dropout=config.dropout
        )

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return self.trained.device

    def encode(self, inputs: ItemInputs, items: Tensor) -> ItemOutput:
        """The item tower on the rows `items` (int64 `[N]`), of which `inputs` holds the content, with gradients; −1 is
        an item that is not in the catalogue, of which there is nothing but its content."""
        rows = items.clamp(min=0)
        output = self.item_tower(inputs, rows, self.trained.index_select(0, rows) & (items >= 0))
        if self.config.score == "cosine":
            output = output._replace(vectors=F.normalize(output.vectors, dim=1))
        return output

    @torch.no_grad()
    def item_vectors(self, inputs: ItemInputs, *, batch_size: int = 8192) -> ItemVectors:
        """All items, in eval mode and without gradients, `batch_size` at a time."""
        if inputs.num_items != self.spec.num_items:
            raise ValueError(f"inputs must hold {self.spec.num_items} items, got {inputs.num_items}")
        training = self.training
        self.eval()
        try:
            parts = [
                self.encode(inputs.select(items), items)
                for items in torch.arange(inputs.num_items, device=self.device).split(batch_size)
            ]
        finally:
            self.train(training)
        return ItemVectors(torch.cat([part.vectors for part in parts]), torch.cat([part.mass for part in parts]))

    def states(self, vectors: Tensor, index: Tensor, offsets: Tensor, *, last: bool = False) -> Tensor:
        """User states `[T, d]` after every item of ragged histories, or `[B, d]` after the last ones, see
        `UserTower.forward`; with gradients."""
        states = self.user_tower(vectors, index, offsets, last=last)
        return F.normalize(states, dim=1) if self.config.score == "cosine" else states

    @torch.no_grad()
    def user_vectors(self, histories: Ragged, items: ItemVectors, *, batch_size: int = 256) -> Tensor:
        """The state after each history's last item, `[B, d]`, in eval mode; only the last `max_length` items are read.

        Raises:
            ValueError: an empty history, an item row outside the catalogue, or `items` of another catalogue.
        """
        if len(items.vectors) != self.spec.num_items:
            raise ValueError(f"items must hold {self.spec.num_items} vectors, got {len(items.vectors)}")
        _check_histories(histories, self.spec.num_items)
        training = self.training
        self.eval()
        states = [items.vectors.new_empty(0, self.config.width)]
        try:
            for index, offsets in last_windows(histories, self.config.max_length, batch_size):
                states.append(self.states(items.vectors, index.to(self.device), offsets.to(self.device), last=True))
        finally:
            self.train(training)
        return torch.cat(states)

    def recommend(
        self,
        histories: Ragged,
        k: int,
        items: ItemVectors,
        *,
        exclude_seen: bool = True,
        candidates: np.ndarray | None = None,
    ) -> Answers:
        """The k best items for each history.

        Args:
            histories: B rows of item rows, oldest first, none empty.
            k: answers per history.
            items: what `item_vectors` gave.
            exclude_seen: leave a history's own items out (all of them, also those too old to be read).
            candidates: int `[n]`, the only item rows that may be answered, for every history.

        Raises:
            ValueError: an empty history, an item row outside the catalogue, k below 1.
            TypeError: candidates that are not integers.
        """
        shared = None
        if candidates is not None:
            rows = _check_candidates(candidates, self.spec.num_items).to(self.device)
            offsets = torch.arange(len(histories) + 1, device=self.device) * len(rows)
            shared = (offsets, rows.repeat(len(histories)))
        query = self.user_vectors(histories, items)
        seen = None
        if exclude_seen:
            ids = torch.from_numpy(histories.ids.astype(np.int64)).to(self.device)
            seen = (torch.from_numpy(histories.offsets).to(self.device), ids)
        found = top_k(query, items.vectors, k, exclude=seen, candidates=shared)
        mass = torch.where((found.ids >= 0).unsqueeze(2), items.mass[found.ids.clamp(min=0)], 0)
        return Answers(found.ids.cpu().numpy(), found.scores.cpu().numpy(), mass.cpu().numpy())


def _check_histories(histories: Ragged, num_items: int) -> None:
    if len(histories) and histories.lengths.min() == 0:
        raise ValueError(f"history {int(np.argmin(histories.lengths))} is empty; it needs at least one item")
    outside = (histories.ids < 0) | (histories.ids >= num_items)
    if outside.any():
        raise ValueError(f"history holds item row {int(histories.ids[outside][0])}, outside [0, {num_items})")


def _check_candidates(candidates: np.ndarray, num_items: int) -> Tensor:
    rows = np.asarray(candidates)
    if rows.ndim != 1:
        raise ValueError(f"candidates must be one-dimensional, got shape {rows.shape}")
    if len(rows) and not np.issubdtype(rows.dtype, np.integer):
        raise TypeError(f"candidates must hold item rows (integers), got {rows.dtype}")
    outside = rows[(rows < 0) | (rows >= num_items)]
    if len(outside):
        raise ValueError(f"candidates hold item row {int(outside[0])}, outside [0, {num_items})")
    return torch.from_numpy(rows.astype(np.int64))
