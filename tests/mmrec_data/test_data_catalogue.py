from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from mmrec.adaptation import Catalogue, CatalogueError, Features, Interactions, TableSchema, storage


def test_import_is_light() -> None:
    heavy = "{'polars', 'PIL', 'torch', 'transformers'} & set(sys.modules)"
    code = f"import sys, mmrec, mmrec.adaptation; print(sorted({heavy}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_save_and_load_give_the_same_catalogue(shop: Path, tmp_path: Path) -> None:
    loaded = Catalogue.load(shop)
    again = Catalogue.load(loaded.save(tmp_path / "copy"))
    assert again == loaded
    assert again.items.equals(loaded.items) and again.items.schema == loaded.items.schema
    assert again.users is not None and loaded.users is not None and again.users.equals(loaded.users)
    assert again.interactions == loaded.interactions
    assert (again.item_ids, again.user_ids, again.schema) == (loaded.item_ids, loaded.user_ids, loaded.schema)
    assert [path is None for path in again.images] == [path is None for path in loaded.images]
    assert again.features == loaded.features


def test_ids_that_are_no_file_names_and_unusual_orders_survive(
    tmp_path: Path, write_image: Callable[..., Path]
) -> None:
    ids = ["a/b", "%41", "%2541", "A", "..", "ü x"]
    images: list[Path | None] = [write_image(tmp_path / f"{n}.png", (n, n, n)) for n in range(len(ids))]
    catalogue = Catalogue(
        name="odd",
        item_ids=ids,
        user_ids=["z", "a"],
        interactions=Interactions.from_rows(np.array([0, 1, 1]), np.array([5, 0, 1])),
        items=pl.DataFrame({"item_id": ids}),
        images=images,
        notes=("made by hand",),
    )
    again = Catalogue.load(catalogue.save(tmp_path / "odd"))
    assert again == catalogue
    assert again.item_ids == ids and again.user_ids == ["z", "a"] and again.users is None
    assert [path and path.read_bytes() for path in again.images] == [path and path.read_bytes() for path in images]


def variant(catalogue: Catalogue, what: str, other_image: Path) -> Catalogue:
    rows = catalogue.interactions
    if what == "rating":
        assert rows.rating is not None
        return dataclasses.replace(catalogue, interactions=dataclasses.replace(rows, rating=rows.rating + 1))
    if what == "time":
        assert rows.timestamp is not None
        return dataclasses.replace(catalogue, interactions=dataclasses.replace(rows, timestamp=rows.timestamp + 1))
    if what == "no time":
        return dataclasses.replace(catalogue, interactions=dataclasses.replace(rows, timestamp=None))
    if what == "item id":
        ids = [*catalogue.item_ids[:-1], "other"]
        items = catalogue.items.with_columns(pl.Series("item_id", ids))
        return dataclasses.replace(catalogue, item_ids=ids, items=items)
    if what == "cell":
        items = catalogue.items.with_columns(price=pl.col("price") + 1e-9)
        return dataclasses.replace(catalogue, items=items)
    if what == "role":
        schema = dataclasses.replace(catalogue.schema, categorical=catalogue.schema.categorical[::-1])
        return dataclasses.replace(catalogue, schema=schema)
    if what == "image":
        images = [*catalogue.images[:-1], other_image]
        return dataclasses.replace(catalogue, images=images)
    if what == "image lost":
        return dataclasses.replace(catalogue, images=[None, *catalogue.images[1:]])
    clip = catalogue.features["clip"]
    if what == "feature":
        return dataclasses.replace(catalogue, features={"clip": Features(clip.values * 2, clip.mask)})
    return dataclasses.replace(catalogue, features={"clip": Features(clip.values, np.zeros(3, dtype=bool))})


CHANGES = ["rating", "time", "no time", "item id", "cell", "role", "image", "image lost", "feature", "feature mask"]


@pytest.mark.parametrize("what", CHANGES)
def test_the_fingerprint_changes_with(what: str, shop: Path, write_image: Callable[..., Path]) -> None:
    catalogue = Catalogue.load(shop)
    changed = variant(catalogue, what, write_image(shop / "other.png", (1, 2, 3)))
    assert changed.fingerprint() != catalogue.fingerprint()
    assert changed != catalogue


def test_the_fingerprint_does_not_depend_on_names_notes_and_places(shop: Path, tmp_path: Path) -> None:
    catalogue = Catalogue.load(shop)
    moved = shutil.copytree(shop, tmp_path / "elsewhere" / "under another name")
    other = dataclasses.replace(Catalogue.load(moved), notes=("read elsewhere",))
    assert other.fingerprint() == catalogue.fingerprint()
    assert len(catalogue.fingerprint()) == 64 and catalogue.fingerprint().startswith(catalogue.short_fingerprint)
    assert other != catalogue


def test_describe(shop: Path) -> None:
    summary = Catalogue.load(shop).describe()
    assert (summary["users"], summary["items"], summary["interactions"]) == (3, 3, 5)
    assert summary["duplicate_interactions"] == 1
    assert summary["density"] == pytest.approx(4 / 9)
    assert summary["per_user"] == {"min": 0, "median": 1.0, "mean": pytest.approx(5 / 3), "max": 4}
    assert summary["time"] == [7, 200] and summary["rated"] == pytest.approx(0.8)
    third = pytest.approx(1 / 3)
    two_thirds = pytest.approx(2 / 3)
    assert summary["coverage"] == {"text": 1.0, "table": 1.0, "image": two_thirds, "features/clip": two_thirds}
    assert summary["columns"]["description"] == {"role": "text", "missing": third}
    assert summary["columns"]["tags"] == {"role": "multi", "missing": third}
    assert summary["user_columns"]["age"] == {"role": "numeric", "missing": third}


