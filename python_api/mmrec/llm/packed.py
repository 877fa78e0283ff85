"""Texts of any lengths in one row without padding, and texts that go on from a prefix which they share.

A packed row holds n texts one after another; linear layers see its tokens and no others, and `cross_modal_attention`
keeps the texts apart. A prefix is computed once. Its keys and values lie once per layer, and all texts that go on from
it read them there: they are one more segment in each text's softmax, rows named by index. With texts of one token (the
next of an answer, an item's id) those are too few queries for each reading. Then the queries of all texts are one
sequence of a dense attention over the prefix, merged with each text's own by the log-sum-exp (cascade attention, as in
FlashInfer, arXiv:2501.01005). Either way nothing is copied per text.

The row reaches the attention of transformers' layers (`.attention`) as a keyword argument of the model's forward,
beside a mask that any other attention refuses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmrec_kernels import Segment, cross_modal_attention

KEYWORD = "mmrec_packed"
_LAYERS = {"full_attention", "sliding_attention"}
# Tokens per text. Measured on CPU, 14 query heads on 2 of width 64, bfloat16, 64 texts behind 512 tokens: cascade over
# index takes 0.63 times as long at 1 token, 0.99 at 2, 1.4 at 8.
_CASCADE_BELOW = 2


@dataclass(frozen=True, eq=False)
class Prefix:
    """Keys and values of n texts that others go on from.

    `layers[i] = (key [P, Hkv, D], value [P, Hkv, Dv])` of layer i; text j owns rows `offsets[j]:offsets[j + 1]`
    (int64 `[n + 1]`, on the model's device).
    """

    layers: dict[int, tuple[Tensor, Tensor]]
    offsets: Tensor

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Tensor:
        """int64 `[n]`: tokens of each."""
        return self.offsets.diff()

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(t.nbytes for pair in self.layers.values() for t in pair)

    def behind(self, first: Prefix) -> Prefix:
        """Each text of this one behind the text of `first` that it went on from, n of both. Copies them once."""
        if len(first) != len(self):
            raise ValueError(f"first must have {len(self)} texts, got {len(first)}")
        lengths = torch.stack([first.lengths, self.lengths], dim=1)
        offsets = torch.cat([self.offsets[:1], lengths.sum(1).cumsum(0)])
        # Row t of the result is row `source` of the first one's rows with those of this one behind them.
        starts = torch.stack([first.offsets[:-1], self.offsets[:-1] + first.offsets[-1]], dim=1).flatten()
        lengths = lengths.flatten()
        begin = lengths.cumsum(0) - lengths
        source = torch.arange(int(offsets[-1]), device=offsets.device) + (starts - begin).repeat_interleave(lengths)
        layers = {
            layer: (torch.cat([a, key])[source], torch.cat([b, value])[source])
            for layer, (key, value) in self.layers.items()
            for a, b in [first.layers[layer]]
        }
        return Prefix(layers, offsets)


@dataclass(frozen=True)
class Packed:
    """What the attention is told of a packed row.

    Attributes:
        offsets: int64 `[n + 1]`: text i owns tokens `offsets[i]:offsets[i + 1]`.
        longest: the most positions that a text reaches, its prefix included.
        prefix: what the texts go on from, or None.
        shared: `(offsets [n + 1], index)`, int64: the rows `index[offsets[i]:offsets[i + 1]]` of the prefix come before
            text i; or None where the next one holds.
        owners: int64 `[prefixes + 1]`: all texts that go on from prefix j own tokens `owners[j]:owners[j + 1]`.
        kept: where each layer leaves its keys and values, or None.
    """

    offsets: Tensor
    longest: int
    prefix: Prefix | None = None
    shared: tuple[Tensor, Tensor] | None = None
    owners: Tensor | None = None
    kept: dict[int, tuple[Tensor, Tensor]] | None = None


class NotCausal(ValueError):
    """A prefix was asked of a model whose tokens see those behind them."""


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, packed: Packed, *, causal: bool, scale: float | None
) -> Tensor:
    """`query [1, H, T, D]`, `key`, `value [1, Hkv, T, D]` of a packed row to `[1, T, H, Dv]`."""
    query, key, value = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    layer = getattr(module, "layer_idx", None)
    if not causal and (packed.kept is not None or packed.prefix is not None):
        raise NotCausal(
            f"prefix: {type(module).__name__} is not causal: tokens of a prefix would see those behind them"
        )
    if packed.kept is not None and layer is not None:
        packed.kept[layer] = (key, value)
    own = Segment(key, value, packed.offsets, causal=causal)
    if packed.prefix is None:
        return cross_modal_attention(query, [own], packed.offsets, scale=scale).unsqueeze(0)
    assert layer is not None
    key, value = packed.prefix.layers[layer]
    if packed.shared is not None:
        before = Segment(key, value, packed.shared[0], index=packed.shared[1])
        return cross_modal_attention(query, [before, own], packed.offsets, scale=scale).unsqueeze(0)
    assert packed.owners is not None
    shared = Segment(key, value, packed.prefix.offsets)
    first = cross_modal_attention(query, [shared], packed.owners, scale=scale, return_lse=True)
    second = cross_modal_attention(query, [own], packed.offsets, scale=scale, return_lse=True)
    assert first.lse is not None and second.lse is not None
    share = torch.sigmoid(first.lse - second.lse).unsqueeze(2)  # of the prefix in the softmax over both
    merged = torch.lerp(second.out.to(share.dtype), first.out.to(share.dtype), share)
    return merged.to(query.dtype).unsqueeze(0)


def packed_forward(
    model: Any,
    offsets: Tensor,
    *,
    input_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    prefix: Prefix | None = None,
    counts: Tensor | None = None,
    kept: dict[int, tuple[Tensor, Tensor]] | None = None,
) -> Tensor:
    """Last hidden states `[T, d]` of a packed row; the model's attention must be `"mmrec"`.

    Args:
        offsets: int64 `[n + 1]` on the CPU, from 0 to T: text i owns tokens `offsets[i]:offsets[i + 1]`.
        input_ids, inputs_embeds: int64 `[T]` or `[T, d]`; one of them.
        prefix: what the texts go on from.
        counts: int64 `[prefixes]` on the CPU: so many texts go on from each prefix, those of the first one first.
        kept: filled with each layer's keys and values, `[T, Hkv, D]`.
    """
    tokens = input_ids if input_ids is not None else inputs_embeds
    assert tokens is not None
    lengths = offsets.diff()
    start = torch.zeros_like(lengths)
    shared = owners = None
    if prefix is not None:
        assert counts is not None
        first, before = prefix.offsets.cpu(), prefix.lengths.cpu()
        start = before.repeat_interleave(counts)
        if len(tokens) < _CASCADE_BELOW * len(lengths):
            owners = offsets[torch.cat([counts.new_zeros(1), counts.cumsum(0)])].to(tokens.device)
        else:
            ends = start.cumsum(0)
            skip = first[:-1].repeat_interleave(counts) - (ends - start)
            index = torch.arange(int(ends[-1])) + skip.repeat_interleave(start)
            shared = torch.cat([ends.new_zeros(1), ends]).to(tokens.device), index.to(tokens.device)
    positions = torch.arange(len(tokens)) + (start - offsets[:-1]).repeat_interleave(lengths)
    longest = int((start + lengths).max())
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and longest > limit:
        raise ValueError(
            f"texts reach {longest} positions with their prefix, more positions than the model has, {limit}"
        )
    given = {"input_ids": input_ids, "inputs_embeds": inputs_embeds}
    packed = Packed(offsets.to(tokens.device), longest, prefix, shared, owners, kept)
    refused_elsewhere = torch.zeros(1, 1, 0, 0, dtype=torch.bool, device=tokens.device)
    found = model(
        **{name: x.unsqueeze(0) for name, x in given.items() if x is not None},
        **without_cache(model), **{KEYWORD: packed},
        attention_mask=refused_elsewhere, position_ids=positions.to(tokens.device).unsqueeze(0),
    )  # fmt: skip
    return found.last_hidden_state[0]


def without_cache(model: Any) -> dict[str, bool]:
    """The argument that keeps a model from making a cache, where it has it."""
    return {"use_cache": False} if getattr(model.config, "use_cache", None) is not None else {}


def check_window(module: nn.Module, packed: Packed, window: int | None) -> None:
    """Raises ValueError where a layer sees fewer positions than the longest text of the row has."""
    if window is not None and packed.longest > window:
        raise ValueError(
            f"packed texts must be no longer than the sliding window of {type(module).__name__}, {window}, "
            f"got one of {packed.longest} tokens with its prefix"
        )


def check_rows(
    offsets: Tensor,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    prefix: Prefix | None,
    counts: Tensor | None,
) -> Tensor | None:
    """The counts, filled in where there is one prefix, or ValueError; see `Backbone.forward_rows`."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give input_ids or inputs_embeds, not both and not neither")
    rows = input_ids if input_ids is not None else inputs_embeds
    assert rows is not None
    total = len(rows)
    if offsets.dtype != torch.int64 or offsets.ndim != 1 or offsets.device.type != "cpu":
        raise ValueError(f"offsets must be int64 [n + 1] on the CPU, got {offsets.dtype} on {offsets.device}")
    if len(offsets) < 2 or int(offsets[0]) != 0 or int(offsets[-1]) != total or int(offsets.diff().min()) < 1:
        raise ValueError(f"offsets must rise from 0 to {total} by at least 1, got {offsets[:8].tolist()}…")
    texts = len(offsets) - 1
    if prefix is not None and counts is None and len(prefix) == 1:
        counts = torch.tensor([texts])
    if prefix is not None and (counts is None or len(counts) != len(prefix) or int(counts.sum()) != texts):
        raise ValueError(f"counts must be [{len(prefix)}] and sum to {texts} texts, got {counts}")
    return counts


