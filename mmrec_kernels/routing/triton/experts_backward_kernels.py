"""`mixture_of_experts` on GPU: the Triton kernels of the backward.

    dy = Σ_g c_g dout_g      dc_g = dout_g · y      da = dy W_out      dh = da act'(h)
    dW_out = dyᵀ a      db_out = Σ dy      dW_in = dhᵀ x      db_in = Σ dh      dx = dh W_in

As in SonicMoE (arXiv:2512.14080) neither gathered tokens nor y are kept: with one gate dc = Σ (dout W_out) a. h is read
where it was kept, or made again. Products of dW split an expert's pairs into a number of parts that shapes alone tell,
and these are added in order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton_common import dot
from .experts_kernels import activated, find_tile, slope_of, store_rows, up_product


@triton.jit
def upstream(
    grad_ptr, coefficients_ptr, used_ptr, pair, token, read, offs_d, in_d, gates, num_tokens, pairs, width,
    SCALED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """dy of some pairs and columns; without SCALED dout of the one gate, times nothing."""
    inside = read[:, None] & in_d[None, :]
    if not SCALED:
        return tl.load(grad_ptr + token[:, None] * width + offs_d[None, :], inside, 0).to(WIDE)
    acc = tl.zeros([BLOCK_M, BLOCK_D], WIDE)
    for gate in range(gates):
        at = tl.cast(gate, tl.int64) * pairs + pair
        used = read & (tl.load(used_ptr + at, read, 0) != 0)
        row = grad_ptr + (tl.cast(gate, tl.int64) * num_tokens + token)[:, None] * width + offs_d[None, :]
        c = tl.load(coefficients_ptr + at, used, 0.0)
        acc += c[:, None] * tl.load(row, used[:, None] & in_d[None, :], 0).to(WIDE)
    return acc


@triton.jit(do_not_specialize=["num_tokens", "tiles", "pairs"])
def hidden_gradient_kernel(
    grad_ptr, coefficients_ptr, used_ptr, x_ptr, w_in_ptr, w_out_ptr, b_in_ptr, tokens_ptr, starts_ptr, hidden_ptr,
    dh_ptr, activated_ptr, shares_ptr, tiles, column, num_experts, num_tokens, gates, pairs, width, hidden_width,
    x_stride, dh_stride, activated_stride, ACTIVATION: tl.constexpr, GATED: tl.constexpr, BY_TOKEN: tl.constexpr,
    SCALED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Some columns of dh and a of a tile of pairs; with one gate (not SCALED) their part of dc, [blocks of columns,
    pairs]."""
    e, first, end = find_tile(starts_ptr, tl.program_id(0), tiles, column, num_experts, BLOCK_E, BLOCK_M)
    if first >= end:
        return
    block = tl.program_id(1)
    pair, offs_f = first + tl.arange(0, BLOCK_M), block * BLOCK_F + tl.arange(0, BLOCK_F)
    read, in_f = pair < end, offs_f < hidden_width
    inside = read[:, None] & in_f[None, :]
    token = tl.load(tokens_ptr + pair, read, 0)
    rows = 2 * hidden_width if GATED else hidden_width
    up = tl.zeros([BLOCK_M, BLOCK_F], WIDE)
    if hidden_ptr is not None:
        kept = hidden_ptr + (token if BY_TOKEN else pair)[:, None] * rows + offs_f[None, :]
        h = tl.load(kept, inside, 0).to(WIDE)
        if GATED:
            up = tl.load(kept + hidden_width, inside, 0).to(WIDE)
    else:
        b = None if b_in_ptr is None else b_in_ptr + e * rows
        h = up_product(x_ptr, token, read, w_in_ptr + e * rows * width, b, offs_f, in_f, width, x_stride, BLOCK_M,
                       BLOCK_F, BLOCK_D, PRECISION, UPCAST, WIDE)  # fmt: skip
        if GATED:
            b = None if b_in_ptr is None else b_in_ptr + e * rows + hidden_width
            up = up_product(x_ptr, token, read, w_in_ptr + (e * rows + hidden_width) * width, b, offs_f, in_f, width,
                            x_stride, BLOCK_M, BLOCK_F, BLOCK_D, PRECISION, UPCAST, WIDE)  # fmt: skip
    da = tl.zeros([BLOCK_M, BLOCK_F], WIDE)
    for d in range(0, width, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        in_d = offs_d < width
        dy = upstream(grad_ptr, coefficients_ptr, used_ptr, pair, token, read, offs_d, in_d, gates, num_tokens, pairs,
                      width, SCALED, BLOCK_M, BLOCK_D, WIDE)  # fmt: skip
        w = tl.load(w_out_ptr + (e * width + offs_d[:, None]) * hidden_width + offs_f[None, :],
                    in_d[:, None] & in_f[None, :], 0)  # fmt: skip
        da = dot(dy.to(w.dtype), w, da, PRECISION, UPCAST)
    value = activated(h, ACTIVATION)
    a = value * up if GATED else value
    store_rows(activated_ptr, pair, a, offs_f, inside, activated_stride)
    if not SCALED:
        tl.store(shares_ptr + tl.cast(block, tl.int64) * pairs + pair, tl.sum(tl.where(inside, da * a, 0.0), 1), read)
        da *= tl.load(coefficients_ptr + pair, read, 0.0)[:, None]
    slope = slope_of(h, ACTIVATION)
    if GATED:
        store_rows(dh_ptr, pair, da * up * slope, offs_f, inside, dh_stride)
        store_rows(dh_ptr + hidden_width, pair, da * value, offs_f, inside, dh_stride)
    else:
        store_rows(dh_ptr, pair, da * slope, offs_f, inside, dh_stride)


@triton.jit(do_not_specialize=["num_tokens", "tiles", "pairs"])
def coefficient_gradient_kernel(
    grad_ptr, used_ptr, y_ptr, shares_ptr, b_out_ptr, tokens_ptr, starts_ptr, out_ptr, tiles, column, num_experts,
    num_tokens, gates, pairs, width, blocks, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """dc [G, pairs]: dout · y, or of one gate, without y, its parts and dout · b_out."""
    e, first, end = find_tile(starts_ptr, tl.program_id(0), tiles, column, num_experts, BLOCK_E, BLOCK_M)
    if first >= end:
        return
    pair = first + tl.arange(0, BLOCK_M)
    read = pair < end
    token = tl.load(tokens_ptr + pair, read, 0)
    for gate in range(gates):
        at = tl.cast(gate, tl.int64) * pairs + pair
        used = read & (tl.load(used_ptr + at, read, 0) != 0)
        acc = tl.zeros([BLOCK_M], WIDE)
        if y_ptr is None:
            for block in range(blocks):
                acc += tl.load(shares_ptr + tl.cast(block, tl.int64) * pairs + pair, read, 0.0)
        if y_ptr is not None or b_out_ptr is not None:
            for d in range(0, width, BLOCK_D):
                offs_d = d + tl.arange(0, BLOCK_D)
                in_d = offs_d < width
                row = grad_ptr + (tl.cast(gate, tl.int64) * num_tokens + token)[:, None] * width + offs_d[None, :]
                dout = tl.load(row, used[:, None] & in_d[None, :], 0).to(WIDE)
                if y_ptr is not None:
                    y = tl.load(y_ptr + pair[:, None] * width + offs_d[None, :], used[:, None] & in_d[None, :], 0.0)
                    acc += tl.sum(dout * y, 1)
                else:
                    acc += tl.sum(dout * tl.load(b_out_ptr + e * width + offs_d, in_d, 0).to(WIDE)[None, :], 1)
        tl.store(out_ptr + at, tl.where(used, acc, 0.0), read)


@triton.jit(do_not_specialize=["num_tokens", "tiles", "pairs", "splits"])
def outer_kernel(
    left_ptr, right_ptr, grad_ptr, coefficients_ptr, used_ptr, tokens_ptr, starts_ptr, out_ptr, bias_ptr, tiles, column,
    num_experts, num_tokens, gates, pairs, rows, width, left_stride, right_stride, splits, BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A block of leftᵀ right over a part of an expert's pairs, to [splits, experts, rows, width], and Σ left to
    [splits, experts, rows].

    dW_in: dh by pair, and x by token. dW_out (left_ptr None): dy, made from the gradients above, and a by pair.
    """
    part = tl.program_id(2).to(tl.int64)
    e, split = part % num_experts, part // num_experts
    begin = tl.load(starts_ptr + (column + e) * tiles)
    end = tl.load(starts_ptr + (column + e + 1) * tiles)
    each = ((end - begin + splits - 1) // splits + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    begin = tl.minimum(begin + split * each, end)
    end = tl.minimum(begin + each, end)
    offs_r, offs_c = (
        tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R),
        tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C),
    )
    in_r, in_c = offs_r < rows, offs_c < width
    acc = tl.zeros([BLOCK_R, BLOCK_C], WIDE)
    total = tl.zeros([BLOCK_R], WIDE)
    for n in range(0, (end - begin).to(tl.int32), BLOCK_M):
        pair = begin + n + tl.arange(0, BLOCK_M)
        read = pair < end
        token = tl.load(tokens_ptr + pair, read, 0)
        if left_ptr is None:
            right = tl.load(
                right_ptr + pair[:, None] * right_stride + offs_c[None, :], read[:, None] & in_c[None, :], 0
            )
            dy = upstream(grad_ptr, coefficients_ptr, used_ptr, pair, token, read, offs_r, in_r, gates, num_tokens,
                          pairs, rows, True, BLOCK_M, BLOCK_R, WIDE)  # fmt: skip
            total += tl.sum(dy, 0)
            left = tl.trans(dy.to(right.dtype))
        else:
            right = tl.load(
                right_ptr + token[:, None] * right_stride + offs_c[None, :], read[:, None] & in_c[None, :], 0
            )
            left = tl.load(left_ptr + pair[None, :] * left_stride + offs_r[:, None], read[None, :] & in_r[:, None], 0)
            total += tl.sum(left.to(WIDE), 1)
        acc = dot(left, right, acc, PRECISION, UPCAST)
    row = part * rows + offs_r
    tl.store(out_ptr + row[:, None] * width + offs_c[None, :], acc, in_r[:, None] & in_c[None, :])
    if bias_ptr is not None:
        if tl.program_id(1) == 0:
            tl.store(bias_ptr + row, total, in_r)


@triton.jit(do_not_specialize=["num_tokens"])
def token_sum_kernel(
    rows_ptr, leads_ptr, shared_ptr, slope_ptr, gate_ptr, out_ptr, num_tokens, gates, slots, width,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """dx [T, d]: a token's pairs, each once, in the order of the slots; the shared expert's; and what goes through its
    gate."""
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    in_t = offs_t < num_tokens
    for d in range(0, width, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        in_d = offs_d < width
        acc = tl.zeros([BLOCK_T, BLOCK_D], WIDE)
        for gate in range(gates):
            for slot in range(slots):
                at = (tl.cast(gate, tl.int64) * num_tokens + offs_t) * slots + slot
                pair = tl.load(leads_ptr + at, in_t, -1)
                inside = (pair >= 0)[:, None] & in_d[None, :]
                acc += tl.load(rows_ptr + pair[:, None] * width + offs_d[None, :], inside, 0.0)
        if shared_ptr is not None:
            pair = tl.load(shared_ptr + offs_t, in_t, -1)
            alive = pair >= 0
            inside = alive[:, None] & in_d[None, :]
            acc += tl.load(rows_ptr + pair[:, None] * width + offs_d[None, :], inside, 0.0)
            if slope_ptr is not None:
                through = tl.load(slope_ptr + offs_t, alive, 0.0)[:, None] * tl.load(gate_ptr + offs_d, in_d, 0).to(
                    WIDE
                )
                acc += tl.where(inside, through, 0.0)
        tl.store(out_ptr + offs_t[:, None] * width + offs_d[None, :], acc, in_t[:, None] & in_d[None, :])


@triton.jit(do_not_specialize=["num_tokens", "tiles_each"])
def weighted_sum_kernel(
    x_ptr, slope_ptr, shared_ptr, out_ptr, num_tokens, width, x_stride, tiles_each, BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Σ slope · x over the tokens with a slot of `tiles_each` tiles, to [splits, d]: the shared gate's gradient."""
    split = tl.program_id(1).to(tl.int64)
    offs_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_d = offs_d < width
    acc = tl.zeros([BLOCK_D], WIDE)
    for n in range(tiles_each):
        offs_t = (split * tiles_each + n) * BLOCK_T + tl.arange(0, BLOCK_T)
        alive = tl.load(shared_ptr + offs_t, offs_t < num_tokens, -1) >= 0
        x = tl.load(x_ptr + offs_t[:, None] * x_stride + offs_d[None, :], alive[:, None] & in_d[None, :], 0).to(WIDE)
        acc += tl.sum(tl.load(slope_ptr + offs_t, alive, 0.0)[:, None] * x, 0)
    tl.store(out_ptr + split * width + offs_d, acc, in_d)
