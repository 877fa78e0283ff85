"""Plots as SVG: log-log axes, marks that differ in colour and in shape, a legend. No dependency, no script.

Colours are classes of the page's style (`markup.py`), so that they follow the reader's light or dark.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from .markup import LIGHT

WIDTH = 640
_LEFT, _RIGHT, _TOP, _HEIGHT = 62, 16, 24, 300  # of the area that points lie in, and its height
_LEGEND_LINE, _CHARACTER = 19, 6.6  # the width of one at the font size of 12
_ZERO = 18  # how far below the least value 0 lies


@dataclass(frozen=True)
class Point:
    """A mark at (x, y), a bar from `low` to `high`, what it says of itself, and which others a line joins it to: those
    of the same name and `line`."""

    x: float
    y: float
    low: float
    high: float
    text: str
    line: Hashable = None


@dataclass(frozen=True)
class Style:
    """How a provider is drawn. `colour` and `shape` are numbers of the lists of colours and shapes."""

    colour: int
    shape: int
    hollow: bool


def _regular(corners: int, radius: float, turn: float = 0.0, inner: float = 0.0) -> str:
    """A path around 0: a regular polygon with a corner on top, or a star where there is an `inner` radius."""
    count = 2 * corners if inner else corners
    found = []
    for i in range(count):
        angle = math.tau * i / count + math.radians(turn)
        r = inner if inner and i % 2 else radius
        found.append(f"{r * math.sin(angle):.2f} {-r * math.cos(angle):.2f}")
    return f"M{'L'.join(found)}Z"


_SHAPES = (
    "M-4.2 0A4.2 4.2 0 1 0 4.2 0A4.2 4.2 0 1 0-4.2 0Z",
    _regular(4, 5.4, 45),
    _regular(3, 5.6),
    _regular(4, 5.6),
    _regular(3, 5.6, 180),
    _regular(5, 6.4, inner=2.5),
    "M-1.6-5H1.6V-1.6H5V1.6H1.6V5H-1.6V1.6H-5V-1.6H-1.6Z",
    _regular(3, 5.6, 90),
    _regular(4, 6.2, inner=1.9),
    _regular(3, 5.6, -90),
    "M-4.5-5H4.5L-4.5 5H4.5Z",
    _regular(5, 5.2),
)


def styles(groups: Sequence[Iterable[str]]) -> dict[str, Style]:
    """A style per name; names of one group differ in shape (up to twice the shapes, half of them hollow) and, as far as
    there are colours, in colour. The first colour is that of the first name of each group alone."""
    chosen: dict[str, int] = {}
    members = [list(dict.fromkeys(group)) for group in groups]
    for group in members:
        for name in group:
            if name not in chosen:
                taken = {chosen.get(other) for names in members if name in names for other in names}
                chosen[name] = next(i for i in range(len(taken) + 1) if i not in taken)
    count = len(_SHAPES)
    return {
        name: Style(1 + (i - 1) % (len(LIGHT) - 1) if i else 0, i % count, i // count % 2 == 1)
        for name, i in chosen.items()
    }


@dataclass(frozen=True)
class Axis:
    """A logarithmic axis from `low` at `start` to `high` at `end`; values that are not above 0 lie at `zero`."""

    low: float
    high: float
    start: float
    end: float
    zero: float

    def at(self, value: float) -> float:
        """Where `value` lies."""
        if value <= 0:
            return self.zero
        return self.start + (self.end - self.start) * math.log(value / self.low) / math.log(self.high / self.low)

    def ticks(self) -> list[float]:
        """Powers of ten, and values between them where those are few."""
        span = math.log10(self.high / self.low)
        steps: Sequence[float] = (1, 1.5, 2, 3, 4, 5, 6, 8) if span < 1 else (1, 2, 5) if span < 2.5 else (1,)
        every = math.ceil(span / 8)
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        values = (step * 10.0**decade for decade in decades if decade % every == 0 for step in steps)
        return [value for value in values if self.low <= value <= self.high]


def axis(values: Iterable[float], start: float, end: float) -> Axis:
    """The axis that holds `values`, a factor of 4 at the least, with a little room at both ends."""
    found = list(values)
    positive = [value for value in found if value > 0] or [1.0]
    low, high = min(positive), max(positive)
    if high / low < 4:
        middle = math.sqrt(low * high)
        low, high = middle / 2, middle * 2
    room = (high / low) ** 0.05
    inset = math.copysign(_ZERO, end - start) if any(value <= 0 for value in found) else 0.0
    return Axis(low / room, high * room, start + inset, end, start)


def series_plot(
    title: str,
    x_label: str,
    y_label: str,
    series: Mapping[str, Sequence[Point]],
    look: Mapping[str, Style],
    x_ticks: Sequence[float] = (),
) -> str:
    """For each name a line through its points, by x, or as many as they say. `x_ticks`: instead of round numbers."""
    points = [point for of in series.values() for point in of]
    x = axis((p.x for p in points), _LEFT, WIDTH - _RIGHT)
    y = axis((v for p in points for v in (p.y, p.low, p.high)), _TOP + _HEIGHT, _TOP)
    parts = [_frame(x, y, x_label, y_label, x_ticks)]
    for name, of in series.items():
        colour = look[name].colour
        lines: dict[Hashable, list[Point]] = {}
        for point in sorted(of, key=lambda p: p.x):
            lines.setdefault(point.line, []).append(point)
        for joined in lines.values():
            path = " ".join(f"{x.at(p.x):.2f},{y.at(p.y):.2f}" for p in joined)
            parts.append(f'<polyline class="c{colour} line" points="{path}"/>')
        parts += [_bar(x.at(p.x), y.at(p.low), y.at(p.high), colour) for p in of if p.high > p.low]
    for name, of in series.items():  # over all lines
        parts += [_mark(x.at(p.x), y.at(p.y), look[name], p.text) for p in of]
    return _svg(title, parts, {name: look[name] for name in series})


def roofline_plot(
    title: str,
    slopes: Mapping[str, float],
    peaks: Mapping[str, float],
    series: Mapping[str, Sequence[Point]],
    look: Mapping[str, Style],
) -> str:
    """Flops per second over flops per byte, below what the machine can do.

    Args:
        slopes: bytes per second by name; the second and later ones are dashed.
        peaks: flops per second by name.
        series: marks by name; `low` and `high` are not drawn.
    """
    points = [point for of in series.values() for point in of if point.x > 0 and point.y > 0]
    steepest, top = max(slopes.values()), max(peaks.values())
    x = axis([*(p.x for p in points), *(top / rate for rate in slopes.values())], _LEFT, WIDTH - _RIGHT)
    y = axis([*(p.y for p in points), *peaks.values()], _TOP + _HEIGHT, _TOP)
    parts = [_frame(x, y, "flops per byte", "flops per second")]
    kinds = ["roof", *["roof dashed"] * len(slopes)]
    for rate, kind in zip(slopes.values(), kinds, strict=False):
        begin = max(x.low, y.low / rate)
        if begin < top / rate:
            parts.append(_line(kind, x.at(begin), y.at(begin * rate), x.at(top / rate), y.at(top)))
    for rate in peaks.values():
        parts.append(_line("roof", x.at(max(rate / steepest, x.low)), y.at(rate), x.end, y.at(rate)))
    for name, of in series.items():
        parts += [_mark(x.at(p.x), y.at(p.y), look[name], p.text) for p in of if p.x > 0 and p.y > 0]
    lines = {f"{name}, {quantity(rate)}B/s": kind for (name, rate), kind in zip(slopes.items(), kinds, strict=False)}
    above = -math.inf
    for name, rate in sorted(peaks.items(), key=lambda item: -item[1]):
        above = max(y.at(rate) - 5, above + 13)  # labels of like rates stand below one another
        parts.append(_text(x.end, above, f"{name} {quantity(rate)}flops/s", "end", "label"))
    return _svg(title, parts, {name: look[name] for name in series}, lines)


def quantity(value: float) -> str:
    """Three digits and the letter of a power of thousand, with a space where a unit can follow: "34.1 G"."""
    for power, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= power:
            return f"{value / power:.3g} {letter}"
    return f"{value:.3g} "


def _frame(x: Axis, y: Axis, x_label: str, y_label: str, x_ticks: Sequence[float] = ()) -> str:
    base = _TOP + _HEIGHT
    parts = [_text(4, 12, y_label)]
    for value in y.ticks() + ([0.0] if y.zero != y.start else []):
        at = y.at(value)
        parts.append(_line("grid", _LEFT, at, WIDTH - _RIGHT, at) + _text(_LEFT - 8, at + 4, _tick(value), "end"))
    last = -math.inf
    for value in sorted(x_ticks or x.ticks()) + ([0.0] if x.zero != x.start and not x_ticks else []):
        at = x.at(value)
        if value > 0 and at - last < 42:
            continue
        last = at
        parts.append(_line("grid", at, _TOP, at, base) + _text(at, base + 16, _tick(value), "middle"))
    parts.append(_text((_LEFT + WIDTH - _RIGHT) / 2, base + 34, x_label, "middle"))
    return "".join(parts)


def _svg(title: str, parts: Sequence[str], names: Mapping[str, Style], lines: Mapping[str, str] | None = None) -> str:
    entries = [(name, _mark(0, 0, style)) for name, style in names.items()]
    entries += [(name, _line(kind, -8, 0, 8, 0)) for name, kind in (lines or {}).items()]
    longest = max((len(name) for name, _ in entries), default=0)
    columns = 2 if 30 + longest * _CHARACTER < (WIDTH - 8) / 2 else 1
    top = _TOP + _HEIGHT + 58
    legend = [
        f'<g transform="translate({14 + i % columns * WIDTH / 2:g} {top + i // columns * _LEGEND_LINE})">{mark}'
        f"{_text(14, 4, name)}</g>"
        for i, (name, mark) in enumerate(entries)
    ]
    height = top + math.ceil(len(entries) / columns) * _LEGEND_LINE
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="group" '
        f'aria-label="{escape(title)}"><title>{escape(title)}</title>\n{"".join(parts)}{"".join(legend)}</svg>'
    )


def _mark(x: float, y: float, style: Style, text: str = "") -> str:
    kind = f"c{style.colour} mark hollow" if style.hollow else f"c{style.colour} mark"
    place = f'transform="translate({x:.2f} {y:.2f})"'
    what = f' role="img"><title>{escape(text)}</title></path>' if text else ' aria-hidden="true"/>'
    return f'<path class="{kind}" {place} d="{_SHAPES[style.shape]}"{what}\n'


def _bar(x: float, low: float, high: float, colour: int) -> str:
    return _line(f"c{colour} bar", x, low, x, high)


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.2f}" y1="{y1:.2f}" x2="{x2:.2f}" y2="{y2:.2f}"/>'


def _text(x: float, y: float, content: str, anchor: str = "start", kind: str = "") -> str:
    of = f' class="{kind}"' if kind else ""
    return f'<text{of} x="{x:.2f}" y="{y:.2f}" text-anchor="{anchor}">{escape(content)}</text>'


def _tick(value: float) -> str:
    return f"{value:g}" if value < 1e4 else quantity(value).replace(" ", "")
