from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
import torch
from rec_helpers import ITEMS, inputs

from mmrec.recommender import ItemInputs, ItemSpec, RecommenderConfig, TableSpec, TokenSpec

OTHER = RecommenderConfig(
    modalities=("text", "audio"), text_level="tokens", backbone="folder", quantize=None, table_pooled=True,
    score="cosine", negatives="batch", scale=20, seed=7, tune="last:2",
)  # fmt: skip


@pytest.mark.parametrize("config", [RecommenderConfig(), OTHER])
def test_round_trips(config: RecommenderConfig) -> None:
    assert RecommenderConfig.from_json(config.to_json()) == config
    assert RecommenderConfig.from_dict(config.to_dict()) == config
    written = json.loads(config.to_json())
    assert set(written) == {field.name for field in dataclasses.fields(RecommenderConfig)}
    assert written["modalities"] == list(config.modalities)


def test_missing_keys_take_the_defaults() -> None:
    assert RecommenderConfig.from_dict({"width": 32}) == RecommenderConfig(width=32)


def test_content_is_everything_but_the_identity() -> None:
    listed: Any = ["text", "identity", "audio"]
    assert RecommenderConfig(modalities=listed).content == ("text", "audio")
    assert RecommenderConfig(modalities=("identity",)).content == ()


def test_replace_validates_and_leaves_the_original() -> None:
    config = RecommenderConfig()
    assert config.replace(width=32).width == 32 and config.width == 64
    with pytest.raises(ValueError, match="width"):
        config.replace(width=33)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.width = 32  # type: ignore[misc]


INTEGERS = [
    field.name
    for field in dataclasses.fields(RecommenderConfig)
    if isinstance(field.default, int) and not isinstance(field.default, bool)
]
FLOATS = [field.name for field in dataclasses.fields(RecommenderConfig) if isinstance(field.default, float)]
MAY_BE_ZERO = {
    "extra_negatives",
    "experts_shared",
    "experts_private",
    "align_items",
    "lora_rank",
    "side_layers",
    "fusion_layers",
    "seed",
}
FRACTIONS = {"dropout", "content_dropout", "identity_dropout", "modality_dropout", "label_smoothing", "warmup"}


@pytest.mark.parametrize("name", INTEGERS)
def test_integers_have_a_lowest_value(name: str) -> None:
    lowest = 0 if name in MAY_BE_ZERO else 1
    with pytest.raises(ValueError, match=rf"^{name} must be finite and ≥ {lowest}, got {lowest - 1}$"):
        RecommenderConfig(**{name: lowest - 1})
    related = {"heads": 1, "item_heads": 1, "image_patch": 1, "experts_per_token": 1, "lora_rank": 0, name: lowest}
    assert getattr(RecommenderConfig(**related), name) == lowest


@pytest.mark.parametrize("name", FLOATS)
def test_floats_have_a_range(name: str) -> None:
    bad = [-0.1, math.nan, math.inf, *([1.0] if name in FRACTIONS else []), *([0.0, 100.5] if name == "scale" else [])]
    for value in bad:
        with pytest.raises(ValueError, match=rf"^{name} must be .*got {value}"):
            RecommenderConfig(**{name: value})
    edge = 100.0 if name == "scale" else 0.0
    assert getattr(RecommenderConfig(**{name: edge}), name) == edge


WRONG_TYPES: list[tuple[str, Any]] = [
    *((name, 1.5) for name in INTEGERS),
    *((name, True) for name in (*INTEGERS, *FLOATS)),
    *((name, "1") for name in (*INTEGERS, *FLOATS)),
    ("modalities", "text"), ("modalities", ["text", 3]), ("modalities", None), ("text_level", None), ("score", 1),
    ("backbone", 3), ("quantize", 4), ("tune_backbone", 1), ("tune", None), ("table_pooled", "yes"),
]  # fmt: skip


