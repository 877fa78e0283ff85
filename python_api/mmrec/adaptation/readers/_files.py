"""Files to rows, with errors that name file, line and column."""

from __future__ import annotations

import ast
import gzip
import html
import json
import re
import tokenize
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import numpy as np

from ...files import parse_json
from ..catalogue import Features
from ..errors import CatalogueError

if TYPE_CHECKING:
    import polars as pl

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
_TAG = re.compile(r"<[^<>]*>")


def open_text(path: Path) -> IO[str]:
    """A text stream over a plain or gzipped UTF-8 file."""
    if path.suffix == ".gz":
        return cast("IO[str]", gzip.open(path, "rt", encoding="utf-8"))
    return path.open(encoding="utf-8")


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, line) of every line that is not blank; a broken archive or encoding is named."""
    number = 0
    try:
        with open_text(path) as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield number, line
    except UnicodeDecodeError as error:
        raise CatalogueError(f"{path.name}: after line {number}: not valid UTF-8 ({error.reason})") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise CatalogueError(f"{path.name}: after line {number}: broken gzip file ({error})") from error


def read_jsonl(path: Path, *, python_literals: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) per line; ``python_literals`` also takes the single-quoted dicts of the 2014 Amazon
    metadata.
    """
    empty = True
    for number, line in read_lines(path):
        empty = False
        try:
            row = parse_json(line)
        except ValueError as error:
            row = _literal(line) if python_literals else None
            if row is None:
                raise CatalogueError(f"{path.name} line {number}: malformed JSON ({_reason(error)})") from error
        if not isinstance(row, dict):
            raise CatalogueError(f"{path.name} line {number}: needs one JSON object a line, got {type(row).__name__}")
        yield number, row
    if empty:
        raise CatalogueError(f"{path.name}: empty file")


def _literal(line: str) -> Any:
    try:
        return ast.literal_eval(line.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None


def read_json(path: Path) -> Any:
    """The one JSON value in a file."""
    try:
        with open_text(path) as stream:
            content = stream.read()
    except UnicodeDecodeError as error:
        raise CatalogueError(f"{path.name}: not valid UTF-8 ({error.reason})") from error
    if not content.strip():
        raise CatalogueError(f"{path.name}: empty file")
    try:
        return parse_json(content)
    except ValueError as error:
        line = f" line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise CatalogueError(f"{path.name}{line}: malformed JSON ({_reason(error)})") from error


def _reason(error: ValueError) -> str:
    return error.msg if isinstance(error, json.JSONDecodeError) else str(error)


def read_table(path: Path, *, text_columns: Sequence[str] = (), separator: str = ",") -> pl.DataFrame:
    """A csv, tsv, jsonl or parquet file; the columns in ``text_columns`` stay strings ("007" keeps its zeros)."""
    import polars as pl

    if path.stat().st_size == 0:
        raise CatalogueError(f"{path.name}: empty file")
    try:
        if path.suffix == ".parquet":
            return pl.read_parquet(path)
        if path.suffix == ".jsonl":
            rows = [row for _, row in read_jsonl(path)]
            return pl.from_dicts(rows, infer_schema_length=None)
        header = pl.read_csv(path, separator=separator, n_rows=0, infer_schema=False).columns
        overrides = {column: pl.String for column in text_columns if column in header}
        return pl.read_csv(path, separator=separator, infer_schema_length=None, schema_overrides=overrides)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException, TypeError, OverflowError) as error:
        raise CatalogueError(f"{path.name}: {str(error).splitlines()[0]:.300}") from error


def require_columns(columns: Sequence[str], needed: Sequence[str], where: str) -> None:
    """:class:`CatalogueError` where a needed column is absent."""
    missing = [column for column in needed if column not in columns]
    if missing:
        raise CatalogueError(f"{where}: missing column(s) {missing}; found {list(columns)}")


def integers(values: pl.Series, where: str) -> np.ndarray:
    """int64 array of a column; whole-valued floats and digit strings count, anything else and nulls raise."""
    import polars as pl

    if values.dtype.is_nested():
        raise CatalogueError(f"{where}: column {values.name!r} needs integers, got {values.dtype}")
    numbers = values.cast(pl.Int64, strict=False)
    bad = numbers.is_null()
    if values.dtype.is_float():
        bad |= values != values.floor()
    if bad.any():
        row = int(bad.arg_true()[0])
        raise CatalogueError(
            f"{where}: column {values.name!r}, data row {row + 1}: needs an integer, got {values[row]!r}"
        )
    return numbers.to_numpy().astype(np.int64)


