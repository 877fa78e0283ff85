"""`python -m mmrec_kernels.benchmarks --op retrieval`: one op beside its peers, as a table and as JSON."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from . import measure, table
from .case import MODES, Case

OPS = ("attention", "infonce", "routing", "nf4", "retrieval")
# Those that have a CUDA C++ kernel that does not serve yet.
CANDIDATES = ("attention", "routing", "nf4", "retrieval")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mmrec_kernels.benchmarks",
        description="Times one op and every installed peer, interleaved in one run, beside what the machine can do.",
    )
    parser.add_argument("--op", required=True, choices=OPS)
    parser.add_argument("--shapes", choices=("small", "full"), default="small", help="default: small")
    parser.add_argument("--dtype", metavar="NAME[,NAME]", help="default: all that the op has on the device")
    parser.add_argument("--mode", metavar="MODE[,MODE]", help=f"of {', '.join(MODES)}; default: all that the op has")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument("--k", metavar="K[,K]", help="retrieval: how many items to return; default: 10,100")
    parser.add_argument(
        "--candidates",
        action="store_true",
        help=f"also our CUDA C++ kernels that do not serve yet; {', '.join(CANDIDATES)} on cuda",
    )
    parser.add_argument("--where", metavar="SIZE=N[,SIZE=N]", help="only shapes of these sizes, named as in the table")
    parser.add_argument("--threads", type=int, metavar="N", help="default: torch's own choice")
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="time per case beyond the least number of calls; default: 10"
    )
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--json", type=Path, metavar="FILE", help="write the rows there after every case")
    target.add_argument("--json-dir", type=Path, metavar="DIR", help="write them to DIR/<device>/<op>.json")
    return parser


def _chosen(
    parser: argparse.ArgumentParser, flag: str, given: str | None, available: Sequence[str], where: str
) -> list[str]:
    names = list(available) if given is None else given.split(",")
    for name in names:
        if name not in available:
            parser.error(f"{flag} must be of {', '.join(available)} for {where}, got {name!r}")
    return names


def _ks(parser: argparse.ArgumentParser, args: argparse.Namespace, module: ModuleType) -> dict[str, Any]:
    if args.k is None:
        return {}
    if args.op != "retrieval":
        parser.error(f"--k is an option of --op retrieval, got --op {args.op}")
    most = min(items for _, items, _ in module.SHAPES[args.shapes])
    try:
        ks = [int(k) for k in args.k.split(",")]
    except ValueError:
        parser.error(f"--k must be integers with commas between them, got {args.k!r}")
    if not all(1 <= k <= most for k in ks):
        parser.error(f"--k must be in 1 to {most} for the {args.shapes} shapes, got {args.k!r}")
    return {"ks": ks}


def _where(parser: argparse.ArgumentParser, given: str, cases: Sequence[Case]) -> list[Case]:
    """The cases whose shapes have the sizes that are `given`."""
    sizes = {}
    for part in given.split(","):
        name, _, size = part.partition("=")
        if not size.isdecimal():
            parser.error(f"--where must be sizes like batch=256, with commas between them, got {part!r}")
        sizes[name] = int(size)
    found = [case for case in cases if all(case.shape.get(name) == size for name, size in sizes.items())]
    if not found:
        shapes = dict.fromkeys(table.shape_text(case.shape) for case in cases)
        parser.error(f"--where {given}: no shape has these sizes; there are\n  " + "\n  ".join(shapes))
    return found


def _path(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Path | None:
    """Where the JSON goes; the folder of `--json-dir` is made."""
    if args.json_dir is not None:
        try:
            return measure.path_in(args.json_dir, args.op, args.device)
        except OSError as error:
            parser.error(f"--json-dir {args.json_dir}: {error.strerror}")
    reason = None if args.json is None else measure.why_not_written(args.json)
    if reason is not None:
        parser.error(f"--json {args.json}: {reason}")
    return args.json


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Exit code: 0; 1 if the JSON cannot be written, 2 for wrong arguments, 130 if interrupted."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a CUDA torch and a visible GPU: torch.cuda.is_available() is False")
    if args.threads is not None and args.threads < 1:
        parser.error(f"--threads must be at least 1, got {args.threads}")
    if not args.seconds >= 0:
        parser.error(f"--seconds must not be negative, got {args.seconds}")
    module = importlib.import_module(f".{args.op}", __package__)
    dtypes = _chosen(parser, "--dtype", args.dtype, module.DTYPES[args.device], f"{args.op} on {args.device}")
    modes = _chosen(parser, "--mode", args.mode, getattr(module, "MODES", MODES), args.op)
    options = _ks(parser, args, module)
    if args.candidates:
        if args.op not in CANDIDATES or args.device != "cuda":
            parser.error(
                f"--candidates is an option of {', '.join(CANDIDATES)} on cuda, got {args.op} on {args.device}"
            )
        options["candidates"] = True
    path = _path(parser, args)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    cases = module.cases(args.shapes, args.device, dtypes, modes, **options)
    if args.where is not None:
        cases = _where(parser, args.where, cases)
    try:
        measure.measure(cases, args.device, args.seconds, path)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        if path is None or error.filename != str(path):
            raise
        print(f"cannot write {path}: {error.strerror or error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
