"""NF4 linear with LoRA: a frozen 4-bit weight read as bitsandbytes stores it, adapters and bias in one pass."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import library, schemas
from ..validation import INTEGERS, check_float, check_tensor
from . import reference
from .autograd import NF4Linear
from .weight import NF4Weight

__all__ = ["LoRA", "NF4Weight", "nf4_linear"]


class LoRA(NamedTuple):
    """Low-rank adapters (Hu et al. 2021, arXiv:2106.09685): the weight acts as W + scaling · b a.

    `a [r, K]` and `b [N, r]`, or stacks `[A, r, K]` and `[A, N, r]` of A adapters: both float32, or both in the dtype
    of the input. `scaling`, peft's `lora_alpha / r`: a float, or a tensor `[A]` (one per adapter; without gradient).
    """

    a: Tensor
    b: Tensor
    scaling: float | Tensor = 1.0


def nf4_linear(
    x: Tensor,
    weight: NF4Weight,
    bias: Tensor | None = None,
    *,
    lora: LoRA | None = None,
    adapter_ids: Tensor | None = None,
) -> Tensor:
    """`y = x Wᵀ + scaling · (x aᵀ) bᵀ + bias` with W decoded from 4 bits as it is read (QLoRA, arXiv:2305.14314).

    W[n, k] is the float32 product code · absmax of its block, rounded to nearest even to the dtype of x. Products and
    sums are in float32 (float64 for float64), x aᵀ stays there too, and y is rounded once.

    Args:
        x: `[..., K]`, float32, bfloat16 or float64 (float16 on GPU). Under autocast it is cast to the autocast dtype.
        weight: an `NF4Weight` of shape (N, K) on the same device. It is frozen: it has no gradient.
        bias: `[N]`, float32 or the dtype of x.
        lora: one adapter, or a stack of them with `adapter_ids`. Under autocast float32 adapters and bias stay float32.
        adapter_ids: int32 or int64, broadcasting to `x.shape[:-1]` (`[B, 1]`: per sequence): which adapter of the stack
            each row takes, −1 for none. With a single adapter it holds 0 or −1. On GPU an id outside acts as −1.

    Returns:
        `[..., N]` in the dtype of x. Differentiable once in x, bias, a and b. Training and evaluation, and any
        combination of needed gradients, give the same bits; mixed adapters give each row the bits that a run of the
        same size with its adapter alone gives it.

    Raises:
        TypeError, ValueError: a wrong dtype, shape or device; `adapter_ids` missing for a stack or given without
            `lora`; on CPU also an id outside [−1, A).
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if not isinstance(weight, NF4Weight):
        raise TypeError(f"weight must be an NF4Weight, got {type(weight).__name__}")
    out_features, in_features = weight.shape
    autocast = _autocast_dtype(x.device)
    if autocast is not None and x.is_floating_point() and x.dtype != torch.float64:
        x = x.to(autocast)
    check_float("x", x, (*("*",) * (x.ndim - 1), in_features))
    if weight.device != x.device:
        raise ValueError(f"weight must be on {x.device}, got {weight.device}")
    lead = x.shape[:-1]
    num_rows = math.prod(lead)
    dtypes = (x.dtype,) if x.dtype == torch.float32 else (x.dtype, torch.float32)
    if bias is not None:
        bias = check_tensor("bias", _narrow(bias, autocast), (out_features,), dtypes, device=x.device)
    lora_a = lora_b = scalings = None
    scaling = 1.0
    if lora is not None:
        if not isinstance(lora, LoRA):
            raise TypeError(f"lora must be a LoRA, got {type(lora).__name__}")
        lora = LoRA(_narrow(lora.a, autocast), _narrow(lora.b, autocast), lora.scaling)
        lora_a, lora_b, scaling, scalings = _check_lora(lora, weight, x, dtypes, stacked=adapter_ids is not None)
    elif adapter_ids is not None:
        raise ValueError("adapter_ids must be None unless lora is given")
    if adapter_ids is not None:
        adapter_ids = _check_adapter_ids(adapter_ids, lead, x.device).reshape(num_rows).contiguous()
    flat = x.reshape(num_rows, in_features)
    differentiable = [None if t is None else t.contiguous() for t in (flat, bias, lora_a, lora_b)]
    rest = (*weight.tensors(), out_features, weight.blocksize)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in differentiable):
        y = NF4Linear.apply(*differentiable, *rest, scaling, scalings, adapter_ids)
    else:
        flat, bias, lora_a, lora_b = library.detached(differentiable)
        y, _ = library.call(
            schemas.nf4_forward, flat, *rest, bias, lora_a, lora_b, scaling, scalings, adapter_ids, False
        )
    return y.reshape(*lead, out_features)


