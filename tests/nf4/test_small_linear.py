"""The CUDA C++ linear for few tokens: on the host, a warp at a time; compiled; and on a GPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from emulated_small_linear import build
from mmrec_kernels.benchmarks import nf4 as benchmark
from nf4_providers import use_forward
from test_nf4_kernel import assert_right, make, normal, run, surrounded
from torch import Tensor

from emulated import HERE, compiled_usage
from gpu import assert_captured, on_gpu
from mmrec_kernels import library, schemas
from mmrec_kernels.nf4 import LoRA, NF4Weight, nf4_linear, reference

DTYPES = (torch.bfloat16, torch.float16)
# Rows of W, its columns, block size, tokens, rank: one tile of tokens, two, four and eight; rows and ranks that nothing
# divides; more columns than the warps take in one round, of which the last are of some lanes only; blocks that are
# shorter than a lane's part of four, or longer than a row; both kinds of absmax (nested where the rows are odd).
CASES = [
    (50, 128, 64, 1, 8), (13, 160, 32, 9, 5), (33, 1312, 64, 8, 16), (70, 256, 4096, 17, 33), (97, 96, 64, 40, 3),
    (64, 32, 64, 64, 12), (5, 2336, 128, 30, 1),
]  # fmt: skip
Launcher = Callable[[int], Callable[..., tuple[Tensor, Tensor]]]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Launcher:
    return build(tmp_path_factory.mktemp("emulated"))


@pytest.fixture(params=[16, 32])
def served(request: pytest.FixtureRequest, emulated: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on the public function's forward is the emulated kernel, a block of so many rows of W."""
    use_forward(monkeypatch, emulated(request.param))


@HERE
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_emulated_kernel_matches_the_oracle(
    case: tuple[int, int, int, int, int], dtype: torch.dtype, served: None
) -> None:
    out, width, blocksize, tokens, rank = case
    given = make(tokens, out, width, blocksize, rank, dtype)
    assert_right(given, run(given))


@HERE
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_emulated_kernel_without_adapters_or_bias_and_with_those_of_its_dtype(dtype: torch.dtype, served: None) -> None:
    weight, x = NF4Weight.quantize(normal(40, 192).float()), normal(2, 6, 192, seed=1).to(dtype)
    bias, a, b = normal(40, seed=2), normal(16, 192, seed=3) / 14, normal(40, 16, seed=4)
    for lora, one in (
        (None, None),
        (None, bias.float()),
        (LoRA(a.to(dtype), b.to(dtype), 0.5), bias.to(dtype)),
        (LoRA(a.float(), b.float(), 2.0), None),
        (LoRA(a[:0].float(), b[:, :0].float(), 2.0), bias.to(dtype)),
    ):
        y = nf4_linear(x, weight, one, lora=lora)
        exact = x.double() @ weight.dequantize(dtype).double().T
        if lora is not None:
            exact += lora.scaling * (x.double() @ lora.a.double().T) @ lora.b.double().T
        exact += 0 if one is None else one.double()
        assert (y.double() - exact).abs().max() <= (2**-8 if dtype == torch.bfloat16 else 2**-11) * exact.abs().max()
    none = LoRA(torch.zeros(0, 4, 192), torch.zeros(0, 40, 4), 1.0)
    nobody = torch.full((2, 6), -1)
    assert torch.equal(nf4_linear(x, weight, lora=none, adapter_ids=nobody), nf4_linear(x, weight))


