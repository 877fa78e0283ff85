"""Cross-modal attention: one softmax from a few queries onto several ragged modalities, without concatenation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from .. import library, schemas
from ..validation import check_float, check_index, check_tensor
from . import reference
from .autograd import CrossModalAttention

_MOST_SEGMENTS = 62  # one bit of an int64 each


class Segment(NamedTuple):
    """Keys and values of one modality for B sequences.

    Sequence b owns rows `offsets[b]:offsets[b+1]` of `key` and `value`, or of `index`, whose entries then name the rows
    of `key` and `value` (an item store); −1 is skipped. `causal` lets query i of a sequence see key j iff
    j ≤ i + n_keys − n_queries, both counted from the sequence's first; n_keys counts skipped entries as well.

    Shapes: `key [Tm, Hkv, D]`, `value [Tm, Hkv, Dv]`, `offsets int[B+1]`, `index int[≥ offsets[B]]`.
    """

    key: Tensor
    value: Tensor
    offsets: Tensor
    index: Tensor | None = None  # type: ignore[assignment]  # the contract's name; hides tuple.index
    causal: bool = False

    @classmethod
    def from_padded(cls, key: Tensor, value: Tensor, mask: Tensor | None = None, causal: bool = False) -> Segment:
        """A segment from `key [B, L, Hkv, D]`, `value [B, L, Hkv, Dv]` and `mask bool[B, L]`, True = present.

        Nothing is copied if `key` and `value` are contiguous. Masked rows, in any pattern, are never read. With
        `causal`, positions count padding: n_keys is L.
        """
        check_float("key", key, ("B", "L", "Hkv", "D"))
        batch, length, heads = key.shape[:3]
        check_tensor("value", value, (batch, length, heads, "Dv"), (key.dtype,), device=key.device)
        rows = torch.arange(batch * length, device=key.device)
        offsets = torch.arange(batch + 1, device=key.device) * length
        index = None
        if mask is not None:
            check_tensor("mask", mask, (batch, length), (torch.bool,), device=key.device)
            index = torch.where(mask.reshape(-1), rows, -1)
        return cls(key.flatten(0, 1), value.flatten(0, 1), offsets, index, causal)


class AttentionOutput(NamedTuple):
    """`out [Tq, H, Dv]`, `lse [Tq, H]` (natural log) and `mass [Tq, H, M]`; None for what was not asked.

    `lse` and `mass` are float32, float64 for float64 inputs.
    """

    out: Tensor
    lse: Tensor | None
    mass: Tensor | None


@overload
def cross_modal_attention(
    query: Tensor,
    segments: Sequence[Segment],
    query_offsets: Tensor | None = ...,
    *,
    log_bias: Tensor | None = ...,
    value_gate: Tensor | None = ...,
    sink: Tensor | None = ...,
    scale: float | None = ...,
    query_norm: Tensor | None = ...,
    key_norm: Tensor | None = ...,
    norm_eps: float = ...,
    return_lse: Literal[False] = False,
    return_mass: Literal[False] = False,
) -> Tensor: ...
@overload
def cross_modal_attention(
    query: Tensor,
    segments: Sequence[Segment],
    query_offsets: Tensor | None = ...,
    *,
    log_bias: Tensor | None = ...,
    value_gate: Tensor | None = ...,
    sink: Tensor | None = ...,
    scale: float | None = ...,
    query_norm: Tensor | None = ...,
    key_norm: Tensor | None = ...,
    norm_eps: float = ...,
    return_lse: bool = ...,
    return_mass: bool = ...,
) -> AttentionOutput: ...
def cross_modal_attention(
    query: Tensor,
    segments: Sequence[Segment],
    query_offsets: Tensor | None = None,
    *,
    log_bias: Tensor | None = None,
    value_gate: Tensor | None = None,
    sink: Tensor | None = None,
    scale: float | None = None,
    query_norm: Tensor | None = None,
    key_norm: Tensor | None = None,
    norm_eps: float = 1e-6,
    return_lse: bool = False,
    return_mass: bool = False,
) -> Tensor | AttentionOutput:
    """Attention of each query over the union of its sequence's segments, one per modality, with a single softmax:

        s_ij = scale·q_i·k_j + log_bias_m(j)      P = softmax_j(s)      out_i = Σ_m value_gate_m Σ_{j∈m} P_ij v_j

    Args:
        query: `[Tq, H, D]`, float32, bfloat16 or float64 (float16 on GPU). Sequence b owns rows
            `query_offsets[b]:query_offsets[b+1]`. Without `query_offsets`, `[L, H, D]` latent queries that all B
            sequences share, and the result has B·L rows.
        segments: 1 to 62 `Segment`s in the dtype of `query`, all with the same B, Hkv, D and Dv. Head h reads KV head
            h // (H / Hkv). A sequence of length 0 is a missing modality.
        query_offsets: int `[B+1]`, non-decreasing. Rows outside `[query_offsets[0], query_offsets[B])` are not read;
            their output is 0, their lse −inf, their gradient 0. Keys outside a segment's offsets are not read either.
        log_bias: broadcasts to `[B, H, M]` (write `[B, 1, M]`), added to the scores of segment m. −inf removes it.
        value_gate: broadcasts to `[B, H, M]`, multiplies what segment m adds to the output, after the softmax.
        sink: `[H]`, the logit of attending to nothing: in the softmax, not in the output; neither scaled nor biased.
        scale: of q·k; D^−½ by default.
        query_norm, key_norm: `[D]`, RMSNorm weights: x / √(mean(x²) + norm_eps) · weight, before q·k.
        norm_eps: positive.
        return_lse: also return lse_i = log(Σ_j exp(s_ij) + exp(sink)).
        return_mass: also return mass_im = Σ_{j∈m} P_ij, how much modality m was listened to; with a sink, masses sum to
            1 − exp(sink − lse).

    Returns:
        `out [Tq, H, Dv]` in the dtype of `query`; `AttentionOutput(out, lse, mass)` if `return_lse` or `return_mass`.
        Differentiable once in every tensor argument of floats; `lse` and `mass` are differentiable too. A query without
        keys gives out 0, mass 0, lse −inf (or `sink`) and no gradient but that of `sink`. Under autocast, query, keys
        and values are cast to the autocast dtype (float64 is not).

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or flag; on CPU also offsets that decrease or leave their
            tensor, and an index below −1 or beyond the rows of its key. Elsewhere such an index acts as −1 and offsets
            are clamped, unless `MMREC_CHECK=1` asks for the check.

    Sources: Vaswani et al. 2017 (attention), Dao et al. 2022 (the backward from lse), Jaegle et al. 2021 and Li et al.
    2023 (latent queries), Ainslie et al. 2023 (grouped heads), Zhang and Sennrich 2019 (RMSNorm), Xiao et al. 2023
    (sinks).
    """
    segments = _check_segments(segments)
    query, segments = _autocast(query, segments)
    check_float("query", query, ("Tq", "H", "D"))
    heads, width = query.shape[1], query.shape[2]
    if width == 0:
        raise ValueError(f"query must have shape [Tq, H, D] with D of at least 1, got {list(query.shape)}")
    segments = _check_rows(query, segments)
    batch, count = segments[0].offsets.shape[0] - 1, len(segments)
    if query_offsets is not None:
        query_offsets = check_index("query_offsets", query_offsets, (batch + 1,), device=query.device)
    log_bias = _check_broadcast("log_bias", log_bias, (batch, heads, count), query.device)
    value_gate = _check_broadcast("value_gate", value_gate, (batch, heads, count), query.device)
    for name, vector, size in (("sink", sink, heads), ("query_norm", query_norm, width), ("key_norm", key_norm, width)):
        if vector is not None:
            check_float(name, vector, (size,), device=query.device)
    scale = width**-0.5 if scale is None else _check_number("scale", scale)
    if not _check_number("norm_eps", norm_eps) > 0:
        raise ValueError(f"norm_eps must be positive, got {norm_eps}")

    index = [segment.index for segment in segments if segment.index is not None]
    indexed = sum(1 << m for m, segment in enumerate(segments) if segment.index is not None)
    causal = sum(1 << m for m, segment in enumerate(segments) if segment.causal)
    offsets = torch.stack([segment.offsets for segment in segments])
    keys, values = [segment.key for segment in segments], [segment.value for segment in segments]
    small = [log_bias, value_gate, sink, query_norm, key_norm]
    inputs = [query, *small, *keys, *values]
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        out, lse, mass = CrossModalAttention.apply(
            scale, norm_eps, indexed, causal, return_mass, count, offsets, query_offsets, query, *small, *keys, *values,
            *index,
        )  # fmt: skip
    else:
        arguments = [query, keys, values, offsets, index, query_offsets, *small]
        out, lse, mass = library.call(
            schemas.attention_forward, *library.detached(arguments), scale, norm_eps, indexed, causal, return_mass
        )
    if not return_lse and not return_mass:
        return out
    lse = lse.to(schemas.statistics_dtype(query.dtype)) if return_lse else None
    return AttentionOutput(out, lse, mass if return_mass else None)


def _check_segments(segments: Sequence[Segment]) -> list[Segment]:
    if isinstance(segments, Segment) or not isinstance(segments, list | tuple):
        raise TypeError(f"segments must be a list of Segment, got {type(segments).__name__}")
    if not 1 <= len(segments) <= _MOST_SEGMENTS:
        raise ValueError(f"segments must hold 1 to {_MOST_SEGMENTS} segments, got {len(segments)}")
    for m, segment in enumerate(segments):
        if not isinstance(segment, Segment):
            raise TypeError(f"segments[{m}] must be a Segment, got {type(segment).__name__}")
        if not isinstance(segment.causal, bool):
            raise TypeError(f"segments[{m}].causal must be a bool, got {type(segment.causal).__name__}")
    return list(segments)


def _check_rows(query: Tensor, segments: list[Segment]) -> list[Segment]:
    """Shapes, dtypes and devices of the segments; their integers widened to int64."""
    dtype, device = (query.dtype,), query.device
    checked = []
    kv_heads: int | str = "Hkv"
    value_width: int | str = "Dv"
    entries: int | str = "B+1"
    for m, (key, value, offsets, index, causal) in enumerate(segments):
        name = f"segments[{m}]."
        check_tensor(f"{name}key", key, ("Tm", kv_heads, query.shape[2]), dtype, device=device)
        kv_heads = key.shape[1]
        check_tensor(f"{name}value", value, (key.shape[0], kv_heads, value_width), dtype, device=device)
        value_width = value.shape[2]
        offsets = check_index(f"{name}offsets", offsets, (entries,), device=device)
        entries = offsets.shape[0]
        if index is not None:
            index = check_index(f"{name}index", index, ("L",), device=device)
        checked.append(Segment(key, value, offsets, index, causal))
    if entries == 0:
        raise ValueError("segments[0].offsets must have shape [B+1], got [0]")
    heads, kv_heads = query.shape[1], segments[0].key.shape[1]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"segments[0].key must have Hkv heads that divide the query's {heads}, got {kv_heads}")
    return checked


def _check_broadcast(
    name: str, value: Tensor | None, shape: tuple[int, int, int], device: torch.device
) -> Tensor | None:
    """`value` with three axes, each of size 1 or that of `shape`."""
    if value is None:
        return None
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    sizes = (1,) * (3 - value.ndim) + tuple(value.shape)
    if len(sizes) != 3 or any(got != 1 and got != need for got, need in zip(sizes, shape, strict=True)):
        raise ValueError(f"{name} must broadcast to [B, H, M] = {list(shape)}, got {list(value.shape)}")
    return check_float(name, value.reshape(sizes), ("B", "H", "M"), device=device)


def _check_number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | torch.SymFloat):
        raise TypeError(f"{name} must be a float, got {type(value).__name__}")
    if not isinstance(value, torch.SymFloat) and not -math.inf < value < math.inf:
        raise ValueError(f"{name} must be finite, got {value}")
    return value  # type: ignore[return-value]


def _autocast(query: Tensor, segments: list[Segment]) -> tuple[Tensor, list[Segment]]:
    """Query, keys and values in the autocast dtype, where autocast is on for their device."""
    if not isinstance(query, Tensor) or not torch.amp.is_autocast_available(query.device.type):
        return query, segments
    if not torch.is_autocast_enabled(query.device.type):
        return query, segments
    dtype = torch.get_autocast_dtype(query.device.type)

    def cast(x: Tensor) -> Tensor:
        return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x

    return cast(query), [x._replace(key=cast(x.key), value=cast(x.value)) for x in segments]


def _triton_forward() -> Callable[..., tuple[Tensor, ...]]:
    from . import triton

    return triton.forward


def _triton_backward() -> Callable[..., tuple[Tensor, ...]]:
    from . import triton

    return triton.backward


library.announce("_attention_forward", reference=reference.forward, triton=_triton_forward)
library.announce("_attention_backward", reference=reference.backward, triton=_triton_backward)
