"""InfoNCE: the autograd function around the raw ops.

Its outputs are the log-sum-exps and the positives; the loss is O(N) torch arithmetic on them, so every reduction,
weight and smoothing reaches the one backward as four vectors of gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import library, schemas


class Problem(NamedTuple):
    """The arguments that `_infonce_forward` and `_infonce_backward` share, in the order of their schemas."""

    query: Tensor
    key: Tensor
    scale: Tensor
    target: Tensor | None
    query_mask: Tensor | None
    key_mask: Tensor | None
    query_ids: Tensor | None
    key_ids: Tensor | None
    exclude_offsets: Tensor | None
    exclude_positions: Tensor | None
    log_q: Tensor | None
    symmetric: bool
    normalize: bool
    positives_elsewhere: bool = False


class Terms(NamedTuple):
    """What the loss is made of: all `[Nq]` but `column_lse [Nk]`; `[0]` where not asked for.

    `total` and `kept` are the sum and the number of a row's kept logits, the positive among them.
    """

    positive: Tensor
    row_lse: Tensor
    column_lse: Tensor
    total: Tensor
    kept: Tensor
    rank: Tensor


def terms(problem: Problem, *, need_total: bool, need_rank: bool, workspace_bytes: int) -> Terms:
    """Run the forward, with autograd only if a gradient is needed."""
    differentiable = (problem.query, problem.key, problem.scale, problem.log_q)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in differentiable):
        return Terms(*_InfoNCE.apply(*_distinct(problem), need_total, need_rank, workspace_bytes))
    detached = library.detached(problem)
    outputs = library.call(schemas.infonce_forward, *detached, None, need_total, need_rank, False, workspace_bytes)
    return Terms(*outputs[:6])


def _distinct(arguments: Sequence[Any]) -> list[Any]:
    """A tensor that comes twice (a batch against itself, one mask for both sides) as two: torch.compile needs that."""
    distinct: list[Any] = []
    for argument in arguments:
        twice = isinstance(argument, Tensor) and any(argument is other for other in distinct)
        distinct.append(argument.view_as(argument) if twice else argument)
    return distinct


def asked_for(grads: Sequence[Tensor | None], symmetric: bool, need_total: bool) -> list[Tensor | None]:
    """The gradients of positive, row_lse, column_lse and total; None where that is empty.

    torch.compile hands over zeros for what nobody used, the empty outputs too.
    """
    used = (True, True, symmetric, need_total)
    return [g.contiguous() if here and g is not None else None for g, here in zip(grads[:4], used, strict=True)]


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        *problem, need_total, need_rank, workspace_bytes = args
        # The GPU kernels keep nothing of size Nq·Nk: they make the logits again.
        save = not problem[0].is_cuda
        *outputs, _, saved = library.call(
            schemas.infonce_forward, *problem, None, need_total, need_rank, save, workspace_bytes
        )
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(outputs[4], outputs[5])
        ctx.save_for_backward(*problem[:11], outputs[1], outputs[2], saved)
        ctx.flags = problem[11:]
        ctx.need_total, ctx.workspace_bytes = need_total, workspace_bytes
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *tensors, row_lse, column_lse, saved = ctx.saved_tensors
        upstream = asked_for(grads, ctx.flags[0], ctx.need_total)
        needs = [ctx.needs_input_grad[i] for i in (0, 1, 2, 10)]
        dquery, dkey, dscale, dlog_q = library.call(
            schemas.infonce_backward, *upstream, *tensors, *ctx.flags, row_lse, column_lse, saved, *needs,
            ctx.workspace_bytes,
        )  # fmt: skip
        results: list[Tensor | None] = [None] * 17
        for place, needed, grad in zip((0, 1, 2, 10), needs, (dquery, dkey, dscale, dlog_q), strict=True):
            results[place] = grad if needed else None
        return tuple(results)
