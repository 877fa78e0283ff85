"""Raw Amazon review dumps: a file of reviews and a ``meta_*`` file, one object a line, plain or gzipped.

Field names of 2014 (metadata in Python literals), 2018 and 2023 are known. Items are the reviewed ones; metadata of
others is left out. The text of reviews is not read: it belongs to interactions, and a test interaction's review would
tell its answer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..catalogue import Catalogue
from ..errors import CatalogueError
from ..interactions import Interactions
from ..schema import TableSchema, frame_of, normalise_table
from . import _files

_ENDINGS = (".json.gz", ".jsonl.gz", ".json", ".jsonl")
LOOKS_FOR = "meta_X.json[l][.gz] and X_5.json[l][.gz], reviews_X… or X.json[l][.gz]"


def _pair(folder: Path) -> tuple[Path, Path] | None:
    files = [path for path in sorted(folder.iterdir()) if path.name.endswith(_ENDINGS)]
    meta = [path for path in files if path.name.startswith("meta_")]
    for path in meta:
        subject = _subject(path)
        reviews = [other for other in files if other not in meta and _subject(other) == subject]
        if len(meta) == 1 and len(reviews) == 1:
            return reviews[0], path
        if len(reviews) > 1 or len(meta) > 1:
            names = ", ".join(p.name for p in (*reviews, *meta))
            raise CatalogueError(f"{folder}: needs one file of reviews and one of metadata, found {names}")
    return None


def _subject(path: Path) -> str:
    stem = path.name
    for ending in _ENDINGS:
        stem = stem.removesuffix(ending)
    return stem.removeprefix("meta_").removeprefix("reviews_").removesuffix("_5")


def detect(folder: Path) -> bool:
    return _pair(folder) is not None


def read(folder: Path) -> Catalogue:
    pair = _pair(folder)
    assert pair is not None
    reviews_path, meta_path = pair
    reviews = _reviews(reviews_path)
    facts = _metadata(meta_path)
    item_ids, user_ids = _files.ordered_ids(reviews["item"]), _files.ordered_ids(reviews["user"])
    bare = sum(item not in facts for item in item_ids)
    notes = [f"{meta_path.name}: {len(facts) - (len(item_ids) - bare)} item(s) without reviews were left out"]
    if bare:
        notes.append(f"{bare} reviewed item(s) have no metadata")
    interactions = Interactions.from_rows(
        _files.rows_of(reviews["user"], user_ids, what="user", where=reviews_path.name, known=reviews_path.name),
        _files.rows_of(reviews["item"], item_ids, what="item", where=reviews_path.name, known=reviews_path.name),
        rating=np.array(reviews["rating"], dtype=np.float32),
        timestamp=_files.seconds(np.array(reviews["time"], dtype=np.int64), reviews_path.name),
    )
    rows = [{"item_id": item, **facts.get(item, _facts({}))} for item in item_ids]
    schema = TableSchema(
        title="title",
        text=("title", "description", "features"),
        numeric=("price",),
        categorical=("brand", "main_category"),
        multi=("categories",),
        image=("image_url",),
        units={"price": "USD"},
    )
    return Catalogue(
        name=_subject(reviews_path),
        item_ids=item_ids,
        user_ids=user_ids,
        interactions=interactions,
        items=normalise_table(
            frame_of(rows, meta_path.name), schema, ids=item_ids, id_column="item_id", where=meta_path.name
        ),
        schema=schema,
        notes=tuple(notes),
    )


def _first(row: dict[str, Any], *names: str) -> Any:
    return next((row[name] for name in names if row.get(name) not in (None, "", [])), None)


def _reviews(path: Path) -> dict[str, list]:
    columns: dict[str, list] = {"user": [], "item": [], "rating": [], "time": []}
    for number, row in _files.read_jsonl(path, python_literals=True):
        user, item = _first(row, "reviewerID", "user_id"), _first(row, "parent_asin", "asin")
        time, rating = _first(row, "unixReviewTime", "timestamp"), _first(row, "overall", "rating")
        for name, value in (("reviewerID or user_id", user), ("asin", item), ("unixReviewTime or timestamp", time)):
            if value is None:
                raise CatalogueError(f"{path.name} line {number}: missing column {name}; found {sorted(row)}")
        if isinstance(time, bool) or not isinstance(time, (int, float)) or not abs(time) < 2**63:
            raise CatalogueError(f"{path.name} line {number}: the time must be a number, got {time!r:.80}")
        if rating is not None and _files.number(rating) is None:
            raise CatalogueError(f"{path.name} line {number}: the rating must be a number, got {rating!r:.80}")
        columns["user"].append(str(user))
        columns["item"].append(str(item))
        columns["time"].append(int(time) // 1000 if "unixReviewTime" not in row else int(time))
        columns["rating"].append(float("nan") if rating is None else _files.number(rating))
    return columns


def _metadata(path: Path) -> dict[str, dict[str, Any]]:
    """Facts by item; where an item occurs again, its later rows only fill gaps."""
    facts: dict[str, dict[str, Any]] = {}
    for number, row in _files.read_jsonl(path, python_literals=True):
        item = _first(row, "parent_asin", "asin")
        if item is None:
            raise CatalogueError(f"{path.name} line {number}: missing column asin; found {sorted(row)}")
        known = facts.setdefault(str(item), {})
        for column, value in _facts(row).items():
            if known.get(column) is None:
                known[column] = value
    return facts


def _facts(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "title": _files.plain_text(row.get("title")),
        "description": _files.plain_text(row.get("description")),
        "features": _files.plain_text(_first(row, "features", "feature")),
        "price": _files.number(row.get("price")),
        "brand": _files.plain_text(_first(row, "brand", "store")),
        "main_category": _files.plain_text(_first(row, "main_category", "main_cat")),
        "categories": _categories(_first(row, "categories", "category")),
        "image_url": _image_url(_first(row, "imUrl", "imageURLHighRes", "imageURL", "images", "image")),
    }


def _categories(value: Any) -> list[str] | None:
    """Each category once; 2014 has a list of paths, 2018 and 2023 one path."""
    if isinstance(value, str):
        value = [value]
    entries = value if isinstance(value, list) else []
    flat = [part for entry in entries for part in (entry if isinstance(entry, list) else [entry])]
    return list(dict.fromkeys(text for part in flat if (text := _files.plain_text(part)))) or None


def _image_url(value: Any) -> str | None:
    if isinstance(value, list):
        value = value[0] if value else None
    if isinstance(value, dict):
        value = _first(value, "hi_res", "large", "thumb")
    return value if isinstance(value, str) else None
