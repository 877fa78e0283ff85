"""What this machine can do, measured in the same run: how fast it reads, copies and multiplies.

The floor of a case is the time below which no provider can go:

    max(read / read bandwidth + written / write bandwidth, flops / flop rate)

A copy of n bytes reads and writes n, so its rate c and the read rate r give the cost of a written byte, 1/c − 1/r. The
flop rate is that of `torch.mm`, or on a CPU that of multiply-adds in registers where it is higher: a matrix product of
a library tuned for another CPU was seen at less than half of it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mmrec_kernels import library, schemas

from .case import Call, Work
from .clock import Clock

_ROUNDS = 7
_LOOPS = 2_000_000


@dataclass
class Roofline:
    """Best rates seen on one device, over buffers larger than its caches."""

    device: str
    buffer_bytes: int
    read_bytes_per_s: float
    copy_bytes_per_s: float
    flops_per_s: dict[str, float] = field(default_factory=dict)

    def floor(self, work: Work, compute_dtype: torch.dtype, read_seconds: float | None = None) -> float:
        """Seconds. `read_seconds`: a streaming read of `work.read` bytes timed among the providers, which is what
        counts where the data fits into a cache; the faster of the two reads is taken. So is the faster flop rate of
        float32 and `compute_dtype`: a CPU without 16-bit products is better off widening."""
        read = work.read / self.read_bytes_per_s
        if read_seconds is not None:
            read = min(read, read_seconds)
        write_cost = max(1 / self.copy_bytes_per_s - 1 / self.read_bytes_per_s, 0.0)
        compute = work.flops / max(self.flops_per_s[_name(d)] for d in (compute_dtype, torch.float32))
        return max(read + work.written * write_cost, compute)


def measure(
    device: str, clock: Clock, dtypes: set[torch.dtype], *, buffer_bytes: int | None = None, side: int | None = None
) -> Roofline:
    """The roofline of `device` for products in float32 and `dtypes`: the best of several reads, copies, and `torch.mm`
    of `[side, side]` matrices or multiply-adds in registers. By default the buffers are larger than the caches, and the
    matrices large."""
    size = buffer_bytes or beyond_cache(device)
    read = size / _best(clock, reader(device, size))
    copied = size / _best(clock, _copier(device, size))
    side = side or (8192 if device == "cuda" else 2048)
    rates = {
        _name(dtype): max(2 * side**3 / _best(clock, _product(device, side, dtype)), _registers(device, clock, dtype))
        for dtype in sorted(dtypes | {torch.float32}, key=str)
    }
    return Roofline(device, size, read, copied, rates)


def reader(device: str, nbytes: int) -> Call:
    """A streaming read of `nbytes`: the sum of a buffer of that size, which torch runs on all its threads."""
    buffer = torch.ones(max(nbytes // 4, 1), device=device)
    return buffer.sum


def _copier(device: str, nbytes: int) -> Call:
    source = torch.ones(nbytes // 4, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _product(device: str, side: int, dtype: torch.dtype) -> Call:
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return lambda: torch.mm(a, b)


def _registers(device: str, clock: Clock, dtype: torch.dtype) -> float:
    """Flops per second of multiply-adds in registers; 0 where that is unknown."""
    if device != "cpu" or library.cpu_isa() == "none" or dtype not in (torch.float32, torch.bfloat16):
        return 0.0

    def multiply() -> int:
        return int(library.call(schemas.multiply, torch.empty(0), _LOOPS, dtype == torch.bfloat16))

    return multiply() / _best(clock, multiply)


def beyond_cache(device: str) -> int:
    """Twice the largest cache and at least 256 MiB, but at most an eighth of the machine's memory."""
    if device == "cuda":
        return max(8 * torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size, 2**30)
    wanted = max(2 * max(cache_sizes().values(), default=0), 256 * 2**20)
    return min(wanted, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 8)


def cache_sizes() -> dict[str, int]:
    """Bytes of the first core's data caches by level ("L1", …); empty where the system does not tell."""
    sizes = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            kind, level, size = ((folder / name).read_text().strip() for name in ("type", "level", "size"))
        except OSError:
            continue
        if kind != "Instruction" and size[-1:] in "KM":
            sizes[f"L{level}"] = int(size[:-1]) * (1024 if size[-1] == "K" else 2**20)
    return sizes


def _best(clock: Clock, call: Call) -> float:
    call()
    return min(clock.seconds(call) for _ in range(_ROUNDS))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
