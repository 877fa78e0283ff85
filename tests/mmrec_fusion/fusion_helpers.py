"""What the tests of the fusing modules share: items that lack modalities, and a dense attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmrec.fusion import Tokens

WIDTH, HEADS, QUERIES, ITEMS = 8, 2, 3, 4
NAMES = ("text", "image", "table")
LENGTHS = {"text": [2, 0, 1, 0], "image": [3, 2, 0, 0], "table": [1, 4, 0, 0]}


def ragged(lengths: list[int], width: int = WIDTH) -> Tokens:
    values = torch.randn(sum(lengths), width, dtype=torch.float64)
    return Tokens(values, torch.tensor([0, *lengths]).cumsum(0), torch.zeros(len(values), dtype=torch.int64))


def tokens() -> dict[str, Tokens]:
    return {name: ragged(lengths) for name, lengths in LENGTHS.items()}


def nowhere(width: int = WIDTH) -> Tokens:
    return ragged([0] * ITEMS, width)


Module = TypeVar("Module", bound=nn.Module)


def away_from_the_start(model: Module) -> Module:
    """Moves what starts at ones and zeros, so that each parameter must be read rightly."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2 or (parameter == parameter.flatten()[0]).all():
                parameter += 0.5 * torch.randn_like(parameter)
    return model.double()


def listen(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, gate: Tensor, norms: tuple[Tensor, Tensor]
) -> Tensor:
    """One head of one item: query `[L, D]`, key and value `[J, D]`, bias and gate `[J]` to `[L, D + J]`, answers beside
    weights."""
    head = query.shape[1]
    query, key = (F.rms_norm(x, (head,), norm, 1e-6) for x, norm in zip((query, key), norms, strict=True))
    share = (query @ key.T / head**0.5 + bias).softmax(1)
    return torch.cat([share @ (gate.unsqueeze(1) * value), share], 1)


def check_gradients(run: Callable[..., tuple[Tensor, ...]], leaves: Sequence[Tensor], directions: int = 3) -> None:
    """gradcheck along random directions through all leaves at once: each alone takes a minute for dozens of them."""
    step = torch.zeros(directions, dtype=torch.float64, requires_grad=True)
    along = [torch.randn(directions, *leaf.shape, dtype=torch.float64) for leaf in leaves]

    def moved(step: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            run(*(leaf.detach() + torch.tensordot(step, way, 1) for leaf, way in zip(leaves, along, strict=True)))
        )

    assert torch.autograd.gradcheck(moved, (step,))
