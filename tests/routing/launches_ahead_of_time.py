"""Launches routing's Triton kernels as a GPU would have them, compiling for sm_90 and running nothing, and prints how
often each was compiled: {case: {kernel: times}}. A process of its own, of `test_experts_triton.py`."""

from __future__ import annotations

import json

import torch
from test_experts_kernel import given

from aot import record_launches
from mmrec_kernels.routing import triton as launchers

found = record_launches(90)
torch.Tensor.new_empty = torch.Tensor.new_zeros  # type: ignore[method-assign]  # what is not run writes no index
ALL = 2**9 - 1


def route(tokens: int, modalities: int, k: int, dtype: torch.dtype, masks: bool, experts: int = 8) -> None:
    x, gate = torch.zeros(tokens, 64, dtype=dtype), torch.zeros(experts, 64, dtype=dtype)
    modality = torch.zeros(tokens, dtype=torch.int64) if masks else None
    allowed = torch.ones(modalities, experts, dtype=torch.bool) if masks else None
    bias = torch.zeros(modalities, experts) if masks else None
    valid = torch.ones(tokens, dtype=torch.bool) if masks else None
    score, renormalize = "sigmoid" if masks else "softmax", k > 1
    weights, ids, stats, losses = launchers.route_forward(
        x, gate, modality, allowed, bias, valid, k, modalities, score, renormalize
    )
    launchers.route_backward(
        weights, losses, x, gate, modality, allowed, valid, weights, ids, stats, score, renormalize, True, True
    )


def mix(tokens: int, experts: int, k: int, gates: int, dtype: torch.dtype, everything: bool, width: int = 64) -> None:
    a = given(tokens, width, 96, experts, k, dtype, "swiglu" if everything else "gelu", gates)
    weights = torch.stack([r.weights.float() for r in a["routing"]])
    ids = torch.stack([r.experts for r in a["routing"]])
    biases = (a["b_in"], a["b_out"]) if everything else (None, None)
    shared = a["shared"] if everything else (None, None, None)
    tensors = (a["x"], weights, ids, a["w_in"], a["w_out"], *biases, *shared)
    out, *kept = launchers.experts_forward(*tensors, a["activation"], everything)
    kept = kept if everything else [None, None]
    launchers.experts_backward(out, *tensors, *kept, a["activation"], ALL)


def told(since: dict[str, int]) -> dict[str, int]:
    return {name: count - since.get(name, 0) for name, count in found.items() if count > since.get(name, 0)}


route(300, 3, 2, torch.bfloat16, True)
mix(300, 6, 2, 2, torch.bfloat16, True)
mix(300, 6, 2, 1, torch.bfloat16, False, width=320)
everything = told({})
for dtype in (torch.float32, torch.float16, torch.float64):
    route(300, 3, 2, dtype, True)
    mix(300, 6, 2, 2, dtype, True)
before = dict(found)
route(1, 1, 1, torch.bfloat16, False, experts=1)
route(16, 1, 16, torch.bfloat16, True, experts=16)
mix(1, 1, 1, 1, torch.bfloat16, False)
mix(16, 1, 1, 1, torch.bfloat16, True, width=320)
ones = told(before)
before = dict(found)
for tokens in (2000, 2001, 2048, 2777, 3000, 3008, 4095, 4096, 4097):
    route(tokens, 3, 2, torch.bfloat16, True)
    mix(tokens, 6, 2, 2, torch.bfloat16, True)
print(json.dumps({"everything": everything, "ones": ones, "ragged": told(before)}))
