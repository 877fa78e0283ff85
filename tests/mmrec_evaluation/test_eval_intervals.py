"""The bootstrap: against exact enumeration, against theory, and its refusals."""

import itertools

import numpy as np
import pytest

from mmrec.evaluation.intervals import bootstrap, paired_bootstrap


def test_a_small_case_equals_the_enumeration_of_all_resamples():
    values = np.array([0.0, 1.0, 4.0, 10.0])
    exact = [np.mean(draw) for draw in itertools.product(values, repeat=4)]
    found = bootstrap(values, resamples=40_000, level=0.8)
    # The distribution is discrete; each quantile must lie between the exact ones a bit further in and out.
    assert np.quantile(exact, 0.085) <= found.low <= np.quantile(exact, 0.115)
    assert np.quantile(exact, 0.885) <= found.high <= np.quantile(exact, 0.915)
    assert found.mean == 3.75


def test_the_width_is_that_of_the_normal_approximation_for_many_users():
    values = np.random.default_rng(0).normal(2.0, 3.0, size=2000)
    found = bootstrap(values)
    half = 1.96 * values.std() / np.sqrt(2000)
    assert found.low == pytest.approx(values.mean() - half, abs=0.06 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.06 * half)
    assert found.users == 2000 and found.seeds == 1


def test_it_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(3)
    covered = 0
    for trial in range(300):
        found = bootstrap(rng.exponential(1.0, size=150), resamples=400, level=0.9, seed=trial)
        covered += found.low <= 1.0 <= found.high
    # Binomial with p = .9: standard deviation 5.2; percentile intervals of a skewed mean cover slightly less.
    assert 252 <= covered <= 288


def test_seeds_widen_the_interval():
    rng = np.random.default_rng(0)
    users = rng.normal(size=500)
    same = np.stack([users] * 5)
    shifted = users + np.array([-1.0, -0.5, 0.0, 0.5, 1.0])[:, None]
    width = {name: bootstrap(v).high - bootstrap(v).low for name, v in (("same", same), ("shifted", shifted))}
    alone = bootstrap(users)
    assert width["same"] == pytest.approx(alone.high - alone.low, rel=0.05)
    # Shifts of variance .5 drawn five times add .1 to a variance of 1/500.
    expected = 2 * 1.96 * np.sqrt(users.var() / 500 + 0.5 / 5)
    assert width["shifted"] == pytest.approx(expected, rel=0.05)


def test_pairing_removes_what_users_have_in_common():
    rng = np.random.default_rng(1)
    easy = rng.normal(0, 5, size=400)
    a, b = easy + 0.1 + rng.normal(0, 0.1, 400), easy + rng.normal(0, 0.1, 400)
    paired = paired_bootstrap(a, b)
    assert paired.excludes_zero and paired.low > 0
    assert paired.mean == pytest.approx((a - b).mean())
    assert not (bootstrap(a).low > bootstrap(b).high)
    reverse = paired_bootstrap(b, a)
    assert reverse.excludes_zero and reverse.high < 0


def test_one_model_without_seeds_stands_against_several_seeds():
    a, b = np.arange(12.0).reshape(3, 4), np.ones(4)
    assert paired_bootstrap(a, b).mean == pytest.approx(a.mean() - 1)
    assert paired_bootstrap(a, b).seeds == 3


def test_the_seed_fixes_the_bits_however_the_draws_are_cut(monkeypatch):
    values = np.random.default_rng(0).normal(size=50)
    assert bootstrap(values, seed=4) == bootstrap(values, seed=4)
    assert bootstrap(values, seed=4) != bootstrap(values, seed=5)
    whole = bootstrap(values, seed=4)
    monkeypatch.setattr("mmrec.evaluation.intervals._DRAWS_AT_ONCE", 1)
    assert bootstrap(values, seed=4) == whole


def test_a_constant_has_no_width():
    found = bootstrap(np.full((2, 7), 0.25))
    assert (found.mean, found.low, found.high) == (0.25, 0.25, 0.25)
    assert str(found) == "+0.2500 [+0.2500, +0.2500]"


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ([], {}, "not empty"),
        (np.zeros((2, 2, 2)), {}, r"\[users\] or \[seeds, users\]"),
        ([np.nan], {}, "finite"),
        ([1.0], {"resamples": 10}, "at least 100"),
        ([1.0], {"level": 1.0}, r"level must lie in \(0, 1\)"),
    ],
)
def test_bad_input_is_named(values, options, message):
    with pytest.raises(ValueError, match=message):
        bootstrap(np.array(values), **options)


@pytest.mark.parametrize(("a", "b"), [((3,), (4,)), ((2, 3), (3, 3)), ((2, 3), (2, 4))])
def test_unpaired_input_is_refused(a, b):
    with pytest.raises(ValueError, match="same users and seeds"):
        paired_bootstrap(np.zeros(a), np.zeros(b))
