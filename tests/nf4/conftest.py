from __future__ import annotations

import pytest
from nf4_providers import use_reference


@pytest.fixture(params=["served", "reference"])
def provider(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test on the provider of this machine and on the reference."""
    if request.param == "reference":
        use_reference(monkeypatch)
    return request.param
