"""The item store: what is put in comes out, in every version, whoever else reads or writes."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors import safe_open
from store_helpers import IDS, WIDTH, assert_holds, items, made, meta, patched, rounded

from mmrec.fusion import Tokens
from mmrec.recommender.store import ItemRows, ItemStore, StoreBusyError, StoreError, StoreVersion


def tokens(offsets: list[int], values: int, kinds: int | None = None, dtype: torch.dtype = torch.int64) -> dict:
    kind = torch.zeros(values if kinds is None else kinds, dtype=torch.int64)
    return {"text": Tokens(torch.zeros(values, 4), torch.tensor(offsets, dtype=dtype), kind)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_what_goes_in_comes_out(tmp_path, dtype):
    store = made(tmp_path, dtype)
    assert_holds(store.current(), items(IDS), dtype)
    assert_holds(ItemStore(tmp_path).current(), items(IDS), dtype)
    version = store.current()
    assert version is store.current() and version.number == 1 and version.meta == meta(dtype)
    asked = ["item-0", "nobody", "", "a,b", "\ud800", "item-0"]
    assert version.rows(asked).tolist() == [0, -1, -1, len(IDS) - 1, -1, 0]
    assert version.rows([]).tolist() == [] and version.ids([]) == [] and version.vectors([]).shape == (0, WIDTH)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_changed_and_new_items(tmp_path, dtype):
    store = made(tmp_path, dtype)
    first = store.current()
    one, two = items(["item-7", "new", "ü"], seed=1), items(["new", "newer", "item-7", "item-8item-8item-8"], seed=2)
    with store.writer() as writer:
        assert writer.upsert(one) == 2
        second = store.current()
        assert writer.upsert(two) == 3
    base = items(IDS)
    assert_holds(store.current(), patched(base, one, two), dtype)
    assert_holds(ItemStore(tmp_path).current(), patched(base, one, two), dtype)
    assert_holds(second, patched(base, one), dtype)  # who has a version keeps it as it was
    assert_holds(first, base, dtype)
    with store.writer() as writer:
        assert writer.compact() == 4
    assert_holds(store.current(), patched(base, one, two), dtype)
    assert_holds(second, patched(base, one), dtype)


def test_small_patches_become_larger_ones_and_the_base_in_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr("mmrec.recommender.store.writer._MOST_PATCHED", 40)
    store, changes = made(tmp_path), []
    files = []
    for n in range(60):
        changes.append(items([f"item-{n}", f"new-{n % 20}"], seed=n))
        with store.writer() as writer:
            writer.upsert(changes[-1])
        newest = max(tmp_path.glob("version-*.json"))
        files.append(len(json.loads(newest.read_text())["files"]))
    assert max(files) <= 7 and files.count(1) >= 1
    assert_holds(store.current(), patched(items(IDS), *changes))
    assert len(list(tmp_path.glob("version-*.json"))) == 3  # older ones are gone, and so is what they alone named
    named = {f["name"] for path in tmp_path.glob("version-*.json") for f in json.loads(path.read_text())["files"]}
    assert named == {path.name for path in tmp_path.glob("*.safetensors")}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_removed_items(tmp_path, dtype):
    store = made(tmp_path, dtype)
    before = store.current()
    query = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(5))
    gone = ["item-3", "ü", "new-1", "item-299item-299item-299"]
    with store.writer() as writer:
        writer.upsert(items(["new-0", "new-1", "item-8item-8item-8"], seed=1))
        assert writer.remove([*gone, "nobody", "item-3"]) == 3
        assert writer.remove(["item-3", "nobody"]) == 3  # nothing to do
        with pytest.raises(TypeError, match="got the string 'item-4'"):
            writer.remove("item-4")
    left = patched(items(IDS), items(["new-0", "new-1", "item-8item-8item-8"], seed=1))
    kept = [n for n, name in enumerate(left.ids) if name not in gone]

    def check(version: StoreVersion, rows: list[int]) -> None:
        names = [left.ids[n] for n in kept]
        assert len(version) == len(names) == len(rows) and (version.rows(gone) == -1).all()
        assert version.rows(names).tolist() == rows and version.ids(rows) == names
        assert torch.equal(version.vectors(rows), rounded(left.vectors, dtype)[kept])
        found = version.top_k(query, 400)
        assert sorted(found.ids[0][found.ids[0] >= 0].tolist()) == rows
        assert version.find("item-3", 500).tolist() == [n for n in rows if "item-3" in version.ids([n])[0]]
        assert "ü" not in version.ids(version.find("", 500))

    check(store.current(), kept)
    check(ItemStore(tmp_path).current(), kept)
    assert before.rows(gone[:2]).tolist() == [3, 300] and before.titles([3]) == ["Title of item-3, 0 ✓"]
    # What comes back is another item in its old row; the rest of the patches is as it was.
    with store.writer() as writer:
        writer.upsert(items(["ü", "newest"], seed=7))
    version = store.current()
    assert version.rows(["ü", "item-3", "newest"]).tolist() == [300, -1, 306] and version.num_rows == 307
    assert version.titles([300]) == ["Title of ü, 7 ✓"] and len(version) == len(kept) + 2
    assert 300 in version.top_k(query, 400).ids
    with store.writer() as writer:
        writer.remove(["ü", "newest"])
        number = writer.compact()
    check(store.current(), list(range(len(kept))))
    for name in ("new-1", "Title of ü", "newest"):  # nothing of them is in the new base
        assert name.encode() not in (tmp_path / f"base-{number:08d}.safetensors").read_bytes()


def test_all_items_may_be_removed(tmp_path):
    store = made(tmp_path)
    with store.writer() as writer:
        writer.remove(IDS)
        assert len(store.current()) == 0 and (store.current().top_k(torch.ones(1, WIDTH), 3).ids == -1).all()
        writer.compact()
        assert len(store.current()) == store.current().num_rows == 0
        writer.upsert(items(["a"]))
    assert store.current().rows(["a", "item-3"]).tolist() == [0, -1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_top_k_is_that_of_all_items(tmp_path, dtype):
    store = made(tmp_path, dtype)
    change = items([*(f"new-{n}" for n in range(30)), "item-3", "item-6"], seed=3)
    with store.writer() as writer:
        writer.upsert(change)
    version = store.current()
    query = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(5))
    scores = query @ version.vectors(np.arange(len(version))).T
    if dtype == "bfloat16":
        scores = query.bfloat16().float() @ version.vectors(np.arange(len(version))).T
    seen = [[], [3, 305, 310], [0], list(range(150, 333)), [-5, 10**6, 312]]
    for row, gone in enumerate(seen):
        scores[row, [i for i in gone if 0 <= i < len(version)]] = -torch.inf
    exclude = (torch.tensor([0, *map(len, seen)]).cumsum(0), torch.tensor(sum(seen, []), dtype=torch.int64))
    for k in (1, 10, 400):
        found = version.top_k(query, k, exclude=exclude)
        wanted = scores.sort(dim=1, descending=True, stable=True)
        top, ids = wanted.values[:, :k], wanted.indices[:, :k]
        assert found.ids.shape == (5, k)
        found_scores, found_ids = found.scores[:, : top.shape[1]], found.ids[:, : top.shape[1]]
        torch.testing.assert_close(found_scores.float(), top, rtol=1e-5, atol=1e-5)
        assert torch.equal(found_ids, torch.where(top.isinf(), -1, ids))
        assert (found.ids[:, top.shape[1] :] == -1).all()
    own = (torch.arange(6) * 3, torch.tensor([304, 2, 333] * 5))
    assert set(version.top_k(query, 5, candidates=own).ids.flatten().tolist()) == {304, 2, 333, -1}


def test_ties_go_to_the_lower_row(tmp_path):
    same = items(IDS[:50])
    same.vectors.fill_(0.5)
    store = ItemStore(tmp_path)
    with store.writer() as writer:
        writer.create(meta(), [same])
        more = items(["p", "q", "item-2"])
        more.vectors.fill_(0.5)
        writer.upsert(more)
    found = store.current().top_k(torch.ones(1, WIDTH), 52)
    assert found.ids.tolist() == [list(range(52))]


def test_files_are_safetensors_and_the_items_stay_in_them(tmp_path):
    """Off the heap: mapping costs nothing, reading costs page cache; an item written over costs a page."""
    made(tmp_path)
    with safe_open(tmp_path / "base-00000001.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor("vectors"), items(IDS).vectors)
        assert all(
            file.get_tensor(name).data_ptr() % 64 == 0 for name in file.keys() if not name.startswith("padding.")
        )  # or reading one at an odd address copies all of it
    big = tmp_path / "big"
    store, n = ItemStore(big), 200_000
    one = ItemRows(
        [str(i) for i in range(n)], torch.randn(n, 64), torch.zeros(n, 2), torch.ones(n, dtype=torch.bool),
        torch.zeros(n, 16, dtype=torch.uint8), [""] * n, {},
    )  # fmt: skip
    with store.writer() as writer:
        writer.create(meta("float32", width=64, tokens={}), [one])
        changed = ItemRows(
            ["5", "x"], torch.ones(2, 64), *(t[:2] for t in (one.mass, one.known, one.content)), ["", ""], {}
        )
        writer.upsert(changed)
    script = (
        "import sys, time, torch, mmrec_kernels\n"
        "from mmrec.recommender.store import ItemStore\n"
        "from mmrec.recommender.store.columns import map_file\n"
        "import safetensors.torch, concurrent.futures\n"
        "rss = lambda: [int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('RssAnon')][0]\n"
        "before = rss(); store = ItemStore(sys.argv[1]); v = store.current()\n"
        "v.top_k(torch.ones(1, 64), 10); print(rss() - before, v.vectors([5])[0, 0].item(), len(v))\n"
    )
    told = subprocess.run([sys.executable, "-c", script, str(big)], capture_output=True, text=True, check=True)
    grown, value, count = told.stdout.split()
    assert int(grown) < 20_000 and value == "1.0" and count == str(n + 1)  # KiB; the vectors alone are 50 MB


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": ["a", "a"]}, "ids must be distinct"),
        ({"ids": ["a", ""]}, "ids must be distinct strings, none empty"),
        ({"vectors": torch.zeros(2, 3)}, r"vectors must be \[2, 16\], got \[2, 3\]"),
        ({"vectors": torch.tensor([[0.0], [torch.nan]]).expand(2, WIDTH)}, "finite in float32, that of item .b."),
        ({"mass": torch.zeros(2, 3)}, r"mass must be \[2, 2\]"),
        ({"titles": ["x"]}, "titles must be 2, got 1"),
        ({"tokens": {}}, r"tokens must be of widths {'text': 4}, got {}"),
        ({"tokens": tokens([0, 1, 1], 2)}, r"tokens\['text'\] needs offsets that rise from 0 to its 2 values"),
        ({"tokens": tokens([0, 3, 2], 2)}, r"tokens\['text'\] needs offsets that rise from 0"),
        ({"tokens": tokens([0, 1, 2], 2, kinds=1)}, "and 1 kinds"),
        ({"tokens": tokens([0, 1, 2], 2, dtype=torch.int32)}, r"needs offsets int64 \[3\], got torch.int32"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_and_nothing_is_lost(tmp_path, change, message):
    import dataclasses

    store = made(tmp_path)
    with pytest.raises(ValueError, match=message), store.writer() as writer:
        writer.upsert(dataclasses.replace(items(["a", "b"]), **change))
    assert_holds(ItemStore(tmp_path).current(), items(IDS))
    assert not list(tmp_path.glob(".tmp-*"))


def test_an_id_twice_in_two_parts(tmp_path):
    with pytest.raises(ValueError, match="ids must be distinct, got 'b' twice"), ItemStore(tmp_path).writer() as writer:
        writer.create(meta(), [items(["a", "b"]), items(["c", "b"])])


def test_ids_whose_hashes_are_equal(tmp_path, monkeypatch):
    """Found by their bytes; two of one id are still found out."""
    for module in ("writer", "snapshot"):
        monkeypatch.setattr(
            f"mmrec.recommender.store.{module}.hash_ids", lambda ids: np.array([len(name) for name in ids], np.int64)
        )
    names = ["a", "b", "c", "dd", "ee"]
    store = ItemStore(tmp_path)
    with store.writer() as writer:
        with pytest.raises(ValueError, match="ids must be distinct, got 'a' twice"):
            writer.create(meta(), [items(["a", "b", "c"]), items(["a"])])
        writer.create(meta(), [items(names)])
        writer.upsert(items(["f"]))
    found = store.current().rows(["c", "e", "ee", "f", "a", "", "ggg", "dd"])
    assert found.tolist() == [2, -1, 4, 5, 0, -1, -1, 3]


def test_a_store_without_items(tmp_path):
    store = ItemStore(tmp_path)
    with store.writer() as writer:
        writer.create(meta(), [items([])])
        assert store.current().rows(["a"]).tolist() == [-1]
        assert store.current().top_k(torch.ones(1, WIDTH), 2).ids.tolist() == [[-1, -1]]
        writer.upsert(items(["a"]))
    assert store.current().rows(["a"]).tolist() == [0] and store.current().top_k(torch.ones(1, WIDTH), 2).ids[0, 0] == 0


def test_no_store(tmp_path):
    with pytest.raises(StoreError, match="holds no item store"):
        ItemStore(tmp_path / "nowhere").current()
    with pytest.raises(StoreError, match="holds no item store"), ItemStore(tmp_path).writer() as writer:
        writer.upsert(items(["a"]))


def test_a_second_writer_waits_and_then_says_so(tmp_path):
    store = made(tmp_path)
    with store.writer(), pytest.raises(StoreBusyError, match="another process is writing"):
        with ItemStore(tmp_path).writer(timeout=0.05):
            pass
