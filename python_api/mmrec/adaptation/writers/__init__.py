"""Writers, one module per layout, as for the readers. Each has ``write(catalogue, folder, …)``.

A layout holds less than a catalogue. What it has no place for is left out and listed with the reason; what it holds in
another form is listed with the rule: see :class:`Export`. The package's own layout holds everything and is written by
``Catalogue.save``.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CatalogueError
from ._export import Export

if TYPE_CHECKING:
    from ..catalogue import Catalogue

__all__ = ["LAYOUTS", "Export", "write"]

LAYOUTS = ("mmrec", "recbole", "p5", "lcrec")


def write(catalogue: Catalogue, folder: str | Path, layout: str, *, overwrite: bool = False, **options: Any) -> Export:
    """Writes ``catalogue`` to ``folder`` in another toolbox's layout.

    Every file is whole or not there, and those by which a reader knows the layout come last: an interrupted export into
    a new folder is not taken for a catalogue.

    Args:
        layout: ``mmrec``, ``recbole``, ``p5`` or ``lcrec``.
        overwrite: write into a folder that holds files, and replace those of the same names.
        options: what the layout's writer takes beside: ``labels`` (mmrec), ``attributes`` (p5), ``facts`` and ``index``
            (lcrec).

    Raises:
        CatalogueError: an unknown layout; a catalogue without interactions or with ids that the layout cannot hold; a
            folder with files, or, with ``overwrite``, with files that the reader would mix with the new ones.
        TypeError: an option that the layout's writer does not take.
    """
    if layout not in LAYOUTS:
        raise CatalogueError(f"layout {layout!r} cannot be written; layout needs one of {', '.join(LAYOUTS)}")
    return import_module(f".{layout}", __name__).write(catalogue, Path(folder), overwrite=overwrite, **options)
