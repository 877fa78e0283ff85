"""Semantic ids: codes of items by residual k-means, and a causal model that generates them."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from mmrec.llm import Backbone, SemanticIdModel, SemanticIds, semantic_ids

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")


def vectors_of(count: int, width: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def nearest(rest: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """By differences, in float64."""
    return (rest.double()[:, None] - centroids.double()).square().sum(2).argmin(1)


# Fitting


@pytest.mark.parametrize(("levels", "codes"), [(1, 1), (1, 7), (3, 5), (2, 40)])
def test_each_level_codes_what_is_left(levels, codes):
    vectors = vectors_of(40)
    ids = SemanticIds.fit(vectors, levels=levels, codes=codes, seed=3)
    rest, left = vectors.double(), [float(vectors.double().square().sum())]
    for level, centroids in enumerate(ids.centroids):
        assert centroids.shape == (codes, 6) and centroids.dtype == torch.float32
        assert torch.equal(ids.codes[:, level], nearest(rest, centroids))
        own = ids.codes[:, level]
        for code in own.unique().tolist():  # of each cluster the mean
            torch.testing.assert_close(centroids[code].double(), rest[own == code].mean(0), rtol=1e-5, atol=1e-6)
        rest = rest - centroids.double()[own]
        left.append(float(rest.square().sum()))
        if codes > 1:
            assert left[-1] < left[-2] or left[-2] < 1e-9
    torch.testing.assert_close(vectors - ids.decode(ids.codes), rest.float(), rtol=1e-4, atol=1e-5)
    assert torch.equal(ids.encode(vectors), ids.codes[:, :levels])
    assert torch.equal(torch.cat([ids.encode(vectors[i : i + 1]) for i in range(40)]), ids.codes[:, :levels])
    assert len(ids.codes.unique(dim=0)) == 40 and len(ids) == 40


def test_new_vectors_have_the_nearest_codes():
    ids, new = SemanticIds.fit(vectors_of(50), levels=3, codes=9), 1.5 * vectors_of(500, seed=9)
    rest, columns = new.double(), []
    for centroids in ids.centroids:
        columns.append(nearest(rest, centroids))
        rest = rest - centroids.double()[columns[-1]]
    found = ids.encode(new)
    assert torch.equal(found, torch.stack(columns, dim=1))
    torch.testing.assert_close(new - ids.decode(found), rest.float(), rtol=1e-4, atol=1e-5)


def test_it_is_the_same_on_every_run():
    vectors = vectors_of(60)
    first = SemanticIds.fit(vectors, levels=2, codes=8, seed=1)
    state = torch.get_rng_state()
    again = SemanticIds.fit(vectors.double(), levels=2, codes=8, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.codes, again.codes) and all(map(torch.equal, first.centroids, again.centroids))
    assert not torch.equal(SemanticIds.fit(vectors, levels=2, codes=8, seed=2).codes, first.codes)


def test_clusters_that_are_there_are_found():
    centres = 20 * vectors_of(8, seed=5)
    truth = torch.arange(8).repeat(9)
    ids = SemanticIds.fit(centres[truth] + 0.1 * vectors_of(72), levels=1, codes=8)
    pairs = set(zip(truth.tolist(), ids.codes[:, 0].tolist(), strict=True))
    assert len(pairs) == 8


def test_a_cluster_without_items_starts_again(monkeypatch):
    vectors = torch.tensor([[0.0], [0.1], [0.2], [10.0], [20.0]])
    far_away = torch.tensor([[0.0], [1000.0], [2000.0]])
    monkeypatch.setattr(semantic_ids, "_starts", lambda *_: far_away.clone())
    ids = SemanticIds.fit(vectors, levels=1, codes=3)
    assert sorted(ids.centroids[0].flatten().tolist()) == pytest.approx([0.1, 10, 20], abs=1e-6)


def test_fewer_distinct_vectors_than_codes():
    vectors = vectors_of(3)[torch.tensor([0, 1, 2, 1, 1, 0])]
    ids = SemanticIds.fit(vectors, levels=2, codes=6)
    assert ids.sizes == (6, 6, 3) and len(ids.codes.unique(dim=0)) == 6
    fitted = ids.codes[:, :2].tolist()
    assert fitted[1] == fitted[3] == fitted[4] and fitted[0] == fitted[5] != fitted[1] != fitted[2]
    assert ids.codes[:, 2].tolist() == [0, 0, 0, 1, 2, 1]  # numbered in the order of items
    found = ids.collisions()
    assert (found["distinct"], found["rate"], found["largest"]) == (6, 0, 1)
    assert (found["fitted_distinct"], found["fitted_rate"], found["fitted_largest"]) == (3, 0.5, 3)
    assert found["used_a"] == 0.5 and found["used_c"] == 1.0
    assert torch.equal(ids.encode(vectors), ids.codes[:, :2])


def test_no_level_more_than_is_needed():
    ids = SemanticIds.fit(vectors_of(12), levels=2, codes=12)
    assert ids.sizes == (12, 12) and ids.levels == 2 and ids.collisions()["fitted_largest"] == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"levels": 0}, "levels must be from 1 to 25, got 0"),
        ({"levels": 26}, "levels must be from 1 to 25, got 26"),
        ({"codes": 13}, "codes must be from 1 to the number of items, 12, got 13"),
        ({"codes": 0}, "codes must be from 1 to the number of items, 12, got 0"),
        ({"codes": 2, "iterations": 0}, "iterations must be at least 1"),
    ],
)
def test_fits_that_cannot_be(arguments, words):
    with pytest.raises(ValueError, match=words):
        SemanticIds.fit(vectors_of(12), **arguments)


def test_vectors_that_are_none():
    bad = vectors_of(12)
    bad[3, 2] = torch.nan
    with pytest.raises(ValueError, match="vectors must be finite"):
        SemanticIds.fit(bad, codes=2)
    with pytest.raises(ValueError, match=r"vectors must be floating \[N, d\], got torch.int64 \[3\]"):
        SemanticIds.fit(torch.arange(3), codes=2)
    ids = SemanticIds.fit(vectors_of(12), codes=2)
    with pytest.raises(ValueError, match="vectors must have width 6, got 5"):
        ids.encode(vectors_of(3, 5))
    with pytest.raises(ValueError, match=r"codes must be int64 \[N, 2\]"):
        SemanticIds(torch.zeros(3, 3, dtype=torch.int64), (1, 1))
    with pytest.raises(ValueError, match=r"codes must be in \[0, size\) of each level, \(2, 1\)"):
        SemanticIds(torch.tensor([[0, 1]]), (2, 1))


# LC-Rec's mapping


def test_the_mapping_goes_out_and_in(tmp_path):
    ids = SemanticIds.fit(vectors_of(9), levels=2, codes=3)
    names = [f"item {n}" for n in range(9)]
    index = ids.to_index(names)
    assert index["item 4"] == ids.tokens(4) == [
        f"<{letter}_{code}>" for letter, code in zip("abc", ids.codes[4].tolist(), strict=False)
    ]  # fmt: skip
    ids.save_index(tmp_path / "X.index.json", names)
    assert json.loads((tmp_path / "X.index.json").read_text()) == index
    back = SemanticIds.load_index(tmp_path / "X.index.json", names[::-1])
    assert torch.equal(back.codes, ids.codes.flip(0)) and back.centroids == ()
    assert torch.equal(SemanticIds.from_index(index).codes, ids.codes)
    with pytest.raises(ValueError, match="were read, not fitted"):
        back.encode(vectors_of(2))
    with pytest.raises(ValueError, match="were read, not fitted"):
        back.decode(back.codes)
    with pytest.raises(ValueError, match="item_ids must be 9, got 2"):
        ids.to_index(names[:2])


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({"1": ["<a_1>", "<c_2>"]}, r"index\['1'\] must be tokens <a_…>, <b_…> in order"),
        ({"1": ["a_1"]}, r"index\['1'\] must be tokens"),
        ({"1": []}, r"index\['1'\] must be tokens"),
        ({"1": ["<a_1>"], "2": ["<a_1>", "<b_0>"]}, r"as many tokens for each item, got \[1, 2\]"),
        ({"2": ["<a_1>"]}, "it has no item '1'"),
    ],
)
def test_mappings_of_another_form(index, words):
    with pytest.raises(ValueError, match=words):
        SemanticIds.from_index(index, ["1", "2"] if "1" in index and "2" in index else ["1"])


def test_the_mapping_is_what_the_catalogue_reads(tmp_path):
    from mmrec.adaptation import Catalogue

    (tmp_path / "X.inter.json").write_text('{"u": [0, 1]}')
    (tmp_path / "X.item.json").write_text('{"0": {"title": "A"}, "1": {"title": "B"}}')
    ids = SemanticIds.fit(vectors_of(2), levels=2, codes=2)
    ids.save_index(tmp_path / "X.index.json", ["0", "1"])
    assert Catalogue.load(tmp_path).items["semantic_id"].to_list() == ["".join(ids.tokens(i)) for i in range(2)]
    (tmp_path / "bad.json").write_text("[1]")
    with pytest.raises(ValueError, match="must hold one object"):
        SemanticIds.load_index(tmp_path / "bad.json")


# The model


@pytest.fixture(scope="module")
def ids():
    vectors = vectors_of(11)
    vectors[5] = vectors[3]
    return SemanticIds.fit(vectors, levels=2, codes=3)


HISTORIES = [[0, 4, 7], [5], [9, 9, 1, 2, 3]]


def by_hand(model: SemanticIdModel, history: list[int], item: int) -> torch.Tensor:
    """log p of each code of an item: one plain forward of the model's own attention over everything."""
    backbone, levels = model.backbone, model.ids.levels
    embed = backbone.model.get_input_embeddings()
    rows = [embed(torch.tensor([token]))[0] for token in backbone.tokenizer(model_prompt(model))["input_ids"]]
    read = [*(history[-model.history :]), item]
    for one in read:
        rows += [model.tables[level][code] for level, code in enumerate(model.ids.codes[one].tolist())]
    backbone.model.set_attn_implementation("sdpa")
    hidden = backbone.model(inputs_embeds=torch.stack(rows[:-1]).unsqueeze(0)).last_hidden_state[0, -levels:]
    backbone.eval()
    found = []
    for level, code in enumerate(model.ids.codes[item].tolist()):
        table = model.tables[level]
        cosine = (table @ hidden[level]) / (table.norm(dim=1) * hidden[level].norm())
        found.append((model.log_scale[level].exp() * cosine).log_softmax(0)[code])
    return torch.stack(found)


