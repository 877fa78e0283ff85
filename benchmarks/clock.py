"""How one call is timed and its memory measured, on CPU and on CUDA."""

from __future__ import annotations

import ctypes
import time
from pathlib import Path
from typing import Any, Protocol

import torch

from .case import Call

PAUSE = 0.010
_REPEAT_BELOW = 0.1


class Clock(Protocol):
    """Times calls on one device."""

    def seconds(self, call: Call) -> float:
        """The duration of one call."""
        ...

    def peak_bytes(self, call: Call) -> int | None:
        """The most memory that one call holds at a time beyond what was held before it, its result included; None where
        the system cannot tell."""
        ...


class CpuClock:
    """Wall time of a call in its own steady state, and the growth of the process's resident memory.

    Libraries bring thread pools and caches of their own, and providers take turns. After a parallel region the threads
    of a pool spin before they sleep, on cores that the next provider needs: hence a pause. Then a call shorter than
    0.1 s is made twice and the second is timed: its own threads are awake, its data is where a run of calls leaves it.
    """

    def __init__(self, pause: float = PAUSE) -> None:
        self._pause = pause
        self._libc = ctypes.CDLL(None)

    def seconds(self, call: Call) -> float:
        time.sleep(self._pause)
        elapsed = self._once(call)
        return self._once(call) if elapsed < _REPEAT_BELOW else elapsed

    @staticmethod
    def _once(call: Call) -> float:
        start = time.perf_counter()
        result: Any = call()
        elapsed = time.perf_counter() - start
        del result  # kept until the clock has stopped: giving memory back is not the call's work
        return elapsed

    def peak_bytes(self, call: Call) -> int | None:
        """From Linux' high-water mark of this process, so every allocator and thread counts. Free heap is given back
        first, or a call would reuse pages for nothing. Buffers that a library keeps from an earlier call do not count.
        The mark is exact to some hundred KiB."""
        try:
            if hasattr(self._libc, "malloc_trim"):
                self._libc.malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            before = _status("VmRSS")
            result: Any = call()
            peak = _status("VmHWM")
            del result
        except OSError:
            return None
        return max(peak - before, 0)


def _status(field: str) -> int:
    """A size of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


class CudaClock:
    """CUDA events around a call, with the L2 cache flushed before it, and torch's own count of allocated memory.

    The flush keeps the GPU busy while Python enqueues the call: a short kernel's time is then not that of its launch.
    """

    def __init__(self) -> None:
        l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self._flush = torch.empty(max(4 * l2, 256 * 2**20) // 4, dtype=torch.int32, device="cuda")

    def seconds(self, call: Call) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._flush.zero_()
        start.record()
        result: Any = call()
        end.record()
        end.synchronize()
        del result
        return start.elapsed_time(end) / 1e3

    def peak_bytes(self, call: Call) -> int | None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result: Any = call()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
        del result
        return peak - before


def clock(device: str) -> Clock:
    """The clock of a device type."""
    return CudaClock() if device == "cuda" else CpuClock()
