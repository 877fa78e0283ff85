"""Pooling against a text-by-text reference, batching, order, bits, progress, bad input."""

from __future__ import annotations

import io
import sys

import pytest
import torch

from mmrec.llm import Backbone, Encoded
from mmrec.llm.encode import plan_batches, pool


def hidden_states(backbone, text):
    """[len, d] of one text alone: no batch, no padding, nothing of encode.py."""
    ids = backbone.tokenizer(text, truncation=True, max_length=backbone.max_length)["input_ids"]
    with torch.no_grad():
        return backbone.model(input_ids=torch.tensor([ids])).last_hidden_state[0]


REFERENCE = {
    "mean": lambda h: h.mean(0),
    "weighted": lambda h: (torch.arange(1.0, len(h) + 1) / (len(h) * (len(h) + 1) / 2)) @ h,
    "last": lambda h: h[-1],
    "cls": lambda h: h[0],
}


@pytest.mark.parametrize("pooling", ["mean", "weighted", "last", "cls"])
@pytest.mark.parametrize("layout", ["packed", "exact", "padded"])
@pytest.mark.parametrize("normalize", [False, True])
def test_pooled_equals_text_by_text(model_folder, texts, pooling, layout, normalize):
    backbone = Backbone.load(model_folder, quantize=None)
    got = backbone.encode(texts, pooling=pooling, layout=layout, normalize=normalize, batch_tokens=48).pooled
    want = torch.stack([REFERENCE[pooling](hidden_states(backbone, text)) for text in texts])
    if normalize:
        want = want / want.norm(dim=1, keepdim=True)
    assert got.dtype == torch.float32 and got.shape == (len(texts), 64)
    torch.testing.assert_close(got, want, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("layout", ["packed", "exact", "padded"])
@pytest.mark.parametrize("budget", [None, 1, 3])
def test_tokens_equal_text_by_text(model_folder, texts, layout, budget):
    backbone = Backbone.load(model_folder, quantize=None)
    got = backbone.encode(texts, pooling="tokens", token_budget=budget, layout=layout, batch_tokens=48)
    want = [hidden_states(backbone, text)[:budget] for text in texts]
    assert (got.offsets[1:] - got.offsets[:-1]).tolist() == [len(w) for w in want]
    torch.testing.assert_close(got.values, torch.cat(want), atol=2e-6, rtol=1e-5)
    assert torch.equal(got.item(3), got.values[got.offsets[3] : got.offsets[4]])


def test_truncates_to_max_length(bert):
    backbone = Backbone.load(bert, quantize=None, max_length=4)
    got = backbone.encode(["red blue green big small"], pooling="tokens")
    assert len(got.values) == 4
    torch.testing.assert_close(got.values, hidden_states(backbone, "red blue"), atol=2e-6, rtol=1e-5)


def test_text_without_tokens_is_zero_or_empty(qwen2):
    backbone = Backbone.load(qwen2, quantize=None)
    for pooling in ("mean", "last", "cls"):
        pooled = backbone.encode(["", "red hat", ""], pooling=pooling, normalize=True).pooled
        assert torch.equal(pooled[0], torch.zeros(64)) and torch.equal(pooled[2], torch.zeros(64))
        torch.testing.assert_close(pooled[1].norm(), torch.tensor(1.0))
    tokens = backbone.encode(["", "red hat", ""], pooling="tokens")
    length = len(backbone.tokenizer("red hat")["input_ids"])
    assert length > 1 and tokens.offsets.tolist() == [0, 0, length, length]
    assert backbone.encode([""], requires_grad=True).pooled.tolist() == [[0.0] * 64]


def test_no_texts(bert):
    backbone = Backbone.load(bert, quantize=None)
    assert backbone.encode([]).pooled.shape == (0, 64)
    tokens = backbone.encode([], pooling="tokens")
    assert tokens.values.shape == (0, 64) and tokens.offsets.tolist() == [0]


def test_order_and_duplicates_do_not_change_bits(model_folder, texts):
    backbone = Backbone.load(model_folder)
    straight = backbone.encode(texts, pooling="tokens", batch_tokens=16)
    order = torch.tensor([5, 2, 7, 0, 0, 1, 3, 4, 6, 2])
    mixed = backbone.encode([texts[i] for i in order], pooling="tokens", batch_tokens=16)
    want = straight.select(order)
    assert torch.equal(mixed.offsets, want.offsets) and torch.equal(mixed.values, want.values)
    assert torch.equal(straight.item(0), straight.item(5))


def test_company_changes_at_most_rounding(model_folder, texts):
    backbone = Backbone.load(model_folder)
    alone = torch.cat([backbone.encode([text]).pooled for text in texts])
    torch.testing.assert_close(backbone.encode(texts).pooled, alone, atol=2e-6, rtol=1e-5)


def test_pooling_reads_the_rows_of_each_text_only():
    hidden = torch.randn(7, 4)
    hidden[0] = hidden[6] = float("nan")
    for pooling, want in REFERENCE.items():
        got = pool(hidden, torch.tensor([1, 3, 6]), pooling)
        torch.testing.assert_close(got, torch.stack([want(hidden[1:3]), want(hidden[3:6])]))
        half = pool(hidden.bfloat16(), torch.tensor([1, 3, 6]), pooling)
        assert half.dtype == torch.float32
        torch.testing.assert_close(half, torch.stack([want(h.bfloat16().float()) for h in (hidden[1:3], hidden[3:6])]))


@pytest.mark.parametrize("pooling", list(REFERENCE))
def test_pooling_is_differentiable(pooling):
    hidden = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    offsets = torch.tensor([0, 1, 6])
    wanted = torch.stack([REFERENCE[pooling](h.float()) for h in (hidden[:1], hidden[1:])])
    (expected,) = torch.autograd.grad(wanted.square().sum(), hidden)
    (found,) = torch.autograd.grad(pool(hidden, offsets, pooling).square().sum(), hidden)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_padding_rows_are_never_read(monkeypatch, bert):
    backbone = Backbone.load(bert, quantize=None, kernels=False)
    real = backbone.model.forward

    def poisoned(input_ids, attention_mask, **others):
        found = real(input_ids=input_ids, attention_mask=attention_mask, **others)
        found.last_hidden_state[attention_mask == 0] = float("nan")
        return found

    expected = backbone.encode(["red", "blue green big"], layout="padded").pooled
    monkeypatch.setattr(backbone.model, "forward", poisoned)
    assert torch.equal(backbone.encode(["red", "blue green big"], layout="padded").pooled, expected)


def test_plan_batches_respects_budget_and_length():
    lengths = [3, 5, 0, 5, 3, 9, 5, 1]
    assert plan_batches(lengths, 10, "exact") == [[5], [1, 3], [6], [0, 4], [7]]
    assert plan_batches(lengths, 10, "padded") == [[5], [1, 3], [6, 0], [4, 7]]
    assert plan_batches(lengths, 10, "packed") == [[5], [1, 3], [6, 0], [4, 7]]
    assert plan_batches(lengths, 13, "packed") == [[5], [1, 3], [6, 0, 4, 7]]
    assert plan_batches([50], 10, "padded") == plan_batches([50], 10, "packed") == [[0]]
    assert plan_batches([], 10, "packed") == []


def test_gradient_reaches_adapter_and_equals_padding_free(model_folder, texts):
    backbone = Backbone.load(model_folder, lora={"r": 4, "init": "random"})
    grads = []
    for layout in ("padded", "exact", "packed"):
        for parameter in backbone.trainable_parameters():
            parameter.grad = None
        pooled = backbone.encode(texts, requires_grad=True, layout=layout, batch_tokens=60).pooled
        (pooled * torch.linspace(-1, 1, pooled.numel()).view_as(pooled)).sum().backward()
        grads.append([parameter.grad.clone() for parameter in backbone.trainable_parameters()])
    for a, *others in zip(*grads, strict=True):
        assert a.abs().max() > 0
        for b in others:
            torch.testing.assert_close(a, b, atol=2e-5 * float(a.abs().max()), rtol=1e-4)


def test_inference_leaves_mode_and_graph_alone(bert, texts):
    backbone = Backbone.load(bert, lora={"r": 4, "dropout": 0.5, "init": "random"}).train()
    first, second = backbone.encode(texts).pooled, backbone.encode(texts).pooled
    assert torch.equal(first, second) and not first.requires_grad and backbone.training
    drawn = [backbone.encode(texts, requires_grad=True).pooled for _ in range(2)]
    assert not torch.equal(*drawn) and drawn[0].requires_grad


def test_interruption_restores_mode(bert, texts, monkeypatch):
    backbone = Backbone.load(bert, lora=2).train()

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(backbone, "forward_rows", interrupt)
    with pytest.raises(KeyboardInterrupt):
        backbone.encode(texts)
    assert backbone.training


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_only_on_a_terminal(bert, texts, monkeypatch, capsys):
    backbone = Backbone.load(bert, quantize=None)
    backbone.encode(texts)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys, "stderr", Terminal())
    backbone.encode(texts, progress=False)
    assert sys.stderr.getvalue() == ""
    backbone.encode(texts)
    assert "texts" in sys.stderr.getvalue()


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"texts": "red"}, TypeError, "sequence of str"),
        ({"texts": ["red", None]}, TypeError, r"texts\[1\]"),
        ({"texts": ["red"], "pooling": "max"}, ValueError, "pooling"),
        ({"texts": ["red"], "batch_tokens": 0}, ValueError, "batch_tokens"),
        ({"texts": ["red"], "token_budget": 2}, ValueError, "token_budget"),
        ({"texts": ["red"], "pooling": "tokens", "token_budget": 0}, ValueError, "token_budget"),
    ],
)
def test_bad_input(bert, arguments, error, words):
    backbone = Backbone.load(bert, quantize=None)
    with pytest.raises(error, match=words):
        backbone.encode(**arguments)


