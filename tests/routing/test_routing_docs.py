"""The example of the routing page runs as it stands."""

import re
from pathlib import Path

import pytest
import torch

import mmrec_kernels

PAGE = Path(__file__).parents[2] / "docs" / "routing.md"


@pytest.mark.skipif(not PAGE.exists(), reason="docs/ is not beside tests/")
def test_the_example_runs():
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict = {}
    exec(compile(example, str(PAGE), "exec"), names)
    assert names["out"].shape == names["click"].shape == (1000, 64)
    assert torch.isfinite(names["gate"].grad).all() and (names["gate"].grad != 0).any()
    assert {"route", "mixture_of_experts", "SharedExpert"} <= set(mmrec_kernels.__all__)
