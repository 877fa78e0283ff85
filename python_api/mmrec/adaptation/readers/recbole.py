"""RecBole atomic files: ``X.inter`` and optional ``X.item``, ``X.user``; tab separated, every column head says
``name:type``.

token → categorical (text for titles and the like), token_seq → multi (text for titles), float → numeric, float_seq of
one length → a feature. ``rating`` and ``timestamp`` of the interactions are used; other columns of ``.inter`` are not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..catalogue import Catalogue, Features
from ..errors import CatalogueError
from ..interactions import Interactions
from ..schema import TableSchema, frame_of, normalise_table
from . import _files

LOOKS_FOR = "X.inter whose header is typed (user_id:token item_id:token …)"
_TYPES = ("token", "token_seq", "float", "float_seq")
_TEXT_WORDS = ("title", "name", "description", "overview", "plot", "summary", "text")


@dataclass(frozen=True)
class _Atomic:
    path: Path
    types: dict[str, str]
    columns: dict[str, list[str]]


def detect(folder: Path) -> bool:
    return _inter_file(folder) is not None


def _inter_file(folder: Path) -> Path | None:
    for path in sorted(folder.glob("*.inter")):
        with path.open(encoding="utf-8", errors="replace") as stream:
            if ":" in stream.readline():
                return path
    return None


def read(folder: Path) -> Catalogue:
    path = _inter_file(folder)
    assert path is not None
    inter = _read_atomic(path, ["user_id", "item_id"])
    if not inter.columns["user_id"]:
        raise CatalogueError(f"{path.name}: no interactions")
    item_file = _optional(path.with_suffix(".item"), "item_id")
    user_file = _optional(path.with_suffix(".user"), "user_id")
    item_ids = _files.ordered_ids((item_file or inter).columns["item_id"])
    user_ids = _files.ordered_ids({*inter.columns["user_id"], *(user_file.columns["user_id"] if user_file else ())})
    interactions = Interactions.from_rows(
        _files.rows_of(inter.columns["user_id"], user_ids, what="user", where=path.name, known=path.name),
        _files.rows_of(
            inter.columns["item_id"], item_ids, what="item", where=path.name, known=(item_file or inter).path.name
        ),
        rating=_numbers(inter, "rating", np.float32),
        timestamp=_times(inter),
    )
    schema, items, features = _table(item_file, "item_id", item_ids)
    user_schema, users, user_features = _table(user_file, "user_id", user_ids) if user_file else (None, None, {})
    notes = [f"{name}: sequences of numbers describe users and are not used" for name in user_features]
    return Catalogue(
        name=path.stem,
        item_ids=item_ids,
        user_ids=user_ids,
        interactions=interactions,
        items=items,
        users=users,
        schema=schema,
        user_schema=user_schema,
        features=features,
        notes=tuple(notes),
    )


def _optional(path: Path, id_column: str) -> _Atomic | None:
    return _read_atomic(path, [id_column]) if path.is_file() else None


def _read_atomic(path: Path, needed: Sequence[str]) -> _Atomic:
    types: dict[str, str] = {}
    rows: list[list[str]] = []
    for number, line in _files.read_lines(path):
        fields = line.rstrip("\r\n").split("\t")
        if not types:
            types = dict(_typed(field, path) for field in fields)
            if len(types) != len(fields):
                raise CatalogueError(f"{path.name}: a column occurs twice in the header")
            _files.require_columns(list(types), needed, path.name)
        elif len(fields) != len(types):
            raise CatalogueError(f"{path.name} line {number}: needs {len(types)} fields, got {len(fields)}")
        else:
            rows.append(fields)
    if not types:
        raise CatalogueError(f"{path.name}: empty file")
    values = [list(column) for column in zip(*rows, strict=True)] or [[] for _ in types]
    table = _Atomic(path, types, dict(zip(types, values, strict=True)))
    for column in needed:
        if "" in table.columns[column]:
            raise CatalogueError(
                f"{path.name}: column {column!r} is empty in data row {table.columns[column].index('') + 1}"
            )
    return table


def _typed(head: str, path: Path) -> tuple[str, str]:
    name, _, kind = head.strip().rpartition(":")
    if not name or kind not in _TYPES:
        raise CatalogueError(
            f"{path.name}: column head {head!r} needs the form name:type, type out of {', '.join(_TYPES)}"
        )
    return name, kind


def _numbers(table: _Atomic, column: str, dtype: type) -> np.ndarray | None:
    if column not in table.columns:
        return None
    try:
        return np.array([float(value) if value else float("nan") for value in table.columns[column]]).astype(dtype)
    except ValueError as error:
        raise CatalogueError(f"{table.path.name}: column {column!r} needs numbers ({error})") from None


def _times(inter: _Atomic) -> np.ndarray | None:
    times = _numbers(inter, "timestamp", np.float64)
    if times is None:
        return None
    if not np.isfinite(times).all():
        row = int(np.flatnonzero(~np.isfinite(times))[0])
        raise CatalogueError(f"{inter.path.name}: column 'timestamp' is empty in data row {row + 1}")
    return _files.seconds(np.floor(times).astype(np.int64), inter.path.name)


def _is_text(name: str) -> bool:
    return any(word in name.lower() for word in _TEXT_WORDS)


def _table(table: _Atomic | None, id_column: str, ids: list[str]) -> tuple[TableSchema, Any, dict[str, Features]]:
    if table is None:
        frame = frame_of([{id_column: i} for i in ids], id_column)
        return TableSchema(), normalise_table(frame, TableSchema(), ids=ids, id_column=id_column, where=id_column), {}
    roles: dict[str, list[str]] = {"text": [], "numeric": [], "categorical": [], "multi": []}
    columns: dict[str, list] = {id_column: table.columns[id_column]}
    features: dict[str, Features] = {}
    for name, kind in table.types.items():
        values = table.columns[name]
        if name == id_column:
            continue
        if kind == "float_seq":
            features[name] = _vectors(table, name, id_column, ids)
            continue
        role = {"float": "numeric", "token": "categorical", "token_seq": "multi"}[kind]
        role = "text" if role != "numeric" and _is_text(name) else role
        roles[role].append(name)
        columns[name] = [value.split() for value in values] if role == "multi" else list(values)
    title = next((name for name in roles["text"] if "title" in name.lower() or name.lower().endswith("name")), None)
    schema = TableSchema(
        title=title,
        text=tuple(roles["text"]),
        numeric=tuple(roles["numeric"]),
        categorical=tuple(roles["categorical"]),
        multi=tuple(roles["multi"]),
    )
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    frame = frame_of(rows, table.path.name)
    return schema, normalise_table(frame, schema, ids=ids, id_column=id_column, where=table.path.name), features


def _vectors(table: _Atomic, name: str, id_column: str, ids: list[str]) -> Features:
    try:
        rows = [[float(part) for part in value.split()] for value in table.columns[name]]
    except ValueError as error:
        raise CatalogueError(f"{table.path.name}: column {name!r} needs numbers ({error})") from None
    lengths = {len(row) for row in rows if row}
    if len(lengths) > 1:
        raise CatalogueError(f"{table.path.name}: column {name!r} needs sequences of one length, got {sorted(lengths)}")
    width = lengths.pop() if lengths else 0
    index = {identifier: row for row, identifier in enumerate(ids)}
    values, mask = np.zeros((len(ids), width), dtype=np.float32), np.zeros(len(ids), dtype=bool)
    for identifier, row in zip(table.columns[id_column], rows, strict=True):
        if row:
            values[index[identifier]], mask[index[identifier]] = row, True
    return Features(values, mask)
