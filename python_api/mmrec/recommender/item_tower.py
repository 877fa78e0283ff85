"""The item tower: identity and content of an item to one vector, and how much each modality was listened to."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmrec_kernels import Routing

from ..fusion import Disentangled, ModalityFusion, ModalityMoE, TableEncoder, Tokens, Whitening, disentangler
from .config import IDENTITY, RecommenderConfig
from .inputs import ItemInputs, ItemSpec
from .side import LayerWhitening, side_projection

__all__ = ["ItemOutput", "ItemTower"]

_IDENTITY_STD = 0.05


class ItemOutput(NamedTuple):
    """Of N items: `vectors [N, d]`, `mass [N, M]` (attention share per modality of the config, rows sum to 1, or to 0
    for an item without anything), the experts' `routing` or None, per modality what is to be aligned, `pooled [N, d]`
    with `present bool [N]` (the mean token, or the part of it that the disentangler says, where this training step does
    not hide the modality), per content modality the `tokens` (of width d) that were fused, and the disentangler's
    `parts`, or None."""

    vectors: Tensor
    mass: Tensor
    routing: Routing | None
    pooled: dict[str, Tensor]
    present: dict[str, Tensor]
    tokens: dict[str, Tokens]
    parts: Disentangled | None


class ItemTower(nn.Module):
    """Identity embedding and content tokens → experts by modality → learned queries over all modalities → one vector.

    Content: frozen encoders' vectors are whitened and projected (those of several layers by a side network), table
    cells embedded, each with an embedding of its slot. All tokens of all modalities go through one `ModalityMoE`;
    `ModalityFusion` fuses them with the identity, which is a modality of one token and is added to the result as well.
    An item whose identity is unknown (never trained) is described by its content alone. With ("identity",) alone there
    is nothing to fuse and the vector is the identity embedding.
    """

    def __init__(self, config: RecommenderConfig, spec: ItemSpec) -> None:
        super().__init__()
        missing = [name for name in config.content if name not in spec.content]
        if missing:
            raise ValueError(f"modalities {missing} are not in the data, which has {[IDENTITY, *spec.content]}")
        self.config = config
        self.modalities = config.modalities
        width = config.width
        self.identity = None
        if IDENTITY in config.modalities:
            self.identity = nn.Parameter(torch.empty(spec.num_items, width).normal_(std=_IDENTITY_STD))
        self.whiten, self.project, self.slot = nn.ModuleDict(), nn.ModuleDict(), nn.ParameterDict()
        for name in config.content:
            if name == "table":
                continue
            sizes = spec.tokens[name]
            layers = config.side_layers if name == "text" else 0
            rank = min(sizes.width // max(layers, 1), config.image_rank if name == "image" else config.text_rank)
            if layers:
                self.whiten[name] = LayerWhitening(sizes.width, sizes.kinds, rank, layers)
                self.project[name] = side_projection(rank, layers, width)
            else:
                self.whiten[name] = Whitening(sizes.width, sizes.kinds, rank)
                self.project[name] = nn.Linear(rank, width)
            self.slot[name] = nn.Parameter(torch.empty(sizes.kinds, width).normal_(std=width**-0.5))
        self.table = None
        if "table" in config.content and spec.table is not None:
            sizes_of = (spec.table.numeric, spec.table.cardinalities, spec.table.bag_cardinalities)
            self.table = TableEncoder(*sizes_of, width, pooled=config.table_pooled)
        self.experts = None
        self.fuse = None
        self.disentangle = None
        self.aligned_width = width  # of `ItemOutput.pooled`
        self.content_dropout = nn.Dropout(config.content_dropout)
        if not config.content:
            return
        if config.experts_shared + config.experts_private:
            self.experts = ModalityMoE(
                width, len(config.content), shared=config.experts_shared, private=config.experts_private,
                hidden=config.expert_hidden, k=config.experts_per_token, score=config.router_score,
                bias_rate=config.router_bias_rate, dropout=config.content_dropout,
            )  # fmt: skip
        self.fuse = ModalityFusion(
            config.modalities, width, when=config.fusion, level=config.fusion_level, num_queries=config.item_queries,
            num_heads=config.item_heads, num_layers=config.fusion_layers, dropout=config.content_dropout,
        )  # fmt: skip
        if config.disentangle is not None:
            self.disentangle = disentangler(config.disentangle, config.modalities, width)
            self.aligned_width = int(self.disentangle.aligned_width)  # type: ignore[arg-type]
            self.disentangle_gate = nn.Parameter(torch.zeros(()))
        self.gain = nn.Parameter(torch.ones(()))

    def fit_whitening(self, inputs: ItemInputs, items: Tensor) -> None:
        """Fits the whitening of every vector modality to the tokens of `items` (those that training may know)."""
        for name, whiten in self.whiten.items():
            assert isinstance(whiten, Whitening | LayerWhitening)
            whiten.fit(inputs.tokens[name], items)

    @torch.no_grad()
    def whiten_inputs(self, inputs: ItemInputs) -> ItemInputs:
        """`inputs` with their vectors whitened: what training reads in every step, computed once, after the fit."""
        if inputs.whitened:
            raise ValueError("inputs are whitened already")
        tokens = dict(inputs.tokens)
        for name, whiten in self.whiten.items():
            tokens[name] = tokens[name]._replace(values=whiten(tokens[name].values, tokens[name].kind))
        return dataclasses.replace(inputs, tokens=tokens, whitened=True)

    def forward(self, inputs: ItemInputs, items: Tensor, trained: Tensor) -> ItemOutput:
        """Encodes the N items of `inputs`.

        Args:
            inputs: content of these N items.
            items: int64 `[N]`, their catalogue rows (which identity is theirs).
            trained: bool `[N]`: the identity means something.
        """
        tokens = self._content(inputs)
        present = {name: part.present for name, part in tokens.items()}
        if self.identity is not None:
            present[IDENTITY] = trained
        if self.fuse is None:
            assert self.identity is not None
            vectors = torch.where(trained.unsqueeze(1), self.identity.index_select(0, items), 0)
            return ItemOutput(vectors, trained.unsqueeze(1).to(vectors.dtype), None, {}, present, {}, None)
        routing = None
        pooled = {name: part.mean() for name, part in tokens.items()}
        if self.experts is not None:
            tokens, routing = self._through_experts(tokens)
        content = dict(tokens)
        if self.identity is not None:
            tokens[IDENTITY] = self._identity(items)
            pooled[IDENTITY] = tokens[IDENTITY].values
        absent = self._absent(present)
        fused = self.fuse(tokens, absent=absent)
        values = fused.values
        parts: Disentangled | None = None
        if self.disentangle is not None:
            if absent is not None:
                # What is hidden in this training step is hidden here too, and from what aligns the parts.
                present = {name: ~absent[:, m] for m, name in enumerate(self.modalities)}
            apart: Disentangled = self.disentangle(pooled, present)
            values = values + torch.tanh(self.disentangle_gate) * apart.vector
            pooled, parts = apart.aligned, apart
        # At the scale that identities start with: logits begin near zero and the softmax near uniform.
        vectors = values * (self.gain * _IDENTITY_STD)
        if self.identity is not None and absent is not None:
            # Past the attention too: through it alone an identity learns only as fast as it is listened to.
            unknown = absent[:, self.modalities.index(IDENTITY)].unsqueeze(1)
            vectors = vectors + torch.where(unknown, 0, self.identity.index_select(0, items))
        return ItemOutput(vectors, fused.mass, routing, pooled, present, content, parts)

    def _content(self, inputs: ItemInputs) -> dict[str, Tokens]:
        tokens: dict[str, Tokens] = {}
        for name in self.config.content:
            if name == "table":
                if inputs.table is None or self.table is None:
                    raise ValueError("inputs must hold the table that this model was built for")
                tokens[name] = self.table(inputs.table)
                continue
            raw = inputs.tokens[name]
            white = raw.values if inputs.whitened else self.whiten[name](raw.values, raw.kind)
            values = self.project[name](self.content_dropout(white)) + self.slot[name].index_select(0, raw.kind)
            tokens[name] = Tokens(values, raw.offsets, raw.kind)
        return tokens

    def _through_experts(self, tokens: dict[str, Tokens]) -> tuple[dict[str, Tokens], Routing]:
        lengths = [len(part.values) for part in tokens.values()]
        assert self.experts is not None
        device = next(iter(tokens.values())).values.device
        modality = torch.arange(len(lengths), device=device).repeat_interleave(torch.tensor(lengths, device=device))
        mixed, routing = self.experts(torch.cat([part.values for part in tokens.values()]), modality)
        parts = zip(tokens.items(), mixed.split(lengths), strict=True)
        return {name: Tokens(values, part.offsets, part.kind) for (name, part), values in parts}, routing

    def _identity(self, items: Tensor) -> Tokens:
        assert self.identity is not None
        # Brought to the scale of content tokens; an embedding that starts at that scale learns far more slowly.
        values = self.identity.index_select(0, items) / _IDENTITY_STD
        return Tokens(values, torch.arange(len(items) + 1, device=items.device), torch.zeros_like(items))

    def _absent(self, present: dict[str, Tensor]) -> Tensor | None:
        """bool `[N, M]`: missing, or hidden in this training step; nothing is hidden from an item that would lose
        all."""
        missing = ~torch.stack([present[name] for name in self.modalities], dim=1)
        if not self.training:
            return missing if IDENTITY in self.modalities else None
        rates = [
            self.config.identity_dropout if name == IDENTITY else self.config.modality_dropout
            for name in self.modalities
        ]
        if not any(rates):
            return missing
        hidden = torch.rand(missing.shape, device=missing.device) < torch.tensor(rates, device=missing.device)
        return missing | (hidden & ~(missing | hidden).all(1, keepdim=True))
