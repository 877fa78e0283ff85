"""Texts to token ids, with slots among them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .slots import BoundSlots, Pieces, Slot

if TYPE_CHECKING:
    from .backbone import Backbone

__all__ = ["check_texts", "token_ids", "tokenize"]

_CHUNK = 4096
_WHOLE = 1 << 30  # tokens: nothing is cut


def token_ids(
    backbone: Backbone, texts: Sequence[Pieces], slots: BoundSlots | None, *, special: bool, most: int
) -> list[list[int]]:
    """Of each text, or of its pieces with negative ids for `slots`, at most `most`, with the tokenizer's special ones
    or without."""
    if slots is not None:
        slots.check_fits(backbone.input_width)
        return _tokenize_pieces(backbone, texts, slots, special=special, most=most)
    return tokenize(backbone, texts, special=special, most=most)  # type: ignore[arg-type]  # checked: they are strings


def tokenize(backbone: Backbone, texts: Sequence[str], *, special: bool, most: int | None = None) -> list[list[int]]:
    """Token ids of each text, at most `most` or `backbone.max_length`, with the tokenizer's special ones or without."""
    ids: list[list[int]] = []
    for start in range(0, len(texts), _CHUNK):
        batch = backbone.tokenizer(
            list(texts[start : start + _CHUNK]), truncation=True, max_length=most or backbone.max_length,
            padding=False, return_attention_mask=False, return_token_type_ids=False, add_special_tokens=special,
        )  # fmt: skip
        ids.extend(batch["input_ids"])
    return ids


def check_texts(texts: Sequence[Pieces], slots: BoundSlots | None = None) -> None:
    """Raises TypeError unless `texts` is a sequence of strings, or with `slots` of strings and of their pieces."""
    if isinstance(texts, str):
        raise TypeError("texts must be a sequence of str, got one str; write [text]")
    if not isinstance(slots, BoundSlots | None):
        raise TypeError(f"slots must be what `ModalitySlots.bind` gives, got {type(slots).__name__}")
    for i, text in enumerate(texts):
        if isinstance(text, str):
            continue
        pieces = isinstance(text, Sequence) and all(isinstance(piece, str | Slot) for piece in text)
        if not pieces:
            raise TypeError(f"texts[{i}] must be a str, got {type(text).__name__}")
        if slots is None:
            raise TypeError(f"texts[{i}] has pieces; give slots, which fill them")


def _tokenize_pieces(
    backbone: Backbone, texts: Sequence[Pieces], slots: BoundSlots, *, special: bool, most: int
) -> list[list[int]]:
    """Token ids of each text, negative ones for slots, at most `most`. Pieces are split into tokens one by one.

    Texts are cut on the side on which the tokenizer cuts.

    Raises:
        ValueError: a slot that does not exist, or that does not fit whole into `most` tokens.
    """
    strings = [text if isinstance(text, str) else "" for text in texts]
    found = tokenize(backbone, strings, special=special, most=most)
    begin, end = _special_ids(backbone) if special else ([], [])
    room = max(most - len(begin) - len(end), 0)
    written = [piece for text in texts if not isinstance(text, str) for piece in text if isinstance(piece, str)]
    words = iter(tokenize(backbone, written, special=False, most=_WHOLE))
    for n, text in enumerate(texts):
        if isinstance(text, str):
            continue
        ids: list[int] = []
        places: list[tuple[Slot, int, int]] = []
        for piece in text:
            if isinstance(piece, str):
                ids += next(words)
                continue
            own = slots.ids(piece, f"texts[{n}]")
            places.append((piece, len(ids), len(ids) + len(own)))
            ids += own
        first = max(len(ids) - room, 0) if backbone.tokenizer.truncation_side == "left" else 0
        for slot, start, stop in places:
            if start < first or stop > first + room:
                raise ValueError(
                    f"texts[{n}]: slot {slot.name!r} of row {slot.row} is not whole within the {most} tokens that are "
                    f"read; shorten what stands {'behind' if first else 'before'} it"
                )
        found[n] = begin + ids[first : first + room] + end
    return found


def _special_ids(backbone: Backbone) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and behind a text."""
    bare = tokenize(backbone, ["a"], special=False, most=_WHOLE)[0]
    whole = tokenize(backbone, ["a"], special=True, most=_WHOLE)[0]
    for place in range(len(whole) - len(bare) + 1):
        if whole[place : place + len(bare)] == bare:
            return whole[:place], whole[place + len(bare) :]
    raise ValueError("texts: this tokenizer puts special tokens into texts; slots need them around")
