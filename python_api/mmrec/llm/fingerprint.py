"""Hashes of model weights, adapters and tokenizers: the parts of a cache key that do not depend on the text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

# What the bottleneck adapters of a layer are called in it.
ADAPTER = "mmrec_adapter"


def combine(tensors: Mapping[str, Tensor], *words: str) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of `tensors` in name order, and `words`."""
    digest = hashlib.sha256(json.dumps(words).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        # A byte view keeps bfloat16 and 0-d tensors hashable without a copy.
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class ModelHash:
    """Hash of a model's base weights and configuration, kept until one of the tensors is replaced or written to."""

    def __init__(self) -> None:
        self._seen: tuple[tuple[int, int], ...] = ()
        self._value = ""

    def __call__(self, model: Any) -> str:
        """Hex SHA-256 of everything but the adapter; the same with and without one."""
        state = {_base_name(k): v for k, v in model.state_dict(keep_vars=True).items() if not _is_adapter(k)}
        seen = tuple((p.data_ptr(), p._version) for n, p in model.named_parameters() if not _is_adapter(n))
        if seen != self._seen:
            config = model.config.to_dict()
            for key in ("_name_or_path", "transformers_version", "quantization_config"):
                config.pop(key, None)
            self._value = combine(state, json.dumps(config, sort_keys=True, default=str))
            self._seen = seen
        return self._value


def tokenizer_hash(tokenizer: Any) -> str:
    """Hex SHA-256 of what the tokenizer does to a text; truncation and padding, which calls change, are left out."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        described = json.loads(backend.to_str())
        described.pop("truncation", None)
        described.pop("padding", None)
    else:
        described = {"vocabulary": tokenizer.get_vocab(), "class": type(tokenizer).__name__}
    described["truncation_side"] = tokenizer.truncation_side
    return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()


def _is_adapter(name: str) -> bool:
    return "lora_" in name or ADAPTER in name


def _base_name(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")
