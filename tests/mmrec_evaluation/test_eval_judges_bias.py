"""Biases, consistency and their intervals: by least squares with dummies, by hand, and by how often they cover."""

import itertools
import math

import numpy as np
import pytest

from mmrec.evaluation.judge_agreement import kendall_tau, spearman
from mmrec.evaluation.judge_bias import PlantedJudge, position_bias, pulls, self_consistency
from mmrec.evaluation.judge_intervals import cluster_bootstrap, mean_over_users

FEW = {"resamples": 100, "level": 0.9}


def rows_of(rng, users=40, most=9):
    return np.repeat(np.arange(users), rng.integers(1, most, size=users))


def within(interval, truth):
    return interval.low <= truth <= interval.high


def test_a_small_case_equals_the_enumeration_of_all_resamples():
    values, clusters = np.array([0.0, 1.0, 4.1, 10.3, 2.2, -3.7, 5.6]), np.array([7, 7, 3, 9, 3, 1, 4])
    groups = [values[clusters == label] for label in (1, 3, 4, 7, 9)]
    exact = [np.concatenate(draw).mean() for draw in itertools.product(groups, repeat=5)]
    (found,) = cluster_bootstrap(lambda rows: [values[rows].mean()], clusters, resamples=20_000, level=0.8)
    # The distribution is discrete; each quantile must lie between the exact ones a bit further in and out.
    assert np.quantile(exact, 0.085) <= found.low <= np.quantile(exact, 0.115)
    assert np.quantile(exact, 0.885) <= found.high <= np.quantile(exact, 0.915)
    assert found.mean == values.mean() and (found.users, found.seeds, found.level) == (5, 1, 0.8)


def test_whole_clusters_are_drawn_and_seeded():
    clusters = np.array(["b", "a", "b", "c", "a", "b"])
    seen = []
    for seed in (0, 0, 1):
        seen.append([])
        cluster_bootstrap(
            lambda rows, to=seen[-1]: [to.append(rows.tolist()) or 0.0], clusters, resamples=50, seed=seed
        )
    assert seen[0] == seen[1] != seen[2] and seen[0][0] == [0, 1, 2, 3, 4, 5]
    for rows in seen[0][1:]:
        times = {label: np.bincount(rows, minlength=6)[clusters == label] for label in "abc"}
        assert all(len(set(count.tolist())) == 1 for count in times.values())
        assert sum(count[0] for count in times.values()) == 3


def test_resamples_without_a_value_are_left_out():
    clusters = np.arange(3)

    def statistic(rows):
        return [5.0 if 0 in rows else math.nan, math.nan, float(len(rows))]

    some, never, always = cluster_bootstrap(statistic, clusters, resamples=200)
    assert (some.mean, some.low, some.high) == (5, 5, 5)
    assert math.isnan(never.mean) and math.isnan(never.low) and math.isnan(never.high)
    assert (always.low, always.high) == (3, 3)


@pytest.mark.parametrize("rows", [0, 4])
def test_one_cluster_or_none_has_no_interval(rows):
    (found,) = cluster_bootstrap(lambda drawn: [float(len(drawn))], np.zeros(rows, int))
    assert found.mean == rows and math.isnan(found.low) and math.isnan(found.high) and found.users == min(rows, 1)
    assert not found.excludes_zero


def test_every_user_has_one_voice():
    values = np.array([1.0, 1.0, 1.0, 4.0, np.nan, np.nan])
    found = mean_over_users(values, np.array([5, 5, 5, 2, 2, 8]))
    assert found.mean == 2.5 and found.users == 2 and (found.low, found.high) == (1, 4)
    alone = mean_over_users(values[:3], np.array([5, 5, 5]))
    assert alone.mean == 1 and math.isnan(alone.low) and math.isnan(alone.high)
    nobody = mean_over_users(np.array([np.nan]), np.array([0]))
    assert math.isnan(nobody.mean) and nobody.users == 0
    with pytest.raises(ValueError, match="resamples must be at least 100, got 1"):
        mean_over_users(values, np.arange(6), resamples=1)


