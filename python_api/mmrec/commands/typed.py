"""``--set NAME=VALUE`` as values of the type that the defaults have."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["parse_settings", "typed"]


def parse_settings(entries: Sequence[str], known: Mapping[str, Any], owner: str) -> dict[str, Any]:
    """The values that were given, by name.

    Args:
        entries: ``NAME=VALUE`` each; VALUE is JSON, or text where that cannot be read.
        known: names with their defaults.
        owner: whose settings these are, for the message.

    Raises:
        ValueError: a name that is not known, or a value of another type than its default.
    """
    found: dict[str, Any] = {}
    for entry in entries:
        key, equals, text = entry.partition("=")
        if not equals or key not in known:
            raise ValueError(
                f"--set needs NAME=VALUE with one of {', '.join(sorted(known))} for {owner}, got {entry!r}"
            )
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        found[key] = typed(key, value, known[key])
    return found


def typed(key: str, value: Any, default: Any) -> Any:
    """``value`` as what ``default`` is: a tuple takes a list, or one value, of entries of its kind."""
    if isinstance(default, tuple):
        entries = value if isinstance(value, list) else value.split(",") if isinstance(value, str) else [value]
        kind = default[0] if default else ""
        if not entries:
            raise ValueError(f"--set {key} needs at least one value")
        return tuple(typed(key, entry, kind) for entry in entries)
    if default is None:
        good = value is None or isinstance(value, str)
    elif isinstance(default, float):
        good = isinstance(value, int | float) and not isinstance(value, bool)
    else:
        good = type(value) is type(default)
    if not good:
        raise ValueError(f"--set {key} cannot be {value!r}; its default is {json.dumps(default)}")
    return float(value) if isinstance(default, float) else value
