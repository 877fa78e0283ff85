"""Files that are there whole or not at all, and hashes of files."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TEMP_PREFIX = ".tmp-"


def cache_root() -> Path:
    """Where what can be made again is kept: `$MMREC_CACHE`, else `~/.cache/mmrec`."""
    chosen = os.environ.get("MMREC_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "mmrec"


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text; ValueError if it is none, also if it nests deeper than the parser goes."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def write_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to `path` so that a reader sees the old file or the whole new one, never a part; see `replacing`."""
    with replacing(path) as temporary:
        with open(temporary, "xb") as file:
            file.write(data)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """The name of a file to write, which becomes `path` when the block ends: a reader sees the old file or the whole
    new one, never a part.

    It lies in the same folder, which is made if need be, is flushed to the disk and renamed over `path`. On any failure
    before that, Ctrl-C included, it is removed and `path` is left as it was; the error is passed on.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not tempfile, whose files nobody but their owner may read.
    temporary = path.with_name(f"{TEMP_PREFIX}{secrets.token_hex(8)}")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Has a folder's names on the disk, where renames become durable; not every file system lets a folder be opened."""
    try:
        sync(path)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EACCES, errno.EPERM, errno.EBADF, errno.ENOTSUP, errno.EISDIR):
            raise


def sync(path: Path) -> None:
    """Have a file, or a folder's list of names, on the disk before going on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
