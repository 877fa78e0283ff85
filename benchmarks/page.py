"""A report as one page: the rows we lose first, then for each op a table, plots, and what did not run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from . import markup, table
from .markup import Cell
from .plot import Point, Style, quantity, roofline_plot, series_plot, styles
from .rows import Comparison, Missing, Report, Row

_CASE = (Cell("shape"), Cell("dtype"), Cell("mode"))
_FACTS = ("date", "cpu", "cpus", "threads", "isa", "system")
_MIB = 2**20


def render(report: Report, planned: Mapping[str, int], stopped: str = "") -> str:
    """The page of a run, of as much as there is of it.

    Args:
        planned: how many cases the run has, by op; ops are shown in this order.
        stopped: what ended the run before its end.
    """
    done = {op: [c for c in report.comparisons if c.op == op] for op in planned}
    look = styles([_providers(report, op) for op in planned])
    names = {id(c): f"{op}-{i + 1}" for op, of in done.items() for i, c in enumerate(of)}
    header = _state(report, planned, done, stopped) + _machine(report)
    links = "".join(f'<li><a href="#{escape(op)}">{escape(op)}</a></li>' for op in planned)
    body = _lost(report, names) + f'<nav aria-label="Ops"><ul>{links}</ul></nav>\n'
    body += "".join(_op(report, op, of, look, names) for op, of in done.items())
    return markup.document("Benchmarks of mmrec-kernels", header, body)


def key(of: Row | Comparison | Missing) -> tuple[Any, ...]:
    """What tells one case from another."""
    return of.op, tuple(of.shape.items()), of.dtype, of.device, of.mode


def case_cells(of: Row | Comparison | Missing, to: str = "") -> list[Cell]:
    """A case under `shape`, `dtype`, `mode`, without its op."""
    return [Cell(table.shape_text(of.shape), to=to), Cell(of.dtype), Cell(of.mode)]


def machine_facts(report: Report) -> list[tuple[str, str]]:
    """Where and when a report was measured, and by which versions, those of all its peers too."""
    env = report.environment
    versions = {name: {str(version)} for name, version in env.get("versions", {}).items()}
    for row in report.rows:
        for name, version in row.versions.items():
            versions.setdefault(name, set()).add(version)
    found = [(name, "" if env.get(name) is None else str(env[name])) for name in _FACTS]
    found += [
        ("caches", ", ".join(f"{name} {size / 1024:,.0f} KiB" for name, size in env.get("caches", {}).items())),
        ("gpu", ", ".join(f"{name} {value}" for name, value in env.get("gpu", {}).items())),
        ("libraries", ", ".join(f"{name}: {why}" for name, why in env.get("libraries", {}).items())),
        ("versions", ", ".join(f"{name} {' and '.join(sorted(found))}" for name, found in versions.items())),
    ]
    load = env.get("load_average")
    return [*found, ("load average before", "" if load is None else f"{load:.2f}")]


def _state(report: Report, planned: Mapping[str, int], done: Mapping[str, Sequence[Comparison]], stopped: str) -> str:
    parts = []
    if not report.complete:
        counts = ", ".join(f"{op} {len(done[op])} of {count}" for op, count in planned.items())
        why = f"Stopped at {stopped}." if stopped else "The run goes on, or it was ended from outside."
        parts.append(markup.paragraph(f"Incomplete. {why} Cases measured: {counts}.", "warn"))
    if note := table.busy(report):
        parts.append(markup.paragraph(f"Note: {note}.", "warn"))
    return "".join(parts)


def _machine(report: Report) -> str:
    roof = report.roofline
    rates = [
        ("device", roof.device),
        ("read", f"{roof.read_bytes_per_s / 1e9:.1f} GB/s over {roof.buffer_bytes / _MIB:.0f} MiB"),
        ("copy", f"{roof.copy_bytes_per_s / 1e9:.1f} GB/s, each byte read and written"),
        *((f"products, {name}", f"{rate / 1e9:,.0f} GFLOP/s") for name, rate in roof.flops_per_s.items()),
    ]
    return markup.facts([*machine_facts(report), *rates])


def _providers(report: Report, op: str) -> list[str]:
    """Those that ran, ours first."""
    ours = [c.ours for c in report.comparisons if c.op == op]
    return list(dict.fromkeys([*ours, *(row.provider for row in report.rows if row.op == op)]))


def _lost(report: Report, names: Mapping[int, str]) -> str:
    held = sum(c.speedup is not None for c in report.comparisons)
    alone = len(report.comparisons) - held
    lost = sorted(table.lost(report.comparisons), key=lambda c: c.speedup or 0.0)
    if not held:
        text = "No case with a peer has been measured."
    elif lost:
        text = f"{len(lost)} of {held} cases: the best peer was faster than we are. The worst first."
    else:
        text = f"None: in all {held} cases we were at least as fast as the best peer."
    text += f" {alone} more had no peer that ran." if alone else ""
    body = markup.paragraph(text)
    if lost:
        rows = _rows_by_case(report)
        head = (Cell("op"), *_CASE, *_VERSUS)
        lines = [("", [Cell(c.op), *case_cells(c, names[id(c)]), *_versus(c, rows[key(c)])]) for c in lost]
        body += markup.table("Rows we lose", head, lines)
    return markup.section("lost", "Rows we lose", body)


def _op(
    report: Report, op: str, comparisons: Sequence[Comparison], look: Mapping[str, Style], names: Mapping[int, str]
) -> str:
    missing = [m for m in report.missing if m.op == op]
    if not comparisons:
        return markup.section(op, op, markup.paragraph("No case has been measured."))
    held = sum(c.speedup is not None for c in comparisons)
    faster = held - len(table.lost(comparisons))
    body = markup.paragraph(f"{faster} of {held} cases with a peer at least as fast as the best of them.")
    by_case = _rows_by_case(report)
    lines = [(names[id(c)], [*case_cells(c), *_versus(c, by_case[key(c)])]) for c in comparisons]
    body += markup.heading(3, "Ours and the best peer")
    body += markup.table(f"{op}: ours and the best peer", (*_CASE, *_VERSUS), lines)
    body += _all_rows(op, comparisons, by_case)
    body += markup.heading(3, "Time and memory by size")
    body += markup.paragraph("Points are medians, bars reach from p20 to p80; memory is the peak of one call.", "hint")
    body += "".join(_plots(op, comparisons, by_case, look))
    body += _roofline(report, op, comparisons, by_case, look)
    return markup.section(op, op, body + _not_run(op, missing))


def _rows_by_case(report: Report) -> dict[tuple[Any, ...], dict[str, Row]]:
    found: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in report.rows:
        found.setdefault(key(row), {})[row.provider] = row
    return found


_VERSUS = (
    Cell("ours"), *(Cell(name, "n") for name in ("ms", "p20 – p80", "MiB")),
    Cell("best peer"), *(Cell(name, "n") for name in ("ms", "p20 – p80", "MiB")),
    *(Cell(name, "n") for name in ("× as fast as the peer", "floor ms", "× floor")),
)  # fmt: skip


def _versus(comparison: Comparison, rows: Mapping[str, Row]) -> list[Cell]:
    """Cells under `_VERSUS`."""
    cells = []
    for name in (comparison.ours, comparison.best_peer):
        if name is None:
            cells += [Cell("no peer ran"), *[Cell("–", "n")] * 3]
            continue
        _, median, spread, peak, *_ = table.cells(rows[name], 1.0, 1.0)
        cells += [Cell(name), Cell(median, "n"), Cell(spread, "n"), Cell(peak, "n")]
    ratio = Cell("–", "n") if comparison.speedup is None else Cell(f"{comparison.speedup:.3g}", "n")
    if table.lost([comparison]):
        ratio = Cell(f"LOST {ratio.text}", "n lost")
    floor = table.milliseconds(comparison.floor_ms)
    return [*cells, ratio, Cell(floor, "n"), Cell(f"{comparison.over_floor:.2f}", "n")]


def _all_rows(op: str, comparisons: Sequence[Comparison], by_case: Mapping[tuple[Any, ...], Mapping[str, Row]]) -> str:
    lines = []
    for comparison in comparisons:
        rows = sorted(by_case[key(comparison)].values(), key=lambda row: row.median_ms)
        for row in rows:
            provider, *numbers = table.cells(row, rows[0].median_ms, comparison.floor_ms)
            calls = str(comparison.calls.get(row.provider, "?"))
            cells = [*case_cells(row), Cell(provider), *(Cell(n, "n") for n in (*numbers, calls))]
            lines.append(("", cells))
    head = (*_CASE, Cell("provider"), *(Cell(name, "n") for name in (*table.HEADER[1:], "calls")))
    return markup.details(f"All {len(lines)} rows of {op}", markup.table(f"All rows of {op}", head, lines))


def _plots(
    op: str,
    comparisons: Sequence[Comparison],
    by_case: Mapping[tuple[Any, ...], Mapping[str, Row]],
    look: Mapping[str, Style],
) -> Iterable[str]:
    """For each dtype and mode: time by size, and memory by size."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for comparison in comparisons:
        groups.setdefault((comparison.dtype, comparison.mode), []).extend(by_case[key(comparison)].values())
    for (dtype, mode), rows in groups.items():
        label, sizes, ticks = _size(rows)
        joined, lines = _lines(rows, sizes)
        times: dict[str, list[Point]] = {}
        peaks: dict[str, list[Point]] = {}
        for row, x, line in zip(rows, sizes, lines, strict=True):
            text = f"{row.provider}: {table.shape_text(row.shape)}: "
            _, median, spread, *_ = table.cells(row, 1.0, 1.0)
            at = Point(x, row.median_ms, row.p20_ms, row.p80_ms, f"{text}{median} ms, p20 – p80 {spread}", line)
            times.setdefault(row.provider, []).append(at)
            if row.peak_bytes is not None:
                mib = row.peak_bytes / _MIB
                peaks.setdefault(row.provider, []).append(Point(x, mib, mib, mib, f"{text}{mib:.3g} MiB", line))
        title = f"{op}, {dtype}, {mode}"
        drawn = [series_plot(f"{title}: time by size", label, "median ms", times, look, ticks)]
        drawn += [series_plot(f"{title}: memory by size", label, "peak MiB", peaks, look, ticks)] if peaks else []
        cells = "".join(f"<div>{markup.scroll(f'{title}: plot {i + 1}', plot)}</div>" for i, plot in enumerate(drawn))
        yield markup.heading(4, f"{dtype}, {mode}") + markup.paragraph(joined, "hint")
        yield f'<div class="plots">{cells}</div>\n'


