"""`mixture_of_experts` behind transformers' `ExpertsInterface`: one name that any of its mixtures can be set to.

Nothing of it is installed by importing this module: `register_experts` puts a function under a name and
`unregister_experts` takes it out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmrec_kernels import mixture_of_experts

from .extras import KERNELS, require

__all__ = ["kernel_experts", "register_experts", "unregister_experts"]

_ELSE = "set this model to experts_implementation='grouped_mm'"


def register_experts(name: str = KERNELS) -> None:
    """Makes `experts_implementation=name` and `model.set_experts_implementation(name)` mean this package's experts.

    The router stays the model's own; tokens are neither sorted nor copied per expert, and pre-activations are the most
    that is kept for the backward. Experts whose weights are stored transposed are copied at every call. What the op
    cannot do is refused with a ValueError when it is met, never computed by something else: an activation or a gate of
    the model's own (gpt-oss's clamped one), interleaved gates, a norm behind each expert.
    """
    _interface().register(name, _experts)


def unregister_experts(name: str = KERNELS) -> None:
    """Takes the name out again; a model that is still set to it raises KeyError at its next call."""
    _interface()._global_mapping.pop(name, None)


@contextmanager
def kernel_experts(model: Any, name: str = KERNELS) -> Iterator[Any]:
    """Inside, `model` (of transformers, perhaps wrapped by peft) computes its experts with this package; after it, with
    what it had before.

    Raises:
        ValueError: the model has no experts that can be chosen.
    """
    kind = require("transformers").PreTrainedModel
    before = [(part, part.config._experts_implementation) for part in model.modules() if isinstance(part, kind)]
    register_experts(name)
    try:
        for part, _ in before:
            part.set_experts_implementation(name)
        if all(part.config._experts_implementation != name for part, _ in before):
            raise ValueError(f"model {type(model).__name__} has no experts that can be chosen")
        yield model
    finally:
        # From the outside in: each call sets the parts within too, which then get their own.
        for part, implementation in before:
            part.set_experts_implementation(implementation)


def _interface() -> Any:
    return require("transformers.integrations.moe").ExpertsInterface


class _Routing(NamedTuple):
    weights: Tensor
    experts: Tensor


class _Kind(NamedTuple):
    """What transformers says of a class of experts. Versions before it said one of them had no experts of that kind."""

    has_gate: bool = True
    has_bias: bool = False
    is_transposed: bool = False
    is_concatenated: bool = True
    has_post_expert_norm: bool = False
    is_expert_parallel: bool = False

    @classmethod
    def of(cls, module: Any) -> _Kind:
        names = {name: f"_{name}" if name == "is_expert_parallel" else name for name in cls._fields}
        return cls(**{name: getattr(module, told) for name, told in names.items() if hasattr(module, told)})


def _experts(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """`hidden_states [T, d]`, `top_k_index` and `top_k_weights [T, k]` to `[T, d]`, with the parameters of `module`."""
    kind = _Kind.of(module)
    if kind.has_post_expert_norm:
        raise ValueError(
            f"experts {KERNELS!r} have no norm behind each expert, as {type(module).__name__} has; {_ELSE}"
        )
    activation = _activation(module, kind)
    up = "gate_up_proj" if kind.has_gate else "up_proj"
    w_in, w_out = getattr(module, up), module.down_proj
    b_in, b_out = (getattr(module, f"{up}_bias"), module.down_proj_bias) if kind.has_bias else (None, None)
    if kind.is_transposed:
        w_in, w_out = w_in.mT, w_out.mT
    if kind.is_expert_parallel:  # ids from the number of experts on are of other processes
        top_k_index = top_k_index.masked_fill(top_k_index >= w_in.shape[0], -1)
    routing = _Routing(top_k_weights, top_k_index)
    return mixture_of_experts(hidden_states, routing, w_in, w_out, b_in=b_in, b_out=b_out, activation=activation)


def _activation(module: Any, kind: _Kind) -> str:
    """The op's name of what `module` does between its two products."""
    from transformers.integrations import moe

    owner = type(module).__name__
    if kind.has_gate and not kind.is_concatenated:
        raise ValueError(f"experts {KERNELS!r} need gates in front of ups, {owner} has them interleaved; {_ELSE}")
    usual = type(module)._apply_gate is moe._default_apply_gate and "_apply_gate" not in module.__dict__
    if kind.has_gate and not usual:
        raise ValueError(f"experts {KERNELS!r} have no gate like that of {owner}; {_ELSE}")
    name = _activation_name(module.act_fn)
    if kind.has_gate:
        name = {"silu": "swiglu", "gelu": "geglu"}.get(name, "")
    if not name:
        raise ValueError(f"experts {KERNELS!r} have no activation {module.act_fn}, which {owner} asks for; {_ELSE}")
    return name


def _activation_name(function: Any) -> str:
    """One of the op's activations without a gate, or nothing."""
    if isinstance(function, nn.GELU):
        return "gelu" if function.approximate == "none" else ""
    from transformers import activations as known

    names: dict[Any, str] = {
        nn.SiLU: "silu", known.SiLUActivation: "silu", F.silu: "silu", known.GELUActivation: "gelu", nn.ReLU: "relu",
        F.relu: "relu", torch.relu: "relu", known.ReLUSquaredActivation: "relu2", known.LinearActivation: "identity",
        nn.Identity: "identity",
    }  # fmt: skip
    return names.get(type(function) if isinstance(function, nn.Module) else function, "")
