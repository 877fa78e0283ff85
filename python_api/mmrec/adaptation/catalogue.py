"""The catalogue: items with their content, users, and who chose what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import CatalogueError
from .fingerprint import catalogue_fingerprint
from .interactions import Interactions
from .schema import TableSchema

if TYPE_CHECKING:
    import polars as pl


@dataclass(frozen=True, eq=False)
class Features:
    """Vectors computed elsewhere, one per item: ``values`` float32 ``[I, d]``, ``mask`` bool ``[I]`` (True = present).

    Rows that are not present are zero.
    """

    values: np.ndarray
    mask: np.ndarray

    def __post_init__(self) -> None:
        if self.values.ndim != 2 or self.values.dtype != np.float32:
            raise CatalogueError(
                f"features: values needs float32 [I, d], got {self.values.dtype} {list(self.values.shape)}"
            )
        if self.mask.shape != self.values.shape[:1] or self.mask.dtype != np.bool_:
            raise CatalogueError(
                f"features: mask needs bool [{len(self.values)}], got {self.mask.dtype} {list(self.mask.shape)}"
            )
        bad = np.flatnonzero(self.mask & ~np.isfinite(self.values).all(axis=1))
        if len(bad):
            raise CatalogueError(f"features: row {bad[0]} is marked present but holds NaN or infinity")
        if (~self.mask).any() and np.any(self.values[~self.mask]):
            object.__setattr__(self, "values", np.where(self.mask[:, None], self.values, np.float32(0)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Features):
            return NotImplemented
        return np.array_equal(self.values, other.values) and np.array_equal(self.mask, other.mask)

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True, eq=False)
class Catalogue:
    """Everything a recommender learns from. Item and user *rows* index ``item_ids`` and ``user_ids``.

    Attributes:
        name: a short name for reports.
        item_ids, user_ids: external ids. Numeric ids are in numeric order, others in lexicographic order; layouts whose
            ids are row numbers keep that order.
        interactions: see :class:`Interactions`.
        items: one row per item, in item order; first column ``item_id``; null = missing, never filled.
        users: the same for users (first column ``user_id``), or None.
        schema, user_schema: the roles of the tables' columns.
        images: one file per item, or None where the item has none.
        features: vectors computed elsewhere, by modality name.
        notes: what the reader had to decide, one sentence each.
    """

    name: str
    item_ids: list[str]
    user_ids: list[str]
    interactions: Interactions
    items: pl.DataFrame
    users: pl.DataFrame | None = None
    schema: TableSchema = field(default_factory=TableSchema)
    images: list[Path | None] = field(default_factory=list)
    features: dict[str, Features] = field(default_factory=dict)
    user_schema: TableSchema | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.images:
            object.__setattr__(self, "images", [None] * len(self.item_ids))
        if self.users is not None and self.user_schema is None:
            object.__setattr__(self, "user_schema", TableSchema())
        self._check_ids("item_ids", self.item_ids, self.interactions.item)
        self._check_ids("user_ids", self.user_ids, self.interactions.user)
        self._check_table("items", self.items, "item_id", self.item_ids, self.schema)
        if self.users is not None and self.user_schema is not None:
            self._check_table("users", self.users, "user_id", self.user_ids, self.user_schema)
        if len(self.images) != len(self.item_ids):
            raise CatalogueError(f"images needs one entry per item ({len(self.item_ids)}), got {len(self.images)}")
        for name, feature in self.features.items():
            if len(feature.values) != len(self.item_ids):
                raise CatalogueError(
                    f"features {name!r} needs one row per item ({len(self.item_ids)}), got {len(feature.values)}"
                )

    @staticmethod
    def _check_ids(name: str, ids: list[str], rows: np.ndarray) -> None:
        if len(set(ids)) != len(ids):
            raise CatalogueError(f"{name} must be distinct; {len(ids) - len(set(ids))} repeat an earlier one")
        if not all(isinstance(i, str) and i for i in ids):
            raise CatalogueError(f"{name} must be non-empty strings")
        if len(rows) and (rows.min() < 0 or rows.max() >= len(ids)):
            raise CatalogueError(f"interactions: rows {rows.min()}..{rows.max()} do not fit {len(ids)} {name}")

    @staticmethod
    def _check_table(name: str, frame: pl.DataFrame, id_column: str, ids: list[str], schema: TableSchema) -> None:
        if not frame.columns or frame.columns[0] != id_column or frame[id_column].to_list() != ids:
            raise CatalogueError(f"{name}: the first column must be {id_column}, one row per id in order")
        missing = [column for column in schema.columns if column not in frame.columns]
        if missing:
            raise CatalogueError(f"{name}: the schema names column(s) {missing} that the table does not have")

    @property
    def num_items(self) -> int:
        """I, the number of items."""
        return len(self.item_ids)

    @property
    def num_users(self) -> int:
        """U, the number of users."""
        return len(self.user_ids)

    @property
    def duplicate_interactions(self) -> int:
        """Interactions whose (user, item) pair has occurred before; they are kept."""
        return self.interactions.duplicates

    @property
    def item_titles(self) -> list[str]:
        """What to show for each item: its title, or its id where the title is missing."""
        if self.schema.title is None:
            return list(self.item_ids)
        return [
            title or item for title, item in zip(self.items[self.schema.title].to_list(), self.item_ids, strict=True)
        ]

    def user_row(self, user_id: str) -> int:
        """The row of an external user id; :class:`CatalogueError` for one that is not in the catalogue."""
        return _row_of(user_id, self.user_ids, "user", self.name)

    def item_row(self, item_id: str) -> int:
        """The row of an external item id; :class:`CatalogueError` for one that is not in the catalogue."""
        return _row_of(item_id, self.item_ids, "item", self.name)

    def history(self, user: int) -> np.ndarray:
        """int32 item rows of user row ``user``, in order."""
        if not 0 <= user < self.num_users:
            raise CatalogueError(f"user row {user} is outside 0..{self.num_users - 1}")
        start, stop = np.searchsorted(self.interactions.user, [user, user + 1])
        return self.interactions.item[start:stop]

    def items_part(self, start: int, stop: int) -> Catalogue:
        """Items ``start`` … ``stop − 1`` with their content, without users and interactions."""
        part = slice(start, stop)
        return Catalogue(
            name=self.name,
            item_ids=self.item_ids[part],
            user_ids=[],
            interactions=Interactions.from_rows(np.empty(0, np.int32), np.empty(0, np.int32)),
            items=self.items[part],
            schema=self.schema,
            images=self.images[part],
            features={name: Features(f.values[part], f.mask[part]) for name, f in self.features.items()},
        )

    def fingerprint(self) -> str:
        """64 hex digits: SHA-256 over counts, ids, interactions, tables, image bytes and features (not name, notes,
        paths).

        Reads every image file. Two catalogues with the same fingerprint give the same results.
        """
        return catalogue_fingerprint(self)

    @property
    def short_fingerprint(self) -> str:
        """The first 12 digits of :meth:`fingerprint`."""
        return self.fingerprint()[:12]

    def describe(self) -> dict[str, Any]:
        """Counts, density, coverage per modality and missing rates per column, as plain JSON values."""
        from .describe import describe

        return describe(self)

    def __eq__(self, other: object) -> bool:
        """Same name, notes and content; where the image files lie does not matter, their bytes do."""
        if not isinstance(other, Catalogue):
            return NotImplemented
        return (self.name, self.notes) == (other.name, other.notes) and self.fingerprint() == other.fingerprint()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        counts = f"{self.num_users} users, {self.num_items} items, {len(self.interactions)} interactions"
        return f"Catalogue({self.name!r}: {counts})"

    @classmethod
    def load(cls, path: str | Path, *, layout: str = "auto") -> Catalogue:
        """Reads a folder in any known layout.

        Args:
            path: the folder.
            layout: ``folder``, ``movielens``, ``lcrec``, ``p5``, ``mmrec``, ``amazon`` or ``recbole``; ``auto`` finds
                it out.

        Raises:
            CatalogueError: the folder has no known layout (the message lists what was looked for), or its data is bad.
        """
        from .readers import read

        return read(Path(path), layout)

    @classmethod
    def load_items(cls, path: str | Path, schema: TableSchema) -> Catalogue:
        """Reads the items of a folder in the package's own layout (``items.*``, ``images/``, ``features/``), whose
        columns have the roles of ``schema``; what else is there is left alone.

        Columns that the folder does not have are missing values.

        Raises:
            CatalogueError: no items there, or bad data.
        """
        from .readers.folder import read_items

        return read_items(Path(path), schema)

    @classmethod
    def from_items(cls, rows: Sequence[Mapping[str, Any]], schema: TableSchema, *, name: str = "items") -> Catalogue:
        """Items as dicts: ``item_id``, and values by column; those that are not given are missing.

        Raises:
            CatalogueError: an id that is missing or there twice, a column that is not in `schema`, or a value that does
                not fit its column's role.
        """
        from .readers.folder import items_of
        from .schema import frame_of

        unknown = sorted({column for row in rows for column in row} - {"item_id", *schema.columns})
        if unknown:
            raise CatalogueError(f"{name}: no column {unknown[0]!r}; there are {list(schema.columns)}")
        return items_of(frame_of(rows, name), schema, name)

    def save(self, folder: str | Path) -> Path:
        """Writes the ``folder`` layout, so that ``Catalogue.load(folder) == self``; returns the folder.

        All or nothing: files are written beside ``folder`` and swapped in at the end, so a full disk or Ctrl-C leaves
        what was there. An existing folder is replaced only if it is empty or was written by this method.
        """
        from .storage import save

        return save(self, Path(folder))


def _row_of(identifier: str, ids: Sequence[str], what: str, name: str) -> int:
    try:
        return ids.index(identifier)
    except ValueError:
        raise CatalogueError(f"unknown {what} {identifier!r}: {name} has {len(ids)} {what}s") from None
