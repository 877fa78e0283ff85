"""The training loop: epochs, early stopping, checkpoints, Ctrl-C; in one process or in several."""

from __future__ import annotations

import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...evaluation.metrics import per_user
from ...evaluation.protocols import Split
from ...evaluation.ranking import rank
from ..batches import Batch, epoch_batches, num_batches
from ..config import RecommenderConfig
from ..inputs import ItemInputs
from ..model import ItemVectors, Recommender
from ..objective import Objective
from ..parallel import ALONE, Alone
from .features import Content
from .state import CHECKPOINT, State, learning_rate_share
from .step import Step
from .storage import exists

__all__ = ["Progress", "Trained", "train"]

_VALID = "NDCG@10"
# Between checkpoints: this long, and so many times as long as writing one takes.
_SAVE_SECONDS, _SAVE_SHARE = 60.0, 50.0


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
    ranks: Alone = ALONE,
) -> Trained:
    """Trains and returns the best model by NDCG@10 on the validation items.

    A checkpoint is written when the first Ctrl-C arrives (after the step at hand, then ``KeyboardInterrupt``), and
    after a step if the last one is a minute old and took less than a fiftieth of the time since. A resumed run gives
    the same bits as one that was never interrupted, on the same machine, thread count and number of ranks.

    Args:
        folder: where the checkpoint lives; ``identity`` is stored with it and must be the same on resuming.
        resume: go on from the checkpoint if there is one, by whatever number of ranks it was written.
        ranks: who trains together, see :func:`.several`; every rank calls this alike and returns the same. The first
            one writes; the others read from the same folder.

    Raises:
        ConnectionError: another rank is gone.
    """
    with torch.random.fork_rng(devices=[]), ranks.guarded():
        torch.manual_seed(int(config.seed))
        loop = _Loop(content, split, config, folder, identity, ranks)
        if resume and exists(folder, CHECKPOINT):
            loop.state.load_from(folder, identity, ranks)
        ranks.check_same(f"step {loop.state.step}", folder)
        shown = ranks.rank == 0
        with _progress_bar(loop.total, shown) as progress, _deferred_interrupt(ranks.signals) as interrupted:
            loop.run(progress, interrupted)
        return loop.finish()


