"""`python -m mmrec_kernels`: versions, instruction set, and which provider serves each op on which device, and why."""

from __future__ import annotations

import platform
from collections.abc import Sequence

import torch

from . import __version__, library


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def main() -> None:
    """Print the report."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "not installed"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    facts = [
        ("mmrec_kernels", __version__),
        ("python", platform.python_version()),
        ("torch", f"{torch.__version__}, {torch.get_num_threads()} threads, CUDA {torch.version.cuda or 'none'}"),
        ("triton", triton_version),
        ("cpu", f"instruction set {library.cpu_isa()} (MMREC_CPU_ISA overrides)"),
        ("gpu", gpu),
        *((f"{lib.name}.so", lib.reason) for lib in library.compiled_libraries()),
    ]
    print(_table(facts))
    rows = [("op", "device", "provider", "why")]
    rows += [(p.op.lstrip("_"), p.device, p.name, p.reason) for p in library.providers()]
    print("\n" + _table(rows))


if __name__ == "__main__":
    main()
