"""Routing by modality: the mathematics, in plain torch and in any dtype. The oracle of the tests and the fallback.

The present tokens of a modality and the experts that it may use are a dense router of their own: [n, e] logits, nothing
masked, nothing of other tokens or experts read. With u = l (softmax) or log σ(l) (sigmoid), p̄ = softmax(u) for every
score, and the renormalised weights are the softmax of the selected u, which survives an underflow of p̄. The backward is
closed form; it recomputes the logits and reads the selection and the sums over tokens from the forward's results.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, pad

from .. import library
from ..schemas import statistics_dtype

BALANCE, Z, LOCAL_ENTROPY, GLOBAL_ENTROPY = range(4)


def forward(
    x: Tensor,
    gate_weight: Tensor,
    modality: Tensor | None,
    allowed: Tensor | None,
    bias: Tensor | None,
    valid: Tensor | None,
    k: int,
    num_modalities: int,
    score: str,
    renormalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weights and experts of each token, statistics and losses of each modality (shapes: `schemas.routing_forward`)."""
    check_modality(modality, num_modalities)
    dtype, num_tokens, num_experts = statistics_dtype(x.dtype), x.shape[0], gate_weight.shape[0]
    weights = x.new_zeros((num_tokens, k), dtype=dtype)
    experts = x.new_full((num_tokens, k), -1, dtype=torch.int32)
    stats = x.new_zeros((num_modalities, num_experts, 3), dtype=dtype)
    losses = x.new_zeros((4, num_modalities), dtype=dtype)
    for m, tokens, choices in _modalities(num_tokens, num_experts, num_modalities, modality, allowed, valid, x.device):
        logits = _logits(x[tokens], gate_weight[choices], dtype)
        log_score = _log_score(logits, score)
        p = log_score.softmax(1)
        selected = _select(logits, p, None if bias is None else bias[m, choices].to(dtype), k, score)
        weight = _weights(logits, log_score, p, selected, score, renormalize)
        unused = (0, k - selected.shape[1])
        weights[tokens] = pad(weight, unused)
        experts[tokens] = pad(choices[selected], unused, value=-1).to(torch.int32)
        count = torch.zeros_like(p).scatter_(1, selected, 1).sum(0)
        weight_sum = torch.zeros_like(p).scatter_(1, selected, weight).sum(0)
        stats[m, choices] = torch.stack([count, p.sum(0), weight_sum], 1)

        mean = p.mean(0)
        losses[BALANCE, m] = len(choices) * (count / count.sum() * mean).sum()
        losses[Z, m] = logits.logsumexp(1).square().mean()
        losses[LOCAL_ENTROPY, m] = torch.special.entr(p).sum(1).mean()
        losses[GLOBAL_ENTROPY, m] = torch.special.entr(mean).sum()
    return weights, experts, stats, losses


def backward(
    grad_weights: Tensor | None,
    grad_losses: Tensor | None,
    x: Tensor,
    gate_weight: Tensor,
    modality: Tensor | None,
    allowed: Tensor | None,
    valid: Tensor | None,
    weights: Tensor,
    experts: Tensor,
    stats: Tensor,
    score: str,
    renormalize: bool,
    need_x: bool,
    need_gate_weight: bool,
) -> tuple[Tensor, Tensor]:
    """dx = dl W and dW = dlᵀ x, modality by modality. Selection and counts are piecewise constant: no gradient."""
    dtype, num_experts = statistics_dtype(x.dtype), gate_weight.shape[0]
    dx = torch.zeros_like(x, memory_format=torch.contiguous_format) if need_x else x.new_empty(0)
    dgate = x.new_zeros(gate_weight.shape, dtype=dtype) if need_gate_weight else x.new_empty(0, dtype=dtype)
    place = torch.zeros(num_experts, dtype=torch.int64, device=x.device)
    for m, tokens, choices in _modalities(x.shape[0], num_experts, stats.shape[0], modality, allowed, valid, x.device):
        logits = _logits(x[tokens], gate_weight[choices], dtype)
        slots = min(weights.shape[1], len(choices))
        place[choices] = torch.arange(len(choices), device=x.device)
        dlogits = _logits_gradient(
            logits,
            None if grad_losses is None else grad_losses[:, m].to(dtype),
            stats[m, choices],
            None if grad_weights is None else grad_weights[tokens, :slots].to(dtype),
            weights[tokens, :slots],
            place[experts[tokens, :slots].long()],
            score,
            renormalize,
        )
        if need_x:
            dx[tokens] = (dlogits @ gate_weight[choices].to(dtype)).to(x.dtype)
        if need_gate_weight:
            dgate[choices] += dlogits.T @ x[tokens].to(dtype)
    return dx, dgate.to(gate_weight.dtype)


