"""`swap_kernels` on quantised models of transformers, with and without peft: what it computes, what it leaves, what
undoing gives back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mmrec
from mmrec.llm import swap_linear
from mmrec.llm.swap import swap_kernels
from mmrec_kernels import nf4_linear
from numerics import assert_accurate

bnb = pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from swap_models import FAMILIES, GROUPED, inputs_of, output_of, state_of, stock_layer  # noqa: E402

pytestmark = pytest.mark.usefixtures("eager_bitsandbytes")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each layer that the kernel computed: whether an adapter came with it."""
    found: list[int] = []

    def counted(x: Tensor, weight: Any, bias: Any, **more: Any) -> Tensor:
        found.append(more["lora"] is not None)
        return nf4_linear(x, weight, bias, **more)

    monkeypatch.setattr(swap_linear, "nf4_linear", counted)
    return found


def assert_same_state(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def assert_close(found: Tensor, expected: Tensor) -> None:
    """But for the rounding of float32, carried through two layers."""
    assert found.dtype == expected.dtype == torch.float32
    assert (found - expected).norm() <= 2e-5 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_forward_and_gradients_and_undo(family, rank, dtype, load, calls):
    model, inputs = load(family, rank, dtype), inputs_of(family)
    types = [type(m) for m in model.modules()]

    def run(model: Any = model, dtype: torch.dtype = dtype) -> list[Tensor]:
        model.zero_grad()
        pixels = {"pixel_values": inputs["pixel_values"].to(dtype)} if "pixel_values" in inputs else {}
        out = output_of(model, inputs | pixels)
        found = [out.detach()]
        if rank:
            weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(4))
            (out.float() * weights).sum().backward()
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            found.append(torch.cat([g.flatten().float() for g in gradients]))
        return found

    expected, before = run(), state_of(model)
    swap = swap_kernels(model)
    assert all(layer.reason is None for layer in swap.report()), str(swap)
    assert sum(layer.part == "linear" for layer in swap.report()) >= 12
    found = run()
    exact = expected if dtype == torch.float32 else run(load(family, rank), torch.float32)
    for one, other, oracle in zip(found, expected, exact, strict=True):
        if dtype == torch.float32:
            assert_close(one, other)
        else:  # no further from float32 than the stock model is, by the rule for kernels
            assert_accurate(one, oracle.double(), other, dtype=dtype)
    layers = sum(layer.part == "linear" for layer in swap.report())
    assert len(calls) == layers and sum(calls) == (layers if rank else 0)
    assert_same_state(model, before)
    assert [type(m) for m in model.modules()] == types
    swap.undo()
    assert not any("forward" in m.__dict__ for m in model.modules())
    assert all(torch.equal(one, other) for one, other in zip(run(), expected, strict=True))
    assert_same_state(model, before)


def test_it_is_at_the_top_and_a_context(load, calls):
    model, inputs = load("qwen2"), inputs_of("qwen2")
    expected = output_of(model, inputs)
    with mmrec.swap_kernels(model) as swap:
        assert "linear: 14 swapped" in str(swap)
        assert_close(output_of(model, inputs), expected)
    assert len(calls) == 14
    assert torch.equal(output_of(model, inputs), expected) and len(calls) == 14
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got int"):
        mmrec.swap_kernels(3)
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = mmrec.no_such_thing


def test_swapping_twice_and_undoing_once(load):
    model, inputs = load("qwen2", 4), inputs_of("qwen2")
    expected = output_of(model, inputs)
    first = swap_kernels(model)
    found = output_of(model, inputs)
    second = swap_kernels(model)
    assert second.report() == first.report()
    assert torch.equal(output_of(model, inputs), found)
    second.undo()
    assert torch.equal(output_of(model, inputs), expected)
    first.undo()
    first.undo()
    assert torch.equal(output_of(model, inputs), expected)


