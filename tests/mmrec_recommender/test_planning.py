"""Plans within a budget: what is chosen, that it is kept, and that answers say what was done."""

from __future__ import annotations

import time

import numpy as np
import pytest

from mmrec.recommender import Costs, Plan, calibrate
from mmrec.recommender.latency import generated
from mmrec.recommender.planning import QUANTILES, Planner, Times


class Slow:
    """A reranker that turns the order round and takes a known time for each candidate."""

    name = "slow"

    def __init__(self, ms: float = 0.0) -> None:
        self.ms = ms
        self.seen: list[tuple[list[str], list[str]]] = []

    def __call__(self, histories, candidates):
        self.seen += list(zip(histories, candidates, strict=True))
        time.sleep(self.ms / 1e3 * sum(map(len, candidates)))
        return [[float(place) for place in range(len(row))] for row in candidates]


def flat(ms: float) -> Times:
    return Times((ms,) * len(QUANTILES), 1)


def costs(quality: dict[Plan, float] | None = None, **facts: str | int) -> Costs:
    retrieval = {5: {1: flat(1.0), 8: flat(4.0)}, 20: {1: flat(2.0), 8: flat(8.0)}}
    return Costs(facts, retrieval, {4: flat(10.0), 16: flat(40.0)}, quality or {})


@pytest.fixture
def online():
    with generated(500, "float32", width=8, history=20) as made:
        made.reranker = Slow()
        yield made


HISTORY = [[str(n) for n in range(3, 33)]]


def test_times_are_measured_ones():
    times = Times.of([float(n) for n in range(100, 0, -1)])
    assert times.quantiles_ms == (50.0, 90.0, 95.0, 99.0) and times.calls == 100
    assert [times.at(q) for q in (0.1, 0.5, 0.51, 0.95, 0.96, 0.99)] == [50.0, 50.0, 90.0, 95.0, 99.0, 99.0]
    assert Times.of([7.0]).quantiles_ms == (7.0,) * 4


@pytest.mark.parametrize(
    ("budget", "histories", "plan", "expected"),
    [
        (100.0, 1, Plan(20, 16), 42.0),
        (41.0, 1, Plan(20, 4), 12.0),
        (11.5, 1, Plan(20, 0), 2.0),
        (1.5, 1, Plan(5, 0), 1.0),
        (0.1, 1, Plan(5, 0), 1.0),  # nothing fits: the cheapest
        (100.0, 2, Plan(20, 16), 88.0),  # a call of two costs that of eight, and reranking twice
        (33.0, 16, Plan(20, 0), 16.0),  # beyond what was measured it grows with their number
    ],
)
def test_the_best_plan_that_fits(budget, histories, plan, expected):
    assert Planner(costs()).choose(budget, histories, 0.99) == (plan, expected)


def test_measured_quality_decides():
    worse_again = {
        Plan(5, 0): 0.2,
        Plan(20, 0): 0.3,
        Plan(5, 4): 0.1,
        Plan(20, 4): 0.1,
        Plan(5, 16): 0,
        Plan(20, 16): 0,
    }
    assert Planner(costs(worse_again)).choose(1000, 1, 0.99)[0] == Plan(20, 0)
    equal = dict.fromkeys(worse_again, 0.5)
    assert Planner(costs(equal)).choose(1000, 1, 0.99)[0] == Plan(5, 0)  # the cheaper of equals
    # Only plans of known quality are chosen, as long as any is known.
    assert Planner(costs({Plan(5, 4): 0.1, Plan(7, 0): 0.2})).choose(1000, 1, 0.99)[0] == Plan(5, 4)
    assert Planner(costs({Plan(7, 0): 0.2})).choose(1000, 1, 0.99)[0] == Plan(20, 16)


@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("slower", [1.0, 3.0])
def test_in_the_long_run_so_many_are_in_time_as_stated(quantile, slower):
    """Also on a machine that has become three times as slow as it was when the costs were measured."""
    random = np.random.default_rng(0)
    times = random.lognormal(0, 0.5, 4000)
    planner = Planner(Costs({}, {5: {1: Times.of(times.tolist())}}))
    late = []
    for took in slower * random.lognormal(0, 0.5, 20000):
        _, expected = planner.choose(100.0, 1, quantile)
        late.append(took > expected)
        planner.learn(took, expected, quantile)
    # Where the costs still hold, the factor cannot fall below 1 and fewer are late.
    share, wanted = np.mean(late[2000:]), 1 - quantile
    assert 0.5 * wanted < share < 1.1 * wanted and (slower == 1 or share > 0.9 * wanted)
    assert planner.factor == pytest.approx(slower, rel=0.6)


def test_costs_are_kept_and_damage_is_found(tmp_path):
    path = tmp_path / "costs.json"
    saved = costs({Plan(5, 0): 0.25}, dtype="int8", threads=2)
    saved.save(path)
    assert Costs.load(path) == saved
    text = path.read_text()
    for damage in (text[:40], text.replace('"format": 1', '"format": 9'), "[]", text.replace('"calls": 1', '"x": 1')):
        path.write_text(damage)
        with pytest.raises(ValueError, match=r"costs.json holds no costs .*calibrate anew"):
            Costs.load(path)
    with pytest.raises(ValueError, match="measured with threads 2, this is 4"):
        saved.check({"dtype": "int8", "threads": 4})


def test_what_is_left_is_spent_on_known_plans_that_are_no_worse():
    plain, four, sixteen = Plan(20, 0), Plan(20, 4), Plan(20, 16)
    planner = Planner(costs({plain: 0.3, four: 0.25, sixteen: 0.32}))
    assert planner.choose(1000, 1, 0.99)[0] == sixteen
    assert planner.again(sixteen, 50.0, 1, 0.99) == sixteen
    assert planner.again(sixteen, 15.0, 1, 0.99) == plain  # four would fit, and is worse than nothing
    assert Planner(costs()).again(sixteen, 15.0, 1, 0.99) == four
    assert Planner(costs()).again(sixteen, 5.0, 1, 0.99) == plain


