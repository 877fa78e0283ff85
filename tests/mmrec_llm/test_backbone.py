"""Loading, quantisation and its CPU hazards, LoRA, adapters on disk, merging, fingerprints."""

from __future__ import annotations

import os
import subprocess
import sys

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from mmrec.llm import Backbone, LoRAConfig
from mmrec.llm.quantize import dequantized, keep_unpacked, quantized_linears

IDS = torch.tensor([[2, 4, 9, 10, 3], [2, 7, 8, 20, 3]])


def tokens(backbone, ids=IDS):
    with torch.no_grad():
        return backbone.forward_tokens(ids)


def relative(a, b):
    return float(((a - b).norm() / b.norm()).detach())


def dense_twin(backbone, folder):
    """A dense model with the decoded NF4 weights and B A added by hand: shares no forward code with the 4-bit one."""
    twin = Backbone.load(folder, quantize=None)
    base = backbone.model.get_base_model() if backbone.lora else backbone.model
    for name, module in twin.model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        source = base.get_submodule(name)
        weight = dequantized(getattr(source, "base_layer", source)).float()
        if backbone.lora:
            a, b = source.lora_A["default"].weight, source.lora_B["default"].weight
            weight = weight + backbone.lora.scaling * (b @ a)
        module.weight.data.copy_(weight)
    return twin


def test_all_linear_layers_are_nf4_with_nested_scales(model_folder):
    backbone = Backbone.load(model_folder)
    linears = [m for m in backbone.model.modules() if isinstance(m, nn.Linear)]
    expected = {"bert": 12, "qwen2": 14}[backbone.model.config.model_type]
    assert len(linears) == len(backbone.quantized_layers()) == expected
    for layer in linears:
        state = layer.weight.quant_state
        assert state.quant_type == "nf4" and state.nested and state.blocksize == 64
        assert layer.compute_dtype == torch.float32
    assert backbone.trainable_parameters() == [] and not any(p.requires_grad for p in backbone.parameters())


def test_nf4_forward_is_that_of_the_decoded_weights(model_folder):
    backbone = Backbone.load(model_folder)
    assert relative(tokens(backbone), tokens(dense_twin(backbone, model_folder))) < 2e-6
    assert 1e-3 < relative(tokens(backbone), tokens(Backbone.load(model_folder, quantize=None)))


def test_layers_that_bitsandbytes_decodes_wrongly_stay_dense(make_bert, tmp_path):
    folder = make_bert(tmp_path, hidden=96)
    backbone = Backbone.load(folder)
    linears = [m for m in backbone.model.modules() if isinstance(m, nn.Linear)]
    assert sorted(backbone.quantized_layers()) == [f"encoder.layer.{i}.output.dense" for i in range(2)]
    assert len(linears) == 12
    weight = torch.randn(8, 96)
    codes, state = bnb.functional.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    nibbles = torch.stack([codes.view(-1) >> 4, codes.view(-1) & 15], 1).view(-1).long()
    absmax = bnb.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    honest = (state.code[nibbles] * absmax.repeat_interleave(64)).view(8, 96)
    assert relative(honest, weight) < 0.11
    if relative(bnb.functional.dequantize_4bit(codes, state), weight) < 0.11:
        pytest.fail("bitsandbytes decodes K % 64 != 0 rightly now: quantize.skipped_layers can go")


@pytest.fixture
def repacking(monkeypatch):
    """Make this machine look like one with AVX512-BF16 to every Linear4bit created from now on."""
    monkeypatch.setattr(bnb.nn.modules, "has_avx512bf16", lambda: True)


@pytest.mark.parametrize("lora", [None, LoRAConfig(r=4, init="random")], ids=["plain", "adapted"])
def test_kernels_compute_by_default(model_folder, lora):
    """On CPU, with and without an adapter, one that is loaded later too; and the stock layers where they are wanted."""
    backbone, stock = Backbone.load(model_folder, lora=lora), Backbone.load(model_folder, lora=lora, kernels=False)
    assert stock.swap is None and not any("forward" in m.__dict__ for m in stock.model.modules())
    assert backbone.swap is not None and all(layer.reason is None for layer in backbone.swap.report())
    swapped = {layer.name.removesuffix(".base_layer") for layer in backbone.swap.report() if layer.part == "linear"}
    assert swapped == {name.removesuffix(".base_layer") for name in backbone.quantized_layers()}
    assert relative(tokens(backbone), tokens(stock)) < 2e-6


