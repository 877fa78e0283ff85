from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from mmrec_kernels import schemas
from mmrec_kernels.infonce import autograd, reference


def use_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on the public functions run the reference, whatever this machine's provider is."""
    functions = {schemas.infonce_forward: reference.forward, schemas.infonce_backward: reference.backward}

    def call(op: Any, *args: Any) -> Any:
        return functions[op](*args)

    monkeypatch.setattr(autograd, "library", SimpleNamespace(call=call))


@pytest.fixture
def on_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    use_reference(monkeypatch)


@pytest.fixture(params=["served", "reference"])
def provider(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs a test twice: on the provider of this machine, and on the reference."""
    if request.param == "reference":
        use_reference(monkeypatch)
    return request.param
