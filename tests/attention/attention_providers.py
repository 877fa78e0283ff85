"""Which provider the public function of attention runs, chosen by a test."""

from __future__ import annotations

import pytest
import torch

from mmrec_kernels import library, schemas, validation
from mmrec_kernels.attention import reference


def use_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on the public function runs the reference, whatever this machine's provider is."""
    functions = {schemas.attention_forward: reference.forward, schemas.attention_backward: reference.backward}
    monkeypatch.setattr(library, "call", lambda op, *args: functions[op](*args))


def use_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on the public function runs the Triton launchers, on CPU tensors in the interpreter."""
    from mmrec_kernels.attention import triton as launchers

    functions = {schemas.attention_forward: launchers.forward, schemas.attention_backward: launchers.backward}
    monkeypatch.setattr(library, "call", lambda op, *args: functions[op](*args))
    every = (*validation.GPU_DTYPES, torch.float64)
    monkeypatch.setattr(validation, "float_dtypes", lambda device: every)
