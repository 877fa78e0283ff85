"""Trains pairwise models as the published tables did: Adam, one uniform negative per interaction, early stopping."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..evaluation import Ragged, Split
from ..evaluation.metrics import per_user
from ..evaluation.protocols import Seen, Stage
from ..evaluation.ranking import rank
from .pairwise import Pairwise

__all__ = ["Fitted", "PairwiseConfig", "fit_pairwise"]


@dataclass(frozen=True)
class PairwiseConfig:
    """How a pairwise model is trained.

    Attributes:
        weight_decay: λ of `λ/2 · Σ θ² / batch`, over the parameters that a batch's scores read.
        learning_rate: of Adam.
        batch_size: interactions per step.
        epochs: at most.
        patience: epochs without a better validation value after which training ends.
        metric: that is validated, and decides which epoch's weights are kept.
        seed: of initial weights, order and negatives.
    """

    weight_decay: float = 1e-4
    learning_rate: float = 1e-3
    batch_size: int = 2048
    epochs: int = 1000
    patience: int = 20
    metric: str = "Recall@20"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("learning_rate", "batch_size", "epochs", "patience"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay must be at least 0, got {self.weight_decay}")


@dataclass(frozen=True, eq=False)
class Fitted:
    """A trained model's vectors, of the best epoch.

    Attributes:
        users: `[U, D]`.
        items: `[I, D]`.
        curves: per epoch `epoch`, `loss`, `valid`, `seconds`.
        best_epoch: from 1.
    """

    users: Tensor
    items: Tensor
    curves: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int = 0

    def __call__(
        self, split: Split, stage: Stage, k: int, *, mask: Seen | None = None, candidates: np.ndarray | None = None
    ) -> np.ndarray:
        """Ranks, see `mmrec.evaluation.ranking.rank`."""
        query = self.users[torch.from_numpy(split.users(stage))]
        return rank(query, self.items, split, stage, k, mask=mask, candidates=candidates)


def fit_pairwise(
    make: Callable[[], Pairwise], split: Split, config: PairwiseConfig | None = None,
    *, progress: Callable[[dict[str, float]], None] | None = None,
) -> Fitted:  # fmt: skip
    """Trains on the training part of `split`.

    Args:
        make: the model with its initial weights; called with torch's generator seeded.
        split: any protocol.
        config: None for the defaults.
        progress: gets each epoch's row of `Fitted.curves`.

    Raises:
        ValueError: no interaction to learn from, nobody to validate with, or a user who chose all items.
    """
    config = config or PairwiseConfig()
    if not len(split.train.ids):
        raise ValueError("split has no training interactions")
    if not len(split.users("valid")):
        raise ValueError("split has no users to validate with")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = make()
    random = np.random.default_rng(config.seed)
    negatives = _Negatives(split.train, split.num_items)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    curves: list[dict[str, float]] = []
    best, best_score = Fitted(*_detached(model)), -math.inf
    for epoch in range(1, config.epochs + 1):
        began = time.monotonic()
        loss = _epoch(model, optimizer, split.train, negatives, config, random)
        if not math.isfinite(loss):
            raise ValueError(f"the loss became {loss} in epoch {epoch}; a lower learning_rate may help")
        now = Fitted(*_detached(model), curves, epoch)
        score = _valid(now, split, config.metric)
        curves.append({"epoch": epoch, "loss": loss, "valid": score, "seconds": time.monotonic() - began})
        if progress is not None:
            progress(curves[-1])
        if score > best_score:
            best, best_score = now, score
        elif epoch - best.best_epoch >= config.patience:
            break
    return best


def _epoch(
    model: Pairwise, optimizer: torch.optim.Optimizer, train: Ragged, negatives: _Negatives, config: PairwiseConfig,
    random: np.random.Generator,
) -> float:  # fmt: skip
    """Mean loss over one pass through all interactions."""
    order = random.permutation(len(train.ids))
    total = 0.0
    for start in range(0, len(order), config.batch_size):
        part = order[start : start + config.batch_size]
        users = train.row_of[part]
        rows = (users, train.ids[part], negatives.draw(users, random))
        user, chosen, other = (torch.from_numpy(row.astype(np.int64)) for row in rows)
        of_users, of_items = model.vectors()
        query = of_users.index_select(0, user)
        gap = (query * (of_items.index_select(0, chosen) - of_items.index_select(0, other))).sum(1)
        decay = model.size(user, torch.cat([chosen, other])) * (config.weight_decay / 2 / len(part))
        loss = F.softplus(-gap).mean() + decay
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        total += float(loss.detach()) * len(part)
    return total / len(order)


def _detached(model: Pairwise) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        users, items = model.vectors()
    return users.detach().clone(), items.detach().clone()


def _valid(fitted: Fitted, split: Split, metric: str) -> float:
    from ..evaluation.metrics import Metric

    parsed = Metric.parse(metric)
    ranked = fitted(split, "valid", parsed.depth)
    return float(per_user(ranked, split.relevant("valid"), [parsed])[str(parsed)].mean())


class _Negatives:
    """Uniform draws from the trained items that a user did not choose."""

    def __init__(self, train: Ragged, num_items: int) -> None:
        self._items = np.unique(train.ids).astype(np.int64)
        pairs = train.unique()
        self._num_items = num_items
        self._chosen = np.sort(pairs.row_of.astype(np.int64) * num_items + pairs.ids)
        full = np.flatnonzero(pairs.lengths == len(self._items))
        if len(full):
            raise ValueError(f"user row {int(full[0])} chose all {len(self._items)} trained items: nothing is left")

    def draw(self, users: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """int64 `[n]`: an item for each of `users [n]`."""
        found = np.empty(len(users), np.int64)
        open_ = np.arange(len(users))
        while len(open_):
            found[open_] = random.choice(self._items, len(open_))
            key = users[open_].astype(np.int64) * self._num_items + found[open_]
            place = np.searchsorted(self._chosen, key).clip(max=len(self._chosen) - 1)
            open_ = open_[self._chosen[place] == key]
        return found
