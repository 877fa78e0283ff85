"""Judges asked and reported on: planted faults come back, abstentions are counted, and bad input is named."""

import json
import math

import numpy as np
import pytest

from mmrec.evaluation import (
    Judge,
    Judgements,
    PairwiseJudge,
    PlantedJudge,
    ask_judge,
    judge_report,
    kendall_tau,
    pairs_within_users,
    spearman,
)
from mmrec.evaluation.judge_agreement import cross_fitted, expected_calibration_error, weighted_kappa
from mmrec.evaluation.judge_intervals import cluster_bootstrap

LEVELS = [1.0, 2.0, 3.0, 4.0, 5.0]
QUICK = {"resamples": 100}


class Shop:
    """Users who gave stars to some of a catalogue's items; a row's item is the row, as a judge is asked about it."""

    def __init__(self, seed=0, users=80, each=12, items=200):
        rng = np.random.default_rng(seed)
        self.users = np.repeat(np.arange(users), each)
        self.items = rng.integers(items, size=users * each)
        self.stars = rng.choice(LEVELS, size=users * each, p=[0.1, 0.1, 0.2, 0.35, 0.25])
        self.length = rng.integers(20, 900, size=items).astype(float)[self.items]
        self.popularity = rng.integers(0, 300, size=items).astype(float)[self.items]
        self.rows = list(range(users * each))

    def planted(self, **faults):
        return PlantedJudge(
            lambda histories, rows: self.stars[rows],
            length=lambda rows: self.length[rows],
            popularity=lambda rows: self.popularity[rows],
            **faults,
        )

    def report(self, judge, **options):
        given = {"text_length": self.length, "popularity": self.popularity, "item_ids": self.items}
        return judge_report(judge, self.stars, self.users, **given | options)


def within(interval, truth):
    return interval.low <= truth <= interval.high


def test_planted_faults_come_back():
    shop = Shop()
    judge = shop.planted(noise=0.8, position_bias=-0.15, verbosity_bias=0.4, popularity_bias=-0.3, seed=1)
    pairs = pairs_within_users(shop.stars, shop.users)
    found = shop.report(judge, histories=shop.users, items=shop.rows, pairs=pairs, repeats=2, resamples=300)
    assert within(found.verbosity_bias.slope, 0.4) and found.verbosity_bias.slope.excludes_zero
    assert within(found.popularity_bias.slope, -0.3) and found.popularity_bias.slope.excludes_zero
    assert found.verbosity_bias.standardised.low > 0 > found.popularity_bias.standardised.high
    assert within(found.position_bias, -0.15) and found.position_bias.excludes_zero
    assert found.inconsistency.mean > 0.3
    steady = shop.stars + 0.4 * np.log1p(shop.length) - 0.3 * np.log1p(shop.popularity)
    assert within(found.self_consistency, steady.var() / (steady.var() + 0.8**2))
    assert (found.rows, found.users, found.pairs, found.abstained.mean) == (960, 80, len(pairs), 0)
    assert found.ece is None and found.pairs_abstained.mean == 0
    assert found.verbosity_bias.slope.users == len(np.unique(shop.items)) and found.tau.users == 80


def test_a_judge_without_faults_has_none():
    shop = Shop(1)
    pairs = pairs_within_users(shop.stars, shop.users, most=3)
    found = shop.report(shop.planted(), histories=shop.users, items=shop.rows, pairs=pairs, repeats=2, **QUICK)
    for name in ("spearman", "kappa", "self_consistency", "pairwise_accuracy", "tau_within"):
        assert getattr(found, name).mean == pytest.approx(1), name
    assert found.tau.mean == 1 and found.ece_calibrated.error.mean == 0 and found.ece_calibrated.by_chance == 0
    assert found.position_bias.mean == found.inconsistency.mean == 0
    assert found.verbosity_bias.slope.mean == pytest.approx(0, abs=1e-12)


