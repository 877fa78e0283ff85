"""Tensors with their facts on disk: replaced in one step, verified by hash when read.

``<name>.json`` names the tensor file ``<name>.<hash>.safetensors`` beside it, and its SHA-256. The tensor file is
written first and the JSON that names it replaces its predecessor afterwards: readers see the old state or the new.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ...files import parse_json, write_atomic

__all__ = ["exists", "load_tensors", "remove", "save_json", "save_tensors"]

_FORMAT = 3  # 2: the fusion averages its answers; 3: what fuses may be chosen


def exists(folder: Path, name: str) -> bool:
    """Whether something was saved under this name."""
    return (folder / f"{name}.json").is_file()


def save_tensors(folder: Path, name: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Saves ``tensors`` and ``facts`` (JSON values) under ``name``; on a full disk what was there stays."""
    from safetensors.torch import save

    data = save({key: value.detach().cpu().contiguous() for key, value in tensors.items()})
    digest = hashlib.sha256(data).hexdigest()
    file = f"{name}.{digest[:12]}.safetensors"
    before = _file_of(folder, name)
    _write(folder / file, data)
    content = {"format": _FORMAT, "file": file, "sha256": digest, **facts}
    save_json(folder / f"{name}.json", content)
    if before not in (None, file):
        (folder / str(before)).unlink(missing_ok=True)


def save_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replaces a JSON file in one step."""
    _write(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def load_tensors(folder: Path, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What :func:`save_tensors` saved; ``ValueError`` names the file that is damaged or gone."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = folder / f"{name}.json"
    try:
        facts = parse_json(path.read_text(encoding="utf-8"))
        file, digest, written = folder / facts["file"], facts["sha256"], facts["format"]
        if not _is_ours(facts["file"], name):
            raise ValueError(f"it names {facts['file']!r}")
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file, so there is no {name} to read") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is corrupt ({type(error).__name__}: {error})") from None
    if written != _FORMAT:
        raise ValueError(f"{path} has format {written}; this version reads {_FORMAT}")
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{file} is gone, and {path.name} needs it") from None
    if hashlib.sha256(data).hexdigest() != digest:
        raise ValueError(f"{file} is corrupt: its bytes do not have the SHA-256 that {path.name} states")
    try:
        return load(data), facts
    except SafetensorError as error:
        raise ValueError(f"{file} is corrupt: {error}") from None


def remove(folder: Path, name: str) -> None:
    """Deletes what was saved under ``name``, if anything."""
    file = _file_of(folder, name)
    (folder / f"{name}.json").unlink(missing_ok=True)
    if file is not None:
        (folder / file).unlink(missing_ok=True)


def _file_of(folder: Path, name: str) -> str | None:
    try:
        file = parse_json((folder / f"{name}.json").read_text(encoding="utf-8"))["file"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return file if _is_ours(file, name) else None


def _is_ours(file: object, name: str) -> bool:
    """Whether `save_tensors` gives such a name: it lies in the folder."""
    return isinstance(file, str) and re.fullmatch(rf"{re.escape(name)}\.[0-9a-f]{{12}}\.safetensors", file) is not None


def _write(path: Path, data: bytes) -> None:
    try:
        write_atomic(path, data)
    except OSError as error:
        reason = f"{error.strerror or error}; what was saved before is intact"
        raise OSError(error.errno, reason, str(path)) from error
