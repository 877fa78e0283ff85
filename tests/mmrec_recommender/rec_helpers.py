"""A catalogue of twelve items in arrays: some lack a modality, one has no content, two were never trained."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmrec.fusion import TableInputs, Tokens
from mmrec.recommender import Batch, ItemInputs, Objective, Recommender, RecommenderConfig, TableSpec

ITEMS = 12
BARE = 4  # nothing but an identity
COLD = 7  # content, but never trained
NOTHING = 9  # neither content nor training
TRAINED = np.array([item not in (COLD, NOTHING) for item in range(ITEMS)])
KNOWN = np.flatnonzero(TRAINED)
POPULARITY = np.where(TRAINED, np.arange(ITEMS) % 5 + 1, 0)

TEXTS = [2, 1, 0, 2, 0, 1, 2, 2, 1, 0, 2, 1]
IMAGES = [1, 0, 1, 1, 0, 1, 0, 1, 1, 0, 0, 1]
PATCHES = 3

SMALL: dict[str, Any] = {
    "width": 8, "item_queries": 2, "item_heads": 2, "text_rank": 4, "image_rank": 3, "experts_shared": 1,
    "experts_private": 1, "experts_per_token": 2, "expert_hidden": 6, "layers": 2, "heads": 2, "max_length": 6,
    "identity_dropout": 0.0, "content_dropout": 0.0, "dropout": 0.0, "extra_negatives": 5, "table_pooled": False,
}  # fmt: skip
CONTENT = ("text", "image", "table")
ALL = ("identity", *CONTENT)


def config(*modalities: str, **changes: Any) -> RecommenderConfig:
    return RecommenderConfig(**{**SMALL, "modalities": modalities or ALL, **changes})


def inputs(seed: int = 0) -> ItemInputs:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    text_kind = torch.cat([torch.arange(count) for count in TEXTS])
    text = Tokens(normal(len(text_kind), 6) + 2, torch.tensor([0, *TEXTS]).cumsum(0), text_kind)
    images = torch.tensor(IMAGES)
    image_kind = torch.arange(PATCHES).repeat(int(images.sum()))
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), images.cumsum(0) * PATCHES])
    image = Tokens(normal(len(image_kind), 5), offsets, image_kind)
    mask = torch.tensor([[item not in (BARE, NOTHING, 1)] for item in range(ITEMS)])
    numeric = torch.where(mask, normal(ITEMS, 1), torch.nan)
    category = torch.tensor([[-1 if item in (BARE, NOTHING) else item % 3] for item in range(ITEMS)])
    bag = (torch.tensor([0, 2, 2, 2, 3, 3, 3, 3, 5, 5, 5, 5, 5]), torch.tensor([0, 1, 1, 0, 0]))
    texts = tuple(f"text {row}" for row in range(len(text_kind)))
    return ItemInputs(
        ITEMS,
        {"text": text, "image": image},
        TableInputs(numeric, mask, category, (bag,)),
        TableSpec(1, (3,), (2,)),
        texts,
    )


def model_of(settings: RecommenderConfig, trained: np.ndarray | None = TRAINED) -> Recommender:
    """A float64 model in eval mode whose parameters all differ from what they start with."""
    content = inputs()
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = Recommender(settings, content.spec, trained).double().eval()
    model.item_tower.fit_whitening(content, torch.from_numpy(KNOWN))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def objective_of(model: Recommender, popularity: np.ndarray = POPULARITY) -> Objective:
    return Objective(model, popularity).double()


def known_inputs() -> ItemInputs:
    return inputs().select(torch.from_numpy(KNOWN))


def batch() -> Batch:
    """Two windows of known items; item 3 is a target twice."""
    index, target = torch.tensor([0, 1, 3, 5, 6, 2]), torch.tensor([1, 3, 5, 6, 8, 3])
    return Batch(index, torch.tensor([0, 4, 6]), target)
