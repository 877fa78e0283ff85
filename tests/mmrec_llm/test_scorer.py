"""Answers of a causal model behind a prompt, against the whole model on the whole text."""

from __future__ import annotations

import pytest
import torch

from mmrec.llm import Backbone, YesNoScorer
from mmrec.prompting import HardPrompt
from mmrec.recommender import LLMReranker

PROMPTS = ["red blue green shoe hat", "the star war film of old night and new hat"]
TEXTS = [["new hat", "old film with star", "new hat"], ["shoe"]]


def _save(folder, family: str, save_tokenizer) -> None:
    import transformers

    torch.manual_seed(5)
    sizes = {
        "vocab_size": 384, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.2,
    }  # fmt: skip
    if family == "gemma2":
        sizes |= {
            "head_dim": 16,
            "final_logit_softcapping": 2.0,
            "attn_logit_softcapping": None,
            "tie_word_embeddings": True,
        }
    if family in ("qwen2 tied", "qwen2", "llama"):
        sizes |= {"tie_word_embeddings": family == "qwen2 tied"}
    if family == "phi":
        sizes |= {"tie_word_embeddings": False, "num_key_value_heads": 4}
    if family == "cohere":
        sizes |= {"logit_scale": 0.25, "tie_word_embeddings": True}
    if family == "granite":
        sizes |= {"logits_scaling": 3.0, "tie_word_embeddings": False}
    name = {"qwen2 tied": "Qwen2", "qwen2": "Qwen2"}.get(family, family.capitalize())
    model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**sizes))
    if family == "phi":
        torch.nn.init.normal_(model.lm_head.bias)
    model.save_pretrained(folder, max_shard_size="60KB" if family == "llama" else "5GB")
    save_tokenizer(folder)


def expected(folder, prompts, texts, scorer, answers):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder).double().eval()
    tokenizer, found = scorer.backbone.tokenizer, []
    for prompt, group in zip(prompts, texts, strict=True):
        start = tokenizer(prompt)["input_ids"]
        rows = [start + tokenizer(text, add_special_tokens=False)["input_ids"] for text in group]
        with torch.no_grad():
            logits = [model(torch.tensor([row])).logits[0, -1] for row in rows]
        tokens = [tokenizer(answer, add_special_tokens=False)["input_ids"][0] for answer in answers]
        found.append(torch.stack([one[tokens[0]] - one[tokens[1]] for one in logits]))
    return found


@pytest.mark.parametrize("family", ["qwen2 tied", "qwen2", "llama", "phi", "gemma2", "cohere", "granite"])
def test_scores_are_those_of_the_whole_model(tmp_path, family, save_byte_tokenizer):
    _save(tmp_path, family, save_byte_tokenizer)
    backbone = Backbone.load(tmp_path, quantize=None)
    assert backbone.why_not_packed is None
    scorer = YesNoScorer(backbone, yes=" red", no=" blue")
    found = scorer(PROMPTS, TEXTS)
    for one, wanted in zip(found, expected(tmp_path, PROMPTS, TEXTS, scorer, (" red", " blue")), strict=True):
        assert one.dtype == torch.float32 and float(wanted.abs().max()) > 1e-2
        torch.testing.assert_close(one.double(), wanted, rtol=0, atol=float(2e-5 * wanted.abs().max()))
    assert found[0][0] == found[0][2]


def test_groups_may_be_empty(qwen2):
    scorer = YesNoScorer(Backbone.load(qwen2, quantize=None), yes=" red", no=" blue")
    both = scorer(PROMPTS, TEXTS)
    first, none, second = scorer([PROMPTS[0], "red", PROMPTS[1]], [TEXTS[0], [], TEXTS[1]])
    assert len(none) == 0
    torch.testing.assert_close(torch.cat([first, second]), torch.cat(both))
    assert [len(one) for one in scorer(PROMPTS, [[], []])] == [0, 0] and scorer([], []) == []


def test_a_blank_that_is_a_token_of_its_own_is_left_out(qwen2):
    backbone = Backbone.load(qwen2, quantize=None)
    ids = backbone.tokenizer([" Yes", " No", "Yes", "No"])["input_ids"]
    assert ids[0][0] == ids[1][0] and ids[2][0] != ids[3][0]
    assert YesNoScorer(backbone).tokens == (ids[2][0], ids[3][0])


def test_errors(qwen2, bert, tmp_path, save_byte_tokenizer):
    backbone = Backbone.load(qwen2, quantize=None)
    with pytest.raises(ValueError, match="must begin with different tokens"):
        YesNoScorer(backbone, yes=" red", no=" red blue")
    with pytest.raises(ValueError, match="must begin with different tokens"):
        YesNoScorer(backbone, yes=" red", no="")
    scorer = YesNoScorer(backbone, yes=" red", no=" blue")
    with pytest.raises(ValueError, match="a group for each of 2 prompts, got 1"):
        scorer(PROMPTS, TEXTS[:1])
    with pytest.raises(ValueError, match="a text must have a token"):
        scorer(PROMPTS[:1], [["red", ""]])
    with pytest.raises(ValueError, match="is not causal"):
        YesNoScorer(Backbone.load(bert, quantize=None), yes="red", no="blue")
    # A checkpoint of the bare model has no output layer.
    import transformers

    config = transformers.Qwen2Config(
        vocab_size=384, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    transformers.Qwen2Model(config).save_pretrained(tmp_path)
    save_byte_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"has no 'lm_head.weight' to answer with"):
        YesNoScorer(Backbone.load(tmp_path, quantize=None), yes=" red", no=" blue")


def test_the_reranker_asks_about_titles(qwen2):
    backbone = Backbone.load(qwen2, quantize=None, max_length=64)
    reranker = LLMReranker(
        YesNoScorer(backbone, yes=" red", no=" blue"), template=HardPrompt(history=2, intro="a", question="b", ask="c")
    )
    assert reranker.prompt(["one", "two", 'th"ree\nfour']) == 'a\n- "two"\n- "th\\"ree\\nfour"\nb\n'
    assert reranker.candidate("é") == 'Item: "é"\nc' and reranker.name == str(qwen2)
    found = reranker([["red", "hat"], ["film"]], [["star", "war"], []])
    wanted = reranker.scorer([reranker.prompt(["red", "hat"])], [[reranker.candidate(t) for t in ("star", "war")]])
    assert found == [wanted[0].tolist(), []]
    # The question stays, and the latest titles: the oldest go.
    many = [f"title {n} " + "x" * 300 * (n == 29) for n in range(30)]
    full = LLMReranker(
        YesNoScorer(Backbone.load(qwen2, quantize=None), yes=" red", no=" blue"),
        template=HardPrompt(intro="a", question="b"),
    )
    prompt = full.prompt(many[:29])
    tokens = full.scorer.backbone.tokenizer(prompt)["input_ids"]
    assert (
        len(tokens) <= full.scorer.backbone.max_length
        and prompt.endswith('"title 28 "\nb\n')
        and "title 0" not in prompt
    )
    assert len(full.candidate(many[29])) < 300 and full.candidate(many[29]).endswith("Answer:")
    with pytest.raises(ValueError, match="do not fit into the 64 tokens"):
        LLMReranker(reranker.scorer, template=HardPrompt(question="why " * 100))
