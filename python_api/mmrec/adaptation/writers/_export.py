"""What becomes of each part of a catalogue, and the files of an export."""

from __future__ import annotations

import contextlib
import csv
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ...files import replacing
from ..errors import CatalogueError

if TYPE_CHECKING:
    from ..catalogue import Catalogue


@dataclass(frozen=True)
class Export:
    """What a writer did with each part of a catalogue.

    Parts are ``name``, ``items`` and ``users`` (which there are, under which ids), ``interactions`` (who chose what, in
    which order), ``rating``, ``timestamp``, ``split``, ``items.<column>``, ``users.<column>``, ``unit of …`` a numeric
    column, ``images``, ``features.<modality>`` and ``notes``. Every part that the catalogue has is in ``written`` or in
    ``left_out``; in both where only some of its rows could be written.

    Attributes:
        layout: its name.
        folder: where the files are.
        files: their names.
        written: per part the file, and the column or key, that holds it.
        changed: per written part that is not read back as it was: the rule, with the number of values concerned.
        left_out: per part that the layout does not hold: why.
    """

    layout: str
    folder: Path
    files: tuple[str, ...]
    written: dict[str, str]
    changed: dict[str, str]
    left_out: dict[str, str]


class Ledger:
    """Notes where each part of a catalogue goes; what a writer says nothing about is left out by name."""

    def __init__(self, layout: str, catalogue: Catalogue, no_place: Mapping[str, str]) -> None:
        """``no_place``: reasons by the part's first word (``items``, ``images``, …) for what the layout never holds."""
        if not len(catalogue.interactions):
            raise CatalogueError(f"{catalogue.name}: has no interactions; layout {layout} needs at least one")
        self.layout = layout
        self._catalogue, self._no_place = catalogue, no_place
        self._written: dict[str, str] = {}
        self._changed: dict[str, list[str]] = {}
        self._left_out: dict[str, str] = {}

    def keep(self, part: str, where: str, *rules: str | None) -> None:
        """``part`` is written to ``where``, changed by the ``rules`` that are not None."""
        self._written[part] = where
        for rule in filter(None, rules):
            self._changed.setdefault(part, []).append(rule)

    def leave(self, part: str, reason: str) -> None:
        """``part``, or some rows of it, is not written."""
        self._left_out[part] = reason

    def name(self) -> str:
        """The stem of the layout's files: the catalogue's name, or what a file can be called of it."""
        name = self._catalogue.name
        stem = re.sub(r"[^\w.() +-]", "_", name).strip(". ") or "catalogue"
        self.keep("name", "names of files", None if stem == name else f"{stem!r} instead of {name!r}")
        return stem

    def keep_ids(self, part: str, ids: Sequence[str], first: int, where: str, mapping: str) -> bool:
        """``part`` (items or users) under row numbers from ``first``; False where they are the catalogue's own ids, so
        that no ``mapping`` is needed."""
        renamed = any(identifier != str(row) for row, identifier in enumerate(ids, first))
        self.keep(part, where, f"row numbers from {first}; {mapping} has the ids" if renamed else None)
        return renamed

    def leave_silent_users(self) -> None:
        """Users without interactions are left out, in a layout that knows users by their sequences."""
        silent = self._catalogue.num_users - len(np.unique(self._catalogue.interactions.user))
        if silent:
            self.leave("users", f"{silent} without interactions: {self.layout} knows users by their sequences")

    def export(self, folder: Path, files: Iterable[str]) -> Export:
        """The whole account."""
        parts = _parts(self._catalogue)
        for part in parts:
            if part not in self._written and part not in self._left_out:
                kind = part.partition(".")[0]
                self.leave(part, self._no_place.get(kind, f"layout {self.layout} has no place for it"))
        changed = {part: "; ".join(rules) for part, rules in self._changed.items()}
        place = {part: n for n, part in enumerate(parts)}
        written, changed, left_out = (
            dict(sorted(entries.items(), key=lambda entry: place.get(entry[0], len(place))))
            for entries in (self._written, changed, self._left_out)
        )
        return Export(self.layout, folder, tuple(files), written, changed, left_out)


