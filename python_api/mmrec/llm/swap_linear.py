"""Forwards of bitsandbytes' 4-bit layer, and of peft's LoRA layer around it, through `nf4_linear`.

They become attributes of module instances: methods bound to the module, so that `copy.deepcopy` binds the copy's to the
copy. The view of a layer's bytes is kept beside it, in a weak dictionary.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mmrec_kernels import LoRA, NF4Weight, nf4_linear

from .extras import require

Reason = str | None


class ByToken(NamedTuple):
    """Which of `names` each token of a packed row takes, int64 `[T]`, −1 for none."""

    names: tuple[str, ...]
    ids: Tensor


_by_token: ContextVar[ByToken | None] = ContextVar("mmrec_by_token", default=None)
_views: weakref.WeakKeyDictionary[nn.Module, tuple[Any, Tensor, NF4Weight]] = weakref.WeakKeyDictionary()


def view_of(layer: Any) -> NF4Weight:
    """The layer's bytes as an NF4Weight, made again where they have been replaced (`.to()`, a merge, a load).

    Raises:
        ValueError: what `NF4Weight.from_bitsandbytes` refuses: a weight not quantised, not NF4, or repacked.
    """
    weight = layer.weight
    state = getattr(weight, "quant_state", None) or getattr(layer, "quant_state", None)
    found = _views.get(layer)
    if found is not None and found[0] is state and found[1].data_ptr() == weight.data_ptr():
        if not getattr(state, "packing_format_for_cpu", False):
            return found[2]
    if getattr(weight, "quant_state", None) is None and state is not None:
        weight.quant_state = state  # what bitsandbytes does at its next forward, after a move that lost it
    view = NF4Weight.from_bitsandbytes(weight)
    _views[layer] = (state, view.packed, view)
    return view


def refuse_base(layer: Any) -> Reason:
    """Why a 4-bit layer cannot be computed by the kernel, or None."""
    try:
        view_of(layer)
    except (TypeError, ValueError) as error:
        return str(error)
    return None


def base_forward(self: Any, x: Tensor) -> Tensor:
    """`Linear4bit.forward` through `nf4_linear`: nothing is repacked, and gradients reach x in every mode."""
    return _linear(self, x, None, None).to(x.dtype)


def adapted_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """peft's `Linear4bit.forward`: base and adapters in one pass where that is what peft would compute, else peft's own
    forward, whose base layer is still the kernel's."""
    tokens = _by_token.get()
    if tokens is not None:
        return _token_by_token(self, x, tokens)
    names = kwargs.get("adapter_names")
    if args or set(kwargs) - {"adapter_names", "alora_offsets"} or self.merged or self.disable_adapters:
        return type(self).forward(self, x, *args, **kwargs)
    self._check_forward_args(x, **kwargs)
    wanted = set(names or self.active_adapters) - {"__base__"}
    used = [name for name in (sorted(wanted) if names else self.active_adapters) if name in self.lora_A]
    if not used:
        return self.base_layer(x)
    if why_not(self, used, mixed=names is not None) is not None:
        return type(self).forward(self, x, *args, **kwargs)
    base = self.base_layer
    if names is None and used[0] in self.lora_variant:  # aLoRA, alone: see why_not
        ids = _invoked(x, kwargs.get("alora_offsets"))
        return _linear(base, x, _joined(self, used, _compute_dtype(base, x)), ids).to(x.dtype)
    if names is None:
        return _linear(base, x, _joined(self, used, _compute_dtype(base, x)), None).to(x.dtype)
    places = {name: n for n, name in enumerate(used)}
    ids = torch.tensor([places.get(name, -1) for name in names], device=x.device)
    ids = ids.view(-1, *(1,) * (x.ndim - 2))
    return _linear(base, x, _stacked(self, used, _compute_dtype(base, x)), ids).to(x.dtype)


@contextmanager
def by_token(names: Sequence[str], ids: Tensor) -> Iterator[None]:
    """Inside, the tokens of a packed row take these adapters (see `ByToken`) in all adapted layers, where
    `why_not_by_token` is None."""
    before = _by_token.set(ByToken(tuple(names), ids))
    try:
        yield
    finally:
        _by_token.reset(before)


def why_not_by_token(model: nn.Module, names: Sequence[str]) -> Reason:
    """Why these adapters cannot compute their tokens of one packed row in one pass of `model`, or None."""
    from peft.tuners.lora import LoraLayer

    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        used = [adapter for adapter in names if adapter in layer.lora_A or adapter in layer.lora_embedding_A]
        if not used:
            continue
        own: Any = layer
        if getattr(own.__dict__.get("forward"), "__func__", None) is not adapted_forward:
            return f"{name} is not computed by the kernel"
        if sum(part.isdigit() for part in name.split(".")) > 1:
            return f"{name} is one of a list in its block and may see a part of the tokens"
        if own.merged:
            return f"{name} is merged"
        reason = why_not(own, used, mixed=True)
        if reason is not None:
            return f"{name}: {reason}"
    return None


def _token_by_token(layer: Any, x: Tensor, tokens: ByToken) -> Tensor:
    """`x [1, T, K]`, or without the first dimension."""
    used = [name for name in tokens.names if name in layer.lora_A]
    if not used:
        return layer.base_layer(x)  # type: ignore[no-any-return]
    ids, base = tokens.ids, layer.base_layer
    if len(used) < len(tokens.names):  # the others leave this layer alone
        places = [used.index(name) if name in used else -1 for name in tokens.names]
        ids = torch.tensor([*places, -1], device=ids.device)[ids]
    return _linear(base, x, _stacked(layer, used, _compute_dtype(base, x)), ids).to(x.dtype)


