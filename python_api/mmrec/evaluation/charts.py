"""Small charts as SVG text: no dependency, no script, sharp at any size."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

__all__ = ["frontier_chart", "interval_chart", "line_chart", "share_chart"]

Points = Sequence[tuple[float, float]]

# Okabe and Ito's colours, which colour-blind readers can tell apart, darkened where they carry thin lines on white.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#a8557f", "#b8860b", "#3d8fc4", "#555e6b", "#7a5195")
_INK, _MUTED, _GRID = "#1f2933", "#66727f", "#e4e8ec"
_WIDTH, _HEIGHT = 460, 250  # of charts with two axes
_CHARACTER = 6.7  # width of one at the font size of 12


def line_chart(series: Mapping[str, Points], *, x_label: str = "step", title: str = "") -> str:
    """Lines over a common axis. Points that are not finite leave a gap; one finite point is drawn as a dot."""
    finite = [p for points in series.values() for p in points if _finite(*p)]
    if not finite:
        return _nothing("no finite values")
    parts, x, y = _axes(finite, list(series), x_label)
    for i, points in enumerate(series.values()):
        colour = PALETTE[i % len(PALETTE)]
        for run in _runs(points):
            parts.append(_dot(x(run[0][0]), y(run[0][1]), 3, colour) if len(run) == 1 else _line(run, x, y, colour))
    return _svg(_WIDTH, _HEIGHT, parts, title or ", ".join(series))


def frontier_chart(series: Mapping[str, Sequence[tuple[float, float, bool]]], *, x_label: str, title: str = "") -> str:
    """Dots `(x, y, on the frontier)`; those on the frontier are filled, and joined by a grey line whatever series they
    are of."""
    finite = [p for points in series.values() for p in points if _finite(*p[:2])]
    if not finite:
        return _nothing("no finite values")
    parts, x, y = _axes([p[:2] for p in finite], list(series), x_label)
    parts.append(_line(sorted(p[:2] for p in finite if p[2]), x, y, "#9aa5b1", width=1.5))
    for i, points in enumerate(series.values()):
        colour = PALETTE[i % len(PALETTE)]
        parts += [_dot(x(p[0]), y(p[1]), 4.5, colour, filled=p[2]) for p in points if _finite(*p[:2])]
    return _svg(_WIDTH, _HEIGHT, parts, title or ", ".join(series))


def _axes(
    points: Sequence[tuple[float, float]], names: Sequence[str], x_label: str
) -> tuple[list[str], Callable[[float], float], Callable[[float], float]]:
    """Grid, labels and, for several series, the legend; and where a value lies on either axis."""
    left, right, top, bottom = 58, 16, 14, 40
    top += 20 * _legend_lines(names, left, _WIDTH) if len(names) > 1 else 0
    x_low, x_high = min(p[0] for p in points), max(p[0] for p in points)
    y_ticks = _ticks(min(p[1] for p in points), max(p[1] for p in points))
    x_ticks = [t for t in _ticks(x_low, x_high, 5) if x_low <= t <= x_high] or [x_low]

    def x(value: float) -> float:
        return left + (_WIDTH - left - right) * ((value - x_low) / (x_high - x_low) if x_high > x_low else 0.5)

    def y(value: float) -> float:
        return _HEIGHT - bottom - (_HEIGHT - top - bottom) * (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])

    parts = [
        _rule(left, y(t), _WIDTH - right, y(t)) + _text(left - 8, y(t) + 4, label, "end")
        for t, label in zip(y_ticks, _labels(y_ticks), strict=True)
    ]
    parts += [
        _text(x(t), _HEIGHT - bottom + 18, label, "middle") for t, label in zip(x_ticks, _labels(x_ticks), strict=True)
    ]
    parts.append(_text((left + _WIDTH - right) / 2, _HEIGHT - 5, x_label, "middle"))
    if len(names) > 1:
        parts.append(_legend(names, left, 12, _WIDTH))
    return parts, x, y


def interval_chart(rows: Sequence[tuple[str, float, float | None, float | None, bool]], *, title: str = "") -> str:
    """One line per model: a dot at the mean, a bar over the interval, a dashed guide at the best muted row.

    Args:
        rows: (label, mean, low or None, high or None, muted); muted rows (floors) are grey.
    """
    rows = [row for row in rows if _finite(row[1])]
    if not rows:
        return _nothing("no finite values")
    longest = max(len(_short(row[0])) for row in rows)
    width, line, top, bottom = 560, 30, 8, 32
    left, right = 16 + longest * _CHARACTER, 66
    height = top + line * len(rows) + bottom
    ends = [v for row in rows for v in (row[1], row[2], row[3]) if v is not None and _finite(v)]
    ticks = _ticks(min(0.0, *ends), max(ends), 5)

    def x(value: float) -> float:
        return left + (width - left - right) * (value - ticks[0]) / (ticks[-1] - ticks[0])

    base = height - bottom
    parts = [
        _rule(x(t), top, x(t), base) + _text(x(t), base + 18, label, "middle")
        for t, label in zip(ticks, _labels(ticks), strict=True)
    ]
    floors = [row[1] for row in rows if row[4]]
    if floors and len(floors) < len(rows):
        at = x(max(floors))
        parts.append(
            f'<line x1="{at:.1f}" y1="{top}" x2="{at:.1f}" y2="{base}" stroke="{_MUTED}" stroke-dasharray="3 4"/>'
        )
    for i, (label, mean, low, high, muted) in enumerate(rows):
        y, colour = top + line * (i + 0.5), "#9aa5b1" if muted else PALETTE[0]
        parts.append(_text(left - 10, y + 4, _short(label), "end", _MUTED if muted else _INK))
        if low is not None and high is not None and _finite(low, high):
            parts.append(
                f'<line x1="{x(low):.1f}" y1="{y:.1f}" x2="{x(high):.1f}" y2="{y:.1f}" stroke="{colour}" '
                'stroke-width="6" stroke-opacity=".28" stroke-linecap="round"/>'
            )
        parts.append(f'<circle cx="{x(mean):.1f}" cy="{y:.1f}" r="4.5" fill="{colour}"/>')
        parts.append(_text(width - 8, y + 4, f"{mean:.4f}", "end", _MUTED if muted else _INK))
    return _svg(width, height, parts, title)


def share_chart(rows: Mapping[str, Mapping[str, float]], *, title: str = "", legend: bool = True) -> str:
    """Stacked bars of shares: each row's values are divided by their sum; what is not finite or negative is refused."""
    for label, row in rows.items():
        if bad := {name: value for name, value in row.items() if not _finite(value) or value < 0}:
            raise ValueError(f"{title or 'shares'}, row {label!r}: shares must be finite and not negative, got {bad}")
    if not rows or not any(sum(row.values()) for row in rows.values()):
        return _nothing("no shares")
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    longest = max(len(_short(label)) for label in rows)
    width, line, left = 560, 34, 16 + longest * _CHARACTER
    legend_lines = _legend_lines(names, left, width) if legend else 0
    top = 4 + 20 * legend_lines
    parts = [_legend(names, left, 12, width)] if legend else []
    for i, (label, row) in enumerate(rows.items()):
        y, total, at = top + line * i + 4, sum(row.values()), left
        parts.append(_text(left - 10, y + line / 2 + 1, _short(label), "end", _INK))
        for name, value in row.items():
            share = value / total if total else 0.0
            span = (width - left - 8) * share
            colour = PALETTE[names.index(name) % len(PALETTE)]
            tip = f"{escape(label)}, {escape(name)}: {share:.1%}"
            parts.append(
                f'<rect x="{at:.1f}" y="{y}" width="{max(span - 1, 0):.1f}" height="{line - 8}" fill="{colour}" rx="2">'
                f"<title>{tip}</title></rect>"
            )
            if span > 34:
                parts.append(_text(at + span / 2, y + line / 2 + 1, f"{share:.0%}", "middle", "#ffffff"))
            at += span
    return _svg(width, top + line * len(rows) + 4, parts, title)


