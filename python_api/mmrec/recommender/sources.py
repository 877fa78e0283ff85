"""A trained model on other content than its items have: taken away, permuted, filled in.

`sources[m][i]` says which item's content of modality m item i is given, as in `mmrec.evaluation.modality`; here −1 is
none, and `MEAN` the mean of all that there is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ..evaluation.metrics import Metric, per_user
from ..evaluation.protocols import Split, Stage
from ..evaluation.ranking import rank
from ..fusion import TableInputs, Tokens
from .config import IDENTITY
from .inputs import ItemInputs
from .model import ItemVectors, Recommender

__all__ = ["MEAN", "SourceScorer", "with_sources"]

MEAN = -2


def with_sources(inputs: ItemInputs, sources: Mapping[str, np.ndarray]) -> ItemInputs:
    """`inputs` with their contents as `sources` says; modalities that it does not name stay as they are.

    The mean of a modality of vectors is one token for each of its slots that occurs, the mean of those in the slot; of
    a table it is the mean of each numeric column and nothing in the others.

    Args:
        inputs: of I items.
        sources: int `[I]` per content modality, in [0, I), −1 or `MEAN`; "identity" is passed over.

    Raises:
        ValueError: a modality that the inputs do not have, another length, or a source out of range.
    """
    tokens, table = dict(inputs.tokens), inputs.table
    for name, given in sources.items():
        if name == IDENTITY:
            continue
        items = _checked(name, given, inputs.num_items)
        if name == "table" and table is not None:
            table = _with_two_rows(table).select(items)
        elif name in tokens:
            tokens[name] = _with_two_items(tokens[name]).select(items)
        else:
            known = [*inputs.tokens, *(["table"] if table is not None else [])]
            raise ValueError(f"sources name {name!r}, which is not among the contents {known}")
    kinds = {name: spec.kinds for name, spec in inputs.spec.tokens.items()}
    return dataclasses.replace(inputs, tokens=tokens, table=table, texts=None, kinds=kinds)


class SourceScorer:
    """A model's metric on a split, by the sources of its items' contents.

    Args:
        model: a trained one.
        inputs: the content that it was trained with.
        split, stage: whose targets are ranked among all items.
        metric: such as "NDCG@10".

    Attributes:
        present: bool `[I]` per modality of the model, the identity among them: what `dominance` and the curves start
            from.
    """

    def __init__(
        self, model: Recommender, inputs: ItemInputs, split: Split, *, stage: Stage = "test", metric: str = "NDCG@10"
    ) -> None:
        self.model, self.inputs, self.split, self.stage = model, inputs, split, stage
        self.metric = Metric.parse(metric)
        found = inputs.present()
        self.present: dict[str, np.ndarray] = {
            name: (model.trained if name == IDENTITY else found[name]).cpu().numpy() for name in model.config.modalities
        }

    def __call__(self, sources: Mapping[str, np.ndarray]) -> float:
        """The mean over users."""
        return float(self.per_user(sources).mean())

    def per_user(self, sources: Mapping[str, np.ndarray], *, candidates: np.ndarray | None = None) -> np.ndarray:
        """float64 `[n]`, one per user of the stage; only `candidates` may be ranked, all if None."""
        items = self._vectors(sources)
        histories = self.split.history(self.stage).rows(self.split.users(self.stage))
        query = self.model.user_vectors(histories, items)
        ranked = rank(query, items.vectors, self.split, self.stage, self.metric.depth, candidates=candidates)
        return per_user(ranked, self.split.relevant(self.stage), [self.metric])[str(self.metric)]

    @torch.no_grad()
    def _vectors(self, sources: Mapping[str, np.ndarray]) -> ItemVectors:
        count = self.inputs.num_items
        inputs = with_sources(self.inputs, sources)
        items = torch.arange(count)
        if IDENTITY in sources:
            # An identity of −1 is one that was never trained.
            items = torch.from_numpy(np.asarray(sources[IDENTITY], dtype=np.int64).clip(min=-1))
        training = self.model.training
        self.model.eval()
        try:
            parts = [self.model.encode(inputs.select(rows), items[rows]) for rows in torch.arange(count).split(8192)]
        finally:
            self.model.train(training)
        return ItemVectors(torch.cat([part.vectors for part in parts]), torch.cat([part.mass for part in parts]))


def _checked(name: str, given: np.ndarray, count: int) -> Tensor:
    rows = torch.from_numpy(np.asarray(given, dtype=np.int64))
    if rows.shape != (count,):
        raise ValueError(f"sources[{name!r}] must be [{count}], got {list(rows.shape)}")
    outside = (rows < MEAN) | (rows >= count)
    if outside.any():
        raise ValueError(f"sources[{name!r}] must be in [0, {count}), −1 or {MEAN}, got {int(rows[outside][0])}")
    return torch.where(rows < 0, count - 1 - rows, rows)  # behind the items come nothing and the mean


def _with_two_items(tokens: Tokens) -> Tokens:
    """The same with two items more: one without tokens, and the mean."""
    kinds = torch.unique(tokens.kind)
    means = [tokens.values[tokens.kind == kind].mean(0) for kind in kinds]
    values = torch.cat([tokens.values, torch.stack(means)]) if means else tokens.values
    end = tokens.offsets[-1:]
    offsets = torch.cat([tokens.offsets, end, end + len(kinds)])
    return Tokens(values, offsets, torch.cat([tokens.kind, kinds]))


def _with_two_rows(table: TableInputs) -> TableInputs:
    """The same with two rows more: one without cells, and the mean of what is standardised, 0."""
    zeros = table.numeric.new_zeros(2, table.numeric.shape[1])
    mask = torch.zeros(2, table.numeric.shape[1], dtype=torch.bool)
    mask[1] = True
    nothing = table.categorical.new_full((2, table.categorical.shape[1]), -1)
    bags = tuple((torch.cat([offsets, offsets[-1:], offsets[-1:]]), ids) for offsets, ids in table.bags)
    return TableInputs(
        torch.cat([table.numeric, zeros]), torch.cat([table.numeric_mask, mask]),
        torch.cat([table.categorical, nothing]), bags,
    )  # fmt: skip
