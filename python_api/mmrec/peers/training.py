"""Trains peers as the published tables did: Adam, early stopping on the validation part, the best epoch's weights."""

from __future__ import annotations

import copy
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..evaluation import Ragged, Split
from ..evaluation.metrics import Metric, per_user
from ..evaluation.protocols import Seen, Stage
from ..evaluation.ranking import rank
from ..recommender.batches import epoch_batches
from .pairwise import Pairwise
from .sequential import SASRec

__all__ = ["Fitted", "FitConfig", "FittedSequence", "PairwiseConfig", "SequenceConfig", "fit_pairwise", "fit_sequence"]

Curves = list[dict[str, float]]
Progress = Callable[[dict[str, float]], None]
Best = TypeVar("Best", "Fitted", "FittedSequence")


@dataclass(frozen=True)
class FitConfig:
    """How a peer is trained.

    Attributes:
        weight_decay: see the kind of model.
        learning_rate: of Adam.
        batch_size: interactions, or histories, per step.
        epochs: at most.
        patience: epochs without a better validation value after which training ends.
        metric: that is validated, and decides which epoch's weights are kept.
        seed: of initial weights, order, dropout and negatives.
    """

    weight_decay: float = 0.0
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


@dataclass(frozen=True)
class PairwiseConfig(FitConfig):
    """Of a `Pairwise` model: one uniform negative per interaction; `weight_decay` is λ of `λ/2 · Σ θ² / batch`, over
    the parameters that a batch's scores read."""

    weight_decay: float = 1e-4


@dataclass(frozen=True)
class SequenceConfig(FitConfig):
    """Of a `SASRec`: windows of histories whose every position predicts the next item; `weight_decay` as in AdamW."""

    batch_size: int = 128
    epochs: int = 200
    patience: int = 10
    metric: str = "NDCG@10"


@dataclass(frozen=True, eq=False)
class Fitted:
    """A trained pairwise model's vectors, of the best epoch.

    Attributes:
        users: `[U, D]`.
        items: `[I, D]`.
        curves: per epoch `epoch`, `loss`, `valid`, `seconds`.
        best_epoch: from 1.
    """

    users: Tensor
    items: Tensor
    curves: Curves = field(default_factory=list)
    best_epoch: int = 0

    def __call__(
        self, split: Split, stage: Stage, k: int, *, mask: Seen | None = None, candidates: np.ndarray | None = None
    ) -> np.ndarray:
        """Ranks, see `mmrec.evaluation.ranking.rank`."""
        query = self.users[torch.from_numpy(split.users(stage))]
        return rank(query, self.items, split, stage, k, mask=mask, candidates=candidates)


@dataclass(frozen=True, eq=False)
class FittedSequence:
    """A trained sequence model, of the best epoch.

    Attributes:
        model: in eval mode.
        curves, best_epoch: as in `Fitted`.
    """

    model: SASRec
    curves: Curves = field(default_factory=list)
    best_epoch: int = 0

    @torch.no_grad()
    def __call__(
        self, split: Split, stage: Stage, k: int, *, mask: Seen | None = None, candidates: np.ndarray | None = None
    ) -> np.ndarray:
        """Ranks, see `mmrec.evaluation.ranking.rank`."""
        query = self.model.states(split.history(stage).rows(split.users(stage)))
        return rank(query, self.model.item.detach(), split, stage, k, mask=mask, candidates=candidates)