def _autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of autocast on `device`, None where it is off. It leaves float64 alone."""
    if not torch.amp.is_autocast_available(device.type) or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def _narrow(parameter: Tensor, autocast: torch.dtype | None) -> Tensor:
    """A 16-bit parameter in the dtype of autocast, as the input it meets; float32 ones stay, as the op takes them."""
    if autocast is None or not isinstance(parameter, Tensor):
        return parameter
    return parameter.to(autocast) if parameter.dtype in (torch.bfloat16, torch.float16) else parameter


def _check_lora(
    lora: LoRA, weight: NF4Weight, x: Tensor, dtypes: tuple[torch.dtype, ...], *, stacked: bool
) -> tuple[Tensor, Tensor, float, Tensor | None]:
    """a `[A, r, K]`, b `[A, N, r]`, the scaling of all adapters and, where they differ, theirs."""
    a, b, scaling = lora
    if isinstance(a, Tensor) and a.ndim == 3:
        if not stacked:
            raise ValueError(f"adapter_ids must be given for stacked adapters, got None for lora.a of {list(a.shape)}")
        check_tensor("lora.a", a, ("A", "r", weight.shape[1]), dtypes, device=x.device)
        check_tensor("lora.b", b, (a.shape[0], weight.shape[0], a.shape[1]), (a.dtype,), device=x.device)
    else:
        check_tensor("lora.a", a, ("r", weight.shape[1]), dtypes, device=x.device)
        check_tensor("lora.b", b, (weight.shape[0], a.shape[0]), (a.dtype,), device=x.device)
        a, b = a.unsqueeze(0), b.unsqueeze(0)
    if not isinstance(scaling, Tensor):
        if isinstance(scaling, bool) or not isinstance(scaling, int | float | torch.SymFloat):
            raise TypeError(f"lora.scaling must be a float or a tensor [A], got {type(scaling).__name__}")
        return a, b, float(scaling), None
    check_tensor("lora.scaling", scaling, (a.shape[0],), (torch.float32, torch.float64), device=x.device)
    if scaling.requires_grad:
        raise ValueError("lora.scaling must not require a gradient, got a tensor that does: detach it")
    return a, b, 1.0, scaling.to(schemas.statistics_dtype(x.dtype)).contiguous()


def _check_adapter_ids(adapter_ids: Tensor, lead: torch.Size, device: torch.device) -> Tensor:
    """`adapter_ids` as int64, expanded to `lead`."""
    if not isinstance(adapter_ids, Tensor):
        raise TypeError(f"adapter_ids must be a tensor, got {type(adapter_ids).__name__}")
    check_tensor("adapter_ids", adapter_ids, ("*",) * adapter_ids.ndim, INTEGERS, device=device)
    trailing = lead[len(lead) - adapter_ids.ndim :] if adapter_ids.ndim <= len(lead) else None
    if trailing is None or any(got not in (1, need) for got, need in zip(adapter_ids.shape, trailing, strict=True)):
        raise ValueError(f"adapter_ids must broadcast to {list(lead)}, got {list(adapter_ids.shape)}")
    return adapter_ids.to(torch.int64).expand(lead)


def _launcher(name: str) -> Callable[[], Callable[..., Any]]:
    def load() -> Callable[..., Any]:
        from . import triton

        return getattr(triton, name)  # type: ignore[no-any-return]

    return load


for _name in ("forward", "backward", "dequantize"):
    library.announce(f"_nf4_{_name}", reference=getattr(reference, _name), triton=_launcher(_name))
