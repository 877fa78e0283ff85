"""What makes a version of a store: a JSON file that names its data files, and tells whether they are whole."""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...files import parse_json, write_atomic
from .columns import CHUNK, Meta

__all__ = [
    "DATA",
    "DataFile",
    "Manifest",
    "StoreError",
    "StoreFormatError",
    "check_file",
    "identity",
    "numbers",
    "path_of",
    "read_manifest",
    "write_manifest",
]

# 1 knew no removed items.
FORMAT, READABLE = 2, (1, 2)
_NAME = re.compile(r"version-(\d{8})\.json")
DATA = re.compile(r"(?:base|patch)-(\d{8})\.safetensors")


class StoreError(ValueError):
    """A store that cannot be read, or a file of it that is damaged: the message names it."""


class StoreFormatError(StoreError):
    """A version in a format that this version of the code does not know."""


@dataclass(frozen=True)
class DataFile:
    """A file of items: its name, how many items it holds, its size, and the CRC-32 of each `CHUNK` bytes."""

    name: str
    items: int
    size: int
    crc32: tuple[int, ...]


@dataclass(frozen=True)
class Manifest:
    """A version: all items of `files[0]`, then what the others put in their place or behind them, in order."""

    number: int
    meta: Meta
    num_rows: int
    files: tuple[DataFile, ...]


def path_of(folder: Path, number: int) -> Path:
    return folder / f"version-{number:08d}.json"


def numbers(folder: Path) -> list[int]:
    """Of the versions in `folder`, newest first, good or not."""
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted((int(m.group(1)) for m in map(_NAME.fullmatch, names) if m), reverse=True)


def identity(folder: Path, number: int) -> tuple[int, ...]:
    """What tells a version from another one of the same number: its JSON's place and times."""
    status = path_of(folder, number).stat()
    return number, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """From when this returns on, the version is there, on the disk; before, it is not."""
    content = {
        "format": FORMAT, "number": manifest.number, "meta": manifest.meta.to_dict(), "num_items": manifest.num_rows,
        "files": [
            {"name": f.name, "items": f.items, "size": f.size, "crc32": list(f.crc32)} for f in manifest.files
        ],
    }  # fmt: skip
    text = json.dumps({**content, "crc32": _checksum(content)}, indent=1, ensure_ascii=False)
    write_atomic(path_of(folder, manifest.number), (text + "\n").encode())


def read_manifest(folder: Path, number: int) -> Manifest:
    """StoreError if it is damaged or of another format; OSError if it is gone or cannot be read now."""
    path = path_of(folder, number)
    try:
        content = parse_json(path.read_bytes())
        checksum = content.pop("crc32")
        if checksum != _checksum(content):
            raise ValueError("its checksum does not fit")
        if content["format"] not in READABLE:
            raise StoreFormatError(f"{path} has format {content['format']}; this version reads up to {FORMAT}")
        files = tuple(DataFile(f["name"], f["items"], f["size"], tuple(f["crc32"])) for f in content["files"])
        if strange := [f.name for f in files if not DATA.fullmatch(f.name)]:
            raise ValueError(f"it names {strange[0]!r}")
        return Manifest(content["number"], Meta.from_dict(content["meta"]), content["num_items"], files)
    except StoreError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{path} is damaged ({type(error).__name__}: {error})") from None


def _checksum(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def check_file(folder: Path, file: DataFile) -> None:
    """StoreError unless the file has the size and the checksums that the version states. Reads all of it, once, mapped:
    it is in the page cache afterwards, not on the heap."""
    path = folder / file.name
    size = path.stat().st_size
    if size != file.size:
        raise StoreError(f"{path} has {size} bytes, the version that names it says {file.size}")
    if len(file.crc32) != -(-size // CHUNK):
        raise StoreError(f"{path}: the version that names it has {len(file.crc32)} checksums for {size} bytes")
    data = np.memmap(path, np.uint8, "r").data

    def damaged() -> Iterator[int]:
        chunks = (data[start : start + CHUNK] for start in range(0, size, CHUNK))
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # a checksum lets go of the interpreter
            for place, (found, wanted) in enumerate(zip(pool.map(zlib.crc32, chunks), file.crc32, strict=True)):
                if found != wanted:
                    yield place

    for place in damaged():
        raise StoreError(f"{path} is damaged: bytes {place * CHUNK} to {min((place + 1) * CHUNK, size)} have changed")
