"""Which tokens each expert has, on GPU: the distinct (expert, token) pairs that slots name, by expert, then by token.

Every tile of tokens counts its pairs per expert; the counts of all tiles, expert by expert, added up, say where the
pairs of each tile and expert begin; within a tile a running sum ranks them. No atomics, no sort, nothing read back.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def expert_named(ids_ptr, at, in_t, num_experts):
    """The expert of a slot of each token, −1 where there is none."""
    expert = tl.load(ids_ptr + at, in_t, -1).to(tl.int64)
    return tl.where((expert >= 0) & (expert < num_experts), expert, -1)


@triton.jit
def members_of(ids_ptr, offs_t, in_t, num_tokens, num_experts, gates, slots, BLOCK_T: tl.constexpr,
               BLOCK_E: tl.constexpr):  # fmt: skip
    """[BLOCK_T, BLOCK_E]: 1 where some slot of the token names the expert."""
    offs_e = tl.arange(0, BLOCK_E)[None, :]
    members = tl.zeros([BLOCK_T, BLOCK_E], tl.int32)
    for gate in range(gates):
        for slot in range(slots):
            at = (tl.cast(gate, tl.int64) * num_tokens + offs_t) * slots + slot
            expert = expert_named(ids_ptr, at, in_t, num_experts)
            members = tl.where(expert[:, None] == offs_e, 1, members)
    return members


@triton.jit(do_not_specialize=["num_tokens", "tiles"])
def count_kernel(
    ids_ptr, counts_ptr, num_tokens, num_experts, gates, slots, tiles, HAS_SHARED: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Pairs of a tile, [experts (+ 1), tiles]: of each expert, and of the shared one, which has every token with a
    slot."""
    tile = tl.program_id(0).to(tl.int64)
    offs_t, offs_e = tile * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_E)
    in_t = offs_t < num_tokens
    members = members_of(ids_ptr, offs_t, in_t, num_tokens, num_experts, gates, slots, BLOCK_T, BLOCK_E)
    tl.store(counts_ptr + offs_e.to(tl.int64) * tiles + tile, tl.sum(members, 0).to(tl.int64), offs_e < num_experts)
    if HAS_SHARED:
        alive = tl.sum(tl.max(members, 1), 0)
        tl.store(counts_ptr + tl.cast(num_experts, tl.int64) * tiles + tile, alive.to(tl.int64))


@triton.jit(do_not_specialize=["num_tokens", "tiles", "pairs"])
def place_kernel(
    ids_ptr, weights_ptr, own_ptr, starts_ptr, tokens_ptr, slots_ptr, shared_ptr, leads_ptr, coefficients_ptr, used_ptr,
    num_tokens, num_experts, gates, slots, tiles, pairs, HAS_SHARED: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The tile's pairs: their tokens [pairs]; the pair of each slot [G, T, k] and of the shared expert [T], −1 without.

    For the backward also `leads`, the pair of a slot unless one before it names it too, and what each gate gives to
    each pair [G, pairs], with `used`, whether it names it at all.
    """
    tile = tl.program_id(0).to(tl.int64)
    offs_t, offs_e = tile * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_E)
    in_t, in_e = offs_t < num_tokens, offs_e < num_experts
    members = members_of(ids_ptr, offs_t, in_t, num_tokens, num_experts, gates, slots, BLOCK_T, BLOCK_E)
    start = tl.load(starts_ptr + offs_e.to(tl.int64) * tiles + tile, in_e, 0)
    pair = start[None, :] + (tl.cumsum(members, 0) - members)
    named = members > 0
    tl.store(tokens_ptr + pair, tl.zeros([BLOCK_T, BLOCK_E], tl.int64) + offs_t[:, None], named)
    if HAS_SHARED:
        alive = tl.max(members, 1)
        shared = tl.load(starts_ptr + tl.cast(num_experts, tl.int64) * tiles + tile) + tl.cumsum(alive, 0) - alive
        tl.store(tokens_ptr + shared, offs_t, alive > 0)
        tl.store(shared_ptr + offs_t, tl.where(alive > 0, shared, -1), in_t)
    seen = tl.zeros([BLOCK_T, BLOCK_E], tl.int32)
    for gate in range(gates):
        given = tl.zeros([BLOCK_T, BLOCK_E], weights_ptr.dtype.element_ty)
        by_gate = tl.zeros([BLOCK_T, BLOCK_E], tl.int32)
        for slot in range(slots):
            at = (tl.cast(gate, tl.int64) * num_tokens + offs_t) * slots + slot
            here = expert_named(ids_ptr, at, in_t, num_experts)[:, None] == offs_e[None, :]
            found = tl.max(here.to(tl.int32), 1) > 0
            mine = tl.sum(tl.where(here, pair, 0), 1)
            tl.store(slots_ptr + at, tl.where(found, mine, -1), in_t)
            if leads_ptr is not None:
                first = tl.max(tl.where(here, 1 - seen, 0), 1) > 0
                tl.store(leads_ptr + at, tl.where(first, mine, -1), in_t)
                seen = tl.where(here, 1, seen)
                given += tl.where(here, tl.load(weights_ptr + at, in_t, 0.0)[:, None], 0.0)
                by_gate = tl.where(here, 1, by_gate)
        if leads_ptr is not None:
            to = tl.cast(gate, tl.int64) * pairs
            tl.store(coefficients_ptr + to + pair, given, named)
            tl.store(used_ptr + to + pair, by_gate, named)
            if HAS_SHARED:
                uses = tl.max(by_gate, 1)
                own = tl.where(uses > 0, 1.0, 0.0).to(weights_ptr.dtype.element_ty)
                if own_ptr is not None:
                    own *= tl.load(own_ptr + offs_t, in_t, 0.0)
                tl.store(coefficients_ptr + to + shared, own, alive > 0)
                tl.store(used_ptr + to + shared, uses, alive > 0)


@triton.jit(do_not_specialize=["num_tokens"])
def shared_gate_kernel(
    ids_ptr, x_ptr, gate_ptr, own_ptr, rest_ptr, num_tokens, num_experts, gates, slots, width, x_stride,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """σ(x · gate) and σ(−x · gate) of every token, 0 where it has no slot."""
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    in_t = offs_t < num_tokens
    alive = offs_t < 0
    for gate in range(gates):
        for slot in range(slots):
            at = (tl.cast(gate, tl.int64) * num_tokens + offs_t) * slots + slot
            alive = alive | (expert_named(ids_ptr, at, in_t, num_experts) >= 0)
    logit = tl.zeros([BLOCK_T], WIDE)
    for d in range(0, width, BLOCK_D):
        offs_d = d + tl.arange(0, BLOCK_D)
        in_d = offs_d < width
        x = tl.load(x_ptr + offs_t[:, None] * x_stride + offs_d[None, :], alive[:, None] & in_d[None, :], 0).to(WIDE)
        logit += tl.sum(x * tl.load(gate_ptr + offs_d, in_d, 0).to(WIDE)[None, :], 1)
    tl.store(own_ptr + offs_t, tl.where(alive, tl.sigmoid(logit), 0.0), in_t)
    tl.store(rest_ptr + offs_t, tl.where(alive, tl.sigmoid(-logit), 0.0), in_t)