@pytest.mark.parametrize("name, value", WRONG_TYPES)
def test_wrong_types_name_the_field(name: str, value: Any) -> None:
    for make in (lambda: RecommenderConfig(**{name: value}), lambda: RecommenderConfig.from_dict({name: value})):
        with pytest.raises(TypeError, match=f"config field {name} cannot be"):
            make()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"modalities": ()}, "modalities must be distinct names, at least one"),
        ({"modalities": ("text", "text")}, "modalities must be distinct names"),
        ({"score": "l2"}, "score must be one of .*got 'l2'"),
        ({"negatives": "some"}, "negatives must be one of .*got 'some'"),
        ({"quantize": "int8"}, "quantize must be one of .*got 'int8'"),
        ({"text_level": "words"}, "text_level must be one of .*got 'words'"),
        ({"fusion": "middle"}, "fusion must be one of .*got 'middle'"),
        ({"width": 62, "heads": 4}, "width must be a multiple of heads and item_heads, got 62, 4 and 2"),
        ({"width": 62, "item_heads": 4}, "width must be a multiple of heads and item_heads, got 62, 2 and 4"),
        ({"image_size": 60}, "image_size must be a multiple of image_patch, got 60 and 32"),
        ({"experts_per_token": 4}, r"experts_per_token must be at most .*= 3, got 4"),
        ({"tune_backbone": True, "modalities": ("identity",)}, "tune_backbone needs the text modality"),
        ({"tune_backbone": True, "text_level": "tokens"}, "tune_backbone needs .*text_level 'fields'"),
        ({"tune_backbone": True, "lora_rank": 0}, "tune_backbone needs .*lora_rank ≥ 1"),
    ],
)
def test_bad_values(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RecommenderConfig(**changes)


def test_no_experts_at_all_is_allowed() -> None:
    assert RecommenderConfig(experts_shared=0, experts_private=0).experts_per_token == 2


def test_bad_files() -> None:
    with pytest.raises(ValueError, match=r"unknown field\(s\) \['depth', 'wide'\]"):
        RecommenderConfig.from_dict({"wide": 3, "depth": 2})
    with pytest.raises(TypeError, match="config must be a JSON object, got list"):
        RecommenderConfig.from_json("[]")


def test_item_spec_round_trips_through_json() -> None:
    spec = inputs().spec
    assert spec == ItemSpec(12, {"text": TokenSpec(6, 2), "image": TokenSpec(5, 3)}, TableSpec(1, (3,), (2,)))
    for each in (spec, ItemSpec(3)):
        assert ItemSpec.from_dict(json.loads(json.dumps(each.to_dict()))) == each
    assert spec.content == ("text", "image", "table") and ItemSpec(3).content == ()


def test_a_selection_keeps_the_shapes_of_the_whole() -> None:
    whole = inputs()
    rows = torch.tensor([2, 9, 2])
    part = whole.select(rows)
    assert part.num_items == 3 and part.texts is None
    assert part.spec == dataclasses.replace(whole.spec, num_items=3)
    for name, present in part.present().items():
        assert torch.equal(present, whole.present()[name][rows])
    assert part.spec == part.select(torch.tensor([1])).select(torch.tensor([0, 0, 0])).spec


def test_with_text_changes_the_text_vectors_only() -> None:
    whole = inputs()
    values = torch.zeros_like(whole.tokens["text"].values)
    changed = whole.with_text(values)
    assert changed.tokens["text"].values is values and changed.tokens["text"].offsets is whole.tokens["text"].offsets
    assert changed.tokens["image"] is whole.tokens["image"] and changed.texts == whole.texts
    part = whole.select(torch.tensor([1]))
    assert part.with_text(part.tokens["text"].values).spec == part.to("cpu").spec == part.spec


def test_inputs_must_agree_on_the_number_of_items() -> None:
    whole = inputs()
    with pytest.raises(ValueError, match=r"tokens\['text'\] has 12 items, needs 11"):
        ItemInputs(ITEMS - 1, {"text": whole.tokens["text"]})
    with pytest.raises(ValueError, match="table needs 11 rows and a table_spec, got 12 rows"):
        ItemInputs(ITEMS - 1, table=whole.table, table_spec=whole.table_spec)
    with pytest.raises(ValueError, match="table_spec"):
        ItemInputs(ITEMS, table=whole.table)
