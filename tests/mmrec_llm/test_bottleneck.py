"""Bottleneck adapters against the model with them called by hand, their files and keys, and what refuses them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

from mmrec.llm import AdapterConfig, Backbone

TEXTS = ["red shoe with hat", "a big film of the night", "old star", "blue phone and small war"]
FOLDERS = ["bert", "qwen2"]


def encode(backbone: Backbone, texts=TEXTS, **settings):
    return backbone.encode(texts, progress=False, **settings).pooled


def hidden_by_hand(backbone: Backbone, family: str, text: str, states: dict[str, torch.Tensor]) -> torch.Tensor:
    """The model with an adapter called by hand behind each layer that ends an attention or a feed-forward network."""
    model = backbone.model
    names = {
        "bert": ("attention.output.dense", "output.dense"), "qwen2": ("self_attn.o_proj", "mlp.down_proj")
    }[family]  # fmt: skip
    hooks = []
    for name, module in model.named_modules():
        if any(name.endswith(f".{ending}") for ending in names):
            found = {key: value for key, value in states.items() if key.startswith(f"{name}.")}
            own = {".".join(key.split(".")[-2:]): value for key, value in found.items()}

            def behind(_module, _inputs, output, own=own):
                normed = F.layer_norm(output, output.shape[-1:], own["norm.weight"], own["norm.bias"])
                inner = F.gelu(normed @ own["down.weight"].T + own["down.bias"])
                return output + inner @ own["up.weight"].T + own["up.bias"]

            hooks.append(module.register_forward_hook(behind))
    ids = torch.tensor([backbone.tokenizer(text)["input_ids"]])
    with torch.no_grad():
        found = model(input_ids=ids).last_hidden_state[0].mean(0)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("family", FOLDERS)
def test_bottleneck_adapters(request, family, tmp_path):
    folder = request.getfixturevalue(family)
    plain = Backbone.load(folder, quantize=None)
    backbone = Backbone.load(folder, quantize=None, adapter={"reduction": 16, "seed": 3})
    assert torch.allclose(encode(backbone), encode(plain), atol=1e-6), "W_up starts at 0"
    parameters = backbone.trainable_parameters()
    assert len(parameters) == 2 * 2 * 6 and backbone.lora is None
    assert backbone.adapters["default"] == AdapterConfig(reduction=16, seed=3)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.1 * torch.randn_like(parameter))
    state = backbone.adapter_state_dict()
    assert state and all(value.shape[0] in (4, 64) for value in state.values())
    expected = hidden_by_hand(plain, family, TEXTS[1], state)
    torch.testing.assert_close(encode(backbone)[1], expected, atol=1e-5, rtol=1e-4)
    backbone.save_adapter(tmp_path)
    again = Backbone.load(folder, quantize=None)
    again.load_adapter(tmp_path)
    assert torch.equal(encode(again), encode(backbone))
    backbone.use_adapter(None)
    assert torch.allclose(encode(backbone), encode(plain), atol=1e-6) and not backbone.trainable_parameters()
    backbone.use_adapter("default")
    backbone.remove_adapter("default")
    assert torch.equal(encode(backbone), encode(plain))


def test_bottleneck_adapters_train_in_four_bits(qwen2):
    backbone = Backbone.load(qwen2, adapter=AdapterConfig(inner=8, last_layers=1))
    assert len(backbone.trainable_parameters()) == 2 * 6
    target = F.normalize(torch.randn(4, 64, generator=torch.Generator().manual_seed(1)), dim=1)
    optimizer = torch.optim.AdamW(backbone.trainable_parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        pooled = backbone.train().encode(TEXTS, normalize=True, requires_grad=True, progress=False).pooled
        losses.append((pooled - target).square().sum())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
    with pytest.raises(ValueError, match="bottleneck adapters cannot be folded"):
        backbone.merge()
    with pytest.raises(ValueError, match="bottleneck adapters go with no other adapter"):
        backbone.add_adapter("more", 2)


def test_ways_to_train_exclude_each_other(qwen2):
    for given, words in (
        ({"adapter": {}, "trainable": "all", "quantize": None}, "three ways to train; give one"),
        ({"lora": 2, "adapter": {}}, "three ways to train; give one"),
        ({"adapter": {"width": 3}}, r"adapter has unknown fields \['width'\]"),
        ({"adapter": {"inner": 0}}, "adapter.inner must be None or an integer ≥ 1, got 0"),
        ({"adapter": {"reduction": 0}}, "adapter.reduction must be an integer ≥ 1"),
    ):
        with pytest.raises(ValueError, match=words):
            Backbone.load(qwen2, **given)
    with pytest.raises(TypeError, match="adapter must be an AdapterConfig"):
        Backbone.load(qwen2, adapter=8)


def test_blocks_that_are_built_otherwise_are_refused_by_name(tmp_path, save_byte_tokenizer):
    import transformers

    config = transformers.MixtralConfig(
        vocab_size=384, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2, num_experts_per_tok=1,
    )  # fmt: skip
    transformers.MixtralModel(config).save_pretrained(tmp_path)
    save_byte_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="adapter: layers.0 .*MixtralDecoderLayer.* must have one attention"):
        Backbone.load(tmp_path, quantize=None, adapter={})


@pytest.mark.parametrize("family", FOLDERS)
def test_bottleneck_adapters_in_fingerprints_and_batches(request, family):
    """The base model's hash does not know them, the cache's key does; a call may hold texts with and without them."""
    folder = request.getfixturevalue(family)
    plain, backbone = Backbone.load(folder), Backbone.load(folder, adapter=AdapterConfig(inner=4))
    for parameter in backbone.trainable_parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    key, own = plain.cache_context(pooling="mean"), backbone.cache_context(pooling="mean")
    assert own["adapter"] and {**own, "adapter": ""} == key
    with backbone.under(None):
        assert backbone.cache_context(pooling="mean") == key
    inside, outside = encode(backbone), encode(plain)
    names = ["default", None, None, "default"]
    assert "act on all tokens" in str(backbone.why_not_together(names))
    found = encode(backbone, adapters=names)
    torch.testing.assert_close(found, torch.stack([inside[0], *outside[1:3], inside[3]]), atol=2e-6, rtol=1e-5)
    assert not torch.allclose(inside, outside, atol=1e-3)
    twin = copy.deepcopy(backbone.model)
    for name, parameter in twin.named_parameters():
        if "mmrec_adapter" in name:
            parameter.data.zero_()
    assert torch.equal(encode(backbone), inside), "a copy's adapters are its own"
    with pytest.raises(ValueError, match="three ways to train"):
        Backbone.load(folder, quantize=None, adapter={}, lora=2)


def test_bottleneck_seeds_leave_the_callers_stream_alone(bert):
    torch.manual_seed(7)
    expected = torch.rand(2)
    torch.manual_seed(7)
    first = Backbone.load(bert, quantize=None, adapter={}).adapter_state_dict()
    assert torch.equal(torch.rand(2), expected)
    again = Backbone.load(bert, quantize=None, adapter={}).adapter_state_dict()
    other = Backbone.load(bert, quantize=None, adapter={"seed": 1}).adapter_state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)
    assert {tuple(value.shape) for value in first.values()} == {(64,), (8,), (8, 64), (64, 8)}


def test_in_sixteen_bits_and_behind_a_prefix(qwen2):
    """The adapters stay in float32 and start as the identity, to the bit; a prefix may be the base model's."""
    plain = Backbone.load(qwen2, dtype=torch.bfloat16)
    backbone = Backbone.load(qwen2, dtype=torch.bfloat16, adapter={})
    assert torch.equal(encode(backbone), encode(plain))
    assert {p.dtype for p in backbone.trainable_parameters()} == {torch.float32}
    backbone.train().encode(TEXTS, requires_grad=True, progress=False).pooled.square().sum().backward()
    gradients = [p.grad for p in backbone.eval().trainable_parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    for parameter in backbone.trainable_parameters():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    expected = plain.prefix(TEXTS[0]).layers
    for adapter, same in ((False, True), (True, False)):
        found = backbone.prefix(TEXTS[0], adapter=adapter).layers
        assert torch.equal(found[1][0], expected[1][0]) == same
    assert backbone.adapter == "default" and len(backbone.trainable_parameters()) == 2 * 2 * 6
