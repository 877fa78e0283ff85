"""``mmrec latency``: where a request's milliseconds go, and what quality costs."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .console import print_rows, say, status, write_json
from .data import Data
from .index import write_store
from .runs import REPORT, TrainedRun, open_run
from .serve import load_reranker

if TYPE_CHECKING:
    from ..evaluation import Ragged, Stage
    from ..recommender import OnlineRecommender, Reranker
    from ..recommender.frontier import Point, Way

__all__ = ["latency_command", "measure"]

METRICS = ("NDCG@10", "HR@10")
_K = 10
_SHOWN = ("p50 ms", "p95 ms", "p99 ms")


def latency_command(
    *, runs: Sequence[Path], out: Path, data: Path | None, layout: str, dtypes: Sequence[str], depths: Sequence[int],
    batches: Sequence[int], widths: Sequence[int], reranker: str | None, quantize: str, rerank_users: int,
    stage: Stage, threads: int | None, seconds: float, seed: int, json_file: Path | None,
) -> None:  # fmt: skip
    """See ``mmrec latency --help``."""
    import torch
    from mmrec_kernels.benchmarks import rows

    if threads is not None:
        torch.set_num_threads(threads)
    opened = [open_run(run) for run in runs]
    labels = [run.label for run in opened]
    if len(set(labels)) < len(labels):
        labels = [str(run) for run in runs]
    read = opened[0].load_data(data, layout)
    for run in opened[1:]:
        run.check_data(read.catalogue, read.fingerprint)
    stages, points, frontier = measure(
        dict(zip(labels, opened, strict=True)), read, dtypes=dtypes, depths=depths, batches=batches, widths=widths,
        reranker=None if reranker is None else load_reranker(reranker, quantize), rerank_users=rerank_users,
        stage=stage, seconds=seconds, seed=seed,
    )  # fmt: skip
    content = {
        "command": "latency", "environment": rows.environment("cpu"), "dataset": read.catalogue.name,
        "fingerprint": read.fingerprint, "protocol": read.split.protocol, "split": read.split.id, "seed": seed,
        "threads": torch.get_num_threads(), "runs": [str(run) for run in runs], "reranker": reranker,
        "stages": stages, "stage": stage, "frontier": frontier,
    }  # fmt: skip
    _print(points)
    write_json(out / "latency.json", content)
    write_json(json_file, content)
    say(f"report: {_write_report(read, content, points, out)}")


def measure(
    runs: Mapping[str, TrainedRun], data: Data, *, dtypes: Sequence[str], depths: Sequence[int], batches: Sequence[int],
    widths: Sequence[int] = (), reranker: Reranker | None = None, rerank_users: int = 0, stage: Stage = "test",
    seconds: float, seed: int,
) -> tuple[list[dict[str, Any]], list[Point], list[dict[str, Any]]]:  # fmt: skip
    """Rows of the stages of a request, the ways to answer, and the same ways as rows.

    Args:
        runs: by the name that tables give them.
        depths, batches, widths: last items read, requests at a time, candidates ranked again.
        seconds: per stage and way.
    """
    models = {label: run.model_id for label, run in runs.items()}
    with ExitStack() as stack:
        onlines = {
            (label, dtype): stack.enter_context(_online(run, data, dtype, reranker))
            for label, run in runs.items()
            for dtype in dtypes
        }
        stages = _stages(onlines, _histories(data, stage), batches, seconds)
        points = _frontier(onlines, data, stage, depths, widths if reranker else (), rerank_users, seconds, seed)
    return stages, points, [_row(point, points, models) for point in points]


@contextmanager
def _online(run: TrainedRun, data: Data, dtype: str, reranker: Reranker | None) -> Iterator[OnlineRecommender]:
    from ..recommender import ItemStore, OnlineRecommender

    with tempfile.TemporaryDirectory(prefix="mmrec-") as folder:
        write_store(run, data.catalogue, Path(folder), dtype)
        yield OnlineRecommender(run.model, ItemStore(folder), model_id=run.model_id, reranker=reranker)


def _histories(data: Data, stage: Stage) -> list[list[str]]:
    """Of the users of the stage, in their order."""
    split, ids = data.split, data.catalogue.item_ids
    rows = split.history(stage).rows(split.users(stage))
    return [[ids[item] for item in rows.ids[a:b]] for a, b in zip(rows.offsets[:-1], rows.offsets[1:], strict=True)]


def _stages(
    onlines: dict[tuple[str, str], OnlineRecommender], histories: list[list[str]], batches: Sequence[int],
    seconds: float,
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows of every stage, by batch, of the first run in each dtype: other runs of one width take the same."""
    from ..recommender.latency import Load, measure

    found: list[dict[str, Any]] = []
    read = np.minimum([len(one) for one in histories], next(iter(onlines.values())).model.config.max_length)
    for (label, dtype), online in onlines.items():
        if label != next(iter(onlines))[0]:
            continue
        for batch in batches:
            with status(f"{dtype}, {batch} at a time"):
                load = Load(round(float(read.mean())), batch, _K)
                measured = measure(online, load, seconds=seconds, histories=histories)
            found += [asdict(row) for row in measured]
    return found