def test_a_judge_that_knows_nothing_is_seen_through():
    shop = Shop(2)
    noise = np.random.default_rng(0).normal(size=960)
    found = shop.report(noise, **QUICK)
    for name in ("tau", "tau_within", "spearman", "kappa"):
        assert abs(getattr(found, name).mean) < 0.1, name
    # Its calibrated probability is the share of liked items, whatever it says: nothing to object.
    assert found.ece_calibrated.error.mean < 0.06


def test_more_noise_is_less_agreement():
    shop = Shop(3)
    reports = [shop.report(shop.planted(noise=noise), histories=shop.users, items=shop.rows, **QUICK)
               for noise in (0.3, 1.0, 3.0)]  # fmt: skip
    for name in ("tau", "tau_within", "spearman", "kappa"):
        values = [getattr(found, name) for found in reports]
        assert values[0].low > values[1].high and values[1].low > values[2].high, name


def test_figures_are_those_of_the_functions():
    shop = Shop(4, users=20)
    scores = shop.stars + np.random.default_rng(1).normal(size=240)
    found = judge_report(scores, shop.stars, shop.users, seed=3, **QUICK)
    assert found.tau.mean == kendall_tau(scores, shop.stars)
    assert found.spearman.mean == spearman(scores, shop.stars)
    own = [kendall_tau(scores[shop.users == user], shop.stars[shop.users == user]) for user in range(20)]
    assert found.tau_within.mean == pytest.approx(np.mean(own))
    level, liked = cross_fitted(scores, shop.stars, shop.users, np.array(LEVELS), 4.0, 5, 3)
    assert found.kappa.mean == weighted_kappa(level, shop.stars, LEVELS)
    expected = expected_calibration_error(liked, shop.stars >= 4)
    assert found.ece_calibrated.error.mean == found.ece_calibrated.bins.error == expected.error
    assert (found.ece_calibrated.bins.rows == expected.rows).all()
    other = judge_report(scores, shop.stars, shop.users, seed=3, liked=2.0, bins=4, **QUICK).ece_calibrated
    asked = cross_fitted(scores, shop.stars, shop.users, np.array(LEVELS), 2.0, 5, 3)[1]
    assert other.error.mean == expected_calibration_error(asked, shop.stars >= 2, 4).error
    assert len(other.bins.rows) == 4
    # What was not given or asked for is not there.
    for name in ("ece", "self_consistency", "verbosity_bias", "popularity_bias", "position_bias", "pairwise_accuracy"):
        assert getattr(found, name) is None
    assert found.pairs == 0


def test_the_order_among_a_users_own_items_is_apart_from_who_is_harsh():
    # The judge knows who gives many stars, and nothing else: users 0 to 29 have means from 1 to 5.
    rng = np.random.default_rng(5)
    users = np.repeat(np.arange(30), 10)
    stars = np.clip(np.round(1 + users / 7.5 + rng.normal(size=300)), 1, 5)
    found = judge_report(users + 0.01 * rng.normal(size=300), stars, users, **QUICK)
    assert found.tau.low > 0.4 and within(found.tau_within, 0)


def test_stated_probabilities_are_held_to_what_happened():
    rng = np.random.default_rng(6)
    right = rng.uniform(0.05, 0.95, size=3000)
    stars = np.where(rng.random(3000) < right, 5.0, 2.0)
    users = np.arange(3000) % 150
    logit = np.log(right / (1 - right))
    bold = 1 / (1 + np.exp(-3 * logit))
    honest = judge_report(logit, stars, users, probability=right, **QUICK)
    assert honest.ece.error.mean < honest.ece.by_chance
    boasting = judge_report(logit, stars, users, probability=bold, **QUICK)
    wide = rng.uniform(0.05, 0.95, size=1_000_000)
    stated = 1 / (1 + (1 / wide - 1) ** 3)
    truth = expected_calibration_error(stated, rng.random(1_000_000) < wide).error
    assert within(boasting.ece.error, truth) and boasting.ece.error.low > 2 * boasting.ece.by_chance
    (drawn,) = cluster_bootstrap(
        lambda rows: [expected_calibration_error(bold[rows], stars[rows] == 5).error], users, **QUICK
    )
    assert boasting.ece.error.mean == drawn.mean < (drawn.low + drawn.high) / 2  # resampling adds to the error
    reverse = 2 * drawn.mean - drawn.high, 2 * drawn.mean - drawn.low
    assert (boasting.ece.error.low, boasting.ece.error.high) == pytest.approx(reverse)
    # The calibrated probability has the order only, and is right for both.
    assert boasting.ece_calibrated.error.mean == honest.ece_calibrated.error.mean < 0.04


