from __future__ import annotations

import numpy as np
import pytest

from mmrec.evaluation import Split, candidate_sets, compare, evaluate
from mmrec.evaluation.ragged import Ragged

ITEMS = 30


def a_split(users: int = 12) -> Split:
    random = np.random.default_rng(0)
    rows = [random.permutation(ITEMS)[: 3 + u % 4].tolist() for u in range(users)]
    rows[5] = rows[5][:1]  # no history
    parts = [[row[:-2] for row in rows], [row[-2:-1] for row in rows], [row[-1:] for row in rows]]
    return Split("S", users, ITEMS, *map(Ragged.from_lists, parts), origin="by hand")


def had_by(split: Split, user: int) -> set[int]:
    parts = (split.train, split.valid, split.test)
    return {int(i) for part in parts for i in part.ids[part.offsets[user] : part.offsets[user + 1]]}


def test_the_target_stands_among_items_that_the_user_never_had() -> None:
    split = a_split()
    sets = candidate_sets(split, negatives=6, seed=3)
    assert sets.items.shape == (len(split.users("test")), 7) and 5 not in sets.users
    for user, items, target in zip(sets.users, sets.items, sets.target, strict=True):
        had = had_by(split, user)
        assert target == split.test.ids[split.test.offsets[user]] and target in items
        assert not had & (set(items.tolist()) - {target}) and len(set(items.tolist())) == 7
        assert (np.diff(items) > 0).all()


def test_every_other_item_is_as_likely_and_places_say_nothing() -> None:
    split = a_split()
    counts = np.zeros(ITEMS)
    places = []
    for seed in range(1500):
        sets = candidate_sets(split, negatives=6, seed=seed, most_users=None)
        row = sets.items[0]
        counts[row[row != sets.target[0]]] += 1
        places.append(int(np.argmax(row == sets.target[0])))
    user = candidate_sets(split, negatives=6).users[0]
    had = had_by(split, user)
    free = np.array([i not in had for i in range(ITEMS)])
    expected = 1500 * 6 / free.sum()
    assert (np.abs(counts[free] - expected) < 5 * expected**0.5).all() and not counts[~free].any()
    assert len(set(places)) > 3


def test_a_users_candidates_do_not_depend_on_who_else_is_asked() -> None:
    split = a_split()
    whole, few = candidate_sets(split, negatives=4, seed=1), candidate_sets(split, negatives=4, seed=1, most_users=5)
    assert len(few.users) == 5 and set(few.users) <= set(whole.users)
    at = np.searchsorted(whole.users, few.users)
    assert (whole.items[at] == few.items).all() and whole.id != few.id
    assert candidate_sets(split, negatives=4, seed=1).id == whole.id
    assert candidate_sets(split, negatives=4, seed=2).id != whole.id


def test_rank_auc_and_metrics_by_hand() -> None:
    sets = candidate_sets(a_split(), negatives=4, seed=0, most_users=3)
    place = np.argmax(sets.items == sets.target[:, None], axis=1)
    scores = np.zeros((3, 5))
    scores[0, place[0]] = 1.0  # first
    scores[1] = 1.0
    scores[1, place[1]] = 0.0  # last
    ranked = sets.rank(scores)
    assert ranked[0, 0] == sets.target[0] and ranked[1, -1] == sets.target[1]
    assert ranked[2].tolist() == sets.items[2].tolist(), "ties go to the lower item row"
    assert sets.auc(scores).tolist() == [1.0, 0.0, 0.5]
    result = sets.evaluate(scores, model="m", dataset="d", fingerprint="f", metrics=("HR@1", "MRR@5"))
    assert result.rows["all"].values["HR@1"].tolist() == [1.0, 0.0, float(place[2] == 0)]
    assert result.rows["all"].values["MRR@5"].tolist() == [1.0, 0.2, 1 / (1 + place[2])]
    assert result.protocol == "C" and result.split == sets.id


def test_chance_level() -> None:
    sets = candidate_sets(a_split(400), negatives=20, seed=0)
    scores = np.random.default_rng(1).normal(size=sets.items.shape)
    assert abs(sets.auc(scores).mean() - 0.5) < 0.05
    hit = sets.evaluate(scores, model="m", dataset="d", fingerprint="f").metrics["HR@1"]
    assert abs(hit - 1 / 21) < 4 * (1 / 21 / 400) ** 0.5


def test_it_is_never_compared_with_a_full_ranking() -> None:
    split = a_split()
    sets = candidate_sets(split, negatives=20)
    scores = np.random.default_rng(0).normal(size=sets.items.shape)
    drawn = sets.evaluate(scores, model="m", dataset="d", fingerprint="f", metrics=("HR@10",))

    def ranker(split: Split, stage: str, k: int, **_: object) -> np.ndarray:
        return np.tile(np.arange(k), (len(split.users("test")), 1))

    full = evaluate(ranker, split, model="m", dataset="d", fingerprint="f", metrics=("HR@10",), groups=False)
    with pytest.raises(ValueError, match="differ in protocol"):
        compare(drawn, full, "HR@10")


def test_bad_arguments() -> None:
    split = a_split()
    with pytest.raises(ValueError, match="negatives must be at least 1, got 0"):
        candidate_sets(split, negatives=0)
    with pytest.raises(ValueError, match=r"negatives must be at most \d+, what user row \d+ never had, got 29"):
        candidate_sets(split, negatives=29)
    sets = candidate_sets(split, negatives=4)
    with pytest.raises(ValueError, match=r"scores must be \[\d+, 5\], got \[2, 5\]"):
        sets.rank(np.zeros((2, 5)))
    nan = np.zeros(sets.items.shape)
    nan[1, 2] = np.nan
    with pytest.raises(ValueError, match=f"scores of user row {sets.users[1]} hold NaN"):
        sets.auc(nan)
    with pytest.raises(ValueError, match="at most the 5 candidates, got depth 10"):
        sets.evaluate(np.zeros(sets.items.shape), model="m", dataset="d", fingerprint="f")
