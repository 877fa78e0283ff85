"""One query finds the same bits as beside others: its first pass leaves out only what cannot be among the best."""

from __future__ import annotations

import math

import pytest
import torch
from topk_helpers import DTYPES, all_scores, assert_same, check, in_full, problem
from torch import Tensor

from mmrec_kernels import TopK, top_k


def assert_one_of_many(p: dict[str, Tensor | None], k: int) -> TopK:
    """What one query finds, which is to the bit what it finds beside others, and where nothing is left out."""
    alone, many = top_k(**p, k=k), top_k(**{**p, "query": p["query"].expand(7, -1)}, k=k)
    assert_same(alone, in_full(p, k))
    for row in range(7):
        assert_same(alone, TopK(many.scores[row : row + 1], many.ids[row : row + 1]))
    return alone


def assert_one_of_many_among_candidates(p: dict[str, Tensor]) -> None:
    """Every query has its own candidates, and so scores them alone; here they are all items, the others far below."""
    ids = torch.randint(0, len(p["items"]), (500,))
    alone = top_k(**p, k=10, candidates=(torch.tensor([0, 500]), ids))
    bias = torch.full((len(p["items"]),), -math.inf)
    bias[ids] = 0.0 if p.get("bias") is None else p["bias"][ids]
    assert_same(alone, in_full({**p, "bias": bias}, 10))