def test_an_adapter_that_is_loaded_later_is_computed_by_the_kernel(model_folder, tmp_path):
    trained = Backbone.load(model_folder, lora=LoRAConfig(r=4, init="random"))
    trained.save_adapter(tmp_path)
    backbone = Backbone.load(model_folder)
    backbone.load_adapter(tmp_path)
    assert backbone.swap is not None and any(layer.part == "LoRA" for layer in backbone.swap.report())
    assert torch.equal(tokens(backbone), tokens(trained))


def test_hazard_is_real_without_the_guard(bert, repacking):
    backbone = Backbone.load(bert, kernels=False)
    layer = next(iter(quantized_linears(backbone.model).values()))
    before = dequantized(layer)
    layer.eval()(torch.randn(2, 64))
    assert torch.equal(dequantized(layer), before)
    layer.support_avx512bf16_for_cpu = True
    layer(torch.randn(2, 64))
    assert layer.weight.quant_state.packing_format_for_cpu
    assert relative(dequantized(layer).float(), before) > 1
    with pytest.raises(RuntimeError, match="repacked"):
        keep_unpacked(backbone.model)


def test_eval_train_merge_are_right_where_bitsandbytes_would_repack(model_folder, repacking):
    backbone = Backbone.load(model_folder, lora=LoRAConfig(r=4, init="random"))
    twin = dense_twin(backbone, model_folder)
    evaluated = tokens(backbone)
    assert relative(evaluated, tokens(twin)) < 2e-6
    backbone.model.config.attention_probs_dropout_prob = 0.0
    backbone.train()
    for module in backbone.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    trained = backbone.forward_tokens(IDS)
    assert torch.equal(trained, evaluated), "train and eval differ"
    weights = torch.randn(trained.shape, generator=torch.Generator().manual_seed(0))
    (trained * weights).sum().backward()
    check_gradients(backbone, model_folder, weights)
    optimizer = torch.optim.SGD(backbone.trainable_parameters(), lr=1e-3)
    optimizer.step()
    backbone.eval()
    after = tokens(backbone)
    assert relative(after, evaluated) > 1e-5
    assert relative(after, tokens(dense_twin(backbone, model_folder))) < 2e-6
    backbone.merge()
    assert relative(tokens(backbone), after) < 2e-6
    assert backbone.lora is None and backbone.trainable_parameters() == []
    assert not any("lora" in name for name, _ in backbone.model.named_parameters())


def check_gradients(backbone, folder, weights):
    """dA = s Bᵀ dW and dB = s dW Aᵀ with dW, the gradient of the dense weight, from the twin."""
    twin = dense_twin(backbone, folder)
    for module in twin.model.modules():
        if isinstance(module, nn.Linear):
            module.weight.requires_grad_(True)
    (twin.forward_tokens(IDS) * weights).sum().backward()
    base, scaling = backbone.model.get_base_model(), backbone.lora.scaling
    for name, module in twin.model.named_modules():
        if isinstance(module, nn.Linear):
            a, b = base.get_submodule(name).lora_A["default"].weight, base.get_submodule(name).lora_B["default"].weight
            assert relative(a.grad, scaling * b.T @ module.weight.grad) < 1e-4, name
            assert relative(b.grad, scaling * module.weight.grad @ a.T) < 1e-4, name


def test_requantising_merge_stays_4bit_within_its_error(bert, repacking):
    backbone = Backbone.load(bert, lora=LoRAConfig(r=4, init="random"))
    twin = dense_twin(backbone, bert)
    tokens(backbone)
    backbone.merge(requantize=True)
    assert len(backbone.quantized_layers()) == 12
    for name, layer in quantized_linears(backbone.model).items():
        assert relative(dequantized(layer), twin.model.get_submodule(name).weight) < 0.12, name


def test_merge_of_a_dense_or_mixed_model(bert, make_bert, tmp_path):
    for folder, quantize in ((bert, None), (make_bert(tmp_path, hidden=96), "nf4")):
        backbone = Backbone.load(folder, quantize=quantize, lora={"r": 4, "init": "random"})
        before = tokens(backbone)
        backbone.merge()
        assert relative(tokens(backbone), before) < 2e-6
        assert backbone.lora is None


