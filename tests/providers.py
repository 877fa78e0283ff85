"""Which providers the public functions of an op run, chosen by a test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mmrec_kernels import library, validation

Functions = dict[Any, Callable[..., Any]]  # of raw ops


def serve(monkeypatch: pytest.MonkeyPatch, functions: Functions) -> None:
    """From here on raw ops run these, whatever this machine's providers are."""
    monkeypatch.setattr(library, "call", lambda op, *args: functions[op](*args))


def serve_gpu_code(monkeypatch: pytest.MonkeyPatch, launchers: Functions) -> None:
    """From here on raw ops run what is written for GPUs, interpreted or emulated, on CPU tensors of all dtypes."""
    serve(monkeypatch, launchers)
    every = (*validation.GPU_DTYPES, torch.float64)
    monkeypatch.setattr(validation, "float_dtypes", lambda device: every)
