"""Items for stores: vectors, masses, titles and token rows that tell which item they are of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmrec.fusion import Tokens
from mmrec.recommender.store import ItemRows, ItemStore, Meta, StoreVersion

WIDTH = 16
MODALITIES = ("identity", "text")
IDS = [f"item-{n}" * (1 + n % 3) for n in range(300)] + ["ü", "𝄞", " ", "a,b"]


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


def made(folder: Path, dtype: str = "float32", ids: list[str] = IDS, seed: int = 0) -> ItemStore:
    store = ItemStore(folder)
    with store.writer() as writer:
        writer.create(meta(dtype), [items(ids[:100], seed), items(ids[100:], seed)])
    return store


def rounded(vectors: torch.Tensor, dtype: str) -> torch.Tensor:
    if dtype == "int8":
        scale = vectors.abs().amax(1, keepdim=True) / 127
        return (vectors / scale).round() * scale
    return vectors.to(getattr(torch, dtype)).float()


def assert_holds(version: StoreVersion, expected: ItemRows, dtype: str = "float32") -> None:
    """`expected` are all items, in the order of their rows."""
    assert version.num_rows == len(version) == len(expected)
    rows = version.rows(expected.ids)
    assert rows.tolist() == list(range(len(expected)))
    order = np.random.default_rng(0).permutation(len(rows))
    picked = rows[order]
    assert version.ids(picked) == [expected.ids[n] for n in order]
    assert version.titles(picked) == [expected.titles[n] for n in order]
    assert torch.equal(version.vectors(picked), rounded(expected.vectors, dtype)[order])
    assert torch.equal(version.mass(picked), expected.mass.half().float()[order])
    assert torch.equal(version.known(picked), expected.known[order])
    assert torch.equal(version.content(picked), expected.content[order])
    found, wanted = version.tokens("text", picked), expected.tokens["text"].select(torch.from_numpy(order))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def patched(base: ItemRows, *changes: ItemRows) -> ItemRows:
    """All items after the changes, in the order of their rows."""
    latest = {name: (base, n) for n, name in enumerate(base.ids)}
    for change in changes:
        latest |= {name: (change, n) for n, name in enumerate(change.ids)}
    parts = [
        ItemRows(
            [part.ids[n]], part.vectors[n : n + 1], part.mass[n : n + 1], part.known[n : n + 1],
            part.content[n : n + 1], [part.titles[n]], {"text": part.tokens["text"].select(torch.tensor([n]))},
        )
        for part, n in latest.values()
    ]  # fmt: skip
    text = [part.tokens["text"] for part in parts]
    lengths = torch.cat([t.offsets.diff() for t in text])
    joined = Tokens(
        torch.cat([t.values for t in text]), torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        torch.cat([t.kind for t in text]),
    )  # fmt: skip
    return ItemRows(
        [part.ids[0] for part in parts],
        *(torch.cat([getattr(part, name) for part in parts]) for name in ("vectors", "mass", "known", "content")),
        [part.titles[0] for part in parts], {"text": joined},
    )  # fmt: skip


def versions_of(folder: Path) -> tuple[ItemRows, ItemRows]:
    """A store of two versions, the second of a base and a patch; what each holds."""
    store = made(folder)
    change = items(["item-3", "new"], seed=4)
    with store.writer() as writer:
        writer.upsert(change)
    return items(IDS), patched(items(IDS), change)
