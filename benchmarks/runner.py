"""Runs a case: every provider in turn, round after round, so that what else the machine does hits them all alike."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from .case import Call, Case, Inputs, Provider
from .clock import Clock
from .roofline import Roofline, reader
from .rows import Comparison, Missing, Row, compare, versions

LEAST_CALLS = 3
MOST_CALLS = 200
_READ = "streaming read"


@dataclass
class CaseResult:
    """What one case adds to a report."""

    rows: list[Row]
    missing: list[Missing]
    comparison: Comparison


@contextmanager
def _no_collection() -> Iterator[None]:
    gc.collect()
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def interleave(
    calls: Mapping[str, Call], clock: Clock, seconds: float, *, least: int = LEAST_CALLS, most: int = MOST_CALLS
) -> dict[str, list[float]]:
    """Seconds of the calls of each provider, made one after another in rounds: A B C A B C …

    Each has an equal share of `seconds`. One that has used its share leaves after `least` calls, the others go on, for
    `most` calls at the most.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    share = seconds / max(len(calls), 1)
    active = list(calls)
    with _no_collection():
        while active:
            for name in active:
                samples[name].append(clock.seconds(calls[name]))
            active = [
                name
                for name in active
                if len(samples[name]) < most and (len(samples[name]) < least or sum(samples[name]) < share)
            ]
    return samples


def run(case: Case, clock: Clock, roofline: Roofline, seconds: float, *, least: int = LEAST_CALLS) -> CaseResult:
    """Measure all providers of a case. What is made once (an index, a graph), a first call, errors and memory are not
    timed. A peer that cannot run is listed as missing; if ours cannot, that is an error."""
    inputs = case.inputs()
    judge = case.judge(inputs)
    calls: dict[str, Call] = {}
    errors: dict[str, dict[str, float]] = {}
    missing = []
    for provider in case.providers:
        reason = provider.missing()
        if reason is None:
            try:
                call = provider.make(inputs, case.mode)
                errors[provider.name] = {} if provider.yardstick else judge(provider.finish(inputs, call()))
                calls[provider.name] = call
            except Exception as error:
                if provider.ours:
                    raise
                reason = f"failed: {type(error).__name__}: {_first_line(error)}"
        if reason is not None:
            missing.append(Missing(**_key(case), provider=provider.name, reason=reason))
    del judge
    peaks = {name: clock.peak_bytes(call) for name, call in calls.items()}
    samples = interleave({**calls, _READ: reader(case.device, case.work.read)}, clock, seconds, least=least)
    read_seconds = median(samples.pop(_READ))
    made = [_row(case, p, samples[p.name], peaks[p.name], errors[p.name]) for p in case.providers if p.name in calls]
    floor_ms = 1e3 * roofline.floor(case.work, case.compute_dtype, read_seconds)
    ours = {p.name for p in case.providers if p.ours}
    yardsticks = {p.name for p in case.providers if p.yardstick}
    counts = {name: len(times) for name, times in samples.items()}
    return CaseResult(made, missing, compare(made, ours, floor_ms, 1e3 * read_seconds, counts, yardsticks))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")


def _key(case: Case) -> Inputs:
    return {"op": case.op, "shape": case.shape, "dtype": case.dtype, "device": case.device, "mode": case.mode}


def _row(case: Case, provider: Provider, times: list[float], peak: int | None, error: dict[str, Any]) -> Row:
    p20, mid, p80 = (1e3 * float(q) for q in np.quantile(times, (0.2, 0.5, 0.8)))
    return Row(
        **_key(case),
        provider=provider.name,
        median_ms=mid,
        p20_ms=p20,
        p80_ms=p80,
        peak_bytes=peak,
        error_vs_fp64=error,
        flops=case.work.flops,
        bytes=case.work.read + case.work.written,
        versions=versions(provider.module, provider.install),
    )
