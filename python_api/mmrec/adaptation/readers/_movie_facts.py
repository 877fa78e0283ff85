"""Film facts that come beside MovieLens: TMDB tables and OMDb records, brought to one set of columns.

Sources write "unknown" as 0 (TMDB: budget, revenue, runtime, votes) or as "N/A" (OMDb); here it is missing. TMDB facts
whose release year is more than three years off the MovieLens year belong to another film (a remake, a namesake) and are
left out.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import CatalogueError
from . import _files

COLUMNS: dict[str, Any] = {
    "text": ("overview", "plot", "tagline"),
    "numeric": (
        "runtime", "budget", "revenue", "popularity", "vote_average", "vote_count",
        "imdb_rating", "imdb_votes", "metascore",
    ),
    "categorical": ("original_language", "rated", "collection"),
    "multi": ("director", "writer", "actors", "production_companies", "country", "language"),
    "units": {"runtime": "min", "budget": "USD", "revenue": "USD"},
}  # fmt: skip
_YEARS_APART = 3


def movie_facts(folder: Path, years: Mapping[str, float | None], notes: list[str]) -> dict[str, dict[str, Any]]:
    """Facts by movie id, from whichever files are present; ``notes`` says what was resolved or left out."""
    facts: dict[str, dict[str, Any]] = {}
    for source in (_tmdb_nested(folder, notes), _tmdb_table(folder / "data" / "items.csv", notes)):
        wrong = {movie for movie, row in source.items() if _another_film(row, years.get(movie))}
        if wrong:
            notes.append(f"TMDB facts of {len(wrong)} movie(s) are of a film of another year and were left out")
            years = {movie: year for movie, year in years.items() if movie not in wrong}
        for movie, row in source.items():
            if movie in years:
                _merge(facts.setdefault(movie, {}), row)
    for movie, row in _omdb(folder / "omdb_metadata.jsonl").items():
        _merge(facts.setdefault(movie, {}), row)
    for row in facts.values():
        row.pop("tmdb_year", None)
    return facts


def _another_film(row: Mapping[str, Any], year: float | None) -> bool:
    released = row.get("tmdb_year")
    return year is not None and released is not None and abs(released - year) > _YEARS_APART


def _merge(into: dict[str, Any], row: Mapping[str, Any]) -> None:
    for column, value in row.items():
        if into.get(column) is None and value is not None:
            into[column] = value


def _tmdb_table(path: Path, notes: list[str]) -> dict[str, dict[str, Any]]:
    """``items.csv``; rows that repeat a movie id fill each other's gaps, the first one wins."""
    rows: dict[str, dict[str, Any]] = {}
    records = list(_table_records(path, ["movie_id"]))
    for record in records:
        _merge(rows.setdefault(str(record["movie_id"]), {}), _tmdb_row(record))
    if len(records) > len(rows):
        notes.append(f"{path.name}: {len(records)} rows for {len(rows)} movies, resolved by movie_id")
    return rows


def _table_records(path: Path, needed: list[str]) -> Iterable[dict[str, Any]]:
    if not path.is_file():
        return []
    frame = _files.read_table(path, text_columns=["movie_id"])
    _files.require_columns(frame.columns, needed, path.name)
    return frame.iter_rows(named=True)


def _tmdb_nested(folder: Path, notes: list[str]) -> dict[str, dict[str, Any]]:
    """``item_features.csv`` by movie id; where it is absent, ``features.json`` joined over ``links.csv``."""
    rows: dict[str, dict[str, Any]] = {}
    path = folder / "data" / "item_features.csv"
    records = list(_table_records(path, ["movie_id"]))
    for record in records:
        _merge(rows.setdefault(str(record["movie_id"]), {}), _tmdb_row(record))
    if len(records) > len(rows):
        notes.append(f"{path.name}: {len(records)} rows for {len(rows)} movies, resolved by movie_id")
    by_key = {str(row.get("id")): row for row in _nested_records(folder / "data" / "features.json")}
    for link in _table_records(folder / "links.csv", ["movie_id", "tmdb_id"]) if by_key else ():
        row = by_key.get(str(link["tmdb_id"]))
        if row is not None:
            _merge(rows.setdefault(str(link["movie_id"]), {}), _tmdb_row(row))
    return rows


def _nested_records(path: Path) -> list[dict[str, Any]]:
    records = _files.read_json(path) if path.is_file() else []
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise CatalogueError(f"{path.name}: needs a list of objects")
    return records


def _tmdb_row(record: Mapping[str, Any]) -> dict[str, Any]:
    votes = _positive(record.get("vote_count"))
    released = str(record.get("release_date") or "")[:4]
    return {
        "overview": _files.plain_text(record.get("overview")),
        "tagline": _files.plain_text(record.get("tagline")),
        "runtime": _positive(record.get("runtime")),
        "budget": _positive(record.get("budget")),
        "revenue": _positive(record.get("revenue")),
        "popularity": _files.number(record.get("popularity")),
        "vote_average": _files.number(record.get("vote_average")) if votes else None,
        "vote_count": votes,
        "original_language": record.get("original_language"),
        "collection": next(iter(_names(record.get("belongs_to_collection"))), None),
        "production_companies": _names(record.get("production_companies")) or None,
        "tmdb_year": float(released) if released.isdigit() else None,
    }


def _positive(value: object) -> float | None:
    result = _files.number(value)
    return result if result else None


def _names(value: object) -> list[str]:
    """The names in a TMDB list, dict, or the text of either."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return []
    entries = [value] if isinstance(value, dict) else value
    if not isinstance(entries, list):
        return []
    return [str(entry["name"]) for entry in entries if isinstance(entry, dict) and entry.get("name")]


def _omdb(path: Path) -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for number, record in _files.read_jsonl(path) if path.is_file() else ():
        _files.require_columns(list(record), ["movie_id"], f"{path.name} line {number}")
        known = {key: value for key, value in record.items() if value != "N/A"}
        runtime = str(known.get("Runtime", "")).removesuffix(" min")
        _merge(
            rows.setdefault(str(record["movie_id"]), {}),
            {
                "plot": _files.plain_text(known.get("Plot")),
                "runtime": _positive(runtime),
                "rated": None if known.get("Rated") in ("Not Rated", "Unrated") else known.get("Rated"),
                "imdb_rating": _files.number(known.get("imdbRating")),
                "imdb_votes": _files.number(known.get("imdbVotes")),
                "metascore": _files.number(known.get("Metascore")),
                "director": _people(known.get("Director")),
                "writer": _people(known.get("Writer")),
                "actors": _people(known.get("Actors")),
                "country": _people(known.get("Country")),
                "language": _people(known.get("Language")),
            },
        )
    return rows


def _people(value: object) -> list[str] | None:
    """Names separated by commas, without remarks in brackets, each once."""
    if not isinstance(value, str):
        return None
    names = (part.partition("(")[0].strip() for part in value.split(", "))
    return list(dict.fromkeys(name for name in names if name)) or None
