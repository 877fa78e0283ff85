"""The one writer of an item store."""

from __future__ import annotations

import functools
import logging
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...files import TEMP_PREFIX, replacing
from .columns import UTF8, Column, Columns, ItemRows, Meta, encode, map_file, whole, write_file
from .manifest import (
    DATA,
    DataFile,
    Manifest,
    StoreError,
    StoreFormatError,
    numbers,
    path_of,
    read_manifest,
    write_manifest,
)
from .patch import Patch, erased
from .snapshot import StoreVersion, hash_ids
from .store import INDEX_HASH, INDEX_ROW, ItemStore

__all__ = ["StoreWriter", "write_part"]

_LOG = logging.getLogger(__name__)
_KEPT = 3  # versions
# A base is written anew when so many items, and this share of all, lie in patches: each costs readers a page.
_MOST_PATCHED, _MOST_PATCHED_SHARE = 4096, 0.01
_PART = 1 << 16  # items at a time


def write_part(path: Path, items: ItemRows, meta: Meta) -> None:
    """Items in a file that `StoreWriter.join` takes, whole or not at all: for stores that several processes build."""
    with replacing(path) as temporary:
        write_file(temporary, whole(encode(items, meta).tensors()))


class StoreWriter:
    """Adds versions to a store; `ItemStore.writer` makes one, and holds the lock meanwhile."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Its own: what goes into a new version has been checked now, not when somebody else opened it.
        self._store = ItemStore(folder)
        for left in folder.glob(f"{TEMP_PREFIX}*"):  # by a writer that was killed
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)

    def create(self, meta: Meta, parts: Iterable[ItemRows]) -> int:
        """A new version with the items of `parts` and no others, rows in their order; its number. One part is in memory
        at a time, beside 16 bytes per item.

        Raises:
            ValueError: an id twice, or a part that does not fit `meta`.
            OSError: the disk is full, say; what was there before stays.
        """
        return self._write_base(meta, (encode(part, meta) for part in parts))

    def join(self, meta: Meta, files: Sequence[Path]) -> int:
        """A new version of the items in `files`, which `write_part` wrote for `meta`, and no others, rows in their
        order; its number. They are mapped, never in memory.

        Raises:
            ValueError: an id twice, or no file.
            OSError: the disk is full, say; what was there before stays.
        """
        return self._join(meta, [Columns.from_tensors(map_file(file)) for file in files])

    def upsert(self, items: ItemRows) -> int:
        """A new version in which `items` replace those of the same ids, and come behind the others where there is none;
        its number. Written in full when it returns: a crash before leaves the version before. No items make no version.

        Raises:
            StoreError: there is no version yet.
            ValueError: items that do not fit the store.
            OSError: the disk is full, say; what was there before stays.
        """
        now = self._store.current()
        if not len(items):
            return now.number
        columns = encode(items, now.meta)
        rows = torch.from_numpy(now.places(items.ids))
        new = rows < 0
        rows[new] = now.num_rows + torch.arange(int(new.sum()))
        return self._patch(now, Patch(rows, torch.zeros(len(rows), dtype=torch.bool), columns))

    def remove(self, ids: Sequence[str]) -> int:
        """A new version without these items, as `upsert`; its number. Ids that are not there are passed over. What was
        stored of them leaves the disk with the base that holds it: `compact` writes another, and versions before go
        with the next ones.

        Raises:
            StoreError: there is no version yet.
            TypeError: one id instead of a sequence.
            OSError: the disk is full, say; what was there before stays.
        """
        if isinstance(ids, str):
            raise TypeError(f"ids must be a sequence of ids, got the string {ids!r}")
        now = self._store.current()
        ids = list(dict.fromkeys(ids))
        rows = torch.from_numpy(now.rows(ids))
        there = [name for name, row in zip(ids, rows.tolist(), strict=True) if row >= 0]
        if not there:
            return now.number
        gone = torch.ones(len(there), dtype=torch.bool)
        return self._patch(now, Patch(rows[rows >= 0], gone, erased(there, now.meta)))

    def _patch(self, now: StoreVersion, patch: Patch) -> int:
        base, *patches = read_manifest(self.folder, now.number).files
        patched = sum(file.items for file in patches) + len(patch)
        # Smaller patches before it are taken into it: of n items there are then about log n patches.
        taken = [patch]
        while patches and patches[-1].items <= sum(map(len, taken)):
            taken.insert(0, Patch.from_tensors(map_file(self.folder / patches.pop().name)))
        number = self._next()
        made = Patch.latest(taken)
        file = self._write(f"patch-{number:08d}.safetensors", len(made), whole(made.tensors()))
        num_rows = max(now.num_rows, int(patch.rows.max()) + 1)
        self._publish(Manifest(number, now.meta, num_rows, (base, *patches, file)))
        if patched > max(_MOST_PATCHED, _MOST_PATCHED_SHARE * base.items):
            try:
                return self.compact()
            except OSError as error:  # the items are there, in a patch
                _LOG.warning("item store: %s could not be compacted: %s", self.folder, error)
        return number

    def compact(self) -> int:
        """A new version with the same items in one file, and nothing of those that were removed; its number."""
        now = self._store.current()
        parts = torch.from_numpy(now.alive_rows()).split(_PART)
        return self._write_base(now.meta, map(now.columns, parts))

    def _write_base(self, meta: Meta, parts: Iterable[Columns]) -> int:
        # A file says first how long each column is: parts wait on the disk, mapped, until all have come.
        with tempfile.TemporaryDirectory(prefix=TEMP_PREFIX, dir=self.folder) as waiting:
            mapped = []
            for n, part in enumerate(parts):
                path = Path(waiting) / str(n)
                write_file(path, whole(part.tensors()))
                mapped.append(Columns.from_tensors(map_file(path)))
            return self._join(meta, mapped)

    def _join(self, meta: Meta, parts: list[Columns]) -> int:
        if not parts:
            raise ValueError("parts: a store needs at least one, which may be empty")
        number, num_rows = self._next(), sum(map(len, parts))
        file = self._write(f"base-{number:08d}.safetensors", num_rows, {**_joined(parts), **_index(parts)})
        self._publish(Manifest(number, meta, num_rows, (file,)))
        return number

    def _write(self, name: str, items: int, columns: Mapping[str, Column]) -> DataFile:
        path = self.folder / name
        with replacing(path) as temporary:
            sums = write_file(temporary, columns)
        return DataFile(name, items, path.stat().st_size, tuple(sums))

    def _next(self) -> int:
        """A number that no version has, nor a file that a version had which is damaged now."""
        names = (DATA.fullmatch(path.name) for path in self.folder.iterdir())
        return max([*numbers(self.folder), *(int(name.group(1)) for name in names if name)], default=0) + 1

    def _publish(self, manifest: Manifest) -> None:
        write_manifest(self.folder, manifest)
        self._prune()

    def _prune(self) -> None:
        """Leaves the newest versions, and what they name. Who has mapped a file keeps it."""
        kept: set[str] = set()
        old, good = [], 0
        for number in numbers(self.folder):
            try:
                files = read_manifest(self.folder, number).files
            except StoreFormatError:
                return  # a newer program writes here too
            except StoreError:  # somebody may want to look at it
                kept |= {f"{kind}-{number:08d}.safetensors" for kind in ("base", "patch")}
                continue
            if good < _KEPT:
                kept |= {file.name for file in files}
            else:
                old.append(number)
            good += 1
        for number in old:
            path_of(self.folder, number).unlink(missing_ok=True)
        for path in self.folder.iterdir():
            if DATA.fullmatch(path.name) and path.name not in kept:
                path.unlink(missing_ok=True)


def _index(parts: list[Columns]) -> dict[str, Column]:
    """Where each id is, by its hash; ValueError for an id that is there twice."""
    hashes = np.concatenate([hash_ids([i.encode(*UTF8) for i in part.ragged["id"].strings()]) for part in parts])
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    starts = np.cumsum([0, *map(len, parts)])

    def name_of(row: int) -> str:
        part = int(np.searchsorted(starts, row, side="right")) - 1
        return parts[part].ragged["id"].select(torch.tensor([row - int(starts[part])])).strings()[0]

    seen: dict[np.int64, set[str]] = {}
    for place in np.flatnonzero(np.r_[False, ordered[1:] == ordered[:-1]]):
        same = seen.setdefault(ordered[place], {name_of(order[place - 1])})
        name = name_of(order[place])
        if name in same:
            raise ValueError(f"ids must be distinct, got {name!r} twice")
        same.add(name)
    return whole({INDEX_HASH: torch.from_numpy(ordered.copy()), INDEX_ROW: torch.from_numpy(order)})


def _joined(parts: list[Columns]) -> dict[str, Column]:
    """Columns of all parts, one part after another."""
    found: dict[str, Column] = {}

    def add(name: str, pieces: list[Tensor]) -> None:
        found[name] = Column(pieces[0].dtype, (sum(map(len, pieces)), *pieces[0].shape[1:]), lambda: pieces)

    for name in parts[0].fixed:
        add(name, [part.fixed[name] for part in parts])
    for name in parts[0].ragged:
        add(f"{name}.values", [part.ragged[name].values for part in parts])
        ends = [torch.zeros(1, dtype=torch.int64), *(part.ragged[name].offsets[1:] for part in parts)]
        found[f"{name}.offsets"] = Column(torch.int64, (sum(map(len, ends)),), functools.partial(_running, ends))
    return found


def _running(ends: list[Tensor]) -> Iterator[Tensor]:
    """Each part's ends behind those of the parts before."""
    before = 0
    for part in ends:
        yield part + before
        before += int(part[-1]) if len(part) else 0