def test_slopes_are_those_of_least_squares_with_a_dummy_for_each_level():
    rng = np.random.default_rng(0)
    stars = rng.choice([1.0, 2.5, 4.0], size=60)
    length, popularity = rng.integers(0, 300, size=60) + 40 * stars, rng.integers(0, 50, size=60).astype(float)
    scores = np.exp(stars) + 0.3 * np.log1p(length) - 0.2 * np.log1p(popularity) + rng.normal(size=60)
    design = np.stack([*(stars == level for level in (1.0, 2.5, 4.0)), np.log1p(length), np.log1p(popularity)], axis=1)
    expected = np.linalg.lstsq(design.astype(float), scores, rcond=None)[0][3:]
    found = pulls(scores, stars, {"length": length, "popularity": popularity}, np.arange(60), **FEW)
    for place, (name, x) in enumerate((("length", length), ("popularity", popularity))):
        assert found[name].slope.mean == pytest.approx(expected[place], rel=1e-10)
        relative = expected[place] * np.log1p(x).std() / scores.std()
        assert found[name].standardised.mean == pytest.approx(relative, rel=1e-10)
    other = pulls(1000 + 50 * scores, stars, {"length": length, "popularity": popularity}, np.arange(60), **FEW)
    assert other["length"].slope.mean == pytest.approx(50 * expected[0])
    assert other["length"].standardised.mean == pytest.approx(found["length"].standardised.mean)


def test_what_good_items_have_in_common_is_not_held_against_the_judge():
    rng = np.random.default_rng(1)
    stars = rng.integers(1, 6, size=400).astype(float)
    length = np.exp(stars + 0.3 * rng.normal(size=400))  # good items have long texts
    found = pulls(stars**2, stars, {"length": length}, np.arange(400), **FEW)
    assert np.corrcoef(stars**2, np.log1p(length))[0, 1] > 0.9
    assert found["length"].slope.mean == pytest.approx(0, abs=1e-12)


def test_a_property_that_cannot_be_told_apart_has_no_slope():
    rng = np.random.default_rng(2)
    stars = rng.integers(1, 4, size=50).astype(float)
    scores, length = stars + rng.normal(size=50), rng.integers(1, 99, size=50).astype(float)
    alone = pulls(scores, stars, {"a": length}, np.arange(50), **FEW)["a"].slope.mean
    for stuck in (np.full(50, 7.0), 10 * stars):
        found = pulls(scores, stars, {"a": length, "b": stuck}, np.arange(50), **FEW)
        assert math.isnan(found["b"].slope.mean) and found["a"].slope.mean == pytest.approx(alone)
    twice = pulls(scores, stars, {"a": length, "b": length}, np.arange(50), **FEW)
    assert math.isnan(twice["a"].slope.mean) and math.isnan(twice["b"].standardised.low)
    still = pulls(np.full(50, 0.1), stars, {"a": length}, np.arange(50), **FEW)["a"]
    assert still.slope.mean == pytest.approx(0, abs=1e-15) and math.isnan(still.standardised.mean)
    nothing = pulls(np.empty(0), np.empty(0), {"a": np.empty(0)}, np.empty(0, int), **FEW)["a"]
    assert math.isnan(nothing.slope.mean) and nothing.slope.users == 0


def test_position_by_hand():
    # Always the first; reversed as it should be; unsure once; no answer; always the second.
    forward = np.array([1.0, 0.8, 0.5, np.nan, 0.0])
    backward = np.array([1.0, 0.2, 0.9, 0.3, 0.0])
    shift, inconsistent = position_bias(forward, backward, np.arange(5))
    assert shift.mean == pytest.approx((0.5 + 0 + 0.2 - 0.5) / 4) and shift.users == 4
    assert inconsistent.mean == 3 / 4
    unsure, steady = position_bias(np.full(3, 0.5), np.full(3, 0.5), np.arange(3))
    assert (unsure.mean, steady.mean) == (0, 0)


