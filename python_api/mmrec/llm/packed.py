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

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmrec_kernels import Segment, cross_modal_attention

from .extras import KERNELS

KEYWORD = "mmrec_packed"
_LAYERS = {"full_attention", "sliding_attention"}
# Tokens per text, on average. Behind 512 tokens the cascade was faster on CPU at one, level at two and slower at eight.
_CASCADE_BELOW = 2
# Models with no more than this many are tried with a row of more: some (CLIP's) count positions by rows.
_FEW_POSITIONS = 256

_first_positions: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()


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
        prefix: what the texts go on from, or None.
        shared: `(offsets [n + 1], index)`, int64: the rows `index[offsets[i]:offsets[i + 1]]` of the prefix come before
            text i; or None where the next one holds.
        owners: int64 `[prefixes + 1]`: all texts that go on from prefix j own tokens `owners[j]:owners[j + 1]`.
        kept: where each layer leaves its keys and values, or None.
    """

    offsets: Tensor
    prefix: Prefix | None = None
    shared: tuple[Tensor, Tensor] | None = None
    owners: Tensor | None = None
    kept: dict[int, tuple[Tensor, Tensor]] | None = None


class NoPrefixError(ValueError):
    """A prefix was asked of a model that cannot have one."""


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, packed: Packed, *, causal: bool, scale: float | None
) -> Tensor:
    """`query [1, H, T, D]`, `key`, `value [1, Hkv, T, D]` of a packed row to `[1, T, H, Dv]`."""
    query, key, value = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    layer: Any = getattr(module, "layer_idx", None)
    if packed.kept is not None or packed.prefix is not None:
        if not causal:
            raise NoPrefixError(f"prefix: {type(module).__name__} is not causal: its tokens see those behind them")
        if layer is None:
            raise NoPrefixError(f"prefix: {type(module).__name__} has no layer_idx to keep keys and values by")
    if packed.kept is not None:
        packed.kept[layer] = (key, value)
    own = Segment(key, value, packed.offsets, causal=causal)
    if packed.prefix is None:
        return cross_modal_attention(query, [own], packed.offsets, scale=scale).unsqueeze(0)
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
    layers: Sequence[int] | None = None,
) -> Tensor:
    """Last hidden states `[T, d]` of a packed row; the model's attention must be `"mmrec"`.

    Args:
        offsets: int64 `[n + 1]` on the CPU, from 0 to T: text i owns tokens `offsets[i]:offsets[i + 1]`.
        input_ids, inputs_embeds: int64 `[T]` or `[T, d]`; one of them.
        prefix: what the texts go on from.
        counts: int64 `[prefixes]` on the CPU: so many texts go on from each prefix, those of the first one first.
        kept: filled with each layer's keys and values, `[T, Hkv, D]`.
        layers: hidden states of these instead, side by side, `[T, L · d]`; 0 is what the first block reads, i what
            block i gives.
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
    origin = _first_position(model)
    positions = torch.arange(len(tokens)) + (origin + start - offsets[:-1]).repeat_interleave(lengths)
    longest = int((start + lengths).max())
    config = model.config.get_text_config()
    limit, window = getattr(config, "max_position_embeddings", None), _window(config)
    if limit is not None and origin + longest > limit:
        raise ValueError(
            f"texts reach {longest} positions with their prefix, more positions than the model has, {limit - origin}"
        )
    if window is not None and longest > window:
        raise ValueError(
            f"packed texts must be no longer than the model's sliding window, {window}, "
            f"got one of {longest} tokens with its prefix"
        )
    steady = _steady_positions(config)
    if steady is not None and longest > steady:
        raise ValueError(
            f"packed texts must be no longer than {steady} tokens, from which on the model turns the positions of all "
            f"by other angles, got one of {longest} tokens with its prefix"
        )
    given = {"input_ids": input_ids, "inputs_embeds": inputs_embeds}
    packed = Packed(offsets.to(tokens.device), prefix, shared, owners, kept)
    refused_elsewhere = torch.zeros(1, 1, 0, 0, dtype=torch.bool, device=tokens.device)
    found = model(
        **{name: x.unsqueeze(0) for name, x in given.items() if x is not None},
        **without_cache(model), **{KEYWORD: packed}, **_with_layers(layers),
        attention_mask=refused_elsewhere, position_ids=positions.to(tokens.device).unsqueeze(0),
    )  # fmt: skip
    return _states(found, layers)[0]


def _with_layers(layers: Sequence[int] | None) -> dict[str, bool]:
    return {} if layers is None else {"output_hidden_states": True}


def _states(found: Any, layers: Sequence[int] | None) -> Tensor:
    """`[B, L, d]`, or of several layers side by side; the last one's are those behind a final norm."""
    last: Tensor = found.last_hidden_state
    return last if layers is None else torch.cat([found.hidden_states[layer] for layer in layers], dim=-1)


