"""Tiny models of several families, quantised, with and without adapters; and a 4-bit layer as bitsandbytes makes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

SIZES = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
T5_SIZES = {"vocab_size": 99, "d_model": 64, "d_ff": 128, "d_kv": 16, "num_layers": 2, "num_heads": 4}


def _vision_language() -> tuple[Any, Any]:
    vision = {k: v for k, v in SIZES.items() if k != "vocab_size"} | {"image_size": 16, "patch_size": 8}
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision), text_config=transformers.LlamaConfig(**GROUPED),
        image_token_index=98, vision_feature_layer=-1, image_seq_length=4,
    )  # fmt: skip
    return transformers.LlavaForConditionalGeneration, config


FAMILIES: dict[str, Callable[[], tuple[Any, Any]]] = {
    "llama": lambda: (transformers.LlamaForCausalLM, transformers.LlamaConfig(**GROUPED)),
    "qwen2": lambda: (transformers.Qwen2ForCausalLM, transformers.Qwen2Config(**GROUPED)),
    "qwen3": lambda: (transformers.Qwen3ForCausalLM, transformers.Qwen3Config(**GROUPED, head_dim=16)),
    "mistral": lambda: (transformers.MistralForCausalLM, transformers.MistralConfig(**GROUPED)),
    "bert": lambda: (transformers.BertModel, transformers.BertConfig(**SIZES)),
    "t5": lambda: (transformers.T5ForConditionalGeneration, transformers.T5Config(**T5_SIZES)),
    "llava": _vision_language,
}


def load_quantised(family: str, folder: Path, rank: int = 0, dtype: torch.dtype = torch.float32, **lora: Any) -> Any:
    """A family with NF4 weights, which bitsandbytes never repacks, and random adapters if a rank is given. Its dense
    weights are made in `folder`, if that is empty."""
    import bitsandbytes as bnb

    kind, config = FAMILIES[family]()
    if not any(folder.iterdir()):
        torch.manual_seed(0)
        kind(config).save_pretrained(folder)
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    model = kind.from_pretrained(folder, quantization_config=quantization, device_map={"": "cpu"}, dtype=dtype)
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False
    if rank:
        torch.manual_seed(1)
        model = add_adapter(model, rank, **lora)
    return model.eval()


def add_adapter(model: Any, rank: int, **lora: Any) -> Any:
    import peft

    config = peft.LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules="all-linear",
        init_lora_weights=False,
        **{"lora_dropout": 0.0, **lora},
    )
    return peft.get_peft_model(model, config)


def inputs_of(family: str, seed: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 90, (3, 9), generator=generator)
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if family == "t5":
        found["decoder_input_ids"] = ids[:, :5]
    if family == "llava":
        ids[:, :4] = 98
        found["pixel_values"] = torch.randn(3, 3, 16, 16, generator=generator)
    return found


def output_of(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    found = model(**inputs)
    return found["logits"] if "logits" in found else found["last_hidden_state"]


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def stock_layer(width: int = 128, rows: int = 64, dtype: torch.dtype = torch.float32) -> Any:
    import bitsandbytes as bnb

    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(width, rows, bias=False, compute_dtype=dtype, quant_type="nf4")
    layer.load_state_dict({"weight": torch.randn(rows, width) / width**0.5})
    layer = layer.to("cpu")
    layer.support_avx512bf16_for_cpu = True  # as on a machine with AVX512-BF16
    return layer


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())
