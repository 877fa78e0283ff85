"""Alignment: the modalities of one item are pulled together, in five ways behind one call."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations, permutations, product

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmrec_kernels import info_nce_pairs

from ..bottleneck import Adapter
from .gaussian import GaussianCoders, divergence
from .masked import distinct, given, masked_mean, relative_error

__all__ = [
    "ALIGNMENTS",
    "Adapter",
    "BootstrapAlignment",
    "GaussianAlignment",
    "ModalityAlignment",
    "ProjectionAlignment",
    "alignment",
]

_MAX_SCALE = 100.0


class ModalityAlignment(nn.Module):
    """Symmetric InfoNCE between every two modalities, in a space of its own (CLIP, Radford et al., 2021).

    Each modality gets a head of its own; the cosine is multiplied by a learned scale, at most 100 as in CLIP. Rows that
    lack one of two modalities count neither as positives nor as negatives of that pair.

    Args:
        modalities: names.
        width: d of the embeddings that come in.
        dim: width of the common space.
        pairs: which two modalities to align; None means all.
        scale: initial factor on the cosine (1 / temperature).
        heads: "linear", or "adapter": x + W_up GELU(W_down LayerNorm(x)), which starts as the identity and has an
            eighth of the width inside (VIP5, arXiv:2305.14302, and IISAN, arXiv:2404.02059, align by adapters); `dim`
            is then d.
    """

    def __init__(
        self,
        modalities: Sequence[str],
        width: int,
        *,
        dim: int | None = None,
        pairs: Sequence[tuple[str, str]] | None = None,
        scale: float = 10.0,
        heads: str = "linear",
    ) -> None:
        super().__init__()
        if heads not in ("linear", "adapter"):
            raise ValueError(f"heads must be 'linear' or 'adapter', got {heads!r}")
        if heads == "adapter" and dim not in (None, width):
            raise ValueError(f"dim must be None or the width, {width}, with adapters as heads, got {dim}")
        self.pairs = list(combinations(modalities, 2)) if pairs is None else list(pairs)
        unknown = {name for pair in self.pairs for name in pair} - set(modalities)
        if unknown:
            raise ValueError(f"pairs name {sorted(unknown)}, which are not among the modalities {list(modalities)}")
        if not 0 < scale <= _MAX_SCALE:
            raise ValueError(f"scale must be in (0, {_MAX_SCALE:g}], got {scale}")
        self.heads = nn.ModuleDict(
            {
                name: Adapter(width) if heads == "adapter" else nn.Linear(width, dim or width, bias=False)
                for name in modalities
            }
        )
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))

    def forward(self, embeddings: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Tensor:
        """The mean over pairs of their losses, 0-d.

        Args:
            embeddings: `[N, d]` per modality, row n of each belongs to item n.
            present: bool `[N]` per modality; rows that are not present are not read.
        """
        pairs = [(a, b) for a, b in self.pairs if a in embeddings and b in embeddings]
        if not pairs:
            return self.log_scale.new_zeros(())
        names = sorted({name for pair in pairs for name in pair})
        projected = {name: self.heads[name](embeddings[name]) for name in names}
        return info_nce_pairs(
            projected,
            pairs,
            mask={name: present[name] for name in projected},
            scale=self.log_scale.exp().clamp(max=_MAX_SCALE),
            pair_weight=1.0 / len(pairs),
            normalize=True,
        )


class ProjectionAlignment(nn.Module):
    """Each other modality is projected into the space of the first one (CoLLM, arXiv:2310.19488, and LLaRA,
    arXiv:2312.02445, whose projectors take what collaborative filtering knows to a language model's space).

    The loss is the mean over the other modalities of 1 − cos(W_2 GELU(W_1 x_m), x_first), over the items that have
    both. The first modality is the target: no gradient reaches it, so it cannot come nearer by knowing less.

    Args:
        modalities: names, at least two, the target first.
        width: d.
        hidden: inner width of the projectors; None: d.
    """

    def __init__(self, modalities: Sequence[str], width: int, *, hidden: int | None = None) -> None:
        super().__init__()
        self.target, *others = distinct(modalities)
        inner = width if hidden is None else hidden
        self.project = nn.ModuleDict(
            {name: nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width)) for name in others}
        )

    def forward(self, embeddings: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Tensor:
        """See `ModalityAlignment.forward`."""
        found = given([self.target, *self.project], embeddings, present)
        target = found.pop(self.target, None)
        if target is None or not found:
            return next(self.parameters(), torch.zeros(())).new_zeros(())
        has = present[self.target]
        apart = [_apart(self.project[name](x), target.detach(), has & present[name]) for name, x in found.items()]
        return torch.stack(apart).mean()


class BootstrapAlignment(nn.Module):
    """Without negatives: one modality's vector predicts the others' and its own, from which part is dropped (BM3, Zhou
    et al., 2023, arXiv:2207.05969, after BYOL, Grill et al., 2020, arXiv:2006.07733).

        mean over ordered pairs a ≠ b of 1 − cos(P x_a, drop(sg x_b))  +  mean over a of 1 − cos(P x_a, drop(sg x_a))

    over the items that have both. P is one linear map for all; sg stops the gradient, without which everything would
    become one point.

    Args:
        modalities: names.
        width: d.
        dropout: share of a target's entries that is dropped while training.
    """

    def __init__(self, modalities: Sequence[str], width: int, *, dropout: float = 0.3) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.modalities = distinct(modalities)
        self.predict = nn.Linear(width, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, embeddings: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Tensor:
        """See `ModalityAlignment.forward`."""
        found = given(self.modalities, embeddings, present)
        said = {name: self.predict(x) for name, x in found.items()}
        total = said[next(iter(found))].new_zeros(())
        for group in (permutations(found, 2), ((name, name) for name in found)):
            apart = [_apart(said[a], self.drop(found[b].detach()), present[a] & present[b]) for a, b in group]
            total = total + (torch.stack(apart).mean() if apart else 0)
        return total


class GaussianAlignment(nn.Module):
    """By variational autoencoders with one latent space: each modality's posterior has to lie where the others' do, and
    each modality is decoded from every other one's (CADA-VAE, Schönfeld et al., 2019, arXiv:1812.01784).

        mean over ordered pairs a, b of E(D_b(z_a), x_b)  +  mean over pairs of √(‖μ_a − μ_b‖² + ‖σ_a − σ_b‖²) / √z
        + kl · mean over a of KL(q_a ‖ N(0, 1)) per dimension

    over the items that have both; E is the squared error relative to the mean square of x_b, z the latent width. While
    training z_a is drawn, otherwise it is μ_a.

    Args:
        modalities: names.
        width: d.
        latent: width of the latent space; None: d.
        kl: weight of the divergence from N(0, 1).
    """

    def __init__(self, modalities: Sequence[str], width: int, *, latent: int | None = None, kl: float = 0.01) -> None:
        super().__init__()
        if not kl >= 0:
            raise ValueError(f"kl must be ≥ 0, got {kl}")
        self.modalities, self.kl = distinct(modalities), kl
        self.coders = GaussianCoders(modalities, width, width if latent is None else latent)

    def forward(self, embeddings: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Tensor:
        """See `ModalityAlignment.forward`."""
        found = given(self.modalities, embeddings, present)
        posteriors = {name: self.coders.posterior(name, x) for name, x in found.items()}
        drawn = {name: self.coders.draw(posterior) for name, posterior in posteriors.items()}
        errors = [
            relative_error(self.coders.decode[b](drawn[a]), found[b], present[a] & present[b])
            for a, b in product(found, repeat=2)
        ]
        total = torch.stack(errors).mean()
        total = (
            total
            + self.kl
            * torch.stack(
                [masked_mean(divergence(mean, variance), present[a]) for a, (mean, variance) in posteriors.items()]
            ).mean()
        )
        apart = [
            masked_mean(_wasserstein(posteriors[a], posteriors[b]), present[a] & present[b])
            for a, b in combinations(found, 2)
        ]
        return total + (torch.stack(apart).mean() if apart else 0)


ALIGNMENTS = ("infonce", "adapters", "projection", "bootstrap", "vae")


def alignment(kind: str, modalities: Sequence[str], width: int) -> nn.Module:
    """The alignment called `kind`, with its defaults: "infonce" is `ModalityAlignment`, "adapters" the same with
    adapters as heads, "projection", "bootstrap" and "vae" the modules of these names. All are called as it is.

    Raises:
        ValueError: no such kind.
    """
    made: dict[str, Callable[[], nn.Module]] = {
        "infonce": lambda: ModalityAlignment(modalities, width),
        "adapters": lambda: ModalityAlignment(modalities, width, heads="adapter"),
        "projection": lambda: ProjectionAlignment(modalities, width),
        "bootstrap": lambda: BootstrapAlignment(modalities, width),
        "vae": lambda: GaussianAlignment(modalities, width),
    }
    if kind not in made:
        raise ValueError(f"kind must be one of {ALIGNMENTS}, got {kind!r}")
    return made[kind]()


def _apart(a: Tensor, b: Tensor, both: Tensor) -> Tensor:
    """Mean of 1 − cosine over the rows that have both; 0 without any."""
    return masked_mean(1 - F.cosine_similarity(a, b, dim=1), both)


def _wasserstein(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> Tensor:
    """`[N]`, the 2-Wasserstein distance of diagonal Gaussians (mean, variance), over the root of their width."""
    squared = (a[0] - b[0]).square() + (a[1].sqrt() - b[1].sqrt()).square()
    # The root of 0 has no slope.
    return squared.mean(1).clamp(min=torch.finfo(squared.dtype).eps).sqrt()
