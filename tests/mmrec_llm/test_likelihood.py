"""Likelihoods of texts behind a prompt, against the whole causal model on the whole text."""

from __future__ import annotations

import pytest
import torch
from test_scorer import _save

from mmrec.llm import Backbone, LikelihoodScorer, head
from mmrec.llm.head import OutputLayer, output_layer
from mmrec.llm.reading import Reading

transformers = pytest.importorskip("transformers")

PROMPTS = ["red blue green shoe hat", "s", "the star war film of old night and new hat"]
TEXTS = [[" new hat", " old film with star", " new hat", "\n"], [" shoe", "q"], [" big red phone"]]
FAMILIES = ["qwen2 tied", "qwen2", "llama", "phi", "gemma2", "cohere", "granite", "gpt2"]


def save(folder, family, save_tokenizer):
    if family != "gpt2":
        return _save(folder, family, save_tokenizer)
    torch.manual_seed(5)
    config = transformers.GPT2Config(
        vocab_size=384, n_embd=64, n_layer=2, n_head=4, n_positions=128, initializer_range=0.2, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    save_tokenizer(folder)


def whole(folder, adapter=None):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    if adapter is not None:
        import peft

        base = peft.PeftModel.from_pretrained(getattr(model, model.base_model_prefix), adapter)
        setattr(model, model.base_model_prefix, base.merge_and_unload())
    return model.double().eval()


def expected(model, tokenizer, prompt, text) -> float:
    """log p of the text's tokens, by one pass over all tokens in float64."""
    first = tokenizer(prompt)["input_ids"]
    second = tokenizer(text, add_special_tokens=False)["input_ids"] if isinstance(text, str) else list(text)
    with torch.no_grad():
        log_p = model(torch.tensor([first + second])).logits[0].log_softmax(1)
    return float(sum(log_p[len(first) + i - 1, token] for i, token in enumerate(second)))


def close(found, wanted):
    torch.testing.assert_close(found.double(), torch.tensor(wanted).double(), rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_the_whole_model(tmp_path, family, save_byte_tokenizer):
    save(tmp_path, family, save_byte_tokenizer)
    backbone = Backbone.load(tmp_path, quantize=None)
    model = whole(tmp_path)
    scorer = LikelihoodScorer(backbone)
    found, means = scorer(PROMPTS, TEXTS), scorer(PROMPTS, TEXTS, normalize="mean")
    for prompt, group, one, mean in zip(PROMPTS, TEXTS, found, means, strict=True):
        assert one.dtype == torch.float32 and one.device.type == "cpu"
        wanted = [expected(model, backbone.tokenizer, prompt, text) for text in group]
        close(one, wanted)
        lengths = [len(backbone.tokenizer(text)["input_ids"]) for text in group]
        close(mean, [value / length for value, length in zip(wanted, lengths, strict=True)])
    assert max(lengths) > 1 and len(backbone.tokenizer(PROMPTS[1])["input_ids"]) == 1


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_the_adapter_counts(tmp_path, family, save_byte_tokenizer):
    save(tmp_path, family, save_byte_tokenizer)
    backbone = Backbone.load(tmp_path, quantize=None, lora={"r": 4, "init": "random"})
    backbone.save_adapter(tmp_path / "adapter")
    model = whole(tmp_path, tmp_path / "adapter")
    (found,) = LikelihoodScorer(backbone)(PROMPTS[:1], TEXTS[:1])
    close(found, [expected(model, backbone.tokenizer, PROMPTS[0], text) for text in TEXTS[0]])
    assert abs(expected(whole(tmp_path), backbone.tokenizer, PROMPTS[0], TEXTS[0][0]) - float(found[0])) > 0.1


def test_in_four_bits(qwen2):
    """The body is that of `encode`; the output layer, tied or not, stays dense."""
    scorer = LikelihoodScorer(Backbone.load(qwen2))
    backbone = scorer.backbone
    ids = [backbone.tokenizer(text)["input_ids"] for text in (PROMPTS[0], TEXTS[0][1])]
    states = backbone.forward_tokens(torch.tensor([sum(ids, [])]))[0, len(ids[0]) - 1 : -1].double()
    weight = transformers.AutoModelForCausalLM.from_pretrained(qwen2).get_output_embeddings().weight.double()
    wanted = (states @ weight.T).log_softmax(1).gather(1, torch.tensor(ids[1]).unsqueeze(1)).sum()
    close(scorer(PROMPTS[:1], [TEXTS[0][1:2]])[0], [float(wanted.detach())])


def test_company_changes_rounding_only(qwen2):
    scorer = LikelihoodScorer(Backbone.load(qwen2, quantize=None))
    texts = [*TEXTS[0], *TEXTS[1], *TEXTS[2], " the small hat of star and war"]
    together = scorer([PROMPTS[2]], [texts])[0]
    assert together[0] == together[2]
    for text, score in zip(texts, together, strict=True):
        alone = scorer([PROMPTS[2]], [[text]])[0][0]
        beside = scorer(["big", PROMPTS[2]], [texts, [text]])[1][0]
        torch.testing.assert_close(torch.stack([alone, beside]), score.repeat(2), rtol=1e-6, atol=5e-6)
    backward = scorer([PROMPTS[2]], [[*texts[::-1], texts[0]]])[0]
    assert torch.equal(backward[:-1].flip(0), together) and backward[-1] == together[0]


@pytest.mark.parametrize("batch_tokens", [1, 5])
def test_in_many_batches(qwen2, batch_tokens, monkeypatch):
    scorer = LikelihoodScorer(Backbone.load(qwen2, quantize=None))
    texts = [[*group, " the small hat of star and war", " old film"] for group in TEXTS]
    expected = scorer(PROMPTS, texts)
    sizes, real = [], Reading.go_on

    def spy(*given, **arguments):
        for rows, hidden in real(*given, **arguments, batch_tokens=batch_tokens):
            sizes.append(len(rows))
            yield rows, hidden

    monkeypatch.setattr(Reading, "go_on", spy)
    found = scorer(PROMPTS, texts)
    assert len(sizes) > 3 and max(sizes) > 5  # a longer text is its own batch
    for one, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(one, wanted, rtol=1e-6, atol=5e-6)
    backward = scorer(PROMPTS, [group[::-1] for group in texts])
    assert all(torch.equal(one.flip(0), wanted) for one, wanted in zip(backward, found, strict=True))


def test_special_tokens_go_before_the_prompt_only(qwen2):
    from tokenizers import processors

    backbone = Backbone.load(qwen2, quantize=None)
    first = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 5)])
    backbone.tokenizer.backend_tokenizer.post_processor = first
    assert backbone.tokenizer("q")["input_ids"][0] == 5
    (found,) = LikelihoodScorer(backbone)(PROMPTS[:1], TEXTS[:1])
    model = whole(qwen2)
    close(found, [expected(model, backbone.tokenizer, PROMPTS[0], text) for text in TEXTS[0]])


