"""`mixture_of_experts` on GPU: the launchers of both passes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ...schemas import statistics_dtype
from ...triton_common import FUSED, interpreted, next_power_of_two, product_flags, wide_type
from .. import reference_experts
from ..reference_experts import GATED
from . import experts_backward_kernels as backward_kernels
from . import experts_kernels as kernels
from .plan import NETWORK_WIDTH, Plan, launch_sizes
from .router_pass import MOST_EXPERTS, rows_of

# Programs that the products of dW, and sums over tokens, are split into.
_PROGRAMS = 512


@dataclass
class _Network:
    """An expert or all experts, `w_in [E, rows, d]`, or the shared one with E = 1: what a kernel needs to find it."""

    w_in: Tensor
    w_out: Tensor
    b_in: Tensor | None
    b_out: Tensor | None
    shared: bool
    column: int  # of the plan

    @property
    def count(self) -> int:
        return self.w_in.shape[0]

    @property
    def block_e(self) -> int:
        return max(next_power_of_two(self.count), 16)

    @property
    def hidden_width(self) -> int:
        return self.w_out.shape[2]

    @property
    def rows(self) -> int:
        return self.w_in.shape[1]


def _networks(num_experts: int, *parameters: Tensor | None) -> list[_Network]:
    w_in, w_out, b_in, b_out, shared_w_in, shared_w_out = (None if p is None else p.contiguous() for p in parameters)
    assert w_in is not None and w_out is not None
    found = [_Network(w_in, w_out, b_in, b_out, False, 0)]
    if shared_w_in is not None and shared_w_out is not None:
        found.append(_Network(shared_w_in[None], shared_w_out[None], None, None, True, num_experts))
    return found


def _served_here(x: Tensor, ids: Tensor, *matrices: Tensor | None) -> bool:
    """Whether there is something to do, for no more experts than a tile of the plan holds."""
    sizes = (*x.shape, *ids.shape[:1], ids.shape[2], *(m.shape[-1] for m in matrices if m is not None))
    return all(sizes) and matrices[0] is not None and matrices[0].shape[0] <= MOST_EXPERTS


def _act(activation: str) -> dict[str, Any]:
    return {"ACTIVATION": GATED.get(activation, activation), "GATED": activation in GATED}


def _outputs(
    x: Tensor, plan: Plan, networks: list[_Network], activation: str, kept: tuple[Tensor | None, Tensor | None]
) -> Tensor:
    """y of all pairs, before weights, and the pre-activations to `kept` where these are given."""
    width = x.shape[1]
    y = x.new_empty((plan.pairs, width), dtype=statistics_dtype(x.dtype))
    flags = product_flags(x.dtype)
    for network in networks:
        pairs, hidden = plan.average(network.shared), kept[network.shared]
        place = (plan.tiles, network.column, network.count, width, network.hidden_width)
        more = {**flags, "BLOCK_E": network.block_e}
        if width <= NETWORK_WIDTH[x.dtype]:
            sizes = launch_sizes("network", pairs, width, x.dtype)
            kernels.network_kernel[(plan.blocks(sizes["BLOCK_M"], network.shared),)](
                x, network.w_in, network.w_out, network.b_in, network.b_out, plan.tokens, plan.starts, y, hidden,
                *place, x.stride(0), BY_TOKEN=network.shared, **_act(activation), **more, **sizes,
            )  # fmt: skip
            continue
        sizes = launch_sizes("up", pairs, width, x.dtype)
        blocks = plan.blocks(sizes["BLOCK_M"], network.shared)
        activated = x.new_empty((plan.pairs, network.hidden_width))
        kernels.up_kernel[(blocks, triton.cdiv(network.hidden_width, sizes["BLOCK_F"]))](
            x, network.w_in, network.b_in, plan.tokens, plan.starts, activated, hidden, *place, x.stride(0),
            BY_TOKEN=network.shared, **_act(activation), **more, **sizes,
        )  # fmt: skip
        _multiply_rows(activated, network.w_out, network.b_out, plan, network, y, (1, network.hidden_width))
    return y


def _multiply_rows(
    rows: Tensor, w: Tensor, b: Tensor | None, plan: Plan, network: _Network, out: Tensor, strides: tuple[int, int]
) -> None:
    """`rows [pairs, depth]` times each expert's matrix, whose strides along depth and width are given, to `out`."""
    sizes = launch_sizes("rows", plan.average(network.shared), out.shape[1], rows.dtype)
    grid = (plan.blocks(sizes["BLOCK_M"], network.shared), triton.cdiv(out.shape[1], sizes["BLOCK_D"]))
    kernels.rows_kernel[grid](
        rows, w, b, plan.starts, out, plan.tiles, network.column, network.count, rows.shape[1], out.shape[1], *strides,
        BLOCK_E=network.block_e, **product_flags(rows.dtype), **sizes,
    )  # fmt: skip


