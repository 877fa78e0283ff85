"""Free generation around a headless backbone, against the model that transformers itself loads whole."""

from __future__ import annotations

import json

import pytest
import torch
from test_likelihood import FAMILIES, PROMPTS, save

from mmrec.llm import Backbone, TextGenerator
from mmrec.prompting import HardPrompt

transformers = pytest.importorskip("transformers")

MANY = [*PROMPTS, "big", "old film with star", "red blue green shoe hat"]
CHAT = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<me>{% endif %}"
)


def whole(folder, adapter=None):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    if adapter is not None:
        import peft

        base = peft.PeftModel.from_pretrained(getattr(model, model.base_model_prefix), adapter)
        setattr(model, model.base_model_prefix, base.merge_and_unload())
    return model


def ids_of(model, tokenizer, prompt, new=12, **options):
    """New token ids of one prompt alone, greedy: no padding anywhere."""
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    options = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": new, **options}
    with torch.no_grad():
        return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("lora", [None, {"r": 4, "init": "random"}])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_writes_what_the_whole_model_writes(tmp_path, family, lora, save_byte_tokenizer):
    save(tmp_path, family, save_byte_tokenizer)
    backbone = Backbone.load(tmp_path, quantize=None, lora=lora)
    if lora:
        backbone.save_adapter(tmp_path / "adapter")
    model = whole(tmp_path, tmp_path / "adapter" if lora else None)
    generator = TextGenerator(backbone, max_new_tokens=12, batch=4)
    found = generator(MANY)  # prompts of several lengths together: padded on the left
    assert found == [backbone.tokenizer.decode(ids_of(model, backbone.tokenizer, prompt)) for prompt in MANY]
    assert len(set(found)) > 2 and not backbone.training
    assert TextGenerator(backbone, max_new_tokens=12, batch=1)(MANY[::-1]) == found[::-1]


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_with_its_own_attention_and_in_four_bits(qwen2, quantize):
    backbone = Backbone.load(qwen2, quantize=quantize)
    stock = Backbone.load(qwen2, quantize=quantize, kernels=False)
    assert stock.why_not_packed is not None and backbone.why_not_packed is None
    found = TextGenerator(backbone, max_new_tokens=10)(MANY)
    assert found == TextGenerator(stock, max_new_tokens=10)(MANY)
    assert (found == TextGenerator(Backbone.load(qwen2, quantize=None), max_new_tokens=10)(MANY)) == (quantize is None)


def test_it_ends_where_the_model_says_so(tmp_path, save_byte_tokenizer):
    save(tmp_path, "llama", save_byte_tokenizer)
    plain = whole(tmp_path)
    tokenizer = Backbone.load(tmp_path, quantize=None).tokenizer
    ids = [ids_of(plain, tokenizer, prompt) for prompt in MANY]
    ends = [ids[0][4], ids[2][7]]
    sampled = {"eos_token_id": ends, "do_sample": True, "temperature": 0.7, "top_k": 3, "max_length": 5}
    (tmp_path / "generation_config.json").write_text(json.dumps(sampled))
    model = whole(tmp_path)
    found = TextGenerator(Backbone.load(tmp_path, quantize=None), max_new_tokens=12)(MANY)
    for prompt, text, own in zip(MANY, found, ids, strict=True):
        wanted = ids_of(model, tokenizer, prompt, temperature=None, top_k=None)
        length = next((i for i, token in enumerate(own) if token in ends), len(own))
        assert wanted[:length] == own[:length] and len(wanted) == min(length + 1, 12)
        assert text == tokenizer.decode(own[:length])
    assert len(found[0]) < len(tokenizer.decode(ids[0])) and any(
        text == tokenizer.decode(i) for text, i in zip(found, ids, strict=True)
    )


def test_stop_strings(qwen2):
    backbone = Backbone.load(qwen2, quantize=None)
    free = TextGenerator(backbone, max_new_tokens=12)(MANY)
    # Letters that some answers have and others do not, not at their beginning.
    letters = sorted({c for text in free for c in text[2:] if c.isascii() and c.isalpha()})
    stop = tuple(
        c for c in letters if not all(c in text for text in free) and not any(text.startswith(c) for text in free)
    )
    stop = stop[0], stop[-1]
    found = TextGenerator(backbone, max_new_tokens=12, stop=stop)(MANY)
    ended = 0
    for text, all_of_it in zip(found, free, strict=True):
        places = [all_of_it.index(one) for one in stop if one in all_of_it]
        ended += bool(places)
        assert text == all_of_it[: min(places, default=len(all_of_it))]
    assert 0 < ended < len(MANY)
    place, row = min((text.index(stop[0]), i) for i, text in enumerate(free) if stop[0] in text)
    assert TextGenerator(backbone, max_new_tokens=12, stop="star")(MANY) == free  # one string is one stop
    generator = TextGenerator(backbone, max_new_tokens=12, stop=(stop[0], "never"))
    steps = []
    hook = backbone.model.register_forward_hook(lambda *_: steps.append(1))
    (alone,) = generator([MANY[row]])
    hook.remove()
    assert alone == free[row][:place] and 1 < len(steps) < 12


