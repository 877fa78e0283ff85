"""InfoNCE: what index arguments say, for the providers that are written in Python. Nothing here reads a tensor back but
`check_contents`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import library
from ..validation import check_offsets


def check_contents(columns: int, target: Tensor | None, offsets: Tensor | None, positions: Tensor | None) -> None:
    """Targets and listed positions are below the number of keys. Reads them: on CPU, elsewhere under MMREC_CHECK=1."""
    for tensor in (target, positions):
        if tensor is not None and tensor.device.type != "cpu" and not library.check_requested():
            return
    if target is not None and bool((target >= columns).any()):
        raise ValueError(f"target must be below the number of keys, {columns}, got {int(target.max())}")
    if offsets is not None and positions is not None:
        check_offsets("exclude[0]", offsets, positions.shape[0])
        used = positions[offsets[0] : offsets[-1]]
        if bool((used >= columns).any()):
            raise ValueError(f"exclude[1] must be below the number of keys, {columns}, got {int(used.max())}")


def find_terms(
    query: Tensor,
    columns: int,
    target: Tensor | None,
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    symmetric: bool,
    positives_elsewhere: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(target, which rows have a positive here, which have a term, which are read, which keys are).

    int64 [Nq], bool [Nq], [Nq], [Nq], [Nk].
    """
    if target is None:
        target = torch.arange(query.shape[0], device=query.device)
    has_positive = (
        torch.zeros_like(target, dtype=torch.bool) if positives_elsewhere else (target >= 0) & (target < columns)
    )
    if query_mask is not None:
        has_positive = has_positive & query_mask
    if key_mask is not None and columns:
        has_positive = has_positive & key_mask[target.clamp(0, columns - 1)]
    # Columns may have their targets among other rows than these (`group=`): in both directions all rows are read.
    read = torch.ones_like(has_positive) if symmetric or positives_elsewhere else has_positive
    read = read if query_mask is None else read & query_mask
    has_term = read if positives_elsewhere else has_positive
    return (
        target,
        has_positive,
        has_term,
        read,
        read.any().expand(columns) if key_mask is None else read.any() & key_mask,
    )


def comparable_ids(
    query_ids: Tensor | None, key_ids: Tensor, target: Tensor, has_positive: Tensor
) -> tuple[Tensor, Tensor]:
    """Ids of rows and keys where "none" never matches. `target` lies inside the keys."""
    if query_ids is None:
        query_ids = torch.where(has_positive, key_ids[target], -1) if key_ids.shape[0] else torch.full_like(target, -1)
    return torch.where(query_ids >= 0, query_ids, -1), torch.where(key_ids >= 0, key_ids, -2)


def listed_pairs(offsets: Tensor, positions: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """The (row, key) of each listed pair; row −1 where there is none. Free of host synchronisation."""
    entries = torch.arange(positions.shape[0], device=positions.device)
    row = torch.searchsorted(offsets.contiguous(), entries, right=True) - 1
    valid = (row < rows) & (positions >= 0) & (positions < columns)
    return torch.where(valid, row, -1), positions
