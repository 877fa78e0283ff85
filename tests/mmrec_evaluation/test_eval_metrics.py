"""Metrics against ranx where it has them, against a slow transcription of the formulas, and against figures by hand."""

import math

import numpy as np
import pytest

from mmrec.evaluation.metrics import DEFAULT_METRICS, Metric, evaluate_rankings, hits, per_user
from mmrec.evaluation.ragged import Ragged

RANX = {"HR": "hit_rate", "Recall": "recall", "Precision": "precision", "MRR": "mrr", "NDCG": "ndcg", "MAP-all": "map"}


def random_case(seed, users=60, items=40, depth=20):
    rng = np.random.default_rng(seed)
    ranked = np.stack([rng.permutation(items)[:depth] for _ in range(users)])
    relevant = [rng.choice(items, size=rng.integers(1, 25), replace=False).tolist() for _ in range(users)]
    return ranked, Ragged.from_lists(relevant)


def degenerate_case():
    ranked = np.array([[0, 1, 2, 3], [3, 2, 1, 0], [4, 5, -1, -1], [-1, -1, -1, -1], [0, 1, 2, 3], [7, 8, 9, 0]])
    return ranked, Ragged.from_lists([[0], [0], [5, 6], [1], [0, 1, 2, 3, 4, 5], [1]])


def tied_case():
    """Scores in three steps only: the ties are broken towards the lower id before anybody sees the ranking."""
    rng = np.random.default_rng(5)
    scores = rng.integers(0, 3, size=(40, 30))
    ranked = np.argsort(-scores, axis=1, kind="stable")[:, :12]
    return ranked, Ragged.from_lists([rng.choice(30, size=3, replace=False).tolist() for _ in range(40)])


def by_the_formula(name, ranked, relevant):
    """One user at a time, written from the definitions and sharing nothing with the code under test."""
    metric = Metric.parse(name)
    k, values = metric.k, []
    for row, wanted in zip(ranked.tolist(), map(set, relevant.to_lists()), strict=True):
        h = [1 if item in wanted else 0 for item in row]
        gain = sum(x / math.log2(r + 2) for r, x in enumerate(h[:k]))
        precisions = sum(x * sum(h[: r + 1]) / (r + 1) for r, x in enumerate(h[:k]))
        if metric.variant == "HR":
            values.append(float(any(h[:k])))
        elif metric.variant == "Recall":
            values.append(sum(h[:k]) / len(wanted))
        elif metric.variant == "Precision":
            values.append(sum(h[:k]) / k)
        elif metric.variant == "MRR":
            values.append(next((1 / (r + 1) for r, x in enumerate(h[:k]) if x), 0.0))
        elif metric.variant == "NDCG":
            values.append(gain / sum(1 / math.log2(r + 2) for r in range(min(len(wanted), k))))
        elif metric.variant == "NDCG-ngcf":
            best = sorted(h[: metric.top], reverse=True)[:k]
            ideal = sum(x / math.log2(r + 2) for r, x in enumerate(best))
            values.append(gain / ideal if ideal else 0.0)
        else:
            found = sum(h[:k])
            divisor = {"MAP-min": min(len(wanted), k), "MAP-all": len(wanted), "MAP-hits": found}[metric.variant]
            values.append(precisions / divisor if divisor else 0.0)
    return np.array(values)


CASES = {"random": random_case(0), "another": random_case(1), "degenerate": degenerate_case(), "tied": tied_case()}


@pytest.fixture(scope="module")
def ranx():
    return pytest.importorskip("ranx", reason="the oracle ranx is not installed")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("k", [1, 3, 10])
