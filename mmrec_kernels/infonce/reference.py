"""InfoNCE: the mathematics, in plain torch and in any dtype. The oracle of the tests and the fallback.

    S_ij = scale_i · q_i · k_j − log_q_j      over the kept pairs; the positive of row i is (i, t_i)
    positive_i = S_{i,t_i}                    row_lse_i = LSE_{j ≠ t_i} S_ij
    total_i = Σ_j S_ij                        column_lse_j = LSE_{i: t_i ≠ j} S_ij

Both directions share their negatives: the kept pairs (i, j) with j ≠ t_i. With the gradients p, r, t, c of the four,

    dS_ij = r_i · e^{S_ij − row_lse_i} + c_j · e^{S_ij − column_lse_j} + t_i      dS_{i,t_i} = p_i + t_i
    u_i = Σ_j dS_ij k_j      dq_i = scale_i · u_i             dscale_i = q_i · u_i
                             dk_j = Σ_i dS_ij scale_i q_i     dlog_q_j = −Σ_i dS_ij

so the positive never meets the sum of exponentials, and a loss near zero loses nothing. The forward runs one GEMM over
the Nq×Nk logits and the backward two; the negatives' logits (−inf where left out) are kept while they fit the
workspace and the inputs are no narrower, else the backward makes them again in blocks of rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..schemas import infonce_saved_bytes, statistics_dtype, terms_dtype
from .contents import check_contents, comparable_ids, find_terms, listed_pairs

NORM_EPS = 1e-12
BLOCK_BYTES = 2**22


class _Problem(NamedTuple):
    """The inputs in the accumulation dtype. What nobody reads is zero in `query`, `key` and `scale`."""

    query: Tensor
    key: Tensor
    query_norm: Tensor | None
    key_norm: Tensor | None
    scale: Tensor
    scaled: Tensor
    log_q: Tensor | None
    target: Tensor
    has_positive: Tensor
    has_term: Tensor
    row_mask: Tensor | None
    key_mask: Tensor | None
    query_ids: Tensor | None
    key_ids: Tensor | None
    excluded: tuple[Tensor, Tensor] | None

    @property
    def sparse(self) -> bool:
        """Whether single pairs are left out, so that a key or a query may have no kept pair at all."""
        return self.key_ids is not None or self.excluded is not None


def forward(
    query: Tensor,
    key: Tensor,
    scale: Tensor,
    target: Tensor | None,
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    exclude_offsets: Tensor | None,
    exclude_positions: Tensor | None,
    log_q: Tensor | None,
    symmetric: bool,
    normalize: bool,
    positives_elsewhere: bool,
    rank_reference: Tensor | None,
    need_total: bool,
    need_rank: bool,
    save: bool,
    workspace_bytes: int,
) -> tuple[Tensor, ...]:
    """(positive, row_lse, column_lse, total, kept, rank, rank_reference, saved); rows without a term hold 0, −inf, 0, 0
    and −1."""
    rows, columns, dtype = query.shape[0], key.shape[0], statistics_dtype(query.dtype)
    wide = terms_dtype(query.device)
    positive = query.new_zeros(rows, dtype=wide)
    row_lse = query.new_full((rows,), -torch.inf, dtype=wide)
    column_lse = query.new_full((columns if symmetric else 0,), -torch.inf, dtype=wide)
    total = query.new_zeros(rows if need_total else 0, dtype=wide)
    kept = query.new_zeros(rows if need_total else 0, dtype=torch.int64)
    rank = query.new_full((rows if need_rank else 0,), -1, dtype=torch.int64)
    reference = query.new_zeros(rows if need_rank else 0, dtype=dtype)
    if need_rank and rank_reference is not None:
        reference.copy_(rank_reference)
    size = infonce_saved_bytes(rows, columns, query.dtype, workspace_bytes) if save else 0
    saved = query.new_empty(size, dtype=torch.uint8)
    kept_logits = _kept_logits(saved, rows, columns, query.dtype)
    with torch.autocast(query.device.type, enabled=False):
        p = _problem(query, key, scale, target, query_mask, key_mask, query_ids, key_ids, exclude_offsets,
                     exclude_positions, log_q, symmetric, normalize, positives_elsewhere)  # fmt: skip
        for block in _blocks(rows, columns, dtype, workspace_bytes):
            logits, found = _negatives(p, block, None if kept_logits is None else kept_logits[block])
            has_term = p.has_term[block]
            positive[block] = found
            row_lse[block] = torch.logsumexp(logits, 1).masked_fill_(~has_term, -torch.inf)
            if symmetric:
                column_lse = torch.logaddexp(column_lse, torch.logsumexp(logits, 0).to(wide))
            if need_total:
                negative = logits != -torch.inf
                total[block] = (torch.where(negative, logits, 0.0).sum(1) + found).masked_fill_(~has_term, 0.0)
                kept[block] = (negative.sum(1) + p.has_positive[block]).masked_fill_(~has_term, 0)
            if need_rank:
                if rank_reference is None:
                    reference[block] = found
                rank[block] = (logits > reference[block, None]).sum(1).masked_fill_(~has_term, -1)
    return positive, row_lse, column_lse, total, kept, rank, reference, saved


def backward(
    grad_positive: Tensor | None,
    grad_row_lse: Tensor | None,
    grad_column_lse: Tensor | None,
    grad_total: Tensor | None,
    query: Tensor,
    key: Tensor,
    scale: Tensor,
    target: Tensor | None,
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    exclude_offsets: Tensor | None,
    exclude_positions: Tensor | None,
    log_q: Tensor | None,
    symmetric: bool,
    normalize: bool,
    positives_elsewhere: bool,
    row_lse: Tensor,
    column_lse: Tensor,
    saved: Tensor,
    need_query: bool,
    need_key: bool,
    need_scale: bool,
    need_log_q: bool,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dquery, dkey, dscale, dlog_q): the closed forms above; what is not needed is empty."""
    rows, columns, dtype = query.shape[0], key.shape[0], statistics_dtype(query.dtype)
    need_u = need_query or need_scale
    kept_logits = _kept_logits(saved, rows, columns, query.dtype)
    row_lse, column_lse = row_lse.to(dtype), column_lse.to(dtype)
    grad_row_lse, grad_column_lse, grad_total = (
        None if grad is None else grad.to(dtype) for grad in (grad_row_lse, grad_column_lse, grad_total)
    )
    with torch.autocast(query.device.type, enabled=False):
        p = _problem(query, key, scale, target, query_mask, key_mask, query_ids, key_ids, exclude_offsets,
                     exclude_positions, log_q, symmetric, normalize, positives_elsewhere)  # fmt: skip
        u = torch.zeros_like(p.query)
        grad_key = torch.zeros_like(p.key)
        grad_log_q = p.key.new_zeros(columns)
        slope_of_positive = p.query.new_zeros(rows) if grad_positive is None else grad_positive.to(dtype, copy=True)
        for block in _blocks(rows, columns, dtype, workspace_bytes):
            logits = _negatives(p, block, None)[0] if kept_logits is None else kept_logits[block]
            if grad_row_lse is not None:
                slope = _softmax(logits, row_lse[block], grad_row_lse[block], 1)
            else:
                slope = torch.zeros_like(logits)
            if grad_column_lse is not None:
                slope += _softmax(logits, column_lse, grad_column_lse, 0)
            if grad_total is not None:
                share = torch.where(p.has_term[block], grad_total[block], 0.0)
                slope += torch.where(logits != -torch.inf, share[:, None], 0.0)
                slope_of_positive[block] += share
            block_query, block_key = _readable(p, block, logits)
            if need_u:
                u[block] = slope @ block_key
            if need_key:
                grad_key.addmm_(slope.T, block_query)
            if need_log_q:
                grad_log_q -= slope.sum(0)
        _add_positives(p, slope_of_positive, u, grad_key, grad_log_q)
        grad_scale = (p.query * u).sum(1)
        if scale.shape[0] != rows:
            grad_scale = grad_scale.sum(0, keepdim=True)
        grad_query = through_norm(p.scale[:, None] * u, p.query, p.query_norm, query.dtype)
        return (
            grad_query if need_query else query.new_empty(0),
            through_norm(grad_key, p.key, p.key_norm, key.dtype) if need_key else key.new_empty(0),
            grad_scale if need_scale else u.new_empty(0),
            grad_log_q if need_log_q else u.new_empty(0),
        )