def test_train_and_eval_give_the_same_bits_and_gradients_flow_after_eval(load):
    """Stock: the first forward in eval repacks, after which train mode gives no gradient."""
    model, inputs = load("qwen2", 4), inputs_of("qwen2")
    swap_kernels(model)
    with torch.no_grad():
        evaluated = output_of(model.eval(), inputs)
    trained = output_of(model.train(), inputs)
    assert torch.equal(evaluated, trained)
    trained.mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_adapters_switched_disabled_merged_and_unloaded(load):
    model, inputs = load("qwen2", 4), inputs_of("qwen2")
    torch.manual_seed(2)
    model.add_adapter("other", peft.LoraConfig(r=8, lora_alpha=8, target_modules="all-linear", init_lora_weights=False))

    def outputs() -> list[Tensor]:
        found = []
        for names in ("default", "other"):
            model.set_adapter(names)
            found.append(output_of(model, inputs).detach())
        model.base_model.set_adapter(["default", "other"])
        found.append(output_of(model, inputs).detach())
        with model.disable_adapter():
            found.append(output_of(model, inputs).detach())
        model.set_adapter("default")
        return found

    expected = outputs()
    swap = swap_kernels(model)
    found = outputs()
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other)
    assert len({tuple(f.flatten().tolist()) for f in found}) == 4
    stock = copy.deepcopy(model)
    swap_kernels(stock).undo()
    merged, merged_stock = model.merge_and_unload(), stock.merge_and_unload()
    assert_close(output_of(merged, inputs), output_of(merged_stock, inputs))
    swap.undo()
    assert torch.equal(output_of(merged, inputs), output_of(merged_stock, inputs))


def test_several_adapters_in_a_batch(load):
    model, inputs = load("qwen2", 4), inputs_of("qwen2")
    torch.manual_seed(2)
    model.add_adapter("other", peft.LoraConfig(r=4, lora_alpha=4, target_modules="all-linear", init_lora_weights=False))
    names = ["other", "__base__", "default"]
    with torch.no_grad():
        expected = output_of(model, inputs | {"adapter_names": names})
        swap_kernels(model)
        for _ in range(2):
            found = output_of(model, inputs | {"adapter_names": names})
            assert_close(found, expected)
        parameter = next(p for n, p in model.named_parameters() if "lora_B.other" in n)
        parameter.add_(1.0)  # what was stacked is made again
        assert not torch.equal(output_of(model, inputs | {"adapter_names": names})[0], found[0])
        with pytest.raises(ValueError, match="Length of `adapter_names`"):
            output_of(model, inputs | {"adapter_names": names[:2]})


def test_an_adapter_that_acts_from_its_invocation_on(load, calls):
    """aLoRA: found in the middle, at the end, and not at all; forward and gradients, and in the kernel."""
    model, inputs = load("qwen2", 4, alora_invocation_tokens=[95, 96], task_type="CAUSAL_LM"), inputs_of("qwen2")
    inputs["input_ids"][0, 3:5] = inputs["input_ids"][2, 7:9] = torch.tensor([95, 96])

    def run() -> list[Tensor]:
        model.zero_grad()
        out = output_of(model, inputs)
        out.square().sum().backward()
        return [out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    expected = run()
    swap = swap_kernels(model)
    assert all(layer.reason is None for layer in swap.report()), str(swap)
    found = run()
    assert len(found) == len(expected) == 1 + 2 * 14
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other)
    assert len(calls) == 14 and all(calls)
    inputs["input_ids"].clamp_(max=90)  # never invoked: the base model, and gradients of zero
    nowhere = run()
    with model.disable_adapter():
        assert_close(nowhere[0], output_of(model, inputs).detach())
    assert all(not gradient.any() for gradient in nowhere[1:])


def test_copies_are_swapped_and_independent(load):
    model, inputs = load("qwen2", 4), inputs_of("qwen2")
    expected = output_of(model, inputs)
    swap = swap_kernels(model)
    twin = copy.deepcopy(model)
    found = output_of(model, inputs)
    assert torch.equal(output_of(twin, inputs), found)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    assert torch.equal(output_of(model, inputs), found) and not torch.equal(output_of(twin, inputs), found)
    swap.undo()
    assert torch.equal(output_of(model, inputs), expected)
    assert any("forward" in m.__dict__ for m in twin.modules())
    swap_kernels(twin).undo()
    assert not any("forward" in m.__dict__ for m in twin.modules())


def test_saved_adapters_load_anywhere(load, tmp_path):
    model, inputs = load("qwen2", 4), inputs_of("qwen2")
    expected = output_of(model, inputs)
    swap_kernels(model)
    model.save_pretrained(tmp_path)
    fresh = peft.PeftModel.from_pretrained(load("qwen2"), tmp_path).eval()
    assert torch.equal(output_of(fresh, inputs), expected)
    swap_kernels(fresh)
    assert torch.equal(output_of(fresh, inputs), output_of(model, inputs))


