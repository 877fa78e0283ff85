"""InfoNCE over a process group: negatives from every rank, each block of logits computed once.

Rank r makes the logits of its own rows against the keys of all ranks, gathered or in a ring (`ring.py`). The row
direction is complete there; of the column direction it has a partial log-sum-exp for every key, and the rank that owns
a key combines the partials. All else is the one-process loss. Every gather's backward, and the ring's, sums over the
ranks, so the backward gives d(Σ_r loss_r).

With reduction "mean" rank r returns W · Σ_{i∈r} w_i·l_i / Σ_all w_i over W ranks: after the averaging of DDP or FSDP,
the gradients of parameters and of a shared scale equal those of one process with the whole batch. With "sum" and "none"
a rank returns what its own rows hold.

Every rank of the group must make the same calls, the backward too; counts of rows may differ and may be 0.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import ring
from .autograd import Problem, terms
from .contents import check_contents
from .loss import InfoNCEStats, has_term, reduce, row_losses, stats, weigh


def over(group: dist.ProcessGroup, in_ring: bool) -> Callable[..., tuple[Tensor, InfoNCEStats | None]]:
    """`loss.info_nce` with the rows and keys of every rank of `group`; `in_ring`: keys travel, nobody gathers them."""
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a torch.distributed.ProcessGroup, got {type(group).__name__}")
    return partial(_info_nce, group, in_ring)


def _info_nce(
    group: dist.ProcessGroup,
    in_ring: bool,
    problem: Problem,
    *,
    weight: Tensor | None,
    label_smoothing: float,
    reduction: str,
    workspace_bytes: int,
    return_stats: bool,
    log_q_of_positive: bool = True,
) -> tuple[Tensor, InfoNCEStats | None]:
    options = {"label_smoothing": label_smoothing, "reduction": reduction, "log_q_of_positive": log_q_of_positive}
    counts = _agree(group, problem, weight, {**options, "ring": in_ring})
    ranks, ones = len(counts), [1] * len(counts)
    offset = sum(counts[: dist.get_rank(group)])
    found = has_term(problem)
    whole = _with_query_ids(problem, found) if in_ring else _with_all_keys(problem, offset, counts, group)
    find_terms = partial(ring.terms, has_term=found, counts=counts, group=group) if in_ring else terms
    result = find_terms(whole, need_total=label_smoothing > 0, need_rank=return_stats, workspace_bytes=workspace_bytes)
    if problem.symmetric:
        partials = all_gather_rows(result.column_lse[None], ones, group)
        mine = partials[:, offset : offset + problem.key.shape[0]]
        result = result._replace(column_lse=_log_sum_exp(mine))
    losses = row_losses(problem, result, found, label_smoothing, log_q_of_positive)
    weighted, total_weight = weigh(losses, weight, found)
    if reduction == "mean":
        total_weight = torch.as_tensor(total_weight, dtype=losses.dtype, device=losses.device)
        total_weight = all_gather_rows(total_weight.reshape(1), ones, group).sum() / ranks
    value = reduce(problem, weighted, total_weight, reduction)
    return value, stats(problem, result, found) if return_stats else None


def _with_all_keys(problem: Problem, offset: int, counts: list[int], group: dist.ProcessGroup) -> Problem:
    """This rank's rows against the keys of all ranks."""

    def gathered(tensor: Tensor | None) -> Any:
        return None if tensor is None else all_gather_rows(tensor, counts, group)

    def shifted(index: Tensor | None) -> Tensor | None:
        if index is None:
            return None
        return torch.where((index >= 0) & (index < problem.key.shape[0]), index + offset, -1)

    target = problem.target
    if target is None:
        target = torch.arange(problem.query.shape[0], device=problem.query.device)
    return problem._replace(
        key=gathered(problem.key),
        target=shifted(target),
        key_mask=gathered(problem.key_mask),
        key_ids=gathered(problem.key_ids),
        exclude_positions=shifted(problem.exclude_positions),
        log_q=gathered(problem.log_q),
    )


