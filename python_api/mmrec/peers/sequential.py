"""Sequence models of item identities: SASRec, with the objective of its paper and those that came after."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmrec_kernels import info_nce

from ..evaluation import Ragged
from ..recommender.batches import last_windows
from ..recommender.user_tower import UserTower

__all__ = ["SASRec"]

Loss = Literal["binary", "sampled", "softmax"]
_DRAWS = 1000


class SASRec(nn.Module):
    """A causal transformer over embeddings of items, whose states are multiplied by the same embeddings (Kang and
    McAuley, 2018, arXiv:1808.09781).

    Losses: "binary", the paper's: the next item against one item outside the window, each by its own sigmoid;
    "sampled", softmax over the next item and `negatives` uniform ones that a step's positions share, those that are a
    position's own next item left out; "softmax" over all trained items. With `gated` blocks and "sampled" or "softmax"
    it is eSASRec (Tikhonovich et al., 2025, arXiv:2508.06450).

    Args:
        trained: bool `[I]`, items that training interacts with: only these are negatives.
        width, layers, heads, dropout, max_length: of the transformer, `UserTower`.
        gated: LiGR blocks.
        loss: see above.
        negatives: of "sampled".
    """

    known: Tensor
    place: Tensor

    def __init__(
        self, trained: np.ndarray, *, width: int = 64, layers: int = 2, heads: int = 2, dropout: float = 0.5,
        max_length: int = 50, gated: bool = False, loss: Loss = "softmax", negatives: int = 512,
    ) -> None:  # fmt: skip
        super().__init__()
        if loss not in ("binary", "sampled", "softmax"):
            raise ValueError(f"loss must be 'binary', 'sampled' or 'softmax', got {loss!r}")
        if negatives < 1:
            raise ValueError(f"negatives must be at least 1, got {negatives}")
        self.loss_name, self.negatives, self.max_length = loss, negatives, max_length
        if layers < 1 or heads < 1 or width < 1 or width % heads:
            raise ValueError(
                "layers, heads and width must be at least 1, and width a multiple of heads, "
                f"got {layers}, {heads}, {width}"
            )
        self.register_buffer("known", torch.from_numpy(np.flatnonzero(trained)), persistent=False)
        place = torch.full((len(trained),), -1)
        place[self.known] = torch.arange(len(self.known))
        self.register_buffer("place", place, persistent=False)
        self.item = nn.Parameter(torch.empty(len(trained), width).normal_(std=width**-0.5))
        self.tower = UserTower(width, layers=layers, heads=heads, max_length=max_length, dropout=dropout, gated=gated)

    def loss(self, index: Tensor, offsets: Tensor, target: Tensor) -> Tensor:
        """Of windows of histories end to end: items `index [T]`, `offsets [B + 1]`, and the items `target [T]` that
        follow."""
        states = self.tower(self.item, index, offsets)
        strange = target[self.place[target] < 0]
        if len(strange):
            raise ValueError(f"target holds item row {int(strange[0])}, which is not a trained item")
        if self.loss_name == "binary":
            other = self._outside(index, offsets, target)
            right, wrong = ((states * self.item.index_select(0, rows)).sum(1) for rows in (target, other))
            return (F.softplus(-right) + F.softplus(wrong)).mean()
        if self.loss_name == "sampled":
            drawn = self._drawn(self.negatives)
            own = (states * self.item.index_select(0, target)).sum(1, keepdim=True)
            others = states @ self.item.index_select(0, drawn).T
            others = others.masked_fill(drawn == target[:, None], -torch.inf)
            return F.cross_entropy(torch.cat([own, others], 1), torch.zeros_like(target))
        known = self.item.index_select(0, self.known)
        return info_nce(states, known, symmetric=False, target=self.place[target])

    def states(self, histories: Ragged, *, batch_size: int = 512) -> Tensor:
        """`[B, d]` after each history's last item; none may be empty. Only the last `max_length` items are read."""
        windows = last_windows(histories, self.max_length, batch_size)
        found = [self.tower(self.item, index, offsets, last=True) for index, offsets in windows]
        return torch.cat([self.item.new_empty(0, self.item.shape[1]), *found])

    def _outside(self, index: Tensor, offsets: Tensor, target: Tensor) -> Tensor:
        """For each position a trained item that its window does not have."""
        window = torch.arange(len(offsets) - 1).repeat_interleave(offsets.diff()) * len(self.item)
        taken = torch.cat([window + index, window + target])
        found = self._drawn(len(target))
        for _ in range(_DRAWS):
            wrong = torch.isin(window + found, taken).nonzero()[:, 0]
            if not len(wrong):
                return found
            found[wrong] = self._drawn(len(wrong))
        raise ValueError("a history has nearly all trained items: there is no negative for it")

    def _drawn(self, count: int) -> Tensor:
        return self.known[torch.randint(len(self.known), (count,))]
