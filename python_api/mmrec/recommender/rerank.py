"""Ranking the best items again with a causal language model that reads the user's history once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..llm.scorer import YesNoScorer

__all__ = ["LLMReranker"]

_HISTORY, _TITLE = 20, 200


class LLMReranker:
    """Ranks items by how much rather a causal language model says "Yes" than "No" to them, see `YesNoScorer`.

    What the model reads: `intro`, the last titles of the history, one per line, and `question`; then, for each
    candidate on its own, its title and `ask`. Titles are written as JSON strings, so that one cannot end its line, and
    cut to 200 characters. Of the history the oldest titles are left out, if all do not fit into the backbone's
    `max_length`.

    Args:
        scorer: of a causal backbone.
        history: how many last titles are read.
        intro, question, ask: of the prompt.

    Attributes:
        name: the backbone's.
    """

    def __init__(
        self,
        scorer: YesNoScorer,
        *,
        history: int = _HISTORY,
        intro: str = "Someone chose these items, one after another:",
        question: str = "Will this person choose the following item next? Answer Yes or No.",
        ask: str = "Answer:",
    ) -> None:
        if history < 1:
            raise ValueError(f"history must be at least 1, got {history}")
        self.scorer = scorer
        self.history = history
        self.intro, self.question, self.ask = intro, question, ask
        self.name = scorer.backbone.name
        most = scorer.backbone.max_length
        self._room = most - self._tokens([self.prompt([])], special=True)[0]
        if self._room < 0 or self._tokens([self.candidate("")])[0] > most:
            raise ValueError(f"intro, question and ask do not fit into the {most} tokens of {self.name}")

    def prompt(self, titles: Sequence[str]) -> str:
        """What the model reads once for a user."""
        lines = [f"- {_quoted(title)}\n" for title in titles[-self.history :]]
        return f"{self.intro}\n{''.join(self._newest(lines))}{self.question}\n"

    def _newest(self, lines: list[str]) -> list[str]:
        """As many of the last ones as there is room for."""
        if not lines:
            return []
        room, kept = self._room, 0
        for length in reversed(self._tokens(lines)):
            room -= length
            if room < 0:
                break
            kept += 1
        return lines[len(lines) - kept :]

    def _tokens(self, texts: list[str], *, special: bool = False) -> list[int]:
        ids = self.scorer.backbone.tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]
        return [len(row) for row in ids]

    def candidate(self, title: str) -> str:
        """What it reads for each candidate, behind the prompt."""
        return f"Item: {_quoted(title)}\n{self.ask}"

    def __call__(self, histories: Sequence[Sequence[str]], candidates: Sequence[Sequence[str]]) -> list[list[float]]:
        """Scores of each history's candidates, see `Reranker`."""
        prompts = [self.prompt(titles) for titles in histories]
        found = self.scorer(prompts, [[self.candidate(title) for title in titles] for titles in candidates])
        return [scores.tolist() for scores in found]


def _quoted(title: str) -> str:
    return json.dumps(title if len(title) <= _TITLE else title[: _TITLE - 1] + "…", ensure_ascii=False)
