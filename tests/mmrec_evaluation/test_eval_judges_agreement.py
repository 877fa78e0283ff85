"""Agreement and calibration: against scipy, scikit-learn and brute force, and against figures by hand."""

import itertools
import math

import numpy as np
import pytest

from mmrec.evaluation.judge_agreement import (
    StarCalibration,
    cross_fitted,
    expected_calibration_error,
    isotonic,
    kendall_tau,
    spearman,
    weighted_kappa,
)

LEVELS = [1.0, 2.0, 3.0, 4.0, 5.0]


def noisy_stars(seed, n, noise=1.0):
    rng = np.random.default_rng(seed)
    stars = rng.integers(1, 6, size=n).astype(float)
    return stars + noise * rng.normal(size=n), stars


def cases():
    rng = np.random.default_rng(0)
    for n, steps in ((2, 9), (3, 2), (7, 3), (64, 2), (65, 100), (257, 5), (500, 500)):
        for _ in range(4):
            a = rng.integers(0, steps, size=n).astype(float)
            yield a, np.round(a * rng.choice([-1.0, 0.3, 1.0]) + rng.normal(size=n) * steps / 3)
    yield np.arange(33.0), -np.arange(33.0)
    yield np.array([-np.inf, 0.0, np.inf, 2.0]), np.array([1.0, 1.0, 2.0, 3.0])


def tau_by_pairs(a, b):
    surplus = untied_a = untied_b = 0
    for i, j in itertools.combinations(range(len(a)), 2):
        x, y = np.sign(a[i] - a[j]), np.sign(b[i] - b[j])
        surplus, untied_a, untied_b = surplus + x * y, untied_a + abs(x), untied_b + abs(y)
    return surplus / math.sqrt(untied_a * untied_b) if untied_a and untied_b else float("nan")


def test_scipy_agrees_about_order():
    stats = pytest.importorskip("scipy.stats")
    for a, b in cases():
        constant = len(np.unique(a)) == 1 or len(np.unique(b)) == 1
        tau = float("nan") if constant else stats.kendalltau(a, b).statistic
        rho = float("nan") if constant else stats.spearmanr(a, b).statistic
        assert kendall_tau(a, b) == pytest.approx(tau, abs=1e-13, nan_ok=True)
        assert spearman(a, b) == pytest.approx(rho, abs=1e-13, nan_ok=True)


def test_tau_is_what_counting_pairs_gives():
    for a, b in itertools.islice(cases(), 20):
        assert kendall_tau(a, b) == pytest.approx(tau_by_pairs(a, b), abs=1e-14, nan_ok=True)


def test_order_by_hand():
    # Three pairs concordant, one discordant, one tied in each: (3 − 1) / √(5 · 5).
    a, b = np.array([1.0, 2, 2, 3]), np.array([1.0, 3, 2, 2])
    assert kendall_tau(a, b) == pytest.approx(0.4, abs=1e-15)
    # Ranks 1, 2.5, 2.5, 4 and 1, 4, 2.5, 2.5: covariances 2.25 + 0 + 0 + 0 over 4.5.
    assert spearman(a, b) == pytest.approx(0.5, abs=1e-15)


def test_order_is_all_that_counts_and_ends_are_exact():
    a, b = noisy_stars(1, 300)
    assert kendall_tau(np.exp(a), b) == kendall_tau(a, b) == kendall_tau(b, a) == -kendall_tau(-a, b)
    assert spearman(np.exp(a), b) == pytest.approx(spearman(a, b), abs=1e-15)
    many = np.arange(100_000.0)  # products of pair counts leave 64 bits here
    assert kendall_tau(many, many) == 1 and kendall_tau(many, -many) == -1
    assert spearman(many, many) == 1 and spearman(many, -many) == -1


