"""Approximate retrieval for catalogues that are too large to be read for each request: FAISS finds candidates, `top_k`
scores those exactly.

"ivf": vectors in 4 · √N clusters, of which `effort` are read (Jégou et al., 2011, doi:10.1109/TPAMI.2010.57); "hnsw":
a graph, searched with a list of `effort` (Malkov and Yashunin, 2018, arXiv:1603.09320). Both hold the vectors once
more, as bytes ("ivf", 8-bit scalar quantiser) or float32 ("hnsw"), in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from .snapshot import StoreVersion

__all__ = ["KINDS", "AnnIndex"]

KINDS = ("ivf", "hnsw")
_PART = 1 << 17
_TRAINED = 256  # vectors per cluster, that k-means sees
_LINKS, _BUILD_EFFORT = 32, 80
_QUERIES, _DEPTH = 256, 100


class AnnIndex:
    """Candidates of a store's base. What has changed since that was written is always a candidate.

    Attributes:
        kind: "ivf" or "hnsw".
        base: name of the file whose items it knows.
        effort: clusters that are read, or length of the search list.
        recall: share of the exact best items that are found, as measured when it was built.
        depth: of how many best items.
    """

    def __init__(self, kind: str, base: str, index: Any, effort: int) -> None:
        self.kind, self.base, self.effort = kind, base, effort
        self.recall, self.depth = float("nan"), 0
        self._index = index
        self._others: tuple[Tensor, Any] | None = None

    @classmethod
    def build(
        cls, version: StoreVersion, kind: str, *, target: float = 0.95, queries: Tensor | None = None, seed: int = 0
    ) -> AnnIndex:
        """An index of `version`, with the least effort, by doubling, at which recall is at least `target`.

        Args:
            version: whose base is indexed.
            kind: one of `KINDS`.
            target: recall of the 100 best items that is aimed at; the effort ends at all clusters, or all items.
            queries: `[n, d]` by which recall is measured; None: vectors of 256 random items.
            seed: of k-means and of the choice of queries.

        Raises:
            ValueError: another kind, a target outside (0, 1], or a store without items.
            ImportError: FAISS is not installed.
        """
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
        if not 0 < target <= 1:
            raise ValueError(f"target must be above 0 and at most 1, got {target}")
        count = version.base_items
        if not version.base_alive:
            raise ValueError("version must have items in its base, got none")
        random = np.random.default_rng(seed)
        built, most = (_ivf if kind == "ivf" else _hnsw)(version, count, random, seed)
        found = cls(kind, version.files[0], built, 1)
        if queries is None:
            rows = version.alive_rows()
            queries = version.vectors(np.sort(random.choice(rows, min(_QUERIES, len(rows)), replace=False)))
        depth = min(_DEPTH, len(version))
        exact = version.top_k(queries, depth, exact=True).ids
        found.depth = depth
        while True:
            found._set_effort(found.effort)
            found.recall = _recall(exact, version.top_k(queries, depth, index=found).ids)
            if found.recall >= target or found.effort >= most:
                return found
            found.effort = min(2 * found.effort, most)

    def candidates(self, query: Tensor, k: int, always: Tensor) -> tuple[Tensor, Tensor]:
        """Offsets int64 `[B + 1]` and rows, none twice: at most k of the base for each of `query [B, d]`, and
        `always`."""
        found = np.empty((len(query), 0), np.int64)
        if len(query):
            _, found = self._index.search(query.float().numpy(), k, params=self._without(always))
        kept = found >= 0
        lengths = kept.sum(1) + len(always)
        offsets = np.concatenate([[0], lengths.cumsum()])
        rows = np.empty(offsets[-1], np.int64)
        fixed = always.numpy()
        for n, (begin, end) in enumerate(zip(offsets[:-1], offsets[1:], strict=True)):
            own = found[n, kept[n]]
            rows[begin : begin + len(own)] = own
            rows[begin + len(own) : end] = fixed
        return torch.from_numpy(offsets), torch.from_numpy(rows)

    def _without(self, rows: Tensor) -> Any:
        """How to search for others than `rows`: they must not take the place of what can be found."""
        if not len(rows):
            return None
        faiss, known = _faiss(), self._others
        if known is None or known[0] is not rows:  # made once for a version
            known = self._others = rows, faiss.IDSelectorNot(faiss.IDSelectorBatch(rows.numpy()))
        if self.kind == "ivf":
            return faiss.SearchParametersIVF(sel=known[1], nprobe=self.effort)
        return faiss.SearchParametersHNSW(sel=known[1], efSearch=self.effort)

    def _set_effort(self, effort: int) -> None:
        if self.kind == "ivf":
            self._index.nprobe = effort
        else:
            self._index.hnsw.efSearch = effort


def _faiss() -> Any:
    try:
        import faiss
    except ModuleNotFoundError as error:
        raise ImportError("approximate retrieval needs FAISS: pip install faiss-cpu") from error
    return faiss


def _ivf(version: StoreVersion, count: int, random: np.random.Generator, seed: int) -> tuple[Any, int]:
    faiss, width = _faiss(), version.meta.width
    rows = version.alive_rows()
    rows = rows[rows < count]
    clusters = max(1, min(4 * int(math.sqrt(len(rows))), len(rows) // 39))  # k-means wants 39 vectors per cluster
    index = faiss.IndexIVFScalarQuantizer(
        faiss.IndexFlatIP(width), width, clusters, faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
    )
    index.cp.seed = seed + 1
    seen = np.sort(random.choice(rows, min(len(rows), _TRAINED * clusters), replace=False))
    index.train(version.vectors(seen).numpy())
    _add(index.add, version, count)
    return index, clusters


def _hnsw(version: StoreVersion, count: int, random: np.random.Generator, seed: int) -> tuple[Any, int]:
    faiss = _faiss()
    index = faiss.IndexHNSWFlat(version.meta.width, _LINKS, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = _BUILD_EFFORT
    _add(index.add, version, count)
    return index, count


def _add(add: Callable[[np.ndarray], None], version: StoreVersion, count: int) -> None:
    for start in range(0, count, _PART):
        # Of removed items, which are candidates nevertheless and found by nobody, any vectors do that are numbers.
        add(version.vectors(np.arange(start, min(start + _PART, count))).nan_to_num().numpy())


def _recall(exact: Tensor, found: Tensor) -> float:
    wanted = exact >= 0
    hit = (exact.unsqueeze(2) == found.unsqueeze(1)).any(2) & wanted
    return float(hit.sum()) / max(1, int(wanted.sum()))
