"""From the vectors of a modality to tokens of a language model's input space."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmrec_kernels import Segment, cross_modal_attention

__all__ = ["SlotSpec", "projector"]

_KINDS = ("linear", "mlp", "resampler")
_HEADS, _HEAD = 4, 16


@dataclass(frozen=True)
class SlotSpec:
    """A modality of slots.

    Attributes:
        width: of its vectors.
        tokens: how many each slot becomes.
        kind: "linear" or "mlp" (two layers, GELU) of one vector per slot, or "resampler": learned latents attend to any
            number of vectors (Perceiver Resampler of Flamingo, arXiv:2204.14198).
        markers: whether a learned token stands before them and another one behind them.
    """

    width: int
    tokens: int = 1
    kind: str = "linear"
    markers: bool = False

    def __post_init__(self) -> None:
        if self.width < 1 or self.tokens < 1:
            raise ValueError(f"width and tokens must be at least 1, got {self.width} and {self.tokens}")
        if self.kind not in _KINDS:
            raise ValueError(f"kind must be one of {_KINDS}, got {self.kind!r}")

    @property
    def length(self) -> int:
        """Tokens of a slot with its markers."""
        return self.tokens + 2 * self.markers


def projector(spec: SlotSpec, width: int) -> nn.Module:
    """A module from `[n, spec.width]` to `[n, tokens · width]`; a resampler is one from `values [R, spec.width]` and
    `offsets int64 [n + 1]` to `[n, tokens, width]`."""
    if spec.kind == "resampler":
        return _Resampler(spec.width, spec.tokens, width)
    if spec.kind == "linear":
        return nn.Linear(spec.width, spec.tokens * width)
    return nn.Sequential(nn.Linear(spec.width, width), nn.GELU(), nn.Linear(width, spec.tokens * width))


class _Resampler(nn.Module):
    """Latents that all slots share attend to each slot's vectors."""

    def __init__(self, width: int, tokens: int, out: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(tokens, _HEADS, _HEAD))
        self.norm = nn.LayerNorm(width)
        self.key_value = nn.Linear(width, 2 * _HEADS * _HEAD, bias=False)
        self.out = nn.Linear(_HEADS * _HEAD, out)

    def forward(self, values: Tensor, offsets: Tensor) -> Tensor:
        key, value = self.key_value(self.norm(values)).unflatten(1, (2, _HEADS, _HEAD)).unbind(1)
        heard = cross_modal_attention(self.query, [Segment(key, value, offsets)])
        return self.out(heard.flatten(1)).unflatten(0, (-1, len(self.query)))
