"""`nf4_linear` with one LoRA adapter beside bitsandbytes and eager torch, all on the same 4-bit bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..nf4 import LoRA, NF4Weight, nf4_linear
from .case import MODES, Call, Case, Inputs, Provider, Work, against, generator, in_mode, leaf, our_name, torch_dtype

OP = "nf4"
DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("float32", "bfloat16", "float16")}
_SCALING = 2.0
_LEAVES = ("x", "a", "b")
SHAPES = {
    "small": (
        {"rows": 1, "out": 128, "in": 128, "rank": 8},
        {"rows": 16, "out": 256, "in": 128, "rank": 8},
    ),
    "full": tuple(
        {"rows": rows, "out": out, "in": width, "rank": 16}
        for out, width in ((896, 896), (4864, 896), (2048, 2048), (4096, 4096))
        for rows in (1, 16, 256)
    ),
}


def cases(shapes: str, device: str, dtypes: Sequence[str], modes: Sequence[str] = MODES) -> list[Case]:
    """One case per shape, dtype and mode."""
    return [case(shape, dtype, device, mode) for shape in SHAPES[shapes] for dtype in dtypes for mode in modes]


def case(shape: dict[str, int], dtype: str, device: str, mode: str) -> Case:
    """The case of `shape`. Once: 4-bit codes with a byte per 64 of them, input, adapter; no dense weight."""
    rows, out, width, rank = shape.values()
    size = torch_dtype(dtype).itemsize
    weight = out * width // 2 + out * width // 64
    adapter = rank * (out + width) * size
    x, y = rows * width * size, rows * out * size
    product, low_rank = 2 * rows * out * width, 2 * rows * rank * (out + width)
    work = {
        "forward": Work(product + low_rank, weight + adapter + x, y),
        "backward": Work(product + 2 * low_rank, weight + adapter + x + y, x + adapter),
        "full": Work(2 * product + 3 * low_rank, weight + adapter + x + y, x + y + adapter),
    }[mode]
    peers = [
        Provider("torch dequantise + linear + LoRA", _dequantised),
        Provider("torch linear + LoRA, weight dequantised beforehand", _dense),
        Provider("bitsandbytes matmul_4bit + LoRA", _bitsandbytes, module="bitsandbytes"),
    ]
    if mode == "forward" and device == "cpu" and dtype == "bfloat16":
        peers.append(Provider("bitsandbytes repacked for CPU inference + LoRA", _repacked, module="bitsandbytes"))
    return Case(
        OP,
        shape,
        dtype,
        device,
        mode,
        work,
        (Provider(our_name("_nf4_forward", device), _ours, ours=True), *peers),
        inputs=lambda: inputs(shape, dtype, device),
        judge=lambda given: against(_oracle(given, mode)),
        compute_dtype=torch_dtype(dtype),
    )


def inputs(shape: dict[str, int], dtype: str, device: str) -> Inputs:
    """A normal input, a nested NF4 weight of blocks of 64, an adapter of which both factors are non-zero."""
    random = generator(device)
    rows, out, width, rank = shape.values()

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=random, device=device).to(torch_dtype(dtype))

    return {
        "x": normal(rows, width),
        "weight": NF4Weight.quantize(normal(out, width) * width**-0.5),
        "a": normal(rank, width) * width**-0.5,
        "b": normal(out, rank) * rank**-0.5,
        "grad": normal(rows, out),
    }


def _ours(given: Inputs, mode: str, dtype: torch.dtype | None = None) -> Call:
    x, a, b = leaves = [leaf(given[name], dtype) for name in _LEAVES]
    weight = given["weight"]
    return in_mode(lambda: nf4_linear(x, weight, lora=LoRA(a, b, _SCALING)), leaves, given["grad"].to(x.dtype), mode)


def _with_adapter(given: Inputs, mode: str, base: Callable[[Tensor], Tensor]) -> Call:
    """base(x) + scaling · (x aᵀ) bᵀ, the way peft adds an adapter."""
    x, a, b = leaves = [leaf(given[name]) for name in _LEAVES]
    return in_mode(lambda: base(x) + linear(linear(x, a), b) * _SCALING, leaves, given["grad"], mode)


def _dequantised(given: Inputs, mode: str) -> Call:
    weight, dtype = given["weight"], given["x"].dtype
    return _with_adapter(given, mode, lambda x: linear(x, weight.dequantize(dtype)))


def _dense(given: Inputs, mode: str) -> Call:
    dense = given["weight"].dequantize(given["x"].dtype)
    return _with_adapter(given, mode, lambda x: linear(x, dense))


def _quant_state(given: Inputs) -> tuple[Tensor, Any]:
    """bitsandbytes' view of a copy of the same bytes."""
    from bitsandbytes.functional import QuantState, get_4bit_type

    weight: NF4Weight = given["weight"]
    packed, absmax, nested_absmax, nested_code, offset = (None if t is None else t.clone() for t in weight.tensors())
    nested = QuantState(absmax=nested_absmax, code=nested_code, blocksize=256, dtype=torch.float32)
    state = QuantState(
        absmax=absmax, shape=torch.Size(weight.shape), code=get_4bit_type("nf4", device=weight.device),
        blocksize=weight.blocksize, quant_type="nf4", dtype=given["x"].dtype, offset=offset, state2=nested,
    )  # fmt: skip
    assert packed is not None
    return packed.view(-1, 1), state


def _bitsandbytes(given: Inputs, mode: str) -> Call:
    from bitsandbytes import matmul_4bit

    packed, state = _quant_state(given)
    return _with_adapter(given, mode, lambda x: matmul_4bit(x, packed, state))


def _repacked(given: Inputs, mode: str) -> Call:
    """What `Linear4bit` does on its first forward in eval mode: rounds absmax to bfloat16, tiles the bytes anew."""
    from bitsandbytes import functional, matmul_4bit

    if not functional.has_avx512bf16():
        raise RuntimeError("this CPU has no AVX-512 BF16")
    packed, state = functional._convert_weight_packed_for_cpu(*_quant_state(given))
    return _with_adapter(given, mode, lambda x: matmul_4bit(x, packed, state))


def _oracle(given: Inputs, mode: str) -> Sequence[Tensor]:
    """In float64 on the weight as it is decoded for the case's dtype, which is the weight that all are given."""
    wide = {name: value.to("cpu") for name, value in given.items()}
    weight = wide["weight"].dequantize(given["x"].dtype).double()
    x, a, b = leaves = [leaf(wide[name], torch.float64) for name in _LEAVES]
    return in_mode(
        lambda: linear(x, weight) + linear(linear(x, a), b) * _SCALING, leaves, wide["grad"].double(), mode
    )()
