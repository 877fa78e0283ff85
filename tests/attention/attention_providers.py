"""Which provider the public function of attention runs, chosen by a test."""

from __future__ import annotations

import pytest

from mmrec_kernels import library, schemas
from mmrec_kernels.attention import reference


def use_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on the public function runs the reference, whatever this machine's provider is."""
    functions = {schemas.attention_forward: reference.forward, schemas.attention_backward: reference.backward}
    monkeypatch.setattr(library, "call", lambda op, *args: functions[op](*args))
