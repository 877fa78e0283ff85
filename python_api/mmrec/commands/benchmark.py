"""``mmrec benchmark``: whole backbones under NF4 and LoRA, beside bitsandbytes with peft, and dense ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

__all__ = ["benchmark_command", "rows_path"]


def benchmark_command(
    *,
    models: Sequence[str],
    dtypes: Sequence[str],
    modes: Sequence[str],
    rank: int,
    device: str,
    threads: int | None,
    seconds: float,
    json_file: Path | None,
    json_dir: Path | None,
) -> None:
    """See ``mmrec benchmark --help``."""
    import torch
    from mmrec_kernels.benchmarks import measure

    from ..llm import benchmark

    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda needs a CUDA torch and a visible GPU: torch.cuda.is_available() is False")
    models = _chosen("--model", models, benchmark.MODELS, [name for name in benchmark.MODELS if name != "tiny"])
    dtypes = _chosen("--dtype", dtypes, benchmark.DTYPES[device])
    modes = _chosen("--mode", modes, benchmark.MODES)
    if threads is not None:
        torch.set_num_threads(threads)
    cases = [case for model in models for case in benchmark.cases(model, device, dtypes, modes, rank)]
    if not cases:
        raise ValueError("--mode step needs an adapter to train, got --lora 0")
    measure.measure(cases, device, seconds, rows_path(json_file, json_dir, "backbone", device))


def rows_path(json_file: Path | None, json_dir: Path | None, name: str, device: str) -> Path | None:
    """Where the rows of a benchmark go; ValueError, before hours of work, where they cannot."""
    from mmrec_kernels.benchmarks import measure

    if json_file is not None and json_dir is not None:
        raise ValueError("--json and --json-dir are two ways to say where the rows go; give one")
    reason = None if json_file is None else measure.why_not_written(json_file)
    if reason is not None:
        raise ValueError(f"--json {json_file}: {reason}")
    return json_file if json_dir is None else measure.path_in(json_dir, name, device)


def _chosen(
    flag: str, given: Sequence[str], available: Sequence[str], default: Sequence[str] | None = None
) -> list[str]:
    for name in given:
        if name not in available:
            raise ValueError(f"{flag} must be of {', '.join(available)}, got {name!r}")
    return list(given or default or available)
