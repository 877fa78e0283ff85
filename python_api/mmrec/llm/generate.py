"""`TextGenerator`: free text of a causal backbone, for summaries and reasoning in stages.

transformers generates; the model it generates with is the backbone's own, adapter included, with the output layer put
behind it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .extras import quiet_transformers, require
from .head import causal_model
from .loading import resolve_source
from .packed import without_cache
from .reading import inference
from .tokenizing import check_texts

if TYPE_CHECKING:
    from .backbone import Backbone

__all__ = ["TextGenerator"]

_GREEDY = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}


class TextGenerator:
    """Prompts to texts, greedy unless `options` say otherwise.

    Args:
        backbone: a causal model; packed texts and prefixes are not needed. Its output layer is read from the checkpoint
            unless it is tied to the input embeddings.
        max_new_tokens: most tokens of an answer.
        stop: strings at the first of which an answer ends; they are not part of it. It also ends where the model says
            so (`eos_token_id` of the checkpoint's generation settings).
        chat: each prompt is what a user says, in the tokenizer's chat template.
        batch: prompts generated for at a time, padded on the left.
        options: further settings of transformers' `GenerationConfig`, such as `{"do_sample": True}`, which draws from
            torch's global generator.

    Attributes:
        name: the backbone's.
        max_prompt_tokens: what a prompt may have, see `count`.

    Raises:
        ValueError: a model that is not causal or has no output layer, no chat template, or an argument out of range.
    """

    def __init__(
        self, backbone: Backbone, *, max_new_tokens: int = 128, stop: str | Sequence[str] = (), chat: bool = False,
        batch: int = 8, options: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        if min(max_new_tokens, batch) < 1:
            raise ValueError(f"max_new_tokens and batch must be at least 1, got {max_new_tokens} and {batch}")
        self.stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if not all(self.stop):
            raise ValueError(f"stop must hold strings of at least a character, got {self.stop}")
        if chat and not getattr(backbone.tokenizer, "chat_template", None):
            raise ValueError(f"chat: the tokenizer of {backbone.name!r} has no chat template")
        positions = getattr(backbone.model.config.get_text_config(), "max_position_embeddings", None)
        room = backbone.max_length if positions is None else min(backbone.max_length, positions - max_new_tokens)
        if room < 1:
            raise ValueError(
                f"max_new_tokens must leave room for a prompt in {positions} positions, got {max_new_tokens}"
            )
        self.backbone, self.name = backbone, backbone.name
        self.max_new_tokens, self.chat, self.batch = max_new_tokens, chat, batch
        self.options, self.max_prompt_tokens = dict(options or {}), room
        source = resolve_source(backbone.name)[1]
        self._settings = _settings(source, self.options)
        with inference(backbone):
            self._need_causal()
        self._causal = causal_model(source, backbone.model)

    def __call__(self, prompts: Sequence[str]) -> list[str]:
        """The continuation of each prompt, without the prompt, special tokens, and what a stop string begins.

        Raises:
            ValueError: a prompt without tokens, or of more than `max_prompt_tokens`: none is cut, since what asks for
                the answer stands at its end.
        """
        check_texts(prompts)
        ids = self._tokens(prompts)
        for i, row in enumerate(ids):
            if not 1 <= len(row) <= self.max_prompt_tokens:
                raise ValueError(
                    f"prompts[{i}] must have 1 to {self.max_prompt_tokens} tokens, got {len(row)}; leave something out"
                )
        found = [""] * len(ids)
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # little padding
        with inference(self.backbone), quiet_transformers():
            for start in range(0, len(order), self.batch):
                chosen = order[start : start + self.batch]
                for i, text in zip(chosen, self._generate([ids[i] for i in chosen]), strict=True):
                    found[i] = text
        return found

    def count(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt as the model reads it: for `HardPrompt.build(budget=…, count=…)`."""
        return [len(row) for row in self._tokens(prompts)]

    def key(self) -> str:
        """A string that changes whenever an answer may change: part of every cache key. Hashes the weights once."""
        return json.dumps(
            {
                **self.backbone.cache_context(pooling="none"), "max_new_tokens": self.max_new_tokens, "stop": self.stop,
                "chat": self.chat, "options": self.options,
            },
            sort_keys=True, default=str,
        )  # fmt: skip

    def _tokens(self, prompts: Sequence[str]) -> list[list[int]]:
        tokenizer = self.backbone.tokenizer
        if self.chat:
            said = [[{"role": "user", "content": prompt}] for prompt in prompts]
            # The template writes the special tokens itself.
            prompts = [tokenizer.apply_chat_template(one, add_generation_prompt=True, tokenize=False) for one in said]
        if not prompts:
            return []
        found: list[list[int]] = tokenizer(list(prompts), add_special_tokens=not self.chat, verbose=False)["input_ids"]
        return found

    def _generate(self, ids: list[list[int]]) -> list[str]:
        longest = max(map(len, ids))
        padded = torch.tensor([[0] * (longest - len(row)) + row for row in ids], device=self.backbone.device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids], device=self.backbone.device)
        stopping = [self._stopped(longest)] if self.stop else []
        out = self._causal.generate(
            input_ids=padded, attention_mask=mask, generation_config=self._settings, max_new_tokens=self.max_new_tokens,
            stopping_criteria=require("transformers").StoppingCriteriaList(stopping),
        )  # fmt: skip
        return [self._text(row) for row in out[:, longest:].tolist()]

    def _text(self, ids: list[int]) -> str:
        ends = self._settings.eos_token_id
        ends = {ends} if isinstance(ends, int) else set(ends or ())
        length = next((i for i, token in enumerate(ids) if token in ends), len(ids))
        text: str = self.backbone.tokenizer.decode(ids[:length], skip_special_tokens=True)
        return text[: min((text.find(one) for one in self.stop if one in text), default=len(text))]

    def _stopped(self, begin: int) -> Any:
        """Says of each row whether a stop string has come; transformers then writes padding, which `_text` cuts off."""

        def stopped(ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
            texts = self.backbone.tokenizer.batch_decode(ids[:, begin:], skip_special_tokens=True)
            return torch.tensor([any(one in text for one in self.stop) for text in texts], device=ids.device)

        return stopped

    def _need_causal(self) -> None:
        ids = torch.arange(3, device=self.backbone.device).unsqueeze(0)
        ids = ids + len(self.backbone.model.get_input_embeddings().weight) // 2
        long, short = (
            self.backbone.model(input_ids=part, **without_cache(self.backbone.model)).last_hidden_state[0, 0].float()
            for part in (ids, ids[:, :1])
        )
        if bool((long - short).norm() > 5e-2 * short.norm()):
            raise ValueError(f"backbone: {self.name!r} is not causal: its tokens see those behind them")


def _settings(source: str, options: Mapping[str, Any]) -> Any:
    """The checkpoint's generation settings without sampling, then `options`."""
    config = require("transformers").GenerationConfig
    with quiet_transformers():
        try:
            settings = config.from_pretrained(source)
        except OSError:  # it has none
            settings = config.from_model_config(require("transformers").AutoConfig.from_pretrained(source))
        unknown = settings.update(**{**_GREEDY, "pad_token_id": settings.pad_token_id or 0, **options})
    if unknown:
        raise ValueError(f"options: transformers has no generation setting {min(unknown)!r}")
    settings.max_length = None  # a checkpoint's own limit would warn beside `max_new_tokens`
    return settings
