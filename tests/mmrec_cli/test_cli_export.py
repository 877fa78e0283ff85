"""``mmrec export``: what the library writes, with the split of a protocol, and an account of it."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
from cli_helpers import Mmrec, read_json

from mmrec.adaptation import Catalogue, Interactions
from mmrec.adaptation.writers import LAYOUTS, write
from mmrec.commands.export import split_labels
from mmrec.evaluation import split


@pytest.mark.parametrize("to", LAYOUTS)
def test_it_writes_and_tells(mmrec: Mmrec, generated: Path, tmp_path: Path, to: str) -> None:
    out, told = tmp_path / "out", tmp_path / "told.json"
    line = mmrec("export", "--data", generated, "--to", to, "--out", out, "--json", told).succeeded()
    found, catalogue = read_json(told), Catalogue.load(generated)
    options = {"labels": split_labels(catalogue, "G", 0)[0]} if to == "mmrec" else {}
    expected = write(catalogue, tmp_path / "same", to, **options)
    assert (found["layout"], found["folder"], found["command"]) == (to, str(out), "export")
    assert (found["dataset"], found["fingerprint"]) == (catalogue.name, catalogue.fingerprint())
    assert tuple(found["files"]) == expected.files
    for name in ("written", "changed", "left_out"):
        assert found[name] == getattr(expected, name)
        assert all(part in line.out and text in line.out for part, text in found[name].items())
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "same").iterdir()
    }


@pytest.mark.parametrize(("protocol", "seed"), [(None, 0), ("G", 0), ("G", 4), ("S", 0), ("T", 0)])
def test_the_split_of_a_protocol_survives(
    mmrec: Mmrec, generated: Path, tmp_path: Path, protocol: str | None, seed: int
) -> None:
    out, told = tmp_path / "out", tmp_path / "told.json"
    option = () if protocol is None else ("--protocol", protocol)
    line = mmrec(
        "export", "--data", generated, "--to", "mmrec", "--out", out, *option, "--split-seed", seed, "--json", told
    ).succeeded()
    wanted = split(Catalogue.load(generated), protocol or "G", seed=seed)
    found = split(Catalogue.load(out), "G")
    trained = wanted.train.lengths > 0  # a reader of labels drops the others, as MMRec does
    for name in ("train", "valid", "test"):
        assert getattr(found, name).rows(trained) == getattr(wanted, name).rows(trained)
    if wanted.protocol == "G":
        assert found.id == wanted.id
    assert read_json(told)["split"] == f"protocol {wanted.protocol}, {wanted.origin}" and wanted.origin in line.out


@pytest.mark.parametrize("protocol", ["S", "G", "T"])
def test_labels_tell_repeats_and_ties_apart(generated: Path, protocol: str) -> None:
    """The parts made from the labels are those of the protocol, for pairs that occur many times, at few times."""
    rng = np.random.default_rng(0)
    user, item, time = (rng.integers(0, high, 400) for high in (30, 4, 5))
    user[:3] = [30, 31, 31]
    catalogue = Catalogue.load(generated)
    catalogue = dataclasses.replace(catalogue, interactions=Interactions.from_rows(user, item, timestamp=time))
    rows = catalogue.interactions
    assert rows.duplicates > 200
    wanted, (labels, _) = split(catalogue, protocol, seed=2), split_labels(catalogue, protocol, 2)
    assert labels.dtype == np.int8 and labels.shape == (400,)
    for part, name in enumerate(("train", "valid", "test")):
        for number in range(catalogue.num_users):
            mine = rows.item[(rows.user == number) & (labels == part)].tolist()
            dropped = protocol == "G" and not len(wanted.train[number])
            assert mine == getattr(wanted, name)[number].tolist() or (dropped and name == "test")
    if protocol == "G":
        assert wanted.dropped_users == 2
        again = split(dataclasses.replace(catalogue, interactions=dataclasses.replace(rows, split=labels)), "G")
        assert (again.id, again.dropped_users) == (wanted.id, 2)


def test_the_data_s_own_split_stays(mmrec: Mmrec, generated: Path, tmp_path: Path) -> None:
    catalogue = Catalogue.load(generated)
    labels = np.random.default_rng(0).integers(0, 3, len(catalogue.interactions)).astype(np.int8)
    labels[catalogue.interactions.user == 0] = 1
    rows = dataclasses.replace(catalogue.interactions, split=labels)
    own = dataclasses.replace(catalogue, interactions=rows).save(tmp_path / "own")
    for option in ((), ("--protocol", "G", "--split-seed", 3)):
        out = tmp_path / f"out{len(option)}"
        mmrec("export", "--data", own, "--to", "mmrec", "--out", out, *option).succeeded()
        found = Catalogue.load(out).interactions.split
        assert found is not None and np.array_equal(found, labels), "user 0, who has no training part, included"
    line = mmrec("export", "--data", own, "--to", "mmrec", "--out", tmp_path / "s", "--protocol", "S").succeeded()
    assert "labels instead of the catalogue's split" in line.out


def test_another_layout_is_read(mmrec: Mmrec, generated: Path, tmp_path: Path) -> None:
    mmrec("export", "--data", generated, "--to", "recbole", "--out", tmp_path / "a").succeeded()
    mmrec(
        "export", "--data", tmp_path / "a", "--layout", "recbole", "--to", "lcrec", "--out", tmp_path / "b"
    ).succeeded()
    assert Catalogue.load(tmp_path / "b").num_items == 48
    mmrec(
        "export", "--data", tmp_path / "a", "--layout", "p5", "--to", "lcrec", "--out", tmp_path / "c"
    ).failed("not in layout p5")  # fmt: skip


def test_wrong_command_lines(mmrec: Mmrec, generated: Path, tmp_path: Path) -> None:
    line = ("export", "--data", generated, "--out", tmp_path / "out")
    mmrec(*line, "--to", "cornac").failed("'cornac'", "mmrec, recbole, p5, lcrec")
    mmrec(*line).failed("--to", code=2)
    mmrec(*line[:3], "--to", "p5").failed("--out", code=2)
    mmrec(*line, "--to", "p5", "--protocol", "S").failed("--protocol S", "only layout mmrec keeps a split", "'p5'")
    mmrec(*line, "--to", "mmrec", "--protocol", "X").failed("--protocol", "'X'", code=2)
    mmrec("export", "--data", tmp_path / "no", "--out", tmp_path / "out", "--to", "p5").failed("no such folder")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("x")
    mmrec(*line, "--to", "lcrec").failed("holds files", "overwrite")
    mmrec(*line, "--to", "lcrec", "--overwrite").succeeded()
    assert (tmp_path / "out" / "mine.txt").read_text() == "x"
    mmrec(*line, "--to", "lcrec", "--overwrite").succeeded()


def test_without_time_there_is_no_protocol_t(mmrec: Mmrec, generated: Path, tmp_path: Path) -> None:
    mmrec("export", "--data", generated, "--to", "p5", "--out", tmp_path / "p5").succeeded()
    line = ("export", "--data", tmp_path / "p5", "--to", "mmrec", "--out", tmp_path / "out", "--protocol")
    mmrec(*line, "T").failed("protocol 'T' needs timestamps")
    mmrec(*line, "S").succeeded()
    labels = Catalogue.load(tmp_path / "out").interactions.split
    assert labels is not None and np.bincount(labels)[1:].tolist() == [60, 60]


def test_nothing_to_leave_out_is_said(mmrec: Mmrec, tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "interactions.csv").write_text("user_id,item_id\n0,1\n0,0\n1,1\n")
    line = mmrec("export", "--data", tmp_path / "plain", "--to", "recbole", "--out", tmp_path / "out").succeeded()
    assert "Nothing was left out." in line.out and "split" not in line.out


def test_a_full_disk_leaves_nothing(
    mmrec: Mmrec, generated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    mmrec("export", "--data", generated, "--to", "mmrec", "--out", tmp_path / "out").failed("out", "No space left")
    assert list((tmp_path / "out").iterdir()) == []
