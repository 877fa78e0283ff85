"""Fusion: tokens of modalities listen to each other, or learned queries to all of them, under one softmax."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmrec_kernels import Segment, cross_modal_attention

from .tokens import Tokens

__all__ = ["Attended", "AttentionPooler", "CrossModalAttention", "Fused", "LatentPooler", "Pooled"]


class Fused(NamedTuple):
    """`values [N, d]`, one vector per item, and `mass [N, M]`, the share of attention that each modality got."""

    values: Tensor
    mass: Tensor


class Attended(NamedTuple):
    """`values [T, d]`, the queries with what they heard, and `mass [T, M]`, the share of attention that each modality
    got from each of them."""

    values: Tensor
    mass: Tensor


class Pooled(NamedTuple):
    """`values [N, L, d]`, L vectors per item, and `mass [N, L, M]`, the share of attention that each modality got in
    the last layer; what is missing to 1 went to the latents themselves."""

    values: Tensor
    mass: Tensor


class _Listener(nn.Module):
    """What all modules here have: named modalities, and a learned preference for and factor on each."""

    def __init__(self, modalities: Sequence[str], num_heads: int, modality_gates: bool) -> None:
        super().__init__()
        if len(set(modalities)) != len(modalities) or not modalities:
            raise ValueError(f"modalities must be distinct names, at least one, got {list(modalities)}")
        self.modalities = tuple(modalities)
        self.num_heads = num_heads
        shape = (1, num_heads, len(self.modalities))
        self.log_bias = nn.Parameter(torch.zeros(shape)) if modality_gates else None
        self.value_gate = nn.Parameter(torch.ones(shape)) if modality_gates else None

    def _bias(self, absent: Tensor | None, num_items: int, like: Tensor) -> Tensor | None:
        """`log_bias` with −∞ for what is `absent`."""
        check_absent(absent, num_items, self.modalities)
        if absent is None:
            return self.log_bias
        bias = like.new_zeros(()) if self.log_bias is None else self.log_bias
        shape = (num_items, self.num_heads, len(self.modalities))
        return bias.expand(shape).masked_fill(absent.unsqueeze(1), -torch.inf)


class AttentionPooler(_Listener):
    """Learned queries attend to every modality's tokens under one softmax, and the mean of their answers is the item's
    vector.

    Values are the tokens themselves and answers are averaged: what is learned is where to look. A projection of the
    values and a layer that mixes the answers, as `LatentPooler` has, fit the training data as fast and generalised
    worse on catalogues of thousands of items (`docs/recommender.md`).

    An item without a modality has an empty segment there: nothing is read, its mass is 0, and the others' shares grow.
    An item without any modality is a zero vector.

    Args:
        modalities: names, in the order of `mass`.
        width: d of tokens and result.
        num_queries: learned queries L.
        num_heads: H; d must be a multiple.
        modality_gates: learn a factor per modality and head on what it contributes (`value_gate`) and a preference for
            it (`log_bias`).
    """

    def __init__(
        self,
        modalities: Sequence[str],
        width: int,
        *,
        num_queries: int = 4,
        num_heads: int = 2,
        modality_gates: bool = True,
    ) -> None:
        super().__init__(modalities, num_heads, modality_gates)
        _check_sizes(width, num_heads=num_heads, num_queries=num_queries)
        head = width // num_heads
        self.query = nn.Parameter(torch.empty(num_queries, num_heads, head).normal_())
        self.norm = nn.LayerNorm(width)
        self.key = nn.Linear(width, width, bias=False)
        self.query_norm = nn.Parameter(torch.ones(head))
        self.key_norm = nn.Parameter(torch.ones(head))

    def forward(self, tokens: Mapping[str, Tokens], *, absent: Tensor | None = None) -> Fused:
        """Fuses N items.

        Args:
            tokens: one `Tokens` of N items per modality; a name that is not there is missing for every item.
            absent: bool `[N, M]`, modalities to treat as missing although they have tokens (modality dropout).
        """
        num_items, _ = count_items(tokens, self.modalities)
        segments = [self._segment(tokens.get(name), num_items) for name in self.modalities]
        result = cross_modal_attention(
            self.query, segments, log_bias=self._bias(absent, num_items, self.query), value_gate=self.value_gate,
            query_norm=self.query_norm, key_norm=self.key_norm, return_mass=True,
        )  # fmt: skip
        assert result.mass is not None
        answers = result.out.reshape(num_items, *self.query.shape).flatten(2)
        mass = result.mass.view(num_items, self.query.shape[0] * self.num_heads, len(self.modalities))
        return Fused(answers.mean(1), mass.mean(1))

    def _segment(self, tokens: Tokens | None, num_items: int) -> Segment:
        if tokens is None:
            return _nothing(self.query, num_items)
        shape = (len(tokens.values), *self.query.shape[1:])
        # Only keys are normalised: the length of a value may say how much an item is liked by everybody.
        key = self.key(self.norm(tokens.values))
        return Segment(key.view(shape), tokens.values.view(shape), tokens.offsets)


class CrossModalAttention(_Listener):
    """A block in which one modality's tokens listen to others: attention and a feed-forward, both residual, pre-norm
    and behind a gate that opens while training (Flamingo's gated cross-attention, Alayrac et al., 2022,
    arXiv:2204.14198).

        y = x + tanh(a) · Attention(LayerNorm(x), context) W_o        z = y + tanh(f) · W_2 GELU(W_1 LayerNorm(y))

    The softmax runs over the tokens of all modalities of the context; none is concatenated, padded or repeated. A token
    whose item has no context is left as it is by the attention. With a = f = 0, where training starts, the block is the
    identity: it can be put into a trained model.

    Args:
        modalities: names of the context's modalities, in the order of `mass`; or name → width of its tokens, where they
            differ from d.
        width: d of the queries' tokens.
        num_heads: H; d must be a multiple.
        num_kv_heads: heads of keys and values (H must be a multiple), None = H.
        residual_gate: multiply by the tanh gates; without them it is an ordinary pre-norm block.
        feed_forward: hidden width over d; 0 leaves the feed-forward out.
        modality_gates: learn a preference for each modality (`log_bias`) and a factor on it (`value_gate`), per head.
        dropout: on both branches.
        listens_to_itself: the queries' own tokens are one more segment of the softmax (Perceiver Resampler); its share
            is what the masses lack to 1.
    """

    def __init__(
        self,
        modalities: Sequence[str] | Mapping[str, int],
        width: int,
        *,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        residual_gate: bool = True,
        feed_forward: int = 4,
        modality_gates: bool = True,
        dropout: float = 0.0,
        listens_to_itself: bool = False,
    ) -> None:
        super().__init__(list(modalities), num_heads, modality_gates)
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        _check_sizes(width, num_heads=num_heads, num_kv_heads=kv_heads)
        if num_heads % kv_heads:
            raise ValueError(f"num_heads must be a multiple of num_kv_heads = {kv_heads}, got {num_heads}")
        if feed_forward < 0:
            raise ValueError(f"feed_forward must be ≥ 0, got {feed_forward}")
        head = width // num_heads
        widths = [modalities[name] for name in modalities] if isinstance(modalities, Mapping) else [width]
        self._shared = not isinstance(modalities, Mapping)
        self.kv_heads = kv_heads
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        # One projection for all modalities where they live in one space, else one each.
        self.context_norm = nn.ModuleList(nn.LayerNorm(size) for size in widths)
        self.key_value = nn.ModuleList(nn.Linear(size, 2 * kv_heads * head, bias=False) for size in widths)
        self.own_key_value = nn.Linear(width, 2 * kv_heads * head, bias=False) if listens_to_itself else None
        self.query_norm = nn.Parameter(torch.ones(head))
        self.key_norm = nn.Parameter(torch.ones(head))
        # Without a bias, or what heard nothing would change.
        self.out = nn.Linear(width, width, bias=False)
        self.feed = None
        if feed_forward:
            inner = feed_forward * width
            self.feed = nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, inner), nn.GELU(), nn.Dropout(dropout), nn.Linear(inner, width)
            )
        self.attention_gate = nn.Parameter(torch.zeros(())) if residual_gate else None
        self.feed_gate = nn.Parameter(torch.zeros(())) if residual_gate and feed_forward else None
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, offsets: Tensor | None, context: Mapping[str, Tokens], *, absent: Tensor | None = None
    ) -> Attended:
        """Lets the tokens of N items listen.

        Args:
            x: `[T, d]`; item n owns rows `offsets[n]:offsets[n + 1]`. With `offsets` None, x are L latents that every
                item has: the result is `[N · L, d]`, and nothing is repeated for the attention.
            offsets: int64 `[N + 1]` or None.
            context: one `Tokens` of N items per modality; a name that is not there is missing for every item.
            absent: bool `[N, M]`, modalities to treat as missing although they have tokens.

        Raises:
            ValueError: another width or number of items, or no modality of the context at all.
        """
        if x.ndim != 2 or x.shape[1] != self.norm.normalized_shape[0]:
            raise ValueError(f"x must have shape [T, {self.norm.normalized_shape[0]}], got {list(x.shape)}")
        num_items, _ = count_items(context, self.modalities)
        if offsets is not None and offsets.numel() != num_items + 1:
            raise ValueError(f"offsets must be [{num_items + 1}] as the context's, got {list(offsets.shape)}")
        normed = self.norm(x)
        query = self.query(normed).unflatten(1, (self.num_heads, -1))
        segments = [self._segment(m, context.get(name), query, num_items) for m, name in enumerate(self.modalities)]
        bias = self._bias(absent, num_items, query)
        gate: Tensor | None = self.value_gate
        if self.own_key_value is not None:
            segments.append(self._own(normed, offsets, num_items))
            bias, gate = _beside(bias, 0.0), _beside(gate, 1.0)
        result = cross_modal_attention(
            query, segments, offsets, log_bias=bias, value_gate=gate,
            query_norm=self.query_norm, key_norm=self.key_norm, return_mass=True,
        )  # fmt: skip
        assert result.mass is not None
        if offsets is None:
            x = x.repeat(num_items, 1)
        x = x + _opened(self.dropout(self.out(result.out.flatten(1))), self.attention_gate)
        if self.feed is not None:
            x = x + _opened(self.dropout(self.feed(x)), self.feed_gate)
        return Attended(x, result.mass[..., : len(self.modalities)].mean(1))

    def _segment(self, m: int, tokens: Tokens | None, query: Tensor, num_items: int) -> Segment:
        if tokens is None:
            return _nothing(query[:, : self.kv_heads], num_items)
        at = 0 if self._shared else m
        return self._keys(self.key_value[at](self.context_norm[at](tokens.values)), tokens.offsets)

    def _own(self, normed: Tensor, offsets: Tensor | None, num_items: int) -> Segment:
        assert self.own_key_value is not None
        rows = self.own_key_value(normed)
        if offsets is not None:
            return self._keys(rows, offsets)
        # Latents that all items share are stored once and named by index.
        index = torch.arange(len(normed), device=rows.device).repeat(num_items)
        return self._keys(rows, torch.arange(num_items + 1, device=rows.device) * len(normed), index)

    def _keys(self, rows: Tensor, offsets: Tensor, index: Tensor | None = None) -> Segment:
        key, value = rows.unflatten(1, (2, self.kv_heads, -1)).unbind(1)
        return Segment(key, value, offsets, index=index)


class LatentPooler(nn.Module):
    """L learned latents listen to all tokens of an item and to each other, layer after layer: a fixed number of vectors
    from any number of tokens of any modalities (Perceiver, Jaegle et al., 2021, arXiv:2103.03206; its Resampler in
    Flamingo; the Q-Former of BLIP-2, Li et al., 2023, arXiv:2301.12597).

    Each layer is a `CrossModalAttention` without residual gates whose softmax runs over the tokens of all modalities
    and the latents themselves. In the first layer latents are the same for all items: their queries, keys and values
    are computed and stored once.

    An item without any modality still has its latents, which then have heard each other only: masses are 0.

    Args:
        modalities: names, in the order of `mass`; or name → width of its tokens, where they differ from d.
        width: d of the latents.
        num_latents: L.
        num_layers: blocks.
        num_heads, num_kv_heads, feed_forward, modality_gates, dropout: of each block.
    """

    def __init__(
        self,
        modalities: Sequence[str] | Mapping[str, int],
        width: int,
        *,
        num_latents: int = 4,
        num_layers: int = 1,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        feed_forward: int = 4,
        modality_gates: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        _check_sizes(width, num_heads=num_heads, num_latents=num_latents, num_layers=num_layers)
        self.modalities = tuple(modalities)
        self.latents = nn.Parameter(torch.empty(num_latents, width).normal_())
        self.layers = nn.ModuleList(
            CrossModalAttention(
                modalities, width, num_heads=num_heads, num_kv_heads=num_kv_heads, residual_gate=False,
                feed_forward=feed_forward, modality_gates=modality_gates, dropout=dropout, listens_to_itself=True,
            )
            for _ in range(num_layers)
        )  # fmt: skip
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Mapping[str, Tokens], *, absent: Tensor | None = None) -> Pooled:
        """Pools N items.

        Args:
            tokens: one `Tokens` of N items per modality; a name that is not there is missing for every item.
            absent: bool `[N, M]`, modalities to treat as missing although they have tokens.
        """
        x, mass, offsets, length = self.latents, self.latents, None, len(self.latents)
        for layer in self.layers:
            x, mass = layer(x, offsets, tokens, absent=absent)
            offsets = torch.arange(len(x) // length + 1, device=x.device) * length
        shape = (-1, length, len(self.modalities))
        return Pooled(self.norm(x).view(-1, *self.latents.shape), mass.view(shape))


def count_items(tokens: Mapping[str, Tokens], modalities: Sequence[str]) -> tuple[int, torch.device]:
    """N, the number of items that the `tokens` of all `modalities` are of, and where they are."""
    found = [tokens[name] for name in modalities if name in tokens]
    if not found:
        raise ValueError(f"tokens must hold at least one of the modalities {tuple(modalities)}, got {sorted(tokens)}")
    sizes = [part.num_items for part in found]
    if len(set(sizes)) > 1:
        raise ValueError(
            f"tokens must hold the same number of items per modality, got {' and '.join(str(size) for size in sizes)}"
        )
    return sizes[0], found[0].offsets.device


def check_absent(absent: Tensor | None, num_items: int, modalities: Sequence[str]) -> None:
    """Refuses what is not bool `[N, M]` or None."""
    if absent is not None and (absent.dtype != torch.bool or absent.shape != (num_items, len(modalities))):
        raise ValueError(
            f"absent must be bool [{num_items}, {len(modalities)}], got {absent.dtype} {list(absent.shape)}"
        )


def _check_sizes(width: int, **sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be ≥ 1, got {size}")
    if width % sizes["num_heads"]:
        raise ValueError(f"width must be a multiple of num_heads = {sizes['num_heads']}, got {width}")


def _nothing(like: Tensor, num_items: int) -> Segment:
    """The segment of a modality that no item has."""
    offsets = torch.zeros(num_items + 1, dtype=torch.int64, device=like.device)
    return Segment(like[:0], like[:0], offsets)


def _beside(per_modality: Tensor | None, own: float) -> Tensor | None:
    """`[.., M]` with a column for the queries' own tokens."""
    return None if per_modality is None else nn.functional.pad(per_modality, (0, 1), value=own)


def _opened(branch: Tensor, gate: Tensor | None) -> Tensor:
    return branch if gate is None else torch.tanh(gate) * branch
