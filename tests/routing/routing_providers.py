"""Which provider `route` and `mixture_of_experts` run, chosen by a test."""

from __future__ import annotations

import pytest

from mmrec_kernels import schemas
from mmrec_kernels.routing import reference, reference_experts
from providers import serve, serve_gpu_code


def use_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on both run the reference, whatever this machine's providers are."""
    functions = {
        schemas.routing_forward: reference.forward,
        schemas.routing_backward: reference.backward,
        schemas.experts_forward: reference_experts.forward,
        schemas.experts_backward: reference_experts.backward,
    }
    serve(monkeypatch, functions)


def use_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on both run the Triton launchers, on CPU tensors in the interpreter."""
    from mmrec_kernels.routing import triton as launchers

    functions = {
        schemas.routing_forward: launchers.route_forward,
        schemas.routing_backward: launchers.route_backward,
        schemas.experts_forward: launchers.experts_forward,
        schemas.experts_backward: launchers.experts_backward,
    }
    serve_gpu_code(monkeypatch, functions)
