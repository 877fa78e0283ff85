"""Published recommenders to compare with, written from their papers: same splits, same ranking, same metrics."""

from .graph import Adjacency, Graph, neighbour_graph
from .multimodal import BM3, FREEDOM
from .pairwise import BPR, VBPR, LightGCN, Pairwise
from .sequential import SASRec
from .training import Fitted, FittedSequence, PairwiseConfig, SequenceConfig, fit_pairwise, fit_sequence

__all__ = [
    "BM3",
    "BPR",
    "FREEDOM",
    "VBPR",
    "Adjacency",
    "Fitted",
    "FittedSequence",
    "Graph",
    "LightGCN",
    "Pairwise",
    "PairwiseConfig",
    "SASRec",
    "SequenceConfig",
    "fit_pairwise",
    "fit_sequence",
    "neighbour_graph",
]
