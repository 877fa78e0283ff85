"""Prompts for language models that recommend."""

from .hard import BuiltPrompt, Example, HardPrompt, Item
from .retrieved import neighbours
from .untrusted import broken_up, quoted, special_tokens

__all__ = ["BuiltPrompt", "Example", "HardPrompt", "Item", "broken_up", "neighbours", "quoted", "special_tokens"]
