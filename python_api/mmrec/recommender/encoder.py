"""Items that came after training, as the item tower reads them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .store import ItemRows

if TYPE_CHECKING:
    from ..adaptation import Catalogue
    from ..llm import Backbone
    from .model import Recommender
    from .training import Recipe

__all__ = ["ItemEncoder"]

_PART = 4096


class ItemEncoder:
    """Content to rows of a store, by a trained model.

    An item that training knew has its identity beside its content, whatever that is now; any other is its content.

    Args:
        model: of the run.
        recipe: how its training read items.
        item_ids: of its catalogue, by row.
        adapter: what was trained of the backbone: its adapter, or weights of its own.
    """

    def __init__(
        self,
        model: Recommender,
        recipe: Recipe,
        item_ids: Sequence[str],
        *,
        adapter: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.model, self.recipe = model, recipe
        self._adapter = dict(adapter or {})
        self._row = {item: row for row, item in enumerate(item_ids)}

    def encode(self, catalogue: Catalogue) -> Iterator[ItemRows]:
        """The items of a catalogue in the roles of `recipe.schema` (`Catalogue.load_items`, `Catalogue.from_items`), in
        its order, some thousand at a time.

        Raises:
            ValueError: another schema, a broken image, or feature vectors of another width.
        """
        for start in range(0, max(catalogue.num_items, 1), _PART):
            yield self.encode_part(catalogue, start, min(start + _PART, catalogue.num_items))

    def encode_part(self, catalogue: Catalogue, start: int, stop: int) -> ItemRows:
        """Items `start` … `stop − 1` of a catalogue, see `encode`; all at once."""
        if catalogue.schema != self.recipe.schema:
            raise ValueError("catalogue must have the schema that the model was trained with")
        return self._rows(catalogue.items_part(start, stop))

    def encode_items(self, items: Sequence[Mapping[str, Any]]) -> ItemRows:
        """Items as dicts, see `Catalogue.from_items`; all at once."""
        from ..adaptation import Catalogue

        return self._rows(Catalogue.from_items(items, self.recipe.schema))

    @cached_property
    def _backbone(self) -> Backbone | None:
        from .training import load_backbone

        if "text" not in self.model.config.content:
            return None
        backbone = load_backbone(self.model.config)
        if self._adapter:
            backbone.load_trainable_state_dict(self._adapter)
        return backbone

    @torch.no_grad()
    def _rows(self, catalogue: Catalogue) -> ItemRows:
        from ..adaptation.fingerprint import item_fingerprints
        from .training import prepare_content

        model, count = self.model, catalogue.num_items
        content = prepare_content(
            self._with_features(catalogue), model.config, np.zeros(count, bool), recipe=self.recipe,
            backbone=self._backbone,
        )  # fmt: skip
        rows = torch.tensor([self._row.get(item, -1) for item in catalogue.item_ids], dtype=torch.int64)
        found = model.eval().encode(content.inputs.to(model.device), rows.to(model.device))
        known = model.trained.cpu()[rows.clamp(min=0)] & (rows >= 0)
        fingerprints = torch.from_numpy(item_fingerprints(catalogue))
        return ItemRows(
            catalogue.item_ids, found.vectors.cpu(), found.mass.cpu(), known, fingerprints, catalogue.item_titles,
            {name: tokens.to("cpu") for name, tokens in found.tokens.items()},
        )  # fmt: skip

    def _with_features(self, catalogue: Catalogue) -> Catalogue:
        """With every feature that the model reads: an item without one has it missing."""
        from ..adaptation import Features

        features = dict(catalogue.features)
        for name in self.model.config.content:
            if name in ("text", "image", "table"):
                continue
            width = self.model.spec.tokens[name].width
            if name not in features:
                shape = (catalogue.num_items, width)
                features[name] = Features(np.zeros(shape, np.float32), np.zeros(catalogue.num_items, bool))
            elif features[name].values.shape[1] != width:
                raise ValueError(f"features {name!r} must have width {width}, got {features[name].values.shape[1]}")
        return dataclasses.replace(catalogue, features=features)
