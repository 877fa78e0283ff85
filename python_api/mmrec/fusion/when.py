"""When modalities meet: at once, after they have listened to each other, or when each is one vector. One switch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .fuse import AttentionPooler, CrossModalAttention, Fused, LatentPooler, check_absent, count_items
from .tokens import Tokens

__all__ = ["ModalityFusion"]

WHEN = ("early", "intermediate", "late")
LEVELS = ("fine", "coarse")


class ModalityFusion(nn.Module):
    """Tokens of several modalities to one vector per item.

    - "early": all tokens go under one softmax.
    - "intermediate": each modality's tokens first listen to those of all others, by a `CrossModalAttention` each
      (co-attention as in ViLBERT, Lu et al., 2019, arXiv:1908.02265, for any number of modalities); then as "early".
      Gates start closed, so that training starts as "early".
    - "late": each modality is pooled by itself, and a softmax over the vectors that there are weighs them: a modality's
      mass does not depend on how many tokens it has.

    With level "coarse" each modality is the mean of its tokens before anything else: M tokens per item at most.

    What pools tokens is an `AttentionPooler`, or with `num_layers` the mean of a `LatentPooler`'s vectors. An item
    without anything has the vector 0 and mass 0; otherwise masses sum to 1.

    Args:
        modalities: names, in the order of `mass`.
        width: d of tokens and result.
        when: one of the three above.
        level: "fine", all tokens, or "coarse".
        num_queries: learned queries, or latents.
        num_heads: H; d must be a multiple.
        num_layers: of the `LatentPooler`; 0 = `AttentionPooler`.
        modality_gates: see `AttentionPooler`.
        dropout: of latent layers and of co-attention.
    """

    def __init__(
        self,
        modalities: Sequence[str],
        width: int,
        *,
        when: str = "early",
        level: str = "fine",
        num_queries: int = 4,
        num_heads: int = 2,
        num_layers: int = 0,
        modality_gates: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if when not in WHEN:
            raise ValueError(f"when must be one of {WHEN}, got {when!r}")
        if level not in LEVELS:
            raise ValueError(f"level must be one of {LEVELS}, got {level!r}")
        if num_layers < 0:
            raise ValueError(f"num_layers must be ≥ 0, got {num_layers}")
        self.when = when
        self.level = level
        self.modalities = tuple(modalities)

        def pooler(names: Sequence[str], layers: int, gates: bool) -> nn.Module:
            if not layers:
                return AttentionPooler(names, width, num_queries=num_queries, num_heads=num_heads, modality_gates=gates)
            return LatentPooler(
                names, width, num_latents=num_queries, num_layers=layers, num_heads=num_heads,
                modality_gates=gates, dropout=dropout,
            )  # fmt: skip

        self.pool = pooler(modalities, 0 if when == "late" else num_layers, modality_gates)
        self.listen, self.each = nn.ModuleList(), nn.ModuleList()
        if when == "intermediate" and len(self.modalities) > 1:
            for own in modalities:
                others = [name for name in modalities if name != own]
                self.listen.append(
                    CrossModalAttention(
                        others, width, num_heads=num_heads, modality_gates=modality_gates, dropout=dropout
                    )
                )
        elif when == "late":
            # A gate on the only modality that is listened to would be a second scale of its vector.
            self.each.extend(pooler([name], num_layers, False) for name in modalities)

    def forward(self, tokens: Mapping[str, Tokens], *, absent: Tensor | None = None) -> Fused:
        """Fuses N items.

        Args:
            tokens: one `Tokens` of N items per modality; a name that is not there is missing for every item.
            absent: bool `[N, M]`, modalities to treat as missing although they have tokens (modality dropout).
        """
        num_items, device = count_items(tokens, self.modalities)
        check_absent(absent, num_items, self.modalities)
        if self.level == "coarse":
            tokens = {name: _mean_token(tokens[name]) for name in self.modalities if name in tokens}
        if self.listen:
            tokens = self._listen(tokens, absent)
        elif self.each:
            nothing = torch.ones(num_items, len(self.modalities), dtype=torch.bool, device=device)
            tokens, absent = self._pool_each(tokens, nothing, absent)
        return _pool(self.pool, tokens, absent)

    def _listen(self, tokens: Mapping[str, Tokens], absent: Tensor | None) -> dict[str, Tokens]:
        heard = dict(tokens)
        for m, (name, block) in enumerate(zip(self.modalities, self.listen, strict=True)):
            others = {other: tokens[other] for other in self.modalities if other != name and other in tokens}
            if name in tokens and others:
                own, without = tokens[name], None
                if absent is not None:
                    without = torch.cat([absent[:, :m], absent[:, m + 1 :]], 1)
                heard[name] = own._replace(values=block(own.values, own.offsets, others, absent=without).values)
        return heard

    def _pool_each(
        self, tokens: Mapping[str, Tokens], nothing: Tensor, absent: Tensor | None
    ) -> tuple[dict[str, Tokens], Tensor]:
        """One token per item and modality, and which of them stand for nothing."""
        found = {}
        for m, (name, pool) in enumerate(zip(self.modalities, self.each, strict=True)):
            if name in tokens:
                values = _pool(pool, {name: tokens[name]}, None).values
                one_each = torch.arange(len(values) + 1, device=values.device)
                found[name] = Tokens(values, one_each, torch.zeros_like(one_each[1:]))
                nothing[:, m] = ~tokens[name].present
        return found, nothing if absent is None else nothing | absent


def _mean_token(tokens: Tokens) -> Tokens:
    """The mean of each item's tokens, for items that have any."""
    present = tokens.present
    values = tokens.mean()[present]
    offsets = nn.functional.pad(present.cumsum(0), (1, 0))
    return Tokens(values, offsets, torch.zeros(len(values), dtype=torch.int64, device=values.device))


def _pool(pooler: nn.Module, tokens: Mapping[str, Tokens], absent: Tensor | None) -> Fused:
    if isinstance(pooler, AttentionPooler):
        return pooler(tokens, absent=absent)
    values, mass = pooler(tokens, absent=absent)
    mass = mass.mean(1)
    heard = mass.sum(1, keepdim=True)
    # Latents that have heard nothing but each other would give all such items one vector.
    return Fused(torch.where(heard > 0, values.mean(1), 0), mass / torch.where(heard > 0, heard, 1))
