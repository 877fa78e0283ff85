"""Losses in the place of well-known classes: OpenCLIP's and sentence-transformers'.

:class:`ClipLoss` and :class:`MultipleNegativesRankingLoss` take the same constructor and call as the classes of these
names there: one `info_nce` inside, no matrix of logits outside its workspace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmrec_kernels import info_nce

__all__ = ["ClipLoss", "MultipleNegativesRankingLoss"]


class ClipLoss(nn.Module):
    """The contrastive loss of CLIP (Radford et al., 2021) in the place of `open_clip.ClipLoss`.

    Args:
        local_loss: with several ranks, a rank returns the loss of its own rows; otherwise that of all rows. The
            gradients of parameters, averaged over ranks as DDP does, are those of the whole batch either way.
        gather_with_grad: must be True with several ranks. OpenCLIP's False drops the part of the gradient that reaches
            a feature through the other ranks' rows.
        cache_labels: accepted, and without effect: there are no labels to cache.
        rank, world_size: as in `torch.distributed`. With world_size > 1 the default process group is used.
        use_horovod: must be False.

    Raises:
        ValueError: an option that is not one softmax over the gathered features.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__()
        if use_horovod:
            raise ValueError("use_horovod must be False: ranks talk through torch.distributed")
        if world_size > 1 and not gather_with_grad:
            raise ValueError(
                "gather_with_grad must be True with world_size > 1: without it the gradient is not the loss's"
            )
        self.local_loss, self.gather_with_grad, self.cache_labels = local_loss, gather_with_grad, cache_labels
        self.rank, self.world_size, self.use_horovod = rank, world_size, use_horovod

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, float32 (float64 for float64 features), 0-d, or `{"contrastive_loss": loss}`.

        Args:
            image_features, text_features: `[N, D]`, normalised by the model as in OpenCLIP; row n matches row n.
            logit_scale: the inverse temperature, a float, 0-d or `[1]`.
            logit_bias: one number for all pairs, which a softmax does not see: its gradient is 0.
        """
        group = self._group() if self.world_size > 1 else None
        if isinstance(logit_scale, Tensor):  # OpenCLIP's nonscalar_logit_scale makes it [1]
            logit_scale = logit_scale.reshape(())
        loss = info_nce(image_features, text_features, scale=logit_scale, group=group)
        if group is not None and not self.local_loss:
            everyone = loss.detach().clone()
            dist.all_reduce(everyone, group=group)
            loss = loss + (everyone / self.world_size - loss.detach())
        if isinstance(logit_bias, Tensor):
            loss = loss + 0.0 * logit_bias.sum()
        return {"contrastive_loss": loss} if output_dict else loss

    def _group(self) -> dist.ProcessGroup:
        if not dist.is_initialized() or dist.get_world_size() != self.world_size:
            ranks = dist.get_world_size() if dist.is_initialized() else "no process group"
            raise ValueError(f"world_size must be that of torch.distributed, got {self.world_size} and {ranks}")
        group = dist.group.WORLD
        assert group is not None
        return group


_SIMILARITIES = {"cos_sim": True, "pairwise_cos_sim": True, "dot_score": False}


class MultipleNegativesRankingLoss(nn.Module):
    """In-batch negatives in the place of sentence-transformers' class of this name (Henderson et al., 2017).

    Args:
        model: maps the features of a column of texts to `{"sentence_embedding": [N, D]}`, as a SentenceTransformer
            does. :meth:`compute_loss_from_embeddings` does without it.
        scale: the inverse temperature.
        similarity_fct: "cos_sim" or "dot_score", or sentence-transformers' functions of these names; None is cos_sim.
        gather_across_devices: negatives from every rank of the default process group.
        directions: `("query_to_doc",)`; with "doc_to_query" too, the mean of both directions
            (partition_mode "per_direction"); with "query_to_query" too, other queries are further negatives
            (partition_mode "joint").
        partition_mode: "joint" or "per_direction"; for one direction they are the same.
        hardness_mode: must be None; then hardness_strength has no effect, as in the original.

    Raises:
        ValueError: an option that is not one softmax per direction of `info_nce`.
    """

    def __init__(
        self,
        model: nn.Module | None,
        scale: float = 20.0,
        similarity_fct: str | Callable[[Tensor, Tensor], Tensor] | None = None,
        gather_across_devices: bool = False,
        directions: Sequence[str] = ("query_to_doc",),
        partition_mode: str = "joint",
        hardness_mode: str | None = None,
        hardness_strength: float = 0.0,
    ) -> None:
        super().__init__()
        if not scale > 0:
            raise ValueError(f"scale must be positive, got {scale}")
        name = "cos_sim" if similarity_fct is None else similarity_fct
        name = name if isinstance(name, str) else getattr(name, "__name__", repr(name))
        if name not in _SIMILARITIES:
            raise ValueError(f"similarity_fct must be cos_sim or dot_score, got {name}")
        if partition_mode not in ("joint", "per_direction"):
            raise ValueError(f"partition_mode must be 'joint' or 'per_direction', got {partition_mode!r}")
        supported = {
            frozenset({"query_to_doc"}): ("joint", "per_direction"),
            frozenset({"query_to_doc", "doc_to_query"}): ("per_direction",),
            frozenset({"query_to_doc", "query_to_query"}): ("joint",),
        }
        if partition_mode not in supported.get(frozenset(directions), ()):
            raise ValueError(
                "directions must be query_to_doc alone, with doc_to_query (partition_mode 'per_direction') or with "
                f"query_to_query (partition_mode 'joint'), got {tuple(directions)} and {partition_mode!r}"
            )
        if hardness_mode is not None:
            raise ValueError(f"hardness_mode must be None, got {hardness_mode!r}: it is another loss")
        self.model, self.scale, self.similarity_fct = model, scale, name
        self.gather_across_devices, self.directions = gather_across_devices, tuple(directions)
        self.partition_mode, self.hardness_mode, self.hardness_strength = partition_mode, None, hardness_strength

    def forward(self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None) -> Tensor:
        """The loss of columns of features: anchors, their positives, and any number of columns of hard negatives."""
        if self.model is None:
            raise ValueError("model must be given to compute embeddings, got None")
        embeddings = [self.model(features)["sentence_embedding"] for features in sentence_features]
        return self.compute_loss_from_embeddings(embeddings, labels)

    def compute_loss_from_embeddings(self, embeddings: Sequence[Tensor], labels: Tensor | None = None) -> Tensor:
        """The loss, float32 (float64 for float64 embeddings), 0-d.

        Args:
            embeddings: `[N, D]` each: anchors, their positives, and any number of columns of hard negatives, which all
                anchors share.
            labels: not used, as in the original.
        """
        if len(embeddings) < 2:
            raise ValueError(f"embeddings must hold anchors and positives, got {len(embeddings)} columns")
        query, keys = embeddings[0], list(embeddings[1:])
        rows = query.shape[0]
        options: dict[str, Any] = {"symmetric": "doc_to_query" in self.directions}
        if "query_to_query" in self.directions:
            # A query is no negative of itself: row i leaves out the i-th of the queries behind the documents.
            own = torch.arange(rows, device=query.device) + sum(key.shape[0] for key in keys)
            options["exclude"] = (torch.arange(rows + 1, device=query.device), own)
            keys.append(query)
        if self.gather_across_devices and dist.is_initialized() and dist.get_world_size() > 1:
            options["group"] = dist.group.WORLD
        return info_nce(
            query, torch.cat(keys), scale=self.scale, normalize=_SIMILARITIES[self.similarity_fct], **options
        )

    @property
    def temperature(self) -> float:
        """1 / scale."""
        return 1.0 / self.scale

    def get_config_dict(self) -> dict[str, Any]:
        """The options, as the trainer of sentence-transformers stores them."""
        return {
            "scale": self.scale,
            "similarity_fct": self.similarity_fct,
            "gather_across_devices": self.gather_across_devices,
            "directions": self.directions,
            "partition_mode": self.partition_mode,
            "hardness_mode": self.hardness_mode,
            "hardness_strength": self.hardness_strength,
        }
