"""Ranking the best items again with a causal language model that reads the user's history once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..prompting import HardPrompt, special_tokens

if TYPE_CHECKING:
    from ..llm.scorer import YesNoScorer

__all__ = ["LLMReranker"]


class LLMReranker:
    """Ranks items by how much rather a causal language model says "Yes" than "No" to them, see `YesNoScorer`.

    What the model reads: the prompt of a history's titles, as many of the last ones as fit into the backbone's
    `max_length`; then, for each candidate on its own, its title and what asks for the answer.

    Args:
        scorer: of a causal backbone.
        template: of the prompt; None for `HardPrompt()`.

    Attributes:
        name: the backbone's.

    Raises:
        ValueError: the template's own words do not fit into the backbone's `max_length`.
    """

    def __init__(self, scorer: YesNoScorer, *, template: HardPrompt | None = None) -> None:
        self.scorer = scorer
        self.template = HardPrompt() if template is None else template
        self.name = scorer.backbone.name
        self._special = special_tokens(scorer.backbone.tokenizer)
        most = scorer.backbone.max_length
        if max(self._count([self.template.build([]).text, self.candidate("")])) > most:
            raise ValueError(f"template: its own words do not fit into the {most} tokens of {self.name}")

    def prompt(self, titles: Sequence[str]) -> str:
        """What the model reads once for a user."""
        most = self.scorer.backbone.max_length
        return self.template.build(titles, budget=most, count=self._count, special=self._special).text

    def candidate(self, title: str) -> str:
        """What it reads for each candidate, behind the prompt."""
        text = self.template.candidate(title, special=self._special)
        while (
            title and self._count([text])[0] > self.scorer.backbone.max_length
        ):  # what asks for the answer has to stay
            title = title[: len(title) // 2]
            text = self.template.candidate(title, special=self._special)
        return text

    def __call__(self, histories: Sequence[Sequence[str]], candidates: Sequence[Sequence[str]]) -> list[list[float]]:
        """Scores of each history's candidates, see `Reranker`."""
        prompts = [self.prompt(titles) for titles in histories]
        found = self.scorer(prompts, [[self.candidate(title) for title in titles] for titles in candidates])
        return [scores.tolist() for scores in found]

    def _count(self, texts: Sequence[str]) -> list[int]:
        ids = self.scorer.backbone.tokenizer(list(texts), verbose=False)["input_ids"]
        return [len(row) for row in ids]
