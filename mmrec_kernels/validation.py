"""Argument checks that all ops share: each raises an error that names the argument, what came and what is needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int32, torch.int64)


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(str(d).removeprefix("torch.") for d in dtypes)


def check_tensor(
    name: str,
    value: object,
    shape: Sequence[int | str | None],
    dtypes: Sequence[torch.dtype],
    *,
    device: torch.device | None = None,
) -> Tensor:
    """`value` as a tensor of `shape` (an int is a needed size, a str names a free one) and one of `dtypes`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    matches = value.ndim == len(shape) and all(
        not isinstance(need, int) or got == need for got, need in zip(value.shape, shape, strict=True)
    )
    if not matches:
        need = "[" + ", ".join("*" if s is None else str(s) for s in shape) + "]"
        raise ValueError(f"{name} must have shape {need}, got {list(value.shape)}")
    if value.dtype not in dtypes:
        raise TypeError(f"{name} must be {_names(dtypes)}, got {_names([value.dtype])}")
    if device is not None and value.device != device:
        raise ValueError(f"{name} must be on {device}, got {value.device}")
    return value


def float_dtypes(device: torch.device) -> tuple[torch.dtype, ...]:
    """The floating dtypes that the ops take on `device`: float64 is the exact path of the CPU, float16 is for GPUs."""
    return GPU_DTYPES if device.type == "cuda" else CPU_DTYPES


def check_float(
    name: str, value: object, shape: Sequence[int | str | None], *, device: torch.device | None = None
) -> Tensor:
    """`value` as a floating tensor that the ops support on its device."""
    dtypes = float_dtypes(value.device) if isinstance(value, Tensor) else CPU_DTYPES
    return check_tensor(name, value, shape, dtypes, device=device)


def check_index(name: str, value: object, shape: Sequence[int | str | None], *, device: torch.device) -> Tensor:
    """`value` as an int64 tensor; int32 is widened."""
    return check_tensor(name, value, shape, INTEGERS, device=device).to(torch.int64)


def check_offsets(name: str, offsets: Tensor, length: int) -> None:
    """Contents of CSR offsets: non-decreasing and inside [0, length]. Reads the tensor: a reference or CPU check."""
    if offsets.numel() == 0:
        raise ValueError(f"{name} must have at least one entry, got none")
    if int(offsets[0]) < 0 or int(offsets[-1]) > length or bool((offsets[1:] < offsets[:-1]).any()):
        raise ValueError(f"{name} must be non-decreasing and inside [0, {length}], got {offsets.tolist()[:8]}…")


def check_choice(name: str, value: str, choices: Sequence[str]) -> str:
    """`value` as one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def check_positive_int(name: str, value: object, *, least: int = 1) -> int:
    """`value` as an int of at least `least` (a SymInt passes: torch.compile traces sizes)."""
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if not isinstance(value, torch.SymInt) and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value  # type: ignore[return-value]


def autocast(*values: Any) -> tuple[Any, ...]:
    """Floating tensors in the dtype that autocast gives them on their device; as torch does, float64 is left alone.

    Anything else passes as it is, for the checks that follow.
    """

    def cast(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == torch.float64:
            return value
        device = value.device.type
        if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
            return value
        return value.to(torch.get_autocast_dtype(device))

    return tuple(cast(value) for value in values)