def model_prompt(model: SemanticIdModel) -> str:
    return model.backbone.tokenizer.decode(model._prompt)


@pytest.mark.parametrize("prompt", ["", "red hat"])
@pytest.mark.parametrize("kernels", [True, False])
def test_the_loss_is_the_cross_entropy_of_each_level(qwen2, ids, prompt, kernels):
    backbone = Backbone.load(qwen2, quantize=None, lora={"r": 2, "init": "random"})
    model = SemanticIdModel(backbone, ids, prompt=prompt, history=4)
    with torch.no_grad():
        model.log_scale.add_(torch.tensor([-1.0, 0.5, 0.2]))
    assert ids.levels == 3 and [table.shape[0] for table in model.tables] == list(ids.sizes)
    leaves = [*model.parameters(), *backbone.trainable_parameters()]
    wanted = -torch.stack(
        [by_hand(model, history, item).mean() for history, item in zip(HISTORIES, [6, 5, 10], strict=True)]
    ).mean()
    expected = torch.autograd.grad(wanted, leaves)
    if not kernels:  # padded, with its own attention
        backbone.model.set_attn_implementation("sdpa")
        assert backbone.why_not_packed is not None
    loss = model.loss(HISTORIES, torch.tensor([6, 5, 10]))
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-6)
    for a, b in zip(torch.autograd.grad(loss, leaves), expected, strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5 * float(b.abs().max()))


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("prompt", ["", "red hat"])
def test_with_all_beams_recommending_is_scoring_all(qwen2, ids, prompt, quantize):
    backbone = Backbone.load(qwen2, quantize=quantize, lora={"r": 2, "init": "random"})
    model = SemanticIdModel(backbone, ids, prompt=prompt, history=4)
    exclude = [[0, 4, 7], [], [3, -1]]
    found = model.recommend(HISTORIES, k=12, beams=11, exclude=exclude)
    for row, history in enumerate(HISTORIES):
        with torch.no_grad():
            scores = torch.stack([by_hand(model, history, item).sum() for item in range(11)]).double()
        allowed = [i for i in range(11) if i not in exclude[row]]
        items = found.items[row].tolist()
        assert sorted(items[: len(allowed)]) == allowed and items[len(allowed) :] == [-1] * (12 - len(allowed))
        torch.testing.assert_close(
            found.log_probs[row, : len(allowed)], scores[items[: len(allowed)]], rtol=1e-5, atol=1e-5
        )
        assert bool((found.log_probs[row, : len(allowed)].diff() <= 0).all())
    few = model.recommend(HISTORIES, k=3, beams=2)
    assert few.items.shape == (3, 3) and bool((few.items < 11).all())
    assert model.recommend([], k=3).items.shape == (0, 3)
    assert bool(model.recommend([[1]], k=1).log_probs[0, 0] < 0) and not backbone.training


