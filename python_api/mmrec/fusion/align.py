"""Alignment: the modalities of one item are pulled together, those of different items apart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor, nn

from mmrec_kernels import info_nce_pairs

__all__ = ["ModalityAlignment"]

_MAX_SCALE = 100.0


class ModalityAlignment(nn.Module):
    """Symmetric InfoNCE between every two modalities, in a space of its own (CLIP, Radford et al., 2021).

    Each modality gets a linear head; the cosine is multiplied by a learned scale, at most 100 as in CLIP. Rows that
    lack one of two modalities count neither as positives nor as negatives of that pair.

    Args:
        modalities: names.
        width: d of the embeddings that come in.
        dim: width of the common space.
        pairs: which two modalities to align; None means all.
        scale: initial factor on the cosine (1 / temperature).
    """

    def __init__(
        self,
        modalities: Sequence[str],
        width: int,
        *,
        dim: int | None = None,
        pairs: Sequence[tuple[str, str]] | None = None,
        scale: float = 10.0,
    ) -> None:
        super().__init__()
        self.pairs = list(combinations(modalities, 2)) if pairs is None else list(pairs)
        unknown = {name for pair in self.pairs for name in pair} - set(modalities)
        if unknown:
            raise ValueError(f"pairs name {sorted(unknown)}, which are not among the modalities {list(modalities)}")
        if not 0 < scale <= _MAX_SCALE:
            raise ValueError(f"scale must be in (0, {_MAX_SCALE:g}], got {scale}")
        self.heads = nn.ModuleDict({name: nn.Linear(width, dim or width, bias=False) for name in modalities})
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))

    def forward(self, embeddings: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Tensor:
        """The mean over pairs of their losses, 0-d.

        Args:
            embeddings: `[N, d]` per modality, row n of each belongs to item n.
            present: bool `[N]` per modality; rows that are not present are not read.
        """
        pairs = [(a, b) for a, b in self.pairs if a in embeddings and b in embeddings]
        if not pairs:
            return self.log_scale.new_zeros(())
        names = sorted({name for pair in pairs for name in pair})
        projected = {name: self.heads[name](embeddings[name]) for name in names}
        return info_nce_pairs(
            projected,
            pairs,
            mask={name: present[name] for name in projected},
            scale=self.log_scale.exp().clamp(max=_MAX_SCALE),
            pair_weight=1.0 / len(pairs),
            normalize=True,
        )