def _logits_gradient(
    logits: Tensor,
    grad_losses: Tensor | None,
    stats: Tensor,
    grad_weight: Tensor | None,
    weight: Tensor,
    selected: Tensor,
    score: str,
    renormalize: bool,
) -> Tensor:
    """dl [n, e] from the gradients of the four losses (`[4]`) and of the weights (`[n, slots]`).

    dp collects the gradient of p̄; through the softmax, du = p̄ (dp − Σ p̄ dp); through log σ, dl = du σ(−l).
    """
    p = _log_score(logits, score).softmax(1)
    dp, du, dl = torch.zeros_like(p), torch.zeros_like(p), torch.zeros_like(p)
    if grad_losses is not None:
        num_tokens, num_choices = p.shape
        fraction, mean = stats[:, 0] / stats[:, 0].sum(), stats[:, 1] / num_tokens
        # Where the mean underflows to 0 so does every p̄ of the column, and with it the gradient: −p̄ log(mean) → 0.
        dentropy = torch.where(mean == 0, 0, -mean.log() - 1)
        dp += (grad_losses[BALANCE] * num_choices * fraction + grad_losses[GLOBAL_ENTROPY] * dentropy) / num_tokens
        entropy = torch.special.entr(p)
        du += grad_losses[LOCAL_ENTROPY] / num_tokens * (entropy - p * entropy.sum(1, keepdim=True))
        dl += grad_losses[Z] / num_tokens * 2 * logits.logsumexp(1, keepdim=True) * logits.softmax(1)
    if grad_weight is not None:
        if renormalize or score == "topk_softmax":
            centred = grad_weight - (weight * grad_weight).sum(1, keepdim=True)
            du.scatter_add_(1, selected, weight * centred)
        elif score == "sigmoid":
            at = logits.gather(1, selected)
            dl.scatter_add_(1, selected, grad_weight * at.sigmoid() * (-at).sigmoid())
        else:
            dp.scatter_add_(1, selected, grad_weight)
    du += p * (dp - (p * dp).sum(1, keepdim=True))
    return dl + (du * (-logits).sigmoid() if score == "sigmoid" else du)


def check_modality(modality: Tensor | None, num_modalities: int) -> None:
    if modality is None or not modality.numel() or not (modality.device.type == "cpu" or library.check_requested()):
        return
    low, high = int(modality.min()), int(modality.max())
    if low < -1 or high >= num_modalities:
        raise ValueError(f"modality must be in [0, {num_modalities}) or -1 for absent, got values from {low} to {high}")


def _modalities(
    num_tokens: int,
    num_experts: int,
    num_modalities: int,
    modality: Tensor | None,
    allowed: Tensor | None,
    valid: Tensor | None,
    device: torch.device,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(m, its present tokens, its allowed experts), for each modality that has both."""
    present = torch.ones(num_tokens, dtype=torch.bool, device=device) if valid is None else valid
    for m in range(num_modalities):
        tokens = (present if modality is None else present & (modality == m)).nonzero()[:, 0]
        choices = torch.arange(num_experts, device=device) if allowed is None else allowed[m].nonzero()[:, 0]
        if len(tokens) and len(choices):
            yield m, tokens, choices


def _logits(x: Tensor, gate_weight: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) @ gate_weight.to(dtype).T


def _log_score(logits: Tensor, score: str) -> Tensor:
    return logsigmoid(logits) if score == "sigmoid" else logits


def _select(logits: Tensor, p: Tensor, bias: Tensor | None, k: int, score: str) -> Tensor:
    """The `min(k, e)` columns with the highest key = score + bias, ties to the lower id; NaN ranks first.

    Every score grows with its logit, so without a bias the logits themselves are compared: a score that underflows or
    saturates makes no ties.
    """
    key = logits
    if bias is not None:
        key = {"softmax": p, "topk_softmax": logits, "sigmoid": logits.sigmoid()}[score] + bias
    return key.sort(dim=1, descending=True, stable=True).indices[:, :k]


def _weights(logits: Tensor, log_score: Tensor, p: Tensor, selected: Tensor, score: str, renormalize: bool) -> Tensor:
    if renormalize or score == "topk_softmax":
        weight = log_score.gather(1, selected).softmax(1)
    else:
        weight = (logits.sigmoid() if score == "sigmoid" else p).gather(1, selected)
    return weight.masked_fill(logits.isnan().any(1, keepdim=True), torch.nan)
