"""`nf4_linear` without an adapter, with one, and with several in a batch, beside others on the same 4-bit bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from .. import schemas
from ..nf4 import LoRA, NF4Weight, nf4_linear
from .case import (
    MODES,
    Call,
    Case,
    Inputs,
    Provider,
    Work,
    against,
    by_candidate,
    generator,
    in_mode,
    our_name,
    torch_dtype,
)
from .nf4_peers import SCALING, leaves_of, peers, with_adapters

OP = "nf4"
DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("float32", "bfloat16", "float16")}
_LAYERS = ((896, 896), (4864, 896), (2048, 2048), (4096, 4096))
_ROWS = (1, 4, 16, 64, 256, 1024)


def _full() -> tuple[dict[str, int], ...]:
    """Without an adapter and with one of rank 16 everywhere; rank 64 and eight adapters at four sizes."""
    found = []
    for out, width in _LAYERS:
        for rows in _ROWS:
            kinds = [(0, 1), (16, 1), *(((64, 1), (16, 8)) if rows in (1, 16, 64, 256) else ())]
            found += [
                {"rows": rows, "out": out, "in": width, "rank": rank, "adapters": adapters} for rank, adapters in kinds
            ]
    return tuple(found)


SHAPES = {
    "small": (
        {"rows": 1, "out": 128, "in": 128, "rank": 8, "adapters": 1},
        {"rows": 16, "out": 256, "in": 128, "rank": 8, "adapters": 4},
    ),
    "full": _full(),
}


def cases(
    shapes: str, device: str, dtypes: Sequence[str], modes: Sequence[str] = MODES, candidates: bool = False
) -> list[Case]:
    """One case per shape, dtype and mode; with `candidates` also by the CUDA C++ kernel that does not serve yet."""
    return [
        case(shape, dtype, device, mode, candidates) for shape in SHAPES[shapes] for dtype in dtypes for mode in modes
    ]


def case(shape: dict[str, int], dtype: str, device: str, mode: str, candidates: bool = False) -> Case:
    """The case of `shape`. Once: 4-bit codes with a byte per 64 of them, input, float32 adapters; no dense weight."""
    rows, out, width, rank, adapters = shape.values()
    size = torch_dtype(dtype).itemsize
    weight = out * width // 2 + out * width // 64
    adapter = 4 * min(adapters, rows) * rank * (out + width)
    x, y = rows * width * size, rows * out * size
    product, low_rank = 2 * rows * out * width, 2 * rows * rank * (out + width)
    work = {
        "forward": Work(product + low_rank, weight + adapter + x, y),
        "backward": Work(product + 2 * low_rank, weight + adapter + y + (x if rank else 0), x + adapter),
        "full": Work(2 * product + 3 * low_rank, weight + adapter + x + y, x + y + adapter),
    }[mode]
    small = Provider("mmrec (CUDA C++, up to 64 tokens)", ours_by_small, ours=True)
    takes = candidates and rows <= 64 and width % 32 == 0 and dtype != "float32" and mode != "backward"
    return Case(
        OP,
        shape,
        dtype,
        device,
        mode,
        work,
        (
            Provider(our_name("_nf4_forward", device), _ours, ours=True),
            *((small,) if takes else ()),
            *peers(device, dtype, mode, shape),
        ),
        inputs=lambda: inputs(shape, dtype, device),
        judge=lambda given: _judge(given, mode),
        compute_dtype=torch_dtype(dtype),
    )


def inputs(shape: dict[str, int], dtype: str, device: str) -> Inputs:
    """A normal input, a nested NF4 weight of blocks of 64, float32 adapters of which both factors are non-zero, and
    which of them each row takes."""
    random = generator(device)
    rows, out, width, rank, adapters = shape.values()

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=random, device=device)

    return {
        "x": normal(rows, width).to(torch_dtype(dtype)),
        "weight": NF4Weight.quantize(normal(out, width) * width**-0.5),
        "a": normal(adapters, rank, width) * width**-0.5,
        "b": normal(adapters, out, rank) * max(rank, 1) ** -0.5,
        "adapter_ids": torch.randint(adapters, (rows,), generator=random, device=device),
        "grad": normal(rows, out).to(torch_dtype(dtype)),
    }


def _ours(given: Inputs, mode: str) -> Call:
    weight, leaves = given["weight"], leaves_of(given)

    def layer() -> Tensor:
        if len(leaves) == 1:
            return nf4_linear(leaves[0], weight)
        x, a, b = leaves
        if len(a) == 1:
            return nf4_linear(x, weight, lora=LoRA(a[0], b[0], SCALING))
        return nf4_linear(x, weight, lora=LoRA(a, b, SCALING), adapter_ids=given["adapter_ids"])

    return in_mode(layer, leaves, given["grad"], mode)


def ours_by_small(given: Inputs, mode: str) -> Call:
    """By the CUDA C++ kernel for few tokens; the backward pass is that which serves."""
    return by_candidate(schemas.nf4_forward_small, _ours(given, mode), of=schemas.nf4_forward)


def _judge(given: Inputs, mode: str) -> Callable[[Any], dict[str, float]]:
    """Against float64 on the weight as it is decoded for the case's dtype, which is the weight that all are given."""
    wide = {name: value.to("cpu") for name, value in given.items()}
    weight = wide["weight"].dequantize(given["x"].dtype).double()
    leaves = leaves_of(wide, torch.float64)
    exact = in_mode(
        lambda: with_adapters(linear(leaves[0], weight), wide, leaves), leaves, wide["grad"].double(), mode
    )()
    judge = against(exact)
    return lambda results: judge([r.view(e.shape) for r, e in zip(results, exact, strict=True)])
