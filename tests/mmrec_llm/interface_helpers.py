"""What tests of both of transformers' interfaces run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BATCH, LENGTH = 3, 11


def ids(rows: int = BATCH, length: int = LENGTH) -> Tensor:
    return torch.randint(5, 90, (rows, length), generator=torch.Generator().manual_seed(1))


def results(model: Any, given: dict[str, Tensor], shown: Tensor | None = None) -> list[Tensor]:
    """Outputs, at positions that are `shown`, and the gradients of a weighted sum of them."""
    model.zero_grad()
    output = model(**given)
    hidden = output.logits if "logits" in output else output.last_hidden_state
    hidden = hidden if shown is None else hidden[shown.bool()]
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(2))
    (weights * hidden).sum().backward()
    return [hidden.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
