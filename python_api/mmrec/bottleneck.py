"""A bottleneck adapter: a small residual network that starts as the identity."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["Adapter"]


class Adapter(nn.Module):
    """x + W_up GELU(W_down LayerNorm(x)), at first the identity (Houlsby et al., 2019, arXiv:1902.00751).

    Args:
        width: d.
        inner: width of the bottleneck; None: d / 8, at least 1.
    """

    def __init__(self, width: int, inner: int | None = None) -> None:
        super().__init__()
        inner = max(width // 8, 1) if inner is None else inner
        if inner < 1:
            raise ValueError(f"inner must be at least 1, got {inner}")
        self.norm = nn.LayerNorm(width)
        self.down = nn.Linear(width, inner)
        self.up = nn.Linear(inner, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., d]` to `[..., d]`."""
        return x + self.up(F.gelu(self.down(self.norm(x))))