def test_items_are_ranked_again(online):
    plain = online.recommend(HISTORY, 6)[0]
    again = online.recommend(HISTORY, 6, rerank=4)[0]
    assert again.items == plain.items[:4][::-1] + plain.items[4:]
    assert again.scores == plain.scores[:4][::-1] + plain.scores[4:]
    assert again.reranked == [3.0, 2.0, 1.0, 0.0] and plain.reranked == []
    assert online.reranker.seen == [([f"Item {n}" for n in range(13, 33)], plain.titles[:4])]  # the depth's last items
    few = online.recommend(HISTORY, 2, rerank=4, depth=3)[0]
    assert few.items == online.recommend(HISTORY, 4, depth=3)[0].items[:1:-1] and few.reranked == [3.0, 2.0]
    assert len(online.reranker.seen[1][0]) == 3
    two = online.recommend([*HISTORY, ["1", "2"]], 6, rerank=4)
    assert [one.items for one in two] == [again.items, online.recommend([["1", "2"]], 6, rerank=4)[0].items]
    assert (again.how.depth, again.how.rerank, plain.how.rerank, again.how.budget_ms) == (20, 4, 0, None)
    assert online.recommend([], 3, rerank=4) == []


def test_more_are_ranked_again_than_there_are(online):
    most = online.recommend([[str(n) for n in range(490)]], 5, rerank=64)[0]
    assert len(most.items) == 5 and len(online.reranker.seen[-1][1]) == 10
    assert online.recommend([[str(n) for n in range(500)]], 5, rerank=64)[0].items == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rerank": -1}, "rerank must be at least 0, got -1"),
        ({"budget_ms": 0.0}, "budget_ms must be above 0, got 0"),
        ({"budget_ms": float("nan")}, "budget_ms must be above 0, got nan"),
        ({"budget_ms": 5.0}, "what answers cost is not known"),
        ({"budget_ms": 5.0, "depth": 3}, "chooses depth and rerank; give it or them"),
        ({"budget_ms": 5.0, "rerank": 3}, "chooses depth and rerank; give it or them"),
        ({"budget_ms": 5.0, "quantile": 0.999}, "quantile must be above 0 and at most 0.99"),
        ({"budget_ms": 5.0, "quantile": 0.0}, "quantile must be above 0 and at most 0.99"),
    ],
)
def test_wrong_arguments(online, arguments, message):
    with pytest.raises(ValueError, match=message):
        online.recommend(HISTORY, 3, **arguments)


def test_ranking_again_needs_a_reranker(online):
    online.reranker = None
    with pytest.raises(ValueError, match="there is no reranker that could rank 4 items again"):
        online.recommend(HISTORY, 3, rerank=4)


def test_calibrated_answers_keep_their_budget(online, threads):
    threads(1)  # several wait for each other, for long where others want the cores
    online.reranker = Slow(ms=5.0)
    found = calibrate(online, depths=(5, 99), batches=(1, 2), widths=(4, 16), seconds=0.2)
    assert [*found.retrieval] == [5, 20] and all([*sizes] == [1, 2] for sizes in found.retrieval.values())
    assert {w: 5 <= t.at(0.5) / w <= 15 for w, t in found.rerank.items()} == {4: True, 16: True}
    assert found.facts == {**online.facts, "items": 500, "k": 10} and found.facts["reranker"] == "slow"
    rerank = {}
    for budget in (15.0, 60.0, 1000.0):
        online.costs = found  # and nothing learnt yet
        answers = [online.recommend(HISTORY, 10, budget_ms=budget, quantile=0.9)[0].how for _ in range(30)]
        rerank[budget] = [how.rerank for how in answers]
        # How often is the simulation's matter, above; here other processes may take the machine's time.
        assert sum(how.in_time for how in answers) >= (20 if budget == 1000.0 else 1)
        assert all(how.in_time == (how.took_ms <= budget) and how.budget_ms == budget for how in answers)
        assert all(0 < how.expected_ms for how in answers)
    assert max(rerank[15.0]) == 0 and np.median(rerank[60.0]) == 4 and np.median(rerank[1000.0]) == 16


def test_what_is_late_already_is_not_ranked_again(online, monkeypatch):
    online.costs = Costs(online.facts, {20: {1: flat(1.0)}}, {4: flat(10.0), 16: flat(40.0)})
    version, top_k = online.version, online.version.top_k

    def slow_top_k(*args, **kwargs):
        time.sleep(0.08)
        return top_k(*args, **kwargs)

    monkeypatch.setattr(version, "top_k", slow_top_k)
    (late,) = online.recommend(HISTORY, 10, budget_ms=100.0)
    assert late.how.rerank == 4 or not late.how.rerank and late.how.took_ms > 90  # of 16 that were planned
    (later,) = online.recommend(HISTORY, 10, budget_ms=60.0)
    assert later.how.rerank == 0 and not later.how.in_time


def test_costs_of_something_else_are_refused(online):
    found = Costs({**online.facts, "threads": 99}, {20: {1: flat(1.0)}})
    with pytest.raises(ValueError, match="costs were measured with threads 99"):
        online.costs = found
    with pytest.raises(ValueError, match="costs were measured with 20 items, this store has 500: calibrate anew"):
        online.costs = Costs({**online.facts, "items": 20}, {20: {1: flat(1.0)}})
    for name in ("depths", "batches", "widths"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            calibrate(online, **{name: (0,)})
