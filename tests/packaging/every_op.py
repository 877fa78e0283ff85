"""Runs every op forward and, where it has one, backward, on the installed package. Started by test_wheel.py."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

import mmrec_kernels as mk

site = Path(mk.__file__).parent
assert "site-packages" in site.parts, site


def grad(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, requires_grad=True)


query, key, value = grad(3, 2, 8), grad(7, 2, 8), grad(7, 2, 8)
segment = mk.Segment(key, value, torch.tensor([0, 4, 7]))
mk.cross_modal_attention(query, [segment], torch.tensor([0, 2, 3])).sum().backward()
assert query.grad is not None and key.grad is not None and value.grad is not None

a, b = grad(6, 8), grad(6, 8)
mk.info_nce(a, b, scale=10.0).backward()
assert a.grad is not None and b.grad is not None
mk.info_nce_pairs({"text": a, "image": b}, [("text", "image")], scale=10.0).backward()

x, gate = grad(5, 8), grad(4, 8)
routing = mk.route(x, gate, 2)
out = mk.mixture_of_experts(x, routing, grad(4, 32, 8), grad(4, 8, 16))
(out.sum() + routing.losses.balance.sum()).backward()
assert x.grad is not None and gate.grad is not None

weight = mk.NF4Weight.quantize(torch.randn(16, 64))
inputs, lora = grad(3, 64), mk.LoRA(grad(4, 64), grad(16, 4), 2.0)
mk.nf4_linear(inputs, weight, lora=lora).sum().backward()
assert inputs.grad is not None and lora.a.grad is not None

for dtype in (torch.float32, torch.bfloat16, torch.float64):
    best = mk.top_k(torch.randn(2, 8, dtype=dtype), torch.randn(50, 8, dtype=dtype), 3)
    assert bool((best.ids >= 0).all())

from mmrec_kernels import library  # noqa: E402

served = {p.op: p.name for p in library.providers() if p.device == "cpu"}
for op in ("_retrieval_topk", "_infonce_forward", "_infonce_backward"):
    assert served[op] == "compiled", served
for module in ("transformers", "peft", "bitsandbytes", "triton", "polars"):
    assert module not in sys.modules, module
import mmrec_kernels.benchmarks  # noqa: E402, F401

import mmrec  # noqa: E402, F401
import mmrec.fusion  # noqa: E402, F401

print("every op ran")
