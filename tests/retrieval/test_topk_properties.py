"""top_k on whatever may be drawn: shapes, dtypes, strides, lists of ids, and arguments that make no sense."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from topk_helpers import DTYPES, all_scores, check, oracle
from torch import Tensor

from mmrec_kernels import library, schemas, top_k
from strategies import (
    Layout,
    Memory,
    Problem,
    assert_deterministic,
    bad_offsets,
    copied,
    examples,
    integers,
    layouts,
    misfits,
    normal,
    refuses,
    same_bits,
    seeds,
    sizes,
)

NAMES = ("exclude", "candidates")


def values(seed: int, dtype: torch.dtype, whole: bool, *shape: int) -> Tensor:
    """Small integers, whose scores are exact and often equal; else of one sign, so that no score is all rounding."""
    if dtype == torch.int8:
        return integers(seed, -3 if whole else 0, 4 if whole else 128, *shape, dtype=dtype)
    return integers(seed, -3, 4, *shape).to(dtype) if whole else normal(seed, *shape).abs().to(dtype)


def ragged(draw: Any, queries: int, items: int) -> tuple[Tensor, Tensor]:
    """A list per query, some empty, entries before and behind them; ids in any order, among them some that are none."""
    lengths = draw(st.lists(st.sampled_from([0, 0, 1, 3, 40]), min_size=queries, max_size=queries))
    offsets = torch.tensor([draw(st.integers(0, 2)), *lengths]).cumsum(0)
    ids = integers(draw(seeds), -3, items + 3, int(offsets[-1]) + draw(st.integers(0, 2)))
    if len(ids):
        ids[draw(st.integers(0, len(ids) - 1))] = draw(st.sampled_from([2**31, 2**62, -(2**63), 0]))
    return offsets, ids


@st.composite
def problems(draw: Any) -> tuple[dict[str, Any], bool]:
    """The arguments of top_k in contiguous memory, and whether every score is exact."""
    dtype, whole = draw(st.sampled_from(DTYPES)), draw(st.booleans())
    b, n, d = draw(sizes(6, 36)), draw(sizes(64, 192, 1024)), draw(sizes(16, 64))
    seed, floats = draw(seeds), torch.float32 if dtype == torch.int8 else dtype
    given_ = {"query": values(seed, floats, whole, b, d), "items": values(seed + 1, dtype, whole, n, d)}
    if dtype == torch.int8:
        given_["item_scales"] = values(seed + 2, torch.float32, whole, n)
        given_["quantize_query"] = draw(st.booleans())
    if draw(st.booleans()):
        bias = values(seed + 3, torch.float64 if dtype == torch.float64 else torch.float32, whole, n)
        given_["bias"] = torch.where(normal(seed + 4, n) > 1.3, -torch.inf, bias).to(bias.dtype)
    for name in NAMES:
        if draw(st.booleans()):
            given_[name] = ragged(draw, b, n)
    given_["k"] = draw(st.sampled_from([1, 2, 63, 65, max(n, 1), n + 3]))
    return Problem(given_), whole


def placed(given_: dict[str, Any], draw: Any, memory: Memory) -> dict[str, Any]:
    """The same in memory whose rest is poison: NaN, and for lists of ids one that there is."""
    made = dict(given_)
    for name, value in given_.items():
        if isinstance(value, Tensor):
            made[name] = memory.place(value, draw(layouts(value.ndim, expanded=name in ("query", "items"))))
        elif isinstance(value, tuple):
            offsets = value[0].to(draw(st.sampled_from([torch.int32, torch.int64])))
            made[name] = memory.place(offsets, draw(layouts(1))), memory.place(value[1], draw(layouts(1)), poison=0)
    return made


@examples(40)
@given(problems(), st.data())
def test_finds_what_sorting_all_scores_finds(problem: tuple[dict[str, Any], bool], data: Any) -> None:
    given_, exact = problem
    memory = Memory()
    strided = placed(given_, data.draw, memory)
    plain = copied(strided)
    assert_deterministic(lambda: top_k(**strided), lambda: top_k(**plain))
    found, k = top_k(**strided), given_["k"]
    memory.assert_untouched()
    scores = all_scores(**{n: plain[n] for n in ("query", "items", "bias", "item_scales") if n in plain})
    lists = {n: plain[n] for n in NAMES if n in plain}
    if not exact:
        return check(found, scores, k, **lists)
    want, want_ids = oracle(scores, k, **lists)
    assert torch.equal(found.ids, want_ids) and torch.equal(found.scores.double(), want)


def small(queries: int = 3, items: int = 5) -> dict[str, Any]:
    return {"query": normal(0, queries, 4).float(), "items": normal(1, items, 4).float(), "k": 3}


def raw(query: Tensor, items: Tensor, k: int, **lists: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The raw op, its complaints as the public function gives them."""
    flat = [x for name in NAMES for x in lists.get(name, (None, None))]
    return library.call(schemas.retrieval_topk, query, items, k, None, None, *flat, False)


