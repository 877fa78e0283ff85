"""Which provider `route` runs, chosen by a test."""

from __future__ import annotations

import pytest

from mmrec_kernels import library, schemas
from mmrec_kernels.routing import reference


def use_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on `route` runs the reference, whatever this machine's provider is."""
    functions = {schemas.routing_forward: reference.forward, schemas.routing_backward: reference.backward}
    served = library.call
    monkeypatch.setattr(
        library, "call", lambda op, *args: functions[op](*args) if op in functions else served(op, *args)
    )
