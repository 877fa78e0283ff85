"""Two runs beside each other: what became slower or faster, and whether that can be told at all.

A ratio is the new median over the old one. It is marked where neither median lies between p20 and p80 of the other run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import markup, page, table
from .markup import Cell
from .rows import Missing, NotAReport, Report, Row, load

_HEADER = ("provider", "old ms", "p20 – p80", "new ms", "p20 – p80", "new / old", "")
_MACHINE = ("cpu", "cpus", "caches", "isa", "threads", "system")
# Of a GPU only what stays: its clocks are those of a moment.
_MOMENT = ("clocks.sm", "clocks.mem")


@dataclass(frozen=True)
class Measured:
    """One case of a run: its rows by provider, what is missing by provider, and the report that it is of."""

    report: Report
    rows: dict[str, Row]
    missing: dict[str, Missing]


@dataclass
class Side:
    """One run: the reports of a folder, or of one file. `left_out`: JSON files of the folder that are no reports."""

    path: Path
    reports: list[Report]
    left_out: list[str]
    cases: dict[tuple[Any, ...], Measured]


def read(path: Path) -> Side:
    """The reports at `path`.

    Raises:
        OSError: a file cannot be read.
        ValueError: there is no such file or folder, a file is no JSON, there is no report, or a case is in two of them.
    """
    if not path.exists():
        raise ValueError(f"there is no {path}")
    reports: dict[str, Report] = {}
    left_out = []
    for file in sorted(path.glob("*.json")) if path.is_dir() else [path]:
        try:
            reports[file.name] = load(file)
        except NotAReport:
            if file == path:
                raise
            left_out.append(file.name)
    if not reports:
        raise ValueError(f"{path} has no report: no <op>.json that mmrec_kernels.benchmarks wrote")
    cases: dict[tuple[Any, ...], Measured] = {}
    of: dict[tuple[Any, ...], str] = {}
    for name, report in reports.items():
        rows: list[Row | Missing] = [*report.rows, *report.missing]
        for row in rows:
            key = page.key(row)
            if of.setdefault(key, name) != name:
                raise ValueError(f"{path}: {of[key]} and {name} both have {_title(key)}")
            found = cases.setdefault(key, Measured(report, {}, {}))
            if isinstance(row, Row):
                found.rows[row.provider] = row
            else:
                found.missing[row.provider] = row
    return Side(path, list(reports.values()), left_out, {key: case for key, case in cases.items() if case.rows})


@dataclass(frozen=True)
class Pair:
    """A provider's rows on one case, old and new."""

    old: Row
    new: Row

    @property
    def ratio(self) -> float:
        """The new median over the old."""
        return self.new.median_ms / self.old.median_ms

    @property
    def verdict(self) -> str:
        """Whether it is "slower" or "faster"; nothing where a median lies between p20 and p80 of the other run."""
        old, new = self.old, self.new
        if old.p20_ms <= new.median_ms <= old.p80_ms or new.p20_ms <= old.median_ms <= new.p80_ms:
            return ""
        return "slower" if new.median_ms > old.median_ms else "faster"


def pairs(old: Side, new: Side) -> dict[tuple[Any, ...], dict[str, Pair]]:
    """By case and provider, all that both have measured."""
    found: dict[tuple[Any, ...], dict[str, Pair]] = {}
    for key, case in old.cases.items():
        if key in new.cases:
            rows = new.cases[key].rows
            found[key] = {name: Pair(row, rows[name]) for name, row in case.rows.items() if name in rows}
    return found


def differences(old: Side, new: Side) -> list[str]:
    """What is different about two runs beside the code that is compared: machine, threads, versions."""
    found: dict[str, None] = {}
    for key, rows in pairs(old, new).items():
        if rows:
            a, b = (_conditions(side.cases[key], rows) for side in (old, new))
            for name in a | b:
                if a.get(name) != b.get(name):
                    found[f"{name}: {a.get(name, 'none')} → {b.get(name, 'none')}"] = None
    return list(found)


def notes(old: Side, new: Side) -> list[str]:
    """What else a reader of the ratios has to know."""
    found = []
    before, after = (sorted({_ours(report) for report in side.reports}) for side in (old, new))
    if before != after:
        found.append(f"mmrec_kernels {', '.join(before)} → {', '.join(after)}")
    for side in (old, new):
        found += [f"{side.path} is incomplete"] if not all(report.complete for report in side.reports) else []
        found += sorted({f"{side.path}: {note}" for note in map(table.busy, side.reports) if note})
        found += [f"{side.path}: {', '.join(side.left_out)} left out, no report"] if side.left_out else []
    return list(dict.fromkeys(found))


def _ours(report: Report) -> str:
    return str(report.environment.get("versions", {}).get("mmrec_kernels", "of an unknown version"))


