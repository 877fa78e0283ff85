"""InfoNCE on GPU: sizes of tiles, and the arguments of both ops in the form of the kernels. O(N) torch arithmetic."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ...triton_common import FUSED, interpreted, next_power_of_two, precision
from ..contents import check_contents, comparable_ids, find_terms, listed_pairs
from ..reference import NORM_EPS
from . import forward_kernels as kernels

LOG2E = 1 / math.log(2)


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


def launch_sizes(kernel: str, width: int, dtype: torch.dtype) -> dict[str, int]:
    if not interpreted():
        return {**block_sizes(kernel, width, dtype), **FUSED}
    # Tiles small enough that small tests have several.
    whole = max(next_power_of_two(width), 16)
    return {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_D": whole if kernel.endswith("sums") else 16, **FUSED}


class Prepared(NamedTuple):
    """What the kernels read, beside sizes: O(N) tensors made from the arguments."""

    query: Tensor
    key: Tensor
    target: Tensor  # −1: none
    has_positive: Tensor
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
            HAS_KEY=False, BLOCK_M=16, BLOCK_D=64, **FUSED,
        )  # fmt: skip
    return norms


def prepare(
    query: Tensor, key: Tensor, scale: Tensor, target: Tensor | None, query_mask: Tensor | None,
    key_mask: Tensor | None, query_ids: Tensor | None, key_ids: Tensor | None, exclude_offsets: Tensor | None,
    exclude_positions: Tensor | None, log_q: Tensor | None, symmetric: bool, normalize: bool,
    positives_elsewhere: bool,
) -> Prepared:  # fmt: skip
    rows, columns = query.shape[0], key.shape[0]
    check_contents(columns, target, exclude_offsets, exclude_positions)
    target, has_positive, has_term, read, key_read = find_terms(
        query, columns, target, query_mask, key_mask, symmetric, positives_elsewhere
    )
    query, key = _rows(query), _rows(key)
    query_norm, key_norm = (_norms(query), _norms(key)) if normalize else (None, None)
    wide = scale.to(torch.float64).expand(rows)
    factor = wide * LOG2E if query_norm is None else wide * LOG2E / query_norm.clamp_min(NORM_EPS)
    rounded = factor.to(torch.float32)
    if key_ids is not None:
        wanted = torch.where(has_positive, target, 0)
        query_ids, key_ids = _ranks(*comparable_ids(query_ids, key_ids, wanted, has_positive))
    listed = None
    if exclude_offsets is not None and exclude_positions is not None:
        listed = listed_pairs(exclude_offsets, exclude_positions, rows, columns)
    return Prepared(
        query, key, torch.where(has_positive, target, -1), has_positive, has_term, read.to(torch.uint8),
        key_read.to(torch.uint8), wide, query_norm, key_norm,
        torch.stack([rounded, (factor - rounded).to(torch.float32)]),
        None if key_norm is None else finite_or_one(1 / key_norm.clamp_min(NORM_EPS)).to(torch.float32),
        None if log_q is None else (log_q.to(torch.float64) * LOG2E).to(torch.float32),
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


def finite_or_one(factor: Tensor) -> Tensor:
    """Factors of what nobody keeps meet weights of 0. Where NaN or infinity is kept, the products have it as well."""
    return torch.where(factor.isfinite(), factor, 1.0)
