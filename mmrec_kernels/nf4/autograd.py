"""The gradient of the NF4 linear: dx, dbias, da and db; W is frozen and decoded again where dx needs it."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from .. import library, schemas


class NF4Linear(Function):
    """Keeps the 4-bit weight as it is, x only for da, and S = x aᵀ (`[M, r]`) only for db: never a decoded W."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bias: Tensor | None,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        packed: Tensor,
        absmax: Tensor,
        nested_absmax: Tensor | None,
        nested_code: Tensor | None,
        offset: Tensor | None,
        out_features: int,
        blocksize: int,
        scaling: float,
        scalings: Tensor | None,
        adapter_ids: Tensor | None,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        weight = (packed, absmax, nested_absmax, nested_code, offset)
        need_a, need_b = ctx.needs_input_grad[2:4]
        y, lora_x = library.call(
            schemas.nf4_forward, x, *weight, out_features, blocksize, bias, lora_a, lora_b, scaling, scalings,
            adapter_ids, need_b,
        )  # fmt: skip
        ctx.save_for_backward(
            x if need_a else None, *weight, lora_a, lora_b, scalings, adapter_ids, lora_x if need_b else None
        )
        ctx.in_features, ctx.blocksize, ctx.scaling = x.shape[1], blocksize, scaling
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 14
        x, *weight, lora_a, lora_b, scalings, adapter_ids, lora_x = ctx.saved_tensors
        need_x, need_bias, need_a, need_b = ctx.needs_input_grad[:4]
        dx, da, db, dbias = library.call(
            schemas.nf4_backward, dy.contiguous(), x, *weight, ctx.in_features, ctx.blocksize, lora_a, lora_b,
            ctx.scaling, scalings, adapter_ids, lora_x, need_x, need_a, need_b, need_bias,
        )  # fmt: skip
        gradients = (
            dx if need_x else None,
            dbias.to(ctx.bias_dtype) if need_bias else None,
            da if need_a else None,
            db if need_b else None,
        )
        return gradients + (None,) * 10