def _conditions(case: Measured, providers: Iterable[str]) -> dict[str, str]:
    env = case.report.environment
    found: dict[str, str] = {name: str(env[name]) for name in _MACHINE if name in env}
    found |= {f"gpu {name}": str(value) for name, value in env.get("gpu", {}).items() if name not in _MOMENT}
    found |= {f"library {name}": str(value) for name, value in env.get("libraries", {}).items()}
    versions = dict(env.get("versions", {}))
    for name in providers:
        versions |= case.rows[name].versions
    return found | {f"version of {name}": str(v) for name, v in versions.items() if name != "mmrec_kernels"}


def text(old: Side, new: Side) -> str:
    """The comparison as text."""
    lines = [f"{name}: {side.path}  {_when(side)}" for name, side in (("old", old), ("new", new))]
    found = differences(old, new)
    if found:
        lines += [_NOT_COMPARABLE, *(f"  {difference}" for difference in found)]
    lines += [f"note: {note}" for note in notes(old, new)]
    for key, rows in pairs(old, new).items():
        lines += ["", _title(key)]
        if rows:
            lines += [line.rstrip() for line in table.aligned([_HEADER, *(_cells(n, p) for n, p in rows.items())])]
        lines += [f"  {note}" for note in _one_sided(old.cases[key], new.cases[key])]
    for name, side, other in (("old", old, new), ("new", new, old)):
        only = [_title(key) for key in side.cases if key not in other.cases]
        lines += ["", f"only in {name}:", *(f"  {title}" for title in only)] if only else []
    return "\n".join([*lines, "", summary(old, new)])


def summary(old: Side, new: Side) -> str:
    """How many rows became slower and faster."""
    found = [pair.verdict for rows in pairs(old, new).values() for pair in rows.values()]
    cases = len(pairs(old, new))
    return (
        f"{len(found)} rows of {cases} cases are in both: {found.count('slower')} slower, "
        f"{found.count('faster')} faster, {found.count('')} within p20 – p80"
    )


def html(old: Side, new: Side) -> str:
    """The comparison as a page."""
    header = markup.facts([("old", f"{old.path}, {_when(old)}"), ("new", f"{new.path}, {_when(new)}")])
    if found := differences(old, new):
        header += markup.paragraph(" ".join([_NOT_COMPARABLE, "; ".join(found)]), "warn")
    header += "".join(markup.paragraph(f"Note: {note}.") for note in notes(old, new))
    header += markup.paragraph(summary(old, new))
    head = (Cell("case"), *(Cell(name, "n" if i else "") for i, name in enumerate((*_HEADER[:-1], "verdict"))))
    lines = []
    for key, rows in pairs(old, new).items():
        for name, pair in rows.items():
            provider, *numbers, verdict = _cells(name, pair)
            mark = Cell(verdict, "n lost" if verdict == "slower" else "n")
            lines.append(("", [Cell(_title(key)), Cell(provider), *(Cell(n, "n") for n in numbers), mark]))
    body = markup.section("ratios", "New median over old", markup.table("Ratios", head, lines))
    alone = [(_title(key), note) for key in pairs(old, new) for note in _one_sided(old.cases[key], new.cases[key])]
    for name, side, other in (("old", old, new), ("new", new, old)):
        alone += [(_title(key), f"only in {name}") for key in side.cases if key not in other.cases]
    if alone:
        rest = [("", [Cell(title), Cell(what, "wide")]) for title, what in alone]
        title = "On one side only"
        body += markup.section("alone", title, markup.table(title, (Cell("case"), Cell("what")), rest))
    return markup.document("Two runs of mmrec-kernels' benchmarks", header, body)


_NOT_COMPARABLE = "NOT COMPARABLE: the runs differ in more than the code, and so may their times:"


def _one_sided(old: Measured, new: Measured) -> Iterator[str]:
    for name, side, other in (("old", old, new), ("new", new, old)):
        for provider in side.rows:
            if provider not in other.rows:
                missing = other.missing.get(provider)
                yield f"only in {name}: {provider}" + (f" ({missing.reason})" if missing else "")


def _cells(provider: str, pair: Pair) -> tuple[str, ...]:
    sides = [cell for row in (pair.old, pair.new) for cell in table.cells(row, 1.0, 1.0)[1:3]]
    return (provider, *sides, f"{pair.ratio:.3g}", pair.verdict)


def _title(key: Sequence[Any]) -> str:
    op, shape, *rest = key
    return "  ".join([op, table.shape_text(dict(shape)), *rest])


def _when(side: Side) -> str:
    return ", ".join(sorted({str(report.environment.get("date", "at an unknown time")) for report in side.reports}))
