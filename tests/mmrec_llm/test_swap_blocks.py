"""RMSNorm and gated MLPs as swapped: gradients by the numerics rule, what is kept, what is left and why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from numerics import assert_accurate

transformers = pytest.importorskip("transformers")

from swap_models import GROUPED  # noqa: E402
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm  # noqa: E402
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP, Qwen2RMSNorm  # noqa: E402

from mmrec.llm.swap import swap_kernels  # noqa: E402


def norm(width: int = 48) -> Any:
    made = Qwen2RMSNorm(width, eps=1e-4)
    nn.init.normal_(made.weight)
    return made


def mlp(**settings: Any) -> Any:
    return Qwen2MLP(transformers.Qwen2Config(**GROUPED, **settings))


def results(module: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = module(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], grad)]


@pytest.mark.parametrize("shape", [(5, 48), (2, 7, 3, 48), (0, 48)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", [norm, lambda: mlp(hidden_act="silu")], ids=["norm", "mlp"])
def test_forward_and_gradients(make, dtype, shape):
    torch.manual_seed(0)
    module = make().to(dtype)
    width = 48 if isinstance(module, Qwen2RMSNorm) else 64
    x, grad = (torch.randn(*shape[:-1], width).to(dtype) for _ in range(2))
    if len(x):
        x[0] *= 1e-2  # where eps counts
    stock = results(module, x, grad)
    wide = make().double()
    wide.load_state_dict(module.state_dict())
    exact = results(wide, x.double(), grad.double())
    swap = swap_kernels(module)
    assert [layer.reason for layer in swap.report()] == [None]
    found = results(module, x, grad)
    for one, oracle, eager in zip(found, exact, stock, strict=True):
        assert_accurate(one, oracle, eager, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(module(x), found[0])
    swap.undo()
    assert all(torch.equal(a, b) for a, b in zip(results(module, x, grad), stock, strict=True))


def test_frozen_weights_get_no_gradient():
    module, x = norm().requires_grad_(False), torch.randn(3, 48, requires_grad=True)
    (expected,) = torch.autograd.grad(module(x).square().sum(), x)
    swap_kernels(module)
    (found,) = torch.autograd.grad(module(x).square().sum(), x)
    torch.testing.assert_close(found, expected)


def test_the_backward_pass_of_a_norm_is_not_rounded_by_autocast():
    module, x = norm(), torch.randn(3, 48, requires_grad=True)
    swap_kernels(module)
    (expected,) = torch.autograd.grad(module(x).square().sum(), x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (found,) = torch.autograd.grad(module(x).square().sum(), x)
    assert torch.equal(found, expected)


def test_a_norm_of_one_row_and_a_model_without_memory():
    module = norm()
    expected = torch.autograd.grad(module(torch.ones(48)).square().sum(), module.weight)
    swap_kernels(module)
    torch.testing.assert_close(torch.autograd.grad(module(torch.ones(48)).square().sum(), module.weight), expected)
    with torch.device("meta"):
        (layer,) = swap_kernels(Qwen2RMSNorm(48)).report()
    assert layer.reason is not None and "left as it is" in layer.reason


def kept_bytes(module: nn.Module, x: Tensor) -> int:
    """Bytes that the graph of one call holds, beside the weights and the input."""
    held: dict[int, int] = {}
    ours = {p.data_ptr() for p in [*module.parameters(), x]}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in ours:
            held[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        graph = module(x)
    del graph
    return sum(held.values())


def test_less_is_kept_for_the_backward_pass():
    x = torch.randn(64, 64, dtype=torch.bfloat16, requires_grad=True)
    one, inner = x.nbytes, 64 * GROUPED["intermediate_size"] * 2
    for module, stock, ours in ((norm(64), 2 * one, 0), (mlp(), 4 * inner, 3 * inner)):
        module = module.bfloat16().requires_grad_(False)
        if isinstance(module, Qwen2MLP):
            module.down_proj.weight.requires_grad_()  # as an adapter there would: its input is kept
        assert kept_bytes(module, x) >= stock
        with swap_kernels(module):
            assert kept_bytes(module, x) == ours


class Clamped(Qwen2MLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x).clamp(-7, 7))


class Counted(Qwen2MLP):
    def forward(self, x):
        self.calls += 1
        return super().forward(x)


class BareRMSNorm(nn.Module):
    def forward(self, x):
        return x


@pytest.mark.parametrize(
    ("module", "part", "reason"),
    [
        (GemmaRMSNorm(64), "norm", "it computes something else"),
        (BareRMSNorm(), "norm", "it has no weight [d] and eps"),
        (mlp(hidden_act="gelu"), "mlp", "it computes something else"),
        (Clamped(transformers.Qwen2Config(**GROUPED)), "mlp", "it computes something else"),
        (Counted(transformers.Qwen2Config(**GROUPED)), "mlp", "needs more than what is swapped"),
    ],
)
def test_what_computes_something_else_is_left(module, part, reason):
    (layer,) = (layer for layer in swap_kernels(module).report() if layer.part == part)
    assert layer.reason is not None and reason in layer.reason
    assert "forward" not in module.__dict__


def test_a_norm_in_another_dtype_than_its_input_promotes_as_before():
    module, x = norm(), torch.randn(3, 48, dtype=torch.bfloat16)
    expected = module(x)
    swap_kernels(module)
    assert expected.dtype == torch.float32 and torch.equal(module(x), expected)


def test_it_can_be_declined_and_others_patches_stay():
    model = transformers.Qwen2Model(transformers.Qwen2Config(**GROUPED))
    assert swap_kernels(model, norm=False, mlp=False).report() == []
    model.norm.forward = lambda x: x
    swap = swap_kernels(model)
    assert "norm: 4 swapped" in str(swap) and "mlp: 2 swapped" in str(swap)
    assert [layer.name for layer in swap.report() if layer.reason is not None] == ["norm"]
    swap.undo()
    assert [name for name, m in model.named_modules() if "forward" in m.__dict__] == ["norm"]
