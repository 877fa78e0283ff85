"""What trains of the language model in a whole training: adapters, its own weights, or a network beside it."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rec_helpers import KNOWN, config, inputs

from mmrec.evaluation import Split, split
from mmrec.fusion import Tokens, Whitening
from mmrec.llm import AdapterConfig, Backbone, LoRAConfig, SideNetwork
from mmrec.recommender import Recommender, RecommenderConfig
from mmrec.recommender.encoder import ItemEncoder
from mmrec.recommender.side import LayerWhitening
from mmrec.recommender.training import Trained, load_backbone, loop, prepare_content, train

SMALL: dict[str, Any] = {
    "modalities": ("identity", "text"), "width": 16, "heads": 1, "item_heads": 1, "layers": 1, "expert_hidden": 8,
    "batch_size": 16, "epochs": 2, "text_max_length": 16, "text_rank": 24, "tune_items": 4, "max_length": 8,
    "quantize": None, "backbone_learning_rate": 1e-2,
}  # fmt: skip


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A BERT of two blocks with random weights, one token per letter."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("model")
    letters = [chr(code) for code in range(33, 127)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    transformers.BertTokenizer(str(folder / "vocab.txt"), model_max_length=32).save_pretrained(folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.BertModel(transformers.BertConfig(vocab_size=len(words), initializer_range=0.2, **sizes))
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Split]:
    pytest.importorskip("polars")
    from mmrec.adaptation import generate_catalogue

    folder = tmp_path_factory.mktemp("data") / "shop"
    catalogue = generate_catalogue(folder, users=30, items=24, cold_items=3, mean_length=6.0, image_size=16, seed=3)
    return catalogue, split(catalogue, "S")


def trained(data: tuple[Any, Split], settings: RecommenderConfig, folder: Path, *, resume: bool = False) -> Trained:
    catalogue, parts = data
    with torch.random.fork_rng(devices=[]):  # loading draws adapters; what follows has its own seed
        content = prepare_content(catalogue, settings, parts.popularity > 0)
    return train(content, parts, settings, folder, {"config": settings.to_dict()}, resume=resume)


WAYS = [
    {"tune_backbone": True, "lora_rank": 2},
    {"tune_backbone": True, "tune": "adapter"},
    {"tune_backbone": True, "tune": "all"},
    {"tune_backbone": True, "tune": "last:1"},
    {"side_layers": 2},
]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_training_is_interrupted_resumed_and_reads_new_items(
    data: tuple[Any, Split], bert: str, way: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = RecommenderConfig(backbone=bert, **SMALL, **way)
    whole = trained(data, settings, tmp_path / "whole")
    step, done = loop._Loop._step, []

    def interrupted(self: loop._Loop, batch: loop.Batch) -> float:
        done.append(1)
        if len(done) == 3:
            signal.raise_signal(signal.SIGINT)
        return step(self, batch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop._Loop, "_step", interrupted)
        trained(data, settings, tmp_path / "halves")
    halves = trained(data, settings, tmp_path / "halves", resume=True)
    assert torch.equal(halves.items.vectors, whole.items.vectors)
    assert halves.adapter.keys() == whole.adapter.keys()
    assert all(torch.equal(halves.adapter[name], whole.adapter[name]) for name in whole.adapter)
    assert bool(whole.adapter) == settings.tune_backbone
    catalogue, parts = data
    recipe = prepare_content(catalogue, settings, parts.popularity > 0).recipe
    encoder = ItemEncoder(whole.model, recipe, catalogue.item_ids, adapter=whole.adapter)
    rows = encoder.encode_part(catalogue, 0, catalogue.num_items)
    torch.testing.assert_close(rows.vectors, whole.items.vectors, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("way", "changed"),
    [
        ({"tune": "lora", "lora_rank": 2}, "lora_"),
        ({"tune": "adapter"}, "mmrec_adapter"),
        ({"tune": "all"}, ""),
        ({"tune": "last:1"}, "encoder.layer.1."),
    ],
)
def test_what_is_tuned_changes_and_nothing_else(
    data: tuple[Any, Split], bert: str, way: dict[str, Any], changed: str, tmp_path: Path
) -> None:
    settings = RecommenderConfig(backbone=bert, **SMALL, tune_backbone=True, **way)
    found = trained(data, settings, tmp_path).adapter
    fresh = load_backbone(settings)
    assert found.keys() == fresh.trainable_state_dict().keys() and all(changed in name for name in found)
    moved = [name for name, value in fresh.trainable_state_dict().items() if not torch.equal(found[name], value)]
    assert len(moved) > len(found) / 2
    kinds = {"lora": LoRAConfig, "adapter": AdapterConfig}
    assert [type(c) for c in fresh.adapters.values()] == ([kinds[settings.tune]] if settings.tune in kinds else [])
    assert fresh.trainable == (None if settings.tune in kinds else settings.tune)
    frozen = load_backbone(settings.replace(tune_backbone=False))
    assert frozen.trainable is None and frozen.lora == LoRAConfig(settings.lora_rank)


def test_side_layers_are_the_backbones(data: tuple[Any, Split], bert: str, tmp_path: Path) -> None:
    """All fields' texts, pooled per layer, side by side; read from the cache the second time."""
    catalogue, parts = data
    settings = RecommenderConfig(backbone=bert, **SMALL, side_layers=2)
    content = prepare_content(catalogue, settings, parts.popularity > 0, cache=tmp_path)
    plain = prepare_content(catalogue, settings.replace(side_layers=0), parts.popularity > 0)
    tokens, last = content.inputs.tokens["text"], plain.inputs.tokens["text"]
    assert content.backbone is None and content.inputs.spec.tokens["text"].width == 64
    assert torch.equal(tokens.offsets, last.offsets) and torch.equal(tokens.kind, last.kind)
    torch.testing.assert_close(tokens.values[:, 32:], last.values, atol=2e-6, rtol=1e-5)
    texts = content.inputs.texts
    assert texts is not None
    expected = Backbone.load(bert, quantize=None, max_length=16).encode_layers(texts, (1, 2))
    torch.testing.assert_close(tokens.values, expected.flatten(1), atol=2e-6, rtol=1e-5)
    again = prepare_content(catalogue, settings, parts.popularity > 0, cache=tmp_path)
    assert torch.equal(again.inputs.tokens["text"].values, tokens.values)
    with pytest.raises(ValueError, match="layers must be 1 to 2, the blocks of the model, got 3"):
        prepare_content(catalogue, settings.replace(side_layers=3), parts.popularity > 0)


