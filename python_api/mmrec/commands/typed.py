"""``--set NAME=VALUE`` as values of the type that the defaults have."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["parse_settings"]


def parse_settings(entries: Sequence[str], known: Mapping[str, Any], owner: str) -> dict[str, Any]:
    """The values that were given, by name.

    Args:
        entries: ``NAME=VALUE`` each. VALUE is JSON, or text where that is wanted; several values for a tuple stand
            between commas.
        known: names with their defaults.
        owner: whose settings these are, for the message.

    Raises:
        ValueError: a name that is not known, or a value of another type than its default.
    """
    found: dict[str, Any] = {}
    for entry in entries:
        key, equals, text = entry.partition("=")
        if not equals or key not in known:
            names = ", ".join(sorted(known))
            raise ValueError(f"--set needs NAME=VALUE with one of {names} for {owner}, got {entry!r}")
        default = known[key]
        if isinstance(default, tuple):
            parts = text.removeprefix("[").removesuffix("]").split(",")
            found[key] = tuple(_typed(key, part.strip(), default[0]) for part in parts)
        else:
            found[key] = _typed(key, text, default)
    return found


def _typed(key: str, text: str, default: Any) -> Any:
    """``text`` as what ``default`` is; where that is None, text, null or a list of numbers."""
    if isinstance(default, str) and text:
        return text
    try:
        value = json.loads(text)
    except ValueError:
        value = text
    if default is None:
        numbers = isinstance(value, list) and all(type(entry) in (int, float) for entry in value)
        good = value is None or isinstance(value, str) and value or numbers
    elif isinstance(default, float):
        good = isinstance(value, int | float) and not isinstance(value, bool)
    else:
        good = type(value) is type(default) and not isinstance(default, str)
    if not good:
        raise ValueError(f"--set {key} cannot be {value!r}; its default is {json.dumps(default)}")
    return float(value) if isinstance(default, float) else value
