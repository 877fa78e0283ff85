"""Items for stores: vectors, masses, titles and token rows that tell which item they are of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mmrec.fusion import Tokens
from mmrec.recommender.store import ItemRows, Meta

WIDTH = 16
MODALITIES = ("identity", "text")


def meta(dtype: str = "float32", **changes: Any) -> Meta:
    return Meta(
        **{"width": WIDTH, "dtype": dtype, "modalities": MODALITIES, "model": "m1", "tokens": {"text": 4}} | changes
    )


def items(ids: Sequence[str], seed: int = 0) -> ItemRows:
    """Their content is a function of the id and the seed."""
    generator = torch.Generator()

    def of(name: str, *shape: int) -> torch.Tensor:
        generator.manual_seed(int.from_bytes(name.encode()[-6:], "little") + 1000003 * seed)
        return torch.randn(*shape, generator=generator)

    n = len(ids)
    counts = [len(name) % 3 for name in ids]
    offsets = torch.tensor([0, *counts]).cumsum(0)
    values = torch.cat([torch.zeros(0, 4), *(of(name, count, 4) for name, count in zip(ids, counts, strict=True))])
    return ItemRows(
        ids=list(ids),
        vectors=torch.stack([of(name, WIDTH) for name in ids]) if n else torch.zeros(0, WIDTH),
        mass=torch.stack([of(name, 2).abs() for name in ids]) if n else torch.zeros(0, 2),
        known=torch.tensor([len(name) % 2 == 0 for name in ids], dtype=torch.bool),
        content=torch.stack([(of(name, 16) * 50).to(torch.int32).remainder(256).to(torch.uint8) for name in ids])
        if n else torch.zeros(0, 16, dtype=torch.uint8),
        titles=[f"Title of {name}, {seed} ✓" for name in ids],
        tokens={"text": Tokens(values.bfloat16().float(), offsets, torch.arange(len(values)) % 2)},
    )  # fmt: skip
