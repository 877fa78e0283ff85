"""Every hyper-parameter of the recommender, in one place."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..files import parse_json

__all__ = ["IDENTITY", "RecommenderConfig"]

IDENTITY = "identity"
MAX_SCALE = 100.0

_CHOICES = {
    "score": ("dot", "cosine"),
    "negatives": ("auto", "all", "batch"),
    "quantize": ("nf4", None),
    "text_level": ("fields", "tokens"),
    "fusion": ("early", "intermediate", "late"),
    "fusion_level": ("fine", "coarse"),
    "disentangle": ("contrast", "attention", "prototypes", "vae", None),
    "align": ("infonce", "adapters", "projection", "bootstrap", "vae"),
    "router_score": ("softmax", "topk_softmax", "sigmoid"),
}
_AT_LEAST_ONE = (
    "width", "item_queries", "item_heads", "text_rank", "image_rank", "image_size", "image_patch",
    "experts_per_token", "expert_hidden", "layers", "heads", "max_length", "epochs", "batch_size", "patience",
    "evaluate_every", "tune_items", "text_max_length", "tokens_per_text", "full_softmax_items",
)  # fmt: skip
_FRACTIONS = ("dropout", "content_dropout", "identity_dropout", "modality_dropout", "label_smoothing", "warmup")
_NOT_NEGATIVE = (
    "learning_rate", "backbone_learning_rate", "weight_decay", "clip_norm", "align_weight", "disentangle_weight",
    "balance_weight", "z_weight", "local_entropy_weight", "global_entropy_weight", "router_bias_rate",
    "extra_negatives", "experts_shared", "experts_private", "align_items", "lora_rank", "side_layers",
    "fusion_layers", "seed",
)  # fmt: skip


@dataclass(frozen=True)
class RecommenderConfig:
    """Hyper-parameters; the defaults are those of `docs/recommender.md`'s measurements.

    Modalities:
        modalities: any of "identity", "text", "image", "table" and the names of the catalogue's feature files. Those
            that the catalogue does not have are an error. ("identity",) alone is the identity-only sequential model.
        mask_title: texts without the title, and without its mention in other columns: what a model knows by heart of
            famous titles then stays out.
        text_level: "fields", one pooled vector per text field, or "tokens", the first `tokens_per_text` token vectors.
        backbone: folder or name of the language model, None for MiniLM; `quantize` "nf4" or None; `lora_rank` 0 = no
            adapter; `text_max_length` tokens read per text.
        tune_backbone: train `tune` of the backbone too: each step encodes the texts of `tune_items` items with
            gradients. "lora", an adapter of `lora_rank`; "adapter", bottleneck adapters; "all" or "last:n", its own
            weights, with `quantize` None.
        side_layers: a network beside the frozen backbone trains on the hidden states of so many of its layers, pooled
            and cached; 0 = there is none, and the last layer's vectors are projected.
        text_rank, image_rank: directions kept by the whitening of text and image vectors.
        image_size, image_patch: posters are scaled to size × size pixels and cut into patches.
        table_pooled: one token per table row instead of one per cell.

    Item tower: `width`, `item_queries` learned queries with `item_heads` heads; `fusion` "early", "intermediate" or
        "late", at `fusion_level` "fine" (all tokens) or "coarse" (each modality's mean), and `fusion_layers` of
        latents (`ModalityFusion`); `disentangle` None or a `fusion.disentangler`, whose vector is added behind a gate
        that starts closed; `experts_shared` experts for all modalities and `experts_private` per modality (0 of either
        kind = none), `experts_per_token` chosen by their `router_score`, `expert_hidden` wide; `identity_dropout`:
        share of items whose identity is hidden in a training step, so that content learns to stand in;
        `modality_dropout`: the same for each content modality; `content_dropout`: on content vectors and experts.

    User tower: `layers`, `heads`, `max_length` last items read, `dropout`.

    Loss:
        score: "dot", or "cosine" with a learned scale that starts at `scale` and never exceeds 100.
        negatives: "all" = full softmax over the items that training knows, "batch" = the batch's targets plus
            `extra_negatives` drawn uniformly, logQ-corrected and with accidental hits masked; "auto" = "all" up to
            `full_softmax_items` items.
        label_smoothing; align_weight on `align` (`fusion.alignment`) with align_items items per step, of what
            `disentangle` says is to be aligned; disentangle_weight on the sum of its losses; of the router
            balance_weight, z_weight, local_entropy_weight and global_entropy_weight (which is subtracted), and
            router_bias_rate, by which each step moves the biases that balance without a loss (0 = there are none).

    Optimiser: AdamW at `learning_rate` (the adapter at `backbone_learning_rate`) with `weight_decay`, linear warm-up
        over the share `warmup` of all steps, then a cosine to a twentieth; gradients clipped to `clip_norm` (0 = not).
        `batch_size` windows per step, `epochs` at most; stops after `patience` evaluations (each `evaluate_every`
        epochs) without a better NDCG@10 on the validation items. `seed` decides initial weights, data order and
        dropout.
    """

    modalities: tuple[str, ...] = (IDENTITY, "text", "image", "table")
    mask_title: bool = False
    text_level: str = "fields"
    tokens_per_text: int = 16
    backbone: str | None = None
    quantize: str | None = "nf4"
    lora_rank: int = 8
    text_max_length: int = 128
    tune_backbone: bool = False
    tune: str = "lora"
    side_layers: int = 0
    tune_items: int = 16
    text_rank: int = 384
    image_size: int = 64
    image_patch: int = 32
    image_rank: int = 64
    table_pooled: bool = True

    width: int = 64
    item_queries: int = 4
    item_heads: int = 2
    fusion: str = "early"
    fusion_level: str = "fine"
    fusion_layers: int = 0
    disentangle: str | None = None
    experts_shared: int = 2
    experts_private: int = 1
    experts_per_token: int = 2
    expert_hidden: int = 64
    router_score: str = "softmax"
    identity_dropout: float = 0.05
    modality_dropout: float = 0.0
    content_dropout: float = 0.1

    layers: int = 2
    heads: int = 2
    max_length: int = 50
    dropout: float = 0.3

    score: str = "dot"
    scale: float = 14.0
    negatives: str = "auto"
    full_softmax_items: int = 30_000
    extra_negatives: int = 1024
    label_smoothing: float = 0.0
    align: str = "infonce"
    align_weight: float = 0.02
    align_items: int = 256
    disentangle_weight: float = 0.05
    balance_weight: float = 0.01
    z_weight: float = 0.001
    local_entropy_weight: float = 0.0
    global_entropy_weight: float = 0.0
    router_bias_rate: float = 0.0

    learning_rate: float = 2e-3
    backbone_learning_rate: float = 2e-4
    weight_decay: float = 0.01
    warmup: float = 0.05
    clip_norm: float = 5.0
    batch_size: int = 64
    epochs: int = 60
    patience: int = 8
    evaluate_every: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check_type(field.name, getattr(self, field.name), field.default)
        object.__setattr__(self, "modalities", tuple(self.modalities))
        if not self.modalities or len(set(self.modalities)) != len(self.modalities):
            raise ValueError(f"modalities must be distinct names, at least one, got {self.modalities}")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {choices}, got {getattr(self, name)!r}")
        for name in _AT_LEAST_ONE:
            _check_number(name, getattr(self, name), 1)
        for name in _NOT_NEGATIVE:
            _check_number(name, getattr(self, name), 0)
        for name in _FRACTIONS:
            _check_number(name, getattr(self, name), 0)
            if getattr(self, name) >= 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if not 0 < self.scale <= MAX_SCALE:
            raise ValueError(f"scale must be in (0, {MAX_SCALE:g}], got {self.scale}")
        experts = self.experts_shared + self.experts_private
        if 0 < experts < self.experts_per_token:
            raise ValueError(
                f"experts_per_token must be at most experts_shared + experts_private = {experts}, "
                f"got {self.experts_per_token}"
            )
        if self.width % self.heads or self.width % self.item_heads:
            raise ValueError(
                "width must be a multiple of heads and item_heads, "
                f"got {self.width}, {self.heads} and {self.item_heads}"
            )
        if self.image_size % self.image_patch:
            raise ValueError(
                f"image_size must be a multiple of image_patch, got {self.image_size} and {self.image_patch}"
            )
        self._check_tuning()

    def _check_tuning(self) -> None:
        own_weights = re.fullmatch(r"all|last:[1-9]\d*", self.tune) is not None
        if self.tune not in ("lora", "adapter") and not own_weights:
            raise ValueError(f"tune must be 'lora', 'adapter', 'all' or 'last:n' with n ≥ 1, got {self.tune!r}")
        if self.side_layers and self.text_level != "fields":
            raise ValueError(f"side_layers needs text_level 'fields', got {self.text_level!r}")
        if not self.tune_backbone:
            return
        if "text" not in self.modalities or self.text_level != "fields":
            raise ValueError("tune_backbone needs the text modality and text_level 'fields'")
        if self.side_layers:
            raise ValueError(f"tune_backbone needs side_layers 0: they leave it alone, got {self.side_layers}")
        if self.tune == "lora" and not self.lora_rank:
            raise ValueError("tune_backbone needs lora_rank ≥ 1 for tune 'lora', got 0")
        if own_weights and self.quantize is not None:
            raise ValueError(f"tune_backbone needs quantize None for tune {self.tune!r}, got {self.quantize!r}")

    @property
    def content(self) -> tuple[str, ...]:
        """The modalities without the identity."""
        return tuple(name for name in self.modalities if name != IDENTITY)

    def replace(self, **changes: Any) -> RecommenderConfig:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**dataclasses.asdict(self), "modalities": list(self.modalities)}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> RecommenderConfig:
        """The inverse of `to_dict`; unknown keys and values of the wrong type are a ValueError or TypeError."""
        fields = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(value) - set(fields))
        if unknown:
            raise ValueError(f"config has unknown field(s) {unknown}; it takes {sorted(fields)}")
        return cls(**value)

    def to_json(self) -> str:
        """`to_dict` as indented JSON."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> RecommenderConfig:
        """The inverse of `to_json`."""
        value = parse_json(text)
        if not isinstance(value, dict):
            raise TypeError(f"config must be a JSON object, got {type(value).__name__}")
        return cls.from_dict(value)


def _check_number(name: str, value: float, minimum: int) -> None:
    if not minimum <= value < math.inf:
        raise ValueError(f"{name} must be finite and ≥ {minimum}, got {value}")


def _check_type(name: str, value: Any, default: Any) -> None:
    if isinstance(default, tuple):
        good = isinstance(value, list | tuple) and all(isinstance(entry, str) for entry in value)
    elif default is None or name == "quantize":
        good = value is None or isinstance(value, str)
    elif isinstance(default, bool):
        good = isinstance(value, bool)
    elif isinstance(default, float):
        good = isinstance(value, int | float) and not isinstance(value, bool)
    else:
        good = isinstance(value, type(default)) and not isinstance(value, bool)
    if not good:
        raise TypeError(f"config field {name} cannot be {value!r}; its default is {default!r}")
