"""Texts that a model or a rule wrote, on disk by what they were written from."""

from __future__ import annotations

import json
from collections.abc import Sequence

from ..cache import ContentCache

__all__ = ["TextCache"]


class TextCache(ContentCache[list[str]]):
    """Texts on disk, keyed by content, see `mmrec.cache`; shards are JSON. `get_or_compute` gives a list of strings.

    Args:
        folder: where the shards live; created on the first write.
        shard_items: texts written by their model, then stored, at a time: what an interruption can lose at most.
    """

    what = "texts"
    suffix = ".json"

    def _count(self, values: list[str]) -> int:
        return len(values)

    def _stored_form(self, values: list[str]) -> list[str]:
        wrong = [value for value in values if not isinstance(value, str)]
        if wrong:
            raise TypeError(f"fn must return strings, got {type(wrong[0]).__name__}")
        return list(values)

    def _check_alike(self, stored: list[str], computed: list[str]) -> None:
        return

    def _select(self, values: list[str], rows: list[int]) -> list[str]:
        return [values[row] for row in rows]

    def _concat(self, parts: list[list[str]]) -> list[str]:
        return [text for part in parts for text in part]

    def _dump(self, keys: Sequence[bytes], values: list[str]) -> bytes:
        return json.dumps({"keys": [key.hex() for key in keys], "texts": values}).encode()

    def _parse(self, data: bytes) -> tuple[list[bytes], list[str]]:
        found = json.loads(data)
        return [bytes.fromhex(key) for key in found["keys"]], found["texts"]