def test_a_next_item_that_is_certain_is_learned(qwen2):
    """Each item has one that follows it, whatever came before."""
    ids = SemanticIds.fit(vectors_of(17), levels=2, codes=4)
    backbone = Backbone.load(qwen2, quantize=None, lora=4)
    model = SemanticIdModel(backbone, ids, prompt="red hat", history=3)
    generator = torch.Generator().manual_seed(0)
    following = torch.randperm(17, generator=generator).tolist()

    def drawn():
        before = torch.randint(17, (17, 2), generator=generator).tolist()
        return [[*before[item], item] for item in range(17)]

    optimizer = torch.optim.AdamW([*model.parameters(), *backbone.trainable_parameters()], lr=3e-3)
    backbone.train()
    losses = []
    for _ in range(200):
        optimizer.zero_grad()
        loss = model.loss(drawn(), following)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] > 0.8 and losses[-1] < 0.05
    assert all(parameter.grad.abs().max() > 0 for parameter in backbone.trainable_parameters())
    assert model.recommend(drawn(), k=3, beams=3).items[:, 0].tolist() == following
    assert backbone.training  # as it was


def test_a_long_history_is_cut_to_its_last_items(qwen2, ids):
    backbone = Backbone.load(qwen2, quantize=None, max_length=16)
    model = SemanticIdModel(backbone, ids, prompt="s", history=50)
    assert model.history == 4  # 1 + 4 · 3 + 2 tokens fit into 16
    long = [[8, 8, 8, 1, 2, 3, 4]]
    assert torch.equal(model.loss(long, [5]), model.loss([long[0][-4:]], [5]))
    assert not torch.equal(model.loss(long, [5]), model.loss([long[0][-3:]], [5]))
    assert model.recommend(long, k=11, beams=11).log_probs.isfinite().all()


