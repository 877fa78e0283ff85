"""``train`` in several processes: one run folder, one voice, and a run that goes on after a process was killed."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_helpers import Mmrec, read_json, torchrun

from mmrec.commands.runs import open_run
from mmrec.recommender.training.storage import load_tensors

# The one process draws its dropout elsewhere, and the balance of experts is a statistic of a process's own items.
SAME = (
    "--set", "dropout=0", "--set", "content_dropout=0", "--set", "identity_dropout=0", "--set", "balance_weight=0",
    "--no-floors",
)  # fmt: skip
KILL = """
import os, signal
from mmrec.recommender.training import loop
loop._SAVE_SECONDS = loop._SAVE_SHARE = 0.0
step, done = loop._Loop._step, []
def killed(self, batch):
    done.append(1)
    if len(done) == 7 and self.ranks.rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, batch)
loop._Loop._step = killed
"""
FAIL = """
import os
from mmrec.commands import train
def broken(*arguments, **settings):
    raise ValueError(f"broken in {os.environ['RANK']}")
train.load_data = broken
"""


def complaints(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("mmrec: ")]


@pytest.fixture(scope="module")
def options(generated: Path, tiny_options: tuple[str, ...]) -> tuple[object, ...]:
    return ("--data", generated, "--modalities", "identity,image,table", *tiny_options, *SAME)


def test_a_killed_process_ends_all_and_the_run_goes_on(
    mmrec: Mmrec, options: tuple[object, ...], tmp_path: Path
) -> None:
    """Four processes, of which the third is killed in the second epoch; two end the run, as one process would have."""
    out = tmp_path / "run"
    done = torchrun(tmp_path, 4, "train", "--out", out, *options, before=KILL)
    assert done.returncode != 0 and complaints(done.stderr), done.stderr
    assert all("a process of this training is gone" in line and "--resume" in line for line in complaints(done.stderr))
    counters = load_tensors(out, "checkpoint")[1]["counters"]
    assert (counters["step"], counters["epoch"]) == (6, 1) and counters["batch"] > 0
    mmrec("train", "--out", out, *options).failed("holds an interrupted run: --resume goes on with it")
    written = tmp_path / "run.json"
    done = torchrun(tmp_path, 2, "train", "--out", out, *options, "--resume", "--parallel", "fsdp", "--json", written)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"run: {out}") == done.stdout.count(f"training identity-only into {out}") == 1
    assert not complaints(done.stderr) and not list(out.glob("checkpoint*")) and (out / "report.html").is_file()
    alone = tmp_path / "alone"
    mmrec("train", "--out", alone, *options, "--json", tmp_path / "alone.json").succeeded()
    for name in (".", "identity-only"):
        curves = [read_json(folder / name / "curves.json")["epochs"] for folder in (out, alone)]
        assert len(curves[0]) == len(curves[1]) == 3
        for found, wanted in zip(*curves, strict=True):
            assert found.keys() == wanted.keys()
            for column in set(wanted) - {"seconds"}:
                assert found[column] == pytest.approx(wanted[column], rel=1e-5), column
    assert read_json(written)["metrics"] == read_json(tmp_path / "alone.json")["metrics"]
    assert open_run(out).facts["best_epoch"] == open_run(alone).facts["best_epoch"]


def test_what_all_processes_find_wrong_is_said_once(generated: Path, tmp_path: Path) -> None:
    done = torchrun(tmp_path, 3, "train", "--data", generated, "--out", tmp_path / "run", before=FAIL)
    assert done.returncode != 0 and complaints(done.stderr) == ["mmrec: error: broken in 0"], done.stderr


def test_a_way_needs_several_processes(mmrec: Mmrec, generated: Path, tmp_path: Path) -> None:
    options = ("train", "--data", generated, "--out", tmp_path / "run")
    mmrec(*options, "--parallel", "ddp").failed("--parallel ddp needs several processes: torchrun --nproc-per-node")
    mmrec(*options, "--parallel", "zero").failed("--parallel must be one of ddp, fsdp, got 'zero'")
    assert not (tmp_path / "run").exists()