@examples(40)
@given(st.sampled_from(NAMES), bad_offsets(4, 6), seeds)
def test_offsets_that_fall_or_leave_their_list_are_refused(name: str, offsets: list[int], seed: int) -> None:
    lists = {name: (torch.tensor(offsets), integers(seed, 0, 5, 6))}
    for function in (top_k, raw):
        refuses(f"{name}[0]", lambda function=function: function(**small(), **lists))


@examples(40)
@given(st.sampled_from(NAMES), st.integers(0, 1), st.data())
def test_lists_of_another_kind_are_refused(name: str, which: int, data: Any) -> None:
    good = [torch.tensor([0, 2, 2, 6]), torch.arange(6) % 5]
    how, bad = data.draw(misfits(good[which]))
    if which == 1 and how in ("longer", "shorter"):  # ids may be more; fewer are offsets that leave their list
        how, bad = "device", good[1].to("meta")
    good[which] = bad
    refuses(f"{name}[{which}]", lambda: top_k(**small(), **{name: tuple(good)}))


@examples(30)
@given(st.lists(st.sampled_from([-(2**63), -(2**31), -1, 5, 2**31, 2**32, 2**63 - 1, 0]), min_size=6, max_size=6))
def test_ids_that_there_are_not_are_ignored(ids: list[int]) -> None:
    given_, offsets = small(), torch.tensor([0, 2, 2, 6])
    scores = all_scores(given_["query"], given_["items"])
    for name in NAMES:
        lists = {name: (offsets, torch.tensor(ids))}
        want = oracle(scores, 3, **lists)[1]
        assert torch.equal(top_k(**given_, **lists).ids, want)
        assert torch.equal(raw(**given_, **lists)[1], want)


@examples(30)
@given(st.sampled_from([0, -1, -(2**63), True, 1.0, "3", None, 2**63]))
def test_k_of_another_kind_is_refused(k: Any) -> None:
    with pytest.raises((TypeError, ValueError, RuntimeError, OverflowError)):
        top_k(**(small() | {"k": k}))


@examples(20)
@given(seeds, st.sampled_from(["query", "items", "bias"]), st.sampled_from([torch.nan, torch.inf, -torch.inf]))
def test_what_is_no_number_is_never_returned_as_a_score(seed: int, where: str, bad: float) -> None:
    given_ = {"query": normal(seed, 3, 4).float(), "items": normal(seed + 1, 70, 4).float(), "bias": torch.zeros(70)}
    at = integers(seed, 0, given_[where].shape[0], 1)
    given_[where][at] = bad
    found = top_k(**given_, k=70)
    scores = all_scores(**given_)
    assert not found.scores.isnan().any() and bool(((found.ids >= 0) == (found.scores > -torch.inf)).all())
    for row, ids in zip(scores, found.ids, strict=True):
        assert set(ids[ids >= 0].tolist()) == set((row > -torch.inf).nonzero()[:, 0].tolist())


def test_rows_that_lie_more_than_two_to_the_31_elements_apart() -> None:
    """In memory that nobody touches, so that only the pages of the rows are there."""
    stride = 2**31 + 7
    items = torch.empty(stride + 16, dtype=torch.int8).as_strided((2, 4), (stride, 1))
    items.copy_(integers(0, -3, 4, 2, 4))
    query = integers(1, -3, 4, 5, 4).float()
    found = top_k(query, items, 2, item_scales=torch.ones(2))
    assert torch.equal(found.ids, oracle(all_scores(query, items), 2)[1])


def test_more_than_two_to_the_31_elements_by_expansion() -> None:
    """One row for 2²² items of 520 columns: 2.2·10⁹ elements of a catalogue that takes 2 kB."""
    items, query = integers(0, -3, 4, 1, 520).float().expand(2**22, 520), integers(1, -3, 4, 1, 520).float()
    bias = torch.zeros(2**22)
    bias[-3:] = torch.tensor([1.0, 3.0, 2.0])
    assert top_k(query, items, 3, bias=bias).ids.tolist() == [[2**22 - 2, 2**22 - 1, 2**22 - 3]]


@pytest.mark.parametrize("sizes", [(2**20, 2**20, 8), (2, 2**33, 4)])
def test_shapes_of_meta_tensors_do_not_overflow(sizes: tuple[int, int, int]) -> None:
    b, n, d = sizes
    found = top_k(torch.empty(b, d, device="meta"), torch.empty(n, d, device="meta"), 2**31 + 1)
    assert found.ids.shape == (b, 2**31 + 1) and found.scores.device.type == "meta"


def test_layouts_hold_what_is_placed_and_nothing_else() -> None:
    """The helper itself: values, strides, poison around, and that a write is seen."""
    memory, made = Memory(), normal(0, 3, 4)
    view = memory.place(made, Layout((2, 1), (1, 3), True, False))
    assert torch.equal(view, made) and not view.is_contiguous() and view.storage_offset() > 0
    memory.assert_untouched()
    room = view._base
    assert room is not None and int(room.isnan().sum()) == room.numel() - made.numel()
    assert memory.place(made, Layout((1, 1), (0, 0), False, True)).stride(0) == 0
    room.data[0, 0] = 1.0
    with pytest.raises(AssertionError):
        memory.assert_untouched()
    assert not same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
