"""The Triton kernels of routing: in the interpreter, compiled ahead of time, and on a GPU.

In the interpreter the contract tests run on them as well (conftest.py).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from routing_aot import DTYPES, compiled
from routing_providers import use_reference, use_triton
from test_routing_kernel import everything, inputs

from aot import check_resources
from gpu import assert_captured
from mmrec_kernels.routing import route
from mmrec_kernels.routing.router import SCORES
from numerics import errors
from poison import poison_new_memory

triton = pytest.importorskip("triton")

# float64 is exact; the interpreter's bfloat16 stores truncate, which is one unit in the last place.
LIMIT = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-6, torch.bfloat16: 2e-6}
STORED = {torch.float16: 1e-3, torch.bfloat16: torch.finfo(torch.bfloat16).eps}


def check_router(tokens: int, width: int, experts: int, k: int, dtype: torch.dtype, score: str, patch: Any) -> None:
    """All results and gradients beside the reference in float64; twice the same bits."""
    x, gate, options = inputs(tokens, width, experts, dtype)
    if score == "topk_softmax":
        del options["bias"]
    wide = {n: v.double() if v.is_floating_point() else v for n, v in options.items()}
    found, again = (everything(x, gate, k, **options, score=score) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    use_reference(patch)
    exact = everything(x.double(), gate.double(), k, **wide, score=score)
    assert torch.equal(found[0], exact[0])
    for n, (one, other) in enumerate(zip(found[1:], exact[1:], strict=True)):
        stored = STORED.get(dtype, 0.0) if n > 2 else 0.0  # dx and dgate, in the dtype of theirs
        assert max(errors(one, other)) <= (10 if n > 2 else 1) * LIMIT[dtype] + stored


EXACT = [(*sizes, score, torch.float64) for score in SCORES for sizes in
         ((130, 20, 5, 2), (90, 40, 17, 3), (33, 7, 64, 64), (40, 9, 1, 1))]  # fmt: skip
ROUNDED = [(60, 20, 5, 2, score, dtype) for score in SCORES for dtype in (torch.float32, torch.float16, torch.bfloat16)]


@pytest.mark.interpret
@pytest.mark.parametrize("tokens, width, experts, k, score, dtype", EXACT + ROUNDED, ids=str)
def test_interpreted_router_matches_the_oracle(
    tokens: int, width: int, experts: int, k: int, score: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_triton(monkeypatch)
    with monkeypatch.context() as patch:
        poison_new_memory(patch)
        check_router(tokens, width, experts, k, dtype, score, patch)


@pytest.mark.interpret
def test_interpreted_router_takes_a_gate_of_float32_beside_narrow_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    x, gate, options = inputs(70, 24, 6, torch.bfloat16)
    gate = gate.float() + 1e-4  # digits that bfloat16 has not
    use_triton(monkeypatch)
    found = everything(x, gate, 2, **options)
    use_reference(monkeypatch)
    exact = everything(x.double(), gate.double(), 2, **{**options, "bias": options["bias"].double()})
    assert torch.equal(found[0], exact[0]) and max(errors(found[1], exact[1])) <= 2e-6
    assert max(errors(found[5], exact[5])) <= 2e-5


@pytest.mark.interpret
def test_interpreted_router_without_modalities_routes_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    use_triton(monkeypatch)
    poison_new_memory(monkeypatch)
    none = torch.zeros(0, 4, dtype=torch.bool)
    found = route(torch.randn(5, 3), torch.randn(4, 3), 2, modality=torch.full((5,), -1), allowed=none)
    assert (found.experts == -1).all() and (found.weights == 0).all() and found.stats.shape == (0, 4, 3)


@pytest.mark.interpret
def test_interpreted_router_leaves_many_experts_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    x, gate, options = inputs(5, 4, 300, torch.float64)
    with monkeypatch.context() as patch:
        use_reference(patch)
        exact = everything(x, gate, 2, **options)
    use_triton(monkeypatch)
    assert all(torch.equal(a, b) for a, b in zip(everything(x, gate, 2, **options), exact, strict=True))


# Kernel, kind of its sizes, dtype and experts: those that take another configuration.
ROUTER_TABLE = [
    *((name, "rows", *more) for name in ("route", "route_backward")
      for more in (("bf16", 8), ("bf16", 64), ("fp32", 16), ("fp32", 256))),
    *((name, "products", *more) for name in ("token_gradient", "gate_sums") for more in (("bf16", 8), ("fp32", 64))),
    ("route", "rows", "fp16", 128), ("route", "rows", "bf16", 256),
]  # fmt: skip
# Rows of 256 experts and all that is made of them do not fit the registers; of 16 in float32 a few words do not.
ROUTER_SPILLS = {
    ("route", "fp32", 256): 192, ("route", "bf16", 256): 176, ("route_backward", "fp32", 256): 32,
    ("route", "fp32", 16): 8, ("route_backward", "fp32", 16): 24,
}  # fmt: skip


@pytest.mark.parametrize("capability", (80, 90))
@pytest.mark.parametrize(("name", "kind", "dtype", "experts"), ROUTER_TABLE, ids=str)
def test_router_compiled_ahead_of_time_within_limits(
    name: str, kind: str, dtype: str, experts: int, capability: int
) -> None:
    import triton.language as tl

    from mmrec_kernels.routing.triton import router_kernels
    from mmrec_kernels.routing.triton.router_pass import block_sizes

    constants = {"SCORE": "sigmoid" if experts == 64 else "softmax", "DIVIDES": experts == 64, "BLOCK_K": 2,
                 "MIXED": False, "UPCAST": False, "WIDE": tl.float32,
                 **block_sizes(kind, experts, 256, DTYPES[dtype])}  # fmt: skip
    kernel = getattr(router_kernels, f"{name}_kernel")
    used = compiled(kernel, ("x", "gate", "dx"), dtype, constants, capability)
    check_resources(*used, spill=ROUTER_SPILLS.get((name, dtype, experts), 0))


@pytest.mark.parametrize("capability", (80, 90))
@pytest.mark.parametrize("name", ["finish", "slopes"])
def test_small_router_kernels_compiled_ahead_of_time(name: str, capability: int) -> None:
    from mmrec_kernels.routing.triton import router_kernels

    kernel = getattr(router_kernels, f"{name}_kernel")
    check_resources(*compiled(kernel, (), "fp32", {"BLOCK_P": 64, "BLOCK_E": 16}, capability))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("tokens, width, experts, k", [(5000, 64, 16, 2), (700, 300, 8, 8), (300, 40, 200, 3)])
def test_gpu_router_matches_the_oracle(
    tokens: int, width: int, experts: int, k: int, score: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, gate, options = inputs(tokens, width, experts, dtype)
    found, again = (
        everything(x.cuda(), gate.cuda(), k, **{n: v.cuda() for n, v in options.items()}, score=score) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    use_reference(monkeypatch)
    exact = everything(x.double(), gate.double(), k, **{**options, "bias": options["bias"].double()}, score=score)
    agree = (found[0].cpu() == exact[0]).all(1)  # where two scores are as near as float32 sees, ids may differ
    assert float(agree.double().mean()) > 0.99
    assert max(errors(found[1].cpu()[agree], exact[1][agree])) <= 5e-6
    if bool(agree.all()):
        for n, (one, other) in enumerate(zip(found[2:], exact[2:], strict=True)):
            limit = (1e-5 + STORED.get(dtype, 0.0)) if n > 1 else 5e-6
            assert max(errors(one.cpu(), other)) <= limit


@pytest.mark.gpu
def test_gpu_router_is_captured_in_a_graph() -> None:
    x, gate, options = inputs(3000, 64, 16, torch.bfloat16)
    x, gate = x.cuda(), gate.cuda()
    options = {n: v.cuda() for n, v in options.items()}
    assert_captured(lambda: everything(x, gate, 2, **options))


@pytest.mark.gpu
def test_gpu_router_takes_an_id_out_of_range_as_absent() -> None:
    x, gate, options = inputs(50, 16, 4, torch.float32)
    modality = options["modality"].clone()
    modality[3], modality[7] = 99, -5
    found = route(x.cuda(), gate.cuda(), 2, modality=modality.cuda(), num_modalities=3)
    assert (found.experts[[3, 7]] == -1).all()
