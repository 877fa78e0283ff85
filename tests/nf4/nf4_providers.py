"""Which provider `nf4_linear` and `NF4Weight.dequantize` run, chosen by a test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mmrec_kernels import schemas
from mmrec_kernels.nf4 import reference
from providers import serve, serve_gpu_code


def use_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on they run the reference, whatever this machine's providers are."""
    functions = {
        schemas.nf4_forward: reference.forward,
        schemas.nf4_backward: reference.backward,
        schemas.nf4_dequantize: reference.dequantize,
    }
    serve(monkeypatch, functions)


def use_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on they run the Triton launchers, on CPU tensors in the interpreter."""
    from mmrec_kernels.nf4 import triton as launchers

    functions = {
        schemas.nf4_forward: launchers.forward,
        schemas.nf4_backward: launchers.backward,
        schemas.nf4_dequantize: launchers.dequantize,
    }
    serve_gpu_code(monkeypatch, functions)


def use_forward(monkeypatch: pytest.MonkeyPatch, forward: Callable[..., Any]) -> None:
    """From here on `forward`, written for GPUs, serves on CPU tensors, and beside it the reference."""
    functions = {
        schemas.nf4_forward: forward,
        schemas.nf4_backward: reference.backward,
        schemas.nf4_dequantize: reference.dequantize,
    }
    serve_gpu_code(monkeypatch, functions)