def test_lora_zero_start_targets_and_counts(model_folder):
    plain, adapted = Backbone.load(model_folder), Backbone.load(model_folder, lora=8)
    assert torch.equal(tokens(plain), tokens(adapted))
    assert adapted.lora == LoRAConfig(r=8) and adapted.lora.scaling == 2.0
    expected = sum(8 * (m.in_features + m.out_features) for m in quantized_linears(plain.model).values())
    assert sum(p.numel() for p in adapted.trainable_parameters()) == expected
    assert all(p.dtype == torch.float32 for p in adapted.trainable_parameters())
    attention = Backbone.load(model_folder, lora={"r": 8, "targets": "attention"})
    names = {n.split(".lora_")[0].split(".")[-1] for n, p in attention.model.named_parameters() if p.requires_grad}
    assert (
        names
        == {"bert": {"query", "key", "value", "dense"}, "qwen2": {"q_proj", "k_proj", "v_proj", "o_proj"}}[
            plain.model.config.model_type
        ]
    )
    assert len(attention.trainable_parameters()) == 2 * 2 * 4


def test_lora_seed_is_its_own(bert):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = Backbone.load(bert, lora=4).adapter_state_dict()
    assert torch.equal(torch.rand(3), expected)
    second = Backbone.load(bert, lora=4).adapter_state_dict()
    other = Backbone.load(bert, lora={"r": 4, "seed": 1}).adapter_state_dict()
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert not all(torch.equal(first[k], other[k]) for k in first)


def test_adapter_round_trip(model_folder, tmp_path):
    source = Backbone.load(model_folder, lora=LoRAConfig(r=4, alpha=3.0, init="random"))
    source.save_adapter(tmp_path / "adapter")
    written = sorted(path.name for path in (tmp_path / "adapter").iterdir())
    assert written == ["adapter_config.json", "adapter_model.safetensors"]
    fresh, prepared = Backbone.load(model_folder), Backbone.load(model_folder, lora=LoRAConfig(r=4, alpha=3.0))
    assert not torch.equal(tokens(fresh), tokens(source))
    for backbone in (fresh, prepared):
        backbone.load_adapter(tmp_path / "adapter")
        assert torch.equal(tokens(backbone), tokens(source))
        assert len(backbone.trainable_parameters()) == len(source.trainable_parameters())
    with pytest.raises(ValueError, match="r=8"):
        Backbone.load(model_folder, lora=8).load_adapter(tmp_path / "adapter")


def test_adapter_is_read_by_peft_and_from_peft(bert, tmp_path):
    from peft import PeftModel
    from transformers import BertModel

    source = Backbone.load(bert, quantize=None, lora=LoRAConfig(r=4, alpha=3.0, init="random"), kernels=False)
    source.save_adapter(tmp_path / "ours")
    plain = BertModel.from_pretrained(bert, add_pooling_layer=False)
    model = PeftModel.from_pretrained(plain, tmp_path / "ours").eval()
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).last_hidden_state, tokens(source))
    model.save_pretrained(tmp_path / "theirs")
    back = Backbone.load(bert, quantize=None, kernels=False)
    back.load_adapter(tmp_path / "theirs")
    assert torch.equal(tokens(back), tokens(source))


def test_damaged_adapters_are_refused(bert, tmp_path):
    backbone = Backbone.load(bert, quantize=None, lora=LoRAConfig(r=4, init="random"))
    folder = tmp_path / "a"
    with pytest.raises(ValueError, match="no adapter_model.safetensors"):
        backbone.load_adapter(folder)
    backbone.save_adapter(folder)
    before = backbone.adapter_state_dict()
    weights = folder / "adapter_model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-10])
    with pytest.raises(ValueError, match="damaged"):
        backbone.load_adapter(folder)
    weights.write_bytes(good)
    (folder / "adapter_config.json").unlink()
    backbone.load_adapter(folder)
    state = dict(before)
    state.pop(next(iter(state)))
    with pytest.raises(ValueError, match="lacks 1"):
        backbone.load_adapter_state_dict(state)
    assert all(torch.equal(before[k], v) for k, v in backbone.adapter_state_dict().items())


