"""Launches attention's Triton kernels as a GPU would have them, compiling for sm_90 and running nothing, and prints
how often each was compiled: {case: {kernel: times}}. A process of its own, of `test_attention_triton.py`."""

from __future__ import annotations

import json
import random

import pytest
import torch
from attention_oracle import EVERYTHING, FLAGS, Case
from attention_providers import use_triton

from aot import record_launches
from mmrec_kernels.attention import arguments, cross_modal_attention

WHOLE = {"width": 16, "value_width": 16}
CASES = {
    "everything": lambda: Case([[40, 3, 0, 17], [20, 0, 0, 5], [6, 1, 2, 3]], [33, 2, 20, 90], indexed=(1,),
                               causal=(0,), extras=EVERYTHING, around=3, **WHOLE),
    "long latent": lambda: Case([[9, 3], [20, 0]], latent=100, heads=6, kv_heads=2, indexed=(0,), extras=EVERYTHING),
    "width 1": lambda: Case([[1], [3]], [100], heads=1, kv_heads=1, width=1, value_width=1, extras=EVERYTHING),
    "one row": lambda: Case([[1]], [1], heads=1, kv_heads=1, **WHOLE),
    "no rows of a segment": lambda: Case([[0, 0], [3, 2]], [1, 70], heads=2, kv_heads=1, **WHOLE),
    "biases of heads": lambda: Case([[4, 5]], [1, 70], heads=6, kv_heads=2, extras=("value_gate",), **WHOLE),
}  # fmt: skip


def run(case: Case, dtype: torch.dtype) -> None:
    leaves = case.to(dtype)
    outputs = case.call(cross_modal_attention, leaves, **FLAGS)
    torch.autograd.grad(list(outputs), list(leaves.values()), [torch.ones_like(x) for x in outputs], allow_unused=True)


def main() -> None:
    compiled = record_launches(90)
    patched = pytest.MonkeyPatch()
    use_triton(patched)
    patched.setattr(arguments, "checks_contents", lambda device: False)  # what was run is nothing
    told = {}
    for name, make in CASES.items():
        before = dict(compiled)
        run(make(), torch.float16 if "width" in name else torch.bfloat16)
        told[name] = {kernel: n - before.get(kernel, 0) for kernel, n in compiled.items() if n > before.get(kernel, 0)}
    random.seed(0)

    def lengths(low: int, high: int) -> list[int]:
        return [random.randrange(low, high) for _ in range(8)]

    batches = [
        Case([lengths(20, 60) for _ in range(3)], lengths(20, 30), heads=2, indexed=(0, 1), **WHOLE) for _ in range(30)
    ]
    run(batches[0], torch.bfloat16)
    before = dict(compiled)
    for case in batches[1:]:
        run(case, torch.bfloat16)
    told["ragged"] = {kernel: n - before[kernel] for kernel, n in compiled.items() if n > before[kernel]}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
