"""A version of a store as its readers see it: unchanging, mapped from the disk."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mmrec_kernels import top_k
from mmrec_kernels.retrieval import TopK

from ...fusion.tokens import Tokens
from .ann import AnnIndex
from .columns import UTF8, Columns, Meta, Ragged
from .patch import Patch

__all__ = ["Index", "StoreVersion", "hash_ids"]

Lists = tuple[Tensor, Tensor]
_SEARCHED = 1 << 14  # items at a time


class Index(NamedTuple):
    """Where an id is: `hash int64 [n]`, sorted, and the `row int64 [n]` of each."""

    hash: Tensor
    row: Tensor


def hash_ids(ids: Sequence[bytes]) -> np.ndarray:
    """int64 `[n]`, of ids in UTF-8 (BLAKE2b)."""
    return np.frombuffer(b"".join([hashlib.blake2b(i, digest_size=8).digest() for i in ids]), "<i8")


class StoreVersion:
    """The items of one version. Rows are fixed: an item keeps its own in all later versions of the same base.

    Vectors of the base lie in the file that is mapped. Items that have changed since are written over them in this
    process's private pages of the mapping; those that came since lie in memory, behind. One that was removed keeps its
    row until there is a new base; nothing finds it there.

    Attributes:
        number: of the version.
        meta: width, dtype, modalities, model.
        num_rows: rows, those of removed items too; `len` counts the others.
        files: names of the files that it is made of, the base first.
        index: of approximate retrieval, once there is one.
    """

    def __init__(
        self, number: int, meta: Meta, num_rows: int, files: Sequence[str], base: Columns, index: Index,
        patches: Sequence[Patch],
    ) -> None:  # fmt: skip
        self.number, self.meta, self.num_rows, self.files = number, meta, num_rows, tuple(files)
        self.index: AnnIndex | None = None
        self._base = base
        self._hash, self._row = index.hash.numpy(), index.row.numpy()
        names = base.ragged["id"]
        self._id_ends, self._id_bytes = names.offsets.numpy(), names.values.numpy().data
        self._patch_rows = self._removed = torch.empty(0, dtype=torch.int64)
        self._patch: Columns | None = None
        if patches:
            patch = Patch.latest(patches)
            self._patch_rows, self._patch = patch.rows, patch.columns
            self._removed = patch.rows[patch.removed]
        self._tail: dict[str, Tensor] = {}
        self._tail_row: dict[bytes, int] = {}
        if self._patch is None:
            return
        behind = int(torch.searchsorted(self._patch_rows, len(base)))
        for name, column in base.fixed.items():
            column[self._patch_rows[:behind]] = self._patch.fixed[name][:behind]
            self._tail[name] = self._patch.fixed[name][behind:]
        new = self._patch_rows[behind:]
        ids = self._patch.ragged["id"].select(torch.arange(behind, len(self._patch))).strings()
        self._tail_row = {name.encode(*UTF8): row for name, row in zip(ids, new.tolist(), strict=True)}

    def __len__(self) -> int:
        return self.num_rows - len(self._removed)

    def alive(self, rows: np.ndarray) -> np.ndarray:
        """bool `[n]` of `rows [n]`: the item was not removed."""
        removed = self._removed.numpy()  # ascending
        if not len(removed):
            return np.ones(len(rows), bool)
        return removed[np.searchsorted(removed, rows).clip(max=len(removed) - 1)] != rows

    def alive_rows(self) -> np.ndarray:
        """int64 `[len]`: all rows but those of removed items."""
        rows = np.arange(self.num_rows)
        return rows[self.alive(rows)]

    def rows(self, ids: Sequence[str]) -> np.ndarray:
        """int64 `[n]`: the row of each id, −1 for one that is not there."""
        found = self.places(ids)
        found[~self.alive(found)] = -1
        return found

    def places(self, ids: Sequence[str]) -> np.ndarray:
        """The same, and of an id that was removed the row that it had."""
        found = np.full(len(ids), -1, np.int64)
        if not len(ids):
            return found
        names = [name.encode(*UTF8) for name in ids]
        hashes = hash_ids(names)
        place = np.searchsorted(self._hash, hashes)
        # Mostly the first of that hash is it. Ids that are not there, and those of equal hashes, take a closer look.
        row = self._row[np.minimum(place, len(self._row) - 1)] if len(self._row) else found
        ends = zip(self._id_ends[row].tolist(), self._id_ends[row + 1].tolist(), strict=True)
        there = [self._id_bytes[begin:end] == name for (begin, end), name in zip(ends, names, strict=True)]
        found[there] = row[there]
        for n in np.flatnonzero(~np.array(there)):
            found[n] = self._find(names[n], int(place[n]), int(hashes[n]))
        return found

    def _find(self, name: bytes, place: int, hashed: int) -> int:
        while place < len(self._hash) and self._hash[place] == hashed:
            row = self._row[place]
            if self._id_bytes[self._id_ends[row] : self._id_ends[row + 1]] == name:
                return int(row)
            place += 1
        return self._tail_row.get(name, -1)

    def ids(self, rows: np.ndarray | Tensor) -> list[str]:
        """Of `rows [n]`."""
        return self._ragged("id", rows).strings()

    def titles(self, rows: np.ndarray | Tensor) -> list[str]:
        """Of `rows [n]`."""
        return self._ragged("title", rows).strings()

    def find(self, text: str, limit: int) -> np.ndarray:
        """int64 `[≤ limit]`: rows whose id is `text`, or whose title or id holds it (ASCII letters in any case).

        It reads all titles and ids, so long as it has found too few; other threads get their turn meanwhile.
        """
        found = dict.fromkeys(row for row in self.rows([text]).tolist() if row >= 0)
        pattern = re.compile(re.escape(text.encode(*UTF8)), re.IGNORECASE)
        for column in ("title", "id"):
            for row in self._holding(pattern, column):
                if len(found) >= limit:
                    break
                found[row] = None
        return np.array(list(found)[:limit], np.int64)

    def _holding(self, pattern: re.Pattern[bytes], column: str) -> Iterator[int]:
        parts = [(self._base, None)] if self._patch is None else [(self._base, None), (self._patch, self._patch_rows)]
        for columns, rows in parts:
            data, ends = columns.ragged[column].values.numpy().data, columns.ragged[column].offsets.numpy()
            for begin in range(0, len(columns), _SEARCHED):
                time.sleep(0)  # a search keeps the interpreter to itself
                place = begin
                end = min(begin + _SEARCHED, len(columns))
                while place < end and (match := pattern.search(data, ends[place], ends[end])) is not None:
                    # The last one that begins there: those before it are empty.
                    place = min(int(np.searchsorted(ends, match.start(), "right")) - 1, end - 1)
                    if match.end() <= ends[place + 1]:  # else it reaches into the next one
                        row = place if rows is None else int(rows[place])
                        newest = self._is_in(self._patch_rows, row) == (rows is not None)
                        if newest and not self._is_in(self._removed, row):
                            yield row
                    place += 1

    @staticmethod
    def _is_in(rows: Tensor, row: int) -> bool:
        """Of `rows`, ascending."""
        place = int(torch.searchsorted(rows, row))
        return place < len(rows) and int(rows[place]) == row

    def vectors(self, rows: np.ndarray | Tensor) -> Tensor:
        """float32 `[n, d]` of `rows [n]`."""
        rows = self._checked(rows)
        found = self._fixed("vectors", rows).float()
        return found * self._fixed("scales", rows).unsqueeze(1) if self.meta.dtype == "int8" else found

    def mass(self, rows: np.ndarray | Tensor) -> Tensor:
        """float32 `[n, M]` of `rows [n]`."""
        return self._fixed("mass", self._checked(rows)).float()

    def known(self, rows: np.ndarray | Tensor) -> Tensor:
        """bool `[n]` of `rows [n]`: training interacted with the item."""
        return self._fixed("known", self._checked(rows))

    def content(self, rows: np.ndarray | Tensor) -> Tensor:
        """uint8 `[n, 16]` of `rows [n]`: the hash of what the vector was made of."""
        return self._fixed("content", self._checked(rows))

    def tokens(self, modality: str, rows: np.ndarray | Tensor) -> Tokens:
        """The token rows of a modality, of `rows [n]`, float32."""
        if modality not in self.meta.tokens:
            raise ValueError(f"modality must be one with token rows, {sorted(self.meta.tokens)}, got {modality!r}")
        values, offsets = self._ragged(f"tokens.{modality}", rows)
        return Tokens(values.float(), offsets, self._ragged(f"kinds.{modality}", rows).values)

    @property
    def base_items(self) -> int:
        """How many rows the base has."""
        return len(self._base)

    @property
    def base_alive(self) -> int:
        """How many of them are not those of removed items."""
        return len(self._base) - int(torch.searchsorted(self._removed, len(self._base)))

    def top_k(
        self, query: Tensor, k: int, *, exclude: Lists | None = None, candidates: Lists | None = None,
        exact: bool = False, index: AnnIndex | None = None,
    ) -> TopK:  # fmt: skip
        """The best items of `query [B, d]`, float32; see `mmrec_kernels.top_k`.

        A bfloat16 store is met by the query rounded to bfloat16; int8 and float32 by the query as it is. Where the
        version has an `index` (or one is given), those are the best of the candidates that it finds, scored exactly;
        `exact` reads all items nevertheless.
        """
        index = self.index if index is None else index
        if index is not None and candidates is None and not exact:
            seen = int(exclude[0].diff().max()) if exclude is not None and len(query) else 0
            candidates = index.candidates(query, min(k + seen, max(self.base_items, 1)), self._patch_rows)
        query = query.bfloat16() if self.meta.dtype == "bfloat16" else query.float()

        def search(columns: dict[str, Tensor], shift: int) -> TopK:
            def moved(lists: Lists | None) -> Lists | None:
                return lists if lists is None or not shift else (lists[0], lists[1] - shift)

            return top_k(
                query, columns["vectors"], k, item_scales=columns.get("scales"), exclude=moved(exclude),
                candidates=moved(candidates),
            )  # fmt: skip

        found = search(self._base.fixed, 0)
        if not self._tail or not len(self._tail["vectors"]):
            return found
        base = len(self._base)
        behind = search(self._tail, base)
        scores, order = torch.cat([found.scores, behind.scores], 1).sort(dim=1, descending=True, stable=True)
        ids = torch.cat([found.ids, torch.where(behind.ids >= 0, behind.ids + base, -1)], 1)
        return TopK(scores[:, :k], ids.gather(1, order[:, :k]))

    def columns(self, rows: Tensor) -> Columns:
        """Everything of `rows [n]`, as it is stored."""
        return Columns(
            {name: self._fixed(name, rows) for name in self._base.fixed},
            {name: self._ragged(name, rows) for name in self._base.ragged},
        )

    def _checked(self, rows: np.ndarray | Tensor) -> Tensor:
        found = torch.as_tensor(rows, dtype=torch.int64)
        if len(found) and (int(found.min()) < 0 or int(found.max()) >= self.num_rows):
            outside = found[(found < 0) | (found >= self.num_rows)]
            raise ValueError(f"rows must be in [0, {self.num_rows}), got {int(outside[0])}")
        return found

    def _fixed(self, name: str, rows: Tensor) -> Tensor:
        column, base = self._base.fixed[name], len(self._base)
        if not self._tail or not bool((rows >= base).any()):
            return column.index_select(0, rows)
        found = self._tail[name].index_select(0, (rows - base).clamp(min=0))
        here = rows < base
        found[here] = column.index_select(0, rows[here])
        return found

    def _ragged(self, name: str, rows: np.ndarray | Tensor) -> Ragged:
        rows = self._checked(rows)
        if self._patch is None:
            return self._base.ragged[name].select(rows)
        place = torch.searchsorted(self._patch_rows, rows).clamp(max=len(self._patch_rows) - 1)
        patched = self._patch_rows[place] == rows
        parts = [self._base.ragged[name].select(rows[~patched]), self._patch.ragged[name].select(place[patched])]
        lengths = torch.cat([part.offsets.diff() for part in parts])
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        order = torch.empty_like(rows)
        order[~patched] = torch.arange(len(parts[0].offsets) - 1)
        order[patched] = torch.arange(int(patched.sum())) + len(parts[0].offsets) - 1
        return Ragged(torch.cat([part.values for part in parts]), offsets).select(order)
