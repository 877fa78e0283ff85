"""Results: what is kept, what survives a crash, and which comparisons are refused."""

import errno
import json
import os

import numpy as np
import pytest

from mmrec.evaluation.intervals import paired_bootstrap
from mmrec.evaluation.results import Result, Row, compare, interval
from mmrec.evaluation.tables import format_table, print_table
from mmrec.files import write_atomic


def result(model="ours", *, shift=0.0, seed=None, users=20, names=("HR@10", "MAP-min@10"), **changes):
    rng = np.random.default_rng(7)
    rows = {
        "all": Row(np.arange(users) * 2, {name: rng.random(users) + shift for name in names}),
        "cold-among-all": Row(np.array([4, 8]), {name: np.array([0.0, 0.5]) + shift for name in names}),
    }
    settings = {
        "protocol": "S",
        "split": "S-1",
        "stage": "test",
        "mask": "train+valid",
        "dataset": "tiny",
        "fingerprint": "f" * 64,
    }
    return Result(
        model, **(settings | changes), seed=seed, rows=rows, beyond_accuracy={"Gini@10": 0.5, "Coverage@10": 1.0}
    )


def assert_same(a, b):
    assert a.to_dict() == b.to_dict()
    for name, row in a.rows.items():
        np.testing.assert_array_equal(row.users, b.rows[name].users)
        for metric, column in row.values.items():
            np.testing.assert_array_equal(column, b.rows[name].values[metric])


def test_it_comes_back_as_it_was_saved(tmp_path):
    saved = result(seed=3)
    assert_same(Result.load(saved.save(tmp_path / "metrics.json")), saved)


def test_the_json_has_plain_keys(tmp_path):
    saved = result(seed=3)
    data = json.loads(saved.save(tmp_path / "metrics.json").read_text())
    assert data["metrics"]["HR@10"] == pytest.approx(saved.rows["all"].values["HR@10"].mean())
    assert data["rows"]["cold-among-all"] == {"users": 2, "metrics": {"HR@10": 0.25, "MAP-min@10": 0.25}}
    assert (data["protocol"], data["mask"], data["seed"]) == ("S", "train+valid", 3)


def test_no_users_become_null_not_a_broken_file(tmp_path):
    nobody = Result(
        "ours", "S", "S-1", "test", "train", "tiny", "f", None, {"all": Row(np.empty(0, int), {"HR@1": np.empty(0)})}
    )
    assert json.loads(nobody.save(tmp_path / "m.json").read_text())["metrics"] == {"HR@1": None}
    assert np.isnan(Result.load(tmp_path / "m.json").metrics["HR@1"])


def test_saving_again_leaves_one_pair_of_files(tmp_path):
    result().save(tmp_path / "metrics.json")
    result(shift=1.0).save(tmp_path / "metrics.json")
    result(shift=2.0).save(tmp_path / "other.json")
    assert len(list(tmp_path.iterdir())) == 4
    assert Result.load(tmp_path / "metrics.json").metrics["HR@10"] > 1


@pytest.mark.parametrize("failing_call", [1, 3])  # of the columns, their folder, the JSON, its folder
def test_a_full_disk_leaves_the_old_result(tmp_path, monkeypatch, failing_call):
    old = result()
    old.save(tmp_path / "metrics.json")
    before = sorted(p.name for p in tmp_path.iterdir())
    calls = []

    def full(handle):
        calls.append(handle)
        if len(calls) == failing_call:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        result(shift=1.0).save(tmp_path / "metrics.json")
    monkeypatch.undo()
    assert_same(Result.load(tmp_path / "metrics.json"), old)
    # Columns without a JSON that names them may stay; temporary files may not.
    assert [name for name in before if not (tmp_path / name).exists()] == []
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_an_interrupted_write_leaves_no_trace(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "file", b"new")
    assert list(tmp_path.iterdir()) == []


def test_damaged_files_are_named(tmp_path):
    path = result().save(tmp_path / "metrics.json")
    columns = next(tmp_path.glob("*.npz"))
    columns.write_bytes(columns.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"metrics\.json is not a readable result.*does not have the content"):
        Result.load(path)
    columns.unlink()
    with pytest.raises(FileNotFoundError):
        Result.load(path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="KeyError: 'format'"):
        Result.load(path)
    path.write_text('{"format": 99}')
    with pytest.raises(ValueError, match="format 99 is not 1"):
        Result.load(path)
    path.write_text("{not json")
    with pytest.raises(ValueError, match="JSONDecodeError"):
        Result.load(path)


def test_a_foreign_name_in_the_old_file_is_not_deleted(tmp_path):
    precious = tmp_path / "precious.npz"
    precious.write_bytes(b"keep me")
    (tmp_path / "metrics.json").write_text(json.dumps({"per_user": "precious.npz"}))
    result().save(tmp_path / "metrics.json")
    assert precious.read_bytes() == b"keep me"


