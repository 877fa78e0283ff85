"""`python -m mmrec_kernels.benchmarks --op retrieval`: one op beside its peers, as a table and as JSON.

`--report DIR`: all ops, as a page too. `--compare OLD NEW`: two such runs beside each other.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from . import compare, measure, report, table
from .case import MODES, Case
from .rows import NotWritten, write_whole

OPS = ("attention", "infonce", "routing", "nf4", "retrieval")
# Those that have a CUDA C++ kernel that does not serve yet.
CANDIDATES = ("attention", "routing", "nf4", "retrieval")
Modules = Mapping[str, ModuleType]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mmrec_kernels.benchmarks",
        description="Times one op and every installed peer, interleaved in one run, beside what the machine can do.",
    )
    parser.add_argument(
        "--op", action="append", choices=OPS, help="required without --report, which takes all, or several --op"
    )
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
    parser.add_argument(
        "--report", type=Path, metavar="DIR", help="write a page and the rows there after every case: DIR/index.html"
    )
    parser.add_argument(
        "--compare",
        nargs=2,
        type=Path,
        metavar=("OLD", "NEW"),
        help="print ratios of two earlier runs, folders or JSON files; with --report DIR as DIR/compare.html too",
    )
    return parser


def _chosen(
    parser: argparse.ArgumentParser, flag: str, given: str | None, available: Mapping[str, Sequence[str]], where: str
) -> dict[str, list[str]]:
    """What is `given`, of what is `available` for each op: some op must have it, not all."""
    known = dict.fromkeys(name for names in available.values() for name in names)
    names = list(known) if given is None else given.split(",")
    for name in names:
        if name not in known:
            parser.error(f"{flag} must be of {', '.join(known)} for {where}, got {name!r}")
    return {op: [name for name in names if name in of] for op, of in available.items()}


def _ops(parser: argparse.ArgumentParser, args: argparse.Namespace) -> list[str]:
    if args.op is None and args.report is None:
        parser.error("the following arguments are required: --op, or --report for all ops")
    ops = list(dict.fromkeys(args.op or OPS))
    if len(ops) > 1 and args.report is None:
        parser.error(f"--op is one without --report, got {', '.join(ops)}")
    if args.report is not None and (args.json is not None or args.json_dir is not None):
        parser.error("--report writes the rows beside its page, --json and --json-dir are without it")
    return ops


def _options(parser: argparse.ArgumentParser, args: argparse.Namespace, modules: Modules) -> dict[str, dict[str, Any]]:
    """What `cases` of each op is to be called with."""
    ops = ", ".join(modules)
    available = {op: module.DTYPES[args.device] for op, module in modules.items()}
    dtypes = _chosen(parser, "--dtype", args.dtype, available, f"{ops} on {args.device}")
    available = {op: getattr(module, "MODES", MODES) for op, module in modules.items()}
    modes = _chosen(parser, "--mode", args.mode, available, ops)
    found: dict[str, dict[str, Any]] = {op: {"dtypes": dtypes[op], "modes": modes[op]} for op in modules}
    if args.k is not None:
        if "retrieval" not in modules:
            parser.error(f"--k is an option of --op retrieval, got --op {ops}")
        found["retrieval"]["ks"] = _ks(parser, args, modules["retrieval"])
    if args.candidates:
        having = [op for op in modules if op in CANDIDATES]
        if not having or args.device != "cuda":
            parser.error(f"--candidates is an option of {', '.join(CANDIDATES)} on cuda, got {ops} on {args.device}")
        for op in having:
            found[op]["candidates"] = True
    return found


def _ks(parser: argparse.ArgumentParser, args: argparse.Namespace, module: ModuleType) -> list[int]:
    most = min(items for _, items, _ in module.SHAPES[args.shapes])
    try:
        ks = [int(k) for k in args.k.split(",")]
    except ValueError:
        parser.error(f"--k must be integers with commas between them, got {args.k!r}")
    if not all(1 <= k <= most for k in ks):
        parser.error(f"--k must be in 1 to {most} for the {args.shapes} shapes, got {args.k!r}")
    return ks


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


def _path(parser: argparse.ArgumentParser, args: argparse.Namespace, op: str) -> Path | None:
    """Where the JSON goes; the folder of `--json-dir` is made."""
    if args.json_dir is not None:
        try:
            return measure.path_in(args.json_dir, op, args.device)
        except OSError as error:
            parser.error(f"--json-dir {args.json_dir}: {error.strerror}")
    reason = None if args.json is None else measure.why_not_written(args.json)
    if reason is not None:
        parser.error(f"--json {args.json}: {reason}")
    return args.json


def _folder(
    parser: argparse.ArgumentParser, args: argparse.Namespace, ops: Sequence[str], cases: Sequence[Case]
) -> report.Folder | None:
    """Where the report goes; the folder is made. Says which ops are not in it."""
    if args.report is None:
        return None
    having = {case.op for case in cases}
    reason = report.why_not(args.report, [op for op in OPS if op not in having])
    if reason is not None:
        parser.error(f"--report {args.report}: {reason}")
    for op in ops:
        if op not in having:
            print(f"{op} is left out: it has no case of these", file=sys.stderr)
    return report.Folder(args.report, cases)


def _compare(parser: argparse.ArgumentParser, args: argparse.Namespace) -> int:
    others = (name for name in vars(args) if name not in ("compare", "report"))
    given = [f"--{name.replace('_', '-')}" for name in others if getattr(args, name) != parser.get_default(name)]
    if given:
        parser.error(f"--compare measures nothing and takes --report only, got {', '.join(given)}")
    try:
        old, new = map(compare.read, args.compare)
    except OSError as error:
        parser.error(f"--compare: cannot read {error.filename}: {error.strerror}")
    except ValueError as error:
        parser.error(f"--compare: {error}")
    print(compare.text(old, new))
    if args.report is None:
        return 0
    reason = report.why_not(args.report)
    if reason is not None:
        parser.error(f"--report {args.report}: {reason}")
    page = args.report / "compare.html"
    try:
        write_whole(page, compare.html(old, new))
    except NotWritten as error:
        return _cannot_write(error)
    print(f"report: {page}")
    return 0


def _cannot_write(error: OSError) -> int:
    print(f"cannot write {error.filename}: {error.strerror}", file=sys.stderr)
    return 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Exit code: 0; 1 if a file cannot be written, 2 for wrong arguments, 130 if interrupted."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.compare is not None:
        return _compare(parser, args)
    ops = _ops(parser, args)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a CUDA torch and a visible GPU: torch.cuda.is_available() is False")
    if args.threads is not None and args.threads < 1:
        parser.error(f"--threads must be at least 1, got {args.threads}")
    if not args.seconds >= 0:
        parser.error(f"--seconds must not be negative, got {args.seconds}")
    modules = {op: importlib.import_module(f".{op}", __package__) for op in ops}
    options = _options(parser, args, modules)
    path = _path(parser, args, ops[0])
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    having = [op for op in ops if options[op]["dtypes"] and options[op]["modes"]]
    cases = [case for op in having for case in modules[op].cases(args.shapes, args.device, **options[op])]
    if args.where is not None:
        cases = _where(parser, args.where, cases)
    try:
        measure.measure(cases, args.device, args.seconds, path, _folder(parser, args, ops, cases))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except NotWritten as error:
        return _cannot_write(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
