"""Which provider the public functions of InfoNCE run, chosen by a test."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from mmrec_kernels import library, schemas
from mmrec_kernels.infonce import autograd, reference


def use_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on the public functions run the reference, whatever this machine's provider is."""
    functions = {schemas.infonce_forward: reference.forward, schemas.infonce_backward: reference.backward}

    def call(op: Any, *args: Any) -> Any:
        return functions[op](*args)

    monkeypatch.setattr(autograd, "library", SimpleNamespace(call=call, detached=library.detached))
