"""NF4 with double quantisation (QLoRA, Dettmers et al., 2023, arXiv:2305.14314) through bitsandbytes, made safe on CPU.

Two defects of bitsandbytes 0.50.2 on CPU are kept away from every model loaded here:

1. On a machine with AVX512-BF16 the first forward in eval mode repacks the weight in place into another layout and
   rounds its scales to bfloat16. From then on gradients vanish, `dequantize_4bit` returns garbage, and so do merging
   and moving. `keep_unpacked` turns that off on each layer instance.
2. `dequantize_4bit` on CPU is wrong for some weights whose rows do not hold whole blocks (K % 64 ≠ 0, K even).
   `skipped_layers` leaves such layers dense.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from .extras import require

BLOCK_SIZE = 64


def config_nf4(compute_dtype: torch.dtype, skip: list[str]) -> Any:
    """transformers' BitsAndBytesConfig for NF4 with nested absmax, block size 64; layers in `skip` stay dense."""
    return require("transformers").BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        # A list, even an empty one, replaces transformers' guess at heads: it can hit the last layer of a bare encoder.
        llm_int8_skip_modules=skip,
    )


def skipped_layers(config: Any, model_kwargs: dict[str, Any], device: torch.device) -> list[str]:
    """Names of Linear layers of the architecture `config` that must stay dense on `device` (defect 2 above)."""
    if device.type != "cpu":
        return []
    with torch.device("meta"):
        skeleton = require("transformers").AutoModel.from_config(config, **model_kwargs)
    return [
        name
        for name, module in skeleton.named_modules()
        if isinstance(module, nn.Linear) and module.in_features % BLOCK_SIZE != 0
    ]


def quantized_linears(model: nn.Module) -> dict[str, Any]:
    """The bitsandbytes 4-bit layers of `model` by name."""
    return {name: module for name, module in model.named_modules() if is_quantized(module)}


def is_quantized(module: nn.Module) -> bool:
    """Whether a module is a 4-bit layer of bitsandbytes; False, without importing it, where that is not loaded."""
    bitsandbytes = sys.modules.get("bitsandbytes")
    return bitsandbytes is not None and isinstance(module, bitsandbytes.nn.Linear4bit)


def keep_unpacked(model: nn.Module) -> None:
    """Forbid the in-place CPU repacking on every 4-bit layer of `model` (defect 1 above).

    Raises RuntimeError if a layer has been repacked already: its scales are rounded and cannot be recovered.
    """
    for name, layer in quantized_linears(model).items():
        if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
            raise RuntimeError(f"layer {name!r} was repacked by a bitsandbytes eval forward; load the model again")
        layer.support_avx512bf16_for_cpu = False


def dequantized(layer: Any) -> torch.Tensor:
    """The weight `[N, K]` of a 4-bit layer in the dtype that it had before quantisation."""
    return require("bitsandbytes").functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
