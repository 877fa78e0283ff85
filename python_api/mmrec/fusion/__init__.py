"""MRS-specific layer: disentangle, align, fuse. Needs torch, numpy and mmrec_kernels only."""

from .align import (
    ALIGNMENTS,
    Adapter,
    BootstrapAlignment,
    GaussianAlignment,
    ModalityAlignment,
    ProjectionAlignment,
    alignment,
)
from .disentangle import (
    DISENTANGLERS,
    Disentangled,
    FactorAttention,
    GaussianExperts,
    PrototypeExperts,
    SharedPrivate,
    disentangler,
    distance_correlation,
)
from .drop_ins import ClipLoss, MultipleNegativesRankingLoss
from .fuse import Attended, AttentionPooler, CrossModalAttention, Fused, LatentPooler, Pooled
from .moe import ModalityMoE
from .table import TableEncoder, TableInputs
from .tokens import Tokens, gather_ragged
from .when import ModalityFusion
from .whitening import Whitening

__all__ = [
    "ALIGNMENTS",
    "DISENTANGLERS",
    "Adapter",
    "BootstrapAlignment",
    "GaussianAlignment",
    "ProjectionAlignment",
    "alignment",
    "Disentangled",
    "FactorAttention",
    "GaussianExperts",
    "PrototypeExperts",
    "SharedPrivate",
    "disentangler",
    "distance_correlation",
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
