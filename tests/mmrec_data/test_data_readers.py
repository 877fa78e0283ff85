from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mmrec.adaptation import Catalogue, CatalogueError
from mmrec.adaptation.readers.mmrec import follows_rule


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".gz"):
            path.write_bytes(gzip.compress(text.encode()))
        else:
            path.write_bytes(text.encode("latin-1" if path.name == "u.item" else "utf-8"))
    return folder


def lines(*rows: dict) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


FLAGS = "|".join("0" * 19)
COMEDY = "|".join("1" if n == 5 else "0" for n in range(19))
MOVIELENS = {
    "ml-100k/u.data": "2\t10\t5\t100\n2\t9\t4\t100\n1\t10\t3\t50\n",
    "ml-100k/u.item": (
        f"9|Café, The (1994)|01-Jan-1994||http://x|{COMEDY}\n10|unknown||||{FLAGS}\n11|Later (1990)|||u|{FLAGS}\n"
    ),
    "ml-100k/u.user": "1|24|M|writer|85711\n2|53|F|other|94043\n",
    "links.csv": "movie_id,imdb_id,tmdb_id\n9,tt1,77\n11,tt2,78\n",
    "data/items.csv": (
        "movie_id,title,overview,runtime,vote_average,vote_count\n"
        "9,Cafe,,0.0,0.0,0.0\n9,Cafe,Two waiters.,95.0,6.5,12.0\n11,Later,Long ago.,100,5,1\n"
    ),
    "data/item_features.csv": (
        "movie_id,budget,revenue,tagline,production_companies,release_date,popularity\n"
        "9,0,1000,Coffee!,\"[{'name': 'Alder Films', 'id': 3}]\",1995-01-01,1.5\n"
        "11,5,5,Remade,[],2012-01-01,9\n"
    ),
    "omdb_metadata.jsonl": lines(
        {"movie_id": 9, "Plot": "Waiters &amp; guests", "Director": "A B, C D (story)", "Metascore": "N/A",
         "imdbVotes": "1,234", "Rated": "Not Rated", "Runtime": "97 min", "Language": "French, French"},
        {"movie_id": 10, "Plot": "N/A", "Runtime": "61 min"},
    ),
}  # fmt: skip


def test_movielens(tmp_path: Path, write_image: Callable[..., Path]) -> None:
    write(tmp_path, MOVIELENS)
    write_image(tmp_path / "data" / "posters" / "9.jpg")
    catalogue = Catalogue.load(tmp_path)
    assert catalogue.item_ids == ["9", "10", "11"] and catalogue.user_ids == ["1", "2"]
    assert catalogue.interactions.item.tolist() == [1, 0, 1], "user 2's tie at time 100 is in item order"
    assert catalogue.interactions.rating is not None and catalogue.interactions.rating.tolist() == [3, 4, 5]
    cafe, unknown, later = catalogue.items.to_dicts()
    assert (cafe["title"], cafe["year"], cafe["genres"]) == ("Café, The (1994)", 1994.0, ["Comedy"])
    assert (cafe["overview"], cafe["runtime"], cafe["vote_average"]) == ("Two waiters.", 95.0, 6.5)
    assert (cafe["revenue"], cafe["tagline"]) == (1000.0, "Coffee!")
    assert (cafe["production_companies"], cafe["plot"]) == (["Alder Films"], "Waiters & guests")
    assert (cafe["director"], cafe["imdb_votes"]) == (["A B", "C D"], 1234.0)
    assert cafe["language"] == ["French"]
    assert unknown["title"] is None and unknown["genres"] is None and unknown["runtime"] == 61.0
    assert later["overview"] is None and later["revenue"] is None, "facts of a 2012 film are not those of a 1990 one"
    unknown_columns = {"budget", "metascore", "rated"} & set(catalogue.items.columns)
    assert not unknown_columns, "0 and N/A are the sources' ways of not knowing; nothing is left of these columns"
    assert catalogue.item_titles == ["Café, The (1994)", "10", "Later (1990)"]
    assert catalogue.users is not None and catalogue.users["occupation"].to_list() == ["writer", "other"]
    assert [path is not None for path in catalogue.images] == [True, False, False]
    assert any("1 movie(s) are of a film of another year" in note for note in catalogue.notes)
    assert "items.csv: 3 rows for 2 movies, resolved by movie_id" in catalogue.notes


def test_movielens_without_the_extras(tmp_path: Path) -> None:
    bare = {Path(name).name: text for name, text in MOVIELENS.items() if name.startswith("ml-100k/u.")}
    catalogue = Catalogue.load(write(tmp_path, bare))
    assert catalogue.schema.text == ("title",) and catalogue.schema.numeric == ("year",)
    assert catalogue.notes == ()