def test_consistency_is_the_one_of_the_paper():
    # Shrout and Fleiss (1979), table 2: four judges of six targets, ICC(1, 1) = .17.
    table = np.array([[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]], float)
    assert self_consistency(table) == pytest.approx(0.17, abs=0.005)
    # Mean squares 11.24 / 1 and 6.26: (MSB − MSW) / (MSB + 3 MSW).
    between, within_rows = 4 * table.mean(axis=1).var(ddof=1), table.var(axis=1, ddof=1).mean()
    assert self_consistency(table) == pytest.approx((between - within_rows) / (between + 3 * within_rows))
    assert self_consistency(100 - 3 * table) == pytest.approx(self_consistency(table))


def test_consistency_of_those_who_never_and_always_repeat_themselves():
    same = np.repeat(np.arange(5.0)[:, None], 3, axis=1)
    assert self_consistency(same) == 1
    assert abs(self_consistency(np.random.default_rng(3).normal(size=(20_000, 2)))) < 0.03
    for undefined in (np.empty((0, 2)), np.ones((1, 2)), np.full((4, 2), 0.1)):
        assert math.isnan(self_consistency(undefined))


def test_planted_consistency_and_noise_are_recovered():
    rng = np.random.default_rng(4)
    truth = rng.normal(0, 2.0, size=4000)
    for noise in (0.5, 2.0):
        judge = PlantedJudge(lambda histories, items: truth[items], noise=noise, seed=5)
        repeats = np.stack([judge.score(None, np.arange(4000)) for _ in range(3)], axis=1)
        (found,) = cluster_bootstrap(lambda rows, r=repeats: [self_consistency(r[rows])], np.arange(4000), **FEW)
        assert within(found, truth.var() / (truth.var() + noise**2)) and found.high - found.low < 0.05


@pytest.mark.parametrize("bias", [-0.5, -0.2, 0.0, 0.15])
def test_planted_position_bias_is_recovered(bias):
    truth = np.random.default_rng(6).permutation(3000).astype(float)
    judge = PlantedJudge(lambda histories, items: truth[items], position_bias=bias, seed=7)
    a, b, users = np.arange(1500), np.arange(1500, 3000), np.arange(1500) % 150
    shift, inconsistent = position_bias(judge.prefer(users, a, b), judge.prefer(users, b, a), users)
    assert within(shift, bias) and within(inconsistent, 2 * abs(bias))
    assert shift.excludes_zero == (bias != 0)
    noisy = PlantedJudge(lambda histories, items: truth[items], noise=2000.0, position_bias=bias, seed=8)
    shift, inconsistent = position_bias(noisy.prefer(users, a, b), noisy.prefer(users, b, a), users)
    assert within(shift, bias) and inconsistent.mean > 2 * abs(bias) - 1e-12


def test_equals_are_neither_first_nor_second():
    judge = PlantedJudge(lambda histories, items: np.ones(len(items)))
    assert judge.prefer([0, 0], [1, 2], [3, 4]).tolist() == [0.5, 0.5]


def test_a_planted_judge_is_its_formula_and_repeats_by_seed():
    def make(**faults):
        return PlantedJudge(
            lambda histories, items: np.asarray(histories) * 10.0 + items,
            length=np.asarray,
            popularity=np.square,
            **faults,
        )

    histories, items = [1, 2, 3], [4, 5, 6]
    plain = np.array([14.0, 25, 36])
    assert make().score(histories, items).tolist() == plain.tolist()
    biased = make(verbosity_bias=2.0, popularity_bias=-1.0).score(histories, items)
    np.testing.assert_allclose(biased, plain + 2 * np.log([5, 6, 7]) - np.log([17, 26, 37]))
    one, two, other = (make(noise=1.0, seed=seed) for seed in (3, 3, 4))
    first = one.score(histories, items)
    assert (first == two.score(histories, items)).all() and (first != other.score(histories, items)).all()
    assert (first != one.score(histories, items)).all()  # asked again, it answers anew
    for faults, message in (
        ({"noise": -1.0}, "noise must be at least 0, got -1.0"),
        ({"position_bias": 0.6}, r"position_bias must lie in \[-0.5, 0.5\], got 0.6"),
        ({"verbosity_bias": 0.1}, "length must be a function of items"),
        ({"popularity_bias": 0.1}, "popularity must be a function of items"),
    ):
        with pytest.raises(ValueError, match=message):
            PlantedJudge(lambda histories, items: items, **faults)