class _Loop:
    def __init__(
        self,
        content: Content,
        split: Split,
        config: RecommenderConfig,
        folder: Path,
        identity: dict[str, Any],
        ranks: Alone,
    ) -> None:
        self.content, self.split, self.config, self.folder, self.identity = content, split, config, folder, identity
        self.ranks = ranks
        trained = split.popularity > 0
        known = torch.from_numpy(np.flatnonzero(trained))
        model = Recommender(config, content.inputs.spec, trained)
        model.item_tower.fit_whitening(content.inputs, known)
        objective = Objective(model, split.popularity)
        tuned = [] if content.backbone is None else content.backbone.trainable_parameters()
        ranks.equalize([*model.parameters(), *model.buffers(), *objective.parameters(), *tuned])
        known_inputs = model.item_tower.whiten_inputs(content.inputs.select(known))
        # Of a backbone's own weights some may have no part in pooled vectors, and a step may draw no text.
        step = Step(model, objective, content, known, known_inputs, ranks)
        self.step = ranks.wrap(step, unused=content.backbone is not None)
        text = content.inputs.tokens["text"].values.clone() if content.backbone is not None else None
        self.state = State.fresh(model, objective, config, content.backbone, text)
        self.total = num_batches(split.train, config.max_length, config.batch_size) * config.epochs
        self.saved, self.saving = time.monotonic(), 0.0

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
                stop, due = self.ranks.any(interrupted(), self._due())
                if stop or due:
                    self._save()
                if stop:
                    raise KeyboardInterrupt(f"{self.folder}: saved in epoch {state.epoch + 1}; --resume goes on")
            self._end_epoch(len(batches), time.monotonic() - start)

    def finish(self) -> Trained:
        state, ranks = self.state, self.ranks
        state.restore(state.best)
        inputs, model = self.content.inputs, state.model
        adapter: dict[str, Tensor] = {}
        if state.backbone is not None:
            with ranks.whole(self.step):
                inputs = self._with_best_text()
            adapter = ranks.full(state.backbone.trainable_state_dict())
        if ranks.sharded:
            model = Recommender(self.config, inputs.spec, self.split.popularity > 0)
            model.load_state_dict(ranks.full(state.model.state_dict()))
        items = model.eval().item_vectors(inputs)
        return Trained(model, items, state.curves, state.best_epoch, state.load, adapter)

    def _due(self) -> bool:
        return time.monotonic() - self.saved > max(_SAVE_SECONDS, _SAVE_SHARE * self.saving)

    def _save(self) -> None:
        start = time.monotonic()
        self.state.save(self.folder, self.identity, self.ranks)
        self.saved = time.monotonic()
        self.saving = self.saved - start

    def _step(self, batch: Batch) -> float:
        state, config = self.state, self.config
        state.model.train()
        share = learning_rate_share(state.step, self.total, config.warmup)
        for group in state.optimizer.param_groups:
            group["lr"] = group["peak"] * share
        parameters: Sequence[nn.Parameter] = [p for group in state.optimizer.param_groups for p in group["params"]]
        state.optimizer.zero_grad(set_to_none=True)
        with self.ranks.apart(int(config.seed), state.step):
            own, state.text = self.step(batch, state.text)
            losses = self.ranks.average(own)
            loss = float(losses.total.detach())
            if not math.isfinite(loss):
                raise ValueError(f"the loss became {loss} in epoch {state.epoch + 1}; a lower learning_rate may help")
            own.total.backward()
        self.ranks.settle(parameters)
        if config.clip_norm:
            self.ranks.clip(parameters, config.clip_norm)
        state.optimizer.step()
        for name, value in losses.parts().items():
            state.sums[name] = state.sums.get(name, 0.0) + float(value)
        if losses.load is not None and state.model.item_tower.experts is not None:
            state.model.item_tower.experts.update_bias(losses.load)
            counts = losses.load.tolist()
            before = state.epoch_load or [[0.0] * len(row) for row in counts]
            state.epoch_load = [[a + b for a, b in zip(x, y, strict=True)] for x, y in zip(before, counts, strict=True)]
        return loss

    def _end_epoch(self, batches: int, seconds: float) -> None:
        state = self.state
        means = {name: value / batches for name, value in state.sums.items()}
        row = {"epoch": state.epoch + 1, **means, "seconds": seconds}
        state.load, state.epoch_load = state.epoch_load, None
        state.sums, state.batch = {}, 0
        state.epoch += 1
        if state.epoch % self.config.evaluate_every == 0 or state.epoch == self.config.epochs:
            with self.ranks.whole(self.step):
                score = self.ranks.by_first(self._valid)
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
        own = self.ranks.share(torch.arange(len(inputs.texts)))
        pooled = backbone.eval().encode([inputs.texts[i] for i in own.tolist()]).pooled
        assert isinstance(pooled, Tensor)
        return inputs.with_text(self.ranks.gather(pooled.float(), len(inputs.texts)))


@contextmanager
def _deferred_interrupt(signals: Sequence[signal.Signals]) -> Iterator[Callable[[], bool]]:
    """Inside, the first of these signals only sets a flag, which the yielded function reads; the second one acts at
    once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def note(number: int, frame: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = [signal.signal(number, note) for number in signals]
    try:
        yield asked.is_set
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


@contextmanager
def _progress_bar(total: int, shown: bool) -> Iterator[Progress]:
    """A bar on stderr where that is a terminal and it is to be shown, else nothing."""
    if not (shown and sys.stderr.isatty()):
        yield lambda done, total, loss, note: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Bars(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("training", total=total)
        yield lambda done, total, loss, note: bar.update(task, completed=done, description=f"{note}  loss {loss:.3f}")