@pytest.mark.parametrize("measure", [kendall_tau, spearman])
def test_order_is_undefined_without_variation(measure):
    for a, b in (([], []), ([1.0], [2.0]), ([1.0, 1.0], [1.0, 2.0]), ([1.0, 2.0], [3.0, 3.0])):
        assert math.isnan(measure(a, b))
    with pytest.raises(ValueError, match="b must not hold NaN, got 1"):
        measure([1.0, 2.0], [1.0, np.nan])
    with pytest.raises(ValueError, match=r"both be \[n\], got shapes \(2,\) and \(3,\)"):
        measure([1.0, 2.0], [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match=r"both be \[n\]"):
        measure([[1.0]], [[2.0]])


@pytest.mark.parametrize("weights", ["quadratic", "linear"])
def test_sklearn_agrees_about_kappa(weights):
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(2)
    for n in (2, 5, 40, 300):
        for _ in range(5):
            a = rng.integers(1, 6, size=n).astype(float)
            b = np.where(rng.random(n) < 0.5, a, rng.integers(1, 6, size=n))
            theirs = metrics.cohen_kappa_score(a.astype(int), b.astype(int), labels=[1, 2, 3, 4, 5], weights=weights)
            assert weighted_kappa(a, b, LEVELS, weights) == pytest.approx(theirs, abs=1e-13)


def test_kappa_by_hand():
    a, b = np.array([1.0, 1, 2, 3]), np.array([1.0, 2, 2, 3])
    # One disagreement by one level; margins 2, 1, 1 and 1, 2, 1 would give 20 / 4 in squares and 14 / 4 in steps.
    assert weighted_kappa(a, b, [1, 2, 3]) == pytest.approx(1 - 1 / 5)
    assert weighted_kappa(a, b, [1, 2, 3], "linear") == pytest.approx(1 - 1 / 3.5)
    assert weighted_kappa(a, b, [1, 2, 3, 4, 5]) == weighted_kappa(a, b, [1, 2, 3])
    # A level between the first two makes their disagreement worth two steps: 4 over (16 + 18 + 4 + 1 + 9 + 2) / 4.
    assert weighted_kappa(a, b, [1, 1.5, 2, 3]) == pytest.approx(1 - 4 / (50 / 4))
    assert weighted_kappa(a, a, [1, 2, 3]) == 1
    assert weighted_kappa([1.0, 1.0], [3.0, 3.0], [1, 2, 3]) == 0


def test_kappa_is_undefined_where_chance_cannot_disagree():
    assert math.isnan(weighted_kappa([2.0, 2.0], [2.0, 2.0], [1, 2]))
    assert math.isnan(weighted_kappa([], [], [1, 2]))
    for levels, message in (
        ([], "levels must be"),
        ([2, 1], "levels must be finite numbers, ascending"),
        ([1, 1], "ascending"),
        ([1, 2], r"b must hold levels of \[1.0, 2.0\], got 3.0"),
    ):
        with pytest.raises(ValueError, match=message):
            weighted_kappa([1.0, 1.0], [1.0, 3.0], levels)
    with pytest.raises(ValueError, match="weights must be 'quadratic' or 'linear', got 'cubic'"):
        weighted_kappa([1.0], [1.0], [1], "cubic")


def test_calibration_error_by_hand():
    found = expected_calibration_error([0.05, 0.1, 0.15, 0.95], [0, 1, 0, 1])
    assert found.error == pytest.approx((2 * 0.425 + 0.15 + 0.05) / 4)
    assert found.rows.tolist() == [2, 1, 0, 0, 0, 0, 0, 0, 0, 1]
    np.testing.assert_allclose(found.probability[[0, 1, 9]], [0.075, 0.15, 0.95])
    np.testing.assert_allclose(found.outcome[[0, 1, 9]], [0.5, 0, 1])
    assert np.isnan(found.probability[2:9]).all() and np.isnan(found.outcome[2:9]).all()


def test_bins_hold_their_upper_edge():
    for bins in (3, 7, 10, 100):
        edges = np.arange(1, bins + 1) / bins
        assert (expected_calibration_error(edges, np.ones(bins), bins).rows == 1).all()
    assert expected_calibration_error([0.0, 1.0], [False, True]).rows[[0, 9]].tolist() == [1, 1]
    assert expected_calibration_error([0.2, 0.9], [0, 1], bins=1).error == pytest.approx(0.05)


def test_calibration_error_of_right_and_wrong_probabilities():
    rng = np.random.default_rng(3)
    p = rng.random(200_000)
    y = rng.random(200_000) < p
    assert expected_calibration_error(p, y).error < 0.005
    # |p − (1 − p)| is ½ on average, and so it is over the bins' means.
    assert expected_calibration_error(1 - p, y).error == pytest.approx(0.5, abs=0.005)


def test_calibration_error_of_nothing_and_of_bad_input():
    found = expected_calibration_error([], [])
    assert math.isnan(found.error) and found.rows.tolist() == [0] * 10
    for p, y, bins, message in (
        ([1.1], [1], 10, r"probability must lie in \[0, 1\], got 1.1 to 1.1"),
        ([0.5], [2], 10, "outcome must be 0 or 1, got 2"),
        ([0.5], [1], 0, "bins must be at least 1, got 0"),
        ([np.nan], [1], 10, "probability must not hold NaN"),
        ([0.5, 0.5], [1], 10, "probability and outcome must both be"),
    ):
        with pytest.raises(ValueError, match=message):
            expected_calibration_error(p, y, bins)


def test_the_isotonic_fit_is_the_one_of_the_min_max_formula():
    rng = np.random.default_rng(4)
    for n in (1, 2, 9, 30):
        y, w = rng.normal(size=n).round(1), rng.integers(1, 5, size=n).astype(float)
        mean = np.array([[np.average(y[i : j + 1], weights=w[i : j + 1]) if i <= j else 0 for j in range(n)]
                         for i in range(n)])  # fmt: skip
        expected = [max(min(mean[i, j] for j in range(k, n)) for i in range(k + 1)) for k in range(n)]
        np.testing.assert_allclose(isotonic(y, w), expected, rtol=0, atol=1e-14)
    assert isotonic(np.array([1.0, 0.0, 2.0]), np.array([1.0, 3.0, 1.0])).tolist() == [0.25, 0.25, 2.0]


def test_sklearn_agrees_about_each_level():
    isotonic_regression = pytest.importorskip("sklearn.isotonic").IsotonicRegression
    scores, stars = noisy_stars(5, 400)
    scores = scores.round(1)  # ties
    asked = np.linspace(-3, 9, 101)
    found = StarCalibration.fit(scores, stars).distribution(asked)
    assert found.shape == (101, 5) and (found[:, 0] == 1).all()
    for place, level in enumerate(LEVELS[1:], 1):
        theirs = isotonic_regression(out_of_bounds="clip").fit(scores, stars >= level).predict(asked)
        np.testing.assert_allclose(found[:, place], theirs, rtol=0, atol=1e-12)
    assert (np.diff(found, axis=0) >= 0).all() and (np.diff(found, axis=1) <= 1e-15).all()


def test_a_map_by_hand():
    # Scores 0 and 1 violate the order and are pooled; so 0 and 1 have the stars 1, 3 with probability ½ each.
    fitted = StarCalibration.fit([0.0, 1.0, 3.0, 3.0, 3.0], [3.0, 1.0, 3.0, 5.0, 5.0])
    assert fitted.levels.tolist() == [1, 3, 5] and fitted.scores.tolist() == [0, 1, 3]
    np.testing.assert_allclose(
        fitted.distribution([-9, 1, 2, 3, 9]), [[1, 1 / 2, 0], [1, 1 / 2, 0], [1, 3 / 4, 1 / 3], *[[1, 1, 2 / 3]] * 2]
    )
    np.testing.assert_allclose(fitted.expected([0, 2, 3]), [2, 1 + 2 * 3 / 4 + 2 / 3, 3 + 4 / 3])
    assert fitted.level([0, 2, 3]).tolist() == [3, 3, 5]
    np.testing.assert_allclose(fitted.probability([2, 3], 5), [1 / 3, 2 / 3])
    np.testing.assert_allclose(fitted.probability([2, 3], 4), [1 / 3, 2 / 3])  # 4 or more is 5 here
    assert fitted.probability([2, 3], 1).tolist() == [1, 1] and fitted.probability([2, 3], 6).tolist() == [0, 0]


def test_a_perfect_judge_is_mapped_to_the_stars_whatever_its_scale():
    stars = np.random.default_rng(6).integers(1, 6, size=200).astype(float)
    for scores in (stars, np.exp(3 * stars), -1 / stars):
        fitted = StarCalibration.fit(scores, stars)
        assert (fitted.level(scores) == stars).all()
        np.testing.assert_allclose(fitted.expected(scores), stars)


def test_a_map_of_one_level_and_of_bad_input():
    alone = StarCalibration.fit([0.1, 0.2], [3.0, 3.0])
    assert alone.level([9.0]).tolist() == [3] and alone.expected([9.0]).tolist() == [3]
    wide = StarCalibration.fit([0.1, 0.2], [3.0, 3.0], LEVELS)
    assert wide.level([9.0]).tolist() == [3] and wide.distribution([9.0]).tolist() == [[1, 1, 1, 0, 0]]
    for scores, stars, levels, message in (
        ([], [], LEVELS, "scores must be finite and not empty, got 0 rows"),
        ([np.inf], [1.0], LEVELS, "1 infinite"),
        ([1.0], [1.5], LEVELS, "stars must hold levels of .*, got 1.5"),
        ([1.0], [np.nan], LEVELS, "stars must not hold NaN"),
    ):
        with pytest.raises(ValueError, match=message):
            StarCalibration.fit(scores, stars, levels)


def test_no_row_is_judged_by_a_map_that_knew_it():
    scores, stars = noisy_stars(7, 120)
    users = np.arange(120) % 13
    before = cross_fitted(scores, stars, users, np.array(LEVELS), 4.0, 5, 0)
    assert all(np.isfinite(column).all() for column in before)
    changed = []
    for user in range(13):
        other = np.where(users == user, 6 - stars, stars)
        after = cross_fitted(scores, other, users, np.array(LEVELS), 4.0, 5, 0)
        for now, was in zip(after, before, strict=True):
            assert (now[users == user] == was[users == user]).all()
        changed.append((after[1] != before[1]).any())
    assert all(changed)


def test_each_map_is_fitted_on_all_other_parts():
    scores, stars = noisy_stars(8, 90)
    users = np.arange(90) % 3
    level, probability = cross_fitted(scores, stars, users, np.array(LEVELS), 4.0, 7, 1)  # more folds than users
    for user in range(3):
        fitted = StarCalibration.fit(scores[users != user], stars[users != user], LEVELS)
        assert (level[users == user] == fitted.level(scores[users == user])).all()
        assert (probability[users == user] == fitted.probability(scores[users == user], 4.0)).all()


def test_nobody_else_to_fit():
    level, probability = cross_fitted(np.ones(3), np.ones(3), np.zeros(3, int), np.array(LEVELS), 4.0, 5, 0)
    assert np.isnan(level).all() and np.isnan(probability).all()
    with pytest.raises(ValueError, match="folds must be at least 2, got 1"):
        cross_fitted(np.ones(3), np.ones(3), np.arange(3), np.array(LEVELS), 4.0, 1, 0)