def _first_position(model: Any) -> int:
    """That of a text's first token: RoBERTa and its kin count from behind the padding's id."""
    if model not in _first_positions:
        kin = (m.padding_idx + 1 for m in model.modules() if hasattr(m, "create_position_ids_from_input_ids"))
        _first_positions[model] = next(kin, 0)
    return _first_positions[model]


def without_cache(model: Any) -> dict[str, bool]:
    """The argument that keeps a model from making a cache, where it has it."""
    return {"use_cache": False} if getattr(model.config, "use_cache", None) is not None else {}


def _window(config: Any) -> int | None:
    """The fewest positions that a layer sees of a long text, None where all see all."""
    window: int | None = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    slides = getattr(config, "use_sliding_window", True) and (kinds is None or "sliding_attention" in kinds)
    return window if slides else None


def _steady_positions(config: Any) -> int | None:
    """The longest text that leaves alone by what angles the positions of its company turn; None where none changes
    them. Beyond it LongRoPE and dynamic scaling choose others, for the whole row."""
    given = getattr(config, "rope_parameters", None) or {}
    found = []
    for one in (given, *given.values()):  # of all layers, or by their kind
        kind = one.get("rope_type", "") if isinstance(one, dict) else ""
        if kind == "longrope" or "dynamic" in kind:
            found.append(one.get("original_max_position_embeddings") or config.max_position_embeddings)
    return min(found, default=None)


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
    model: Any,
    offsets: Tensor,
    *,
    input_ids: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    layers: Sequence[int] | None = None,
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
    hidden = _states(model(**given, **without_cache(model), **_with_layers(layers)), layers)
    return hidden[mask.to(device)] if not full else hidden.flatten(0, 1)


def _like(mask: Tensor, rows: Tensor) -> Tensor:
    return mask.to(rows.device).view(*mask.shape, *(1,) * (rows.ndim - 2))


def why_not_packed(model: Any, own: Any, longest: int) -> str | None:
    """Why `model`, whose attention is `"mmrec"`, cannot take packed rows of texts of up to `longest` tokens, or None.

    Apart from what its configuration says, two short texts are computed packed, and one by one with the attention that
    the model came with (`own`); the same where one goes on from the other, if the model is causal; and a row that is
    longer than a text may be, where that is short. A model that takes positions from elsewhere than `position_ids`, or
    does not hand keyword arguments to its attention, gives another result or refuses.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - _LAYERS
    if kinds:
        return f"it has layers of {', '.join(sorted(kinds))}"
    window = _window(config)
    if window is not None and window < longest:
        return f"its sliding window is {window}, texts have up to {longest} tokens"
    steady = _steady_positions(config)
    if steady is not None and steady < longest:
        return f"a text of more than {steady} tokens changes its rotary angles, texts have up to {longest} tokens"
    try:
        with torch.no_grad():
            return _try_out(model, own)
    except Exception as error:  # whatever a model that is not made for this runs into
        return f"{type(error).__name__}: {error}"
    finally:
        model.set_attn_implementation(KERNELS)


def _try_out(model: Any, own: Any) -> str | None:
    table = model.get_input_embeddings().weight
    ids = torch.arange(5, device=table.device) + len(table) // 2  # special ones are at the ends
    first, second = ids[:2], ids[2:]
    found = [packed_forward(model, torch.tensor([0, 2, 5]), input_ids=ids), _gone_on(model, first, second)]
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0
    if positions <= _FEW_POSITIONS:
        packed_forward(model, torch.arange(positions + 2), input_ids=ids[:1].expand(positions + 1))
    model.set_attn_implementation(own)
    whole, *alone = (
        model(input_ids=t.unsqueeze(0), **without_cache(model)).last_hidden_state[0] for t in (ids, first, second)
    )
    tolerance = 1e-3 if table.dtype == torch.float32 else 5e-2  # ten times the rounding, and more
    for got, wanted in zip(found, (torch.cat(alone), whole[2:]), strict=True):
        if got is not None and not bool((got - wanted).float().norm() <= tolerance * wanted.float().norm()):
            return "two short texts packed differ from the same texts one by one"
    return None


def _gone_on(model: Any, first: Tensor, second: Tensor) -> Tensor | None:
    """Hidden states of the second text behind the first as its prefix; None where the model cannot have one."""
    kept: dict[int, tuple[Tensor, Tensor]] = {}
    try:
        packed_forward(model, torch.tensor([0, len(first)]), input_ids=first, kept=kept)
    except NoPrefixError:
        return None
    prefix = Prefix(kept, torch.tensor([0, len(first)], device=first.device))
    offsets, counts = torch.tensor([0, len(second)]), torch.tensor([1])
    return packed_forward(model, offsets, input_ids=second, prefix=prefix, counts=counts)
