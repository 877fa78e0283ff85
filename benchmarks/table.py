"""A report as text."""

from __future__ import annotations

from collections.abc import Iterator

from .rows import Comparison, Missing, Report, Row

_HEADER = ("provider", "median ms", "p20 – p80", "peak MiB", "error vs fp64", "× fastest", "× roofline")


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
    load = env["load_average"]
    if roof.device == "cpu" and load is not None and load > 0.5:
        lines.append(
            f"note: the load average was {load:.1f} before the run; timings on a busy machine are not to be trusted"
        )
    return "\n".join(lines)


def case(rows: list[Row], missing: list[Missing], comparison: Comparison) -> str:
    """One case: a line per provider, the fastest first, then the verdict, then what is missing."""
    fastest = min(row.median_ms for row in rows)
    cells: list[tuple[str, ...]] = [_HEADER]
    cells += [_cells(row, fastest, comparison.floor_ms) for row in sorted(rows, key=lambda row: row.median_ms)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(_HEADER))]
    first = rows[0]
    lines = [f"{first.op}  {shape_text(first.shape)}  {first.dtype}  {first.device}  {first.mode}"]
    for line in cells:
        name, *numbers = (f"{cell:{'<' if i == 0 else '>'}{widths[i]}}" for i, cell in enumerate(line))
        lines.append("  " + "  ".join([name, *numbers]))
    lines.append("  " + verdict(comparison))
    lines += [f"  missing: {m.provider}: {m.reason}" for m in missing]
    return "\n".join(lines)


def verdict(comparison: Comparison) -> str:
    """The best peer, the ratio to it, and whether we lose."""
    roof = f"{comparison.over_floor:.2f}× the roofline's {_milliseconds(comparison.floor_ms)} ms"
    roof += f"; a plain read of its bytes took {_milliseconds(comparison.read_ms)} ms"
    if comparison.speedup is None:
        return f"{comparison.ours}: no peer ran; {roof}"
    lost = "LOST  " if comparison.speedup < 1 else ""
    return (
        f"{lost}{comparison.ours}: {comparison.speedup:.2f}× as fast as the best peer, {comparison.best_peer}; {roof}"
    )


def summary(report: Report) -> str:
    """How many cases were won, and every one that was lost."""
    held = [c for c in report.comparisons if c.speedup is not None]
    lost = [c for c in held if c.speedup is not None and c.speedup < 1]
    lines = [f"{len(held) - len(lost)} of {len(held)} cases faster than the best peer"]
    lines += [f"  LOST  {shape_text(c.shape)}  {c.dtype}  {c.mode}: {c.speedup:.2f}× of {c.best_peer}" for c in lost]
    lines += sorted(set(_missing_everywhere(report)))
    return "\n".join(lines)


def shape_text(shape: dict[str, int]) -> str:
    """`queries=1 items=100k width=64`."""
    return " ".join(f"{name}={_size(size)}" for name, size in shape.items())


def _missing_everywhere(report: Report) -> Iterator[str]:
    ran = {row.provider for row in report.rows}
    for m in report.missing:
        if m.provider not in ran:
            yield f"  missing: {m.provider}: {m.reason}"


def _size(size: int) -> str:
    for unit, letter in ((10**6, "M"), (10**3, "k")):
        if size >= unit and size % unit == 0:
            return f"{size // unit}{letter}"
    return str(size)


def _milliseconds(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def _cells(row: Row, fastest: float, floor_ms: float) -> tuple[str, ...]:
    error = ", ".join(
        f"{name} {value:.4f}" if name == "rank_agreement" else f"{name} {value:.1e}"
        for name, value in row.error_vs_fp64.items()
    )
    return (
        row.provider,
        _milliseconds(row.median_ms),
        f"{_milliseconds(row.p20_ms)} – {_milliseconds(row.p80_ms)}",
        "?" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.1f}",
        error,
        f"{row.median_ms / fastest:.2f}",
        f"{row.median_ms / floor_ms:.2f}",
    )
