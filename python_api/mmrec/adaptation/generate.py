"""A catalogue with planted structure, for demos and tests that must not depend on anybody's data.

Every item has one *theme* (and a trace of a second one) that shows in all modalities, and three traits that show in one
each: a *style* in its words, a *look* in its picture, a *band* in its table. Users like some themes and one value
of each trait, so every modality adds something that no other one tells. Order matters too: each theme has a successor
that people tend to move on to, and each item a follow-up item. Popularity is skewed, pieces are missing.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..files import write_atomic
from ._planted import Behaviour, World, plant, sample_events
from ._render import ITEM_SCHEMA, USER_SCHEMA, draw_images, item_rows, user_rows
from .catalogue import Catalogue
from .errors import CatalogueError
from .interactions import Interactions
from .schema import frame_of, normalise_table

_MISSING = {"text": 0.05, "image": 0.1, "table": 0.08}
PLANTED_FILE = "planted.npz"


def generate_catalogue(
    folder: str | Path,
    *,
    users: int = 600,
    items: int = 400,
    seed: int = 0,
    mean_length: float = 20.0,
    cold_items: int = 20,
    image_size: int = 64,
    missing: Mapping[str, float] | None = None,
    behaviour: Behaviour | None = None,
) -> Catalogue:
    """Draws a catalogue and writes it to ``folder`` in the folder layout, with its truth in ``planted.npz``.

    The same arguments give the same fingerprint on every run (with the same numpy and pillow versions).

    Args:
        folder: where to write; new, empty, or an earlier catalogue that is replaced.
        users, items: how many.
        seed: of everything that is drawn.
        mean_length: mean interactions per user; nobody has fewer than 5.
        cold_items: items that occur only as a user's last interaction, so that leave-last-out training never sees them.
        image_size: pixels per side.
        missing: share of items without ``text`` and without ``image``, and of empty ``table`` cells; default .05, .1,
            .08.
        behaviour: how strongly taste, order and popularity drive choices.

    Returns:
        The catalogue as :meth:`Catalogue.load` reads it from ``folder``.
    """
    rates = _check(users, items, cold_items, mean_length, image_size, missing)
    streams = np.random.SeedSequence(seed).spawn(4)
    world_rng, event_rng, content_rng, missing_rng = (np.random.default_rng(stream) for stream in streams)
    world = plant(world_rng, users=users, items=items, cold_items=cold_items)
    events = sample_events(event_rng, world, behaviour or Behaviour(), mean_length=mean_length)
    folder = Path(folder).absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", suffix=".draw", dir=folder.parent) as scratch:
        item_ids, user_ids = _ids("i", items), _ids("u", users)
        rows = item_rows(content_rng, world, item_ids)
        images: list[Path | None] = list(draw_images(content_rng, world, item_ids, Path(scratch), image_size))
        people = user_rows(content_rng, world, user_ids)
        _drop_pieces(missing_rng, rows, images, rates)
        catalogue = Catalogue(
            name=f"generated-{users}x{items}-seed{seed}",
            item_ids=item_ids,
            user_ids=user_ids,
            interactions=Interactions.from_rows(**events),
            items=normalise_table(
                frame_of(rows, "items"), ITEM_SCHEMA, ids=item_ids, id_column="item_id", where="items"
            ),
            users=normalise_table(
                frame_of(people, "users"), USER_SCHEMA, ids=user_ids, id_column="user_id", where="users"
            ),
            schema=ITEM_SCHEMA,
            user_schema=USER_SCHEMA,
            images=images,
        )
        catalogue.save(folder)
    _save_planted(world, folder / PLANTED_FILE)
    return Catalogue.load(folder, layout="folder")


def _check(
    users: int, items: int, cold_items: int, mean_length: float, image_size: int, missing: Mapping[str, float] | None
) -> dict[str, float]:
    if users < 1:
        raise CatalogueError(f"users needs at least 1, got {users}")
    if items < 20:
        raise CatalogueError(f"items needs at least 20, got {items}")
    if not 0 <= cold_items <= items // 2:
        raise CatalogueError(f"cold_items needs 0..{items // 2} (half of items), got {cold_items}")
    if mean_length < 6:
        raise CatalogueError(f"mean_length needs at least 6, got {mean_length}")
    if image_size < 16:
        raise CatalogueError(f"image_size needs at least 16, got {image_size}")
    rates = {**_MISSING, **(missing or {})}
    if set(rates) != set(_MISSING) or not all(0 <= rate <= 1 for rate in rates.values()):
        raise CatalogueError(f"missing needs shares in 0..1 for {sorted(_MISSING)}, got {dict(missing or {})}")
    return rates


def _ids(prefix: str, count: int) -> list[str]:
    width = len(str(count))
    return [f"{prefix}{number:0{width}d}" for number in range(1, count + 1)]


def _drop_pieces(
    rng: np.random.Generator, rows: list[dict[str, Any]], images: list[Path | None], rates: dict[str, float]
) -> None:
    table = ITEM_SCHEMA.numeric + ITEM_SCHEMA.categorical + ITEM_SCHEMA.multi
    no_text, no_image = (rng.random(len(rows)) < rates[name] for name in ("text", "image"))
    no_cell = rng.random((len(rows), len(table))) < rates["table"]
    for i, row in enumerate(rows):
        if no_text[i]:
            row.update(dict.fromkeys(ITEM_SCHEMA.text))
        if no_image[i]:
            images[i] = None
        row.update({column: None for column, gone in zip(table, no_cell[i], strict=True) if gone})


def _save_planted(world: World, path: Path) -> None:
    content = io.BytesIO()
    np.savez(content, **world.arrays())  # type: ignore[arg-type]
    write_atomic(path, content.getvalue())
