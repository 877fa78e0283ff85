"""LC-Rec: ``X.inter.json`` {user: [items in order]}, ``X.item.json`` {item: title, description, brand, categories} and,
for semantic ids, ``X.index.json`` {item: [tokens]}.

Ids are row numbers. Where those are not the catalogue's ids, ``X.item2id`` and ``X.user2id`` have them, as LC-Rec's own
preprocessing writes them. There is an order, no time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import CatalogueError
from ..readers._files import plain_text
from . import _export
from ._export import Export, Ledger

if TYPE_CHECKING:
    from ..catalogue import Catalogue

_READS = ("*.inter.json", "*.item.json", "*.index.json", "*.item2id", "*.user2id")
_NO_PLACE = {
    "rating": "LC-Rec's sequences have no ratings",
    "timestamp": "LC-Rec's sequences have an order, no times",
    "split": "LC-Rec predicts each sequence's last items",
    "items": "LC-Rec's items have a title, a description, a brand and categories only",
    "users": "LC-Rec's users have a sequence only",
}
_ROLES = {"title": "text", "description": "text", "brand": "categorical", "categories": "multi"}
_CLEANED = "HTML, line breaks and repeated blanks are taken out"
_RULES = {
    "title": f"{_CLEANED}, lists are joined by commas",
    "description": f"{_CLEANED}, lists are joined by commas",
    "brand": "lists are joined by commas",
    "categories": f"{_CLEANED}, a comma inside became a semicolon",
}
_CODES = "semantic_id"


def write(
    catalogue: Catalogue,
    folder: Path,
    *,
    facts: Mapping[str, str] | None = None,
    index: Mapping[str, Sequence[str]] | None = None,
    overwrite: bool = False,
) -> Export:
    """Writes the layout; see :func:`mmrec.adaptation.writers.write`.

    Args:
        facts: the column for each of ``title``, ``description``, ``brand`` and ``categories`` that is not the
            catalogue's title or the column of the same name.
        index: tokens per item id, such as ``{"42": ["<a_12>", "<b_3>", "<c_7>"]}``; items may be left out. None takes
            a column ``semantic_id``, as the reader makes it, where its values are such tokens joined.
    """
    ledger = Ledger("lcrec", catalogue, _NO_PLACE)
    stem = ledger.name()
    sequences = {str(user): items for user, items in _export.histories(catalogue).items()}
    files: dict[str, bytes | np.ndarray] = {
        f"{stem}.inter.json": json.dumps(sequences).encode(),
        f"{stem}.item.json": json.dumps(_facts(catalogue, facts, ledger, f"{stem}.item.json")).encode(),
    }
    codes = _index(catalogue, index, ledger, f"{stem}.index.json")
    if codes:
        files[f"{stem}.index.json"] = json.dumps(codes).encode()
    ledger.keep("interactions", f"{stem}.inter.json")
    if ledger.keep_ids("items", catalogue.item_ids, 0, f"{stem}.item.json", f"{stem}.item2id"):
        files[f"{stem}.item2id"] = _export.mapping_bytes(None, catalogue.item_ids, "items")
    if ledger.keep_ids("users", catalogue.user_ids, 0, f"{stem}.inter.json", f"{stem}.user2id"):
        files[f"{stem}.user2id"] = _export.mapping_bytes(None, catalogue.user_ids, "users")
    ledger.leave_silent_users()
    folder = _export.write_files(folder, files, overwrite=overwrite, reads=_READS)
    return ledger.export(folder, files)


def _facts(
    catalogue: Catalogue, facts: Mapping[str, str] | None, ledger: Ledger, file: str
) -> dict[str, dict[str, str]]:
    """Title, description, brand and categories per row number; "" is missing."""
    rows: list[dict[str, str]] = [{} for _ in catalogue.item_ids]
    for fact, column in _columns(catalogue, facts).items():
        values = catalogue.items[column].to_list() if column else [None] * len(rows)
        cells = [_cell(fact, value) for value in values]
        for row, cell in zip(rows, cells, strict=True):
            row[fact] = cell
        if column is None:
            continue
        role = catalogue.schema.role(column)
        same_name = column == fact and (fact != "title" or column == catalogue.schema.title)
        changed = sum(_read_back(fact, cell) != value for cell, value in zip(cells, values, strict=True))
        ledger.keep(
            f"items.{column}",
            f"{file} {fact}",
            None if role == _ROLES[fact] else f"{role or 'without a role'}, read as {_ROLES[fact]}",
            None if same_name else f"read as the {fact}",
            f"{changed} value(s): {_RULES[fact]}" if changed else None,
        )
    return {str(number): row for number, row in enumerate(rows)}


def _columns(catalogue: Catalogue, facts: Mapping[str, str] | None) -> dict[str, str | None]:
    """The column of each fact, None where there is none."""
    there = catalogue.items.columns[1:]
    found = {fact: fact if fact in there else None for fact in _ROLES}
    found["title"] = catalogue.schema.title or found["title"]
    for fact, column in (facts or {}).items():
        if fact not in _ROLES or column not in there:
            raise CatalogueError(f"facts needs {list(_ROLES)} as keys and columns of {there}, got {fact!r}: {column!r}")
        found[fact] = column
    return found


def _cell(fact: str, value: Any) -> str:
    parts = [str(part) for part in (value if isinstance(value, list) else [value]) if part is not None]
    return ",".join(part.replace(",", ";") for part in parts) if fact == "categories" else ", ".join(parts)


def _read_back(fact: str, cell: str) -> Any:
    """What the reader makes of a cell."""
    if fact == "brand":
        return cell.strip() or None
    if fact == "categories":
        return [part for part in map(plain_text, cell.split(",")) if part] or None
    return plain_text(cell)


def _index(
    catalogue: Catalogue, index: Mapping[str, Sequence[str]] | None, ledger: Ledger, file: str
) -> dict[str, list[str]]:
    """Tokens per row number."""
    column = _CODES in catalogue.items.columns
    if index is not None:
        if column:
            ledger.leave(f"items.{_CODES}", "index was given instead")
        return {str(row): tokens for row, tokens in sorted(_given(catalogue, index).items())}
    if not column:
        return {}
    values = catalogue.items[_CODES].to_list()
    tokens = [re.findall(r"<[^<>]+>", value or "") for value in values]
    if any("".join(found) != (value or "") for found, value in zip(tokens, values, strict=True)):
        ledger.leave(f"items.{_CODES}", "not every value is made of <tokens>")
        return {}
    ledger.keep(f"items.{_CODES}", file)
    return {str(row): found for row, found in enumerate(tokens) if found}


def _given(catalogue: Catalogue, index: Mapping[str, Sequence[str]]) -> dict[int, list[str]]:
    rows = {identifier: row for row, identifier in enumerate(catalogue.item_ids)}
    for identifier, tokens in index.items():
        if identifier not in rows:
            raise CatalogueError(f"index needs ids of items, got {identifier!r}, which {catalogue.name} does not have")
        if isinstance(tokens, str) or not tokens or not all(isinstance(t, str) and t for t in tokens):
            raise CatalogueError(f"index[{identifier!r}] needs a list of non-empty strings, got {tokens!r}")
    return {rows[identifier]: list(tokens) for identifier, tokens in index.items()}