def test_each_layer_is_whitened_for_itself() -> None:
    generator = torch.Generator().manual_seed(0)
    offsets, kind = torch.arange(31), torch.arange(30) % 2
    parts = [torch.randn(30, 5, generator=generator) * size + size for size in (1.0, 20.0, 0.1)]
    items = torch.arange(25)
    both = Tokens(torch.cat(parts, dim=1), offsets, kind)
    together = LayerWhitening(15, 2, 3, 3).fit(both, items)
    found = together(both.values, kind).chunk(3, dim=1)
    for part, white in zip(parts, found, strict=True):
        alone = Whitening(5, 2, 3).fit(Tokens(part, offsets, kind), items)
        assert torch.equal(white, alone(part, kind))
    with pytest.raises(ValueError, match="text vectors must hold side_layers = 4 layers of one width, got width 15"):
        LayerWhitening(15, 2, 3, 4)


def test_the_item_tower_reads_several_layers() -> None:
    """`rec_helpers`' six numbers per text as three layers of two: whitened once or in the model, to the same bits; the
    vector follows every layer, and every parameter of the side network learns."""
    settings = config("identity", "text", side_layers=3, text_rank=2)
    content, items = inputs(), torch.from_numpy(KNOWN)
    torch.manual_seed(3)
    model = Recommender(settings, content.spec, np.isin(np.arange(12), KNOWN)).double().eval()
    model.item_tower.fit_whitening(content, items)
    side: Any = model.item_tower.project["text"]
    assert isinstance(model.item_tower.whiten["text"], LayerWhitening)
    assert any(isinstance(part, SideNetwork) and part.layers == 3 for part in side.modules())
    with torch.no_grad():
        for parameter in side.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    known = content.select(items)
    expected = model.encode(known, items).vectors
    assert torch.equal(model.encode(model.item_tower.whiten_inputs(known), items).vectors, expected)
    with_text = torch.tensor([len(row) > 0 for row in np.split(np.arange(15), content.tokens["text"].offsets[1:-1])])
    for layer in range(3):
        values = content.tokens["text"].values.clone()
        values[:, 2 * layer : 2 * layer + 2] += torch.tensor([0.5, -1.0])
        other = model.encode(content.with_text(values).select(items), items).vectors
        assert torch.equal((other != expected).any(1), with_text[items]), layer
    expected.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in side.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tune": "full"}, "tune must be 'lora', 'adapter', 'all' or 'last:n' with n ≥ 1, got 'full'"),
        ({"tune": "last:0"}, "tune must be .*got 'last:0'"),
        ({"tune": "all", "tune_backbone": True}, "tune_backbone needs quantize None for tune 'all', got 'nf4'"),
        ({"tune": "last:2", "tune_backbone": True}, "needs quantize None for tune 'last:2'"),
        ({"side_layers": 2, "tune_backbone": True}, "tune_backbone needs side_layers 0.*got 2"),
        ({"side_layers": 2, "text_level": "tokens"}, "side_layers needs text_level 'fields', got 'tokens'"),
    ],
)
def test_settings_that_do_not_go_together(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RecommenderConfig(**changes)


def test_settings_that_do() -> None:
    for changes in ({"tune": "adapter"}, {"tune": "all", "quantize": None}, {"tune": "last:12", "quantize": None}):
        found = RecommenderConfig(tune_backbone=True, lora_rank=0, **changes)
        assert RecommenderConfig.from_json(found.to_json()) == found
    assert RecommenderConfig(tune="all").quantize == "nf4", "without tune_backbone it says nothing"
