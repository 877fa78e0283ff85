"""Everything that changes during training, in a form that resumes to the same bits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..config import RecommenderConfig
from ..model import Recommender
from ..objective import Objective
from ..parallel import ALONE, Alone
from .storage import load_tensors, save_tensors

if TYPE_CHECKING:
    from ...llm import Backbone

__all__ = ["CHECKPOINT", "State", "learning_rate_share"]

CHECKPOINT = "checkpoint"
_FLOOR = 0.05


def learning_rate_share(step: int, total: int, warmup: float) -> float:
    """Share of the peak learning rate at ``step`` of ``total``: linear warm-up, then a cosine to a twentieth."""
    rising = max(1, round(total * warmup))
    if step < rising:
        return (step + 1) / rising
    done = min(1.0, (step - rising) / max(1, total - rising))
    return _FLOOR + (1 - _FLOOR) * 0.5 * (1 + math.cos(math.pi * done))


@dataclass
class State:
    """Weights, optimiser, how far training has come, and the best weights so far.

    Attributes:
        text: the text vectors ``[T, d]`` that training reads, where training the backbone changes them; else None.
        epoch, batch: the batch of the epoch that comes next; ``step`` counts all batches so far.
        sums: running sums of the losses of this epoch, by name.
        best: tensors of the best evaluation so far, ``best_score`` its NDCG@10, ``best_epoch`` its epoch (from 1).
        stale: evaluations since then.
        curves: one row per finished epoch.
        load: tokens per modality and expert in the last finished epoch, or None.
    """

    model: Recommender
    objective: Objective
    optimizer: torch.optim.Optimizer
    backbone: Backbone | None
    text: Tensor | None
    epoch: int = 0
    batch: int = 0
    step: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    best: dict[str, Tensor] = field(default_factory=dict)
    best_score: float | None = None
    best_epoch: int = 0
    stale: int = 0
    curves: list[dict[str, float]] = field(default_factory=list)
    load: list[list[float]] | None = None
    epoch_load: list[list[float]] | None = None

    _COUNTERS = ("epoch", "batch", "step", "sums", "best_score", "best_epoch", "stale", "curves", "load", "epoch_load")

    @classmethod
    def fresh(
        cls,
        model: Recommender,
        objective: Objective,
        config: RecommenderConfig,
        backbone: Backbone | None,
        text: Tensor | None,
    ) -> State:
        """The state before the first step."""
        return cls(model, objective, _optimizer(model, objective, config, backbone), backbone, text)

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of the weights that decide answers: the model, and what is trained of the backbone."""
        found = {f"model.{name}": value.detach().clone() for name, value in self.model.state_dict().items()}
        if self.backbone is not None:
            found |= {f"adapter.{name}": value for name, value in self.backbone.trainable_state_dict().items()}
        return found

    def restore(self, snapshot: dict[str, Tensor]) -> None:
        """Puts the weights of a :meth:`snapshot` back."""
        self.model.load_state_dict(_under("model.", snapshot))
        if self.backbone is not None:
            self.backbone.load_trainable_state_dict(_under("adapter.", snapshot))

    def save(self, folder: Path, identity: dict[str, Any], ranks: Alone = ALONE) -> None:
        """Writes the checkpoint, the same for any number of ranks; ``identity`` says what run it belongs to."""
        tensors = {f"now.{name}": value for name, value in self.snapshot().items()}
        tensors |= {f"best.{name}": value for name, value in self.best.items()}
        tensors |= {f"objective.{name}": value for name, value in self.objective.state_dict().items()}
        tensors |= dict(self._moments())
        if self.text is not None:
            tensors["text"] = self.text
        tensors["random"] = torch.get_rng_state()
        tensors = ranks.full(tensors)
        counters = {name: getattr(self, name) for name in self._COUNTERS}
        if ranks.rank == 0:
            save_tensors(folder, CHECKPOINT, tensors, {"identity": identity, "counters": counters})

    def load_from(self, folder: Path, identity: dict[str, Any], ranks: Alone = ALONE) -> None:
        """Continues where :meth:`save` stopped; ``ValueError`` for a damaged checkpoint or one of another run."""
        tensors, facts = load_tensors(folder, CHECKPOINT)
        different = sorted(k for k in identity if facts.get("identity", {}).get(k) != identity[k])
        if different:
            raise ValueError(
                f"{folder}: the checkpoint is of a run with another {', '.join(different)}; use another folder"
            )
        try:
            own = self.snapshot()
            self.restore(ranks.parts(_under("now.", tensors), own))
            objective = ranks.parts(_under("objective.", tensors), self.objective.state_dict())
            self.objective.load_state_dict(objective)
            self._load_moments(_under("optimizer.", tensors), ranks)
            for name in self._COUNTERS:
                setattr(self, name, facts["counters"][name])
        except (KeyError, RuntimeError) as error:
            raise ValueError(
                f"{folder}: the checkpoint does not fit this version ({str(error).splitlines()[0]})"
            ) from None
        self.best = ranks.parts(_under("best.", tensors), own)
        if self.text is not None:
            self.text = tensors["text"]
        torch.set_rng_state(tensors["random"])

    def _moments(self) -> Iterator[tuple[str, Tensor]]:
        for index, values in self.optimizer.state_dict()["state"].items():
            for name, value in values.items():
                yield f"optimizer.{index}.{name}", torch.as_tensor(value)

    def _load_moments(self, tensors: dict[str, Tensor], ranks: Alone) -> None:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            index, name = key.split(".", 1)
            state.setdefault(int(index), {})[name] = value
        for place, values in state.items():
            # The count of steps is a scalar beside moments of the parameter's shape.
            like: dict[str, Tensor] = {name: parameters[place] for name, value in values.items() if value.ndim}
            state[place] = ranks.parts(values, like)
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})


def _optimizer(
    model: Recommender, objective: Objective, config: RecommenderConfig, backbone: Backbone | None
) -> torch.optim.Optimizer:
    parameters: list[nn.Parameter] = [*model.parameters(), *objective.parameters()]
    groups: list[dict[str, Any]] = [
        {
            "params": [p for p in parameters if p.ndim > 1],
            "weight_decay": config.weight_decay,
            "peak": config.learning_rate,
        },
        # Biases, norms and scales: shrinking them towards zero regularises nothing.
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0, "peak": config.learning_rate},
    ]
    if backbone is not None:
        tuned = backbone.trainable_parameters()
        groups.append({"params": tuned, "weight_decay": 0.0, "peak": config.backbone_learning_rate})
    return torch.optim.AdamW(groups, lr=config.learning_rate)


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
