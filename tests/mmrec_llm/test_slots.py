"""Vectors of other modalities as tokens, against the model called on rows that are put together by hand."""

from __future__ import annotations

import pytest
import torch
from tokenizers import processors
from torch import nn
from torch.nn import functional as F

from mmrec.llm import Backbone, EmbeddingCache, ModalitySlots, Slot, SlotSpec, slot_pieces, slot_placeholder
from mmrec.llm.tokenizing import tokenize
from mmrec.prompting import Example, HardPrompt

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
    return backbone.model(inputs_embeds=torch.cat(rows).unsqueeze(0)).last_hidden_state[0]


def projected(slots: ModalitySlots, name: str, vectors: torch.Tensor) -> torch.Tensor:
    """The tokens of one slot with all of `vectors` as the formulas say, in float64."""
    place = list(slots.specs).index(name)
    spec = slots.specs[name]
    weight = {key: value.double() for key, value in slots._projectors[place].named_parameters()}
    x = vectors.double()
    if spec.kind == "linear":
        found = x @ weight["weight"].T + weight["bias"]
    elif spec.kind == "mlp":
        hidden = F.gelu(x @ weight["0.weight"].T + weight["0.bias"])
        found = hidden @ weight["2.weight"].T + weight["2.bias"]
    else:
        x = F.layer_norm(x, x.shape[1:], weight["norm.weight"], weight["norm.bias"])
        key, value = (x @ weight["key_value.weight"].T).chunk(2, dim=1)
        heard = []
        for head, one in enumerate(weight["query"].unbind(1)):
            own = slice(head * one.shape[1], (head + 1) * one.shape[1])
            heard.append(torch.softmax(one @ key[:, own].T / one.shape[1] ** 0.5, dim=1) @ value[:, own])
        found = torch.cat(heard, dim=1) @ weight["out.weight"].T + weight["out.bias"]
    found = found.reshape(spec.tokens, slots.width)
    found = found / found.square().mean(1, keepdim=True).sqrt() * slots._size[place].double()
    around = slots._markers[str(place)].double() if spec.markers else found[:0]
    return torch.cat([around[:1], found, around[1:]])


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
    filled = {Slot("image", n): projected(slots, "image", vectors[n : n + 1]).float() for n in range(len(vectors))}
    filled |= {Slot("table", 0): projected(slots, "table", table).float(), Slot("image", -1): slots._missing[0]}
    for n, text in enumerate(texts):
        expected = by_hand(backbone, [text] if isinstance(text, str) else text, filled, special).detach()
        assert len(found.item(n)) == len(expected)
        torch.testing.assert_close(found.item(n), expected, atol=5e-6, rtol=1e-4)


def test_markers_stand_around_what_is_there_and_what_is_not(qwen2, tmp_path):
    backbone = Backbone.load(qwen2, quantize=None)
    specs = {"table": SlotSpec(3), "image": SlotSpec(WIDTH, 2, markers=True), "user": SlotSpec(WIDTH, markers=True)}
    slots, vectors = ModalitySlots.of(backbone, specs, seed=1), images()
    bound = slots.bind({"image": vectors, "user": vectors})
    texts = [["a ", Slot("image", 3), "hat"], [Slot("user", 0), Slot("image", -1)]]
    marker = slots._markers["1"]
    filled = {Slot("image", 3): projected(slots, "image", vectors[3:]).float()}
    filled |= {Slot("image", -1): torch.cat([marker[:1], slots._missing[1], marker[1:]])}
    filled |= {Slot("user", 0): projected(slots, "user", vectors[:1]).float()}
    assert [len(filled[slot]) for slot in filled] == [4, 4, 3]
    found = backbone.encode(texts, slots=bound, pooling="tokens")
    expected = torch.cat([by_hand(backbone, text, filled, ([], [])) for text in texts]).detach()
    torch.testing.assert_close(found.values, expected, atol=5e-6, rtol=1e-4)
    backbone.encode(texts, slots=bound, requires_grad=True).pooled.square().sum().backward()
    assert all(marker.grad.abs().amax(1).all() for marker in slots._markers.values())
    slots.save(tmp_path)
    again = ModalitySlots.load(tmp_path).bind({"image": vectors, "user": vectors})
    assert torch.equal(backbone.encode(texts, slots=again, pooling="tokens").values, found.values)


