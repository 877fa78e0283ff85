"""Bottleneck adapters in a frozen backbone (Houlsby et al., 2019, arXiv:1902.00751; VIP5, arXiv:2305.14302).

In each block, what the attention and the feed-forward network add to the residual passes x + W_up GELU(W_down LN(x)).
The adapter is a submodule of the linear layer that it follows and acts by a hook on that layer's call: the layer itself
may be dense, in 4 bits or swapped, and keeps its name.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..bottleneck import Adapter
from ..files import parse_json, write_atomic
from .blocks import find_blocks, last_blocks, writers
from .extras import require
from .fingerprint import ADAPTER
from .tuning import check_count, copied

FILE = "bottleneck_adapter.safetensors"
_METADATA = "mmrec_bottleneck"


@dataclass(frozen=True)
class AdapterConfig:
    """x + W_up GELU(W_down LayerNorm(x)) behind the attention and the feed-forward network of each block; the start
    equals the base model, as W_up is 0.

    Attributes:
        inner: width of the bottleneck; None: the model's width / `reduction`, at least 1.
        reduction: what the width is divided by where `inner` is None (VIP5 takes 8).
        last_layers: only in the last so many blocks; None: in all.
        seed: seed of the initial W_down; the caller's random state is left as it was.
    """

    inner: int | None = None
    reduction: int = 8
    last_layers: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("adapter.inner", self.inner)
        check_count("adapter.last_layers", self.last_layers)
        if isinstance(self.reduction, bool) or not isinstance(self.reduction, int) or self.reduction < 1:
            raise ValueError(f"adapter.reduction must be an integer ≥ 1, got {self.reduction!r}")

    @classmethod
    def coerce(cls, value: AdapterConfig | Mapping[str, Any] | None) -> AdapterConfig | None:
        """An AdapterConfig from what `Backbone.load(adapter=…)` takes: itself, a mapping of its fields, or None."""
        if value is None or isinstance(value, cls):
            return value
        if not isinstance(value, Mapping):
            raise TypeError(f"adapter must be an AdapterConfig, a mapping or None, got {type(value).__name__}")
        fields = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(value) - set(fields))
        if unknown:
            raise ValueError(f"adapter has unknown fields {unknown}; it takes {', '.join(fields)}")
        return cls(**value)

    def width(self, hidden: int) -> int:
        """Of the bottleneck, in a model of width `hidden`."""
        return self.inner if self.inner is not None else max(1, hidden // self.reduction)


class _Inserted(Adapter):
    """An adapter within a layer: whether it acts now, and what takes it out."""

    acts = True
    hook: Any = None


def attach(model: Any, config: AdapterConfig) -> None:
    """Puts fresh adapters, float32, into `model`.

    Raises:
        ValueError: the model's blocks are not an attention and a feed-forward network of linear layers.
    """
    width = model.config.get_text_config().hidden_size
    list_name, blocks = find_blocks(model, "adapter")
    names = [f"{list_name}.{i}" for i in range(len(blocks))]
    if config.last_layers is not None:
        names = last_blocks(model, config.last_layers, "adapter.last_layers")
    layers: list[nn.Module] = []
    for name in names:
        block = model.get_submodule(name)
        found = writers(block, width)
        if found is None:
            raise ValueError(
                f"adapter: {name} ({type(block).__name__} of {type(model).__name__}) must have one attention and two "
                f"or three linear layers beside it, whose last ones write the model's width, {width}"
            )
        layers += [block.get_submodule(inner) for inner in found]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        made = [_Inserted(width, config.width(width)) for _ in layers]
    for layer, adapter in zip(layers, made, strict=True):
        adapter.train(model.training)
        layer.add_module(ADAPTER, adapter.to(_weight(layer).device))
        adapter.hook = layer.register_forward_hook(_adapted)


def _adapted(layer: Any, _: Any, output: Tensor) -> Tensor:
    adapter: _Inserted = getattr(layer, ADAPTER)
    if not adapter.acts:
        return output
    wide: Tensor = adapter(output.to(adapter.up.weight.dtype))
    return wide.to(output.dtype)


def _weight(layer: Any) -> Tensor:
    weight: Tensor = layer.weight
    return weight


def switch(model: nn.Module, on: bool) -> None:
    """Lets the adapters compute and train, or not."""
    for module in model.modules():
        if isinstance(module, _Inserted):
            module.acts = on
            module.requires_grad_(on)


def detach(model: nn.Module) -> None:
    """Takes the adapters out."""
    for module in list(model.modules()):
        if hasattr(module, ADAPTER):
            getattr(module, ADAPTER).hook.remove()
            delattr(module, ADAPTER)


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapters' parameters by name."""
    return {name: parameter for name, parameter in model.named_parameters() if f".{ADAPTER}." in name}


def save(model: nn.Module, config: AdapterConfig, folder: Path) -> None:
    """Write `FILE`, atomically; it holds the config too."""
    from safetensors.torch import save as to_bytes

    metadata = {"format": "pt", _METADATA: json.dumps(dataclasses.asdict(config), sort_keys=True)}
    write_atomic(folder / FILE, to_bytes(copied(parameters(model)), metadata=metadata))


def load(folder: Path) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """Read what `save` wrote; raises ValueError if the file is damaged."""
    safetensors = require("safetensors")
    try:
        with safetensors.safe_open(folder / FILE, framework="pt") as file:
            written = parse_json(file.metadata()[_METADATA])
            if not isinstance(written, dict):
                raise ValueError(f"its configuration must be an object, got {type(written).__name__}")
            config = AdapterConfig.coerce(written)
            state = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise ValueError(f"folder: the adapter in {str(folder)!r} is damaged: {error}") from error
    assert config is not None
    return config, state
