"""Approximate retrieval: candidates of FAISS, scored exactly; what has changed since is never missed."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("faiss")


from mmrec.recommender import ItemStore, OnlineRecommender, calibrate  # noqa: E402
from mmrec.recommender.latency import generated  # noqa: E402
from mmrec.recommender.store import AnnIndex, ItemRows, Meta  # noqa: E402

WIDTH = 16


def clustered(count: int, seed: int = 0) -> torch.Tensor:
    """Vectors around some centres, as catalogues have them."""
    generator = torch.Generator().manual_seed(seed)
    centres = 3 * torch.randn(40, WIDTH, generator=generator)
    noise = torch.randn(count, WIDTH, generator=generator)
    return centres[torch.randint(40, (count,), generator=generator)] + noise


def items(ids: list[str], vectors: torch.Tensor) -> ItemRows:
    n = len(ids)
    return ItemRows(
        ids, vectors, torch.ones(n, 1), torch.ones(n, dtype=torch.bool), torch.zeros(n, 16, dtype=torch.uint8),
        [""] * n, {},
    )  # fmt: skip


@pytest.fixture(params=["float32", "int8", "bfloat16"])
def store(request, tmp_path):
    made = ItemStore(tmp_path)
    with made.writer() as writer:
        meta = Meta(WIDTH, request.param, ("identity",), "m", {})
        writer.create(meta, [items([str(n) for n in range(3000)], clustered(3000))])
    return made


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_recall_is_as_said_and_scores_are_exact(store, kind):
    version = store.current()
    index = AnnIndex.build(version, kind, target=0.9)
    assert index.recall >= 0.9 and index.depth == 100 and index.effort >= 1
    query = clustered(50, seed=1)
    exact, found = version.top_k(query, 20), version.top_k(query, 20, index=index)
    hits = [len({*a.tolist()} & {*b.tolist()}) for a, b in zip(exact.ids, found.ids, strict=True)]
    assert sum(hits) / (20 * 50) > 0.8
    # Whatever is found has the bits of the exact score, best first.
    for a, b in zip(range(50), found.ids, strict=True):
        scores = {int(i): float(s) for i, s in zip(exact.ids[a], exact.scores[a], strict=True)}
        assert all(float(s) == scores[int(i)] for i, s in zip(b, found.scores[a], strict=True) if int(i) in scores)
        assert found.scores[a].tolist() == sorted(found.scores[a].tolist(), reverse=True)
    best = AnnIndex.build(version, kind, target=1.0)
    assert best.recall >= index.recall and best.effort >= index.effort


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_seen_items_leave_room_for_others(store, kind):
    version = store.current()
    index = AnnIndex.build(version, kind)
    query = clustered(3, seed=2)
    seen = version.top_k(query, 50).ids
    exclude = (torch.arange(4) * 50, seen.flatten())
    found = version.top_k(query, 30, exclude=exclude, index=index)
    assert (found.ids >= 0).all() and not any(
        {*f.tolist()} & {*s.tolist()} for f, s in zip(found.ids, seen, strict=True)
    )
    assert version.top_k(query[:0], 5, index=index).ids.shape == (0, 5)


def test_changes_are_found_at_once_and_a_new_base_is_indexed(store):
    query = clustered(1, seed=3)
    version = store.current()
    version.index = AnnIndex.build(version, "ivf")
    worst = int(version.top_k(-query, 1, exact=True).ids[0, 0])
    with store.writer() as writer:
        writer.upsert(items([str(worst), "new"], torch.cat([50 * query, 60 * query])))
    later = store.current()
    later.index = version.index
    found = later.top_k(query, 3)
    assert later.ids(found.ids[0])[:2] == ["new", str(worst)]
    assert later.ids(later.top_k(query, 3, exact=True).ids[0])[:2] == ["new", str(worst)]


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_removed_items_are_not_found(store, kind):
    query = clustered(2, seed=3)
    version = store.current()
    version.index = AnnIndex.build(version, kind)
    best = version.top_k(query, 20, exact=True).ids
    with store.writer() as writer:
        writer.remove(version.ids(best[:, ::2].flatten()))
    later, anew = store.current(), ItemStore(store.folder).current()
    later.index = version.index
    anew.index = AnnIndex.build(anew, kind)  # of a base that still holds them
    for one in (later, anew):
        found = one.top_k(query, 10)
        assert not {*found.ids.flatten().tolist()} & {*best[:, ::2].flatten().tolist()}
        assert (found.ids >= 0).all()  # removed items took nobody's place
        hits = {*found.ids.flatten().tolist()} & {*one.top_k(query, 10, exact=True).ids.flatten().tolist()}
        assert len(hits) >= 16
    assert anew.index.recall > 0.9


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_a_base_without_items_needs_no_index(tmp_path, kind):
    with generated(300, "float32", width=WIDTH, history=10, folder=tmp_path) as plain:
        online = OnlineRecommender(plain.model, plain.store, ann=kind)
        with plain.store.writer() as writer:
            writer.upsert(items(["a", "b"], torch.ones(2, WIDTH)))
            writer.remove([str(n) for n in range(300)])
        assert online.reload()
        anew = OnlineRecommender(plain.model, ItemStore(tmp_path), ann=kind)
        for one in (online, anew):
            assert one.version.index is None and one.recommend([["a"]], 3)[0].items == ["b"]
        with plain.store.writer() as writer:
            writer.remove(["a", "b"])
            writer.compact()
        assert online.reload() and len(online.version) == 0 and online.version.index is None
        with pytest.raises(ValueError, match="has no items that histories could be of"):
            calibrate(online)


def test_online(tmp_path):
    with generated(2000, "float32", width=WIDTH, history=10) as exact:
        online = OnlineRecommender(exact.model, ItemStore(exact.store.folder), ann="hnsw")
        first = online.version.index
        assert first is not None and first.recall > 0.9 and online.facts["ann"] == "hnsw"
        history = [["1", "2", "3"]]
        wanted, found = exact.recommend(history, 10)[0], online.recommend(history, 10)[0]
        assert len({*found.items} & {*wanted.items}) >= 7 and not {*found.items} & {*history[0]}
        with online.store.writer() as writer:
            writer.upsert(items(["new"], torch.ones(1, WIDTH)))
        assert online.reload() and online.version.index is first  # the same base
        with online.store.writer() as writer:
            writer.compact()
        assert online.reload() and online.version.index not in (first, None)
        assert "new" in {item for item in online.recommend([["new"]], 2000, exclude_seen=False)[0].items}


def test_what_cannot_be_indexed(store, tmp_path_factory):
    version = store.current()
    with pytest.raises(ValueError, match="kind must be one of"):
        AnnIndex.build(version, "flat")
    with pytest.raises(ValueError, match="target must be above 0"):
        AnnIndex.build(version, "ivf", target=0)
    empty = ItemStore(tmp_path_factory.mktemp("empty"))
    with empty.writer() as writer:
        writer.create(version.meta, [items([], torch.empty(0, WIDTH))])
    with pytest.raises(ValueError, match="must have items in its base"):
        AnnIndex.build(empty.current(), "ivf")


@pytest.mark.parametrize("count", [1, 5, 60])
@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_small_stores(tmp_path, kind, count):
    store = ItemStore(tmp_path)
    with store.writer() as writer:
        meta = Meta(WIDTH, "float32", ("identity",), "m", {})
        writer.create(meta, [items([str(n) for n in range(count)], clustered(count))])
    version = store.current()
    index = AnnIndex.build(version, kind, target=1.0)
    assert index.recall == 1.0
    query = clustered(4, seed=5)
    assert torch.equal(version.top_k(query, 3, index=index).ids, version.top_k(query, 3).ids)
