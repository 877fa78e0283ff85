"""Many queries find the same bits as where nothing is left out: their first pass has rounded queries and items."""

from __future__ import annotations

import ctypes
import math
import mmap

import pytest
import torch
from topk_helpers import assert_same, in_full, lists, problem

from mmrec_kernels import top_k

DTYPES = (torch.float32, torch.int8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", (1, 2, 31, 32, 33, 63, 64, 65, 130, 256, 257))
@pytest.mark.parametrize("b", (2, 5, 6, 7, 8, 13, 32))
def test_same_bits_as_in_full(b, d, dtype):
    n = 4000 + 37 * b
    p = problem(b, n, d, dtype)
    exclude = lists(b, n, longest=200)
    for k in (1, 10, 40):
        for bias in (None, p["bias"]):
            case = {**p, "bias": bias}
            assert_same(top_k(**case, k=k), in_full(case, k))
        assert_same(top_k(**p, k=k, exclude=exclude), in_full(p, k, exclude))


@pytest.mark.parametrize("size", (1e-30, 1e-20, 1e-12, 1.0, 1e12, 1e20, 1e37))
@pytest.mark.parametrize("of", ("query", "items", "item_scales"))
def test_sizes(of, size):
    p = problem(9, 3000, 48, torch.int8 if of == "item_scales" else torch.float32)
    p["bias"][torch.randperm(3000)[:30]] = torch.tensor((math.nan, math.inf, -math.inf)).repeat(10)
    sizes = torch.rand(*p[of].shape[:1], *[1] * (p[of].dim() - 1))
    p[of] = p[of] * size**sizes  # from 1 to size
    for factor in (1.0, size, 3e38):
        case = {**p, "bias": p["bias"] * factor}
        for k in (1, 30):
            assert_same(top_k(**case, k=k), in_full(case, k))


@pytest.mark.parametrize("size", (1.0, 2.0**-70, 2.0**30))
@pytest.mark.parametrize("d", (2, 31, 64, 100, 4096, 4098))
def test_the_best_item_loses_the_most_to_rounding(d, size):
    """1 + 2^-8 is rounded to 1, in the query and in the best item; others are as good but for 2^-16."""
    down, n, best = 1 + 2.0**-8, 2000, 1700
    query, items = torch.full((7, d), down), torch.full((n, d), (down - 2.0**-16) * size)
    items[best] = down * size
    p = {"query": query, "items": items}
    found = top_k(**p, k=5)
    assert_same(found, in_full(p, 5))
    assert (found.ids[:, 0] == best).all()


def test_an_item_that_a_large_bias_rounds_up():
    down = 1 + 2.0**-8
    items = torch.full((2000, 1), 0.9)
    items[1700] = down
    found = top_k(torch.full((7, 1), down), items, 1, bias=torch.full((2000,), 2.0**24))
    assert found.ids.unique().tolist() == [1700]


def test_a_score_that_overflows_before_its_bias():
    items, scales, bias = torch.ones(2000, 1, dtype=torch.int8), torch.full((2000,), 5e37), torch.zeros(2000)
    scales[1700], bias[1700] = 2.0**127, -3e38
    found = top_k(torch.full((7, 1), 2.0), items, 1, item_scales=scales, bias=bias)
    assert (found.ids.unique().tolist(), found.scores.unique().tolist()) == ([1700], [math.inf])


def test_a_negative_scale():
    """The best item is so by a column that all are alike in but for one unit."""
    query, items, scales = torch.rand(7, 64) + 0.5, torch.full((2000, 64), 100, dtype=torch.int8), torch.ones(2000)
    items[1700], scales[1700] = -100, -1
    items[1700, 0] = -101
    assert top_k(query, items, 1, item_scales=scales).ids.unique().tolist() == [1700]


def test_scores_that_are_subnormal():
    """Pairs of bfloat16 have no subnormal products."""
    items = torch.full((2000, 64), 2.0**-27)
    items[1700] *= 1.25
    assert top_k(torch.full((7, 64), 2.0**-100), items, 1).ids.unique().tolist() == [1700]


def test_pairs_that_overflow_in_another_order():
    """The odd columns are added first in a pair, and reach -2^128; in the order of the columns the sum is -2^127."""
    items = torch.zeros(2000, 4)
    items[:, 0], items[1700] = -1.5, torch.tensor((1.0, -1.5, 1.0, -1.5))
    found = top_k(torch.full((7, 4), 2.0**100), items * 2.0**27, 1)
    assert (found.ids.unique().tolist(), found.scores.unique().tolist()) == ([1700], [-(2.0**127)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_closer_than_rounding_can_tell(dtype):
    """Nearly all items pass, and are scored in full."""
    n, d = 20_000, 40
    p = {"query": torch.randn(8, d) + 3, "items": torch.full((n, d), 100.0)}
    p["items"] += torch.randn(n, d) * 0.05
    if dtype == torch.int8:
        p = {**p, "items": p["items"].round().to(dtype), "item_scales": 1 + torch.rand(n) / 5000}
    for k in (1, 50):
        assert_same(top_k(**p, k=k), in_full(p, k))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_items_that_get_better_and_worse(dtype):
    """Panels of which everything passes, and none, take turns."""
    p = problem(8, 20_000, 40, dtype)
    p["query"] = p["query"].abs()
    rising = torch.linspace(0, 1, 1000).repeat(20)
    rows = rising * torch.arange(20).repeat_interleave(1000)
    p["items"] = (p["items"].float().abs() * rows[:, None] / 20).to(dtype)
    for k in (1, 10, 300):
        assert_same(top_k(**p, k=k), in_full(p, k))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_a_wider_matrix_and_one_expanded(dtype):
    p = problem(9, 3000, 100, dtype)
    wide = {**p, "query": p["query"][:, 20:70], "items": p["items"][:, 20:70]}
    assert_same(top_k(**wide, k=20), in_full({name: t.contiguous() for name, t in wide.items()}, 20))
    expanded = {"query": p["query"], "items": p["items"][:1].expand(3000, -1)}
    expanded |= {"item_scales": p["item_scales"]} if dtype == torch.int8 else {}
    assert_same(top_k(**expanded, k=20), in_full(expanded, 20))


@pytest.mark.parametrize("d", (1, 31, 33, 63, 64, 65, 100))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_is_read_behind_the_last_item(dtype, d):
    """The items end where a page ends behind which nothing may be read. The best come first, so that the last are not
    scored in full."""
    n, page = 2000, mmap.PAGESIZE
    p = problem(7, n, d, dtype)
    p["bias"] = torch.zeros(n)
    p["items"][:8] *= 8 if dtype == torch.float32 else 1
    if dtype == torch.int8:
        p["item_scales"][:8] *= 50
    size = p["items"].numel() * p["items"].element_size()
    pages = -(-size // page)
    memory = mmap.mmap(-1, (pages + 1) * page)
    end = torch.frombuffer(memory, dtype=torch.uint8)[: pages * page]
    items = end[pages * page - size :].view(dtype).view(n, d)
    items.copy_(p["items"])
    libc = ctypes.CDLL(None, use_errno=True)
    behind = ctypes.c_void_p(end.data_ptr() + pages * page)
    assert libc.mprotect(behind, page, 0) == 0
    try:
        assert_same(top_k(**{**p, "items": items}, k=1), top_k(**p, k=1))
    finally:
        libc.mprotect(behind, page, mmap.PROT_READ | mmap.PROT_WRITE)


def test_a_query_of_zeros_beside_others():
    """All of its scores are equal, so all of its items pass, and the first are its best."""
    p = problem(32, 3000, 64, torch.float32)
    p["query"][5] = 0
    found = top_k(p["query"], p["items"], 10)
    assert found.ids[5].tolist() == list(range(10))
    assert_same(found, in_full({"query": p["query"], "items": p["items"]}, 10))