def test_failed_save_keeps_the_old_adapter(bert, tmp_path, monkeypatch):
    backbone = Backbone.load(bert, quantize=None, lora=LoRAConfig(r=4, init="random"))
    backbone.save_adapter(tmp_path)
    old = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    for parameter in backbone.trainable_parameters():
        parameter.data.add_(1.0)

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        backbone.save_adapter(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == old


def test_adapter_state_dict_restores_bits(bert):
    backbone = Backbone.load(bert, lora=LoRAConfig(r=4, init="random"))
    state, before = backbone.adapter_state_dict(), tokens(backbone)
    for parameter in backbone.trainable_parameters():
        parameter.data.mul_(2.0)
    assert not torch.equal(tokens(backbone), before)
    backbone.load_adapter_state_dict(state)
    assert torch.equal(tokens(backbone), before)


def test_cache_context_follows_what_decides_a_vector(bert, make_bert, tmp_path):
    plain, adapted = Backbone.load(bert), Backbone.load(bert, lora={"r": 4, "init": "random"})
    base = plain.cache_context(pooling="mean")
    assert Backbone.load(bert).cache_context(pooling="mean") == base
    plain.encode(["red hat"])
    assert plain.cache_context(pooling="mean") == base
    assert adapted.cache_context(pooling="mean")["weights"] == base["weights"]
    changes = [
        adapted.cache_context(pooling="mean"),
        plain.cache_context(pooling="cls"),
        plain.cache_context(pooling="mean", normalize=True),
        plain.cache_context(pooling="mean", template_version="2"),
        Backbone.load(bert, quantize=None).cache_context(pooling="mean"),
        Backbone.load(bert, max_length=8).cache_context(pooling="mean"),
        Backbone.load(bert, dtype=torch.bfloat16).cache_context(pooling="mean"),
        Backbone.load(make_bert(tmp_path, seed=3)).cache_context(pooling="mean") | {"model": base["model"]},
    ]
    adapter = adapted.trainable_parameters()[0]
    with torch.no_grad():
        adapter.add_(1e-3)
    changes.append(adapted.cache_context(pooling="mean"))
    with torch.no_grad():
        plain.model.embeddings.word_embeddings.weight[4, 0] += 1e-3
    changes.append(plain.cache_context(pooling="mean"))
    seen = [base, *changes]
    assert all(a != b for i, a in enumerate(seen) for b in seen[:i])


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"quantize": "int8"}, ValueError, "quantize"),
        ({"dtype": torch.float64}, ValueError, "dtype"),
        ({"max_length": 33}, ValueError, "1 to 32"),
        ({"max_length": 0}, ValueError, "max_length"),
        ({"lora": 0}, ValueError, "lora.r"),
        ({"lora": {"rank": 4}}, ValueError, "rank"),
        ({"lora": {"r": 4, "dropout": 1.0}}, ValueError, "dropout"),
        ({"lora": {"r": 4, "alpha": 0.0}}, ValueError, "alpha"),
        ({"lora": {"r": 4, "init": "pissa"}}, ValueError, "init"),
        ({"lora": {"r": 4, "targets": "everything"}}, ValueError, "targets"),
        ({"lora": {"r": 4, "targets": ["nothing"]}}, ValueError, "targets"),
        ({"lora": "8"}, TypeError, "lora"),
        ({"lora": True}, TypeError, "lora"),
    ],
)
def test_bad_arguments(bert, arguments, error, words):
    with pytest.raises(error, match=words):
        Backbone.load(bert, **arguments)


def test_bad_sources(bert, tmp_path):
    with pytest.raises(ValueError, match="no folder"):
        Backbone.load(tmp_path / "absent")
    with pytest.raises(ValueError, match="no model configuration") as caught:
        Backbone.load("no-such-model-anywhere")
    assert "\n" not in str(caught.value)
    with pytest.raises(TypeError, match="name_or_path"):
        Backbone.load(3)
    backbone = Backbone.load(bert, quantize=None)
    for method in (backbone.merge, backbone.adapter_state_dict, lambda: backbone.save_adapter(tmp_path)):
        with pytest.raises(ValueError, match="no LoRA adapter"):
            method()


def test_checkpoint_with_missing_weights_is_refused(bert, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(bert, tmp_path / "cut")
    state = load_file(folder / "model.safetensors")
    del state["encoder.layer.1.output.dense.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    for quantize in (None, "nf4"):
        with pytest.raises(ValueError, match="lacks 1 weights.*layer.1.output.dense"):
            Backbone.load(folder, quantize=quantize)


def test_encoder_decoder_is_refused(save_byte_tokenizer, tmp_path):
    from transformers import T5Config

    T5Config(d_model=64, d_ff=64, num_layers=1, num_heads=2, vocab_size=24).save_pretrained(tmp_path)
    save_byte_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="encoder-decoder"):
        Backbone.load(tmp_path)


def test_import_is_light_and_missing_extra_is_named():
    code = (
        "import sys\n"
        "import mmrec.llm\n"
        "heavy = {'transformers', 'peft', 'bitsandbytes', 'safetensors', 'PIL', 'rich'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "sys.modules['transformers'] = None\n"
        "try:\n"
        "    mmrec.llm.Backbone.load('.')\n"
        "except ImportError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True)
    assert "pip install mmrec-kernels[mrs]" in done.stdout


def test_loading_leaves_transformers_logging_alone(bert, capsys):
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    capsys.readouterr()
    Backbone.load(bert, lora=2)
    assert capsys.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (verbosity, bar)