# Below, intervals of level .9 in 60 trials: binomial, standard deviation .039; percentile intervals of some dozens of
# clusters cover a little less than they say.
LOWEST, HIGHEST, TRIALS = 0.77, 0.99, 60


def test_intervals_of_slopes_cover_no_bias_and_planted_bias():
    covered = np.zeros(3)
    for trial in range(TRIALS):
        rng = np.random.default_rng(trial)
        users = rows_of(rng)
        n = len(users)
        stars = rng.integers(1, 6, size=n).astype(float)
        length, popularity = rng.integers(10, 500, size=n).astype(float), rng.integers(0, 100, size=n).astype(float)
        mood = rng.normal(size=40)[users]  # what a user's rows have in common
        judge = PlantedJudge(
            lambda histories, items, t=stars + 0.5 * mood: t, length=lambda items, x=length: x, noise=1.0,
            verbosity_bias=0.3 if trial % 2 else 0.0, seed=trial,
        )  # fmt: skip
        found = pulls(judge.score(users, range(n)), stars, {"v": length, "p": popularity}, users, **FEW, seed=trial)
        covered += [
            within(found["v"].slope, 0.3 if trial % 2 else 0.0),
            within(found["p"].slope, 0.0),
            within(found["p"].standardised, 0.0),
        ]
    assert (covered / TRIALS > LOWEST).all() and (covered / TRIALS < HIGHEST).all(), covered / TRIALS


def test_where_a_judge_errs_by_item_only_drawing_items_covers():
    covered = {"users": 0, "items": 0}
    for trial in range(TRIALS):
        rng = np.random.default_rng(trial)
        users, items = np.repeat(np.arange(50), 8), rng.integers(60, size=400)
        stars = rng.integers(1, 6, size=400).astype(float)
        length = rng.integers(10, 500, size=60).astype(float)[items]
        scores = stars + rng.normal(size=60)[items] + rng.normal(size=400)
        for name, clusters in (("users", users), ("items", items)):
            covered[name] += within(pulls(scores, stars, {"v": length}, clusters, **FEW, seed=trial)["v"].slope, 0.0)
    assert LOWEST < covered["items"] / TRIALS < HIGHEST
    assert covered["users"] / TRIALS < 0.7


def test_intervals_of_position_bias_cover():
    covered = np.zeros(2)
    for trial in range(TRIALS):
        rng = np.random.default_rng(trial)
        users = rows_of(rng)
        truth = rng.normal(size=(2, len(users)))
        for place, bias in enumerate((0.0, 0.1)):
            judge = PlantedJudge(lambda histories, items, t=truth: t[items], noise=0.5, position_bias=bias, seed=trial)
            shift, _ = position_bias(judge.prefer(users, 0, 1), judge.prefer(users, 1, 0), users, **FEW, seed=trial)
            covered[place] += within(shift, bias)
    assert (covered / TRIALS > LOWEST).all() and (covered / TRIALS < HIGHEST).all(), covered / TRIALS


def test_intervals_of_order_cover_what_normal_variables_have():
    # τ = 2/π arcsin r and ρ = 6/π arcsin(r/2) for the correlation r (Kendall and Gibbons, 1990).
    r = 1 / math.sqrt(1 + 0.8**2)
    truth = np.array([2 / math.pi * math.asin(r), 6 / math.pi * math.asin(r / 2)])
    covered = np.zeros(2)
    for trial in range(50):
        rng = np.random.default_rng(trial)
        users = rows_of(rng, most=4)
        stars = rng.normal(size=len(users))
        scores = PlantedJudge(lambda histories, items, t=stars: t, noise=0.8, seed=trial).score(users, users)
        found = cluster_bootstrap(
            lambda rows, a=scores, b=stars: [kendall_tau(a[rows], b[rows]), spearman(a[rows], b[rows])],
            users, **FEW, seed=trial,
        )  # fmt: skip
        covered += [within(one, value) for one, value in zip(found, truth, strict=True)]
    assert (covered > 39).all() and (covered < 50).all(), covered
