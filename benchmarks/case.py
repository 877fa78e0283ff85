"""What a benchmark is made of: a case (one shape, dtype and mode of one op) and the providers that compute it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import library

Inputs = dict[str, Any]
Call = Callable[[], Any]

MODES = ("forward", "backward", "full")


@dataclass(frozen=True)
class Work:
    """The least that any provider of a case has to do: floating-point operations, and bytes read and written once."""

    flops: int
    read: int
    written: int


def _as_it_is(inputs: Inputs, result: Any) -> Any:
    return result


@dataclass(frozen=True)
class Provider:
    """One way to compute a case.

    Attributes:
        name: says what it is, its version aside.
        make: the inputs and the mode to a call without arguments; what it prepares (an index, a layout) is not timed.
        finish: the inputs and a result of the call to the form that all providers of the case are compared in.
        ours: whether it is this package's own.
        yardstick: whether it computes a part of the case only, to hold the others against: neither judged nor a peer.
        module: what must be importable for it, "" for torch alone.
        install: the package that brings `module`.
    """

    name: str
    make: Callable[[Inputs, str], Call]
    finish: Callable[[Inputs, Any], Any] = _as_it_is
    ours: bool = False
    yardstick: bool = False
    module: str = ""
    install: str = ""

    def missing(self) -> str | None:
        """Why it cannot run here, or None."""
        if not self.module or importlib.util.find_spec(self.module) is not None:
            return None
        return f"{self.module} is not installed (pip install {self.install or self.module})"


@dataclass(frozen=True)
class Case:
    """One row group of a benchmark.

    Attributes:
        shape: the sizes that tell the case from its neighbours, in the order in which they are printed.
        inputs: makes the inputs, the same ones for all providers.
        judge: the inputs to a function that measures a finished result against float64.
        compute_dtype: the dtype of the flop rate that the flops are held against.
    """

    op: str
    shape: dict[str, int]
    dtype: str
    device: str
    mode: str
    work: Work
    providers: tuple[Provider, ...]
    inputs: Callable[[], Inputs]
    judge: Callable[[Inputs], Callable[[Any], dict[str, float]]]
    compute_dtype: torch.dtype


def our_name(raw_op: str, device: str) -> str:
    """`mmrec` and who serves the op on the device, so that no reference passes for a kernel."""
    for provider in library.providers():
        if (provider.op, provider.device) == (raw_op, device):
            return f"mmrec ({provider.name})"
    raise LookupError(f"no provider of {raw_op} was announced for {device}")


def by_candidate(candidate: Any, function: Call, of: Any = None) -> Call:
    """`function`, a call of a public function, with another of our kernels in place of the provider of its raw op: of
    each that it calls, or of the op `of`."""

    def call() -> Any:
        served = library.call
        library.call = lambda op, *args: candidate(*args) if of in (None, op) else served(op, *args)
        try:
            return function()
        finally:
            library.call = served

    return call


def in_mode(function: Callable[[], Tensor], leaves: Sequence[Tensor], grad: Tensor, mode: str) -> Call:
    """`function` as a call in `mode`: its result without gradients (forward), the gradients of `leaves` under the
    upstream gradient `grad` from a graph that is kept (backward), or both passes (full)."""

    def forward() -> tuple[Tensor]:
        with torch.no_grad():
            return (function(),)

    def full() -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(), leaves, grad)

    if mode == "forward":
        return forward
    if mode == "full":
        return full
    out = function()
    return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)


def leaf(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor of its own that gradients are asked for."""
    return tensor.detach().to(dtype or tensor.dtype, copy=True).requires_grad_()


def relative_errors(results: Sequence[Tensor], oracles: Sequence[Tensor]) -> dict[str, float]:
    """The larger, over the tensors, of max|a−o| / max|o| and of ‖a−o‖₂ / ‖o‖₂, both in float64."""
    worst = {"max": 0.0, "l2": 0.0}
    for result, oracle in zip(results, oracles, strict=True):
        if result.shape != oracle.shape:
            raise ValueError(f"result must have shape {list(oracle.shape)}, got {list(result.shape)}")
        wide = oracle.to("cpu", torch.float64)
        difference = result.detach().to("cpu", torch.float64) - wide
        if wide.numel() == 0:
            continue
        if not bool(difference.isfinite().all()):
            raise ValueError("result must be finite, got an infinity or a NaN")
        for name, norm in (("max", torch.inf), ("l2", 2)):
            scale = float(torch.linalg.vector_norm(wide, norm))
            error = float(torch.linalg.vector_norm(difference, norm))
            worst[name] = max(worst[name], error / scale if scale else error)
    return worst


def against(oracles: Sequence[Tensor]) -> Callable[[Any], dict[str, float]]:
    """The judge of results that are sequences of tensors."""
    return lambda results: relative_errors(results, oracles)


def torch_dtype(name: str) -> torch.dtype:
    """`torch.float32` of "float32"."""
    return getattr(torch, name)


def generator(device: str, seed: int = 0) -> torch.Generator:
    """Seeded; on the device, where large inputs are made."""
    return torch.Generator(device).manual_seed(seed)