def test_intervals_of_a_calibration_error_cover_it_and_chance_is_what_it_says():
    rng = np.random.default_rng(7)
    wide = rng.uniform(0.05, 0.95, size=1_000_000)
    truth = expected_calibration_error(wide**2, rng.random(1_000_000) < wide).error
    covered = above = 0
    for trial in range(25):
        rng = np.random.default_rng(trial)
        right = rng.uniform(0.05, 0.95, size=400)
        stars = (rng.random(400) < right).astype(float)
        options = {"liked": 1.0, "level": 0.9, "seed": trial, **QUICK}
        covered += within(
            judge_report(right, stars, np.arange(400) % 80, probability=right**2, **options).ece.error, truth
        )
        fair = judge_report(right, stars, np.arange(400) % 80, probability=right, **options).ece
        above += fair.error.mean > fair.by_chance
    # Binomial with 25 trials: standard deviation 1.5 about 22.5 and about 2.5.
    assert covered >= 18 and above <= 7


def test_abstentions_are_counted_and_left_out():
    shop = Shop(8, users=30)
    scores = shop.stars + np.random.default_rng(2).normal(size=360)
    silent = (np.arange(360) % 5 == 0) | (shop.users == 7)
    repeats = np.stack([np.where(silent, np.nan, scores), np.where(shop.users == 9, np.nan, scores + 1)], axis=1)
    probability = np.where(shop.users == 3, np.nan, 0.6)
    found = shop.report(repeats, probability=probability, **QUICK)
    kept = ~silent
    rest = judge_report(
        Judgements(repeats[kept]), shop.stars[kept], shop.users[kept], probability=probability[kept], levels=LEVELS,
        text_length=shop.length[kept], popularity=shop.popularity[kept], item_ids=shop.items[kept], **QUICK,
    )  # fmt: skip
    by_user = [silent[shop.users == user].mean() for user in range(30)]
    assert found.abstained.mean == pytest.approx(np.mean(by_user)) and rest.abstained.mean == 0
    assert (found.rows, found.users, rest.rows, rest.users) == (360, 30, kept.sum(), 29)
    for name in ("tau", "tau_within", "spearman", "kappa", "self_consistency", "verbosity_bias", "popularity_bias"):
        assert getattr(found, name) == getattr(rest, name), name
    assert found.ece.error == rest.ece.error and found.ece.bins.rows.sum() == (kept & (shop.users != 3)).sum()


def test_nobody_answers():
    shop = Shop(9, users=5)
    pairs = pairs_within_users(shop.stars, shop.users)
    nothing = np.full(len(pairs), np.nan)
    found = shop.report(
        Judgements(np.full((60, 2), np.nan), pairs, nothing, nothing), probability=np.full(60, 0.5), **QUICK
    )
    assert found.abstained.mean == 1 and found.pairs_abstained.mean == 1
    for name in ("tau", "tau_within", "spearman", "kappa", "self_consistency", "position_bias", "inconsistency"):
        assert math.isnan(getattr(found, name).mean), name
    assert math.isnan(found.ece.error.mean) and math.isnan(found.ece_calibrated.by_chance)
    assert math.isnan(found.verbosity_bias.slope.mean)
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert plain["tau"]["mean"] is None and plain["ece"]["bins"]["rows"] == [0] * 10


