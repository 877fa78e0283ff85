"""The compiled NF4 linear over all its paths (few tokens, panels, passes; whole and odd groups of columns), where the
contract tests fit into one or two."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from nf4_providers import use_reference
from torch import Tensor
from torch.nn.functional import linear

from mmrec_kernels.nf4 import LoRA, NF4Weight, nf4_linear
from numerics import assert_accurate

DTYPES = (torch.float32, torch.bfloat16, torch.float64)
# One and two parts of few tokens, one more than those, a panel and more, two passes of the backward and of the forward.
TOKENS = (1, 2, 4, 7, 12, 13, 20, 24, 25, 32, 33, 70, 520, 1030)
# Whole groups; a last half of one; columns that end in the middle of a byte's block; fewer columns than a group has.
SHAPES = ((50, 256, 64), (13, 320, 64), (97, 200, 64), (33, 384, 32), (9, 384, 4096), (49, 45, 64), (7, 64, 128))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(tokens: int, out: int, width: int, blocksize: int, rank: int, dtype: torch.dtype, adapters: int = 3) -> dict:
    """Everything at once: bias, a stack of float32 adapters of which one is not used, tokens without one."""
    ids = torch.randint(-1, adapters - 1, (tokens,), generator=torch.Generator().manual_seed(1))
    return {
        "x": normal(tokens, width).to(dtype),
        "weight": NF4Weight.quantize(normal(out, width, seed=2).float() / width**0.5, blocksize, nested=out % 2 == 1),
        "bias": normal(out, seed=3).to(dtype),
        "a": normal(adapters, rank, width, seed=4).float() / width**0.5,
        "b": normal(adapters, out, rank, seed=5).float(),
        "scalings": torch.linspace(0.5, 2, adapters),
        "ids": ids,
        "dy": normal(tokens, out, seed=6).to(dtype),
    }


def run(given: dict) -> list[Tensor]:
    """y and the gradients of x, bias, a and b."""
    leaves = [given[name].detach().clone().requires_grad_() for name in ("x", "bias", "a", "b")]
    x, bias, a, b = leaves
    lora = LoRA(a, b, given["scalings"])
    y = nf4_linear(x, given["weight"], bias, lora=lora, adapter_ids=given["ids"])
    return [y.detach(), *torch.autograd.grad(y, leaves, given["dy"])]


def eager(given: dict, dtype: torch.dtype) -> list[Tensor]:
    """Plain torch in `dtype` on the weight as it is decoded for x, adapters one after the other."""
    w = given["weight"].dequantize(given["x"].dtype).to(dtype)
    leaves = [given[name].detach().to(dtype).requires_grad_() for name in ("x", "bias", "a", "b")]
    x, bias, a, b = leaves
    y = linear(x, w, bias)
    for e, scaling in enumerate(given["scalings"].tolist()):
        y = y + (given["ids"] == e)[:, None] * (linear(linear(x, a[e]), b[e]) * scaling)
    return [y.detach(), *torch.autograd.grad(y, leaves, given["dy"].to(dtype))]


def assert_right(given: dict, found: list[Tensor]) -> None:
    """What `run` found, or y alone, on whichever device, by the rule of numerics.py."""
    dtype, names = given["x"].dtype, ("y", "dx", "dbias", "da", "db")
    assert len(found) in (1, len(names))
    for name, one, exact, plain in zip(names, found, eager(given, torch.float64), eager(given, dtype), strict=False):
        assert one.dtype == (torch.float32 if name in ("da", "db") else dtype)
        assert_accurate(one.cpu(), exact, plain.double(), dtype=dtype if name in ("y", "dx") else torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", TOKENS)
def test_every_number_of_tokens(tokens, dtype):
    given = make(tokens, 50, 256, 64, 8, dtype)
    assert_right(given, run(given))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [3, 21, 40])
@pytest.mark.parametrize(("out", "width", "blocksize"), SHAPES)
def test_every_shape_of_the_weight(out, width, blocksize, tokens, dtype):
    given = make(tokens, out, width, blocksize, 5, dtype)
    assert_right(given, run(given))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("rank", [1, 7, 16, 33, 64])
@pytest.mark.parametrize("tokens", [2, 11, 50])
def test_every_rank(tokens, rank, dtype):
    given = make(tokens, 60, 320, 64, rank, dtype)
    assert_right(given, run(given))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("tokens", TOKENS)
def test_w_is_decoded_exactly(tokens, dtype):
    """Rows of the identity as tokens, and as gradients, read W out, whichever kernel serves."""
    weight = NF4Weight.quantize(normal(67, 448, seed=2).float(), 64)
    decoded = weight.dequantize(dtype)
    columns, rows = torch.arange(tokens) * 29 % 448, torch.arange(tokens) * 7 % 67
    x = torch.eye(448, dtype=dtype)[columns].requires_grad_()
    y = nf4_linear(x, weight)
    assert torch.equal(y, decoded.T[columns])
    (dx,) = torch.autograd.grad(y, x, torch.eye(67, dtype=dtype)[rows])
    assert torch.equal(dx, decoded[rows])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 9, 24, 90, 600])
def test_bits_do_not_depend_on_threads(tokens, dtype, threads):
    given = make(tokens, 150, 520, 64, 8, dtype)
    found = []
    for count in (1, 2, 4, 1):
        threads(count)
        found.append(run(given))
    for other in found[1:]:
        assert all(torch.equal(p, q) for p, q in zip(found[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [5, 12, 24, 38, 100, 1040])
def test_mixed_adapters_have_the_bits_of_single_ones(tokens, dtype):
    """Tokens are sorted by adapter inside: none of their bits may depend on where they come to lie."""
    given = make(tokens, 70, 256, 64, 8, dtype)
    mixed = run(given)
    for e in (-1, 0, 1):
        single = run(given | {"ids": torch.full((tokens,), e)})
        mine = given["ids"] == e
        assert mine.any() or tokens < 10
        assert torch.equal(mixed[0][mine], single[0][mine]) and torch.equal(mixed[1][mine], single[1][mine])


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("tokens", [4, 50])
def test_a_damaged_block_reaches_its_row_only(tokens, dtype):
    """NaN as the absmax of one block: y of its row, and dx of its columns; what lies beside it in memory is not met."""
    given = make(tokens, 30, 256, 64, 4, dtype)
    absmax = given["weight"].absmax.clone()
    expected = run(given)
    absmax[4 * 11 + 2] = torch.nan
    found = run(given | {"weight": dataclasses.replace(given["weight"], absmax=absmax)})
    rows, columns = torch.arange(30) == 11, torch.arange(256) // 64 == 2
    assert found[0][:, rows].isnan().all() and torch.equal(found[0][:, ~rows], expected[0][:, ~rows])
    assert found[1][:, columns].isnan().all() and torch.equal(found[1][:, ~columns], expected[1][:, ~columns])
    assert all(torch.equal(p, q) for p, q in zip(found[2:], expected[2:], strict=True))


def surrounded(given: dict) -> dict:
    """All inputs in the middle of buffers of NaN, bytes in the middle of others."""

    def one(t: Tensor) -> Tensor:
        fill = torch.nan if t.is_floating_point() else 255
        buffer = torch.full((t.numel() + 512,), fill, dtype=t.dtype)
        buffer[256 : 256 + t.numel()] = t.reshape(-1)
        return buffer[256 : 256 + t.numel()].view(t.shape)

    weight = given["weight"]
    names = ("packed", "absmax", "nested_absmax", "nested_code", "offset")
    parts = {n: t if t is None or t.ndim == 0 else one(t) for n, t in zip(names, weight.tensors(), strict=True)}
    moved = {n: one(t) if isinstance(t, Tensor) and n != "ids" else t for n, t in given.items()}
    return moved | {"weight": dataclasses.replace(weight, **parts)}


def test_poison_around_everything():
    """Nothing outside of the inputs is read."""
    for tokens, shape, dtype in (
        (3, SHAPES[1], torch.bfloat16),
        (15, SHAPES[2], torch.float32),
        (40, SHAPES[4], torch.bfloat16),
    ):
        given = make(tokens, *shape, 5, dtype)
        assert all(torch.equal(p, q) for p, q in zip(run(surrounded(given)), run(given), strict=True))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_the_reference_agrees(dtype, monkeypatch):
    given = make(37, 97, 200, 64, 8, dtype)
    found = run(given)
    use_reference(monkeypatch)
    for one, other in zip(found, run(given), strict=True):
        scale = other.double().abs().max()
        assert (one.double() - other.double()).abs().max() <= (1e-5 if dtype == torch.float32 else 2**-7) * scale
