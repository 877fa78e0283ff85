"""`route` on GPU: the Triton kernels of both passes. Formulas: reference.py.

A program takes tiles of BLOCK_T tokens with all experts: logits by one product, then rows of [BLOCK_T, BLOCK_E]. The
forward reads x once and writes nothing of size T · E; the backward makes the logits again, writes their gradients, and
multiplies these by the gate and by x. What is summed over tokens is summed per program, and those sums in the order of
the programs: no atomics, the same bits on every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton_common import dot


@triton.jit
def tile_of_tokens(modality_ptr, valid_ptr, tile, num_tokens, num_modalities, BLOCK_T: tl.constexpr):
    """The tile's tokens, which of them exist, and their modalities: −1 where they are not to be routed."""
    offs_t = tile.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    in_t = offs_t < num_tokens
    m = tl.zeros([BLOCK_T], tl.int32)
    if modality_ptr is not None:
        wide = tl.load(modality_ptr + offs_t, in_t, -1).to(tl.int64)
        m = tl.where((wide >= 0) & (wide < num_modalities), wide, -1).to(tl.int32)
    if valid_ptr is not None:
        m = tl.where(tl.load(valid_ptr + offs_t, in_t, 0) != 0, m, -1)
    return offs_t, in_t, tl.where(in_t, m, -1)


@triton.jit
def choices_of(allowed_ptr, m, num_experts, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr):
    """bool [BLOCK_T, BLOCK_E]: the experts that each token may use; none if it is not to be routed."""
    offs_e = tl.arange(0, BLOCK_E)
    open_to = (m >= 0)[:, None] & (offs_e < num_experts)[None, :]
    if allowed_ptr is not None:
        open_to = open_to & (tl.load(allowed_ptr + m[:, None] * num_experts + offs_e[None, :], open_to, 0) != 0)
    return open_to


