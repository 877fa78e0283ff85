"""`mixture_of_experts`: each token through the experts that its routing names, dropless."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeGuard, overload

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import library, schemas
from ..validation import INTEGERS, autocast, check_choice, check_float, check_tensor
from . import autograd, reference_experts
from .reference_experts import ACTIVATIONS, GATED


class SharedExpert(NamedTuple):
    """An expert that every routed token passes, beside those chosen for it.

    `w_in [2f', d]` (`[f', d]` for activations without a gate), `w_out [d, f']`, and optionally `gate [d]` or `[1, d]`:
    its output is then multiplied by σ(x · gate). f' may differ from the experts' f. No biases.
    """

    w_in: Tensor
    w_out: Tensor
    gate: Tensor | None = None


class Assignment(Protocol):
    """What `mixture_of_experts` reads of a routing, `Routing` or any other."""

    @property
    def weights(self) -> Tensor: ...

    @property
    def experts(self) -> Tensor: ...


@overload
def mixture_of_experts(
    x: Tensor,
    routing: Assignment,
    w_in: Tensor,
    w_out: Tensor,
    *,
    b_in: Tensor | None = None,
    b_out: Tensor | None = None,
    activation: str = "swiglu",
    shared: SharedExpert | None = None,
) -> Tensor: ...


@overload
def mixture_of_experts(
    x: Tensor,
    routing: Sequence[Assignment],
    w_in: Tensor,
    w_out: Tensor,
    *,
    b_in: Tensor | None = None,
    b_out: Tensor | None = None,
    activation: str = "swiglu",
    shared: SharedExpert | None = None,
) -> list[Tensor]: ...


def mixture_of_experts(
    x: Tensor,
    routing: Assignment | Sequence[Assignment],
    w_in: Tensor,
    w_out: Tensor,
    *,
    b_in: Tensor | None = None,
    b_out: Tensor | None = None,
    activation: str = "swiglu",
    shared: SharedExpert | None = None,
) -> Tensor | list[Tensor]:
    """out[t] = Σ_slots weight · FFN_expert(x[t]), with FFN_e(x) = act(x w_in[e]ᵀ + b_in[e]) w_out[e]ᵀ + b_out[e].

    Dropless: no capacity, no padding. Accumulation is in float32 (float64 for float64), with one rounding at the end. A
    token without a slot has output 0, also with `shared`, gets no gradient, and its row of x is not read; nor are the
    parameters of an expert without tokens. Everything but `routing.experts` is differentiable.

    Args:
        x: `[T, d]` float32, bfloat16 or float64 (float16 on GPU). Under autocast x and the parameters are cast to the
            autocast dtype; the routing weights are not.
        routing: `Routing`, or anything with `weights [T, k]` (floating) and `experts [T, k]` (int32 or int64; −1 = no
            expert, its weight is not read; on GPU an id out of range acts as −1). A list of G routings, whose k may
            differ, gives a list of G outputs; each (expert, token) pair is computed once, whatever G (MMoE, PLE).
        w_in: `[E, 2f, d]`, gate in the first f rows, for "swiglu" and "geglu"; else `[E, f, d]`. The dtype of x, as for
            all parameters. This is transformers' usual layout (`gate_up_proj`); one stored transposed (`[E, d, 2f]`) or
            with the rows of gate and up interleaved must be rearranged by the caller: where d = 2f, and for interleaved
            rows, the shape cannot tell.
        w_out: `[E, d, f]` (`down_proj`).
        b_in: `[E, 2f]` or `[E, f]`. b_out: `[E, d]`.
        activation: "swiglu" silu(gate)·up, "geglu" gelu(gate)·up, "gelu" (exact, with erf), "relu", "relu2" relu(h)²,
            "silu" or "identity".
        shared: added to every output for the tokens that have a slot there.

    Returns:
        `[T, d]` in x's dtype (the autocast dtype under autocast), or a list of them.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or flag; on CPU also an expert id out of range.
    """
    check_choice("activation", activation, ACTIVATIONS)
    x, w_in, w_out, b_in, b_out = autocast(x, w_in, w_out, b_in, b_out)
    check_float("x", x, ("T", "d"))
    _check_parameters(x, w_in, w_out, b_in, b_out, activation)
    shared_expert = _check_shared(x, shared, activation)
    weights, experts = _check_routings(x, routing)
    out = autograd.mix(x, weights, experts, w_in, w_out, b_in, b_out, *shared_expert, activation)
    return list(out.unbind()) if _is_list(routing) else out[0]


def _check_matrix(name: str, value: object, x: Tensor, shape: Sequence[int | str]) -> Tensor:
    """`value` with `shape` and x's dtype; a transposed or split layout is refused with the reason."""
    if isinstance(value, Tensor) and value.ndim == len(shape) + 1:
        raise ValueError(
            f"{name} must have shape {_shown(shape)}, got {list(value.shape)}: gate and up share one axis, all rows"
            " of the gate first; they are neither a separate axis nor interleaved"
        )
    if isinstance(value, Tensor) and value.ndim == len(shape):
        if value.shape[-1] != shape[-1] and value.shape[-2] == shape[-1]:
            raise ValueError(
                f"{name} must have shape {_shown(shape)}, got {list(value.shape)}: this looks like the transposed"
                f" layout; pass {name}.mT"
            )
    return check_tensor(name, value, shape, (x.dtype,), device=x.device)


