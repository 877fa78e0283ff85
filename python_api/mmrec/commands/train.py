"""``mmrec train``: one run, evaluated beside the floors and an identity-only model, with its report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .console import say, write_json
from .data import Data, load_data
from .evaluate import SHOWN, differences, evaluation_json, print_differences, print_groups, with_metrics
from .rankers import evaluate_floor, floor_names
from .runs import REPORT, Source, TrainedRun, fit
from .settings import Choices, only
from .sharded import training_ranks

if TYPE_CHECKING:
    from ..evaluation import Interval, Result
    from ..recommender.config import RecommenderConfig
    from ..recommender.parallel import Alone

__all__ = ["train_and_report", "train_command"]

IDENTITY_FOLDER = "identity-only"


def train_command(
    *,
    data: Path,
    out: Path,
    protocol: str,
    choices: Choices,
    seed: int,
    resume: bool,
    floors: bool,
    compare_identity: bool,
    layout: str,
    split_seed: int,
    hold_out: float | None,
    parallel: str | None,
    json_file: Path | None,
) -> None:
    """See ``mmrec train --help``."""
    with training_ranks(parallel) as ranks:
        read = load_data(data, protocol, layout=layout, split_seed=split_seed, hold_out=hold_out)
        config = choices.config(read.catalogue, seed)
        source = Source(data.absolute(), layout, protocol, split_seed, hold_out)
        content = train_and_report(
            read, config, out, source, resume=resume, floors=floors, compare_identity=compare_identity, ranks=ranks
        )
        if ranks.rank == 0:
            write_json(json_file, content)


def train_and_report(
    data: Data,
    config: RecommenderConfig,
    out: Path,
    source: Source,
    *,
    resume: bool = False,
    floors: bool = True,
    compare_identity: bool = True,
    ranks: Alone | None = None,
) -> dict[str, Any]:
    """Trains into ``out``, prints the comparison, writes ``report.html``; returns the figures as JSON values.

    Of several ranks only the first one does what comes after training.
    """
    metrics = with_metrics(SHOWN)
    say(f"{data.catalogue!r}, protocol {data.split.protocol}: {data.split.origin}")
    say(f"training {', '.join(config.modalities)} into {out}")
    run = fit(data, config, out, source, resume=resume, metrics=metrics, ranks=ranks)
    results = {run.label: run.result}
    if compare_identity and config.content:
        say(f"training identity-only into {out / IDENTITY_FOLDER}")
        identity, folder = only(config, ("identity",)), out / IDENTITY_FOLDER
        plain = fit(data, identity, folder, source, resume=True, metrics=metrics, ranks=ranks)
        results[plain.label] = plain.result
    if ranks is not None and ranks.rank:
        return {}
    names = floor_names(None) if floors else ()
    results |= {name: evaluate_floor(name, data, metrics=metrics) for name in names}
    compared = {name: differences(run.result, result, SHOWN) for name, result in results.items() if name != run.label}
    _print(run, results, compared)
    _write_report(data, run, results, compared, names)
    say(f"run: {out}   report: {out / REPORT}")
    facts = {name: run.facts[name] for name in ("best_epoch", "epochs", "seconds")}
    return {
        **evaluation_json(data, results, run.label, compared),
        "command": "train",
        "run": str(out),
        "report": str(out / REPORT),
        "config": config.to_dict(),
        **facts,
    }


def _print(run: TrainedRun, results: Mapping[str, Result], compared: Mapping[str, Mapping[str, Interval]]) -> None:
    from ..evaluation import print_table
    from .console import console

    print_table(list(results.values()), SHOWN, rows=["all"], console=console())
    print_groups(run.result, SHOWN)
    if compared:
        print_differences(run.label, compared, SHOWN)


def _write_report(
    data: Data,
    run: TrainedRun,
    results: Mapping[str, Result],
    compared: Mapping[str, Mapping[str, Interval]],
    floors: Sequence[str],
) -> None:
    from ..evaluation import write_report
    from ..evaluation.report import group_rows, metric_rows

    trained = {name: result for name, result in results.items() if name not in floors}
    page: dict[str, Any] = {
        "title": f"{data.catalogue.name}: {run.label}",
        "subtitle": "epoch {best_epoch} of {epochs} was best; {seconds:.0f} s of training".format(**run.facts),
        "fingerprint": data.fingerprint[:12],
        "protocol": f"{data.split.protocol}: {data.split.origin}",
        "seeds": [run.seed],
        "metrics": metric_rows(results, SHOWN, floors=floors),
        "differences": [{"model": f"{run.label} − {name}", "values": dict(v)} for name, v in compared.items()],
        "slices": group_rows(trained, SHOWN),
        "curves": run.curves(),
        "config": {**run.config.to_dict(), "data": run.facts["source"]["data"]},
    }
    if run.config.content:
        page["modalities"] = run.attention()
    if experts := run.expert_shares():
        page["experts"] = experts
    write_report(page, run.folder / REPORT)
