"""`route` and `mixture_of_experts` beside torch and transformers (routing_peers.py).

Three modalities, each kept to a part of the experts; SwiGLU experts; the router in float32 for all. Shapes without
`hidden` are of `route` alone (router.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..routing import mixture_of_experts, route
from . import router
from .case import MODES, Call, Case, Inputs, Provider, Work, against, generator, in_mode, leaf, our_name, torch_dtype
from .routing_peers import LEAVES, peers

OP = "routing"
DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("float32", "bfloat16", "float16")}
_MODALITIES = 3
SHAPES = {
    "small": (
        {"tokens": 128, "width": 32, "hidden": 64, "experts": 4, "k": 2},
        {"tokens": 1, "width": 32, "hidden": 64, "experts": 4, "k": 2},
        {"tokens": 128, "width": 32, "experts": 4, "k": 2},
    ),
    "full": (
        {"tokens": 8192, "width": 64, "hidden": 256, "experts": 16, "k": 2},
        {"tokens": 8192, "width": 256, "hidden": 512, "experts": 8, "k": 2},
        {"tokens": 65536, "width": 64, "hidden": 128, "experts": 16, "k": 2},
        {"tokens": 256, "width": 256, "hidden": 512, "experts": 8, "k": 2},
        {"tokens": 1, "width": 256, "hidden": 512, "experts": 8, "k": 2},
        {"tokens": 8192, "width": 256, "experts": 8, "k": 2},
        {"tokens": 65536, "width": 64, "experts": 16, "k": 2},
        {"tokens": 2**20, "width": 64, "experts": 16, "k": 2},
    ),
}
# On a GPU instead of those: training at scale, a small step, serving; and a million tokens of `route` alone.
_SIZES = ("tokens", "width", "hidden", "experts", "k")
GPU_SHAPES = (
    *(
        dict(zip(_SIZES, sizes, strict=True))
        for sizes in (
            (2**20, 64, 128, 8, 2), (65536, 256, 512, 16, 2), (8192, 256, 512, 8, 2), (16384, 512, 1024, 32, 4),
            (32768, 1024, 4096, 64, 2), (256, 256, 512, 8, 2),
        )
    ),
    {"tokens": 2**20, "width": 64, "experts": 16, "k": 2},
    {"tokens": 4096, "width": 256, "experts": 8, "k": 2},
)  # fmt: skip


def cases(
    shapes: str, device: str, dtypes: Sequence[str], modes: Sequence[str] = MODES, candidates: bool = False
) -> list[Case]:
    """One case per shape, dtype and mode; with `candidates` also by the CUDA C++ kernel that does not serve yet."""
    return [
        case(shape, dtype, device, mode) if "hidden" in shape else router.case(shape, dtype, device, mode, candidates)
        for shape in (GPU_SHAPES if device == "cuda" and shapes == "full" else SHAPES[shapes])
        for dtype in dtypes
        for mode in modes
    ]


def case(shape: dict[str, int], dtype: str, device: str, mode: str) -> Case:
    """The case of `shape`. Tokens, the parameters of the experts that can be used, and their gradients, once."""
    tokens, width, hidden, experts, k = shape.values()
    size = torch_dtype(dtype).itemsize
    used = min(experts, tokens * k)
    rows, parameters = tokens * width * size, 3 * used * hidden * width * size
    flops = 2 * tokens * width * (experts + 3 * k * hidden)
    work = {
        "forward": Work(flops, rows + parameters, rows),
        "backward": Work(2 * flops, 2 * rows + parameters, rows + parameters),
        "full": Work(3 * flops, 2 * rows + parameters, 2 * rows + parameters),
    }[mode]
    return Case(
        OP,
        shape,
        dtype,
        device,
        mode,
        work,
        (
            Provider(our_name("_experts_forward", device), _ours, ours=True),
            *peers(device),
        ),
        inputs=lambda: inputs(shape, dtype, device),
        judge=lambda given: against(_oracle(given, mode)),
        compute_dtype=torch_dtype(dtype),
    )


def inputs(shape: dict[str, int], dtype: str, device: str) -> Inputs:
    """Normal tokens and parameters; modality m may not use expert m, where there are more experts than modalities."""
    random = generator(device)
    tokens, width, hidden, experts, k = shape.values()

    def normal(*sizes: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*sizes, generator=random, device=device)).to(torch_dtype(dtype))

    allowed = torch.ones(_MODALITIES, experts, dtype=torch.bool, device=device)
    if experts > _MODALITIES:
        allowed[range(_MODALITIES), range(_MODALITIES)] = False
    return {
        "x": normal(tokens, width),
        "gate": normal(experts, width, scale=width**-0.5),
        "w_in": normal(experts, 2 * hidden, width, scale=width**-0.5),
        "w_out": normal(experts, width, hidden, scale=hidden**-0.5),
        "modality": torch.randint(_MODALITIES, (tokens,), generator=random, device=device),
        "allowed": allowed,
        "k": k,
        "grad": normal(tokens, width),
    }


def _ours(given: Inputs, mode: str, dtype: torch.dtype | None = None) -> Call:
    x, gate, w_in, w_out = leaves = [leaf(given[name], dtype) for name in LEAVES]
    modality, allowed, k = given["modality"], given["allowed"], given["k"]
    return in_mode(
        lambda: mixture_of_experts(x, route(x, gate, k, modality=modality, allowed=allowed), w_in, w_out),
        leaves,
        given["grad"].to(x.dtype),
        mode,
    )


def _oracle(given: Inputs, mode: str) -> Sequence[Tensor]:
    wide = {name: x.cpu() if isinstance(x, Tensor) else x for name, x in given.items()}
    return _ours(wide, mode, torch.float64)()
