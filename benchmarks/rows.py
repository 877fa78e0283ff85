"""What a run writes down: rows, what follows from them, and where and when they were measured."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from .. import __version__, library
from .roofline import Roofline, cache_sizes


@dataclass(frozen=True)
class Row:
    """One provider on one case.

    `median_ms`, `p20_ms`, `p80_ms`: of the calls. `peak_bytes`: memory of one call at its peak, its result included,
    beyond what was held before; None where the system cannot tell. `error_vs_fp64`: measures by name, such as "max"
    (max|a−o| / max|o|) and "l2". `flops`, `bytes`: the least that the case takes, the same for all its providers.
    """

    op: str
    shape: dict[str, int]
    dtype: str
    device: str
    mode: str
    provider: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    peak_bytes: int | None
    error_vs_fp64: dict[str, float]
    flops: int
    bytes: int
    versions: dict[str, str]


@dataclass(frozen=True)
class Missing:
    """A provider that did not run on a case, and why."""

    op: str
    shape: dict[str, int]
    dtype: str
    device: str
    mode: str
    provider: str
    reason: str


@dataclass(frozen=True)
class Comparison:
    """One case: our best provider against the best peer and against the machine.

    `speedup`: the best peer's median over ours, so that above 1 we are faster; None without a peer. `over_floor`: our
    median over `floor_ms`, the time of the roofline; `read_ms`: the median of a plain read of the case's
    bytes, timed among the providers, None in reports from before it was; `calls`: how many timed calls each provider's
    quantiles are of.
    """

    op: str
    shape: dict[str, int]
    dtype: str
    device: str
    mode: str
    ours: str
    best_peer: str | None
    speedup: float | None
    floor_ms: float
    over_floor: float
    read_ms: float | None
    calls: dict[str, int]


@dataclass
class Report:
    """A whole run; `complete` is False while it goes on, and stays so if it is interrupted."""

    environment: dict[str, Any]
    roofline: Roofline
    rows: list[Row] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)
    complete: bool = False

    def save(self, path: Path) -> None:
        """Write JSON to `path`, which holds the former or the new content at any time."""
        text = json.dumps(asdict(self), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        write_whole(path, text)


class NotWritten(OSError):
    """A file that rows or a page were to go to; `filename` is that file."""


class NotAReport(ValueError):
    """A JSON file that holds something else."""


def load(path: Path) -> Report:
    """The report that `Report.save` wrote to `path`, an earlier version's too.

    Raises:
        OSError: `path` cannot be read.
        NotAReport: it is JSON of another kind.
        ValueError: it is not JSON.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    try:
        report = Report(
            dict(found["environment"]),
            Roofline(**found["roofline"]),
            [Row(**row) for row in found["rows"]],
            [Comparison(**({"read_ms": None} | comparison)) for comparison in found["comparisons"]],
            [Missing(**missing) for missing in found["missing"]],
            found["complete"] is True,
        )
        sound = all(0 < ms < math.inf for row in report.rows for ms in (row.median_ms, row.p20_ms, row.p80_ms))
        cases: list[Row | Comparison | Missing] = [*report.rows, *report.comparisons, *report.missing]
        sound &= all(isinstance(size, int) for case in cases for size in case.shape.values())
    except (AttributeError, KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise NotAReport(f"{path} is not a report of mmrec_kernels.benchmarks")
    return report


def write_whole(path: Path, text: str) -> None:
    """Write `text` to `path`, which holds the former or the new content at any time, or raise NotWritten."""
    try:
        _replace(path, text)
    except OSError as error:  # what could not be written is a temporary file beside it
        raise NotWritten(error.errno, error.strerror or str(error), str(path)) from error


def _replace(path: Path, text: str) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes it private
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def compare(
    rows: list[Row],
    ours: set[str],
    floor_ms: float,
    read_ms: float,
    calls: dict[str, int],
    yardsticks: Collection[str] = (),
) -> Comparison:
    """The rows of one case, at least one of which is named in `ours`; the fastest of ours stands for us."""
    own = min((r for r in rows if r.provider in ours), key=lambda r: r.median_ms)
    peer = min(
        (r for r in rows if r.provider not in ours and r.provider not in yardsticks),
        key=lambda r: r.median_ms,
        default=None,
    )
    return Comparison(
        own.op,
        own.shape,
        own.dtype,
        own.device,
        own.mode,
        own.provider,
        best_peer=peer.provider if peer else None,
        speedup=peer.median_ms / own.median_ms if peer else None,
        floor_ms=floor_ms,
        over_floor=own.median_ms / floor_ms,
        read_ms=read_ms,
        calls=calls,
    )


def versions(module: str, package: str = "") -> dict[str, str]:
    """Versions that a provider's row depends on; `module` is what it needs beside torch, "" for nothing."""
    found = {"mmrec_kernels": __version__, "torch": torch.__version__, "python": platform.python_version()}
    if module:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[module] = importlib.metadata.version(package or module)
    return found


def environment(device: str) -> dict[str, Any]:
    """Where and when: date, system, processor, instruction set, threads, how busy the machine is, and the GPU."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    found: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "system": platform.platform(),
        "cpu": _cpu_model(),
        "cpus": os.cpu_count(),
        "caches": cache_sizes(),
        "isa": library.cpu_isa(),
        "threads": torch.get_num_threads(),
        "load_average": load,
        "libraries": {x.name: x.reason for x in library.compiled_libraries()},
        "versions": versions("numpy"),
    }
    if device == "cuda":
        found["gpu"] = _gpu()
    return found


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    found = {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "cuda": torch.version.cuda,
    }
    if shutil.which("nvidia-smi"):
        query = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit"
        device = f"--id=GPU-{str(properties.uuid).removeprefix('GPU-')}"
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", device]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            found |= dict(zip(query.split(","), done.stdout.strip().split(", "), strict=False))
    return found
