"""LoRA adapters by name, on the last layers, several in a batch."""

from __future__ import annotations

import warnings

import pytest
import torch

from mmrec.llm import Backbone, EmbeddingCache, LoRAConfig, swap_linear
from mmrec_kernels import nf4_linear

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


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The adapter ids of each call of the kernel; None where there are none."""
    found: list[object] = []

    def counted(x, weight, bias, *, lora, adapter_ids):
        found.append(adapter_ids)
        return nf4_linear(x, weight, bias, lora=lora, adapter_ids=adapter_ids)

    monkeypatch.setattr(swap_linear, "nf4_linear", counted)
    return found


@pytest.mark.parametrize("family", FOLDERS)
def test_texts_of_several_adapters_are_one_pass(request, family, calls):
    """One call of each layer for all texts, and an adapter of NaN reaches no row of another's."""
    backbone = Backbone.load(request.getfixturevalue(family))
    for n, name in enumerate(("films", "shoes")):
        backbone.add_adapter(name, random(seed=n + 1))
    names = ["films", None, "shoes", "films"]
    expected = encode(backbone, adapters=names, layout="exact")
    calls.clear()
    found = encode(backbone, adapters=names)
    layers = len(backbone.quantized_layers())
    assert len(calls) == layers and all(ids is not None and len(ids) == len(calls[0]) for ids in calls)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    for key, parameter in backbone.model.named_parameters():
        if ".shoes." in key:
            parameter.data.fill_(torch.nan)
    poisoned = encode(backbone, adapters=names)
    assert torch.equal(poisoned[[0, 1, 3]], found[[0, 1, 3]]) and poisoned[2].isnan().all()
    calls.clear()
    encode(backbone, adapters=["films"] * 4)
    encode(backbone, adapters=[None] * 4)
    assert len(calls) == 2 * layers and all(ids is None for ids in calls), "texts of one adapter need no ids"


