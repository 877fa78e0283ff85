"""top_k on this machine's CPU provider against a brute-force oracle in float64; test_environments.py adds the ISAs."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from topk_helpers import DTYPES, all_scores, check, lists, oracle, problem
from torch import Tensor

import mmrec_kernels
from mmrec_kernels import top_k

SHAPES = [(1, 100, 64, 5), (7, 1000, 33, 10), (40, 777, 128, 100), (13, 200, 1, 3), (5, 65, 17, 64), (70, 3000, 40, 1)]


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("b", (1, 7))
def test_items_may_be_one_row_expanded(b, dtype):
    p = problem(b, 1, 24, dtype)
    expanded = {name: t if name == "query" else t.expand(100, *t.shape[1:]) for name, t in p.items()}
    assert top_k(**expanded, k=3).ids.tolist() == [[0, 1, 2]] * b


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
