"""Published recommenders to compare with, written from their papers: same splits, same ranking, same metrics."""

from .graph import Graph
from .pairwise import BPR, VBPR, LightGCN, Pairwise
from .training import Fitted, PairwiseConfig, fit_pairwise

__all__ = ["BPR", "VBPR", "Fitted", "Graph", "LightGCN", "Pairwise", "PairwiseConfig", "fit_pairwise"]
