from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrec.adaptation import CatalogueError, Interactions

rows = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 3)), max_size=40)


def make(triples: list[tuple[int, int, int]], timed: bool = True) -> Interactions:
    table = np.array(triples, dtype=np.int64).reshape(-1, 3)
    return Interactions.from_rows(table[:, 0], table[:, 1], timestamp=table[:, 2] if timed else None)


@settings(max_examples=60, deadline=None)
@given(rows)
def test_timed_rows_are_ordered_by_user_time_item(triples: list[tuple[int, int, int]]) -> None:
    made = make(triples)
    assert made.timestamp is not None
    got = list(zip(made.user.tolist(), made.timestamp.tolist(), made.item.tolist(), strict=True))
    assert got == sorted((user, time, item) for user, item, time in triples)
    assert made.duplicates == len(triples) - len({(user, item) for user, item, _ in triples})


@settings(max_examples=60, deadline=None)
@given(rows)
def test_untimed_rows_keep_the_given_order_inside_a_user(triples: list[tuple[int, int, int]]) -> None:
    made = make(triples, timed=False)
    expected = sorted(((user, item) for user, item, _ in triples), key=lambda pair: pair[0])
    assert list(zip(made.user.tolist(), made.item.tolist(), strict=True)) == expected


def test_types_and_extra_arrays_travel_with_their_rows() -> None:
    made = Interactions.from_rows(
        np.array([1, 0]),
        np.array([5, 6]),
        rating=np.array([2.5, 4.0]),
        timestamp=np.array([9, 8]),
        split=np.array([2, 0]),
    )
    assert (made.user.dtype, made.item.dtype) == (np.int32, np.int32)
    assert made.rating is not None and made.rating.dtype == np.float32 and made.rating.tolist() == [4.0, 2.5]
    assert made.timestamp is not None and made.timestamp.dtype == np.int64 and made.timestamp.tolist() == [8, 9]
    assert made.split is not None and made.split.dtype == np.int8 and made.split.tolist() == [0, 2]


def test_equality_looks_at_contents() -> None:
    a, b = make([(0, 1, 2), (1, 1, 1)]), make([(1, 1, 1), (0, 1, 2)])
    assert a == b
    assert a != make([(0, 1, 2), (1, 1, 3)])
    assert a != make([(0, 1, 2), (1, 1, 1)], timed=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"user": np.array([1, 0], np.int32), "item": np.array([0, 0], np.int32)}, "not sorted"),
        ({"user": np.array([0, 0], np.int64), "item": np.array([0, 0], np.int32)}, "user needs int32"),
        (
            {"user": np.array([0, 0], np.int32), "item": np.array([0], np.int32)},
            r"item needs int32 \[2\], got int32 \[1\]",
        ),
        (
            {"user": np.array([0], np.int32), "item": np.array([0], np.int32), "split": np.array([3], np.int8)},
            "split needs 0, 1 or 2",
        ),
        (
            {
                "user": np.array([0, 0], np.int32),
                "item": np.array([1, 0], np.int32),
                "timestamp": np.array([5, 5], np.int64),
            },
            "not sorted",
        ),
    ],
)
def test_the_constructor_refuses(arguments: dict, message: str) -> None:
    with pytest.raises(CatalogueError, match=message):
        Interactions(**arguments)
