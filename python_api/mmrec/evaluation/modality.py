"""Which modality a model really listens to, and how it bears missing ones.

Every function asks the model through one callable, ``score(sources) -> float``. ``sources[m]`` is int64
``[num_items]``: the item whose content of modality ``m`` each item is given, −1 for none. The model as it is gets
``sources[m][i] = i`` wherever the content exists; a mask is ``sources[m] >= 0``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

__all__ = ["Score", "Sources", "Dominance", "Curve", "sources_of", "dominance", "missing", "missing_curve", "permuted"]

Sources = dict[str, np.ndarray]
Score = Callable[[Sources], float]
Missing = Literal["random", "popularity", "whole"]

DEFAULT_RATES: tuple[float, ...] = tuple(i / 10 for i in range(10))


def sources_of(present: Mapping[str, np.ndarray]) -> Sources:
    """Every item with its own content: ``present[m]`` is bool ``[num_items]``, True where modality ``m`` exists."""
    sizes = {name: np.shape(mask) for name, mask in present.items()}
    if not sizes or len(set(sizes.values())) > 1 or any(len(size) != 1 for size in sizes.values()):
        raise ValueError(f"present must hold one bool [num_items] mask per modality, got shapes {sizes}")
    return {name: np.where(mask, np.arange(len(mask)), -1) for name, mask in present.items()}


@dataclass(frozen=True)
class Dominance:
    """How a metric M depends on each modality.

    Args:
        full: M with everything.
        drop: M(full) − M(without m): what only m brings.
        only: M(m alone).
        noise: M(full) − M(m permuted across items): wrong content instead of none, which keeps its scale and its share
            of the attention; mean over the permutations.
        index: ``max(drop_m, 0) / Σ max(drop, 0)``, NaN if no modality is missed.
    """

    full: float
    drop: Mapping[str, float]
    only: Mapping[str, float]
    noise: Mapping[str, float]

    @property
    def index(self) -> dict[str, float]:
        gains = {name: max(value, 0.0) for name, value in self.drop.items()}
        total = sum(gains.values())
        return {name: gain / total if total else float("nan") for name, gain in gains.items()}


def dominance(score: Score, present: Mapping[str, np.ndarray], *, permutations: int = 3, seed: int = 0) -> Dominance:
    """Asks the model once as it is, and for each modality without it, with it alone and with it permuted.

    Permutations move contents among the items that have them, so what is missing stays missing. They are drawn per
    modality from ``seed``, independently of which other modalities there are.
    """
    if permutations < 1:
        raise ValueError(f"permutations must be at least 1, got {permutations}")
    sources = sources_of(present)
    nothing = {name: np.full_like(rows, -1) for name, rows in sources.items()}
    full = float(score(sources))
    drop, only, noise = {}, {}, {}
    for name in sources:
        drop[name] = full - float(score(sources | {name: nothing[name]}))
        only[name] = float(score(nothing | {name: sources[name]}))
        moved = permuted(sources[name], name, permutations, seed=seed)
        noise[name] = full - float(np.mean([float(score(sources | {name: rows})) for rows in moved]))
    return Dominance(full, drop, only, noise)


def permuted(rows: np.ndarray, name: str, count: int, *, seed: int = 0) -> list[np.ndarray]:
    """Sources ``rows`` of modality ``name``, moved ``count`` times among the items that have it."""
    rng = _generator(seed, name)
    owners = np.flatnonzero(rows >= 0)
    found = []
    for _ in range(count):
        moved = rows.copy()
        moved[owners] = rows[rng.permutation(owners)]
        found.append(moved)
    return found


def missing(
    present: Mapping[str, np.ndarray],
    rate: float,
    kind: Missing,
    *,
    popularity: np.ndarray | None = None,
    modalities: Sequence[str] | None = None,
    seed: int = 0,
) -> Sources:
    """Takes content away, on top of what is missing already.

    Args:
        rate: share that goes: of the items that have the modality (rounded to the nearest count), or of the modalities.
        kind: "random", every item alike, independently per modality; "popularity", rare items first: drawn without
            replacement with weights ``1 / (1 + popularity)``; "whole", that share of the modalities goes for every
            item, in a random order.
        popularity: training interactions ``[num_items]``; needed for "popularity".
        modalities: the ones that may lose content, None for all.

    What is missing at one rate is missing at every higher rate with the same seed.
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"rate must lie in [0, 1], got {rate}")
    sources = sources_of(present)
    names = sorted(sources if modalities is None else modalities)
    if unknown := [name for name in names if name not in sources]:
        raise ValueError(f"modalities {unknown} are not among {sorted(sources)}")
    if kind == "whole":
        order = np.random.default_rng(seed).permutation(len(names))
        gone = [names[i] for i in order[: _nearest(rate * len(names))]]
        return sources | {name: np.full_like(sources[name], -1) for name in gone}
    if kind not in ("random", "popularity"):
        raise ValueError(f"kind must be 'random', 'popularity' or 'whole', got {kind!r}")
    weight = np.ones(len(next(iter(sources.values()))))
    if kind == "popularity":
        counts = None if popularity is None else np.asarray(popularity, dtype=np.float64)
        if counts is None or counts.shape != weight.shape:
            given = None if counts is None else counts.shape
            raise ValueError(f"kind 'popularity' needs popularity {weight.shape}, got {given}")
        weight = 1 / (1 + counts)
    for name in names:
        # The smallest of exponential variables with these rates are a weighted sample without replacement.
        arrival = _generator(seed, name).exponential(size=len(weight)) / weight
        owners = np.flatnonzero(sources[name] >= 0)
        gone_items = owners[np.argsort(arrival[owners], kind="stable")[: _nearest(rate * len(owners))]]
        sources[name][gone_items] = -1
    return sources


@dataclass(frozen=True)
class Curve:
    """A metric against the rate of missing content.

    Args:
        rates, values: the points.
        area: area under the curve by the trapezoid rule, divided by the width: the mean level over the rates.
    """

    rates: tuple[float, ...]
    values: tuple[float, ...]

    @property
    def area(self) -> float:
        return float(area(self.rates, np.asarray(self.values)))


def area(rates: Sequence[float], values: np.ndarray) -> np.ndarray:
    """:attr:`Curve.area` of ``values [rates, …]``, along the first axis."""
    width = np.diff(rates).reshape(-1, *[1] * (values.ndim - 1))
    found: np.ndarray = ((values[1:] + values[:-1]) / 2 * width).sum(0) / (rates[-1] - rates[0])
    return found


def missing_curve(
    score: Score,
    present: Mapping[str, np.ndarray],
    kind: Missing,
    *,
    rates: Sequence[float] = DEFAULT_RATES,
    popularity: np.ndarray | None = None,
    modalities: Sequence[str] | None = None,
    seed: int = 0,
) -> Curve:
    """The metric at each rate; arguments as in :func:`missing`. At least two rates, increasing."""
    if len(rates) < 2 or any(b <= a for a, b in zip(rates, rates[1:], strict=False)):
        raise ValueError(f"rates must be at least two and increase, got {list(rates)}")
    chosen = {"popularity": popularity, "modalities": modalities, "seed": seed}
    values = [float(score(missing(present, rate, kind, **chosen))) for rate in rates]  # type: ignore[arg-type]
    return Curve(tuple(map(float, rates)), tuple(values))


def _generator(seed: int, name: str) -> np.random.Generator:
    return np.random.default_rng([seed, *name.encode()])


def _nearest(count: float) -> int:
    return int(np.floor(count + 0.5))
