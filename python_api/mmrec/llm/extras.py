"""Lazy access to the optional packages of the `mrs` extra, and quiet use of them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

# What transformers knows this package's attention and experts by, once they are registered.
KERNELS = "mmrec"


def require(module: str) -> ModuleType:
    """Import `module` on first use; raises ImportError that names the pip extra when it is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"mmrec.llm needs the package {error.name or module!r}, which is not installed: "
            "pip install mmrec-kernels[mrs]"
        ) from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silence transformers' load report and weight bar inside the block, restoring the caller's settings after it.

    The report warns about heads that an embedding model drops on purpose; what matters in it (weights that would be
    random) is checked from the loading info instead.
    """
    logging = require("transformers.utils.logging")
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


@contextmanager
def progress_bar(label: str, total: int, wanted: bool) -> Iterator[Any]:
    """Yield `advance(n)`: a bar on stderr if it is wanted and that is a terminal, else a function that does nothing."""
    if not wanted or not sys.stderr.isatty() or total == 0:
        yield lambda n: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(label), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield lambda n: bar.advance(task, n)
