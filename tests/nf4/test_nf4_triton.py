"""The Triton kernels of the NF4 linear: in the interpreter, compiled ahead of time, and on a GPU.

In the interpreter the contract tests run on them as well (conftest.py).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from nf4_providers import use_triton
from test_nf4_kernel import assert_right, make, normal, run

from gpu import assert_captured, on_gpu
from mmrec_kernels.nf4 import NF4Weight, nf4_linear
from poison import poison_new_memory

triton = pytest.importorskip("triton")

# Rows of W, its columns, block size, tokens, rank: several tiles of each; blocks shorter and longer than a tile; rows
# that begin inside a byte (45 columns), columns that groups of 32 do not divide (200), ranks of several tiles.
CASES = [
    (50, 128, 64, 37, 8), (13, 160, 32, 20, 5), (70, 200, 64, 5, 33), (33, 96, 4096, 17, 3), (49, 45, 64, 18, 7),
    (7, 64, 128, 1, 1),
]  # fmt: skip
DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_interpreted_passes_match_the_oracle(
    case: tuple[int, int, int, int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, width, blocksize, tokens, rank = case
    use_triton(monkeypatch)
    given = make(tokens, out, width, blocksize, rank, dtype)
    with monkeypatch.context() as patch:
        poison_new_memory(patch)
        found = run(given)
    assert_right(given, found)


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("out", "width", "blocksize"), [(35, 192, 64), (9, 45, 64), (20, 96, 32)])
def test_interpreted_w_is_decoded_exactly(
    out: int, width: int, blocksize: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of the identity as tokens, and as gradients, read W out, and so does `dequantize`."""
    weight = NF4Weight.quantize(normal(out, width, seed=2).float(), blocksize)
    decoded = weight.dequantize(dtype)
    use_triton(monkeypatch)
    assert torch.equal(weight.dequantize(dtype), decoded)
    x = torch.eye(width, dtype=dtype).requires_grad_()
    y = nf4_linear(x, weight)
    assert torch.equal(y, decoded.T)
    y.backward(torch.eye(width, out, dtype=dtype))
    assert x.grad is not None and torch.equal(x.grad[:out], decoded[:width])


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_interpreted_damage_reaches_its_row_only(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN as the absmax of one block: y of its row, and dx of its columns."""
    use_triton(monkeypatch)
    given = make(18, 30, 128, 64, 4, dtype)
    absmax = given["weight"].absmax.clone()
    expected = run(given)
    absmax[2 * 11 + 1] = torch.nan
    found = run(given | {"weight": dataclasses.replace(given["weight"], absmax=absmax)})
    rows, columns = torch.arange(30) == 11, torch.arange(128) >= 64
    assert found[0][:, rows].isnan().all() and torch.equal(found[0][:, ~rows], expected[0][:, ~rows])
    assert found[1][:, columns].isnan().all() and torch.equal(found[1][:, ~columns], expected[1][:, ~columns])
    assert all(torch.equal(p, q) for p, q in zip(found[2:], expected[2:], strict=True))


# Kernel, dtype, tokens, rank, forward: those that take another configuration.
TABLE = [
    *(("linear", "bf16", tokens, 16, forward) for tokens in (8, 32, 64, 1024) for forward in (True, False)),
    ("linear", "fp16", 256, 64, True), ("linear", "fp32", 16, 16, True), ("linear", "fp32", 256, 16, False),
    *((name, dtype, 256, rank, True) for name in ("low_rank", "adapter_gradient") for dtype in ("bf16", "fp32")
      for rank in (16, 64)),
]  # fmt: skip
TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
POINTERS = {"packed": "*u8", "ids": "*i64"}


def compiled(kernel: Any, dtype: str, constants: dict[str, Any], capability: int) -> tuple[Any, int]:
    from aot import compile_for, signature_of

    warps, stages = constants.pop("num_warps", 4), constants.pop("num_stages", 3)
    constants = {n: v for n, v in constants.items() if n in kernel.arg_names}
    signature = signature_of(kernel, constants, ("rows", "out", "bias"), dtype, POINTERS)
    signature |= {"scaling": "fp32"} if "scaling" in signature else {}
    return compile_for(kernel, signature, constants, capability, num_warps=warps, num_stages=stages), warps


@pytest.mark.parametrize("capability", (80, 90))
@pytest.mark.parametrize(("name", "dtype", "tokens", "rank", "forward"), TABLE, ids=str)
def test_compiled_ahead_of_time_within_limits(
    name: str, dtype: str, tokens: int, rank: int, forward: bool, capability: int
) -> None:
    """Adapters in float32 and of several, blocks of 64 in rows of whole blocks, nothing spilt."""
    import triton.language as tl

    from aot import check_resources
    from mmrec_kernels.nf4.triton import kernels, passes

    sizes = passes.launch_sizes(name, tokens, rank, TYPES[dtype])
    precision = passes.low_precision(TYPES[dtype])
    constants: dict[str, Any] = {
        "FORWARD": forward, "BLOCKSIZE": 64, "GROUP": min(64, sizes.get("BLOCK_C" if forward else "BLOCK_O", 64)),
        "WIDE": tl.float32,
        "PRECISION": "ieee", "LOW_PRECISION": precision, "UPCAST": False, **sizes,
    }  # fmt: skip
    used, warps = compiled(getattr(kernels, f"{name}_kernel"), dtype, constants, capability)
    check_resources(used, warps, tf32=dtype != "fp32")
    if name == "linear" and dtype != "fp32":
        assert ("wgmma" if capability == 90 and sizes["BLOCK_M"] >= 64 else "mma.sync") in used.ptx


@pytest.mark.parametrize("capability", (80, 90))
def test_small_kernels_compiled_ahead_of_time(capability: int) -> None:
    import triton.language as tl

    from aot import check_resources
    from mmrec_kernels.nf4.triton import decode, kernels

    sizes = {"BLOCK": 1024, "BLOCKSIZE": 64, "DTYPE": tl.bfloat16, "UPCAST": False}
    for kernel in (decode.dequantize_kernel, kernels.sum_kernel):
        check_resources(*compiled(kernel, "bf16", dict(sizes), capability))


def test_launches_compiled_ahead_of_time() -> None:
    """Every kernel, as the launchers ask for it, in every dtype and with sizes of one; batches of other numbers of
    tokens need no kernel of their own; and the nested absmax is rounded twice."""
    from aot import launches_of

    told = launches_of(Path(__file__).parent)
    assert set(told["everything"]) == {
        "absmax_kernel", "low_rank_kernel", "linear_kernel", "sum_kernel", "adapter_gradient_kernel",
        "dequantize_kernel",
    }  # fmt: skip
    assert told["ragged"] == {}
    assert told["fused multiply-adds of absmax"] == {"as launched": 0, "by default": 1}


# ---- on a GPU --------------------------------------------------------------------------------------------------------


GPU_SIZES = [(896, 896, 64, 16), (200, 1000, 64, 8), (77, 45, 64, 3), (4864, 896, 64, 64), (130, 512, 4096, 33)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("tokens", [1, 16, 33, 64, 130, 700])
@pytest.mark.parametrize("size", GPU_SIZES, ids=str)
def test_gpu_passes_match_the_oracle(size: tuple[int, int, int, int], tokens: int, dtype: torch.dtype) -> None:
    out, width, blocksize, rank = size
    given = make(tokens, out, width, blocksize, rank, dtype)
    found, again = run(on_gpu(given)), run(on_gpu(given))
    assert all(torch.equal(p, q) for p, q in zip(found, again, strict=True))
    assert_right(given, found)


@pytest.mark.gpu
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(("out", "width", "blocksize"), [(300, 896, 64), (77, 45, 64), (100, 4096, 4096)])
def test_gpu_w_is_decoded_exactly(out: int, width: int, blocksize: int, dtype: torch.dtype, nested: bool) -> None:
    weight = NF4Weight.quantize(normal(out, width, seed=2).float(), blocksize, nested=nested)
    there, decoded = weight.to("cuda"), weight.dequantize(dtype)
    assert torch.equal(there.dequantize(dtype).cpu(), decoded)
    x = torch.eye(width, dtype=dtype, device="cuda").requires_grad_()
    y = nf4_linear(x, there)
    assert torch.equal(y.cpu(), decoded.T)
    y.backward(torch.eye(width, out, dtype=dtype, device="cuda"))
    assert x.grad is not None and torch.equal(x.grad[:out].cpu(), decoded[:width])


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [5, 200])
def test_gpu_mixed_adapters_have_the_bits_of_single_ones(tokens: int) -> None:
    given = on_gpu(make(tokens, 896, 896, 64, 16, torch.bfloat16))
    mixed = run(given)
    for e in (-1, 0, 1):
        single = run(given | {"ids": torch.full_like(given["ids"], e)})
        mine = given["ids"] == e
        assert torch.equal(mixed[0][mine], single[0][mine]) and torch.equal(mixed[1][mine], single[1][mine])


@pytest.mark.gpu
def test_gpu_passes_are_captured_in_a_graph() -> None:
    given = on_gpu(make(70, 896, 896, 64, 16, torch.bfloat16))
    assert_captured(lambda: tuple(run(given)))
