"""Texts in one row, and texts that go on from a shared prefix: against the same texts one by one and whole."""

from __future__ import annotations

import pytest
import torch
from swap_models import relative

from mmrec.llm import Backbone, Prefix, packed
from mmrec.llm.tokenizing import tokenize

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

HISTORY = "red shoe blue hat green film star war"
ITEMS = ["new phone", "old", "small hat with red star and blue war film", "big night"]


def whole(backbone: Backbone, *texts: str) -> torch.Tensor:
    """Hidden states of the last text behind the others, by one plain forward of the model's own attention."""
    ids = [tokenize(backbone, [text], special=i == 0)[0] for i, text in enumerate(texts)]
    backbone.model.set_attn_implementation("sdpa")
    try:
        with torch.no_grad():
            hidden = backbone.model(input_ids=torch.tensor([sum(ids, [])])).last_hidden_state[0]
    finally:
        backbone.eval()
    return hidden[-len(ids[-1]) :].float()


def tokens_of(backbone: Backbone, texts: list[str], **arguments: object) -> list[torch.Tensor]:
    found = backbone.encode(texts, pooling="tokens", **arguments)
    return [found.item(i).float() for i in range(len(texts))]


@pytest.mark.parametrize("cascade_below", [0, 100])
@pytest.mark.parametrize("lora", [None, {"r": 4, "init": "random"}])
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_texts_go_on_from_a_prefix(qwen2, quantize, lora, cascade_below, monkeypatch):
    monkeypatch.setattr(packed, "_CASCADE_BELOW", cascade_below)
    backbone = Backbone.load(qwen2, quantize=quantize, lora=lora)
    prefix = backbone.prefix(HISTORY)
    assert prefix.lengths.tolist() == [len(tokenize(backbone, [HISTORY], special=True)[0])]
    assert (
        prefix.nbytes == 2 * 2 * int(prefix.lengths) * 2 * 16 * 4
    )  # layers, key and value, tokens, heads, width, float
    for batch_tokens in (4096, 8):
        for item, found in zip(
            ITEMS, tokens_of(backbone, ITEMS, prefix=prefix, batch_tokens=batch_tokens), strict=True
        ):
            assert relative(found, whole(backbone, HISTORY, item)) < 2e-6


@pytest.mark.parametrize("cascade_below", [0, 100])
def test_a_prefix_in_bfloat16_is_no_further_off_than_the_whole_text(qwen2, cascade_below, monkeypatch):
    monkeypatch.setattr(packed, "_CASCADE_BELOW", cascade_below)
    exact = Backbone.load(qwen2, quantize=None)
    backbone = Backbone.load(qwen2, quantize=None, dtype=torch.bfloat16)
    found = torch.cat(tokens_of(backbone, ITEMS, prefix=backbone.prefix(HISTORY)))
    stock = torch.cat([whole(backbone, HISTORY, item) for item in ITEMS])
    wanted = torch.cat([whole(exact, HISTORY, item) for item in ITEMS])
    assert relative(found, wanted) < 2 * relative(stock, wanted)


@pytest.mark.parametrize("cascade_below", [0, 100])
def test_several_prefixes_in_one_call(qwen2, cascade_below, monkeypatch):
    monkeypatch.setattr(packed, "_CASCADE_BELOW", cascade_below)
    backbone = Backbone.load(qwen2, quantize=None)
    users = [HISTORY, "old film", "blue"]
    prefix = backbone.prefix(users)
    chosen = [2, 0, 2, 0]  # none goes on from the second one
    for item, user, found in zip(
        ITEMS, chosen, tokens_of(backbone, ITEMS, prefix=prefix, prefix_ids=chosen), strict=True
    ):
        assert relative(found, whole(backbone, users[user], item)) < 2e-6
    same = backbone.encode(["old", "old"], prefix=prefix, prefix_ids=torch.tensor([0, 1]), pooling="last").pooled
    assert not torch.equal(same[0], same[1])