def _size(rows: Sequence[Row]) -> tuple[str, list[float], list[float]]:
    """What stands for a case's size: the dimension that varies alone, else its flops, else its bytes; its value for
    each row, and ticks."""
    shapes = [row.shape for row in rows]
    if all(shape.keys() == shapes[0].keys() for shape in shapes):
        varying = [name for name in shapes[0] if len({shape[name] for shape in shapes}) > 1]
        if len(varying) == 1:
            values = [float(shape[varying[0]]) for shape in shapes]
            distinct = sorted(set(values))
            return varying[0], values, distinct if distinct[0] > 0 and len(distinct) <= 8 else []
    flops = {row.flops for row in rows}
    if min(flops) > 0 and (len(flops) > 1 or len({row.bytes for row in rows}) == 1):
        return "flops of the case", [float(row.flops) for row in rows], []
    return "bytes that the case reads and writes", [float(row.bytes) for row in rows], []


def _lines(rows: Sequence[Row], sizes: Sequence[float]) -> tuple[str, list[Any]]:
    """Which line each row is on: those that differ in one dimension alone are, in the one that joins most points of
    different sizes. Where none does, one line goes through all. And this in words."""
    best, text, lines = 0, "Lines join all cases by their size.", [None] * len(rows)
    for name in dict.fromkeys(name for row in rows for name in row.shape):
        rest: list[Any] = [tuple((n, size) for n, size in row.shape.items() if n != name) for row in rows]
        joins = len(set(zip(rest, sizes, strict=True))) - len(set(rest))
        if joins > best:
            best, text, lines = joins, f"Lines join cases that differ in {name} alone.", rest
    return text, lines