def test_movielens_joins_nested_facts_by_link(tmp_path: Path) -> None:
    nested = [{"id": 77, "tagline": "Coffee?", "belongs_to_collection": {"name": "Cafes"}, "production_companies": []}]
    files = {name: text for name, text in MOVIELENS.items() if "item_features" not in name}
    catalogue = Catalogue.load(write(tmp_path, {**files, "data/features.json": json.dumps(nested)}))
    assert catalogue.items["collection"].to_list() == ["Cafes", None, None]
    assert catalogue.items["tagline"].to_list() == ["Coffee?", None, None]


LCREC = {
    "Toy.inter.json": '{"0": [2, 0], "1": [0, 2, 10]}',
    "Toy.item.json": json.dumps({
        "0": {"title": "Relay", "description": "", "brand": "3M", "categories": "Industrial, Parts"},
        "10": {"title": "Tape", "description": "Sticky<br/>stuff", "brand": "", "categories": ""},
        "2": {"title": "Screw", "description": "A screw", "brand": "3M", "categories": "Industrial"},
    }),
}  # fmt: skip


def test_lcrec(tmp_path: Path) -> None:
    catalogue = Catalogue.load(write(tmp_path, LCREC))
    assert catalogue.name == "Toy" and catalogue.item_ids == ["0", "2", "10"]
    assert catalogue.interactions.user.tolist() == [0, 0, 1, 1, 1]
    assert catalogue.interactions.item.tolist() == [1, 0, 0, 1, 2], "the file's order stays"
    assert catalogue.interactions.timestamp is None
    assert catalogue.items["categories"].to_list() == [["Industrial", "Parts"], ["Industrial"], None]
    assert catalogue.items["brand"].to_list() == ["3M", "3M", None]
    assert catalogue.items["description"].to_list() == [None, "A screw", "Sticky stuff"]
    assert "semantic_id" not in catalogue.items.columns


def test_lcrec_keeps_semantic_ids(tmp_path: Path) -> None:
    catalogue = Catalogue.load(write(tmp_path, {**LCREC, "Toy.index.json": '{"2": ["<a_1>", "<b_7>"]}'}))
    assert catalogue.items["semantic_id"].to_list() == [None, "<a_1><b_7>", None]


P5 = {
    "Toy.txt": "2 3 1\n1 10 3\n",
    "items.jsonl": lines(
        {"item_id": 1, "asin": "B1", "attributes": ["OPI", "Makeup"]},
        {"item_id": 3, "asin": "B3", "attributes": ["Unknown", "Skin Care"]},
        {"item_id": 10, "asin": "B0", "attributes": ["Unknown"]},
    ),
}


def test_p5(tmp_path: Path) -> None:
    catalogue = Catalogue.load(write(tmp_path, P5))
    assert catalogue.name == "Toy" and catalogue.item_ids == ["1", "3", "10"] and catalogue.user_ids == ["1", "2"]
    assert catalogue.interactions.user.tolist() == [0, 0, 1, 1]
    assert catalogue.interactions.item.tolist() == [2, 1, 1, 0]
    assert catalogue.items["attributes"].to_list() == [["OPI", "Makeup"], ["Skin Care"], None]
    assert "attribute 'Unknown' of 2 item(s) is read as missing" in catalogue.notes


def test_p5_decodes_attributes(tmp_path: Path) -> None:
    maps = {"id2item": {"1": "B1", "2": "B2"}, "id2attribute": {"7": "Makeup"}}
    files = {
        "sequential_data.txt": "1 1 2\n",
        "datamaps.json": json.dumps(maps),
        "Toy_item2attributes.json": '{"1": [7]}',
    }
    catalogue = Catalogue.load(write(tmp_path, files))
    assert catalogue.items["attributes"].to_list() == [["Makeup"], None]
    assert catalogue.items["asin"].to_list() == ["B1", "B2"]
    write(tmp_path, {"Toy_item2attributes.json": '{"1": [8]}'})
    with pytest.raises(CatalogueError, match="attribute 8 is not in datamaps.json"):
        Catalogue.load(tmp_path)


def parts(counts: dict[str, list[int]]) -> dict[str, str]:
    """trn/val/tst files with the given number of rows per user; items are numbered through per user."""
    files = {name: "" for name in counts}
    for user in range(len(next(iter(counts.values())))):
        item = 0
        for name, sizes in counts.items():
            for _ in range(sizes[user]):
                files[name] += f"{user}\t{item}\n"
                item += 1
    return files


