"""The terms of an InfoNCE over a process group with the keys in a ring: nobody holds the keys of all ranks.

At step s rank r multiplies its rows with the keys of rank r − s, while those of the next step come from rank r − 1 and
these go on to rank r + 1. A row's parts are put together over the steps: log-sum-exps, totals, and ranks counted
against the positive that step 0 found. The backward goes round once more; behind each rank's keys travels the sum of
their gradients, which every rank adds to, and comes home after the last step. At most three ranks' keys are held at a
time, and three ranks' gradients: those at hand, those that go on and those that come.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import library, schemas
from .autograd import Problem, Terms, asked_for

_PER_KEY = ("key", "key_mask", "key_ids", "log_q")  # what travels
_KEY_TAG, _SUM_TAG = 0, len(_PER_KEY)
_ANY_SIZE = 2**62


def terms(
    problem: Problem, has_term: Tensor | None, counts: list[int], group: dist.ProcessGroup, *, need_total: bool,
    need_rank: bool, workspace_bytes: int,
) -> Terms:  # fmt: skip
    """As `autograd.terms` of this rank's rows and all ranks' keys; `column_lse` is in order of rank.

    `problem` is this rank's own; `query_ids` are given if `key_ids` are. `has_term` is None if all rows have one.
    """
    differentiable = (problem.query, problem.key, problem.scale, problem.log_q)
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in differentiable)
    return Terms(*_Ring.apply(*problem, has_term, counts, group, need_total, need_rank, save, workspace_bytes))


class _Neighbours:
    """The next rank of the ring, which is sent to, and the previous one, which is received from."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)
        self.next = dist.get_global_rank(group, (self.rank + 1) % self.size)
        self.previous = dist.get_global_rank(group, (self.rank - 1) % self.size)

    def owner(self, step: int) -> int:
        """The rank whose keys are here at a step."""
        return (self.rank - step) % self.size

    def pass_on(self, tensors: Sequence[Tensor | None], count: int, first_tag: int) -> _Coming:
        """Send tensors on, and receive such of `count` rows. Tags tell apart what is under way at the same time."""
        dtypes = [None if t is None else t.dtype for t in tensors]
        if self.size == 1:
            return _Coming([], [], list(tensors), dtypes)
        sent = [None if t is None else t.view(torch.uint8) if t.dtype == torch.bool else t for t in tensors]
        received = [None if t is None else t.new_empty(count, *t.shape[1:]) for t in sent]
        operations = []
        for tag, (out, into) in enumerate(zip(sent, received, strict=True), first_tag):
            if out is not None and out.numel() > 0:
                operations.append(dist.P2POp(dist.isend, out, self.next, self.group, tag))
            if into is not None and into.numel() > 0:
                operations.append(dist.P2POp(dist.irecv, into, self.previous, self.group, tag))
        works = dist.batch_isend_irecv(operations) if operations else []
        return _Coming(works, sent, received, dtypes)


class _Coming:
    """What is being received; holds what is being sent."""

    def __init__(
        self, works: list[Any], sent: list[Tensor | None], received: list[Tensor | None], dtypes: list[Any]
    ) -> None:
        self._works, self._sent, self._received, self._dtypes = works, sent, received, dtypes

    def wait(self) -> list[Tensor | None]:
        for work in self._works:
            work.wait()
        self._sent = []
        return [
            None if t is None else t if t.dtype == dtype else t.view(dtype)
            for t, dtype in zip(self._received, self._dtypes, strict=True)
        ]


