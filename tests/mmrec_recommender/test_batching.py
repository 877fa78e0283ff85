"""Requests that wait together are answered together, each as if alone; nothing is lost."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

pytest.importorskip("fastapi")


from mmrec.recommender import Costs, OnlineRecommender, Plan
from mmrec.recommender.planning import QUANTILES, Times
from mmrec.recommender.serving.batching import Batcher, ClosedError, LateError, OverloadedError, Request


class Gate:
    """Lets calls of `recommend` through one by one, and keeps what they were asked."""

    def __init__(self, online: OnlineRecommender, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open, self.calls = threading.Semaphore(0), []
        self.began = threading.Semaphore(0)
        recommend = online.recommend

        def gated(histories, k, **options):
            self.calls.append((len(histories), k, options))
            self.began.release()
            self.open.acquire()
            return recommend(histories, k, **options)

        monkeypatch.setattr(online, "recommend", gated)
        self.recommend = recommend

    async def hold(self, batcher: Batcher) -> asyncio.Task:
        """A request that is being answered: those to come have to wait."""
        task = asyncio.ensure_future(batcher.recommend(Request(["1"], 3)))
        await asyncio.to_thread(self.began.acquire)
        return task

    def release(self, calls: int = 100) -> None:
        self.open.release(calls)


async def started(batcher: Batcher, *requests: Request) -> list[asyncio.Task]:
    tasks = [asyncio.ensure_future(batcher.recommend(request)) for request in requests]
    while batcher.waiting < len(requests):
        await asyncio.sleep(0.001)
    return tasks


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 30))


def test_those_that_wait_are_answered_together_as_if_alone(online, monkeypatch):
    gate = Gate(online, monkeypatch)
    requests = [Request([str(n), str(n + 5)], 3 + n % 4) for n in range(10)]

    async def main():
        batcher = Batcher(online, max_batch=8)
        first = await gate.hold(batcher)
        tasks = await started(batcher, *requests)
        gate.release()
        found = await asyncio.gather(first, *tasks)
        batcher.close()
        return found

    first, *found = run(main())
    assert [call[:2] for call in gate.calls] == [(1, 3), (8, 6), (2, 4)]
    assert [one.batch for one in found] == [8] * 8 + [2] * 2 and first.batch == 1
    for request, one in zip(requests, found, strict=True):
        (alone,) = gate.recommend([request.history], request.k)
        assert one.answer.items == alone.items and len(one.answer.items) == request.k
        assert one.answer.scores == pytest.approx(alone.scores, rel=1e-5)
        assert all(len(column) == request.k for column in (one.answer.titles, one.answer.mass, one.answer.known))
        assert one.waited_ms > 0
    # Each batch's times are told once.
    assert [bool(one.seconds) for one in found] == [True, *[False] * 7, True, False]


def test_what_differs_is_answered_apart_in_the_order_of_arrival(online, monkeypatch):
    gate = Gate(online, monkeypatch)
    kinds = [{}, {"rerank": 4}, {}, {"exclude_seen": False}, {"depth": 3}, {"rerank": 4}, {}]

    async def main():
        batcher = Batcher(online)
        first = await gate.hold(batcher)
        tasks = await started(batcher, *(Request([str(n)], 3, **kind) for n, kind in enumerate(kinds)))
        gate.release()
        await asyncio.gather(first, *tasks)
        batcher.close()

    run(main())
    told = [(n, o["rerank"], o["exclude_seen"], o["depth"]) for n, _, o in gate.calls[1:]]
    assert told == [(3, 0, True, None), (2, 4, True, None), (1, 0, False, None), (1, 0, True, 3)]


def test_each_has_its_own_candidates_and_items_to_leave_out(online, monkeypatch):
    gate = Gate(online, monkeypatch)
    kinds = [
        {}, {"exclude": ["7", "8"]}, {"candidates": ["20", "21", "22"]}, {"candidates": [], "exclude": ["20"]},
        {"candidates": ["30", "20"], "exclude": ["20"]},
    ]  # fmt: skip

    async def main():
        batcher = Batcher(online)
        first = await gate.hold(batcher)
        tasks = await started(batcher, *(Request([str(n)], 300, **kind) for n, kind in enumerate(kinds)))
        gate.release()
        _, *found = await asyncio.gather(first, *tasks)
        batcher.close()
        return [one.answer.items for one in found]

    one, two, *chosen = run(main())
    assert [call[0] for call in gate.calls] == [1, 1, 1, 1, 2]  # lists and candidates, each alone or together
    assert {"7", "8"} <= {*one} and {*map(str, range(300))} - {*two} == {"1", "7", "8"}
    assert [sorted(ids) for ids in chosen] == [["20", "21", "22"], [], ["30"]]


def test_only_so_many_listed_ids_go_into_a_batch(online, monkeypatch):
    gate = Gate(online, monkeypatch)
    requests = [Request([str(n)], 3, exclude=["7"] * count) for n, count in enumerate((900, 900, 900, 5000, 10, 10))]

    async def main():
        batcher = Batcher(online)
        first = await gate.hold(batcher)
        tasks = await started(batcher, *requests)
        gate.release()
        found = await asyncio.gather(first, *tasks)
        batcher.close()
        return found

    assert all(len(one.answer.items) == 3 for one in run(main()))
    assert sorted(call[0] for call in gate.calls[1:]) == [1, 1, 4]


def test_one_bad_request_harms_no_other(online, monkeypatch):
    gate = Gate(online, monkeypatch)

    async def main():
        batcher = Batcher(online)
        first = await gate.hold(batcher)
        tasks = await started(batcher, Request(["1"], 3), Request(["gone"], 3), Request(["2"], 3))
        gate.release()
        found = await asyncio.gather(first, *tasks, return_exceptions=True)
        with pytest.raises(ValueError, match="depth must be from 1 to 20, got 21"):
            await batcher.recommend(Request(["1"], 3, depth=21))
        batcher.close()
        return found

    _, good, bad, also = run(main())
    assert isinstance(bad, ValueError) and "none of which the store has" in str(bad)
    for one, name in ((good, "1"), (also, "2")):
        assert one.answer.items == gate.recommend([[name]], 3)[0].items


def test_bad_histories_do_not_take_a_batch_apart(online, monkeypatch):
    """However many there are, the good ones are answered by one call more."""
    gate = Gate(online, monkeypatch)

    async def main():
        batcher = Batcher(online)
        first = await gate.hold(batcher)
        histories = [["gone"] if n % 3 == 0 else [str(n)] for n in range(20)]
        tasks = await started(batcher, *(Request(history, 3) for history in histories))
        gate.release()
        found = await asyncio.gather(first, *tasks, return_exceptions=True)
        batcher.close()
        return found[1:]

    found = run(main())
    assert [call[0] for call in gate.calls[1:]] == [20, 13]
    for n, one in enumerate(found):
        if n % 3 == 0:
            assert str(one) == "history has 1 item(s), none of which the store has"
        else:
            assert one.answer.items == gate.recommend([[str(n)]], 3)[0].items


def test_so_many_are_ranked_again_in_one_call(online, monkeypatch):
    gate = Gate(online, monkeypatch)

    async def main():
        batcher = Batcher(online)
        first = await gate.hold(batcher)
        tasks = await started(batcher, *(Request([str(n)], 3, rerank=64) for n in range(6)))
        gate.release()
        await asyncio.gather(first, *tasks)
        batcher.close()

    run(main())
    assert [call[0] for call in gate.calls[1:]] == [4, 2]


def test_who_is_late_hears_of_it_while_others_are_answered(online, monkeypatch):
    gate = Gate(online, monkeypatch)

    async def main():
        batcher = Batcher(online, timeout=0.1)
        first = await gate.hold(batcher)
        (task,) = await started(batcher, Request(["1"], 3))
        with pytest.raises(LateError):
            await asyncio.wait_for(task, 5)
        assert not first.done()  # it has begun: it is not late
        gate.release()
        assert (await first).answer.items
        await asyncio.to_thread(batcher.close)

    run(main())


def test_too_many_and_too_late(online, monkeypatch):
    gate = Gate(online, monkeypatch)

    async def main():
        batcher = Batcher(online, max_waiting=2, timeout=0.2)
        first = await gate.hold(batcher)
        tasks = await started(batcher, Request(["1"], 3), Request(["2"], 3))
        with pytest.raises(OverloadedError):
            await batcher.recommend(Request(["3"], 3))
        await asyncio.sleep(0.3)
        gate.release()
        found = await asyncio.gather(first, *tasks, return_exceptions=True)
        assert (await batcher.recommend(Request(["4"], 3))).answer.items
        batcher.close()
        return found

    first, *late = run(main())
    assert first.answer.items and all(isinstance(one, LateError) for one in late)


def test_closing_answers_what_waits(online, monkeypatch):
    gate = Gate(online, monkeypatch)

    async def main():
        batcher = Batcher(online)
        first = await gate.hold(batcher)
        tasks = await started(batcher, Request(["1"], 3), Request(["2"], 3, rerank=2))
        closing = asyncio.ensure_future(asyncio.to_thread(batcher.close))
        await asyncio.sleep(0.05)
        with pytest.raises(ClosedError):
            await batcher.recommend(Request(["3"], 3))
        assert not closing.done()
        gate.release()
        found = await asyncio.gather(first, *tasks)
        await closing
        return found

    assert all(len(one.answer.items) == 3 for one in run(main()))


def test_who_has_given_up_costs_nothing(online, monkeypatch):
    gate = Gate(online, monkeypatch)

    async def main():
        batcher = Batcher(online)
        first = await gate.hold(batcher)
        gone, stays = await started(batcher, Request(["1"], 3), Request(["2"], 3))
        gone.cancel()
        await asyncio.sleep(0)
        gate.release()
        await asyncio.gather(first, stays)
        batcher.close()

    run(main())
    assert [call[0] for call in gate.calls] == [1, 1]


def test_a_defect_ends_in_an_error_and_not_in_silence(online, monkeypatch, caplog):
    recommend = online.recommend

    def broken(histories, k, **options):
        if ["2"] in histories:
            raise RuntimeError("a defect")
        return recommend(histories, k, **options)

    monkeypatch.setattr(online, "recommend", broken)

    async def main():
        batcher = Batcher(online)
        with pytest.raises(RuntimeError, match="a defect"):
            await batcher.recommend(Request(["2"], 3))
        found = await batcher.recommend(Request(["1"], 3))
        batcher.close()
        return found

    assert run(main()).answer.items and "answering 1 requests failed" in caplog.text


def flat(ms: float) -> Times:
    return Times((ms,) * len(QUANTILES), 1)


def test_company_changes_no_plan(online, monkeypatch):
    """Of requests with budgets, only so many are answered together as keep the plan that each would have alone."""
    online.costs = Costs(online.facts, {5: {1: flat(1.0)}, 20: {1: flat(2.0)}}, {4: flat(1000.0)})
    gate = Gate(online, monkeypatch)
    budgets = [5000.0, 5000.0, 5000.0, 900.0, 5000.0, None, 800.0]

    async def main():
        batcher = Batcher(online)
        first = await gate.hold(batcher)
        tasks = await started(batcher, *(Request([str(n)], 3, budget_ms=ms) for n, ms in enumerate(budgets)))
        gate.release()
        found = await asyncio.gather(first, *tasks)
        batcher.close()
        return found[1:]

    found = run(main())
    # Four rerank calls of one second each fit into five; a fifth history would not.
    assert [one.batch for one in found] == [4, 4, 4, 2, 4, 1, 2]
    assert [one.answer.how.rerank for one in found] == [4, 4, 4, 0, 4, 0, 0]
    assert [one.answer.how.budget_ms for one in found] == budgets
    calls = {n: options["budget_ms"] for n, _, options in gate.calls[1:]}
    assert calls[1] is None and 0 < calls[2] < 800 and 900 < calls[4] < 5000
    assert all(one.answer.how.in_time for one in found)
    assert Plan(*found[0].answer.how[:2]) == Plan(20, 4)


def test_waiting_counts_against_the_budget(online, monkeypatch):
    online.costs = Costs(online.facts, {20: {1: flat(1.0)}}, {4: flat(40.0)})
    gate = Gate(online, monkeypatch)

    async def main():
        batcher = Batcher(online)
        first = await gate.hold(batcher)
        (task,) = await started(batcher, Request(["1"], 3, budget_ms=60.0))
        await asyncio.sleep(0.1)
        gate.release()
        await first
        found = await task
        batcher.close()
        return found

    found = run(main())
    assert found.answer.how.rerank == 0 and not found.answer.how.in_time and found.waited_ms > 60
    assert found.answer.how.took_ms < 60


def test_settings_out_of_range(online):
    for wrong in ({"max_batch": 0}, {"max_waiting": 0}, {"timeout": 0.0}):
        with pytest.raises(ValueError, match="must be above 0"):
            Batcher(online, **wrong)


def test_a_closed_loop_is_no_reason_to_stop(online, monkeypatch, caplog):
    gate = Gate(online, monkeypatch)
    batcher = Batcher(online)
    with pytest.raises(asyncio.TimeoutError):
        asyncio.run(asyncio.wait_for(batcher.recommend(Request(["1"], 3)), 0.05))
    gate.release()
    until = time.monotonic() + 10
    while "after the event loop had ended" not in caplog.text and time.monotonic() < until:
        time.sleep(0.01)
    assert "1 answers came after the event loop had ended" in caplog.text
    assert asyncio.run(batcher.recommend(Request(["1"], 3))).answer.items
    batcher.close()
