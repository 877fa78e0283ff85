"""`SemanticIds`: items as a few codes each, from coarse to fine, so that alike items begin alike.

Residual k-means over the items' vectors: TIGER's ids (Rajput et al., 2023, arXiv:2305.05065) with k-means for each
level in place of a trained quantiser. Items whose codes are the same get one more code that counts them.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mmrec_kernels import top_k

from ..files import parse_json, write_atomic

__all__ = ["SemanticIds"]

_TOKEN = re.compile(r"<([a-z])_(\d+)>")
_LEVELS = len(string.ascii_lowercase)


@dataclass(frozen=True, eq=False)
class SemanticIds:
    """The codes of N items.

    Attributes:
        codes: int64 `[N, L]`.
        sizes: how many codes each level has.
        centroids: of each fitted level, float32 `[size, d]`; none where the ids were read. One level fewer than `sizes`
            has where the last one tells items apart whose vectors' codes are the same.
    """

    codes: Tensor
    sizes: tuple[int, ...]
    centroids: tuple[Tensor, ...] = ()

    def __post_init__(self) -> None:
        if self.codes.ndim != 2 or self.codes.dtype != torch.int64 or self.codes.shape[1] != len(self.sizes):
            raise ValueError(
                f"codes must be int64 [N, {len(self.sizes)}], got {self.codes.dtype} {list(self.codes.shape)}"
            )
        if not 1 <= len(self.sizes) <= _LEVELS:
            raise ValueError(f"sizes must have 1 to {_LEVELS} levels, got {len(self.sizes)}")
        if len(self.codes) and not bool(((self.codes >= 0) & (self.codes < torch.tensor(self.sizes))).all()):
            raise ValueError(f"codes must be in [0, size) of each level, {self.sizes}, got others")

    @classmethod
    def fit(
        cls, vectors: Tensor, *, levels: int = 3, codes: int = 256, seed: int = 0, iterations: int = 50
    ) -> SemanticIds:
        """Ids of the items with these vectors; the same on every run with the same seed.

        Each level clusters what the levels before it left over (k-means++ starts, at most `iterations` rounds; a
        cluster that loses all its items starts again at the item that is farthest from its own). Where items still
        share all codes, a last level numbers them.

        Args:
            vectors: `[N, d]`, finite; scaled alike (normalise them where their length means nothing).
            levels: of clusters, 1 to 25.
            codes: clusters per level, at most N.
            seed: of the starts.
            iterations: most rounds per level.

        Raises:
            ValueError: an argument out of range, or vectors that are not finite.
        """
        vectors = _checked(vectors)
        if not 1 <= levels < _LEVELS:
            raise ValueError(f"levels must be from 1 to {_LEVELS - 1}, got {levels}")
        if not 1 <= codes <= len(vectors):
            raise ValueError(f"codes must be from 1 to the number of items, {len(vectors)}, got {codes}")
        if iterations < 1:
            raise ValueError(f"iterations must be at least 1, got {iterations}")
        generator = torch.Generator().manual_seed(seed)
        rest, centroids, columns = vectors, [], []
        for _ in range(levels):
            found = _k_means(rest, codes, generator, iterations)
            nearest, _ = _nearest(rest, found)
            rest = rest - found[nearest]
            centroids.append(found)
            columns.append(nearest)
        together = torch.stack(columns, dim=1)
        sizes = (codes,) * levels
        place = _numbered(together)
        if int(place.max()) > 0:
            together = torch.cat([together, place.unsqueeze(1)], dim=1)
            sizes = (*sizes, int(place.max()) + 1)
        return cls(together, sizes, tuple(centroids))

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def levels(self) -> int:
        """L, codes per item."""
        return len(self.sizes)

    def encode(self, vectors: Tensor) -> Tensor:
        """int64 `[n, fitted levels]`: the codes of new vectors `[n, d]`, without one that tells items apart.

        Raises:
            ValueError: ids without centroids, or vectors that are not finite or of another width.
        """
        if not self.centroids:
            raise ValueError("encode: these ids were read, not fitted: they have no centroids")
        rest, columns = _checked(vectors), []
        if rest.shape[1] != self.centroids[0].shape[1]:
            raise ValueError(f"vectors must have width {self.centroids[0].shape[1]}, got {rest.shape[1]}")
        for centroids in self.centroids:
            nearest, _ = _nearest(rest, centroids)
            rest = rest - centroids[nearest]
            columns.append(nearest)
        return torch.stack(columns, dim=1)

    def decode(self, codes: Tensor) -> Tensor:
        """float32 `[n, d]`: the vectors that codes `[n, ≥ fitted levels]` stand for, sums of centroids."""
        if not self.centroids:
            raise ValueError("decode: these ids were read, not fitted: they have no centroids")
        return torch.stack([c[codes[:, level]] for level, c in enumerate(self.centroids)]).sum(0)

    def tokens(self, item: int) -> list[str]:
        """The codes of an item as LC-Rec writes them: `["<a_12>", "<b_3>", …]`."""
        codes = self.codes[item].tolist()
        return [f"<{letter}_{code}>" for letter, code in zip(string.ascii_lowercase, codes, strict=False)]

    def collisions(self) -> dict[str, float]:
        """What sharing of codes there is: `distinct` ids; `rate`, 1 − distinct / items; `largest`, most items with the
        same id; the same three as `fitted_…` without the level that tells items apart; and `used_a`, `used_b`, …, the
        share of each level's codes that some item has."""
        fitted = self.codes[:, : len(self.centroids) or self.levels]
        found: dict[str, float] = {}
        for prefix, codes in (("", self.codes), ("fitted_", fitted)):
            counts = torch.unique(codes, dim=0, return_counts=True)[1]
            found |= {
                f"{prefix}distinct": len(counts), f"{prefix}rate": 1 - len(counts) / max(1, len(codes)),
                f"{prefix}largest": int(counts.max()) if len(counts) else 0,
            }  # fmt: skip
        for letter, size, column in zip(string.ascii_lowercase, self.sizes, self.codes.unbind(1), strict=False):
            found[f"used_{letter}"] = len(column.unique()) / size
        return found

    def to_index(self, item_ids: Sequence[str]) -> dict[str, list[str]]:
        """LC-Rec's mapping (Zheng et al., 2024, arXiv:2311.09049): item id → tokens."""
        if len(item_ids) != len(self):
            raise ValueError(f"item_ids must be {len(self)}, got {len(item_ids)}")
        return {str(item): self.tokens(row) for row, item in enumerate(item_ids)}

    @classmethod
    def from_index(cls, index: Mapping[str, Sequence[str]], item_ids: Sequence[str] | None = None) -> SemanticIds:
        """The ids of such a mapping, for items in the order of `item_ids`, or as they stand there.

        Raises:
            ValueError: an item that is missing, tokens of another form, or not as many for each item.
        """
        names = [str(item) for item in (index if item_ids is None else item_ids)]
        absent = [name for name in names if name not in index]
        if absent:
            raise ValueError(f"index: it has no item {absent[0]!r}")
        rows = []
        for name in names:
            tokens = index[name] if isinstance(index[name], list | tuple) else []
            found = [_TOKEN.fullmatch(token) if isinstance(token, str) else None for token in tokens]
            letters = "".join(match[1] if match else "?" for match in found)
            if not letters or letters != string.ascii_lowercase[: len(letters)]:
                raise ValueError(f"index[{name!r}] must be tokens <a_…>, <b_…> in order, got {index[name]!r:.200}")
            rows.append([int(match[2]) for match in found if match])
        if len({len(row) for row in rows}) != 1:
            raise ValueError(f"index must have as many tokens for each item, got {sorted({len(row) for row in rows})}")
        codes = torch.tensor(rows, dtype=torch.int64)
        return cls(codes, tuple((codes.max(0).values + 1).tolist()))

    def save_index(self, path: str | Path, item_ids: Sequence[str]) -> None:
        """Write `to_index` as JSON, atomically: LC-Rec's `X.index.json`."""
        write_atomic(path, json.dumps(self.to_index(item_ids)).encode())

    @classmethod
    def load_index(cls, path: str | Path, item_ids: Sequence[str] | None = None) -> SemanticIds:
        """`from_index` of a JSON file."""
        try:
            content = parse_json(Path(path).read_text(encoding="utf-8"))
            if not isinstance(content, dict):
                raise ValueError("it must hold one object, item id → tokens")
            return cls.from_index(content, item_ids)
        except ValueError as error:
            raise ValueError(f"path: {Path(path).name}: {error}") from error


