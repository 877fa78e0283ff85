"""InfoNCE on GPU: the launcher of the backward."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..reference import NORM_EPS, through_norm
from . import backward_kernels as kernels
from .prepare import LOG2E, Prepared, finite_or_one, launch_sizes, prepare

# The widths up to which both backward kernels keep whole rows in registers.
OWNER_WIDTH = {torch.float32: 64, torch.bfloat16: 256, torch.float16: 256}
# Weights of wide rows are made for as many rows at a time as this holds.
CHUNK_BYTES = 2**28


def _slopes(grad: Tensor | None, lse: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """grad · 2^(x − lse) as slope · 2^(x − ref) with a whole ref; 0 and far above all where nothing was summed."""
    if grad is None:
        return lse.new_zeros(count, dtype=torch.float32), lse.new_full((count,), 1e30, dtype=torch.float32)
    log = lse * LOG2E
    none = (lse == -torch.inf) | (grad == 0)
    whole = log.ceil()
    slope = torch.where(none, 0.0, grad * torch.exp2(whole - torch.where(none, 0.0, log)))
    return slope.to(torch.float32), torch.where(none, 1e30, whole).to(torch.float32)


def backward(
    grad_positive: Tensor | None, grad_row_lse: Tensor | None, grad_column_lse: Tensor | None,
    grad_total: Tensor | None, query: Tensor, key: Tensor, scale: Tensor, target: Tensor | None,
    query_mask: Tensor | None, key_mask: Tensor | None, query_ids: Tensor | None, key_ids: Tensor | None,
    exclude_offsets: Tensor | None, exclude_positions: Tensor | None, log_q: Tensor | None, symmetric: bool,
    normalize: bool, positives_elsewhere: bool, row_lse: Tensor, column_lse: Tensor, saved: Tensor, need_query: bool,
    need_key: bool, need_scale: bool, need_log_q: bool, workspace_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Launcher of `_infonce_backward`."""
    p = prepare(query, key, scale, target, query_mask, key_mask, query_ids, key_ids, exclude_offsets,
                 exclude_positions, log_q, symmetric, normalize, positives_elsewhere)  # fmt: skip
    rows, columns, width = query.shape[0], key.shape[0], query.shape[1]
    total_slope = None
    positive = p.scale.new_zeros(rows) if grad_positive is None else grad_positive.to(torch.float64)
    if grad_total is not None:
        share = torch.where(p.has_term, grad_total, 0.0)
        positive, total_slope = positive + share, share.to(torch.float32)
    positive = torch.where(p.has_positive, positive, 0.0)
    slopes: tuple[Tensor | None, ...] = (
        *_slopes(grad_row_lse, row_lse, rows),
        *(_slopes(grad_column_lse, column_lse, columns) if grad_column_lse is not None else (None, None)),
        total_slope,
    )
    row_factor = p.scale if p.query_norm is None else p.scale / p.query_norm.clamp_min(NORM_EPS)
    row_factor = finite_or_one(row_factor).to(torch.float32)
    empty = query.new_empty(0, dtype=torch.float32)
    u = key_sums = log_q_sums = empty
    if rows and columns:
        sums = _owner_sums if width <= OWNER_WIDTH[query.dtype] else _chunk_sums
        slopes, size = _in_range(slopes, row_factor if p.folds else None, query.dtype)
        u, key_sums, log_q_sums = (
            found if size is None else found * size
            for found in sums(p, slopes, row_factor, need_query or need_scale, need_key, need_log_q, workspace_bytes)
        )
    target = torch.where(p.has_positive, p.target, 0)
    grad_query, grad_scale = query.new_empty(0), scale.new_empty(0, dtype=torch.float32)
    if need_query or need_scale:
        grad_query, grad_scale = _finish_rows(p, u, positive, target, scale, need_query, need_scale)
    grad_key = key.new_empty(0)
    if need_key:
        grad_key = _finish_keys(p, key_sums, positive * row_factor, target)
    grad_log_q = empty
    if need_log_q:
        sums_of = p.scale.new_zeros(columns) if not rows else log_q_sums.to(torch.float64)
        if columns:
            sums_of = sums_of.index_put((target,), positive, accumulate=True)
        grad_log_q = (-sums_of).to(torch.float32)
    return grad_query, grad_key, grad_scale, grad_log_q


