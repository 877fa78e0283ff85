"""Problems for top_k, and the oracle in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mmrec_kernels import TopK, top_k
from numerics import assert_accurate

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int8)


def problem(b: int, n: int, d: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Random query, items, bias and, for int8 items, scales."""
    float_dtype = torch.float32 if dtype == torch.int8 else dtype
    made = {"query": torch.randn(b, d).to(float_dtype), "items": torch.randn(n, d).to(float_dtype)}
    made["bias"] = torch.randn(n, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    if dtype == torch.int8:
        made["items"] = torch.randint(-128, 128, (n, d), dtype=torch.int8)
        made["item_scales"] = torch.rand(n) / 64
    return made


def lists(b: int, n: int, longest: int = 20) -> tuple[Tensor, Tensor]:
    """Ragged ids in any order, with repetitions and ids that do not exist."""
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), torch.randint(0, longest, (b,)).cumsum(0)])
    return offsets, torch.randint(-3, n + 3, (int(offsets[-1]),))


def all_scores(query: Tensor, items: Tensor, bias: Tensor | None = None, item_scales: Tensor | None = None) -> Tensor:
    scores = query.double() @ items.double().T
    scores = scores if item_scales is None else scores * item_scales.double()
    return scores if bias is None else scores + bias.double()


def oracle(scores: Tensor, k: int, exclude=None, candidates=None) -> tuple[Tensor, Tensor]:
    """Sort every row's candidates by (score, id), one row at a time."""
    values, ids = [], []
    for b, row in enumerate(scores.tolist()):
        allowed = set(range(len(row)))
        if candidates is not None:
            allowed &= set(candidates[1][candidates[0][b] : candidates[0][b + 1]].tolist())
        if exclude is not None:
            allowed -= set(exclude[1][exclude[0][b] : exclude[0][b + 1]].tolist())
        best = sorted((-row[i], i) for i in allowed if row[i] > -math.inf)[:k]
        best += [(math.inf, -1)] * (k - len(best))
        values.append([-s for s, _ in best])
        ids.append([i for _, i in best])
    return torch.tensor(values, dtype=torch.float64).view(-1, k), torch.tensor(ids).view(-1, k)


def check(result: TopK, scores: Tensor, k: int, **lists_of) -> None:
    """Scores are accurate position by position; ids are the oracle's, or differ where its gap is within the error."""
    want, want_ids = oracle(scores, k, **lists_of)
    found = want_ids >= 0
    assert torch.equal(result.ids >= 0, found)
    assert bool((result.scores[~found] == -math.inf).all())
    dtype = result.scores.dtype
    eager = want.to(dtype)
    assert_accurate(result.scores[found], want[found], eager[found])
    scale = float(scores[scores.isfinite()].abs().max()) if scores.isfinite().any() else 1.0
    tolerance = {torch.float32: 2e-6, torch.float64: 1e-12}[dtype] * max(scale, 1.0) * 4
    own = torch.gather(torch.nn.functional.pad(scores, (0, 1)), 1, result.ids.clamp(min=0))
    assert bool(((own - want).abs()[found] <= tolerance).all())
    for row in result.ids.tolist():
        kept = [i for i in row if i >= 0]
        assert len(kept) == len(set(kept))


def assert_same(a: TopK, b: TopK) -> None:
    assert torch.equal(a.ids, b.ids) and torch.equal(a.scores, b.scores)


def in_full(p: dict[str, Tensor | None], k: int, exclude: tuple[Tensor, Tensor] | None = None) -> TopK:
    """What the queries find beside one of NaN, where nothing is left out beforehand. They are made at least seven, and
    must be few enough for one thread to take them all."""
    count, more = len(p["query"]), max(7 - len(p["query"]), 1)
    assert count < 63
    beside = torch.cat([p["query"], p["query"][:1].new_full((more, p["query"].shape[1]), math.nan)])
    if exclude is not None:
        exclude = torch.cat([exclude[0], exclude[0][-1:].expand(more)]), exclude[1]
    found = top_k(**{**p, "query": beside}, k=k, exclude=exclude)
    return TopK(found.scores[:count], found.ids[:count])