def _token_sizes(width: int) -> dict[str, int]:
    d = 16 if interpreted() else min(max(next_power_of_two(width), 16), 128)
    return {"BLOCK_T": 16 if interpreted() else 2048 // d, "BLOCK_D": d, **FUSED}


def forward(
    x: Tensor, weights: Tensor, experts: Tensor, w_in: Tensor, w_out: Tensor, b_in: Tensor | None, b_out: Tensor | None,
    shared_w_in: Tensor | None, shared_w_out: Tensor | None, shared_gate: Tensor | None, activation: str,
    save_hidden: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Launcher of `_experts_forward`."""
    if not _served_here(x, experts, w_in, w_out, shared_w_out):
        return reference_experts.forward(
            x, weights, experts, w_in, w_out, b_in, b_out, shared_w_in, shared_w_out, shared_gate, activation,
            save_hidden,
        )  # fmt: skip
    reference_experts.check_experts(experts, w_in.shape[0])
    gates, num_tokens, slots = experts.shape
    x, weights = rows_of(x), weights.contiguous()
    networks = _networks(w_in.shape[0], w_in, w_out, b_in, b_out, shared_w_in, shared_w_out)
    gate = None if shared_gate is None else shared_gate.contiguous()
    plan = Plan.of(x, weights, experts, w_in.shape[0], len(networks) > 1, gate, False)
    hidden, shared_hidden = None, None
    if save_hidden:
        hidden = x.new_empty((num_tokens * min(gates * slots, w_in.shape[0]), w_in.shape[1]))
        shared_hidden = None if shared_w_in is None else x.new_empty((num_tokens, shared_w_in.shape[0]))
    y = _outputs(x, plan, networks, activation, (hidden, shared_hidden))
    out = x.new_empty((gates, *x.shape))
    sizes = _token_sizes(x.shape[1])
    kernels.combine_kernel[(triton.cdiv(num_tokens, sizes["BLOCK_T"]), gates)](
        y, plan.pair_of, weights, plan.shared_pair, plan.own, out, num_tokens, slots, x.shape[1],
        WIDE=wide_type(x.dtype), **sizes,
    )  # fmt: skip
    nothing = x.new_empty(0)
    return out, nothing if hidden is None else hidden, nothing if shared_hidden is None else shared_hidden


def backward(
    grad_out: Tensor, x: Tensor, weights: Tensor, experts: Tensor, w_in: Tensor, w_out: Tensor, b_in: Tensor | None,
    b_out: Tensor | None, shared_w_in: Tensor | None, shared_w_out: Tensor | None, shared_gate: Tensor | None,
    hidden: Tensor | None, shared_hidden: Tensor | None, activation: str, needs: int,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Launcher of `_experts_backward`."""
    arguments = (x, weights, w_in, w_out, b_in, b_out, shared_w_in, shared_w_out, shared_gate)
    if not _served_here(x, experts, w_in, w_out, shared_w_out):
        return reference_experts.backward(
            grad_out, x, weights, experts, w_in, w_out, b_in, b_out, shared_w_in, shared_w_out, shared_gate, hidden,
            shared_hidden, activation, needs,
        )  # fmt: skip
    need = [value is not None and bool(needs >> i & 1) for i, value in enumerate(arguments)]
    return _Backward(grad_out.contiguous(), arguments, experts, activation, need).run((hidden, shared_hidden))


class _Backward:
    def __init__(
        self, grad: Tensor, arguments: tuple[Any, ...], ids: Tensor, activation: str, need: list[bool]
    ) -> None:
        x, weights, w_in, *_, shared_gate = arguments
        self.grad, self.arguments, self.activation, self.need = grad, arguments, activation, need
        self.x, self.gates = rows_of(x), ids.shape[0]
        self.gate = None if shared_gate is None else shared_gate.contiguous()
        self.networks = _networks(w_in.shape[0], *arguments[2:8])
        has_shared = len(self.networks) > 1
        self.plan = Plan.of(self.x, weights.contiguous(), ids, w_in.shape[0], has_shared, self.gate, True)
        self.dtype = statistics_dtype(x.dtype)
        # The gradient of the shared gate is one of its coefficient; so is a part of x's.
        self.need_shared = self.gate is not None and (need[0] or need[8])
        self.dc = weights.new_empty((self.gates, self.plan.pairs))

    def run(self, kept: tuple[Tensor | None, Tensor | None]) -> tuple[Tensor, ...]:
        plan, need, x = self.plan, self.need, self.x
        results = [x.new_empty(0)] * 9
        dx_rows = x.new_empty((plan.pairs, x.shape[1]), dtype=self.dtype) if need[0] else None
        y = None
        if self.gates > 1 and (need[1] or self.need_shared):
            y = _outputs(x, plan, self.networks, self.activation, (None, None))
        for network in self.networks:
            w_in, w_out, b_in, b_out = (6, 7, None, None) if network.shared else (2, 3, 4, 5)
            of_coefficients = self.need_shared if network.shared else need[1]
            dh, activated = self._hidden_gradients(network, kept[network.shared], y, of_coefficients)
            if dx_rows is not None:
                _multiply_rows(dh, network.w_in, None, plan, network, dx_rows, (x.shape[1], 1))
            for (weight, bias), rows, left in (((w_in, b_in), network.rows, dh), ((w_out, b_out), x.shape[1], None)):
                need_bias = bias is not None and need[bias]
                if not need[weight] and not need_bias:
                    continue
                right = x if left is not None else activated
                width = right.shape[1]
                dw, db = self._outer(network, left, right, rows, width, need_bias)
                if need[weight]:
                    like = self.arguments[weight]
                    results[weight] = dw.to(like.dtype).view(like.shape)
                if need_bias and bias is not None:
                    results[bias] = db.to(self.arguments[bias].dtype)
        if need[1]:
            pair = plan.pair_of.flatten(1)
            found = torch.where(pair >= 0, self.dc.gather(1, pair.clamp_min(0)), 0)
            results[1] = found.view(plan.pair_of.shape).to(self.arguments[1].dtype)
        slope = self._slope() if self.need_shared else None
        if dx_rows is not None:
            results[0] = self._token_sums(dx_rows, slope)
        if need[8] and slope is not None and self.gate is not None:
            results[8] = self._shared_gate(slope).to(self.gate.dtype)
        return tuple(results)

    @property
    def _coefficients(self) -> tuple[Tensor, Tensor]:
        assert self.plan.coefficients is not None and self.plan.used is not None
        return self.plan.coefficients, self.plan.used

    def _hidden_gradients(
        self, network: _Network, hidden: Tensor | None, y: Tensor | None, of_coefficients: bool
    ) -> tuple[Tensor, Tensor]:
        """dh and a of the network's pairs, and their dc if these are wanted."""
        plan, x = self.plan, self.x
        coefficients, used = self._coefficients
        pairs = plan.average(network.shared)
        sizes = launch_sizes("hidden", pairs, x.shape[1], x.dtype)
        blocks = triton.cdiv(network.hidden_width, sizes["BLOCK_F"])
        grid = (plan.blocks(sizes["BLOCK_M"], network.shared), blocks)
        dh = x.new_empty((plan.pairs, network.rows))
        activated = x.new_empty((plan.pairs, network.hidden_width))
        scaled = self.gates > 1
        shares = self.dc.new_empty(0 if scaled else (blocks, plan.pairs))
        place = (plan.tiles, network.column, network.count)
        backward_kernels.hidden_gradient_kernel[grid](
            self.grad, coefficients, used, x, network.w_in, network.w_out, network.b_in, plan.tokens, plan.starts,
            hidden, dh, activated, shares, *place, plan.num_tokens, self.gates, plan.pairs, x.shape[1],
            network.hidden_width, x.stride(0), dh.stride(0), activated.stride(0), BY_TOKEN=network.shared,
            SCALED=scaled, BLOCK_E=network.block_e, **_act(self.activation), **product_flags(x.dtype), **sizes,
        )  # fmt: skip
        if of_coefficients:
            backward_kernels.coefficient_gradient_kernel[grid[:1]](
                self.grad, used, y, shares, network.b_out, plan.tokens, plan.starts, self.dc, *place, plan.num_tokens,
                self.gates, plan.pairs, x.shape[1], blocks, BLOCK_M=sizes["BLOCK_M"], BLOCK_D=sizes["BLOCK_D"],
                BLOCK_E=network.block_e, WIDE=wide_type(x.dtype), **FUSED,
            )  # fmt: skip
        return dh, activated

    def _outer(
        self, network: _Network, left: Tensor | None, right: Tensor, rows: int, width: int, need_bias: bool
    ) -> tuple[Tensor, Tensor]:
        """dW [E, rows, width] and db [E, rows], in the type of sums."""
        plan, count = self.plan, network.count
        coefficients, used = self._coefficients
        sizes = launch_sizes("outer", plan.average(network.shared), width, self.x.dtype)
        blocks = (triton.cdiv(rows, sizes["BLOCK_R"]), triton.cdiv(width, sizes["BLOCK_C"]))
        most = triton.cdiv(plan.num_tokens, 4 * sizes["BLOCK_M"])  # of the busiest expert
        splits = 3 if interpreted() else min(triton.cdiv(_PROGRAMS, blocks[0] * blocks[1] * count), most)
        dw = self.x.new_empty((splits, count, rows, width), dtype=self.dtype)
        db = self.x.new_empty((splits, count, rows) if need_bias else 0, dtype=self.dtype)
        backward_kernels.outer_kernel[(blocks[0], blocks[1], count * splits)](
            left, right, self.grad, coefficients, used, plan.tokens, plan.starts, dw, db if need_bias else None,
            plan.tiles, network.column, count, plan.num_tokens, self.gates, plan.pairs, rows, width,
            0 if left is None else left.stride(0), right.stride(0), splits, **product_flags(self.x.dtype), **sizes,
        )  # fmt: skip
        return dw.sum(0), db.sum(0) if need_bias else db

    def _slope(self) -> Tensor:
        """[T]: the gradient of x · shared gate, which is the same in all gates that use it."""
        plan = self.plan
        assert plan.shared_pair is not None and plan.own is not None and plan.rest is not None
        pair = plan.shared_pair.clamp_min(0)
        above = torch.where(plan.shared_pair >= 0, self.dc[:, pair], 0).sum(0)
        return above * plan.own * plan.rest

    def _token_sums(self, rows: Tensor, slope: Tensor | None) -> Tensor:
        plan, width = self.plan, self.x.shape[1]
        dx = self.x.new_empty((plan.num_tokens, width))
        sizes = _token_sizes(width)
        backward_kernels.token_sum_kernel[(triton.cdiv(plan.num_tokens, sizes["BLOCK_T"]),)](
            rows, plan.leads, plan.shared_pair, slope, self.gate, dx, plan.num_tokens, self.gates, plan.slots, width,
            WIDE=wide_type(self.x.dtype), **sizes,
        )  # fmt: skip
        return dx

    def _shared_gate(self, slope: Tensor) -> Tensor:
        plan, width = self.plan, self.x.shape[1]
        sizes = _token_sizes(width)
        columns, tiles = triton.cdiv(width, sizes["BLOCK_D"]), triton.cdiv(plan.num_tokens, sizes["BLOCK_T"])
        each = triton.cdiv(tiles, 3 if interpreted() else max(_PROGRAMS // columns, 1))
        splits = triton.cdiv(tiles, each)
        parts = self.x.new_empty((splits, width), dtype=self.dtype)
        backward_kernels.weighted_sum_kernel[(columns, splits)](
            self.x, slope, plan.shared_pair, parts, plan.num_tokens, width, self.x.stride(0), each,
            WIDE=wide_type(self.x.dtype), **sizes,
        )  # fmt: skip
        return parts.sum(0)
