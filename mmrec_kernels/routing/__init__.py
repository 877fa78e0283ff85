"""Mixture of experts routed by modality: gate, masked top-k, statistics and losses; then the experts, dropless."""

from .experts import SharedExpert, mixture_of_experts
from .router import RouterLosses, Routing, route

__all__ = ["RouterLosses", "Routing", "SharedExpert", "mixture_of_experts", "route"]
