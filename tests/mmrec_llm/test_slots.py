"""Vectors of other modalities as tokens, against the model called on rows that are put together by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmrec.llm import Backbone, ModalitySlots, Slot, SlotSpec
from mmrec.llm.tokenizing import tokenize

WIDTH = 6
LAYOUTS = ("packed", "exact", "padded")


def images(rows: int = 4) -> torch.Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(3))


def slots_of(backbone: Backbone, kind: str = "linear", tokens: int = 2) -> ModalitySlots:
    return ModalitySlots.of(backbone, {"image": SlotSpec(WIDTH, tokens, kind), "table": SlotSpec(3)}, seed=1)


def by_hand(backbone: Backbone, pieces, filled: dict[Slot, torch.Tensor], special: tuple[list[int], list[int]]):
    """Last hidden states of one text."""
    embed = backbone.model.get_input_embeddings()
    rows = [embed(torch.tensor(special[0], dtype=torch.int64))]
    for piece in pieces:
        if isinstance(piece, Slot):
            rows.append(filled[piece])
        else:
            rows.append(embed(torch.tensor(tokenize(backbone, [piece], special=False)[0], dtype=torch.int64)))
    rows.append(embed(torch.tensor(special[1], dtype=torch.int64)))
    with torch.no_grad():
        return backbone.model(inputs_embeds=torch.cat(rows).unsqueeze(0)).last_hidden_state[0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["linear", "mlp", "resampler"])
@pytest.mark.parametrize(("family", "special"), [("bert", ([2], [3])), ("qwen2", ([], []))])
def test_slots_stand_where_they_are_in_the_text(request, family, special, kind, layout):
    backbone = Backbone.load(request.getfixturevalue(family), quantize=None)
    slots, vectors = slots_of(backbone, kind), images()
    texts = [
        ["red shoe ", Slot("image", 2), " with hat ", Slot("table", 0)], "blue film", [Slot("image", 0)],
        ["old ", Slot("image", -1), " night"],
    ]  # fmt: skip
    table = torch.ones(1, 3)
    found = backbone.encode(
        texts, slots=slots.bind({"image": vectors, "table": table}), pooling="tokens", layout=layout, progress=False
    )
    with torch.no_grad():
        filled = {Slot("image", n): tokens for n, tokens in enumerate(slots("image", vectors))}
        filled |= {Slot("table", 0): slots("table", table)[0], Slot("image", -1): slots.missing("image")}
    for n, text in enumerate(texts):
        expected = by_hand(backbone, [text] if isinstance(text, str) else text, filled, special)
        torch.testing.assert_close(found.item(n), expected, atol=5e-6, rtol=1e-4)


@pytest.mark.parametrize("family", ["bert", "qwen2"])
def test_tokens_in_place_of_words_are_those_words(request, family):
    """A projector that gives the embeddings of tokens makes the text that has these tokens."""
    backbone = Backbone.load(request.getfixturevalue(family), quantize=None)
    embed = backbone.model.get_input_embeddings()
    words = torch.tensor(tokenize(backbone, [" green hat"], special=False)[0])
    slots = ModalitySlots({"word": SlotSpec(embed.weight.shape[1])}, backbone.input_width)
    with torch.no_grad():
        slots._projectors[0].weight.copy_(torch.eye(embed.weight.shape[1]))
        slots._projectors[0].bias.zero_()
        slots._size[0].copy_(embed(words[:1]).square().mean().sqrt())
    (first,) = backbone.encode([["red", Slot("word", 0), " shoe"]], slots=slots.bind({"word": embed(words[:1])})).pooled
    pieces = [tokenize(backbone, [text], special=False)[0] for text in ("red", " shoe")]
    ids = torch.tensor([pieces[0] + words[:1].tolist() + pieces[1]])
    if family == "bert":
        ids = torch.tensor([[2, *ids[0].tolist(), 3]])
    with torch.no_grad():
        expected = backbone.model(input_ids=ids).last_hidden_state[0].mean(0)
    torch.testing.assert_close(first, expected, atol=1e-5, rtol=1e-4)


def test_what_is_in_a_string_is_text(qwen2):
    backbone = Backbone.load(qwen2, quantize=None)
    bound = slots_of(backbone).bind({"image": images()})
    for text in ("<image>", "Slot('image', 0)", "\x00image\x00"):
        plain = backbone.encode([text]).pooled
        assert torch.equal(backbone.encode([text], slots=bound).pooled, plain)
        assert torch.allclose(backbone.encode([[text]], slots=bound).pooled, plain, atol=1e-6)


def test_only_rows_that_are_named_are_read(qwen2):
    backbone = Backbone.load(qwen2, quantize=None)
    slots, vectors = slots_of(backbone), images()
    texts = [["red ", Slot("image", 1)], [Slot("image", -1), " hat"]]
    expected = backbone.encode(texts, slots=slots.bind({"image": vectors})).pooled
    poisoned = vectors.clone()
    poisoned[[0, 2, 3]] = torch.nan
    assert torch.equal(backbone.encode(texts, slots=slots.bind({"image": poisoned})).pooled, expected)
    assert torch.equal(
        backbone.encode(texts[1:], slots=slots.bind({})).pooled,
        backbone.encode(texts[1:], slots=slots.bind({"image": poisoned})).pooled,
    )


def test_a_resampler_takes_any_number_of_vectors_and_none_is_missing(qwen2):
    backbone = Backbone.load(qwen2, quantize=None)
    slots = slots_of(backbone, "resampler")
    values, offsets = images(7), torch.tensor([0, 3, 3, 7])
    bound = slots.bind({"image": (values, offsets)})
    texts = [["a ", Slot("image", row)] for row in (0, 1, 2, -1)]
    found = backbone.encode(texts, slots=bound).pooled
    assert torch.equal(found[1], found[3]), "no vectors: missing"
    for row, part in ((0, values[:3]), (2, values[3:])):
        alone = slots.bind({"image": (part, torch.tensor([0, len(part)]))})
        (one,) = backbone.encode([["a ", Slot("image", 0)]], slots=alone).pooled
        torch.testing.assert_close(found[row], one, atol=2e-6, rtol=1e-5)
    order = torch.tensor([2, 0, 1])
    shuffled = slots.bind({"image": (values[:3][order], torch.tensor([0, 3]))})
    torch.testing.assert_close(backbone.encode(texts[:1], slots=shuffled).pooled[0], found[0], atol=2e-6, rtol=1e-5)


def test_tokens_begin_at_the_size_of_the_models_own(qwen2, bert):
    for folder in (qwen2, bert):
        backbone = Backbone.load(folder, quantize=None)
        own = backbone.model.get_input_embeddings().weight.square().mean().sqrt()
        for kind in ("linear", "mlp", "resampler"):
            slots = slots_of(backbone, kind)
            for scale in (1e-3, 1.0, 1e3):
                found = slots("image", scale * images()).square().mean(2).sqrt()
                torch.testing.assert_close(found, own.expand_as(found), rtol=0.05, atol=0)


def test_behind_a_prefix_and_in_one(qwen2):
    backbone = Backbone.load(qwen2, quantize=None)
    slots, vectors = slots_of(backbone), images()
    bound = slots.bind({"image": vectors})
    start, end = ["liked ", Slot("image", 0), " and "], [Slot("image", 1), " hat"]
    prefix = backbone.prefix([start], slots=bound)
    (found,) = backbone.encode([end], prefix=prefix, slots=bound, pooling="last").pooled
    (whole,) = backbone.encode([[*start, *end]], slots=bound, pooling="last").pooled
    torch.testing.assert_close(found, whole, atol=5e-6, rtol=1e-4)


def test_beside_a_soft_prompt(qwen2):
    backbone = Backbone.load(qwen2, quantize=None)
    slots, prompt = slots_of(backbone), backbone.soft_prompt({"task": (1, 3)})
    bound = slots.bind({"image": images()})
    text = ["red ", Slot("image", 3)]
    found = backbone.encode([text], slots=bound, soft_prompt=prompt, pooling="tokens").item(0)
    embed = backbone.model.get_input_embeddings()
    ids = torch.tensor(tokenize(backbone, ["red "], special=False)[0])
    with torch.no_grad():
        rows = torch.cat([prompt.vectors["task"][0], embed(ids), slots("image", images()[3:])[0]])
        expected = backbone.model(inputs_embeds=rows.unsqueeze(0)).last_hidden_state[0, 3:]
    torch.testing.assert_close(found, expected, atol=5e-6, rtol=1e-4)


@pytest.mark.parametrize("kind", ["linear", "mlp", "resampler"])
def test_gradients_reach_projectors_vectors_and_the_adapter(qwen2, kind):
    backbone = Backbone.load(qwen2, lora={"r": 2, "init": "random"})
    slots, vectors = slots_of(backbone, kind), images().requires_grad_()
    texts = [["red ", Slot("image", 0), " hat"], [Slot("image", -1), " shoe"]]
    pooled = backbone.encode(texts, slots=slots.bind({"image": vectors}), requires_grad=True).pooled
    pooled.square().sum().backward()
    assert vectors.grad is not None and vectors.grad[0].any() and not vectors.grad[1:].any()
    of_image = [*slots._projectors[0].parameters(), slots._missing[0], slots._size[0]]
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in of_image)
    assert all(parameter.grad is None for parameter in slots._projectors[1].parameters())
    assert all(p.grad is not None and p.grad.any() for p in backbone.trainable_parameters())
    before = backbone.encode(texts, slots=slots.bind({"image": vectors.detach()})).pooled
    torch.testing.assert_close(pooled.detach(), before, atol=1e-5, rtol=1e-4)


def test_what_only_a_slot_says_is_learned_by_its_projector(qwen2):
    """The model is frozen; the text is the same for all: what tells rows apart is in the vectors alone."""
    backbone = Backbone.load(qwen2, quantize=None)
    slots, vectors = slots_of(backbone, "mlp"), images(8)
    head = nn.Linear(64, 2)
    label = (vectors[:, 0] > 0).long()
    texts = [["a film ", Slot("image", row), " :"] for row in range(8)]
    optimizer = torch.optim.Adam([*slots.parameters(), *head.parameters()], lr=0.01)
    for _ in range(60):
        pooled = backbone.encode(texts, slots=slots.bind({"image": vectors}), pooling="last", requires_grad=True).pooled
        loss = nn.functional.cross_entropy(head(pooled), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05


def test_the_order_of_texts_and_repeats_change_no_bit(qwen2):
    backbone = Backbone.load(qwen2, quantize=None)
    bound = slots_of(backbone).bind({"image": images()})
    texts = [["red ", Slot("image", 0)], ["red ", Slot("image", 1)], "blue", ["red ", Slot("image", 0)]]
    found = backbone.encode(texts, slots=bound).pooled
    assert torch.equal(found[0], found[3]) and not torch.equal(found[0], found[1])
    again = backbone.encode(texts[::-1], slots=bound).pooled
    assert torch.equal(again.flip(0), found)


def test_texts_are_cut_behind_their_slots_only(qwen2):
    backbone = Backbone.load(qwen2, quantize=None, max_length=12)
    bound = slots_of(backbone, tokens=4).bind({"image": images()})
    for layout in LAYOUTS:
        found = backbone.encode([[Slot("image", 0), "?" * 40]], slots=bound, pooling="tokens", layout=layout)
        assert found.offsets.tolist() == [0, 12]
    with pytest.raises(ValueError, match=r"texts\[1\]: slot 'image' of row 2 ends behind the 12 tokens"):
        backbone.encode(["red", ["?" * 9, Slot("image", 2)]], slots=bound)
    bert_like = backbone.encode([["?" * 8, Slot("image", 2)]], slots=bound, pooling="tokens")
    assert bert_like.offsets.tolist() == [0, 12]


def test_special_tokens_stay_around_a_text_that_is_cut(bert):
    backbone = Backbone.load(bert, quantize=None, max_length=8)
    bound = slots_of(backbone).bind({"image": images()})
    found = backbone.encode([[Slot("image", 0), "red " * 20]], slots=bound, pooling="tokens").item(0)
    embed = backbone.model.get_input_embeddings()
    red = tokenize(backbone, ["red"], special=False)[0]
    with torch.no_grad():
        filled = slots_of(backbone)("image", images()[:1])[0]
        rows = torch.cat([embed(torch.tensor([2])), filled, embed(torch.tensor(red * 4)), embed(torch.tensor([3]))])
        expected = backbone.model(inputs_embeds=rows.unsqueeze(0)).last_hidden_state[0]
    torch.testing.assert_close(found, expected, atol=5e-6, rtol=1e-4)
    with pytest.raises(ValueError, match="ends behind the 8 tokens"):
        backbone.encode([["red " * 5, Slot("image", 0)]], slots=bound)


def test_round_trip(tmp_path, qwen2):
    backbone = Backbone.load(qwen2, quantize=None)
    slots = slots_of(backbone, "resampler")
    slots.save(tmp_path)
    found = ModalitySlots.load(tmp_path)
    assert found.specs == slots.specs and found.width == slots.width
    text = [["red ", Slot("image", 1)]]
    one, other = (backbone.encode(text, slots=s.bind({"image": images()})).pooled for s in (slots, found))
    assert torch.equal(one, other)
    (tmp_path / "modality_slots.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="damaged"):
        ModalitySlots.load(tmp_path)
    with pytest.raises(ValueError, match="no modality_slots.safetensors"):
        ModalitySlots.load(tmp_path / "elsewhere")


def test_the_seed_decides_and_the_callers_stream_is_left(qwen2):
    backbone = Backbone.load(qwen2, quantize=None)
    state = torch.get_rng_state()
    first, same = slots_of(backbone), slots_of(backbone)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), same.parameters(), strict=True))


def test_bad_input(qwen2, tmp_path):
    from mmrec.llm import EmbeddingCache

    backbone = Backbone.load(qwen2, quantize=None)
    slots = slots_of(backbone)
    bound = slots.bind({"image": images()})
    for text, words in (
        ([Slot("image", 4)], r"texts\[0\]: slot 'image' must be of a row in \[-1, 4\), got 4"),
        ([Slot("image", -2)], r"in \[-1, 4\), got -2"), ([Slot("table", 0)], r"in \[-1, 0\), got 0"),
        ([Slot("sound", 0)], "there are no slots 'sound'; there are image, table"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            backbone.encode([text], slots=bound)
    with pytest.raises(TypeError, match=r"texts\[0\] has pieces; give slots"):
        backbone.encode([["red"]])
    with pytest.raises(TypeError, match=r"texts\[0\] must be a str, got int"):
        backbone.encode([3], slots=bound)
    with pytest.raises(TypeError, match=r"texts\[0\] must be a str, got list"):
        backbone.encode([["red", 3]], slots=bound)
    with pytest.raises(ValueError, match="cache: its keys do not hold soft prompts, prefixes or slots"):
        backbone.encode(["red"], slots=bound, cache=EmbeddingCache(tmp_path))
    with pytest.raises(ValueError, match="values name 'sound', which has no slots"):
        slots.bind({"sound": images()})
    with pytest.raises(ValueError, match=r"values\['image'\] must be \[.., 6\], got \[4, 5\]"):
        slots.bind({"image": images()[:, :5]})
    with pytest.raises(ValueError, match="only a resampler takes several per row"):
        slots.bind({"image": (images(), torch.tensor([0, 4]))})
    with pytest.raises(ValueError, match="offsets must be int64 and rise from 0 to 4"):
        slots_of(backbone, "resampler").bind({"image": (images(), torch.tensor([0, 5]))})
    with pytest.raises(ValueError, match="tokens of width 64, got 32"):
        backbone.encode(["red"], slots=ModalitySlots({"image": SlotSpec(6)}, 32).bind({}))
    with pytest.raises(ValueError, match="kind must be one of .*got 'cnn'"):
        SlotSpec(3, kind="cnn")
    with pytest.raises(ValueError, match="width and tokens must be at least 1, got 3 and 0"):
        SlotSpec(3, 0)
    with pytest.raises(ValueError, match="at least one modality"):
        ModalitySlots({}, 64)
    with pytest.raises(ValueError, match="size must be positive"):
        ModalitySlots({"image": SlotSpec(6)}, 64, size=0)
