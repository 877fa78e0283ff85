"""MRS-specific layer: disentangle, align, fuse. Needs torch, numpy and mmrec_kernels only."""

from .align import ClipLoss, ModalityAlignment, MultipleNegativesRankingLoss
from .fuse import CrossModalAttention, Fused
from .moe import ModalityMoE
from .table import TableEncoder, TableInputs
from .tokens import Tokens, gather_ragged
from .whitening import Whitening

__all__ = [
    "ClipLoss",
    "CrossModalAttention",
    "Fused",
    "ModalityAlignment",
    "ModalityMoE",
    "MultipleNegativesRankingLoss",
    "TableEncoder",
    "TableInputs",
    "Tokens",
    "Whitening",
    "gather_ragged",
]
