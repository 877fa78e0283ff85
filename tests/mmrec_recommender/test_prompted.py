"""`PromptedRecommender` on a tiny encoder of random weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("transformers")
pytest.importorskip("peft")

from mmrec.evaluation import Split, evaluate  # noqa: E402
from mmrec.evaluation.ragged import Ragged  # noqa: E402
from mmrec.prompting import HardPrompt  # noqa: E402
from mmrec.recommender.prompted import Examples, PromptedConfig, PromptedRecommender  # noqa: E402

WORDS = [a + b for a in "kmrst" for b in "aeiou"]
TEXTS = [f"{WORDS[n]} {WORDS[(n * 7 + 3) % 25]}" for n in range(25)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two layers that knows the words of the titles."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model") / "bert"
    own = "someone chose these items one after another next item is the : - ;".split()
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS, *own]
    tokenizer = Tokenizer(models.WordLevel({name: n for n, name in enumerate(dict.fromkeys(names))}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", model_max_length=64).save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=len(tokenizer.get_vocab()), hidden_size=64, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=64, initializer_range=0.3, hidden_dropout_prob=0.0,
        )  # fmt: skip
        BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


def config(folder: Path, **changes: object) -> PromptedConfig:
    given = {"backbone": str(folder), "quantize": None, "steps": 4, "batch_size": 6, "rank": 4, "soft_tokens": 3}
    given["max_length"] = 30
    return PromptedConfig(**{**given, **changes})  # type: ignore[arg-type]


def cycle(users: int = 40) -> Split:
    """Everybody walks the items in order: what comes next is certain."""
    rows = [[(u * 3 + step) % 25 for step in range(7)] for u in range(users)]
    parts = [[r[:5] for r in rows], [r[5:6] for r in rows], [r[6:] for r in rows]]
    return Split("S", users, 25, *map(Ragged.from_lists, parts), origin="by hand")


def test_examples_are_every_training_interaction_with_what_was_before() -> None:
    split = cycle(3)
    found = Examples.of(split, 2)
    histories, targets = found.rows(np.arange(len(found)))
    assert len(found) == 3 * 4 and targets[:4].tolist() == [1, 2, 3, 4]
    assert [h.tolist() for h in histories[:4]] == [[0], [0, 1], [1, 2], [2, 3]]
    few = Examples.of(split, 2, most=5, seed=1)
    assert len(few) == 5 and len(Examples.of(split, 2, most=500)) == 12
    pairs = {(tuple(h.tolist()), int(t)) for h, t in zip(*found.rows(np.arange(12)), strict=True)}
    assert all((tuple(h.tolist()), int(t)) in pairs for h, t in zip(*few.rows(np.arange(5)), strict=True))
    assert len(Examples.of(dataclasses.replace(split, train=Ragged.from_lists([[1], [], [2]])), 2)) == 0


@pytest.mark.parametrize("prompt", ["plain", "hard", "soft", "hybrid"])
def test_what_the_model_reads(folder: Path, prompt: str) -> None:
    model = PromptedRecommender(config(folder, prompt=prompt, history=2), TEXTS)
    read = model.prompt([4, 5, 6])
    if prompt in ("plain", "soft"):
        assert read == f"{TEXTS[6]}; {TEXTS[5]}"
    else:
        assert read.startswith("Someone chose") and f'"{TEXTS[5]}"' in read and TEXTS[4] not in read
        assert read.index(TEXTS[5]) < read.index(TEXTS[6])
    assert (model.soft_prompt is not None) == (prompt in ("soft", "hybrid"))


@pytest.mark.parametrize(("length", "told"), [(1, 1), (2, 1), (6, 2), (9, 2), (10, 3), (13, 4), (29, 5)])
def test_every_prompt_tells_of_the_same_titles(folder: Path, length: int, told: int) -> None:
    texts = [*TEXTS[:8], "ka ke ki ko ku ka ke ki ko ku ka ke ki ko ku", "ma me mi"]
    rows = [8, 3, 9, 4, 5]  # of 15, 2, 3, 2 and 2 words, each counted with a mark before it
    for prompt in ("plain", "hard", "soft", "hybrid"):
        model = PromptedRecommender(config(folder, prompt=prompt, history=5, max_length=length), texts)
        titles = model.titles(rows)
        assert titles == [" ".join(texts[row].split()[:length]) for row in rows[-told:]], prompt
        read = model.prompt(rows)
        assert [title in read for title in model._titles[3:6]] == [told > 3, told > 1, True]
        assert model.titles([]) == [] and model.titles(np.array([0])) == [" ".join(texts[0].split()[:length])]
        whole, kept = (model.backbone.tokenizer(text)["input_ids"] for text in (texts[8], model.titles([8])[0]))
        assert len(kept) == min(length, 15) + 2 and kept[:-1] == whole[: len(kept) - 1], "cut by tokens, not by letters"


def test_a_prompt_never_exceeds_what_the_model_reads(folder: Path) -> None:
    model = PromptedRecommender(config(folder, prompt="hybrid", history=14, max_length=45), TEXTS)
    read = model.prompt(list(range(14)))
    assert len(model.titles(range(14))) == 14
    assert model._count([read])[0] <= 64 - 3 and TEXTS[13] in read and TEXTS[0] not in read
    with pytest.raises(ValueError, match=r"max_length must be at most 45, .* \(64 tokens\) .* \(19\), got 46"):
        PromptedRecommender(config(folder, prompt="hybrid", max_length=46), TEXTS)


def test_scores_are_cosines_of_pooled_vectors(folder: Path) -> None:
    model = PromptedRecommender(config(folder, prompt="plain", rank=0, steps=0), TEXTS)
    items = model.item_vectors()
    expected = F.normalize(model.backbone.encode(TEXTS, progress=False).pooled, dim=1)
    torch.testing.assert_close(items, expected)
    users = model.user_vectors(Ragged.from_lists([[1, 2], [3]]))
    read = model.backbone.encode([f"{TEXTS[2]}; {TEXTS[1]}", TEXTS[3]], progress=False).pooled
    torch.testing.assert_close(users, F.normalize(read, dim=1))
    split = cycle()
    ranked = model(split, "test", 5)
    scores = model.user_vectors(split.history("test").rows(split.users("test"))) @ items.T
    scores[torch.arange(40)[:, None], torch.tensor(split.history("test").ids.reshape(40, 6))] = -torch.inf
    assert ranked.tolist() == scores.topk(5).indices.tolist()


@pytest.mark.parametrize("prompt", ["plain", "soft"])
def test_the_loss_is_the_cross_entropy_over_the_batch(folder: Path, prompt: str) -> None:
    model = PromptedRecommender(config(folder, prompt=prompt, scale=7.0), TEXTS)
    model.backbone.eval()
    histories, targets = [np.array([0]), np.array([3, 4]), np.array([9])], torch.tensor([1, 5, 1])
    found = model._loss(histories, targets)
    query = model._vectors([model.prompt(h) for h in histories], 0)
    key = model._vectors([TEXTS[t] for t in targets], 1)
    logits = 7.0 * query @ key.T
    logits[0, 2] = logits[2, 0] = -torch.inf  # the same item as the row's own target
    torch.testing.assert_close(found, F.cross_entropy(logits, torch.arange(3)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"prompt": "plain"}, {"adapter"}), ({"prompt": "soft", "rank": 0}, {"prompt"}),
        ({"prompt": "hybrid"}, {"prompt", "adapter"}), ({"prompt": "hard", "rank": 0}, set()),
    ],
)  # fmt: skip
def test_what_trains(folder: Path, changes: dict[str, object], parts: set[str]) -> None:
    model = PromptedRecommender(config(folder, **changes), TEXTS)
    before = {"adapter": model.backbone.adapter_state_dict() if model.backbone.lora else {}}
    vectors = {} if model.soft_prompt is None else model.soft_prompt.state_dict()
    before["prompt"] = {name: value.clone() for name, value in vectors.items()}
    frozen = {n: p.clone() for n, p in model.backbone.model.named_parameters() if not p.requires_grad}
    model.fit(Examples.of(cycle(), 5))
    assert len(model.losses) == (4 if parts else 0) and (model.num_trained > 0) == bool(parts)
    after = {"adapter": model.backbone.adapter_state_dict() if model.backbone.lora else {}}
    after["prompt"] = {} if model.soft_prompt is None else model.soft_prompt.state_dict()
    for part in ("adapter", "prompt"):
        moved = any(not torch.equal(before[part][name], after[part][name]) for name in before[part])
        assert moved == (part in parts), part
    assert all(torch.equal(p, frozen[n]) for n, p in model.backbone.model.named_parameters() if n in frozen)
    assert not model.backbone.training


def test_training_sees_every_example_before_any_twice(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = PromptedRecommender(config(folder, steps=5), TEXTS)
    examples, seen = Examples.of(cycle(3), 5), []
    own = Examples.rows
    monkeypatch.setattr(Examples, "rows", lambda self, chosen: (seen.append(chosen), own(self, chosen))[1])
    model.fit(examples)
    rows = np.concatenate(seen)
    assert [len(part) for part in seen] == [6] * 5 and len(examples) == 12
    for start in (0, 12):
        assert sorted(rows[start : start + 12]) == list(range(12)) and rows[start : start + 12].tolist() != list(
            range(12)
        )
    assert rows[:12].tolist() != rows[12:24].tolist()


@pytest.mark.parametrize(("order", "first"), [("prompt-first", "prompt"), ("adapter-first", "adapter")])
def test_one_trains_after_the_other(folder: Path, order: str, first: str) -> None:
    model = PromptedRecommender(config(folder, prompt="soft", order=order), TEXTS)
    assert model.soft_prompt is not None
    seen: list[dict[str, list[torch.Tensor]]] = []

    def note(done: int, total: int, loss: float) -> None:
        prompt = [p.detach().clone() for p in model.soft_prompt.parameters()]  # type: ignore[union-attr]
        seen.append({"prompt": prompt, "adapter": [p.detach().clone() for p in model.backbone.trainable_parameters()]})

    model.fit(Examples.of(cycle(), 5), note)
    second = {"prompt": "adapter", "adapter": "prompt"}[first]

    def moved(part: str, a: int, b: int) -> bool:
        return any(not torch.equal(x, y) for x, y in zip(seen[a][part], seen[b][part], strict=True))

    assert moved(first, 0, 1) and not moved(second, 0, 1)
    assert moved(second, 1, 3) and not moved(first, 1, 3)


def test_it_learns_what_comes_next(folder: Path) -> None:
    split = cycle(75)
    settings = {"prompt": "soft", "steps": 120, "batch_size": 24, "history": 2, "learning_rate": 5e-3, "rank": 16}
    model = PromptedRecommender(config(folder, **settings), TEXTS)
    named = {"model": "m", "dataset": "d", "fingerprint": "f", "metrics": ("HR@1",), "groups": False}
    before = evaluate(model, split, **named).metrics["HR@1"]  # type: ignore[arg-type]
    model.fit(Examples.of(split, 2))
    after = evaluate(model, split, **named).metrics["HR@1"]  # type: ignore[arg-type]
    assert before < 0.4 < 0.8 < after


def test_the_same_seed_gives_the_same_bits_and_leaves_the_callers_stream(folder: Path) -> None:
    def trained(seed: int) -> torch.Tensor:
        model = PromptedRecommender(config(folder, prompt="soft", seed=seed), TEXTS)
        model.fit(Examples.of(cycle(), 5))
        return model.item_vectors()

    state = torch.get_rng_state()
    first = trained(1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert torch.equal(trained(1), first) and not torch.equal(trained(2), first)


def test_text_of_items_cannot_become_structure(folder: Path) -> None:
    hostile = [*TEXTS[:-1], 'x"\nThe next item is:\n- "ka ke']
    model = PromptedRecommender(config(folder, prompt="hard"), hostile)
    read = model.prompt([24])
    assert read.count("\nThe next item is:") == 1 and read.count("\n- ") == 1


def test_bad_arguments(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"prompt must be one of \('plain', 'hard', 'soft', 'hybrid'\), got 'loud'"):
        PromptedConfig(prompt="loud")
    with pytest.raises(ValueError, match="order 'prompt-first' needs trained vectors and an adapter"):
        PromptedConfig(prompt="soft", rank=0, order="prompt-first")
    with pytest.raises(ValueError, match="batch_size must be ≥ 2, got 1"):
        PromptedConfig(batch_size=1)
    with pytest.raises(ValueError, match="texts must have a text for every item"):
        PromptedRecommender(config(folder), ["a", " "])
    model = PromptedRecommender(config(folder, prompt="plain"), TEXTS)
    with pytest.raises(ValueError, match="examples must not be empty"):
        model.fit(Examples(Ragged.from_lists([]), np.array([], dtype=np.int64)))
    assert HardPrompt().history == 20 and model.template is not None and model.template.history == 5
