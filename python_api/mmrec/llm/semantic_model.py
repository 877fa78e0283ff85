"""`SemanticIdModel`: a causal backbone that reads histories as codes of items and generates those of the next one.

TIGER (Rajput et al., 2023, arXiv:2305.05065) and LC-Rec (Zheng et al., 2024, arXiv:2311.09049): items are a few tokens
each, and decoding is constrained to ids that exist. The codes' vectors are tables beside the backbone, which may stay
frozen, in 4 bits, or have an adapter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .beam import Decoded, beam_search
from .encode import offsets_of
from .reading import inference, need_prefixes, read
from .semantic_ids import SemanticIds
from .tokenizing import tokenize
from .trie import Trie

if TYPE_CHECKING:
    from .backbone import Backbone

__all__ = ["SemanticIdModel"]

_FIRST_SCALE = 10.0


class SemanticIdModel(nn.Module):
    """Next items by their semantic ids.

    What the model reads: the prompt's tokens, then the codes of the history, each the vector of its level's table.
    What it says of level l after a state h is `exp(log_scale_l) · cos(h, table_l)`: a level's table serves input and
    output, and the learned scale sets how sharp the answer is, whatever the size of a backbone's states.

    Its parameters are the tables and scales; those of the adapter are `backbone.trainable_parameters()`.

    Args:
        backbone: a causal model that can go on from prefixes.
        ids: of the items; items are named by their rows there.
        prompt: text before the history, the same for all; may be empty.
        history: how many last items are read, fewer where `max_length` has no room for them.
        seed: of the tables' start: normal, with the deviation of the model's own embeddings.

    Attributes:
        tables: one parameter `[size, d]` per level, float32.
        log_scale: `[L]`.

    Raises:
        ValueError: a model that is not causal or cannot go on from prefixes, whose input and output widths differ, or
            has no room for an item behind the prompt.
    """

    def __init__(
        self, backbone: Backbone, ids: SemanticIds, *, prompt: str = "", history: int = 20, seed: int = 0
    ) -> None:
        super().__init__()
        need_prefixes(backbone)
        width = backbone.input_width
        if width != backbone.hidden_size:
            raise ValueError(f"backbone: its input width {width} must be its hidden size {backbone.hidden_size}")
        self.backbone, self.ids, self.trie = backbone, ids, Trie(ids.codes.tolist())
        self._prompt = tokenize(backbone, [prompt], special=True)[0]
        # The last code of the item that is asked for is never read.
        room = (backbone.max_length - len(self._prompt) - (ids.levels - 1)) // ids.levels
        if history < 1 or room < 1:
            raise ValueError(f"history must be at least 1 and have room behind the prompt, got {history} and {room}")
        self.history = min(history, room)
        generator = torch.Generator().manual_seed(seed)
        deviation = float(backbone.model.get_input_embeddings().weight.float().std())
        self.tables = nn.ParameterList(
            deviation * torch.randn(size, width, generator=generator) for size in ids.sizes
        )  # fmt: skip
        self.log_scale = nn.Parameter(torch.full((ids.levels,), math.log(_FIRST_SCALE)))
        self.to(backbone.device)

    def loss(self, histories: Sequence[Sequence[int]], targets: Sequence[int] | Tensor) -> Tensor:
        """The mean over users and levels of the cross-entropy of the next item's code, over that level's codes.

        Differentiable in the tables, the scales and the backbone's adapter; in the backbone's current mode.

        Args:
            histories: rows of `ids`, oldest first, of B users; one may be empty where there is a prompt.
            targets: B rows, what each chose next.

        Raises:
            ValueError: a row that `ids` does not have, not as many targets as histories, or nothing to read.
        """
        wanted = torch.as_tensor(targets, dtype=torch.int64).cpu()
        if wanted.shape != (len(histories),) or not len(histories):
            raise ValueError(
                f"targets must be one for each of {len(histories)} ≥ 1 histories, got {list(wanted.shape)}"
            )
        codes = self._codes(wanted.tolist(), "targets")
        levels = self.ids.levels
        rows = [
            [*before, *self._rows_of(own[:-1])]
            for before, own in zip(self._read(histories), codes.tolist(), strict=True)
        ]
        offsets = offsets_of([len(row) for row in rows])
        layout = "packed" if self.backbone.why_not_packed is None else "padded"
        hidden = self.backbone.forward_rows(offsets, inputs_embeds=self._vectors(rows), layout=layout)
        ends = offsets[1:].to(hidden.device)
        codes = codes.to(hidden.device)
        parts = [F.cross_entropy(self._logits(hidden[ends - levels + n], n), codes[:, n]) for n in range(levels)]
        return torch.stack(parts).mean()

    def recommend(
        self, histories: Sequence[Sequence[int]], k: int = 10, *, beams: int = 20,
        exclude: Sequence[Sequence[int]] | None = None,
    ) -> Decoded:  # fmt: skip
        """The likeliest next items of each user, rows of `ids` and nothing else, by the log-probability of their codes.

        Args:
            histories: as in `loss`.
            k, beams, exclude: see `beam_search`. With as many beams as items the result is exact.
        """
        if not len(histories):
            return beam_search(lambda *_: torch.empty(0), self.trie, 0, k=k, beams=beams, exclude=exclude)
        rows = self._read(histories)
        with inference(self.backbone):
            reading = read(self.backbone, [len(row) for row in rows], inputs_embeds=self._vectors(rows))

            def step(query: Tensor, paths: Tensor, row: Tensor, token: Tensor) -> Tensor:
                level = paths.shape[1]
                vectors = self._vectors([self._rows_of(path) for path in paths.tolist()])
                hidden = reading.states(query, vectors.view(*paths.shape, vectors.shape[1]))
                found = self._logits(hidden, level).log_softmax(1)
                return found[row.to(found.device), token.to(found.device)]

            return beam_search(step, self.trie, len(histories), k=k, beams=beams, exclude=exclude)

    def _logits(self, hidden: Tensor, level: int) -> Tensor:
        table = F.normalize(self.tables[level], dim=1)
        return self.log_scale[level].exp() * F.normalize(hidden.float(), dim=1) @ table.T

    def _vectors(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """`[T, d]` of rows of the prompt's tokens and the tables, one after another."""
        embed = self.backbone.model.get_input_embeddings()
        ids = torch.tensor(self._prompt, dtype=torch.int64, device=self.backbone.device)
        bank = torch.cat([embed(ids), *(table.to(self.backbone.dtype) for table in self.tables)])
        flat = [row for part in rows for row in part]
        return bank[torch.tensor(flat, dtype=torch.int64, device=bank.device)]

    def _rows_of(self, codes: Sequence[int]) -> list[int]:
        """Where `_vectors` has the first codes of an item."""
        begin = len(self._prompt)
        found = []
        for code, size in zip(codes, self.ids.sizes, strict=False):
            found.append(begin + code)
            begin += size
        return found

    def _read(self, histories: Sequence[Sequence[int]]) -> list[list[int]]:
        """What the model reads of each user, as rows of `_vectors`."""
        found = []
        for history in histories:
            codes = self._codes(list(history)[-self.history :], "histories")
            row = [*range(len(self._prompt)), *(place for own in codes.tolist() for place in self._rows_of(own))]
            if not row:
                raise ValueError("histories must hold an item each where there is no prompt, got an empty one")
            found.append(row)
        return found

    def _codes(self, items: Sequence[int], name: str) -> Tensor:
        index = torch.tensor([int(item) for item in items], dtype=torch.int64)
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < len(self.ids):
            raise ValueError(f"{name} must be rows in [0, {len(self.ids)}), got {index[:8].tolist()}")
        return self.ids.codes[index]
