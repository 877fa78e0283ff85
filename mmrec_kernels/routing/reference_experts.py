"""Mixture of experts: the mathematics, in plain torch and in any dtype. The oracle of the tests and the fallback.

    h = x W_inᵀ + b_in        a = act(h)        y = a W_outᵀ + b_out        out_g = Σ_e c_ge y_e

c_ge is the weight that gate g gives to expert e for a token (the sum over slots that name it). Every distinct (expert,
token) pair is one row of one dense product, whatever the number of gates; within an expert the tokens are distinct, and
experts are added in the order of their ids, so there is nothing to race. The shared expert is one more block over the
tokens that have a slot, its coefficient σ(x · gate) or 1.

Backward, per block, with `hidden` recomputed unless it was saved:

    dy = Σ_g c_g dout_g      dc_g = dout_g · y      da = dy W_out      dh = da act'(h)
    dW_out = dyᵀ a      db_out = Σ dy      dW_in = dhᵀ x      db_in = Σ dh      dx = dh W_in
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, silu

from .. import library
from ..schemas import statistics_dtype

GATED = {"swiglu": "silu", "geglu": "gelu"}


def _silu_derivative(h: Tensor) -> Tensor:
    s = h.sigmoid()
    return s * (1 + h * (1 - s))


def _gelu_derivative(h: Tensor) -> Tensor:
    return torch.special.ndtr(h) + h * torch.exp(-h.square() / 2) / math.sqrt(2 * math.pi)


_UNARY: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "gelu": (gelu, _gelu_derivative),
    "relu": (torch.relu, lambda h: (h > 0).to(h.dtype)),
    "relu2": (lambda h: h.relu().square(), lambda h: 2 * h.relu()),
    "silu": (silu, _silu_derivative),
    "identity": (lambda h: h, torch.ones_like),
}
ACTIVATIONS = (*GATED, *_UNARY)


def _activate(h: Tensor, activation: str) -> Tensor:
    if activation not in GATED:
        return _UNARY[activation][0](h)
    gate, up = h.chunk(2, dim=-1)
    return _UNARY[GATED[activation]][0](gate) * up


def _activate_gradient(da: Tensor, h: Tensor, activation: str) -> Tensor:
    if activation not in GATED:
        return da * _UNARY[activation][1](h)
    gate, up = h.chunk(2, dim=-1)
    value, derivative = _UNARY[GATED[activation]]
    return torch.cat([da * up * derivative(gate), da * value(gate)], dim=-1)


class _Block(NamedTuple):
    """A dense network and the tokens that pass it: an expert or the shared expert. All is in the accumulation dtype."""

    rows: slice | Tensor  # of the saved pre-activations
    tokens: Tensor  # [n], distinct
    coefficient: Tensor  # [G, n], 0 where not used
    used: Tensor  # [G, n]: whether gate g sends the token here; where not, nothing passes between them, not even a NaN
    w_in: Tensor
    w_out: Tensor
    b_in: Tensor | None = None
    b_out: Tensor | None = None

    def hidden(self, x: Tensor) -> Tensor:
        return linear(x, self.w_in, self.b_in)

    def output(self, a: Tensor) -> Tensor:
        return linear(a, self.w_out, self.b_out)

    def select(self, per_gate: Tensor) -> Tensor:
        """`per_gate [G, n, d]`, 0 where gate g does not use the block."""
        return torch.where(self.used[..., None], per_gate, 0)


class _Plan:
    """The distinct (expert, token) pairs that the slots name, in that order, and what each gate gives to each pair."""

    def __init__(self, weights: Tensor, experts: Tensor, num_experts: int) -> None:
        gates, num_tokens, k = experts.shape
        named = (experts >= 0) & (experts < num_experts)
        token = torch.arange(num_tokens, device=experts.device)[:, None]
        pairs, position = torch.unique((experts.long() * num_tokens + token)[named], return_inverse=True)
        self.tokens = pairs % max(num_tokens, 1)
        self.counts = torch.bincount(pairs // max(num_tokens, 1), minlength=num_experts).tolist()
        self.alive = named.any(2)
        # Slots that name no expert point one past the pairs, at a coefficient that nobody uses.
        self.slots = torch.full_like(experts, len(pairs), dtype=torch.int64)
        self.slots[named] = position
        self.coefficient = weights.new_zeros((gates, len(pairs) + 1))
        self.used = torch.zeros_like(self.coefficient, dtype=torch.bool)
        for s in range(k):
            slot = self.slots[:, :, s]
            self.coefficient.scatter_(1, slot, self.coefficient.gather(1, slot) + weights[:, :, s])
            self.used.scatter_(1, slot, True)

    def blocks(
        self, w_in: Tensor, w_out: Tensor, b_in: Tensor | None, b_out: Tensor | None
    ) -> Iterator[tuple[int, _Block]]:
        """(e, its block) for the experts that have tokens; the weights of the others are not read."""
        dtype, start = self.coefficient.dtype, 0
        for e, count in enumerate(self.counts):
            rows = slice(start, start + count)
            start += count
            if count:
                bias_in, bias_out = (None if b is None else b[e].to(dtype) for b in (b_in, b_out))
                pairs = (rows, self.tokens[rows], self.coefficient[:, rows], self.used[:, rows])
                yield e, _Block(*pairs, w_in[e].to(dtype), w_out[e].to(dtype), bias_in, bias_out)

    def shared_block(self, x: Tensor, w_in: Tensor, w_out: Tensor, gate: Tensor | None) -> _Block:
        """The shared expert: all tokens with a slot, coefficient σ(x · gate)."""
        dtype = self.coefficient.dtype
        tokens = self.alive.any(0).nonzero()[:, 0]
        used = self.alive[:, tokens]
        coefficient = used.to(dtype)
        if gate is not None:
            coefficient = torch.where(used, (x[tokens].to(dtype) @ gate.to(dtype)).sigmoid(), 0)
        return _Block(tokens, tokens, coefficient, used, w_in.to(dtype), w_out.to(dtype))


def forward(
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    shared_w_in: Tensor | None,
    shared_w_out: Tensor | None,
    shared_gate: Tensor | None,
    activation: str,
    save_hidden: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """out, and the pre-activations if they are to be saved; `schemas.experts_forward` has the shapes."""
    check_experts(experts, w_in.shape[0])
    gates, tokens, k = weights.shape
    out = x.new_zeros((gates, *x.shape), dtype=statistics_dtype(x.dtype))
    hidden, shared_hidden = x.new_empty(0), x.new_empty(0)
    if save_hidden:
        hidden = x.new_zeros((tokens * min(gates * k, w_in.shape[0]), w_in.shape[1]))
        if shared_w_in is not None:
            shared_hidden = x.new_zeros((tokens, shared_w_in.shape[0]))
    plan = _Plan(weights.to(out.dtype), experts, w_in.shape[0])

    def add(block: _Block, saved: Tensor) -> None:
        h = block.hidden(x[block.tokens].to(out.dtype))
        y = block.output(_activate(h, activation))
        out[:, block.tokens] += block.select(block.coefficient[..., None] * y)
        if save_hidden:
            saved[block.rows] = h.to(x.dtype)

    for _, block in plan.blocks(w_in, w_out, b_in, b_out):
        add(block, hidden)
    if shared_w_in is not None and shared_w_out is not None:
        add(plan.shared_block(x, shared_w_in, shared_w_out, shared_gate), shared_hidden)
    return out.to(x.dtype), hidden, shared_hidden


def backward(
    grad_out: Tensor,
    x: Tensor,
    weights: Tensor,
    experts: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    shared_w_in: Tensor | None,
    shared_w_out: Tensor | None,
    shared_gate: Tensor | None,
    hidden: Tensor | None,
    shared_hidden: Tensor | None,
    activation: str,
    needs: int,
) -> tuple[Tensor, ...]:
    """Gradients of the nine differentiable arguments, `[0]` for those that `needs` does not ask for."""
    dtype = statistics_dtype(x.dtype)
    arguments = (x, weights, w_in, w_out, b_in, b_out, shared_w_in, shared_w_out, shared_gate)
    need = [value is not None and bool(needs >> i & 1) for i, value in enumerate(arguments)]
    results = [
        value.new_zeros(value.shape) if value is not None and needed else x.new_empty(0)
        for value, needed in zip(arguments, need, strict=True)
    ]
    dx = x.new_zeros(x.shape, dtype=dtype)
    plan = _Plan(weights.to(dtype), experts, w_in.shape[0])
    dcoefficient = torch.zeros_like(plan.coefficient)

    def gradients(block: _Block, saved: Tensor | None, needed: Sequence[bool]) -> tuple[Tensor, Sequence[Tensor]]:
        rows = x[block.tokens].to(dtype)
        h = block.hidden(rows) if saved is None else saved[block.rows].to(dtype)
        drows, *rest = _block_gradients(block, rows, h, grad_out[:, block.tokens].to(dtype), activation, needed)
        if need[0]:
            dx[block.tokens] += drows
        return rows, rest

    for e, block in plan.blocks(w_in, w_out, b_in, b_out):
        _, found = gradients(block, hidden, need[:6])
        dcoefficient[:, block.rows] = found[0]
        for i, value in enumerate(found[1:], start=2):
            if need[i]:
                results[i][e] = value
    if shared_w_in is not None and shared_w_out is not None:
        block = plan.shared_block(x, shared_w_in, shared_w_out, shared_gate)
        need_gate = shared_gate is not None and (need[0] or need[8])
        rows, found = gradients(block, shared_hidden, (need[0], need_gate, *need[6:8], False, False))
        for i, value in enumerate(found[1:3], start=6):
            if need[i]:
                results[i].copy_(value)
        if shared_gate is not None and need_gate:
            logit = rows @ shared_gate.to(dtype)
            dlogit = found[0].sum(0) * logit.sigmoid() * (-logit).sigmoid()
            dx[block.tokens] += dlogit[:, None] * shared_gate.to(dtype)
            if need[8]:
                results[8].copy_(dlogit @ rows)
    if need[0]:
        results[0].copy_(dx)
    if need[1]:
        results[1].copy_(dcoefficient.gather(1, plan.slots.flatten(1)).view(weights.shape))
    return tuple(results)


def _block_gradients(
    block: _Block, x: Tensor, h: Tensor, dout: Tensor, activation: str, needed: Sequence[bool]
) -> tuple[Tensor, ...]:
    """Gradients of x, the coefficients, w_in, w_out, b_in and b_out, one zero for those that are not needed."""
    need_x, need_coefficient, need_w_in, need_w_out, need_b_in, need_b_out = needed
    zero = x.new_zeros(())
    a = _activate(h, activation)
    dout = block.select(dout)
    dy = (block.coefficient[..., None] * dout).sum(0)
    dh = _activate_gradient(dy @ block.w_out, h, activation) if need_x or need_w_in or need_b_in else zero
    return (
        dh @ block.w_in if need_x else zero,
        (dout * block.output(a)).sum(2) if need_coefficient else zero,
        dh.T @ x if need_w_in else zero,
        dy.T @ a if need_w_out else zero,
        dh.sum(0) if need_b_in else zero,
        dy.sum(0) if need_b_out else zero,
    )


def check_experts(experts: Tensor, num_experts: int) -> None:
    if not experts.numel() or not (experts.device.type == "cpu" or library.check_requested()):
        return
    low, high = int(experts.min()), int(experts.max())
    if low < -1 or high >= num_experts:
        raise ValueError(
            f"routing.experts must be in [0, {num_experts}) or -1 for none, got values from {low} to {high}"
        )
