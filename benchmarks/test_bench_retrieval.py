"""`make bench`: the retrieval cases under pytest-benchmark, which keeps and compares runs of one machine.

Against peers, use `python -m mmrec_kernels.benchmarks`: there the providers take turns.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")

from mmrec_kernels.benchmarks import retrieval  # noqa: E402

CASES = retrieval.cases("small", "cpu", retrieval.DTYPES["cpu"])


def _name(case: retrieval.Case) -> str:
    return "x".join(str(size) for size in case.shape.values()) + f"-{case.dtype}"


@pytest.mark.parametrize("case", CASES, ids=_name)
def test_retrieval(benchmark: Any, case: retrieval.Case) -> None:
    """Our provider on each small case, and that its answer is right."""
    benchmark.group = _name(case)
    benchmark.extra_info.update(shape=case.shape, dtype=case.dtype, work=asdict(case.work))
    inputs = case.inputs()
    ours = next(provider for provider in case.providers if provider.ours)
    errors = case.judge(inputs)(benchmark(ours.make(inputs, case.mode)))
    assert errors["rank_agreement"] == 1.0
    assert errors["max"] < 1e-5