def test_a_prefix_behind_a_prefix(qwen2):
    backbone = Backbone.load(qwen2, quantize=None)
    users, contexts = [HISTORY, "old film", "blue"], ["big", "night star war", "green hat"]
    prefix = backbone.prefix(contexts, behind=backbone.prefix(users))
    for i in range(3):
        (found,) = tokens_of(backbone, ["small phone"], prefix=prefix, prefix_ids=[i])
        assert relative(found, whole(backbone, users[i], contexts[i], "small phone")) < 2e-6
    with pytest.raises(ValueError, match="behind must have 1 texts, got 3"):
        backbone.prefix("red", behind=prefix)


def test_a_prefix_is_not_copied_per_text(qwen2, monkeypatch):
    backbone = Backbone.load(qwen2, quantize=None)
    prefix = backbone.prefix(HISTORY)
    real, seen = packed.cross_modal_attention, []

    def spy(query, segments, *args, **kwargs):
        seen.append((len(query), segments[0].key.data_ptr(), len(segments[0].key)))
        return real(query, segments, *args, **kwargs)

    monkeypatch.setattr(packed, "cross_modal_attention", spy)
    backbone.encode(ITEMS, prefix=prefix)
    tokens = sum(len(row) for row in tokenize(backbone, ITEMS, special=False))
    backbone.encode(["?", "!"], prefix=prefix)  # of one token each: by cascade
    for layer in (0, 1):
        key = prefix.layers[layer][0]
        assert {(n, key.data_ptr(), len(key)) for n in (tokens, 2)} <= set(seen)


def test_a_prefix_without_the_adapter(qwen2):
    """aLoRA: what comes before the invocation is the base model's, whatever the adapter."""
    backbone = Backbone.load(qwen2, lora={"r": 4, "init": "random"})
    with_adapter, without = backbone.prefix(HISTORY), backbone.prefix(HISTORY, adapter=False)
    plain = Backbone.load(qwen2).prefix(HISTORY)
    for layer, (key, value) in without.layers.items():
        assert torch.equal(key, plain.layers[layer][0]) and torch.equal(value, plain.layers[layer][1])
        assert not torch.equal(value, with_adapter.layers[layer][1])


def test_a_prefix_of_the_base_model_is_that_of_alora(qwen2):
    """Against peft's aLoRA over the whole text, where the items' text begins with the invocation."""
    import peft

    backbone = Backbone.load(qwen2, quantize=None, lora={"r": 4, "init": "random"})
    invocation = tokenize(backbone, ["now"], special=False)[0]
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", alora_invocation_tokens=invocation
    )
    model = peft.get_peft_model(transformers.Qwen2ForCausalLM.from_pretrained(qwen2), config).eval()
    state = {k.replace("model.layers", "model.model.layers"): v for k, v in backbone.adapter_state_dict().items()}
    loaded = peft.set_peft_model_state_dict(model, state)
    assert not loaded.unexpected_keys
    text = [tokenize(backbone, [part], special=False)[0] for part in (HISTORY, "now small phone")]
    assert text[1][: len(invocation)] == invocation
    with torch.no_grad():
        whole = model(input_ids=torch.tensor([sum(text, [])]), output_hidden_states=True).hidden_states[-1][0]
    (found,) = tokens_of(backbone, ["now small phone"], prefix=backbone.prefix(HISTORY, adapter=False))
    assert relative(found, whole[len(text[0]) :]) < 2e-6
    (other,) = tokens_of(backbone, ["now small phone"], prefix=backbone.prefix(HISTORY))
    assert relative(other, whole[len(text[0]) :]) > 1e-2


