"""Hard prompts: an instruction, a history and what may help, as text or as a JSON object, within a budget of tokens."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

from .untrusted import broken_up, on_one_line, quoted, shortened

__all__ = ["BuiltPrompt", "Example", "HardPrompt", "Item"]

Item: TypeAlias = "str | Mapping[str, str]"
"""An item as the model reads it: its title, or its columns by name."""

_VERSION = 1
_PARTS = ("examples", "history", "context")


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
        given: dict[str, list[Any]] = {
            "examples": list(examples), "history": list(history)[-self.history :], "context": list(context),
        }  # fmt: skip
        kept = {part: list(entries) for part, entries in given.items()}
        while True:
            text = self._render(kept, special)
            tokens = None if count is None else count([text])[0]
            if budget is None or count is None or tokens is None or tokens <= budget:
                sizes = {part: len(entries) for part, entries in kept.items()}
                return BuiltPrompt(text, tokens, sizes, {part: len(given[part]) - size for part, size in sizes.items()})
            self._leave_out(kept, tokens - budget, count, special)

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

    def _leave_out(
        self, kept: dict[str, list[Any]], excess: int, count: Callable[[Sequence[str]], Sequence[int]],
        special: Sequence[str],
    ) -> None:  # fmt: skip
        """About as many entries as have `excess` tokens, at least one; ValueError where there is none."""
        for part in self.give_up:
            entries = kept[part]
            if not entries:
                continue
            place = 0 if part == "history" else -1
            costs = list(count([self._written(part, entry, special) for entry in entries]))
            while entries and excess > 0:
                excess -= max(costs.pop(place), 1)
                del entries[place]
            return
        raise ValueError(f"the prompt is {excess} tokens too long, and nothing of {self.give_up} is left to leave out")

    def _written(self, part: str, entry: Any, special: Sequence[str]) -> str:
        if self.format == "json":
            return on_one_line(self._shot(entry, special) if part == "examples" else self._facts(entry, special))
        return self._shown(entry, special) if part == "examples" else f"- {self._line(entry, special)}\n"

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
        return f"{asked}{self.candidate(example.item, special=special)} {example.answer}\n\n"

    def _shot(self, example: Example, special: Sequence[str]) -> dict[str, Any]:
        history = [self._facts(item, special) for item in list(example.history)[-self.history :]]
        return {"history": history, "item": self._facts(example.item, special), "answer": example.answer}

    def _columns(self, item: Mapping[str, str]) -> list[tuple[str, str]]:
        names = item if self.columns is None else [name for name in self.columns if name in item]
        return [(name, item[name]) for name in names]

    def _line(self, item: Item, special: Sequence[str]) -> str:
        if isinstance(item, str):
            return quoted(item, limit=self.value_chars, special=special)
        return "; ".join(
            f"{broken_up(' '.join(name.split()), special)}: {quoted(value, limit=self.value_chars, special=special)}"
            for name, value in self._columns(item)
        )

    def _facts(self, item: Item, special: Sequence[str]) -> Any:
        if isinstance(item, str):
            return self._cut(item, special)
        return {broken_up(name, special): self._cut(value, special) for name, value in self._columns(item)}

    def _cut(self, text: str, special: Sequence[str]) -> str:
        return broken_up(shortened(text, self.value_chars), special)
