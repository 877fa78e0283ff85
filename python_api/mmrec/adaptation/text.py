"""Items as text: title, free text, and table columns written as "column: value unit"."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import CatalogueError

if TYPE_CHECKING:
    from .catalogue import Catalogue
    from .schema import TableSchema

_VERSION = 1
_YEAR = re.compile(r"\s*\((?:19|20)\d{2}\)\s*$")
_ARTICLE = re.compile(r"^(?P<rest>.+), (?P<article>The|A|An|La|Le|Les|L'|Il|El|Los|Las|Der|Die|Das|Un|Une)$")


@dataclass(frozen=True)
class TextTemplate:
    """How one table row becomes text.

    Attributes:
        columns: which columns, in this order; None is the title, the other text columns, then categorical, multi and
            numeric ones in the schema's order.
        labels: what to write for a column's name; by default the name with blanks for underscores. Text columns are
            written without one.
        missing: what stands for a missing value (written as "column: missing"); None leaves the column out.
        separator: between pieces.
        max_values: how many values of a multi-valued column are written; None is all.
        mask_title: leave the title out and write ``title_mask`` where the other texts name it (against memorised
            titles).
        title_mask: see ``mask_title``.
    """

    columns: tuple[str, ...] | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    missing: str | None = None
    separator: str = "\n"
    max_values: int | None = 8
    mask_title: bool = False
    title_mask: str = "[title]"

    def key(self) -> str:
        """A string that changes whenever the text may change: part of every cache key."""
        return json.dumps({"version": _VERSION, **asdict(self)}, sort_keys=True)


_PRESETS = ("full", "title", "text", "table", "masked")


def _template(value: TextTemplate | str, schema: TableSchema) -> TextTemplate:
    if isinstance(value, TextTemplate):
        return value
    table = schema.categorical + schema.multi + schema.numeric
    if value == "full":
        return TextTemplate()
    if value == "masked":
        return TextTemplate(mask_title=True)
    if value == "title":
        return TextTemplate(columns=(schema.title,) if schema.title else ())
    if value == "text":
        return TextTemplate(columns=_title_first(schema))
    if value == "table":
        return TextTemplate(columns=table)
    raise CatalogueError(f"template {value!r} is unknown; give a TextTemplate or one of {', '.join(_PRESETS)}")


def _title_first(schema: TableSchema) -> tuple[str, ...]:
    title = (schema.title,) if schema.title else ()
    return title + tuple(column for column in schema.text if column != schema.title)


def item_texts(
    catalogue: Catalogue, *, template: TextTemplate | str = "full", max_chars: int | None = None
) -> tuple[list[str], np.ndarray]:
    """One text per item.

    Args:
        catalogue: its ``items`` and ``schema`` are read.
        template: a :class:`TextTemplate`, or ``full``, ``title``, ``text`` (title and free text), ``table`` (the
            columns only), ``masked`` (``full`` with the title masked).
        max_chars: longest text; free text other than the title is shortened first, the last one first, at a blank, so
            that the table's facts stay; only then is the whole cut.

    Returns:
        ``(texts, mask)``: I strings and bool ``[I]``; where the mask is False nothing is known and the text is empty.

    Raises:
        CatalogueError: the template names a column without a role, or an unknown preset.
    """
    if max_chars is not None and max_chars < 1:
        raise CatalogueError(f"max_chars needs a positive number or None, got {max_chars}")
    schema = catalogue.schema
    template = _template(template, schema)
    columns = template.columns
    if columns is None:
        columns = _title_first(schema) + schema.categorical + schema.multi + schema.numeric
    _check_columns(columns, schema)
    titles = catalogue.items[schema.title].to_list() if schema.title else [None] * catalogue.num_items
    values = {column: catalogue.items[column].to_list() for column in columns}
    texts, mask = [], np.zeros(catalogue.num_items, dtype=bool)
    for row, title in enumerate(titles):
        pieces = [
            (schema.role(column) == "text" and column != schema.title, piece)
            for column in columns
            if (piece := _piece(column, values[column][row], title, schema, template)) is not None
        ]
        mask[row] = any(
            values[column][row] is not None and not (template.mask_title and column == schema.title)
            for column in columns
        )
        texts.append(_join(pieces, template.separator, max_chars) if mask[row] else "")
    return texts, mask


def _check_columns(columns: Sequence[str], schema: TableSchema) -> None:
    for column in columns:
        if schema.role(column) in (None, "image"):
            usable = schema.text + schema.categorical + schema.multi + schema.numeric
            raise CatalogueError(f"template: column {column!r} cannot be written as text; columns are {list(usable)}")


def _piece(column: str, value: Any, title: str | None, schema: TableSchema, template: TextTemplate) -> str | None:
    if column == schema.title and template.mask_title:
        return None
    role = schema.role(column)
    if value is None:
        if template.missing is None:
            return None
        written = template.missing
    elif role == "numeric":
        unit = schema.units.get(column)
        written = f"{value:.6g}" if abs(value) < 1e6 and value != int(value) else f"{value:.0f}"
        written += f" {unit}" if unit else ""
    elif role == "multi":
        written = ", ".join(value[: template.max_values])
    else:
        written = value
    if template.mask_title and title and value is not None:
        written = mask_title(written, title, template.title_mask)
    if role == "text" and value is not None:
        return written
    return f"{template.labels.get(column, column.replace('_', ' '))}: {written}"


def _join(pieces: list[tuple[bool, str]], separator: str, max_chars: int | None) -> str:
    text = separator.join(piece for _, piece in pieces)
    if max_chars is None or len(text) <= max_chars:
        return text
    kept = list(pieces)
    for i in reversed(range(len(kept))):
        excess = len(separator.join(piece for _, piece in kept)) - max_chars
        shortenable, piece = kept[i]
        if shortenable and excess > 0:
            kept[i] = (True, _cut(piece, max(0, len(piece) - excess)))
    return _cut(separator.join(piece for _, piece in kept if piece), max_chars)


def _cut(text: str, length: int) -> str:
    """At most ``length`` characters, ending at a blank where there is one in the latter half."""
    if len(text) <= length:
        return text
    blank = text.rfind(" ", 0, length + 1)
    return text[: blank if blank > length // 2 else length].rstrip()


def mask_title(text: str, title: str, replacement: str = "[title]") -> str:
    """``text`` with every mention of ``title`` replaced.

    Also matched: the title without its "(year)", with a trailing article moved to the front ("Mask, The" → "The Mask"),
    without that article, and the part before a colon. Names of several words match in any case, single words only as
    they are spelt or in capitals, so that the film "Big" does not blank the word "big".
    """
    for name in _title_forms(title):
        flags = re.IGNORECASE if len(name.split()) > 1 else 0
        spellings = {name, name.upper()}
        pattern = "|".join(re.escape(spelling) for spelling in sorted(spellings))
        text = re.sub(rf"(?<!\w)(?:{pattern})(?!\w)", lambda _: replacement, text, flags=flags)
    return text


def _title_forms(title: str) -> list[str]:
    """The ways in which a title may be written, longest first."""
    base = _YEAR.sub("", title).strip()
    forms = {title.strip(), base}
    if match := _ARTICLE.match(base):
        article, rest = match["article"], match["rest"]
        forms |= {rest, f"{article}{rest}" if article.endswith("'") else f"{article} {rest}"}
    forms |= {form.partition(":")[0].strip() for form in tuple(forms) if ":" in form}
    return sorted((form for form in forms if len(form) > 1), key=lambda form: (-len(form), form))
