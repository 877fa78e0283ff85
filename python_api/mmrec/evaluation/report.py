"""One run as one HTML file: figures beside their floors, curves, modalities, experts, settings. No outside resource."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..files import write_atomic
from .charts import frontier_chart, interval_chart, line_chart, share_chart
from .intervals import Interval
from .results import Result, interval

__all__ = ["group_rows", "metric_rows", "write_report"]

_SECTIONS = (
    "title", "subtitle", "fingerprint", "protocol", "seeds", "command", "findings", "tables", "charts", "metrics",
    "differences", "slices", "curves", "modalities", "dominance", "missing", "experts", "frontier", "latency",
    "config", "notes",
)  # fmt: skip

_STYLE = """
:root{--ink:#1f2933;--muted:#66727f;--line:#e4e8ec;--accent:#0072b2;--page:#f5f7f9}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
  font:15px/1.5 system-ui,-apple-system,"Segoe UI",Helvetica,Arial,sans-serif}
main{max-width:1080px;margin:0 auto;padding:32px 20px 64px}
h1{font-size:28px;line-height:1.2;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:18px;margin:0 0 12px}
h3{font-size:14px;font-weight:600;margin:0 0 6px;overflow-wrap:anywhere}
p{margin:0 0 12px}
.lead,.hint,.nothing{color:var(--muted)}
.hint{font-size:13px;max-width:78ch}
.facts{display:flex;flex-wrap:wrap;gap:8px;margin:14px 0 24px;padding:0;list-style:none}
.facts li{background:#fff;border:1px solid var(--line);border-radius:6px;padding:3px 10px;font-size:13px;
  overflow-wrap:anywhere}
