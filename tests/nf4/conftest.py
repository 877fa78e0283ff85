from __future__ import annotations

import pytest
from nf4_providers import use_reference, use_triton


@pytest.fixture(params=["served", "reference", pytest.param("triton", marks=pytest.mark.interpret)])
def provider(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test on the provider of this machine, on the reference, and on the Triton kernels in the interpreter."""
    if request.param == "reference":
        use_reference(monkeypatch)
    if request.param == "triton":
        use_triton(monkeypatch)
    return request.param
