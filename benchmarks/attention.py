"""`cross_modal_attention` beside `scaled_dot_product_attention` over concatenated, padded keys.

Every query of a sequence attends to the keys of all its modalities. A padded peer gets one layout for all: keys of a
sequence side by side, and a mask. Whether a model has that layout already or has to make it per call are two rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..attention import Segment, cross_modal_attention
from .case import MODES, Call, Case, Inputs, Provider, Work, against, generator, in_mode, leaf, our_name, torch_dtype

OP = "attention"
DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("float32", "bfloat16", "float16")}
_MISSING = 0.2  # the share of sequences that lack a modality, the first aside
SHAPES = {
    "small": (
        {"batch": 16, "heads": 4, "width": 32, "queries": 4, "segments": 2, "longest": 16},
        {"batch": 4, "heads": 2, "width": 64, "queries": 16, "segments": 3, "longest": 60},
    ),
    "full": (
        {"batch": 256, "heads": 8, "width": 64, "queries": 16, "segments": 3, "longest": 100},
        {"batch": 8192, "heads": 4, "width": 32, "queries": 4, "segments": 3, "longest": 6},
        {"batch": 64, "heads": 8, "width": 64, "queries": 4, "segments": 5, "longest": 512},
    ),
}


def cases(shapes: str, device: str, dtypes: Sequence[str], modes: Sequence[str] = MODES) -> list[Case]:
    """One case per shape, dtype and mode."""
    return [case(shape, dtype, device, mode) for shape in SHAPES[shapes] for dtype in dtypes for mode in modes]


def case(shape: dict[str, int], dtype: str, device: str, mode: str) -> Case:
    """The case of `shape`. Once: query, keys, values, output, and their gradients where there are some."""
    keys = int(_lengths(shape).sum())
    head = shape["heads"] * shape["width"]
    query_bytes = shape["batch"] * shape["queries"] * head * torch_dtype(dtype).itemsize
    key_bytes = keys * head * torch_dtype(dtype).itemsize
    forward = Work(4 * head * shape["queries"] * keys, query_bytes + 2 * key_bytes, query_bytes)
    # Backward: five products where the forward has two; it reads the inputs, out and its gradient.
    backward = Work(forward.flops * 5 // 2, 3 * query_bytes + 2 * key_bytes, query_bytes + 2 * key_bytes)
    full = Work(*(a + b for a, b in zip(_tuple(forward), _tuple(backward), strict=True)))
    return Case(
        OP,
        shape,
        dtype,
        device,
        mode,
        {"forward": forward, "backward": backward, "full": full}[mode],
        (
            Provider(our_name("_attention_forward", device), _ours, _ours_finished(mode), ours=True),
            Provider("torch SDPA, padded beforehand", _padded, _padded_finished(mode)),
            Provider("torch SDPA, concatenated and padded in the call", _padding, _ours_finished(mode)),
        ),
        inputs=lambda: inputs(shape, dtype, device),
        judge=lambda given: against(_oracle(given, mode)),
        compute_dtype=torch_dtype(dtype),
    )


def _tuple(work: Work) -> tuple[int, int, int]:
    return work.flops, work.read, work.written


def _lengths(shape: dict[str, int]) -> Tensor:
    """`[segments, batch]`: uniform in [1, longest], 0 where the modality is missing."""
    random = generator("cpu", 1)
    lengths = torch.randint(1, shape["longest"] + 1, (shape["segments"], shape["batch"]), generator=random)
    lengths[1:] *= torch.rand(shape["segments"] - 1, shape["batch"], generator=random) >= _MISSING
    return lengths


def inputs(shape: dict[str, int], dtype: str, device: str) -> Inputs:
    """Normal queries, keys and values; where each key goes in the padded layout; an upstream gradient."""
    random = generator(device)
    lengths = _lengths(shape).to(device)
    batch, heads, width = shape["batch"], shape["heads"], shape["width"]

    def normal(rows: int) -> Tensor:
        return torch.randn(rows, heads, width, generator=random, device=device).to(torch_dtype(dtype))

    offsets = torch.nn.functional.pad(lengths.cumsum(1), (1, 0))
    total = lengths.sum(0)
    longest = int(total.max())
    before = lengths.cumsum(0) - lengths  # keys of the earlier segments of the same sequence
    slots = []
    for m in range(shape["segments"]):
        sequence = torch.repeat_interleave(torch.arange(batch, device=device), lengths[m])
        inside = torch.arange(len(sequence), device=device) - offsets[m][sequence]
        slots.append(sequence * longest + before[m][sequence] + inside)
    return {
        "shape": shape,
        "query": normal(batch * shape["queries"]),
        "keys": [normal(len(slot)) for slot in slots],
        "values": [normal(len(slot)) for slot in slots],
        "offsets": list(offsets),
        "query_offsets": torch.arange(batch + 1, device=device) * shape["queries"],
        "slot": torch.cat(slots),
        "longest": longest,
        "mask": (torch.arange(longest, device=device) < total[:, None])[:, None, None, :],
        "grad": normal(batch * shape["queries"]),
    }


def _leaves(given: Inputs, dtype: torch.dtype | None = None) -> list[Tensor]:
    return [leaf(x, dtype) for x in (given["query"], *given["keys"], *given["values"])]


def _split(leaves: list[Tensor]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    half = (len(leaves) + 1) // 2
    return leaves[0], leaves[1:half], leaves[half:]


def _ours(given: Inputs, mode: str, dtype: torch.dtype | None = None) -> Call:
    leaves = _leaves(given, dtype)
    query, keys, values = _split(leaves)
    segments = [Segment(*parts) for parts in zip(keys, values, given["offsets"], strict=True)]
    grad = given["grad"].to(query.dtype)

    def forward() -> Tensor:
        out = cross_modal_attention(query, segments, given["query_offsets"])
        assert isinstance(out, Tensor)  # no other result was asked for
        return out

    return in_mode(forward, leaves, grad, mode)


def _sdpa(given: Inputs, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`key`, `value` `[B·longest, H, D]`."""
    batch, queries, longest = given["shape"]["batch"], given["shape"]["queries"], given["longest"]
    q, k, v = (
        x.view(batch, n, *x.shape[1:]).transpose(1, 2) for x, n in ((query, queries), (key, longest), (value, longest))
    )
    return scaled_dot_product_attention(q, k, v, attn_mask=given["mask"]).transpose(1, 2).flatten(0, 1)


