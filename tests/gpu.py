"""What GPU tests of several ops do alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def on_gpu(given: dict[str, Any]) -> dict[str, Any]:
    """Inputs by name, moved there."""
    return {name: value.to("cuda") for name, value in given.items()}


def assert_captured(step: Callable[[], tuple[Tensor, ...]]) -> None:
    """`step` waits for nothing: a CUDA graph takes it, and replays the same bits."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expected = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
