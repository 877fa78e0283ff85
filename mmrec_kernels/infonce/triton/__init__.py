"""InfoNCE: the launchers of the Triton kernels, for CUDA tensors (CPU tensors in the interpreter).

Nothing of size Nq·Nk is kept from the forward: at the widths that matter, writing and reading it again costs a GPU as
much as making it. Sizes are arguments of the kernels, so that no batch size compiles anew, and no tensor is read back.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ...schemas import infonce_terms_dtype
from ...triton_common import interpreted, next_power_of_two, precision
from ..reference import NORM_EPS, check_contents, comparable_ids, find_terms, listed_pairs, through_norm
from . import kernels

__all__ = ["backward", "block_sizes", "forward"]

_LOG2E = 1 / math.log(2)
_MOST_STRIPS = 32
_MOST_ROW_TILES = 256
# The widths up to which both backward kernels keep whole rows in registers.
OWNER_WIDTH = {torch.float32: 64, torch.bfloat16: 256, torch.float16: 256}
# Weights of wide rows are made for as many rows at a time as this holds.
CHUNK_BYTES = 2**28


def block_sizes(kernel: str, width: int, dtype: torch.dtype) -> dict[str, int]:
    """BLOCK_M, BLOCK_N, BLOCK_D, num_warps, num_stages of a kernel, by width and dtype alone."""
    wide = dtype == torch.float32
    whole = max(next_power_of_two(width), 16)
    if kernel in ("query_sums", "key_sums"):
        # The owner's accumulator, whole rows wide, stays in registers; the other side comes in tiles of fewer rows
        # where that, or the transposition of W, needs them.
        own, other = (32, 32) if wide else (64, 64 if kernel == "query_sums" and whole <= 128 else 32)
        m, n = (own, other) if kernel == "query_sums" else (other, own)
        return {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_D": whole, "num_warps": 8, "num_stages": 2}
    if wide:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_D": min(whole, 32), "num_warps": 8, "num_stages": 2}
    return {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_D": min(whole, 64), "num_warps": 8, "num_stages": 3}


def _blocks(kernel: str, width: int, dtype: torch.dtype) -> dict[str, int]:
    if not interpreted():
        return block_sizes(kernel, width, dtype)
    # Tiles small enough that small tests have several.
    whole = max(next_power_of_two(width), 16)
    return {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_D": whole if kernel.endswith("sums") else 16}


class _Prepared(NamedTuple):
    """What the kernels read, beside sizes: O(N) tensors made from the arguments."""

    query: Tensor
    key: Tensor
    target: Tensor  # −1: no term
    has_term: Tensor
    row_read: Tensor
    key_read: Tensor
    scale: Tensor  # float64 [Nq]
    query_norm: Tensor | None  # float64
    key_norm: Tensor | None
    sigma: Tensor  # [2, Nq]: the factor of log2 logits, and what its rounding left
    kappa: Tensor | None
    bias: Tensor | None
    query_ids: Tensor | None
    key_ids: Tensor | None
    listed: tuple[Tensor, Tensor] | None

    @property
    def pointers(self) -> tuple[Tensor | None, ...]:
        """The arguments that all kernels of a tile begin with, up to the ids."""
        return (self.query, self.key, self.sigma, self.kappa, self.bias, self.row_read, self.key_read, self.target,
                self.query_ids, self.key_ids)  # fmt: skip

    @property
    def folds(self) -> bool:
        """Whether the products' weights take the norms: float16's numbers would not hold those of short rows."""
        return self.key_norm is None or self.query.dtype != torch.float16

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.query.shape[0], self.key.shape[0], self.query.shape[1], self.query.stride(0), self.key.stride(0)

    @property
    def flags(self) -> dict[str, bool | str]:
        return {
            "HAS_KAPPA": self.kappa is not None,
            "HAS_BIAS": self.bias is not None,
            "HAS_IDS": self.key_ids is not None,
            "HAS_EXCLUDE": self.listed is not None,
            "PRECISION": precision(self.query.dtype),
            "UPCAST": interpreted(),
        }

    def listed_by_tile(self, block_m: int, block_n: int) -> tuple[Tensor | None, ...]:
        """Rows and keys of the listed pairs, ordered by tile, and where each tile's begin."""
        if self.listed is None:
            return None, None, None
        row, key = self.listed
        row_tiles = triton.cdiv(self.query.shape[0], block_m)
        column_tiles = triton.cdiv(self.key.shape[0], block_n)
        tile = torch.where(row >= 0, row // block_m * column_tiles + key // block_n, row_tiles * column_tiles)
        tile, order = tile.sort(stable=True)
        starts = torch.searchsorted(tile, torch.arange(row_tiles * column_tiles + 1, device=tile.device))
        return row[order].to(torch.int32), key[order].to(torch.int32), starts


def _rows(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()


def _norms(matrix: Tensor) -> Tensor:
    """‖x_i‖ in float64."""
    norms = matrix.new_empty(matrix.shape[0], dtype=torch.float64)
    if matrix.shape[0]:
        kernels.positive_kernel[(triton.cdiv(matrix.shape[0], 16),)](
            matrix, None, None, None, norms, matrix.shape[0], matrix.shape[1], matrix.stride(0), 0,
            HAS_KEY=False, BLOCK_M=16, BLOCK_D=64,
        )  # fmt: skip
    return norms


def _prepare(
    query: Tensor, key: Tensor, scale: Tensor, target: Tensor | None, query_mask: Tensor | None,
    key_mask: Tensor | None, query_ids: Tensor | None, key_ids: Tensor | None, exclude_offsets: Tensor | None,
    exclude_positions: Tensor | None, log_q: Tensor | None, symmetric: bool, normalize: bool,
) -> _Prepared:  # fmt: skip
    rows, columns = query.shape[0], key.shape[0]
    check_contents(columns, target, exclude_offsets, exclude_positions)
    target, has_term, read, key_read = find_terms(query, columns, target, query_mask, key_mask, symmetric)
    query, key = _rows(query), _rows(key)
    query_norm, key_norm = (_norms(query), _norms(key)) if normalize else (None, None)
    wide = scale.to(torch.float64).expand(rows)
    factor = wide * _LOG2E if query_norm is None else wide * _LOG2E / query_norm.clamp_min(NORM_EPS)
    rounded = factor.to(torch.float32)
    if key_ids is not None:
        query_ids, key_ids = _ranks(*comparable_ids(query_ids, key_ids, torch.where(has_term, target, 0), has_term))
    listed = None
    if exclude_offsets is not None and exclude_positions is not None:
        listed = listed_pairs(exclude_offsets, exclude_positions, rows, columns)
    return _Prepared(
        query, key, torch.where(has_term, target, -1), has_term, read.to(torch.uint8), key_read.to(torch.uint8), wide,
        query_norm, key_norm, torch.stack([rounded, (factor - rounded).to(torch.float32)]),
        None if key_norm is None else _finite_or_one(1 / key_norm.clamp_min(NORM_EPS)).to(torch.float32),
        None if log_q is None else (log_q.to(torch.float64) * _LOG2E).to(torch.float32),
        query_ids if key_ids is not None else None, key_ids, listed,
    )  # fmt: skip


def _ranks(query_ids: Tensor, key_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Ids as int32: their ranks among the keys' ids. Rows whose id no key has, or that have none, get −1."""
    if key_ids.shape[0] == 0:
        return torch.full_like(query_ids, -1, dtype=torch.int32), key_ids.to(torch.int32)
    ordered, order = key_ids.sort()
    rank = torch.zeros_like(ordered)
    rank[1:] = (ordered[1:] != ordered[:-1]).cumsum(0)
    ranks = torch.empty_like(rank).index_copy_(0, order, torch.where(ordered >= 0, rank, -2))
    place = torch.searchsorted(ordered, query_ids.contiguous()).clamp(max=key_ids.shape[0] - 1)
    found = (ordered[place] == query_ids) & (query_ids >= 0)
    return torch.where(found, rank[place], -1).to(torch.int32), ranks.to(torch.int32)


def _finite_or_one(factor: Tensor) -> Tensor:
    """Factors of what nobody keeps meet weights of 0. Where NaN or infinity is kept, the products have it as well."""
    return torch.where(factor.isfinite(), factor, 1.0)


def forward(
    query: Tensor, key: Tensor, scale: Tensor, target: Tensor | None, query_mask: Tensor | None,
    key_mask: Tensor | None, query_ids: Tensor | None, key_ids: Tensor | None, exclude_offsets: Tensor | None,
    exclude_positions: Tensor | None, log_q: Tensor | None, symmetric: bool, normalize: bool, need_mean: bool,
    need_rank: bool, save: bool, workspace_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Launcher of `_infonce_forward`."""
    if save:
        raise ValueError("save must be False on GPU: the backward makes the logits again")
    p = _prepare(query, key, scale, target, query_mask, key_mask, query_ids, key_ids, exclude_offsets,
                 exclude_positions, log_q, symmetric, normalize)  # fmt: skip
    rows, columns, width = query.shape[0], key.shape[0], query.shape[1]
    dtype = infonce_terms_dtype(query.device)
    positive = _positives(p, log_q)
    row_lse = query.new_full((rows,), -torch.inf, dtype=dtype)
    column_lse = query.new_full((columns if symmetric else 0,), -torch.inf, dtype=dtype)
    mean = query.new_zeros(rows if need_mean else 0, dtype=dtype)
    rank = query.new_full((rows if need_rank else 0,), -1, dtype=torch.int64)
    saved = query.new_empty(0, dtype=torch.uint8)
    if rows == 0 or columns == 0:
        return positive, row_lse, column_lse, mean, rank, saved
    blocks = _blocks("forward", width, query.dtype)
    row_tiles, column_tiles = triton.cdiv(rows, blocks["BLOCK_M"]), triton.cdiv(columns, blocks["BLOCK_N"])
    strip_tiles = triton.cdiv(column_tiles, _MOST_STRIPS)
    strips = triton.cdiv(column_tiles, strip_tiles)

    def floats(*shape: int) -> Tensor:
        return query.new_empty(shape, dtype=torch.float32)

    row_ref, row_sum = floats(strips, rows), floats(strips, rows)
    # Sums of keys over some row tiles at a time, merged before the next ones come.
    chunk_tiles = min(row_tiles, _MOST_ROW_TILES)
    chunks = triton.cdiv(row_tiles, chunk_tiles)
    column_ref, column_sum = (floats(chunk_tiles, columns) if symmetric else None for _ in range(2))
    merged_ref, merged_sum = (floats(chunks, columns) if symmetric and chunks > 1 else None for _ in range(2))
    total = floats(strips, rows) if need_mean else None
    kept = query.new_empty((strips, rows), dtype=torch.int32) if need_mean else None
    above = query.new_empty((strips, rows), dtype=torch.int32) if need_rank else None
    reference = _rank_references(p, blocks) if need_rank else None
    listed = p.listed_by_tile(blocks["BLOCK_M"], blocks["BLOCK_N"])
    for c in range(chunks):
        first = c * chunk_tiles
        here = min(chunk_tiles, row_tiles - first)
        kernels.forward_kernel[(here, strips)](
            *p.pointers, *listed, reference, row_ref, row_sum, column_ref, column_sum, total, kept, above, first,
            *p.sizes, strip_tiles,
            SYMMETRIC=symmetric, NEED_MEAN=need_mean, NEED_RANK=need_rank, **p.flags, **blocks,
        )  # fmt: skip
        if merged_ref is not None and merged_sum is not None:
            kernels.merge_kernel[(triton.cdiv(columns, 128),)](
                column_ref, column_sum, merged_ref[c], merged_sum[c], columns, here, BLOCK=128
            )
    _combine(row_ref, row_sum, row_lse)
    row_lse.masked_fill_(~p.has_term, -torch.inf)
    if merged_ref is not None and merged_sum is not None:
        column_ref, column_sum = merged_ref, merged_sum
    if column_ref is not None and column_sum is not None:
        _combine(column_ref, column_sum, column_lse)
    if total is not None and kept is not None:
        everything = total.sum(0, dtype=torch.float64) / _LOG2E + positive
        mean = (everything / (kept.sum(0) + 1)).to(dtype).masked_fill_(~p.has_term, 0.0)
    if above is not None:
        rank = above.sum(0).masked_fill_(~p.has_term, -1)
    return positive, row_lse, column_lse, mean, rank, saved


def _positives(p: _Prepared, log_q: Tensor | None) -> Tensor:
    """S of each row's positive, 0 where there is none."""
    rows, width, q_stride, k_stride = p.query.shape[0], p.query.shape[1], p.query.stride(0), p.key.stride(0)
    dots = p.query.new_zeros(rows, dtype=torch.float64)
    if rows == 0 or p.key.shape[0] == 0:
        return dots
    kernels.positive_kernel[(triton.cdiv(rows, 16),)](
        p.query, p.key, p.target, dots, torch.empty_like(dots), rows, width, q_stride, k_stride,
        HAS_KEY=True, BLOCK_M=16, BLOCK_D=64,
    )  # fmt: skip
    target = torch.where(p.has_term, p.target, 0)
    if p.query_norm is not None and p.key_norm is not None:
        dots = dots / (p.query_norm.clamp_min(NORM_EPS) * p.key_norm.clamp_min(NORM_EPS)[target])
    found = p.scale * dots if log_q is None else p.scale * dots - log_q[target]
    return torch.where(p.has_term, found, 0.0)


def _rank_references(p: _Prepared, blocks: dict[str, int]) -> Tensor:
    rows, _, width, q_stride, k_stride = p.sizes
    found = p.query.new_empty(rows, dtype=torch.float32)
    step = min(blocks["BLOCK_M"], blocks["BLOCK_N"])
    flags = {name: p.flags[name] for name in ("HAS_KAPPA", "HAS_BIAS", "PRECISION", "UPCAST")}
    kernels.rank_reference_kernel[(triton.cdiv(rows, step),)](
        p.query, p.key, p.sigma, p.kappa, p.bias, p.row_read, p.target, found, rows, width, q_stride, k_stride,
        **flags, **{**blocks, "BLOCK_N": step},
    )  # fmt: skip
    return found


def _combine(ref: Tensor, total: Tensor, out: Tensor) -> None:
    kernels.combine_kernel[(triton.cdiv(out.shape[0], 128),)](ref, total, out, out.shape[0], ref.shape[0], BLOCK=128)


def _slopes(grad: Tensor | None, lse: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """grad · 2^(x − lse) as slope · 2^(x − ref) with a whole ref; 0 and far above all where nothing was summed."""
    if grad is None:
        return lse.new_zeros(count, dtype=torch.float32), lse.new_full((count,), 1e30, dtype=torch.float32)
    log = lse * _LOG2E
    none = (lse == -torch.inf) | (grad == 0)
    whole = log.ceil()
    slope = torch.where(none, 0.0, grad * torch.exp2(whole - torch.where(none, 0.0, log)))
    return slope.to(torch.float32), torch.where(none, 1e30, whole).to(torch.float32)


def backward(
    grad_positive: Tensor | None, grad_row_lse: Tensor | None, grad_column_lse: Tensor | None, grad_mean: Tensor | None,
    query: Tensor, key: Tensor, scale: Tensor, target: Tensor | None, query_mask: Tensor | None,
    key_mask: Tensor | None, query_ids: Tensor | None, key_ids: Tensor | None, exclude_offsets: Tensor | None,
    exclude_positions: Tensor | None, log_q: Tensor | None, symmetric: bool, normalize: bool, row_lse: Tensor,
    column_lse: Tensor, saved: Tensor, need_query: bool, need_key: bool, need_scale: bool, need_log_q: bool,
    workspace_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Launcher of `_infonce_backward`."""
    p = _prepare(query, key, scale, target, query_mask, key_mask, query_ids, key_ids, exclude_offsets,
                 exclude_positions, log_q, symmetric, normalize)  # fmt: skip
    rows, columns, width = query.shape[0], key.shape[0], query.shape[1]
    mean_slope = None
    positive = p.scale.new_zeros(rows) if grad_positive is None else grad_positive.to(torch.float64)
    if grad_mean is not None:
        share = torch.where(p.has_term, grad_mean / (_count_kept(p) + 1), 0.0)
        positive, mean_slope = positive + share, share.to(torch.float32)
    positive = torch.where(p.has_term, positive, 0.0)
    slopes: tuple[Tensor | None, ...] = (
        *_slopes(grad_row_lse, row_lse, rows),
        *(_slopes(grad_column_lse, column_lse, columns) if grad_column_lse is not None else (None, None)),
        mean_slope,
    )
    row_factor = p.scale if p.query_norm is None else p.scale / p.query_norm.clamp_min(NORM_EPS)
    row_factor = _finite_or_one(row_factor).to(torch.float32)
    empty = query.new_empty(0, dtype=torch.float32)
    u = key_sums = log_q_sums = empty
    if rows and columns:
        sums = _owner_sums if width <= OWNER_WIDTH[query.dtype] else _chunk_sums
        slopes, size = _in_range(slopes, row_factor if p.folds else None, query.dtype)
        u, key_sums, log_q_sums = (
            found if size is None else found * size
            for found in sums(p, slopes, row_factor, need_query or need_scale, need_key, need_log_q, workspace_bytes)
        )
    target = torch.where(p.has_term, p.target, 0)
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
    row, row_ref, column, column_ref, mean = slopes
    size = torch.stack([s.abs().amax() for s in (row, column, mean) if s is not None]).amax()
    size = torch.where(size > 0, size, 1.0) / 2.0**12
    if row_factor is not None:
        size = size * row_factor.abs().amax().clamp_min(1.0)
    row, column, mean = (None if s is None else s / size for s in (row, column, mean))
    return (row, row_ref, column, column_ref, mean), size


def _count_kept(p: _Prepared) -> Tensor:
    """Negatives of each row. O(Nq·Nk) comparisons by plain torch, in chunks; only label smoothing asks for it."""
    rows, columns = p.query.shape[0], p.key.shape[0]
    if p.key_ids is None and p.listed is None:
        return p.key_read.sum() * p.row_read - p.has_term.to(torch.int64)
    step = max(1, 2**24 // max(columns, 1))
    counts = []
    for start in range(0, rows, step):
        block = slice(start, start + step)
        keep = (p.row_read[block, None] & p.key_read).bool()
        keep &= torch.arange(columns, device=keep.device) != p.target[block, None]
        if p.query_ids is not None and p.key_ids is not None:
            keep &= p.query_ids[block, None] != p.key_ids
        if p.listed is not None:
            row, key = p.listed
            here = (row >= start) & (row < start + keep.shape[0])
            hit = keep.new_zeros(keep.numel() + 1)
            hit.index_fill_(0, torch.where(here, (row - start) * columns + key, keep.numel()), True)
            keep &= ~hit[:-1].view(keep.shape)
        counts.append(keep.sum(1))
    return torch.cat(counts) if counts else p.target


def _owner_sums(
    p: _Prepared, slopes: tuple[Tensor | None, ...], row_factor: Tensor, need_rows: bool, need_keys: bool,
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
    flags = {"SYMMETRIC": slopes[2] is not None, "HAS_MEAN": slopes[4] is not None, "FOLD": p.folds, **p.flags}
    if need_rows:
        blocks = _blocks("query_sums", width, p.query.dtype)
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
        blocks = _blocks("key_sums", width, p.query.dtype)
        kernels.key_sums_kernel[(triton.cdiv(columns, blocks["BLOCK_N"]),)](
            *p.pointers, *p.listed_by_tile(blocks["BLOCK_M"], blocks["BLOCK_N"]), *slopes, row_factor, key_sums,
            log_q_sums, *p.sizes, NEED_LOG_Q=need_log_q, **flags, **blocks,
        )  # fmt: skip
    return u, key_sums, log_q_sums


def _chunk_sums(
    p: _Prepared, slopes: tuple[Tensor | None, ...], row_factor: Tensor, need_rows: bool, need_keys: bool,
    need_log_q: bool, workspace_bytes: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """W in chunks of rows, and two plain products with each."""
    rows, columns, width = p.query.shape[0], p.key.shape[0], p.query.shape[1]
    blocks = _blocks("weights", width, p.query.dtype)
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
            SYMMETRIC=slopes[2] is not None, HAS_MEAN=slopes[4] is not None, FOLD=p.folds, NEED_LOG_Q=need_log_q,
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
    p: _Prepared, u: Tensor, positive: Tensor, target: Tensor, scale: Tensor, need_query: bool, need_scale: bool
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
    unit = query if inverse is None else query * _finite_or_one(inverse)
    grad_scale = scale.new_empty(0, dtype=torch.float32)
    if need_scale:
        slopes = (unit * u).sum(1, dtype=torch.float64)
        grad_scale = (slopes if scale.shape[0] == rows else slopes.sum(0, keepdim=True)).to(torch.float32)
    if not need_query:
        return p.query.new_empty(0), grad_scale
    gradient = torch.where((u != 0).any(1), p.scale, 0.0).to(torch.float32)[:, None] * u
    return through_norm(gradient, unit, _clean(p.query_norm), p.query.dtype), grad_scale


def _finish_keys(p: _Prepared, key_sums: Tensor, slope: Tensor, target: Tensor) -> Tensor:
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
    inverse = _finite_or_one(1 / p.key_norm.clamp_min(NORM_EPS)).to(torch.float32)[:, None]
    return through_norm(key_sums, key * inverse, _clean(p.key_norm), p.key.dtype)


def _clean(norm: Tensor | None) -> Tensor | None:
    """Norms [N, 1] in float32; those of rows that hold NaN meet gradients of 0 only where nobody keeps the row."""
    return None if norm is None else _finite_or_one(norm).to(torch.float32)[:, None]
