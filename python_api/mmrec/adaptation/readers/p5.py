"""P5: ``<Name>.txt`` or ``sequential_data.txt`` (``user item item …`` in order), with item facts beside it.

Facts come from ``items.jsonl`` (item_id, asin, attributes) or, without it, from ``*item2attributes.json`` decoded by
``datamaps.json``. Ids are the files' own integers. Order only, no timestamps.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..catalogue import Catalogue
from ..errors import CatalogueError
from ..interactions import Interactions
from ..schema import TableSchema, frame_of, normalise_table
from . import _files

LOOKS_FOR = "<Name>.txt or sequential_data.txt with lines 'user item item …', and items.jsonl or datamaps.json"
_UNKNOWN = "Unknown"


def detect(folder: Path) -> bool:
    facts = (folder / "items.jsonl").is_file() or (folder / "datamaps.json").is_file()
    return facts and _sequence_file(folder) is not None


def _sequence_file(folder: Path) -> Path | None:
    standard = folder / "sequential_data.txt"
    if standard.is_file():
        return standard
    return next((path for path in sorted(folder.glob("*.txt")) if _looks_sequential(path)), None)


def _looks_sequential(path: Path) -> bool:
    with path.open("rb") as stream:
        first = stream.readline(1 << 16).split()
    return len(first) > 1 and all(part.isdigit() for part in first)


def read(folder: Path) -> Catalogue:
    path = _sequence_file(folder)
    assert path is not None
    users, items = _sequences(path)
    rows, notes, where = _facts(folder)
    listed = [row["item_id"] for row in rows]
    item_ids = _files.ordered_ids(listed or items)
    user_ids = _files.ordered_ids(users)
    interactions = Interactions.from_rows(
        _files.rows_of(users, user_ids, what="user", where=path.name, known=path.name),
        _files.rows_of(items, item_ids, what="item", where=path.name, known=where),
    )
    schema = TableSchema(multi=("attributes",))
    frame = frame_of(rows or [{"item_id": item, "attributes": None} for item in item_ids], where)
    return Catalogue(
        name=folder.resolve().name if path.name == "sequential_data.txt" else path.stem,
        item_ids=item_ids,
        user_ids=user_ids,
        interactions=interactions,
        items=normalise_table(frame, schema, ids=item_ids, id_column="item_id", where=where),
        schema=schema,
        notes=("interactions have an order but no time", *notes),
    )


def _sequences(path: Path) -> tuple[list[str], list[str]]:
    users: list[str] = []
    items: list[str] = []
    seen: set[str] = set()
    for number, line in _files.read_lines(path):
        user, *history = line.split()
        if not history or not all(part.isdigit() for part in (user, *history)):
            raise CatalogueError(f"{path.name} line {number}: needs 'user item item …' in integers")
        if user in seen:
            raise CatalogueError(f"{path.name} line {number}: user {user} has a line already")
        seen.add(user)
        users += [user] * len(history)
        items += history
    if not items:
        raise CatalogueError(f"{path.name}: empty file")
    return users, items


def _facts(folder: Path) -> tuple[list[dict[str, Any]], list[str], str]:
    """Rows of the item table, notes, and the file that lists the items."""
    listing = folder / "items.jsonl"
    if listing.is_file():
        rows = []
        for number, row in _files.read_jsonl(listing):
            _files.require_columns(list(row), ["item_id"], f"{listing.name} line {number}")
            rows.append(
                {
                    "item_id": str(row["item_id"]),
                    "attributes": _strings(row.get("attributes"), f"{listing.name} line {number}: attributes"),
                    "asin": row.get("asin"),
                }
            )
    else:
        rows = _decoded(folder)
        listing = folder / "datamaps.json"
    unknown = sum(_UNKNOWN in (row["attributes"] or ()) for row in rows)
    for row in rows:
        row["attributes"] = [value for value in row["attributes"] or () if value != _UNKNOWN]
    notes = [f"attribute {_UNKNOWN!r} of {unknown} item(s) is read as missing"] if unknown else []
    return rows, notes, listing.name


def _decoded(folder: Path) -> list[dict[str, Any]]:
    maps = _files.read_json(folder / "datamaps.json")
    if not isinstance(maps, dict) or not isinstance(maps.get("id2item"), dict):
        raise CatalogueError("datamaps.json: needs an object with 'id2item'")
    path = _files.one_file(folder, ["*item2attributes.json"])
    coded = _files.read_json(path) if path else {}
    names = maps.get("id2attribute", {})
    if not isinstance(names, dict):
        raise CatalogueError(f"datamaps.json: id2attribute needs an object, got {type(names).__name__}")
    if path and not (isinstance(coded, dict) and all(isinstance(codes, list) for codes in coded.values())):
        raise CatalogueError(f"{path.name}: needs an object of lists, keyed by item")
    rows = []
    for item, asin in maps["id2item"].items():
        codes = [str(code) for code in coded.get(item, [])]
        strange = [code for code in codes if code not in names]
        if strange:
            raise CatalogueError(f"{path.name if path else folder}: attribute {strange[0]} is not in datamaps.json")
        attributes = _strings([names[code] for code in codes], "datamaps.json: id2attribute")
        rows.append({"item_id": item, "attributes": attributes, "asin": asin})
    return rows


def _strings(value: Any, where: str) -> list[str] | None:
    if value is not None and not (isinstance(value, list) and all(isinstance(part, str) for part in value)):
        raise CatalogueError(f"{where} needs strings, got {value!r:.80}")
    return value
