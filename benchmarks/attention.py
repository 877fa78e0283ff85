"""`cross_modal_attention` beside torch's ways to attend to ragged keys.

Every query of a sequence attends to the keys of all its modalities. A padded peer gets one layout for all: keys of a
sequence side by side, and a mask. Whether a model has that layout already or has to make it per call are two rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from .. import schemas
from ..attention import Segment, cross_modal_attention
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
    leaf,
    our_name,
    torch_dtype,
)

OP = "attention"
DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("float32", "bfloat16", "float16")}
_MOST_MASK = 300_000_000
_MISSING = 0.2  # the share of sequences that lack a modality, the first aside


def _shape(
    batch: int, heads: int, width: int, queries: int, segments: int, longest: int, **more: int
) -> dict[str, int]:
    """`shortest` 1 unless told; `latent`: the queries are shared by all sequences; `store`: keys are named by an index
    into so many rows, `longest` of them."""
    return {"batch": batch, "heads": heads, "width": width, "queries": queries, "segments": segments,
            "longest": longest, **more}  # fmt: skip


SHAPES = {
    "small": (
        _shape(16, 4, 32, 4, 2, 16),
        _shape(4, 2, 64, 16, 3, 60),
        _shape(6, 2, 16, 3, 2, 20, latent=1),
        _shape(8, 2, 32, 5, 1, 40, store=50),
    ),
    "full": (
        # One modality: a user's few questions to a history, a sequence model's rows, one question, and long rows.
        _shape(512, 8, 64, 4, 1, 200, shortest=10),
        _shape(256, 8, 64, 32, 1, 200, shortest=10),
        _shape(2048, 8, 64, 1, 1, 100, shortest=10),
        _shape(128, 8, 64, 100, 1, 200, shortest=10),
        # Users over histories of three modalities; items that fuse a few tokens; Q-Formers over long items.
        _shape(256, 8, 64, 16, 3, 100, shortest=5),
        _shape(8192, 4, 32, 4, 3, 6),
        _shape(64, 8, 64, 4, 5, 512, latent=1),
        # A catalogue of items that users share, 50 of 8 tokens each; two modalities that look at each other.
        _shape(256, 8, 64, 16, 1, 400, store=16_000),
        _shape(256, 12, 64, 36, 1, 20, shortest=10),
        _shape(256, 12, 64, 20, 1, 36, shortest=18),
    ),
}


def cases(
    shapes: str, device: str, dtypes: Sequence[str], modes: Sequence[str] = MODES, candidates: bool = False
) -> list[Case]:
    """One case per shape, dtype and mode; with `candidates` also by the CUDA C++ kernel that does not serve yet."""
    found = [case(shape, dtype, device, mode) for shape in SHAPES[shapes] for dtype in dtypes for mode in modes]
    return [_with_candidate(c) for c in found] if candidates else found


def case(shape: dict[str, int], dtype: str, device: str, mode: str) -> Case:
    """The case of `shape`. Once: query, keys, values, output, and their gradients where there are some."""
    entries = int(_lengths(shape).sum())
    head = shape["heads"] * shape["width"]
    row = head * torch_dtype(dtype).itemsize
    out_bytes = shape["batch"] * shape["queries"] * row
    query_bytes = shape["queries"] * row if "latent" in shape else out_bytes
    key_bytes = shape.get("store", entries) * row
    forward = Work(4 * head * shape["queries"] * entries, query_bytes + 2 * key_bytes, out_bytes)
    # Backward: five products where the forward has two; it reads the inputs, out and its gradient.
    read = query_bytes + 2 * out_bytes + 2 * key_bytes
    backward = Work(forward.flops * 5 // 2, read, query_bytes + 2 * key_bytes)
    full = Work(*(a + b for a, b in zip(_tuple(forward), _tuple(backward), strict=True)))
    return Case(
        OP,
        shape,
        dtype,
        device,
        mode,
        {"forward": forward, "backward": backward, "full": full}[mode],
        tuple(_providers(shape, device, mode)),
        inputs=lambda: inputs(shape, dtype, device),
        judge=lambda given: against(_oracle(given, mode)),
        compute_dtype=torch_dtype(dtype),
    )


def _providers(shape: dict[str, int], device: str, mode: str) -> list[Provider]:
    found = [Provider(our_name("_attention_forward", device), _ours, _ours_finished(mode), ours=True)]
    if "store" not in shape:
        finish = _padded_finished(mode)
        found += [
            Provider("torch SDPA, padded beforehand", _padded(scaled_dot_product_attention), finish),
            Provider("torch softmax, padded beforehand", _padded(_eager), finish),
        ]
    found += [
        Provider("torch SDPA, concatenated and padded in the call", _padding, _ours_finished(mode)),
        Provider("torch SDPA, a call per sequence", _one_by_one, _ours_finished(mode)),
        Provider("torch SDPA over nested tensors", _nested, _ours_finished(mode)),
    ]
    if mode == "forward" or device == "cuda":  # it has no backward on CPU
        found.append(Provider("torch.compile of flex_attention", _flex, _ours_finished(mode)))
    return found


def _with_candidate(case: Case) -> Case:
    """It has a forward only, for 16-bit rows of a few widths."""
    if case.mode != "forward" or case.dtype == "float32" or case.shape["width"] not in (16, 32, 64, 128):
        return case
    warp = Provider("mmrec (CUDA C++, a warp per sequence)", _ours_by_warp, _ours_finished(case.mode), ours=True)
    return replace(case, providers=(*case.providers, warp))


def _tuple(work: Work) -> tuple[int, int, int]:
    return work.flops, work.read, work.written


def _lengths(shape: dict[str, int]) -> Tensor:
    """`[segments, batch]`: uniform in [shortest, longest], 0 where the modality is missing; `longest` into a store."""
    random = generator("cpu", 1)
    sizes = (shape["segments"], shape["batch"])
    if "store" in shape:
        return torch.full(sizes, shape["longest"])
    lengths = torch.randint(shape.get("shortest", 1), shape["longest"] + 1, sizes, generator=random)
    lengths[1:] *= torch.rand(shape["segments"] - 1, shape["batch"], generator=random) >= _MISSING
    return lengths


def inputs(shape: dict[str, int], dtype: str, device: str) -> Inputs:
    """Normal queries, keys and values; where each key goes in the padded layout; an upstream gradient."""
    random = generator(device)
    lengths = _lengths(shape).to(device)
    batch, heads, width, queries = shape["batch"], shape["heads"], shape["width"], shape["queries"]

    def normal(rows: int) -> Tensor:
        return torch.randn(rows, heads, width, generator=random, device=device).to(torch_dtype(dtype))

    offsets = torch.nn.functional.pad(lengths.cumsum(1), (1, 0))
    total = lengths.sum(0)
    longest = int(total.max())
    before = lengths.cumsum(0) - lengths  # keys of the earlier segments of the same sequence
    slots, owners = [], []
    for m in range(shape["segments"]):
        sequence = torch.repeat_interleave(torch.arange(batch, device=device), lengths[m])
        inside = torch.arange(len(sequence), device=device) - offsets[m][sequence]
        slots.append(sequence * longest + before[m][sequence] + inside)
        owners.append(sequence)
    index = None
    if "store" in shape:
        index = [_popular_items(shape, device) for _ in range(shape["segments"])]
    rows = [shape.get("store", len(slot)) for slot in slots]
    return {
        "shape": shape,
        "query": normal(queries if "latent" in shape else batch * queries),
        "keys": [normal(count) for count in rows],
        "values": [normal(count) for count in rows],
        "offsets": list(offsets),
        "index": index,
        "query_offsets": None if "latent" in shape else torch.arange(batch + 1, device=device) * queries,
        "slot": torch.cat(slots),
        "owner": torch.cat(owners),
        "longest": longest,
        "mask": (torch.arange(longest, device=device) < total[:, None])[:, None, None, :],
        "grad": normal(batch * queries),
    }


def _popular_items(shape: dict[str, int], device: str) -> Tensor:
    """Rows of the items of every sequence, 8 tokens each, items drawn by Zipf's law."""
    tokens = 8
    items, each = shape["store"] // tokens, shape["longest"] // tokens
    weights = 1.0 / torch.arange(1, items + 1)
    drawn = torch.multinomial(weights, shape["batch"] * each, replacement=True, generator=generator("cpu", 2))
    return (drawn[:, None] * tokens + torch.arange(tokens)).flatten().to(device)


