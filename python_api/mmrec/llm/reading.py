"""Prompts that a causal model has read once, and the states of what goes on from them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .encode import offsets_of
from .packed import Prefix, packed_forward
from .tokenizing import tokenize

if TYPE_CHECKING:
    from .backbone import Backbone

__all__ = ["Reading", "inference", "need_prefixes", "read", "read_texts", "token_ids"]


@dataclass(frozen=True, eq=False)
class Reading:
    """n prompts, read.

    Attributes:
        backbone: that read them.
        prefix: their keys and values.
        last: `[n, d]`, the last hidden state of each one's last token: what comes first after a prompt is predicted
            from it.
    """

    backbone: Backbone
    prefix: Prefix
    last: Tensor

    def __len__(self) -> int:
        return len(self.last)

    def states(self, prompt: Tensor, paths: Tensor) -> Tensor:
        """`[m, d]`: the state after m short continuations of one length.

        Args:
            prompt: int64 `[m]` on the CPU, of which prompt; never falls.
            paths: int64 `[m, t]` tokens, or `[m, t, d]` vectors in the model's input space; t may be 0.
        """
        length = paths.shape[1]
        if not length:
            return self.last[prompt.to(self.last.device)]
        flat = paths.flatten(0, 1).to(self.last.device)
        ids, vectors = (flat, None) if paths.ndim == 2 else (None, flat)
        lengths = torch.full((len(paths),), length)
        found = self.go_on(prompt, lengths, input_ids=ids, inputs_embeds=vectors)
        return torch.cat([self.last[:0], *(hidden[length - 1 :: length] for _, hidden in found)])

    def go_on(
        self, prompt: Tensor, lengths: Tensor, *, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None,
        batch_tokens: int = 4096,
    ) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
        """Last hidden states of texts that go on from the prompts, a batch at a time.

        Args:
            prompt: int64 `[m]` on the CPU, from which prompt each text goes on; never falls.
            lengths: int64 `[m]` on the CPU, ≥ 1: tokens of each.
            input_ids, inputs_embeds: int64 `[T]` or `[T, d]` of all texts one after another; one of them.
            batch_tokens: most tokens per forward; a longer text is its own batch.

        Yields:
            int64 `[r]` on the CPU, rows of `input_ids`, rising over all batches; and their states `[r, d]`.
        """
        offsets = offsets_of(lengths.tolist())
        start = 0
        while start < len(lengths):
            room = int(offsets[start]) + batch_tokens
            end = max(start + 1, int(torch.searchsorted(offsets, room, right=True)) - 1)
            rows = slice(int(offsets[start]), int(offsets[end]))
            hidden = self.backbone.forward_rows(
                offsets[start : end + 1] - offsets[start],
                input_ids=None if input_ids is None else input_ids[rows],
                inputs_embeds=None if inputs_embeds is None else inputs_embeds[rows],
                prefix=self.prefix,
                counts=torch.bincount(prompt[start:end], minlength=len(self)),
            )
            yield torch.arange(rows.start, rows.stop), hidden
            start = end


def read(
    backbone: Backbone, lengths: Sequence[int], *, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None
) -> Reading:
    """Read prompts of `lengths` tokens, ≥ 1 each: int64 `[T]`, or `[T, d]` vectors in the model's input space. With
    the weights, the adapter and the mode of now; inside `inference`."""
    offsets = offsets_of(lengths)
    kept: dict[int, tuple[Tensor, Tensor]] = {}
    hidden = packed_forward(backbone.model, offsets, input_ids=input_ids, inputs_embeds=inputs_embeds, kept=kept)
    offsets = offsets.to(hidden.device)
    return Reading(backbone, Prefix(kept, offsets), hidden[offsets[1:] - 1])


def read_texts(backbone: Backbone, prompts: Sequence[str]) -> Reading:
    """Read prompts with the tokenizer's special tokens, each cut to `max_length` tokens."""
    ids = tokenize(backbone, prompts, special=True)
    if not all(ids):
        raise ValueError("prompts: a prompt must have a token, got an empty one")
    flat = torch.tensor([token for row in ids for token in row], dtype=torch.int64).to(backbone.device)
    return read(backbone, [len(row) for row in ids], input_ids=flat)


def token_ids(backbone: Backbone, texts: Sequence[str | Sequence[int]], name: str) -> list[tuple[int, ...]]:
    """The tokens of each text, given as a string or as ids; ValueError where there are none or no such ids."""
    written = [i for i, text in enumerate(texts) if isinstance(text, str)]
    found = dict(zip(written, tokenize(backbone, [str(texts[i]) for i in written], special=False), strict=True))
    ids = [tuple(found[i] if i in found else map(int, texts[i])) for i in range(len(texts))]
    vocabulary = len(backbone.model.get_input_embeddings().weight)
    for i, row in enumerate(ids):
        if not row:
            raise ValueError(f"{name}: a text must have a token, got one without: {texts[i]!r}")
        if not 0 <= min(row) <= max(row) < vocabulary:
            raise ValueError(f"{name}: token ids must be in [0, {vocabulary}), got {list(row)[:8]}")
    return ids


@contextmanager
def inference(backbone: Backbone) -> Iterator[None]:
    """Eval mode without a graph inside; the mode it was in after it, also after Ctrl-C."""
    training = backbone.training
    backbone.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        backbone.train(training)


def need_prefixes(backbone: Backbone) -> None:
    """Raises ValueError unless the model is causal and can go on from prefixes in eval mode."""
    with inference(backbone):
        if backbone.why_not_packed is not None:
            raise ValueError(f"backbone: it cannot go on from prefixes: {backbone.why_not_packed}")
        half = len(backbone.model.get_input_embeddings().weight) // 2
        read(backbone, [1], input_ids=torch.tensor([half], device=backbone.device))  # refuses what is not causal