def _at_step(own: Problem, has_term: Tensor | None, step: int, keys: Sequence[Tensor | None]) -> Problem:
    """The rows here against the keys that are here at a step."""
    key, key_mask, key_ids, log_q = keys
    if step == 0 or key is None:
        return own
    return own._replace(
        key=key,
        key_mask=key_mask,
        key_ids=key_ids,
        log_q=log_q,
        target=None,
        query_mask=own.query_mask if own.symmetric else has_term,
        exclude_offsets=None,
        exclude_positions=None,
        positives_elsewhere=True,
    )


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        *fields, has_term, counts, group, need_total, need_rank, save, workspace_bytes = args
        own, ring = Problem(*fields), _Neighbours(group)
        rows, dtype = own.query.shape[0], own.query.dtype
        kept_bytes = sum(schemas.infonce_saved_bytes(rows, count, dtype, _ANY_SIZE) for count in counts)
        save = save and not own.query.is_cuda and kept_bytes <= workspace_bytes
        keys: list[Tensor | None] = [_whole(getattr(own, name)) for name in _PER_KEY]
        parts, reference = [], None
        for step in range(ring.size):
            coming = ring.pass_on(keys, counts[ring.owner(step + 1)], _KEY_TAG) if step + 1 < ring.size else None
            *outputs, found, saved = library.call(
                schemas.infonce_forward, *_at_step(own, has_term, step, keys), reference, need_total, need_rank, save,
                workspace_bytes,
            )  # fmt: skip
            reference = found if need_rank else None
            parts.append((Terms(*outputs), saved))
            keys = coming.wait() if coming is not None else keys
        steps = [part for part, _ in parts]
        row_lse = torch.logsumexp(torch.stack([part.row_lse for part in steps]), 0)
        total, kept, rank = (
            torch.stack(x).sum(0) for x in zip(*((part.total, part.kept, part.rank) for part in steps), strict=True)
        )
        if has_term is not None:  # rows without one are summed as well, where columns need them
            row_lse = row_lse.masked_fill(~has_term, -torch.inf)
            total, kept = (x.masked_fill(~has_term, 0) if need_total else x for x in (total, kept))
            rank = rank.masked_fill(~has_term, -1) if need_rank else rank
        by_rank = [steps[(ring.rank - owner) % ring.size].column_lse for owner in range(ring.size)]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(kept, rank)
        ctx.save_for_backward(
            *own[:11], has_term, row_lse, *(part.column_lse for part in steps), *(saved for _, saved in parts)
        )
        ctx.flags, ctx.counts, ctx.group = own[11:], counts, group
        ctx.need_total, ctx.workspace_bytes = need_total, workspace_bytes
        return steps[0].positive, row_lse, torch.cat(by_rank), total, kept, rank

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors, ring = ctx.saved_tensors, _Neighbours(ctx.group)
        own, has_term, row_lse = Problem(*tensors[:11], *ctx.flags), tensors[11], tensors[12]
        column_lse, saved = tensors[13 : 13 + ring.size], tensors[13 + ring.size :]
        positive, row, column, total = asked_for(grads, own.symmetric, ctx.need_total)
        if has_term is not None:
            row, total = (None if g is None else g.masked_fill(~has_term, 0.0) for g in (row, total))
        by_rank = [None] * ring.size if column is None else column.split(ctx.counts)
        needs = [ctx.needs_input_grad[i] for i in (0, 1, 2, 10)]
        keys: list[Tensor | None] = [_whole(getattr(own, name)) for name in _PER_KEY]
        of_rows: list[Tensor | None] = [None, None]
        sums: list[Tensor | None] = [None, None]
        coming_sums: _Coming | None = None
        for step in range(ring.size):
            coming = ring.pass_on(keys, ctx.counts[ring.owner(step + 1)], _KEY_TAG) if step + 1 < ring.size else None
            dquery, dkey, dscale, dlog_q = library.call(
                schemas.infonce_backward, positive if step == 0 else None, row, by_rank[ring.owner(step)], total,
                *_at_step(own, has_term, step, keys), row_lse, column_lse[step], saved[step], *needs,
                ctx.workspace_bytes,
            )  # fmt: skip
            of_rows = _add(of_rows, (dquery, dscale), (needs[0], needs[2]))
            sums = sums if coming_sums is None else coming_sums.wait()
            coming_sums = ring.pass_on(
                _add(sums, (dkey, dlog_q), (needs[1], needs[3])), ctx.counts[ring.owner(step + 1)], _SUM_TAG
            )
            sums = [None, None]
            del dkey, dlog_q
            keys = coming.wait() if coming is not None else keys
        of_keys = sums if coming_sums is None else coming_sums.wait()
        results: list[Tensor | None] = [None] * (len(Problem._fields) + 7)
        found = (of_rows[0], of_keys[0], of_rows[1], of_keys[1])
        for place, like, gradient in zip((0, 1, 2, 10), (own.query, own.key, own.scale, own.log_q), found, strict=True):
            results[place] = None if gradient is None or like is None else gradient.to(like.dtype)
        return tuple(results)


def _whole(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _add(sums: Sequence[Tensor | None], shares: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor | None]:
    """Sums of what is needed, at least in float32: half-precision shares are rounded once more at the end."""
    added: list[Tensor | None] = []
    for so_far, share, need in zip(sums, shares, needed, strict=True):
        wide = share.to(torch.promote_types(share.dtype, torch.float32))
        added.append(None if not need else wide if so_far is None else so_far.add_(wide))
    return added
