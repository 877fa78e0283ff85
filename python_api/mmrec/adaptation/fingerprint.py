"""A catalogue's identity: one SHA-256 over everything that can change a result."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .errors import CatalogueError

if TYPE_CHECKING:
    import polars as pl

    from .catalogue import Catalogue

_VERSION = "mmrec-catalogue-1"


class _Digest:
    """SHA-256 over labelled, length-prefixed parts, so that no two different sequences of parts collide by joining."""

    def __init__(self) -> None:
        self._sha = hashlib.sha256()

    def add(self, label: str, data: bytes) -> None:
        for part in (label.encode(), data):
            self._sha.update(len(part).to_bytes(8, "little"))
            self._sha.update(part)

    def array(self, label: str, value: np.ndarray | None) -> None:
        if value is None:
            self.add(label, b"none")
            return
        plain = np.ascontiguousarray(value, dtype=value.dtype.newbyteorder("<"))
        self.add(f"{label} {plain.dtype.str} {list(plain.shape)}", plain.tobytes())

    def text(self, label: str, value: object) -> None:
        self.add(label, json.dumps(value, ensure_ascii=False, sort_keys=True).encode("utf-8", "surrogatepass"))

    def table(self, label: str, frame: pl.DataFrame | None) -> None:
        if frame is None:
            self.add(label, b"none")
            return
        for column in frame.columns:
            self.text(f"{label} {column} {frame.schema[column]}", frame[column].to_list())

    def hexdigest(self) -> str:
        return self._sha.hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes; :class:`CatalogueError` naming the file where it cannot be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise CatalogueError(f"{path}: {error.strerror}") from error
    return digest.hexdigest()


def item_fingerprints(catalogue: Catalogue) -> np.ndarray:
    """uint8 `[I, 16]`: for each item a hash of its row of the table, its image's bytes and its features, which beside
    the model are what its vector is made of."""
    columns = [(f"{name} {kind}", catalogue.items[name].to_list()) for name, kind in catalogue.items.schema.items()]
    features = sorted(catalogue.features.items())
    found = np.empty((catalogue.num_items, 16), np.uint8)
    for row, image in enumerate(catalogue.images):
        digest = _Digest()
        for label, values in columns:
            digest.text(label, values[row])
        digest.text("image", None if image is None else file_sha256(image))
        for name, feature in features:
            digest.array(f"feature {name}", feature.values[row] if feature.mask[row] else None)
        found[row] = np.frombuffer(bytes.fromhex(digest.hexdigest())[:16], np.uint8)
    return found


def catalogue_fingerprint(catalogue: Catalogue) -> str:
    """SHA-256 over counts, ids, interactions, tables with their schemas, image bytes and features; not name, notes or
    paths.
    """
    digest = _Digest()
    rows = catalogue.interactions
    digest.text("version", [_VERSION, len(catalogue.user_ids), len(catalogue.item_ids), len(rows)])
    digest.text("items", catalogue.item_ids)
    digest.text("users", catalogue.user_ids)
    for name in ("user", "item", "rating", "timestamp", "split"):
        digest.array(name, getattr(rows, name))
    digest.text("schema", catalogue.schema.to_dict())
    digest.table("item", catalogue.items)
    digest.text("user schema", None if catalogue.user_schema is None else catalogue.user_schema.to_dict())
    digest.table("user", catalogue.users)
    digest.text("images", [None if path is None else file_sha256(path) for path in catalogue.images])
    for name in sorted(catalogue.features):
        feature = catalogue.features[name]
        digest.array(f"feature {name}", feature.values)
        digest.array(f"mask {name}", feature.mask)
    return digest.hexdigest()
