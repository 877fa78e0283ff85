"""What is slow to compute, on disk by the content that it was computed from.

Layout: `folder/<hash of the context>/<SHA-256 of the file><suffix>`. A context is everything but the text that decides
a value (the model, its template, their versions); a row's key is SHA-256(context, text). Shards are never changed after
they were written, so readers need no lock, and processes that write at the same time only add files.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from .files import TEMP_PREFIX, write_atomic

__all__ = ["CacheWriteError", "ContentCache"]

_LOG = logging.getLogger(__name__)
Values = TypeVar("Values")


class CacheWriteError(OSError):
    """A shard could not be written (a full disk, no permission); everything stored before is still there."""


class ContentCache(ABC, Generic[Values]):
    """Rows on disk, keyed by content.

    Args:
        folder: where the shards live; created on the first write.
        shard_items: items computed, then written, at a time: what an interruption can lose at most.
    """

    what: str
    suffix: str

    def __init__(self, folder: str | Path, *, shard_items: int = 2048) -> None:
        if shard_items < 1:
            raise ValueError(f"shard_items must be ≥ 1, got {shard_items}")
        self.folder = Path(folder)
        self.shard_items = shard_items

    def get_or_compute(
        self,
        texts: Sequence[str],
        fn: Callable[[Sequence[str]], Values],
        *,
        context: Mapping[str, str] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Values:
        """The values of `texts` in their order, read where stored, otherwise computed by `fn` and stored.

        Args:
            texts: n strings that identify the items within `context` (for images: their content hashes).
            fn: maps a list of distinct missing texts to their values; called once per shard, so an interruption
                keeps the shards already written.
            context: what else decides the result, as strings; `Backbone.cache_context` gives it for a backbone.
            progress: gets how many of the missing texts are computed, and of how many, after each shard.

        Returns:
            Values that are the bits which `fn` gave when the row was stored.

        Raises:
            CacheWriteError: a shard could not be written; shards written before stay usable.
            ValueError: `fn` returned another number of items than it was given, or another form than is stored.
        """
        if isinstance(texts, str):
            raise TypeError("texts must be a sequence of str, got one str; write [text]")
        context = dict(context or {})
        folder = self._context_folder(context)
        keys = [_key(context, text) for text in texts]
        wanted = dict(zip(keys, texts, strict=True))
        parts, place = self._read(folder, set(wanted))
        missing = [key for key in wanted if key not in place]
        for start in range(0, len(missing), self.shard_items):
            chunk = missing[start : start + self.shard_items]
            given = fn([wanted[key] for key in chunk])
            if self._count(given) != len(chunk):
                raise ValueError(f"fn returned {self._count(given)} {self.what} for {len(chunk)} texts")
            computed = self._stored_form(given)
            if parts:
                self._check_alike(parts[0], computed)
            self._write(folder, chunk, computed)
            base = sum(map(self._count, parts))
            parts.append(computed)
            place.update((key, base + i) for i, key in enumerate(chunk))
            if progress is not None:
                progress(start + len(chunk), len(missing))
        if not parts:
            return self._stored_form(fn([]))
        return self._select(self._concat(parts), [place[key] for key in keys])

    @abstractmethod
    def _count(self, values: Values) -> int:
        """How many rows there are."""

    @abstractmethod
    def _stored_form(self, values: Values) -> Values:
        """As a shard holds it."""

    @abstractmethod
    def _check_alike(self, stored: Values, computed: Values) -> None:
        """ValueError where they cannot be one."""

    @abstractmethod
    def _select(self, values: Values, rows: list[int]) -> Values: ...

    @abstractmethod
    def _concat(self, parts: list[Values]) -> Values: ...

    @abstractmethod
    def _dump(self, keys: Sequence[bytes], values: Values) -> bytes: ...

    @abstractmethod
    def _parse(self, data: bytes) -> tuple[list[bytes], Values]:
        """The inverse of `_dump`, of whole bytes."""

    def _context_folder(self, context: Mapping[str, str]) -> Path:
        return self.folder / hashlib.sha256(_canonical(context)).hexdigest()[:32]

    def _read(self, folder: Path, wanted: set[bytes]) -> tuple[list[Values], dict[bytes, int]]:
        parts: list[Values] = []
        place: dict[bytes, int] = {}
        rows = 0
        for path in sorted(folder.glob(f"*{self.suffix}")) if folder.is_dir() else []:
            if path.name.startswith(TEMP_PREFIX):
                continue
            if len(place) == len(wanted):
                break
            shard = self._load(path)
            if shard is None:
                continue
            keys, values = shard
            picked = [i for i, key in enumerate(keys) if key in wanted and key not in place]
            if picked:
                parts.append(self._select(values, picked))
                place.update((keys[i], rows + n) for n, i in enumerate(picked))
                rows += len(picked)
        return parts, place

    def _load(self, path: Path) -> tuple[list[bytes], Values] | None:
        """A shard, or None, after one warning line, if its bytes are not those it was named by."""
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            _LOG.warning("cache of %s: cannot read %s (%s); recomputing its rows", self.what, path.name, error.strerror)
            return None
        if hashlib.sha256(data).hexdigest() + self.suffix != path.name:
            self._set_aside(path)
            return None
        return self._parse(data)

    def _set_aside(self, path: Path) -> None:
        # Renamed rather than deleted: the owner may want to look at it, and it is not reported again.
        _LOG.warning(
            "cache of %s: %s is corrupt or truncated; set aside, recomputing its rows", self.what, path.name
        )  # fmt: skip
        try:
            os.replace(path, path.with_name(path.name + ".corrupt"))
        except OSError:
            return

    def _write(self, folder: Path, keys: Sequence[bytes], values: Values) -> None:
        data = self._dump(keys, values)
        path = folder / f"{hashlib.sha256(data).hexdigest()}{self.suffix}"
        try:
            write_atomic(path, data)
        except OSError as error:
            raise CacheWriteError(
                error.errno,
                f"cannot store {len(keys)} {self.what} ({len(data)} bytes) in the cache: {error.strerror}; "
                "what was stored before is intact",
                str(self.folder),
            ) from error


def _key(context: Mapping[str, str], text: str) -> bytes:
    if not isinstance(text, str):
        raise TypeError(f"texts must hold str, got {type(text).__name__}")
    # The context's fixed-size hash in front keeps "context + text" free of ambiguity.
    return hashlib.sha256(hashlib.sha256(_canonical(context)).digest() + text.encode("utf-8", "surrogatepass")).digest()


def _canonical(context: Mapping[str, str]) -> bytes:
    for name, value in context.items():
        if not isinstance(value, str):
            raise TypeError(f"context[{name!r}] must be a str, got {type(value).__name__}")
    return json.dumps(dict(context), sort_keys=True).encode()
