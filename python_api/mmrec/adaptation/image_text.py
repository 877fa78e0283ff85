"""Images as text: a description of what can be measured, or a caption by a vision-language model; and their cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from .errors import CatalogueError
from .images import open_image
from .text_cache import TextCache

if TYPE_CHECKING:
    from .catalogue import Catalogue

__all__ = ["Captioner", "Describer", "MeasuredDescriber", "image_texts"]


class Describer(Protocol):
    """Writes a text for each image.

    Attributes:
        context: what decides a text beside the image (model, prompt, versions), as strings: part of every cache key.
    """

    context: dict[str, str]

    def __call__(self, paths: Sequence[Path]) -> list[str]:
        """One text per image.

        Raises:
            CatalogueError: an image that is absent or broken; the message names it.
        """
        ...


def image_texts(
    catalogue: Catalogue, describer: Describer, *, cache: TextCache | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[str], np.ndarray]:  # fmt: skip
    """One text per item's image.

    Args:
        catalogue: its `images` are read.
        describer: what writes them.
        cache: keeps each text by the hash of the image's bytes and the describer's context: what was written before is
            read, also by other catalogues, and an interrupted run goes on where it was.
        progress: gets how many images are described, and of how many, after each shard of the cache.

    Returns:
        `(texts, mask)`: I strings and bool `[I]`; where the mask is False there is no image and the text is empty.

    Raises:
        CatalogueError: an image that is absent or broken.
    """
    rows = [row for row, path in enumerate(catalogue.images) if path is not None]
    paths = {row: Path(path) for row, path in enumerate(catalogue.images) if path is not None}
    texts, mask = [""] * catalogue.num_items, np.zeros(catalogue.num_items, dtype=bool)
    if cache is None:
        found = describer([paths[row] for row in rows]) if rows else []
    else:
        hashes = [_hash(paths[row]) for row in rows]
        by_hash = {content: paths[row] for content, row in zip(hashes, rows, strict=True)}
        found = cache.get_or_compute(
            hashes, lambda missing: describer([by_hash[content] for content in missing]) if missing else [],
            context=describer.context, progress=progress,
        )  # fmt: skip
    for row, text in zip(rows, found, strict=True):
        texts[row], mask[row] = text, True
    return texts, mask


def _hash(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise CatalogueError(f"{path}: {error.strerror or error}") from error


class Captioner:
    """Captions by a Hugging Face model that reads an image and writes text (BLIP, GIT, LLaVA, Qwen2-VL, …), greedily.

    Args:
        model: folder or name for `from_pretrained`.
        prompt: what the model goes on from, with whatever marks the image in its own format; None for models that need
            none.
        max_new_tokens: longest caption, in tokens.
        batch_size: images per call of the model.
    """

    def __init__(
        self, model: str | Path, *, prompt: str | None = None, max_new_tokens: int = 48, batch_size: int = 8
    ) -> None:
        from ..llm.extras import require
        from ..llm.fingerprint import ModelHash, tokenizer_hash

        if max_new_tokens < 1 or batch_size < 1:
            raise ValueError(f"max_new_tokens and batch_size must be ≥ 1, got {max_new_tokens} and {batch_size}")
        transformers = require("transformers")
        self.processor = transformers.AutoProcessor.from_pretrained(str(model))
        self.model = transformers.AutoModelForImageTextToText.from_pretrained(str(model), use_safetensors=True).eval()
        if not self.model.config.is_encoder_decoder:
            self.processor.tokenizer.padding_side = "left"  # where what is written follows
        self.prompt, self.max_new_tokens, self.batch_size = prompt, max_new_tokens, batch_size
        self.context = {
            "describer": "captioner", "version": "1", "model": ModelHash()(self.model),
            "tokenizer": tokenizer_hash(self.processor.tokenizer),
            "images": json.dumps(self.processor.image_processor.to_dict(), sort_keys=True, default=str),
            "prompt": json.dumps(prompt), "max_new_tokens": str(max_new_tokens),
        }  # fmt: skip

    def __call__(self, paths: Sequence[Path]) -> list[str]:
        """Captions without the prompt, one line each."""
        found: list[str] = []
        for start in range(0, len(paths), self.batch_size):
            found += self._captions([open_image(path) for path in paths[start : start + self.batch_size]])
        return found

    def _captions(self, images: list[Any]) -> list[str]:
        import torch

        text = {} if self.prompt is None else {"text": [self.prompt] * len(images), "padding": True}
        inputs = self.processor(images=images, return_tensors="pt", **text)
        with torch.inference_mode():
            ids = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False, num_beams=1)
        before = inputs.get("input_ids")
        if before is None:
            return self._lines(ids)
        # Some models give the prompt back, as its tokens or, with other special tokens around it, as its words.
        if ids.shape[1] >= before.shape[1] and bool((ids[:, : before.shape[1]] == before).all()):
            return self._lines(ids[:, before.shape[1] :])
        pairs = zip(self._lines(ids), self._lines(before), strict=True)
        return [line.removeprefix(prompt).lstrip() for line, prompt in pairs]

    def _lines(self, ids: Any) -> list[str]:
        return [" ".join(line.split()) for line in self.processor.batch_decode(ids, skip_special_tokens=True)]


# Focal colours of the basic colour terms (Berlin and Kay, 1969) that are not greys, as sRGB.
_COLOURS = {
    "red": (200, 30, 40), "orange": (240, 135, 30), "yellow": (245, 220, 50), "green": (45, 140, 60),
    "blue": (40, 90, 180), "purple": (120, 50, 140), "pink": (240, 150, 175), "brown": (115, 70, 40),
}  # fmt: skip
_GREY_CHROMA = 10.0
_LIGHTNESS = ((20, "very dark"), (40, "dark"), (65, "medium light"), (85, "bright"), (np.inf, "very bright"))
_COLOURFULNESS = ((15, "hardly any colour"), (33, "muted colours"), (59, "colourful"), (np.inf, "very colourful"))
_TO_XYZ = ((0.4124564, 0.3575761, 0.1804375), (0.2126729, 0.7151522, 0.0721750), (0.0193339, 0.1191920, 0.9503041))


class MeasuredDescriber:
    """Says what can be measured, by rules and without a model: format, lightness and contrast (CIELAB), colourfulness
    (Hasler and Süsstrunk, 2003, by their thresholds), the most frequent basic colours (Berlin and Kay, 1969), detail,
    where it is brightest, and a plain background. It does not know what is shown.

    Args:
        size: images are scaled to size × size pixels first.
    """

    def __init__(self, *, size: int = 64) -> None:
        if size < 8:
            raise ValueError(f"size must be at least 8 pixels, got {size}")
        self.size = size
        self.context = {"describer": "measured", "version": "1", "size": str(size)}

    def __call__(self, paths: Sequence[Path]) -> list[str]:
        """One sentence or two per image."""
        return [self._describe(path) for path in paths]

    def _describe(self, path: Path) -> str:
        from PIL import Image

        image = open_image(path)
        width, height = image.size
        pixels = np.asarray(image.resize((self.size, self.size), Image.Resampling.BICUBIC), dtype=np.float64)
        lab = _lab(pixels / 255)
        light = lab[..., 0]
        names, shares = _colour_shares(lab)
        shown = [f"{name} ({share:.0%})" for name, share in zip(names, shares, strict=True)]
        shown = [text for text, share in zip(shown, shares, strict=True) if share >= 0.1][:3] or shown[:1]
        facts = [
            _word(width / height, ((0.9, "portrait"), (1.1, "square"), (np.inf, "landscape"))) + " image",
            _word(light.mean(), _LIGHTNESS),
            _word(light.std(), ((12, "low contrast"), (25, "medium contrast"), (np.inf, "high contrast"))),
            _word(_colourfulness(pixels), _COLOURFULNESS),
        ]  # fmt: skip
        steps = np.abs(np.diff(light, axis=0)).mean() + np.abs(np.diff(light, axis=1)).mean()
        rest = [_word(steps, ((3, "smooth"), (10, "some detail"), (np.inf, "much detail")))]
        rest += [place for place in (_brightest(light), _background(lab)) if place]
        return f"{', '.join(facts)}; mostly {', '.join(shown)}; {', '.join(rest)}."


def _word(value: float, words: Sequence[tuple[float, str]]) -> str:
    """The word of the first bound that `value` is below."""
    return next(word for bound, word in words if value < bound)


def _lab(rgb: np.ndarray) -> np.ndarray:
    """CIELAB (D65) of sRGB in [0, 1], `[..., 3]`."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = linear @ np.array(_TO_XYZ).T / np.array([0.95047, 1.0, 1.08883])
    curve = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = curve[..., 0], curve[..., 1], curve[..., 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def _colour_names(lab: np.ndarray) -> np.ndarray:
    """The basic colour term of each pixel: a grey by its lightness where there is little chroma, else the nearest."""
    focal = _lab(np.array(list(_COLOURS.values())) / 255)
    nearest = np.array(list(_COLOURS))[((lab[..., None, :] - focal) ** 2).sum(-1).argmin(-1)]
    light = lab[..., 0]
    grey = np.select([light < 25, light < 80], ["black", "grey"], "white")
    # What is nearly black or white has no colour that one would name.
    dull = (np.hypot(lab[..., 1], lab[..., 2]) < _GREY_CHROMA) | (light < 10) | (light > 96)
    return np.where(dull, grey, nearest)


def _colour_shares(lab: np.ndarray) -> tuple[list[str], list[float]]:
    names, counts = np.unique(_colour_names(lab), return_counts=True)
    order = np.lexsort((names, -counts))
    return names[order].tolist(), (counts[order] / counts.sum()).tolist()


def _colourfulness(pixels: np.ndarray) -> float:
    """M³ of Hasler and Süsstrunk, 2003, of bytes."""
    red, green, blue = pixels[..., 0], pixels[..., 1], pixels[..., 2]
    first, second = red - green, (red + green) / 2 - blue
    return float(np.hypot(first.std(), second.std()) + 0.3 * np.hypot(first.mean(), second.mean()))


def _brightest(light: np.ndarray) -> str:
    """Where it is clearly lighter than elsewhere."""
    third, half = len(light) // 3, len(light) // 2
    centre = np.zeros(light.shape, bool)
    centre[third:-third, third:-third] = True
    gaps = {
        "brightest in the centre": light[centre].mean() - light[~centre].mean(),
        "brightest at the top": light[:half].mean() - light[half:].mean(),
        "brightest at the bottom": light[half:].mean() - light[:half].mean(),
        "brightest at the left": light[:, :half].mean() - light[:, half:].mean(),
        "brightest at the right": light[:, half:].mean() - light[:, :half].mean(),
    }
    place = max(gaps, key=lambda name: gaps[name])
    return place if gaps[place] > 12 else ""


def _background(lab: np.ndarray) -> str:
    """The colour of the border, where it has one."""
    border = np.concatenate([lab[0], lab[-1], lab[1:-1, 0], lab[1:-1, -1]])
    if np.abs(border - np.median(border, axis=0)).mean() > 3:
        return ""
    return f"plain {_colour_names(np.median(border, axis=0)[None])[0]} background"
