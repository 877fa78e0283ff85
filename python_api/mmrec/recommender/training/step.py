"""One step as one module, so that a wrapper for several processes sees every parameter that it uses."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...fusion.tokens import gather_ragged
from ..batches import Batch
from ..inputs import ItemInputs
from ..model import Recommender
from ..objective import Losses, Objective
from ..parallel import Alone
from .features import Content

__all__ = ["Step"]


class Step(nn.Module):
    """The losses of a batch; where the backbone trains, some texts are encoded anew for it, with gradients.

    The vectors of all other texts are those of the last time they were drawn. A step costs one forward and backward
    pass of the backbone over the texts of ``tune_items`` items.

    Args:
        known: int64 ``[W]``, the items that training knows.
        known_inputs: their content, whitened.
        ranks: who shares the step.
    """

    def __init__(
        self,
        model: Recommender,
        objective: Objective,
        content: Content,
        known: Tensor,
        known_inputs: ItemInputs,
        ranks: Alone,
    ) -> None:
        super().__init__()
        self.model, self.objective, self.ranks = model, objective, ranks
        self.inputs, self.backbone = content.inputs, content.backbone
        self.known, self.known_inputs = known, known_inputs
        self.language = None if content.backbone is None else content.backbone.model

    def forward(self, batch: Batch, text: Tensor | None) -> tuple[Losses, Tensor | None]:
        """The losses, and the text vectors afterwards.

        Args:
            text: ``[T, d]``, those of all texts before; None where the backbone does not train.
        """
        inputs, text = self._read(text)
        return self.objective(self.model, inputs, batch, self.ranks), text

    def _read(self, text: Tensor | None) -> tuple[ItemInputs, Tensor | None]:
        """Content of the known items."""
        inputs = self.inputs
        if self.backbone is None or text is None or inputs.texts is None:
            return self.known_inputs, text
        with self.ranks.together():
            chosen = self.known[torch.randperm(len(self.known))[: int(self.model.config.tune_items)]]
        rows, _ = gather_ragged(inputs.tokens["text"].offsets, chosen)
        if not len(rows):
            return inputs.with_text(text).select(self.known), text
        self.backbone.train()
        own = self.ranks.share(rows)
        # A rank without any reads one for nothing: its parameters need a gradient like those of the others.
        texts = [inputs.texts[i] for i in (own if len(own) else rows[:1]).tolist()]
        encoded = self.backbone.encode(texts, requires_grad=True, progress=False).pooled
        assert encoded is not None
        encoded = self.ranks.gather(encoded[: len(own)].float(), len(rows))
        values = text.index_copy(0, rows, encoded)
        return inputs.with_text(values).select(self.known), values.detach()
