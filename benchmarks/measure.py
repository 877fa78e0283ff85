"""Measures cases one after another: prints a table for each, writes all rows after each."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch

from . import roofline, rows, runner, table
from .case import Case
from .clock import clock
from .report import Folder


def path_in(folder: Path, name: str, device: str) -> Path:
    """`folder/<device>/<name>.json`, the device by its own name; the folder is made."""
    found = torch.cuda.get_device_name() if device == "cuda" else rows.environment("cpu")["cpu"]
    folder = folder / re.sub(r"[^a-z0-9]+", "-", found.lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}.json"


def why_not_written(path: Path) -> str | None:
    """Why rows cannot go to `path`, or None: asked before hours of work, not after."""
    if not path.parent.is_dir():
        return f"there is no folder {path.parent}"
    return "this is a folder; give a file, or use --json-dir" if path.is_dir() else None


def measure(
    cases: Sequence[Case], device: str, seconds: float, path: Path | None, folder: Folder | None = None
) -> None:
    """Runs `cases`, each for `seconds` beyond the least number of calls. The rows go to `path`, a page of them to
    `folder`: after every case, so that neither is lost if a later one fails.

    Raises:
        NotWritten: a file cannot be written.
    """
    environment = rows.environment(device)  # first: measuring raises the load average
    timer = clock(device)
    roof = roofline.measure(device, timer, {case.compute_dtype for case in cases})
    report = rows.Report(environment, roof)
    print(table.header(report), flush=True)

    def save() -> None:
        if path is not None:
            report.save(path)
        if folder is not None:
            folder.save(report)

    if folder is not None:
        folder.save(report)
    case = None
    try:
        for case in cases:
            result = runner.run(case, timer, roof, seconds)
            report.rows += result.rows
            report.missing += result.missing
            report.comparisons.append(result.comparison)
            print("\n" + table.case(result.rows, result.missing, result.comparison), flush=True)
            save()
        report.complete = True
    except BaseException as error:
        if folder is not None and case is not None:
            folder.stopped(report, case, error)
        raise
    finally:
        print("\n" + table.summary(report), flush=True)
    save()
    if path is not None:
        print(f"rows: {path}")
    if folder is not None:
        print(f"report: {folder.page}")
