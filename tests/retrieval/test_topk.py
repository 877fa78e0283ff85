"""top_k on this machine's CPU provider against a brute-force oracle in float64; test_environments.py adds the ISAs."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

import mmrec_kernels
from mmrec_kernels import TopK, top_k
from numerics import assert_accurate

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int8)
SHAPES = [(1, 100, 64, 5), (7, 1000, 33, 10), (40, 777, 128, 100), (13, 200, 1, 3), (5, 65, 17, 64), (70, 3000, 40, 1)]


def problem(b: int, n: int, d: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Random query, items, bias and, for int8 items, scales."""
    float_dtype = torch.float32 if dtype == torch.int8 else dtype
    made = {"query": torch.randn(b, d).to(float_dtype), "items": torch.randn(n, d).to(float_dtype)}
    made["bias"] = torch.randn(n, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    if dtype == torch.int8:
        made["items"] = torch.randint(-128, 128, (n, d), dtype=torch.int8)
        made["item_scales"] = torch.rand(n) / 64
    return made


def lists(b: int, n: int, longest: int = 20) -> tuple[Tensor, Tensor]:
    """Ragged ids in any order, with repetitions and ids that do not exist."""
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), torch.randint(0, longest, (b,)).cumsum(0)])
    return offsets, torch.randint(-3, n + 3, (int(offsets[-1]),))


def all_scores(query: Tensor, items: Tensor, bias: Tensor | None = None, item_scales: Tensor | None = None) -> Tensor:
    scores = query.double() @ items.double().T
    scores = scores if item_scales is None else scores * item_scales.double()
    return scores if bias is None else scores + bias.double()


def oracle(scores: Tensor, k: int, exclude=None, candidates=None) -> tuple[Tensor, Tensor]:
    """Sort every row's candidates by (score, id), one row at a time."""
    values, ids = [], []
    for b, row in enumerate(scores.tolist()):
        allowed = set(range(len(row)))
        if candidates is not None:
            allowed &= set(candidates[1][candidates[0][b] : candidates[0][b + 1]].tolist())
        if exclude is not None:
            allowed -= set(exclude[1][exclude[0][b] : exclude[0][b + 1]].tolist())
        best = sorted((-row[i], i) for i in allowed if row[i] > -math.inf)[:k]
        best += [(math.inf, -1)] * (k - len(best))
        values.append([-s for s, _ in best])
        ids.append([i for _, i in best])
    return torch.tensor(values, dtype=torch.float64).view(-1, k), torch.tensor(ids).view(-1, k)


def check(result: TopK, scores: Tensor, k: int, **lists_of) -> None:
    """Scores are accurate position by position; ids are the oracle's, or differ where its gap is within the error."""
    want, want_ids = oracle(scores, k, **lists_of)
    found = want_ids >= 0
    assert torch.equal(result.ids >= 0, found)
    assert bool((result.scores[~found] == -math.inf).all())
    dtype = result.scores.dtype
    eager = want.to(dtype)
    assert_accurate(result.scores[found], want[found], eager[found])
    scale = float(scores[scores.isfinite()].abs().max()) if scores.isfinite().any() else 1.0
    tolerance = {torch.float32: 2e-6, torch.float64: 1e-12}[dtype] * max(scale, 1.0) * 4
    own = torch.gather(torch.nn.functional.pad(scores, (0, 1)), 1, result.ids.clamp(min=0))
    assert bool(((own - want).abs()[found] <= tolerance).all())
    for row in result.ids.tolist():
        kept = [i for i in row if i >= 0]
        assert len(kept) == len(set(kept))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_oracle(shape, dtype):
    b, n, d, k = shape
    p = problem(b, n, d, dtype)
    scores = all_scores(**p)
    exclude, candidates = lists(b, n), lists(b, n, 60)
    for chosen in (
        {},
        {"exclude": exclude},
        {"candidates": candidates},
        {"exclude": exclude, "candidates": candidates},
    ):
        check(top_k(**p, k=k, **chosen), scores, k, **chosen)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_go_to_the_lower_id(dtype):
    query = torch.randint(-2, 3, (9, 4)).to(torch.float32 if dtype == torch.int8 else dtype)
    items = torch.randint(-2, 3, (500, 4)).to(dtype)
    scales = {"item_scales": torch.ones(500)} if dtype == torch.int8 else {}
    result = top_k(query, items, 50, **scales)
    want, want_ids = oracle(all_scores(query, items), 50)
    assert torch.equal(result.ids, want_ids)
    assert torch.equal(result.scores.double(), want)


