"""The package's own layout.

``items.{csv,jsonl,parquet}`` (column ``item_id``), ``interactions.{…}`` (``user_id``, ``item_id``, optional ``rating``,
``timestamp`` in seconds, ``split``), optional ``users.{…}`` (``user_id``), ``images/<item_id>.*``,
``features/<modality>.npy`` with ``<modality>.mask.npy``, and ``catalogue.json`` (name, notes, roles of columns).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import numpy as np

from ..catalogue import Catalogue, Features
from ..errors import CatalogueError
from ..interactions import SPLITS, Interactions
from ..schema import TableSchema, infer_schema, normalise_table
from . import _files

if TYPE_CHECKING:
    import polars as pl

_SUFFIXES = (".parquet", ".jsonl", ".csv")
_IDS = ("user_id", "item_id")
_META_KEYS = {"format", "name", "notes", "items", "users", "item_order", "user_order"}
LOOKS_FOR = "interactions.{csv,jsonl,parquet} beside optional items.*, users.*, images/, features/"


def _table_file(folder: Path, stem: str) -> Path | None:
    return _files.one_file(folder, [stem + suffix for suffix in _SUFFIXES])


def detect(folder: Path) -> bool:
    return any((folder / f"interactions{suffix}").is_file() for suffix in _SUFFIXES)


def read(folder: Path) -> Catalogue:
    meta = _read_meta(folder / "catalogue.json")
    notes = list(meta.get("notes", []))
    events_path = _table_file(folder, "interactions")
    assert events_path is not None
    events = _files.read_table(events_path, text_columns=_IDS)
    _files.require_columns(events.columns, _IDS, events_path.name)
    event_users, event_items = (_id_values(events, column, events_path.name) for column in _IDS)

    items_path, users_path = _table_file(folder, "items"), _table_file(folder, "users")
    item_frame = _read_side(items_path, "item_id") if items_path else _ids_only("item_id", event_items)
    user_frame = _read_side(users_path, "user_id") if users_path else None
    item_ids = _order(item_frame["item_id"].to_list(), [], meta.get("item_order"), "item_order")
    listed = user_frame["user_id"].to_list() if user_frame is not None else []
    user_ids = _order(listed, event_users, meta.get("user_order"), "user_order")

    schema = _schema(meta, "items", item_frame, "item_id")
    ids_only = user_frame is None or ("users" in meta and meta["users"] is None)
    user_schema = None if user_frame is None or ids_only else _schema(meta, "users", user_frame, "user_id")
    where = items_path.name if items_path else events_path.name
    items = normalise_table(item_frame, schema, ids=item_ids, id_column="item_id", where=where)
    users = None
    if user_frame is not None and user_schema is not None and users_path is not None:
        users = normalise_table(user_frame, user_schema, ids=user_ids, id_column="user_id", where=users_path.name)
    interactions = Interactions.from_rows(
        _files.rows_of(event_users, user_ids, what="user", where=events_path.name, known="users"),
        _files.rows_of(event_items, item_ids, what="item", where=events_path.name, known=where),
        **_event_values(events, events_path.name),
    )
    images = _images(folder, item_ids, items, schema, quoted=meta.get("format") is not None, notes=notes)
    return Catalogue(
        name=meta.get("name", folder.resolve().name),
        item_ids=item_ids,
        user_ids=user_ids,
        interactions=interactions,
        items=items,
        users=users,
        schema=schema,
        user_schema=user_schema,
        images=images,
        features=_features(folder / "features", len(item_ids)),
        notes=tuple(notes),
    )


def read_items(folder: Path, schema: TableSchema) -> Catalogue:
    """The items of a folder, see :meth:`Catalogue.load_items`."""
    path = _table_file(folder, "items") if folder.is_dir() else None
    if path is None:
        raise CatalogueError(f"{folder}: no items.csv, items.jsonl or items.parquet")
    meta = _read_meta(folder / "catalogue.json")
    frame = _read_side(path, "item_id")
    return items_of(frame, schema, path.name, folder, quoted=meta.get("format") is not None)


def items_of(
    frame: pl.DataFrame, schema: TableSchema, where: str, folder: Path | None = None, *, quoted: bool = False
) -> Catalogue:
    """A table's items in its own order, with the images and features of ``folder``."""
    import polars as pl

    if "item_id" not in frame.columns:
        raise CatalogueError(f"{where}: missing column(s) ['item_id']; found {frame.columns}")
    ids = _id_values(frame, "item_id", where)
    absent = [column for column in schema.columns if column not in frame.columns]
    frame = frame.with_columns([pl.lit(None, dtype=pl.String).alias(column) for column in absent])
    items = normalise_table(frame, schema, ids=ids, id_column="item_id", where=where)
    notes: list[str] = []
    images = [] if folder is None else _images(folder, ids, items, schema, quoted=quoted, notes=notes)
    empty = np.empty(0, np.int32)
    return Catalogue(
        name=where if folder is None else folder.resolve().name,
        item_ids=ids,
        user_ids=[],
        interactions=Interactions.from_rows(empty, empty),
        items=items,
        schema=schema,
        images=images,
        features={} if folder is None else _features(folder / "features", len(ids)),
        notes=tuple(notes),
    )