def test_compare_is_the_paired_bootstrap_of_the_columns():
    a, b = result(shift=0.1), result("other")
    found = compare(a, b, "HR@10", seed=5)
    assert found == paired_bootstrap(a.rows["all"].values["HR@10"], b.rows["all"].values["HR@10"], seed=5)
    assert found.mean == pytest.approx(0.1) and found.excludes_zero
    assert compare(a, b, "HR@10", row="cold-among-all").users == 2


def test_seeds_are_paired():
    ours = [result(shift=0.1 * s, seed=s) for s in range(3)]
    theirs = [result("other", seed=s) for s in range(3)]
    assert compare(ours, theirs, "HR@10").mean == pytest.approx(0.1)
    assert compare(ours, result("floor"), "HR@10").seeds == 3
    assert compare(result("floor"), ours, "HR@10").mean == pytest.approx(-0.1)
    assert interval(ours, "HR@10").seeds == 3
    with pytest.raises(ValueError, match=r"pair by seed, got seeds \[0, 1, 2\] and \[0, 2, 1\]"):
        compare(ours, [theirs[0], theirs[2], theirs[1]], "HR@10")
    with pytest.raises(ValueError, match="pair by seed"):
        compare(ours, result("one seed only", seed=0), "HR@10")


@pytest.mark.parametrize(
    ("field", "value"),
    [("protocol", "G"), ("split", "S-2"), ("stage", "valid"), ("mask", "none"), ("fingerprint", "0" * 64)],
)
def test_results_of_different_settings_are_not_compared(field, value):
    with pytest.raises(ValueError, match=f"differ in {field}"):
        compare(result(), result("other", **{field: value}), "HR@10")
    with pytest.raises(ValueError, match="do not belong in one table"):
        format_table([result(), result("other", **{field: value})], ["HR@10"])


def test_other_variants_of_a_metric_are_not_compared():
    with pytest.raises(ValueError, match=r"no MAP-min@10, only \['MAP-all@10'\]: another definition"):
        compare(result(), result("other", names=("MAP-all@10",)), "MAP-min@10")
    with pytest.raises(ValueError, match="ambiguous"):
        compare(result(), result("other"), "MAP@10")
    with pytest.raises(ValueError, match="has no NDCG@10"):
        compare(result(), result("other"), "NDCG@10")


def test_other_users_are_not_compared():
    with pytest.raises(ValueError, match="other users in 'ours' than in 'other'"):
        compare(result(), result("other", users=21), "HR@10")
    with pytest.raises(ValueError, match="no row 'tail'"):
        compare(result(), result("other"), "HR@10", row="tail")
    with pytest.raises(ValueError, match="must not be empty"):
        compare([], result("other"), "HR@10")


def test_rows_must_fit_and_carry_known_names():
    with pytest.raises(ValueError, match="one value per user"):
        Row(np.arange(3), {"HR@10": np.zeros(2)})
    with pytest.raises(ValueError, match="ambiguous"):
        Row(np.arange(3), {"MAP@10": np.zeros(3)})
    with pytest.raises(ValueError, match="rows must contain 'all'"):
        Result("m", "S", "S-1", "test", "train", "tiny", "f", None, {})


def test_a_table_as_text():
    text = format_table(
        [result(seed=1), result("floor")],
        ["HR@10"],
        differences={"ours": compare(result(shift=1.0), result(), "HR@10")},
    )
    lines = text.splitlines()
    assert lines[0] == "tiny (ffffffffffff), protocol S, test, all items ranked, masked: train+valid"
    assert lines[1].split() == ["model", "group", "users", "HR@10", "difference,", "95", "%"]
    assert lines[3].startswith("ours, seed 1") and lines[3].endswith("+1.0000 [+1.0000, +1.0000]")
    assert f"{result().metrics['HR@10']:.4f}" in lines[3]
    assert lines[4].split()[-3:] == ["cold-among-all", "2", "0.2500"]
    assert len(lines) == 7
    assert "cold" not in format_table([result()], ["HR@10"], rows=["all"])
    with pytest.raises(ValueError, match=r"has no \['NDCG@10'\]"):
        format_table([result()], ["NDCG@10"])
    with pytest.raises(ValueError, match="must not be empty"):
        format_table([], ["HR@10"])


def test_a_table_with_rich_shows_the_same_cells_and_takes_no_markup():
    rich = pytest.importorskip("rich.console")
    console = rich.Console(width=160, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    print_table([result("[red]ours[/red]")], ["HR@10"], console=console)
    shown = console.export_text()
    assert "[red]ours[/red]" in shown and f"{result().metrics['HR@10']:.4f}" in shown and "cold-among-all" in shown


def test_a_table_without_rich(monkeypatch, capsys):
    import sys

    monkeypatch.setitem(sys.modules, "rich", None)
    print_table([result()], ["HR@10"])
    assert capsys.readouterr().out == format_table([result()], ["HR@10"]) + "\n"