@HERE
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
def test_emulated_w_is_decoded_exactly(blocksize: int, nested: bool, dtype: torch.dtype, served: None) -> None:
    """Rows of the identity as tokens read W out; every code is among it."""
    weight = NF4Weight.quantize(normal(67, 448, seed=2).float(), blocksize, nested=nested)
    packed = torch.randint(256, (67, 224), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    weight = dataclasses.replace(weight, packed=packed.view_as(weight.packed))
    columns = torch.arange(64) // 2 * 14 + torch.arange(64) % 2  # both elements of a byte, of every lane
    assert len(packed[:, columns[::2] // 2].unique()) == 256
    y = nf4_linear(torch.eye(448, dtype=dtype)[columns], weight)
    assert torch.equal(y, weight.dequantize(dtype).T[columns])


@HERE
@pytest.mark.parametrize("tokens", [7, 30])
def test_bits_depend_neither_on_the_block_nor_on_the_adapters_of_others(
    tokens: int, emulated: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = make(tokens, 70, 1056, 64, 9, torch.bfloat16)
    found = []
    for rows_of_block in (16, 32):
        use_forward(monkeypatch, emulated(rows_of_block))
        found.append(run(given))
    assert all(torch.equal(p, q) for p, q in zip(*found, strict=True))
    for e in (-1, 0, 1):
        single, mine = run(given | {"ids": torch.full((tokens,), e)}), given["ids"] == e
        assert mine.any() and torch.equal(found[0][0][mine], single[0][mine])
    y = nf4_linear(given["x"], given["weight"], lora=LoRA(given["a"], given["b"]), adapter_ids=given["ids"].clamp(0))
    assert torch.equal(  # a single adapter without ids, and its own row of a stack
        y[given["ids"] <= 0],
        nf4_linear(given["x"], given["weight"], lora=LoRA(given["a"][0], given["b"][0]))[given["ids"] <= 0],
    )


@HERE
def test_emulated_damage_reaches_what_it_belongs_to_only(served: None) -> None:
    """NaN as the absmax of a block, in a row of x, in an adapter."""
    given = make(21, 30, 256, 64, 4, torch.bfloat16)
    expected = run(given)[0]
    absmax, x, a, b = (t.clone() for t in (given["weight"].absmax, given["x"], given["a"], given["b"]))
    absmax[4 * 11 + 2] = torch.nan
    row = torch.arange(30) == 11
    found = run(given | {"weight": dataclasses.replace(given["weight"], absmax=absmax)})[0]
    assert found[:, row].isnan().all() and torch.equal(found[:, ~row], expected[:, ~row])
    x[5, 77] = torch.nan
    token = torch.arange(21) == 5
    found = run(given | {"x": x})[0]
    assert found[token].isnan().all() and torch.equal(found[~token], expected[~token])
    a[1, 2, 100], b[0, 3] = torch.nan, torch.nan
    found = run(given | {"a": a, "b": b})[0]
    of_a, of_b = given["ids"] == 1, given["ids"] == 0
    assert found[of_a].isnan().all() and found[of_b][:, 3].isnan().all() and of_a.any() and of_b.any()
    assert torch.equal(found[~of_a & ~of_b], expected[~of_a & ~of_b])
    others = torch.arange(30) != 3
    assert torch.equal(found[of_b][:, others], expected[of_b][:, others])


@HERE
def test_emulated_kernel_reads_nothing_around_its_inputs(served: None) -> None:
    for tokens, case in ((3, (13, 160, 32)), (15, (20, 96, 64)), (40, (33, 352, 4096))):
        given = make(tokens, *case, 5, torch.bfloat16)
        assert all(torch.equal(p, q) for p, q in zip(run(surrounded(given)), run(given), strict=True))


@HERE
def test_an_id_outside_of_the_stack_is_none(emulated: Launcher) -> None:
    given = make(6, 20, 64, 64, 4, torch.bfloat16)
    weight, stack = given["weight"], (given["a"], given["b"], 1.0, given["scalings"])
    results = [
        emulated(16)(given["x"], *weight.tensors(), 20, 64, None, *stack, torch.tensor(ids), True)
        for ids in ([0, 3, -5, 1 << 40, 2, -(1 << 32)], [0, -1, -1, -1, 2, -1])
    ]
    assert all(torch.equal(p, q) for p, q in zip(*results, strict=True))
    assert not results[0][1][1:4].any() and results[0][1][0].all()


@HERE
def test_the_benchmark_times_it(emulated: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schemas, "nf4_forward_small", emulated(16))
    shape = benchmark.SHAPES["small"][1]
    (case,) = (c for c in benchmark.cases("small", "cpu", ["bfloat16"], ["full"], candidates=True) if c.shape == shape)
    assert sum(p.ours for p in case.providers) == 2
    given = case.inputs()
    assert case.judge(given)(benchmark.ours_by_small(given, "full")())["max"] < 1e-2
    assert library.call.__name__ == "call"  # what serves is in its place again


@pytest.mark.parametrize(("kernel", "count"), [("small_linear_kernel", 2 * 2 * 4), ("small_low_rank_kernel", 2)])
def test_compiled_kernels_do_not_spill(kernel: str, count: int) -> None:
    found = compiled_usage(kernel)
    assert len(found) == 2 * count
    assert all(used["STACK"] == 0 and used["REG"] <= 255 for used in found.values())


# ---- on a GPU --------------------------------------------------------------------------------------------------------


def small(given: dict[str, Any], save: bool = True) -> tuple[Tensor, Tensor]:
    weight = given["weight"]
    return schemas.nf4_forward_small(  # type: ignore[no-any-return]
        given["x"], *weight.tensors(), weight.shape[0], weight.blocksize, given["bias"], given["a"], given["b"], 1.0,
        given["scalings"], given["ids"], save,
    )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 8, 9, 16, 30, 64])
@pytest.mark.parametrize("size", [(896, 896, 64, 16), (77, 160, 32, 3), (4864, 896, 64, 64), (8900, 1312, 4096, 33)])
def test_gpu_kernel_matches_the_oracle(size: tuple[int, int, int, int], tokens: int, dtype: torch.dtype) -> None:
    out, width, blocksize, rank = size
    given = make(tokens, out, width, blocksize, rank, dtype)
    there = on_gpu(given)
    found, again = small(there), small(there)
    assert all(torch.equal(p, q) for p, q in zip(found, again, strict=True))
    assert_right(given, [found[0].cpu()])
    wide = {n: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in given.items()}
    _, low = reference.forward(
        wide["x"], *given["weight"].tensors(), out, blocksize, wide["bias"], wide["a"], wide["b"], 1.0,
        wide["scalings"], given["ids"], True,
    )  # fmt: skip
    assert (found[1].cpu() - low).abs().max() <= 1e-5 * low.abs().max()


@pytest.mark.gpu
def test_gpu_w_is_decoded_exactly() -> None:
    weight = NF4Weight.quantize(normal(9000, 448, seed=2).float())
    x = torch.eye(448, dtype=torch.bfloat16, device="cuda")
    y = torch.cat(
        [
            schemas.nf4_forward_small(
                part.contiguous(), *weight.to("cuda").tensors(), 9000, 64, None, None, None, 1.0, None, None, False
            )[0]
            for part in x.split(64)
        ]
    )
    assert torch.equal(y.cpu(), weight.dequantize(torch.bfloat16).T)


@pytest.mark.gpu
def test_gpu_kernel_takes_what_its_callers_have() -> None:
    """Adapters of the dtype of x, a float32 bias, one adapter without ids, ids outside, nothing to keep."""
    given = make(12, 896, 896, 64, 16, torch.bfloat16)
    single = given | {"a": given["a"][:1].bfloat16(), "b": given["b"][:1].bfloat16(), "ids": torch.zeros(12).long()}
    single |= {"scalings": torch.ones(1), "bias": given["bias"].float()}
    there = on_gpu(single)
    found = small(there | {"ids": None, "scalings": None}, save=False)
    assert found[1].numel() == 0 and torch.equal(found[0], small(there)[0])
    assert_right(single | {"a": single["a"].float(), "b": single["b"].float()}, [found[0].cpu()])
    wild = torch.where(given["ids"] < 0, torch.tensor(1 << 40), given["ids"])
    assert torch.equal(small(on_gpu(given | {"ids": wild}))[0], small(on_gpu(given))[0])


@pytest.mark.gpu
def test_gpu_kernel_waits_for_what_it_reads_and_a_graph_takes_it() -> None:
    """Its second launch begins before its first has ended: not before x is there, and it reads x aᵀ after that is."""
    given = on_gpu(make(16, 8192, 2048, 64, 16, torch.bfloat16))
    expected = small(given)
    late = given | {"x": given["x"].clone()}
    for _ in range(20):
        late["x"].fill_(torch.nan)
        torch.cuda._sleep(1_000_000)
        late["x"].copy_(given["x"])
        found = small(late)
        assert all(torch.equal(p, q) for p, q in zip(found, expected, strict=True))
        for used in found:  # whoever reads the memory of the next ones too early
            used.fill_(torch.nan)
        del found
    assert_captured(lambda: small(given))