@pytest.mark.parametrize("cascade_below", [0, 100])
def test_gradients_through_packed_texts_that_go_on_from_a_prefix(qwen2, cascade_below, monkeypatch):
    monkeypatch.setattr(packed, "_CASCADE_BELOW", cascade_below)
    backbone = Backbone.load(qwen2, quantize=None, lora={"r": 4, "init": "random"})
    prefix = backbone.prefix(HISTORY, adapter=False)
    weight = torch.linspace(-1, 1, len(ITEMS) * 64).view(-1, 64)
    leaves = backbone.trainable_parameters()
    pooled = backbone.encode(ITEMS, prefix=prefix, pooling="mean", requires_grad=True).pooled
    found = torch.autograd.grad((pooled * weight).sum(), leaves)

    def by_cache(item: str) -> torch.Tensor:
        from transformers import DynamicCache

        cache = DynamicCache(config=backbone.model.config)
        for layer, pair in prefix.layers.items():
            cache.update(*(x.transpose(0, 1).unsqueeze(0) for x in pair), layer)
        ids = torch.tensor(tokenize(backbone, [item], special=False))
        return backbone.model(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state[0].mean(0)

    backbone.model.set_attn_implementation("sdpa")
    wanted = torch.autograd.grad((torch.stack([by_cache(item) for item in ITEMS]) * weight).sum(), leaves)
    for a, b in zip(found, wanted, strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, atol=2e-5 * float(b.abs().max()), rtol=1e-4)


def test_it_is_the_default_where_it_can_be(qwen2, bert):
    for folder in (qwen2, bert):
        assert Backbone.load(folder).why_not_packed is None
        stock = Backbone.load(folder, kernels=False)
        assert stock.model.config._attn_implementation == "sdpa"
        assert stock.why_not_packed == "its attention is not that of the kernels"
        with pytest.raises(ValueError, match="layout: this backbone cannot take packed texts"):
            stock.encode(["red"], layout="packed")
        with pytest.raises(ValueError, match="prefix: this backbone cannot take packed texts"):
            stock.prefix("red")


def test_encoders_that_count_positions_from_behind_the_padding(tmp_path, save_byte_tokenizer):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.XLMRobertaConfig(vocab_size=384, max_position_embeddings=42, pad_token_id=5, **sizes)
    transformers.XLMRobertaModel(config).save_pretrained(tmp_path)
    save_byte_tokenizer(tmp_path)
    backbone, stock = (Backbone.load(tmp_path, quantize=None, max_length=36, kernels=k) for k in (True, False))
    assert backbone.why_not_packed is None
    texts = [*ITEMS, "?" * 36]
    for found, wanted in zip(tokens_of(backbone, texts), tokens_of(stock, texts), strict=True):
        assert relative(found, wanted) < 2e-6


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_models_whose_angles_depend_on_the_longest_text(kind, tmp_path, save_byte_tokenizer):
    """Beyond its original length such a model turns all positions of a row by other angles: texts that are longer are
    not packed with others, shorter ones are."""
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "original_max_position_embeddings": 20}
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0, **(factors if kind == "longrope" else {})}
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(
        vocab_size=384, max_position_embeddings=64 if kind == "longrope" else 20, rope_parameters=rope, **sizes
    )
    transformers.LlamaModel(config).save_pretrained(tmp_path)
    save_byte_tokenizer(tmp_path)
    short = [item[:12] for item in ITEMS]
    stock = Backbone.load(tmp_path, quantize=None, max_length=18, kernels=False)
    backbone = Backbone.load(tmp_path, quantize=None, max_length=18)
    assert backbone.why_not_packed is None
    for found, wanted in zip(tokens_of(backbone, short), tokens_of(stock, short), strict=True):
        assert relative(found, wanted) < 2e-6
    with pytest.raises(ValueError, match=r"(no longer than|more positions than the model has,) 20"):
        backbone.encode(["0123456789"], prefix=backbone.prefix("0123456789a"))
    if kind == "dynamic":  # no text reaches beyond the model's own length
        return
    backbone = Backbone.load(tmp_path, quantize=None, max_length=40)
    assert backbone.why_not_packed == (
        "a text of more than 20 tokens changes its rotary angles, texts have up to 40 tokens"
    )
    beside, alone = backbone.encode([*short, "?" * 36]).pooled, backbone.encode(short).pooled
    assert relative(beside[:-1], alone) < 2e-6


