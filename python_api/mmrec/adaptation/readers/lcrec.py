"""LC-Rec: ``X.inter.json`` {user: [items in order]}, ``X.item.json`` {item: facts}, optional ``X.index.json`` {item:
codes}.

Order only, no timestamps. Ids are the files' own integers, in integer order. ``categories`` is one comma-separated
path.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..catalogue import Catalogue
from ..errors import CatalogueError
from ..interactions import Interactions
from ..schema import TableSchema, frame_of, normalise_table
from . import _files

LOOKS_FOR = "*.inter.json and *.item.json"


def detect(folder: Path) -> bool:
    return any(folder.glob("*.inter.json")) and any(folder.glob("*.item.json"))


def read(folder: Path) -> Catalogue:
    inter_path = _files.one_file(folder, ["*.inter.json"])
    item_path = _files.one_file(folder, ["*.item.json"])
    assert inter_path is not None and item_path is not None
    facts, histories = _objects(item_path, dict), _objects(inter_path, list)
    codes_path = _files.one_file(folder, ["*.index.json"])
    codes = _objects(codes_path, list) if codes_path else {}

    item_ids, user_ids = _files.ordered_ids(list(facts)), _files.ordered_ids(list(histories))
    events = [str(item) for user in user_ids for item in histories[user]]
    interactions = Interactions.from_rows(
        np.repeat(np.arange(len(user_ids), dtype=np.int32), [len(histories[user]) for user in user_ids]),
        _files.rows_of(events, item_ids, what="item", where=inter_path.name, known=item_path.name),
    )
    rows = [_row(item, facts[item], codes.get(item), item_path.name) for item in item_ids]
    schema = TableSchema(title="title", text=("title", "description"), categorical=("brand",), multi=("categories",))
    frame = frame_of(rows, item_path.name)
    return Catalogue(
        name=item_path.name.removesuffix(".item.json"),
        item_ids=item_ids,
        user_ids=user_ids,
        interactions=interactions,
        items=normalise_table(frame, schema, ids=item_ids, id_column="item_id", where=item_path.name),
        schema=schema,
        notes=("interactions have an order but no time",),
    )


def _objects(path: Path, kind: type) -> dict:
    value = _files.read_json(path)
    if not isinstance(value, dict) or not value:
        raise CatalogueError(f"{path.name}: needs one non-empty object, keyed by id")
    for key, entry in value.items():
        if not isinstance(entry, kind):
            raise CatalogueError(f"{path.name}: entry {key!r} needs {kind.__name__}, got {type(entry).__name__}")
    return value


def _row(item: str, facts: dict, codes: list[str] | None, where: str) -> dict:
    categories = facts.get("categories")
    if isinstance(categories, str):
        categories = categories.split(",")
    if not isinstance(categories, list | None):
        raise CatalogueError(f"{where}: entry {item!r}: categories needs a string or a list, got {categories!r:.80}")
    return {
        "item_id": item,
        "title": _files.plain_text(facts.get("title")),
        "description": _files.plain_text(facts.get("description")),
        "brand": facts.get("brand"),
        "categories": [_files.plain_text(part) for part in categories or []],
        **({} if codes is None else {"semantic_id": "".join(map(str, codes))}),
    }