def padded_forward(
    model: Any, offsets: Tensor, *, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None
) -> Tensor:
    """What `packed_forward` gives, by a batch padded on the right; without a mask where all texts are of one length."""
    lengths = offsets.diff()
    longest = int(lengths.max())
    # The mask stays on the CPU until it is known to be needed: asking whether it is full costs no synchronisation.
    mask = torch.arange(longest) < lengths.unsqueeze(1)
    full = bool(mask.all())
    given: dict[str, Tensor] = {}
    for name, rows in {"input_ids": input_ids, "inputs_embeds": inputs_embeds}.items():
        if rows is None:
            continue
        if full:
            given[name] = rows.view(len(lengths), longest, *rows.shape[1:])
        else:  # what lies under padding is arbitrary but must exist: id 0 does in every vocabulary
            given[name] = rows.new_zeros(len(lengths), longest, *rows.shape[1:])
            given[name] = given[name].masked_scatter(_like(mask, given[name]), rows)
        device = rows.device
    if not full:
        given["attention_mask"] = mask.to(device, torch.int64)
    hidden: Tensor = model(**given, **without_cache(model)).last_hidden_state
    return hidden[mask.to(device)] if not full else hidden.flatten(0, 1)


def _like(mask: Tensor, rows: Tensor) -> Tensor:
    return mask.to(rows.device).view(*mask.shape, *(1,) * (rows.ndim - 2))


