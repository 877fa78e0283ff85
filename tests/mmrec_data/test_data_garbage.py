"""Damaged data folders: each is read, or refused with the one error of readers, in one line, and nothing else."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, note
from hypothesis import strategies as st
from PIL import Image
from writer_helpers import tea

from garbage import address_space, damaged, damaged_json
from mmrec.adaptation import Catalogue, CatalogueError
from mmrec.adaptation.images import load_image
from mmrec.adaptation.writers import LAYOUTS, write
from strategies import examples

GIB = 2**30


def shop(folder: Path, suffix: str) -> None:
    """The package's own layout, tables as csv, jsonl or parquet, with roles, an image and features."""
    tea().save(folder)
    for path in sorted(folder.glob("*.parquet")):
        frame = pl.read_parquet(path)
        if suffix == "jsonl":
            path.with_suffix(".jsonl").write_text(frame.write_ndjson())
        if suffix == "csv":
            listed = [c for c, kind in frame.schema.items() if isinstance(kind, pl.List)]
            frame.with_columns(pl.col(c).list.join("|") for c in listed).write_csv(path.with_suffix(".csv"))
        if suffix != "parquet":
            path.unlink()
    if suffix == "csv":  # without roles of columns: they are guessed
        (folder / "catalogue.json").unlink()
    (folder / "images").mkdir(exist_ok=True)
    Image.new("RGB", (3, 2), (255, 0, 0)).save(folder / "images" / "B1.png")


def movielens(folder: Path) -> None:
    flags = "|".join("0" * 19)
    (folder / "u.data").write_text("1\t1\t5\t100\n1\t2\t3\t200\n2\t1\t4\t300\n")
    (folder / "u.item").write_text(
        f"1|Toy Story (1995)|01-Jan-1995||http://x|{flags}\n2|Heat (1995)|||http://x|{flags}\n"
    )
    (folder / "u.user").write_text("1|24|M|technician|85711\n2|53|F|other|94043\n")


def amazon(folder: Path) -> None:
    rows = [{"reviewerID": "A", "asin": "B1", "overall": 5.0, "unixReviewTime": 100, "reviewText": "good"},
            {"reviewerID": "A", "asin": "B2", "overall": 3.0, "unixReviewTime": 200}]  # fmt: skip
    facts = [{"asin": "B1", "title": "Tea", "price": "$4.50", "categories": [["Grocery", "Tea"]], "description": ["x"]},
             {"asin": "B2", "title": "Mug", "brand": "Alder"}]  # fmt: skip
    (folder / "Tea_5.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "meta_Tea.json").write_text("".join(json.dumps(row) + "\n" for row in facts))


def parts(folder: Path) -> None:
    for name, rows in {"trn": "0\t0\n0\t1\n1\t1\n", "val": "0\t2\n1\t0\n", "tst": "0\t3\n1\t2\n"}.items():
        (folder / f"{name}.tsv").write_text(rows)
    np.save(folder / "image_feat.npy", np.ones((4, 2), np.float32))


def export(layout: str) -> Callable[[Path], Any]:
    catalogue = tea()
    return lambda folder: write(catalogue, folder, layout)


MAKE: dict[str, Callable[[Path], Any]] = {
    **{f"folder of {kind}": functools.partial(shop, suffix=kind) for kind in ("csv", "jsonl", "parquet")},
    **{layout: export(layout) for layout in LAYOUTS},
    "movielens": movielens,
    "amazon": amazon,
    "mmrec parts": parts,
}


@functools.cache
def folder_of(name: str) -> dict[str, bytes]:
    """The files of a layout."""
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) / "data"
        folder.mkdir()
        MAKE[name](folder)
        return {
            str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
        }


def put(files: dict[str, bytes], folder: Path) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


@pytest.mark.parametrize("name", MAKE)
def test_the_whole_folder_is_read(name: str, tmp_path: Path) -> None:
    put(folder_of(name), tmp_path)
    assert Catalogue.load(tmp_path).num_items > 1


@pytest.mark.parametrize("name", MAKE)
@examples(60)
@given(st.data())
def test_a_damaged_folder_is_read_or_refused_by_name(name: str, data: Any) -> None:
    files = dict(folder_of(name))
    victim = data.draw(st.sampled_from(sorted(files)))
    is_json = victim.endswith((".json", ".jsonl"))
    files[victim] = data.draw((damaged_json if is_json else damaged)(files[victim]))
    note((victim, files[victim][:500]))
    layout = name.split()[0]
    with tempfile.TemporaryDirectory() as made, address_space(3 * GIB):
        put(files, Path(made))
        try:
            Catalogue.load(made, layout=layout)
        except CatalogueError as error:
            assert str(error) and "\n" not in str(error)


@functools.cache
def image_of(suffix: str) -> bytes:
    with tempfile.TemporaryDirectory() as made:
        path = Path(made) / f"image.{suffix}"
        image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 20, 3), np.uint8))
        exif = image.getexif()
        exif[0x0112] = 6
        image.convert("P" if suffix == "gif" else "RGB").save(
            path, **({} if suffix in ("gif", "bmp") else {"exif": exif})
        )
        return path.read_bytes()


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "gif"])
@examples(60)
@given(st.data())
def test_a_damaged_image_is_read_or_refused_by_name(suffix: str, data: Any) -> None:
    content = image_of(suffix)
    for _ in range(data.draw(st.integers(1, 3))):
        content = data.draw(damaged(content))
    with tempfile.TemporaryDirectory() as made, address_space(3 * GIB):
        path = Path(made) / f"image.{suffix}"
        path.write_bytes(content)
        try:
            assert load_image(path, 8).shape == (8, 8, 3)
        except CatalogueError as error:
            assert str(path) in str(error)


def test_a_header_that_promises_more_than_the_file_holds_asks_for_no_memory(tmp_path: Path) -> None:
    put(folder_of("folder of parquet"), tmp_path)
    path = tmp_path / "features" / "clip.npy"
    content = path.read_bytes()
    for shape in (b"(3, 900000000000)", b"(3, 90000000000000000000)", b"(900000000, 2)"):
        header = content[10:128].replace(b"(3, 2)", shape).rstrip() if b"(3, 2)" in content else b""
        path.write_bytes(content[:10] + header.ljust(117) + b"\n" + content[128:])
        with pytest.raises(CatalogueError, match="clip.npy"), address_space(GIB):
            Catalogue.load(tmp_path)


@pytest.mark.parametrize("what", ["pickle", "npz"])
def test_arrays_of_objects_are_not_unpickled(what: str, tmp_path: Path) -> None:
    put(folder_of("folder of parquet"), tmp_path)
    path = tmp_path / "features" / "clip.npy"
    with path.open("wb") as file:
        if what == "pickle":
            np.save(file, np.array([[print]], dtype=object), allow_pickle=True)
        else:
            np.savez(file, a=np.ones(3))
    with pytest.raises(CatalogueError, match="clip.npy"):
        Catalogue.load(tmp_path)
