"""``mmrec bench-serving``: how long a request takes in this process, stage by stage."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .benchmark import rows_path
from .console import print_rows, say, status, write_json

__all__ = ["bench_serving_command"]


def bench_serving_command(
    *, items: Sequence[int], dtypes: Sequence[str], batches: Sequence[int], history: int, k: int,
    threads: int | None, seconds: float, json_file: Path | None, json_dir: Path | None,
) -> None:  # fmt: skip
    """See ``mmrec bench-serving --help``."""
    import torch
    from mmrec_kernels.benchmarks import rows

    from ..recommender.latency import Load, generated, measure

    for flag, given in (("--items", items), ("--batch", batches)):
        if min(given) < 1:
            raise ValueError(f"{flag} must be at least 1, got {min(given)}")
    path = rows_path(json_file, json_dir, "serving", "cpu")
    if threads is not None:
        torch.set_num_threads(threads)
    content: dict[str, Any] = {"command": "bench-serving", "environment": rows.environment("cpu"), "rows": []}
    for count, dtype in itertools.product(items, dtypes):
        with contextlib.ExitStack() as stack:
            with status(f"making a store of {count} items in {dtype}"):
                online = stack.enter_context(generated(count, dtype, history=history))
            for batch in batches:
                with status(f"{count} items in {dtype}, {batch} at a time"):
                    found = [asdict(row) for row in measure(online, Load(history, batch, k), seconds=seconds)]
                content["rows"] += found
                _show(found)
    write_json(path, content)


def _show(found: list[dict[str, Any]]) -> None:
    first = found[0]
    columns = ("p50_ms", "p95_ms", "p99_ms", "cold_ms")
    say(
        f"{first['items']} items of width {first['width']} in {first['dtype']}, {first['batch']} histories of "
        f"{first['history']}, k {first['k']}, {first['threads']} threads, {first['calls']} calls"
    )
    print_rows(
        ["stage", "p50 ms", "p95 ms", "p99 ms", "first ms"],
        [[row["stage"], *(f"{row[name]:.3f}" for name in columns)] for row in found],
        left=1, title="milliseconds of a call",
    )  # fmt: skip