.facts b{color:var(--muted);font-weight:500;margin-right:6px}
section{background:#fff;border:1px solid var(--line);border-radius:10px;padding:20px 22px;margin:0 0 18px}
.grid{display:grid;grid-template-columns:1fr 1fr;gap:22px 32px}
.scroll+.grid{margin-top:26px}
@media(max-width:820px){.grid{grid-template-columns:1fr}}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:14px;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:7px 12px;border-bottom:1px solid var(--line);vertical-align:top}
th{color:var(--muted);font-weight:500;white-space:nowrap}
td.n,th.n{text-align:right;white-space:nowrap}
tr:last-child td{border-bottom:0}
tr.floor td{color:var(--muted)}
td.best{font-weight:700}
td small{display:block;color:var(--muted);font-weight:400}
.tag{font-size:11px;border:1px solid var(--line);border-radius:4px;padding:0 5px;margin-left:7px;color:var(--muted)}
code{font:13px/1.5 ui-monospace,SFMono-Regular,Consolas,monospace}
pre{margin:0;overflow-x:auto;background:var(--page);border-radius:6px;padding:12px}
td code{white-space:pre-wrap;overflow-wrap:anywhere}
svg{width:100%;max-width:640px;height:auto;display:block}
@media print{body{background:#fff}section{break-inside:avoid}}
"""


def metric_rows(
    models: Mapping[str, Result | Sequence[Result]], metrics: Sequence[str], *, floors: Iterable[str] = ()
) -> list[dict[str, Any]]:
    """Rows for ``run["metrics"]``: each model's mean with its 95 % bootstrap interval, over users and seeds.

    Args:
        models: one result, or one per seed, under the name to print.
        metrics: columns.
        floors: names among ``models`` to print in grey as floors.
    """
    grey = set(floors)
    if unknown := grey - set(models):
        raise ValueError(f"floors {sorted(unknown)} are not among the models {sorted(models)}")
    return [
        {"model": name, "floor": name in grey, "values": {metric: interval(results, metric) for metric in metrics}}
        for name, results in models.items()
    ]


def group_rows(models: Mapping[str, Result], metrics: Sequence[str]) -> list[dict[str, Any]]:
    """Rows for ``run["slices"]``: every group that a result has, such as "cold-among-all"."""
    return [
        {"model": name, "group": group, "users": len(row.users), "values": {m: row.metrics[m] for m in metrics}}
        for name, result in models.items()
        for group, row in result.rows.items()
    ]


def write_report(run: Mapping[str, Any], path: str | os.PathLike[str]) -> Path:
    """Writes a self-contained page; everything but the title may be left out. All text is escaped.

    Args:
        run: plain values under these keys (another key is an error):

            - "title", "subtitle", "protocol", "fingerprint", "command": text; "seeds": list; "notes": list of text;
            - "findings": list of text, shown first;
            - "tables": ``[{"title", "hint", "labels": [column of text], "signed": bool, "rows"}]``, rows as in
              "metrics" with a text per label; "charts": ``[{"title", "x_label", "series": {name: [(x, y)]}}]``;
            - "metrics": ``[{"model", "floor": bool, "values": {name: number | (mean, low, high) | Interval}}]``,
              see :func:`metric_rows`; "differences": the same, of ours minus another;
            - "slices": ``[{"model", "group", "users", "values"}]``, see :func:`group_rows`;
            - "curves": ``{name: [(step, value)]}``, or ``{name: {series: [(step, value)]}}`` for lines in one chart;
            - "modalities": attention mass ``{name: mass}``, or ``{group: {name: mass}}`` for one bar per group;
            - "dominance": ``{modality: {"drop", "only", "noise", "index"}}``;
            - "missing": ``{curve: [(rate, value)]}``;
            - "experts": ``{modality: [share of each expert]}``; "config": a mapping, nested or not;
            - "frontier": ``{"quality": metric, "rows": […]}`` and "latency": rows, as `mmrec latency` has them.
        path: the file, replaced atomically.
    """
    if unknown := sorted(set(run) - set(_SECTIONS)):
        raise ValueError(f"run has unknown keys {unknown}; known are {list(_SECTIONS)}")
    if not run.get("title"):
        raise ValueError("run needs a 'title'")
    title = escape(str(run["title"]))
    subtitle = f'<p class="lead">{escape(str(run["subtitle"]))}</p>' if run.get("subtitle") else ""
    body = "".join(_sections(run))
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style></head>\n"
        f"<body><main><h1>{title}</h1>{subtitle}{_facts(run)}\n{body}</main></body></html>\n"
    )
    path = Path(path)
    write_atomic(path, page.encode())
    return path


def _sections(run: Mapping[str, Any]) -> Iterable[str]:
    if findings := run.get("findings"):
        yield _section("Findings", "".join(f"<p>{escape(str(text))}</p>" for text in findings))
    for table in run.get("tables", ()):
        rows = table["rows"]
        body = _value_table(rows, _columns(rows), table["labels"], signed=bool(table.get("signed")))
        yield _section(table["title"], body, table.get("hint", ""))
    if charts := run.get("charts"):
        drawn = [(c["title"], line_chart(c["series"], x_label=c["x_label"], title=c["title"])) for c in charts]
        yield _section("Charts", _grid(drawn))
    if rows := run.get("metrics"):
        names = _columns(rows)
        charts = [(name, interval_chart(_bars(rows, name), title=name)) for name in names[:4]]
        hint = (
            "Mean over users; in small print the 95 % bootstrap interval where there is one. Grey rows are floors that "
            "need no training; the dashed line is the best of them."
        )
        yield _section("Metrics", _value_table(rows, names, ("model",), mark_best=True) + _grid(charts), hint)
    if rows := run.get("differences"):
        hint = "Paired: the same users (and seeds) in both. An interval without 0 is a difference these data can show."
        yield _section("Differences", _value_table(rows, _columns(rows), ("model",), signed=True), hint)
    if rows := run.get("slices"):
        hint = "Cold items have no training interaction; head, middle and tail each hold a third of the interactions."
        yield _section("Groups", _value_table(rows, _columns(rows), ("model", "group", "users")), hint)
    if curves := run.get("curves"):
        drawn = [(name, line_chart(_series(name, points), title=name)) for name, points in curves.items()]
        yield _section("Training", _grid(drawn))
    if masses := run.get("modalities"):
        grouped = masses if all(isinstance(v, Mapping) for v in masses.values()) else {"all items": masses}
        hint = "Share of the attention that each modality receives."
        yield _section("Attention mass per modality", share_chart(grouped, title="attention mass"), hint)
    if table := run.get("dominance"):
        hint = (
            "drop: what is lost without the modality; only: the metric with it alone; noise: what is lost when its "
            "content is permuted across items; index: its part of all drops."
        )
        rows = [{"modality": name, "values": values} for name, values in table.items()]
        yield _section("Dependence on each modality", _value_table(rows, _columns(rows), ("modality",)), hint)
    if curves := run.get("missing"):
        hint = "The metric when this share of the content is taken away, on top of what the data lack already."
        yield _section("Missing content", _grid([("", line_chart(curves, x_label="share taken away"))]), hint)
    if experts := run.get("experts"):
        shares = {name: {f"expert {i}": v for i, v in enumerate(values)} for name, values in experts.items()}
        many = max(len(values) for values in experts.values()) > 16
        yield _section("Expert utilisation", share_chart(shares, title="expert utilisation", legend=not many))
    if frontier := run.get("frontier"):
        yield _frontier(frontier["quality"], frontier["rows"])
    if stages := run.get("latency"):
        hint = "Milliseconds of a call that answers so many histories; first: the first call after opening the store."
        rows = [{**row, "values": {f"{q} ms": row[f"{q}_ms"] for q in ("p50", "p95", "p99")}} for row in stages]
        rows = [{**row, "values": {**row["values"], "first ms": row["cold_ms"]}} for row in rows]
        labels = ("stage", "items", "dtype", "batch", "threads", "calls")
        yield _section("Latency by stage", _value_table(rows, _columns(rows), labels), hint)
    if config := run.get("config"):
        yield _section("Configuration", _config_table(config))
    if run.get("command"):
        yield _section("Command", f"<pre><code>{escape(str(run['command']))}</code></pre>")
    if notes := run.get("notes"):
        yield _section("Notes", "".join(f"<p>{escape(str(note))}</p>" for note in notes))


def _frontier(quality: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """What each way to answer is worth and takes: a chart of those without reranking, and a table of all."""
    hint = (
        "Single requests. A filled dot: no other way is as good and as fast. Ranking again takes far longer and is in "
        "the table only, for as many users as it says; in small print the 95 % bootstrap interval over users."
    )
    drawn: dict[str, list[tuple[float, float, bool]]] = {}
    for row in rows:
        if not row["rerank"]:
            point = (row["p50_ms"], row["metrics"][quality][0], row["frontier"])
            drawn.setdefault(f"{row['model']}, {row['dtype']}", []).append(point)
    chart = frontier_chart(drawn, x_label="p50, milliseconds", title=f"{quality} against latency")
    table = [
        {
            **row, "frontier": "yes" if row["frontier"] else "", "reranked": row["rerank"] or "",
            "values": {**{f"{q} ms": row[f"{q}_ms"] for q in ("p50", "p95", "p99")}, **row["metrics"]},
        }
        for row in rows
    ]  # fmt: skip
    labels = ("model", "dtype", "depth", "reranked", "users", "frontier")
    body = _grid([(f"{quality} against milliseconds", chart)]) + _value_table(table, _columns(table), labels)
    return _section("Quality against latency", body, hint)


def _section(title: str, body: str, hint: str = "") -> str:
    small = f'<p class="hint">{escape(hint)}</p>' if hint else ""
    return f"<section><h2>{escape(title)}</h2>{small}{body}</section>\n"


def _grid(charts: Sequence[tuple[str, str]]) -> str:
    cells = [f"<div>{f'<h3>{escape(name)}</h3>' if name else ''}{chart}</div>" for name, chart in charts]
    return f'<div class="grid">{"".join(cells)}</div>'


def _facts(run: Mapping[str, Any]) -> str:
    facts = {"protocol": run.get("protocol"), "data": run.get("fingerprint")}
    if run.get("seeds"):
        facts["seeds" if len(run["seeds"]) > 1 else "seed"] = ", ".join(map(str, run["seeds"]))
    shown = [f"<li><b>{name}</b>{escape(str(value))}</li>" for name, value in facts.items() if value]
    return f'<ul class="facts">{"".join(shown)}</ul>' if shown else ""


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row["values"]))


def _triple(value: Any) -> tuple[float, float | None, float | None]:
    if isinstance(value, Interval):
        return value.mean, value.low, value.high
    if isinstance(value, Sequence) and len(value) == 3:
        return float(value[0]), float(value[1]), float(value[2])
    return (math.nan if value is None else float(value)), None, None


def _bars(rows: Sequence[Mapping[str, Any]], name: str) -> list[tuple[str, float, float | None, float | None, bool]]:
    return [
        (str(row["model"]), *_triple(row["values"][name]), bool(row.get("floor")))
        for row in rows
        if name in row["values"]
    ]


def _value_table(
    rows: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    labels: Sequence[str],
    *,
    mark_best: bool = False,
    signed: bool = False,
) -> str:
    labels = [label for label in labels if any(label in row for row in rows)]
    form = "{:+.4f}" if signed else "{:.4f}"
    forms = {name: "{:.2f}" if name.endswith(" ms") else form for name in names}
    best: dict[str, float] = {}
    for name in names if mark_best and len(rows) > 1 else ():
        values = [v for row in rows if math.isfinite(v := _triple(row["values"].get(name))[0])]
        best |= {name: max(values)} if values else {}
    head = "".join(f"<th>{escape(label)}</th>" for label in labels)
    head += "".join(f'<th class="n">{escape(name)}</th>' for name in names)
    lines = []
    for row in rows:
        cells = [f"<td>{escape(str(row.get(label, '')))}" for label in labels]
        cells[0] += '<span class="tag">floor</span>' if row.get("floor") else ""
        for name in names:
            mean, low, high = _triple(row["values"].get(name))
            form = forms[name]
            text = form.format(mean) if math.isfinite(mean) else "–"
            if low is not None and high is not None:
                text += f"<small>{form.format(low)} … {form.format(high)}</small>"
            cells.append(f'<td class="n{" best" if best.get(name) == mean else ""}">{text}')
        lines.append(f"<tr{' class=floor' if row.get('floor') else ''}>{'</td>'.join(cells)}</td></tr>")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _series(name: str, points: Any) -> Mapping[str, Sequence[tuple[float, float]]]:
    return points if isinstance(points, Mapping) else {name: points}


def _config_table(config: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td><code>{escape(value)}</code></td></tr>" for name, value in _flat(config, "")
    )
    return f'<div class="scroll"><table>{rows}</table></div>'


def _flat(config: Mapping[str, Any], prefix: str) -> Iterable[tuple[str, str]]:
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
            yield f"{prefix}{name}", text
