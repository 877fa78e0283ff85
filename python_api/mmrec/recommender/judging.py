"""A causal language model as a judge of items for users (`mmrec.evaluation` says how far it can be trusted)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from ..prompting import HardPrompt, quoted, special_tokens

if TYPE_CHECKING:
    from ..llm import Backbone, YesNoScorer

__all__ = ["LLMJudge"]

_AT_ONCE = 32  # rows; a prompt that rows share is read once for those of them that stand together
_TEMPLATE = HardPrompt(
    intro="Someone liked these items:", question="Will this person like the following item? Answer Yes or No."
)
_COMPARE = "Which of the two following items will this person like more? Answer A or B."


class LLMJudge:
    """Scores items by the logit of "Yes" less that of "No", and compares two by that of "A" less that of "B".

    Both are `mmrec.evaluation.Judge` protocols. A history is a sequence of titles that the user liked, oldest first; an
    item is a text. Texts are untrusted, see `HardPrompt`.

    Args:
        backbone: a causal model that can go on from prefixes, see `YesNoScorer`.
        template: of the question about one item; of that about two with `compare` in place of its question.
        compare: asks which of two items, which are then shown as A and B.

    Raises:
        ValueError: what `YesNoScorer` refuses, or a prompt that cannot be made to fit into `backbone.max_length`.
    """

    def __init__(self, backbone: Backbone, *, template: HardPrompt = _TEMPLATE, compare: str = _COMPARE) -> None:
        from ..llm import YesNoScorer

        self.backbone = backbone
        self.template = template
        self.two = replace(template, question=compare)
        self._yes_no, self._a_b = YesNoScorer(backbone), YesNoScorer(backbone, yes=" A", no=" B")
        self._special = special_tokens(backbone.tokenizer)

    def score(self, histories: Sequence[Sequence[str]], items: Sequence[str]) -> np.ndarray:
        """float64 ``[n]``: the logit of "Yes" less that of "No"; its sigmoid is what the model states."""
        texts = [self.template.candidate(item, special=self._special) for item in items]
        return self._answers(self._yes_no, self.template, histories, texts)

    def prefer(self, histories: Sequence[Sequence[str]], first: Sequence[str], second: Sequence[str]) -> np.ndarray:
        """float64 ``[n]``: of the answers A and B, the probability of A, which stands first."""
        if len(first) != len(second):
            raise ValueError(f"second must be as many as first, {len(first)}, got {len(second)}")
        texts = [f"A: {self._line(a)}\nB: {self._line(b)}\n{self.two.ask}" for a, b in zip(first, second, strict=True)]
        logits = self._answers(self._a_b, self.two, histories, texts)
        return 1 / (1 + np.exp(-np.clip(logits, -700, 700)))

    def _line(self, item: str) -> str:
        return quoted(item, limit=self.two.value_chars, special=self._special)

    def _answers(
        self, scorer: YesNoScorer, template: HardPrompt, histories: Sequence[Sequence[str]], texts: Sequence[str]
    ) -> np.ndarray:
        if len(histories) != len(texts):
            raise ValueError(f"histories must be as many as items, {len(texts)}, got {len(histories)}")
        found = np.empty(len(texts))
        for start in range(0, len(texts), _AT_ONCE):
            groups: dict[str, list[int]] = {}
            for row in range(start, min(start + _AT_ONCE, len(texts))):
                groups.setdefault(self._prompt(template, histories[row]), []).append(row)
            answers = scorer(list(groups), [[texts[row] for row in rows] for rows in groups.values()])
            for rows, values in zip(groups.values(), answers, strict=True):
                found[rows] = values.numpy()
        return found

    def _prompt(self, template: HardPrompt, history: Sequence[str]) -> str:
        most = self.backbone.max_length
        return template.build(history, budget=most, count=self._count, special=self._special).text

    def _count(self, texts: Sequence[str]) -> list[int]:
        return [len(row) for row in self.backbone.tokenizer(list(texts), verbose=False)["input_ids"]]