def test_rows_histories_and_titles(shop: Path) -> None:
    catalogue = Catalogue.load(shop)
    assert catalogue.item_titles == ["Mug, large", "Black tea", "Green tea"]
    assert [catalogue.item_ids[i] for i in catalogue.history(catalogue.user_row("b"))] == ["2", "9", "10", "10"]
    assert len(catalogue.history(catalogue.user_row("c"))) == 0
    with pytest.raises(CatalogueError, match="unknown user 'x': shop has 3 users"):
        catalogue.user_row("x")
    with pytest.raises(CatalogueError, match="unknown item '11'"):
        catalogue.item_row("11")
    with pytest.raises(CatalogueError, match="user row 3 is outside 0..2"):
        catalogue.history(3)


def minimal(**changes: object) -> dict:
    fields: dict = {
        "name": "x",
        "item_ids": ["a", "b"],
        "user_ids": ["u"],
        "interactions": Interactions.from_rows(np.array([0]), np.array([1])),
        "items": pl.DataFrame({"item_id": ["a", "b"]}),
    }
    return {**fields, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"item_ids": ["a", "a"]}, "item_ids must be distinct"),
        ({"user_ids": [""]}, "user_ids must be non-empty"),
        ({"interactions": Interactions.from_rows(np.array([0]), np.array([2]))}, "do not fit 2 item_ids"),
        ({"items": pl.DataFrame({"item_id": ["b", "a"]})}, "first column must be item_id"),
        ({"images": [None]}, r"images needs one entry per item \(2\), got 1"),
        ({"schema": TableSchema(numeric=("price",))}, r"column\(s\) \['price'\]"),
        ({"features": {"v": Features(np.ones((3, 1), np.float32), np.ones(3, bool))}}, "'v' needs one row per item"),
    ],
)
def test_the_constructor_refuses(changes: dict, message: str) -> None:
    Catalogue(**minimal())
    with pytest.raises(CatalogueError, match=message):
        Catalogue(**minimal(**changes))


def test_features_zero_what_is_missing_and_refuse_nan() -> None:
    values = np.array([[1.0], [np.nan]], dtype=np.float32)
    assert Features(values, np.array([True, False])).values.tolist() == [[1.0], [0.0]]
    with pytest.raises(CatalogueError, match="row 1 is marked present but holds NaN"):
        Features(values, np.array([True, True]))
    with pytest.raises(CatalogueError, match="float32"):
        Features(values.astype(np.float64), np.array([True, False]))


@pytest.mark.parametrize("failing", ["write", "rename", "interrupt"])
def test_a_failed_save_leaves_the_old_catalogue(
    failing: str, shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalogue = Catalogue.load(shop)
    target = catalogue.save(tmp_path / "target")
    changed = dataclasses.replace(catalogue, name="changed")
    expected: type[BaseException] = CatalogueError
    if failing == "rename":
        rename = os.rename

        def no_rename(source: Path, destination: Path) -> None:
            if str(source).endswith(".tmp"):
                raise OSError(errno.EIO, "input/output error")
            rename(source, destination)

        monkeypatch.setattr(os, "rename", no_rename)
    elif failing == "write":

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(storage, "_write_images", full)
    else:
        expected = KeyboardInterrupt

        def stop(_: Path) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(storage, "sync", stop)
    with pytest.raises(expected):
        changed.save(target)
    monkeypatch.undo()
    assert Catalogue.load(target) == dataclasses.replace(catalogue, images=Catalogue.load(target).images)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["shop", "target"]


def test_a_full_disk_is_one_clear_line(shop: Path, tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with pytest.raises(OSError, match="No space left"):
        storage._write_parquet(pl.DataFrame({"a": [1]}), Path("/dev/full"))


def test_save_replaces_a_catalogue_and_nothing_else(shop: Path, tmp_path: Path) -> None:
    catalogue = Catalogue.load(shop)
    other = tmp_path / "papers"
    other.mkdir()
    (other / "thesis.txt").write_text("only copy")
    with pytest.raises(CatalogueError, match="holds other files"):
        catalogue.save(other)
    assert (other / "thesis.txt").read_text() == "only copy"
    target = catalogue.save(tmp_path / "target")
    loaded = Catalogue.load(target)
    assert Catalogue.load(loaded.save(target)) == catalogue
    with pytest.raises(CatalogueError, match="is a file"):
        catalogue.save(other / "thesis.txt")


def test_images_that_are_gone_are_named(shop: Path, tmp_path: Path) -> None:
    catalogue = Catalogue.load(shop)
    (shop / "images" / "10.png").unlink()
    with pytest.raises(CatalogueError, match=r"10\.png"):
        catalogue.fingerprint()
    with pytest.raises(CatalogueError, match=r"10\.png: image of item '10' is gone"):
        catalogue.save(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
