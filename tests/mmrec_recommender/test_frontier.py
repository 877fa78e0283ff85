"""Quality against latency: what is marked, and that rankings are those of the recommender."""

from __future__ import annotations

import numpy as np

from mmrec.recommender import Plan
from mmrec.recommender.frontier import Point, Way, pareto, rank_by, time_ways
from mmrec.recommender.latency import Load, generated, measure


def point(ms: float, value: float) -> Point:
    return Point(Way("m", "int8", Plan(5)), ms, ms, ms, 1, {"x": np.array([value])})


def test_what_nothing_beats_is_marked():
    points = [
        point(1, 0.1),
        point(2, 0.3),
        point(2, 0.2),
        point(3, 0.3),
        point(0.5, 0.05),
        point(4, 0.4),
        point(1, 0.1),
    ]
    marked = pareto(points, lambda one: float(one.values["x"][0]))
    assert [one.best for one in marked] == [True, True, False, False, True, True, True]  # of equals both
    assert pareto([], lambda one: 0.0) == []


def test_rankings_and_times():
    with generated(200, "float32", width=8, history=20) as online:
        histories = [[str(n), str(2 * n)] for n in range(1, 71)]
        ranked = rank_by(online, histories, 5, Plan(1))
        assert len(ranked) == 70
        for n in (0, 63, 64, 69):
            assert ranked[n] == online.recommend([histories[n]], 5, depth=1)[0].items
        ways = {Way("a", "float32", Plan(depth)): online for depth in (1, 20)}
        taken = time_ways(ways, histories, 5, seconds=0)
        assert {way: len(times) for way, times in taken.items()} == dict.fromkeys(ways, 10)
        assert all(0 < ms < 1000 for times in taken.values() for ms in times)
        rows = measure(online, Load(2, 3, 5), seconds=0, histories=histories)
        assert {row.stage for row in rows} == {"history", "user", "retrieval", "answer", "total"}