def test_layers_that_stay_dense_keep_adapters_apart(make_bert, tmp_path):
    """bitsandbytes cannot decode a width of 96: such layers are peft's own."""
    backbone = Backbone.load(make_bert(tmp_path, hidden=96))
    for n, name in enumerate(("films", "shoes")):
        backbone.add_adapter(name, random(seed=n + 1))
    names = ["films", None, "shoes", "films"]
    assert "is not computed by the kernel" in str(backbone.why_not_together(names))
    found = encode(backbone, adapters=names)
    for n, name in enumerate(names):
        with backbone.under(name):
            torch.testing.assert_close(found[n], encode(backbone)[n], atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="adapters: these texts cannot be computed together: .*not computed by"):
        backbone.forward_rows(torch.arange(3), input_ids=torch.tensor([4, 5]), adapters=["films", "shoes"])
    with pytest.raises(ValueError, match="cannot be computed together: the texts are not packed"):
        backbone.forward_rows(
            torch.arange(3), input_ids=torch.tensor([4, 5]), layout="padded", adapters=["films", "shoes"]
        )


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_gradients_of_several_adapters_reach_the_one_in_use(qwen2, quantize, calls):
    backbone = Backbone.load(qwen2, quantize=quantize)
    for n, name in enumerate(("films", "shoes")):
        backbone.add_adapter(name, random(seed=n + 1))
    backbone.use_adapter("shoes")
    names = ["films", "shoes", None, "shoes"]
    weights = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    trains = [parameter.requires_grad for parameter in backbone.parameters()]
    (encode(backbone, adapters=names, requires_grad=True) * weights).sum().backward()
    assert [parameter.requires_grad for parameter in backbone.parameters()] == trains
    assert all(ids is None for ids in calls), "adapter by adapter"
    found = [parameter.grad.clone() for parameter in backbone.trainable_parameters()]
    assert sum(p.grad is not None for p in backbone.parameters()) == len(found) == 2 * 14
    for parameter in backbone.trainable_parameters():
        parameter.grad = None
    own = [1, 3]
    alone = encode(backbone, [TEXTS[n] for n in own], requires_grad=True)
    (alone * weights[own]).sum().backward()
    for gradient, parameter in zip(found, backbone.trainable_parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_soft_prompts_prefixes_and_tokens_under_several_adapters(qwen2, quantize):
    backbone = Backbone.load(qwen2, quantize=quantize)
    for n, name in enumerate(("films", "shoes")):
        backbone.add_adapter(name, random(seed=n + 1))
    names = ["films", None, "shoes", "films"]
    prompt = backbone.soft_prompt({"task": (1, 3), "user": (2, 1)})
    with backbone.under(None):
        prefix = backbone.prefix(["night star", "war"])
    for settings in (
        {"soft_prompt": prompt, "soft_ids": {"user": [1, 0, -1, 1]}},
        {"prefix": prefix, "prefix_ids": [1, 0, 0, 1]},
        {"pooling": "tokens"},
    ):
        found = backbone.encode(TEXTS, progress=False, adapters=names, **settings)
        for name in dict.fromkeys(names):
            with backbone.under(name):
                alone = backbone.encode(TEXTS, progress=False, **settings)
            for n in (n for n in range(4) if names[n] == name):
                torch.testing.assert_close(found.item(n), alone.item(n), atol=2e-5, rtol=1e-4)


def test_under_leaves_all_as_it_was(qwen2):
    backbone = Backbone.load(qwen2, lora=random(seed=1))
    backbone.add_adapter("other", random(seed=2))
    expected, trains = encode(backbone), [p.requires_grad for p in backbone.parameters()]
    for name in ("other", None, "default"):
        with pytest.raises(RuntimeError, match="inside"), backbone.under(name):
            assert backbone.adapter == name and [p.requires_grad for p in backbone.parameters()] == trains
            raise RuntimeError("inside")
        with backbone.under("other"):
            with backbone.under(name):
                pass
            assert backbone.adapter == "other" and [p.requires_grad for p in backbone.parameters()] == trains
        assert backbone.adapter == "default" and torch.equal(encode(backbone), expected)
        assert [p.requires_grad for p in backbone.parameters()] == trains
    with pytest.raises(ValueError, match="there is no adapter 'hats'"), backbone.under("hats"):
        pass


@pytest.mark.parametrize("names", [("layers", "q_proj"), ("a", "lora_A"), ("weight", "default-2")], ids=str)
def test_names_that_are_parts_of_other_names(qwen2, tmp_path, names):
    """peft's own filter takes "layers" for a part of every key of every adapter."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    backbone = Backbone.load(qwen2, quantize=None, kernels=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for n, name in enumerate(names):
            backbone.add_adapter(name, random(seed=n, last_layers=n + 1))
    for n, name in enumerate(names):
        state = backbone.adapter_state_dict(name)
        assert len(state) == 2 * 7 * (n + 1) and not any(f".{name}." in key.split(".lora_")[1] for key in state)
        backbone.save_adapter(tmp_path / name, name)
        theirs = peft.PeftModel.from_pretrained(transformers.AutoModel.from_pretrained(qwen2), tmp_path / name).eval()
        assert peft.get_peft_model_state_dict(theirs).keys() == state.keys()
        ids = torch.tensor([backbone.tokenizer(TEXTS[0])["input_ids"]])
        with torch.no_grad(), backbone.under(name):
            assert torch.equal(theirs(input_ids=ids).last_hidden_state, backbone.forward_tokens(ids))


def test_an_adapter_that_does_not_fit_is_not_left_behind(qwen2, make_bert, tmp_path):
    Backbone.load(make_bert(tmp_path / "bert", seed=2), lora=2).save_adapter(tmp_path / "other")
    Backbone.load(qwen2, lora=LoRAConfig(2, last_layers=1)).save_adapter(tmp_path / "late")
    Backbone.load(qwen2, adapter={"inner": 4}).save_adapter(tmp_path / "inserted")
    backbone = Backbone.load(qwen2)
    expected = encode(backbone)
    with pytest.raises(ValueError):
        backbone.load_adapter(tmp_path / "other", "films")
    assert not backbone.adapters and backbone.adapter is None and torch.equal(encode(backbone), expected)
    backbone.add_adapter("films", 2)
    with pytest.raises(ValueError, match="the adapter state lacks 14 tensors"):
        backbone.load_adapter(tmp_path / "late", "films")
    with pytest.raises(ValueError, match="bottleneck adapters go with no other adapter"):
        backbone.load_adapter(tmp_path / "inserted", "shoes")
    with pytest.raises(ValueError, match="the adapter has inner=4.*'films' has r=2"):
        backbone.load_adapter(tmp_path / "inserted", "films")
    assert list(backbone.adapters) == ["films"]
    file = tmp_path / "inserted" / "bottleneck_adapter.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match="is damaged"):
        Backbone.load(qwen2).load_adapter(tmp_path / "inserted")


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("requantize", [False, True])
def test_merging_what_is_left_of_two(qwen2, quantize, requantize):
    """The other one's layers are peft's still, but without an adapter."""
    backbone = Backbone.load(qwen2, quantize=quantize)
    backbone.add_adapter("everywhere", random(seed=1))
    backbone.add_adapter("late", random(seed=2, last_layers=1))
    backbone.use_adapter("late")
    backbone.remove_adapter("everywhere")
    assert backbone.adapter == "late" and len(backbone.trainable_parameters()) == 2 * 7
    expected = encode(backbone)
    backbone.merge(requantize=requantize)
    tolerance = 0.3 if quantize and requantize else 1e-5
    assert (encode(backbone) - expected).norm() < tolerance * expected.norm()
    assert not backbone.adapters and not backbone.trainable_parameters()
