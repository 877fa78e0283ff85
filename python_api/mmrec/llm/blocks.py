"""The parts of a transformer that adapters hang on: its blocks, its linear layers, and what a block adds to its input.

Found by structure, not by a list of architectures: models that are built otherwise are refused by name.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def base_of(model: Any) -> Any:
    """The model of transformers, without what peft has put around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def find_blocks(model: Any, argument: str) -> tuple[str, nn.ModuleList]:
    """Name and modules of the list of transformer blocks; ValueError, for `argument`, where there is no such list."""
    base = base_of(model)
    layers = getattr(base.config.get_text_config(), "num_hidden_layers", None)
    found: list[tuple[str, nn.ModuleList]] = []
    for name, module in base.named_modules():
        if not isinstance(module, nn.ModuleList) or len(module) != layers:
            continue
        if any(name.startswith(f"{outer}.") for outer, _ in found):
            continue
        if all(any(is_linear(part) for part in block.modules()) for block in module):
            found.append((name, module))
    if len(found) != 1:
        raise ValueError(
            f"{argument}: {type(base).__name__} must have one list of its {layers} blocks, found {len(found)}"
        )
    return found[0]


def last_blocks(model: Any, count: int, argument: str) -> list[str]:
    """Names of the last `count` blocks; ValueError, for `argument`, where the model has fewer."""
    name, blocks = find_blocks(model, argument)
    if count > len(blocks):
        raise ValueError(f"{argument} must be at most {len(blocks)}, the blocks of the model, got {count}")
    return [f"{name}.{i}" for i in range(len(blocks) - count, len(blocks))]


def within(name: str, parents: list[str]) -> bool:
    """Whether a module lies inside one of `parents`."""
    return any(name.startswith(f"{parent}.") for parent in parents)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer of torch, of bitsandbytes, or GPT-2's transposed one."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def linear_names(model: Any) -> list[str]:
    """Full names of the linear layers; parts of adapters are not among them, and adapted layers have their own name."""
    return [
        name.removesuffix(".base_layer")
        for name, module in base_of(model).named_modules()
        if is_linear(module) and ".lora_" not in name
    ]


def attention_names(model: Any) -> list[str]:
    """Those of them that lie inside a module whose class name contains "Attention"."""
    parents = [name for name, module in base_of(model).named_modules() if "Attention" in type(module).__name__]
    return [name for name in linear_names(model) if within(name, parents)]


def writers(block: nn.Module, width: int) -> tuple[str, str] | None:
    """Names, within a block, of the layers that end its attention and its feed-forward network, or None.

    That is a block of one attention, whose last linear layer writes the width that the others read, and of two or three
    linear layers beside it (the last of which does the same): BERT's and Llama's, but no mixture of experts.
    """
    attention = [name for name, module in block.named_modules() if "Attention" in type(module).__name__ and name]
    attention = [name for name in attention if not within(name, attention)]
    linears = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    inside = [name for name in linears if within(name, attention)]
    beside = [name for name in linears if name not in inside]
    if len(attention) != 1 or len(inside) < 2 or len(beside) not in (2, 3):
        return None
    for *readers, writer in (inside, beside):
        if linears[writer].out_features != width or any(linears[reader].in_features != width for reader in readers):
            return None
    return inside[-1], beside[-1]