def test_models_that_count_positions_by_rows_are_left(tmp_path, save_byte_tokenizer):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    transformers.CLIPTextModel(transformers.CLIPTextConfig(vocab_size=384, **sizes)).save_pretrained(tmp_path)
    save_byte_tokenizer(tmp_path)
    backbone = Backbone.load(tmp_path, quantize=None)
    assert "Sequence length must be less than max_position_embeddings" in backbone.why_not_packed
    assert backbone.encode(ITEMS).pooled.isfinite().all()


def test_a_shift_of_positions_is_found_beside_a_large_common_vector(bert, monkeypatch):
    backbone = Backbone.load(bert, quantize=None, kernels=False)
    real = backbone.model.forward
    with torch.no_grad():
        backbone.model.embeddings.word_embeddings.weight[:, 0] += 30

    def shifted(**arguments):
        if packed.KEYWORD in arguments:
            arguments["position_ids"] = arguments["position_ids"] + 2
        return real(**arguments)

    monkeypatch.setattr(backbone.model, "forward", shifted)
    backbone._take_attention()
    assert backbone.why_not_packed == "two short texts packed differ from the same texts one by one"


def test_encoders_have_no_prefix(bert):
    with pytest.raises(ValueError, match="not causal"):
        Backbone.load(bert).prefix("red")


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_attention_dropout_while_training_is_the_models_own(bert, tmp_path, save_byte_tokenizer, kind):
    folder, name = bert, "attention_probs_dropout_prob"
    if kind == "gpt2":
        folder, name = tmp_path, "attn_pdrop"
        config = transformers.GPT2Config(vocab_size=384, n_embd=64, n_layer=2, n_head=4, n_positions=64)
        transformers.GPT2Model(config).save_pretrained(folder)
        save_byte_tokenizer(folder)
    backbone = Backbone.load(folder, quantize=None)
    assert backbone.why_not_packed is None and getattr(backbone.model.config, name) == 0.1
    for module in backbone.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    assert backbone.train().why_not_packed == "its attention has dropout while training"
    attention = [m for m in backbone.model.modules() if type(m).__name__ in ("BertSelfAttention", "GPT2Attention")]
    assert len(attention) == 2
    for module in attention:
        (module.dropout if kind == "bert" else module.attn_dropout).p = 0.5
    pooled = [backbone.encode(["red hat"], requires_grad=True).pooled for _ in range(2)]
    assert not torch.equal(*pooled)
    # Without gradients it runs in eval mode, packed, whatever mode it is called in.
    found = backbone.encode(["red hat", "old"], layout="packed").pooled
    assert backbone.training and backbone.why_not_packed is not None
    assert torch.equal(found, backbone.encode(["red hat", "old"]).pooled)
    assert torch.equal(found, backbone.eval().encode(["red hat", "old"]).pooled)
    assert backbone.why_not_packed is None


def test_a_prefix_can_be_asked_for_while_training(qwen2):
    backbone = Backbone.load(qwen2, quantize=None)
    backbone.model.config.attention_dropout = 0.1
    expected = backbone.encode(ITEMS, prefix=backbone.prefix(HISTORY)).pooled
    assert backbone.train().why_not_packed is not None
    assert torch.equal(backbone.encode(ITEMS, prefix=backbone.prefix(HISTORY)).pooled, expected) and backbone.training


def test_an_adapter_loaded_while_training_keeps_the_mode(bert, tmp_path):
    Backbone.load(bert, lora=2).save_adapter(tmp_path)
    backbone = Backbone.load(bert).train()
    backbone.load_adapter(tmp_path)
    assert backbone.training and backbone.eval().why_not_packed is None


