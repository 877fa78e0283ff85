"""Every metric variant at every depth against ranx and against its definition, on random, tied and degenerate lists."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
from metric_oracle import DEPTHS, LONGEST, NAMES, best_first, defined

from mmrec.evaluation import evaluate, rank_scores
from mmrec.evaluation.metrics import Metric, evaluate_rankings, per_user
from mmrec.evaluation.protocols import Split
from mmrec.evaluation.ragged import Ragged

TOLERANCE = 1e-12  # float64 sums of at most 50 terms, added in another order

Case = tuple[list[list[int]], list[list[int]]]


def random_case(seed: int, users: int, items: int, most: int) -> Case:
    rng = np.random.default_rng(seed)
    ranked = [rng.permutation(items)[:LONGEST].tolist() for _ in range(users)]
    return ranked, [rng.choice(items, rng.integers(1, most + 1), replace=False).tolist() for _ in range(users)]


def tied_case(seed: int, users: int = 60, items: int = 90, steps: int = 3) -> Case:
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, steps, (users, items))
    relevant = [rng.choice(items, rng.integers(1, 8), replace=False).tolist() for _ in range(users)]
    return [best_first(row)[:LONGEST] for row in scores], relevant


def short_case(seed: int) -> Case:
    """From no candidate at all to one fewer than asked for."""
    rng = np.random.default_rng(seed)
    ranked = [rng.permutation(60)[:length].tolist() for length in range(LONGEST)]
    return ranked, [rng.choice(60, rng.integers(1, 30), replace=False).tolist() for _ in ranked]


CASES: dict[str, Case] = {
    "random": random_case(0, 80, 200, 60),
    "random, one target": random_case(1, 200, 60, 1),
    "random, dense": random_case(2, 80, 55, 55),
    "tied": tied_case(3),
    "tied, two steps": tied_case(4, steps=2),
    "all tied": tied_case(5, steps=1),
    "short lists": short_case(6),
    "none relevant in the list": ([[*range(LONGEST)]] * 3, [[50], [50, 99], [*range(50, 90)]]),
    "all of the list relevant": ([[*range(LONGEST)]] * 2, [[*range(LONGEST)], [*range(120)]]),
    "first and last place": ([[*range(LONGEST)]] * 11, [[d] for k in DEPTHS for d in (k - 1, k)] + [[0]]),
    "one user": ([[4, 2, 7]], [[7, 2]]),
    "one item": ([[0]], [[0]]),
    "one item, not wanted": ([[0]], [[1]]),
    "nothing ranked": ([[], []], [[0], [0, 1, 2]]),
    "targets named twice": ([[3, 1, 2, 0], [0, 5, 1]], [[1, 1, 1, 9, 9], [5, 5]]),
}


def padded(lists: list[list[int]]) -> np.ndarray:
    return np.array([row + [-1] * (LONGEST - len(row)) for row in lists], np.int32).reshape(len(lists), LONGEST)


RANX = {"HR": "hit_rate", "Recall": "recall", "Precision": "precision", "MRR": "mrr", "NDCG": "ndcg", "MAP-all": "map"}


@pytest.fixture(scope="module")
def ask_ranx() -> Callable[[Sequence[str], Case], dict[str, np.ndarray]]:
    """``ask_ranx(names, case)``: per metric that ranx has, one value per user."""
    ranx = pytest.importorskip("ranx", reason="the oracle ranx is not installed")

    def ask(names: Sequence[str], case: Case) -> dict[str, np.ndarray]:
        theirs = [f"{RANX[name.partition('@')[0]]}@{name.partition('@')[2]}" for name in names]
        truth = ranx.Qrels({f"u{u:03d}": {str(i): 1 for i in set(row)} for u, row in enumerate(case[1])})
        # Scores fall with the place: ties are broken before ranx sees the lists. An item that nobody wants stands for
        # an empty list, which ranx does not take.
        run = ranx.Run(
            {
                f"u{u:03d}": {str(i): 1 - r / 1000 for r, i in enumerate(row)} or {"nothing": 1.0}
                for u, row in enumerate(case[0])
            }
        )
        found = ranx.evaluate(truth, run, [*theirs, "hit_rate@50"], return_mean=False)  # of one alone, no dict
        return {name: np.asarray(found[other], np.float64) for name, other in zip(names, theirs, strict=True)}

    return ask


def by_ranx(case: Case, ask: Callable[[Sequence[str], Case], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """All of ``NAMES``, those that ranx lacks by what it has.

    MAP-all is ranx' map: its sum, which the other denominators divide, is |R| times that, and the hits are |R| times
    ranx' recall. The ideal of NDCG-ngcf comes from the targets in the top of the list: it is ndcg with these alone.
    """
    found = ask([name for name in NAMES if name.partition("@")[0] in RANX], case)
    wanted = np.array([len(set(row)) for row in case[1]])
    for k in DEPTHS:
        total, hits = found[f"MAP-all@{k}"] * wanted, np.rint(found[f"Recall@{k}"] * wanted)
        found[f"MAP-min@{k}"] = total / np.minimum(wanted, k)
        found[f"MAP-hits@{k}"] = np.divide(total, hits, out=np.zeros(len(total)), where=hits > 0)
    for top in sorted({*DEPTHS, LONGEST}):
        names = [name for name in NAMES if name.startswith(f"NDCG-ngcf{top}@")]
        # Nobody finds -2: where nothing was found, ndcg is 0.
        ideal = [[i for i in row if i in ranked[:top]] or [-2] for ranked, row in zip(*case, strict=True)]
        plain = ask([name.replace(f"-ngcf{top}", "") for name in names], (case[0], ideal))
        found |= dict(zip(names, plain.values(), strict=True))
    return found


@pytest.mark.parametrize("case", CASES)
def test_every_variant_equals_its_definition(case: str) -> None:
    ranked, relevant = CASES[case]
    found = per_user(padded(ranked), Ragged.from_lists(relevant), NAMES)
    assert list(found) == NAMES
    for name, column in found.items():
        expected = [defined(name, row, wanted) for row, wanted in zip(ranked, relevant, strict=True)]
        np.testing.assert_allclose(column, expected, rtol=0, atol=TOLERANCE, err_msg=name)
        assert column.dtype == np.float64
    means = evaluate_rankings(padded(ranked), Ragged.from_lists(relevant), NAMES)
    assert means == {name: pytest.approx(math.fsum(column) / len(column), abs=1e-12) for name, column in found.items()}


@pytest.mark.parametrize("case", CASES)
def test_every_variant_agrees_with_ranx(
    case: str, ask_ranx: Callable[[Sequence[str], Case], dict[str, np.ndarray]]
) -> None:
    ranked, relevant = CASES[case]
    found, theirs = per_user(padded(ranked), Ragged.from_lists(relevant), NAMES), by_ranx(CASES[case], ask_ranx)
    assert set(theirs) == set(NAMES)
    for name, column in found.items():
        np.testing.assert_allclose(column, theirs[name], rtol=0, atol=TOLERANCE, err_msg=name)


def test_variants_of_a_name_differ_where_they_should_and_only_there() -> None:
    ranked, relevant = CASES["random, one target"]
    one = per_user(padded(ranked), Ragged.from_lists(relevant), NAMES)
    ranked, relevant = CASES["random"]
    many = per_user(padded(ranked), Ragged.from_lists(relevant), NAMES)
    for k in DEPTHS:
        for name in ("MAP-min", "MAP-all", "MAP-hits"):
            np.testing.assert_allclose(one[f"{name}@{k}"], one[f"MRR@{k}"], rtol=0, atol=TOLERANCE)
        assert np.array_equal(one[f"Recall@{k}"], one[f"HR@{k}"])
        assert (many[f"MAP-all@{k}"] <= many[f"MAP-min@{k}"]).all()
        assert (many[f"MAP-min@{k}"] <= many[f"MAP-hits@{k}"]).all()
        assert (many[f"NDCG@{k}"] <= many[f"NDCG-ngcf{LONGEST}@{k}"] + TOLERANCE).all()
        assert (many[f"NDCG-ngcf{LONGEST}@{k}"] <= many[f"NDCG-ngcf{k}@{k}"] + TOLERANCE).all()
    for lower, higher in (("MAP-all", "MAP-min"), ("MAP-min", "MAP-hits"), ("NDCG", f"NDCG-ngcf{LONGEST}")):
        assert many[f"{lower}@10"].mean() < 0.9 * many[f"{higher}@10"].mean()


def test_other_integer_types_give_the_same() -> None:
    ranked, relevant = random_case(7, 20, 100, 9)
    expected = per_user(padded(ranked), Ragged.from_lists(relevant), NAMES)
    for kind in (np.int8, np.int16, np.int64, np.uint8, np.uint32, np.uint64):
        for name, column in per_user(padded(ranked).astype(kind), Ragged.from_lists(relevant), NAMES).items():
            assert np.array_equal(column, expected[name])


@pytest.mark.parametrize("relevant", [[[-1]], [[3, -1]], [[-7]]])
def test_padding_cannot_be_asked_for(relevant: list[list[int]]) -> None:
    """Else a list that ran out of candidates would be a hit."""
    with pytest.raises(ValueError, match=f"relevant must hold item rows, got {min(relevant[0])}"):
        per_user(np.array([[5, -1]]), Ragged.from_lists(relevant), ["HR@2"])


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (Metric("NDCG", 2, 5), "only NDCG-ngcf takes a number"),
        (Metric("NDCG-ngcf", 2), "needs the length of the list"),
        (Metric("NDCG-ngcf", 2, 1), "at least 2"),
        (Metric("MAP", 2), "ambiguous"),
        (Metric("HR", 0), "not known"),
        (Metric("AUC", 2), "not known"),
    ],
)
def test_a_metric_made_by_hand_has_a_formula_or_is_refused(metric: Metric, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        per_user(np.arange(10)[None], Ragged.from_lists([[3, 9]]), [metric])


# Through a split, a mask and the ranking.


def small_split(seed: int, users: int = 30, items: int = 64) -> Split:
    """Users with and without targets and histories, with repeats, and with targets that they have seen before."""
    rng = np.random.default_rng(seed)
    parts = [
        Ragged.from_lists([rng.choice(items, rng.integers(0, most), replace=True) for _ in range(users)])
        for most in (12, 3, 6)
    ]
    train, valid, test = (part.to_lists() for part in parts)
    test[0], train[0], test[1], train[2] = [], [5, 5], [5, 7, 7], []
    train[1] = [7, 8]
    return Split("T", users, items, *(Ragged.from_lists(part) for part in (train, valid, test)), origin="by hand")


@pytest.mark.parametrize(
    ("stage", "mask"),
    [("test", "none"), ("test", "train"), ("test", "train+valid"), ("valid", "none"), ("valid", "train")],
)
def test_tied_scores_through_the_whole_evaluation(stage: Any, mask: Any) -> None:
    """Ties go to the lower item, users without a target or a history do not count, hidden targets are misses."""
    split = small_split(0)
    scores = np.random.default_rng(1).integers(0, 4, (split.num_users, split.num_items)).astype(np.float32)

    def ranker(split: Split, stage: Any, k: int, **settings: Any) -> np.ndarray:
        return rank_scores(lambda rows: scores[rows], split, stage, k, **settings)

    result = evaluate(
        ranker, split, model="tied", dataset="d", fingerprint="f", stage=stage, mask=mask, metrics=NAMES, groups=False
    )
    target, seen = split.target(stage).to_lists(), split.train.to_lists()
    if mask == "train+valid":
        seen = [a + b for a, b in zip(seen, split.valid.to_lists(), strict=True)]
    known = split.train.to_lists()
    if stage == "test":
        known = [a + b for a, b in zip(known, split.valid.to_lists(), strict=True)]
    users = [u for u in range(split.num_users) if target[u] and known[u]]
    assert result.rows["all"].users.tolist() == users
    assert {"test": 0, "valid": 2}[stage] not in users and 10 < len(users) < 30
    for name, column in result.rows["all"].values.items():
        hidden = 0
        for place, u in enumerate(users):
            masked = [] if mask == "none" else seen[u]
            hidden += len(set(target[u]) & set(masked))
            assert abs(column[place] - defined(name, best_first(scores[u], masked)[:LONGEST], target[u])) < TOLERANCE
        assert result.metrics[name] == pytest.approx(column.sum() / len(users), abs=1e-12)
    assert hidden == split.unreachable(stage, mask) and (hidden > 0) == (mask != "none")


def test_a_target_that_the_mask_hides_is_a_miss_and_still_counts_in_recall() -> None:
    parts = [Ragged.from_lists(rows) for rows in ([[0, 1]], [[]], [[0, 2]])]
    split = Split("T", 1, 4, *parts, origin="by hand")
    ranker = partial(rank_scores, np.array([[9.0, 8.0, 7.0, 6.0]]))
    names = ["HR@1", "Recall@2", "NDCG@2", "MAP-min@2", "MAP-all@2"]

    def values(mask: Any) -> dict[str, float]:
        return evaluate(
            ranker, split, model="m", dataset="d", fingerprint="f", mask=mask, metrics=names, groups=False
        ).metrics

    ideal = 1 + 1 / math.log2(3)
    assert values("train") == {"HR@1": 1, "Recall@2": 0.5, "NDCG@2": pytest.approx(1 / ideal), "MAP-min@2": 0.5,
                               "MAP-all@2": 0.5}  # fmt: skip
    assert values("none") == {"HR@1": 1, "Recall@2": 0.5, "NDCG@2": pytest.approx(1 / ideal), "MAP-min@2": 0.5,
                              "MAP-all@2": 0.5}  # fmt: skip
    assert split.unreachable("test", "train") == 1 and split.unreachable("test", "none") == 0


def test_nobody_to_evaluate_is_no_zero() -> None:
    parts = [Ragged.from_lists(rows) for rows in ([[0], []], [[], []], [[], [1]])]
    split = Split("T", 2, 3, *parts, origin="by hand")
    ranker = partial(rank_scores, np.empty((0, 3)))
    result = evaluate(ranker, split, model="m", dataset="d", fingerprint="f", metrics=NAMES, groups=False)
    assert all(math.isnan(value) for value in result.metrics.values())
    with pytest.raises(ValueError, match="relevant row 1 is empty; leave users without a target out"):
        per_user(np.array([[0], [1]]), Ragged.from_lists([[0], []]), ["HR@1"])