@triton.jit
def logits_of(
    x_ptr, gate_ptr, offs_t, read, num_experts, width, x_stride, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr, MIXED: tl.constexpr, UPCAST: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    offs_e = tl.arange(0, BLOCK_E)
    acc = tl.zeros([BLOCK_T, BLOCK_E], WIDE)
    for d in range(0, width, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        in_d = offs_d < width
        x = tl.load(x_ptr + offs_t[:, None] * x_stride + offs_d[None, :], read[:, None] & in_d[None, :], 0)
        gate = tl.load(gate_ptr + offs_e[None, :] * width + offs_d[:, None],
                       (offs_e < num_experts)[None, :] & in_d[:, None], 0)  # fmt: skip
        acc = dot(x.to(WIDE) if MIXED else x, gate, acc, "ieee", UPCAST)
    return acc


@triton.jit
def log_sigmoid(x):
    return tl.minimum(x, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def softmax_parts(u, choices):
    """Of each row: the highest of its choices (0 without any), powers e^(u − top) of the choices, and their sum."""
    top = tl.max(tl.where(choices, u, -float("inf")), 1)
    top = tl.where(tl.max(choices.to(tl.int32), 1) > 0, top, 0.0)
    power = tl.where(choices, tl.exp(u - top[:, None]), 0.0)
    return top, power, tl.sum(power, 1)


@triton.jit
def scores_of(logits, choices, SIGMOID: tl.constexpr):
    """u, of which p̄ is the softmax; u − top, p̄ and log Σ e^(u − top); lse of the logits and their softmax."""
    top, power, total = softmax_parts(logits, choices)
    inverse = 1.0 / tl.where(total == 0, 1.0, total)
    lse, softmax = top + tl.log(tl.where(total == 0, 1.0, total)), power * inverse[:, None]
    u, p = logits, softmax
    if SIGMOID:
        u = log_sigmoid(logits)
        top, power, total = softmax_parts(u, choices)
        p = power / tl.where(total == 0, 1.0, total)[:, None]
    return u, u - top[:, None], p, tl.log(tl.where(total == 0, 1.0, total)), lse, softmax


@triton.jit
def entropy_of(below, p, log_total):
    return log_total - tl.sum(tl.where(p > 0, p * below, 0.0), 1)


@triton.jit
def rank_choices(key, choices, slots, num_experts, BLOCK_E: tl.constexpr):
    """The slot of each choice in the order of the keys, ties to the lower expert; `slots` where it gets none."""
    offs_e = tl.arange(0, BLOCK_E)[None, :]
    key = tl.where(key == key, key, float("inf"))  # a NaN comes first: then all weights of the token are NaN
    rank = choices.to(tl.int32) * 0 + slots
    left = choices
    for slot in range(tl.minimum(slots, num_experts)):
        best = tl.max(tl.where(left, key, -float("inf")), 1)
        place = tl.min(tl.where(left & (key == best[:, None]), offs_e, BLOCK_E), 1)
        here = left & (offs_e == place[:, None])
        rank = tl.where(here, slot, rank)
        left = left & (offs_e != place[:, None])
    return rank


@triton.jit(do_not_specialize=["num_tokens", "tiles_each"])
def route_kernel(
    x_ptr, gate_ptr, modality_ptr, valid_ptr, allowed_ptr, bias_ptr, weights_ptr, experts_ptr, sums_ptr, totals_ptr,
    num_tokens, num_experts, num_modalities, slots, width, x_stride, tiles_each, SCORE: tl.constexpr,
    DIVIDES: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    MIXED: tl.constexpr, UPCAST: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Weights and experts of `tiles_each` tiles, and their part of the sums [programs, M, 3, E] (slots, Σ p̄, Σ weight)
    and totals [programs, M, 3] (tokens, Σ lse², Σ H), which were 0."""
    program = tl.program_id(0)
    offs_e = tl.arange(0, BLOCK_E)
    for n in range(tiles_each):
        tile = program * tiles_each + n
        offs_t, in_t, m = tile_of_tokens(modality_ptr, valid_ptr, tile, num_tokens, num_modalities, BLOCK_T)
        choices = choices_of(allowed_ptr, m, num_experts, BLOCK_T, BLOCK_E)
        count = tl.sum(choices.to(tl.int32), 1)
        routed = count > 0
        logits = logits_of(x_ptr, gate_ptr, offs_t, routed, num_experts, width, x_stride, BLOCK_T, BLOCK_E, BLOCK_D,
                           MIXED, UPCAST, WIDE)  # fmt: skip
        u, below, p, log_total, lse, softmax = scores_of(logits, choices, SCORE == "sigmoid")
        key = logits
        if bias_ptr is not None:
            if SCORE == "softmax":
                key = p
            if SCORE == "sigmoid":
                key = tl.sigmoid(logits)
            key += tl.load(bias_ptr + m[:, None] * num_experts + offs_e[None, :], choices, 0.0)
        rank = rank_choices(key, choices, slots, num_experts, BLOCK_E)
        chosen = choices & (rank < slots)
        weight = p
        if DIVIDES:
            _, power, total = softmax_parts(u, chosen)
            weight = power / tl.where(total == 0, 1.0, total)[:, None]
        elif SCORE == "sigmoid":
            weight = tl.sigmoid(logits)
        # A NaN among the logits is one of p.
        nan = tl.sum(tl.where(choices, p - p, 0.0), 1)
        weight = tl.where(chosen, weight + nan[:, None], 0.0)
        to = offs_t[:, None] * slots
        tl.store(weights_ptr + to + rank, weight, chosen)
        tl.store(experts_ptr + to + rank, tl.where(chosen, offs_e[None, :], 0), chosen)
        for slot in range(0, slots, BLOCK_K):
            offs_k = slot + tl.arange(0, BLOCK_K)
            unused = in_t[:, None] & (offs_k[None, :] >= count[:, None]) & (offs_k < slots)[None, :]
            tl.store(weights_ptr + to + offs_k[None, :], tl.zeros([BLOCK_T, BLOCK_K], WIDE), unused)
            tl.store(experts_ptr + to + offs_k[None, :], tl.full([BLOCK_T, BLOCK_K], -1, tl.int32), unused)
        entropy = entropy_of(below, p, log_total)
        for modality in range(num_modalities):
            here = routed & (m == modality)
            tokens = tl.sum(here.to(tl.int32), 0)
            if tokens > 0:
                row = program.to(tl.int64) * num_modalities + modality
                at, in_e = sums_ptr + row * 3 * num_experts + offs_e, offs_e < num_experts
                named = here[:, None] & chosen
                taken = tl.sum(named.to(tl.int32), 0).to(WIDE)
                share = tl.sum(tl.where(here[:, None] & choices, p, 0.0), 0)
                given = tl.sum(tl.where(named, weight, 0.0), 0)
                tl.store(at, tl.load(at, in_e, 0.0) + taken, in_e)
                tl.store(at + num_experts, tl.load(at + num_experts, in_e, 0.0) + share, in_e)
                tl.store(at + 2 * num_experts, tl.load(at + 2 * num_experts, in_e, 0.0) + given, in_e)
                total_at = totals_ptr + row * 3
                squares = tl.sum(tl.where(here, lse * lse, 0.0), 0)
                unsure = tl.sum(tl.where(here, entropy, 0.0), 0)
                tl.store(total_at, tl.load(total_at) + tokens.to(WIDE))
                tl.store(total_at + 1, tl.load(total_at + 1) + squares)
                tl.store(total_at + 2, tl.load(total_at + 2) + unsure)
        tl.debug_barrier()  # what one thread has added to, another may read in the next tile


@triton.jit
def column_sums(ptr, programs, stride, offs_e, in_e, BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr):
    """float64 [BLOCK_E]: a vector of each program, `stride` apart, added up."""
    acc = tl.zeros([BLOCK_E], tl.float64)
    for first in range(0, programs, BLOCK_P):
        offs_p = first + tl.arange(0, BLOCK_P)
        at = ptr + offs_p.to(tl.int64)[:, None] * stride + offs_e[None, :]
        acc += tl.sum(tl.load(at, (offs_p < programs)[:, None] & in_e[None, :], 0.0).to(tl.float64), 0)
    return acc


@triton.jit(do_not_specialize=["programs"])
def finish_kernel(
    sums_ptr, totals_ptr, allowed_ptr, stats_ptr, losses_ptr, programs, num_modalities, num_experts,
    BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Statistics and losses of one modality, from the sums of all programs."""
    m = tl.program_id(0).to(tl.int64)
    offs_e = tl.arange(0, BLOCK_E)
    in_e = offs_e < num_experts
    at, stride = sums_ptr + m * 3 * num_experts, tl.cast(num_modalities, tl.int64) * 3 * num_experts
    taken = column_sums(at, programs, stride, offs_e, in_e, BLOCK_P, BLOCK_E)
    share = column_sums(at + num_experts, programs, stride, offs_e, in_e, BLOCK_P, BLOCK_E)
    given = column_sums(at + 2 * num_experts, programs, stride, offs_e, in_e, BLOCK_P, BLOCK_E)
    offs_4 = tl.arange(0, 4)
    totals = column_sums(totals_ptr + m * 3, programs, num_modalities * 3, offs_4, offs_4 < 3, BLOCK_P, 4)
    tokens = tl.sum(tl.where(offs_4 == 0, totals, 0.0), 0)
    squares = tl.sum(tl.where(offs_4 == 1, totals, 0.0), 0)
    unsure = tl.sum(tl.where(offs_4 == 2, totals, 0.0), 0)
    to = stats_ptr + (m * num_experts + offs_e) * 3
    tl.store(to, taken, in_e)
    tl.store(to + 1, share, in_e)
    tl.store(to + 2, given, in_e)
    num_choices = tl.cast(num_experts, tl.float64)
    if allowed_ptr is not None:
        num_choices = tl.sum((tl.load(allowed_ptr + m * num_experts + offs_e, in_e, 0) != 0).to(tl.float64), 0)
    per_token = 1.0 / tl.where(tokens > 0, tokens, 1.0)
    slots = tl.sum(taken, 0)
    mean = share * per_token
    balance = num_choices * tl.sum(taken * mean, 0) / tl.where(slots > 0, slots, 1.0)
    spread = -tl.sum(tl.where(mean == 0, 0.0, mean * tl.log(tl.where(mean == 0, 1.0, mean))), 0)
    tl.store(losses_ptr + m, balance)
    tl.store(losses_ptr + num_modalities + m, squares * per_token)
    tl.store(losses_ptr + 2 * num_modalities + m, unsure * per_token)
    tl.store(losses_ptr + 3 * num_modalities + m, spread)


@triton.jit
def slopes_kernel(
    grad_losses_ptr, stats_ptr, allowed_ptr, dp_ptr, factors_ptr, num_modalities, num_experts, slots,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """What the losses ask of one modality's tokens: dp [M, E] of p̄ (balance, global entropy), factors [M, 2] (2 · z and
    local entropy, each over the number of tokens)."""
    m = tl.program_id(0).to(tl.int64)
    offs_e = tl.arange(0, BLOCK_E)
    in_e = offs_e < num_experts
    at = stats_ptr + (m * num_experts + offs_e) * 3
    taken, share = tl.load(at, in_e, 0.0).to(tl.float64), tl.load(at + 1, in_e, 0.0).to(tl.float64)
    num_choices = num_experts
    if allowed_ptr is not None:
        num_choices = tl.sum((tl.load(allowed_ptr + m * num_experts + offs_e, in_e, 0) != 0).to(tl.int32), 0)
    total = tl.sum(taken, 0)
    used = tl.minimum(slots, num_choices)
    per_token = tl.where(total > 0, used / tl.where(total > 0, total, 1.0), 0.0)
    mean = share * per_token
    fraction = taken / tl.where(total > 0, total, 1.0)
    balance, z = tl.load(grad_losses_ptr + m), tl.load(grad_losses_ptr + num_modalities + m)
    local = tl.load(grad_losses_ptr + 2 * num_modalities + m)
    spread = tl.load(grad_losses_ptr + 3 * num_modalities + m)
    # Where the mean underflows to 0 so does every p̄ of the column, and with it the gradient.
    dentropy = tl.where(mean == 0, 0.0, -tl.log(tl.where(mean == 0, 1.0, mean)) - 1.0)
    tl.store(
        dp_ptr + m * num_experts + offs_e, (balance * num_choices * fraction + spread * dentropy) * per_token, in_e
    )
    tl.store(factors_ptr + 2 * m, 2.0 * z * per_token)
    tl.store(factors_ptr + 2 * m + 1, local * per_token)


@triton.jit(do_not_specialize=["num_tokens"])
def route_backward_kernel(
    grad_weights_ptr, dp_ptr, factors_ptr, x_ptr, gate_ptr, modality_ptr, valid_ptr, allowed_ptr, weights_ptr,
    experts_ptr, dlogits_ptr, num_tokens, num_experts, num_modalities, slots, width, x_stride,
    SCORE: tl.constexpr, DIVIDES: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
    MIXED: tl.constexpr, UPCAST: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """dl of a tile [T, E], 0 where there is no choice."""
    offs_e = tl.arange(0, BLOCK_E)
    offs_t, in_t, m = tile_of_tokens(modality_ptr, valid_ptr, tl.program_id(0), num_tokens, num_modalities, BLOCK_T)
    choices = choices_of(allowed_ptr, m, num_experts, BLOCK_T, BLOCK_E)
    routed = tl.max(choices.to(tl.int32), 1) > 0
    logits = logits_of(x_ptr, gate_ptr, offs_t, routed, num_experts, width, x_stride, BLOCK_T, BLOCK_E, BLOCK_D, MIXED,
                       UPCAST, WIDE)  # fmt: skip
    _, below, p, log_total, lse, softmax = scores_of(logits, choices, SCORE == "sigmoid")
    dp = tl.zeros([BLOCK_T, BLOCK_E], WIDE)
    du = tl.zeros([BLOCK_T, BLOCK_E], WIDE)
    dl = tl.zeros([BLOCK_T, BLOCK_E], WIDE)
    if dp_ptr is not None:
        dp += tl.load(dp_ptr + m[:, None] * num_experts + offs_e[None, :], choices, 0.0)
        z, local = tl.load(factors_ptr + 2 * m, routed, 0.0), tl.load(factors_ptr + 2 * m + 1, routed, 0.0)
        entropy = entropy_of(below, p, log_total)
        surprise = p * (below - log_total[:, None] + entropy[:, None])
        du -= local[:, None] * tl.where(p == 0, 0.0, surprise)
        dl += (z * lse)[:, None] * softmax
    if grad_weights_ptr is not None:
        grad = tl.zeros([BLOCK_T, BLOCK_E], WIDE)
        weight = tl.zeros([BLOCK_T, BLOCK_E], WIDE)
        for slot in range(slots):
            at = offs_t * slots + slot
            here = tl.load(experts_ptr + at, in_t, -1)[:, None] == offs_e[None, :]
            grad = tl.where(here, tl.load(grad_weights_ptr + at, in_t, 0.0)[:, None], grad)
            if DIVIDES:
                weight = tl.where(here, tl.load(weights_ptr + at, in_t, 0.0)[:, None], weight)
        if DIVIDES:
            du += weight * (grad - tl.sum(weight * grad, 1)[:, None])
        elif SCORE == "sigmoid":
            dl += grad * tl.sigmoid(logits) * tl.sigmoid(-logits)
        else:
            dp += grad
    du += p * (dp - tl.sum(tl.where(choices, p * dp, 0.0), 1)[:, None])
    dl += du * tl.sigmoid(-logits) if SCORE == "sigmoid" else du
    dl = tl.where(choices, dl, 0.0)
    tl.store(dlogits_ptr + offs_t[:, None] * num_experts + offs_e[None, :], dl,
             in_t[:, None] & (offs_e < num_experts)[None, :])  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens"])
def token_gradient_kernel(
    dlogits_ptr, gate_ptr, dx_ptr, num_tokens, num_experts, width, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr, UPCAST: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """dx = dl · gate."""
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_t, in_d = offs_t < num_tokens, offs_d < width
    acc = tl.zeros([BLOCK_T, BLOCK_D], WIDE)
    for e in range(0, num_experts, BLOCK_E):
        offs_e = e + tl.arange(0, BLOCK_E)
        in_e = offs_e < num_experts
        dl = tl.load(dlogits_ptr + offs_t[:, None] * num_experts + offs_e[None, :], in_t[:, None] & in_e[None, :], 0.0)
        gate = tl.load(gate_ptr + offs_e[:, None] * width + offs_d[None, :], in_e[:, None] & in_d[None, :], 0).to(WIDE)
        # What is no number makes NaNs of the logits of those who may use the expert, and nothing of the others'.
        gate = tl.where(tl.abs(gate) < float("inf"), gate, 0.0)
        acc = dot(dl, gate, acc, "ieee", UPCAST)
    tl.store(dx_ptr + offs_t[:, None] * width + offs_d[None, :], acc, in_t[:, None] & in_d[None, :])


@triton.jit(do_not_specialize=["num_tokens", "tiles_each"])
def gate_sums_kernel(
    dlogits_ptr, x_ptr, modality_ptr, valid_ptr, out_ptr, num_tokens, num_experts, num_modalities, width, x_stride,
    tiles_each, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """A block of dlᵀ x over `tiles_each` tiles, to [splits, E, d]."""
    split = tl.program_id(2)
    offs_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    offs_e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    in_e, in_d = offs_e < num_experts, offs_d < width
    acc = tl.zeros([BLOCK_E, BLOCK_D], WIDE)
    for n in range(tiles_each):
        tile = split * tiles_each + n
        offs_t, in_t, m = tile_of_tokens(modality_ptr, valid_ptr, tile, num_tokens, num_modalities, BLOCK_T)
        dl = tl.load(dlogits_ptr + offs_t[None, :] * num_experts + offs_e[:, None], in_e[:, None] & in_t[None, :], 0.0)
        x = tl.load(x_ptr + offs_t[:, None] * x_stride + offs_d[None, :], (m >= 0)[:, None] & in_d[None, :], 0).to(WIDE)
        # As with the gate: a token that is no number has NaNs in dl for all that it may use.
        x = tl.where(tl.abs(x) < float("inf"), x, 0.0)
        acc = dot(dl, x, acc, "ieee", UPCAST)
    to = out_ptr + (split.to(tl.int64) * num_experts + offs_e[:, None]) * width + offs_d[None, :]
    tl.store(to, acc, in_e[:, None] & in_d[None, :])
