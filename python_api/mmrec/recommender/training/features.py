"""From a catalogue to what the item tower reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ...fusion import TableInputs, Tokens
from ..config import RecommenderConfig
from ..inputs import ItemInputs, TableSpec

if TYPE_CHECKING:
    from ...adaptation import Catalogue, TableFit, TableSchema
    from ...llm import Backbone

__all__ = ["Content", "Recipe", "prepare_content", "text_fields"]

TABLE_FIELD = "table columns"


@dataclass(frozen=True)
class Recipe:
    """What else than the config decides how items are read: other items are to be read as those of the training.

    Attributes:
        schema: of the catalogue.
        fields: names of the text fields, in the order of their slots.
        table: means, deviations and vocabularies; None without a table.
    """

    schema: TableSchema
    fields: tuple[str, ...] = ()
    table: TableFit | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        table = None if self.table is None else self.table.to_dict()
        return {"schema": self.schema.to_dict(), "fields": list(self.fields), "table": table}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Recipe:
        """The inverse of `to_dict`."""
        from ...adaptation import TableFit, TableSchema

        table = None if value["table"] is None else TableFit.from_dict(value["table"])
        return cls(TableSchema.from_dict(value["schema"]), tuple(value["fields"]), table)


@dataclass(frozen=True)
class Content:
    """The items' content, how it was read, and the language model where some of it is to be trained (else it has done
    its work)."""

    inputs: ItemInputs
    recipe: Recipe
    backbone: Backbone | None = None


def prepare_content(
    catalogue: Catalogue,
    config: RecommenderConfig,
    trained: np.ndarray,
    *,
    cache: Path | None = None,
    recipe: Recipe | None = None,
    backbone: Backbone | None = None,
) -> Content:
    """Reads the config's modalities of every item.

    Text is encoded by the frozen backbone, one vector per field (:func:`text_fields`), or several layers' side by side,
    or token vectors of all fields as one text; images are cut into patches; the table is standardised over the trained
    items; feature files are taken as they are.

    Args:
        trained: bool ``[I]``, the items that training may look at.
        cache: folder of an :class:`.EmbeddingCache`.
        recipe: by which to read them, of the catalogue that was trained on; None makes one.
        backbone: what encodes texts; None loads the config's.

    Raises:
        ValueError: a modality that the catalogue does not have, a broken image, a backbone that cannot be loaded.
    """
    tokens: dict[str, Tokens] = {}
    kinds: dict[str, int] = {}
    table, table_spec, texts = None, None, None
    made = Recipe(catalogue.schema) if recipe is None else recipe
    for name in config.content:
        if name == "text":
            names = None if recipe is None else recipe.fields
            fields = text_fields(catalogue, names, mask_title=bool(config.mask_title))
            made = replace(made, fields=tuple(field[0] for field in fields))
            backbone = load_backbone(config) if backbone is None else backbone
            tokens[name], texts, kinds[name] = _text(catalogue, config, fields, backbone, cache)
        elif name == "image":
            tokens[name], kinds[name] = _images(catalogue, config)
        elif name == "table":
            table, table_spec, fit = _table(catalogue, trained, made.table)
            made = replace(made, table=fit)
        elif name in catalogue.features:
            tokens[name], kinds[name] = _vectors(catalogue.features[name].values, catalogue.features[name].mask), 1
        else:
            raise ValueError(
                f"modality {name!r} is not in {catalogue.name!r}; it has {sorted(catalogue.features)} as features"
            )
    inputs = ItemInputs(catalogue.num_items, tokens, table, table_spec, texts, kinds)
    return Content(inputs, made, backbone if config.tune_backbone else None)


def load_backbone(config: RecommenderConfig) -> Backbone:
    """The language model of a config, with what is to be trained of it, fresh."""
    from ...llm import AdapterConfig, Backbone

    trained: dict[str, Any] = {"lora": config.lora_rank or None}
    if config.tune_backbone and config.tune != "lora":
        trained = {"adapter": AdapterConfig()} if config.tune == "adapter" else {"trainable": config.tune}
    return Backbone.load(config.backbone, quantize=config.quantize, max_length=config.text_max_length, **trained)


def text_fields(
    catalogue: Catalogue, names: Sequence[str] | None = None, *, mask_title: bool = False
) -> list[tuple[str, list[str], np.ndarray]]:
    """``(name, texts, mask)`` per field: every text column on its own, then all other columns as "column: value".

    Args:
        names: these, in this order, whatever they hold; None: those that hold anything.
        mask_title: without the title, and without its mention in other columns.
    """
    from ...adaptation import TextTemplate, item_texts

    schema = catalogue.schema
    templates = {column: TextTemplate(columns=(column,), mask_title=mask_title) for column in schema.text}
    if schema.categorical or schema.multi or schema.numeric:
        table = schema.categorical + schema.multi + schema.numeric
        templates[TABLE_FIELD] = TextTemplate(columns=table, mask_title=mask_title)
    wanted = templates if names is None else names
    fields = [(name, *item_texts(catalogue, template=templates[name])) for name in wanted]
    return [field for field in fields if names is not None or field[2].any()]


def _text(
    catalogue: Catalogue,
    config: RecommenderConfig,
    fields: list[tuple[str, list[str], np.ndarray]],
    backbone: Backbone,
    cache: Path | None,
) -> tuple[Tokens, tuple[str, ...] | None, int]:
    from ...llm import EmbeddingCache

    if not fields:
        beside = " beside the title, which is masked" if config.mask_title else ""
        raise ValueError(f"modality 'text': {catalogue.name!r} has no text{beside}")
    settings: dict[str, Any] = {} if cache is None else {"cache": EmbeddingCache(cache)}
    if config.text_level == "tokens":
        return _token_text(catalogue, config, backbone, settings), None, 1
    present = np.stack([mask for _, _, mask in fields], axis=1)
    item, kind = np.nonzero(present)
    texts = tuple(fields[k][1][i] for i, k in zip(item, kind, strict=True))
    if config.side_layers:
        pooled = backbone.encode_layers(texts, int(config.side_layers), **settings).flatten(1)
    else:
        encoded = backbone.encode(texts, **settings).pooled
        assert encoded is not None
        pooled = encoded
    return Tokens(pooled.float(), _offsets(present.sum(1)), torch.from_numpy(kind)), texts, len(fields)


def _token_text(
    catalogue: Catalogue, config: RecommenderConfig, backbone: Backbone, settings: dict[str, Any]
) -> Tokens:
    from ...adaptation import item_texts

    texts, mask = item_texts(catalogue, template="masked" if config.mask_title else "full")
    budget = int(config.tokens_per_text)
    found = backbone.encode(
        [t for t, m in zip(texts, mask, strict=True) if m], pooling="tokens", token_budget=budget, **settings
    )
    assert found.values is not None and found.offsets is not None
    lengths = np.zeros(len(texts), np.int64)
    lengths[mask] = found.offsets.diff().numpy()
    return Tokens(found.values.float(), _offsets(lengths), torch.zeros(len(found.values), dtype=torch.int64))


def _images(catalogue: Catalogue, config: RecommenderConfig) -> tuple[Tokens, int]:
    from ...adaptation import image_patches

    found = image_patches(catalogue, int(config.image_size), int(config.image_patch))
    per_image = found.values.shape[1]
    values = torch.from_numpy(found.values[found.mask].reshape(-1, found.values.shape[2]))
    kind = torch.arange(per_image).repeat(int(found.mask.sum()))
    return Tokens(values, _offsets(found.mask * per_image), kind), per_image


def _table(catalogue: Catalogue, trained: np.ndarray, fit: TableFit | None) -> tuple[TableInputs, TableSpec, TableFit]:
    from ...adaptation import encode_table

    arrays = encode_table(catalogue, fit_items=trained) if fit is None else encode_table(catalogue, fit=fit)
    bags = tuple((torch.from_numpy(c.offsets), torch.from_numpy(c.values)) for c in arrays.multi.values())
    inputs = TableInputs(
        torch.from_numpy(arrays.numeric),
        torch.from_numpy(arrays.numeric_mask),
        torch.from_numpy(arrays.categorical),
        bags,
    )
    if not inputs.num_columns:
        raise ValueError(f"modality 'table': {catalogue.name!r} has no numeric, categorical or multi-valued column")
    # A column without any value among the trained items has nothing to embed, but an embedding needs a row.
    sizes = tuple(max(1, size) for size in arrays.cardinalities)
    spec = TableSpec(arrays.numeric.shape[1], sizes, tuple(max(1, c.cardinality) for c in arrays.multi.values()))
    return inputs, spec, arrays.fit


def _vectors(values: np.ndarray, mask: np.ndarray) -> Tokens:
    count = int(mask.sum())
    return Tokens(torch.from_numpy(values[mask]), _offsets(mask), torch.zeros(count, dtype=torch.int64))


def _offsets(lengths: np.ndarray | Sequence[int]) -> Tensor:
    return torch.from_numpy(np.concatenate([[0], np.cumsum(np.asarray(lengths, np.int64))]))
