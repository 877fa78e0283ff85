"""Experts chosen per modality: some for everybody, some for one modality only.

Private and shared experts are the disentangling step: what modalities have in common can go through the shared
experts, what is particular to one goes through its own (cf. Shazeer et al., 2017, arXiv:1701.06538; Ma et al., MMoE,
KDD 2018; Tang et al., PLE, RecSys 2020).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmrec_kernels import RouterLosses, Routing, mixture_of_experts, route

__all__ = ["ModalityMoE"]


class ModalityMoE(nn.Module):
    """Residual pre-norm mixture of SwiGLU experts, routed by token and modality: y = x + MoE(LayerNorm(x)).

    Args:
        width: d of the tokens.
        num_modalities: M.
        shared: experts that every modality may use.
        private: experts per modality that no other modality may use.
        hidden: f, inner width of an expert.
        k: experts per token.
        dropout: on the mixture's output.
    """

    allowed: Tensor

    def __init__(
        self,
        width: int,
        num_modalities: int,
        *,
        shared: int = 2,
        private: int = 1,
        hidden: int = 64,
        k: int = 2,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if shared < 0 or private < 0:
            raise ValueError(f"shared and private must be ≥ 0, got {shared} and {private}")
        if not 1 <= k <= shared + private:
            raise ValueError(f"k must be in [1, shared + private = {shared + private}], got {k}")
        num_experts = shared + num_modalities * private
        self.k = k
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
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, modality: Tensor) -> tuple[Tensor, Routing]:
        """Tokens `x [T, d]` of `modality int [T]` (−1 = absent: passed through unchanged) to `[T, d]` and their
        routing.

        `routing.losses` are the raw balance and z losses per modality; `routing.stats` counts tokens per expert.
        """
        normed = self.norm(x)
        routing = route(normed, self.gate, self.k, modality=modality, allowed=self.allowed)
        return x + self.dropout(mixture_of_experts(normed, routing, self.w_in, self.w_out)), routing

    @staticmethod
    def penalty(losses: RouterLosses, balance: float, z: float) -> Tensor:
        """balance · mean_m balance_m + z · mean_m z_m, with the given coefficients."""
        return balance * losses.balance.mean() + z * losses.z.mean()