def _shown(shape: Sequence[int | str]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _check_parameters(
    x: Tensor, w_in: Tensor, w_out: Tensor, b_in: Tensor | None, b_out: Tensor | None, activation: str
) -> None:
    width = x.shape[1]
    _check_matrix("w_in", w_in, x, ("E", "2f" if activation in GATED else "f", width))
    num_experts, rows = w_in.shape[0], w_in.shape[1]
    if num_experts == 0:
        raise ValueError(f"w_in must have at least one expert, got shape {list(w_in.shape)}")
    _check_matrix("w_out", w_out, x, (num_experts, width, _inner("w_in", w_in, activation)))
    if b_in is not None:
        check_tensor("b_in", b_in, (num_experts, rows), (x.dtype,), device=x.device)
    if b_out is not None:
        check_tensor("b_out", b_out, (num_experts, width), (x.dtype,), device=x.device)


def _inner(name: str, w_in: Tensor, activation: str) -> int:
    """f, from the rows of `w_in`."""
    rows = w_in.shape[-2]
    if activation not in GATED:
        return rows
    if rows % 2:
        raise ValueError(f"{name} must have an even number of rows (gate, then up) for {activation!r}, got {rows}")
    return rows // 2


def _check_shared(
    x: Tensor, shared: SharedExpert | None, activation: str
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if shared is None:
        return None, None, None
    if not isinstance(shared, SharedExpert):
        raise TypeError(f"shared must be a SharedExpert or None, got {type(shared).__name__}")
    width = x.shape[1]
    w_in, w_out, gate = autocast(*shared)
    _check_matrix("shared.w_in", w_in, x, ("2f" if activation in GATED else "f", width))
    _check_matrix("shared.w_out", w_out, x, (width, _inner("shared.w_in", w_in, activation)))
    if gate is not None:
        if isinstance(gate, Tensor) and gate.ndim == 2 and gate.shape[0] == 1:
            gate = gate[0]
        check_tensor("shared.gate", gate, (width,), (x.dtype,), device=x.device)
    return w_in, w_out, gate


def _is_list(routing: object) -> TypeGuard[Sequence[Assignment]]:
    """Whether `routing` is several: a `Routing` is a tuple too, but has fields."""
    return isinstance(routing, list | tuple) and not hasattr(routing, "experts")


def _check_routings(x: Tensor, routing: Assignment | Sequence[Assignment]) -> tuple[Tensor, Tensor]:
    """Weights and experts of all gates, `[G, T, k]`: shorter gates are filled with slots of expert −1."""
    if not _is_list(routing):
        weights, experts = _check_routing("routing", x, routing)
        return weights[None], experts[None]
    if not routing:
        raise ValueError("routing must hold at least one routing, got an empty list")
    gates = [_check_routing(f"routing[{g}]", x, one) for g, one in enumerate(routing)]
    k = max(weights.shape[1] for weights, _ in gates)
    return (
        torch.stack([pad(weights, (0, k - weights.shape[1])) for weights, _ in gates]),
        torch.stack([pad(experts.long(), (0, k - experts.shape[1]), value=-1) for _, experts in gates]),
    )


def _check_routing(name: str, x: Tensor, routing: object) -> tuple[Tensor, Tensor]:
    weights, experts = getattr(routing, "weights", None), getattr(routing, "experts", None)
    if weights is None or experts is None:
        raise TypeError(f"{name} must have `weights` and `experts`, or be a list of such, got {type(routing).__name__}")
    weights = check_float(f"{name}.weights", weights, (x.shape[0], "k"), device=x.device)
    check_tensor(f"{name}.experts", experts, (x.shape[0], weights.shape[1]), INTEGERS, device=x.device)
    return weights.to(schemas.statistics_dtype(x.dtype)), experts


def _triton_forward() -> Callable[..., Any]:
    from .triton import experts_forward

    return experts_forward


def _triton_backward() -> Callable[..., Any]:
    from .triton import experts_backward

    return experts_backward


library.announce("_experts_forward", reference=reference_experts.forward, triton=_triton_forward)
library.announce("_experts_backward", reference=reference_experts.backward, triton=_triton_backward)
