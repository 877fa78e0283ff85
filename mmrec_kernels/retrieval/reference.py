"""Streaming top-k: the mathematics, in plain torch and in any dtype. The oracle of the tests and the fallback."""

from __future__ import annotations

import torch
from torch import Tensor

from ..schemas import statistics_dtype
from ..validation import check_offsets


def _pairs(name: str, offsets: Tensor, ids: Tensor, num_items: int) -> tuple[Tensor, Tensor]:
    """The (row, id) pairs of a CSR list whose id exists."""
    check_offsets(f"{name}[0]", offsets, ids.shape[0])
    rows = torch.repeat_interleave(torch.arange(offsets.shape[0] - 1, device=ids.device), offsets.diff())
    ids = ids[offsets[0] : offsets[-1]]
    kept = (ids >= 0) & (ids < num_items)
    return rows[kept], ids[kept]


def topk(
    query: Tensor,
    items: Tensor,
    k: int,
    item_scales: Tensor | None,
    bias: Tensor | None,
    exclude_offsets: Tensor | None,
    exclude_ids: Tensor | None,
    candidate_offsets: Tensor | None,
    candidate_ids: Tensor | None,
    quantize_query: bool,
) -> tuple[Tensor, Tensor]:
    """score = (query · item) · scale + bias; the k best of each row, ties to the lower id. `quantize_query` allows an
    approximate first pass; here there is none."""
    dtype = statistics_dtype(query.dtype)
    scores = query.to(dtype) @ items.to(dtype).T
    if item_scales is not None:
        scores = scores * item_scales.to(dtype)
    if bias is not None:
        scores = scores + bias.to(dtype)
    scores = torch.where(scores.isnan(), -torch.inf, scores)
    if candidate_offsets is not None and candidate_ids is not None:
        kept = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
        kept[_pairs("candidates", candidate_offsets, candidate_ids, items.shape[0])] = True
        scores = scores.masked_fill(~kept, -torch.inf)
    if exclude_offsets is not None and exclude_ids is not None:
        scores[_pairs("exclude", exclude_offsets, exclude_ids, items.shape[0])] = -torch.inf
    if scores.shape[1] < k:
        scores = torch.nn.functional.pad(scores, (0, k - scores.shape[1]), value=-torch.inf)
    scores, ids = scores.sort(dim=1, descending=True, stable=True)
    scores, ids = scores[:, :k].contiguous(), ids[:, :k].contiguous()
    return scores, ids.masked_fill_(scores == -torch.inf, -1)
