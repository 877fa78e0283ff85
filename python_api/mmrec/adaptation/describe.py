"""A catalogue in numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import polars as pl

    from .catalogue import Catalogue
    from .schema import TableSchema


def describe(catalogue: Catalogue) -> dict[str, Any]:
    """See :meth:`Catalogue.describe`. ``density`` counts distinct (user, item) pairs; ``coverage`` is the share of
    items with at least one non-missing piece of that modality (0 to 1).
    """
    rows = catalogue.interactions
    possible = catalogue.num_users * catalogue.num_items
    summary: dict[str, Any] = {
        "name": catalogue.name,
        "fingerprint": catalogue.fingerprint(),
        "users": catalogue.num_users,
        "items": catalogue.num_items,
        "interactions": len(rows),
        "duplicate_interactions": rows.duplicates,
        "density": rows.unique_pairs / possible if possible else 0.0,
        "per_user": _spread(np.bincount(rows.user, minlength=catalogue.num_users)),
        "per_item": _spread(np.bincount(rows.item, minlength=catalogue.num_items)),
        "time": None
        if rows.timestamp is None or not len(rows)
        else [int(rows.timestamp.min()), int(rows.timestamp.max())],
        "rated": 0.0 if rows.rating is None or not len(rows) else float(np.isfinite(rows.rating).mean()),
        "split": None if rows.split is None else [int(n) for n in np.bincount(rows.split, minlength=3)],
        "coverage": _coverage(catalogue),
        "columns": _columns(catalogue.items, catalogue.schema),
        "notes": list(catalogue.notes),
    }
    if catalogue.users is not None and catalogue.user_schema is not None:
        summary["user_columns"] = _columns(catalogue.users, catalogue.user_schema)
    return summary


def _spread(counts: np.ndarray) -> dict[str, float]:
    if not len(counts):
        return {"min": 0, "median": 0.0, "mean": 0.0, "max": 0}
    return {
        "min": int(counts.min()),
        "median": float(np.median(counts)),
        "mean": float(counts.mean()),
        "max": int(counts.max()),
    }


def _coverage(catalogue: Catalogue) -> dict[str, float]:
    if not catalogue.num_items:
        return {}
    schema, coverage = catalogue.schema, {}
    table = schema.numeric + schema.categorical + schema.multi
    for name, columns in (("text", schema.text), ("table", table)):
        if columns:
            present = np.zeros(catalogue.num_items, dtype=bool)
            for column in columns:
                present |= catalogue.items[column].is_not_null().to_numpy()
            coverage[name] = float(present.mean())
    coverage["image"] = float(np.mean([path is not None for path in catalogue.images]))
    for name, feature in catalogue.features.items():
        coverage[f"features/{name}"] = float(feature.mask.mean())
    return {name: share for name, share in coverage.items() if share or name != "image"}


def _columns(frame: pl.DataFrame, schema: TableSchema) -> dict[str, dict[str, Any]]:
    rows = max(1, frame.height)
    return {
        column: {"role": schema.role(column), "missing": frame[column].null_count() / rows}
        for column in frame.columns[1:]
    }