@pytest.mark.parametrize(
    ("val", "tst", "labels", "note"),
    [
        ([1, 1], [1, 2], [0, 1, 2], "neither time nor order"),
        ([1, 2], [1, 1], [0, 2, 1], "val.tsv is read as test and tst.tsv as valid"),
        ([2, 2], [2, 2], [0, 1, 2], "hold for 0 of 2 users; files are read as named"),
    ],
)
def test_mmrec_parts_follow_the_rule(
    val: list[int], tst: list[int], labels: list[int], note: str, tmp_path: Path
) -> None:
    catalogue = Catalogue.load(write(tmp_path, parts({"trn.tsv": [3, 14], "val.tsv": val, "tst.tsv": tst})))
    split = catalogue.interactions.split
    assert split is not None
    sizes = dict(zip(labels, (17, sum(val), sum(tst)), strict=True))
    assert np.bincount(split).tolist() == [sizes[0], sizes[1], sizes[2]]
    assert any(note in line for line in catalogue.notes)


def test_mmrec_rule_by_hand() -> None:
    totals = np.array([5, 9, 10, 15, 19, 20, 27])
    valid, test = np.array([1, 1, 1, 1, 1, 2, 2]), np.array([1, 1, 1, 2, 2, 2, 3])
    assert follows_rule(np.stack([totals - valid - test, valid, test])) == 7
    assert follows_rule(np.stack([totals - valid - test, test, valid])) == 4


def test_mmrec_inter(tmp_path: Path) -> None:
    write(
        tmp_path,
        {"baby.inter": "userID\titemID\trating\ttimestamp\tx_label\n1\t2\t5.0\t30\t0\n1\t0\t4\t20\t2\n0\t1\t3\t9\t1\n"},
    )
    np.save(tmp_path / "image_feat.npy", np.array([[1, 2], [0, 0], [3, 4], [5, 6]], dtype=np.float64))
    catalogue = Catalogue.load(tmp_path)
    assert catalogue.name == "baby" and catalogue.item_ids == ["0", "1", "2", "3"], (
        "an item without interactions counts"
    )
    rows = catalogue.interactions
    assert rows.item.tolist() == [1, 0, 2] and rows.split is not None and rows.split.tolist() == [1, 2, 0]
    feature = catalogue.features["image"]
    assert feature.values.dtype == np.float32 and feature.mask.tolist() == [True, False, True, True]
    assert catalogue.notes == ("image_feat.npy: 1 row(s) that are all zero or not finite are read as missing",)


RECBOLE = {
    "ml.inter": "user_id:token\titem_id:token\trating:float\ttimestamp:float\nu2\t10\t4\t9.7\nu1\t9\t\t3\n",
    "ml.item": (
        "item_id:token\tmovie_title:token_seq\tgenre:token_seq\tyear:float\tlang:token\tvec:float_seq\n"
        "10\tGreen tea\tA B\t1999\ten\t1.5 2\n9\t\t\t\tfr\t\n"
    ),
    "ml.user": "user_id:token\tage:float\nu1\t30\nu2\t\n",
}


def test_recbole(tmp_path: Path) -> None:
    catalogue = Catalogue.load(write(tmp_path, RECBOLE))
    assert catalogue.item_ids == ["9", "10"] and catalogue.user_ids == ["u1", "u2"]
    assert catalogue.item_titles == ["9", "Green tea"]
    schema = catalogue.schema
    assert (schema.numeric, schema.categorical, schema.multi) == (("year",), ("lang",), ("genre",))
    assert catalogue.items["genre"].to_list() == [None, ["A", "B"]]
    assert catalogue.features["vec"].values.tolist() == [[0, 0], [1.5, 2]]
    assert catalogue.features["vec"].mask.tolist() == [False, True]
    rows = catalogue.interactions
    assert rows.timestamp is not None and rows.timestamp.tolist() == [3, 9]
    assert rows.rating is not None and np.isnan(rows.rating[0]) and rows.rating[1] == 4
    assert catalogue.users is not None and catalogue.users["age"].to_list() == [30.0, None]