def _finite(*values: float) -> bool:
    return all(value is not None and math.isfinite(value) for value in values)


def _runs(points: Points) -> list[list[tuple[float, float]]]:
    runs: list[list[tuple[float, float]]] = [[]]
    for a, b in points:
        if _finite(a, b):
            runs[-1].append((a, b))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers that enclose [low, high]."""
    if high <= low:
        pad = abs(low) / 2 or 0.5
        low, high = low - pad, high + pad
    raw = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(m * unit for m in (1, 2, 2.5, 5, 10) if m * unit >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _labels(ticks: Sequence[float]) -> list[str]:
    """The ticks as text, all with as many decimals as their step needs."""
    step = min((b - a for a, b in zip(ticks, ticks[1:], strict=False)), default=abs(ticks[0]) or 1.0)
    if max(map(abs, ticks)) >= 1e6 or step < 1e-5:
        return [f"{tick:.3g}" for tick in ticks]
    decimals = next((d for d in range(7) if abs(round(step, d) - step) < 1e-9 * step), 7)
    return [f"{tick + 0.0:,.{decimals}f}" for tick in ticks]


def _short(label: str) -> str:
    return label if len(label) <= 28 else label[:27] + "…"


def _legend_lines(names: Sequence[str], left: float, width: float) -> int:
    return 1 + max(line for _, line, _ in _legend_places(names, left, width)) if names else 0


def _legend_places(names: Sequence[str], left: float, width: float) -> list[tuple[float, int, str]]:
    places, at, line = [], left, 0
    for name in map(_short, names):
        need = 30 + len(name) * _CHARACTER
        if at > left and at + need > width:
            at, line = left, line + 1
        places.append((at, line, name))
        at += need
    return places


def _legend(names: Sequence[str], left: float, y: float, width: float) -> str:
    return "".join(
        f'<rect x="{at:.1f}" y="{y + 20 * line - 9:.1f}" width="10" height="10" rx="2" '
        f'fill="{PALETTE[i % len(PALETTE)]}"/>' + _text(at + 15, y + 20 * line, name)
        for i, (at, line, name) in enumerate(_legend_places(names, left, width))
    )


def _line(
    points: Points, x: Callable[[float], float], y: Callable[[float], float], colour: str, *, width: float = 2
) -> str:
    path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in points)
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}" stroke-linejoin="round"/>'


def _dot(x: float, y: float, radius: float, colour: str, *, filled: bool = True) -> str:
    fill = colour if filled else "none"
    stroke = "" if filled else f' stroke="{colour}" stroke-width="1.5"'
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{fill}"{stroke}/>'


def _rule(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{_GRID}"/>'


def _text(x: float, y: float, content: str, anchor: str = "start", colour: str = _MUTED) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{escape(content)}</text>'


def _nothing(reason: str) -> str:
    return f'<p class="nothing">{escape(reason)}</p>'


def _svg(width: float, height: float, parts: Sequence[str], title: str) -> str:
    label = f"<title>{escape(title)}</title>" if title else ""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height:.0f}" role="img" '
        f'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif" font-size="12">'
        f"{label}{''.join(parts)}</svg>"
    )