def fit_pairwise(
    make: Callable[[], Pairwise], split: Split, config: PairwiseConfig | None = None, *,
    progress: Progress | None = None,
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
    return _PairwiseFit(make, split, config or PairwiseConfig()).run(progress)


def fit_sequence(
    make: Callable[[], SASRec], split: Split, config: SequenceConfig | None = None, *,
    progress: Progress | None = None,
) -> FittedSequence:  # fmt: skip
    """The same for a sequence model, whose histories are in the order of time.

    Raises:
        ValueError: no user with two interactions to learn from, or nobody to validate with.
    """
    return _SequenceFit(make, split, config or SequenceConfig()).run(progress)


class _Fit(ABC, Generic[Best]):
    """Epochs until the validation value stops growing."""

    def __init__(self, split: Split, config: FitConfig) -> None:
        self.split, self.config = split, config
        self.random = np.random.default_rng(config.seed)
        if not len(split.train.ids):
            raise ValueError("split has no training interactions")
        if not len(split.users("valid")):
            raise ValueError("split has no users to validate with")

    @abstractmethod
    def epoch(self, number: int) -> float:
        """Trains for one epoch, from 1; the mean loss."""

    @abstractmethod
    def snapshot(self, curves: Curves, number: int) -> Best:
        """What has been learned so far, which later epochs do not change."""

    def run(self, progress: Progress | None) -> Best:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed + 1)  # another stream than that of the initial weights
            return self._run(progress)

    def _run(self, progress: Progress | None) -> Best:
        curves: Curves = []
        best, best_score = self.snapshot(curves, 0), -math.inf
        for number in range(1, self.config.epochs + 1):
            began = time.monotonic()
            loss = self.epoch(number)
            if not math.isfinite(loss):
                raise ValueError(f"the loss became {loss} in epoch {number}; a lower learning_rate may help")
            now = self.snapshot(curves, number)
            score = self._valid(now)
            curves.append({"epoch": number, "loss": loss, "valid": score, "seconds": time.monotonic() - began})
            if progress is not None:
                with torch.random.fork_rng(devices=[]):  # whatever it draws
                    progress(curves[-1])
            if score > best_score:
                best, best_score = now, score
            elif number - best.best_epoch >= self.config.patience:
                break
        return best

    def _valid(self, fitted: Best) -> float:
        parsed = Metric.parse(self.config.metric)
        ranked = fitted(self.split, "valid", parsed.depth)
        return float(per_user(ranked, self.split.relevant("valid"), [parsed])[str(parsed)].mean())


class _PairwiseFit(_Fit[Fitted]):
    def __init__(self, make: Callable[[], Pairwise], split: Split, config: PairwiseConfig) -> None:
        super().__init__(split, config)
        self.model = _made(make, config.seed)
        self.negatives = Negatives(split.train, split.num_items) if self.model.negatives else None
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config.learning_rate)

    def epoch(self, number: int) -> float:
        model, train, config = self.model, self.split.train, self.config
        model.begin_epoch(self.random)
        order = self.random.permutation(len(train.ids))
        total = 0.0
        for start in range(0, len(order), config.batch_size):
            part = order[start : start + config.batch_size]
            users = train.row_of[part]
            # Where the loss reads no negatives, any rows do.
            others = train.ids[part] if self.negatives is None else self.negatives.draw(users, self.random)
            rows = (users, train.ids[part], others)
            user, chosen, other = (torch.from_numpy(row.astype(np.int64)) for row in rows)
            loss = model.loss(user, chosen, other, config.weight_decay)
            total += _step(self.optimizer, loss) * len(part)
        return total / len(order)

    def snapshot(self, curves: Curves, number: int) -> Fitted:
        with torch.no_grad():
            users, items = self.model.vectors()
        return Fitted(users.detach().clone(), items.detach().clone(), curves, number)


class _SequenceFit(_Fit[FittedSequence]):
    def __init__(self, make: Callable[[], SASRec], split: Split, config: SequenceConfig) -> None:
        super().__init__(split, config)
        if split.train.lengths.max() < 2:
            raise ValueError("nothing to train on: no user has two interactions in the training part")
        self.model = _made(make, config.seed)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )

    def epoch(self, number: int) -> float:
        config = self.config
        self.model.train()
        total, positions = 0.0, 0
        for batch in epoch_batches(
            self.split.train, self.model.max_length, config.batch_size, seed=config.seed, epoch=number
        ):
            loss = self.model.loss(batch.index, batch.offsets, batch.target)
            total += _step(self.optimizer, loss) * len(batch.target)
            positions += len(batch.target)
        return total / positions

    def snapshot(self, curves: Curves, number: int) -> FittedSequence:
        return FittedSequence(copy.deepcopy(self.model).eval(), curves, number)


Model = TypeVar("Model", bound=torch.nn.Module)


def _made(make: Callable[[], Model], seed: int) -> Model:
    """The model with the initial weights of `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> float:
    """One step down; the loss before it."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return float(loss.detach())


class Negatives:
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
