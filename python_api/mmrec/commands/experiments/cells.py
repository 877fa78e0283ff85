"""Configs of `PromptedRecommender` as cells of an experiment: trained and evaluated once, then read back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..console import say, status
from ..data import Data
from ..evaluate import with_metrics
from ..kept import kept_result
from .base import Context, Table, limit_users, means

if TYPE_CHECKING:
    from ...evaluation import Result, Split
    from ...recommender.prompted import Examples, PromptedConfig

__all__ = ["METRICS", "CellSettings", "Cells", "facts_of", "mean_of", "means_table", "per_user_values", "row"]

METRICS = ("HR@10", "NDCG@10")


@dataclass(frozen=True)
class CellSettings:
    """What all cells have in common; see `PromptedConfig`. `users`: test users, drawn; `quantize`: "nf4" or "none"."""

    users: int = 1000
    steps: int = 64
    batch_size: int = 32
    history: int = 5
    max_length: int = 128
    learning_rate: float = 1e-3
    prompt_learning_rate: float = 3e-2
    backbone: str | None = None
    quantize: str = "nf4"

    def config(self, **changes: Any) -> PromptedConfig:
        """A cell's config."""
        from ...recommender.prompted import PromptedConfig

        shared = {
            field.name: getattr(self, field.name) for field in dataclasses.fields(CellSettings) if field.name != "users"
        }
        shared["quantize"] = None if self.quantize == "none" else self.quantize
        return PromptedConfig(**{**shared, **changes})


class Cells:
    """Trains and evaluates configs on one split, a sample of whose test users counts, and keeps the results."""

    def __init__(self, context: Context) -> None:
        self.context = context
        data = context.load("S")
        self.split: Split = limit_users(data.split, context.settings.users)
        self.data: Data = dataclasses.replace(data, split=self.split)
        self.texts = self.data.catalogue.item_titles
        self._examples: dict[tuple[int | None, int], Examples] = {}

    def results(self, name: str, config: PromptedConfig, *, most: int | None = None) -> list[Result]:
        """One per seed."""
        return [self._one(name, dataclasses.replace(config, seed=seed), most) for seed in self.context.seeds]

    def _one(self, name: str, config: PromptedConfig, most: int | None) -> Result:
        identity = {
            "config": dataclasses.asdict(config), "examples": most, "split": self.split.id,
            "fingerprint": self.data.fingerprint,
        }  # fmt: skip
        path = self.context.out / "cells" / name.replace(" ", "-") / f"seed-{config.seed}.json"
        return kept_result(path, identity, lambda: self._computed(name, config, most))

    def _computed(self, name: str, config: PromptedConfig, most: int | None) -> Result:
        from ...evaluation import evaluate
        from ...recommender.prompted import PromptedRecommender

        with status(f"{name}, seed {config.seed}"):
            model = PromptedRecommender(config, self.texts)
            model.fit(self._of(config.history, most, config.seed))
            result = evaluate(
                model, self.split, model=name, dataset=self.data.catalogue.name, fingerprint=self.data.fingerprint,
                metrics=with_metrics(METRICS), seed=config.seed, groups=False,
            )  # fmt: skip
        say(f"{name}, seed {config.seed}: NDCG@10 {result.metrics['NDCG@10']:.4f}, {model.num_trained} numbers trained")
        return result

    def available(self, history: int) -> int:
        """How many training interactions there are to learn from."""
        return len(self._of(history, None, 0))

    def _of(self, history: int, most: int | None, seed: int) -> Examples:
        from ...recommender.prompted import Examples

        key = (most, seed if most is not None else 0)
        if key not in self._examples:
            self._examples[key] = Examples.of(self.split, history, most=most, seed=seed)
        return self._examples[key]

    def titles(self) -> dict[str, float]:
        """How many titles prompts tell of, and how many the histories' last `history` items are, on average."""
        import numpy as np

        from ...recommender.prompted import PromptedRecommender

        reader = PromptedRecommender(self.context.settings.config(prompt="plain", rank=0), self.texts)
        histories = self.split.history("test").rows(self.split.users("test"))
        rows = [histories.ids[a:b] for a, b in zip(histories.offsets[:-1], histories.offsets[1:], strict=True)]
        kept = [len(reader.titles(row)) for row in rows]
        return {
            "titles of a prompt": float(np.mean(kept)),
            "of a history's last": float(np.mean([min(len(row), reader.config.history) for row in rows])),
        }

    def floors(self) -> dict[str, list[Result]]:
        """The floors on the same users."""
        from ..rankers import evaluate_floor, floor_names

        return {name: [evaluate_floor(name, self.data, metrics=with_metrics(METRICS))] for name in floor_names(None)}


def per_user_values(results: Sequence[Result], metric: str = "NDCG@10") -> Any:
    import numpy as np

    return np.stack([result.rows["all"].values[metric] for result in results])


def mean_of(results: Sequence[Result], metric: str) -> float:
    return float(per_user_values(results, metric).mean())


def row(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {"model": name, "values": values}


def means_table(
    results: Mapping[str, Sequence[Result]], floors: Mapping[str, Sequence[Result]], title: str = "Means"
) -> Table:
    found = [row(name, values) for name, values in means(results, METRICS).items()]
    found += [{**row(name, values), "floor": True} for name, values in means(floors, METRICS).items()]
    return Table(title, ("model",), found)


def facts_of(cells: Cells, configs: Mapping[str, PromptedConfig]) -> dict[str, Any]:
    return {
        "test users": len(cells.split.users("test")),
        **cells.titles(),
        "cells": {name: dataclasses.asdict(config) for name, config in configs.items()},
    }
