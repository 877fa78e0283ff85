"""InfoNCE: contrastive and full-softmax losses over all pairs of queries and keys, from one matrix of logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, overload

import torch
from torch import Tensor

from .. import library
from ..validation import check_index
from . import arguments, loss, reference
from .autograd import Problem
from .loss import InfoNCEStats

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["InfoNCEStats", "info_nce", "info_nce_pairs"]

Reduction = Literal["mean", "sum", "none"]


@overload
def info_nce(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | Tensor = ...,
    symmetric: bool = ...,
    target: Tensor | None = ...,
    query_ids: Tensor | None = ...,
    key_ids: Tensor | None = ...,
    exclude: tuple[Tensor, Tensor] | None = ...,
    log_q: Tensor | None = ...,
    log_q_of_positive: bool = ...,
    weight: Tensor | None = ...,
    normalize: bool = ...,
    label_smoothing: float = ...,
    reduction: Reduction = ...,
    workspace_bytes: int | None = ...,
    group: ProcessGroup | None = ...,
    ring: bool = ...,
    return_stats: Literal[False] = ...,
) -> Tensor: ...


@overload
def info_nce(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | Tensor = ...,
    symmetric: bool = ...,
    target: Tensor | None = ...,
    query_ids: Tensor | None = ...,
    key_ids: Tensor | None = ...,
    exclude: tuple[Tensor, Tensor] | None = ...,
    log_q: Tensor | None = ...,
    log_q_of_positive: bool = ...,
    weight: Tensor | None = ...,
    normalize: bool = ...,
    label_smoothing: float = ...,
    reduction: Reduction = ...,
    workspace_bytes: int | None = ...,
    group: ProcessGroup | None = ...,
    ring: bool = ...,
    return_stats: Literal[True],
) -> tuple[Tensor, InfoNCEStats]: ...


def info_nce(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | Tensor = 1.0,
    symmetric: bool = True,
    target: Tensor | None = None,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    exclude: tuple[Tensor, Tensor] | None = None,
    log_q: Tensor | None = None,
    log_q_of_positive: bool = True,
    weight: Tensor | None = None,
    normalize: bool = False,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    workspace_bytes: int | None = None,
    group: ProcessGroup | None = None,
    ring: bool = False,
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, InfoNCEStats]:
    """InfoNCE of every query against every key, in one direction or both, from one matrix of logits.

    With `S_ij = scale_i · q_i · k_j − log_q_j` and `LSE_neg` over the kept negatives only,

        row_i = softplus(LSE_{j ≠ t_i} S_ij − S_{i,t_i})
        col_i = softplus(LSE_{i': t_i' ≠ t_i} S_{i',t_i} − S_{i,t_i})
        l_i = row_i, or (row_i + col_i) / 2 if `symmetric`

    which is cross-entropy, exact also near zero: the positive's gradient is −sigmoid(LSE_neg − s_pos), never p − 1.

    Args:
        query: `[Nq, D]`, float32, bfloat16 or float64 (float16 on GPU). Logits and sums: float32 (float64 for float64).
        key: `[Nk, D]`, the dtype of `query`. A whole catalogue as `key` with `target` and `symmetric=False` is the full
            softmax.
        scale: the inverse temperature: a float, or a tensor, 0-d or `[Nq]`, which gets a gradient.
        symmetric: adds the column direction, over the keys that are a row's positive.
        target: int `[Nq]`, the key of each row; by default row i wants key i, and keys from Nq on are shared hard
            negatives. A row with a negative target has no term of its own; in the column direction it stays a negative.
        query_ids: int `[Nq]`, the id of the key that row i wants; by default `key_ids[target]`. Needs `key_ids`.
        key_ids: int `[Nk]`. Accidental hits: the pair (i, j) is left out in both directions if j is not the target and
            `key_ids[j] == query_ids[i] ≥ 0`.
        exclude: `(offsets int[Nq+1], positions int[≥ offsets[Nq]])`: row i also leaves out the keys
            `positions[offsets[i]:offsets[i+1]]`. Any order; duplicates, negative positions and the row's own target are
            ignored.
        log_q: `[Nk]` floating and finite, the natural logarithm of each key's sampling probability (Bengio & Senécal
            2008); it gets a gradient. It cancels in the column direction.
        log_q_of_positive: False subtracts log_q from the negatives of row_i only: the positive is there with
            probability 1, not sampled (Khrylchenko et al. 2025). Then log_q is the logarithm of how often the key is
            expected among the negatives, number of draws times probability, for a constant no longer cancels.
        weight: `[Nq]` floating, multiplies l_i; it gets a gradient.
        normalize: replaces every query and key by x / max(‖x‖₂, 1e-12), in float32; zero rows get gradient 0.
        label_smoothing: ε in [0, 1]: the row term becomes (1−ε)·row_i + ε·(lse_i − mean of S over the kept keys).
        reduction: "mean": Σ w_i·l_i / Σ w_i over the rows that have a term, 0 if there is none; "sum": Σ w_i·l_i;
            "none": w_i·l_i, `[Nq]`.
        workspace_bytes: the largest matrix of logits that may be held, by default 1 GiB. Above it the logits are made
            in blocks of rows and again in the backward.
        group: a process group: each rank passes its own rows (counts may differ), `target` and `exclude` index its own
            keys, negatives come from all ranks. See `mmrec_kernels.infonce.group` for what is returned.
        ring: with `group`: the keys go from rank to rank while logits are made, and again in the backward, instead of
            being gathered on every rank.
        return_stats: also returns `InfoNCEStats` of the row direction, detached.

    Returns:
        The loss, float32 (float64 for float64 inputs), or `(loss, stats)`. It is that of van den Oord et al. 2018,
        symmetric as in Radford et al. 2021, with the logQ correction of Yi et al. 2019. Double backward raises.

    Raises:
        TypeError, ValueError: a wrong dtype, shape, device or flag; on CPU also a target or a listed position that is
            not below Nk, or offsets that decrease or leave their list.
    """
    problem = arguments.problem(
        query, key, scale=scale, symmetric=symmetric, target=target, query_ids=query_ids, key_ids=key_ids,
        exclude=exclude, log_q=log_q, normalize=normalize,
    )  # fmt: skip
    workspace_bytes = arguments.check_options(label_smoothing, reduction, workspace_bytes)
    value, stats = _loss_over(group, ring)(
        problem,
        weight=arguments.check_weight(weight, query),
        label_smoothing=label_smoothing,
        reduction=reduction,
        workspace_bytes=workspace_bytes,
        return_stats=arguments.check_flag("return_stats", return_stats),
        log_q_of_positive=arguments.check_flag("log_q_of_positive", log_q_of_positive),
    )
    return value if stats is None else (value, stats)


def info_nce_pairs(
    embeddings: Mapping[str, Tensor],
    pairs: Sequence[tuple[str, str]],
    *,
    mask: Mapping[str, Tensor] | None = None,
    scale: float | Tensor = 1.0,
    pair_weight: float | Tensor = 1.0,
    symmetric: bool = True,
    ids: Tensor | None = None,
    weight: Tensor | None = None,
    normalize: bool = False,
    label_smoothing: float = 0.0,
    reduction: Reduction = "mean",
    workspace_bytes: int | None = None,
    group: ProcessGroup | None = None,
    ring: bool = False,
) -> Tensor:
    """Alignment of several modalities: the weighted sum of one `info_nce` per pair of modalities, row i matching row i.

    Args:
        embeddings: `{name: [N, D]}`; the two of a pair have one width and dtype.
        pairs: `[(a, b), …]`: the rows of `a` are queries, those of `b` keys.
        mask: `{name: bool[N]}`, True where the modality is present; a name that is not listed is present everywhere. A
            row missing in a or b leaves numerator, negatives and mean of that pair, and is not read.
        scale: a float, or a tensor, 0-d or `[P]` for one inverse temperature per pair; it gets a gradient.
        pair_weight: a float, or a tensor, 0-d or `[P]`; it gets a gradient.
        ids: int `[N]`: two rows with the same id ≥ 0 are not each other's negatives.
        weight: `[N]` floating, the weight of each row.
        reduction: "mean" or "sum" over the rows of each pair, then Σ_p pair_weight_p · loss_p; "none": `[P]`, the terms
            pair_weight_p · loss_p of that sum with loss_p a mean.
        symmetric, normalize, label_smoothing, workspace_bytes, group, ring: as in `info_nce`.

    Returns:
        The loss, float32 (float64 for float64 inputs): 0-d, or `[P]`.

    Raises:
        TypeError, ValueError: as `info_nce`; also an unknown name in `pairs` or `mask`, or no pairs.
    """
    first = arguments.check_pairs(embeddings, pairs, mask)
    scales = arguments.factors("scale", scale, len(pairs), first).expand(len(pairs))
    pair_weights = arguments.factors("pair_weight", pair_weight, len(pairs), first)
    weight = arguments.check_weight(weight, first)
    symmetric, normalize = arguments.check_flag("symmetric", symmetric), arguments.check_flag("normalize", normalize)
    workspace_bytes = arguments.check_options(label_smoothing, reduction, workspace_bytes)
    if ids is not None:
        ids = check_index("ids", ids, (first.shape[0],), device=first.device)
    run = _loss_over(group, ring)
    losses = []
    for p, (a, b) in enumerate(pairs):
        present = _both(mask, a, b)
        value, _ = run(
            Problem(embeddings[a], embeddings[b], scales[p : p + 1], None, present, present, ids, ids, None, None, None,
                    symmetric, normalize),
            weight=weight,
            label_smoothing=label_smoothing,
            reduction="mean" if reduction == "none" else reduction,
            workspace_bytes=workspace_bytes,
            return_stats=False,
        )  # fmt: skip
        losses.append(value)
    terms = pair_weights * torch.stack(losses)
    return terms if reduction == "none" else terms.sum()


def _both(mask: Mapping[str, Tensor] | None, a: str, b: str) -> Tensor | None:
    """Where a and b are both present; None where both are present everywhere."""
    masks = [mask[name] for name in (a, b) if mask is not None and name in mask]
    if not masks:
        return None
    return masks[0] if len(masks) == 1 else masks[0] & masks[1]


def _loss_over(group: ProcessGroup | None, ring: bool) -> Callable[..., tuple[Tensor, InfoNCEStats | None]]:
    """The loss of one process, or of a process group."""
    if arguments.check_flag("ring", ring) and group is None:
        raise ValueError("ring needs group, got None")
    if group is None:
        return loss.info_nce
    from .group import over

    return over(group, ring)


def _triton_forward() -> Callable[..., tuple[Tensor, ...]]:
    from . import triton

    return triton.forward


def _triton_backward() -> Callable[..., tuple[Tensor, ...]]:
    from . import triton

    return triton.backward


library.announce("_infonce_forward", reference=reference.forward, triton=_triton_forward)
library.announce("_infonce_backward", reference=reference.backward, triton=_triton_backward)
