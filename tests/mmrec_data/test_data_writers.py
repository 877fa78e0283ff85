"""Writers: their bytes against files typed by hand, what the readers make of them, and an account without gaps."""

from __future__ import annotations

import dataclasses
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from writer_helpers import SCHEMA, assert_accounted, other_values, stated, table, tea, with_column

from mmrec.adaptation import Behaviour, Catalogue, CatalogueError, Features, Interactions, generate_catalogue
from mmrec.adaptation.writers import LAYOUTS, write

GOLDEN: dict[str, dict[str, str]] = {
    "mmrec": {
        "shop.inter": (
            "userID\titemID\trating\ttimestamp\tx_label\n0\t0\t4.3\t100\t0\n0\t1\t5.0\t100\t2\n1\t2\t\t50\t0\n"
        ),
        "i_id_mapping.csv": "asin\titemID\nB1\t0\nB2\t1\nB3\t2\n",
        "u_id_mapping.csv": "user_id\tuserID\nann\t0\nbob\t1\n",
    },
    "recbole": {
        "shop.inter": (
            "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
            "ann\tB1\t4.3\t100\nann\tB2\t5.0\t100\nbob\tB3\t\t50\n"
        ),
        "shop.item": (
            "item_id:token\ttitle:token_seq\tdescription:token_seq\tprice:float\tbrand:token\tcategories:token_seq\t"
            "clip:float_seq\n"
            "B1\tGreen tea\tFresh leaves\t4.5\tAlder\ttea green\t1.0 0.1\n"
            "B2\t\tÉlan & thé\t\t\t\t\n"
            "B3\tMug, large\t\t12.0\tBirch\tmugs\t-2.0 3.0\n"
        ),
        "shop.user": "user_id:token\tage:float\nann\t30.0\nbob\t\n",
    },
    "p5": {
        "sequential_data.txt": "1 1 2\n2 3\n",
        "datamaps.json": (
            '{"user2id": {"ann": "1", "bob": "2"}, "item2id": {"B1": "1", "B2": "2", "B3": "3"}, '
            '"id2user": {"1": "ann", "2": "bob"}, "id2item": {"1": "B1", "2": "B2", "3": "B3"}, '
            '"attribute2id": {"Alder": 1, "Birch": 2, "tea": 3, "green": 4, "mugs": 5}, '
            '"id2attribute": {"1": "Alder", "2": "Birch", "3": "tea", "4": "green", "5": "mugs"}, '
            '"attributeid2num": {"1": 1, "2": 1, "3": 1, "4": 1, "5": 1}}'
        ),
        "item2attributes.json": '{"1": [1, 3, 4], "2": [], "3": [2, 5]}',
    },
    "lcrec": {
        "shop.inter.json": '{"0": [0, 1], "1": [2]}',
        "shop.item.json": (
            '{"0": {"title": "Green tea", "description": "Fresh leaves", "brand": "Alder", "categories": "tea,green"}, '
            '"1": {"title": "", "description": "\\u00c9lan & th\\u00e9", "brand": "", "categories": ""}, '
            '"2": {"title": "Mug, large", "description": "", "brand": "Birch", "categories": "mugs"}}'
        ),
        "shop.item2id": "B1\t0\nB2\t1\nB3\t2\n",
        "shop.user2id": "ann\t0\nbob\t1\n",
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bytes_of_every_layout(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    export = write(tea(), "out", layout)
    found = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    features = found.pop("clip_feat.npy", None)
    assert {name: content.decode() for name, content in found.items()} == GOLDEN[layout]
    assert set(export.files) == {*found, *(["clip_feat.npy"] if layout == "mmrec" else [])}
    assert (export.layout, export.folder) == (layout, tmp_path / "out")
    if layout == "mmrec":
        assert features is not None
        values = np.load(tmp_path / "out" / "clip_feat.npy", allow_pickle=False)
        assert values.dtype == np.float32 and values.tolist() == [[1, np.float32(0.1)], [0, 0], [-2, 3]]


LEFT_OUT = {
    "mmrec": {"items.title", "items.description", "items.price", "items.brand", "items.categories", "users.age"},
    "recbole": {"split"},
    "p5": {"name", "rating", "timestamp", "split", "items.title", "items.description", "items.price", "users.age"},
    "lcrec": {"rating", "timestamp", "split", "items.price", "users.age", "features.clip"},
}
LEFT_OUT["p5"].add("features.clip")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_left_out_is_listed(layout: str, tmp_path: Path) -> None:
    export = write(tea(notes=("made up",)), tmp_path / "out", layout)
    assert set(export.left_out) == LEFT_OUT[layout] | {"unit of items.price", "notes"}
    assert all(reason for reason in export.left_out.values())
    assert "ids" in export.changed.get("items", "ids") and not set(export.written) & set(export.left_out)


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Catalogue:
    """All modalities, many ties in time, missing values everywhere."""
    folder = tmp_path_factory.mktemp("data") / "shop"
    made = generate_catalogue(
        folder, users=40, items=50, cold_items=0, mean_length=12.0, image_size=16, seed=5, behaviour=Behaviour(tie=0.4),
        missing={"text": 0.2, "image": 0.2, "table": 0.2},
    )  # fmt: skip
    rng = np.random.default_rng(1)
    rating = made.interactions.rating
    assert rating is not None
    rating = np.where(rng.random(len(rating)) < 0.2, np.float32("nan"), rating / np.float32(3))
    features = {}
    for name, width in (("clip", 7), ("text", 3)):
        mask = rng.random(made.num_items) < 0.7
        features[name] = Features(rng.standard_normal((made.num_items, width)).astype(np.float32), mask)
    return dataclasses.replace(
        made, features=features, interactions=dataclasses.replace(made.interactions, rating=rating)
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_generated_catalogue_comes_back(layout: str, generated: Catalogue, tmp_path: Path) -> None:
    rows = generated.interactions
    assert rows.timestamp is not None and (np.diff(rows.timestamp) == 0).sum() > 20
    assert len(np.unique(rows.user)) == generated.num_users and set(rows.item.tolist()) >= {generated.num_items - 1}
    export = write(generated, tmp_path / "out", layout)
    again = Catalogue.load(tmp_path / "out", layout=layout)
    assert_accounted(generated, export, again)
    assert Catalogue.load(tmp_path / "out") == again, "the layout is found out"
    if layout == "recbole":
        assert set(export.left_out) == {
            "images", "unit of items.price", "unit of items.weight", "unit of users.age"
        } and not export.changed  # fmt: skip
    if layout == "mmrec":
        assert {"rating", "timestamp", "interactions", "features.clip", "features.text"} <= set(export.written)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_writing_what_was_read_changes_nothing_more(layout: str, generated: Catalogue, tmp_path: Path) -> None:
    write(generated, tmp_path / "first" / "shop", layout)
    once = Catalogue.load(tmp_path / "first" / "shop", layout=layout)
    export = write(once, tmp_path / "second" / "shop", layout)
    assert Catalogue.load(tmp_path / "second" / "shop", layout=layout) == once
    assert not export.changed and set(export.left_out) <= {"notes", "split"}
    names = [sorted(path.name for path in (tmp_path / part / "shop").iterdir()) for part in ("first", "second")]
    assert [n for n in names[0] if "mapping" not in n and not n.endswith("2id")] == names[1]


NASTY = [*"\t\n\r\x0b\x85\u2028 _", *"\"'|,;:&<>#", "&amp;", "&lt;b&gt;", "<b>", "Unknown", *"aé漢🍵\u0301", "NA", "1"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seed", range(6))
def test_odd_strings_come_back_or_are_counted(layout: str, seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)

    def text() -> str | None:
        return "".join(rng.choice(NASTY, rng.integers(0, 8))) if rng.random() < 0.9 else None

    count = 60
    ids = [f"i{n:02d}" for n in range(count)]
    multi = [[text() for _ in range(rng.integers(0, 4))] for _ in ids]
    columns: dict[str, list[Any]] = {name: [text() for _ in ids] for name in ("title", "description", "brand")}
    items = table({**columns, "price": [1.0] * count, "categories": multi}, SCHEMA, ids, "item_id")
    before = tea(
        item_ids=ids, items=items, users=None, user_schema=None, features={}, images=[None] * count,
        interactions=Interactions.from_rows(np.array([0, 1]), np.array([0, count - 1])),
    )  # fmt: skip
    export = write(before, tmp_path / "shop", layout)
    after = Catalogue.load(tmp_path / "shop", layout=layout)
    assert_accounted(before, export, after)
    for column in {"recbole": before.items.columns[1:], "lcrec": list(columns) + ["categories"]}.get(layout, []):
        assert stated(export, f"items.{column}") == other_values(before, after, column), column
    if layout == "lcrec":
        assert not other_values(before, after, "brand")
    if layout == "p5":
        wanted = [
            [*([brand] if brand else []), *(parts or [])]
            for brand, parts in zip(items["brand"].to_list(), items["categories"].to_list(), strict=True)
        ]
        found = after.items["attributes"].to_list()
        assert found == [[part for part in row if part != "Unknown"] or None for row in wanted]
        lost = sum(stated(export, f"items.{column}") for column in ("brand", "categories"))
        assert lost == sum("Unknown" in row for row in wanted)


@pytest.mark.parametrize("name", ["shop.item", "shop.inter", "shop.user"])
def test_pandas_reads_recbole_s_files_cell_by_cell(name: str, tmp_path: Path) -> None:
    """RecBole reads with pandas, whose quoting would swallow lines after a field that begins with a quote."""
    pd = pytest.importorskip("pandas")
    titles = ['"Heroes"', '"Help! said "she"', 'a "b" c']
    write(with_column("title", titles, "text"), tmp_path, "recbole")
    frame = pd.read_csv(tmp_path / name, delimiter="\t", dtype=str, keep_default_na=False)
    lines = [line.split("\t") for line in (tmp_path / name).read_text().splitlines()]
    assert [list(frame.columns), *frame.values.tolist()] == lines
    if name == "shop.item":
        assert frame["title:token_seq"].tolist() == ["'Heroes\"", '\'Help! said "she"', 'a "b" c']


def test_float32_decimals_are_exact(tmp_path: Path) -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 3000, dtype=np.uint32).view(np.float32)
    values = np.where(np.isfinite(bits), bits, 0).reshape(3, 1000)
    values[0, 0] = np.float32(1.17549435e-38)
    rating = values[:, 1].copy()
    rows = dataclasses.replace(tea().interactions, rating=rating)
    catalogue = tea(features={"clip": Features(values, np.ones(3, bool))}, interactions=rows)
    for layout in ("recbole", "mmrec"):
        write(catalogue, tmp_path / layout, layout)
        again = Catalogue.load(tmp_path / layout)
        assert np.array_equal(again.features["clip"].values, values)
        assert again.interactions.rating is not None and np.array_equal(again.interactions.rating, rating)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_wrong_arguments(layout: str, tmp_path: Path) -> None:
    nothing = Interactions.from_rows(np.empty(0, np.int32), np.empty(0, np.int32))
    with pytest.raises(CatalogueError, match=f"shop: has no interactions; layout {layout} needs at least one"):
        write(tea(interactions=nothing), tmp_path / "out", layout)
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        write(tea(), tmp_path / "out", layout, colour="red")
    with pytest.raises(CatalogueError, match="'folder' cannot be written; layout needs one of mmrec, recbole, p5, lc"):
        write(tea(), tmp_path / "out", "folder")
    (tmp_path / "file").write_text("x")
    with pytest.raises(CatalogueError, match="file: is a file; a catalogue is written as a folder"):
        write(tea(), tmp_path / "file", layout)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_with_files_is_written_to_only_on_demand(layout: str, tmp_path: Path) -> None:
    (tmp_path / "readme.md").write_text("mine")
    with pytest.raises(CatalogueError, match="holds files; write into a new or empty folder, or with overwrite"):
        write(tea(), tmp_path, layout)
    assert [path.name for path in tmp_path.iterdir()] == ["readme.md"]
    export = write(tea(), tmp_path, layout, overwrite=True)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(before) == {"readme.md", *export.files} and before["readme.md"] == b"mine"
    rows = Interactions.from_rows(np.array([0, 1]), np.array([2, 0]))
    write(tea(interactions=rows), tmp_path, layout, overwrite=True)
    assert Catalogue.load(tmp_path).interactions.item.tolist() == [2, 0]
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    if layout != "p5":
        with pytest.raises(CatalogueError, match="shop.* would be read with what is written; remove them first"):
            write(tea(name="other"), tmp_path, layout, overwrite=True)
    else:
        with pytest.raises(CatalogueError, match="item2attributes.json would be read with what is written"):
            write(tea(), tmp_path, layout, overwrite=True, attributes=[])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == kept


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_interrupted_export_is_no_catalogue(
    layout: str, function: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped at each call: whole files or none, none temporary, and never one that a reader takes for a catalogue."""
    write(tea(), tmp_path / "whole", layout)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    original: Callable[..., Any] = getattr(os, function)
    for failing in range(1, 100):
        calls = []

        def stop(*arguments: Any, failing: int = failing, calls: list[Any] = calls) -> Any:
            calls.append(arguments)
            if len(calls) == failing:
                raise error
            return original(*arguments)

        folder = tmp_path / f"part{failing}"
        with monkeypatch.context() as patch:
            patch.setattr(os, function, stop)
            try:
                write(tea(), folder, layout)
            except (KeyboardInterrupt, CatalogueError) as raised:
                assert isinstance(raised, KeyboardInterrupt) or "not written (No space left" in str(raised)
            else:
                assert len(calls) < failing and failing > len(whole)
                break
        found = {path.name: path.read_bytes() for path in folder.iterdir()}
        assert found.items() <= whole.items()
        if len(found) < len(whole):
            with pytest.raises(CatalogueError, match="no known layout"):
                Catalogue.load(folder)
    else:
        raise AssertionError("it never ended")


@pytest.mark.parametrize(("name", "stem"), [("a/b: c", "a_b_ c"), ("..", "catalogue"), ("thé-1.0", "thé-1.0")])
@pytest.mark.parametrize("layout", ["mmrec", "recbole", "lcrec"])
def test_names_that_are_no_file_names(layout: str, name: str, stem: str, tmp_path: Path) -> None:
    export = write(tea(name=name), tmp_path / "out", layout)
    assert export.changed.get("name") == (None if stem == name else f"{stem!r} instead of {name!r}")
    assert Catalogue.load(tmp_path / "out").name == stem and [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("layout", ["mmrec", "lcrec", "recbole"])
def test_ids_that_are_no_unicode_are_refused(layout: str, tmp_path: Path) -> None:
    with pytest.raises(CatalogueError, match=r"cannot be written as UTF-8"):
        write(tea(user_ids=["ann", "\ud800"], users=None, user_schema=None), tmp_path / "out", layout)
    assert not (tmp_path / "out").exists()


@pytest.mark.data
@pytest.mark.parametrize(("name", "layout"), [("amazon-beauty", "p5"), ("amazon-scientific", "lcrec")])
def test_real_data_comes_back(name: str, layout: str, real_data: Callable[[str], Path], tmp_path: Path) -> None:
    before = Catalogue.load(real_data(name))
    export = write(before, tmp_path / before.name, layout)
    again = Catalogue.load(tmp_path / before.name)
    assert again.interactions == before.interactions
    if layout == "p5":
        assert again.items.sort("item_id").equals(before.items.sort("item_id")) and not export.changed
    else:
        for column in before.items.columns[1:]:
            assert other_values(before, again, column) == stated(export, f"items.{column}")
