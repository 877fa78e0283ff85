"""The generator: the same bits on every run, and signal where it was planted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mmrec.adaptation import (
    Behaviour,
    Catalogue,
    CatalogueError,
    encode_table,
    generate_catalogue,
    image_patches,
    item_texts,
)
from mmrec.adaptation._planted import THEMES, World, affinity

SMALL = {"users": 40, "items": 30, "cold_items": 3, "mean_length": 8.0, "image_size": 16}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Catalogue, World]:
    folder = tmp_path_factory.mktemp("drawn") / "catalogue"
    catalogue = generate_catalogue(folder, users=300, items=240, seed=5, cold_items=16, image_size=32)
    with np.load(folder / "planted.npz") as arrays:
        return catalogue, World(**dict(arrays))


def test_the_seed_decides_every_bit(tmp_path: Path) -> None:
    first = generate_catalogue(tmp_path / "a", seed=1, **SMALL)
    assert generate_catalogue(tmp_path / "b", seed=1, **SMALL) == first
    assert generate_catalogue(tmp_path / "a", seed=1, **SMALL).fingerprint() == first.fingerprint(), "replaced in place"
    assert generate_catalogue(tmp_path / "c", seed=2, **SMALL).fingerprint() != first.fingerprint()
    code = (
        "import sys; from mmrec.adaptation import generate_catalogue;"
        f"print(generate_catalogue(sys.argv[1], seed=1, **{SMALL!r}).fingerprint())"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "d")], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == first.fingerprint()


def test_sizes_order_and_history(drawn: tuple[Catalogue, World]) -> None:
    catalogue, _ = drawn
    rows = catalogue.interactions
    assert (catalogue.num_users, catalogue.num_items) == (300, 240) and rows.duplicates == 0
    lengths = np.bincount(rows.user, minlength=300)
    assert lengths.min() == 5 and 15 < lengths.mean() < 25
    assert rows.timestamp is not None and (np.diff(rows.timestamp)[np.diff(rows.user) == 0] >= 0).all()
    assert rows.rating is not None and set(np.unique(rows.rating)) == {1, 2, 3, 4, 5}
    top = np.sort(np.bincount(rows.item, minlength=240))[::-1]
    assert top[:24].sum() > 0.25 * top.sum(), "a tenth of the items gets far more than a tenth of the interactions"


def test_cold_items_are_only_ever_last(drawn: tuple[Catalogue, World]) -> None:
    catalogue, world = drawn
    rows = catalogue.interactions
    last = np.diff(rows.user, append=-1) != 0
    assert world.cold.sum() == 16
    assert not world.cold[rows.item[~last]].any()
    assert world.cold[rows.item[last]].sum() > 20


def test_pieces_are_missing_at_the_given_rates(tmp_path: Path, drawn: tuple[Catalogue, World]) -> None:
    coverage = drawn[0].describe()["coverage"]
    assert 0.88 < coverage["text"] < 0.99 and 0.8 < coverage["image"] < 0.97
    whole = generate_catalogue(tmp_path / "whole", missing={"text": 0, "image": 0, "table": 0}, **SMALL)
    assert not any(whole.items[column].null_count() for column in whole.items.columns if column != "tags")
    assert all(whole.images)
    empty = generate_catalogue(tmp_path / "empty", missing={"text": 1, "image": 1, "table": 1}, **SMALL)
    assert set(empty.describe()["coverage"].values()) == {0.0}


def hits(catalogue: Catalogue, score: np.ndarray, user: int) -> bool:
    """Whether the last item is among the ten best that the user has not had."""
    *past, target = catalogue.history(user)
    score = score.copy()
    score[past] = -np.inf
    return int((score > score[target]).sum()) < 10


def test_taste_and_order_both_beat_popularity(drawn: tuple[Catalogue, World]) -> None:
    catalogue, world = drawn
    behaviour, rows = Behaviour(), catalogue.interactions
    warm = [u for u in range(300) if not world.cold[catalogue.history(u)[-1]]]
    popular = np.bincount(rows.item, minlength=240).astype(float)
    rates = dict.fromkeys(("popular", "taste", "order", "both"), 0.0)
    for user in warm:
        previous = catalogue.history(user)[-2]
        order = behaviour.succession * (world.theme == world.successor[world.theme[previous]])
        order = order + 4.0 * (np.arange(240) == world.follow_up[previous])
        liked = affinity(world, behaviour, user)
        base = behaviour.popularity * world.popularity
        scores = {"popular": popular, "taste": liked + base, "order": order + base, "both": liked + order + base}
        for name, score in scores.items():
            rates[name] += hits(catalogue, score, user) / len(warm)
    assert rates["taste"] > 1.5 * rates["popular"] and rates["order"] > 1.5 * rates["popular"]
    assert rates["both"] > max(rates["taste"], rates["order"]) + 0.05


def nearest_centre(features: np.ndarray, labels: np.ndarray) -> float:
    """Accuracy of the nearest class centre, each item held out of its own centre."""
    classes = np.unique(labels)
    right = 0
    for i in range(len(labels)):
        keep = np.arange(len(labels)) != i
        centres = np.stack([features[keep & (labels == c)].mean(axis=0) for c in classes])
        right += classes[((centres - features[i]) ** 2).sum(axis=1).argmin()] == labels[i]
    return right / len(labels)


def words(texts: list[str]) -> np.ndarray:
    vocabulary = sorted({word for text in texts for word in text.lower().replace(".", " ").split()})
    index = {word: n for n, word in enumerate(vocabulary)}
    bag = np.zeros((len(texts), len(vocabulary)))
    for row, text in enumerate(texts):
        for word in text.lower().replace(".", " ").split():
            bag[row, index[word]] = 1
    return bag / np.sqrt(1 + bag.sum(axis=0))


def test_every_modality_tells_the_theme_and_its_own_trait_only(drawn: tuple[Catalogue, World]) -> None:
    catalogue, world = drawn
    texts, has_text = item_texts(catalogue, template="text")
    patches, has_image = image_patches(catalogue, size=32, patch=8)
    table = encode_table(catalogue)
    bag = words([text for text, known in zip(texts, has_text, strict=True) if known])
    colour = patches[has_image].reshape(int(has_image.sum()), -1, 3).mean(axis=1)
    price = table.numeric[:, :1]
    chance = 1 / THEMES
    assert nearest_centre(bag, world.theme[has_text]) > 0.7
    assert nearest_centre(bag, world.style[has_text]) > 0.7
    assert nearest_centre(colour, world.theme[has_image]) > 3 * chance
    present = table.numeric_mask[:, 0]
    assert nearest_centre(price[present], world.band[present]) > 0.5
    assert nearest_centre(bag, world.band[has_text]) < 0.4, "words say nothing about the band (chance is 1/4)"
    assert nearest_centre(price[present], world.style[present]) < 0.4
    assert nearest_centre(colour, world.style[has_image]) < 0.4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"items": 10}, "items needs at least 20, got 10"),
        ({"users": 0}, "users needs at least 1"),
        ({"cold_items": 16}, r"cold_items needs 0\.\.15"),
        ({"mean_length": 3}, "mean_length needs at least 6"),
        ({"missing": {"text": 2}}, "missing needs shares in 0..1"),
        ({"missing": {"sound": 0.1}}, "missing needs shares in 0..1"),
        ({"image_size": 4}, "image_size needs at least 16"),
    ],
)
def test_bad_arguments(change: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(CatalogueError, match=message):
        generate_catalogue(tmp_path / "x", **{**SMALL, **change})
    assert not (tmp_path / "x").exists()


def test_extremes_work(tmp_path: Path) -> None:
    generate_catalogue(tmp_path / "one", users=1, items=20, cold_items=0, mean_length=6, image_size=16)
    busy = generate_catalogue(tmp_path / "busy", users=3, items=20, cold_items=10, mean_length=500, image_size=16)
    assert len(busy.interactions) == 15
