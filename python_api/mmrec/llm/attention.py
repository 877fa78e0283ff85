"""`cross_modal_attention` behind transformers' `AttentionInterface`: one name that any of its models can be set to.

Nothing of it is installed by importing this module: `register_attention` puts two functions under a name, one that
computes and one that makes masks, and `unregister_attention` takes them out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mmrec_kernels import Segment, cross_modal_attention

from .extras import KERNELS, quiet_transformers, require
from .packed import KEYWORD, attend, why_not_packed

__all__ = ["kernel_attention", "register_attention", "unregister_attention"]

_ELSE = "set this model to attn_implementation='sdpa'"


def register_attention(name: str = KERNELS) -> None:
    """Makes `attn_implementation=name` and `model.set_attn_implementation(name)` mean this package's attention.

    Padded positions are skipped, not masked: their keys are not read. Keys and values of grouped heads are not repeated
    and a cache is read where it lies. What the op cannot do is refused with a ValueError when it is met, never computed
    by something else: attention dropout, a softcap, a position bias, sliding windows shorter than the text, packed
    texts, and masks other than causal or bidirectional with padding.
    """
    _interface("modeling_utils", "AttentionInterface").register(name, _attention)
    _interface("masking_utils", "AttentionMaskInterface").register(name, _mask)


def unregister_attention(name: str = KERNELS) -> None:
    """Takes the name out again; a model that is still set to it raises KeyError at its next call."""
    for module, kind in (("modeling_utils", "AttentionInterface"), ("masking_utils", "AttentionMaskInterface")):
        _interface(module, kind)._global_mapping.pop(name, None)


@contextmanager
def kernel_attention(model: Any, name: str = KERNELS) -> Iterator[Any]:
    """Inside, `model` (of transformers, perhaps wrapped by peft) computes with this package's attention; after it, with
    what it had before.

    Raises:
        ValueError: the model does not let its attention be chosen.
    """
    before = implementations(model.config)
    register_attention(name)
    try:
        model.set_attn_implementation(name)
        if model.config._attn_implementation != name:
            raise ValueError(f"model {type(model).__name__} does not let its attention be chosen")
        yield model
    finally:
        model.set_attn_implementation(before)


def take_attention(model: Any, longest: int) -> tuple[dict[str, Any] | None, str | None]:
    """Lets `model` attend with the kernel, if two short texts come out right with it, packed and not.

    Returns:
        What it attended with before, or None; and why it goes on with that, or None (see `why_not_packed`).
    """
    own = implementations(model.config)
    register_attention()
    with quiet_transformers():
        try:
            model.set_attn_implementation(KERNELS)
        except ValueError as error:
            return None, str(error)
        reason = why_not_packed(model, own, longest)
        if reason is not None:
            model.set_attn_implementation(own)
    return (own if reason is None else None), reason


def _interface(module: str, kind: str) -> Any:
    return getattr(require(f"transformers.{module}"), kind)


def implementations(config: Any) -> dict[str, Any]:
    """What a model and each of its parts compute attention with, in the form `set_attn_implementation` takes."""
    found = {"": config._attn_implementation}
    for part in config.sub_configs:
        if getattr(config, part, None) is not None:
            found[part] = implementations(getattr(config, part))
    return found


def attention_dropout(config: Any) -> float:
    """The probability that a model drops weights of its attention with while training, by whatever name."""
    found = config.get_text_config().to_dict().items()
    return max((float(v) for k, v in found if "att" in k and "drop" in k and isinstance(v, float)), default=0.0)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """`query [B, H, Lq, D]`, `key`, `value [B, Hkv, Lk, D]`, what `_mask` made, to `[B, Lq, H, Dv]`."""
    for name in ("softcap", "position_bias", "cache"):
        if others.get(name) is not None:
            raise ValueError(f"attention {KERNELS!r} has no {name}, which {type(module).__name__} asks for; {_ELSE}")
    if others.get("output_attentions"):
        raise ValueError(f"attention {KERNELS!r} cannot return weights (output_attentions); set 'eager' for that")
    if dropout:
        raise ValueError(
            f"attention {KERNELS!r} has no dropout, {type(module).__name__} asks for {dropout}: "
            "set the model's attention dropout to 0"
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    packed = others.get(KEYWORD)
    if packed is not None:
        if s_aux is not None or query.shape[0] != 1:
            raise ValueError(f"attention {KERNELS!r} takes packed texts in one row and without sinks")
        causal = causal and getattr(getattr(module, "config", None), "is_causal", True)
        return attend(module, query, key, value, packed, causal=causal, scale=scaling), None
    present = None
    if attention_mask is not None:
        causal = attention_mask.ndim == 2
        present = _padding(attention_mask, query, module)
        # Of a cache of fixed length the mask says how much is filled. One query needs no alignment, and so no copy.
        if query.shape[2] == 1:
            present = nn.functional.pad(present, (0, key.shape[2] - present.shape[1]), value=False)
        key, value = key[:, :, : present.shape[1]], value[:, :, : present.shape[1]]
    return _attend(query, key, value, present, scaling, causal and query.shape[2] > 1, s_aux), None


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    present: Tensor | None,
    scale: float | None,
    causal: bool,
    sink: Tensor | None,
) -> Tensor:
    batch, heads, rows = query.shape[:3]
    kv_heads, length = key.shape[1:3]
    # A cache has the keys of a KV head of a text together: then those are the sequences, and nothing is copied. A
    # projection has all heads of a token together, as the op has them. (A sink is per head, and one for all sequences.)
    sequences = batch * kv_heads if sink is None and key.is_contiguous() and value.is_contiguous() else batch
    per_sequence = (batch * heads // sequences, rows)
    query = query.reshape(sequences, *per_sequence, -1).transpose(1, 2).flatten(0, 1)
    key, value = (
        x.reshape(sequences, -1, length, x.shape[3]).transpose(1, 2).reshape(sequences * length, -1, x.shape[3])
        for x in (key, value)
    )
    index = None
    if present is not None:
        places = torch.arange(sequences * length, device=query.device).view(batch, -1, length)
        index = places.masked_fill(~present.unsqueeze(1), -1).flatten()
    counts = torch.arange(sequences + 1, device=query.device)
    segment = Segment(key, value, counts * length, index=index, causal=causal)
    out = cross_modal_attention(query, [segment], counts * rows, scale=scale, sink=sink)
    out = out.view(batch, -1, rows, per_sequence[0], out.shape[2]).transpose(1, 2)
    return out.reshape(batch, rows, heads, out.shape[4])


def _padding(mask: Tensor, query: Tensor, module: nn.Module) -> Tensor:
    """bool `[B, Lk]` of a mask by `_mask`, `[B, Lk]` or `[B, 1, 1, Lk]`."""
    batch = query.shape[0]
    if mask.dtype == torch.bool and mask.ndim == 4 and mask.shape[:3] == (batch, 1, 1):
        return mask[:, 0, 0]
    if mask.dtype == torch.bool and mask.ndim == 2 and mask.shape[0] == batch:
        return mask
    raise ValueError(
        f"attention {KERNELS!r} takes padding masks, bool [B, Lk], got {mask.dtype} {list(mask.shape)} "
        f"in {type(module).__name__}; {_ELSE}"
    )


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    device: torch.device | str = "cpu",
    **others: Any,
) -> Tensor | None:
    """What `_attention` is given as its mask: None, bool `[B, Lk]` where the pattern is causal, `[B, 1, 1, Lk]` where
    it is bidirectional; True = a position that is there."""
    from transformers import masking_utils

    offset, first = int(q_offset), int(kv_offset)
    if mask_function is None or mask_function is masking_utils.causal_mask_function:
        causal = True
    elif mask_function is masking_utils.bidirectional_mask_function:
        causal = False
    else:
        sizes = (batch_size, q_length, kv_length, offset, first)
        vmap = others.get("use_vmap", False)
        seen = masking_utils.sdpa_mask(
            *sizes, mask_function, allow_is_causal_skip=False, use_vmap=vmap, device=device
        )  # fmt: skip
        assert seen is not None
        causal = _is_causal(seen, offset - first)
    # Behind the last query a cache of fixed length has room that is not filled yet.
    length = min(offset + q_length - first, kv_length) if causal else kv_length
    if attention_mask is None:
        if length == kv_length:
            return None
        present = torch.ones(batch_size, length, dtype=torch.bool, device=device)
    else:
        present = attention_mask[:, first : first + length].to(device=device, dtype=torch.bool)
        present = nn.functional.pad(present, (0, length - present.shape[1]), value=False)
        if length == kv_length and not masking_utils.is_tracing(present) and bool(present.all()):
            return None
    return present if causal else present[:, None, None, :]


def _is_causal(seen: Tensor, ahead: int) -> bool:
    """Whether a mask that transformers composed, bool `[B, 1, Lq, Lk]`, is causal after all, or else hides nothing: a
    sliding window that is longer than the text, a batch of texts that could have been packed.

    Raises:
        ValueError: it is something else.
    """
    rows, keys = seen.shape[2:]
    places = torch.arange(keys, device=seen.device) - ahead <= torch.arange(rows, device=seen.device).unsqueeze(1)
    if bool((seen == places).all()):
        return True
    if bool(seen.all()):
        return False
    raise ValueError(
        f"attention {KERNELS!r} masks causally or not at all, beside padding; this is neither (packed texts, blocks, "
        f"or a sliding window of fewer than {keys} keys): {_ELSE}"
    )
