"""Results that are there already for the same question are not computed again."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import write_atomic

if TYPE_CHECKING:
    from ..evaluation import Result

__all__ = ["kept_result"]


def kept_result(path: Path, identity: Mapping[str, Any], compute: Callable[[], Result]) -> Result:
    """The result at ``path`` if it belongs to ``identity``, else what ``compute`` gives, which is then there.

    Args:
        path: of the result; what it belongs to is beside it, in ``<stem>.identity.json``.
        identity: JSON values: everything that decides the result.
    """
    from ..evaluation import Result

    told = path.with_name(f"{path.stem}.identity.json")
    wanted = json.loads(json.dumps(identity))
    if path.is_file() and told.is_file() and json.loads(told.read_text(encoding="utf-8")) == wanted:
        return Result.load(path)
    # Taken away first: a result that is being replaced belongs to nothing.
    told.unlink(missing_ok=True)
    result = compute()
    result.save(path)
    write_atomic(told, json.dumps(wanted).encode())
    return result
