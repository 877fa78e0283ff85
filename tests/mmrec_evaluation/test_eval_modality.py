"""Dominance and missing content, on a model whose dependence on each modality is known."""

import numpy as np
import pytest

from mmrec.evaluation.modality import Curve, dominance, missing, missing_curve, sources_of

ITEMS = 200
HAS = {
    "text": np.ones(ITEMS, bool),
    "image": np.arange(ITEMS) % 2 == 0,
    "table": np.arange(ITEMS) % 5 != 0,
}
WEIGHT = {"text": 0.6, "image": 0.3, "table": 0.0}


def planted(sources):
    """Worth 0.1, and for each modality its weight times the share of the items that are given their own content."""
    own = {name: np.mean(rows == np.arange(ITEMS)) for name, rows in sources.items()}
    return 0.1 + sum(WEIGHT[name] * share for name, share in own.items())


def test_sources_are_the_identity_where_content_exists():
    sources = sources_of(HAS)
    assert sources["text"].tolist() == list(range(ITEMS))
    assert sources["image"][:4].tolist() == [0, -1, 2, -1]
    for bad in ({}, {"a": np.ones(3, bool), "b": np.ones(4, bool)}, {"a": np.ones((2, 2), bool)}):
        with pytest.raises(ValueError, match="present must hold"):
            sources_of(bad)


def test_dominance_recovers_planted_weights():
    found = dominance(planted, HAS)
    assert found.full == pytest.approx(0.1 + 0.6 + 0.15)
    assert found.drop == pytest.approx({"text": 0.6, "image": 0.15, "table": 0.0})
    assert found.only == pytest.approx({"text": 0.7, "image": 0.25, "table": 0.1})
    assert found.index == pytest.approx({"text": 0.8, "image": 0.2, "table": 0.0})
    # A random permutation leaves one item of each modality in place on average.
    assert found.noise["text"] == pytest.approx(0.6, abs=0.02)
    assert found.noise["image"] == pytest.approx(0.15, abs=0.02)
    assert found.noise["table"] == 0


def test_permutations_move_contents_among_their_owners():
    asked = []
    dominance(lambda sources: asked.append(sources) or 0.0, {"image": HAS["image"]}, permutations=4)
    shuffled = [s["image"] for s in asked[3:]]
    assert len(shuffled) == 4
    own = np.flatnonzero(HAS["image"])
    for rows in shuffled:
        assert (np.sort(rows[own]) == own).all() and (rows[~HAS["image"]] == -1).all()
        assert (rows[own] != own).mean() > 0.9
    assert not np.array_equal(shuffled[0], shuffled[1])


def test_dominance_is_seeded_and_does_not_depend_on_the_other_modalities():
    def positional(sources):
        return float(np.sum(sources["image"] * np.arange(ITEMS)) % 1009)

    alone = dominance(positional, {"image": HAS["image"]}, seed=3)
    beside = dominance(positional, HAS, seed=3)
    assert alone.noise["image"] == beside.noise["image"]
    assert dominance(positional, HAS, seed=4).noise["image"] != beside.noise["image"]


def test_no_gain_has_no_index():
    found = dominance(lambda sources: 0.5, HAS)
    assert all(np.isnan(value) for value in found.index.values())
    # A modality that hurts has a negative drop and no part in the index.
    hurting = dominance(lambda s: 0.5 + (s["text"] >= 0).mean() - (s["image"] >= 0).mean(), HAS)
    assert hurting.drop["image"] < 0 and hurting.index == {"text": 1.0, "image": 0.0, "table": 0.0}


@pytest.mark.parametrize("kind", ["random", "popularity"])
@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 1.0])
def test_the_asked_share_of_the_owners_loses_content(kind, rate):
    found = missing(HAS, rate, kind, popularity=np.arange(ITEMS))
    for name, mask in HAS.items():
        assert (found[name] >= 0).sum() == mask.sum() - round(rate * mask.sum())
        kept = found[name] >= 0
        assert (found[name][kept] == np.flatnonzero(kept)).all() and not (kept & ~mask).any()


