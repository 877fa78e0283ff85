"""`info_nce` beside cross-entropy over a matrix of logits, eager, compiled and chunked, and other libraries' losses.

`keys = queries`, symmetric, as in contrastive alignment; more keys than queries, one direction, as in the full softmax
of a recommender over its catalogue; `masked`: symmetric, with accidental hits by id, logQ and a temperature per row.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from ..infonce import info_nce
from .case import MODES, Call, Case, Inputs, Provider, Work, against, generator, in_mode, leaf, our_name, torch_dtype

OP = "infonce"
DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("float32", "bfloat16", "float16")}
_SCALE = 20.0
_SQUARE = (1024, 4096, 8192, 16384)
_WIDTHS = (64, 128, 256, 768)
Shape = tuple[int, int, int, bool]
SHAPES: dict[str, tuple[Shape, ...]] = {
    "small": ((256, 256, 32, False), (256, 256, 32, True), (64, 1000, 32, False)),
    "full": (
        (512, 12_000, 64, False),
        *((4096, 4096, width, True) for width in _WIDTHS),
        *((n, n, width, False) for n in _SQUARE for width in _WIDTHS),
    ),
}  # queries, keys, width, masked
_GPU_SHAPES: tuple[Shape, ...] = tuple((n, n, width, False) for n, width in ((32768, 256), (32768, 768), (65536, 768)))


def cases(shapes: str, device: str, dtypes: Sequence[str], modes: Sequence[str] = MODES) -> list[Case]:
    """One case per shape, dtype and mode."""
    chosen = SHAPES[shapes]
    if device == "cuda" and shapes == "full":
        chosen += _GPU_SHAPES
    return [case(shape, dtype, device, mode) for shape in chosen for dtype in dtypes for mode in modes]


def case(shape: Shape, dtype: str, device: str, mode: str) -> Case:
    """The case of `queries, keys, width, masked`. One product forward, two backward; embeddings and their gradients
    once."""
    queries, keys, width, masked = shape
    embeddings = (queries + keys) * width * torch_dtype(dtype).itemsize
    product = 2 * queries * keys * width
    work = {
        "forward": Work(product, embeddings, 4),
        "backward": Work(2 * product, embeddings, embeddings),
        "full": Work(3 * product, embeddings, embeddings),
    }[mode]
    return Case(
        OP,
        {"queries": queries, "keys": keys, "width": width, **({"masked": 1} if masked else {})},
        dtype,
        device,
        mode,
        work,
        tuple(_providers(dtype, device, mode, masked, queries == keys)),
        inputs=lambda: inputs(shape, dtype, device),
        judge=lambda given: against(_oracle(given, mode)),
        compute_dtype=torch_dtype(dtype),
    )


def _providers(dtype: str, device: str, mode: str, masked: bool, symmetric: bool) -> list[Provider]:
    name = our_name("_infonce_forward", device)
    found = [Provider(name, _ours, ours=True)]
    if mode != "forward":
        found.append(Provider(f"{name}, exponentials made again", _ours_again, ours=True))
    found += [
        Provider("torch cross_entropy over logits", _over_logits(None)),
        Provider("torch.compile of cross_entropy over logits", _over_logits(None, compiled=True)),
    ]
    if dtype != "float32":
        found.append(
            Provider("torch cross_entropy over float32 logits of the same product", _over_logits(torch.float32))
        )
    if masked:
        return found
    if mode != "backward":  # its backward uses its buffers up
        found.append(Provider("torch linear_cross_entropy, chunked", _linear))
        cut = "cut-cross-entropy, torch_compile" if device == "cpu" else "cut-cross-entropy, cce_exact"
        found.append(Provider(cut, _cut, module="cut_cross_entropy", install="cut-cross-entropy"))
        if device == "cuda":
            found.append(Provider("Inf-CL cal_flash_loss", _inf_cl, module="inf_cl", install="inf-cl"))
    if mode == "full" and device == "cuda":  # its forward makes the gradients
        liger = "Liger fused linear cross-entropy"
        found.append(Provider(liger, _liger, module="liger_kernel", install="liger-kernel"))
    if symmetric:
        found.append(Provider("open_clip ClipLoss", _open_clip, module="open_clip", install="open-clip-torch"))
        found.append(
            Provider(
                "sentence-transformers MultipleNegativesRankingLoss",
                _sentence_transformers,
                module="sentence_transformers",
                install="sentence-transformers",
            )
        )
    return found


def inputs(shape: Shape, dtype: str, device: str) -> Inputs:
    """Unit vectors, a query near the key that it wants; temperature 1/20; a loss weighted by 0.7 upstream."""
    queries, keys, width, masked = shape
    random = generator(device)
    key = normalize(torch.randn(keys, width, generator=random, device=device), dim=1)
    noise = torch.randn(queries, width, generator=random, device=device) / width**0.5
    target = torch.randperm(keys, generator=random, device=device)[:queries] if keys != queries else None
    query = normalize((key if target is None else key[target]) + noise, dim=1)
    options: dict[str, Tensor] = {}
    if masked:
        options = {
            "key_ids": torch.randint(0, keys // 2, (keys,), generator=random, device=device),
            "log_q": -5 * torch.rand(keys, generator=random, device=device),
            "scale": _SCALE * (0.5 + torch.rand(queries, generator=random, device=device)),
        }
    return {
        "query": query.to(torch_dtype(dtype)),
        "key": key.to(torch_dtype(dtype)),
        "target": target,
        "options": options,
        "grad": torch.tensor(0.7, device=device),
    }


def _ours(given: Inputs, mode: str, dtype: torch.dtype | None = None, workspace_bytes: int | None = None) -> Call:
    query, key = leaves = [leaf(given["query"], dtype), leaf(given["key"], dtype)]
    target = given["target"]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    options: dict[str, Any] = {"scale": _SCALE, **given["options"]}
    options = {n: v.to(wide) if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in options.items()}

    def loss() -> Tensor:
        return info_nce(query, key, target=target, symmetric=target is None, workspace_bytes=workspace_bytes, **options)

    return in_mode(loss, leaves, given["grad"].to(wide), mode)


def _ours_again(given: Inputs, mode: str) -> Call:
    """In a sixteenth of the memory that keeping them takes."""
    query = given["query"]
    return _ours(given, mode, workspace_bytes=query.shape[0] * given["key"].shape[0] * query.element_size() // 16)


def _target(given: Inputs) -> Tensor:
    target = given["target"]
    return torch.arange(given["query"].shape[0], device=given["query"].device) if target is None else target


def _over_logits(logits_dtype: torch.dtype | None, *, compiled: bool = False) -> Callable[[Inputs, str], Call]:
    """The logits as one matrix, in `logits_dtype` or that of the inputs, eager or compiled whole."""

    def make(given: Inputs, mode: str) -> Call:
        query, key = leaves = [leaf(given["query"]), leaf(given["key"])]
        target, options, dtype = _target(given), given["options"], logits_dtype or query.dtype
        hits = None
        if options:
            ids = options["key_ids"]
            hits = ids[target][:, None] == ids
            hits[torch.arange(len(target), device=ids.device), target] = False

        def forward(query: Tensor, key: Tensor) -> Tensor:
            if hits is None:
                logits = (_SCALE * (query @ key.T)).to(dtype)
            else:
                logits = (query @ key.T).to(dtype) * options["scale"].to(dtype)[:, None] - options["log_q"].to(dtype)
                logits = logits.masked_fill(hits, -torch.inf)
            row = cross_entropy(logits, target)
            return row if given["target"] is not None else (row + cross_entropy(logits.T, target)) / 2

        function = torch.compile(forward, dynamic=False) if compiled else forward
        return in_mode(lambda: function(query, key), leaves, given["grad"].to(dtype), mode)

    return make


def _both_ways(given: Inputs, mode: str, one_way: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Call:
    """A loss of one direction, called for each that the case has: scaled rows, the other side, targets."""
    query, key = leaves = [leaf(given["query"]), leaf(given["key"])]
    target = _target(given)

    def loss() -> Tensor:
        row = one_way(query * _SCALE, key, target)
        return row if given["target"] is not None else (row + one_way(key * _SCALE, query, target)) / 2

    return in_mode(loss, leaves, given["grad"].to(loss().dtype), mode)


def _linear(given: Inputs, mode: str) -> Call:
    """torch ≥ 2.13: logits in chunks, never whole; two calls for the two directions."""
    from torch.nn import LinearCrossEntropyOptions
    from torch.nn.functional import linear_cross_entropy

    options = LinearCrossEntropyOptions()

    def one_way(rows: Tensor, other: Tensor, target: Tensor) -> Tensor:
        return linear_cross_entropy(rows, other, target, options=options)

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it warns where it falls back to whole logits
        one_way(leaf(given["query"]), given["key"], _target(given))
    return _both_ways(given, mode, one_way)


def _cut(given: Inputs, mode: str) -> Call:
    from cut_cross_entropy import linear_cross_entropy

    impl = "cce_exact" if given["query"].is_cuda else "torch_compile"
    return _both_ways(given, mode, lambda rows, other, target: linear_cross_entropy(rows, other, target, impl=impl))


def _inf_cl(given: Inputs, mode: str) -> Call:
    """Its kernels multiply heads of up to 256 columns."""
    from inf_cl import cal_flash_loss

    head = min(given["query"].shape[1], 256)
    return _both_ways(given, mode, lambda rows, other, target: cal_flash_loss(rows, other, target, None, head).mean())


def _liger(given: Inputs, mode: str) -> Call:
    from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return _both_ways(given, mode, lambda rows, other, target: loss(other, rows, target))


def _open_clip(given: Inputs, mode: str) -> Call:
    """Its module of losses alone: the package needs a torchvision that fits torch's build."""
    package = importlib.util.find_spec("open_clip")
    assert package is not None and package.origin is not None
    spec = importlib.util.spec_from_file_location("open_clip_loss", Path(package.origin).with_name("loss.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    loss = module.ClipLoss()
    query, key = leaves = [leaf(given["query"]), leaf(given["key"])]
    scale = torch.tensor(_SCALE, dtype=query.dtype, device=query.device)
    return in_mode(lambda: loss(query, key, scale), leaves, given["grad"].to(query.dtype), mode)


def _sentence_transformers(given: Inputs, mode: str) -> Call:
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    from sentence_transformers.util import dot_score

    loss = MultipleNegativesRankingLoss(
        torch.nn.Identity(), scale=_SCALE, similarity_fct=dot_score, directions=("query_to_doc", "doc_to_query"),
        partition_mode="per_direction",
    )  # fmt: skip
    query, key = leaves = [leaf(given["query"]), leaf(given["key"])]

    def run() -> Tensor:
        return loss.compute_loss_from_embeddings([query, key], torch.empty(0))

    return in_mode(run, leaves, given["grad"].to(query.dtype), mode)


def _oracle(given: Inputs, mode: str) -> Sequence[Tensor]:
    def to_cpu(x: Any) -> Any:
        return {n: v.cpu() for n, v in x.items()} if isinstance(x, dict) else x if x is None else x.cpu()

    return _ours({name: to_cpu(x) for name, x in given.items()}, mode, torch.float64)()
