"""MMRec: ``X.inter`` (userID, itemID, rating, timestamp, x_label; tab separated) with ``*_feat.npy`` (row = item id),
or the split as three files ``trn.tsv``, ``val.tsv``, ``tst.tsv`` (user TAB item, no header).

Ids are row numbers from 0, in integer order.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

import numpy as np

from ..catalogue import Catalogue, Features
from ..errors import CatalogueError
from ..interactions import SPLITS, Interactions
from ..schema import TableSchema, frame_of, normalise_table
from . import _files

# user, item, rating, timestamp, split
_Rows: TypeAlias = tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None, np.ndarray | None]
_PARTS = ("trn.tsv", "val.tsv", "tst.tsv")
LOOKS_FOR = "trn.tsv, val.tsv and tst.tsv, or X.inter with columns userID, itemID and optional *_feat.npy"


def detect(folder: Path) -> bool:
    return all((folder / part).is_file() for part in _PARTS) or _inter_file(folder) is not None


def _inter_file(folder: Path) -> Path | None:
    for path in sorted(folder.glob("*.inter")):
        with path.open(encoding="utf-8", errors="replace") as stream:
            if ":" not in stream.readline():
                return path
    return None


def read(folder: Path) -> Catalogue:
    path = _inter_file(folder)
    notes: list[str] = []
    user, item, rating, timestamp, split = _read_parts(folder, notes) if path is None else _read_inter(path)
    features = _read_features(folder, notes)
    num_items = max([int(item.max()) + 1, *(len(feature.values) for feature in features.values())])
    _check_row_numbers(item, "item", path, folder)
    _check_row_numbers(user, "user", path, folder)
    for name, feature in features.items():
        if len(feature.values) != num_items:
            raise CatalogueError(f"{name}_feat.npy: needs one row per item ({num_items}), got {len(feature.values)}")
    item_ids = [str(row) for row in range(num_items)]
    frame = frame_of([{"item_id": i} for i in item_ids], folder.name)
    return Catalogue(
        name=path.stem if path else folder.resolve().name,
        item_ids=item_ids,
        user_ids=[str(row) for row in range(int(user.max()) + 1)],
        interactions=Interactions.from_rows(user, item, rating=rating, timestamp=timestamp, split=split),
        items=normalise_table(frame, TableSchema(), ids=item_ids, id_column="item_id", where=folder.name),
        features=features,
        notes=tuple(notes),
    )


def _check_row_numbers(rows: np.ndarray, what: str, path: Path | None, folder: Path) -> None:
    where = path.name if path else folder.name
    if rows.min() < 0 or rows.max() > 10 * len(rows) + 1000:
        raise CatalogueError(f"{where}: {what} ids must be row numbers from 0, got {rows.min()}..{rows.max()}")


def _read_inter(path: Path) -> _Rows:
    import polars as pl

    frame = _files.read_table(path, separator="\t")
    _files.require_columns(frame.columns, ["userID", "itemID"], path.name)
    if frame.height == 0:
        raise CatalogueError(f"{path.name}: no interactions")
    column = {name: _files.integers(frame[name], path.name) for name in ("userID", "itemID")}
    rating = timestamp = split = None
    if "rating" in frame.columns:
        if not (frame["rating"].dtype.is_numeric() or frame["rating"].dtype == pl.Null):
            raise CatalogueError(f"{path.name}: column 'rating' needs numbers, got {frame['rating'].dtype}")
        rating = frame["rating"].cast(pl.Float32).to_numpy()
    if "timestamp" in frame.columns:
        timestamp = _files.seconds(_files.integers(frame["timestamp"], path.name), path.name)
    if "x_label" in frame.columns:
        split = _files.integers(frame["x_label"], path.name)
        if not np.isin(split, (0, 1, 2)).all():
            raise CatalogueError(f"{path.name}: x_label needs 0, 1 or 2, got {np.unique(split)[:5].tolist()}")
    return column["userID"], column["itemID"], rating, timestamp, split


def _read_parts(folder: Path, notes: list[str]) -> _Rows:
    parts = [_read_pairs(folder / name) for name in _PARTS]
    for column, what in enumerate(("user", "item")):
        _check_row_numbers(np.concatenate([part[:, column] for part in parts]), what, None, folder)
    users = int(max(part[:, 0].max() for part in parts)) + 1
    counts = np.stack([np.bincount(part[:, 0], minlength=users) for part in parts])
    labels = [0, 1, 2]
    as_named, swapped = follows_rule(counts), follows_rule(counts[[0, 2, 1]])
    if swapped > as_named:
        labels = [0, 2, 1]
        notes.append(
            f"val.tsv is read as {SPLITS[2]} and tst.tsv as {SPLITS[1]}: MMRec's split sizes hold for {swapped} of "
            f"{users} users that way round, for {as_named} as named"
        )
    elif as_named < users:
        notes.append(f"MMRec's split sizes hold for {as_named} of {users} users; files are read as named")
    notes.append("interactions have neither time nor order")
    rows = np.concatenate(parts)
    split = np.repeat(np.array(labels, dtype=np.int8), [len(part) for part in parts])
    return rows[:, 0], rows[:, 1], None, None, split


def follows_rule(counts: np.ndarray) -> int:
    """How many users' (train, valid, test) counts ``[3, U]`` are what MMRec's random split gives.

    A user with n < 10 interactions has one of each of the latter; otherwise valid + test = floor(n / 5), valid = floor
    of half.
    """
    total = counts.sum(axis=0)
    held_out = np.where(total < 10, 2, total // 5)
    valid = held_out // 2
    return int(((counts[1] == valid) & (counts[2] == held_out - valid)).sum())


def _read_pairs(path: Path) -> np.ndarray:
    rows = []
    for number, line in _files.read_lines(path):
        fields = line.split("\t")
        try:
            user, item = (int(field) for field in fields)
        except ValueError:
            raise CatalogueError(
                f"{path.name} line {number}: needs 'user TAB item' in integers, got {line.strip()!r}"
            ) from None
        rows.append((user, item))
    if not rows:
        raise CatalogueError(f"{path.name}: empty file")
    try:
        pairs = np.array(rows, dtype=np.int64)
    except OverflowError:
        raise CatalogueError(f"{path.name}: ids must be row numbers from 0, got {max(map(max, rows))}") from None
    if pairs.min() < 0:
        raise CatalogueError(f"{path.name}: ids must be row numbers from 0, got {pairs.min()}")
    return pairs


def _read_features(folder: Path, notes: list[str]) -> dict[str, Features]:
    features = {}
    for path in sorted(folder.glob("*_feat.npy")):
        name = path.name.removesuffix("_feat.npy")
        features[name] = _files.read_features(path)
        missing = int((~features[name].mask).sum())
        if missing:
            notes.append(f"{path.name}: {missing} row(s) that are all zero or not finite are read as missing")
    return features
