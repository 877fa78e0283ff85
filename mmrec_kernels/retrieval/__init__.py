"""Streaming top-k: the k best items of a catalogue for each query, scores never held as a matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import library, schemas
from ..validation import check_float, check_index, check_positive_int, check_tensor
from . import reference


class TopK(NamedTuple):
    """`scores [B, k]` (float32; float64 for float64 queries) in descending order and `ids [B, k]` (int64).

    Where a row has fewer than k candidates, the rest is −inf and −1.
    """

    scores: Tensor
    ids: Tensor


def top_k(
    query: Tensor,
    items: Tensor,
    k: int,
    *,
    item_scales: Tensor | None = None,
    bias: Tensor | None = None,
    exclude: tuple[Tensor, Tensor] | None = None,
    candidates: tuple[Tensor, Tensor] | None = None,
    quantize_query: bool = False,
) -> TopK:
    """The `k` items with the highest score for each query.

    `score[b, n] = (query[b] · items[n]) · item_scales[n] + bias[n]`

    Args:
        query: `[B, D]`, float32, bfloat16 or float64 (float16 on GPU). Accumulation is in float32, float64 for float64.
        items: `[N, D]`, the dtype of `query`; or int8 with `item_scales` under a float32, bfloat16 or float16 query,
            which is not rounded.
        k: how many items to return, at least 1; it may exceed N.
        item_scales: `[N]` float32, the step of each int8 row. Only for int8 items, and needed there.
        bias: `[N]` floating, added to each item's score. −inf removes an item.
        exclude: `(offsets int[B+1], ids int[≥ offsets[B]])`: row b never returns `ids[offsets[b]:offsets[b+1]]`.
            Any order; duplicates and ids outside [0, N) are ignored.
        candidates: the same layout: row b returns only these.
        quantize_query: allows an approximate first pass with an int8 query over int8 items, rescored exactly. A
            provider without such a pass returns the exact result.

    Returns:
        `TopK(scores, ids)`, sorted by score, ties to the lower id. A NaN score is never returned. On CPU a score's bits
        depend on its query row, its item row, the dtype and the instruction set only. Not differentiable.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or flag; on CPU also offsets that fall or leave the list.
    """
    check_float("query", query, ("B", "D"))
    device, num_queries, width = query.device, query.shape[0], query.shape[1]
    check_tensor("items", items, ("N", width), (query.dtype, torch.int8), device=device)
    num_items = items.shape[0]
    check_positive_int("k", k)
    if items.dtype == torch.int8:
        if query.dtype == torch.float64:
            raise TypeError("query must be float32, bfloat16 or float16 for int8 items, got float64")
        if item_scales is None:
            raise ValueError("item_scales must be given for int8 items, got None")
        check_tensor("item_scales", item_scales, (num_items,), (torch.float32,), device=device)
    elif item_scales is not None:
        raise ValueError(f"item_scales must be None unless items are int8, got items of {items.dtype}")
    if quantize_query and items.dtype != torch.int8:
        raise ValueError(f"quantize_query must be False unless items are int8, got items of {items.dtype}")
    if bias is not None:
        check_float("bias", bias, (num_items,), device=device)
        bias = bias.detach().to(schemas.statistics_dtype(query.dtype))
    exclude_offsets, exclude_ids = _check_lists("exclude", exclude, num_queries, device)
    candidate_offsets, candidate_ids = _check_lists("candidates", candidates, num_queries, device)
    scores, ids = library.call(
        schemas.retrieval_topk, query.detach(), items.detach(), k, item_scales, bias, exclude_offsets, exclude_ids,
        candidate_offsets, candidate_ids, quantize_query,
    )  # fmt: skip
    return TopK(scores, ids)


def _check_lists(
    name: str, lists: tuple[Tensor, Tensor] | None, num_queries: int, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    if lists is None:
        return None, None
    if not isinstance(lists, tuple | list) or len(lists) != 2:
        raise TypeError(f"{name} must be a pair (offsets, ids), got {type(lists).__name__}")
    offsets = check_index(f"{name}[0]", lists[0], (num_queries + 1,), device=device)
    return offsets, check_index(f"{name}[1]", lists[1], ("L",), device=device)


def _triton() -> Callable[..., Any]:
    from .triton import topk

    return topk


library.announce("_retrieval_topk", reference=reference.topk, triton=_triton)
