"""InfoNCE: what the Triton kernels of both passes do with a tile of logits.

x_ij = sigma_i · kappa_j · (q_i · k_j) − bias_j      logits in units of log2, sigma_i = log2(e) · scale_i / ‖q_i‖
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton_common import dot

NOTHING = tl.constexpr(-1e30)  # a reference below all others; differences stay finite
LEFT_OUT = tl.constexpr(3.0e38)  # no product of embeddings whose logits are finite


@triton.jit
def load_tile(ptr, offs, read, offs_d, width, stride):
    return tl.load(ptr + offs[:, None] * stride + offs_d[None, :], read[:, None] & (offs_d < width)[None, :], 0)


@triton.jit
def dot_products(
    q_ptr, k_ptr, offs_m, offs_n, read_m, read_n, width, q_stride, k_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for d in range(0, width, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        q = load_tile(q_ptr, offs_m, read_m, offs_d, width, q_stride)
        k = load_tile(k_ptr, offs_n, read_n, offs_d, width, k_stride)
        acc = dot(q, tl.trans(k), acc, PRECISION, UPCAST)
    return acc


@triton.jit
def by_key(acc, kappa_ptr, bias_ptr, offs_n, in_n, HAS_KAPPA: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Dot products times kappa, and the biases."""
    if HAS_KAPPA:
        acc = acc * tl.load(kappa_ptr + offs_n, in_n, 1.0)[None, :]
    bias = tl.load(bias_ptr + offs_n, in_n, 0.0) if HAS_BIAS else tl.zeros_like(offs_n).to(tl.float32)
    return acc, bias


@triton.jit
def less(acc, sigma, rest, bias, ref, HAS_BIAS: tl.constexpr):
    """Logits less a reference, without rounding them at their own size: two fused multiply-adds. sigma + rest is
    sigma_i to twice its digits."""
    x = acc * rest[:, None] + (acc * sigma[:, None] - ref)
    return x - bias[None, :] if HAS_BIAS else x


@triton.jit
def leave_out(
    acc, offs_m, offs_n, read_m, read_n, in_m, in_n, target_ptr, query_ids_ptr, key_ids_ptr, listed_rows_ptr,
    listed_keys_ptr, tile_offsets_ptr, tile, HAS_IDS: tl.constexpr, HAS_EXCLUDE: tl.constexpr,
):  # fmt: skip
    """LEFT_OUT in the place of products that are no negatives: not read, the positive, of the row's id, listed. A mark
    in the products costs no registers of its own."""
    row, column = offs_m.to(tl.int32), offs_n.to(tl.int32)
    target = tl.load(target_ptr + offs_m, in_m, -1).to(tl.int32)
    acc = tl.where(read_m[:, None] & read_n[None, :] & (column[None, :] != target[:, None]), acc, LEFT_OUT)
    if HAS_IDS:
        query_ids = tl.load(query_ids_ptr + offs_m, in_m, -1)
        key_ids = tl.load(key_ids_ptr + offs_n, in_n, -2)
        acc = tl.where(query_ids[:, None] != key_ids[None, :], acc, LEFT_OUT)
    if HAS_EXCLUDE:
        first = tl.load(tile_offsets_ptr + tile)
        last = tl.load(tile_offsets_ptr + tile + 1)
        for e in range(first, last):
            listed_row = tl.load(listed_rows_ptr + e)
            listed_key = tl.load(listed_keys_ptr + e)
            acc = tl.where((row != listed_row)[:, None] | (column != listed_key)[None, :], acc, LEFT_OUT)
    return acc