def test_tables_start_by_their_seed(qwen2, ids):
    backbone = Backbone.load(qwen2, quantize=None)
    first, second, third = (SemanticIdModel(backbone, ids, seed=seed) for seed in (0, 0, 1))
    for a, b, c in zip(first.tables, second.tables, third.tables, strict=True):
        assert torch.equal(a, b) and not torch.equal(a, c)
    spread = float(torch.cat(list(first.tables)).detach().std())
    assert spread == pytest.approx(float(backbone.model.get_input_embeddings().weight.std()), rel=0.2)
    assert len(list(first.parameters())) == ids.levels + 1 and first.state_dict().keys() == second.state_dict().keys()


def test_read_ids_may_collide(qwen2):
    """Both items come out, the lower one first."""
    index = {"x": ["<a_0>", "<b_1>"], "y": ["<a_1>", "<b_0>"], "z": ["<a_0>", "<b_1>"]}
    model = SemanticIdModel(Backbone.load(qwen2, quantize=None), SemanticIds.from_index(index))
    found = model.recommend([[1]], k=3, beams=3)
    items = found.items[0].tolist()
    assert items.index(2) == items.index(0) + 1 and sorted(items) == [0, 1, 2]


def test_errors(qwen2, bert, ids):
    backbone = Backbone.load(qwen2, quantize=None)
    model = SemanticIdModel(backbone, ids)
    for call, words in (
        (lambda: model.loss([[11]], [0]), r"histories must be rows in \[0, 11\), got \[11\]"),
        (lambda: model.loss([[-1]], [0]), r"histories must be rows in \[0, 11\), got \[-1\]"),
        (lambda: model.loss([[1]], [11]), r"targets must be rows in \[0, 11\), got \[11\]"),
        (lambda: model.loss([[1]], [1, 2]), r"targets must be one for each of 1 ≥ 1 histories, got \[2\]"),
        (lambda: model.loss([], []), "targets must be one for each of 0 ≥ 1 histories"),
        (lambda: model.loss([[1], []], [1, 2]), "histories must hold an item each where there is no prompt"),
        (lambda: model.recommend([[1]], k=0), "k and beams must be at least 1"),
        (lambda: model.recommend([[1]], exclude=[]), "exclude must have a list for each of 1 queries, got 0"),
        (lambda: SemanticIdModel(backbone, ids, history=0), "history must be at least 1"),
        (lambda: SemanticIdModel(backbone, ids, prompt="?" * 60), "have room behind the prompt, got 20 and 0"),
        (lambda: SemanticIdModel(Backbone.load(bert, quantize=None), ids), "is not causal"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    assert SemanticIdModel(backbone, ids, prompt="red").recommend([[]], k=2).items.min() >= 0


def test_all_ids_of_a_small_world(qwen2):
    """Probabilities of all ids sum to 1 where every combination of codes is one."""
    every = torch.tensor(list(itertools.product(range(3), range(2))))
    model = SemanticIdModel(Backbone.load(qwen2, quantize=None), SemanticIds(every, (3, 2)))
    found = model.recommend([[0], [4, 2]], k=6, beams=6)
    torch.testing.assert_close(found.log_probs.exp().sum(1), torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-5)