def test_sampling_is_an_option(qwen2):
    backbone = Backbone.load(qwen2, quantize=None)
    greedy = TextGenerator(backbone, max_new_tokens=8)
    sampling = TextGenerator(backbone, max_new_tokens=8, options={"do_sample": True, "temperature": 3.0})
    torch.manual_seed(1)
    first = sampling(MANY[:2])
    torch.manual_seed(1)
    assert sampling(MANY[:2]) == first != greedy(MANY[:2]) == greedy(MANY[:2])
    with pytest.raises(ValueError, match="transformers has no generation setting 'temperatur'"):
        TextGenerator(backbone, max_new_tokens=8, options={"temperatur": 1})


def test_the_mode_and_the_tokenizer_are_left_as_they_were(qwen2):
    backbone = Backbone.load(qwen2, quantize=None, lora={"r": 2, "dropout": 0.9, "init": "random"})
    expected = TextGenerator(backbone, max_new_tokens=8)(MANY)
    side, padding = backbone.tokenizer.padding_side, backbone.tokenizer.pad_token
    backbone.train()
    generator = TextGenerator(backbone, max_new_tokens=8)
    assert backbone.training and generator(MANY) == expected and backbone.training
    assert (backbone.tokenizer.padding_side, backbone.tokenizer.pad_token) == (side, padding)
    vectors = Backbone.load(qwen2, quantize=None).encode(MANY).pooled
    plain = Backbone.load(qwen2, quantize=None)
    TextGenerator(plain, max_new_tokens=2)(MANY)
    assert torch.equal(plain.encode(MANY).pooled, vectors)


def test_chat(qwen2):
    backbone = Backbone.load(qwen2, quantize=None)
    with pytest.raises(ValueError, match="has no chat template"):
        TextGenerator(backbone, chat=True)
    backbone.tokenizer.chat_template = CHAT
    generator = TextGenerator(backbone, max_new_tokens=8, chat=True)
    written = "<user> red hat\n<me>"
    assert generator(["red hat"]) == TextGenerator(backbone, max_new_tokens=8)([written])
    assert generator.count(["red hat"]) == [len(backbone.tokenizer(written)["input_ids"])]


def test_counts_and_keys(qwen2):
    backbone = Backbone.load(qwen2, quantize=None, lora={"r": 2, "init": "random"})
    generator = TextGenerator(backbone, max_new_tokens=8)
    assert generator.count(["red hat", ""]) == [len(backbone.tokenizer("red hat")["input_ids"]), 0]
    assert generator.count([]) == [] == generator([])
    prompt = HardPrompt(intro="a", question="b", ask="c")
    built = prompt.build(["red"] * 30, budget=generator.max_prompt_tokens, count=generator.count)
    assert built.kept["history"] < 20 and generator([built.text]) != [""]
    others = [{"max_new_tokens": 9}, {"max_new_tokens": 8, "stop": "x"}, {"max_new_tokens": 8, "options": {"top_k": 3}}]
    keys = {TextGenerator(backbone, **given).key() for given in others} | {generator.key()}
    assert len(keys) == 4 and TextGenerator(backbone, max_new_tokens=8).key() == generator.key()
    with torch.no_grad():
        backbone.trainable_parameters()[0].add_(1)
    assert generator.key() not in keys


def test_the_adapter_of_now_counts(qwen2):
    backbone = Backbone.load(qwen2, quantize=None, lora={"r": 4, "init": "zero"})
    generator = TextGenerator(backbone, max_new_tokens=8)
    before = generator(MANY)
    backbone.load_adapter_state_dict(
        Backbone.load(qwen2, quantize=None, lora={"r": 4, "init": "random"}).adapter_state_dict()
    )
    assert generator(MANY) != before


def test_errors(qwen2, bert, tmp_path, save_byte_tokenizer):
    backbone = Backbone.load(qwen2, quantize=None)
    generator = TextGenerator(backbone, max_new_tokens=8)
    assert generator.max_prompt_tokens == 56  # of 64 positions
    with pytest.raises(ValueError, match=r"prompts\[1\] must have 1 to 56 tokens, got 57; leave something out"):
        generator(["red", "?" * 57])
    assert len(generator(["?" * 56])) == 1
    with pytest.raises(ValueError, match=r"prompts\[0\] must have 1 to 56 tokens, got 0"):
        generator([""])
    with pytest.raises(TypeError, match="one str"):
        generator("red")
    with pytest.raises(ValueError, match="stop must hold strings of at least a character"):
        TextGenerator(backbone, stop=("x", ""))
    with pytest.raises(ValueError, match="max_new_tokens and batch must be at least 1, got 0 and 8"):
        TextGenerator(backbone, max_new_tokens=0)
    with pytest.raises(ValueError, match="leave room for a prompt in 64 positions, got 64"):
        TextGenerator(backbone, max_new_tokens=64)
    with pytest.raises(ValueError, match="is not causal: its tokens see those behind them"):
        TextGenerator(Backbone.load(bert, quantize=None), max_new_tokens=4)
    config = transformers.Qwen2Config(
        vocab_size=384, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    transformers.Qwen2Model(config).save_pretrained(tmp_path)
    save_byte_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"has no 'lm_head.weight' to answer with"):
        TextGenerator(Backbone.load(tmp_path, quantize=None), max_new_tokens=4)
