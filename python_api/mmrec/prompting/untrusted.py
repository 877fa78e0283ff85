"""Text of items is anybody's: it must not end the line it stands on, nor be read as a token that has a meaning."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

__all__ = ["broken_up", "on_one_line", "quoted", "shortened", "special_tokens"]


def quoted(text: str, *, limit: int | None = None, special: Sequence[str] = ()) -> str:
    """`text` as a JSON string, on one line: line breaks and quotes in it are escaped, so it ends where it is seen to.

    Args:
        text: of an item.
        limit: see `shortened`.
        special: see `broken_up`.
    """
    return on_one_line(broken_up(text if limit is None else shortened(text, limit), special))


def shortened(text: str, limit: int) -> str:
    """At most `limit` characters, the last of which is "…" where the text is longer."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def on_one_line(content: Any) -> str:
    """JSON without anything that a model may read as the end of a line, or that no tokenizer takes: JSON leaves some
    separators, and halves of surrogate pairs, as they are."""
    written = json.dumps(content, ensure_ascii=False)
    return "".join(
        f"\\u{ord(c):04x}" if c in "\x7f\x85\u2028\u2029" or "\ud800" <= c <= "\udfff" else c for c in written
    )


def broken_up(text: str, special: Sequence[str]) -> str:
    """`text` in which no token of `special` is whole: each has a blank behind its first visible character, as in
    "< |end|>". Tokens of one visible character stay.

    Args:
        text: of an item.
        special: tokens with a meaning of their own, such as a tokenizer's `all_special_tokens`.
    """
    tokens = [token for token in special if len(token.strip()) > 1]
    while True:
        found = [token for token in tokens if token in text]
        if not found:
            return text
        for token in found:
            place = len(token) - len(token.lstrip()) + 1
            text = text.replace(token, f"{token[:place]} {token[place:]}")


def special_tokens(tokenizer: Any) -> list[str]:
    """The tokens of a Hugging Face tokenizer that have a meaning of their own and that it finds in any text."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    return sorted({*tokenizer.all_special_tokens, *(token.content for token in added if token.special)})
