"""The Triton kernels of the experts: in the interpreter, compiled ahead of time, and on a GPU.

In the interpreter the contract tests run on them as well (conftest.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from routing_aot import DTYPES, compiled
from routing_providers import use_reference, use_triton
from test_experts_kernel import given, gradients, wide
from torch import Tensor

from aot import check_resources, launches_of
from gpu import assert_captured
from mmrec_kernels.routing import SharedExpert, autograd, mixture_of_experts
from numerics import errors
from poison import poison_new_memory

triton = pytest.importorskip("triton")

# Products are of activated rows rounded to the dtype; the interpreter's bfloat16 stores truncate.
LIMIT = {
    torch.float64: 1e-12, torch.float32: 5e-6, torch.float16: 4e-3,
    torch.bfloat16: 4 * torch.finfo(torch.bfloat16).eps,
}  # fmt: skip


def check(arguments: dict[str, Any], patch: pytest.MonkeyPatch, limit: float, runs: int = 1) -> None:
    """Results and gradients beside the reference in float64; in all runs the same bits."""
    found, *others = ([*mixture_of_experts(**arguments), *gradients(arguments)] for _ in range(runs))
    for again in others:
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    use_reference(patch)
    arguments = wide(on("cpu", arguments))
    exact = [*mixture_of_experts(**arguments), *gradients(arguments)]
    for one, other in zip(found, exact, strict=True):
        assert max(errors(one.cpu(), other)) <= limit, one.shape


def on(device: str, arguments: dict[str, Any]) -> dict[str, Any]:
    def there(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device)
        if isinstance(value, SharedExpert):
            return SharedExpert(*map(there, value))
        if isinstance(value, list):
            return [type(r)(weights=r.weights.to(device), experts=r.experts.to(device)) for r in value]
        return value

    return {name: there(value) for name, value in arguments.items()}


# Tokens, width, hidden width, experts, k, gates, activation: several tiles of pairs, columns and experts.
EXACT = [
    (60, 20, 35, 3, 2, 1, "swiglu"), (50, 20, 35, 3, 2, 3, "geglu"), (20, 33, 18, 17, 3, 1, "gelu"),
    (60, 16, 16, 1, 1, 2, "relu2"), (30, 7, 50, 4, 4, 1, "silu"),
]  # fmt: skip


@pytest.mark.interpret
@pytest.mark.parametrize("kept, kernels", [(False, "one"), (True, "two")])
@pytest.mark.parametrize("tokens, width, hidden, experts, k, gates, activation", EXACT)
def test_interpreted_experts_are_exact(
    tokens: int, width: int, hidden: int, experts: int, k: int, gates: int, activation: str, kept: bool, kernels: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """In float64, by the kernel of narrow tokens and by those of wide ones. New memory holds NaN."""
    from mmrec_kernels.routing.triton import experts_pass

    use_triton(monkeypatch)
    monkeypatch.setattr(autograd, "SAVE_HIDDEN_WIDTH", 1 if kept else 10**9)
    if kernels == "two":
        monkeypatch.setitem(experts_pass.NETWORK_WIDTH, torch.float64, 0)
    with monkeypatch.context() as patch:
        poison_new_memory(patch)
        check(given(tokens, width, hidden, experts, k, torch.float64, activation, gates), patch, LIMIT[torch.float64])


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernels", ["one", "two"])
@pytest.mark.parametrize("gates", [1, 2])
def test_interpreted_experts_match_the_oracle(
    gates: int, kernels: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mmrec_kernels.routing.triton import experts_pass

    use_triton(monkeypatch)
    if kernels == "two":
        monkeypatch.setitem(experts_pass.NETWORK_WIDTH, dtype, 0)
    check(given(40, 20, 20, 3, 2, dtype, "swiglu", gates), monkeypatch, LIMIT[dtype], runs=2 if kernels == "one" else 1)


@pytest.mark.interpret
@pytest.mark.parametrize("tokens, width, hidden", [(0, 4, 4), (3, 0, 4), (3, 4, 0), (1, 1, 1)])
def test_interpreted_experts_take_empty_sizes(
    tokens: int, width: int, hidden: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_triton(monkeypatch)
    check(given(tokens, width, hidden, 3, 2, torch.float64), monkeypatch, 1e-12)


@pytest.mark.interpret
@pytest.mark.parametrize("activation", ["relu", "relu2"])
def test_interpreted_hidden_rows_beyond_float16_are_as_if_recomputed(
    activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kept in float16 they are −∞, and what is active above 0 alone has the slope 0 there."""
    use_triton(monkeypatch)
    arguments = {**given(20, 8, 6, 2, 1, torch.float16, activation), "shared": None}
    arguments["b_in"] = torch.full_like(arguments["b_in"], -6e4)
    arguments["x"][:, 0], arguments["w_in"][:, 0, 0] = 600, -100
    found = []
    for width in (1, 10**9):
        monkeypatch.setattr(autograd, "SAVE_HIDDEN_WIDTH", width)
        found.append(gradients(arguments))
    for kept, again in zip(*found, strict=True):
        assert kept.isfinite().all() and torch.equal(kept, again)


