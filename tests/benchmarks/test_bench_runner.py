"""Order and bounds of timed calls, memory, the roofline, ratios: on clocks and machines whose answers are known."""

import gc
import math

import bench_package  # noqa: F401
import pytest
import torch
from mmrec_kernels.benchmarks import roofline, runner
from mmrec_kernels.benchmarks.case import Case, Provider, Work, in_mode, leaf, relative_errors
from mmrec_kernels.benchmarks.clock import CpuClock
from mmrec_kernels.benchmarks.rows import Row, compare

from mmrec_kernels import library, schemas


class FakeClock:
    """Takes each call's own return value for its duration."""

    def seconds(self, call):
        return call()

    def peak_bytes(self, call):
        return 1000


def logged(log, name, seconds):
    def call():
        log.append(name)
        return seconds

    return call


def test_providers_take_turns():
    log = []
    samples = runner.interleave({n: logged(log, n, 0.25) for n in "abc"}, FakeClock(), seconds=1.5, least=1)
    assert "".join(log) == "abcabc"  # a share of 0.5 s is two calls of 0.25 s
    assert samples == {n: [0.25, 0.25] for n in "abc"}


def test_a_slow_provider_leaves_after_the_least_number_of_calls():
    log = []
    calls = {"slow": logged(log, "s", 10.0), "fast": logged(log, "f", 0.125)}
    samples = runner.interleave(calls, FakeClock(), seconds=2.0, least=3)
    assert "".join(log) == "sf" * 3 + "f" * 5
    assert {name: len(times) for name, times in samples.items()} == {"slow": 3, "fast": 8}


def test_number_of_calls_is_bounded():
    samples = runner.interleave({"a": lambda: 0.0}, FakeClock(), seconds=1.0, most=20)
    assert len(samples["a"]) == 20


def test_garbage_collection_is_off_while_timing_and_back_afterwards():
    seen = []

    def call():
        seen.append(gc.isenabled())
        return 1.0

    runner.interleave({"a": call}, FakeClock(), seconds=0.0)
    assert seen == [False] * runner.LEAST_CALLS
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        runner.interleave({"a": lambda: 1 / 0}, FakeClock(), seconds=0.0)
    assert gc.isenabled()


def test_a_short_call_is_timed_the_second_time_and_a_long_one_once(monkeypatch):
    now, sleeps, calls = [0.0], [], []
    monkeypatch.setattr("mmrec_kernels.benchmarks.clock.time.perf_counter", lambda: now[0])
    monkeypatch.setattr("mmrec_kernels.benchmarks.clock.time.sleep", sleeps.append)

    def lasting(*durations):
        left = list(durations)

        def call():
            calls.append(left[0])
            now[0] += left.pop(0)

        return call

    clock = CpuClock(pause=0.5)
    assert clock.seconds(lasting(0.0625, 0.03125)) == 0.03125
    assert clock.seconds(lasting(0.75)) == 0.75
    assert calls == [0.0625, 0.03125, 0.75]
    assert sleeps == [0.5, 0.5]


