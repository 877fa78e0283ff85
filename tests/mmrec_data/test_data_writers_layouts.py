"""Writers: the rules of single layouts."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from writer_helpers import assert_accounted, table, tea, with_column

from mmrec.adaptation import Catalogue, CatalogueError, Features, Interactions, TableSchema
from mmrec.adaptation.writers import write
from mmrec.evaluation import split

# MMRec


@pytest.mark.parametrize("seed", [0, 3])
def test_mmrec_keeps_a_split_that_was_given(seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    drawn = [rng.integers(0, high, 200) for high in (2, 3, 6)]
    rows = Interactions.from_rows(*drawn[:2], timestamp=drawn[2])
    assert rows.duplicates > 100, "repeats of a pair, some at the same time"
    labels = rng.integers(0, 3, len(rows))
    export = write(tea(interactions=rows), tmp_path, "mmrec", labels=labels)
    again = Catalogue.load(tmp_path)
    assert again.interactions.split is not None and np.array_equal(again.interactions.split, labels)
    labelled = dataclasses.replace(rows, split=labels.astype(np.int8))
    assert split(again, "G").id == split(tea(interactions=labelled), "G").id
    assert export.written["split"] == "shop.inter x_label" and "split" not in export.changed


def test_mmrec_tells_of_a_split_that_is_replaced_or_not_there(tmp_path: Path) -> None:
    assert write(tea(), tmp_path / "a", "mmrec", labels=[0, 2, 0]).changed.get("split") is None, "the same split"
    export = write(tea(), tmp_path / "b", "mmrec", labels=np.array([0, 1, 0]))
    assert export.changed["split"] == "labels instead of the catalogue's split"
    rows = dataclasses.replace(tea().interactions, split=None, rating=None, timestamp=None)
    export = write(tea(interactions=rows), tmp_path / "c", "mmrec")
    assert "MMRec reads no file without x_label" in export.left_out["split"]
    assert (tmp_path / "c" / "shop.inter").read_text() == "userID\titemID\n0\t0\n0\t1\n1\t2\n"


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.array([0, 1]), r"labels needs integers \[3\], got int64 \[2\]"),
        (np.array([0, 1, 3]), r"labels needs 0, 1 or 2, got \[0, 1, 3\]"),
        (np.array([0, 1, -1]), "labels needs 0, 1 or 2"),
        (np.array([0.0, 1, 2]), r"labels needs integers \[3\], got float64 \[3\]"),
        ("012", r"labels needs integers \[3\]"),
    ],
)
def test_mmrec_refuses_other_labels(labels: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(CatalogueError, match=message):
        write(tea(), tmp_path / "out", "mmrec", labels=labels)
    assert not (tmp_path / "out").exists()


def test_mmrec_counts_what_zeros_and_row_numbers_hide(tmp_path: Path) -> None:
    zeros = Features(np.zeros((3, 2), np.float32), np.array([True, False, True]))
    rows = Interactions.from_rows(np.array([0]), np.array([0]))
    export = write(tea(features={"clip": zeros}, interactions=rows), tmp_path / "a", "mmrec")
    assert export.changed["features.clip"] == "2 row(s) that are present and all zero are read as missing"
    assert "last 1 without interactions" in export.left_out["users"] and "items" not in export.left_out
    again = Catalogue.load(tmp_path / "a")
    assert (again.num_items, again.num_users) == (3, 1) and not again.features["clip"].mask.any()
    export = write(tea(features={}, interactions=rows), tmp_path / "b", "mmrec")
    assert "last 2 without interactions" in export.left_out["items"] and Catalogue.load(tmp_path / "b").num_items == 1


def test_mmrec_row_numbers_need_no_mapping_and_odd_ids_are_quoted_in_one(tmp_path: Path) -> None:
    ids = ["0", "1", "2"]
    plain = tea(item_ids=ids, items=pl.DataFrame({"item_id": ids}), schema=TableSchema())
    export = write(plain, tmp_path / "plain", "mmrec")
    assert "i_id_mapping.csv" not in export.files and "items" not in export.changed
    odd = ["a\tb", 'say "x"', "line\nbreak"]
    catalogue = tea(item_ids=odd, items=pl.DataFrame({"item_id": odd}), schema=TableSchema())
    for layout, name, skipped in (("mmrec", "i_id_mapping.csv", 1), ("lcrec", "shop.item2id", 0)):
        write(catalogue, tmp_path / layout, layout)
        with open(tmp_path / layout / name, newline="", encoding="utf-8") as file:
            assert list(csv.reader(file, delimiter="\t"))[skipped:] == [[i, str(n)] for n, i in enumerate(odd)]


@pytest.mark.parametrize("name", ["", "a/b", "..", "nul\0l"])
def test_mmrec_features_that_cannot_be_files_are_left_out(name: str, tmp_path: Path) -> None:
    feature = Features(np.ones((3, 2), np.float32), np.ones(3, bool))
    export = write(tea(features={name: feature, "text": feature}), tmp_path / "out", "mmrec")
    if name == "..":
        assert export.written[f"features.{name}"] == ".._feat.npy"
    else:
        assert "cannot be a file name" in export.left_out[f"features.{name}"]
    assert "text_feat.npy" in export.files and len(list(tmp_path.iterdir())) == 1


# RecBole


@pytest.mark.parametrize(
    ("name", "values", "role", "head", "rule"),
    [
        ("blurb", ["a  b", "c", None], "text", "blurb:token", "text, read as categorical; not read as the title"),
        ("title", ["a\tb", "c", None], "text", "title:token_seq", "1 value"),
        ("brand_name", ["a", "b", None], "categorical", "brand_name:token", "categorical, read as text; read as the"),
        ("tags", [["x y"], ["x", "y"], None], "multi", "tags:token_seq", "1 value(s): blanks inside became _"),
        ("nicknames", [["x"], None, ["y"]], "multi", "nicknames:token_seq", "multi, read as text"),
        ("poster", ["u", "v", None], "image", "poster:token", "image, read as categorical"),
        ("asin", ["u", "v", None], None, "asin:token", "without a role, read as categorical"),
        ("year", [1.5, 1e-7, None], "numeric", "year:float", None),
        ("title_length", [3, 4, None], "numeric", "title_length:float", None),
    ],
)
def test_recbole_roles(name: str, values: list[Any], role: str, head: str, rule: str | None, tmp_path: Path) -> None:
    before = with_column(name, values, role)
    export = write(before, tmp_path, "recbole")
    assert head in (tmp_path / "shop.item").read_text().splitlines()[0].split("\t")
    assert (rule or "") in export.changed.get(f"items.{name}", "") and (rule is None) == (
        f"items.{name}" not in export.changed
    )
    assert_accounted(before, export, Catalogue.load(tmp_path))


def test_recbole_values_of_lists_stay_one_word_each(tmp_path: Path) -> None:
    write(with_column("tags", [["Skin  care", '"x" y'], ['"z'], None], "multi"), tmp_path, "recbole")
    assert Catalogue.load(tmp_path).items["tags"].to_list() == [["Skin_care", '"x"_y'], ["'z"], None]


@pytest.mark.parametrize("name", ["a:b", "tab\tbed", " padded", '"quoted', "line\nbreak"])
def test_recbole_heads_that_cannot_be(name: str, tmp_path: Path) -> None:
    feature = Features(np.ones((3, 2), np.float32), np.ones(3, bool))
    before = with_column(name, ["u", "v", "w"], "categorical", features={name + "f": feature, "title": feature})
    export = write(before, tmp_path, "recbole")
    assert {f"items.{name}", f"features.{name}f"} <= set(export.left_out) and "features.title" in export.written
    assert_accounted(before, export, Catalogue.load(tmp_path))
    clash = write(tea(features={"title": feature}), tmp_path / "clash", "recbole")
    assert "a column has it" in clash.left_out["features.title"]


@pytest.mark.parametrize("bad", ["a\tb", "a\nb", "a\rb", '"a', " ", "\x0b"])
def test_recbole_refuses_ids_that_would_not_come_back(bad: str, tmp_path: Path) -> None:
    ids = ["B1", bad, "B3"]
    with pytest.raises(CatalogueError, match=re.escape(f"items: id {bad!r} does not fit layout recbole")):
        write(
            tea(item_ids=ids, items=pl.DataFrame({"item_id": ids}), schema=TableSchema()), tmp_path / "out", "recbole"
        )
    with pytest.raises(CatalogueError, match="users: id .* does not fit layout recbole"):
        write(tea(user_ids=["ann", bad], users=None, user_schema=None), tmp_path / "out", "recbole")
    assert not (tmp_path / "out").exists()


def test_recbole_tells_when_rows_change_places(tmp_path: Path) -> None:
    ids = ["10", "9", "x y"]
    catalogue = tea(item_ids=ids, items=pl.DataFrame({"item_id": ids}), schema=TableSchema(), features={})
    export = write(catalogue, tmp_path / "a", "recbole")
    assert "items" not in export.changed, "not all are digits: 10 is before 9"
    ids = ["10", "9", "11"]
    catalogue = tea(item_ids=ids, items=pl.DataFrame({"item_id": ids}), schema=TableSchema(), features={})
    export = write(catalogue, tmp_path / "b", "recbole")
    assert export.changed["items"].startswith("read in numeric order")
    again = Catalogue.load(tmp_path / "b")
    assert again.item_ids == ["9", "10", "11"]
    assert [again.item_ids[row] for row in again.interactions.item] == ["9", "10", "11"], "the tie is in their order"


def test_recbole_lists_users_without_columns_where_some_have_no_interactions(tmp_path: Path) -> None:
    plain = tea(users=None, user_schema=None)
    assert "shop.user" not in write(plain, tmp_path / "a", "recbole").files
    more = dataclasses.replace(plain, user_ids=["ann", "bob", "carl"])
    assert write(more, tmp_path / "b", "recbole").files == ("shop.inter", "shop.item", "shop.user")
    assert Catalogue.load(tmp_path / "b").user_ids == more.user_ids


def test_recbole_vectors_without_entries(tmp_path: Path) -> None:
    empty = Features(np.zeros((3, 0), np.float32), np.array([True, False, True]))
    export = write(tea(features={"clip": empty}), tmp_path, "recbole")
    assert export.changed["features.clip"] == "vectors without entries are read as missing"
    assert not Catalogue.load(tmp_path).features["clip"].mask.any()


# P5


def test_p5_attributes_and_outer_ids(tmp_path: Path) -> None:
    ids = ["1", "2", "3"]
    columns = {"attributes": [["tea", "Unknown"], None, ["tea"]], "asin": ["X", None, "Z"], "brand": ["a", "b", None]}
    schema = TableSchema(multi=("attributes",), categorical=("brand",))
    before = tea(item_ids=ids, items=table(columns, schema, ids, "item_id"), schema=schema, features={})
    export = write(before, tmp_path / "a", "p5")
    assert export.changed["items.attributes"] == "1 value(s): 'Unknown' is read as missing"
    assert "items" not in export.changed and "items.brand" in export.left_out
    again = Catalogue.load(tmp_path / "a")
    assert again.items["asin"].to_list() == ["X", None, "Z"]
    assert again.items["attributes"].to_list() == [["tea"], None, ["tea"]]
    maps = json.loads((tmp_path / "a" / "datamaps.json").read_text())
    assert maps["item2id"] == {"X": "1", "Z": "3"} and maps["attributeid2num"] == {"1": 2, "2": 1}
    export = write(before, tmp_path / "b", "p5", attributes=["brand"])
    assert Catalogue.load(tmp_path / "b").items["attributes"].to_list() == [["a"], ["b"], None]
    assert export.changed["items.brand"] == "read as one of the attributes"
    assert "items.attributes" in export.left_out
    named = dataclasses.replace(before, item_ids=["B1", "B2", "B3"], items=before.items.with_columns(
        pl.Series("item_id", ["B1", "B2", "B3"])))  # fmt: skip
    export = write(named, tmp_path / "c", "p5", attributes=[])
    assert "items.asin" in export.left_out and "item2attributes.json" not in export.files
    assert Catalogue.load(tmp_path / "c").items["asin"].to_list() == ["B1", "B2", "B3"]


@pytest.mark.parametrize("bad", [["price"], ["nothing"], "brand"])
def test_p5_refuses_other_columns(bad: Any, tmp_path: Path) -> None:
    with pytest.raises(CatalogueError, match=r"attributes needs names out of \['brand', 'categories'\], got"):
        write(tea(), tmp_path, "p5", attributes=bad)


@pytest.mark.parametrize("layout", ["p5", "lcrec"])
def test_sequences_leave_users_without_interactions_out(layout: str, tmp_path: Path) -> None:
    before = tea(user_ids=["ann", "carl", "bob"], users=None, user_schema=None, interactions=Interactions.from_rows(
        np.array([0, 2, 2, 2]), np.array([1, 2, 0, 2])))  # fmt: skip
    export = write(before, tmp_path / "shop", layout)
    assert export.left_out["users"] == f"1 without interactions: {layout} knows users by their sequences"
    again = Catalogue.load(tmp_path / "shop")
    assert again.user_ids == (["1", "3"] if layout == "p5" else ["0", "2"])
    assert again.interactions.item.tolist() == [1, 2, 0, 2], "repeats stay"


# LC-Rec


def test_lcrec_takes_facts_of_other_columns(tmp_path: Path) -> None:
    schema = TableSchema(title="name", text=("name", "plot"), categorical=("maker",), multi=("tags",))
    ids = ["B1", "B2", "B3"]
    columns = {"name": ["a", None, "c"], "plot": ["p  q", "r<br/>s", None], "maker": ["m", None, "n"],
               "tags": [["x", "y, z"], None, ["w"]]}  # fmt: skip
    before = tea(items=table(columns, schema, ids, "item_id"), schema=schema, features={})
    export = write(before, tmp_path / "a", "lcrec")
    assert {"items.plot", "items.maker", "items.tags"} <= set(export.left_out)
    assert export.changed["items.name"] == "read as the title"
    untitled = dataclasses.replace(tea(), schema=dataclasses.replace(tea().schema, title=None))
    assert write(untitled, tmp_path / "t", "lcrec").changed["items.title"] == "read as the title"
    facts = {"description": "plot", "brand": "tags", "categories": "maker"}
    export = write(before, tmp_path / "b", "lcrec", facts=facts)
    assert export.changed["items.plot"].startswith("read as the description; 2 value(s): HTML, line breaks")
    assert export.changed["items.maker"].startswith("categorical, read as multi; read as the categories")
    again = Catalogue.load(tmp_path / "b").items
    assert again["title"].to_list() == ["a", None, "c"] and again["description"].to_list() == ["p q", "r s", None]
    assert again["brand"].to_list() == ["x, y, z", None, "w"] and again["categories"].to_list() == [["m"], None, ["n"]]
    export = write(before, tmp_path / "c", "lcrec", facts={"categories": "tags"})
    assert Catalogue.load(tmp_path / "c").items["categories"].to_list() == [["x", "y; z"], None, ["w"]]
    assert "1 value(s)" in export.changed["items.tags"]


def test_lcrec_semantic_ids(tmp_path: Path) -> None:
    index = {"B3": ["<a_12>", "<b_3>", "<c_7>"], "B1": ("<a_1>", "<b_0>")}
    export = write(tea(), tmp_path / "a", "lcrec", index=index)
    found = (tmp_path / "a" / "shop.index.json").read_text()
    assert found == '{"0": ["<a_1>", "<b_0>"], "2": ["<a_12>", "<b_3>", "<c_7>"]}'
    once = Catalogue.load(tmp_path / "a")
    assert once.items["semantic_id"].to_list() == ["<a_1><b_0>", None, "<a_12><b_3><c_7>"]
    again = write(once, tmp_path / "b", "lcrec")
    assert again.written["items.semantic_id"] == "shop.index.json"
    assert (tmp_path / "b" / "shop.index.json").read_text() == found and "shop.index.json" in export.files
    export = write(once, tmp_path / "c", "lcrec", index={"0": ["<z>"]})
    assert export.left_out["items.semantic_id"] == "index was given instead"
    odd = once.items.with_columns(pl.Series("semantic_id", ["12-3", None, "<a>"]))
    export = write(dataclasses.replace(once, items=odd), tmp_path / "d", "lcrec")
    assert "not every value is made of <tokens>" in export.left_out["items.semantic_id"]
    assert "shop.index.json" not in export.files


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"index": {"B9": ["<a>"]}}, "index needs ids of items, got 'B9', which shop does not have"),
        ({"index": {"B1": "<a>"}}, r"index\['B1'\] needs a list of non-empty strings, got '<a>'"),
        ({"index": {"B1": []}}, r"index\['B1'\] needs a list of non-empty strings, got \[\]"),
        ({"index": {"B1": [3]}}, r"needs a list of non-empty strings, got \[3\]"),
        ({"index": {"B1": ["<a>", ""]}}, r"needs a list of non-empty strings, got \['<a>', ''\]"),
        ({"facts": {"colour": "brand"}}, "facts needs .* got 'colour': 'brand'"),
        ({"facts": {"brand": "colour"}}, "facts needs .* got 'brand': 'colour'"),
    ],
)
def test_lcrec_refuses(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CatalogueError, match=message):
        write(tea(), tmp_path / "out", "lcrec", **options)
    assert not (tmp_path / "out").exists()
