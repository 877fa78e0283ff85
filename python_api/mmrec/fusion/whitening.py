"""Whitening: frozen encoders' vectors share a large mean and a few dominant directions; a recommender learns faster
without them (cf. Su et al., 2021, arXiv:2103.15316; UniSRec, Hou et al., KDD 2022)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .tokens import Tokens

__all__ = ["Whitening"]


class Whitening(nn.Module):
    """y = (x − mean of x's kind) · W, then scaled to length √rank; fixed once fitted, and part of the state dict.

    W maps onto the `rank` leading principal directions and divides each by its standard deviation, damped by 10⁻³ of
    the mean variance so that directions that hold rounding noise are not blown up.

    Args:
        width: d of the tokens.
        num_kinds: slots K (text fields, patch positions); each has its own mean.
        rank: directions kept, at most d.
    """

    mean: Tensor
    matrix: Tensor

    def __init__(self, width: int, num_kinds: int, rank: int) -> None:
        super().__init__()
        if not 1 <= rank <= width:
            raise ValueError(f"rank must be in [1, {width}], got {rank}")
        self.rank = rank
        self.register_buffer("mean", torch.zeros(num_kinds, width))
        self.register_buffer("matrix", torch.eye(width, rank))

    @torch.no_grad()
    def fit(self, tokens: Tokens, items: Tensor) -> Whitening:
        """Takes mean and directions from the tokens of `items` (int64; the training items). Computed in float64.

        With fewer tokens than `rank` the directions are what those tokens span, and the remaining columns of W are
        zero; without tokens nothing changes.
        """
        chosen = tokens.select(items)
        if not len(chosen.values):
            return self
        values = chosen.values.double()
        count = torch.bincount(chosen.kind, minlength=len(self.mean)).clamp(min=1)
        mean = values.new_zeros(self.mean.shape).index_add_(0, chosen.kind, values) / count.unsqueeze(1)
        centred = values - mean[chosen.kind]
        variance, directions = torch.linalg.eigh(centred.T @ centred / len(centred))
        variance, directions = variance.flip(0).clamp(min=0), directions.flip(1)
        # Outside the span of the tokens any basis is as good as another: keeping one would scale up chance directions.
        spanned = variance > variance[0] * len(variance) * torch.finfo(variance.dtype).eps
        # An eigenvector's sign is arbitrary: fix it, so that the fit does not depend on the LAPACK build.
        largest = directions.abs().argmax(0, keepdim=True)
        directions = directions * directions.gather(0, largest).sign()
        step = (variance + 1e-3 * variance.mean() + 1e-12).sqrt()
        self.mean.copy_(mean)
        self.matrix.copy_((directions / step * spanned)[:, : self.rank])
        return self

    def forward(self, values: Tensor, kind: Tensor) -> Tensor:
        """`[T, d]` of `kind int64 [T]` to `[T, rank]`."""
        white = (values - self.mean.index_select(0, kind)) @ self.matrix
        return nn.functional.normalize(white, dim=-1) * self.rank**0.5
