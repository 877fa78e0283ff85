"""`mixture_of_experts` on GPU: the Triton kernels of the forward, and what the backward shares with them.

    h = x W_inᵀ + b_in        a = act(h)        y = a W_outᵀ + b_out        out_g = Σ_slots weight · y

A program takes BLOCK_M pairs of one expert, whose tokens it gathers as it loads them: no copy of x is made. Narrow
tokens pass the whole network in one kernel, which reads x once and writes y, 2 · pairs · width elements, and reads the
weights from cache. Of wider ones, whose outputs do not fit the registers, a is written and read between two kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton_common import dot

SQRT_HALF = tl.constexpr(0.70710678118654752440)
DENSITY = tl.constexpr(0.39894228040143267794)  # 1 / √(2π)


@triton.jit
def activated(h, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        return h * tl.sigmoid(h)
    if ACTIVATION == "gelu":
        return 0.5 * h * (1.0 + tl.erf(h * SQRT_HALF))
    if ACTIVATION == "relu":
        return tl.where(h > 0, h, tl.where(h == h, 0.0, h))
    if ACTIVATION == "relu2":
        return tl.where(h > 0, h * h, tl.where(h == h, 0.0, h))
    return h


@triton.jit
def slope_of(h, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        s = tl.sigmoid(h)
        return s * (1.0 + h * (1.0 - s))
    if ACTIVATION == "gelu":
        return 0.5 * (1.0 + tl.erf(h * SQRT_HALF)) + h * DENSITY * tl.exp(-0.5 * h * h)
    one = tl.full(h.shape, 1.0, h.dtype)
    if ACTIVATION == "relu":
        return tl.where(h > 0, one, 0.0)
    if ACTIVATION == "relu2":
        return tl.where(h > 0, 2.0 * h, 0.0)
    return one


@triton.jit
def find_tile(starts_ptr, program, tiles, column, num_experts, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr):
    """The expert of a program, the first of its pairs and the end of the expert's; no pairs for programs left over.

    Experts are the columns from `column` on of the plan, whose starts are `tiles` apart.
    """
    offs_e = tl.arange(0, BLOCK_E)
    in_e = offs_e < num_experts
    at = starts_ptr + (column + offs_e).to(tl.int64) * tiles
    begin, end = tl.load(at, in_e, 0), tl.load(at + tiles, in_e, 0)
    blocks = (end - begin + BLOCK_M - 1) // BLOCK_M
    last = tl.cumsum(blocks, 0)
    mine = in_e & (last - blocks <= program) & (program < last)
    first = tl.sum(tl.where(mine, begin + (program - (last - blocks)) * BLOCK_M, 0), 0)
    return tl.sum(tl.where(mine, offs_e, 0), 0).to(tl.int64), first, tl.sum(tl.where(mine, end, 0), 0)


@triton.jit
def up_product(
    x_ptr, token, read, w_ptr, b_ptr, offs_f, in_f, width, x_stride, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Tokens times some rows of a matrix, and the rows' biases."""
    acc = tl.zeros([BLOCK_M, BLOCK_F], WIDE)
    for d in range(0, width, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        in_d = offs_d < width
        x = tl.load(x_ptr + token[:, None] * x_stride + offs_d[None, :], read[:, None] & in_d[None, :], 0)
        w = tl.load(w_ptr + offs_f[None, :] * width + offs_d[:, None], in_f[None, :] & in_d[:, None], 0)
        acc = dot(x, w, acc, PRECISION, UPCAST)
    if b_ptr is not None:
        acc += tl.load(b_ptr + offs_f, in_f, 0).to(WIDE)[None, :]
    return acc


@triton.jit
def store_rows(ptr, row, value, offs_f, mask, width):
    tl.store(ptr + row[:, None] * width + offs_f[None, :], value, mask)


@triton.jit(do_not_specialize=["tiles"])
def network_kernel(
    x_ptr, w_in_ptr, w_out_ptr, b_in_ptr, b_out_ptr, tokens_ptr, starts_ptr, y_ptr, hidden_ptr, tiles, column,
    num_experts, width, hidden_width, x_stride, ACTIVATION: tl.constexpr, GATED: tl.constexpr, BY_TOKEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """y [pairs, width] of a tile, and h if it is to be kept, BY_TOKEN or by pair. BLOCK_D holds the width."""
    e, first, end = find_tile(starts_ptr, tl.program_id(0), tiles, column, num_experts, BLOCK_E, BLOCK_M)
    if first >= end:
        return
    pair, offs_d = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    read, in_d = pair < end, offs_d < width
    token = tl.load(tokens_ptr + pair, read, 0)
    rows = 2 * hidden_width if GATED else hidden_width
    w_in_ptr += e * rows * width
    w_out_ptr += e * width * hidden_width
    x = tl.load(x_ptr + token[:, None] * x_stride + offs_d[None, :], read[:, None] & in_d[None, :], 0)
    kept = token if BY_TOKEN else pair
    acc = tl.zeros([BLOCK_M, BLOCK_D], WIDE)
    for f in range(0, hidden_width, BLOCK_F):
        offs_f = f + tl.arange(0, BLOCK_F)
        in_f = offs_f < hidden_width
        inside = in_f[None, :] & in_d[:, None]
        at = offs_f[None, :] * width + offs_d[:, None]
        h = dot(x, tl.load(w_in_ptr + at, inside, 0), tl.zeros([BLOCK_M, BLOCK_F], WIDE), PRECISION, UPCAST)
        if b_in_ptr is not None:
            h += tl.load(b_in_ptr + e * rows + offs_f, in_f, 0).to(WIDE)[None, :]
        if hidden_ptr is not None:
            store_rows(hidden_ptr, kept, h, offs_f, read[:, None] & in_f[None, :], rows)
        a = activated(h, ACTIVATION)
        if GATED:
            up = dot(x, tl.load(w_in_ptr + hidden_width * width + at, inside, 0), tl.zeros([BLOCK_M, BLOCK_F], WIDE),
                     PRECISION, UPCAST)  # fmt: skip
            if b_in_ptr is not None:
                up += tl.load(b_in_ptr + e * rows + hidden_width + offs_f, in_f, 0).to(WIDE)[None, :]
            if hidden_ptr is not None:
                store_rows(hidden_ptr, kept, up, hidden_width + offs_f, read[:, None] & in_f[None, :], rows)
            a *= up
        w = tl.load(w_out_ptr + offs_d[None, :] * hidden_width + offs_f[:, None], in_d[None, :] & in_f[:, None], 0)
        acc = dot(a.to(x.dtype), w, acc, PRECISION, UPCAST)
    if b_out_ptr is not None:
        acc += tl.load(b_out_ptr + e * width + offs_d, in_d, 0).to(WIDE)[None, :]
    store_rows(y_ptr, pair, acc, offs_d, read[:, None] & in_d[None, :], width)


@triton.jit(do_not_specialize=["tiles"])
def up_kernel(
    x_ptr, w_in_ptr, b_in_ptr, tokens_ptr, starts_ptr, activated_ptr, hidden_ptr, tiles, column, num_experts, width,
    hidden_width, x_stride, ACTIVATION: tl.constexpr, GATED: tl.constexpr, BY_TOKEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Some columns of a [pairs, hidden width], and of h if it is to be kept."""
    e, first, end = find_tile(starts_ptr, tl.program_id(0), tiles, column, num_experts, BLOCK_E, BLOCK_M)
    if first >= end:
        return
    pair, offs_f = first + tl.arange(0, BLOCK_M), tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    read, in_f = pair < end, offs_f < hidden_width
    inside = read[:, None] & in_f[None, :]
    token = tl.load(tokens_ptr + pair, read, 0)
    rows = 2 * hidden_width if GATED else hidden_width
    kept = token if BY_TOKEN else pair
    b = None if b_in_ptr is None else b_in_ptr + e * rows
    h = up_product(x_ptr, token, read, w_in_ptr + e * rows * width, b, offs_f, in_f, width, x_stride, BLOCK_M, BLOCK_F,
                   BLOCK_D, PRECISION, UPCAST, WIDE)  # fmt: skip
    if hidden_ptr is not None:
        store_rows(hidden_ptr, kept, h, offs_f, inside, rows)
    a = activated(h, ACTIVATION)
    if GATED:
        b = None if b_in_ptr is None else b_in_ptr + e * rows + hidden_width
        up = up_product(x_ptr, token, read, w_in_ptr + (e * rows + hidden_width) * width, b, offs_f, in_f, width,
                        x_stride, BLOCK_M, BLOCK_F, BLOCK_D, PRECISION, UPCAST, WIDE)  # fmt: skip
        if hidden_ptr is not None:
            store_rows(hidden_ptr, kept, up, hidden_width + offs_f, inside, rows)
        a *= up
    store_rows(activated_ptr, pair, a, offs_f, inside, hidden_width)


@triton.jit(do_not_specialize=["tiles"])
def rows_kernel(
    rows_ptr, w_ptr, b_ptr, starts_ptr, out_ptr, tiles, column, num_experts, depth, width, w_depth_stride,
    w_width_stride, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Some columns of out [pairs, width] = rows [pairs, depth] times their expert's matrix, and biases: y = a W_outᵀ
    and dx = dh W_in."""
    e, first, end = find_tile(starts_ptr, tl.program_id(0), tiles, column, num_experts, BLOCK_E, BLOCK_M)
    if first >= end:
        return
    pair, offs_d = first + tl.arange(0, BLOCK_M), tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    read, in_d = pair < end, offs_d < width
    w_ptr += e * depth * width
    acc = tl.zeros([BLOCK_M, BLOCK_D], WIDE)
    for f in range(0, depth, BLOCK_F):
        offs_f = f + tl.arange(0, BLOCK_F)
        in_f = offs_f < depth
        row = tl.load(rows_ptr + pair[:, None] * depth + offs_f[None, :], read[:, None] & in_f[None, :], 0)
        w = tl.load(w_ptr + offs_d[None, :] * w_width_stride + offs_f[:, None] * w_depth_stride,
                    in_d[None, :] & in_f[:, None], 0)  # fmt: skip
        acc = dot(row, w, acc, PRECISION, UPCAST)
    if b_ptr is not None:
        acc += tl.load(b_ptr + e * width + offs_d, in_d, 0).to(WIDE)[None, :]
    store_rows(out_ptr, pair, acc, offs_d, read[:, None] & in_d[None, :], width)


@triton.jit(do_not_specialize=["num_tokens"])
def combine_kernel(
    y_ptr, slots_ptr, weights_ptr, shared_ptr, own_ptr, out_ptr, num_tokens, slots, width, BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """out [G, T, d]: a token's pairs in the order of its slots, each times its weight, then the shared expert's."""
    gate = tl.program_id(1).to(tl.int64)
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    in_t = offs_t < num_tokens
    row = gate * num_tokens + offs_t
    for d in range(0, width, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        in_d = offs_d < width
        acc = tl.zeros([BLOCK_T, BLOCK_D], WIDE)
        alive = offs_t < 0
        for slot in range(slots):
            pair = tl.load(slots_ptr + row * slots + slot, in_t, -1)
            named = pair >= 0
            alive = alive | named
            weight = tl.load(weights_ptr + row * slots + slot, named, 0.0)
            y = tl.load(y_ptr + pair[:, None] * width + offs_d[None, :], named[:, None] & in_d[None, :], 0.0)
            acc += weight[:, None] * y
        if shared_ptr is not None:
            pair = tl.load(shared_ptr + offs_t, alive, 0)
            y = tl.load(y_ptr + pair[:, None] * width + offs_d[None, :], alive[:, None] & in_d[None, :], 0.0)
            if own_ptr is not None:
                y *= tl.load(own_ptr + offs_t, alive, 0.0)[:, None]
            acc += y
        tl.store(out_ptr + row[:, None] * width + offs_d[None, :], acc, in_t[:, None] & in_d[None, :])
