"""A content-addressed cache of embeddings on disk, see `mmrec.cache`: safetensors shards.

A shard holds `keys uint8 [n, 32]` and either `pooled [n, d]` or `values [sum_len, d]` with `offsets int64 [n + 1]`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..cache import CacheWriteError, ContentCache
from .encoded import Encoded

__all__ = ["CacheWriteError", "EmbeddingCache"]


class EmbeddingCache(ContentCache[Encoded]):
    """Embeddings on disk, keyed by content; `get_or_compute` gives an `Encoded` on the CPU.

    Args:
        folder: where the shards live; created on the first write.
        shard_items: items computed, then written, at a time: what an interruption can lose at most.
    """

    what = "embeddings"
    suffix = ".safetensors"

    def _count(self, values: Encoded) -> int:
        return len(values)

    def _stored_form(self, values: Encoded) -> Encoded:
        if values.pooled is not None:
            return Encoded(pooled=values.pooled.detach().cpu())
        assert values.values is not None and values.offsets is not None
        return Encoded(values=values.values.detach().cpu(), offsets=values.offsets.cpu())

    def _check_alike(self, stored: Encoded, computed: Encoded) -> None:
        if (stored.pooled is None, stored.dim) != (computed.pooled is None, computed.dim):
            raise ValueError("fn returned another form or width than this context has stored")

    def _select(self, values: Encoded, rows: list[int]) -> Encoded:
        return values.select(torch.tensor(rows, dtype=torch.int64))

    def _concat(self, parts: list[Encoded]) -> Encoded:
        return Encoded.concat(parts)

    def _dump(self, keys: Sequence[bytes], values: Encoded) -> bytes:
        from safetensors.torch import save

        tensors = {"keys": torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).view(-1, 32)}
        if values.pooled is not None:
            tensors["pooled"] = values.pooled.contiguous()
        else:
            assert values.values is not None and values.offsets is not None
            tensors |= {"values": values.values.contiguous(), "offsets": values.offsets.contiguous()}
        return save(tensors)

    def _parse(self, data: bytes) -> tuple[list[bytes], Encoded]:
        from safetensors.torch import load

        tensors: dict[str, Tensor] = load(data)
        raw = tensors["keys"].numpy().tobytes()
        keys = [raw[i : i + 32] for i in range(0, len(raw), 32)]
        return keys, Encoded(pooled=tensors.get("pooled"), values=tensors.get("values"), offsets=tensors.get("offsets"))