def seconds(values: np.ndarray, where: str) -> np.ndarray:
    """Timestamps checked to be seconds: anything beyond the year 5138 is milliseconds by mistake."""
    if len(values) and values.max() > 100_000_000_000:
        raise CatalogueError(f"{where}: timestamps must be in seconds; {values.max()} looks like milliseconds")
    return values


def ordered_ids(ids: Sequence[str] | set[str]) -> list[str]:
    """Distinct ids: in numeric order where all are digits, else lexicographic (by code point)."""
    distinct = set(ids)
    if all(i.isascii() and i.isdigit() for i in distinct):
        return sorted(distinct, key=_numeric)
    return sorted(distinct)


def _numeric(digits: str) -> tuple[int, str, str]:
    """Orders digit strings as their numbers, of any length; Python converts 4300 digits at most."""
    number = digits.lstrip("0")
    return len(number), number, digits


def rows_of(values: Sequence[str], ids: Sequence[str], *, what: str, where: str, known: str) -> np.ndarray:
    """int32 rows of external ids; an id that ``known`` does not list raises with its place."""
    index = {identifier: row for row, identifier in enumerate(ids)}
    rows = np.fromiter((index.get(value, -1) for value in values), dtype=np.int32, count=len(values))
    unknown = np.flatnonzero(rows < 0)
    if len(unknown):
        first = values[int(unknown[0])]
        raise CatalogueError(f"{where}: {what} {first!r} is not in {known} ({len(unknown)} such interaction(s))")
    return rows


def one_file(folder: Path, patterns: Sequence[str]) -> Path | None:
    """The one file that matches any of the glob patterns, None for none; several raise."""
    found = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
    if len(found) > 1:
        raise CatalogueError(f"{folder}: needs one of {', '.join(patterns)}, found {', '.join(p.name for p in found)}")
    return found[0] if found else None


def read_features(path: Path, *, rows: int | None = None, mask_path: Path | None = None) -> Features:
    """``[I, d]`` vectors with their mask; without a mask file, rows that are all zero or not finite are missing."""
    values = _load_array(path)
    if values.ndim != 2 or values.dtype.kind not in "fiu":
        raise CatalogueError(f"{path.name}: needs a numeric [I, d] array, got {values.dtype} {list(values.shape)}")
    if rows is not None and len(values) != rows:
        raise CatalogueError(f"{path.name}: needs one row per item ({rows}), got {len(values)}")
    values = np.ascontiguousarray(values, dtype=np.float32)
    if mask_path is None:
        mask = np.isfinite(values).all(axis=1) & np.any(values, axis=1)
    else:
        mask = _load_array(mask_path)
        if mask.shape != (len(values),) or mask.dtype != np.bool_:
            raise CatalogueError(f"{mask_path.name}: needs bool [{len(values)}], got {mask.dtype} {list(mask.shape)}")
    return Features(np.where(mask[:, None], values, np.float32(0)), mask)


def _load_array(path: Path) -> np.ndarray:
    try:
        # Mapped: a header that promises more than the file holds is refused before memory is asked for.
        mapped = np.lib.format.open_memmap(path, mode="r")
    except (ValueError, EOFError, SyntaxError, OverflowError, tokenize.TokenError) as error:
        raise CatalogueError(f"{path.name}: not a plain .npy array ({error})") from error
    return np.array(mapped)


def plain_text(value: object) -> str | None:
    """A string, or a list's strings joined by blanks, without HTML tags and entities; None where nothing is left."""
    if isinstance(value, (list, tuple)):
        value = " ".join(str(part) for part in value if part is not None)
    if not isinstance(value, str):
        return None
    text = _TAG.sub(" ", html.unescape(value)) if "<" in value or "&" in value else value
    return " ".join(text.split()) or None


def number(value: object) -> float | None:
    """The number in "$1,299.99", "868,378" or 12.5; None for anything else, a price range included."""
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, (int, float)):
        return float(value) if abs(value) < 1e300 else None
    match = re.fullmatch(r"\s*\$?\s*(-?\d[\d,]*(?:\.\d+)?)\s*", str(value))
    return float(match.group(1).replace(",", "")) if match else None
