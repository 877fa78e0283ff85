"""route on whatever may be drawn: shapes, dtypes, strides, absent tokens, nonsense as arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from routing_oracle import naive_route
from torch import Tensor

from mmrec_kernels import library, mixture_of_experts, route, schemas
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


@st.composite
def routers(draw: Any, dtype: torch.dtype) -> dict[str, Any]:
    """Distinct whole logits times a step: every dtype and the oracle choose the same experts."""
    tokens, experts, modalities, seed = (
        draw(sizes(64)),
        draw(st.sampled_from([1, 2, 3, 8, 17])),
        draw(st.integers(1, 3)),
        draw(seeds),
    )
    width = experts + draw(st.integers(0, 3))
    order = normal(seed, tokens, experts).argsort(1).double() / 4  # x · gateᵀ is `order`, exactly
    gate = torch.eye(experts, width, dtype=torch.float64) * draw(st.sampled_from([1.0, -2.0]))
    made: dict[str, Any] = {
        "x": torch.cat([order, normal(seed + 1, tokens, width - experts)], 1).to(dtype),
        "gate_weight": gate.to(dtype),
    }
    if draw(st.booleans()):
        made["gate_weight"] = gate if dtype == torch.float64 else gate.float()
    made |= {"k": draw(st.sampled_from([1, 2, experts, experts + 2])), "score": draw(st.sampled_from(SCORES))}
    made["num_modalities"] = modalities
    made["renormalize"] = draw(st.sampled_from([None, False] if made["k"] == 1 else [None, False, True]))
    if modalities > 1 or draw(st.booleans()):
        made["modality"] = integers(seed + 2, -1, modalities, tokens)
    if draw(st.booleans()):
        made["allowed"] = integers(seed + 3, 0, 3, modalities, experts) > 0
    if draw(st.booleans()):
        made["valid"] = integers(seed + 4, 0, 4, tokens) > 0
    if draw(st.booleans()):
        shape = (modalities, experts) if draw(st.booleans()) else (experts,)
        made["bias"] = (integers(seed + 5, -1, 2, *shape) * 32.0).to(
            torch.float64 if dtype == torch.float64 else torch.float32
        )
    return Problem(made)


def run_route(function: Any, given_: dict[str, Any], upstream: list[Tensor]) -> list[Tensor]:
    """experts, stats, weights, losses, and the gradients of x and gate_weight."""
    leaves = {n: given_[n].detach().requires_grad_() for n in ("x", "gate_weight")}
    rest = {n: v for n, v in given_.items() if n not in leaves and n != "k"}
    found = function(leaves["x"], leaves["gate_weight"], given_["k"], **rest)
    losses = found.losses if isinstance(found.losses, Tensor) else torch.stack(list(found.losses))
    loss = sum((a * b.to(a.dtype)).sum() for a, b in zip((found.weights, losses), upstream, strict=True))
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True) if loss.requires_grad else (None, None)
    grads = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves.values(), grads, strict=True)]
    return [found.experts, found.stats, found.weights.detach(), losses.detach(), *grads]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@examples(15)
@given(st.data())
def test_routes_are_those_of_one_token_at_a_time(dtype: torch.dtype, data: Any) -> None:
    given_, memory = data.draw(routers(dtype)), Memory()
    tokens, k = len(given_["x"]), given_["k"]
    upstream = [normal(0, tokens, k), normal(1, 4, given_["num_modalities"])]
    strided = in_memory(given_, memory, data.draw)
    plain = copied(strided)
    ours = run_route(route, strided, upstream)
    memory.assert_untouched()
    assert_deterministic(lambda: run_route(route, strided, upstream), lambda: run_route(route, plain, upstream))
    exact = run_route(naive_route, copied(plain, torch.float64), upstream)
    assert torch.equal(ours[0], exact[0])

    def eager(order: int) -> list[Tensor]:
        """The oracle in `dtype`, columns in another order."""
        columns = normal(order, given_["x"].shape[1]).argsort()
        moved = copied(plain, dtype)
        moved |= {n: moved[n][:, columns] for n in ("x", "gate_weight")}
        *found, dx, dgate = run_route(naive_route, moved, upstream)[1:]
        return [*found, dx[:, columns.argsort()], dgate[:, columns.argsort()]]

    judge(["stats", "weights", "losses", "dx", "dgate"], ours[1:], exact[1:], eager, dtype)


TOKENS, EXPERTS, M = 5, 3, 2


def small_route(**changes: Any) -> dict[str, Any]:
    return {"x": normal(0, TOKENS, 4).float(), "gate_weight": normal(1, EXPERTS, 4).float(), "k": 2,
            "modality": torch.tensor([0, 1, -1, 1, 0]), "num_modalities": M, "allowed": torch.ones(M, EXPERTS).bool(),
            "valid": torch.tensor([1, 1, 1, 0, 1])} | changes  # fmt: skip


def raw_route(**p: Any) -> tuple[Tensor, ...]:
    """The raw op, its complaints as the public function gives them."""
    return library.call(schemas.routing_forward, p["x"], p["gate_weight"], p["modality"], p["allowed"], None,
                        p["valid"] != 0, p["k"], M, "softmax", True)  # fmt: skip


def route_with_gradients(**p: Any) -> Any:
    return route(**(p | {"x": p["x"].requires_grad_()}))


@examples(40)
@given(bad_integers(TOKENS, -1, M))
def test_modalities_that_there_are_not_are_refused(modality: list[int]) -> None:
    for function in (route, route_with_gradients, raw_route):
        refuses("modality", lambda function=function: function(**small_route(modality=torch.tensor(modality))))


@examples(60)
@given(st.sampled_from(["modality", "allowed", "valid"]), st.data())
def test_masks_and_modalities_of_another_kind_are_refused(name: str, data: Any) -> None:
    how, bad = data.draw(misfits(small_route()[name]))
    if how == "dtype":
        bad = bad.to(torch.float32)
    refuses(name, lambda: route(**small_route(**{name: bad})))


@examples(40)
@given(st.sampled_from(["k", "num_modalities"]), st.sampled_from([0, -1, -(2**63), 1.0, "2", True]))
def test_counts_of_another_kind_are_refused(name: str, bad: Any) -> None:
    refuses(name, lambda: route(**small_route(**{name: bad})))


@examples(30)
@given(seeds, st.sampled_from([torch.nan, torch.inf, -torch.inf]), st.sampled_from(SCORES))
def test_what_is_no_number_stays_in_its_token_and_names_experts_that_there_are(
    seed: int, bad: float, score: str
) -> None:
    given_ = small_route(score=score)
    at = seed % TOKENS
    given_["x"][at, seed % 4] = bad
    found, clean = route(**given_), route(**small_route(score=score))
    others = torch.arange(TOKENS) != at
    assert bool((found.experts >= -1).all()) and bool((found.experts < EXPERTS).all())
    assert torch.equal(found.experts[others], clean.experts[others])
    assert torch.equal(found.weights[others], clean.weights[others])
    out = mixture_of_experts(given_["x"], found, normal(2, EXPERTS, 6, 4).float(), normal(3, EXPERTS, 4, 3).float())
    assert bool(out[others].isfinite().all())


def test_rows_that_lie_more_than_two_to_the_31_bytes_apart() -> None:
    """In memory that nobody touches, so that only the pages of the rows are there."""
    stride = 2**30 + 8
    x = torch.empty(stride + 8, dtype=torch.bfloat16).as_strided((2, 8), (stride, 1))
    x.copy_(normal(0, 2, 8))
    gate = normal(1, 3, 8, dtype=torch.bfloat16)
    far, near = route(x, gate, 2), route(x.contiguous(), gate, 2)
    assert torch.equal(far.weights, near.weights) and torch.equal(far.experts, near.experts)
    w_in, w_out = normal(2, 3, 6, 8, dtype=torch.bfloat16), normal(3, 3, 8, 3, dtype=torch.bfloat16)
    assert torch.equal(mixture_of_experts(x, far, w_in, w_out), mixture_of_experts(x.contiguous(), near, w_in, w_out))


def test_shapes_of_meta_tensors_do_not_overflow() -> None:
    x, gate = torch.empty(2**34, 8, device="meta"), torch.empty(4, 8, device="meta")
    routing = route(x, gate, 2)
    assert routing.weights.shape == (2**34, 2)
    out = mixture_of_experts(x, routing, torch.empty(4, 6, 8, device="meta"), torch.empty(4, 8, 3, device="meta"))
    assert out.shape == x.shape
