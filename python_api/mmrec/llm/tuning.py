"""Training a dense model's own weights, all of them or those of its last blocks; and copies of whatever trains.

AdamW in float32 takes 16 bytes for each weight that trains: itself, its gradient and two moments.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import last_blocks


def check_trainable(trainable: str | None) -> int | None:
    """The n of "last:n", None for "all" and None; ValueError for anything else."""
    if trainable is None or trainable == "all":
        return None
    found = re.fullmatch(r"last:([1-9]\d*)", trainable) if isinstance(trainable, str) else None
    if found is None:
        raise ValueError(f"trainable must be None, 'all' or 'last:n' with n ≥ 1, got {trainable!r}")
    return int(found[1])


def chosen(model: Any, trainable: str) -> dict[str, nn.Parameter]:
    """The parameters that "all" or "last:n" names: of the last n blocks and of what is behind them, a final norm.

    Raises:
        ValueError: n is more than the model has blocks, or it has no list of blocks.
    """
    count = check_trainable(trainable)
    parameters = dict(model.named_parameters())
    if count is None:
        return parameters
    first = f"{last_blocks(model, count, 'trainable')[0]}."
    names = list(parameters)
    start = next(place for place, name in enumerate(names) if name.startswith(first))
    return {name: parameters[name] for name in names[start:]}


def check_count(name: str, value: int | None) -> None:
    """ValueError unless `value` is None or an integer ≥ 1."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError(f"{name} must be None or an integer ≥ 1, got {value!r}")


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Detached copies on the CPU, in the order of their names."""
    return {name: tensors[name].detach().to("cpu", copy=True).contiguous() for name in sorted(tensors)}


def put_back(own: Mapping[str, Tensor], state: Mapping[str, Tensor], what: str) -> None:
    """Copies `state` into tensors; names and shapes must agree exactly, else ValueError and nothing is changed."""
    missing, extra = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    wrong = sorted(k for k in set(own) & set(state) if state[k].shape != own[k].shape)
    for how, names in (("lacks", missing), ("has unknown", extra), ("has differently shaped", wrong)):
        if names:
            raise ValueError(f"{what} {how} {len(names)} tensors, first {names[0]!r}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(state[name])
