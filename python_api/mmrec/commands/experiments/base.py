"""What an experiment is given, and what it finds: tables, charts, sentences; written as JSON, Markdown and HTML."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...files import write_atomic
from ..console import print_rows, say, write_json
from ..data import Data, load_data
from ..runs import REPORT, Source

if TYPE_CHECKING:
    from ...evaluation import Interval, Result, Split

__all__ = ["Chart", "Context", "Findings", "Table", "limit_users", "means", "pairs", "sentence"]


@dataclass(frozen=True)
class Table:
    """Rows of labels and values.

    Attributes:
        title: heading.
        labels: names of the columns of text.
        rows: ``{label: text, …, "values": {name: number, Interval or None}}``.
        hint: how to read it.
        signed: values are differences.
    """

    title: str
    labels: Sequence[str]
    rows: Sequence[Mapping[str, Any]]
    hint: str = ""
    signed: bool = False

    @property
    def columns(self) -> list[str]:
        """Names of the values, in order of appearance."""
        return list(dict.fromkeys(name for row in self.rows for name in row["values"]))

    def cells(self) -> list[list[str]]:
        """Every row as text."""
        return [
            [str(row.get(label, "")) for label in self.labels]
            + [self._show(row["values"].get(name)) for name in self.columns]
            for row in self.rows
        ]

    def _show(self, value: Any) -> str:
        from ...evaluation import Interval

        if value is None or value != value:
            return "–"
        if isinstance(value, Interval):
            form = "{:+.4f}" if self.signed else "{:.4f}"
            star = " *" if self.signed and value.excludes_zero else ""
            return f"{form.format(value.mean)} [{form.format(value.low)}, {form.format(value.high)}]{star}"
        return f"{value}" if isinstance(value, int) else f"{value:+.4f}" if self.signed else f"{value:.4f}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        rows = [{**row, "values": {name: _plain(value) for name, value in row["values"].items()}} for row in self.rows]
        return {"title": self.title, "labels": list(self.labels), "rows": rows}


@dataclass(frozen=True)
class Chart:
    """Lines: ``series[name] = [(x, y)]``."""

    title: str
    x_label: str
    series: Mapping[str, Sequence[tuple[float, float]]]


@dataclass(frozen=True)
class Findings:
    """What an experiment came to.

    Attributes:
        question: what it asked.
        tables, charts: the figures.
        sentences: what they say, and what they do not.
        facts: further JSON values that belong to the figures, such as sizes and settings.
        sections: of the report beside these, see `write_report`.
        protocol, split, split_rule: what the figures are of, where that is not the data's own split.
        seeds: those that decided the figures, where not all of the context's did.
    """

    question: str
    tables: Sequence[Table]
    sentences: Sequence[str]
    charts: Sequence[Chart] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    sections: Mapping[str, Any] = field(default_factory=dict)
    protocol: str | None = None
    split: str | None = None
    split_rule: str | None = None
    seeds: Sequence[int] | None = None


@dataclass(frozen=True)
class Context:
    """Where an experiment gets its data from and leaves its runs.

    Attributes:
        name: of the experiment.
        folder, layout: the data.
        out: folder for runs and reports.
        seeds: of trainings.
        settings: the experiment's own, an instance of its ``Settings``.
    """

    name: str
    folder: Path
    layout: str
    out: Path
    seeds: tuple[int, ...]
    settings: Any

    def load(self, protocol: str = "S", *, hold_out: float | None = None) -> Data:
        """The data under a protocol."""
        return load_data(self.folder, protocol, layout=self.layout, hold_out=hold_out)

    def source(self, protocol: str = "S", *, hold_out: float | None = None) -> Source:
        """The same, as runs remember it."""
        return Source(self.folder.absolute(), self.layout, protocol, 0, hold_out)

    def write(self, data: Data, found: Findings, started: float) -> dict[str, Any]:
        """Prints the findings and writes ``results.json``, ``results.md`` and ``report.html``; returns the first."""
        settings = dataclasses.asdict(self.settings)
        split = data.split
        content = {
            "command": f"experiment {self.name}", "question": found.question, "dataset": data.catalogue.name,
            "fingerprint": data.fingerprint, "protocol": found.protocol or split.protocol,
            "split": found.split or split.id, "split_rule": found.split_rule or split.origin,
            "seed": list(self.seeds if found.seeds is None else found.seeds), "settings": settings,
            "seconds": round(time.monotonic() - started, 1), "facts": dict(found.facts),
            "tables": [table.to_dict() for table in found.tables],
            "charts": [dataclasses.asdict(chart) for chart in found.charts], "findings": list(found.sentences),
        }  # fmt: skip
        for table in found.tables:
            print_rows([*table.labels, *table.columns], table.cells(), title=table.title, left=len(table.labels))
        for text in found.sentences:
            say(text)
        write_json(self.out / "results.json", content)
        write_atomic(self.out / "results.md", self._markdown(content, found).encode())
        self._write_report(content, found)
        say(f"tables: {self.out / 'results.md'}   report: {self.out / REPORT}")
        return content

    def _markdown(self, content: Mapping[str, Any], found: Findings) -> str:
        lines = [
            f"## {self.name}: {content['dataset']}, protocol {content['protocol']}", "", found.question, "",
            f"Fingerprint `{content['fingerprint'][:12]}`, {content['split_rule']}; seeds "
            f"{', '.join(map(str, content['seed']))}; {content['seconds']:.0f} s.",
        ]  # fmt: skip
        for table in found.tables:
            head = [*table.labels, *table.columns]
            lines += ["", f"{table.title}.{f' {table.hint}' if table.hint else ''}", "", f"| {' | '.join(head)} |"]
            lines += [f"|{'---|' * len(head)}", *(f"| {' | '.join(row)} |" for row in table.cells())]
        for text in found.sentences:
            lines += ["", text]
        return "\n".join(lines) + "\n"

    def _write_report(self, content: Mapping[str, Any], found: Findings) -> None:
        from ...evaluation import write_report

        page = {
            "title": f"{content['dataset']}: {self.name}",
            "subtitle": found.question,
            "fingerprint": content["fingerprint"][:12],
            "protocol": f"{content['protocol']}: {content['split_rule']}",
            "seeds": content["seed"],
            "findings": list(found.sentences),
            "tables": [
                {"title": t.title, "hint": t.hint, "labels": list(t.labels), "signed": t.signed, "rows": list(t.rows)}
                for t in found.tables
            ],
            "charts": [{"title": c.title, "x_label": c.x_label, "series": c.series} for c in found.charts],
            "config": {**content["settings"], **content["facts"], "data": str(self.folder)},
            **found.sections,
        }
        write_report(page, self.out / REPORT)


def limit_users(split: Split, most: int, *, seed: int = 0) -> Split:
    """The same split with so many test users at most, drawn by ``seed``: others keep their training and lose their
    targets. Figures on it compare with each other only: its ``id`` is another."""
    users = split.users("test")
    if len(users) <= most:
        return split
    import numpy as np

    keep = np.zeros(split.num_users, dtype=bool)
    keep[np.random.default_rng(seed).choice(users, most, replace=False)] = True
    test = split.test
    spans = zip(keep, test.offsets[:-1], test.offsets[1:], strict=True)
    test = type(test).from_lists([test.ids[a:b].tolist() if kept else [] for kept, a, b in spans])
    return dataclasses.replace(split, test=test, origin=f"{split.origin}; {most} test users (seed {seed})")


def sentence(name: str, other: str, metric: str, difference: Interval) -> str:
    """A paired difference in words: what these users and seeds can show, and what they cannot."""
    shown = f"{difference} in {metric}, {difference.users} users, {difference.seeds} seed(s)"
    if not difference.excludes_zero:
        return f"{name} and {other} are not told apart ({shown})."
    return f"{name} is {'above' if difference.mean > 0 else 'below'} {other} ({shown})."


def pairs(
    results: Mapping[str, Sequence[Result]], base: str, metrics: Sequence[str], *, row: str = "all"
) -> dict[str, dict[str, Interval]]:
    """Paired intervals of every other model minus ``base``, over users and seeds."""
    from ...evaluation import compare

    return {
        name: {metric: compare(list(found), list(results[base]), metric, row=row) for metric in metrics}
        for name, found in results.items()
        if name != base
    }


def means(
    results: Mapping[str, Sequence[Result]], metrics: Sequence[str], *, row: str = "all"
) -> dict[str, dict[str, Interval]]:
    """Each model's means with their intervals over users and seeds, where the group has anyone."""
    from ...evaluation import interval

    return {
        name: {metric: interval(list(found), metric, row=row) for metric in metrics}
        for name, found in results.items()
        if all(row in result.rows for result in found)
    }


def _plain(value: Any) -> Any:
    from ...evaluation import Interval

    if isinstance(value, Interval):
        return {"mean": value.mean, "low": value.low, "high": value.high, "users": value.users, "seeds": value.seeds}
    return None if value is None or value != value else value
