"""Diagonal Gaussians over one latent space, a coder and a decoder per modality: for disentangling and for aligning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

__all__ = ["GaussianCoders", "divergence", "product_of_gaussians"]

_LOG_VARIANCE = 6.0  # the largest and, negated, the least


class GaussianCoders(nn.Module):
    """Linear coders to a mean and a variance, and linear decoders.

    Args:
        modalities: names.
        width: d of the vectors.
        latent: z, width of the latent space.
    """

    def __init__(self, modalities: Sequence[str], width: int, latent: int) -> None:
        super().__init__()
        if latent < 1:
            raise ValueError(f"latent must be at least 1, got {latent}")
        self.encode = nn.ModuleDict({name: nn.Linear(width, 2 * latent) for name in modalities})
        self.decode = nn.ModuleDict({name: nn.Linear(latent, width) for name in modalities})

    def posterior(self, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance `[N, z]` that modality `name` gives for `x [N, d]`."""
        mean, log_variance = self.encode[name](x).chunk(2, dim=1)
        return mean, (_LOG_VARIANCE * torch.tanh(log_variance / _LOG_VARIANCE)).exp()

    def draw(self, posterior: tuple[Tensor, Tensor]) -> Tensor:
        """`[N, z]`: drawn while training (with gradients to both, Kingma and Welling, 2014), otherwise the mean."""
        mean, variance = posterior
        return mean + variance.sqrt() * torch.randn_like(mean) if self.training else mean


def divergence(mean: Tensor, variance: Tensor) -> Tensor:
    """`[N]`, KL of N(mean, variance) from N(0, 1), per dimension."""
    return (variance + mean.square() - 1 - variance.log()).mean(1) / 2


def product_of_gaussians(
    posteriors: Mapping[str, tuple[Tensor, Tensor]], present: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Mean and variance `[N, z]` of N(0, 1) times those of the Gaussians (mean, variance) that are `present`."""
    precision = weighted = None
    for name, (mean, variance) in posteriors.items():
        own = torch.where(present[name].unsqueeze(1), 1 / variance, 0)
        part = own * torch.where(present[name].unsqueeze(1), mean, 0)
        precision = 1 + own if precision is None else precision + own
        weighted = part if weighted is None else weighted + part
    if precision is None or weighted is None:
        raise ValueError("posteriors must hold at least one modality, got none")
    return weighted / precision, 1 / precision