def test_one_user_has_figures_and_no_intervals():
    shop = Shop(10, users=1, each=40)
    found = shop.report(shop.stars + np.arange(40) / 40, **QUICK)
    assert found.tau.mean > 0.8 and found.tau_within.mean == found.tau.mean
    assert math.isnan(found.tau.low) and math.isnan(found.tau_within.high)
    assert math.isnan(found.kappa.mean) and math.isnan(found.ece_calibrated.error.mean)  # nobody else to calibrate on
    assert found.verbosity_bias.slope.low < found.verbosity_bias.slope.high  # over items


def test_constant_judges_and_constant_stars():
    shop = Shop(11, users=20)
    same = shop.report(np.full(240, 0.1), **QUICK)
    assert math.isnan(same.tau.mean) and math.isnan(same.tau_within.mean) and same.kappa.mean == 0
    assert same.verbosity_bias.slope.mean == pytest.approx(0, abs=1e-12)
    stars = np.full(240, 4.0)
    found = judge_report(np.arange(240.0), stars, shop.users, text_length=shop.length, **QUICK)
    assert math.isnan(found.spearman.mean) and math.isnan(found.kappa.mean)
    assert found.ece_calibrated.error.mean == 0 and np.isfinite(found.verbosity_bias.slope.mean)


def test_a_judge_of_pairs_alone():
    class First:
        def prefer(self, histories, first, second):
            return np.ones(len(first))

    shop = Shop(12, users=10)
    pairs = pairs_within_users(shop.stars, shop.users, most=4)
    found = shop.report(First(), histories=shop.users, items=shop.rows, pairs=pairs, **QUICK)
    assert (found.position_bias.mean, found.inconsistency.mean, found.pairwise_accuracy.mean) == (0.5, 1, 0.5)
    assert found.tau is None and found.abstained is None and found.ece_calibrated is None


def test_accuracy_of_pairs_by_hand():
    stars, users = np.array([5.0, 1, 3, 3, 4]), np.array([0, 0, 0, 1, 1])
    pairs = [[0, 1], [1, 2], [3, 4], [3, 3]]
    # Right in both orders; right, then neither; no answer in one order; equal stars, so neither is right.
    judged = Judgements(pairs=pairs, forward=[0.9, 0.0, 1.0, 1.0], backward=[0.2, 0.5, np.nan, 0.0])
    found = judge_report(judged, stars, users, **QUICK)
    assert found.pairwise_accuracy.mean == pytest.approx((1 + 3 / 4) / 2) and found.pairwise_accuracy.users == 1
    assert found.pairs_abstained.mean == pytest.approx((0 + 1 / 2) / 2)
    assert found.position_bias.mean == pytest.approx(((0.05 - 0.25) / 2 + 0) / 2)
    assert found.inconsistency.mean == pytest.approx((1 / 2 + 0) / 2)


def test_the_report_is_ready_for_json_and_repeats_by_seed():
    shop = Shop(13, users=12)
    judge = {"histories": shop.users, "items": shop.rows, "pairs": pairs_within_users(shop.stars, shop.users)}
    texts = []
    for seed in (4, 4, 5):
        planted = shop.planted(noise=0.5, seed=1)
        found = shop.report(planted, **judge, repeats=2, probability=np.full(144, 0.5), seed=seed, **QUICK)
        texts.append(json.dumps(found.to_dict(), allow_nan=False))
    assert texts[0] == texts[1] != texts[2]
    plain = json.loads(texts[0])
    assert plain["tau"] == vars(found.tau) | {key: plain["tau"][key] for key in ("low", "high")}
    assert len(plain["ece"]["bins"]["probability"]) == 10 and plain["ece"]["bins"]["probability"][0] is None
    assert set(plain["verbosity_bias"]) == {"slope", "standardised"}


