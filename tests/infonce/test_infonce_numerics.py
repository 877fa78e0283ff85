"""Errors against float64: at most twice those of eager torch in the same dtype, plus a floor."""

from __future__ import annotations

import pytest
import torch
from infonce_oracle import eager
from torch import Tensor

from mmrec_kernels.infonce import info_nce

FLOOR = {torch.float32: 1e-6, torch.bfloat16: 3e-5}


def aligned(rows: int, width: int, noise: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Unit rows; `noise` says how far a key is from its query."""
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(rows, width, dtype=torch.float64, generator=generator)
    key = query + noise * torch.randn(rows, width, dtype=torch.float64, generator=generator)
    unit = torch.nn.functional.normalize
    return unit(query).to(dtype).requires_grad_(), unit(key).to(dtype).requires_grad_()


def wide(*tensors: Tensor) -> list[Tensor]:
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


def errors(actual: Tensor, oracle: Tensor) -> tuple[float, float]:
    difference = actual.detach().double() - oracle
    return (difference.abs().max() / oracle.abs().max()).item(), (difference.norm() / oracle.norm()).item()


def within(ours: Tensor, theirs: Tensor, oracle: Tensor, floor: float) -> None:
    for mine, other in zip(errors(ours, oracle), errors(theirs, oracle), strict=True):
        assert mine <= 2 * other + floor


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errors_are_no_worse_than_those_of_eager_torch(dtype: torch.dtype, scale: float, symmetric: bool) -> None:
    query, key = aligned(192, 64, 1.0, dtype)
    exact_query, exact_key = wide(query, key)
    temperature = torch.tensor(scale, requires_grad=True)
    exact_temperature = torch.tensor(scale, dtype=torch.float64, requires_grad=True)
    inputs, exact_inputs = [query, key, temperature], [exact_query, exact_key, exact_temperature]
    oracle = eager(exact_query, exact_key, scale=exact_temperature, symmetric=symmetric)
    ours = info_nce(query, key, scale=temperature, symmetric=symmetric)
    theirs = eager(query, key, scale=temperature, symmetric=symmetric)
    within(ours, theirs, oracle, FLOOR[dtype])
    for mine, other, exact in zip(
        torch.autograd.grad(ours, inputs),
        torch.autograd.grad(theirs, inputs),
        torch.autograd.grad(oracle, exact_inputs),
        strict=True,
    ):
        within(mine, other, exact, FLOOR[dtype])


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2e-6), (torch.bfloat16, 2.3e-3)])
@pytest.mark.parametrize("scale", [14.3, 30.0, 100.0])
def test_gradients_keep_the_accuracy_of_float32_logits(dtype: torch.dtype, limit: float, scale: float) -> None:
    query, key = aligned(512, 128, 1.0, dtype)
    exact_query, exact_key = wide(query, key)
    ours = torch.autograd.grad(info_nce(query, key, scale=scale), [query, key])
    oracle = torch.autograd.grad(info_nce(exact_query, exact_key, scale=scale), [exact_query, exact_key])
    for mine, exact in zip(ours, oracle, strict=True):
        assert errors(mine, exact)[1] <= limit


@pytest.mark.parametrize("scale", [14.3, 30.0, 100.0])
@pytest.mark.parametrize("noise", [2.0, 1.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_table_of_errors(dtype: torch.dtype, noise: float, scale: float) -> None:
    """The table of docs/infonce.md: `pytest -s -k table_of_errors` prints it. Noise 1 and 0.1 are losses near zero."""
    query, key = aligned(1024, 256, noise, dtype)
    exact_query, exact_key = wide(query, key)
    oracle = info_nce(exact_query, exact_key, scale=scale)
    exact = torch.autograd.grad(oracle, [exact_query, exact_key])

    def judged(value: Tensor) -> tuple[float, float]:
        gradients = torch.autograd.grad(value, [query, key])
        return errors(value, oracle)[1], max(errors(a, b)[1] for a, b in zip(gradients, exact, strict=True))

    loss, gradient = judged(info_nce(query, key, scale=scale))
    their_loss, their_gradient = judged(eager(query, key, scale=scale))
    print(
        f"| {str(dtype)[6:]} | {noise:g} | {scale:g} | {oracle.item():.1e} | {loss:.1e} | {gradient:.1e} |"
        f" {their_loss:.1e} | {their_gradient:.1e} |"
    )
    if dtype == torch.float32:
        limit = 2e-7 * scale if noise < 2 else 2e-6
        assert max(loss, gradient) <= limit
    else:
        assert gradient <= 2.3e-3 and loss <= 5e-6


def test_a_loss_near_zero_is_exact() -> None:
    """1 − p and log-softmax lose everything here; softplus(LSE_neg − s_pos) loses only the rounding of the logits."""
    scale = 60.0
    query, key = aligned(128, 64, 0.05, torch.float32)
    exact_query, exact_key = wide(query, key)
    oracle = info_nce(exact_query, exact_key, scale=scale)
    ours = info_nce(query, key, scale=scale)
    assert 0 < oracle.item() < 1e-6
    limit = 2e-7 * scale
    assert abs(ours.item() / oracle.item() - 1) <= limit
    gradients = torch.autograd.grad(ours, [query, key])
    exact = torch.autograd.grad(oracle, [exact_query, exact_key])
    for mine, other in zip(gradients, exact, strict=True):
        assert errors(mine, other)[1] <= limit
    assert abs(eager(query, key, scale=scale).item() / oracle.item() - 1) > 100 * limit


def test_float64_matches_the_closed_form_of_a_tiny_loss() -> None:
    query = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64, requires_grad=True)
    value = info_nce(query, query.detach(), scale=200.0)
    assert value.item() == pytest.approx(torch.exp(torch.tensor(-200.0, dtype=torch.float64)).item(), rel=1e-13)
    gradient = torch.autograd.grad(value, query)[0]
    assert gradient[0, 0].item() == pytest.approx(-200.0 / 2 * value.item(), rel=1e-12)


def test_huge_logits_overflow_nothing() -> None:
    query, key = aligned(16, 8, 1.0, torch.float32)
    exact_query, exact_key = wide(query, key)
    for scale in (1e3, 1e5):
        ours, oracle = info_nce(query, key, scale=scale), info_nce(exact_query, exact_key, scale=scale)
        torch.testing.assert_close(ours.double(), oracle, rtol=1e-5, atol=1e-5 * scale)
        assert all(g.isfinite().all() for g in torch.autograd.grad(ours, [query, key]))


def test_gradients_of_a_direction_sum_to_zero_over_keys() -> None:
    """Σ_j dS_ij = 0: a vector added to every key moves no loss of the row direction."""
    query, key = (t.detach().double().requires_grad_() for t in aligned(32, 8, 1.0, torch.float32))
    log_q = torch.zeros(32, dtype=torch.float64, requires_grad=True)
    value = info_nce(query, key, scale=5.0, log_q=log_q, symmetric=False, reduction="sum")
    assert abs(torch.autograd.grad(value, log_q)[0].sum().item()) < 1e-13
