"""Words, table cells and pictures of a generated catalogue."""

from __future__ import annotations

import colorsys
import re
from pathlib import Path
from typing import Any

import numpy as np

from ._planted import THEMES, World
from .schema import TableSchema

ITEM_SCHEMA = TableSchema(
    title="title",
    text=("title", "description"),
    numeric=("price", "weight", "year"),
    categorical=("material", "maker"),
    multi=("tags",),
    units={"price": "USD", "weight": "g"},
)
USER_SCHEMA = TableSchema(numeric=("age",), categorical=("region",), units={"age": "years"})

_THEME_WORDS = (
    ("ocean", "harbour", "tide", "sailor", "coral", "lighthouse", "anchor", "wave", "island", "whale"),
    ("forest", "moss", "cedar", "trail", "fox", "cabin", "mushroom", "creek", "owl", "campfire"),
    ("planet", "rocket", "orbit", "comet", "astronaut", "galaxy", "moon", "telescope", "nebula", "signal"),
    ("kitchen", "bread", "spice", "oven", "recipe", "market", "honey", "teapot", "chef", "feast"),
    ("city", "tram", "rooftop", "neon", "alley", "bridge", "taxi", "crowd", "subway", "plaza"),
    ("music", "drum", "violin", "choir", "rhythm", "melody", "piano", "stage", "echo", "ballad"),
    ("winter", "snow", "glacier", "sled", "frost", "lantern", "wool", "aurora", "ski", "icicle"),
    ("desert", "dune", "camel", "oasis", "cactus", "canyon", "mirage", "caravan", "sandstone", "scorpion"),
)
_STYLE_WORDS = (
    ("playful", "silly", "bouncy", "cheerful", "giggling", "whimsical"),
    ("formal", "precise", "elegant", "measured", "dignified", "restrained"),
    ("vintage", "antique", "nostalgic", "faded", "handmade", "old-fashioned"),
    ("futuristic", "electric", "streamlined", "robotic", "synthetic", "digital"),
)
_SENTENCES = (
    "A {style} piece about the {a} and the {b}.",
    "It brings a {style} {a} close to every {b}.",
    "Think of a {a}, a {b} and something {style}.",
    "Made for those who miss the {a}, it stays {style} throughout.",
    "Between {a} and {b} there is always room for a {style} idea.",
)
_ARTICLE = re.compile(r"\b([Aa]) (?=[aeiou])")
_MATERIALS = (("paper", "card"), ("wood", "cork"), ("steel", "brass"), ("glass", "crystal"))
_BAND_TAGS = ("everyday", "gift", "studio", "collector")
_BAND_PRICE = (6.0, 18.0, 55.0, 160.0)
_MAKERS = ("Alder", "Birch", "Clove", "Dahlia", "Ember", "Fjord", "Garnet", "Hazel")
_REGIONS = ("north", "east", "south", "west")


def item_rows(rng: np.random.Generator, world: World, item_ids: list[str]) -> list[dict[str, Any]]:
    """One dict per item: theme and style in words, band (and theme, through maker and tags) in the table."""
    rows = []
    for i, identifier in enumerate(item_ids):
        theme, band = int(world.theme[i]), int(world.band[i])
        first, second = rng.choice(_THEME_WORDS[theme], 2, replace=False)
        adjective = rng.choice(_STYLE_WORDS[world.style[i]])
        maker = theme if rng.random() < 0.8 else int(rng.integers(THEMES))
        rows.append(
            {
                "item_id": identifier,
                "title": f"{adjective} {first} and {second}".title(),
                "description": _description(rng, world, i),
                "price": round(_BAND_PRICE[band] * float(np.exp(rng.normal(0, 0.35))), 2),
                "weight": round(float(np.exp(rng.normal(5.5, 0.8))), 1),
                "year": float(rng.integers(1990, 2021)),
                "material": str(rng.choice(_MATERIALS[band])),
                "maker": f"{_MAKERS[maker]} {'Works' if rng.random() < 0.5 else 'House'}",
                "tags": [_THEME_WORDS[theme][0], *([_BAND_TAGS[band]] if rng.random() < 0.7 else [])],
            }
        )
    return rows


def _description(rng: np.random.Generator, world: World, item: int) -> str:
    sentences = []
    for template in rng.choice(_SENTENCES, rng.integers(2, 4), replace=False):
        theme = int(rng.choice(THEMES, p=world.themes[item]))
        first, second = rng.choice(_THEME_WORDS[theme], 2, replace=False)
        sentences.append(str(template).format(style=rng.choice(_STYLE_WORDS[world.style[item]]), a=first, b=second))
    return _ARTICLE.sub(r"\1n ", " ".join(sentences))


def user_rows(rng: np.random.Generator, world: World, user_ids: list[str]) -> list[dict[str, Any]]:
    """One dict per user: the region leans to the favourite theme, the age is noise."""
    rows = []
    for u, identifier in enumerate(user_ids):
        region = (
            int(world.taste[u].argmax()) % len(_REGIONS) if rng.random() < 0.6 else int(rng.integers(len(_REGIONS)))
        )
        rows.append({"user_id": identifier, "age": float(rng.integers(16, 80)), "region": _REGIONS[region]})
    return rows


def draw_images(rng: np.random.Generator, world: World, item_ids: list[str], folder: Path, size: int) -> list[Path]:
    """One PNG per item: the background's hue tells the theme, the shapes the look."""
    from PIL import Image, ImageDraw

    paths = []
    for i, identifier in enumerate(item_ids):
        hue = (world.theme[i] + rng.uniform(-0.25, 0.25)) / THEMES
        top, bottom = (np.array(colorsys.hsv_to_rgb(hue % 1.0, 0.55, value)) * 255 for value in (0.95, 0.6))
        blend = np.linspace(0, 1, size)[:, None, None]
        grain = rng.normal(0, 4, (size, size, 1))
        pixels = top * (1 - blend) + bottom * blend + grain
        image = Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8), "RGB")
        _draw_shapes(rng, ImageDraw.Draw(image), int(world.look[i]), size)
        path = folder / f"{identifier}.png"
        image.save(path, format="PNG", compress_level=1)
        paths.append(path)
    return paths


def _draw_shapes(rng: np.random.Generator, canvas: Any, look: int, size: int) -> None:
    """One to three light shapes: discs, triangles, squares, or a set of bars."""
    shade = tuple(int(v) for v in rng.integers(215, 256, 3))
    if look == 3:
        width = size // 10 + 1
        for left in range(int(rng.integers(0, 2 * width)), size, 3 * width):
            canvas.rectangle((left, 0, left + width - 1, size), fill=shade)
        return
    for _ in range(int(rng.integers(1, 4))):
        radius = int(rng.integers(size // 8, size // 5 + 1))
        x, y = (int(v) for v in rng.integers(radius, size - radius, 2))
        box = (x - radius, y - radius, x + radius, y + radius)
        if look == 0:
            canvas.ellipse(box, fill=shade)
        elif look == 1:
            canvas.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=shade)
        else:
            canvas.rectangle(box, fill=shade)
