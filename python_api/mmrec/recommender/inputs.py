"""What the item tower reads: every item's content as tensors, and the shapes that a model is built from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..fusion import TableInputs, Tokens

__all__ = ["ItemInputs", "ItemSpec", "TableSpec", "TokenSpec"]


@dataclass(frozen=True)
class TokenSpec:
    """A modality of vectors: their width and how many slots (text fields, patch positions) an item can have."""

    width: int
    kinds: int


@dataclass(frozen=True)
class TableSpec:
    """A table: numeric columns, values per categorical column, values per column with several values."""

    numeric: int
    cardinalities: tuple[int, ...]
    bag_cardinalities: tuple[int, ...]


@dataclass(frozen=True)
class ItemSpec:
    """Everything of the data that decides the shapes of a model's parameters; JSON values through `to_dict`."""

    num_items: int
    tokens: Mapping[str, TokenSpec] = field(default_factory=dict)
    table: TableSpec | None = None

    @property
    def content(self) -> tuple[str, ...]:
        """Names of the content modalities that the data has."""
        return (*self.tokens, *(("table",) if self.table is not None else ()))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        table = None
        if self.table is not None:
            table = [self.table.numeric, list(self.table.cardinalities), list(self.table.bag_cardinalities)]
        tokens = {name: [spec.width, spec.kinds] for name, spec in self.tokens.items()}
        return {"num_items": self.num_items, "tokens": tokens, "table": table}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> ItemSpec:
        """The inverse of `to_dict`."""
        table = value["table"]
        return cls(
            value["num_items"],
            {name: TokenSpec(*sizes) for name, sizes in value["tokens"].items()},
            None if table is None else TableSpec(table[0], tuple(table[1]), tuple(table[2])),
        )


@dataclass(frozen=True)
class ItemInputs:
    """The content of I items (rows of the catalogue).

    Attributes:
        num_items: I.
        tokens: `Tokens` of I items per modality of vectors (text, image, feature files), float32.
        table: the item table, or None.
        table_spec: the cardinalities, needed with `table`.
        texts: the texts behind `tokens["text"]`, one per token, where those can be encoded anew; else None.
        kinds: slots per modality of vectors; where a name is not listed, as many as its tokens use.
        whitened: the vectors come from `ItemTower.whiten_inputs`.
    """

    num_items: int
    tokens: Mapping[str, Tokens] = field(default_factory=dict)
    table: TableInputs | None = None
    table_spec: TableSpec | None = None
    texts: tuple[str, ...] | None = None
    kinds: Mapping[str, int] = field(default_factory=dict)
    whitened: bool = False

    def __post_init__(self) -> None:
        for name, tokens in self.tokens.items():
            if tokens.num_items != self.num_items:
                raise ValueError(f"tokens[{name!r}] has {tokens.num_items} items, needs {self.num_items}")
        if self.table is not None and (self.table.num_rows != self.num_items or self.table_spec is None):
            raise ValueError(f"table needs {self.num_items} rows and a table_spec, got {self.table.num_rows} rows")

    @property
    def spec(self) -> ItemSpec:
        """The shapes."""
        tokens = {
            name: TokenSpec(t.values.shape[1], self.kinds[name] if name in self.kinds else _num_kinds(t))
            for name, t in self.tokens.items()
        }
        return ItemSpec(self.num_items, tokens, self.table_spec)

    def present(self) -> dict[str, Tensor]:
        """bool `[I]` per content modality: the item has something there."""
        found = {name: tokens.present for name, tokens in self.tokens.items()}
        if self.table is not None:
            found["table"] = self.table.present().any(1)
        return found

    def select(self, items: Tensor) -> ItemInputs:
        """The content of `items` (int64 `[m]`, any order, repeats allowed), without the texts."""
        tokens = {name: part.select(items) for name, part in self.tokens.items()}
        table = None if self.table is None else self.table.select(items)
        kinds = {name: spec.kinds for name, spec in self.spec.tokens.items()}
        return ItemInputs(len(items), tokens, table, self.table_spec, None, kinds, self.whitened)

    def with_text(self, values: Tensor) -> ItemInputs:
        """The same inputs with other text vectors `[T, d]`."""
        if self.whitened:
            raise ValueError("inputs are whitened; text can be replaced only before that")
        old = self.tokens["text"]
        tokens = {**self.tokens, "text": Tokens(values, old.offsets, old.kind)}
        return ItemInputs(self.num_items, tokens, self.table, self.table_spec, self.texts, self.kinds)

    def to(self, device: torch.device | str) -> ItemInputs:
        """The same inputs on `device`."""
        tokens = {name: tokens.to(device) for name, tokens in self.tokens.items()}
        table = None if self.table is None else self.table.to(device)
        return ItemInputs(self.num_items, tokens, table, self.table_spec, self.texts, self.kinds, self.whitened)


def _num_kinds(tokens: Tokens) -> int:
    return int(tokens.kind.max()) + 1 if len(tokens.kind) else 1
