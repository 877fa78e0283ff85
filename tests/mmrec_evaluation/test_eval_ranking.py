"""Rankings against a full sort of the score matrix."""

import numpy as np
import pytest
import torch

from mmrec.evaluation.protocols import labelled, leave_last_out
from mmrec.evaluation.ranking import rank, rank_scores


def random_split(seed=0, users=30, items=25):
    rng = np.random.default_rng(seed)
    rows = [rng.choice(items, size=rng.integers(3, 9), replace=False) for _ in range(users)]
    user = np.repeat(np.arange(users), [len(row) for row in rows])
    return leave_last_out(user, np.concatenate(rows), users, items)


def by_sorting(scores, split, stage, k, mask=None, candidates=None):
    """The whole matrix, one user at a time: score descending, then item row."""
    hidden = split.mask(stage, mask)
    result = np.full((len(scores), k), -1)
    for row, user in enumerate(split.users(stage)):
        allowed = set(range(split.num_items) if candidates is None else np.asarray(candidates).tolist())
        allowed -= set(hidden[user].tolist())
        order = sorted((i for i in allowed if scores[row, i] > -np.inf), key=lambda i: (-scores[row, i], i))[:k]
        result[row, : len(order)] = order
    return result


# Small integers: exact in every dtype, and full of ties.
def integers(seed, *shape):
    return np.random.default_rng(seed).integers(-2, 3, size=shape).astype(np.float32)


@pytest.mark.parametrize("mask", [None, "none", "train", "train+valid"])
@pytest.mark.parametrize("batch_size", [1, 7, 1024])
def test_vectors_rank_as_a_full_sort(mask, batch_size):
    split = random_split()
    query, items, bias = integers(1, 30, 4), integers(2, 25, 4), integers(3, 25)
    ranked = rank(query, items, split, "test", 10, mask=mask, bias=bias, batch_size=batch_size)
    assert ranked.dtype == np.int32
    np.testing.assert_array_equal(ranked, by_sorting(query @ items.T + bias, split, "test", 10, mask))


@pytest.mark.parametrize("stage", ["valid", "test"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("lazily", [False, True])
def test_scores_rank_as_a_full_sort(stage, dtype, lazily):
    split = random_split()
    scores = integers(4, 30, 25).astype(dtype)
    given = (lambda users: scores[users]) if lazily else scores
    ranked = rank_scores(given, split, stage, 10, batch_size=8)
    np.testing.assert_array_equal(ranked, by_sorting(scores, split, stage, 10))


def test_scores_keep_differences_that_float32_would_lose():
    split = random_split()
    scores = 1 + np.random.default_rng(0).permutation(30 * 25).reshape(30, 25) * 1e-12
    np.testing.assert_array_equal(rank_scores(scores, split, "test", 10), by_sorting(scores, split, "test", 10))


def test_minus_infinity_takes_an_item_out():
    split = random_split()
    scores = integers(4, 30, 25)
    scores[:, ::2] = -np.inf
    ranked = rank_scores(scores, split, "test", 25)
    np.testing.assert_array_equal(ranked, by_sorting(scores, split, "test", 25))
    assert (ranked[ranked >= 0] % 2 == 1).all() and (ranked == -1).any()


@pytest.mark.parametrize("candidates", [[3, 1, 20, 7, 8, 9], [5], []])
def test_candidates_restrict_the_ranking(candidates):
    split = random_split()
    query, items = integers(1, 30, 4), integers(2, 25, 4)
    wanted = by_sorting(query @ items.T, split, "test", 4, candidates=candidates)
    chosen = np.array(candidates, int)
    np.testing.assert_array_equal(rank(query, items, split, "test", 4, candidates=chosen), wanted)
    np.testing.assert_array_equal(rank_scores(query @ items.T, split, "test", 4, candidates=chosen), wanted)


def test_tensors_and_quantised_items_are_taken():
    split = random_split()
    query, items = torch.from_numpy(integers(1, 30, 4)), torch.from_numpy(integers(2, 25, 4))
    wanted = by_sorting((query @ items.T).numpy(), split, "test", 10)
    np.testing.assert_array_equal(rank(query, items, split, "test", 10), wanted)
    quantised = rank(query, items.to(torch.int8), split, "test", 10, item_scales=torch.ones(25))
    np.testing.assert_array_equal(quantised, wanted)
    np.testing.assert_array_equal(rank(query.bfloat16(), items.bfloat16(), split, "test", 10), wanted)


def test_more_places_than_items_end_in_minus_one():
    split = random_split()
    query, items = integers(1, 30, 4), integers(2, 25, 4)
    ranked = rank(query, items, split, "test", 40)
    assert ((ranked >= 0).sum(axis=1) == 25 - split.mask("test").lengths).all()
    np.testing.assert_array_equal(ranked, by_sorting(query @ items.T, split, "test", 40))


def test_a_row_per_evaluated_user_not_per_user():
    # User 1 only trains: query row 1 belongs to user 2.
    split = leave_last_out(np.array([0] * 3 + [1] * 2 + [2] * 3), np.array([0, 1, 2, 0, 1, 2, 1, 0]), 3, 5)
    query = np.array([[1.0, 0.0], [0.0, 1.0]])
    items = np.array([[0, 0], [0, 0], [0, 0], [1.0, 0], [0, 1.0]])
    assert rank(query, items, split, "test", 1).tolist() == [[3], [4]]


def test_the_general_protocol_leaves_validation_items_in_the_list():
    split = labelled(np.zeros(3, int), np.arange(3), np.array([0, 1, 2]), 1, 4)
    scores = np.array([[9.0, 8.0, 7.0, 6.0]])
    assert rank_scores(scores, split, "test", 3).tolist() == [[1, 2, 3]]
    assert rank_scores(scores, split, "test", 3, mask="train+valid").tolist() == [[2, 3, -1]]


def test_bad_input_is_named():
    split = random_split()
    query, items = integers(1, 30, 4), integers(2, 25, 4)
    with pytest.raises(ValueError, match=r"query must be \[30, D\]"):
        rank(query[:3], items, split, "test", 5)
    with pytest.raises(ValueError, match=r"items must be \[25, D\]"):
        rank(query, items[:3], split, "test", 5)
    with pytest.raises(ValueError, match=r"bias must be \[25\]"):
        rank(query, items, split, "test", 5, bias=np.zeros(3, np.float32))
    with pytest.raises(ValueError, match="k must be at least 1"):
        rank(query, items, split, "test", 0)
    with pytest.raises(ValueError, match=r"candidates must lie in \[0, 25\)"):
        rank(query, items, split, "test", 5, candidates=np.array([25]))
    with pytest.raises(TypeError, match="candidates must be item rows"):
        rank(query, items, split, "test", 5, candidates=np.array([0.5]))
    with pytest.raises(ValueError, match=r"scores must be \(30, 25\)"):
        rank_scores(np.zeros((3, 25)), split, "test", 5)
    with pytest.raises(ValueError, match=r"scores must return \(30, 25\)"):
        rank_scores(lambda users: np.zeros((1, 25)), split, "test", 5)
    broken = np.zeros((30, 25))
    broken[4, 3] = np.nan
    with pytest.raises(ValueError, match=f"NaN for user row {split.users('test')[4]}"):
        rank_scores(broken, split, "test", 5)
