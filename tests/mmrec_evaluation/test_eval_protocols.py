"""The splits, on cases small enough to write down."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmrec.evaluation.protocols import Split, general, global_time, labelled, leave_last_out, split
from mmrec.evaluation.ragged import Ragged


def pairs(*rows):
    user = np.array([u for u, items in enumerate(rows) for _ in items], int)
    return user, np.array([i for items in rows for i in items], int)


def test_leave_last_out_takes_the_last_two_and_leaves_short_users_to_training():
    parts = leave_last_out(*pairs([4, 2, 9, 7], [1, 0], [5, 6, 8], []), 4, 10)
    assert parts.train.to_lists() == [[4, 2], [1, 0], [5], []]
    assert parts.valid.to_lists() == [[9], [], [6], []]
    assert parts.test.to_lists() == [[7], [], [8], []]
    assert parts.users("test").tolist() == parts.users("valid").tolist() == [0, 2]


def test_leave_last_out_orders_by_time_then_item_row():
    user, item = np.array([0, 0, 0, 0]), np.array([7, 5, 1, 3])
    parts = leave_last_out(user, item, 1, 8, time=np.array([20, 30, 10, 30]))
    assert (parts.train.to_lists(), parts.valid.to_lists(), parts.test.to_lists()) == ([[1, 7]], [[3]], [[5]])


def test_leave_last_out_shows_the_validation_item_before_the_test_and_masks_it():
    parts = leave_last_out(*pairs([4, 2, 9, 7]), 1, 10)
    assert parts.history("valid").to_lists() == [[4, 2]]
    assert parts.history("test").to_lists() == [[4, 2, 9]]
    assert parts.mask("test").to_lists() == [[4, 2, 9]]
    assert parts.mask("test", "train").to_lists() == [[4, 2]]
    assert parts.mask("test", "none").to_lists() == [[]]
    assert parts.mask("valid").to_lists() == [[4, 2]]


@given(st.integers(1, 60), st.integers(0, 5))
def test_general_counts_follow_mmrec_rule(n, seed):
    parts = general(*pairs(range(n)), 1, 60, seed=seed)
    counts = [int(p.lengths[0]) for p in (parts.train, parts.valid, parts.test)]
    if n < 3:
        assert counts == [0, 0, 0] and parts.dropped_users == 1
        return
    held_out = 2 if n < 10 else int(0.2 * n)
    valid = 1 if n < 10 else held_out // 2
    assert counts == [n - held_out, valid, held_out - valid]
    assert sorted(parts.train[0].tolist() + parts.valid[0].tolist() + parts.test[0].tolist()) == list(range(n))


def test_general_is_random_in_the_seed_and_nothing_else():
    events = pairs(range(30), range(10, 40))
    first, again, other = (general(*events, 2, 40, seed=s) for s in (1, 1, 2))
    assert first.id == again.id
    assert first.id != other.id
    assert first.test.to_lists() != other.test.to_lists()


def test_general_takes_every_position_equally_often():
    # A rule that favoured late or early interactions would show: 2 of 20 positions are the test's.
    drawn = [general(*pairs(range(20)), 1, 20, seed=s).test[0].tolist() for s in range(600)]
    counts = np.bincount(np.concatenate(drawn), minlength=20)
    assert counts.sum() == 1200
    assert counts.min() > 60 - 5 * 8 and counts.max() < 60 + 5 * 8


def test_general_keeps_validation_items_out_of_the_model_and_in_the_ranking():
    parts = labelled(*pairs([1, 2, 3]), np.array([0, 1, 2]), 1, 4)
    assert parts.history("test").to_lists() == [[1]]
    assert parts.mask("test").to_lists() == [[1]]
    assert parts.mask("test", "train+valid").to_lists() == [[1, 2]]


def test_labels_are_followed_and_users_without_training_dropped():
    parts = labelled(*pairs([1, 2, 3], [4, 5]), np.array([1, 0, 2, 1, 2]), 2, 6)
    assert parts.train.to_lists() == [[2], []]
    assert (parts.valid.to_lists(), parts.test.to_lists()) == ([[1], []], [[3], []])
    assert parts.dropped_users == 1


def test_labels_travel_with_their_interaction_when_time_reorders_them():
    parts = labelled(np.array([0, 0, 0]), np.array([1, 2, 3]), np.array([2, 1, 0]), 1, 4, time=np.array([30, 20, 10]))
    assert (parts.train.to_lists(), parts.valid.to_lists(), parts.test.to_lists()) == ([[3]], [[2]], [[1]])


def test_global_time_cuts_everybody_at_the_same_moment():
    user = np.array([0] * 5 + [1] * 5)
    time = np.array([0, 2, 4, 6, 8, 1, 3, 5, 7, 9])
    parts = global_time(user, np.arange(10), time, 2, 10, quantiles=(0.6, 0.8))
    # Quantile .6 of 0…9 is 5.4, the next timestamp 6; .8 is 7.2, the next timestamp 8.
    assert parts.train.to_lists() == [[0, 1, 2], [5, 6, 7]]
    assert parts.valid.to_lists() == [[3], [8]]
    assert parts.test.to_lists() == [[4], [9]]
    assert parts.history("test").to_lists() == [[0, 1, 2, 3], [5, 6, 7, 8]]


def test_global_time_keeps_equal_timestamps_together_and_skips_users_without_a_past():
    user, time = np.array([0, 0, 0, 1]), np.array([1, 5, 5, 5])
    parts = global_time(user, np.arange(4), time, 2, 4, quantiles=(0.3, 0.5))
    assert parts.train.to_lists() == [[0], []]
    assert parts.test.to_lists() == [[1, 2], [3]]
    assert parts.users("test").tolist() == [0]


def test_cold_items_have_no_training_interaction():
    parts = leave_last_out(*pairs([0, 1, 2, 3], [0, 1, 4]), 2, 6)
    assert parts.popularity.tolist() == [2, 1, 0, 0, 0, 0]
    assert np.flatnonzero(parts.cold_items).tolist() == [2, 3, 4, 5]


def test_targets_that_the_mask_hides_are_counted():
    parts = leave_last_out(*pairs([3, 1, 2, 3], [0, 1, 2]), 2, 4)
    assert parts.unreachable("test") == 1
    assert parts.unreachable("test", "none") == 0


def test_relevant_is_a_set_per_evaluated_user():
    parts = labelled(*pairs([9, 5, 5, 3], [1], [2, 4]), np.array([0, 2, 2, 2, 0, 0, 2]), 3, 10)
    assert parts.users("test").tolist() == [0, 2]
    assert parts.relevant("test").to_lists() == [[3, 5], [4]]


def test_the_identity_changes_with_protocol_and_content():
    events = pairs([0, 1, 2, 3])
    assert leave_last_out(*events, 1, 4).id == leave_last_out(*events, 1, 4).id
    assert leave_last_out(*events, 1, 4).id != leave_last_out(*events, 1, 5).id
    assert leave_last_out(*events, 1, 4).id != leave_last_out(*pairs([0, 1, 3, 2]), 1, 4).id
    # The same parts under another protocol are shown to the model differently.
    assert leave_last_out(*events, 1, 4).id != labelled(*events, np.array([0, 0, 1, 2]), 1, 4).id


def catalogue(**events):
    events = {"user": np.zeros(4, int), "item": np.arange(4), "timestamp": None, "split": None} | events
    return SimpleNamespace(name="tiny", user_ids=["u"], item_ids=list("abcd"), interactions=SimpleNamespace(**events))


def test_split_reads_a_catalogue():
    assert split(catalogue(), "S").test.to_lists() == [[3]]
    assert split(catalogue(timestamp=np.array([4, 3, 2, 1])), "S").test.to_lists() == [[0]]
    stored = split(catalogue(split=np.array([2, 0, 0, 1], np.int8)), "G", seed=3)
    assert (stored.test.to_lists(), stored.valid.to_lists()) == ([[0]], [[3]])
    drawn = split(catalogue(), "G", seed=3)
    assert drawn.id == general(np.zeros(4, int), np.arange(4), 1, 4, seed=3).id
    late = split(catalogue(timestamp=np.arange(4)), "T", quantiles=(0.3, 0.6))
    assert (late.train.to_lists(), late.valid.to_lists(), late.test.to_lists()) == ([[0]], [[1]], [[2, 3]])


def test_bad_requests_are_named():
    parts = leave_last_out(*pairs([0, 1, 2]), 1, 3)
    with pytest.raises(ValueError, match="hide the very items"):
        parts.mask("valid", "train+valid")
    with pytest.raises(ValueError, match="mask must be"):
        parts.mask("test", "all")
    with pytest.raises(ValueError, match="stage must be"):
        parts.users("train")
    with pytest.raises(ValueError, match="needs timestamps, and 'tiny' has none"):
        split(catalogue(), "T")
    with pytest.raises(ValueError, match="protocol must be 'S', 'G' or 'T', got 'C'"):
        split(catalogue(), "C")
    with pytest.raises(ValueError, match="0 < first < second < 1"):
        split(catalogue(timestamp=np.arange(4)), "T", quantiles=(0.9, 0.8))
    with pytest.raises(ValueError, match=r"item must lie in \[0, 2\)"):
        leave_last_out(*pairs([0, 1, 2]), 1, 2)
    with pytest.raises(ValueError, match=r"user must lie in \[0, 1\)"):
        leave_last_out(np.array([1]), np.array([0]), 1, 2)
    with pytest.raises(ValueError, match="time must have one entry"):
        leave_last_out(*pairs([0, 1, 2]), 1, 3, time=np.array([1]))
    with pytest.raises(ValueError, match="label must hold 0, 1 and 2"):
        labelled(*pairs([0, 1]), np.array([0, 3]), 1, 2)
    with pytest.raises(ValueError, match="valid has 1 rows for 2 users"):
        Split("S", 2, 3, Ragged.empty(2), Ragged.empty(1), Ragged.empty(2), "by hand")


def test_no_interactions_at_all():
    empty = np.empty(0, int)
    for parts in (leave_last_out(empty, empty, 0, 3), general(empty, empty, 2, 3, seed=0)):
        assert len(parts.users("test")) == 0
        assert len(parts.relevant("test")) == 0
        assert parts.cold_items.all()
