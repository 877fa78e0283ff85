"""Images as arrays."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from .errors import CatalogueError

if TYPE_CHECKING:
    from PIL.Image import Image

    from .catalogue import Catalogue


class ImagePatches(NamedTuple):
    """``values`` float32 ``[I, P, patch·patch·3]`` in [−1, 1] (0 where there is no image); ``mask`` bool ``[I]``, True
    = present.
    """

    values: np.ndarray
    mask: np.ndarray


def load_image(path: str | Path, size: int | tuple[int, int]) -> np.ndarray:
    """uint8 ``[H, W, 3]`` RGB, resized (bicubic, stretched) to ``size`` pixels: one number for a square, or (H, W).

    EXIF rotation is applied; transparency is laid over white; of an animation the first frame counts.

    Raises:
        CatalogueError: the file is absent or is not a whole image; the message names it.
    """
    from PIL import Image

    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise CatalogueError(f"size needs positive pixels, got {size}")
    resized = open_image(path).resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(resized, dtype=np.uint8).copy()


def open_image(path: str | Path) -> Image:
    """The image of a file in RGB and in its own size, read as :func:`load_image` says."""
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as opened:
                image = ImageOps.exif_transpose(opened)
                if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                    layer = image.convert("RGBA")
                    image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
                return image.convert("RGB")
    except FileNotFoundError as error:
        raise CatalogueError(f"{path}: no such image") from error
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
    ) as error:
        raise CatalogueError(f"{path}: broken image ({error})") from error


def image_patches(
    catalogue: Catalogue, size: int = 64, patch: int = 16, *, on_error: Literal["raise", "missing"] = "raise"
) -> ImagePatches:
    """Every item's image cut into P = (size / patch)² square patches.

    Patches go row by row; a patch is flattened as (row, column, channel); a byte v becomes v / 127.5 − 1.

    Args:
        catalogue: its ``images`` are read.
        size: pixels per side; a multiple of ``patch``.
        patch: pixels per patch side.
        on_error: ``raise`` stops at a broken image; ``missing`` masks it and reports all of them in one warning.

    Raises:
        CatalogueError: a broken image (``raise``), or ``patch`` does not divide ``size``.
    """
    if patch < 1 or size < 1 or size % patch:
        raise CatalogueError(f"size needs to be a multiple of patch, got size={size}, patch={patch}")
    if on_error not in ("raise", "missing"):
        raise CatalogueError(f"on_error needs 'raise' or 'missing', got {on_error!r}")
    side = size // patch
    values = np.zeros((catalogue.num_items, side * side, patch * patch * 3), dtype=np.float32)
    mask = np.zeros(catalogue.num_items, dtype=bool)
    broken = []
    for row, path in enumerate(catalogue.images):
        if path is None:
            continue
        try:
            pixels = load_image(path, size)
        except CatalogueError as error:
            if on_error == "raise":
                raise
            broken.append(str(error))
            continue
        tiles = pixels.reshape(side, patch, side, patch, 3).transpose(0, 2, 1, 3, 4)
        values[row] = tiles.reshape(side * side, -1) / np.float32(127.5) - np.float32(1)
        mask[row] = True
    if broken:
        warnings.warn(f"{len(broken)} broken image(s) read as missing: {'; '.join(broken[:5])}", stacklevel=2)
    return ImagePatches(values, mask)
