from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mmrec.fusion import TableEncoder, TableInputs

WIDTH = 4
NUMERIC = torch.tensor([[1.5, -2.0], [torch.nan, 0.5], [torch.nan, torch.nan], [0.0, 3.0]])
MASK = torch.tensor([[True, True], [False, True], [False, False], [True, False]])
CATEGORICAL = torch.tensor([[2, 0], [-1, 1], [-1, -1], [0, -1]])
BAGS = (
    (torch.tensor([0, 2, 3, 3, 3]), torch.tensor([1, 3, 3])),
    (torch.tensor([0, 0, 2, 2, 5]), torch.tensor([0, 0, 1, 0, 1])),
)
TABLE = TableInputs(NUMERIC, MASK, CATEGORICAL, BAGS)


def encoder(pooled: bool = False) -> TableEncoder:
    return TableEncoder(2, [3, 2], [4, 2], WIDTH, pooled=pooled)


def by_hand(model: TableEncoder) -> list[dict[int, Tensor]]:
    """Per row the token of every cell that holds a value, from the formulas of the docstring, cell by cell."""
    rows: list[dict[int, Tensor]] = [{} for _ in range(4)]
    embedding = dict(zip((2, 3, 4, 5), model.embedding.split([3, 2, 4, 2]), strict=True))
    for row, cells in enumerate(rows):
        for column in range(2):
            if MASK[row, column]:
                cells[column] = NUMERIC[row, column] * model.numeric_weight[column]
            if CATEGORICAL[row, column] >= 0:
                cells[2 + column] = embedding[2 + column][CATEGORICAL[row, column]]
            offsets, ids = BAGS[column]
            bag = ids[offsets[row] : offsets[row + 1]]
            if len(bag):
                cells[4 + column] = embedding[4 + column][bag].mean(0)
        for column in cells:
            cells[column] = cells[column] + model.column[column]
    return rows


def test_one_token_per_cell_that_holds_a_value() -> None:
    model = encoder()
    tokens = model(TABLE)
    expected = by_hand(model)
    assert tokens.offsets.diff().tolist() == [len(cells) for cells in expected] == [5, 4, 0, 3]
    assert tokens.kind.tolist() == [column for cells in expected for column in sorted(cells)]
    torch.testing.assert_close(
        tokens.values, torch.stack([cells[column] for cells in expected for column in sorted(cells)])
    )


def test_pooled_is_the_sum_of_the_cells_over_the_root_of_their_number() -> None:
    model = encoder(pooled=True)
    tokens = model(TABLE)
    expected = [torch.stack(list(cells.values())).sum(0) / math.sqrt(len(cells)) for cells in by_hand(model) if cells]
    assert tokens.offsets.tolist() == [0, 1, 2, 2, 3] and tokens.kind.tolist() == [0, 0, 0]
    torch.testing.assert_close(tokens.values, torch.stack(expected))


@pytest.mark.parametrize("pooled", [False, True])
def test_what_a_missing_cell_holds_changes_no_bit_and_no_gradient(pooled: bool) -> None:
    model = encoder(pooled)
    clean = TABLE._replace(numeric=torch.where(MASK, NUMERIC, 0))
    gradients = []
    for table in (TABLE, clean, TABLE._replace(numeric=torch.where(MASK, NUMERIC, torch.inf))):
        model.zero_grad()
        values = model(table).values
        values.square().sum().backward()
        gradients.append([values, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert len(gradients[0]) == 4 and all(g.isfinite().all() for g in gradients[0])
    for other in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], other, strict=True))


@pytest.mark.parametrize("pooled", [False, True])
def test_selecting_rows_and_encoding_commute(pooled: bool) -> None:
    model, rows = encoder(pooled), torch.tensor([3, 2, 0, 0, 1])
    selected, whole = model(TABLE.select(rows)), model(TABLE).select(rows)
    for got, expected in zip(selected, whole, strict=True):
        torch.testing.assert_close(got, expected)


def test_present_is_per_cell_in_column_order() -> None:
    assert TABLE.num_rows == 4 and TABLE.num_columns == 6
    assert TABLE.present().int().tolist() == [
        [1, 1, 1, 1, 1, 0], [0, 1, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0], [1, 0, 1, 0, 0, 1],
    ]  # fmt: skip


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("sizes", [(2, [], []), (0, [3, 2], []), (0, [], [4, 2]), (0, [3, 2], [4, 2])])
def test_a_table_may_lack_a_type_of_column(sizes: tuple[int, list[int], list[int]], pooled: bool) -> None:
    numeric, categorical, bags = sizes
    table = TableInputs(NUMERIC[:, :numeric], MASK[:, :numeric], CATEGORICAL[:, : len(categorical)], BAGS[: len(bags)])
    tokens = TableEncoder(numeric, categorical, bags, WIDTH, pooled=pooled)(table)
    lengths = table.present().sum(1)
    assert tokens.offsets.diff().tolist() == (lengths.clamp(max=1) if pooled else lengths).tolist()


@pytest.mark.parametrize("pooled", [False, True])
def test_empty_table_and_a_table_of_missing_cells(pooled: bool) -> None:
    model = encoder(pooled)
    for rows in ([], [2, 2]):
        tokens = model(TABLE.select(torch.tensor(rows, dtype=torch.int64)))
        assert tokens.values.shape == (0, WIDTH) and tokens.num_items == len(rows)


def test_gradcheck() -> None:
    for pooled in (False, True):
        model = encoder(pooled).double()
        names, values = zip(*model.named_parameters(), strict=True)

        def run(*parameters: Tensor, model: TableEncoder = model, names: tuple[str, ...] = names) -> Tensor:
            return torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), (TABLE,)).values

        assert torch.autograd.gradcheck(run, tuple(v.detach().requires_grad_() for v in values))


def test_bad_tables() -> None:
    model = encoder()
    with pytest.raises(ValueError, match=r"columns \(2, 2, 2\), got \(1, 2, 2\)"):
        model(TABLE._replace(numeric=NUMERIC[:, :1], numeric_mask=MASK[:, :1]))
    wrong = CATEGORICAL.clone()
    wrong[0, 0] = 3
    with pytest.raises(ValueError, match=r"column 2 holds value 3, outside \[-1, 3\)"):
        model(TABLE._replace(categorical=wrong))
    for bad in (2, -1):
        with pytest.raises(ValueError, match=rf"column 5 holds value {bad}, outside \[0, 2\)"):
            model(TABLE._replace(bags=(BAGS[0], (BAGS[1][0], torch.tensor([0, 0, 1, 0, bad])))))
    with pytest.raises(ValueError, match="cardinalities ≥ 1"):
        TableEncoder(1, [3, 0], [], WIDTH)