@pytest.mark.interpret
def test_interpreted_experts_read_what_another_provider_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of `hidden` are where the schema says, by pair, and the shared expert's by token."""
    from mmrec_kernels.routing import reference_experts
    from mmrec_kernels.routing import triton as launchers

    a = given(50, 12, 20, 4, 2, torch.float64)
    use_triton(monkeypatch)
    (routing,) = a["routing"]
    tensors = (a["x"], routing.weights[None], routing.experts[None], a["w_in"], a["w_out"], a["b_in"], a["b_out"])
    both = [f(*tensors, *a["shared"], "swiglu", True) for f in (launchers.experts_forward, reference_experts.forward)]
    pairs = len({(int(e), t) for t, row in enumerate(routing.experts) for e in row if e >= 0})
    alive = (routing.experts >= 0).any(1)
    for ours, theirs, rows in zip(*both, (slice(None), slice(pairs), alive), strict=True):
        ours, theirs = (ours[0], theirs[0]) if ours.ndim == 3 else (ours, theirs)
        torch.testing.assert_close(ours[rows], theirs[rows], rtol=1e-12, atol=1e-12)
    grad, needs = torch.randn(1, 50, 12, dtype=torch.float64), 2**9 - 1
    backward = [
        f(grad, *tensors, *a["shared"], *both[1 - n][1:], "swiglu", needs)
        for n, f in enumerate((launchers.experts_backward, reference_experts.backward))
    ]
    for one, other in zip(*backward, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


# Kernel, kind of its sizes, dtype, width of the tokens, gates: those that take another configuration.
TABLE = [
    ("network", "bf16", 64, 1), ("network", "bf16", 128, 1), ("network", "fp16", 16, 1), ("network", "fp32", 64, 1),
    ("up", "bf16", 512, 1), ("up", "fp32", 512, 1), ("rows", "bf16", 512, 1), ("rows", "fp32", 64, 1),
    ("hidden_gradient", "bf16", 64, 1), ("hidden_gradient", "bf16", 256, 2), ("hidden_gradient", "fp32", 256, 1),
    ("outer", "bf16", 64, 1), ("outer", "bf16", 64, 2), ("outer", "fp32", 256, 1),
]  # fmt: skip
ROWS = ("x", "w_in", "w_out", "b_in", "b_out", "hidden", "activated", "grad", "dh", "left", "right", "rows", "w", "b")


@pytest.mark.parametrize("capability", (80, 90))
@pytest.mark.parametrize(("name", "dtype", "width", "gates"), TABLE, ids=str)
def test_compiled_ahead_of_time_within_limits(name: str, dtype: str, width: int, gates: int, capability: int) -> None:
    """Many pairs, SwiGLU, nothing spilt; hidden rows are kept or read from width 256 on. Of `outer`, gates 2: dy on
    the left."""
    import triton.language as tl

    from mmrec_kernels.routing.triton import experts_backward_kernels, experts_kernels
    from mmrec_kernels.routing.triton.plan import block_sizes

    kernels = experts_backward_kernels if name in ("hidden_gradient", "outer") else experts_kernels
    kernel = getattr(kernels, f"{name}_kernel")
    kind = {"hidden_gradient": "hidden"}.get(name, name)
    constants: dict[str, Any] = {
        "ACTIVATION": "silu", "GATED": True, "BY_TOKEN": False, "SCALED": gates > 1, "BLOCK_E": 16,
        "PRECISION": "ieee", "UPCAST": False, "WIDE": tl.float32, "b_in_ptr": None, "b_out_ptr": None, "b_ptr": None,
        "bias_ptr": None, **block_sizes(kind, 1000, width, DTYPES[dtype]),
    }  # fmt: skip
    if width < 256:
        constants["hidden_ptr"] = None
    if name == "outer" and gates > 1:
        constants["left_ptr"] = None
    used, warps = compiled(kernel, ROWS, dtype, constants, capability)
    check_resources(used, warps)
    if dtype != "fp32":
        assert ("wgmma" if capability == 90 and constants["BLOCK_M"] >= 64 else "mma") in used.ptx


SMALL = {
    "count": ("plan_kernels", {"HAS_SHARED": True}),
    "place": ("plan_kernels", {"HAS_SHARED": True}),
    "shared_gate": ("plan_kernels", {"BLOCK_T": 32, "BLOCK_D": 32}),
    "combine": ("experts_kernels", {"BLOCK_T": 32, "BLOCK_D": 64}),
    "coefficient_gradient": ("experts_backward_kernels", {"y_ptr": None, "BLOCK_M": 64, "BLOCK_D": 64}),
    "token_sum": ("experts_backward_kernels", {"BLOCK_T": 32, "BLOCK_D": 64}),
    "weighted_sum": ("experts_backward_kernels", {"BLOCK_T": 32, "BLOCK_D": 64}),
}


@pytest.mark.parametrize("capability", (80, 90))
@pytest.mark.parametrize("name", SMALL)
def test_small_kernels_compiled_ahead_of_time(name: str, capability: int) -> None:
    import importlib

    import triton.language as tl

    module, constants = SMALL[name]
    kernel = getattr(importlib.import_module(f"mmrec_kernels.routing.triton.{module}"), f"{name}_kernel")
    constants = {"BLOCK_T": 64, "BLOCK_E": 16, "WIDE": tl.float32, **constants}
    check_resources(*compiled(kernel, ("x", "gate", "grad", "out"), "bf16", constants, capability))


def test_launches_compiled_ahead_of_time() -> None:
    """Every kernel, as the launchers ask for it, in every dtype and with sizes of one, which the compiler folds; and
    batches of other numbers of tokens, which need no kernel of their own."""
    told = launches_of(Path(__file__).parent)
    assert set(told["everything"]) == {
        "route_kernel", "finish_kernel", "slopes_kernel", "route_backward_kernel", "token_gradient_kernel",
        "gate_sums_kernel", "shared_gate_kernel", "count_kernel", "place_kernel", "network_kernel", "up_kernel",
        "rows_kernel", "combine_kernel", "hidden_gradient_kernel", "coefficient_gradient_kernel", "outer_kernel",
        "token_sum_kernel", "weighted_sum_kernel",
    }  # fmt: skip
    assert told["ragged"] == {}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("gates", [1, 2])
@pytest.mark.parametrize("tokens, width, hidden", [(3000, 64, 128), (900, 200, 300), (500, 520, 96), (5, 64, 64)])
def test_gpu_experts_match_the_oracle(
    tokens: int, width: int, hidden: int, gates: int, kept: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autograd, "SAVE_HIDDEN_WIDTH", 1 if kept else 10**9)
    arguments = on("cuda", given(tokens, width, hidden, 6, 2, dtype, "swiglu", gates))
    check(arguments, monkeypatch, LIMIT[dtype] if dtype != torch.float32 else 2e-5, runs=2)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [64, 512])
def test_gpu_experts_are_captured_in_a_graph(width: int) -> None:
    arguments = on("cuda", given(700, width, 96, 6, 2, torch.bfloat16))
    assert_captured(lambda: (*mixture_of_experts(**arguments), *gradients(arguments)))
