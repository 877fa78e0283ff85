"""`swap_kernels`: one call puts this package's kernels into an existing model, and `undo()` takes them out exactly.

Only attributes of module instances change, and the model's own choice of attention and experts. No class, no module
global, no parameter, no key of the state dict and no module's type does.
"""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from typing import Any, NamedTuple

from torch import nn

from . import swap_blocks, swap_linear
from .attention import implementations, register_attention
from .experts import register_experts
from .extras import KERNELS, require

__all__ = ["Swap", "SwappedLayer", "swap_kernels"]

_FOREIGN = "its forward was replaced by something else (a hook, another patch): left as it is"
_BLOCKS = {
    "norm": (swap_blocks.is_norm, swap_blocks.refuse_norm, swap_blocks.norm_forward),
    "mlp": (swap_blocks.is_mlp, swap_blocks.refuse_mlp, swap_blocks.mlp_forward),
}
_OURS = {swap_linear.base_forward, swap_linear.adapted_forward, *(forward for _, _, forward in _BLOCKS.values())}


class SwappedLayer(NamedTuple):
    """One line of a report: a module's name ("" is the model), what of it, and why not; None where it was swapped."""

    name: str
    part: str
    reason: str | None


class Swap:
    """What `swap_kernels` changed. A context manager: leaving it undoes.

    Copies of the model (`copy.deepcopy`) are swapped as the model was; to undo in a copy, swap it and undo that.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        self._layers: list[SwappedLayer] = []
        self._forwards: list[nn.Module] = []
        self._attention: Any = None
        self._experts: list[tuple[Any, Any]] = []

    def report(self) -> list[SwappedLayer]:
        """Every part that was swapped, or that was looked at and left, with the reason."""
        return list(self._layers)

    def __str__(self) -> str:
        """The report in a few lines: how many of each part, and every reason once."""
        swapped = Counter(layer.part for layer in self._layers if layer.reason is None)
        left = Counter((layer.part, layer.reason) for layer in self._layers if layer.reason is not None)
        lines = [f"{part}: {count} swapped" for part, count in swapped.items()]
        lines += [f"{part}: {count} left: {reason}" for (part, reason), count in left.items()]
        return "\n".join(lines) or "nothing to swap"

    def undo(self) -> None:
        """Puts everything back; a second call does nothing."""
        for module in self._forwards:
            if _is_ours(module.__dict__.get("forward")):
                del module.forward
        self._forwards.clear()
        for part, implementation in self._experts:
            part.set_experts_implementation(implementation)
        self._experts.clear()
        if self._attention is not None:
            self.model.set_attn_implementation(self._attention)
            self._attention = None

    def __enter__(self) -> Swap:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def swap_kernels(
    model: nn.Module,
    *,
    linear: bool = True,
    attention: bool | None = None,
    experts: bool | None = None,
    norm: bool = True,
    mlp: bool = True,
) -> Swap:
    """Lets `model` compute with this package's kernels until `undo()`.

    Args:
        model: any module: of transformers, wrapped by peft, or one that holds bitsandbytes' 4-bit layers.
        linear: bitsandbytes' NF4 layers, and peft's LoRA layers around them, compute with `nf4_linear`. Adapters may be
            switched, disabled, merged and unloaded as before. DoRA, dropout while training and biases of adapters are
            computed by peft's own forward around the swapped layer, and so is what has hooks; the report says so.
        attention: True: `cross_modal_attention` behind transformers' interface. None or False: left.
        experts: True: `mixture_of_experts` behind transformers' interface. None or False: left.
        norm: RMSNorm keeps its input alone for the backward pass, and is one call of torch's; what is rounded twice in
            16 bits is rounded once.
        mlp: gated MLPs (SwiGLU) compute silu(gate) again in the backward pass instead of keeping it.

    Returns:
        A `Swap`, with `report()`, `undo()`, and as a context manager. Swapping twice changes nothing more. Undoing
        either takes the linear layers' kernels out; attention and experts go back to what they were before that call.

    Raises:
        TypeError: not a module.
        ValueError: attention or experts asked for that the model does not let be chosen.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    swap = Swap(model)
    with ExitStack() as unless_all_goes_well:
        unless_all_goes_well.callback(swap.undo)
        if linear:
            _swap_linear(swap)
        if norm:
            _swap_blocks(swap, "norm")
        if mlp:
            _swap_blocks(swap, "mlp")
        if attention:
            _swap_attention(swap)
        if experts:
            _swap_experts(swap)
        unless_all_goes_well.pop_all()
    return swap


def _swap_linear(swap: Swap) -> None:
    module: Any
    for name, module in swap.model.named_modules():
        forward = swap_linear.kind_of(module)
        if forward is None:
            continue
        adapted = forward is swap_linear.adapted_forward
        part = "LoRA" if adapted else "linear"
        if any(_is_foreign(m.__dict__.get("forward")) for m in ((module, module.base_layer) if adapted else (module,))):
            swap._layers.append(SwappedLayer(name, part, _FOREIGN))
            continue
        reason = swap_linear.refuse_base(module.base_layer if adapted else module)
        if reason is None:
            swap._forwards.append(module)
            module.forward = swap_linear.bound(forward, module)
            if adapted:  # swapped all the same: peft's forward is asked where an adapter needs it
                reason = swap_linear.why_not(module, list(module.lora_A))
        swap._layers.append(SwappedLayer(name, part, reason))


def _is_foreign(forward: Any) -> bool:
    return forward is not None and not _is_ours(forward)


def _is_ours(forward: Any) -> bool:
    return getattr(forward, "__func__", None) in _OURS


def _swap_blocks(swap: Swap, part: str) -> None:
    is_one, refuse, forward = _BLOCKS[part]
    for name, module in swap.model.named_modules():
        if not is_one(module):
            continue
        reason = _FOREIGN if _is_foreign(module.__dict__.get("forward")) else refuse(module)
        if reason is None:
            swap._forwards.append(module)
            module.forward = swap_linear.bound(forward, module)
        swap._layers.append(SwappedLayer(name, part, reason))


def _swap_attention(swap: Swap) -> None:
    model: Any = swap.model
    swap._attention = implementations(model.config)
    register_attention(KERNELS)
    model.set_attn_implementation(KERNELS)
    if model.config._attn_implementation != KERNELS:
        raise ValueError(f"attention: model {type(model).__name__} does not let its attention be chosen")
    swap._layers.append(SwappedLayer("", "attention", None))


def _swap_experts(swap: Swap) -> None:
    kind = require("transformers").PreTrainedModel
    parts: list[Any] = [part for part in swap.model.modules() if isinstance(part, kind)]
    swap._experts = [(part, part.config._experts_implementation) for part in parts]
    register_experts(KERNELS)
    for part in parts:
        part.set_experts_implementation(KERNELS)
    if all(part.config._experts_implementation != KERNELS for part in parts):
        raise ValueError(f"experts: model {type(swap.model).__name__} has no experts that can be chosen")
    swap._layers.append(SwappedLayer("", "experts", None))
