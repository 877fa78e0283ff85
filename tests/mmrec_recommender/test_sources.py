from __future__ import annotations

import numpy as np
import pytest
import torch
from rec_helpers import ALL, BARE, COLD, CONTENT, ITEMS, NOTHING, TRAINED, config, inputs, model_of

from mmrec.evaluation import Split, dominance, evaluate_rankings
from mmrec.evaluation.ragged import Ragged
from mmrec.evaluation.ranking import rank
from mmrec.recommender.sources import MEAN, SourceScorer, with_sources


def own() -> dict[str, np.ndarray]:
    return {name: np.where(mask.numpy(), np.arange(ITEMS), -1) for name, mask in inputs().present().items()}


def item(content, n: int) -> dict:
    """What an item has, in plain lists."""
    found = {}
    for name, tokens in content.tokens.items():
        rows = slice(int(tokens.offsets[n]), int(tokens.offsets[n + 1]))
        found[name] = (tokens.values[rows].tolist(), tokens.kind[rows].tolist())
    table = content.table
    numeric = torch.where(table.numeric_mask[n], table.numeric[n], 0.0).tolist()
    bags = [ids[offsets[n] : offsets[n + 1]].tolist() for offsets, ids in table.bags]
    found["table"] = (numeric, table.numeric_mask[n].tolist(), table.categorical[n].tolist(), bags)
    return found


def test_every_item_gets_what_its_source_has() -> None:
    content = inputs()
    order = {name: np.random.default_rng(n).permutation(ITEMS) for n, name in enumerate(CONTENT)}
    found = with_sources(content, order)
    for n in range(ITEMS):
        mine = item(found, n)
        for name in CONTENT:
            assert mine[name] == item(content, int(order[name][n]))[name], (n, name)
    same = with_sources(content, own())
    assert all(item(same, n) == item(content, n) for n in range(ITEMS))


def test_minus_one_is_nothing_and_leaves_the_others_alone() -> None:
    content = inputs()
    for name in CONTENT:
        gone = np.where(np.arange(ITEMS) % 2 == 0, -1, np.arange(ITEMS))
        found = with_sources(content, {name: gone})
        present = found.present()
        assert torch.equal(present[name], content.present()[name] & torch.from_numpy(gone >= 0))
        for other in set(CONTENT) - {name}:
            assert torch.equal(present[other], content.present()[other])


def test_the_mean_of_each_slot_and_column() -> None:
    content = inputs()
    found = with_sources(content, {name: np.full(ITEMS, MEAN) for name in CONTENT})
    for name, tokens in content.tokens.items():
        values, kinds = item(found, 3)[name]
        assert kinds == sorted(set(tokens.kind.tolist()))
        for value, kind in zip(values, kinds, strict=True):
            expected = tokens.values[tokens.kind == kind].mean(0)
            torch.testing.assert_close(torch.tensor(value, dtype=torch.float64), expected)
    assert item(found, 3)["table"] == ([0.0], [True], [-1], [[]])
    assert found.spec == content.spec


def scorer(split: Split | None = None) -> SourceScorer:
    return SourceScorer(model_of(config()), inputs(), split or a_split(), metric="NDCG@3")


def a_split() -> Split:
    rows = [[0, 1, 2, 3], [5, 6, 8, 1], [10, 11, 3, 7], [2, 8, 0, 4]]
    parts = [[row[:2] for row in rows], [row[2:3] for row in rows], [row[3:] for row in rows]]
    return Split("S", 4, ITEMS, *map(Ragged.from_lists, parts), origin="by hand")


def test_the_model_as_it_is_gives_its_own_figures() -> None:
    score = scorer()
    split, model = score.split, score.model
    items = model.item_vectors(inputs())
    query = model.user_vectors(split.history("test").rows(split.users("test")), items)
    ranked = rank(query, items.vectors, split, "test", 3)
    expected = evaluate_rankings(ranked, split.relevant("test"), ["NDCG@3"])["NDCG@3"]
    as_it_is = {name: np.where(mask, np.arange(ITEMS), -1) for name, mask in score.present.items()}
    assert score(as_it_is) == pytest.approx(expected) and score({}) == pytest.approx(expected)
    assert list(score.present) == list(ALL) and score.present["identity"].tolist() == TRAINED.tolist()
    only = score.per_user({}, candidates=np.array([3, 7]))
    assert only.shape == (4,)


def test_vectors_are_those_of_items_that_never_had_it() -> None:
    score = scorer()
    gone = np.arange(ITEMS)
    gone[[0, 3]] = -1
    found = score._vectors({"text": gone, "identity": np.where(np.arange(ITEMS) == 5, -1, np.arange(ITEMS))})
    plain = score._vectors({})
    moved = (found.vectors != plain.vectors).any(1)
    assert moved.tolist() == [n in (0, 3, 5) for n in range(ITEMS)]
    text = ALL.index("text")
    assert found.mass[0, text] == 0 < plain.mass[0, text]
    assert found.mass[5, ALL.index("identity")] == 0
    assert not score._vectors({name: np.full(ITEMS, -1) for name in ALL}).vectors.any()
    assert BARE != NOTHING != COLD


def test_it_is_what_dominance_asks() -> None:
    found = dominance(scorer(), scorer().present, permutations=1)
    assert set(found.drop) == set(ALL) and np.isfinite(found.full)


def test_the_mode_of_the_model_is_left_as_it_was() -> None:
    score = scorer()
    score.model.train()
    score({})
    assert score.model.training


def test_bad_sources() -> None:
    content = inputs()
    with pytest.raises(ValueError, match="sources name 'sound', which is not among the contents"):
        with_sources(content, {"sound": np.zeros(ITEMS, np.int64)})
    with pytest.raises(ValueError, match=rf"sources\['text'\] must be \[{ITEMS}\], got \[3\]"):
        with_sources(content, {"text": np.zeros(3, np.int64)})
    for wrong in (ITEMS, -3):
        with pytest.raises(ValueError, match=rf"must be in \[0, {ITEMS}\), −1 or -2, got {wrong}"):
            with_sources(content, {"text": np.full(ITEMS, wrong)})
