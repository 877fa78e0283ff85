"""The hazards of the stock stack on CPU: each test shows one, and that a swapped layer is free of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

bnb = pytest.importorskip("bitsandbytes")
pytest.importorskip("peft")
pytest.importorskip("transformers")

from swap_models import inputs_of, output_of, relative, state_of, stock_layer  # noqa: E402

from mmrec.llm.swap import swap_kernels  # noqa: E402

pytestmark = pytest.mark.usefixtures("eager_bitsandbytes")

needs_repacking = pytest.mark.skipif(
    not bnb.functional.has_avx512bf16(), reason="bitsandbytes repacks weights on processors with AVX512-BF16 only"
)


@needs_repacking
def test_hazard_float32_becomes_bfloat16_in_eval():
    x = torch.randn(4, 128)
    layer = stock_layer()
    exact = x.double() @ bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).double().T
    with swap_kernels(layer):
        assert relative(layer.eval()(x), exact) < 1e-6 and relative(layer.train()(x), exact) < 1e-6
    assert relative(layer.train()(x), exact) < 1e-6
    assert relative(layer.eval()(x), exact) > 1e-3


@needs_repacking
def test_hazard_gradients_vanish_after_one_eval_forward():
    def gradient(layer: Any) -> Tensor | None:
        layer.eval()(torch.randn(4, 128))
        x = torch.randn(4, 128, requires_grad=True)
        out = layer.train()(x)
        if out.requires_grad:
            out.sum().backward()
        return x.grad

    assert gradient(stock_layer()) is None
    layer = stock_layer()
    swap_kernels(layer)
    assert gradient(layer) is not None


@needs_repacking
def test_hazard_decoding_and_the_state_dict_after_eval():
    def after_eval(swapped: bool) -> tuple[float, bool]:
        layer = stock_layer()
        before, state = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state), state_of(layer)
        if swapped:
            swap_kernels(layer)
        layer.eval()(torch.randn(4, 128))
        decoded = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        after = layer.state_dict()
        same = list(after) == list(state) and all(torch.equal(after[name], value) for name, value in state.items())
        return relative(decoded, before), same

    error, same = after_eval(swapped=False)
    assert error > 1 and not same
    assert after_eval(swapped=True) == (0.0, True)


@needs_repacking
def test_hazard_merging_after_eval(load):
    def merged_error(swapped: bool) -> float:
        model, inputs = load("qwen2", 4), inputs_of("qwen2")
        expected = output_of(model, inputs)
        for module in model.modules():
            if isinstance(module, bnb.nn.Linear4bit):
                module.support_avx512bf16_for_cpu = True
        if swapped:
            swap_kernels(model)
        with torch.no_grad():
            output_of(model.eval(), inputs)
            return relative(output_of(model.merge_and_unload(), inputs), expected)

    assert merged_error(swapped=False) > 2 * merged_error(swapped=True)


@needs_repacking
@pytest.mark.parametrize(("width", "rows"), [(128, 40), (96, 64)])
def test_hazard_sizes_that_crash_in_eval(width, rows):
    x = torch.randn(4, width)
    with pytest.raises((AssertionError, RuntimeError)):
        stock_layer(width, rows).eval()(x)
    layer = stock_layer(width, rows)
    swap_kernels(layer)
    assert layer.eval()(x).shape == (4, rows)


@needs_repacking
def test_hazard_a_repacked_layer_is_refused():
    layer = stock_layer()
    layer.eval()(torch.randn(4, 128))
    swap = swap_kernels(layer)
    assert "repacked in place" in swap.report()[0].reason and "forward" not in layer.__dict__
