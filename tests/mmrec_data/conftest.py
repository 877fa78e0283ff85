"""Small files in every layout, and where the real data is."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("polars")
Image = pytest.importorskip("PIL.Image")


@pytest.fixture
def real_data() -> Callable[[str], Path]:
    """Folder of a real data set by name; skips the test where it is absent."""
    root = Path(os.environ.get("MMREC_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))

    def find(name: str) -> Path:
        if not (root / name).is_dir():
            pytest.skip(f"{name} is not there: set MMREC_DATA to the folder that holds it")
        return root / name

    return find


def _write_image(path: Path, colour: tuple[int, int, int] = (255, 0, 0), size: tuple[int, int] = (8, 8)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


@pytest.fixture
def write_image() -> Callable[..., Path]:
    """``write_image(path, colour, size)`` writes a plain image of the suffix's format and returns the path."""
    return _write_image


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A folder catalogue with every kind of column, gaps, a time tie, a repeated pair, images and a feature."""
    folder = tmp_path / "shop"
    folder.mkdir()
    (folder / "items.csv").write_text(
        "item_id,title,description,price,brand,tags,organic\n"
        "10,Green tea,Fresh leaves from the hills,4.5,Alder,tea|green,true\n"
        "9,Black tea,,3,Birch,tea,false\n"
        '2,"Mug, large",A mug,,Alder,,\n'
    )
    (folder / "interactions.csv").write_text(
        "user_id,item_id,rating,timestamp\nb,10,5,100\nb,9,4,100\nb,2,,50\na,10,3,7\nb,10,1,200\n"
    )
    (folder / "users.csv").write_text("user_id,age\nc,30\na,41\nb,\n")
    _write_image(folder / "images" / "10.png")
    _write_image(folder / "images" / "2.png", (0, 0, 255))
    (folder / "features").mkdir()
    np.save(folder / "features" / "clip.npy", np.arange(6, dtype=np.float32).reshape(3, 2) + 1)
    np.save(folder / "features" / "clip.mask.npy", np.array([True, False, True]))
    return folder
