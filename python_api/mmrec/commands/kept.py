"""Results that are there already for the same question are not computed again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import parse_json, write_atomic

if TYPE_CHECKING:
    from ..evaluation import Result

__all__ = ["kept_result", "read_kept"]


def read_kept(path: Path) -> Any:
    """The JSON value at ``path``; None where there is none, or none that can be read: it is then made anew."""
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def kept_result(path: Path, identity: Mapping[str, Any], compute: Callable[[], Result]) -> Result:
    """The result at ``path`` if it belongs to ``identity``, else what ``compute`` gives, which is then there.

    Args:
        path: of the result; what it belongs to is beside it, in ``<stem>.identity.json``.
        identity: JSON values: everything that decides the result.
    """
    from ..evaluation import Result

    told = path.with_name(f"{path.stem}.identity.json")
    wanted = json.loads(json.dumps(identity))
    if path.is_file() and read_kept(told) == wanted:
        return Result.load(path)
    # Taken away first: a result that is being replaced belongs to nothing.
    told.unlink(missing_ok=True)
    result = compute()
    result.save(path)
    write_atomic(told, json.dumps(wanted).encode())
    return result
