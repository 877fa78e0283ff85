"""mixture_of_experts on whatever may be drawn: shapes, dtypes, strides, absent tokens, nonsense as arguments."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from routing_oracle import GATED, UNARY
from torch import Tensor

from mmrec_kernels import SharedExpert, library, mixture_of_experts, schemas
from mmrec_kernels.routing.reference_experts import ACTIVATIONS
from strategies import (
    Memory,
    Problem,
    assert_deterministic,
    bad_integers,
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
SCORES = ("softmax", "topk_softmax", "sigmoid")
PARAMETERS = ("x", "weights", "w_in", "w_out", "b_in", "b_out", "shared_in", "shared_out", "shared_gate")


def dense_experts(given_: dict[str, Any]) -> Tensor:
    """Σ_slots weight · FFN_expert(x), one expert at a time over all tokens, in the dtype of x."""
    x, ids, activation = given_["x"], given_["experts"].long(), given_["activation"]

    def ffn(w_in: Tensor, w_out: Tensor, b_in: Tensor | None = None, b_out: Tensor | None = None) -> Tensor:
        h = x @ w_in.T if b_in is None else x @ w_in.T + b_in
        if activation in GATED:
            gate, up = h.chunk(2, dim=-1)
            h = UNARY[GATED[activation]](gate) * up
        else:
            h = UNARY[activation](h)
        return h @ w_out.T if b_out is None else h @ w_out.T + b_out

    out = torch.zeros_like(x)
    for e in range(len(given_["w_in"])):
        share = torch.where(ids == e, given_["weights"], 0).sum(1).to(x.dtype)
        biases = [given_[n][e] if n in given_ else None for n in ("b_in", "b_out")]
        used = (ids == e).any(1)[:, None]
        out = out + torch.where(used, share[:, None] * ffn(given_["w_in"][e], given_["w_out"][e], *biases), 0)
    if "shared_in" in given_:
        own = ffn(given_["shared_in"], given_["shared_out"])
        own = own * torch.sigmoid(x @ given_["shared_gate"])[:, None] if "shared_gate" in given_ else own
        out = out + torch.where((ids >= 0).any(1)[:, None], own, 0)
    return out


def mix(given_: dict[str, Any]) -> Tensor:
    routing = SimpleNamespace(weights=given_["weights"], experts=given_["experts"])
    shared = (
        SharedExpert(given_["shared_in"], given_["shared_out"], given_.get("shared_gate"))
        if "shared_in" in given_
        else None
    )
    rest = {n: given_[n] for n in ("b_in", "b_out") if n in given_}
    return mixture_of_experts(
        given_["x"], routing, given_["w_in"], given_["w_out"], **rest, activation=given_["activation"], shared=shared
    )


@st.composite
def mixtures(draw: Any, dtype: torch.dtype) -> dict[str, Any]:
    """Tokens around 6 (few) and 64 (a tile); widths that are whole and odd; experts without tokens, tokens without."""
    tokens, experts, k, seed = (
        draw(sizes(6, 64)),
        draw(st.sampled_from([1, 2, 5])),
        draw(st.integers(1, 3)),
        draw(seeds),
    )
    width, inner, activation = (
        draw(sizes(32, least=2)),
        draw(sizes(16, least=2)),
        draw(st.sampled_from(sorted(ACTIVATIONS))),
    )
    rows = (2 if activation in GATED else 1) * inner
    made: dict[str, Any] = {
        "x": normal(seed, tokens, width).to(dtype),
        "weights": normal(seed + 1, tokens, k).to(torch.float64 if dtype == torch.float64 else torch.float32),
        "experts": integers(seed + 2, -1, experts, tokens, k),
        "w_in": (normal(seed + 3, experts, rows, width) / width**0.5).to(dtype),
        "w_out": (normal(seed + 4, experts, width, inner) / inner**0.5).to(dtype),
        "activation": activation,
    }
    if draw(st.booleans()):
        made["b_in"] = normal(seed + 5, experts, rows).to(dtype)
    if draw(st.booleans()):
        made["b_out"] = normal(seed + 6, experts, width).to(dtype)
    if draw(st.booleans()):
        mine = draw(st.sampled_from([1, 16, 33]))
        made["shared_in"] = (normal(seed + 7, mine * rows // inner, width) / width**0.5).to(dtype)
        made["shared_out"] = (normal(seed + 8, width, mine) / mine**0.5).to(dtype)
        if draw(st.booleans()):
            made["shared_gate"] = normal(seed + 9, width).to(dtype)
    return Problem(made)


def run_mix(function: Any, given_: dict[str, Any], upstream: Tensor) -> list[Tensor]:
    leaves = {n: given_[n].detach().requires_grad_() for n in PARAMETERS if n in given_}
    out = function(given_ | leaves)
    grads = torch.autograd.grad(out, list(leaves.values()), upstream.to(out.dtype), allow_unused=True)
    return [
        out.detach(),
        *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves.values(), grads, strict=True)),
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@examples(20)
@given(st.data())
def test_mixtures_are_those_of_one_expert_at_a_time(dtype: torch.dtype, data: Any) -> None:
    given_, memory = data.draw(mixtures(dtype)), Memory()
    upstream = normal(0, *given_["x"].shape).to(dtype)
    strided = in_memory(given_, memory, data.draw)
    plain = copied(strided)
    ours = run_mix(mix, strided, upstream)
    memory.assert_untouched()
    assert_deterministic(lambda: run_mix(mix, strided, upstream), lambda: run_mix(mix, plain, upstream))
    names = [n for n in PARAMETERS if n in given_]

    def eager(order: int) -> list[Tensor]:
        """One expert at a time in `dtype`, the width d in another order."""
        columns = normal(order, given_["x"].shape[1]).argsort()
        moved = copied(plain, dtype) | {n: along_width(n, x, columns) for n, x in copied(plain, dtype).items()}
        found = run_mix(dense_experts, moved, upstream[:, columns])
        return [along_width(n, x, columns.argsort()) for n, x in zip(["out", *names], found, strict=True)]

    judge(["out", *names], ours, run_mix(dense_experts, copied(plain, torch.float64), upstream), eager, dtype)


def along_width(name: str, x: Any, columns: Tensor) -> Any:
    """`x` with its axis d ordered by `columns`, where it has one."""
    if name in ("out", "x", "w_in", "b_out", "shared_in", "shared_gate"):
        return x[..., columns]
    return x[..., columns, :] if name in ("w_out", "shared_out") else x


TOKENS, EXPERTS = 5, 3


def small_mix(ids: Tensor, weights: Tensor | None = None) -> dict[str, Any]:
    return {"x": normal(0, TOKENS, 4).float(), "weights": normal(1, TOKENS, 2).float() if weights is None else weights,
            "experts": ids, "w_in": normal(2, EXPERTS, 6, 4).float(), "w_out": normal(3, EXPERTS, 4, 3).float(),
            "activation": "swiglu"}  # fmt: skip


def raw_mix(p: dict[str, Any]) -> Tensor:
    return library.call(schemas.experts_forward, p["x"], p["weights"][None], p["experts"][None], p["w_in"], p["w_out"],
                        *[None] * 5, p["activation"], False)  # fmt: skip


def mix_with_gradients(p: dict[str, Any]) -> Tensor:
    return mix(p | {"x": p["x"].requires_grad_()})


@examples(40)
@given(bad_integers(TOKENS * 2, -1, EXPERTS))
def test_experts_that_there_are_not_are_refused(ids: list[int]) -> None:
    for function in (mix, mix_with_gradients, raw_mix):
        refuses("routing.experts", lambda function=function: function(small_mix(torch.tensor(ids).view(TOKENS, 2))))


@examples(40)
@given(st.data())
def test_experts_of_another_kind_are_refused(data: Any) -> None:
    bad = data.draw(misfits(torch.zeros(TOKENS, 2, dtype=torch.int64)))[1]
    refuses("routing.experts", lambda: mix(small_mix(bad)))


@examples(30)
@given(seeds, st.sampled_from([torch.nan, torch.inf]))
def test_a_weight_that_is_no_number_stays_in_its_token_and_is_not_read_without_an_expert(seed: int, bad: float) -> None:
    ids, weights = integers(seed, -1, EXPERTS, TOKENS, 2), normal(1, TOKENS, 2).float()
    clean = mix(small_mix(ids))
    at = seed % (TOKENS * 2)
    weights.view(-1)[at] = bad
    found = mix(small_mix(ids, weights))
    same = (torch.arange(TOKENS) != at // 2) | (ids.view(-1)[at] < 0)
    assert torch.equal(found[same], clean[same]) and not found[~same].isfinite().any()
