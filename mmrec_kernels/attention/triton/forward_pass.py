"""Cross-modal attention on GPU: the launcher of the forward."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ...schemas import statistics_dtype, terms_dtype
from .. import reference
from . import forward_kernels as kernels
from .prepare import MOST_WIDTH, Launch


def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Launcher of `_attention_forward`."""
    *inputs, return_mass = arguments
    p = Launch.of(*inputs)
    if max(p.widths) > MOST_WIDTH[p.query.dtype]:
        return reference.forward(*arguments)
    heads, segments = p.query.shape[1], len(p.keys)
    out = p.query.new_empty((p.rows, heads, p.widths[1]))
    lse = p.query.new_empty((p.rows, heads), dtype=terms_dtype(p.query.device))
    mass = p.query.new_empty((p.rows, heads, segments) if return_mass else 0, dtype=statistics_dtype(p.query.dtype))
    if p.batch == 0:
        return out.zero_(), lse.fill_(-float("inf")), mass.zero_()
    if p.rows == 0 or heads == 0:
        return out, lse, mass
    kv_heads, group = p.heads
    sizes = p.sizes("forward")
    table, tiles, slots = None, triton.cdiv(p.query.shape[0] * group, sizes["BLOCK_M"]), 0
    if p.query_offsets is None:
        slots = tiles * p.batch
    else:
        slots = p.rows * group // sizes["BLOCK_M"] + p.batch + 2
        table = p.offsets.new_empty(slots, dtype=torch.int32)
        kernels.table_kernel[(triton.cdiv(slots, 128),)](
            table, p.query_offsets, slots, p.batch, p.rows, (p.batch + 2).bit_length(),
            GROUP=group, BLOCK_M=sizes["BLOCK_M"], BLOCK=128,
        )  # fmt: skip
    kernels.forward_kernel[(slots * kv_heads,)](
        p.queries, p.segments, p.offsets, table, p.per_segment(p.log_bias), p.per_segment(p.value_gate), p.sink, out,
        lse, mass, p.batch, tiles, kv_heads, *p.widths, HAS_SINK=p.sink is not None, RETURN_MASS=return_mass,
        **p.flags, **sizes,
    )  # fmt: skip
    return out, lse, mass