def why_not_packed(model: Any, own: Any, longest: int) -> str | None:
    """Why `model`, whose attention is `"mmrec"`, cannot take packed rows of texts of up to `longest` tokens, or None.

    Apart from what its configuration says, two short texts are computed packed, and one by one with the attention that
    the model came with (`own`); the same where one goes on from the other, if the model is causal. A model that takes
    positions from elsewhere than `position_ids`, or does not hand keyword arguments to its attention, gives another
    result or refuses.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - _LAYERS
    if kinds:
        return f"it has layers of {', '.join(sorted(kinds))}"
    window = getattr(config, "sliding_window", None)
    if window is not None and window < longest and getattr(config, "use_sliding_window", True):
        return f"its sliding window is {window}, texts have up to {longest} tokens"
    device = next(model.parameters()).device
    ids = (torch.arange(1, 6) % config.vocab_size).to(device)
    first, second = ids[:2], ids[2:]
    found: list[Tensor | None] = []
    try:
        with torch.no_grad():
            found.append(packed_forward(model, torch.tensor([0, 2, 5]), input_ids=ids))
            found.append(_gone_on(model, first, second))
            model.set_attn_implementation(own)
            whole, *alone = (
                model(input_ids=t.unsqueeze(0), **without_cache(model)).last_hidden_state[0]
                for t in (ids, first, second)
            )
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        model.set_attn_implementation("mmrec")
    for got, wanted in zip(found, (torch.cat(alone), whole[2:]), strict=True):
        # Rounding is a hundredth of this even in bfloat16; another position or a foreign token changes everything.
        if got is not None and not bool((got - wanted).float().norm() <= 0.1 * wanted.float().norm()):
            return "two short texts packed differ from the same texts one by one"
    return None


def _gone_on(model: Any, first: Tensor, second: Tensor) -> Tensor | None:
    """Hidden states of the second text behind the first as its prefix; None where the model is not causal."""
    kept: dict[int, tuple[Tensor, Tensor]] = {}
    try:
        packed_forward(model, torch.tensor([0, len(first)]), input_ids=first, kept=kept)
    except NotCausal:
        return None
    prefix = Prefix(kept, torch.tensor([0, len(first)], device=first.device))
    offsets, counts = torch.tensor([0, len(second)]), torch.tensor([1])
    return packed_forward(model, offsets, input_ids=second, prefix=prefix, counts=counts)
