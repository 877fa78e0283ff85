"""info_nce on whatever may be drawn: shapes, dtypes, strides, targets, lists, ids, and arguments that make no sense."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from mmrec_kernels import library, schemas
from mmrec_kernels.infonce import info_nce, info_nce_pairs
from strategies import (
    Memory,
    Problem,
    assert_deterministic,
    bad_integers,
    bad_offsets,
    copied,
    examples,
    in_memory,
    integers,
    judge,
    misfits,
    normal,
    refuses,
    seeds,
    sizes,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
LEAVES = ("query", "key", "scale", "log_q", "weight")


def dense(query: Tensor, key: Tensor, **options: Any) -> Tensor:
    """w_i·l_i `[Nq]` by the words of the contract, from the whole matrix of logits in the dtype of its inputs."""
    rows, keys = len(query), len(key)
    get = options.get
    target = torch.arange(rows) if get("target") is None else get("target").long()
    if get("normalize"):
        query, key = normalize(query, eps=1e-12), normalize(key, eps=1e-12)
    found, at = target >= 0, target.clamp(min=0)
    scale = torch.as_tensor(get("scale", 1.0), dtype=query.dtype)
    dots = scale.reshape(-1, 1) * (query @ key.T)
    logits = dots if get("log_q") is None else dots - get("log_q")[None]
    if not bool(found.any()):
        return dots.sum() * 0 + query.new_zeros(rows)
    own = (target[:, None] == torch.arange(keys)) & found[:, None]
    kept = torch.ones(rows, keys, dtype=torch.bool)
    if get("key_ids") is not None:
        ids = get("key_ids").long()
        wanted = get("query_ids").long() if get("query_ids") is not None else torch.where(found, ids[at], -1)
        kept &= ~((wanted[:, None] == ids) & (ids >= 0))
    if get("exclude") is not None:
        offsets, positions = (x.tolist() for x in get("exclude"))
        for i in range(rows):
            kept[i, [p for p in positions[offsets[i] : offsets[i + 1]] if p >= 0]] = False
    kept &= ~own

    def beside(scores: Tensor, mask: Tensor, axis: int, positive: Tensor) -> Tensor:
        """softplus(LSE of what is kept − positive), 0 where nothing is."""
        some = mask.any(axis)
        lse = torch.where(mask, scores, -torch.inf).logsumexp(axis) if scores.numel() else positive * 0
        return torch.where(some, torch.logaddexp(torch.where(some, lse - positive, 0), scores.new_zeros(())), 0)

    positive = logits.gather(1, at[:, None])[:, 0]
    sampled = get("log_q_of_positive", True) or get("log_q") is None
    loss = beside(logits, kept, 1, positive if sampled else positive + get("log_q")[at])
    if smoothing := get("label_smoothing", 0.0):
        every = kept | own
        uniform = torch.where(every, logits, -torch.inf).logsumexp(1)
        uniform = uniform - torch.where(every, logits, 0).sum(1) / every.sum(1).clamp(min=1)
        loss = (1 - smoothing) * loss + smoothing * torch.where(every.any(1), uniform, 0)
    if get("symmetric", True):
        columns = [beside(dots[:, t], kept[:, t] & (target != t), 0, dots[i, t]) for i, t in enumerate(at.tolist())]
        loss = (loss + torch.stack(columns)) / 2
    loss = torch.where(found, loss, 0)
    return loss if get("weight") is None else loss * get("weight")


@st.composite
def problems(draw: Any, dtype: torch.dtype) -> dict[str, Any]:
    """All options, each on or off; sizes around the tiles of 96 queries and 192 keys. In one or two dimensions unit
    vectors are so much alike that gradients are little but what cancels."""
    nq, nk, d, seed = draw(sizes(96)), draw(sizes(96, 192)), draw(sizes(16, 40, least=3)), draw(seeds)
    stats = torch.float64 if dtype == torch.float64 else torch.float32
    unit = [normalize(normal(seed + n, rows, d)).to(dtype) for n, rows in enumerate((nq, nk))]
    made: dict[str, Any] = {"query": unit[0], "key": unit[1], "symmetric": draw(st.booleans())}
    made["scale"] = draw(st.sampled_from([torch.tensor(5.0), torch.linspace(0.5, 8, nq), torch.tensor(0.0)])).to(stats)
    some = draw(st.sets(st.sampled_from(["target", "ids", "query_ids", "exclude", "log_q", "weight", "normalize"])))
    if nk < nq or "target" in some:
        made["target"] = integers(seed + 2, -1, max(nk, 1), nq) if nk else torch.full((nq,), -1)
    if {"ids", "query_ids"} & some:
        made["key_ids"] = integers(seed + 3, -1, 6, nk) * draw(st.sampled_from([1, 2**33]))
    if "query_ids" in some:
        made["query_ids"] = integers(seed + 4, -1, 6, nq) * draw(st.sampled_from([1, 2**33]))
    if "exclude" in some:
        lengths = integers(seed + 5, 0, 4, nq) * integers(seed + 6, 0, 2, nq)
        offsets = torch.cat([torch.tensor([1]), lengths]).cumsum(0)
        made["exclude"] = offsets, integers(seed + 7, -2, max(nk, 1), int(offsets[-1]) + 1) if nk else -offsets
        if not nk:
            made["exclude"] = offsets, torch.full((int(offsets[-1]) + 1,), -1)
    if "log_q" in some:
        made["log_q"], made["log_q_of_positive"] = normal(seed + 8, nk).to(stats), draw(st.booleans())
    if "weight" in some:
        made["weight"] = normal(seed + 9, nq).abs().to(stats)
    made["normalize"] = "normalize" in some
    made["label_smoothing"] = draw(st.sampled_from([0.0, 0.1]))
    return Problem(made)


def run(function: Any, given_: dict[str, Any], upstream: Tensor, **more: Any) -> list[Tensor]:
    """The loss of each row and the gradient of every leaf."""
    leaves = {n: given_[n].detach().requires_grad_() for n in LEAVES if isinstance(given_.get(n), Tensor)}
    losses = function(**(given_ | leaves), **more)
    grads = torch.autograd.grad(losses, list(leaves.values()), upstream.to(losses.dtype), allow_unused=True)
    pairs = zip(leaves.values(), grads, strict=True)
    return [losses.detach(), *(torch.zeros_like(x) if g is None else g for x, g in pairs)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@examples(25)
@given(st.data())
def test_losses_and_gradients_are_those_of_the_whole_matrix(dtype: torch.dtype, data: Any) -> None:
    given_, memory = data.draw(problems(dtype)), Memory()
    upstream = torch.linspace(0.5, 1.5, len(given_["query"]), dtype=torch.float64)
    more = {"reduction": "none", "workspace_bytes": data.draw(st.sampled_from([None, 1]))}
    strided = in_memory(given_, memory, data.draw)
    plain = copied(strided)
    ours = run(info_nce, strided, upstream, **more)
    memory.assert_untouched()
    assert_deterministic(
        lambda: run(info_nce, strided, upstream, **more), lambda: run(info_nce, plain, upstream, **more)
    )
    exact = run(dense, copied(plain, torch.float64), upstream)

    def eager(order: int) -> list[Tensor]:
        """The whole matrix in `dtype`, columns in another order."""
        columns = normal(order, given_["query"].shape[1]).argsort()
        moved = {n: x[:, columns] if n in ("query", "key") else x for n, x in copied(plain, dtype).items()}
        losses, dquery, dkey, *rest = run(dense, moved, upstream)
        return [losses, dquery[:, columns.argsort()], dkey[:, columns.argsort()], *rest]

    names = ["losses", *(n for n in LEAVES if isinstance(given_.get(n), Tensor))]
    judge(names, ours, exact, eager, dtype)


ROWS, KEYS = 3, 5


def small(**changes: Any) -> dict[str, Any]:
    given_ = {"query": normal(0, ROWS, 4).float(), "key": normal(1, KEYS, 4).float(),
              "target": torch.tensor([4, -1, 0]),
              "key_ids": torch.tensor([3, 3, -1, 0, 3]), "query_ids": torch.tensor([3, 0, -1]),
              "exclude": (torch.tensor([1, 2, 2, 4]), torch.tensor([9, 3, -1, 2, 9])), "reduction": "none"}  # fmt: skip
    return given_ | changes


def raw(**problem: Any) -> tuple[Tensor, ...]:
    """The raw op, its complaints as the public function gives them."""
    lists = problem["exclude"]
    return library.call(
        schemas.infonce_forward, problem["query"], problem["key"], torch.ones(1), problem["target"], None, None,
        problem["query_ids"], problem["key_ids"], *lists, None, True, False, False, None, False, True, False, 2**20,
    )  # fmt: skip


def with_gradients(**problem: Any) -> Tensor:
    return info_nce(**(problem | {"query": problem["query"].requires_grad_()}))


@examples(40)
@given(bad_integers(ROWS, -(2**63), KEYS))
def test_targets_beyond_the_keys_are_refused(target: list[int]) -> None:
    for function in (info_nce, with_gradients, raw):
        refuses("target", lambda function=function: function(**small(target=torch.tensor(target))))


@examples(40)
@given(bad_offsets(ROWS + 1, 5))
def test_offsets_that_fall_or_leave_their_list_are_refused(offsets: list[int]) -> None:
    lists = torch.tensor(offsets), torch.tensor([0, 3, -1, 2, 1])
    for function in (info_nce, with_gradients, raw):
        refuses("exclude[0]", lambda function=function: function(**small(exclude=lists)))


@examples(40)
@given(bad_integers(3, -(2**63), KEYS))
def test_positions_beyond_the_keys_are_refused(positions: list[int]) -> None:
    lists = torch.tensor([1, 2, 2, 4]), torch.tensor([2**62, *positions, 2**62])
    for function in (info_nce, with_gradients, raw):
        refuses("exclude[1]", lambda function=function: function(**small(exclude=lists)))


@examples(40)
@given(st.sampled_from(["target", "key_ids", "query_ids", "exclude[0]", "exclude[1]"]), st.data())
def test_integers_of_another_kind_are_refused(name: str, data: Any) -> None:
    good = small()
    which = int(name[8]) if "[" in name else None
    how, bad = data.draw(misfits(good[name] if which is None else good["exclude"][which]))
    if which == 1 and how in ("longer", "shorter"):
        return
    given_ = (
        {name: bad}
        if which is None
        else {"exclude": (bad, good["exclude"][1]) if not which else (good["exclude"][0], bad)}
    )
    refuses(name, lambda: info_nce(**small(**given_)))


@examples(40)
@given(
    st.lists(st.sampled_from([-(2**63), -1, 0, 1, 2**31 - 1, 2**31, 2**32, 2**63 - 1]), min_size=KEYS, max_size=KEYS),
    st.lists(st.sampled_from([-(2**63), -1, 0, 1, 2**31 - 1, 2**31, 2**32, 2**63 - 1]), min_size=ROWS, max_size=ROWS),
    st.lists(st.sampled_from([-(2**63), -1, 0, 4]), min_size=ROWS, max_size=ROWS),
)
def test_any_id_is_an_id_and_none_below_zero_is(key_ids: list[int], query_ids: list[int], target: list[int]) -> None:
    given_ = small(key_ids=torch.tensor(key_ids), query_ids=torch.tensor(query_ids), target=torch.tensor(target))
    wide = {n: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in given_.items()}
    torch.testing.assert_close(info_nce(**wide), dense(**wide), rtol=1e-11, atol=1e-12)


@examples(30)
@given(st.sampled_from(["query", "key", "log_q", "weight", "scale"]), seeds, st.sampled_from([torch.nan, torch.inf]))
def test_what_is_no_number_reaches_no_row_that_has_no_term(name: str, seed: int, bad: float) -> None:
    """Row 1 has no term: its loss is 0 whatever the others hold; nor does a bad weight leave its row."""
    given_ = small(symmetric=False, scale=torch.ones(ROWS), log_q=torch.zeros(KEYS), weight=torch.ones(ROWS))
    leaf = given_[name] = given_[name].clone()
    leaf.view(-1)[seed % leaf.numel()] = bad
    losses = info_nce(**given_)
    assert losses[1] == 0
    if name == "weight":
        finite = torch.arange(ROWS) != seed % ROWS
        assert bool(losses[finite].isfinite().all())


def test_rows_that_lie_more_than_two_to_the_31_bytes_apart() -> None:
    """In memory that nobody touches, so that only the pages of the rows are there."""
    stride = 2**30 + 8
    key = torch.empty(stride + 8, dtype=torch.bfloat16).as_strided((2, 8), (stride, 1))
    key.copy_(normal(0, 2, 8))
    query = normal(1, 2, 8, dtype=torch.bfloat16)
    assert torch.equal(info_nce(query, key), info_nce(query, key.contiguous()))


def test_more_than_two_to_the_31_logits_by_expansion() -> None:
    """2¹⁸ keys that are one row, 2¹³ queries that are one row: 2.1·10⁹ logits, of which two differ."""
    rows, keys = 2**13 + 5, 2**18
    query, key = normal(0, 1, 2).float().expand(rows, 2), normal(1, 1, 2).float().expand(keys, 2)
    assert rows * keys > 2**31
    found = info_nce(query, key, target=torch.zeros(rows, dtype=torch.int64), symmetric=False, reduction="none",
                     workspace_bytes=2**20)  # fmt: skip
    want = torch.log(torch.tensor(float(keys)))
    torch.testing.assert_close(found[[0, -1]], want.expand(2), rtol=1e-6, atol=0)


def test_shapes_of_meta_tensors_do_not_overflow() -> None:
    query, key = torch.empty(2**20, 8, device="meta"), torch.empty(2**34, 8, device="meta")
    assert info_nce(query, key, reduction="none", workspace_bytes=2**62).shape == (2**20,)


@examples(30)
@given(st.sampled_from(["a", "b"]), st.data())
def test_pairs_refuse_masks_and_ids_of_another_kind(name: str, data: Any) -> None:
    embeddings = {n: normal(i, ROWS, 4) for i, n in enumerate("ab")}
    pairs, present = [("a", "b")], torch.tensor([True, False, True])
    assert info_nce_pairs(embeddings, pairs, mask={name: present}).ndim == 0
    how, bad = data.draw(misfits(present.long()))
    refuses("ids", lambda: info_nce_pairs(embeddings, pairs, ids=bad))
    refuses(
        f"mask[{name!r}]",
        lambda: info_nce_pairs(embeddings, pairs, mask={name: present.long() if how == "dtype" else bad}),
    )
