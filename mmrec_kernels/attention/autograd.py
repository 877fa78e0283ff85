"""Autograd of cross-modal attention: saves the inputs, `out`, `lse` and (if asked) `mass`; weights are recomputed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import library, schemas


def _bits(flags: tuple[bool, ...]) -> int:
    return sum(1 << bit for bit, flag in enumerate(flags) if flag)


class CrossModalAttention(torch.autograd.Function):
    """The three lists are passed flat, `*keys, *values, *index`: autograd does not look into lists."""

    @staticmethod
    def forward(
        ctx: Any,
        scale: float,
        norm_eps: float,
        indexed: int,
        causal: int,
        return_mass: bool,
        segments: int,
        offsets: Tensor,
        query_offsets: Tensor | None,
        query: Tensor,
        log_bias: Tensor | None,
        value_gate: Tensor | None,
        sink: Tensor | None,
        query_norm: Tensor | None,
        key_norm: Tensor | None,
        *rows: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        keys, values, index = rows[:segments], rows[segments : 2 * segments], rows[2 * segments :]
        out, lse, mass = library.call(
            schemas.attention_forward, query, list(keys), list(values), offsets, list(index), query_offsets, log_bias,
            value_gate, sink, query_norm, key_norm, scale, norm_eps, indexed, causal, return_mass,
        )  # fmt: skip
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            out, lse, mass, offsets, query_offsets, query, log_bias, value_gate, sink, query_norm, key_norm, *rows
        )
        ctx.settings, ctx.segments = (scale, norm_eps, indexed, causal), segments
        return out, lse, mass

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        out, lse, mass, offsets, query_offsets, query, *small, keys, values, index = _unflatten(ctx)
        constants, count = 8, ctx.segments
        flags = ctx.needs_input_grad
        first = constants + 6
        needs = _bits(flags[constants:first])
        key_needs, value_needs = _bits(flags[first : first + count]), _bits(flags[first + count : first + 2 * count])
        grad_out, grad_lse, grad_mass = (None if grad is None else grad.contiguous() for grad in grads)
        if not mass.numel():
            grad_mass = None
        results = library.call(
            schemas.attention_backward, grad_out, grad_lse, grad_mass, out, lse, mass, query, keys, values, offsets,
            index, query_offsets, *small, *ctx.settings, needs, key_needs, value_needs,
        )  # fmt: skip
        grad_query, grad_keys, grad_values, *grad_small = results
        singles = [grad if needs >> bit & 1 else None for bit, grad in enumerate((grad_query, *grad_small))]
        return (
            *[None] * constants, *singles, *_unpack(grad_keys, keys, key_needs),
            *_unpack(grad_values, values, value_needs), *[None] * len(index),
        )  # fmt: skip


def _unflatten(ctx: Any) -> tuple[Any, ...]:
    saved, count = ctx.saved_tensors, ctx.segments
    head, rows = saved[:11], saved[11:]
    return (*head, list(rows[:count]), list(rows[count : 2 * count]), list(rows[2 * count :]))


def _unpack(packed: Tensor, rows: list[Tensor], needs: int) -> list[Tensor | None]:
    """The gradient of each segment that needs one, out of the rows of all of them."""
    result: list[Tensor | None] = []
    start = 0
    for m, x in enumerate(rows):
        if needs >> m & 1:
            result.append(packed[start : start + x.shape[0]])
            start = start + x.shape[0]
        else:
            result.append(None)
    return result