def test_forward_tokens_validates(bert):
    backbone = Backbone.load(bert, quantize=None)
    ids = torch.tensor([[4, 5, 6]])
    assert backbone.forward_tokens(ids).shape == (1, 3, 64)
    with pytest.raises(ValueError, match="input_ids"):
        backbone.forward_tokens(ids.float())
    with pytest.raises(ValueError, match="attention_mask"):
        backbone.forward_tokens(ids, torch.ones(1, 2))
    with pytest.raises(ValueError, match="right"):
        backbone.forward_tokens(ids, torch.tensor([[0, 1, 1]]))


def test_encoded_checks_itself_and_selects():
    values = torch.arange(12.0).view(6, 2).requires_grad_()
    encoded = Encoded(values=values, offsets=torch.tensor([0, 2, 2, 6]))
    picked = encoded.select(torch.tensor([2, 1, 0, 2]))
    assert picked.offsets.tolist() == [0, 4, 4, 6, 10]
    assert picked.values[:, 0].tolist() == [4, 6, 8, 10, 0, 2, 4, 6, 8, 10]
    picked.values.sum().backward()
    assert values.grad[:, 0].tolist() == [1, 1, 2, 2, 2, 2]
    joined = Encoded.concat([encoded, picked])
    assert len(joined) == 7 and torch.equal(joined.item(-1), encoded.item(2))
    with pytest.raises(IndexError):
        joined.item(7)
    for bad in (
        {}, {"values": values}, {"values": values, "offsets": torch.tensor([0, 5])},
        {"values": values, "offsets": torch.tensor([0, 4, 2, 6])}, {"pooled": values, "offsets": torch.tensor([0, 6])},
        {"values": values, "offsets": torch.tensor([0, 6], dtype=torch.int32)}, {"pooled": values[0]},
    ):  # fmt: skip
        with pytest.raises(ValueError):
            Encoded(**bad)
