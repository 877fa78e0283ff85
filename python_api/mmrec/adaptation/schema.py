"""What each column of an item or user table holds, and the one form that a table is kept in."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from .errors import CatalogueError

if TYPE_CHECKING:
    import polars as pl

ROLES = ("text", "numeric", "categorical", "multi", "image")
_TEXT_NAMES = {"title", "name", "description", "overview", "plot", "summary", "text", "caption", "tagline", "abstract"}
_TITLE_NAMES = ("title", "name")
_IMAGE_NAMES = {"image", "image_path", "image_url", "poster", "poster_path", "picture", "img"}
_LONG_TEXT = 40


@dataclass(frozen=True)
class TableSchema:
    """The roles of a table's columns, in the order in which they are to be used.

    Attributes:
        text: free text (``String``); ``title`` names the one of them that is the item's title, if any.
        numeric: ``Float64``.
        categorical: one value out of a set (``String``).
        multi: any number of values out of a set (``List(String)``).
        image: a path or URL (``String``); never turned into text, never encoded.
        units: unit per numeric column, written after its value in text.

    A column with no role is kept in the table and used by nothing (external keys, dates).
    """

    title: str | None = None
    text: tuple[str, ...] = ()
    numeric: tuple[str, ...] = ()
    categorical: tuple[str, ...] = ()
    multi: tuple[str, ...] = ()
    image: tuple[str, ...] = ()
    units: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for role in ROLES:
            value = getattr(self, role)
            listed = isinstance(value, Collection) and not isinstance(value, str | Mapping)
            if not listed or not all(isinstance(column, str) for column in value):
                raise CatalogueError(f"schema: {role} needs a list of column names, got {value!r}")
            object.__setattr__(self, role, tuple(value))
        if not isinstance(self.units, Mapping) or not all(isinstance(unit, str) for unit in self.units.values()):
            raise CatalogueError(f"schema: units needs a unit per column name, got {self.units!r}")
        object.__setattr__(self, "units", dict(self.units))
        seen: dict[str, str] = {}
        for role in ROLES:
            for column in getattr(self, role):
                if column in seen:
                    raise CatalogueError(f"schema: column {column!r} is listed as {seen[column]} and as {role}")
                seen[column] = role
        if self.title is not None and self.title not in self.text:
            raise CatalogueError(f"schema: title {self.title!r} is not one of the text columns {list(self.text)}")
        for column in self.units:
            if column not in self.numeric:
                raise CatalogueError(f"schema: units names {column!r}, which is not a numeric column")

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column that has a role, by role."""
        return tuple(column for role in ROLES for column in getattr(self, role))

    def role(self, column: str) -> str | None:
        """The role of ``column``, or None for a column that is only kept."""
        return next((role for role in ROLES if column in getattr(self, role)), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and dicts, as written to ``catalogue.json``."""
        plain = {role: list(getattr(self, role)) for role in ROLES}
        return {"title": self.title, **plain, "units": dict(self.units)}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> TableSchema:
        """The inverse of :meth:`to_dict`; unknown keys raise :class:`CatalogueError`."""
        if not isinstance(value, Mapping):
            raise CatalogueError(f"schema needs an object of column lists, got {type(value).__name__}")
        unknown = set(value) - {f.name for f in fields(cls)}
        if unknown:
            raise CatalogueError(
                f"schema: unknown key(s) {sorted(unknown)}; known are title, {', '.join(ROLES)}, units"
            )
        return cls(**value)


def infer_schema(frame: pl.DataFrame, id_column: str) -> TableSchema:
    """Roles guessed from names and types: lists → multi, numbers → numeric, booleans → categorical; strings → image by
    name, multi where ``|`` separates values, text by name or where long or all different, else categorical.
    """
    import polars as pl

    roles: dict[str, list[str]] = {role: [] for role in ROLES}
    for column, dtype in frame.schema.items():
        if column == id_column:
            continue
        if isinstance(dtype, pl.List):
            roles["multi"].append(column)
        elif dtype.is_numeric():
            roles["numeric"].append(column)
        elif dtype in (pl.String, pl.Categorical, pl.Enum):
            roles[_string_role(column, frame[column].cast(pl.String).drop_nulls())].append(column)
        elif dtype == pl.Boolean:
            roles["categorical"].append(column)
    title = next((c for name in _TITLE_NAMES for c in roles["text"] if c.lower() == name), None)
    return TableSchema(
        title=title,
        text=tuple(roles["text"]),
        numeric=tuple(roles["numeric"]),
        categorical=tuple(roles["categorical"]),
        multi=tuple(roles["multi"]),
        image=tuple(roles["image"]),
    )


def _string_role(column: str, series: pl.Series) -> str:
    name = column.lower()
    if name in _IMAGE_NAMES:
        return "image"
    if name in _TEXT_NAMES:
        return "text"
    values = series.to_list()
    if not values:
        return "categorical"
    mean_length = sum(map(len, values)) / len(values)
    if mean_length < 4 * _LONG_TEXT and any("|" in value for value in values):
        return "multi"
    of_words = sum(" " in value for value in values) > 0.5 * len(values)
    all_different = len(values) > 20 and len(set(values)) > 0.9 * len(values)
    return "text" if mean_length > _LONG_TEXT or (all_different and of_words) else "categorical"


def normalise_table(
    frame: pl.DataFrame, schema: TableSchema, *, ids: list[str], id_column: str, where: str
) -> pl.DataFrame:
    """The table with ``id_column`` first, one row per id in the order of ``ids``, every column in its role's type.

    Blank strings, empty lists and non-finite numbers become null; ids without a row get nulls. Columns without a role
    are kept as ``String``.

    Raises:
        CatalogueError: a schema column is absent, an id occurs twice, or a value cannot be read in its column's role.
    """
    import polars as pl

    missing = [column for column in schema.columns if column not in frame.columns]
    if missing:
        raise CatalogueError(f"{where}: missing column(s) {missing}; found {frame.columns}")
    frame = frame.with_columns(pl.col(id_column).cast(pl.String))
    if frame[id_column].is_duplicated().any():
        twice = frame.filter(pl.col(id_column).is_duplicated())[id_column][0]
        raise CatalogueError(f"{where}: {id_column} {twice!r} occurs more than once")
    index = {identifier: row for row, identifier in enumerate(frame[id_column].to_list())}
    rows = pl.Series([index.get(identifier) for identifier in ids], dtype=pl.UInt32)
    others = [column for column in frame.columns if column != id_column]
    columns = [_normalise_column(frame[column].gather(rows), schema.role(column), where) for column in others]
    return pl.DataFrame([pl.Series(id_column, ids, dtype=pl.String), *columns])


def _normalise_column(values: pl.Series, role: str | None, where: str) -> pl.Series:
    import polars as pl

    if role == "multi":
        return _normalise_multi(values)
    if role == "numeric":
        return _normalise_numeric(values, where)
    if isinstance(values.dtype, (pl.List, pl.Struct, pl.Array)):
        if role is not None:
            raise CatalogueError(
                f"{where}: column {values.name!r} is {role} but holds {values.dtype}, not single values"
            )
        import json

        plain = [
            None if value is None else json.dumps(value, ensure_ascii=False, default=str) for value in values.to_list()
        ]
        return pl.Series(values.name, plain, dtype=pl.String)
    clean = values.cast(pl.String).str.strip_chars()
    return clean.set(clean == "", None).alias(values.name) if len(clean) else clean


def _normalise_numeric(values: pl.Series, where: str) -> pl.Series:
    import polars as pl

    if values.dtype == pl.String:
        values = _normalise_column(values, None, where)
    if values.dtype.is_nested():
        raise CatalogueError(f"{where}: column {values.name!r} is numeric but holds {values.dtype}")
    try:
        numbers = values.cast(pl.Float64, strict=False)
    except pl.exceptions.PolarsError as error:
        raise CatalogueError(f"{where}: column {values.name!r} is numeric but holds {values.dtype}") from error
    lost = values.is_not_null() & numbers.is_null()
    if lost.any():
        raise CatalogueError(f"{where}: column {values.name!r} is numeric but holds {values.filter(lost)[0]!r}")
    finite = numbers.is_finite().fill_null(False)
    return numbers.to_frame().select(pl.when(finite).then(pl.col(values.name)))[values.name]


def _normalise_multi(values: pl.Series) -> pl.Series:
    import polars as pl

    if not isinstance(values.dtype, pl.List):
        values = values.cast(pl.String).str.split("|")
    element = pl.element().cast(pl.String).str.strip_chars()
    lists = values.cast(pl.List(pl.String)).list.eval(element.filter(element.is_not_null() & (element != "")))
    return lists.to_frame().select(pl.when(pl.col(values.name).list.len() > 0).then(pl.col(values.name)))[values.name]


def frame_of(rows: Iterable[Mapping[str, Any]], where: str) -> pl.DataFrame:
    """A table from dicts whose keys may differ; absent keys are null."""
    import polars as pl

    try:
        return pl.from_dicts(list(rows), infer_schema_length=None)
    except (pl.exceptions.PolarsError, TypeError, OverflowError) as error:
        raise CatalogueError(f"{where}: {error}") from error
