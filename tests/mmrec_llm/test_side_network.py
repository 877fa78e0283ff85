"""Hidden states of several layers against the model's own, their cache, and the network that trains on them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from mmrec.llm import Backbone, EmbeddingCache, SideNetwork
from mmrec.llm.layers import layers_of

POOLED = {
    "mean": lambda h: h.mean(0),
    "weighted": lambda h: (torch.arange(1.0, len(h) + 1) / (len(h) * (len(h) + 1) / 2)) @ h,
    "last": lambda h: h[-1],
    "cls": lambda h: h[0],
}


def states(backbone: Backbone, text: str) -> list[torch.Tensor]:
    """`[len, d]` per layer of one text alone, as transformers gives them."""
    ids = backbone.tokenizer(text, truncation=True, max_length=backbone.max_length)["input_ids"]
    with torch.no_grad():
        found = backbone.model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
    return [state[0] for state in found]


@pytest.mark.parametrize("pooling", sorted(POOLED))
@pytest.mark.parametrize("kernels", [True, False])
def test_layers_are_the_models_own(model_folder, texts, pooling, kernels):
    """Packed and exact batches of several texts against one text at a time."""
    backbone = Backbone.load(model_folder, quantize=None, kernels=kernels)
    found = backbone.encode_layers(texts, (1, 0, 2), pooling=pooling, batch_tokens=24)
    assert found.dtype == torch.float32 and found.shape == (len(texts), 3, 64) and not found.requires_grad
    for row, text in zip(found, texts, strict=True):
        alone = states(backbone, text)
        expected = torch.stack([POOLED[pooling](alone[layer]) for layer in (1, 0, 2)])
        torch.testing.assert_close(row, expected, atol=4e-6, rtol=1e-5)
    last = backbone.encode(texts, pooling=pooling, batch_tokens=24).pooled
    torch.testing.assert_close(found[:, 2], last, atol=1e-6, rtol=1e-6)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(found[:, 0], found[:, 2], atol=1e-2, rtol=1e-2)


def test_padded_rows_hold_layers_too(qwen2):
    """`forward_rows` in the layout that pads: texts of one length, and of several."""
    backbone = Backbone.load(qwen2, quantize=None)
    for lengths in ([3, 3], [1, 4, 2]):
        ids = torch.arange(sum(lengths)) + 40
        offsets = torch.tensor([0, *lengths]).cumsum(0)
        with torch.no_grad():
            packed, padded = (
                backbone.forward_rows(offsets, input_ids=ids, layout=layout, layers=(2, 1))
                for layout in ("packed", "padded")
            )
        assert packed.shape == (len(ids), 128)
        torch.testing.assert_close(packed, padded, atol=4e-6, rtol=1e-5)


def test_texts_without_tokens_and_no_texts(qwen2):
    backbone = Backbone.load(qwen2, quantize=None)
    found = backbone.encode_layers(["", "red hat", ""], 2)
    assert not found[0].any() and not found[2].any() and found[1].all(dim=1).all()
    assert backbone.encode_layers([], 2).shape == (0, 2, 64)


@pytest.mark.parametrize(("blocks", "count", "layers"), [(6, 3, (2, 4, 6)), (6, 4, (1, 3, 4, 6)), (5, 1, (5,))])
def test_evenly_spaced_layers_end_with_the_last(make_bert, tmp_path, blocks, count, layers):
    backbone = Backbone.load(make_bert(tmp_path), quantize=None)
    backbone.model.config.num_hidden_layers = blocks
    assert layers_of(backbone, count) == layers == layers_of(backbone, list(layers))


@pytest.mark.parametrize(
    "layers", [0, 3, True, -1, "12", (), (0, 3), (1, 1), (-1,), (1.0,), (True,), None], ids=repr
)  # fmt: skip
def test_layers_that_are_not_there(bert, layers):
    backbone = Backbone.load(bert, quantize=None)
    with pytest.raises(ValueError, match="layers must be .*2"):
        backbone.encode_layers(["red"], layers)
    with pytest.raises(ValueError, match="pooling must give one vector per text and layer, got 'tokens'"):
        backbone.encode_layers(["red"], 1, pooling="tokens")


def test_the_cache_tells_layers_and_adapters_apart(qwen2, texts, tmp_path, monkeypatch):
    backbone = Backbone.load(qwen2, lora={"r": 2, "init": "random"})
    cache = EmbeddingCache(tmp_path)
    pooled = backbone.encode(texts, cache=cache).pooled
    two = backbone.encode_layers(texts, 2, cache=cache)
    other = backbone.encode_layers(texts, (0, 2), cache=cache)
    assert torch.equal(two[:, 1], other[:, 1]) and not torch.equal(two[:, 0], other[:, 0])
    backbone.use_adapter(None)
    plain = backbone.encode_layers(texts, 2, cache=cache)
    assert not torch.allclose(plain, two, atol=1e-3)
    assert not torch.allclose(backbone.encode_layers(texts, 2, cache=cache, pooling="last"), plain, atol=1e-3)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(Backbone, "forward_rows", never)
    assert torch.equal(backbone.encode_layers(texts, 2, cache=cache), plain)
    backbone.use_adapter("default")
    assert torch.equal(backbone.encode_layers(texts, (1, 2), cache=cache), two), "2 of 2 layers are layers 1 and 2"
    assert torch.equal(backbone.encode(texts, cache=cache).pooled, pooled)
    with pytest.raises(AssertionError, match="computed again"):
        backbone.encode_layers(texts, 2, cache=cache, template_version="2")


def by_hand(network: SideNetwork, hidden: torch.Tensor) -> torch.Tensor:
    """In float64, sentence by sentence of the docstring."""
    found = None
    for layer in range(hidden.shape[1]):
        x = hidden[:, layer].double()
        if network.project is not None:
            linear = network.project[layer]
            x = x @ linear.weight.double().T + linear.bias.double()
        if found is not None:
            gate = 1 / (1 + torch.exp(-network.gate[layer - 1].double()))
            x = gate * found + (1 - gate) * x
        adapter = network.adapters[layer]
        centred = x - x.mean(1, keepdim=True)
        normed = centred / (centred.square().mean(1, keepdim=True) + 1e-5).sqrt()
        normed = normed * adapter.norm.weight.double() + adapter.norm.bias.double()
        inner = normed @ adapter.down.weight.double().T + adapter.down.bias.double()
        inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
        found = x + inner @ adapter.up.weight.double().T + adapter.up.bias.double()
    assert found is not None
    return found


@pytest.mark.parametrize(("layers", "inner", "side"), [(1, None, None), (3, 5, None), (4, None, 7), (2, 3, 1)])
@pytest.mark.parametrize("texts", [0, 1, 6])
def test_the_network_by_hand(layers, inner, side, texts):
    torch.manual_seed(1)
    network = SideNetwork(12, layers, inner=inner, side=side)
    hidden = torch.randn(texts, layers, 12)
    if side is None:  # at first the adapters are the identity, and a twentieth of what was before goes on
        expected = hidden[:, 0]
        for layer in range(1, layers):
            expected = 0.04742587317756678 * expected + 0.9525741268224334 * hidden[:, layer]
        torch.testing.assert_close(network(hidden), expected)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter))
    found = network(hidden)
    assert found.shape == (texts, side or 12)
    torch.testing.assert_close(found.double(), by_hand(network, hidden), atol=1e-5, rtol=1e-4)


def test_every_parameter_learns_and_the_backbone_is_not_asked(qwen2, texts, monkeypatch):
    """From cached states a target that only the first layer shows is learned, without one pass of the model."""
    backbone = Backbone.load(qwen2, quantize=None)
    hidden = backbone.encode_layers(texts, 2)
    before = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    monkeypatch.setattr(type(backbone.model), "forward", None)
    torch.manual_seed(0)
    target = hidden[:, 0] @ torch.randn(64, 8) / 8
    network = nn.Sequential(SideNetwork(64, 2, side=8))
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-2, weight_decay=0.0)
    losses = []
    for _ in range(60):
        losses.append((network(hidden) - target).square().mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.1 * losses[0]
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in network.parameters())
    assert all(parameter.grad is None for parameter in backbone.parameters())
    assert all(torch.equal(value, before[name]) for name, value in backbone.model.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "shape", "words"),
    [
        ((0, 2), None, "width must be at least 1, got 0"),
        ((4, 0), None, "layers must be at least 1, got 0"),
        ((4, 2), (3, 2, 5), r"hidden must be \[n, 2, 4\], got \[3, 2, 5\]"),
        ((4, 2), (3, 3, 4), r"hidden must be \[n, 2, 4\], got \[3, 3, 4\]"),
        ((4, 2), (3, 8), r"hidden must be \[n, 2, 4\], got \[3, 8\]"),
    ],
)
def test_bad_shapes(arguments, shape, words):
    with pytest.raises(ValueError, match=words):
        network = SideNetwork(*arguments)
        network(torch.zeros(shape))
    with pytest.raises(ValueError, match="side must be at least 1, got 0"):
        SideNetwork(4, 2, side=0)
    with pytest.raises(ValueError, match="inner must be at least 1, got 0"):
        SideNetwork(4, 2, inner=0)
