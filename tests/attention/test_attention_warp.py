"""The CUDA C++ forward for tiny sequences: on the host, lane by lane; as nvcc compiles it; and on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_oracle import CASES, EVERYTHING, FLAGS, Case, oracle
from emulated_warp_forward import build
from mmrec_kernels.benchmarks import attention as benchmark

from emulated import HERE, compiled_usage
from mmrec_kernels import library, schemas
from mmrec_kernels.attention import cross_modal_attention
from numerics import FLOORS, errors
from providers import serve_gpu_code

DTYPES = (torch.bfloat16, torch.float16)
MORE = {
    "two tiles of rows": lambda **k: Case([[20, 3, 0], [9, 0, 0]], [13, 2, 9], extras=EVERYTHING, **k),
    "two tiles of rows, causal": lambda **k: Case([[40, 7], [3, 20]], [40, 7], heads=2, causal=(0, 1), **k),
    "every segment there may be": lambda **k: Case([[3, 0]] * 8, [2, 3], extras=EVERYTHING, indexed=(1, 7), **k),
    "rows around, everything": lambda **k: Case(
        [[3, 0, 2], [2, 4, 0]], [2, 3, 1], indexed=(1,), causal=(0,), extras=EVERYTHING, around=3, **k
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    return build(tmp_path_factory.mktemp("emulated"))


@pytest.fixture
def served(emulated: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on the public function's forward is the emulated kernel."""
    serve_gpu_code(monkeypatch, {schemas.attention_forward: emulated})


def narrow(case: Case, dtype: torch.dtype) -> Case:
    """Rows in `dtype`; what the kernel takes as float32 keeps its digits."""
    rows = ("query", "key0", "value0")
    case.leaves = {
        n: x.to(dtype) if n in rows or n[:-1] in ("key", "value") else x.float() for n, x in case.leaves.items()
    }
    return case


def check(case: Case, dtype: torch.dtype, **more: Any) -> None:
    narrow(case, dtype)
    exact = case.call(oracle, {n: x.double() for n, x in case.leaves.items()}, **more)
    eager = case.call(oracle, {n: x.to(dtype) for n, x in case.leaves.items()}, **more)
    check_results(case.call(cross_modal_attention, **FLAGS, **more), exact, eager, dtype)


def check_results(ours: Any, exact: Any, eager: Any, dtype: torch.dtype) -> None:
    for name, x, right, theirs in zip(("out", "lse", "mass"), ours, exact, eager, strict=True):
        assert torch.equal(x.isfinite(), right.isfinite()), name
        x, right, theirs = (torch.where(right.isfinite(), y.double(), 0) for y in (x, right, theirs))
        for got, allowed in zip(errors(x, right), errors(theirs, right), strict=True):
            assert got <= 2 * allowed + FLOORS[dtype], (name, got, allowed)


@HERE
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*CASES, *MORE])
def test_emulated_kernel_matches_the_oracle(name: str, dtype: torch.dtype, served: None) -> None:
    check((CASES | MORE)[name](width=16, value_width=16), dtype)


@HERE
@pytest.mark.parametrize("width", [16, 32, 64, 128])
def test_emulated_kernel_takes_every_width(width: int, served: None) -> None:
    check(Case([[20, 3, 0], [9, 0, 0]], [5, 2, 9], width=width, value_width=width, extras=EVERYTHING), torch.bfloat16)


@HERE
def test_emulated_kernel_gives_the_same_bits_twice_and_whatever_else_is_asked_for(served: None) -> None:
    case = narrow(MORE["rows around, everything"](width=32, value_width=32), torch.bfloat16)
    first, again = (case.call(cross_modal_attention, **FLAGS) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert torch.equal(case.call(cross_modal_attention), first[0])


@HERE
@pytest.mark.parametrize("size", [1e4, -1e4, 1e30])
def test_emulated_kernel_keeps_the_softmax_beside_large_biases(size: float, served: None) -> None:
    case = narrow(Case([[5, 3], [4, 2]], [2, 3], width=16, value_width=16, extras=("log_bias",)), torch.bfloat16)
    plain = case.call(cross_modal_attention, {**case.leaves, "log_bias": torch.zeros_like(case.leaves["log_bias"])})
    biased = case.call(cross_modal_attention, {**case.leaves, "log_bias": torch.full((2, 1, 2), size)})
    torch.testing.assert_close(biased, plain)


@HERE
def test_emulated_kernel_never_reads_what_is_not_referenced(served: None) -> None:
    """Rows around, rows that no index names, and a modality that a bias of -inf removes hold NaN."""
    case = narrow(
        Case([[3, 2], [2, 2], [4, 1]], [2, 1], width=16, value_width=16, indexed=(1,), around=2), torch.bfloat16
    )
    bias = torch.zeros(2, 1, 3)
    bias[:, :, 2] = -torch.inf
    x = {**case.leaves, "log_bias": bias}
    expected = case.call(cross_modal_attention, x, **FLAGS)
    for m, (offsets, index, _) in enumerate(case.plan):
        unread = torch.ones(len(x[f"key{m}"]), dtype=torch.bool)
        if m < 2:
            used = torch.arange(int(offsets[0]), int(offsets[-1]))
            used = used if index is None else index[used]
            unread[used[used >= 0]] = False
        for kind in ("key", "value"):
            x[f"{kind}{m}"] = x[f"{kind}{m}"].masked_fill(unread[:, None, None], torch.nan)
    found = case.call(cross_modal_attention, x, **FLAGS)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert found.out[2:-2].isfinite().all()


@HERE
def test_the_benchmark_times_it(emulated: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schemas, "attention_forward_warp", emulated)
    case = benchmark.case(benchmark.SHAPES["small"][2], "bfloat16", "cpu", "forward")
    given = case.inputs()
    call = benchmark._ours_by_warp(given, "forward")
    assert case.judge(given)(call())["max"] < 1e-2
    assert library.call.__name__ == "call"  # what serves is in its place again


def test_compiled_kernels_do_not_spill() -> None:
    found = compiled_usage("warp_forward_kernel")
    assert len(found) == 2 * 2 * 4
    for key, used in found.items():
        assert used["STACK"] == 0 and used["SHARED"] == 0 and used["REG"] <= 200, (key, used)


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [16, 32, 64, 128])
@pytest.mark.parametrize("name", [*CASES, *MORE])
def test_gpu_kernel_matches_the_oracle(
    name: str, width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = narrow((CASES | MORE)[name](width=width, value_width=width), dtype)
    exact = case.call(oracle, {n: x.double() for n, x in case.leaves.items()})
    eager = case.call(oracle, {n: x.to(dtype) for n, x in case.leaves.items()})
    case.plan = [(o.cuda(), None if i is None else i.cuda(), c) for o, i, c in case.plan]
    case.query_offsets = None if case.query_offsets is None else case.query_offsets.cuda()
    monkeypatch.setattr(library, "call", lambda op, *args: schemas.attention_forward_warp(*args))
    there = {n: x.cuda() for n, x in case.leaves.items()}
    ours, again = (case.call(cross_modal_attention, there, **FLAGS) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    check_results([x.cpu() for x in ours], exact, eager, dtype)