def test_ranx_agrees_user_by_user(ranx, case, k):
    ranked, relevant = CASES[case]
    if k > ranked.shape[1]:
        k = ranked.shape[1]
    ours = per_user(ranked, relevant, [f"{name}@{k}" for name in RANX])
    truth = ranx.Qrels({f"u{u:03d}": {str(i): 1 for i in row} for u, row in enumerate(relevant.to_lists())})
    run = ranx.Run(
        {
            # An item that nobody wants stands for an empty list, which ranx does not take.
            f"u{u:03d}": {str(i): 1.0 - r / 1000 for r, i in enumerate(row) if i >= 0} or {"nothing": 1.0}
            for u, row in enumerate(ranked.tolist())
        }
    )
    theirs = ranx.evaluate(truth, run, [f"{name}@{k}" for name in RANX.values()], return_mean=False)
    for name, other in RANX.items():
        np.testing.assert_allclose(ours[f"{name}@{k}"], theirs[f"{other}@{k}"], rtol=0, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_every_metric_equals_its_formula(case):
    ranked, relevant = CASES[case]
    depth = ranked.shape[1]
    names = [f"{n}@{k}" for n in (*RANX, "MAP-min", "MAP-hits") for k in (1, 2, depth)]
    names += [f"NDCG-ngcf{depth}@{k}" for k in (1, 2, depth)] + ["NDCG-ngcf3@2"]
    ours = per_user(ranked, relevant, names)
    assert list(ours) == names
    for name in names:
        assert ours[name].dtype == np.float64
        np.testing.assert_allclose(ours[name], by_the_formula(name, ranked, relevant), rtol=0, atol=1e-14, err_msg=name)


def test_figures_worked_out_by_hand():
    ranked = np.array([[9, 1, 8, 2, 7, 3]])
    relevant = Ragged.from_lists([[1, 2, 3, 4]])
    values = evaluate_rankings(
        ranked,
        relevant,
        ["HR@1", "HR@2", "Recall@4", "Precision@4", "MRR@4", "MAP-min@4", "MAP-all@4", "MAP-hits@4"]
        + ["MAP-min@2", "MAP-all@2", "NDCG@4", "NDCG-ngcf6@4", "NDCG-ngcf4@4"],
    )
    assert values["HR@1"] == 0 and values["HR@2"] == 1
    assert values["Recall@4"] == 2 / 4 and values["Precision@4"] == 2 / 4 and values["MRR@4"] == 1 / 2
    # P(2) = 1/2 and P(4) = 2/4 at the two hits.
    assert values["MAP-min@4"] == values["MAP-all@4"] == 1 / 4
    assert values["MAP-hits@4"] == 1 / 2
    assert values["MAP-min@2"] == (1 / 2) / 2 and values["MAP-all@2"] == (1 / 2) / 4
    gain = 1 / math.log2(3) + 1 / math.log2(5)
    one_to = [0, 1, 1 + 1 / math.log2(3), 1.5 + 1 / math.log2(3), 1.5 + 1 / math.log2(3) + 1 / math.log2(5)]
    assert values["NDCG@4"] == pytest.approx(gain / one_to[4], abs=1e-15)
    assert values["NDCG-ngcf6@4"] == pytest.approx(gain / one_to[3], abs=1e-15)
    assert values["NDCG-ngcf4@4"] == pytest.approx(gain / one_to[2], abs=1e-15)


def test_the_variants_really_differ():
    ranked, relevant = CASES["random"]
    means = evaluate_rankings(
        ranked, relevant, ["MAP-min@10", "MAP-all@10", "MAP-hits@10", "NDCG@10", "NDCG-ngcf20@10"]
    )
    assert means["MAP-all@10"] < means["MAP-min@10"] < means["MAP-hits@10"]
    assert means["NDCG@10"] < means["NDCG-ngcf20@10"]


def test_a_perfect_and_a_useless_list():
    perfect, useless = np.array([[3, 1, 0]]), np.array([[5, 6, 7]])
    relevant = Ragged.from_lists([[0, 1, 3]])
    names = [
        "HR@3",
        "Recall@3",
        "Precision@3",
        "MRR@3",
        "NDCG@3",
        "NDCG-ngcf3@3",
        "MAP-min@3",
        "MAP-all@3",
        "MAP-hits@3",
    ]
    assert set(evaluate_rankings(perfect, relevant, names).values()) == {1.0}
    assert set(evaluate_rankings(useless, relevant, names).values()) == {0.0}


def test_padding_is_never_a_hit_and_repeats_of_a_target_count_once():
    found = hits(np.array([[2, -1, -1]]), Ragged.from_lists([[2, 2, 0]]))
    assert found.tolist() == [[True, False, False]]
    values = evaluate_rankings(np.array([[2, -1, -1]]), Ragged.from_lists([[2, 2, 0]]), ["Recall@3", "NDCG@3"])
    assert values["Recall@3"] == 0.5
    assert values["NDCG@3"] == pytest.approx(1 / (1 + 1 / math.log2(3)))


def test_hits_of_one_user_do_not_leak_into_the_next():
    # With row · span + id as the key, a span of 4 would let user 1's target 0 answer for user 0's item 4, and one of 5
    # user 0's target 4 for user 1's empty place.
    assert not hits(np.array([[4], [9]]), Ragged.from_lists([[3], [0]])).any()
    assert not hits(np.array([[2], [-1]]), Ragged.from_lists([[4], [0]])).any()


def test_no_users():
    empty = np.empty((0, 50), np.int32)
    assert per_user(empty, Ragged.empty(0))["HR@10"].shape == (0,)
    assert all(math.isnan(v) for v in evaluate_rankings(empty, Ragged.empty(0)).values())


def test_default_names_are_those_that_tables_use():
    assert {"HR@10", "NDCG@10", "Recall@20", "NDCG@20", "MAP-min@10"} <= set(DEFAULT_METRICS)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("MAP@10", "ambiguous: write MAP-min"),
        ("MAP", "ambiguous"),
        ("NDCG-ngcf@10", "such as NDCG-ngcf50@10"),
        ("NDCG-ngcf5@10", "at least 10"),
        ("NDCG20@10", "only NDCG-ngcf"),
        ("ndcg@10", "not known"),
        ("NDCG@0", "not known"),
        ("NDCG@", "not known"),
        ("Hit@10", "not known"),
    ],
)
def test_unclear_names_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        Metric.parse(name)


def test_names_survive_a_round_trip():
    for name in ("HR@5", "MAP-hits@50", "NDCG-ngcf50@10"):
        assert str(Metric.parse(name)) == name
    assert Metric.parse("NDCG-ngcf50@10").base == Metric.parse("NDCG@10").base == "NDCG"


def test_bad_rankings_are_refused():
    one = Ragged.from_lists([[1]])
    with pytest.raises(ValueError, match="row 0 holds item 3 more than once"):
        hits(np.array([[3, 1, 3]]), one)
    with pytest.raises(ValueError, match="2 rows, relevant has 1"):
        hits(np.array([[3], [1]]), one)
    with pytest.raises(TypeError, match="integer array"):
        hits(np.array([[3.0]]), one)
    with pytest.raises(ValueError, match="got -2"):
        hits(np.array([[-2]]), one)
    with pytest.raises(ValueError, match="reads 10 positions, ranked has only 1"):
        per_user(np.array([[3]]), one, ["HR@10"])
    with pytest.raises(ValueError, match="relevant row 0 is empty"):
        per_user(np.array([[3]]), Ragged.from_lists([[]]), ["HR@1"])
