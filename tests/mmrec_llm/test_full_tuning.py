"""Tuning a dense model's own weights: which train, their gradients against transformers', their state, the cache."""

from __future__ import annotations

import pytest
import torch

from mmrec.llm import Backbone

TEXTS = ["red shoe with hat", "a big film of the night", "old star"]
FAMILIES = ["bert", "qwen2"]
NAMES = {  # of the two blocks, and of what is behind them
    "bert": ("encoder.layer.0.", "encoder.layer.1."),
    "qwen2": ("layers.0.", "layers.1.", "norm."),
}


def plain(family: str, folder):
    """The same checkpoint without anything of this package."""
    import transformers

    kwargs = {"add_pooling_layer": False} if family == "bert" else {}
    return transformers.AutoModel.from_pretrained(folder, **kwargs).eval()


def pooled(backbone: Backbone, **settings):
    return backbone.encode(TEXTS, progress=False, **settings).pooled


@pytest.mark.parametrize("trainable", ["all", "last:1", "last:2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_the_models_own(request, family, trainable):
    folder = request.getfixturevalue(family)
    backbone = Backbone.load(folder, quantize=None, trainable=trainable)
    weights = torch.randn(len(TEXTS), 64, generator=torch.Generator().manual_seed(0))
    (pooled(backbone, requires_grad=True) * weights).sum().backward()
    model = plain(family, folder)
    ids = [torch.tensor([backbone.tokenizer(text)["input_ids"]]) for text in TEXTS]
    expected = torch.stack([model(input_ids=row).last_hidden_state[0].mean(0) for row in ids])
    (expected * weights).sum().backward()
    own = dict(backbone.model.named_parameters())
    assert own.keys() == dict(model.named_parameters()).keys()
    wanted = {"all": ("",), "last:1": NAMES[family][1:], "last:2": NAMES[family]}[trainable]
    largest = max(float(parameter.grad.norm()) for parameter in model.parameters())
    for name, parameter in model.named_parameters():
        assert own[name].requires_grad == name.startswith(wanted), name
        if not own[name].requires_grad:
            assert own[name].grad is None
            continue
        scale = max(float(parameter.grad.norm()), 1e-2 * largest)  # of a key's bias it is rounding alone
        assert float((own[name].grad - parameter.grad).norm()) < 2e-5 * scale, name
    assert len(backbone.trainable_parameters()) == sum(p.requires_grad for p in own.values())


@pytest.mark.parametrize("trainable", ["all", "last:1"])
@pytest.mark.parametrize("family", FAMILIES)
def test_steps_change_what_trains_and_the_state_restores_bits(request, family, trainable):
    folder = request.getfixturevalue(family)
    backbone = Backbone.load(folder, quantize=None, trainable=trainable)
    assert backbone.trainable == trainable and backbone.lora is None and not backbone.adapters
    whole = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    before, vectors, key = backbone.trainable_state_dict(), pooled(backbone), backbone.cache_context(pooling="mean")
    optimizer = torch.optim.AdamW(backbone.trainable_parameters(), lr=1e-2)
    pooled(backbone.train(), requires_grad=True).square().sum().backward()
    optimizer.step()
    backbone.eval()
    tuned = backbone.trainable_state_dict()
    for name, value in backbone.model.state_dict().items():
        assert torch.equal(value, whole[name]) or name in before, f"{name} is frozen"
    assert any(not torch.equal(tuned[name], before[name]) for name in before)
    assert not torch.allclose(pooled(backbone), vectors, atol=1e-3)
    changed = backbone.cache_context(pooling="mean")
    assert changed["weights"] != key["weights"] and {**changed, "weights": key["weights"]} == key
    other = Backbone.load(folder, quantize=None, trainable=trainable)
    other.load_trainable_state_dict(tuned)
    assert torch.equal(pooled(other), pooled(backbone))
    backbone.load_trainable_state_dict(before)
    assert torch.equal(pooled(backbone), vectors) and backbone.cache_context(pooling="mean") == key
    assert all(p.requires_grad for p in backbone.trainable_parameters()), "loading leaves what trains"


def test_a_state_is_a_copy_and_must_fit(qwen2):
    backbone = Backbone.load(qwen2, quantize=None, trainable="last:1")
    state = backbone.trainable_state_dict()
    kept = {name: value.clone() for name, value in state.items()}
    with torch.no_grad():
        for parameter in backbone.trainable_parameters():
            parameter.zero_()
    assert all(torch.equal(state[name], kept[name]) for name in kept)
    first = next(iter(state))
    shaped = {**state, first: state[first][..., :1]}
    for bad, words in (
        ({name: value for name, value in state.items() if name != first}, "the state lacks 1 tensors"),
        ({**state, "embed_tokens.weight": state[first]}, "has unknown 1 tensors, first 'embed_tokens.weight'"),
        (shaped, f"has differently shaped 1 tensors, first {first!r}"),
    ):
        with pytest.raises(ValueError, match=words):
            backbone.load_trainable_state_dict(bad)
    assert not any(parameter.any() for parameter in backbone.trainable_parameters()), "nothing was changed"


def test_the_state_of_an_adapter_is_that_of_what_trains(bert):
    backbone = Backbone.load(bert, quantize=None, lora={"r": 2, "init": "random"})
    state, adapter = backbone.trainable_state_dict(), backbone.adapter_state_dict()
    assert state.keys() == adapter.keys() and all(torch.equal(state[name], adapter[name]) for name in state)
    for parameter in backbone.trainable_parameters():
        parameter.data.zero_()
    backbone.load_trainable_state_dict(state)
    assert all(torch.equal(value, state[name]) for name, value in backbone.adapter_state_dict().items())
    with pytest.raises(ValueError, match="trainable_state_dict|adapter_state_dict: this backbone has no"):
        Backbone.load(bert, quantize=None).trainable_state_dict()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"trainable": "all", "quantize": "nf4"}, "weights in 4 bits cannot train; give quantize=None"),
        ({"trainable": "last:0"}, "trainable must be None, 'all' or 'last:n' with n ≥ 1, got 'last:0'"),
        ({"trainable": "last"}, "got 'last'"),
        ({"trainable": "first:1"}, "got 'first:1'"),
        ({"trainable": True}, "got True"),
        ({"trainable": "last:3"}, "trainable must be at most 2, the blocks of the model, got 3"),
        ({"trainable": "all", "lora": 2}, "three ways to train; give one"),
    ],
)
def test_what_cannot_train(qwen2, settings, words):
    with pytest.raises(ValueError, match=words):
        Backbone.load(qwen2, **{"quantize": None, **settings})


