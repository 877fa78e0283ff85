"""The training loop: epochs, early stopping, checkpoints, Ctrl-C."""

from __future__ import annotations

import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...evaluation.metrics import per_user
from ...evaluation.protocols import Split
from ...evaluation.ranking import rank
from ...fusion.tokens import gather_ragged
from ..batches import Batch, epoch_batches, num_batches
from ..config import RecommenderConfig
from ..inputs import ItemInputs
from ..model import ItemVectors, Recommender
from ..objective import Objective
from .features import Content
from .state import CHECKPOINT, State, learning_rate_share
from .storage import exists

__all__ = ["Progress", "Trained", "train"]

_VALID = "NDCG@10"
_SAVE_SECONDS = 60.0


@dataclass(frozen=True)
class Trained:
    """A trained model with the weights of its best epoch.

    Attributes:
        items: the vectors of all items.
        curves: per epoch ``epoch``, ``loss``, ``alignment``, ``disentangle``, ``router``, ``valid`` (NDCG@10) and
            ``seconds``.
        best_epoch: the epoch, from 1, whose weights these are.
        load: tokens per content modality and expert in the last epoch, or None.
        adapter: what was trained of the language model: its adapter, or weights of its own.
    """

    model: Recommender
    items: ItemVectors
    curves: list[dict[str, float]]
    best_epoch: int
    load: list[list[float]] | None
    adapter: dict[str, torch.Tensor] = field(default_factory=dict)


Progress = Callable[[int, int, float, str], None]
"""``progress(done, total, loss, note)`` after every step."""


