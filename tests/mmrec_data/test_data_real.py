"""Counts of the real data sets, where they are present."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from mmrec.adaptation import Catalogue, encode_table, image_patches, item_texts

Find = Callable[[str], Path]
COUNTS = {
    "movielens-100k-mm": (943, 1682, 100_000, 0),
    "amazon-scientific": (8317, 4344, 58_492, 0),
    "amazon-beauty": (22_363, 12_101, 198_502, 0),
    "amazon-baby": (19_445, 7050, 160_792, 0),
    "amazon-gift-cards": (458, 148, 2972, 7),
}


@cache
def load(folder: Path) -> Catalogue:
    return Catalogue.load(folder)


@pytest.mark.parametrize("name", COUNTS)
def test_counts(name: str, real_data: Find) -> None:
    catalogue = load(real_data(name))
    rows = catalogue.interactions
    assert (catalogue.num_users, catalogue.num_items, len(rows), rows.duplicates) == COUNTS[name]
    assert np.bincount(rows.user).min() >= 5, "every user of these sets has at least five interactions"


def test_movielens(real_data: Find) -> None:
    catalogue = load(real_data("movielens-100k-mm"))
    rows = catalogue.interactions
    assert sum(path is not None for path in catalogue.images) == 1663
    assert catalogue.item_ids == [str(n) for n in range(1, 1683)]
    assert rows.timestamp is not None and rows.rating is not None
    assert np.unique(rows.rating).tolist() == [1, 2, 3, 4, 5]
    last = np.flatnonzero(np.diff(rows.user, append=-1))
    tied = rows.timestamp[last] == rows.timestamp[last - 1]
    assert tied.sum() == 415, "users whose last two interactions have one time"
    assert (rows.item[last] > rows.item[last - 1])[tied].all()
    assert catalogue.users is not None and catalogue.users.height == 943
    assert catalogue.items["title"].null_count() == 1, "movie 267 is 'unknown'"
    patches, mask = image_patches(catalogue, size=32, patch=16)
    assert patches.shape == (1682, 4, 768) and mask.sum() == 1663 and not patches[~mask].any()
    texts, known = item_texts(catalogue, max_chars=600)
    assert max(map(len, texts)) <= 600 and known.sum() > 1670
    table = encode_table(catalogue)
    assert {"revenue", "imdb_votes", "vote_count"} <= set(table.log_scaled)
    assert np.abs(table.numeric).max() < 12


def test_scientific(real_data: Find) -> None:
    catalogue = load(real_data("amazon-scientific"))
    assert catalogue.items["description"].null_count() == 123
    words = [len(text.split()) for text in catalogue.items["description"].drop_nulls().to_list()]
    assert 80 < np.mean(words) < 100


def test_baby_has_mmrecs_split(real_data: Find) -> None:
    catalogue = load(real_data("amazon-baby"))
    split = catalogue.interactions.split
    assert split is not None and np.bincount(split).tolist() == [118_551, 20_559, 21_682]
    assert "val.tsv is read as test and tst.tsv as valid" in catalogue.notes[0]


def test_gift_cards(real_data: Find) -> None:
    catalogue = load(real_data("amazon-gift-cards"))
    assert catalogue.items["title"].null_count() == 0
    assert 0 < catalogue.items["price"].null_count() < catalogue.num_items
    assert any("1399 item(s) without reviews" in note for note in catalogue.notes)
    assert not any("<" in text for text in catalogue.items["title"].to_list())


def test_saving_real_data_changes_nothing(real_data: Find, tmp_path: Path) -> None:
    catalogue = load(real_data("amazon-gift-cards"))
    assert Catalogue.load(catalogue.save(tmp_path / "copy")) == catalogue
