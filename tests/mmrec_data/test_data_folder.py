from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from mmrec.adaptation import Catalogue, CatalogueError


def test_everything_in_the_folder_is_read(shop: Path) -> None:
    catalogue = Catalogue.load(shop)
    assert catalogue.name == "shop"
    assert catalogue.item_ids == ["2", "9", "10"] and catalogue.user_ids == ["a", "b", "c"]
    schema = catalogue.schema
    assert (schema.title, schema.text) == ("title", ("title", "description"))
    assert (schema.numeric, schema.categorical, schema.multi) == (("price",), ("brand", "organic"), ("tags",))
    assert catalogue.items["price"].to_list() == [None, 3.0, 4.5]
    assert catalogue.items["tags"].to_list() == [None, ["tea"], ["tea", "green"]]
    assert catalogue.items["organic"].to_list() == [None, "false", "true"]
    assert catalogue.items["description"].to_list() == ["A mug", None, "Fresh leaves from the hills"]
    rows = catalogue.interactions
    assert rows.user.tolist() == [0, 1, 1, 1, 1]
    assert rows.item.tolist() == [2, 0, 1, 2, 2], "the tie at time 100 is in item order"
    assert rows.timestamp is not None and rows.timestamp.tolist() == [7, 50, 100, 100, 200]
    assert rows.rating is not None and rows.rating[[0, 2, 3, 4]].tolist() == [3, 4, 5, 1] and np.isnan(rows.rating[1])
    assert [path and path.name for path in catalogue.images] == ["2.png", None, "10.png"]
    clip = catalogue.features["clip"]
    assert clip.mask.tolist() == [True, False, True] and clip.values.tolist() == [[1, 2], [0, 0], [5, 6]]
    assert catalogue.users is not None and catalogue.users["age"].to_list() == [41.0, None, 30.0]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_other_formats_read_the_same(kind: str, shop: Path) -> None:
    expected = Catalogue.load(shop)
    for stem in ("items", "interactions", "users"):
        frame = pl.read_csv(shop / f"{stem}.csv", infer_schema_length=None)
        if kind == "jsonl":
            lines = [json.dumps({k: v for k, v in row.items() if v is not None}) for row in frame.iter_rows(named=True)]
            (shop / f"{stem}.jsonl").write_text("\n".join(lines) + "\n\n")
        else:
            frame.write_parquet(shop / f"{stem}.parquet")
        (shop / f"{stem}.csv").unlink()
    assert Catalogue.load(shop).fingerprint() == expected.fingerprint()


def test_interactions_alone_are_a_catalogue(tmp_path: Path) -> None:
    (tmp_path / "interactions.csv").write_text("user_id,item_id,split\n007,x,train\n7,x,test\n07,y,valid\n")
    catalogue = Catalogue.load(tmp_path)
    assert catalogue.user_ids == ["007", "07", "7"], "equal numbers stay different ids"
    assert catalogue.item_ids == ["x", "y"] and catalogue.users is None
    assert catalogue.items.columns == ["item_id"]
    assert catalogue.interactions.split is not None and catalogue.interactions.split.tolist() == [0, 1, 2]
    assert catalogue.interactions.timestamp is None


def test_catalogue_json_decides_roles_and_names(shop: Path) -> None:
    roles = {"title": "title", "text": ["title"], "numeric": ["price"], "units": {"price": "EUR"}, "multi": ["tags"]}
    (shop / "catalogue.json").write_text(json.dumps({"name": "tea shop", "items": roles, "notes": ["by hand"]}))
    catalogue = Catalogue.load(shop)
    assert catalogue.name == "tea shop" and catalogue.notes == ("by hand",)
    assert catalogue.schema.categorical == () and catalogue.schema.units == {"price": "EUR"}
    assert catalogue.items["brand"].to_list() == ["Alder", "Birch", "Alder"], "columns without a role are kept"


def test_an_image_column_is_used_where_there_is_no_file_by_id(shop: Path, write_image: Callable[..., Path]) -> None:
    write_image(shop / "photos" / "black.png")
    (shop / "items.csv").write_text("item_id,title,image\n10,a,photos/black.png\n9,b,photos/black.png\n2,c,gone.png\n")
    catalogue = Catalogue.load(shop)
    assert catalogue.schema.image == ("image",)
    assert [path and path.name for path in catalogue.images] == ["2.png", "black.png", "10.png"]


