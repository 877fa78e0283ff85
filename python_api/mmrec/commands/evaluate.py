"""``mmrec evaluate``: a floor or a trained run, with the floors and paired intervals beside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .console import console, print_rows, say, write_json
from .data import Data, load_data
from .rankers import evaluate_floor, floor_name, floor_names
from .runs import TrainedRun, open_run

if TYPE_CHECKING:
    from ..evaluation import Interval, Result, Seen, Stage

__all__ = ["SHOWN", "differences", "evaluate_command", "figures", "print_differences", "print_groups", "with_metrics"]

SHOWN = ("HR@10", "NDCG@10", "Recall@20")


def evaluate_command(
    *,
    data: Path | None,
    layout: str,
    protocol: str | None,
    model: str,
    neighbours: int | None,
    stage: Stage,
    mask: Seen | None,
    against: Sequence[str],
    metrics: Sequence[str],
    groups: bool,
    floors: bool,
    split_seed: int,
    hold_out: float | None,
    json_file: Path | None,
) -> None:
    """See ``mmrec evaluate --help``."""
    from ..evaluation import print_table

    shown = _shown(metrics)
    name = floor_name(model, neighbours)
    others = [floor_name(other, neighbours) for other in against]
    beside = floor_names(neighbours) if floors else ()
    wanted = list(dict.fromkeys([name, *beside, *others]))
    known = floor_names(neighbours)
    runs = {entry: open_run(Path(entry)) for entry in wanted if entry not in known}
    read = _read(data, layout, protocol, split_seed, hold_out, model, runs.get(name))
    results: dict[str, Result] = {}
    for entry in wanted:
        settings: dict[str, Any] = {
            "stage": stage, "mask": mask, "metrics": with_metrics(shown), "groups": groups and entry == name,
        }  # fmt: skip
        results[entry] = (
            runs[entry].evaluate(read, **settings) if entry in runs else evaluate_floor(entry, read, **settings)
        )
    results = _distinct(results)
    print_table(list(results.values()), shown, rows=["all"], console=console())
    if groups:
        print_groups(results[name], shown)
    compared = {other: differences(results[name], results[other], shown) for other in wanted if other != name}
    if compared:
        print_differences(results[name].model, {results[k].model: v for k, v in compared.items()}, shown)
    hidden = read.split.unreachable(stage, mask)
    if hidden:
        say(f"{hidden} target(s) are hidden by the mask {results[name].mask!r} and count as misses.")
    write_json(json_file, evaluation_json(read, results, name, compared))


def with_metrics(shown: Sequence[str]) -> tuple[str, ...]:
    """The metrics that every result holds, and those asked for."""
    from ..evaluation import DEFAULT_METRICS

    return tuple(dict.fromkeys([*DEFAULT_METRICS, *shown]))


def differences(
    ours: Result | Sequence[Result], other: Result | Sequence[Result], metrics: Sequence[str]
) -> dict[str, Interval]:
    """Paired 95 % intervals of ``ours − other`` per metric."""
    from ..evaluation import compare

    return {metric: compare(ours, other, metric) for metric in metrics}


def figures(intervals: Mapping[str, Interval]) -> dict[str, Any]:
    """Intervals as JSON values."""
    return {metric: asdict(interval) for metric, interval in intervals.items()}


def print_differences(model: str, compared: Mapping[str, Mapping[str, Interval]], metrics: Sequence[str]) -> None:
    """One line per model that ``model`` is compared with; a star marks intervals without 0."""
    rows = [
        [f"{model} − {other}", *(f"{values[m]}{' *' if values[m].excludes_zero else '  '}" for m in metrics)]
        for other, values in compared.items()
    ]
    level = next(iter(next(iter(compared.values())).values())).level
    print_rows(["paired difference", *metrics], rows, title=f"mean [{level:.0%} bootstrap interval], * excludes 0")


def print_groups(result: Result, metrics: Sequence[str]) -> None:
    """The groups of users and targets behind the mean of one model."""
    rows = [
        [name, str(len(row.users)), *(f"{row.metrics[metric]:.4f}" for metric in metrics)]
        for name, row in result.rows.items()
        if name != "all"
    ]
    if rows:
        print_rows(["group", "users", *metrics], rows, title=f"{result.model}, by group of targets")


def evaluation_json(
    data: Data, results: Mapping[str, Result], name: str, compared: Mapping[str, Mapping[str, Interval]]
) -> dict[str, Any]:
    """The result of ``name`` at the top level; the others and the paired intervals below it."""
    beside = {key: result.to_dict() for key, result in results.items() if key != name}
    return {
        "command": "evaluate",
        **results[name].to_dict(),
        "split_rule": data.split.origin,
        "beside": beside,
        "differences": {other: figures(values) for other, values in compared.items()},
    }


def _read(
    data: Path | None,
    layout: str,
    protocol: str | None,
    split_seed: int,
    hold_out: float | None,
    model: str,
    run: TrainedRun | None,
) -> Data:
    """The data that was named, or that the run was trained on; under the protocol that was named, or the run's."""
    if run is None:
        if data is None or protocol is None:
            missing = "--data" if data is None else "--protocol"
            raise ValueError(f"{missing} is needed to evaluate {model!r}: only a run remembers its own")
        return load_data(data, protocol, layout=layout, split_seed=split_seed, hold_out=hold_out)
    if protocol not in (None, run.protocol):
        raise ValueError(
            f"--protocol {protocol}: {run.folder} was trained under {run.protocol}; under another protocol it would be "
            "asked for items that it was trained on"
        )
    if hold_out not in (None, run.facts["source"]["hold_out"]):
        raise ValueError(f"--hold-out {hold_out}: {run.folder} was trained with {run.facts['source']['hold_out']}")
    return run.load_data(data, layout)


def _distinct(results: Mapping[str, Result]) -> dict[str, Result]:
    """Two runs of the same modalities and seed are told apart by their folders."""
    names = Counter((result.model, result.seed) for result in results.values())
    return {
        entry: replace(result, model=entry) if names[result.model, result.seed] > 1 else result
        for entry, result in results.items()
    }


def _shown(metrics: Sequence[str]) -> tuple[str, ...]:
    from ..evaluation.metrics import Metric

    return tuple(str(Metric.parse(name)) for name in metrics) or SHOWN
