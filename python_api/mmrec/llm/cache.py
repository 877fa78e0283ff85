"""A content-addressed cache of embeddings on disk: safetensors shards, each named by the hash of its own bytes.

Layout: `folder/<hash of the context>/<SHA-256 of the file>.safetensors`. A context is everything but the text that
decides a vector (`Backbone.cache_context`); a row's key is SHA-256(context, text). A shard holds `keys uint8 [n, 32]`
and either `pooled [n, d]` or `values [sum_len, d]` with `offsets int64 [n + 1]`. Shards are never changed after they
were written, so readers need no lock, and processes that write at the same time only add files.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..files import TEMP_PREFIX, write_atomic
from .encoded import Encoded

_LOG = logging.getLogger(__name__)
_SUFFIX = ".safetensors"


class CacheWriteError(OSError):
    """A shard could not be written (a full disk, no permission); everything stored before is still there."""


class EmbeddingCache:
    """Embeddings on disk, keyed by content.

    Args:
        folder: where the shards live; created on the first write.
        shard_items: items computed, then written, at a time: what an interruption can lose at most.
    """

    def __init__(self, folder: str | Path, *, shard_items: int = 2048) -> None:
        if shard_items < 1:
            raise ValueError(f"shard_items must be ≥ 1, got {shard_items}")
        self.folder = Path(folder)
        self.shard_items = shard_items

    def get_or_compute(
        self,
        texts: Sequence[str],
        fn: Callable[[Sequence[str]], Encoded],
        *,
        context: Mapping[str, str] | None = None,
    ) -> Encoded:
        """The embeddings of `texts` in their order, read where stored, otherwise computed by `fn` and stored.

        Args:
            texts: n strings that identify the items within `context` (for images: their content hashes).
            fn: maps a list of distinct missing texts to their `Encoded`; called once per shard, so an interruption
                keeps the shards already written.
            context: what else decides the result, as strings; `Backbone.cache_context` gives it for a backbone.

        Returns:
            Encoded on the CPU. Bits are those that `fn` gave when the row was stored.

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
            computed = fn([wanted[key] for key in chunk])
            if len(computed) != len(chunk):
                raise ValueError(f"fn returned {len(computed)} embeddings for {len(chunk)} texts")
            computed = _detached(computed)
            if parts and (parts[0].pooled is None, parts[0].dim) != (computed.pooled is None, computed.dim):
                raise ValueError("fn returned another form or width than this context has stored")
            self._write(folder, chunk, computed)
            base = sum(map(len, parts))
            parts.append(computed)
            place.update((key, base + i) for i, key in enumerate(chunk))
        if not parts:
            return _detached(fn([]))
        return Encoded.concat(parts).select(torch.tensor([place[key] for key in keys], dtype=torch.int64))

    def _context_folder(self, context: Mapping[str, str]) -> Path:
        return self.folder / hashlib.sha256(_canonical(context)).hexdigest()[:32]

    def _read(self, folder: Path, wanted: set[bytes]) -> tuple[list[Encoded], dict[bytes, int]]:
        parts: list[Encoded] = []
        place: dict[bytes, int] = {}
        rows = 0
        for path in sorted(folder.glob(f"*{_SUFFIX}")) if folder.is_dir() else []:
            if path.name.startswith(TEMP_PREFIX):
                continue
            if len(place) == len(wanted):
                break
            shard = _load_shard(path)
            if shard is None:
                continue
            keys, encoded = shard
            picked = [i for i, key in enumerate(keys) if key in wanted and key not in place]
            if picked:
                parts.append(encoded.select(torch.tensor(picked)))
                place.update((keys[i], rows + n) for n, i in enumerate(picked))
                rows += len(picked)
        return parts, place

    def _write(self, folder: Path, keys: Sequence[bytes], encoded: Encoded) -> None:
        from safetensors.torch import save

        tensors = {"keys": torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(-1, 32)}
        if encoded.pooled is not None:
            tensors["pooled"] = encoded.pooled.contiguous()
        else:
            assert encoded.values is not None and encoded.offsets is not None
            tensors |= {"values": encoded.values.contiguous(), "offsets": encoded.offsets.contiguous()}
        data = save(tensors)
        path = folder / f"{hashlib.sha256(data).hexdigest()}{_SUFFIX}"
        try:
            write_atomic(path, data)
        except OSError as error:
            raise CacheWriteError(
                error.errno,
                f"cannot store {len(keys)} embeddings ({len(data)} bytes) in the cache: {error.strerror}; "
                "what was stored before is intact",
                str(self.folder),
            ) from error


def _load_shard(path: Path) -> tuple[list[bytes], Encoded] | None:
    """Keys and embeddings of a shard, or None, after one warning line, if its bytes are not those it was named by."""
    from safetensors.torch import load

    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        _LOG.warning("embedding cache: cannot read %s (%s); recomputing its rows", path.name, error.strerror)
        return None
    if hashlib.sha256(data).hexdigest() + _SUFFIX != path.name:
        _set_aside(path)
        return None
    tensors: dict[str, Tensor] = load(data)
    raw = tensors["keys"].numpy().tobytes()
    keys = [raw[i : i + 32] for i in range(0, len(raw), 32)]
    return keys, Encoded(pooled=tensors.get("pooled"), values=tensors.get("values"), offsets=tensors.get("offsets"))


def _set_aside(path: Path) -> None:
    # Renamed rather than deleted: the owner may want to look at it, and it is not reported again.
    _LOG.warning("embedding cache: %s is corrupt or truncated; set aside, recomputing its rows", path.name)
    try:
        os.replace(path, path.with_name(path.name + ".corrupt"))
    except OSError:
        return


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


def _detached(encoded: Encoded) -> Encoded:
    if encoded.pooled is not None:
        return Encoded(pooled=encoded.pooled.detach().cpu())
    assert encoded.values is not None and encoded.offsets is not None
    return Encoded(values=encoded.values.detach().cpu(), offsets=encoded.offsets.cpu())
