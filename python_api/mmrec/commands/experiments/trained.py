"""Trainings of the recommender as parts of an experiment: settings that they share, and runs that are kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..console import say
from ..data import Data
from ..evaluate import with_metrics
from ..runs import TrainedRun, fit
from ..settings import Choices
from .base import Context

if TYPE_CHECKING:
    from ...adaptation import Catalogue
    from ...recommender.config import RecommenderConfig

__all__ = ["METRICS", "TrainingSettings", "train_all"]

METRICS = ("HR@10", "NDCG@10")


@dataclass(frozen=True)
class TrainingSettings:
    """How the recommender is trained.

    Attributes:
        modalities, epochs, backbone, quantize, lora: as the options of ``mmrec train``.
        train: further hyper-parameters, ``NAME=VALUE`` each.
    """

    modalities: str = "all"
    epochs: int = 8
    backbone: str | None = None
    quantize: str = "nf4"
    lora: int = 0
    train: tuple[str, ...] = ("dropout=0.5", "batch_size=128", "weight_decay=0.05")

    def config(self, catalogue: Catalogue) -> RecommenderConfig:
        """For the catalogue, with seed 0."""
        choices = Choices(
            modalities=self.modalities, backbone=self.backbone, quantize=self.quantize, lora=self.lora,
            epochs=self.epochs, settings=self.train,
        )  # fmt: skip
        return choices.config(catalogue, 0)


def train_all(
    context: Context,
    data: Data,
    configs: Mapping[str, RecommenderConfig],
    *,
    hold_out: float | None = None,
    metrics: Sequence[str] = METRICS,
) -> dict[str, list[TrainedRun]]:
    """Per name a run for each seed, seed by seed; those that are finished are used as they are.

    The folder of a run tells its config apart from others of the same name: with other settings there are other runs.
    """
    found: dict[str, list[TrainedRun]] = {name: [] for name in configs}
    source = context.source(data.split.protocol, hold_out=hold_out)
    for number, seed in enumerate(context.seeds, 1):
        for name, config in configs.items():
            say(f"seed {seed} ({number} of {len(context.seeds)}), {name}")
            folder = context.out / "runs" / f"{name}-{_digest(config)}" / f"seed-{seed}"
            found[name].append(
                fit(data, config.replace(seed=seed), folder, source, resume=True, metrics=with_metrics(metrics))
            )
    return found


def _digest(config: RecommenderConfig) -> str:
    told = json.dumps(config.replace(seed=0).to_dict(), sort_keys=True)
    return hashlib.sha256(told.encode()).hexdigest()[:8]
