"""MRS-specific layer: disentangle, align, fuse. Needs torch, numpy and mmrec_kernels only."""

from .align import ModalityAlignment
from .drop_ins import ClipLoss, MultipleNegativesRankingLoss
from .fuse import Attended, AttentionPooler, CrossModalAttention, Fused, LatentPooler, Pooled
from .moe import ModalityMoE
from .table import TableEncoder, TableInputs
from .tokens import Tokens, gather_ragged
from .when import ModalityFusion
from .whitening import Whitening

__all__ = [
    "Attended",
    "AttentionPooler",
    "ClipLoss",
    "CrossModalAttention",
    "Fused",
    "LatentPooler",
    "ModalityAlignment",
    "ModalityFusion",
    "ModalityMoE",
    "MultipleNegativesRankingLoss",
    "Pooled",
    "TableEncoder",
    "TableInputs",
    "Tokens",
    "Whitening",
    "gather_ragged",
]