def test_peak_bytes_sees_temporaries_every_time():
    mib = 2**20

    def call():
        temporary = torch.ones(48 * mib // 4)
        return temporary[: 4 * mib // 4] + 1

    clock = CpuClock()
    if clock.peak_bytes(call) is None:
        pytest.skip("this system does not tell a process's peak memory")
    for _ in range(3):
        assert 48 * mib < clock.peak_bytes(call) < 64 * mib
    assert clock.peak_bytes(lambda: None) < 2 * mib


def test_peak_bytes_of_memory_that_the_heap_would_reuse():
    """Small blocks stay resident after free: unless they are given back, a second call would seem to take nothing."""
    mib = 2**20
    clock = CpuClock()
    if clock.peak_bytes(lambda: None) is None:
        pytest.skip("this system does not tell a process's peak memory")

    def call():
        return [bytearray(100_000) for _ in range(200)]

    call()
    assert [clock.peak_bytes(call) > 15 * mib for _ in range(3)] == [True] * 3


ROOF = roofline.Roofline(
    "cpu", 1, read_bytes_per_s=1e9, copy_bytes_per_s=0.5e9, flops_per_s={"float32": 1e9, "bfloat16": 5e8}
)


def test_floor():
    def floor(flops, read, written, dtype=torch.float32, read_seconds=None):
        return ROOF.floor(Work(flops, read, written), dtype, read_seconds)

    assert floor(0, 10**9, 0) == 1.0
    assert floor(0, 10**9, 10**9) == 2.0  # a copy of 1 GB takes 2 s: one to read it, one to write it
    assert floor(3 * 10**9, 10**9, 0) == 3.0  # bound by the product
    assert floor(10**9, 0, 0, torch.bfloat16) == 1.0  # by the faster of the two products
    assert floor(0, 10**9, 0, read_seconds=0.25) == 0.25  # cached
    assert floor(0, 10**9, 0, read_seconds=7.0) == 1.0


def test_roofline_is_measured():
    found = roofline.measure("cpu", CpuClock(pause=0.0), {torch.bfloat16}, buffer_bytes=2**22, side=64)
    assert set(found.flops_per_s) == {"float32", "bfloat16"}
    rates = (found.read_bytes_per_s, found.copy_bytes_per_s, *found.flops_per_s.values())
    assert all(math.isfinite(rate) and rate > 1e6 for rate in rates)
    assert found.read_bytes_per_s < 1e13  # it did read
    assert roofline.beyond_cache("cpu") >= 2 * max(roofline.cache_sizes().values(), default=0) or (
        roofline.beyond_cache("cpu") < max(roofline.cache_sizes().values())  # an eighth of a small memory
    )


@pytest.mark.skipif(library.cpu_isa() == "none", reason="_C is not built")
def test_multiply_counts_its_flops():
    lanes = {"base": 4, "avx2": 8, "avx512": 16, "avx512_bf16": 16}[library.cpu_isa()]
    steps = 100 * 12 * lanes * torch.get_num_threads()
    assert library.call(schemas.multiply, torch.empty(0), 100, False) == 2 * steps
    pairs = 4 * steps if library.cpu_isa() == "avx512_bf16" else 0
    assert library.call(schemas.multiply, torch.empty(0), 100, True) == pairs


def test_the_faster_product_counts(monkeypatch):
    monkeypatch.setattr(roofline, "_registers", lambda *_: 1e18)
    found = roofline.measure("cpu", CpuClock(pause=0.0), set(), buffer_bytes=2**20, side=64)
    assert found.flops_per_s == {"float32": 1e18}


def row(provider, median_ms):
    return Row("op", {"n": 1}, "float32", "cpu", "forward", provider, median_ms, 1.0, 2.0, 0, {}, 1, 1, {})


def test_ratios():
    rows = [row("ours", 2.0), row("ours, other kernel", 4.0), row("peer a", 9.0), row("peer b", 3.0)]
    found = compare(rows, {"ours", "ours, other kernel"}, 0.5, 0.4, {})
    assert (found.ours, found.best_peer, found.speedup, found.over_floor) == ("ours", "peer b", 1.5, 4.0)
    assert found.read_ms == 0.4
    lost = compare(rows[1:], {"ours, other kernel"}, 0.5, 0.4, {})
    assert (lost.best_peer, lost.speedup) == ("peer b", 0.75)
    beside = compare(rows, {"ours"}, 0.5, 0.4, {}, {"peer b", "ours, other kernel"})
    assert (beside.best_peer, beside.speedup) == ("peer a", 4.5)
    alone = compare(rows[:1], {"ours"}, 0.5, 0.4, {})
    assert (alone.best_peer, alone.speedup) == (None, None)


def toy(*providers):
    return Case(
        "toy",
        {"n": 4},
        "float32",
        "cpu",
        "forward",
        Work(8, 16, 16),
        providers,
        inputs=lambda: {"x": torch.arange(4.0)},
        judge=lambda given: lambda result: relative_errors([result], [given["x"].double() * 2]),
        compute_dtype=torch.float32,
    )


def provider(name, function, **kwargs):
    return Provider(name, lambda given, mode: lambda: function(given["x"]), **kwargs)


OURS = provider("ours", lambda x: x * 2, ours=True)


def test_a_case_lists_what_is_missing_and_what_failed():
    peers = (
        provider("absent", lambda x: x * 2, module="no_such_module_here", install="no-such-package"),
        provider("broken", lambda x: x @ torch.ones(3)),
        provider("not a number", lambda x: x * torch.nan),
        provider("another shape", lambda x: x[:2]),
        provider("sound", lambda x: x + x),
    )
    found = runner.run(toy(OURS, *peers), CpuClock(pause=0.0), ROOF, seconds=0.0)
    assert [r.provider for r in found.rows] == ["ours", "sound"]
    reasons = {m.provider: m.reason for m in found.missing}
    assert reasons["absent"] == "no_such_module_here is not installed (pip install no-such-package)"
    assert reasons["broken"].startswith("failed: RuntimeError: ")
    assert reasons["not a number"] == "failed: ValueError: result must be finite, got an infinity or a NaN"
    assert reasons["another shape"] == "failed: ValueError: result must have shape [4], got [2]"
    assert found.comparison.best_peer == "sound"
    assert found.comparison.calls == {"ours": runner.LEAST_CALLS, "sound": runner.LEAST_CALLS}
    for r in found.rows:
        assert 0 < r.p20_ms <= r.median_ms <= r.p80_ms
        assert (r.flops, r.bytes, r.error_vs_fp64) == (8, 32, {"max": 0.0, "l2": 0.0})


def test_our_own_failure_is_an_error():
    with pytest.raises(RuntimeError):
        runner.run(toy(provider("ours", lambda x: x @ torch.ones(3), ours=True)), CpuClock(0.0), ROOF, seconds=0.0)


def test_relative_errors():
    oracle = torch.tensor([3.0, -4.0], dtype=torch.float64)
    found = relative_errors([torch.tensor([3.0, -3.0]), torch.zeros(0)], [oracle, torch.zeros(0)])
    assert found == {"max": 0.25, "l2": 0.2}
    assert relative_errors([torch.tensor([0.5])], [torch.tensor([0.0])]) == {"max": 0.5, "l2": 0.5}


@pytest.mark.parametrize("mode", ["forward", "backward", "full"])
def test_modes(mode):
    passes = []
    x = leaf(torch.tensor([1.0, 2.0]))

    def function():
        passes.append(torch.is_grad_enabled())
        return x**3

    call = in_mode(function, [x], torch.tensor([10.0, 1.0]), mode)
    for _ in range(2):
        (result,) = call()
        expected = [1.0, 8.0] if mode == "forward" else [30.0, 12.0]  # 3 x² times the upstream gradient
        assert result.tolist() == expected
    assert passes == {"forward": [False, False], "backward": [True], "full": [True, True]}[mode]