REVIEWS_2018 = [
    {"reviewerID": "A", "asin": "B1", "overall": 5.0, "unixReviewTime": 20},
    {"reviewerID": "A", "asin": "B2", "overall": 4.0, "unixReviewTime": 10},
    {"reviewerID": "A", "asin": "B1", "overall": 1.0, "unixReviewTime": 20},
]
META_2018 = [
    {"asin": "B1", "title": "Gift &amp; card", "price": "$1,025.00", "description": ["<p>One</p>", "two"], "brand": "",
     "category": ["Gifts", "Gifts", "Cards"], "main_cat": "Gifts", "image": ["http://i/1.jpg"], "feature": []},
    {"asin": "B9", "title": "Never bought"},
    {"asin": "B1", "brand": "Alder", "title": "Second title"},
]  # fmt: skip
REVIEWS_2023 = [
    {"user_id": "A", "asin": "V1", "parent_asin": "B1", "rating": 5.0, "timestamp": 20999},
    {"user_id": "A", "asin": "V2", "parent_asin": "B2", "rating": 4.0, "timestamp": 10000},
    {"user_id": "A", "asin": "V3", "parent_asin": "B1", "rating": 1.0, "timestamp": 20001},
]
META_2023 = [
    {"parent_asin": "B1", "title": "Gift & card", "price": 1025.0, "description": ["One", "two"], "store": "Alder",
     "categories": ["Gifts", "Cards"], "main_category": "Gifts", "images": [{"thumb": "t", "large": "http://i/1.jpg"}]},
    {"parent_asin": "B9", "title": "Never bought", "price": None},
]  # fmt: skip
META_2014 = (
    "{'asin': 'B1', 'title': 'Gift & card', 'price': 1025.0, 'description': 'One two', 'brand': 'Alder', "
    "'categories': [['Gifts', 'Cards'], ['Gifts']], 'imUrl': 'http://i/1.jpg'}\n{'asin': 'B9'}\n"
)
AMAZON = {
    "2014": {"reviews_Gifts_5.json.gz": lines(*REVIEWS_2018), "meta_Gifts.json.gz": META_2014},
    "2018": {"Gifts_5.json.gz": lines(*REVIEWS_2018), "meta_Gifts.json.gz": lines(*META_2018)},
    "2023": {"Gifts.jsonl.gz": lines(*REVIEWS_2023), "meta_Gifts.jsonl": lines(*META_2023)},
}


@pytest.mark.parametrize("year", AMAZON)
def test_amazon_dumps_of_every_year(year: str, tmp_path: Path) -> None:
    catalogue = Catalogue.load(write(tmp_path, AMAZON[year]))
    assert catalogue.name == "Gifts" and catalogue.item_ids == ["B1", "B2"] and catalogue.user_ids == ["A"]
    rows = catalogue.interactions
    assert rows.item.tolist() == [1, 0, 0] and rows.timestamp is not None and rows.timestamp.tolist() == [10, 20, 20]
    assert rows.rating is not None and rows.rating.tolist() == [4, 5, 1], "equal rows keep the file's order"
    assert catalogue.duplicate_interactions == 1
    first, second = catalogue.items.to_dicts()
    assert (first["title"], first["price"], first["description"]) == ("Gift & card", 1025.0, "One two")
    assert (first["brand"], first["categories"]) == ("Alder", ["Gifts", "Cards"])
    assert first["image_url"] == "http://i/1.jpg" and first["features"] is None
    assert all(value is None for column, value in second.items() if column != "item_id")
    assert any("1 item(s) without reviews were left out" in note for note in catalogue.notes)
    assert "1 reviewed item(s) have no metadata" in catalogue.notes


BAD = [
    (MOVIELENS, "ml-100k/u.data", "1\t2\t3\n", "u.data line 1: needs 4 fields, got 3"),
    (MOVIELENS, "ml-100k/u.data", "1\t9\tgood\t3\n", "u.data line 1: rating and time must be numbers"),
    (MOVIELENS, "ml-100k/u.data", "1\t12\t3\t3\n", "u.data: item '12' is not in u.item"),
    (MOVIELENS, "ml-100k/u.data", "", "u.data: empty file"),
    (MOVIELENS, "data/items.csv", "title\nx\n", r"items.csv: missing column\(s\) \['movie_id'\]"),
    (MOVIELENS, "omdb_metadata.jsonl", '{"movie_id": 9}\n{"movie', "omdb_metadata.jsonl line 2: malformed JSON"),
    (LCREC, "Toy.inter.json", '{"0": [5]}', "Toy.inter.json: item '5' is not in Toy.item.json"),
    (LCREC, "Toy.inter.json", '{"0": 5}', "entry '0' needs list, got int"),
    (LCREC, "Toy.item.json", "", "Toy.item.json: empty file"),
    (P5, "Toy.txt", "1 2 3\n1 3\n", "Toy.txt line 2: user 1 has a line already"),
    (P5, "Toy.txt", "1 3\n2 x\n", "Toy.txt line 2: needs 'user item item …' in integers"),
    (P5, "Toy.txt", "1 4\n", "Toy.txt: item '4' is not in items.jsonl"),
    (P5, "items.jsonl", '{"id": 1}', r"items.jsonl line 1: missing column\(s\) \['item_id'\]"),
    (RECBOLE, "ml.inter", "user_id:token\titem_id\nu\t9\n", "column head 'item_id' needs the form name:type"),
    (RECBOLE, "ml.inter", "user_id:token\nu\n", r"ml.inter: missing column\(s\) \['item_id'\]"),
    (RECBOLE, "ml.inter", "user_id:token\titem_id:token\nu\t9\t1\n", "ml.inter line 2: needs 2 fields, got 3"),
    (RECBOLE, "ml.inter", "user_id:token\titem_id:token\nu\t8\n", "ml.inter: item '8' is not in ml.item"),
    (RECBOLE, "ml.item", "item_id:token\tv:float_seq\n9\t1\n10\t1 2\n", r"sequences of one length, got \[1, 2\]"),
    (RECBOLE, "ml.item", "item_id:token\tyear:float\n9\tx\n10\t\n", "column 'year' is numeric but holds 'x'"),
    (AMAZON["2018"], "Gifts_5.json.gz", '{"asin": "B1", "unixReviewTime": 1}\n', "1: missing column reviewerID or"),
    (AMAZON["2018"], "meta_Gifts.json.gz", '{"asin": "B1"}\n{"as', "meta_Gifts.json.gz line 2: malformed JSON"),
    (AMAZON["2018"], "meta_Gifts.json.gz", '{"title": "x"}\n', "meta_Gifts.json.gz line 1: missing column asin"),
]  # fmt: skip


