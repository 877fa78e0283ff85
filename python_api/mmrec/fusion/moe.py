"""Experts chosen per modality: some for everybody, some for one modality only.

Private and shared experts are the disentangling step: what modalities have in common can go through the shared
experts, what is particular to one goes through its own (cf. Shazeer et al., 2017, arXiv:1701.06538; Ma et al., MMoE,
KDD 2018; Tang et al., PLE, RecSys 2020).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mmrec_kernels import RouterLosses, Routing, mixture_of_experts, route

__all__ = ["ModalityMoE"]

_SCORES = ("softmax", "topk_softmax", "sigmoid")


class ModalityMoE(nn.Module):
    """Residual pre-norm mixture of SwiGLU experts, routed by token and modality: y = x + MoE(LayerNorm(x)).

    Args:
        width: d of the tokens.
        num_modalities: M.
        shared: experts that every modality may use.
        private: experts per modality that no other modality may use.
        hidden: f, inner width of an expert.
        k: experts per token.
        score: of the allowed experts, as in `route`: "softmax", "topk_softmax" or "sigmoid".
        bias_rate: > 0 adds a bias per modality and expert to the scores that select, and to nothing else: `update_bias`
            moves it by so much at a time. Balance without a loss (Wang et al., 2024, arXiv:2408.15664, who take 0.001
            with "sigmoid").
        dropout: on the mixture's output.
    """

    allowed: Tensor
    bias: Tensor | None

    def __init__(
        self,
        width: int,
        num_modalities: int,
        *,
        shared: int = 2,
        private: int = 1,
        hidden: int = 64,
        k: int = 2,
        score: str = "softmax",
        bias_rate: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if shared < 0 or private < 0:
            raise ValueError(f"shared and private must be ≥ 0, got {shared} and {private}")
        if not 1 <= k <= shared + private:
            raise ValueError(f"k must be in [1, shared + private = {shared + private}], got {k}")
        if score not in _SCORES:
            raise ValueError(f"score must be one of {_SCORES}, got {score!r}")
        if not 0 <= bias_rate < math.inf:
            raise ValueError(f"bias_rate must be finite and ≥ 0, got {bias_rate}")
        num_experts = shared + num_modalities * private
        self.k = k
        self.score = score
        self.bias_rate = bias_rate
        self.num_modalities = num_modalities
        self.norm = nn.LayerNorm(width)
        self.gate = nn.Parameter(torch.empty(num_experts, width).normal_(std=width**-0.5))
        self.w_in = nn.Parameter(torch.empty(num_experts, 2 * hidden, width).normal_(std=width**-0.5))
        # Zero: at first every token passes unchanged.
        self.w_out = nn.Parameter(torch.zeros(num_experts, width, hidden))
        owner = torch.full((num_experts,), -1)
        owner[shared:] = torch.arange(num_modalities).repeat_interleave(private)
        allowed = (owner == -1) | (owner == torch.arange(num_modalities).unsqueeze(1))
        self.register_buffer("allowed", allowed, persistent=False)
        self.register_buffer("bias", torch.zeros(num_modalities, num_experts) if bias_rate else None)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, modality: Tensor) -> tuple[Tensor, Routing]:
        """Tokens `x [T, d]` of `modality int [T]` (−1 = absent: passed through unchanged) to `[T, d]` and their
        routing.

        `routing.losses` are the raw losses per modality, for `penalty`; `routing.stats[..., 0]` counts the tokens of
        each modality and expert, for `update_bias`.
        """
        normed = self.norm(x)
        routing = route(
            normed, self.gate, self.k, modality=modality, allowed=self.allowed, score=self.score, bias=self.bias
        )
        return x + self.dropout(mixture_of_experts(normed, routing, self.w_in, self.w_out)), routing

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ModalityMoE:
        bias = self.bias
        super()._apply(fn, recurse)
        # In 16 bits its small steps would soon round to nothing.
        if bias is not None and self.bias is not None and self.bias.dtype.itemsize < 4:
            self.bias = bias.to(self.bias.device)
        return self

    @torch.no_grad()
    def update_bias(self, counts: Tensor) -> None:
        """Moves the bias of each allowed expert by `bias_rate`: up if it had fewer tokens of the modality than the mean
        of its allowed experts, down if more. For after each optimiser step; with `bias_rate` 0 it does nothing.

        Args:
            counts: `[M, E]`, `routing.stats[..., 0]` of the step: summed over its parts and, in data-parallel training,
                over processes, so that all move alike.

        Raises:
            ValueError: another shape.
        """
        if counts.shape != self.allowed.shape:
            raise ValueError(f"counts must have shape {list(self.allowed.shape)}, got {list(counts.shape)}")
        if self.bias is None:
            return
        mean = counts.sum(1, keepdim=True) / self.allowed.sum(1, keepdim=True)
        step = torch.where(self.allowed, (mean - counts).sign(), 0)
        self.bias.add_(step.to(self.bias.dtype), alpha=self.bias_rate)

    @staticmethod
    def penalty(
        losses: RouterLosses, balance: float, z: float, local_entropy: float = 0.0, global_entropy: float = 0.0
    ) -> Tensor:
        """balance · mean_m balance_m + z · mean_m z_m + local_entropy · mean_m local_m − global_entropy · mean_m
        global_m, with the given coefficients: the last two make tokens sure of their experts and modalities use many
        (LIMoE, arXiv:2206.02770)."""
        kept = balance * losses.balance.mean() + z * losses.z.mean()
        return kept + local_entropy * losses.local_entropy.mean() - global_entropy * losses.global_entropy.mean()
