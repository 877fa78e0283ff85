"""LLM processing layer: quantised Hugging Face backbones with adapters, pooled or token embeddings, and their cache."""

from .attention import kernel_attention, register_attention, unregister_attention
from .backbone import Backbone
from .beam import Decoded, beam_search
from .bottleneck import AdapterConfig
from .cache import CacheWriteError, EmbeddingCache
from .constrained import CatalogueDecoder, valid_ratio
from .encoded import Encoded
from .experts import kernel_experts, register_experts, unregister_experts
from .generate import TextGenerator
from .likelihood import LikelihoodScorer
from .lora import LoRAConfig
from .packed import Prefix
from .scorer import YesNoScorer
from .semantic_ids import SemanticIds
from .semantic_model import SemanticIdModel
from .side_network import SideNetwork
from .slots import ModalitySlots, Slot, SlotSpec, slot_pieces, slot_placeholder
from .soft_prompt import SoftPrompt
from .swap import Swap, SwappedLayer, swap_kernels
from .trie import Trie
from .vision import VisionEncoder

__all__ = [
    "AdapterConfig",
    "Backbone",
    "CacheWriteError",
    "CatalogueDecoder",
    "Decoded",
    "EmbeddingCache",
    "Encoded",
    "LoRAConfig",
    "LikelihoodScorer",
    "Prefix",
    "SemanticIdModel",
    "SemanticIds",
    "SideNetwork",
    "SoftPrompt",
    "ModalitySlots",
    "Slot",
    "SlotSpec",
    "Swap",
    "SwappedLayer",
    "TextGenerator",
    "Trie",
    "VisionEncoder",
    "YesNoScorer",
    "beam_search",
    "kernel_attention",
    "kernel_experts",
    "register_attention",
    "register_experts",
    "slot_pieces",
    "slot_placeholder",
    "swap_kernels",
    "unregister_attention",
    "unregister_experts",
    "valid_ratio",
]
