from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmrec.adaptation import Catalogue, CatalogueError, image_patches, load_image

Writer = Callable[..., Path]


def test_size_type_and_colour(tmp_path: Path, write_image: Writer) -> None:
    path = write_image(tmp_path / "a.png", (10, 20, 30), (9, 5))
    pixels = load_image(path, (6, 4))
    assert pixels.shape == (6, 4, 3) and pixels.dtype == np.uint8 and pixels.flags.writeable
    assert (pixels == (10, 20, 30)).all()
    assert load_image(path, 7).shape == (7, 7, 3)


def test_transparency_is_laid_over_white(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (load_image(tmp_path / "clear.png", 4) == 255).all()
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([255, 0, 0] * 256)
    palette.save(tmp_path / "palette.png", transparency=0)
    assert (load_image(tmp_path / "palette.png", 4) == 255).all()


@pytest.mark.parametrize("mode", ["L", "CMYK", "1"])
def test_other_modes_become_rgb(mode: str, tmp_path: Path) -> None:
    Image.new(mode, (4, 4)).save(tmp_path / "x.tif")
    assert load_image(tmp_path / "x.tif", 4).shape == (4, 4, 3)


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    pixels = np.zeros((2, 4, 3), dtype=np.uint8)
    pixels[:, :2] = 255
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    turned = load_image(tmp_path / "turned.png", (2, 4))
    assert (turned[:, :2] == 0).all() and (turned[:, 2:] == 255).all()


@pytest.mark.parametrize("damage", ["text", "cut", "empty"])
def test_broken_images_are_named(damage: str, tmp_path: Path, write_image: Writer) -> None:
    path = write_image(tmp_path / "poster.jpg", size=(64, 64))
    whole = path.read_bytes()
    path.write_bytes({"text": b"not an image", "cut": whole[: len(whole) // 2], "empty": b""}[damage])
    with pytest.raises(CatalogueError, match=r"poster\.jpg: broken image"):
        load_image(path, 8)


def test_bad_arguments(tmp_path: Path, shop: Path) -> None:
    with pytest.raises(CatalogueError, match=r"no\.png: no such image"):
        load_image(tmp_path / "no.png", 8)
    catalogue = Catalogue.load(shop)
    with pytest.raises(CatalogueError, match="multiple of patch, got size=20, patch=16"):
        image_patches(catalogue, size=20)
    with pytest.raises(CatalogueError, match="on_error needs 'raise' or 'missing'"):
        image_patches(catalogue, on_error="skip")  # type: ignore[arg-type]


def test_patches_are_tiles_in_reading_order(shop: Path) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(shop / "images" / "9.png")
    patches, mask = image_patches(Catalogue.load(shop), size=32, patch=8)
    assert patches.shape == (3, 16, 192) and patches.dtype == np.float32 and mask.all()
    tile = pixels[8:16, 16:24].reshape(-1)
    np.testing.assert_allclose(patches[1, 1 * 4 + 2], tile / 127.5 - 1, atol=1e-6)
    assert patches.min() >= -1 and patches.max() <= 1


def test_missing_and_broken_images_are_masked(shop: Path) -> None:
    catalogue = Catalogue.load(shop)
    patches, mask = image_patches(catalogue)
    assert patches.shape == (3, 16, 768) and mask.tolist() == [True, False, True] and not patches[1].any()
    broken = shop / "images" / "10.png"
    broken.write_bytes(b"oops")
    with pytest.raises(CatalogueError, match=r"10\.png: broken image"):
        image_patches(catalogue)
    with pytest.warns(UserWarning, match=r"1 broken image\(s\) read as missing: .*10\.png"):
        values, present = image_patches(catalogue, on_error="missing")
    assert present.tolist() == [True, False, False] and not values[2].any()
    np.testing.assert_array_equal(values[0], patches[0])


def test_nothing_to_see(shop: Path) -> None:
    catalogue = dataclasses.replace(Catalogue.load(shop), images=[None] * 3)
    patches, mask = image_patches(catalogue, size=16, patch=16)
    assert patches.shape == (3, 1, 768) and not mask.any() and not patches.any()
