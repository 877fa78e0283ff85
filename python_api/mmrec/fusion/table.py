"""A native table encoder: one token per cell, missing cells have none.

Numeric cells follow FT-Transformer's feature tokenizer (Gorishniy et al., 2021, arXiv:2106.11959): value · w_c + b_c.
Categorical cells are embeddings; cells with several values are the mean of theirs (a bag).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .tokens import Tokens, gather_ragged

__all__ = ["TableEncoder", "TableInputs"]


class TableInputs(NamedTuple):
    """A table of N rows.

    numeric: float `[N, n]`, standardised; numeric_mask: bool `[N, n]`, True = present.
    categorical: int64 `[N, c]`, −1 = missing.
    bags: per column with several values `(offsets int64 [N + 1], ids int64 [offsets[N]])`; an empty bag is missing.
    """

    numeric: Tensor
    numeric_mask: Tensor
    categorical: Tensor
    bags: tuple[tuple[Tensor, Tensor], ...] = ()

    @property
    def num_rows(self) -> int:
        """N."""
        return self.numeric.shape[0]

    @property
    def num_columns(self) -> int:
        """Numeric, categorical and bag columns together."""
        return self.numeric.shape[1] + self.categorical.shape[1] + len(self.bags)

    def select(self, rows: Tensor) -> TableInputs:
        """The rows `rows` (int64 `[m]`, any order, repeats allowed)."""
        bags = []
        for offsets, ids in self.bags:
            source, selected = gather_ragged(offsets, rows)
            bags.append((selected, ids.index_select(0, source)))
        return TableInputs(self.numeric[rows], self.numeric_mask[rows], self.categorical[rows], tuple(bags))

    def to(self, device: torch.device | str) -> TableInputs:
        """The same table on `device`."""
        bags = tuple((offsets.to(device), ids.to(device)) for offsets, ids in self.bags)
        return TableInputs(self.numeric.to(device), self.numeric_mask.to(device), self.categorical.to(device), bags)

    def present(self) -> Tensor:
        """bool `[N, C]`: which cells hold a value; columns in the order numeric, categorical, bags."""
        bags = [(offsets.diff() > 0).unsqueeze(1) for offsets, _ in self.bags]
        return torch.cat([self.numeric_mask, self.categorical >= 0, *bags], dim=1)


class TableEncoder(nn.Module):
    """Cells to tokens `[T, width]`.

    Args:
        num_numeric: numeric columns n.
        cardinalities: values per categorical column, at least 1 each.
        bag_cardinalities: values per column with several values, at least 1 each.
        width: d of the tokens.
        pooled: one token per row, the sum of its cells over √(number of cells), instead of one per cell. Much cheaper
            where the table is wide.
    """

    starts: Tensor

    def __init__(
        self,
        num_numeric: int,
        cardinalities: Sequence[int],
        bag_cardinalities: Sequence[int],
        width: int,
        *,
        pooled: bool = False,
    ) -> None:
        super().__init__()
        if num_numeric < 0 or min((1, *cardinalities, *bag_cardinalities)) < 1:
            raise ValueError(
                "num_numeric must be ≥ 0 and all cardinalities ≥ 1, "
                f"got {num_numeric}, {list(cardinalities)} and {list(bag_cardinalities)}"
            )
        self.sizes = (num_numeric, len(cardinalities), len(bag_cardinalities))
        self.cardinalities = (*cardinalities, *bag_cardinalities)
        self.width = width
        self.pooled = pooled
        bound = width**-0.5
        self.numeric_weight = nn.Parameter(torch.empty(num_numeric, width).uniform_(-bound, bound))
        starts = torch.tensor([0, *self.cardinalities], dtype=torch.int64).cumsum(0)
        self.register_buffer("starts", starts[:-1], persistent=False)
        self.embedding = nn.Parameter(torch.empty(int(starts[-1]), width).uniform_(-bound, bound))
        self.column = nn.Parameter(torch.empty(sum(self.sizes), width).uniform_(-bound, bound))

    def forward(self, table: TableInputs) -> Tokens:
        """Tokens of every row, in the order of the columns; `kind` is the column (0 for pooled rows)."""
        self._check(table)
        present = table.present()
        cells = torch.cat([self._numeric(table), self._categorical(table), *self._bags(table)], dim=1) + self.column
        if self.pooled:
            count = present.sum(1)
            total = torch.where(present.unsqueeze(2), cells, 0).sum(1) / count.clamp(min=1).sqrt().unsqueeze(1)
            filled = count > 0
            offsets = F.pad(filled.long().cumsum(0), (1, 0))
            return Tokens(total[filled], offsets, offsets.new_zeros(int(offsets[-1])))
        offsets = F.pad(present.sum(1).cumsum(0), (1, 0))
        return Tokens(cells[present], offsets, present.nonzero()[:, 1])

    def _numeric(self, table: TableInputs) -> Tensor:
        # The mask goes in before the product: a missing cell may hold NaN.
        value = torch.where(table.numeric_mask, table.numeric, 0).to(self.numeric_weight.dtype)
        return value.unsqueeze(2) * self.numeric_weight

    def _categorical(self, table: TableInputs) -> Tensor:
        index = table.categorical.clamp(min=0) + self.starts[: self.sizes[1]]
        if not self.sizes[1]:
            return self.embedding.new_zeros(table.num_rows, 0, self.width)
        return F.embedding(index, self.embedding)

    def _bags(self, table: TableInputs) -> list[Tensor]:
        means = []
        for start, (offsets, ids) in zip(self.starts[self.sizes[1] :], table.bags, strict=True):
            mean = F.embedding_bag(ids + start, self.embedding, offsets, mode="mean", include_last_offset=True)
            means.append(mean.unsqueeze(1))
        return means

    def _check(self, table: TableInputs) -> None:
        got = (table.numeric.shape[1], table.categorical.shape[1], len(table.bags))
        if got != self.sizes:
            raise ValueError(f"table must have (numeric, categorical, bag) columns {self.sizes}, got {got}")
        values = [*table.categorical.unbind(1), *(ids for _, ids in table.bags)]
        for column, (ids, cardinality) in enumerate(zip(values, self.cardinalities, strict=True)):
            # A bag has no −1: a missing one is empty, and a negative id would read another column's rows.
            lowest = -1 if column < self.sizes[1] else 0
            wrong = ids[(ids < lowest) | (ids >= cardinality)]
            if len(wrong):
                name = f"table column {self.sizes[0] + column}"
                raise ValueError(f"{name} holds value {int(wrong[0])}, outside [{lowest}, {cardinality})")
