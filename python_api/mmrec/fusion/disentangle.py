"""Disentanglement: what modalities have in common apart from what is particular to each, in four ways behind one call.

Every module here takes one vector per item and modality, with a mask of what there is, and gives one vector per item,
what alignment is to act on, and losses. Vectors of what is missing are not read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmrec_kernels import Segment, cross_modal_attention, mixture_of_experts, route

from .gaussian import GaussianCoders, divergence, product_of_gaussians
from .masked import distinct, given, masked_mean, mean_over, relative_error, somewhere

__all__ = [
    "DISENTANGLERS",
    "Disentangled",
    "FactorAttention",
    "GaussianExperts",
    "PrototypeExperts",
    "SharedPrivate",
    "disentangler",
    "distance_correlation",
]


class Disentangled(NamedTuple):
    """Of N items: `vector [N, d]`, zero for an item without anything; per modality what alignment is to pull together,
    `aligned [N, aligned_width]`, and what it is to leave alone, `private` (empty where there is no such part); 0-d
    `losses` by name."""

    vector: Tensor
    aligned: dict[str, Tensor]
    private: dict[str, Tensor]
    losses: dict[str, Tensor]


class SharedPrivate(nn.Module):
    """By contrast: a shared and a private part of each modality (MISA, Hazarika et al., 2020, arXiv:2005.03545, after
    the domain separation networks of Bousmalis et al., 2016, arXiv:1608.06019).

        s_m = W_m^s x_m        p_m = W_m^p x_m        vector = W_o [mean_m s_m ; mean_m p_m]

    Each part has half of the width: parts as wide as x_m could both hold all of it. Shared parts are for the
    contrastive alignment (`ModalityAlignment` on `aligned`). `losses`: "orthogonality", the mean of ‖C‖²_F / (d / 2)
    over each modality's shared and private part and over every two private parts, where C are the correlations of their
    entries over the items (as Barlow Twins decorrelates, Zbontar et al., 2021, arXiv:2103.03230): 0 where no linear map
    reads one from the other. "reconstruction", the mean squared error of D_m [s_m ; p_m] against x_m relative to the
    mean square of x_m: without it a part may forget what it holds.

    Args:
        modalities: names.
        width: d, at least 2.
    """

    def __init__(self, modalities: Sequence[str], width: int) -> None:
        super().__init__()
        if width < 2:
            raise ValueError(f"width must be at least 2, got {width}")
        self.modalities, self.aligned_width = distinct(modalities), width // 2
        half = self.aligned_width
        self.shared = nn.ModuleDict({name: nn.Linear(width, half, bias=False) for name in modalities})
        self.private = nn.ModuleDict({name: nn.Linear(width, half, bias=False) for name in modalities})
        self.decode = nn.ModuleDict({name: nn.Linear(2 * half, width) for name in modalities})
        self.out = nn.Linear(2 * half, width, bias=False)

    def forward(self, vectors: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Disentangled:
        """Of N items.

        Args:
            vectors: `[N, d]` per modality; a name that is not there is missing for every item.
            present: bool `[N]` per modality; rows that are not present are not read.

        Raises:
            ValueError: none of the modalities, or another shape of a mask.
        """
        found = given(self.modalities, vectors, present)
        shared = {name: self.shared[name](x) for name, x in found.items()}
        private = {name: self.private[name](x) for name, x in found.items()}
        vector = self.out(torch.cat([mean_over(shared, present), mean_over(private, present)], dim=1))
        alike = [_correlated(shared[m], private[m], present[m]) for m in found]
        alike += [_correlated(private[m], private[n], present[m] & present[n]) for m, n in combinations(found, 2)]
        errors = [
            relative_error(self.decode[m](torch.cat([shared[m], private[m]], 1)), x, present[m])
            for m, x in found.items()
        ]
        losses = {"orthogonality": torch.stack(alike).mean(), "reconstruction": torch.stack(errors).mean()}
        return Disentangled(vector, shared, private, losses)


class FactorAttention(nn.Module):
    """By attention reweighting: each of K factors listens to the modalities by weights of its own (DMRL, Liu et al.,
    2022, arXiv:2203.05406).

    A modality's vector is projected and cut into K chunks, one per factor. Chunk k of the item's query, the mean over
    what there is, attends to the modalities' chunks k: the factors are the heads of one `cross_modal_attention`.
    `losses`: "independence", the mean distance correlation of every two chunks of a modality.

    Args:
        modalities: names, in the order of `weights`.
        width: d, a multiple of `factors`.
        factors: K, at least 2.
        sample: items that distance correlation, which is quadratic in them, is computed on: while training others in
            every step, by the global random state, otherwise the first ones.

    Attributes:
        weights: of the last call, `[N, K, M]`, without gradient: which modality each factor listened to.
    """

    def __init__(self, modalities: Sequence[str], width: int, *, factors: int = 4, sample: int = 256) -> None:
        super().__init__()
        if factors < 2 or width % factors:
            raise ValueError(f"factors must be at least 2 and divide width = {width}, got {factors}")
        if sample < 2:
            raise ValueError(f"sample must be at least 2, got {sample}")
        self.modalities, self.factors, self.sample = distinct(modalities), factors, sample
        self.aligned_width = width
        self.project = nn.ModuleDict({name: nn.Linear(width, width, bias=False) for name in modalities})
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.weights: Tensor | None = None

    def forward(self, vectors: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Disentangled:
        """See `SharedPrivate.forward`."""
        found = given(self.modalities, vectors, present)
        chunks = {name: self.project[name](x) for name, x in found.items()}
        query = self._factors(self.query(mean_over(chunks, present)))
        one_each = torch.arange(len(query) + 1, device=query.device)
        segments = [self._segment(chunks.get(name), query, one_each) for name in self.modalities]
        nobody = torch.ones_like(one_each[1:], dtype=torch.bool)
        absent = [~present[name] if name in chunks else nobody for name in self.modalities]
        bias = query.new_zeros(len(query), 1, len(absent)).masked_fill(torch.stack(absent, 1).unsqueeze(1), -torch.inf)
        heard = cross_modal_attention(query, segments, one_each, log_bias=bias, return_mass=True)
        assert heard.mass is not None
        self.weights = heard.mass.detach()
        loss = torch.stack([self._dependence(x[self._some(present[name])]) for name, x in chunks.items()]).mean()
        return Disentangled(self.out(heard.out.flatten(1)), chunks, {}, {"independence": loss})

    def _factors(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (self.factors, -1))

    def _segment(self, x: Tensor | None, query: Tensor, one_each: Tensor) -> Segment:
        if x is None:
            return Segment(query[:0], query[:0], torch.zeros_like(one_each))
        return Segment(self._factors(self.key(x)), self._factors(x), one_each)

    def _some(self, present: Tensor) -> Tensor:
        rows = present.nonzero().squeeze(1)
        if self.training and len(rows) > self.sample:
            rows = rows[torch.randperm(len(rows), device=rows.device)]
        return rows[: self.sample]

    def _dependence(self, x: Tensor) -> Tensor:
        chunks = self._factors(x)
        pairs = torch.combinations(torch.arange(self.factors))
        return torch.stack([distance_correlation(chunks[:, i], chunks[:, j]) for i, j in pairs.tolist()]).mean()


class PrototypeExperts(nn.Module):
    """By clusters: items belong to K prototypes, each of which has an encoder of its own (the concepts of MacridVAE, Ma
    et al., 2019, arXiv:1910.14238).

    The share of prototype k in an item, whose mean over modalities is x, is softmax_k(cos(x, c_k) / τ), by `route`
    over all K; the vector is Σ_k share_k · E_k(x), by `mixture_of_experts`. `losses`: "assignment", the mean entropy of
    an item's shares (low: items are sure) plus log K less the entropy of the mean share (low: all prototypes are used).

    Args:
        modalities: names.
        width: d.
        prototypes: K, at least 2.
        hidden: inner width of each encoder (SwiGLU).
        temperature: τ, in (0, 1].
    """

    def __init__(
        self, modalities: Sequence[str], width: int, *, prototypes: int = 8, hidden: int = 64, temperature: float = 0.1
    ) -> None:
        super().__init__()
        if prototypes < 2 or hidden < 1:
            raise ValueError(f"prototypes must be at least 2 and hidden at least 1, got {prototypes} and {hidden}")
        if not 0 < temperature <= 1:
            raise ValueError(f"temperature must be in (0, 1], got {temperature}")
        self.modalities, self.temperature, self.aligned_width = distinct(modalities), temperature, width
        self.prototypes = nn.Parameter(torch.empty(prototypes, width).normal_())
        self.w_in = nn.Parameter(torch.empty(prototypes, 2 * hidden, width).normal_(std=width**-0.5))
        self.w_out = nn.Parameter(torch.empty(prototypes, width, hidden).normal_(std=hidden**-0.5))

    def forward(self, vectors: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Disentangled:
        """See `SharedPrivate.forward`."""
        found = given(self.modalities, vectors, present)
        x = mean_over(found, present)
        count = len(self.prototypes)
        gate = F.normalize(self.prototypes, dim=1) / self.temperature
        someone = somewhere(found, present)
        routing = route(F.normalize(x, dim=1), gate, count, valid=someone, renormalize=False)
        vector = mixture_of_experts(x, routing, self.w_in, self.w_out)
        entropy, even = routing.losses.local_entropy, routing.losses.global_entropy
        # Where there is no item, neither entropy means anything.
        unused = torch.where(someone.any(), math.log(count) - even, 0)
        return Disentangled(vector, found, {}, {"assignment": (entropy + unused).sum()})


class GaussianExperts(nn.Module):
    """By a variational autoencoder: each modality says where the item lies and how sure it is, and the product of these
    says it for all (MVAE, Wu and Goodman, 2018, arXiv:1802.05335; MVGAE, Yi and Chen, 2021).

        q(z | x) ∝ N(0, 1) · Π_m N(μ_m, σ_m²):   1/σ² = 1 + Σ_m 1/σ_m²,   μ = σ² Σ_m μ_m / σ_m²

    over the modalities that the item has: a missing one only makes it less sure. While training z is drawn, otherwise
    it is μ; vector = W_o z. `losses`: "kl", KL(q ‖ N(0, 1)) per dimension, and "reconstruction" of each modality's
    vector from z, relative to its mean square.

    Args:
        modalities: names.
        width: d.
        latent: dimensions of z; None: d.
    """

    def __init__(self, modalities: Sequence[str], width: int, *, latent: int | None = None) -> None:
        super().__init__()
        self.modalities = distinct(modalities)
        size = width if latent is None else latent
        self.coders, self.aligned_width = GaussianCoders(modalities, width, size), size
        self.out = nn.Linear(size, width, bias=False)

    def forward(self, vectors: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Disentangled:
        """See `SharedPrivate.forward`."""
        found = given(self.modalities, vectors, present)
        alone = {name: self.coders.posterior(name, x) for name, x in found.items()}
        joint = product_of_gaussians(alone, present)
        z = self.coders.draw(joint)
        someone = somewhere(found, present)
        errors = [relative_error(self.coders.decode[name](z), x, present[name]) for name, x in found.items()]
        losses = {"kl": masked_mean(divergence(*joint), someone), "reconstruction": torch.stack(errors).mean()}
        vector = torch.where(someone.unsqueeze(1), self.out(z), 0)
        return Disentangled(vector, {name: mean for name, (mean, _) in alone.items()}, {}, losses)


def distance_correlation(a: Tensor, b: Tensor) -> Tensor:
    """dCor of n paired rows `[n, p]` and `[n, q]`, in [0, 1], 0-d: 0 for independent ones as n grows (Székely et al.,
    2007). 0 where a or b is constant, or n < 2."""
    if len(a) != len(b):
        raise ValueError(f"a and b must have as many rows, got {len(a)} and {len(b)}")
    if len(a) < 2:
        return a.sum() * 0
    centred = [_centred(_distances(x)) for x in (a, b)]
    covariance, left, right = (
        (x * y).mean() for x, y in ((centred[0], centred[1]), (centred[0],) * 2, (centred[1],) * 2)
    )
    tiny = torch.finfo(a.dtype).tiny
    product = left * right
    # Its root is taken where it has a slope only.
    safe = torch.where(product > tiny, product, 1)
    ratio = covariance / safe.sqrt()
    ratio = torch.where((product > tiny) & (ratio > torch.finfo(a.dtype).eps), ratio, 0)
    return torch.where(ratio > 0, torch.where(ratio > 0, ratio, 1).sqrt(), 0)


DISENTANGLERS = {
    "contrast": SharedPrivate,
    "attention": FactorAttention,
    "prototypes": PrototypeExperts,
    "vae": GaussianExperts,
}


def disentangler(kind: str, modalities: Sequence[str], width: int) -> nn.Module:
    """The module of `DISENTANGLERS` called `kind`, with its defaults.

    Raises:
        ValueError: no such kind.
    """
    if kind not in DISENTANGLERS:
        raise ValueError(f"kind must be one of {tuple(DISENTANGLERS)}, got {kind!r}")
    return DISENTANGLERS[kind](modalities, width)


def _correlated(a: Tensor, b: Tensor, both: Tensor) -> Tensor:
    """‖C‖²_F / width of the correlations of a's entries with b's, over the rows that have both; 0 for fewer than two
    rows, and for entries that do not vary."""
    count = both.sum().clamp(min=1)
    columns = []
    for x in (a, b):
        x = torch.where(both.unsqueeze(1), x, 0)
        x = torch.where(both.unsqueeze(1), x - x.sum(0) / count, 0)
        square = x.square().sum(0)
        varies = square > torch.finfo(x.dtype).eps ** 2
        columns.append(torch.where(varies, x * torch.where(varies, square, 1).rsqrt(), 0))
    return (columns[0].T @ columns[1]).square().sum() / a.shape[1]


def _distances(x: Tensor) -> Tensor:
    squared = (x.unsqueeze(1) - x.unsqueeze(0)).square().sum(2)
    apart = squared > 0  # the root of 0 has no slope
    return torch.where(apart, torch.where(apart, squared, 1).sqrt(), 0)


def _centred(distances: Tensor) -> Tensor:
    return distances - distances.mean(0) - distances.mean(1, keepdim=True) + distances.mean()
