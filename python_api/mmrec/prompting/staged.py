"""Prompting in stages: a model writes about a history, reads what it wrote, and so on, before anything is ranked.

Summary, then preference, then ranking, as in Rec-GPT4V (Liu et al., 2024, arXiv:2402.08670); and summaries that are
kept up to date, as in MLLM-MSR (Ye et al., 2024, arXiv:2408.09698). What a model wrote is as little to be trusted as
what it read: it enters a later prompt quoted, as text of items does.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from .hard import HardPrompt, Item

if TYPE_CHECKING:
    from ..adaptation.text_cache import TextCache

__all__ = ["STAGES", "LLMSummary", "Stage", "StagedReasoning"]

Generate: TypeAlias = Callable[[Sequence[str]], Sequence[str]]
Count: TypeAlias = Callable[[Sequence[str]], Sequence[int]]

_VERSION = 1
_HISTORY = "history"


@dataclass(frozen=True)
class Stage:
    """One question to the model.

    Args:
        name: of what it writes.
        prompt: how it is asked; `prompt.ask` ends the prompt.
        reads: "history", and names of earlier stages: what those wrote is the prompt's context.
    """

    name: str
    prompt: HardPrompt
    reads: tuple[str, ...] = (_HISTORY,)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w{1,64}", self.name) or self.name == _HISTORY:
            raise ValueError(f"name must be a word other than {_HISTORY!r}, got {self.name!r}")
        if isinstance(self.reads, str):
            raise TypeError(f"reads must be a tuple of names, got {self.reads!r}")


STAGES = (
    Stage(
        "summary",
        HardPrompt(
            question="Say in two sentences what these items have in common.", ask="Summary:", value_chars=600,
            give_up=("history",),
        ),
    ),
    Stage(
        "preference",
        HardPrompt(
            context_intro="What was written about them:", question="Say in one sentence what this person likes most.",
            ask="Preference:", value_chars=600, give_up=("history",),
        ),
        reads=("history", "summary"),
    ),
)  # fmt: skip


class _Writer:
    """Asks the model, once for each distinct prompt, and the cache before it."""

    def __init__(
        self, generate: Generate, model: str, cache: TextCache | None, budget: int | None, count: Count | None,
        special: Sequence[str],
    ) -> None:  # fmt: skip
        if cache is not None and not model:
            raise ValueError("model must name who writes where there is a cache, got ''")
        if budget is not None and count is None:
            raise ValueError("budget needs count, which counts tokens")
        self.generate, self.model, self.cache = generate, model, cache
        self.budget, self.count, self.special = budget, count, tuple(special)

    def counted_with(self, prompt: HardPrompt) -> Count | None:
        """`count` of a prompt with what asks for the answer behind it."""
        count = self.count
        return None if count is None else lambda texts: count([text + prompt.ask for text in texts])

    def __call__(self, prompts: Sequence[str], template: str) -> list[str]:
        if self.cache is not None:
            context = {"model": self.model, "template": template, "version": str(_VERSION)}
            return self.cache.get_or_compute(prompts, self._written, context=context)
        distinct = list(dict.fromkeys(prompts))
        found = dict(zip(distinct, self._written(distinct), strict=True))
        return [found[prompt] for prompt in prompts]

    def _written(self, prompts: Sequence[str]) -> list[str]:
        if not prompts:
            return []
        found = self.generate(prompts)
        if isinstance(found, str) or len(found) != len(prompts) or not all(isinstance(text, str) for text in found):
            raise ValueError(f"generate must give a string for each of {len(prompts)} prompts, got {found!r:.80}")
        return [text.strip() for text in found]


class StagedReasoning:
    """Lets a model write about histories, stage after stage.

    What it gives for a history is an item for `HardPrompt.build(context=[…])`: the last stage, ranking, is a scorer's.

    Args:
        generate: prompts to their continuations, such as `mmrec.llm.TextGenerator`; called once per stage with the
            distinct prompts of all histories.
        stages: see `Stage`; each reads the history or stages before it.
        model: who `generate` is, with whatever else decides what it writes (`TextGenerator.key()`).
        cache: keeps what was written, by model, template and prompt.
        budget: most tokens of a prompt, by `count`; each prompt leaves out what its own `give_up` says.
        count: tokens of each of some prompts, as the model will read them.
        special: tokens that no text may contain whole, see `broken_up`.

    Raises:
        ValueError: stages of the same name, one that reads what is not there yet, a cache without a model's name, or a
            budget without `count`.
    """

    def __init__(
        self, generate: Generate, *, stages: Sequence[Stage] = STAGES, model: str = "", cache: TextCache | None = None,
        budget: int | None = None, count: Count | None = None, special: Sequence[str] = (),
    ) -> None:  # fmt: skip
        known = [_HISTORY]
        for stage in stages:
            absent = sorted(set(stage.reads) - set(known))
            if absent or stage.name in known:
                what = f"reads {absent[0]!r}" if absent else "has a name that is taken"
                raise ValueError(f"stages must read the history or stages before them: {stage.name!r} {what}")
            known.append(stage.name)
        self.stages = tuple(stages)
        self._write = _Writer(generate, model, cache, budget, count, special)

    def __call__(self, histories: Sequence[Sequence[Item]]) -> list[dict[str, str]]:
        """What each stage wrote about each history, by the stage's name; items oldest first.

        Raises:
            ValueError: what a prompt may not leave out does not fit into the budget.
        """
        found: list[dict[str, str]] = [{} for _ in histories]
        for stage in self.stages:
            prompts = [self._prompt(stage, *both) for both in zip(histories, found, strict=True)]
            key = json.dumps([stage.name, stage.reads, stage.prompt.key()])
            for written, text in zip(found, self._write(prompts, key), strict=True):
                written[stage.name] = text
        return found

    def _prompt(self, stage: Stage, history: Sequence[Item], written: dict[str, str]) -> str:
        write = self._write
        built = stage.prompt.build(
            history if _HISTORY in stage.reads else (),
            context=[{name: written[name]} for name in stage.reads if written.get(name)],
            budget=write.budget, count=write.counted_with(stage.prompt), special=write.special,
        )  # fmt: skip
        return built.text + stage.prompt.ask


class LLMSummary:
    """Summaries of histories that a model keeps up to date: a state, and new items, to a new state.

    The recurrent form of MLLM-MSR: `update(state, new)` reads the state and the new items only. Items are read in
    blocks of `prompt.history`, or fewer where the budget asks for that, oldest first, and none is left out; so updating
    block by block gives the same as updating at once.

    Args:
        prompt: what the model reads: the new items as its history, the state as its context. `give_up` is not used.
        generate, model, cache, budget, count, special: as in `StagedReasoning`.

    Attributes:
        context: what decides a summary, beside the history: strings for a cache's key.
    """

    def __init__(
        self, generate: Generate, *, prompt: HardPrompt | None = None, model: str = "", cache: TextCache | None = None,
        budget: int | None = None, count: Count | None = None, special: Sequence[str] = (),
    ) -> None:  # fmt: skip
        prompt = _SUMMARY if prompt is None else prompt
        self.prompt = dataclasses.replace(prompt, give_up=())
        self._write = _Writer(generate, model, cache, budget, count, special)
        self.context = {
            "summary": "written", "version": str(_VERSION), "model": model, "prompt": self.prompt.key(),
            "budget": str(budget),
        }  # fmt: skip

    def update(self, state: str | None, items: Sequence[Item]) -> str:
        """The state, a text, after the history went on with `items`, oldest first. None: nothing was known."""
        return self.update_all([state], [items])[0]

    def update_all(self, states: Sequence[str | None], items: Sequence[Sequence[Item]]) -> list[str]:
        """`update` of many, whose prompts go to the model together.

        An empty answer leaves a state as it was.

        Raises:
            ValueError: not as many lists of items as states, or a budget that one item does not fit into.
        """
        if len(states) != len(items):
            raise ValueError(f"items must have a list for each of {len(states)} states, got {len(items)}")
        now, left = [state or "" for state in states], [list(new) for new in items]
        while any(left):
            asked = [i for i, new in enumerate(left) if new]
            prompts = []
            for i in asked:
                text, read = self._prompt(now[i], left[i])
                prompts.append(text)
                left[i] = left[i][read:]
            for i, text in zip(asked, self._write(prompts, self.prompt.key()), strict=True):
                now[i] = text or now[i]
        return now

    def _prompt(self, state: str, items: list[Item]) -> tuple[str, int]:
        """The prompt of the first items, as many as fit, and how many those are."""
        write, size = self._write, min(len(items), self.prompt.history)
        context: list[Item] = [{"summary": state}] if state else []
        count = write.counted_with(self.prompt)
        while True:
            built = self.prompt.build(items[:size], context=context, count=count, special=write.special)
            if write.budget is None or built.tokens is None or built.tokens <= write.budget:
                return built.text + self.prompt.ask, size
            if size == 1:
                raise ValueError(f"budget must be at least {built.tokens} for one new item, got {write.budget}")
            size //= 2


_SUMMARY = HardPrompt(
    intro="Someone chose these new items, one after another:", context_intro="What is known of this person so far:",
    question="Say in three sentences what this person likes, all in all.", ask="Summary:", value_chars=600,
)  # fmt: skip
