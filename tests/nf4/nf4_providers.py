"""Which provider `nf4_linear` and `NF4Weight.dequantize` run, chosen by a test."""

from __future__ import annotations

import pytest

from mmrec_kernels import library, schemas
from mmrec_kernels.nf4 import reference


def use_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on they run the reference, whatever this machine's providers are."""
    functions = {
        schemas.nf4_forward: reference.forward,
        schemas.nf4_backward: reference.backward,
        schemas.nf4_dequantize: reference.dequantize,
    }
    monkeypatch.setattr(library, "call", lambda op, *args: functions[op](*args))