def _checked(vectors: Tensor) -> Tensor:
    if vectors.ndim != 2 or not vectors.is_floating_point() or not vectors.shape[1]:
        raise ValueError(f"vectors must be floating [N, d], got {vectors.dtype} {list(vectors.shape)}")
    if not bool(vectors.isfinite().all()):
        raise ValueError("vectors must be finite, got NaN or infinity")
    return vectors.detach().float().cpu().contiguous()


def _nearest(vectors: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """int64 and float32 `[n]`: the nearest centroid of each vector, the first of equally near ones, and its squared
    distance."""
    # argmin ‖x − c‖² = argmax x · c − ‖c‖² / 2
    found = top_k(vectors, centroids, 1, bias=-0.5 * centroids.square().sum(1)).ids.squeeze(1)
    return found, (vectors - centroids[found]).square().sum(1)


def _k_means(vectors: Tensor, count: int, generator: torch.Generator, iterations: int) -> Tensor:
    """float32 `[count, d]`: centroids by Lloyd's algorithm."""
    centroids = _starts(vectors, count, generator)
    nearest, distance = _nearest(vectors, centroids)
    for _ in range(iterations):
        sums = torch.zeros(count, vectors.shape[1], dtype=torch.float64).index_add_(0, nearest, vectors.double())
        sizes = torch.bincount(nearest, minlength=count)
        centroids = torch.where((sizes > 0).unsqueeze(1), (sums / sizes.unsqueeze(1)).float(), centroids)
        dead = (sizes == 0).nonzero().squeeze(1)
        if len(dead):
            far = distance.argsort(descending=True, stable=True)[: len(dead)]
            far = far[distance[far] > 0]  # with fewer distinct vectors than clusters some stay empty
            centroids[dead[: len(far)]] = vectors[far]
        before = nearest
        nearest, distance = _nearest(vectors, centroids)
        if torch.equal(nearest, before):
            break
    return centroids


def _starts(vectors: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """k-means++: each start is a vector drawn by its squared distance to those before it."""
    chosen = [int(torch.randint(len(vectors), (1,), generator=generator))]
    distance = (vectors - vectors[chosen[0]]).square().sum(1)
    for _ in range(count - 1):
        weights = distance.double().cumsum(0)
        if float(weights[-1]) > 0:
            drawn = torch.rand(1, generator=generator, dtype=torch.float64) * weights[-1]
            place = int(torch.searchsorted(weights, drawn, right=True).clamp_max(len(vectors) - 1))
        else:
            place = len(chosen) % len(vectors)
        chosen.append(place)
        distance = torch.minimum(distance, (vectors - vectors[place]).square().sum(1))
    return vectors[chosen].clone()


def _numbered(codes: Tensor) -> Tensor:
    """int64 `[N]`: how many items before each one have the same codes."""
    group = torch.unique(codes, dim=0, return_inverse=True)[1]
    order = group.argsort(stable=True)
    counts = torch.bincount(group)
    begin = counts.cumsum(0) - counts
    place = torch.empty_like(group)
    place[order] = torch.arange(len(group)) - begin[group[order]]
    return place
