"""`info_nce` beside cross-entropy over a matrix of logits, eager and chunked.

Two kinds of cases: `keys = queries`, symmetric, as in contrastive alignment; more keys than queries, one direction, as
in the full softmax of a recommender over its catalogue.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from ..infonce import info_nce
from .case import MODES, Call, Case, Inputs, Provider, Work, against, generator, in_mode, leaf, our_name, torch_dtype

OP = "infonce"
DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("float32", "bfloat16", "float16")}
_SCALE = 20.0
SHAPES = {
    "small": ((256, 256, 32), (64, 1000, 32)),
    "full": ((1024, 1024, 64), (4096, 4096, 128), (8192, 8192, 256), (512, 12_000, 64)),
}  # queries, keys, width


def cases(shapes: str, device: str, dtypes: Sequence[str], modes: Sequence[str] = MODES) -> list[Case]:
    """One case per shape, dtype and mode."""
    return [case(shape, dtype, device, mode) for shape in SHAPES[shapes] for dtype in dtypes for mode in modes]


def case(shape: tuple[int, int, int], dtype: str, device: str, mode: str) -> Case:
    """The case of `queries, keys, width`. One product forward, two backward; embeddings and their gradients once."""
    queries, keys, width = shape
    embeddings = (queries + keys) * width * torch_dtype(dtype).itemsize
    product = 2 * queries * keys * width
    work = {
        "forward": Work(product, embeddings, 4),
        "backward": Work(2 * product, embeddings, embeddings),
        "full": Work(3 * product, embeddings, embeddings),
    }[mode]
    peers = [Provider("torch cross_entropy over logits", _eager)]
    if dtype != "float32":
        peers.append(Provider("torch cross_entropy over float32 logits of the same product", _eager_float32))
    if mode != "backward":  # its backward uses its buffers up
        peers.append(Provider("torch linear_cross_entropy, chunked", _linear))
    return Case(
        OP,
        {"queries": queries, "keys": keys, "width": width},
        dtype,
        device,
        mode,
        work,
        (Provider(our_name("_infonce_forward", device), _ours, ours=True), *peers),
        inputs=lambda: inputs(shape, dtype, device),
        judge=lambda given: against(_oracle(given, mode)),
        compute_dtype=torch_dtype(dtype),
    )


def inputs(shape: tuple[int, int, int], dtype: str, device: str) -> Inputs:
    """Unit vectors, a query near the key that it wants; temperature 1/20; a loss weighted by 0.7 upstream."""
    queries, keys, width = shape
    random = generator(device)
    key = normalize(torch.randn(keys, width, generator=random, device=device), dim=1)
    noise = torch.randn(queries, width, generator=random, device=device) / width**0.5
    target = torch.randperm(keys, generator=random, device=device)[:queries] if keys != queries else None
    query = normalize((key if target is None else key[target]) + noise, dim=1)
    return {
        "query": query.to(torch_dtype(dtype)),
        "key": key.to(torch_dtype(dtype)),
        "target": target,
        "grad": torch.tensor(0.7, device=device),
    }


def _ours(given: Inputs, mode: str, dtype: torch.dtype | None = None) -> Call:
    query, key = leaves = [leaf(given["query"], dtype), leaf(given["key"], dtype)]
    target = given["target"]
    grad = given["grad"].to(torch.float64 if dtype == torch.float64 else torch.float32)
    symmetric = target is None
    return in_mode(lambda: info_nce(query, key, scale=_SCALE, target=target, symmetric=symmetric), leaves, grad, mode)


def _target(given: Inputs) -> Tensor:
    target = given["target"]
    return torch.arange(given["query"].shape[0], device=given["query"].device) if target is None else target


def _over_logits(given: Inputs, mode: str, logits_dtype: torch.dtype) -> Call:
    query, key = leaves = [leaf(given["query"]), leaf(given["key"])]
    target = _target(given)

    def loss() -> Tensor:
        logits = (_SCALE * (query @ key.T)).to(logits_dtype)
        row = cross_entropy(logits, target)
        return row if given["target"] is not None else (row + cross_entropy(logits.T, target)) / 2

    return in_mode(loss, leaves, given["grad"].to(logits_dtype), mode)


def _eager(given: Inputs, mode: str) -> Call:
    return _over_logits(given, mode, given["query"].dtype)


def _eager_float32(given: Inputs, mode: str) -> Call:
    return _over_logits(given, mode, torch.float32)


def _linear(given: Inputs, mode: str) -> Call:
    """torch ≥ 2.13: logits in chunks, never whole; two calls for the two directions."""
    from torch.nn import LinearCrossEntropyOptions
    from torch.nn.functional import linear_cross_entropy

    query, key = leaves = [leaf(given["query"]), leaf(given["key"])]
    target, options = _target(given), LinearCrossEntropyOptions()

    def loss() -> Tensor:
        row = linear_cross_entropy(query * _SCALE, key, target, options=options)
        if given["target"] is not None:
            return row
        return (row + linear_cross_entropy(key * _SCALE, query, target, options=options)) / 2

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it warns where it falls back to whole logits
        dtype = loss().dtype
    return in_mode(loss, leaves, given["grad"].to(dtype), mode)


def _oracle(given: Inputs, mode: str) -> Sequence[Tensor]:
    return _ours({name: None if x is None else x.cpu() for name, x in given.items()}, mode, torch.float64)()
