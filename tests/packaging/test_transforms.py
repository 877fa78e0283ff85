"""What no op can do is refused, by every op: forward-mode derivatives would be silent zeros."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

from mmrec_kernels import (
    LoRA,
    NF4Weight,
    Segment,
    cross_modal_attention,
    info_nce,
    mixture_of_experts,
    nf4_linear,
    route,
)

OFFSETS = torch.tensor([0, 2, 5])
ROUTING = route(torch.randn(5, 64), torch.randn(3, 64), 2)
WEIGHT = NF4Weight.quantize(torch.randn(64, 64))


def attend(x, other):
    x, other = x[:, None, :16], other[:, None, :16]
    return cross_modal_attention(x, [Segment(other, other, OFFSETS)], OFFSETS)


def experts(x, other):
    w_in, w_out = torch.randn(3, 32, 64), torch.randn(3, 64, 16)
    return mixture_of_experts(x + 0 * other, ROUTING, w_in, w_out)


CALLS = {
    "attention": attend,
    "infonce": info_nce,
    "routing": lambda x, other: route(x, other[:4], 2).weights,
    "experts": experts,
    "nf4": lambda x, other: nf4_linear(x, WEIGHT),
    "nf4 with an adapter": lambda x, other: nf4_linear(x, WEIGHT, lora=LoRA(other[:2], torch.randn(64, 2), 1.0)),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("needs_gradient", (False, True))
def test_forward_mode_is_refused(name, needs_gradient):
    x, other, tangent = torch.randn(5, 64), torch.randn(5, 64), torch.ones(5, 64)
    CALLS[name](x, other)
    with forward_ad.dual_level():
        CALLS[name](x, other)  # a level alone, without a tangent, is no reason
        for dual in (0, 1) if name in ("attention", "infonce", "routing", "nf4 with an adapter") else (0,):
            given = [x.clone().requires_grad_(needs_gradient), other.clone().requires_grad_(needs_gradient)]
            given[dual] = forward_ad.make_dual(given[dual], tangent)
            with pytest.raises(NotImplementedError, match="forward-mode derivative|jvp"):
                CALLS[name](*given)


@pytest.mark.parametrize("name", CALLS)
def test_jvp_is_refused(name):
    other = torch.randn(5, 64)
    with pytest.raises(NotImplementedError, match="the ops of mmrec_kernels have no forward-mode derivative"):
        torch.func.jvp(lambda x: CALLS[name](x, other), (torch.randn(5, 64),), (torch.ones(5, 64),))
