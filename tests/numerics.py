"""The one rule by which every kernel's numbers are judged; docs/numerics.md gives the reasons."""

from __future__ import annotations

import torch
from torch import Tensor

# Added to twice the error of same-dtype eager torch, both relative to the oracle's size.
FLOORS = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-5, torch.bfloat16: 3e-5}


def errors(actual: Tensor, oracle: Tensor) -> tuple[float, float]:
    """max|a − o| / max|o| and ‖a − o‖₂ / ‖o‖₂ in float64; where the oracle is 0 everywhere, the absolute ones."""
    a, o = actual.double(), oracle.double()
    if o.numel() == 0:
        return 0.0, 0.0
    difference = a - o
    peak, norm = float(o.abs().max()) or 1.0, float(o.norm()) or 1.0
    return float(difference.abs().max()) / peak, float(difference.norm()) / norm


def assert_accurate(actual: Tensor, oracle: Tensor, eager: Tensor, *, dtype: torch.dtype | None = None) -> None:
    """`actual` is at most twice as far from the float64 `oracle` as `eager` (in the inputs' dtype), plus a floor."""
    assert actual.shape == oracle.shape, (actual.shape, oracle.shape)
    assert bool(torch.isfinite(actual).all()) == bool(torch.isfinite(oracle).all())
    floor = FLOORS[dtype or actual.dtype]
    for got, allowed, what in zip(errors(actual, oracle), errors(eager, oracle), ("max", "l2"), strict=True):
        assert got <= 2 * allowed + floor, f"{what} error {got:.3g} > 2 × {allowed:.3g} (eager) + {floor:.0e}"