def _leaves(given: Inputs, dtype: torch.dtype | None = None) -> list[Tensor]:
    return [leaf(x, dtype) for x in (given["query"], *given["keys"], *given["values"])]


def _split(leaves: list[Tensor]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    half = (len(leaves) + 1) // 2
    return leaves[0], leaves[1:half], leaves[half:]


def _ours(given: Inputs, mode: str, dtype: torch.dtype | None = None) -> Call:
    leaves = _leaves(given, dtype)
    query, keys, values = _split(leaves)
    index = given["index"] or [None] * len(keys)
    segments = [Segment(*parts) for parts in zip(keys, values, given["offsets"], index, strict=True)]
    grad = given["grad"].to(query.dtype)

    def forward() -> Tensor:
        out = cross_modal_attention(query, segments, given["query_offsets"])
        assert isinstance(out, Tensor)  # no other result was asked for
        return out

    return in_mode(forward, leaves, grad, mode)


def _ours_by_warp(given: Inputs, mode: str) -> Call:
    return by_candidate(schemas.attention_forward_warp, _ours(given, mode))


def _eager(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor) -> Tensor:
    scores = (query @ key.mT) * query.shape[-1] ** -0.5
    return scores.masked_fill(~attn_mask, -torch.inf).softmax(-1) @ value


def _attend(given: Inputs, attend: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`key`, `value` `[B·longest, H, D]`."""
    batch, longest = given["shape"]["batch"], given["longest"]
    k, v = (x.view(batch, longest, *x.shape[1:]).transpose(1, 2) for x in (key, value))
    return attend(_by_sequence(given, query), k, v, attn_mask=given["mask"]).transpose(1, 2).flatten(0, 1)


def _by_sequence(given: Inputs, query: Tensor) -> Tensor:
    """`[B, H, L, D]`; latent queries are repeated without a copy."""
    rows = query[None] if given["query_offsets"] is None else query.unflatten(0, (-1, given["shape"]["queries"]))
    return rows.transpose(1, 2).expand(given["shape"]["batch"], -1, -1, -1)


def _all_rows(given: Inputs, rows: list[Tensor]) -> Tensor:
    """The rows of all entries, segment after segment: concatenated, or gathered from the store."""
    return torch.cat(rows if given["index"] is None else [x[i] for x, i in zip(rows, given["index"], strict=True)])


def _pad(given: Inputs, rows: Tensor) -> Tensor:
    padded = rows.new_zeros(given["shape"]["batch"] * given["longest"], *rows.shape[1:])
    return padded.index_copy(0, given["slot"], rows)


def _padded(attend: Callable[..., Tensor]) -> Callable[[Inputs, str], Call]:
    def make(given: Inputs, mode: str) -> Call:
        leaves = [leaf(given["query"]), *(leaf(_pad(given, torch.cat(given[name]))) for name in ("keys", "values"))]
        return in_mode(lambda: _attend(given, attend, *leaves), leaves, given["grad"], mode)

    return make


def _padding(given: Inputs, mode: str) -> Call:
    leaves = _leaves(given)
    query, keys, values = _split(leaves)

    def forward() -> Tensor:
        key, value = (_pad(given, _all_rows(given, rows)) for rows in (keys, values))
        return _attend(given, scaled_dot_product_attention, query, key, value)

    return in_mode(forward, leaves, given["grad"], mode)


def _one_by_one(given: Inputs, mode: str) -> Call:
    leaves = _leaves(given)
    query, keys, values = _split(leaves)
    lengths = [offsets.diff().tolist() for offsets in given["offsets"]]

    def by_sequence(rows: list[Tensor]) -> list[Tensor]:
        """Split once: a slice per sequence would cost its backward a zero tensor of all rows each."""
        all_rows = rows if given["index"] is None else [x[i] for x, i in zip(rows, given["index"], strict=True)]
        parts = zip(*(x.split(n) for x, n in zip(all_rows, lengths, strict=True)), strict=True)
        return [(p[0] if len(p) == 1 else torch.cat(p)).transpose(0, 1) for p in parts]

    def forward() -> Tensor:
        found = zip(_by_sequence(given, query).unbind(0), by_sequence(keys), by_sequence(values), strict=True)
        return torch.cat([scaled_dot_product_attention(q, k, v).transpose(0, 1) for q, k, v in found])

    return in_mode(forward, leaves, given["grad"], mode)


def _nested(given: Inputs, mode: str) -> Call:
    """Jagged layout: the keys of a sequence have to lie together, so that several segments are reordered first."""
    leaves = _leaves(given)
    query, keys, values = _split(leaves)
    shape = given["shape"]
    order = given["slot"].argsort()
    totals = torch.bincount(given["owner"], minlength=shape["batch"])
    key_offsets = torch.nn.functional.pad(totals.cumsum(0), (1, 0))
    query_offsets = torch.arange(shape["batch"] + 1, device=order.device) * shape["queries"]

    def jagged(rows: Tensor, offsets: Tensor) -> Tensor:
        return torch.nested.nested_tensor_from_jagged(rows, offsets).transpose(1, 2)

    def forward() -> Tensor:
        rows = query if given["query_offsets"] is not None else query.repeat(shape["batch"], 1, 1)
        key, value = (_all_rows(given, x) for x in (keys, values))
        if len(keys) > 1:
            key, value = key[order], value[order]
        out = scaled_dot_product_attention(
            jagged(rows, query_offsets), jagged(key, key_offsets), jagged(value, key_offsets)
        )
        return out.transpose(1, 2).values()

    return in_mode(forward, leaves, given["grad"], mode)


def _flex(given: Inputs, mode: str) -> Call:
    """All sequences in one, a mask that keeps them apart; its blocks are found beforehand."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    leaves = _leaves(given) if mode != "forward" else [x.detach() for x in _leaves(given)]
    query, keys, values = _split(leaves)
    shape, owner = given["shape"], given["owner"]
    rows = shape["batch"] * shape["queries"]

    def together(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return q // shape["queries"] == owner[k]

    if rows * len(owner) > _MOST_MASK:
        raise MemoryError(f"its block mask starts from a dense matrix of {rows} x {len(owner)}")
    torch.compiler.reset()  # a compilation per case, of which it allows eight
    blocks = create_block_mask(together, None, None, rows, len(owner), device=str(query.device))
    compiled = torch.compile(flex_attention, dynamic=False)

    def forward() -> Tensor:
        q = query if given["query_offsets"] is not None else query.repeat(shape["batch"], 1, 1)
        q, k, v = (x.transpose(0, 1)[None] for x in (q, _all_rows(given, keys), _all_rows(given, values)))
        return compiled(q, k, v, block_mask=blocks)[0].transpose(0, 1)

    return in_mode(forward, leaves, given["grad"], mode)


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
