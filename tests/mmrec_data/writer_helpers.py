"""A small catalogue made by hand, and what an account of an export must say."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
import polars as pl

from mmrec.adaptation import Catalogue, Features, Interactions, TableSchema
from mmrec.adaptation.schema import normalise_table
from mmrec.adaptation.writers import Export

SCHEMA = TableSchema(
    title="title",
    text=("title", "description"),
    numeric=("price",),
    categorical=("brand",),
    multi=("categories",),
    units={"price": "EUR"},
)
NAN = float("nan")


def table(columns: dict[str, list[Any]], schema: TableSchema, ids: list[str], id_column: str) -> pl.DataFrame:
    frame = pl.DataFrame({id_column: ids, **columns}, strict=False)
    return normalise_table(frame, schema, ids=ids, id_column=id_column, where="test")


def tea(**changes: Any) -> Catalogue:
    """Three items, two users, a tie in time, every kind of column with a gap, one feature, a split."""
    ids = ["B1", "B2", "B3"]
    columns = {
        "title": ["Green tea", None, "Mug, large"],
        "description": ["Fresh leaves", "Élan & thé", None],
        "price": [4.5, None, 12.0],
        "brand": ["Alder", None, "Birch"],
        "categories": [["tea", "green"], None, ["mugs"]],
    }
    features = Features(np.array([[1, 0.1], [0, 0], [-2, 3]], np.float32), np.array([True, False, True]))
    made = Catalogue(
        name="shop",
        item_ids=ids,
        user_ids=["ann", "bob"],
        interactions=Interactions.from_rows(
            np.array([0, 0, 1]),
            np.array([1, 0, 2]),
            rating=np.array([5, 4.3, NAN]),
            timestamp=np.array([100, 100, 50]),
            split=np.array([2, 0, 0]),
        ),
        items=table(columns, SCHEMA, ids, "item_id"),
        users=table({"age": [30.0, None]}, TableSchema(numeric=("age",)), ["ann", "bob"], "user_id"),
        schema=SCHEMA,
        user_schema=TableSchema(numeric=("age",)),
        features={"clip": features},
    )
    return dataclasses.replace(made, **changes)


def with_column(name: str, values: list[Any], role: str | None, **changes: Any) -> Catalogue:
    """The tea shop with this one item column instead of its own."""
    schema = TableSchema(**({role: (name,)} if role else {}), title=name if role == "text" else None)
    return tea(items=table({name: values}, schema, ["B1", "B2", "B3"], "item_id"), schema=schema, **changes)


def parts(catalogue: Catalogue) -> dict[str, Any]:
    """Every part of a catalogue by the name it has in an account."""
    rows = catalogue.interactions
    found: dict[str, Any] = {
        "name": catalogue.name,
        "items": catalogue.item_ids,
        "users": catalogue.user_ids,
        "interactions": (rows.user.tolist(), rows.item.tolist()),
    }
    for name in ("rating", "timestamp", "split"):
        if getattr(rows, name) is not None:
            found[name] = [None if value != value else value for value in getattr(rows, name).tolist()]
    sides = (("items", catalogue.items, catalogue.schema), ("users", catalogue.users, catalogue.user_schema))
    for side, frame, schema in sides:
        if frame is not None and schema is not None:
            for column in frame.columns[1:]:
                title = schema.title == column
                found[f"{side}.{column}"] = (schema.role(column), title, frame[column].to_list())
            found |= {f"unit of {side}.{column}": unit for column, unit in schema.units.items()}
    if any(catalogue.images):
        found["images"] = [path and path.read_bytes() for path in catalogue.images]
    for name, feature in catalogue.features.items():
        found[f"features.{name}"] = (feature.values.tolist(), feature.mask.tolist())
    return found | ({"notes": catalogue.notes} if catalogue.notes else {})


def assert_accounted(before: Catalogue, export: Export, after: Catalogue) -> None:
    """What is written and not changed is the same, what is left out is gone, and there is nothing else."""
    old, new = parts(before), parts(after)
    for part, value in old.items():
        if part in export.left_out:
            assert new.get(part) != value, f"{part} is there after all"
        elif part not in export.changed:
            assert part in export.written and new[part] == value, part
        else:
            assert new.get(part) != value, f"{part} is as it was: {export.changed[part]}"
    assert set(export.changed) <= set(export.written) and set(export.left_out) - set(old) <= {"split"}


def other_values(before: Catalogue, after: Catalogue, column: str) -> int:
    """How many cells of an item column are not read back."""
    return sum(a != b for a, b in zip(before.items[column].to_list(), after.items[column].to_list(), strict=True))


def stated(export: Export, part: str) -> int:
    """The number of values that a rule speaks of, 0 without a rule."""
    return sum(int(number) for number in re.findall(r"(\d+) value\(s\)", export.changed.get(part, "")))
