"""A small network beside a frozen backbone that trains on its hidden states, once they are computed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..bottleneck import Adapter

__all__ = ["SideNetwork"]

# From 0, where all layers count alike, training began further from what the last layer gives, and ended lower.
_GATE = -3.0


class SideNetwork(nn.Module):
    """From the hidden states x_1 … x_L of L layers to one vector, without a pass through the backbone.

        s_1 = A_1(D_1 x_1)      s_l = A_l(g_l s_{l-1} + (1 - g_l) D_l x_l)      g_l = sigmoid(a_l)

    A_l is a bottleneck `Adapter`, which starts as the identity; a_l is learned and starts at -3: at first all but a
    little is the last layer's; D_l projects to `side`, or is the identity (IISAN, Fu et al. 2024, arXiv:2404.02059;
    LST, Sung et al. 2022, arXiv:2206.06522). A step costs L · n · (d · side + 2 · side · inner) multiply-adds, three
    times that with its backward, and keeps a few vectors of width `side` for each text and layer: neither depends on
    the backbone's size or on the texts' lengths.

    Args:
        width: d of the hidden states.
        layers: L.
        inner: width of the adapters' bottleneck; None: an eighth of theirs, at least 1.
        side: width of the network; None: d, without projections.
    """

    def __init__(self, width: int, layers: int, *, inner: int | None = None, side: int | None = None) -> None:
        super().__init__()
        for name, value in (("width", width), ("layers", layers), ("side", side)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.width, self.layers = width, layers
        self.project = None
        if side is not None:
            self.project = nn.ModuleList(nn.Linear(width, side) for _ in range(layers))
        self.adapters = nn.ModuleList(Adapter(side or width, inner) for _ in range(layers))
        self.gate = nn.Parameter(torch.full((layers - 1,), _GATE))

    def forward(self, hidden: Tensor) -> Tensor:
        """`[n, L, d]` to `[n, side]`, `[n, d]` without projections."""
        if hidden.ndim != 3 or hidden.shape[1:] != (self.layers, self.width):
            raise ValueError(f"hidden must be [n, {self.layers}, {self.width}], got {list(hidden.shape)}")
        states = list(hidden.unbind(1))
        if self.project is not None:
            states = [project(state) for project, state in zip(self.project, states, strict=True)]
        found: Tensor = self.adapters[0](states[0])
        for adapter, gate, state in zip(self.adapters[1:], torch.sigmoid(self.gate), states[1:], strict=True):
            found = adapter(torch.lerp(state, found, gate))
        return found
