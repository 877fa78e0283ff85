"""The CUDA C++ router for few tokens: on the host, a warp at a time; compiled; and on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from emulated_small_route import build
from mmrec_kernels.benchmarks import router as benchmark
from routing_providers import use_reference
from test_routing_kernel import inputs
from torch import Tensor

from emulated import HERE, compiled_usage
from mmrec_kernels import library, schemas
from mmrec_kernels.routing import route
from mmrec_kernels.routing.router import SCORES
from numerics import errors

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., tuple[Tensor, ...]]]:
    yield build(tmp_path_factory.mktemp("emulated"))


def exact(x: Tensor, gate: Tensor, k: int, options: dict[str, Any], patch: pytest.MonkeyPatch) -> Any:
    wide = {n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in options.items()}
    with patch.context() as patched:
        use_reference(patched)
        return route(x.double(), gate.double(), k, **wide)


def check_plan(ids: Tensor, experts: int, starts: Tensor, tokens: Tensor, pair_of: Tensor) -> None:
    """Pairs are by expert, then by token, and each slot knows its own."""
    pairs = sorted((e, t) for t, row in enumerate(ids.tolist()) for e in row if e >= 0)
    assert [int(starts[e]) for e in range(experts + 1)] == [sum(p[0] < e for p in pairs) for e in range(experts + 1)]
    assert tokens[: len(pairs)].tolist() == [t for _, t in pairs]
    place = {pair: n for n, pair in enumerate(pairs)}
    assert pair_of.tolist() == [[place.get((e, t), -1) for e in row] for t, row in enumerate(ids.tolist())]


def check(found: tuple[Tensor, ...], oracle: Any, experts: int, limit: float) -> None:
    weights, ids, stats, losses, *plan = (t.cpu() for t in found)
    agree = (ids == oracle.experts).all(1)  # where two scores are as near as float32 sees, ids may differ
    assert float(agree.double().mean() if len(agree) else 1) > 0.99
    assert max(errors(weights[agree], oracle.weights[agree])) <= limit
    if bool(agree.all()):
        assert max(errors(stats, oracle.stats)) <= limit
        assert max(errors(losses, torch.stack(list(oracle.losses)))) <= limit
    check_plan(ids, experts, *plan)


@HERE
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(
    "tokens, width, experts, k",
    [
        (1, 8, 1, 1),
        (63, 31, 3, 2),
        (130, 64, 8, 8),
        (97, 40, 17, 3),
        (40, 24, 64, 64),
        (300, 16, 33, 2),
        (50, 7, 16, 20),
    ],
)
def test_emulated_kernel_matches_the_oracle(
    tokens: int, width: int, experts: int, k: int, score: str, dtype: torch.dtype,
    emulated: Callable[..., Any], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    x, gate, options = inputs(tokens, width, experts, dtype)
    if k % 2:
        del options["bias"]
    bias = options.get("bias")
    oracle = exact(x, gate, k, {**options, "score": score, "num_modalities": 3}, monkeypatch)
    found = emulated(
        x, gate, options["modality"], options["allowed"], None if bias is None else bias.float(), options["valid"], k,
        3, score, k > 1,
    )  # fmt: skip
    check(found, oracle, experts, 2e-6)


@HERE
def test_emulated_kernel_without_options_and_with_a_float32_gate(
    emulated: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, gate, _ = inputs(70, 48, 12, torch.bfloat16)
    gate = gate.float() + 1e-4
    oracle = exact(x, gate, 3, {"renormalize": False}, monkeypatch)
    check(emulated(x, gate, None, None, None, None, 3, 1, "softmax", False), oracle, 12, 2e-6)
    rows = torch.randn(70, 3, 48).bfloat16()[:, 1]  # rows apart, at addresses that 16 divides
    oracle = exact(rows, gate, 3, {"renormalize": True}, monkeypatch)
    check(emulated(rows, gate, None, None, None, None, 3, 1, "softmax", True), oracle, 12, 2e-6)


@HERE
def test_emulated_kernel_reads_neither_absent_tokens_nor_unusable_experts(emulated: Callable[..., Any]) -> None:
    x, gate, options = inputs(90, 16, 9, torch.float32)
    allowed = options["allowed"].clone()
    allowed[:, 4] = False
    dead = (options["modality"] < 0) | ~options["valid"]
    rest = (options["modality"], allowed, None, options["valid"], 2, 3, "softmax", True)
    clean = emulated(x, gate, *rest)
    x[dead], gate[4] = torch.nan, torch.nan
    assert all(torch.equal(a, b) for a, b in zip(emulated(x, gate, *rest), clean, strict=True))
    assert (clean[1][dead] == -1).all() and (clean[0][dead] == 0).all() and not (clean[1] == 4).any()


@HERE
def test_emulated_kernel_gives_a_nan_to_its_token_alone(emulated: Callable[..., Any]) -> None:
    x, gate, options = inputs(64, 16, 8, torch.float32)
    rest = (options["modality"], options["allowed"], None, None, 2, 3, "softmax", True)
    clean = emulated(x, gate, *rest)
    token = int((options["modality"] == 0).nonzero()[5, 0])
    x[token, 3] = torch.nan
    found = emulated(x, gate, *rest)
    others = torch.arange(64) != token
    assert torch.equal(found[0][others], clean[0][others]) and torch.equal(found[1][others], clean[1][others])
    used = found[1][token] >= 0
    assert found[0][token][used].isnan().all() and len(set(found[1][token].tolist())) == 2
    assert found[3][:3, 0].isnan().all() and torch.equal(found[3][:, 1:], clean[3][:, 1:])


@HERE
def test_emulated_ties_go_to_the_lower_expert(emulated: Callable[..., Any]) -> None:
    x, gate = torch.ones(33, 8), torch.ones(40, 8)
    weights, ids, *_ = emulated(x, gate, None, None, None, None, 5, 1, "softmax", True)
    assert torch.equal(ids, torch.arange(5).int().expand(33, 5)) and torch.equal(weights, torch.full((33, 5), 0.2))


@HERE
def test_the_benchmark_times_it(emulated: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schemas, "routing_forward_small", emulated)
    case = benchmark.case({"tokens": 100, "width": 16, "experts": 5, "k": 2}, "float32", "cpu", "forward")
    given = case.inputs()
    assert case.judge(given)(benchmark.ours_in_one_launch(given, "forward")())["max"] < 1e-5
    assert library.call.__name__ == "call"  # what serves is in its place again


def test_compiled_kernels_do_not_spill() -> None:
    found = compiled_usage("small_route_kernel")
    assert len(found) == 2 * 5 * 4
    for key, used in found.items():
        assert used["STACK"] == 0 and used["SHARED"] <= 40 * 1024 and used["REG"] <= 128, (key, used)


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(
    "tokens, width, experts, k", [(4096, 256, 8, 2), (1, 64, 3, 1), (777, 100, 33, 4), (2000, 1024, 64, 6)]
)
def test_gpu_kernel_matches_the_oracle(
    tokens: int, width: int, experts: int, k: int, score: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, gate, options = inputs(tokens, width, experts, dtype)
    oracle = exact(x, gate, k, {**options, "score": score}, monkeypatch)
    modality, allowed, bias, valid = (options[n].cuda() for n in ("modality", "allowed", "bias", "valid"))
    arguments = (x.cuda(), gate.cuda(), modality, allowed, bias.float(), valid, k, 3, score, k > 1)
    found, again = (schemas.routing_forward_small(*arguments) for _ in range(2))
    used = int((found[1] >= 0).sum())
    for n, (a, b) in enumerate(zip(found, again, strict=True)):
        assert torch.equal(a[:used], b[:used]) if n == 5 else torch.equal(a, b)
    check(found, oracle, experts, 5e-6)
