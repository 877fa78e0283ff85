"""Single rows of a causal model's output layer, for a backbone that was loaded without it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .extras import quiet_transformers, require
from .loading import first_line

__all__ = ["output_rows"]

_ONE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def output_rows(source: str, model: Any, tokens: Sequence[int]) -> Callable[[Tensor], Tensor]:
    """What gives the logits float32 `[n, len(tokens)]` of last hidden states `[n, d]`.

    Args:
        source: folder or name that the headless `model` was loaded from.
        model: knows its configuration, and holds the rows where they are those of its input embeddings (tied).
        tokens: whose rows.

    Raises:
        ValueError: no causal model of this kind, or a checkpoint without its output layer.
    """
    config = model.config
    with quiet_transformers(), torch.device("meta"):
        try:
            causal = require("transformers").AutoModelForCausalLM.from_config(config)
        except ValueError as error:
            raise ValueError(f"name_or_path: no causal model of {source!r}: {first_line(error)}") from error
    causal.tie_weights()
    head = causal.get_output_embeddings()
    names = {id(value): name for name, value in causal.named_parameters(remove_duplicate=False)}
    rows = torch.tensor(list(tokens))
    if head.weight is causal.get_input_embeddings().weight:
        embedding = model.get_input_embeddings().weight
        weight = embedding.detach()[rows.to(embedding.device)].float().cpu()
    else:
        weight = _read(source, names[id(head.weight)], rows)
    bias = None if getattr(head, "bias", None) is None else _read(source, names[id(head.bias)], rows)
    # Gemma bends logits, which changes differences between texts; a scale (Cohere, Granite) does not change their order
    # but is part of what the model says.
    cap = getattr(config, "final_logit_softcapping", None)
    scale = float(getattr(config, "logit_scale", None) or 1) / float(getattr(config, "logits_scaling", None) or 1)

    def logits(hidden: Tensor) -> Tensor:
        found = scale * F.linear(hidden.float().cpu(), weight, bias)
        return found if cap is None else cap * torch.tanh(found / cap)

    return logits


def _read(source: str, name: str, rows: Tensor) -> Tensor:
    """Rows of a tensor of the checkpoint, float32; nothing else of it is read."""
    safetensors = require("safetensors")
    try:
        path = _file_of(source, name)
        with safetensors.safe_open(path, framework="pt") as file:
            part = file.get_slice(name)
            found = [torch.as_tensor(part[int(row) : int(row) + 1]) for row in rows]
    except (OSError, KeyError, ValueError, safetensors.SafetensorError) as error:
        raise ValueError(
            f"name_or_path: the checkpoint {source!r} has no {name!r} to answer with: {first_line(error)}"
        ) from error
    return torch.cat(found).float()


def _file_of(source: str, name: str) -> str:
    cached_file = require("transformers").utils.cached_file
    with quiet_transformers():
        index = cached_file(source, _INDEX, _raise_exceptions_for_missing_entries=False)
        if index is None:
            return str(cached_file(source, _ONE))
        return str(cached_file(source, json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"][name]))
