"""One vector per item and modality, of which some are missing: what disentangling and aligning have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["distinct", "given", "masked_mean", "mean_over", "relative_error", "somewhere"]


def distinct(modalities: Sequence[str]) -> tuple[str, ...]:
    """The names, of which there must be one at least and none twice."""
    if len(set(modalities)) != len(modalities) or not modalities:
        raise ValueError(f"modalities must be distinct names, at least one, got {list(modalities)}")
    return tuple(modalities)


def given(modalities: Sequence[str], vectors: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The modalities that are there: `[N, d]`, 0 where `present` says that an item lacks one, whatever stands there.

    Raises:
        ValueError: none of the modalities, or a mask that is not bool `[N]`.
    """
    names = [name for name in modalities if name in vectors]
    if not names:
        raise ValueError(f"vectors must hold at least one of the modalities {tuple(modalities)}, got {sorted(vectors)}")
    for name in names:
        has = present.get(name)
        if has is None or has.dtype != torch.bool or has.shape != vectors[name].shape[:1]:
            got = "nothing" if has is None else f"{has.dtype} {list(has.shape)}"
            raise ValueError(f"present[{name!r}] must be bool [{len(vectors[name])}], got {got}")
    return {name: torch.where(present[name].unsqueeze(1), vectors[name], 0) for name in names}


def somewhere(parts: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Tensor:
    """bool `[N]`: the item has at least one of these."""
    return torch.stack([present[name] for name in parts]).any(0)


def mean_over(parts: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Tensor:
    """`[N, d]`, the mean over the modalities that an item has, 0 where it has none; what is missing is 0 already."""
    count = torch.stack([present[name] for name in parts]).sum(0).clamp(min=1)
    return torch.stack(list(parts.values())).sum(0) / count.unsqueeze(1)


def masked_mean(values: Tensor, counts: Tensor) -> Tensor:
    """0-d, the mean of those of `values [N]` that count; 0 where none does."""
    return torch.where(counts, values, 0).sum() / counts.sum().clamp(min=1)


def relative_error(found: Tensor, wanted: Tensor, has: Tensor) -> Tensor:
    """Mean squared error over the rows that `has` names, over the mean square of what is wanted, which is given."""
    wanted = wanted.detach()
    scale = masked_mean(wanted.square().mean(1), has)
    error = masked_mean((found - wanted).square().mean(1), has)
    return error / scale.clamp(min=torch.finfo(scale.dtype).eps)
