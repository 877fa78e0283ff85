"""The report of a run: a page, and the rows of each op as JSON beside it."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from . import page, table
from .case import Case
from .rows import Report, write_whole


class Folder:
    """`index.html` and `<op>.json` in a folder, whole and valid at any time of a run."""

    def __init__(self, path: Path, cases: Sequence[Case]) -> None:
        """`cases`: all that the run is to measure."""
        self.page = path / "index.html"
        self._planned = Counter(case.op for case in cases)
        self._saved: dict[str, tuple[int, bool]] = {}

    def save(self, report: Report) -> None:
        """Write what `report` has so far. NotWritten if that cannot be."""
        self._save_rows(report)
        self._save_page(report)

    def stopped(self, report: Report, case: Case, error: BaseException) -> None:
        """Write on the page that `case` ended the run; nothing if that cannot be, for `error` is what matters then."""
        what = f"{case.op}, {table.shape_text(case.shape)}, {case.dtype}, {case.mode}"
        reason = str(error) and f": {error}"
        with contextlib.suppress(OSError):
            self._save_page(report, f"{what}: {type(error).__name__}{reason}")

    def _save_rows(self, report: Report) -> None:
        for op, planned in self._planned.items():
            comparisons = [c for c in report.comparisons if c.op == op]
            state = (len(comparisons), len(comparisons) == planned)
            if self._saved.get(op) == state:
                continue
            part = replace(
                report,
                rows=[row for row in report.rows if row.op == op],
                comparisons=comparisons,
                missing=[missing for missing in report.missing if missing.op == op],
                complete=state[1],
            )
            part.save(self.page.parent / f"{op}.json")
            self._saved[op] = state

    def _save_page(self, report: Report, stopped: str = "") -> None:
        write_whole(self.page, page.render(report, self._planned, stopped))


def why_not(path: Path, others: Collection[str] = ()) -> str | None:
    """Why a report cannot go to `path`, a folder that is made, or None. It must not have rows of `others`: ops that the
    page would not be of."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return error.strerror or str(error)
    stale = [f"{op}.json" for op in others if (path / f"{op}.json").exists()]
    return f"it has {', '.join(stale)} of another run; give another folder" if stale else None
