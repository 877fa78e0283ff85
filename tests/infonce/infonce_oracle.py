"""InfoNCE as its contract states it, one scalar at a time: slow, and free of the package's own arithmetic."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def log_sum_exp(values: list[Tensor]) -> Tensor:
    return torch.logsumexp(torch.stack(values), 0)


def softplus_of_difference(negatives: list[Tensor], positive: Tensor) -> Tensor:
    if not negatives:
        return positive * 0
    return torch.logaddexp(log_sum_exp(negatives) - positive, torch.zeros_like(positive))


def naive(
    query: Tensor,
    key: Tensor,
    *,
    scale: Any = 1.0,
    symmetric: bool = True,
    target: Tensor | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    exclude: tuple[Tensor, Tensor] | None = None,
    log_q: Tensor | None = None,
    log_q_of_positive: bool = True,
    weight: Tensor | None = None,
    normalize: bool = False,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> tuple[Tensor, list[tuple[Any, Any, int]]]:
    """(loss, [(lse, positive, rank) of each row, None for a row without a term])."""
    rows, keys = query.shape[0], key.shape[0]
    targets = list(range(rows)) if target is None else target.tolist()

    def unit(x: Tensor) -> Tensor:
        norm = x.pow(2).sum().sqrt() if bool((x != 0).any()) else None
        return x * 0 if norm is None else x / norm.clamp_min(1e-12)

    q = [unit(query[i]) if normalize else query[i] for i in range(rows)]
    k = [unit(key[j]) if normalize else key[j] for j in range(keys)]

    def excluded(i: int, j: int) -> bool:
        if j == targets[i]:
            return False
        if key_ids is not None:
            wanted = query_ids[i] if query_ids is not None else key_ids[targets[i]] if targets[i] >= 0 else -1
            if int(key_ids[j]) == int(wanted) >= 0:
                return True
        if exclude is not None:
            offsets, positions = exclude
            return j in positions[int(offsets[i]) : int(offsets[i + 1])].tolist()
        return False

    def logit(i: int, j: int) -> Tensor:
        factor = scale if not isinstance(scale, Tensor) or scale.ndim == 0 else scale[i]
        value = factor * (q[i] * k[j]).sum()
        return value if log_q is None else value - log_q[j]

    losses, weights, stats = [], [], []
    for i in range(rows):
        t = targets[i]
        if t < 0:
            losses.append(torch.zeros((), dtype=query.dtype))
            weights.append(torch.zeros((), dtype=query.dtype))
            stats.append(None)
            continue
        positive = logit(i, t)
        negatives = [logit(i, j) for j in range(keys) if j != t and not excluded(i, j)]
        sampled = log_q is None or log_q_of_positive
        row = softplus_of_difference(negatives, positive if sampled else positive + log_q[t])
        every = [*negatives, positive]
        numbers = [n.item() for n in negatives]
        stats.append((log_sum_exp(every).item(), positive.item(), sum(n > positive.item() for n in numbers)))
        if label_smoothing:
            smooth = log_sum_exp(every) - torch.stack(every).mean()
            row = (1 - label_smoothing) * row + label_smoothing * smooth
        if symmetric:
            column = [logit(i2, t) for i2 in range(rows) if targets[i2] != t and not excluded(i2, t)]
            row = (row + softplus_of_difference(column, positive)) / 2
        losses.append(row)
        weights.append(torch.ones((), dtype=query.dtype) if weight is None else weight[i])
    if rows == 0:
        empty = query.sum() * 0
        return (query.new_zeros(0) if reduction == "none" else empty), stats
    weighted = torch.stack(losses) * torch.stack(weights)
    if reduction == "none":
        return weighted, stats
    total, count = weighted.sum(), torch.stack(weights).sum()
    if reduction == "sum":
        return total, stats
    return (total / count if count.item() != 0 else total * 0), stats


def eager(query: Tensor, key: Tensor, *, scale: Any = 1.0, symmetric: bool = True) -> Tensor:
    """What a user writes in plain torch, in the inputs' own dtype."""
    logits = (query * scale).to(query.dtype) @ key.T
    labels = torch.arange(query.shape[0])
    row = torch.nn.functional.cross_entropy(logits, labels)
    if not symmetric:
        return row
    return (row + torch.nn.functional.cross_entropy(logits[:, : query.shape[0]].T, labels)) / 2