def _parts(catalogue: Catalogue) -> list[str]:
    rows = catalogue.interactions
    parts = ["name", "items", "users", "interactions"]
    parts += [name for name in ("rating", "timestamp", "split") if getattr(rows, name) is not None]
    sides = (("items", catalogue.items, catalogue.schema), ("users", catalogue.users, catalogue.user_schema))
    for side, frame, schema in sides:
        if frame is not None and schema is not None:
            parts += [f"{side}.{column}" for column in frame.columns[1:]]
            parts += [f"unit of {side}.{column}" for column in schema.units]
    parts += ["images"] if any(catalogue.images) else []
    parts += [f"features.{name}" for name in catalogue.features]
    return parts + (["notes"] if catalogue.notes else [])


def write_files(
    folder: Path, files: Mapping[str, bytes | np.ndarray], *, overwrite: bool, reads: Sequence[str]
) -> Path:
    """Writes all ``files`` under temporary names, then renames them in reverse order; returns the absolute folder.

    Args:
        files: content by name; an array becomes a ``.npy`` file. The one that makes the folder a catalogue is first.
        overwrite: see :func:`.write`.
        reads: patterns of the files that the layout's reader takes.
    """
    folder = folder.absolute()
    _check_folder(folder, files, overwrite, reads)
    try:
        with contextlib.ExitStack() as stack:
            for name, content in files.items():
                temporary = stack.enter_context(replacing(folder / name))
                with open(temporary, "xb") as file:
                    if isinstance(content, bytes):
                        file.write(content)
                    else:
                        np.save(file, content, allow_pickle=False)
    except OSError as error:
        raise CatalogueError(f"{folder}: not written ({error.strerror or error})") from error
    return folder


def _check_folder(folder: Path, files: Iterable[str], overwrite: bool, reads: Sequence[str]) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise CatalogueError(f"{folder}: is a file; a catalogue is written as a folder")
    if not overwrite:
        if any(folder.iterdir()):
            raise CatalogueError(f"{folder}: holds files; write into a new or empty folder, or with overwrite")
        return
    mixed = sorted({path.name for pattern in reads for path in folder.glob(pattern)} - set(files))
    if mixed:
        raise CatalogueError(f"{folder}: {', '.join(mixed)} would be read with what is written; remove them first")


def table_bytes(header: Sequence[str], columns: Sequence[Iterable[str]], where: str) -> bytes:
    """Tab separated lines, unquoted; the cells must hold neither tabs nor line breaks."""
    lines = ["\t".join(cells) for cells in zip(*columns, strict=True)]
    return _encoded("\n".join(["\t".join(header), *lines]) + "\n", where)


def mapping_bytes(header: Sequence[str] | None, ids: Sequence[str], where: str) -> bytes:
    """``id TAB row`` a line, rows from 0, quoted like CSV where an id holds a quote, tab or line break."""
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    if header:
        writer.writerow(header)
    writer.writerows([identifier, row] for row, identifier in enumerate(ids))
    return _encoded(text.getvalue(), where)


def _encoded(text: str, where: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        bad = text[error.start : error.end]
        raise CatalogueError(f"{where}: {bad!r} cannot be written as UTF-8") from error


def decimals(values: np.ndarray) -> list[str]:
    """The shortest decimals that give each float32 back; "" for NaN."""
    return ["" if value != value else str(value) for value in values]


def histories(catalogue: Catalogue) -> dict[int, list[int]]:
    """Item rows in order, per user row with interactions."""
    rows = catalogue.interactions
    users, starts = np.unique(rows.user, return_index=True)
    parts = np.split(rows.item, starts[1:])
    return {user: part.tolist() for user, part in zip(users.tolist(), parts, strict=True)}
