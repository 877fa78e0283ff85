"""The compiled kernels over many blocks, where the contract tests fit into one: sizes, masks, paths, threads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_oracle import EVERYTHING, FLAGS, Case, gradients, normal, oracle, upstream
from attention_providers import use_reference

from mmrec_kernels import library
from mmrec_kernels.attention import AttentionOutput, Segment, cross_modal_attention
from numerics import assert_accurate, errors

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
# Below, at and above a block of 32 rows and 48 keys; up to 4 rows the width lies in lanes; widths of no whole vector.
LENGTHS = [[130, 0, 1, 49, 48], [60, 200, 3, 0, 47], [5, 0, 0, 96, 1]]
QUERIES = [40, 33, 4, 5, 70]


def some_heads_miss_a_segment(queries: list[int], **sizes: int) -> Case:
    case = Case(LENGTHS, queries, width=16, value_width=16, extras=("value_gate", "sink", "key_norm"), **sizes)
    case.leaves["log_bias"] = torch.randn(5, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    case.leaves["log_bias"][:, 1, 0] = case.leaves["log_bias"][2, :, 1] = -torch.inf
    return case


CASES = {
    "groups": lambda: Case(LENGTHS, QUERIES, width=64, value_width=64, extras=EVERYTHING),
    "a KV head each": lambda: Case(LENGTHS, QUERIES, kv_heads=4, width=32, value_width=96, extras=("log_bias", "sink")),
    "few rows": lambda: Case(LENGTHS, [1, 2, 3, 4, 0], kv_heads=4, width=64, value_width=32, extras=EVERYTHING),
    "one query head": lambda: Case(LENGTHS, [1, 31, 32, 64, 65], heads=1, kv_heads=1, width=128, value_width=64),
    "odd widths": lambda: Case(LENGTHS, QUERIES, width=17, value_width=7, extras=EVERYTHING),
    "few rows, odd widths": lambda: Case(LENGTHS, [4, 1, 0, 2, 3], kv_heads=4, width=5, value_width=50),
    "width 1": lambda: Case(LENGTHS, QUERIES, width=1, value_width=1),
    "indexed": lambda: Case(LENGTHS, QUERIES, width=24, value_width=40, indexed=(0, 2), around=2, extras=("key_norm",)),
    "causal": lambda: Case(LENGTHS, QUERIES, width=16, value_width=32, causal=(0, 1), extras=("sink",)),
    "causal, indexed": lambda: Case(LENGTHS, [1, 90, 3, 49, 60], width=16, value_width=16, causal=(0, 1), indexed=(1,)),
    "latent": lambda: Case(LENGTHS, latent=37, width=32, value_width=32, extras=EVERYTHING),
    "few latent": lambda: Case(LENGTHS, latent=2, kv_heads=4, width=32, value_width=32, extras=("value_gate",)),
    "a group beyond a block": lambda: Case(LENGTHS, QUERIES, heads=40, kv_heads=1, width=16, value_width=16),
    "three heads a group": lambda: Case(LENGTHS, QUERIES, heads=6, kv_heads=2, width=16, value_width=16),
    "a head misses a segment": lambda: some_heads_miss_a_segment(QUERIES),
    "few rows, a head misses a segment": lambda: some_heads_miss_a_segment([3, 1, 0, 4, 2]),
    "few rows, a KV head misses a segment": lambda: some_heads_miss_a_segment([3, 1, 0, 6, 5], kv_heads=4),
    "few rows of many heads": lambda: Case(
        LENGTHS, [1, 5, 2, 6, 3], heads=36, kv_heads=36, width=16, extras=EVERYTHING
    ),
    "few rows of groups": lambda: Case(LENGTHS, [1, 3, 2, 7, 0], heads=10, kv_heads=5, width=16, extras=("key_norm",)),
    "few rows, causal": lambda: Case(
        LENGTHS, [1, 5, 3, 6, 2], kv_heads=4, width=16, causal=(0, 1, 2), extras=EVERYTHING
    ),
}


def outputs(case: Case, dtype: torch.dtype, **options: Any) -> AttentionOutput:
    leaves = {name: x.to(dtype) for name, x in case.leaves.items()}
    return case.call(cross_modal_attention, leaves, **FLAGS, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_many_blocks_equal_the_reference_in_float64(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]()
    case.leaves = {n: x.to(dtype).double() for n, x in case.leaves.items()}
    ours = outputs(case, dtype)
    use_reference(monkeypatch)
    exact = outputs(case, torch.float64)
    # Queries times norms are rounded to bfloat16, and so are weights.
    limit = {torch.float32: 3e-6, torch.bfloat16: torch.finfo(torch.bfloat16).eps, torch.float64: 1e-12}[dtype]
    for x, y, what in zip(ours, exact, ("out", "lse", "mass"), strict=True):
        assert x is not None and y is not None
        finite = y.isfinite()
        assert torch.equal(x.isfinite(), finite), what
        assert max(errors(x[finite], y[finite])) <= limit, what


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_gradients_over_many_blocks_equal_the_reference_in_float64(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES[name]()
    case.leaves = {n: x.to(dtype).double() for n, x in case.leaves.items()}

    def differentiated(dtype: torch.dtype) -> dict[str, torch.Tensor]:
        leaves = case.to(dtype)
        results = case.call(cross_modal_attention, leaves, **FLAGS)
        return gradients(results, leaves, [u.to(ours_dtype) for u in upstream(results)])

    ours_dtype = dtype
    ours = differentiated(dtype)
    use_reference(monkeypatch)
    exact = differentiated(torch.float64)
    # dO · out takes its digits from a rounded out; weights and slopes are rounded for products of bfloat16.
    limit = {torch.float32: 5e-6, torch.bfloat16: 1.5 * torch.finfo(torch.bfloat16).eps, torch.float64: 1e-11}[dtype]
    for leaf, gradient in ours.items():
        assert gradient.dtype == dtype and max(errors(gradient, exact[leaf])) <= limit, leaf


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["groups", "few rows", "causal", "indexed", "latent", "a head misses a segment"])
def test_gradients_have_the_same_bits_for_any_number_of_threads(name: str, dtype: torch.dtype, threads: Any) -> None:
    case, found = CASES[name](), []
    for count in (1, 2, 4):
        threads(count)
        leaves = case.to(dtype)
        results = case.call(cross_modal_attention, leaves, **FLAGS)
        found.append(gradients(results, leaves, upstream(results)))
    for other in found[1:]:
        assert all(torch.equal(found[0][leaf], other[leaf]) for leaf in other)


@pytest.mark.parametrize("queries", [2, 12])
def test_an_item_store_adds_up_over_many_chunks_in_order(queries: int) -> None:
    """40 MB of shares of 3 rows: several chunks, all on the same rows, in float64 beside index_add."""
    users, keys, heads, width = 60, 1000, 1, 64
    store = torch.randn(3, heads, width, dtype=torch.float64, requires_grad=True)
    index = torch.randint(-1, 3, (users * keys,), generator=torch.Generator().manual_seed(0))
    query = torch.randn(users * queries, heads, width, dtype=torch.float64)
    key_offsets, query_offsets = torch.arange(users + 1) * keys, torch.arange(users + 1) * queries
    out = cross_modal_attention(query, [Segment(store, store, key_offsets, index)], query_offsets)
    grad = torch.randn_like(out)
    (gradient,) = torch.autograd.grad(out, store, grad)
    rows = store.detach()[index.clamp_min(0)].requires_grad_()
    kept = torch.where(index >= 0, torch.arange(len(index)), -1)
    apart = cross_modal_attention(query, [Segment(rows, rows, key_offsets, kept)], query_offsets)
    (shares,) = torch.autograd.grad(apart, rows, grad)
    expected = torch.zeros_like(gradient).index_add_(0, index.clamp_min(0), shares)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("scale", [0.0, -0.3, 40.0])
@pytest.mark.parametrize("queries", [2, 20])
def test_any_scale(scale: float, queries: int) -> None:
    case = Case([[50, 7]], [queries, queries], kv_heads=4, width=16, value_width=16, extras=("query_norm",))
    ours = outputs(case, torch.float32, scale=scale)
    narrow = {n: x.float() for n, x in case.leaves.items()}
    eager = case.call(oracle, narrow, scale=scale)
    exact = case.call(oracle, {n: x.double() for n, x in narrow.items()}, scale=scale)
    for x, e, y in zip(ours, eager, exact, strict=True):
        assert x is not None
        assert_accurate(x, y, e)


@pytest.mark.parametrize("scale", [0.0, -0.3])
@pytest.mark.parametrize("queries", [2, 20])
def test_gradients_of_any_scale(scale: float, queries: int) -> None:
    case = Case([[50, 7]], [queries, queries], kv_heads=4, width=16, value_width=16, extras=("query_norm",))
    leaves = case.to(torch.float64)

    def loss(function: Any, **more: Any) -> torch.Tensor:
        results = case.call(function, leaves, scale=scale, **more)
        return sum((x * u).sum() for x, u in zip(results, upstream(results), strict=True))

    found = torch.autograd.grad(loss(cross_modal_attention, **FLAGS), list(leaves.values()))
    exact = torch.autograd.grad(loss(oracle), list(leaves.values()))
    for x, y in zip(found, exact, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["groups", "few rows", "causal", "indexed"])
def test_a_sequence_has_the_same_bits_alone_and_for_any_number_of_threads(
    name: str, dtype: torch.dtype, threads: Any
) -> None:
    case = CASES[name]()
    found = []
    for count in (1, 2, 4):
        threads(count)
        found.append(outputs(case, dtype))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    leaves = {n: x.to(dtype) for n, x in case.leaves.items()}
    plain = case.call(cross_modal_attention, leaves)
    assert torch.equal(plain, found[0].out)
    grown = case.call(cross_modal_attention, {n: x.requires_grad_() for n, x in leaves.items()})
    assert torch.equal(grown, plain)
    b, qo = 1, case.query_offsets
    alone = [
        Segment(leaves[f"key{m}"], leaves[f"value{m}"], o[b : b + 2], i, c) for m, (o, i, c) in enumerate(case.plan)
    ]
    small = {n: leaves[n][b : b + 1] if n == "log_bias" else leaves[n] for n in EVERYTHING if n in leaves}
    rows = slice(int(qo[b]), int(qo[b + 1]))
    single = cross_modal_attention(leaves["query"], alone, qo[b : b + 2], **small)
    assert torch.equal(single[rows], plain[rows])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("heads", [1, 4])
def test_what_a_causal_query_does_not_see_changes_none_of_its_bits(heads: int, bad: float, dtype: torch.dtype) -> None:
    """One head: 70 rows in lanes. Four heads of a group: the same with several rows for a query."""
    case = Case([[70, 3]], [70, 3], heads=heads, kv_heads=1, width=16, value_width=24, causal=(0,))
    clean = outputs(case, dtype)
    case.leaves["value0"][50, :, 3] = bad
    case.leaves["key0"][60] = bad
    poisoned = outputs(case, dtype)
    for x, y in zip(clean, poisoned, strict=True):
        assert x is not None and y is not None
        assert torch.equal(x[:50], y[:50]) and torch.equal(x[70:], y[70:])
    seen = poisoned.out[50:60]
    assert not seen[..., 3].isfinite().any() and torch.equal(seen[..., :3], clean.out[50:60, :, :3])
    assert torch.equal(torch.isnan(seen[..., 3]), torch.full_like(seen[..., 3], bad != bad, dtype=torch.bool))


@pytest.mark.parametrize("queries", [2, 12])
def test_nan_reaches_the_log_sum_exp_and_every_value_of_its_row(queries: int) -> None:
    query, key = torch.randn(queries, 1, 16), torch.randn(5, 1, 16)
    key[3] = torch.nan
    offsets = (torch.tensor([0, 5]), torch.tensor([0, queries]))
    value = torch.randn(5, 1, 16, requires_grad=True)
    found = cross_modal_attention(query, [Segment(key, value, offsets[0])], offsets[1], return_lse=True)
    assert found.out.isnan().all() and found.lse is not None and found.lse.isnan().all()
    assert torch.autograd.grad(found.out.sum(), value)[0].isnan().all()


@pytest.mark.parametrize("queries", [3, 12])
@pytest.mark.parametrize("what", ["out", "lse", "mass"])
def test_a_nan_from_above_reaches_no_key_that_its_row_does_not_see(what: str, queries: int) -> None:
    """Causal; row 0 sees key 0 only, row 8 of 12 an odd number of keys."""
    case = Case([[queries]], [queries], heads=1, kv_heads=1, width=16, value_width=16, causal=(0,))
    for row in (0, queries // 3 * 2):
        leaves = case.to(torch.float32)
        results = case.call(cross_modal_attention, leaves, **FLAGS)
        grads = [torch.randn_like(x) for x in results]
        clean = torch.autograd.grad(list(results), list(leaves.values()), grads, retain_graph=True)
        grads[("out", "lse", "mass").index(what)][row] = torch.nan
        found = torch.autograd.grad(list(results), list(leaves.values()), grads)
        for leaf, mine, other in zip(leaves, found, clean, strict=True):
            hidden = slice(row + 1, None)
            if leaf != "query":
                assert mine[hidden].isfinite().all(), (leaf, row)
                torch.testing.assert_close(mine[hidden], other[hidden], rtol=1e-5, atol=1e-6)
            else:
                rest = [r for r in range(queries) if r != row]
                torch.testing.assert_close(mine[rest], other[rest], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("queries", [2, 9])
def test_a_nan_query_without_keys_gives_the_sink_alone(queries: int) -> None:
    query = torch.full((queries, 2, 8), torch.nan, requires_grad=True)
    sink = torch.randn(2, requires_grad=True)
    key, empty = torch.randn(0, 2, 8), torch.tensor([0, 0])
    found = cross_modal_attention(
        query, [Segment(key, key, empty)], torch.tensor([0, queries]), sink=sink, query_norm=torch.ones(8), **FLAGS
    )
    assert not found.out.any() and not found.mass.any() and torch.equal(found.lse, sink.detach().expand(queries, 2))
    dquery, dsink = torch.autograd.grad([found.out, found.lse], [query, sink], [found.out + 1, found.lse * 0 + 1])
    assert not dquery.any() and torch.equal(dsink, torch.full((2,), float(queries)))


@pytest.mark.parametrize("queries", [3, 12])
def test_any_gate_of_a_segment_leaves_rows_that_do_not_see_it(queries: int) -> None:
    case = Case([[2], [4]], [queries], heads=1, kv_heads=1, width=16, value_width=16, causal=(0,))
    case.leaves["value_gate"] = torch.tensor([[[torch.inf, 1.0]]], dtype=torch.float64)
    out = outputs(case, torch.float32).out
    assert out[: queries - 2].isfinite().all() and not out[queries - 2 :].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [2, 9])
def test_a_head_does_not_read_what_its_bias_removes(queries: int, dtype: torch.dtype) -> None:
    torch.manual_seed(5)
    offsets, rows = torch.tensor([0, 50, 60]), torch.tensor([0, queries, 2 * queries])
    query, key, value = (torch.randn(n, 4, 16, dtype=dtype) for n in (2 * queries, 60, 60))
    bias = torch.zeros(2, 4, 2, dtype=dtype)
    bias[:, 1, 0] = -torch.inf
    up, results = torch.randn(2 * queries, 4, 16, dtype=dtype), []
    for bad in (0.0, torch.nan):
        key[:, 1] = value[:, 1] = bad
        leaves = [x.clone().requires_grad_() for x in (query, key, value)]
        segments = [Segment(leaves[1], leaves[2], offsets), Segment(query, query, rows)]
        out = cross_modal_attention(leaves[0], segments, rows, log_bias=bias, key_norm=torch.ones(16, dtype=dtype))
        results.append([out, *torch.autograd.grad(out, leaves, up)])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
    assert all((results[1][i][:, 1] == 0).all() for i in (2, 3))
    assert results[1][0].isfinite().all()


@pytest.mark.parametrize("bias", [-1e30, torch.finfo(torch.float32).min, 1e35])
def test_extreme_biases_are_no_removal(bias: float) -> None:
    query, value = torch.randn(2, 1, 4), torch.randn(3, 1, 4)
    segment = Segment(torch.zeros(3, 1, 4), value, torch.tensor([0, 3]))
    out = cross_modal_attention(query, [segment], torch.tensor([0, 2]), log_bias=torch.full((1, 1, 1), bias))
    torch.testing.assert_close(out, value.mean(0, keepdim=True).expand(2, 1, 4))


@pytest.mark.parametrize("bias", [-1e9, -1e30, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("queries", [2, 12])
def test_a_bias_that_masks_all_there_is_leaves_the_softmax_below_it(queries: int, bias: float) -> None:
    """Masked by a large negative number, with nothing else present: scores that spread over 200, two blocks."""
    query, key = torch.randn(queries, 1, 16) * 8, torch.randn(90, 1, 16) * 8
    leaves = [x.requires_grad_() for x in (query, key, torch.randn(90, 1, 16))]
    upstream = torch.randn(queries, 1, 16)

    def differentiated(bias: float | None) -> list[torch.Tensor]:
        segment = Segment(leaves[1], leaves[2], torch.tensor([0, 90]))
        more = {} if bias is None else {"log_bias": torch.full((1, 1, 1), bias)}
        out = cross_modal_attention(leaves[0], [segment], torch.tensor([0, queries]), **more)
        return [out, *torch.autograd.grad(out, leaves, upstream)]

    for biased, plain in zip(differentiated(bias), differentiated(None), strict=True):
        torch.testing.assert_close(biased, plain, rtol=2e-3, atol=2e-3 * float(plain.abs().max()))


def test_no_heads() -> None:
    segment = Segment(torch.randn(4, 1, 8), torch.randn(4, 1, 8), torch.tensor([0, 4]))
    assert cross_modal_attention(torch.empty(3, 0, 8), [segment], torch.tensor([0, 3])).shape == (3, 0, 8)


def test_twenty_runs_give_the_same_bits() -> None:
    case = CASES["groups"]()
    first = outputs(case, torch.float32)
    for _ in range(19):
        assert all(torch.equal(a, b) for a, b in zip(first, outputs(case, torch.float32), strict=True))


def test_seventy_thousand_sequences() -> None:
    count = 70_000
    query, key = torch.randn(count, 2, 4), torch.randn(2 * count, 2, 4)
    offsets = torch.arange(count + 1)
    out = cross_modal_attention(query, [Segment(key, key, 2 * offsets)], offsets)
    last = cross_modal_attention(query[-1:], [Segment(key[-2:], key[-2:], torch.tensor([0, 2]))], torch.tensor([0, 1]))
    assert torch.equal(out[-1:], last) and out.isfinite().all()


@pytest.mark.parametrize("queries", [2, 9])
def test_rows_beyond_two_to_the_31_elements(queries: int) -> None:
    """Three rows of a stride of 2^30 elements; what lies between is never touched."""
    room = torch.empty(2**31 + 64, dtype=torch.bfloat16)
    key = room.as_strided((3, 1, 32), (2**30, 32, 1))
    key.copy_(torch.randn(3, 1, 32))
    query, offsets = torch.randn(queries, 1, 32).bfloat16(), torch.tensor([0, 3])
    far = cross_modal_attention(query, [Segment(key, key, offsets)], torch.tensor([0, queries]))
    near = cross_modal_attention(query, [Segment(key.clone(), key.clone(), offsets)], torch.tensor([0, queries]))
    assert torch.equal(far, near)


def test_rows_that_do_not_lie_together() -> None:
    """Heads before rows, every second row, columns of a wider tensor."""
    query, key = torch.randn(3, 9, 16), torch.randn(3, 50, 32)
    value = torch.randn(50, 3, 32)
    wide = [query.transpose(0, 1), key[:, ::2, 5:21].transpose(0, 1), value[::2, :, ::2]]
    offsets = torch.tensor([0, 25])
    apart = cross_modal_attention(wide[0], [Segment(wide[1], wide[2], offsets)], torch.tensor([0, 9]))
    q, k, v = (x.contiguous() for x in wide)
    assert torch.equal(apart, cross_modal_attention(q, [Segment(k, v, offsets)], torch.tensor([0, 9])))


def test_the_compiled_kernels_serve_where_they_are_built() -> None:
    if library.cpu_isa() == "none":
        pytest.skip("_C is not built")
    served = {p.op: p.name for p in library.providers() if p.device == "cpu"}
    assert served["_attention_forward"] == served["_attention_backward"] == "compiled"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("queries", [3, 20])
def test_gradients_too_large_for_a_cache_are_the_same_bits(dtype: torch.dtype, queries: int) -> None:
    """From 8 MiB on they are written past the caches; those of a sequence alone are not."""
    keys = (6 << 20) // (8 * 64 * dtype.itemsize)
    query, key, value, grad = (
        normal(2 * n, 8, 64, seed=i, dtype=dtype) for i, n in enumerate((queries, keys, keys, queries))
    )

    def gradients_of(first: int, last: int) -> tuple[torch.Tensor, ...]:
        rows, entries = slice(first * queries, last * queries), slice(first * keys, last * keys)
        leaves = [x.clone().requires_grad_() for x in (query[rows], key[entries], value[entries])]
        counts = torch.arange(last - first + 1)
        out = cross_modal_attention(leaves[0], [Segment(leaves[1], leaves[2], counts * keys)], counts * queries)
        return torch.autograd.grad(out, leaves, grad[rows])

    together = gradients_of(0, 2)
    assert together[1].nbytes >= 8 << 20 > together[1].nbytes // 2
    for i, (a, b) in enumerate(zip(gradients_of(0, 1), gradients_of(1, 2), strict=True)):
        assert torch.equal(together[i], torch.cat([a, b]))