def _roofline(
    report: Report,
    op: str,
    comparisons: Sequence[Comparison],
    by_case: Mapping[tuple[Any, ...], Mapping[str, Row]],
    look: Mapping[str, Style],
) -> str:
    roof = report.roofline
    if not roof.flops_per_s:
        return ""
    series: dict[str, list[Point]] = {}
    for comparison in comparisons:
        for name in (comparison.ours, comparison.best_peer):
            if name is not None and (row := by_case[key(comparison)][name]).flops > 0 < row.bytes:
                rate = 1e3 * row.flops / row.median_ms
                text = f"{name}: {table.shape_text(row.shape)}, {row.dtype}, {row.mode}: {quantity(rate)}flops/s"
                series.setdefault(name, []).append(Point(row.flops / row.bytes, rate, rate, rate, text))
    slopes = {"read": roof.read_bytes_per_s, "copy, both ways": 2 * roof.copy_bytes_per_s}
    hint = (
        "Ours and the best peer of every case, under the rates measured in this run: bytes per second over buffers "
        "larger than the caches (the slopes), and products of each dtype. Flops and bytes are the least that the case "
        "takes. What fits into a cache can lie above a slope."
    )
    title = f"{op}: roofline"
    plot = roofline_plot(title, slopes, roof.flops_per_s, series, look)
    return markup.heading(3, "Roofline") + markup.paragraph(hint, "hint") + markup.scroll(f"{title}, plot", plot)


def _not_run(op: str, missing: Sequence[Missing]) -> str:
    reasons: dict[tuple[str, str], list[Missing]] = {}
    for m in missing:
        reasons.setdefault((m.provider, m.reason), []).append(m)
    body = markup.heading(3, "Peers that did not run")
    if not reasons:
        return body + markup.paragraph("None: every peer ran on every case that it is listed for.")
    lines = []
    for (provider, reason), of in reasons.items():
        cases = "; ".join(", ".join(cell.text for cell in case_cells(m)) for m in of)
        lines.append(("", [Cell(provider), Cell(reason, "wide"), Cell(str(len(of)), "n"), Cell(cases, "wide")]))
    head = (Cell("provider"), Cell("reason"), Cell("cases", "n"), Cell("on"))
    return body + markup.table(f"{op}: peers that did not run", head, lines)
