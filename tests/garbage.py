"""Damage to files, drawn by hypothesis, and a machine that has little memory."""

from __future__ import annotations

import contextlib
import json
import mmap
import re
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

# What nobody expects as a value of a JSON file; the last two are text that only a parser sees.
_JUNK = ["null", "true", "[]", "{}", '""', '"x"', '"²"', '"../../x"', '"\\u0000"', "-1", "0", "2.5", "NaN", "1e999",
         "9223372036854775808", "1" + "0" * 400, '[[1, [2, {"a": null}]]]', "1" * 5000,
         "[" * 50_000 + "]" * 50_000]  # fmt: skip


@st.composite
def damaged(draw: Any, content: bytes) -> bytes:
    """`content` cut off, with bytes changed, taken out, put in or doubled."""
    at = draw(st.integers(0, max(len(content) - 1, 0)))
    how = draw(st.sampled_from(["cut", "flip", "byte", "insert", "remove", "double", "digits", "empty"]))
    some = draw(st.integers(1, 40))
    if how == "flip":
        return (
            content[:at] + bytes([content[at] ^ 1 << draw(st.integers(0, 7))]) + content[at + 1 :] if content else b"?"
        )
    if how == "digits":  # a number that is there becomes a huge one
        huge = draw(st.sampled_from([b"9" * 30, b"4" * 5000, b"-1", b"1e400", b"nan", b"987654321012"]))
        return content[:at] + re.sub(rb"\d+", huge, content[at:], count=1)
    made = {"cut": b"", "byte": draw(st.binary(min_size=1, max_size=1)) + content[at + 1 :],
            "insert": draw(st.binary(min_size=1, max_size=some)) + content[at:], "remove": content[at + some :],
            "double": content[max(at - some, 0) :], "empty": None}[how]  # fmt: skip
    return b"" if made is None else content[:at] + made


@st.composite
def damaged_json(draw: Any, content: bytes) -> bytes:
    """The same for JSON, one value a line or one in all: a value is one that nobody expects, or gone; or as above."""
    if draw(st.integers(0, 3)) == 0:
        return draw(damaged(content))
    mark = "\ue000"
    try:
        values = [json.loads(content)]
    except ValueError:
        values = [json.loads(line) for line in content.splitlines() if line.strip()]
    places: list[tuple[Any, Any]] = [(values, n) for n in range(len(values))]
    for holder, key in places:  # grows
        value = holder[key]
        if isinstance(value, dict | list) and len(places) < 400:
            places += [(value, k) for k in (value if isinstance(value, dict) else range(len(value)))]
    holder, key = draw(st.sampled_from(places))
    if isinstance(holder, dict) and draw(st.integers(0, 3)) == 0:
        del holder[key]
    else:
        holder[key] = mark
    lines = [json.dumps(value, ensure_ascii=False) for value in values]
    return "\n".join(lines).replace(f'"{mark}"', draw(st.sampled_from(_JUNK))).encode()


@contextlib.contextmanager
def address_space(more: int) -> Iterator[None]:
    """Asking for more than `more` further bytes is a MemoryError, as on a machine that does not have them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
    resource.setrlimit(resource.RLIMIT_AS, (now + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
