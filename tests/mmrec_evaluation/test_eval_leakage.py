from __future__ import annotations

import json

import numpy as np
import pytest

from mmrec.evaluation import leakage
from mmrec.evaluation.leakage import explained

NAMES = ("text", "image")


def parts(n: int, seed: int = 0) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Shared parts that are one thing turned and blurred, private parts that are noise of their own."""
    rng = np.random.default_rng(seed)
    common = rng.normal(size=(n, 6))
    shared = {name: common + 0.1 * rng.normal(size=common.shape) for name in NAMES}
    private = {name: rng.normal(size=(n, 5)) for name in NAMES}
    return shared, private, {name: np.ones(n, dtype=bool) for name in NAMES}


def test_kept_apart() -> None:
    found = leakage(*parts(2000))
    assert found.modality < 0.1
    assert all(value < 0.02 for value in (*found.within.values(), *found.across.values()))
    assert all(value > 0.9 for value in found.agreement.values())
    assert found.items == {"text": 2000, "image": 2000}


def test_each_leak_is_seen_where_it_is() -> None:
    shared, private, present = parts(2000)
    private["text"] = private["text"] + shared["text"][:, :5]
    found = leakage(shared, private, present)
    assert found.within["text"] > 0.4 > 0.05 > found.within["image"]
    shared, private, present = parts(2000)
    private["image"] = private["image"] + 2 * private["text"]
    found = leakage(shared, private, present)
    assert min(found.across.values()) > 0.6 and max(found.within.values()) < 0.05
    shared, private, present = parts(2000)
    shared["image"] = shared["image"] + 3
    assert leakage(shared, private, present).modality > 0.95
    shared["image"] = np.random.default_rng(9).normal(size=shared["image"].shape)
    assert max(leakage(shared, private, present).agreement.values()) < 0.02


def test_chance_is_zero_however_rare_a_modality_is() -> None:
    shared, private, present = parts(2000)
    present["image"] = np.arange(2000) % 20 == 0
    found = leakage(shared, private, present)
    assert found.modality < 0.3 and found.items["image"] == 100
    shared["image"] = shared["image"] + 3
    assert leakage(shared, private, present).modality > 0.9


def test_what_is_missing_is_not_read_and_halves_are_by_item() -> None:
    shared, private, present = parts(400)
    present["image"] = np.arange(400) % 3 > 0
    poisoned = [{n: np.where(present[n][:, None], v, np.nan) for n, v in side.items()} for side in (shared, private)]
    assert leakage(*poisoned, present).to_dict() == leakage(shared, private, present).to_dict()
    assert leakage(shared, private, present, seed=1) != leakage(shared, private, present, seed=0)


def test_explained_is_the_r2_of_a_ridge_with_the_least_gcv() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(3)
    x = rng.normal(size=(120, 30)) * rng.uniform(0.1, 10, size=30)
    y = x[:, :3] @ rng.normal(size=(3, 4)) + 3 * rng.normal(size=(120, 4)) + 5
    fitted, held = slice(0, 60), slice(60, 120)
    mean, scale = x[fitted].mean(0), x[fitted].std(0)
    alphas = [10.0**power * 60 for power in range(-4, 5)]
    standard = (x - mean) / scale

    def gcv(alpha: float) -> float:
        centred = standard[fitted]
        hat = centred @ np.linalg.solve(centred.T @ centred + alpha * np.eye(30), centred.T)
        residual = (y[fitted] - y[fitted].mean(0)) - hat @ (y[fitted] - y[fitted].mean(0))
        return float(np.square(residual).sum() / (60 - 1 - np.trace(hat)) ** 2)

    model = linear_model.Ridge(alpha=min(alphas, key=gcv)).fit(standard[fitted], y[fitted])
    error = np.square(y[held] - model.predict(standard[held])).sum()
    expected = 1 - error / np.square(y[held] - y[fitted].mean(0)).sum()
    assert expected > 0.1
    assert explained(x[fitted], y[fitted], x[held], y[held]) == pytest.approx(expected, rel=1e-9)


def test_too_few_items_and_nothing_that_varies() -> None:
    shared, private, present = parts(3)
    found = leakage(shared, private, present)
    assert np.isnan(found.modality) and all(np.isnan(value) for value in found.within.values())
    assert json.loads(json.dumps(found.to_dict()))["across"]["text→image"] is None
    ones = np.ones((10, 2))
    assert np.isnan(explained(ones, ones, ones, ones))
    assert explained(ones, np.arange(20.0).reshape(10, 2), ones, np.arange(20.0).reshape(10, 2)) == 0
    assert leakage(shared, {}, present).within == {}


def test_more_columns_than_rows() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(20, 64)), rng.normal(size=(20, 8))
    assert explained(x[:10], y[:10], x[10:], y[10:]) < 0.2, "what is fitted exactly is not thereby explained"


def test_bad_arguments() -> None:
    shared, private, present = parts(10)
    with pytest.raises(ValueError, match=r"present must have one mask of N items for each of \['text', 'image'\]"):
        leakage(shared, private, {"text": present["text"]})
    with pytest.raises(ValueError, match=r"private\['text'\] must be \[10, d\] of a modality in .*, got \(9, 5\)"):
        leakage(shared, {"text": private["text"][:9]}, present)
    with pytest.raises(ValueError, match=r"private\['sound'\] must be \[10, d\] of a modality in"):
        leakage(shared, {"sound": private["text"]}, present)