@pytest.mark.parametrize(("good", "name", "text", "message"), BAD, ids=[f"{b[1]}-{n}" for n, b in enumerate(BAD)])
def test_bad_input_is_one_clear_line(good: dict[str, str], name: str, text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(CatalogueError, match=message) as caught:
        Catalogue.load(write(tmp_path, {**good, name: text}))
    assert "\n" not in str(caught.value)


def test_mmrec_bad_input(tmp_path: Path) -> None:
    good = parts({"trn.tsv": [3], "val.tsv": [1], "tst.tsv": [1]})
    with pytest.raises(CatalogueError, match="val.tsv line 1: needs 'user TAB item' in integers, got '0 4'"):
        Catalogue.load(write(tmp_path / "a", {**good, "val.tsv": "0 4\n"}))
    with pytest.raises(CatalogueError, match="item ids must be row numbers from 0"):
        Catalogue.load(write(tmp_path / "b", {**good, "val.tsv": "0\t123456789\n"}))
    with pytest.raises(CatalogueError, match="tst.tsv: empty file"):
        Catalogue.load(write(tmp_path / "c", {**good, "tst.tsv": "\n"}))
    with pytest.raises(CatalogueError, match=r"x.inter: missing column\(s\) \['userID'\]"):
        Catalogue.load(write(tmp_path / "d", {"x.inter": "user\titemID\n1\t1\n"}))
    with pytest.raises(CatalogueError, match="x_label needs 0, 1 or 2"):
        Catalogue.load(write(tmp_path / "e", {"x.inter": "userID\titemID\tx_label\n1\t1\t4\n"}))
    folder = write(tmp_path / "f", good)
    np.save(folder / "text_feat.npy", np.ones((2, 3)))
    with pytest.raises(CatalogueError, match=r"text_feat.npy: needs one row per item \(5\), got 2"):
        Catalogue.load(folder)


def test_a_broken_archive_is_named(tmp_path: Path) -> None:
    write(tmp_path, AMAZON["2018"])
    whole = (tmp_path / "Gifts_5.json.gz").read_bytes()
    (tmp_path / "Gifts_5.json.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CatalogueError, match=r"Gifts_5\.json\.gz: after line \d+: broken gzip file"):
        Catalogue.load(tmp_path)
    (tmp_path / "Gifts_5.json.gz").write_bytes(b"not gzip at all")
    with pytest.raises(CatalogueError, match=r"Gifts_5\.json\.gz"):
        Catalogue.load(tmp_path)
    for position in range(10, len(whole)):
        corrupt = bytearray(whole)
        corrupt[position] ^= 0xFF
        (tmp_path / "Gifts_5.json.gz").write_bytes(bytes(corrupt))
        with pytest.raises(CatalogueError, match=r"Gifts_5\.json\.gz"):
            Catalogue.load(tmp_path)


@pytest.mark.parametrize("files", [MOVIELENS, LCREC, P5, RECBOLE, *AMAZON.values()])
def test_every_layout_survives_saving(files: dict[str, str], tmp_path: Path) -> None:
    catalogue = Catalogue.load(write(tmp_path / "in", files))
    assert Catalogue.load(catalogue.save(tmp_path / "out")) == catalogue