def test_a_judge_is_asked_every_question_once_and_both_ways():
    asked = []

    class Recorder:
        def score(self, histories, items):
            asked.append(("score", list(histories), list(items)))
            return np.full(len(items), float(len(asked)))

        def prefer(self, histories, first, second):
            asked.append(("prefer", list(histories), list(first), list(second)))
            return np.full(len(first), len(asked) / 10)

    judge = Recorder()
    assert isinstance(judge, Judge) and isinstance(judge, PairwiseJudge)
    found = ask_judge(judge, ["h", "g", "i"], ["a", "b", "c"], pairs=[[1, 0], [2, 2]], repeats=2)
    assert asked == [
        *[("score", ["h", "g", "i"], ["a", "b", "c"])] * 2,
        ("prefer", ["g", "i"], ["b", "c"], ["a", "c"]),
        ("prefer", ["g", "i"], ["a", "c"], ["b", "c"]),
    ]
    assert found.scores.tolist() == [[1, 2]] * 3
    assert (found.forward.tolist(), found.backward.tolist()) == ([0.3, 0.3], [0.4, 0.4])
    assert ask_judge(judge, ["h"], ["a"]).scores.shape == (1,) and ask_judge(judge, ["h"], ["a"]).pairs is None


def test_a_judge_that_cannot_is_refused():
    class Mute:
        pass

    class Short:
        def score(self, histories, items):
            return np.zeros(1)

    class Pairs:
        def prefer(self, histories, first, second):
            return np.zeros((len(first), 1))

    for judge, options, kind, message in (
        (Mute(), {}, TypeError, "judge must have a method score, or prefer and pairs to compare, got Mute"),
        (Pairs(), {}, TypeError, "or prefer and pairs to compare, got Pairs"),
        (Short(), {"pairs": [[0, 1]]}, TypeError, "judge must have a method prefer to be asked about pairs, got Short"),
        (Short(), {}, ValueError, r"judge.score must return \(2,\), got shape \(1,\)"),
        (Pairs(), {"pairs": [[0, 1]]}, ValueError, r"judge.prefer must return \(1,\), got shape \(1, 1\)"),
        (Pairs(), {"pairs": [[0, 2]]}, ValueError, r"pairs must lie in \[0, 2\), got 0 to 2"),
        (Pairs(), {"pairs": [0, 1]}, ValueError, r"pairs must be integers \[p, 2\]"),
        (Pairs(), {"pairs": [[0.0, 1.0]]}, ValueError, "pairs must be integers .* got float64"),
        (Short(), {"repeats": 0}, ValueError, "repeats must be at least 1, got 0"),
    ):
        with pytest.raises(kind, match=message):
            ask_judge(judge, ["h", "h"], ["a", "b"], **options)
    with pytest.raises(ValueError, match="histories and items must have one length, got 1 and 2"):
        ask_judge(Short(), ["h"], ["a", "b"])


def test_pairs_are_of_one_user_with_different_stars_each_once():
    stars = np.array([1.0, 2, 2, 5, 3, 3, 4, 1])
    users = np.array(["x", "x", "x", "x", "y", "y", "z", "x"])
    every = pairs_within_users(stars, users, most=99)
    expected = {(0, 1), (0, 2), (0, 3), (1, 3), (2, 3), (1, 7), (2, 7), (3, 7)}
    assert len(every) == 8 and {tuple(sorted(pair)) for pair in every.tolist()} == expected
    drawn = [pairs_within_users(stars, users, most=3, seed=seed) for seed in range(300)]
    assert all(len(pairs) == 3 and len({tuple(sorted(pair)) for pair in pairs.tolist()}) == 3 for pairs in drawn)
    both = np.concatenate(drawn)
    assert {tuple(sorted(pair)) for pair in both.tolist()} == expected
    assert 0.45 < (stars[both[:, 0]] > stars[both[:, 1]]).mean() < 0.55  # the better one stands first half of the time
    assert (drawn[4] == pairs_within_users(stars, users, most=3, seed=4)).all()
    assert pairs_within_users([], []).shape == pairs_within_users([1.0, 1.0], [0, 0]).shape == (0, 2)
    with pytest.raises(ValueError, match=r"stars and users must both be \[n\], got shapes \(2,\) and \(1,\)"):
        pairs_within_users([1.0, 2.0], [0])
    with pytest.raises(ValueError, match="most must be at least 1, got 0"):
        pairs_within_users([1.0, 2.0], [0, 0], most=0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "judgements need scores, or pairs with forward and backward"),
        ({"pairs": [[0, 1]], "forward": [1.0]}, "judgements need scores, or pairs with forward and backward"),
        ({"scores": [1.0], "backward": [1.0]}, "judgements need scores, or pairs with forward and backward"),
        ({"scores": np.zeros((2, 2, 2))}, r"scores must be \[n\] or \[n, R\] with R >= 1, got shape \(2, 2, 2\)"),
        ({"scores": np.zeros((2, 0))}, r"got shape \(2, 0\)"),
        ({"scores": [np.inf, 1.0]}, "scores must be finite, or NaN for no answer, got 1 infinite"),
        ({"pairs": [[0, 1]], "forward": [1.1], "backward": [0.0]}, r"forward must lie in \[0, 1\]"),
        (
            {"pairs": [[0, 1]], "forward": [1.0], "backward": [0.0, 1.0]},
            r"backward must .* be \(1,\), got shape \(2,\)",
        ),
        ({"pairs": [[0, -1]], "forward": [1.0], "backward": [0.0]}, r"pairs must lie in \[0, n\), got -1 to 0"),
    ],
)
def test_judgements_that_do_not_fit_together_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        Judgements(**given)


