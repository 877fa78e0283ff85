"""Fused kernels for multimodal recommenders: five exact, differentiable, deterministic torch ops."""

from .retrieval import TopK, top_k

__version__ = "0.1.0"

__all__ = ["TopK", "top_k"]
