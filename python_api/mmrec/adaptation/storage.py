"""Writing a catalogue: everything or nothing."""

from __future__ import annotations

import io
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import numpy as np

from ..files import parse_json, sync
from .errors import CatalogueError

if TYPE_CHECKING:
    import polars as pl

    from .catalogue import Catalogue

_FORMAT = "mmrec-catalogue-1"


def save(catalogue: Catalogue, folder: Path) -> Path:
    """See :meth:`Catalogue.save`."""
    folder = folder.absolute()
    _check_replaceable(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    except OSError as error:
        raise CatalogueError(f"{folder.parent}: cannot be written ({error.strerror})") from error
    try:
        _write_all(catalogue, staging)
        _swap_in(staging, folder)
    except OSError as error:
        raise CatalogueError(f"{folder}: not saved ({error.strerror or error}); what was there is unchanged") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def _check_replaceable(folder: Path) -> None:
    if not folder.exists():
        return
    if not folder.is_dir():
        raise CatalogueError(f"{folder}: is a file; a catalogue is saved as a folder")
    if any(folder.iterdir()) and not _is_saved_catalogue(folder):
        raise CatalogueError(f"{folder}: holds other files; save into a new or empty folder, or over a saved catalogue")


def _is_saved_catalogue(folder: Path) -> bool:
    try:
        return parse_json((folder / "catalogue.json").read_text(encoding="utf-8")).get("format") == _FORMAT
    except (OSError, ValueError, AttributeError):
        return False


def _swap_in(staging: Path, folder: Path) -> None:
    """Renames ``staging`` to ``folder``; what was there is put back if the rename fails."""
    os.chmod(staging, 0o777 & ~_umask())
    if not folder.exists():
        os.rename(staging, folder)
    else:
        old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".old", dir=folder.parent))
        try:
            os.rename(folder, old / "catalogue")
            os.rename(staging, folder)
        except BaseException:
            if not folder.exists():
                os.rename(old / "catalogue", folder)
            os.rmdir(old)
            raise
        shutil.rmtree(old, ignore_errors=True)
    sync(folder.parent)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _write_all(catalogue: Catalogue, folder: Path) -> None:
    import polars as pl

    user_ids = pl.DataFrame({"user_id": catalogue.user_ids}, schema={"user_id": pl.String})
    _write_parquet(catalogue.items, folder / "items.parquet")
    _write_parquet(user_ids if catalogue.users is None else catalogue.users, folder / "users.parquet")
    _write_parquet(_events(catalogue), folder / "interactions.parquet")
    _write_images(catalogue, folder / "images")
    if catalogue.features:
        (folder / "features").mkdir()
    for name, feature in catalogue.features.items():
        if not name or Path(name).name != name or name.endswith(".mask"):
            raise CatalogueError(f"features: {name!r} cannot be a file name")
        np.save(folder / "features" / f"{name}.npy", feature.values, allow_pickle=False)
        np.save(folder / "features" / f"{name}.mask.npy", feature.mask, allow_pickle=False)
    meta = json.dumps(_meta(catalogue), ensure_ascii=False, indent=1)
    (folder / "catalogue.json").write_text(meta + "\n", encoding="utf-8")
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def _write_parquet(frame: pl.DataFrame, path: Path) -> None:
    # Through memory, so that a full disk is Python's OSError and not one of polars' own errors.
    buffer = io.BytesIO()
    frame.write_parquet(buffer)
    path.write_bytes(buffer.getbuffer())


def _events(catalogue: Catalogue) -> pl.DataFrame:
    import polars as pl

    rows = catalogue.interactions
    columns: dict[str, Any] = {
        "user_id": pl.Series(catalogue.user_ids, dtype=pl.String).gather(rows.user),
        "item_id": pl.Series(catalogue.item_ids, dtype=pl.String).gather(rows.item),
    }
    for name in ("rating", "timestamp", "split"):
        if getattr(rows, name) is not None:
            columns[name] = getattr(rows, name)
    return pl.DataFrame(columns)


def _meta(catalogue: Catalogue) -> dict[str, Any]:
    return {
        "format": _FORMAT,
        "name": catalogue.name,
        "notes": list(catalogue.notes),
        "items": catalogue.schema.to_dict(),
        "item_order": "file",
        "user_order": "file",
        "users": None if catalogue.users is None or catalogue.user_schema is None else catalogue.user_schema.to_dict(),
    }


def _write_images(catalogue: Catalogue, folder: Path) -> None:
    if any(catalogue.images):
        folder.mkdir()
    for identifier, path in zip(catalogue.item_ids, catalogue.images, strict=True):
        if path is None:
            continue
        try:
            shutil.copyfile(path, folder / f"{quote(identifier, safe='')}{path.suffix.lower()}")
        except FileNotFoundError as error:
            raise CatalogueError(f"{path}: image of item {identifier!r} is gone") from error
