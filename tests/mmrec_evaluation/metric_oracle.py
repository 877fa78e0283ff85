"""Metrics from their definitions, one user at a time in float64, sharing nothing with the code under test."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

DEPTHS = (1, 2, 5, 10, 20)
LONGEST = 50
PLAIN = ("HR", "Recall", "Precision", "MRR", "NDCG", "MAP-min", "MAP-all", "MAP-hits")
NAMES = [f"{name}@{k}" for k in DEPTHS for name in PLAIN] + [
    f"NDCG-ngcf{top}@{k}" for k in DEPTHS for top in sorted({k, 20, LONGEST})
]


def defined(name: str, ranked: Sequence[int], relevant: Sequence[int]) -> float:
    """One user's value from the definition: ``h`` is the row of hits, ``r`` a position from 1, ``R`` the targets."""
    variant, _, depth = name.partition("@")
    k, R = int(depth), set(relevant)
    h = {r: item in R for r, item in enumerate(ranked, 1) if item != -1}
    hits = [r for r in range(1, k + 1) if h.get(r)]
    gain = math.fsum(1 / math.log2(r + 1) for r in hits)
    if variant == "HR":
        return 1.0 if hits else 0.0
    if variant == "Recall":
        return len(hits) / len(R)
    if variant == "Precision":
        return len(hits) / k
    if variant == "MRR":
        return 1 / hits[0] if hits else 0.0
    if variant == "NDCG":
        return gain / math.fsum(1 / math.log2(r + 1) for r in range(1, min(len(R), k) + 1))
    if variant.startswith("NDCG-ngcf"):
        found = sum(h.get(r, False) for r in range(1, int(variant.removeprefix("NDCG-ngcf")) + 1))
        return gain / math.fsum(1 / math.log2(r + 1) for r in range(1, min(found, k) + 1)) if found else 0.0
    precisions = math.fsum(sum(h.get(s, False) for s in range(1, r + 1)) / r for r in hits)
    divisor = {"MAP-min": min(len(R), k), "MAP-all": len(R), "MAP-hits": len(hits)}[variant]
    return precisions / divisor if divisor else 0.0


def best_first(scores: np.ndarray, hidden: Sequence[int] = ()) -> list[int]:
    """Items by score descending, ties by the lower id; without the hidden ones."""
    return [i for i in sorted(range(len(scores)), key=lambda i: (-scores[i], i)) if i not in set(hidden)]
