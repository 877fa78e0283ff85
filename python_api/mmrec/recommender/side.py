"""Text vectors of several layers of the backbone, side by side: each whitened for itself, then put together."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..fusion import Tokens, Whitening
from ..llm import SideNetwork

__all__ = ["LayerWhitening", "side_projection"]


class LayerWhitening(nn.Module):
    """A `Whitening` for each of L layers: their means and scales differ, and directions of one say nothing of another.

    Args:
        width: L · d, of the tokens.
        num_kinds: slots K.
        rank: directions kept of each layer, at most d.
        layers: L.
    """

    def __init__(self, width: int, num_kinds: int, rank: int, layers: int) -> None:
        super().__init__()
        if width % layers:
            raise ValueError(f"text vectors must hold side_layers = {layers} layers of one width, got width {width}")
        self.layers = nn.ModuleList(Whitening(width // layers, num_kinds, rank) for _ in range(layers))

    def fit(self, tokens: Tokens, items: Tensor) -> LayerWhitening:
        """See `Whitening.fit`."""
        for whiten, values in zip(self.layers, tokens.values.chunk(len(self.layers), dim=1), strict=True):
            assert isinstance(whiten, Whitening)
            whiten.fit(tokens._replace(values=values), items)
        return self

    def forward(self, values: Tensor, kind: Tensor) -> Tensor:
        """`[T, L · d]` of `kind int64 [T]` to `[T, L · rank]`."""
        parts = zip(self.layers, values.chunk(len(self.layers), dim=1), strict=True)
        return torch.cat([whiten(part, kind) for whiten, part in parts], dim=1)


def side_projection(rank: int, layers: int, width: int) -> nn.Module:
    """`[T, L · rank]` to `[T, width]` by a `SideNetwork` of that width."""
    return nn.Sequential(nn.Unflatten(1, (layers, rank)), SideNetwork(rank, layers, side=width))
