"""The user tower: a causal sequence model over the vectors of the items in a history.

Pre-norm transformer (SASRec, Kang and McAuley, 2018, arXiv:1808.09781) whose attention is `cross_modal_attention` with
one causal segment: sequences lie end to end, nothing is padded.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmrec_kernels import Segment, cross_modal_attention

__all__ = ["UserTower"]


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float, gated: bool) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.feed_norm = nn.LayerNorm(width)
        self.feed = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * width, width)
        )
        self.dropout = nn.Dropout(dropout)
        self.gates = nn.ModuleList(nn.Linear(width, width) for _ in range(2)) if gated else None

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        query, key, value = self._split(self.qkv(self.attention_norm(x)), 3)
        heard = cross_modal_attention(query, [Segment(key, value, offsets, causal=True)], offsets)
        return self._feed(x, heard)

    def last(self, x: Tensor, offsets: Tensor) -> Tensor:
        """`[B, d]`: what `forward` gives at the last position of each history. The others are keys and values only."""
        width, normed = x.shape[1], self.attention_norm(x)
        rows = offsets[1:] - 1
        weight, bias = self.qkv.weight, self.qkv.bias
        (query,) = self._split(F.linear(normed.index_select(0, rows), weight[:width], bias[:width]), 1)
        key, value = self._split(F.linear(normed, weight[width:], bias[width:]), 2)
        one_each = torch.arange(len(offsets), device=offsets.device)
        heard = cross_modal_attention(query, [Segment(key, value, offsets)], one_each)
        return self._feed(x.index_select(0, rows), heard)

    def _split(self, x: Tensor, parts: int) -> tuple[Tensor, ...]:
        return x.view(len(x), parts, self.heads, x.shape[1] // parts // self.heads).unbind(1)

    def _feed(self, x: Tensor, heard: Tensor) -> Tensor:
        x = x + self._gated(0, x, self.dropout(self.out(heard.flatten(1))))
        return x + self._gated(1, x, self.dropout(self.feed(self.feed_norm(x))))

    def _gated(self, part: int, x: Tensor, change: Tensor) -> Tensor:
        return change if self.gates is None else change * self.gates[part](x).sigmoid()


class UserTower(nn.Module):
    """Histories to states: one vector after every item of every history.

    Args:
        width: d of item vectors and states.
        layers, heads, dropout: of the transformer.
        max_length: longest history, in items; learned positions count from the oldest item read.
        gated: what a block adds is multiplied by σ of a linear function of what it adds to (LiGR, Borisyuk et al.,
            2025, arXiv:2502.03417).
    """

    def __init__(
        self, width: int, *, layers: int, heads: int, max_length: int, dropout: float, gated: bool = False
    ) -> None:
        super().__init__()
        self.max_length = max_length
        self.position = nn.Parameter(torch.empty(max_length, width).normal_(std=0.05))
        self.input_norm = nn.LayerNorm(width)
        self.input_dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(_Block(width, heads, dropout, gated) for _ in range(layers))
        self.output_norm = nn.LayerNorm(width)

    def forward(self, item_vectors: Tensor, index: Tensor, offsets: Tensor, *, last: bool = False) -> Tensor:
        """`[T, d]`: state t has read the items of its history up to and including position t.

        Args:
            item_vectors: `[I, d]`, gathered by index.
            index: int64 `[T]`, the rows of all histories end to end.
            offsets: int64 `[B + 1]`; no history longer than `max_length`.
            last: give only the last state of each history, `[B, d]`, for less work; none may be empty.

        Raises:
            ValueError: a history longer than `max_length`.
        """
        lengths = offsets.diff()
        if len(index) and int(lengths.max()) > self.max_length:
            raise ValueError(
                f"histories must have at most max_length = {self.max_length} items, got {int(lengths.max())}"
            )
        place = torch.arange(len(index), device=index.device) - offsets[:-1].repeat_interleave(lengths)
        x = item_vectors.index_select(0, index) + self.position.index_select(0, place)
        x = self.input_dropout(self.input_norm(x))
        for n, block in enumerate(self.blocks):
            assert isinstance(block, _Block)
            x = block.last(x, offsets) if last and n == len(self.blocks) - 1 else block(x, offsets)
        return self.output_norm(x)
