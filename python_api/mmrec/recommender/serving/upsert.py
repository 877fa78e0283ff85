"""Items that came over HTTP, on their way into the store."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ...fusion.tokens import Tokens
from ..store import ItemRows, StoreVersion

if TYPE_CHECKING:
    from .schemas import ItemIn

__all__ = ["Encode", "encoded", "item_rows"]

# Items by column, with "item_id", as the model reads them.
Encode = Callable[[Sequence[Mapping[str, Any]]], ItemRows]
# Lengths beyond which scores might not be finite in float32; vectors of towers are some ten long.
_MOST = 1e6


def encoded(items: Sequence[ItemIn], encode: Encode | None) -> ItemRows | None:
    """What the model makes of those items that are given by content, in their order; None where none is.

    Raises:
        ValueError: an id twice, content that does not fit, or that nobody encodes.
    """
    ids = [item.id for item in items]
    if len(set(ids)) != len(ids):
        twice = next(name for n, name in enumerate(ids) if name in ids[:n])
        raise ValueError(f"items: {twice!r} is there twice")
    which = [n for n, item in enumerate(items) if item.content is not None]
    for n in which:
        if encode is None:
            raise ValueError(f"items.{n}.content: this server has no model of items; give vector and mass")
        if items[n].vector is not None or items[n].mass is not None:
            raise ValueError(f"items.{n}: content makes vector and mass; give it or them")
        if "item_id" in (items[n].content or {}):
            raise ValueError(f"items.{n}.content: the id stands beside it, not in it")
    if not which or encode is None:
        return None
    return encode([{"item_id": items[n].id, **(items[n].content or {})} for n in which])


def item_rows(items: Sequence[ItemIn], version: StoreVersion, made: ItemRows | None) -> ItemRows:
    """All of each item: what was given, or `made` of its content, and else what it has in `version`.

    Raises:
        ValueError: a vector of another width or too long, a modality that the store does not have, a new item without
            content, and without vector or mass, or content that gave other token rows than the store has.
    """
    ids = [item.id for item in items]
    rows = version.rows(ids)
    old = rows >= 0
    width, modalities = version.meta.width, version.meta.modalities
    vectors, mass = torch.zeros(len(ids), width), torch.zeros(len(ids), len(modalities))
    known, content = torch.zeros(len(ids), dtype=torch.bool), torch.zeros(len(ids), 16, dtype=torch.uint8)
    titles = [""] * len(ids)
    places = torch.from_numpy(old.nonzero()[0])
    vectors[places], mass[places] = version.vectors(rows[old]), version.mass(rows[old])
    known[places], content[places] = version.known(rows[old]), version.content(rows[old])
    for place, title in zip(places.tolist(), version.titles(rows[old]), strict=True):
        titles[place] = title
    if made is not None:
        which = [n for n, item in enumerate(items) if item.content is not None]
        vectors[which], mass[which], content[which] = made.vectors.float(), made.mass.float(), made.content
        known[which] = made.known
        for n, title in zip(which, made.titles, strict=True):
            titles[n] = title
    for n, item in enumerate(items):
        where = f"items.{n}"
        if item.content is None and not old[n] and (item.vector is None or item.mass is None):
            missing = "vector" if item.vector is None else "mass"
            raise ValueError(f"{where}.{missing}: a new item needs one, and {item.id!r} is new")
        if item.vector is not None:
            if len(item.vector) != width:
                raise ValueError(f"{where}.vector: must have {width} elements, got {len(item.vector)}")
            vectors[n] = torch.tensor(item.vector, dtype=torch.float64)
            if not float(vectors[n].norm()) <= _MOST:
                raise ValueError(f"{where}.vector: must have a length of at most {_MOST:g}")
            digest = hashlib.blake2b(vectors[n].numpy().tobytes(), digest_size=16).digest()
            content[n] = torch.frombuffer(bytearray(digest), dtype=torch.uint8)
        if item.mass is not None:
            unknown = sorted(set(item.mass) - set(modalities))
            if unknown:
                raise ValueError(f"{where}.mass: there is no modality {unknown[0]!r}; there are {list(modalities)}")
            mass[n] = torch.tensor([item.mass.get(name, 0.0) for name in modalities])
        known[n] = known[n] if item.known is None else item.known
        titles[n] = titles[n] if item.title is None else item.title
    made_of = np.array([item.content is not None for item in items])
    # Whose vector is another has other content, of which nothing else is known.
    kept = old & ~made_of & np.array([item.vector is None for item in items])
    tokens = {}
    for name, tokens_width in version.meta.tokens.items():
        new = None if made is None else made.tokens.get(name)
        if made is not None and (new is None or new.values.shape[1] != tokens_width):
            got = "none" if new is None else f"width {new.values.shape[1]}"
            raise ValueError(f"items: the store has token rows of {name!r} of width {tokens_width}, content gave {got}")
        tokens[name] = _tokens(version.tokens(name, rows[kept]), kept, new, made_of)
    return ItemRows(ids, vectors, mass, known, content, titles, tokens)


def _tokens(kept: Tokens, old: np.ndarray, made: Tokens | None, new: np.ndarray) -> Tokens:
    """Token rows of items: `kept` are those of the items `old`, `made` those of the items `new`; others have none."""
    parts = [kept] if made is None else [kept, made]
    values, kind = torch.cat([part.values for part in parts]), torch.cat([part.kind for part in parts])
    lengths = torch.cat([*(part.offsets.diff() for part in parts), torch.zeros(1, dtype=torch.int64)])
    every = Tokens(values, torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]), kind)
    places = np.full(len(old), len(lengths) - 1)  # the last one of all, which is empty
    places[old], places[new] = np.arange(old.sum()), old.sum() + np.arange(new.sum())
    return every.select(torch.from_numpy(places))
