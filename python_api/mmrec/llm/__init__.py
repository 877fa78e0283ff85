"""LLM processing layer: quantised Hugging Face backbones with LoRA, pooled or token embeddings, and their cache."""

from .attention import kernel_attention, register_attention, unregister_attention
from .backbone import Backbone
from .cache import CacheWriteError, EmbeddingCache
from .encoded import Encoded
from .experts import kernel_experts, register_experts, unregister_experts
from .lora import LoRAConfig
from .packed import Prefix
from .scorer import YesNoScorer
from .soft_prompt import SoftPrompt
from .swap import Swap, SwappedLayer, swap_kernels
from .vision import VisionEncoder

__all__ = [
    "Backbone",
    "CacheWriteError",
    "EmbeddingCache",
    "Encoded",
    "LoRAConfig",
    "Prefix",
    "SoftPrompt",
    "Swap",
    "SwappedLayer",
    "VisionEncoder",
    "YesNoScorer",
    "kernel_attention",
    "kernel_experts",
    "register_attention",
    "register_experts",
    "swap_kernels",
    "unregister_attention",
    "unregister_experts",
]
