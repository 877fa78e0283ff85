"""The compiled experts over many tiles, chunks and passes, where the contract tests fit into one."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from routing_oracle import GATED, normal
from routing_providers import use_reference
from torch import Tensor

from mmrec_kernels import library, schemas
from mmrec_kernels.routing import SharedExpert, autograd, mixture_of_experts
from mmrec_kernels.routing.reference_experts import ACTIVATIONS
from numerics import errors

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
# Activated products are rounded to bfloat16 where the processor multiplies pairs of these.
LIMIT = {torch.float32: 2e-6, torch.bfloat16: 2 * torch.finfo(torch.bfloat16).eps, torch.float64: 1e-13}


def given(
    tokens: int,
    width: int,
    hidden: int,
    experts: int,
    k: int,
    dtype: torch.dtype,
    activation: str = "swiglu",
    gates: int = 1,
) -> dict[str, Any]:
    """Arguments of `mixture_of_experts` with everything: biases, a shared expert of another width, empty slots."""
    rows, shared = (2 * hidden, 2 * (hidden + 2)) if activation in GATED else (hidden, hidden + 2)
    fan_in, fan_out = max(width, 1) ** 0.5, max(hidden, 1) ** 0.5
    ids = torch.randint(-1, experts, (gates, tokens, k), generator=torch.Generator().manual_seed(1))
    ids[:, 1:2] = -1
    return {
        "x": normal(tokens, width).to(dtype),
        "routing": [
            SimpleNamespace(weights=normal(tokens, k, seed=2 + g).to(dtype), experts=ids[g]) for g in range(gates)
        ],
        "w_in": (normal(experts, rows, width, seed=10) / fan_in).to(dtype),
        "w_out": (normal(experts, width, hidden, seed=11) / fan_out).to(dtype),
        "b_in": normal(experts, rows, seed=12).to(dtype),
        "b_out": normal(experts, width, seed=13).to(dtype),
        "shared": SharedExpert(
            (normal(shared, width, seed=14) / fan_in).to(dtype),
            (normal(width, hidden + 2, seed=15) / fan_out).to(dtype),
            normal(width, seed=16).to(dtype),
        ),
        "activation": activation,
    }


def wide(arguments: dict[str, Any]) -> dict[str, Any]:
    def widen(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.double() if value.is_floating_point() else value
        if isinstance(value, SharedExpert):
            return SharedExpert(*map(widen, value))
        if isinstance(value, list):
            return [SimpleNamespace(weights=r.weights.double(), experts=r.experts) for r in value]
        return value

    return {name: widen(value) for name, value in arguments.items()}


def assert_equals_the_reference(arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    found = mixture_of_experts(**arguments)
    with monkeypatch.context() as patch:
        use_reference(patch)
        exact = mixture_of_experts(**wide(arguments))
    for one, other in zip(found, exact, strict=True):
        assert max(errors(one, other)) <= LIMIT[arguments["x"].dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_equals_the_reference(given(150, 32, 48, 3, 2, dtype, activation), monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "width, hidden", [(0, 0), (0, 20), (20, 0), (1, 1), (7, 5), (32, 300), (300, 129), (600, 16), (34, 258)]
)
@pytest.mark.parametrize("tokens", [0, 1, 5, 63, 700])
def test_any_size(tokens: int, width: int, hidden: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_equals_the_reference(given(tokens, width, hidden, 4, 2, dtype), monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 6, 7])
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_few_tokens(tokens: int, activation: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Widths of whole vectors, so that up to six tokens have the width in lanes; of shared experts too."""
    arguments = given(tokens, 64, 112, 3, 3, dtype, activation)
    assert_equals_the_reference(arguments, monkeypatch)
    rows = 224 if activation in GATED else 112
    shared = SharedExpert(
        (normal(rows, 64, seed=3) / 8).to(dtype), (normal(64, 112, seed=4) / 8).to(dtype), normal(64, seed=5).to(dtype)
    )
    assert_equals_the_reference({**arguments, "shared": shared}, monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("experts, k", [(1, 1), (3, 3), (17, 2), (64, 2)])
def test_gates_and_experts(experts: int, k: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_equals_the_reference(given(400, 24, 40, experts, k, dtype, gates=3), monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [4, 300])
def test_the_same_bits_for_any_number_of_threads(tokens: int, dtype: torch.dtype, threads: Any) -> None:
    arguments = given(tokens, 64, 80, 5, 2, dtype, gates=2)
    results = []
    for count in (1, 2, 4, 1):
        threads(count)
        results.append(mixture_of_experts(**arguments))
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_has_the_same_bits_whoever_is_beside_it(dtype: torch.dtype) -> None:
    """Tiles of one token and of sixty-four give the same; so do many passes over the tokens and one."""
    arguments = given(9000, 16, 24, 6, 2, dtype)
    (together,) = mixture_of_experts(**arguments)
    for tokens in (slice(0, 7), slice(4000, 4300), slice(8990, 9000)):
        (routing,) = arguments["routing"]
        own = SimpleNamespace(weights=routing.weights[tokens], experts=routing.experts[tokens])
        (alone,) = mixture_of_experts(**{**arguments, "x": arguments["x"][tokens], "routing": [own]})
        assert torch.equal(alone, together[tokens])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [5, 5000])
def test_saved_hidden_rows_are_where_the_reference_has_them(
    tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = given(tokens, 32, 48, 4, 2, dtype, gates=2)
    weights, experts = (torch.stack([getattr(r, n) for r in arguments["routing"]]) for n in ("weights", "experts"))
    call = (
        arguments["x"], weights.to(schemas.statistics_dtype(dtype)), experts, arguments["w_in"], arguments["w_out"],
        arguments["b_in"], arguments["b_out"], *arguments["shared"], "swiglu", True,
    )  # fmt: skip
    found = library.call(schemas.experts_forward, *call)
    use_reference(monkeypatch)
    exact = library.call(schemas.experts_forward, *call)
    for one, other in zip(found, exact, strict=True):
        assert max(errors(one, other)) <= LIMIT[dtype]


def gradients(arguments: dict[str, Any]) -> list[Tensor]:
    """Of everything that has one, under some upstream."""
    leaves: list[Tensor] = []

    def leaf(tensor: Tensor) -> Tensor:
        leaves.append(tensor.detach().requires_grad_())
        return leaves[-1]

    own = {n: leaf(v) if isinstance(v, Tensor) else v for n, v in arguments.items()}
    own["routing"] = [SimpleNamespace(weights=leaf(r.weights), experts=r.experts) for r in arguments["routing"]]
    if arguments["shared"] is not None:
        own["shared"] = SharedExpert(*(None if t is None else leaf(t) for t in arguments["shared"]))
    outs = mixture_of_experts(**own)
    # The same numbers in every dtype.
    upstream = [normal(*out.shape, seed=50 + g).bfloat16().to(out.dtype) for g, out in enumerate(outs)]
    return list(torch.autograd.grad(outs, leaves, upstream))


def assert_gradients_equal_the_reference(arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    found = gradients(arguments)
    with monkeypatch.context() as patch:
        use_reference(patch)
        exact = gradients(wide(arguments))
    for one, other in zip(found, exact, strict=True):
        assert max(errors(one, other)) <= 5 * LIMIT[arguments["x"].dtype], one.shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gates", [1, 2])
def test_gradients(gates: int, activation: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_gradients_equal_the_reference(given(150, 32, 48, 3, 2, dtype, activation, gates), monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gates", [1, 2])
@pytest.mark.parametrize(
    "width, hidden", [(0, 0), (0, 20), (20, 0), (1, 1), (7, 5), (32, 300), (300, 129), (600, 16), (34, 258), (64, 128)]
)
@pytest.mark.parametrize("tokens", [0, 1, 63, 700])
@pytest.mark.parametrize("kept", [False, True])
def test_gradients_of_any_size(
    tokens: int, width: int, hidden: int, gates: int, kept: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autograd, "SAVE_HIDDEN_WIDTH", 0 if kept else 10**9)
    assert_gradients_equal_the_reference(given(tokens, width, hidden, 4, 2, dtype, gates=gates), monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_infinite_gradient_stays_what_it_is(dtype: torch.dtype) -> None:
    """That of a weight is dout · y, whose columns all count: none but those behind a row, which are 0, would be NaN."""
    arguments = {**given(70, 8, 5, 3, 2, dtype, "gelu"), "shared": None, "b_out": None}
    arguments["w_out"] = arguments["w_out"].abs()
    arguments["x"], arguments["w_in"], arguments["b_in"] = (arguments[name].abs() for name in ("x", "w_in", "b_in"))
    (route,) = arguments["routing"]
    weights = route.weights.clone().requires_grad_()
    (out,) = mixture_of_experts(**{**arguments, "routing": [SimpleNamespace(weights=weights, experts=route.experts)]})
    (grad,) = torch.autograd.grad(out, weights, torch.full_like(out, torch.inf))
    assert torch.equal(grad == torch.inf, route.experts >= 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gates", [1, 2])
def test_gradients_over_several_passes(gates: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = given(9000, 16, 520, 3, 2, dtype, gates=gates)
    assert_gradients_equal_the_reference(arguments, monkeypatch)
    monkeypatch.setattr(autograd, "SAVE_HIDDEN_WIDTH", 1)
    assert_gradients_equal_the_reference(arguments, monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gates", [1, 2])
def test_gradients_have_the_same_bits_for_any_number_of_threads(gates: int, dtype: torch.dtype, threads: Any) -> None:
    arguments = given(2500, 40, 80, 5, 2, dtype, gates=gates)
    results = []
    for count in (1, 2, 4, 1):
        threads(count)
        results.append(gradients(arguments))
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))
