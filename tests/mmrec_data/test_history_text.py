"""Summaries of histories, part by part; and triples of a graph as text."""

from __future__ import annotations

import json

import numpy as np
import polars as pl
import pytest

from mmrec.adaptation import (
    Catalogue,
    CatalogueError,
    HistoryState,
    HistorySummary,
    Interactions,
    TableSchema,
    generate_catalogue,
    triple_texts,
)


def films() -> Catalogue:
    items = pl.DataFrame({
        "item_id": ["a", "b", "c", "d"],
        "title": ["Alien", "Heat", None, "Up"],
        "genres": [["Horror", "Drama"], ["Drama"], None, ["Family", "Family"]],
        "country": ["US", "US", "FR", None],
        "length_min": [117.0, 170.0, None, 96.0],
    })  # fmt: skip
    schema = TableSchema(
        title="title", text=("title",), numeric=("length_min",), categorical=("country",), multi=("genres",),
        units={"length_min": "min"},
    )  # fmt: skip
    one = np.zeros(1, np.int64)
    return Catalogue(
        name="films", item_ids=["a", "b", "c", "d"], user_ids=["u"], interactions=Interactions.from_rows(one, one),
        items=items, schema=schema,
    )  # fmt: skip


def test_what_a_summary_says():
    summary = HistorySummary(films(), half_life=None, last=2)
    state = summary.update(None, [0, 1, 2, 3])
    assert summary.text(state) == (
        "4 items so far.\ncountry: US (50%), FR (25%).\ngenres: Drama (50%), Family (25%), Horror (25%).\n"
        "length min: about 127.7 min, 96 to 170.\nlately: Heat; Up."
    )
    assert summary.text(HistoryState()) == "" and summary.text(summary.update(None, [])) == ""
    assert summary.text(summary.update(None, [2])) == "1 item so far.\ncountry: FR (100%)."
    assert HistorySummary(films(), last=0).update(None, [0]).titles == ()


def test_what_was_long_ago_fades():
    summary = HistorySummary(films(), half_life=1)
    state = summary.update(None, [0, 1, 3])  # weights 1/4, 1/2, 1
    assert state.weight == 1.75 and state.values["genres"] == {"Horror": 0.25, "Drama": 0.75, "Family": 1.0}
    assert state.numbers["length_min"] == (1.75, 117 / 4 + 170 / 2 + 96, 96.0, 170.0)
    assert "Family (57%), Drama (43%), Horror (14%)" in summary.text(state)


def test_parts_make_the_same_as_all_at_once(tmp_path):
    catalogue = generate_catalogue(tmp_path / "shop", users=40, items=60)
    summary = HistorySummary(catalogue, half_life=7.0)
    random = np.random.default_rng(0)
    for _ in range(20):
        items = random.integers(catalogue.num_items, size=30).tolist()
        whole, state = summary.update(None, items), None
        for part in np.split(items, np.sort(random.integers(31, size=4))):
            state = summary.update(state, part.tolist())
            state = HistoryState.from_dict(json.loads(json.dumps(state.to_dict(), allow_nan=False)))
        assert state == whole and summary.text(state) == summary.text(whole)
    assert HistorySummary(catalogue).context != summary.context


def test_what_is_forgotten_leaves_the_state():
    summary = HistorySummary(films(), half_life=2)
    state = summary.update(None, [1, *[2] * 60])
    assert "US" not in state.values["country"] and not state.numbers and "genres" not in summary.text(state)
    json.dumps(state.to_dict(), allow_nan=False)
    assert state == summary.update(summary.update(None, [1, *[2] * 30]), [2] * 30)


def test_what_a_summary_refuses():
    with pytest.raises(CatalogueError, match="items: there is no row 4, the catalogue has 4 items"):
        HistorySummary(films()).update(None, [0, 4])
    with pytest.raises(ValueError, match="half_life must be above 0 or None, got 0"):
        HistorySummary(films(), half_life=0)
    with pytest.raises(ValueError, match="most must be at least 1 and last at least 0, got 0 and 3"):
        HistorySummary(films(), most=0)


TRIPLES = [
    ("alien", "directed_by", "scott"), ("alien", "genre", "horror"), ("heat", "genre", "crime"),
    ("alien", "genre", "sci_fi"), ("alien", "genre", "horror"), ("aliens", "follows", "alien"), ("x", "genre", "y"),
]  # fmt: skip


def test_triples():
    texts, mask = triple_texts(["alien", None, "heat", "nothing", "aliens"], TRIPLES, labels={"scott": "Ridley Scott"})
    assert texts == [
        "genre: horror, sci fi\ndirected by: Ridley Scott\nfollows of: aliens", "", "genre: crime", "",
        "follows: alien",
    ]  # fmt: skip
    assert mask.tolist() == [True, False, True, False, True]
    few, _ = triple_texts(["alien"], TRIPLES, relations=("follows", "genre"), max_values=1, separator="; ")
    assert few == ["follows of: aliens; genre: horror"]
    assert triple_texts([], TRIPLES)[0] == []
    with pytest.raises(ValueError, match="max_values must be at least 1, got 0"):
        triple_texts(["alien"], TRIPLES, max_values=0)
