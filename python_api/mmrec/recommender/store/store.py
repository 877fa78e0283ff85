"""The item store on disk: versions that readers map while a writer adds new ones.

    folder/version-00000007.json      what version 7 is made of, with a checksum of itself
    folder/base-00000003.safetensors  all items, as of version 3
    folder/patch-00000007.safetensors items that changed or came since
    folder/lock                       held by the one writer

Files are never changed once they have their name, and a version is there when its JSON is: it is written last, and
every file is on the disk before it is named. So a reader sees a whole version or the one before, whenever the writer
stops.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...files import TEMP_PREFIX, replacing
from .columns import Column, Columns, ItemRows, Meta, encode, map_file, whole, write_file
from .manifest import DataFile, Manifest, StoreError, check_file, numbers, read_manifest, write_manifest
from .snapshot import Index, StoreVersion, hash_ids, latest

__all__ = ["ItemStore", "StoreBusyError", "StoreWriter"]

_LOG = logging.getLogger(__name__)
_HASH, _ROW, _ROWS = "index.hash", "index.row", "patch.rows"
_KEPT = 3  # versions
# A base is written anew when so many items, or this share of all, lie in patches.
_MOST_PATCHED, _MOST_PATCHED_SHARE = 4096, 0.1
_PART = 1 << 16  # items at a time


class StoreBusyError(StoreError):
    """Another process is writing to the store."""


class ItemStore:
    """The items of a catalogue in a folder, for readers. Opening maps the files and reads them once, to check them.

    Args:
        folder: of the store.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._version: StoreVersion | None = None
        self._good: set[tuple[str, int, int, int]] = set()
        self._damaged: dict[int, StoreError] = {}

    def current(self) -> StoreVersion:
        """The newest version that is whole. Cheap where that is the one of the call before; a version that was got
        earlier stays valid, and as it was.

        A damaged version is reported once, as a warning, and the one before serves.

        Raises:
            StoreError: there is none.
        """
        for _ in range(10):  # a writer may remove old versions meanwhile
            found = numbers(self.folder)
            missing: FileNotFoundError | None = None
            for number in found:
                if self._version is not None and self._version.number == number:
                    return self._version
                if number in self._damaged:
                    continue
                try:
                    self._version = self._open(read_manifest(self.folder, number))
                    return self._version
                except FileNotFoundError as error:
                    missing = error
                except StoreError as error:
                    self._damaged[number] = error
                    _LOG.warning("item store: version %d cannot be used, the one before serves: %s", number, error)
            if found == numbers(self.folder):
                break
        if not found:
            raise StoreError(f"{self.folder} holds no item store; mmrec index makes one")
        raise StoreError(f"no version of {self.folder} can be used: {missing or self._damaged[found[0]]}")

    @contextlib.contextmanager
    def writer(self, *, timeout: float = 10.0) -> Iterator[StoreWriter]:
        """The one writer of the store, within a `with` block. The folder is made if need be.

        Raises:
            StoreBusyError: another one holds it for longer than `timeout` seconds.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "lock", "a") as lock:
            until = time.monotonic() + timeout
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= until:
                        raise StoreBusyError(f"{self.folder}: another process is writing to this store") from None
                    time.sleep(0.02)
            yield StoreWriter(self)

    def _open(self, manifest: Manifest) -> StoreVersion:
        tensors = []
        for file in manifest.files:
            path = self.folder / file.name
            status = path.stat()
            known = (file.name, status.st_ino, status.st_size, status.st_mtime_ns)
            if known not in self._good:
                check_file(self.folder, file)
                self._good.add(known)
            tensors.append(map_file(path))
        base, *patches = tensors
        index = Index(base.pop(_HASH), base.pop(_ROW))
        parts = [(patch.pop(_ROWS), Columns.from_tensors(patch)) for patch in patches]
        names = [file.name for file in manifest.files]
        return StoreVersion(
            manifest.number, manifest.meta, manifest.num_items, names, Columns.from_tensors(base), index, parts
        )


class StoreWriter:
    """Adds versions to a store; `ItemStore.writer` makes one, and holds the lock meanwhile."""

    def __init__(self, store: ItemStore) -> None:
        self.store = store
        self.folder = store.folder
        for left in self.folder.glob(f"{TEMP_PREFIX}*"):  # by a writer that was killed
            left.unlink(missing_ok=True)

    def create(self, meta: Meta, parts: Iterable[ItemRows]) -> int:
        """A new version with the items of `parts` and no others, rows in their order; its number.

        Raises:
            ValueError: an id twice, or a part that does not fit `meta`.
            OSError: the disk is full, say; what was there before stays.
        """
        return self._write_base(meta, [encode(part, meta) for part in parts])

    def upsert(self, items: ItemRows) -> int:
        """A new version in which `items` replace those of the same ids, and come behind the others where there is none;
        its number. Written in full when it returns: a crash before leaves the version before.

        Raises:
            StoreError: there is no version yet.
            ValueError: items that do not fit the store, or were made by another model.
        """
        now = self.store.current()
        columns = encode(items, now.meta)
        rows = torch.from_numpy(now.rows(items.ids))
        new = rows < 0
        rows[new] = now.num_items + torch.arange(int(new.sum()))
        num_items = now.num_items + int(new.sum())
        manifest = read_manifest(self.folder, now.number)
        patched = sum(file.items for file in manifest.files[1:]) + len(items)
        base, *patches = manifest.files
        number = self._next()
        # Smaller patches before it are taken into it: of n items there are then about log n patches.
        taken = [(rows, columns)]
        while patches and patches[-1].items <= sum(len(r) for r, _ in taken):
            tensors = map_file(self.folder / patches.pop().name)
            taken.insert(0, (tensors.pop(_ROWS), Columns.from_tensors(tensors)))
        patch = self._write_patch(number, taken)
        self._publish(Manifest(number, now.meta, num_items, (base, *patches, patch)))
        if patched > max(_MOST_PATCHED, _MOST_PATCHED_SHARE * base.items):
            return self.compact()
        return number

    def compact(self) -> int:
        """A new version with the same items in one file; its number."""
        now = self.store.current()
        parts = [now.columns(rows) for rows in torch.arange(now.num_items).split(_PART)]
        return self._write_base(now.meta, parts)

    def _write_base(self, meta: Meta, parts: list[Columns]) -> int:
        if not parts:
            raise ValueError("a store needs at least one part, which may be empty")
        number = self._next()
        name = f"base-{number:08d}.safetensors"
        num_items = sum(map(len, parts))
        file = self._write(name, num_items, {**_joined(parts), **dict(_index(parts))})
        self._publish(Manifest(number, meta, num_items, (file,)))
        return number

    def _write_patch(self, number: int, parts: list[tuple[Tensor, Columns]]) -> DataFile:
        rows, columns = latest(parts)
        name = f"patch-{number:08d}.safetensors"
        return self._write(name, len(rows), whole({_ROWS: rows, **columns.tensors()}))

    def _write(self, name: str, items: int, columns: Mapping[str, Column]) -> DataFile:
        path = self.folder / name
        with replacing(path) as temporary:
            sums = write_file(temporary, columns)
        return DataFile(name, items, path.stat().st_size, tuple(sums))

    def _next(self) -> int:
        return max(numbers(self.folder), default=0) + 1

    def _publish(self, manifest: Manifest) -> None:
        write_manifest(self.folder, manifest)
        self._prune()

    def _prune(self) -> None:
        """Leaves the newest versions, and what they name. Who has mapped a file keeps it."""
        kept: set[str] = set()
        good = 0
        for number in numbers(self.folder):
            try:
                manifest = read_manifest(self.folder, number)
            except StoreError:
                continue  # somebody may want to look at it
            if good < _KEPT:
                kept |= {file.name for file in manifest.files}
            else:
                (self.folder / f"version-{number:08d}.json").unlink(missing_ok=True)
            good += 1
        for path in self.folder.glob("*.safetensors"):
            if path.name not in kept:
                path.unlink(missing_ok=True)


def _index(parts: list[Columns]) -> Iterator[tuple[str, Column]]:
    ids = [name for part in parts for name in part.ragged["id"].strings()]
    hashes = hash_ids([name.encode() for name in ids])
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    seen: dict[np.int64, set[str]] = {}
    for place in np.flatnonzero(np.r_[False, ordered[1:] == ordered[:-1]]):
        same = seen.setdefault(ordered[place], {ids[order[place - 1]]})
        if ids[order[place]] in same:
            raise ValueError(f"ids must be distinct, got {ids[order[place]]!r} twice")
        same.add(ids[order[place]])
    yield from whole({_HASH: torch.from_numpy(ordered.copy()), _ROW: torch.from_numpy(order)}).items()


def _joined(parts: list[Columns]) -> dict[str, Column]:
    """Columns of all parts, one part at a time."""
    found: dict[str, Column] = {}

    def add(name: str, pieces: list[Tensor], rest: Callable[[], Iterable[Tensor]] | None = None) -> None:
        shape = (sum(map(len, pieces)), *pieces[0].shape[1:])
        found[name] = Column(pieces[0].dtype, shape, rest or (lambda: pieces))

    for name in parts[0].fixed:
        add(name, [part.fixed[name] for part in parts])
    for name in parts[0].ragged:
        add(f"{name}.values", [part.ragged[name].values for part in parts])
        ends = [part.ragged[name].offsets[1:] for part in parts]
        ends = [torch.zeros(1, dtype=torch.int64), *ends]
        add(f"{name}.offsets", ends, functools.partial(_running, ends))
    return found


def _running(ends: list[Tensor]) -> Iterator[Tensor]:
    """Each part's ends behind those of the parts before."""
    before = 0
    for part in ends:
        yield part + before
        before += int(part[-1]) if len(part) else 0
