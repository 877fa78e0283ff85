"""Which provider the public function of attention runs, chosen by a test."""

from __future__ import annotations

import pytest

from mmrec_kernels import schemas
from mmrec_kernels.attention import reference
from providers import serve, serve_gpu_code


def use_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on the public function runs the reference, whatever this machine's provider is."""
    functions = {schemas.attention_forward: reference.forward, schemas.attention_backward: reference.backward}
    serve(monkeypatch, functions)


def use_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on the public function runs the Triton launchers, on CPU tensors in the interpreter."""
    from mmrec_kernels.attention import triton as launchers

    functions = {schemas.attention_forward: launchers.forward, schemas.attention_backward: launchers.backward}
    serve_gpu_code(monkeypatch, functions)
