"""The item store under faults: damage, full disks, kill −9, readers beside a writer: nothing lost, no wrong answer."""

from __future__ import annotations

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
from store_helpers import IDS, assert_holds, items, made, patched, versions_of

from mmrec.recommender.store import ItemStore, StoreError, StoreVersion, columns, manifest
from mmrec.recommender.store.patch import Patch


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


def test_a_store_of_the_format_before_is_read_and_written(tmp_path, monkeypatch):
    with monkeypatch.context() as before:
        before.setattr(manifest, "FORMAT", 1)
        tensors = Patch.tensors
        before.setattr(Patch, "tensors", lambda p: {k: v for k, v in tensors(p).items() if k != "patch.removed"})
        change = items(["item-3", "new"], seed=4)
        store = made(tmp_path)
        with store.writer() as writer:
            writer.upsert(change)
    assert json.loads((tmp_path / "version-00000002.json").read_text())["format"] == 1
    assert_holds(ItemStore(tmp_path).current(), patched(items(IDS), change))
    with ItemStore(tmp_path).writer() as writer:
        writer.remove(["new"])
        for n in range(4):
            writer.upsert(items([f"newer-{n}"]))
    version = ItemStore(tmp_path).current()
    assert version.rows(["new", "item-3", "newer-3"]).tolist() == [-1, 3, len(IDS) + 4]
    assert len(list(tmp_path.glob("version-*.json"))) == 3  # old ones go, of whatever format


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

    change, failed = items(["new"]), []
    with monkeypatch.context() as patch:
        patch.setattr(columns, "_bytes_of", full)
        with store.writer() as writer:
            for name, act in {"upsert": lambda: writer.upsert(change), "compact": writer.compact}.items():
                try:
                    act()
                except OSError as error:
                    assert error.errno == 28
                    failed.append(name)
    assert failed == {"vectors": ["upsert", "compact"], "index.hash": ["compact"], "patch.rows": ["upsert"]}[part]
    assert_holds(ItemStore(tmp_path).current(), now if "upsert" in failed else patched(now, change))
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
        rows = np.arange(version.num_rows)
        ids = version.ids(rows[version.alive(rows)])
        assert ids[: len(IDS)] == IDS and len(set(ids)) == len(ids)
        assert torch.equal(version.vectors(np.array(untouched)), items(IDS).vectors[untouched])
        for name in ("item-3", *ids[len(IDS) :]):
            assert torch.equal(
                version.vectors(version.rows([name]))[0], items([name], seed_of(version, name)).vectors[0]
            )
    assert last > 80, last  # it did write meanwhile


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
