"""From the op's terms to the loss: O(N) arithmetic, differentiable, the same for one process and for many."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..schemas import statistics_dtype
from .autograd import Problem, Terms, terms


class InfoNCEStats(NamedTuple):
    """The row direction of an InfoNCE loss, detached; each `[Nq]`.

    `lse`: log-sum-exp over all kept keys, the positive among them; `positive`: S_{i,t_i} (both float32; float64 for
    float64 inputs); `rank` (int64): kept negatives strictly above the positive; `correct` (bool): rank is 0. A row
    without a term holds −inf, −inf, −1 and False.
    """

    lse: Tensor
    positive: Tensor
    rank: Tensor
    correct: Tensor


def softplus(x: Tensor) -> Tensor:
    """log(1 + eˣ), exact on both sides; `torch.nn.functional.softplus` turns linear at 20, which float64 sees."""
    return -logsigmoid(-x)


def has_term(problem: Problem) -> Tensor | None:
    """bool [Nq]: which rows have a loss of their own; None if all do."""
    if problem.target is None and problem.query_mask is None and problem.key_mask is None:
        return None
    rows, keys = problem.query.shape[0], problem.key.shape[0]
    target = problem.target
    if target is None:
        target = torch.arange(rows, device=problem.query.device)
    found = (target >= 0) & (target < keys)
    if problem.query_mask is not None:
        found = found & problem.query_mask
    if problem.key_mask is not None and keys > 0:
        found = found & problem.key_mask[torch.where(found, target, 0)]
    return found


def row_losses(
    problem: Problem, result: Terms, found: Tensor | None, label_smoothing: float, log_q_of_positive: bool
) -> Tensor:
    """l_i [Nq]: the row term, or the mean of the row and the column term; 0 for a row without a term."""
    positive = result.positive
    if not log_q_of_positive and problem.log_q is not None and problem.key.shape[0] > 0:
        positive = positive + _log_q_of_target(problem, problem.log_q, found)
    row = softplus(result.row_lse - positive)
    if label_smoothing:
        uniform = torch.logaddexp(result.row_lse, result.positive) - result.total / result.kept.clamp_min(1)
        row = (1.0 - label_smoothing) * row + label_smoothing * uniform
    if not problem.symmetric:
        return row
    if problem.key.shape[0] == 0:
        # No positives, so nothing but zeros. The empty sum keeps the graph: a rank's backward must join the others'.
        return row + result.column_lse.sum()
    # An empty direction is −inf, hence a loss and a gradient of exactly 0.
    if problem.target is None:
        column_lse = result.column_lse[: problem.query.shape[0]]
    else:
        inside = (problem.target >= 0) & (problem.target < problem.key.shape[0])
        column_lse = result.column_lse[torch.where(inside, problem.target, 0)]
    if found is not None:
        column_lse = torch.where(found, column_lse, -torch.inf)
    return 0.5 * (row + softplus(column_lse - result.positive))


def _log_q_of_target(problem: Problem, log_q: Tensor, found: Tensor | None) -> Tensor:
    if problem.target is None:
        mine = log_q[: problem.query.shape[0]]
    else:
        mine = log_q[problem.target.clamp(0, problem.key.shape[0] - 1)]
    return mine if found is None else torch.where(found, mine, 0.0)


def weigh(losses: Tensor, weight: Tensor | None, found: Tensor | None) -> tuple[Tensor, Tensor | int]:
    """w_i·l_i, and Σ w_i over the rows that have a term."""
    if weight is None:
        return losses, losses.shape[0] if found is None else found.sum()
    if found is not None:
        weight = torch.where(found, weight, 0.0)
    return weight * losses, weight.sum()


def reduce(problem: Problem, weighted: Tensor, total_weight: Tensor | int, reduction: str) -> Tensor:
    """The loss in its own dtype; the mean is 0 where there is nothing to average."""
    if reduction != "none":
        weighted = weighted.sum()
    if reduction == "mean":
        if isinstance(total_weight, Tensor):
            weighted = weighted / torch.where(total_weight == 0, 1, total_weight)
        else:
            weighted = weighted / max(total_weight, 1)
    return weighted.to(statistics_dtype(problem.query.dtype))


def stats(problem: Problem, result: Terms, found: Tensor | None) -> InfoNCEStats:
    dtype = statistics_dtype(problem.query.dtype)
    lse = torch.logaddexp(result.row_lse, result.positive).detach().to(dtype)
    positive = result.positive.detach().to(dtype)
    if found is not None:
        lse, positive = torch.where(found, lse, -torch.inf), torch.where(found, positive, -torch.inf)
    return InfoNCEStats(lse, positive, result.rank, result.rank == 0)


def info_nce(
    problem: Problem,
    *,
    weight: Tensor | None,
    label_smoothing: float,
    reduction: str,
    workspace_bytes: int,
    return_stats: bool,
    log_q_of_positive: bool = True,
) -> tuple[Tensor, InfoNCEStats | None]:
    """One process: the whole batch is here."""
    found = has_term(problem)
    if problem.symmetric and found is not None:
        # No term anywhere: the columns that the op sums have no target either, so nothing of these is read.
        some = found.any().expand(found.shape)
        problem = problem._replace(query_mask=some if problem.query_mask is None else problem.query_mask & some)
    result = terms(problem, need_total=label_smoothing > 0, need_rank=return_stats, workspace_bytes=workspace_bytes)
    losses = row_losses(problem, result, found, label_smoothing, log_q_of_positive)
    weighted, total_weight = weigh(losses, weight, found)
    value = reduce(problem, weighted, total_weight, reduction)
    return value, stats(problem, result, found) if return_stats else None
