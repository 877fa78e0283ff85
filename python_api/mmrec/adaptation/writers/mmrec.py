"""MMRec: ``X.inter`` (userID, itemID, rating, timestamp, x_label; tab separated) with ``*_feat.npy`` (row = item id).

Ids are row numbers. Where those are not the catalogue's ids, ``i_id_mapping.csv`` and ``u_id_mapping.csv`` have them,
as MMRec's own preprocessing writes them. MMRec has no masks: rows of a missing feature are zero.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import CatalogueError
from . import _export
from ._export import Export, Ledger

if TYPE_CHECKING:
    from ..catalogue import Catalogue, Features

_READS = ("*.inter", "*_feat.npy", "?_id_mapping.csv")
_NO_PLACE = {
    "items": "MMRec has no table of items",
    "users": "MMRec has no table of users",
    "images": "MMRec reads images as features only",
}


def write(catalogue: Catalogue, folder: Path, *, labels: np.ndarray | None = None, overwrite: bool = False) -> Export:
    """Writes the layout; see :func:`mmrec.adaptation.writers.write`.

    Args:
        labels: integers ``[N]``, 0 train, 1 valid, 2 test for each interaction in the catalogue's order, written as
            ``x_label``. None takes the catalogue's own split, if it has one. MMRec reads no file without ``x_label``.
    """
    ledger = Ledger("mmrec", catalogue, _NO_PLACE)
    stem = ledger.name()
    files: dict[str, bytes | np.ndarray] = {f"{stem}.inter": _interactions(catalogue, labels, ledger, f"{stem}.inter")}
    if ledger.keep_ids("items", catalogue.item_ids, 0, f"{stem}.inter itemID", "i_id_mapping.csv"):
        files["i_id_mapping.csv"] = _export.mapping_bytes(["asin", "itemID"], catalogue.item_ids, "items")
    if ledger.keep_ids("users", catalogue.user_ids, 0, f"{stem}.inter userID", "u_id_mapping.csv"):
        files["u_id_mapping.csv"] = _export.mapping_bytes(["user_id", "userID"], catalogue.user_ids, "users")
    for name, feature in catalogue.features.items():
        file = f"{name}_feat.npy"
        if not name or Path(file).name != file or "\0" in name:
            ledger.leave(f"features.{name}", f"{file!r} cannot be a file name")
            continue
        files[file] = feature.values
        ledger.keep(f"features.{name}", file, _zero_rows(feature))
    _leave_last_rows(catalogue, any(name.endswith("_feat.npy") for name in files), ledger)
    folder = _export.write_files(folder, files, overwrite=overwrite, reads=_READS)
    return ledger.export(folder, files)


def _interactions(catalogue: Catalogue, labels: np.ndarray | None, ledger: Ledger, file: str) -> bytes:
    rows = catalogue.interactions
    columns: dict[str, Iterable[str]] = {
        "userID": map(str, rows.user.tolist()),
        "itemID": map(str, rows.item.tolist()),
    }
    ledger.keep("interactions", file)
    if rows.rating is not None:
        columns["rating"] = _export.decimals(rows.rating)
        ledger.keep("rating", f"{file} rating")
    if rows.timestamp is not None:
        columns["timestamp"] = map(str, rows.timestamp.tolist())
        ledger.keep("timestamp", f"{file} timestamp")
    split = rows.split if labels is None else _checked(labels, len(rows))
    if split is None:
        ledger.leave("split", "the catalogue has none and labels were not given; MMRec reads no file without x_label")
    else:
        columns["x_label"] = map(str, split.tolist())
        replaced = labels is not None and rows.split is not None and not np.array_equal(split, rows.split)
        ledger.keep("split", f"{file} x_label", "labels instead of the catalogue's split" if replaced else None)
    return _export.table_bytes(list(columns), list(columns.values()), file)


def _checked(labels: np.ndarray, count: int) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise CatalogueError(f"labels needs integers [{count}], got {labels.dtype} {list(labels.shape)}")
    if not np.isin(labels, (0, 1, 2)).all():
        raise CatalogueError(f"labels needs 0, 1 or 2, got {np.unique(labels)[:5].tolist()}")
    return labels


def _zero_rows(feature: Features) -> str | None:
    """Zeros mean missing to the reader, also where they are the feature."""
    zero = int((feature.mask & ~np.any(feature.values, axis=1)).sum())
    return f"{zero} row(s) that are present and all zero are read as missing" if zero else None


def _leave_last_rows(catalogue: Catalogue, has_features: bool, ledger: Ledger) -> None:
    """MMRec counts users, and items without features, up to the last one that an interaction names."""
    rows = catalogue.interactions
    items = 0 if has_features else catalogue.num_items - 1 - int(rows.item.max())
    users = catalogue.num_users - 1 - int(rows.user.max())
    for part, count in (("items", items), ("users", users)):
        if count:
            ledger.leave(part, f"the last {count} without interactions: MMRec counts up to the last that has one")
