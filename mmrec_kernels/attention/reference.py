"""Cross-modal attention: the mathematics, in plain torch and in any dtype. The oracle of the tests and the fallback.

    s_ij = scale·q_i·k_j + log_bias_m(j)        P_ij = exp(s_ij − lse_i)        out_i = Σ_m gate_m Σ_{j∈m} P_ij v_j
    dP_ij = gate_m dO_i·v_j + dmass_im          dS_ij = P_ij (dP_ij − Σ_j' P_ij' dP_ij' + dlse_i)

Segments are kept apart: each has its own products and sums, added up in order, so that a segment without keys changes
no bit elsewhere. Axes as in `layout.py`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..schemas import ATTENTION_NEEDS, terms_dtype
from .layout import Problem, Rows, Segment, fill, pad, rms_norm, rms_norm_backward, scatter, unpad


def _exp(x: Tensor) -> Tensor:
    """exp(x) of x ≤ 0, in place; 0 where it would underflow.

    On CPU, infinite arguments and results near the denormals are slower by one to two orders of magnitude.
    """
    tiny = torch.finfo(x.dtype).tiny
    return torch.threshold_(x.clamp_(math.log(tiny) + 2, 0).exp_(), 8 * tiny, 0)


def _per_row(x: Tensor) -> Tensor:
    """`[B, h, g]` against `[B, q, h, g, d]`."""
    return x[:, None, :, :, None]


def forward(
    query: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    offsets: Tensor,
    index: list[Tensor],
    query_offsets: Tensor | None,
    log_bias: Tensor | None,
    value_gate: Tensor | None,
    sink: Tensor | None,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    scale: float,
    norm_eps: float,
    indexed: int,
    causal: int,
    return_mass: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """One softmax over the union of a query's segments; see the head of this file."""
    problem = Problem(query, keys, values, offsets, index, query_offsets, log_bias, value_gate, sink, query_norm,
                       key_norm, scale, norm_eps, indexed, causal)  # fmt: skip
    return _forward(problem, return_mass)


def _forward(problem: Problem, return_mass: bool) -> tuple[Tensor, Tensor, Tensor]:
    at, query = problem.queries()
    query = rms_norm(query, problem.query_norm, problem.norm_eps) * problem.scale
    segments = list(problem.segments(at, query))
    batch, (kv_heads, group) = at.lengths.shape[0], problem.heads
    top = query.new_full((batch, kv_heads, group, at.longest), -torch.inf)
    sink = None if problem.sink is None else problem.sink.to(problem.dtype).view(kv_heads, group, 1)
    for segment in segments:
        if segment is not None:
            top = torch.maximum(top, fill(segment.scores, segment.hidden, -torch.inf).amax(-1))
    if sink is not None:
        top = torch.maximum(top, sink)
    top = top.masked_fill(top == -torch.inf, 0)
    total = (torch.zeros_like(top) if sink is None else (sink - top).exp()).movedim(3, 1)[..., None]
    out = query.new_zeros((*total.shape[:4], problem.values[0].shape[2]))
    sums = []
    for segment in segments:
        if segment is None:
            sums.append(torch.zeros_like(total))
            continue
        weights = _exp(segment.scores.sub_(top[..., None]))
        sums.append(weights.sum(-1).movedim(3, 1)[..., None])
        total = total + sums[-1]
        part = torch.einsum("bhgqk,bkhd->bqhgd", weights, segment.value)
        out = out + fill(part if segment.gate is None else part * _per_row(segment.gate), segment.blind)
    divisor = total.masked_fill(total == 0, 1)
    out = unpad((out / divisor).flatten(2, 3), at, problem.query.dtype)
    wide = terms_dtype(query.device)
    lse = (top.movedim(3, 1).to(wide) + total.to(wide).log()[..., 0]).flatten(2, 3)
    mass = query.new_empty(0)
    if return_mass:
        shares = [
            part / divisor if segment is None else fill(part / divisor, segment.blind)
            for part, segment in zip(sums, segments, strict=True)
        ]
        mass = unpad(torch.cat(shares, -1).flatten(2, 3), at, problem.dtype)
    return out, unpad(lse, at, wide, -torch.inf), mass


def backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    grad_mass: Tensor | None,
    out: Tensor,
    lse: Tensor,
    mass: Tensor,
    query: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    offsets: Tensor,
    index: list[Tensor],
    query_offsets: Tensor | None,
    log_bias: Tensor | None,
    value_gate: Tensor | None,
    sink: Tensor | None,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    scale: float,
    norm_eps: float,
    indexed: int,
    causal: int,
    needs: int,
    key_needs: int,
    value_needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Closed form, from the recomputed scores and the saved `lse`; see the head of this file.

    Σ P·dP is summed from its terms; `out` and `mass` are for kernels that use dO·out + Σ dmass·mass instead.
    """
    problem = Problem(query, keys, values, offsets, index, query_offsets, log_bias, value_gate, sink, query_norm,
                       key_norm, scale, norm_eps, indexed, causal)  # fmt: skip
    return _backward(problem, (grad_out, grad_lse, grad_mass), lse, needs, key_needs, value_needs)


class _Product(NamedTuple):
    """One segment in backward."""

    weights: Tensor  # P [B, h, g, q, k]
    grad_weights: Tensor  # dP [B, h, g, q, k]
    grad_out: Tensor  # gate·dO [B, q, h, g, d]
    grad_gate: Tensor | None  # Σ_qk P·(dO·v) [B, h, g]


def _by_head(problem: Problem, x: Tensor, at: Rows) -> Tensor:
    """`[Tq, H, …]` to `[B, h, g, q, …]`."""
    return pad(x, at, problem.dtype).unflatten(2, problem.heads).movedim(1, 3)


def _weights(segments: list[Segment | None], lse: Tensor, sink: Tensor | None) -> list[Tensor | None]:
    """P of each segment. Their sum is 1 by these scores, not only by those that the forward's provider rounded to."""
    found = [None if x is None else fill(_exp(x.scores.sub_(lse[..., None])), x.hidden) for x in segments]
    total = torch.zeros_like(lse) if sink is None else (sink - lse).exp()
    total = sum((x.sum(-1) for x in found if x is not None), total)
    total = torch.where(total > 0, total, 1)[..., None]
    return [None if x is None else x.div_(total) for x in found]


def _product(segment: Segment, weights: Tensor, grad_out: Tensor, grad_mass: Tensor | None) -> _Product:
    grad_weights, grad_gate = torch.einsum("bqhgd,bkhd->bhgqk", grad_out, segment.value), None
    if segment.gate is not None:
        grad_gate = (weights * fill(grad_weights, segment.hidden)).sum((-2, -1))
        grad_weights.mul_(segment.gate[..., None, None])
        grad_out = grad_out * _per_row(segment.gate)
    if grad_mass is not None:
        grad_weights.add_(grad_mass[..., None])
    grad_out = grad_out if segment.blind is None else grad_out.masked_fill(segment.blind, 0)
    return _Product(weights, fill(grad_weights, segment.hidden), grad_out, grad_gate)


