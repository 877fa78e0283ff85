"""Routing: the autograd functions around the raw ops. Only the gradients that are needed are computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import library, schemas

# From this width on the pre-activations are kept for backward instead of recomputed: below it reading and writing them
# costs more than the product that makes them.
SAVE_HIDDEN_WIDTH = 256


def _needs_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def route(*args: Any) -> tuple[Tensor, ...]:
    """`_routing_forward`, with autograd only if x or gate_weight needs a gradient."""
    if _needs_gradient(*args[:2]):
        return _Route.apply(*args)
    return library.call(schemas.routing_forward, *library.detached(args))


def mix(*args: Any) -> Tensor:
    """`_experts_forward` without its last argument: out `[G, T, d]`, with autograd only if it is needed."""
    if _needs_gradient(*args[:10]):
        return _Mix.apply(*args)
    return library.call(schemas.experts_forward, *library.detached(args), False)[0]


class _Route(torch.autograd.Function):
    """Keeps its inputs, the selection and the sums over tokens; the logits are recomputed."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        x, gate_weight, modality, allowed, bias, valid, k, num_modalities, score, renormalize = args
        weights, experts, stats, losses = library.call(schemas.routing_forward, *args)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(experts, stats)
        ctx.save_for_backward(x, gate_weight, modality, allowed, valid, weights, experts, stats)
        ctx.score, ctx.renormalize = score, renormalize
        return weights, experts, stats, losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_weights, _, _, grad_losses = (None if g is None else g.contiguous() for g in grads)
        if grad_weights is None and grad_losses is None:
            return (None,) * 10
        need_x, need_gate = ctx.needs_input_grad[:2]
        dx, dgate = library.call(
            schemas.routing_backward, grad_weights, grad_losses, *ctx.saved_tensors, ctx.score, ctx.renormalize,
            need_x, need_gate,
        )  # fmt: skip
        return (dx if need_x else None, dgate if need_gate else None, *(None,) * 8)


# Where each differentiable argument of `_experts_forward` stands, in the order of `_experts_backward`'s results.
_DIFFERENTIABLE = (0, 1, 3, 4, 5, 6, 7, 8, 9)


class _Mix(torch.autograd.Function):
    """Keeps its inputs and, for wide tokens, the pre-activations: neither gathered rows nor expert outputs."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *tensors, activation = args
        save_hidden = tensors[0].shape[1] >= SAVE_HIDDEN_WIDTH
        out, hidden, shared_hidden = library.call(schemas.experts_forward, *tensors, activation, save_hidden)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, hidden if save_hidden else None, shared_hidden if save_hidden else None)
        ctx.activation = activation
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad_out is None:
            return (None,) * 11
        needed = [bool(ctx.needs_input_grad[i]) for i in _DIFFERENTIABLE]
        needs = sum(1 << i for i, need in enumerate(needed) if need)
        found = library.call(schemas.experts_backward, grad_out.contiguous(), *ctx.saved_tensors, ctx.activation, needs)
        results: list[Tensor | None] = [None] * 11
        for place, need, gradient in zip(_DIFFERENTIABLE, needed, found, strict=True):
            results[place] = gradient if need else None
        return tuple(results)