def test_a_table_names_no_file_outside_its_folder(shop: Path, write_image: Callable[..., Path]) -> None:
    """Images are shown to whoever asks a server: a catalogue of somebody else's must not show this machine's files."""
    outside = write_image(shop.parent / "outside.png")
    (shop / "secret").write_text("no image")
    (shop / "link.png").symlink_to(outside)
    named = {"10": str(outside), "9": "../outside.png", "2": "secret", "3": "link.png", "4": "photos/../ok.png"}
    write_image(shop / "ok.png")
    (shop / "photos").mkdir(exist_ok=True)
    rows = "".join(f"{item},t,{path}\n" for item, path in named.items())
    (shop / "items.csv").write_text("item_id,title,image\n" + rows)
    for image in (shop / "images").iterdir():
        image.unlink()
    for feature in (shop / "features").iterdir():
        feature.unlink()
    catalogue = Catalogue.load(shop)
    found = dict(zip(catalogue.item_ids, catalogue.images, strict=True))
    assert {item for item, path in found.items() if path is not None} == {"4"}


def test_items_alone(shop: Path, write_image: Callable[..., Path]) -> None:
    """In the roles of another catalogue's schema; columns that are not there are missing values."""
    schema = Catalogue.load(shop).schema
    (shop / "interactions.csv").unlink()
    items = Catalogue.load_items(shop, schema)
    assert items.item_ids == ["10", "9", "2"] and items.num_users == 0 and not len(items.interactions)
    assert items.schema == schema and items.items["price"].to_list() == [4.5, 3.0, None]
    assert [path and path.name for path in items.images] == ["10.png", None, "2.png"]
    (shop / "items.csv").write_text("item_id,title\nx,New\n")
    for folder in ("images", "features"):
        for file in (shop / folder).iterdir():
            file.unlink()
    bare = Catalogue.load_items(shop, schema)
    assert bare.items.columns[0] == "item_id" and bare.items["title"].to_list() == ["New"]
    assert all(bare.items[column].null_count() == 1 for column in schema.columns if column != "title")
    part = items.items_part(1, 3)
    assert part.item_ids == ["9", "2"] and part.features["clip"].values.shape == (2, 2)
    made = Catalogue.from_items([{"item_id": "x", "title": "New", "tags": ["a", "b"]}], schema)
    assert made.items["tags"].to_list() == [["a", "b"]] and made.images == [None]
    for rows, words in (
        ([{"title": "x"}], "missing column"), ([{"item_id": "a"}, {"item_id": "a"}], "more than once"),
        ([{"item_id": "a", "colour": "red"}], "no column 'colour'"), ([{"item_id": "a", "price": "dear"}], "'dear'"),
    ):  # fmt: skip
        with pytest.raises(CatalogueError, match=words):
            Catalogue.from_items(rows, schema)
    with pytest.raises(CatalogueError, match="no items.csv"):
        Catalogue.load_items(shop / "images", schema)


def test_stray_images_are_noted(shop: Path, write_image: Callable[..., Path]) -> None:
    write_image(shop / "images" / "77.png")
    assert Catalogue.load(shop).notes == ("images/: 1 file(s) belong to no item and were left out",)


