"""`YesNoScorer`: how much rather a causal language model says "Yes" than "No" after a text; many texts, one prompt.

The model is asked a question whose answer is one of two words, and the score is the difference of their logits: the
pointwise ranking of TALLRec (Bao et al., 2023, arXiv:2305.00447). The prompt that texts share (a user's history) is
read once, and its keys and values lie in memory once; each text costs its own tokens only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .head import output_rows
from .loading import resolve_source
from .tokenizing import check_texts, tokenize

if TYPE_CHECKING:
    from .backbone import Backbone

__all__ = ["YesNoScorer"]


class YesNoScorer:
    """Scores texts by the answer that a causal model gives after each of them.

    Args:
        backbone: a causal model that can go on from prefixes (`Backbone.why_not_packed` is None). Of its output layer
            the rows of two tokens are read from the checkpoint, no more.
        yes, no: the two answers; the first token of each counts, as it stands after the text. Where a tokenizer takes
            the blank before them for a token of its own, they stand without it.

    Raises:
        ValueError: a model that is not causal or has no output layer, or answers that begin with the same token.
    """

    def __init__(self, backbone: Backbone, *, yes: str = " Yes", no: str = " No") -> None:
        if backbone.why_not_packed is not None:
            raise ValueError(f"backbone: it cannot go on from prefixes: {backbone.why_not_packed}")
        tokens = [row[:1] for row in tokenize(backbone, [yes, no], special=False)]
        if tokens[0] == tokens[1]:  # a blank is a token of its own
            tokens = [row[:1] for row in tokenize(backbone, [yes.lstrip(), no.lstrip()], special=False)]
        if not all(tokens) or tokens[0] == tokens[1]:
            raise ValueError(f"yes and no must begin with different tokens, got {yes!r} and {no!r}: {tokens}")
        backbone.encode([yes], prefix=backbone.prefix(yes), progress=False)  # refuses what is not causal
        self.backbone = backbone
        self.tokens: tuple[int, int] = (tokens[0][0], tokens[1][0])
        self._head = output_rows(resolve_source(backbone.name)[1], backbone.model, self.tokens)

    def __call__(self, prompts: Sequence[str], texts: Sequence[Sequence[str]]) -> list[Tensor]:
        """float32 `[n_i]` on the CPU for each prompt: logit of yes less logit of no, after the prompt and each text.

        Args:
            prompts: what the texts of each group go on from; each cut to the model's `max_length` tokens.
            texts: n_i texts for each prompt; prompt and text are split into tokens one by one.

        Raises:
            ValueError: another number of groups than of prompts, or a text or prompt without tokens.
        """
        check_texts(prompts)
        if len(prompts) != len(texts):
            raise ValueError(f"texts must have a group for each of {len(prompts)} prompts, got {len(texts)}")
        counts = [len(group) for group in texts]
        flat = [text for group in texts for text in group]
        if not flat:
            return [torch.empty(0) for _ in prompts]
        if not all(tokenize(self.backbone, flat, special=False)):
            raise ValueError("texts: a text must have a token, got one without")
        asked = [n for n, count in enumerate(counts) if count]
        prefix = self.backbone.prefix([prompts[n] for n in asked])
        which = [place for place, n in enumerate(asked) for _ in range(counts[n])]
        found = self.backbone.encode(flat, pooling="last", prefix=prefix, prefix_ids=which, progress=False)
        assert found.pooled is not None
        yes, no = self._head(found.pooled).unbind(1)
        return list((yes - no).split(counts))
