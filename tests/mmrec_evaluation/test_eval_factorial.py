from __future__ import annotations

import numpy as np
import pytest

from mmrec.evaluation import bootstrap, factorial, level_means

FACTORS = {"prompt": ("hard", "soft"), "rank": ("2", "8", "32"), "placement": ("attention", "last")}


def design(seeds: int = 3, users: int = 50, noise: float = 1.0, seed: int = 0) -> np.ndarray:
    return noise * np.random.default_rng(seed).normal(size=(2, 3, 2, seeds, users))


def by_name(effects: list) -> dict:
    return {effect.factors: effect for effect in effects}


def test_squares_add_up_and_are_those_of_an_analysis_of_variance() -> None:
    values = design() + np.arange(3).reshape(3, 1, 1, 1)
    found = by_name(factorial(values, FACTORS, resamples=100))
    means = values.mean(-1)
    total = np.square(means - means.mean()).sum()
    for axis, name in enumerate(FACTORS):
        expected = 0.0
        for level in range(means.shape[axis]):
            part = np.take(means, level, axis)
            expected += part.size * (part.mean() - means.mean()) ** 2
        assert found[(name,)].share == pytest.approx(expected / total, rel=1e-10)
    pair = 0.0
    for i in range(2):
        for j in range(3):
            block = means[i, j]
            pair += block.size * (block.mean() - means[i].mean() - means[:, j].mean() + means.mean()) ** 2
    assert found[("prompt", "rank")].share == pytest.approx(pair / total, rel=1e-10)
    within = np.square(means - means.mean(-1, keepdims=True)).sum()
    assert found[()].share == pytest.approx(within / total, rel=1e-10)
    assert sum(effect.share for effect in found.values()) == pytest.approx(1)
    assert {f: e.freedom for f, e in found.items()} == {
        ("prompt",): 1, ("rank",): 2, ("placement",): 1, ("prompt", "rank"): 2, ("prompt", "placement"): 1,
        ("rank", "placement"): 2, ("prompt", "rank", "placement"): 2, (): 24,
    }  # fmt: skip
    assert sum(effect.by_chance for effect in found.values()) == pytest.approx(1)


def test_one_factor_is_scipys_one_way_analysis() -> None:
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(1).normal(size=(3, 5, 20))
    found = by_name(factorial(values, {"rank": ("2", "8", "32")}, resamples=100))
    ratio = stats.f_oneway(*values.mean(-1)).statistic
    effect, rest = found[("rank",)], found[()]
    assert (effect.share / effect.freedom) / (rest.share / rest.freedom) == pytest.approx(ratio)
    expected = stats.f.sf(ratio, 2, 12)
    assert 0.05 < expected < 0.95 and effect.p == pytest.approx(expected, abs=0.01) and rest.p is None


def test_p_is_that_of_scipys_f_distribution_corrected_by_holm() -> None:
    stats = pytest.importorskip("scipy.stats")
    values = design()
    values[1] += 0.2
    effects = factorial(values, FACTORS, resamples=10)
    rest = effects[-1]
    ratios = [(e.share / e.freedom) / (rest.share / rest.freedom) for e in effects[:-1]]
    raw = np.array([stats.f.sf(ratio, e.freedom, rest.freedom) for ratio, e in zip(ratios, effects[:-1], strict=True)])
    order = np.argsort(raw)
    expected = np.empty(7)
    expected[order] = np.minimum(np.maximum.accumulate(raw[order] * np.arange(7, 0, -1)), 1)
    assert np.sort(expected)[1] == pytest.approx(6 * np.sort(raw)[1]) and np.sort(expected)[1] > 0.005
    np.testing.assert_allclose([e.p for e in effects[:-1]], expected, atol=0.02)


def test_seeds_that_differ_show_effects_in_one_design_of_twenty() -> None:
    wrong = 0
    for seed in range(300):
        random = np.random.default_rng(seed)
        # What a user gets is nearly the same in every run, and runs differ as wholes: intervals over users are tight.
        values = random.normal(size=40) + random.normal(size=(2, 3, 2, 2, 1))
        wrong += any(e.factors and e.p < 0.05 for e in factorial(values, FACTORS, resamples=1))
    assert 3 <= wrong <= 27  # 15 ± 3.2 standard deviations


def test_one_seed_tests_nothing_and_nothing_varies() -> None:
    assert all(effect.p is None for effect in factorial(design(seeds=1), FACTORS, resamples=10))
    still = factorial(np.ones((2, 3, 2, 2, 5)), FACTORS, resamples=10)
    assert all(effect.p == 1 for effect in still if effect.factors)


def test_planted_effects_are_found_where_they_are() -> None:
    values = design(noise=0.1)
    values[1] += 1.0
    assert factorial(values, FACTORS, resamples=100)[0].factors == ("prompt",)
    values = design(noise=0.1)
    values[0, :, 0] += 1.0
    values[1, :, 1] += 1.0  # neither by itself
    first, *others = factorial(values, FACTORS, resamples=100)
    assert first.factors == ("prompt", "placement") and first.share > 0.99 and first.low > 0.9
    assert all(effect.share < 0.01 for effect in others)


def test_order_lumps_what_is_beyond_it() -> None:
    values = design()
    pairs, singles = (by_name(factorial(values, FACTORS, order=order, resamples=100)) for order in (2, 1))
    lumped = sum(effect.share for factors, effect in pairs.items() if len(factors) > 1)
    assert singles[tuple(FACTORS)].share == pytest.approx(lumped) and singles[tuple(FACTORS)].freedom == 7


def test_without_effects_shares_are_those_by_chance() -> None:
    shares = {}
    for seed in range(200):
        for effect in factorial(design(seeds=2, users=10, seed=seed), FACTORS, resamples=100 if seed == 0 else 1):
            shares.setdefault(effect.factors, []).append(effect.share - effect.by_chance)
    for factors, found in shares.items():
        assert abs(np.mean(found)) < 4 * np.std(found) / len(found) ** 0.5, factors


def test_one_seed_leaves_nothing_within_cells() -> None:
    found = factorial(design(seeds=1), FACTORS, resamples=100)
    assert () not in by_name(found) and sum(effect.by_chance for effect in found) == pytest.approx(1)
    same = factorial(np.ones((2, 3, 2, 1, 5)), FACTORS, resamples=100)
    assert all(effect.share == 0 for effect in same)


def test_level_means() -> None:
    values = design()
    found = level_means(values, FACTORS)
    assert found["rank"]["8"] == bootstrap(values[:, 1].mean(axis=(0, 1)))
    assert found["prompt"]["soft"].mean == pytest.approx(values[1].mean())
    assert found["placement"]["last"].seeds == 3 and found["placement"]["last"].users == 50


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"values must be \[2, 3, 2, 'seeds', 'users'\] for .*, got \[2, 3, 3, 50\]"):
        factorial(design()[:, :, 0], FACTORS)
    with pytest.raises(ValueError, match="values must be finite"):
        factorial(np.full((2, 3, 2, 1, 4), np.nan), FACTORS)
    with pytest.raises(ValueError, match="two levels at least"):
        factorial(np.ones((1, 1, 4)), {"rank": ("2",)})