def test_texts_may_be_token_ids(qwen2):
    scorer = LikelihoodScorer(Backbone.load(qwen2, quantize=None))
    ids = [scorer.backbone.tokenizer(text)["input_ids"] for text in TEXTS[0]]
    for given in (ids, [torch.tensor(row) for row in ids], [TEXTS[0][0], *ids[1:]]):
        assert torch.equal(scorer(PROMPTS[:1], [given])[0], scorer(PROMPTS[:1], TEXTS[:1])[0])


def test_groups_may_be_empty(qwen2):
    scorer = LikelihoodScorer(Backbone.load(qwen2, quantize=None))
    both = scorer(PROMPTS[:2], TEXTS[:2])
    first, none, second = scorer([PROMPTS[0], "", PROMPTS[1]], [TEXTS[0], [], TEXTS[1]])
    assert len(none) == 0 and torch.equal(torch.cat([first, second]), torch.cat(both))
    assert [len(one) for one in scorer(PROMPTS, [[], [], []])] == [0, 0, 0] and scorer([], []) == []


def test_the_last_token_of_a_text_is_not_read(tmp_path, save_byte_tokenizer):
    _save(tmp_path, "qwen2", save_byte_tokenizer)
    backbone = Backbone.load(tmp_path, quantize=None)
    scorer = LikelihoodScorer(backbone)
    before = scorer(PROMPTS[:1], [[" red?", " hat?"]])[0]
    (unread,) = backbone.tokenizer("?")["input_ids"]
    with torch.no_grad():
        backbone.model.get_input_embeddings().weight[unread] = torch.nan
    assert torch.equal(scorer(PROMPTS[:1], [[" red?", " hat?"]])[0], before) and before.isfinite().all()
    assert scorer(PROMPTS[:1], [[" red? hat"]])[0].isnan().all()


def test_the_mode_is_restored_and_no_graph_kept(qwen2):
    backbone = Backbone.load(qwen2, quantize=None, lora={"r": 2, "dropout": 0.5, "init": "random"})
    scorer = LikelihoodScorer(backbone)
    expected = scorer(PROMPTS, TEXTS)
    backbone.train()
    found = scorer(PROMPTS, TEXTS)
    assert backbone.training and not found[0].requires_grad
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert LikelihoodScorer(backbone)(PROMPTS, TEXTS)[0].equal(expected[0]) and backbone.training


def test_tied_weights_are_not_copied(tmp_path, save_byte_tokenizer):
    for family, tied in (("qwen2 tied", True), ("llama", False)):
        folder = tmp_path / family
        _save(folder, family, save_byte_tokenizer)
        for dtype in (torch.float32, torch.bfloat16):
            backbone = Backbone.load(folder, quantize=None, dtype=dtype)
            layer = output_layer(str(folder), backbone.model)
            embedding = backbone.model.get_input_embeddings().weight
            assert (layer.weight.data_ptr() == embedding.data_ptr()) == tied
            assert layer.weight.dtype == dtype and not layer.weight.requires_grad
            stock = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
            assert torch.equal(layer.weight, stock.get_output_embeddings().weight)


