"""From rankings to a result: groups of items, and the figures beyond accuracy."""

import numpy as np
import pytest

from mmrec.evaluation.beyond import beyond_accuracy, coverage, gini, long_tail_share, novelty, popularity_groups
from mmrec.evaluation.evaluate import evaluate
from mmrec.evaluation.floors import item_knn, most_popular
from mmrec.evaluation.metrics import per_user
from mmrec.evaluation.protocols import leave_last_out
from mmrec.evaluation.ranking import rank_scores
from mmrec.evaluation.results import compare

# Training counts: item 0 three times, items 1 and 2 once each. Targets: 3 and 5 (cold), 1 and 0 (warm).
USERS = [[0, 1, 6, 3], [0, 2, 6, 1], [0, 7, 5], [4, 7, 0]]


@pytest.fixture
def tiny():
    user = np.repeat(np.arange(4), [len(row) for row in USERS])
    return leave_last_out(user, np.concatenate(USERS), 4, 8)


def by_scores(scores):
    return lambda split, stage, k, mask=None, candidates=None: rank_scores(
        scores, split, stage, k, mask=mask, candidates=candidates
    )


def run(ranker, split, **options):
    return evaluate(
        ranker, split, model="m", dataset="tiny", fingerprint="f", **({"metrics": ["HR@2", "MRR@2"]} | options)
    )


def test_groups_hold_the_users_whose_target_is_in_them(tiny):
    assert tiny.popularity.tolist() == [3, 1, 1, 0, 1, 0, 0, 0]
    found = run(by_scores(np.zeros((4, 8))), tiny)
    assert {name: row.users.tolist() for name, row in found.rows.items()} == {
        "all": [0, 1, 2, 3],
        "warm": [1, 3],
        "head": [3],
        "middle": [1],
        "cold-among-all": [0, 2],
        "cold-among-cold": [0, 2],
    }


def test_cold_among_all_competes_with_warm_items_and_cold_among_cold_does_not(tiny):
    # Warm items score 10 and up; among the cold ones (3, 5, 6, 7) item 3 leads.
    scores = np.tile(np.array([14.0, 13, 12, 3, 11, 2, 1, 0]), (4, 1))
    found = run(by_scores(scores), tiny)
    assert found.rows["cold-among-all"].values["HR@2"].tolist() == [0, 0]
    # User 0 has seen 6: 3 is first. User 2 has seen 7: 3, then 5.
    assert found.rows["cold-among-cold"].values["MRR@2"].tolist() == [1, 0.5]
    # Without a mask nothing changes here for user 0; the result says which mask it used.
    assert found.mask == "train+valid"
    assert run(by_scores(scores), tiny, mask="none").mask == "none"


def test_the_row_all_is_what_the_metrics_say(tiny):
    found = run(most_popular, tiny, metrics=["NDCG@5", "NDCG-ngcf7@5"])
    expected = per_user(most_popular(tiny, "test", 7), tiny.relevant("test"), ["NDCG@5", "NDCG-ngcf7@5"])
    for name, column in expected.items():
        np.testing.assert_array_equal(found.rows["all"].values[name], column)
    assert (found.protocol, found.split, found.stage, found.seed) == ("S", tiny.id, "test", None)
    assert set(found.beyond_accuracy) == {"Coverage@5", "Gini@5", "Novelty@5", "LongTail@5"}


def test_two_models_on_one_split_compare(tiny):
    assert compare(run(most_popular, tiny), run(item_knn, tiny), "HR@2").users == 4


def test_without_groups_there_is_one_row_and_one_ranking(tiny):
    calls = []

    def ranker(split, stage, k, mask=None, candidates=None):
        calls.append(candidates)
        return most_popular(split, stage, k, mask=mask, candidates=candidates)

    assert list(run(ranker, tiny, groups=False).rows) == ["all"]
    assert calls == [None]


def test_a_ranker_of_the_wrong_shape_is_named(tiny):
    with pytest.raises(ValueError, match=r"ranker must return \(4, 2\), got \(4, 1\)"):
        run(lambda *args, **options: np.zeros((4, 1), int), tiny)
    with pytest.raises(ValueError, match="at least one metric"):
        run(most_popular, tiny, metrics=[])


RANKED = np.array([[0, 1, 2], [0, 1, -1], [0, 3, -1]])


def test_coverage_counts_distinct_items():
    assert coverage(RANKED, 8) == 4 / 8


def test_gini_by_its_definition_as_mean_difference():
    shown = np.array([3, 2, 1, 1, 0, 0, 0, 0])
    pairs = np.abs(shown[:, None] - shown[None, :]).sum() / (2 * len(shown) ** 2 * shown.mean())
    assert gini(RANKED, 8) == pytest.approx(pairs)
    assert gini(np.array([[0], [1], [2]]), 3) == 0
    assert gini(np.array([[5]]), 100) == pytest.approx(0.99)


def test_novelty_is_the_mean_self_information():
    # 8 of 16 users: 1 bit; 1 of 16: 4 bits; never trained on counts as once: 4 bits.
    assert novelty(np.array([[0, 1, 2]]), np.array([8, 1, 0]), 16) == pytest.approx(3.0)


def test_long_tail_is_what_the_popular_items_leave():
    popularity = np.array([60, 20, 10, 6, 4, 0])
    # Items 0 and 1 hold 80 %.
    assert long_tail_share(np.array([[0, 1, 2, 5]]), popularity) == 0.5
    assert long_tail_share(np.array([[0, 1, 2, 5]]), popularity, head=0.5) == 0.75


def test_popularity_groups_hold_a_third_each():
    groups = popularity_groups(np.array([3, 5, 3, 1, 0, 3]))
    # In order of popularity 1, 0, 2, 5, 3 with 5, 3, 3, 3, 1 of 15: the third is reached by item 1 alone.
    assert {name: np.flatnonzero(mask).tolist() for name, mask in groups.items()} == {
        "head": [1],
        "middle": [0, 2],
        "tail": [3, 5],
    }


@pytest.mark.parametrize("counts", [[1] * 9, [7, 7, 7], [100, 1, 1], [1, 0], [0, 0]])
def test_popularity_groups_part_the_warm_items(counts):
    counts = np.array(counts)
    groups = list(popularity_groups(counts).values())
    assert (np.sum(groups, axis=0) == (counts > 0)).all()
    if counts.min() == counts.max() > 0:
        assert [int(mask.sum()) for mask in groups] == [len(counts) // 3] * 3


def test_nothing_shown_has_no_figures():
    nothing = np.full((2, 3), -1)
    values = beyond_accuracy(nothing, np.ones(4), 2, (3,))
    assert values.pop("Coverage@3") == 0
    assert all(np.isnan(value) for value in values.values())


def test_a_cut_off_deeper_than_the_lists_is_named():
    with pytest.raises(ValueError, match="cut-off 10 is deeper"):
        beyond_accuracy(RANKED, np.ones(4), 2)
    with pytest.raises(ValueError, match=r"share must lie in \(0, 1\]"):
        long_tail_share(RANKED, np.ones(4), head=0.0)
