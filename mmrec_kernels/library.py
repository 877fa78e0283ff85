"""Loads the compiled libraries and picks one provider per (op, device).

It knows no op by name: each op's folder announces its own providers here, and this module decides, before anything is
registered, which of them serves each device.

- cpu: the compiled C++ kernel of `_C`, else the reference.
- cuda: the CUDA C++ kernel of `_C_cuda`, else the Triton kernel, else the reference.
- any other device: the reference.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd import forward_ad

from . import schemas

_FOLDER = Path(__file__).parent
_IMPL = torch.library.Library("mmrec", "IMPL")


@dataclass(frozen=True)
class Provider:
    """Who serves one op on one device type, and why."""

    op: str
    device: str
    name: str
    reason: str


@dataclass(frozen=True)
class CompiledLibrary:
    """A compiled library of this package: loaded, or why not."""

    name: str
    loaded: bool
    reason: str


_providers: dict[tuple[str, str], Provider] = {}


def _load(name: str, unusable: str | None) -> CompiledLibrary:
    path = _FOLDER / f"{name}.so"
    if not path.exists():
        return CompiledLibrary(name, False, "not built")
    if unusable:
        return CompiledLibrary(name, False, unusable)
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return CompiledLibrary(name, False, f"could not be loaded: {error}")
    return CompiledLibrary(name, True, "loaded")


def _cuda_unusable() -> str | None:
    """Why `_C_cuda` cannot serve here, or None. The build wrote its toolkit's version into `_C_cuda.version`."""
    if torch.version.cuda is None:
        return "this torch has no CUDA"
    if not torch.cuda.is_available():
        return "no CUDA device is visible"
    built = (_FOLDER / "_C_cuda.version").read_text().strip()
    driver: int = torch._C._cuda_getDriverVersion() // 1000  # type: ignore[attr-defined]
    if driver < int(built.split(".")[0]):
        return f"built with CUDA {built}, the driver supports CUDA {driver}"
    return None


_cpu_library = _load("_C", None)
_cuda_library = _load("_C_cuda", _cuda_unusable() if (_FOLDER / "_C_cuda.so").exists() else None)


def _has_kernel(op: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"mmrec::{op}", key)


def announce(op: str, *, reference: Callable[..., Any], triton: Callable[[], Callable[..., Any]] | None = None) -> None:
    """Register the providers of raw op `op` that need registering.

    The reference is registered under CompositeExplicitAutograd, so that it serves every device for which no kernel is
    registered under the device's own key. `triton` returns the launcher; it is called only where Triton is to serve, so
    that nothing imports Triton elsewhere.
    """
    _IMPL.impl(op, _without_autocast(reference), "CompositeExplicitAutograd")
    if _has_kernel(op, "CPU"):
        _providers[op, "cpu"] = Provider(op, "cpu", "compiled", f"C++, {cpu_isa()}")
    else:
        why = "no kernel in _C yet" if _cpu_library.loaded else f"_C {_cpu_library.reason}"
        _providers[op, "cpu"] = Provider(op, "cpu", "reference", why)
    _providers[op, "cuda"] = _announce_cuda(op, triton)


def _without_autocast(provider: Callable[..., Any]) -> Callable[..., Any]:
    """Autocast stays on inside an op written in Python and would round its float32 matmuls to 16 bits."""

    @functools.wraps(provider)
    def run(*args: Any) -> Any:
        device = next(a for a in args if isinstance(a, torch.Tensor)).device.type
        if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
            return provider(*args)
        with torch.autocast(device, enabled=False):
            return provider(*args)

    return run


def _on_its_device(launcher: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device and its stream, which need not be those of the tensors."""

    @functools.wraps(launcher)
    def run(*args: Any) -> Any:
        with torch.cuda.device(next(a for a in args if isinstance(a, torch.Tensor)).device):
            return launcher(*args)

    return run


def _announce_cuda(op: str, triton: Callable[[], Callable[..., Any]] | None) -> Provider:
    if _has_kernel(op, "CUDA"):
        return Provider(op, "cuda", "cuda", "CUDA C++")
    if triton is None:
        return Provider(op, "cuda", "reference", "no Triton or CUDA kernel yet")
    if importlib.util.find_spec("triton") is None:
        return Provider(op, "cuda", "reference", "triton is not installed")
    if torch.version.cuda is None:
        return Provider(op, "cuda", "triton", "needs a CUDA torch; this one has none")
    _IMPL.impl(op, _without_autocast(_on_its_device(triton())), "CUDA")
    return Provider(op, "cuda", "triton", "Triton")


def providers() -> list[Provider]:
    """One row per (op, device), in the order in which the ops were announced."""
    return list(_providers.values())


def compiled_libraries() -> list[CompiledLibrary]:
    """The CPU and the CUDA library: loaded, or why not."""
    return [_cpu_library, _cuda_library]


def cpu_isa() -> str:
    """The instruction set that the compiled CPU kernels run on, chosen by cpuid or by `MMREC_CPU_ISA`."""
    if not _cpu_library.loaded:
        return "none"
    return schemas.ISA_NAMES[call(schemas.cpu_isa, torch.empty(0))]


def detached(args: Iterable[Any]) -> list[Any]:
    """The arguments of a call without autograd: tensors, and lists of them, without their history.

    Raises:
        NotImplementedError: one of them has a tangent of forward mode, which would be dropped in silence.
    """
    return [_detached(a) for a in args]


def _detached(value: Any) -> Any:
    if isinstance(value, list):
        return [_detached(entry) for entry in value]
    if not isinstance(value, torch.Tensor):
        return value
    # Dynamo does not know the level; compiled code has no dual tensors.
    if not torch.compiler.is_compiling() and forward_ad._current_level >= 0:
        if forward_ad.unpack_dual(value).tangent is not None:
            raise NotImplementedError(
                "the ops of mmrec_kernels have no forward-mode derivative, as torch.func.jvp wants it: use reverse mode"
            )
    return value.detach()


_MESSAGE = re.compile(r"mmrec: (.*?)(?:\n|$)")


def call(op: Any, *args: Any) -> Any:
    """Run raw op `op`; a complaint of a compiled kernel about the contents of an argument becomes a ValueError.

    The stable ABI carries errors as RuntimeError only. Kernels mark theirs with `mmrec: `.
    """
    if torch.compiler.is_compiling():
        return op(*args)
    try:
        return op(*args)
    except RuntimeError as error:
        found = _MESSAGE.search(str(error))
        if found is None:
            raise
        raise ValueError(found.group(1)) from None


def check_requested() -> bool:
    """Whether `MMREC_CHECK=1` asks for the synchronising check of index contents on GPU."""
    return os.environ.get("MMREC_CHECK", "0") == "1"
