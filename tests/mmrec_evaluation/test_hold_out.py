"""Items made cold on purpose."""

from __future__ import annotations

import numpy as np
import pytest

from mmrec.evaluation import Ragged, hold_out_items
from mmrec.evaluation.protocols import Split


@pytest.fixture
def whole() -> Split:
    rng = np.random.default_rng(0)
    parts = [Ragged.from_lists([rng.integers(0, 40, n).tolist() for _ in range(50)]) for n in (6, 1, 1)]
    return Split("S", 50, 41, *parts, origin="made")


def test_held_items_leave_training_and_validation_only(whole):
    cold = hold_out_items(whole, 0.2, seed=3)
    held = np.flatnonzero((whole.popularity > 0) & (cold.popularity == 0))
    assert len(held) == round(0.2 * (whole.popularity > 0).sum())
    assert not np.isin(cold.train.ids, held).any() and not np.isin(cold.valid.ids, held).any()
    assert cold.test.to_lists() == whole.test.to_lists()
    for before, after in ((whole.train, cold.train), (whole.valid, cold.valid)):
        assert after.to_lists() == [[i for i in row if i not in set(held)] for row in before.to_lists()]
    assert cold.cold_items[held].all() and cold.num_items == whole.num_items


def test_choice_is_seeded_and_marks_the_split(whole):
    same, other = hold_out_items(whole, 0.2, seed=3), hold_out_items(whole, 0.2, seed=4)
    assert hold_out_items(whole, 0.2, seed=3).id == same.id != other.id != whole.id
    assert "held out of training (share 0.2, seed 3)" in same.origin


@pytest.mark.parametrize("share", (0.0, 1.0, -0.1))
def test_share_is_checked(whole, share):
    with pytest.raises(ValueError, match="share must be in"):
        hold_out_items(whole, share)
