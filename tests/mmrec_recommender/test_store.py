"""The item store: what is put in comes out, in every version, whoever else reads or writes."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from store_helpers import WIDTH, items, meta

from mmrec.fusion import Tokens
from mmrec.recommender.store import ItemRows, ItemStore, StoreBusyError, StoreError, StoreVersion, columns, manifest

IDS = [f"item-{n}" * (1 + n % 3) for n in range(300)] + ["ü", "𝄞", " ", "a,b"]


def made(folder: Path, dtype: str = "float32", ids: list[str] = IDS, seed: int = 0) -> ItemStore:
    store = ItemStore(folder)
    with store.writer() as writer:
        writer.create(meta(dtype), [items(ids[:100], seed), items(ids[100:], seed)])
    return store


def rounded(vectors: torch.Tensor, dtype: str) -> torch.Tensor:
    if dtype == "int8":
        scale = vectors.abs().amax(1, keepdim=True) / 127
        return (vectors / scale).round() * scale
    return vectors.to(getattr(torch, dtype)).float()


def assert_holds(version: StoreVersion, expected: ItemRows, dtype: str = "float32") -> None:
    """`expected` are all items, in the order of their rows."""
    assert version.num_items == len(version) == len(expected)
    rows = version.rows(expected.ids)
    assert rows.tolist() == list(range(len(expected)))
    order = np.random.default_rng(0).permutation(len(rows))
    picked = rows[order]
    assert version.ids(picked) == [expected.ids[n] for n in order]
    assert version.titles(picked) == [expected.titles[n] for n in order]
    assert torch.equal(version.vectors(picked), rounded(expected.vectors, dtype)[order])
    assert torch.equal(version.mass(picked), expected.mass.half().float()[order])
    assert torch.equal(version.known(picked), expected.known[order])
    assert torch.equal(version.content(picked), expected.content[order])
    found, wanted = version.tokens("text", picked), expected.tokens["text"].select(torch.from_numpy(order))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def tokens(offsets: list[int], values: int, kinds: int | None = None, dtype: torch.dtype = torch.int64) -> dict:
    kind = torch.zeros(values if kinds is None else kinds, dtype=torch.int64)
    return {"text": Tokens(torch.zeros(values, 4), torch.tensor(offsets, dtype=dtype), kind)}


def patched(base: ItemRows, *changes: ItemRows) -> ItemRows:
    """All items after the changes, in the order of their rows."""
    latest = {name: (base, n) for n, name in enumerate(base.ids)}
    for change in changes:
        latest |= {name: (change, n) for n, name in enumerate(change.ids)}
    parts = [
        ItemRows(
            [part.ids[n]], part.vectors[n : n + 1], part.mass[n : n + 1], part.known[n : n + 1],
            part.content[n : n + 1], [part.titles[n]], {"text": part.tokens["text"].select(torch.tensor([n]))},
        )
        for part, n in latest.values()
    ]  # fmt: skip
    text = [part.tokens["text"] for part in parts]
    lengths = torch.cat([t.offsets.diff() for t in text])
    joined = Tokens(
        torch.cat([t.values for t in text]), torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        torch.cat([t.kind for t in text]),
    )  # fmt: skip
    return ItemRows(
        [part.ids[0] for part in parts],
        *(torch.cat([getattr(part, name) for part in parts]) for name in ("vectors", "mass", "known", "content")),
        [part.titles[0] for part in parts], {"text": joined},
    )  # fmt: skip


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


# ---- faults ----------------------------------------------------------------------------------------------------------


def versions_of(folder: Path) -> tuple[ItemRows, ItemRows]:
    """A store of two versions, the second of a base and a patch; what each holds."""
    store = made(folder)
    change = items(["item-3", "new"], seed=4)
    with store.writer() as writer:
        writer.upsert(change)
    return items(IDS), patched(items(IDS), change)


@pytest.mark.parametrize("file", ["version-00000002.json", "patch-00000002.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "gone", "empty", "longer"])
def test_a_damaged_version_is_told_and_the_one_before_serves(tmp_path, caplog, file, damage):
    old, _ = versions_of(tmp_path)
    path = tmp_path / file
    data = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    else:
        middle = len(data) // 2
        data[middle] ^= 1 if damage == "flipped" else 0
        path.write_bytes({"cut": data[:middle], "flipped": data, "empty": b"", "longer": data + b" x"}[damage])
    store = ItemStore(tmp_path)
    with caplog.at_level(logging.WARNING):
        assert_holds(store.current(), old)
        assert store.current() is store.current()
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == (0 if path.suffix == ".json" and damage == "gone" else 1) and all(file in line for line in told)
    change = items(["another"])
    with store.writer() as writer:  # and the store goes on
        assert writer.upsert(change) == 3
    assert_holds(ItemStore(tmp_path).current(), patched(old, change))
    assert_holds(store.current(), patched(old, change))
    if path.suffix == ".json" and damage != "gone":  # somebody may want to look at it
        assert path.exists() and (tmp_path / "patch-00000002.safetensors").exists()


def test_a_version_that_is_mended_serves_again(tmp_path):
    _, newest = versions_of(tmp_path)
    path = tmp_path / "patch-00000002.safetensors"
    whole = path.read_bytes()
    path.unlink()
    store = ItemStore(tmp_path)
    assert store.current().number == 1
    path.write_bytes(whole)
    assert_holds(store.current(), newest)


def test_what_goes_into_a_new_version_is_checked_anew(tmp_path):
    """A file that was damaged after it had been opened does not come into a new one with a checksum that fits."""
    old, _ = versions_of(tmp_path)
    store = ItemStore(tmp_path)
    assert store.current().number == 2
    path = tmp_path / "patch-00000002.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)
    change = items(["item-6", "item-9", "x"], seed=5)
    with store.writer() as writer:
        assert writer.upsert(change) == 3
    assert_holds(ItemStore(tmp_path).current(), patched(old, change))


def test_an_error_that_passes_is_no_damage(tmp_path, monkeypatch):
    _, newest = versions_of(tmp_path)
    store = ItemStore(tmp_path)
    for name in ("read_bytes", "stat"):
        real = getattr(Path, name)

        def fails(path, *args, real=real, **kwargs):
            if "00000002" in path.name:
                raise OSError(24, "Too many open files", str(path))
            return real(path, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(Path, name, fails)
            with pytest.raises(OSError, match="Too many open files"):
                store.current()
    assert_holds(store.current(), newest)


def test_a_store_that_was_made_anew_is_another(tmp_path):
    store = made(tmp_path / "store")
    assert store.current().number == 1
    shutil.rmtree(tmp_path / "store")
    made(tmp_path / "store", seed=7)
    assert_holds(store.current(), items(IDS, seed=7))


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    for name in ("run.json", "model.safetensors"):
        folder = tmp_path / name.split(".")[0]
        folder.mkdir()
        (folder / name).write_bytes(b"precious")
        with pytest.raises(StoreError, match=f"holds {name}; an item store needs a folder of its own"):
            made(folder)
        assert [path.name for path in folder.iterdir()] == [name]
    made(tmp_path / "store")
    (tmp_path / "store" / "model.safetensors").write_bytes(b"precious")
    with ItemStore(tmp_path / "store").writer() as writer:
        for _ in range(5):
            writer.compact()
    assert (tmp_path / "store" / "model.safetensors").read_bytes() == b"precious"


def test_a_store_of_a_newer_format_is_left_alone(tmp_path):
    store = made(tmp_path)
    with store.writer() as writer:
        for n in range(2):
            writer.upsert(items([f"new-{n}"]))
    path = tmp_path / "version-00000003.json"
    content = json.loads(path.read_text()) | {"format": 99}
    del content["crc32"]
    path.write_text(json.dumps(content | {"crc32": manifest._checksum(content)}))
    before = {path.name for path in tmp_path.iterdir()}
    with ItemStore(tmp_path).writer() as writer:
        for _ in range(5):
            writer.compact()
    assert before <= {path.name for path in tmp_path.iterdir()}


def test_no_items_make_no_version(tmp_path):
    store = made(tmp_path)
    with store.writer() as writer:
        assert writer.upsert(items([])) == 1
    assert_holds(store.current(), items(IDS))


def test_every_flipped_bit_is_found(tmp_path):
    _, newest = versions_of(tmp_path)
    random = np.random.default_rng(0)
    for path in tmp_path.glob("*-0000000*"):
        whole = path.read_bytes()
        for place in random.integers(len(whole), size=30):
            data = bytearray(whole)
            data[place] ^= 1 << int(random.integers(8))
            path.write_bytes(data)
            try:
                number = ItemStore(tmp_path).current().number
            except StoreError:
                number = 0
            wanted = {"base-00000001.safetensors": {0}, "patch-00000002.safetensors": {1}}
            # A bit of white space in a version's JSON changes nothing.
            wanted |= {"version-00000001.json": {2}, "version-00000002.json": {1, 2}}
            assert number in wanted[path.name]
            if number == 2:
                assert_holds(ItemStore(tmp_path).current(), newest)
            path.write_bytes(whole)
    assert ItemStore(tmp_path).current().number == 2


def test_a_full_disk_leaves_the_version_before(tmp_path, monkeypatch):
    store, now = made(tmp_path), items(IDS)
    real = os.fsync
    for failing in range(6):
        calls, change = iter(range(100)), items(["item-3", f"new-{failing}"], seed=failing)

        def full(handle, calls=calls, failing=failing):
            if next(calls) == failing:
                raise OSError(28, "No space left on device")
            return real(handle)

        monkeypatch.setattr(os, "fsync", full)
        try:
            with store.writer() as writer:
                writer.upsert(change)
        except OSError as error:
            assert error.errno == 28
        else:
            assert failing > 3  # a file, its folder, the version, its folder
        monkeypatch.setattr(os, "fsync", real)
        version = ItemStore(tmp_path).current()
        if f"new-{failing}" in version.ids(np.arange(len(version))):
            assert failing >= 3  # the version had its name already
            now = patched(now, change)
        assert_holds(version, now)
        assert not list(tmp_path.glob(".tmp-*"))


@pytest.fixture
def writing(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that writes to the store in `tmp_path` when told so; see store_writer.py."""
    command = [sys.executable, str(Path(__file__).with_name("store_writer.py")), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        yield process
        process.stdin.close()


def seed_of(version: StoreVersion, name: str) -> int:
    """Which `items(…, seed)` the item is of, by its title."""
    (title,) = version.titles(version.rows([name]))
    return int(re.search(r"(\d+) ✓", title)[1])


@pytest.mark.parametrize("part", ["vectors", "index.hash", "patch.rows"])
def test_a_disk_that_fills_while_a_file_is_written(tmp_path, monkeypatch, part):
    store, now = made(tmp_path), items(IDS)
    real = columns._bytes_of

    def full(given):
        for name, column in given.items():
            if name == part:
                raise OSError(28, "No space left on device")
            yield from real({name: column})

    with monkeypatch.context() as patch:
        patch.setattr(columns, "_bytes_of", full)
        with store.writer() as writer:
            for act in (lambda: writer.upsert(items(["new"])), writer.compact):
                with contextlib.suppress(OSError):
                    act()
                    assert part == ("index.hash" if act != writer.compact else "patch.rows")
    version = ItemStore(tmp_path).current()
    assert_holds(version, patched(now, items(["new"])) if "new" in version.ids(np.arange(len(version))) else now)
    assert not list(tmp_path.glob(".tmp-*"))


def test_a_full_disk_at_compaction_keeps_the_update(tmp_path, monkeypatch, caplog):
    store, change = made(tmp_path), items(["item-3", "new"], seed=2)
    monkeypatch.setattr("mmrec.recommender.store.writer._MOST_PATCHED", 1)
    monkeypatch.setattr("mmrec.recommender.store.writer._MOST_PATCHED_SHARE", 0)
    monkeypatch.setattr(
        "mmrec.recommender.store.writer.StoreWriter.compact", lambda self: (_ for _ in ()).throw(OSError(28, "full"))
    )
    with store.writer() as writer:
        assert writer.upsert(change) == 2
    assert "could not be compacted" in caplog.text
    assert_holds(ItemStore(tmp_path).current(), patched(items(IDS), change))


def test_killed_a_hundred_times(tmp_path, writing):
    """kill −9 during updates: the store opens every time, whole, on the last version or the one before."""
    made(tmp_path)
    random, last = np.random.default_rng(1), 1
    untouched = [n for n, name in enumerate(IDS) if name != "item-3"]
    for _ in range(100):
        print(random.integers(3), random.random(), file=writing.stdin, flush=True)
        assert writing.stdout.readline() == "killed\n"
        version = ItemStore(tmp_path).current()
        assert version.number >= last
        last = version.number
        ids = version.ids(np.arange(len(version)))
        assert ids[: len(IDS)] == IDS and len(set(ids)) == len(ids)
        assert torch.equal(version.vectors(np.array(untouched)), items(IDS).vectors[untouched])
        for name in ("item-3", *ids[len(IDS) :]):
            assert torch.equal(
                version.vectors(version.rows([name]))[0], items([name], seed_of(version, name)).vectors[0]
            )
    assert last > 80  # it did write meanwhile


def test_readers_while_a_writer_writes(tmp_path, writing):
    made(tmp_path)
    print("run", file=writing.stdin, flush=True)
    assert writing.stdout.readline() == "running\n"
    store, seen, until = ItemStore(tmp_path), set(), time.monotonic() + 2
    while time.monotonic() < until:
        version = store.current()
        seen.add(version.number)
        assert torch.equal(version.vectors([3])[0], items(["item-3"], seed_of(version, "item-3")).vectors[0])
    assert len(seen) > 5
