"""What all commands share: output, JSON files, warnings and errors as one line."""

from __future__ import annotations

import errno
import json
import logging
import math
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "FAILED",
    "INTERRUPTED",
    "Interrupted",
    "console",
    "one_line_warnings",
    "print_rows",
    "say",
    "status",
    "summary",
    "write_json",
]

FAILED, INTERRUPTED = 1, 130

_EXPECTED = (ValueError, TypeError, OSError, ImportError)


class Interrupted(Exception):
    """Ctrl-C, with what was saved; the command-line library would drop a KeyboardInterrupt's message."""


def console(*, stderr: bool = False) -> Console:
    """A rich console; where the output is no terminal, lines are as long as they need to be."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else 200, highlight=False)


def say(text: str) -> None:
    """Prints plain text: ids and titles may hold brackets, which are no markup."""
    console().print(text, markup=False, soft_wrap=True)


@contextmanager
def status(text: str) -> Iterator[None]:
    """A spinner on stderr while something without a progress bar runs; silent where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.markup import escape

    with console(stderr=True).status(escape(text)):
        yield


def print_rows(header: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "", left: int = 1) -> None:
    """A table; the first ``left`` columns are text, the others numbers."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE, title=Text(title) if title else None, title_justify="left")
    for i, name in enumerate(header):
        table.add_column(Text(name), justify="left" if i < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console().print(table)


def write_json(path: Path | None, content: Mapping[str, Any]) -> None:
    """Writes ``content`` to ``path`` in one step (None: not at all); NaN and infinity become null."""
    if path is None:
        return
    from ..files import write_atomic

    text = json.dumps(_plain(content), indent=2, ensure_ascii=False, allow_nan=False)
    try:
        write_atomic(path, (text + "\n").encode())
    except OSError as error:
        raise OSError(error.errno, f"not written, {error.strerror or error}", str(path)) from error


def summary(error: BaseException) -> str:
    """What went wrong in one line, for stderr."""
    if isinstance(error, OSError) and error.errno is not None:
        return _system_error(error)
    text = " ".join(str(error).split())
    if isinstance(error, _EXPECTED) and text:
        return text
    kind = type(error).__name__
    return f"internal error, {kind}: {text}" if text else f"internal error, {kind}"


class _Lines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        record.lower = record.levelname.lower()
        return super().format(record)


@contextmanager
def one_line_warnings(debug: bool) -> Iterator[None]:
    """Warnings of this package as one line each on stderr; those of other packages only with ``debug``."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        print(f"mmrec: warning: {' '.join(str(message).split())}", file=sys.stderr)

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines("mmrec: %(lower)s: %(message)s"))
    logger = logging.getLogger("mmrec")
    propagate = logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        with warnings.catch_warnings():
            if not debug:
                warnings.simplefilter("ignore")
                warnings.filterwarnings("default", module=r"mmrec(\.|_kernels|$)")
                warnings.showwarning = show
            yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate


def _system_error(error: OSError) -> str:
    reason = error.strerror or errno.errorcode.get(error.errno or 0, "input/output error")
    where = "" if error.filename is None else f"{error.filename}: "
    return " ".join(f"{where}{reason}".split())


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if hasattr(value, "item") and not hasattr(value, "__len__"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
