"""Layers without state, bound to modules of a user's own as Hugging Face's `kernels` binds them."""

from __future__ import annotations

import inspect
from types import MethodType

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmrec_kernels import layers

LAYERS = [getattr(layers, name) for name in layers.__all__]


def bound(layer: type[nn.Module], module: nn.Module) -> nn.Module:
    module.forward = MethodType(layer.forward, module)
    return module


class Concatenated(nn.Module):
    def forward(self, query, keys, values, masks):
        key, value = torch.cat(keys, 1), torch.cat(values, 1)
        mask = torch.cat(
            [torch.ones(k.shape[:2]).bool() if m is None else m for k, m in zip(keys, masks, strict=True)], 1
        )
        heads = [x.transpose(1, 2) for x in (query, key, value)]
        return F.scaled_dot_product_attention(*heads, attn_mask=mask[:, None, None]).transpose(1, 2)


class CrossEntropy(nn.Module):
    def forward(self, query, key, scale):
        logits, labels = scale * query @ key.T, torch.arange(len(query))
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


class Mixture(nn.Module):
    def __init__(self, act_fn: object, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 10, 4, dtype=dtype))
        self.down_proj = nn.Parameter(torch.randn(3, 4, 5, dtype=dtype))
        self.act_fn = act_fn

    def forward(self, hidden_states, top_k_index, top_k_weights):
        rows = []
        for x, experts, weights in zip(hidden_states, top_k_index, top_k_weights, strict=True):
            gated = [self.gate_up_proj[e] @ x for e in experts]
            outs = [self.down_proj[e] @ (self.act_fn(h[:5]) * h[5:]) for e, h in zip(experts, gated, strict=True)]
            rows.append(sum(w * out for w, out in zip(weights, outs, strict=True)))
        return torch.stack(rows)


class Best(nn.Module):
    def forward(self, query, items, k):
        return torch.topk(query @ items.T, k)


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def attention_inputs() -> tuple[object, ...]:
    mask = torch.tensor([[True, False, True], [True, True, False]])
    keys, values = [leaf(2, 3, 2, 4), leaf(2, 5, 2, 4)], [leaf(2, 3, 2, 6), leaf(2, 5, 2, 6)]
    return leaf(2, 7, 2, 4), keys, values, [mask, None]


def experts_inputs() -> tuple[Tensor, ...]:
    return leaf(6, 4), torch.stack([torch.randperm(3)[:2] for _ in range(6)]), leaf(6, 2)


CASES = {
    "CrossModalAttention": (Concatenated, attention_inputs),
    "InfoNCE": (CrossEntropy, lambda: (leaf(9, 4), leaf(9, 4), leaf(1).squeeze())),
    "Experts": (lambda: Mixture(nn.SiLU()), experts_inputs),
    "TopK": (Best, lambda: (leaf(3, 4), leaf(20, 4), 5)),
}


def tensors(values: object) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    return [t for v in values for t in tensors(v)] if isinstance(values, list | tuple) else []


@pytest.mark.parametrize("name", CASES)
def test_computes_what_the_module_did(name):
    make, inputs = CASES[name]
    module, arguments, layer = make(), inputs(), getattr(layers, name)
    leaves = [t for t in tensors(arguments) if t.requires_grad] + list(module.parameters())
    want, got = tensors(module(*arguments)), None
    upstream = torch.randn_like(want[0])
    expected = torch.autograd.grad(want[0], leaves, upstream)
    got = tensors(bound(layer, module)(*arguments))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    if layer.has_backward:
        torch.testing.assert_close(torch.autograd.grad(got[0], leaves, upstream), expected)
    else:
        assert not got[0].requires_grad


@pytest.mark.parametrize("name", [name for name in CASES if getattr(layers, name).can_torch_compile])
def test_compiles(name):
    make, inputs = CASES[name]
    module, arguments = bound(getattr(layers, name), make()), inputs()
    with torch.no_grad():
        want = tensors(module(*arguments))
        got = tensors(torch.compile(module, fullgraph=True, backend="eager")(*arguments))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("layer", LAYERS)
def test_is_a_forward_and_nothing_else(layer):
    """What `kernels` asks of a layer before it binds one."""
    assert layer.__init__ is nn.Module.__init__
    members = {name for name, _ in inspect.getmembers(layer)} - {name for name, _ in inspect.getmembers(nn.Module)}
    assert members == {"can_torch_compile", "has_backward"}
    kinds = {p.kind for p in inspect.signature(layer.forward).parameters.values()}
    assert kinds == {inspect.Parameter.POSITIONAL_OR_KEYWORD}


@pytest.mark.parametrize(("act_fn", "same"), ((F.silu, nn.SiLU()), (nn.GELU(), nn.GELU())))
def test_experts_know_activations(act_fn, same):
    module, arguments = Mixture(act_fn), experts_inputs()
    want = module(*arguments)
    torch.testing.assert_close(bound(layers.Experts, module)(*arguments), want)
    assert not torch.allclose(want, Mixture(nn.Tanh())(*arguments))


@pytest.mark.parametrize("act_fn", (nn.Tanh(), nn.GELU(approximate="tanh"), F.gelu))
def test_experts_refuse_other_activations(act_fn):
    with pytest.raises(ValueError, match="act_fn must be SiLU or the exact GELU"):
        bound(layers.Experts, Mixture(act_fn))(*experts_inputs())


def test_attention_names_what_is_wrong():
    query, keys, values, masks = attention_inputs()
    layer = bound(layers.CrossModalAttention, Concatenated())
    with pytest.raises(ValueError, match=r"query must have shape \[B, Lq, H, D\], got \[14, 2, 4\]"):
        layer(query.flatten(0, 1), keys, values, masks)
    with pytest.raises(ValueError):
        layer(query, keys, values, masks[:1])


@pytest.mark.parametrize("bias", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_linear_of_bitsandbytes(bias, dtype):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    module = bitsandbytes.nn.Linear4bit(64, 32, bias=bias, compute_dtype=dtype, quant_type="nf4").to("cpu")
    x = torch.randn(5, 64, dtype=dtype, requires_grad=True)
    weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    want = F.linear(x.double(), weight.to(dtype).double(), None if module.bias is None else module.bias.double())
    got = bound(layers.Linear4bit, module)(x)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    (grad,) = torch.autograd.grad(got.double().sum(), x)
    torch.testing.assert_close(grad.double(), weight.to(dtype).double().sum(0).expand(5, 64), rtol=1e-2, atol=1e-2)
