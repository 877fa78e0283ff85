"""P5: ``sequential_data.txt`` (``user item item …`` in order), ``datamaps.json`` (numbers to ids and attributes) and
``item2attributes.json``.

Users and items are numbered from 1. P5 knows an order, no times, and one set of attributes per item.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import CatalogueError
from ..readers.p5 import _UNKNOWN
from . import _export
from ._export import Export, Ledger

if TYPE_CHECKING:
    from ..catalogue import Catalogue

_READS = ("sequential_data.txt", "datamaps.json", "*item2attributes.json", "items.jsonl")
_NO_PLACE = {
    "rating": "P5's sequences have no ratings",
    "timestamp": "P5's sequences have an order, no times",
    "split": "P5 predicts each sequence's last items",
    "items": "P5's items have attributes only",
    "users": "P5's users have a sequence only",
}


def write(
    catalogue: Catalogue, folder: Path, *, attributes: Sequence[str] | None = None, overwrite: bool = False
) -> Export:
    """Writes the layout; see :func:`mmrec.adaptation.writers.write`.

    Args:
        attributes: categorical and multi columns whose values become an item's attributes. None takes the column
            ``attributes`` if it is one of them, else all of them, as P5 joins brands and categories.
    """
    ledger = Ledger("p5", catalogue, _NO_PLACE)
    columns = _attribute_columns(catalogue, attributes)
    maps = _numbers(catalogue, ledger)
    coded = _code(catalogue, columns, maps, ledger)
    sequences = [
        " ".join(str(row + 1) for row in (user, *items)) for user, items in _export.histories(catalogue).items()
    ]
    files: dict[str, bytes | np.ndarray] = {
        "sequential_data.txt": ("\n".join(sequences) + "\n").encode(),
        "datamaps.json": json.dumps(maps).encode(),
    }
    if columns:
        files["item2attributes.json"] = json.dumps(coded).encode()
    ledger.keep("interactions", "sequential_data.txt")
    ledger.leave_silent_users()
    folder = _export.write_files(folder, files, overwrite=overwrite, reads=_READS)
    if folder.name == catalogue.name:
        ledger.keep("name", "the folder's name")
    else:
        ledger.leave("name", "P5's files have no name of their own")
    return ledger.export(folder, files)


def _attribute_columns(catalogue: Catalogue, attributes: Sequence[str] | None) -> list[str]:
    able = [*catalogue.schema.categorical, *catalogue.schema.multi]
    if attributes is None:
        return ["attributes"] if "attributes" in able else able
    if not set(attributes) <= set(able):
        raise CatalogueError(f"attributes needs names out of {able}, got {attributes!r}")
    return list(attributes)


def _numbers(catalogue: Catalogue, ledger: Ledger) -> dict[str, dict[str, Any]]:
    """The maps between numbers and ids. Where the numbers are the ids, a column ``asin`` has the items' outer ids."""
    outer: list[str | None] = list(catalogue.item_ids)
    ledger.keep_ids("users", catalogue.user_ids, 1, "sequential_data.txt", "datamaps.json")
    renamed = ledger.keep_ids("items", catalogue.item_ids, 1, "datamaps.json id2item", "datamaps.json")
    if "asin" in catalogue.items.columns:
        if renamed:
            ledger.leave("items.asin", "P5 has one outer id per item, and that is the catalogue's id")
        else:
            outer = catalogue.items["asin"].to_list()
            ledger.keep("items.asin", "datamaps.json id2item")
    return {
        "user2id": {identifier: str(row) for row, identifier in enumerate(catalogue.user_ids, 1)},
        "item2id": {identifier: str(row) for row, identifier in enumerate(outer, 1) if identifier is not None},
        "id2user": {str(row): identifier for row, identifier in enumerate(catalogue.user_ids, 1)},
        "id2item": {str(row): identifier for row, identifier in enumerate(outer, 1)},
    }


def _code(
    catalogue: Catalogue, columns: Sequence[str], maps: dict[str, dict[str, Any]], ledger: Ledger
) -> dict[str, list[int]]:
    """Adds the attributes' numbers to ``maps`` and returns each item's."""
    codes: dict[str, int] = {}
    coded: dict[str, list[int]] = {str(row): [] for row in range(1, catalogue.num_items + 1)}
    for column in columns:
        unknown = 0
        for row, value in enumerate(catalogue.items[column].to_list(), 1):
            values = [value] if isinstance(value, str) else value or ()
            coded[str(row)] += [codes.setdefault(entry, len(codes) + 1) for entry in values]
            unknown += _UNKNOWN in values
        ledger.keep(
            f"items.{column}",
            "item2attributes.json",
            None if columns == ["attributes"] and column in catalogue.schema.multi else "read as one of the attributes",
            f"{unknown} value(s): {_UNKNOWN!r} is read as missing" if unknown else None,
        )
    maps["attribute2id"] = dict(codes)
    maps["id2attribute"] = {str(code): name for name, code in codes.items()}
    counts = Counter(code for values in coded.values() for code in values)
    maps["attributeid2num"] = {str(code): counts[code] for code in codes.values()}
    return coded
