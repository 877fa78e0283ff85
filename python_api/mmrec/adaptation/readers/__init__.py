"""Readers, one module per layout. Each has ``LOOKS_FOR`` (what it recognises, in words), ``detect(folder)`` and
``read(folder)``.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import CatalogueError

if TYPE_CHECKING:
    from ..catalogue import Catalogue

LAYOUTS = ("folder", "movielens", "lcrec", "p5", "mmrec", "recbole", "amazon")


def read(folder: Path, layout: str = "auto") -> Catalogue:
    """Reads ``folder`` with the reader called ``layout``, or with the only one that recognises it."""
    if layout != "auto" and layout not in LAYOUTS:
        raise CatalogueError(f"layout {layout!r} is unknown; known are auto, {', '.join(LAYOUTS)}")
    if not folder.exists():
        raise CatalogueError(f"{folder}: no such folder")
    if not folder.is_dir():
        raise CatalogueError(f"{folder}: not a folder; a catalogue is a folder of files")
    modules = {name: import_module(f".{name}", __name__) for name in LAYOUTS}
    if layout == "auto":
        layout = _detect(folder, modules)
    elif not modules[layout].detect(folder):
        raise CatalogueError(f"{folder}: not in layout {layout}, which needs {modules[layout].LOOKS_FOR}")
    try:
        return modules[layout].read(folder)
    except OSError as error:
        raise CatalogueError(f"{error.filename or folder}: {error.strerror or error}") from error


def _detect(folder: Path, modules: dict) -> str:
    fitting = [name for name, module in modules.items() if module.detect(folder)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise CatalogueError(f"{folder}: fits several layouts ({', '.join(fitting)}); say which with layout=")
    found = sorted(entry.name for entry in folder.iterdir())[:8]
    wanted = "; ".join(f"{name}: {module.LOOKS_FOR}" for name, module in modules.items())
    raise CatalogueError(f"{folder}: no known layout. Looked for {wanted}. Found {', '.join(found) or 'nothing'}")
