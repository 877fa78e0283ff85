"""Histories as text that is kept up to date: a state, and new items, to a new state."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from .errors import CatalogueError

if TYPE_CHECKING:
    from .catalogue import Catalogue

__all__ = ["HistoryState", "HistorySummary"]

_VERSION = 1
_FORGOTTEN = 1e-6  # a value that weighs less is no part of the state, which so does not grow for ever
_SHOWN = 0.05  # nor is one named that has less than this share


@dataclass(frozen=True)
class HistoryState:
    """What a summary knows of a history, instead of the history itself.

    Attributes:
        items: how many there were.
        weight: of all items, each of which counts half as much after every `half_life` items that follow.
        values: column → value → weight of the items that had it.
        numbers: column → (weight, weighted sum, least, greatest).
        titles: of the last items, oldest first.
    """

    items: int = 0
    weight: float = 0.0
    values: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    numbers: Mapping[str, tuple[float, float, float, float]] = field(default_factory=dict)
    titles: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        plain = asdict(self)
        return {**plain, "numbers": {name: list(n) for name, n in self.numbers.items()}, "titles": list(self.titles)}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> HistoryState:
        """The inverse of `to_dict`."""
        numbers = {name: (float(a), float(b), float(c), float(d)) for name, (a, b, c, d) in value["numbers"].items()}
        return cls(value["items"], value["weight"], value["values"], numbers, tuple(value["titles"]))


class HistorySummary:
    """Summaries by counting: what columns of the items say most often, lately more than long ago, and the last titles.

    The recurrent form of MLLM-MSR's summaries (Ye et al., 2024, arXiv:2408.09698): `update(state, new)` costs the new
    items only, and updating in parts gives the same state, to the bit, as updating at once.

    Args:
        catalogue: whose items histories are made of; its categorical, multi and numeric columns are read.
        half_life: items after which one counts half as much; None: all count alike.
        most: values of a column that the text names.
        last: titles that the text names.
    """

    def __init__(
        self, catalogue: Catalogue, *, half_life: float | None = 20.0, most: int = 3, last: int = 3
    ) -> None:  # fmt: skip
        if half_life is not None and not half_life > 0:
            raise ValueError(f"half_life must be above 0 or None, got {half_life}")
        if most < 1 or last < 0:
            raise ValueError(f"most must be at least 1 and last at least 0, got {most} and {last}")
        schema = catalogue.schema
        self.units = dict(schema.units)
        self.most, self.last = most, last
        self._fade = 1.0 if half_life is None else 0.5 ** (1 / half_life)
        self._num_items = catalogue.num_items
        self._lists = {name: catalogue.items[name].to_list() for name in schema.categorical + schema.multi}
        self._numbers = {name: catalogue.items[name].to_list() for name in schema.numeric}
        self._titles: list[str | None] = [None] * catalogue.num_items
        if schema.title:
            self._titles = catalogue.items[schema.title].to_list()
        self.context = {
            "summary": "counts", "version": str(_VERSION), "half_life": str(half_life), "most": str(most),
            "last": str(last), "columns": json.dumps([schema.title, *self._lists, *self._numbers]),
            "units": json.dumps(self.units, sort_keys=True),
        }  # fmt: skip

    def update(self, state: HistoryState | None, items: Sequence[int]) -> HistoryState:
        """The state after the history went on with `items`, rows of the catalogue, oldest first."""
        state = HistoryState() if state is None else state
        weight, titles = state.weight, list(state.titles)
        values = {name: dict(counts) for name, counts in state.values.items()}
        numbers = dict(state.numbers)
        for row in items:
            if not 0 <= row < self._num_items:
                raise CatalogueError(f"items: there is no row {row}, the catalogue has {self._num_items} items")
            weight = weight * self._fade + 1
            for name, column in self._lists.items():
                faded = ((value, count * self._fade) for value, count in values.get(name, {}).items())
                counts = {value: count for value, count in faded if count >= _FORGOTTEN}
                found = column[row]
                for value in dict.fromkeys([found] if isinstance(found, str) else found or ()):
                    counts[value] = counts.get(value, 0.0) + 1
                values[name] = counts
            for name, column in self._numbers.items():
                total, sum_, least, greatest = numbers.get(name, (0.0, 0.0, math.inf, -math.inf))
                total, sum_ = total * self._fade, sum_ * self._fade
                value = column[row]
                if value is not None:
                    total, sum_ = total + 1, sum_ + value
                    least, greatest = min(least, value), max(greatest, value)
                if total >= _FORGOTTEN:
                    numbers[name] = (total, sum_, least, greatest)
                else:
                    numbers.pop(name, None)
            title = self._titles[row]
            if title is not None:
                titles.append(title)
        # Not titles[-0:], which would be all of them.
        kept = tuple(titles[len(titles) - self.last :] if len(titles) > self.last else titles)
        return HistoryState(state.items + len(items), weight, values, numbers, kept)

    def text(self, state: HistoryState) -> str:
        """The state in words, empty for an empty history."""
        if not state.items:
            return ""
        lines = [f"{state.items} item{'s' if state.items > 1 else ''} so far."]
        for name, counts in state.values.items():
            top = sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))[: self.most]
            shares = [(_one_line(value), count / state.weight) for value, count in top]
            shown = [f"{value} ({share:.0%})" for value, share in shares if share >= _SHOWN]
            if shown:
                lines.append(f"{name.replace('_', ' ')}: {', '.join(shown)}.")
        for name, (total, sum_, least, greatest) in state.numbers.items():
            if total / state.weight >= _SHOWN:
                unit = f" {self.units[name]}" if name in self.units else ""
                spread = f", {least:.6g} to {greatest:.6g}" if least < greatest else ""
                lines.append(f"{name.replace('_', ' ')}: about {sum_ / total:.4g}{unit}{spread}.")
        if state.titles:
            lines.append(f"lately: {'; '.join(map(_one_line, state.titles))}.")
        return "\n".join(lines)


def _one_line(text: str) -> str:
    return " ".join(text.split())
