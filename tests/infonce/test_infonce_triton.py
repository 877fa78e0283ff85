"""The Triton kernels of InfoNCE: in the interpreter, compiled ahead of time, and on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import use_reference
from test_infonce_kernel import everything, run, unit, widened
from torch import Tensor

from mmrec_kernels import info_nce, schemas, validation
from mmrec_kernels.infonce import autograd
from numerics import errors

triton = pytest.importorskip("triton")


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The public functions run the Triton launchers on CPU tensors."""
    from mmrec_kernels.infonce import triton as launchers

    def call(op: Any, *args: Any) -> Any:
        if op is schemas.infonce_backward:
            return launchers.backward(*args)
        return launchers.forward(*args[:-2], False, args[-1])  # save is False, as for CUDA tensors

    monkeypatch.setattr(autograd, "library", SimpleNamespace(call=call))
    every = (*validation.GPU_DTYPES, torch.float64)
    monkeypatch.setattr(validation, "float_dtypes", lambda device: every)


def exact(monkeypatch: pytest.MonkeyPatch, query: Tensor, key: Tensor, options: dict[str, Any]) -> Any:
    use_reference(monkeypatch)
    return run(query.double(), key.double(), **widened(options))


# The interpreter multiplies float16 exactly; its bfloat16 stores truncate, which is one unit in the last place.
LIMITS = {torch.float32: 5e-6, torch.float16: 3e-3, torch.bfloat16: 2e-2}
OPTIONS: dict[str, Callable[[int, int, torch.dtype], dict[str, Any]]] = {
    "plain": lambda rows, keys, dtype: {"scale": torch.tensor(9.0)},
    "one direction": lambda rows, keys, dtype: {"scale": torch.tensor(9.0), "symmetric": False},
    "everything": everything,
    "everything, one direction": lambda rows, keys, dtype: {**everything(rows, keys, dtype), "symmetric": False},
}


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.usefixtures("interpreted")
def test_interpreted_kernels_match_the_oracle(
    case: str, chunked: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmrec_kernels.infonce import triton as launchers

    if chunked:
        monkeypatch.setattr(launchers, "OWNER_WIDTH", 8)
        monkeypatch.setattr(launchers, "CHUNK_BYTES", 1)
    rows, keys = 37, 70
    query, key = unit(rows, 20, dtype, 1) * 2, unit(keys, 20, dtype, 2)
    options = OPTIONS[case](rows, keys, dtype)
    ours, stats = run(query, key, **options)
    oracle, exact_stats = exact(monkeypatch, query, key, options)
    for name, tensor in ours.items():
        limit = 5e-6 if name == "value" and dtype != torch.bfloat16 else LIMITS[dtype]
        assert max(errors(tensor, oracle[name])) <= limit, name
    torch.testing.assert_close(stats.lse.double(), exact_stats.lse.double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stats.positive.double(), exact_stats.positive.double(), rtol=1e-6, atol=1e-6)
    clear = (stats.rank - exact_stats.rank).abs()
    assert int(clear.max()) <= 1 and float((clear == 0).double().mean()) > 0.9


@pytest.mark.interpret
@pytest.mark.usefixtures("interpreted")
def test_interpreted_kernels_keep_keys_far_below_their_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys that need references of their own, and pairs of references too far apart for one exponential."""
    query, key = torch.randn(40, 8) * 6, torch.randn(40, 8) * torch.logspace(-1, 1.2, 40)[:, None]
    query[20:] = query[20:].abs()
    key[10:20] = -key[10:20].abs()
    options = {"scale": torch.tensor(1.0)}
    ours, _ = run(query, key, **options)
    oracle, _ = exact(monkeypatch, query, key, options)
    for mine, other in zip(ours["key"].double(), oracle["key"], strict=True):
        assert float((mine - other).norm()) <= 1e-3 * float(other.norm()) + 1e-9


@pytest.mark.interpret
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("normalize", [True, False])
def test_interpreted_kernels_ignore_what_nobody_reads(normalize: bool) -> None:
    query, key = unit(20, 8, torch.float32, 1), unit(40, 8, torch.float32, 2)
    target = torch.randint(0, 30, (20,))
    target[[3, 7]] = -1
    offsets = torch.arange(21) * 10
    options = {
        "target": target,
        "exclude": (offsets, torch.arange(30, 40).repeat(20)),
        "symmetric": False,
        "normalize": normalize,
        "scale": torch.ones(20),
    }
    clean, _ = run(query, key, **options)
    query[[3, 7]], key[30:] = float("nan"), float("nan")
    dirty, _ = run(query, key, **options)
    assert all(torch.equal(a, b) for a, b in zip(clean.values(), dirty.values(), strict=True))


@pytest.mark.interpret
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("rows, keys", [(0, 5), (3, 0), (1, 1)])
def test_interpreted_kernels_take_empty_sizes(rows: int, keys: int) -> None:
    query, key = torch.randn(rows, 4).requires_grad_(), torch.randn(keys, 4).requires_grad_()
    target = torch.full((rows,), -1) if keys < rows else None
    value = info_nce(query, key, target=target)
    dq, dk = torch.autograd.grad(value, [query, key])
    assert value.item() == 0 and not dq.any() and not dk.any()


@pytest.mark.interpret
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("symmetric", [True, False])
def test_interpreted_float16_keeps_small_weights(symmetric: bool) -> None:
    """A gradient of 1e-6 from above, as of a mean over a million rows, comes out as 1e-6 times the plain one."""
    query, key = (unit(33, 8, torch.float16, seed).requires_grad_() for seed in (1, 2))
    value = info_nce(query, key, scale=5.0, symmetric=symmetric, label_smoothing=0.1)
    plain = torch.autograd.grad(value, [query, key], retain_graph=True)
    small = torch.autograd.grad(value, [query, key], torch.tensor(2.0**-9), retain_graph=True)
    for a, b in zip(plain, small, strict=True):
        torch.testing.assert_close(a.float() * 2.0**-9, b.float(), rtol=2e-2, atol=1e-6)