@pytest.mark.parametrize("kind", ["random", "popularity", "whole"])
def test_more_missing_contains_less_missing(kind):
    popularity = np.arange(ITEMS)
    low, high = (missing(HAS, rate, kind, popularity=popularity, seed=9) for rate in (0.3, 0.7))
    for name in HAS:
        assert not ((low[name] < 0) & (high[name] >= 0)).any()
    assert sum((rows < 0).sum() for rows in high.values()) > sum((rows < 0).sum() for rows in low.values())


def test_modalities_lose_different_items():
    found = missing({"a": np.ones(ITEMS, bool), "b": np.ones(ITEMS, bool)}, 0.5, "random")
    assert not np.array_equal(found["a"] < 0, found["b"] < 0)


def test_rare_items_go_first():
    popularity = np.repeat([0, 99], ITEMS // 2)
    gone = [
        missing({"text": HAS["text"]}, 0.4, "popularity", popularity=popularity, seed=s)["text"] < 0 for s in range(20)
    ]
    rare = np.mean([mask[: ITEMS // 2].sum() / mask.sum() for mask in gone])
    # Weights 1 and 1/100: with half of the items rare, about 98 % of the losses hit them.
    assert 0.95 < rare < 1.0
    even = missing({"text": HAS["text"]}, 0.4, "random")["text"] < 0
    assert 0.35 < even[: ITEMS // 2].sum() / even.sum() < 0.65


def test_whole_modalities_go():
    for rate, gone in ((0.0, 0), (0.3, 1), (0.5, 2), (0.7, 2), (1.0, 3)):
        found = missing(HAS, rate, "whole", seed=1)
        assert sum((rows < 0).all() for rows in found.values()) == gone
    orders = {tuple((rows < 0).all() for rows in missing(HAS, 0.3, "whole", seed=s).values()) for s in range(30)}
    assert len(orders) == 3


def test_only_the_named_modalities_lose_content():
    found = missing(HAS, 1.0, "random", modalities=["image"])
    assert (found["image"] < 0).all() and (found["text"] >= 0).all()
    with pytest.raises(ValueError, match=r"\['sound'\] are not among"):
        missing(HAS, 0.5, "random", modalities=["sound"])


def test_the_callers_masks_stay_as_they_are():
    before = {name: mask.copy() for name, mask in HAS.items()}
    missing(HAS, 1.0, "random")
    dominance(planted, HAS)
    assert all(np.array_equal(before[name], HAS[name]) for name in HAS)


def test_the_curve_and_its_area():
    curve = missing_curve(planted, {"text": HAS["text"]}, "random", rates=(0.0, 0.5, 1.0))
    assert curve.values == pytest.approx((0.7, 0.4, 0.1))
    assert curve.area == pytest.approx(0.4)
    assert Curve((0.0, 0.2, 1.0), (1.0, 0.5, 0.0)).area == pytest.approx((0.75 * 0.2 + 0.25 * 0.8) / 1)
    assert Curve((0.2, 0.6), (1.0, 0.5)).area == pytest.approx(0.75)
    assert len(missing_curve(planted, HAS, "whole").rates) == 10


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="rate must lie"):
        missing(HAS, 1.1, "random")
    with pytest.raises(ValueError, match="kind must be"):
        missing(HAS, 0.1, "blockwise")
    with pytest.raises(ValueError, match=r"needs popularity \(200,\), got None"):
        missing(HAS, 0.1, "popularity")
    with pytest.raises(ValueError, match="permutations must be at least 1"):
        dominance(planted, HAS, permutations=0)
    for rates in ((0.1,), (0.2, 0.1)):
        with pytest.raises(ValueError, match="increase"):
            missing_curve(planted, HAS, "random", rates=rates)
