"""Which provider `route` and `mixture_of_experts` run, chosen by a test."""

from __future__ import annotations

import pytest

from mmrec_kernels import library, schemas
from mmrec_kernels.routing import reference, reference_experts


def use_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on both run the reference, whatever this machine's providers are."""
    functions = {
        schemas.routing_forward: reference.forward,
        schemas.routing_backward: reference.backward,
        schemas.experts_forward: reference_experts.forward,
        schemas.experts_backward: reference_experts.backward,
    }
    monkeypatch.setattr(library, "call", lambda op, *args: functions[op](*args))
