"""Requests answered from a store are those that the model answers from its own vectors."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from rec_helpers import BARE, COLD, ITEMS, NOTHING, TRAINED, config, inputs, model_of

from mmrec.evaluation import Ragged
from mmrec.recommender import ItemVectors, OnlineRecommender, Recommender
from mmrec.recommender.online import STAGES
from mmrec.recommender.store import ItemRows, ItemStore, Meta, StoreError

IDS = [f"item {n}" for n in range(ITEMS)]
HISTORIES = [[0, 1, 2], [5], [6, COLD, 2, 0, 1, 8, 3, 10, 11], [COLD]]


def rows_of(model: Recommender, items: ItemVectors, which: list[int]) -> ItemRows:
    return ItemRows(
        [IDS[n] for n in which], items.vectors[which].float(), items.mass[which].float(),
        torch.from_numpy(TRAINED)[which], torch.zeros(len(which), 16, dtype=torch.uint8), [f"T{n}" for n in which], {},
    )  # fmt: skip


@pytest.fixture(params=["dot", "cosine"])
def served(request, tmp_path):
    """A float32 model, its item vectors, and the store of them in float32."""
    model = model_of(config(score=request.param)).float()
    content = inputs()
    content = content.__class__(
        ITEMS, {n: t._replace(values=t.values.float()) for n, t in content.tokens.items()},
        content.table._replace(numeric=content.table.numeric.float()), content.table_spec, content.texts,
    )  # fmt: skip
    items = model.item_vectors(content)
    store = ItemStore(tmp_path)
    with store.writer() as writer:
        writer.create(Meta(8, "float32", model.config.modalities, "m", {}), [rows_of(model, items, list(range(ITEMS)))])
    return model, items, store


def test_answers_are_those_of_the_model(served):
    model, items, store = served
    online = OnlineRecommender(model, store, model_id="m")
    for exclude_seen in (True, False):
        for histories in (HISTORIES, HISTORIES[2:3]):
            wanted = model.recommend(Ragged.from_lists(histories), 5, items, exclude_seen=exclude_seen)
            seconds: dict[str, float] = {}
            found = online.recommend(
                [[IDS[n] for n in history] for history in histories], 5, exclude_seen=exclude_seen, seconds=seconds
            )
            assert [*seconds] == [s for s in STAGES if s != "rerank"] and all(value > 0 for value in seconds.values())
            for one, rows, scores, mass in zip(found, *wanted, strict=True):
                count = int((rows >= 0).sum())
                assert one.items == [IDS[n] for n in rows[:count]] and one.titles == [f"T{n}" for n in rows[:count]]
                np.testing.assert_allclose(one.scores, scores[:count], rtol=1e-5, atol=1e-6)
                np.testing.assert_allclose(one.mass, mass[:count], atol=1e-3)  # stored in float16
                assert one.known == TRAINED[rows[:count]].tolist() and one.version == 1 and one.unknown == []


def test_depth_reads_the_last_items(served):
    model, _, store = served
    online = OnlineRecommender(model, store)
    long = [IDS[n] for n in HISTORIES[2]]
    (shallow,) = online.recommend([long], 3, depth=2, exclude_seen=False)
    (alone,) = online.recommend([long[-2:]], 3, exclude_seen=False)
    assert shallow.items == alone.items and shallow.scores == alone.scores
    with pytest.raises(ValueError, match="depth must be from 1 to 6, got 7"):
        online.recommend([long], 3, depth=7)


def test_candidates_and_items_to_leave_out(served):
    model, items, store = served
    online = OnlineRecommender(model, store)
    histories = [[IDS[n] for n in history] for history in HISTORIES]
    only = [[4, 7, 9, 0], [], [5, 10, 7], [3]]
    found = online.recommend(histories, 5, candidates=[[*(IDS[n] for n in ids), "gone"] for ids in only])
    for history, ids, one in zip(HISTORIES, only, found, strict=True):
        wanted = model.recommend(Ragged.from_lists([history]), 5, items, candidates=np.array(ids, np.int64)).items[0]
        assert one.items == [IDS[n] for n in wanted if n >= 0] and one.unknown == []
    for exclude_seen in (True, False):
        every = online.recommend(histories, ITEMS, exclude_seen=exclude_seen)
        out = [one.items[1:3] for one in every]
        found = online.recommend(
            histories, ITEMS, exclude_seen=exclude_seen, exclude=[[*ids, "gone"] for ids in out]
        )  # fmt: skip
        for all_of_them, ids, one in zip(every, out, found, strict=True):
            assert one.items == [item for item in all_of_them.items if item not in ids]
    assert online.recommend([], 3, candidates=[], exclude=[]) == []
    for name in ("candidates", "exclude"):
        with pytest.raises(ValueError, match=f"{name} must have a list for each of 4 histories, got 1"):
            online.recommend(histories, 5, **{name: [[IDS[1]]]})


def test_what_the_store_does_not_have_is_left_out_and_named(served):
    model, _, store = served
    online = OnlineRecommender(model, store)
    (found,) = online.recommend([["gone", IDS[0], "never", IDS[1]]], 3)
    (wanted,) = online.recommend([[IDS[0], IDS[1]]], 3)
    assert found == wanted._replace(unknown=["gone", "never"], how=found.how)
    for history, message in (
        ([], "history 1 is empty"), (["gone"], "has 1 item.s., none of which the store has"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            online.recommend([[IDS[0]], history], 3)
    with pytest.raises(ValueError, match="history 0 has no item about which the model knows anything"):
        online.recommend([[IDS[NOTHING]]], 3)
    assert online.recommend([[IDS[BARE]]], 3)[0].items
    assert online.recommend([], 3) == []
    with pytest.raises(ValueError, match="k must be at least 1"):
        online.recommend([[IDS[0]]], 0)


def test_a_depth_without_anything_known_goes_further_back(served):
    """Less of the history read, as a budget may choose it, must not turn an answer into an error."""
    model, _, store = served
    online = OnlineRecommender(model, store)
    history = [IDS[n] for n in (0, 1, NOTHING, NOTHING, NOTHING)]
    for depth, same in ((1, [1]), (3, [0, 1]), (5, [0, 1, NOTHING, NOTHING, NOTHING])):
        (found,) = online.recommend([history], 3, depth=depth, exclude_seen=False)
        (wanted,) = online.recommend([[IDS[n] for n in same]], 3, exclude_seen=False)
        assert found.items == wanted.items, depth
        pair = online.recommend([history, [IDS[5]], history], 3, depth=depth, exclude_seen=False)
        assert [one.items for one in pair] == [
            wanted.items, online.recommend([[IDS[5]]], 3, exclude_seen=False)[0].items, wanted.items,
        ]  # fmt: skip


def test_new_items_are_served_after_a_reload(served):
    model, items, store = served
    online = OnlineRecommender(model, store, model_id="m")
    assert not online.reload()
    (before,) = online.recommend([[IDS[0], IDS[1]]], 3)
    best = items.vectors[[IDS.index(before.items[0])]].float() * 3
    new = ItemRows(
        ["new"], best, torch.ones(1, len(model.config.modalities)), torch.tensor([False]),
        torch.zeros(1, 16, dtype=torch.uint8), ["New"], {},
    )  # fmt: skip
    with store.writer() as writer:
        writer.upsert(new)
    (again,) = online.recommend([[IDS[0], IDS[1]]], 3)
    assert again == before._replace(how=again.how)
    assert online.reload() and not online.reload()
    (after,) = online.recommend([[IDS[0], IDS[1]]], 3)
    expected = ["new", before.items[0]] if before.scores[0] > 0 else [before.items[0], before.items[1]]
    assert after.items[:2] == expected and after.version == 2
    assert online.recommend([["new", IDS[0]]], 3)[0].items


def test_a_store_of_another_model_is_refused(served, tmp_path_factory):
    model, items, store = served
    with pytest.raises(StoreError, match="holds items of model m, this is other: index it anew"):
        OnlineRecommender(model, store, model_id="other")
    with pytest.raises(StoreError, match="holds no item store"):
        OnlineRecommender(model, ItemStore(tmp_path_factory.mktemp("none")))
    online = OnlineRecommender(model, store, model_id="m")
    with store.writer() as writer:
        writer.create(
            Meta(8, "int8", model.config.modalities, "newer model", {}), [rows_of(model, items, list(range(ITEMS)))]
        )
    with pytest.raises(StoreError, match="of model newer model"):
        online.reload()
    assert online.recommend([[IDS[0]]], 2)[0].version == 1  # and goes on serving
    with store.writer() as writer:
        one = rows_of(model, items, [0])
        writer.create(Meta(8, "int8", ("text",), "m", {}), [dataclasses.replace(one, mass=one.mass[:, :1])])
    with pytest.raises(StoreError, match="holds vectors of width 8 of"):
        online.reload()
