"""Factorial experiments: which factors, and which of them together, move a metric, and how sure that is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from .intervals import Interval, bootstrap

__all__ = ["Effect", "factorial", "level_means"]

_DRAWS = 20_000


@dataclass(frozen=True)
class Effect:
    """What one factor, or several together beyond each by itself, accounts for.

    Attributes:
        factors: their names; empty for what is left within cells, between seeds.
        freedom: degrees of freedom.
        share: η², its part of the variation between all runs' means (sums of squares).
        low, high: 95 % percentile bootstrap interval of `share` over users.
        by_chance: what it would have on average if nothing had an effect: `freedom` over all degrees of freedom.
        p: of the F-test of this effect against what is left within cells, after Holm's correction (1979) for all
            effects that are tested: at .05, a design without effects shows any in 5 % of the cases. None where a cell
            has one seed only, which tells nothing of what seeds do, and for what is left.
    """

    factors: tuple[str, ...]
    freedom: int
    share: float
    low: float
    high: float
    by_chance: float
    p: float | None


def factorial(
    values: np.ndarray, factors: Mapping[str, Sequence[str]], *, order: int = 2, resamples: int = 1000, seed: int = 0
) -> list[Effect]:
    """Analysis of variance of a full factorial design in which every cell has as many runs (Fisher, 1935).

    The runs' means over users are Y[levels…, seed]. The effect of a set of factors is what the means over everything
    else deviate from the sum of the effects of its subsets; sums of squares add up, since the design is balanced. Sets
    of more than `order` factors are one effect, named by all of them.

    The test takes seeds as replicates and these users as given. Where a seed moves all cells alike, it says less than
    it could.

    Args:
        values: float ``[L_1, …, L_F, seeds, users]``, a metric for each user in each run, the same users everywhere.
        factors: name → levels, in the order of the axes.
        order: largest set of factors that is looked at by itself.
        resamples: bootstrap samples of users.

    Returns:
        One effect per set, the largest share first, then what is left.

    Raises:
        ValueError: another shape, or values that are not finite.
    """
    table = np.asarray(values, dtype=np.float64)
    sizes = tuple(len(levels) for levels in factors.values())
    if table.ndim != len(sizes) + 2 or table.shape[: len(sizes)] != sizes or not sizes or not table.size:
        raise ValueError(f"values must be {[*sizes, 'seeds', 'users']} for {list(factors)}, got {list(table.shape)}")
    if not np.isfinite(table).all():
        raise ValueError("values must be finite")
    if min(sizes) < 2:
        raise ValueError(f"factors must have two levels at least, got {dict(zip(factors, sizes, strict=True))}")
    names, users = list(factors), table.shape[-1]
    means = table.mean(-1)
    squares = _squares(means, order)
    random = np.random.default_rng(seed)
    drawn = []
    for _ in range(resamples):
        weight = np.bincount(random.integers(users, size=users), minlength=users) / users
        drawn.append(list(_squares(table @ weight, order).values()))
    shares = _shares(np.array(drawn))
    low, high = np.quantile(shares, [0.025, 0.975], axis=0)
    freedoms = {axes: _freedom(axes, sizes, means.shape[-1], order) for axes in squares}
    share = _shares(np.array([list(squares.values())]))[0]
    p = _tested(squares, freedoms, random)
    total = means.size - 1
    found = [
        Effect(
            tuple(names[axis] for axis in axes), freedom, float(share[n]), float(low[n]), float(high[n]),
            freedom / total, p.get(axes),
        )
        for n, (axes, freedom) in enumerate(freedoms.items())
        if freedom
    ]  # fmt: skip
    return sorted(found, key=lambda effect: (not effect.factors, -effect.share))


def level_means(
    values: np.ndarray, factors: Mapping[str, Sequence[str]], *, seed: int = 0
) -> dict[str, dict[str, Interval]]:
    """Per factor and level the mean over all cells of that level, with its interval over users and seeds."""
    table = np.asarray(values, dtype=np.float64)
    found: dict[str, dict[str, Interval]] = {}
    for axis, (name, levels) in enumerate(factors.items()):
        others = tuple(other for other in range(len(factors)) if other != axis)
        rows = np.moveaxis(table, axis, 0).mean(axis=tuple(range(1, len(others) + 1)))
        found[name] = {level: bootstrap(row, seed=seed) for level, row in zip(levels, rows, strict=True)}
    return found


def _squares(means: np.ndarray, order: int) -> dict[tuple[int, ...], float]:
    """Sums of squares by set of axes; sets of more than `order` axes together under all axes, the rest under ()."""
    count = means.ndim - 1
    cells = means.mean(-1)
    effects: dict[tuple[int, ...], np.ndarray] = {(): np.asarray(cells.mean())}
    squares: dict[tuple[int, ...], float] = {}
    explained = 0.0
    for size in range(1, min(order, count) + 1):
        for axes in combinations(range(count), size):
            effect = cells.mean(axis=tuple(axis for axis in range(count) if axis not in axes), keepdims=True)
            for smaller, part in effects.items():
                if set(smaller) < set(axes):
                    effect = effect - part
            effects[axes] = effect
            squares[axes] = float(np.square(effect).sum() * means.size / effect.size)
            explained += squares[axes]
    between = float(np.square(cells - cells.mean()).sum() * means.shape[-1])
    if order < count:
        squares[tuple(range(count))] = max(between - explained, 0.0)
    squares[()] = float(np.square(means - cells[..., None]).sum())
    return squares


def _freedom(axes: tuple[int, ...], sizes: tuple[int, ...], seeds: int, order: int) -> int:
    if not axes:
        return int(np.prod(sizes)) * (seeds - 1)
    if len(axes) <= order:
        return int(np.prod([sizes[axis] - 1 for axis in axes]))
    taken = sum(
        int(np.prod([sizes[axis] - 1 for axis in part]))
        for size in range(1, order + 1)
        for part in combinations(range(len(sizes)), size)
    )
    return int(np.prod(sizes)) - 1 - taken


def _tested(
    squares: Mapping[tuple[int, ...], float], freedoms: Mapping[tuple[int, ...], int], random: np.random.Generator
) -> dict[tuple[int, ...], float]:
    """p of each effect, corrected; how often F is so large by chance is counted in draws of it."""
    left = freedoms[()]
    if not left:
        return {}
    noise = squares[()] / left
    found = {}
    for axes, freedom in freedoms.items():
        if not axes or not freedom:
            continue
        drawn = random.chisquare(freedom, _DRAWS) * left
        drawn /= random.chisquare(left, _DRAWS) * freedom
        # Nothing varies: nothing is shown.
        found[axes] = float((1 + (drawn * noise >= squares[axes] / freedom).sum()) / (1 + _DRAWS))
    corrected, least = {}, 0.0
    for n, axes in enumerate(sorted(found, key=lambda axes: found[axes])):
        least = max(least, min((len(found) - n) * found[axes], 1.0))
        corrected[axes] = least
    return corrected


def _shares(squares: np.ndarray) -> np.ndarray:
    total = squares.sum(1, keepdims=True)
    return squares / np.where(total > 0, total, 1.0)