PAIR = Judgements(pairs=[[0, 2]], forward=[1.0], backward=[0.0])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"stars": []}, r"stars must be \[n\], finite and not empty, got shape \(0,\)"),
        ({"stars": [1.0, np.nan, 5.0]}, "stars must be .* finite"),
        ({"users": [0, 1]}, r"users must be \(3,\) like stars, got shape \(2,\)"),
        ({"judge": np.zeros(2)}, "scores must have a row for each of 3 stars, got 2"),
        ({"judge": PAIR}, r"pairs must be rows of one user, got rows \[0, 2\] of two"),
        ({"judge": Judgements(pairs=[[0, 3]], forward=[1.0], backward=[0.0])}, r"pairs must lie in \[0, 3\), got 3"),
        ({"probability": [0.1, 0.2, 1.5]}, r"probability must be finite and lie in \[0, 1.0\], got 1.5"),
        ({"probability": [0.1]}, r"probability must be \(3,\) like stars, got shape \(1,\)"),
        ({"text_length": [1.0, np.nan, 3.0]}, r"text_length must be finite and lie in \[0, inf\], got nan"),
        ({"popularity": [1.0, -2.0, 3.0]}, r"popularity must be finite and lie in \[0, inf\], got -2.0"),
        ({"item_ids": [1]}, r"item_ids must be \(3,\) like stars, got shape \(1,\)"),
        ({"levels": [1, 5]}, r"stars must hold levels of \[1.0, 5.0\], got 3.0"),
        ({"levels": [5, 3, 1]}, "levels must be finite numbers, ascending"),
        ({"liked": 6.0}, "liked must be stars that can be given, at most 5.0, got 6.0"),
        ({"folds": 1}, "folds must be at least 2, got 1"),
        ({"bins": 0}, "bins must be at least 1, got 0"),
        ({"resamples": 10}, "resamples must be at least 100, got 10"),
        ({"level": 1.0}, r"level must lie in \(0, 1\), got 1.0"),
        ({"histories": [0, 0, 1]}, "histories, items, pairs and repeats are for a judge that is yet to be asked"),
        ({"repeats": 2}, "are for a judge that is yet to be asked"),
        ({"judge": PlantedJudge(lambda h, i: i)}, "histories and items must be given for a judge that is yet to be"),
    ],
)
def test_bad_input_is_named(changed, message):
    arguments = {"judge": np.array([1.0, 2.0, 3.0]), "stars": [1.0, 3.0, 5.0], "users": [0, 0, 1], **QUICK} | changed
    with pytest.raises(ValueError, match=message):
        judge_report(arguments.pop("judge"), arguments.pop("stars"), arguments.pop("users"), **arguments)