def _read_meta(path: Path) -> dict[str, Any]:
    meta = _files.read_json(path) if path.is_file() else {}
    if not isinstance(meta, dict) or set(meta) - _META_KEYS:
        raise CatalogueError(f"{path.name}: needs an object with keys out of {sorted(_META_KEYS)}")
    notes = meta.get("notes", [])
    if not isinstance(meta.get("name", ""), str):
        raise CatalogueError(f"{path.name}: name needs a string, got {meta['name']!r}")
    if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
        raise CatalogueError(f"{path.name}: notes needs a list of strings, got {notes!r}")
    return meta


def _id_values(frame: pl.DataFrame, column: str, where: str) -> list[str]:
    import polars as pl

    values = frame[column]
    if values.dtype.is_float() or isinstance(values.dtype, (pl.List, pl.Struct)):
        raise CatalogueError(f"{where}: column {column!r} needs strings or integers, got {values.dtype}")
    values = values.cast(pl.String)
    blank = values.is_null() | (values == "")
    if blank.any():
        raise CatalogueError(f"{where}: column {column!r} is empty in data row {int(blank.arg_true()[0]) + 1}")
    return values.to_list()


def _ids_only(column: str, values: list[str]) -> pl.DataFrame:
    import polars as pl

    return pl.DataFrame({column: sorted(set(values))}, schema={column: pl.String})


def _read_side(path: Path, id_column: str) -> pl.DataFrame:
    import polars as pl

    frame = _files.read_table(path, text_columns=_IDS)
    _files.require_columns(frame.columns, [id_column], path.name)
    return frame.with_columns(pl.Series(id_column, _id_values(frame, id_column, path.name), dtype=pl.String))


def _order(listed: list[str], met: list[str], rule: str | None, key: str) -> list[str]:
    """The ids of a table and those met in interactions: in the table's order ("file"), else in the order of ids."""
    if rule is None:
        return _files.ordered_ids({*listed, *met})
    if rule != "file":
        raise CatalogueError(f"catalogue.json: {key} can only be 'file', got {rule!r}")
    return list(dict.fromkeys([*listed, *met]))


def _schema(meta: dict[str, Any], key: str, frame: pl.DataFrame, id_column: str) -> TableSchema:
    return TableSchema.from_dict(meta[key]) if key in meta else infer_schema(frame, id_column)


def _event_values(events: pl.DataFrame, where: str) -> dict[str, np.ndarray | None]:
    import polars as pl

    values: dict[str, np.ndarray | None] = {"rating": None, "timestamp": None, "split": None}
    if "rating" in events.columns:
        if not (events["rating"].dtype.is_numeric() or events["rating"].dtype == pl.Null):
            raise CatalogueError(f"{where}: column 'rating' needs numbers, got {events['rating'].dtype}")
        values["rating"] = events["rating"].cast(pl.Float32).fill_null(float("nan")).to_numpy().astype(np.float32)
    if "timestamp" in events.columns:
        values["timestamp"] = _files.seconds(_files.integers(events["timestamp"], where), where)
    if "split" in events.columns:
        values["split"] = _split_values(events["split"], where)
    return values


def _split_values(split: pl.Series, where: str) -> np.ndarray:
    import polars as pl

    if split.dtype.is_nested():
        raise CatalogueError(f"{where}: column 'split' needs 0, 1, 2 or {', '.join(SPLITS)}, got {split.dtype}")
    if split.dtype == pl.String:
        codes = split.replace_strict(
            {name: code for code, name in enumerate(SPLITS)}, default=None, return_dtype=pl.Int8
        )
    else:
        codes = split.cast(pl.Int64, strict=False)
    bad = codes.is_null() | ~codes.is_between(0, 2).fill_null(False)
    if bad.any():
        raise CatalogueError(
            f"{where}: column 'split' needs 0, 1, 2 or {', '.join(SPLITS)}, got {split.filter(bad)[0]!r}"
        )
    return codes.to_numpy().astype(np.int8)


def _images(
    folder: Path, item_ids: list[str], items: pl.DataFrame, schema: TableSchema, *, quoted: bool, notes: list[str]
) -> list[Path | None]:
    index = {identifier: row for row, identifier in enumerate(item_ids)}
    images: list[Path | None] = [None] * len(item_ids)
    strays = 0
    directory = folder / "images"
    files = sorted(directory.iterdir()) if directory.is_dir() else []
    for path in files:
        if path.suffix.lower() not in _files.IMAGE_SUFFIXES:
            continue
        stem = path.name[: -len(path.suffix)]
        row = index.get(unquote(stem) if quoted else stem)
        if row is None:
            strays += 1
            continue
        other = images[row]
        if other is not None:
            raise CatalogueError(f"images: item {item_ids[row]!r} has two files, {other.name} and {path.name}")
        images[row] = path
    if strays:
        notes.append(f"images/: {strays} file(s) belong to no item and were left out")
    for column in schema.image:
        for row, value in enumerate(items[column].to_list()):
            if images[row] is None and value is not None and _is_image_in(folder, folder / value):
                images[row] = folder / value
    return images


def _is_image_in(folder: Path, path: Path) -> bool:
    """An image of this folder: a table must not be able to name any other file of the machine."""
    try:
        inside = path.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):
        return False
    return inside and path.suffix.lower() in _files.IMAGE_SUFFIXES and path.is_file()


def _features(folder: Path, rows: int) -> dict[str, Features]:
    features = {}
    for path in sorted(folder.glob("*.npy")) if folder.is_dir() else []:
        if path.name.endswith(".mask.npy"):
            continue
        mask = path.with_name(f"{path.stem}.mask.npy")
        features[path.stem] = _files.read_features(path, rows=rows, mask_path=mask if mask.is_file() else None)
    return features
