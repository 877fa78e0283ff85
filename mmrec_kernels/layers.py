"""The ops as layers without state, for a layer mapping to put in the place of a model's own.

Each is a `forward` and nothing else: no constructor, no parameters, no methods. Hugging Face's `kernels` binds it to a
module that exists, whose attributes it then reads; `hub.py` lays the package out for that. `has_backward` and
`can_torch_compile` are what `kernels` asks before it replaces a layer that is trained or compiled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import attention, infonce, nf4, retrieval, routing

__all__ = ["CrossModalAttention", "Experts", "InfoNCE", "Linear4bit", "TopK"]

_GATED = {"SiLU": "swiglu", "SiLUActivation": "swiglu", "silu": "swiglu", "GELUActivation": "geglu"}


class CrossModalAttention(nn.Module):
    """`cross_modal_attention` over padded modalities; in the place of one attention over their concatenation."""

    can_torch_compile = True
    has_backward = True

    def forward(
        self, query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], masks: Sequence[Tensor | None]
    ) -> Tensor:
        """`[B, Lq, H, Dv]`: each query over what is there of its sequence's modalities; 0 where nothing is.

        Args:
            query: `[B, Lq, H, D]`.
            keys, values: one `[B, Lm, Hkv, D]` and `[B, Lm, Hkv, Dv]` for each modality.
            masks: one `bool[B, Lm]` for each modality, True = present; None: all are.
        """
        if query.ndim != 4:
            raise ValueError(f"query must have shape [B, Lq, H, D], got {list(query.shape)}")
        batch, length = query.shape[:2]
        padded = zip(keys, values, masks, strict=True)
        segments = [attention.Segment.from_padded(key, value, mask) for key, value, mask in padded]
        offsets = torch.arange(batch + 1, device=query.device) * length
        out = attention.cross_modal_attention(query.flatten(0, 1), segments, offsets)
        return out.unflatten(0, (batch, length))


class InfoNCE(nn.Module):
    """`info_nce` in both directions; in the place of two cross entropies over `scale * query @ key.T`."""

    can_torch_compile = True
    has_backward = True

    def forward(self, query: Tensor, key: Tensor, scale: Tensor | float) -> Tensor:
        """The mean loss, 0-d, of `query [N, D]` and `key [N, D]`, of which row n matches row n."""
        return infonce.info_nce(query, key, scale=scale)


class Experts(nn.Module):
    """`mixture_of_experts`; in the place of transformers' experts, such as `MixtralExperts`.

    Reads `gate_up_proj [E, 2f, d]`, the gate in its first f rows, `down_proj [E, d, f]` and `act_fn` (SiLU or the exact
    GELU) of the module that it is bound to.
    """

    can_torch_compile = True
    has_backward = True

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """`[T, d]` from `hidden_states [T, d]`, and `[T, k]` expert ids and weights."""
        routed = _Routed(top_k_weights, top_k_index)
        w_in, w_out, activation = self.gate_up_proj, self.down_proj, _activation(self.act_fn)
        return routing.mixture_of_experts(hidden_states, routed, w_in, w_out, activation=activation)  # type: ignore[arg-type]


class Linear4bit(nn.Module):
    """`nf4_linear`; in the place of `bitsandbytes.nn.Linear4bit` with an NF4 weight.

    Reads `weight` (a quantised `Params4bit`), `bias` and `compute_dtype` of the module that it is bound to.
    """

    can_torch_compile = False  # the weight's quant_state is no tensor
    has_backward = True

    def forward(self, x: Tensor) -> Tensor:
        """`[..., N]` in the dtype of `x [..., K]`, computed in `compute_dtype` where the module has one."""
        dtype = getattr(self, "compute_dtype", None) or x.dtype
        bias: Tensor | None = self.bias  # type: ignore[assignment]
        if bias is not None and bias.dtype != torch.float32:  # which the op takes beside any other
            bias = bias.to(dtype)
        weight = nf4.NF4Weight.from_bitsandbytes(self.weight)  # type: ignore[arg-type]
        return nf4.nf4_linear(x.to(dtype), weight, bias).to(x.dtype)  # type: ignore[arg-type]


class TopK(nn.Module):
    """`top_k`; in the place of `torch.topk(query @ items.T, k)`."""

    can_torch_compile = True
    has_backward = False

    def forward(self, query: Tensor, items: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Scores and ids `[B, k]` of the items `[N, D]` that have the highest products with `query [B, D]`."""
        return retrieval.top_k(query, items, k)


class _Routed(NamedTuple):
    weights: Tensor
    experts: Tensor


def _activation(function: object) -> str:
    """The op's name of a gate's activation, told by its name: transformers is not imported here."""
    name = type(function).__name__ if isinstance(function, nn.Module) else getattr(function, "__name__", "")
    if isinstance(function, nn.GELU) and function.approximate == "none":
        return "geglu"
    if name not in _GATED:
        raise ValueError(f"act_fn must be SiLU or the exact GELU, got {function!r}")
    return _GATED[name]