@pytest.mark.parametrize("size", (1.0, 1e-30, 1e-20, 1e20, 1e37, 0.0, math.nan, math.inf))
@pytest.mark.parametrize("d", (1, 63, 64, 65, 130, 256, 257))
@pytest.mark.parametrize("peak", (False, True))
def test_one_query_over_int8_items_is_one_of_many(peak, d, size):
    """A first pass may leave out only what cannot be among the best, whatever scales and biases are. It rounds a query
    to 8 bits, and one with a peak to 16."""
    n = 3000
    p = problem(1, n, d, torch.int8)
    if peak:  # all others are what eight bits of it round to nothing
        p["query"] = p["query"].sign() * 0.49 / 127
        p["query"][0, d // 2] = 1.0
    p["query"] = p["query"] * size if math.isfinite(size) else torch.where(torch.arange(d) == 0, size, p["query"])
    p["item_scales"] *= torch.where(torch.rand(n) < 0.3, -1.0, 1.0)
    p["items"][:50] = 127 * p["query"].nan_to_num().sign().to(torch.int8)  # the best, and ties

    for scale in (1.0, 1e20, 1e-30, 2.0**-149):
        assert_one_of_many({**p, "bias": None, "item_scales": (p["item_scales"] * 64).sign() * scale}, 10)
    assert_one_of_many({**p, "bias": p["bias"] * 3e38}, 10)
    assert_one_of_many_among_candidates(p)
    for special in ({}, {"item_scales": (math.nan, math.inf, 0.0)}, {"bias": (math.nan, math.inf, -math.inf)}):
        for name, values in special.items():
            p[name][torch.randperm(n)[:30]] = torch.tensor(values).repeat(10)
        for k in (1, 10, 100):
            assert_one_of_many(p, k)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("d", (1, 31, 64, 65, 130, 257))
def test_one_query_sees_what_another_order_of_its_sums_hides(d, dtype):
    """All items have the same columns in another order, and their sum is 0: a score is what rounding makes of that."""
    item = torch.zeros(d)
    item[: d // 2] = torch.randn(d // 2) * torch.logspace(0, 6, d // 2)  # so that sums of bfloat16 are rounded too
    item[d // 2 : d // 2 * 2] = -item[: d // 2]
    items = torch.stack([item[torch.randperm(d)] for _ in range(6000)]).to(dtype)
    found = assert_one_of_many({"query": torch.ones(1, d, dtype=dtype), "items": items}, 100)
    assert d == 1 or found.scores.unique().numel() > 1


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("size", (1e-30, 1e-20, 1e10, 1e18, math.nan, math.inf))
def test_one_query_is_one_of_many(size, dtype):
    n, d = 3000, 48
    p = problem(1, n, d, dtype)
    p["query"][0, 5] *= size
    p["items"][100:200] *= 2.0**-130
    p["items"][300:400] *= 1e20
    p["bias"][torch.randperm(n)[:30]] = torch.tensor((math.nan, math.inf, -math.inf)).repeat(10)
    p["items"][torch.randperm(n)[:30], 7] = torch.tensor((math.nan, math.inf, -math.inf)).repeat(10).to(dtype)
    for k in (1, 10, 1000):
        assert_one_of_many(p, k)
        assert_one_of_many({**p, "bias": p["bias"] * 3e38}, k)
    assert_one_of_many_among_candidates(p)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_sums_that_overflow_in_another_order_do_not_hide_an_item(dtype):
    """Columns 0 and 32 meet each other first when a row is summed in vectors, and overflow; in order they do not."""
    items = torch.zeros(2000, 64)
    items[:, 0], items[:, 32] = -3e38, -3e38
    for column in (1, 2, 3, 33, 34, 35):
        items[:, column] = 1e38
    items[:, 5] = torch.linspace(-1e37, 1e37, 2000)
    found = assert_one_of_many({"query": torch.ones(1, 64, dtype=dtype), "items": items.to(dtype)}, 10)
    assert found.scores.isfinite().all() and 1999 in found.ids[0]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.int8), ids=str)
def test_chains_that_overflow_are_found(dtype, threads):
    """The best item's chain is infinite, and along its row what would overflow has cancelled before."""
    columns = {torch.float32: (0, 1, 2, 3), torch.bfloat16: (0, 2, 4, 6), torch.int8: (0, 4, 8, 12)}[dtype]
    other, size = (1, 1) if dtype == torch.int8 else (24, 2.0**120)
    query, items = torch.ones(1, 64), torch.zeros(2048, 64)
    items[:200, other] = size
    items[1500, list(columns)] = torch.tensor((1.0, 1.0, -1.0, -1.0)) * (64 if dtype == torch.int8 else 2.0**127)
    p = {"query": query.to(dtype), "items": items.to(dtype)}
    if dtype == torch.int8:
        query.zero_()
        query[0, [other, *columns]] = 2.0**121
        p = {"query": query, "items": items.to(dtype), "item_scales": torch.ones(2048)}
    for count in (1, 2):
        threads(count)
        found = assert_one_of_many(p, 1)
        assert (found.ids.tolist(), found.scores.tolist()) == ([[1500]], [[math.inf]])


@pytest.mark.parametrize("flush", (False, True))
@pytest.mark.parametrize("d", (6, 7, 40))
def test_subnormal_sums_that_scales_make_large(d, flush, threads):
    threads(1)  # the mode is a thread's own
    u, items, scales = 2.0**-126, torch.zeros(2048, d, dtype=torch.int8), torch.full((2048,), 2.0**127)
    items[:, 1] = -1
    if flush:
        query = torch.tensor([-1.5 * u, 1.25 * u, 0, 0, 1.25 * u, -u])
        items[200:, 1] = -3
        items[1500, :6] = torch.tensor((1, 0, 0, 0, 1, 1))
    else:
        query = torch.tensor([u / 64, u / 2**23, 0, 0, u / 2**23, -u / 64])
        items[1500, :6] = torch.tensor((-128, 0, 0, 0, -1, -128))
        scales[:], scales[:200], scales[1500] = 2.0**115, 2.0**90, 2.0**127
    query = torch.nn.functional.pad(query, (0, d - 6))[None]
    torch.set_flush_denormal(flush)
    try:
        found = assert_one_of_many({"query": query, "items": items, "item_scales": scales}, 1)
    finally:
        torch.set_flush_denormal(False)
    assert flush or found.ids.tolist() == [[1500]]


def test_flushed_products_of_very_wide_rows():
    d = 1 << 18
    query, items = torch.full((1, d), 2.0**-63), torch.zeros(140, d)
    query[0, 0] = 2.0**-50
    items[:66, 0], items[135] = 1.5 * 2.0**-60, 2.0**-64
    found = assert_one_of_many({"query": query.bfloat16(), "items": items.bfloat16()}, 1)
    assert found.ids.tolist() == [[135]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", (1, 63, 64, 65, 700, 3000))
def test_items_in_the_order_of_their_scores(n, dtype):
    """Everything passes, whichever way the order goes."""
    p = problem(1, n, 40, dtype)
    order = all_scores(**p)[0].argsort()
    for rows in (order, order.flip(0)):
        sorted_items = {name: t if name == "query" else t[rows] for name, t in p.items()}
        for k in (1, 10, 200):
            check(assert_one_of_many(sorted_items, k), all_scores(**sorted_items), k)


@pytest.mark.parametrize("largest", (1.0, 1.004))
def test_one_query_over_int8_items_with_subnormal_scores(largest):
    """0.50001 is rounded to more than a half, and to less."""
    query, items = torch.tensor([[largest, 0.50001]]), torch.zeros(2000, 2, dtype=torch.int8)
    items[1700, 1] = 1
    p = {"query": query, "items": items, "item_scales": torch.full((2000,), 2.0**-149)}
    assert assert_one_of_many(p, 1).ids.tolist() == [[1700]]


def test_one_query_over_int8_items_sees_what_rounding_loses():
    """The items differ only where the query is far below its largest column."""
    query = torch.zeros(1, 64)
    query[0, 3], query[0, 5] = 1.0, 1e-5
    items = torch.zeros(5000, 64, dtype=torch.int8)
    items[:, 5] = torch.arange(5000).div(20, rounding_mode="floor").sub(125).to(torch.int8)
    found = top_k(query, items, 30, item_scales=torch.ones(5000))
    assert found.ids.tolist() == [[*range(4980, 5000), *range(4960, 4970)]]
