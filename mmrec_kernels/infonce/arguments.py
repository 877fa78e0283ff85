"""InfoNCE: checks of the public functions' arguments; each raises a ValueError or TypeError that names the argument."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..schemas import statistics_dtype
from ..validation import check_choice, check_float, check_index, check_positive_int, check_tensor
from .autograd import Problem

WORKSPACE_BYTES = 2**30
REDUCTIONS = ("mean", "sum", "none")


def check_options(label_smoothing: float, reduction: str, workspace_bytes: int | None) -> int:
    """The three options that both public functions share; returns the workspace in bytes."""
    if isinstance(label_smoothing, bool) or not isinstance(label_smoothing, int | float | torch.SymFloat):
        raise TypeError(f"label_smoothing must be a float, got {type(label_smoothing).__name__}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    check_choice("reduction", reduction, REDUCTIONS)
    return WORKSPACE_BYTES if workspace_bytes is None else check_positive_int("workspace_bytes", workspace_bytes)


def check_flag(name: str, value: object) -> bool:
    """`value` as a bool; a tensor would hide a host synchronisation."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")
    return value


def factors(name: str, value: float | Tensor, size: int, like: Tensor) -> Tensor:
    """A float, a 0-d or a `[size]` tensor as `[1]` or `[size]` in the statistics dtype, differentiable."""
    dtype = statistics_dtype(like.dtype)
    if isinstance(value, Tensor):
        if value.ndim > 1 or (value.ndim == 1 and value.shape[0] != size):
            raise ValueError(f"{name} must have shape [] or [{size}], got {list(value.shape)}")
        return check_float(name, value.reshape(-1), (None,), device=like.device).to(dtype)
    if isinstance(value, bool) or not isinstance(value, int | float | torch.SymFloat | torch.SymInt):
        raise TypeError(f"{name} must be a float or a tensor, got {type(value).__name__}")
    if not torch.compiler.is_compiling() and not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    return torch.full((1,), value, dtype=dtype, device=like.device)


def check_weight(weight: Tensor | None, like: Tensor) -> Tensor | None:
    """Row weights `[N]` in the statistics dtype."""
    if weight is None:
        return None
    return check_float("weight", weight, (like.shape[0],), device=like.device).to(statistics_dtype(like.dtype))


def problem(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | Tensor,
    symmetric: bool,
    target: Tensor | None,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    exclude: tuple[Tensor, Tensor] | None,
    log_q: Tensor | None,
    normalize: bool,
) -> Problem:
    """The arguments of `info_nce` as those of the raw op."""
    check_float("query", query, ("Nq", "D"))
    device, rows = query.device, query.shape[0]
    check_tensor("key", key, ("Nk", query.shape[1]), (query.dtype,), device=device)
    keys = key.shape[0]
    if target is not None:
        target = check_index("target", target, (rows,), device=device)
    elif keys < rows:
        raise ValueError(f"key must have at least as many rows as query unless target is given, got {keys} and {rows}")
    if key_ids is not None:
        key_ids = check_index("key_ids", key_ids, (keys,), device=device)
    if query_ids is not None:
        if key_ids is None:
            raise ValueError("query_ids must be None unless key_ids is given, got a tensor")
        query_ids = check_index("query_ids", query_ids, (rows,), device=device)
    offsets = positions = None
    if exclude is not None:
        if not isinstance(exclude, tuple | list) or len(exclude) != 2:
            raise TypeError(f"exclude must be a pair (offsets, positions), got {type(exclude).__name__}")
        offsets = check_index("exclude[0]", exclude[0], (rows + 1,), device=device)
        positions = check_index("exclude[1]", exclude[1], ("L",), device=device)
    if log_q is not None:
        log_q = check_float("log_q", log_q, (keys,), device=device).to(statistics_dtype(query.dtype))
    return Problem(
        query, key, factors("scale", scale, rows, query), target, None, None, query_ids, key_ids, offsets, positions,
        log_q, check_flag("symmetric", symmetric), check_flag("normalize", normalize),
    )  # fmt: skip


def check_pairs(
    embeddings: Mapping[str, Tensor], pairs: Sequence[tuple[str, str]], mask: Mapping[str, Tensor] | None
) -> Tensor:
    """Names, shapes and dtypes of modalities and their masks; returns the first modality."""
    for name, named in (("embeddings", embeddings), ("mask", {} if mask is None else mask)):
        if not isinstance(named, Mapping):
            raise TypeError(f"{name} must be a dict of tensors, got {type(named).__name__}")
    if not embeddings:
        raise ValueError("embeddings must name at least one tensor, got none")
    if isinstance(pairs, str) or not isinstance(pairs, Sequence):
        raise TypeError(f"pairs must be a list of (name, name), got {type(pairs).__name__}")
    if not pairs:
        raise ValueError("pairs must hold at least one (name, name), got none")
    for name, value in embeddings.items():
        check_float(f"embeddings[{name!r}]", value, ("N", "D"))
    first = next(iter(embeddings.values()))
    for name, value in embeddings.items():
        check_tensor(f"embeddings[{name!r}]", value, (first.shape[0], None), (first.dtype,), device=first.device)
    for pair in pairs:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise ValueError(f"pairs must hold (name, name), got {pair!r}")
        for name in pair:
            if name not in embeddings:
                raise ValueError(f"pairs must name one of {', '.join(embeddings)}, got {name!r}")
        width, other = (embeddings[name].shape[1] for name in pair)
        if width != other:
            raise ValueError(f"embeddings[{pair[1]!r}] must have width {width} to pair with {pair[0]!r}, got {other}")
    for name, present in (mask or {}).items():
        if name not in embeddings:
            raise ValueError(f"mask must name one of {', '.join(embeddings)}, got {name!r}")
        check_tensor(f"mask[{name!r}]", present, (first.shape[0],), (torch.bool,), device=first.device)
    return first
