"""`CatalogueDecoder`: a causal language model names items of a catalogue, and nothing else.

Beam search constrained by a trie of the items' titles (GENRE, De Cao et al., 2021, arXiv:2010.00904; of semantic ids:
TIGER, arXiv:2305.05065). The prompt is read once; at each step the few tokens that a beam has so far are read behind
it, so nothing is kept per beam. Logits are made of the tokens that may follow, and the log-sum-exp of all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .beam import Decoded, beam_search
from .head import output_layer
from .loading import resolve_source
from .reading import inference, need_prefixes, read_texts, token_ids
from .tokenizing import check_texts
from .trie import Trie

if TYPE_CHECKING:
    from .backbone import Backbone

__all__ = ["CatalogueDecoder", "valid_ratio"]


class CatalogueDecoder:
    """Generates items of a catalogue by their texts.

    Args:
        backbone: a causal model that can go on from prefixes (`Backbone.why_not_packed` is None). Its output layer is
            read from the checkpoint unless it is tied to the input embeddings, see `output_layer`.
        texts: of item i the text `texts[i]` as it stands behind a prompt, a string or token ids. Of items with the same
            text the lower one comes first.
        end: what follows a text, a string or a token, such as the tokenizer's `eos_token_id`. It is part of what is
            scored, so that "Alien" is not as likely as whatever begins with it. None: nothing follows, and the
            probability of a text is that of all that begins with it.

    Attributes:
        sequences: the tokens of each item, the end's among them.
        trie: of them.

    Raises:
        ValueError: a text without tokens, or a model that is not causal, has no output layer, or cannot go on from
            prefixes.
    """

    def __init__(
        self, backbone: Backbone, texts: Sequence[str | Sequence[int]], *, end: str | int | None = "\n"
    ) -> None:
        if isinstance(texts, str):
            raise TypeError("texts must be a sequence of texts, got one str; write [text]")
        need_prefixes(backbone)
        ending: tuple[int, ...] = ()
        if end is not None:
            (ending,) = token_ids(backbone, [end if isinstance(end, str) else [end]], "end")
        self.backbone = backbone
        self.sequences = [(*row, *ending) for row in token_ids(backbone, texts, "texts")]
        self.trie = Trie(self.sequences)
        self._head = output_layer(resolve_source(backbone.name)[1], backbone.model)

    def decode(
        self, prompts: Sequence[str], *, k: int = 10, beams: int = 20, exclude: Sequence[Sequence[int]] | None = None
    ) -> Decoded:
        """The likeliest items behind each prompt, with log p(text and end | prompt) over the whole vocabulary.

        No other item can come out: the share of answers that are none (`valid_ratio`) is 0. With as many beams as items
        the result is that of ranking all of them by `LikelihoodScorer`, up to rounding.

        Args:
            prompts: B strings; each cut to the model's `max_length` tokens.
            k, beams, exclude: see `beam_search`.

        Raises:
            ValueError: a prompt without tokens, an argument out of range, or more positions than the model has.
        """
        check_texts(prompts)
        if not len(prompts):
            return beam_search(lambda *_: torch.empty(0), self.trie, 0, k=k, beams=beams, exclude=exclude)
        with inference(self.backbone):
            reading = read_texts(self.backbone, prompts)

            def step(query: Tensor, paths: Tensor, row: Tensor, token: Tensor) -> Tensor:
                device = self.backbone.device
                return self._head.log_prob(reading.states(query, paths), row.to(device), token.to(device))

            return beam_search(step, self.trie, len(prompts), k=k, beams=beams, exclude=exclude)


def valid_ratio(texts: Sequence[str], catalogue: Iterable[str]) -> float:
    """Share of freely generated answers that name an item of the catalogue: LLaRA's ValidRatio (Liao et al., 2024,
    arXiv:2312.02445). The rest, 1 less it, is made up.

    Answers are compared with titles without regard to case, to the blanks between words, and to marks around the whole.

    Args:
        texts: one answer each, at least one.
        catalogue: titles.
    """
    check_texts(texts)
    if not len(texts):
        raise ValueError("texts must hold an answer, got none")
    known = {_bare(title) for title in catalogue}
    return sum(_bare(text) in known for text in texts) / len(texts)


def _bare(text: str) -> str:
    words = " ".join(text.casefold().split())
    return words.strip(" \"'`.,;:!?«»“”‘’") or words