def change(shop: Path, name: str, old: str, new: str) -> None:
    text = (shop / name).read_text()
    assert old in text
    (shop / name).write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("interactions.csv", "user_id,", "person,", r"interactions.csv: missing column\(s\) \['user_id'\]"),
        ("items.csv", "item_id,", "id,", r"items.csv: missing column\(s\) \['item_id'\]; found"),
        ("users.csv", "user_id", "name", r"users.csv: missing column\(s\) \['user_id'\]"),
        ("interactions.csv", "a,10", "a,11", "interactions.csv: item '11' is not in items.csv"),
        ("interactions.csv", "a,10", ",10", "column 'user_id' is empty in data row 4"),
        ("interactions.csv", "3,7", "3,seven", "column 'timestamp', data row 4: needs an integer, got 'seven'"),
        ("interactions.csv", "3,7", "3,1600000000000", "looks like milliseconds"),
        ("interactions.csv", "5,100", "good,100", "column 'rating' needs numbers"),
        ("items.csv", "9,Black", "10,Black", "item_id '10' occurs more than once"),
        ("items.csv", "10,Green", ",Green", "column 'item_id' is empty in data row 1"),
        ("items.csv", "tea,false\n", "tea,false,1,2\n", "items.csv: "),
    ],
)
def test_bad_tables_are_refused(name: str, old: str, new: str, message: str, shop: Path) -> None:
    change(shop, name, old, new)
    with pytest.raises(CatalogueError, match=message) as caught:
        Catalogue.load(shop)
    assert "\n" not in str(caught.value)


def test_other_bad_files_are_refused(shop: Path) -> None:
    cases: list[tuple[str, str | bytes | np.ndarray, str]] = [
        ("items.csv", "", "items.csv: empty file"),
        ("catalogue.json", "{", "catalogue.json line 1: malformed JSON"),
        ("catalogue.json", b'{"name": "\xff"}', "catalogue.json: not valid UTF-8"),
        ("items.csv", b"item_id,title\n10,\xff\n", "items.csv: "),
        ("catalogue.json", '{"naem": "x"}', "needs an object with keys out of"),
        ("catalogue.json", '{"items": {"text": ["blurb"]}}', r"missing column\(s\) \['blurb'\]"),
        ("catalogue.json", '{"items": {"numeric": ["brand"]}}', "column 'brand' is numeric but holds 'Alder'"),
        ("features/clip.npy", np.ones((2, 2), np.float32), r"needs one row per item \(3\), got 2"),
        ("features/clip.npy", b"no array", "clip.npy: not a plain .npy array"),
        ("features/clip.mask.npy", np.ones(3), "clip.mask.npy: needs bool"),
        ("images/10.jpg", b"x", "item '10' has two files, 10.jpg and 10.png"),
        ("interactions.jsonl", "", "found interactions.csv, interactions.jsonl"),
    ]
    for name, content, message in cases:
        path = shop / name
        before = path.read_bytes() if path.exists() else None
        if isinstance(content, np.ndarray):
            np.save(path, content)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(CatalogueError, match=message):
            Catalogue.load(shop)
        path.unlink() if before is None else path.write_bytes(before)
    Catalogue.load(shop)


@pytest.mark.parametrize("line", ['{"item_id": "10", "title"', "[1, 2]"])
def test_a_bad_json_line_is_named(line: str, shop: Path) -> None:
    (shop / "items.csv").unlink()
    (shop / "items.jsonl").write_text('{"item_id": "2"}\n\n' + line + "\n")
    with pytest.raises(CatalogueError, match=r"items\.jsonl line 3"):
        Catalogue.load(shop)


def test_unknown_layouts_list_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "readme.md").write_text("hello")
    with pytest.raises(CatalogueError, match="no known layout.*u.data.*inter.json.*trn.tsv.*meta_X.*Found readme.md"):
        Catalogue.load(tmp_path)
    with pytest.raises(CatalogueError, match="no such folder"):
        Catalogue.load(tmp_path / "absent")
    with pytest.raises(CatalogueError, match="not a folder"):
        Catalogue.load(tmp_path / "readme.md")
    with pytest.raises(CatalogueError, match="layout 'csv' is unknown; known are auto, folder"):
        Catalogue.load(tmp_path, layout="csv")
    with pytest.raises(CatalogueError, match="not in layout movielens, which needs ml-100k/u.data"):
        Catalogue.load(tmp_path, layout="movielens")


def test_a_folder_that_fits_two_layouts_asks_which(shop: Path) -> None:
    (shop / "x.inter").write_text("user_id:token\titem_id:token\na\t1\n")
    with pytest.raises(CatalogueError, match=r"fits several layouts \(folder, recbole\)"):
        Catalogue.load(shop)
    assert Catalogue.load(shop, layout="recbole").num_items == 1
    assert Catalogue.load(shop, layout="folder").num_items == 3