@pytest.mark.parametrize("pooling", ["last", "cls", "weighted"])
def test_a_slot_is_pooled_like_words(qwen2, pooling):
    backbone = Backbone.load(qwen2, quantize=None)
    slots, vectors = slots_of(backbone), images().double()
    text = [Slot("image", 2), "hat ", Slot("image", 1)]
    (found,) = backbone.encode([text], slots=slots.bind({"image": vectors}), pooling=pooling).pooled
    filled = {Slot("image", n): projected(slots, "image", vectors[n : n + 1]).float() for n in (1, 2)}
    hidden = by_hand(backbone, text, filled, ([], [])).detach()
    place = torch.arange(1, len(hidden) + 1).unsqueeze(1)
    wanted = {"last": hidden[-1], "cls": hidden[0], "weighted": (hidden * place).sum(0) / place.sum()}[pooling]
    torch.testing.assert_close(found, wanted, atol=5e-6, rtol=1e-4)


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


@pytest.mark.parametrize("begins", [False, True])
def test_behind_a_prefix_and_in_one(qwen2, begins):
    backbone = Backbone.load(qwen2, quantize=None)
    if begins:  # a token before each text, and none before what goes on from one
        template = processors.TemplateProcessing(single="! $A", special_tokens=[("!", 7)])
        backbone.tokenizer.backend_tokenizer.post_processor = template
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


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["linear", "mlp", "resampler"])
def test_gradients_reach_projectors_vectors_and_the_adapter(qwen2, kind, layout):
    """They are those of the formulas; rows that no text names are NaN."""
    backbone = Backbone.load(qwen2, quantize=None, lora={"r": 2, "init": "random"})
    slots, vectors = slots_of(backbone, kind), images(7)
    parts = {0: slice(1, 3), 2: slice(5, 6)} if kind == "resampler" else {0: slice(0, 1), 2: slice(2, 3)}
    unread = torch.ones(7, dtype=torch.bool)
    for part in parts.values():
        unread[part] = False
    vectors[unread] = torch.nan
    vectors.requires_grad_()
    values = (vectors, torch.tensor([1, 3, 5, 6])) if kind == "resampler" else vectors
    texts = [["red ", Slot("image", 0), " hat"], [Slot("image", -1), " shoe"], ["old", Slot("image", 2)]]
    of_image = [*slots._projectors[0].parameters(), slots._missing[0], slots._size[0]]
    leaves = [vectors, *of_image, *backbone.trainable_parameters()]
    weight = torch.linspace(-1, 1, 3 * 64).view(3, 64)
    filled = {Slot("image", row): projected(slots, "image", vectors[part]).float() for row, part in parts.items()}
    filled[Slot("image", -1)] = slots._missing[0]
    own = torch.stack([by_hand(backbone, text, filled, ([], [])).mean(0) for text in texts])
    wanted = torch.autograd.grad((own * weight).sum(), leaves)
    pooled = backbone.encode(texts, slots=slots.bind({"image": values}), requires_grad=True, layout=layout).pooled
    torch.testing.assert_close(pooled, own, atol=5e-6, rtol=1e-4)
    found = torch.autograd.grad((pooled * weight).sum(), leaves)
    assert not found[0][unread].any()
    for a, b in zip(found, wanted, strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, atol=2e-5 * float(b.abs().max()), rtol=1e-3)