def test_rising_scores_replace_every_kept_item():
    items = torch.arange(5000, dtype=torch.float32)[:, None]
    assert top_k(torch.ones(2, 1), items, 7).ids.tolist() == [list(range(4999, 4992, -1))] * 2


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("k", (1, 63, 64, 65, 200, 3000))
def test_full_buffers_keep_the_first_of_the_best(k, dtype):
    """Scores in several orders, with many ties, infinity and extreme sizes: what a buffer's cut must get right."""
    few = torch.randint(-3, 4, (5000,)).to(dtype)
    wild = torch.randn(5000, dtype=dtype) * 10.0 ** torch.randint(-30, 30, (5000,))
    wild[torch.randperm(5000)[:20]] = math.inf
    for scores in (few, few.sort().values, few.sort(descending=True).values, wild, wild.sort().values, -wild.abs()):
        want = torch.sort(scores, descending=True, stable=True)
        found = top_k(torch.ones(1, 1, dtype=dtype), scores[:, None], k)
        kept = want.values[:k] > -math.inf
        assert torch.equal(found.ids[0], torch.where(kept, want.indices[:k], -1))
        assert torch.equal(found.scores[0], want.values[:k])


def test_zeros_of_both_signs_are_one_score():
    items = torch.tensor([[-0.0], [0.0], [-0.0], [0.0]])
    assert top_k(torch.ones(1, 1), items, 3).ids.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_score_depends_on_its_query_and_item_only(dtype, threads):
    p = problem(37, 400, 48, dtype)
    whole = top_k(**p, k=400)
    full = torch.empty_like(whole.scores).scatter_(1, whole.ids, whole.scores)
    permutation = torch.randperm(400)
    for count, rows in itertools.product((1, 2, 4), (1, 2, 3, 4, 5, 6, 7, 37)):
        threads(count)
        part = {name: t[permutation] if name != "query" else t[:rows] for name, t in p.items()}
        result = top_k(**part, k=400)
        got = torch.empty_like(result.scores).scatter_(1, permutation[result.ids], result.scores)
        assert torch.equal(got, full[:rows])


def one_of_many(p: dict[str, Tensor | None], k: int) -> TopK:
    """What one query finds, which is to the bit what it finds beside others, where nothing is left out beforehand."""
    alone, many = top_k(**p, k=k), top_k(**{**p, "query": p["query"].expand(7, -1)}, k=k)
    assert torch.equal(alone.ids[0], many.ids[6]) and torch.equal(alone.scores[0], many.scores[6])
    return alone


def one_of_many_among_candidates(p: dict[str, Tensor]) -> None:
    ids = torch.randint(0, len(p["items"]), (500,))
    alone = top_k(**p, k=10, candidates=(torch.tensor([0, 500]), ids))
    many = {**p, "query": p["query"].expand(7, -1)}
    again = top_k(**many, k=10, candidates=(torch.arange(8) * 500, ids.repeat(7)))
    assert torch.equal(alone.ids[0], again.ids[6]) and torch.equal(alone.scores[0], again.scores[6])


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
        one_of_many({**p, "bias": None, "item_scales": (p["item_scales"] * 64).sign() * scale}, 10)
    one_of_many({**p, "bias": p["bias"] * 3e38}, 10)
    one_of_many_among_candidates(p)
    for special in ({}, {"item_scales": (math.nan, math.inf, 0.0)}, {"bias": (math.nan, math.inf, -math.inf)}):
        for name, values in special.items():
            p[name][torch.randperm(n)[:30]] = torch.tensor(values).repeat(10)
        for k in (1, 10, 100):
            one_of_many(p, k)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("d", (1, 31, 64, 65, 130, 257))
