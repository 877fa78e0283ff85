"""Fusion: a few learned queries listen to all of an item's modalities at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmrec_kernels import Segment, cross_modal_attention

from .tokens import Tokens

__all__ = ["CrossModalAttention", "Fused"]


class Fused(NamedTuple):
    """`values [N, d]`, one vector per item, and `mass [N, M]`, the share of attention that each modality got."""

    values: Tensor
    mass: Tensor


class CrossModalAttention(nn.Module):
    """Learned queries attend to every modality's tokens under one softmax (Perceiver, Jaegle et al., 2021; Q-Former, Li
    et al., 2023), and the mean of their answers is the item's vector.

    Values are the tokens themselves and answers are averaged: what is learned is where to look. A projection of the
    values and a layer that mixes the answers, as those papers have, fit the training data as fast and generalised
    worse on catalogues of thousands of items (`docs/recommender.md`).

    An item without a modality has an empty segment there: nothing is read, its mass is 0, and the others' shares grow.
    An item without any modality is a zero vector.

    Args:
        modalities: names, in the order of `mass`.
        width: d of tokens and result.
        num_queries: learned queries L.
        num_heads: H; d must be a multiple.
        gated: learn a factor per modality and head on what it contributes (`value_gate`) and a preference for it
            (`log_bias`).
    """

    def __init__(
        self, modalities: Sequence[str], width: int, *, num_queries: int = 4, num_heads: int = 2, gated: bool = True
    ) -> None:
        super().__init__()
        if len(set(modalities)) != len(modalities) or not modalities:
            raise ValueError(f"modalities must be distinct names, at least one, got {list(modalities)}")
        if num_queries < 1 or num_heads < 1:
            raise ValueError(f"num_queries and num_heads must be ≥ 1, got {num_queries} and {num_heads}")
        if width % num_heads:
            raise ValueError(f"width must be a multiple of num_heads = {num_heads}, got {width}")
        self.modalities = tuple(modalities)
        self.num_heads = num_heads
        head = width // num_heads
        self.query = nn.Parameter(torch.empty(num_queries, num_heads, head).normal_())
        self.norm = nn.LayerNorm(width)
        self.key = nn.Linear(width, width, bias=False)
        self.query_norm = nn.Parameter(torch.ones(head))
        self.key_norm = nn.Parameter(torch.ones(head))
        shape = (1, num_heads, len(self.modalities))
        self.log_bias = nn.Parameter(torch.zeros(shape)) if gated else None
        self.value_gate = nn.Parameter(torch.ones(shape)) if gated else None

    def forward(self, tokens: Mapping[str, Tokens], *, absent: Tensor | None = None) -> Fused:
        """Fuses N items.

        Args:
            tokens: one `Tokens` of N items per modality; a name that is not there is missing for every item.
            absent: bool `[N, M]`, modalities to treat as missing although they have tokens (modality dropout).
        """
        given = [tokens[name] for name in self.modalities if name in tokens]
        if not given:
            raise ValueError(f"tokens must hold at least one of the modalities {self.modalities}, got {sorted(tokens)}")
        num_items, like = given[0].num_items, given[0].values
        segments = [self._segment(tokens.get(name), num_items, like) for name in self.modalities]
        result = cross_modal_attention(
            self.query, segments, log_bias=self._bias(absent, num_items), value_gate=self.value_gate,
            query_norm=self.query_norm, key_norm=self.key_norm, return_mass=True,
        )  # fmt: skip
        assert result.mass is not None
        answers = result.out.view(num_items, self.query.shape[0], like.shape[1])
        mass = result.mass.view(num_items, self.query.shape[0] * self.num_heads, len(self.modalities))
        return Fused(answers.mean(1), mass.mean(1))

    def _segment(self, tokens: Tokens | None, num_items: int, like: Tensor) -> Segment:
        if tokens is None:
            nowhere = torch.zeros(num_items + 1, dtype=torch.int64, device=like.device)
            tokens = Tokens(like[:0], nowhere, nowhere[:0])
        elif tokens.num_items != num_items:
            raise ValueError(
                f"tokens must hold the same number of items per modality, got {tokens.num_items} and {num_items}"
            )
        shape = (len(tokens.values), self.num_heads, self.query.shape[2])
        # Only keys are normalised: the length of a value may say how much an item is liked by everybody.
        key = self.key(self.norm(tokens.values))
        return Segment(key.view(shape), tokens.values.view(shape), tokens.offsets)

    def _bias(self, absent: Tensor | None, num_items: int) -> Tensor | None:
        if absent is None:
            return self.log_bias
        if absent.dtype != torch.bool or absent.shape != (num_items, len(self.modalities)):
            raise ValueError(
                f"absent must be bool [{num_items}, {len(self.modalities)}], got {absent.dtype} {list(absent.shape)}"
            )
        bias = self.query.new_zeros(()) if self.log_bias is None else self.log_bias
        shape = (num_items, self.num_heads, len(self.modalities))
        return bias.expand(shape).masked_fill(absent.unsqueeze(1), -torch.inf)