def train(
    content: Content,
    split: Split,
    config: RecommenderConfig,
    folder: Path,
    identity: dict[str, Any],
    *,
    resume: bool = False,
) -> Trained:
    """Trains and returns the best model by NDCG@10 on the validation items.

    A checkpoint is written when the first Ctrl-C arrives (after the step at hand, then ``KeyboardInterrupt``), and
    after an epoch if the last one is a minute old. A resumed run gives the same bits as one that was never interrupted,
    on the same machine and thread count.

    Args:
        folder: where the checkpoint lives; ``identity`` is stored with it and must be the same on resuming.
        resume: go on from the checkpoint if there is one.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(config.seed))
        loop = _Loop(content, split, config, folder, identity)
        if resume and exists(folder, CHECKPOINT):
            loop.state.load_from(folder, identity)
        with _progress_bar(loop.total) as progress, _deferred_interrupt() as interrupted:
            loop.run(progress, interrupted)
        return loop.finish()


class _Loop:
    def __init__(
        self, content: Content, split: Split, config: RecommenderConfig, folder: Path, identity: dict[str, Any]
    ) -> None:
        self.content, self.split, self.config, self.folder, self.identity = content, split, config, folder, identity
        trained = split.popularity > 0
        self.known = torch.from_numpy(np.flatnonzero(trained))
        model = Recommender(config, content.inputs.spec, trained)
        model.item_tower.fit_whitening(content.inputs, self.known)
        objective = Objective(model, split.popularity)
        tuned = content.backbone is not None
        text = content.inputs.tokens["text"].values.clone() if tuned else None
        self.state = State.fresh(model, objective, config, content.backbone, text)
        self.known_inputs = model.item_tower.whiten_inputs(content.inputs.select(self.known))
        self.total = num_batches(split.train, config.max_length, config.batch_size) * config.epochs
        self.saved = time.monotonic()

    def run(self, progress: Progress, interrupted: Callable[[], bool]) -> None:
        state, config = self.state, self.config
        while state.epoch < config.epochs and state.stale < config.patience:
            batches = epoch_batches(
                self.split.train, config.max_length, config.batch_size, seed=int(config.seed), epoch=state.epoch
            )
            if not batches:
                raise ValueError("nothing to train on: no user has two interactions in the training part")
            start = time.monotonic()
            for batch in batches[state.batch :]:
                loss = self._step(batch)
                state.batch += 1
                state.step += 1
                best = "" if state.best_score is None else f"valid {_VALID} {state.best_score:.4f}"
                progress(state.step, self.total, loss, f"epoch {state.epoch + 1}  {best}")
                if interrupted():
                    self._save()
                    raise KeyboardInterrupt(f"{self.folder}: saved in epoch {state.epoch + 1}; --resume goes on")
            self._end_epoch(len(batches), time.monotonic() - start)
            if time.monotonic() - self.saved > _SAVE_SECONDS:
                self._save()

    def finish(self) -> Trained:
        state = self.state
        state.restore(state.best)
        inputs = self.content.inputs
        if state.backbone is not None:
            inputs = self._with_best_text()
        items = state.model.eval().item_vectors(inputs)
        adapter = {} if state.backbone is None else state.backbone.trainable_state_dict()
        return Trained(state.model, items, state.curves, state.best_epoch, state.load, adapter)

    def _save(self) -> None:
        self.state.save(self.folder, self.identity)
        self.saved = time.monotonic()

    def _step(self, batch: Batch) -> float:
        state, config = self.state, self.config
        state.model.train()
        share = learning_rate_share(state.step, self.total, config.warmup)
        for group in state.optimizer.param_groups:
            group["lr"] = group["peak"] * share
        state.optimizer.zero_grad(set_to_none=True)
        losses = state.objective(state.model, self._inputs(), batch)
        loss = float(losses.total.detach())
        if not math.isfinite(loss):
            raise ValueError(f"the loss became {loss} in epoch {state.epoch + 1}; a lower learning_rate may help")
        losses.total.backward()
        if config.clip_norm:
            parameters = [p for group in state.optimizer.param_groups for p in group["params"]]
            torch.nn.utils.clip_grad_norm_(parameters, config.clip_norm)
        state.optimizer.step()
        for name, value in losses.parts().items():
            state.sums[name] = state.sums.get(name, 0.0) + float(value)
        if losses.load is not None and state.model.item_tower.experts is not None:
            state.model.item_tower.experts.update_bias(losses.load)
            counts = losses.load.tolist()
            before = state.epoch_load or [[0.0] * len(row) for row in counts]
            state.epoch_load = [[a + b for a, b in zip(x, y, strict=True)] for x, y in zip(before, counts, strict=True)]
        return loss

    def _inputs(self) -> ItemInputs:
        """Content of the known items; where the backbone trains, some of their texts are encoded anew, with gradients.

        The vectors of all other items are those of the last time they were drawn. A step costs one forward and backward
        pass of the backbone over the texts of ``tune_items`` items.
        """
        state, inputs = self.state, self.content.inputs
        if state.backbone is None or state.text is None or inputs.texts is None:
            return self.known_inputs
        chosen = self.known[torch.randperm(len(self.known))[: int(self.config.tune_items)]]
        rows, _ = gather_ragged(inputs.tokens["text"].offsets, chosen)
        if not len(rows):
            return inputs.with_text(state.text).select(self.known)
        state.backbone.train()
        encoded = state.backbone.encode(
            [inputs.texts[i] for i in rows.tolist()], requires_grad=True, progress=False
        ).pooled
        assert encoded is not None
        values = state.text.index_copy(0, rows, encoded.float())
        state.text = values.detach()
        return inputs.with_text(values).select(self.known)

    def _end_epoch(self, batches: int, seconds: float) -> None:
        state = self.state
        means = {name: value / batches for name, value in state.sums.items()}
        row = {"epoch": state.epoch + 1, **means, "seconds": seconds}
        state.load, state.epoch_load = state.epoch_load, None
        state.sums, state.batch = {}, 0
        state.epoch += 1
        if state.epoch % self.config.evaluate_every == 0 or state.epoch == self.config.epochs:
            score = self._valid()
            if score is not None:
                row["valid"] = score
            # Without validation users nothing can be chosen: the latest weights are the result.
            if score is None or state.best_score is None or score > state.best_score:
                state.best, state.best_score, state.best_epoch, state.stale = state.snapshot(), score, state.epoch, 0
            else:
                state.stale += 1
        state.curves.append(row)

    def _valid(self) -> float | None:
        state, split = self.state, self.split
        inputs = self.content.inputs if state.text is None else self.content.inputs.with_text(state.text)
        users = split.users("valid")
        if not len(users):
            return None
        state.model.eval()
        items = state.model.item_vectors(inputs)
        query = state.model.user_vectors(split.history("valid").rows(users), items)
        ranked = rank(query, items.vectors, split, "valid", 10)
        return float(per_user(ranked, split.relevant("valid"), [_VALID])[_VALID].mean())

    def _with_best_text(self) -> ItemInputs:
        inputs, backbone = self.content.inputs, self.state.backbone
        assert backbone is not None and inputs.texts is not None
        pooled = backbone.eval().encode(inputs.texts).pooled
        assert isinstance(pooled, Tensor)
        return inputs.with_text(pooled.float())


@contextmanager
def _deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C only sets a flag, which the yielded function reads; the second one acts at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    signal.signal(signal.SIGINT, note)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _progress_bar(total: int) -> Iterator[Progress]:
    """A bar on stderr where that is a terminal, else nothing."""
    if not sys.stderr.isatty():
        yield lambda done, total, loss, note: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Bars(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("training", total=total)
        yield lambda done, total, loss, note: bar.update(task, completed=done, description=f"{note}  loss {loss:.3f}")
