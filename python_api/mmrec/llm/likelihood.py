"""`LikelihoodScorer`: how likely a causal language model finds each text after its prompt.

Ranking candidates by the likelihood of their titles needs no training and no answer word (Sileo et al., 2022,
arXiv:2112.04184; LLMs as zero-shot rankers, Hou et al., 2024, arXiv:2305.08845). The prompt that candidates share is
read once; of each candidate all tokens but the last are read behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from .encode import offsets_of
from .head import output_layer
from .loading import resolve_source
from .reading import Reading, inference, need_prefixes, read_texts, token_ids
from .tokenizing import check_texts

if TYPE_CHECKING:
    from .backbone import Backbone

__all__ = ["LikelihoodScorer"]


class LikelihoodScorer:
    """Scores texts by their log-likelihood behind a prompt, over the model's whole vocabulary.

    Args:
        backbone: a causal model that can go on from prefixes (`Backbone.why_not_packed` is None). Its output layer is
            read from the checkpoint unless it is tied to the input embeddings, see `output_layer`.

    Raises:
        ValueError: a model that is not causal, has no output layer, or cannot go on from prefixes.
    """

    def __init__(self, backbone: Backbone) -> None:
        need_prefixes(backbone)
        self.backbone = backbone
        self._head = output_layer(resolve_source(backbone.name)[1], backbone.model)

    def __call__(
        self, prompts: Sequence[str], texts: Sequence[Sequence[str | Sequence[int]]], *,
        normalize: Literal["sum", "mean"] = "sum",
    ) -> list[Tensor]:  # fmt: skip
        """float32 `[n_i]` on the CPU for each prompt: log p(text | prompt), natural.

        The order of the texts, and texts that occur twice, change no bit; other company may change the last ones, as
        with `Backbone.encode`.

        Args:
            prompts: what the texts of each group go on from; each cut to the model's `max_length` tokens.
            texts: n_i texts for each prompt, strings or token ids. Prompt and text are split into tokens one by one: a
                text that stands behind a word begins with its blank.
            normalize: "sum" over the tokens, or their "mean", which does not favour short texts.

        Raises:
            ValueError: another number of groups than of prompts, or a text or prompt without tokens.
        """
        check_texts(prompts)
        if normalize not in ("sum", "mean"):
            raise ValueError(f"normalize must be 'sum' or 'mean', got {normalize!r}")
        if len(prompts) != len(texts):
            raise ValueError(f"texts must have a group for each of {len(prompts)} prompts, got {len(texts)}")
        ids = token_ids(self.backbone, [text for group in texts for text in group], "texts")
        groups = [n for n, group in enumerate(texts) for _ in group]
        jobs = list(zip(groups, ids, strict=True))
        # Sorting by content makes the batches, hence the bits, a function of the set of texts alone.
        unique = sorted(set(jobs))
        if not unique:
            return [torch.empty(0) for _ in prompts]
        asked = sorted(set(groups))
        place = {n: i for i, n in enumerate(asked)}
        with inference(self.backbone):
            reading = read_texts(self.backbone, [prompts[n] for n in asked])
            found = self._scores(reading, [place[n] for n, _ in unique], [tokens for _, tokens in unique])
        if normalize == "mean":
            found = found / torch.tensor([len(tokens) for _, tokens in unique])
        position = {job: i for i, job in enumerate(unique)}
        scores = found.float()[torch.tensor([position[job] for job in jobs])]
        return list(scores.split([len(group) for group in texts]))

    def _scores(self, reading: Reading, prompt: list[int], texts: list[tuple[int, ...]]) -> Tensor:
        """float64 `[m]`: the log-likelihood of each text; `prompt` does not fall."""
        device = self.backbone.device
        prompts, lengths = torch.tensor(prompt), torch.tensor([len(text) for text in texts])
        tokens = torch.tensor([token for text in texts for token in text]).to(device)
        owner = torch.arange(len(texts)).repeat_interleave(lengths)
        begin = offsets_of(lengths.tolist())[:-1]
        scores = torch.zeros(len(texts), dtype=torch.float64)

        def add(rows: Tensor, log_p: Tensor) -> None:
            scores.index_add_(0, owner[rows], log_p.double().cpu())

        add(begin, self._head.log_prob(reading.last, prompts.to(device), tokens[begin.to(device)]))
        longer = (lengths > 1).nonzero().squeeze(1)
        is_last = torch.zeros(len(owner), dtype=torch.bool)
        is_last[begin + lengths - 1] = True
        fed = (~is_last).nonzero().squeeze(1)  # each of these is followed by the token that it predicts
        for rows, hidden in reading.go_on(prompts[longer], lengths[longer] - 1, input_ids=tokens[fed.to(device)]):
            following = fed[rows] + 1
            every = torch.arange(len(rows), device=device)
            add(following, self._head.log_prob(hidden, every, tokens[following.to(device)]))
        return scores
