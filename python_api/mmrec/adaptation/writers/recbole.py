"""RecBole atomic files: ``X.inter``, ``X.item`` and, where users have columns or no interactions, ``X.user``; tab
separated, every column head says ``name:type``.

numeric → float, multi → token_seq, a feature → float_seq, all else → token (token_seq for texts whose name tells the
reader what they are). Nothing is quoted or escaped, so what would break a line is replaced, see :func:`_line`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import CatalogueError
from ..readers._files import ordered_ids
from ..readers.recbole import _is_text
from . import _export
from ._export import Export, Ledger

if TYPE_CHECKING:
    import polars as pl

    from ..catalogue import Catalogue, Features
    from ..schema import TableSchema

_READS = ("*.inter", "*.item", "*.user")
_NO_PLACE = {"split": "RecBole splits by itself", "images": "RecBole reads images as features only"}
_BREAKS = str.maketrans({"\t": " ", "\n": " ", "\r": " "})
_LINE_RULE = "tabs and line breaks became blanks, a double quote at the start became a single one"
_WORD_RULE = "blanks inside became _, a double quote at the start became a single one"


def write(catalogue: Catalogue, folder: Path, *, overwrite: bool = False) -> Export:
    """Writes the layout; see :func:`mmrec.adaptation.writers.write`."""
    ledger = Ledger("recbole", catalogue, _NO_PLACE)
    stem = ledger.name()
    for part, ids in (("items", catalogue.item_ids), ("users", catalogue.user_ids)):
        _check_ids(part, ids)
        rule = "read in numeric order, or else that of code points, also in ties in time"
        moved = ids != ordered_ids(ids)
        ledger.keep(part, f"{stem}.{part[:-1]} {part[:-1]}_id", rule if moved else None)
    files: dict[str, bytes | np.ndarray] = {f"{stem}.inter": _interactions(catalogue, ledger, f"{stem}.inter")}
    files[f"{stem}.item"] = _table(
        "item", catalogue.items, catalogue.schema, catalogue.features, ledger, f"{stem}.item"
    )
    if catalogue.users is not None and catalogue.user_schema is not None:
        files[f"{stem}.user"] = _table("user", catalogue.users, catalogue.user_schema, {}, ledger, f"{stem}.user")
    elif len(np.unique(catalogue.interactions.user)) < catalogue.num_users:
        files[f"{stem}.user"] = _export.table_bytes(["user_id:token"], [catalogue.user_ids], f"{stem}.user")
    else:
        ledger.keep("users", f"{stem}.inter user_id")
    folder = _export.write_files(folder, files, overwrite=overwrite, reads=_READS)
    return ledger.export(folder, files)


def _check_ids(part: str, ids: Sequence[str]) -> None:
    bad = next((i for i in ids if _line(i) != i or not i.strip()), None)
    if bad is not None:
        raise CatalogueError(
            f"{part}: id {bad!r} does not fit layout recbole, which needs ids with something beside blanks, without "
            "tabs, line breaks and a double quote at the start"
        )


def _line(text: str) -> str:
    """One field of one line. RecBole reads with pandas, which takes a quote at a field's start for quoting."""
    text = text.translate(_BREAKS)
    return f"'{text[1:]}" if text.startswith('"') else text


def _interactions(catalogue: Catalogue, ledger: Ledger, file: str) -> bytes:
    rows = catalogue.interactions
    columns: dict[str, Iterable[str]] = {
        "user_id:token": [catalogue.user_ids[row] for row in rows.user.tolist()],
        "item_id:token": [catalogue.item_ids[row] for row in rows.item.tolist()],
    }
    ledger.keep("interactions", file)
    if rows.rating is not None:
        columns["rating:float"] = _export.decimals(rows.rating)
        ledger.keep("rating", f"{file} rating")
    if rows.timestamp is not None:
        columns["timestamp:float"] = map(str, rows.timestamp.tolist())
        ledger.keep("timestamp", f"{file} timestamp")
    return _export.table_bytes(list(columns), list(columns.values()), file)


def _table(
    what: str, frame: pl.DataFrame, schema: TableSchema, features: dict[str, Features], ledger: Ledger, file: str
) -> bytes:
    """The atomic file of items or users; columns in the order in which the schema uses them."""
    side, id_column = f"{what}s", f"{what}_id"
    columns = {f"{id_column}:token": frame[id_column].to_list()}
    names = [*schema.columns, *(column for column in frame.columns[1:] if schema.role(column) is None)]
    titles = _title_rules([name for name in names if _is_head(name) and name not in schema.numeric], schema.title)
    for name in names:
        if not _is_head(name):
            ledger.leave(f"{side}.{name}", "a head cannot hold its name")
            continue
        kind, cells, rules = _column(name, frame[name].to_list(), schema.role(name))
        columns[f"{name}:{kind}"] = cells
        ledger.keep(f"{side}.{name}", f"{file} {name}:{kind}", *rules, titles.get(name))
    for name, feature in features.items():
        if not _is_head(name) or name in frame.columns:
            ledger.leave(f"features.{name}", "a head cannot hold its name, or a column has it")
            continue
        columns[f"{name}:float_seq"] = _vectors(feature)
        empty = not feature.values.shape[1] and feature.mask.any()
        rule = "vectors without entries are read as missing" if empty else None
        ledger.keep(f"features.{name}", f"{file} {name}:float_seq", rule)
    return _export.table_bytes(list(columns), list(columns.values()), file)


def _is_head(name: str) -> bool:
    return bool(name) and _line(name) == name == name.strip() and ":" not in name


def _column(name: str, values: list[Any], role: str | None) -> tuple[str, list[str], list[str]]:
    """Type, cells, and the rules by which the column is not read back as it was."""
    text = _is_text(name)
    if role == "numeric":
        return "float", ["" if v is None or not math.isfinite(v) else repr(v) for v in values], []
    kind = "token_seq" if role == "multi" or (role == "text" and text) else "token"
    read_as = "text" if text else "multi" if kind == "token_seq" else "categorical"
    rules = [] if read_as == role else [f"{role or 'without a role'}, read as {read_as}"]
    if role == "multi":
        words = [["_".join(part.split()) for part in value or () if part] for value in values]
        cells = [_line(" ".join(parts)) for parts in words]
        changed = sum((cell.split() or None) != value for cell, value in zip(cells, values, strict=True))
        return kind, cells, rules + ([f"{changed} value(s): {_WORD_RULE}"] if changed else [])
    cells = ["" if value is None else _line(str(value)) for value in values]
    changed = sum((cell.strip() or None) != value for cell, value in zip(cells, values, strict=True))
    return kind, cells, rules + ([f"{changed} value(s): {_LINE_RULE}"] if changed else [])


def _title_rules(names: Sequence[str], title: str | None) -> dict[str | None, str]:
    """RecBole marks no title: the reader takes the first text that is called so."""
    read = next((n for n in names if _is_text(n) and ("title" in n.lower() or n.lower().endswith("name"))), None)
    return {} if read == title else {title: "not read as the title", read: "read as the title"}


def _vectors(feature: Features) -> list[str]:
    present = iter(feature.values[feature.mask].astype(str).tolist())
    return [" ".join(next(present)) if there else "" for there in feature.mask.tolist()]
