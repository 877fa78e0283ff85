"""MovieLens-100K with posters and film facts.

``ml-100k/u.{data,item,user}`` alone are enough. Beside them, each optional and each with gaps:
``data/posters/<movie_id>.*``, ``data/items.csv`` and ``data/item_features.csv`` (TMDB), ``data/features.json`` (the
same, nested), ``links.csv`` (keys), ``omdb_metadata.jsonl`` (OMDb). All ratings count as interactions.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..catalogue import Catalogue
from ..errors import CatalogueError
from ..interactions import Interactions
from ..schema import TableSchema, frame_of, normalise_table
from . import _files
from ._movie_facts import COLUMNS, movie_facts

if TYPE_CHECKING:
    import polars as pl

LOOKS_FOR = "ml-100k/u.data and ml-100k/u.item (or both directly in the folder)"
_GENRES = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip
_YEAR = re.compile(r"\((\d{4})\)\s*$")


def _core(folder: Path) -> Path:
    return folder / "ml-100k" if (folder / "ml-100k").is_dir() else folder


def detect(folder: Path) -> bool:
    return (_core(folder) / "u.data").is_file() and (_core(folder) / "u.item").is_file()


def read(folder: Path) -> Catalogue:
    core = _core(folder)
    movies = _movies(core / "u.item")
    users = _users(core / "u.user") if (core / "u.user").is_file() else []
    ratings = _ratings(core / "u.data")
    notes: list[str] = []
    facts = movie_facts(folder, {movie: row["year"] for movie, row in movies.items()}, notes)
    rows = [{**row, **facts.get(movie, {})} for movie, row in movies.items()]

    item_ids = _files.ordered_ids(list(movies))
    user_ids = _files.ordered_ids({row["user_id"] for row in users} | set(ratings["user"]))
    interactions = Interactions.from_rows(
        _files.rows_of(ratings["user"], user_ids, what="user", where="u.data", known="u.user"),
        _files.rows_of(ratings["item"], item_ids, what="item", where="u.data", known="u.item"),
        rating=np.array(ratings["rating"], dtype=np.float32),
        timestamp=np.array(ratings["time"], dtype=np.int64),
    )
    schema = _schema({column for row in rows for column in row})
    user_schema = TableSchema(numeric=("age",), categorical=("gender", "occupation"), units={"age": "years"})
    return Catalogue(
        name=folder.resolve().name,
        item_ids=item_ids,
        user_ids=user_ids,
        interactions=interactions,
        items=normalise_table(frame_of(rows, "u.item"), schema, ids=item_ids, id_column="item_id", where="u.item"),
        users=_user_table(users, user_schema, user_ids),
        schema=schema,
        user_schema=user_schema if users else None,
        images=_posters(folder / "data" / "posters", item_ids, notes),
        notes=tuple(notes),
    )


def _records(path: Path, separator: str, width: int) -> list[list[str]]:
    records = []
    for number, line in enumerate(path.read_text(encoding="latin-1").split("\n"), 1):
        if not line.strip():
            continue
        fields = line.rstrip("\r").split(separator)
        if len(fields) != width:
            raise CatalogueError(f"{path.name} line {number}: needs {width} fields, got {len(fields)}")
        records.append(fields)
    if not records:
        raise CatalogueError(f"{path.name}: empty file")
    return records


def _ratings(path: Path) -> dict[str, list]:
    columns: dict[str, list] = {"user": [], "item": [], "rating": [], "time": []}
    for number, (user, item, rating, time) in enumerate(_records(path, "\t", 4), 1):
        try:
            values = (user, item, float(rating), int(time))
            np.int64(values[3])
        except (ValueError, OverflowError):
            raise CatalogueError(
                f"{path.name} line {number}: rating and time must be numbers, got {rating!r}, {time!r}"
            ) from None
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value)
    return columns


def _movies(path: Path) -> dict[str, dict[str, Any]]:
    movies: dict[str, dict[str, Any]] = {}
    for movie, title, released, _, imdb, *flags in _records(path, "|", 5 + len(_GENRES)):
        if movie in movies:
            raise CatalogueError(f"{path.name}: movie {movie} occurs more than once")
        year = _YEAR.search(title)
        genres = [name for name, flag in zip(_GENRES, flags, strict=True) if flag == "1" and name != "unknown"]
        movies[movie] = {
            "item_id": movie,
            "title": None if title == "unknown" else title,
            "year": float(year.group(1)) if year else None,
            "genres": genres,
            "release_date": released,
            "imdb_url": imdb,
        }
    return movies


def _users(path: Path) -> list[dict[str, Any]]:
    names = ("user_id", "age", "gender", "occupation", "zip")
    return [dict(zip(names, record, strict=True)) for record in _records(path, "|", len(names))]


def _user_table(rows: list[dict[str, Any]], schema: TableSchema, user_ids: list[str]) -> pl.DataFrame | None:
    if not rows:
        return None
    return normalise_table(frame_of(rows, "u.user"), schema, ids=user_ids, id_column="user_id", where="u.user")


def _schema(found: set[str]) -> TableSchema:
    def present(*columns: str) -> tuple[str, ...]:
        return tuple(column for column in columns if column in found)

    return TableSchema(
        title="title",
        text=present("title", *COLUMNS["text"]),
        numeric=present("year", *COLUMNS["numeric"]),
        categorical=present(*COLUMNS["categorical"]),
        multi=present("genres", *COLUMNS["multi"]),
        units={column: unit for column, unit in COLUMNS["units"].items() if column in found},
    )


def _posters(folder: Path, item_ids: list[str], notes: list[str]) -> list[Path | None]:
    index = {identifier: row for row, identifier in enumerate(item_ids)}
    images: list[Path | None] = [None] * len(item_ids)
    strays = 0
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.suffix.lower() in _files.IMAGE_SUFFIXES:
            row = index.get(path.stem)
            if row is None:
                strays += 1
            else:
                images[row] = path
    if strays:
        notes.append(f"posters: {strays} file(s) belong to no movie and were left out")
    return images
