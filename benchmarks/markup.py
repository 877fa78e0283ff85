"""The frame of a page that needs nothing but itself: style, headings, tables. Whatever is text is escaped here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

# Okabe and Ito's colours, which colour-blind readers can tell apart, darkened for a white page and lightened for a dark
# one: each has the contrast of 3 to 1 that a mark needs to be seen.
LIGHT = ("#0072b2", "#c95500", "#008a64", "#a8557f", "#9c6f00", "#555e6b", "#7a5195")
DARK = ("#56b4e9", "#ff8c42", "#2fd0a0", "#e08bb5", "#e6b93c", "#aab4c0", "#b79ad6")


def _colours(colours: Sequence[str]) -> str:
    return "".join(f"--c{i}:{colour};" for i, colour in enumerate(colours))


_CLASSES = "".join(f"svg .c{i}{{fill:var(--c{i});stroke:var(--c{i})}}" for i in range(len(LIGHT)))


_STYLE = f"""
:root{{color-scheme:light dark;--ink:#1f2933;--muted:#55616e;--line:#d9dee3;--page:#f5f7f9;--card:#fff;--bad:#b3261e;
--link:#005a8f;{_colours(LIGHT)}}}
@media screen and (prefers-color-scheme:dark){{
:root{{--ink:#e6eaee;--muted:#a6b0ba;--line:#39434d;--page:#12171c;--card:#1a2128;
--bad:#ff9a8f;--link:#7cc4f0;{_colours(DARK)}}}}}
*{{box-sizing:border-box}}
body{{margin:0;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Helvetica,Arial,sans-serif}}
header,main{{max-width:1280px;margin:0 auto;padding:24px 16px 0;overflow-wrap:anywhere}}
main{{padding-bottom:64px}}
h1{{font-size:26px;line-height:1.2;margin:0 0 8px}}
h2{{font-size:19px;margin:0 0 10px}}
h3{{font-size:16px;margin:22px 0 8px}}
h4{{font-size:14px;margin:0 0 6px}}
p{{margin:0 0 10px;max-width:90ch}}
a{{color:var(--link)}}
:focus-visible{{outline:3px solid var(--link);outline-offset:2px}}
.skip{{position:absolute;left:-9999px}}
.skip:focus{{left:8px;top:8px;background:var(--card);padding:8px 12px;z-index:1}}
.hint{{color:var(--muted);font-size:13px}}
.warn,.lost{{color:var(--bad);font-weight:600}}
.warn{{border:2px solid var(--bad);border-radius:6px;padding:8px 12px}}
dl{{display:grid;grid-template-columns:max-content minmax(0,1fr);gap:2px 16px;margin:0 0 10px;font-size:14px}}
dt{{color:var(--muted)}}
dd{{margin:0}}
section{{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:16px;margin:0 0 16px}}
nav ul{{display:flex;flex-wrap:wrap;gap:4px 20px;margin:0 0 16px;padding:0;list-style:none}}
.plots{{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,580px),1fr));gap:20px}}
.plots>div{{min-width:0}}
.scroll{{overflow-x:auto;max-width:100%}}
table{{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums;overflow-wrap:normal}}
th,td{{text-align:left;padding:5px 10px;border-bottom:1px solid var(--line);vertical-align:top;white-space:nowrap}}
td.wide{{white-space:normal;min-width:240px;overflow-wrap:anywhere}}
th{{color:var(--muted);font-weight:600}}
tbody th{{color:var(--ink);font-weight:400}}
td.n,th.n{{text-align:right}}
tr:target{{outline:2px solid var(--link)}}
details{{margin:10px 0}}
summary{{cursor:pointer;padding:4px 0}}
svg{{display:block;width:100%;min-width:560px;max-width:760px;height:auto}}
svg text{{fill:var(--ink);font-size:12px}}
{_CLASSES}
svg .label{{paint-order:stroke;stroke:var(--card);stroke-width:4}}
svg .grid{{stroke:var(--line)}}
svg .roof{{stroke:var(--muted);fill:none;stroke-width:2}}
svg .dashed{{stroke-dasharray:6 4}}
svg .line{{fill:none;stroke-opacity:.45}}
svg .bar{{stroke-width:2;stroke-opacity:.6}}
svg .mark{{stroke-width:1.5}}
svg .hollow{{fill:var(--card)}}
@media print{{:root{{--page:#fff}}section{{border:0;padding:0}}svg,tr{{break-inside:avoid}}
h2,h3,h4{{break-after:avoid}}.scroll{{overflow:visible}}td,th{{white-space:normal}}svg{{min-width:0}}.skip,nav{{display:none}}}}
"""


@dataclass(frozen=True)
class Cell:
    """A cell of a table: its text, where it leads, and its class ("n" for numbers, "wide" for long text, "lost")."""

    text: str
    kind: str = ""
    to: str = ""


def document(title: str, header: str, main: str) -> str:
    """A page of the markup `header`, below its title, and `main`. It asks nobody for anything, and may not."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n"
        f'<body><a class="skip" href="#main">Skip to the results</a>\n'
        f"<header><h1>{escape(title)}</h1>\n{header}</header>\n"
        f'<main id="main" tabindex="-1">\n{main}</main></body></html>\n'
    )


def section(name: str, title: str, body: str) -> str:
    """A section that links lead to by `name`."""
    heading = f"{escape(name)}-title"
    return (
        f'<section id="{escape(name)}" aria-labelledby="{heading}"><h2 id="{heading}">{escape(title)}</h2>\n'
        f"{body}</section>\n"
    )


def heading(level: int, title: str) -> str:
    """A heading below that of a section."""
    return f"<h{level}>{escape(title)}</h{level}>\n"


def paragraph(text: str, kind: str = "") -> str:
    """Text; of the class `kind`."""
    return f"<p{_kind(kind)}>{escape(text)}</p>\n"


def facts(found: Sequence[tuple[str, str]]) -> str:
    """Names and what they stand for; those without a text are left out."""
    return "<dl>" + "".join(f"<dt>{escape(n)}</dt><dd>{escape(t)}</dd>" for n, t in found if t) + "</dl>\n"


def scroll(label: str, body: str) -> str:
    """`body` in a region that scrolls by itself where it is too wide, by keyboard too."""
    return f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}">{body}</div>\n'


def details(summary: str, body: str) -> str:
    """`body`, folded."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>\n"


def table(label: str, head: Sequence[Cell], rows: Sequence[tuple[str, Sequence[Cell]]]) -> str:
    """A table in a region that scrolls. `rows`: the name that links lead to, or "", and the cells, of which the first
    is the row's heading."""
    columns = "".join(f'<th scope="col"{_kind(cell.kind)}>{escape(cell.text)}</th>' for cell in head)
    lines = []
    for name, cells in rows:
        anchor = f' id="{escape(name)}"' if name else ""
        first, *rest = (_content(cell) for cell in cells)
        body = "".join(f"<td{_kind(cell.kind)}>{text}</td>" for cell, text in zip(cells[1:], rest, strict=True))
        lines.append(f'<tr{anchor}><th scope="row"{_kind(cells[0].kind)}>{first}</th>{body}</tr>\n')
    return scroll(label, f"<table><thead><tr>{columns}</tr></thead>\n<tbody>{''.join(lines)}</tbody></table>")


def _content(cell: Cell) -> str:
    return f'<a href="#{escape(cell.to)}">{escape(cell.text)}</a>' if cell.to else escape(cell.text)


def _kind(kind: str) -> str:
    return f' class="{escape(kind)}"' if kind else ""
