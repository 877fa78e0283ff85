"""Ragged against plain Python lists."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrec.evaluation.ragged import Ragged

lists = st.lists(st.lists(st.integers(0, 50), max_size=6), max_size=8)


@given(lists)
def test_lists_come_back_as_they_went_in(rows):
    ragged = Ragged.from_lists(rows)
    assert ragged.to_lists() == rows
    assert len(ragged) == len(rows)
    assert ragged.lengths.tolist() == [len(row) for row in rows]
    assert ragged.row_of.tolist() == [i for i, row in enumerate(rows) for _ in row]
    assert (ragged.offsets.dtype, ragged.ids.dtype) == (np.int64, np.int32)


@given(lists, st.data())
def test_rows_selects_with_repeats_in_the_given_order(rows, data):
    if not rows:
        return
    index = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=12))
    assert Ragged.from_lists(rows).rows(np.array(index, int)).to_lists() == [rows[i] for i in index]


@given(lists)
def test_rows_takes_slices_and_booleans(rows):
    ragged = Ragged.from_lists(rows)
    assert ragged.rows(slice(1, 3)).to_lists() == rows[1:3]
    odd = np.arange(len(rows)) % 2 == 1
    assert ragged.rows(odd).to_lists() == rows[1::2]


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 9), max_size=4), st.lists(st.integers(0, 9), max_size=4)), max_size=6)
)
def test_concat_joins_row_by_row(pairs):
    left, right = Ragged.from_lists([a for a, _ in pairs]), Ragged.from_lists([b for _, b in pairs])
    assert left.concat(right).to_lists() == [a + b for a, b in pairs]


@given(lists)
def test_unique_sorts_and_removes_repeats_inside_a_row_only(rows):
    assert Ragged.from_lists(rows).unique().to_lists() == [sorted(set(row)) for row in rows]


@given(lists, st.integers(0, 50))
def test_keep_filters_entries_and_keeps_rows(rows, limit):
    ragged = Ragged.from_lists(rows)
    assert ragged.keep(ragged.ids < limit).to_lists() == [[x for x in row if x < limit] for row in rows]


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 30)), max_size=20))
def test_pairs_are_grouped_in_their_order(pairs):
    row, ids = np.array([p[0] for p in pairs], int), np.array([p[1] for p in pairs], int)
    expected = [[i for r, i in pairs if r == wanted] for wanted in range(5)]
    assert Ragged.from_pairs(row, ids, 5).to_lists() == expected


def test_equality_is_by_content():
    assert Ragged.from_lists([[1], []]) == Ragged.from_lists([[1], []])
    assert Ragged.from_lists([[1], []]) != Ragged.from_lists([[], [1]])
    assert Ragged.from_lists([[1, 2]]) != Ragged.from_lists([[2, 1]])


def test_indexing_counts_from_the_end_and_stops_there():
    ragged = Ragged.from_lists([[1, 2], [3]])
    assert ragged[-1].tolist() == [3]
    with pytest.raises(IndexError):
        ragged[2]
    with pytest.raises(IndexError):
        ragged[-3]


@pytest.mark.parametrize(
    ("offsets", "ids", "error", "message"),
    [
        ([], [], ValueError, "offsets is empty"),
        ([1, 2], [5, 6], ValueError, "run from 0"),
        ([0, 1], [5, 6], ValueError, "len\\(ids\\) = 2"),
        ([0, 2, 1, 2], [5, 6], ValueError, "row 1 runs from 2 to 1"),
        ([0, 1], [0.5], TypeError, "ids must hold integers"),
        ([0, 1], [2**31], ValueError, "int32"),
        ([[0, 1]], [1], ValueError, "one-dimensional"),
    ],
)
def test_a_broken_layout_is_named(offsets, ids, error, message):
    with pytest.raises(error, match=message):
        Ragged(np.array(offsets), np.array(ids))


def test_pairs_and_rows_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"\[0, 2\)"):
        Ragged.from_pairs(np.array([2]), np.array([0]), 2)
    with pytest.raises(ValueError, match="one length"):
        Ragged.from_pairs(np.array([0]), np.array([0, 1]), 2)
    with pytest.raises(ValueError, match="number of rows"):
        Ragged.empty(2).concat(Ragged.empty(3))
    with pytest.raises(ValueError, match="entries must be bool"):
        Ragged.from_lists([[1]]).keep(np.array([1]))