def _kept_logits(saved: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor | None:
    """The place of the logits in what is saved; None where there is none, or it is meant for 16-bit exponentials."""
    if saved.numel() == 0 or dtype != statistics_dtype(dtype):
        return None
    return saved[: rows * columns * dtype.itemsize].view(dtype).view(rows, columns)


def _problem(
    query: Tensor,
    key: Tensor,
    scale: Tensor,
    target: Tensor | None,
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    query_ids: Tensor | None,
    key_ids: Tensor | None,
    exclude_offsets: Tensor | None,
    exclude_positions: Tensor | None,
    log_q: Tensor | None,
    symmetric: bool,
    normalize: bool,
    positives_elsewhere: bool,
) -> _Problem:
    rows, columns, dtype = query.shape[0], key.shape[0], statistics_dtype(query.dtype)
    check_contents(columns, target, exclude_offsets, exclude_positions)
    everyone_has_a_term = target is None and query_mask is None and key_mask is None
    target, has_positive, has_term, read, key_read = find_terms(
        query, columns, target, query_mask, key_mask, symmetric, positives_elsewhere
    )
    target = torch.where(has_positive, target, 0)
    query, key, scale, row_mask = query.to(dtype), key.to(dtype), scale.to(dtype), None
    if not everyone_has_a_term:
        query, key = torch.where(read[:, None], query, 0.0), torch.where(key_read[:, None], key, 0.0)
        scale = torch.where(read, scale, 0.0) if scale.shape[0] == rows else scale
        # Without single pairs left out, a zero query is harmless, and one pass over the logits is saved.
        row_mask = read if query_mask is not None or key_ids is not None or exclude_offsets is not None else None
    query, query_norm = _unit(query) if normalize else (query, None)
    key, key_norm = _unit(key) if normalize else (key, None)
    if key_ids is not None:
        query_ids, key_ids = comparable_ids(query_ids, key_ids, target, has_positive)
    excluded = None
    if exclude_offsets is not None and exclude_positions is not None:
        excluded = listed_pairs(exclude_offsets, exclude_positions, rows, columns)
    return _Problem(
        query, key, query_norm, key_norm, scale, query * scale[:, None], None if log_q is None else log_q.to(dtype),
        target, has_positive, has_term, row_mask, key_mask, query_ids, key_ids, excluded,
    )  # fmt: skip


def _blocks(rows: int, columns: int, dtype: torch.dtype, workspace_bytes: int) -> Iterator[slice]:
    """Blocks of rows whose logits stay inside the workspace, and near the cache."""
    if columns == 0:
        return
    step = max(1, min(workspace_bytes, BLOCK_BYTES) // (columns * dtype.itemsize))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _negatives(p: _Problem, block: slice, out: Tensor | None) -> tuple[Tensor, Tensor]:
    """The logits of a block of rows, −inf at positives and at pairs left out; the positives, 0 where there is none."""
    logits = torch.mm(p.scaled[block], p.key.T, out=out)
    if p.log_q is not None:
        logits.sub_(p.log_q)
    target, has_positive = p.target[block, None], p.has_positive[block, None]
    at_target = logits.gather(1, target)
    logits.scatter_(1, target, at_target.masked_fill(has_positive, -torch.inf))
    if p.row_mask is not None:
        logits.masked_fill_(~p.row_mask[block, None], -torch.inf)
    if p.key_mask is not None:
        logits.masked_fill_(~p.key_mask, -torch.inf)
    if p.query_ids is not None and p.key_ids is not None:
        logits.masked_fill_(p.query_ids[block, None] == p.key_ids, -torch.inf)
    if p.excluded is not None:
        row, position = p.excluded
        here = (row >= block.start) & (row < block.stop)
        hit = torch.zeros(logits.numel() + 1, dtype=torch.bool, device=logits.device)
        hit.index_fill_(0, torch.where(here, (row - block.start) * logits.shape[1] + position, logits.numel()), True)
        logits.masked_fill_(hit[:-1].view(logits.shape), -torch.inf)
    return logits, at_target.masked_fill_(~has_positive, 0.0)[:, 0]


def _softmax(logits: Tensor, lse: Tensor, grad: Tensor, dim: int) -> Tensor:
    """grad · e^{logits − lse} along `dim`; 0 where nothing was summed, whatever `grad` holds there."""
    empty = lse == -torch.inf
    probability = (logits - lse.masked_fill(empty, torch.inf).unsqueeze(dim)).exp_()
    return probability.mul_(grad.masked_fill(empty, 0.0).unsqueeze(dim))


def _readable(p: _Problem, block: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The block's scaled queries and the keys, zero where all pairs are left out: 0 · NaN must not reach a gradient."""
    query, key = p.scaled[block], p.key
    if not p.sparse:
        return query, key
    kept = logits != -torch.inf
    return torch.where(kept.any(1)[:, None], query, 0.0), torch.where(kept.any(0)[:, None], key, 0.0)


def _add_positives(p: _Problem, slope: Tensor, u: Tensor, grad_key: Tensor, grad_log_q: Tensor) -> None:
    """The positives' share, one rank-1 term per row; `index_put_` adds in a fixed order where targets repeat."""
    if p.key.shape[0] == 0:
        return
    has_positive = p.has_positive[:, None]
    slope = slope.masked_fill(~p.has_positive, 0.0)
    u += torch.where(has_positive, slope[:, None] * p.key[p.target], 0.0)
    grad_key.index_put_((p.target,), torch.where(has_positive, slope[:, None] * p.scaled, 0.0), accumulate=True)
    grad_log_q.index_put_((p.target,), -slope, accumulate=True)


def _unit(x: Tensor) -> tuple[Tensor, Tensor]:
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return x / norm.clamp_min(NORM_EPS), norm


def through_norm(grad: Tensor, unit: Tensor, norm: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The gradient of x from that of x / max(‖x‖, ε), rounded once to `dtype`; zero rows get 0."""
    if norm is not None:
        radial = (unit * grad).sum(1, keepdim=True) * unit
        grad = grad - torch.where(norm > NORM_EPS, radial, 0.0)
        grad = torch.where(norm == 0, 0.0, grad / norm.clamp_min(NORM_EPS))
    return grad.to(dtype)