def _backward(
    problem: Problem,
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    lse: Tensor,
    needs: int,
    key_needs: int,
    value_needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    needed = {name for bit, name in enumerate(ATTENTION_NEEDS) if needs >> bit & 1}
    at, raw_query = problem.queries()
    query = rms_norm(raw_query, problem.query_norm, problem.norm_eps) * problem.scale
    segments = list(problem.segments(at, query))
    lse = _by_head(problem, lse, at)
    keyless = lse == -torch.inf
    if at.valid is not None:
        keyless = keyless | ~at.valid[:, None, None, :]
    lse = lse.masked_fill(keyless, torch.inf)
    if grads[0] is None:
        shape = (at.lengths.shape[0], at.longest, *problem.heads, problem.values[0].shape[2])
        grad_out = query.new_zeros(shape)
    else:
        grad_out = pad(grads[0], at, problem.dtype).unflatten(2, problem.heads)
    grad_lse, grad_mass = (None if x is None else _by_head(problem, x, at) for x in grads[1:])
    sink = None if problem.sink is None else problem.sink.to(problem.dtype).view(*problem.heads, 1)
    products = [
        None
        if x is None or weights is None
        else _product(x, weights, grad_out, None if grad_mass is None else grad_mass[..., m])
        for m, (x, weights) in enumerate(zip(segments, _weights(segments, lse, sink), strict=True))
    ]
    dots = [(x.weights * x.grad_weights).sum(-1) for x in products if x is not None]
    rest = (torch.zeros_like(lse) if grad_lse is None else grad_lse) - sum(dots, torch.zeros_like(lse))
    rest = rest.masked_fill(keyless, 0)
    grad_scores = [
        None if x is None or segment is None
        else fill(x.grad_weights.add_(rest[..., None]).mul_(x.weights), segment.hidden)
        for x, segment in zip(products, segments, strict=True)
    ]  # fmt: skip
    grad_query, grad_query_norm = _query_grads(problem, at, raw_query, segments, grad_scores, needed)
    grad_keys, grad_key_norm = _key_grads(problem, query, segments, grad_scores, key_needs, "key_norm" in needed)
    grad_sink = None
    if "sink" in needed and sink is not None:
        share = (sink - lse).exp()
        grad_sink = (share * rest).sum((0, 3)).flatten()
    biases = [None if x is None else x.sum((-2, -1)) for x in grad_scores] if "log_bias" in needed else []
    gates = [None if x is None else x.grad_gate for x in products] if "value_gate" in needed else []
    return (
        grad_query,
        grad_keys,
        _value_grads(problem, segments, products, value_needs),
        _reduce(problem, biases, problem.log_bias, lse),
        _reduce(problem, gates, problem.value_gate, lse),
        _like(problem, grad_sink, problem.sink),
        _like(problem, grad_query_norm, problem.query_norm),
        _like(problem, grad_key_norm, problem.key_norm),
    )


def _like(problem: Problem, grad: Tensor | None, x: Tensor | None) -> Tensor:
    """`grad` in the dtype of `x`; what nobody needs is an empty tensor."""
    return problem.query.new_empty(0) if grad is None or x is None else grad.to(x.dtype).contiguous()


def _reduce(problem: Problem, grads: list[Tensor | None], x: Tensor | None, lse: Tensor) -> Tensor:
    """One `[B, h, g]` gradient per segment to the shape of `log_bias` or `value_gate`."""
    if x is None or not grads:
        return problem.query.new_empty(0)
    zero = lse.new_zeros(lse.shape[:3])
    full = torch.stack([zero if grad is None else grad for grad in grads], -1).flatten(1, 2)
    return _like(problem, full.sum_to_size(x.shape), x)


def _query_grads(
    problem: Problem,
    at: Rows,
    raw_query: Tensor,
    segments: list[Segment | None],
    grad_scores: list[Tensor | None],
    needed: set[str],
) -> tuple[Tensor, Tensor | None]:
    """dq = scale·Σ_m dS K, through the norm; summed over the sequences for latent queries."""
    if not needed & {"query", "query_norm"}:
        return problem.query.new_empty(0), None
    grad = raw_query.new_zeros((at.lengths.shape[0], *raw_query.shape[1:]))
    blind: Tensor | None = torch.ones((), dtype=torch.bool, device=grad.device)
    for segment, scores in zip(segments, grad_scores, strict=True):
        if segment is not None and scores is not None:
            grad = grad + fill(torch.einsum("bhgqk,bkhd->bqhgd", scores, segment.key), segment.blind)
            blind = None if blind is None or segment.blind is None else blind & segment.blind
    grad = grad * problem.scale
    if problem.query_offsets is None:
        grad = grad.sum(0, keepdim=True)
    elif blind is not None:
        raw_query = raw_query.masked_fill(blind, 0)
    grad, grad_norm = rms_norm_backward(raw_query, problem.query_norm, problem.norm_eps, grad)
    grad_norm = grad_norm if "query_norm" in needed else None
    if "query" not in needed:
        return problem.query.new_empty(0), grad_norm
    grad = grad.flatten(2, 3)
    if problem.query_offsets is None:
        return grad[0].to(problem.query.dtype).contiguous(), grad_norm
    return unpad(grad, at, problem.query.dtype), grad_norm


def _key_grads(
    problem: Problem,
    query: Tensor,
    segments: list[Segment | None],
    grad_scores: list[Tensor | None],
    key_needs: int,
    norm_needed: bool,
) -> tuple[Tensor, Tensor | None]:
    """dk = scale·dSᵀ q, through the norm; the rows of the segments that need it, one after the other."""
    rows: list[Tensor] = []
    grad_norm = None if problem.key_norm is None else torch.zeros_like(problem.key_norm, dtype=problem.dtype)
    for m, (segment, scores) in enumerate(zip(segments, grad_scores, strict=True)):
        needed = bool(key_needs >> m & 1)
        if segment is None or scores is None:
            rows += [problem.query.new_zeros(problem.keys[m].shape)] * needed
            continue
        if not needed and not norm_needed:
            continue
        if problem.query_offsets is None:
            grad = torch.einsum("bhgqk,qhgd->bkhd", scores, query[0])
        else:
            seeing = query if segment.blind is None else query.masked_fill(segment.blind, 0)
            grad = torch.einsum("bhgqk,bqhgd->bkhd", scores, seeing)
        grad, part = rms_norm_backward(segment.raw_key, problem.key_norm, problem.norm_eps, grad)
        if grad_norm is not None and part is not None:
            grad_norm += part
        if needed:
            rows.append(_to_rows(problem, m, segment, grad))
    return torch.cat(rows) if rows else problem.query.new_empty(0), grad_norm if norm_needed else None


def _value_grads(
    problem: Problem, segments: list[Segment | None], products: list[_Product | None], value_needs: int
) -> Tensor:
    """dv = gate·Pᵀ dO; the rows of the segments that need it, one after the other."""
    rows: list[Tensor] = []
    for m, (segment, product) in enumerate(zip(segments, products, strict=True)):
        if not value_needs >> m & 1:
            continue
        if segment is None or product is None:
            rows.append(problem.query.new_zeros(problem.values[m].shape))
        else:
            grad = torch.einsum("bhgqk,bqhgd->bkhd", product.weights, product.grad_out)
            rows.append(_to_rows(problem, m, segment, grad))
    return torch.cat(rows) if rows else problem.query.new_empty(0)


def _to_rows(problem: Problem, m: int, segment: Segment, grad: Tensor) -> Tensor:
    place = scatter if problem.indexed >> m & 1 else unpad
    return place(grad, segment.at, problem.query.dtype)
