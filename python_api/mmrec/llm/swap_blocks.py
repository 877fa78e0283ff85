"""Forwards of RMSNorm and of gated MLPs that keep less for the backward pass; they become attributes of instances.

RMSNorm (Zhang & Sennrich 2019, arXiv:1910.07467) of transformers makes half a dozen tensors, most in float32, and
autograd keeps a copy of x in float32 (more, where the weight trains); here x itself is all that is kept on CPU, and a
number per row beside it on GPU, by torch's own rms_norm. A gated MLP (SwiGLU, Shazeer 2020, arXiv:2002.05202) keeps
gate, up and silu(gate); here the last is computed again. The arithmetic is torch's own.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import rms_norm, silu

Reason = str | None


def norm_forward(self: Any, hidden_states: Tensor) -> Tensor:
    """`x / √(mean(x²) + eps) · weight` over the last dimension, in float32, rounded once."""
    weight: Tensor = self.weight
    if hidden_states.dtype != weight.dtype:  # torch's promotes the result, which the layers behind expect
        return type(self).forward(self, hidden_states)  # type: ignore[no-any-return]
    if hidden_states.device.type == "cpu" and torch.is_grad_enabled():
        return _RMSNorm.apply(hidden_states, weight, _eps(self))  # type: ignore[no-any-return]
    return rms_norm(hidden_states, weight.shape, weight, _eps(self))  # on GPU torch's own is fused, backward too


def mlp_forward(self: Any, x: Tensor) -> Tensor:
    """`down(silu(gate(x)) · up(x))`."""
    gate, up = self.gate_proj(x), self.up_proj(x)
    if torch.is_grad_enabled():
        return self.down_proj(_SwiGLU.apply(gate, up))  # type: ignore[no-any-return]
    return self.down_proj(silu(gate).mul_(up))  # type: ignore[no-any-return]


def refuse_norm(module: Any) -> Reason:
    """Why an RMSNorm cannot be computed by `norm_forward`, or None; found out on two rows."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 1 or not isinstance(_eps(module), float):
        return "it has no weight [d] and eps: left as it is"
    # Not of one size: an eps elsewhere would show. On the CPU whatever the caller's default device is.
    cpu = torch.device("cpu")
    x = torch.linspace(-2, 3, 2 * len(weight), device=cpu).view(2, -1) * torch.tensor([[1.0], [1e-3]], device=cpu)
    x = x.to(weight.device, weight.dtype)
    return _compared(lambda: type(module).forward(module, x), lambda: rms_norm(x, weight.shape, weight, _eps(module)))


def refuse_mlp(module: Any) -> Reason:
    """Why a gated MLP cannot be computed by `mlp_forward`, or None; found out with its layers replaced by scalars."""
    stub: Any = SimpleNamespace(
        gate_proj=lambda x: 2 * x, up_proj=lambda x: x + 1, down_proj=lambda x: 3 * x, act_fn=module.act_fn
    )
    x = torch.linspace(-30, 30, 64, device=torch.device("cpu"))
    return _compared(lambda: type(module).forward(stub, x), lambda: 3 * (silu(2 * x) * (x + 1)))


def is_norm(module: nn.Module) -> bool:
    """Whether a module is an RMSNorm by its name, as transformers' models have one each."""
    return type(module).__name__.endswith("RMSNorm")


def is_mlp(module: nn.Module) -> bool:
    """Whether a module has the parts of a gated MLP."""
    return all(hasattr(module, part) for part in ("gate_proj", "up_proj", "down_proj", "act_fn"))


def _compared(stock: Callable[[], Tensor], ours: Callable[[], Tensor]) -> Reason:
    try:
        with torch.no_grad():
            expected, found = stock(), ours()
            tolerance = (1e-5 if found.dtype == torch.float32 else 2e-2) * float(expected.abs().max())
            same = expected.dtype == found.dtype and bool(((expected - found).abs() <= tolerance).all())
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return "its forward needs more than what is swapped: left as it is"
    return None if same else "it computes something else: left as it is"


def _eps(module: Any) -> Any:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return rms_norm(x, weight.shape, weight, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wide = torch.promote_types(x.dtype, torch.float32)
        unit = x.to(wide, copy=True)
        scale = unit.square().mean(-1, keepdim=True).add_(ctx.eps).rsqrt_()
        unit.mul_(scale)
        dweight = (dy * unit).reshape(-1, len(weight)).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, dweight, None
        dunit = dy.to(wide) * weight.to(wide)
        along = (dunit * unit).mean(-1, keepdim=True)  # no dot product: autocast would round it
        return dunit.addcmul_(unit, along, value=-1).mul_(scale).to(x.dtype), dweight, None


class _SwiGLU(Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        dgate = torch.ops.aten.silu_backward(dy * up, gate) if ctx.needs_input_grad[0] else None
        return dgate, silu(gate).mul_(dy) if ctx.needs_input_grad[1] else None
