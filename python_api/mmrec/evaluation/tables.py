"""Results side by side on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .intervals import Interval
from .results import Result

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["format_table", "print_table"]


def print_table(
    results: Sequence[Result],
    metrics: Sequence[str] = ("HR@10", "NDCG@10", "Recall@20"),
    *,
    rows: Sequence[str] | None = None,
    differences: dict[str, Interval] | None = None,
    console: Console | None = None,
) -> None:
    """Prints :func:`format_table`'s content, with rich where it is installed."""
    try:
        from rich import box
        from rich.console import Console as RichConsole
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        print(format_table(results, metrics, rows=rows, differences=differences))
        return
    header, body = _cells(results, metrics, rows, differences)
    table = Table(box=box.SIMPLE, title=Text(_title(results)), title_justify="left")
    for i, name in enumerate(header):
        table.add_column(Text(name), justify="left" if i < 2 else "right")
    for line in body:
        table.add_row(*map(Text, line))
    (console or RichConsole()).print(table)


def format_table(
    results: Sequence[Result],
    metrics: Sequence[str] = ("HR@10", "NDCG@10", "Recall@20"),
    *,
    rows: Sequence[str] | None = None,
    differences: dict[str, Interval] | None = None,
) -> str:
    """Plain text, one line per model and group of users.

    Args:
        results: of one split; the title names protocol, mask and data.
        metrics: columns.
        rows: groups to show, None for all that a result has.
        differences: per model name, an interval shown in the last column.
    """
    header, body = _cells(results, metrics, rows, differences)
    widths = [max(len(line[i]) for line in [header, *body]) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in [header, ["-" * width for width in widths], *body]
    ]
    return "\n".join([_title(results), *(line.rstrip() for line in lines)])


def _title(results: Sequence[Result]) -> str:
    if not results:
        raise ValueError("results must not be empty")
    settings = {(r.dataset, r.fingerprint[:12], r.protocol, r.split, r.stage, r.mask) for r in results}
    if len(settings) > 1:
        raise ValueError(f"results of different data, splits or masks do not belong in one table: {sorted(settings)}")
    first = results[0]
    return (
        f"{first.dataset} ({first.fingerprint[:12]}), protocol {first.protocol}, {first.stage}, "
        f"all items ranked, masked: {first.mask}"
    )


def _cells(
    results: Sequence[Result],
    metrics: Sequence[str],
    rows: Sequence[str] | None,
    differences: dict[str, Interval] | None,
) -> tuple[list[str], list[list[str]]]:
    header = ["model", "group", "users", *metrics]
    if differences:
        header.append("difference, 95 %" if _level(differences) == 0.95 else "difference")
    body = []
    for result in results:
        name = result.model if result.seed is None else f"{result.model}, seed {result.seed}"
        for group in result.rows if rows is None else rows:
            if group not in result.rows:
                continue
            row = result.rows[group]
            means = row.metrics
            if absent := [metric for metric in metrics if metric not in means]:
                raise ValueError(f"{result.model!r} has no {absent}; it has {list(means)}")
            line = [name, group, str(len(row.users)), *(f"{means[metric]:.4f}" for metric in metrics)]
            if differences:
                shown = differences.get(result.model) if group == "all" else None
                line.append("" if shown is None else str(shown))
            body.append(line)
    return header, body


def _level(differences: dict[str, Interval]) -> float | None:
    levels = {entry.level for entry in differences.values()}
    return levels.pop() if len(levels) == 1 else None