def _with_query_ids(problem: Problem, found: Tensor | None) -> Problem:
    """The ids that rows want, which other ranks' keys do not tell."""
    if problem.key_ids is None or problem.query_ids is not None:
        return problem
    rows, keys = problem.query.shape[0], problem.key.shape[0]
    if keys == 0:
        return problem._replace(query_ids=problem.key_ids.new_full((rows,), -1))
    wanted = problem.key_ids[:rows] if problem.target is None else problem.key_ids[problem.target.clamp(0, keys - 1)]
    return problem._replace(query_ids=wanted if found is None else torch.where(found, wanted, -1))


def _agree(group: dist.ProcessGroup, problem: Problem, weight: Tensor | None, options: dict[str, Any]) -> list[int]:
    """The number of keys of each rank. If a rank's arguments are wrong or unlike the others', every rank raises."""
    error = None
    try:
        check_contents(problem.key.shape[0], problem.target, problem.exclude_offsets, problem.exclude_positions)
    except ValueError as found:
        error = found
    everyone: list[Any] = [None] * dist.get_world_size(group)
    mine = _described(problem, weight, options)
    dist.all_gather_object(everyone, (problem.key.shape[0], mine, error is None), group)
    if error is not None:
        raise error
    for rank, (_, theirs, fine) in enumerate(everyone):
        if not fine:
            raise ValueError(f"group needs valid arguments on every rank, got wrong ones on rank {rank}")
        for name, value in mine.items():
            if theirs[name] != value:
                raise ValueError(
                    f"group needs the same {name} on every rank, got {theirs[name]} on rank {rank} and {value} here"
                )
    return [count for count, _, _ in everyone]


def _described(problem: Problem, weight: Tensor | None, options: dict[str, Any]) -> dict[str, Any]:
    """What the collectives depend on. A gather's backward is one too: a rank without it leaves the others waiting."""
    tensors = {"query": problem.query, "key": problem.key, "scale": problem.scale, "key_ids": problem.key_ids,
               "mask": problem.key_mask, "log_q": problem.log_q, "weight": weight}  # fmt: skip
    described = {"dtype": str(problem.key.dtype), "width": problem.key.shape[1], "symmetric": problem.symmetric,
                 "normalize": problem.normalize, **options}  # fmt: skip
    for name, tensor in tensors.items():
        described[f"{name} (given or None)"] = tensor is not None
        needs_gradient = tensor is not None and tensor.requires_grad and torch.is_grad_enabled()
        described[f"requires_grad of {name}"] = needs_gradient
    return described


def _log_sum_exp(partials: Tensor) -> Tensor:
    """Along dim 0; −inf with gradient 0 where every partial is −inf."""
    highest = partials.detach().amax(0)
    highest = highest.masked_fill(highest == -torch.inf, 0.0)
    total = (partials - highest).exp().sum(0)
    empty = total == 0
    return torch.where(empty, -torch.inf, torch.where(empty, 1.0, total).log() + highest)


def all_gather_rows(own: Tensor, counts: list[int], group: dist.ProcessGroup) -> Tensor:
    """The rows of all ranks in order of rank; the backward sums the gradients over the ranks and keeps the own rows.

    Args:
        own: `[counts[rank], …]`, any dtype; it needs a gradient on every rank or on none.
        counts: rows of each rank, which all ranks know.
        group: whose ranks make the same calls, the backward too.
    """
    return _AllGather.apply(own, counts, group)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, counts: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.counts, ctx.dtype = group, counts, own.dtype
        # Collectives need equal sizes, and not every backend has bool.
        sent = own.new_zeros((max(counts), *own.shape[1:]))
        sent[: own.shape[0]] = own
        sent = sent.to(torch.uint8) if own.dtype == torch.bool else sent
        received = [torch.empty_like(sent) for _ in counts]
        dist.all_gather(received, sent, group)
        return torch.cat([part[:count] for part, count in zip(received, counts, strict=True)]).to(own.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        # Half-precision shares are summed in float32 and rounded once.
        wide = grad.to(torch.promote_types(grad.dtype, torch.float32), copy=True).contiguous()
        dist.all_reduce(wide, group=ctx.group)
        start = sum(ctx.counts[: dist.get_rank(ctx.group)])
        stop = start + ctx.counts[dist.get_rank(ctx.group)]
        return wide[start:stop].to(ctx.dtype, copy=True), None, None
