"""From options of the command line to a :class:`.RecommenderConfig`, checked against the catalogue."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..adaptation import Catalogue
    from ..recommender.config import RecommenderConfig

__all__ = ["Choices", "available_modalities", "label", "only"]

ALL = "all"


@dataclass(frozen=True)
class Choices:
    """The training options as they were given; ``settings`` are further fields of the config, ``NAME=VALUE``."""

    modalities: str = ALL
    backbone: str | None = None
    quantize: str = "nf4"
    lora: int = 8
    tune_backbone: bool = False
    epochs: int | None = None
    settings: tuple[str, ...] = ()

    def config_of_content(self, catalogue: Catalogue) -> RecommenderConfig:
        """Of the options that say what content is read and how; ``settings`` belong to something else."""
        return dataclasses.replace(self, settings=(), lora=0, tune_backbone=False, epochs=None).config(catalogue, 0)

    def config(self, catalogue: Catalogue, seed: int) -> RecommenderConfig:
        """The config for ``catalogue``; ``ValueError`` or ``TypeError`` names the option that is wrong."""
        from ..recommender.config import RecommenderConfig

        fields: dict[str, Any] = {
            "modalities": list(_modalities(self.modalities, available_modalities(catalogue), catalogue.name)),
            "backbone": self.backbone,
            "quantize": None if self.quantize == "none" else self.quantize,
            "lora_rank": self.lora,
            "tune_backbone": self.tune_backbone,
            "seed": seed,
        }
        if self.epochs is not None:
            fields["epochs"] = self.epochs
        given = _parsed(self.settings, fields)
        return RecommenderConfig.from_dict(fields | given)


def available_modalities(catalogue: Catalogue) -> tuple[str, ...]:
    """identity, and every kind of content that at least one item of the catalogue has."""
    schema = catalogue.schema
    found = {
        "text": any(catalogue.items[column].null_count() < catalogue.num_items for column in schema.text),
        "image": any(path is not None for path in catalogue.images),
        "table": any(
            catalogue.items[column].null_count() < catalogue.num_items
            for column in schema.numeric + schema.categorical + schema.multi
        ),
    }
    features = [name for name, feature in catalogue.features.items() if feature.mask.any()]
    return ("identity", *(name for name, present in found.items() if present), *features)


def label(config: RecommenderConfig) -> str:
    """How a model is called in tables: its modalities."""
    if config.modalities == ("identity",):
        return "identity-only"
    return "+".join(config.modalities)


def only(config: RecommenderConfig, modalities: tuple[str, ...]) -> RecommenderConfig:
    """The same training with other modalities; without text there is no adapter to train."""
    return config.replace(modalities=modalities, tune_backbone=config.tune_backbone and "text" in modalities)


def _modalities(text: str, available: Sequence[str], name: str) -> tuple[str, ...]:
    if text.strip() == ALL:
        return tuple(available)
    chosen = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    unknown = [part for part in chosen if part not in available]
    if unknown or not chosen:
        got = ", ".join(map(repr, unknown)) or "nothing"
        raise ValueError(f"--modalities: {name!r} has {', '.join(available)}; got {got}")
    return chosen


def _parsed(settings: Sequence[str], taken: dict[str, Any]) -> dict[str, Any]:
    from ..recommender.config import RecommenderConfig

    known = {field.name for field in dataclasses.fields(RecommenderConfig)}
    values: dict[str, Any] = {}
    for entry in settings:
        name, equals, text = entry.partition("=")
        if not equals:
            raise ValueError(f"--set needs NAME=VALUE, got {entry!r}")
        if name not in known:
            raise ValueError(f"--set {name}: no such hyper-parameter; known are {', '.join(sorted(known))}")
        if name in taken:
            option = {"lora_rank": "lora"}.get(name, name).replace("_", "-")
            raise ValueError(f"--set {name}: use the option --{option}")
        try:
            values[name] = json.loads(text)
        except ValueError:
            values[name] = text
    return values
