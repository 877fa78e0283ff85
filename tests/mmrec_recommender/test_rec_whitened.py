"""Whitening once, before training, gives what whitening in every step gives."""

from __future__ import annotations

import pytest
import torch
from rec_helpers import ITEMS, KNOWN, config, inputs, known_inputs, model_of


def test_whitened_inputs_encode_to_the_same_bits():
    model = model_of(config())
    items = torch.from_numpy(KNOWN)
    raw, white = known_inputs(), model.item_tower.whiten_inputs(known_inputs())
    assert white.whitened and not raw.whitened
    assert white.tokens["text"].values.shape[1] == 4 and white.tokens["image"].values.shape[1] == 3
    expected, got = model.encode(raw, items), model.encode(white, items)
    assert torch.equal(got.vectors, expected.vectors) and torch.equal(got.mass, expected.mass)


def test_a_selection_stays_whitened_and_only_the_models_modalities_change():
    model = model_of(config("identity", "text"))
    white = model.item_tower.whiten_inputs(inputs())
    assert torch.equal(white.tokens["image"].values, inputs().tokens["image"].values)
    assert white.select(torch.arange(3)).whitened
    all_items = torch.arange(ITEMS)
    assert torch.equal(model.encode(white, all_items).vectors, model.encode(inputs(), all_items).vectors)


def test_text_cannot_be_replaced_after_whitening():
    white = model_of(config()).item_tower.whiten_inputs(inputs())
    with pytest.raises(ValueError, match="whitened"):
        white.with_text(inputs().tokens["text"].values)