@pytest.mark.parametrize("workspace", [4, 4096, 40000, 1 << 26])
@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_sum_exp_within_a_workspace(cap, dtype, workspace, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 24, generator=generator).to(dtype) for n in (37, 301))
    bias = torch.randn(301, generator=generator).to(dtype)
    layer = OutputLayer(weight, bias, scale=0.5, cap=cap)
    sizes, real = [], OutputLayer._logits

    def spy(*given):
        sizes.append(real(*given).nbytes)
        return real(*given)

    monkeypatch.setattr(OutputLayer, "_logits", spy)
    found = layer.log_sum_exp(hidden, workspace_bytes=workspace)
    assert all(size <= max(workspace, 4) for size in sizes) and bool(sizes) == (cap is not None)
    logits = 0.5 * (hidden.double() @ weight.double().T + bias.double())
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    torch.testing.assert_close(found.double(), logits.logsumexp(1), rtol=1e-6, atol=1e-6)
    row, token = torch.randint(37, (50,), generator=generator), torch.randint(301, (50,), generator=generator)
    monkeypatch.setattr(head, "WORKSPACE_BYTES", 8 * 24 * 7)  # seven at a time
    torch.testing.assert_close(layer.chosen(hidden, row, token).double(), logits[row, token], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        layer.log_prob(hidden, row, token).double(), logits.log_softmax(1)[row, token], rtol=1e-5, atol=2e-6
    )


def test_the_kernel_is_given_the_workspace(monkeypatch):
    given = {}
    real = head.info_nce
    monkeypatch.setattr(head, "info_nce", lambda *a, **k: [given.update(k), real(*a, **k)][1])
    OutputLayer(torch.randn(9, 4)).log_sum_exp(torch.randn(3, 4), workspace_bytes=100)
    assert given["workspace_bytes"] == 100


def test_edges_of_the_output_layer():
    layer = OutputLayer(torch.tensor([[30.0], [-30.0]]))
    hidden = torch.tensor([[1.0]])
    found = layer.log_prob(hidden, torch.tensor([0, 0]), torch.tensor([0, 1]))
    assert found[0] == 0 and found[1] == -60
    generator = torch.Generator().manual_seed(0)
    hidden, weight = 3 * torch.randn(200, 16, generator=generator), torch.randn(30, 16, generator=generator)
    found = OutputLayer(weight).log_prob(hidden, torch.arange(200), (hidden @ weight.T).argmax(1))
    assert float(found.max()) == 0  # what is as good as certain, and by rounding more than that
    none = torch.zeros(0, dtype=torch.int64)
    assert len(layer.log_sum_exp(hidden[:0])) == 0 and len(layer.log_prob(hidden[:0], none, none)) == 0
    with pytest.raises(ValueError, match="workspace_bytes must be at least 4, got 3"):
        layer.log_sum_exp(hidden, workspace_bytes=3)


def test_logits_made_in_another_way_are_refused(tmp_path, save_byte_tokenizer, monkeypatch):
    _save(tmp_path, "granite", save_byte_tokenizer)
    backbone = Backbone.load(tmp_path, quantize=None)
    monkeypatch.setattr(head, "_shape_of", lambda config: (1.0, None))
    with pytest.raises(ValueError, match="makes its logits in a way that is not known here"):
        LikelihoodScorer(backbone)


def test_errors(qwen2, bert, tmp_path, save_byte_tokenizer):
    scorer = LikelihoodScorer(Backbone.load(qwen2, quantize=None))
    with pytest.raises(ValueError, match="a group for each of 3 prompts, got 1"):
        scorer(PROMPTS, TEXTS[:1])
    with pytest.raises(ValueError, match="texts: a text must have a token, got one without: ''"):
        scorer(PROMPTS[:1], [["red", ""]])
    with pytest.raises(ValueError, match=r"token ids must be in \[0, 384\), got \[3, 384\]"):
        scorer(PROMPTS[:1], [[[3, 384]]])
    with pytest.raises(ValueError, match=r"token ids must be in \[0, 384\), got \[-1\]"):
        scorer(PROMPTS[:1], [[[-1]]])
    with pytest.raises(ValueError, match="prompts: a prompt must have a token"):
        scorer([""], [["red"]])
    with pytest.raises(ValueError, match="normalize must be 'sum' or 'mean', got 'max'"):
        scorer(PROMPTS, TEXTS, normalize="max")
    with pytest.raises(TypeError, match="texts must be a sequence of str"):
        scorer("red", [["hat"]])
    with pytest.raises(ValueError, match="more positions than the model has, 64"):
        scorer(["?" * 60], [["?" * 6]])
    with pytest.raises(ValueError, match="is not causal"):
        LikelihoodScorer(Backbone.load(bert, quantize=None))
    with pytest.raises(ValueError, match="cannot go on from prefixes: its attention is not that of the kernels"):
        LikelihoodScorer(Backbone.load(qwen2, quantize=None, kernels=False))
    config = transformers.Qwen2Config(
        vocab_size=384, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    transformers.Qwen2Model(config).save_pretrained(tmp_path)
    save_byte_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"has no 'lm_head.weight' to answer with"):
        LikelihoodScorer(Backbone.load(tmp_path, quantize=None))
