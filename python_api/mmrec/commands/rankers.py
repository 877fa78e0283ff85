"""Models by the name they have on the command line: floors, and folders of trained runs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from .console import status

if TYPE_CHECKING:
    from ..evaluation import Ranker, Result, Seen, Stage
    from .data import Data

__all__ = ["evaluate_floor", "floor_name", "floor_names"]

_STRONG_NEIGHBOURS = 20


def floor_names(neighbours: int | None) -> tuple[str, ...]:
    """The floors printed beside every result; ``neighbours`` adds an item kNN to the two usual ones."""
    counts = dict.fromkeys((None, _STRONG_NEIGHBOURS, neighbours))
    return ("most-popular", *(_knn_name(count) for count in counts))


def evaluate_floor(
    name: str,
    data: Data,
    *,
    stage: Stage = "test",
    mask: Seen | None = None,
    metrics: Sequence[str],
    groups: bool = True,
) -> Result:
    """The result of a floor named as in :func:`floor_names`."""
    from ..evaluation import evaluate

    with status(f"ranking all items by {name}"):
        return evaluate(
            _floor(name), data.split, model=name, dataset=data.catalogue.name, fingerprint=data.fingerprint,
            stage=stage, mask=mask, metrics=metrics, groups=groups,
        )  # fmt: skip


def floor_name(model: str, neighbours: int | None) -> str:
    """The full name of ``--model`` item-knn with ``--neighbours``."""
    return _knn_name(neighbours) if model == "item-knn" else model


def _knn_name(neighbours: int | None) -> str:
    return "item-knn" if neighbours is None else f"item-knn-{neighbours}"


def _floor(name: str) -> Ranker:
    from ..evaluation import item_knn, most_popular

    if name == "most-popular":
        return most_popular
    count = name.removeprefix("item-knn").removeprefix("-")
    return partial(item_knn, neighbours=int(count) if count else None)