def test_no_adapters_beside_weights_that_train(qwen2, tmp_path):
    Backbone.load(qwen2, quantize=None, lora=2).save_adapter(tmp_path)
    backbone = Backbone.load(qwen2, quantize=None, trainable="last:1")
    for add in (lambda: backbone.add_adapter("more", 2), lambda: backbone.load_adapter(tmp_path)):
        with pytest.raises(ValueError, match="adapters do not go with trainable, which is 'last:1' here"):
            add()
    for method in (backbone.merge, backbone.adapter_state_dict, lambda: backbone.save_adapter(tmp_path)):
        with pytest.raises(ValueError, match="no LoRA adapter or other adapter in use"):
            method()
    backbone.use_adapter(None)
    assert backbone.trainable_parameters(), "there is none to switch off"


def test_a_model_of_shared_blocks_has_no_last_one(tmp_path, save_byte_tokenizer):
    import transformers

    config = transformers.AlbertConfig(
        vocab_size=384, embedding_size=32, hidden_size=64, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=2,
    )  # fmt: skip
    transformers.AlbertModel(config, add_pooling_layer=False).save_pretrained(tmp_path)
    save_byte_tokenizer(tmp_path)
    assert Backbone.load(tmp_path, quantize=None, trainable="all").trainable_parameters()
    for settings in ({"trainable": "last:1"}, {"adapter": {}}, {"lora": {"r": 2, "last_layers": 1}}):
        with pytest.raises(ValueError, match="AlbertModel must have one list of its 3 blocks, found 0"):
            Backbone.load(tmp_path, quantize=None, **settings)
