"""A store that several processes build is the one that a single process builds."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from cli_helpers import Mmrec, torchrun

from mmrec.commands.runs import open_run
from mmrec.commands.sharded import _join, _parts_folder, _ranges
from mmrec.recommender import ItemStore


def assert_same(found: Path, wanted: Path) -> None:
    mine, theirs = ItemStore(found).current(), ItemStore(wanted).current()
    rows = range(len(theirs))
    assert len(mine) == len(theirs) and mine.ids(rows) == theirs.ids(rows) and mine.titles(rows) == theirs.titles(rows)
    # Other batches, other roundings of the language model.
    torch.testing.assert_close(mine.vectors(rows), theirs.vectors(rows), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(mine.mass(rows), theirs.mass(rows), rtol=0, atol=2e-3)
    assert torch.equal(mine.content(rows), theirs.content(rows)) and torch.equal(mine.known(rows), theirs.known(rows))


@pytest.fixture
def alone(mmrec: Mmrec, trained: Path, tmp_path: Path) -> Path:
    """The store that one process builds."""
    folder = tmp_path / "alone"
    mmrec("index", "--run", trained, "--out", folder, "--items", open_run(trained).data).succeeded()
    return folder


def test_ranges():
    assert _ranges(0, 3) == [(0, 0)] and _ranges(1, 3) == [(0, 1)]
    for items, workers in ((48, 2), (100_000, 3), (7, 5)):
        ranges = _ranges(items, workers)
        assert [n for a, b in ranges for n in range(a, b)] == list(range(items))
        assert all(0 < b - a <= 4096 for a, b in ranges) and len(ranges) >= min(items, workers)


def test_torchrun(trained: Path, alone: Path, tmp_path: Path) -> None:
    run, store = open_run(trained), tmp_path / "store"
    done = torchrun(tmp_path, 2, "index", "--run", trained, "--out", store, "--items", run.data)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("version 1, 48 items") == 1
    assert_same(store, alone)
    assert not list(tmp_path.glob("store.parts*"))


def test_a_rank_that_fails_ends_all(trained: Path, tmp_path: Path) -> None:
    """An image that only one rank reads is broken."""
    run, items, store = open_run(trained), tmp_path / "items", tmp_path / "store"
    shutil.copytree(run.data, items)
    for image in sorted((items / "images").iterdir())[:1]:
        image.write_bytes(b"no image")
    done = torchrun(tmp_path, 2, "index", "--run", trained, "--out", store, "--items", items)
    assert done.returncode != 0 and "broken image" in done.stderr and "nothing was written" in done.stderr
    assert not list(store.glob("version-*")) and not list(tmp_path.glob("store.parts*"))


def test_ray(mmrec: Mmrec, trained: Path, alone: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    run, store = open_run(trained), tmp_path / "store"
    outcome = mmrec(
        "index", "--run", trained, "--out", store, "--items", run.data, "--engine", "ray", "--workers", 2
    ).succeeded()
    assert "version 1, 48 items" in outcome.out
    assert_same(store, alone)
    assert not list(tmp_path.glob("store.parts*"))


def test_parts_that_are_elsewhere_are_missed(tmp_path: Path) -> None:
    """What another machine wrote onto a disk of its own must not leave a smaller store."""
    parts = _parts_folder(tmp_path / "store")
    assert parts.is_dir() and parts != _parts_folder(tmp_path / "store")
    (parts / "000000000000.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="1 of 2 parts are not in .*, which all must share: nothing is written"):
        _join(tmp_path / "store", None, parts, [(0, 4), (4, 8)])
    assert not (tmp_path / "store").exists()


def test_what_is_not_built_in_shards(mmrec: Mmrec, trained: Path, tmp_path: Path) -> None:
    out, data = tmp_path / "store", open_run(trained).data
    mmrec("index", "--run", trained, "--out", out, "--engine", "ray").failed("building in shards needs --items")
    options = ("--items", data, "--update", "--engine", "ray")
    mmrec("index", "--run", trained, "--out", out, *options).failed("--update adds to a store in one process")
