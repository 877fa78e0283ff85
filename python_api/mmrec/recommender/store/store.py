"""The item store on disk, for readers: versions that they map while a writer adds new ones.

    folder/version-00000007.json      what version 7 is made of, with a checksum of itself
    folder/base-00000003.safetensors  all items, as of version 3
    folder/patch-00000007.safetensors items that changed, came or were removed since
    folder/lock                       held by the one writer

Files are never changed once they have their name, and a version is there when its JSON is: it is written last, and
every file is on the disk before it is named. So a reader sees a whole version or the one before, whenever the writer
stops.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ...files import TEMP_PREFIX, sync_folder
from .columns import Columns, map_file
from .manifest import DATA, Manifest, StoreError, check_file, identity, numbers, path_of, read_manifest
from .patch import Patch
from .snapshot import Index, StoreVersion

if TYPE_CHECKING:
    from .writer import StoreWriter

__all__ = ["INDEX_HASH", "INDEX_ROW", "LOCK", "ItemStore", "StoreBusyError"]

_LOG = logging.getLogger(__name__)
INDEX_HASH, INDEX_ROW = "index.hash", "index.row"
LOCK = "lock"


class StoreBusyError(StoreError):
    """Another process is writing to the store."""


class ItemStore:
    """The items of a catalogue in a folder of their own. Opening a version maps its files and reads them once, to check
    them. Several threads may use one.

    Args:
        folder: of the store.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._lock = threading.Lock()
        self._version: StoreVersion | None = None
        self._identity: tuple[int, ...] | None = None
        self._good: set[tuple[object, ...]] = set()
        # What could not be used, as it was then: it is tried again when a file of it has changed.
        self._damaged: dict[int, tuple[object, ...]] = {}

    def current(self) -> StoreVersion:
        """The newest version that is whole. Cheap where that is the one of the call before; a version that was got
        earlier stays valid, and as it was.

        A damaged version is reported once, as a warning, and the one before serves.

        Raises:
            StoreError: there is none.
            OSError: a file cannot be read now (too many open files, say).
        """
        with self._lock:
            for _ in range(10):  # a writer may remove old versions meanwhile
                found = numbers(self.folder)
                version, gone = self._newest(found)
                if gone and found != numbers(self.folder):
                    continue
                for number, error in gone.items():
                    self._report(number, f"{error.filename} is gone")
                if version is not None:
                    return version
                break
        if not found:
            raise StoreError(f"{self.folder} holds no item store; mmrec index makes one")
        raise StoreError(f"no version of {self.folder} can be used; the newest is {found[0]}")

    def _newest(self, found: list[int]) -> tuple[StoreVersion | None, dict[int, FileNotFoundError]]:
        """The newest version that can be opened, and those before it of which something is missing."""
        gone: dict[int, FileNotFoundError] = {}
        for number in found:
            try:
                mine = identity(self.folder, number)
                if mine == self._identity:
                    return self._version, gone
                if self._damaged.get(number) == self._state(number):
                    continue
                self._version = self._open(read_manifest(self.folder, number))
                self._identity = mine
                return self._version, gone
            except FileNotFoundError as error:
                gone[number] = error
            except StoreError as error:
                self._report(number, str(error))
        return None, gone

    def _report(self, number: int, why: str) -> None:
        self._damaged[number] = self._state(number)
        _LOG.warning("item store: version %d cannot be used, the one before serves: %s", number, why)

    def _state(self, number: int) -> tuple[object, ...]:
        """Tells whether a file of a version has changed."""
        try:
            files = [file.name for file in read_manifest(self.folder, number).files]
        except (StoreError, FileNotFoundError):
            files = []
        return tuple(_status(path) for path in (path_of(self.folder, number), *(self.folder / f for f in files)))

    @contextlib.contextmanager
    def writer(self, *, timeout: float = 10.0) -> Iterator[StoreWriter]:
        """The one writer of the store, within a `with` block. The folder is made if need be.

        Raises:
            StoreError: the folder holds something else.
            StoreBusyError: another one holds it for longer than `timeout` seconds.
        """
        from .writer import StoreWriter

        if not self.folder.is_dir():
            self.folder.mkdir(parents=True)
            sync_folder(self.folder.parent)
        self._refuse_other_files()
        with open(self.folder / LOCK, "a") as lock:
            until = time.monotonic() + timeout
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= until:
                        raise StoreBusyError(f"{self.folder}: another process is writing to this store") from None
                    time.sleep(0.02)
            yield StoreWriter(self.folder)

    def _refuse_other_files(self) -> None:
        """Old files are removed here: a folder that is not a store's is left alone."""
        if numbers(self.folder):
            return
        for name in sorted(os.listdir(self.folder)):
            if name != LOCK and not name.startswith(TEMP_PREFIX) and not DATA.fullmatch(name):
                raise StoreError(f"{self.folder} holds {name}; an item store needs a folder of its own")

    def _open(self, manifest: Manifest) -> StoreVersion:
        tensors = []
        for file in manifest.files:
            known = (file, _status(self.folder / file.name))
            if known not in self._good:
                check_file(self.folder, file)
                self._good.add(known)
            tensors.append(map_file(self.folder / file.name))
        base, *patches = tensors
        index = Index(base.pop(INDEX_HASH), base.pop(INDEX_ROW))
        parts = [Patch.from_tensors(patch) for patch in patches]
        names = [file.name for file in manifest.files]
        return StoreVersion(
            manifest.number, manifest.meta, manifest.num_rows, names, Columns.from_tensors(base), index, parts
        )


def _status(path: Path) -> tuple[int, ...] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
