"""Hard prompts: an instruction, a history and what may help, as text or as a JSON object, within a budget of tokens."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

from .untrusted import broken_up, on_one_line, quoted, shortened

__all__ = ["BuiltPrompt", "Example", "HardPrompt", "Item"]

Item: TypeAlias = "str | Mapping[str, Any]"
"""An item as the model reads it: its title, or its columns by name: text, numbers, lists of them; None is left out."""

_VERSION = 1
_PARTS = ("examples", "history", "context")
_PLAIN_NAME = re.compile(r"[\w][\w .-]{0,63}")


class Example(NamedTuple):
    """Somebody's history, an item, and the answer that is right: a shot for in-context learning."""

    history: Sequence[Item]
    item: Item
    answer: str


class BuiltPrompt(NamedTuple):
    """`text`; how many `tokens` it has, or None where nobody counted; and per part how many entries were `kept` and how
    many did not fit (`dropped`)."""

    text: str
    tokens: int | None
    kept: dict[str, int]
    dropped: dict[str, int]


@dataclass(frozen=True)
class HardPrompt:
    """What a model reads for a user, once, and then for each candidate.

    Text of items is escaped and quoted (`quoted`); only the template's own words begin lines. As "json" the prompt is
    one JSON object on a line, of `schema`.

    Args:
        intro, question, ask: before the history, behind it, and behind the candidate.
        format: "text" or "json".
        columns: of items that are mappings, these, in this order, where they have them; None: all.
        history: how many last items are read.
        value_chars: longest text of an item's column.
        context_intro: before the context, in text.
        give_up: what is left out where not everything fits, the first one first: history from its oldest item, examples
            and context from their last. Parts that are not named stay.
    """

    intro: str = "Someone chose these items, one after another:"
    question: str = "Will this person choose the following item next? Answer Yes or No."
    ask: str = "Answer:"
    format: Literal["text", "json"] = "text"
    columns: tuple[str, ...] | None = None
    history: int = 20
    value_chars: int = 200
    context_intro: str = "Related items:"
    give_up: tuple[str, ...] = ("context", "examples", "history")

    def __post_init__(self) -> None:
        if self.format not in ("text", "json"):
            raise ValueError(f"format must be 'text' or 'json', got {self.format!r}")
        if self.history < 1:
            raise ValueError(f"history must be at least 1, got {self.history}")
        if self.value_chars < 2:
            raise ValueError(f"value_chars must be at least 2, got {self.value_chars}")
        for name in ("columns", "give_up"):
            if isinstance(getattr(self, name), str):
                raise TypeError(f"{name} must be a tuple of names, got {getattr(self, name)!r}")
        if set(self.give_up) - set(_PARTS) or len(set(self.give_up)) != len(self.give_up):
            raise ValueError(f"give_up must be distinct parts of {_PARTS}, got {self.give_up}")

    def key(self) -> str:
        """A string that changes whenever a prompt may change: part of every cache key."""
        return json.dumps({"version": _VERSION, **dataclasses.asdict(self)}, sort_keys=True)

    def build(
        self, history: Sequence[Item], *, examples: Sequence[Example] = (), context: Sequence[Item] = (),
        budget: int | None = None, count: Callable[[Sequence[str]], Sequence[int]] | None = None,
        special: Sequence[str] = (),
    ) -> BuiltPrompt:  # fmt: skip
        """The prompt of one user.

        Args:
            history: items, oldest first.
            examples: shots, before the user's own history.
            context: items that may help, such as neighbours from the item store.
            budget: most tokens; needs `count`, which gives the tokens of each of some texts as the model will read
                them.
            special: tokens that no text of an item may contain whole, see `broken_up`.

        Raises:
            ValueError: what may not be left out does not fit.
        """
        if budget is not None and count is None:
            raise ValueError("budget needs count, which counts tokens")
        for name, entries in (("history", history), ("context", context)):
            if isinstance(entries, str):
                raise TypeError(f"{name} must be a sequence of items, got one str; write [item]")
        given: dict[str, list[Any]] = {
            "examples": list(examples), "history": list(history)[-self.history :], "context": list(context),
        }  # fmt: skip
        sizes = {part: len(entries) for part, entries in given.items()}

        def written() -> str:
            history = given["history"][len(given["history"]) - sizes["history"] :]
            kept = {part: given[part][: sizes[part]] for part in ("examples", "context")}
            return self._render({**kept, "history": history}, special)

        if budget is not None and count is not None:
            for part in self.give_up:
                if count([written()])[0] <= budget:
                    break
                # The most entries that fit: fewer than there are, perhaps none.
                fits, too_many = 0, sizes[part]
                while too_many - fits > 1:
                    sizes[part] = (fits + too_many) // 2
                    if count([written()])[0] <= budget:
                        fits = sizes[part]
                    else:
                        too_many = sizes[part]
                sizes[part] = fits
        text = written()
        tokens = None if count is None else count([text])[0]
        if budget is not None and tokens is not None and tokens > budget:
            raise ValueError(
                f"the prompt is {tokens - budget} tokens too long, and nothing of {self.give_up} is left to leave out"
            )
        return BuiltPrompt(text, tokens, dict(sizes), {part: len(given[part]) - size for part, size in sizes.items()})

    def candidate(self, item: Item, *, special: Sequence[str] = ()) -> str:
        """What the model reads for an item, behind the prompt."""
        if self.format == "json":
            return f"{on_one_line({'item': self._facts(item, special)})}\n{self.ask}"
        return f"Item: {self._line(item, special)}\n{self.ask}"

    @property
    def schema(self) -> dict[str, Any]:
        """JSON Schema of a prompt's object in the "json" format."""
        item = {"anyOf": [{"type": "string"}, {"type": "object", "additionalProperties": {"type": "string"}}]}
        items = {"type": "array", "items": item}
        shot = {
            "type": "object", "properties": {"history": items, "item": item, "answer": {"type": "string"}},
            "required": ["history", "item", "answer"], "additionalProperties": False,
        }  # fmt: skip
        return {
            "type": "object",
            "properties": {
                "task": {"type": "string"}, "examples": {"type": "array", "items": shot}, "history": items,
                "context": items, "question": {"type": "string"},
            },
            "required": ["task", "history", "question"], "additionalProperties": False,
        }  # fmt: skip

    def _render(self, kept: Mapping[str, list[Any]], special: Sequence[str]) -> str:
        if self.format == "json":
            content: dict[str, Any] = {"task": self.intro}
            if kept["examples"]:
                content["examples"] = [self._shot(example, special) for example in kept["examples"]]
            content["history"] = [self._facts(item, special) for item in kept["history"]]
            if kept["context"]:
                content["context"] = [self._facts(item, special) for item in kept["context"]]
            return on_one_line({**content, "question": self.question}) + "\n"
        shots = "".join(self._shown(example, special) for example in kept["examples"])
        return shots + self._asked(kept["history"], kept["context"], special)

    def _asked(self, history: Sequence[Item], context: Sequence[Item], special: Sequence[str]) -> str:
        lines = [self.intro, *(f"- {self._line(item, special)}" for item in history)]
        if context:
            lines += [self.context_intro, *(f"- {self._line(item, special)}" for item in context)]
        return "\n".join([*lines, self.question, ""])

    def _shown(self, example: Example, special: Sequence[str]) -> str:
        """A shot in text: what would be asked, and its answer."""
        asked = self._asked(list(example.history)[-self.history :], (), special)
        return f"{asked}{self.candidate(example.item, special=special)} {_plain(example.answer, special)}\n\n"

    def _shot(self, example: Example, special: Sequence[str]) -> dict[str, Any]:
        history = [self._facts(item, special) for item in list(example.history)[-self.history :]]
        return {
            "history": history,
            "item": self._facts(example.item, special),
            "answer": _plain(example.answer, special),
        }

    def _columns(self, item: Mapping[str, Any]) -> list[tuple[str, str]]:
        names = item if self.columns is None else [name for name in self.columns if name in item]
        return [(name, _value(item[name])) for name in names if item[name] is not None]

    def _line(self, item: Item, special: Sequence[str]) -> str:
        if isinstance(item, str):
            return quoted(item, limit=self.value_chars, special=special)
        pieces = []
        for name, value in self._columns(item):
            shown = broken_up(name, special) if _PLAIN_NAME.fullmatch(name) else quoted(name, limit=64, special=special)
            pieces.append(f"{shown}: {quoted(value, limit=self.value_chars, special=special)}")
        return "; ".join(pieces)

    def _facts(self, item: Item, special: Sequence[str]) -> Any:
        if isinstance(item, str):
            return self._cut(item, special)
        return {broken_up(name, special): self._cut(value, special) for name, value in self._columns(item)}

    def _cut(self, text: str, special: Sequence[str]) -> str:
        return broken_up(shortened(text, self.value_chars), special)


def _value(value: Any) -> str:
    """A column's value as text."""
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_value, value))
    return str(value)


def _plain(answer: str, special: Sequence[str]) -> str:
    """An answer, which stands unquoted: on its line, and no token with a meaning."""
    return broken_up(" ".join(answer.split()), special)
