"""Soft prompts: against embeddings put together by hand, alone and beside a LoRA adapter and a prefix."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmrec.llm import Backbone, SoftPrompt
from mmrec.llm.tokenizing import tokenize

pytest.importorskip("transformers")
pytest.importorskip("peft")

TEXTS = ["red shoe", "old", "small hat with red star and blue war film", "red shoe"]
USERS = [3, -1, 0, 2]


def by_hand(backbone: Backbone, prompt: SoftPrompt, text: str, user: int) -> torch.Tensor:
    """Hidden states of the text's own tokens: behind the user's vectors and those of all, alone in a batch."""
    ids = torch.tensor(tokenize(backbone, [text], special=True))
    words = backbone.model.get_input_embeddings()(ids)
    before = [prompt.vectors["user"][user], prompt.vectors["items"][0]]  # -1 is the last one here too
    found = backbone.model(inputs_embeds=torch.cat([torch.cat(before).unsqueeze(0), words], dim=1))
    return found.last_hidden_state[0, prompt.length :]


@pytest.fixture(params=["packed", "exact", "padded"])
def layout(request):
    return request.param


@pytest.mark.parametrize("lora", [None, {"r": 4, "init": "random"}])
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_vectors_and_gradients(model_folder, layout, lora, quantize):
    backbone = Backbone.load(model_folder, quantize=quantize, lora=lora)
    prompt = backbone.soft_prompt({"user": (5, 2), "items": (1, 3)})
    with torch.no_grad():
        for table in prompt.vectors.values():
            table.add_(torch.randn(table.shape, generator=torch.Generator().manual_seed(0)), alpha=0.2)
    arguments = {"soft_prompt": prompt, "soft_ids": {"user": USERS}, "layout": layout, "batch_tokens": 40}
    own = [by_hand(backbone, prompt, text, user) for text, user in zip(TEXTS, USERS, strict=True)]
    found = backbone.encode(TEXTS, pooling="tokens", **arguments)
    assert found.offsets.diff().tolist() == [len(h) for h in own]
    torch.testing.assert_close(found.values, torch.cat(own).detach(), atol=5e-6, rtol=1e-5)

    leaves = [*prompt.parameters(), *backbone.trainable_parameters()]
    weight = torch.linspace(-1, 1, 4 * 64).view(4, 64)
    wanted = torch.autograd.grad((torch.stack([h.mean(0) for h in own]) * weight).sum(), leaves)
    pooled = backbone.encode(TEXTS, requires_grad=True, **arguments).pooled
    for a, b in zip(torch.autograd.grad((pooled * weight).sum(), leaves), wanted, strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, atol=2e-5 * float(b.abs().max()), rtol=1e-4)
    assert wanted[0][[1, 4]].abs().max() == 0 and (wanted[0][[0, 2, 3, 5]].abs().amax((1, 2)) > 0).all()


def test_the_same_text_of_two_users_is_computed_twice(qwen2):
    backbone = Backbone.load(qwen2, quantize=None)
    prompt = SoftPrompt({"user": (3, 2)}, 64)
    with torch.no_grad():
        prompt.vectors["user"].normal_()
    a, b, c = backbone.encode(["hat"] * 3, soft_prompt=prompt, soft_ids={"user": [0, 1, 0]}).pooled
    assert torch.equal(a, c) and not torch.equal(a, b)


def test_behind_a_prefix(qwen2):
    backbone = Backbone.load(qwen2, quantize=None)
    prompt = backbone.soft_prompt({"task": (1, 2)}, init="blue film")
    (found,) = backbone.encode(
        ["old hat"], prefix=backbone.prefix("red shoe"), soft_prompt=prompt, pooling="last"
    ).pooled
    embed = backbone.model.get_input_embeddings()
    ids = [torch.tensor(tokenize(backbone, [text], special=False)[0]) for text in ("red shoe", "old hat")]
    rows = torch.cat([embed(ids[0]), prompt.vectors["task"][0], embed(ids[1])])
    with torch.no_grad():
        wanted = backbone.model(inputs_embeds=rows.unsqueeze(0)).last_hidden_state[0, -1]
    torch.testing.assert_close(found, wanted, atol=5e-6, rtol=1e-5)


def test_each_table_takes_its_own_ids():
    prompt = SoftPrompt({"user": (9, 1), "item": (9, 1)}, 4)
    with torch.no_grad():
        for name, table in prompt.vectors.items():
            table.copy_(torch.arange(10.0).view(10, 1, 1) + (100 if name == "item" else 0))
    found = prompt(prompt.rows(2, {"user": [1, -1], "item": torch.tensor([7, 8])}))
    assert found[:, :, 0].tolist() == [[1, 107], [9, 108]]


def test_texts_are_cut_to_leave_room_for_it(model_folder):
    backbone = Backbone.load(model_folder, quantize=None, max_length=12)
    prompt = backbone.soft_prompt({"task": (1, 4)})
    for layout in ("packed", "padded"):
        found = backbone.encode(["?" * 40, "red"], soft_prompt=prompt, pooling="tokens", layout=layout)
        assert found.offsets.diff()[0] <= 8
    with pytest.raises(ValueError, match="fewer vectors than max_length, 12, got 12"):
        backbone.encode(["red"], soft_prompt=SoftPrompt({"task": (1, 12)}, 64))


def test_it_lives_in_the_space_of_the_input_embeddings(tmp_path, save_byte_tokenizer):
    import transformers

    config = transformers.ElectraConfig(
        vocab_size=384, embedding_size=32, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
        num_attention_heads=4,
    )  # fmt: skip
    transformers.ElectraModel(config).save_pretrained(tmp_path)
    save_byte_tokenizer(tmp_path)
    backbone = Backbone.load(tmp_path, quantize=None)
    prompt = backbone.soft_prompt({"task": (1, 2)})
    assert prompt.width == 32 and backbone.encode(["red"], soft_prompt=prompt).pooled.shape == (1, 64)


def test_a_text_without_tokens_is_zero(qwen2):
    backbone = Backbone.load(qwen2, quantize=None)
    found = backbone.encode(["", "red"], soft_prompt=backbone.soft_prompt({"task": (1, 2)})).pooled
    assert torch.equal(found[0], torch.zeros(64)) and found[1].abs().max() > 0


def test_it_starts_at_the_vocabulary(qwen2):
    backbone = Backbone.load(qwen2, quantize=None)
    table = backbone.model.get_input_embeddings().weight
    prompt = backbone.soft_prompt({"task": (1, 2), "user": (4, 3)}, init="red shoe")
    ids = tokenize(backbone, ["red shoe"], special=False)[0]
    rows = table[torch.tensor([ids[i % len(ids)] for i in range(5)])]
    assert torch.equal(prompt.vectors["task"], rows[:2].expand(2, -1, -1))
    assert torch.equal(prompt.vectors["user"], rows[2:].expand(5, -1, -1))
    drawn = backbone.soft_prompt({"task": (1, 7)}, seed=1)
    assert torch.equal(drawn.vectors["task"], backbone.soft_prompt({"task": (1, 7)}, seed=1).vectors["task"])
    assert all((row == table).all(1).any() for row in drawn.vectors["task"][0])


def test_it_trains_beside_an_adapter(qwen2):
    backbone = Backbone.load(qwen2, lora=4)
    prompt = backbone.soft_prompt({"task": (1, 2)})
    optimizer = torch.optim.AdamW([*prompt.parameters(), *backbone.trainable_parameters()], lr=3e-3)
    target = nn.functional.normalize(torch.randn(4, 64, generator=torch.Generator().manual_seed(1)), dim=1)
    losses = []
    for _ in range(20):
        pooled = backbone.train().encode(TEXTS, soft_prompt=prompt, normalize=True, requires_grad=True).pooled
        losses.append((pooled - target).square().sum())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]


def test_round_trip(tmp_path):
    prompt = SoftPrompt({"task": (1, 3), "user": (5, 2)}, 16, seed=3)
    prompt.save(tmp_path)
    found = SoftPrompt.load(tmp_path)
    assert found.tables == prompt.tables and found.length == 5
    for name, table in prompt.vectors.items():
        assert torch.equal(found.vectors[name], table)
    (tmp_path / "soft_prompt.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="damaged"):
        SoftPrompt.load(tmp_path)
    with pytest.raises(ValueError, match="no soft_prompt.safetensors"):
        SoftPrompt.load(tmp_path / "elsewhere")


def test_bad_input(qwen2):
    prompt = SoftPrompt({"task": (1, 3), "user": (5, 2)}, 64)
    backbone = Backbone.load(qwen2, quantize=None)
    for ids, words in (
        (None, "soft_ids must name 'user', which has 5 entries"),
        ({"user": 5}, r"soft_ids\['user'\] must be in \[-1, 5\), got \[5\]"),
        ({"user": [0.0, 1.7]}, r"soft_ids\['user'\] must be integers, got torch.float32"),
        ({"user": [0, 1, 2]}, r"soft_ids\['user'\] must be one id or 2, got \[3\]"),
        ({"user": 0, "item": 0}, "there is no table 'item'; there are task, user"),
    ):
        with pytest.raises(ValueError, match=words):
            backbone.encode(["red", "blue"], soft_prompt=prompt, soft_ids=ids)
    with pytest.raises(ValueError, match="vectors of width 64, got 32"):
        backbone.encode(["red"], soft_prompt=SoftPrompt({"task": (1, 3)}, 32))
    with pytest.raises(ValueError, match="at least one table"):
        SoftPrompt({}, 64)
    with pytest.raises(ValueError, match=r"tables\['task'\] must be"):
        SoftPrompt({"task": (1, 0)}, 64)
    with pytest.raises(ValueError, match=r"init must be \[m ≥ 1, 64\]"):
        SoftPrompt({"task": (1, 1)}, 64, init=torch.zeros(2, 32))
    with pytest.raises(ValueError, match="init must have a token"):
        backbone.soft_prompt({"task": (1, 1)}, init="")