def _pad(given: Inputs, rows: Tensor) -> Tensor:
    padded = rows.new_zeros(given["shape"]["batch"] * given["longest"], *rows.shape[1:])
    return padded.index_copy(0, given["slot"], rows)


def _padded(given: Inputs, mode: str) -> Call:
    leaves = [leaf(given["query"]), *(leaf(_pad(given, torch.cat(given[name]))) for name in ("keys", "values"))]
    return in_mode(lambda: _sdpa(given, *leaves), leaves, given["grad"], mode)


def _padding(given: Inputs, mode: str) -> Call:
    leaves = _leaves(given)
    query, keys, values = _split(leaves)
    return in_mode(
        lambda: _sdpa(given, query, _pad(given, torch.cat(keys)), _pad(given, torch.cat(values))),
        leaves,
        given["grad"],
        mode,
    )


def _ours_finished(mode: str) -> Callable[[Inputs, Any], Any]:
    def finish(given: Inputs, result: Any) -> Any:
        if mode == "forward":
            return result
        query, keys, values = _split(list(result))
        return query, torch.cat(keys), torch.cat(values)

    return finish


def _padded_finished(mode: str) -> Callable[[Inputs, Any], Any]:
    def finish(given: Inputs, result: Any) -> Any:
        return result if mode == "forward" else (result[0], *(x[given["slot"]] for x in result[1:]))

    return finish


def _oracle(given: Inputs, mode: str) -> Sequence[Tensor]:
    """The reference in float64, on CPU, where the public function takes float64."""
    wide = {name: _to_cpu(value) for name, value in given.items()}
    return _ours_finished(mode)(wide, _ours(wide, mode, torch.float64)())


def _to_cpu(value: Any) -> Any:
    if isinstance(value, list):
        return [x.cpu() for x in value]
    return value.cpu() if isinstance(value, Tensor) else value
