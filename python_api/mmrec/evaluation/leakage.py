"""How well shared and private parts of modalities are kept apart, by what linear probes still read out of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np

__all__ = ["Leakage", "explained", "leakage"]

_PENALTIES = tuple(10.0**power for power in range(-4, 5))


@dataclass(frozen=True)
class Leakage:
    """What probes that were fitted to one half of the items read on the other half.

    Args:
        modality: how well the modality is told from the shared part: balanced accuracy, scaled so that 0 is chance and
            1 is always. A shared part that says which modality it came from is not shared.
        within: per modality, R² of its private part explained by its shared part. 0 is apart.
        across: per ordered pair, R² of the second's private part explained by the first's. 0 is private.
        agreement: per ordered pair, R² of the second's shared part explained by the first's: what is to be high, for
            parts that hold nothing leak nothing.
        items: per modality, how many have it.

    R² is :func:`explained`. A figure is NaN where fewer than four items have what it needs, or nothing varies.
    """

    modality: float
    within: Mapping[str, float]
    across: Mapping[tuple[str, str], float]
    agreement: Mapping[tuple[str, str], float]
    items: Mapping[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, NaN as None; pairs are written "a→b"."""

        def plain(value: float) -> float | None:
            return None if np.isnan(value) else float(value)

        return {
            "modality": plain(self.modality),
            "within": {name: plain(value) for name, value in self.within.items()},
            **{
                kind: {f"{a}→{b}": plain(value) for (a, b), value in pairs.items()}
                for kind, pairs in (("across", self.across), ("agreement", self.agreement))
            },
            "items": dict(self.items),
        }


def leakage(
    shared: Mapping[str, np.ndarray],
    private: Mapping[str, np.ndarray],
    present: Mapping[str, np.ndarray],
    *,
    seed: int = 0,
) -> Leakage:
    """Probes the parts that a disentangler gives.

    Args:
        shared, private: ``[N, d]`` per modality; ``private`` may lack modalities or be empty.
        present: bool ``[N]`` per modality; rows that are not present are not read.
        seed: decides the halves.

    Raises:
        ValueError: arrays that do not belong together.
    """
    names = list(shared)
    sizes = {len(present[name]) for name in names if name in present}
    if not names or len(sizes) != 1 or any(name not in present for name in names):
        raise ValueError(f"present must have one mask of N items for each of {names}, got {sorted(present)}: {sizes}")
    count = sizes.pop()
    for kind, parts in (("shared", shared), ("private", private)):
        for name, part in parts.items():
            if name not in shared or part.ndim != 2 or len(part) != count:
                raise ValueError(f"{kind}[{name!r}] must be [{count}, d] of a modality in {names}, got {part.shape}")
    first = np.random.default_rng(seed).permutation(count) < count // 2

    def r2(inputs: np.ndarray, outputs: np.ndarray, rows: np.ndarray) -> float:
        return explained(inputs[rows & first], outputs[rows & first], inputs[rows & ~first], outputs[rows & ~first])

    pairs = [(a, b) for a, b in permutations(names, 2)]
    return Leakage(
        modality=_told_apart(shared, present, first),
        within={n: r2(shared[n], private[n], present[n]) for n in names if n in private},
        across={
            (a, b): r2(private[a], private[b], present[a] & present[b])
            for a, b in pairs
            if a in private and b in private
        },
        agreement={(a, b): r2(shared[a], shared[b], present[a] & present[b]) for a, b in pairs},
        items={name: int(present[name].sum()) for name in names},
    )


def explained(inputs: np.ndarray, outputs: np.ndarray, held_inputs: np.ndarray, held_outputs: np.ndarray) -> float:
    """R² of a ridge regression on rows that it has not seen: 1 − Σ ‖y − ŷ‖² / Σ ‖y − ȳ‖², over all columns, ȳ the mean
    of the fitted rows, and 0 where it would be negative (the probe read nothing). The penalty is the one of nine powers
    of ten whose generalised cross-validation (Golub et al., 1979) on the fitted rows is least.

    NaN for fewer than two rows on either side or outputs that do not vary.
    """
    if len(inputs) < 2 or len(held_inputs) < 2:
        return float("nan")
    predict = _ridge(inputs, outputs)
    centre = outputs.astype(np.float64).mean(0)
    total = np.square(held_outputs - centre).sum()
    if not total > 0:
        return float("nan")
    return max(1 - float(np.square(held_outputs - predict(held_inputs)).sum() / total), 0.0)


def _ridge(inputs: np.ndarray, outputs: np.ndarray) -> Any:
    """What predicts outputs of other inputs, each column of which is standardised as in the fitted rows."""
    x, y = inputs.astype(np.float64), outputs.astype(np.float64)
    mean, scale, centre = x.mean(0), x.std(0), y.mean(0)
    scale = np.where(scale > 0, scale, 1.0)
    left, singular, right = np.linalg.svd((x - mean) / scale, full_matrices=False)
    turned = left.T @ (y - centre)
    outside = np.square(y - centre).sum() - np.square(turned).sum()
    best, least = None, np.inf
    for penalty in _PENALTIES:
        kept = singular**2 / (singular**2 + penalty * len(x))
        residual = max(outside, 0.0) + np.square((1 - kept)[:, None] * turned).sum()
        free = len(x) - 1 - kept.sum()
        score = residual / free**2 if free > 0 else np.inf
        if best is None or score < least:
            best, least = penalty, score
    assert best is not None
    weights = right.T @ ((singular / (singular**2 + best * len(x)))[:, None] * turned)
    return lambda other: (other - mean) / scale @ weights + centre


def _told_apart(shared: Mapping[str, np.ndarray], present: Mapping[str, np.ndarray], first: np.ndarray) -> float:
    names = [name for name in shared if min((present[name] & first).sum(), (present[name] & ~first).sum()) >= 2]
    if len(names) < 2 or len({shared[name].shape[1] for name in names}) > 1:
        return float("nan")

    def rows(side: np.ndarray, most: int | None) -> tuple[np.ndarray, np.ndarray]:
        parts = [shared[name][present[name] & side][:most] for name in names]
        return np.concatenate(parts), np.repeat(np.arange(len(names)), [len(part) for part in parts])

    # Fitted to as many rows of each, or it would name the most common one.
    inputs, label = rows(first, min(int((present[name] & first).sum()) for name in names))
    held, wanted = rows(~first, None)
    guess = _ridge(inputs, np.eye(len(names))[label])(held).argmax(1)
    accuracy = np.mean([(guess[wanted == k] == k).mean() for k in range(len(names))])
    return max(float((accuracy * len(names) - 1) / (len(names) - 1)), 0.0)