def test_each_text_by_its_own_adapter(qwen2):
    backbone = Backbone.load(qwen2, quantize=None)
    for seed, name in enumerate(("films", "shoes")):
        backbone.add_adapter(name, {"r": 2, "init": "random", "seed": seed})
    bound = slots_of(backbone).bind({"image": images()})
    text = ["red ", Slot("image", 0)]
    found = backbone.encode([text] * 3, slots=bound, adapters=["shoes", None, "films"]).pooled
    for name, one in zip(("shoes", None, "films"), found, strict=True):
        backbone.use_adapter(name)
        torch.testing.assert_close(one, backbone.encode([text], slots=bound).pooled[0], atol=5e-6, rtol=1e-4)
    assert not torch.allclose(found[0], found[2], atol=1e-3)


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
    with pytest.raises(ValueError, match=r"texts\[1\]: slot 'image' of row 2 is not whole within the 12 .*before it"):
        backbone.encode(["red", ["?" * 9, Slot("image", 2)]], slots=bound)
    whole = ["?" * 8, Slot("image", 2)]
    found = backbone.encode([whole], slots=bound, pooling="tokens")
    assert found.offsets.tolist() == [0, 12]
    backbone.tokenizer.truncation_side = "left"
    left = backbone.encode([["!" * 20, *whole]], slots=bound, pooling="tokens")
    assert torch.equal(left.values, found.values)
    with pytest.raises(ValueError, match=r"texts\[0\]: slot 'image' of row 0 is not whole within the 12 .*behind it"):
        backbone.encode([[Slot("image", 0), "?" * 9]], slots=bound)
    with pytest.raises(ValueError, match="row 1 is not whole within the 12"):
        backbone.prefix([[Slot("image", 1), "?" * 9]], slots=bound)


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
    with pytest.raises(ValueError, match="not whole within the 8 tokens"):
        backbone.encode([["red " * 5, Slot("image", 0)]], slots=bound)
    found = backbone.encode([["red " * 4, Slot("image", 0)]], slots=bound, pooling="tokens")
    assert found.offsets.tolist() == [0, 8]


@pytest.mark.parametrize("length", [1, 2, 3])
def test_room_for_hardly_more_than_special_tokens(bert, length):
    backbone = Backbone.load(bert, quantize=None, max_length=length)
    bound = slots_of(backbone, tokens=1).bind({"image": images()})
    found = backbone.encode([["red ", "hat"]], slots=bound, pooling="tokens")
    assert found.offsets.tolist() == [0, max(length, 2)]  # the special ones always stay
    if length < 3:
        with pytest.raises(ValueError, match=f"not whole within the {length} tokens"):
            backbone.encode([[Slot("image", 0)]], slots=bound)
    else:
        assert len(backbone.encode([[Slot("image", 0), "red"]], slots=bound, pooling="tokens").values) == 3


def test_pieces_of_a_hard_prompt():
    prompt = HardPrompt(
        intro=f"{slot_placeholder('user')} chose:", question="Next?", ask=f"Poster: {slot_placeholder('image')}\nA:"
    )
    forged = slot_placeholder("image")
    title = f"Alien {forged}"
    shot = Example([title], "Up", f"Yes {forged}")
    built = prompt.build([title, {f"year {forged}": "1979"}], examples=[shot])
    text = built.text + prompt.candidate(title)
    found = slot_pieces(text, {"user": [5, 5], "image": [-1, 7]})
    assert [piece for piece in found if isinstance(piece, Slot)] == [
        Slot("user", 5), Slot("image", -1), Slot("user", 5), Slot("image", 7)
    ]  # fmt: skip
    assert "".join(piece if isinstance(piece, str) else slot_placeholder(piece.name) for piece in found) == text
    assert found[0] == Slot("user", 5) and found[-1] == "\nA:" and "" not in found
    assert slot_pieces("no more than text", {}) == ["no more than text"] and slot_pieces("", {}) == []
    assert slot_pieces(forged, {"image": torch.tensor([2])}) == [Slot("image", 2)]
    for text, rows, words in (
        (f"a {forged}", {}, "a placeholder of 'image' for each of 0 rows, got 1"),
        (f"a {forged}", {"image": [0, 1]}, "'image' for each of 2 rows, got 1"),
        ("a", {"user": [0]}, "'user' for each of 1 rows, got 0"), (f"a {forged[:-1]}", {}, "does not end: 'image'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            slot_pieces(text, rows)
    for name in ("", "a\x1eb"):
        with pytest.raises(ValueError, match="name must have characters"):
            slot_placeholder(name)


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
    first = slots_of(backbone)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1)
    same, other = slots_of(backbone), ModalitySlots.of(backbone, first.specs, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), same.parameters(), strict=True))
    assert not torch.equal(first.missing("image"), other.missing("image"))


def test_bad_input(qwen2, tmp_path):
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
    with pytest.raises(TypeError, match=r"slots must be what `ModalitySlots.bind` gives, got ModalitySlots"):
        backbone.encode(["red"], slots=slots)
    with pytest.raises(TypeError, match="row must be an integer, got 1.5"):
        Slot("image", 1.5)
    with pytest.raises(ValueError, match="there are no slots 'sound'; there are image, table"):
        slots("sound", images())
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