@pytest.mark.parametrize(
    ("lora", "reason"),
    [({"lora_dropout": 0.5}, "has dropout 0.5 while training"), ({"use_dora": True}, "DoraLinearVariant")],
)
def test_what_peft_computes_itself(lora, reason, load):
    model, inputs = load("qwen2", 4, **lora), inputs_of("qwen2")
    training = "lora_dropout" in lora
    model.train(training)

    def run() -> Tensor:
        torch.manual_seed(5)
        return output_of(model, inputs)

    expected = run()
    swap = swap_kernels(model)
    left = [layer for layer in swap.report() if layer.reason is not None]
    assert len(left) == 14 and all(layer.part == "LoRA" and reason in layer.reason for layer in left)
    assert reason in str(swap)
    assert_close(run(), expected)
    swap.undo()
    assert torch.equal(run(), expected)


def test_attention_and_experts_come_and_go():
    config = transformers.MixtralConfig(**GROUPED, num_local_experts=4)
    model = transformers.MixtralForCausalLM(config).eval()
    inputs = inputs_of("mixtral")
    attention, experts = model.config._attn_implementation, model.config._experts_implementation
    expected = output_of(model, inputs)
    with swap_kernels(model, attention=True, experts=True) as swap:
        assert model.config._attn_implementation == model.config._experts_implementation == "mmrec"
        assert [layer.part for layer in swap.report()] == ["norm"] * 5 + ["attention", "experts"]
        assert_close(output_of(model, inputs), expected)
    assert (model.config._attn_implementation, model.config._experts_implementation) == (attention, experts)
    assert torch.equal(output_of(model, inputs), expected)
    with pytest.raises(ValueError, match="experts: model Qwen2ForCausalLM has no experts"):
        swap_kernels(transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**GROUPED)), experts=True)
    assert str(swap_kernels(nn.Linear(3, 4))) == "nothing to swap"


def test_hooks_of_others_are_left():
    layer = stock_layer()
    layer.forward = lambda x: x
    swap = swap_kernels(layer)
    assert "replaced by something else" in swap.report()[0].reason
    swap.undo()
    assert layer(torch.ones(1)).item() == 1


def test_a_view_follows_the_layers_bytes():
    layer = stock_layer()
    swap_kernels(layer)
    x = torch.randn(2, 128)
    before = layer(x)
    layer.weight = bnb.nn.Params4bit(torch.randn(64, 128), requires_grad=False, quant_type="nf4").to("cpu")
    assert not torch.equal(layer(x), before)
    exact = x @ bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).T
    torch.testing.assert_close(layer(x), exact)


def test_hooks_of_a_base_layer_are_run(load):
    """Its call is what runs them, so peft's forward computes there."""
    model, inputs = load("qwen2", 4), inputs_of("qwen2")
    expected, seen = output_of(model, inputs), []
    watched = next(m for m in model.modules() if isinstance(m, peft.tuners.lora.bnb.Linear4bit))
    handle = watched.base_layer.register_forward_hook(lambda *_: seen.append(1))
    swap = swap_kernels(model)
    assert sum("has hooks" in (layer.reason or "") for layer in swap.report()) == 1
    assert_close(output_of(model, inputs), expected)
    assert seen == [1]
    handle.remove()
    output_of(model, inputs)
    assert seen == [1] and all(layer.reason is None for layer in swap_kernels(model).report())


def test_a_patched_base_layer_is_left_with_its_adapter(load):
    model, inputs = load("qwen2", 4), inputs_of("qwen2")
    patched = next(m for m in model.modules() if isinstance(m, peft.tuners.lora.bnb.Linear4bit))
    patched.base_layer.forward = lambda x: torch.zeros(*x.shape[:-1], patched.out_features)
    expected = output_of(model, inputs)
    swap = swap_kernels(model)
    assert sum("replaced by something else" in (layer.reason or "") for layer in swap.report()) == 2
    assert_close(output_of(model, inputs), expected)


def test_float16_is_computed_in_float32_on_cpu():
    layer = stock_layer(dtype=torch.float16)
    x = torch.randn(4, 128)
    exact = x @ bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).T
    swap_kernels(layer)
    torch.testing.assert_close(layer(x), exact)
    assert layer(x.half()).dtype == torch.float16


def test_adapters_written_behind_autograds_back_count(load):
    """In a mixed batch: `.data.copy_` changes neither address nor version, as swapping an adapter in place does."""
    model, inputs = load("qwen2", 4), inputs_of("qwen2") | {"adapter_names": ["default", "__base__", "default"]}
    swap_kernels(model)
    with torch.no_grad():
        before = output_of(model, inputs)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.copy_(torch.zeros_like(parameter))
        after = output_of(model, inputs)
    assert torch.equal(after[1], before[1]) and not torch.equal(after[0], before[0])
