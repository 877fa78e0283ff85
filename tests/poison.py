"""Memory that nobody writes, seen."""

from __future__ import annotations

from typing import Any

import pytest
import torch


def poison_new_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on memory that launchers ask for holds NaN, or an id that there is not, so that what nobody writes is
    seen."""
    new_empty = torch.Tensor.new_empty

    def poisoned(self: torch.Tensor, *args: Any, **more: Any) -> torch.Tensor:
        found = new_empty(self, *args, **more)
        return found.fill_(torch.nan if found.is_floating_point() else 127)

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