def _frontier(
    onlines: dict[tuple[str, str], OnlineRecommender], data: Data, stage: Stage, depths: Sequence[int],
    widths: Sequence[int], rerank_users: int, seconds: float, seed: int,
) -> list[Point]:  # fmt: skip
    from ..recommender.frontier import Point, Way, pareto, time_ways
    from ..recommender.planning import Plan

    def ways(rerank: Sequence[int]) -> dict[Way, OnlineRecommender]:
        found: dict[Way, OnlineRecommender] = {}
        # Ranking again takes the same whatever it follows, and long: once.
        for (label, dtype), online in list(onlines.items())[: None if rerank == (0,) else 1]:
            most = online.model.config.max_length
            read = sorted({*(depth for depth in depths if depth < most), most})
            for depth in read if rerank == (0,) else [most]:
                found |= {Way(label, dtype, Plan(depth, width)): online for width in rerank}
        return found

    histories, relevant = _histories(data, stage), data.split.relevant(stage)
    points: list[Point] = []
    for chosen in (ways((0,)), ways(widths)):
        if not chosen:
            continue
        with status(f"timing {len(chosen)} ways to answer"):
            taken = time_ways(chosen, histories, _K, seconds=seconds, seed=seed)
        for way, online in chosen.items():
            with status(f"ranking by {way}"):
                values = _quality(online, way, histories, relevant, rerank_users, seed)
            p50, p95, p99 = np.percentile(taken[way], [50, 95, 99])
            points.append(Point(way, float(p50), float(p95), float(p99), len(taken[way]), values))
    # Those that are ranked again are worth what they are for fewer users: compared with the same users of their own.
    return pareto(points, lambda point: _worth(point, points))


def _quality(
    online: OnlineRecommender, way: Way, histories: list[list[str]], relevant: Ragged, rerank_users: int, seed: int
) -> dict[str, np.ndarray]:
    """Each metric for each user; NaN for those that were left out."""
    from ..evaluation.metrics import per_user
    from ..recommender.frontier import rank_by

    users = np.arange(len(histories))
    if way.plan.rerank and len(users) > rerank_users:
        users = np.sort(np.random.default_rng(seed).choice(users, rerank_users, replace=False))
    found = rank_by(online, [histories[n] for n in users], _K, way.plan)
    ranked = np.full((len(users), _K), -1, np.int64)
    for n, items in enumerate(found):
        ranked[n, : len(items)] = online.version.rows(items)
    values = {}
    for name, value in per_user(ranked, relevant.rows(users), METRICS).items():
        values[name] = np.full(len(histories), np.nan)
        values[name][users] = value
    return values


def _mean(point: Point, metric: str) -> float:
    return float(np.nanmean(point.values[metric]))


def _plain(point: Point, points: Sequence[Point]) -> Point:
    """The same way without ranking again."""
    wanted = point.way._replace(plan=point.way.plan._replace(rerank=0))
    return next(other for other in points if other.way == wanted)


def _worth(point: Point, points: Sequence[Point], metric: str = METRICS[0]) -> float:
    """The mean of all users. Where not all were ranked again: that of the way without, and the mean change."""
    plain = _plain(point, points).values[metric]
    return float(plain.mean() + np.nanmean(point.values[metric] - plain))


def _row(point: Point, points: Sequence[Point], models: dict[str, str]) -> dict[str, Any]:
    from ..evaluation.intervals import bootstrap, paired_bootstrap

    known = {name: value[np.isfinite(value)] for name, value in point.values.items()}
    intervals = {name: bootstrap(value) for name, value in known.items()}
    change = {}
    if point.way.plan.rerank:
        plain = _plain(point, points).values
        for name, value in point.values.items():
            done = np.isfinite(value)
            found = paired_bootstrap(value[done], plain[name][done])
            change[name] = [found.mean, found.low, found.high]
    return {
        "model": point.way.model, "dtype": point.way.dtype, **point.way.plan._asdict(), "p50_ms": point.p50_ms,
        "p95_ms": point.p95_ms, "p99_ms": point.p99_ms, "calls": point.calls, "frontier": point.best,
        "worth": _worth(point, points), "change": change, "model_id": models[point.way.model],
        "users": len(known[METRICS[0]]), "metrics": {name: [i.mean, i.low, i.high] for name, i in intervals.items()},
    }  # fmt: skip


def _print(points: Sequence[Point]) -> None:
    rows = [
        [
            *("* " if point.best else "  ", point.way.model, point.way.dtype, str(point.way.plan.depth)),
            str(point.way.plan.rerank or "–"), f"{point.p50_ms:.2f}", f"{point.p95_ms:.2f}", f"{point.p99_ms:.2f}",
            *(f"{_mean(point, name):.4f}" for name in METRICS), str(int(np.isfinite(point.values[METRICS[0]]).sum())),
        ]
        for point in points
    ]  # fmt: skip
    header = ["", "model", "store", "depth", "reranked", *_SHOWN, *METRICS, "users"]
    print_rows(header, rows, left=3, title="single requests; * nothing is both as fast and as good")


def _write_report(data: Data, content: dict[str, Any], points: Sequence[Point], out: Path) -> Path:
    from ..evaluation import write_report

    page = {
        "title": f"{data.catalogue.name}: quality and latency",
        "subtitle": f"single requests in one process, {content['threads']} thread(s), {content['environment']['cpu']}",
        "fingerprint": data.fingerprint[:12],
        "protocol": f"{data.split.protocol}: {data.split.origin}, {content['stage']}",
        "frontier": {"quality": METRICS[0], "rows": content["frontier"]},
        "latency": content["stages"],
    }
    return write_report(page, out / REPORT)
