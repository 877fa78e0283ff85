"""The training objective: next item, alignment of modalities, balance of experts."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mmrec_kernels import info_nce

from ..fusion import ModalityMoE, alignment
from .batches import Batch
from .config import MAX_SCALE
from .inputs import ItemInputs
from .item_tower import ItemOutput
from .model import Recommender
from .parallel import ALONE, Alone

__all__ = ["Losses", "Objective"]


class Losses(NamedTuple):
    """0-d each: the weighted `total`, and its parts unweighted: next `item`, `alignment`, `disentangle`, `router`
    (already weighted).
    `load [M, E]`: tokens per content modality and expert in this step, or None."""

    total: Tensor
    item: Tensor
    alignment: Tensor
    disentangle: Tensor
    router: Tensor
    load: Tensor | None

    def parts(self) -> dict[str, Tensor]:
        """What training curves show, by name; "loss" is that of the next item."""
        return {"loss": self.item, "alignment": self.alignment, "disentangle": self.disentangle, "router": self.router}


class Objective(nn.Module):
    """What training minimises, with the parameters that only training needs (alignment heads, scales).

    Negatives "all": softmax over every item that training knows, as InfoNCE with the whole catalogue as keys. Items
    never seen in training are left out: as negatives in every row they would be pushed below all others, and a cold
    item is to be judged by its content.

    Negatives "batch": the batch's own targets and `extra_negatives` uniform draws (mixed negative sampling, Yang et
    al., WWW 2020). A key j is in the batch with a rate proportional to q_j = (Nq · p_j + n / W) / (Nq + n), p = the
    share of targets, W = known items; log q_j is subtracted from its logit (Bengio and Senécal, 2008; Yi et al., RecSys
    2019), and keys that are the same item as the row's target are masked.

    Args:
        model: the recommender.
        popularity: int `[I]`, training interactions per item.
    """

    known: Tensor
    place: Tensor
    share: Tensor

    def __init__(self, model: Recommender, popularity: np.ndarray) -> None:
        super().__init__()
        if popularity.shape != (model.spec.num_items,):
            raise ValueError(f"popularity must have shape [{model.spec.num_items}], got {list(popularity.shape)}")
        config = model.config
        self.config = config
        known = model.trained.nonzero()[:, 0]
        self.full = config.negatives == "all" or (
            config.negatives == "auto" and len(known) <= config.full_softmax_items
        )
        self.register_buffer("known", known, persistent=False)
        place = torch.full((model.spec.num_items,), -1).to(known.device)
        place[known] = torch.arange(len(known), device=known.device)
        self.register_buffer("place", place, persistent=False)
        share = torch.as_tensor(popularity, dtype=torch.float32, device=known.device)
        self.register_buffer("share", share / share.sum().clamp(min=1), persistent=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(config.scale))) if config.score == "cosine" else None
        self.alignment = None
        if config.align_weight and len(config.modalities) > 1:
            self.alignment = alignment(config.align, config.modalities, model.item_tower.aligned_width)

    def forward(self, model: Recommender, inputs: ItemInputs, batch: Batch, ranks: Alone = ALONE) -> Losses:
        """The losses of one batch.

        Args:
            inputs: content of the known items, row n of item `known[n]`.
            batch: windows whose items are all known.
            ranks: who shares the work; the mean of their losses is that of one process. What is a statistic of items
                (the disentangler's losses, balance and global entropy of the router) is one of a rank's own items.
        """
        if inputs.num_items != len(self.known):
            raise ValueError(f"inputs must hold the {len(self.known)} known items, got {inputs.num_items}")
        if self.full:
            items, place = self.known, self.place
        else:
            with ranks.together():
                extra = self._extra()
            items = torch.cat([batch.index, batch.target, extra]).unique()
            place = torch.full_like(self.place, -1)
            place[items] = torch.arange(len(items), device=items.device)
        own, count = ranks.share(items), len(items)
        output = model.encode(inputs if own is self.known else inputs.select(self.place[own]), own)
        vectors = ranks.gather(output.vectors, count)
        mine, rows = ranks.windows(batch)
        states = model.states(vectors, place[mine.index], mine.offsets)
        if self.full:
            item = self._all_items(states, vectors, place[mine.target])
        else:
            item = self._in_batch(states, vectors, place, batch.target, extra, rows)
        item = ranks.weigh(item, len(mine.target), len(batch.target))
        aligned = self._alignment(output, count, ranks)
        apart = item.new_zeros(())
        if output.parts is not None:
            apart = ranks.weigh(torch.stack(list(output.parts.losses.values())).sum(), len(own), count)
        router, load = item.new_zeros(()), None
        if output.routing is not None:
            config = self.config
            load = output.routing.stats[..., 0]
            router = ModalityMoE.penalty(
                ranks.weigh_routed(output.routing.losses, load), config.balance_weight, config.z_weight,
                config.local_entropy_weight, config.global_entropy_weight,
            )  # fmt: skip
        total = item + self.config.align_weight * aligned + self.config.disentangle_weight * apart + router
        return Losses(total, item.detach(), aligned.detach(), apart.detach(), router.detach(), load)

    def _scale(self) -> float | Tensor:
        return 1.0 if self.log_scale is None else self.log_scale.exp().clamp(max=MAX_SCALE)

    def _all_items(self, states: Tensor, vectors: Tensor, target: Tensor) -> Tensor:
        return info_nce(
            states,
            vectors,
            scale=self._scale(),
            symmetric=False,
            target=target,
            label_smoothing=self.config.label_smoothing,
        )

    def _in_batch(
        self, states: Tensor, vectors: Tensor, place: Tensor, target: Tensor, extra: Tensor, rows: Tensor | None
    ) -> Tensor:
        """`rows`: which targets are those of `states`; None: all."""
        key_ids = torch.cat([target, extra])
        draws, known = len(target) + len(extra), len(self.known)
        rate = (len(target) * self.share[key_ids] + len(extra) / known) / draws
        return info_nce(
            states, vectors.index_select(0, place[key_ids]), scale=self._scale(), symmetric=False, target=rows,
            key_ids=key_ids, log_q=rate.log(), label_smoothing=self.config.label_smoothing,
        )  # fmt: skip

    def _extra(self) -> Tensor:
        draws = torch.randint(len(self.known), (int(self.config.extra_negatives),), device=self.known.device)
        return self.known[draws]

    def _alignment(self, output: ItemOutput, count: int, ranks: Alone) -> Tensor:
        if self.alignment is None or not output.pooled:
            return output.vectors.new_zeros(())
        with ranks.together():
            chosen = torch.randperm(count, device=output.vectors.device)[: int(self.config.align_items)]
        return self.alignment(*ranks.sample(output.pooled, output.present, chosen, count))