def _in_range(
    slopes: tuple[Tensor | None, ...], row_factor: Tensor | None, dtype: torch.dtype
) -> tuple[tuple[Tensor | None, ...], Tensor | None]:
    """Slopes whose weights, times the factor that they take, fill float16's numbers up to 2¹²; and by how much they
    were divided. A mean over a large batch would make them too small, and so does a large catalogue."""
    if dtype != torch.float16:
        return slopes, None
    row, row_ref, column, column_ref, total = slopes
    size = torch.stack([s.abs().amax() for s in (row, column, total) if s is not None]).amax()
    size = torch.where(size > 0, size, 1.0) / 2.0**12
    if row_factor is not None:
        size = size * row_factor.abs().amax().clamp_min(1.0)
    row, column, total = (None if s is None else s / size for s in (row, column, total))
    return (row, row_ref, column, column_ref, total), size


def _owner_sums(
    p: Prepared, slopes: tuple[Tensor | None, ...], row_factor: Tensor, need_rows: bool, need_keys: bool,
    need_log_q: bool, workspace_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rows, columns, width = p.query.shape[0], p.key.shape[0], p.query.shape[1]
    u, key_sums, log_q_sums = (
        p.sigma.new_empty(shape if needed else 0)
        for shape, needed in (
            ((rows, width), need_rows),
            ((columns, width), need_keys or need_log_q),
            (columns, need_log_q),
        )
    )
    flags = {"SYMMETRIC": slopes[2] is not None, "HAS_TOTAL": slopes[4] is not None, "FOLD": p.folds, **p.flags}
    if need_rows:
        blocks = launch_sizes("query_sums", width, p.query.dtype)
        kernels.query_sums_kernel[(triton.cdiv(rows, blocks["BLOCK_M"]),)](
            *p.pointers,
            *p.listed_by_tile(blocks["BLOCK_M"], blocks["BLOCK_N"]),
            *slopes,
            u,
            *p.sizes,
            **flags,
            **blocks,
        )
    if need_keys or need_log_q:
        blocks = launch_sizes("key_sums", width, p.query.dtype)
        kernels.key_sums_kernel[(triton.cdiv(columns, blocks["BLOCK_N"]),)](
            *p.pointers, *p.listed_by_tile(blocks["BLOCK_M"], blocks["BLOCK_N"]), *slopes, row_factor, key_sums,
            log_q_sums, *p.sizes, NEED_LOG_Q=need_log_q, **flags, **blocks,
        )  # fmt: skip
    return u, key_sums, log_q_sums


def _chunk_sums(
    p: Prepared, slopes: tuple[Tensor | None, ...], row_factor: Tensor, need_rows: bool, need_keys: bool,
    need_log_q: bool, workspace_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """W in chunks of rows, and two plain products with each."""
    rows, columns, width = p.query.shape[0], p.key.shape[0], p.query.shape[1]
    blocks = launch_sizes("weights", width, p.query.dtype)
    block_m = blocks["BLOCK_M"]
    row_tiles, column_tiles = triton.cdiv(rows, block_m), triton.cdiv(columns, blocks["BLOCK_N"])
    most = min(workspace_bytes, CHUNK_BYTES) // (columns * p.query.element_size() * block_m)
    step = min(max(most, 1), row_tiles)
    chunk = p.query.new_empty(step * block_m, columns)
    u = p.sigma.new_empty((rows, width) if need_rows else 0)
    key_sums = p.sigma.new_zeros((columns, width) if need_keys else 0)
    log_q_parts = p.sigma.new_empty((step, columns) if need_log_q else 0)
    log_q_sums = p.scale.new_zeros(columns if need_log_q else 0)
    # The products read what the kernel leaves out as zeros: rows that are not read must be zero, whatever they hold.
    key = torch.where(p.key_read[:, None] != 0, p.key, 0)
    if p.kappa is not None and not p.folds:
        key = (key * p.kappa[:, None]).to(key.dtype)
    scaled = (torch.where(p.row_read[:, None] != 0, p.query, 0) * row_factor[:, None]).to(p.query.dtype)
    listed = p.listed_by_tile(block_m, blocks["BLOCK_N"])
    sparse = p.key_ids is not None or p.listed is not None
    for first in range(0, row_tiles, step):
        start, stop = first * block_m, min((first + step) * block_m, rows)
        weights = chunk[: stop - start]
        here = min(step, row_tiles - first)
        kernels.weights_kernel[(here * column_tiles,)](
            *p.pointers, *listed, *slopes, weights, log_q_parts, first, here, *p.sizes, weights.stride(0),
            SYMMETRIC=slopes[2] is not None, HAS_TOTAL=slopes[4] is not None, FOLD=p.folds, NEED_LOG_Q=need_log_q,
            **p.flags, **blocks,
        )  # fmt: skip
        if need_log_q:
            log_q_sums += log_q_parts[:here].sum(0, dtype=torch.float64)
        used_key, used_query = key, scaled[start:stop]
        if sparse:  # a side that keeps nothing of this chunk may hold NaN
            used_key = torch.where((weights != 0).any(0)[:, None], key, 0)
            used_query = torch.where((weights != 0).any(1)[:, None], used_query, 0)
        if need_rows:
            u[start:stop] = _product(weights, used_key)
        if need_keys:
            key_sums += _product(weights.T, used_query)
    if need_keys and p.kappa is not None and p.folds:
        key_sums /= p.kappa[:, None]
    return u, key_sums, log_q_sums


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b with float32 sums."""
    if a.dtype == torch.float32:
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def _finish_rows(
    p: Prepared, u: Tensor, positive: Tensor, target: Tensor, scale: Tensor, need_query: bool, need_scale: bool
) -> tuple[Tensor, Tensor]:
    rows, width = p.query.shape
    if u.numel() == 0:
        u = p.sigma.new_zeros(rows, width)
    if p.key.shape[0]:
        slope = positive if p.key_norm is None else positive / p.key_norm.clamp_min(NORM_EPS)[target]
        used = slope != 0
        u = u + torch.where(used[:, None], slope.to(torch.float32)[:, None] * p.key[target], 0.0)
    # A row that is not read, or keeps nothing, may hold NaN.
    query = torch.where((u != 0).any(1)[:, None], p.query, 0).to(torch.float32)
    inverse = None if p.query_norm is None else (1 / p.query_norm.clamp_min(NORM_EPS)).to(torch.float32)[:, None]
    unit = query if inverse is None else query * finite_or_one(inverse)
    grad_scale = scale.new_empty(0, dtype=torch.float32)
    if need_scale:
        slopes = (unit * u).sum(1, dtype=torch.float64)
        grad_scale = (slopes if scale.shape[0] == rows else slopes.sum(0, keepdim=True)).to(torch.float32)
    if not need_query:
        return p.query.new_empty(0), grad_scale
    gradient = torch.where((u != 0).any(1), p.scale, 0.0).to(torch.float32)[:, None] * u
    return through_norm(gradient, unit, _clean(p.query_norm), p.query.dtype), grad_scale


def _finish_keys(p: Prepared, key_sums: Tensor, slope: Tensor, target: Tensor) -> Tensor:
    columns, width = p.key.shape
    if key_sums.numel() == 0:
        key_sums = p.sigma.new_zeros(columns, width)
    if p.query.shape[0] and columns:
        used = slope != 0
        shares = torch.where(used[:, None], slope.to(torch.float32)[:, None] * p.query, 0.0)
        key_sums = key_sums.index_put((target,), shares, accumulate=True)
    if p.key_norm is None:
        return key_sums.to(p.key.dtype)
    key = torch.where((key_sums != 0).any(1)[:, None], p.key, 0).to(torch.float32)
    inverse = finite_or_one(1 / p.key_norm.clamp_min(NORM_EPS)).to(torch.float32)[:, None]
    return through_norm(key_sums, key * inverse, _clean(p.key_norm), p.key.dtype)


def _clean(norm: Tensor | None) -> Tensor | None:
    """Norms [N, 1] in float32; those of rows that hold NaN meet gradients of 0 only where nobody keeps the row."""
    return None if norm is None else finite_or_one(norm).to(torch.float32)[:, None]