def test_one_query_sees_what_another_order_of_its_sums_hides(d, dtype):
    """All items have the same columns in another order, and their sum is 0: a score is what rounding makes of that."""
    item = torch.zeros(d)
    item[: d // 2] = torch.randn(d // 2) * torch.logspace(0, 6, d // 2)  # so that sums of bfloat16 are rounded too
    item[d // 2 : d // 2 * 2] = -item[: d // 2]
    items = torch.stack([item[torch.randperm(d)] for _ in range(6000)]).to(dtype)
    found = one_of_many({"query": torch.ones(1, d, dtype=dtype), "items": items}, 100)
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
        one_of_many(p, k)
        one_of_many({**p, "bias": p["bias"] * 3e38}, k)
    one_of_many_among_candidates(p)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_sums_that_overflow_in_another_order_do_not_hide_an_item(dtype):
    """Columns 0 and 32 meet each other first when a row is summed in vectors, and overflow; in order they do not."""
    items = torch.zeros(2000, 64)
    items[:, 0], items[:, 32] = -3e38, -3e38
    for column in (1, 2, 3, 33, 34, 35):
        items[:, column] = 1e38
    items[:, 5] = torch.linspace(-1e37, 1e37, 2000)
    found = one_of_many({"query": torch.ones(1, 64, dtype=dtype), "items": items.to(dtype)}, 10)
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
        found = one_of_many(p, 1)
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
        found = one_of_many({"query": query, "items": items, "item_scales": scales}, 1)
    finally:
        torch.set_flush_denormal(False)
    assert flush or found.ids.tolist() == [[1500]]


def test_flushed_products_of_very_wide_rows():
    d = 1 << 18
    query, items = torch.full((1, d), 2.0**-63), torch.zeros(140, d)
    query[0, 0] = 2.0**-50
    items[:66, 0], items[135] = 1.5 * 2.0**-60, 2.0**-64
    one_of_many({"query": query.bfloat16(), "items": items.bfloat16()}, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", (1, 63, 64, 65, 700, 3000))
def test_items_in_the_order_of_their_scores(n, dtype):
    """Everything passes, whichever way the order goes."""
    p = problem(1, n, 40, dtype)
    order = all_scores(**p)[0].argsort()
    for rows in (order, order.flip(0)):
        sorted_items = {name: t if name == "query" else t[rows] for name, t in p.items()}
        for k in (1, 10, 200):
            check(one_of_many(sorted_items, k), all_scores(**sorted_items), k)


def test_one_query_over_int8_items_with_subnormal_scores():
    query, items = torch.tensor([[1.0, 0.50001]]), torch.zeros(400, 2, dtype=torch.int8)
    items[300, 1] = 1
    assert top_k(query, items, 1, item_scales=torch.full((400,), 2.0**-149)).ids.tolist() == [[300]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("b", (1, 7))
def test_items_may_be_one_row_expanded(b, dtype):
    p = problem(b, 1, 24, dtype)
    expanded = {name: t if name == "query" else t.expand(100, *t.shape[1:]) for name, t in p.items()}
    assert top_k(**expanded, k=3).ids.tolist() == [[0, 1, 2]] * b


def test_one_query_over_int8_items_sees_what_rounding_loses():
    """The items differ only where the query is far below its largest column."""
    query = torch.zeros(1, 64)
    query[0, 3], query[0, 5] = 1.0, 1e-5
    items = torch.zeros(5000, 64, dtype=torch.int8)
    items[:, 5] = torch.arange(5000).div(20, rounding_mode="floor").sub(125).to(torch.int8)
    found = top_k(query, items, 30, item_scales=torch.ones(5000))
    assert found.ids.tolist() == [[*range(4980, 5000), *range(4960, 4970)]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_that_is_not_referenced_is_not_read(dtype):
    p = problem(6, 90, 21, dtype)
    expected = top_k(**p, k=8)
    poison = -128 if dtype == torch.int8 else math.nan
    for name in ("query", "items"):
        around = torch.full((p[name].shape[0] + 2, p[name].shape[1] + 5), poison, dtype=p[name].dtype)
        around[1:-1, 2:-3] = p[name]
        result = top_k(**{**p, name: around[1:-1, 2:-3]}, k=8)
        assert torch.equal(result.scores, expected.scores) and torch.equal(result.ids, expected.ids)


def test_rows_outside_the_candidates_may_hold_nan():
    p = problem(4, 60, 16, torch.float32)
    candidates = (torch.tensor([0, 2, 2, 5, 6]), torch.tensor([3, 59, 10, 4, 3, 7]))
    p["items"][torch.tensor([i for i in range(60) if i not in (3, 59, 10, 4, 7)])] = math.nan
    result = top_k(**p, k=3, candidates=candidates)
    assert result.ids[1].tolist() == [-1, -1, -1] and not result.scores.isnan().any()
    assert sorted(result.ids[2].tolist()) == [3, 4, 10]


def test_nan_scores_and_minus_infinity_are_never_returned():
    p = problem(3, 50, 8, torch.float32)
    p["items"][7] = math.nan
    p["bias"][9] = -math.inf
    p["bias"][11] = math.nan
    result = top_k(**p, k=50)
    assert not result.scores.isnan().any()
    assert bool((result.ids[:, 47:] == -1).all()) and bool((result.ids[:, :47] >= 0).all())
    assert not set(result.ids.flatten().tolist()) & {7, 9, 11}


@pytest.mark.parametrize("b, n, d", [(0, 5, 4), (3, 0, 4), (3, 5, 0), (0, 0, 0)])
def test_empty_inputs(b, n, d):
    result = top_k(torch.randn(b, d), torch.randn(n, d), 4)
    assert result.scores.shape == result.ids.shape == (b, 4)
    expected = [0, 1, 2, 3] if n and d == 0 else [-1] * 4
    if n == 0 or d == 0:
        assert result.ids.tolist() == [expected] * b


def test_strides_of_every_argument_are_honoured():
    p = problem(12, 80, 20, torch.float32)
    exclude = lists(12, 80)
    expected = top_k(**p, k=6, exclude=exclude)
    strided = {
        "query": p["query"].T.contiguous().T,
        "items": p["items"].repeat_interleave(2, 1)[:, ::2],
        "bias": p["bias"].repeat_interleave(3)[::3],
    }
    result = top_k(**strided, k=6, exclude=(exclude[0].repeat_interleave(2)[::2], exclude[1].repeat_interleave(2)[::2]))
    assert torch.equal(result.ids, expected.ids) and torch.equal(result.scores, expected.scores)
    broadcast = top_k(p["query"][:1].expand(5, -1), p["items"], 4)
    assert torch.equal(broadcast.ids, top_k(p["query"][:1], p["items"], 4).ids.expand(5, -1))


def test_lists_may_start_late_and_use_int32():
    p = problem(2, 30, 8, torch.float32)
    offsets, ids = torch.tensor([2, 4, 5]), torch.tensor([0, 1, 5, 6, 7, 9])
    result = top_k(**p, k=30, exclude=(offsets.int(), ids.int()))
    assert set(range(30)) - set(result.ids[0].tolist()) == {5, 6} and set(range(30)) - set(result.ids[1].tolist()) == {
        7
    }


def test_quantize_query_may_not_change_what_is_best():
    p = problem(5, 400, 32, torch.int8)
    exact, allowed = top_k(**p, k=10), top_k(**p, k=10, quantize_query=True)
    assert torch.equal(allowed.scores, exact.scores) and torch.equal(allowed.ids, exact.ids)


def test_results_carry_no_gradient_and_autocast_keeps_the_dtype():
    p = problem(3, 40, 8, torch.float32)
    p["query"].requires_grad_()
    p["items"].requires_grad_()
    expected = top_k(**p, k=5)
    assert not expected.scores.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = top_k(**p, k=5)
    assert result.scores.dtype == torch.float32 and torch.equal(result.scores, expected.scores)


def test_opcheck_and_compile():
    op = torch.ops.mmrec._retrieval_topk.default
    p, exclude, candidates = problem(3, 40, 8, torch.float32), lists(3, 40), lists(3, 40)
    torch.library.opcheck(op, (p["query"], p["items"], 5, None, p["bias"], *exclude, *candidates, False))
    int8 = problem(3, 40, 8, torch.int8)
    torch.library.opcheck(
        op, (int8["query"], int8["items"].T.contiguous().T, 5, int8["item_scales"], *[None] * 5, True)
    )

    @torch.compile(fullgraph=True, dynamic=True)
    def best(query: Tensor, items: Tensor, exclude: tuple[Tensor, Tensor]) -> Tensor:
        result = top_k(query * 2, items, 5, exclude=exclude)
        return result.scores.sum(1) + result.ids.sum(1)

    for b, n in ((3, 40), (5, 90), (8, 17)):
        q, x, e = torch.randn(b, 8), torch.randn(n, 8), lists(b, n)
        result = top_k(q * 2, x, 5, exclude=e)
        torch.testing.assert_close(best(q, x, e), result.scores.sum(1) + result.ids.sum(1))


Q, X = torch.zeros(2, 4), torch.zeros(3, 4)
OFFSETS, IDS = torch.tensor([0, 1, 1]), torch.tensor([0])


@pytest.mark.parametrize(
    "error, argument, call",
    [
        (TypeError, "query", lambda: top_k([1.0], X, 1)),
        (ValueError, "query", lambda: top_k(Q[0], X, 1)),
        (TypeError, "query", lambda: top_k(Q.long(), X, 1)),
        (TypeError, "query", lambda: top_k(Q.half(), X.half(), 1)),
        (ValueError, "items", lambda: top_k(Q, X[:, :3], 1)),
        (TypeError, "items", lambda: top_k(Q, X.double(), 1)),
        (TypeError, "query", lambda: top_k(Q.double(), X.to(torch.int8), 1, item_scales=torch.ones(3))),
        (TypeError, "k", lambda: top_k(Q, X, 1.0)),
        (TypeError, "k", lambda: top_k(Q, X, True)),
        (ValueError, "k", lambda: top_k(Q, X, 0)),
        (ValueError, "item_scales", lambda: top_k(Q, X.to(torch.int8), 1)),
        (ValueError, "item_scales", lambda: top_k(Q, X, 1, item_scales=torch.ones(3))),
        (ValueError, "item_scales", lambda: top_k(Q, X.to(torch.int8), 1, item_scales=torch.ones(4))),
        (ValueError, "quantize_query", lambda: top_k(Q, X, 1, quantize_query=True)),
        (ValueError, "bias", lambda: top_k(Q, X, 1, bias=torch.ones(2))),
        (TypeError, "bias", lambda: top_k(Q, X, 1, bias=torch.ones(3, dtype=torch.int32))),
        (TypeError, "exclude", lambda: top_k(Q, X, 1, exclude=OFFSETS)),
        (ValueError, "exclude[0]", lambda: top_k(Q, X, 1, exclude=(OFFSETS[:2], IDS))),
        (TypeError, "exclude[1]", lambda: top_k(Q, X, 1, exclude=(OFFSETS, IDS.float()))),
        (ValueError, "exclude[0]", lambda: top_k(Q, X, 1, exclude=(torch.tensor([0, 1, 0]), IDS))),
        (ValueError, "exclude[0]", lambda: top_k(Q, X, 1, exclude=(torch.tensor([0, 1, 2]), IDS))),
        (ValueError, "candidates[0]", lambda: top_k(Q, X, 1, candidates=(torch.tensor([-1, 0, 1]), IDS))),
        (ValueError, "items", lambda: top_k(Q, X.to("meta"), 1)),
    ],
)
def test_bad_arguments_are_named(error, argument, call):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value).startswith(argument), caught.value
    assert "\n" not in str(caught.value)


def test_exports():
    assert {"top_k", "TopK"} <= set(mmrec_kernels.__all__)
