"""The compiled router over many blocks, groups and lanes, where the contract tests fit into one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from routing_oracle import normal
from routing_providers import use_reference
from torch import Tensor

from mmrec_kernels import library
from mmrec_kernels.routing import route
from mmrec_kernels.routing.router import SCORES
from numerics import errors

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
LIMIT = {torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float64: 1e-12}


def inputs(tokens: int, width: int, experts: int, dtype: torch.dtype, modalities: int = 3) -> tuple[Any, ...]:
    """x, the gate and options: each modality may use some experts, the last one only one; some tokens are absent."""
    x, gate = normal(tokens, width).to(dtype), (normal(experts, width, seed=1) / width**0.5).to(dtype)
    random = torch.Generator().manual_seed(2)
    allowed = torch.rand(modalities, experts, generator=random) < 0.7
    allowed[:, 0] = True
    allowed[-1, 1:] = False
    options = {
        "modality": torch.randint(-1, modalities, (tokens,), generator=random),
        "allowed": allowed,
        "valid": torch.rand(tokens, generator=random) < 0.9,
        "bias": 0.1 * normal(modalities, experts, seed=3).to(dtype),
    }
    return x, gate, options


def everything(x: Tensor, gate: Tensor, k: int, **options: Any) -> tuple[Tensor, ...]:
    """All results and both gradients, under some upstream."""
    x, gate = x.detach().requires_grad_(), gate.detach().requires_grad_()
    routing = route(x, gate, k, **options)
    losses = torch.stack(list(routing.losses))
    upstream = normal(*routing.weights.shape, seed=5).to(losses.dtype), normal(*losses.shape, seed=6).to(losses.dtype)
    grads = torch.autograd.grad([routing.weights, losses], (x, gate), upstream)
    return (routing.experts, routing.weights, routing.stats, losses, *grads)


@pytest.mark.parametrize("experts", [1, 3, 8, 17, 64, 256])
@pytest.mark.parametrize("tokens", [0, 1, 63, 4097])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_reference_in_float64(
    tokens: int, experts: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, gate, options = inputs(tokens, 31 if experts % 2 else 32, experts, dtype)
    exactly = [x.double(), gate.double(), {**options, "bias": options["bias"].double()}]
    for k in {1, 2, experts}:
        if k * tokens > 300_000:
            continue
        score = SCORES[k % 3]
        found = everything(x, gate, k, **options, score=score)
        with monkeypatch.context() as patch:
            use_reference(patch)
            exact = everything(*exactly[:2], k, **exactly[2], score=score)
        # Where float32 tells two scores apart as float64 does not, the ids differ: compare the tokens that agree.
        agree = (found[0] == exact[0]).all(1)
        assert float(agree.double().mean() if tokens else 1) > 0.99
        assert max(errors(found[1][agree], exact[1][agree])) <= LIMIT[dtype]
        if not bool(agree.all()):
            continue
        assert max(max(errors(x, y)) for x, y in zip(found[2:4], exact[2:4], strict=True)) <= LIMIT[dtype]
        rounding = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0.0
        assert max(max(errors(x, y)) for x, y in zip(found[4:], exact[4:], strict=True)) <= 10 * LIMIT[dtype] + rounding


@pytest.mark.parametrize("width", [1, 7, 255, 300, 600])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_width(width: int, score: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x, gate, options = inputs(90, width, 5, dtype)
    del options["bias"]
    found = everything(x, gate, 2, **options, score=score)
    use_reference(monkeypatch)
    exact = everything(x.double(), gate.double(), 2, **options, score=score)
    assert torch.equal(found[0], exact[0])
    rounding = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0.0
    for one, other in zip(found[1:], exact[1:], strict=True):
        assert max(errors(one, other)) <= 10 * LIMIT[dtype] + rounding


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_for_any_number_of_threads(dtype: torch.dtype, threads: Any) -> None:
    x, gate, options = inputs(5000, 48, 12, dtype)
    results = []
    for count in (1, 2, 4, 1):
        threads(count)
        results.append(everything(x, gate, 2, **options))
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("score", SCORES)
def test_a_token_has_the_same_bits_alone(score: str, dtype: torch.dtype) -> None:
    x, gate, options = inputs(700, 40, 9, dtype)
    together = route(x, gate, 3, **options, score=score)
    for t in (0, 1, 17, 255, 256, 699):
        own = {n: v[t : t + 1] if n in ("modality", "valid") else v for n, v in options.items()}
        alone = route(x[t : t + 1], gate, 3, **own, score=score)
        assert torch.equal(alone.experts[0], together.experts[t])
        assert torch.equal(alone.weights[0], together.weights[t])


def test_many_modalities_in_one_block() -> None:
    """More modalities than tokens of a block, and two that have none."""
    tokens, modalities = 600, 300
    x, gate = normal(tokens, 16), normal(6, 16, seed=1)
    modality = torch.arange(tokens) % (modalities - 2)
    routing = route(x, gate, 2, modality=modality, num_modalities=modalities)
    plain = route(x, gate, 2)
    assert torch.equal(routing.experts, plain.experts) and torch.equal(routing.weights, plain.weights)
    assert (routing.stats[-2:] == 0).all() and (torch.stack(list(routing.losses))[:, -2:] == 0).all()
    torch.testing.assert_close(routing.stats.sum(0), plain.stats[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_too_large_for_a_cache_are_the_same_bits(dtype: torch.dtype) -> None:
    """They go past it. A token's weights give its gradient, whatever else is in the batch."""
    tokens, width = (8 << 20) // (64 * dtype.itemsize) + 7, 64
    x, gate = normal(tokens, width).to(dtype).requires_grad_(), normal(4, width, seed=1).to(dtype)
    routing = route(x, gate, 2)
    upstream = normal(tokens, 2, seed=2).to(routing.weights.dtype)
    (large,) = torch.autograd.grad(routing.weights, x, upstream)
    few = x.detach()[-300:].requires_grad_()
    (small,) = torch.autograd.grad(route(few, gate, 2).weights, few, upstream[-300:])
    assert torch.equal(large[-300:], small)


