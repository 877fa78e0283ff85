"""`route`: which experts each token goes to, and how much of each."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import library, schemas
from ..validation import check_choice, check_float, check_index, check_positive_int, check_tensor
from . import autograd, reference

SCORES = ("softmax", "topk_softmax", "sigmoid")


class RouterLosses(NamedTuple):
    """Auxiliary losses `[M]` of each modality, unscaled and differentiable; 0 for a modality without routed tokens.

    `balance`: E_m Σ_e (count_me / Σ_e count_me) · mean_t p̄_te, with E_m allowed experts; the counts are detached. It is
    1 when balanced (Switch Transformer, arXiv:2101.03961).
    `z`: mean_t lse(allowed logits)² (ST-MoE, arXiv:2202.08906).
    `local_entropy`: mean_t H(p̄_t); `global_entropy`: H(mean_t p̄_t), in nats (LIMoE, arXiv:2206.02770). Add the
    first and subtract the second to have sure tokens on varied experts.
    """

    balance: Tensor
    z: Tensor
    local_entropy: Tensor
    global_entropy: Tensor


class Routing(NamedTuple):
    """Where each token goes.

    `weights [T, k]` (float32; float64 for float64 inputs) and `experts [T, k]` (int32), best first. A slot that is not
    used has expert −1 and weight 0; such slots come last. `stats [M, E, 3]`, detached: the number of slots, Σ p̄ and
    Σ weight of each modality and expert. `losses`: see `RouterLosses`.
    """

    weights: Tensor
    experts: Tensor
    stats: Tensor
    losses: RouterLosses


def route(
    x: Tensor,
    gate_weight: Tensor,
    k: int,
    *,
    modality: Tensor | None = None,
    num_modalities: int | None = None,
    allowed: Tensor | None = None,
    score: str = "softmax",
    renormalize: bool | None = None,
    bias: Tensor | None = None,
    valid: Tensor | None = None,
) -> Routing:
    """The `k` experts of each token, among those that its modality may use: logits = x · gate_weightᵀ, in float32.

    A token of modality −1, with `valid` 0, or whose modality has no allowed expert is not routed: all its slots are −1,
    it gets no gradient, is in no statistic and no loss, and its row of x is not read.

    Args:
        x: `[T, d]` float32, bfloat16 or float64 (float16 on GPU). Autocast does not change it. Differentiable.
        gate_weight: `[E, d]`, the dtype of x or float32. Differentiable.
        k: slots per token, at least 1; it may exceed E. `k = E` is dense routing.
        modality: int `[T]` in [0, M), or −1 for absent. On GPU a value out of range acts as −1. None: all are 0.
        num_modalities: M. Default: the rows of `allowed`, else of a 2-d `bias`, else 1 if `modality` is None.
        allowed: bool `[M, E]`, which experts a modality may use. The mask acts before score and top-k.
        score: of the allowed experts: "softmax" over all their logits, then top-k; "topk_softmax", top-k of the logits,
            then softmax over these; "sigmoid" of each logit. p̄, which sums to 1, is the softmax over all allowed
            logits for the first two and σ / Σσ for the third.
        renormalize: divide a token's weights by their sum. None: only if k > 1. "topk_softmax" always sums to 1.
        bias: `[E]` or `[M, E]` floating, added to the score (to the logit for "topk_softmax") to select, and to nothing
            else; no gradient (loss-free balancing, arXiv:2408.15664).
        valid: bool or int `[T]`, 0 for padding.

    Returns:
        `Routing(weights, experts, stats, losses)`. Equal scores go to the lower expert id. Slots are in the order of
        score + bias. A NaN among a token's allowed logits makes all the weights of its slots NaN (which valid experts
        it names is then unspecified), and the sums and losses of its modality; other tokens keep theirs.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or flag; on CPU also a modality out of range.

    Warns:
        UserWarning: `renormalize=True` with `k = 1`: the weight is then always 1 and the gate learns nothing from it.
    """
    check_float("x", x, ("T", "d"))
    device, num_tokens = x.device, x.shape[0]
    gate_dtypes = (x.dtype,) if x.dtype == torch.float64 else (x.dtype, torch.float32)
    check_tensor("gate_weight", gate_weight, ("E", x.shape[1]), gate_dtypes, device=device)
    num_experts = gate_weight.shape[0]
    if num_experts == 0:
        raise ValueError("gate_weight must have at least one expert, got shape [0, d]")
    check_positive_int("k", k)
    check_choice("score", score, SCORES)
    if renormalize is not None and not isinstance(renormalize, bool):
        raise TypeError(f"renormalize must be True, False or None, got {type(renormalize).__name__}")
    if renormalize and k == 1 and not torch.compiler.is_compiling():  # a traced warning breaks the graph
        warnings.warn(
            "renormalize=True with k=1 makes every weight 1: the gate gets no gradient through it", stacklevel=2
        )
    num_modalities = _num_modalities(modality, num_modalities, allowed, bias)
    if modality is not None:
        modality = check_index("modality", modality, (num_tokens,), device=device)
    if allowed is not None:
        check_tensor("allowed", allowed, (num_modalities, num_experts), (torch.bool,), device=device)
    if bias is not None:
        rows = (num_modalities,) if isinstance(bias, Tensor) and bias.ndim == 2 else ()
        check_float("bias", bias, (*rows, num_experts), device=device)
        bias = bias.detach().to(schemas.statistics_dtype(x.dtype)).expand(num_modalities, num_experts).contiguous()
    if valid is not None:
        dtypes = (torch.bool, torch.int32, torch.int64, torch.uint8)
        valid = check_tensor("valid", valid, (num_tokens,), dtypes, device=device) != 0
    weights, experts, stats, losses = autograd.route(
        x, gate_weight, modality, allowed, bias, valid, k, num_modalities, score,
        k > 1 if renormalize is None else renormalize,
    )  # fmt: skip
    return Routing(weights, experts, stats, RouterLosses(*losses.unbind()))


def _num_modalities(modality: Tensor | None, given: int | None, allowed: Tensor | None, bias: Tensor | None) -> int:
    if given is not None:
        count = check_positive_int("num_modalities", given)
    elif isinstance(allowed, Tensor) and allowed.ndim == 2:
        count = allowed.shape[0]
    elif isinstance(bias, Tensor) and bias.ndim == 2:
        count = bias.shape[0]
    elif modality is None:
        return 1
    else:
        raise ValueError("num_modalities must be given with modality unless allowed or a 2-d bias tells it, got None")
    if modality is None and count != 1:
        raise ValueError(f"modality must be given when there are {count} modalities, got None")
    return count


def _triton_forward() -> Callable[..., Any]:
    from .triton import route_forward

    return route_forward


def _triton_backward() -> Callable[..., Any]:
    from .triton import route_backward

    return route_backward


library.announce("_routing_forward", reference=reference.forward, triton=_triton_forward)
library.announce("_routing_backward", reference=reference.backward, triton=_triton_backward)
