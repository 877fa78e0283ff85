"""A report as text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from .rows import Comparison, Missing, Report, Row

HEADER = ("provider", "median ms", "p20 – p80", "peak MiB", "error vs fp64", "× fastest", "× roofline")


def header(report: Report) -> str:
    """The machine, and what it can do."""
    env, roof = report.environment, report.roofline
    flops = ", ".join(f"{name} {rate / 1e9:,.0f}" for name, rate in roof.flops_per_s.items())
    lines = [
        f"{env['date']}  {env['gpu']['name'] if 'gpu' in env else env['cpu']}",
        f"{env['cpus']} CPUs, {env['threads']} threads, ISA {env['isa']}, torch {env['versions']['torch']}",
        f"roofline: read {roof.read_bytes_per_s / 1e9:.1f} GB/s and copy {roof.copy_bytes_per_s / 1e9:.1f} GB/s over"
        f" {roof.buffer_bytes / 2**20:.0f} MiB, products {flops} GFLOP/s",
    ]
    if note := busy(report):
        lines.append(f"note: {note}")
    return "\n".join(lines)


def busy(report: Report) -> str:
    """That the machine had other work when a run on its CPU began, or nothing."""
    load = report.environment.get("load_average")
    if report.roofline.device != "cpu" or load is None or load <= 0.5:
        return ""
    return f"the load average was {load:.1f} before the run; timings on a busy machine are not to be trusted"


def case(rows: list[Row], missing: list[Missing], comparison: Comparison) -> str:
    """One case: a line per provider, the fastest first, then the verdict, then what is missing."""
    fastest = min(row.median_ms for row in rows)
    sorted_rows = sorted(rows, key=lambda row: row.median_ms)
    first = rows[0]
    lines = [f"{first.op}  {shape_text(first.shape)}  {first.dtype}  {first.device}  {first.mode}"]
    lines += aligned([HEADER, *(cells(row, fastest, comparison.floor_ms) for row in sorted_rows)])
    lines.append("  " + verdict(comparison))
    lines += [f"  missing: {m.provider}: {m.reason}" for m in missing]
    return "\n".join(lines)


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Lines of equally many cells under one another: the first to the left, all others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  " + "  ".join(f"{cell:{'>' if i else '<'}{widths[i]}}" for i, cell in enumerate(line)) for line in lines]


def verdict(comparison: Comparison) -> str:
    """The best peer, the ratio to it, and whether we lose."""
    roof = f"{comparison.over_floor:.2f}× the roofline's {milliseconds(comparison.floor_ms)} ms"
    if comparison.read_ms is not None:
        roof += f"; a plain read of its bytes took {milliseconds(comparison.read_ms)} ms"
    if comparison.speedup is None:
        return f"{comparison.ours}: no peer ran; {roof}"
    mark = "LOST  " if comparison.speedup < 1 else ""
    return (
        f"{mark}{comparison.ours}: {comparison.speedup:.2f}× as fast as the best peer, {comparison.best_peer}; {roof}"
    )


def summary(report: Report) -> str:
    """How many cases were won, and every one that was lost."""
    held = [c for c in report.comparisons if c.speedup is not None]
    behind = lost(report.comparisons)
    several = len({c.op for c in report.comparisons}) > 1
    lines = [f"{len(held) - len(behind)} of {len(held)} cases faster than the best peer"]
    for c in behind:
        op = f"{c.op}  " if several else ""
        lines.append(f"  LOST  {op}{shape_text(c.shape)}  {c.dtype}  {c.mode}: {c.speedup:.2f}× of {c.best_peer}")
    lines += sorted(set(_missing_everywhere(report)))
    return "\n".join(lines)


def lost(comparisons: Iterable[Comparison]) -> list[Comparison]:
    """Those whose best peer was faster than ours."""
    return [c for c in comparisons if c.speedup is not None and c.speedup < 1]


def shape_text(shape: dict[str, int]) -> str:
    """`queries=1 items=100k width=64`."""
    return " ".join(f"{name}={_size(size)}" for name, size in shape.items())


def _missing_everywhere(report: Report) -> Iterator[str]:
    ran = {(row.op, row.provider) for row in report.rows}
    for m in report.missing:
        if (m.op, m.provider) not in ran:
            yield f"  missing: {m.provider}: {m.reason}"


def _size(size: int) -> str:
    for unit, letter in ((10**6, "M"), (10**3, "k")):
        if size >= unit and size % unit == 0:
            return f"{size // unit}{letter}"
    return str(size)


def milliseconds(value: float) -> str:
    """Three digits, or all that stand before the point."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def cells(row: Row, fastest: float, floor_ms: float) -> tuple[str, ...]:
    """A row under `HEADER`. `fastest`: the least median of its case."""
    error = ", ".join(
        f"{name} {value:.4f}" if name == "rank_agreement" else f"{name} {value:.1e}"
        for name, value in row.error_vs_fp64.items()
    )
    return (
        row.provider,
        milliseconds(row.median_ms),
        f"{milliseconds(row.p20_ms)} – {milliseconds(row.p80_ms)}",
        "?" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.1f}",
        error,
        f"{row.median_ms / fastest:.2f}",
        f"{row.median_ms / floor_ms:.2f}",
    )