@pytest.mark.parametrize("score", SCORES)
def test_infinite_logits(score: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """−∞ ranks behind all else, by id, and has weight 0; nothing of it is NaN beside finite logits."""
    x, gate = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), torch.ones(5, 2)
    gate[:, 1] = torch.arange(5.0)
    gate[1, 0] = gate[3, 0] = -torch.inf
    x[1, 0] = 1e-30  # times −∞
    found = route(x, gate, 5, score=score)
    assert found.experts[0].tolist() == [0, 2, 4, 1, 3] and found.experts[1].tolist() == [4, 2, 0, 1, 3]
    assert (found.weights[:, 3:] == 0).all() and found.weights.isfinite().all()
    assert found.losses.local_entropy.isfinite().all()
    use_reference(monkeypatch)
    exact = route(x, gate, 5, score=score)
    torch.testing.assert_close(found.weights, exact.weights)
    torch.testing.assert_close(found.losses.local_entropy, exact.losses.local_entropy)


def test_rows_that_are_apart() -> None:
    x, gate, options = inputs(300, 24, 6, torch.float32)
    wide = torch.full((300, 40), torch.nan)
    wide[:, 8:32] = x
    for one, other in zip(
        everything(wide[:, 8:32], gate, 2, **options), everything(x, gate, 2, **options), strict=True
    ):
        assert torch.equal(one, other)
    columns = x.T.contiguous().T
    assert torch.equal(route(columns, gate, 2, **options).weights, route(x, gate, 2, **options).weights)


def test_the_compiled_kernels_serve_where_they_are_built() -> None:
    if library.cpu_isa() == "none":
        pytest.skip("_C is not built")
    served = {p.op: p.name for p in library.providers() if p.device == "cpu"}
    assert served["_routing_forward"] == served["_routing_backward"] == "compiled"
