"""What the forward and the backward of every provider written in Python take, and the check of what offsets name."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import library
from ..schemas import statistics_dtype
from ..validation import check_offsets


@dataclass(frozen=True)
class Arguments:
    """The arguments that forward and backward share, in the order of the schema."""

    query: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    offsets: Tensor
    index: list[Tensor]
    query_offsets: Tensor | None
    log_bias: Tensor | None
    value_gate: Tensor | None
    sink: Tensor | None
    query_norm: Tensor | None
    key_norm: Tensor | None
    scale: float
    norm_eps: float
    indexed: int
    causal: int

    @property
    def dtype(self) -> torch.dtype:
        return statistics_dtype(self.query.dtype)

    @property
    def heads(self) -> tuple[int, int]:
        """KV heads, and the query heads of each."""
        kv_heads = self.keys[0].shape[1]
        return kv_heads, self.query.shape[1] // kv_heads


def checks_contents(device: torch.device) -> bool:
    return device.type == "cpu" or library.check_requested()


def check_located(name: str, offsets: Tensor, total: int, index: Tensor | None = None) -> None:
    """Raise for offsets that decrease or leave their tensor, and for an index outside [−1, total). Synchronises."""
    check_offsets(f"{name}offsets", offsets, total if index is None else index.shape[0])
    if index is None or not offsets.shape[0]:
        return
    used = index[int(offsets[0]) : int(offsets[-1])]
    wrong = used[(used < -1) | (used >= total)]
    if wrong.shape[0]:
        raise ValueError(f"{name}index must be −1 or inside [0, {total}), got {int(wrong[0])}")


def check_contents(arguments: Arguments) -> None:
    """`check_located` of the queries and of each segment, where contents are to be checked."""
    if not checks_contents(arguments.query.device):
        return
    if arguments.query_offsets is not None:
        check_located("query_", arguments.query_offsets, arguments.query.shape[0])
    index = iter(arguments.index)
    for m, key in enumerate(arguments.keys):
        chosen = next(index) if arguments.indexed >> m & 1 else None
        check_located(f"segments[{m}].", arguments.offsets[m], key.shape[0], chosen)