def test_a_prefix_without_the_adapter_leaves_what_is_frozen(qwen2):
    backbone = Backbone.load(qwen2, lora=2)
    for parameter in backbone.parameters():
        parameter.requires_grad_(False)
    backbone.prefix(HISTORY, adapter=False)
    assert backbone.trainable_parameters() == []


def test_models_that_cannot_be_packed_keep_their_attention(qwen2, monkeypatch):
    def deaf(**arguments):
        arguments.pop(packed.KEYWORD, None)
        return real(**arguments)

    def no_positions(**arguments):
        arguments["position_ids"] = None
        return real(**arguments)

    for broken, reason in ((deaf, "takes padding masks"), (no_positions, "two short texts packed differ")):
        backbone = Backbone.load(qwen2, kernels=False, quantize=None)
        real = backbone.model.forward
        monkeypatch.setattr(backbone.model, "forward", broken)
        backbone._take_attention()
        assert reason in backbone.why_not_packed
        assert backbone.model.config._attn_implementation == "sdpa"
        assert backbone.encode(ITEMS).pooled.isfinite().all()


def test_a_window_shorter_than_the_texts_is_refused(tmp_path, save_byte_tokenizer):
    config = transformers.MistralConfig(
        vocab_size=384, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, sliding_window=24,
    )  # fmt: skip
    transformers.MistralModel(config).save_pretrained(tmp_path)
    save_byte_tokenizer(tmp_path)
    assert "its sliding window is 24, texts have up to 64 tokens" in Backbone.load(tmp_path).why_not_packed
    backbone = Backbone.load(tmp_path, max_length=16)
    assert backbone.why_not_packed is None
    prefix = backbone.prefix("?" * 16)
    assert backbone.encode(["?" * 8], prefix=prefix).pooled.isfinite().all()
    with pytest.raises(ValueError, match="sliding window, 24, got one of 25 tokens"):
        backbone.encode(["?" * 9], prefix=prefix)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"prefix_ids": [0]}, "prefix_ids go with prefix"),
        ({"layout": "ragged"}, "layout must be one of"),
        ({"soft_ids": {"user": 0}}, "soft_ids go with soft_prompt"),
    ],
)
def test_bad_arguments(qwen2, arguments, words):
    with pytest.raises(ValueError, match=words):
        Backbone.load(qwen2, quantize=None).encode(["red"], **arguments)


def test_bad_prefixes(qwen2):
    backbone = Backbone.load(qwen2, quantize=None)
    prefix = backbone.prefix(["red", "blue"])
    assert isinstance(prefix, Prefix) and len(prefix) == 2
    for arguments, words in (
        ({}, "prefix_ids must be given where there are 2 prefixes"),
        ({"prefix_ids": [2]}, r"prefix_ids must be 1 integers in \[0, 2\), got \[2\]"),
        ({"prefix_ids": [0, 1]}, "prefix_ids must be 1 integers"),
        ({"prefix_ids": torch.tensor([0.0])}, r"prefix_ids must be 1 integers in .*, got \[0.0\]"),
        ({"prefix_ids": [0], "layout": "padded"}, "layout must be None or 'packed' with a prefix"),
    ):
        with pytest.raises(ValueError, match=words):
            backbone.encode(["old"], prefix=prefix, **arguments)
    with pytest.raises(ValueError, match="a prefix must have a token"):
        backbone.prefix(["red", ""])
    with pytest.raises(ValueError, match="more positions than the model has, 64"):
        backbone.encode(["?" * 33], prefix=backbone.prefix("?" * 32))
    offsets = torch.tensor([0, 2])
    with pytest.raises(ValueError, match=r"counts must be \[2\] and sum to 1 texts"):
        backbone.forward_rows(offsets, input_ids=torch.tensor([1, 2]), prefix=prefix)
    with pytest.raises(ValueError, match="offsets must rise from 0 to 3"):
        backbone.forward_rows(offsets, input_ids=torch.tensor([1, 2, 3]))
