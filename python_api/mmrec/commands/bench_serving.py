"""``mmrec bench-serving``: how long a request takes, stage by stage in this process, or from a server under load."""

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

_WARM_UP_RATE, _WARM_UP_SECONDS = 100.0, 3.0


def bench_serving_command(
    *, items: Sequence[int], dtypes: Sequence[str], batches: Sequence[int], history: int, k: int,
    threads: int | None, ann: str | None, rate: float | None, seconds: float, json_file: Path | None,
    json_dir: Path | None,
) -> None:  # fmt: skip
    """See ``mmrec bench-serving --help``."""
    import torch
    from mmrec_kernels.benchmarks import rows

    from ..recommender.latency import Load, generated, measure

    for flag, given in (("--items", items), ("--batch", batches)):
        if min(given) < 1:
            raise ValueError(f"{flag} must be at least 1, got {min(given)}")
    if rate is not None and not rate > 0:
        raise ValueError(f"--rate must be above 0, got {rate}")
    path = rows_path(json_file, json_dir, "serving" if rate is None else "server", "cpu")
    if threads is not None:
        torch.set_num_threads(threads)
    content: dict[str, Any] = {"command": "bench-serving", "environment": rows.environment("cpu"), "rows": []}
    for count, dtype in itertools.product(items, dtypes):
        if rate is not None:
            content["rows"].append(_under_load(count, dtype, history, k, threads, ann, rate, seconds))
            continue
        with contextlib.ExitStack() as stack:
            with status(f"making a store of {count} items in {dtype}"):
                online = stack.enter_context(generated(count, dtype, history=history, ann=ann))
            for batch in batches:
                with status(f"{count} items in {dtype}, {batch} at a time"):
                    found = [asdict(row) for row in measure(online, Load(history, batch, k), seconds=seconds)]
                content["rows"] += found
                _show(found)
    write_json(path, content)


def _under_load(
    items: int, dtype: str, history: int, k: int, threads: int | None, ann: str | None, rate: float, seconds: float
) -> dict[str, Any]:
    """One row: a server in another process, asked at a given rate."""
    from ..recommender.serving import load
    from .serve import default_threads

    threads = default_threads() if threads is None else threads
    bodies = load.random_bodies(items, history, k)
    with contextlib.ExitStack() as stack:
        with status(f"starting a server over {items} items in {dtype}"):
            made = load.generated_server(items, dtype, history=history, threads=threads, ann=ann)
            port, process = stack.enter_context(made)
            load.load(port, bodies, rate=min(rate, _WARM_UP_RATE), seconds=_WARM_UP_SECONDS)
        with status(f"{rate:g} requests per second for {seconds:g} s"):
            found = load.load(port, bodies, rate=rate, seconds=seconds, pid=process).summary()
    row = {"items": items, "dtype": dtype, "history": history, "k": k, "threads": threads,
           "ann": ann or "", "rate": rate, **found}  # fmt: skip
    say(
        f"{items} items in {dtype}, histories of {history}, k {k}, {threads} thread(s), {rate:g} requests per second "
        f"for {found['seconds']} s: p50 {found['p50_ms']:.2f} ms, p95 {found['p95_ms']:.2f}, "
        f"p99 {found['p99_ms']:.2f}, longest {found['longest_ms']:.2f}; statuses {found['statuses']}; "
        f"memory {_mib(found['memory_begin_mib'])} to {_mib(found['memory_end_mib'])} MiB"
    )
    return row


def _mib(value: object) -> str:
    return f"{value:.1f}" if isinstance(value, float) else "?"


def _show(found: list[dict[str, Any]]) -> None:
    first = found[0]
    columns = ("p50_ms", "p95_ms", "p99_ms", "cold_ms")
    say(
        f"{first['items']} items of width {first['width']} in {first['dtype']}, {first['batch']} histories of "
        f"{first['history']}, k {first['k']}, {first['threads']} threads, {first['calls']} calls"
        + (f", {first['ann']} with recall {first['recall']:.3f}" if first["ann"] else "")
    )
    print_rows(
        ["stage", "p50 ms", "p95 ms", "p99 ms", "first ms"],
        [[row["stage"], *(f"{row[name]:.3f}" for name in columns)] for row in found],
        left=1, title="milliseconds of a call",
    )  # fmt: skip
