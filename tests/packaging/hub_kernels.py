"""Uses a laid-out repository as Hugging Face's `kernels` does: `python hub_kernels.py REPOSITORY copy|shared`.

`copy`: no other copy of the package is imported; `shared`: one is, and serves in its place. test_hub.py starts this.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from kernels import (
    KernelizeFallback,
    LocalLayerRepository,
    Mode,
    get_loaded_kernels,
    get_local_kernel,
    kernelize,
    use_kernel_forward_from_hub,
    use_kernel_mapping,
)
from torch import nn

repository = Path(sys.argv[1])
if sys.argv[2] == "shared":
    import mmrec_kernels

kernel = get_local_kernel(repository)
(loaded,) = get_loaded_kernels()
assert loaded.module is kernel and str(loaded.metadata.name) == "mmrec-kernels"
if sys.argv[2] == "shared":
    assert kernel.NF4Weight is mmrec_kernels.NF4Weight and kernel.layers.__name__ == "mmrec_kernels.layers"
else:
    assert kernel.layers.__name__.startswith(loaded.metadata.id) and "mmrec_kernels" not in sys.modules
library = sys.modules[f"{kernel.layers.__name__.rpartition('.')[0]}.library"]
assert {p.name for p in library.providers() if p.op == "_infonce_forward" and p.device == "cpu"} == {"compiled"}


def unwanted(self: nn.Module, *arguments: object) -> None:
    raise AssertionError("the module's own forward ran")


@use_kernel_forward_from_hub("CrossModalAttention")
class Attention(nn.Module):
    def forward(self, query, keys, values, masks):
        unwanted(self)


@use_kernel_forward_from_hub("InfoNCE")
class Loss(nn.Module):
    def forward(self, query, key, scale):
        unwanted(self)


@use_kernel_forward_from_hub("Experts")
class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Parameter(torch.randn(3, 10, 4)), nn.Parameter(torch.randn(3, 4, 5))
        self.act_fn = nn.SiLU()

    def forward(self, hidden_states, top_k_index, top_k_weights):
        unwanted(self)


@use_kernel_forward_from_hub("Linear4bit")
class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        made = kernel.NF4Weight.quantize(torch.randn(16, 64), nested=False)
        self.weight, self.bias, self.compute_dtype = made.packed[:, None], None, None
        self.weight.quant_state = SimpleNamespace(
            quant_type="nf4", shape=made.shape, blocksize=64, dtype=made.dtype, absmax=made.absmax, state2=None
        )
        self.dense = made.dequantize()

    def forward(self, x):
        unwanted(self)


@use_kernel_forward_from_hub("TopK")
class Best(nn.Module):
    def forward(self, query, items, k):
        return torch.topk(query @ items.T, k)


def modules() -> dict[str, nn.Module]:
    return {
        "CrossModalAttention": Attention(),
        "InfoNCE": Loss(),
        "Experts": Mixture(),
        "Linear4bit": Linear(),
        "TopK": Best(),
    }


assert set(modules()) == set(kernel.layers.__all__)
mapping = {name: {"cpu": {Mode.FALLBACK: LocalLayerRepository(repository, layer_name=name)}} for name in modules()}
with use_kernel_mapping(mapping, inherit_mapping=False):
    served = kernelize(nn.ModuleDict(modules()), mode=Mode.INFERENCE, device="cpu", use_fallback=KernelizeFallback.NONE)
    trained = kernelize(nn.ModuleDict({"TopK": Best()}), mode=Mode.TRAINING, device="cpu")

query, key = torch.randn(2, 3, 1, 4, requires_grad=True), torch.randn(2, 5, 1, 4)
out = served["CrossModalAttention"](query, [key], [key], [None])
heads = [tensor.transpose(1, 2) for tensor in (query, key, key)]
torch.testing.assert_close(out, nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2))
out.sum().backward()
assert query.grad is not None

a, b = torch.randn(6, 4), torch.randn(6, 4)
logits, labels = 3.0 * a @ b.T, torch.arange(6)
want = (nn.functional.cross_entropy(logits, labels) + nn.functional.cross_entropy(logits.T, labels)) / 2
torch.testing.assert_close(served["InfoNCE"](a, b, 3.0), want)

mixture = served["Experts"]
x = torch.randn(2, 4)
one = torch.tensor([[2], [0]])
h = [mixture.gate_up_proj[e] @ row for e, row in zip((2, 0), x, strict=True)]
want = [mixture.down_proj[e] @ (nn.functional.silu(v[:5]) * v[5:]) for e, v in zip((2, 0), h, strict=True)]
torch.testing.assert_close(mixture(x, one, torch.ones(2, 1)), torch.stack(want))

x = torch.randn(3, 64)
torch.testing.assert_close(served["Linear4bit"](x), x @ served["Linear4bit"].dense.T)

query, items = torch.randn(2, 4, requires_grad=True), torch.randn(20, 4)
scores, ids = served["TopK"](query, items, 5)
assert torch.equal(ids, torch.topk(query @ items.T, 5).indices) and not scores.requires_grad
# It has no backward: a module that is trained keeps its own.
assert trained["TopK"](query, items, 5)[0].requires_grad
print("kernels took every layer")
