"""Adapters by name, on the last layers, several in a batch; bottleneck adapters; and the model's own weights."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mmrec.llm import Backbone, EmbeddingCache, LoRAConfig
from mmrec.llm.bottleneck import AdapterConfig

TEXTS = ["red shoe with hat", "a big film of the night", "old star", "blue phone and small war"]
FOLDERS = ["bert", "qwen2"]


def random(rank: int = 4, seed: int = 0, **settings) -> LoRAConfig:
    return LoRAConfig(rank, init="random", seed=seed, **settings)


def encode(backbone: Backbone, texts=TEXTS, **settings):
    return backbone.encode(texts, progress=False, **settings).pooled


def adapted_layers(backbone: Backbone) -> list[str]:
    return [name for name, _ in backbone.model.named_parameters() if "lora_A" in name]


@pytest.mark.parametrize("family", FOLDERS)
@pytest.mark.parametrize("targets", ["all-linear", "attention"])
def test_the_last_layers_only(request, family, targets, tmp_path):
    folder = request.getfixturevalue(family)
    backbone = Backbone.load(folder, quantize=None, lora=random(targets=targets, last_layers=1))
    names = adapted_layers(backbone)
    assert names and all(".layers.1." in name or ".layer.1." in name for name in names)
    everywhere = adapted_layers(Backbone.load(folder, quantize=None, lora=random(targets=targets)))
    assert set(names) < set(everywhere) and len(everywhere) == 2 * len(names)
    backbone.save_adapter(tmp_path)
    again = Backbone.load(folder, quantize=None)
    again.load_adapter(tmp_path)
    assert again.lora == backbone.lora and torch.equal(encode(again), encode(backbone))
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    base = transformers.AutoModel.from_pretrained(folder, **({"add_pooling_layer": False} if family == "bert" else {}))
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    ids = torch.tensor([backbone.tokenizer(TEXTS[0])["input_ids"]])
    with torch.no_grad():
        expected = theirs(input_ids=ids).last_hidden_state[0].mean(0)
    torch.testing.assert_close(encode(backbone, TEXTS[:1])[0], expected, atol=2e-6, rtol=1e-4)
    with pytest.raises(ValueError, match="lora.last_layers must be at most 2, the blocks of the model, got 3"):
        Backbone.load(folder, quantize=None, lora=random(last_layers=3))
    with pytest.raises(ValueError, match="lora.last_layers must be None or an integer ≥ 1, got 0"):
        LoRAConfig(last_layers=0)


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("family", FOLDERS)
def test_each_text_under_its_own_adapter(request, family, quantize):
    """One call over several adapters is what each adapter alone gives; in 4 bits and packed, in one pass."""
    folder = request.getfixturevalue(family)
    backbone = Backbone.load(folder, quantize=quantize)
    base = encode(backbone)
    for n, name in enumerate(("films", "shoes")):
        backbone.add_adapter(name, random(seed=n + 1))
    assert backbone.adapter == "films" and list(backbone.adapters) == ["films", "shoes"]
    alone = {}
    for name in ("films", "shoes", None):
        backbone.use_adapter(name)
        alone[name] = encode(backbone)
    torch.testing.assert_close(alone[None], base, atol=2e-6, rtol=1e-5)
    assert not torch.allclose(alone["films"], alone["shoes"], atol=1e-3)
    names = ["films", None, "shoes", "films"]
    if quantize and family == "qwen2":
        assert backbone.why_not_together(names) is None
    for layout in ("packed", "exact", "padded"):
        found = encode(backbone, adapters=names, layout=layout)
        expected = torch.stack([alone[name][n] for n, name in enumerate(names)])
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert backbone.adapter is None, "what is in use stays what it was"
    with pytest.raises(ValueError, match="there is no adapter 'hats'; there are"):
        encode(backbone, adapters=["hats"] * 4)
    with pytest.raises(ValueError, match="adapters must be 4 names or None, one for each text, got 2"):
        encode(backbone, adapters=["films", None])
    with pytest.raises(TypeError, match="adapters must be a sequence of names"):
        encode(backbone, adapters="films")


def test_adapters_of_other_ranks_and_layers_share_a_call(qwen2):
    backbone = Backbone.load(qwen2)
    backbone.add_adapter("narrow", random(2, seed=1))
    backbone.add_adapter("late", random(2, seed=2, last_layers=1))
    backbone.add_adapter("wide", random(6, seed=3))
    assert backbone.why_not_together(["narrow", "late"]) is None
    assert "ranks [2, 6]" in str(backbone.why_not_together(["narrow", "wide"]))
    for names in (["narrow", "late", None, "late"], ["wide", "narrow", "late", "wide"]):
        found = encode(backbone, adapters=names)
        for n, name in enumerate(names):
            backbone.use_adapter(name)
            torch.testing.assert_close(found[n], encode(backbone, TEXTS[n : n + 1])[0], atol=1e-5, rtol=1e-4)


def test_only_the_adapter_in_use_trains(qwen2):
    backbone = Backbone.load(qwen2, lora=random(seed=5))
    backbone.add_adapter("other", random(seed=6))
    assert backbone.adapter == "default"
    for name in ("default", "other"):
        backbone.use_adapter(name)
        before = {n: backbone.adapter_state_dict(n) for n in ("default", "other")}
        optimizer = torch.optim.SGD(backbone.trainable_parameters(), lr=0.1)
        backbone.train().encode(TEXTS, requires_grad=True, progress=False).pooled.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        backbone.eval()
        for n, state in before.items():
            after = backbone.adapter_state_dict(n)
            changed = any(not torch.equal(state[key], after[key]) for key in state)
            assert changed == (n == name)
    backbone.use_adapter(None)
    assert not backbone.trainable_parameters()


def test_files_names_and_removal(qwen2, tmp_path):
    backbone = Backbone.load(qwen2)
    backbone.add_adapter("films", random(seed=1))
    backbone.add_adapter("shoes", random(seed=2))
    vectors = {name: encode(backbone, adapters=[name] * 4) for name in ("films", "shoes")}
    for name in vectors:
        backbone.save_adapter(tmp_path / name, name)
    other = Backbone.load(qwen2)
    for name in ("shoes", "films"):
        other.load_adapter(tmp_path / name, name)
    for name, expected in vectors.items():
        torch.testing.assert_close(encode(other, adapters=[name] * 4), expected, atol=1e-6, rtol=1e-5)
    other.remove_adapter("shoes")
    assert list(other.adapters) == ["films"] and other.adapter is None
    torch.testing.assert_close(encode(other), encode(Backbone.load(qwen2)), atol=1e-6, rtol=1e-5)
    other.remove_adapter("films")
    assert not other.adapters and torch.equal(encode(other), encode(Backbone.load(qwen2)))
    for name, words in (
        ("films", "there is an adapter 'films' already"), ("a.b", "name must be letters"), ("keys", "no attribute"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            backbone.add_adapter(name, 2)
    with pytest.raises(TypeError, match="got None"):
        backbone.add_adapter("new", None)
    with pytest.raises(ValueError, match="there is no adapter 'hats'"):
        backbone.remove_adapter("hats")
    with pytest.raises(ValueError, match="other adapters rest on these weights"):
        backbone.merge()


def test_the_cache_tells_adapters_apart(qwen2, tmp_path):
    backbone = Backbone.load(qwen2)
    backbone.add_adapter("films", random(seed=1))
    backbone.add_adapter("shoes", random(seed=2))
    names = ["films", None, "shoes", "films"]
    expected = encode(backbone, adapters=names)
    cache = EmbeddingCache(tmp_path)
    torch.testing.assert_close(encode(backbone, adapters=names, cache=cache), expected, atol=1e-5, rtol=1e-4)
    again = encode(backbone, adapters=names, cache=cache)
    torch.testing.assert_close(again, expected, atol=1e-5, rtol=1e-4)
    backbone.use_adapter("shoes")
    torch.testing.assert_close(encode(backbone, cache=cache)[2], expected[2], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(encode(backbone, cache=cache)[0], expected[0], atol=1e-3)


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


@pytest.mark.parametrize("trainable", ["all", "last:1", "last:2"])
def test_the_models_own_weights(qwen2, trainable):
    backbone = Backbone.load(qwen2, quantize=None, trainable=trainable)
    trains = [name for name, parameter in backbone.model.named_parameters() if parameter.requires_grad]
    blocks = {name.split(".")[1] for name in trains if "layers." in name}
    assert blocks == ({"1"} if trainable == "last:1" else {"0", "1"})
    embeds = backbone.model.get_input_embeddings().weight
    assert embeds.requires_grad == (trainable == "all") and backbone.model.norm.weight.requires_grad
    before, vectors = backbone.trainable_state_dict(), encode(backbone)
    optimizer = torch.optim.SGD(backbone.trainable_parameters(), lr=0.1)
    backbone.train().encode(TEXTS, requires_grad=True, progress=False).pooled.square().sum().backward()
    optimizer.step()
    backbone.eval()
    assert not torch.allclose(encode(backbone), vectors)
    backbone.load_trainable_state_dict(before)
    assert torch.equal(encode(backbone), vectors)
    with pytest.raises(ValueError, match="the state lacks 1 tensors"):
        backbone.load_trainable_state_dict(dict(list(before.items())[1:]))
    with pytest.raises(ValueError, match="adapters do not go with trainable"):
        backbone.add_adapter("more", 2)


def test_ways_to_train_exclude_each_other(qwen2):
    for given, words in (
        ({"trainable": "all"}, "weights in 4 bits cannot train"),
        ({"trainable": "last:0", "quantize": None}, "must be None, 'all' or 'last:n'"),
        ({"trainable": "last:3", "quantize": None}, "trainable must be at most 2, the blocks of the model, got 3"),
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
