"""Decoding NF4 in Triton: the sixteen codes lie in shared memory, one read for each weight, and a block's absmax in
float32 beside them. W[n, k] = round(code[nibble] · absmax[(n·K + k) // blocksize]), the bits of bitsandbytes."""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton_common import rounded
from ..reference import CODES, NESTED_BLOCKSIZE

_CODES = tl.constexpr(CODES)
_NESTED = tl.constexpr(NESTED_BLOCKSIZE)


@triton.jit
def code_table():
    """[16] float32."""
    at = tl.arange(0, 16)
    codes = tl.zeros([16], tl.float32)
    for i in tl.static_range(16):
        codes = tl.where(at == i, _CODES[i], codes)
    return codes


@triton.jit
def weight_tile(
    packed_ptr, absmax_ptr, codes, row, in_row, begin, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    GROUP: tl.constexpr, BLOCKSIZE: tl.constexpr, DTYPE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """[ROWS, COLUMNS] of W: columns from `begin`, a multiple of COLUMNS, on; 0 outside of W.

    GROUP columns, from a multiple of GROUP on, share a block in every row. With GROUP 1 rows may begin inside a byte.
    """
    offs = begin + tl.arange(0, COLUMNS)
    if GROUP > 1:
        pair = begin // 2 + tl.arange(0, COLUMNS // 2)
        at = packed_ptr + row[:, None] * (columns // 2) + pair[None, :]
        byte = tl.load(at, in_row[:, None] & (2 * pair < columns)[None, :], 0)
        index = tl.reshape(tl.join(byte >> 4, byte & 15), [ROWS, COLUMNS])
    else:
        flat = row[:, None] * columns + offs[None, :]
        byte = tl.load(packed_ptr + flat // 2, in_row[:, None] & (offs < columns)[None, :], 0)
        index = tl.where(flat % 2 == 0, byte >> 4, byte & 15)
    value = tl.gather(codes, tl.reshape(index, [ROWS * COLUMNS]).to(tl.int32), 0)
    first = begin + tl.arange(0, COLUMNS // GROUP) * GROUP
    block = (row[:, None] * columns + first[None, :]) // BLOCKSIZE
    scale = tl.load(absmax_ptr + block, in_row[:, None] & (first < columns)[None, :], 0)
    product = tl.reshape(value, [ROWS, COLUMNS // GROUP, GROUP]) * scale[:, :, None]
    return rounded(tl.reshape(product, [ROWS, COLUMNS]), DTYPE, UPCAST)


@triton.jit
def absmax_kernel(absmax_ptr, nested_ptr, code_ptr, offset_ptr, out_ptr, blocks, BLOCK: tl.constexpr):
    """out [blocks] float32 = code[absmax] · nested_absmax, then + offset. To be launched without fusion into FMAs: the
    product is rounded as well."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < blocks
    code = tl.load(code_ptr + tl.load(absmax_ptr + offs, inside, 0).to(tl.int32))
    product = code * tl.load(nested_ptr + offs // _NESTED, inside, 0)
    tl.store(out_ptr + offs, product + tl.load(offset_ptr), inside)


@triton.jit
def dequantize_kernel(
    packed_ptr, absmax_ptr, out_ptr, elements, BLOCK: tl.constexpr, BLOCKSIZE: tl.constexpr, DTYPE: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """out [elements]: W, flat."""
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    pair = begin // 2 + tl.arange(0, BLOCK // 2)
    byte = tl.load(packed_ptr + pair, 2 * pair < elements, 0)
    index = tl.reshape(tl.join(byte >> 4, byte & 15), [BLOCK])
    offs = begin + tl.arange(0, BLOCK)
    inside = offs < elements
    scale = tl.load(absmax_ptr + offs // BLOCKSIZE, inside, 0)
    value = tl.gather(code_table(), index.to(tl.int32), 0) * scale
    tl.store(out_ptr + offs, rounded(value, DTYPE, UPCAST), inside)