def why_not(layer: Any, names: list[str], *, mixed: bool = False) -> Reason:
    """Why peft's own forward has to compute these adapters of a layer in its current mode, or None."""
    # Asked at every call of every layer: modules are taken from where nn.Module keeps them, past its slow __getattr__.
    modules = layer._modules
    base = modules["base_layer"]
    if _is_watched(base):
        return "its base layer has hooks, which only a call of that layer runs: computed by peft"
    for name in names:
        lora_a, lora_b = modules["lora_A"]._modules[name], modules["lora_B"]._modules[name]
        if _is_watched(lora_a) or _is_watched(lora_b):
            return f"adapter {name!r} has hooks, which only a call of its layers runs: computed by peft"
        if name in layer.lora_variant and (mixed or len(names) > 1 or not _is_alora(layer.lora_variant[name])):
            return f"adapter {name!r} is {type(layer.lora_variant[name]).__name__}: computed by peft"
        if layer.training:
            dropout = modules["lora_dropout"]._modules[name]
            if not isinstance(dropout, nn.Identity) and getattr(dropout, "p", 0.0) > 0:
                return f"adapter {name!r} has dropout {dropout.p} while training: computed by peft"
        if lora_b.bias is not None:
            return f"adapter {name!r} has a bias: computed by peft"
        if lora_a.weight.device != base.weight.device:
            return f"adapter {name!r} is on another device than its layer: computed by peft"
    if not mixed:
        return None
    ranks = {layer.lora_A[name].weight.shape[0] for name in names}
    if len(ranks) > 1:
        return f"adapters of one batch have ranks {sorted(ranks)}: computed by peft"
    if torch.is_grad_enabled() and layer.training:
        return "several adapters in a batch are for inference: computed by peft"
    return None


def _is_alora(variant: Any) -> bool:
    """Activated LoRA (arXiv:2504.12397): the adapter acts from its invocation on."""
    return type(variant).__name__ == "ALoraLinearVariant"


def _invoked(x: Tensor, offsets: list[int | None] | None) -> Tensor:
    """Adapter ids of aLoRA for `x [B, T, K]` or `[B, K]`: 0 for the last `offsets[b]` tokens of text b, else −1."""
    tokens = x.shape[1] if x.ndim == 3 else 1
    last = torch.tensor([offset or 0 for offset in offsets or [0] * len(x)]).unsqueeze(1)
    return ((torch.arange(tokens, 0, -1) <= last).long() - 1).view(x.shape[:-1]).to(x.device)


def _is_watched(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _compute_dtype(layer: Any, x: Tensor) -> torch.dtype:
    """What the stock layer computes in; float32 in place of float16 on CPU, where the op does not have that."""
    dtype: torch.dtype = layer.compute_dtype or x.dtype
    if not layer.compute_type_is_set and x.dtype in (torch.float32, torch.bfloat16):
        dtype = x.dtype
    return torch.float32 if dtype == torch.float16 and x.device.type == "cpu" else dtype


def _linear(layer: Any, x: Tensor, lora: LoRA | None, ids: Tensor | None) -> Tensor:
    dtype = _compute_dtype(layer, x)
    bias = layer.bias
    if bias is not None and bias.dtype not in (dtype, torch.float32):
        bias = bias.to(dtype)
    return nf4_linear(x.to(dtype), view_of(layer), bias, lora=lora, adapter_ids=ids)


def _factors(layer: Any, name: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A and B of an adapter, widened where the kernel does not take their dtype beside `dtype`."""
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    if a.dtype == b.dtype and a.dtype in (dtype, torch.float32):
        return a, b
    return a.float(), b.float()


def _joined(layer: Any, names: list[str], dtype: torch.dtype) -> LoRA:
    """All of them on every row: one adapter of the sum of their ranks."""
    if len(names) == 1:
        return LoRA(*_factors(layer, names[0], dtype), layer.scaling[names[0]])
    factors = [_factors(layer, name, torch.float32) for name in names]
    a = torch.cat([a.float() for a, _ in factors])
    b = torch.cat([b.float() * layer.scaling[name] for name, (_, b) in zip(names, factors, strict=True)], dim=1)
    return LoRA(a, b)


def _stacked(layer: Any, names: list[str], dtype: torch.dtype) -> LoRA:
    """One for each row. Made at each call: a write to an adapter's `.data` would leave a kept one behind unseen."""
    factors = [_factors(layer, name, dtype) for name in names]
    if len({a.dtype for a, _ in factors}) > 1:
        factors = [(a.float(), b.float()) for a, b in factors]
    scalings = torch.tensor([float(layer.scaling[n]) for n in names], dtype=torch.float32, device=factors[0][0].device)
    return LoRA(torch.stack([a for a, _ in factors]), torch.stack([b for _, b in factors]), scalings)


def kind_of(module: nn.Module) -> Callable[..., Tensor] | None:
    """Which of the two forwards a module takes, or None."""
    if isinstance(module, require("bitsandbytes").nn.Linear4bit):
        return base_forward
    try:
        from peft.tuners.lora.bnb import Linear4bit
    except ImportError:
        return None
    return adapted_forward if isinstance(module, Linear4bit) else None


def bound(function: Callable[..., Tensor], module: nn.Module) -> types.MethodType:
    """`function` as a method of this instance."""
    return types.MethodType(function, module)
