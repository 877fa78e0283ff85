"""cross_modal_attention on whatever may be drawn: shapes, dtypes, strides, ragged and gathered segments, arguments that
make no sense."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_oracle import EVERYTHING, FLAGS, Case, gradients, oracle
from hypothesis import given, note
from hypothesis import strategies as st
from torch import Tensor

from mmrec_kernels import library, schemas
from mmrec_kernels.attention import Segment, cross_modal_attention
from strategies import (
    Memory,
    assert_deterministic,
    bad_integers,
    bad_offsets,
    examples,
    judge,
    layouts,
    misfits,
    normal,
    refuses,
    seeds,
    sizes,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


@st.composite
def cases(draw: Any, dtype: torch.dtype) -> Case:
    """Lengths around the blocks of 32 rows and 48 keys, of which one long list at a time, and every option or none."""
    batch, count = draw(st.sampled_from([0, 1, 2, 3])), draw(st.integers(1, 3))
    short = st.sampled_from([0, 1, 2, 5])
    lengths = [draw(st.lists(short, min_size=batch, max_size=batch)) for _ in range(count)]
    queries = draw(st.lists(st.sampled_from([0, 1, 2, 3]), min_size=batch, max_size=batch))
    if batch:
        lengths[draw(st.integers(0, count - 1))][draw(st.integers(0, batch - 1))] = draw(sizes(48, 96))
        queries[draw(st.integers(0, batch - 1))] = draw(st.sampled_from([1, 4, 9, 17, 33]))
    kv_heads, group = draw(st.integers(1, 2)), draw(st.sampled_from([1, 2, 3]))
    segments = st.lists(st.integers(0, count - 1), unique=True)
    extras = draw(st.lists(st.sampled_from(EVERYTHING), unique=True))  # the norm of one number has no gradient
    return Case(
        lengths, draw(st.sampled_from([queries, None])), heads=kv_heads * group, kv_heads=kv_heads,
        width=draw(sizes(16, least=2 if any("norm" in name for name in extras) else 1)), value_width=draw(sizes(16)),
        latent=draw(st.sampled_from([0, 1, 3, 5])), indexed=draw(segments), causal=draw(segments), extras=extras,
        around=draw(st.integers(0, 2)), dtype=dtype, seed=draw(seeds),
    )  # fmt: skip


def run(case: Case, function: Any, leaves: dict[str, Tensor], plan: Any, upstream: Any, **more: Any) -> list[Tensor]:
    """Results and the gradients of all leaves."""
    offsets, case.plan, case.query_offsets = (case.plan, case.query_offsets), *plan
    try:
        leaves = {name: x.detach().requires_grad_() for name, x in leaves.items()}
        results = case.call(function, leaves, **more)
        if upstream is None:
            return list(results)
        return [*(x.detach() for x in results), *gradients(results, leaves, upstream).values()]
    finally:
        case.plan, case.query_offsets = offsets


def plan_in(memory: Memory, case: Case, draw: Any) -> Any:
    """Offsets and indices of `case` in poisoned memory, int32 at times."""

    def one(x: Tensor | None) -> Tensor | None:
        return (
            x if x is None else memory.place(x.to(draw(st.sampled_from([torch.int32, torch.int64]))), draw(layouts(1)))
        )

    return [(one(offsets), one(index), causal) for offsets, index, causal in case.plan], one(case.query_offsets)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@examples(18)
@given(st.data())
def test_results_and_gradients_are_those_of_one_row_at_a_time(dtype: torch.dtype, data: Any) -> None:
    case, memory = data.draw(cases(dtype)), Memory()
    note(f"{ {n: list(x.shape) for n, x in case.leaves.items()} } {case.plan} {case.query_offsets}")
    shared = {"query", *(n for n in case.leaves if n.startswith(("key", "value")))} - {"key_norm", "value_gate"}
    leaves = {n: memory.place(x, data.draw(layouts(x.ndim, expanded=n in shared))) for n, x in case.leaves.items()}
    plan, contiguous = plan_in(memory, case, data.draw), (case.plan, case.query_offsets)
    plain = {n: x.contiguous().clone() for n, x in leaves.items()}
    wide = {n: x.double() for n, x in plain.items()}
    exact = run(case, oracle, wide, contiguous, None)
    upstream = [normal(n, *x.shape).to(dtype) for n, x in enumerate(exact)]
    if data.draw(st.booleans()):
        upstream = [u.new_ones(()).expand(u.shape) for u in upstream]  # what .sum().backward() hands over
    ours = run(case, cross_modal_attention, leaves, plan, upstream, **FLAGS)
    memory.assert_untouched()
    assert_deterministic(
        lambda: run(case, cross_modal_attention, leaves, plan, upstream, **FLAGS),
        lambda: run(case, cross_modal_attention, plain, contiguous, upstream, **FLAGS),
    )
    exact = run(case, oracle, wide, contiguous, upstream)
    # Where all keys are one, what reaches a query through them is the rounding of a sum that is 0.
    judged = 3 if any(x.stride(0) == 0 < len(x) for x in leaves.values()) else len(ours)
    names = ["out", "lse", "mass", *leaves][:judged]

    def eager(order: int) -> list[Tensor]:
        """The oracle in `dtype`, columns of queries and keys and columns of values in another order."""
        axes = {name: order_of(name, case, order) for name in ["out", "lse", "mass", *plain]}
        moved = {n: x if axes[n] is None else x[..., axes[n]] for n, x in plain.items()}
        above = [u if (axes[n] is None) else u[..., axes[n]] for n, u in zip(axes, upstream, strict=False)]
        found = run(case, oracle, moved, contiguous, above)
        return [finite(x if axes[n] is None else x[..., axes[n].argsort()]) for n, x in zip(axes, found, strict=True)]

    judge(names, *([finite(x) for x in results[:judged]] for results in (ours, exact)), eager, dtype)


def finite(x: Tensor) -> Tensor:
    return torch.where(x.isneginf(), 0, x)


def order_of(name: str, case: Case, seed: int) -> Tensor | None:
    """How the last axis of a leaf or result is ordered: that of D, of Dv, or neither."""
    if seed == 0 or name in ("lse", "mass", "log_bias", "value_gate", "sink"):
        return None
    width = case.leaves["value0" if name == "out" or name.startswith("value") else "query"].shape[-1]
    return normal(seed, width).argsort()


B, M = 3, 2


def small(**changes: Any) -> dict[str, Any]:
    """Three sequences with 2, 0 and 2 queries, a plain segment and one with an index; `changes` by argument name."""
    store = normal(1, 5, 2, 4).float()
    made = {
        "query_offsets": torch.tensor([0, 2, 2, 4]),
        "segments[0].offsets": torch.tensor([0, 1, 3, 6]),
        "segments[1].offsets": torch.tensor([1, 2, 2, 5]),
        "segments[1].index": torch.tensor([9, 0, 4, -1, 2, 9]),  # 9s lie outside the offsets
        **changes,
    }
    plain = normal(2, 6, 2, 4).float()
    segments = [
        Segment(plain, plain, made["segments[0].offsets"]),
        Segment(store, store, made["segments[1].offsets"], made["segments[1].index"]),
    ]
    return {"query": normal(0, 4, 4, 4).float(), "segments": segments, "query_offsets": made["query_offsets"]}


def raw(query: Tensor, segments: list[Segment], query_offsets: Tensor) -> tuple[Tensor, ...]:
    """The raw op, its complaints as the public function gives them."""
    return library.call(
        schemas.attention_forward, query, [s.key for s in segments], [s.value for s in segments],
        torch.stack([s.offsets for s in segments]), [segments[1].index], query_offsets, *[None] * 5, 0.5, 1e-6, 2, 0,
        True,
    )  # fmt: skip


def with_gradients(**arguments: Any) -> Any:
    return cross_modal_attention(**(arguments | {"query": arguments["query"].requires_grad_()}))


OFFSETS = {"query_offsets": 4, "segments[0].offsets": 6, "segments[1].offsets": 6}


@examples(60)
@given(st.sampled_from(sorted(OFFSETS)), st.data())
def test_offsets_that_fall_or_leave_their_rows_are_refused(name: str, data: Any) -> None:
    problem = small(**{name: torch.tensor(data.draw(bad_offsets(B + 1, OFFSETS[name])))})
    for function in (cross_modal_attention, with_gradients, raw):
        refuses(name, lambda function=function: function(**problem))


@examples(40)
@given(bad_integers(4, -1, 5))
def test_rows_that_there_are_not_are_refused(index: list[int]) -> None:
    problem = small(**{"segments[1].index": torch.tensor([2**62, *index, -(2**62)])})
    for function in (cross_modal_attention, with_gradients, raw):
        refuses("segments[1].index", lambda function=function: function(**problem))


@examples(40)
@given(st.sampled_from([*sorted(OFFSETS), "segments[1].index"]), st.data())
def test_integers_of_another_kind_are_refused(name: str, data: Any) -> None:
    segments = small()["segments"]
    good = {"query_offsets": small()["query_offsets"], "segments[0].offsets": segments[0].offsets,
            "segments[1].offsets": segments[1].offsets, "segments[1].index": segments[1].index}[name]  # fmt: skip
    how, bad = data.draw(misfits(good))
    if name == "segments[1].index" and how in ("longer", "shorter"):  # more is fine, and so is what nobody refers to
        return
    # All segments need as many offsets: the one that does not fit is named, or the next one.
    named = (
        "segments[1].offsets" if (name, how) in [("segments[0].offsets", h) for h in ("longer", "shorter")] else name
    )
    refuses(named, lambda: cross_modal_attention(**small(**{name: bad})))


@examples(40)
@given(st.sampled_from(["log_bias", "value_gate", "sink", "query_norm", "key_norm"]), st.integers(0, 40), st.data())
def test_what_is_no_number_stays_where_it_is(name: str, seed: int, data: Any) -> None:
    """A NaN or an infinity in a small argument reaches what the oracle says, and none of the others."""
    case = Case([[2, 0, 3], [1, 2, 0]], [1, 2, 1], extras=(name,), seed=seed)
    leaf = case.leaves[name]
    at = data.draw(st.integers(0, leaf.numel() - 1))
    leaf.view(-1)[at] = (
        torch.nan if name not in ("log_bias", "value_gate") else data.draw(st.sampled_from([torch.nan, -torch.inf]))
    )
    found, right = case.call(cross_modal_attention, **FLAGS), case.call(oracle)
    for mine, exact in zip(found, right, strict=True):
        torch.testing.assert_close(mine, exact.to(mine.dtype), rtol=1e-10, atol=1e-12, equal_nan=True)


def test_rows_that_lie_more_than_two_to_the_31_bytes_apart() -> None:
    """In memory that nobody touches, so that only the pages of the rows are there."""
    stride = 2**30 + 8
    key = torch.empty(stride + 8, dtype=torch.bfloat16).as_strided((2, 1, 8), (stride, 8, 1))
    key.copy_(normal(0, 2, 1, 8))
    problem = Segment(key, key, torch.tensor([0, 2]))
    query = normal(1, 3, 1, 8, dtype=torch.bfloat16)
    found, near = (cross_modal_attention(query, [problem._replace(key=k, value=k)]) for k in (key, key.contiguous()))
    assert torch.equal(found, near)


def test_shapes_of_meta_tensors_do_not_overflow() -> None:
    def meta(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta")

    offsets = torch.empty(2**20 + 1, dtype=torch.int64, device="meta")
    key = meta(2**34, 2, 8)
    found = cross_modal_attention(meta(2**14, 4, 8), [Segment(key, key, offsets)], **FLAGS)
    assert found.out.shape == (2**34, 4, 8) and found.mass.shape == (2**34, 4, 1)
