"""Fused kernels for multimodal recommenders: five exact, differentiable, deterministic torch ops."""

from .attention import AttentionOutput, Segment, cross_modal_attention
from .infonce import InfoNCEStats, info_nce, info_nce_pairs
from .nf4 import LoRA, NF4Weight, nf4_linear
from .retrieval import TopK, top_k
from .routing import RouterLosses, Routing, SharedExpert, mixture_of_experts, route

__version__ = "0.1.0"

__all__ = [
    "AttentionOutput",
    "InfoNCEStats",
    "LoRA",
    "NF4Weight",
    "RouterLosses",
    "Routing",
    "Segment",
    "SharedExpert",
    "TopK",
    "cross_modal_attention",
    "info_nce",
    "info_nce_pairs",
    "mixture_of_experts",
    "nf4_linear",
    "route",
    "top_k",
]
