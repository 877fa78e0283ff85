"""Prompts for language models that recommend."""

from .hard import BuiltPrompt, Example, HardPrompt, Item
from .retrieved import neighbours
from .staged import STAGES, LLMSummary, Stage, StagedReasoning
from .untrusted import broken_up, quoted, special_tokens

__all__ = [
    "STAGES",
    "BuiltPrompt",
    "Example",
    "HardPrompt",
    "Item",
    "LLMSummary",
    "Stage",
    "StagedReasoning",
    "broken_up",
    "neighbours",
    "quoted",
    "special_tokens",
]
