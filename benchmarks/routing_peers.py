"""What users of `route` and `mixture_of_experts` have today: eager torch, compiled torch, and transformers' back ends.

All of them route alike, in float32, and keep to each modality's experts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm, linear, silu

from .case import Call, Inputs, Provider, in_mode, leaf

LEAVES = ("x", "gate", "w_in", "w_out")
# The most that a peer may make in one piece: batched_mm copies an expert's parameters for each of its tokens, and all
# experts for all tokens have that many hidden rows.
_MOST_BYTES = 2**29

Experts = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def peers(device: str) -> tuple[Provider, ...]:
    """All of them, the eager loop first."""
    backs = ("eager", "batched_mm", "grouped_mm")
    liger = Provider("Liger fused MoE", partial(_routed_then, _liger), module="liger_kernel", install="liger-kernel")
    return (
        Provider("torch loop over experts", partial(_routed_then, _loop)),
        Provider("torch.compile of the loop", _compiled),
        Provider("torch all experts for all tokens", _all_experts),
        Provider("torch sort + grouped_mm", partial(_routed_then, _grouped)),
        Provider("torch, one masked call per modality", _per_modality),
        *(Provider(f"transformers {back}", partial(_transformers, back), module="transformers") for back in backs),
        *((liger,) if device == "cuda" else ()),
    )


def _route(given: Inputs, x: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    logits = linear(x.float(), gate.float()).masked_fill(~given["allowed"][given["modality"]], -torch.inf)
    weights, ids = logits.softmax(1).topk(given["k"])
    return weights / weights.sum(1, keepdim=True), ids


def _routed_then(experts: Experts, given: Inputs, mode: str) -> Call:
    x, gate, w_in, w_out = leaves = [leaf(given[name]) for name in LEAVES]
    return in_mode(lambda: experts(x, *_route(given, x, gate), w_in, w_out), leaves, given["grad"], mode)


def _loop(x: Tensor, weights: Tensor, ids: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """For each expert that has tokens, gather, compute, add."""
    out = torch.zeros_like(x)
    for e in ids.unique().tolist():
        token, slot = (ids == e).nonzero(as_tuple=True)
        gate, up = linear(x[token], w_in[e]).chunk(2, 1)
        y = linear(silu(gate) * up, w_out[e]) * weights[token, slot, None].to(x.dtype)
        out = out.index_add(0, token, y)
    return out


def _dense(x: Tensor, weights: Tensor, ids: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    full = weights.new_zeros(x.shape[0], w_in.shape[0]).scatter(1, ids, weights).to(x.dtype)
    gate, up = torch.matmul(x, w_in.mT).chunk(2, 2)
    return (torch.matmul(silu(gate) * up, w_out.mT) * full.T[:, :, None]).sum(0)


def _all_experts(given: Inputs, mode: str) -> Call:
    _check_bytes(given["x"].shape[0] * given["w_in"][:, :, 0].nbytes)
    return _routed_then(_dense, given, mode)


def _check_bytes(count: int) -> None:
    if count > _MOST_BYTES:
        raise ValueError(f"it would make {count / 2**30:.1f} GiB in one piece")


def _grouped(x: Tensor, weights: Tensor, ids: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    """Rows sorted by expert, two grouped products, rows put back and added up."""
    tokens, k = ids.shape
    expert, order = ids.flatten().sort(stable=True)
    ends = torch.searchsorted(expert, torch.arange(w_in.shape[0], device=x.device), right=True).to(torch.int32)
    gate, up = grouped_mm(x[order // k], w_in.mT, offs=ends).chunk(2, 1)
    y = grouped_mm(silu(gate) * up, w_out.mT, offs=ends) * weights.flatten()[order, None].to(x.dtype)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=x.device)
    return y[back].view(tokens, k, -1).sum(1)


def _compiled(given: Inputs, mode: str) -> Call:
    torch._dynamo.reset()
    return _routed_then(torch.compile(_loop), given, mode)


def _per_modality(given: Inputs, mode: str) -> Call:
    """As in ERNIE-4.5-VL: a router and experts of its own for each modality, called with a mask."""
    x, gate, w_in, w_out = leaves = [leaf(given[name]) for name in LEAVES]

    def forward() -> Tensor:
        out = torch.zeros_like(x)
        for m, allowed in enumerate(given["allowed"]):
            here = given["modality"] == m
            if not here.any():
                continue
            choices, rows = allowed.nonzero()[:, 0], x[here]
            weights, places = linear(rows.float(), gate[choices].float()).softmax(1).topk(given["k"])
            weights = weights / weights.sum(1, keepdim=True)
            out = out.masked_scatter(here[:, None], _loop(rows, weights, choices[places], w_in, w_out))
        return out

    return in_mode(forward, leaves, given["grad"], mode)


def _liger(x: Tensor, weights: Tensor, ids: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    return LigerFusedMoEFunction.apply(x, w_in, w_out, ids.to(torch.int32), weights)


def _transformers(back: str, given: Inputs, mode: str) -> Call:
    from transformers.activations import ACT2FN
    from transformers.integrations import moe
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    if back == "batched_mm":
        _check_bytes(given["modality"].numel() * given["k"] * given["w_in"][0].nbytes)

    def experts(x: Tensor, weights: Tensor, ids: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
        module: Any = SimpleNamespace(
            gate_up_proj=w_in, down_proj=w_out, num_experts=w_in.shape[0], act_fn=ACT2FN["silu"], has_gate=True,
            has_bias=False, has_post_expert_norm=False, is_transposed=False, is_concatenated=True,
            _is_expert_parallel=False, config=SimpleNamespace(_experts_implementation=back),
        )  # fmt: skip
        module._apply_gate = partial(moe._default_apply_gate, module)
        return MixtralExperts.forward(module, x, ids, weights.to(x.dtype))

    return _routed_then(experts, given, mode)
